"""`nnx_attention` in `nnx.MultiHeadAttention`: the numbers of the layer's own attention, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paged_flash import nnx_attention
from tests.kernels.cases import normal
from tests.tolerances import assert_close

X = jnp.asarray(normal(np.random.default_rng(0), 2, 12, 16))
TOKENS = jnp.array([[1] * 12, [1] * 7 + [0] * 5])
CAUSAL = nnx.make_causal_mask(TOKENS)
PADDING = nnx.make_attention_mask(jnp.ones_like(TOKENS), TOKENS)


def layer(attention_fn=nnx_attention, **kwargs):
  return nnx.MultiHeadAttention(4, 16, decode=False, attention_fn=attention_fn, rngs=nnx.Rngs(3), **kwargs)


def outcome(layer, call, x=X):
  """Output and gradients of a layer called by `call(layer, x)`: arrays in the order of the layer's parameters."""
  graph, state = nnx.split(layer)

  @jax.jit
  def run(state, x):
    out, pull = jax.vjp(lambda state, x: call(nnx.merge(graph, state), x), state, x)
    return out, pull(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

  return jax.tree.leaves(run(state, x))


def assert_same(got, want, factor=4.0):
  assert sum(np.abs(x).max() > 0.01 for x in want) >= len(want) - 1  # the bias of the keys changes nothing
  for a, b in zip(got, want, strict=True):
    assert_close(a, b, factor=factor)


CALLS = {
  "plain": lambda layer, x: layer(x),
  "is_causal": lambda layer, x: layer(x, is_causal=True),
  "causal_mask": lambda layer, x: layer(x, mask=CAUSAL),
  "padding_mask": lambda layer, x: layer(x, mask=nnx.combine_masks(CAUSAL, PADDING)),
  "cross": lambda layer, x: layer(x, x[:, :5]),
  "remat": lambda layer, x: nnx.remat(lambda layer, x: layer(x, is_causal=True))(layer, x),
  "batch_rank_2": lambda layer, x: layer(x[:, None, :, :], mask=PADDING[:, None]),
  "batch_rank_2_mask_broadcasts": lambda layer, x: layer(jnp.stack([x, 2 * x]), mask=PADDING[None]),
  "unbatched": lambda layer, x: layer(x[0], mask=CAUSAL[0]),
}
OTHERWISE = {  # the same by other means, where the layer's own attention refuses
  "batch_rank_2_mask_broadcasts": lambda layer, x: jnp.stack([layer(y, mask=PADDING) for y in (x, 2 * x)])
}


@pytest.mark.parametrize("name", CALLS)
def test_the_layer_gives_the_same_numbers(name):
  want = outcome(layer(nnx.dot_product_attention), OTHERWISE.get(name, CALLS[name]))
  assert_same(outcome(layer(), CALLS[name]), want)


def test_layers_in_a_scan():
  def call(attention_fn):
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
      return nnx.MultiHeadAttention(4, 16, decode=False, attention_fn=attention_fn, rngs=rngs)

    scan = nnx.scan(lambda x, layer: x + layer(x, is_causal=True), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return outcome(stack(nnx.Rngs(3).split(3)), lambda layers, x: scan(x, layers))

  assert_same(call(nnx_attention), call(nnx.dot_product_attention), factor=20)


def test_bias_and_dtypes():
  rng = np.random.default_rng(1)
  q, k, v = (jnp.asarray(normal(rng, 2, 12, 4, 8)) for _ in range(3))
  bias, mask = jnp.asarray(normal(rng, 2, 1, 12, 12)), jnp.asarray(rng.random((1, 4, 12, 12)) < 0.8)
  want = nnx.dot_product_attention(q, k, v, bias=bias, mask=mask)
  assert_close(nnx_attention(q, k, v, bias, mask), want)
  low = nnx_attention(q, k, v, bias, mask, dtype=jnp.bfloat16)
  assert low.dtype == jnp.bfloat16
  assert_close(low, want)
  assert nnx_attention(q.astype(jnp.bfloat16), k, v).dtype == jnp.float32
  assert outcome(layer(dtype=jnp.bfloat16), CALLS["causal_mask"])[0].dtype == jnp.bfloat16


def test_options_are_bound_with_partial():
  local = functools.partial(nnx_attention, local_window_size=(3, 0), implementation="reference")
  window = CAUSAL * jnp.triu(jnp.ones((12, 12)), -3)
  want = outcome(layer(nnx.dot_product_attention), lambda layer, x: layer(x, mask=window))
  assert_same(outcome(layer(local), CALLS["is_causal"]), want)


def test_what_it_refuses():
  dropping = layer(dropout_rate=0.1)
  with pytest.raises(ValueError, match="dropout_rate must be 0 unless deterministic: .* got 0.1"):
    dropping(X, deterministic=False)
  assert_close(dropping(X, deterministic=True), layer()(X))
  with pytest.raises(ValueError, match=r"module must be None \(sow_weights=False\)"):
    layer()(X, sow_weights=True)
  with pytest.raises(ValueError, match=r"is_causal needs as many queries as keys, got \(2, 12, 4, 4\) and \(2, 5"):
    layer()(X, X[:, :5], is_causal=True)
