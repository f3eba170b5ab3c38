"""One way to time a function: warm up, repeat, report the median and the spread."""

import dataclasses
import time
from collections.abc import Callable
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

  def __str__(self) -> str:
    return f"{1e3 * self.median:.3g} ms (p10 {1e3 * self.p10:.3g}, p90 {1e3 * self.p90:.3g}, n={self.repeats})"


def measure(fn: Callable[..., Any], *args: Any, warmup: int = 2, repeats: int = 10) -> Timing:
  """Times `fn(*args)` until everything it returns is computed on the device (`jax.block_until_ready`).

  Each call is timed alone, dispatch included: on a GPU a call much shorter than about 0.1 ms reads as its dispatch. The
  first calls compile and are not counted. A function that consumes (donates) its arguments cannot be called twice with
  them: wrap it in one that keeps what it returned.

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
  if warmup < 0 or repeats < 1:
    raise ValueError(f"measure wants warmup >= 0 and repeats >= 1, got {warmup=}, {repeats=}")
  for _ in range(warmup):
    jax.block_until_ready(fn(*args))
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    seconds.append(time.perf_counter() - start)
  p10, median, p90 = np.percentile(seconds, [10, 50, 90]).tolist()
  return Timing(median=median, p10=p10, p90=p90, repeats=repeats)
