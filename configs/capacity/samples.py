"""Figure 14 of the PagedAttention paper, parallel sampling: what the samples of a prompt share is worth in throughput.

Claim (Kwon et al. 2023, figure 14): the gain over exact contiguous reservations rises with what is shared, from 1.3
times with one sample to 2.3 times with beams of width 6 (OPT-13B, Alpaca).

    python -m experiments.capacity --config=configs/capacity/samples.py

Lengths drawn with Alpaca's means. Expected: 1.3 with one sample, a little more with each; samples share no more than
their prompt, which is short. What beams share: configs/beam/smollm2.py.

Found: 1.44, 1.95, 2.34 and 2.47 times with 1, 2, 4 and 6.
"""

import dataclasses

from experiments.capacity import Config
from experiments.claims import Claim
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    samples=(1, 2, 4, 6),
    paper_gains=(1.3, None, None, None),
    claim=Claim(
      number="11d",
      claim="Throughput with 1, 2, 4 and 6 samples of a prompt, Alpaca (lengths drawn with its means)",
      source="Kwon et al. 2023, figure 14",
      theirs="1.3 x Orca oracle with one sample, more with more; 2.3 x with beams of 6",
      figure="capacity",
    ),
    result="samples",
  )
  smoke = dataclasses.replace(
    full, num_requests=4, samples=(1, 2), num_slots=4, num_tokens=4096, token_budget=512, result=""
  )
  return choose(variant, full=full, smoke=smoke)
