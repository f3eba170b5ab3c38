"""The public attention ops: argument checks, gradients, and the choice of a kernel.

`flash_attention` takes dense [B, T, H, D] arrays and can be differentiated; `paged_attention` reads keys and values
through a page table and serves inference. `explain` says which kernel a call would run, and why.
"""

import difflib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from paged_flash import tuning
from paged_flash.kernels import reference, xla
from paged_flash.kernels.problem import FlashOperands, FlashProblem, PagedOperands, PagedProblem, Problem

__all__ = ["choose", "explain", "flash_attention", "paged_attention"]

# In the order of preference.
KERNELS = {"xla": xla, "reference": reference}
DTYPES = ("float32", "bfloat16", "float16")


def flash_attention(
  query: jax.typing.ArrayLike,
  key: jax.typing.ArrayLike,
  value: jax.typing.ArrayLike,
  bias: jax.typing.ArrayLike | None = None,
  mask: jax.typing.ArrayLike | None = None,
  *,
  is_causal: bool = False,
  scale: float | None = None,
  query_seq_lengths: jax.typing.ArrayLike | None = None,
  key_value_seq_lengths: jax.typing.ArrayLike | None = None,
  local_window_size: int | tuple[int, int] | None = None,
  segment_ids: Any = None,
  logits_soft_cap: float | None = None,
  sinks: jax.typing.ArrayLike | None = None,
  return_residual: bool = False,
  implementation: str | None = None,
) -> Any:
  """Attention without the N x N score matrix, forward or backward; a drop-in for `jax.nn.dot_product_attention`.

  Query i stands at key position p = i + kv_len - query_len (the last query at the last key). Where T == S this is i, as
  in `jax.nn.dot_product_attention`, unless both lengths are given and differ. A row that sees no key gives 0, LSE -inf
  and gradients 0. Keys that no query sees (past the length) may hold anything, NaN included.

  Our notation and Dao et al. 2022 ("FlashAttention", Algorithms 1 and 2): their N is our T and S, their d our D; Q, K,
  V, O are query, key, value, out of one head; tau is `scale`; MASK is all the masking below; our LSE is m + log l, kept
  in place of m and l as in their successor. There is no dropout.

  Args:
    query: [B, T, H, D] or [T, H, D]; float32, bfloat16 or float16.
    key: [B, S, K, D] or [S, K, D], same dtype. H is a multiple of K; query head h reads KV head h // (H // K).
    value: Like `key`.
    bias: Added to the scaled and capped scores; broadcasts to [B, H, T, S]. Differentiable.
    mask: bool, broadcasts to [B, H, T, S]; True takes part.
    is_causal: Query i sees key j only if j <= p.
    scale: Factor of the scores, 1/sqrt(D) by default.
    query_seq_lengths: i32[B], valid rows of each query; the rest gives 0.
    key_value_seq_lengths: i32[B], valid keys.
    local_window_size: Query i sees p - left <= j <= p + right. One int is both.
    segment_ids: i32[B, T] for queries and keys (T == S), or a pair (i32[B, T], i32[B, S]). Equal ids see each other.
    logits_soft_cap: Scores become cap * tanh(score / cap), before the bias.
    sinks: [H], one more score per head without a value: exp(sink) is added to the denominator. Differentiable.
    return_residual: Also return the LSE. Unlike jax.nn's it is float32 and can be differentiated.
    implementation: "xla" or "reference"; None takes the first that supports the call (see `explain`).

  Returns:
    out, like `query`; with `return_residual`, (out, lse f32[B, T, H], natural log).

  Raises:
    ValueError: An argument has the wrong shape, dtype or value, or the named implementation does not support the call.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.ones((1, 4, 2, 8))
    >>> flash_attention(x, x, x, is_causal=True).shape
    (1, 4, 2, 8)
  """
  problem, operands = flash_problem(
    query,
    key,
    value,
    bias,
    mask,
    is_causal=is_causal,
    scale=scale,
    query_seq_lengths=query_seq_lengths,
    key_value_seq_lengths=key_value_seq_lengths,
    local_window_size=local_window_size,
    segment_ids=segment_ids,
    logits_soft_cap=logits_soft_cap,
    sinks=sinks,
  )
  name, _ = choose(problem, implementation)
  shape = jnp.shape(query)
  if 0 in operands.query.shape or problem.kv_len == 0:
    out, lse = _nothing_to_attend(problem, operands)
  else:
    out, lse = _flash(problem, name, operands)
  return (out.reshape(shape), lse.reshape(shape[:-1])) if return_residual else out.reshape(shape)


