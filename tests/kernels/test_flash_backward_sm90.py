"""The Hopper kernel's backward pass in the CPU interpreter, with its race detector."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from paged_flash.kernels import reference
from paged_flash.kernels.arguments import flash_problem
from paged_flash.kernels.flash_backward_sm90 import ITEM_COST, _schedule, backward
from paged_flash.kernels.problem import FlashOperands
from tests.kernels import cases, mosaic_help
from tests.kernels.mosaic_help import CASES, SCHEDULES
from tests.tolerances import assert_close


@pytest.fixture(autouse=True)
def interpreter():
  with mosaic_help.interpreter():
    yield


@pytest.mark.parametrize("name", CASES)
def test_backward_is_the_definition(name):
  call, _ = mosaic_help.drawn(name)
  is_wide = call["query"].shape[-1] > 64 or name == "window_pair"
  tiles = dict(block_q=64 if is_wide else 128, stages=2, num_blocks=2)
  problem, operands = flash_problem(**call)
  d_out, d_lse = cases.cotangents(call)
  wide = mosaic_help.as_float32(operands)
  out, lse, wanted = cases.run(reference, problem, wide, d_out.astype(np.float32), d_lse)
  dirty_call, (d_out, d_lse) = mosaic_help.dirty(call, d_out, d_lse.swapaxes(1, 2))
  residuals = out.astype(operands.query.dtype), lse, d_out, d_lse.swapaxes(1, 2)

  def run(operands, residuals, interpret):
    return backward(problem, operands, *residuals, **tiles, interpret=interpret)

  gradients = mosaic_help.interpreted(run, flash_problem(**dirty_call)[1], residuals)
  for field, got, want in zip(gradients._fields, gradients, wanted, strict=True):
    assert (got is None) == (want is None), field
    if got is not None:
      assert_close(got, want, dtype=problem.dtype, factor=2)
  dead = np.asarray(lse == -np.inf).swapaxes(1, 2)
  assert not gradients.query[dead].any()


@pytest.mark.parametrize("directions", ["alternate", "up"])
@pytest.mark.parametrize("tokens, arguments", SCHEDULES)
def test_the_schedule_does_everything_once_and_in_balance(tokens, arguments, directions):
  block_q, block_kv, width = 64, 128, 2
  x = jnp.zeros((1, 1, 1, 64), jnp.bfloat16)
  sizes = dict(query_len=tokens[0], kv_len=tokens[1], num_heads=8, num_kv_heads=4)
  one = dataclasses.replace(flash_problem(x, x, x, **arguments)[0], **sizes)
  kv_tiles, heads = -(-tokens[1] // block_kv), 4 * 3
  table = _schedule(dataclasses.replace(one, batch=3), block_q, block_kv, width, min(13, kv_tiles * heads), directions)
  rows = [row[1 : 1 + row[0]] for row in table]
  assert sorted(np.concatenate(rows).tolist()) == list(range(kv_tiles * heads))
  assert all((np.diff(row) > 0).all() for row in rows)  # what a block waits for comes earlier in the order
  visible = np.asarray(reference.visible(one, FlashOperands(x, x, x)))[0, 0]
  cost = []
  for start in range(0, tokens[1], block_kv):
    seen = np.flatnonzero(visible[:, start : start + block_kv].any(1)) // block_q
    cost.append(ITEM_COST + 2 * (1 if seen.size == 0 else seen.max() - seen.min() + 1))

  def load(row):
    section, tile = row // (width * kv_tiles), row % (width * kv_tiles) // width
    is_up = (directions == "up") | (section % 2 == 0)
    return sum(cost[i] for i in np.where(is_up, kv_tiles - 1 - tile, tile))

  loads = [load(row) for row in rows]
  assert max(loads) - min(loads) <= max(cost)
