"""Flash attention for Hopper GPUs by Pallas Mosaic GPU kernels: what they support, forward and backward."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paged_flash.kernels import flash_backward_sm90, flash_forward_sm90
from paged_flash.kernels.problem import FlashGradients, FlashOperands, FlashProblem, Problem, is_hopper


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
  return ""


def forward(problem: FlashProblem, operands: FlashOperands, **tiles: Any) -> tuple[jax.Array, jax.Array]:
  """`flash_forward_sm90.forward`, also inside `jax.vmap`."""
  return run(flash_forward_sm90.forward, problem, (operands,), tiles)


def backward(
  problem: FlashProblem,
  operands: FlashOperands,
  out: jax.Array,
  lse: jax.Array,
  d_out: jax.Array,
  d_lse: jax.Array,
  **tiles: Any,
) -> FlashGradients:
  """`flash_backward_sm90.backward`, also inside `jax.vmap`."""
  return run(flash_backward_sm90.backward, problem, (operands, out, lse, d_out, d_lse), tiles)


def run(kernel: Callable[..., Any], problem: FlashProblem, trees: tuple[Any, ...], tiles: dict[str, Any]) -> Any:
  """kernel(problem, *trees, **tiles); an axis that `jax.vmap` adds becomes part of the batch."""

  @jax.custom_batching.custom_vmap
  def call(*trees):
    return kernel(problem, *trees, **tiles)

  @call.def_vmap
  def mapped(size, is_mapped, *trees):
    def repeat(x, has_axis):
      return x if has_axis else jnp.broadcast_to(x, (size, *x.shape))

    trees = jax.tree.map(repeat, trees, tuple(is_mapped))
    if problem.has_sinks:  # they have no batch axis
      out = jax.lax.map(lambda trees: run(kernel, problem, trees, tiles), trees)
    else:
      folded = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), trees)
      out = run(kernel, dataclasses.replace(problem, batch=size * problem.batch), folded, tiles)
      out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
    return out, jax.tree.map(lambda _: True, out)

  return call(*trees)
