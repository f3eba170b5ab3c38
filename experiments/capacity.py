"""Tokens per second of a loaded server whose requests share something: a prefix of all prompts, samples of each prompt.

    python -m experiments.capacity --config=configs/capacity/prefix.py

All requests are there from the start. Pages share the full pages of the prefix and of a prompt's samples, and compute
them once; contiguous reservations share nothing. The scheduler is the real one; how long a step takes is a roofline
model's word.
"""

import dataclasses
import itertools

import numpy as np
import pandas as pd

from experiments.claims import Claim
from experiments.simulate import LATENCY
from paged_flash.analysis import Trace, show_groups
from paged_flash.experiment import Workdir, main, write_result
from paged_flash.simulator import Contiguous, Paged, simulate


@dataclasses.dataclass(kw_only=True)
class Config:
  prompt_mean: float = 19.31  # tokens of a prompt's own, geometric
  output_mean: float = 58.45
  num_requests: int = 1000
  prefix_lens: tuple[int, ...] = (0,)  # tokens that all prompts begin with, before their own
  samples: tuple[int, ...] = (1,)
  latency: str = "opt_13b_a100"  # of experiments.simulate's LATENCY
  page_size: int = 16
  reserve: tuple[str, ...] = ("oracle",)  # the contiguous allocators
  max_seq_len: int = 2048
  num_slots: int = 256
  num_tokens: int = 15_728  # of memory
  token_budget: int = 2048
  paper_gains: tuple[float | None, ...] = ()  # throughput of pages by the first of `reserve`, in the order of the cases
  claim: Claim | None = None
  result: str = ""  # name under experiments/results/capacity/<device>/ to write to; "" writes none


def requests(config: Config, prefix_len: int) -> Trace:
  """Prompts of the prefix and tokens of their own; block ids are equal where the full pages of the prefix are."""
  rng = np.random.default_rng(0)
  prompts, outputs = (rng.geometric(1 / mean, config.num_requests) for mean in (config.prompt_mean, config.output_mean))
  prompts = np.minimum(prefix_len + prompts, config.max_seq_len // 2)
  outputs = np.minimum(outputs, config.max_seq_len - prompts)
  shared = tuple(range(prefix_len // config.page_size))
  new = itertools.count(len(shared))
  counts = -(-prompts // config.page_size) - len(shared)
  prefixes = tuple(shared + tuple(itertools.islice(new, int(count))) for count in counts)
  return Trace(
    name="drawn", prompt_lens=prompts, output_lens=outputs, prefixes=prefixes, block_size=config.page_size
  )  # fmt: skip


def run(config: Config, workdir: Workdir) -> list[dict]:
  if config.latency not in LATENCY:
    raise ValueError(f"config.latency must be one of {', '.join(LATENCY)}, got {config.latency!r}")
  memories: dict[str, Paged | Contiguous] = {
    how: Contiguous(num_tokens=config.num_tokens, reserve=how, max_seq_len=config.max_seq_len) for how in config.reserve
  }
  memories["paged"] = Paged(num_pages=config.num_tokens // config.page_size, page_size=config.page_size)
  rows = []
  for index, (prefix_len, samples) in enumerate(itertools.product(config.prefix_lens, config.samples)):
    trace, case = requests(config, prefix_len), []
    for allocator, memory in memories.items():
      served = simulate(
        trace.prompt_lens,
        trace.output_lens,
        memory=memory,
        num_slots=config.num_slots,
        token_budget=config.token_budget,
        latency=LATENCY[config.latency](),
        contents=trace.contents() if isinstance(memory, Paged) else None,
        samples=samples,
      )
      case.append(
        dict(
          prefix_len=prefix_len,
          samples=samples,
          allocator=allocator,
          tokens_per_second=served.throughput,
          mean_running=float(served.mean.running),
          preemptions=int(served.preemptions.sum()),
          steps=served.num_steps,
        )
      )
    for row in case:
      row["gain"] = row["tokens_per_second"] / case[0]["tokens_per_second"]
      of_paper = row["allocator"] == "paged" and index < len(config.paper_gains)
      row["paper_gain"] = config.paper_gains[index] if of_paper else None
      workdir.log(**row)
    rows += case
  print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3g}".format))
  workdir.save_figure("capacity.png", figure(rows))
  if config.result:
    claims = [judged(config.claim, rows)] if config.claim else []
    print(write_result("capacity", rows, name=config.result, claims=claims, config=dataclasses.asdict(config)))
  return rows


def figure(rows: list[dict]):
  groups = "prefix_len" if len({row["prefix_len"] for row in rows}) > 1 else "samples"
  panels = dict(tokens_per_second="output tokens per second", mean_running="requests in the batch")
  xlabel = dict(prefix_len="tokens of the prefix that all share", samples="samples of a prompt")[groups]
  ours_first = sorted(rows, key=lambda row: row["allocator"] != "paged")
  return show_groups(ours_first, groups=groups, bars="allocator", panels=panels, xlabel=xlabel)


def judged(claim: Claim, rows: list[dict]) -> dict:
  """Gains of pages within a fifth of the paper's; in part, where they only rise with what is shared."""
  paged = [row for row in rows if row["allocator"] == "paged"]
  near = [abs(row["gain"] / row["paper_gain"] - 1) <= 0.2 for row in paged if row["paper_gain"] is not None]
  gains = [row["gain"] for row in paged]
  rising = sorted(gains) == gains and gains[0] > 1
  ours = ", ".join(f"{row['gain']:.2f} x" for row in paged) + f" {rows[0]['allocator']} (simulated)"
  return claim.judged(ours, True if near and all(near) and rising else None if rising else False)


if __name__ == "__main__":
  main(run)
