"""One engine, one memory, four ways to hand it out: the same real requests, served with pages and with reservations.

    python -m experiments.allocation --config=configs/allocation/smollm2.py

The program is the same each time: one engine, compiled once. With "paged" all requests are queued at once, and the
scheduler grants pages on demand. With the others the engine gets a request only when `cache.buddy` has a contiguous
block for all that it reserves (`simulator.contiguous.reserve`), in the same memory, and the block is free when the
request has ended. A reservation so keeps from others what it would keep from them in a contiguous cache; what a block
holds lies in pages all the same, so that no kernel differs.

The run with pages comes first: it says how long each output is, which "pow2" and "oracle" know beforehand. Steps and
requests in the batch do not depend on the machine, and are what the simulator says of the same lengths (told beside
them); seconds do, and processor seconds less than those of the clock.
"""

import collections
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from experiments import serve as serving
from experiments.claims import Claim
from experiments.generate import EngineConfig, load_model
from paged_flash import Engine, Params
from paged_flash.analysis import show_groups
from paged_flash.cache import buddy
from paged_flash.experiment import Workdir, main, write_result
from paged_flash.simulator import Contiguous, Paged, simulate
from paged_flash.simulator.contiguous import RESERVE, reserve

_grant, _release = jax.jit(buddy.grant), jax.jit(buddy.release)


@dataclasses.dataclass(kw_only=True)
class Config:
  model: str  # a path, a known name, or "tiny"
  dtype: str = "float32"
  engine: EngineConfig  # its max_seq_len is what "max" reserves
  workload: str = "mtbench"  # as of experiments.serve
  num_requests: int = 40
  max_tokens: int = 256
  prompt_lens: tuple[int, int] = (16, 256)  # of a synthetic workload
  claim: Claim | None = None
  result: str = ""  # name under experiments/results/allocation/<device>/ to write to; "" writes none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What became of R requests with one way of handing out the memory."""

  outputs: list[list[int]]  # [R] tokens of each
  running: np.ndarray  # i64[steps]  requests in the batch
  held: np.ndarray  # i64[steps]  tokens of memory in reservations or pages
  used: np.ndarray  # i64[steps]  tokens of memory that hold K and V
  preemptions: int
  seconds: float
  cpu_seconds: float  # of this process, all threads


def serve(engine: Engine, requests: Sequence[tuple[list[int], Params]], reserved: Sequence[int] | None = None) -> Run:
  """Serves requests to their ends, first come, first served.

  Args:
    engine: with room for all requests in its queue.
    requests: token ids and parameters.
    reserved: tokens of contiguous memory that each request needs before it may start; None for pages alone.

  Raises:
    ValueError: a reservation that no memory of this size can hold.
  """
  num_tokens = engine.num_pages * engine.page_size
  if reserved is not None and max(reserved) > buddy.largest(num_tokens):
    raise ValueError(f"the memory must have a block of {max(reserved)} tokens, got {num_tokens} tokens")
  blocks = buddy.init(num_slots=engine.num_slots, num_tokens=num_tokens)
  slots: dict[int, int] = {}  # request -> which of the blocks is its
  index: dict[int, int] = {}  # the engine's id -> request
  waiting, steps, preemptions = collections.deque(range(len(requests))), [], 0
  outputs: list[list[int]] = [[] for _ in requests]
  state, start, cpu = engine.init(), time.perf_counter(), time.process_time()
  while waiting or not state.idle:
    while waiting:
      if reserved is not None:
        slot = min(set(range(engine.num_slots)) - set(slots.values()), default=None)
        if slot is None:
          break
        blocks, granted = _grant(blocks, slot, reserved[waiting[0]])
        if not granted:
          break
        slots[waiting[0]] = slot
      request = waiting.popleft()
      ids, params = requests[request]
      state, id = engine.submit(state, ids, **dataclasses.asdict(params))
      index[id] = request
    held = int(blocks.num_tokens - blocks.num_free)
    state, events = engine.step(state)
    held = events.pages_held * engine.page_size if reserved is None else held
    steps.append((events.num_running, held, events.tokens_held))
    preemptions += len(events.preempted)
    done = np.zeros(engine.num_slots, bool)
    for event in events:
      outputs[index[event.request]].append(event.token)
      if event.done and reserved is not None:
        done[slots.pop(index[event.request])] = True
    if done.any():
      blocks = _release(blocks, done)
  running, held, used = np.array(steps).T
  return Run(
    outputs=outputs, running=running, held=held, used=used, preemptions=preemptions,
    seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu,
  )  # fmt: skip


def simulated(engine: Engine, prompts: np.ndarray, outputs: np.ndarray, how: str) -> dict[str, float]:
  """What the simulator says of requests of these lengths in the engine's memory."""
  memory: Paged | Contiguous = Paged(num_pages=engine.num_pages, page_size=engine.page_size)
  if how != "paged":
    memory = Contiguous(num_tokens=memory.num_tokens, reserve=how, max_seq_len=engine.max_seq_len)
  budget = engine.settings.token_budget
  served = simulate(prompts, outputs, memory=memory, num_slots=engine.num_slots, token_budget=budget)
  return dict(simulated_steps=served.num_steps, simulated_running=float(served.mean.running))


