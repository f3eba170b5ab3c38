"""The best tiles of the Hopper kernel for the shapes of configs/attention/h200.py, bf16.

    python -m experiments.tune --config=configs/tune/sm90.py

Needs one Hopper GPU; writes paged_flash/data/tiles/<device>.json. `:smoke` times the tiles of the xla kernel anywhere.
"""

import dataclasses

from experiments.attention_cases import Case
from experiments.tune import Config, Grid
from paged_flash.experiment import choose

SHAPES = (  # batch, seq_len, heads, head_dim, is_causal
  (32, 512, 16, 128, True),
  (8, 2048, 16, 128, True),
  (4, 4096, 16, 128, True),
  (1, 16384, 16, 128, True),
  (1, 16384, 16, 128, False),
  (4, 4096, 32, 64, True),
  (1, 16384, 32, 64, True),
  (1, 16384, 32, 64, False),
  (2, 8192, 8, 256, True),
)


def get_config(variant: str = "full") -> Config:
  full = Config(
    problems=tuple(
      Case(batch=b, seq_len=t, num_heads=h, num_kv_heads=h, head_dim=d, is_causal=causal)
      for b, t, h, d, causal in SHAPES
    ),
    forward=Grid(block_kv=(64, 128, 192, 256), stages=(2, 3), num_wgs=(2, 3)),
    backward=Grid(block_q=(64, 128), stages=(2, 3)),
  )
  smoke = dataclasses.replace(
    full,
    problems=(Case(batch=1, seq_len=256, num_heads=2, num_kv_heads=1, head_dim=16, is_causal=True),),
    implementation="xla",
    forward=Grid(block_q=(64, 128), block_kv=(128,)),
    backward=Grid(block_q=(128,), block_kv=(64, 128)),
    dtype="float32",
    rounds=1,
    compile_threads=2,
    write=False,
  )
  return choose(variant, full=full, smoke=smoke)
