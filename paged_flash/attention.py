"""The public attention ops: their arguments, gradients, and the choice of a kernel.

`flash_attention` takes dense [B, T, H, D] arrays and can be differentiated; `paged_attention` reads keys and values
through a page table and serves inference. `explain` says which kernel a call would run, and why.
"""

import difflib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paged_flash import tuning
from paged_flash.kernels import flash_sm90, paged_sm90, reference, xla
from paged_flash.kernels.arguments import flash_problem, paged_problem
from paged_flash.kernels.problem import FlashOperands, FlashProblem, PagedOperands, PagedProblem, Problem

__all__ = ["choose", "explain", "flash_attention", "paged_attention"]

# In the order of preference.
KERNELS = {"sm90": flash_sm90, "xla": xla, "reference": reference}
PAGED_KERNELS = {"sm90": paged_sm90, "xla": xla, "reference": reference}


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
    value: [B, S, K, Dv] or [S, K, Dv], same dtype; Dv is D in most models.
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
    implementation: "sm90" (Hopper GPUs), "xla" or "reference"; None: the first that supports the call (see `explain`).

  Returns:
    out [B, T, H, Dv] or [T, H, Dv] in the query's dtype; with `return_residual`, (out, lse f32[B, T, H], natural log).

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
  if 0 in operands.query.shape or problem.kv_len == 0:
    out, lse = _nothing_to_attend(problem, operands)
  else:
    out, lse = _flash(problem, name, implementation, _vary_as(operands, operands))
  rows = jnp.shape(query)[:-1]
  out = out.reshape(*rows, problem.value_dim)
  return (out, lse.swapaxes(1, 2).reshape(rows)) if return_residual else out


def paged_attention(
  query: jax.typing.ArrayLike,
  k_pages: jax.typing.ArrayLike,
  v_pages: jax.typing.ArrayLike,
  pages: jax.typing.ArrayLike,
  kv_lens: jax.typing.ArrayLike,
  *,
  query_starts: jax.typing.ArrayLike | None = None,
  max_query_len: int = 1,
  min_query_len: int = 1,
  scale: float | None = None,
  local_window_size: int | tuple[int, int] | None = None,
  logits_soft_cap: float | None = None,
  sinks: jax.typing.ArrayLike | None = None,
  k_scales: jax.typing.ArrayLike | None = None,
  v_scales: jax.typing.ArrayLike | None = None,
  shared_prefixes: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] | None = None,
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
    min_query_len: As many tokens, at least, has every sequence that has any; static. Where these are many, "sm90" is
      spared what is for sequences with few. One with fewer is served too, but it then may differ in its last bits.
    scale: Factor of the scores, 1/sqrt(D) by default.
    local_window_size: Keys visible before a query's own position; of a pair, the first counts.
    logits_soft_cap: Scores become cap * tanh(score / cap).
    sinks: [H], as in `flash_attention`.
    k_scales: f32[N, page_size, K], factors of 8-bit `k_pages`, one per token and head.
    v_scales: Like `k_scales`.
    shared_prefixes: (leaders i32[B], num_pages i32[B]): the first num_pages[b] pages of sequence b are full and those
      of sequence leaders[b] (`cache.prefix.shared_prefixes` finds them). "sm90" then reads what several sequences
      share once for all of them, where each has one query token and there is no window. No bit of the result changes.
    return_residual: Also return the LSE.
    implementation: "sm90" (Hopper GPUs), "xla" or "reference"; None: the first that supports the call (see `explain`).

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
    min_query_len=min_query_len,
    scale=scale,
    local_window_size=local_window_size,
    logits_soft_cap=logits_soft_cap,
    sinks=sinks,
    k_scales=k_scales,
    v_scales=v_scales,
    shared_prefixes=shared_prefixes,
  )
  name, _ = choose(problem, implementation)
  if 0 in operands.query.shape or 0 in operands.k_pages.shape or 0 in operands.pages.shape:
    out = jnp.zeros_like(operands.query)
    lse = jnp.full(operands.query.shape[:-1], -jnp.inf, jnp.float32)
  else:
    out, lse = _paged(problem, name, _vary_as(operands, operands))
  return (out, lse) if return_residual else out


