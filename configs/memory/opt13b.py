"""Figure 2 of the PagedAttention paper: who has the KV memory of OPT-13B on an A100-40GB.

Claim (Kwon et al. 2023, figure 2): of the memory 20.4 % hold tokens when each request reserves 2048 tokens, 26.8 % when
its output is taken for the next power of two, 38.2 % when it is known; 96.3 % with pages.

    python -m experiments.memory --config=configs/memory/opt13b.py

15.7k tokens of memory (their table 1). The lengths are synthetic: drawn with the means of ShareGPT that the paper
gives, 161 and 338 tokens. Expected: within a few points of the paper.

Found: 22.3, 29.6, 38.7 and 97.5 %.
"""

import dataclasses

from experiments.claims import Claim
from experiments.memory import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  paper = (0.204, 0.268, 0.382, 0.963)
  full = Config(
    num_requests=2000,
    max_seq_len=2048,
    num_tokens=15_728,
    num_slots=128,
    paper_used=paper,
    claim=Claim(
      number="8a",
      claim="Share of the KV memory that holds tokens, OPT-13B on ShareGPT (lengths drawn with its means)",
      source="Kwon et al. 2023, figure 2",
      theirs="20.4 % max, 26.8 % pow2, 38.2 % oracle, 96.3 % paged",
      figure="memory_split",
    ),
    result="opt13b",
  )
  smoke = dataclasses.replace(full, result="", num_requests=20, num_slots=8, num_tokens=4200, token_budget=256)
  return choose(variant, full=full, smoke=smoke)
