"""Paged attention of a few query tokens per sequence on Hopper GPUs: reading K and V is all the work there is.

The keys of a sequence are cut into chunks (`Chunks`), by its own length only, and its result is defined as the fold of
its chunks from left to right (`mosaic.fold`): the same bit for bit whoever computes which of them.

Each multiprocessor has two lanes: a warpgroup that computes, and a warp that walks the page table and fetches pages by
TMA, one copy for each page and KV head, into a ring of tiles of its own. The tiles of all sequences are one line for
each KV head, cut into equal segments, one for each lane (`Segments`), so that lanes have equal work whatever the
lengths. A lane computes the chunks that begin in its segment and fetches ahead of computing: reading never stops.

  a lane computes, tile by tile of a chunk (Dao et al. 2022, Algorithm 1, in the log2 domain):
    S^T = K Q^T, P^T = softmax(S^T), O^T += V^T P^T      the query heads of a KV head, for all query tokens, are columns

Columns are padded to a multiple of 8, in shared memory only (`columns_sm90`). Chunks that a lane computes from the
first on are folded in registers, and written if they are all; of a sequence that a segment's end cuts, the chunks
before it make one part, and each chunk after it another. Parts go to memory in float32, with how many chunks the first
of them holds, and a second kernel folds them.

Chunks that several sequences share (`shared_prefixes`) are computed for all of them at once: a unit of sequences is
one more sequence on the line, whose columns are their queries, and its parts are theirs. Their own chunks are a part
each. The fold is the same, so is every bit. A cascade that merges prefix and rest by LSE (FlashInfer, Ye et al. 2024)
reads as little, but its results depend on who shares what.

Sequences of one query token have tiles of as few columns as these want, whoever else is there; those of several tokens,
and units, have wider ones.

Pages of 8 bits are fetched as they are, and widened by the warpgroup on their way into the registers from which they
are multiplied. The scale of a token multiplies its row of S^T and of P^T, in float32.

Bytes in flight on a multiprocessor: lanes x stages x tiles of K and V, 128 or 192 KiB, where a latency of about 1 us at
4.8 TB/s asks for 36 KiB. In pages [page_size, K, D] a copy takes head_dim values of every token, rows of
128 bytes or more; neighbouring lanes take the neighbouring heads of the same tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_flash.kernels import columns_sm90, mosaic, rings_sm90
from paged_flash.kernels.mosaic import COLUMN, LOG2_E, ROW, Rows, cdiv, divide
from paged_flash.kernels.problem import PagedOperands, PagedProblem
from paged_flash.kernels.rings_sm90 import Ring

MOST_COLUMNS = 64  # of a tile: query heads of a KV head, for some query tokens
CHUNK = 512  # tokens of a chunk, at least
ENOUGH_ITEMS = 256  # of one sequence: they occupy a GPU
ENOUGH_LANES = 128  # that fetch at the same time: they read almost as fast as memory can
COST = 1  # of a sequence besides its tiles, in tiles: its queries, and its result
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
  return MOST_COLUMNS * problem.num_kv_heads // problem.num_heads


def has_units(problem: PagedProblem, chunks: Chunks) -> bool:
  """Whether sequences that share pages may be computed together (`Units`)."""
  p = problem
  can_share = p.has_prefixes and p.window is None and p.batch > 1
  return can_share and chunks.max_count > 1 and 2 * p.num_heads <= MOST_COLUMNS * p.num_kv_heads


def tile_columns(problem: PagedProblem, chunks: Chunks) -> tuple[int, ...]:
  """Of a tile: what one query token wants, and, if any sequence or unit can want more, what they all find room in."""
  p = problem
  group = p.num_heads // p.num_kv_heads
  few, most = (8 * cdiv(group * tokens, 8) for tokens in (1, min(p.max_query_len, max_tokens(p))))
  most = MOST_COLUMNS if has_units(p, chunks) else most
  return (few,) if few == most else (few, most)


class Units(NamedTuple):
  """Sequences that share leading chunks, together: their queries are columns of one tile, and K and V are read once.

  A chunk's result in a column depends on nothing but the column's query, so that sharing changes no bit.
  """

  sizes: (
    Any  # i32[B], how many sequences are in the unit that has a sequence's number, its first one's; 0 or at least 2
  )
  tokens: Any  # i32[B * M], their query tokens
  places: Any  # i32[B * M], where their parts begin, in groups of rows
  chunks: Any  # i32[B], how many chunks of each sequence its unit computes
  of: Any  # i32[B], each sequence's unit, or -1


def make_units(problem: PagedProblem, chunks: Chunks, block_kv: int, operands: PagedOperands) -> Units | None:
  """The units of a call's sequences, by what `operands.leaders` and `shared_pages` say; None where there can be none.

  Sequences with one query token are one unit if they share as many chunks, of the same size, with the same leader; of
  more than fit a tile the next are another.
  """
  p = problem
  group = p.num_heads // p.num_kv_heads
  most = MOST_COLUMNS // group
  if not has_units(p, chunks):
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
  of = jnp.where(shared > 0, lead, -1)
  width = cdiv(MOST_COLUMNS, group)
  rows = chunks.max_count * p.num_kv_heads * min(p.max_query_len, max_tokens(p))
  row = jnp.where(of < 0, -1, of * width + place - first)
  is_it = row == jnp.arange(p.batch * width)[:, None]
  of_rows = [index if starts is None else starts[:-1], index * rows]
  tokens, places = (jnp.max(jnp.where(is_it, x, 0), 1) for x in of_rows)
  return Units(jnp.where(of == index, sizes, 0), tokens, places, chunks=shared, of=of)


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
    row = jnp.where(unit < 0, b, unit)
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
    size = units.sizes[row]
    shared = begin * chunk
    query_len = jnp.where(unit < 0, query_len, size)
    kv_len = jnp.where(unit < 0, kv_len, shared * block_kv)
    offset = jnp.where(unit < 0, offset, kv_len - 1)
    high = jnp.where(unit < 0, high, shared)
    count = jnp.where(unit < 0, count, jnp.where(size > 0, begin, 0))
    begin = jnp.where(unit < 0, begin, 0)
  return Sequence(row, first, query_len, kv_len, offset, first_key, low, high, chunk, count, begin, unit)


class Segments(NamedTuple):
  """The line of tiles of a KV head, sequence after sequence, `COST` after each, cut into equal segments."""

  size: Any  # tiles
  count: int  # that lanes are ready for; the line may end before

  @classmethod
  def cut(cls, count: int, batch: int, num_kv_heads: int, enough: int, total: Any, longest: Any) -> "Segments":
    """Of a line of `total` tiles of `batch` sequences, the longest's being `longest`.

    Sequences of about the same length are not cut if `enough` lanes fetch at a time all the same.
    """
    size = cdiv(jnp.maximum(total - COST, 0), count)  # nothing begins in the last cost
    longest = jnp.maximum(longest, 1)
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
  sizes = tile_columns(p, chunks)
  store = functools.partial(columns_sm90.store, turned=p.has_scales, interpret=is_interpreted)
  units = make_units(p, chunks, block_kv, operands)
  num_units = 0 if units is None else units.sizes.size
  width = cdiv(MOST_COLUMNS, group)  # of a row of units.tokens
  look = functools.partial(sequence, p, chunks, block_kv)
  # Two accumulators of head_dim 128 and 64 columns are more than the registers of a warpgroup.
  is_folded = chunks.max_count > 1 and D * sizes[0] <= 64 * MOST_COLUMNS

  def is_wide(s):
    """Whether a sequence or unit wants the second size of tiles, whose chunks are a part each."""
    return s.query_len * group > sizes[0]

  def on_line(i):
    """Number of the i-th on the line: units come before sequences."""
    return i if units is None else jnp.where(i < num_units, i + p.batch, i - num_units)

  def lay(starts, kv_lens, units):
    """The line of tiles, and its segments."""

    def length(i):
      s = look(starts, kv_lens, units, on_line(i))
      return jnp.where(s.count > s.begin, jnp.maximum(s.high - s.low - s.begin * s.chunk, 1) + COST, 0)

    def make(count, length):
      return Line(count, length, interpret=is_interpreted)

    line = make(p.batch + num_units, length)
    enough = num_lanes if p.has_scales else ENOUGH_LANES  # widening keeps a lane busier than memory does
    measured = line.measure()
    cut = lambda count: Segments.cut(count, p.batch, K, enough, *measured)  # noqa: E731
    if units is None:
      return line, cut(num_segments)
    # A segment begins where a unit does. Of more sequences than fit a unit, the next then meet the same pages at the
    # same time, and find them in the L2 cache.
    count, _ = make(num_units, lambda i: jnp.where(units.sizes[i] > 0, 1, 0)).measure()
    is_aligned = 2 * count <= num_segments
    segments = cut(num_segments - jnp.where(is_aligned, count, 0))
    up = lambda tiles: lax.div(tiles + segments.size - 1, segments.size) * segments.size  # noqa: E731
    padded = lambda i: jnp.where((i < num_units) & is_aligned, up(length(i)), length(i))  # noqa: E731
    return make(p.batch + num_units, padded), segments

  def chunks_before(s, tiles):
    """The first chunk that does not begin in the first `tiles` tiles of a sequence on the line."""
    return s.begin + jnp.clip(lax.div(tiles + s.chunk - 1, jnp.int32(s.chunk)), 0, s.count - s.begin)

  def with_sink(s, sink):
    return sink + jnp.where(s.kv_len > 0, 0.0, -jnp.inf)

  def kernel(q_gmem, k_gmem, v_gmem, pages, starts, kv_lens, units, sinks, *refs):
    lens = starts, kv_lens, units
    scales_gmem, refs = (refs[:2], refs[2:]) if p.has_scales else ((), refs)
    out_gmem, lse_gmem, *parts = refs[:-num_scratch]
    parts, firsts = parts[:3], parts[3:]  # `firsts` where chunks are folded
    q_smem, p_smem, k_smem, v_smem, warps_smem, k_barriers, v_barriers, *scale_smem = refs[-num_scratch:]
    block, warpgroup = lax.axis_index("block"), lax.axis_index("wg")

    def over_chunks(lane, size, body, carry):
      """carry = body(b, sequence b, mine, head, chunk, carry) for all chunks of a lane with that size of tiles.

      Of each sequence and head, the chunks in the range `mine` [first, past) are the lane's. Returns the last carry.
      """
      line, segments = lay(*lens)

      def of_unit(n, carry):
        segment, head = divide(lane * num_blocks + block + n * num_lanes, K)
        low = segment * segments.size
        high = low + segments.size
        (b_low, place), (b_high, _) = line.find(low, high - 1)

        def of_sequence(i, carry):
          place, carry = carry
          b = on_line(i)
          s = look(*lens, b)
          first, past = chunks_before(s, low - place), chunks_before(s, high - place)
          if len(sizes) > 1:
            past = jnp.where(is_wide(s) == (size > 0), past, first)
          carry = lax.fori_loop(first, past, functools.partial(body, b, s, (first, past), head), carry)
          return place + line.length(i), carry

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

    def first_page_of(t):
      return lax.div(t * block_kv, jnp.int32(p.page_size))

    def rings_of(lane):
      """Of K and V."""
      make = lambda tiles, barriers: Ring(tiles, barriers, lane * stages, stages, is_interpreted)  # noqa: E731
      return make(k_smem, k_barriers), make(v_smem, v_barriers)

    def fetch(lane):
      rings = rings_of(lane)

      def one_chunk(b, s, mine, head, chunk, done):
        low, high = chunk_tiles(s, chunk)
        first_page, last_page = visible_pages(s)

        def page_ids(t):
          """Of tile t, as `Ring.fetch` wants them."""
          look_up = lambda n: pages[s.row, jnp.clip(first_page_of(t) + n, first_page, last_page)]  # noqa: E731
          if is_interpreted:
            return [look_up(n) for n in range(tile_pages)]
          return look_up(lax.rem(mosaic.thread(), jnp.int32(tile_pages)))

        def one_tile(t, ids):
          i = done + t - low
          later = page_ids(jnp.minimum(t + 1, high - 1))  # they arrive meanwhile
          row = t * block_kv - first_page_of(t) * p.page_size
          for ring, gmem in zip(rings, (k_gmem, v_gmem), strict=True):
            ring.wait_empty(i)
            ring.fetch(i, gmem, ids, row, head)
          return later

        @pl.when(low < high)
        def _():
          lax.fori_loop(low, high, one_tile, page_ids(low))

        return done + high - low

      done = jnp.int32(0)
      for size in range(len(sizes)):
        done = over_chunks(lane, size, one_chunk, done)
      for ring in rings:
        ring.drain(done)

    def scale_pages(s, t):
      """The page that holds the scales of tile t; of one row in each thread. A list of all in the interpreter."""
      first_page, last_page = visible_pages(s)
      look_up = lambda page: pages[s.row, jnp.maximum(jnp.clip(page, first_page, last_page), 0)]  # noqa: E731
      if is_interpreted:
        return [look_up(first_page_of(t) + n) for n in range(tile_pages)]
      return look_up(lax.div(t * block_kv + lax.rem(mosaic.thread(), jnp.int32(block_kv)), jnp.int32(p.page_size)))

    def scales(s, head, t, page_ids):
      """Scales of K and V of tile t, 0 where nobody sees a token; one row's in each thread, for `put_row_values`."""

      def of_rows(page_id, rows, key):
        is_seen = (key >= s.first_key) & (key < s.kv_len)
        return [jnp.where(is_seen, gmem[page_id, rows, head], 0.0) for gmem in scales_gmem]

      first = t * block_kv
      if not is_interpreted:
        key = first + lax.rem(mosaic.thread(), jnp.int32(block_kv))
        return of_rows(page_ids, lax.rem(key, jnp.int32(p.page_size)), key)
      size, row = block_kv // tile_pages, lax.rem(first, jnp.int32(p.page_size))
      keys = [first + n * size + jnp.arange(size) for n in range(tile_pages)]
      parts = [of_rows(page_id, pl.ds(row, size), key) for page_id, key in zip(page_ids, keys, strict=True)]
      return [jnp.concatenate(x) for x in zip(*parts, strict=True)]

    def nothing(columns):
      per_column = lambda value: mosaic.full((columns,), value, COLUMN)  # noqa: E731
      return mosaic.full((D, columns), 0.0), per_column(-jnp.inf), per_column(0.0)

    def compute(lane):
      k_ring, v_ring = rings_of(lane)

      def one_chunk(columns, is_folded, b, s, mine, head, chunk, carry):
        done, *state = carry

        def of_lane(x):
          """The lane's part, found anew: what dozens of products want to know of its place is not kept in registers."""
          return x.at[mosaic.anew(lane, interpret=is_interpreted)]

        def columns_of(x):
          return of_lane(x).at[pl.ds(0, columns)] if len(sizes) > 1 else of_lane(x)

        low, high = chunk_tiles(s, chunk)
        rows = Rows(s.first_token * H + head * group, s.query_len * group, group, H)
        if units is not None:
          first = jnp.where(s.unit < 0, rows.first, head * group)
          rows = rows._replace(first=first, index=units.tokens, at=s.unit * width)

        def put_scales(i, values):
          """Those of a chunk's tile, the i-th that the lane computes."""
          buffer = scale_smem[0].at[lane, lax.rem(i, jnp.int32(2))]
          columns_sm90.put_row_values(buffer, values, interpret=is_interpreted)

        @pl.when(chunk == mine[0])  # the lane's other chunks of the sequence have the same queries
        def _():
          plgpu.commit_smem()  # all have read the last ones
          to = columns_of(q_smem)
          mosaic.copy_rows(q_gmem, rows, to, num_threads=128, turned=p.has_scales, interpret=is_interpreted)

        if p.has_scales:
          pl.when(low < high)(lambda: put_scales(done, scales(s, head, low, scale_pages(s, low))))
        plgpu.commit_smem()

        def cut(scores, column):
          """-inf where a query does not see a key: query token i sees [i + offset - window, i + offset]."""
          key = column + plgpu.broadcasted_iota(jnp.int32, (block_kv,), 0, layout=ROW)
          first = jnp.where(key < s.kv_len, (key - s.offset) * group, MOST_COLUMNS)
          past = None if p.window is None else (key - s.offset + (p.window + 1)) * group
          return mosaic.keep(scores, first, past, interpret=is_interpreted)

        def one_tile(t, running, *, masked):
          acc, top, total, *page_ids = running
          i = done + t - low
          column = t * block_kv
          k_tile, v_tile = k_ring.tile(i), v_ring.tile(i)
          if p.has_scales:  # the next tile's scales arrive meanwhile, and where those of the one after it lie
            later = scales(s, head, jnp.minimum(t + 1, high - 1), page_ids[0])
            page_ids = (scale_pages(s, jnp.minimum(t + 2, high - 1)),)
            k_scales, v_scales = (scale_smem[0].at[lane, lax.rem(i, jnp.int32(2)), n] for n in range(2))
          k_ring.wait_full(i)
          if p.has_scales:
            keys = columns_sm90.widen(k_tile, turned=False, interpret=is_interpreted)
            scores = columns_sm90.product(keys, columns_of(q_smem), interpret=is_interpreted)
            scores = columns_sm90.scale_rows(scores, k_scales, interpret=is_interpreted)
          else:
            scores = columns_sm90.product(k_tile, columns_of(q_smem), interpret=is_interpreted)
          k_ring.release(i)
          if p.soft_cap is not None:
            scores = jnp.tanh(scores * (p.scale / p.soft_cap))
          if masked:
            scores = cut(scores, column)
          prob, (acc, top, total) = columns_sm90.softmax_step(
            scores, (acc, top, total), factor, of_lane(warps_smem), masked=masked, interpret=is_interpreted
          )
          if p.has_scales:
            prob = columns_sm90.scale_rows(prob, v_scales, interpret=is_interpreted)
          columns_sm90.put(prob.astype(dtype), columns_of(p_smem), interpret=is_interpreted)
          v_ring.wait_full(i)
          if p.has_scales:
            values = columns_sm90.widen(v_tile, turned=True, interpret=is_interpreted)
            put_scales(i + 1, later)
            plgpu.commit_smem()
            acc = columns_sm90.product(values, columns_of(p_smem), acc, interpret=is_interpreted)
          else:
            if masked:  # what nobody owns may be NaN, and 0 * NaN is NaN

              @pl.when((s.kv_len < column + block_kv) | (s.first_key > column))
              def _():
                before = None if p.window is None else s.first_key - column
                mosaic.zero_rows(v_tile, s.kv_len - column, before, interpret=is_interpreted)

            plgpu.commit_smem()
            acc = columns_sm90.product(v_tile, columns_of(p_smem), acc, turned=True, interpret=is_interpreted)
          v_ring.release(i)
          return acc, top, total, *page_ids

        # Tiles [begin, end) are seen whole by every query.
        begin, end = low, jnp.clip(lax.div(s.offset + 1, jnp.int32(block_kv)), low, high)
        if p.window is not None:
          begin = jnp.clip(cdiv(jnp.maximum(s.kv_len - 1 - p.window, 0), block_kv), low, high)
          end = jnp.maximum(begin, end)
        running: Any = nothing(columns)
        if p.has_scales:
          running = *running, scale_pages(s, jnp.minimum(low + 1, jnp.maximum(high, 1) - 1))
        for masked, start, stop in ((True, low, begin), (False, begin, end), (True, end, high)):
          if start is not stop:
            running = lax.fori_loop(start, stop, functools.partial(one_tile, masked=masked), running)
        acc, top, total = running[:3]
        plgpu.commit_smem()  # all have read what is over the warps
        result = acc, top, columns_sm90.total(total, of_lane(warps_smem), interpret=is_interpreted)
        if not is_folded:
          is_whole = s.count == 1 if units is None else (s.count == 1) & (s.unit < 0)
          if chunks.max_count > 1:
            pl.when(~is_whole)(lambda: write_part(b, s, chunk, head, rows.count, result))
            pl.when(is_whole)(lambda: write(s, head, rows, result))
          else:
            write(s, head, rows, result)
          return done + high - low, *state
        first, past = mine
        state = lax.cond((chunk == 0) | (first > 0), lambda: nothing(columns), lambda: tuple(state))
        state = mosaic.fold(state, result, factor, interpret=is_interpreted)
        is_whole = (first == 0) & (past == s.count)
        if units is not None:
          is_whole &= s.unit < 0
        is_part = (first > 0) | ((chunk == past - 1) & ~is_whole)
        pl.when(chunk == 0)(lambda: put_first(b * K + head, past))
        pl.when(is_whole & (chunk == past - 1))(lambda: write(s, head, rows, state))
        pl.when(is_part)(lambda: write_part(b, s, jnp.where(first > 0, chunk, 0), head, rows.count, state))
        return done + high - low, *state

      def put_first(index, past):
        if is_interpreted:
          firsts[0][index] = past
        else:
          mosaic.store_value(firsts[0], index, None, past, mosaic.thread() == 0)

      def write(s, head, rows, state):
        sink = None
        if sinks is not None:
          of_heads = Rows(head * group, s.query_len * group, group, 0)
          sink = with_sink(s, columns_sm90.load(sinks, of_heads, len(state[1]), interpret=is_interpreted))
        out, lse = mosaic.finish(state, sink, factor, axis=1, interpret=is_interpreted)
        store([(out_gmem, out.astype(dtype)), (lse_gmem, lse)], rows)

      def write_part(b, s, part, head, count, state):
        rows = Rows(((b * chunks.max_count + part) * K + head) * max_rows, count)
        if units is not None:
          first = jnp.where(s.unit < 0, rows.first, (part * K + head) * max_rows)
          rows = Rows(first, count, group, group, index=units.places, at=s.unit * width)
        store([*zip(parts, state, strict=True)], rows)

      # One size after the other: what one keeps in registers is not in the other's way.
      done = jnp.int32(0)
      for size in range(len(sizes)):
        columns = MOST_COLUMNS if is_interpreted else sizes[size]  # a CPU rounds a column by how many there are
        has_state = is_folded and size == 0
        state = nothing(columns) if has_state else ()
        done, *_ = over_chunks(lane, size, functools.partial(one_chunk, columns, has_state), (done, *state))

    if not is_interpreted:
      rings_sm90.start(k_barriers, v_barriers)

    @pl.when(warpgroup < lanes)
    def _():
      plgpu.set_max_registers(216, action="increase")
      compute(warpgroup)

    @pl.when(warpgroup == lanes)
    def _():
      plgpu.set_max_registers(72, action="decrease")  # a launch of 3 warpgroups has 504 a lane: 2 x 216 + 72

      @plgpu.warp_map
      def _(warp):
        pl.when(warp < lanes)(lambda: fetch(warp))

  def merge(part_gmem, top_gmem, total_gmem, firsts, starts, kv_lens, units, sinks, out_gmem, lse_gmem):
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

    done = 1  # chunks in the first part, of the sequence or of its unit
    if firsts is not None:
      done = firsts[where * K + head]  # nobody wrote that of a sequence which has nothing to do here
      done = jnp.where(is_wide(first), 1, done) if len(sizes) > 1 else done
    has_parts = has_unit | ((s.count > 1) & (s.count > done))
    pl.when(has_parts & (some_rows * rows_per_block < s.query_len * group))(lambda: fold_parts(done))

  rows_per_block = max(1, THREADS // D)
  # Where there can be long chunks too, hardly any block would have rows but those of the first token.
  row_blocks = cdiv(max_rows if p.max_query_len <= max_tokens(p) else group, rows_per_block)
  columns = MOST_COLUMNS if is_interpreted else sizes[-1]
  parts = () if chunks.max_count == 1 else (p.batch * chunks.max_count * K * max_rows,)
  params = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0)
  scratch = [
    mosaic.smem((lanes, columns, D), dtype),  # queries
    mosaic.smem((lanes, columns, block_kv), dtype),  # probabilities
    *(mosaic.smem((lanes * stages, block_kv, D), operands.k_pages.dtype) for _ in range(2)),
    plgpu.SMEM((lanes, mosaic.WARPS, columns), jnp.float32),
    *(rings_sm90.scratch(lanes * stages, tile_pages, interpret=is_interpreted) for _ in range(2)),
  ]
  if p.has_scales:  # of two tiles
    scratch.append(plgpu.SMEM((lanes, 2, 2, block_kv), jnp.float32))
  num_scratch = len(scratch)
  attend = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((T * H, D), dtype),
      jax.ShapeDtypeStruct((T * H,), jnp.float32),
      *(jax.ShapeDtypeStruct((n, D), jnp.float32) for n in parts),
      *(jax.ShapeDtypeStruct((n,), jnp.float32) for n in 2 * parts),
      *([jax.ShapeDtypeStruct(((p.batch + num_units) * K,), jnp.int32)] if is_folded else []),
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
    )(*parts, *([] if is_folded else [None]), *lens, sinks, out_ref, lse_ref)
    out, lse = jax.freeze(out_ref), jax.freeze(lse_ref)
  return out.reshape(T, H, D), lse.reshape(T, H)
