"""Pictures of a page table and of a run, charts of measured attention, the arithmetic of KV-cache memory, and the bytes
that attention moves."""

from paged_flash.analysis.charts import (
  show_attention_bars,
  show_attention_memory,
  show_attention_sweep,
  show_attention_traffic,
)
from paged_flash.analysis.memory import KVShape, compare_held, human_bytes
from paged_flash.analysis.pictures import show, show_occupancy
from paged_flash.analysis.traffic import FlashTraffic, flash_traffic, naive_traffic

__all__ = [
  "FlashTraffic",
  "KVShape",
  "compare_held",
  "flash_traffic",
  "human_bytes",
  "naive_traffic",
  "show",
  "show_attention_bars",
  "show_attention_memory",
  "show_attention_sweep",
  "show_attention_traffic",
  "show_occupancy",
]
