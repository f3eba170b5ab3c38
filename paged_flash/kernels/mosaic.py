"""What our Pallas Mosaic GPU kernels share: tiles in shared memory, matrix products, taking turns.

Written for Hopper (sm_90a). Each helper has one meaning on the GPU and in the CPU interpreter; where the interpreter of
JAX 0.11 lacks an instruction, `interpret` selects plain arithmetic with the same result.
"""

import functools
import heapq
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxpr_as_fun
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector

ACC: Any = plgpu.WGMMAAccumulatorRef
inline: Any = plgpu.inline_mgpu  # its type says that what it decorates keeps its arguments, which it does not
_tiling: Any = plgpu.TilingTransform  # abstract for a type checker, not when called
_swizzle: Any = plgpu.SwizzleTransform
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
WARPS = 4  # of a warpgroup
FIRST_BARRIER = 8  # of the named barriers; Mosaic takes the low ids
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value for each row of a wgmma tile
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one value for each column


def untyped(f: Callable[..., Any], *trees: Any) -> Any:
  """f(*trees), also where `jax.shard_map` types the arrays by the mesh axes they vary over.

  `plgpu.kernel` of JAX 0.11 cannot be traced with such arrays; what it traces to can be run with them.
  """
  leaves, structure = jax.tree.flatten(trees)
  if not any(jax.typeof(x).manual_axis_type.varying for x in leaves):
    return f(*trees)
  plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
  jaxpr, out = jax.make_jaxpr(lambda *x: f(*structure.unflatten(x)), return_shape=True)(*plain)
  return jax.tree.unflatten(jax.tree.structure(out), jaxpr_as_fun(jaxpr)(*leaves))


def transforms_of(shape: tuple[int, ...], dtype: Any, swizzle: int | None = None) -> tuple[Any, Any]:
  bits = 8 * jnp.dtype(dtype).itemsize
  swizzle = swizzle or plgpu.find_swizzle(shape[-1] * bits)
  return _tiling((8, 8 * swizzle // bits)), _swizzle(swizzle)


def smem(shape: tuple[int, ...], dtype: Any, swizzle: int | None = None) -> Any:
  """A tile in shared memory, tiled and swizzled as TMA and wgmma want it; by 128 bytes where they fit a row, if unsaid.

  Columns can be sliced in pieces of `swizzle` bytes.
  """
  return plgpu.SMEM(shape, dtype, transforms=transforms_of(shape, dtype, swizzle))


def whole_groups(x: jax.Array) -> jax.Array:
  """x [B, T, ...] with T padded to a multiple of 8: a TMA copy into tiles of 8 rows takes whole groups only."""
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8)) + ((0, 0),) * (x.ndim - 2))


def zero_rows(ref: Any, first: jax.Array, before: Any = None, *, threads: int = 128, interpret: bool) -> None:
  """Clears rows [first, end), and [0, before), of a tile [rows, columns] in shared memory.

  A warpgroup calls it, or, of 32 threads, a warp.
  """
  if interpret:
    row = jnp.arange(ref.shape[0])[:, None]
    ref[...] = jnp.where((row < first) & (row >= (0 if before is None else before)), ref[...], 0)
    return
  swizzle = plgpu.find_swizzle(ref.shape[1] * 16)

  ends = [first] if before is None else [first, before]

  @inline(arg_types=(plgpu.RefType(transforms_of(ref.shape, ref.dtype)), *[plgpu.Layout.WG_SPLAT for _ in ends]))
  def clear(_, ref, first, before=None):
    # Tiles of 8 rows lie one after the other, row by row; swizzling moves 16-byte pieces within a row only.
    i32, pieces = ir.IntegerType.get_signless(32), swizzle // 16
    constant = lambda x: mgpu.utils.c(x, i32)  # noqa: E731
    row_tiles, column_tiles = ir.MemRefType(ref.type).shape[:2]
    base = mgpu.utils.memref_ptr(ref)
    zero = mgpu.utils.c(0, i32)
    quad = vector.from_elements(ir.VectorType.get((4,), i32), [zero] * 4)
    thread = arith.remui(mgpu.utils.thread_idx(), constant(threads))
    count = row_tiles * column_tiles * 8 * pieces
    for index in range(cdiv(count, threads)):
      piece = arith.addi(thread, constant(threads * index))
      line = arith.divui(piece, constant(pieces))
      tile, row = arith.divui(line, constant(8)), arith.remui(line, constant(8))
      row = arith.addi(row, arith.muli(arith.divui(tile, constant(column_tiles)), constant(8)))
      outside = arith.cmpi(arith.CmpIPredicate.sge, row, first.registers.item())
      if before is not None:
        outside = arith.ori(outside, arith.cmpi(arith.CmpIPredicate.slt, row, before.registers.item()))
      if threads * (index + 1) > count:
        outside = arith.andi(outside, arith.cmpi(arith.CmpIPredicate.slt, piece, constant(count)))
      with mgpu.utils.when(outside):
        offset = arith.muli(piece, constant(16))
        llvm.store(quad, mgpu.utils.getelementptr(base, [offset], ir.IntegerType.get_signless(8)))

  clear(ref, *ends)


def to_bf16(word: Any, dtype: str) -> list[Any]:
  """Four 8-bit numbers in an i32 as bf16, two in an i32."""
  i32 = ir.IntegerType.get_signless(32)
  constant = lambda x: mgpu.utils.c(x, i32)  # noqa: E731

  def ptx(text, *args):
    return mgpu.utils.inline_ptx(text, *args, result_types=i32)

  def spread(x, filler, order):
    return ptx("prmt.b32 $0, $1, $2, $3;", x, constant(filler), constant(order))

  if dtype == "int8":
    # 0x43xx is 128 + xx for 7 bits xx; the sign bit alone makes 0x4300 or 0x4380, 128 or 256, to be subtracted.
    low, sign = arith.andi(word, constant(0x7F7F7F7F)), arith.andi(word, constant(0x80808080 - 2**32))
    return [
      ptx("sub.rn.bf16x2 $0, $1, $2;", spread(low, 0x43434343, order), spread(sign, 0x43434343, order))
      for order in (0x4140, 0x4342)
    ]
  # The bits below the sign are those of a bf16 with a smaller exponent, denormals included.
  exponent_bits = {"float8_e4m3fn": 4, "float8_e5m2": 5}[dtype]
  mask = 0x07F007F0 if exponent_bits == 4 else 0x0FE00FE0
  factor = (127 + 127 - (2 ** (exponent_bits - 1) - 1)) << 7  # 2 ** (127 - bias)
  pairs = []
  for order in (0x1404, 0x3424):  # each number in the high byte
    high = spread(word, 0, order)
    magnitude = arith.andi(arith.shrui(high, constant(8 - exponent_bits)), constant(mask))
    number = arith.ori(arith.andi(high, constant(0x80008000 - 2**32)), magnitude)
    pairs.append(ptx("mul.rn.bf16x2 $0, $1, $2;", number, constant(factor << 16 | factor)))
  return pairs


