"""Tuning leaves out what fails or is wrong, and writes a table that the library reads."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import pytest

from experiments import tune
from experiments.attention_cases import Case
from paged_flash import tuning
from paged_flash.experiment import Workdir
from paged_flash.kernels import xla
from paged_flash.kernels.arguments import flash_problem

CASE = Case(batch=1, seq_len=64, num_heads=2, num_kv_heads=1, head_dim=16, is_causal=True)


def test_a_run_writes_the_best_of_what_works(monkeypatch, tmp_path: pathlib.Path):
  monkeypatch.setattr(tuning, "TABLES", tmp_path / "tiles")
  right = xla.forward

  def forward(problem, operands, *, block_q, block_kv):
    if block_q == 8:
      raise ValueError("block_q must be at least 16, got 8")
    out, lse = right(problem, operands, block_q=block_q, block_kv=block_kv)
    return (2 * out if block_q == 16 else out), lse  # tiles of 16 queries are wrong

  monkeypatch.setattr(xla, "forward", forward)
  config = tune.Config(
    problems=(CASE,),
    implementation="xla",
    forward=tune.Grid(block_q=(8, 16, 32), block_kv=(32,)),
    backward=tune.Grid(block_q=(32,), block_kv=(64,)),
    dtype="float32",
    rounds=1,
    repeats=1,
    compile_threads=1,
  )
  table = tune.run(config, Workdir.create(tmp_path, config))
  kind = dict(head_dim=16, value_dim=16, is_causal=True)
  assert table == {
    "forward": [dict(match=kind, tiles=dict(block_q=32, block_kv=32))],
    "backward": [dict(match=kind, tiles=dict(block_q=32, block_kv=64))],
  }
  for path in (tmp_path / "tiles/cpu.json", tmp_path / "tiles.json"):
    assert json.loads(path.read_text()) == table
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  notes = {line["tiles"]["block_q"]: line["note"] for line in lines if line.get("stage") == "forward" and "us" in line}
  assert notes[8] == "ValueError: block_q must be at least 16, got 8"
  assert notes[16].startswith("WRONG") and " to " in notes[32]


def test_a_table_of_several_lengths_is_read_as_it_was_meant(monkeypatch, tmp_path: pathlib.Path):
  cases = [dataclasses.replace(CASE, seq_len=n) for n in (4096, 512, 2048)]
  assert [tune.match(case, cases).get("min_query_len") for case in cases] == [4096, None, 2048]
  table = {"forward": [dict(match=dict(head_dim=64), tiles=dict(stages=9))]}
  for stages, case in ((1, cases[0]), (2, cases[1]), (7, cases[2]), (3, cases[2])):
    table = tune.updated(table, "forward", tune.match(case, cases), dict(stages=stages))
  (tmp_path / "some_gpu.json").write_text(json.dumps(table))
  monkeypatch.setattr(tuning, "TABLES", tmp_path)
  x = jnp.zeros((1, 1, 1, 16))
  problem, _ = flash_problem(x, x, x, is_causal=True)
  for length, stages in ((100, 2), (512, 2), (2047, 2), (2048, 3), (4096, 1), (16384, 1)):
    here = dataclasses.replace(problem, device="some_gpu", query_len=length)
    assert tuning.tiles(here, "sm90") == dict(stages=stages)
  other = dataclasses.replace(problem, device="some_gpu", head_dim=64)
  assert tuning.tiles(other, "sm90") == dict(stages=9)


def test_candidates_are_all_combinations_of_what_the_kernel_takes():
  grid = tune.Grid(block_kv=(64, 128), stages=(2, 3))
  assert grid.candidates() == [dict(block_kv=kv, stages=s) for kv in (64, 128) for s in (2, 3)]


def test_an_unknown_kernel_is_refused(tmp_path: pathlib.Path):
  config = tune.Config(problems=(CASE,), implementation="sm42")
  with pytest.raises(ValueError, match="config.implementation must be one of .*xla.*, got 'sm42'"):
    tune.run(config, Workdir.create(tmp_path, config))
