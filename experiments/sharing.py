"""What sharing saves: pages among samples of one prompt, and prompt tokens that the prefix cache finds again.

    python -m experiments.sharing --config=configs/sharing/opt13b.py

For each policy, number of samples and size of memory: the share of pages saved, and of the prompts' tokens found in the
cache, beside what a cache without bounds would find where the trace knows its requests' prefixes.
"""

import dataclasses
import itertools

import pandas as pd

from experiments.claims import Claim
from experiments.comparison import check_names
from paged_flash import policies
from paged_flash.analysis import read_trace, synthetic
from paged_flash.experiment import Workdir, main, write_result
from paged_flash.simulator import Paged, simulate


@dataclasses.dataclass(kw_only=True)
class Config:
  trace: str = ""  # a file that `analysis.read_trace` knows; "" draws lengths
  synthetic: tuple[str, ...] = ("sharegpt",)  # what to draw (`analysis.synthetic`), where there is no trace
  num_requests: int = 0  # the first of the trace, or how many to draw; 0 for all of the trace
  samples: tuple[int, ...] = (1,)
  num_tokens: tuple[int, ...] = (15_728,)  # of memory
  page_size: int = 16  # of a trace that knows prefixes: the size of its blocks
  max_seq_len: int = 2048  # of lengths drawn
  policies: tuple[str, ...] = ("first_come",)  # of paged_flash.policies
  queue_size: int | None = None  # requests that the policy sees; None for twice the slots
  num_slots: int = 128
  token_budget: int = 2048
  paper_saved: tuple[float | None, ...] = ()  # to print beside ours: share of pages saved, in the order of the rows
  claim: Claim | None = None  # 11: pages saved; 15: what the policies find
  result: str = ""  # name under experiments/results/sharing/<device>/ to write to; "" writes none


def run(config: Config, workdir: Workdir) -> list[dict]:
  if config.trace:
    traces = [read_trace(config.trace).first(config.num_requests)]
  else:
    count = config.num_requests or 1000
    traces = [synthetic(name, count, max_seq_len=config.max_seq_len) for name in config.synthetic]
  check_names("policy", config.policies, policies.__all__)
  rows = []
  for trace in traces:
    known = trace.prefixes is not None
    if known and config.page_size != trace.block_size:
      raise ValueError(f"config.page_size must be {trace.block_size}, the trace's blocks, got {config.page_size}")
    for policy, samples, num_tokens in itertools.product(config.policies, config.samples, config.num_tokens):
      served = simulate(
        trace.prompt_lens,
        trace.output_lens,
        memory=Paged(num_pages=num_tokens // config.page_size, page_size=config.page_size),
        num_slots=config.num_slots,
        token_budget=config.token_budget,
        contents=trace.contents() if known else None,
        samples=samples,
        policy=getattr(policies, policy),
        queue_size=config.queue_size,
      )
      rows.append(
        dict(
          trace=trace.name,
          policy=policy,
          samples=samples,
          num_tokens=num_tokens,
          requests=trace.prompt_lens.size,
          saved=served.saved,
          hit_rate=served.hit_rate if known else None,
          ideal_hit_rate=trace.ideal_hit_rate() if known else None,
          mean_running=float(served.mean.running),
          preemptions=int(served.preemptions.sum()),
          steps=served.num_steps,
        )
      )
      workdir.log(**rows[-1])
  for ours, theirs in zip(rows, config.paper_saved, strict=False):
    ours["paper_saved"] = theirs
  print(pd.DataFrame(rows).to_string(index=False, float_format=lambda x: f"{x:.3g}" if x >= 1 else f"{x:.1%}"))
  if config.result:
    recorded = dataclasses.asdict(config) | dict(trace=rows[0]["trace"])
    claims = [judged(config.claim, rows)] if config.claim else []
    print(write_result("sharing", rows, name=config.result, claims=claims, config=recorded))
  return rows


def judged(claim: Claim, rows: list[dict]) -> dict:
  """For claim 11, pages saved within 3 points of the paper's, or 10 in part; for 15, the last policy by the first."""
  if claim.number.startswith("11"):
    off = max(abs(row["saved"] - row["paper_saved"]) for row in rows if row["paper_saved"] is not None)
    saved = {trace: [row["saved"] for row in rows if row["trace"] == trace] for trace in [r["trace"] for r in rows]}
    ours = "; ".join(f"{trace}: {min(found):.1%} to {max(found):.1%}" for trace, found in saved.items())
    return claim.judged(ours, True if off <= 0.03 else None if off <= 0.1 else False)
  of = {(row["policy"], row["num_tokens"]): row["hit_rate"] / row["ideal_hit_rate"] for row in rows}
  first, last = rows[0]["policy"], rows[-1]["policy"]
  pairs = [(size, of[first, size], of[last, size]) for size in dict.fromkeys(row["num_tokens"] for row in rows)]
  ours = ", ".join(f"{b:.0%} for {a:.0%} at {size / 2**20:g}M tokens" for size, a, b in pairs)
  holds = all(b > a for _, a, b in pairs) and (True if pairs[-1][2] >= 0.96 else None)
  return claim.judged(f"{rows[0]['trace']}, of the hits of a cache without bounds: {ours} (simulated)", holds)


if __name__ == "__main__":
  main(run)