def full(shape: tuple[int, ...], value: float, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
  """A constant float32 array in registers."""
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def iota(shape: tuple[int, ...], dim: int) -> jax.Array:
  """i32 indices along `dim` of a wgmma tile."""
  return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=plgpu.Layout.WGMMA)


def across(x: jax.Array, like: jax.Array) -> jax.Array:
  """Broadcasts one value per row along the rows of `like`."""
  return lax.broadcast_in_dim(x, like.shape, [0])


def down(x: jax.Array, like: jax.Array) -> jax.Array:
  """Broadcasts one value per column down the columns of `like`."""
  return lax.broadcast_in_dim(x, like.shape, [1])


def cdiv(a: Any, b: Any) -> Any:
  """a / b rounded up, for a >= 0."""
  return -(-a // b) if isinstance(a, int) else lax.div(a + jnp.int32(b - 1), jnp.int32(b))


def keep(s: jax.Array, low: jax.Array | None, high: jax.Array | None, *, interpret: bool) -> jax.Array:
  """Scores s [M, N] where low <= column < high, -inf elsewhere; low and high are i32[M], one per row, or scalars.

  The comparison is with constants: a thread's columns of a wgmma tile are 8c and 8c + 1 plus 2 (lane % 4), so that part
  is subtracted from the ends once. Comparing with an index array would keep N / 4 of its values in registers.
  """
  low, high = (x if x is None else jnp.broadcast_to(x, s.shape[:1]) for x in (low, high))
  if interpret:
    j = iota(s.shape, 1)
    seen = True if low is None else across(low, s) <= j
    return jnp.where(seen if high is None else seen & (j < across(high, s)), s, -jnp.inf)
  ends = [(low, arith.CmpIPredicate.sge), (high, arith.CmpIPredicate.slt)]
  ends = [(plgpu.layout_cast(x, ROW), predicate) for x, predicate in ends if x is not None]
  layout = plgpu.Layout.WGMMA

  @inline(arg_types=(layout, *[ROW for _ in ends]), return_type=plgpu.ShapeDtypeStruct(s.shape, s.dtype, layout=layout))
  def cut(_, s, *limits):
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    constant = mgpu.utils.c
    lane = arith.remui(mgpu.utils.thread_idx(), constant(4, i32))
    base = arith.muli(lane, constant(2, i32))
    hidden = constant(float("-inf"), f32)
    limits = [[arith.subi(_scalar(x), base) for x in limit.registers.flat] for limit in limits]
    registers = s.registers.copy()
    for index, register in enumerate(s.registers.flat):
      tile, rest = divmod(index, s.shape[1] // 4)  # 64 rows
      group, half = divmod(rest, 2)  # 8 columns; rows r and r + 8
      values = []
      for element in range(2):
        value = vector.extract(register, dynamic_position=[], static_position=[element])
        for limit, (_, predicate) in zip(limits, ends, strict=True):
          inside = arith.cmpi(predicate, constant(8 * group + element, i32), limit[2 * tile + half])
          value = arith.select(inside, value, hidden)
        values.append(value)
      registers.flat[index] = vector.from_elements(register.type, values)
    return mgpu.FragmentedArray(_registers=registers, _layout=s.layout, _is_signed=None)

  return cut(s, *[x for x, _ in ends])


def after(x: jax.Array) -> jax.Array:
  """0, but known only once x [rows] >= 0 is: whoever uses it cannot be moved before x.

  ptxas hoists the wait for a wgmma over arithmetic that should hide it. A barrier arrival that needs the result of that
  arithmetic holds the wait back, for it may not pass memory operations.
  """

  @inline(arg_types=(ROW,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT))
  def zero(_, x):
    i32, bound = ir.IntegerType.get_signless(32), mgpu.utils.c(-1.0, ir.F32Type.get())
    below = [arith.cmpf(arith.CmpFPredicate.OLT, _scalar(r), bound) for r in x.registers.flat]
    return mgpu.FragmentedArray.splat(arith.extui(i32, functools.reduce(arith.ori, below)), (), is_signed=True)

  return zero(x)


def exponentials(s: jax.Array, factor: float, shift: jax.Array, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
  """2 ** (factor s - shift), shift one per row, and its row sums, a lane's columns only: `total` finishes them."""
  if interpret:
    out = jnp.exp2(s * factor - across(shift, s))
    return out, out.sum(axis=1)
  layout = plgpu.Layout.WGMMA

  @inline(
    arg_types=(layout, ROW),
    return_type=(
      plgpu.ShapeDtypeStruct(s.shape, s.dtype, layout=layout),
      plgpu.ShapeDtypeStruct(shift.shape, s.dtype, layout=ROW),
    ),
  )
  def compute(_, s, shift):
    f32 = ir.F32Type.get()
    scale = mgpu.utils.c(factor, f32)
    shifts = [arith.negf(_scalar(x)) for x in shift.registers.flat]
    registers, parts = s.registers.copy(), [[None] * 4, [None] * 4]  # four chains of additions for each row
    for index, register in enumerate(s.registers.flat):
      half = index % 2  # rows r and r + 8
      values = []
      for element in range(2):
        x = vector.extract(register, dynamic_position=[], static_position=[element])
        x = llvm.intr_fma(x, scale, shifts[half])
        values.append(exp2_of(x))
        chain = (index // 2 % 2) * 2 + element
        part = parts[half][chain]
        parts[half][chain] = values[-1] if part is None else arith.addf(part, values[-1])
      registers.flat[index] = vector.from_elements(register.type, values)
    sums = shift.registers.copy()
    for half, register in enumerate(shift.registers.flat):
      sums.flat[half] = vector.from_elements(register.type, [functools.reduce(arith.addf, parts[half])])
    return tuple(
      mgpu.FragmentedArray(_registers=x, _layout=like.layout, _is_signed=None)
      for x, like in ((registers, s), (sums, shift))
    )

  return compute(s, shift)


def exp2(x: jax.Array, *, interpret: bool) -> jax.Array:
  """2 ** x of a wgmma tile in one instruction each, 0 where that would be denormal."""
  if interpret:
    return jnp.exp2(x)
  layout = plgpu.Layout.WGMMA

  @inline(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout))
  def compute(_, x):
    out = x.registers.copy()
    for index, register in enumerate(x.registers.flat):
      values = [exp2_of(vector.extract(register, dynamic_position=[], static_position=[i])) for i in range(2)]
      out.flat[index] = vector.from_elements(register.type, values)
    return mgpu.FragmentedArray(_registers=out, _layout=x.layout, _is_signed=None)

  return compute(x)


def anew(x: jax.Array, *, interpret: bool) -> jax.Array:
  """The i32 scalar x, as if just computed: what follows from it is not kept in registers from one step to the next."""
  if interpret:
    return x
  scalar = plgpu.Layout.WG_SPLAT

  @inline(arg_types=(scalar,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=scalar))
  def move(_, x):
    return mgpu.FragmentedArray.splat(anew_value(x.registers.item()), (), is_signed=True)

  return move(x)


def anew_value(x: Any) -> Any:
  """The same of an i32 in a register."""
  i32 = ir.IntegerType.get_signless(32)
  return mgpu.utils.inline_ptx("mov.b32 $0, $1;", x, result_types=i32, has_side_effects=True)


def total(sums: jax.Array, *, interpret: bool) -> jax.Array:
  """Finishes the row sums of `exponentials` over the four lanes that share a row."""
  if interpret:
    return sums

  @inline(arg_types=(ROW,), return_type=plgpu.ShapeDtypeStruct(sums.shape, sums.dtype, layout=ROW))
  def add_lanes(_, sums):
    out = sums.registers.copy()
    for i, register in enumerate(sums.registers.flat):
      x = _scalar(register)
      for lanes in (1, 2):
        x = arith.addf(x, mgpu.utils.shfl_bfly(x, lanes))
      out.flat[i] = vector.from_elements(register.type, [x])
    return mgpu.FragmentedArray(_registers=out, _layout=sums.layout, _is_signed=None)

  return add_lanes(sums)


def rescale(acc: jax.Array, alpha: jax.Array, *, interpret: bool) -> jax.Array:
  """acc times alpha [rows], which never exceeds 1; each warp skips it where its alphas are all 1."""
  if interpret:
    return acc * across(alpha, acc)

  @inline(arg_types=(ROW,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT))
  def any_below_one(_, alpha):
    i32, one = ir.IntegerType.get_signless(32), mgpu.utils.c(1.0, ir.F32Type.get())
    below = [arith.cmpf(arith.CmpFPredicate.OLT, _scalar(r), one) for r in alpha.registers.flat]
    vote = nvvm.vote_sync(mgpu.utils.c(0xFFFFFFFF, i32), functools.reduce(arith.ori, below), "any")
    return mgpu.FragmentedArray.splat(arith.extui(i32, vote), (), is_signed=True)

  return lax.cond(any_below_one(alpha) != 0, lambda: acc * across(alpha, acc), lambda: acc)


def exp2_of(x: Any) -> Any:
  return mgpu.utils.inline_ptx("ex2.approx.ftz.f32 $0, $1;", x, result_types=ir.F32Type.get())


def _scalar(register: Any) -> Any:
  """The only element of a register."""
  return vector.extract(register, dynamic_position=[], static_position=[0])


def values_of(register: Any) -> list[Any]:
  """The elements of a register, a vector or one value."""
  if not isinstance(register.type, ir.VectorType):
    return [register]
  size = ir.VectorType(register.type).shape[0]
  return [vector.extract(register, dynamic_position=[], static_position=[i]) for i in range(size)]


def _register(like: Any, values: list[Any]) -> Any:
  return vector.from_elements(like.type, values) if isinstance(like.type, ir.VectorType) else values[0]


def as_registers(x: Any, registers: Any) -> Any:
  """An array of x's shape and layout that these registers hold."""
  return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)


def _layouts(acc: jax.Array, axis: int) -> tuple[Any, Any]:
  """Layouts of acc and of its values one per row (axis 0) or column (1): a wgmma tile, or one value of each thread."""
  splat = plgpu.Layout.WG_SPLAT
  return (plgpu.Layout.WGMMA, (ROW, COLUMN)[axis]) if acc.ndim == 2 else (splat, splat)


def _each(acc: Any, axis: int, index: int, values: list[list[Any]]) -> list[Any]:
  """Of values one per row or column, as their registers hold them, those of the elements of acc's register `index`."""
  if acc.registers.size == 1:
    return values[0]
  tile, rest = divmod(index, acc.shape[1] // 4)  # 64 rows; 8 columns, rows r and r + 8
  return values[rest // 2] if axis == 1 else values[2 * tile + rest % 2] * 2


def fold(state: tuple[Any, ...], part: tuple[Any, ...], factor: float, *, interpret: bool) -> Any:
  """Merges (acc, top, total) of some keys and of more keys, by the same instructions wherever it is called.

  Of a softmax over some keys, `top` is the greatest score, `total` the sum of 2 ** (factor (score - top)), and `acc`
  the sum of values with these weights. They are a wgmma tile and one value for each of its columns, or one value of
  each thread. No product is added to anything but by an explicit fma, so no compiler chooses how to round.
  """
  if interpret:
    top = jnp.maximum(state[1], part[1])
    shift = jnp.where(top == -jnp.inf, 0.0, rounded_product(top, factor))
    old, new = (jnp.where(x[1] == top, 1.0, jnp.exp2(rounded_product(x[1], factor) - shift)) for x in (state, part))
    columns = lambda x, like: down(x, like) if like.ndim == 2 else x  # noqa: E731
    acc = rounded_product(state[0], columns(old, state[0])) + rounded_product(part[0], columns(new, part[0]))
    return acc, top, rounded_product(state[2], old) + rounded_product(part[2], new)
  tile, column = _layouts(state[0], 1)
  shapes = [
    plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=y) for x, y in zip(state, (tile, column, column), strict=True)
  ]

  @inline(arg_types=(tile, column, column) * 2, return_type=tuple(shapes))
  def merge(_, acc, top, total, part, part_top, part_total):
    f32 = ir.F32Type.get()
    scale, zero, one, nothing = (mgpu.utils.c(x, f32) for x in (factor, 0.0, 1.0, float("-inf")))
    equal = arith.CmpFPredicate.OEQ
    accs, tops, totals = acc.registers.copy(), top.registers.copy(), total.registers.copy()
    weights = []
    for i, register in enumerate(top.registers.flat):
      now, sums = [], []
      pairs = zip(*map(values_of, (register, part_top.registers.flat[i])), strict=True)
      both_sums = zip(*map(values_of, (total.registers.flat[i], part_total.registers.flat[i])), strict=True)
      weights.append([])
      for (old, new), (x, y) in zip(pairs, both_sums, strict=True):
        both = arith.maximumf(old, new)
        shift = arith.select(arith.cmpf(equal, both, nothing), zero, arith.mulf(both, scale))
        # The greater one's weight is 1, not 2 to what rounding left: folding with nothing changes nothing.
        old, new = (
          arith.select(arith.cmpf(equal, z, both), one, exp2_of(llvm.intr_fma(z, scale, arith.negf(shift))))
          for z in (old, new)
        )
        weights[-1].append((old, new))
        now.append(both)
        sums.append(llvm.intr_fma(x, old, arith.mulf(y, new)))
      tops.flat[i], totals.flat[i] = _register(register, now), _register(register, sums)
    for i, register in enumerate(acc.registers.flat):
      parts = zip(values_of(register), values_of(part.registers.flat[i]), _each(acc, 1, i, weights), strict=True)
      accs.flat[i] = _register(register, [llvm.intr_fma(x, old, arith.mulf(y, new)) for x, y, (old, new) in parts])
    return as_registers(acc, accs), as_registers(top, tops), as_registers(total, totals)

  return merge(*state, *part)


def finish(state: tuple[Any, ...], sink: Any, factor: float, *, axis: int = 0, interpret: bool) -> tuple[Any, Any]:
  """Output and LSE (natural log) of a softmax as in `fold`; `sink`, if not None, is one more score without a value.

  0 and -inf where nothing was seen. There is one softmax for each row of a tile (axis 0) or for each column (1). By the
  same instructions wherever it is called.
  """
  if interpret:
    acc, top, total = state
    spread = (lambda x: x) if acc.ndim == 1 else lambda x: lax.broadcast_in_dim(x, acc.shape, [axis])
    both = rounded_product(top, factor)
    if sink is not None:
      sink = rounded_product(sink, LOG2_E)
      both, old = jnp.maximum(jnp.maximum(both, sink), -1e30), both
      scaled = jnp.exp2(old - both)
      acc = acc * spread(scaled)
      total = rounded_product(total, scaled) + jnp.exp2(sink - both)
    inverse = jnp.where(total > 0, 1 / total, 0.0)
    lse = jnp.where(total > 0, (both + jnp.log2(total)) * LN_2, -jnp.inf)
    return acc * spread(inverse), lse
  tile, row = _layouts(state[0], axis)
  shapes = [plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=y) for x, y in zip(state, (tile, row), strict=False)]

  @inline(arg_types=(tile, row, row, *([] if sink is None else [row])), return_type=tuple(shapes))
  def divide(_, acc, top, total, sink=None):
    f32 = ir.F32Type.get()
    scale, log2_e, zero = (mgpu.utils.c(x, f32) for x in (factor, LOG2_E, 0.0))
    accs, lses, weights = acc.registers.copy(), top.registers.copy(), []
    for i, register in enumerate(top.registers.flat):
      now = []
      weights.append([])
      sinks = [None] * len(values_of(register)) if sink is None else values_of(sink.registers.flat[i])
      for top_value, sum_value, s in zip(values_of(register), values_of(total.registers.flat[i]), sinks, strict=True):
        scaled = mgpu.utils.c(1.0, f32)
        if s is not None:
          both = arith.maximumf(arith.mulf(top_value, scale), arith.mulf(s, log2_e))
          both = arith.maximumf(both, mgpu.utils.c(-1e30, f32))  # finite where a row sees nothing and has no sink
          scaled = exp2_of(llvm.intr_fma(top_value, scale, arith.negf(both)))
          sum_value = llvm.intr_fma(sum_value, scaled, exp2_of(llvm.intr_fma(s, log2_e, arith.negf(both))))
          lse = arith.addf(both, _approximate("lg2", sum_value))
        else:
          lse = llvm.intr_fma(top_value, scale, _approximate("lg2", sum_value))
        alive = arith.cmpf(arith.CmpFPredicate.OGT, sum_value, zero)
        now.append(arith.select(alive, arith.mulf(lse, mgpu.utils.c(LN_2, f32)), mgpu.utils.c(float("-inf"), f32)))
        weights[-1].append((scaled, arith.select(alive, _approximate("rcp", sum_value), zero)))
      lses.flat[i] = _register(register, now)
    for i, register in enumerate(acc.registers.flat):
      pairs = zip(values_of(register), _each(acc, axis, i, weights), strict=True)
      values = [arith.mulf(x if sink is None else arith.mulf(x, scaled), inverse) for x, (scaled, inverse) in pairs]
      accs.flat[i] = _register(register, values)
    return as_registers(acc, accs), as_registers(top, lses)

  return divide(*state, *([] if sink is None else [sink]))


def rounded_product(x: Any, y: Any) -> Any:
  """x y, rounded: between it and a sum, bounds that nothing exceeds keep XLA on a CPU from making an fma of both."""
  return lax.clamp(-3e38, x * y, 3e38)


def _approximate(name: str, x: Any) -> Any:
  return mgpu.utils.inline_ptx(f"{name}.approx.ftz.f32 $0, $1;", x, result_types=ir.F32Type.get())


def divide(a: Any, b: int) -> tuple[Any, Any]:
  """Quotient and remainder, for a >= 0; `a` may be traced."""
  return (lax.div(a, jnp.int32(b)), lax.rem(a, jnp.int32(b))) if isinstance(a, jax.Array) else divmod(a, b)


def num_multiprocessors() -> int:
  """Of the GPU that is traced for; where there is none, those of an H100 or H200."""
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
  if device is None or isinstance(device, str):  # a string names a platform
    device = jax.devices(device)[0]
  if device.platform != "gpu":
    return 132
  return getattr(device, "num_cores", None) or getattr(device, "core_count", None) or 132


def deal(costs: Iterable[float], num_blocks: int) -> np.ndarray:
  """i32[blocks, 1 + n]: how many items each block has, and which: the next to the block that is free first."""
  free = [(0.0, block) for block in range(num_blocks)]
  rows = [[] for _ in range(num_blocks)]
  for index, cost in enumerate(costs):
    when, block = heapq.heappop(free)
    rows[block].append(index)
    heapq.heappush(free, (when + cost, block))
  table = np.zeros((num_blocks, 1 + max(len(row) for row in rows)), np.int32)
  for block, row in enumerate(rows):
    table[block, 0], table[block, 1 : 1 + len(row)] = len(row), row
  return table


def dealt(count: Any, block: Any, num_blocks: int) -> tuple[Any, Callable[[Any], Any]]:
  """How many of `count` (traced) items a block has, and the function that says which its n-th is.

  Items are dealt in rounds, back and forth: who comes first in one comes last in the next, so that blocks have about
  equal work where items in order cost less and less, or the more again every few rounds.
  """

  def place(n):
    return jnp.where(lax.rem(n, jnp.int32(2)) == 0, block, num_blocks - 1 - block)

  rounds, rest = lax.div(count, jnp.int32(num_blocks)), lax.rem(count, jnp.int32(num_blocks))
  return rounds + jnp.where(place(rounds) < rest, 1, 0), lambda n: n * num_blocks + place(n)


class Turn:
  """Warpgroups take turns at the tensor cores: one computes its softmax while another multiplies ("ping-pong").

  Nothing depends on it but speed, so the interpreter leaves it out. `pass_on` hands the turn to the next warpgroup,
  `wait` waits for it; both must be called equally often by all. Named barriers (PTX bar.arrive and bar.sync) are used,
  which are cheaper than barriers in memory.
  """

  def __init__(self, warpgroup: jax.Array, count: int, *, interpret: bool):
    self.warpgroup, self.count, self.off = warpgroup, count, interpret or count == 1

  def start(self) -> None:
    """Gives the first turn to warpgroup 0; every warpgroup calls it once."""
    if not self.off:
      pl.when(self.warpgroup == self.count - 1)(lambda: named("arrive", jnp.int32(0)))

  def wait(self) -> None:
    if not self.off:
      named("sync", self.warpgroup)

  def pass_on(self) -> None:
    if not self.off:
      named("arrive", lax.rem(self.warpgroup + 1, jnp.int32(self.count)))

  def finish(self) -> None:
    """Takes the turn that nobody waits for; every warpgroup calls it once, after its last `pass_on`."""
    if not self.off:
      pl.when(self.warpgroup == 0)(lambda: named("sync", jnp.int32(0)))


def begin_scores(query: Any, key: Any, *, swizzle: int | None = None) -> jax.Array:
  """`begin_matmul` of query [64, D], in registers or in shared memory, and key [N, D].T."""
  return begin_matmul(query, key, transpose_rhs=True, swizzle=swizzle)


def begin_matmul(
  lhs: Any, rhs: Any, *, transpose_lhs: bool = False, transpose_rhs: bool = False, swizzle: int | None = None
) -> jax.Array:
  """Issues lhs @ rhs [64, N] and returns the f32 result, which must be waited for (`plgpu.wgmma_wait`).

  `plgpu.wgmma` adds to an accumulator, so a fresh product needs zeros: N / 2 registers to be cleared before the first
  instruction. Here that instruction is told to ignore what the registers hold. `lhs` lies in registers or in shared
  memory, `rhs` in shared memory; `swizzle` as told to `smem`.
  """
  in_registers, columns = isinstance(lhs, jax.Array), rhs.shape[1]
  shape = (lhs.shape[1 if transpose_lhs else 0], rhs.shape[0 if transpose_rhs else 1])
  as_ref = lambda x: plgpu.RefType(transforms_of(x.shape, x.dtype, swizzle))  # noqa: E731

  @inline(
    arg_types=(plgpu.Layout.WGMMA if in_registers else as_ref(lhs), as_ref(rhs)),
    return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA),
  )
  def issue(_, lhs, rhs):
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    any_value = llvm.UndefOp(ir.VectorType.get((1,), f32)).result
    layout = plgpu.Layout._WGMMA_ACC_32BIT.to_mgpu()
    registers = np.full(layout.registers_shape(shape), any_value, dtype=object)
    start = mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
    accumulator = mgpu.WGMMAAccumulator(_value=start, _original_layout=plgpu.Layout.WGMMA.to_mgpu(), _sync=False)
    nvvm.wgmma_fence_aligned()
    ignore = mgpu.utils.c(0, i32)
    block = ir.InsertionPoint.current.block
    before = len(block.operations)
    turn = lambda x, is_turned: mgpu.memref_transpose(x, (1, 0, 3, 2)) if is_turned else x  # noqa: E731
    bytes_ = swizzle or plgpu.find_swizzle(columns * 16)
    product = mgpu.wgmma(accumulator, turn(lhs, transpose_lhs), turn(rhs, transpose_rhs), swizzle=bytes_)
    issued = [op for op in list(block.operations)[before:] if "asm_string" in op.attributes]
    first = next(op for op in issued if "wgmma.mma_async" in str(op.attributes["asm_string"]))
    # Its operands end with: whether to add, two signs, whether each operand in shared memory is transposed.
    first.operands[len(first.operands) - (4 if in_registers else 5)] = ignore
    mgpu.utils.inline_ptx("wgmma.commit_group.sync.aligned;", has_side_effects=True)
    return product.value

  return issue(lhs, rhs)


def add_matmul(acc: jax.Array, lhs: jax.Array, rhs: Any, *, interpret: bool) -> jax.Array:
  """acc + lhs @ rhs, acc and lhs in registers, rhs in shared memory."""
  if interpret:
    out = acc + jnp.dot(lhs, rhs[...], preferred_element_type=jnp.float32)
    plgpu.commit_smem()  # these reads end before a copy may overwrite what they read
    return out
  return pl.run_state(lambda ref: plgpu.wgmma(ref, lhs, rhs))(ACC.init(acc))


def matmul(lhs: Any, rhs: Any) -> jax.Array:
  """lhs @ rhs, both in shared memory; f32 in registers."""

  def product(acc):
    plgpu.wgmma(acc, lhs, rhs)
    return acc[...]

  return pl.run_scoped(product, ACC((lhs.shape[0], rhs.shape[1]), jnp.float32))


def one_warp(body: Callable[[], None]) -> None:
  """Runs a body in the first warp of a warpgroup."""

  @plgpu.warp_map
  def per_warp(warp):
    pl.when(warp == 0)(body)


def meet(count: int) -> None:
  """Waits for `count` warpgroups to get here; wgmma of all then sees what each wrote to shared memory."""

  @inline()
  def barrier(_):
    nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)
    mgpu.utils.inline_ptx(f"bar.sync {FIRST_BARRIER}, {128 * count};", has_side_effects=True)

  barrier()


