"""paged_flash: flash attention, paged KV caches and immutable page tables for LLM inference in JAX."""

from paged_flash import history, models, policies, speculation, swapping
from paged_flash.adapters import nnx_attention
from paged_flash.analysis.pictures import show
from paged_flash.attention import explain, flash_attention, paged_attention
from paged_flash.beam import BeamSearch, best_of
from paged_flash.cache import kv_pages, page_table
from paged_flash.engine import Engine, EngineState
from paged_flash.requests import Completion, Event, Events, Params

__version__ = "0.1.0"

__all__ = [
  "BeamSearch",
  "Completion",
  "Engine",
  "EngineState",
  "Event",
  "Events",
  "Params",
  "best_of",
  "explain",
  "flash_attention",
  "history",
  "kv_pages",
  "models",
  "nnx_attention",
  "page_table",
  "paged_attention",
  "policies",
  "show",
  "speculation",
  "swapping",
]
