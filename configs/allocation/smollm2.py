"""SmolLM2-135M on a CPU, the same requests and memory, served with pages and with contiguous reservations.

Claim (Kwon et al. 2023, abstract and section 6.2): pages give 2 to 4 times the throughput of systems that reserve
contiguous memory, on identical hardware.

    python -m experiments.allocation --config=configs/allocation/smollm2.py

Prompts are the first turns of MT-bench, outputs the model's own up to 256 tokens; 4096 tokens of memory, of which "max"
reserves 1024 a request. All requests are there from the start. Expected: about 4 requests in the batch with max, half
as many as pages with exact reservations, and 12 or more with pages; steps fall as the batch grows. Seconds fall by
less, for two cores are busy with a batch of 4 already: less than 2 times between max and pages. Found: batches of 3.8,
6.9, 7.1 and 15.3, and no such limit: 3.1 times the tokens in a processor second. It takes 8 minutes or so of two cores.
"""

import dataclasses

from experiments.allocation import Config
from experiments.claims import Claim
from experiments.generate import EngineConfig
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    model="smollm2-135m-instruct",
    engine=EngineConfig(num_slots=24, num_pages=256, max_seq_len=1024, token_budget=256),
    claim=Claim(
      number="9d",
      claim="Throughput of pages against contiguous reservations, served for real in the same memory",
      source="Kwon et al. 2023, abstract",
      theirs="2 to 4 x FasterTransformer and Orca, at the same latency",
      figure="allocation",
    ),
    result="smollm2",
  )
  smoke = dataclasses.replace(
    full,
    model="tiny",
    engine=EngineConfig(num_slots=8, num_pages=32, page_size=4, max_seq_len=64, token_budget=32),
    workload="synthetic",
    num_requests=8,
    prompt_lens=(4, 20),
    max_tokens=8,
    result="",
  )
  return choose(variant, full=full, smoke=smoke)