def named(operation: str, index: jax.Array, *, publish: bool = False) -> None:
  """Two warpgroups at one of some named barriers: who says "arrive" goes on, and who says "sync" waits for the other.

  `publish`: what the warpgroup wrote to shared memory may be multiplied and may leave once the other has waited.
  """

  @inline(arg_types=(plgpu.Layout.WG_SPLAT,))
  def barrier(_, index):
    if publish:
      nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)
    mgpu.utils.inline_ptx(f"bar.{operation} $0, 256;", index.registers.item(), has_side_effects=True)

  barrier(index + FIRST_BARRIER)


def wait_for(counter: Any, value: jax.Array) -> None:
  """Waits, in one warp, until the i32[1] counter in global memory is at least `value`."""

  @inline(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
  def wait(_, counter, value):
    semaphore = mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(counter))
    semaphore.wait(value.registers.item(), decrement=False, scope=mgpu.ThreadSubset.WARP, memory_scope="gpu")
    mgpu.utils.inline_ptx("fence.proxy.async.global;", has_side_effects=True)

  wait(counter, value)


def signal(counter: Any, increment: jax.Array) -> None:
  """Adds, from one warp, to an i32[1] counter in global memory; what this warp wrote by TMA and waited for is seen."""

  @inline(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
  def add(_, counter, increment):
    mgpu.utils.inline_ptx("fence.proxy.async.global;", has_side_effects=True)
    one = mgpu.utils.single_thread_predicate(mgpu.ThreadSubset.WARP)
    semaphore = mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(counter))
    semaphore.signal(increment.registers.item(), predicate=one, memory_scope="gpu")

  add(counter, increment)


