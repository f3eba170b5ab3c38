"""A draft model: the first layers of SmolLM2-135M-Instruct propose to all 30, in float32 on a CPU.

    python -m experiments.speculation --config=configs/speculation/draft.py

Claim (Leviathan et al. 2023, section 3): with a share `a` of guesses right, K guesses bring (1 - a^(K + 1)) / (1 - a)
tokens a step, at the cost of K draft passes. Expected: the same tokens; the whole model as its own draft is always
right, so that a third of the steps are left, and no time is saved; first layers that were not trained to be the last
are seldom right (Elhoushi et al. 2024 train them for it), and slow everything down.

Found: all tokens the same; 3 % of the guesses right with 10 layers, 10 % with 20, all with 30, in 52 steps for 132,
at 0.4 to 0.7 of the speed.
"""

import dataclasses

from experiments.speculation import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    num_requests=8,
    max_tokens=32,
    num_proposed=(0, 2),
    draft_layers=(10, 20, 30),
    num_slots=(2,),
    num_pages=64,
    repeats=3,
  )
  smoke = dataclasses.replace(
    full,
    model="tiny",
    workload="synthetic",
    num_requests=3,
    max_tokens=9,
    draft_layers=(1,),
    repeats=1,
  )
  return choose(variant, full=full, smoke=smoke)
