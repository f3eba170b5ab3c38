"""Figure 17 of the PagedAttention paper: OPT-13B as a chatbot, its prompts cut to their last 1024 tokens.

Claim (Kwon et al. 2023, section 6.5 and figure 17): pages sustain twice the request rate of contiguous reservations,
whether these know the length of the output or not: most prompts have 1024 tokens, so that the buddy allocator makes
every reservation 2048.

    python -m experiments.simulate --config=configs/simulate/opt13b_chat.py --config.trace=FILE.csv

FILE.csv is sharegpt_8k_filtered_stats_llama2_tokenizer.csv of microsoft/sarathi-serve (Agrawal et al. 2024;
Apache-2.0): a row is one turn of a ShareGPT conversation, its prompt all that was said before; outputs have at most
1024 tokens. The first 1000 rows, Poisson arrivals, 15.7k tokens of memory, nothing kept between the turns, as in the
paper. Expected: the three contiguous allocators alike, 7 requests in the batch; pages near twice their rate. Found:
alike within 12 %, for a third of the prompts is shorter; pages hold nearly twice the requests and sustain 1.5 to 1.6
times the rate. `:smoke` draws lengths.
"""

import dataclasses

from experiments.claims import Claim
from experiments.simulate import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    num_requests=1000,
    last_tokens=1024,
    rates=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2),
    num_slots=96,
    claims=(
      Claim(
        number="11e",
        claim="Request rate of a chatbot that is sustained, OPT-13B on ShareGPT conversations cut to 1024 tokens",
        source="Kwon et al. 2023, figure 17",
        theirs="2 x each of Orca max, pow2 and oracle, which are alike",
        figure="rates",
      ),
    ),
    result="opt13b_chat",
  )
  smoke = dataclasses.replace(full, num_requests=6, last_tokens=64, rates=(2.0,), num_slots=4, result="")
  return choose(variant, full=full, smoke=smoke)