def paged_attention(
  query: jax.typing.ArrayLike,
  k_pages: jax.typing.ArrayLike,
  v_pages: jax.typing.ArrayLike,
  pages: jax.typing.ArrayLike,
  kv_lens: jax.typing.ArrayLike,
  *,
  query_starts: jax.typing.ArrayLike | None = None,
  max_query_len: int = 1,
  scale: float | None = None,
  local_window_size: int | tuple[int, int] | None = None,
  logits_soft_cap: float | None = None,
  sinks: jax.typing.ArrayLike | None = None,
  k_scales: jax.typing.ArrayLike | None = None,
  v_scales: jax.typing.ArrayLike | None = None,
  return_residual: bool = False,
  implementation: str | None = None,
) -> Any:
  """Causal attention of packed tokens to keys and values that live in pages; decode tokens and prefill chunks together.

  Sequence b holds `kv_lens[b]` tokens; its query tokens are the last of them and already written to their pages. A
  token's result does not depend on the other sequences. Inference only: it has no gradient.

  Our notation and Kwon et al. 2023 ("PagedAttention", equation 4): their KV block size B is `page_size`, the key block
  K_j of a sequence is `k_pages[pages[b, j]]`, V_j likewise, a_ij its row of softmax weights, o_i a row of `out`; their
  block table is `pages`.

  Args:
    query: [T, H, D], the tokens of all sequences, packed; float32, bfloat16 or float16.
    k_pages: [N, page_size, K, D], the pool; the query's dtype, or an 8-bit one with `k_scales`.
    v_pages: Like `k_pages`.
    pages: i32[B, P], page ids of each sequence in order. Entries past its end may hold anything.
    kv_lens: i32[B], tokens held, the new ones included; 0 marks an inactive slot, which gives 0.
    query_starts: i32[B + 1], sequence b's tokens are query[query_starts[b]:query_starts[b + 1]]; tokens after the last
      are padding and give 0, LSE -inf. None: one token for each sequence (T == B).
    max_query_len: Bound on the tokens of one sequence; static.
    scale: Factor of the scores, 1/sqrt(D) by default.
    local_window_size: Keys visible before a query's own position; of a pair, the first counts.
    logits_soft_cap: Scores become cap * tanh(score / cap).
    sinks: [H], as in `flash_attention`.
    k_scales: f32[N, page_size, K], factors of 8-bit `k_pages`, one per token and head.
    v_scales: Like `k_scales`.
    return_residual: Also return the LSE.
    implementation: "xla" or "reference"; None takes the first that supports the call (see `explain`).

  Returns:
    out [T, H, D] in the query's dtype; with `return_residual`, (out, lse f32[T, H], natural log).

  Raises:
    ValueError: An argument has the wrong shape, dtype or value (lengths are checked when they are concrete), or the
      named implementation does not support the call.
    NotImplementedError: The call is differentiated.

  Example:
    >>> import jax.numpy as jnp
    >>> k_pages = v_pages = jnp.ones((8, 4, 2, 16))  # 8 pages of 4 tokens, 2 KV heads
    >>> pages = jnp.array([[5, 2, -1], [0, -1, -1]])
    >>> paged_attention(jnp.ones((2, 6, 16)), k_pages, v_pages, pages, jnp.array([7, 3])).shape
    (2, 6, 16)
  """
  problem, operands = paged_problem(
    query,
    k_pages,
    v_pages,
    pages,
    kv_lens,
    query_starts=query_starts,
    max_query_len=max_query_len,
    scale=scale,
    local_window_size=local_window_size,
    logits_soft_cap=logits_soft_cap,
    sinks=sinks,
    k_scales=k_scales,
    v_scales=v_scales,
  )
  name, _ = choose(problem, implementation)
  if 0 in operands.query.shape or 0 in operands.k_pages.shape or 0 in operands.pages.shape:
    out = jnp.zeros_like(operands.query)
    lse = jnp.full(operands.query.shape[:-1], -jnp.inf, jnp.float32)
  else:
    out, lse = _paged(problem, name, operands)
  return (out, lse) if return_residual else out


