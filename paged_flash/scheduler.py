"""The scheduler: who runs, what is granted, who is done. Pure functions over an immutable `State`.

    state, ids    = submit(state, requests)            queue requests
    state, plan   = plan(state, token_budget=...)      admit, share, grant, preempt: everything one step needs
    state, events = commit(state, plan, tokens, ...)   append, stop, release
    state         = cancel(state, id)                  end a request from outside

All of them run inside `jit`; none waits, raises or clamps. Who comes first is a policy, a function of the state
(`paged_flash.policies`); among equals, and by default, it is who arrived first.

R requests, S slots, C tokens kept per request, N pages. Sources: continuous batching, Yu et al. 2022 (Orca); pages on
demand, sharing by copy-on-write and preemption by recomputing, Kwon et al. 2023 sections 4.4 and 4.5; chunked prefill
beside decoding, Agrawal et al. 2024 (Sarathi-Serve); pages found again after their requests ended, Zheng et al. 2024.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from paged_flash import sharing, speculation, swapping, turns
from paged_flash.cache import page_table, prefix
from paged_flash.cache.page_table import cdiv
from paged_flash.state import (
  CANCELLED,
  LENGTH,
  LIVE,
  NOBODY,
  NUM_STOP_IDS,
  STOP,
  Requests,
  State,
  StepEvents,
  StepPlan,
  blank,
)
from paged_flash.turns import Policy

_LAST = jnp.iinfo(jnp.int32).max


def init(
  *,
  num_slots: int,
  pages_per_slot: int,
  num_pages: int,
  page_size: int,
  num_requests: int,
  max_seq_len: int,
  num_stop_ids: int = NUM_STOP_IDS,
  prefix_cache: bool = True,
  tokens_per_content: int = 1,
  window: int | None = None,
  num_host_pages: int = 0,
) -> State:
  """An empty state.

  Args:
    num_slots: requests that may run together, S.
    pages_per_slot: pages one sequence may hold, P.
    num_pages: pages in the pool, N.
    page_size: tokens per page.
    num_requests: requests kept, waiting, running or ended, R.
    max_seq_len: tokens kept per request, C; 0 for a simulation that has none.
    num_stop_ids: stop ids per request, I.
    prefix_cache: full pages can be found again by requests that start the same way. Needs tokens.
    tokens_per_content: 1 for a model. A simulation may have one number for so many tokens (it divides `page_size`):
      then `Requests.tokens` holds these, those of the output too from the start, and C counts them.
    window: tokens that each token sees, itself included, on every layer; None for all. Pages behind it are let go.
    num_host_pages: pages of host memory to swap preempted requests to.
  """
  R = num_requests
  make = functools.partial(page_table.init, pages_per_slot=pages_per_slot, page_size=page_size, window=window)
  index = prefix.init(num_pages=num_pages, width=page_size // tokens_per_content)
  return State(
    table=make(num_slots=num_slots, num_pages=num_pages),
    host=make(num_slots=R, num_pages=num_host_pages) if num_host_pages else None,
    index=index if prefix_cache and max_seq_len else None,
    requests=blank(R, max_seq_len, num_stop_ids),
    arrival=jnp.full(R, NOBODY, jnp.int32),
    finish=jnp.zeros(R, jnp.int32),
    preemptions=jnp.zeros(R, jnp.int32),
    running=jnp.full(num_slots, NOBODY, jnp.int32),
    num_arrived=jnp.int32(0),
  )


def submit(state: State, new: Requests) -> tuple[State, jax.Array]:
  """Queues requests in the order given.

  A row is taken from those never used first, then from the requests that ended longest ago (their tokens can be read
  until then).

  Args:
    state: stays good.
    new: [B] requests; a prompt length of 0 marks none. `group` counts from the first of this batch: it names the
      request in it of which this one is another sample.

  Returns:
    state: with the requests waiting.
    ids: i32[B]; NOBODY for a request that was refused, because R are live. A refusal changes nothing.
  """
  R, B = state.arrival.size, new.prompt_lens.size
  wanted = new.prompt_lens > 0
  usable = ~state.live
  by_age = jnp.argsort(jnp.where(usable, state.arrival, _LAST))[:B]  # i32[min(B, R)]
  number = jnp.cumsum(wanted) - 1  # i32[B]  0, 1, 2 ... for the wanted
  accepted = wanted & (number < jnp.minimum(jnp.sum(usable), by_age.size))
  rows = jnp.where(accepted, by_age[jnp.minimum(number, by_age.size - 1)], R)  # R: nowhere
  ids = jnp.where(accepted, state.num_arrived + number, NOBODY)
  new = dataclasses.replace(new, group=jnp.where(new.group >= 0, rows[new.group], NOBODY))
  state = dataclasses.replace(
    state,
    requests=jax.tree.map(lambda old, values: old.at[rows].set(values, mode="drop"), state.requests, new),
    arrival=state.arrival.at[rows].set(ids, mode="drop"),
    finish=state.finish.at[rows].set(LIVE, mode="drop"),
    preemptions=state.preemptions.at[rows].set(0, mode="drop"),
    num_arrived=state.num_arrived + jnp.sum(accepted, dtype=jnp.int32),
  )
  return state, ids


def first_come(state: State) -> jax.Array:
  """The policy that knows no difference: first come, first served."""
  return jnp.zeros_like(state.arrival)


def plan(
  state: State,
  *,
  token_budget: int,
  chunk_size: int | None = None,
  policy: Policy = first_come,
  proposals: jax.Array | None = None,
  preemption: swapping.Preemption = swapping.always,
) -> tuple[State, StepPlan]:
  """Decides one step: admits, shares, schedules within the token budget, grants, preempts where it must.

  1. Waiting requests are put beside the running ones, in the policy's order, on the free slots. Pages that hold what
     they start with are found, and so is another sample of the same prompt that has computed it.
  2. Every decoding slot gets its token; what is left of the budget goes to prefill chunks in order.
  3. Waiting requests are admitted while the pages of their whole prompts (behind a window, those that they will hold at
     once) fit what is free and not yet spoken for.
  4. When the pool cannot serve the running requests, the last in order lose their pages (preempted, to be recomputed
     later, or to be copied back from host memory), as few as will do; the last that need not lose them only pauses.
  5. What budget and pages are left goes to proposed tokens, if no prompt is being computed.

  The first running request in order is always served: when all others have given way and its pages are still not
  there, it can never go on, and is ended as `LENGTH` by the commit.

  Args:
    state: stays good.
    token_budget: tokens that one step computes at most; at least S.
    chunk_size: prompt tokens that one request computes in one step at most; None for the budget.
    policy: who is admitted first and preempted last.
    proposals: i32[S, K], what may follow the tokens of the request in each slot; NOBODY past their end.
    preemption: which victims to swap to host memory, if it has room.

  Returns:
    state: with slots filled and pages granted.
    plan: the step.
  """
  S, R, was = state.running.size, state.arrival.size, state
  state, turn = turns.deal(
    state,
    token_budget=token_budget,
    chunk_size=min(chunk_size or token_budget, token_budget),
    policy=policy,
    preemption=preemption,
  )
  take, computed = turn.take, turn.computed
  table, index, row, spared = state.table, state.index, state.running, None
  admitted, victims = (was.running < 0) & (row >= 0), (was.running >= 0) & (row < 0)
  restored = jnp.where(row >= 0, computed - table.seq_lens, 0)
  num_tokens = state.requests.num_tokens[row]

  # 5. Proposed tokens.
  proposals = jnp.zeros((S, 0), jnp.int32) if proposals is None else proposals
  proposals = jnp.where(jnp.any(restored > 0), NOBODY, proposals)  # their pages are not granted yet
  decodes = ~admitted & (num_tokens - computed == 1)
  guesses = speculation.afforded(state, row, decodes, take, proposals, token_budget)
  take += guesses
  if index is not None:
    need = jnp.sum(page_table.need(table, restored + take)[0])
    index = prefix.evict(index, table, need - turn.vacant)
    spared = index.cached
  state, swap_in = swapping.swap_in(state, jnp.where(admitted, row, R), restored, spared)
  most = cdiv(token_budget, table.page_size) + 2 * S
  table, page_copies, granted = page_table.extend(state.table, take, max_pages=most, spared=spared)
  take = jnp.where(granted, take, 0)
  return dataclasses.replace(state, table=table, index=index), StepPlan(
    rows=row,
    starts=jnp.where(row >= 0, computed, 0),
    scheduled=take,
    samples=(take > 0) & (computed + take - guesses == num_tokens),
    proposed=proposals,
    num_proposed=guesses,
    cached=jnp.where(admitted, computed, 0),
    admitted=admitted,
    filled=sharing.filled(computed, computed + take, table.page_size, token_budget // table.page_size + S),
    swap_out=turn.swap_out,
    swap_in=swap_in,
    copies=page_copies,
    preempted=jnp.where(victims, was.arrival[was.running], NOBODY),
    lost=jnp.where(victims & (swapping.moved(turn.swap_out, row) == 0), was.table.seq_lens, 0),
    doomed=turn.doomed,
  )


def commit(state: State, plan: StepPlan, tokens: jax.Array, logprobs: jax.Array) -> tuple[State, StepEvents]:
  """Takes in what the model said: appends tokens, takes back wrong guesses, ends and releases requests that are done.

  Args:
    state: as `plan` returned it; stays good.
    plan: the step that was run.
    tokens: i32[S, 1 + K], the next tokens of each slot, the k-th drawn after the first k proposed ones; read where the
      plan samples.
    logprobs: f32[S, 1 + K].

  Returns:
    The new state, in which the pages that were filled can be found, finished slots are empty, and their pages and those
    behind a window are free; and the events of the step.
  """
  R, requests, table = state.arrival.size, state.requests, state.table
  row = plan.rows
  k = jnp.arange(tokens.shape[1])
  last = requests.num_tokens[row]
  output = (last - requests.prompt_lens[row])[:, None] + 1 + k  # i32[S, 1 + K]  output tokens with this one
  stop = jnp.any(requests.stop_ids[row][:, None] == tokens[..., None], axis=-1)
  stop &= output >= requests.min_tokens[row][:, None]
  finish = jnp.where(stop, STOP, jnp.where(output >= requests.max_tokens[row][:, None], LENGTH, LIVE))
  final = jnp.minimum(speculation.accepted(plan, tokens), jnp.min(jnp.where(finish != LIVE, k, k.size), axis=1))
  counts = jnp.where(plan.samples, final + 1, 0)
  finish = jnp.where(plan.samples, jnp.take_along_axis(finish, final[:, None], axis=1)[:, 0], LIVE)
  doomed = jnp.where(plan.doomed >= 0, plan.doomed, R)  # R: no row
  done = (finish != LIVE) | (row == doomed)
  holders = table.ref_counts
  found = jnp.zeros_like(holders) if state.index is None else (holders == 0) & state.index.cached
  held, shared, saved, cached = page_table.totals(holders > 0, holders > 1, jnp.maximum(holders - 1, 0), found)

  def ids(where):
    return jnp.where(where, state.arrival[row], NOBODY)

  events = StepEvents(
    ids=ids(plan.samples),
    counts=counts,
    tokens=tokens,
    logprobs=logprobs,
    proposed=plan.num_proposed,
    finish=finish,
    ended=jnp.max(jnp.where(jnp.arange(R) == doomed, state.arrival, NOBODY)),  # looking one up is a GPU kernel more
    admitted=ids(plan.admitted),
    cached=plan.cached,
    preempted=plan.preempted,
    lost=plan.lost,
    swapped_out=swapping.moved(plan.swap_out, row),
    swapped_in=swapping.moved(plan.swap_in, row),
    num_scheduled=jnp.sum(plan.scheduled, dtype=jnp.int32),
    running=ids(row >= 0),
    num_waiting=state.num_waiting,
    pages_held=held,
    pages_shared=shared,
    pages_saved=saved,
    pages_cached=cached,
    tokens_held=jnp.sum(table.seq_lens, dtype=jnp.int32),
  )
  kept = requests.tokens
  if state.index is None or state.index.contents.shape[1] == table.page_size:  # a token a number
    at = jnp.where(k < counts[:, None], row[:, None], R)
    kept = kept.at[at, last[:, None] + k].set(tokens, mode="drop")
  num_tokens = requests.num_tokens.at[jnp.where(plan.samples, row, R)].add(counts, mode="drop")
  if k.size > 1:
    lens = table.seq_lens - jnp.where(plan.samples, plan.num_proposed + 1 - counts, 0)
    table = lax.cond(jnp.any(plan.num_proposed > 0), page_table.truncate, lambda same, _: same, table, lens)
  requests = dataclasses.replace(requests, tokens=kept, num_tokens=num_tokens)
  state = dataclasses.replace(state, table=table, requests=requests)
  if state.index is not None:
    state = sharing.indexed(state, plan)
  state = sharing.trim(sharing.release(state, done))
  state = dataclasses.replace(
    state,  # who is doomed computed nothing: its row comes once
    finish=state.finish.at[jnp.append(jnp.where(finish != LIVE, row, R), doomed)].set(
      jnp.append(finish, LENGTH), mode="drop"
    ),
    running=jnp.where(done, NOBODY, row),
  )
  return swapping.forget(state, ~state.live), events


def cancel(
  state: State, id: jax.Array, finish: jax.Array | int = CANCELLED, keep: jax.Array | int | None = None
) -> State:
  """Ends a request from outside, waiting or running; its pages are free at once. Unknown ids do nothing.

  Args:
    state: stays good.
    id: i32[], the request.
    finish: why it ended.
    keep: i32[], output tokens to keep of those it has; None for all. (A stop string found late cuts what came after
      it, even of a request that has ended meanwhile.)
  """
  is_it = (state.arrival == id) & (state.arrival >= 0)  # bool[R]
  is_it &= state.live | (keep is not None)
  row = jnp.where(jnp.any(is_it), jnp.argmax(is_it), -2)  # -2: no row
  num_tokens = state.requests.num_tokens
  if keep is not None:
    num_tokens = jnp.where(is_it, jnp.minimum(num_tokens, state.requests.prompt_lens + keep), num_tokens)
  state = swapping.forget(sharing.release(state, state.running == row), is_it)
  return dataclasses.replace(
    state,
    requests=dataclasses.replace(state.requests, num_tokens=num_tokens),
    finish=jnp.where(is_it, finish, state.finish),
    running=jnp.where(state.running == row, NOBODY, state.running),
  )
