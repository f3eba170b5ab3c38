"""Attention with a query in each column: scores are S^T = K Q^T, outputs O^T = V^T P^T.

A wgmma always has 64 rows or more, but 8 columns do. Where few queries meet many keys, keys and head_dim are its rows
therefore, and no row is wasted: the softmax of 8 queries costs an eighth of one padded to 64. And a left operand may
come from registers, so that 8-bit keys and values are widened on their way there and never return to shared memory.

Tiles are wgmma tiles in registers (`plgpu.Layout.WGMMA`); what there is one of for each query is in `COLUMN`s. A thread
(warp w, lane 4 r + c of a warpgroup) holds rows 64 m + 16 w + r + 8 h of columns 8 j + 2 c and the next.

Of 8-bit tiles a thread widens what it loads at once, many neighbours, so that the order of head_dim is another than in
memory. For scores it does not matter but must be that of the queries as well (`mosaic.copy_rows`, `turned`). Rows of
O^T are put back by whoever stores them (`store`, `turned`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from paged_flash.kernels import mosaic
from paged_flash.kernels.mosaic import ACC, COLUMN, ROW, WARPS, Rows, across, down

TILE = plgpu.Layout.WGMMA


@jax.named_scope("product")
def product(lhs: Any, rhs: Any, acc: jax.Array | None = None, *, turned: bool = False, interpret: bool) -> jax.Array:
  """lhs @ rhs.T, plus `acc`: f32[M, N].

  lhs [M, K] lies in registers or in shared memory, there [K, M] if `turned`; rhs [N, K] lies in shared memory.
  """
  if interpret:
    x = lhs if isinstance(lhs, jax.Array) else lhs[...]
    out = jnp.dot(x.T if turned else x, rhs[...].T, preferred_element_type=jnp.float32)
    plgpu.commit_smem()  # these reads end before a copy may overwrite what they read
    return out if acc is None else acc + out
  lhs, rhs = lhs.T if turned else lhs, rhs.T
  if acc is not None:
    return pl.run_state(lambda ref: plgpu.wgmma(ref, lhs, rhs))(ACC.init(acc))

  def from_zero(acc):
    plgpu.wgmma(acc, lhs, rhs)
    return acc[...]

  return pl.run_scoped(from_zero, ACC((lhs.shape[0], rhs.shape[1]), jnp.float32))


def _constant(x: int) -> Any:
  return mgpu.utils.c(x, ir.IntegerType.get_signless(32))


def _thread() -> tuple[Any, Any, Any]:
  """Warp, r and c of a thread."""
  thread = arith.remui(mgpu.utils.thread_idx(), _constant(128))
  lane = arith.remui(thread, _constant(32))
  return arith.divui(thread, _constant(32)), arith.divui(lane, _constant(4)), arith.remui(lane, _constant(4))


def _columns(register: Any) -> list[Any]:
  """A register's two columns."""
  return [vector.extract(register, dynamic_position=[], static_position=[e]) for e in range(2)]


def _by_group(x: Any) -> list[list[Any]]:
  """The registers of a wgmma tile for each 8 columns, a thread's rows in order."""
  rows, groups = x.registers.shape[:2]
  flat = x.registers.reshape(rows, groups, 2)
  return [[flat[m, j, half] for m in range(rows) for half in range(2)] for j in range(groups)]


