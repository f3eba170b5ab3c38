"""The Hopper kernels under `jax.vmap` and `jax.shard_map`: folding of the mapped axis, and lowering without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

import paged_flash as pf
from paged_flash.kernels import flash_sm90, xla
from paged_flash.kernels.arguments import flash_problem
from tests.tolerances import assert_close

H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
TILES = dict(block_q=16, block_kv=16)


@pytest.mark.parametrize("has_sinks", [False, True])
def test_a_mapped_axis_joins_the_batch(has_sinks):
  """With the tiled kernel in place of the GPU's: value is the same for all, sinks have no batch axis to fold into."""
  rng = np.random.default_rng(0)
  query, key, value, d_out, d_lse, sinks = (
    rng.standard_normal(shape).astype(np.float32)
    for shape in ((3, 2, 40, 2, 16), (3, 2, 40, 1, 16), (2, 40, 1, 16), (3, 2, 40, 2, 16), (3, 2, 2, 40), (2,))
  )
  sinks = sinks if has_sinks else None

  def both(query, key, value, d_out, d_lse):
    problem, operands = flash_problem(query, key, value, is_causal=True, sinks=sinks)
    out, lse = flash_sm90.run(xla.forward, problem, (operands,), TILES)
    return out, lse, flash_sm90.run(xla.backward, problem, (operands, out, lse, d_out, d_lse), TILES)

  got = jax.jit(jax.vmap(both, in_axes=(0, 0, None, 0, 0)))(query, key, value, d_out, d_lse)
  wanted = [jax.jit(both)(query[i], key[i], value, d_out[i], d_lse[i]) for i in range(3)]
  for x, *want in zip(*map(jax.tree.leaves, (got, *wanted)), strict=True):
    assert_close(x, np.stack(want))


def lowered(f, *shapes):
  arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
  return jax.jit(f).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def attend(query, key, value):
  return pf.flash_attention(query, key, value, is_causal=True, implementation="sm90")


def test_vmap_of_gradients_lowers_to_one_kernel_each():
  with use_abstract_mesh(AbstractMesh((), (), abstract_device=H200)):
    grad = jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    text = lowered(jax.vmap(grad), (3, 2, 256, 4, 128), (3, 2, 256, 2, 128), (3, 2, 256, 2, 128))
  assert text.count("mosaic_gpu_v2") == 2
  assert "6x256x4x128xbf16" in text


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("spec", [PartitionSpec("x"), PartitionSpec(None, None, "x")], ids=["batch", "heads"])
def test_shard_map_lowers(spec, check_vma):
  shapes = (4, 256, 8, 128), (4, 256, 4, 128), (4, 256, 4, 128)
  mesh = AbstractMesh((4,), ("x",), abstract_device=H200, axis_types=(AxisType.Auto,))
  with use_abstract_mesh(mesh):
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=check_vma)
    assert lowered(sharded, *shapes).count("mosaic_gpu_v2") == 1
    grad = jax.grad(lambda *x: sharded(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    assert lowered(grad, *shapes).count("mosaic_gpu_v2") == 2


def test_shard_map_of_lengths_lowers():
  """With lengths the backward pass is three kernels: what it adds up, and the passes before and after."""
  x, lens = jax.ShapeDtypeStruct((4, 256, 8, 128), jnp.bfloat16), jax.ShapeDtypeStruct((4,), jnp.int32)
  mesh = AbstractMesh((4,), ("x",), abstract_device=H200, axis_types=(AxisType.Auto,))

  def attend(query, lens):
    lengths = dict(query_seq_lengths=lens, key_value_seq_lengths=lens)
    return pf.flash_attention(query, query, query, **lengths, implementation="sm90")

  with use_abstract_mesh(mesh):
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
    grad = jax.jit(jax.grad(lambda *x: sharded(*x).astype(jnp.float32).sum()))
    assert grad.trace(x, lens).lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu_v2") == 4
