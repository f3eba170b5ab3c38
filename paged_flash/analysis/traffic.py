"""How many bytes one call of the Hopper forward kernel moves, counted from its own schedule of tiles.

Two levels. What multiprocessors ask of the L2 cache follows from the tiles alone and is exact. What the L2 cache asks
of device memory (HBM) depends on what it still holds; the model is a least-recently-used cache of whole tiles, walked
through the tiles of all blocks in the order in which they are wanted if a KV tile takes every block the same time.

Dao et al. 2022, Theorem 2: standard attention makes Theta(N d + N^2) accesses to slow memory, FlashAttention
Theta(N^2 d^2 / M), where M is the size of fast memory. With shared memory as the fast one, the latter is what we count
at the L2 cache; larger tiles of queries save there. Behind the L2 cache little more than every operand once is left,
provided that blocks which run together share their K and V. The scores of standard attention fit no cache.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from paged_flash.analysis.memory import human_bytes
from paged_flash.kernels import flash_forward_sm90 as sm90
from paged_flash.kernels.problem import FlashProblem

L2_BYTES = 50 * 2**20  # of an H100 or H200
_LSE_BYTES = 4


class Moved(NamedTuple):
  """Bytes in both directions."""

  read: int
  written: int

  @property
  def total(self) -> int:
    return self.read + self.written


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashTraffic:
  """Bytes that one call of the forward kernel moves."""

  smem: int  # landing in the shared memory of all blocks, with the zeros past the ends
  l2: Moved  # between multiprocessors and L2 cache; the blocks of a cluster read K and V once for all of them
  hbm: Moved  # between L2 cache and device memory, by the model
  still_in_l2: int  # of hbm.written, what may leave the L2 cache only after the kernel's end
  compulsory: Moved  # every operand once

  def __str__(self) -> str:
    return (
      f"HBM {human_bytes(self.hbm.total)}, {self.hbm.total / self.compulsory.total:.2f} x every operand once; "
      f"L2 {human_bytes(self.l2.total)}; shared memory {human_bytes(self.smem)}"
    )


def flash_traffic(
  problem: FlashProblem, tiles: Mapping[str, int], *, order: sm90.Order | None = None, l2_bytes: int = L2_BYTES
) -> FlashTraffic:
  """Counts what the forward kernel moves, the L2 cache being empty at first.

  Not counted: what XLA copies around the kernel where a length is no multiple of 8, and the schedule's few KiB.

  Args:
    problem: what the kernel computes.
    tiles: keyword arguments of `flash_forward_sm90.forward`, such as `tuning.tiles(problem, "sm90")`.
    order: another order of items than the kernel's (`kernel_order`), to see what it would cost.
    l2_bytes: size of the L2 cache.

  Raises:
    ValueError: if the problem has lengths or segments, which are known only when it runs.

  Example:
    For `problem` of one sequence of 16384, 16 heads of 128, full attention: operands of 256 MiB.

        str(flash_traffic(problem, tuning.tiles(problem, "sm90")))
        # 'HBM 257 MiB, 1.00 x every operand once; L2 8.127 GiB; shared memory 16.06 GiB'
  """
  p = problem
  if given := [name for name in ("query_lens", "kv_lens", "segments") if getattr(p, f"has_{name}")]:
    raise ValueError(f"problem must have no lengths and no segments, known only when it runs; got {', '.join(given)}")
  cluster, block_kv = tiles.get("cluster", 1), tiles["block_kv"]
  rows = sm90.ROWS * tiles["num_wgs"] * cluster  # of queries, an item's
  order = order or sm90.kernel_order(p, rows)
  items = order.query_tiles * p.batch * p.num_heads
  schedule = sm90.make_schedule(p, order, rows, block_kv, min(tiles.get("num_blocks", 132) // cluster, items))
  head, tile = order.place(np.arange(items))
  visits = sm90.kv_tiles(p, rows, block_kv)[tile]  # i32[items], of KV tiles

  size = jnp.dtype(p.dtype).itemsize
  kv_row = (p.head_dim + p.value_dim) * size
  kv_bytes = _rows_of_tiles(p.kv_len, block_kv) * kv_row
  query_rows = _rows_of_tiles(p.query_len, rows)[tile]
  query_bytes, out_bytes = query_rows * p.head_dim * size, query_rows * (p.value_dim * size + _LSE_BYTES)

  # Every tile has a number, first all of K and V, then items' queries, then items' outputs; every access its time.
  visit = np.repeat(np.arange(items), visits)  # the item of each visit of a KV tile
  step = np.arange(len(visit)) - np.repeat(np.cumsum(visits) - visits, visits)
  kv_tile = _last_kv_tile(p, rows, block_kv)[tile][visit] - step
  start, first_query = _starts(schedule, visits), len(kv_bytes) * p.batch * p.num_kv_heads
  first_out = first_query + items
  names = (
    first_query + np.arange(items),
    head[visit] // (p.num_heads // p.num_kv_heads) * len(kv_bytes) + kv_tile,
    first_out + np.arange(items),
  )
  sizes = (query_bytes, kv_bytes[kv_tile], out_bytes)
  times = (start, start[visit] + step, start + visits)
  wanted = np.argsort(np.concatenate(times), kind="stable")
  name, each = (np.concatenate(x)[wanted].tolist() for x in (names, sizes))
  hbm, still_in_l2 = _through_cache(zip(name, each, strict=True), first_out, l2_bytes)
  return FlashTraffic(
    smem=items * rows * p.head_dim * size + len(visit) * cluster * block_kv * kv_row,
    l2=Moved(int(query_bytes.sum() + kv_bytes[kv_tile].sum()), int(out_bytes.sum())),
    hbm=hbm,
    still_in_l2=still_in_l2,
    compulsory=compulsory_traffic(p),
  )


def compulsory_traffic(problem: FlashProblem) -> Moved:
  """Every operand once: Q, K and V read, the output and the LSE written."""
  p, size = problem, jnp.dtype(problem.dtype).itemsize
  queries, keys = p.batch * p.query_len * p.num_heads, p.batch * p.kv_len * p.num_kv_heads
  read = (queries * p.head_dim + keys * (p.head_dim + p.value_dim)) * size
  return Moved(read, queries * (p.value_dim * size + _LSE_BYTES))


def naive_traffic(problem: FlashProblem, *, score_bytes: int = 4) -> Moved:
  """The least that attention with the whole score matrix moves through device memory (Dao et al. 2022, Algorithm 0).

  Three passes, each reading and writing everything once: S = Q K^T (S written), P = softmax(S) (S read, P written),
  O = P V (P read). P has the inputs' dtype, as in `jax.nn.dot_product_attention`. Causality saves nothing.

  Args:
    problem: what is computed.
    score_bytes: of one element of S: 4 for float32, 2 where the product is rounded to the inputs' dtype.

  Example:
    With 2 bytes for S and P the four passes over N x N move 8 bytes for each score.
  """
  p, size = problem, jnp.dtype(problem.dtype).itemsize
  scores = p.batch * p.num_heads * p.query_len * p.kv_len * (score_bytes + size)
  least = compulsory_traffic(p)
  lse = p.batch * p.query_len * p.num_heads * _LSE_BYTES  # which it does not write
  return Moved(least.read + scores, least.written - lse + scores)


def _rows_of_tiles(length: int, block: int) -> np.ndarray:
  """i64[tiles], rows of each tile that are there; the kernel's arrays are padded to a multiple of 8."""
  starts = np.arange(0, length, block)
  return np.minimum(block, length + -length % 8 - starts)


