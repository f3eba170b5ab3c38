"""Attention in float64 numpy, one row at a time, written from the papers and not from the package."""

import numpy as np


def _row(query, key, value, bias, sink, *, scale, soft_cap):
  """One query against the keys it sees: (out [Dv], lse)."""
  if len(key) == 0:
    return np.zeros(value.shape[-1]), sink
  score = scale * (key @ query)
  if soft_cap is not None:
    score = soft_cap * np.tanh(score / soft_cap)
  score = score + bias
  top = max(score.max(), sink)
  if top == -np.inf:
    return np.zeros(value.shape[-1]), top
  weight = np.exp(score - top)
  total = weight.sum() + np.exp(sink - top)
  return weight @ value / total, top + np.log(total)


def flash(
  query,
  key,
  value,
  bias=None,
  mask=None,
  *,
  is_causal=False,
  scale=None,
  query_seq_lengths=None,
  key_value_seq_lengths=None,
  local_window_size=None,
  segment_ids=None,
  logits_soft_cap=None,
  sinks=None,
):
  """`paged_flash.flash_attention` for batched arrays. Returns (out f64[B, T, H, Dv], lse f64[B, T, H])."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  (batch, rows, heads, head_dim), (_, columns, kv_heads, _) = query.shape, key.shape
  shape = (batch, heads, rows, columns)
  bias = np.broadcast_to(0.0 if bias is None else np.asarray(bias, np.float64), shape)
  mask = np.broadcast_to(True if mask is None else mask, shape)
  scale = 1 / np.sqrt(head_dim) if scale is None else scale
  window = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
  if segment_ids is None:
    segment_ids = np.zeros((batch, max(rows, columns)), np.int32)
  query_ids, kv_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
  out, lse = np.zeros((batch, rows, heads, value.shape[-1])), np.full((batch, rows, heads), -np.inf)
  j = np.arange(columns)
  for b in range(batch):
    query_len = rows if query_seq_lengths is None else query_seq_lengths[b]
    kv_len = columns if key_value_seq_lengths is None else key_value_seq_lengths[b]
    shift = kv_len - query_len
    if rows == columns and (query_seq_lengths is None) != (key_value_seq_lengths is None):
      shift = 0
    for i in range(query_len):
      sees = (j < kv_len) & (kv_ids[b, :columns] == query_ids[b, i])
      if is_causal:
        sees &= j <= i + shift
      if window is not None:
        sees &= (j >= i + shift - window[0]) & (j <= i + shift + window[1])
      for h in range(heads):
        seen = np.flatnonzero(sees & mask[b, h, i])
        kv = h // (heads // kv_heads)
        sink = -np.inf if sinks is None else float(sinks[h])
        out[b, i, h], lse[b, i, h] = _row(
          query[b, i, h],
          key[b, seen, kv],
          value[b, seen, kv],
          bias[b, h, i, seen],
          sink,
          scale=scale,
          soft_cap=logits_soft_cap,
        )
  return out, lse


def paged(query, k_pages, v_pages, pages, kv_lens, *, query_starts=None, k_scales=None, v_scales=None, **kwargs):
  """`paged_flash.paged_attention`, each sequence copied out of its pages. Returns (out f64[T, H, D], lse f64[T, H])."""
  query = np.asarray(query, np.float64)
  starts = np.arange(len(kv_lens) + 1) if query_starts is None else np.asarray(query_starts)
  out, lse = np.zeros(query.shape), np.full(query.shape[:2], -np.inf)
  for b, kv_len in enumerate(kv_lens):
    tokens = slice(starts[b], starts[b + 1])
    if kv_len == 0 or starts[b] == starts[b + 1]:
      continue

    def contiguous(pool, scales, b=b, kv_len=kv_len):
      pool = np.asarray(pool, np.float64) * (1 if scales is None else np.asarray(scales, np.float64)[..., None])
      page_size = pool.shape[1]
      return np.stack([pool[pages[b][t // page_size], t % page_size] for t in range(kv_len)])[None]

    key, value = contiguous(k_pages, k_scales), contiguous(v_pages, v_scales)
    out[tokens], lse[tokens] = (x[0] for x in flash(query[None, tokens], key, value, is_causal=True, **kwargs))
  return out, lse
