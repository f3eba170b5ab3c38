"""Pages that the beams of a search share, with a real model: its beams fork and end where its words make them.

    python -m experiments.beam --config=configs/beam/smollm2.py

Searches chat requests with each width. What is saved is the part of the pages that would be held if no beam shared any,
over all steps; and how often a page was copied, because a beam was about to write to one that it shared.
"""

import dataclasses
import time

import numpy as np

from experiments.claims import Claim
from experiments.generate import EngineConfig, load_model
from experiments.serve import Config as ServeConfig
from experiments.serve import workload
from paged_flash import BeamSearch, Engine
from paged_flash.experiment import Workdir, main, write_result


@dataclasses.dataclass(kw_only=True)
class Config:
  model: str = "smollm2-135m-instruct"  # a path, a known name, or "tiny"
  workload: str = "mtbench"  # as for `experiments.serve`
  num_requests: int = 8
  max_tokens: int = 48
  widths: tuple[int, ...] = (2, 4, 6)
  length_penalty: float = 1.0
  together: int = 2  # prompts
  num_pages: int = 512
  page_size: int = 16
  max_seq_len: int = 512
  token_budget: int = 64
  paper_saved: tuple[float | None, ...] = ()  # to print beside ours: share of pages saved, in the order of the widths
  claim: Claim | None = None
  result: str = ""  # name under experiments/results/beam/<device>/ to write to; "" writes none


def run(config: Config, workdir: Workdir) -> list[dict]:
  model = load_model(config.model, "float32")
  serve = ServeConfig(
    model=config.model,
    engine=EngineConfig(),
    workload=config.workload,
    num_requests=config.num_requests,
    max_tokens=config.max_tokens,
  )
  prompts = [request.prompt for request in workload(serve, model.config.vocab_size)]
  rows = []
  for i, width in enumerate(config.widths):
    engine = Engine(
      model,
      num_slots=width * config.together,
      num_pages=config.num_pages,
      page_size=config.page_size,
      max_seq_len=config.max_seq_len,
      token_budget=config.token_budget,
    )
    start = time.perf_counter()
    results, state = BeamSearch(engine, width=width)(
      prompts, max_tokens=config.max_tokens, length_penalty=config.length_penalty, progress=True
    )
    seconds = time.perf_counter() - start
    held, saved, steps = float(state.held), float(state.saved), int(state.steps)
    rows.append(
      dict(
        width=width,
        requests=len(prompts),
        saved=saved / (held + saved),
        paper_saved=config.paper_saved[i] if i < len(config.paper_saved) else None,
        mean_pages=held / steps,
        pages_copied=int(state.copied),
        output_tokens=sum(len(result.output_ids) for found in results for result in found),
        logprob_per_token=float(np.mean([found[0].logprob / len(found[0].output_ids) for found in results])),
        steps=steps,
        restarts=int(state.restarts),
        seconds=seconds,
      )
    )
    workdir.log(**rows[-1])
    print(rows[-1])
  if config.result:
    claims = [judged(config.claim, rows)] if config.claim else []
    print(write_result("beam", rows, name=config.result, claims=claims, config=dataclasses.asdict(config)))
  return rows


def judged(claim: Claim, rows: list[dict]) -> dict:
  """Pages saved within 10 points of the paper's, whose prompts are others, and more of them for wider beams."""
  saved = [row["saved"] for row in rows]
  near = all(abs(row["saved"] - row["paper_saved"]) <= 0.1 for row in rows if row["paper_saved"] is not None)
  ours = ", ".join(f"{row['saved']:.1%} at width {row['width']}" for row in rows)
  rising = sorted(saved) == saved
  return claim.judged(f"{ours} (chat prompts)", True if near and rising else None if near or rising else False)


if __name__ == "__main__":
  main(run)
