"""Figure 18b of the PagedAttention paper, its memory side: what the page size costs.

Claim (Kwon et al. 2023, section 7.2): on ShareGPT pages of 16 to 128 tokens are best, on Alpaca 16 and 32; larger ones
waste memory on the short sequences of Alpaca. Small pages cost kernel time, which memory alone does not show.

    python -m experiments.memory --config=configs/memory/page_sizes.py

OPT-13B's 15.7k tokens of memory; synthetic lengths with the means that the paper gives. Expected: waste grows with the
page size, to a third of the held memory on Alpaca at 64, and the batch shrinks with it.

Found: so; 1.5 % wasted at 16 tokens and 3.1 at 32 on ShareGPT.
"""

import dataclasses

from experiments.memory import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    synthetic=("sharegpt", "alpaca"),
    num_requests=600,
    max_seq_len=2048,
    num_tokens=15_872,  # a multiple of all page sizes
    num_slots=320,
    reserve=(),
    page_sizes=(1, 2, 4, 8, 16, 32, 64, 128, 256),
  )
  smoke = dataclasses.replace(
    full, num_requests=10, num_slots=4, num_tokens=4096, page_sizes=(16, 64), token_budget=256
  )
  return choose(variant, full=full, smoke=smoke)
