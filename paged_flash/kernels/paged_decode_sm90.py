"""Paged attention of a few query tokens per sequence on Hopper GPUs: reading K and V is all the work there is.

The keys of a sequence are cut into chunks (`Chunks`), by its own length only, so that its result is the same bit for
bit whoever shares the batch. One chunk of one KV head is an item. Each multiprocessor has two lanes: a warpgroup that
computes, and a warp that walks the page table and fetches pages by TMA, one copy for each page and KV head, into a ring
of tiles of its own. A lane takes every n-th item, and fetches ahead of computing across items: reading never stops.

  a lane computes, tile by tile of a chunk (Dao et al. 2022, Algorithm 1, in the log2 domain):
    S = Q K^T, P = softmax(S), O += P V      the query heads of a KV head, for all query tokens, are the rows of Q

Only in shared memory are rows padded to the 64 of a wgmma. A sequence of one chunk is written as it is; of more, the
chunks' outputs and log-sum-exps go to memory in float32, and a second kernel merges them in order.

Bytes in flight on a multiprocessor: lanes x stages x tiles of K and V, 192 KiB at every head_dim, where a latency of
about 1 us at 4.8 TB/s asks for 36 KiB. In pages [page_size, K, D] a copy takes head_dim values of every token, rows of
128 bytes or more; neighbouring lanes take the neighbouring heads of the same tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_flash.kernels import mosaic
from paged_flash.kernels.mosaic import LN_2, LOG2_E, ROW, Rows, across, cdiv, divide
from paged_flash.kernels.problem import PagedOperands, PagedProblem

ROWS = 64  # of a tile of queries
CHUNK = 512  # tokens of a chunk, at least
ENOUGH_ITEMS = 256  # of one sequence: they occupy a GPU
SLICE = 32  # columns of O that a block of the second kernel merges
AT_ONCE = 8  # chunks that it reads at a time


class Chunks(NamedTuple):
  """How the tiles of a sequence are cut: `least` tiles to a chunk, doubled until there are at most `most` chunks."""

  least: int
  most: int
  max_tiles: int  # of any sequence

  def size(self, tiles: Any) -> Any:
    """Tiles of a chunk of a sequence of so many tiles."""
    size, least = self.least, self.least
    while least * self.most < self.max_tiles:
      size, least = jnp.where(tiles > least * self.most, 2 * least, size), 2 * least
    return size

  @property
  def max_count(self) -> int:
    return min(self.most, cdiv(self.max_tiles, self.least))


def make_chunks(problem: PagedProblem, block_kv: int) -> Chunks:
  p = problem
  visible = p.pages_per_slot * p.page_size
  max_tiles = cdiv(visible, block_kv)
  if p.window is not None:
    max_tiles = min(max_tiles, cdiv(p.window + p.max_query_len, block_kv) + 1)
  return Chunks(least=max(1, CHUNK // block_kv), most=max(1, ENOUGH_ITEMS // p.num_kv_heads), max_tiles=max_tiles)


def max_tokens(problem: PagedProblem) -> int:
  """The most query tokens that a sequence may have here: as many as their heads fit a tile."""
  return ROWS * problem.num_kv_heads // problem.num_heads


class Sequence(NamedTuple):
  """One sequence: its query tokens, which keys they see, and the tiles [low, high) and chunks of these keys."""

  first_token: Any
  query_len: Any
  kv_len: Any
  first_key: Any  # that any of them sees
  low: Any
  high: Any
  chunk: Any  # tiles
  count: Any  # chunks; 0 if it has nothing to do here


def sequence(problem: PagedProblem, chunks: Chunks, block_kv: int, starts: Any, kv_lens: Any, b: Any) -> Sequence:
  """Reads sequence b's lengths; `starts` is None where every sequence has one token."""
  p = problem
  first, query_len = (b, 1) if starts is None else (starts[b], starts[b + 1] - starts[b])
  kv_len = kv_lens[b]
  first_key = 0 if p.window is None else jnp.maximum(kv_len - query_len - p.window, 0)
  low, high = lax.div(first_key, jnp.int32(block_kv)) if p.window is not None else 0, cdiv(kv_len, block_kv)
  chunk = chunks.size(high - low)
  count = jnp.maximum(1 if chunks.max_count == 1 else lax.div(high - low + chunk - 1, jnp.int32(chunk)), 1)
  if starts is not None:
    count = jnp.where((query_len > 0) & (query_len <= max_tokens(p)), count, 0)
  return Sequence(first, query_len, kv_len, first_key, low, high, chunk, count)


