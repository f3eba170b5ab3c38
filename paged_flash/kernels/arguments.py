"""The arguments of the public ops, checked: every argument in, the problem and its operands out."""

import math
import numbers
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from paged_flash.kernels.problem import FlashOperands, FlashProblem, PagedOperands, PagedProblem

DTYPES = ("float32", "bfloat16", "float16")


def target() -> str:
  """Returns what a call made here and now runs on: the device's kind in lower case, as a name of a file could be.

  That is the device of the mesh in use, where one says so (ahead-of-time lowering, `jax.set_mesh`), else JAX's default.

  Example:
    "cpu", "nvidia_h200", "nvidia_h100_80gb_hbm3".
  """
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
  if device is None or isinstance(device, str):  # a string names a platform
    device = jax.devices(device)[0]
  kind = "cpu" if device.platform == "cpu" else device.device_kind
  return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")


def flash_problem(
  query: Any,
  key: Any,
  value: Any,
  bias: Any = None,
  mask: Any = None,
  *,
  is_causal: bool = False,
  scale: float | None = None,
  query_seq_lengths: Any = None,
  key_value_seq_lengths: Any = None,
  local_window_size: int | tuple[int, int] | None = None,
  segment_ids: Any = None,
  logits_soft_cap: float | None = None,
  sinks: Any = None,
) -> tuple[FlashProblem, FlashOperands]:
  """Checks the arguments of `flash_attention`, whose documentation holds for them.

  Raises:
    ValueError: The first argument that is wrong, what was wanted and what came.

  Example:
    `problem, operands = flash_problem(query, key, value, is_causal=True)`.
  """
  arrays = {"query": jnp.asarray(query), "key": jnp.asarray(key), "value": jnp.asarray(value)}
  is_batched = arrays["query"].ndim != 3
  for name, x in arrays.items():
    wanted = ("[T, H, D]", "[S, K, D]") if not is_batched else ("[B, T, H, D]", "[B, S, K, D]")
    if x.ndim != (4 if is_batched else 3):
      raise ValueError(f"{name} must be {wanted[name != 'query']}, got shape {x.shape}")
    _check_dtype(name, x, DTYPES if name == "query" else (str(arrays["query"].dtype),))
  q, k, v = (x if is_batched else x[None] for x in arrays.values())
  batch, query_len, num_heads, head_dim = q.shape
  _, kv_len, num_kv_heads, _ = k.shape
  _check_shape("key", k, (batch, kv_len, num_kv_heads, head_dim))
  value_dim = v.shape[-1]
  _check_shape("value", v, (batch, kv_len, num_kv_heads, value_dim))
  _check_heads(num_heads, num_kv_heads)
  for name, size in (("query", head_dim), ("value", value_dim)):
    if size == 0:
      raise ValueError(f"{name} must have a last dimension of at least 1, got 0")

  full = (batch, num_heads, query_len, kv_len)
  bias, mask = _broadcastable("bias", bias, full), _broadcastable("mask", mask, full)
  if bias is not None:
    _check_dtype("bias", bias, DTYPES)
  if mask is not None:
    _check_dtype("mask", mask, ("bool",))
  query_lens = kv_lens = None
  if query_seq_lengths is not None:
    query_lens = _lengths("query_seq_lengths", query_seq_lengths, batch, query_len)
  if key_value_seq_lengths is not None:
    kv_lens = _lengths("key_value_seq_lengths", key_value_seq_lengths, batch, kv_len)
  query_segments = kv_segments = None
  if segment_ids is not None:
    pair = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)
    if len(pair) != 2:
      raise ValueError(f"segment_ids must be one array or a pair of arrays, got {len(pair)} of them")
    query_segments, kv_segments = (_integers("segment_ids", x) for x in pair)
    if not is_batched:
      query_segments, kv_segments = query_segments[None], kv_segments[None]
    _check_shape("segment_ids of the queries", query_segments, (batch, query_len))
    _check_shape("segment_ids of the keys", kv_segments, (batch, kv_len))

  problem = FlashProblem(
    device=target(),
    batch=batch,
    query_len=query_len,
    kv_len=kv_len,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    value_dim=value_dim,
    dtype=str(q.dtype),
    scale=_scale(scale, head_dim),
    is_causal=bool(is_causal),
    window=_window(local_window_size),
    soft_cap=_soft_cap(logits_soft_cap),
    has_query_lens=query_lens is not None,
    has_kv_lens=kv_lens is not None,
    has_segments=query_segments is not None,
    has_mask=mask is not None,
    has_bias=bias is not None,
    has_sinks=sinks is not None,
  )
  sinks = _sinks(sinks, num_heads)
  return problem, FlashOperands(q, k, v, bias, sinks, mask, query_lens, kv_lens, query_segments, kv_segments)


