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

Chunks that several sequences share (`shared_prefixes`) are computed for as many of them at once as fit a tile: a unit,
whose queries and parts are theirs. Lanes take such chunks in turn, and segments are cut so that who has one more has
less of the line. Sequences' own chunks are a part each. The fold is the same, so is every bit. A cascade that merges
prefix and rest by LSE (FlashInfer, Ye et al. 2024) reads as little, but its results depend on who shares what.

Sequences of one query token have tiles of as few columns as these want, whoever else is there; those of several tokens,
and units, have wider ones, in a pass of its own, with queries as rows where they fill them (`rows_sm90`).

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

from paged_flash.kernels import columns_sm90, mosaic, rings_sm90, rows_sm90
from paged_flash.kernels.mosaic import COLUMN, LOG2_E, ROW, Rows, cdiv, divide
from paged_flash.kernels.problem import PagedOperands, PagedProblem
from paged_flash.kernels.rings_sm90 import Ring

MOST_COLUMNS = 64  # of a tile: query heads of a KV head, for some query tokens
CHUNK = 512  # tokens of a chunk, at least
ENOUGH_ITEMS = 256  # of one sequence: they occupy a GPU
ENOUGH_LANES = 128  # that fetch at the same time: they read almost as fast as memory can
WIDE_COST = 2  # of a tile of `MOST_COLUMNS`, in tiles of 8
COST = 1  # of a sequence besides its tiles, in tiles: its queries, and its result
AT_ONCE = 16  # parts that the second kernel reads at a time
THREADS = 128  # of a block of it
PER_THREAD = 4  # columns of a row of O, each with the weights that they have in common


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

  Those of one query token that share as many chunks, of the same size, with the same leader are a family; as many of a
  family as fit a tile are a unit. A chunk's result in a column depends on nothing but the column's query, so that
  sharing changes no bit.
  """

  chunks: Any  # i32[B], how many chunks of each sequence its unit computes; 0 if it is in none
  work: Any  # i32[B], chunks of all units of the family whose first sequence this is; 0 for others
  size: Any  # i32[B], sequences of each sequence's family
  place: Any  # i32[B], each sequence's place in an order in which families lie together
  tokens: Any  # i32[B], in this order, their query tokens
  parts: Any  # i32[B], in this order, where their parts begin, in groups of rows


def make_units(problem: PagedProblem, chunks: Chunks, block_kv: int, operands: PagedOperands) -> Units | None:
  """The units of a call, by what `operands.leaders` and `shared_pages` say; None where there can be none."""
  p = problem
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
  # All by sums, minima and maxima over small matrices: each is one kernel, in every step.
  members = jnp.sum(alike, 1, dtype=jnp.int32)
  first = jnp.min(jnp.where(alike, index, p.batch), 1)
  shared = jnp.where(members > 1, shared, 0)
  rank = jnp.where(members > 1, first, p.batch)
  is_before = (rank < rank[:, None]) | ((rank == rank[:, None]) & (index < index[:, None]))
  place = jnp.sum(is_before, 1, dtype=jnp.int32)
  rows = chunks.max_count * p.num_kv_heads * min(p.max_query_len, max_tokens(p))
  is_it = place == index[:, None]
  of_rows = [index if starts is None else starts[:-1], index * rows]
  tokens, parts = (jnp.max(jnp.where(is_it, x, 0), 1) for x in of_rows)
  work = jnp.where(first == index, shared * cdiv(members, max_tokens(p)), 0)
  return Units(shared, work, members, place, tokens, parts)


class Sequence(NamedTuple):
  """One sequence: its query tokens, which keys they see, and the tiles [low, high) and chunks of these keys.

  Or one of `Units`: the queries of its sequences, and the chunks that they share.
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
  unit: Any  # the place of its first sequence in `Units.tokens`; -1: it is a sequence


