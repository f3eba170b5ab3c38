"""Prompt lookup on what SmolLM2-135M-Instruct says to the 12 shorter prompts of the tests' reference, greedily.

    python -m experiments.lookup --config=configs/lookup/smollm2.py

Claim (Saxena 2023, prompt lookup decoding): 2 to 4 times as fast where outputs copy from their inputs. These hardly do:
expected are a third of the proposals accepted and 1.3 tokens a turn; matches of two tokens propose less in vain than
matches of one.

Found: 31 % and 1.33 tokens a turn with two proposals; matches of two tokens have 53 % accepted.
"""

import dataclasses

from experiments.lookup import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config()
  return choose(variant, full=full, smoke=dataclasses.replace(full, num_proposed=(2,), matches=((3, 2),)))
