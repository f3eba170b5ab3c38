"""How long a step takes: the roofline of a model on a device, and a fixed cost."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from paged_flash import swapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatencyModel:
  """Seconds of one step: overhead + max(compute, memory).

  Every step reads all weights and the K and V of the sequences that it serves; every token costs two operations per
  parameter, and four per query and key it compares, per head dimension and layer. Source of the form: Williams et al.
  2009 (Roofline); for inference, Pope et al. 2022, section 2.
  """

  num_params: float
  weight_bytes: float
  kv_bytes: float  # K and V of one token, all layers
  attention_flops: float  # per pair of query and key token: 4 * L * H * D
  flops: float  # operations per second, as attained
  bandwidth: float  # bytes per second, as attained
  overhead_s: float  # launches, scheduling, sampling: whatever does not grow
  host_bandwidth: float = math.inf  # bytes per second between device and host, one way, as attained
  copy_s: float = 0.0  # seconds that copying a page to or from the host takes beside its bytes

  def step_seconds(self, num_tokens: jax.Array, kv_tokens: jax.Array, pairs: jax.Array) -> jax.Array:
    """Seconds, f32[].

    Args:
      num_tokens: computed in the step.
      kv_tokens: of K and V read, over all sequences.
      pairs: of query and key token compared, over all sequences.

    Example:
      >>> round(float(opt_13b_a100().step_seconds(30, 30 * 330, 30 * 330)), 4)  # 30 sequences decode
      0.0324
    """
    compute = (2 * self.num_params * num_tokens + self.attention_flops * pairs) / self.flops
    memory = (self.weight_bytes + self.kv_bytes * kv_tokens) / self.bandwidth
    return self.overhead_s + jnp.maximum(compute, memory)

  def swap_seconds(self, num_pages: jax.Array, page_size: int) -> jax.Array:
    """Seconds, f32[], of copying pages to or from the host; nothing is computed meanwhile."""
    return num_pages * (self.copy_s + self.kv_bytes * page_size / self.host_bandwidth)

  def cheaper(self, page_size: int) -> swapping.Cheaper:
    """The choice between swapping and recomputing by what either takes here."""
    return swapping.Cheaper(
      page_bytes=self.kv_bytes * page_size,
      bytes_per_s=self.host_bandwidth,
      copy_s=self.copy_s,
      tokens_per_s=self.flops / (2 * self.num_params),
    )


def opt_13b_a100() -> LatencyModel:
  """OPT-13B in float16 on one A100-40GB, the first machine of Kwon et al. 2023.

  26 GB of weights (their table 1), 40 layers of 40 heads of 128 (Zhang et al. 2022, table 1), so 819,200 bytes of K
  and V per token. A100: 312 TFLOP/s and 1.555 TB/s (NVIDIA's data sheet), of which 60 % and 80 % are assumed attained;
  5 ms of overhead, the lower end of what the engines of that time idled between steps. PCIe 4.0 x16: 31.5 GB/s, of
  which 80 % are assumed attained, and a page is 80 copies (K and V of each layer) of 2 us each beside their bytes. All
  five are assumptions, not fitted.
  """
  return LatencyModel(
    num_params=12.85e9,
    weight_bytes=26e9,
    kv_bytes=2 * 40 * 5120 * 2,
    attention_flops=4 * 40 * 5120,
    flops=0.6 * 312e12,
    bandwidth=0.8 * 1.555e12,
    overhead_s=5e-3,
    host_bandwidth=0.8 * 31.5e9,
    copy_s=80 * 2e-6,
  )


def llama_8b_h200() -> LatencyModel:
  """Llama-3-8B in bfloat16 on one H200.

  8.03e9 parameters, 32 layers, 32 heads and 8 KV heads of 128 (Dubey et al. 2024, table 3). H200 SXM: 989 TFLOP/s
  dense and 4.8 TB/s (NVIDIA's data sheet), of which 65 % and 90 % are taken as attained. With 0.8 ms of overhead a
  step of one sequence takes 4.5 ms, as our own decode loop does on that device. PCIe 5.0 x16: 63 GB/s, of which 80 %
  are assumed attained.
  """
  return LatencyModel(
    num_params=8.03e9,
    weight_bytes=16.06e9,
    kv_bytes=2 * 32 * 8 * 128 * 2,
    attention_flops=4 * 32 * 32 * 128,
    flops=0.65 * 989e12,
    bandwidth=0.9 * 4.8e12,
    overhead_s=0.8e-3,
    host_bandwidth=0.8 * 63e9,
  )