def _over_warps(values: list[Any], combine: Any, scratch: Any) -> Any:
  """Combines each thread's values, two columns of 8 after two, over the warpgroup; scratch f32[WARPS, N].

  Returns a function of the number of 8 columns: this thread's two of them. They wait in the scratch, not in registers.
  """
  warp, r, c = _thread()
  f32, num_columns = ir.F32Type.get(), 4 * len(values)
  for distance in (4, 8, 16):
    values = [combine(x, mgpu.utils.shfl_bfly(x, distance)) for x in values]
  pair, base = ir.VectorType.get((2,), f32), mgpu.utils.memref_ptr(scratch)
  first = arith.muli(c, _constant(2))
  mine = mgpu.utils.getelementptr(base, [arith.addi(arith.muli(warp, _constant(num_columns)), first)], f32)
  with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, r, _constant(0))):
    for j in range(len(values) // 2):
      place = mgpu.utils.getelementptr(mine, [8 * j], f32)
      llvm.store(vector.from_elements(pair, values[2 * j : 2 * j + 2]), place)
  mgpu.utils.warpgroup_barrier()
  base = mgpu.utils.getelementptr(base, [first], f32)

  def combined(j):
    places = [mgpu.utils.getelementptr(base, [num_columns * w + 8 * j], f32) for w in range(WARPS)]
    of_warps = [_columns(llvm.load(pair, place)) for place in places]
    return [combine(combine(a, b), combine(c, d)) for a, b, c, d in zip(*of_warps, strict=True)]

  return combined


def _column_type(num_columns: int) -> Any:
  return plgpu.ShapeDtypeStruct((num_columns,), jnp.float32, layout=COLUMN)


def _as_columns(values: list[Any]) -> Any:
  """A COLUMN array of a thread's values."""
  layout, pair = COLUMN.to_mgpu(), ir.VectorType.get((2,), ir.F32Type.get())
  registers = np.empty(layout.registers_shape((4 * len(values),)), dtype=object)
  for j in range(registers.size):
    registers.flat[j] = vector.from_elements(pair, values[2 * j : 2 * j + 2])
  return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def greatest_so_far(before: Any, here: Any, factor: float, masked: bool) -> tuple[Any, Any, Any]:
  """(greatest score, minus what is subtracted from scores times `factor`, factor of what came before) in registers.

  Of the greatest score before and that of these keys, of one query. For rows as for columns: their bits are the same.
  """
  f32 = ir.F32Type.get()
  scale = mgpu.utils.c(factor, f32)
  new = arith.maximumf(before, here)
  shift = arith.mulf(new, scale)
  if masked:
    is_nothing = arith.cmpf(arith.CmpFPredicate.OEQ, new, mgpu.utils.c(float("-inf"), f32))
    shift = arith.select(is_nothing, mgpu.utils.c(0.0, f32), shift)
  minus = arith.negf(shift)
  alpha = mosaic.exp2_of(llvm.intr_fma(before, scale, minus))
  is_greater = arith.cmpf(arith.CmpFPredicate.OGT, new, before)
  return new, minus, arith.select(is_greater, alpha, mgpu.utils.c(1.0, f32))


@jax.named_scope("softmax")
def softmax_step(
  s: jax.Array, state: tuple[jax.Array, ...], factor: float, scratch: Any, *, masked: bool, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """One step of online softmax (Milakov and Gimelshein 2018): of scores s [M, N], more rows of each column.

  Args:
    s: f32[M, N], not yet multiplied by `factor`.
    state: (acc f32[D, N], greatest score f32[N], sums f32[N]); sums are those of a thread's rows, see `total`.
    factor: What scores are multiplied by.
    scratch: f32[WARPS, N] in shared memory. The warpgroup has passed a barrier since it last used it.
    masked: Whether all scores of a column may be -inf.

  Returns:
    P = 2 ** (factor s - factor greatest), and the state with acc and sums of before at the new scale.

  A column's bits must depend neither on the program around, hence fmas that no compiler chooses, nor on the columns
  beside it: where the greatest score stays, acc and sums do, exactly.
  """
  acc, top, total = state
  if interpret:
    new_top = jnp.maximum(top, s.max(axis=0))
    shift = new_top * factor
    shift = jnp.where(new_top == -jnp.inf, 0.0, shift) if masked else shift
    alpha = jnp.exp2(mosaic.rounded_product(top, factor) - shift)
    alpha = jnp.where(new_top > top, alpha, 1.0)
    prob = jnp.exp2(s * factor - down(shift, s))
    total = mosaic.rounded_product(total, alpha) + prob.sum(axis=0)
    return prob, (acc * down(alpha, acc), new_top, total)
  types = [plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=TILE) for x in (s, acc)]
  types += [_column_type(s.shape[1])] * 2

  @mosaic.inline(arg_types=(TILE, TILE, COLUMN, COLUMN, plgpu.RefType()), return_type=tuple(types))
  def compute(_, s, acc, top, total, scratch):
    scale = mgpu.utils.c(factor, ir.F32Type.get())
    greatest = []
    for registers in _by_group(s):
      for column in zip(*map(_columns, registers), strict=True):
        greatest.append(functools.reduce(arith.maximumf, column))
    combined = _over_warps(greatest, arith.maximumf, scratch)
    places_of = lambda registers, j: [x for x in np.ndindex(registers.shape) if x[1] == j]  # noqa: E731
    s_out, acc_out, tops, totals = s.registers.copy(), acc.registers.copy(), [], []
    # Eight columns after eight: a wide tile's maxima, shifts and factors all at once are more than registers hold.
    for j, (old_top, old_total) in enumerate(zip(top.registers.flat, total.registers.flat, strict=True)):
      columns = []
      for before, here, old in zip(_columns(old_top), combined(j), _columns(old_total), strict=True):
        columns.append((*greatest_so_far(before, here, factor, masked), old))
      sums = [None, None]
      for place in places_of(s_out, j):
        values = [
          mosaic.exp2_of(llvm.intr_fma(x, scale, minus))
          for x, (_, minus, _, _) in zip(_columns(s_out[place]), columns, strict=True)
        ]
        sums = [x if y is None else arith.addf(y, x) for x, y in zip(values, sums, strict=True)]
        s_out[place] = vector.from_elements(s_out[place].type, values)
      alphas = vector.from_elements(old_top.type, [alpha for _, _, alpha, _ in columns])
      for place in places_of(acc_out, j):
        acc_out[place] = arith.mulf(acc_out[place], alphas)
      tops += [new for new, *_ in columns]
      totals += [llvm.intr_fma(old, alpha, x) for (_, _, alpha, old), x in zip(columns, sums, strict=True)]
    return mosaic.as_registers(s, s_out), mosaic.as_registers(acc, acc_out), _as_columns(tops), _as_columns(totals)

  prob, acc, top, total = compute(s, acc, top, total, scratch)
  return prob, (acc, top, total)


def total(sums: jax.Array, scratch: Any, *, interpret: bool) -> jax.Array:
  """Finishes the sums of `softmax_step` over the threads that share a column; scratch as there."""
  if interpret:
    return sums

  @mosaic.inline(arg_types=(COLUMN, plgpu.RefType()), return_type=_column_type(sums.shape[0]))
  def compute(_, sums, scratch):
    values = [x for register in sums.registers.flat for x in _columns(register)]
    combined = _over_warps(values, arith.addf, scratch)
    return _as_columns([x for j in range(len(values) // 2) for x in combined(j)])

  return compute(sums, scratch)


def put(x: jax.Array, tile: Any, *, interpret: bool) -> None:
  """Writes x [M, N], of 16 bits, to a tile [N, M] in shared memory (PTX stmatrix)."""
  if interpret:
    tile[...] = x.T
    return

  @mosaic.inline(arg_types=(TILE, plgpu.RefType(mosaic.transforms_of(tile.shape, tile.dtype))))
  def store(_, x, tile):
    # Two tiles of 8 x 64 at a time, four 8 x 8 matrices. Lane l says where row l % 8 of matrix l // 8 goes, 16 bytes;
    # swizzling exchanges the 16-byte pieces of a row.
    i32, i8, tile_bytes = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8), 1024
    warp, r, c = _thread()
    lane = arith.addi(arith.muli(r, _constant(4)), c)
    n, matrix = arith.remui(lane, _constant(8)), arith.divui(lane, _constant(8))
    half, second = arith.remui(matrix, _constant(2)), arith.divui(matrix, _constant(2))
    piece = arith.xori(arith.addi(arith.muli(warp, _constant(2)), half), n)
    line = arith.addi(arith.muli(n, _constant(128)), arith.muli(piece, _constant(16)))
    line = arith.addi(line, arith.muli(second, _constant(tile_bytes)))
    halves = [
      [llvm.bitcast(i32, y) for y in group[i : i + 2]] for group in _by_group(x) for i in range(0, len(group), 2)
    ]
    for first in range(0, len(halves), 2):
      words = sum(halves[first : first + 2], [])
      place = mgpu.utils.getelementptr(
        mgpu.utils.memref_ptr(tile), [arith.addi(line, _constant(tile_bytes * first))], i8
      )
      names = ", ".join(f"${n + 1}" for n in range(len(words)))
      mgpu.utils.inline_ptx(
        f"stmatrix.sync.aligned.m8n8.x{len(words)}.trans.shared.b16 [$0], {{{names}}};",
        llvm.ptrtoint(i32, place),
        *words,
        has_side_effects=True,
      )

  store(x, tile)


def widen(tile: Any, *, turned: bool, interpret: bool) -> jax.Array:
  """bf16 [rows, D] of an 8-bit tile [rows, D] in shared memory, or its transpose if `turned`, in registers.

  Of D, 64 q + 16 c + 2 i + e comes to column 64 q + 8 i + 2 c + e, or D / 32 (8 w + r) + 2 m + h to row
  64 m + 16 w + r + 8 h if `turned`. 8-bit floats are taken as finite.
  """
  if interpret:
    x = tile[...].astype(jnp.bfloat16)
    x = jnp.where(jnp.isnan(x), 0, x)
    return x.T if turned else x
  dtype, (num_rows, D) = str(tile.dtype), tile.shape
  shape = (D, num_rows) if turned else (num_rows, D)

  @mosaic.inline(
    arg_types=(plgpu.RefType(mosaic.transforms_of(tile.shape, tile.dtype)),),
    return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=TILE),
  )
  def convert(_, tile):
    i8, i32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    layout = TILE.to_mgpu()
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    flat = registers.reshape(shape[0] // 64, shape[1] // 8, 2)
    multiply, add = lambda x, n: arith.muli(x, _constant(n)), arith.addi  # noqa: E731
    width = min(128, D)  # bytes of a row of a tile of 8 rows, whose 16-byte pieces swizzling exchanges
    column_tiles, base = D // width, mgpu.utils.memref_ptr(tile)
    load = lambda type_, offset, more: llvm.load(  # noqa: E731
      type_, mgpu.utils.getelementptr(mgpu.utils.getelementptr(base, [offset], i8), [more], i8)
    )
    as_pair = lambda word: llvm.bitcast(pair, word)  # noqa: E731
    warp, r, c = _thread()
    if not turned:
      line = add(multiply(warp, 16 * column_tiles * width), multiply(r, width))
      turn = r if width == 128 else arith.divui(r, _constant(2))
      left = arith.xori(c, arith.remui(turn, _constant(width // 16)))
      places = [add(line, multiply(arith.xori(left, _constant(4 * q)), 16)) for q in range(width // 64)]
      four = ir.VectorType.get((4,), i32)
      for m, half, q in np.ndindex(num_rows // 64, 2, D // 64):
        column_tile, piece = divmod(64 * q, width)
        more = (8 * m + half) * column_tiles * 8 * width + column_tile * 8 * width
        words = load(four, places[piece // 64], more)
        for n, word in enumerate(mosaic.values_of(words)):
          for i, x in enumerate(mosaic.to_bf16(word, dtype)):
            flat[m, 8 * q + 2 * n + i, half] = as_pair(x)
      return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
    size = D // 32  # neighbours that a thread loads at once
    first = multiply(add(multiply(warp, 8), r), size)
    column_tile, first = arith.divui(first, _constant(width)), arith.remui(first, _constant(width))
    piece, inside = arith.divui(first, _constant(16)), arith.remui(first, _constant(16))
    places = []
    for e in range(2):
      row = add(multiply(c, 2), _constant(e))
      turn = row if width == 128 else c
      place = add(multiply(column_tile, 8 * width), multiply(row, width))
      places.append(add(place, add(multiply(arith.xori(piece, turn), 16), inside)))
    words_type = {2: ir.IntegerType.get_signless(16), 4: i32, 8: ir.VectorType.get((2,), i32)}[size]
    for j in range(num_rows // 8):
      both = [load(words_type, place, j * column_tiles * 8 * width) for place in places]
      both = [[arith.extui(i32, x)] if size == 2 else mosaic.values_of(x) for x in both]
      slot = 0
      for a, b in zip(*both, strict=True):
        for order in (0x5140, 0x7362)[: 1 if size == 2 else 2]:
          mixed = mgpu.utils.inline_ptx("prmt.b32 $0, $1, $2, $3;", a, b, _constant(order), result_types=i32)
          for x in mosaic.to_bf16(mixed, dtype):
            flat[slot // 2, j, slot % 2] = as_pair(x)
            slot += 1
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

  return convert(tile)


def put_row_values(ref: Any, values: list[Any], *, interpret: bool) -> None:
  """ref f32[len(values), M] = the values, each that of row `mosaic.thread() % M` in each thread; [M] interpreted."""
  if interpret:
    for n, x in enumerate(values):
      ref[n] = x
    return
  rows = ref.shape[1]

  @mosaic.inline(arg_types=(plgpu.RefType(), *[plgpu.Layout.WG_SPLAT] * len(values)))
  def store(_, ref, *values):
    thread = arith.remui(mgpu.utils.thread_idx(), _constant(128))
    base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [thread], ir.F32Type.get())
    with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, thread, _constant(rows))):
      for n, x in enumerate(values):
        llvm.store(x.registers.item(), mgpu.utils.getelementptr(base, [n * rows], ir.F32Type.get()))

  store(ref, *values)


def scale_rows(x: jax.Array, scales: Any, *, interpret: bool) -> jax.Array:
  """x [M, N] with each row times its number in `scales` f32[M], in shared memory."""
  if interpret:
    return x * across(scales[...], x)
  return x * across(plgpu.load(scales, layout=ROW, optimized=False), x)


def _places(rows: Rows, num_columns: int, *traced: Any) -> list[tuple[Any, Any]]:
  """Where the rows that a thread's columns are lie, as `mosaic.place_of` says."""
  first = mosaic.anew_value(arith.muli(_thread()[2], _constant(2)))
  numbers = [8 * j + e for j in range(num_columns // 8) for e in range(2)]
  return [mosaic.place_of(rows, arith.addi(first, _constant(n)), *traced) for n in numbers]


def load(ref: Any, rows: Rows, num_columns: int, *, interpret: bool) -> jax.Array:
  """f32[N] values of `ref` [X], one per column; 0 for those that lie nowhere."""
  if interpret:
    return mosaic.load_rows(ref, rows, interpret=True)[:num_columns]

  @mosaic.inline(arg_types=(plgpu.RefType(), *rows.types()), return_type=_column_type(num_columns))
  def compute(_, ref, *traced):
    f32, i64 = ir.F32Type.get(), ir.IntegerType.get_signless(64)
    safe, values = arith.extsi(i64, traced[0].registers.item()), []
    for alive, place in _places(rows, num_columns, *traced):
      pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [arith.select(alive, place, safe)], f32)
      values.append(arith.select(alive, llvm.load(f32, pointer), mgpu.utils.c(0.0, f32)))
    return _as_columns(values)

  return compute(ref, *rows.traced())


def store(pairs: list[tuple[Any, jax.Array]], rows: Rows, *, turned: bool = False, interpret: bool) -> None:
  """Of (ref, x) writes the columns of x [D, N] to rows of `ref` [X, D], or x [N] to `ref` [X].

  `turned`: rows of x are in the order of `widen`.
  """
  if interpret:
    for ref, x in pairs:
      mosaic.store_rows(ref, rows, x.T, interpret=True)
    return
  count, num_columns = len(pairs), pairs[0][1].shape[-1]
  layouts = [TILE if x.ndim == 2 else COLUMN for _, x in pairs]

  @mosaic.inline(arg_types=(*[plgpu.RefType()] * count, *layouts, *rows.types()))
  def write(_, *operands):
    i64 = ir.IntegerType.get_signless(64)
    warp, r, _ = _thread()
    is_first = arith.cmpi(arith.CmpIPredicate.eq, arith.addi(warp, r), _constant(0))

    def write_row(n, place, ref, x, layout):
      memref = ir.MemRefType(ref.type)
      element, base = memref.element_type, mgpu.utils.memref_ptr(ref)
      if layout is COLUMN:
        with mgpu.utils.when(is_first):
          value = _columns(x.registers.flat[n // 2])[n % 2]
          llvm.store(value, mgpu.utils.getelementptr(base, [place], element))
        return
      values = [_columns(register)[n % 2] for register in _by_group(x)[n // 2]]  # (m, half) in order
      D = memref.shape[1]
      size = D // 32 if turned else 1
      first = arith.addi(arith.muli(warp, _constant(8 if turned else 16)), r)
      first = arith.extui(i64, arith.muli(first, _constant(size)))
      start = arith.addi(arith.muli(place, mgpu.utils.c(D, i64)), first)
      if turned:
        per = min(size, 16 // mgpu.utils.bytewidth(element))  # of one store
        for k in range(0, size, per):
          vector_ = vector.from_elements(ir.VectorType.get((per,), element), values[k : k + per])
          llvm.store(vector_, mgpu.utils.getelementptr(base, [arith.addi(start, mgpu.utils.c(k, i64))], element))
      else:
        for k, value in enumerate(values):
          offset = arith.addi(start, mgpu.utils.c(64 * (k // 2) + 8 * (k % 2), i64))
          llvm.store(value, mgpu.utils.getelementptr(base, [offset], element))

    refs, arrays, traced = operands[:count], operands[count : 2 * count], operands[2 * count :]
    for n, (alive, place) in enumerate(_places(rows, num_columns, *traced)):
      with mgpu.utils.when(alive):
        for ref, x, layout in zip(refs, arrays, layouts, strict=True):
          write_row(n, place, ref, x, layout)

  write(*(ref for ref, _ in pairs), *(x for _, x in pairs), *rows.traced())
