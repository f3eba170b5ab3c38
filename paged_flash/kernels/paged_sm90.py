"""Paged attention for Hopper GPUs by Pallas Mosaic GPU kernels: what they support, and the call."""

from typing import Any

import jax
import jax.numpy as jnp

from paged_flash.kernels import mosaic, paged_decode_sm90
from paged_flash.kernels.problem import PagedOperands, PagedProblem, Problem, is_hopper


def supports(problem: Problem, stage: str = "forward") -> str:
  """Returns "" or why the kernels cannot serve the problem."""
  del stage
  p = problem
  if not isinstance(p, PagedProblem):
    return "it serves paged_attention only"
  if not is_hopper(p.device):
    return f"it runs on Hopper GPUs such as the H200, not on {p.device}"
  if p.dtype not in ("bfloat16", "float16"):
    return f"it takes bfloat16 and float16, not {p.dtype}"
  if p.kv_dtype != p.dtype:
    return f"it takes pages of the query's dtype, not of {p.kv_dtype}"
  if p.scale <= 0:
    return f"it wants a positive scale, not {p.scale}"
  if p.head_dim not in (64, 128, 256):
    return f"it wants head_dim 64, 128 or 256, not {p.head_dim}"
  if p.page_size not in (8, 16, 32, 64, 128, 256):
    return f"it wants a page_size that is a power of two from 8 to 256, not {p.page_size}"
  if p.num_heads // p.num_kv_heads > paged_decode_sm90.ROWS:
    return f"it wants at most 64 query heads for each KV head, not {p.num_heads // p.num_kv_heads}"
  most = paged_decode_sm90.max_tokens(p)
  if p.max_query_len > most:
    return f"it wants max_query_len up to {most} with these heads, not {p.max_query_len}"
  return ""


def paged_forward(problem: PagedProblem, operands: PagedOperands, **tiles: Any) -> tuple[jax.Array, jax.Array]:
  """`paged_decode_sm90.forward`, also inside `jax.vmap` (one call after the other) and `jax.shard_map`.

  Returns:
    (out [T, H, D], lse f32[T, H], natural log); 0 and -inf for tokens of no sequence.
  """

  @jax.custom_batching.sequential_vmap
  def attend(operands):
    out, lse = paged_decode_sm90.forward(problem, operands, **tiles)
    if operands.query_starts is None:
      return out, lse
    alive = (jnp.arange(problem.num_tokens) < operands.query_starts[-1])[:, None]
    return jnp.where(alive[..., None], out, 0), jnp.where(alive, lse, -jnp.inf)

  return mosaic.untyped(attend, operands)
