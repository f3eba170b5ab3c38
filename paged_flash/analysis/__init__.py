"""Pictures of a page table and of a run, charts of measured attention, and the arithmetic of KV-cache memory."""

from paged_flash.analysis.charts import show_attention_bars, show_attention_memory, show_attention_sweep
from paged_flash.analysis.memory import KVShape, compare_held, human_bytes
from paged_flash.analysis.pictures import show, show_occupancy

__all__ = [
  "KVShape",
  "compare_held",
  "human_bytes",
  "show",
  "show_attention_bars",
  "show_attention_memory",
  "show_attention_sweep",
  "show_occupancy",
]
