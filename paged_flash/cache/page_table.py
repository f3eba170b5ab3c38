"""The page table: which pages of the KV pool hold which sequence.

S slots, P pages per slot, N pages in the pool. A slot is a row of the running batch; the sequence in it is a list of
`page_size`-token pages, in order, of which only the last may be part full. A table is an immutable value of a few
kilobytes: every function takes one and returns another, the old one stays good, and all of them run inside `jit`,
`vmap` and `scan` with shapes that never change.

Where tokens see a window of the past only, the pages wholly behind it can be let go (`trim`): the sequence keeps its
length, and the places of these pages, at its start, become NO_PAGE.

Source: Kwon et al. 2023, section 4 ("block table" there, page table here; their block is our page).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NO_PAGE = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PageTable:
  """Who holds which page. A page is free exactly when its ref count is 0; nothing else is stored."""

  pages: jax.Array  # i32[S, P]  page at each place of the sequence, NO_PAGE past its end and where let go (`trim`)
  seq_lens: jax.Array  # i32[S]  tokens held by each slot
  ref_counts: jax.Array  # i32[N]  slots that hold each page
  page_size: int = dataclasses.field(metadata=dict(static=True))
  window: int | None = dataclasses.field(default=None, metadata=dict(static=True))  # tokens that each sees

  @property
  def num_slots(self) -> int:
    return self.pages.shape[0]

  @property
  def pages_per_slot(self) -> int:
    return self.pages.shape[1]

  @property
  def num_pages(self) -> int:
    return self.ref_counts.shape[0]

  @property
  def held(self) -> jax.Array:  # i32[S]
    """Pages that the tokens of each slot fill: all that it holds, and those let go behind a window."""
    return cdiv(self.seq_lens, self.page_size)

  @property
  def num_free(self) -> jax.Array:  # i32[]
    """Pages nobody holds."""
    return count_true(self.ref_counts == 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PageCopies:
  """Pages to copy before the next write: `src[i]` into `dst[i]`; NO_PAGE where there is nothing to do."""

  src: jax.Array  # i32[S]
  dst: jax.Array  # i32[S]


def init(
  *, num_slots: int, pages_per_slot: int, num_pages: int, page_size: int, window: int | None = None
) -> PageTable:
  """An empty table: every slot empty, every page free.

  Args:
    num_slots: rows of the running batch, S.
    pages_per_slot: pages that one sequence may hold, P.
    num_pages: pages in the pool, N.
    page_size: tokens per page.
    window: tokens that each token sees, itself included; None for all before it.

  Raises:
    ValueError: a size below 1.

  Example:
    >>> table = init(num_slots=4, pages_per_slot=8, num_pages=32, page_size=16)
    >>> int(table.num_free)
    32
  """
  sizes = dict(num_slots=num_slots, pages_per_slot=pages_per_slot, num_pages=num_pages, page_size=page_size)
  for name, size in (sizes | dict(window=window)).items():
    if size is not None and size < 1:
      raise ValueError(f"{name} must be at least 1, got {size}")
  return PageTable(
    pages=jnp.full((num_slots, pages_per_slot), NO_PAGE, jnp.int32),
    seq_lens=jnp.zeros(num_slots, jnp.int32),
    ref_counts=jnp.zeros(num_pages, jnp.int32),
    page_size=page_size,
    window=window,
  )


def first_seen(table: PageTable, num_tokens: Any) -> jax.Array:
  """Place of the first page that a token after `num_tokens` (i32, any shape) of a sequence can see.

  The page before the one that is written next counts as seen, however short the window: an index of prefixes hangs what
  is filled on it.
  """
  if table.window is None:
    return jnp.zeros_like(num_tokens)
  return jnp.maximum(num_tokens - max(table.window, table.page_size + 1) + 1, 0) // table.page_size


def window_pages(window: int, num_tokens: int, page_size: int) -> int:
  """Pages that a sequence of any length holds at most while it computes `num_tokens` at a time.

  Example:
    >>> window_pages(4096, 256, 16)  # 4351 tokens that may begin anywhere in a page
    273
  """
  return cdiv(max(window, page_size + 1) + num_tokens - 2, page_size) + 1


def need(table: PageTable, num_tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Free pages that each slot would take to hold `num_tokens` (i32[S]) more tokens.

  Returns:
    pages: i32[S], the copy of a shared last page included.
    copies: bool[S], whether the slot's part-full last page is shared and must be copied before the write.
  """
  partial = (num_tokens > 0) & (table.seq_lens % table.page_size > 0)
  copies = partial & (table.ref_counts[_last_page(table)] > 1)
  return cdiv(table.seq_lens + num_tokens, table.page_size) - table.held + copies, copies


