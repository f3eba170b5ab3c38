"""What pages save: the lengths of a real trace, served by the real scheduler, against contiguous reservation.

    python -m experiments.memory --config=configs/memory/azure.py --config.trace=FILE.csv

Prints and records the share of held memory that holds no token, over all steps of the run: in pages, and where every
running request holds a contiguous reservation of the longest request, as caches without pages do.
"""

import csv
import dataclasses
import pathlib

import numpy as np
import pandas as pd

from paged_flash.experiment import Workdir, main, write_result
from paged_flash.simulator import Timeline, simulate


@dataclasses.dataclass(kw_only=True)
class Config:
  trace: str = ""  # CSV with columns ContextTokens and GeneratedTokens; "" draws lengths at random
  num_requests: int = 0  # the first of the trace; 0 for all. Of random lengths, how many
  max_random: int = 100  # the longest random prompt and output
  page_sizes: tuple[int, ...] = (16,)
  num_slots: int = 256
  num_tokens: int = 262_144  # of the pool
  token_budget: int = 2048
  result: str = ""  # name under experiments/results/memory/<device>/ to write to; "" writes none


def lengths(config: Config) -> tuple[np.ndarray, np.ndarray]:
  """Prompt and output lengths, [R] each.

  Raises:
    ValueError: the trace is not there, or not such a file.
  """
  if not config.trace:
    rng = np.random.default_rng(0)
    prompts, outputs = rng.integers(1, config.max_random, (2, config.num_requests or 50))
    return prompts, outputs
  path = pathlib.Path(config.trace)
  if not path.is_file():
    raise ValueError(f"config.trace must be a CSV file, got {config.trace!r}")
  with path.open(newline="") as file:
    header = next(csv.reader(file), [])
  wanted = ["ContextTokens", "GeneratedTokens"]
  if not set(wanted) <= set(header):
    raise ValueError(f"config.trace must have columns {wanted}, got {header[:8]}")
  rows = pd.read_csv(path, usecols=wanted)
  prompts, outputs = (np.asarray(rows[name])[: config.num_requests or None] for name in wanted)
  return prompts, np.maximum(outputs, 1)


def row(timeline: Timeline, page_size: int) -> dict:
  """Memory of one run, in tokens, averaged over its steps; and what contiguous reservation would hold for it."""
  longest = int(timeline.final.max())
  return dict(
    page_size=page_size,
    requests=timeline.final.size,
    steps=timeline.pages.size,
    mean_running=float(timeline.running.mean()),
    preemptions=int(timeline.preempted.sum()),
    mean_tokens=float(timeline.tokens.mean()),
    paged_held=float(timeline.pages.mean() * page_size),
    paged_waste=timeline.waste(page_size),
    reserved_per_request=longest,
    contiguous_held=float(timeline.running.mean() * longest),
    contiguous_waste=1 - float(timeline.tokens.sum() / (timeline.running.sum() * longest)),
  )


def run(config: Config, workdir: Workdir) -> list[dict]:
  prompts, outputs = lengths(config)
  print(
    f"{prompts.size} requests: prompt mean {prompts.mean():.0f}, output mean {outputs.mean():.0f}, "
    f"longest {(prompts + outputs).max()} tokens; pool of {config.num_tokens:,} tokens, {config.num_slots} slots"
  )
  rows = []
  for page_size in config.page_sizes:
    timeline = simulate(
      prompts,
      outputs,
      num_slots=config.num_slots,
      num_pages=config.num_tokens // page_size,
      page_size=page_size,
      token_budget=config.token_budget,
      progress=True,
    )
    rows.append(row(timeline, page_size))
    workdir.log(**rows[-1])
  table = pd.DataFrame(rows)
  print(table.T.to_string(header=False, float_format=lambda x: f"{x:,.4g}"))
  for r in rows:
    print(
      f"page size {r['page_size']}: {r['paged_waste']:.2%} of the held memory is wasted in pages, "
      f"{r['contiguous_waste']:.2%} by contiguous reservation of {r['reserved_per_request']:,} tokens"
    )
  if config.result:
    source = pathlib.Path(config.trace).name or "random"
    print(
      write_result(
        "memory", rows, name=config.result, trace=source, config=dataclasses.asdict(config) | dict(trace=source)
      )
    )
  return rows


if __name__ == "__main__":
  main(run)
