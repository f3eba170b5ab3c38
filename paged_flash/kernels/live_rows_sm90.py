"""The O(N) passes of the backward pass where queries have lengths, on Hopper GPUs: only rows that are there are read.

Without lengths XLA does them at the speed of memory. With lengths it would read what lies past the end too, most of the
bytes where most rows are padding. A block takes one tile of 64 queries of a few neighboring heads, two of which are on
their way at a time; a block whose queries are not there ends at once, or writes zeros. Several blocks share a
multiprocessor: that keeps enough bytes in flight, and the hardware gives the next one to whoever is free.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_flash.kernels import mosaic
from paged_flash.kernels.mosaic import ROW, cdiv, divide

ROWS = 64  # of a tile
MOST_HEADS = 4  # of a block: more make fewer blocks that have nothing to do, but end less evenly
STAGES = 2  # heads that are fetched ahead


def row_dots(x: jax.Array, y: jax.Array, lens: jax.Array, *, interpret: Any = None) -> jax.Array:
  """sum(x * y) over the last axis, in float32, for tiles of 64 rows that begin inside their sequence.

  Args:
    x, y: [B, T, H, D], 16 bits each, D a multiple of 32.
    lens: i32[B], how many of the T rows are there.
    interpret: `plgpu.InterpretGPUParams` to run on a CPU.

  Returns:
    f32[B, H, padded T], T padded to whole tiles. Only rows before lens[b] mean anything: the rest of their last tile
    is made of what x and y hold there, perhaps NaN, and other tiles are not written.
  """
  B, T, H, D = x.shape
  tiles, group = cdiv(T, ROWS), _heads_together(H)
  step = min(D, plgpu.find_swizzle(D * 16) // 2)  # columns: what registers hold is bounded whatever D is

  def kernel(x_gmem, y_gmem, lens, out_gmem, x_smem, y_smem, sums, landed):
    batch, tile, first = _place(tiles, H)
    rows = pl.ds(tile * ROWS, ROWS)

    def fetch(n):
      for gmem, smem in ((x_gmem, x_smem), (y_gmem, y_smem)):
        plgpu.copy_gmem_to_smem(gmem.at[batch, rows, first + n], smem.at[n % STAGES], landed.at[n % STAGES])

    def compute(n):
      total = mosaic.full((ROWS, step), 0.0)
      for start in range(0, D, step):
        part = n % STAGES, slice(None), pl.ds(start, step)
        a, b = (plgpu.load(smem.at[part], layout=plgpu.Layout.WGMMA) for smem in (x_smem, y_smem))
        total += a.astype(jnp.float32) * b.astype(jnp.float32)
      sums[n] = plgpu.layout_cast(total.sum(axis=1), ROW)
      plgpu.commit_smem()  # what was read may be overwritten, and the sums may leave

    @pl.when(tile * ROWS < lens[batch])
    def _():
      _in_turn(group, fetch, compute, landed)
      plgpu.copy_smem_to_gmem(sums, out_gmem.at[batch, pl.ds(first, group), rows])
      plgpu.wait_smem_to_gmem(0)

  call = _kernel(
    kernel,
    jax.ShapeDtypeStruct((B, H, tiles * ROWS), jnp.float32),
    B * tiles * (H // group),
    mosaic.smem((STAGES, ROWS, D), x.dtype),
    mosaic.smem((STAGES, ROWS, D), y.dtype),
    plgpu.SMEM((group, ROWS), jnp.float32),
    plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    interpret=interpret,
  )
  return mosaic.untyped(call, mosaic.whole_groups(x), mosaic.whole_groups(y), lens)


def finished(
  dq: jax.Array, visited: jax.Array, scale: float, shape: tuple[int, ...], dtype: Any, *, interpret: Any = None
) -> jax.Array:
  """dQ as it is returned, from what was added up: scaled, heads after rows, zeros where nobody added anything.

  Args:
    dq: f32[B, H, padded T, D or more columns]; anything, perhaps NaN, in tiles of 64 rows that were not visited.
    visited: bool[B, padded T / 64].
    scale: The factor.
    shape: (B, T, H, D) of the result, D a multiple of 32.
    dtype: Of the result, 16 bits.
    interpret: `plgpu.InterpretGPUParams` to run on a CPU.

  Returns:
    dtype[B, T, H, D].
  """
  B, T, H, D = shape
  tiles, group = visited.shape[1], _heads_together(H)

  def kernel(dq_gmem, visited, out_gmem, dq_smem, out_smem, landed):
    batch, tile, first = _place(tiles, H)
    rows = pl.ds(tile * ROWS, ROWS)
    is_visited = visited[batch, tile] != 0

    def fetch(n):
      source = dq_gmem.at[batch, first + n, rows, pl.ds(0, D)]
      plgpu.copy_gmem_to_smem(source, dq_smem.at[n % STAGES], landed.at[n % STAGES])

    def put(n, smem):
      plgpu.copy_smem_to_gmem(smem, out_gmem.at[batch, rows, first + n])

    def compute(n):
      x = plgpu.load(dq_smem.at[n % STAGES], layout=plgpu.Layout.WGMMA)
      plgpu.wait_smem_to_gmem(STAGES - 1, wait_read_only=True)  # what lay here has left
      out_smem[n % STAGES] = (x * scale).astype(dtype)
      plgpu.commit_smem()
      put(n, out_smem.at[n % STAGES])

    @pl.when(is_visited)
    def _():
      _in_turn(group, fetch, compute, landed)

    @pl.when(jnp.logical_not(is_visited))
    def _():
      out_smem[0] = mosaic.full((ROWS, D), 0.0).astype(dtype)
      plgpu.commit_smem()
      for n in range(group):
        put(n, out_smem.at[0])

    plgpu.wait_smem_to_gmem(0)

  call = _kernel(
    kernel,
    jax.ShapeDtypeStruct((B, 8 * cdiv(T, 8), H, D), dtype),  # `mosaic.whole_groups`
    B * tiles * (H // group),
    mosaic.smem((STAGES, ROWS, D), jnp.float32),
    mosaic.smem((STAGES, ROWS, D), dtype),
    plgpu.Barrier(num_barriers=STAGES),
    interpret=interpret,
  )
  return mosaic.untyped(call, dq, visited.astype(jnp.int32))[:, :T]


def _heads_together(heads: int) -> int:
  return max(n for n in range(1, MOST_HEADS + 1) if heads % n == 0)


def _place(tiles: int, heads: int) -> tuple[Any, Any, Any]:
  """This block's sequence, tile of rows and first head; heads of a row lie side by side, so they vary fastest."""
  groups = heads // _heads_together(heads)
  rest, group = divide(lax.axis_index("block"), groups)
  batch, tile = divide(rest, tiles)
  return batch, tile, group * _heads_together(heads)


def _in_turn(count: int, fetch: Callable[[int], None], compute: Callable[[int], None], landed: Any) -> None:
  """Fetches and computes `count` heads; `compute` ends with `plgpu.commit_smem`, after which the next is fetched."""
  for n in range(min(STAGES, count)):
    fetch(n)
  for n in range(count):
    plgpu.barrier_wait(landed.at[n % STAGES])
    compute(n)
    if n + STAGES < count:
      fetch(n + STAGES)


def _kernel(body: Any, out_type: Any, blocks: int, *scratch: Any, interpret: Any) -> Callable[..., jax.Array]:
  return plgpu.kernel(
    body,
    out_type=out_type,
    grid=(blocks,),
    grid_names=("block",),
    num_threads=1,
    thread_name="wg",
    scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    interpret=interpret,
  )
