"""Paged attention for Hopper GPUs by Pallas Mosaic GPU kernels: what they support, and the call."""

from typing import Any

import jax
import jax.numpy as jnp

from paged_flash.kernels import mosaic, paged_decode_sm90, paged_prefill_sm90
from paged_flash.kernels.problem import PagedOperands, PagedProblem, Problem, is_hopper

PREFILL = "prefill_"


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
  if p.has_scales and p.dtype != "bfloat16":
    return f"it takes 8-bit pages with bfloat16 queries, not with {p.dtype}"
  if p.scale <= 0:
    return f"it wants a positive scale, not {p.scale}"
  if p.head_dim not in (64, 128, 256):
    return f"it wants head_dim 64, 128 or 256, not {p.head_dim}"
  if p.page_size not in (8, 16, 32, 64, 128, 256):
    return f"it wants a page_size that is a power of two from 8 to 256, not {p.page_size}"
  if p.num_heads // p.num_kv_heads > paged_decode_sm90.MOST_COLUMNS:
    return f"it wants at most 64 query heads for each KV head, not {p.num_heads // p.num_kv_heads}"
  most = paged_decode_sm90.max_tokens(p)
  if p.has_scales and p.max_query_len > most:
    return f"it takes 8-bit pages with max_query_len up to {most} with these heads, not {p.max_query_len}"
  return ""


def paged_forward(
  problem: PagedProblem, operands: PagedOperands, *, num_blocks: int | None = None, interpret: Any = None, **tiles: int
) -> tuple[jax.Array, jax.Array]:
  """Paged attention, also inside `jax.vmap` (one call after the other) and `jax.shard_map`.

  `paged_decode_sm90` serves the sequences with few query tokens, and `paged_prefill_sm90`, where there can be any,
  those with more, and the padding. Both write to the same arrays. Where `min_query_len` says that all have more, the
  latter serves them all.

  Args:
    problem: What to compute; `supports` must be "".
    operands: The arrays.
    num_blocks: Of each kernel, the number of multiprocessors by default.
    interpret: `plgpu.InterpretGPUParams` to run on a CPU.
    **tiles: Of `paged_decode_sm90.forward`; those of `paged_prefill_sm90.forward` begin with "prefill_".

  Returns:
    (out [T, H, D], lse f32[T, H], natural log); 0 and -inf for tokens of no sequence.
  """
  run: dict[str, Any] = dict(num_blocks=num_blocks, interpret=interpret)
  long = {name.removeprefix(PREFILL): size for name, size in tiles.items() if name.startswith(PREFILL)}
  short = {name: size for name, size in tiles.items() if not name.startswith(PREFILL)}

  @jax.custom_batching.sequential_vmap
  def attend(operands):
    if problem.min_query_len > paged_decode_sm90.max_tokens(problem):
      return paged_prefill_sm90.forward(problem, operands, **long, **run)
    out, lse = paged_decode_sm90.forward(problem, operands, **short, **run)
    if operands.query_starts is None:
      return out, lse
    if problem.max_query_len > paged_decode_sm90.max_tokens(problem):
      return paged_prefill_sm90.forward(problem, operands, (out, lse), **long, **run)
    alive = (jnp.arange(problem.num_tokens) < operands.query_starts[-1])[:, None]
    return jnp.where(alive[..., None], out, 0), jnp.where(alive, lse, -jnp.inf)

  return mosaic.untyped(attend, operands)
