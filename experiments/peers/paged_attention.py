"""Paged attention by others in JAX, and ours asked in other ways: all of the same form.

`Peer.operands(case, inputs)` gives the arrays in the form that the peer takes, which is not part of what is timed.
`Peer.attend(case, *operands, **variant)` returns [T, H, D], or parts to be joined to it; of several variants the
fastest counts. Both raise, saying why, where a package is missing or cannot do the case.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paged_flash as pf
from experiments.paged_cases import Case, Inputs

MOST_BYTES = 16 * 2**30  # of keys and values padded to the longest sequence, beyond which they are not made


@dataclasses.dataclass(frozen=True)
class Peer:
  label: str
  operands: Callable[[Case, Inputs], tuple]
  attend: Callable[..., Any]
  variants: tuple[dict[str, Any], ...] = ({},)
  is_unquantised: bool = False  # what is right for it follows from the pages before they were quantised


def out(result: Any) -> jax.Array:
  """[T, H, D] of what `attend` returned."""
  return jnp.concatenate(result) if isinstance(result, list | tuple) else result


# --- forms ------------------------------------------------------------------------------------------------------------


def paged(case: Case, inputs: Inputs) -> tuple:
  return inputs[:8]


def unquantised(case: Case, inputs: Inputs) -> tuple:
  """The same pages before they were quantised."""
  if not case.kv_dtype:
    raise NotImplementedError("the pages are not quantised")
  return inputs.unquantised[:8]


def in_order(case: Case, inputs: Inputs) -> tuple:
  """Every sequence's pages one after the other, and no others."""
  if case.prefix:
    raise NotImplementedError("shared pages do not lie in order for every sequence")
  counts = case.page_counts()
  rows = np.asarray(inputs.pages)
  owned = np.concatenate([row[:count] for row, count in zip(rows, counts, strict=True)])
  first = np.cumsum(counts) - counts
  table = jnp.asarray(np.minimum(first[:, None] + np.arange(rows.shape[1]), len(owned) - 1), jnp.int32)
  pools = [None if x is None else x[owned] for x in (*inputs[1:3], *inputs[6:8])]
  return (inputs.query, *pools[:2], table, *inputs[4:6], *pools[2:])


def contiguous(case: Case, inputs: Inputs) -> tuple:
  """(query [B, chunk, H, D], key and value [B, longest, K, D], lengths): padded to the longest sequence."""
  _without_quantised(case)
  longest = int(case.kv_lens().max())
  size = 2 * case.num_sequences * longest * case.num_kv_heads * case.head_dim * inputs.query.dtype.itemsize
  if size > MOST_BYTES:
    raise NotImplementedError(f"keys and values padded to the longest sequence take {size / 2**30:.0f} GiB")
  key, value = (_gathered(pool, inputs.pages)[:, :longest] for pool in inputs[1:3])
  return _batched(case, inputs.query), key, value, inputs.kv_lens


def contiguous_chunks(case: Case, inputs: Inputs) -> tuple:
  if case.chunk == 1:
    raise NotImplementedError("timed on chunks only")
  return contiguous(case, inputs)


