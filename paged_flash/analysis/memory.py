"""How many bytes a KV cache takes: per token, per page, in a budget, and held in vain."""

import dataclasses
from typing import Any

import numpy as np
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVShape:
  """What decides the size of the KV cache of a model.

  Example:
    >>> kv = KVShape(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")
    >>> kv.bytes_per_token
    23040
    >>> kv.num_pages(2**30, page_size=16)
    2912
  """

  num_layers: int
  num_kv_heads: int
  head_dim: int
  dtype: DTypeLike

  @property
  def bytes_per_token(self) -> int:
    """Keys and values of all layers: 2 * L * K * D * itemsize."""
    return 2 * self.num_layers * self.num_kv_heads * self.head_dim * np.dtype(self.dtype).itemsize

  def page_bytes(self, page_size: int) -> int:
    """Bytes of one page of all layers."""
    return page_size * self.bytes_per_token

  def num_pages(self, budget: int, *, page_size: int) -> int:
    """Pages that fit into a budget of bytes.

    Raises:
      ValueError: if not even one page fits.
    """
    pages = budget // self.page_bytes(page_size)
    if pages < 1:
      raise ValueError(f"budget must hold at least one page of {self.page_bytes(page_size)} bytes, got {budget} bytes")
    return pages

  def explain(self, budget: int, *, page_size: int) -> str:
    """The same arithmetic in two lines of text, for a log or a terminal."""
    pages = self.num_pages(budget, page_size=page_size)
    itemsize = np.dtype(self.dtype).itemsize
    return (
      f"one token: 2 (K and V) x {self.num_layers} layers x {self.num_kv_heads} KV heads x {self.head_dim} head_dim"
      f" x {itemsize} bytes = {self.bytes_per_token:,} bytes\n"
      f"{human_bytes(budget)} / ({page_size} tokens x {self.bytes_per_token:,} bytes) = {pages:,} pages"
      f" = {pages * page_size:,} tokens"
    )


def compare_held(lengths: Any, *, max_length: int, page_size: int, bytes_per_token: int = 1) -> list[dict[str, Any]]:
  """Memory held for sequences of these lengths: reserved contiguously, and in pages.

  A contiguous cache reserves the longest possible sequence for each one; pages leave at most one part-full page each.
  Source: Kwon et al. 2023, section 3.1 and figure 2 (their reserved and internal fragmentation are wasted here).

  Args:
    lengths: i[B], tokens of each sequence; any shape.
    max_length: tokens reserved per sequence by the contiguous cache.
    page_size: tokens per page.
    bytes_per_token: of all layers; 1 counts tokens.

  Returns:
    One row per policy, "contiguous" and "paged": held_bytes, used_bytes, wasted_bytes and waste, the share wasted of
    what is held (0 when nothing is held).

  Raises:
    ValueError: if a length is negative or above max_length, or page_size < 1.

  Example:
    >>> [row["waste"] for row in compare_held([100, 28], max_length=256, page_size=32)]
    [0.75, 0.2]
  """
  lengths = np.asarray(lengths, np.int64)
  if page_size < 1:
    raise ValueError(f"page_size must be at least 1, got {page_size}")
  if lengths.size and not 0 <= lengths.min() <= lengths.max() <= max_length:
    raise ValueError(f"lengths must lie in 0..{max_length} (max_length), got {lengths.min()}..{lengths.max()}")
  used = int(lengths.sum())
  rows = []
  for policy, held in (
    ("contiguous", max_length * lengths.size),
    ("paged", int((-(-lengths // page_size) * page_size).sum())),
  ):
    rows.append(
      {
        "policy": policy,
        "held_bytes": held * bytes_per_token,
        "used_bytes": used * bytes_per_token,
        "wasted_bytes": (held - used) * bytes_per_token,
        "waste": (held - used) / held if held else 0.0,
      }
    )
  return rows


def human_bytes(count: float) -> str:
  """Bytes in the largest fitting binary unit.

  Example:
    >>> human_bytes(1.5 * 2**20)
    '1.5 MiB'
  """
  for unit in ("bytes", "KiB", "MiB", "GiB"):
    if abs(count) < 1024:
      return f"{count:.4g} {unit}"
    count /= 1024
  return f"{count:.4g} TiB"
