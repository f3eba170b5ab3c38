"""Many sequences that share a long prefix: its pages read by each of them, or once.

Claim: reading them once is at least 5 times as fast as the kernel that knows nothing of sharing (`shared_by_ours` <=
0.2) for 32 sequences with one prefix of 32k tokens and 128 of their own. FlashInfer reports up to 31 times against
vLLM's kernel at batch 256 (https://flashinfer.ai/2024/02/02/cascade-inference.html). TB/s count shared pages once.

    python -m experiments.paged_attention --config=configs/paged_attention/prefix.py

Found on an H100: 3.8 times for 8 sequences, 5.5 for 32, 9.1 for 128.
"""

import dataclasses
from typing import Any

from experiments.paged_attention import Config, smoke
from experiments.paged_cases import Case
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  def cases(prefix: int, own: int, *batches: int, **heads: Any) -> tuple[Case, ...]:
    return tuple(Case(batch=batch, context=prefix + own, prefix=prefix, **heads) for batch in batches)

  full = Config(
    problems=cases(32768, 128, 8, 32, 128, num_heads=32, num_kv_heads=8, head_dim=128),
    peers=("ours_shared", "cudnn", "fa3", "gather"),
    result="prefix",
  )
  small = smoke(full, *cases(32, 8, 3, num_heads=2, num_kv_heads=1, head_dim=8))
  return choose(variant, full=full, smoke=dataclasses.replace(small, peers=("ours_shared",)))
