"""Who has the KV memory: one trace of request lengths, through the real scheduler and through contiguous reservations.

    python -m experiments.memory --config=configs/memory/azure.py --config.trace=FILE.csv

All requests are there from the start and run in order, which gives the memory of a loaded server without waiting for
one. Prints and records how the memory is divided for each allocator, and draws it.
"""

import dataclasses

import numpy as np
import pandas as pd

from experiments.claims import Claim
from paged_flash.analysis import Trace, read_trace, show_memory_split, show_page_sizes, synthetic
from paged_flash.experiment import Workdir, main, write_result
from paged_flash.simulator import Contiguous, Paged, Served, simulate


@dataclasses.dataclass(kw_only=True)
class Config:
  trace: str = ""  # a file that `analysis.read_trace` knows; "" draws lengths
  synthetic: tuple[str, ...] = ("sharegpt",)  # what to draw (`analysis.synthetic`), where there is no trace
  num_requests: int = 0  # the first of the trace, or how many to draw; 0 for all of the trace
  page_sizes: tuple[int, ...] = (16,)
  reserve: tuple[str, ...] = ("max", "pow2", "oracle")  # the contiguous allocators
  max_seq_len: int = 0  # of the model, what "max" reserves; 0 for the longest request
  num_slots: int = 256
  num_tokens: int = 262_144  # of memory
  token_budget: int = 2048
  paper_used: tuple[float, ...] = ()  # to print beside ours: share that holds tokens, of `reserve` and of pages
  claim: Claim | None = None
  result: str = ""  # name under experiments/results/memory/<device>/ to write to; "" writes none


def traces(config: Config) -> list[Trace]:
  """The configured trace, or the synthetic ones."""
  if config.trace:
    return [read_trace(config.trace).first(config.num_requests)]
  count, longest = config.num_requests or 1000, config.max_seq_len or 2048
  return [synthetic(name, count, max_seq_len=longest) for name in config.synthetic]


def row(trace: Trace, allocator: str, page_size: int, served: Served) -> dict:
  """One run: shares of all memory while requests waited, and the means over all steps."""
  return dict(
    trace=trace.name,
    allocator=allocator,
    page_size=page_size,
    requests=trace.prompt_lens.size,
    steps=served.num_steps,
    mean_running=float(served.mean.running),
    loaded_running=float(served.mean_queued.running),
    preemptions=int(served.preemptions.sum()),
    waste=served.waste,
    **served.split(),
  )


def run(config: Config, workdir: Workdir) -> list[dict]:
  rows = []
  for trace in traces(config):
    lens = trace.prompt_lens + trace.output_lens
    print(
      f"{trace.name}: {lens.size} requests, prompt mean {trace.prompt_lens.mean():.0f}, output mean "
      f"{trace.output_lens.mean():.0f}, longest {lens.max()} tokens; memory of {config.num_tokens:,} tokens"
    )
    longest = config.max_seq_len or int(lens.max())
    memories: dict[str, Paged | Contiguous] = {
      how: Contiguous(num_tokens=config.num_tokens, reserve=how, max_seq_len=longest) for how in config.reserve
    }
    for size in config.page_sizes:
      memories[f"paged {size}"] = Paged(num_pages=config.num_tokens // size, page_size=size)
    for allocator, memory in memories.items():
      served = simulate(
        trace.prompt_lens,
        trace.output_lens,
        memory=memory,
        num_slots=config.num_slots,
        token_budget=config.token_budget,
      )
      rows.append(row(trace, allocator, memory.page_size if isinstance(memory, Paged) else 0, served))
      workdir.log(**{key: None if isinstance(v, float) and np.isnan(v) else v for key, v in rows[-1].items()})
  for ours, theirs in zip(rows, config.paper_used, strict=False):
    ours["paper_used"] = theirs
  table = pd.DataFrame(rows).drop(columns=["requests", "page_size"])
  print(table.to_string(index=False, float_format=lambda x: f"{x:.3g}" if x >= 1 else f"{x:.2%}"))
  if config.reserve:
    workdir.save_figure("split.png", show_memory_split([r for r in rows if r["trace"] == rows[0]["trace"]]))
  if len(config.page_sizes) > 1:
    workdir.save_figure("page_sizes.png", show_page_sizes(rows))
  if config.result:
    recorded = dataclasses.asdict(config) | dict(trace=rows[0]["trace"])
    claims = [judged(config.claim, rows)] if config.claim else []
    print(write_result("memory", rows, name=config.result, claims=claims, config=recorded))
  return rows


def judged(claim: Claim, rows: list[dict]) -> dict:
  """Shares of the memory that hold tokens, within 3 points of the paper's where it gives them; else pages' waste."""
  used = ", ".join(f"{row['used']:.1%} {row['allocator'].split()[0]}" for row in rows)
  if rows[0].get("paper_used"):
    off = max(abs(row["used"] - row["paper_used"]) for row in rows)
    return claim.judged(f"{used}: within {100 * off:.1f} points", off <= 0.03)
  paged, reserved = rows[-1], [row["waste"] for row in rows[:-1]]
  ours = f"{paged['trace']}: {paged['waste']:.2%} wasted with pages, {min(reserved):.0%} to {max(reserved):.0%} with "
  return claim.judged(f"{ours}reservations; holds tokens: {used}", paged["waste"] < 0.04 < min(reserved))


if __name__ == "__main__":
  main(run)