def paged_problem(
  query: Any,
  k_pages: Any,
  v_pages: Any,
  pages: Any,
  kv_lens: Any,
  *,
  query_starts: Any = None,
  max_query_len: int = 1,
  min_query_len: int = 1,
  scale: float | None = None,
  local_window_size: int | tuple[int, int] | None = None,
  logits_soft_cap: float | None = None,
  sinks: Any = None,
  k_scales: Any = None,
  v_scales: Any = None,
  shared_prefixes: tuple[Any, Any] | None = None,
) -> tuple[PagedProblem, PagedOperands]:
  """Checks the arguments of `paged_attention`, whose documentation holds for them.

  Lengths and page ids are checked when they are concrete, which they are not inside `jax.jit`.

  Raises:
    ValueError: The first argument that is wrong, what was wanted and what came.

  Example:
    `problem, operands = paged_problem(query, k_pages, v_pages, pages, kv_lens)`.
  """
  query, k_pages, v_pages = jnp.asarray(query), jnp.asarray(k_pages), jnp.asarray(v_pages)
  pages = _integers("pages", pages)
  for name, x, wanted in (("query", query, "[T, H, D]"), ("k_pages", k_pages, "[N, page_size, K, D]")):
    if x.ndim != wanted.count(",") + 1:
      raise ValueError(f"{name} must be {wanted}, got shape {x.shape}")
  if pages.ndim != 2:
    raise ValueError(f"pages must be [B, P], got shape {pages.shape}")
  tokens, num_heads, head_dim = query.shape
  num_pages, page_size, num_kv_heads, _ = k_pages.shape
  batch, pages_per_slot = pages.shape
  _check_dtype("query", query, DTYPES)
  _check_shape("k_pages", k_pages, (num_pages, page_size, num_kv_heads, head_dim))
  _check_shape("v_pages", v_pages, k_pages.shape)
  _check_heads(num_heads, num_kv_heads)
  if (k_scales is None) != (v_scales is None):
    raise ValueError("k_scales and v_scales must be given together, got only one of them")
  scales = [None, None]
  if k_scales is None:
    pool_dtypes = (str(query.dtype),)
  else:
    pool_dtypes = ("int8", "float8_e4m3fn", "float8_e5m2")
    scales = [jnp.asarray(k_scales), jnp.asarray(v_scales)]
    for name, x in zip(("k_scales", "v_scales"), scales, strict=True):
      _check_shape(name, x, (num_pages, page_size, num_kv_heads))
      _check_dtype(name, x, ("float32",))
  _check_dtype("k_pages", k_pages, pool_dtypes)
  _check_dtype("v_pages", v_pages, (str(k_pages.dtype),))

  if not isinstance(max_query_len, int) or max_query_len < 1:
    raise ValueError(f"max_query_len must be a static int of at least 1, got {max_query_len!r}")
  if not isinstance(min_query_len, int) or not 1 <= min_query_len <= max_query_len:
    raise ValueError(
      f"min_query_len must be a static int from 1 to max_query_len = {max_query_len}, got {min_query_len!r}"
    )
  kv_lens = _lengths("kv_lens", kv_lens, batch, pages_per_slot * page_size)
  if query_starts is None:
    if tokens != batch or max_query_len != 1:
      raise ValueError(
        f"without query_starts there must be one query token for each sequence (T == B == {batch}, max_query_len 1), "
        f"got T {tokens} and max_query_len {max_query_len}"
      )
  else:
    query_starts = _integers("query_starts", query_starts)
    _check_shape("query_starts", query_starts, (batch + 1,))
    _check_starts(query_starts, kv_lens, tokens, max_query_len)

  window = _window(local_window_size)
  if window is None:  # pages before a window may be gone
    _check_pages(pages, kv_lens, num_pages, page_size)
  prefixes: list[Any] = [None, None]
  if shared_prefixes is not None:
    prefixes = _prefixes(shared_prefixes, pages, kv_lens, page_size)
  problem = PagedProblem(
    device=target(),
    num_tokens=tokens,
    batch=batch,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    num_pages=num_pages,
    page_size=page_size,
    pages_per_slot=pages_per_slot,
    max_query_len=max_query_len,
    dtype=str(query.dtype),
    kv_dtype=str(k_pages.dtype),
    scale=_scale(scale, head_dim),
    window=None if window is None else window[0],
    soft_cap=_soft_cap(logits_soft_cap),
    is_packed=query_starts is not None,
    has_scales=k_scales is not None,
    has_sinks=sinks is not None,
    has_prefixes=shared_prefixes is not None,
    min_query_len=min_query_len,
  )
  return problem, PagedOperands(
    query, k_pages, v_pages, pages, kv_lens, query_starts, _sinks(sinks, num_heads), *scales, *prefixes
  )


def _check_dtype(name: str, x: jax.Array, wanted: tuple[str, ...]) -> None:
  if str(x.dtype) not in wanted:
    raise ValueError(f"{name} must be {' or '.join(wanted)}, got {x.dtype}")


def _check_shape(name: str, x: jax.Array, wanted: tuple[int, ...]) -> None:
  if x.shape != wanted:
    raise ValueError(f"{name} must have shape {wanted}, got {x.shape}")


def _check_heads(num_heads: int, num_kv_heads: int) -> None:
  if num_kv_heads == 0 or num_heads == 0 or num_heads % num_kv_heads:
    raise ValueError(f"query must have a multiple of the {num_kv_heads} key/value heads, got {num_heads} heads")


