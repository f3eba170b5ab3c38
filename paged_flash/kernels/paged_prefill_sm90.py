"""Paged attention of long query chunks on Hopper GPUs: chunked prefill, each sequence's queries at the end of its keys.

The query heads of a KV head share its keys, so the rows of a tile of queries are tokens times these heads, token by
token: no row is wasted whatever the number of heads, and little of a short chunk. A tile of queries of one KV head is
an item. What each sequence's items are follows from its own lengths only, so that its result is the same bit for bit
whoever shares the batch. Items are dealt to as many blocks as there are multiprocessors, the longest first (`work`).

Compute warpgroups work as `forward_loop_sm90` says. The producer warpgroup copies queries row by row, and one of its
warps walks the page table and fetches pages by TMA, one copy for each page of a tile. Pages that an item does not see
are never read: a page that it does see is read in their place and masked, its values zeroed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_flash.kernels import mosaic
from paged_flash.kernels.forward_loop_sm90 import ROWS, Loop, Tiles, attend
from paged_flash.kernels.items_sm90 import Listed
from paged_flash.kernels.mosaic import ROW, Rows, cdiv, divide
from paged_flash.kernels.paged_decode_sm90 import max_tokens
from paged_flash.kernels.problem import PagedOperands, PagedProblem


class Work(NamedTuple):
  """The tiles of queries of all sequences, the longest first; each is an item for every KV head."""

  tiles: jax.Array  # i32[n, 5]: sequence, first row in it, its first token, its query tokens, its keys
  counts: jax.Array  # i32[2]: tiles of sequences that have keys; of these and of those that give 0


def work(problem: PagedProblem, block_q: int, starts: jax.Array, kv_lens: jax.Array) -> Work:
  """The tiles of `block_q` rows of sequences with more than `max_tokens` query tokens, and of the padding."""
  p = problem
  group, few = p.num_heads // p.num_kv_heads, max_tokens(p)
  # What lies past the last sequence is one more, without keys.
  starts = jnp.append(starts, p.num_tokens).astype(jnp.int32)
  query_lens = jnp.diff(starts)
  kv_lens = jnp.append(kv_lens, 0).astype(jnp.int32)
  is_mine = (query_lens > few) | (jnp.arange(p.batch + 1) == p.batch)
  counts = jnp.where(is_mine, cdiv(query_lens * group, block_q), 0)
  last = jnp.cumsum(counts)
  index = jnp.arange(p.num_tokens * group // block_q + min(p.batch, p.num_tokens // (few + 1)) + 1)
  b = jnp.minimum(jnp.searchsorted(last, index, side="right", method="compare_all"), p.batch)
  row = (index - (last - counts)[b]) * block_q
  token = jnp.minimum((row + block_q) // group, query_lens[b])
  cost = jnp.where(kv_lens[b] > 0, jnp.maximum(kv_lens[b] - query_lens[b] + token, 1), 0)
  if p.window is not None:
    cost = jnp.minimum(cost, p.window + block_q)
  cost = jnp.where(index < last[-1], cost, -1)
  tiles = jnp.stack([b, row, starts[b], query_lens[b], kv_lens[b]], 1)
  return Work(tiles[jnp.argsort(-cost)].astype(jnp.int32), jnp.stack([(cost > 0).sum(), last[-1]]).astype(jnp.int32))


class _Item(NamedTuple):
  """A tile of queries of one KV head, and the KV tiles [low, high) that they see, one at least."""

  sequence: Any
  head: Any  # KV head
  first: Any  # row in the sequence
  first_token: Any  # of the sequence
  num_rows: Any  # of the sequence
  kv_len: Any
  offset: Any  # query i of the sequence stands at key i + offset
  first_key: Any  # that any row sees
  low: Any
  high: Any


def forward(
  problem: PagedProblem,
  operands: PagedOperands,
  out: jax.Array,
  lse: jax.Array,
  *,
  num_wgs: int,
  block_kv: int,
  stages: int,
  num_blocks: int | None = None,
  interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
  """Attention of the sequences with more than `max_tokens` query tokens, and its LSE.

  Args:
    problem: What to compute; `paged_sm90.supports` must be "".
    operands: The arrays; `query_starts` is not None.
    out: [T, H, D], consumed.
    lse: f32[T, H], consumed.
    num_wgs: Compute warpgroups of a block, 1 to 3, 64 rows each.
    block_kv: Keys of a tile, a multiple of 64; `page_size` divides it or is a multiple of it.
    stages: Tiles in the rings of K and V.
    num_blocks: Blocks that run at once, the number of multiprocessors by default.
    interpret: `plgpu.InterpretGPUParams` to run on a CPU.

  Returns:
    `out` and `lse` with these sequences' rows written, and 0 and -inf for tokens of no sequence.
  """
  p = problem
  T, H, K, D, dtype = p.num_tokens, p.num_heads, p.num_kv_heads, p.head_dim, operands.query.dtype
  group, block_q = H // K, ROWS * num_wgs
  num_blocks = num_blocks or mosaic.num_multiprocessors()
  tile_pages = max(1, block_kv // p.page_size)
  is_interpreted = interpret is not None
  assert operands.query_starts is not None

  def kernel(
    q_gmem, k_gmem, v_gmem, pages, work, counts, sinks, out_gmem, lse_gmem,
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
  ):  # fmt: skip
    block, warpgroup = lax.axis_index("block"), lax.axis_index("wg")
    items = counts[0] * K
    steps, at = mosaic.dealt(items, block, num_blocks)

    def item(index):
      tile, head = divide(index, K)
      sequence, first, first_token, query_len, kv_len = (work[tile, i] for i in range(5))
      num_rows, offset = query_len * group, kv_len - query_len
      last = lax.div(jnp.minimum(first + block_q, num_rows) - 1, jnp.int32(group))
      high = cdiv(jnp.maximum(last + (offset + 1), 1), block_kv)
      first_key, low = 0, 0
      if p.window is not None:
        first_key = jnp.maximum(lax.div(first, jnp.int32(group)) + (offset - p.window), 0)
        low = jnp.minimum(lax.div(first_key, jnp.int32(block_kv)), high - 1)
      return _Item(sequence, head, first, first_token, num_rows, kv_len, offset, first_key, low, high)

    def rows_of(work, first, count):
      """Where an item's rows from `first` lie among [T * H], `count` at most."""
      token, skip = divide(jnp.minimum(first, work.num_rows - 1), group)
      place = (work.first_token + token) * H + work.head * group
      return Rows(place, jnp.minimum(work.num_rows - first, count), group, H, skip=skip)

    def compute():
      def my_first(work):
        return work.first + warpgroup * ROWS

      def cut(work, column, _, s):
        token, skip = divide(my_first(work), group)
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
        token = token + (row if group == 1 else lax.div(row + skip, jnp.full_like(row, group)))
        high = jnp.minimum(token + (work.offset + 1), work.kv_len) - column
        low = None if p.window is None else token + (work.offset - p.window - column)
        return mosaic.keep(s, low, high, interpret=is_interpreted)

      def ends(work):
        n, row = work.high - work.low, my_first(work)
        whole = lax.div(lax.div(row, jnp.int32(group)) + (work.offset + 1), jnp.int32(block_kv))
        begin, end = jnp.clip(work.high - whole, 1, n), n
        if p.window is not None:
          low = lax.div(row + (ROWS - 1), jnp.int32(group)) + (work.offset - p.window)
          end = jnp.clip(work.high - cdiv(jnp.maximum(low, 0), block_kv), begin, n)
        return begin, end, n

      def write(work, acc, row_max, row_sum):
        rows = rows_of(work, my_first(work), ROWS)
        heads = Rows(work.head * group, rows.count, group, 0, skip=rows.skip)
        sink = None if sinks is None else mosaic.load_rows(sinks, heads, interpret=is_interpreted)
        state = acc, row_max, mosaic.total(row_sum, interpret=is_interpreted)
        put(rows, *mosaic.finish(state, sink, loop.factor, interpret=is_interpreted))

      def put(rows, out, lse):
        mosaic.store_rows(lse_gmem, rows, lse, interpret=is_interpreted)
        mosaic.store_rows(out_gmem, rows, out.astype(dtype), interpret=is_interpreted)

      loop = Loop(
        dtype=dtype,
        num_wgs=num_wgs,
        scale=p.scale,
        soft_cap=p.soft_cap,
        masks_right=True,
        masks_left=p.window is not None,
        masks_inside=False,
        interpret=is_interpreted,
        item=item,
        cut=cut,
        ends=ends,
        write=write,
      )
      tiles = Tiles(q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty)
      attend(loop, tiles, warpgroup, Listed(count=steps, at=at))

      @pl.loop(items + block, counts[1] * K, step=num_blocks)
      def _(index):  # no keys
        work = item(index)
        nothing = mosaic.full((ROWS, D), 0.0), mosaic.full((ROWS,), -jnp.inf, ROW)
        put(rows_of(work, my_first(work), ROWS), *nothing)

    def fetch():
      def one_item(step, done):
        work = item(at(step))
        n = work.high - work.low
        first_page, last_page = (lax.div(x, jnp.int32(p.page_size)) for x in (work.first_key, work.kv_len - 1))

        def is_dirty(tile):
          """Whether some of its keys are not the item's."""
          is_dirty = work.kv_len < (tile + 1) * block_kv
          return is_dirty if p.window is None else is_dirty | (work.first_key > tile * block_kv)

        def place(i):
          """Slot and tile."""
          return lax.rem(done + i, jnp.int32(stages)), work.high - 1 - i

        def fetch_tile(i):
          slot, tile = place(i)
          page = lax.div(tile * block_kv, jnp.int32(p.page_size))
          ids = [pages[work.sequence, jnp.clip(page + m, first_page, last_page)] for m in range(tile_pages)]
          keys = pl.ds(tile * block_kv - page * p.page_size, min(block_kv, p.page_size))
          v_landed = slot + jnp.where(is_dirty(tile), stages, 0)
          for gmem, smem, full, empty in (
            (k_gmem, k_smem, k_full.at[slot], k_empty.at[slot]),
            (v_gmem, v_smem, v_full.at[v_landed], v_empty.at[slot]),
          ):
            pl.when(done + i >= stages)(lambda empty=empty: plgpu.barrier_wait(empty))
            for m, page_id in enumerate(ids):
              to = smem.at[slot, pl.ds(m * p.page_size, p.page_size)] if tile_pages > 1 else smem.at[slot]
              plgpu.copy_gmem_to_smem(gmem.at[page_id, keys, work.head], to, full)

        def clean(i):
          """Clears values that are not the item's: they may be NaN, and 0 * NaN is NaN."""
          slot, tile = place(i)

          @pl.when(is_dirty(tile))
          def _():
            plgpu.barrier_wait(v_full.at[slot + stages])
            before = None if p.window is None else work.first_key - tile * block_kv
            mosaic.zero_rows(v_smem.at[slot], work.kv_len - tile * block_kv, before, interpret=is_interpreted)
            plgpu.commit_smem()
            for _ in range(tile_pages):
              plgpu.barrier_arrive(v_full.at[slot])

        mosaic.one_warp(lambda: fetch_tile(0))
        pl.when(step > 0)(lambda: plgpu.barrier_wait(q_empty.at[0]))
        mosaic.copy_rows(q_gmem, rows_of(work, work.first, block_q), q_smem.at[0], interpret=is_interpreted)
        plgpu.barrier_arrive(q_full.at[0])
        clean(0)
        others = n if p.window is None else n - 1
        mosaic.one_warp(lambda: pl.loop(1, others)(fetch_tile))
        if p.window is not None:

          @pl.when(n > 1)
          def _():
            mosaic.one_warp(lambda: fetch_tile(n - 1))
            clean(n - 1)

        return done + n

      done = lax.fori_loop(0, steps, one_item, jnp.int32(0))
      pl.when(steps > 0)(lambda: plgpu.barrier_wait(q_empty.at[0]))

      @mosaic.one_warp
      def drain():  # the interpreter wants every completion of a barrier observed
        @pl.loop(jnp.maximum(done - stages, 0), done)
        def _(i):
          plgpu.barrier_wait(k_empty.at[lax.rem(i, jnp.int32(stages))])
          plgpu.barrier_wait(v_empty.at[lax.rem(i, jnp.int32(stages))])

    @pl.when(warpgroup < num_wgs)
    def _():
      plgpu.set_max_registers(160 if num_wgs == 3 else 240, action="increase")
      compute()

    @pl.when(warpgroup == num_wgs)
    def _():
      plgpu.set_max_registers(32 if num_wgs == 3 else 24, action="decrease")
      fetch()

  full, empty = plgpu.Barrier, plgpu.Barrier(num_arrivals=num_wgs, num_barriers=stages)
  sinks = None if operands.sinks is None else operands.sinks.astype(jnp.float32)
  out_ref, lse_ref = jax.new_ref(out.reshape(T * H, D)), jax.new_ref(lse.reshape(T * H))
  plgpu.kernel(
    kernel,
    out_type=(),
    grid=(num_blocks,),
    grid_names=("block",),
    num_threads=num_wgs + 1,
    thread_name="wg",
    scratch_types=(
      mosaic.smem((1, block_q, D), dtype),
      *(mosaic.smem((stages, block_kv, D), dtype) for _ in range(2)),
      full(num_barriers=1),
      plgpu.Barrier(num_arrivals=num_wgs, num_barriers=1),
      *(full(num_arrivals=tile_pages, num_barriers=stages), empty),
      *(full(num_arrivals=tile_pages, num_barriers=2 * stages), empty),  # [stages:]: landed, and to be cleaned
    ),
    compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    interpret=interpret,
  )(
    *(operands.query.reshape(T * H, D), operands.k_pages, operands.v_pages, operands.pages),
    *work(p, block_q, operands.query_starts, operands.kv_lens),
    *(sinks, out_ref, lse_ref),
  )
  return jax.freeze(out_ref).reshape(T, H, D), jax.freeze(lse_ref).reshape(T, H)
