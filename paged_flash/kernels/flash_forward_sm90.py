"""The forward pass of flash attention for Hopper GPUs, one Pallas Mosaic GPU kernel.

One block computes tiles of `num_wgs * 64` queries of one head, 64 rows for each compute warpgroup, which all work as
`forward_loop_sm90` says; one more warpgroup fetches K and V by TMA into two rings of `stages` tiles.

Each row sees one interval of keys: causality, windows and lengths give its ends by arithmetic; segments are compared
inside it. Tiles that no row of a block sees are not visited. A block stays on its multiprocessor and works through
query tiles, a few heads at a time so that K and V stay in the L2 cache. With static lengths its list is made when
tracing (`make_schedule`), and blocks in clusters of two take neighbouring queries and each fetch half of every K and V
tile for both. Otherwise blocks claim the next tile when they are free (`items_sm90`), the heaviest of a few heads
first; those past the end of their sequence are dealt apart, and written by a warp that has nothing else to do.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_flash.kernels import items_sm90, mosaic
from paged_flash.kernels.forward_loop_sm90 import ROWS, Loop, Tiles, attend, query_in_registers
from paged_flash.kernels.items_sm90 import Claims, Listed
from paged_flash.kernels.mosaic import COLUMN, LN_2, LOG2_E, ROW, across, cdiv, divide, down
from paged_flash.kernels.problem import FlashOperands, FlashProblem

ITEM_COST = 1.5  # of a tile of queries besides its KV tiles, in KV tiles
MOST_ITEMS = 2**16  # of a list made when tracing
ZERO_ROWS = 16  # written at once where queries are past the end of their sequence
_L2_BYTES = 20 * 2**20  # of 50 on an H100 or H200, for K and V


class Positions:
  """Which keys a row sees, by arithmetic: key j is visible to query i iff low(i) <= j < high(i).

  All methods take scalars or arrays of query indices of sequence `batch`. Lengths are Python integers where the
  arrays' sizes say them, so what is known when tracing costs nothing.
  """

  def __init__(self, problem: FlashProblem, query_lens: Any, kv_lens: Any, batch: Any):
    is_self = problem.query_len == problem.kv_len and problem.has_query_lens != problem.has_kv_lens
    self.query_len = query_lens[batch] if problem.has_query_lens else problem.query_len
    self.kv_len = kv_lens[batch] if problem.has_kv_lens else problem.kv_len
    self.offset = 0 if is_self else self.kv_len - self.query_len
    left, right = problem.window or (None, None)
    self.left = left
    self.right = (0 if right is None else min(0, right)) if problem.is_causal else right

  def high(self, i: Any) -> Any:
    xp = np if isinstance(i, np.ndarray) else jnp
    return self.kv_len if self.right is None else xp.minimum(self.kv_len, i + (self.offset + self.right + 1))

  def low(self, i: Any) -> Any:
    xp = np if isinstance(i, np.ndarray) else jnp
    return 0 if self.left is None else xp.maximum(0, i + (self.offset - self.left))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
  """The order of items, an item being a tile of queries of one head: a group of heads at a time."""

  query_tiles: int  # of a head
  group_heads: int  # query heads whose K and V should stay in the L2 cache together
  is_heavy_first: bool  # tiles from the last to the first, all heads of the group for each; else head by head

  def place(self, index: Any) -> tuple[Any, Any]:
    """(batch * num_heads + head, tile) of an item; `index` may be traced or a numpy array."""
    group, rest = divide(index, self.query_tiles * self.group_heads)
    if self.is_heavy_first:
      tile, head = divide(rest, self.group_heads)
      tile = self.query_tiles - 1 - tile
    else:
      head, tile = divide(rest, self.query_tiles)
    return group * self.group_heads + head, tile


def kernel_order(problem: FlashProblem, rows: int) -> Order:
  """The kernel's order of items of `rows` queries."""
  p = problem
  return Order(
    query_tiles=cdiv(p.query_len, rows),
    group_heads=p.num_heads // p.num_kv_heads * _heads_together(p),
    is_heavy_first=p.is_causal or not p.is_static,
  )


