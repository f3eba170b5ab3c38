"""What a model of the Llama family is: its sizes and switches, read from a file's own description and checked."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_KINDS = ("none", "linear", "llama3", "yarn", "factors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """How rotary frequencies are stretched for contexts longer than the model was first trained on.

  Write b for the unscaled frequencies, `rope_base ** (-2i / D)`, and w for the wavelengths 2 pi / b.

  Attributes:
    kind: "none": b. "linear": b / factor. "llama3": b where w is short, b / factor where it is long, a mix of both
      between (Llama 3.1). "yarn": the same idea by the number of turns within the original context, and cos and sin
      grow by `attention_factor` (Peng et al. 2023, arXiv 2309.00071, section 3). "factors": b / factors, elementwise.
    factor: how many times longer the context became.
    original_max_seq_len: the context before scaling, in tokens (llama3, yarn).
    low_freq_factor, high_freq_factor: where the mix begins and ends (llama3).
    beta_fast, beta_slow: turns within the original context above which b stays, below which it is divided (yarn).
    truncate: round the ends of yarn's ramp outwards to whole dimensions.
    attention_factor: what cos and sin are multiplied by; None takes the paper's 0.1 ln(factor) + 1 (yarn).
    factors: one divisor per frequency, as GGUF files store them; f32[D / 2] (factors).
  """

  kind: str = "none"
  factor: float = 1.0
  original_max_seq_len: int = 0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float | None = None
  factors: tuple[float, ...] = ()

  def __post_init__(self):
    if self.kind not in ROPE_KINDS:
      raise ValueError(
        f"rope scaling must be one of {', '.join(ROPE_KINDS)}, got {self.kind!r}{did_you_mean(self.kind, ROPE_KINDS)}"
      )
    if not self.factor > 0:
      raise ValueError(f"rope scaling factor must be positive, got {self.factor}")
    if self.kind in ("llama3", "yarn") and self.original_max_seq_len <= 0:
      raise ValueError(
        f"rope scaling {self.kind!r} needs a positive original_max_seq_len, got {self.original_max_seq_len}"
      )
    if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor > 0:
      raise ValueError(
        "rope scaling 'llama3' needs high_freq_factor > low_freq_factor > 0, "
        f"got {self.high_freq_factor} and {self.low_freq_factor}"
      )
    if self.kind == "yarn" and not self.beta_fast > self.beta_slow > 0:
      raise ValueError(f"rope scaling 'yarn' needs beta_fast > beta_slow > 0, got {self.beta_fast}, {self.beta_slow}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Sizes and switches of a decoder of the Llama family.

  The family: pre-norm blocks with RMSNorm, rotary positions over the whole head (halves rotated), grouped-query
  attention, SwiGLU. Llama, Mistral, Qwen2 and Qwen3 differ only in the switches below.

  Attributes:
    vocab_size: tokens that the embedding knows (V).
    embed_dim: width of the residual stream (E).
    num_layers: blocks (L).
    num_heads, num_kv_heads: query heads (H) and key/value heads (K); H is a multiple of K.
    head_dim: width of one head (D), even; H * D need not equal E.
    ffn_dim: width inside the feed-forward part (F).
    max_seq_len: longest sequence the model was made for, in tokens.
    norm_eps: what RMSNorm adds to the mean square.
    rope_base: base of the rotary frequencies.
    rope_scaling: how they are stretched.
    qkv_bias, out_bias, mlp_bias: whether q, k, v; the attention output; gate, up, down have biases.
    qk_norm: whether q and k are normalised over head_dim before rotation.
    tie_embeddings: whether the output head is the embedding itself.
    sliding_window: tokens each query sees on every layer, itself included; None for all of the past.

  Raises:
    ValueError: a size or switch is impossible; the text names it.

  Example:
    >>> config = ModelConfig(vocab_size=256, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=128)
    >>> config.head_dim, config.kv_values_per_token
    (16, 128)
  """

  vocab_size: int
  embed_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  ffn_dim: int
  head_dim: int = 0  # 0: embed_dim / num_heads
  max_seq_len: int = 2048
  norm_eps: float = 1e-5
  rope_base: float = 10_000.0
  rope_scaling: RopeScaling = RopeScaling()
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  tie_embeddings: bool = False
  sliding_window: int | None = None

  def __post_init__(self):
    for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "max_seq_len"):
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if self.head_dim == 0:
      if self.embed_dim % self.num_heads:
        raise ValueError(
          "embed_dim must be a multiple of num_heads when head_dim is not given, "
          f"got embed_dim={self.embed_dim}, num_heads={self.num_heads}"
        )
      object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
    if not isinstance(self.head_dim, int) or self.head_dim < 2 or self.head_dim % 2:
      raise ValueError(f"head_dim must be a positive even integer, got {self.head_dim!r}")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        "num_heads must be a multiple of num_kv_heads, "
        f"got num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
      )
    if self.sliding_window is not None and self.sliding_window < 1:
      raise ValueError(f"sliding_window must be positive or None, got {self.sliding_window}")
    for name in ("norm_eps", "rope_base"):
      value = getattr(self, name)
      if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    factors = self.rope_scaling.factors
    if self.rope_scaling.kind == "factors" and (len(factors) != self.head_dim // 2 or not min(factors) > 0):
      raise ValueError(
        f"rope scaling factors must be {self.head_dim // 2} positive numbers (head_dim / 2), "
        f"got {len(factors)}: {factors[:4]}"
      )

  @property
  def kv_values_per_token(self) -> int:
    """Numbers that one token adds to the KV cache, over all layers: 2 L K D."""
    return 2 * self.num_layers * self.num_kv_heads * self.head_dim

  def rope_frequencies(self) -> tuple[np.ndarray, float]:
    """Angular frequencies, radians per position, and the factor on cos and sin.

    Computed in float64 and rounded once. Formulas: see `RopeScaling`.

    Returns:
      frequencies f32[D / 2] and the factor, 1 but for yarn.
    """
    scaling, half = self.rope_scaling, self.head_dim // 2
    freqs = self.rope_base ** -(np.arange(half) / half)  # f64[D / 2]
    amplitude = 1.0
    match scaling.kind:
      case "linear":
        freqs = freqs / scaling.factor
      case "factors":
        freqs = freqs / np.asarray(scaling.factors)
      case "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_seq_len * freqs / (2 * np.pi)  # within the original context
        keep = np.clip((turns - low) / (high - low), 0, 1)
        freqs = freqs * keep + freqs / scaling.factor * (1 - keep)
      case "yarn":
        low, high = (
          half * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / math.log(self.rope_base)
          for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
          low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        ramp = np.clip((np.arange(half) - low) / max(high - low, 0.001), 0, 1)
        freqs = freqs * (1 - ramp) + freqs / scaling.factor * ramp
        amplitude = scaling.attention_factor
        if amplitude is None:
          amplitude = 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
    return freqs.astype(np.float32), amplitude


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
  """The config that a Hugging Face `config.json` describes.

  Args:
    raw: the parsed JSON object.

  Raises:
    ValueError: an architecture, activation or switch that is not supported, or a missing key; the text names it.
  """
  arch = _architecture(raw.get("model_type"), "config.json: model_type")
  _require_equal(raw.get("hidden_act", "silu"), "silu", "config.json: hidden_act")
  if raw.get("quantization_config"):
    raise ValueError("config.json: quantization_config is not supported; want weights in F32, F16 or BF16")
  num_layers, num_heads = _want(raw, "num_hidden_layers"), _want(raw, "num_attention_heads")
  num_kv_heads = raw.get("num_key_value_heads") if arch == "llama" else _want(raw, "num_key_value_heads")
  all_biases = arch in ("llama", "qwen3") and bool(raw.get("attention_bias", False))
  rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
  _require_equal(rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)), 1.0, "partial_rotary_factor")
  max_seq_len = _want(raw, "max_position_embeddings")
  return ModelConfig(
    vocab_size=_want(raw, "vocab_size"),
    embed_dim=_want(raw, "hidden_size"),
    num_layers=num_layers,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads or num_heads,
    head_dim=raw.get("head_dim") or (128 if arch == "qwen3" else 0),
    ffn_dim=_want(raw, "intermediate_size"),
    max_seq_len=max_seq_len,
    norm_eps=raw.get("rms_norm_eps", 1e-6),
    rope_base=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
    rope_scaling=_hf_rope_scaling(rope, rope.get("original_max_position_embeddings") or max_seq_len),
    qkv_bias=arch == "qwen2" or all_biases,
    out_bias=all_biases,
    mlp_bias=arch == "llama" and bool(raw.get("mlp_bias", False)),
    qk_norm=arch == "qwen3",
    tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
    sliding_window=_hf_sliding_window(arch, raw, num_layers),
  )


