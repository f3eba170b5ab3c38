"""Pages waste next to nothing: the Azure conversation trace of 2023, through the real scheduler.

Claim: with pages, waste is limited to the last page of each request, under 4 % of held memory (Kwon et al. 2023,
section 1 and figure 2), while contiguous reservation holds 60-80 % in vain.

    python -m experiments.memory --config=configs/memory/azure.py --config.trace=FILE.csv

FILE.csv is AzureLLMInferenceTrace_conv.csv of Azure/AzurePublicDataset (Patel et al. 2024; CC-BY-4.0): 19,366 requests.
All are there from the start and run in order, which gives the same lengths at once as a loaded server. Expected: waste
under 4 % at page size 16. `:smoke` draws lengths at random.
"""

import dataclasses

from experiments.memory import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(page_sizes=(16,))
  return choose(
    variant,
    full=full,
    smoke=dataclasses.replace(full, num_requests=30, num_slots=4, num_tokens=800, token_budget=64),
  )