def extend(
  table: PageTable, num_tokens: jax.Array, *, max_pages: int | None = None, spared: jax.Array | None = None
) -> tuple[PageTable, PageCopies, jax.Array]:
  """Makes room for `num_tokens` (i32[S]) more tokens in each slot, granting pages on demand.

  A page with a ref count above 1 is never written: a slot about to write into one gets a page of its own, and the
  copy to make first is named in the answer (copy-on-write). Slots that need no page are always granted. The others
  are served in order, and from the first one that the pool cannot serve on, all are refused. A refused slot is left
  exactly as it was.

  Args:
    table: the table; stays good.
    num_tokens: i32[S], zero or more for each slot.
    max_pages: pages that this call may grant at most; the cost grows with it. None for the whole pool.
    spared: bool[N], pages not to grant although nobody holds them.

  Returns:
    table: the new table.
    copies: the page copies to do before anything is written.
    granted: bool[S]; False where the tokens do not fit the slot or the pool, or `num_tokens` is negative.

  Example:
    >>> table = init(num_slots=2, pages_per_slot=8, num_pages=32, page_size=16)
    >>> table, copies, granted = extend(table, jnp.array([20, 5]))
    >>> table.pages[:, :3].tolist(), granted.tolist()
    ([[0, 1, -1], [2, -1, -1]], [True, True])
  """
  S, P = table.pages.shape
  bound = min(S * P, table.num_pages)
  M = bound if max_pages is None else min(max_pages, bound)
  wanted, copies = need(table, num_tokens)  # i32[S], bool[S]
  fits = (num_tokens >= 0) & (table.seq_lens + num_tokens <= P * table.page_size)
  wanted = jnp.where(fits, wanted, 0)
  free = table.ref_counts == 0 if spared is None else (table.ref_counts == 0) & ~spared
  end = jnp.cumsum(wanted)  # i32[S]
  granted = fits & ((wanted == 0) | (end <= jnp.minimum(count_true(free), M)))
  copies &= granted

  # The k-th page wanted is the k-th free page.
  k = jnp.arange(M)
  slot = count_upto(end, k)  # i32[M]  who wants the k-th page; S when nobody
  position = (table.held - copies - end + wanted)[slot] + k  # i32[M]
  page = jnp.where((slot < S) & granted[slot], _first(free, M), table.num_pages)
  pages = table.pages.at[jnp.where(page < table.num_pages, slot, S), position].set(page, mode="drop")

  old_last = _last_page(table)
  ref_counts = recounted(table, gained=page, lost=_masked(old_last, copies, table))
  new_last = pages[jnp.arange(S), jnp.maximum(table.held - 1, 0)]
  new_table = dataclasses.replace(
    table, pages=pages, seq_lens=table.seq_lens + jnp.where(granted, num_tokens, 0), ref_counts=ref_counts
  )
  page_copies = PageCopies(src=jnp.where(copies, old_last, NO_PAGE), dst=jnp.where(copies, new_last, NO_PAGE))
  return new_table, page_copies, granted


def fork(
  table: PageTable, parent: jax.Array | int, child: jax.Array | int, num_tokens: jax.Array | int | None = None
) -> PageTable:
  """Makes slot `child` hold the first `num_tokens` tokens of slot `parent`, sharing the pages.

  What `child` held before is released. Nothing is copied: a shared page is copied when somebody must write it
  (`extend`). A slot may be forked onto itself, which truncates it: the way to take tokens back.

  Args:
    table: the table; stays good.
    parent: i32[] or i32[F], the slots to share from.
    child: i32[] or i32[F], distinct slots to fill; a negative child does nothing.
    num_tokens: i32[] or i32[F], tokens to share, at most what the parent holds; None for all of them.

  Returns:
    The new table.

  Example:
    >>> table, _, _ = extend(init(num_slots=2, pages_per_slot=8, num_pages=32, page_size=16), jnp.array([20, 0]))
    >>> fork(table, parent=0, child=1).ref_counts[:3].tolist()
    [2, 2, 0]
  """
  parent, child = jnp.atleast_1d(jnp.asarray(parent)), jnp.atleast_1d(jnp.asarray(child))  # i32[F]
  lens = table.seq_lens[parent]
  if num_tokens is not None:
    lens = jnp.clip(jnp.asarray(num_tokens), 0, lens)
  return attach(table, child, table.pages[parent], lens)


