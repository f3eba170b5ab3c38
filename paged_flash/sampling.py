"""Logits to tokens, for each slot by its own parameters, and the same whoever shares the batch.

The noise of a token depends only on the request's seed and the token's index in its output. Top-k and top-p need no
sort of the vocabulary: both keep the logits above a threshold, and the threshold is found exactly, bit by bit, on
the order-preserving integer image of a float.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How each request draws its tokens. The leading dimension is whatever owns it: requests or slots."""

  temperature: jax.Array  # f32[S]  0 is greedy
  top_k: jax.Array  # i32[S]  keep the k likeliest tokens; 0 keeps all
  top_p: jax.Array  # f32[S]  then keep the likeliest tokens with at least this mass; 1 keeps all
  seed: jax.Array  # u32[S]


def sample(logits: jax.Array, sampling: Sampling, index: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Draws one token for each slot.

  Temperature first, then top-k, then top-p over what top-k left, as in Hugging Face Transformers. Tokens tied with
  the last one kept are kept too. The draw is the Gumbel-max trick: argmax(logits / temperature + noise).

  Args:
    logits: f32[S, V].
    sampling: parameters, [S].
    index: i32[S], the token's index in its request's output, from 0: with the seed it fixes the noise.

  Returns:
    tokens: i32[S].
    logprobs: f32[S], log-probability of each token under the unmodified logits (natural log).
  """
  greedy = jnp.argmax(logits, axis=-1)
  tokens = lax.cond(
    jnp.any(sampling.temperature > 0),
    lambda: jnp.where(sampling.temperature > 0, _draw(logits, sampling, index), greedy),
    lambda: greedy,
  )
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def _draw(logits: jax.Array, sampling: Sampling, index: jax.Array) -> jax.Array:  # i32[S]
  scaled = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
  limited = jnp.any((sampling.top_k > 0) | (sampling.top_p < 1.0))
  kept = lax.cond(limited, lambda: _truncate(scaled, sampling.top_k, sampling.top_p), lambda: scaled)

  def noise(seed, i):
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), i), logits.shape[1:])

  return jnp.argmax(kept + jax.vmap(noise)(sampling.seed, index), axis=-1)


def _truncate(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
  """Logits f32[S, V] with -inf where top-k or top-p drop a token."""
  k = jnp.where(top_k > 0, top_k, logits.shape[1])
  logits = jnp.where(_above(logits, jnp.ones_like(logits), k), logits, -jnp.inf)
  probs = jax.nn.softmax(logits, axis=-1)
  return jnp.where(_above(logits, probs, top_p) | (top_p >= 1.0)[:, None], logits, -jnp.inf)


def _above(values: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
  """bool[S, V]: the largest values of each row, down to the first threshold at which their weights reach `target`.

  Bisection on the bits: `order` maps floats to u32 monotonically, and the largest threshold t with
  sum(weights[order >= t]) >= target is built from its highest bit down, in 32 passes over the row.
  """
  bits = lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
  order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

  def body(i, threshold):
    higher = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
    mass = jnp.sum(jnp.where(order >= higher[:, None], weights, 0.0), axis=-1)
    return jnp.where(mass >= target, higher, threshold)

  threshold = lax.fori_loop(0, 32, body, jnp.zeros(values.shape[0], jnp.uint32))
  return order >= threshold[:, None]
