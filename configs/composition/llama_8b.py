"""Prefill of a model of 8B parameters, with and without the score matrix, from contiguous memory and from pages.

Claim (FlashAttention's README; Dao et al. 2022, section 4.3): attention without the score matrix is 2 to 4 times, or up
to 3 times, as fast as standard attention; what a whole prefill gains is less, for attention is a part of it.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python -m experiments.composition --config=configs/composition/llama_8b.py

Llama-3-8B's shape with random weights in bf16, 16 GB; a prefill of one prompt of 8192 tokens, whose scores fit a card
of 80 GB beside all else (8 GiB of float32 a layer and 4 of bf16; another prompt doubles both, and the time of all ways
alike); 40 GiB for KV cache and temporaries; prompts of 1024 to 8192 tokens, outputs of 1 to 1024. Expected: attention's
products are a seventh of the prefill's, and the score matrix, read and written several times in each layer, makes it
twice as long; by what a score cost in `llama_1b.py`, 5.5 ps, 0.38 s come to some 0.24 s: 2.5 times. Found on an H100:
2.49 times, 573 to 230 ms, and 236 from pages. The tokens that follow are not those of naive attention: the logits of
random weights, 0.06 of rounding apart, have another maximum after 2 of 8 prompts, and the one here is of these.
"""

import dataclasses

from configs.composition import llama_1b
from experiments.claims import Claim
from experiments.composition import Config
from paged_flash.experiment import choose
from paged_flash.models import ModelConfig


def get_config(variant: str = "full") -> Config:
  full = dataclasses.replace(
    llama_1b.get_config(),
    model=ModelConfig(
      vocab_size=128_256,
      embed_dim=4096,
      num_layers=32,
      num_heads=32,
      num_kv_heads=8,
      ffn_dim=14_336,
      max_seq_len=9216,
    ),
    memory_bytes=40 * 2**30,
    max_seq_len=9216,
    prompt_lens=(1024, 8192),
    prefill_batch=1,
    prefill_len=8192,
    repeats=2,
    claim=Claim(
      number="4c",
      claim="Prefill of a model of 8B parameters, against standard attention",
      source="FlashAttention's README; Dao et al. 2022, section 4.3",
      theirs="attention alone 2 to 4 x at 128 to 4k tokens (README), up to 3 x (paper)",
      figure="composition",
    ),
    result="llama_8b",
  )
  smoke = dataclasses.replace(llama_1b.get_config("smoke"), claim=full.claim)
  return choose(variant, full=full, smoke=smoke)
