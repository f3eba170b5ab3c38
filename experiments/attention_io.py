"""Bytes that attention moves over the sequence length and the size of its tiles: counted, and by the theory.

    python -m experiments.attention_io --config=configs/attention_io/tiles.py

Dao et al. 2022, Theorem 2: with M numbers of fast memory, standard attention makes Theta(N d + N^2) accesses to slow
memory, FlashAttention Theta(N^2 d^2 / M). A tile of `rows` queries fills the fast memory with M = rows d numbers, so
K and V, 2 N d numbers, pass through it N / rows times. Counted is what the Hopper kernel's schedule asks for
(`analysis.flash_traffic`); the temporaries are those that XLA allocates on the device at hand.
"""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pandas as pd

from experiments.attention import Config as TimingConfig
from experiments.attention import ours
from experiments.attention_cases import Case
from experiments.attention_memory import temporaries
from experiments.attention_traffic import Config as TrafficConfig
from experiments.attention_traffic import problem_of
from experiments.claims import Claim
from experiments.peers.jax_attention import Peer, plain_xla
from paged_flash.analysis import flash_traffic, human_bytes, naive_traffic, show_attention_io
from paged_flash.experiment import Workdir, main, write_result
from paged_flash.kernels.flash_forward_sm90 import ROWS


@dataclasses.dataclass(kw_only=True)
class Config:
  case: Case = Case(batch=1, seq_len=0, num_heads=1, num_kv_heads=1, head_dim=128, is_causal=False)  # of any length
  seq_lens: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
  tiles: tuple[tuple[int, int], ...] = ((1, 1), (2, 1), (3, 1), (2, 2), (3, 2))  # (warpgroups of 64 rows, cluster)
  block_kv: int = 128
  temporaries: tuple[int, ...] = (1024, 2048, 4096)  # lengths at which XLA's are read
  dtype: str = "bfloat16"
  claims: tuple[Claim, ...] = ()  # 1: naive against flash at `at`; 2: over the tiles
  at: int = 4096
  result: str = ""  # name under experiments/results/attention_io/<device>/ to write to; "" writes none


def theory_bytes(case: Case, rows: int, itemsize: int) -> float:
  """What Theorem 2 says of tiles of so many queries: K and V pass through once for each; Q, O and the LSE once."""
  queries = case.batch * case.num_heads * case.seq_len
  return queries * case.seq_len * 2 * case.head_dim * itemsize / rows + queries * (2 * case.head_dim * itemsize + 4)


def row(case: Case, tile: tuple[int, int], config: Config) -> dict:
  """What one length and tile size moves, in bytes."""
  wgs, cluster = tile
  problem, size = problem_of(case, TrafficConfig(dtype=config.dtype)), jnp.dtype(config.dtype).itemsize
  tiles = dict(num_wgs=wgs, block_kv=config.block_kv, stages=2, cluster=cluster)
  traffic, rows = flash_traffic(problem, tiles), ROWS * wgs * cluster
  return dict(
    seq_len=case.seq_len,
    scores=case.batch * case.num_heads * case.seq_len**2,
    rows=rows,
    flash_bytes=traffic.l2.total,
    theory_bytes=theory_bytes(case, rows, size),
    flash_hbm_bytes=traffic.hbm.total,
    naive_bytes=naive_traffic(problem).total,
    compulsory_bytes=traffic.compulsory.total,
  )


def run(config: Config, workdir: Workdir) -> list[dict]:
  rows = []
  for length, tile in itertools.product(config.seq_lens, config.tiles):
    rows.append(row(dataclasses.replace(config.case, seq_len=length), tile, config))
    workdir.log(**rows[-1])
  buffers = []
  peers = {"naive": Peer("plain XLA", plain_xla), "flash": ours(TimingConfig())}
  for length in config.temporaries:
    case = dataclasses.replace(config.case, seq_len=length)
    read = {f"{name}_temporary_bytes": temporaries(peer, case, "forward", config.dtype) for name, peer in peers.items()}
    buffers.append(dict(seq_len=length, scores=length**2 * case.batch * case.num_heads) | read)
    workdir.log(**buffers[-1])
  for table in (rows, buffers):
    shown = pd.DataFrame(table)
    for key in shown.columns[shown.columns.str.endswith("bytes")]:
      shown[key] = shown[key].map(human_bytes)
    print(shown.to_string(index=False), "\n")
  workdir.save_figure("attention_io.png", show_attention_io(rows))
  claims = judged(config, rows, buffers)
  if config.result:
    recorded = dataclasses.asdict(config)
    print(write_result("attention_io", rows, name=config.result, temporaries=buffers, claims=claims, config=recorded))
  return rows


def judged(config: Config, rows: list[dict], buffers: list[dict]) -> list[dict]:
  """The claims, by number, and what the rows say of them."""
  at = [row for row in rows if row["seq_len"] == config.at]
  found = []
  for claim in config.claims:
    if claim.number == "1":
      best, buffer = at[-1], next(row for row in buffers if row["seq_len"] == config.at)
      ratio = best["naive_bytes"] / best["flash_hbm_bytes"]
      ours = f"{best['scores'] / 1e6:.1f}M scores; {human_bytes(best['naive_bytes'])} against "
      ours += f"{human_bytes(best['flash_hbm_bytes'])} of HBM traffic ({ratio:.0f} x), temporaries "
      ours += " against ".join(human_bytes(buffer[f"{name}_temporary_bytes"]) for name in ("naive", "flash"))
      found.append(claim.judged(ours, best["scores"] == 2**24 and ratio > 9))
    if claim.number == "2":
      long = [row for row in rows if row["seq_len"] >= config.at]  # shorter ones have many tiles that are part full
      off = max(abs(row["flash_bytes"] / row["theory_bytes"] - 1) for row in long)
      slope, naive = (
        np.polyfit(np.log([row["seq_len"] for row in last]), np.log([row[key] for row in last]), 1)[0]
        for key in ("flash_bytes", "naive_bytes")
        for last in [[row for row in rows if row["rows"] == at[-1]["rows"]][-3:]]
      )
      ours = f"within {off:.1%} of N^2 d^2 / M over {len(at)} tile sizes from N = {config.at} on; "
      ours += f"grows as N^{slope:.2f}, standard attention as N^{naive:.2f}"
      found.append(claim.judged(ours, off < 0.05))
  return found


if __name__ == "__main__":
  main(run)
