"""Which items of a kernel's work a block does: a list made when tracing, or, where costs are known only then, claims;
or what one of its warps finds and tells the others.

A block that is free takes the next item by adding to a counter in global memory, so that all end at about the same
time whatever the items cost (a dynamic persistent schedule, as FlashAttention-3 has for lengths). Who takes what
changes from run to run; results must not depend on it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from paged_flash.kernels import mosaic

_SCALAR = plgpu.Layout.WG_SPLAT
_INDEX = plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR)
AHEAD = 2  # items that a block knows of: the one it computes and the next
MOST_FACTS = 8  # numbers that say what an item is


def scratch(listeners: int, rows: tuple[int, int]) -> tuple[Any, Any, Any]:
  """Shared memory and barriers of a block's `Claims`, to which so many warpgroups listen.

  The memory is i32[rows[0] + 1, rows[1]], of which the last row is theirs: arrays of their own take 1 KiB each.
  """
  heard = plgpu.Barrier(num_arrivals=listeners, num_barriers=AHEAD)
  return plgpu.SMEM((rows[0] + 1, rows[1]), jnp.int32), plgpu.Barrier(num_barriers=AHEAD), heard


def told_scratch(listeners: int) -> tuple[Any, Any, Any]:
  """As `scratch`, of a block's `Told`."""
  heard = plgpu.Barrier(num_arrivals=listeners, num_barriers=AHEAD)
  return plgpu.SMEM((AHEAD, MOST_FACTS), jnp.int32), plgpu.Barrier(num_barriers=AHEAD), heard


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed:
  """The items of a block that is told all of them when it begins."""

  count: Any
  at: Callable[[Any], Any]  # index of the n-th

  def over(self, body: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
    """carry = body(n, index of the n-th item, carry) for all items; the last carry."""
    return lax.fori_loop(0, self.count, lambda n, carry: body(n, self.at(n), carry), carry)

  def lead(self, body: Callable[[Any, Any, Any, Any], Any], carry: Any) -> Any:
    """As `Claims.lead`; there is nothing to claim."""
    return self.over(lambda n, index, carry: body(n, index, lambda: None, carry), carry)


class Claims:
  """The items of one block that claims them. One of its warpgroups or warps leads; it and all others listen.

  The n-th item told is the n-th heard. In the interpreter, which has no atomic additions, items go round.
  """

  def __init__(self, counter: Any, scratch: Any, count: Any, block: Any, num_blocks: int, *, interpret: bool):
    """`counter` is i32[1] in global memory, `num_blocks` when the kernel begins; block b has item b without asking."""
    self.counter, self.count, self.block, self.num_blocks, self.interpret = counter, count, block, num_blocks, interpret
    self.places, self.told, self.heard = scratch

  @staticmethod
  def is_one(index: Any) -> Any:
    """Whether what was heard is an item."""
    return index >= 0

  def over(self, body: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
    """As `Listed.over`, for those who only listen."""

    def one(carry):
      n, index, carry = carry
      carry = body(n, index, carry)
      return n + 1, self.listen(n + 1), carry

    start = jnp.int32(0), self.listen(jnp.int32(0)), carry
    return lax.while_loop(lambda carry: self.is_one(carry[1]), one, start)[2]

  def lead(self, body: Callable[[Any, Any, Any, Any], Any], carry: Any) -> Any:
    """As `over`, of body(n, index, claim, carry), for the warpgroup that claims.

    Its first warp must call claim() once in every body, when the next item should be known; it returns that, or -1.
    """

    def one(n, index, carry):
      carry, told = carry
      return body(n, index, lambda: self._tell(n + 1, index), carry), told + 1

    @mosaic.one_warp
    def first():
      self._tell(jnp.int32(0), None)

    carry, told = self.over(one, (carry, jnp.int32(1)))

    @mosaic.one_warp
    def drain():  # the interpreter wants every completion of a barrier observed
      @pl.loop(jnp.maximum(told - AHEAD, 0), told)
      def _(n):
        plgpu.barrier_wait(self.heard.at[lax.rem(n, jnp.int32(AHEAD))])

    return carry

  @jax.named_scope("listen")
  def listen(self, n: jax.Array) -> jax.Array:
    """The block's n-th item, or -1 if it has no more."""
    slot = lax.rem(n, jnp.int32(AHEAD))
    plgpu.barrier_wait(self.told.at[slot])
    if self.interpret:
      index = self.places[self.places.shape[0] - 1, slot]
    else:

      @mosaic.inline(arg_types=(plgpu.RefType(), _SCALAR), return_type=_INDEX)
      def load(_, places, slot):
        return _load(_address(places, slot))

      index = load(self.places, slot)
    plgpu.barrier_arrive(self.heard.at[slot])  # by every thread: none is an item behind
    return jnp.where(index < self.count, index, -1)

  @jax.named_scope("tell")
  def _tell(self, n: jax.Array, last: jax.Array | None) -> jax.Array:
    """Claims the block's n-th item, in one warp, and returns it, or -1; `last` is the one before, None at first."""
    slot = lax.rem(n, jnp.int32(AHEAD))
    pl.when(n >= AHEAD)(lambda: plgpu.barrier_wait(self.heard.at[slot]))
    if self.interpret:
      index = self.block if last is None else last + self.num_blocks
      self.places[self.places.shape[0] - 1, slot] = index
    else:

      @mosaic.inline(arg_types=(plgpu.RefType(), plgpu.RefType(), _SCALAR, _SCALAR), return_type=_INDEX)
      def store(_, places, counter, slot, block):
        with mgpu.utils.single_thread(mgpu.ThreadSubset.WARP):
          value = block.registers.item()
          if last is not None:
            text = "atom.relaxed.gpu.global.add.u32 $0, [$1], 1;"
            counter, i32 = mgpu.utils.memref_ptr(counter), ir.IntegerType.get_signless(32)
            value = mgpu.utils.inline_ptx(text, counter, result_types=i32, has_side_effects=True)
          llvm.store(value, _address(places, slot))
        mgpu.utils.inline_ptx("bar.warp.sync 0xffffffff;", has_side_effects=True, convergent=True)
        return _load(_address(places, slot))

      index = store(self.places, self.counter, slot, self.block)
    plgpu.barrier_arrive(self.told.at[slot])
    return jnp.where(index < self.count, index, -1)


class Told:
  """The items of one block that one of its warps finds, each some numbers; all others listen.

  The n-th item told is the n-th heard. The first number is how many items there are from this one on; after the last
  one more is told, of which it is 0.
  """

  def __init__(self, scratch: Any, count: int, *, interpret: bool):
    """`count` is how many numbers an item is."""
    self.facts, self.told, self.heard = scratch
    self.count, self.interpret = count, interpret

  @staticmethod
  def is_one(item: Any) -> Any:
    """Whether what was heard is an item."""
    return item[0] > 0

  def over(self, body: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
    """carry = body(n, item, carry) for all items; the last carry. In a warp, where no other loop can be."""

    def one(n, carry):
      item, carry = carry
      carry = body(n, item, carry)
      return self.listen(n + 1), carry

    first = self.listen(jnp.int32(0))
    return lax.fori_loop(0, first[0], one, (first, carry))[1]

  @jax.named_scope("listen")
  def listen(self, n: jax.Array) -> tuple[Any, ...]:
    """The block's n-th item."""
    slot = lax.rem(n, jnp.int32(AHEAD))
    plgpu.barrier_wait(self.told.at[slot])
    if self.interpret:
      item = tuple(self.facts[slot, i] for i in range(self.count))
    else:

      @mosaic.inline(arg_types=(plgpu.RefType(), _SCALAR), return_type=(_INDEX,) * self.count)
      def load(_, facts, slot):
        return tuple(_load(_fact(facts, slot, i)) for i in range(self.count))

      item = load(self.facts, slot)
    plgpu.barrier_arrive(self.heard.at[slot])  # by every thread: none is an item behind
    return item

  @jax.named_scope("tell")
  def tell(self, n: jax.Array, item: tuple[Any, ...]) -> None:
    """Tells the n-th item, in one warp."""
    slot = lax.rem(n, jnp.int32(AHEAD))
    pl.when(n >= AHEAD)(lambda: plgpu.barrier_wait(self.heard.at[slot]))
    if self.interpret:
      for i, x in enumerate(item):
        self.facts[slot, i] = x
    else:

      @mosaic.inline(arg_types=(plgpu.RefType(), _SCALAR, *[_SCALAR for _ in item]))
      def store(_, facts, slot, *item):
        with mgpu.utils.single_thread(mgpu.ThreadSubset.WARP):
          for i, x in enumerate(item):
            llvm.store(x.registers.item(), _fact(facts, slot, i))
        mgpu.utils.inline_ptx("bar.warp.sync 0xffffffff;", has_side_effects=True, convergent=True)

      store(self.facts, slot, *item)
    plgpu.barrier_arrive(self.told.at[slot])

  def drain(self, told: jax.Array) -> None:
    """Waits, in the warp that told so many, until all are heard; the interpreter wants every completion observed."""

    @pl.loop(jnp.maximum(told - AHEAD, 0), told)
    def _(n):
      plgpu.barrier_wait(self.heard.at[lax.rem(n, jnp.int32(AHEAD))])


def _fact(facts: Any, slot: Any, i: int) -> Any:
  i32 = ir.IntegerType.get_signless(32)
  place = arith.muli(slot.registers.item(), mgpu.utils.c(MOST_FACTS, i32))
  return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(facts), [arith.addi(place, mgpu.utils.c(i, i32))], i32)


def _address(places: Any, slot: Any) -> Any:
  i32, (rows, columns) = ir.IntegerType.get_signless(32), ir.MemRefType(places.type).shape
  place = arith.addi(slot.registers.item(), mgpu.utils.c((rows - 1) * columns, i32))
  return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(places), [place], i32)


def _load(address: Any) -> Any:
  i32 = ir.IntegerType.get_signless(32)
  value = mgpu.utils.inline_ptx("ld.shared.u32 $0, [$1];", address, result_types=i32, has_side_effects=True)
  return mgpu.FragmentedArray.splat(value, (), is_signed=True)
