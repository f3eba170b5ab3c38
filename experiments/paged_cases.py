"""Cases of paged attention for the experiment that times it: lengths, pages, inputs, bytes, and what is right.

Everything follows from a pool and page tables into it: peers that want keys and values in another form get them
gathered from there.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.attention_cases import normal, plain_attention

SPARE = 3  # the pool is this many times as large as the sequences need
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # value of each dtype of quantised pages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One call: sequences, the last `chunk` tokens of each being queries, and decoding ones beside them."""

  batch: int
  context: int  # tokens of each sequence, queries included; their mean (Zipf) or the longest ("one long")
  num_heads: int
  num_kv_heads: int
  head_dim: int
  page_size: int = 16
  lengths: str = ""  # "Zipf": n, n / 2, n / 3, ... shuffled; "one long": the others hold a thousandth; "": all equal
  chunk: int = 1  # query tokens of each sequence
  decoding: int = 0  # sequences of one query token, of the same context, before the others
  prefix: int = 0  # tokens that all sequences share, in whole pages
  kv_dtype: str = ""  # of quantised pages, one of LARGEST; "": that of the queries

  @property
  def name(self) -> str:
    first = f"b{self.batch} ctx{self.context} h{self.num_heads}/{self.num_kv_heads} d{self.head_dim}"
    parts = [f"{first} page{self.page_size}"]
    parts += [self.lengths] if self.lengths else []
    parts += [f"chunk {self.chunk}"] if self.chunk > 1 else []
    parts += [f"{self.decoding} decoding"] if self.decoding else []
    parts += [f"prefix {self.prefix}"] if self.prefix else []
    parts += [f"{self.kv_dtype} pages"] if self.kv_dtype else []
    return ", ".join(parts)

  @property
  def scale(self) -> float:
    return self.head_dim**-0.5

  @property
  def num_sequences(self) -> int:
    return self.decoding + self.batch

  @property
  def is_mixed(self) -> bool:
    return bool(self.decoding) and self.chunk > 1

  def kv_lens(self) -> np.ndarray:
    """i64[B], the tokens of each sequence."""
    count = self.num_sequences
    if self.lengths == "Zipf":
      share = 1 / np.arange(1, count + 1)
      lens = np.maximum(1, np.round(self.context * count * share / share.sum()).astype(int))
      return np.random.default_rng(0).permutation(lens)
    if self.lengths == "one long":
      lens = np.full(count, max(1, self.context // 1000))
      lens[count // 2] = self.context
      return lens
    return np.full(count, self.context)

  def query_lens(self) -> np.ndarray:
    """i64[B], the query tokens of each sequence."""
    return np.array([1] * self.decoding + [self.chunk] * self.batch)

  def page_counts(self) -> np.ndarray:
    """i64[B], the pages of each sequence."""
    return -(-self.kv_lens() // self.page_size)

  @property
  def pages_needed(self) -> int:
    shared = self.prefix // self.page_size
    return int(self.page_counts().sum()) - (self.num_sequences - 1) * shared

  def kv_bytes(self, dtype: str) -> int:
    """Bytes of the keys and values of all tokens, shared ones once, and of their scales."""
    tokens = int(self.kv_lens().sum()) - (self.num_sequences - 1) * self.prefix
    head = self.head_dim * jnp.dtype(self.kv_dtype or dtype).itemsize + (4 if self.kv_dtype else 0)
    return 2 * tokens * self.num_kv_heads * head

  def flops(self) -> float:
    """Of the matrix products: 4 D for each query head, query and key that it sees."""
    queries, keys = self.query_lens(), self.kv_lens()
    pairs = (queries * (keys - queries) + queries * (queries + 1) // 2).sum()
    return 4.0 * self.num_heads * self.head_dim * float(pairs)


class Inputs(NamedTuple):
  query: jax.Array  # [T, H, D]
  k_pages: jax.Array  # [N, page_size, K, D]
  v_pages: jax.Array  # [N, page_size, K, D]
  pages: jax.Array  # i32[B, P], past the end a page of the sequence's own
  kv_lens: jax.Array  # i32[B]
  query_starts: jax.Array | None  # i32[B + 1]; None where each sequence has one query token
  k_scales: jax.Array | None  # f32[N, page_size, K]
  v_scales: jax.Array | None
  k_plain: jax.Array | None  # the pages before they were quantised
  v_plain: jax.Array | None

  @property
  def unquantised(self) -> "Inputs":
    """The same call on the pages before they were quantised."""
    if self.k_plain is None or self.v_plain is None:
      return self
    return self._replace(k_pages=self.k_plain, v_pages=self.v_plain, k_scales=None, v_scales=None)


def make_inputs(case: Case, dtype: str, sets: int = 1, seed: int = 0) -> list[Inputs]:
  """Several calls on one pool, whose sequences lie on different pages, scattered at random; the same for the same seed
  on one kind of device.

  Raises:
    ValueError: the case does not hold together.
  """
  kv_lens, query_lens, counts = case.kv_lens(), case.query_lens(), case.page_counts()
  if (query_lens > kv_lens).any():
    raise ValueError(f"chunk must be at most the {kv_lens.min()} tokens of the shortest sequence, got {case.chunk}")
  if case.prefix % case.page_size or case.prefix > kv_lens.min():
    raise ValueError(f"prefix must be whole pages of {case.page_size} within every sequence, got {case.prefix}")
  needed, shared = case.pages_needed, case.prefix // case.page_size
  num_pages = max(SPARE, sets) * needed
  rng = np.random.default_rng(seed)
  places = rng.permutation(num_pages)[: sets * needed].reshape(sets, needed)
  keys = jax.random.split(jax.random.key(seed, impl="rbg"), 2 + sets)  # compiles and draws faster than the default
  shape = (num_pages, case.page_size, case.num_kv_heads, case.head_dim)
  pools = [normal(key, shape=shape, dtype=dtype) for key in keys[:2]]
  scales, plain = [None, None], [None, None]
  if case.kv_dtype:
    plain = pools
    pools, scales = zip(*(_quantise(pool, dtype=case.kv_dtype) for pool in pools), strict=True)
  starts = jnp.asarray(np.cumsum([0, *query_lens]), jnp.int32) if case.chunk > 1 else None
  made = []
  for place, key in zip(places, keys[2:], strict=True):
    prefix, own = place[:shared], np.split(place[shared:], np.cumsum(counts - shared)[:-1])
    rows = [np.concatenate([prefix, mine]) for mine in own]
    table = np.stack([np.pad(row, (0, counts.max() - len(row)), constant_values=row[0]) for row in rows])
    query = normal(key, shape=(int(query_lens.sum()), case.num_heads, case.head_dim), dtype=dtype)
    lens = jnp.asarray(kv_lens, jnp.int32)
    pages = jnp.asarray(table, jnp.int32)
    made.append(Inputs(query, pools[0], pools[1], pages, lens, starts, scales[0], scales[1], plain[0], plain[1]))
  return made


@functools.partial(jax.jit, static_argnames="dtype")
def _quantise(pool: jax.Array, *, dtype: str) -> tuple[jax.Array, jax.Array]:
  """(pages in `dtype`, f32[N, page_size, K] scales): each token and head by its own largest value."""
  wide = pool.astype(jnp.float32)
  scales = jnp.abs(wide).max(-1) / LARGEST[dtype]
  scaled = wide / scales[..., None]
  return (jnp.round(scaled) if dtype == "int8" else scaled).astype(dtype), scales


class Expected(NamedTuple):
  exact: jax.Array  # f32[T, H, D]
  allowed: jax.Array  # f32[T, K], the largest error that counts as right


@functools.partial(jax.jit, static_argnames="case")
def expect(case: Case, inputs: Inputs) -> Expected:
  """Attention as it is written down, in float32, of every sequence and head, one KV head at a time.

  The rule is FlashAttention's: an error may be twice that of plain attention in the queries' dtype, and a rounding of
  the largest value more; here for each sequence and KV head by itself.
  """
  query_lens, groups, dtype = case.query_lens(), case.num_heads // case.num_kv_heads, inputs.query.dtype
  starts = jnp.asarray(np.cumsum(query_lens) - query_lens)
  row, column = jnp.arange(query_lens.max()), jnp.arange(inputs.pages.shape[1] * case.page_size)
  queries = inputs.query.reshape(-1, case.num_kv_heads, groups, case.head_dim)

  def gathered(pool, scales, pages, head):
    values = pool[pages, :, head].astype(jnp.float32)  # [P, page_size, D]
    values = values if scales is None else values * scales[pages, :, head][..., None]
    return values.reshape(-1, case.head_dim)

  def one(index):
    sequence, head = index // case.num_kv_heads, index % case.num_kv_heads
    count, kv_len, pages = jnp.asarray(query_lens)[sequence], inputs.kv_lens[sequence], inputs.pages[sequence]
    query = queries[jnp.minimum(starts[sequence] + row, len(queries) - 1), head]  # [rows, G, D]
    key = gathered(inputs.k_pages, inputs.k_scales, pages, head)
    value = gathered(inputs.v_pages, inputs.v_scales, pages, head)
    mask = (column <= (kv_len - count + row)[:, None]) & (row < count)[:, None]
    exact, near = (
      plain_attention(query, key, value, mask, scale=case.scale, dtype=d).astype(jnp.float32)
      for d in ("float32", dtype)
    )
    rounding = max(float(jnp.finfo(dtype).eps), 1e-5)
    return exact, 2 * jnp.abs(near - exact).max() + rounding * jnp.abs(exact).max()

  exact, allowed = jax.lax.map(one, jnp.arange(case.num_sequences * case.num_kv_heads))
  exact = exact.reshape(case.num_sequences, case.num_kv_heads, -1, groups, case.head_dim)
  sequence = np.repeat(np.arange(case.num_sequences), query_lens)  # of each token
  token = np.concatenate([np.arange(n) for n in query_lens])  # its place among the sequence's
  exact = exact[sequence, :, token].reshape(-1, case.num_heads, case.head_dim)
  return Expected(exact, allowed.reshape(case.num_sequences, case.num_kv_heads)[sequence])


@jax.jit
def worst_error(expected: Expected, out: Any) -> jax.Array:
  """The largest error by what is allowed; above 1 is wrong, infinity is NaN."""
  difference = jnp.abs(out.astype(jnp.float32) - expected.exact)
  tokens, kv_heads = expected.allowed.shape
  error = difference.reshape(tokens, kv_heads, -1).max(-1) / expected.allowed
  return jnp.where(jnp.isfinite(difference).all(), error.max(), jnp.inf)


def quantisation_error(quantised: Expected, plain: Expected) -> float:
  """Root mean square of what quantising the pages changes in the output, by that of the output."""
  change = ((quantised.exact - plain.exact) ** 2).mean() / (plain.exact**2).mean()
  return float(jnp.sqrt(change))
