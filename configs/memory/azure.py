"""Pages waste next to nothing: the Azure conversation trace of 2023, through the real scheduler.

Claim (Kwon et al. 2023, section 1 and figure 2): with pages, waste is limited to the last page of each request, under
4 % of the memory, while contiguous reservations leave 20 to 38 % of it to tokens.

    python -m experiments.memory --config=configs/memory/azure.py --config.trace=FILE.csv

FILE.csv is AzureLLMInferenceTrace_conv.csv of Azure/AzurePublicDataset (Patel et al. 2024; CC-BY-4.0), of which the
first 6000 requests run, all there from the start, in order. AzureLLMInferenceTrace_code.csv does as well. The model's
longest sequence is taken for 16,384. Expected: over 98 % used with pages, single digits for "max". `:smoke` draws
lengths.

Found: 96.5 % hold tokens with pages, 7.5 % with max; 0.6 % are wasted. Of the code trace 22.9 and 12.7 %, and 0.4 %
wasted: its requests do not fill the memory.
"""

import dataclasses

from experiments.claims import Claim
from experiments.memory import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    num_requests=6000,
    max_seq_len=16_384,
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
