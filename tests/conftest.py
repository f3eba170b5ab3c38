"""Set before any test runs: four CPU devices, so that what is sharded can be tested without accelerators.

Pallas's GPU interpreter needs them too: XLA gets as many threads, and with two it can wait for itself forever.

Compiling is most of the time of the tests, and on a CPU takes a third less without LLVM's optimisations; commands that
tests start inherit that.
"""

import os
from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
if os.environ.get("JAX_PLATFORMS") == "cpu":
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs() -> Iterator[None]:
  """Each compiled program holds memory maps of its own; a process that keeps all of them runs out of maps and dies."""
  yield
  jax.clear_caches()


def pytest_runtest_setup(item: pytest.Item) -> None:
  if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
    pytest.skip("needs an NVIDIA GPU")
