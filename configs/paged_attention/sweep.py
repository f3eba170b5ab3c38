"""Rate at which keys and values are read from pages, over the context, the batch and the page size.

Claim: the rate rises with the work up to the rate at which the GPU reads a large array, and does not depend on the page
size; Kwon et al. 2023 saw pages below 16 tokens cost time (their figure 18b).

    python -m experiments.paged_attention --config=configs/paged_attention/sweep.py

Found on an H100: as expected; pages of 8 take 1.15 times as long as the largest, of 16 1.02 times.
"""

import dataclasses

from experiments.claims import Claim
from experiments.paged_attention import Config, smoke
from experiments.paged_cases import Case
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  def sweep(usual: Case, **values: tuple[int, ...]) -> tuple[Case, ...]:
    cases = [dataclasses.replace(usual, **{name: value}) for name, those in values.items() for value in those]
    return tuple(dict.fromkeys(cases))

  usual = Case(batch=16, context=8192, num_heads=32, num_kv_heads=8, head_dim=128)
  cases = sweep(
    usual,
    page_size=(8, 16, 32, 64, 128, 256),
    context=(512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
    batch=(1, 2, 4, 8, 16, 32, 64, 128),
  )
  full = Config(
    problems=cases,
    peers=("ours_ordered", "cudnn", "cudnn_paged", "fa3", "gather"),
    figure="sweep",
    claim=Claim(
      number="13b",
      claim="Small pages cost time",
      source="Kwon et al. 2023, figure 18b",
      theirs="end to end, 16 to 128 tokens are best (ShareGPT); 16 is the default",
      figure="paged_sweep",
    ),
    result="sweep",
  )
  small = Case(batch=2, context=32, num_heads=2, num_kv_heads=1, head_dim=8)
  return choose(variant, full=full, smoke=smoke(full, *sweep(small, page_size=(8, 16))))
