"""Sampling against numpy: which tokens may be drawn, how often, and that nobody else matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import ArrayLike

from paged_flash import sampling
from paged_flash.sampling import Sampling

sample = jax.jit(sampling.sample)


def params(n, temperature: ArrayLike = 1.0, top_k: ArrayLike = 0, top_p: ArrayLike = 1.0, seed: ArrayLike = 0):
  def full(value, dtype):
    return jnp.broadcast_to(jnp.asarray(value, dtype), (n,))

  return Sampling(
    temperature=full(temperature, jnp.float32),
    top_k=full(top_k, jnp.int32),
    top_p=full(top_p, jnp.float32),
    seed=full(seed, jnp.uint32),
  )


def kept_by(logits, temperature, top_k, top_p):
  """Probabilities after temperature, top-k and top-p, by sorting, in float64. Ties with the last one kept stay."""
  scaled = logits.astype(np.float64) / temperature
  if top_k:
    scaled = np.where(scaled >= np.sort(scaled)[-min(top_k, scaled.size)], scaled, -np.inf)
  probs = np.exp(scaled - scaled.max())
  probs /= probs.sum()
  order = np.argsort(-probs)
  reached = np.searchsorted(np.cumsum(probs[order]), top_p)
  if top_p < 1:
    probs = np.where(probs >= probs[order[min(reached, probs.size - 1)]], probs, 0)
  return probs / probs.sum()


CASES = [(1.0, 0, 1.0), (0.5, 3, 1.0), (2.0, 0, 0.7), (1.3, 5, 0.5), (1.0, 1, 1.0), (0.8, 100, 0.999), (1.0, 0, 1e-6)]


@pytest.mark.parametrize("temperature, top_k, top_p", CASES)
def test_frequencies_are_the_truncated_probabilities(temperature, top_k, top_p):
  logits = np.random.default_rng(0).normal(size=12).astype(np.float32) * 2
  n = 4000
  tokens, logprobs = sample(
    jnp.broadcast_to(logits, (n, 12)), params(n, temperature, top_k, top_p, np.arange(n)), jnp.zeros(n, jnp.int32)
  )
  counts = np.bincount(tokens, minlength=12)
  probs = kept_by(logits, temperature, top_k, top_p)
  assert not counts[probs == 0].any()
  spread = np.sqrt(n * probs * (1 - probs))
  assert (np.abs(counts - n * probs) <= 5 * spread + 1e-9).all()
  expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
  np.testing.assert_allclose(logprobs, expected[np.asarray(tokens)], atol=1e-5)


def test_ties_with_the_last_token_kept_stay():
  logits = jnp.tile(jnp.array([0.0, 3.0, 3.0, 3.0, -1.0]), (500, 1))
  tokens, _ = sample(logits, params(500, top_k=2, seed=np.arange(500)), jnp.zeros(500, jnp.int32))
  assert set(tokens.tolist()) == {1, 2, 3}


def test_extreme_logits():
  rows = np.array([[-np.inf, 0, -np.inf, -1e30], [1e30, -1e30, 0, 3e38], [-0.0, 0.0, -1e-45, -1.0]], np.float32)
  tokens, logprobs = sample(jnp.asarray(rows), params(3, top_k=1, top_p=0.5), jnp.zeros(3, jnp.int32))
  assert tokens.tolist()[:2] == [1, 3] and tokens[2] in (0, 1, 2) and np.isfinite(logprobs).all()


def test_greedy_takes_the_first_of_the_largest():
  tokens, _ = sample(jnp.array([[1.0, 5.0, 5.0], [2.0, 1.0, 0.0]]), params(2, temperature=0.0), jnp.zeros(2, jnp.int32))
  assert tokens.tolist() == [1, 0]


def test_a_draw_depends_on_its_seed_and_index_alone():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(6, 40)).astype(np.float32)
  mixed = Sampling(
    temperature=jnp.array([0.0, 1.0, 0.7, 1.0, 2.0, 1.0]),
    top_k=jnp.array([0, 0, 5, 3, 0, 0]),
    top_p=jnp.array([1.0, 1.0, 1.0, 0.9, 0.4, 1.0]),
    seed=jnp.array([0, 7, 7, 8, 2**32 - 1, 7], jnp.uint32),
  )
  index = jnp.array([0, 3, 3, 0, 9, 4])
  together, _ = sample(jnp.asarray(logits), mixed, index)
  for i in range(6):
    alone, _ = sample(
      jnp.asarray(logits[i : i + 1]), jax.tree.map(lambda a, i=i: a[i : i + 1], mixed), index[i : i + 1]
    )
    assert int(alone[0]) == int(together[i])
  same = jnp.broadcast_to(logits[0] * 0, (64, 40))
  by_index, _ = sample(same, params(64, seed=5), jnp.arange(64))
  by_seed, _ = sample(same, params(64, seed=np.arange(64)), jnp.zeros(64, jnp.int32))
  assert len(set(by_index.tolist())) > 15 and len(set(by_seed.tolist())) > 15
