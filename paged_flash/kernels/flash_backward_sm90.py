"""The backward pass of flash attention for Hopper GPUs, one deterministic Pallas Mosaic GPU kernel.

A block owns one tile of keys of one kv head, 64 of them for each of its two compute warpgroups. It walks through the
query tiles that see these keys, for every query head of the group, and recomputes the scores:

  S^T = K Q^T       P^T = exp(S^T - LSE)      dP^T = V dO^T      dS^T = P^T (dP^T - delta)
  dV += P^T dO      dK += dS^T Q              dQ = dS K

(Dao et al. 2022, Algorithm 4, transposed as in FlashAttention-3, so that P^T and dS^T can stay in registers as left
operands; delta = rowsum(dO O) minus the cotangent of the LSE.) dK and dV stay in registers. dS^T goes through shared
memory because both warpgroups need all of it for dQ, of which each computes one half. A warp adds dQ tiles to an f32
array in global memory by TMA.

The order of these additions is fixed, so two runs give the same bits: KV tiles ascending for each query tile. A counter
for each (sequence, head, query tile) holds the next KV tile to add; tile j waits for j, adds, waits for the addition to
be complete, and sets j + 1. The query tiles that see a KV tile are made an interval whose ends never fall as j grows
(`_visits`), so the tile before j in the order is j - 1 or none.

No deadlock: what block n waits for is done by blocks before n (KV tiles ascend within a head), and blocks start in
order, so the earliest unfinished block can always go on. No waste: blocks walk through queries from the last to the
first, and start in the order in which they must add, so they follow each other around in a wave. For causal attention
that is also the good order for balance, the heaviest blocks first.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_flash.kernels import mosaic
from paged_flash.kernels.flash_forward_sm90 import Positions
from paged_flash.kernels.mosaic import COLUMN, LOG2_E, ROW, across, cdiv, down
from paged_flash.kernels.problem import FlashGradients, FlashOperands, FlashProblem, spans

ROWS = 64  # keys of one warpgroup
NUM_WGS = 2
L2_BYTES = 40 << 20  # what the heads that run at the same time may use of it


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
  early: bool = True,
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
    interpret: `plgpu.InterpretGPUParams` to run on a CPU.
  """
  p = problem
  T, S, H, K, D, Dv = p.query_len, p.kv_len, p.num_heads, p.num_kv_heads, p.head_dim, p.value_dim
  dtype, group, block_kv = operands.query.dtype, H // K, ROWS * NUM_WGS
  query_tiles, kv_tiles, heads = cdiv(T, block_q), cdiv(S, block_kv), p.batch * K
  padded = query_tiles * block_q
  right_masks = p.is_causal or p.window is not None or p.has_kv_lens or p.has_segments or S % block_kv != 0
  left_masks = p.window is not None
  factor = LOG2_E * (p.scale if p.soft_cap is None else p.soft_cap)
  is_interpreted = interpret is not None
  by_rows = block_q == ROWS * NUM_WGS  # how the warpgroups share a tile of dQ
  dq_shape = (ROWS, D) if by_rows else (block_q, D // NUM_WGS)
  # Heads whose Q, dO and dQ fit into the L2 cache together run at the same time.
  width = max(1, min(heads, L2_BYTES // (group * T * (2 * D + 2 * Dv + 4 * D))))

  def item(index):
    """(batch, kv head, KV tile) of the n-th block."""
    section, rest = lax.div(index, jnp.int32(width * kv_tiles)), lax.rem(index, jnp.int32(width * kv_tiles))
    here = jnp.minimum(width, heads - section * width)
    tile, head = lax.div(rest, here), section * width + lax.rem(rest, here)
    return lax.div(head, jnp.int32(K)), lax.rem(head, jnp.int32(K)), tile

  def kernel(
    q_gmem, k_gmem, v_gmem, do_gmem, lse_gmem, delta_gmem, query_lens, kv_lens, query_ids, kv_ids, visits, turns,
    dq_gmem, dk_gmem, dv_gmem, *scratch,
  ):  # fmt: skip
    q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem, ds_smem, dq_smem, *barriers = scratch
    kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty, met = barriers
    block, warpgroup = lax.axis_index("block"), lax.axis_index("wg")
    batch, kv_head, kv_tile = item(block)
    first_key = kv_tile * block_kv
    first, whole_first, whole_last, last, last_before = (visits[batch, kv_tile, i] for i in range(5))
    steps = group * jnp.maximum(last - first, 0)

    def head_and_tile(n):
      """Query head and tile of the n-th step."""
      return kv_head * group + lax.rem(n, jnp.int32(group)), last - 1 - lax.div(n, jnp.int32(group))

    slot = lambda n: lax.rem(n, jnp.int32(stages))  # noqa: E731

    @pl.when(warpgroup < NUM_WGS)
    def compute():
      plgpu.set_max_registers(240, action="increase")
      rows = pl.ds(warpgroup * ROWS, ROWS)
      k_tile, v_tile = k_smem.at[rows], v_smem.at[rows]
      positions = Positions(p, query_lens, kv_lens, batch)
      if by_rows:
        dq_tile, half_of_ds, half_of_k = dq_smem.at[rows], lambda ds: ds.at[:, rows], k_smem
      else:
        columns = pl.ds(warpgroup * dq_shape[1], dq_shape[1])
        dq_tile, half_of_ds, half_of_k = dq_smem.at[:, columns], lambda ds: ds, k_smem.at[:, columns]

      def seen_by(positions, origin):
        """Which queries see each key, [low, high) counted from `origin`."""
        key = first_key + warpgroup * ROWS + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
        low = 0 if positions.right is None else key - positions.offset - positions.right - origin
        low = jnp.where(key < positions.kv_len, low, block_q)
        return low, None if positions.left is None else key - positions.offset + positions.left + 1 - origin

      def visit(n, tile, carry, *, masked):
        """Adds what the n-th step's queries give."""
        dk, dv = carry
        first_query = tile * block_q
        q, do, ds_pair = q_smem.at[slot(n)], do_smem.at[slot(n)], ds_smem.at[lax.rem(n, jnp.int32(2))]

        def probabilities(s):
          """P^T and the derivative of the soft cap."""
          slope = None
          if p.soft_cap is not None:
            s = jnp.tanh(s * (p.scale / p.soft_cap))
            slope = 1 - s * s
          if masked:
            s = mosaic.keep(s, *seen_by(positions, first_query), interpret=is_interpreted)
            if p.has_segments:
              ids = plgpu.load(query_ids.at[batch, pl.ds(first_query, block_q)], layout=COLUMN, optimized=False)
              own = plgpu.load(kv_ids.at[batch, pl.ds(first_key + warpgroup * ROWS, ROWS)], layout=ROW, optimized=False)
              s = jnp.where(across(own, s) == down(ids, s), s, -jnp.inf)
          row_lse = plgpu.load(lse_smem.at[slot(n)], layout=COLUMN, optimized=False)
          return jnp.exp2(s * factor - down(row_lse, s)), slope

        def score_gradient(prob, slope, dp):
          delta = plgpu.load(delta_smem.at[slot(n)], layout=COLUMN, optimized=False)
          ds = prob * (dp - down(delta, dp))
          return ds if slope is None else ds * slope

        def put_dq(dq):
          pl.when(n > 0)(lambda: plgpu.barrier_wait(dq_empty))
          dq_tile[...] = dq
          plgpu.commit_smem()
          plgpu.barrier_arrive(dq_full)

        if is_interpreted:
          plgpu.barrier_wait(q_full.at[slot(n)])
          s = mosaic.matmul(k_tile, q.T)
          plgpu.barrier_wait(do_full.at[slot(n)])
          dp = mosaic.matmul(v_tile, do.T)
          prob, slope = probabilities(s)
          ds = score_gradient(prob, slope, dp).astype(dtype)
          ds_pair[rows] = ds
          dv = mosaic.add_matmul(dv, prob.astype(dtype), do, interpret=True)
          plgpu.barrier_arrive(do_empty.at[slot(n)])
          plgpu.barrier_arrive(met)
          plgpu.barrier_wait(met)
          dq = mosaic.matmul(half_of_ds(ds_pair).T, half_of_k)
          dk = mosaic.add_matmul(dk, ds, q, interpret=True)
          plgpu.barrier_arrive(q_empty.at[slot(n)])
          put_dq(dq)
          return dk, dv

        def products(refs):
          s_ref, dp_ref, dq_ref, dk_ref, dv_ref = refs
          plgpu.barrier_wait(q_full.at[slot(n)])
          plgpu.wgmma(s_ref, k_tile, q.T)
          plgpu.barrier_wait(do_full.at[slot(n)])
          plgpu.wgmma(dp_ref, v_tile, do.T)
          prob, slope = probabilities(plgpu.wgmma_accumulator_load(s_ref, wait_n=1))
          if early:
            plgpu.wgmma(dv_ref, prob.astype(dtype), do)
          dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=1 if early else 0)
          ds = score_gradient(prob, slope, dp).astype(dtype)
          if not early:
            plgpu.wgmma(dv_ref, prob.astype(dtype), do)
          ds_pair.at[rows][...] = ds
          mosaic.meet(NUM_WGS)
          plgpu.wgmma(dq_ref, half_of_ds(ds_pair).T, half_of_k)
          plgpu.wgmma(dk_ref, ds, q)
          plgpu.wgmma_wait(2)
          plgpu.barrier_arrive(do_empty.at[slot(n)])
          put_dq(plgpu.wgmma_accumulator_load(dq_ref, wait_n=1))
          plgpu.wgmma_wait(0)
          plgpu.barrier_arrive(q_empty.at[slot(n)])

        zeros = mosaic.full((ROWS, block_q), 0.0)
        start = (zeros, zeros, mosaic.full(dq_shape, 0.0), dk, dv)
        *_, dk, dv = pl.run_state(products)(tuple(mosaic.ACC.init(x) for x in start))
        return dk, dv

      def some(masked, start, stop, carry):
        """Visits query tiles [start, stop), the last first."""
        step = lambda n, carry: visit(n, last - 1 - lax.div(n, jnp.int32(group)), carry, masked=masked)  # noqa: E731
        return lax.fori_loop(group * (last - stop), group * (last - start), step, carry)

      plgpu.barrier_wait(kv_full)
      carry = mosaic.full((ROWS, D), 0.0), mosaic.full((ROWS, Dv), 0.0)
      if left_masks:
        carry = some(True, whole_last, last, carry)
      if not p.has_segments:
        carry = some(False, whole_first, whole_last, carry)
      if right_masks:
        carry = some(True, first, whole_first, carry)
      dk, dv = carry
      pl.when(steps > 0)(lambda: plgpu.barrier_wait(dq_empty))
      if is_interpreted:
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
      else:
        mosaic.meet(NUM_WGS)  # the other warpgroup reads no more of this one's K
      k_tile[...] = (dk * p.scale).astype(dtype)
      v_tile[...] = dv.astype(dtype)
      plgpu.commit_smem()
      own = pl.ds(first_key + warpgroup * ROWS, ROWS)
      plgpu.copy_smem_to_gmem(k_tile, dk_gmem.at[batch, own, kv_head])
      plgpu.copy_smem_to_gmem(v_tile, dv_gmem.at[batch, own, kv_head])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == NUM_WGS)
    def transfer():
      plgpu.set_max_registers(24, action="decrease")

      def fetch():
        own = pl.ds(first_key, block_kv)
        plgpu.copy_gmem_to_smem(k_gmem.at[batch, own, kv_head], k_smem, kv_full)
        plgpu.copy_gmem_to_smem(v_gmem.at[batch, own, kv_head], v_smem, kv_full)

        @pl.loop(0, steps)
        def _(n):
          head, tile = head_and_tile(n)
          queries = pl.ds(tile * block_q, block_q)
          pl.when(n >= stages)(lambda: plgpu.barrier_wait(q_empty.at[slot(n)]))
          plgpu.copy_gmem_to_smem(q_gmem.at[batch, queries, head], q_smem.at[slot(n)], q_full.at[slot(n)])
          plgpu.copy_gmem_to_smem(lse_gmem.at[batch, head, queries], lse_smem.at[slot(n)], q_full.at[slot(n)])
          pl.when(n >= stages)(lambda: plgpu.barrier_wait(do_empty.at[slot(n)]))
          plgpu.copy_gmem_to_smem(do_gmem.at[batch, queries, head], do_smem.at[slot(n)], do_full.at[slot(n)])
          plgpu.copy_gmem_to_smem(delta_gmem.at[batch, head, queries], delta_smem.at[slot(n)], do_full.at[slot(n)])

        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(n):  # the interpreter wants every completion of a barrier observed
          plgpu.barrier_wait(q_empty.at[slot(n)])
          plgpu.barrier_wait(do_empty.at[slot(n)])

      def add():
        @pl.loop(0, steps)
        def _(n):
          head, tile = head_and_tile(n)
          queries = pl.ds(tile * block_q, block_q)
          if is_interpreted:  # it has no additions and no counters: one array for each KV tile
            plgpu.barrier_wait(dq_full)
            plgpu.copy_smem_to_gmem(dq_smem, dq_gmem.at[kv_tile, batch, head, queries])
          else:
            turn = turns.at[batch, head, pl.ds(tile, 1)]
            target = dq_gmem.at[batch, head, queries]
            pl.when(tile < last_before)(lambda: mosaic.wait_for(turn, kv_tile))
            plgpu.barrier_wait(dq_full)
            pl.when(tile < last_before)(lambda: plgpu.copy_smem_to_gmem(dq_smem, target, reduction_op="add"))
            pl.when(tile >= last_before)(lambda: plgpu.copy_smem_to_gmem(dq_smem, target))
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          plgpu.barrier_arrive(dq_empty)
          if not is_interpreted:
            plgpu.wait_smem_to_gmem(0)
            pl.when(tile < last_before)(lambda: mosaic.signal(turn, jnp.int32(1)))
            pl.when(tile >= last_before)(lambda: mosaic.signal(turn, kv_tile + 1))

        if is_interpreted:
          plgpu.wait_smem_to_gmem(0)

      @plgpu.warp_map
      def per_warp(warp):
        pl.when(warp == 0)(fetch)
        pl.when(warp == 1)(add)

  lse2, delta = _row_statistics(p, operands, out, lse, d_out, d_lse, padded)
  visits, visited = _visits(p, operands, block_q, block_kv)
  ids = _segment_ids(operands, block_q, block_kv)
  query, key, value, d_out = _prepared(p, operands, d_out)
  turns = None if is_interpreted else jax.new_ref(jnp.zeros((p.batch, H, query_tiles), jnp.int32))
  pair = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
  dq, dk, dv = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct(((kv_tiles,) if is_interpreted else ()) + (p.batch, H, padded, D), jnp.float32),
      jax.ShapeDtypeStruct(key.shape, dtype),
      jax.ShapeDtypeStruct(value.shape, dtype),
    ),
    grid=(heads * kv_tiles,),
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
      mosaic.smem((block_q, D), jnp.float32),
      plgpu.Barrier(num_arrivals=2),
      *(pair, pair, pair, pair),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(),
      plgpu.Barrier(num_arrivals=2) if is_interpreted else None,
    ),
    compiler_params=plgpu.CompilerParams(
      approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
    ),
    interpret=interpret,
  )(query, key, value, d_out, lse2, delta, operands.query_lens, operands.kv_lens, *ids, visits, turns)  # fmt: skip

  if is_interpreted:
    tile = jnp.arange(query_tiles)
    seen = (visits[:, :, 0, None] <= tile) & (tile < visits[:, :, 3, None])  # bool[B, KV tiles, query tiles]
    seen = jnp.repeat(seen.swapaxes(0, 1), block_q, axis=2)[:, :, None, :, None]
    dq = jnp.where(seen, dq, 0).sum(0)
  dq = jnp.where(jnp.repeat(visited, block_q, axis=1)[:, None, :, None], dq * p.scale, 0)
  d_sinks = None
  if operands.sinks is not None:
    weight = jnp.exp2(operands.sinks.astype(jnp.float32)[:, None] * LOG2_E - lse2)  # f32[B, H, padded T]
    d_sinks = -(weight * delta).sum((0, 2)).astype(operands.sinks.dtype)
  return FlashGradients(dq[:, :, :T].swapaxes(1, 2).astype(dtype), dk[:, :S], dv[:, :S], None, d_sinks)


