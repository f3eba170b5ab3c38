"""What the forward kernel moves: against a count tile by tile from the mask, and against what an H200 showed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_flash import tuning
from paged_flash.analysis import traffic
from paged_flash.analysis.traffic import Moved, flash_traffic, naive_traffic
from paged_flash.kernels import flash_forward_sm90
from paged_flash.kernels.problem import FlashOperands, FlashProblem

SMALL = FlashProblem(
  device="nvidia_h200",
  batch=2,
  query_len=520,
  kv_len=520,
  num_heads=4,
  num_kv_heads=2,
  head_dim=64,
  value_dim=32,
  dtype="bfloat16",
  scale=1.0,
  is_causal=True,
  window=None,
  soft_cap=None,
  has_query_lens=False,
  has_kv_lens=False,
  has_segments=False,
  has_mask=False,
  has_bias=False,
  has_sinks=False,
)
TILES = dict(num_wgs=2, block_kv=64, stages=2, num_blocks=6)
VARIANTS: tuple[tuple[dict[str, Any], dict[str, int]], ...] = (
  ({}, {}),
  (dict(is_causal=False), dict(num_wgs=3)),
  (dict(), dict(cluster=2)),
  (dict(query_len=200), {}),
  (dict(kv_len=200), dict(cluster=2)),
  (dict(window=(100, 0)), {}),
  (dict(window=(70, 30), is_causal=False), dict(block_kv=128)),
  (dict(query_len=333, kv_len=525, is_causal=False), dict(num_wgs=1)),
)
# The shape whose first order of items, all 128 heads in one group, was bound by memory on an H200: 1.1 GB.
GROUPED = dataclasses.replace(
  SMALL, batch=8, query_len=2048, kv_len=2048, num_heads=16, num_kv_heads=16, head_dim=128, value_dim=128
)
LONG = dataclasses.replace(GROUPED, batch=1, query_len=16384, kv_len=16384, is_causal=False)


def visible(p: FlashProblem) -> np.ndarray:
  """bool[T, S], pair by pair."""
  position, key = np.arange(p.query_len)[:, None] + p.kv_len - p.query_len, np.arange(p.kv_len)
  seen = np.ones((p.query_len, p.kv_len), bool)
  if p.is_causal:
    seen &= key <= position
  if p.window is not None:
    seen &= (key >= position - p.window[0]) & (key <= position + p.window[1])
  return seen


@pytest.mark.parametrize("fields, more", VARIANTS, ids=str)
def test_the_multiprocessors_fetch_the_tiles_that_they_see(fields, more):
  p, tiles = dataclasses.replace(SMALL, **fields), TILES | more
  rows, block_kv = 64 * tiles["num_wgs"], tiles["block_kv"]
  cluster = tiles.get("cluster", 1)
  seen, heads = visible(p), p.batch * p.num_heads
  padded_queries, padded_keys = (-(-n // 8) * 8 for n in (p.query_len, p.kv_len))
  smem = l2_read = 0
  for first in range(0, p.query_len, rows * cluster):
    here = seen[first : first + rows * cluster]
    # a tile of queries that sees nothing still visits one KV tile, the first
    visited = [here[:, j : j + block_kv].any() for j in range(0, p.kv_len, block_kv)]
    visited[0] |= not any(visited)
    smem += heads * rows * cluster * p.head_dim * 2
    l2_read += heads * min(rows * cluster, padded_queries - first) * p.head_dim * 2
    for j in np.flatnonzero(visited) * block_kv:
      smem += heads * cluster * block_kv * (p.head_dim + p.value_dim) * 2  # lands in each block of the cluster
      l2_read += heads * min(block_kv, padded_keys - int(j)) * (p.head_dim + p.value_dim) * 2
  found = flash_traffic(p, tiles)
  assert found.smem == smem
  assert found.l2 == Moved(l2_read, heads * padded_queries * (p.value_dim * 2 + 4))


def test_the_order_is_the_kernels_own(monkeypatch):
  asked = []
  made = flash_forward_sm90.make_schedule
  monkeypatch.setattr(flash_forward_sm90, "make_schedule", lambda *args: asked.append(args) or made(*args))
  tall = dataclasses.replace(SMALL, num_heads=64, num_kv_heads=32, kv_len=40_000)  # heads in groups of fewer than all
  for p in (SMALL, dataclasses.replace(SMALL, is_causal=False), tall):
    q, k, v = (
      jax.ShapeDtypeStruct(shape, jnp.bfloat16)
      for shape in (
        (p.batch, p.query_len, p.num_heads, p.head_dim),
        (p.batch, p.kv_len, p.num_kv_heads, p.head_dim),
        (p.batch, p.kv_len, p.num_kv_heads, p.value_dim),
      )
    )
    tiles = TILES | dict(cluster=2)
    jax.eval_shape(lambda *x, p=p, t=tiles: flash_forward_sm90.forward(p, FlashOperands(*x), **t), q, k, v)
    flash_traffic(p, tiles)
    kernels, counted = asked[-2:]
    assert counted == kernels
  assert asked[-1][1].group_heads < tall.batch * tall.num_heads


def test_without_a_cache_memory_gives_what_is_asked_and_with_a_large_one_each_operand_once():
  for p, tiles in ((SMALL, TILES), (GROUPED, tuning.tiles(GROUPED, "sm90"))):
    none, small, large = (flash_traffic(p, tiles, l2_bytes=size) for size in (0, 2**18, 2**40))
    assert none.hbm == none.l2 and none.still_in_l2 == 0
    assert large.hbm == large.compulsory and large.still_in_l2 == large.hbm.written
    assert large.hbm.total < small.hbm.total <= none.hbm.total
    assert small.hbm.written == large.hbm.written and 0 < small.still_in_l2 <= 2**18


def test_the_cache_keeps_what_was_used_last():
  kb = [(name, 1) for name in (0, 1, 2, 0, 3, 1)]  # with room for three, 1 is gone when 3 comes, 0 is not
  assert traffic._through_cache(kb + [(0, 1)], 9, 3) == (Moved(5, 0), 0)
  assert traffic._through_cache([*kb, (9, 2)], 9, 3) == (Moved(5, 2), 2)  # written: takes room, and is still there
  assert traffic._through_cache([(9, 2), *kb], 9, 3) == (Moved(5, 2), 0)


def test_blocks_that_run_together_share_their_keys():
  # One head, full: 8 blocks want each KV tile at the same time, one block wants all of them again for each item.
  p = dataclasses.replace(
    SMALL, batch=1, num_heads=1, num_kv_heads=1, query_len=1024, kv_len=4096, value_dim=64, is_causal=False
  )
  queries, keys = 1024 * 64 * 2, 4096 * 128 * 2
  little = 2**16  # 4 KV tiles of 64, of which there are 64
  together, alone = (flash_traffic(p, TILES | dict(num_blocks=n), l2_bytes=4 * little) for n in (8, 1))
  assert together.hbm.read == queries + keys
  assert alone.hbm.read == queries + 8 * keys


def test_one_group_of_all_heads_reads_keys_again_and_again():
  tiles = tuning.tiles(GROUPED, "sm90")
  order = flash_forward_sm90.kernel_order(GROUPED, 64 * tiles["num_wgs"])
  assert order.group_heads < 128
  grouped = flash_traffic(GROUPED, tiles)
  ungrouped = flash_traffic(GROUPED, tiles, order=dataclasses.replace(order, group_heads=128))
  assert grouped.l2 == ungrouped.l2
  assert 2 * grouped.hbm.total < ungrouped.hbm.total
  assert grouped.hbm.total < 1.15 * grouped.compulsory.total
  assert ungrouped.hbm.total == pytest.approx(1.1e9, rel=0.1)


def test_long_full_attention_reads_every_operand_about_once():
  found = flash_traffic(LONG, tuning.tiles(LONG, "sm90"))
  assert found.hbm.total == pytest.approx(272e6, rel=0.1)  # read from the counters of an H200
  assert naive_traffic(LONG).total > 100 * found.hbm.total
  assert str(found).startswith("HBM 257 MiB, 1.00 x every operand once; L2 8.1")


def test_larger_tiles_and_clusters_ask_less_of_the_l2_cache():
  reads = [flash_traffic(LONG, TILES | dict(num_wgs=n, num_blocks=132)).l2.read for n in (1, 2)]
  pair = flash_traffic(LONG, TILES | dict(num_wgs=1, cluster=2, num_blocks=132))
  queries = 16384 * 16 * 128 * 2
  assert reads[0] - queries == 2 * (reads[1] - queries) and pair.l2.read == reads[1]
  assert pair.smem == flash_traffic(LONG, TILES | dict(num_wgs=1, num_blocks=132)).smem


def test_naive_moves_scores_four_times():
  p = dataclasses.replace(SMALL, query_len=300, kv_len=500)
  queries, keys, scores = 2 * 300 * 4, 2 * 500 * 2, 2 * 4 * 300 * 500
  read, written = queries * 64 * 2 + keys * (64 + 32) * 2, queries * 32 * 2
  assert naive_traffic(p) == Moved(read + 6 * scores, written + 6 * scores)
  assert naive_traffic(p, score_bytes=2).total == read + written + 8 * scores


@pytest.mark.parametrize("name", ["query_lens", "kv_lens", "segments"])
def test_what_is_known_only_when_running_is_refused(name):
  problem = dataclasses.replace(SMALL, **{f"has_{name}": True})
  with pytest.raises(ValueError, match=name):
    flash_traffic(problem, TILES)
