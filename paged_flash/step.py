"""One pure step, and a loop of them: what the engine compiles.

    plan -> copies -> model (each layer writes K and V to its pages and attends through the table) -> sampling -> commit

A step has three shapes: `token_budget` packed tokens when some slot prefills; one token for each slot when none does;
and, where the engine speculates, up to 1 + K tokens for each slot when some of them are proposed ones. All are in one
program, and the plan says which runs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from paged_flash import attention, sampling, scheduler, speculation, swapping
from paged_flash.cache import kv_pages, prefix
from paged_flash.cache.kv_pages import KVPages
from paged_flash.cache.page_table import NO_PAGE, count_upto
from paged_flash.models import Model
from paged_flash.speculation import Proposer
from paged_flash.state import Packed, State, StepEvents, StepPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What is fixed when a step is compiled."""

  token_budget: int  # tokens that one step computes at most
  chunk_size: int  # of these, prompt tokens of one request
  implementation: str | None  # of `paged_attention`
  policy: scheduler.Policy  # who comes first
  preemption: swapping.Preemption  # which victims are swapped to host memory
  num_proposed: int = 0  # K, tokens proposed for each slot; 0: no speculation
  proposer: Proposer = speculation.lookup


def plan(settings: Settings, state: State) -> tuple[State, StepPlan]:
  """`scheduler.plan`, with what the proposer proposes."""
  proposals = settings.proposer(state, settings.num_proposed) if settings.num_proposed else None
  return scheduler.plan(
    state,
    token_budget=settings.token_budget,
    chunk_size=settings.chunk_size,
    policy=settings.policy,
    preemption=settings.preemption,
    proposals=proposals,
  )


def step(
  model: Model, settings: Settings, params, state: State, kv: KVPages
) -> tuple[State, KVPages, StepEvents, jax.Array]:
  """One step of every running request.

  Args:
    model: what to run; static.
    settings: static.
    params: the model's weights, a pytree of arrays.
    state: stays good.
    kv: the pool; consumed.

  Returns:
    state: the next one.
    kv: the next pool.
    events: what happened.
    live: bool[], whether any request is left.
  """
  state, made = plan(settings, state)
  kv = kv_pages.copy(kv_pages.swap(kv, made.swap_out, made.swap_in), made.copies)
  S, W = made.rows.size, 1 + settings.num_proposed
  guesses = jnp.any(made.num_proposed > 0)
  said = jnp.zeros((S, W), jnp.int32), jnp.zeros((S, W))
  shapes = [(~made.decode_only & ~guesses, settings.token_budget, 1), (made.decode_only, None, 1)]
  if settings.num_proposed:
    shapes.append((guesses, min(S * W, settings.token_budget), W))
  for wanted, num_tokens, width in shapes:
    forward = functools.partial(_say, model, settings, params, state, made, num_tokens, width)
    said, kv = when(wanted, forward, said, kv)
  state, events = scheduler.commit(state, made, *said)
  return state, kv, events, jnp.any(state.live)


def run(
  model: Model, settings: Settings, params, state: State, kv: KVPages, num_steps: jax.Array, *, most: int
) -> tuple[State, KVPages, tuple[StepEvents, jax.Array], jax.Array]:
  """Up to `num_steps` (i32[], at most `most`) steps in one loop on the device; ends early when no request is live.

  Returns:
    As `step`, but for the events: those of every step, stacked [most, ...], and how many steps there were, i32[].
  """
  one = functools.partial(step, model, settings, params)
  shapes = jax.eval_shape(one, state, kv)[2]
  log = jax.tree.map(lambda s: jnp.zeros((most, *s.shape), s.dtype), shapes)

  def more(carry):
    i, *_, live = carry
    return (i < num_steps) & live

  def body(carry):
    i, state, kv, log, _ = carry
    state, kv, events, live = one(state, kv)
    return i + 1, state, kv, jax.tree.map(lambda a, e: a.at[i].set(e), log, events), live

  i, state, kv, log, live = lax.while_loop(more, body, (jnp.int32(0), state, kv, log, jnp.any(state.live)))
  return state, kv, (log, i), live


