"""Flash attention and paged memory compose: each leaves what the other needs.

Claim (Dao et al. 2022 with Kwon et al. 2023; neither measures it): attention without the score matrix saves time and
temporaries, pages save what requests reserve in vain; together more requests fit and more tokens come a second than
with either alone.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python -m experiments.composition --config=configs/composition/llama_1b.py

Llama-3.2-1B's shape with random weights in bf16; 16 GiB for KV cache and temporaries; prompts of 256 to 3072 tokens,
outputs of 1 to 1024; where memory is contiguous, a run of pages of 256 tokens, 4096 tokens in all, reserved for each.
Expected: pages fit nearly twice the requests, flash attention again so many as the score matrix of 8 prompts took room
for, its prefill is more than twice as fast; decoding, it reads a run as fast as pages, and naive attention loses on
pages what it gathers.

Found on an H100: 1.4 times the requests with flash attention, 1.8 with pages, 2.6 with both; 3.7, 1.1 and 4.0 times
the tokens a second.
"""

import dataclasses

from experiments.claims import Claim
from experiments.composition import Config
from paged_flash.experiment import choose
from paged_flash.models import ModelConfig


def get_config(variant: str = "full") -> Config:
  full = Config(
    model=ModelConfig(
      vocab_size=128_256,
      embed_dim=2048,
      num_layers=16,
      num_heads=32,
      num_kv_heads=8,
      ffn_dim=8192,
      max_seq_len=4096,
      tie_embeddings=True,
    ),
    claim=Claim(
      number="14",
      claim="Flash attention and paged memory compose: together better than either alone",
      source="Dao et al. 2022 with Kwon et al. 2023",
      theirs="not measured together",
      figure="composition",
    ),
    result="llama_1b",
  )
  smoke = dataclasses.replace(
    full,
    model=ModelConfig(vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64),
    dtype="float32",
    memory_bytes=2**20,
    page_size=4,
    run_page_size=16,
    max_seq_len=64,
    prompt_lens=(4, 48),
    output_lens=(1, 16),
    most_slots=64,
    prefill_batch=2,
    prefill_len=32,
    checked=4,
    rounds=1,
    repeats=1,
    steps=2,
    compile_threads=2,
    result="",
  )
  return choose(variant, full=full, smoke=smoke)
