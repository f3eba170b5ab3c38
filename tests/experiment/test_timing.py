"""Timing counts the calls it says, without the warm-up."""

import time

import jax.numpy as jnp
import pytest

from paged_flash.experiment import measure


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