def forward(
  problem: PagedProblem,
  operands: PagedOperands,
  *,
  lanes: int,
  block_kv: int,
  stages: int,
  num_blocks: int | None = None,
  interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
  """Attention of the sequences with at most `max_tokens` query tokens, and its LSE.

  Args:
    problem: What to compute; `paged_sm90.supports` must be "".
    operands: The arrays.
    lanes: Items that a multiprocessor works on at a time, 1 or 2.
    block_kv: Keys of a tile, a multiple of 64; `page_size` divides it or is a multiple of it.
    stages: Tiles in each lane's rings of K and V.
    num_blocks: Blocks that run at once, the number of multiprocessors by default.
    interpret: `plgpu.InterpretGPUParams` to run on a CPU.

  Returns:
    (out [T, H, D], lse f32[T, H]); rows of other tokens are not written.
  """
  p = problem
  T, H, K, D, dtype = p.num_tokens, p.num_heads, p.num_kv_heads, p.head_dim, operands.query.dtype
  group = H // K
  chunks = make_chunks(p, block_kv)
  max_rows = group * min(p.max_query_len, max_tokens(p))
  num_blocks = min(num_blocks or mosaic.num_multiprocessors(), p.batch * K * chunks.max_count)
  tile_pages = max(1, block_kv // p.page_size)
  is_interpreted = interpret is not None
  factor = LOG2_E * (p.scale if p.soft_cap is None else p.soft_cap)
  load = functools.partial(mosaic.load_rows, interpret=is_interpreted)
  store = functools.partial(mosaic.store_rows, interpret=is_interpreted)
  look = functools.partial(sequence, p, chunks, block_kv)

  def add_sinks(s, head, acc, top, row_sum, sinks):
    """One more score per row, without a value."""
    if sinks is None:
      return acc, top, row_sum
    sink = load(sinks, Rows(head * group, s.query_len * group, group, 0)) * LOG2_E
    sink = sink + jnp.where(s.kv_len > 0, 0.0, -jnp.inf)
    both = jnp.maximum(jnp.maximum(top, sink), -1e30)  # finite where a row sees nothing and has no sink
    scaled = jnp.exp2(top - both)
    return acc * across(scaled, acc), both, row_sum * scaled + jnp.exp2(sink - both)

  def normaliser(top, row_sum):
    """1 / row_sum and the LSE in the log2 domain; 0 and -inf for rows that have seen nothing."""
    alive = row_sum > 0
    return jnp.where(alive, 1 / row_sum, 0.0), jnp.where(alive, top + jnp.log2(row_sum), -jnp.inf)

  def write_rows(out_gmem, lse_gmem, rows, acc, top, row_sum):
    inverse, lse = normaliser(top, row_sum)
    store(lse_gmem, rows, lse * LN_2)
    store(out_gmem, rows, (acc * across(inverse, acc)).astype(dtype))

  def kernel(q_gmem, k_gmem, v_gmem, pages, kv_lens, starts, sinks, *refs):
    out_gmem, lse_gmem, *parts = refs[:-7]
    q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty = refs[-7:]
    block, warpgroup = lax.axis_index("block"), lax.axis_index("wg")

    def over_items(lane, body):
      """done = body(b, sequence b, chunk, head, done) for all items of a lane, done = 0 at first; the last done.

      Items are numbered sequence by sequence, chunk by chunk, head by head.
      """
      step = lanes * num_blocks

      def of_sequence(b, carry):
        index, done = carry  # of the lane's next item, among the sequence's
        s = look(starts, kv_lens, b)

        def one_item(n, done):
          chunk, head = divide(index + n * step, K)
          return body(b, s, chunk, head, done)

        count = cdiv(jnp.maximum(s.count * K - index, 0), step)
        return index + count * step - s.count * K, lax.fori_loop(0, count, one_item, done)

      return lax.fori_loop(0, p.batch, of_sequence, (lane * num_blocks + block, jnp.int32(0)))[1]

    def chunk_tiles(s, chunk):
      low = s.low + chunk * s.chunk
      return low, jnp.minimum(low + s.chunk, s.high)

    def fetch(lane):
      def one_item(b, s, chunk, head, done):
        low, high = chunk_tiles(s, chunk)
        first_page = lax.div(s.first_key, jnp.int32(p.page_size)) if p.window is not None else 0
        last_page = lax.div(s.kv_len - 1, jnp.int32(p.page_size))

        @pl.loop(low, high)
        def one_tile(t):
          i = done + t - low
          slot = lane * stages + lax.rem(i, jnp.int32(stages))
          page = lax.div(t * block_kv, jnp.int32(p.page_size))
          # Pages that nobody sees are never read; what lies there in the tile is masked.
          ids = [pages[b, jnp.clip(page + n, first_page, last_page)] for n in range(tile_pages)]
          rows = pl.ds(t * block_kv - page * p.page_size, min(block_kv, p.page_size))
          for gmem, smem, full, empty in ((k_gmem, k_smem, k_full, k_empty), (v_gmem, v_smem, v_full, v_empty)):
            pl.when(i >= stages)(lambda empty=empty: plgpu.barrier_wait(empty.at[slot]))
            for n, page_id in enumerate(ids):
              place = smem.at[slot, pl.ds(n * p.page_size, p.page_size)] if tile_pages > 1 else smem.at[slot]
              plgpu.copy_gmem_to_smem(gmem.at[page_id, rows, head], place, full.at[slot])

        return done + high - low

      done = over_items(lane, one_item)

      @pl.loop(jnp.maximum(done - stages, 0), done)
      def _(i):  # the interpreter wants every completion of a barrier observed
        slot = lane * stages + lax.rem(i, jnp.int32(stages))
        plgpu.barrier_wait(k_empty.at[slot])
        plgpu.barrier_wait(v_empty.at[slot])

    def compute(lane):
      q_tile = q_smem.at[lane]

      def one_item(b, s, chunk, head, done):
        low, high = chunk_tiles(s, chunk)
        rows = Rows(s.first_token * H + head * group, s.query_len * group, group, H)
        plgpu.commit_smem()  # all have read the last queries
        q_tile[...] = load(q_gmem, rows)
        plgpu.commit_smem()
        # Row r sees the keys [r_low, r_high).
        offset = s.kv_len - s.query_len
        r_high = s.kv_len
        if p.max_query_len > 1:
          row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
          token = sum(jnp.where(row >= first, 1, 0) for first in range(group, max_rows, group))  # row // group
          r_high = jnp.minimum(token + (offset + 1), s.kv_len)
        r_low = None if p.window is None else r_high - (1 + p.window)

        def one_tile(t, carry, *, masked):
          acc, row_max, row_sum = carry
          slot = lane * stages + lax.rem(done + t - low, jnp.int32(stages))
          column = t * block_kv
          plgpu.barrier_wait(k_full.at[slot])
          scores = mosaic.matmul(q_tile, k_smem.at[slot].T)
          plgpu.barrier_arrive(k_empty.at[slot])
          if p.soft_cap is not None:
            scores = jnp.tanh(scores * (p.scale / p.soft_cap))
          if masked:
            cut = None if r_low is None else r_low - column
            scores = mosaic.keep(scores, cut, r_high - column, interpret=is_interpreted)
          new_max = jnp.maximum(row_max, scores.max(axis=1))
          shift = new_max * factor
          if masked:
            shift = jnp.where(new_max == -jnp.inf, 0.0, shift)  # a row that has seen nothing yet
          alpha = jnp.exp2(row_max * factor - shift)
          prob, sums = mosaic.exponentials(scores, factor, shift, interpret=is_interpreted)
          acc = mosaic.rescale(acc, alpha, interpret=is_interpreted)
          plgpu.barrier_wait(v_full.at[slot])
          if masked:  # what nobody owns may be NaN, and 0 * NaN is NaN

            @pl.when((s.kv_len < column + block_kv) | (s.first_key > column))
            def _():
              before = None if p.window is None else s.first_key - column
              mosaic.zero_rows(v_smem.at[slot], s.kv_len - column, before, interpret=is_interpreted)
              plgpu.commit_smem()

          acc = mosaic.add_matmul(acc, prob.astype(dtype), v_smem.at[slot], interpret=is_interpreted)
          plgpu.barrier_arrive(v_empty.at[slot])
          return acc, new_max, row_sum * alpha + sums

        # Tiles [begin, end) are seen whole by every row.
        begin, end = low, jnp.clip(lax.div(offset + 1, jnp.int32(block_kv)), low, high)
        if p.window is not None:
          begin = jnp.clip(cdiv(jnp.maximum(s.kv_len - 1 - p.window, 0), block_kv), low, high)
          end = jnp.maximum(begin, end)
        carry = mosaic.full((ROWS, D), 0.0), mosaic.full((ROWS,), -jnp.inf, ROW), mosaic.full((ROWS,), 0.0, ROW)
        for masked, start, stop in ((True, low, begin), (False, begin, end), (True, end, high)):
          if start is not stop:
            carry = lax.fori_loop(start, stop, lambda t, carry, masked=masked: one_tile(t, carry, masked=masked), carry)
        acc, row_max, row_sum = carry
        row_sum = mosaic.total(row_sum, interpret=is_interpreted)
        top = row_max * factor
        if parts:
          pl.when(s.count == 1)(lambda: write(s, head, rows, acc, top, row_sum))
          pl.when(s.count > 1)(lambda: write_part(b, chunk, head, rows.count, acc, top, row_sum))
        else:
          write(s, head, rows, acc, top, row_sum)
        return done + high - low

      def write(s, head, rows, acc, top, row_sum):
        acc, top, row_sum = add_sinks(s, head, acc, top, row_sum, sinks)
        write_rows(out_gmem, lse_gmem, rows, acc, top, row_sum)

      def write_part(b, chunk, head, count, acc, top, row_sum):
        part_gmem, part_lse_gmem = parts
        rows = Rows(((b * chunks.max_count + chunk) * K + head) * max_rows, count)
        inverse, lse = normaliser(top, row_sum)
        store(part_lse_gmem, rows, lse)
        store(part_gmem, rows, acc * across(inverse, acc))

      over_items(lane, one_item)

    @pl.when(warpgroup < lanes)
    def _():
      plgpu.set_max_registers(232, action="increase")
      compute(warpgroup)

    @pl.when(warpgroup == lanes)
    def _():
      plgpu.set_max_registers(40, action="decrease")  # a launch of 3 warpgroups has 504 a lane: 2 x 232 + 40

      @plgpu.warp_map
      def _(warp):
        pl.when(warp < lanes)(lambda: fetch(warp))

  def merge(part_gmem, part_lse_gmem, kv_lens, starts, sinks, out_gmem, lse_gmem):
    b, head, column = lax.axis_index("b"), lax.axis_index("head"), lax.axis_index("column")
    s = look(starts, kv_lens, b)

    def place(chunk):
      """First row of a part, and how many there are: none past the last chunk."""
      index = jnp.minimum(chunk, s.count - 1)
      count = jnp.where(chunk < s.count, s.query_len * group, 0)
      return ((b * chunks.max_count + index) * K + head) * max_rows, count

    def chunk_lse(chunk):
      return load(part_lse_gmem, Rows(*place(chunk))) + jnp.where(chunk < s.count, 0.0, -jnp.inf)

    @pl.when(s.count > 1)
    def _():
      steps = cdiv(s.count, AT_ONCE)
      some = lambda step: [step * AT_ONCE + n for n in range(AT_ONCE)]  # noqa: E731

      def highest(step, top):
        return functools.reduce(jnp.maximum, [chunk_lse(chunk) for chunk in some(step)], top)

      top = lax.fori_loop(0, steps, highest, mosaic.full((ROWS,), -1e30, ROW))

      def add(step, carry):
        acc, total = carry
        loaded = []
        for chunk in some(step):
          first, count = place(chunk)
          loaded.append((chunk_lse(chunk), load(part_gmem, Rows(first * slices + column, count, 1, slices))))
        for lse, part in loaded:
          weight = jnp.exp2(lse - top)
          acc, total = acc + part * across(weight, part), total + weight
        return acc, total

      acc, total = lax.fori_loop(0, steps, add, (mosaic.full((ROWS, SLICE), 0.0), mosaic.full((ROWS,), 0.0, ROW)))
      acc, top, total = add_sinks(s, head, acc, top, total, sinks)
      inverse, lse = normaliser(top, total)
      rows = Rows(s.first_token * H + head * group, s.query_len * group, group, H)
      pl.when(column == 0)(lambda: store(lse_gmem, rows, lse * LN_2))
      rows = Rows(rows.first * slices + column, rows.count, group, H * slices, slices)
      store(out_gmem, rows, (acc * across(inverse, acc)).astype(dtype))

  slices = D // SLICE
  parts = () if chunks.max_count == 1 else (p.batch * chunks.max_count * K * max_rows,)
  params = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0)
  full, empty = (
    plgpu.Barrier(num_arrivals=tile_pages, num_barriers=lanes * stages),
    plgpu.Barrier(num_barriers=lanes * stages),
  )
  attend = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((T * H, D), dtype),
      jax.ShapeDtypeStruct((T * H,), jnp.float32),
      *(jax.ShapeDtypeStruct((n, D), jnp.float32) for n in parts),
      *(jax.ShapeDtypeStruct((n,), jnp.float32) for n in parts),
    ),
    grid=(num_blocks,),
    grid_names=("block",),
    num_threads=lanes + 1,
    thread_name="wg",
    scratch_types=(
      mosaic.smem((lanes, ROWS, D), dtype),
      *(mosaic.smem((lanes * stages, block_kv, D), dtype) for _ in range(2)),
      *(full, empty, full, empty),
    ),
    compiler_params=params,
    interpret=interpret,
  )
  sinks = None if operands.sinks is None else operands.sinks.astype(jnp.float32)
  lens = operands.kv_lens, operands.query_starts
  query = operands.query.reshape(T * H, D)
  out, lse, *parts = attend(query, operands.k_pages, operands.v_pages, operands.pages, *lens, sinks)
  if parts:
    out_ref, lse_ref = jax.new_ref(out.reshape(-1, SLICE)), jax.new_ref(lse)
    plgpu.kernel(
      merge,
      out_type=(),
      grid=(p.batch, K, slices),
      grid_names=("b", "head", "column"),
      num_threads=1,
      thread_name="wg",
      compiler_params=params,
      interpret=interpret,
    )(parts[0].reshape(-1, SLICE), parts[1], *lens, sinks, out_ref, lse_ref)
    out, lse = jax.freeze(out_ref), jax.freeze(lse_ref)
  return out.reshape(T, H, D), lse.reshape(T, H)
