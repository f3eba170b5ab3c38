"""What a kernel is asked to do: the static problem (hashable) and the arrays that come with it."""

import re
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class FlashProblem:
  """One `flash_attention` call without its arrays: dispatch key, tuning key and test id."""

  device: str  # what it runs on: "cpu", "nvidia_h200", ...
  batch: int  # B
  query_len: int  # T
  kv_len: int  # S
  num_heads: int  # H
  num_kv_heads: int  # K
  head_dim: int  # D
  value_dim: int  # Dv
  dtype: str
  scale: float
  is_causal: bool
  window: tuple[int, int] | None  # (left, right) around the query's own position
  soft_cap: float | None
  has_query_lens: bool
  has_kv_lens: bool
  has_segments: bool
  has_mask: bool
  has_bias: bool
  has_sinks: bool

  @property
  def is_static(self) -> bool:
    """Whether the shapes alone say which tiles see each other."""
    return not (self.has_query_lens or self.has_kv_lens or self.has_segments or self.has_mask)


@dataclass(frozen=True, kw_only=True)
class PagedProblem:
  """One `paged_attention` call without its arrays. Causal, each sequence's queries at the end of its keys."""

  device: str  # as in FlashProblem
  num_tokens: int  # T
  batch: int  # B
  num_heads: int  # H
  num_kv_heads: int  # K
  head_dim: int  # D
  num_pages: int  # N
  page_size: int
  pages_per_slot: int  # P
  max_query_len: int
  dtype: str
  kv_dtype: str
  scale: float
  window: int | None  # keys visible before the query's own position
  soft_cap: float | None
  is_packed: bool  # query_starts given
  has_scales: bool
  has_sinks: bool
  has_prefixes: bool = False  # leaders and shared_pages given
  min_query_len: int = 1  # of sequences that have query tokens; those with fewer are served too


Problem = FlashProblem | PagedProblem


def is_hopper(device: str) -> bool:
  """Whether a problem's device is an NVIDIA GPU of compute capability 9.0.

  Example:
    >>> is_hopper("nvidia_h200"), is_hopper("nvidia_gh200_480gb"), is_hopper("nvidia_b200"), is_hopper("cpu")
    (True, True, False, False)
  """
  return re.match(r"nvidia_(h|gh)(20|100|200|800)(_|$)", device) is not None


class FlashOperands(NamedTuple):
  """The arrays of one `flash_attention` call; optional ones are None. No axis is empty."""

  query: jax.Array  # [B, T, H, D]
  key: jax.Array  # [B, S, K, D]
  value: jax.Array  # [B, S, K, Dv]
  bias: jax.Array | None = None  # [B | 1, H | 1, T | 1, S | 1], added to the scaled (and capped) scores
  sinks: jax.Array | None = None  # [H], a score with no value: adds exp(sink) to the denominator
  mask: jax.Array | None = None  # bool[B | 1, H | 1, T | 1, S | 1]
  query_lens: jax.Array | None = None  # i32[B]
  kv_lens: jax.Array | None = None  # i32[B]
  query_segments: jax.Array | None = None  # i32[B, T]
  kv_segments: jax.Array | None = None  # i32[B, S]


class FlashGradients(NamedTuple):
  """Cotangents of the differentiable operands, in their order; None where the operand is None."""

  query: jax.Array
  key: jax.Array
  value: jax.Array
  bias: jax.Array | None
  sinks: jax.Array | None


class PagedOperands(NamedTuple):
  """The arrays of one `paged_attention` call; optional ones are None. No axis is empty."""

  query: jax.Array  # [T, H, D]
  k_pages: jax.Array  # [N, page_size, K, D]
  v_pages: jax.Array  # [N, page_size, K, D]
  pages: jax.Array  # i32[B, P]
  kv_lens: jax.Array  # i32[B]
  query_starts: jax.Array | None = None  # i32[B + 1]
  sinks: jax.Array | None = None  # [H]
  k_scales: jax.Array | None = None  # f32[N, page_size, K]
  v_scales: jax.Array | None = None  # f32[N, page_size, K]
  leaders: jax.Array | None = None  # i32[B]
  shared_pages: jax.Array | None = None  # i32[B], leading pages that sequence b and sequence leaders[b] have in common


class Spans(NamedTuple):
  """Where each sequence of a `flash_attention` call lives in its padded row."""

  query_lens: jax.Array  # i32[B]
  kv_lens: jax.Array  # i32[B]
  offsets: jax.Array  # i32[B], query i stands at key position i + offset


def spans(problem: FlashProblem, operands: FlashOperands) -> Spans:
  """Returns every sequence's lengths and the key position of its first query.

  The last query stands at the last key: offset = kv_len - query_len, a missing length being the array's size. One
  exception: when T == S and only one of the two lengths is given, this is self-attention over padded rows, as
  `jax.nn.dot_product_attention` reads it, and query i stands at key i.
  """
  full = jnp.ones(problem.batch, jnp.int32)
  query_lens = full * problem.query_len if operands.query_lens is None else operands.query_lens.astype(jnp.int32)
  kv_lens = full * problem.kv_len if operands.kv_lens is None else operands.kv_lens.astype(jnp.int32)
  is_self = problem.query_len == problem.kv_len and problem.has_query_lens != problem.has_kv_lens
  return Spans(query_lens, kv_lens, full * 0 if is_self else kv_lens - query_lens)
