"""How many bytes of a KV cache are held in vain."""

from typing import Any

import numpy as np


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
