"""Who comes first: functions from the scheduler's state to what each request waits for.

A policy gives every request a number, i32[R]; the smaller, the sooner it is admitted and the later it is preempted.
Equal numbers go by arrival, and the numbers of rows that hold no live request mean nothing. `plan` asks once a step;
`Engine(policy=...)` takes any such function, these or your own:

    def longest_prompt_first(state):
      return -state.requests.prompt_lens
"""

import jax
import jax.numpy as jnp

from paged_flash import sharing
from paged_flash.scheduler import first_come
from paged_flash.state import State

__all__ = ["by_priority", "fair_share", "first_come", "longest_prefix_first", "shortest_first"]


def by_priority(state: State) -> jax.Array:
  """By `Params.priority`, the smaller the sooner."""
  return state.requests.priority


def shortest_first(state: State) -> jax.Array:
  """By the tokens that a request may still have to compute: what is left of its prompt and of `max_tokens`."""
  requests = state.requests
  at = jnp.where(state.running >= 0, state.running, state.arrival.size)
  computed = jnp.zeros_like(state.arrival).at[at].set(state.table.seq_lens, mode="drop")
  return requests.prompt_lens + requests.max_tokens - computed


def longest_prefix_first(state: State) -> jax.Array:
  """By the pages that need not be computed, the most first: what the cache holds is used before it is evicted.

  Source: Zheng et al. 2024 (SGLang), section 3, cache-aware scheduling.
  """
  _, hits = sharing.matched(state, jnp.arange(state.arrival.size))
  return -hits


def fair_share(state: State) -> jax.Array:
  """By turns among tenants: the n-th live request of every tenant before the n+1-th of any.

  Source: round robin over clients, as in Sheng et al. 2024 (fairness in serving) counted in requests.
  """
  live, tenant = state.live, state.requests.tenant
  order = jnp.lexsort((state.arrival, tenant, ~live))  # by tenant, then arrival
  group = tenant[order]
  place = jnp.arange(group.size)
  starts = jnp.concatenate([jnp.array([True]), group[1:] != group[:-1]])
  first = jax.lax.cummax(jnp.where(starts, place, 0))
  return jnp.zeros_like(place).at[order].set(place - first)
