"""Who already holds this prefix: matching a prompt against sequences whose pages can be shared.

Prefixes are found by comparing tokens, never by a digest, so that no collision can serve foreign content. Today the
candidates are the prefixes that a user asked to hold; an index over all full pages of the pool belongs here too.
"""

import jax
import jax.numpy as jnp


def match(prompts: jax.Array, prompt_lens: jax.Array, held: jax.Array, held_lens: jax.Array) -> jax.Array:
  """The longest held prefix that each prompt starts with.

  Args:
    prompts: i32[B, C], padded.
    prompt_lens: i32[B].
    held: i32[X, C] tokens of the held prefixes, padded.
    held_lens: i32[X]; 0 where nothing is held.

  Returns:
    i32[B]: index of the prefix, -1 where no held prefix is one of the prompt's.

  Example:
    >>> prompts = jnp.array([[5, 6, 7, 8], [5, 9, 0, 0]])
    >>> match(prompts, jnp.array([4, 2]), jnp.array([[5, 6, 0, 0], [5, 0, 0, 0]]), jnp.array([2, 1])).tolist()
    [0, 1]
  """
  inside = jnp.arange(prompts.shape[1]) < held_lens[:, None]  # bool[X, C]
  same = jnp.all((prompts[:, None] == held) | ~inside, axis=-1)  # bool[B, X]
  length = jnp.where(same & (held_lens <= prompt_lens[:, None]), held_lens, 0)  # i32[B, X]
  return jnp.where(jnp.max(length, axis=1) > 0, jnp.argmax(length, axis=1), -1)
