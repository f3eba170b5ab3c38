"""What a compute warpgroup of the forward kernels for Hopper GPUs does: attention of its 64 rows, item after item.

An item is a tile of queries and the KV tiles that they see. A producer warpgroup fills rings of tiles (`Tiles`); each
compute warpgroup takes 64 rows of every item. Scores live in registers only.

  KV tiles from the last to the first (the masked ones come first):
    S = Q K^T of tile i+1     issued together with
    O += P V of tile i        so the tensor cores have work while
    P = softmax(S)            runs on the other units, and warpgroups take turns (`Turn`)

This is the schedule of FlashAttention-3 (Shah et al. 2024, Algorithm 2 and section 3.1), the softmax that of Dao et al.
2022, Algorithm 1, in the log2 domain: their m is `row_max`, the running maximum of the raw scores, and l `row_sum`.

The pipeline does not stop where an item ends: the scores of the next one's first KV tile are issued together with the
last O += P V of this one, so its output leaves while the tensor cores work. O is rescaled only when the maximum has
grown by more than 2^8, which after the first tiles is rare.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_flash.kernels import mosaic
from paged_flash.kernels.items_sm90 import Claims, Listed, Told
from paged_flash.kernels.mosaic import LOG2_E, ROW

ROWS = 64  # query rows of one warpgroup


class Tiles(NamedTuple):
  """Tiles in shared memory, and barriers that say which are full and which may be overwritten."""

  q_smem: Any  # [query_stages, num_wgs * ROWS, D]
  k_smem: Any  # [stages, block_kv, D]
  v_smem: Any  # [stages, block_kv, Dv]
  q_full: Any
  q_empty: Any
  k_full: Any
  k_empty: Any
  v_full: Any
  v_empty: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
  """The loop of one compute warpgroup; what the kernels do differently are functions.

  An item is whatever `item` returns: it has `low` < `high`, its KV tiles. Of these n tiles, counted from the last,
  `cut` is wanted for the first, if anything is masked, for [1, begin) and for [end, n).
  """

  dtype: Any
  num_wgs: int
  scale: float
  soft_cap: float | None
  masks_right: bool  # some rows may not see the end of their first KV tiles
  masks_left: bool  # or the beginning of the last
  masks_inside: bool  # or anything of any
  interpret: bool
  item: Callable[[Any], Any]  # the item of an index
  # (item, first key, slot of the tile of K, scores [ROWS, block_kv]): -inf where masked.
  cut: Callable[[Any, Any, Any, jax.Array], jax.Array]
  ends: Callable[[Any], tuple[Any, Any, Any]]  # of an item: (begin, end, n)
  write: Callable[[Any, jax.Array, jax.Array, jax.Array], None]  # (item, O, row_max, row_sum), unfinished
  # Puts the warpgroup's queries of the first item in their place, if nobody else does.
  put_first: Callable[[Any], None] | None = None

  @property
  def factor(self) -> float:
    """Of the scores as `softmax` sees them: their logarithm to the base 2."""
    return LOG2_E * (self.scale if self.soft_cap is None else self.soft_cap)


def query_in_registers(num_wgs: int, head_dim: int, *, interpret: bool) -> bool:
  """Whether compute warpgroups keep an item's queries, so that the next item's may come while it is computed."""
  return num_wgs < 3 and head_dim <= 128 and not interpret


def attend(loop: Loop, tiles: Tiles, warpgroup: jax.Array, items: Listed | Claims | Told) -> None:
  """Attention of the warpgroup's rows of all items of a block."""
  if isinstance(items, Listed):
    pl.when(items.count > 0)(lambda: _attend(loop, tiles, warpgroup, items, items.at(0)))
  else:
    first = items.listen(jnp.int32(0))
    pl.when(items.is_one(first))(lambda: _attend(loop, tiles, warpgroup, items, first))


