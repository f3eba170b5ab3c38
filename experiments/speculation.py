"""Speculative decoding on and off: how much of what is proposed holds, and what that does to steps and time.

    python -m experiments.speculation --config=configs/speculation/smollm2.py

Serves the same chat requests with each number of proposed tokens, in turns, and checks that the tokens are the same.
Prompt lookup proposes them, or the first layers of the model as a draft.
"""

import dataclasses
import functools
import time

import numpy as np

from experiments.generate import EngineConfig, load_model
from experiments.serve import Config as ServeConfig
from experiments.serve import workload
from paged_flash import Engine, Events, Params, speculation
from paged_flash.experiment import Workdir, main, write_result
from paged_flash.models import first_layers


@dataclasses.dataclass(kw_only=True)
class Config:
  model: str = "smollm2-135m-instruct"  # a path, a known name, or "tiny"
  workload: str = "mtbench"  # as for `experiments.serve`
  num_requests: int = 24
  max_tokens: int = 48
  num_proposed: tuple[int, ...] = (0, 2, 4)
  draft_layers: tuple[int, ...] = (0,)  # of the model, that propose; 0: prompt lookup does
  longest: int = 3  # of `speculation.lookup`
  shortest: int = 2
  num_slots: tuple[int, ...] = (1, 8)
  num_pages: int = 256
  page_size: int = 16
  max_seq_len: int = 512
  token_budget: int = 64
  repeats: int = 1  # turns that are timed
  result: str = ""  # name under experiments/results/speculation/<device>/ to write to; "" writes none


def run(config: Config, workdir: Workdir) -> list[dict]:
  model = load_model(config.model, "float32")
  engine = EngineConfig()  # not used: the workload asks for one
  serve = ServeConfig(
    model=config.model,
    engine=engine,
    workload=config.workload,
    num_requests=config.num_requests,
    max_tokens=config.max_tokens,
  )
  requests = [(request.prompt, request.params) for request in workload(serve, model.config.vocab_size)]
  lookup = functools.partial(speculation.lookup, longest=config.longest, shortest=config.shortest)
  ways = dict.fromkeys((n, layers if n else 0) for n in config.num_proposed for layers in config.draft_layers)
  rows = []
  for num_slots in config.num_slots:
    engines = {
      (num_proposed, layers): Engine(
        model,
        num_slots=num_slots,
        num_pages=config.num_pages,
        page_size=config.page_size,
        max_seq_len=config.max_seq_len,
        token_budget=config.token_budget,
        num_proposed=num_proposed,
        proposer=first_layers(model, layers) if layers else lookup,
      )
      for num_proposed, layers in ways
    }
    warm = [1, 2] * config.page_size
    for engine in engines.values():
      engine.complete([(warm, Params(max_tokens=8))] * 2)
    seconds: dict[tuple[int, int], list[float]] = {way: [] for way in engines}
    seen: dict[tuple[int, int], list[Events]] = {}
    outputs = {}
    for turn in range(config.repeats):
      for way, engine in engines.items():
        seen[way], start = [], time.perf_counter()
        done = engine.complete(requests, on_events=seen[way].append)
        seconds[way].append(time.perf_counter() - start)
        outputs[way] = [completion.output_ids for completion in done]
        print(f"{num_slots} slots, {way[0]} proposed, turn {turn + 1}: {seconds[way][-1]:.1f} s")
    first = next(iter(engines))
    for way, events in seen.items():
      proposed, accepted = (sum(sum(getattr(e, name).values()) for e in events) for name in ("proposed", "accepted"))
      turns = sum(len({event.request for event in e}) for e in events)  # of a slot that got tokens
      tokens = sum(map(len, events))
      took = float(np.median(seconds[way]))
      rows.append(
        dict(
          num_slots=num_slots,
          num_proposed=way[0],
          draft_layers=way[1],
          same_tokens=sum(a == b for a, b in zip(outputs[way], outputs[first], strict=True)) / len(requests),
          output_tokens=tokens,
          steps=len(events),
          proposed=proposed,
          accepted=accepted,
          acceptance=accepted / proposed if proposed else None,
          tokens_per_turn=tokens / turns,
          computed=sum(e.num_scheduled for e in events),
          tokens_per_second=tokens / took,
          speed=float(np.median(seconds[first])) / took,
        )
      )
      workdir.log(**rows[-1])
      print(rows[-1])
  if config.result:
    print(write_result("speculation", rows, name=config.result, config=dataclasses.asdict(config)))
  return rows


if __name__ == "__main__":
  main(run)
