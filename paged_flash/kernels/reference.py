"""The definition of both ops: float32, every score in memory, meant to be read.

For query i and key j of one head:
  score[i, j] = cap(scale * query[i] . key[j]) + bias[i, j]            cap(x) = soft_cap * tanh(x / soft_cap)
  weight[i, j] = exp(score[i, j]) / (sum over visible j of exp(score[i, j]) + exp(sink))
  out[i] = sum over visible j of weight[i, j] * value[j]               lse[i] = log of that denominator
A row that sees no key gives 0; its LSE is its sink, else -inf. Padding rows always give 0 and -inf.
"""

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


def supports(problem: Problem, stage: str = "forward") -> str:
  """Returns "": the definition covers every problem."""
  del problem, stage
  return ""


def visible(problem: FlashProblem, operands: FlashOperands) -> jax.Array:
  """Which key each query sees: bool[B, H | 1, T, S]."""
  query_lens, kv_lens, offsets = (x[:, None, None] for x in spans(problem, operands))
  row, column = jnp.arange(problem.query_len)[:, None], jnp.arange(problem.kv_len)
  position = row + offsets  # i32[B, T, 1], where the query stands among the keys
  mask = (row < query_lens) & (column < kv_lens)
  if problem.is_causal:
    mask &= column <= position
  if problem.window is not None:
    mask &= (column >= position - problem.window[0]) & (column <= position + problem.window[1])
  if operands.query_segments is not None and operands.kv_segments is not None:
    mask &= operands.query_segments[:, :, None] == operands.kv_segments[:, None, :]
  mask = mask[:, None]
  return mask if operands.mask is None else mask & operands.mask


def forward(problem: FlashProblem, operands: FlashOperands) -> tuple[jax.Array, jax.Array]:
  """Returns (out [B, T, H, Dv] in the query's dtype, lse f32[B, H, T])."""
  groups = problem.num_heads // problem.num_kv_heads
  mask = visible(problem, operands)
  alive = jnp.arange(problem.query_len) < spans(problem, operands).query_lens[:, None]  # bool[B, T]
  seen = mask.any((1, 2))[:, :, None, None]  # bool[B, S, 1, 1]; keys nobody sees may hold NaN
  query = jnp.where(alive[..., None, None], operands.query, 0).astype(jnp.float32)
  key, value = (
    jnp.repeat(jnp.where(seen, x, 0).astype(jnp.float32), groups, axis=2)  # f32[B, S, H, D | Dv]
    for x in (operands.key, operands.value)
  )
  scores = problem.scale * jnp.einsum("bthd,bshd->bhts", query, key, precision=lax.Precision.HIGHEST)
  if problem.soft_cap is not None:
    scores = problem.soft_cap * jnp.tanh(scores / problem.soft_cap)
  if operands.bias is not None:
    scores += operands.bias.astype(jnp.float32)
  sinks = jnp.full(problem.num_heads, -jnp.inf) if operands.sinks is None else operands.sinks.astype(jnp.float32)
  sinks = sinks[:, None, None]  # f32[H, 1, 1]

  top = jnp.maximum(jnp.where(mask, scores, -jnp.inf).max(-1, keepdims=True), sinks)
  top = lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
  weight = jnp.where(mask, jnp.exp(jnp.where(mask, scores - top, 0)), 0)
  total = weight.sum(-1, keepdims=True) + jnp.exp(sinks - top)
  safe_total = jnp.where(total == 0, 1, total)
  out = jnp.einsum("bhts,bshd->bthd", weight / safe_total, value, precision=lax.Precision.HIGHEST)
  lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(safe_total))[..., 0]
  return out.astype(operands.query.dtype), jnp.where(alive[:, None], lse, -jnp.inf)


def backward(
  problem: FlashProblem,
  operands: FlashOperands,
  out: jax.Array,
  lse: jax.Array,
  d_out: jax.Array,
  d_lse: jax.Array,
) -> FlashGradients:
  """The derivative of the definition. Shapes as in `forward`."""
  del out, lse

  def run(query, key, value, bias, sinks):
    return forward(problem, FlashOperands(query, key, value, bias, sinks, *operands[5:]))

  alive = (jnp.arange(problem.query_len) < spans(problem, operands).query_lens[:, None])[..., None, None]
  return FlashGradients(*jax.vjp(run, *operands[:5])[1]((jnp.where(alive, d_out, 0), d_lse)))


def paged_forward(problem: PagedProblem, operands: PagedOperands) -> tuple[jax.Array, jax.Array]:
  """Gathers every page and unpacks the queries, then the definition. Returns (out [T, H, D], lse f32[T, H])."""
  batch, tokens = problem.batch, problem.num_tokens
  starts = jnp.arange(batch + 1) if operands.query_starts is None else operands.query_starts
  kv_len = problem.pages_per_slot * problem.page_size

  def gather(pool, scales):
    pool = pool if scales is None else pool.astype(jnp.float32) * scales[..., None]
    pages = jnp.take(pool, operands.pages, axis=0, mode="clip")  # [B, P, page_size, K, D]
    return pages.reshape(batch, kv_len, *pool.shape[2:])

  row = jnp.arange(problem.max_query_len)
  query_lens = starts[1:] - starts[:-1]
  token = jnp.where(row < query_lens[:, None], starts[:-1, None] + row, tokens)  # i32[B, T]; `tokens`: no such token
  padded = FlashOperands(
    jnp.take(operands.query, token, axis=0, mode="fill", fill_value=0),
    gather(operands.k_pages, operands.k_scales),
    gather(operands.v_pages, operands.v_scales),
    sinks=operands.sinks,
    query_lens=jnp.where(operands.kv_lens > 0, query_lens, 0),
    kv_lens=operands.kv_lens,
  )
  definition = FlashProblem(
    device=problem.device,
    batch=batch,
    query_len=problem.max_query_len,
    kv_len=kv_len,
    num_heads=problem.num_heads,
    num_kv_heads=problem.num_kv_heads,
    head_dim=problem.head_dim,
    value_dim=problem.head_dim,
    dtype=problem.dtype,
    scale=problem.scale,
    is_causal=True,
    window=None if problem.window is None else (problem.window, 0),
    soft_cap=problem.soft_cap,
    has_query_lens=True,
    has_kv_lens=True,
    has_segments=False,
    has_mask=False,
    has_bias=False,
    has_sinks=problem.has_sinks,
  )
  out, lse = forward(definition, padded)
  no_lse = jnp.full((tokens, problem.num_heads), -jnp.inf, jnp.float32)
  return jnp.zeros_like(operands.query).at[token].set(out, mode="drop"), no_lse.at[token].set(
    lse.swapaxes(1, 2), mode="drop"
  )
