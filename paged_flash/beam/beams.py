"""Beam search over pages: the beams of a prompt share every page up to where they part.

Of all ways to continue the W beams of a prompt by a token, the W best go on; of all ways to end them, the W best so far
are kept as results. A beam that goes on in several ways is forked: its pages are shared, and the part-full last one is
copied when a fork first writes to it. One that goes on in none gives its pages back. A prompt is finished when no beam
can become better than its results any more, or at its longest.

A state is a value, a step is pure, and a loop of steps is one program, apart from the engine's: beams wait for each
other, ordinary requests do not. When the pool cannot serve all prompts, the last to come gives its pages back and
starts again.

G prompts together, W beams of each, S = G * W slots: beam w of prompt g is in slot g * W + w. R = 2 S rows of tokens:
the beams', then the results', best first. Sources: Kwon et al. 2023, section 4.4 (beams over pages); Wu et al. 2016,
section 7 (length penalty; theirs is ((5 + n) / 6) ** alpha, ours n ** alpha).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from paged_flash import scheduler
from paged_flash import step as pure
from paged_flash.cache import kv_pages, page_table
from paged_flash.cache.kv_pages import KVPages
from paged_flash.cache.page_table import cdiv
from paged_flash.models import Model
from paged_flash.state import LENGTH, LIVE, NOBODY, NUM_STOP_IDS, STOP, Requests, State, StepPlan

type Words = tuple[jax.Array, jax.Array, jax.Array]  # see `_words`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamState:
  """All prompts that are searched, but for the pool's bytes."""

  state: State  # [S] slots, [R] rows; `arrival` is the number of a row's prompt, NOBODY where there is none
  scores: jax.Array  # f32[R]  sum of the log-probabilities of a row's output; -inf: there is no such beam or result
  penalty: jax.Array  # f32[]  a result is worth its score / tokens ** penalty
  steps: jax.Array  # i32[]
  held: jax.Array  # f32[]  pages held, summed over all steps
  saved: jax.Array  # f32[]  pages that would have been held beside them if nothing were shared
  copied: jax.Array  # i32[]  pages copied before a write
  restarts: jax.Array  # i32[]  times that a prompt gave its pages back and started again
  width: int = dataclasses.field(metadata=dict(static=True))  # W

  @property
  def active(self) -> jax.Array:  # bool[G]
    """Prompts that are not finished."""
    return self.state.live[: self.state.running.size : self.width]


class _Pool(NamedTuple):
  """What may become a result: [G, ...]."""

  score: jax.Array  # f32  -inf: nothing
  row: jax.Array  # i32  whose tokens
  token: jax.Array  # i32  the one after them; NOBODY
  finish: jax.Array  # i32


def init(
  *, num_prompts: int, width: int, pages_per_slot: int, num_pages: int, page_size: int, max_seq_len: int, penalty: float
) -> BeamState:
  """An empty state for `num_prompts` (G) prompts together."""
  S = num_prompts * width
  state = scheduler.init(
    num_slots=S,
    pages_per_slot=pages_per_slot,
    num_pages=num_pages,
    page_size=page_size,
    num_requests=2 * S,
    max_seq_len=max_seq_len,
    prefix_cache=False,
  )
  return BeamState(
    state=dataclasses.replace(state, running=jnp.arange(S)),
    scores=jnp.full(2 * S, -jnp.inf),
    penalty=jnp.float32(penalty),
    steps=jnp.int32(0),
    held=jnp.float32(0),
    saved=jnp.float32(0),
    copied=jnp.int32(0),
    restarts=jnp.int32(0),
    width=width,
  )


