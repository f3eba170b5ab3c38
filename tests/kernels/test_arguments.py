"""What a call runs on, as its problem says."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from paged_flash.kernels.arguments import flash_problem, target
from paged_flash.kernels.problem import is_hopper


def pretend(kind: str, platform: str = "gpu"):
  """Traces and lowers as if this device were there."""
  device = AbstractDevice(device_kind=kind, num_cores=132, platform=platform)
  return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize(
  "kind, name, hopper",
  [
    ("NVIDIA H200", "nvidia_h200", True),
    ("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3", True),
    ("NVIDIA GH200 480GB", "nvidia_gh200_480gb", True),
    ("NVIDIA H20-3e", "nvidia_h20_3e", True),
    ("NVIDIA B200", "nvidia_b200", False),
    ("NVIDIA A100-SXM4-80GB", "nvidia_a100_sxm4_80gb", False),
    ("TPU v5 lite", "tpu_v5_lite", False),
  ],
)
def test_a_device_has_a_name(kind, name, hopper):
  with pretend(kind):
    assert target() == name
  assert is_hopper(name) == hopper


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the default device is a CPU")
def test_the_default_device_is_what_a_call_runs_on():
  x = jnp.ones((1, 4, 2, 8))
  assert flash_problem(x, x, x)[0].device == "cpu"
  for device in (jax.devices("cpu")[0], "cpu"):
    with jax.default_device(device):
      assert target() == "cpu"
  mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh):
    assert target() == "cpu"
  with pretend("some CPU", platform="cpu"):
    assert target() == "cpu"


def test_a_problem_knows_the_device_it_is_traced_for():
  devices = []

  @jax.jit
  def trace(x):
    devices.append(flash_problem(x, x, x)[0].device)
    return x

  x = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float32)
  with pretend("NVIDIA H200"):
    trace.trace(x)
  trace.trace(x)
  assert devices == ["nvidia_h200", target()]
