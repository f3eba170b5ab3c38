"""Attention with a query in each row, bit for bit that of a query in each column (`columns_sm90`).

64 queries fill the rows of a wgmma. Then a row's scores lie in four lanes of one warp, and P stays in registers: no
exchange between warps, no shared memory. What a column's sum is, in which order, is kept: a thread's part of it there
is one column here of `sums` [64, 32], and the products of a tile are the same whichever operand comes first.

A thread (warp, lane 4 r + c) holds columns 8 j + 2 c and the next of rows 16 warp + r and r + 8.
"""

import functools
from typing import Any

import jax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from paged_flash.kernels import columns_sm90, mosaic
from paged_flash.kernels.mosaic import ROW, WARPS

TILE = plgpu.Layout.WGMMA
ROWS = 64
LANES = 8  # that hold the rows of a column in `columns_sm90`, of each warp: a sum has WARPS x LANES parts


def nothing(head_dim: int) -> tuple[jax.Array, ...]:
  """(acc, greatest score, sums) of no keys; `total` finishes the sums."""
  return (
    mosaic.full((ROWS, head_dim), 0.0),
    mosaic.full((ROWS,), -float("inf"), ROW),
    mosaic.full((ROWS, WARPS * LANES), 0.0),
  )


def scores(query: Any, key: Any, *, interpret: bool) -> jax.Array:
  """query [64, D] @ key [M, D].T: f32[64, M], of tiles in shared memory."""
  if interpret:
    return columns_sm90.product(key, query, interpret=True).T
  return columns_sm90.product(query, key, interpret=False)


@jax.named_scope("product")
def add_values(acc: jax.Array, prob: jax.Array, value: Any, *, interpret: bool) -> jax.Array:
  """acc [64, D] + prob [64, M] @ value [M, D], the last in shared memory."""
  if interpret:
    return columns_sm90.product(value, prob, acc.T, turned=True, interpret=True).T
  return mosaic.add_matmul(acc, prob, value, interpret=False)


@jax.named_scope("softmax")
def softmax_step(
  s: jax.Array, state: tuple[jax.Array, ...], factor: float, *, masked: bool, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """`columns_sm90.softmax_step` of scores s [64, M] and the state of `nothing`."""
  acc, top, sums = state
  if interpret:
    turned = acc.T, top, sums[:, 0]
    prob, (acc, top, total) = columns_sm90.softmax_step(s.T, turned, factor, None, masked=masked, interpret=True)
    return prob.T, (acc.T, top, sums.at[:, 0].set(total))
  types = [
    plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=y) for x, y in ((s, TILE), (acc, TILE), (top, ROW), (sums, TILE))
  ]

  @mosaic.inline(arg_types=(TILE, TILE, ROW, TILE), return_type=tuple(types))
  def compute(_, s, acc, top, sums):
    scale = mgpu.utils.c(factor, ir.F32Type.get())
    num_groups = s.shape[1] // 8  # of 8 columns
    s_out, acc_out, top_out, sums_out = (x.registers.copy() for x in (s, acc, top, sums))
    flat = lambda x: x.reshape(-1, 2)  # noqa: E731  [groups, half]: rows r and r + 8
    for half in range(2):
      values = [mosaic.values_of(flat(s_out)[n, half]) for n in range(num_groups)]
      here = functools.reduce(arith.maximumf, sum(values, []))
      for lanes in (1, 2):
        here = arith.maximumf(here, mgpu.utils.shfl_bfly(here, lanes))
      (before,) = mosaic.values_of(top_out.flat[half])
      new, minus, alpha = columns_sm90.greatest_so_far(before, here, factor, masked)
      values = [[mosaic.exp2_of(llvm.intr_fma(x, scale, minus)) for x in pair] for pair in values]
      for n, pair in enumerate(values):
        flat(s_out)[n, half] = vector.from_elements(flat(s_out)[n, half].type, pair)
      alphas = vector.from_elements(flat(acc_out)[0, half].type, [alpha, alpha])
      for n in range(len(flat(acc_out))):
        flat(acc_out)[n, half] = arith.mulf(flat(acc_out)[n, half], alphas)
      top_out.flat[half] = vector.from_elements(top_out.flat[half].type, [new])
      for warp in range(WARPS):  # whose rows 64 m + 16 warp + 8 h + r the columns 8 (8 m + 2 warp + h) + r are there
        rows = [values[n] for n in range(num_groups) if n % 8 // 2 == warp]
        olds = mosaic.values_of(flat(sums_out)[warp, half])
        parts = [functools.reduce(arith.addf, x) for x in zip(*rows, strict=True)]
        parts = [llvm.intr_fma(old, alpha, x) for old, x in zip(olds, parts, strict=True)]
        flat(sums_out)[warp, half] = vector.from_elements(flat(sums_out)[warp, half].type, parts)
    registers = zip((s, acc, top, sums), (s_out, acc_out, top_out, sums_out), strict=True)
    return tuple(mosaic.as_registers(*x) for x in registers)

  prob, *new_state = compute(s, acc, top, sums)
  return prob, tuple(new_state)


def total(sums: jax.Array, *, interpret: bool) -> jax.Array:
  """f32[64] of the sums of `softmax_step`."""
  if interpret:
    return sums[:, 0]

  @mosaic.inline(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct((ROWS,), sums.dtype, layout=ROW))
  def compute(_, sums):
    layout, type_ = ROW.to_mgpu(), ir.VectorType.get((1,), ir.F32Type.get())
    registers = mgpu.FragmentedArray.splat(mgpu.utils.c(0.0, ir.F32Type.get()), (ROWS,), layout=layout).registers.copy()
    for half in range(2):
      of_warps = [arith.addf(*mosaic.values_of(x)) for x in sums.registers.reshape(-1, 2)[:, half]]
      for lanes in (1, 2):
        of_warps = [arith.addf(x, mgpu.utils.shfl_bfly(x, lanes)) for x in of_warps]
      a, b, c, d = of_warps
      registers.flat[half] = vector.from_elements(type_, [arith.addf(arith.addf(a, b), arith.addf(c, d))])
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

  return compute(sums)
