"""Figures 12 and 13 of the PagedAttention paper: OPT-13B on an A100-40GB, requests like ShareGPT's.

Claim (Kwon et al. 2023, section 6.2): with pages a server sustains a higher rate before its latency explodes
(1.7 to 2.7 times the rate of contiguous reservation with known lengths, 2.7 to 8 times that of the maximum),
because more requests share a batch: 7.00, 9.81, 13.62 and 30.42 at 2 requests/s with max, pow2, oracle and pages.

    python -m experiments.simulate --config=configs/simulate/opt13b_sharegpt.py

Poisson arrivals; 15.7k tokens of memory; synthetic lengths with the means that the paper gives. Expected: the batches
of the contiguous allocators as in the paper, for they are full; the one with pages below theirs, because a step is
taken to be as fast as the hardware allows.

Found: 6.94, 9.37, 11.96 and 20.69 at 2 requests/s; pages sustain 2.2 times the rate of known lengths, 3.8 times that
of the maximum.
"""

import dataclasses

from experiments.claims import Claim
from experiments.simulate import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    synthetic="sharegpt",
    num_requests=800,
    rates=(0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0),
    num_slots=96,
    paper_rate=2.0,
    paper_batch=(7.00, 9.81, 13.62, 30.42),
    claims=(
      Claim(
        number="9a",
        claim="Request rate that is sustained, OPT-13B on ShareGPT (lengths drawn with its means)",
        source="Kwon et al. 2023, figure 12",
        theirs="1.7 to 2.7 x Orca oracle, 2.7 to 8 x Orca max",
        figure="rates",
      ),
      Claim(
        number="9b",
        claim="Requests in the batch at 2 requests/s, ShareGPT: max / pow2 / oracle / paged",
        source="Kwon et al. 2023, figure 13a",
        theirs="7.00 / 9.81 / 13.62 / 30.42",
        figure="rates",
      ),
    ),
    result="opt13b_sharegpt",
  )
  smoke = dataclasses.replace(full, num_requests=6, rates=(2.0,), num_slots=4, result="")
  return choose(variant, full=full, smoke=smoke)
