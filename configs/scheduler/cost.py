"""Scheduling on the CPU takes under a millisecond for 256 running requests over 16k pages.

    python -m experiments.scheduler --config=configs/scheduler/cost.py

`plan + commit` in one program, every slot decoding, pages granted as the sequences grow. Expected: under 1 ms at 256
slots on two cores. For orientation, vLLM 0.24's scheduler took 1.8 ms at 256 running requests on such a machine.
"""

import dataclasses

from experiments.scheduler import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config()
  return choose(
    variant,
    full=full,
    smoke=dataclasses.replace(
      full, num_slots=(4,), num_pages=64, page_size=4, prompt_len=20, repeats=5, token_budget=16
    ),
  )
