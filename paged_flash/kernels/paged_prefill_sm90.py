"""Paged attention of long query chunks on Hopper GPUs: chunked prefill, each sequence's queries at the end of its keys.

The query heads of a KV head share its keys, so the rows of a tile of queries are tokens times these heads, token by
token: no row is wasted whatever the number of heads, and little of a short chunk. A tile of queries of one KV head is
an item. What each sequence's items are follows from its own lengths only, so that its result is the same bit for bit
whoever shares the batch. Items are dealt to as many blocks as there are multiprocessors, about the longest first
(`Order`).

Compute warpgroups work as `forward_loop_sm90` says. Each warp of the producer warpgroup has a task of its own, and none
waits for another's:

  0     walks the page table and fetches pages by TMA, one copy for each page of a tile, item after item
  1, 2  copy queries, row by row, but for the first item; then write zeros for tokens that have no keys
  3     finds the block's items in the sequences' lengths, tells all others, and cleans values that are not an item's

Pages that an item does not see are never read: a page that it does see is read in their place and masked, its values
zeroed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_flash.kernels import items_sm90, mosaic
from paged_flash.kernels.forward_loop_sm90 import ROWS, Loop, Tiles, attend
from paged_flash.kernels.items_sm90 import Told
from paged_flash.kernels.mosaic import ROW, Rows, cdiv, divide
from paged_flash.kernels.paged_decode_sm90 import Line, max_tokens
from paged_flash.kernels.problem import PagedOperands, PagedProblem


class Order(Line):
  """The order of tiles of queries of the sequences with more than `few` query tokens, and keys.

  The sequence with the most KV tiles comes first, and of each its last tile, so that tiles come about the longest
  first. No array is sorted: a warp looks for the sequence with the most KV tiles of those with fewer than the last.
  """

  def __init__(
    self, problem: PagedProblem, few: int, block_q: int, block_kv: int, starts: Any, kv_lens: Any, *, interpret: bool
  ):
    self.problem, self.few, self.block_q, self.block_kv = problem, few, block_q, block_kv
    self.starts, self.kv_lens = starts, kv_lens
    super().__init__(problem.batch, self.key, interpret=interpret)

  def sequence(self, b: Any) -> tuple[Any, Any, Any]:
    """Its first token, its query tokens and its keys."""
    start = self.starts[b]
    return start, self.starts[b + 1] - start, self.kv_lens[b]

  def key(self, b: Any) -> Any:
    """Those with a greater one come first; no two have the same. 0 if there is nothing to do."""
    _, query_len, kv_len = self.sequence(b)
    is_mine = (query_len > self.few) & (kv_len > 0)
    return jnp.where(is_mine, cdiv(kv_len, self.block_kv) * self.batch + b, 0)

  def tiles(self, b: Any) -> Any:
    """Tiles of queries of a sequence."""
    _, query_len, _ = self.sequence(b)
    return cdiv(query_len * (self.problem.num_heads // self.problem.num_kv_heads), self.block_q)

  @jax.named_scope("count")
  def count(self) -> tuple[Any, Any]:
    """Sequences, and their tiles of queries."""

    def add(b, key, sequences, tiles):
      mine = jnp.where(key > 0, self.tiles(jnp.minimum(b, self.batch - 1)), 0)
      return sequences + jnp.where(key > 0, 1, 0), tiles + mine

    sequences, tiles = self._loop(add, jnp.int32(0), jnp.int32(0))
    return self._reduce("add", sequences), self._reduce("add", tiles)

  @jax.named_scope("next")
  def next(self, key: Any) -> tuple[Any, Any]:
    """(key, sequence) after that with a key."""
    key = self.longest_below(key)
    return key, lax.rem(key, jnp.int32(self.batch))

  def dead(self) -> Line:
    """The tokens of sequences of this kernel that have no keys and, as the last sequence, of none."""
    last = self.batch - 1

    def tokens(b):
      start, query_len, kv_len = self.sequence(jnp.minimum(b, last))
      is_dead = (query_len > self.few) & (kv_len <= 0)
      return jnp.where(b > last, self.problem.num_tokens - start - query_len, jnp.where(is_dead, query_len, 0))

    return Line(self.batch + 1, tokens, interpret=self.interpret)


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
  others: tuple[jax.Array, jax.Array] | None = None,
  *,
  num_wgs: int,
  block_kv: int,
  stages: int,
  query_stages: int = 1,
  num_blocks: int | None = None,
  interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
  """Attention of the sequences with more than `max_tokens` query tokens, or of all, and its LSE.

  Args:
    problem: What to compute; `paged_sm90.supports` must be "".
    operands: The arrays; `query_starts` is not None.
    others: Output [T, H, D] and LSE f32[T, H] of the sequences with fewer, consumed; None: it serves these too.
    num_wgs: Compute warpgroups of a block, 1 to 3, 64 rows each.
    block_kv: Keys of a tile, a multiple of 64; `page_size` divides it or is a multiple of it.
    stages: Tiles in the rings of K and V.
    query_stages: Tiles of queries in shared memory.
    num_blocks: Blocks that run at once, the number of multiprocessors by default.
    interpret: `plgpu.InterpretGPUParams` to run on a CPU.

  Returns:
    Output and LSE of all sequences; 0 and -inf for tokens of no sequence.
  """
  p = problem
  T, H, K, D, dtype = p.num_tokens, p.num_heads, p.num_kv_heads, p.head_dim, operands.query.dtype
  group, block_q = H // K, ROWS * num_wgs
  few = 0 if others is None else max_tokens(p)
  most_items = K * (T * group // block_q + min(p.batch, T // (few + 1)))
  num_blocks = max(1, min(num_blocks or mosaic.num_multiprocessors(), most_items))
  tile_pages = max(1, block_kv // p.page_size)
  is_interpreted = interpret is not None
  assert operands.query_starts is not None

  def kernel(
    q_gmem, k_gmem, v_gmem, pages, starts, kv_lens, sinks, out_gmem, lse_gmem,
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, telling,
  ):  # fmt: skip
    block, warpgroup = lax.axis_index("block"), lax.axis_index("wg")
    order = Order(p, few, block_q, block_kv, starts, kv_lens, interpret=is_interpreted)
    items = Told(telling, 7, interpret=is_interpreted)

    def item(told):
      _, sequence, head, first, first_token, query_len, kv_len = told
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

    def is_dirty(work, tile):
      """Whether some of its keys are not the item's."""
      is_dirty = work.kv_len < (tile + 1) * block_kv
      return is_dirty if p.window is None else is_dirty | (work.first_key > tile * block_kv)

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

      @jax.named_scope("write")
      def write(work, acc, row_max, row_sum):
        rows = rows_of(work, my_first(work), ROWS)
        heads = Rows(work.head * group, rows.count, group, 0, skip=rows.skip)
        sink = None if sinks is None else mosaic.load_rows(sinks, heads, interpret=is_interpreted)
        state = acc, row_max, mosaic.total(row_sum, interpret=is_interpreted)
        put(rows, *mosaic.finish(state, sink, loop.factor, interpret=is_interpreted))

      def put(rows, out, lse):
        mosaic.store_rows(lse_gmem, rows, lse, interpret=is_interpreted)
        mosaic.store_rows(out_gmem, rows, out.astype(dtype), interpret=is_interpreted)

      def put_first(work):
        """Four warps are faster than one, and nothing goes on before these queries are there."""
        rows, to = rows_of(work, my_first(work), ROWS), q_smem.at[0, pl.ds(warpgroup * ROWS, ROWS)]
        mosaic.copy_rows(q_gmem, rows, to, num_threads=128, interpret=is_interpreted)
        plgpu.commit_smem()

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
        put_first=put_first,
      )
      tiles = Tiles(q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty)
      attend(loop, tiles, warpgroup, items)

    def fetch():
      def one_item(_, told, done):
        work = item(told)
        n = work.high - work.low
        first_page, last_page = (lax.div(x, jnp.int32(p.page_size)) for x in (work.first_key, work.kv_len - 1))

        def look_up(i):
          """The page of each part of the item's tile i: each in a lane of its own, or all in the interpreter."""
          page = lax.div((work.high - 1 - i) * block_kv, jnp.int32(p.page_size))
          lanes = range(tile_pages) if is_interpreted or tile_pages == 1 else [lax.rem(mosaic.thread(), jnp.int32(32))]
          return tuple(pages[work.sequence, jnp.clip(page + lane, first_page, last_page)] for lane in lanes)

        @jax.named_scope("fetch")
        def fetch_tile(i, ids):
          tile, slot = work.high - 1 - i, lax.rem(done + i, jnp.int32(stages))
          later = look_up(jnp.minimum(i + 1, n - 1))  # they arrive while this tile waits for its place
          if len(ids) < tile_pages:
            ids = [mosaic.of_lane(ids[0], lane) for lane in range(tile_pages)]
          keys = pl.ds(lax.rem(tile * block_kv, jnp.int32(p.page_size)), min(block_kv, p.page_size))
          v_landed = slot + jnp.where(is_dirty(work, tile), stages, 0)
          for gmem, smem, full, empty in (
            (k_gmem, k_smem, k_full.at[slot], k_empty.at[slot]),
            (v_gmem, v_smem, v_full.at[v_landed], v_empty.at[slot]),
          ):
            pl.when(done + i >= stages)(lambda empty=empty: plgpu.barrier_wait(empty))
            for m, page_id in enumerate(ids):
              to = smem.at[slot, pl.ds(m * p.page_size, p.page_size)] if tile_pages > 1 else smem.at[slot]
              plgpu.copy_gmem_to_smem(gmem.at[page_id, keys, work.head], to, full)
          return later

        lax.fori_loop(0, n, fetch_tile, look_up(jnp.int32(0)))
        return done + n

      done = items.over(one_item, jnp.int32(0))

      @pl.loop(jnp.maximum(done - stages, 0), done)
      def _(i):  # the interpreter wants every completion of a barrier observed
        plgpu.barrier_wait(k_empty.at[lax.rem(i, jnp.int32(stages))])
        plgpu.barrier_wait(v_empty.at[lax.rem(i, jnp.int32(stages))])

    def copy_queries(part):
      """Copies half of the rows of all items but the first."""
      rows = block_q // 2

      def one_item(n, told, done):
        work, slot = item(told), lax.rem(n, jnp.int32(query_stages))
        pl.when(n >= query_stages)(lambda: plgpu.barrier_wait(q_empty.at[slot]))
        mine, to = rows_of(work, work.first + part * rows, rows), q_smem.at[slot, pl.ds(part * rows, rows)]
        pl.when(n > 0)(lambda: mosaic.copy_rows(q_gmem, mine, to, num_threads=32, interpret=is_interpreted))
        plgpu.barrier_arrive(q_full.at[slot])
        return done + 1

      done = items.over(one_item, jnp.int32(0))
      write_nothing(2 * (num_blocks - 1 - block) + part, 2 * num_blocks)

      @pl.loop(jnp.maximum(done - query_stages, 0), done)
      def _(n):
        plgpu.barrier_wait(q_empty.at[lax.rem(n, jnp.int32(query_stages))])

    def write_nothing(part, parts):
      """0 and -inf for one of so many parts of the tokens of sequences without keys, and of no sequence."""
      dead = order.dead()
      count, _ = dead.measure()
      share = cdiv(count, parts)
      low, high = part * share, jnp.minimum((part + 1) * share, count)

      @pl.when(low < high)
      def _():
        (b_low, place), (b_high, _) = dead.find(low, high - 1)

        def of_sequence(b, place):
          length = dead.length(b)
          first, past = jnp.maximum(low - place, 0), jnp.minimum(high - place, length)

          @pl.when(first < past)
          def _():
            row, count = (starts[b] + first) * H, (past - first) * H
            mosaic.fill_rows(out_gmem, row, count, 0.0, interpret=is_interpreted)
            mosaic.fill_rows(lse_gmem, row, count, float("-inf"), interpret=is_interpreted)

          return place + length

        lax.fori_loop(b_low, b_high + 1, of_sequence, place)

    def lead():
      def clean(work, done, i):
        """Clears values that are not the item's: they may be NaN, and 0 * NaN is NaN."""
        slot, tile = lax.rem(done + i, jnp.int32(stages)), work.high - 1 - i

        @pl.when(is_dirty(work, tile))
        def _():
          plgpu.barrier_wait(v_full.at[slot + stages])
          before = None if p.window is None else work.first_key - tile * block_kv
          past = work.kv_len - tile * block_kv
          mosaic.zero_rows(v_smem.at[slot], past, before, threads=32, interpret=is_interpreted)
          mosaic.publish(interpret=is_interpreted)
          for _ in range(tile_pages):
            plgpu.barrier_arrive(v_full.at[slot])

      @jax.named_scope("clean")
      def clean_item(told, done):
        """Returns the KV tiles up to its end."""

        def clean_ends():
          work = item(told)
          count = work.high - work.low
          clean(work, done, 0)
          if p.window is not None:
            pl.when(count > 1)(lambda: clean(work, done, count - 1))
          return done + count

        return lax.cond(items.is_one(told), clean_ends, lambda: done)

      def of_sequence(_, carry):
        key, before, told, done = carry
        key, b = order.next(key)
        tiles, sequence = order.tiles(b), order.sequence(b)

        def one_item(n, carry):
          last, done = carry
          tile, head = divide(at(n) - before * K, K)
          told = count - n, b, head, (tiles - 1 - tile) * block_q, *sequence
          items.tell(n, told)
          # Only then: it waits for values, and all know of this item meanwhile.
          return told, clean_item(last, done)

        first, past = (mosaic.dealt(x * K, block, num_blocks)[0] for x in (before, before + tiles))
        told, done = lax.fori_loop(first, past, one_item, (told, done))
        return key, before + tiles, told, done

      sequences, tiles = order.count()
      count, at = mosaic.dealt(tiles * K, block, num_blocks)
      nothing = (jnp.int32(0),) * items.count
      start = jnp.int32(2**31 - 1), jnp.int32(0), nothing, jnp.int32(0)
      _, _, told, done = lax.fori_loop(0, sequences, of_sequence, start)
      items.tell(count, nothing)
      clean_item(told, done)
      items.drain(count + 1)

    @pl.when(warpgroup < num_wgs)
    def _():
      plgpu.set_max_registers(160 if num_wgs == 3 else 232, action="increase")
      compute()

    @pl.when(warpgroup == num_wgs)
    def _():
      plgpu.set_max_registers(32 if num_wgs == 3 else 40, action="decrease")

      @plgpu.warp_map
      def _(warp):
        pl.when(warp == 0)(fetch)
        pl.when((warp == 1) | (warp == 2))(lambda: copy_queries(warp - 1))
        pl.when(warp == 3)(lead)

  full, empty = plgpu.Barrier, plgpu.Barrier(num_arrivals=num_wgs, num_barriers=stages)
  sinks = None if operands.sinks is None else operands.sinks.astype(jnp.float32)
  new = (jax.ShapeDtypeStruct((T * H, D), dtype), jax.ShapeDtypeStruct((T * H,), jnp.float32))
  written = () if others is None else tuple(jax.new_ref(x.reshape(y.shape)) for x, y in zip(others, new, strict=True))
  out = plgpu.kernel(
    kernel,
    out_type=() if others else new,
    grid=(num_blocks,),
    grid_names=("block",),
    num_threads=num_wgs + 1,
    thread_name="wg",
    scratch_types=(
      mosaic.smem((query_stages, block_q, D), dtype),
      *(mosaic.smem((stages, block_kv, D), dtype) for _ in range(2)),
      full(num_arrivals=2, num_barriers=query_stages),
      full(num_arrivals=num_wgs, num_barriers=query_stages),
      *(full(num_arrivals=tile_pages, num_barriers=stages), empty),
      *(full(num_arrivals=tile_pages, num_barriers=2 * stages), empty),  # [stages:]: landed, and to be cleaned
      items_sm90.told_scratch(num_wgs + 3),
    ),
    compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    interpret=interpret,
  )(
    *(operands.query.reshape(T * H, D), operands.k_pages, operands.v_pages, operands.pages),
    *(operands.query_starts, operands.kv_lens, sinks, *written),
  )
  out, lse = map(jax.freeze, written) if written else out
  return out.reshape(T, H, D), lse.reshape(T, H)