class Rows(NamedTuple):
  """Where rows r < count of a wgmma tile lie in an array [X, D] in global memory; the others lie nowhere."""

  first: Any
  count: Any
  group: int = 1  # rows that are `step` apart; their groups are `stride` apart
  stride: int = 1
  step: int = 1
  skip: Any = 0  # places of the first group that come before row 0
  index: Any = None  # ref i32[Y]: the n-th group is in the place of the index[at + n]-th, unless `at` is negative
  at: Any = None

  def place(self, r: jax.Array) -> jax.Array:
    """X of row r."""
    r = r + self.skip
    group = r // self.group
    if self.index is not None:
      group = jnp.where(self.at < 0, group, self.index[...][jnp.maximum(self.at, 0) + group])
    return self.first + group * self.stride + r % self.group * self.step

  def traced(self) -> list[Any]:
    """What `place_of` takes as values."""
    indexed = [] if self.index is None else [self.index, self.at]
    return [self.first, self.count, *indexed, *([] if isinstance(self.skip, int) else [self.skip])]

  def types(self) -> list[Any]:
    """Of `traced()`."""
    return [plgpu.RefType() if x is self.index else plgpu.Layout.WG_SPLAT for x in self.traced()]


def place_of(rows: Rows, row: Any, first: Any, count: Any, *more: Any) -> tuple[Any, Any]:
  """(whether a row lies somewhere, X as i64); first, count and more are `rows.traced()` in registers."""
  index, skip = (None, more) if rows.index is None else (more[0], more[2:])
  i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
  constant = lambda x: mgpu.utils.c(x, i32)  # noqa: E731
  alive = arith.cmpi(arith.CmpIPredicate.slt, row, count.registers.item())
  row = arith.addi(row, skip[0].registers.item()) if skip else row
  group = arith.divui(row, constant(rows.group))
  if index is not None:
    at = more[1].registers.item()
    is_indexed = arith.cmpi(arith.CmpIPredicate.sge, at, constant(0))
    y = arith.addi(arith.maxsi(at, constant(0)), group)
    pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(index), [arith.extsi(i64, y)], i32)
    group = arith.select(is_indexed, llvm.load(i32, pointer), group)
  place = arith.addi(first.registers.item(), arith.muli(group, constant(rows.stride)))
  place = arith.addi(place, arith.muli(arith.remui(row, constant(rows.group)), constant(rows.step)))
  return alive, arith.extsi(i64, place)


