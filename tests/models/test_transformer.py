"""The decoder itself: its products on CPU and GPU, rotation at long positions, leading dimensions, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_flash.models import ModelConfig, load
from paged_flash.models.transformer import _FEW_TOKENS, linear, rotate

CONFIG = ModelConfig(
  vocab_size=32,
  embed_dim=24,
  num_layers=2,
  num_heads=6,
  num_kv_heads=2,
  ffn_dim=40,
  head_dim=8,
  qk_norm=True,
  qkv_bias=True,
)


def attend(q, k, v, kv, layer):
  """Causal attention over [..., T]; kv collects what each layer saw."""
  k, v = (jnp.repeat(x, q.shape[-2] // x.shape[-2], axis=-2) for x in (k, v))
  scores = jnp.einsum("...thd,...shd->...hts", q, k, precision="highest") / q.shape[-1] ** 0.5
  scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
  return jnp.einsum("...hts,...shd->...thd", jax.nn.softmax(scores), v, precision="highest"), [*kv, (layer, q.shape)]


@pytest.mark.parametrize("shape", [(1,), (8,), (_FEW_TOKENS,), (_FEW_TOKENS + 1,), (2, 3), (4, 20), ()])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linear(shape, dtype):
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((*shape, 96), (40, 96)))
  got = jax.jit(linear)(x, w)
  assert got.shape == (*shape, 40) and got.dtype == jnp.float32
  want = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
  np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)  # also for bfloat16: inputs exact, sums in float32


def lowered(platform, num_tokens, dtype=jnp.float32):
  x, w = jax.ShapeDtypeStruct((num_tokens, 96), dtype), jax.ShapeDtypeStruct((40, 96), dtype)
  return jax.jit(linear).trace(x, w).lower(lowering_platforms=(platform,)).as_text()


def test_linear_is_the_plain_product_but_for_few_tokens_on_cpu():
  for platform, num_tokens, barrier in (("cpu", 8, True), ("cpu", 64, False), ("cuda", 8, False), ("cuda", 64, False)):
    text = lowered(platform, num_tokens)
    assert ("optimization_barrier" in text) == barrier, (platform, num_tokens)
    assert ("stablehlo.transpose" in text) == barrier
    assert text.count("dot_general") == 1 and text.count("HIGHEST") >= 1  # no TF32
  assert "HIGHEST" not in lowered("cuda", 8, jnp.bfloat16)
  compiled = jax.jit(linear).lower(jnp.ones((8, 96)), jnp.ones((40, 96))).compile().as_text()
  assert compiled is not None and "conditional" not in compiled  # the choice is gone by then


def test_rotation_turns_halves_and_stays_accurate_at_long_positions():
  config = ModelConfig(vocab_size=8, embed_dim=64, num_layers=1, num_heads=1, num_kv_heads=1, ffn_dim=8, rope_base=1e5)
  frequencies, _ = config.rope_frequencies()
  positions = np.array([0, 1, 31, 4095, 65_537, 99_999])
  angles = positions[:, None].astype(np.float32) * frequencies
  x = np.random.default_rng(0).standard_normal((6, 1, 64)).astype(np.float32)
  got = jax.jit(lambda x, angles: rotate(x, jnp.cos(angles), jnp.sin(angles)))(x, angles)
  exact = positions[:, None] * (1e5 ** (-np.arange(32) / 32))
  z = (x[..., :32] + 1j * x[..., 32:]) * np.exp(1j * exact)[:, None]
  want = np.concatenate([z.real, z.imag], -1)
  np.testing.assert_allclose(got[:4], want[:4], atol=2e-3)
  np.testing.assert_allclose(got, want, atol=3e-2)  # float32 angles: steps of 2^-7 above 65,536
  rounded = angles.astype(np.float64)  # the same rounded angle: cos and sin themselves are accurate
  z = (x[..., :32] + 1j * x[..., 32:]) * np.exp(1j * rounded)[:, None]
  np.testing.assert_allclose(got, np.concatenate([z.real, z.imag], -1), atol=2e-6)


def test_rotated_products_depend_on_distance_only():
  model = load(CONFIG)
  seen = []

  def spy(q, k, v, kv, layer):
    seen.append(jnp.einsum("thd,shd->hts", q[:, :2], k, precision="highest"))
    return q, kv

  tokens = jnp.array([1, 2, 3, 4])
  for start in (0, 1000):
    model.bind(model.params)(tokens, start + jnp.arange(4), None, spy)
  assert len(seen) == 4
  np.testing.assert_allclose(seen[0], seen[2], atol=1e-4)
  assert np.abs(seen[0]).max() > 0.1


def test_leading_dimensions_and_kv_are_passed_through():
  model = load(CONFIG)
  tokens = jax.random.randint(jax.random.key(0), (2, 3, 7), 0, 32)
  positions = jnp.broadcast_to(jnp.arange(7), tokens.shape)
  seen = []

  @jax.jit
  def run(params, tokens, positions):
    bound = model.bind(params)
    hidden, kv = bound(tokens, positions, [], attend)
    seen.append(kv)
    return hidden, bound.logits(hidden)

  hidden, logits = run(model.params, tokens, positions)
  assert hidden.shape == (2, 3, 7, 24) and logits.shape == (2, 3, 7, 32)
  assert seen == [[(0, (2, 3, 7, 6, 8)), (1, (2, 3, 7, 6, 8))]]
  for i in range(2):
    for j in range(3):
      alone, _ = run(model.params, tokens[i, j], positions[i, j])
      np.testing.assert_allclose(hidden[i, j], alone, atol=1e-5)


def test_hidden_states_are_normalised():
  model = load(CONFIG)
  hidden, _ = model.bind(model.params)(jnp.arange(5), jnp.arange(5), [], attend)
  np.testing.assert_allclose(jnp.mean(hidden**2, axis=-1), 1, atol=0.05)


def test_gradients_reach_every_parameter_and_are_right():
  model = load(CONFIG)
  tokens = jnp.array([1, 5, 2, 9, 31])

  @jax.jit
  def loss(params):
    bound = model.bind(params)
    hidden, _ = bound(tokens, jnp.arange(5), [], attend)
    scores = jax.nn.log_softmax(bound.logits(hidden))
    return -scores[jnp.arange(4), tokens[1:]].mean()

  gradients = jax.jit(jax.grad(loss))(model.params)
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.abs(gradient).max() > 0, path
  direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), model.params)

  def along(step):
    return loss(jax.tree.map(lambda p, d: p + step * d, model.params, direction))

  slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction), strict=True))
  assert float(along(1e-4) - along(-1e-4)) / 2e-4 == pytest.approx(float(slope), rel=2e-2)


def test_binding_other_params_uses_them():
  model = load(CONFIG)
  other = load(CONFIG, seed=1)
  run = jax.jit(lambda params: model.bind(params)(jnp.arange(3), jnp.arange(3), [], attend)[0])
  np.testing.assert_array_equal(
    run(other.params), jax.jit(lambda p: other.bind(p)(jnp.arange(3), jnp.arange(3), [], attend)[0])(other.params)
  )
  assert np.abs(run(other.params) - run(model.params)).max() > 0.1
