"""Runs each program of a list exactly once in the range that a profiler reads, after a warm-up outside of it.

Started by experiments.attention_traffic, under ncu, with one JSON argument: "cases" (fields of a Case), "peers",
"dtype", "implementation", "threads", and "answer", the file that gets a list of {"case", "peer", "error"}, in the order
of the calls. Each call that has no error comes after one of `marker`, which is how its kernels are told apart.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.attention import Config, ours
from experiments.attention_cases import Case, make_inputs
from experiments.comparison import one_line
from experiments.peers.jax_attention import PEERS


def runtime_libraries() -> Iterator[str]:
  """Where CUDA's runtime library may be: NVIDIA's wheels, a CUDA directory, the loader's path."""
  roots = [pathlib.Path(path, "nvidia") for path in sys.path]
  roots += [pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
  yield from itertools.chain.from_iterable(map(str, sorted(root.glob("**/libcudart.so*"))) for root in roots)
  yield from ("libcudart.so.13", "libcudart.so.12", "libcudart.so")


@functools.cache
def runtime() -> ctypes.CDLL:
  """CUDA's runtime library.

  Raises:
    RuntimeError: if it is nowhere.
  """
  for path in runtime_libraries():
    with contextlib.suppress(OSError):
      return ctypes.CDLL(path)
  raise RuntimeError("libcudart.so is neither in NVIDIA's wheels nor below CUDA_HOME nor where the loader looks")


@contextlib.contextmanager
def profiled():
  """The range that ncu reads when told `--profile-from-start off`."""
  if code := runtime().cudaProfilerStart():
    raise RuntimeError(f"cudaProfilerStart failed with code {code}")
  try:
    yield
  finally:
    runtime().cudaProfilerStop()


def run(job: dict[str, Any], profiled: Callable[[], Any] = profiled) -> list[dict[str, str]]:
  """Compiles all programs side by side, then calls one after the other."""
  cases = [Case(**fields) for fields in job["cases"]]
  peers = {"ours": ours(Config(implementation=job["implementation"])), **PEERS}
  marker, x = jax.jit(jnp.negative), jnp.zeros(977)
  jax.block_until_ready(marker(x))

  def compiled(case: Case, name: str):
    try:
      shapes = jax.eval_shape(lambda: make_inputs(case, job["dtype"]))
      return jax.jit(peers[name].program(case, "forward")).lower(*shapes).compile(), ""
    except Exception as error:  # a peer may fail in any way: its row says how
      return None, one_line(error)

  calls = list(itertools.product(cases, job["peers"]))
  with concurrent.futures.ThreadPoolExecutor(job["threads"]) as pool:
    programs = list(pool.map(lambda call: compiled(*call), calls))
  answers = []
  for (case, name), (program, error) in zip(calls, programs, strict=True):
    if program is not None:
      try:
        inputs = jax.block_until_ready(make_inputs(case, job["dtype"]))
        jax.block_until_ready(program(*inputs))
        with profiled():
          jax.block_until_ready(marker(x))
          jax.block_until_ready(program(*inputs))
      except jax.errors.JaxRuntimeError as failure:  # out of memory, in the warm-up
        error = one_line(failure)
    answers.append({"case": case.name, "peer": name, "error": error})
  return answers


if __name__ == "__main__":
  job = json.loads(sys.argv[1])
  pathlib.Path(job["answer"]).write_text(json.dumps(run(job)))
