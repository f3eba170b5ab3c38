"""Attention through a page table is attention: bit for bit the same wherever the pages lie.

Claim (Kwon et al. 2023, section 4.1): paging changes where keys and values are kept, not what is computed. Outputs do
not depend on the order of the pages in any bit, over page sizes 1 to 256, in pools three times larger than needed
whose other pages hold NaN; and they are those of `flash_attention` on contiguous arrays, up to rounding.

    python -m experiments.equality --config=configs/equality/pages.py

Found on a CPU (bfloat16, tiled XLA): no number changes.
"""

import dataclasses

from experiments.claims import Claim
from experiments.equality import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    claims=(
      Claim(
        number="12",
        claim="Paged attention equals contiguous attention, over page sizes and orders of pages",
        source="Kwon et al. 2023, section 4.1",
        theirs="the same by construction",
      ),
      Claim(
        number="15c",
        claim="Attention is batch invariant: no number depends on who shares the batch",
        source="He et al. 2025, Defeating nondeterminism in LLM inference",
        theirs="holds with kernels made for it, not with others",
      ),
    ),
    result="pages",
  )
  smoke = dataclasses.replace(
    full, kv_lens=(1, 9, 20), chunk=4, head_dim=16, page_sizes=(1, 5, 8), permutations=1, result=""
  )
  return choose(variant, full=full, smoke=smoke)