def attach(table: PageTable, child: jax.Array, pages: jax.Array, num_tokens: jax.Array) -> PageTable:
  """Makes slots hold pages that are there already, as `fork` does, whoever else holds them or nobody.

  Args:
    table: the table; stays good.
    child: i32[F], distinct slots to fill; what they held before is released. A negative child does nothing.
    pages: i32[F, P] pages of each sequence, read as far as its tokens reach.
    num_tokens: i32[F] tokens of each sequence.
  """
  lens = num_tokens
  shared = jnp.arange(table.pages_per_slot) < cdiv(lens, table.page_size)[:, None]  # bool[F, P]
  rows = jnp.where(shared, pages, NO_PAGE)
  used = (child >= 0)[:, None]
  ref_counts = recounted(table, gained=_masked(rows, used, table), lost=_masked(table.pages[child], used, table))
  child = jnp.where(child >= 0, child, table.num_slots)
  return dataclasses.replace(
    table,
    pages=table.pages.at[child].set(rows, mode="drop"),
    seq_lens=table.seq_lens.at[child].set(lens, mode="drop"),
    ref_counts=ref_counts,
  )


def truncate(table: PageTable, seq_lens: jax.Array) -> PageTable:
  """Cuts every slot to `seq_lens` (i32[S]) tokens, at most what it holds; pages past them are let go.

  Example:
    >>> table, _, _ = extend(init(num_slots=2, pages_per_slot=8, num_pages=32, page_size=16), jnp.array([20, 5]))
    >>> int(truncate(table, jnp.array([16, 5])).num_free)
    30
  """
  past = jnp.arange(table.pages_per_slot) >= cdiv(seq_lens, table.page_size)[:, None]  # bool[S, P]
  return dataclasses.replace(_let_go(table, past), seq_lens=seq_lens)


def release(table: PageTable, done: jax.Array) -> PageTable:
  """Empties the slots in `done` (bool[S]); a page that nobody else holds is free at once.

  Example:
    >>> table, _, _ = extend(init(num_slots=2, pages_per_slot=8, num_pages=32, page_size=16), jnp.array([20, 5]))
    >>> int(release(table, jnp.array([True, False])).num_free)
    31
  """
  return truncate(table, jnp.where(done, 0, table.seq_lens))


def trim(table: PageTable) -> PageTable:
  """Lets go of the pages that no later token can see, because they lie wholly behind the window.

  What is let go is not there again when a sequence is truncated: trim when its length is final.

  Example:
    >>> table = init(num_slots=1, pages_per_slot=8, num_pages=32, page_size=4, window=6)
    >>> table, _, _ = extend(table, jnp.array([15]))
    >>> trim(table).pages[0, :5].tolist()  # token 15 sees tokens 10 to 15
    [-1, -1, 2, 3, -1]
  """
  return table if table.window is None else _let_go(table, unseen(table))


def unseen(table: PageTable) -> jax.Array:
  """bool[S, P]: places whose pages `trim` lets go."""
  return (jnp.arange(table.pages_per_slot) < first_seen(table, table.seq_lens)[:, None]) & (table.pages >= 0)


def recounted(table: PageTable, *, gained: jax.Array, lost: jax.Array) -> jax.Array:
  """Ref counts (i32[N]) with a holder more of each page `gained` and one less of each `lost`; N stands for no page."""
  change = np.repeat(np.array([1, -1], np.int32), [gained.size, lost.size])
  return table.ref_counts.at[jnp.concatenate([gained.ravel(), lost.ravel()])].add(change, mode="drop")


def check(table: PageTable) -> None:
  """Recomputes every redundant fact of a concrete table; for tests and `Engine(debug=True)`.

  Raises:
    AssertionError: the pages, lengths and ref counts do not agree; the text says where.
  """
  pages, lens, refs = np.asarray(table.pages), np.asarray(table.seq_lens), np.asarray(table.ref_counts)
  if (lens < 0).any() or (lens > table.pages_per_slot * table.page_size).any():
    raise AssertionError(f"seq_lens outside 0..{table.pages_per_slot * table.page_size}: {lens}")
  place = np.arange(table.pages_per_slot)
  held = place < cdiv(lens, table.page_size)[:, None]
  unseen = place < np.asarray(first_seen(table, lens))[:, None]
  held &= ~(unseen & (np.cumsum(pages != NO_PAGE, axis=1) == 0))  # let go behind the window, from the start on
  if not ((pages[held] >= 0) & (pages[held] < table.num_pages)).all() or (pages[~held] != NO_PAGE).any():
    bad = np.argwhere(np.where(held, (pages < 0) | (pages >= table.num_pages), pages != NO_PAGE))
    raise AssertionError(f"pages do not match seq_lens at (slot, position) {bad.tolist()}")
  counts = np.bincount(pages[held], minlength=table.num_pages)
  if (counts != refs).any():
    bad = np.flatnonzero(counts != refs)
    raise AssertionError(
      f"ref_counts of pages {bad.tolist()} are {refs[bad].tolist()}, held {counts[bad].tolist()} times"
    )
  for slot, row in enumerate(pages):
    owned = row[held[slot]]
    if len(set(owned.tolist())) != len(owned):
      raise AssertionError(f"slot {slot} holds a page twice: {owned.tolist()}")