class _Item(NamedTuple):
  """What a block computes at once: some queries of one head, and the KV tiles [low, high) they see, one at least.

  Tiles outside [whole_low, whole_high) may hold other segments' keys.
  """

  batch: Any
  head: Any
  first: Any
  low: Any
  high: Any
  whole_low: Any
  whole_high: Any
  positions: Positions


def forward(
  problem: FlashProblem,
  operands: FlashOperands,
  *,
  num_wgs: int,
  block_kv: int,
  stages: int,
  query_stages: int = 1,
  cluster: int = 1,
  num_blocks: int = 132,
  interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
  """Attention and its LSE.

  Args:
    problem: What to compute; `flash_sm90.supports` must be "".
    operands: The arrays.
    num_wgs: Compute warpgroups of a block, 1 to 3, 64 queries each.
    block_kv: Keys of a tile, a multiple of 64.
    stages: K and V tiles in flight.
    query_stages: Tiles of queries in shared memory.
    cluster: Blocks that take neighbouring queries and share what they fetch, 1 or 2; without static lengths 1.
    num_blocks: Blocks that run at once, the number of multiprocessors.
    interpret: `plgpu.InterpretGPUParams` to run on a CPU.

  Returns:
    (out [B, T, H, Dv], lse f32[B, H, T], natural log).
  """
  p = problem
  T, S, H, D, Dv, dtype = p.query_len, p.kv_len, p.num_heads, p.head_dim, p.value_dim, operands.query.dtype
  block_q, group = ROWS * num_wgs, H // p.num_kv_heads
  cluster = cluster if p.is_static else 1
  rows_together = block_q * cluster
  query_tiles = cdiv(T, rows_together)
  items = query_tiles * p.batch * H
  order = kernel_order(p, rows_together)
  workers = min(num_blocks // cluster, items)
  schedule = live = None
  if cluster == 2 or (p.is_static and items <= MOST_ITEMS):
    schedule = make_schedule(p, order, rows_together, block_kv, workers)
  elif operands.query_lens is not None:
    live = _live_first(p, order, rows_together, operands.query_lens)
  slices = 1 if Dv <= 128 else 2 if live is None or Dv <= 192 else 4  # what shared memory holds
  out_columns = Dv // slices
  right_masks = p.is_causal or p.window is not None or p.has_kv_lens or S % block_kv != 0
  left_masks = p.window is not None and p.window[0] is not None
  is_interpreted = interpret is not None
  pair = None if cluster == 1 else "pair"

  def row_iota():
    return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)

  def kernel(
    table, live, q_gmem, k_gmem, v_gmem, query_lens, kv_lens, query_ids, kv_ids, bounds, sinks, counter,
    out_gmem, lse_gmem, *scratch,
  ):  # fmt: skip
    (
      q_smem, k_smem, v_smem, o_smem, lse_smem,
      q_full, q_empty, k_full, k_empty, v_full, v_empty, claiming, nothing,
    ) = scratch  # fmt: skip
    block, warpgroup = lax.axis_index("block"), lax.axis_index("wg")
    ids_smem = claiming[0] if p.has_segments else None  # segment ids, a row for each slot of the ring of K
    num_live = jnp.int32(items) if live is None else live[1][0]
    if table is not None:
      mine = Listed(count=table[block, 0], at=lambda step: table[block, 1 + step])
    else:
      mine = Claims(counter, claiming, num_live, block, workers, interpret=is_interpreted)

    @jax.named_scope("item")
    def item(index):
      bh, tile = order.place(index if live is None else live[0][index])
      batch, first = lax.div(bh, jnp.int32(H)), tile * rows_together
      positions = Positions(p, query_lens, kv_lens, batch)
      last = jnp.minimum(first + rows_together, positions.query_len) - 1
      low = positions.low(first) // block_kv
      high = cdiv(jnp.maximum(positions.high(last), 1), block_kv)
      whole_low, whole_high = 0, high
      if p.has_segments:
        low, high = jnp.maximum(low, bounds[batch, tile, 0]), jnp.minimum(high, bounds[batch, tile, 1])
        whole_low, whole_high = bounds[batch, tile, 2], bounds[batch, tile, 3]
      high = jnp.clip(high, 1, cdiv(S, block_kv))
      if cluster > 1:
        first = first + lax.axis_index("pair") * block_q
      low = jnp.minimum(low, high - 1)
      return _Item(batch, lax.rem(bh, jnp.int32(H)), first, low, high, whole_low, whole_high, positions)

    @pl.when(warpgroup < num_wgs)
    def compute():
      plgpu.set_max_registers(160 if num_wgs == 3 else 240, action="increase")
      o_tile, lse_tile = o_smem.at[warpgroup], lse_smem.at[warpgroup]

      def cut(work, column, k, s):
        row = work.first + warpgroup * ROWS
        rows = row + row_iota() if p.is_causal or p.window is not None else None
        low = work.positions.low(rows) - column if left_masks else None
        high = work.positions.high(rows) - column if right_masks else None
        s = mosaic.keep(s, low, high, interpret=is_interpreted)
        if ids_smem is not None:
          row_ids = plgpu.load(query_ids.at[work.batch, pl.ds(row, ROWS)], layout=ROW, optimized=False)
          ids = plgpu.load(ids_smem.at[k], layout=COLUMN, optimized=False)
          s = jnp.where(across(row_ids, s) == down(ids, s), s, -jnp.inf)
        return s

      def ends(work):
        row, n = work.first + warpgroup * ROWS, work.high - work.low
        begin, end = 1, n
        if right_masks or p.has_segments:
          whole = work.whole_high
          if right_masks:
            whole = jnp.minimum(whole, lax.div(work.positions.high(row), jnp.int32(block_kv)))
          begin = jnp.clip(work.high - whole, 1, n)
        if left_masks or p.has_segments:
          whole = work.whole_low
          if left_masks:
            whole = jnp.maximum(whole, cdiv(work.positions.low(row + ROWS - 1), block_kv))
          end = jnp.clip(work.high - whole, begin, n)
        return begin, end, n

      @jax.named_scope("write")
      def write(work, acc, row_max, row_sum):
        """O / row_sum and the LSE leave by TMA, O in slices of columns."""
        row = work.first + warpgroup * ROWS
        top, row_sum = row_max * loop.factor, mosaic.total(row_sum, interpret=is_interpreted)
        if p.has_sinks:
          sink = sinks[work.head].astype(jnp.float32) * LOG2_E
          both = jnp.maximum(jnp.maximum(top, sink), -1e30)  # finite where a row sees nothing and has no sink
          row_sum = row_sum * jnp.exp2(top - both) + jnp.exp2(sink - both)
          acc, top = acc * across(jnp.exp2(top - both), acc), both
        if p.has_query_lens:
          row_sum = jnp.where(row_iota() < work.positions.query_len - row, row_sum, 0.0)
        alive = row_sum > 0
        out = acc * across(jnp.where(alive, 1 / row_sum, 0.0), acc)
        if p.has_query_lens:
          out = jnp.where(across(alive, out), out, 0.0)
        rows = pl.ds(row, ROWS)
        for i, start in enumerate(range(0, Dv, out_columns)):
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what lay here has left
          o_tile[...] = out[:, start : start + out_columns].astype(dtype)
          if i == 0:
            lse_tile[...] = jnp.where(alive, (top + jnp.log2(row_sum)) * LN_2, -jnp.inf)
          plgpu.commit_smem()
          if i == 0:
            plgpu.copy_smem_to_gmem(lse_tile, lse_gmem.at[work.batch, work.head, rows], commit_group=False)
          plgpu.copy_smem_to_gmem(o_tile, out_gmem.at[work.batch, rows, work.head, pl.ds(start, out_columns)])

      loop = Loop(
        dtype=dtype,
        num_wgs=num_wgs,
        scale=p.scale,
        soft_cap=p.soft_cap,
        masks_right=right_masks,
        masks_left=left_masks,
        masks_inside=p.has_segments,
        interpret=is_interpreted,
        item=item,
        cut=cut,
        ends=ends,
        write=write,
      )
      tiles = Tiles(q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty)
      attend(loop, tiles, warpgroup, mine)
      plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == num_wgs)
    def fetch():
      plgpu.set_max_registers(32 if num_wgs == 3 else 24, action="decrease")
      if live is not None:
        mosaic.zero_rows(nothing, jnp.int32(0), interpret=is_interpreted)
        lse_smem[num_wgs] = mosaic.full((ROWS,), -jnp.inf, ROW)
        plgpu.commit_smem()

      def write_nothing(index):
        """Every so many of the tiles of queries past the end of their sequence, while an item is computed."""

        @pl.loop(num_live + index, items, step=num_live)
        def _(dead):
          work = item(dead)
          for row in range(0, block_q, ROWS):
            target = lse_gmem.at[work.batch, work.head, pl.ds(work.first + row, ROWS)]
            plgpu.copy_smem_to_gmem(lse_smem.at[num_wgs], target, commit_group=False)
          for row, start in itertools.product(range(0, block_q, ZERO_ROWS), range(0, Dv, out_columns)):
            rows, columns = pl.ds(work.first + row, ZERO_ROWS), pl.ds(start, out_columns)
            plgpu.copy_smem_to_gmem(nothing, out_gmem.at[work.batch, rows, work.head, columns])

      def one_item(step, index, claim, carry):
        work, done = item(index), carry[1]
        kv_head = lax.div(work.head, jnp.int32(group))

        def fetch_tile(gmem, ring, full, empty, i, other: Any = 0):
          """`other`: how far after its own barrier the one is that says it landed."""
          slot = lax.rem(done + i, jnp.int32(stages))
          pl.when(done + i >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
          keys = pl.ds((work.high - 1 - i) * block_kv, block_kv)
          plgpu.copy_gmem_to_smem(
            gmem.at[work.batch, keys, kv_head], ring.at[slot], full.at[slot + other], collective_axes=pair
          )
          if ids_smem is not None and ring is k_smem:
            plgpu.copy_gmem_to_smem(kv_ids.at[work.batch, keys], ids_smem.at[slot], full.at[slot])

        def fetch_queries():
          slot = lax.rem(step, jnp.int32(query_stages))
          pl.when(step >= query_stages)(lambda: plgpu.barrier_wait(q_empty.at[slot]))
          queries = pl.ds(work.first, block_q)
          plgpu.copy_gmem_to_smem(q_gmem.at[work.batch, queries, work.head], q_smem.at[slot], q_full.at[slot])

        # What lies past the end may be NaN, and 0 * NaN is NaN.
        past_end = work.positions.kv_len - (work.high - 1) * block_kv
        is_dirty = past_end < block_kv if p.has_kv_lens else False

        @mosaic.one_warp
        def first_tiles():
          have_room = query_in_registers(num_wgs, D, interpret=is_interpreted)  # before the last item's end
          if have_room:
            fetch_queries()
          fetch_tile(k_gmem, k_smem, k_full, k_empty, 0)
          if not have_room:
            fetch_queries()
          fetch_tile(v_gmem, v_smem, v_full, v_empty, 0, jnp.where(is_dirty, stages, 0) if p.has_kv_lens else 0)

        if p.has_kv_lens:

          @pl.when(is_dirty)
          def clean():
            slot = lax.rem(done, jnp.int32(stages))
            plgpu.barrier_wait(v_full.at[slot + stages])
            mosaic.zero_rows(v_smem.at[slot], jnp.maximum(past_end, 0), interpret=is_interpreted)
            plgpu.commit_smem()
            plgpu.barrier_arrive(v_full.at[slot])

        @plgpu.warp_map
        def other_tiles(warp):
          @pl.when(warp == 0)
          def _():
            n = work.high - work.low

            def claim_next():
              """Early enough for the next to be known when the last tile is on its way."""
              claim()

            @pl.loop(1, n)
            def _(i):
              pl.when(i == jnp.maximum(n - 2, 1))(claim_next)
              fetch_tile(k_gmem, k_smem, k_full, k_empty, i)
              fetch_tile(v_gmem, v_smem, v_full, v_empty, i)

            pl.when(n == 1)(claim_next)

          if live is not None:
            pl.when(warp == 1)(lambda: write_nothing(index))

        return step + 1, done + work.high - work.low

      steps, done = mine.lead(one_item, (jnp.int32(0), jnp.int32(0)))

      @mosaic.one_warp
      def drain():  # the interpreter wants every completion of a barrier observed
        @pl.loop(jnp.maximum(steps - query_stages, 0), steps)
        def _(i):
          plgpu.barrier_wait(q_empty.at[lax.rem(i, jnp.int32(query_stages))])

        @pl.loop(jnp.maximum(done - stages, 0), done)
        def _(i):
          plgpu.barrier_wait(k_empty.at[lax.rem(i, jnp.int32(stages))])
          plgpu.barrier_wait(v_empty.at[lax.rem(i, jnp.int32(stages))])

      if live is not None:
        plgpu.warp_map(lambda warp: pl.when(warp == 1)(lambda: plgpu.wait_smem_to_gmem(0)))

  query, key, value = (mosaic.whole_groups(x) for x in operands[:3])
  # A copy of plain values is not cut at the end of its axis as one of tiles is: whole tiles of rows.
  lse_rows = query_tiles * rows_together
  ring = plgpu.Barrier(num_barriers=stages)
  k_ring = plgpu.Barrier(num_arrivals=2, num_barriers=stages) if p.has_segments else ring  # ids of its tokens too
  v_ring = plgpu.Barrier(num_barriers=2 * stages) if p.has_kv_lens else ring  # [stages:]: landed, and to be cleaned
  ring_empty = plgpu.Barrier(num_arrivals=num_wgs, num_barriers=stages)
  if cluster > 1:
    ring_empty = plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=num_wgs, num_barriers=stages)
  ids_of_keys = (stages, block_kv) if p.has_segments else (0, items_sm90.AHEAD)
  call = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((*query.shape[:3], Dv), dtype),
      jax.ShapeDtypeStruct((p.batch, H, lse_rows), jnp.float32),
    ),
    grid=(workers,),
    grid_names=("block",),
    cluster=() if cluster == 1 else (cluster,),
    cluster_names=() if cluster == 1 else ("pair",),
    num_threads=num_wgs + 1,
    thread_name="wg",
    scratch_types=(
      mosaic.smem((query_stages, block_q, D), dtype),
      mosaic.smem((stages, block_kv, D), dtype),
      mosaic.smem((stages, block_kv, Dv), dtype),
      mosaic.smem((num_wgs, ROWS, out_columns), dtype),
      plgpu.SMEM((num_wgs + 1, ROWS), jnp.float32),  # the LSE; the last row is that of rows that see nothing
      plgpu.Barrier(num_barriers=query_stages),
      plgpu.Barrier(num_arrivals=num_wgs, num_barriers=query_stages),
      *(k_ring, ring_empty, v_ring, ring_empty),
      items_sm90.scratch(num_wgs + 1, ids_of_keys) if schedule is None else None,
      None if live is None else mosaic.smem((ZERO_ROWS, out_columns), dtype),
    ),
    compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    interpret=interpret,
  )
  table = None if schedule is None else jnp.asarray(schedule)
  lens, segments = (operands.query_lens, operands.kv_lens), _segments(p, operands, rows_together, block_kv)

  def run(*arrays):
    counter = None if schedule is not None or is_interpreted else jax.new_ref(jnp.full((1,), workers, jnp.int32))
    return call(*arrays, counter)

  out, lse = mosaic.untyped(run, table, live, query, key, value, *lens, *segments, operands.sinks)
  return out[:, :T], lse[..., :T]


