"""`flash_attention` under JAX's transformations and sharded over devices: values and gradients of the plain call."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from paged_flash.attention import KERNELS, flash_attention, paged_attention
from paged_flash.kernels.problem import FlashGradients
from tests.kernels import cases
from tests.tolerances import assert_close

# implementation -> (dtype, B, T, H, K, D) of the calls
SIZES = {"xla": ("float32", 4, 20, 4, 2, 8), "sm90": ("bfloat16", 4, 200, 4, 2, 64)}
IMPLEMENTATIONS = ["xla", pytest.param("sm90", marks=pytest.mark.gpu)]
OPTIONS: dict[str, Any] = dict(is_causal=True, local_window_size=(9, 0), return_residual=True)


def arguments(implementation: str) -> dict[str, jax.Array]:
  """query, key, value, sinks and key lengths."""
  dtype, batch, tokens, heads, kv_heads, head_dim = SIZES[implementation]
  rng = np.random.default_rng(0)
  query, key, value = (cases.normal(rng, batch, tokens, n, head_dim) for n in (heads, kv_heads, kv_heads))
  arrays = dict(query=query, key=key, value=value, sinks=cases.normal(rng, heads))
  lens = np.array([tokens, tokens - 7, 5, 1], np.int32)
  return {name: jnp.asarray(x, dtype) for name, x in arrays.items()} | {"key_value_seq_lengths": jnp.asarray(lens)}


def op(implementation):
  return lambda call: flash_attention(**call, **OPTIONS, implementation=implementation)


@functools.partial(jax.jit, static_argnums=0)
def outcome(f, call):
  """Results of f(call) = (out, lse) and the gradients of the float arguments."""
  floats = {name: x for name, x in call.items() if x.dtype != jnp.int32}
  (out, lse), pull = jax.vjp(lambda floats: f({**call, **floats}), floats)
  rng = np.random.default_rng(1)
  d_out, d_lse = (jnp.asarray(cases.normal(rng, *x.shape), x.dtype) for x in (out, lse))
  (gradients,) = pull((d_out, d_lse))
  return {"out": out, "lse": lse, **gradients}


@functools.cache
def plain(implementation):
  return outcome(op(implementation), arguments(implementation))


def assert_same(got, want):
  assert got.keys() == want.keys()
  for name, x in got.items():
    assert x.dtype == want[name].dtype and np.abs(want[name]).max() > 0.01
    assert_close(x, want[name], factor=2)


def scanned(f):
  """One sequence at a time, the sinks in the carry."""

  def run(call):
    sinks = call["sinks"]
    rows = {name: x[:, None] for name, x in call.items() if name != "sinks"}
    _, results = jax.lax.scan(lambda sinks, row: (sinks, f({**row, "sinks": sinks})), sinks, rows)
    return jax.tree.map(lambda x: x[:, 0], results)

  return run


def mapped(f):
  """`jax.vmap` over the sequences, each unbatched."""

  def one(call):
    return f({**call, "key_value_seq_lengths": call["key_value_seq_lengths"][None]})

  return jax.vmap(
    one, in_axes=({"sinks": None, **dict.fromkeys(("query", "key", "value", "key_value_seq_lengths"), 0)},)
  )


TRANSFORMATIONS = {
  "jit": jax.jit,
  "vmap": mapped,
  "vmap_of_batches": lambda f: lambda call: jax.tree.map(lambda x: x[1], jax.vmap(f)(jax.tree.map(doubled, call))),
  "remat": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
  "scan": scanned,
  "scan_of_remat": lambda f: scanned(jax.checkpoint(f)),
}


def doubled(x):
  return jnp.stack([x[::-1], x])


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_transformations_change_nothing(implementation, name):
  got = outcome(TRANSFORMATIONS[name](op(implementation)), arguments(implementation))
  assert_same(got, plain(implementation))


LAYOUTS = {"batch": (2, 1), "heads": (1, 2), "batch_and_heads": (2, 2)}  # the mesh: devices along data and model
CUT = P("data", None, "model")  # query, key, value and out [B, T, H, D], and the LSE [B, T, H]
SPECS = dict(query=CUT, key=CUT, value=CUT, sinks=P("model"), key_value_seq_lengths=P("data"))


def mesh(layout: str) -> jax.sharding.Mesh:
  shape = LAYOUTS[layout]
  if jax.device_count() < shape[0] * shape[1]:
    pytest.skip(f"needs {shape[0] * shape[1]} devices, there are {jax.device_count()}")
  return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shard_map(implementation, layout, check_vma):
  specs: dict[str, Any] = dict(in_specs=(SPECS,), out_specs=(CUT, CUT))
  f = jax.shard_map(op(implementation), mesh=mesh(layout), check_vma=check_vma, **specs)
  assert_same(outcome(f, arguments(implementation)), plain(implementation))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shard_map_with_one_kv_head_for_all(implementation, layout):
  call = arguments(implementation)
  call.update(key=call["key"][:, :, :1], value=call["value"][:, :, :1])
  specs = dict(SPECS, key=P("data"), value=P("data"))  # gradients are summed over the devices of a sequence
  f = jax.shard_map(op(implementation), mesh=mesh(layout), in_specs=(specs,), out_specs=(CUT, CUT))
  assert_same(outcome(f, call), outcome(op(implementation), call))


class Forgetful:
  """A kernel whose results do not say that they differ from device to device, as those of Pallas calls."""

  @staticmethod
  def supports(problem, stage="forward"):
    return ""

  @staticmethod
  def forward(problem, operands, **tiles):
    return jnp.ones(operands.query.shape), jnp.ones((problem.batch, problem.num_heads, problem.query_len))

  @staticmethod
  def backward(problem, operands, out, lse, d_out, d_lse, **tiles):
    return FlashGradients(
      d_out, jnp.ones(operands.key.shape), jnp.ones(operands.value.shape), None, jnp.ones(problem.num_heads)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shard_map_of_a_kernel_that_forgets_what_its_results_vary_over(layout, monkeypatch):
  monkeypatch.setitem(KERNELS, "forgetful", Forgetful)
  call = arguments("xla")
  f = jax.shard_map(op("forgetful"), mesh=mesh(layout), in_specs=(SPECS,), out_specs=(CUT, CUT))
  want = outcome(op("forgetful"), call)
  want["sinks"] *= LAYOUTS[layout][0]  # the same for all sequences: a sum over the devices along data
  assert_same(outcome(f, call), want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sharded_arrays(implementation, layout):
  where = {name: NamedSharding(mesh(layout), spec) for name, spec in SPECS.items()}
  call = jax.device_put(arguments(implementation), where)
  got = outcome(op(implementation), call)
  assert_same(got, plain(implementation))
  for name, sharding in where.items():
    if name in got:  # gradients lie where their arrays lie
      assert got[name].sharding.is_equivalent_to(sharding, got[name].ndim), name
  if implementation == "xla":  # a kernel cannot be cut by the compiler
    text = outcome.lower(op(implementation), call).compile().as_text()
    assert text and "all-gather" not in text


def test_paged_attention_with_sharded_heads():
  call = cases.paged_call(kv_lens=[9, 30, 0, 48], query_lens=[9, 1, 0, 5], num_tokens=20, heads=(4, 2, 8))
  arrays = dict(call, query_starts=jnp.asarray(call["query_starts"]))
  heads, pools = P(None, "model"), P(None, None, "model")
  specs = {name: {"query": heads, "k_pages": pools, "v_pages": pools}.get(name, P()) for name in arrays}
  run = functools.partial(paged_attention, max_query_len=9)
  f = jax.shard_map(lambda call: run(**call), mesh=mesh("heads"), in_specs=(specs,), out_specs=heads)
  assert_close(jax.jit(f)(arrays), run(**call))
