"""The scheduler's state, and what it hands to a step: frozen dataclasses of small arrays.

R requests, S slots, C tokens kept per request, F pages that a step may fill, T packed tokens, K tokens
proposed per slot (`speculation`). NOBODY (-1) marks an
absent row, slot or id.
"""

import dataclasses

import jax
import jax.numpy as jnp

from paged_flash.cache.page_table import PageCopies, PageTable
from paged_flash.cache.prefix import PrefixIndex
from paged_flash.sampling import Sampling

NOBODY = -1
NUM_STOP_IDS = 8  # per request
LIVE, STOP, LENGTH, CANCELLED = range(4)  # values of `State.finish`
FINISH_NAMES = ("", "stop", "length", "cancelled")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Requests:
  """What users asked for, and the tokens so far."""

  tokens: jax.Array  # i32[R, C]  the prompt, then the output; in a simulation C may be 0, or there is one number a page
  prompt_lens: jax.Array  # i32[R]
  num_tokens: jax.Array  # i32[R]  prompt and output
  min_tokens: jax.Array  # i32[R]  stop ids do not count before so many output tokens
  max_tokens: jax.Array  # i32[R]  output tokens at most
  stop_ids: jax.Array  # i32[R, I]  NOBODY where unused
  tenant: jax.Array  # i32[R]  whose: pages are shared within a tenant (or adapter) only; at least 0
  priority: jax.Array  # i32[R]  for policies that look at it: the smaller, the sooner
  group: jax.Array  # i32[R]  row of the first of several samples of one prompt; NOBODY
  sampling: Sampling  # [R]


def blank(num_requests: int, max_seq_len: int, num_stop_ids: int = NUM_STOP_IDS) -> Requests:
  """Rows that hold no request: no prompt, one output token at most, greedy."""

  def full(value, dtype=jnp.int32):
    return jnp.full(num_requests, value, dtype)

  return Requests(
    tokens=jnp.zeros((num_requests, max_seq_len), jnp.int32),
    prompt_lens=full(0),
    num_tokens=full(0),
    min_tokens=full(0),
    max_tokens=full(1),
    stop_ids=jnp.full((num_requests, num_stop_ids), NOBODY, jnp.int32),
    tenant=full(0),
    priority=full(0),
    group=full(NOBODY),
    sampling=Sampling(
      temperature=full(0, jnp.float32), top_k=full(0), top_p=full(1, jnp.float32), seed=full(0, jnp.uint32)
    ),
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
  """The whole memory state of a serving engine but the pool's bytes. Keep it, compare it, fork it: it never changes.

  Tokens whose K and V are computed are the table's `seq_lens`; a request is running when a slot names it, waiting
  when it is live and no slot does.
  """

  table: PageTable  # [S]
  host: PageTable | None  # [R]  what preempted requests keep in host memory; None where there is none
  index: PrefixIndex | None  # what the pool's full pages hold; None where prefixes are not shared
  requests: Requests  # [R]
  arrival: jax.Array  # i32[R]  number of the request, in order of arrival: its id; NOBODY in a row never used
  finish: jax.Array  # i32[R]  LIVE, or why it ended
  preemptions: jax.Array  # i32[R]  times it lost its slot
  running: jax.Array  # i32[S]  row of the request in each slot; NOBODY
  num_arrived: jax.Array  # i32[]

  @property
  def live(self) -> jax.Array:  # bool[R]
    return (self.arrival >= 0) & (self.finish == LIVE)

  @property
  def waiting(self) -> jax.Array:  # bool[R]
    at = jnp.where(self.running >= 0, self.running, self.arrival.size)
    return self.live.at[at].set(False, mode="drop")

  @property
  def num_waiting(self) -> jax.Array:  # i32[]
    """Requests that are live beyond those that run: who runs is live."""
    return jnp.sum(self.live, dtype=jnp.int32) - jnp.sum(self.running >= 0, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
  """Everything one step needs, derived once."""

  rows: jax.Array  # i32[S]  request row in each slot; NOBODY
  starts: jax.Array  # i32[S]  tokens computed before the step
  scheduled: jax.Array  # i32[S]  tokens to compute in the step
  samples: jax.Array  # bool[S]  slots whose next token the step yields
  proposed: jax.Array  # i32[S, K]  guesses of the tokens after it
  num_proposed: jax.Array  # i32[S]  of these, how many the step computes too: the last of `scheduled`
  cached: jax.Array  # i32[S]  of a request admitted now: tokens that it need not compute, because their pages are there
  admitted: jax.Array  # bool[S]
  filled: jax.Array  # i32[2, F]  slot and place of the pages that the step fills; slot S for none
  swap_out: PageCopies | None  # [S, P]  from the pool into host memory, to make before anything else
  swap_in: PageCopies | None  # [S, P]  from host memory into the pool, to make next
  copies: PageCopies  # [S]  to make before anything is written
  preempted: jax.Array  # i32[S]  id of the request that lost the slot; NOBODY
  lost: jax.Array  # i32[S]  tokens that it had computed and must compute again
  doomed: jax.Array  # i32[]  row of a request that no pool state can serve any more; NOBODY

  @property
  def decode_only(self) -> jax.Array:  # bool[]
    """No slot computes more than one token."""
    return jnp.all(self.scheduled <= 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
  """The tokens of one step, packed without gaps in slot order; padding at the end."""

  tokens: jax.Array  # i32[T]
  positions: jax.Array  # i32[T]
  pages: jax.Array  # i32[T]  page that each token's K and V go to; NO_PAGE for padding
  offsets: jax.Array  # i32[T]  place inside that page
  query_starts: jax.Array | None  # i32[S+1]  first token of each slot; None when token i belongs to slot i
  kv_lens: jax.Array  # i32[S]  tokens to attend to, the new ones included; 0 for a slot that computes nothing
  last: jax.Array  # i32[S]  index of each slot's last token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepEvents:
  """What one step did, small enough to send to the host every time."""

  ids: jax.Array  # i32[S]  the request that got tokens; NOBODY
  counts: jax.Array  # i32[S]  how many: one, and the proposed tokens that were accepted
  tokens: jax.Array  # i32[S, 1 + K]
  logprobs: jax.Array  # f32[S, 1 + K]
  proposed: jax.Array  # i32[S]  proposed tokens that were computed for it
  finish: jax.Array  # i32[S]  LIVE, or why the request ended with the last of its tokens
  ended: jax.Array  # i32[]  id of a request that ended without a token (LENGTH: the pool cannot hold it); NOBODY
  admitted: jax.Array  # i32[S]  ids that got their slot
  cached: jax.Array  # i32[S]  tokens that these need not compute
  preempted: jax.Array  # i32[S]  ids that lost their slot
  lost: jax.Array  # i32[S]  tokens that these must compute again
  swapped_out: jax.Array  # i32[S]  pages of theirs copied into host memory; 0 where it is recomputed
  swapped_in: jax.Array  # i32[S]  pages of the admitted copied from there
  num_scheduled: jax.Array  # i32[]  tokens computed
  running: jax.Array  # i32[S]  the request in each slot during the step; NOBODY
  num_waiting: jax.Array  # i32[]
  pages_held: jax.Array  # i32[]  pages with a ref count above 0 during the step
  pages_shared: jax.Array  # i32[]  of these, held more than once
  pages_saved: jax.Array  # i32[]  pages that would be held beside them if nothing were shared
  pages_cached: jax.Array  # i32[]  pages that nobody holds, but that can be found again
  tokens_held: jax.Array  # i32[]  tokens of K and V in all slots; a shared page counts for each