def _live_first(problem: FlashProblem, order: Order, rows: int, query_lens: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Items (i32[n]) in their order, those of `rows` queries past the end of their sequence last; i32[1], the others.

  The first is always one of the others.
  """
  index = np.arange(order.query_tiles * problem.batch * problem.num_heads)
  head, tile = order.place(index)
  live = (tile * rows < query_lens[head // problem.num_heads]) | (index == 0)
  count = jnp.cumsum(live, dtype=jnp.int32)
  place = jnp.where(live, count - 1, count[-1] + index - count)
  return jnp.zeros(index.size, jnp.int32).at[place].set(index, unique_indices=True), count[-1:]


def _heads_together(problem: FlashProblem) -> int:
  """How many KV heads blocks work on at a time, a divisor of all: what they read again should still be in the L2 cache.

  16 query heads leave eight or so of an H200's blocks to each, which share what one of them fetches; more only as far
  as their K and V fit the cache.
  """
  heads = problem.batch * problem.num_kv_heads
  fit = _L2_BYTES // (2 * problem.kv_len * (problem.head_dim + problem.value_dim))
  most = max(16 * problem.num_kv_heads // problem.num_heads, fit, 1)
  return max(n for n in range(1, min(heads, most) + 1) if heads % n == 0)


@functools.lru_cache(256)
def make_schedule(problem: FlashProblem, order: Order, block_q: int, block_kv: int, num_blocks: int) -> np.ndarray:
  """i32[blocks, 1 + n]: how many items each block has, and which: the next item always to the block that is free first.

  What the hardware would do with a block for each item; but blocks that stay can overlap the end of an item with the
  beginning of the next. An item costs its KV tiles and what its own beginning and end take.
  """
  _, tile = order.place(np.arange(order.query_tiles * problem.batch * problem.num_heads))
  return mosaic.deal(kv_tiles(problem, block_q, block_kv)[tile] + ITEM_COST, num_blocks)


def kv_tiles(problem: FlashProblem, block_q: int, block_kv: int) -> np.ndarray:
  """i32[query tiles]: how many KV tiles each tile of queries visits, for static lengths."""
  starts = np.arange(0, problem.query_len, block_q)
  positions = Positions(problem, None, None, None)
  high = np.asarray(positions.high(np.minimum(starts + block_q, problem.query_len) - 1))
  low = np.asarray(positions.low(starts))
  return np.maximum(-(-np.maximum(high, 1) // block_kv) - low // block_kv, 1) + np.zeros_like(starts)


def _segments(problem: FlashProblem, operands: FlashOperands, block_q: int, block_kv: int) -> tuple[Any, Any, Any]:
  """Segment ids padded to whole tiles, and i32[B, query tiles, 4] for each query tile.

  The four: the KV tiles [low, high) that may hold ids of the query tile, and [low, high) of those that hold, as the
  query tile does, one id only and the same; if these are no interval, none.
  """
  if not problem.has_segments:
    return None, None, None
  query_ids, kv_ids = operands.query_segments, operands.kv_segments
  assert query_ids is not None and kv_ids is not None

  def tiles(ids, block):
    ids = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)), mode="edge")
    grouped = ids.reshape(ids.shape[0], -1, block)
    return ids, grouped.min(-1), grouped.max(-1)

  query_ids, query_min, query_max = tiles(query_ids, block_q)
  kv_ids, kv_min, kv_max = tiles(kv_ids, block_kv)
  query_min, query_max, kv_min, kv_max = query_min[:, :, None], query_max[:, :, None], kv_min[:, None], kv_max[:, None]
  num_tiles = kv_min.shape[-1]
  index = jnp.arange(num_tiles)

  def ends(chosen):
    return jnp.where(chosen, index, num_tiles).min(-1), jnp.where(chosen, index + 1, 0).max(-1)

  low, high = ends((query_min <= kv_max) & (kv_min <= query_max))
  whole = (query_min == kv_max) & (kv_min == query_max)  # both hold one id, for min <= max
  whole_low, whole_high = ends(whole)
  is_interval = whole.sum(-1) == whole_high - whole_low
  whole_high = jnp.where(is_interval, whole_high, 0)
  return query_ids, kv_ids, jnp.stack([low, high, whole_low, whole_high], -1).astype(jnp.int32)
