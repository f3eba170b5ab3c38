"""Larger tiles move fewer bytes between fast and slow memory, and take less time, until arithmetic is what bounds them.

Claim (Dao et al. 2022, section 3.2 and figure 2, middle): memory accesses mainly determine the time, and both fall as
the block size grows, up to blocks of 256; beyond, other factors such as arithmetic bound the time.

    python -m experiments.attention_tiles --config=configs/attention_tiles/h200.py

Forward, full attention, bf16: the paper's shape (64 sequences of 1024, 16 heads of 64) and one sequence of 16k tokens,
16 heads of 128. Tiles of 64 to 192 queries, alone or in clusters of two blocks that share what they fetch, 128 keys.
Needs one Hopper GPU; `:smoke` times the tiles of the xla kernel anywhere. Expected: tiles of 64 queries, whose products
wait for one warpgroup's softmax, take 1.5 times as long as those of 128; beyond, time hardly falls, for the tensor
cores are busy. Found on an H100: 1.46 and 1.40 times, and no less in pairs, which move half the bytes: so it is not the
bytes that cost time here. At head_dim 128 tiles of 192 take 2.5 times as long as those of 128: a thread of three
warpgroups has 160 registers, and its parts of O, scores and weights are as many.
"""

import dataclasses

from experiments.attention_cases import Case
from experiments.attention_tiles import Config
from experiments.claims import Claim
from experiments.tune import Grid
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    problems=(
      Case(batch=64, seq_len=1024, num_heads=16, num_kv_heads=16, head_dim=64, is_causal=False),
      Case(batch=1, seq_len=16384, num_heads=16, num_kv_heads=16, head_dim=128, is_causal=False),
    ),
    tiles=Grid(num_wgs=(1, 2, 3), cluster=(1, 2), block_kv=(128,), stages=(2,)),
    claim=Claim(
      number="2b",
      claim="Time falls with the size of the tiles, until arithmetic bounds it",
      source="Dao et al. 2022, section 3.2; figure 2, middle",
      theirs="falls up to blocks of 256, then other factors bound it (A100)",
      figure="attention_tiles",
    ),
    result="h200",
  )
  smoke = dataclasses.replace(
    full,
    problems=(Case(batch=1, seq_len=256, num_heads=2, num_kv_heads=2, head_dim=16, is_causal=False),),
    tiles=Grid(block_q=(32, 128), block_kv=(64,)),
    implementation="xla",
    dtype="float32",
    rounds=1,
    compile_threads=2,
    result="",
  )
  return choose(variant, full=full, smoke=smoke)
