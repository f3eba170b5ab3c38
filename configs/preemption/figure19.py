"""Figure 19 of the PagedAttention paper: recomputing against swapping, over the page size.

Claim (Kwon et al. 2023, section 7.3): swapping costs too much with small pages, for many small copies do not fill the
bus; recomputing costs the same with all, never more than 20 % above swapping; with pages of 16 to 64 tokens serving
feels no difference.

    python -m experiments.preemption --config=configs/preemption/figure19.py

By itself: 256 tokens of a model of SmolLM2-135M's sizes, timed on the device at hand. End to end: OPT-13B on an
A100-40GB by a roofline, as the paper has it, where a page takes 80 copies of 2 us beside their bytes; 15.9k tokens of
device memory, 64k of host memory. On a GPU with the sizes of OPT-13B (its feed-forward part as three matrices):

    python -m experiments.preemption --config=configs/preemption/figure19.py:opt13b

Expected on a CPU: swapping is a copy in memory and far cheaper than recomputing at every page size. On a GPU: a copy
through the bus takes a few us a page beside its bytes, so that pages of 1 cost the most. Found: so it is; recomputing
takes twice as long as swapping from pages of 16 on, and longer below 8, where no kernel of ours reads pages.
"""

import dataclasses

from experiments.claims import Claim
from experiments.preemption import Config
from paged_flash.experiment import choose
from paged_flash.models import ModelConfig

SOURCE = "Kwon et al. 2023, section 7.3, figure 19"


def get_config(variant: str = "full") -> Config:
  full = Config(
    model=ModelConfig(
      vocab_size=49_152, embed_dim=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, ffn_dim=1536
    ),
    claims=(
      Claim(
        number="16a",
        claim="Preempting by itself: swapping is slow with small pages, recomputing the same with all",
        source=SOURCE,
        theirs="recomputing never more than 20 % above swapping",
        figure="preemption",
      ),
      Claim(
        number="16b",
        claim="Preempting end to end: swapping and recomputing alike at pages of 16 to 64 tokens",
        source=SOURCE,
        theirs="comparable at 16 to 64, swapping worse below",
        figure="preemption",
      ),
    ),
    result="figure19",
  )
  opt13b = dataclasses.replace(
    full,
    model=ModelConfig(
      vocab_size=50_272, embed_dim=5120, num_layers=40, num_heads=40, num_kv_heads=40, head_dim=128, ffn_dim=13_653
    ),
    dtype="bfloat16",
    num_requests=0,  # what serving feels is simulated, and so the same as above
    claims=full.claims[:1],
    result="opt13b",
  )
  smoke = dataclasses.replace(
    full,
    model=ModelConfig(vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64),
    page_sizes=(4, 16),
    seq_len=16,
    rounds=1,
    num_requests=8,
    num_tokens=2048,
    num_slots=4,
    token_budget=256,
    result="",
  )
  return choose(variant, full=full, opt13b=opt13b, smoke=smoke)