def _integers(name: str, x: Any) -> jax.Array:
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f"{name} must be int32, got {x.dtype}")
  return x.astype(jnp.int32)


def _concrete(x: jax.Array) -> Any:
  """The values, where they exist: None while tracing."""
  return None if isinstance(x, Tracer) else jax.device_get(x)


def _lengths(name: str, x: Any, batch: int, limit: int) -> jax.Array:
  x = _integers(name, x)
  _check_shape(name, x, (batch,))
  values = _concrete(x)
  if values is not None and ((values < 0) | (values > limit)).any():
    raise ValueError(f"{name} must be within 0..{limit}, got {values.tolist()}")
  return x


def _check_starts(starts: jax.Array, kv_lens: jax.Array, tokens: int, max_query_len: int) -> None:
  values = _concrete(starts)
  if values is None:
    return
  lens = values[1:] - values[:-1]
  if values[0] != 0 or (lens < 0).any() or values[-1] > tokens:
    raise ValueError(f"query_starts must rise from 0 to at most T = {tokens}, got {values.tolist()}")
  if (lens > max_query_len).any():
    raise ValueError(
      f"query_starts must leave each sequence at most max_query_len = {max_query_len} tokens, got {lens}"
    )
  held = _concrete(kv_lens)
  if held is not None and (lens > held).any():
    raise ValueError(f"kv_lens must count the query tokens, got {held.tolist()} for {lens.tolist()} query tokens")


def _check_pages(pages: jax.Array, kv_lens: jax.Array, num_pages: int, page_size: int) -> None:
  ids, lens = _concrete(pages), _concrete(kv_lens)
  if ids is None or lens is None:
    return
  for b, kv_len in enumerate(lens):
    held = ids[b, : -(-kv_len // page_size)]
    if ((held < 0) | (held >= num_pages)).any():
      raise ValueError(f"pages must be within 0..{num_pages - 1} for the {kv_len} tokens of row {b}, got {held}")


def _prefixes(shared_prefixes: Any, pages: jax.Array, kv_lens: jax.Array, page_size: int) -> list[jax.Array]:
  if not isinstance(shared_prefixes, tuple) or len(shared_prefixes) != 2:
    raise ValueError(f"shared_prefixes must be a pair (leaders, num_pages), got {shared_prefixes!r}")
  batch = len(pages)
  leaders, counts = (_integers(f"shared_prefixes[{i}]", x) for i, x in enumerate(shared_prefixes))
  for i, x in enumerate((leaders, counts)):
    _check_shape(f"shared_prefixes[{i}]", x, (batch,))
  values = [_concrete(x) for x in (leaders, counts, pages, kv_lens)]
  if any(x is None for x in values):
    return [leaders, counts]
  for b, (leader, count) in enumerate(zip(*values[:2], strict=True)):
    if not 0 <= leader < batch:
      raise ValueError(f"shared_prefixes[0] must name sequences 0..{batch - 1}, got {leader} for sequence {b}")
    full = min(values[3][b], values[3][leader]) // page_size
    if not 0 <= count <= full or (values[2][b, :count] != values[2][leader, :count]).any():
      raise ValueError(
        f"shared_prefixes[1] must count leading full pages that sequence {b} has in common with its leader {leader}, "
        f"got {count}"
      )
  return [leaders, counts]


def _broadcastable(name: str, x: Any, full: tuple[int, ...]) -> jax.Array | None:
  if x is None:
    return None
  x = jnp.asarray(x)
  if x.ndim > 4 or any(got not in (1, want) for got, want in zip(x.shape[::-1], full[::-1], strict=False)):
    raise ValueError(f"{name} must broadcast to [B, H, T, S] = {full}, got shape {x.shape}")
  return x.reshape(*[1] * (4 - x.ndim), *x.shape)


def _sinks(sinks: Any, num_heads: int) -> jax.Array | None:
  if sinks is None:
    return None
  sinks = jnp.asarray(sinks)
  _check_shape("sinks", sinks, (num_heads,))
  _check_dtype("sinks", sinks, DTYPES)
  return sinks


def _number(name: str, x: Any) -> float:
  if not isinstance(x, numbers.Real) or not math.isfinite(x):
    raise ValueError(f"{name} must be a finite static number, got {x!r}")
  return float(x)


def _scale(scale: float | None, head_dim: int) -> float:
  return head_dim**-0.5 if scale is None else _number("scale", scale)


def _soft_cap(soft_cap: float | None) -> float | None:
  if soft_cap is None:
    return None
  soft_cap = _number("logits_soft_cap", soft_cap)
  if soft_cap <= 0:
    raise ValueError(f"logits_soft_cap must be positive, got {soft_cap}")
  return soft_cap


def _window(window: int | tuple[int, int] | None) -> tuple[int, int] | None:
  if window is None:
    return None
  pair = (window, window) if isinstance(window, int) else tuple(window)
  if len(pair) != 2 or not all(isinstance(x, int) and x >= 0 for x in pair):
    raise ValueError(f"local_window_size must be an int or a (left, right) pair of ints, 0 or more, got {window!r}")
  return pair
