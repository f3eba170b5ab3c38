"""The Hopper kernel's forward pass in the CPU interpreter, with its race detector, and its schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_flash.kernels import mosaic, reference
from paged_flash.kernels.arguments import flash_problem
from paged_flash.kernels.flash_forward_sm90 import ITEM_COST, Order, forward, make_schedule
from paged_flash.kernels.problem import FlashOperands
from tests.kernels import mosaic_help, oracle
from tests.kernels.mosaic_help import CASES, SCHEDULES
from tests.tolerances import assert_close


@pytest.fixture(autouse=True)
def interpreter():
  with mosaic_help.interpreter():
    yield


@pytest.mark.parametrize("name", CASES)
def test_forward_is_the_oracle(name):
  call, tiles = mosaic_help.drawn(name)
  problem, operands = flash_problem(**mosaic_help.dirty(call)[0])

  def run(operands, interpret):
    return forward(problem, operands, interpret=interpret, **tiles)

  out, lse = mosaic_help.interpreted(run, operands)
  want_out, want_lse = oracle.flash(**call)
  assert_close(out, want_out)
  assert_close(lse.swapaxes(1, 2), want_lse)
  dead = want_lse == -np.inf
  assert dead.any() == (name == "causal_more_queries" or problem.has_query_lens)
  assert not out[dead].any()


@pytest.mark.parametrize("tokens, arguments", SCHEDULES)
def test_the_schedule_does_everything_once_and_in_balance(tokens, arguments):
  block_q, block_kv, heads, batch = 128, 64, 4, 3
  x = jnp.zeros((1, 1, 1, 64), jnp.bfloat16)
  sizes = dict(query_len=tokens[0], kv_len=tokens[1], num_heads=heads, num_kv_heads=2)
  one = dataclasses.replace(flash_problem(x, x, x, **arguments)[0], **sizes)
  query_tiles = -(-tokens[0] // block_q)
  items = query_tiles * heads * batch
  order = Order(query_tiles=query_tiles, group_heads=4, is_heavy_first=one.is_causal)
  places = np.stack(order.place(np.arange(items)), 1)
  everything = [[head, tile] for head in range(heads * batch) for tile in range(query_tiles)]
  assert sorted(places.tolist()) == everything
  table = make_schedule(dataclasses.replace(one, batch=batch), order, block_q, block_kv, min(13, items))
  rows = [row[1 : 1 + row[0]] for row in table]
  assert sorted(np.concatenate(rows).tolist()) == list(range(items))
  # What a tile of queries costs, counted from the mask itself.
  visible = np.asarray(reference.visible(one, FlashOperands(x, x, x)))[0, 0]
  cost = []
  for start in range(0, tokens[0], block_q):
    seen = np.flatnonzero(visible[start : start + block_q].any(0)) // block_kv
    cost.append(ITEM_COST + (1 if seen.size == 0 else seen.max() - seen.min() + 1))
  loads = [sum(cost[places[index, 1]] for index in row) for row in rows]
  assert max(loads) - min(loads) <= max(cost)


def test_items_are_dealt_once_each_in_order_and_in_balance():
  """Costs that fall, again and again: no block gets more than a few of the dearest above the mean."""
  dealt = jax.jit(lambda count, block, num_blocks: mosaic.dealt(count, block, num_blocks)[0], static_argnums=2)
  for count, num_blocks, period in [(1, 1, 1), (7, 3, 2), (500, 132, 128), (4096, 66, 16), (2000, 132, 2000)]:
    cost = 1.0 + (period - 1 - np.arange(count) % period)
    everything, loads = [], []
    for block in range(num_blocks):
      steps = int(dealt(jnp.int32(count), block, num_blocks))
      _, at = mosaic.dealt(jnp.int32(count), block, num_blocks)
      mine = np.asarray(at(jnp.arange(steps))).tolist()
      assert mine == sorted(mine)  # whoever waits for earlier items can never wait for himself
      everything += mine
      loads.append(cost[mine].sum())
    assert sorted(everything) == list(range(count))
    assert max(loads) <= np.mean(loads) + 2 * cost.max()
