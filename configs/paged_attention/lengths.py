"""Decoding with skewed lengths: Zipf's, and one long sequence among many short ones.

Claim: at least 85 % of the rate at which the GPU reads a large array on Zipf lengths of mean 1024 at batch 128
(`of_ceiling`): the work is cut by each sequence's own length and spread over the whole GPU.

    python -m experiments.paged_attention --config=configs/paged_attention/lengths.py

Found on an H100: 86 %, 194 us where cuDNN takes 358 and FlashAttention-3 201; 82 % with one long sequence.
"""

from typing import Any

from experiments.paged_attention import Config, smoke
from experiments.paged_cases import Case
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  def cases(mean: int, batch: int, longest: int, short: int, **heads: Any) -> tuple[Case, ...]:
    return (
      Case(batch=batch, context=mean, **heads),
      Case(batch=batch, context=mean, lengths="Zipf", **heads),
      Case(batch=batch // 8, context=mean, lengths="Zipf", **heads),
      Case(batch=1 + short, context=longest, lengths="one long", **heads),
      Case(batch=1, context=longest, **heads),
    )

  full = Config(problems=cases(1024, 128, 100_000, 100, num_heads=32, num_kv_heads=8, head_dim=128), result="lengths")
  small = cases(20, 8, 100, 3, num_heads=2, num_kv_heads=1, head_dim=8)
  return choose(variant, full=full, smoke=smoke(full, small[1], small[3]))
