"""Bytes of attention with and without the score matrix, over the sequence length and the size of the tiles.

Claim (Dao et al. 2022, Theorem 2 and figure 2, middle): standard attention moves Theta(N d + N^2) numbers, tiled
attention Theta(N^2 d^2 / M): inversely to the size of the tile. At N = 4096 the score matrix has 16.8M entries.

    python -m experiments.attention_io --config=configs/attention_io/tiles.py

One head of 128, full attention, bf16; counted, no GPU needed. Two levels: what the multiprocessors ask for, which is
the theorem's slow memory, and what is left of it behind an L2 cache, which the theorem does not have. Expected: the
former by the theorem, the latter little more than every operand once. Found: both.
"""

import dataclasses

from experiments.attention_io import Config
from experiments.claims import Claim
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  source = "Dao et al. 2022"
  full = Config(
    claims=(
      Claim(
        number="1",
        claim="At N = 4096 the score matrix has 16.8M entries, which flash attention neither stores nor moves",
        source=f"{source}, section 3; figure 2, left",
        theirs="HBM traffic 40.3 against 4.4 GB (9 x; GPT-2 medium, N = 1024, forward and backward)",
        figure="attention_io",
      ),
      Claim(
        number="2",
        claim="HBM accesses: N^2 d^2 / M for tiles that fill M, N d + N^2 for standard attention",
        source=f"{source}, Theorem 2; figure 2, middle",
        theirs="Theta(N^2 d^2 / M); falls with the block size",
        figure="attention_io",
      ),
    ),
    result="tiles",
  )
  smoke = dataclasses.replace(
    full, seq_lens=(512, 1024), tiles=((1, 1), (2, 2)), temporaries=(512,), dtype="float32", at=512, result=""
  )
  return choose(variant, full=full, smoke=smoke)