def choose(problem: Problem, implementation: str | None, stage: str = "forward") -> tuple[str, dict[str, str]]:
  """Picks the kernel for a problem.

  Args:
    problem: The static side of a call.
    implementation: A kernel's name, or None for the first that supports the problem.
    stage: "forward" or "backward"; a kernel may serve the one and not the other.

  Returns:
    (name, reasons): the kernel, and for each one passed over why it was.

  Raises:
    ValueError: No such kernel, or it does not support the problem; the text says why.

  Example:
    `choose(problem, None)` -> `("xla", {"sm90": "it takes bfloat16 and float16, not float32"})`.
  """
  kernels = _kernels(problem)
  if implementation is not None:
    if implementation not in kernels:
      raise ValueError(f"implementation must be one of {', '.join(kernels)} or None, {_got_name(implementation)}")
    if reason := kernels[implementation].supports(problem, stage):
      raise ValueError(f"implementation {implementation!r} does not support this call: {reason}")
    return implementation, {}
  reasons = {}
  for name, kernel in kernels.items():
    reason = kernel.supports(problem, stage)
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
    >>> print(explain(flash_attention, x, x, x, is_causal=True))  # doctest: +ELLIPSIS
    flash_attention: batch=1 query_len=4 kv_len=4 num_heads=2 num_kv_heads=2 head_dim=8 dtype=float32 is_causal
      runs xla, block_q=128 block_kv=128
      sm90: it ...
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
  if isinstance(problem, FlashProblem) and (reason := KERNELS[name].supports(problem, "backward")):
    instead = "no gradient" if implementation else f"backward runs {choose(problem, None, 'backward')[0]}"
    lines.append(f"  {instead}: {reason}")
  return "\n".join(lines + [f"  {other}: {reasons.get(other, why)}" for other in _kernels(problem) if other != name])


def _kernels(problem: Problem) -> dict[str, Any]:
  return PAGED_KERNELS if isinstance(problem, PagedProblem) else KERNELS


def _got_name(name: Any) -> str:
  close = difflib.get_close_matches(str(name), KERNELS, n=1)
  return f"got {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def _describe(problem: Problem) -> str:
  def word(name, value):
    name = name.removeprefix("has_") if value is True else name
    return name if value is True else f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"

  usual = {"device": problem.device, "value_dim": problem.head_dim, "scale": problem.head_dim**-0.5, "min_query_len": 1}
  fields = {k: v for k, v in vars(problem).items() if v is not None and v is not False and v != usual.get(k)}
  return " ".join(word(k, v).replace(" ", "") for k, v in fields.items())


# --- the ops over checked operands, none of them empty ---------------------------------------------------------------


def _vary_as(like: Any, arrays: Any) -> Any:
  """Inside `jax.shard_map`: lets all arrays vary over every mesh axis that one in `like` varies over.

  Kernels then see operands of one kind, what they return is of that kind even where a Pallas call forgot it, and the
  gradient of an operand that was the same everywhere is summed.
  """

  def axes(x):
    return jax.typeof(x).manual_axis_type.varying

  union = frozenset().union(*map(axes, jax.tree.leaves(like)))
  return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(sorted(union - axes(x))), to="varying"), arrays)


def _flash_forward(
  problem: FlashProblem, name: str, implementation: str | None, operands: FlashOperands
) -> tuple[jax.Array, jax.Array]:
  del implementation
  return _vary_as(operands, KERNELS[name].forward(problem, operands, **tuning.tiles(problem, name, "forward")))


def _flash_fwd(problem, name, implementation, operands):
  out, lse = _flash_forward(problem, name, implementation, operands)
  return (out, lse), (operands, out, lse)


def _flash_bwd(problem, _, implementation, residuals, cotangents):
  operands, out, lse = residuals
  name, _ = choose(problem, implementation, "backward")
  tiles = tuning.tiles(problem, name, "backward")
  gradients = KERNELS[name].backward(problem, operands, out, lse, *cotangents, **tiles)
  return (FlashOperands(*_vary_as(operands, gradients)),)


_flash_vjp = jax.custom_vjp(_flash_forward, nondiff_argnums=(0, 1, 2))
_flash_vjp.defvjp(_flash_fwd, _flash_bwd)
_flash = jax.jit(_flash_vjp, static_argnums=(0, 1, 2))  # traced and lowered once, however many layers call it


def _paged_forward(problem: PagedProblem, name: str, operands: PagedOperands) -> tuple[jax.Array, jax.Array]:
  return _vary_as(operands, _kernels(problem)[name].paged_forward(problem, operands, **tuning.tiles(problem, name)))


def _paged_fwd(problem, name, operands):
  raise NotImplementedError("paged_attention is for inference and has no gradient; train with flash_attention")


_paged_vjp = jax.custom_vjp(_paged_forward, nondiff_argnums=(0, 1))
_paged_vjp.defvjp(_paged_fwd, lambda problem, name, residuals, cotangents: (residuals,))
_paged = jax.jit(_paged_vjp, static_argnums=(0, 1))


def _nothing_to_attend(problem: FlashProblem, operands: FlashOperands) -> tuple[jax.Array, jax.Array]:
  """What a call with an empty axis gives; kernels never see one."""
  sinks = jnp.full(problem.num_heads, -jnp.inf) if operands.sinks is None else operands.sinks.astype(jnp.float32)
  lse = jnp.broadcast_to(sinks[:, None], (problem.batch, problem.num_heads, problem.query_len))
  if operands.query_lens is not None:
    alive = jnp.arange(problem.query_len) < operands.query_lens[:, None]
    lse = jnp.where(alive[:, None], lse, -jnp.inf)
  return jnp.zeros((*operands.query.shape[:3], problem.value_dim), operands.query.dtype), lse
