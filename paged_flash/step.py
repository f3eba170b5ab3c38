"""One pure step, and a loop of them: what the engine compiles.

    plan -> copies -> model (each layer writes K and V to its pages and attends through the table) -> sampling -> commit

A step has two shapes: `token_budget` packed tokens when some slot prefills, and one token for each slot when none
does. Both are in one program, and the plan says which runs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from paged_flash import attention, sampling, scheduler
from paged_flash.cache import kv_pages
from paged_flash.cache.kv_pages import KVPages
from paged_flash.cache.page_table import NO_PAGE, count_upto
from paged_flash.models import Model
from paged_flash.state import Packed, State, StepEvents, StepPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What is fixed when a step is compiled."""

  token_budget: int  # tokens that one step computes at most
  chunk_size: int  # of these, prompt tokens of one request
  implementation: str | None  # of `paged_attention`
  policy: scheduler.Policy  # who comes first


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
  state, plan = scheduler.plan(
    state, token_budget=settings.token_budget, chunk_size=settings.chunk_size, policy=settings.policy
  )
  kv = kv_pages.copy(kv, plan.copies)
  forward = functools.partial(compute, model, settings, params, state, plan)
  logits = jnp.zeros((plan.rows.size, model.config.vocab_size), jnp.float32)
  logits, kv = _when(~plan.decode_only, functools.partial(forward, settings.token_budget), logits, kv)
  logits, kv = _when(plan.decode_only, functools.partial(forward, None), logits, kv)

  requests, row = state.requests, plan.rows
  index = (requests.num_tokens - requests.prompt_lens)[row]  # i32[S] of the token in its request's output
  early = (index + 1 < requests.min_tokens[row])[:, None] & (requests.stop_ids[row] >= 0)  # bool[S, I]
  banned = jnp.where(early, requests.stop_ids[row], logits.shape[1])
  logits = logits.at[jnp.arange(row.size)[:, None], banned].set(-jnp.inf, mode="drop")
  tokens, logprobs = sampling.sample(logits, jax.tree.map(lambda a: a[row], requests.sampling), index)
  state, events = scheduler.commit(state, plan, tokens, logprobs)
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
  return Packed(
    tokens=jnp.where(inside, state.requests.tokens[plan.rows[slot], position], 0),
    positions=position,
    pages=jnp.where(inside, page, NO_PAGE),
    offsets=position % state.table.page_size,
    query_starts=query_starts,
    kv_lens=kv_lens,
    last=last,
  )


def compute(
  model: Model, settings: Settings, params, state: State, plan: StepPlan, num_tokens: int | None, kv: KVPages
) -> tuple[jax.Array, KVPages]:
  """Logits f32[S, V] of each slot's last token, and the pool with the new K and V in it."""
  packed = pack(state, plan, num_tokens)
  pages = state.table.pages[: plan.rows.size]  # i32[S, P]
  window = model.config.sliding_window  # tokens a query sees, itself included

  def attend(q, k, v, kv, layer):
    kv = kv_pages.write(kv, layer, k, v, packed.pages, packed.offsets)
    out = attention.paged_attention(
      q,
      kv.k,
      kv.v,
      kv_pages.layer_pages(kv, pages, layer),
      packed.kv_lens,
      query_starts=packed.query_starts,
      max_query_len=1 if num_tokens is None else settings.chunk_size,
      local_window_size=None if window is None else window - 1,
      implementation=settings.implementation,
    )
    return out, kv

  decoder = model.bind(params)
  hidden, kv = decoder(packed.tokens, packed.positions, kv, attend)
  return decoder.logits(hidden[packed.last]), kv


def _when(wanted: jax.Array, forward, logits: jax.Array, kv: KVPages) -> tuple[jax.Array, KVPages]:
  """`forward(kv)` if `wanted`, else what came in: a loop of at most one turn.

  `lax.cond` would say it better, but XLA copies the pool into a conditional (jax 0.11.2, on a CPU), and a loop not.
  """

  def body(carry):
    return (jnp.bool(False), *forward(carry[2]))

  return lax.while_loop(lambda carry: carry[0], body, (wanted, logits, kv))[1:]
