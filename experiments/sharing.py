"""What sharing saves: pages among samples of one prompt, and prompt tokens that the prefix cache finds again.

    python -m experiments.sharing --config=configs/sharing/opt13b.py

For each number of samples and size of memory: the share of pages saved, and of the prompts' tokens found in the cache,
beside what a cache without bounds would find where the trace knows its requests' prefixes.
"""

import dataclasses

import pandas as pd

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
  num_slots: int = 128
  token_budget: int = 2048
  paper_saved: tuple[float | None, ...] = ()  # to print beside ours: share of pages saved, in the order of the rows
  result: str = ""  # name under experiments/results/sharing/<device>/ to write to; "" writes none


def run(config: Config, workdir: Workdir) -> list[dict]:
  if config.trace:
    traces = [read_trace(config.trace).first(config.num_requests)]
  else:
    count = config.num_requests or 1000
    traces = [synthetic(name, count, max_seq_len=config.max_seq_len) for name in config.synthetic]
  rows = []
  for trace in traces:
    known = trace.prefixes is not None
    if known and config.page_size != trace.block_size:
      raise ValueError(f"config.page_size must be {trace.block_size}, the trace's blocks, got {config.page_size}")
    for samples in config.samples:
      for num_tokens in config.num_tokens:
        served = simulate(
          trace.prompt_lens,
          trace.output_lens,
          memory=Paged(num_pages=num_tokens // config.page_size, page_size=config.page_size),
          num_slots=config.num_slots,
          token_budget=config.token_budget,
          contents=trace.contents() if known else None,
          samples=samples,
        )
        rows.append(
          dict(
            trace=trace.name,
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
    print(write_result("sharing", rows, name=config.result, config=recorded))
  return rows


if __name__ == "__main__":
  main(run)
