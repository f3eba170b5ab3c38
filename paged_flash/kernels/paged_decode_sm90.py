"""Paged attention of a few query tokens per sequence on Hopper GPUs: reading K and V is all the work there is.

The keys of a sequence are cut into chunks (`Chunks`), by its own length only, and its result is defined as the fold of
its chunks from left to right (`mosaic.fold`): the same bit for bit whoever computes which of them.

Each multiprocessor has two lanes: a warpgroup that computes, and a warp that walks the page table and fetches pages by
TMA, one copy for each page and KV head, into a ring of tiles of its own. The tiles of all sequences are one line for
each KV head, cut into equal segments, one for each lane (`Segments`), so that lanes have equal work whatever the
lengths. A lane computes the chunks that begin in its segment and fetches ahead of computing: reading never stops.

  a lane computes, tile by tile of a chunk (Dao et al. 2022, Algorithm 1, in the log2 domain):
    S = Q K^T, P = softmax(S), O += P V      the query heads of a KV head, for all query tokens, are the rows of Q

Only in shared memory are rows padded to the 64 of a wgmma. Chunks that a lane computes from the first on are folded in
registers, and written if they are all; of a sequence that a segment's end cuts, the chunks before it make one part, and
each chunk after it another. Parts go to memory in float32, and a second kernel folds them.

Chunks that several sequences share (`shared_prefixes`) are computed for all of them at once: a unit of sequences is
one more sequence on the line, whose rows are their queries, and its parts are theirs. Their own chunks are a part each.
The fold is the same, so is every bit. A cascade that merges prefix and rest by LSE (FlashInfer, Ye et al. 2024) reads
as little, but its results depend on who shares what.

Pages of 8 bits are fetched as they are, and widened by the warpgroup into one more tile before each product. The scale
of a token multiplies its column of S and of P, in float32.

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
from paged_flash.kernels.mosaic import LOG2_E, ROW, Rows, cdiv, divide
from paged_flash.kernels.problem import PagedOperands, PagedProblem

ROWS = 64  # of a tile of queries
CHUNK = 512  # tokens of a chunk, at least
ENOUGH_ITEMS = 256  # of one sequence: they occupy a GPU
ENOUGH_LANES = 128  # that fetch at the same time: they read almost as fast as memory can
AT_ONCE = 16  # parts that the second kernel reads at a time
THREADS = 128  # of a block of it, each with one column of a row of O


class Chunks(NamedTuple):
  """How the tiles of a sequence are cut: into chunks of at least `least` tiles, and at most `most` of them."""

  least: int
  most: int
  max_tiles: int  # of any sequence

  def size(self, tiles: Any) -> Any:
    """Tiles of a chunk of a sequence of so many tiles."""
    return jnp.maximum(cdiv(tiles, self.most), self.least)

  @property
  def max_count(self) -> int:
    return min(self.most, cdiv(self.max_tiles, self.least))


def make_chunks(problem: PagedProblem, block_kv: int) -> Chunks:
  p = problem
  visible = p.pages_per_slot * p.page_size
  max_tiles = cdiv(visible, block_kv)
  if p.window is not None:
    max_tiles = min(max_tiles, cdiv(p.window + p.max_query_len, block_kv) + 1)
  # What is at most two chunks is one: it needs no second kernel.
  least = max(1, (2 * CHUNK if p.has_scales or visible <= 2 * CHUNK else CHUNK) // block_kv)
  return Chunks(least=least, most=max(1, ENOUGH_ITEMS // p.num_kv_heads), max_tiles=max_tiles)


def max_tokens(problem: PagedProblem) -> int:
  """The most query tokens that a sequence may have here: as many as their heads fit a tile."""
  return ROWS * problem.num_kv_heads // problem.num_heads


class Units(NamedTuple):
  """Sequences that share leading chunks, together: their queries are the rows of one tile, and K and V are read once.

  A chunk's result in a row depends on nothing but the row's query, so that sharing changes no bit.
  """

  leads: Any  # i32[U], a sequence of each unit
  sizes: Any  # i32[U], how many it has; 0 or at least 2
  tokens: Any  # i32[U * M], their query tokens
  places: Any  # i32[U * M], where their parts begin, in groups of rows
  chunks: Any  # i32[B], how many chunks of each sequence its unit computes
  of: Any  # i32[B], each sequence's unit, or -1


def make_units(problem: PagedProblem, chunks: Chunks, block_kv: int, operands: PagedOperands) -> Units | None:
  """The units of a call's sequences, by what `operands.leaders` and `shared_pages` say; None where there can be none.

  Sequences with one query token are one unit if they share as many chunks, of the same size, with the same leader; of
  more than fit a tile the next are another.
  """
  p = problem
  group = p.num_heads // p.num_kv_heads
  most, num_units = ROWS // group, p.batch // 2
  if not p.has_prefixes or p.window is not None or chunks.max_count == 1 or most < 2 or num_units == 0:
    return None
  assert operands.leaders is not None and operands.shared_pages is not None
  index = jnp.arange(p.batch, dtype=jnp.int32)
  starts, lens = operands.query_starts, operands.kv_lens
  size = chunks.size(cdiv(lens, block_kv))
  shared = jnp.minimum(operands.shared_pages * p.page_size, lens) // (size * block_kv)
  if starts is not None:
    shared = jnp.where(jnp.diff(starts) == 1, shared, 0)
  alike = [x[:, None] == x for x in (operands.leaders, size, shared)]
  alike = functools.reduce(jnp.logical_and, alike) & (shared > 0)  # bool[B, B]
  place = jnp.sum(alike & (index < index[:, None]), 1, dtype=jnp.int32)  # of a sequence among those like it
  first = place - place % most  # and that of the first of its unit
  sizes = jnp.minimum(jnp.sum(alike, 1, dtype=jnp.int32) - first, most)
  shared = jnp.where(sizes > 1, shared, 0)
  # All by sums and maxima over small matrices: each is one kernel, in every step.
  lead = jnp.min(jnp.where(alike & (place == first[:, None]), index, p.batch), 1)  # the first of its unit
  is_lead = (shared > 0) & (lead == index)
  of = jnp.where(shared > 0, jnp.sum(is_lead & (index < lead[:, None]), 1, dtype=jnp.int32), -1)
  width = cdiv(ROWS, group)
  rows = chunks.max_count * p.num_kv_heads * min(p.max_query_len, max_tokens(p))

  def look_up(keys, count, *values):
    """For each number below `count`, those of the values (i32[B]) whose key it is; 0 if it is none's."""
    is_it = keys == jnp.arange(count)[:, None]
    return [jnp.max(jnp.where(is_it, value, 0), 1) for value in values]

  leads, unit_sizes = look_up(jnp.where(is_lead, of, -1), num_units, index, sizes)
  row = jnp.where(of < 0, -1, of * width + place - first)
  tokens, places = look_up(row, num_units * width, index if starts is None else starts[:-1], index * rows)
  return Units(leads, unit_sizes, tokens, places, chunks=shared, of=of)


