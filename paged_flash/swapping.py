"""Preemption: who gives way when the pool cannot serve all, and whether K and V are forgotten or go to host memory.

Host memory is a second pool of pages with a page table of its own, `State.host`, whose slots are the rows of requests.
A request that is swapped out gets host pages for all that it holds; when it is admitted again, what the prefix index no
longer finds is copied back, and its host pages are free. Both copies are named in the plan; the step makes them
(`kv_pages.swap`). Where host memory has no room, a request is recomputed. What was copied back is not in the index.

Which of the two is a function, given for each victim the tokens that it has computed and the pages that it holds (both
i32[S]), to bool[S]: swap it. Source: Kwon et al. 2023, section 4.5, and section 7.3 for what either costs.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from paged_flash.cache import page_table
from paged_flash.cache.page_table import NO_PAGE, PageCopies
from paged_flash.state import State

type Preemption = Callable[[jax.Array, jax.Array], jax.Array]  # (tokens, pages) of each victim -> whether to swap it


def always(tokens: jax.Array, pages: jax.Array) -> jax.Array:
  """Swaps whenever host memory has room."""
  del pages
  return tokens > 0


def never(tokens: jax.Array, pages: jax.Array) -> jax.Array:
  """Computes everything again."""
  del pages
  return tokens < 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cheaper:
  """Swaps where copying all pages out and back takes less time than computing their tokens again.

  Pages that a prefix index may still hold when the request comes back cost neither; that is not known beforehand.

  Example:
    >>> costs = Cheaper(page_bytes=2e6, bytes_per_s=25e9, copy_s=10e-6, tokens_per_s=20e3)  # 180 us a page, 50 a token
    >>> costs(jnp.array([16, 3]), jnp.array([1, 1])).tolist()
    [True, False]
  """

  page_bytes: float  # of a page, K and V in all layers
  bytes_per_s: float  # between device and host, one way
  copy_s: float  # seconds that copying a page takes beside its bytes
  tokens_per_s: float  # that are computed again

  def __call__(self, tokens: jax.Array, pages: jax.Array) -> jax.Array:
    seconds = 2 * (self.copy_s + self.page_bytes / self.bytes_per_s)  # of one page
    return (tokens > 0) & (pages * seconds < tokens / self.tokens_per_s)


def served(state: State, slot, runs, need, free) -> tuple[jax.Array, jax.Array]:
  """Whom to serve and whom to keep when the pool cannot serve all. Everything [S], in the order of `scheduler.plan`.

  Serving the first m requests takes the sum of their needs; pages come from the free ones and from those that only
  later requests hold. Both sides are monotone in m, so the most that can be served is a count.

  Returns:
    served: bool[S] compute in this step.
    kept: bool[S] keep their slots and pages: the served, and the one after them if its pages are not needed.
  """
  S, table = runs.size, state.table
  rank = jnp.zeros_like(slot).at[slot].set(jnp.arange(S))
  held = jnp.where(table.pages >= 0, table.pages, table.num_pages)
  first = jnp.full(table.num_pages, S).at[held].min(rank[:, None], mode="drop")  # first holder of each page
  only = jnp.zeros(S, jnp.int32).at[first].add(1, mode="drop")
  freed = jnp.cumsum(only[::-1])[::-1]  # freed[m]: pages held by nobody before rank m
  cost = jnp.cumsum(need)  # cost[m - 1]: to serve the first m
  m = jnp.sum(runs & (cost <= free + jnp.pad(freed[1:], (0, 1))))
  spent = jnp.where(m > 0, cost[m - 1], 0)
  pauses = spent <= free + jnp.where(m + 1 < S, freed[jnp.minimum(m + 1, S - 1)], 0)
  order = jnp.arange(S)
  return runs & (order < m), runs & (order < m + pauses)


def stored(state: State) -> jax.Array:
  """Tokens of each request whose K and V are in host memory, i32[R]."""
  return jnp.zeros_like(state.arrival) if state.host is None else state.host.seq_lens


def nothing(state: State) -> PageCopies | None:
  """No copies at all, [S, P]; None where there is no host memory."""
  if state.host is None:
    return None
  return PageCopies(src=jnp.full(state.table.pages.shape, NO_PAGE), dst=jnp.full(state.table.pages.shape, NO_PAGE))


def swap_out(state: State, victims: jax.Array, preemption: Preemption) -> tuple[State, PageCopies | None]:
  """Grants host pages to those victims (bool[S]) that are to be swapped, as far as there are any.

  Returns:
    state: with the host pages taken; the victims still hold theirs.
    copies: [S, P], from the pool into host memory; None where there is none.
  """
  if state.host is None:
    return state, None
  host, copies = lax.cond(
    jnp.any(victims),
    lambda: _out(state, victims, preemption),
    lambda: (state.host, nothing(state)),
  )
  return dataclasses.replace(state, host=host), copies


def _out(state: State, victims: jax.Array, preemption: Preemption):
  host, table = state.host, state.table
  assert host is not None
  R = state.arrival.size
  held = jnp.sum(table.pages >= 0, axis=1)
  row = jnp.where(victims & preemption(table.seq_lens, held), state.running, R)  # i32[S]
  gone = (table.held - held) * table.page_size  # tokens behind a window
  begun = dataclasses.replace(host, seq_lens=host.seq_lens.at[row].set(gone, mode="drop"))
  lens = jnp.zeros(R, jnp.int32).at[row].set(table.seq_lens - gone, mode="drop")
  new, _, granted = page_table.extend(begun, lens)
  new = dataclasses.replace(new, seq_lens=jnp.where(granted, new.seq_lens, host.seq_lens))
  row = jnp.where(granted.at[row].get(mode="fill", fill_value=False), row, R)
  dst = new.pages.at[row].get(mode="fill", fill_value=NO_PAGE)
  return new, PageCopies(src=jnp.where(dst >= 0, table.pages, NO_PAGE), dst=dst)


def swap_in(
  state: State, rows: jax.Array, num_tokens: jax.Array, spared: jax.Array | None
) -> tuple[State, PageCopies | None]:
  """Grants pages for what requests bring back, names the copies, and frees the host pages of those that are admitted.

  Args:
    state: whose slots hold what was found of each request.
    rows: i32[S], row of the request admitted to each slot; R for none.
    num_tokens: i32[S], tokens that each brings back after these.
    spared: as for `page_table.extend`, which must have room.

  Returns:
    state: with the pages granted.
    copies: [S, P], from host memory into the pool; None where there is none.
  """
  host, before = state.host, state.table
  if host is None:
    return state, None

  def bring():
    table, _, _ = page_table.extend(before, num_tokens, spared=spared)
    place = jnp.arange(table.pages_per_slot)
    new = (place >= before.held[:, None]) & (place < table.held[:, None])
    src = jnp.where(new, host.pages.at[rows].get(mode="fill", fill_value=NO_PAGE), NO_PAGE)
    return table, PageCopies(src=src, dst=jnp.where(new, table.pages, NO_PAGE))

  table, copies = lax.cond(jnp.any(num_tokens > 0), bring, lambda: (before, nothing(state)))
  back = jnp.zeros(state.arrival.size, bool).at[rows].set(True, mode="drop")
  return forget(dataclasses.replace(state, table=table), back), copies


def forget(state: State, done: jax.Array) -> State:
  """The state with the host pages of the requests in `done` (bool[R]) free."""
  if state.host is None:
    return state
  host = lax.cond(jnp.any(done & (state.host.seq_lens > 0)), page_table.release, lambda host, _: host, state.host, done)
  return dataclasses.replace(state, host=host)


def moved(copies: PageCopies | None, like: jax.Array) -> jax.Array:
  """Pages that each slot copies to or from host memory, i32[S]; `like` has that shape."""
  return jnp.zeros_like(like) if copies is None else jnp.sum(copies.dst >= 0, axis=1, dtype=jnp.int32)
