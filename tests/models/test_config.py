"""ModelConfig: checks, what it reads from files' descriptions, and rope frequencies against the formulas."""

import math
from typing import Any

import numpy as np
import pytest

from paged_flash.models import ModelConfig, RopeScaling
from paged_flash.models.config import from_gguf, from_hf

SIZES: dict[str, Any] = dict(vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48)
HF: dict[str, Any] = {
  "model_type": "llama",
  "vocab_size": 64,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 128,
}
GGUF: dict[str, Any] = {
  "general.architecture": "qwen3",
  "qwen3.context_length": 128,
  "qwen3.embedding_length": 32,
  "qwen3.block_count": 2,
  "qwen3.feed_forward_length": 48,
  "qwen3.attention.head_count": 4,
  "qwen3.attention.head_count_kv": 2,
  "qwen3.attention.key_length": 16,
  "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
  "tokenizer.ggml.tokens": ["x"] * 64,
}


def make(**changes: Any) -> ModelConfig:
  return ModelConfig(**{**SIZES, **changes})


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(vocab_size=0), "vocab_size must be a positive integer, got 0"),
    (dict(num_layers=2.5), "num_layers must be a positive integer, got 2.5"),
    (dict(ffn_dim=True), "ffn_dim must be a positive integer, got True"),
    (dict(num_kv_heads=3), "num_heads must be a multiple of num_kv_heads, got num_heads=4, num_kv_heads=3"),
    (dict(embed_dim=30), "embed_dim must be a multiple of num_heads when head_dim is not given"),
    (dict(head_dim=7), "head_dim must be a positive even integer, got 7"),
    (dict(head_dim=-8), "head_dim must be a positive even integer, got -8"),
    (dict(norm_eps=0.0), "norm_eps must be a positive finite number, got 0.0"),
    (dict(rope_base=math.inf), "rope_base must be a positive finite number, got inf"),
    (dict(rope_base=math.nan), "rope_base must be a positive finite number, got nan"),
    (dict(norm_eps="1e-5"), "norm_eps must be a positive finite number, got '1e-5'"),
    (dict(sliding_window=0), "sliding_window must be positive or None, got 0"),
    (dict(rope_scaling=RopeScaling(kind="factors", factors=(1.0, 2.0))), "factors must be 4 positive numbers .* got 2"),
    (
      dict(rope_scaling=RopeScaling(kind="factors", factors=(1.0, 2.0, 0.0, 1.0))),
      "factors must be 4 positive numbers",
    ),
  ],
)
def test_impossible_sizes_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    make(**change)


@pytest.mark.parametrize(
  "values, message",
  [
    (dict(kind="yarm"), "one of none, linear, llama3, yarn, factors, got 'yarm'; did you mean 'yarn'"),
    (dict(kind="linear", factor=0.0), "factor must be positive, got 0.0"),
    (dict(kind="yarn", factor=2.0), "'yarn' needs a positive original_max_seq_len, got 0"),
    (
      dict(kind="llama3", original_max_seq_len=8, high_freq_factor=1.0),
      "high_freq_factor > low_freq_factor > 0, got 1.0",
    ),
    (dict(kind="yarn", original_max_seq_len=8, beta_slow=40.0), "beta_fast > beta_slow > 0, got 32.0, 40.0"),
  ],
)
def test_impossible_rope_scaling_is_named(values, message):
  with pytest.raises(ValueError, match=message):
    RopeScaling(**values)


def test_head_dim_need_not_divide_the_embedding():
  config = make(embed_dim=30, head_dim=16)
  assert config.head_dim == 16 and config.kv_values_per_token == 2 * 2 * 2 * 16
  assert hash(config) == hash(make(embed_dim=30, head_dim=16))


def frequencies(scaling: RopeScaling, base: float = 500_000.0, head_dim: int = 128):
  return make(rope_base=base, head_dim=head_dim, rope_scaling=scaling).rope_frequencies()


def test_plain_and_linear_frequencies():
  plain, amplitude = frequencies(RopeScaling())
  assert amplitude == 1 and plain.dtype == np.float32 and plain[0] == 1
  np.testing.assert_array_equal(plain, [np.float32(500_000 ** (-2 * i / 128)) for i in range(64)])
  linear, amplitude = frequencies(RopeScaling(kind="linear", factor=4.0))
  assert amplitude == 1
  np.testing.assert_array_equal(linear, plain / 4)


