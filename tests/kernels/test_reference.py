"""The definition against the float64 oracle: values row by row, gradients by differences of the oracle."""

import numpy as np
import pytest

from paged_flash.kernels import reference
from paged_flash.kernels.arguments import flash_problem
from tests.kernels import cases, oracle
from tests.kernels.cases import cotangents
from tests.tolerances import assert_close


@pytest.mark.parametrize("name", cases.FLASH)
def test_forward_is_the_oracle(name):
  call = cases.flash_call(name)
  problem, operands = flash_problem(**call)
  out, lse, _ = cases.run(reference, problem, operands, *cotangents(call))
  want_out, want_lse = oracle.flash(**call)
  assert_close(out, want_out)
  assert_close(lse, want_lse.swapaxes(1, 2))


@pytest.mark.parametrize("name", ["causal_more_queries", "everything"])
def test_backward_is_the_slope_of_the_oracle(name):
  call = cases.flash_call(name)
  rng = np.random.default_rng(2)
  d_out, d_lse = cotangents(call)
  problem, operands = flash_problem(**call)
  _, _, gradients = cases.run(reference, problem, operands, d_out, d_lse)

  def loss(call):
    out, lse = oracle.flash(**call)
    lse = lse.swapaxes(1, 2)
    return (out * d_out).sum() + np.where(lse == -np.inf, 0, lse * d_lse).sum()

  for field, gradient in gradients._asdict().items():
    if gradient is not None:
      direction = rng.standard_normal(gradient.shape)
      ahead, behind = (loss({**call, field: call[field] + step * direction}) for step in (1e-5, -1e-5))
      assert_close(np.float32((gradient * direction).sum()), (ahead - behind) / 2e-5, factor=10)


def test_rows_without_keys_have_no_gradient():
  call = cases.flash_call("lengths_causal_window")
  problem, operands = flash_problem(**call)
  alive = np.arange(problem.query_len) < call["query_seq_lengths"][:, None]
  d_out, d_lse = (np.ones_like(x) for x in cotangents(call))
  d_out[~alive] = d_lse.swapaxes(1, 2)[~alive] = np.nan  # of padding: anything
  out, lse, gradients = cases.run(reference, problem, operands, d_out, d_lse)
  assert all(np.isfinite(x).all() for x in gradients[:3])
  empty = np.isinf(lse).swapaxes(1, 2)
  assert empty.any() and not empty.all()
  assert (np.asarray(gradients.query)[empty] == 0).all() and (np.asarray(out)[empty] == 0).all()
