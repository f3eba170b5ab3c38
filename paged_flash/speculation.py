"""Speculative decoding: several tokens of a sequence in one step, the very tokens that would have come one by one.

A proposer guesses what follows; the step scores the guesses beside the token that is due, and those are kept that the
request's own sampling draws from the model's logits at their places. Noise depends on the seed and the token's place in
its output alone (`sampling`), so that a token drawn here is the token drawn without speculation, greedy or not, and the
test is equality. What was guessed wrong is taken back: the table is cut to the length of what holds, and the pages past
it are free in the same step. A proposer is a function of the state, as `lookup` below, or a draft model (`step`).

S slots, K tokens proposed at most. Sources: Leviathan et al. 2023 (speculative decoding; their rejection sampling keeps
a distribution, equality under fixed noise keeps the sample); Saxena 2023 (prompt lookup).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from paged_flash.cache import page_table
from paged_flash.cache.page_table import cdiv
from paged_flash.state import NOBODY, State, StepPlan

type Proposer = Callable[[State, int], jax.Array]  # what may follow each slot's tokens: i32[S, K], NOBODY past its end


def lookup(state: State, num_tokens: int, *, longest: int = 3, shortest: int = 2) -> jax.Array:
  """Proposes what followed the last tokens of a request where they stood before, in its prompt or output.

  Of all earlier places the one with the longest match counts, of these the latest. What followed it reaches up to the
  end, and from there on repeats itself. The cost is that of comparing all kept tokens of each slot, `longest` times.

  Args:
    state: stays good.
    num_tokens: K, to propose for each slot.
    longest: last tokens to compare at most.
    shortest: matches of fewer do not count.

  Returns:
    i32[S, K]; NOBODY for slots with no match.
  """
  row = state.running
  tokens = state.requests.tokens[row]  # i32[S, C]
  count = jnp.where(row >= 0, state.requests.num_tokens[row], 0)[:, None]
  place = jnp.arange(tokens.shape[1])
  agrees, length = place < count - 1, jnp.zeros_like(tokens)
  for back in range(longest):  # does the token so far before each place equal the one so far before the end?
    last = jnp.take_along_axis(tokens, jnp.maximum(count - 1 - back, 0), axis=1)
    agrees &= (jnp.roll(tokens, back, axis=1) == last) & (place >= back)
    length += agrees
  rank = jnp.where(length >= shortest, length * place.size + place, NOBODY)
  at = jnp.argmax(rank, axis=1, keepdims=True)
  source = at + 1 + jnp.arange(num_tokens) % jnp.maximum(count - 1 - at, 1)
  found = jnp.max(rank, axis=1, keepdims=True) >= 0
  return jnp.where(found, jnp.take_along_axis(tokens, source, axis=1), NOBODY)


def afforded(
  state: State, row: jax.Array, decodes: jax.Array, take: jax.Array, proposals: jax.Array, token_budget: int
) -> jax.Array:
  """Proposed tokens that ride along in a step: none beside a chunk of a prompt, none past a request's end, and none for
  which others would pay.

  Args:
    state: with the slots filled and the pages of this step's other tokens not yet granted.
    row: i32[S], row of the request in each slot.
    decodes: bool[S], slots whose request has all but its last token computed.
    take: i32[S], tokens that the step computes anyway.
    proposals: i32[S, K], NOBODY past their end.
    token_budget: tokens that the step computes at most.

  Returns:
    i32[S], how many of each slot's: first come, first served, from slot 0 on.
  """
  requests, table = state.requests, state.table
  if not proposals.shape[1]:
    return jnp.zeros_like(take)
  left = requests.prompt_lens[row] + requests.max_tokens[row] - requests.num_tokens[row] - 1  # after the one due
  wanted = jnp.minimum(jnp.sum(jnp.cumprod(proposals >= 0, axis=1), axis=1), left)
  wanted = jnp.where(decodes & (take > 0) & jnp.all(take <= 1), wanted, 0)
  wanted = jnp.clip(token_budget - jnp.sum(take) - jnp.cumsum(wanted) + wanted, 0, wanted)
  inside = -(table.seq_lens + take) % table.page_size  # places left in the last page
  pages = cdiv(jnp.maximum(wanted - inside, 0), table.page_size)
  spare = table.num_free - jnp.sum(page_table.need(table, take)[0])
  return jnp.where(jnp.cumsum(pages) <= spare, wanted, jnp.minimum(wanted, inside))


def accepted(plan: StepPlan, tokens: jax.Array) -> jax.Array:
  """i32[S]: how many of the proposed tokens are those drawn (`tokens` i32[S, 1 + K]), from the first on."""
  K = plan.proposed.shape[1]
  same = (plan.proposed == tokens[:, :K]) & (jnp.arange(K) < plan.num_proposed[:, None])
  return jnp.sum(jnp.cumprod(same, axis=1), axis=1)
