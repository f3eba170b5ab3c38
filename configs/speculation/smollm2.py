"""Prompt lookup with SmolLM2-135M-Instruct in float32 on a CPU: the demo's 24 chat requests, 48 new tokens each.

    python -m experiments.speculation --config=configs/speculation/smollm2.py

Claim (Saxena 2023, prompt lookup decoding): 2 to 4 times as fast where the output copies from the input. Few of these
questions do. Expected: the same tokens, a few tenths of the proposals accepted, fewer steps; on a CPU, which computes a
token hardly cheaper beside others, little of it in time.

Found: the same tokens; half of two proposals accepted, 1.13 tokens a step; no faster on two cores.
"""

import dataclasses

from experiments.speculation import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config()
  smoke = dataclasses.replace(
    full,
    model="tiny",
    workload="synthetic",
    num_requests=3,
    max_tokens=9,
    num_proposed=(0, 3),
    num_slots=(2,),
  )
  return choose(variant, full=full, smoke=smoke)
