"""The page table against an oracle that keeps a list per slot and the contents of the pages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from paged_flash.cache import kv_pages, page_table
from paged_flash.cache.page_table import NO_PAGE

extend = jax.jit(page_table.extend, static_argnames="max_pages")
fork = jax.jit(page_table.fork)
release = jax.jit(page_table.release)
need = jax.jit(page_table.need)
write = jax.jit(kv_pages.write, static_argnums=1)
copy = jax.jit(kv_pages.copy)


def table_with(lens, *, num_pages=10, page_size=16, pages_per_slot=8):
  table = page_table.init(num_slots=len(lens), pages_per_slot=pages_per_slot, num_pages=num_pages, page_size=page_size)
  table, _, granted = extend(table, jnp.array(lens))
  assert granted.all()
  return table


def test_pages_are_granted_in_order():
  table = table_with([55, 5])
  assert table.pages[:, :5].tolist() == [[0, 1, 2, 3, NO_PAGE], [4, NO_PAGE, NO_PAGE, NO_PAGE, NO_PAGE]]
  assert table.ref_counts.tolist() == [1] * 5 + [0] * 5
  assert int(table.num_free) == 5


def test_growth_inside_a_part_full_page_grants_nothing():
  table = table_with([20, 0])
  grown, _, granted = extend(table, jnp.array([12, 0]))
  assert granted.all() and grown.seq_lens[0] == 32
  np.testing.assert_array_equal(grown.pages, table.pages)
  grown, _, _ = extend(grown, jnp.array([1, 0]))
  assert int(grown.num_free) == 7


def test_refusal_is_atomic_and_spares_those_who_need_nothing():
  table = table_with([30, 16, 16, 4], num_pages=6)
  grown, copies, granted = extend(table, jnp.array([2, 40, 1, 3]))
  assert granted.tolist() == [True, False, False, True]  # one page is free; slot 1 wants three, slot 2 comes after it
  assert grown.seq_lens.tolist() == [32, 16, 16, 7]
  np.testing.assert_array_equal(grown.pages, table.pages)
  np.testing.assert_array_equal(grown.ref_counts, table.ref_counts)
  assert (copies.dst == NO_PAGE).all()


def test_capacity_of_a_slot():
  table = page_table.init(num_slots=2, pages_per_slot=2, num_pages=9, page_size=4)
  _, _, granted = extend(table, jnp.array([8, 9]))
  assert granted.tolist() == [True, False]
  _, _, granted = extend(table, jnp.array([-1, 0]))
  assert granted.tolist() == [False, True]


def test_max_pages_bounds_a_call():
  table = page_table.init(num_slots=3, pages_per_slot=4, num_pages=12, page_size=4)
  table, _, granted = extend(table, jnp.array([8, 8, 4]), max_pages=3)
  assert granted.tolist() == [True, False, False]
  page_table.check(table)


def test_fork_copies_on_write_only():
  table = fork(table_with([20, 0, 0]), 0, 1)
  assert int(table.num_free) == 8 and table.ref_counts[:2].tolist() == [2, 2]
  table, copies, granted = extend(table, jnp.array([1, 1, 0]))  # both write the shared part-full page: both get a copy
  assert granted.all()
  assert copies.src.tolist() == [1, 1, NO_PAGE] and copies.dst.tolist() == [2, 3, NO_PAGE]
  assert table.pages[:2, :2].tolist() == [[0, 2], [0, 3]]
  assert table.ref_counts[:4].tolist() == [2, 0, 1, 1]
  full = fork(table_with([32, 0]), 0, 1)
  _, copies, _ = extend(full, jnp.array([1, 1]))
  assert (copies.dst == NO_PAGE).all()  # nothing to copy at a page boundary


def test_fork_of_a_part_and_truncation():
  table = fork(table_with([50, 0]), parent=0, child=1, num_tokens=20)
  assert table.seq_lens.tolist() == [50, 20] and table.ref_counts[:4].tolist() == [2, 2, 1, 1]
  shorter = fork(table, parent=0, child=0, num_tokens=5)
  assert shorter.seq_lens.tolist() == [5, 20] and shorter.ref_counts[:4].tolist() == [2, 1, 0, 0]
  page_table.check(shorter)
  np.testing.assert_array_equal(fork(table, 0, NO_PAGE).pages, table.pages)


def test_fork_releases_what_the_child_held():
  table = fork(table_with([20, 33]), parent=0, child=1)
  assert int(table.num_free) == 8
  page_table.check(table)


def test_old_tables_stay_good():
  old = table_with([20, 5])
  before = jax.tree.map(np.array, old)
  release(fork(extend(old, jnp.array([30, 30]))[0], 0, 1), jnp.array([True, True]))
  jax.tree.map(np.testing.assert_array_equal, old, before)
  page_table.check(old)


@pytest.mark.parametrize("name", ["num_slots", "pages_per_slot", "num_pages", "page_size"])
def test_impossible_sizes_are_named(name):
  with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
    page_table.init(**{**dict(num_slots=1, pages_per_slot=1, num_pages=1, page_size=1), name: 0})


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(ref_counts=jnp.zeros(10, jnp.int32)), "ref_counts of pages"),
    (dict(seq_lens=jnp.array([60, 5])), "pages do not match seq_lens"),
    (dict(seq_lens=jnp.array([-1, 5])), "seq_lens outside"),
    (dict(pages=jnp.full((2, 8), 3)), "pages do not match seq_lens"),
  ],
)
def test_check_catches_broken_tables(change, message):
  table = table_with([20, 5])
  page_table.check(table)
  with pytest.raises(AssertionError, match=message):
    page_table.check(dataclasses.replace(table, **change))


def test_check_catches_a_page_held_twice():
  table = table_with([20, 5])
  pages = table.pages.at[0, 1].set(0)
  refs = table.ref_counts.at[0].set(2).at[1].set(0)
  with pytest.raises(AssertionError, match="slot 0 holds a page twice"):
    page_table.check(dataclasses.replace(table, pages=pages, ref_counts=refs))


def test_vmap_and_scan():
  table = table_with([20, 5])
  many = jax.vmap(lambda n: page_table.extend(table, n)[0].num_free)(jnp.array([[0, 0], [30, 30]]))
  assert many.tolist() == [7, 3]
  last, _ = jax.lax.scan(lambda t, n: (page_table.extend(t, n)[0], None), table, jnp.ones((40, 2), jnp.int32))
  assert last.seq_lens.tolist() == [60, 45]


@pytest.mark.parametrize("n", [1, 5, 32, 33, 300])
def test_counting_is_that_of_numpy(n):
  rng = np.random.default_rng(n)
  ends = np.cumsum(rng.integers(0, 3, n)).astype(np.int32)
  k = np.arange(-2, ends[-1] + 3, dtype=np.int32)
  np.testing.assert_array_equal(
    page_table.count_upto(jnp.asarray(ends), jnp.asarray(k)), np.searchsorted(ends, k, side="right")
  )
  mask = rng.random((3, n)) < 0.5
  np.testing.assert_array_equal(page_table.count_true(jnp.asarray(mask)), mask.sum(axis=1))


class PageTableMachine(RuleBasedStateMachine):
  """Random verbs on a pool too small to satisfy anyone. The oracle keeps, for each slot, the tokens it should read."""

  @initialize(
    slots=strategies.integers(2, 4), pages=strategies.sampled_from([3, 6]), size=strategies.sampled_from([1, 3, 4])
  )
  def start(self, slots, pages, size):
    self.table = page_table.init(num_slots=slots, pages_per_slot=4, num_pages=pages, page_size=size)
    self.kv = kv_pages.init(
      num_layers=2, num_pages=pages, page_size=size, num_kv_heads=1, head_dim=1, dtype=jnp.float32
    )
    self.tokens = [[] for _ in range(slots)]
    self.next = 1

  @rule(data=strategies.data())
  def extend(self, data):
    S, size = len(self.tokens), self.table.page_size
    wanted = data.draw(strategies.lists(strategies.integers(0, size + 1), min_size=S, max_size=S))
    free = int(self.table.num_free)
    old = self.table
    self.table, copies, granted = extend(old, jnp.array(wanted))
    assert int(self.table.num_free) >= free - sum(-(-n // size) + 1 for n in wanted)
    self.kv = copy(self.kv, copies)
    refused, pages = False, np.asarray(need(old, jnp.array(wanted))[0])
    table_pages, ref_counts = np.asarray(self.table.pages), np.asarray(self.table.ref_counts)
    for slot, n in enumerate(wanted):
      room = len(self.tokens[slot]) + n <= old.pages_per_slot * size
      if room and pages[slot] > 0:  # strict order: served exactly while the sum of needs fits
        refused = refused or int(pages[slot]) > free
        free -= 0 if refused else int(pages[slot])
      assert bool(granted[slot]) == (room and (pages[slot] == 0 or not refused))
      if not granted[slot]:
        np.testing.assert_array_equal(self.table.pages[slot], old.pages[slot])
        continue
      for _ in range(n):
        position = len(self.tokens[slot])
        page = table_pages[slot, position // size]
        assert ref_counts[page] == 1, "a shared page is written"
        value = jnp.full((1, 1, 1), self.next, jnp.float32)
        for layer in range(2):
          self.kv = write(self.kv, layer, value, value + layer, jnp.array([page]), jnp.array([position % size]))
        self.tokens[slot].append(self.next)
        self.next += 1

  @rule(data=strategies.data())
  def fork(self, data):
    slots = strategies.integers(0, len(self.tokens) - 1)
    parent, child = data.draw(slots), data.draw(slots)
    n = data.draw(strategies.none() | strategies.integers(0, len(self.tokens[parent]) + 1))
    self.table = fork(self.table, parent, child, n)
    self.tokens[child] = self.tokens[parent][: len(self.tokens[parent]) if n is None else n]

  @rule(data=strategies.data())
  def release(self, data):
    S = len(self.tokens)
    done = data.draw(strategies.lists(strategies.booleans(), min_size=S, max_size=S))
    self.table = release(self.table, jnp.array(done))
    self.tokens = [[] if gone else tokens for gone, tokens in zip(done, self.tokens, strict=True)]

  @invariant()
  def everyone_reads_their_own_tokens(self):
    if not hasattr(self, "table"):
      return
    page_table.check(self.table)
    size = self.table.page_size
    k, v = np.asarray(self.kv.k)[..., 0, 0], np.asarray(self.kv.v)[..., 0, 0]
    for slot, tokens in enumerate(self.tokens):
      assert int(self.table.seq_lens[slot]) == len(tokens)
      for layer in range(2):
        pages = np.asarray(kv_pages.layer_pages(self.kv, self.table.pages[slot], layer))
        read = [k[pages[i // size], i % size] for i in range(len(tokens))]
        assert read == tokens
        read = [v[pages[i // size], i % size] - layer for i in range(len(tokens))]
        assert read == tokens


PageTableMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
test_page_table_machine = PageTableMachine.TestCase
