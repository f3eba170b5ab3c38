"""Figure 15 of the PagedAttention paper, beams: pages saved when the beams of a prompt share what they have in common.

Claim (Kwon et al. 2023, figure 15): of the pages that would be held without sharing, beams of width 2, 4 and 6 save
37.6 to 55.2 % on Alpaca and 44.3 to 66.3 % on ShareGPT.

    python -m experiments.beam --config=configs/beam/smollm2.py

Here the beams are a real model's: SmolLM2-135M-Instruct in float32 on 8 chat requests, 48 new tokens each. Expected: in
the same region, more for wider beams. Prompts and outputs are not those of the paper, whose traces are not public.

Found: 40.9, 60.6 and 66.5 %.
"""

import dataclasses

from experiments.beam import Config
from experiments.claims import Claim
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    paper_saved=(0.376, None, 0.552),  # on Alpaca; of width 4 not stated
    claim=Claim(
      number="11b",
      claim="Pages saved when the beams of widths 2, 4 and 6 share what they have in common",
      source="Kwon et al. 2023, figure 15b",
      theirs="37.6 to 55.2 % (Alpaca), 44.3 to 66.3 % (ShareGPT)",
      figure="beams",
    ),
    result="smollm2",
  )
  smoke = dataclasses.replace(
    full,
    result="",
    model="tiny",
    workload="synthetic",
    num_requests=3,
    max_tokens=5,
    widths=(2,),
    num_pages=64,
    paper_saved=(),
  )
  return choose(variant, full=full, smoke=smoke)
