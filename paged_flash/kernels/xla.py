"""Tiled attention in plain JAX: online softmax over blocks, O(N) memory forward and backward, any backend.

Blocks that no query can see (causal bound, window, lengths) are not visited: loop bounds are dynamic, so time follows
the visible blocks. Where an axis is no multiple of its block, the last block starts early and what it repeats is
masked, so that nothing is padded or copied. Keys that no query sees may hold anything, NaN and infinities included.

Notation of Dao et al. 2022, Algorithms 1 (forward) and 2 (backward): their B_r, B_c are `block_q`, `block_kv`; l_i, m_i
are `total` and `top`; O_i before the division by l_i is `acc`; D_i is `delta`; P_ij and dS_ij are `p` and `ds`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from paged_flash.kernels.problem import (
  FlashGradients,
  FlashOperands,
  FlashProblem,
  PagedOperands,
  PagedProblem,
  Problem,
  spans,
)

NEVER = -jnp.inf


def supports(problem: Problem, stage: str = "forward") -> str:
  """Returns "": every problem that passes the checks of the public ops runs here."""
  del problem, stage
  return ""


class Running(NamedTuple):
  """Online softmax of some rows over the keys seen so far; `acc` is relative to `top` and not yet normalised."""

  top: jax.Array  # f32[...], largest score, -inf when no key was seen
  total: jax.Array  # f32[...], sum of exp(score - top)
  acc: jax.Array  # f32[..., Dv]


def _zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
  """f32 zeros that a loop may carry: inside `jax.shard_map` they vary over the devices as `like` does."""
  return jnp.zeros_like(like, jnp.float32, shape=shape)


def _fresh(shape: tuple[int, ...], value_dim: int, like: jax.Array) -> Running:
  zeros = _zeros(shape, like)
  return Running(zeros + NEVER, zeros, _zeros((*shape, value_dim), like))


def _finite(top: jax.Array) -> jax.Array:
  """A top that can be subtracted: rows without keys have -inf, and -inf - -inf is NaN."""
  return jnp.where(top == NEVER, 0.0, top)


def _finish(run: Running, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """Normalises. `sinks` broadcasts against the rows. Returns (out f32[..., Dv], lse f32[...])."""
  lse = run.top + jnp.log(run.total)
  out = run.acc / jnp.where(run.total == 0, 1.0, run.total)[..., None]
  if sinks is None:
    return out, lse
  with_sink = jnp.logaddexp(lse, sinks.astype(jnp.float32))
  return out * jnp.exp(lse - _finite(with_sink))[..., None], with_sink


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Accumulates in f32; f32 operands are multiplied as f32 (no TF32)."""
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.einsum(spec, a, b.astype(a.dtype), precision=precision, preferred_element_type=jnp.float32)


def _cap(scores: jax.Array, soft_cap: float | None) -> jax.Array:
  return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _absorb(run: Running, scores: jax.Array, value: jax.Array, spec: str) -> Running:
  """Adds one block of keys: scores f32[..., S] (-inf where masked) and their value block, contracted by `spec`."""
  top = jnp.maximum(run.top, scores.max(-1))
  p = jnp.exp(scores - _finite(top)[..., None])
  shrink = jnp.exp(run.top - _finite(top))
  acc = run.acc * shrink[..., None] + _einsum(spec, p.astype(value.dtype), value)
  return Running(top, run.total * shrink + p.sum(-1), acc)


def _div(a: jax.Array, b: int) -> jax.Array:
  """a // b for a >= 0; `//` on arrays would spend operations on negative ones."""
  return lax.div(a, jnp.asarray(b, a.dtype))


def _cdiv(a: jax.Array, b: int) -> jax.Array:
  return _div(a + b - 1, b)


# --- flash ------------------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
  """Block pair (i, j): rows are queries, columns are keys."""

  row: jax.Array  # i32[], first row
  column: jax.Array  # i32[], first column
  query: jax.Array  # [B, K, G, block_q, D]
  key: jax.Array  # [B, K, block_kv, D]
  value: jax.Array  # [B, K, block_kv, Dv]
  scores: jax.Array  # f32[B, K, G, block_q, block_kv], before the bias
  bias: jax.Array | float
  mask: jax.Array  # bool[B, K | 1, G | 1, block_q, block_kv]