def _attend(loop: Loop, tiles: Tiles, warpgroup: jax.Array, items: Listed | Claims | Told, first: Any) -> None:
  q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = tiles
  (query_stages, _, head_dim), (stages, block_kv, value_dim) = q_smem.shape, v_smem.shape
  in_registers, factor = query_in_registers(loop.num_wgs, head_dim, interpret=loop.interpret), loop.factor
  first_masked = loop.masks_right or loop.masks_left or loop.masks_inside
  turn = mosaic.Turn(warpgroup, loop.num_wgs, interpret=loop.interpret)
  turn.start()
  mine = pl.ds(warpgroup * ROWS, ROWS)

  def ring(n):
    return lax.rem(n, jnp.int32(stages))

  @jax.named_scope("query")
  def take_query(step):
    """The step's queries: in registers where they fit, else where they lie."""
    slot = lax.rem(step, jnp.int32(query_stages))
    plgpu.barrier_wait(q_full.at[slot])
    if not in_registers:
      return None
    query = plgpu.load(q_smem.at[slot, mine], layout=plgpu.Layout.WGMMA)
    plgpu.barrier_arrive(q_empty.at[slot])
    return query

  def lhs(query, step):
    return query if in_registers else q_smem.at[lax.rem(step, jnp.int32(query_stages)), mine]

  @jax.named_scope("softmax")
  def softmax(work, i, k, s, row_max, row_sum, masked):
    """P of the work's tile i (slot k), not yet divided by row_sum; new statistics; the factor of what came before."""
    column = (work.high - 1 - i) * block_kv
    if loop.soft_cap is not None:
      s = jnp.tanh(s * (loop.scale / loop.soft_cap))
    if masked:
      s = loop.cut(work, column, k, s)
    # The maximum follows only jumps of more than 2^8: most tiles then leave O as it is.
    new_max = jnp.maximum(row_max, s.max(axis=1))
    jumps = (new_max - row_max) * factor > 8.0
    new_max = jnp.where(jumps, new_max, row_max)
    shift = new_max * factor
    if masked:
      shift = jnp.where(new_max == -jnp.inf, 0.0, shift)  # a row that has seen nothing yet
    # Exactly 1 without a jump, which an fma of the difference is not.
    alpha = jnp.where(jumps, jnp.exp2(row_max * factor - shift), 1.0)
    prob, sums = mosaic.exponentials(s, factor, shift, interpret=loop.interpret)
    return prob, new_max, row_sum * alpha + sums, alpha

  def fresh():
    return mosaic.full((ROWS,), -jnp.inf, ROW), mosaic.full((ROWS,), 0.0, ROW)

  def scores(query, k):
    plgpu.barrier_wait(k_full.at[k])
    return mosaic.matmul(query, k_smem.at[k].T)

  def values(acc, prob, v):
    plgpu.barrier_wait(v_full.at[v])
    acc = mosaic.add_matmul(acc, prob, v_smem.at[v], interpret=loop.interpret)
    plgpu.barrier_arrive(v_empty.at[v])
    return acc

  @jax.named_scope("products")
  def overlapped(query, k, acc, prob, v, soften):
    """O + P V of one tile, and `soften` of the scores of the next: (O, P, row_max, row_sum, alpha)."""
    if loop.interpret:
      softened = soften(scores(query, k))
      acc = values(acc, prob, v)
      plgpu.barrier_arrive(k_empty.at[k])
      return acc, *softened

    def products(refs):
      acc_ref, *out_refs = refs
      plgpu.barrier_wait(k_full.at[k])
      turn.wait()
      s = mosaic.begin_scores(query, k_smem.at[k])
      plgpu.barrier_wait(v_full.at[v])
      plgpu.wgmma(acc_ref, prob, v_smem.at[v])
      turn.pass_on()
      plgpu.wgmma_wait(1)
      out = soften(s)
      for ref, x in zip(out_refs, out, strict=True):
        ref[...] = x
      plgpu.barrier_arrive(k_empty.at[k + mosaic.after(out[2])])  # ptxas must not wait for O before the softmax

    row_max, row_sum = fresh()
    start = (mosaic.ACC.init(acc), mosaic.full((ROWS, block_kv), 0.0), row_max, row_sum, row_sum)
    acc, *out = pl.run_state(products)(start)
    plgpu.barrier_arrive(v_empty.at[v])
    return acc, *out

  def one_item(step, index, carry):
    """Everything of an item after the softmax of its first tile, and that of the next item's first tile."""
    done, query, row_max, row_sum, prob = carry
    work, upcoming = loop.item(index), None
    if isinstance(items, Listed):  # it is read from global memory meanwhile
      has_next, upcoming = step + 1 < items.count, items.at(jnp.minimum(step + 1, items.count - 1))

    def advance(i, carry, *, masked):
      acc, row_max, row_sum, prob = carry
      k = ring(done + i)
      soften = lambda s: softmax(work, i, k, s, row_max, row_sum, masked)  # noqa: E731
      acc, prob, row_max, row_sum, alpha = overlapped(lhs(query, step), k, acc, prob, ring(done + i - 1), soften)
      return mosaic.rescale(acc, alpha, interpret=loop.interpret), row_max, row_sum, prob.astype(loop.dtype)

    begin, end, n = loop.ends(work)
    carry = mosaic.full((ROWS, value_dim), 0.0), row_max, row_sum, prob
    for masked, start, stop in ((True, 1, begin), (False, begin, end), (True, end, n)):
      if start is not stop:
        carry = lax.fori_loop(start, stop, functools.partial(advance, masked=masked), carry)
    acc, row_max, row_sum, prob = carry
    if not in_registers:
      plgpu.barrier_arrive(q_empty.at[lax.rem(step, jnp.int32(query_stages))])
    if not isinstance(items, Listed):  # told when the item's last tile is on its way
      upcoming = items.listen(step + 1)
      has_next = items.is_one(upcoming)

    def with_next():
      query, k = take_query(step + 1), ring(done + n)
      soften = lambda s: softmax(loop.item(upcoming), 0, k, s, *fresh(), first_masked)  # noqa: E731
      acc_, prob_, row_max_, row_sum_, _ = overlapped(lhs(query, step + 1), k, acc, prob, ring(done + n - 1), soften)
      return acc_, query, row_max_, row_sum_, prob_.astype(loop.dtype)

    def without_next():
      return values(acc, prob, ring(done + n - 1)), query, row_max, row_sum, prob

    acc, query, *next_row_state = lax.cond(has_next, with_next, without_next)
    loop.write(work, acc, row_max, row_sum)
    return upcoming, (done + n, query, *next_row_state)

  if loop.put_first is not None:
    loop.put_first(loop.item(first))
  query = take_query(0)
  s = scores(lhs(query, 0), 0)
  prob, row_max, row_sum, _ = softmax(loop.item(first), 0, 0, s, *fresh(), first_masked)
  if loop.interpret:
    plgpu.commit_smem()  # what `cut` read may be overwritten
  plgpu.barrier_arrive(k_empty.at[0])
  carry = jnp.int32(0), query, row_max, row_sum, prob.astype(loop.dtype)
  if isinstance(items, Listed):
    lax.fori_loop(0, items.count, lambda step, carry: one_item(step, items.at(step), carry)[1], carry)
  else:
    is_one = lambda carry: items.is_one(carry[1])  # noqa: E731
    lax.while_loop(is_one, lambda carry: (carry[0] + 1, *one_item(*carry)), (jnp.int32(0), first, carry))
  turn.finish()
