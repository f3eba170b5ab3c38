"""Who already holds this prefix: an index over all full pages of the pool, as arrays.

A full page has an identity: the page before it and its tokens. The index holds one page for each identity, whether a
slot holds it or nobody does, so that any later request that starts the same way finds it. A page that nobody holds
stays findable until its bytes are needed; then the one released longest ago goes first, and of those released
together the tail of a sequence before its head, so that what is indexed always hangs together.

Pages are found by a hash of all tokens up to their end, and believed only when their tokens are those wanted and the
page before them is the very page found there: no collision can serve foreign content. Each tenant starts chains of its
own, so that nothing is shared between tenants.

Where tokens see a window only, a sequence holds the pages of its last window; those before it stay in the index until
their bytes are needed. A match compares all tokens from the first on, so it believes a page only as long as every page
before it is in the index: when one is evicted, all that hangs on it is forgotten, held or not.

B prompts, N pages, P pages per prompt, F pages that a step fills, w values that describe a page: its tokens, or, where
a simulation has none, one number that stands for them. Sources: hash chains over pages, vLLM's automatic prefix
caching; reuse after the end and eviction from the tail, Zheng et al. 2024 (RadixAttention).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paged_flash.cache.page_table import NO_PAGE, PageTable, count_true, recounted

ABSENT = -1  # as `before`: the page is not in the index
_WAYS = 16  # pages that one bucket can name, where two fall to it at most on average: overflow is a curiosity
_BASES = np.array([0x01000193, 0x9E3779B1], np.uint32)  # odd, so that their powers never vanish
_RENUMBER = 2**30
_FEW = 64  # pages that a step fills, in most steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixIndex:
  """Which page holds which content after which prefix."""

  contents: jax.Array  # i32[N, w]  of each page in the index
  before: jax.Array  # i32[N]  the page before it; -2 - tenant for the first of a sequence; ABSENT
  keys: jax.Array  # u32[N, 2]  hash of everything up to the page's end
  freed: jax.Array  # i32[N]  when nobody holds the page: its place in the order of eviction, smallest first
  buckets: jax.Array  # i32[M, W]  pages by hash: a hint, true only where the page's own key agrees

  @property
  def cached(self) -> jax.Array:  # bool[N]
    """Pages in the index."""
    return self.before != ABSENT


def init(*, num_pages: int, width: int) -> PrefixIndex:
  """An empty index of pages that `width` numbers describe.

  Example:
    >>> int(init(num_pages=32, width=16).cached.sum())
    0
  """
  num_buckets = 1 << max(num_pages // 2 - 1, 0).bit_length()
  return PrefixIndex(
    contents=jnp.zeros((num_pages, width), jnp.int32),
    before=jnp.full(num_pages, ABSENT, jnp.int32),
    keys=jnp.zeros((num_pages, 2), jnp.uint32),
    freed=jnp.zeros(num_pages, jnp.int32),
    buckets=jnp.full((num_buckets, _WAYS), NO_PAGE, jnp.int32),
  )


def match(index: PrefixIndex, contents: jax.Array, limit: jax.Array, tenant: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The indexed pages that each prompt starts with.

  Args:
    index: where to look.
    contents: i32[B, P, w] of the prompts, page by page.
    limit: i32[B], pages to match at most: those that are full and wanted.
    tenant: i32[B], whose pages.

  Returns:
    pages: i32[B, P], NO_PAGE past the match.
    hits: i32[B], pages matched.
  """
  depth = jnp.arange(contents.shape[1])
  keys = _seed(tenant)[:, None] + jnp.cumsum(_terms(contents, depth), axis=1)  # u32[B, P, 2]
  page = _find(index, keys)
  before = jnp.concatenate([root(tenant)[:, None], page[:, :-1]], axis=1)
  same = (page >= 0) & (depth < limit[:, None]) & (index.before[page] == before)
  same &= jnp.all(index.contents[page] == contents, axis=-1)
  hits = jnp.sum(jnp.cumprod(same, axis=1), axis=1)  # i32[B]
  return jnp.where(depth < hits[:, None], page, NO_PAGE), hits