def _places(rows: Rows, *traced: Any) -> list[tuple[Any, Any]]:
  """`place_of` of a thread's two rows of a wgmma tile."""
  i32 = ir.IntegerType.get_signless(32)
  constant = lambda x: mgpu.utils.c(x, i32)  # noqa: E731
  thread = arith.remui(mgpu.utils.thread_idx(), constant(128))
  warp, lane = arith.divui(thread, constant(32)), arith.remui(thread, constant(32))
  top = arith.addi(arith.muli(warp, constant(16)), arith.divui(lane, constant(4)))
  return [place_of(rows, arith.addi(top, constant(8 * half)), *traced) for half in range(2)]  # rows r and r + 8


def _row_pointer(ref: Any, place: Any) -> Any:
  """Address of this thread's first value in a row of `ref` [X, D], or of the row's value in `ref` [X]."""
  i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
  memref = ir.MemRefType(ref.type)
  if len(memref.shape) == 2:
    place = arith.muli(place, mgpu.utils.c(memref.shape[1], i64))
    pair = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(4, i32))
    place = arith.addi(place, arith.extui(i64, arith.muli(pair, mgpu.utils.c(2, i32))))
  return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [place], memref.element_type)


def load_rows(ref: Any, rows: Rows, *, interpret: bool) -> jax.Array:
  """[64, D] rows of `ref` [X, D], or [64] values of `ref` [X], in registers; 0 for rows that lie nowhere."""
  shape = (64, *ref.shape[1:])
  if interpret:
    alive = jnp.arange(64) < rows.count
    x = ref[...][jnp.where(alive, rows.place(jnp.arange(64)), 0)]
    return jnp.where(alive[:, None] if x.ndim == 2 else alive, x, 0)
  layout = plgpu.Layout.WGMMA if len(shape) == 2 else ROW

  @inline(
    arg_types=(plgpu.RefType(), *rows.types()),
    return_type=plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout),
  )
  def load(_, ref, *traced):
    places = _places(rows, *traced)
    i64, element = ir.IntegerType.get_signless(64), ir.MemRefType(ref.type).element_type
    safe = arith.extsi(i64, traced[0].registers.item())
    width = len(shape)  # values of a register
    vector_type = ir.VectorType.get((width,), element)
    nothing = vector.broadcast(vector_type, mgpu.utils.c(0.0, element))
    pointers = [_row_pointer(ref, arith.select(alive, place, safe)) for alive, place in places]
    registers = np.empty(layout.to_mgpu().registers_shape(shape), dtype=object)
    for index in range(registers.size):
      column, half = divmod(index, 2)  # 8 columns
      value = llvm.load(vector_type, mgpu.utils.getelementptr(pointers[half], [8 * column], element))
      registers.flat[index] = arith.select(places[half][0], value, nothing)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

  return load(ref, *rows.traced())


