"""One pure step, and a loop of them: what the engine compiles.

    plan -> copies -> model (each layer writes K and V to its pages and attends through the table) -> sampling -> commit

A step has three shapes: `token_budget` packed tokens when some slot prefills; one token for each slot when none does;
and, where the engine speculates, up to 1 + K tokens for each slot when some of them are proposed ones. All are in one
program, and the plan says which runs.

A draft model computes K and V of every token that the model does, in the same step and the same pages: one page table
is true for both, and what shares, copies, preempts or takes back a page need not know that there are two. The plan says
how many tokens it may propose and grants their pages; then it writes them there one after the other, drawing with the
request's own noise, so that it errs only where its logits do.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from paged_flash import attention, sampling, scheduler, speculation, swapping
from paged_flash.cache import kv_pages, prefix
from paged_flash.cache.kv_pages import KVPages
from paged_flash.cache.page_table import NO_PAGE, count_upto
from paged_flash.models import Model, ModelConfig, Transformer
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
  proposer: Proposer | Model = speculation.lookup  # a function of the state, or a draft model

  @property
  def draft(self) -> Model | None:
    """The draft model, if one proposes."""
    return self.proposer if self.num_proposed and isinstance(self.proposer, Model) else None


def configs(model: Model, settings: Settings) -> list[ModelConfig]:
  """Of the models that keep K and V in the pool: the model, and the draft if there is one.

  Raises:
    ValueError: the draft cannot say what the model may say, or would read pages that the model lets go of.
  """
  if settings.draft is None:
    return [model.config]
  ours, theirs = model.config, settings.draft.config
  if ours.vocab_size != theirs.vocab_size:
    raise ValueError(f"a draft must have the model's vocab_size={ours.vocab_size}, got {theirs.vocab_size}")
  if ours.sliding_window is not None and (theirs.sliding_window or ours.sliding_window + 1) > ours.sliding_window:
    raise ValueError(
      f"a draft must see the model's window of {ours.sliding_window} at most, got {theirs.sliding_window}"
    )
  return [ours, theirs]


def pool(model: Model, settings: Settings, **sizes: Any) -> KVPages:
  """An empty pool for all of `configs`; `sizes` are the arguments of `kv_pages.init` that no model gives."""
  kv, *draft = (
    kv_pages.init(num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, **sizes)
    for c in configs(model, settings)
  )
  return dataclasses.replace(kv, draft=draft[0]) if draft else kv


def plan(settings: Settings, state: State) -> tuple[State, StepPlan]:
  """`scheduler.plan`, with what the proposer proposes; what a draft model will propose is not known yet."""
  proposals = None
  if isinstance(settings.proposer, Model):
    proposals = jnp.zeros((state.running.size, settings.num_proposed), jnp.int32)
  elif settings.num_proposed:
    proposals = settings.proposer(state, settings.num_proposed)
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
    params: the model's weights, a pytree of arrays; with a draft model, these and the draft's.
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
  params, draft = params if settings.draft is not None else (params, None)
  if draft is not None:
    guess = functools.partial(_guess, settings, draft, state, made)
    proposed, kv = when(guesses, guess, made.proposed, kv)
    made = dataclasses.replace(made, proposed=proposed)
  said = jnp.zeros((S, W), jnp.int32), jnp.zeros((S, W))
  shapes = [(~made.decode_only & ~guesses, settings.token_budget, 1), (made.decode_only, None, 1)]
  if settings.num_proposed:
    shapes.append((guesses, min(S * W, settings.token_budget), W))
  for wanted, num_tokens, width in shapes:
    forward = functools.partial(_say, model, settings, params, draft, state, made, num_tokens, width)
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
  decoder = model.bind(params)
  hidden, kv = _through_pages(decoder, settings, state, packed, settings.chunk_size if width == 1 else width, kv)
  at = jnp.minimum((packed.last - plan.num_proposed)[:, None] + jnp.arange(width), packed.last[:, None])
  return decoder.logits(hidden[at]), kv


def fill(
  model: Model, settings: Settings, params, state: State, plan: StepPlan, num_tokens: int | None, kv: KVPages
) -> tuple[jax.Array, KVPages]:
  """`compute` with the K and V of the draft too; `params` as for `step`. Consumes `kv`."""
  params, draft = params if settings.draft is not None else (params, None)
  logits, kv = compute(model, settings, params, state, plan, num_tokens, kv)
  return logits, _follow(settings, draft, state, plan, num_tokens, kv)


def _through_pages(
  decoder: Transformer, settings: Settings, state: State, packed: Packed, most: int, kv: KVPages
) -> tuple[jax.Array, KVPages]:
  """Hidden states of packed tokens, at most `most` of a slot: [T, E]. Consumes `kv`."""
  pages = state.table.pages[: packed.kv_lens.size]  # i32[S, P]
  window = decoder.config.sliding_window  # tokens a query sees, itself included
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
      max_query_len=1 if packed.query_starts is None else most,
      local_window_size=None if window is None else window - 1,
      shared_prefixes=shared,
      implementation=settings.implementation,
    )
    return out, kv

  return decoder(packed.tokens, packed.positions, kv, attend)


def _say(
  model: Model,
  settings: Settings,
  params,
  draft_params,
  state: State,
  plan: StepPlan,
  num_tokens: int | None,
  width: int,
  said: tuple[jax.Array, jax.Array],
  kv: KVPages,
) -> tuple[tuple[jax.Array, jax.Array], KVPages]:
  """Tokens i32[S, 1 + K] and their log-probabilities, of which the first `width` of each slot are drawn anew."""
  logits, kv = compute(model, settings, params, state, plan, num_tokens, kv, width=width)
  if width == 1:  # a draft that guessed has been here
    kv = _follow(settings, draft_params, state, plan, num_tokens, kv)
  S = plan.rows.size
  ahead = jnp.tile(jnp.arange(width), S)
  drawn = _draw(state, jnp.repeat(plan.rows, width), ahead, logits.reshape(S * width, -1))
  return jax.tree.map(lambda old, new: old.at[:, :width].set(new.reshape(-1, width)), said, drawn), kv


def _draw(state: State, row: jax.Array, ahead: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Tokens of requests `row`, each so many `ahead` of the one that is due, and their log-probabilities; all [B]."""
  requests = state.requests
  index = (requests.num_tokens - requests.prompt_lens)[row] + ahead
  early = (index + 1 < requests.min_tokens[row])[:, None] & (requests.stop_ids[row] >= 0)  # bool[B, I]
  banned = jnp.where(early, requests.stop_ids[row], logits.shape[1])
  logits = logits.at[jnp.arange(row.size)[:, None], banned].set(-jnp.inf, mode="drop")
  return sampling.sample(logits, jax.tree.map(lambda a: a[row], requests.sampling), index)