def sequence(
  problem: PagedProblem, chunks: Chunks, block_kv: int, starts: Any, kv_lens: Any, units: Units | None, b: Any
) -> Sequence:
  """Reads sequence b's lengths; `starts` is None where every sequence has one token."""
  p: PagedProblem = problem
  first, query_len = (b, 1) if starts is None else (starts[b], starts[b + 1] - starts[b])
  kv_len = kv_lens[b]
  first_key = 0 if p.window is None else jnp.maximum(kv_len - query_len - p.window, 0)
  low, high = lax.div(first_key, jnp.int32(block_kv)) if p.window is not None else 0, cdiv(kv_len, block_kv)
  chunk = chunks.size(high - low)
  count = jnp.maximum(1 if chunks.max_count == 1 else lax.div(high - low + chunk - 1, jnp.int32(chunk)), 1)
  if starts is not None:
    count = jnp.where((query_len > 0) & (query_len <= max_tokens(p)), count, 0)
  begin = 0 if units is None else units.chunks[b]
  return Sequence(b, first, query_len, kv_len, kv_len - query_len, first_key, low, high, chunk, count, begin, -1)


def shared_chunk(
  problem: PagedProblem, chunks: Chunks, block_kv: int, kv_lens: Any, units: Units, b: Any, n: Any
) -> tuple[Sequence, Any]:
  """The n-th of the chunks of a family, whose first sequence is b: its unit, and its number there.

  They are in order of their numbers: units meet the same pages at the same time, and find them in the L2 cache.
  """
  size, most = units.size[b], max_tokens(problem)
  num_units = jnp.maximum(cdiv(size, most), 1)
  number, unit = lax.div(n, num_units), lax.rem(n, num_units)
  count, chunk = units.chunks[b], chunks.size(cdiv(kv_lens[b], block_kv))
  query_len, shared = jnp.minimum(size - unit * most, most), count * chunk
  kv_len, place = shared * block_kv, units.place[b] + unit * most
  return Sequence(b, 0, query_len, kv_len, kv_len - 1, 0, 0, shared, chunk, count, 0, place), number


