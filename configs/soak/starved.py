"""A million random operations for each of three policies, on pools too small for anyone: nothing leaks, nothing breaks.

    python -m experiments.soak --config=configs/soak/starved.py

256 worlds of 3 slots and 7 pages of 3 tokens, with 5 more in host memory to swap to; a request may want more than the
whole pool. Expected: no fault of any kind after any operation, and no page held when all requests have ended.

Found: none in 1,024,000 operations of each; 20,000 preemptions.
"""

import dataclasses

from experiments.soak import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config()
  smoke = dataclasses.replace(full, num_worlds=8, num_operations=400, batch=50, policies=("first_come",))
  return choose(variant, full=full, smoke=smoke)