def store_rows(ref: Any, rows: Rows, x: jax.Array, *, interpret: bool) -> None:
  """Writes [64, D] rows to `ref` [X, D], or [64] values to `ref` [X]."""
  if interpret:

    @pl.loop(0, rows.count)
    def _(r):
      ref[pl.ds(rows.place(r), 1)] = lax.dynamic_slice_in_dim(x, r, 1)

    return
  is_row = x.ndim == 1

  @inline(arg_types=(plgpu.RefType(), ROW if is_row else plgpu.Layout.WGMMA, *rows.types()))
  def store(_, ref, x, *traced):
    i32, element = ir.IntegerType.get_signless(32), ir.MemRefType(ref.type).element_type
    places = _places(rows, *traced)
    lane = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(4, i32))
    is_first = arith.cmpi(arith.CmpIPredicate.eq, lane, mgpu.utils.c(0, i32))
    for half, (alive, place) in enumerate(places):
      registers, columns = list(x.registers.flat[half::2]), 8  # from one to the next
      if is_row:  # one value for each row, known to four lanes
        alive = arith.andi(alive, is_first)
      elif mgpu.utils.bitwidth(element) == 16:  # 16 bytes at a time: whole sectors of memory
        words = [llvm.bitcast(i32, register) for register in registers]
        turned = [_turn_quad(words[i : i + 4]) for i in range(0, len(words), 4)]
        registers, columns = [vector.from_elements(ir.VectorType.get((4,), i32), x) for x in turned], 32
      with mgpu.utils.when(alive):
        pointer = _row_pointer(ref, place)
        if columns == 32:  # past the columns of the lane in the first 8, to its own 8 of the first 32
          skip = arith.muli(lane, mgpu.utils.c(6, i32))
          pointer = mgpu.utils.getelementptr(pointer, [skip], element)
        for group, register in enumerate(registers):
          llvm.store(register, mgpu.utils.getelementptr(pointer, [columns * group], element))

  store(ref, x, *rows.traced())


