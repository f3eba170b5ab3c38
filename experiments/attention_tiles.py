"""Time of attention over the size of its tiles, beside the bytes that Theorem 2 says they move.

    python -m experiments.attention_tiles --config=configs/attention_tiles/h200.py

A tile of more queries needs more fast memory and makes K and V pass through it fewer times (Dao et al. 2022, Theorem 2:
`experiments.attention_io` counts them). All tiles are compiled side by side, checked, and timed in turns; what does not
fit the chip's shared memory says so in its row.
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


def figure(rows: list[dict]):
  best = [row for case in dict.fromkeys(row["case"] for row in rows) for row in fastest(rows, case).values()]
  best.sort(key=lambda row: row["queries"])
  panels = {"us": "us", "theory_bytes": "between fast and slow memory, by Theorem 2"}
  return show_groups(best, groups="queries", bars="case", panels=panels, xlabel="queries of a tile")


def judged(claim: Claim, rows: list[dict]) -> dict:
  """The smallest tiles are slower than the fastest by a tenth and more, and time never rises before these."""
  parts, holds = [], []
  for case in dict.fromkeys(row["case"] for row in rows):
    us = {queries: row["us"] for queries, row in fastest(rows, case).items()}
    if len(us) < 2:
      continue
    best = min(us, key=lambda queries: us[queries])
    smaller = [us[queries] for queries in us if queries <= best]
    falls = all(a >= b for a, b in zip(smaller, smaller[1:], strict=False))
    holds.append(falls and smaller[0] >= 1.1 * us[best])
    parts.append(f"{case}: " + ", ".join(f"{time / us[best]:.2f} at {queries}" for queries, time in us.items()))
  verdict = True if all(holds) else None if any(holds) else False
  return claim.judged("; ".join(parts) or "not measured", verdict if holds else False)


if __name__ == "__main__":
  main(run)
