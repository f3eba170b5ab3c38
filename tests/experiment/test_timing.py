"""Timing counts the calls it says, without the warm-up."""

import time

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import profiler

from paged_flash.experiment import call_seconds, compare, kernel_seconds, measure, measure_kernels


def test_median_and_spread_leave_out_the_warm_up():
  pauses = iter([0.2, 0.2, 0.001, 0.03, 0.03, 0.03, 0.1])

  def fn(x):
    time.sleep(next(pauses))
    return x

  timing = measure(fn, jnp.ones(()), warmup=2, repeats=5)
  assert timing.repeats == 5 and next(pauses, None) is None
  assert timing.p10 < 0.03 <= timing.median < timing.p90 < 0.15
  assert str(timing).endswith("n=5)")


@pytest.mark.parametrize("wrong", [dict(repeats=0), dict(warmup=-1)])
def test_impossible_counts_are_refused(wrong):
  with pytest.raises(ValueError, match="measure wants"):
    measure(lambda: None, **wrong)


def test_things_are_compared_in_turns():
  order = []

  def sampler(name, seconds):
    return lambda: order.append(name) or seconds

  timings = compare({"a": sampler("a", [1.0, 2.0]), "b": sampler("b", [5.0])}, rounds=3)
  assert order == ["a", "b"] * 3
  assert timings["a"].median == 1.5 and timings["a"].repeats == 6 and timings["b"].repeats == 3
  with pytest.raises(ValueError, match="rounds >= 1"):
    compare({}, rounds=0)


def test_call_seconds_gives_every_counted_call():
  assert len(call_seconds(jnp.ones, 3, warmup=0, repeats=4)) == 4


def test_kernel_times_need_a_gpu_and_a_count(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  with pytest.raises(RuntimeError, match="wants a GPU, and the default backend is 'cpu': use measure"):
    kernel_seconds(jnp.ones, 3)
  with pytest.raises(ValueError, match="repeats >= 1"):
    kernel_seconds(jnp.ones, 3, repeats=0)


class FakeProfiler:
  """Stands in for `profiler.measure`; the answers are milliseconds."""

  def __init__(self, *answers):
    self.answers = iter(answers)
    self.iterations = []

  def __call__(self, fn, *, iterations=1):
    def run(*args):
      self.iterations.append(iterations)
      answer = next(self.answers)
      if isinstance(answer, Exception):
        raise answer
      return fn(*args), answer

    return run


@pytest.mark.parametrize(
  ("answers", "iterations", "median"),
  [
    (([4.0, 1.0, 2.0],), [3], 2e-3),
    ((RuntimeError("Kernel names are not consistent across iterations"), 1.0, 3.0, 5.0), [3, 1, 1, 1], 3e-3),
  ],
)
def test_kernel_times_are_seconds_of_single_calls(monkeypatch, answers, iterations, median):
  fake = FakeProfiler(*answers)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(profiler, "measure", fake)
  timing = measure_kernels(jnp.sin, jnp.ones(()), repeats=3)
  assert timing.repeats == 3 and timing.median == pytest.approx(median) and fake.iterations == iterations


@pytest.mark.parametrize("error", [RuntimeError("RESOURCE_EXHAUSTED"), None])
def test_a_call_that_fails_or_runs_no_kernel_is_an_error(monkeypatch, error):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(profiler, "measure", FakeProfiler(error))
  with pytest.raises(RuntimeError, match="EXHAUSTED" if error else "this one ran none"):
    kernel_seconds(jnp.sin, jnp.ones(()), repeats=1)