def add(
  index: PrefixIndex, table: PageTable, slot: jax.Array, depth: jax.Array, contents: jax.Array, tenant: jax.Array
) -> tuple[PrefixIndex, PageTable]:
  """Takes up pages that were filled. A page whose identity is there already gives way to the one that is.

  Args:
    index: the index.
    table: whose slots hold the pages.
    slot: i32[F], slots in order; the number of slots or more for no page.
    depth: i32[F], place of the page in its slot; the pages that one slot filled stand together, in order.
    contents: i32[F, w].
    tenant: i32[F].

  Returns:
    index: with the new identities.
    table: with one page for each identity; second copies are free.
  """
  N, F = table.num_pages, slot.size

  def first(n):  # the first n pages: most steps fill few
    if not n:
      return jnp.full((6, F), NO_PAGE)
    part = _identities(index, table, slot[:n], depth[:n], contents[:n], tenant[:n])
    return jnp.pad(part, ((0, 0), (0, F - n)), constant_values=NO_PAGE)

  # One small array goes through the conditional: XLA copies what does, and a GPU writes each array by another kernel.
  sizes = sorted({0, min(_FEW, F), F})
  which = sum((slot[n] < table.num_slots).astype(jnp.int32) for n in sizes[:-1])
  new, place, before, *keys, canon = lax.switch(which, [functools.partial(first, n) for n in sizes])
  page = table.pages[jnp.minimum(slot, table.num_slots - 1), depth]
  at = jnp.where(new >= 0, new, N)
  index = dataclasses.replace(
    index,
    contents=index.contents.at[at].set(contents, mode="drop"),
    before=index.before.at[at].set(before, mode="drop"),
    keys=index.keys.at[at].set(jnp.stack(keys, axis=1).astype(jnp.uint32), mode="drop"),
    buckets=index.buckets.at[jnp.where(new >= 0, place // _WAYS, len(index.buckets)), place % _WAYS].set(
      new, mode="drop"
    ),
  )
  moves = canon >= 0
  ref_counts = recounted(table, gained=jnp.where(moves, canon, N), lost=jnp.where(moves, page, N))
  pages = table.pages.at[jnp.where(moves, slot, table.num_slots), depth].set(canon, mode="drop")
  return index, dataclasses.replace(table, pages=pages, ref_counts=ref_counts)


def _identities(
  index: PrefixIndex, table: PageTable, slot: jax.Array, depth: jax.Array, contents: jax.Array, tenant: jax.Array
) -> jax.Array:
  """i32[6, F], of filled pages (see `add`): the page if its identity is new, place in the buckets, page before it, hash
  (2), and the other page that has its identity already; NO_PAGE for none."""
  F = slot.size
  k = jnp.arange(F)
  at = jnp.minimum(slot, table.num_slots - 1)
  page = table.pages[at, depth]
  follows = (slot == jnp.roll(slot, 1)) & (k > 0)  # on the page filled just before it in this list
  first = lax.cummax(jnp.where(follows, 0, k))  # i32[F]  where the slot's run begins
  base = jnp.where(depth > 0, table.pages[at, depth - 1], root(tenant))[first]
  there = (slot < table.num_slots) & ((base < 0) | index.cached[base])  # hangs on something indexed

  terms = _terms(contents, depth)
  sums = jnp.cumsum(terms, axis=0)  # u32[F, 2], wraps
  keys = sums - (sums - terms)[first] + jnp.where((base < 0)[:, None], _seed(tenant), index.keys[base])
  found = jnp.where(there, _find(index, keys), NO_PAGE)
  equal = jnp.all(keys[:, None] == keys[None], axis=-1) & there  # bool[F, F]
  leader = jnp.min(jnp.where(equal, k, F - 1), axis=1)  # the first in the list with this hash
  canon = jnp.where(found >= 0, found, page[leader])
  before = jnp.where(follows, jnp.roll(canon, 1), base)
  is_new = there & (found < 0) & (leader == k)

  bucket = _bucket(index, keys)
  rank = count_true((bucket[:, None] == bucket) & is_new & (k < k[:, None]))  # among the new of its bucket
  names = index.buckets[bucket]  # i32[F, W]
  vacant = (names < 0) | ~index.cached[names] | (_bucket(index, index.keys[names]) != bucket[:, None])
  place = vacant & (jnp.cumsum(vacant, axis=1) - 1 == rank[:, None])
  fits = jnp.any(place, axis=1)

  # All hashes are what they seem and all places are found, or nothing is taken up in this step.
  same = jnp.where(
    found >= 0,
    (index.before[found] == before) & jnp.all(index.contents[found] == contents, axis=1),
    (before[leader] == before) & jnp.all(contents[leader] == contents, axis=1) & fits[leader],
  )
  ok = there & ~jnp.any(there & ~same)
  new = jnp.where(ok & is_new, page, NO_PAGE)
  at = bucket * _WAYS + jnp.argmax(place, axis=1).astype(jnp.int32)
  return jnp.stack([new, at, before, *keys.T.astype(jnp.int32), jnp.where(ok & (canon != page), canon, NO_PAGE)])


def released(freed: jax.Array, before: PageTable, after: PageTable) -> jax.Array:
  """Queues the pages that nobody holds any more for eviction: behind all others, and the tail before the head.

  Args:
    freed: i32[N], of the index.
    before, after: the table on both sides of a release.

  Returns:
    i32[N], the new `freed`.
  """
  N, P = after.num_pages, after.pages_per_slot
  held = jnp.where(before.pages >= 0, before.pages, 0)
  gone = (before.pages >= 0) & (after.ref_counts[held] == 0)  # bool[S, P]
  order = jnp.cumsum(gone[:, ::-1].T.reshape(-1)).reshape(P, -1).T[:, ::-1]  # i32[S, P]  1, 2, ... from the tails
  freed = freed.at[jnp.where(gone, before.pages, N)].max(jnp.max(freed) + order, mode="drop")
  return lax.cond(
    jnp.max(freed) > _RENUMBER, lambda f: jnp.argsort(jnp.argsort(f)).astype(jnp.int32), lambda f: f, freed
  )


def evict(index: PrefixIndex, table: PageTable, count: jax.Array) -> PrefixIndex:
  """Forgets `count` (i32[]) indexed pages that nobody holds, the longest free first; all if there are fewer.

  Behind a window the head of a sequence is let go before its tail: what hangs on a forgotten page is forgotten too.
  """
  last = jnp.iinfo(jnp.int32).max

  def forget():
    freed = jnp.where(index.cached & (table.ref_counts == 0), index.freed, last)

    # The least bound with `count` pages below it, from below: no two pages share a place, so it is never leapt over.
    def more(carry):
      bound, below = carry
      return (below < count) & (bound < last)

    def raise_bound(carry):
      bound, below = carry
      least = jnp.min(jnp.where(freed >= bound, freed, last))
      bound = jnp.where(least == last, last, least + count - below)
      return bound, count_true(freed < bound)

    bound, _ = lax.while_loop(more, raise_bound, (jnp.int32(0), jnp.int32(0)))
    forgotten = freed < bound
    if table.window is not None:
      forgotten = _with_what_hangs_on(index, forgotten)
    return jnp.where(forgotten, ABSENT, index.before)

  return dataclasses.replace(index, before=lax.cond(count > 0, forget, lambda: index.before))


def _with_what_hangs_on(index: PrefixIndex, pages: jax.Array) -> jax.Array:
  """bool[N]: `pages` (bool[N]), and those with one of them among all that come before."""
  before = jnp.where(index.before >= 0, index.before, jnp.arange(pages.size))  # the first of a sequence: itself

  def leap(carry):
    pages, before, _ = carry
    more = pages | pages[before]
    return more, before[before], jnp.any(before[before] != before)

  return lax.while_loop(lambda carry: carry[2], leap, (pages, before, jnp.bool(True)))[0]


def check(index: PrefixIndex, table: PageTable) -> None:
  """Recomputes what must hold between a concrete index and its table; for tests and `Engine(debug=True)`.

  Raises:
    AssertionError: a page hangs on nothing, can be found twice or not at all, or would be evicted before its tail.
  """
  before, freed, refs = np.asarray(index.before), np.asarray(index.freed), np.asarray(table.ref_counts)
  contents = np.asarray(index.contents)
  cached = np.flatnonzero(before != ABSENT)
  identities = {(before[page], contents[page].tobytes()) for page in cached}
  if len(identities) < cached.size:
    raise AssertionError("two pages of the index have one identity")
  for page in cached:
    if (parent := before[page]) >= 0:
      if before[parent] == ABSENT:
        raise AssertionError(f"page {page} hangs on page {parent}, which is not in the index")
      if table.window is not None:
        continue  # a sequence holds its last pages only, and let the others go before them
      if refs[page] > refs[parent]:
        raise AssertionError(f"page {page} is held {refs[page]} times, the page before it {refs[parent]} times")
      if refs[parent] == 0 and freed[page] >= freed[parent]:
        raise AssertionError(f"page {page} would be evicted after page {parent}, which it hangs on")
  found = np.asarray(_jitted_find(index, index.keys))[cached]
  if (found != cached).any():
    raise AssertionError(f"pages {cached[found != cached].tolist()} cannot be found by their keys")


def root(tenant: jax.Array) -> jax.Array:
  """What stands before the first page of a tenant's sequences."""
  return -2 - tenant


def _seed(tenant: jax.Array) -> jax.Array:
  """The hash of nothing, u32[B, 2], of each tenant's own."""
  return tenant.astype(jnp.uint32)[:, None] * _BASES


def _terms(contents: jax.Array, depth: jax.Array) -> jax.Array:
  """What each page (i32[..., w]) adds to the hash of its prefix: u32[..., 2]."""
  values = contents.astype(jnp.uint32) + jnp.uint32(1)
  powers = np.cumprod(np.full((contents.shape[-1], 2), _BASES), axis=0, dtype=np.uint32)
  mixed = jnp.sum(values[..., None] * powers, axis=-2, dtype=jnp.uint32)
  mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D)
  mixed = (mixed ^ (mixed >> 12)) * jnp.uint32(0x297A2D39)
  turns = (2 * depth + 1).astype(jnp.uint32) * jnp.uint32(0x85EBCA6B)  # odd for every depth
  return (mixed ^ (mixed >> 15)) * turns[..., None]