def _row_statistics(problem, operands, out, lse, d_out, d_lse, padded):
  """The LSE in base 2 (infinite for rows that saw nothing) and delta, f32[B, H, padded T]."""
  dead = lse == -jnp.inf
  delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1).swapaxes(1, 2) - d_lse
  pad = ((0, 0), (0, 0), (0, padded - problem.query_len))
  lse2 = jnp.pad(jnp.where(dead, jnp.inf, lse * LOG2_E), pad, constant_values=jnp.inf)
  return lse2, jnp.pad(jnp.where(dead, 0.0, delta), pad)


def _prepared(problem: FlashProblem, operands: FlashOperands, d_out: jax.Array) -> tuple[jax.Array, ...]:
  """Query, key, value and d_out, zeros in their padding (it may hold NaN), 8 n rows because TMA wants whole tiles."""
  query, key, value = operands[:3]
  query_lens, kv_lens, _ = spans(problem, operands)

  def clean(x, lens, has_lens):
    if has_lens:
      x = jnp.where((jnp.arange(x.shape[1]) < lens[:, None])[..., None, None], x, 0)
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0)))

  query, d_out = (clean(x, query_lens, problem.has_query_lens) for x in (query, d_out))
  key, value = (clean(x, kv_lens, problem.has_kv_lens) for x in (key, value))
  return query, key, value, d_out