class Sequence(NamedTuple):
  """One sequence: its query tokens, which keys they see, and the tiles [low, high) and chunks of these keys.

  Or, past the last sequence, one of `Units`: the queries of its sequences, and the chunks that they share.
  """

  row: Any  # of the page table
  first_token: Any
  query_len: Any
  kv_len: Any
  offset: Any  # its i-th query token sees the keys up to i + offset
  first_key: Any  # that any of them sees
  low: Any
  high: Any
  chunk: Any  # tiles
  count: Any  # chunks; 0 if it has nothing to do here
  begin: Any  # the first chunk that no unit computes
  unit: Any  # it is this one of the units, if not negative; None: there are none


def sequence(
  problem: PagedProblem, chunks: Chunks, block_kv: int, starts: Any, kv_lens: Any, units: Units | None, b: Any
) -> Sequence:
  """Reads sequence b's lengths; `starts` is None where every sequence has one token."""
  p: PagedProblem = problem
  unit: Any = None
  p, row, begin = problem, b, 0
  if units is not None:
    unit = b - p.batch
    u = jnp.maximum(unit, 0)
    row = jnp.where(unit < 0, b, units.leads[u])
    begin = units.chunks[row]
  first, query_len = (row, 1) if starts is None else (starts[row], starts[row + 1] - starts[row])
  kv_len = kv_lens[row]
  first_key = 0 if p.window is None else jnp.maximum(kv_len - query_len - p.window, 0)
  low, high = lax.div(first_key, jnp.int32(block_kv)) if p.window is not None else 0, cdiv(kv_len, block_kv)
  chunk = chunks.size(high - low)
  count = jnp.maximum(1 if chunks.max_count == 1 else lax.div(high - low + chunk - 1, jnp.int32(chunk)), 1)
  if starts is not None:
    count = jnp.where((query_len > 0) & (query_len <= max_tokens(p)), count, 0)
  offset = kv_len - query_len
  if units is not None:
    size = units.sizes[u]
    shared = begin * chunk
    query_len = jnp.where(unit < 0, query_len, size)
    kv_len = jnp.where(unit < 0, kv_len, shared * block_kv)
    offset = jnp.where(unit < 0, offset, kv_len - 1)
    high = jnp.where(unit < 0, high, shared)
    count = jnp.where(unit < 0, count, jnp.where(size > 0, begin, 0))
    begin = jnp.where(unit < 0, begin, 0)
  return Sequence(row, first, query_len, kv_len, offset, first_key, low, high, chunk, count, begin, unit)


