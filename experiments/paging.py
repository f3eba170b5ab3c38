"""What pages cost, gathered from committed results: time of the kernel, bytes of the table, time of the scheduler.

    python -m experiments.paging --config=configs/paging/costs.py

Nothing is measured here. The kernel's cost is that of the same pages in random order against in order; the table's is
its bytes by those of the keys and values that it maps; the scheduler's is `plan` and `commit` of a step.
"""

import dataclasses
import json
import pathlib
from typing import Any

import pandas as pd

from experiments.claims import Claim
from paged_flash.experiment import Workdir, main, write_result

RESULTS = pathlib.Path(__file__).with_name("results")


@dataclasses.dataclass(kw_only=True)
class Config:
  kernels: tuple[str, ...] = ()  # results of experiments.paged_attention, paths below experiments/results
  table: str = ""  # of experiments.kv_sizes
  scheduler: str = ""  # of experiments.scheduler
  claim: Claim | None = None
  result: str = ""  # name under experiments/results/paging/<device>/ to write to; "" writes none


def load(name: str) -> dict[str, Any]:
  return json.loads((RESULTS / f"{name}.json").read_text())


def overheads(rows: list[dict[str, Any]]) -> dict[str, float]:
  """The part of a kernel's time that the order of pages costs, by case; "rotated", from memory, where there is one."""
  return {row["case"]: row["overhead"] for row in rows if row["overhead"] is not None}  # "rotated" comes last


def run(config: Config, workdir: Workdir) -> list[dict]:
  rows: list[dict[str, Any]] = []

  def add(cost: str, case: str, on: str, share: float | None, ms: float | None = None) -> None:
    rows.append(dict(cost=cost, case=case, on=on, share=share, ms=ms))

  for name in config.kernels:
    result = load(name)
    for case, share in overheads(result["rows"]).items():
      add("kernel", case, result["device"]["kind"], share)
  for row in load(config.table)["rows"]:
    add("table", f"{row['model']} {row['dtype']}", "any", row["table_share"])
  result = load(config.scheduler)
  for row in result["rows"]:
    case = f"{row['num_slots']} slots, {row['num_pages']:,} pages"
    add("scheduler", case, result["device"]["kind"], None, row["plan_commit_ms"])
  for row in rows:
    workdir.log(**row)
  print(pd.DataFrame(rows).to_string(index=False, na_rep="-", float_format="{:.2g}".format))
  claims = [judged(config.claim, rows)] if config.claim else []
  if config.result:
    print(write_result("paging", rows, name=config.result, claims=claims, config=dataclasses.asdict(config)))
  return rows


def judged(claim: Claim, rows: list[dict[str, Any]]) -> dict[str, Any]:
  """The worst of each cost; the paper's 26 % is the bar of the kernel, a thousandth that of the table."""
  kernel, table = ([row["share"] for row in rows if row["cost"] == cost] for cost in ("kernel", "table"))
  slowest = max((row for row in rows if row["cost"] == "scheduler"), key=lambda row: row["ms"])
  device = next(row["on"] for row in rows if row["cost"] == "kernel")
  ours = f"kernel {min(kernel):+.1%} to {max(kernel):+.1%} over {len(kernel)} cases ({device}); table at most "
  ours += f"{max(table):.0e} of the KV cache; {slowest['ms']:.2f} ms a step to schedule {slowest['case']} "
  ours += f"(on a {slowest['on'].upper()})"
  return claim.judged(ours, max(kernel) <= 0.26 and max(table) < 1e-3)


if __name__ == "__main__":
  main(run)