class Segments(NamedTuple):
  """The line of tiles of a KV head, sequence after sequence, `COST` after each, cut into segments, one for each lane.

  All are of the same size but the first ones, whose lanes compute a chunk of a unit more.
  """

  size: Any  # tiles
  count: int  # that lanes are ready for; the line may end before
  first_size: Any = 0
  first: Any = 0  # how many are of that size

  @classmethod
  def cut(cls, count: int, batch: int, num_kv_heads: int, enough: int, total: Any, longest: Any) -> "Segments":
    """Of a line of `total` tiles of `batch` sequences, the longest's being `longest`.

    Sequences of about the same length are not cut if `enough` lanes fetch at a time all the same.
    """
    size = cdiv(jnp.maximum(total - COST, 0), count)  # nothing begins in the last cost
    longest = jnp.maximum(longest, 1)
    is_enough = (longest * enough <= total * num_kv_heads) & (longest * batch <= 2 * total)
    return cls(jnp.where(is_enough, lax.div(size + longest - 1, longest) * longest, size), count)

  def beside(self, total: Any, shared: Any, cost: Any) -> "Segments":
    """Those of the same line for lanes that compute `shared` chunks of units in turn as well, `cost` tiles in all."""
    each, more = lax.div(shared, jnp.int32(self.count)), lax.rem(shared, jnp.int32(self.count))
    of_one = cdiv(cost, jnp.maximum(shared, 1))
    first_size = jnp.maximum(cdiv(total + cost, self.count) - (each + 1) * of_one, 0)
    size = cdiv(jnp.maximum(total - more * first_size, 0), self.count - more)
    values = zip((size, first_size, more), (self.size, 0, 0), strict=True)
    size, first_size, more = (jnp.where(shared > 0, x, y) for x, y in values)
    return Segments(size, self.count, first_size, more)

  def bounds(self, n: Any) -> tuple[Any, Any]:
    """The tiles [low, high) of the n-th."""
    if isinstance(self.first, int):  # known when tracing: there are no units
      return n * self.size, (n + 1) * self.size
    begin = lambda n: jnp.minimum(n, self.first) * self.first_size + jnp.maximum(n - self.first, 0) * self.size  # noqa: E731
    return begin(n), begin(n + 1)


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

  @jax.named_scope("find")
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
  units = make_units(p, chunks, block_kv, operands)
  look = functools.partial(sequence, p, chunks, block_kv)
  # Widened keys are a left operand, whose rows they must be.
  has_rows = sizes[0] < sizes[-1] == MOST_COLUMNS and not p.has_scales
  # Two accumulators of head_dim 128 and 64 columns are more than the registers of a warpgroup.
  is_folded = chunks.max_count > 1 and D * sizes[0] <= 64 * MOST_COLUMNS

  def is_wide(s):
    """Whether a sequence or unit wants the second size of tiles, whose chunks are a part each."""
    return s.query_len * group > sizes[0]

  @jax.named_scope("lay")
  def lay(starts, kv_lens, units) -> tuple[Line, Segments, Any, Any]:
    """The line of what sequences have for themselves, its segments, and the line of families and what they share."""

    def own(b):
      s = look(starts, kv_lens, units, b)
      return jnp.where(s.count > s.begin, jnp.maximum(s.high - s.low - s.begin * s.chunk, 1) + COST, 0)

    line = Line(p.batch, own, interpret=is_interpreted)
    enough = num_lanes if p.has_scales else ENOUGH_LANES  # widening keeps a lane busier than memory does
    total, longest = line.measure()
    segments = Segments.cut(num_segments, p.batch, K, enough, total, longest)
    if units is None:
      return line, segments, None, 0
    families = Line(p.batch, lambda b: units.work[b], interpret=is_interpreted)
    costs = lambda b: units.work[b] * chunks.size(cdiv(kv_lens[b], block_kv)) * WIDE_COST  # noqa: E731
    (shared, _), (cost, _) = families.measure(), Line(p.batch, costs, interpret=is_interpreted).measure()
    return line, segments.beside(total, shared, cost), families, shared

  def chunks_before(s, tiles):
    """The first chunk that does not begin in the first `tiles` tiles of a sequence on the line."""
    return s.begin + jnp.clip(lax.div(tiles + s.chunk - 1, jnp.int32(s.chunk)), 0, s.count - s.begin)

  def store(pairs, rows, in_rows):
    if in_rows:
      for ref, x in pairs:
        mosaic.store_rows(ref, rows, x, interpret=is_interpreted)
    else:
      columns_sm90.store(pairs, rows, turned=p.has_scales, interpret=is_interpreted)

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
      """carry = body(sequence or unit, mine, head, chunk, carry) for all chunks of a lane with that size of tiles.

      Of each sequence or unit, the chunks in the range `mine` [first, past) are the lane's. Returns the last carry.
      """
      line, segments, families, shared = lay(*lens)
      # Narrow tiles are of sequences only, and wide ones of units only where no sequence has several tokens.
      has_units, has_sequences = size == len(sizes) - 1 and units is not None, size == 0 or max_rows > sizes[0]

      def of_segment(n, carry):
        segment, head = divide(lane * num_blocks + block + n * num_lanes, K)
        num_shared = first_b = past_b = place = jnp.int32(0)
        low = high = 0
        if has_sequences:
          low, high = segments.bounds(segment)
          (first_b, place), (last, _) = line.find(low, high - 1)
          past_b = jnp.minimum(last + 1, p.batch)
        if has_units:
          num_shared = cdiv(jnp.maximum(shared - segment, 0), num_segments)

        def shared_one(n):
          place = segment + n * num_segments
          ((b, begin),) = families.find(place)
          s, chunk = shared_chunk(p, chunks, block_kv, kv_lens, units, b, place - begin)
          return s, chunk, chunk + 1

        def own_one(b, place):
          s = look(*lens, b)
          first, past = chunks_before(s, low - place), chunks_before(s, high - place)
          if len(sizes) > 1:
            past = jnp.where(is_wide(s) == (size > 0), past, first)
          return s, first, past

        def one(i, carry):
          place, carry = carry
          b = first_b + i - num_shared
          if not has_units:
            found = own_one(b, place)
          elif not has_sequences:
            found = shared_one(i)
          else:
            both = shared_one(jnp.minimum(i, num_shared - 1)), own_one(jnp.maximum(b, 0), place)
            found = jax.tree.map(functools.partial(jnp.where, i < num_shared), *both)
          s, first, past = found
          carry = lax.fori_loop(first, past, functools.partial(body, s, (first, past), head), carry)
          if has_sequences:
            place += jnp.where(i < num_shared, 0, line.length(jnp.maximum(b, 0))) if has_units else line.length(b)
          return place, carry

        return lax.fori_loop(0, num_shared + jnp.maximum(past_b - first_b, 0), one, (place, carry))[1]

      count = cdiv(jnp.maximum(num_segments * K - (lane * num_blocks + block), 0), num_lanes)
      return lax.fori_loop(0, count, of_segment, carry)

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

      def one_chunk(s, mine, head, chunk, done):
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
      for size in reversed(range(len(sizes))):
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

    def nothing(columns, in_rows):
      if in_rows:
        return rows_sm90.nothing(D)
      per_column = lambda value: mosaic.full((columns,), value, COLUMN)  # noqa: E731
      return mosaic.full((D, columns), 0.0), per_column(-jnp.inf), per_column(0.0)

    def compute(lane):
      k_ring, v_ring = rings_of(lane)

      def one_chunk(columns, is_folded, in_rows, s, mine, head, chunk, carry):
        done, *state = carry

        def of_lane(x):
          """The lane's part, found anew: what dozens of products want to know of its place is not kept in registers."""
          return x.at[mosaic.anew(lane, interpret=is_interpreted)]

        def columns_of(x):
          return of_lane(x).at[pl.ds(0, columns)] if len(sizes) > 1 else of_lane(x)

        low, high = chunk_tiles(s, chunk)
        rows = Rows(s.first_token * H + head * group, s.query_len * group, group, H)
        if not isinstance(s.unit, int):
          first = jnp.where(s.unit < 0, rows.first, head * group)
          rows = rows._replace(first=first, index=units.tokens, at=s.unit)

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
          if in_rows:
            row = plgpu.broadcasted_iota(jnp.int32, (MOST_COLUMNS,), 0, layout=ROW)
            last = lax.div(row, jnp.int32(group)) + (s.offset - column)
            first = None if p.window is None else last - p.window
            return mosaic.keep(scores, first, jnp.minimum(last + 1, s.kv_len - column), interpret=is_interpreted)
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
          elif in_rows:
            scores = rows_sm90.scores(of_lane(q_smem), k_tile, interpret=is_interpreted)
          else:
            scores = columns_sm90.product(k_tile, columns_of(q_smem), interpret=is_interpreted)
          k_ring.release(i)
          if p.soft_cap is not None:
            scores = jnp.tanh(scores * (p.scale / p.soft_cap))
          if masked:
            scores = cut(scores, column)
          state, options = (acc, top, total), dict(masked=masked, interpret=is_interpreted)
          if in_rows:
            prob, (acc, top, total) = rows_sm90.softmax_step(scores, state, factor, **options)
          else:
            prob, (acc, top, total) = columns_sm90.softmax_step(scores, state, factor, of_lane(warps_smem), **options)
          if p.has_scales:
            prob = columns_sm90.scale_rows(prob, v_scales, interpret=is_interpreted)
          prob = prob.astype(dtype)
          if not in_rows:
            columns_sm90.put(prob, columns_of(p_smem), interpret=is_interpreted)
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

            if masked or not in_rows:
              plgpu.commit_smem()
            if in_rows:
              acc = rows_sm90.add_values(acc, prob, v_tile, interpret=is_interpreted)
            else:
              acc = columns_sm90.product(v_tile, columns_of(p_smem), acc, turned=True, interpret=is_interpreted)
          v_ring.release(i)
          return acc, top, total, *page_ids

        # Tiles [begin, end) are seen whole by every query.
        begin, end = low, jnp.clip(lax.div(s.offset + 1, jnp.int32(block_kv)), low, high)
        if p.window is not None:
          begin = jnp.clip(cdiv(jnp.maximum(s.kv_len - 1 - p.window, 0), block_kv), low, high)
          end = jnp.maximum(begin, end)
        running: Any = nothing(columns, in_rows)
        if p.has_scales:
          running = *running, scale_pages(s, jnp.minimum(low + 1, jnp.maximum(high, 1) - 1))
        for masked, start, stop in ((True, low, begin), (False, begin, end), (True, end, high)):
          if start is not stop:
            running = lax.fori_loop(start, stop, functools.partial(one_tile, masked=masked), running)
        acc, top, total = running[:3]
        if in_rows:
          result = acc, top, rows_sm90.total(total, interpret=is_interpreted)
        else:
          plgpu.commit_smem()  # all have read what is over the warps
          result = acc, top, columns_sm90.total(total, of_lane(warps_smem), interpret=is_interpreted)
        if not is_folded:
          is_whole = (s.count == 1) & (s.unit < 0)
          if chunks.max_count > 1:
            pl.when(~is_whole)(lambda: write_part(s, chunk, head, rows.count, result, in_rows))
            pl.when(is_whole)(lambda: write(s, head, rows, result, in_rows))
          else:
            write(s, head, rows, result, in_rows)
          return done + high - low, *state
        first, past = mine
        state = lax.cond((chunk == 0) | (first > 0), lambda: nothing(columns, False), lambda: tuple(state))
        state = mosaic.fold(state, result, factor, interpret=is_interpreted)
        is_whole = (first == 0) & (past == s.count)
        is_part = (first > 0) | ((chunk == past - 1) & ~is_whole)
        pl.when(chunk == 0)(lambda: put_first(s.row * K + head, past))
        pl.when(is_whole & (chunk == past - 1))(lambda: write(s, head, rows, state))
        pl.when(is_part)(lambda: write_part(s, jnp.where(first > 0, chunk, 0), head, rows.count, state))
        return done + high - low, *state

      def put_first(index, past):
        if is_interpreted:
          firsts[0][index] = past
        else:
          mosaic.store_value(firsts[0], index, None, past, mosaic.thread() == 0)

      @jax.named_scope("write")
      def write(s, head, rows, state, in_rows=False):
        sink = None
        if sinks is not None:
          of_heads = Rows(head * group, s.query_len * group, group, 0)
          if in_rows:
            sink = mosaic.load_rows(sinks, of_heads, interpret=is_interpreted)
          else:
            sink = columns_sm90.load(sinks, of_heads, len(state[1]), interpret=is_interpreted)
          sink = with_sink(s, sink)
        out, lse = mosaic.finish(state, sink, factor, axis=0 if in_rows else 1, interpret=is_interpreted)
        store([(out_gmem, out.astype(dtype)), (lse_gmem, lse)], rows, in_rows)

      @jax.named_scope("write_part")
      def write_part(s, part, head, count, state, in_rows=False):
        rows = Rows(((s.row * chunks.max_count + part) * K + head) * max_rows, count)
        if not isinstance(s.unit, int):
          first = jnp.where(s.unit < 0, rows.first, (part * K + head) * max_rows)
          rows = Rows(first, count, group, group, index=units.parts, at=s.unit)
        store([*zip(parts, state, strict=True)], rows, in_rows)

      # One size after the other: what one keeps in registers is not in the other's way.
      done = jnp.int32(0)
      for size in reversed(range(len(sizes))):
        columns = MOST_COLUMNS if is_interpreted else sizes[size]  # a CPU rounds a column by how many there are
        has_state, in_rows = is_folded and size == 0, has_rows and size == 1
        state = nothing(columns, False) if has_state else ()
        of_size = functools.partial(one_chunk, columns, has_state, in_rows)
        done, *_ = over_chunks(lane, size, of_size, (done, *state))

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
    b = lax.axis_index("b")
    head, some_rows = divide(lax.axis_index("rows"), row_blocks)
    s = look(*lens, b)
    has_unit = s.begin > 0

    def fold_parts(done):
      def one_row(row, columns):
        def part(chunk):
          index = ((b * chunks.max_count + chunk) * K + head) * max_rows + row
          return *(part_gmem[index, x] for x in columns), top_gmem[index], total_gmem[index]

        def fold(state, more):
          """Of several accumulators with one greatest score and one sum."""
          ends = state[-2:], more[-2:]
          pairs = [mosaic.fold((x, *ends[0]), (y, *ends[1]), factor, interpret=is_interpreted)
                   for x, y in zip(state[:-2], more[:-2], strict=True)]  # fmt: skip
          return *(acc for acc, *_ in pairs), *pairs[0][1:]

        def some(step, state):
          first = done + step * AT_ONCE
          loaded = [part(jnp.minimum(first + n, s.count - 1)) for n in range(AT_ONCE)]
          for n, x in enumerate(loaded):
            state = tuple(jnp.where(first + n < s.count, y, z) for y, z in zip(fold(state, x), state, strict=True))
          return state

        state = lax.fori_loop(0, cdiv(s.count - done, AT_ONCE), some, part(0))
        token, query_head = divide(row, group)
        query_head += head * group
        sink = None if sinks is None else with_sink(s, sinks[query_head])
        finished = [mosaic.finish((x, *state[-2:]), sink, factor, interpret=is_interpreted) for x in state[:-2]]
        return (s.first_token + token) * H + query_head, [out.astype(dtype) for out, _ in finished], finished[0][1]

      def of_rows(some_rows):
        if is_interpreted:

          @pl.loop(0, rows_per_block)
          def _(n):
            row = some_rows * rows_per_block + n

            @pl.when(row < s.query_len * group)
            def _():
              index, (out,), lse = one_row(row, [slice(None)])
              out_gmem[index, :] = out
              lse_gmem[index] = lse

        else:
          n, column = divide(mosaic.thread(), D // PER_THREAD)
          row = some_rows * rows_per_block + n
          is_alive, columns = row < s.query_len * group, [column + n * (D // PER_THREAD) for n in range(PER_THREAD)]
          index, outs, lse = one_row(jnp.where(is_alive, row, 0), columns)
          for out, x in zip(outs, columns, strict=True):
            mosaic.store_value(out_gmem, index, x, out, is_alive)
          mosaic.store_value(lse_gmem, index, None, lse, is_alive & (column == 0))

      if row_blocks * rows_per_block >= max_rows:
        of_rows(some_rows)
      else:
        pl.loop(some_rows, cdiv(s.query_len * group, rows_per_block), step=row_blocks)(of_rows)

    done = 1  # chunks in the first part
    if firsts is not None:
      done = firsts[b * K + head]  # nobody wrote that of a sequence which has nothing to do here
      done = jnp.where(has_unit | is_wide(s), 1, done) if len(sizes) > 1 else done
    has_parts = has_unit | ((s.count > 1) & (s.count > done))
    pl.when(has_parts & (some_rows * rows_per_block < s.query_len * group))(lambda: fold_parts(done))

  rows_per_block = THREADS * PER_THREAD // D
  # Where there can be long chunks too, hardly any block would have rows but those of the first token.
  row_blocks = cdiv(max_rows if p.max_query_len <= max_tokens(p) else group, rows_per_block)
  columns, most_in_columns = (MOST_COLUMNS if is_interpreted else x for x in (sizes[-1], sizes[0 if has_rows else -1]))
  parts = () if chunks.max_count == 1 else (p.batch * chunks.max_count * K * max_rows,)
  params = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0)
  scratch = [
    mosaic.smem((lanes, columns, D), dtype),  # queries
    mosaic.smem((lanes, most_in_columns, block_kv), dtype),  # probabilities
    *(mosaic.smem((lanes * stages, block_kv, D), operands.k_pages.dtype) for _ in range(2)),
    plgpu.SMEM((lanes, mosaic.WARPS, most_in_columns), jnp.float32),
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
      *([jax.ShapeDtypeStruct((p.batch * K,), jnp.int32)] if is_folded else []),
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
      grid=(p.batch, K * row_blocks),
      grid_names=("b", "rows"),
      num_threads=1,
      thread_name="wg",
      compiler_params=params,
      interpret=interpret,
    )(*parts, *([] if is_folded else [None]), *lens, sinks, out_ref, lse_ref)
    out, lse = jax.freeze(out_ref), jax.freeze(lse_ref)
  return out.reshape(T, H, D), lse.reshape(T, H)