def run(config: Config, workdir: Workdir) -> list[dict]:
  try:
    model = load_model(config.model, config.dtype)
    given = serving.Config(
      model=config.model, engine=config.engine, workload=config.workload, num_requests=config.num_requests,
      max_tokens=config.max_tokens, prompt_lens=config.prompt_lens,
    )  # fmt: skip
    asked = serving.workload(given, model.config.vocab_size)
    engine = Engine(model, queue_size=len(asked) + 1, prefix_cache=False, **dataclasses.asdict(config.engine))
    requests = [engine.check(engine.encode(request.prompt), request.params) for request in asked]
  except (OSError, ValueError) as error:
    sys.exit(str(error))
  print(engine.memory)
  serve(engine, [([0] * (engine.page_size + 1), Params(max_tokens=2))], [engine.page_size + 3])  # compiles
  runs = {"paged": serve(engine, requests)}
  prompts = np.array([len(ids) for ids, _ in requests])
  outputs = np.array([len(tokens) for tokens in runs["paged"].outputs])
  for how in RESERVE:
    reserved = reserve(how, jnp.asarray(prompts), jnp.asarray(outputs), engine.max_seq_len)
    runs[how] = serve(engine, requests, reserved.tolist())
  memory, rows = engine.num_pages * engine.page_size, []
  for how in (*RESERVE, "paged"):
    each = runs[how]
    row: dict[str, Any] = dict(allocator=how, requests=len(requests), output_tokens=int(outputs.sum()))
    row |= dict(steps=each.running.size, mean_running=float(each.running.mean()), most_running=int(each.running.max()))
    row |= simulated(engine, prompts, outputs, how)
    row |= dict(held=float(each.held.mean() / memory), used=float(each.used.mean() / memory))
    row |= dict(tokens_per_cpu_second=float(outputs.sum() / each.cpu_seconds), cpu_seconds=each.cpu_seconds)
    row |= dict(tokens_per_second=float(outputs.sum() / each.seconds), seconds=each.seconds)
    row["preemptions"] = each.preemptions
    row["same_outputs"] = sum(a == b for a, b in zip(each.outputs, runs["paged"].outputs, strict=True))
    workdir.log(**row)
    rows.append(row)
  print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3g}".format))
  workdir.save_figure("allocation.png", figure(rows))
  if config.result:
    claims = [judged(config.claim, rows)] if config.claim else []
    lens: dict[str, Any] = dict(prompt_lens=prompts, output_lens=outputs)
    recorded = dataclasses.asdict(config)
    print(write_result("allocation", rows, name=config.result, claims=claims, config=recorded, **lens))
  return rows


def figure(rows: list[dict]):
  """Steps and batch of the engine beside the simulator's, and the engine's tokens per processor second."""
  keys = dict(mean_running="simulated_running", steps="simulated_steps")
  bars = [row | dict(who="engine") for row in rows]
  bars += [dict(allocator=row["allocator"], who="simulator") | {k: row[v] for k, v in keys.items()} for row in rows]
  panels = dict(mean_running="requests in the batch", steps="steps")
  panels["tokens_per_cpu_second"] = "output tokens per processor second"
  return show_groups(bars, groups="allocator", bars="who", panels=panels)


def judged(claim: Claim, rows: list[dict]) -> dict:
  """By processor seconds: at least twice as fast as reserving the maximum, and faster than all others.

  In part, where pages are only faster than the maximum; not at all, where outputs differ.
  """
  *others, paged = rows
  gains = {k: [paged[k] / row[k] for row in others] for k in ("tokens_per_cpu_second", "tokens_per_second")}
  fewer, same = [row["steps"] / paged["steps"] for row in others], min(row["same_outputs"] for row in rows)

  def said(numbers: list[float]) -> str:
    return ", ".join(f"{n:.1f} x" for n in numbers)

  by_cpu = gains["tokens_per_cpu_second"]
  ours = ", ".join(f"{gain:.1f} x {row['allocator']}" for gain, row in zip(by_cpu, others, strict=True))
  ours += f" in tokens per processor second (by the clock {said(gains['tokens_per_second'])}), in {said(fewer)} fewer "
  ours += f"steps; in the batch {' / '.join(f'{row["mean_running"]:.1f}' for row in rows)}"
  ours += f"; {same} of {paged['requests']} outputs the same"
  holds = True if by_cpu[0] >= 2 and min(by_cpu) > 1 else None if by_cpu[0] > 1 else False
  return claim.judged(ours, holds if same == paged["requests"] else False)


if __name__ == "__main__":
  main(run)
