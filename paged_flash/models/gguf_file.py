"""GGUF files: metadata and tensors, read with bounds checks.

The `gguf` package knows the quantisations and does the dequantising. Its reader is not used: it builds numpy views for
every token of a vocabulary, which takes seconds, and a truncated file fails there without a word about truncation.
Format: the GGUF specification of ggml, versions 2 and 3, little-endian.
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# What reading nonsense as lengths, types and text can raise.
_BROKEN = (struct.error, ArithmeticError, LookupError, TypeError, ValueError, MemoryError, RecursionError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFTensor:
  """Where one tensor lies: shape as numpy orders it (out, in), quantisation, first byte in the file, bytes."""

  shape: tuple[int, ...]
  dtype: gguf.GGMLQuantizationType
  start: int
  num_bytes: int


class GGUFFile:
  """The head of a GGUF file, and its tensors on demand.

  Attributes:
    metadata: key to value; arrays are lists.
    tensors: name to `GGUFTensor`.

  Raises:
    ValueError: not GGUF, truncated or corrupt; the text names the file and what was being read.
  """

  def __init__(self, path: Path):
    self.path = path
    self._data = np.asarray(np.memmap(path, np.uint8, "r") if path.stat().st_size else [], np.uint8)
    self._head = memoryview(self._data)
    self._at = 0
    self._reading = "the header"
    try:
      self._read_head()
    except _BROKEN as error:
      raise ValueError(f"{path}: truncated or corrupt GGUF file, at {self._reading}: {error}") from error

  def read(self, name: str) -> np.ndarray:
    """A tensor's values, f32[shape].

    Raises:
      ValueError: the `gguf` package cannot dequantise its type.
    """
    tensor = self.tensors[name]
    if tensor.dtype.name.startswith("I") and tensor.dtype.name[1:].isdigit():  # plain integers: I8 ... I64
      raise ValueError(f"{self.path}: tensor {name!r} must hold weights, got dtype {tensor.dtype.name}")
    block_bytes = gguf.GGML_QUANT_SIZES[tensor.dtype][1]
    # Blocks are independent and gguf works on 16 rows at a time: rows of 256 blocks make that three times faster.
    row = block_bytes * math.gcd(tensor.num_bytes // block_bytes, 256)
    data = self._data[tensor.start : tensor.start + tensor.num_bytes].reshape(-1, row)
    try:
      values = gguf.dequantize(data, tensor.dtype).reshape(tensor.shape)
    except NotImplementedError as error:
      raise ValueError(f"{self.path}: gguf cannot dequantise tensor {name!r}, dtype {tensor.dtype.name}") from error
    return values.copy() if np.shares_memory(values, self._data) else values  # float32 was a view of the file

  def _read_head(self):
    if bytes(self._head[:4]) != b"GGUF":
      raise ValueError(f"it begins with {bytes(self._head[:4])!r}, wanted b'GGUF'")
    self._at = 4
    version = self._scalar("I")
    if version not in (2, 3):
      raise ValueError(f"GGUF version must be 2 or 3 (little-endian), got {version}")
    num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
    self.metadata: dict[str, Any] = {}
    for i in range(num_keys):
      self._reading = f"metadata key {i + 1} of {num_keys}"
      key = self._string()
      self._reading = f"metadata {key!r}"
      self.metadata[key] = self._value(self._scalar("I"))
    places = {}
    for i in range(num_tensors):
      self._reading = f"tensor description {i + 1} of {num_tensors}"
      name = self._string()
      shape = tuple(self._scalar("Q") for _ in range(self._scalar("I")))[::-1]
      places[name] = shape, gguf.GGMLQuantizationType(self._scalar("I")), self._scalar("Q")
    alignment = self.metadata.get("general.alignment", 32)
    base = -(-self._at // alignment) * alignment
    self.tensors: dict[str, GGUFTensor] = {}
    for name, (shape, dtype, offset) in places.items():
      self._reading = f"tensor {name!r}"
      block, block_bytes = gguf.GGML_QUANT_SIZES[dtype]
      if not shape or shape[-1] % block:
        raise ValueError(f"its rows must be whole blocks of {block} for {dtype.name}, got shape {shape}")
      num_bytes = math.prod(shape) // block * block_bytes
      self._within(base + offset, num_bytes)
      self.tensors[name] = GGUFTensor(shape=shape, dtype=dtype, start=base + offset, num_bytes=num_bytes)

  def _within(self, start: int, num_bytes: int):
    if start + num_bytes > len(self._head):
      raise ValueError(f"it ends at byte {start + num_bytes}, the file at byte {len(self._head)}")

  def _scalar(self, code: str) -> Any:
    (value,) = struct.unpack_from("<" + code, self._head, self._at)
    self._at += struct.calcsize("<" + code)
    return value

  def _string(self) -> str:
    length = self._scalar("Q")
    self._within(self._at, length)
    self._at += length
    return str(self._head[self._at - length : self._at], "utf-8")

  def _value(self, kind: int) -> Any:
    if kind == _STRING:
      return self._string()
    if kind != _ARRAY:
      return self._scalar(_SCALARS[kind])
    kind, length = self._scalar("I"), self._scalar("Q")
    if kind in _SCALARS:
      self._within(self._at, length * struct.calcsize("<" + _SCALARS[kind]))
      values = struct.unpack_from(f"<{length}{_SCALARS[kind]}", self._head, self._at)
      self._at += struct.calcsize(f"<{length}{_SCALARS[kind]}")
      return list(values)
    return [self._value(kind) for _ in range(length)]
