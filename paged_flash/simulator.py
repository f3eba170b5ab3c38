"""The scheduler without a model: how memory would be used by requests of given lengths.

It runs the very `plan` and `commit` that serve, over requests that have lengths but no tokens (C = 0), many steps in
one program. What a page table would hold at every step is exact; time is counted in steps.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from paged_flash import scheduler
from paged_flash.cache.page_table import cdiv
from paged_flash.state import NOBODY, State, StepEvents, blank

_BURST = 256  # steps per dispatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
  """What was held at every step; all i64[steps]."""

  tokens: np.ndarray  # tokens of K and V
  pages: np.ndarray  # pages with a ref count above 0
  running: np.ndarray  # slots in use
  waiting: np.ndarray
  scheduled: np.ndarray  # tokens computed
  preempted: np.ndarray  # requests that lost their slot
  final: np.ndarray  # prompt and output tokens, at their ends, of the requests that ran

  def waste(self, page_size: int) -> float:
    """Share of the held memory, over all steps, that holds no token."""
    return 1 - self.tokens.sum() / (self.pages.sum() * page_size)


def simulate(
  prompt_lens: Sequence[int] | np.ndarray,
  output_lens: Sequence[int] | np.ndarray,
  *,
  num_slots: int,
  num_pages: int,
  page_size: int,
  token_budget: int,
  progress: bool = False,
) -> Timeline:
  """Serves requests of these lengths, all there from the start, first come first served.

  Args:
    prompt_lens, output_lens: [R] tokens of each request, at least 1.
    num_slots: requests that run together.
    num_pages: pages in the pool.
    page_size: tokens per page.
    token_budget: tokens that one step computes at most.
    progress: show a progress bar.

  Raises:
    ValueError: a length below 1, or a request that the pool cannot hold.

  Example:
    >>> timeline = simulate([5, 9], [3, 2], num_slots=2, num_pages=8, page_size=4, token_budget=16)
    >>> timeline.pages.tolist(), timeline.tokens.tolist()
    ([5, 5, 2], [14, 16, 7])
  """
  prompts, outputs = np.asarray(prompt_lens, np.int32), np.asarray(output_lens, np.int32)
  if prompts.shape != outputs.shape or prompts.ndim != 1 or not prompts.size:
    raise ValueError(f"prompt_lens and output_lens must be two equal [R], got {prompts.shape} and {outputs.shape}")
  if min(prompts.min(), outputs.min()) < 1:
    raise ValueError(f"lengths must be at least 1, got {min(prompts.min(), outputs.min())}")
  pages_per_slot = int(cdiv((prompts + outputs).max(), page_size))
  if pages_per_slot > num_pages:
    raise ValueError(f"num_pages must be at least {pages_per_slot}, for the longest request, got {num_pages}")
  state = scheduler.init(
    num_slots=num_slots,
    pages_per_slot=pages_per_slot,
    num_pages=num_pages,
    page_size=page_size,
    num_requests=prompts.size,
    max_seq_len=0,
  )
  lens, most = jnp.asarray(prompts), jnp.asarray(outputs)
  requests = dataclasses.replace(blank(prompts.size, 0), prompt_lens=lens, num_tokens=lens, max_tokens=most)
  state, _ = jax.jit(scheduler.submit)(state, requests)
  burst = jax.jit(functools.partial(_burst, token_budget=token_budget))
  logs, live = [], True
  with tqdm(total=int(outputs.sum()), unit="token", unit_scale=True, disable=not progress) as bar:
    while live:
      state, events, steps, live = burst(state)
      logs.append(jax.tree.map(lambda a, n=int(steps): np.asarray(a)[:n], events))
      bar.update(int((state.requests.num_tokens - state.requests.prompt_lens).sum()) - bar.n)
  log = jax.tree.map(lambda *parts: np.concatenate(parts).astype(np.int64), *logs)
  return Timeline(
    tokens=log.tokens_held,
    pages=log.pages_held,
    running=(log.running != NOBODY).sum(axis=1),
    waiting=log.num_waiting,
    scheduled=log.num_scheduled,
    preempted=(log.preempted != NOBODY).sum(axis=1),
    final=np.asarray(state.requests.num_tokens).astype(np.int64),
  )


def _burst(state: State, *, token_budget: int) -> tuple[State, StepEvents, jax.Array, jax.Array]:
  """Up to _BURST steps: the state after them, their events stacked, how many there were, and whether more are left."""

  def step(state):
    nothing = jnp.zeros(state.running.size)
    state, plan = scheduler.plan(state, token_budget=token_budget)
    return scheduler.commit(state, plan, nothing.astype(jnp.int32), nothing)

  log = jax.tree.map(lambda s: jnp.zeros((_BURST, *s.shape), s.dtype), jax.eval_shape(step, state)[1])

  def body(carry):
    i, state, log = carry
    state, events = step(state)
    return i + 1, state, jax.tree.map(lambda a, e: a.at[i].set(e), log, events)

  i, state, log = lax.while_loop(lambda c: (c[0] < _BURST) & jnp.any(c[1].live), body, (jnp.int32(0), state, log))
  return state, log, i, jnp.any(state.live)
