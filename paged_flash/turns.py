"""Whose turn it is: who runs in a step, how many tokens of each, and who gives way. The first half of `scheduler.plan`.

R requests, S slots. Sources as for `scheduler`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from paged_flash import sharing, swapping
from paged_flash.cache import page_table
from paged_flash.cache.page_table import NO_PAGE, PageCopies, cdiv
from paged_flash.state import NOBODY, State

type Policy = Callable[[State], jax.Array]  # what each request waits for: i32[R], the smaller the sooner


class Turn(NamedTuple):
  """What a step is to compute, before proposals and pages."""

  take: jax.Array  # i32[S]  tokens to compute
  computed: jax.Array  # i32[S]  tokens that each has, in its pages or in host memory
  doomed: jax.Array  # i32[]  as in the plan
  swap_out: PageCopies | None  # [S, P]  as in the plan
  vacant: jax.Array  # i32[]  pages that nobody holds and that are not in the index


class _Room(NamedTuple):
  free: jax.Array  # i32[]  pages that nobody holds
  vacant: jax.Array  # i32[]  of these, pages that are not in the index


def deal(
  state: State, *, token_budget: int, chunk_size: int, policy: Policy, preemption: swapping.Preemption
) -> tuple[State, Turn]:
  """1 to 4 of `scheduler.plan`, which says what the arguments are: admits, shares, deals out the budget, preempts.

  Most steps only decode: nobody can enter, no prompt is computed, and there is a page for each. There order does not
  matter, and all of this is one conditional, which on a GPU asks the host once.

  Returns:
    state: with the slots filled, and the pages of those that gave way free.
    turn: what each slot is to compute.
  """
  runs, room = state.running >= 0, _room(state)
  enters = jnp.any(~runs) & (state.num_waiting > 0)
  decodes = state.requests.num_tokens[state.running] - state.table.seq_lens == 1
  in_order = functools.partial(
    _in_order, token_budget=token_budget, chunk_size=chunk_size, policy=policy, preemption=preemption
  )
  only_decodes = ~enters & jnp.all(decodes | ~runs) & (jnp.sum(runs) <= room.free)
  return lax.cond(only_decodes, _all_decode, in_order, state, room)


def _room(state: State) -> _Room:
  free = state.table.ref_counts == 0
  return _Room(*page_table.totals(free, free if state.index is None else free & ~state.index.cached))


def _all_decode(state: State, room: _Room) -> tuple[State, Turn]:
  """What `_in_order` answers in a step that only decodes."""
  one = (state.running >= 0).astype(jnp.int32)
  return state, Turn(one, state.table.seq_lens, jnp.int32(NOBODY), swapping.nothing(state), room.vacant)


def _in_order(
  state: State,
  room: _Room,
  *,
  token_budget: int,
  chunk_size: int,
  policy: Policy,
  preemption: swapping.Preemption,
) -> tuple[State, Turn]:
  S, R, table, free = state.running.size, state.arrival.size, state.table, room.free

  # 1. Candidates: the running request of each slot, or the next waiting one for a free slot. All below is [S], and
  # from here on in order: those that run, then those that wait, each by policy and arrival.
  rank = policy(state)
  was_running = state.running >= 0
  ready = state.waiting & ~sharing.awaits_prompt(state)
  queue = lax.cond(jnp.any(ready), lambda: jnp.lexsort((state.arrival, rank, ~ready)), lambda: jnp.zeros(R, jnp.int32))
  number = jnp.cumsum(~was_running) - 1  # of each free slot
  waits = ~was_running & (number < jnp.sum(ready))
  row = jnp.where(was_running, state.running, queue[jnp.minimum(number, R - 1)])
  slot = jnp.lexsort((state.arrival[row], rank[row], jnp.where(was_running, 0, 2 - waits)))
  row, runs, waits = row[slot], was_running[slot], waits[slot]
  num_tokens, stored = state.requests.num_tokens[row], swapping.stored(state)[row]

  pages, there = lax.cond(
    jnp.any(waits),
    sharing.found,
    lambda *_: (jnp.full(table.pages.shape, NO_PAGE), jnp.zeros_like(row)),
    state,
    row,
    waits,
    stored,
  )
  there = jnp.where(runs, table.seq_lens[slot], there)  # tokens in pages held or found
  computed = jnp.where(waits, jnp.maximum(there, stored), there)  # and in host memory
  first, place = page_table.first_seen(table, computed), jnp.arange(table.pages_per_slot)
  returns = computed > there
  pages = jnp.where(returns[:, None] & (place < first[:, None]), NO_PAGE, pages)
  there = jnp.where(returns, jnp.maximum(there, first * table.page_size), there)
  remaining = num_tokens - computed

  # 2. Tokens.
  decodes = runs & (remaining == 1)
  wanted = jnp.where((runs | waits) & ~decodes, jnp.minimum(remaining, chunk_size), 0)
  before = jnp.sum(decodes) + jnp.cumsum(wanted) - wanted
  take = jnp.where(decodes, 1, jnp.clip(token_budget - before, 0, wanted))

  # 3. Pages. A running request speaks for all its known tokens, so that an admission cannot starve its prefill.
  def grown(tokens):  # pages to take, to go from those `there` to `computed + tokens`
    return cdiv(computed + tokens, table.page_size) - cdiv(there, table.page_size) + (copies & (tokens > 0))

  last = table.pages[slot, jnp.maximum(cdiv(there, table.page_size) - 1, 0)]
  copies = (there % table.page_size > 0) & (waits | (runs & (table.ref_counts[last] > 1)))
  need = jnp.where(runs, grown(take), 0)
  revived = (pages >= 0) & (place >= first[:, None]) & (table.ref_counts[pages] == 0)
  revived = jnp.sum(revived, axis=1)  # free pages that become held
  spoken_for = jnp.where(runs, grown(remaining), jnp.where(waits, grown(remaining + 1) + revived, 0))
  if table.window is not None:  # no request ever holds more at once than a window and a chunk fill
    most = page_table.window_pages(table.window, chunk_size, table.page_size)
    held = jnp.where(runs, cdiv(computed, table.page_size) - first - copies, 0)
    spoken_for = jnp.minimum(spoken_for, most - held)
  shared = jnp.take_along_axis(pages, jnp.maximum(cdiv(there, table.page_size) - 1, 0)[:, None], axis=1)[:, 0]
  spoken_for += waits & copies & (table.ref_counts[shared] == 1)  # its only holder so far will have to copy it too
  blocked = waits & ((take == 0) | (jnp.cumsum(spoken_for) > free))
  starved = jnp.sum(need) > free
  admitted = waits & (jnp.cumsum(blocked) == 0) & ~starved

  # 4. Preemption.
  served, kept = lax.cond(starved, swapping.served, lambda *_: (runs, runs), state, slot, runs, need, free)
  victims = runs & ~kept
  hopeless = jnp.where(jnp.any(runs), runs & ~served, waits & ~admitted)
  doomed = jnp.where(hopeless[0], row[0], NOBODY)
  take = jnp.where((runs & served) | admitted, take, 0)

  # Back to slot order, and into the table.
  back = jnp.zeros_like(slot).at[slot].set(jnp.arange(S))
  row, kept, admitted, victims, take = (a[back] for a in (row, kept, admitted, victims, take))
  pages, there, computed = pages[back], there[back], computed[back]
  state, swap_out = swapping.swap_out(state, victims, preemption)
  state = sharing.release(state, victims)
  table = lax.cond(
    jnp.any(admitted),
    lambda t: page_table.attach(t, jnp.where(admitted, jnp.arange(S), NOBODY), pages, there),
    lambda t: t,
    state.table,
  )
  state = sharing.trim(dataclasses.replace(state, table=table))  # of what is found, it holds the last window
  state = dataclasses.replace(
    state,
    running=jnp.where(kept | admitted, row, NOBODY),
    preemptions=state.preemptions.at[jnp.where(victims, row, R)].add(1, mode="drop"),
  )
  return state, Turn(take, computed, doomed, swap_out, _room(state).vacant)
