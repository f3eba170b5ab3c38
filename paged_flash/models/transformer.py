"""A decoder of the Llama family in Flax nnx, and `Model`: the decoder taken apart into plain arrays.

Weights are stored as the files store them, [out, in], one array per layer and weight; q, k, v and gate, up are fused
along `out`. The decoder knows nothing of pages: attention arrives as a function.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from paged_flash.models.config import ModelConfig
from paged_flash.models.tokenizer import Tokenizer

# attend(q [..., T, H, D], k [..., T, K, D], v [..., T, K, D], kv, layer) -> (out [..., T, H, D], kv)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any, int], tuple[jax.Array, Any]]

_FEW_TOKENS = 32  # on CPU, up to here `linear` multiplies weights by activations rather than the other way round


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
  """x @ weight.T with sums in float32; float32 products are true float32 (no TF32).

  On CPU a matrix of few rows times a transposed matrix is slow in XLA: for SmolLM2's layers and 8 tokens, 1.7 times
  slower than weight @ x.T. So there, few tokens are computed as [out, T] and then transposed; without the barrier XLA
  would fold the transpose back into the product. Other platforms get the plain product: the choice is made when the
  program is lowered.

  Args:
    x: [..., in].
    weight: [out, in].

  Returns:
    f32[..., out].
  """
  precision = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else lax.Precision.DEFAULT

  def product(a, b, dim):
    return lax.dot_general(a, b, (((dim,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)

  def plain(x, weight):
    return product(x, weight, x.ndim - 1)

  def few_tokens(x, weight):
    flat = x.reshape(-1, x.shape[-1])  # [T, in]
    return lax.optimization_barrier(product(weight, flat, 1)).T.reshape(*x.shape[:-1], -1)

  if x.size // x.shape[-1] > _FEW_TOKENS:
    return plain(x, weight)
  return lax.platform_dependent(x, weight, cpu=few_tokens, default=plain)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotary positions: rotates the pairs (i, i + D / 2) of every head.

  Args:
    x: [..., T, H, D].
    cos, sin: f32[..., T, D / 2], of position times frequency.

  Returns:
    x's shape and dtype.

  Source: Su et al. 2021, arXiv 2104.09864, equation 34, with pairs of halves instead of neighbours.
  """
  cos, sin = cos[..., None, :], sin[..., None, :]  # f32[..., T, 1, D / 2]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (Zhang and Sennrich 2019, arXiv 1910.07467)."""

  def __init__(self, dim: int, *, eps: float, dtype: jnp.dtype):
    self.weight = nnx.Param(jnp.ones((dim,), dtype))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
    return (wide * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
  """x @ weight.T + bias; weight [out, in], bias [out] or absent."""

  def __init__(self, in_dim: int, out_dim: int, *, bias: bool = False, scale: float, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.weight = nnx.Param(_normal(rngs, (out_dim, in_dim), scale, dtype))
    self.bias = nnx.Param(jnp.zeros((out_dim,), dtype)) if bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    y = linear(x, self.weight[...])
    if self.bias is not None:
      y = y + self.bias[...].astype(jnp.float32)
    return y.astype(x.dtype)


class Block(nnx.Module):
  """One layer: x += output(attend(q, k, v)), then x += down(silu(gate) * up), each on the normalised x."""

  def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    width, heads = config.head_dim, config.num_heads + 2 * config.num_kv_heads
    scale, out_scale = (
      0.02,
      0.02 / (2 * config.num_layers) ** 0.5,
    )  # GPT-2's, so that the residual does not grow with depth
    norm = {"eps": config.norm_eps, "dtype": dtype}
    weights = {"dtype": dtype, "rngs": rngs}
    self.attention_norm = RMSNorm(config.embed_dim, **norm)
    self.qkv = Linear(config.embed_dim, heads * width, bias=config.qkv_bias, scale=scale, **weights)
    self.q_norm = RMSNorm(width, **norm) if config.qk_norm else None
    self.k_norm = RMSNorm(width, **norm) if config.qk_norm else None
    self.output = Linear(config.num_heads * width, config.embed_dim, bias=config.out_bias, scale=out_scale, **weights)
    self.mlp_norm = RMSNorm(config.embed_dim, **norm)
    self.gate_up = Linear(config.embed_dim, 2 * config.ffn_dim, bias=config.mlp_bias, scale=scale, **weights)
    self.down = Linear(config.ffn_dim, config.embed_dim, bias=config.mlp_bias, scale=out_scale, **weights)
    self.config = config

  def __call__(
    self, x: jax.Array, cos: jax.Array, sin: jax.Array, kv: Any, attend: Attend, layer: int
  ) -> tuple[jax.Array, Any]:
    heads, kv_heads, width = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
    qkv = self.qkv(self.attention_norm(x)).reshape(*x.shape[:-1], heads + 2 * kv_heads, width)  # [..., T, H + 2K, D]
    q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=-2)
    if self.q_norm is not None and self.k_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    out, kv = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, kv, layer)  # [..., T, H, D]
    x = x + self.output(out.reshape(*x.shape[:-1], heads * width))
    gate, up = jnp.split(self.gate_up(self.mlp_norm(x)), 2, axis=-1)  # [..., T, F]
    return x + self.down(jax.nn.silu(gate) * up), kv


