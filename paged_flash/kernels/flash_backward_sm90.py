"""The backward pass of flash attention for Hopper GPUs, one deterministic Pallas Mosaic GPU kernel.

A block owns one tile of keys of one kv head, 64 of them for each of its two compute warpgroups. It walks through the
query tiles that see these keys, for every query head of the group, and recomputes the scores:

  S^T = K Q^T       P^T = exp(S^T - LSE)      dP^T = V dO^T      dS^T = P^T (dP^T - delta)
  dV += P^T dO      dK += dS^T Q              dQ = dS K

(Dao et al. 2022, Algorithm 4, transposed as in FlashAttention-3, so that P^T and dS^T can stay in registers as left
operands; delta = rowsum(dO O) minus the cotangent of the LSE.) dK and dV stay in registers. dS^T goes through shared
memory because both warpgroups need all of it for dQ, of which each computes one half. S^T of the next step is issued
behind dQ and dK, so that the tensor cores have work while dQ leaves. Two warps add dQ tiles in turn to an f32 array in
global memory by TMA.

The order of these additions is fixed, so two runs give the same bits. A counter for each (sequence, head, query tile)
holds the rank of the KV tile that may add next; it adds, waits for the addition to be complete, and raises the counter.
The query tiles that see a KV tile are made an interval whose ends never fall as KV tiles ascend (`_visits`), so the
ranks of those that meet a query tile follow one another, and the neighbor's interval tells who is first.

Heads are worked on in sections, which differ in direction. In the first, third, ... KV tiles start from the last, and
walk up through the queries; in the others they start from the first and walk down. With a causal mask, KV tiles that
start together then reach a query tile two steps after one another, and end the later the more queries see them; the
next section's tiles start in the order in which these end, the heaviest first, follow each other as well, and all end
together. Without a mask, tiles of a head that run together start at evenly spread queries and walk around (`spread`).

No deadlock: an item (one KV tile of one kv head) waits only for earlier ones or, where spread, for those of its
section, which all run at the same time; blocks compute their items in order, and start in the order of their first
ones. With static lengths blocks stay on their multiprocessor and work on a list of items (`_schedule`): the next keys
are on their way while dK and dV leave.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_flash.kernels import mosaic
from paged_flash.kernels.flash_forward_sm90 import Positions
from paged_flash.kernels.mosaic import COLUMN, LOG2_E, ROW, across, cdiv, down
from paged_flash.kernels.problem import FlashGradients, FlashOperands, FlashProblem, spans

ROWS = 64  # keys of one warpgroup
NUM_WGS = 2
ITEM_COST = 1.5  # of a tile of keys besides its query tiles, in query tiles


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


def backward(
  problem: FlashProblem,
  operands: FlashOperands,
  out: jax.Array,
  lse: jax.Array,
  d_out: jax.Array,
  d_lse: jax.Array,
  *,
  block_q: int,
  stages: int,
  num_blocks: int | None = None,
  directions: str = "alternate",
  is_persistent: bool = True,
  is_spread: bool = True,
  ahead: bool = True,
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
    block_q: Queries of a tile, 64 or 128.
    stages: Tiles of Q and dO in flight.
    num_blocks: Blocks that run at once, at most the number of multiprocessors: they wait for each other.
    directions: "alternate" from section to section, "up" or "down".
    is_persistent: Whether blocks stay on their multiprocessor, if lengths are static.
    is_spread: Whether tiles of keys without a mask start at different queries.
    ahead: Whether S^T of the next step is computed behind dQ and dK.
    interpret: `plgpu.InterpretGPUParams` to run on a CPU.
  """
  p = problem
  num_blocks = num_blocks or {"nvidia_h20": 78, "nvidia_h100_pcie": 114}.get(p.device, 132)
  T, S, H, K = p.query_len, p.kv_len, p.num_heads, p.num_kv_heads
  Dv = 64 * cdiv(p.value_dim, 64)
  D = max(64 * cdiv(p.head_dim, 64), Dv)
  dtype, group, block_kv = operands.query.dtype, H // K, ROWS * NUM_WGS
  query_tiles, kv_tiles, heads = cdiv(T, block_q), cdiv(S, block_kv), p.batch * K
  items, padded = heads * kv_tiles, query_tiles * block_q
  right_masks = p.is_causal or p.window is not None or p.has_kv_lens or p.has_segments or S % block_kv != 0
  factor = LOG2_E * (p.scale if p.soft_cap is None else p.soft_cap)
  is_interpreted = interpret is not None
  by_rows = block_q == ROWS * NUM_WGS  # how the warpgroups share a tile of dQ
  dq_shape = (ROWS, D) if by_rows else (block_q, D // NUM_WGS)
  # Sections of as many heads as give each block about two items, and an even number of sections.
  width = max(n for n in range(1, max(2, 2 * num_blocks // kv_tiles + 1)) if n == 1 or heads % (2 * n) == 0)
  is_static = not (p.has_query_lens or p.has_kv_lens or p.has_segments)
  at_once = num_blocks // kv_tiles
  spread = is_spread and is_static and not right_masks and at_once * kv_tiles > 0
  spread = spread and cdiv(heads, at_once) == cdiv(items, num_blocks)
  if spread:
    width = min(at_once, heads)
    num_blocks = width * kv_tiles
  schedule = None
  if is_static and (is_persistent or spread) and items <= 2**16:
    schedule = _schedule(p, block_q, block_kv, width, min(num_blocks, items), directions)

  def kernel(
    table, q_gmem, k_gmem, v_gmem, do_gmem, lse_gmem, delta_gmem, query_lens, kv_lens, query_ids, kv_ids, visits, turns,
    dq_gmem, dk_gmem, dv_gmem, *scratch,
  ):  # fmt: skip
    q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem, ds_smem, leaving, *barriers = scratch
    dq_smem, (dk_smem, dv_smem) = leaving
    kv_full, kv_empty, q_full, q_empty, do_full, do_empty, dq_full, dq_empty, met = barriers
    block, warpgroup = lax.axis_index("block"), lax.axis_index("wg")
    count = 1 if table is None else table[block, 0]

    def item(step):
      """The block's n-th item."""
      index = block if table is None else table[block, 1 + step]
      section, rest = lax.div(index, jnp.int32(width * kv_tiles)), lax.rem(index, jnp.int32(width * kv_tiles))
      here = jnp.minimum(width, heads - section * width)
      rank, head = lax.div(rest, here), section * width + lax.rem(rest, here)
      up = spread or _is_up(section, directions)
      kv_tile = jnp.where(up, kv_tiles - 1 - rank, rank)
      batch = lax.div(head, jnp.int32(K))
      first, last, whole_first, whole_last, before, after = (visits[batch, kv_tile, i] for i in range(6))
      shared = jnp.where(up, after, first), jnp.where(up, last, before)
      steps = group * (last - first)
      return _Item(
        batch, lax.rem(head, jnp.int32(K)), kv_tile, first, last, whole_first, whole_last, rank, shared, up, steps
      )

    def head_and_tile(work, n):
      """Query head and tile of the item's n-th step."""
      tile = work.tile(lax.div(n, jnp.int32(group)))
      if spread:
        tile = tile + lax.div(work.kv_tile * query_tiles, jnp.int32(kv_tiles))
        tile = jnp.where(tile < query_tiles, tile, tile - query_tiles)
      return work.kv_head * group + lax.rem(n, jnp.int32(group)), tile

    slot = lambda n: lax.rem(n, jnp.int32(stages))  # noqa: E731
    other = lambda n: lax.rem(n, jnp.int32(2))  # noqa: E731

    @pl.when(warpgroup < NUM_WGS)
    def compute():
      plgpu.set_max_registers(240, action="increase")
      rows = pl.ds(warpgroup * ROWS, ROWS)

      def everybody():
        """Waits for the other warpgroup."""
        if is_interpreted:
          plgpu.barrier_arrive(met)
          plgpu.barrier_wait(met)
        else:
          mosaic.meet(NUM_WGS)

      def masked_scores(s, work, tile):
        """The scores S^T, -inf where a query does not see a key, and the derivative of the soft cap."""
        slope = None
        if p.soft_cap is not None:
          s = jnp.tanh(s * (p.scale / p.soft_cap))
          slope = 1 - s * s
        first_query, key = tile * block_q, work.kv_tile * block_kv + warpgroup * ROWS
        positions = Positions(p, query_lens, kv_lens, work.batch)

        def cut():
          """By which queries see each key, [low, high) counted from the tile's first."""
          keys = key + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
          low = 0 if positions.right is None else keys - positions.offset - positions.right - first_query
          low = jnp.where(keys < positions.kv_len, low, block_q)
          high = None if positions.left is None else keys - positions.offset + positions.left + 1 - first_query
          return mosaic.keep(s, low, high, interpret=is_interpreted)

        if not p.has_segments:
          return lax.cond((tile < work.whole_first) | (tile >= work.whole_last), cut, lambda: s), slope
        ids = plgpu.load(query_ids.at[work.batch, pl.ds(first_query, block_q)], layout=COLUMN, optimized=False)
        own = plgpu.load(kv_ids.at[work.batch, pl.ds(key, ROWS)], layout=ROW, optimized=False)
        s = cut()
        return jnp.where(across(own, s) == down(ids, s), s, -jnp.inf), slope

      def one_item(step, done):
        work = item(step)

        def visit(n, carry):
          """Adds what the n-th step's queries give."""
          dk, dv, *s = carry
          at = slot(done + n)
          _, tile = head_and_tile(work, n)
          mine = mosaic.anew(warpgroup, interpret=is_interpreted)
          rows = pl.ds(mine * ROWS, ROWS)
          q, k_tile, v_tile, do = q_smem.at[at], k_smem.at[rows], v_smem.at[rows], do_smem.at[at]
          ds_pair, dq_tile = ds_smem.at[other(n)], dq_smem.at[other(n)]
          if by_rows:
            dq_tile, half_of_ds, half_of_k = dq_tile.at[rows], ds_pair.at[:, rows], k_smem
          else:
            columns = pl.ds(mine * dq_shape[1], dq_shape[1])
            dq_tile, half_of_ds, half_of_k = dq_tile.at[:, columns], ds_pair, k_smem.at[:, columns]

          def probabilities(s):
            row_lse = plgpu.load(lse_smem.at[at], layout=COLUMN, optimized=False)
            return mosaic.exp2(s * factor - down(row_lse, s), interpret=is_interpreted)

          def score_gradient(prob, slope, dp):
            delta = plgpu.load(delta_smem.at[at], layout=COLUMN, optimized=False)
            ds = prob * (dp - down(delta, dp))
            return (ds if slope is None else ds * slope).astype(dtype)

          def put_dq(dq):
            pl.when(n >= 2)(lambda: plgpu.barrier_wait(dq_empty.at[other(n)]))
            dq_tile[...] = dq
            plgpu.commit_smem()
            plgpu.barrier_arrive(dq_full.at[other(n)])

          if is_interpreted:
            plgpu.barrier_wait(q_full.at[at])
            s = mosaic.matmul(k_tile, q.T)
            plgpu.barrier_wait(do_full.at[at])
            dp = mosaic.matmul(v_tile, do.T)
            s, slope = masked_scores(s, work, tile)
            prob = probabilities(s)
            ds = score_gradient(prob, slope, dp)
            ds_pair[rows] = ds
            dv = mosaic.add_matmul(dv, prob.astype(dtype), do, interpret=True)
            plgpu.barrier_arrive(do_empty.at[at])
            everybody()
            dq = mosaic.matmul(half_of_ds.T, half_of_k)
            dk = mosaic.add_matmul(dk, ds, q, interpret=True)
            plgpu.barrier_arrive(q_empty.at[at])
            put_dq(dq)
            return dk, dv

          def products(refs):
            s_ref, dp_ref, dq_ref, dk_ref, dv_ref = refs
            if ahead:
              scores, slope = masked_scores(s[0], work, tile)
            else:
              plgpu.barrier_wait(q_full.at[at])
              plgpu.wgmma(s_ref, k_tile, q.T)
            plgpu.barrier_wait(do_full.at[at])
            plgpu.wgmma(dp_ref, v_tile, do.T)
            if not ahead:
              scores, slope = masked_scores(plgpu.wgmma_accumulator_load(s_ref, wait_n=1), work, tile)
            prob = probabilities(scores)
            plgpu.wgmma(dv_ref, prob.astype(dtype), do)
            ds = score_gradient(prob, slope, plgpu.wgmma_accumulator_load(dp_ref, wait_n=1))
            ds_pair.at[rows][...] = ds
            everybody()
            plgpu.wgmma(dq_ref, half_of_ds.T, half_of_k)
            plgpu.wgmma(dk_ref, ds, q)
            plgpu.wgmma_wait(2)
            plgpu.barrier_arrive(do_empty.at[at])
            put_dq(plgpu.wgmma_accumulator_load(dq_ref, wait_n=1))
            if ahead:
              upcoming = done + jnp.minimum(n + 1, work.steps - 1)
              pl.when(n + 1 < work.steps)(lambda: plgpu.barrier_wait(q_full.at[slot(upcoming)]))
              plgpu.wgmma(s_ref, k_tile, q_smem.at[slot(upcoming)].T)
            plgpu.wgmma_wait(0 + ahead)
            plgpu.barrier_arrive(q_empty.at[at])

          zeros = mosaic.full((ROWS, block_q), 0.0)
          start = (zeros, zeros, mosaic.full(dq_shape, 0.0), dk, dv)
          new_s, _, _, dk, dv = pl.run_state(products)(tuple(mosaic.ACC.init(x) for x in start))
          return (dk, dv, new_s) if ahead else (dk, dv)

        plgpu.barrier_wait(kv_full)
        carry = mosaic.full((ROWS, D), 0.0), mosaic.full((ROWS, Dv), 0.0)
        if ahead and not is_interpreted:
          plgpu.barrier_wait(q_full.at[slot(done)])
          carry = *carry, mosaic.matmul(k_smem.at[rows], q_smem.at[slot(done)].T)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # dK and dV of the item before have left
        dk, dv, *_ = lax.fori_loop(0, work.steps, visit, carry)
        everybody()
        plgpu.barrier_arrive(kv_empty)
        for buffer in range(2):
          pl.when(work.steps > buffer)(lambda buffer=buffer: plgpu.barrier_wait(dq_empty.at[buffer]))
        dk_tile, dv_tile = dk_smem.at[rows], dv_smem.at[rows]
        dk_tile[...] = (dk * p.scale).astype(dtype)
        dv_tile[...] = dv.astype(dtype)
        plgpu.commit_smem()
        own = pl.ds(work.kv_tile * block_kv + warpgroup * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(dk_tile, dk_gmem.at[work.batch, own, work.kv_head])
        plgpu.copy_smem_to_gmem(dv_tile, dv_gmem.at[work.batch, own, work.kv_head])
        return done + work.steps

      lax.fori_loop(0, count, one_item, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == NUM_WGS)
    def transfer():
      plgpu.set_max_registers(24, action="decrease")

      def fetch():
        def one_item(step, done):
          work = item(step)
          own = pl.ds(work.kv_tile * block_kv, block_kv)
          pl.when(step > 0)(lambda: plgpu.barrier_wait(kv_empty))
          plgpu.copy_gmem_to_smem(k_gmem.at[work.batch, own, work.kv_head], k_smem, kv_full)
          plgpu.copy_gmem_to_smem(v_gmem.at[work.batch, own, work.kv_head], v_smem, kv_full)

          @pl.loop(0, work.steps)
          def _(n):
            head, tile = head_and_tile(work, n)
            queries, at, is_used = pl.ds(tile * block_q, block_q), slot(done + n), done + n >= stages
            pl.when(is_used)(lambda: plgpu.barrier_wait(q_empty.at[at]))
            plgpu.copy_gmem_to_smem(q_gmem.at[work.batch, queries, head], q_smem.at[at], q_full.at[at])
            plgpu.copy_gmem_to_smem(lse_gmem.at[work.batch, head, queries], lse_smem.at[at], q_full.at[at])
            pl.when(is_used)(lambda: plgpu.barrier_wait(do_empty.at[at]))
            plgpu.copy_gmem_to_smem(do_gmem.at[work.batch, queries, head], do_smem.at[at], do_full.at[at])
            plgpu.copy_gmem_to_smem(delta_gmem.at[work.batch, head, queries], delta_smem.at[at], do_full.at[at])

          return done + work.steps

        done = lax.fori_loop(0, count, one_item, jnp.int32(0))
        plgpu.barrier_wait(kv_empty)

        @pl.loop(jnp.maximum(done - stages, 0), done)
        def _(n):  # the interpreter wants every completion of a barrier observed
          plgpu.barrier_wait(q_empty.at[slot(n)])
          plgpu.barrier_wait(do_empty.at[slot(n)])

      def add(buffer):
        """Adds every second tile of dQ."""

        @pl.loop(0, count)
        def _(step):
          work = item(step)

          @pl.loop(0, lax.div(work.steps - buffer + 1, jnp.int32(2)))
          def _(i):
            head, tile = head_and_tile(work, 2 * i + buffer)
            queries, source = pl.ds(tile * block_q, block_q), dq_smem.at[buffer]
            if is_interpreted:  # it has no additions and no counters: one array for each KV tile
              plgpu.barrier_wait(dq_full.at[buffer])
              plgpu.copy_smem_to_gmem(source, dq_gmem.at[work.kv_tile, work.batch, head, queries])
              plgpu.wait_smem_to_gmem(0)
              plgpu.barrier_arrive(dq_empty.at[buffer])
              return
            turn, target = turns.at[work.batch, head, pl.ds(tile, 1)], dq_gmem.at[work.batch, head, queries]
            low, high = work.shared
            rank, leads = work.rank, (tile < low) | (tile >= high)
            if spread:  # from the KV tile that starts here or before, down and around
              starts = lax.div((tile + 1) * kv_tiles - 1, jnp.int32(query_tiles))
              rank = starts - work.kv_tile
              rank = jnp.where(rank < 0, rank + kv_tiles, rank)
              leads = rank == 0
            follows = (low <= tile) & (tile < high) if not spread else rank > 0
            pl.when(follows)(lambda: mosaic.wait_for(turn, rank))
            plgpu.barrier_wait(dq_full.at[buffer])
            pl.when(follows)(lambda: plgpu.copy_smem_to_gmem(source, target, reduction_op="add"))
            pl.when(leads)(lambda: plgpu.copy_smem_to_gmem(source, target))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(dq_empty.at[buffer])
            plgpu.wait_smem_to_gmem(0)
            mosaic.signal(turn, jnp.where(leads, rank + 1, 1))

      @plgpu.warp_map
      def per_warp(warp):
        pl.when(warp == 0)(fetch)
        pl.when(warp == 1)(lambda: add(0))
        pl.when(warp == 2)(lambda: add(1))

  lse2, delta = _row_statistics(p, operands, out, lse, d_out, d_lse, padded)
  visits, visited = _visits(p, operands, block_q, block_kv)
  ids = _segment_ids(operands, block_q, block_kv)
  query, key, value, d_out = _prepared(p, operands, d_out, D, Dv)
  from_both, ring = plgpu.Barrier(num_arrivals=NUM_WGS), plgpu.Barrier(num_arrivals=2, num_barriers=stages)
  call = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct(((kv_tiles,) if is_interpreted else ()) + (p.batch, H, padded, D), jnp.float32),
      jax.ShapeDtypeStruct(key.shape, dtype),
      jax.ShapeDtypeStruct(value.shape, dtype),
    ),
    grid=(items if schedule is None else len(schedule),),
    grid_names=("block",),
    num_threads=NUM_WGS + 1,
    thread_name="wg",
    scratch_types=(
      mosaic.smem((stages, block_q, D), dtype),
      mosaic.smem((block_kv, D), dtype),
      mosaic.smem((block_kv, Dv), dtype),
      mosaic.smem((stages, block_q, Dv), dtype),
      plgpu.SMEM((stages, block_q), jnp.float32),
      plgpu.SMEM((stages, block_q), jnp.float32),
      mosaic.smem((2, block_kv, block_q), dtype),
      plgpu.RefUnion(
        mosaic.smem((2, block_q, D), jnp.float32),
        (mosaic.smem((block_kv, D), dtype), mosaic.smem((block_kv, Dv), dtype)),
      ),
      plgpu.Barrier(num_arrivals=2),
      from_both,
      *(ring, ring, ring, ring),
      plgpu.Barrier(num_arrivals=NUM_WGS, num_barriers=2),
      plgpu.Barrier(num_barriers=2),
      from_both if is_interpreted else None,
    ),
    compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    interpret=interpret,
  )

  def run(*arrays):
    turns = None if is_interpreted else jax.new_ref(jnp.zeros((p.batch, H, query_tiles), jnp.int32))
    return call(*arrays, turns)

  table = None if schedule is None else jnp.asarray(schedule)
  lens = operands.query_lens, operands.kv_lens
  dq, dk, dv = mosaic.untyped(run, table, query, key, value, d_out, lse2, delta, *lens, *ids, visits)

  if is_interpreted:
    tile = jnp.arange(query_tiles)
    seen = (visits[:, :, 0, None] <= tile) & (tile < visits[:, :, 1, None])  # bool[B, KV tiles, query tiles]
    seen = jnp.repeat(seen.swapaxes(0, 1), block_q, axis=2)[:, :, None, :, None]
    dq = jnp.where(seen, dq, 0).sum(0)
  dq = jnp.where(jnp.repeat(visited, block_q, axis=1)[:, None, :, None], dq * p.scale, 0)
  d_sinks = None
  if operands.sinks is not None:
    weight = jnp.exp2(operands.sinks.astype(jnp.float32)[:, None] * LOG2_E - lse2)  # f32[B, H, padded T]
    d_sinks = -(weight * delta).sum((0, 2)).astype(operands.sinks.dtype)
  dq = dq[:, :, :T, : p.head_dim].swapaxes(1, 2).astype(dtype)
  return FlashGradients(dq, dk[:, :S, :, : p.head_dim], dv[:, :S, :, : p.value_dim], None, d_sinks)


def _is_up(section: Any, directions: str) -> Any:
  """Whether a section's items walk up through the queries."""
  return section % 2 == 0 if directions == "alternate" else directions == "up"


@functools.lru_cache(256)
def _schedule(
  problem: FlashProblem, block_q: int, block_kv: int, width: int, num_blocks: int, directions: str
) -> np.ndarray:
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
    in_order = tiles[::-1] if _is_up(section, directions) else tiles
    costs.extend(np.repeat(in_order, min(width, heads - section * width)) + ITEM_COST)
  return mosaic.deal(costs, num_blocks)


def _row_statistics(problem, operands, out, lse, d_out, d_lse, padded):
  """The LSE in base 2 (infinite for rows that saw nothing) and delta, f32[B, H, padded T]."""
  dead = lse == -jnp.inf
  delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1).swapaxes(1, 2) - d_lse
  pad = ((0, 0), (0, 0), (0, padded - problem.query_len))
  lse2 = jnp.pad(jnp.where(dead, jnp.inf, lse * LOG2_E), pad, constant_values=jnp.inf)
  return lse2, jnp.pad(jnp.where(dead, 0.0, delta), pad)


def _prepared(
  problem: FlashProblem, operands: FlashOperands, d_out: jax.Array, D: int, Dv: int
) -> tuple[jax.Array, ...]:
  """Query, key, value and d_out, zeros in their padding (it may hold NaN), 8 n rows and 64 n columns."""
  query, key, value = operands[:3]
  query_lens, kv_lens, _ = spans(problem, operands)

  def clean(x, lens, has_lens, dim):
    if has_lens:
      x = jnp.where((jnp.arange(x.shape[1]) < lens[:, None])[..., None, None], x, 0)
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, dim - x.shape[-1])))

  query, d_out = (clean(x, query_lens, problem.has_query_lens, n) for x, n in ((query, D), (d_out, Dv)))
  key, value = (clean(x, kv_lens, problem.has_kv_lens, n) for x, n in ((key, D), (value, Dv)))
  return query, key, value, d_out


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
    same = kv_ids.min(-1)[:, :, None] <= query_ids.max(-1)[:, None]
    same &= query_ids.min(-1)[:, None] <= kv_ids.max(-1)[:, :, None]  # bool[B, KV tiles, query tiles]
    tile = jnp.arange(query_tiles)
    first = jnp.maximum(first, jnp.where(same, tile, query_tiles).min(-1))
    last = jnp.minimum(last, jnp.where(same, tile + 1, 0).max(-1))
    meets &= first < last
  first = lax.cummin(jnp.where(meets, first, query_tiles), axis=1, reverse=True)
  last = jnp.maximum(lax.cummax(jnp.where(meets, last, 0), axis=1), 1)
  first = jnp.minimum(first, last - 1)
  whole_first = (
    jnp.zeros_like(end) if right is None else cdiv(jnp.maximum(begin + block_kv - 1 - offsets - right, 0), block_q)
  )
  whole_last = last if left is None else jnp.maximum(begin - offsets + left + 1, 0) // block_q
  if problem.has_segments:
    whole_first = last
  whole_first = jnp.clip(jnp.where(end < begin + block_kv, last, whole_first), first, last)
  whole_last = jnp.clip(whole_last, whole_first, last)
  before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
  after = jnp.pad(first[:, 1:], ((0, 0), (0, 1)), constant_values=query_tiles)
  tile = jnp.arange(query_tiles)
  visited = ((first[..., None] <= tile) & (tile < last[..., None])).any(1)
  return jnp.stack([first, last, whole_first, whole_last, before, after], -1).astype(jnp.int32), visited


def _segment_ids(operands: FlashOperands, block_q: int, block_kv: int) -> tuple[Any, Any]:
  """Segment ids padded to whole tiles."""

  def padded(ids, block):
    return None if ids is None else jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)), mode="edge")

  return padded(operands.query_segments, block_q), padded(operands.kv_segments, block_kv)
