"""Figures 12 and 13 of the PagedAttention paper: OPT-13B on an A100-40GB, requests like Alpaca's.

Claim (Kwon et al. 2023, section 6.2): with pages a server sustains a higher rate before its latency explodes
(less so than on ShareGPT where the model, not the memory, is the limit),
because more requests share a batch: 7.00, 43.24, 72.75 and 132.44 at 30 requests/s with max, pow2, oracle and pages.

    python -m experiments.simulate --config=configs/simulate/opt13b_alpaca.py

Poisson arrivals; 15.7k tokens of memory; synthetic lengths with the means that the paper gives. Expected: the batches
of the contiguous allocators as in the paper, for they are full; the one with pages below theirs, because a step is
taken to be as fast as the hardware allows.

Found: 6.98, 40.1, 46.7 and 46.7: at a roofline's speed the batch with pages never grows. With 50 ms more a step: 64.8
and 103.6 with oracle and pages.
"""

import dataclasses

from experiments.claims import Claim
from experiments.simulate import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    synthetic="alpaca",
    num_requests=2000,
    rates=(10.0, 20.0, 30.0, 40.0, 60.0, 80.0),
    num_slots=256,
    paper_rate=30.0,
    paper_batch=(7.00, 43.24, 72.75, 132.44),
    claims=(
      Claim(
        number="9c",
        claim="Requests in the batch at 30 requests/s, Alpaca: max / pow2 / oracle / paged",
        source="Kwon et al. 2023, figure 13b",
        theirs="7.00 / 43.24 / 72.75 / 132.44",
        figure="rates",
      ),
    ),
    result="opt13b_alpaca",
  )
  smoke = dataclasses.replace(full, num_requests=6, rates=(2.0,), num_slots=4, result="")
  return choose(variant, full=full, smoke=smoke)
