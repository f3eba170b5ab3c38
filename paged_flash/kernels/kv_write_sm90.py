"""New K and V into their pages, and copies of whole pages, on Hopper GPUs: one kernel each, in place.

Both only move bytes, so each block lets TMA do it: from memory into shared memory and from there to where it belongs.
A block of `write` takes some neighbouring tokens, K and V of all heads, and puts each in its own place of its own page.
A block of `copy` takes one page of one layer; where there is nothing to copy, as in nearly every step, it ends at once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged_flash.kernels import mosaic
from paged_flash.kernels.arguments import target
from paged_flash.kernels.mosaic import cdiv
from paged_flash.kernels.problem import is_hopper

MOST_TOKENS = 8  # of a block of `write`
BUFFER = 64 * 1024  # bytes of K, and of V, that a block holds at a time


def supports(pool: jax.Array | jax.ShapeDtypeStruct) -> str:
  """Returns "" or why the kernels cannot serve a pool [N, page_size, K, D]."""
  device, (_, _, heads, dim) = target(), pool.shape
  if not is_hopper(device):
    return f"it runs on Hopper GPUs such as the H200, not on {device}"
  if dim * pool.dtype.itemsize % 16 or dim > 256 or heads > 256:
    return f"it wants rows of whole 16 bytes, head_dim and heads up to 256, not {heads} x {dim} x {pool.dtype.itemsize}"
  if heads * dim * pool.dtype.itemsize > BUFFER:
    return f"it wants at most {BUFFER} bytes of a token, not {heads * dim * pool.dtype.itemsize}"
  return ""


def write(
  k_pages: jax.Array,
  v_pages: jax.Array,
  k: jax.Array,
  v: jax.Array,
  rows: jax.Array,
  offsets: jax.Array,
  *,
  interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
  """Writes tokens to their places: `k_pages[rows[t], offsets[t]] = k[t]`, and likewise for V.

  Args:
    k_pages, v_pages: dtype[N, page_size, K, D]; consumed. `supports` must be "".
    k, v: dtype[T, K, D].
    rows: i32[T], negative for a token that is not to be written. No two tokens may have the same place.
    offsets: i32[T], tokens inside the page.
    interpret: `plgpu.InterpretGPUParams` to run on a CPU.

  Returns:
    The pages with the tokens in them.
  """
  T, heads, dim = k.shape
  fitting = BUFFER // (heads * dim * k.dtype.itemsize)
  tokens = max(1, min(MOST_TOKENS, fitting, T // (4 * mosaic.num_multiprocessors())))

  def kernel(k_gmem, v_gmem, rows, offsets, k_pages, v_pages, k_smem, v_smem, landed):
    first = lax.axis_index("block") * tokens
    sides = (k_gmem, k_pages, k_smem), (v_gmem, v_pages, v_smem)
    for gmem, _, smem in sides:
      plgpu.copy_gmem_to_smem(gmem.at[pl.ds(first, tokens)], smem, landed)
    plgpu.barrier_wait(landed)
    for n in range(tokens):
      t = jnp.minimum(first + n, T - 1)
      row = rows[t]

      @pl.when((row >= 0) & (first + n < T))
      def _(n=n, t=t, row=row):
        for _, pages, smem in sides:
          plgpu.copy_smem_to_gmem(smem.at[n], pages.at[row, offsets[t]])

    plgpu.wait_smem_to_gmem(0)

  shape = (tokens, heads, dim)
  return _in_place(
    kernel,
    (k, v, rows, offsets),
    (k_pages, v_pages),
    dict(grid=(cdiv(T, tokens),), grid_names=("block",)),
    shape,
    interpret,
  )


def copy(
  k_pages: jax.Array, v_pages: jax.Array, src: jax.Array, dst: jax.Array, num_layers: int, *, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
  """Copies whole pages in every layer: page `dst[i]` of each becomes its page `src[i]`.

  Args:
    k_pages, v_pages: dtype[L * N, page_size, K, D], layer after layer; consumed. `supports` must be "".
    src: i32[C] page ids.
    dst: i32[C] page ids, negative where there is nothing to copy. None may be in `src`, or twice in `dst`.
    num_layers: L.
    interpret: `plgpu.InterpretGPUParams` to run on a CPU.

  Returns:
    The pages after the copies.
  """
  num_pages, page_size = k_pages.shape[0] // num_layers, k_pages.shape[1]
  heads, dim = k_pages.shape[2:]
  piece = page_size
  while piece * heads * dim * k_pages.dtype.itemsize > BUFFER or page_size % piece:
    piece -= 1

  def kernel(src, dst, k_pages, v_pages, k_smem, v_smem, landed):
    layer, i = lax.axis_index("layer"), lax.axis_index("copy")

    @pl.when(dst[i] >= 0)
    def _():
      origin, goal = layer * num_pages + src[i], layer * num_pages + dst[i]

      @pl.loop(0, page_size // piece)
      def _(n):
        part = pl.ds(n * piece, piece)
        sides = (k_pages, k_smem), (v_pages, v_smem)
        for pages, smem in sides:
          plgpu.copy_gmem_to_smem(pages.at[origin, part], smem, landed)
        plgpu.barrier_wait(landed)
        for pages, smem in sides:
          plgpu.copy_smem_to_gmem(smem, pages.at[goal, part])
        plgpu.wait_smem_to_gmem(0)

  grid = dict(grid=(num_layers, dst.size), grid_names=("layer", "copy"))
  return _in_place(kernel, (src, dst), (k_pages, v_pages), grid, (piece, heads, dim), interpret)


def _in_place(kernel, inputs, pages, grid, shape, interpret) -> tuple[jax.Array, jax.Array]:
  """Runs a kernel that changes `pages`, with a buffer of `shape` for K and one for V, and a barrier for both."""
  refs = [jax.new_ref(pool) for pool in pages]
  plgpu.kernel(
    kernel,
    out_type=(),
    **grid,
    num_threads=1,
    thread_name="wg",
    scratch_types=(
      *(plgpu.SMEM(shape, pages[0].dtype) for _ in range(2)),
      plgpu.Barrier(num_arrivals=2),
    ),
    interpret=interpret,
  )(*inputs, *refs)
  k_pages, v_pages = map(jax.freeze, refs)
  return k_pages, v_pages
