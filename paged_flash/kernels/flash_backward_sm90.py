"""The backward pass of flash attention for Hopper GPUs, one deterministic Pallas Mosaic GPU kernel.

A block owns one tile of keys of one kv head, 64 of them for each of its two compute warpgroups. It walks through the
query tiles that see these keys, for every query head of the group, and recomputes the scores:

  S^T = K Q^T       P^T = exp(S^T - LSE)      dP^T = V dO^T      dS^T = P^T (dP^T - delta)
  dV += P^T dO      dK += dS^T Q              dQ = dS K

(Dao et al. 2022, Algorithm 4, transposed as in FlashAttention-3, so that P^T and dS^T can stay in registers as left
operands; delta = rowsum(dO O) minus the cotangent of the LSE.) dK and dV stay in registers. dS^T goes through shared
memory because both warpgroups need all of it for dQ, of which each computes one half. dK of a step is still on the
tensor cores when the next step begins, and for head_dim 64 S^T of the next step is issued behind dQ. dQ of a step
leaves when the warpgroups meet in the next one: two warps add its tiles in turn to an f32 array in global memory.

What a step costs whatever its size weighs most for head_dim 64. There a step may take 128 queries (`block_q`), which
come, are waited for, and leave together; all but dQ is computed for one half of them after the other, since registers
do not hold the scores of both. Each warpgroup computes dQ of one half, in the step after: by then the other's dS^T is
there, and neither waits for it.

Above head_dim 128 the registers hold dK and dV of 64 keys only, and the two warpgroups differ (`compute_role`): one
computes S^T, P^T and dV, the other dP^T, dS^T and dK, and each one part of dQ's columns, which are added apart, with a
counter of their own. The first runs ahead: its dQ leaves and its next P^T is computed while the other multiplies.

The order of these additions is fixed, so two runs give the same bits. A counter for each (sequence, head, query tile)
holds the rank of the KV tile that may add next; it adds, waits for the addition to be complete, and raises the counter.
The query tiles that see a KV tile are made an interval whose ends never fall as KV tiles ascend (`_visits`), so the
ranks of those that meet a query tile follow one another, and the neighbor's interval tells who is first.

Heads are worked on in sections, which differ in direction. In the first, third, ... KV tiles start from the last, and
walk up through the queries; in the others they start from the first and walk down. With a causal mask, KV tiles that
start together then reach a query tile a step or two after one another, and end the later the more queries see them; the
next section's tiles start in the order in which these end, the heaviest first, follow each other as well, and all end
together. With segments, where a tile of keys meets few queries, all walk up, each a step or two behind the one before.
Without a mask, tiles of a head that run together start at evenly spread queries and walk around (`spread`).

No deadlock: an item (one KV tile of one kv head) waits only for earlier ones or, where spread, for those of its
section, which all run at the same time; blocks compute their items in order, and start in the order of their first
ones. There are never more blocks than multiprocessors: they stay on theirs, and the next keys are on their way while dK
and dV leave. With static lengths they work on a list of items (`_schedule`), otherwise they claim them (`items_sm90`).

What is done once for each row, delta before and the conversion of dQ after, is left to XLA unless queries have lengths:
then `live_rows_sm90` passes over those that are there.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_flash.kernels import items_sm90, live_rows_sm90, mosaic
from paged_flash.kernels.flash_forward_sm90 import Positions
from paged_flash.kernels.items_sm90 import Claims, Listed
from paged_flash.kernels.mosaic import COLUMN, LOG2_E, ROW, across, cdiv, divide, down
from paged_flash.kernels.problem import FlashGradients, FlashOperands, FlashProblem, spans

ROWS = 64  # of a wgmma tile: queries; keys of one warpgroup, or of both where head_dim is above 128
NUM_WGS = 2
WIDE = 128  # columns of dQ that leave at once where head_dim is above 128
MOST_ITEMS = 2**16  # of a schedule
L2_BYTES = 32 * 2**20  # of 50 on an H100 or H200, for what the items of a section read again and add to
ITEM_COST = 1.5  # of a tile of keys besides its query tiles, in tiles of 64 queries


class _Item(NamedTuple):
  """What a block computes at once: one tile of keys of one kv head, and the query tiles [first, last) that see it."""

  batch: Any
  kv_head: Any
  kv_tile: Any
  first: Any
  last: Any
  whole_first: Any  # tiles [whole_first, whole_last) see all of the keys
  whole_last: Any
  rank: Any  # place of the KV tile in the order of additions
  shared: Any  # (low, high): the query tiles where a neighbor adds before
  up: Any  # the direction
  steps: Any

  def tile(self, n: Any) -> Any:
    """The n-th query tile."""
    return jnp.where(self.up, self.first + n, self.last - 1 - n)


@dataclasses.dataclass(frozen=True)
class _Walk:
  """In which order items are worked on, tiles of queries visited, and dQ tiles added."""

  query_tiles: int
  kv_tiles: int
  heads: int  # KV heads of all sequences
  num_kv_heads: int
  group: int  # query heads of a KV head
  width: int  # heads of a section
  spread: bool  # tiles of keys of a section start at evenly spread queries and walk around
  turns: bool  # sections differ in direction

  @jax.named_scope("item")
  def item(self, index: Any, visits: Any) -> _Item:
    """The item of that index; what `visits` says is that of `_visits`."""
    kv_tiles, K = self.kv_tiles, jnp.int32(self.num_kv_heads)
    section, rest = divide(index, self.width * kv_tiles)
    here = jnp.minimum(self.width, self.heads - section * self.width)
    rank, head = lax.div(rest, here), section * self.width + lax.rem(rest, here)
    up = not self.turns or _is_up(section)
    kv_tile = jnp.where(up, kv_tiles - 1 - rank, rank)
    batch = lax.div(head, K)
    first, last, whole_first, whole_last, before, after = (visits[batch, kv_tile, i] for i in range(6))
    shared = jnp.where(up, after, first), jnp.where(up, last, before)
    steps = self.group * (last - first)
    return _Item(batch, lax.rem(head, K), kv_tile, first, last, whole_first, whole_last, rank, shared, up, steps)

  def head_and_tile(self, work: _Item, n: Any) -> tuple[Any, Any]:
    """Query head and tile of the item's n-th step.

    Items that walk down follow each other from tile to tile, which serves all heads of the group there. The others are
    far apart: head by head, what they read and add to stays in the L2 cache.
    """
    turn, member = divide(n, self.group)
    if self.group > 1:
      tiles = work.last - work.first
      by_head = lax.div(n, tiles)
      turn, member = jnp.where(work.up, n - by_head * tiles, turn), jnp.where(work.up, by_head, member)
    tile = work.tile(turn)
    if self.spread:
      tile = tile + divide(work.kv_tile * self.query_tiles, self.kv_tiles)[0]
      tile = jnp.where(tile < self.query_tiles, tile, tile - self.query_tiles)
    return work.kv_head * self.group + member, tile

  def turn(self, work: _Item, tile: Any) -> tuple[Any, Any, Any]:
    """When the item adds to a tile of dQ: once the counter is `rank`, if it follows others; or it leads and writes.

    Then the counter becomes rank + 1.
    """
    if self.spread:  # from the KV tile that starts here or before, down and around
      rank = divide((tile + 1) * self.kv_tiles - 1, self.query_tiles)[0] - work.kv_tile
      rank = jnp.where(rank < 0, rank + self.kv_tiles, rank)
      return rank, rank > 0, rank == 0
    low, high = work.shared
    return work.rank, (low <= tile) & (tile < high), (tile < low) | (tile >= high)


def _plan(
  problem: FlashProblem,
  block_q: int,
  block_kv: int,
  num_blocks: int,
) -> tuple[_Walk, np.ndarray | None]:
  """The walk, and `_schedule` for at most `num_blocks` blocks; None where items are claimed."""
  p = problem
  query_tiles, kv_tiles, heads = cdiv(p.query_len, block_q), cdiv(p.kv_len, block_kv), p.batch * p.num_kv_heads
  items = heads * kv_tiles
  at_once = min(num_blocks // kv_tiles, heads)
  spread = not _has_masks(p, block_kv) and at_once > 0 and items <= MOST_ITEMS
  spread = spread and cdiv(heads, at_once) == cdiv(items, num_blocks)
  if spread:  # a section's items wait for each other: all run at once
    width, num_blocks = at_once, at_once * kv_tiles
  else:  # as many heads as give each block about two items and fit the L2 cache, and an even number of sections
    bytes_ = p.num_heads // p.num_kv_heads * p.query_len * 4 * (p.head_dim + p.value_dim)  # Q, dO and dQ of a KV head
    most = max(1, min(2 * num_blocks // kv_tiles, L2_BYTES // bytes_))
    width = max(n for n in range(1, most + 1) if n == 1 or heads % (2 * n) == 0)
  schedule = None
  if p.is_static and items <= MOST_ITEMS:
    schedule = _schedule(p, block_q, block_kv, width, min(num_blocks, items))
  group = p.num_heads // p.num_kv_heads
  turns = not (spread or p.has_segments)
  return _Walk(query_tiles, kv_tiles, heads, p.num_kv_heads, group, width, spread, turns), schedule


def blocks_of_queries(problem: FlashProblem) -> tuple[int, ...]:
  """How many queries a step may take: 64, or 128 in two halves where registers and shared memory hold them."""
  fits = max(problem.head_dim, problem.value_dim) <= 64 and problem.is_static and problem.soft_cap is None
  return (ROWS, 2 * ROWS) if fits else (ROWS,)


def backward(
  problem: FlashProblem,
  operands: FlashOperands,
  out: jax.Array,
  lse: jax.Array,
  d_out: jax.Array,
  d_lse: jax.Array,
  *,
  stages: int,
  block_q: int = ROWS,
  num_blocks: int | None = None,
  interpret: Any = None,
) -> FlashGradients:
  """Cotangents of query, key, value and sinks.

  Args:
    problem: What was computed; `flash_sm90.supports` must be "".
    operands: Its arrays.
    out: [B, T, H, Dv], what forward returned.
    lse: f32[B, H, T], what forward returned, natural log.
    d_out: [B, T, H, Dv], the cotangent of `out`.
    d_lse: f32[B, H, T], the cotangent of `lse`.
    stages: Tiles of Q and dO in flight; of dO one less for a value_dim above 192.
    block_q: Queries of a step, one of `blocks_of_queries`; 64 where items must be claimed.
    num_blocks: Blocks that run at once. They wait for each other: the number of multiprocessors bounds it.
    interpret: `plgpu.InterpretGPUParams` to run on a CPU.
  """
  p = problem
  cores = mosaic.num_multiprocessors()
  num_blocks = min(num_blocks or cores, cores)
  T, S, H = p.query_len, p.kv_len, p.num_heads
  Dv = 64 * cdiv(p.value_dim, 64)
  D = max(64 * cdiv(p.head_dim, 64), Dv)
  is_wide = D > 128
  if block_q not in blocks_of_queries(p):
    raise ValueError(f"block_q must be in {blocks_of_queries(p)} for this problem, got {block_q}")
  if stages < 2:
    raise ValueError(f"stages must be at least 2, got {stages}: S of a step needs its queries before the last leave")
  dtype, block_kv = operands.query.dtype, ROWS * (1 if is_wide else NUM_WGS)
  items = p.batch * p.num_kv_heads * cdiv(S, block_kv)
  if items > MOST_ITEMS:
    block_q = ROWS  # to claim them takes the rest of the shared memory
  do_stages = max(1, stages - 1) if Dv > 192 else stages  # what shared memory holds
  parts = ((0, WIDE), (WIDE, D - WIDE)) if is_wide else ((0, D),)  # of dQ that are added apart: first column, how many
  halves = block_q // ROWS
  query_tiles, kv_tiles = cdiv(T, block_q), cdiv(S, block_kv)
  padded = query_tiles * block_q
  factor = LOG2_E * (p.scale if p.soft_cap is None else p.soft_cap)
  is_interpreted = interpret is not None
  swizzle = min(128, D) if halves == 1 else 128  # bytes, of K and dS^T: where half of K's columns are multiplied
  has_masks = _has_masks(p, block_kv)
  ahead = D == 64  # S^T of the next step is computed behind dQ: registers suffice
  walk, schedule = _plan(p, block_q, block_kv, num_blocks)
  workers = min(num_blocks, items) if schedule is None else len(schedule)

  def kernel(
    table, q_gmem, k_gmem, v_gmem, do_gmem, edges, lse_gmem, delta_gmem, query_lens, kv_lens, query_ids, kv_ids, visits,
    counter, turns, dq_gmem, dk_gmem, dv_gmem, *scratch,
  ):  # fmt: skip
    q_smem, k_smem, v_smem, do_smem, row_smem, ds_smem, leaving, claiming, *barriers = scratch
    if is_wide:
      *dq_parts, dk_smem, dv_smem = leaving
    else:
      dq_smem, (dk_smem, dv_smem) = leaving
    ids_smem = claiming[0] if p.has_segments else None  # of queries
    kv_full, kv_empty, q_full, q_empty, do_full, do_empty, dq_full, dq_empty, met, p_full = barriers
    block, warpgroup = lax.axis_index("block"), lax.axis_index("wg")
    item = lambda index: walk.item(index, visits)  # noqa: E731
    if table is not None:
      mine = Listed(count=table[block, 0], at=lambda step: table[block, 1 + step])
    else:
      mine = Claims(counter, claiming, jnp.int32(items), block, workers, interpret=is_interpreted)

    slot = lambda n: lax.rem(n, jnp.int32(stages))  # noqa: E731
    do_slot = lambda n: lax.rem(n, jnp.int32(do_stages))  # noqa: E731
    other = lambda n: lax.rem(n, jnp.int32(2))  # noqa: E731

    def everybody():
      """Waits for the other compute warpgroup; what both wrote to shared memory may be multiplied and may leave."""
      if is_interpreted:
        plgpu.commit_smem()
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
      else:
        mosaic.meet(NUM_WGS)

    def over_items(one_item, write_zeros):
      """one_item(work, steps before) for every item, or `write_zeros(work)` for keys that meet no queries."""

      def one(n, index, done):
        del n
        work = item(index)
        if p.has_kv_lens:
          pl.when(work.steps > 0)(lambda: one_item(work, done))
          pl.when(work.steps == 0)(lambda: write_zeros(work))
        else:
          one_item(work, done)
        return done + work.steps

      mine.over(one, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

    def put_zeros(tile, gmem, work, first_key):
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      tile[...] = mosaic.full(tile.shape, 0.0).astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(tile, gmem.at[work.batch, pl.ds(first_key, ROWS), work.kv_head])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def ids_of(work, key):
      """Segment ids of 64 keys."""
      if not p.has_segments:
        return None
      return plgpu.load(kv_ids.at[work.batch, pl.ds(key, ROWS)], layout=ROW, optimized=False)

    def masked_scores(s, work, tile, at, key, own, half=0):
      """S^T of the tile (slot `at`), or that half of it, and 64 keys from `key`, -inf where a query does not see a key,
      and the soft cap's derivative; `own` are the keys' ids."""
      slope = None
      if p.soft_cap is not None:
        s = jnp.tanh(s * (p.scale / p.soft_cap))
        slope = 1 - s * s
      first_query, positions = tile * block_q + half * ROWS, Positions(p, query_lens, kv_lens, work.batch)

      def cut():
        """By which queries see each key, [low, high) counted from the tile's first."""
        keys = key + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
        low = 0 if positions.right is None else keys - positions.offset - positions.right - first_query
        low = jnp.where(keys < positions.kv_len, low, ROWS)
        high = None if positions.left is None else keys - positions.offset + positions.left + 1 - first_query
        kept = mosaic.keep(s, low, high, interpret=is_interpreted)
        if ids_smem is not None:
          ids = plgpu.load(ids_smem.at[at], layout=COLUMN, optimized=False)
          kept = jnp.where(across(own, s) == down(ids, s), kept, -jnp.inf)
        return kept

      if halves == 2 and not has_masks:  # registers
        return s, slope
      return lax.cond((tile < work.whole_first) | (tile >= work.whole_last), cut, lambda: s), slope

    def queries_of(half):
      """That half of a step's."""
      return pl.ds(half * ROWS, ROWS)

    def probabilities(s, at, half=0):
      row_lse = plgpu.load(row_smem.at[at, queries_of(half)], layout=COLUMN, optimized=False)
      return mosaic.exp2(s * factor - down(row_lse, s), interpret=is_interpreted)

    def minus_delta(dp, at, half=0):
      row_delta = plgpu.load(row_smem.at[stages + at, queries_of(half)], layout=COLUMN, optimized=False)
      return dp - down(row_delta, dp)

    def compute_role(role):
      """One of two warpgroups that share 64 keys, for head_dim above 128.

      The first computes S^T, P^T and dV, the second dP^T, dS^T and dK, each one part of dQ. P^T goes from the first to
      the second through shared memory, and dS^T comes back in its place.
      """
      plgpu.set_max_registers(240, action="increase")
      first_column, columns = parts[role]
      dq_part = dq_parts[role]  # the two lie in the same place
      left, acc_columns = (k_smem, Dv) if role == 0 else (v_smem, D)
      out_tile, out_gmem, out_scale = (dv_smem, dv_gmem, 1.0) if role == 0 else (dk_smem, dk_gmem, p.scale)
      q_ring, do_ring = (q_smem, q_full, q_empty, slot), (do_smem, do_full, do_empty, do_slot)
      rings = (q_ring, do_ring) if role == 0 else (do_ring, q_ring)
      (tiles, full, empty, place), (other_tiles, other_full, other_empty, other_place) = rings

      @jax.named_scope("visit")
      def visit(n, acc, work, done, own):
        """Adds what the n-th step's queries give."""
        at, other_at, ds_tile = place(done + n), other_place(done + n), ds_smem.at[other(n)]
        everything = pl.ds(mosaic.anew(jnp.int32(0), interpret=is_interpreted) * ROWS, ROWS)
        plgpu.barrier_wait(full.at[at])
        if is_interpreted:
          x = mosaic.matmul(left.at[everything], tiles.at[at].T)
        else:
          x = mosaic.begin_scores(left.at[everything], tiles.at[at])
        if role == 0:
          plgpu.wgmma_wait(0)
          tile = walk.head_and_tile(work, n)[1]
          s, slope = masked_scores(x, work, tile, at, work.kv_tile * block_kv, own)
          prob = probabilities(s, at)
          lhs = prob.astype(dtype)
          # The other has done with this buffer: it computed its dQ of two steps ago before `everybody` of the last.
          ds_tile[...] = lhs if slope is None else (prob * slope).astype(dtype)
          plgpu.barrier_arrive(p_full)  # one phase ahead of the other at most: `everybody` comes before the next
        else:
          plgpu.barrier_wait(p_full)
          prob = plgpu.load(ds_tile, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
          plgpu.wgmma_wait(0)
          lhs = (prob * minus_delta(x, at)).astype(dtype)
          ds_tile[...] = lhs
        plgpu.barrier_wait(other_full.at[other_at])
        rhs, own_columns = other_tiles.at[other_at], k_smem.at[everything, pl.ds(first_column, columns)]

        @jax.named_scope("put_dq")
        def put_dq(dq):
          """The order of users of the buffer is this step's first and second part, the next step's first, ..."""
          used = role if role else n
          pl.when(used > 0)(lambda: plgpu.barrier_wait(dq_empty.at[1 - role]))
          dq_part[...] = dq
          plgpu.commit_smem()
          plgpu.barrier_arrive(dq_full.at[role])

        if is_interpreted:
          acc = mosaic.add_matmul(acc, lhs, rhs, interpret=True)
          plgpu.barrier_arrive(other_empty.at[other_at])
          everybody()
          plgpu.barrier_arrive(empty.at[at])
          put_dq(mosaic.matmul(ds_tile.T, own_columns))
          return acc

        def products(ref):
          plgpu.wgmma(ref, lhs, rhs)
          everybody()
          plgpu.barrier_arrive(empty.at[at])
          dq = mosaic.begin_matmul(ds_tile, own_columns, transpose_lhs=True)
          plgpu.wgmma_wait(1)
          plgpu.barrier_arrive(other_empty.at[other_at])
          plgpu.wgmma_wait(0)
          put_dq(dq)

        return pl.run_state(products)(mosaic.ACC.init(acc))

      def one_item(work, done):
        plgpu.barrier_wait(kv_full)
        # dV or dK of the item before has left the buffer of dQ: said to the other by the first `everybody`.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        start = mosaic.full((ROWS, acc_columns), 0.0)
        own = ids_of(work, work.kv_tile * block_kv) if role == 0 else None
        acc = lax.fori_loop(0, work.steps, lambda n, acc: visit(n, acc, work, done, own), start)
        plgpu.barrier_arrive(kv_empty)
        if role == 0:
          plgpu.barrier_wait(dq_empty.at[1])
        else:
          everybody()  # dV has left
        out_tile[...] = (acc * out_scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile, out_gmem.at[work.batch, pl.ds(work.kv_tile * block_kv, ROWS), work.kv_head])
        if role == 0:
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          everybody()

      def write_zeros(work):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        everybody()  # dK of the item before has left
        if role == 0:
          put_zeros(dv_smem, dv_gmem, work, work.kv_tile * block_kv)
          put_zeros(dk_smem, dk_gmem, work, work.kv_tile * block_kv)

      over_items(one_item, write_zeros)

    def compute_rows():
      """One of two warpgroups with 64 keys each, for head_dim up to 128.

      The tensor cores work on dP^T while P^T is computed, on dV while dS^T is, and on dK while dQ leaves; for head_dim
      64 also on S^T of the next step.
      """
      plgpu.set_max_registers(240, action="increase")

      def mine(size):
        """Of two parts of that size, this warpgroup's."""
        return pl.ds(mosaic.anew(warpgroup, interpret=is_interpreted) * size, size)

      def rows():
        """This warpgroup's keys."""
        return mine(ROWS)

      def first_key_of(work):
        return work.kv_tile * block_kv + warpgroup * ROWS

      def one_item(work, done):
        first_key = first_key_of(work)
        own = ids_of(work, first_key)

        def score_gradient(prob, slope, dp, at, half=0):
          ds = prob * minus_delta(dp, at, half)
          return (ds if slope is None else ds * slope).astype(dtype)

        def put_ds(n, ds, half=0):
          ds_smem.at[halves * other(n) + half, rows()][...] = ds

        def share(n):
          """dS^T of both warpgroups is there for dQ; dQ of the step before may leave."""
          everybody()
          pl.when(n > 0)(lambda: plgpu.barrier_arrive(dq_full.at[other(n + 1)]))

        def dq_factors(n):
          """dS^T and K, for half of dQ's columns or, of two halves of the queries, one."""
          if halves == 1:
            return ds_smem.at[other(n)], k_smem.at[:, mine(D // NUM_WGS)]
          half, start = (mosaic.anew(x, interpret=is_interpreted) for x in (warpgroup, jnp.int32(0)))
          return ds_smem.at[halves * other(n) + half], k_smem.at[pl.ds(start * block_kv, block_kv)]

        @jax.named_scope("put_dq")
        def put_dq(n, dq):
          """It leaves when the warpgroups meet the next time."""
          pl.when(n >= 2)(lambda: plgpu.barrier_wait(dq_empty.at[other(n)]))
          place = (slice(None), mine(D // NUM_WGS)) if halves == 1 else (mine(ROWS),)
          dq_smem.at[other(n), *place][...] = dq

        def interpreted_visit(n, accumulators):
          dk, dv = accumulators
          at, (_, tile) = slot(done + n), walk.head_and_tile(work, n)
          plgpu.barrier_wait(q_full.at[at])
          plgpu.barrier_wait(do_full.at[at])
          for half in range(halves):
            q, do = q_smem.at[at, queries_of(half)], do_smem.at[at, queries_of(half)]
            scores = mosaic.matmul(k_smem.at[rows()], q.T)
            s, slope = masked_scores(scores, work, tile, at, first_key, own, half)
            prob = probabilities(s, at, half)
            ds = score_gradient(prob, slope, mosaic.matmul(v_smem.at[rows()], do.T), at, half)
            dv = mosaic.add_matmul(dv, prob.astype(dtype), do, interpret=True)
            dk = mosaic.add_matmul(dk, ds, q, interpret=True)
            put_ds(n, ds, half)
          plgpu.barrier_arrive(do_empty.at[at])
          plgpu.barrier_arrive(q_empty.at[at])
          share(n)
          lhs, rhs = dq_factors(n)
          put_dq(n, mosaic.matmul(lhs.T, rhs))
          return dk, dv

        def products(refs):
          dk, dv = refs

          def left(x, in_registers):
            """This warpgroup's rows of K or V as left operand."""
            if not in_registers:
              return lambda: x.at[rows()]
            tile = plgpu.load(x.at[rows()], layout=plgpu.Layout.WGMMA)
            return lambda: tile

          k, v = left(k_smem, D == 64), left(v_smem, D == 64 and halves == 1)

          def begin_s(n):
            plgpu.barrier_wait(q_full.at[slot(done + n)])
            return mosaic.begin_scores(k(), q_smem.at[slot(done + n), queries_of(0)])

          def begin_next_s(n):
            """Of the last step again, for nothing, where there is no next."""
            upcoming = slot(done + jnp.minimum(n + 1, work.steps - 1))
            pl.when(n + 1 < work.steps)(lambda: plgpu.barrier_wait(q_full.at[upcoming]))
            return mosaic.begin_scores(k(), q_smem.at[upcoming, queries_of(0)])

          def begin_dq(n):
            lhs, rhs = dq_factors(n)
            return mosaic.begin_matmul(lhs, rhs, transpose_lhs=True, swizzle=swizzle)

          def release_query(n):
            plgpu.barrier_arrive(q_empty.at[slot(done + n)])

          @jax.named_scope("visit")
          def visit(n, s):
            """Adds what the n-th step's queries give; returns S^T of the next step where it is computed ahead."""
            at, (_, tile) = slot(done + n), walk.head_and_tile(work, n)
            q, do = q_smem.at[at], do_smem.at[at]
            if not ahead:
              s = begin_s(n)
            plgpu.barrier_wait(do_full.at[at])
            dp = mosaic.begin_scores(v(), do)
            if not ahead:
              plgpu.wgmma_wait(1)  # dK of the step before, S^T
              pl.when(n > 0)(lambda: release_query(n - 1))
            s, slope = masked_scores(s, work, tile, at, first_key, own)
            prob = probabilities(s, at)
            if ahead:
              plgpu.wgmma_wait(1)  # dK of the step before
              pl.when(n > 0)(lambda: release_query(n - 1))
            plgpu.wgmma(dv, prob.astype(dtype), do)
            plgpu.wgmma_wait(1)  # dP^T
            ds = score_gradient(prob, slope, dp, at)
            put_ds(n, ds)
            share(n)
            dq = begin_dq(n)
            if ahead:
              next_s = begin_next_s(n)
            plgpu.wgmma(dk, ds, q)
            plgpu.wgmma_wait(2 if ahead else 1)  # dV, dQ
            plgpu.barrier_arrive(do_empty.at[at])
            put_dq(n, dq)
            if not ahead:
              return s_before
            plgpu.wgmma_wait(1)  # S^T
            return next_s

          def take(n):
            """dS^T of the n-th step is there, and nobody reads that of the step before."""
            mosaic.named("sync", 2 - warpgroup + 2 * other(n))

          @jax.named_scope("visit")
          def visit_halves(n, s):
            """As `visit`, of two halves of the step's queries: the tensor cores work for one while P^T or dS^T of the
            other is computed. dQ is a step late: nobody waits for the other warpgroup's dS^T."""
            at, (_, tile) = slot(done + n), walk.head_and_tile(work, n)
            (q, next_q), (do, next_do) = ([x.at[at, queries_of(i)] for i in range(2)] for x in (q_smem, do_smem))
            plgpu.barrier_wait(do_full.at[at])
            dp = mosaic.begin_scores(v(), do)
            next_s = mosaic.begin_scores(k(), next_q)
            s, slope = masked_scores(s, work, tile, at, first_key, own)
            prob = probabilities(s, at)
            plgpu.wgmma_wait(1)  # dP^T
            plgpu.wgmma(dv, prob.astype(dtype), do)
            ds = score_gradient(prob, slope, dp, at)
            next_dp = mosaic.begin_scores(v(), next_do)
            plgpu.wgmma(dk, ds, q)
            pl.when(n > 0)(lambda: take(n - 1))
            pl.when(n > 1)(lambda: plgpu.barrier_arrive(dq_full.at[other(n)]))
            put_ds(n, ds)
            dq = begin_dq(n + 1)  # of the step before, which has the same buffer; of nothing in the first
            plgpu.wgmma_wait(4)  # S^T of the second half
            s, slope = masked_scores(next_s, work, tile, at, first_key, own, 1)
            prob = probabilities(s, at, 1)
            plgpu.wgmma(dv, prob.astype(dtype), next_do)
            plgpu.wgmma_wait(3)  # dP^T, and dV of the first half
            ds = score_gradient(prob, slope, next_dp, at, 1)
            plgpu.wgmma(dk, ds, next_q)
            put_ds(n, ds, 1)
            next_s = begin_next_s(n)
            plgpu.wgmma_wait(3)  # dQ
            pl.when(n > 0)(lambda: put_dq(n - 1, dq))
            mosaic.named("arrive", 1 + warpgroup + 2 * other(n), publish=True)  # 0 is of `everybody`
            plgpu.wgmma_wait(1)  # dV, dK
            plgpu.barrier_arrive(do_empty.at[at])
            plgpu.wgmma_wait(0)  # S^T
            release_query(n)
            return next_s

          s_before = jnp.int32(0)
          if ahead:
            s_before = begin_s(0)
            plgpu.wgmma_wait(0)
          lax.fori_loop(0, work.steps, visit if halves == 1 else visit_halves, s_before)
          if halves == 2:
            last = work.steps - 1
            take(last)
            pl.when(last > 0)(lambda: plgpu.barrier_arrive(dq_full.at[other(last + 1)]))
            dq = begin_dq(last)
            plgpu.wgmma_wait(0)
            put_dq(last, dq)
          if halves == 1:
            plgpu.wgmma_wait(0)  # dK
            release_query(work.steps - 1)

        plgpu.barrier_wait(kv_full)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # dK and dV of the item before have left
        start = mosaic.full((ROWS, D), 0.0), mosaic.full((ROWS, Dv), 0.0)
        if is_interpreted:
          dk, dv = lax.fori_loop(0, work.steps, interpreted_visit, start)
        else:
          dk, dv = pl.run_state(products)(tuple(map(mosaic.ACC.init, start)))
        everybody()
        plgpu.barrier_arrive(dq_full.at[other(work.steps - 1)])
        plgpu.barrier_arrive(kv_empty)
        for buffer in range(2):
          pl.when(work.steps > buffer)(lambda buffer=buffer: plgpu.barrier_wait(dq_empty.at[buffer]))
        dk_tile, dv_tile = dk_smem.at[rows()], dv_smem.at[rows()]
        dk_tile[...] = (dk * p.scale).astype(dtype)
        dv_tile[...] = dv.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dk_tile, dk_gmem.at[work.batch, pl.ds(first_key, ROWS), work.kv_head])
        plgpu.copy_smem_to_gmem(dv_tile, dv_gmem.at[work.batch, pl.ds(first_key, ROWS), work.kv_head])

      def write_zeros(work):
        for tile, gmem in ((dk_smem, dk_gmem), (dv_smem, dv_gmem)):
          put_zeros(tile.at[rows()], gmem, work, first_key_of(work))

      over_items(one_item, write_zeros)

    if is_wide:
      for role in range(NUM_WGS):
        pl.when(warpgroup == role)(functools.partial(compute_role, role))
    else:
      pl.when(warpgroup < NUM_WGS)(compute_rows)

    @pl.when(warpgroup == NUM_WGS)
    def transfer():
      plgpu.set_max_registers(24, action="decrease")

      def fetch_tile(gmem, edge, end, batch, tile, head, smem, full):
        """A tile of rows; from `edge` where some lie at or past the end of their sequence."""
        rows = smem.shape[0]

        def copy(source):
          plgpu.copy_gmem_to_smem(source, smem, full)

        inside = gmem.at[batch, pl.ds(tile * rows, rows), head]
        if edge is None:
          copy(inside)
        else:
          pl.when((tile + 1) * rows <= end)(lambda: copy(inside))
          pl.when((tile + 1) * rows > end)(lambda: copy(edge.at[batch, :, head]))

      @jax.named_scope("fetch_keys")
      def fetch_keys(work, done):
        end = None if kv_lens is None else kv_lens[work.batch]

        @pl.when(work.steps > 0)
        def _():
          pl.when(done > 0)(lambda: plgpu.barrier_wait(kv_empty))
          fetch_tile(k_gmem, edges.key, end, work.batch, work.kv_tile, work.kv_head, k_smem, kv_full)
          fetch_tile(v_gmem, edges.value, end, work.batch, work.kv_tile, work.kv_head, v_smem, kv_full)

      def fetch_queries(work, done, first, last):
        """Those of steps [first, last)."""
        end = None if query_lens is None else query_lens[work.batch]

        @pl.loop(first, last)
        def _(n):
          head, tile = walk.head_and_tile(work, n)
          queries, at = pl.ds(tile * block_q, block_q), slot(done + n)
          pl.when(done + n >= stages)(lambda: plgpu.barrier_wait(q_empty.at[at]))
          fetch_tile(q_gmem, edges.query, end, work.batch, tile, head, q_smem.at[at], q_full.at[at])
          plgpu.copy_gmem_to_smem(lse_gmem.at[work.batch, head, queries], row_smem.at[at], q_full.at[at])
          if ids_smem is not None:
            plgpu.copy_gmem_to_smem(query_ids.at[work.batch, queries], ids_smem.at[at], q_full.at[at])
          at = do_slot(done + n)
          pl.when(done + n >= do_stages)(lambda: plgpu.barrier_wait(do_empty.at[at]))
          fetch_tile(do_gmem, edges.d_out, end, work.batch, tile, head, do_smem.at[at], do_full.at[at])
          plgpu.copy_gmem_to_smem(delta_gmem.at[work.batch, head, queries], row_smem.at[stages + at], do_full.at[at])

      def ahead_of(work):
        """Steps whose queries find room before any step of the item is computed."""
        return jnp.minimum(work.steps, do_stages)

      def begin(work, done):
        fetch_keys(work, done)
        fetch_queries(work, done, 0, ahead_of(work))

      def add(work, buffer):
        """Adds every second tile of dQ, or one part of each."""
        part = buffer if is_wide else 0
        columns = pl.ds(*parts[part])

        @pl.loop(0, work.steps if is_wide else lax.div(work.steps - buffer + 1, jnp.int32(2)))
        def _(i):
          head, tile = walk.head_and_tile(work, i if is_wide else 2 * i + buffer)
          queries = pl.ds(tile * block_q, block_q)
          source = dq_parts[part] if is_wide else dq_smem.at[buffer]
          if is_interpreted:  # it has no additions and no counters: one array for each KV tile
            plgpu.barrier_wait(dq_full.at[buffer])
            plgpu.copy_smem_to_gmem(source, dq_gmem.at[work.kv_tile, work.batch, head, queries, columns])
            plgpu.wait_smem_to_gmem(0)
            plgpu.barrier_arrive(dq_empty.at[buffer])
            return
          turn = turns.at[part, work.batch, head, pl.ds(tile, 1)]
          target = dq_gmem.at[work.batch, head, queries, columns]
          rank, follows, leads = walk.turn(work, tile)
          pl.when(follows)(lambda: mosaic.wait_for(turn, rank))
          plgpu.barrier_wait(dq_full.at[buffer])
          pl.when(follows)(lambda: plgpu.copy_smem_to_gmem(source, target, reduction_op="add"))
          pl.when(leads)(lambda: plgpu.copy_smem_to_gmem(source, target))
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          plgpu.barrier_arrive(dq_empty.at[buffer])
          plgpu.wait_smem_to_gmem(0)
          mosaic.signal(turn, jnp.where(leads, rank + 1, 1))

      def drain(done):  # the interpreter wants every completion of a barrier observed
        pl.when(done > 0)(lambda: plgpu.barrier_wait(kv_empty))
        pl.loop(jnp.maximum(done - stages, 0), done)(lambda n: plgpu.barrier_wait(q_empty.at[slot(n)]))
        pl.loop(jnp.maximum(done - do_stages, 0), done)(lambda n: plgpu.barrier_wait(do_empty.at[do_slot(n)]))

      def per_warp(fetch, add):
        """One warp fetches and two add; they do not wait for each other."""

        @plgpu.warp_map
        def roles(warp):
          @pl.when(warp == 0)
          def _():
            fetch()

          for buffer in range(2):

            @pl.when(warp == 1 + buffer)
            def _(buffer=buffer):
              add(buffer)

      zero = jnp.int32(0)
      if isinstance(mine, Listed):

        def fetch_item(n, index, done):
          work = item(index)
          fetch_keys(work, done)
          fetch_queries(work, done, 0, work.steps)
          return done + work.steps

        def add_items(buffer):
          mine.over(lambda n, index, carry: (add(item(index), buffer), carry)[1], zero)

        per_warp(lambda: drain(mine.over(fetch_item, zero)), add_items)
      else:  # a warp cannot loop until it hears that nothing is left: their warpgroup does

        def one_item(n, index, claim, done):
          work = item(index)
          then = done + work.steps

          def fetch():
            """The rest of the item, and the beginning of the next, for which nothing of the next need be added."""
            pl.when(n == 0)(lambda: begin(work, done))
            fetch_queries(work, done, ahead_of(work), work.steps)
            following = claim()
            pl.when(following >= 0)(lambda: begin(item(following), then))

          per_warp(fetch, functools.partial(add, work))
          return then

        done = mine.lead(one_item, zero)
        mosaic.one_warp(lambda: drain(done))

  lse2, delta = _row_statistics(p, operands, out, lse, d_out, d_lse, padded, interpret)
  visits, visited = _visits(p, operands, block_q, block_kv)
  ids = _segment_ids(operands, block_q, block_kv)
  *arrays, edges = _prepared(p, operands, d_out, D, Dv, block_q, block_kv)
  from_both = plgpu.Barrier(num_arrivals=NUM_WGS)
  ring, do_ring = (plgpu.Barrier(num_arrivals=2, num_barriers=n) for n in (stages, do_stages))
  q_ring = plgpu.Barrier(num_arrivals=3, num_barriers=stages) if p.has_segments else ring  # ids too
  ids_of_queries = (stages, block_q) if p.has_segments else (0, items_sm90.AHEAD)
  dk_tile, dv_tile = mosaic.smem((block_kv, D), dtype), mosaic.smem((block_kv, Dv), dtype)
  if is_wide:
    leaving = plgpu.RefUnion(*(mosaic.smem((ROWS, n), jnp.float32) for _, n in parts), dk_tile, dv_tile)
  else:
    leaving = plgpu.RefUnion(mosaic.smem((2, block_q, D), jnp.float32), (dk_tile, dv_tile))
  call = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct(((kv_tiles,) if is_interpreted else ()) + (p.batch, H, padded, D), jnp.float32),
      *(jax.ShapeDtypeStruct(x.shape, dtype) for x in arrays[1:3]),
    ),
    grid=(workers,),
    grid_names=("block",),
    num_threads=NUM_WGS + 1,
    thread_name="wg",
    scratch_types=(
      mosaic.smem((stages, block_q, D), dtype),
      mosaic.smem((block_kv, D), dtype, swizzle),
      mosaic.smem((block_kv, Dv), dtype),
      mosaic.smem((do_stages, block_q, Dv), dtype),
      plgpu.SMEM((stages + do_stages, block_q), jnp.float32),  # of queries: the LSE, then delta
      mosaic.smem((2 * halves, block_kv, ROWS), dtype, swizzle),
      leaving,
      items_sm90.scratch(NUM_WGS + 1, ids_of_queries) if schedule is None else None,
      plgpu.Barrier(num_arrivals=2),
      from_both,
      *(q_ring, ring, do_ring, do_ring),
      plgpu.Barrier(num_arrivals=1 if is_wide else NUM_WGS, num_barriers=2),
      plgpu.Barrier(num_barriers=2),
      from_both if is_interpreted else None,
      plgpu.Barrier() if is_wide else None,
    ),
    compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    interpret=interpret,
  )

  def run(*arrays):
    turns = None if is_interpreted else jax.new_ref(jnp.zeros((len(parts), p.batch, H, query_tiles), jnp.int32))
    counter = None if schedule is not None or is_interpreted else jax.new_ref(jnp.full((1,), workers, jnp.int32))
    return call(*arrays, counter, turns)

  table = None if schedule is None else jnp.asarray(schedule)
  lens = operands.query_lens, operands.kv_lens
  dq, dk, dv = mosaic.untyped(run, table, *arrays, edges, lse2, delta, *lens, *ids, visits)

  if is_interpreted:
    tile = jnp.arange(query_tiles)
    seen = (visits[:, :, 0, None] <= tile) & (tile < visits[:, :, 1, None])  # bool[B, KV tiles, query tiles]
    seen = jnp.repeat(seen.swapaxes(0, 1), block_q, axis=2)[:, :, None, :, None]
    dq = jnp.where(seen, dq, 0).sum(0)
  if p.has_query_lens:
    dq = live_rows_sm90.finished(dq, visited, p.scale, operands.query.shape, dtype, interpret=interpret)
  else:
    dq = jnp.where(jnp.repeat(visited, block_q, axis=1)[:, None, :, None], dq * p.scale, 0)
    dq = dq[:, :, :T, : p.head_dim].swapaxes(1, 2).astype(dtype)
  d_sinks = None
  if operands.sinks is not None:
    weight = jnp.exp2(operands.sinks.astype(jnp.float32)[:, None] * LOG2_E - lse2)  # f32[B, H, padded T]
    d_sinks = -(weight * delta).sum((0, 2)).astype(operands.sinks.dtype)
  return FlashGradients(dq, dk[:, :S, :, : p.head_dim], dv[:, :S, :, : p.value_dim], None, d_sinks)


def _has_masks(problem: FlashProblem, block_kv: int) -> bool:
  """Whether any query does not see some key of a tile."""
  p = problem
  return not p.is_static or p.is_causal or p.window is not None or p.kv_len % block_kv != 0


def _is_up(section: Any) -> Any:
  """Whether a section's items walk up through the queries."""
  return section % 2 == 0


@functools.lru_cache(256)
def _schedule(problem: FlashProblem, block_q: int, block_kv: int, width: int, num_blocks: int) -> np.ndarray:
  """i32[blocks, 1 + n]: how many items each block has, and which: the next to the block that is free first."""
  p = problem
  left, right = p.window or (None, None)
  right = min(0, p.query_len + p.kv_len if right is None else right) if p.is_causal else right
  begin = np.arange(0, p.kv_len, block_kv)
  offset, everywhere = p.kv_len - p.query_len, 0 * begin
  low = everywhere if right is None else np.maximum(begin - offset - right, 0)
  high = everywhere + p.query_len if left is None else np.minimum(begin + block_kv - offset + left, p.query_len)
  tiles = np.maximum(-(-high // block_q) - low // block_q, 1) * (p.num_heads // p.num_kv_heads)
  heads = p.batch * p.num_kv_heads
  costs = []
  for section in range(cdiv(heads, width)):
    in_order = tiles[::-1] if _is_up(section) else tiles
    costs.extend(np.repeat(in_order, min(width, heads - section * width)) + ITEM_COST * ROWS / block_q)
  return mosaic.deal(costs, num_blocks)


def _row_statistics(problem, operands, out, lse, d_out, d_lse, padded, interpret):
  """The LSE in base 2 (infinite for rows that saw nothing) and delta, f32[B, H, padded T].

  Rows past the end of their sequence saw nothing, so it does not matter that `row_dots` leaves them out.
  """
  dead = lse == -jnp.inf
  if problem.has_query_lens:
    dots = live_rows_sm90.row_dots(out, d_out, operands.query_lens, interpret=interpret)[..., : problem.query_len]
  else:
    dots = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
  delta = dots - d_lse
  pad = ((0, 0), (0, 0), (0, padded - problem.query_len))
  lse2 = jnp.pad(jnp.where(dead, jnp.inf, lse * LOG2_E), pad, constant_values=jnp.inf)
  return lse2, jnp.pad(jnp.where(dead, 0.0, delta), pad)


class _Edges(NamedTuple):
  """[B, rows of a tile, heads, D], the tile at each sequence's end, zeros past the end; None without lengths.

  It stands for all tiles that are not wholly inside their sequence, for what lies past the end may be NaN.
  """

  query: Any
  key: Any
  value: Any
  d_out: Any


def _prepared(
  problem: FlashProblem, operands: FlashOperands, d_out: jax.Array, D: int, Dv: int, block_q: int, block_kv: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, _Edges]:
  """Query, key, value and d_out of 8 n rows and 64 n columns, zeros in this padding, and their edges."""
  query_lens, kv_lens, _ = spans(problem, operands)

  def padded(x, dim):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, dim - x.shape[-1])))

  def edge(x, lens, has_lens, block):
    if not has_lens:
      return None
    rows = (lens // block * block)[:, None] + jnp.arange(block)
    tile = x[jnp.arange(len(lens))[:, None], jnp.minimum(rows, x.shape[1] - 1)]
    return jnp.where((rows < lens[:, None])[..., None, None], tile, 0)

  query, d_out = padded(operands.query, D), padded(d_out, Dv)
  key, value = padded(operands.key, D), padded(operands.value, Dv)
  edges = [edge(x, query_lens, problem.has_query_lens, block_q) for x in (query, d_out)]
  edges[1:1] = [edge(x, kv_lens, problem.has_kv_lens, block_kv) for x in (key, value)]
  return query, key, value, d_out, _Edges(*edges)


def _visits(problem: FlashProblem, operands: FlashOperands, block_q: int, block_kv: int):
  """Which query tiles each KV tile meets.

  Returns:
    (visits i32[B, KV tiles, 6], visited bool[B, query tiles]). The six: the first tile and the end; the first and the
    end of those that need no mask; the end of the KV tile before; the first of the next. Each KV tile meets one,
    and neither first nor end ever falls from one KV tile to the next, so some tiles may be met only to find everything
    masked. `visited` says which query tiles any KV tile meets.
  """
  T, S = problem.query_len, problem.kv_len
  query_tiles, kv_tiles = cdiv(T, block_q), cdiv(S, block_kv)
  query_lens, kv_lens, offsets = (x[:, None] for x in spans(problem, operands))
  left, right = problem.window or (None, None)
  right = min(0, T + S if right is None else right) if problem.is_causal else right
  begin = jnp.arange(kv_tiles) * block_kv
  end = jnp.minimum(begin + block_kv, kv_lens)
  low = jnp.zeros_like(end) if right is None else jnp.maximum(begin - offsets - right, 0)
  high = jnp.minimum(query_lens, T if left is None else end - offsets + left)
  meets = (begin < end) & (low < high)
  first, last = low // block_q, cdiv(jnp.maximum(high, 0), block_q)
  if problem.has_segments:
    query_ids, kv_ids = _segment_ids(operands, block_q, block_kv)
    query_ids, kv_ids = query_ids.reshape(-1, query_tiles, block_q), kv_ids.reshape(-1, kv_tiles, block_kv)
    query_min, query_max = query_ids.min(-1)[:, None], query_ids.max(-1)[:, None]
    kv_min, kv_max = kv_ids.min(-1)[:, :, None], kv_ids.max(-1)[:, :, None]
    tile = jnp.arange(query_tiles)

    def ends(chosen):  # of bool[B, KV tiles, query tiles]
      return jnp.where(chosen, tile, query_tiles).min(-1), jnp.where(chosen, tile + 1, 0).max(-1)

    first_same, last_same = ends((kv_min <= query_max) & (query_min <= kv_max))
    first, last = jnp.maximum(first, first_same), jnp.minimum(last, last_same)
    meets &= first < last
    alike = (kv_min == query_max) & (query_min == kv_max)  # both hold one id, for min <= max
    first_alike, last_alike = ends(alike)
    last_alike = jnp.where(alike.sum(-1) == last_alike - first_alike, last_alike, 0)  # no interval: none
  first = lax.cummin(jnp.where(meets, first, query_tiles), axis=1, reverse=True)
  last = jnp.maximum(lax.cummax(jnp.where(meets, last, 0), axis=1), 1)
  first = jnp.minimum(first, last - 1)
  whole_first = (
    jnp.zeros_like(end) if right is None else cdiv(jnp.maximum(begin + block_kv - 1 - offsets - right, 0), block_q)
  )
  whole_last = last if left is None else jnp.maximum(begin - offsets + left + 1, 0) // block_q
  if problem.has_segments:
    whole_first, whole_last = jnp.maximum(whole_first, first_alike), jnp.minimum(whole_last, last_alike)
  whole_first = jnp.clip(jnp.where(end < begin + block_kv, last, whole_first), first, last)
  whole_last = jnp.clip(whole_last, whole_first, last)
  is_inside = begin < kv_lens
  before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
  after = jnp.where(is_inside, first, query_tiles)
  after = jnp.pad(after[:, 1:], ((0, 0), (0, 1)), constant_values=query_tiles)
  first = jnp.where(is_inside, first, last)
  tile = jnp.arange(query_tiles)
  visited = ((first[..., None] <= tile) & (tile < last[..., None])).any(1)
  return jnp.stack([first, last, whole_first, whole_last, before, after], -1).astype(jnp.int32), visited


def _segment_ids(operands: FlashOperands, block_q: int, block_kv: int) -> tuple[Any, Any]:
  """Segment ids padded to whole tiles."""

  def padded(ids, block):
    return None if ids is None else jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)), mode="edge")

  return padded(operands.query_segments, block_q), padded(operands.kv_segments, block_kv)
