"""Continuous batching of SmolLM2-135M-Instruct over a pool of pages, without a system prompt of our own.

    python -m experiments.serve --config=configs/serve/smollm2.py

40 first turns of MT-bench, 128 new tokens each, 8 slots. Expected: pages in use follow the tokens that exist, a small
part of what contiguous caches hold (Kwon et al. 2023, figure 2, measured 20-38 % of such reservations to hold tokens);
the pages of the model's own system prompt are shared. `:synthetic` draws prompt lengths and token ids at random over a
pool so small that requests are preempted. `:smoke` does that with a small model with random weights.

Found with the demo's requests (configs/demo/smollm2.py): 37 MB held in the mean for 152 reserved.
"""

import dataclasses

from experiments.generate import EngineConfig
from experiments.serve import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    model="smollm2-135m-instruct",
    engine=EngineConfig(num_pages=256, max_seq_len=1024),
    workload="mtbench",
    num_requests=40,
    max_tokens=128,
  )
  synthetic = dataclasses.replace(
    full, workload="synthetic", num_requests=24, max_tokens=64, engine=EngineConfig(num_pages=64, max_seq_len=1024)
  )
  return choose(
    variant,
    full=full,
    synthetic=synthetic,
    smoke=dataclasses.replace(
      synthetic,
      model="tiny",
      engine=EngineConfig(num_slots=4, num_pages=16, page_size=4, max_seq_len=64, token_budget=16),
      prompt_lens=(2, 20),
      num_requests=10,
      max_tokens=16,
    ),
  )
