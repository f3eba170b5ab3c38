"""Testing Pallas Mosaic GPU kernels: in the CPU interpreter, lowered for a GPU that is not there, and by rounding."""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_flash.kernels import reference
from paged_flash.kernels.problem import FlashOperands, FlashProblem
from tests.kernels import cases
from tests.kernels.test_arguments import pretend

SMALL = dict(num_wgs=2, block_kv=64, stages=2, num_blocks=3)  # blocks that take several tiles of queries
LENS = dict(query_seq_lengths="query_lens", key_value_seq_lengths="kv_lens")

# name -> (B, T, S, H, K, D or (D, Dv), tiles of the forward kernel, arguments as in cases.FLASH)
CASES = {
  "full_f16": (1, 200, 136, 1, 1, 64, dict(num_wgs=3), {}),
  "full": (2, 128, 256, 1, 1, 64, {}, {}),
  "causal_gqa3": (1, 64, 128, 6, 2, 64, {}, dict(is_causal=True)),
  "causal_more_keys": (1, 133, 201, 1, 1, 64, dict(query_stages=2), dict(is_causal=True)),
  "causal_more_queries": (1, 203, 101, 1, 1, 64, {}, dict(is_causal=True)),
  "window_pair": (1, 220, 220, 1, 1, 64, {}, dict(local_window_size=(70, 10))),
  "causal_window": (1, 130, 210, 1, 1, 64, dict(stages=3), dict(is_causal=True, local_window_size=(66, 5))),
  "long_gqa_sinks": (1, 390, 300, 2, 1, 64, dict(num_wgs=1), dict(is_causal=True, sinks="sinks")),
  "segments": (1, 220, 220, 1, 1, 64, {}, dict(is_causal=True, segment_ids="segments")),
  "segments_long": (1, 256, 256, 1, 1, 64, dict(num_wgs=1), dict(segment_ids="long_segments")),
  "segments_random": (1, 130, 200, 1, 1, 64, dict(num_wgs=1), dict(segment_ids=("random_query_ids", "random_ids"))),
  "lengths": (3, 66, 90, 1, 1, 64, dict(num_wgs=1, num_blocks=2), dict(is_causal=True, **LENS)),
  "lengths_edges": (
    *(6, 133, 90, 2, 1, (96, 64), {}),
    dict(
      is_causal=True,
      query_seq_lengths=cases.i32(0, 1, 63, 64, 65, 133),
      key_value_seq_lengths=cases.i32(90, 90, 1, 65, 0, 64),
      sinks="sinks",
    ),
  ),
  "lengths_self": (2, 77, 77, 1, 1, 64, {}, dict(is_causal=True, key_value_seq_lengths="kv_lens")),
  "sinks_cap": (1, 70, 130, 2, 2, 64, {}, dict(sinks="sinks", logits_soft_cap=3.0, scale=0.4)),
  "value_dim_64": (1, 130, 130, 1, 1, (128, 64), {}, dict(is_causal=True)),
  "value_dim_256": (1, 70, 70, 1, 1, (32, 256), {}, {}),
  "head_dim_192": (1, 100, 133, 2, 1, (192, 128), dict(num_wgs=1), dict(is_causal=True)),
  "head_dim_160": (
    *(2, 60, 70, 2, 1, 160, dict(num_wgs=1)),
    dict(**LENS, is_causal=True, local_window_size=(36, 0), sinks="sinks", logits_soft_cap=5.0),
  ),
  "everything": (
    *(2, 60, 150, 2, 1, (96, 32), {}),
    dict(
      **LENS,
      is_causal=True,
      local_window_size=(66, 0),
      segment_ids=("query_segments", "segments"),
      sinks="sinks",
      logits_soft_cap=5.0,
    ),
  ),
}

# (T, S), arguments
SCHEDULES = [
  ((2048, 2048), {}),
  ((2048, 2048), dict(is_causal=True)),
  ((1000, 3001), dict(is_causal=True)),
  ((3001, 1000), dict(is_causal=True)),
  ((2500, 2500), dict(local_window_size=(300, 100))),
  ((130, 130), dict(is_causal=True)),
]


def drawn(name: str) -> tuple[dict[str, Any], dict[str, int]]:
  """The arguments of `flash_attention` for a row of the tables, and the tiles of the forward kernel."""
  *sizes, tiles, arguments = CASES[name]
  call = cases.flash_call(name, {name: (*sizes, arguments)})
  if "sinks" in call:
    call["sinks"] += 5  # about the LSE: their gradient would be lost in rounding
  dtype = jnp.float16 if name.endswith("f16") else jnp.bfloat16
  return call | {x: call[x].astype(dtype) for x in ("query", "key", "value")}, SMALL | tiles


