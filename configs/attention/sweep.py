"""TFLOP/s over the sequence length: 16k tokens in all, width 2048, as in the figures of FlashAttention-2 and -3.

Claim (Shah et al. 2024, abstract): on an H100 the forward pass reaches 740 TFLOP/s, 75 % of the peak.

    python -m experiments.attention --config=configs/attention/sweep.py

36 shapes: lengths 512 to 16k, head_dim 64, 128 and 256, causal and full. Expected: the speed rises with the length and
comes close to the matrix product's at 16k. The peer is cuDNN. `--config.stages="forward"` takes a third of the time.

Found on an H100: forward up to 802 TFLOP/s at head_dim 256 and 736 at 128, forward + backward up to 652; cuDNN's time
by ours is 1.09 and 1.12 in the mean. All 36 shapes take ten minutes.
"""

import dataclasses

from experiments.attention import Config
from experiments.attention_cases import Case
from experiments.claims import Claim
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  def cases(tokens: int, width: int, lengths: tuple[int, ...], head_dims: tuple[int, ...]) -> tuple[Case, ...]:
    return tuple(
      Case(
        batch=tokens // length,
        seq_len=length,
        num_heads=width // head_dim,
        num_kv_heads=width // head_dim,
        head_dim=head_dim,
        is_causal=is_causal,
      )
      for head_dim in head_dims
      for is_causal in (False, True)
      for length in lengths
    )

  lengths = (512, 1024, 2048, 4096, 8192, 16384)
  full = Config(
    problems=cases(16384, 2048, lengths, (64, 128, 256)),
    peers=("cudnn",),
    figure="sweep",
    claim=Claim(
      number="6",
      claim="Flash attention comes near the speed of a matrix product",
      source="Shah et al. 2024, abstract and figure 5",
      theirs="FlashAttention-3 forward up to 740 TFLOP/s, 75 % of the H100's peak; 1.5 to 2 x FlashAttention-2",
      figure="attention_sweep",
    ),
    seconds=900.0,
    result="sweep",
  )
  smoke = dataclasses.replace(
    full,
    problems=cases(256, 32, (128,), (16,)),
    peers=("naive",),
    stages=("forward",),
    dtype="float32",
    rounds=1,
    repeats=2,
    matmul_size=256,
    compile_threads=2,
    result="",
  )
  return choose(variant, full=full, smoke=smoke)