class Transformer(nnx.Module):
  """The decoder: tokens and positions in, normalised hidden states out; `logits` is the head.

  Args:
    config: sizes and switches.
    dtype: of weights and activations; sums, norms, rotations and logits are float32 whatever it is.
    rngs: for random weights.
  """

  def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.embedding = nnx.Param(_normal(rngs, (config.vocab_size, config.embed_dim), 0.02, dtype))  # [V, E]
    self.layers = nnx.List([Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
    self.norm = RMSNorm(config.embed_dim, eps=config.norm_eps, dtype=dtype)
    untied = not config.tie_embeddings
    self.head = nnx.Param(_normal(rngs, (config.vocab_size, config.embed_dim), 0.02, dtype)) if untied else None
    self.config = config

  def __call__(self, tokens: jax.Array, positions: jax.Array, kv: Any, attend: Attend) -> tuple[jax.Array, Any]:
    """Runs all layers.

    Args:
      tokens: i32[..., T], ids below vocab_size.
      positions: i32[..., T], each token's place in its own sequence.
      kv: anything; passed from layer to layer through `attend`.
      attend: `(q, k, v, kv, layer) -> (out, kv)`, with q and out [..., T, H, D], k and v [..., T, K, D], layer an int.

    Returns:
      The hidden states [..., T, E] after the last norm, and the last kv.
    """
    frequencies, amplitude = self.config.rope_frequencies()
    angles = positions[..., None].astype(jnp.float32) * frequencies  # f32[..., T, D / 2]
    cos, sin = jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude
    x = self.embedding[...][tokens]  # [..., T, E]
    for layer, block in enumerate(self.layers):
      x, kv = block(x, cos, sin, kv, attend, layer)
    return self.norm(x), kv

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Scores of the next token: f32[..., V] from hidden states [..., E]."""
    return linear(hidden, (self.embedding if self.head is None else self.head)[...])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model:
  """A decoder as plain arrays, with the tokenizer that belongs to it.

  Attributes:
    config: sizes and switches.
    graphdef: the structure of the `Transformer`, hashable.
    params: nested dict of its arrays; give it to jitted functions as an argument, and `bind` it there.
    tokenizer: None for random weights and for files that bring none.

  Example:
    >>> from paged_flash.models import load
    >>> model = load(ModelConfig(vocab_size=9, embed_dim=4, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=8))
    >>> attend = lambda q, k, v, kv, layer: (q, kv)
    >>> run = jax.jit(lambda params, tokens: model.bind(params)(tokens, jnp.arange(3), None, attend)[0])
    >>> run(model.params, jnp.array([1, 2, 3])).shape
    (3, 4)
  """

  config: ModelConfig
  graphdef: nnx.GraphDef[Transformer]
  params: dict[str, Any]
  tokenizer: Tokenizer | None = None

  def bind(self, params: dict[str, Any]) -> Transformer:
    """The Transformer over `params`: this model's own, or others of the same structure. Call it inside jit."""
    return nnx.merge(self.graphdef, params)


def first_layers(model: Model, num_layers: int) -> Model:
  """A model of the first layers of another, with its arrays, last norm and head: a draft that needs no weights.

  Raises:
    ValueError: the model has not so many layers.

  Example:
    >>> from paged_flash.models import load
    >>> model = load(ModelConfig(vocab_size=9, embed_dim=4, num_layers=3, num_heads=2, num_kv_heads=1, ffn_dim=8))
    >>> first_layers(model, 2).config.num_layers
    2

  Source: Zhang et al. 2023 (Draft & Verify) leave out layers of a model; Elhoushi et al. 2024 (LayerSkip) train it so.
  """
  if not 1 <= num_layers <= model.config.num_layers:
    raise ValueError(f"num_layers must be in 1..{model.config.num_layers}, got {num_layers}")
  config, dtype = dataclasses.replace(model.config, num_layers=num_layers), model.params["embedding"].dtype
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: Transformer(config, dtype=dtype, rngs=nnx.Rngs(0))))
  params = {**model.params, "layers": {i: model.params["layers"][i] for i in range(num_layers)}}
  return dataclasses.replace(model, config=config, graphdef=graphdef, params=params)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, dtype: jnp.dtype) -> jax.Array:
  return (jax.random.normal(rngs.params(), shape, jnp.float32) * scale).astype(dtype)