def _turn_quad(words: list[Any]) -> list[Any]:
  """Word i of lane j of four for word j of lane i, four words in each lane."""
  i32 = ir.IntegerType.get_signless(32)
  lane = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(4, i32))
  for distance in (1, 2):
    bit = arith.andi(lane, mgpu.utils.c(distance, i32))
    is_upper = arith.cmpi(arith.CmpIPredicate.ne, bit, mgpu.utils.c(0, i32))
    turned: list[Any] = [None] * 4
    for low in (i for i in range(4) if not i & distance):
      high = low + distance
      theirs = mgpu.utils.shfl_bfly(arith.select(is_upper, words[low], words[high]), distance)
      turned[low] = arith.select(is_upper, theirs, words[low])
      turned[high] = arith.select(is_upper, words[high], theirs)
    words = turned
  return words


@jax.named_scope("copy_rows")
def copy_rows(ref: Any, rows: Rows, tile: Any, *, num_threads: int, turned: bool = False, interpret: bool) -> None:
  """Copies rows of `ref` [X, D] to a tile [N, D] in shared memory, 0 for rows that lie nowhere.

  A warp calls it (32 threads), or a warpgroup (128). Without registers in between (PTX cp.async), 16 bytes at a time.
  wgmma sees them too, after a barrier. `turned`: columns change places as `columns_sm90.widen` says, two at a time.
  """
  if interpret:
    row = jnp.arange(tile.shape[0])
    x = ref[...][jnp.where(row < rows.count, rows.place(row), 0)]
    tile[...] = jnp.where((row < rows.count)[:, None], x, 0)
    plgpu.commit_smem()
    return
  swizzle = plgpu.find_swizzle(tile.shape[1] * 16)

  @inline(arg_types=(plgpu.RefType(), plgpu.RefType(transforms_of(tile.shape, tile.dtype)), *rows.types()))
  def copy(_, ref, to, *traced):
    # As in `zero_rows`; swizzling exchanges the 16-byte pieces of a row: piece p of row r comes to p ^ r, modulo 8.
    assert swizzle == 128
    i32, i64, i8 = (ir.IntegerType.get_signless(bits) for bits in (32, 64, 8))
    constant = lambda x: mgpu.utils.c(x, i32)  # noqa: E731
    part = lambda x, low, count: arith.remui(arith.divui(x, constant(low)), constant(count))  # noqa: E731
    row_tiles, column_tiles = ir.MemRefType(to.type).shape[:2]
    size = 4 if turned else 16
    to, pieces = mgpu.utils.memref_ptr(to), 128 // size * column_tiles
    source = llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.utils.memref_ptr(ref))
    safe = arith.extsi(i64, traced[0].registers.item())
    thread = arith.remui(mgpu.utils.thread_idx(), constant(num_threads))
    count = row_tiles * 8 * pieces
    for index in range(cdiv(count, num_threads)):
      piece = arith.addi(thread, constant(num_threads * index))
      row, column = arith.divui(piece, constant(pieces)), arith.remui(piece, constant(pieces))
      alive, place = place_of(rows, row, *traced)
      place = arith.muli(arith.select(alive, place, safe), mgpu.utils.c(size * pieces, i64))
      place = arith.addi(place, arith.extui(i64, arith.muli(column, constant(size))))
      inside = constant(0)
      if turned:  # pair 32 q + 8 c + i is pair c of piece 8 q + i
        inside = arith.muli(part(column, 8, 4), constant(4))
        column = arith.addi(arith.muli(arith.divui(column, constant(32)), constant(8)), part(column, 1, 8))
      tile = arith.muli(arith.divui(row, constant(8)), constant(column_tiles))
      tile, row = arith.addi(tile, arith.divui(column, constant(8))), arith.remui(row, constant(8))
      line = arith.addi(arith.muli(tile, constant(8)), row)
      column = arith.xori(arith.remui(column, constant(8)), row)
      offset = arith.muli(arith.addi(arith.muli(line, constant(8)), column), constant(16))
      with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, piece, constant(count))):
        nvvm.cp_async_shared_global(
          mgpu.utils.getelementptr(to, [arith.addi(offset, inside)], i8),
          mgpu.utils.getelementptr(source, [place], i8),
          size,
          nvvm.LoadCacheModifierKind.CA if turned else nvvm.LoadCacheModifierKind.CG,
          cp_size=arith.select(alive, constant(size), constant(0)),
        )
    nvvm.cp_async_commit_group()
    nvvm.cp_async_wait_group(0)
    nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

  copy(ref, tile, *rows.traced())


