"""SmolLM2-135M-Instruct in float32 on two cores: 8 requests of 64 new tokens, against Hugging Face Transformers.

    python -m experiments.cpu_serving --config=configs/cpu_serving/smollm2.py --config.peer_python=VENV/bin/python

VENV is a virtual environment with torch and transformers (5.23 was used). Expected: at least as fast as its `generate`
on one batch of 8, and at least twice as fast as its paged `generate_batch`.

Found: 114 tokens a second, 1.8 times `generate` and 8 times `generate_batch`.
"""

import dataclasses

from experiments.cpu_serving import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config()
  return choose(
    variant,
    full=full,
    smoke=dataclasses.replace(
      full, model="tiny", num_requests=2, prompt_len=5, num_tokens=4, token_budget=8, repeats=1
    ),
  )