def from_gguf(metadata: Mapping[str, Any], tensors: Collection[str], rope_factors: Sequence[float] = ()) -> ModelConfig:
  """The config that a GGUF file describes.

  Args:
    metadata: the file's key-value pairs.
    tensors: the names of its tensors; which biases exist and whether the head is tied shows only there.
    rope_factors: the values of the tensor `rope_freqs.weight` where there is one: how GGUF stores Llama 3.1's scaling.

  Raises:
    ValueError: an architecture or switch that is not supported, or a missing key; the text names it.
  """
  arch = _architecture(metadata.get("general.architecture"), "general.architecture")

  def get(key: str, default: Any = None) -> Any:
    return metadata.get(f"{arch}.{key}", default)

  def want(key: str) -> Any:
    return _want(metadata, f"{arch}.{key}")

  _require_equal(get("expert_count", 0), 0, f"{arch}.expert_count")
  num_heads, max_seq_len = want("attention.head_count"), want("context_length")
  config = ModelConfig(
    vocab_size=get("vocab_size") or len(_want(metadata, "tokenizer.ggml.tokens")),
    embed_dim=want("embedding_length"),
    num_layers=want("block_count"),
    num_heads=num_heads,
    num_kv_heads=get("attention.head_count_kv", num_heads),
    head_dim=get("attention.key_length") or 0,
    ffn_dim=want("feed_forward_length"),
    max_seq_len=max_seq_len,
    norm_eps=want("attention.layer_norm_rms_epsilon"),
    rope_base=get("rope.freq_base", 10_000.0),
    rope_scaling=_gguf_rope_scaling(get, rope_factors, max_seq_len),
    qkv_bias="blk.0.attn_q.bias" in tensors,
    out_bias="blk.0.attn_output.bias" in tensors,
    mlp_bias="blk.0.ffn_gate.bias" in tensors,
    qk_norm="blk.0.attn_q_norm.weight" in tensors,
    tie_embeddings="output.weight" not in tensors,
    sliding_window=get("attention.sliding_window") or None,
  )
  for key in ("attention.value_length", "rope.dimension_count"):
    _require_equal(get(key, config.head_dim), config.head_dim, f"{arch}.{key}")
  return config


