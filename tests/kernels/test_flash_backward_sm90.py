"""The Hopper kernel's backward pass in the CPU interpreter, with its race detector."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from paged_flash.kernels import flash_backward_sm90, reference
from paged_flash.kernels.arguments import flash_problem
from paged_flash.kernels.flash_backward_sm90 import ITEM_COST, _plan, _schedule, _visits, backward
from paged_flash.kernels.problem import FlashOperands
from tests.kernels import cases, mosaic_help
from tests.kernels.mosaic_help import CASES, SCHEDULES
from tests.tolerances import assert_close


@pytest.fixture(autouse=True)
def interpreter():
  with mosaic_help.interpreter():
    yield


HALVES = (
  *("full_f16", "full", "causal_gqa3", "causal_more_keys", "causal_more_queries", "window_pair", "causal_window"),
  "long_gqa_sinks",
)


@pytest.mark.parametrize("name, block_q", [(name, 64) for name in CASES] + [(name, 128) for name in HALVES])
def test_backward_is_the_definition(name, block_q):
  call, _ = mosaic_help.drawn(name)
  tiles = dict(stages=2, block_q=block_q, num_blocks=2)
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


@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("tokens, arguments", SCHEDULES)
def test_the_schedule_does_everything_once_and_in_balance(tokens, arguments, block_q):
  block_kv, width = 128, 2
  x = jnp.zeros((1, 1, 1, 64), jnp.bfloat16)
  sizes = dict(query_len=tokens[0], kv_len=tokens[1], num_heads=8, num_kv_heads=4)
  one = dataclasses.replace(flash_problem(x, x, x, **arguments)[0], **sizes)
  kv_tiles, heads = -(-tokens[1] // block_kv), 4 * 3
  table = _schedule(dataclasses.replace(one, batch=3), block_q, block_kv, width, min(13, kv_tiles * heads))
  rows = [row[1 : 1 + row[0]] for row in table]
  assert sorted(np.concatenate(rows).tolist()) == list(range(kv_tiles * heads))
  assert all((np.diff(row) > 0).all() for row in rows)  # what a block waits for comes earlier in the order
  visible = np.asarray(reference.visible(one, FlashOperands(x, x, x)))[0, 0]
  cost = []
  for start in range(0, tokens[1], block_kv):
    seen = np.flatnonzero(visible[:, start : start + block_kv].any(1)) // block_q
    cost.append(ITEM_COST * 64 / block_q + 2 * (1 if seen.size == 0 else seen.max() - seen.min() + 1))

  def load(row):
    section, tile = row // (width * kv_tiles), row % (width * kv_tiles) // width
    is_up = section % 2 == 0
    return sum(cost[i] for i in np.where(is_up, kv_tiles - 1 - tile, tile))

  loads = [load(row) for row in rows]
  assert max(loads) - min(loads) <= max(cost)


# name -> (B, T, S, H, K, block_kv, arguments)
WALKS: dict[str, tuple[Any, ...]] = {
  "causal": (2, 1000, 1000, 4, 4, 128, dict(is_causal=True)),
  "causal_wide": (1, 700, 900, 4, 2, 64, dict(is_causal=True)),
  "window": (2, 900, 700, 3, 3, 64, dict(local_window_size=(100, 30))),
  "spread": (2, 640, 768, 6, 3, 128, {}),
  "spread_wide": (1, 320, 320, 7, 7, 64, {}),
  "ragged": (1, 500, 450, 2, 2, 128, {}),
  "lengths": (4, 500, 400, 2, 1, 64, dict(query_seq_lengths="query_lens", key_value_seq_lengths="kv_lens")),
  "segments": (2, 700, 700, 2, 1, 64, dict(is_causal=True, segment_ids="segments")),
}


@pytest.mark.parametrize("num_blocks", [3, 13, 132])
@pytest.mark.parametrize(
  "name, block_q", [(name, 64) for name in WALKS] + [(name, 128) for name in ("causal", "spread", "ragged")]
)
def test_blocks_that_run_together_never_wait_for_each_other_in_a_circle(name, block_q, num_blocks):
  """At most `num_blocks` run, the first step of each that may go is taken at a time; every tile of dQ is added up."""
  B, T, S, H, K, block_kv, arguments = WALKS[name]
  call = cases.flash_call("walk", {"walk": (B, T, S, H, K, 8, arguments)})
  problem, operands = flash_problem(**call)
  walk, schedule = _plan(problem, block_q, block_kv, num_blocks)
  assert walk.spread == name.startswith("spread") or num_blocks < 132
  visits, visited = _visits(problem, operands, block_q, block_kv)
  items = walk.heads * walk.kv_tiles
  if schedule is None:
    lists = [[item] for item in range(items)]  # the hardware starts blocks in their order
  else:
    assert len(schedule) <= num_blocks
    lists = [row[1 : 1 + row[0]].tolist() for row in schedule]

  def step(index, n):
    work = walk.item(index, visits)
    head, tile = walk.head_and_tile(work, n)
    return work.batch, head, tile, *walk.turn(work, tile), work.steps

  most = walk.group * walk.query_tiles
  table = jax.vmap(jax.vmap(step, (None, 0)), (0, None))(jnp.arange(items), jnp.arange(most))
  batch, head, tile, rank, follows, leads, steps = (np.asarray(x) for x in jax.jit(lambda x: x)(table))
  todo = [[(item, n) for item in row for n in range(steps[item, 0])] for row in lists]
  todo = [block for block in todo if block]  # keys past the end of their sequence meet no queries
  counter = np.zeros((B, H, walk.query_tiles), np.int32)
  running, waiting = todo[:num_blocks], todo[num_blocks:]
  while running:
    is_stuck = True
    for block in running:
      at = block[0]
      place = batch[at], head[at], tile[at]
      assert follows[at] != leads[at] and counter[place] <= rank[at]
      if leads[at] or counter[place] == rank[at]:
        assert not leads[at] or counter[place] == 0
        counter[place] = rank[at] + 1
        block.pop(0)
        is_stuck = False
    assert not is_stuck
    running = [block for block in running if block]
    while waiting and len(running) < num_blocks:
      running.append(waiting.pop(0))
  assert ((counter > 0) == np.asarray(visited)[:, None]).all()


def test_steps_of_128_queries_are_refused_or_not_taken_where_they_do_not_fit(monkeypatch):
  sizes, make = [], plgpu.kernel
  monkeypatch.setattr(
    plgpu,
    "kernel",
    lambda *args, out_type, **kwargs: sizes.append(out_type[0].shape) or make(*args, out_type=out_type, **kwargs),
  )

  def run(dims, **arguments):
    x, rows = jnp.zeros((2, 130, 4, dims), jnp.bfloat16), jnp.zeros((2, 4, 130))
    problem, operands = flash_problem(x, x, x, **arguments)
    jax.eval_shape(functools.partial(backward, problem, stages=2, block_q=128), operands, x, rows, x, rows)

  run(64)
  monkeypatch.setattr(flash_backward_sm90, "MOST_ITEMS", 15)
  run(64)  # of 16 items, to be claimed
  assert [shape[2] for shape in sizes] == [256, 192]
  lens = jnp.array([130, 7])
  for dims, arguments in ((128, {}), (64, dict(key_value_seq_lengths=lens)), (64, dict(logits_soft_cap=2.0))):
    with pytest.raises(ValueError, match=r"block_q must be in \(64,\) for this problem, got 128"):
      run(dims, **arguments)


@pytest.mark.parametrize("num_cores, asked", [(132, None), (114, None), (78, 132), (7, None)])
@pytest.mark.parametrize("dims", [64, 256])
def test_no_more_blocks_than_multiprocessors(monkeypatch, num_cores, asked, dims):
  x, rows = jnp.zeros((2, 4096, 4, dims), jnp.bfloat16), jnp.zeros((2, 4, 4096))
  device = AbstractDevice(device_kind="NVIDIA H20-3e", num_cores=num_cores, platform="gpu")
  grids, make = [], plgpu.kernel
  monkeypatch.setattr(
    plgpu, "kernel", lambda *args, grid, **kwargs: grids.append(grid) or make(*args, grid=grid, **kwargs)
  )
  for is_causal in (False, True):
    problem, operands = flash_problem(x, x, x, is_causal=is_causal)
    run = functools.partial(backward, problem, stages=2, num_blocks=asked)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
      jax.eval_shape(run, operands, x, rows, x, rows)
  assert len(grids) == 2 and all(num_cores / 2 < blocks <= num_cores for (blocks,) in grids)
