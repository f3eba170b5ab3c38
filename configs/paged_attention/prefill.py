"""Chunks of prompts that attend to their past in pages, alone and beside decoding sequences.

Claim: within 5 % of `flash_attention` on the same keys and values, contiguous (`flash_by_ours` >= 0.95); a chunk and 64
decoding sequences in one call take no longer than in two (`apart_by_ours` >= 1).

    python -m experiments.paged_attention --config=configs/paged_attention/prefill.py

Found on an H100: 0.95 to 0.96, for 512 alone 0.81; beside 64 decoding sequences 0.97.
"""

import dataclasses
from typing import Any

from experiments.paged_attention import Config, smoke
from experiments.paged_cases import Case
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  def cases(chunks: tuple[int, ...], pasts: tuple[int, ...], mixed: Case, **heads: Any) -> tuple[Case, ...]:
    alone = [Case(batch=1, context=past + chunk, chunk=chunk, **heads) for chunk in chunks for past in pasts]
    return (*alone, mixed)

  heads: dict[str, Any] = dict(num_heads=32, num_kv_heads=8, head_dim=128)
  full = Config(
    problems=cases(
      (512, 2048), (0, 8192, 32768), Case(batch=1, context=4096, chunk=1024, decoding=64, **heads), **heads
    ),
    peers=("ours_ordered", "ours_flash", "ours_apart", "cudnn", "fa3", "gather"),
    figure="tflops",
    result="prefill",
  )
  heads = dict(num_heads=2, num_kv_heads=1, head_dim=8)
  small = cases((16,), (32,), Case(batch=1, context=48, chunk=16, decoding=2, **heads), **heads)
  tiny = dataclasses.replace(smoke(full, *small), peers=("ours_flash", "ours_apart", "gather"))
  return choose(variant, full=full, smoke=tiny)
