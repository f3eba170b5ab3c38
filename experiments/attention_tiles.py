"""Time of attention over the size of its tiles, beside the bytes that Theorem 2 says they move.

    python -m experiments.attention_tiles --config=configs/attention_tiles/h200.py

A tile of more queries needs more fast memory and makes K and V pass through it fewer times (Dao et al. 2022, Theorem 2:
`experiments.attention_io` counts them). So does a pair of tiles, in a cluster of two blocks that share what they fetch,
though neither computes in another way than alone: what bytes do by themselves. All tiles are compiled side by side,
checked, and timed in turns; what does not fit the chip's shared memory says so in its row.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import pandas as pd

from experiments.attention_cases import Case, make_inputs, references
from experiments.attention_io import theory_bytes
from experiments.claims import Claim
from experiments.tune import Config as TuneConfig
from experiments.tune import Grid, Tiles, time_stage
from paged_flash.analysis import human_bytes, show_groups
from paged_flash.experiment import Workdir, main, write_result
from paged_flash.kernels.arguments import flash_problem
from paged_flash.kernels.flash_forward_sm90 import ROWS


@dataclasses.dataclass(kw_only=True)
class Config:
  problems: tuple[Case, ...]  # full attention
  tiles: Grid  # of the forward pass
  implementation: str = "sm90"
  dtype: str = "bfloat16"
  rounds: int = 3
  repeats: int = 5
  compile_threads: int = 8
  claim: Claim | None = None
  result: str = ""  # name under experiments/results/attention_tiles/<device>/ to write to; "" writes none


def queries_of(tiles: Tiles) -> int:
  """Queries of a tile, of both blocks where two share what they fetch."""
  return tiles.get("block_q") or ROWS * tiles["num_wgs"] * tiles.get("cluster", 1)


def run(config: Config, workdir: Workdir) -> list[dict]:
  settings = TuneConfig(
    implementation=config.implementation,
    forward=config.tiles,
    dtype=config.dtype,
    rounds=config.rounds,
    repeats=config.repeats,
    compile_threads=config.compile_threads,
  )
  rows: list[dict[str, Any]] = []
  for case in config.problems:
    if case.is_masked or case.is_causal:
      raise ValueError(f"config.problems must be full attention, got {case.name}")
    inputs = make_inputs(case, config.dtype)
    problem, operands = flash_problem(*inputs[:3])
    timed = time_stage(settings, workdir, "forward", problem, (operands,), references(case, inputs))
    for each in sorted(timed, key=lambda each: queries_of(each["tiles"])):
      queries = queries_of(each["tiles"])
      row: dict[str, Any] = dict(case=case.name, queries=queries, **each)
      row["theory_bytes"] = theory_bytes(case, queries, jnp.dtype(config.dtype).itemsize)
      row["tflops"] = case.flops("forward") / each["us"] / 1e6 if each["us"] else None
      workdir.log(**row)
      rows.append(row)
  shown = pd.DataFrame(rows)
  shown["theory_bytes"] = shown["theory_bytes"].map(human_bytes)
  print(shown.to_string(index=False, float_format=lambda x: f"{x:.1f}"))
  workdir.save_figure("attention_tiles.png", figure(rows))
  claims = [judged(config.claim, rows)] if config.claim else []
  if config.result:
    recorded = dataclasses.asdict(config)
    print(write_result("attention_tiles", rows, name=config.result, claims=claims, config=recorded))
  return rows


def fastest(rows: list[dict], case: str) -> dict[int, dict]:
  """The fastest row of each size of tile, from the smallest."""
  timed = [row for row in rows if row["case"] == case and row["us"]]
  timed.sort(key=lambda row: (row["queries"], -row["us"]))
  return {row["queries"]: row for row in timed}


def is_pair(row: dict) -> bool:
  return row["tiles"].get("cluster", 1) == 2


def smallest_pair(rows: list[dict], case: str) -> dict | None:
  """The fastest pair of the smallest tiles: it moves half of the K and V that they move alone, in the same steps."""
  timed = [row for row in rows if row["case"] == case and row["us"]]
  queries = 2 * min((row["queries"] for row in timed), default=0)
  pairs = [row for row in timed if is_pair(row) and row["queries"] == queries]
  return min(pairs, key=lambda row: row["us"], default=None)


def figure(rows: list[dict]):
  """The fastest tiles of each size, and the pairs of the smallest."""
  shown = {}
  for case in dict.fromkeys(row["case"] for row in rows):
    for row in (*fastest(rows, case).values(), smallest_pair(rows, case)):
      if row is not None:
        tile = f"2 x {row['queries'] // 2}" if is_pair(row) else str(row["queries"])
        shown[case, tile] = row | dict(tile=tile)
  ordered = sorted(shown.values(), key=lambda row: (row["queries"], not is_pair(row)))
  panels = {"us": "us of a forward pass", "theory_bytes": "between fast and slow memory, by Theorem 2"}
  xlabel = "queries of a tile" + (" (2 x: a pair that shares what it fetches)" if any(map(is_pair, ordered)) else "")
  return show_groups(ordered, groups="tile", bars="case", panels=panels, xlabel=xlabel)


def judged(claim: Claim, rows: list[dict]) -> dict:
  """The smallest tiles are slower than the fastest by a tenth and more, and time never rises before these.

  A part of the claim, where pairs of the smallest tiles are hardly faster than they are alone: then it is not the bytes
  that cost time.
  """
  parts, holds, by_bytes = [], [], []
  for case in dict.fromkeys(row["case"] for row in rows):
    us = {queries: row["us"] for queries, row in fastest(rows, case).items()}
    if len(us) < 2:
      continue
    best = min(us, key=lambda queries: us[queries])
    smaller = [us[queries] for queries in us if queries <= best]
    falls = all(a >= b for a, b in zip(smaller, smaller[1:], strict=False))
    holds.append(falls and smaller[0] >= 1.1 * us[best])
    part = f"{case}: " + ", ".join(f"{time / us[best]:.2f} at {queries}" for queries, time in us.items())
    if paired := smallest_pair(rows, case):
      by_bytes.append(paired["us"] <= 0.95 * smaller[0])
      part += f" ({paired['us'] / us[best]:.2f} in pairs of {min(us)}, with half the bytes)"
    parts.append(part)
  verdict = True if all(holds) and all(by_bytes) else None if any(holds) else False
  return claim.judged("; ".join(parts) or "not measured", verdict if holds else False)


if __name__ == "__main__":
  main(run)