def test_llama3_frequencies():
  scaling = RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=8192)
  got, amplitude = frequencies(scaling)
  assert amplitude == 1
  kinds = set()
  for i in range(64):  # by wavelengths, as the model's authors write it
    plain = 500_000 ** (-2 * i / 128)
    wavelength = 2 * math.pi / plain
    if wavelength < 8192 / 4:
      want, kind = plain, "kept"
    elif wavelength > 8192 / 1:
      want, kind = plain / 8, "divided"
    else:
      smooth = (8192 / wavelength - 1) / (4 - 1)
      want, kind = (1 - smooth) * plain / 8 + smooth * plain, "mixed"
    kinds.add(kind)
    assert got[i] == pytest.approx(want, rel=1e-6), (i, kind)
  assert kinds == {"kept", "mixed", "divided"}


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_frequencies(truncate):
  scaling = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=32768, truncate=truncate)
  got, amplitude = frequencies(scaling, base=1e6)
  assert amplitude == pytest.approx(0.1 * math.log(4) + 1)

  def dimension(turns):  # where that many turns fit into the original context
    return 64 * math.log(32768 / (2 * math.pi * turns)) / math.log(1e6)

  low, high = dimension(32), dimension(1)
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  for i in range(64):
    plain, share = 1e6 ** (-2 * i / 128), min(max((i - low) / (high - low), 0), 1)
    assert got[i] == pytest.approx(plain * (1 - share) + plain / 4 * share, rel=1e-6), i
  given = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=32768, attention_factor=0.7)
  assert frequencies(given)[1] == 0.7


def test_from_hf_llama_defaults_and_values():
  config = from_hf(HF)
  assert config == make(max_seq_len=128, norm_eps=1e-6)
  assert from_hf({k: v for k, v in HF.items() if k != "num_key_value_heads"}).num_kv_heads == 4
  config = from_hf(HF | {"attention_bias": True, "mlp_bias": True, "rope_theta": 5e5, "head_dim": 16})
  assert config.qkv_bias and config.out_bias and config.mlp_bias
  assert config.rope_base == 5e5 and config.head_dim == 16


def test_from_hf_old_and_new_rope_keys_agree():
  scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
  old = from_hf(HF | {"rope_theta": 9e3, "rope_scaling": {"type": "llama3", **scaling}})
  new = from_hf(HF | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 9e3, **scaling}})
  assert old == new
  assert old.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=32)


def test_from_hf_differences_between_architectures():
  assert from_hf(HF | {"model_type": "mistral", "sliding_window": 16}).sliding_window == 16
  assert from_hf(HF | {"model_type": "mistral", "sliding_window": None}).sliding_window is None
  qwen2 = from_hf(HF | {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False})
  assert qwen2.qkv_bias and not qwen2.out_bias and qwen2.sliding_window is None
  window = {"sliding_window": 16, "use_sliding_window": True}
  assert from_hf(HF | {"model_type": "qwen2", "max_window_layers": 0} | window).sliding_window == 16
  assert from_hf(HF | {"model_type": "qwen2", "max_window_layers": 2} | window).sliding_window is None
  qwen3 = from_hf(HF | {"model_type": "qwen3"})
  assert qwen3.qk_norm and qwen3.head_dim == 128 and not qwen3.qkv_bias


@pytest.mark.parametrize(
  "change, message",
  [
    ({"model_type": "lama"}, "model_type must be a supported .*llama, mistral, qwen2, qwen3.*did you mean 'llama'"),
    ({"hidden_act": "gelu"}, "hidden_act must be 'silu' .* got 'gelu'"),
    ({"hidden_size": None}, "lacks 'hidden_size'"),
    ({"hidden_size": "wide"}, "embed_dim must be a positive integer, got 'wide'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0 .* got 0.5"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported: its frequencies change"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "got 'longrope'"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' needs a factor"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0}}, "mscale"),
    (
      {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
      "layers with and without a sliding window",
    ),
  ],
)
def test_from_hf_refuses(change, message):
  with pytest.raises(ValueError, match=message):
    from_hf(HF | change)


def test_from_gguf():
  names = ["output.weight", "blk.0.attn_q_norm.weight"]
  config = from_gguf(GGUF, names)
  assert config == make(head_dim=16, max_seq_len=128, norm_eps=1e-6, qk_norm=True)
  assert from_gguf(GGUF, []).tie_embeddings
  biased = from_gguf(GGUF, ["blk.0.attn_q.bias", "blk.0.attn_output.bias", "blk.0.ffn_gate.bias"])
  assert biased.qkv_bias and biased.out_bias and biased.mlp_bias and not biased.qk_norm
  yarn = {"qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 4.0}
  scaling = from_gguf(GGUF | yarn | {"qwen3.rope.scaling.original_context_length": 32}, names).rope_scaling
  assert scaling == RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=32)
  scaling = from_gguf(GGUF | yarn | {"qwen3.rope.scaling.attn_factor": 0.5}, names).rope_scaling
  assert scaling.attention_factor == pytest.approx(0.5 * (0.1 * math.log(4) + 1))
  with pytest.raises(ValueError, match="rope_freqs.weight must be 'none'"):
    from_gguf(GGUF | yarn, names, rope_factors=[1.0] * 8)
  with pytest.raises(ValueError, match="attention.value_length must be 16 .* got 8"):
    from_gguf(GGUF | {"qwen3.attention.value_length": 8}, names)
