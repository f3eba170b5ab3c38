"""The buddy allocator against the textbook's, with its lists of free blocks."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_flash.cache import buddy

SLOTS = 6
grant, release = jax.jit(buddy.grant), jax.jit(buddy.release)


class Textbook:
  """Knowlton's allocator as told: lists of free blocks by size, split on the way down, merged on the way up."""

  def __init__(self, num_tokens):
    self.free, self.held, start = {}, {}, 0
    for power in reversed(range(num_tokens.bit_length())):
      if num_tokens >> power & 1:
        self.free.setdefault(1 << power, set()).add(start)
        start += 1 << power

  def grant(self, slot, num_tokens):
    size = 1
    while size < num_tokens:
      size *= 2
    whole = min((s for s, starts in self.free.items() if s >= size and starts), default=None)
    if whole is None:
      return False
    start = min(self.free[whole])
    self.free[whole].remove(start)
    while whole > size:
      whole //= 2
      self.free.setdefault(whole, set()).add(start + whole)
    self.held[slot] = start, size
    return True

  def release(self, slot):
    start, size = self.held.pop(slot)
    while start ^ size in self.free.get(size, ()):
      self.free[size].remove(start ^ size)
      start, size = start & ~size, 2 * size
    self.free.setdefault(size, set()).add(start)


def state(blocks):
  return {
    slot: (int(start), int(size))
    for slot, (start, size) in enumerate(zip(blocks.starts, blocks.sizes, strict=True))
    if size
  }


@settings(deadline=None, max_examples=60)
@given(
  num_tokens=st.integers(1, 300),
  script=st.lists(st.tuples(st.integers(0, SLOTS - 1), st.integers(1, 140)), max_size=40),
)
def test_every_block_is_where_the_textbook_puts_it(num_tokens, script):
  blocks, oracle = buddy.init(num_slots=SLOTS, num_tokens=num_tokens), Textbook(num_tokens)
  fresh = {size: set(starts) for size, starts in oracle.free.items()}
  for slot, tokens in script:
    if slot in oracle.held:
      oracle.release(slot)
      blocks = release(blocks, jnp.arange(SLOTS) == slot)
    else:
      before = state(blocks)
      blocks, granted = grant(blocks, slot, tokens)
      assert bool(granted) == oracle.grant(slot, tokens)
      assert granted or state(blocks) == before  # a refusal changes nothing
    assert state(blocks) == oracle.held
    assert int(blocks.num_free) == sum(size * len(starts) for size, starts in oracle.free.items())
    buddy.check(blocks)
  for slot in list(oracle.held):
    oracle.release(slot)
  blocks = release(blocks, jnp.ones(SLOTS, bool))
  assert {size: starts for size, starts in oracle.free.items() if starts} == fresh  # all merged again
  assert state(blocks) == {} and int(blocks.num_free) == num_tokens
  blocks, granted = grant(blocks, 0, buddy.largest(num_tokens))
  assert granted


def test_refused_for_want_of_one_block_though_the_tokens_are_there():
  blocks = buddy.init(num_slots=4, num_tokens=64)
  for slot in range(4):
    blocks, granted = grant(blocks, slot, 16)
    assert granted
  blocks = release(blocks, jnp.array([False, True, True, False]))
  assert int(blocks.num_free) == 32
  after, granted = grant(blocks, 1, 17)  # the two free blocks are no buddies
  assert not granted and state(after) == state(blocks)


@pytest.mark.parametrize("tokens", [0, -3, 65, 2**30])
def test_what_cannot_be_granted(tokens):
  blocks, granted = grant(buddy.init(num_slots=2, num_tokens=64), 0, tokens)
  assert not granted and state(blocks) == {}


def test_a_slot_holds_one_block():
  blocks, _ = grant(buddy.init(num_slots=2, num_tokens=64), 0, 5)
  after, granted = grant(blocks, 0, 5)
  assert not granted and state(after) == state(blocks)


@pytest.mark.parametrize("starts, sizes", [([0, 4], [8, 4]), ([4, -1], [8, 0]), ([60, -1], [8, 0]), ([-1, -1], [8, 0])])
def test_check_finds_what_is_wrong(starts, sizes):
  with pytest.raises(AssertionError, match="block"):
    buddy.check(buddy.Blocks(starts=jnp.array(starts), sizes=jnp.array(sizes), num_tokens=jnp.array(64)))