def cdiv(a, b):
  """Quotient rounded up, for Python ints and arrays."""
  return (a + b - 1) // b


def packed(mask: jax.Array) -> jax.Array:
  """Booleans [..., n] as bits, the first of 32 the lowest: u32[..., W]."""
  bits = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, -mask.shape[-1] % 32)])
  bits = bits.reshape(*mask.shape[:-1], -1, 32).astype(jnp.uint32)
  return jnp.sum(bits << jnp.arange(32, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def count_true(mask: jax.Array) -> jax.Array:
  """How many of the last axis (bool[..., n]) are true, i32[...]: through bits, for a sum is slow on a CPU."""
  return jnp.sum(lax.population_count(packed(mask)).astype(jnp.int32), axis=-1)


def totals(*values: jax.Array) -> list[jax.Array]:
  """The sums of several arrays (bool[n] or i32[n]), i32[] each: by rows of 32, then all in one reduction.

  Example:
    >>> [int(total) for total in totals(jnp.array([True, False, True]), jnp.array([5, 6, 7]))]
    [2, 18]
  """
  rows = [jnp.sum(jnp.pad(v, (0, -v.size % 32)).reshape(-1, 32), axis=1, dtype=jnp.int32) for v in values]
  return lax.reduce(rows, [jnp.int32(0)] * len(rows), lambda a, b: jax.tree.map(jnp.add, a, b), (0,))


def count_upto(ends: jax.Array, k: jax.Array) -> jax.Array:
  """How many of the ascending `ends` (i32[n]) are at most each of `k` (i32[m]): i32[m].

  What `jnp.searchsorted(ends, k, side="right")` answers, by comparing among the last of groups and then inside a group:
  about 2 sqrt(n) comparisons each, side by side.

  Example:
    >>> count_upto(jnp.array([2, 2, 5]), jnp.arange(7)).tolist()
    [0, 0, 2, 2, 2, 3, 3]
  """
  n = ends.size
  width = 1 << ((max(n - 1, 0).bit_length() + 1) // 2)
  groups = jnp.pad(ends, (0, -n % width), constant_values=jnp.iinfo(ends.dtype).max).reshape(-1, width)
  group = jnp.sum(groups[:, -1] <= k[:, None], axis=1, dtype=jnp.int32)
  inside = groups[jnp.minimum(group, len(groups) - 1)] <= k[:, None]  # bool[m, width]
  return jnp.minimum(width * group + jnp.sum(inside, axis=1, dtype=jnp.int32), n)


def _let_go(table: PageTable, places: jax.Array) -> PageTable:
  """The table without the pages at `places` (bool, broadcast to [S, P])."""
  dropped = _masked(table.pages, places, table)
  return dataclasses.replace(
    table,
    pages=jnp.where(places, NO_PAGE, table.pages),
    ref_counts=table.ref_counts.at[dropped].add(-1, mode="drop"),
  )


def _last_page(table: PageTable) -> jax.Array:  # i32[S]
  return table.pages[jnp.arange(table.num_slots), jnp.maximum(table.held - 1, 0)]


def _masked(pages: jax.Array, mask: jax.Array, table: PageTable) -> jax.Array:
  """Page ids where `mask` holds and there is a page, else one past the pool, which scatters drop."""
  return jnp.where(mask & (pages >= 0), pages, table.num_pages)


def _first(free: jax.Array, count: int) -> jax.Array:
  """i32[count]: the pages that are `free` (bool[N]), in order, N past their end.

  Rank and select over a bit vector (Jacobson 1989): 32 pages to a word, a prefix sum over the words' counts, then the
  bit inside the word by halving. A prefix sum over the pool itself is several times slower on a CPU.
  """
  words = packed(free)
  counts = lax.population_count(words).astype(jnp.int32)
  end = jnp.cumsum(counts)  # i32[W]  free pages up to the end of each word
  k = jnp.arange(count)
  word = jnp.minimum(count_upto(end, k), end.size - 1)  # i32[count]
  bits, rest, place = words[word], k - (end - counts)[word], jnp.zeros_like(k)
  for half in (16, 8, 4, 2, 1):  # is the bit that has `rest` others below it in the upper half?
    below = lax.population_count(bits & jnp.uint32((1 << half) - 1)).astype(jnp.int32)
    upper = rest >= below
    bits, rest = jnp.where(upper, bits >> half, bits), jnp.where(upper, rest - below, rest)
    place += jnp.where(upper, half, 0)
  return jnp.where(k < end[-1], word * 32 + place, free.size)
