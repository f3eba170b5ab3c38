"""Pictures of a page table and of a run, charts of measured attention and of simulated serving, grouped bars, traces of
requests, KV memory held in vain, and the bytes that attention moves."""

from paged_flash.analysis.bars import show_groups
from paged_flash.analysis.charts import (
  show_attention_bars,
  show_attention_io,
  show_attention_memory,
  show_attention_sweep,
  show_attention_traffic,
  show_paged_bars,
  show_paged_sweep,
)
from paged_flash.analysis.memory import compare_held, human_bytes
from paged_flash.analysis.pictures import show, show_occupancy
from paged_flash.analysis.simulated import (
  show_batches,
  show_memory_split,
  show_page_sizes,
  show_preemption,
  show_rates,
  show_stalls,
)
from paged_flash.analysis.traces import Trace, read_trace, synthetic
from paged_flash.analysis.traffic import FlashTraffic, flash_traffic, naive_traffic

__all__ = [
  "FlashTraffic",
  "Trace",
  "compare_held",
  "flash_traffic",
  "human_bytes",
  "naive_traffic",
  "read_trace",
  "show",
  "show_attention_bars",
  "show_attention_io",
  "show_attention_memory",
  "show_attention_sweep",
  "show_attention_traffic",
  "show_batches",
  "show_groups",
  "show_memory_split",
  "show_occupancy",
  "show_page_sizes",
  "show_paged_bars",
  "show_paged_sweep",
  "show_preemption",
  "show_rates",
  "show_stalls",
  "synthetic",
]