def own_pool(case: Case, inputs: Inputs) -> tuple:
  """(query, K and V pages, table, lengths): as many pages as the table has entries, at random places of their own."""
  if case.chunk > 1:
    raise NotImplementedError("timed on decode only")
  query, key, value, lens = contiguous(case, inputs)
  if key.shape[1] % case.page_size:
    raise NotImplementedError("it wants whole pages")
  shape = (-1, case.page_size, case.num_kv_heads, case.head_dim)
  places = np.random.default_rng(1).permutation(case.num_sequences * (key.shape[1] // case.page_size))
  order = np.argsort(places)  # the page at each place
  table = jnp.asarray(places.reshape(case.num_sequences, -1), jnp.int32)
  return query, key.reshape(shape)[order], value.reshape(shape)[order], table, lens


def heads_first(case: Case, inputs: Inputs) -> tuple:
  """As `paged` for one query token each, pages [K, N, page_size, D] and queries already multiplied by the scale."""
  if case.chunk > 1:
    raise NotImplementedError("it decodes only")
  if case.kv_dtype == "float8_e4m3fn":
    raise NotImplementedError("it takes 8-bit integers, not floats")
  pools = [None if x is None else jnp.moveaxis(x, 2, 0) for x in (*inputs[1:3], *inputs[6:8])]
  return ((inputs.query * case.scale).astype(inputs.query.dtype), *pools[:2], *inputs[3:5], *pools[2:])


def apart(case: Case, inputs: Inputs) -> tuple:
  """(operands of the decoding sequences, those of the others), each as `paged`."""
  if not case.is_mixed:
    raise NotImplementedError("there are not both decode tokens and chunks")
  n, starts = case.decoding, inputs.query_starts
  assert starts is not None
  pool = inputs[1:3]
  first = (inputs.query[:n], *pool, inputs.pages[:n], inputs.kv_lens[:n], None, *inputs[6:8])
  rest = (inputs.query[n:], *pool, inputs.pages[n:], inputs.kv_lens[n:], starts[n:] - n, *inputs[6:8])
  return first, rest


def with_prefix(case: Case, inputs: Inputs) -> tuple:
  if not case.prefix or case.chunk > 1:
    raise NotImplementedError("no prefix is shared by decode tokens")
  return paged(case, inputs)


def _batched(case: Case, query: jax.Array) -> jax.Array:
  if case.is_mixed:
    raise NotImplementedError("it takes as many query tokens of every sequence")
  return query.reshape(case.num_sequences, case.chunk, *query.shape[1:])


def _gathered(pool: jax.Array, pages: jax.Array) -> jax.Array:
  """[B, P * page_size, K, D]."""
  return pool[pages].reshape(len(pages), -1, *pool.shape[2:])


def _without_quantised(case: Case) -> None:
  if case.kv_dtype:
    raise NotImplementedError("it takes no quantised pages")


# --- attention --------------------------------------------------------------------------------------------------------


def ours(implementation: str) -> dict[str, Peer]:
  """`paged_attention` and, for comparison, itself on the same work in other forms."""
  named = dict(implementation=implementation or None)

  def attend(case: Case, query, k_pages, v_pages, pages, lens, starts, k_scales, v_scales, **more):
    most = 1 if starts is None else case.chunk
    bounds = dict(max_query_len=most, min_query_len=1 if case.decoding else most)
    more = bounds | dict(query_starts=starts, k_scales=k_scales, v_scales=v_scales) | more
    return pf.paged_attention(query, k_pages, v_pages, pages, lens, **more, **named)

  def each(case: Case, first, rest):
    return [attend(case, *first), attend(case, *rest, min_query_len=case.chunk)]

  def flash(case: Case, query, key, value, lens):
    more = dict(key_value_seq_lengths=lens) if case.lengths else {}
    return pf.flash_attention(query, key, value, is_causal=True, **more).reshape(-1, *query.shape[2:])

  def shared(case: Case, *operands):
    leaders = jnp.zeros(case.num_sequences, jnp.int32)
    return attend(case, *operands, shared_prefixes=(leaders, leaders + case.prefix // case.page_size))

  return {
    "ours": Peer("ours", paged, attend),
    "ours_ordered": Peer("ours, pages in order", in_order, attend),
    "ours_unquantised": Peer("ours, pages not quantised", unquantised, attend, is_unquantised=True),
    "ours_apart": Peer("ours, one call each for decode and chunks", apart, each),
    "ours_flash": Peer("flash_attention, contiguous", contiguous_chunks, flash),
    "ours_shared": Peer("ours, told of the prefix", with_prefix, shared),
  }


def cudnn(case: Case, query, key, value, lens, is_ragged: bool):
  if case.chunk > 1 and (case.context > case.chunk or case.lengths):
    raise NotImplementedError("its causal mask begins at the first key")
  if not is_ragged and case.lengths:
    raise NotImplementedError("the lengths differ")
  lengths = dict(query_seq_lengths=jnp.full_like(lens, case.chunk), key_value_seq_lengths=lens) if is_ragged else {}
  attended = jax.nn.dot_product_attention(
    query, key, value, is_causal=case.chunk > 1, implementation="cudnn", **lengths
  )  # fmt: skip
  return attended.reshape(-1, *query.shape[2:])


def cudnn_paged(case: Case, query, k_pages, v_pages, pages, lens):
  from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention

  table, ones = pages[:, None, :, None], jnp.ones_like(lens)
  attended = paged_attention(
    query, k_pages, v_pages, ones, lens, table, table, scale=case.scale, mask_type=MaskType.PADDING
  )
  return attended.reshape(-1, *query.shape[2:])


def fa3(case: Case, query, k_pages, v_pages, pages, lens, starts, k_scales, v_scales, num_splits: int):
  from flash_attn3_jax import flash_mha_with_kvcache

  _without_quantised(case)
  if case.head_dim != 128:
    raise NotImplementedError("it is built for head_dim 128 only")
  causal = case.chunk > 1
  query = _batched(case, query)
  attended = flash_mha_with_kvcache(
    query, k_pages, v_pages, cache_seqlens=lens, page_table=pages, is_causal=causal, num_splits=num_splits
  )
  return attended.reshape(-1, *query.shape[2:])


def triton(case: Case, query, k_pages, v_pages, pages, lens, k_scales, v_scales, k_splits: int):
  warnings.filterwarnings(
    "ignore", "jax.experimental.pallas.ops.gpu.paged_attention|The Pallas Triton backend", DeprecationWarning
  )
  from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

  if pages.shape[1] % k_splits:
    raise NotImplementedError(f"{pages.shape[1]} pages of a sequence are no multiple of {k_splits} splits")
  at_once = math.gcd(pages.shape[1] // k_splits, max(1, 128 // case.page_size))
  return paged_attention(
    query, k_pages, v_pages, pages, lens, k_scales, v_scales, pages_per_compute_block=at_once, k_splits=k_splits
  )


def gather(case: Case, query, k_pages, v_pages, pages, lens, starts, k_scales, v_scales):
  _without_quantised(case)
  padded = 2 * pages.size * case.page_size * case.num_kv_heads * case.head_dim * k_pages.dtype.itemsize
  if padded > MOST_BYTES:
    raise NotImplementedError(f"keys and values padded to the longest sequence take {padded / 2**30:.0f} GiB")
  query = _batched(case, query)
  key, value = (_gathered(pool, pages) for pool in (k_pages, v_pages))
  position = (lens[:, None] - case.chunk + jnp.arange(case.chunk))[:, None, :, None]
  mask = jnp.arange(key.shape[1]) <= position  # bool[B, 1, chunk, S]
  attended = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")
  return attended.reshape(-1, *query.shape[2:])


SPLITS = (1, 2, 4, 8, 16, 32)
PEERS = {
  "cudnn": Peer("cuDNN, contiguous", contiguous, cudnn, (dict(is_ragged=True), dict(is_ragged=False))),
  "cudnn_paged": Peer("cuDNN, paged", own_pool, cudnn_paged),
  "fa3": Peer("FlashAttention-3, paged", paged, fa3, tuple(dict(num_splits=n) for n in SPLITS)),
  "triton": Peer("JAX's Triton kernel", heads_first, triton, tuple(dict(k_splits=n) for n in SPLITS[:5])),
  "gather": Peer("gather + XLA", paged, gather),
}
