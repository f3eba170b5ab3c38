"""The buddy allocator: one contiguous block of memory for each slot, as caches had before pages.

S slots share `num_tokens` tokens of memory. A block is a power of two tokens long and starts at a multiple of its
length; the smallest free block that is large enough is halved until it is just so, the first half taken each time, and
halves that are both free are whole again at once. Nothing but the blocks held is stored: what is free, and in which
blocks, follows from them. A memory whose size is no power of two is the sum of its binary digits' blocks.

A state is an immutable value; every function takes one and returns another, inside `jit` and `vmap`.

Source: Knowlton 1965, "A fast storage allocator"; the baselines of Kwon et al. 2023 section 6.1 are placed by it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

NOWHERE = -1
_MOST = 2**30  # tokens of memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
  """Who holds which block."""

  starts: jax.Array  # i32[S]  first token of the slot's block; NOWHERE
  sizes: jax.Array  # i32[S]  tokens in it, a power of two; 0 for none
  num_tokens: jax.Array  # i32[]  of memory; data, so that sizes can be mapped over

  @property
  def num_free(self) -> jax.Array:  # i32[]
    """Tokens in no block."""
    return self.num_tokens - jnp.sum(self.sizes)


def init(*, num_slots: int, num_tokens: jax.Array | int) -> Blocks:
  """Memory of `num_tokens` (below 2**30), all free.

  Example:
    >>> int(init(num_slots=2, num_tokens=100).num_free)
    100
  """
  return Blocks(
    starts=jnp.full(num_slots, NOWHERE, jnp.int32),
    sizes=jnp.zeros(num_slots, jnp.int32),
    num_tokens=jnp.asarray(num_tokens, jnp.int32),
  )


def grant(blocks: Blocks, slot: jax.Array | int, num_tokens: jax.Array | int) -> tuple[Blocks, jax.Array]:
  """Gives a slot the smallest block that holds `num_tokens`.

  Args:
    blocks: stays good.
    slot: i32[], which holds none.
    num_tokens: i32[], at least 1.

  Returns:
    blocks: the new state; the old one where nothing was granted.
    granted: bool[]; False where no free block is large enough, the slot holds one, or `num_tokens` is below 1.

  Example:
    >>> blocks, granted = grant(init(num_slots=2, num_tokens=100), 0, 20)
    >>> int(blocks.starts[0]), int(blocks.sizes[0]), bool(granted)
    (64, 32, True)
  """
  num_tokens = jnp.asarray(num_tokens, jnp.int32)
  size = round_up(num_tokens)
  begin = jnp.where(blocks.sizes > 0, blocks.starts, blocks.num_tokens)
  order = jnp.argsort(begin)
  low = jnp.pad((begin + blocks.sizes)[order], (1, 0))  # i32[S+1]  the gaps between blocks
  high = jnp.append(begin[order], blocks.num_tokens)
  # A gap is free blocks that grow, then shrink. The smallest of those large enough is the first or the last of them.
  first, last = (low + size - 1) // size * size, high // size * size - size
  fits = first + size <= high
  inside, low, high = jnp.append(first, last), jnp.tile(low, 2), jnp.tile(high, 2)  # i32[2S+2]
  power = 1 << jnp.arange(30)[:, None]  # the blocks around it, by size
  start = inside // power * power
  whole = 1 << (jnp.sum((start >= low) & (start + power <= high), axis=0) - 1)
  whole = jnp.where(jnp.tile(fits, 2), whole, _MOST)
  start = jnp.where(whole == jnp.min(whole), inside // whole * whole, _MOST)
  granted = jnp.any(fits) & (num_tokens >= 1) & (num_tokens <= blocks.num_tokens) & (blocks.sizes[slot] == 0)
  at = jnp.where(granted, slot, blocks.sizes.size)
  return dataclasses.replace(
    blocks,
    starts=blocks.starts.at[at].set(jnp.min(start), mode="drop"),
    sizes=blocks.sizes.at[at].set(size, mode="drop"),
  ), granted


def release(blocks: Blocks, done: jax.Array) -> Blocks:
  """Frees the blocks of the slots in `done` (bool[S])."""
  return dataclasses.replace(
    blocks, starts=jnp.where(done, NOWHERE, blocks.starts), sizes=jnp.where(done, 0, blocks.sizes)
  )


def round_up(num_tokens: jax.Array) -> jax.Array:
  """The least power of two that is not smaller; 1 for what is below 1.

  Example:
    >>> round_up(jnp.array([0, 1, 2, 5, 64, 65])).tolist()
    [1, 1, 2, 8, 64, 128]
  """
  return 1 << (32 - jax.lax.clz(jnp.maximum(num_tokens, 1) - 1))


def largest(num_tokens: int) -> int:
  """The largest block that a free memory of `num_tokens` can give.

  Example:
    >>> largest(100)
    64
  """
  return 1 << (num_tokens.bit_length() - 1)


def check(blocks: Blocks) -> None:
  """Raises AssertionError where blocks overlap, leave the memory, or are no buddies; for tests."""
  starts, sizes = np.asarray(blocks.starts), np.asarray(blocks.sizes)
  if ((sizes > 0) != (starts >= 0)).any() or (starts[sizes == 0] != NOWHERE).any():
    raise AssertionError(f"starts and sizes disagree on who holds a block: {starts}, {sizes}")
  held = sorted(zip(starts[sizes > 0].tolist(), sizes[sizes > 0].tolist(), strict=True))
  for start, size in held:
    if size & (size - 1) or start % size or start + size > int(blocks.num_tokens):
      raise AssertionError(f"a block of {size} at {start} is no buddy block of {int(blocks.num_tokens)}")
  for (start, size), (after, _) in zip(held, held[1:], strict=False):
    if start + size > after:
      raise AssertionError(f"blocks overlap: {size} at {start}, and one at {after}")