def did_you_mean(word: object, options: Iterable[str]) -> str:
  """`; did you mean 'X'?` for the option nearest to a misspelt word, else nothing."""
  near = difflib.get_close_matches(str(word), list(options), n=1)
  return f"; did you mean {near[0]!r}?" if near else ""


def _architecture(name: object, where: str) -> str:
  if name not in ARCHITECTURES:
    raise ValueError(
      f"{where} must be a supported architecture ({', '.join(ARCHITECTURES)}), "
      f"got {name!r}{did_you_mean(name, ARCHITECTURES)}"
    )
  return str(name)


def _want(raw: Mapping[str, Any], key: str) -> Any:
  if raw.get(key) is None:
    raise ValueError(f"the model's description lacks {key!r}")
  return raw[key]


def _require_equal(value: object, wanted: object, name: str):
  if value != wanted:
    raise ValueError(f"{name} must be {wanted!r} for the supported architectures, got {value!r}")


def _hf_rope_scaling(rope: Mapping[str, Any], original: int) -> RopeScaling:
  """From `rope_scaling`, or since Transformers 5 `rope_parameters`; old files say "type" for "rope_type"."""
  kind = rope.get("rope_type") or rope.get("type") or "default"
  if kind == "dynamic":
    raise ValueError(
      "rope scaling 'dynamic' is not supported: its frequencies change while a sequence grows, so keys already in the "
      f"KV cache would become wrong; supported are {', '.join(ROPE_KINDS)}"
    )
  if kind == "yarn" and rope.get("attention_factor") is None and rope.get("mscale") and rope.get("mscale_all_dim"):
    raise ValueError("rope scaling 'yarn' with mscale and mscale_all_dim is not supported; want attention_factor")
  names = "factor low_freq_factor high_freq_factor beta_fast beta_slow truncate attention_factor".split()
  given = {name: rope[name] for name in names if rope.get(name) is not None}
  if kind in ("default", "none"):
    return RopeScaling()
  if "factor" not in given:
    raise ValueError(f"rope scaling {kind!r} needs a factor, got {dict(rope)}")
  return RopeScaling(kind=kind, original_max_seq_len=original, **given)


def _gguf_rope_scaling(get: Callable[..., Any], factors: Sequence[float], max_seq_len: int) -> RopeScaling:
  kind, factor = get("rope.scaling.type", "none"), get("rope.scaling.factor") or get("rope.scale_linear") or 1.0
  if len(factors):
    _require_equal(kind, "none", "rope scaling of a file that also has rope_freqs.weight")
    return RopeScaling(kind="factors", factors=tuple(float(value) for value in factors))
  if kind == "none" and get("rope.scaling.type") is None and factor != 1.0:
    kind = "linear"
  if kind == "none":
    return RopeScaling()
  amplitude = None
  if kind == "yarn" and get("rope.scaling.attn_factor"):
    amplitude = get("rope.scaling.attn_factor") * (0.1 * math.log(max(factor, 1.0)) + 1.0)
  return RopeScaling(
    kind=kind,
    factor=factor,
    original_max_seq_len=get("rope.scaling.original_context_length") or max_seq_len,
    attention_factor=amplitude,
  )


def _hf_sliding_window(arch: str, raw: Mapping[str, Any], num_layers: int) -> int | None:
  window = raw.get("sliding_window") if arch == "mistral" or raw.get("use_sliding_window") else None
  if window is None or arch == "llama":
    return None
  first = 0 if arch == "mistral" else raw.get("max_window_layers", 28)  # Qwen: full attention below that layer
  kinds = raw.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
  if len(set(kinds)) > 1:
    raise ValueError("config.json: layers with and without a sliding window in one model are not supported")
  return window if kinds[0] == "sliding_attention" else None