def pack(state: State, plan: StepPlan, num_tokens: int | None) -> Packed:
  """The packed tokens of a planned step.

  Args:
    state: as `plan` returned it.
    plan: the step.
    num_tokens: T, at least the tokens scheduled; None for a `decode_only` plan: T = S, token i in slot i.
  """
  S = plan.scheduled.size
  kv_lens = jnp.where(plan.scheduled > 0, plan.starts + plan.scheduled, 0)
  if num_tokens is None:
    slot, inside, query_starts, last = jnp.arange(S), plan.scheduled > 0, None, jnp.arange(S)
    position = plan.starts
  else:
    query_starts = jnp.pad(jnp.cumsum(plan.scheduled), (1, 0))  # i32[S+1]
    index = jnp.arange(num_tokens)
    slot = count_upto(query_starts[1:], index)
    inside, slot = slot < S, jnp.minimum(slot, S - 1)
    position = jnp.where(inside, plan.starts[slot] + index - query_starts[slot], 0)
    last = jnp.maximum(query_starts[1:] - 1, 0)
  page = state.table.pages[slot, position // state.table.page_size]
  tokens = state.requests.tokens[plan.rows[slot], position]
  if K := plan.proposed.shape[1]:
    ahead = position - (plan.starts + plan.scheduled - plan.num_proposed)[slot]
    tokens = jnp.where(ahead >= 0, plan.proposed[slot, jnp.clip(ahead, 0, K - 1)], tokens)
  return Packed(
    tokens=jnp.where(inside, tokens, 0),
    positions=position,
    pages=jnp.where(inside, page, NO_PAGE),
    offsets=position % state.table.page_size,
    query_starts=query_starts,
    kv_lens=kv_lens,
    last=last,
  )


def compute(
  model: Model,
  settings: Settings,
  params,
  state: State,
  plan: StepPlan,
  num_tokens: int | None,
  kv: KVPages,
  *,
  width: int = 1,
) -> tuple[jax.Array, KVPages]:
  """What the model says in a planned step.

  Args:
    num_tokens: as for `pack`.
    width: W, tokens of each slot to hear about: the last that is known, and the proposed ones after it.

  Returns:
    Logits f32[S, W, V], and the pool with the new K and V in it. Consumes `kv`.
  """
  packed = pack(state, plan, num_tokens)
  pages = state.table.pages[: plan.rows.size]  # i32[S, P]
  window = model.config.sliding_window  # tokens a query sees, itself included
  most = settings.chunk_size if width == 1 else width
  shared = None if window is not None else prefix.shared_prefixes(pages, packed.kv_lens, state.table.page_size)

  def attend(q, k, v, kv, layer):
    kv = kv_pages.write(kv, layer, k, v, packed.pages, packed.offsets)
    out = attention.paged_attention(
      q,
      kv.k,
      kv.v,
      kv_pages.layer_pages(kv, pages, layer),
      packed.kv_lens,
      query_starts=packed.query_starts,
      max_query_len=1 if num_tokens is None else most,
      local_window_size=None if window is None else window - 1,
      shared_prefixes=shared,
      implementation=settings.implementation,
    )
    return out, kv

  decoder = model.bind(params)
  hidden, kv = decoder(packed.tokens, packed.positions, kv, attend)
  at = jnp.minimum((packed.last - plan.num_proposed)[:, None] + jnp.arange(width), packed.last[:, None])
  return decoder.logits(hidden[at]), kv


def _say(
  model: Model,
  settings: Settings,
  params,
  state: State,
  plan: StepPlan,
  num_tokens: int | None,
  width: int,
  said: tuple[jax.Array, jax.Array],
  kv: KVPages,
) -> tuple[tuple[jax.Array, jax.Array], KVPages]:
  """Tokens i32[S, 1 + K] and their log-probabilities, of which the first `width` of each slot are drawn anew."""
  logits, kv = compute(model, settings, params, state, plan, num_tokens, kv, width=width)
  requests, row = state.requests, jnp.repeat(plan.rows, width)  # i32[S * W]
  index = (requests.num_tokens - requests.prompt_lens)[row] + jnp.tile(jnp.arange(width), plan.rows.size)
  logits = logits.reshape(row.size, -1)
  early = (index + 1 < requests.min_tokens[row])[:, None] & (requests.stop_ids[row] >= 0)  # bool[S * W, I]
  banned = jnp.where(early, requests.stop_ids[row], logits.shape[1])
  logits = logits.at[jnp.arange(row.size)[:, None], banned].set(-jnp.inf, mode="drop")
  drawn = sampling.sample(logits, jax.tree.map(lambda a: a[row], requests.sampling), index)
  return jax.tree.map(lambda old, new: old.at[:, :width].set(new.reshape(-1, width)), said, drawn), kv


def when(wanted: jax.Array, forward, said, kv: KVPages):
  """`forward(said, kv)` if `wanted`, else what came in: a loop of at most one turn.

  `lax.cond` would say it better, but XLA copies the pool into a conditional (jax 0.11.2, on a CPU), and a loop not.
  """

  def body(carry):
    return (jnp.bool(False), *forward(*carry[1:]))

  return lax.while_loop(lambda carry: carry[0], body, (wanted, said, kv))[1:]
