"""One way to time: warm up, repeat, report the median and the spread; whole calls, or their GPU kernels alone."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds per call over `repeats` calls."""

  median: float
  p10: float
  p90: float
  repeats: int

  @classmethod
  def of(cls, seconds: Sequence[float]) -> "Timing":
    """Summarises the seconds of single calls."""
    p10, median, p90 = np.percentile(seconds, [10, 50, 90]).tolist()
    return cls(median=median, p10=p10, p90=p90, repeats=len(seconds))

  def __str__(self) -> str:
    return f"{1e3 * self.median:.3g} ms (p10 {1e3 * self.p10:.3g}, p90 {1e3 * self.p90:.3g}, n={self.repeats})"


def measure(fn: Callable[..., Any], *args: Any, warmup: int = 2, repeats: int = 10) -> Timing:
  """Times `fn(*args)` until everything it returns is computed on the device (`jax.block_until_ready`).

  Each call is timed alone, dispatch included: on a GPU a call much shorter than about 0.1 ms reads as its dispatch (see
  `measure_kernels`). The first calls compile and are not counted. A function that consumes (donates) its arguments
  cannot be called twice with them: wrap it in one that keeps what it returned.

  Args:
    fn: returns a pytree of arrays, or None.
    *args: passed to each call.
    warmup: calls before the counted ones, at least 1 for a jitted function.
    repeats: counted calls.

  Returns:
    Median, 10th and 90th percentile in seconds.

  Raises:
    ValueError: if warmup < 0 or repeats < 1.

  Example:
    >>> timing = measure(jax.jit(lambda x: x @ x), np.ones((64, 64), np.float32))
    >>> timing.p10 <= timing.median <= timing.p90
    True
  """
  return Timing.of(call_seconds(fn, *args, warmup=warmup, repeats=repeats))


def measure_kernels(fn: Callable[..., Any], *args: Any, repeats: int = 10) -> Timing:
  """Times the GPU kernels of `fn(*args)` alone: per call the sum of their times, gaps and dispatch left out.

  Args, returns and errors as in `kernel_seconds`.
  """
  return Timing.of(kernel_seconds(fn, *args, repeats=repeats))


def compare(samplers: Mapping[str, Callable[[], Sequence[float]]], rounds: int = 3) -> dict[str, Timing]:
  """Times several things in turns, so that a drift of the machine's clocks meets all of them alike.

  Args:
    samplers: what each is called, and a function that runs it a few times and returns the seconds of each call, such as
      `functools.partial(kernel_seconds, fn, *args)`.
    rounds: turns of each, at least 1.

  Returns:
    The summary of each over all rounds, in the order of `samplers`.

  Raises:
    ValueError: if rounds < 1.

  Example:
    >>> x = np.ones((8, 8), np.float32)
    >>> list(compare({"sum": lambda: call_seconds(np.sum, x), "max": lambda: call_seconds(np.max, x)}))
    ['sum', 'max']
  """
  if rounds < 1:
    raise ValueError(f"compare wants rounds >= 1, got {rounds}")
  seconds: dict[str, list[float]] = {name: [] for name in samplers}
  for _ in range(rounds):
    for name, sample in samplers.items():
      seconds[name] += sample()
  return {name: Timing.of(times) for name, times in seconds.items()}


def call_seconds(fn: Callable[..., Any], *args: Any, warmup: int = 2, repeats: int = 10) -> list[float]:
  """The seconds of each counted call of `measure`, which see."""
  if warmup < 0 or repeats < 1:
    raise ValueError(f"measure wants warmup >= 0 and repeats >= 1, got {warmup=}, {repeats=}")
  for _ in range(warmup):
    jax.block_until_ready(fn(*args))
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    seconds.append(time.perf_counter() - start)
  return seconds


def kernel_seconds(fn: Callable[..., Any], *args: Any, repeats: int = 10) -> list[float]:
  """Seconds that the GPU kernels of each call of `fn(*args)` take together, read through CUPTI.

  The calls follow one another on the same arguments: what fits into the GPU's L2 cache is read from there, so use
  inputs several times its size. Copies and fills that are no kernels are not counted. One profiler at a time can read
  CUPTI in a process.

  Args:
    fn: a jitted or compiled function; another is jitted first.
    *args: passed to each call; not donated.
    repeats: counted calls, at least 1. One more warms up.

  Raises:
    ValueError: if repeats < 1.
    RuntimeError: if JAX's default backend is no GPU, or the function ran no kernel.
  """
  if repeats < 1:
    raise ValueError(f"kernel_seconds wants repeats >= 1, got {repeats}")
  if jax.default_backend() != "gpu":
    raise RuntimeError(f"kernel_seconds wants a GPU, and the default backend is {jax.default_backend()!r}: use measure")
  from jax.experimental.mosaic.gpu import profiler  # imports the whole GPU compiler: only where it is used

  try:
    _, milliseconds = profiler.measure(fn, iterations=repeats)(*args)
  except RuntimeError as error:  # calls whose kernels come in another order each time are told apart one by one
    if "kernel" not in str(error).lower():
      raise
    milliseconds = [profiler.measure(fn)(*args)[1] for _ in range(repeats)]
  seconds = [1e-3 * time for time in (milliseconds if isinstance(milliseconds, list) else [milliseconds]) if time]
  if len(seconds) < repeats:
    raise RuntimeError("kernel_seconds wants a function that runs kernels on the GPU, and this one ran none")
  return seconds