class _Flash:
  """The arrays of one call with heads before positions, and how to cut a block pair out of them."""

  def __init__(self, problem: FlashProblem, operands: FlashOperands, block_q: int, block_kv: int):
    self.problem, self.operands, self.spans = problem, operands, spans(problem, operands)
    self.block_q, self.block_kv = min(block_q, problem.query_len), min(block_kv, problem.kv_len)
    self.groups = problem.num_heads // problem.num_kv_heads
    self.query = self.split_heads(operands.query)  # [B, K, G, T, D]
    self.key, self.value = operands.key.swapaxes(1, 2), operands.value.swapaxes(1, 2)  # [B, K, S, D | Dv]

  def split_heads(self, x: jax.Array) -> jax.Array:
    """[B, T, H, D] -> [B, K, G, T, D]."""
    return self.split_rows(x.swapaxes(1, 2))

  def split_rows(self, x: jax.Array) -> jax.Array:
    """[B, H, T, ...] -> [B, K, G, T, ...]."""
    return x.reshape(x.shape[0], self.problem.num_kv_heads, self.groups, *x.shape[2:])

  def join_rows(self, x: jax.Array) -> jax.Array:
    """[B, K, G, T, ...] -> [B, H, T, ...]."""
    return x.reshape(x.shape[0], self.problem.num_heads, *x.shape[3:])

  def join_heads(self, x: jax.Array) -> jax.Array:
    """[B, K, G, T, D] -> [B, T, H, D]."""
    return self.join_rows(x).swapaxes(1, 2)

  def row(self, i: jax.Array) -> jax.Array:
    return jnp.minimum(i * self.block_q, self.problem.query_len - self.block_q)

  def column(self, j: jax.Array) -> jax.Array:
    return jnp.minimum(j * self.block_kv, self.problem.kv_len - self.block_kv)

  def broadcast_start(self, x: jax.Array, row: jax.Array, column: jax.Array) -> tuple[list, list[int]]:
    """Start and size of the block of a [B | 1, H | 1, T | 1, S | 1] array."""
    *front, rows, columns = x.shape
    start = [0, 0, row if rows > 1 else 0, column if columns > 1 else 0]
    return start, [*front, min(rows, self.block_q), min(columns, self.block_kv)]

  def broadcast_block(self, x: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """Cuts a block and splits its heads: [B | 1, K | 1, G | 1, block_q | 1, block_kv | 1]."""
    block = lax.dynamic_slice(x, *self.broadcast_start(x, row, column))
    heads = (1, 1) if x.shape[1] == 1 else (self.problem.num_kv_heads, self.groups)
    return block.reshape(block.shape[0], *heads, *block.shape[2:])

  def tile(self, i: jax.Array, j: jax.Array, first_row: jax.Array) -> _Tile:
    """Cuts block pair (i, j). Rows before `first_row` and columns that an earlier block has done are masked."""
    problem, operands = self.problem, self.operands
    query_lens, kv_lens, offsets = (x[:, None, None] for x in self.spans)
    row, column = self.row(i), self.column(j)
    rows = (row + jnp.arange(self.block_q))[:, None]
    columns = column + jnp.arange(self.block_kv)
    mask = (rows >= first_row) & (rows < query_lens) & (columns >= j * self.block_kv) & (columns < kv_lens)
    if problem.is_causal:
      mask &= columns <= rows + offsets
    if problem.window is not None:
      left, right = problem.window
      mask &= (columns >= rows + offsets - left) & (columns <= rows + offsets + right)
    if operands.query_segments is not None and operands.kv_segments is not None:
      query_ids = lax.dynamic_slice_in_dim(operands.query_segments, row, self.block_q, axis=1)
      kv_ids = lax.dynamic_slice_in_dim(operands.kv_segments, column, self.block_kv, axis=1)
      mask &= query_ids[:, :, None] == kv_ids[:, None, :]
    mask = mask[:, None, None]  # bool[B, 1, 1, block_q, block_kv]
    if operands.mask is not None:
      mask &= self.broadcast_block(operands.mask, row, column)

    # 0 * NaN is NaN: rows and columns without any visible pair are zeroed before they meet a matrix product.
    seen = mask.any((1, 2, 3))[:, None, :, None]  # bool[B, 1, block_kv, 1]
    query = lax.dynamic_slice_in_dim(self.query, row, self.block_q, axis=3)
    query = jnp.where((rows < query_lens)[:, None, None], query, 0)
    key = jnp.where(seen, lax.dynamic_slice_in_dim(self.key, column, self.block_kv, axis=2), 0)
    value = jnp.where(seen, lax.dynamic_slice_in_dim(self.value, column, self.block_kv, axis=2), 0)
    scores = _cap(problem.scale * _einsum("bkgqd,bksd->bkgqs", query, key), problem.soft_cap)
    bias = 0.0 if operands.bias is None else self.broadcast_block(operands.bias, row, column).astype(jnp.float32)
    return _Tile(row, column, query, key, value, scores, bias, mask)

  def kv_blocks(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and one past the last key block that some row of query block i may see."""
    query_lens, kv_lens, offsets = self.spans
    left, right = self.problem.window or (None, None)
    first_row = self.row(i)
    last_row = jnp.minimum(first_row + self.block_q, query_lens) - 1
    begin, end = jnp.zeros_like(offsets), jnp.where(last_row >= first_row, kv_lens, 0)
    if self.problem.is_causal:
      end = jnp.minimum(end, last_row + offsets + 1)
    if right is not None:
      end = jnp.minimum(end, last_row + offsets + right + 1)
    if left is not None:
      begin = jnp.maximum(begin, first_row + offsets - left)
    return _div(begin.min(), self.block_kv), _cdiv(end.max(), self.block_kv)

  def query_blocks(self, j: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and one past the last query block that may see some column of key block j."""
    query_lens, kv_lens, offsets = self.spans
    left, right = self.problem.window or (None, None)
    first = self.column(j)
    last = jnp.minimum(first + self.block_kv, kv_lens) - 1
    begin, end = jnp.zeros_like(offsets), jnp.where(last >= first, query_lens, 0)
    if self.problem.is_causal:
      begin = jnp.maximum(begin, first - offsets)
    if right is not None:
      begin = jnp.maximum(begin, first - offsets - right)
    if left is not None:
      end = jnp.minimum(end, last - offsets + left + 1)
    return _div(begin.min(), self.block_q), _cdiv(end.max(), self.block_q)


def forward(
  problem: FlashProblem, operands: FlashOperands, *, block_q: int, block_kv: int
) -> tuple[jax.Array, jax.Array]:
  """Algorithm 1 with queries in the outer loop. Returns (out [B, T, H, Dv] in the query's dtype, lse f32[B, H, T])."""
  flash = _Flash(problem, operands, block_q, block_kv)
  sinks = None if operands.sinks is None else operands.sinks.reshape(problem.num_kv_heads, flash.groups, 1)

  def query_block(i, state):
    def kv_block(j, run):
      tile = flash.tile(i, j, first_row=flash.row(i))
      scores = jnp.where(tile.mask, tile.scores + tile.bias, NEVER)
      return _absorb(run, scores, tile.value, "bkgqs,bksd->bkgqd")

    run = _fresh((*flash.query.shape[:3], flash.block_q), problem.value_dim, flash.query)
    run = lax.fori_loop(*flash.kv_blocks(i), kv_block, run)
    out_block, lse_block = _finish(run, sinks)
    alive = flash.row(i) + jnp.arange(flash.block_q) < flash.spans.query_lens[:, None, None, None]
    lse_block = jnp.where(alive, lse_block, NEVER)
    out, lse = state
    out = lax.dynamic_update_slice_in_dim(out, out_block.astype(out.dtype), flash.row(i), axis=3)
    return out, lax.dynamic_update_slice_in_dim(lse, lse_block, flash.row(i), axis=3)

  rows = flash.query.shape[:-1]
  out = jnp.zeros_like(flash.query, shape=(*rows, problem.value_dim))
  lse = _zeros(rows, flash.query) + NEVER
  out, lse = lax.fori_loop(0, _cdiv(flash.spans.query_lens.max(), flash.block_q), query_block, (out, lse))
  return flash.join_heads(out), flash.join_rows(lse)


def backward(
  problem: FlashProblem,
  operands: FlashOperands,
  out: jax.Array,
  lse: jax.Array,
  d_out: jax.Array,
  d_lse: jax.Array,
  *,
  block_q: int,
  block_kv: int,
) -> FlashGradients:
  """Algorithm 2: recomputes each block of probabilities from the LSE. Shapes as in `forward`.

  With p = exp(s - lse): ds = p * (d_out v^T - delta), delta = rowsum(d_out * out) - d_lse. A sink is a key whose value
  is 0.
  """
  flash = _Flash(problem, operands, block_q, block_kv)
  alive = jnp.arange(problem.query_len) < flash.spans.query_lens[:, None]  # bool[B, T]
  d_out = jnp.where(alive[..., None, None], d_out, 0)
  delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)  # f32[B, H, T]
  delta -= jnp.where(alive[:, None], d_lse, 0)
  d_sinks = None
  if operands.sinks is not None:
    p_sink = jnp.where(lse == NEVER, 0, jnp.exp(operands.sinks.astype(jnp.float32)[:, None] - _finite(lse)))
    d_sinks = -(p_sink * delta).sum((0, 2)).astype(operands.sinks.dtype)
  d_out, delta, lse = flash.split_heads(d_out), flash.split_rows(delta), flash.split_rows(lse)

  def rows_of(x, row):
    return lax.dynamic_slice_in_dim(x, row, flash.block_q, axis=3)

  def add_at(x, block, start, axis):
    old = lax.dynamic_slice_in_dim(x, start, block.shape[axis], axis=axis)
    return lax.dynamic_update_slice_in_dim(x, old + block, start, axis=axis)

  def kv_block(j, state):
    def query_block(i, state):
      dq, dk, dv, d_bias = state
      tile = flash.tile(i, j, first_row=i * flash.block_q)
      d_out_rows, lse_rows = rows_of(d_out, tile.row), _finite(rows_of(lse, tile.row))[..., None]
      p = jnp.where(tile.mask, jnp.exp(tile.scores + tile.bias - lse_rows), 0)
      dp = _einsum("bkgqd,bksd->bkgqs", d_out_rows, tile.value)
      ds = p * (dp - rows_of(delta, tile.row)[..., None])
      if d_bias is not None:
        start, size = flash.broadcast_start(d_bias, tile.row, tile.column)
        block = ds.reshape(problem.batch, problem.num_heads, *ds.shape[3:])
        block = block.sum([a for a in range(4) if size[a] == 1], keepdims=True)
        d_bias = lax.dynamic_update_slice(d_bias, lax.dynamic_slice(d_bias, start, size) + block, start)
      if problem.soft_cap is not None:
        ds *= 1 - jnp.square(tile.scores / problem.soft_cap)
      ds = (ds * problem.scale).astype(tile.query.dtype)
      dv += _einsum("bkgqs,bkgqd->bksd", p.astype(d_out_rows.dtype), d_out_rows)
      dk += _einsum("bkgqs,bkgqd->bksd", ds, tile.query)
      dq = add_at(dq, _einsum("bkgqs,bksd->bkgqd", ds, tile.key), tile.row, axis=3)
      return dq, dk, dv, d_bias

    dq, dk, dv, d_bias = state
    blocks = (_zeros((*x.shape[:2], flash.block_kv, x.shape[3]), flash.query) for x in (dk, dv))
    dq, dk_block, dv_block, d_bias = lax.fori_loop(*flash.query_blocks(j), query_block, (dq, *blocks, d_bias))
    dk, dv = (add_at(x, block, flash.column(j), axis=2) for x, block in ((dk, dk_block), (dv, dv_block)))
    return dq, dk, dv, d_bias

  dq, dk, dv = (_zeros(x.shape, x) for x in (flash.query, flash.key, flash.value))
  d_bias = None if operands.bias is None else _zeros(operands.bias.shape, operands.bias)
  num_blocks = _cdiv(flash.spans.kv_lens.max(), flash.block_kv)
  dq, dk, dv, d_bias = lax.fori_loop(0, num_blocks, kv_block, (dq, dk, dv, d_bias))
  return FlashGradients(
    flash.join_heads(dq).astype(operands.query.dtype),
    dk.swapaxes(1, 2).astype(operands.key.dtype),
    dv.swapaxes(1, 2).astype(operands.value.dtype),
    None if d_bias is None or operands.bias is None else d_bias.astype(operands.bias.dtype),
    d_sinks,
  )


# --- paged ----------------------------------------------------------------------------------------------------------


def paged_forward(
  problem: PagedProblem, operands: PagedOperands, *, block_q: int, block_kv: int, lanes: int
) -> tuple[jax.Array, jax.Array]:
  """Sequences with one query token go through `_decode`, longer ones through `_prefill`.

  A token's result thus depends on its own sequence only, bit for bit, whoever shares the batch.
  Returns (out [T, H, D] in the query's dtype, lse f32[T, H]).
  """
  starts = operands.query_starts
  if starts is None:
    return _decode(problem, operands, operands.query, operands.kv_lens, block_kv, lanes)
  query_lens = starts[1:] - starts[:-1]
  is_one = query_lens == 1
  query = jnp.take(operands.query, starts[:-1], axis=0, mode="clip")
  out_one, lse_one = _decode(problem, operands, query, jnp.where(is_one, operands.kv_lens, 0), block_kv, lanes)
  if problem.max_query_len == 1:
    out, lse = jnp.zeros_like(operands.query), _zeros(operands.query.shape[:2], operands.query) + NEVER
  else:
    block_q = min(block_q, problem.max_query_len)
    out, lse = _prefill(problem, operands, jnp.where(query_lens > 1, query_lens, 0), block_q, block_kv)
  token = jnp.where(is_one, starts[:-1], problem.num_tokens)
  return out.at[token].set(out_one, mode="drop"), lse.at[token].set(lse_one, mode="drop")


def _pages_per_block(problem: PagedProblem, block_kv: int) -> int:
  return max(1, min(block_kv // problem.page_size, problem.pages_per_slot))


def _page_blocks(problem: PagedProblem, operands: PagedOperands, block_kv: int) -> jax.Array:
  """The page table cut into blocks: i32[B, num_blocks, pages_per_block], NO_PAGE filling up the last."""
  size = _pages_per_block(problem, block_kv)
  pages = jnp.pad(operands.pages, ((0, 0), (0, -problem.pages_per_slot % size)), constant_values=-1)
  return pages.reshape(problem.batch, -1, size)


def _gather(pool: jax.Array, scales: jax.Array | None, ids: jax.Array) -> jax.Array:
  """Copies the pages `ids` [..., n] out of a pool: [..., n * page_size, K, D]. Ids outside the pool read any page."""

  def take(x):  # flat slices are copied faster than [page_size, K, D] ones
    rows = jnp.take(x.reshape(x.shape[0], -1), ids, axis=0, mode="clip")
    return rows.reshape(*ids.shape[:-1], ids.shape[-1] * x.shape[1], *x.shape[2:])

  return take(pool) if scales is None else take(pool).astype(jnp.float32) * take(scales)[..., None]


def _sinks(problem: PagedProblem, operands: PagedOperands) -> jax.Array | None:
  return None if operands.sinks is None else operands.sinks.reshape(problem.num_kv_heads, -1)


def _decode(
  problem: PagedProblem, operands: PagedOperands, query: jax.Array, kv_lens: jax.Array, block_kv: int, lanes: int
) -> tuple[jax.Array, jax.Array]:
  """One query token per sequence: query [B, H, D] -> (out [B, H, D], lse f32[B, H]). kv_len 0 gives 0 and -inf.

  All (sequence, key block) pairs form one list, of which `lanes` are computed at a time, so that the work is that of
  the tokens held, not of the longest sequence; a sequence's parts are merged at the end, weighted by their sums.
  Products with so few rows are faster as multiply-and-sum than as batched matrix products.
  """
  head_dim, heads = problem.head_dim, (problem.num_kv_heads, problem.num_heads // problem.num_kv_heads)
  table = _page_blocks(problem, operands, block_kv)
  block = table.shape[2] * problem.page_size
  first_key = jnp.zeros_like(kv_lens) if problem.window is None else jnp.maximum(kv_lens - 1 - problem.window, 0)
  first_block = _div(first_key, block)
  counts = jnp.maximum(_cdiv(kv_lens, block) - first_block, 0)
  ends = jnp.cumsum(counts)
  query = query.reshape(-1, 1, *heads, head_dim).astype(jnp.float32) * problem.scale  # f32[B, 1, K, G, D]

  def some_pairs(step, parts):
    item = step * lanes + jnp.arange(lanes)
    sequence = jnp.searchsorted(ends, item, side="right", method="compare_all")  # B for lanes beyond the list
    b = jnp.minimum(sequence, problem.batch - 1)
    index = first_block[b] + item - (ends - counts)[b]
    position = index[:, None] * block + jnp.arange(block)
    mask = (position >= first_key[b, None]) & (position < kv_lens[b, None]) & (sequence < problem.batch)[:, None]
    ids = table.at[b, index].get(mode="fill", fill_value=-1)
    key = _gather(operands.k_pages, operands.k_scales, ids)[:, :, :, None]  # [lanes, block, K, 1, D]
    value = jnp.where(mask[..., None, None], _gather(operands.v_pages, operands.v_scales, ids), 0)[:, :, :, None]
    scores = _cap((query[b] * key).sum(-1), problem.soft_cap)  # f32[lanes, block, K, G]
    scores = jnp.where(mask[..., None, None], scores, NEVER)
    top = scores.max(1)
    p = jnp.exp(scores - _finite(top)[:, None])
    part = Running(top, p.sum(1), (p[..., None] * value).sum(1))
    return Running(*(x.at[sequence, index].set(y, mode="drop") for x, y in zip(parts, part, strict=True)))

  parts = _fresh((problem.batch, table.shape[1], *heads), head_dim, query)
  parts = lax.fori_loop(0, _cdiv(ends[-1], lanes), some_pairs, parts)
  top = parts.top.max(1)
  weight = jnp.exp(parts.top - _finite(top)[:, None])
  run = Running(top, (parts.total * weight).sum(1), (parts.acc * weight[..., None]).sum(1))
  out, lse = _finish(run, _sinks(problem, operands))
  alive = (kv_lens > 0)[:, None]
  out = out.reshape(problem.batch, problem.num_heads, head_dim).astype(operands.query.dtype)
  return out, jnp.where(alive, lse.reshape(problem.batch, problem.num_heads), NEVER)


def _prefill(
  problem: PagedProblem, operands: PagedOperands, query_lens: jax.Array, block_q: int, block_kv: int
) -> tuple[jax.Array, jax.Array]:
  """Packed chunks of any lengths, one (sequence, block_q tokens) tile after the other; query_len 0 has no tile."""
  starts, kv_lens = operands.query_starts, operands.kv_lens
  assert starts is not None
  table = _page_blocks(problem, operands, block_kv)
  block = table.shape[2] * problem.page_size
  heads = (problem.num_kv_heads, problem.num_heads // problem.num_kv_heads)
  ends = jnp.cumsum(_cdiv(query_lens, block_q))
  padding = ((0, block_q), (0, 0), (0, 0))
  packed = jnp.pad(operands.query, padding).reshape(-1, *heads, problem.head_dim)  # [T + block_q, K, G, D]
  sinks = _sinks(problem, operands)

  def tile(step, state):
    b = jnp.searchsorted(ends, step, side="right", method="compare_all")
    first = (step - ends[b] + _cdiv(query_lens[b], block_q)) * block_q  # the tile's first query of this sequence
    rows = first + jnp.arange(block_q)
    position = rows + kv_lens[b] - query_lens[b]  # i32[block_q], where the queries stand among the keys
    alive = rows < query_lens[b]
    query = lax.dynamic_slice_in_dim(packed, starts[b] + first, block_q)
    end = jnp.minimum(position[0] + block_q, kv_lens[b])
    begin = 0 if problem.window is None else _div(jnp.maximum(position[0] - problem.window, 0), block)

    def kv_block(j, run):
      column = j * block + jnp.arange(block)
      mask = alive[:, None] & (column <= position[:, None])
      if problem.window is not None:
        mask &= column >= position[:, None] - problem.window
      key = _gather(operands.k_pages, operands.k_scales, table[b, j])  # [block, K, D]
      value = _gather(operands.v_pages, operands.v_scales, table[b, j])
      value = jnp.where(mask.any(0)[:, None, None], value, 0)
      scores = _cap(problem.scale * _einsum("qkgd,skd->kgqs", query, key), problem.soft_cap)
      return _absorb(run, jnp.where(mask, scores, NEVER), value, "kgqs,skd->kgqd")

    run = lax.fori_loop(begin, _cdiv(end, block), kv_block, _fresh((*heads, block_q), problem.head_dim, query))
    out, lse = _finish(run, None if sinks is None else sinks[..., None])
    # Rows past this sequence's end come out as 0 and -inf; the next sequence, whose tiles come later, overwrites them.
    results = out.astype(packed.dtype), jnp.where(alive, lse, NEVER)
    return tuple(
      lax.dynamic_update_slice_in_dim(x, jnp.moveaxis(rows, 2, 0), starts[b] + first, axis=0)
      for x, rows in zip(state, results, strict=True)
    )

  state = (jnp.zeros_like(packed), _zeros(packed.shape[:-1], packed) + NEVER)
  out, lse = lax.fori_loop(0, ends[-1], tile, state)
  tokens = problem.num_tokens
  return out[:tokens].reshape(operands.query.shape), lse[:tokens].reshape(tokens, problem.num_heads)
