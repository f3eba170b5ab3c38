"""How long a step takes: the roofline of a model on a device, and a fixed cost."""

import dataclasses

import jax
import jax.numpy as jnp


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


def opt_13b_a100() -> LatencyModel:
  """OPT-13B in float16 on one A100-40GB, the first machine of Kwon et al. 2023.

  26 GB of weights (their table 1), 40 layers of 40 heads of 128 (Zhang et al. 2022, table 1), so 819,200 bytes of K
  and V per token. A100: 312 TFLOP/s and 1.555 TB/s (NVIDIA's data sheet), of which 60 % and 80 % are assumed attained;
  5 ms of overhead, the lower end of what the engines of that time idled between steps. The three are assumptions,
  not fitted.
  """
  return LatencyModel(
    num_params=12.85e9,
    weight_bytes=26e9,
    kv_bytes=2 * 40 * 5120 * 2,
    attention_flops=4 * 40 * 5120,
    flops=0.6 * 312e12,
    bandwidth=0.8 * 1.555e12,
    overhead_s=5e-3,
  )


def llama_8b_h200() -> LatencyModel:
  """Llama-3-8B in bfloat16 on one H200.

  8.03e9 parameters, 32 layers, 32 heads and 8 KV heads of 128 (Dubey et al. 2024, table 3). H200 SXM: 989 TFLOP/s
  dense and 4.8 TB/s (NVIDIA's data sheet), of which 65 % and 90 % are taken as attained. With 0.8 ms of overhead a
  step of one sequence takes 4.5 ms, as our own decode loop does on that device.
  """
  return LatencyModel(
    num_params=8.03e9,
    weight_bytes=16.06e9,
    kv_bytes=2 * 32 * 8 * 128 * 2,
    attention_flops=4 * 32 * 32 * 128,
    flops=0.65 * 989e12,
    bandwidth=0.9 * 4.8e12,
    overhead_s=0.8e-3,
  )
