"""Work that blocks of a kernel claim item by item, where costs are known only when it runs.

A block that is free takes the next item by adding to a counter in global memory, so that all end at about the same
time whatever the items cost (a dynamic persistent schedule, as FlashAttention-3 has for lengths). Who takes what
changes from run to run; results must not depend on it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

_inline: Any = plgpu.inline_mgpu
AHEAD = 2  # items that a block knows of: the one it computes and the next


def scratch(num_warpgroups: int) -> tuple[Any, Any, Any]:
  """Shared memory and barriers of a block's `Claims`; `num_warpgroups` listen."""
  heard = plgpu.Barrier(num_arrivals=num_warpgroups, num_barriers=AHEAD)
  return plgpu.SMEM((AHEAD,), jnp.int32), plgpu.Barrier(num_barriers=AHEAD), heard


class Claims:
  """The items of one block. One of its warpgroups claims and tells; all, also that one, listen to each that is told.

  The n-th item told is the n-th heard. In the interpreter, which has no atomic additions, items go round.
  """

  def __init__(self, counter: Any, scratch: Any, count: Any, block: Any, num_blocks: int, *, interpret: bool):
    """`counter` is i32[1] in global memory, `num_blocks` when the kernel begins; block b has item b without asking."""
    self.counter, self.count, self.block, self.num_blocks, self.interpret = counter, count, block, num_blocks, interpret
    self.places, self.told, self.heard = scratch

  def claim(self, index: jax.Array) -> jax.Array:
    """An item not claimed before, for `tell` only: one thread knows it. `index` is the last one heard."""
    if self.interpret:
      return index + self.num_blocks

    @_inline(
      arg_types=(plgpu.RefType(),),
      return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT),
    )
    def add(_, counter):
      i32 = ir.IntegerType.get_signless(32)
      text = "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p atom.relaxed.gpu.global.add.u32 $0, [$1], 1; }"
      is_first = arith.extui(i32, _is_first_thread())
      pointer = mgpu.utils.memref_ptr(counter)
      value = mgpu.utils.inline_ptx(text, pointer, is_first, result_types=i32, has_side_effects=True)
      return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return add(self.counter)

  def tell(self, n: jax.Array, index: jax.Array) -> None:
    """The block's n-th item is `index`."""
    slot = lax.rem(n, jnp.int32(AHEAD))

    pl.when(n >= AHEAD)(lambda: plgpu.barrier_wait(self.heard.at[slot]))
    if self.interpret:
      self.places[slot] = index
    else:

      @_inline(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT))
      def store(_, places, slot, index):
        with mgpu.utils.when(_is_first_thread()):
          llvm.store(index.registers.item(), _address(places, slot))
        mgpu.utils.inline_ptx("bar.warp.sync 0xffffffff;", has_side_effects=True, convergent=True)

      store(self.places, slot, index)
    plgpu.barrier_arrive(self.told.at[slot])

  def listen(self, n: jax.Array) -> jax.Array:
    """The block's n-th item, or -1 if it has no more."""
    slot = lax.rem(n, jnp.int32(AHEAD))
    plgpu.barrier_wait(self.told.at[slot])
    if self.interpret:
      index = self.places[slot]
    else:

      @_inline(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT),
      )
      def load(_, places, slot):
        i32 = ir.IntegerType.get_signless(32)
        text = "ld.shared.u32 $0, [$1];"
        value = mgpu.utils.inline_ptx(text, _address(places, slot), result_types=i32, has_side_effects=True)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

      index = load(self.places, slot)
    plgpu.barrier_arrive(self.heard.at[slot])
    return jnp.where(index < self.count, index, -1)

  def drain(self, n: jax.Array) -> None:
    """Waits until all have heard of the n items told; the interpreter wants every completion of a barrier observed."""

    @pl.loop(jnp.maximum(n - AHEAD, 0), n)
    def _(i):
      plgpu.barrier_wait(self.heard.at[lax.rem(i, jnp.int32(AHEAD))])


def _is_first_thread() -> Any:
  i32 = ir.IntegerType.get_signless(32)
  thread = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(128, i32))
  return arith.cmpi(arith.CmpIPredicate.eq, thread, mgpu.utils.c(0, i32))


def _address(places: Any, slot: Any) -> Any:
  i32 = ir.IntegerType.get_signless(32)
  return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(places), [slot.registers.item()], i32)
