"""What the forward kernel moves, counted and measured: each operand about once, where plain attention moves scores.

Claim: the HBM bytes counted from the tile schedule and those of the hardware's counters agree within 10 %, and both are
far below those of attention with the whole score matrix (Dao et al. 2022, Theorem 2).

    python -m experiments.attention_traffic --config=configs/attention_traffic/h200.py

Measuring needs one H200 and `ncu`, and takes about a minute; `:smoke`, and any machine without them, only counts.

Found on an H100: within 10 % in four cases of five, and once 1.51 (16k tokens, causal); plain attention moves 28 to
108 times as much.
"""

import dataclasses

from experiments.attention_cases import Case
from experiments.attention_traffic import Config
from experiments.claims import Claim
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  def case(batch: int, seq_len: int, num_heads: int, num_kv_heads: int, head_dim: int, is_causal: bool) -> Case:
    return Case(
      batch=batch,
      seq_len=seq_len,
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
      head_dim=head_dim,
      is_causal=is_causal,
    )

  full = Config(
    problems=(
      case(8, 2048, 16, 16, 128, True),
      case(1, 16384, 16, 16, 128, True),
      case(1, 16384, 16, 16, 128, False),
      case(4, 4096, 32, 32, 64, True),
      case(4, 4096, 32, 8, 128, True),
    ),
    claim=Claim(
      number="1b",
      claim="What flash attention moves is what its tiles say, and far less than the scores",
      source="Dao et al. 2022, Theorem 2; figure 2, left",
      theirs="HBM traffic 40.3 against 4.4 GB (9 x; GPT-2 medium, N = 1024, forward and backward)",
      figure="attention_traffic",
    ),
    result="h200",
  )
  smoke = dataclasses.replace(full, problems=(case(1, 512, 4, 2, 64, True),), seconds=0.0, result="")
  return choose(variant, full=full, smoke=smoke)
