"""Decoding from pages scattered at random over a pool three times larger than needed, against every peer, bf16.

Claim: no slower than cuDNN's paged path, within 3 % of cuDNN on contiguous keys and values, and pages out of order cost
at most 5 % (`overhead`); the kernel of Kwon et al. 2023 paid 20 to 26 % for its pages (their figure 18a).

    python -m experiments.paged_attention --config=configs/paged_attention/decode.py

Needs one Hopper GPU; takes several minutes, most of it compilation. Peers: cuDNN through JAX, its paged path (private
in JAX; it wants a pool without spare pages), flash_attn3_jax 0.2.3, JAX's deprecated Triton kernel, and gathering the
pages for plain XLA. `:smoke` runs anywhere in seconds.

Found on an H100: cuDNN's paged path takes 0.99 to 1.05 times as long (1.32 for one sequence of 8k, which takes 10.3
us), cuDNN on contiguous keys 0.93 to 0.99 times (1.15 there); order costs 0.6 to 5.1 %.
"""

from experiments.claims import Claim
from experiments.paged_attention import Config, smoke
from experiments.paged_cases import Case
from paged_flash.experiment import choose


def case(batch: int, context: int, heads: int, kv_heads: int, head_dim: int = 128, page_size: int = 16) -> Case:
  return Case(
    batch=batch, context=context, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, page_size=page_size
  )


CASES = (
  case(1, 8192, 32, 8),
  case(16, 4096, 32, 8),
  case(128, 4096, 32, 8),
  case(64, 8192, 32, 8, page_size=64),
  case(8, 32768, 64, 8),
  case(64, 4096, 32, 32),
  case(256, 1024, 9, 3, head_dim=64),
  case(1, 131072, 32, 8),
  case(32, 2048, 64, 8),
)


def get_config(variant: str = "full") -> Config:
  full = Config(
    problems=CASES,
    claim=Claim(
      number="13a",
      claim="The price of pages in the attention kernel is at most 26 %",
      source="Kwon et al. 2023, figure 18a",
      theirs="20 to 26 % more than FasterTransformer's kernel",
      figure="paged_bars",
    ),
    result="decode",
  )
  return choose(variant, full=full, smoke=smoke(full, case(2, 40, 4, 2, head_dim=16)))
