"""Continuous batching keeps the slots full; a static batch waits for its longest request.

Claim (Yu et al. 2022, "Orca", abstract): scheduling by iteration, so that requests join and leave the
batch at every step, gives several times the throughput (36.9 times at equal latency for GPT-3 175B, against
FasterTransformer, their other optimisations included).

    python -m experiments.batching --config=configs/batching/continuous.py

300 requests with ShareGPT's mean lengths, all there from the start, 32 slots; Llama-3-8B on one H200 by a roofline, so
a step hardly costs more for a full batch. Expected: twice the throughput and more, for batches are emptied slowly.
Found: 2.9 times. Latency at a given load was not compared.
"""

import dataclasses

from experiments.batching import Config, Way
from experiments.claims import Claim
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    ways=(Way(name="static", is_static=True), Way(name="continuous")),
    claim=Claim(
      number="10",
      claim="Continuous against static batching: throughput, and use of the slots over time",
      source="Yu et al. 2022, abstract",
      theirs="36.9 x at equal latency (GPT-3 175B, with their other optimisations)",
      figure="batches",
    ),
    result="continuous",
  )
  return choose(
    variant, full=full, smoke=dataclasses.replace(full, num_requests=6, num_slots=2, log_size=8192, result="")
  )
