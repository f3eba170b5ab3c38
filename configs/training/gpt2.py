"""A training step of GPT-2 small, or medium, with flash attention, against standard attention.

Claim (Dao et al. 2022, table 2): GPT-2 small trains 3.5 times, and medium 3.0 times, as fast as with Hugging Face's
implementation and 1.7 times as fast as with Megatron-LM's, at 1k tokens.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python -m experiments.training --config=configs/training/gpt2.py[:medium]

Small has 12 layers of width 768, 12 heads of 64, 124M parameters; medium 24 layers of width 1024, 16 heads of 64, 354M
parameters. Sequences of 1k, 2k and 4k, 8192 tokens a step, bf16, AdamW.
The shape is GPT-2's, the block that of the Llama family: rotary positions, and a gated feed-forward part with the
parameters of GPT-2's. Standard attention is XLA's with the whole score matrix; all else is the same program. Expected:
the gain grows with the length, from less than 1.7 at 1k, where attention is a small part of what XLA computes, to more
than 2 at 4k.

Found on an H100: 1.50, 1.88 and 2.88 times at 1k, 2k and 4k (small), 1.63, 2.09 and 3.01 (medium).
"""

import dataclasses

from experiments.claims import Claim
from experiments.training import Config
from paged_flash.experiment import choose
from paged_flash.models import ModelConfig


def get_config(variant: str = "full") -> Config:
  def shape(width: int, layers: int, vocab: int) -> ModelConfig:
    return ModelConfig(
      vocab_size=vocab,
      embed_dim=width,
      num_layers=layers,
      num_heads=width // 64,
      num_kv_heads=width // 64,
      ffn_dim=-(-width // 24) * 64,  # three matrices of it are as large as GPT-2's two of 4 x width
      max_seq_len=4096,
      tie_embeddings=True,
    )

  def config(size: str, number: str, width: int, layers: int, faster: float) -> Config:
    return Config(
      model=shape(width, layers, 50304),  # GPT-2's 50257 tokens, made a multiple of 128
      claim=Claim(
        number=number,
        claim=f"A training step of GPT-2 {size}, against standard attention",
        source="Dao et al. 2022, table 2",
        theirs=f"{faster} x Hugging Face's, 1.7 x Megatron-LM's, at 1k tokens (8 A100)",
        figure="training",
      ),
      result=f"gpt2_{size}",
    )

  full = config("small", "4a", 768, 12, 3.5)
  smoke = dataclasses.replace(
    full,
    model=shape(192, 1, 128),
    tokens=128,
    seq_lens=(64, 128),
    dtype="float32",
    rounds=1,
    repeats=1,
    compile_threads=2,
    result="",
  )
  return choose(variant, full=full, medium=config("medium", "4b", 1024, 24, 3.0), smoke=smoke)