class Segments(NamedTuple):
  """The line of tiles of a KV head, sequence after sequence, cut into equal segments."""

  size: Any  # tiles
  count: int  # that lanes are ready for; the line may end before

  @classmethod
  def cut(cls, count: int, batch: int, num_kv_heads: int, enough: int, total: Any, longest: Any) -> "Segments":
    """Of a line of `total` tiles of `batch` sequences, the longest's being `longest`.

    Sequences of about the same length are not cut if `enough` lanes fetch at a time all the same.
    """
    size, longest = cdiv(total, count), jnp.maximum(longest, 1)
    is_enough = (longest * enough <= total * num_kv_heads) & (longest * batch <= 2 * total)
    return cls(jnp.where(is_enough, lax.div(size + longest - 1, longest) * longest, size), count)


class Line:
  """Where on the line sequences lie. In the interpreter a loop looks; on a GPU the lanes of a warp look at once."""

  def __init__(self, batch: int, length: Any, *, interpret: bool):
    self.batch, self.length, self.interpret = batch, length, interpret

  def _loop(self, f, *carry):
    """f(b, its tiles, *carry) for the sequences of a thread, one after the other."""
    share = self.batch if self.interpret else cdiv(self.batch, 32)
    first = jnp.int32(0) if self.interpret else lax.rem(mosaic.thread(), jnp.int32(32)) * share

    def one(i, carry):
      b = first + i
      return f(b, jnp.where(b < self.batch, self.length(jnp.minimum(b, self.batch - 1)), 0), *carry)

    return lax.fori_loop(0, share, one, carry)

  def _reduce(self, operation, x):
    return x if self.interpret else mosaic.over_warp(operation, x)

  def measure(self) -> tuple[Any, Any]:
    """Tiles of all sequences, and of the longest."""
    zero = jnp.int32(0)
    total, longest = self._loop(lambda b, n, total, top: (total + n, jnp.maximum(top, n)), zero, zero)
    return self._reduce("add", total), self._reduce("max", longest)

  def longest_below(self, bound: Any) -> Any:
    """Tiles of the longest of the sequences that have fewer than `bound`; 0 if none has any."""
    (longest,) = self._loop(lambda b, n, top: (jnp.maximum(top, jnp.where(n < bound, n, 0)),), jnp.int32(0))
    return self._reduce("max", longest)

  def start(self, b: Any) -> Any:
    """Where sequence b begins."""
    (total,) = self._loop(lambda other, n, total: (total + jnp.where(other < b, n, 0),), jnp.int32(0))
    return self._reduce("add", total)

  def find(self, *places: Any) -> list[tuple[Any, Any]]:
    """The sequence that holds each place, and where it begins; the number of sequences if the line ends before."""
    zero = jnp.int32(0)
    (total,) = self._loop(lambda b, n, total: (total + n,), zero)
    before = zero if self.interpret else mosaic.over_warp("before", total)

    def one(b, n, end, *found):
      end = end + n
      is_past = [(end <= place) & (b < self.batch) for place in places]
      found = [(x + is_past, jnp.where(is_past, end, y)) for (x, y), is_past in zip(found, is_past, strict=True)]
      return end, *found

    _, *found = self._loop(one, before, *[(zero, zero) for _ in places])
    return [(self._reduce("add", index), self._reduce("max", start)) for index, start in found]


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
  num_lanes = lanes * num_blocks
  num_segments = max(1, num_lanes // K)
  tile_pages = max(1, block_kv // p.page_size)
  is_interpreted = interpret is not None
  factor = LOG2_E * (p.scale if p.soft_cap is None else p.soft_cap)
  load = functools.partial(mosaic.load_rows, interpret=is_interpreted)
  store = functools.partial(mosaic.store_rows, interpret=is_interpreted)
  units = make_units(p, chunks, block_kv, operands)
  num_units = 0 if units is None else units.leads.size
  width = cdiv(ROWS, group)  # of a row of units.tokens
  look = functools.partial(sequence, p, chunks, block_kv)
  # Two accumulators of head_dim 256 are more than the registers of a warpgroup.
  is_folded = chunks.max_count > 1 and D <= 128

  def lay(starts, kv_lens, units):
    """The line of tiles, units after sequences, and its segments."""

    def length(b):
      s = look(starts, kv_lens, units, b)
      return jnp.where(s.count > s.begin, jnp.maximum(s.high - s.low - s.begin * s.chunk, 1), 0)

    line = Line(p.batch + num_units, length, interpret=is_interpreted)
    enough = num_lanes if p.has_scales else ENOUGH_LANES  # widening keeps a lane busier than memory does
    return line, Segments.cut(num_segments, p.batch, K, enough, *line.measure())

  def chunks_before(s, tiles):
    """The first chunk that does not begin in the first `tiles` tiles of a sequence on the line."""
    return s.begin + jnp.clip(lax.div(tiles + s.chunk - 1, jnp.int32(s.chunk)), 0, s.count - s.begin)

  def with_sink(s, sink):
    return sink + jnp.where(s.kv_len > 0, 0.0, -jnp.inf)

  def kernel(q_gmem, k_gmem, v_gmem, pages, starts, kv_lens, units, sinks, *refs):
    lens = starts, kv_lens, units
    scales_gmem, refs = (refs[:2], refs[2:]) if p.has_scales else ((), refs)
    out_gmem, lse_gmem, *parts = refs[:-num_scratch]
    q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, *wide = refs[-num_scratch:]
    block, warpgroup = lax.axis_index("block"), lax.axis_index("wg")

    def over_chunks(lane, body, carry):
      """carry = body(b, sequence b, mine, head, chunk, carry) for all chunks of a lane; the last carry.

      Of each sequence and head, the chunks in the range `mine` [first, past) are the lane's.
      """
      line, segments = lay(*lens)

      def of_unit(n, carry):
        segment, head = divide(lane * num_blocks + block + n * num_lanes, K)
        low = segment * segments.size
        high = low + segments.size
        (b_low, place), (b_high, _) = line.find(low, high - 1)

        def of_sequence(b, carry):
          place, carry = carry
          s = look(*lens, b)
          first, past = chunks_before(s, low - place), chunks_before(s, high - place)
          carry = lax.fori_loop(first, past, functools.partial(body, b, s, (first, past), head), carry)
          return place + line.length(b), carry

        return lax.fori_loop(b_low, jnp.minimum(b_high + 1, line.batch), of_sequence, (place, carry))[1]

      count = cdiv(jnp.maximum(num_segments * K - (lane * num_blocks + block), 0), num_lanes)
      return lax.fori_loop(0, count, of_unit, carry)

    def chunk_tiles(s, chunk):
      low = s.low + chunk * s.chunk
      return low, jnp.minimum(low + s.chunk, s.high)

    def visible_pages(s):
      """First and last page that anybody sees: no other is ever read. What lies in their place in a tile is masked."""
      first = lax.div(s.first_key, jnp.int32(p.page_size)) if p.window is not None else 0
      return first, lax.div(s.kv_len - 1, jnp.int32(p.page_size))

    def fetch(lane):
      def one_chunk(b, s, mine, head, chunk, done):
        low, high = chunk_tiles(s, chunk)
        first_page, last_page = visible_pages(s)

        @pl.loop(low, high)
        def one_tile(t):
          i = done + t - low
          slot = lane * stages + lax.rem(i, jnp.int32(stages))
          page = lax.div(t * block_kv, jnp.int32(p.page_size))
          ids = [pages[s.row, jnp.clip(page + n, first_page, last_page)] for n in range(tile_pages)]
          rows = pl.ds(t * block_kv - page * p.page_size, min(block_kv, p.page_size))
          for gmem, smem, full, empty in ((k_gmem, k_smem, k_full, k_empty), (v_gmem, v_smem, v_full, v_empty)):
            pl.when(i >= stages)(lambda empty=empty: plgpu.barrier_wait(empty.at[slot]))
            for n, page_id in enumerate(ids):
              place = smem.at[slot, pl.ds(n * p.page_size, p.page_size)] if tile_pages > 1 else smem.at[slot]
              plgpu.copy_gmem_to_smem(gmem.at[page_id, rows, head], place, full.at[slot])

        return done + high - low

      done = over_chunks(lane, one_chunk, jnp.int32(0))

      @pl.loop(jnp.maximum(done - stages, 0), done)
      def _(i):  # the interpreter wants every completion of a barrier observed
        slot = lane * stages + lax.rem(i, jnp.int32(stages))
        plgpu.barrier_wait(k_empty.at[slot])
        plgpu.barrier_wait(v_empty.at[slot])

    def scales(s, head, t):
      """Scales of K and V of tile t, 0 where nobody sees a token; one row's in each thread, as `dequantise` wants."""
      first_page, last_page = visible_pages(s)

      def of_rows(page, rows, key):
        page_id = jnp.where(s.kv_len > 0, pages[s.row, jnp.clip(page, first_page, last_page)], 0)  # no keys, no page
        is_seen = (key >= s.first_key) & (key < s.kv_len)
        return [jnp.where(is_seen, gmem[page_id, rows, head], 0.0) for gmem in scales_gmem]

      first = t * block_kv
      if not is_interpreted:
        key = first + lax.rem(mosaic.thread(), jnp.int32(block_kv))
        page, row = divide(key, p.page_size)
        return of_rows(page, row, key)
      page, row = divide(first, p.page_size)
      size = block_kv // tile_pages
      keys = [first + n * size + jnp.arange(size) for n in range(tile_pages)]
      parts = [of_rows(page + n, pl.ds(row, size), key) for n, key in enumerate(keys)]
      return [jnp.concatenate(x) for x in zip(*parts, strict=True)]

    def nothing():
      return mosaic.full((ROWS, D), 0.0), mosaic.full((ROWS,), -jnp.inf, ROW), mosaic.full((ROWS,), 0.0, ROW)

    def compute(lane):
      q_tile = q_smem.at[lane]

      def one_chunk(b, s, mine, head, chunk, carry):
        done, *state = carry
        low, high = chunk_tiles(s, chunk)
        rows = Rows(s.first_token * H + head * group, s.query_len * group, group, H)
        if units is not None:
          first = jnp.where(s.unit < 0, rows.first, head * group)
          rows = rows._replace(first=first, index=units.tokens, at=s.unit * width)
        plgpu.commit_smem()  # all have read the last queries
        q_tile[...] = load(q_gmem, rows)
        plgpu.commit_smem()
        # Row r sees the keys [r_low, r_high).
        r_high = s.kv_len
        if max_rows > group:
          row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
          token = sum(jnp.where(row >= first, 1, 0) for first in range(group, max_rows, group))  # row // group
          r_high = jnp.minimum(token + (s.offset + 1), s.kv_len)
        r_low = None if p.window is None else r_high - (1 + p.window)

        def one_tile(t, carry, *, masked):
          acc, row_max, row_sum, *now = carry
          slot = lane * stages + lax.rem(done + t - low, jnp.int32(stages))
          column = t * block_kv
          k_tile, v_tile = k_smem.at[slot], v_smem.at[slot]
          if wide:  # the next tile's scales arrive meanwhile
            quantised = k_tile, v_tile
            k_tile, v_tile, k_scales, v_scales = (x.at[lane] for x in wide)
            later = scales(s, head, jnp.minimum(t + 1, high - 1))
          plgpu.barrier_wait(k_full.at[slot])
          if wide:
            mosaic.dequantise(k_tile, k_scales, quantised[0], now[0], interpret=is_interpreted)
            plgpu.commit_smem()
            plgpu.barrier_arrive(k_empty.at[slot])
          scores = mosaic.matmul(q_tile, k_tile.T)
          if wide:
            scores = mosaic.scale_columns(scores, k_scales, interpret=is_interpreted)
          else:
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
          # A row's bits must depend neither on the program around it, hence fmas that no compiler chooses, nor on the
          # rows beside it, and `rescale` looks at whether any alpha is below 1: without a new maximum it is exactly 1.
          alpha = jnp.exp2(mosaic.multiply_add(row_max, factor, -shift, interpret=is_interpreted))
          alpha = jnp.where(new_max > row_max, alpha, 1.0)
          prob, sums = mosaic.exponentials(scores, factor, shift, interpret=is_interpreted)
          row_sum = mosaic.multiply_add(row_sum, alpha, sums, interpret=is_interpreted)
          acc = mosaic.rescale(acc, alpha, interpret=is_interpreted)
          plgpu.barrier_wait(v_full.at[slot])
          if wide:
            mosaic.dequantise(v_tile, v_scales, quantised[1], now[1], interpret=is_interpreted)
            plgpu.commit_smem()
            plgpu.barrier_arrive(v_empty.at[slot])
            prob = mosaic.scale_columns(prob, v_scales, interpret=is_interpreted)
          if masked:  # what nobody owns may be NaN, and 0 * NaN is NaN

            @pl.when((s.kv_len < column + block_kv) | (s.first_key > column))
            def _():
              before = None if p.window is None else s.first_key - column
              mosaic.zero_rows(v_tile, s.kv_len - column, before, interpret=is_interpreted)
              plgpu.commit_smem()

          acc = mosaic.add_matmul(acc, prob.astype(dtype), v_tile, interpret=is_interpreted)
          if not wide:
            plgpu.barrier_arrive(v_empty.at[slot])
            return acc, new_max, row_sum
          return acc, new_max, row_sum, *later

        # Tiles [begin, end) are seen whole by every row.
        begin, end = low, jnp.clip(lax.div(s.offset + 1, jnp.int32(block_kv)), low, high)
        if p.window is not None:
          begin = jnp.clip(cdiv(jnp.maximum(s.kv_len - 1 - p.window, 0), block_kv), low, high)
          end = jnp.maximum(begin, end)
        carry = *nothing(), *(scales(s, head, low) if wide else ())
        for masked, start, stop in ((True, low, begin), (False, begin, end), (True, end, high)):
          if start is not stop:
            carry = lax.fori_loop(start, stop, lambda t, carry, masked=masked: one_tile(t, carry, masked=masked), carry)
        acc, row_max, row_sum, *_ = carry
        result = acc, row_max, mosaic.total(row_sum, interpret=is_interpreted)
        if not is_folded:
          is_whole = s.count == 1 if units is None else (s.count == 1) & (s.unit < 0)
          if chunks.max_count > 1:
            pl.when(~is_whole)(lambda: write_part(b, s, chunk, head, rows.count, result))
            pl.when(is_whole)(lambda: write(s, head, rows, result))
          else:
            write(s, head, rows, result)
          return (done + high - low,)
        first, past = mine
        state = lax.cond((chunk == 0) | (first > 0), nothing, lambda: tuple(state))
        state = mosaic.fold(state, result, factor, interpret=is_interpreted)
        is_whole = (first == 0) & (past == s.count)
        if units is not None:
          is_whole &= s.unit < 0
        is_part = (first > 0) | ((chunk == past - 1) & ~is_whole)
        pl.when(is_whole & (chunk == past - 1))(lambda: write(s, head, rows, state))
        pl.when(is_part)(lambda: write_part(b, s, jnp.where(first > 0, chunk, 0), head, rows.count, state))
        return done + high - low, *state

      def write(s, head, rows, state):
        sink = None
        if sinks is not None:
          sink = with_sink(s, load(sinks, Rows(head * group, s.query_len * group, group, 0)))
        out, lse = mosaic.finish(state, sink, factor, interpret=is_interpreted)
        store(lse_gmem, rows, lse)
        store(out_gmem, rows, out.astype(dtype))

      def write_part(b, s, part, head, count, state):
        rows = Rows(((b * chunks.max_count + part) * K + head) * max_rows, count)
        if units is not None:
          first = jnp.where(s.unit < 0, rows.first, (part * K + head) * max_rows)
          rows = Rows(first, count, group, group, index=units.places, at=s.unit * width)
        for gmem, x in zip(parts, state, strict=True):
          store(gmem, rows, x)

      over_chunks(lane, one_chunk, (jnp.int32(0), *(nothing() if is_folded else ())))

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

  def merge(part_gmem, top_gmem, total_gmem, starts, kv_lens, units, sinks, out_gmem, lse_gmem):
    lens = starts, kv_lens, units
    b, slices = lax.axis_index("b"), max(1, D // THREADS)
    head, some_rows = divide(lax.axis_index("rows"), row_blocks)
    column = lax.axis_index("slice") * THREADS
    s = first = look(*lens, b)
    where, has_unit = b, False
    if units is not None:
      has_unit = units.of[b] >= 0
      where = jnp.where(has_unit, p.batch + units.of[b], b)
      first = look(*lens, where)

    def fold_parts(done):
      def one_row(row, columns):
        def part(chunk):
          index = ((b * chunks.max_count + chunk) * K + head) * max_rows + row
          return part_gmem[index, columns], top_gmem[index], total_gmem[index]

        def some(step, state):
          first = done + step * AT_ONCE
          loaded = [part(jnp.minimum(first + n, s.count - 1)) for n in range(AT_ONCE)]
          for n, x in enumerate(loaded):
            more = mosaic.fold(state, x, factor, interpret=is_interpreted)
            state = tuple(jnp.where(first + n < s.count, y, z) for y, z in zip(more, state, strict=True))
          return state

        state = lax.fori_loop(0, cdiv(s.count - done, AT_ONCE), some, part(0))
        token, query_head = divide(row, group)
        query_head += head * group
        sink = None if sinks is None else with_sink(s, sinks[query_head])
        out, lse = mosaic.finish(state, sink, factor, interpret=is_interpreted)
        return (s.first_token + token) * H + query_head, out.astype(dtype), lse

      def of_rows(some_rows):
        if is_interpreted:

          @pl.loop(0, rows_per_block)
          def _(n):
            row = some_rows * rows_per_block + n

            @pl.when(row < s.query_len * group)
            def _():
              columns = pl.ds(column, D // slices)
              index, out, lse = one_row(row, columns)
              out_gmem[index, columns] = out

              @pl.when(column == 0)
              def _():
                lse_gmem[index] = lse

        else:
          n, columns = divide(mosaic.thread(), D // slices)
          row = some_rows * rows_per_block + n
          is_alive, columns = row < s.query_len * group, column + columns
          index, out, lse = one_row(jnp.where(is_alive, row, 0), columns)
          mosaic.store_value(out_gmem, index, columns, out, is_alive)
          mosaic.store_value(lse_gmem, index, None, lse, is_alive & (columns == 0))

      if row_blocks * rows_per_block >= max_rows:
        of_rows(some_rows)
      else:
        pl.loop(some_rows, cdiv(s.query_len * group, rows_per_block), step=row_blocks)(of_rows)

    @pl.when(((s.count > 1) | has_unit) & (some_rows * rows_per_block < s.query_len * group))
    def _():  # all others need not measure the line
      line, segments = lay(*lens)
      # The first part holds the chunks that begin in the same segment as the sequence, or its unit.
      place = line.start(where)
      done = chunks_before(first, (lax.div(place, segments.size) + 1) * segments.size - place)
      done = done if is_folded else 1
      pl.when((s.count > done) | has_unit)(lambda: fold_parts(done))

  rows_per_block = max(1, THREADS // D)
  # Where there can be long chunks too, hardly any block would have rows but those of the first token.
  row_blocks = cdiv(max_rows if p.max_query_len <= max_tokens(p) else group, rows_per_block)
  parts = () if chunks.max_count == 1 else (p.batch * chunks.max_count * K * max_rows,)
  params = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0)
  full, empty = (
    plgpu.Barrier(num_arrivals=tile_pages, num_barriers=lanes * stages),
    plgpu.Barrier(num_barriers=lanes * stages),
  )
  scratch = [
    mosaic.smem((lanes, ROWS, D), dtype),
    *(mosaic.smem((lanes * stages, block_kv, D), operands.k_pages.dtype) for _ in range(2)),
    *(full, empty, full, empty),
  ]
  if p.has_scales:  # where 8-bit tiles of K and V become wider ones
    scratch += [mosaic.smem((lanes, block_kv, D), dtype) for _ in range(2)]
    scratch += [plgpu.SMEM((lanes, block_kv), jnp.float32) for _ in range(2)]
  num_scratch = len(scratch)
  attend = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((T * H, D), dtype),
      jax.ShapeDtypeStruct((T * H,), jnp.float32),
      *(jax.ShapeDtypeStruct((n, D), jnp.float32) for n in parts),
      *(jax.ShapeDtypeStruct((n,), jnp.float32) for n in 2 * parts),
    ),
    grid=(num_blocks,),
    grid_names=("block",),
    num_threads=lanes + 1,
    thread_name="wg",
    scratch_types=scratch,
    compiler_params=params,
    interpret=interpret,
  )
  sinks = None if operands.sinks is None else operands.sinks.astype(jnp.float32)
  lens = operands.query_starts, operands.kv_lens, units
  query = operands.query.reshape(T * H, D)
  scale_arrays = (operands.k_scales, operands.v_scales) if p.has_scales else ()
  out, lse, *parts = attend(query, operands.k_pages, operands.v_pages, operands.pages, *lens, sinks, *scale_arrays)
  if parts:
    out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
    plgpu.kernel(
      merge,
      out_type=(),
      grid=(p.batch, K * row_blocks, max(1, D // THREADS)),
      grid_names=("b", "rows", "slice"),
      num_threads=1,
      thread_name="wg",
      compiler_params=params,
      interpret=interpret,
    )(*parts, *lens, sinks, out_ref, lse_ref)
    out, lse = jax.freeze(out_ref), jax.freeze(lse_ref)
  return out.reshape(T, H, D), lse.reshape(T, H)
