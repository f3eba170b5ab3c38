"""What is shared: which pages a waiting request finds, which ones a step fills, and which ones are given back.

The part of the scheduler that knows of the prefix index and of several samples of one prompt. Pure functions over
`State`, for `scheduler` and `policies`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from paged_flash.cache import page_table, prefix
from paged_flash.cache.page_table import NO_PAGE, PageTable, cdiv, count_upto
from paged_flash.state import NOBODY, State, StepPlan


def release(state: State, done: jax.Array) -> State:
  """The state with the pages of the slots in `done` (bool[S]) given back; those in the index can be found again."""
  return _given_back(state, jnp.any(done), lambda table: page_table.release(table, done))


def trim(state: State) -> State:
  """The state with the pages behind the window of every slot given back; those in the index can be found again."""
  if state.table.window is None:
    return state
  return _given_back(state, jnp.any(page_table.unseen(state.table)), page_table.trim)


def _given_back(state: State, any_is: jax.Array, give_back: Callable[[PageTable], PageTable]) -> State:
  index = state.index
  freed = jnp.zeros(0, jnp.int32) if index is None else index.freed

  def drop(table, freed):
    after = give_back(table)
    return after, freed if index is None else prefix.released(freed, table, after)

  table, freed = lax.cond(any_is, drop, lambda *same: same, state.table, freed)
  index = None if index is None else dataclasses.replace(index, freed=freed)
  return dataclasses.replace(state, table=table, index=index)


def matched(state: State, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Indexed pages that requests start with: pages i32[B, P] and how many, i32[B]; never all that a request has.

  Args:
    state: stays good.
    rows: i32[B], rows of requests.
  """
  table, index, requests = state.table, state.index, state.requests
  if index is None:
    return jnp.full((rows.size, table.pages_per_slot), NO_PAGE), jnp.zeros(rows.size, jnp.int32)
  width = index.contents.shape[1]
  P = min(table.pages_per_slot, requests.tokens.shape[1] // width)
  contents = requests.tokens[:, : P * width][rows].reshape(rows.size, P, width)
  limit = (requests.num_tokens[rows] - 1) // table.page_size  # the last token's logits are wanted
  pages, hits = prefix.match(index, contents, limit, requests.tenant[rows])
  return jnp.pad(pages, ((0, 0), (0, table.pages_per_slot - P)), constant_values=NO_PAGE), hits


def found(state: State, row: jax.Array, waits: jax.Array, stored: jax.Array) -> tuple[jax.Array, jax.Array]:
  """For each candidate that waits, pages that hold its first tokens (i32[S, P]), and how many tokens (i32[S]).

  Pages of another sample only if they hold more than host memory does (`stored` tokens, i32[S]).
  """
  table, requests = state.table, state.requests
  pages, hits = matched(state, row)
  there = hits * table.page_size
  # Another sample of the prompt: all of it but the last token, for its logits, whatever the place in a page.
  prompts = requests.prompt_lens[row]
  first = _first_sample(state)
  same = (first[state.running] == first[row][:, None]) & (first[row] >= 0)[:, None] & (state.running >= 0)
  same &= table.seq_lens >= prompts[:, None]
  same &= table.pages[:, page_table.first_seen(table, prompts - 1)].T >= 0  # not yet behind its window
  sample = jnp.any(same, axis=1) & (prompts - 1 > jnp.maximum(there, stored))
  pages = jnp.where(sample[:, None], table.pages[jnp.argmax(same, axis=1)], pages)
  there = jnp.where(waits, jnp.where(sample, prompts - 1, there), 0)
  return jnp.where(jnp.arange(pages.shape[1]) < cdiv(there, table.page_size)[:, None], pages, NO_PAGE), there


def awaits_prompt(state: State) -> jax.Array:
  """bool[R]: samples whose first fellow is about to compute the prompt for all."""
  first = _first_sample(state)
  computes = (state.live & (state.requests.num_tokens == state.requests.prompt_lens))[first]
  return computes & (first >= 0) & (first != jnp.arange(first.size))


def filled(starts: jax.Array, ends: jax.Array, page_size: int, most: int) -> jax.Array:
  """Slot and place (i32[2, F]) of each page that is filled from `starts` to `ends` (i32[S]), in order; slot S for none.

  `most` is F: a step that computes so many tokens fills at most tokens // page_size + S pages.
  """
  S = starts.size
  count = ends // page_size - starts // page_size
  end = jnp.cumsum(count)
  k = jnp.arange(most)
  slot = count_upto(end, k)
  at = jnp.minimum(slot, S - 1)
  return jnp.stack([slot, jnp.where(slot < S, starts[at] // page_size + k - (end - count)[at], 0)])


def indexed(state: State, plan: StepPlan) -> State:
  """The state with the filled pages in the index."""
  assert state.index is not None
  slot, place = plan.filled
  if plan.proposed.shape[1]:  # tokens that were taken back fill no page
    slot, place = filled(plan.starts, state.table.seq_lens, state.table.page_size, slot.size)
  row = plan.rows[jnp.minimum(slot, plan.rows.size - 1)]
  width = state.index.contents.shape[1]
  contents = state.requests.tokens[row[:, None], place[:, None] * width + jnp.arange(width)]
  index, table = prefix.add(state.index, state.table, slot, place, contents, state.requests.tenant[row])
  return dataclasses.replace(state, index=index, table=table)


def _first_sample(state: State) -> jax.Array:
  """i32[R]: row of the first sample of each request's prompt; NOBODY once that row has gone to a later request."""
  group = state.requests.group
  return jnp.where((group >= 0) & (state.arrival[group] <= state.arrival), group, NOBODY)
