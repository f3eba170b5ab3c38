"""What the Hopper kernels support, and that all of it lowers for an H200."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import paged_flash as pf
from paged_flash.kernels import flash_sm90
from paged_flash.kernels.arguments import flash_problem
from paged_flash.kernels.problem import FlashProblem
from tests.kernels import mosaic_help
from tests.kernels.test_arguments import pretend


def problem_of(device: str = "nvidia_h200", dtype: Any = jnp.bfloat16, dims=(64, 64), **arguments) -> FlashProblem:
  x, value = (jnp.zeros((1, 4, 2, dim), dtype) for dim in dims)
  return dataclasses.replace(flash_problem(x, x, value, **arguments)[0], device=device)


@pytest.mark.parametrize(
  "stage, problem, reason",
  [
    ("forward", problem_of(), ""),
    ("forward", problem_of(dtype=jnp.float16, dims=(96, 256), is_causal=True, sinks=jnp.zeros(2)), ""),
    ("backward", problem_of(dims=(128, 96), logits_soft_cap=2.0, local_window_size=3), ""),
    ("forward", problem_of("cpu"), "it runs on Hopper GPUs such as the H200, not on cpu"),
    ("forward", problem_of("nvidia_b200"), "it runs on Hopper GPUs such as the H200, not on nvidia_b200"),
    ("forward", problem_of(dtype=jnp.float32), "it takes bfloat16 and float16, not float32"),
    ("forward", problem_of(bias=jnp.zeros((4, 4))), "it takes no bias and no mask array"),
    ("forward", problem_of(mask=jnp.ones((4, 4), bool)), "it takes no bias and no mask array"),
    ("forward", problem_of(scale=-0.5), "it wants a positive scale, not -0.5"),
    ("forward", problem_of(dims=(80, 64)), "it wants head_dim a multiple of 32 up to 256, not 80"),
    ("forward", problem_of(dims=(64, 288)), "it wants value_dim a multiple of 32 up to 256, not 288"),
    ("backward", problem_of("cpu"), "it runs on Hopper GPUs such as the H200, not on cpu"),
    ("backward", problem_of(dims=(192, 64)), ""),
    ("backward", problem_of(dims=(160, 256), sinks=jnp.zeros(2)), ""),
    ("backward", problem_of(dims=(112, 64)), "it wants head_dim a multiple of 32 up to 256, not 112"),
  ],
)
def test_supports_says_why_not(stage, problem, reason):
  assert flash_sm90.supports(problem, stage) == reason


def test_a_call_on_a_cpu_takes_xla_or_says_why_not():
  x = jnp.ones((1, 4, 2, 64), jnp.bfloat16)
  why = "it runs on Hopper GPUs such as the H200, not on cpu"
  with pretend("some CPU", platform="cpu"):
    text = pf.explain(pf.flash_attention, x, x, x)
    assert "  runs xla, " in text and f"  sm90: {why}" in text
    with pytest.raises(ValueError, match=f"implementation 'sm90' does not support this call: {why}"):
      pf.flash_attention(x, x, x, implementation="sm90")


# --- lowering ---------------------------------------------------------------------------------------------------------

# name -> (T, S, H, K, D or (D, Dv), dtype, arguments by name of an array in `shapes`); batch 2
LONG = 4096
CONFIGURATIONS: dict[str, tuple[Any, ...]] = {
  f"{dim}-{dtype}-{'causal' if is_causal else 'full'}": (LONG, LONG, 2, 2, dim, dtype, dict(is_causal=is_causal))
  for dim in (64, 96, 128, 192, 256)
  for dtype, is_causal in (("bfloat16", False), ("bfloat16", True), ("float16", True))
  if dtype == "bfloat16" or dim in (128, 256)
}
CONFIGURATIONS |= {
  f"{dim}-{name}": (*sizes, dim, "bfloat16", arguments)
  for dim in (64, 128, 256)
  for name, *sizes, arguments in (
    (
      *("lengths-window", 3001, LONG - 1, 2, 1),
      dict(is_causal=True, local_window_size=(1000, 0), query_seq_lengths="lens", key_value_seq_lengths="lens"),
    ),
    ("segments-gqa7", LONG, LONG, 7, 1, dict(is_causal=True, segment_ids="ids")),
    ("sinks-cap-window", 3001, LONG, 2, 2, dict(sinks="sinks", logits_soft_cap=30.0, local_window_size=(700, 300))),
  )
}
CONFIGURATIONS |= {
  "192-value-128": (LONG, LONG, 2, 2, (192, 128), "bfloat16", dict(is_causal=True)),
  "128-value-64": (LONG, LONG, 2, 2, (128, 64), "bfloat16", dict(is_causal=True)),
  "160": (LONG, LONG, 2, 2, 160, "bfloat16", {}),
  "64-sinks-window": (3001, LONG - 1, 6, 2, 64, "float16", dict(sinks="sinks", local_window_size=(700, 300))),
  "128-cluster": (8192, 8192, 2, 2, 128, "bfloat16", {}),
}


def shapes(query_len, kv_len, heads, kv_heads, dims, dtype, arguments, batch=2):
  """The arrays of a call, shapes only, and its other arguments."""
  head_dim, value_dim = dims if isinstance(dims, tuple) else (dims, dims)
  arrays = dict(
    query=jax.ShapeDtypeStruct((batch, query_len, heads, head_dim), dtype),
    key=jax.ShapeDtypeStruct((batch, kv_len, kv_heads, head_dim), dtype),
    value=jax.ShapeDtypeStruct((batch, kv_len, kv_heads, value_dim), dtype),
  )
  drawn = dict(
    lens=jax.ShapeDtypeStruct((batch,), jnp.int32),
    ids=jax.ShapeDtypeStruct((batch, query_len), jnp.int32),
    sinks=jax.ShapeDtypeStruct((heads,), jnp.float32),
  )
  arrays |= {name: drawn[x] for name, x in arguments.items() if isinstance(x, str)}
  return arrays, {name: x for name, x in arguments.items() if not isinstance(x, str)}


def loss(arrays, options, implementation: str | None = "sm90"):
  out, lse = pf.flash_attention(**arrays, **options, return_residual=True, implementation=implementation)
  return out.astype(jnp.float32).sum() + lse.sum()


def gradients(arrays, options, **kwargs):
  floats = {name: x for name, x in arrays.items() if x.dtype != jnp.int32}
  return jax.value_and_grad(lambda floats: loss(arrays | floats, options, **kwargs))(floats)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_lowering(name):
  arrays, options = shapes(*CONFIGURATIONS[name])
  explained = []

  def run(arrays):
    explained.append(pf.explain(pf.flash_attention, **arrays, **options))
    return gradients(arrays, options)

  text = mosaic_help.lowered(run, arrays)
  assert "\n  runs sm90, " in explained[0]
  assert ("cluster=2" in explained[0]) == ("cluster" in name)
  assert "backward runs" not in explained[0]
  assert mosaic_help.count_kernels(text) == (4 if "query_seq_lengths" in arrays else 2)
  assert mosaic_help.largest_array(text) < arrays["query"].shape[1] * arrays["key"].shape[1]


def test_lowering_of_a_scan_of_remat():
  arrays, options = shapes(LONG, LONG, 2, 2, 64, "bfloat16", dict(is_causal=True))

  def layers(arrays):
    @jax.checkpoint
    def layer(x, _):
      return pf.flash_attention(**arrays | {"query": x}, **options), None

    return jax.lax.scan(layer, arrays["query"], length=3)[0].astype(jnp.float32).sum()

  text = mosaic_help.lowered(jax.grad(layers), arrays)
  assert mosaic_help.count_kernels(text) == 3  # forward, again in the backward pass, and backward
  assert mosaic_help.largest_array(text) < LONG * LONG
