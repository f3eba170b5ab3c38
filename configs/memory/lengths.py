"""The same on lists of lengths: ShareGPT conversations with their history, and summaries of papers.

    python -m experiments.memory --config=configs/memory/lengths.py --config.trace=FILE.csv

FILE.csv is sharegpt_8k_filtered_stats_llama2_tokenizer.csv of microsoft/sarathi-serve (Agrawal et al. 2024; Apache-2.0)
or arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv of microsoft/vidur (Agrawal et al. 2024; MIT): the first
4000 rows. The model's longest sequence is 8192. Expected: over 98 % used with pages. `:smoke` draws lengths.

Found: 98.3 % of conversations' memory and 98.0 % of summaries' hold tokens with pages, 33 and 29 % with max.
"""

import dataclasses

from experiments.claims import Claim
from experiments.memory import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    num_requests=4000,
    max_seq_len=8192,
    claim=Claim(
      number="8b",
      claim="Pages waste under 4 % of the memory, on traces",
      source="Kwon et al. 2023, section 1 and figure 2",
      theirs="near-zero waste: 96.3 % hold tokens with pages, 20.4 to 38.2 % with reservations",
      figure="memory_split",
    ),
  )
  smoke = dataclasses.replace(full, num_requests=20, num_slots=4, num_tokens=4200, max_seq_len=2048, token_budget=256)
  return choose(variant, full=full, smoke=smoke)