def submit(beams: BeamState, new: Requests) -> BeamState:
  """Puts a prompt (`new`, [1]) in the place of one that is finished, or of none: there must be such a place."""
  state, W = beams.state, beams.width
  S = state.running.size
  place = jnp.argmin(beams.active)
  at = jnp.where(jnp.arange(2 * S) // W % (S // W) == place, 0, 2)  # beams and results of that place
  at = jnp.where(jnp.arange(2 * S) == place * W, 1, at)
  mine = at < 2
  requests = jax.tree.map(
    lambda old, value: jnp.where(mine.reshape(-1, *[1] * (old.ndim - 1)), value, old), state.requests, new
  )
  state = dataclasses.replace(
    state,
    requests=dataclasses.replace(requests, num_tokens=jnp.where(at == 0, 0, requests.num_tokens)),
    arrival=jnp.where(mine, state.num_arrived, state.arrival),
    finish=jnp.where(mine, LIVE, state.finish),
    num_arrived=state.num_arrived + 1,
  )
  scores = jnp.where(mine, jnp.where(at == 1, 0.0, -jnp.inf), beams.scores)
  return dataclasses.replace(beams, state=state, scores=scores)


def plan(beams: BeamState, *, token_budget: int, chunk_size: int) -> tuple[BeamState, StepPlan]:
  """Decides one step: who computes what, who gets pages, who gives them back.

  The beams of a prompt are served together or not at all, first come, first served. Before its first token a prompt
  has one beam. When the pool cannot serve all, prompts pause, and the last give their pages back, as few as will do. If
  not even the first can be served, it can never go on and ends with what it has.

  Args:
    beams: stays good.
    token_budget: tokens that one step computes at most; at least S.
    chunk_size: prompt tokens that one prompt computes in one step at most.
  """
  state, W, table = beams.state, beams.width, beams.state.table
  S, size = state.running.size, table.page_size
  G = S // W
  live = jnp.repeat(beams.active, W)
  remaining = jnp.where(live, state.requests.num_tokens[:S] - table.seq_lens, 0)
  order = jnp.argsort(jnp.where(beams.active, state.arrival[:S:W], jnp.iinfo(jnp.int32).max))  # i32[G], and all below
  decodes = remaining == 1
  wanted = jnp.sum(jnp.where(decodes, 0, jnp.minimum(remaining, chunk_size)).reshape(G, W), axis=1)[order]
  room = token_budget - jnp.sum(decodes) - jnp.cumsum(wanted) + wanted
  chunk = jnp.zeros(G, jnp.int32).at[order].set(jnp.clip(room, 0, wanted))
  take = jnp.where(decodes, 1, jnp.where(remaining > 0, jnp.repeat(chunk, W), 0))  # i32[S]

  need = jnp.sum(page_table.need(table, take)[0].reshape(G, W), axis=1)[order]
  rank = jnp.repeat(jnp.zeros(G, jnp.int32).at[order].set(jnp.arange(G)), W)  # i32[S]
  pages = jnp.where(table.pages >= 0, table.pages, table.num_pages)
  holder = jnp.full(table.num_pages, G).at[pages].min(rank[:, None], mode="drop")
  holds = jnp.zeros(G, jnp.int32).at[holder].add(1, mode="drop")  # pages are shared within a prompt only
  free = table.num_free
  later = jnp.sum(holds) - jnp.cumsum(holds)
  active = beams.active[order]
  runs = active & (holds > 0)
  cost = jnp.cumsum(jnp.where(runs, need, 0))
  served = runs & (cost <= free + later)
  spent = jnp.max(jnp.where(served, cost, 0))
  victims = runs & (spent > free + later)
  first = jnp.arange(G) == jnp.argmax(runs)
  doomed = runs & first & ~served
  # A prompt starts when there is room for all of it and for its beams' first pages, or when it is alone.
  whole = cdiv(state.requests.prompt_lens[:S:W], size)[order] + 2 * W
  fits = spent + jnp.cumsum(jnp.where(active & ~runs, whole, 0)) <= free
  starts = active & ~runs & jnp.where(jnp.any(runs), fits & jnp.all(served == runs), fits | (jnp.arange(G) == 0))
  served, victims, doomed = (
    jnp.repeat(jnp.zeros(G, bool).at[order].set(x), W) for x in (served | starts, victims, doomed)
  )

  take = jnp.where(served, take, 0)
  table = page_table.release(table, victims)
  starts_at = table.seq_lens
  table, copies, granted = page_table.extend(table, take)
  take = jnp.where(granted, take, 0)
  again = jnp.tile(victims, 2)
  prompt = jnp.where(jnp.arange(2 * S) % W == 0, state.requests.prompt_lens, 0) * (jnp.arange(2 * S) < S)
  num_tokens = jnp.where(again, prompt, state.requests.num_tokens)
  none = jnp.full(S, NOBODY)
  step = StepPlan(
    rows=jnp.where(live, jnp.arange(S), NOBODY),
    starts=starts_at,
    scheduled=take,
    samples=(take > 0) & (take == remaining),
    proposed=jnp.zeros((S, 0), jnp.int32),
    num_proposed=jnp.zeros(S, jnp.int32),
    cached=jnp.zeros(S, jnp.int32),
    admitted=jnp.zeros(S, bool),
    filled=jnp.zeros((2, 0), jnp.int32),
    swap_out=None,
    swap_in=None,
    copies=copies,
    preempted=jnp.where(victims, state.arrival[:S], NOBODY),
    lost=jnp.where(victims, state.table.seq_lens, 0),
    doomed=jnp.max(jnp.where(doomed, jnp.arange(S), none)),
  )
  state = dataclasses.replace(state, table=table, requests=dataclasses.replace(state.requests, num_tokens=num_tokens))
  return dataclasses.replace(
    beams,
    state=state,
    scores=jnp.where(again, jnp.where(num_tokens > 0, 0.0, -jnp.inf), beams.scores),
    steps=beams.steps + 1,
    held=beams.held + jnp.sum(table.ref_counts > 0),
    saved=beams.saved + jnp.sum(jnp.maximum(table.ref_counts - 1, 0)),
    copied=beams.copied + jnp.sum(copies.dst >= 0, dtype=jnp.int32),
    restarts=beams.restarts + jnp.sum(victims, dtype=jnp.int32) // W,
  ), step


def commit(beams: BeamState, plan: StepPlan, words: Words) -> BeamState:
  """Takes in what the model said: chooses who goes on and who ended well, forks, and finishes prompts.

  Args:
    beams: as `plan` returned it; stays good.
    plan: the step that was run.
    words: of `_words`.
  """
  state, W = beams.state, beams.width
  S, requests = state.running.size, state.requests
  G, (tokens, logprobs, stop_logprobs) = S // W, words
  sampled = jnp.any(plan.samples.reshape(G, W), axis=1)  # bool[G]
  ends = jnp.any((jnp.arange(S) == plan.doomed).reshape(G, W), axis=1)  # it ends with what it has
  scores = beams.scores[:S]

  # Those that go on: the W best of W * W.
  ways = (scores[:, None] + logprobs).reshape(G, W * W)
  best, way = lax.top_k(ways, W)  # [G, W]
  slots = jnp.arange(S).reshape(G, W)
  parent = jnp.where(sampled[:, None], slots[:, :1] + way // W, slots).reshape(S)
  token = jnp.take_along_axis(tokens.reshape(G, W * W), way, axis=1).reshape(S)
  grown = jnp.repeat(sampled, W)
  count = requests.num_tokens[:S][parent]
  after = jnp.where(grown, best.reshape(S), scores)
  text = requests.tokens[:S][parent]
  text = text.at[jnp.arange(S), jnp.where(grown, count, text.shape[1])].set(token, mode="drop")
  length = count + grown
  output = length - requests.prompt_lens[:S]
  ends |= sampled & (output[::W] >= requests.max_tokens[:S:W])

  # Results: the W best of those that were, those that end now, and at the end those that would have gone on.
  num_ids, old = stop_logprobs.shape[1], jnp.arange(S, 2 * S).reshape(G, W)
  now = jnp.where(sampled[:, None], (scores[:, None] + stop_logprobs).reshape(G, W * num_ids), -jnp.inf)
  rest = jnp.where(ends[:, None], after.reshape(G, W), -jnp.inf)
  lens = jnp.concatenate([requests.num_tokens, length])  # of the rows as they were, then of the beams as they are
  pool = _Pool(
    score=jnp.concatenate([beams.scores[S:].reshape(G, W), now, rest], axis=1),
    row=jnp.concatenate([old, jnp.repeat(slots, num_ids, axis=1), 2 * S + slots], axis=1),
    token=jnp.pad(requests.stop_ids[:S].reshape(G, W * num_ids), ((0, 0), (W, W)), constant_values=NOBODY),
    finish=jnp.pad(jnp.full((G, W * num_ids), STOP), ((0, 0), (0, W)), constant_values=LENGTH),
  )
  pool = pool._replace(finish=jnp.concatenate([state.finish[S:].reshape(G, W), pool.finish], axis=1))
  output = lens[pool.row] + (pool.token >= 0) - requests.prompt_lens[:S:W, None]
  worth, chosen = lax.top_k(pool.score / jnp.maximum(output, 1) ** beams.penalty, W)
  won = _Pool(*(jnp.take_along_axis(values, chosen, axis=1).reshape(S) for values in pool))
  won_lens = lens[won.row] + (won.token >= 0)
  won_text = jnp.concatenate([requests.tokens, text])[won.row]
  won_text = won_text.at[jnp.arange(S), jnp.where(won.token >= 0, won_lens - 1, text.shape[1])].set(
    won.token, mode="drop"
  )
  most = requests.max_tokens[:S:W].astype(jnp.float32) ** beams.penalty
  ends |= sampled & (worth[:, -1] >= after[::W] / most)  # scores only fall: nobody can win any more

  over = jnp.repeat(ends, W)
  table = page_table.attach(
    state.table,
    jnp.where(grown & (parent != jnp.arange(S)), jnp.arange(S), NOBODY),
    state.table.pages[parent],
    state.table.seq_lens[parent],
  )
  state = dataclasses.replace(
    state,
    table=page_table.release(table, over),
    requests=dataclasses.replace(
      requests,
      tokens=jnp.concatenate([text, won_text]),
      num_tokens=jnp.concatenate([length, won_lens]),
    ),
    finish=jnp.concatenate([jnp.where(over, LENGTH, state.finish[:S]), won.finish]),
  )
  return dataclasses.replace(beams, state=state, scores=jnp.concatenate([after, won.score]))


def step(model: Model, settings: pure.Settings, params, beams: BeamState, kv: KVPages) -> tuple[BeamState, KVPages]:
  """One step of every prompt. Consumes `kv`."""
  beams, made = plan(beams, token_budget=settings.token_budget, chunk_size=settings.chunk_size)
  kv = kv_pages.copy(kv, made.copies)
  S, W = made.rows.size, beams.width
  words = jnp.zeros((S, W), jnp.int32), jnp.zeros((S, W)), jnp.zeros((S, NUM_STOP_IDS))
  for wanted, num_tokens in ((~made.decode_only, settings.token_budget), (made.decode_only, None)):
    forward = functools.partial(_words, model, settings, params, beams, made, num_tokens)
    words, kv = pure.when(wanted, forward, words, kv)
  return commit(beams, made, words), kv


def run(model: Model, settings: pure.Settings, params, beams: BeamState, kv: KVPages) -> tuple[BeamState, KVPages]:
  """Steps until one of the prompts is finished. Consumes `kv`."""
  first = beams.active

  def more(carry):
    return jnp.any(first) & jnp.all(carry[0].active == first)

  return lax.while_loop(more, lambda carry: step(model, settings, params, *carry), (beams, kv))


def _words(
  model: Model,
  settings: pure.Settings,
  params,
  beams: BeamState,
  plan: StepPlan,
  num_tokens: int | None,
  _: Words,
  kv: KVPages,
) -> tuple[Words, KVPages]:
  """Of each beam the W best ways to go on (tokens i32[S, W], log-probabilities), and those of its ends (f32[S, I])."""
  logits, kv = pure.compute(model, settings, params, beams.state, plan, num_tokens, kv)
  logprobs = jax.nn.log_softmax(logits[:, 0])
  S, V = logprobs.shape
  stops = beams.state.requests.stop_ids[:S]
  ends = jnp.where(stops >= 0, jnp.take_along_axis(logprobs, jnp.maximum(stops, 0), axis=1), -jnp.inf)
  goes_on = logprobs.at[jnp.arange(S)[:, None], jnp.where(stops >= 0, stops, V)].set(-jnp.inf, mode="drop")
  best, tokens = lax.top_k(goes_on, beams.width)
  return (tokens.astype(jnp.int32), best, ends), kv
