"""The prefix index: scenarios with exact numbers, and a dictionary of token tuples as the oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_flash.cache import page_table, prefix
from paged_flash.cache.page_table import NO_PAGE

PAGE, P, N = 16, 10, 10
extend = jax.jit(page_table.extend)
released = jax.jit(prefix.released)
evict = jax.jit(prefix.evict)


class Pool:
  """One slot per sequence; does by hand what the scheduler does with the index."""

  def __init__(self, num_slots=4, num_pages=N, page_size=PAGE):
    self.table = page_table.init(num_slots=num_slots, pages_per_slot=P, num_pages=num_pages, page_size=page_size)
    self.index = prefix.init(num_pages=num_pages, width=page_size)
    self.match = jax.jit(prefix.match)
    self.put = jax.jit(prefix.add)

  def find(self, tokens, tenant=0):
    """Pages that a sequence starts with, of all its full pages."""
    size = self.table.page_size
    contents = np.zeros((1, P, size), np.int32)
    full = len(tokens) // size
    contents[0, :full] = np.reshape(tokens[: full * size], (full, size))
    pages, hits = self.match(self.index, jnp.asarray(contents), jnp.array([full]), jnp.array([tenant]))
    return pages[0, : int(hits[0])].tolist()

  def start(self, slot, tokens, tenant=0):
    """Puts a sequence into a slot: pages found, the others granted, all full ones taken up. Pages found."""
    size, found = self.table.page_size, self.find(tokens, tenant)
    row = jnp.asarray([found + [NO_PAGE] * (P - len(found))])
    table = page_table.attach(self.table, jnp.array([slot]), row, jnp.array([len(found) * size]))
    wanted = jnp.zeros(table.num_slots, jnp.int32).at[slot].set(len(tokens) - len(found) * size)
    need = int(page_table.need(table, wanted)[0].sum())
    if need > int(table.num_free):
      return None
    self.index = evict(self.index, table, need - jnp.sum((table.ref_counts == 0) & ~self.index.cached))
    self.table, _, granted = extend(table, wanted, spared=self.index.cached)
    assert granted.all()
    self.fill({slot: (tokens, len(found), tenant)})
    return found

  def fill(self, filled):
    """Takes up the full pages of slots, each from a page on, all in one step."""
    size, rows = self.table.page_size, []
    for slot, (tokens, start, tenant) in sorted(filled.items()):
      rows += [(slot, i, tokens[i * size : (i + 1) * size], tenant) for i in range(start, len(tokens) // size)]
    rows += [(self.table.num_slots, 0, [0] * size, 0)] * (3 * P - len(rows))
    slot, depth, contents, tenant = (jnp.asarray(np.array(column, np.int32)) for column in zip(*rows, strict=True))
    self.index, self.table = self.put(self.index, self.table, slot, depth, contents, tenant)
    self.check()

  def release(self, *slots):
    done = jnp.zeros(self.table.num_slots, bool).at[jnp.array(slots)].set(True)
    after = page_table.release(self.table, done)
    freed = released(self.index.freed, self.table, after)
    self.index, self.table = dataclasses.replace(self.index, freed=freed), after
    self.check()

  def check(self):
    page_table.check(self.table)
    prefix.check(self.index, self.table)


def tokens_of(n, seed=0):
  return np.random.default_rng(seed).integers(1, 1000, n).tolist()


COMMON = tokens_of(48)


@pytest.fixture
def two():
  """Scenarios 1 and 2: a prompt of 55 tokens, and another with its first 48."""
  pool = Pool()
  assert pool.start(0, [*COMMON, *tokens_of(7, 1)]) == []
  assert pool.table.pages[0, :4].tolist() == [0, 1, 2, 3]
  assert pool.start(1, [*COMMON, *tokens_of(5, 2)]) == [0, 1, 2]
  return pool


def test_scenario_01_the_first_prompt_of_55_tokens():
  pool = Pool()
  pool.start(0, [*COMMON, *tokens_of(7, 1)])
  assert pool.table.ref_counts.tolist() == [1] * 4 + [0] * 6
  assert np.flatnonzero(pool.index.cached).tolist() == [0, 1, 2]
  assert pool.index.before[:3].tolist() == [-2, 0, 1]


def test_scenario_02_a_prefix_is_hit(two):
  assert two.table.ref_counts.tolist() == [2, 2, 2, 1, 1, 0, 0, 0, 0, 0]
  assert int(two.table.num_free) == 5


def test_scenario_03_and_05_order_of_reuse_and_eviction(two):
  two.release(0, 1)
  assert int(two.table.num_free) == 10
  order = []
  for i in range(10):  # a page at a time
    pool = two
    before = np.asarray(pool.index.cached)
    need = jnp.int32(1) - jnp.sum((pool.table.ref_counts == 0) & ~pool.index.cached)
    pool.index = evict(pool.index, pool.table, need)
    gone = np.flatnonzero(before & ~np.asarray(pool.index.cached))
    assert gone.size == (i >= 7)  # nothing cached is given up while other pages are free
    held = pool.table.ref_counts
    wanted = jnp.zeros(4, jnp.int32).at[i // P + 2].set(PAGE)
    pool.table, _, granted = extend(pool.table, wanted, spared=pool.index.cached)
    assert granted.all()
    order += np.flatnonzero(np.asarray(pool.table.ref_counts) > np.asarray(held)).tolist()
    pool.check()
  assert order == [3, 4, 5, 6, 7, 8, 9, 2, 1, 0]  # without identity, never used, then the tail before the head
  assert two.find(COMMON) == []


def test_scenario_04_a_hit_revives_pages_that_nobody_holds(two):
  two.release(0, 1)
  assert two.start(2, [*COMMON, 5, 6]) == [0, 1, 2]
  assert two.table.ref_counts[:3].tolist() == [1, 1, 1] and int(two.table.num_free) == 10 - 4


def test_scenario_06_a_requests_own_hits_are_not_evicted():
  pool = Pool(num_pages=6)
  other = tokens_of(32, 9)
  pool.start(0, COMMON)
  pool.start(1, other)
  pool.release(0)  # its pages are the first in line
  pool.release(1)
  assert pool.start(2, [*COMMON, *tokens_of(30, 3)]) == [0, 1, 2]  # one page is free; another must be evicted
  assert pool.find(other) == [3]


def test_scenario_07_a_failed_grant_changes_nothing(two):
  before = jax.tree.map(np.array, (two.table, two.index))
  assert two.start(2, [*COMMON, *tokens_of(16 * 6, 3)]) is None  # six pages beside the hits, five are free
  jax.tree.map(np.testing.assert_array_equal, before, (two.table, two.index))


def test_scenario_11_the_same_content_computed_side_by_side_becomes_one_page():
  pool = Pool()
  tokens = tokens_of(40)
  pool.table, _, _ = extend(pool.table, jnp.array([40, 40, 40, 0]))
  assert int(pool.table.num_free) == 1
  pool.fill({0: (tokens, 0, 0), 1: (tokens, 0, 0), 2: ([*tokens[:16], *tokens_of(24, 8)], 0, 0)})
  assert pool.table.pages[:3, 0].tolist() == [0, 0, 0] and pool.table.pages[:2, 1].tolist() == [1, 1]
  assert pool.table.pages[2, 1] not in (1, NO_PAGE) and int(pool.table.num_free) == 10 - 1 - 2 - 3
  pool.release(0)
  assert pool.find(tokens) == [0, 1]


def test_scenario_12_identity_is_exact():
  pool = Pool()
  pool.start(0, COMMON, tenant=1)
  assert pool.find(COMMON, tenant=0) == [] and pool.find(COMMON, tenant=1) == [0, 1, 2]
  assert pool.find(COMMON[16:], tenant=1) == []  # the same tokens at another depth
  pool.start(1, COMMON, tenant=0)
  assert pool.find(COMMON, tenant=0) == [3, 4, 5]


def test_scenario_12_a_forced_collision_never_serves_foreign_content(monkeypatch):
  def same_for_all(contents, depth):  # a hash that sees nothing but the depth
    return jnp.broadcast_to((depth + 1).astype(jnp.uint32)[..., None], (*contents.shape[:-1], 2))

  monkeypatch.setattr(prefix, "_terms", same_for_all)
  pool = Pool(page_size=8)  # a size of its own: what other tests compiled must not serve here
  first, second = tokens_of(40, 1), tokens_of(40, 2)
  pool.start(0, first)
  pool.start(1, second)
  assert pool.find(first) == [0, 1, 2, 3, 4]
  assert pool.find(second) == [] and pool.find([*first[:16], *second[16:]]) == [0, 1]


def test_scenario_12_identities_are_those_of_every_process():
  pool = Pool()
  pool.start(0, list(range(1, 33)), tenant=3)
  assert pool.index.keys[:2].tolist() == [[2412702722, 282252500], [1481449647, 1576267184]]


def test_scenario_19_a_query_that_diverges_inside_a_page_matches_up_to_it():
  pool = Pool()
  pool.start(0, COMMON, tenant=1)
  before = jax.tree.map(np.array, pool.index)
  assert pool.find([*COMMON[:20], *tokens_of(28, 5)], tenant=1) == [0]
  assert pool.find(COMMON[:15], tenant=1) == pool.find([], tenant=1) == []
  jax.tree.map(np.testing.assert_array_equal, before, pool.index)  # there is no node to be split by a look

  def evictable():
    return np.flatnonzero(pool.index.cached & (pool.table.ref_counts == 0)).tolist()

  assert pool.start(1, [*COMMON[:32], *tokens_of(16, 6)], tenant=1) == [0, 1]  # another branch
  assert evictable() == []
  pool.release(0)
  assert evictable() == [2]  # what the other branch stands on is held
  assert int(pool.index.cached.sum()) == len(evictable()) + int((pool.table.ref_counts > 0).sum())
  pool.index = evict(pool.index, pool.table, 9)
  pool.check()
  assert pool.find(COMMON, tenant=1) == [0, 1] and pool.find(COMMON, tenant=0) == []
  pool.release(1)
  assert evictable() == [0, 1, 3]
  pool.index = evict(pool.index, pool.table, 1)
  assert evictable() == [0, 1]  # the leaf first


@pytest.mark.parametrize("seed", range(3))
def test_the_index_against_a_dictionary(seed):
  """Starts and releases on a starved pool: what is found is what a dictionary over token tuples says, page by page."""
  rng = np.random.default_rng(seed)
  pool = Pool(num_slots=4, num_pages=9, page_size=2)
  held, hits, evicted = {}, 0, 0

  @functools.cache
  def sentence(i):  # few words, so that sequences share beginnings
    return rng.integers(1, 3, rng.integers(2, 12)).tolist()

  for _ in range(120):
    slot = int(rng.integers(4))
    if slot in held:
      pool.release(slot)
      del held[slot]
      continue
    tokens, tenant = sentence(int(rng.integers(12))), int(rng.integers(2))
    cached = np.asarray(pool.index.cached)
    names = {}  # what each indexed page holds, from the tenant on
    for page in np.flatnonzero(cached):
      chain, at = [], page
      while at >= 0:
        chain, at = [tuple(np.asarray(pool.index.contents[at]).tolist()), *chain], int(pool.index.before[at])
      names[(-2 - at, *chain)] = int(page)
    wanted = []
    for i in range(len(tokens) // 2):
      key = (tenant, *(tuple(tokens[2 * j : 2 * j + 2]) for j in range(i + 1)))
      if key not in names:
        break
      wanted.append(names[key])
    assert pool.find(tokens, tenant) == wanted
    found = pool.start(slot, tokens, tenant)
    if found is not None:
      assert found == wanted
      held[slot] = tokens
      hits += len(found)
      evicted += int((cached & ~np.asarray(pool.index.cached)).sum())
  assert hits > 10 and evicted > 10


def test_stamps_are_numbered_anew_before_they_overflow():
  pool = Pool()
  pool.start(0, COMMON)
  pool.index = dataclasses.replace(pool.index, freed=pool.index.freed.at[9].set(prefix._RENUMBER - 1))
  pool.release(0)
  assert int(pool.index.freed.max()) <= N
  assert pool.index.freed[2] < pool.index.freed[1] < pool.index.freed[0]


def test_shared_prefixes_are_those_of_a_tree():
  """Against each pair's common pages, counted: whoever shares most of its pages with anyone has a leader that does."""
  rng = np.random.default_rng(0)
  find = jax.jit(prefix.shared_prefixes, static_argnums=2)
  for _ in range(30):
    B, P, page_size = 9, 21, 4
    pages = np.arange(B * P, dtype=np.int32).reshape(B, P)
    for b in range(1, B):  # a tree: each begins like one before it
      common = rng.choice([0, 1, 2, 7, 8, 20])
      pages[b, :common] = pages[rng.integers(b), :common]
    lens = rng.integers(0, P * page_size + 1, B).astype(np.int32)
    full = lens // page_size
    pages[np.arange(P) >= -(-lens // page_size)[:, None]] = NO_PAGE
    same = np.cumprod(pages[:, None] == pages, axis=2).sum(2)
    common = np.minimum(same, np.minimum(full[:, None], full))  # i64[B, B]
    leaders, counts = map(np.asarray, find(pages, lens, page_size))
    for b in range(B):
      if (leader := leaders[b]) != b:
        most = max(common[b, other] for other in range(B) if other != b)
        assert counts[b] == common[b, leader] and counts[b] >= 1 << (int(most).bit_length() - 1) >= 1
      else:
        assert counts[b] == max((common[b, f] for f in range(B) if leaders[f] == b and f != b), default=0)
    alone = [b for b in range(B) if counts[b] == 0]
    for b in alone:  # nobody is left out whom another, left out too, begins like
      assert all(common[b, other] == 0 for other in alone if other != b)
