"""The scheduler of a cache without pages: each request reserves contiguous memory before it may run.

The baselines of Kwon et al. 2023, section 6.1 (there "Orca (Max)", "(Pow2)" and "(Oracle)"), behind the interface of
`scheduler`: `submit`, `plan`, `commit`, pure and inside `jit`. They differ in how much a request reserves (`reserve`);
a buddy allocator says where, and refuses when no block is large enough. What follows is the very scheduler that serves
from pages, over a page table in which each slot has one page, long enough for any request: nobody ever waits for pages
or is preempted, because the memory was reserved.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from paged_flash import scheduler
from paged_flash.cache import buddy
from paged_flash.state import Requests, State, StepEvents, StepPlan

RESERVE = ("max", "pow2", "oracle")  # what `reserve` knows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ContiguousState:
  """The scheduler's state, and the block of memory of each request in it."""

  state: State
  blocks: buddy.Blocks  # [R]
  reserved: jax.Array  # i32[R]  tokens that the request asked for; its block may be longer


def reserve(how: str, prompt_lens: jax.Array, output_lens: jax.Array, max_seq_len: int) -> jax.Array:
  """Tokens that requests reserve, i32[R].

  Args:
    how: "max": the longest sequence of the model; "pow2": the prompt, and the output's true length rounded up to a
      power of two, as a guess that is at most twice too long; "oracle": prompt and output, known beforehand.
    prompt_lens, output_lens: i32[R] of tokens.
    max_seq_len: of the model.

  Raises:
    ValueError: another name.

  Example:
    >>> [reserve(how, jnp.array([10]), jnp.array([25]), 2048).item() for how in RESERVE]
    [2048, 42, 35]
  """
  if how == "max":
    return jnp.full_like(prompt_lens, max_seq_len)
  if how == "pow2":
    return jnp.minimum(prompt_lens + buddy.round_up(output_lens), max_seq_len)
  if how == "oracle":
    return prompt_lens + output_lens
  raise ValueError(f"how must be one of {', '.join(RESERVE)}, got {how!r}")


def init(*, num_slots: int, num_tokens: jax.Array | int, max_seq_len: int) -> ContiguousState:
  """An empty state: `num_tokens` of memory, sequences of at most `max_seq_len`, as many requests as slots."""
  state = scheduler.init(
    num_slots=num_slots,
    pages_per_slot=1,
    num_pages=num_slots,
    page_size=max_seq_len + 1,
    num_requests=num_slots,
    max_seq_len=0,
  )
  blocks = buddy.init(num_slots=num_slots, num_tokens=num_tokens)
  return ContiguousState(state=state, blocks=blocks, reserved=jnp.zeros(num_slots, jnp.int32))


def submit(state: ContiguousState, new: Requests, num_tokens: jax.Array) -> tuple[ContiguousState, jax.Array]:
  """Takes in one request, if `num_tokens` (i32[]) of contiguous memory are there for it.

  Returns:
    state: with the request, and the memory that it will hold to its end.
    ids: i32[1]; NOBODY where it was refused, which changes nothing.
  """
  inner, ids = scheduler.submit(state.state, new)
  row = jnp.argmax(inner.arrival == ids[0])
  blocks, granted = buddy.grant(state.blocks, row, num_tokens)
  granted &= ids[0] >= 0
  taken = ContiguousState(state=inner, blocks=blocks, reserved=state.reserved.at[row].set(num_tokens))
  return lax.cond(granted, lambda: taken, lambda: state), jnp.where(granted, ids, -1)


def plan(
  state: ContiguousState, *, token_budget: int, chunk_size: int | None = None
) -> tuple[ContiguousState, StepPlan]:
  """As `scheduler.plan`."""
  inner, step = scheduler.plan(state.state, token_budget=token_budget, chunk_size=chunk_size)
  return dataclasses.replace(state, state=inner), step


def commit(
  state: ContiguousState, plan: StepPlan, tokens: jax.Array, logprobs: jax.Array
) -> tuple[ContiguousState, StepEvents]:
  """As `scheduler.commit`; the blocks of requests that ended are free at once."""
  inner, events = scheduler.commit(state.state, plan, tokens, logprobs)
  return ContiguousState(
    state=inner,
    blocks=buddy.release(state.blocks, ~inner.live),
    reserved=jnp.where(inner.live, state.reserved, 0),
  ), events
