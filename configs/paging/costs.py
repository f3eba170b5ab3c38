"""All that pages cost: a few percent of the kernel, next to nothing in bytes, and the scheduler's part of a step.

Claim (Kwon et al. 2023, section 7.1): looking pages up costs 20 to 26 % of the attention kernel, which is little of a
step, since only attention is concerned.

    python -m experiments.paging --config=configs/paging/costs.py

Gathered from the results of configs/paged_attention/decode.py and lengths.py, configs/kv_sizes/models.py and
configs/scheduler/cost.py. Expected: the kernel's part well below theirs.

Found: 0.6 to 5.1 % of the kernel, a table of at most a ten-thousandth of the cache.
"""

import dataclasses

from experiments.claims import Claim
from experiments.paging import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  device = "nvidia_h100_80gb_hbm3"
  full = Config(
    kernels=(f"paged_attention/{device}/decode", f"paged_attention/{device}/lengths"),
    table="kv_sizes/cpu/models",
    scheduler="scheduler/cpu/cost",
    claim=Claim(
      number="13c",
      claim="What pages cost: order of pages in the kernel, bytes of the table, scheduling",
      source="Kwon et al. 2023, section 7.1 and figure 18a",
      theirs="20 to 26 % of the kernel; the rest is not stated",
    ),
    result="costs",
  )
  return choose(variant, full=full, smoke=dataclasses.replace(full, result=""))