def dirty(call: dict[str, Any], *arrays: np.ndarray) -> tuple[dict[str, Any], list[np.ndarray]]:
  """The call, and more arrays [B, T, ...], with NaN in every other row past the sequences' lengths."""

  def planted(x, side):
    if side not in call:
      return x
    row = np.arange(x.shape[1])
    past = (row >= call[side][:, None]) & (row % 2 == 1)
    return np.where(past.reshape(*past.shape, *[1] * (x.ndim - 2)), x.dtype.type(np.nan), x)

  keys = {name: planted(call[name], "key_value_seq_lengths") for name in ("key", "value")}
  query, *arrays_out = (planted(x, "query_seq_lengths") for x in (call["query"], *arrays))
  return call | keys | {"query": query}, arrays_out


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
  """Clears what Pallas's interpreter keeps for the whole process; XLA compiles its many small programs faster."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  interpret_pallas_call.reset_gpu_interpret_mode_state()
  yield
  jax.config.update("jax_disable_most_optimizations", before)


def interpreted(f: Any, *args: Any) -> Any:
  """f(*args, interpret=...) in the interpreter, as numpy arrays: uninitialised memory is NaN there, races fail."""
  params = plgpu.InterpretGPUParams(detect_races=True)
  out = jax.tree.map(np.asarray, jax.jit(lambda args: f(*args, interpret=params))(args))
  assert not interpret_pallas_call.get_races().races_found
  return out


def lowered(f: Any, *args: Any) -> str:
  """StableHLO of f for an H200, its Mosaic kernels checked and lowered as far as that goes without the GPU's tools."""
  with pretend("NVIDIA H200"):
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def count_kernels(text: str) -> int:
  """How many Mosaic kernels a module calls."""
  return len(re.findall(r"custom_call @mosaic_gpu", text))


def largest_array(text: str) -> int:
  """Elements of the largest array in a module."""
  shapes = re.findall(r"tensor<((?:\d+x)+)\w+>", text)
  return max(math.prod(map(int, shape[:-1].split("x"))) for shape in shapes)


# --- FlashAttention's rule: no more than twice the error of plain attention in the same precision ---------------------


def as_float32(operands: FlashOperands) -> FlashOperands:
  return jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x.astype(jnp.float32), operands)


def plain(problem: FlashProblem, operands: FlashOperands) -> tuple[jax.Array, jax.Array]:
  """`reference.forward` with every product rounded to the operands' dtype, and the scale applied to the keys."""
  query, key, value = operands[:3]
  mask = reference.visible(problem, operands)
  groups = problem.num_heads // problem.num_kv_heads
  key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
  scores = jnp.einsum("bthd,bshd->bhts", query, key * jnp.asarray(problem.scale, key.dtype))
  if problem.soft_cap is not None:
    scores = problem.soft_cap * jnp.tanh(scores / problem.soft_cap)
  scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
  sinks = jnp.full(problem.num_heads, -jnp.inf) if operands.sinks is None else operands.sinks
  top = lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), sinks[:, None, None]))
  top = jnp.where(top == -jnp.inf, 0, top)
  weight = jnp.where(mask, jnp.exp(jnp.where(mask, scores - top, 0)), 0)
  total = weight.sum(-1, keepdims=True) + jnp.exp(sinks[:, None, None] - top)
  dead = total == 0
  total = jnp.where(dead, 1, total)
  out = jnp.einsum("bhts,bshd->bthd", (weight / total).astype(value.dtype), value)
  return out, jnp.where(dead, -jnp.inf, top + jnp.log(total))[..., 0]


def assert_rounding(name: str, got: Any, want: Any, low: Any, *, factor: float = 2.0, extra: float = 1e-5) -> None:
  """max |got - want| <= factor max |low - want| + extra + what storing `want` in the dtype of `got` costs, twice."""
  stored = want.astype(got.dtype)
  slack = 2 * jnp.abs((stored + 0.3 - 0.3).astype(jnp.float32) - stored.astype(jnp.float32)).max()
  error, allowed = jnp.abs(got.astype(jnp.float32) - want).max(), jnp.abs(low.astype(jnp.float32) - want).max()
  allowed = factor * allowed + slack + extra
  assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