def choose(problem: Problem, implementation: str | None) -> tuple[str, dict[str, str]]:
  """Picks the kernel for a problem.

  Args:
    problem: The static side of a call.
    implementation: A kernel's name, or None for the first that supports the problem.

  Returns:
    (name, reasons): the kernel, and for each one passed over why it was.

  Raises:
    ValueError: No such kernel, or it does not support the problem; the text says why.

  Example:
    `choose(problem, None)` -> `("xla", {})`.
  """
  if implementation is not None:
    if implementation not in KERNELS:
      raise ValueError(f"implementation must be one of {', '.join(KERNELS)} or None, {_got_name(implementation)}")
    if reason := KERNELS[implementation].supports(problem):
      raise ValueError(f"implementation {implementation!r} does not support this call: {reason}")
    return implementation, {}
  reasons = {}
  for name, kernel in KERNELS.items():
    reason = kernel.supports(problem)
    if not reason:
      return name, reasons
    reasons[name] = reason
  raise ValueError("no implementation supports this call: " + "; ".join(f"{n}: {r}" for n, r in reasons.items()))


def explain(op: Callable, *args: Any, **kwargs: Any) -> str:
  """Says which kernel a call would run, with which tiles, and why not the others. Runs nothing.

  Args:
    op: `flash_attention` or `paged_attention`.
    *args: The call's arguments.
    **kwargs: The call's keyword arguments.

  Returns:
    A few lines of text.

  Raises:
    ValueError: As the call itself would; also for another `op`.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.ones((1, 4, 2, 8))
    >>> print(explain(flash_attention, x, x, x, is_causal=True))
    flash_attention: batch=1 query_len=4 kv_len=4 num_heads=2 num_kv_heads=2 head_dim=8 dtype=float32 is_causal
      runs xla, block_q=128 block_kv=128
      reference: not needed, xla comes first
  """
  calls = {flash_attention: flash_problem, paged_attention: paged_problem}
  if op not in calls:
    raise ValueError(f"op must be flash_attention or paged_attention, got {op!r}")
  implementation = kwargs.pop("implementation", None)
  kwargs.pop("return_residual", None)
  problem, _ = calls[op](*args, **kwargs)
  name, reasons = choose(problem, implementation)
  why = f"{name} was named" if implementation else f"not needed, {name} comes first"
  tiles = " ".join(f"{k}={v}" for k, v in tuning.tiles(problem, name).items()) or "no tiles"
  lines = [f"{op.__name__}: {_describe(problem)}", f"  runs {name}, {tiles}"]
  return "\n".join(lines + [f"  {other}: {reasons.get(other, why)}" for other in KERNELS if other != name])


def _describe(problem: Problem) -> str:
  def word(name, value):
    name = name.removeprefix("has_") if value is True else name
    return name if value is True else f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"

  default = problem.head_dim**-0.5
  fields = {k: v for k, v in vars(problem).items() if v is not None and v is not False}
  return " ".join(word(k, v).replace(" ", "") for k, v in fields.items() if not (k == "scale" and v == default))


# --- the ops over checked operands, none of them empty ---------------------------------------------------------------


def _flash_forward(problem: FlashProblem, name: str, operands: FlashOperands) -> tuple[jax.Array, jax.Array]:
  return KERNELS[name].forward(problem, operands, **tuning.tiles(problem, name))


def _flash_fwd(problem, name, operands):
  out, lse = _flash_forward(problem, name, operands)
  return (out, lse), (operands, out, lse)


def _flash_bwd(problem, name, residuals, cotangents):
  operands, out, lse = residuals
  gradients = KERNELS[name].backward(problem, operands, out, lse, *cotangents, **tuning.tiles(problem, name))
  return (FlashOperands(*gradients),)


_flash_vjp = jax.custom_vjp(_flash_forward, nondiff_argnums=(0, 1))
_flash_vjp.defvjp(_flash_fwd, _flash_bwd)
_flash = jax.jit(_flash_vjp, static_argnums=(0, 1))  # traced and lowered once, however many layers call it


