"""`flash_attention` as other libraries call their attention."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from paged_flash.attention import flash_attention


def nnx_attention(
  query: jax.typing.ArrayLike,
  key: jax.typing.ArrayLike,
  value: jax.typing.ArrayLike,
  bias: jax.typing.ArrayLike | None = None,
  mask: jax.typing.ArrayLike | None = None,
  *,
  is_causal: bool = False,
  dropout_rng: Any = None,
  dropout_rate: float = 0.0,
  broadcast_dropout: bool = True,
  deterministic: bool = False,
  dtype: jax.typing.DTypeLike | None = None,
  precision: Any = None,
  module: Any = None,
  **options: Any,
) -> jax.Array:
  """`flash_attention` as the `attention_fn` of `flax.nnx.MultiHeadAttention`, in place of its default.

  Call the layer with `is_causal=True` rather than with a causal mask: blocks that no query sees are then skipped. (The
  layer always passes its own `is_causal`; binding it here has no effect.) A row that sees no key gives 0.

  Args:
    query: [batch..., T, H, D].
    key: [batch..., S, K, D].
    value: [batch..., S, K, Dv].
    bias: Broadcasts to [batch..., H, T, S].
    mask: Likewise; of any dtype, what is not 0 takes part (`nnx.make_causal_mask` gives float32).
    is_causal: Query i sees keys up to i; T == S.
    dropout_rng: Not used.
    dropout_rate: There is no dropout of the weights: 0, or `deterministic`.
    broadcast_dropout: Not used.
    deterministic: Whether dropout is off.
    dtype: What query, key and value are cast to; None: what their dtypes promote to.
    precision: Not used: products of float32 are float32, others accumulate in float32.
    module: None; the layer passes itself when it is to sow the weights, which are never in memory.
    **options: More keyword arguments of `flash_attention`; bind them with `functools.partial`.

  Returns:
    out [batch..., T, H, Dv].

  Raises:
    ValueError: Dropout or the weights were asked for, `is_causal` and T != S, or as `flash_attention`.

  Example:
    >>> from flax import nnx
    >>> layer = nnx.MultiHeadAttention(2, 16, decode=False, attention_fn=nnx_attention, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 4, 16)), is_causal=True).shape
    (1, 4, 16)
  """
  del dropout_rng, broadcast_dropout, precision
  if dropout_rate > 0 and not deterministic:
    raise ValueError(f"dropout_rate must be 0 unless deterministic: weights are never in memory, got {dropout_rate}")
  if module is not None:
    raise ValueError("module must be None (sow_weights=False): attention weights are never in memory")
  dtype = jnp.result_type(query, key, value) if dtype is None else dtype
  query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
  batch = query.shape[:-3]
  if is_causal and query.shape[-3:-2] != key.shape[-3:-2]:
    raise ValueError(f"is_causal needs as many queries as keys, got {query.shape} and {key.shape}; pass a mask")

  def flat(x):  # [batch..., _, _, _] -> [B, _, _, _]
    return x.reshape(math.prod(batch), *x.shape[-3:]) if batch else x

  def flat_scores(x):
    if math.prod(x.shape[:-3]) == 1:  # the same for the whole batch
      return x.reshape(x.shape[-3:])
    return flat(jnp.broadcast_to(x, (*batch, *x.shape[-3:])))

  bias = None if bias is None else flat_scores(jnp.asarray(bias))
  mask = None if mask is None else flat_scores(jnp.asarray(mask, bool))
  out = flash_attention(flat(query), flat(key), flat(value), bias, mask, is_causal=is_causal, **options)
  return out.reshape(*batch, *out.shape[-3:])
