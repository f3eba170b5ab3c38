"""Figure 16 of the PagedAttention paper: requests that begin with the same examples share their pages.

Claim (Kwon et al. 2023, figure 16): translating with one example in front of all prompts (80 tokens) pages give 1.67
times the throughput of exact contiguous reservations, with five (341 tokens) 3.58 times.

    python -m experiments.capacity --config=configs/capacity/prefix.py

LLaMA-13B on an A100-40GB, taken for OPT-13B. The paper's two prefixes imply 65 tokens an example, source and
translation; prompts are drawn with 30 of them and outputs with 35. Expected: near the paper's, the longer the prefix
the more; saturated, without arrivals.

Found: 2.10 and 4.21 times.
"""

import dataclasses

from experiments.capacity import Config
from experiments.claims import Claim
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    prompt_mean=30.0,
    output_mean=35.0,
    prefix_lens=(80, 341),
    paper_gains=(1.67, 3.58),
    claim=Claim(
      number="11c",
      claim="Throughput with a prefix of 80 and of 341 tokens that all prompts share",
      source="Kwon et al. 2023, figure 16",
      theirs="1.67 x, 3.58 x Orca oracle",
      figure="capacity",
    ),
    result="prefix",
  )
  smoke = dataclasses.replace(full, num_requests=6, num_slots=4, num_tokens=4096, token_budget=512, result="")
  return choose(variant, full=full, smoke=smoke)
