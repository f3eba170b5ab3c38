"""Computing the attention weights again in the backward pass is faster than reading them.

Claim (Dao et al. 2022, section 3.1 and figure 2, left): recomputation needs more operations, yet even the backward pass
is faster, because it moves far fewer bytes: 75.2 against 66.6 GFLOPs, 4.4 against 40.3 GB, 7.3 against 41.7 ms for
forward and backward of GPT-2 medium's attention.

    python -m experiments.recompute --config=configs/recompute/h100.py

GPT-2 medium's 16 heads of 64, full attention, bf16, 16k tokens in sequences of 512 to 4096. Expected: faster at every
length, several times from 1024 on, and bytes kept that do not grow with the length. Computing the whole matrix again
("checkpoint") keeps as little, but is slower than reading it.

Found: 3.7, 4.1, 4.3 and 4.3 times as fast; 129 MiB kept for 2.1 GiB at 4096.
"""

import dataclasses

from experiments.attention_cases import Case
from experiments.claims import Claim
from experiments.recompute import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    claim=Claim(
      number="5",
      claim="Recomputing the weights in the backward pass beats reading them",
      source="Dao et al. 2022, section 3.1; figure 2, left",
      theirs="75.2 against 66.6 GFLOPs, 7.3 against 41.7 ms (GPT-2 medium, N = 1024, forward and backward)",
      figure="recompute",
    ),
    result="gpt2_medium",
  )
  smoke = dataclasses.replace(
    full,
    case=Case(batch=1, seq_len=0, num_heads=2, num_kv_heads=2, head_dim=16, is_causal=True),
    tokens=256,
    seq_lens=(64, 128),
    dtype="float32",
    rounds=1,
    repeats=1,
    compile_threads=2,
    result="",
  )
  return choose(variant, full=full, smoke=smoke)
