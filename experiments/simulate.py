"""A day at the counter, in seconds: requests arrive at several rates, and wait for memory of several kinds.

    python -m experiments.simulate --config=configs/simulate/opt13b_sharegpt.py

For each allocator and rate: normalised latency (mean of the time from arrival to end per output token), mean batch,
throughput. The scheduler is the real one; how long a step takes is a roofline model's word.
"""

import dataclasses

import numpy as np
import pandas as pd

from experiments.claims import Claim
from paged_flash import simulator
from paged_flash.analysis import read_trace, show_rates, synthetic
from paged_flash.experiment import Workdir, main, write_result
from paged_flash.simulator import Contiguous, Paged, poisson, simulate

LATENCY = {"opt_13b_a100": simulator.opt_13b_a100, "llama_8b_h200": simulator.llama_8b_h200}


@dataclasses.dataclass(kw_only=True)
class Config:
  trace: str = ""  # a file that `analysis.read_trace` knows; "" draws lengths
  synthetic: str = "sharegpt"  # what to draw (`analysis.synthetic`), where there is no trace
  num_requests: int = 1000
  last_tokens: int = 0  # of each prompt that are kept, as of a chat that outgrows its model; 0 for all
  rates: tuple[float, ...] = (1.0, 2.0)  # requests per second, Poisson; for a trace that has times, they are scaled
  latency: str = "opt_13b_a100"  # or "llama_8b_h200"
  overhead_s: float | None = None  # of a step, in place of the latency model's
  page_size: int = 16
  reserve: tuple[str, ...] = ("max", "pow2", "oracle")  # the contiguous allocators
  max_seq_len: int = 2048
  num_slots: int = 64
  num_tokens: int = 15_728  # of memory
  token_budget: int = 2048
  paper_rate: float = 0.0  # to print beside ours: at this rate
  paper_batch: tuple[float, ...] = ()  # the mean batch of `reserve` and of pages
  latency_bound: float = 0.2  # seconds per output token up to which a rate is sustained
  claims: tuple[Claim, ...] = ()  # 9a, 11e: the sustained rates; others: the batches at `paper_rate`
  result: str = ""  # name under experiments/results/simulate/<device>/ to write to; "" writes none


def run(config: Config, workdir: Workdir) -> list[dict]:
  if config.latency not in LATENCY:
    raise ValueError(f"config.latency must be one of {', '.join(LATENCY)}, got {config.latency!r}")
  latency = LATENCY[config.latency]()
  if config.overhead_s is not None:
    latency = dataclasses.replace(latency, overhead_s=config.overhead_s)
  if config.trace:
    trace = read_trace(config.trace).first(config.num_requests)
  else:
    trace = synthetic(config.synthetic, config.num_requests, max_seq_len=config.max_seq_len)
  if config.last_tokens:
    trace = dataclasses.replace(trace, prompt_lens=np.minimum(trace.prompt_lens, config.last_tokens), prefixes=None)
  size, rows = config.page_size, []
  memories: dict[str, Paged | Contiguous] = {
    how: Contiguous(num_tokens=config.num_tokens, reserve=how, max_seq_len=config.max_seq_len) for how in config.reserve
  }
  memories["paged"] = Paged(num_pages=config.num_tokens // size, page_size=size)
  for allocator, memory in memories.items():
    for rate in config.rates:
      arrivals = poisson(rate, trace.prompt_lens.size)
      if trace.arrivals is not None:  # the trace's own bursts, faster or slower
        arrivals = trace.arrivals * (trace.arrivals.size / trace.arrivals[-1] / rate)
      served = simulate(
        trace.prompt_lens,
        trace.output_lens,
        memory=memory,
        num_slots=config.num_slots,
        token_budget=config.token_budget,
        arrivals=arrivals,
        latency=latency,
      )
      first = served.first_token - served.arrival
      rows.append(
        dict(
          trace=trace.name,
          allocator=allocator,
          rate=rate,
          normalised_latency=served.normalised_latency,
          mean_running=float(served.mean.running),
          tokens_per_second=served.throughput,
          median_first_token_s=float(np.median(first)),
          p99_first_token_s=float(np.percentile(first, 99)),
          queued=served.queued_seconds / served.seconds,
          preemptions=int(served.preemptions.sum()),
          steps=served.num_steps,
        )
      )
      workdir.log(**rows[-1])
  if config.paper_batch:
    theirs = dict(zip(memories, config.paper_batch, strict=True))
    rows = [
      row | dict(paper_batch=theirs[row["allocator"]] if row["rate"] == config.paper_rate else None) for row in rows
    ]
  print(pd.DataFrame(rows).to_string(index=False, float_format=lambda x: f"{x:.3g}"))
  workdir.save_figure("rates.png", show_rates(rows))
  if config.result:
    recorded = dataclasses.asdict(config) | dict(trace=trace.name)
    claims = [judged(claim, rows, config) for claim in config.claims]
    print(write_result("simulate", rows, name=config.result, claims=claims, config=recorded))
  return rows


def sustained(rows: list[dict], allocator: str, bound: float) -> tuple[float, bool]:
  """The rate at which normalised latency reaches `bound`, on a line between the rates tried (its logarithm).

  Returns:
    (rate, whether it was reached); the highest rate tried if it was not, 0 if the lowest is beyond.
  """
  points = sorted((row["rate"], row["normalised_latency"]) for row in rows if row["allocator"] == allocator)
  before = (0.0, 0.0)
  for rate, latency in points:
    if latency > bound:
      if not before[1]:
        return 0.0, True
      part = np.log(bound / before[1]) / np.log(latency / before[1])
      return float(before[0] + part * (rate - before[0])), True
    before = (rate, latency)
  return before[0], False


def judged(claim: Claim, rows: list[dict], config: Config) -> dict:
  """Sustained rates against the paper's ranges (11e: twice that of each), or mean batches within 15 % of its."""
  if claim.number in ("9a", "11e"):
    rate, reached = sustained(rows, "paged", config.latency_bound)
    gains = {name: rate / (sustained(rows, name, config.latency_bound)[0] or np.inf) for name in config.reserve}
    ours = f"{rate:.2f} requests/s with pages{'' if reached else ' or more'}: "
    ours += ", ".join(f"{gain:.1f} x {name}" for name, gain in gains.items())
    holds: bool | None = 1.7 <= gains["oracle"] <= 2.7 and 2.7 <= gains["max"] <= 8
    if claim.number == "11e":
      holds = True if all(1.7 <= gain <= 2.3 for gain in gains.values()) else None if min(gains.values()) > 1 else False
    return claim.judged(f"{ours} (simulated, up to {config.latency_bound:g} s per token)", holds)
  at = [row for row in rows if row["rate"] == config.paper_rate]
  off = [abs(row["mean_running"] / row["paper_batch"] - 1) for row in at]
  ours = " / ".join(f"{row['mean_running']:.2f}" for row in at) + " (simulated"
  ours += ")" if config.overhead_s is None else f", with {1e3 * config.overhead_s:g} ms a step beside the roofline)"
  return claim.judged(ours, True if max(off) <= 0.15 else None if max(off[:-1]) <= 0.15 else False)


if __name__ == "__main__":
  main(run)
