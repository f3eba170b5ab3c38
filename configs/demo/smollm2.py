"""`make demo`: 24 chat requests over 8 slots with SmolLM2-135M-Instruct, in float32 on a CPU.

    make demo

The questions are first turns of MT-bench, three of each of its eight categories; all requests share a system prompt,
whose pages are computed once. Expected: under 90 s on two cores, compilation included, and less than half of the
memory that reserving 512 tokens for each running request would take. `:smoke` runs a small model with random weights.

Found: 18 s after 25 of compilation, 68 MB where reservations take 189.
"""

import dataclasses

from experiments.generate import EngineConfig
from experiments.serve import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    model="smollm2-135m-instruct",
    engine=EngineConfig(num_pages=128, max_seq_len=512, token_budget=64),
    workload="mtbench",
    system=(
      "You are the assistant of a small public library. People of every age write to you: pupils with homework, "
      "travellers, programmers, and readers who are simply curious. Answer in plain words and say the most important "
      "thing first. Give one concrete example when it helps. When a question needs steps, number them. When you are "
      "not sure, say so instead of guessing. Do not repeat the question. Keep your answers short: a few sentences are "
      "enough."
    ),
    num_requests=24,
    max_tokens=48,
  )
  return choose(
    variant,
    full=full,
    smoke=dataclasses.replace(
      full,
      model="tiny",
      engine=EngineConfig(num_slots=4, num_pages=32, page_size=4, max_seq_len=64, token_budget=16),
      workload="synthetic",
      num_requests=6,
      prompt_lens=(2, 20),
      max_tokens=8,
    ),
  )
