"""Cases of attention for the experiments that time it: shapes, masks, inputs, FLOPs, and what is right.

Every mask here lets a query see one interval of keys, which one function gives (`Case.intervals`): the inputs' lengths
and segment ids, the reference and the count of tiles all come from it.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

STAGES = ("forward", "forward+backward")
TENSORS = ("out", "d_query", "d_key", "d_value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One self-attention problem. B, T, H, K, D below are its batch, seq_len, num_heads, num_kv_heads, head_dim."""

  batch: int
  seq_len: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  is_causal: bool
  segments: int = 0  # sequences of equal length packed into each row; 0: no segment ids
  window: int = 0  # keys a query sees, its own the last; 0: no window. Causal cases only
  lengths: str = ""  # "uniform" or "zipf" lengths of the rows, in queries and keys; "": all full
  fa4_of_cudnn: tuple[float, ...] = ()  # published time of FlashAttention-4 by that of cuDNN, one for each of STAGES

  @property
  def name(self) -> str:
    parts = [f"b{self.batch} s{self.seq_len} h{self.num_heads}/{self.num_kv_heads} d{self.head_dim}"]
    parts[0] += " causal" if self.is_causal else " full"
    parts += [f"{self.segments} segments"] if self.segments else []
    parts += [f"window {self.window}"] if self.window else []
    parts += [f"{self.lengths} lengths"] if self.lengths else []
    return ", ".join(parts)

  @property
  def scale(self) -> float:
    return self.head_dim**-0.5

  @property
  def unmasked(self) -> "Case":
    """The same case with nothing but its causality."""
    return dataclasses.replace(self, segments=0, window=0, lengths="", fa4_of_cudnn=())

  @property
  def is_masked(self) -> bool:
    return bool(self.segments or self.window or self.lengths)

  def row_lengths(self) -> np.ndarray:
    """i64[B], the tokens of each row: full, uniform in [1, T], or T / 1, T / 2, T / 3, ... (Zipf)."""
    if self.lengths == "uniform":
      return np.random.default_rng(0).integers(1, self.seq_len, self.batch, endpoint=True)
    if self.lengths == "zipf":
      return np.maximum(1, self.seq_len // np.arange(1, self.batch + 1))
    return np.full(self.batch, self.seq_len)

  def segment_ids(self) -> np.ndarray:
    """i32[T], the packed sequence of each token; the last one takes what does not divide."""
    each = self.seq_len // max(self.segments, 1)
    return np.minimum(np.arange(self.seq_len) // each, max(self.segments, 1) - 1).astype(np.int32)

  def intervals(self) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) i64[B, T]: query i of row b sees the keys low <= j < high, none past the row's length."""
    i = np.arange(self.seq_len)
    ids = self.segment_ids()
    low, high = np.searchsorted(ids, ids), np.searchsorted(ids, ids, side="right")
    if self.is_causal:
      high = np.minimum(high, i + 1)
    if self.window:
      low = np.maximum(low, i + 1 - self.window)
    lengths = self.row_lengths()[:, None]
    high = np.where(i < lengths, np.minimum(high, lengths), low)
    return np.broadcast_to(low, high.shape), high

  def flops(self, stage: str) -> float:
    """Of the matrix products: 4 D a visible pair and head, backward 2.5 times as many. Causal counts as one half."""
    low, high = self.intervals() if self.is_masked else (np.zeros(1), np.full(1, self.batch * self.seq_len**2))
    pairs = float((high - low).sum()) / (2 if self.is_causal and not self.is_masked else 1)
    return (1.0 if stage == "forward" else 3.5) * 4 * self.num_heads * self.head_dim * pairs

  def tiles(self, block_q: int, block_kv: int) -> int:
    """Tiles of the score matrix, over the rows of the batch, in which at least one pair is visible."""
    low, high = self.intervals()
    pad = ((0, 0), (0, -self.seq_len % block_q))
    low, high = (np.pad(x, pad).reshape(self.batch, -1, block_q) for x in (low, high))
    columns = np.arange(-(-self.seq_len // block_kv)) * block_kv
    columns = columns[:, None, None]
    rows = zip(low, high, strict=True)
    return sum(int(((lo < columns + block_kv) & (hi > columns) & (lo < hi)).any(-1).sum()) for lo, hi in rows)


class Inputs(NamedTuple):
  query: jax.Array  # [B, T, H, D]
  key: jax.Array  # [B, T, K, D]
  value: jax.Array  # [B, T, K, D]
  cotangent: jax.Array  # [B, T, H, D], of the output; 0 past the rows' lengths
  segments: jax.Array | None  # i32[B, T]
  lengths: jax.Array | None  # i32[B]


def make_inputs(case: Case, dtype: str, seed: int = 0) -> Inputs:
  """Standard normal arrays, the same for the same seed."""
  segments = jnp.asarray(np.tile(case.segment_ids(), (case.batch, 1))) if case.segments else None
  lengths = jnp.asarray(case.row_lengths(), jnp.int32) if case.lengths else None
  rows = (case.batch, case.seq_len)
  heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads, case.num_heads)
  keys = jax.random.split(jax.random.key(seed), 4)
  query, key, value, cotangent = (
    normal(k, shape=(*rows, h, case.head_dim), dtype=dtype) for k, h in zip(keys, heads, strict=True)
  )
  if lengths is not None:
    cotangent = jnp.where((jnp.arange(case.seq_len) < lengths[:, None])[..., None, None], cotangent, 0)
  return Inputs(query, key, value, cotangent, segments, lengths)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(key: jax.Array, *, shape: tuple[int, ...], dtype: str) -> jax.Array:
  """Standard normal numbers."""
  return jax.random.normal(key, shape).astype(dtype)  # drawn in float32: 16 bits have too few distinct values


class Reference(NamedTuple):
  """What is right for one KV head of one row, its G query heads included; TENSORS in their order."""

  row: int
  kv_head: int
  length: int  # rows that count
  exact: tuple[jax.Array, ...]  # f32[T, G, D], f32[T, G, D], f32[T, 1, D], f32[T, 1, D]
  allowed: np.ndarray  # f32[4], the largest error of each that counts as right


def references(case: Case, inputs: Inputs) -> list[Reference]:
  """The first KV head of the first row and the last of the last, computed as attention is written down.

  The rule is FlashAttention's: an error may be twice that of plain attention in the inputs' dtype, and a rounding of
  the largest value more.
  """
  low, high = (jnp.asarray(x, jnp.int32) for x in case.intervals())
  found = []
  for row, kv_head in sorted({(0, 0), (case.batch - 1, case.num_kv_heads - 1)}):
    exact, allowed = _expect(inputs[:4], low, high, row, kv_head, scale=case.scale)
    found.append(Reference(row, kv_head, int(case.row_lengths()[row]), exact, np.asarray(allowed)))
  return found


def worst_error(expected: list[Reference], results: tuple[jax.Array, ...]) -> float:
  """The largest error by what is allowed, over the references and the tensors; above 1 is wrong, infinity is NaN.

  Args:
    expected: of `references`.
    results: of TENSORS, whole, or the output alone. Rows past a length may hold anything.
  """
  worst = 0.0
  for right in expected:
    errors = _errors(results, right.exact[: len(results)], right.row, right.kv_head, right.length)
    worst = max(worst, float(np.max(np.asarray(errors) / right.allowed[: len(results)])))
  return worst


@functools.partial(jax.jit, static_argnames="scale")
def _expect(inputs, low, high, row, kv_head, *, scale: float):
  groups = inputs[0].shape[2] // inputs[1].shape[2]
  query, key, value, cotangent = _head(inputs, row, kv_head, (groups, 1, 1, groups))
  exact, near = (
    _plain(query, key, value, cotangent, low[row], high[row], scale=scale, dtype=dtype)
    for dtype in ("float32", inputs[0].dtype)
  )
  rounding = max(float(jnp.finfo(inputs[0].dtype).eps), 1e-5)
  largest = [(jnp.abs(n - e).max(), jnp.abs(e).max()) for n, e in zip(near, exact, strict=True)]
  return exact, jnp.stack([2 * error + rounding * value for error, value in largest])


@jax.jit
def _errors(results, exact, row, kv_head, length):
  """f32[len(results)]; infinity where any number of the reference's rows, or of unpadded results, is not finite."""
  heads = _head(results, row, kv_head, tuple(x.shape[1] for x in exact))
  valid = (jnp.arange(exact[0].shape[0]) < length)[:, None, None]
  errors = [jnp.where(valid, jnp.abs(x - e), 0).max() for x, e in zip(heads, exact, strict=True)]
  padded = length < exact[0].shape[0]
  finite = [jnp.isfinite(x).all() | padded for x in results]
  return jnp.stack([jnp.where(f & jnp.isfinite(x), x, jnp.inf) for f, x in zip(finite, errors, strict=True)])


def _head(arrays, row, kv_head, counts: tuple[int, ...]) -> list[jax.Array]:
  """float32 [T, count, D] of each array [B, T, heads, D]: the heads that belong to one KV head of one row."""
  return [
    jax.lax.dynamic_slice_in_dim(x[row], kv_head * count, count, axis=1).astype(jnp.float32)
    for x, count in zip(arrays, counts, strict=True)
  ]


def plain_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, *, scale: float, dtype: Any
) -> jax.Array:
  """Attention of one KV head with the whole score matrix, computed in `dtype`.

  Args:
    query: [T, G, D].
    key: [S, D].
    value: [S, D].
    mask: bool[T, S].
    scale: of the scores.
    dtype: of all but the softmax, which is float32.

  Returns:
    [T, G, D] in `dtype`; 0 for a query that sees nothing.
  """
  query, key, value = (x.astype(dtype) for x in (query, key, value))
  precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
  scores = jnp.einsum("tgd,sd->gts", query, key, precision=precision) * jnp.asarray(scale, dtype)
  weights = jax.nn.softmax(jnp.where(mask, scores.astype(jnp.float32), -jnp.inf), where=mask, axis=-1)
  weights = jnp.where(mask.any(-1, keepdims=True), weights, 0).astype(dtype)
  return jnp.einsum("gts,sd->tgd", weights, value, precision=precision)


def _plain(query, key, value, cotangent, low, high, *, scale: float, dtype: Any) -> tuple[jax.Array, ...]:
  """`plain_attention` of query [T, G, D], key and value [S, 1, D], and its gradients; returns float32."""
  columns = jnp.arange(key.shape[0])
  mask = (columns >= low[:, None]) & (columns < high[:, None])  # bool[T, T]

  def attend(query, key, value):
    return plain_attention(query, key[:, 0], value[:, 0], mask, scale=scale, dtype=dtype)

  out, pullback = jax.vjp(attend, *(x.astype(dtype) for x in (query, key, value)))
  return tuple(x.astype(jnp.float32) for x in (out, *pullback(cotangent.astype(dtype))))
