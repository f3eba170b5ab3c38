"""Ways of batching, simulated over the same requests: static and continuous, whole prompts and chunks of them.

    python -m experiments.batching --config=configs/batching/continuous.py

The scheduler is the real one; how long a step takes is a roofline model's word. For each way: throughput, use of the
slots, the time between the tokens of a running request (the steps it sits through), and the time to the first token.
"""

import dataclasses

import numpy as np
import pandas as pd

from experiments.claims import Claim
from experiments.simulate import LATENCY
from paged_flash.analysis import read_trace, show_batches, show_stalls, synthetic
from paged_flash.experiment import Workdir, main, write_result
from paged_flash.simulator import Paged, Served, poisson, simulate

FIGURES = {"batches": show_batches, "stalls": show_stalls}


@dataclasses.dataclass(kw_only=True)
class Way:
  name: str
  is_static: bool = False
  token_budget: int = 2048  # tokens of a step; a longer prompt is computed in chunks


@dataclasses.dataclass(kw_only=True)
class Config:
  ways: tuple[Way, ...] = ()
  trace: str = ""  # a file that `analysis.read_trace` knows; "" draws lengths
  synthetic: str = "sharegpt"  # what to draw (`analysis.synthetic`), where there is no trace
  num_requests: int = 300
  rate: float = 0.0  # requests per second, Poisson; a trace's own arrivals are scaled to it; 0: all at the start
  latency: str = "llama_8b_h200"  # of experiments.simulate's LATENCY
  num_slots: int = 32
  num_tokens: int = 131_072  # of memory
  page_size: int = 16
  max_seq_len: int = 2048  # of lengths drawn
  log_size: int = 32_768  # steps that are looked at; no run may have more
  points: int = 400  # of the figure over time
  figure: str = "batches"  # a name of FIGURES
  claim: Claim | None = None
  result: str = ""  # name under experiments/results/batching/<device>/ to write to; "" writes none


def step_seconds(served: Served) -> np.ndarray:
  """f64[n] of each step, without the time after it in which there was nothing to do.

  Raises:
    ValueError: if the log has not every step.
  """
  if served.stride != 1:
    raise ValueError(f"config.log_size must be at least the {served.num_steps} steps of the run")
  begin = served.log_times
  end = np.append(begin[1:], served.seconds)
  ended = np.sort(served.end)
  last = np.searchsorted(ended, end, side="right")  # requests that ended by then
  goes_on = np.searchsorted(np.sort(served.admitted), begin, side="right") > last
  return np.where(goes_on, end, ended[np.maximum(last - 1, 0)]) - begin


def row(way: Way, served: Served, config: Config) -> dict:
  steps, running = step_seconds(served), served.log.running
  order = np.argsort(steps)
  share = np.cumsum(running[order]) / running.sum()  # of all the steps that requests sit through

  def quantile(q: float) -> float:
    return float(steps[order][min(np.searchsorted(share, q), len(order) - 1)])

  first = served.first_token - served.arrival
  return dict(
    way=way.name,
    token_budget=way.token_budget,
    num_slots=config.num_slots,
    seconds=served.seconds,
    tokens_per_second=served.throughput,
    utilisation=float(served.mean.running) / config.num_slots,
    token_p50_s=quantile(0.5),
    token_p99_s=quantile(0.99),
    token_max_s=float(steps.max()),
    first_token_p50_s=float(np.median(first)),
    first_token_p99_s=float(np.percentile(first, 99)),
    steps=served.num_steps,
    preemptions=int(served.preemptions.sum()),
  )


def run(config: Config, workdir: Workdir) -> list[dict]:
  for kind, name, known in (("latency", config.latency, LATENCY), ("figure", config.figure, FIGURES)):
    if name not in known:
      raise ValueError(f"config.{kind} must be one of {', '.join(known)}, got {name!r}")
  if config.trace:
    trace = read_trace(config.trace).first(config.num_requests)
  else:
    trace = synthetic(config.synthetic, config.num_requests, max_seq_len=config.max_seq_len)
  arrivals = poisson(config.rate, trace.prompt_lens.size) if config.rate else None
  if config.rate and trace.arrivals is not None:  # the trace's own bursts, faster or slower
    arrivals = trace.arrivals * (trace.arrivals.size / trace.arrivals[-1] / config.rate)
  rows, series = [], {}
  for way in config.ways:
    served = simulate(
      trace.prompt_lens,
      trace.output_lens,
      memory=Paged(num_pages=config.num_tokens // config.page_size, page_size=config.page_size),
      num_slots=config.num_slots,
      token_budget=way.token_budget,
      arrivals=arrivals,
      latency=LATENCY[config.latency](),
      is_static=way.is_static,
      log_size=config.log_size,
    )
    rows.append(row(way, served, config))
    some = np.linspace(0, len(served.log_times) - 1, min(config.points, len(served.log_times))).astype(int)
    series[way.name] = dict(times=served.log_times[some].round(4).tolist(), running=served.log.running[some].tolist())
    workdir.log(**rows[-1])
  print(f"{trace.name}: {trace.prompt_lens.size} requests\n")
  print(pd.DataFrame(rows).to_string(index=False, float_format=lambda x: f"{x:.3g}"))
  workdir.save_figure(f"{config.figure}.png", FIGURES[config.figure]([r | series[r["way"]] for r in rows]))
  claims = [judged(config.claim, rows)] if config.claim else []
  if config.result:
    recorded = dataclasses.asdict(config) | dict(trace=trace.name)
    print(write_result("batching", rows, name=config.result, series=series, claims=claims, config=recorded))
  return rows


def judged(claim: Claim, rows: list[dict]) -> dict:
  """The first way against the last: throughput for claim 10, the longest waits between tokens for claim 15.

  Both sources measure more than that (latency at a load, the load within a bound), so at best they hold in part.
  """
  first, last = rows[0], rows[-1]
  if claim.number == "10":
    ratio = last["tokens_per_second"] / first["tokens_per_second"]
    ours = f"{ratio:.1f} x the throughput, slots {first['utilisation']:.0%} and {last['utilisation']:.0%} in use"
    return claim.judged(f"{ours} (simulated)", None if ratio > 2 else False)
  ratio = first["token_p99_s"] / last["token_p99_s"]
  ours = f"99th percentile between tokens {1e3 * first['token_p99_s']:.0f} ms with whole prompts, "
  ours += f"{1e3 * last['token_p99_s']:.0f} ms with steps of {last['token_budget']} tokens ({ratio:.1f} x); median to "
  ours += f"the first token {first['first_token_p50_s']:.2f} and {last['first_token_p50_s']:.2f} s (simulated)"
  return claim.judged(ours, None if ratio > 2 else False)


if __name__ == "__main__":
  main(run)