def publish(*, interpret: bool) -> None:
  """What this warp wrote to shared memory is seen by wgmma of those who wait for a barrier at which it arrives next."""
  if interpret:
    plgpu.commit_smem()
    return

  @inline()
  def fence(_):
    nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

  fence()


def fill_rows(ref: Any, first: Any, count: Any, value: float, *, interpret: bool) -> None:
  """Writes `value` to the rows [first, first + count) of `ref` [X, D], D a multiple of 8, or [X]; a warp calls it."""
  if interpret:

    @pl.loop(first, first + count)
    def _(row):
      ref[pl.ds(row, 1)] = jnp.full((1, *ref.shape[1:]), value, ref.dtype)

    return
  scalar = plgpu.Layout.WG_SPLAT

  @inline(arg_types=(plgpu.RefType(), scalar, scalar))
  def fill(_, ref, first, count):
    i32, i64, memref = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64), ir.MemRefType(ref.type)
    constant = lambda x: mgpu.utils.c(x, i64)  # noqa: E731
    size, width = memref.shape[1:] or [1], 8 if memref.rank == 2 else 1  # elements of a row, and those stored at once
    first, count = (arith.muli(arith.extsi(i64, x.registers.item()), constant(size[0])) for x in (first, count))
    lane = arith.extui(i64, arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(32, i32)))
    x = mgpu.utils.c(value, memref.element_type)
    x = vector.broadcast(ir.VectorType.get((width,), memref.element_type), x)
    loop = scf.ForOp(arith.muli(lane, constant(width)), count, constant(32 * width))
    with ir.InsertionPoint(loop.body):
      place = arith.addi(first, loop.induction_variable)
      llvm.store(x, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [place], memref.element_type))
      scf.yield_([])

  fill(ref, first, count)


# --- scalars that differ from thread to thread ------------------------------------------------------------------------
# To Pallas they are scalars like others, which it computes in every thread; they must not decide who takes a branch
# or what a tile is computed from. Not in the interpreter.


def thread() -> jax.Array:
  """i32, this thread's index in its warpgroup."""

  @inline(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT))
  def index(_):
    i32 = ir.IntegerType.get_signless(32)
    return mgpu.FragmentedArray.splat(arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(128, i32)), (), is_signed=True)

  return index()


def over_warp(operation: str, x: jax.Array) -> jax.Array:
  """The i32 scalars of the 32 lanes of a warp reduced by "add" or "max", or before each lane's the sum ("before")."""
  scalar = plgpu.Layout.WG_SPLAT

  @inline(arg_types=(scalar,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=scalar))
  def reduce(_, x):
    i32 = ir.IntegerType.get_signless(32)
    value, constant = x.registers.item(), lambda x: mgpu.utils.c(x, i32)
    if operation != "before":
      text = f"redux.sync.{operation}.s32 $0, $1, 0xffffffff;"
      return mgpu.FragmentedArray.splat(
        mgpu.utils.inline_ptx(text, value, result_types=i32, has_side_effects=True, convergent=True), (), is_signed=True
      )
    lane, total = arith.remui(mgpu.utils.thread_idx(), constant(32)), value
    for distance in (1, 2, 4, 8, 16):
      text = f"shfl.sync.up.b32 $0, $1, {distance}, 0, 0xffffffff;"
      below = mgpu.utils.inline_ptx(text, total, result_types=i32, has_side_effects=True, convergent=True)
      is_there = arith.cmpi(arith.CmpIPredicate.uge, lane, constant(distance))
      total = arith.addi(total, arith.select(is_there, below, constant(0)))
    return mgpu.FragmentedArray.splat(arith.subi(total, value), (), is_signed=True)

  return reduce(x)


def of_lane(x: jax.Array, lane: int) -> jax.Array:
  """The i32 scalar x of one lane of a warp, in all of them."""
  scalar = plgpu.Layout.WG_SPLAT

  @inline(arg_types=(scalar,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=scalar))
  def shuffle(_, x):
    i32, text = ir.IntegerType.get_signless(32), f"shfl.sync.idx.b32 $0, $1, {lane}, 31, 0xffffffff;"
    value = mgpu.utils.inline_ptx(text, x.registers.item(), result_types=i32, has_side_effects=True, convergent=True)
    return mgpu.FragmentedArray.splat(value, (), is_signed=True)

  return shuffle(x)


def store_value(ref: Any, row: Any, column: Any, x: jax.Array, where: Any) -> None:
  """ref[row, column] = x, or ref[row] = x if column is None, in the threads where `where`."""
  scalar = plgpu.Layout.WG_SPLAT
  places = [row] if column is None else [row, column]

  @inline(arg_types=(plgpu.RefType(), scalar, scalar, *[scalar for _ in places]))
  def store(_, ref, x, where, row, column=None):
    i64, memref = ir.IntegerType.get_signless(64), ir.MemRefType(ref.type)
    place = arith.extsi(i64, row.registers.item())
    if column is not None:
      place = arith.muli(place, mgpu.utils.c(memref.shape[1], i64))
      place = arith.addi(place, arith.extsi(i64, column.registers.item()))
    pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [place], memref.element_type)
    with mgpu.utils.when(where.registers.item()):
      llvm.store(x.registers.item(), pointer)

  store(ref, x, where, *places)