def _follow(settings: Settings, params, state: State, plan: StepPlan, num_tokens: int | None, kv: KVPages) -> KVPages:
  """The pool with the draft's K and V of a planned step in it, if there is a draft. Consumes `kv`."""
  if settings.draft is None or kv.draft is None:
    return kv
  packed = pack(state, plan, num_tokens)
  _, draft = _through_pages(settings.draft.bind(params), settings, state, packed, settings.chunk_size, kv.draft)
  return dataclasses.replace(kv, draft=draft)


def _guess(
  settings: Settings, params, state: State, plan: StepPlan, proposed: jax.Array, kv: KVPages
) -> tuple[jax.Array, KVPages]:
  """What the draft proposes, i32[S, K], and the pool with its K and V of all the step's tokens. Consumes `kv`.

  One token of each slot after the other: the last that is known, and every guess in its turn.
  """
  assert settings.draft is not None and kv.draft is not None
  decoder = settings.draft.bind(params)

  def one(k, carry):
    proposed, kv = carry
    before = lax.dynamic_slice_in_dim(proposed, jnp.maximum(k - 1, 0), 1, axis=1)  # i32[S, 1]
    scheduled = (k < plan.scheduled).astype(jnp.int32)
    now = dict(starts=plan.starts + k, scheduled=scheduled, proposed=before, num_proposed=jnp.minimum(k, scheduled))
    hidden, kv = _through_pages(decoder, settings, state, pack(state, dataclasses.replace(plan, **now), None), 1, kv)
    tokens, _ = _draw(state, plan.rows, k, decoder.logits(hidden))
    return proposed.at[:, k].set(tokens, mode="drop"), kv

  proposed, draft = lax.fori_loop(0, proposed.shape[1] + 1, one, (proposed, kv.draft))
  return proposed, dataclasses.replace(kv, draft=draft)


def when(wanted: jax.Array, forward, said, kv: KVPages):
  """`forward(said, kv)` if `wanted`, else what came in: a loop of at most one turn.

  `lax.cond` would say it better, but XLA copies the pool into a conditional (jax 0.11.2, on a CPU), and a loop not.
  """

  def body(carry):
    return (jnp.bool(False), *forward(*carry[1:]))

  return lax.while_loop(lambda carry: carry[0], body, (wanted, said, kv))[1:]