def _paged_forward(problem: PagedProblem, name: str, operands: PagedOperands) -> tuple[jax.Array, jax.Array]:
  return KERNELS[name].paged_forward(problem, operands, **tuning.tiles(problem, name))


def _paged_fwd(problem, name, operands):
  raise NotImplementedError("paged_attention is for inference and has no gradient; train with flash_attention")


_paged_vjp = jax.custom_vjp(_paged_forward, nondiff_argnums=(0, 1))
_paged_vjp.defvjp(_paged_fwd, lambda problem, name, residuals, cotangents: (residuals,))
_paged = jax.jit(_paged_vjp, static_argnums=(0, 1))


def _nothing_to_attend(problem: FlashProblem, operands: FlashOperands) -> tuple[jax.Array, jax.Array]:
  """What a call with an empty axis gives; kernels never see one."""
  shape = operands.query.shape[:3]
  lse = jnp.full(shape, -jnp.inf) if operands.sinks is None else jnp.broadcast_to(operands.sinks, shape)
  if operands.query_lens is not None:
    alive = jnp.arange(problem.query_len) < operands.query_lens[:, None]
    lse = jnp.where(alive[..., None], lse, -jnp.inf)
  return jnp.zeros_like(operands.query), lse.astype(jnp.float32)


# --- checks: every public argument in, problem and operands out ------------------------------------------------------


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
  """Checks the arguments of `flash_attention`."""
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
  _check_shape("value", v, k.shape)
  _check_heads(num_heads, num_kv_heads)
  if head_dim == 0:
    raise ValueError("query must have a head_dim of at least 1, got 0")

  full = (batch, num_heads, query_len, kv_len)
  bias, mask = _broadcastable("bias", bias, full), _broadcastable("mask", mask, full)
  if bias is not None:
    _check_dtype("bias", bias, DTYPES)
  if mask is not None:
    _check_dtype("mask", mask, ("bool",))
  query_lens = _lengths("query_seq_lengths", query_seq_lengths, batch, query_len)
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
    batch=batch,
    query_len=query_len,
    kv_len=kv_len,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
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
  scale: float | None = None,
  local_window_size: int | tuple[int, int] | None = None,
  logits_soft_cap: float | None = None,
  sinks: Any = None,
  k_scales: Any = None,
  v_scales: Any = None,
) -> tuple[PagedProblem, PagedOperands]:
  """Checks the arguments of `paged_attention`."""
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
  problem = PagedProblem(
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
  )
  return problem, PagedOperands(
    query, k_pages, v_pages, pages, kv_lens, query_starts, _sinks(sinks, num_heads), *scales
  )


def _got_name(name: Any) -> str:
  close = difflib.get_close_matches(str(name), KERNELS, n=1)
  return f"got {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")


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


def _concrete(x: jax.Array) -> np.ndarray | None:
  """The values, where they exist: None while tracing."""
  return None if isinstance(x, Tracer) else jax.device_get(x)


def _lengths(name: str, x: Any, batch: int, limit: int) -> jax.Array | None:
  if x is None:
    return None
  x = _integers(name, x)
  _check_shape(name, x, (batch,))
  values = _concrete(x)
  if values is not None and ((values < 0) | (values > limit)).any():
    raise ValueError(f"{name} must be within 0..{limit}, got {values.tolist()}")
  return x


def _check_starts(starts: jax.Array, kv_lens: jax.Array | None, tokens: int, max_query_len: int) -> None:
  values = _concrete(starts)
  if values is None:
    return
  lens = np.diff(values)
  if values[0] != 0 or (lens < 0).any() or values[-1] > tokens:
    raise ValueError(f"query_starts must rise from 0 to at most T = {tokens}, got {values.tolist()}")
  if (lens > max_query_len).any():
    raise ValueError(
      f"query_starts must leave each sequence at most max_query_len = {max_query_len} tokens, got {lens}"
    )
  held = None if kv_lens is None else _concrete(kv_lens)
  if held is not None and (lens > held).any():
    raise ValueError(f"kv_lens must count the query tokens, got {held.tolist()} for {lens.tolist()} query tokens")


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
  if not isinstance(x, int | float | np.integer | np.floating) or not np.isfinite(x):
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
