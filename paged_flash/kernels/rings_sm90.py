"""Rings of tiles in shared memory that pages fill: one TMA copy for each page of a tile, one barrier for each tile.

Pallas has every thread of a warp arrive at a barrier for every copy, 64 operations on shared memory for a page of 16
tokens, and a tile of 128 keys has 16 such copies: that is slower than memory. Here one thread announces the bytes of a
whole tile and issues all of its copies, and a warpgroup gives a tile back by one arrival for each warp. In the
interpreter barriers are those of Pallas.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, nvvm

from paged_flash.kernels import mosaic

_SCALAR = plgpu.Layout.WG_SPLAT
_REF = plgpu.RefType()


def scratch(count: int, tile_pages: int, *, interpret: bool) -> Any:
  """Barriers of `count` tiles in all: when a tile is full, and when it may be filled."""
  if interpret:
    return plgpu.Barrier(num_arrivals=tile_pages, num_barriers=count), plgpu.Barrier(num_barriers=count)
  return plgpu.SMEM((4 * count,), jnp.int32)  # 8 bytes each: the full ones, then the empty ones


def start(*barriers: Any) -> None:
  """Makes the barriers of all rings ready, before any is used; all threads of a block call it.

  A tile is read by one warpgroup. Not in the interpreter.
  """

  @mosaic.inline(arg_types=tuple(_REF for _ in barriers))
  def make(_, *barriers):
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    is_first = mgpu.utils.single_thread_predicate(mgpu.utils.ThreadSubset.BLOCK)
    for ref in barriers:
      count = ir.MemRefType(ref.type).shape[0] // 4
      base = mgpu.utils.memref_ptr(ref)
      for n in range(2 * count):
        arrivals = mgpu.utils.c(1 if n < count else mosaic.WARPS, i32)
        nvvm.mbarrier_init(mgpu.utils.getelementptr(base, [n], i64), arrivals, predicate=is_first)
    nvvm.fence_mbarrier_init()
    gpu.barrier()

  make(*barriers)


def _barrier(ref: Any, index: Any) -> Any:
  """Address of a barrier."""
  return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], ir.IntegerType.get_signless(64))


@dataclasses.dataclass(frozen=True)
class Ring:
  """`stages` tiles from `first` on, filled and read one after the other; the i-th lies in slot(i)."""

  tiles: Any  # [count, rows, D] in shared memory
  barriers: Any  # `scratch`
  first: Any
  stages: int
  interpret: bool

  def slot(self, i: Any) -> Any:
    return self.first + lax.rem(i, jnp.int32(self.stages))

  def tile(self, i: Any) -> Any:
    return self.tiles.at[mosaic.anew(self.slot(i), interpret=self.interpret)]

  def _wait(self, i: Any, is_empty: bool) -> None:
    if self.interpret:
      plgpu.barrier_wait(self.barriers[is_empty].at[self.slot(i)])
      return
    index = self.slot(i) + (self.tiles.shape[0] if is_empty else 0)
    parity = lax.rem(lax.div(i, jnp.int32(self.stages)), jnp.int32(2))

    @mosaic.inline(arg_types=(_REF, _SCALAR, _SCALAR))
    def wait(_, ref, index, parity):
      ticks = mgpu.utils.c(10_000_000, ir.IntegerType.get_signless(32))
      nvvm.mbarrier_try_wait_parity(_barrier(ref, index.registers.item()), parity.registers.item(), ticks)

    wait(self.barriers, index, parity)

  @jax.named_scope("wait_full")
  def wait_full(self, i: Any) -> None:
    """Until the i-th tile is there."""
    self._wait(i, False)

  @jax.named_scope("wait_empty")
  def wait_empty(self, i: Any) -> None:
    """Until the tile that was in the i-th one's place has been read."""
    pl.when(i >= self.stages)(lambda: self._wait(i - self.stages, True))

  def release(self, i: Any) -> None:
    """The i-th tile has been read by this warpgroup."""
    if self.interpret:
      plgpu.barrier_arrive(self.barriers[1].at[self.slot(i)])
      return

    @mosaic.inline(arg_types=(_REF, _SCALAR))
    def arrive(_, ref, index):
      nvvm.bar_warp_sync(mgpu.utils.c(0xFFFFFFFF, ir.IntegerType.get_signless(32)))
      is_one = mgpu.utils.single_thread_predicate(mgpu.utils.ThreadSubset.WARP)
      mgpu.utils.inline_ptx(
        "mbarrier.arrive.release.cta.shared::cta.b64 _, [$0];",
        _barrier(ref, index.registers.item()),
        predicate=is_one,
        has_side_effects=True,
      )

    arrive(self.barriers, self.slot(i) + self.tiles.shape[0])

  def drain(self, done: Any) -> None:
    """Waits until all of `done` tiles have been read: the interpreter wants every completion of a barrier observed."""
    if self.interpret:
      pl.loop(jnp.maximum(done - self.stages, 0), done)(lambda i: self._wait(i, True))

  @jax.named_scope("fetch")
  def fetch(self, i: Any, gmem: Any, page_ids: Any, first_row: Any, head: Any) -> None:
    """Fetches a head's rows of pages [N, page_size, K, D] to the i-th tile: whole pages, or one's from `first_row` on.

    A warp calls it. `page_ids` are of the tile's pages, one in each thread from the warp's first on; a list in the
    interpreter.
    """
    num_rows, page_size = self.tiles.shape[1], gmem.shape[1]
    rows, num_pages = min(num_rows, page_size), max(1, num_rows // page_size)
    if self.interpret:
      full = self.barriers[0].at[self.slot(i)]
      for n, page_id in enumerate(page_ids):
        place = self.tile(i).at[pl.ds(n * rows, rows)] if num_pages > 1 else self.tile(i)
        plgpu.copy_gmem_to_smem(gmem.at[page_id, pl.ds(first_row, rows), head], place, full)
      return
    tile = self.tile(i)
    transforms = mosaic.transforms_of(tile.shape, tile.dtype)

    @mosaic.inline(arg_types=(_REF, plgpu.RefType(transforms), _REF, *[_SCALAR] * 4))
    def copy(context, gmem, tile, ref, index, page_id, first_row, head):
      i32, as_index = ir.IntegerType.get_signless(32), lambda x: arith.index_cast(ir.IndexType.get(), x)
      swizzle, memref = transforms[1].swizzle, ir.MemRefType(tile.type)
      size = memref.shape[0] * memref.shape[1] * memref.shape[2] * memref.shape[3]
      size *= mgpu.utils.bytewidth(memref.element_type)
      no_phases: Any = None
      barrier = mgpu.utils.BarrierRef(mgpu.utils.memref_ptr(ref), index.registers.item(), no_phases, 1)
      ids = [
        mgpu.utils.inline_ptx(
          f"shfl.sync.idx.b32 $0, $1, {n}, 31, 0xffffffff;",
          page_id.registers.item(),
          result_types=i32,
          has_side_effects=True,
          convergent=True,
        )
        for n in range(num_pages)
      ]
      first_row, head = as_index(first_row.registers.item()), as_index(head.registers.item())
      is_one = mgpu.utils.single_thread_predicate(mgpu.utils.ThreadSubset.WARP)
      nvvm.mbarrier_arrive_expect_tx(barrier.get_ptr(), mgpu.utils.c(size, i32), predicate=is_one)
      tiles = rows // memref.shape[2]
      for n in range(num_pages):
        context.async_copy(
          src_ref=gmem,
          dst_ref=mgpu.utils.memref_slice(tile, slice(n * tiles, (n + 1) * tiles)),
          gmem_slice=(as_index(ids[n]), mgpu.ds(first_row, rows), head),
          gmem_transform=mgpu.TileTransform((8, memref.shape[3])),
          swizzle=swizzle,
          barrier=barrier,
          arrive=False,
          predicate=is_one,
        )

    copy(gmem, tile, self.barriers, self.slot(i), page_ids, first_row, head)