def _bucket(index: PrefixIndex, keys: jax.Array) -> jax.Array:
  return (keys[..., 0] % jnp.uint32(len(index.buckets))).astype(jnp.int32)


def _find(index: PrefixIndex, keys: jax.Array) -> jax.Array:
  """A page with this hash (u32[..., 2]), NO_PAGE where the index has none."""
  names = index.buckets[_bucket(index, keys)]  # i32[..., W]
  fits = (names >= 0) & index.cached[names] & jnp.all(index.keys[names] == keys[..., None, :], axis=-1)
  return jnp.max(jnp.where(fits, names, NO_PAGE), axis=-1)


_jitted_find = jax.jit(_find)


def shared_prefixes(pages: jax.Array, kv_lens: jax.Array, page_size: int) -> tuple[jax.Array, jax.Array]:
  """Which sequences begin with the same pages: what `paged_attention` takes as `shared_prefixes`.

  A sequence's leader is the first of those that hold the same page at place 0, 1, 3, 7, ...: of the last of these
  places where any other sequence does. A leader shares with itself as much as the others share with it at most.

  Args:
    pages: i32[B, P], page ids of each sequence in order.
    kv_lens: i32[B], tokens of each.
    page_size: of the pages.

  Returns:
    (leaders i32[B], num_pages i32[B]): how many full pages at its start each sequence has in common with its leader.

  Example:
    >>> pages = jnp.array([[4, 2, 6], [7, 1, 3], [4, 2, 5]])
    >>> leaders, num_pages = shared_prefixes(pages, jnp.array([40, 48, 33]), page_size=16)
    >>> leaders.tolist(), num_pages.tolist()
    ([0, 1, 0], [2, 0, 2])
  """
  (B, P), index = pages.shape, jnp.arange(len(pages), dtype=jnp.int32)
  full = jnp.minimum(kv_lens // page_size, P)
  place = (1 << np.arange(P.bit_length())) - 1
  page = jnp.where((full[:, None] > place) & (pages[:, place] >= 0), pages[:, place], -1 - index[:, None])
  same = page[:, None] == page  # bool[B, B, places]
  first = jnp.min(jnp.where(same, index[:, None], B), 1)  # i32[B, places]
  is_shared = first < jnp.max(jnp.where(same, index[:, None], -1), 1)
  deepest = jnp.max(jnp.where(is_shared, np.arange(place.size, dtype=np.int32) * B + first, -1), 1)
  leaders = jnp.where(deepest < 0, index, deepest % B)
  is_same = (pages == pages[leaders]) & (jnp.arange(P) < jnp.minimum(full, full[leaders])[:, None])
  count = jnp.min(jnp.where(is_same, P, jnp.arange(P, dtype=jnp.int32)), 1)
  follows = (leaders == index[:, None]) & (index != index[:, None])  # bool[B, B], of each its followers
  return leaders, jnp.where(leaders == index, jnp.max(jnp.where(follows, count, 0), 1), count)