def _visits(problem: FlashProblem, operands: FlashOperands, block_q: int, block_kv: int):
  """Which query tiles each KV tile meets.

  Returns:
    (visits i32[B, KV tiles, 5], visited bool[B, query tiles]). The five: the first tile; the first and the end of those
    that need no mask; the end; the end of the KV tile before. Neither first nor end ever falls from one KV tile to the
    next, so some tiles may be met only to find everything masked. `visited` says which query tiles any KV tile meets.
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
  last = lax.cummax(jnp.where(meets, last, 0), axis=1)
  first = jnp.minimum(first, last)
  whole_first = (
    jnp.zeros_like(end) if right is None else cdiv(jnp.maximum(begin + block_kv - 1 - offsets - right, 0), block_q)
  )
  whole_last = last if left is None else jnp.maximum(begin - offsets + left + 1, 0) // block_q
  if problem.has_segments:
    whole_first = last
  whole_first = jnp.clip(jnp.where(end < begin + block_kv, last, whole_first), first, last)
  whole_last = jnp.clip(whole_last, whole_first, last)
  before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
  tile = jnp.arange(query_tiles)
  visited = ((first[..., None] <= tile) & (tile < last[..., None])).any(1)
  return jnp.stack([first, whole_first, whole_last, last, before], -1).astype(jnp.int32), visited


def _segment_ids(operands: FlashOperands, block_q: int, block_kv: int) -> tuple[Any, Any]:
  """Segment ids padded to whole tiles."""

  def padded(ids, block):
    return None if ids is None else jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)), mode="edge")

  return padded(operands.query_segments, block_q), padded(operands.kv_segments, block_kv)