def _last_kv_tile(problem: FlashProblem, rows: int, block_kv: int) -> np.ndarray:
  """i64[query tiles], the KV tile that each tile of queries visits first."""
  starts = np.arange(0, problem.query_len, rows)
  high = sm90.Positions(problem, None, None, None).high(np.minimum(starts + rows, problem.query_len) - 1)
  return (np.maximum(high, 1) + np.zeros_like(starts) - 1) // block_kv


def _starts(schedule: np.ndarray, visits: np.ndarray) -> np.ndarray:
  """f64[items], when each item begins, in units of a KV tile, by the costs that the schedule was made with."""
  start = np.empty(len(visits))
  for count, *row in schedule:
    mine = np.array(row[:count], int)
    cost = visits[mine] + sm90.ITEM_COST
    start[mine] = np.cumsum(cost) - cost
  return start


def _through_cache(accesses: Iterable[tuple[int, int]], first_written: int, capacity: int) -> tuple[Moved, int]:
  """What a least-recently-used cache, empty at first, moves; and how much of what was written it holds at the end.

  Args:
    accesses: (tile, its bytes); tiles from `first_written` on are written, whole, the others read.
    first_written: see above.
    capacity: bytes.
  """
  held: collections.OrderedDict[int, int] = collections.OrderedDict()
  read = written = room_taken = 0
  for tile, size in accesses:
    if tile in held:
      held.move_to_end(tile)
      continue
    held[tile] = size
    room_taken += size
    if tile < first_written:
      read += size
    else:
      written += size
    while room_taken > capacity:
      room_taken -= held.popitem(last=False)[1]
  return Moved(read, written), sum(size for tile, size in held.items() if tile >= first_written)
