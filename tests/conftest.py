"""Set before any test runs: four CPU devices, so that what is sharded can be tested without accelerators."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
