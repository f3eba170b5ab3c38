"""Tile sizes: the table of a device, the heuristic of a device without one, and what a bad table says."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from paged_flash import tuning
from paged_flash.kernels.arguments import flash_problem

TABLE = {
  "forward": [
    {"match": {"head_dim": 128, "is_causal": True, "min_query_len": 4096}, "tiles": {"block_kv": 176, "stages": 2}},
    {"match": {"head_dim": 128, "dtype": "bfloat16"}, "tiles": {"block_kv": 96, "stages": 3}},
  ]
}


def problem(*, tokens=1024, head_dim=128, is_causal=False, device="nvidia_h200"):
  x = jnp.zeros((1, 1, 1, head_dim), jnp.bfloat16)
  small, _ = flash_problem(x, x, x, is_causal=is_causal)
  return dataclasses.replace(small, device=device, query_len=tokens, kv_len=tokens)


@pytest.fixture
def tables(monkeypatch, tmp_path):
  monkeypatch.setattr(tuning, "TABLES", tmp_path)
  return tmp_path


def test_the_first_entry_that_matches_wins(tables):
  (tables / "nvidia_h200.json").write_text(json.dumps(TABLE))
  assert tuning.tiles(problem(tokens=4096, is_causal=True), "sm90") == {"block_kv": 176, "stages": 2}
  assert tuning.tiles(problem(tokens=4095, is_causal=True), "sm90") == {"block_kv": 96, "stages": 3}
  assert tuning.tiles(problem(tokens=4096), "sm90") == {"block_kv": 96, "stages": 3}
  for unlisted in (problem(head_dim=64), problem(device="nvidia_h100")):
    assert tuning.tiles(unlisted, "sm90") == tuning._heuristic(unlisted, "forward")
  assert tuning.tiles(problem(), "sm90", "backward") == tuning._heuristic(problem(), "backward")


def test_an_unknown_device_gets_the_heuristic(tables):
  for head_dim, wanted in ((64, (128, 3, 3)), (96, (128, 2, 2)), (128, (128, 2, 2)), (256, (64, 2, 2))):
    tiles = tuning.tiles(problem(head_dim=head_dim, device="some_new_gpu"), "sm90")
    assert (tiles["block_kv"], tiles["stages"], tiles["num_wgs"]) == wanted
  assert tuning.tiles(problem(), "sm90", "backward").keys() == {"stages"}
  small = problem(head_dim=64)
  assert tuning.tiles(small, "sm90", "backward") == dict(block_q=128, stages=2)
  for changes in (
    dict(query_len=127),
    dict(window=(9, 0)),
    dict(has_kv_lens=True),
    dict(has_segments=True),
    dict(soft_cap=9.0),
  ):
    assert tuning.tiles(dataclasses.replace(small, **changes), "sm90", "backward") == dict(block_q=64, stages=3)


@pytest.mark.parametrize(
  "text, message",
  [
    ("{", r"bad.json must be JSON: "),
    ("[]", r"bad.json must hold one object with keys forward and backward, got \[\]"),
    ('{"sideways": []}', r"must hold one object with keys forward and backward, got {'sideways': \[\]}"),
    ('{"forward": [{"tiles": {}}]}', r"bad.json, forward, entry 0 must have the objects match and tiles, got {'tiles'"),
    ('{"forward": [{"match": [], "tiles": {}}]}', r"entry 0 must have the objects match and tiles, got {'match': \[\]"),
    (
      '{"backward": [{"match": {"head_dim": 64, "min_dtype": 8, "size": 2}, "tiles": {}}]}',
      r"bad.json, backward, entry 0: match must name fields of FlashProblem, got min_dtype, size",
    ),
    ('{"forward": [{"match": {}, "tiles": {"block_kv": "128"}}]}', r"tiles must be positive integers, got"),
  ],
)
def test_a_malformed_table_says_what_is_wrong(tables, text, message):
  (tables / "bad.json").write_text(text)
  with pytest.raises(ValueError, match=message):
    tuning.tiles(problem(device="bad"), "sm90")


def test_the_tables_of_the_package_are_well_formed():
  for path in tuning.TABLES.glob("*.json"):
    assert tuning._table(path), path.name
