"""Flash attention for Hopper GPUs by Pallas Mosaic GPU kernels: what they support, forward and backward."""

import functools
from typing import Any

import jax

from paged_flash.kernels import flash_backward_sm90, flash_forward_sm90, mosaic
from paged_flash.kernels.problem import FlashGradients, FlashOperands, FlashProblem, Problem, is_hopper

BACKWARD_DIMS = (64, 128)


def supports(problem: Problem, stage: str = "forward") -> str:
  """Returns "" or why the kernel of a stage, "forward" or "backward", cannot serve the problem."""
  if not isinstance(problem, FlashProblem):
    return "it serves flash_attention only"
  if not is_hopper(problem.device):
    return f"it runs on Hopper GPUs such as the H200, not on {problem.device}"
  if problem.dtype not in ("bfloat16", "float16"):
    return f"it takes bfloat16 and float16, not {problem.dtype}"
  if problem.has_bias or problem.has_mask:
    return "it takes no bias and no mask array"
  if problem.scale <= 0:
    return f"it wants a positive scale, not {problem.scale}"
  for name, size in (("head_dim", problem.head_dim), ("value_dim", problem.value_dim)):
    if size % 32 or not 32 <= size <= 256:
      return f"it wants {name} a multiple of 32 up to 256, not {size}"
    if stage == "backward" and size not in BACKWARD_DIMS:
      return f"its backward pass wants {name} 64 or 128, not {size}"
  return ""


def forward(problem: FlashProblem, operands: FlashOperands, **tiles: Any) -> tuple[jax.Array, jax.Array]:
  """`flash_forward_sm90.forward`, also inside `jax.shard_map`."""
  return mosaic.untyped(functools.partial(flash_forward_sm90.forward, problem, **tiles), operands)


def backward(
  problem: FlashProblem,
  operands: FlashOperands,
  out: jax.Array,
  lse: jax.Array,
  d_out: jax.Array,
  d_lse: jax.Array,
  **tiles: Any,
) -> FlashGradients:
  """`flash_backward_sm90.backward`, also inside `jax.shard_map`."""
  kernel = functools.partial(flash_backward_sm90.backward, problem, **tiles)
  return mosaic.untyped(kernel, operands, out, lse, d_out, d_lse)
