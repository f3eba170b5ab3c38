"""Masks cost what their visible tiles cost: packed segments, a sliding window, ragged lengths.

Claim: a masked case takes at most 15 % more than its visible tiles of 128 queries by 128 keys would at the time that a
tile takes in the same case without the mask (`of_ideal` <= 1.15).

    python -m experiments.attention --config=configs/attention/masks.py

Found on an H100: a window and uniform lengths keep to it forward (1.11) and lengths backward (1.13); packed segments
take 1.3 to 1.6 times their tiles, Zipf's lengths 1.5 and 1.7, for short items show their beginnings and ends.
"""

import dataclasses

from experiments.attention import Config
from experiments.attention_cases import Case
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  def cases(long: Case, ragged: Case, segments: int, window: int) -> tuple[Case, ...]:
    return (
      long,
      dataclasses.replace(long, segments=segments),
      dataclasses.replace(long, window=window),
      full_attention := dataclasses.replace(long, is_causal=False),
      dataclasses.replace(full_attention, segments=segments),
      ragged,
      dataclasses.replace(ragged, lengths="uniform"),
      dataclasses.replace(ragged, lengths="zipf"),
    )

  long = Case(batch=1, seq_len=16384, num_heads=16, num_kv_heads=16, head_dim=128, is_causal=True)
  full = Config(
    problems=cases(long, dataclasses.replace(long, batch=16, seq_len=4096), segments=16, window=1024),
    peers=("cudnn", "tokamax", "fa3"),
    result="masks",
  )
  small = Case(batch=2, seq_len=128, num_heads=2, num_kv_heads=1, head_dim=16, is_causal=True)
  smoke = dataclasses.replace(
    full,
    problems=(small, dataclasses.replace(small, segments=4), dataclasses.replace(small, window=32, lengths="zipf")),
    peers=("naive",),
    stages=("forward",),
    dtype="float32",
    rounds=1,
    repeats=2,
    matmul_size=256,
    tile=(32, 32),
    compile_threads=2,
    result="",
  )
  return choose(variant, full=full, smoke=smoke)
