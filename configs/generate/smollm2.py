"""Completions of SmolLM2-135M-Instruct (Apache-2.0, float32 from a 4-bit file), greedy unless a line says otherwise.

    python -m experiments.generate --config=configs/generate/smollm2.py --config.prompts=FILE.jsonl

Without a file of yours it completes the example prompts beside this config. The weights come with `make demo` or
`make test`. Expected: outputs.jsonl with one line per prompt. `:smoke` runs a small model with random weights on token
ids.
"""

from experiments.generate import Config, EngineConfig
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  return choose(
    variant,
    full=Config(
      model="smollm2-135m-instruct",
      engine=EngineConfig(num_pages=512, max_seq_len=2048),
      prompts="configs/generate/prompts.jsonl",
    ),
    smoke=Config(
      model="tiny",
      engine=EngineConfig(num_slots=2, num_pages=32, page_size=4, max_seq_len=64, token_budget=16),
      prompts="configs/generate/smoke.jsonl",
      max_tokens=8,
    ),
  )
