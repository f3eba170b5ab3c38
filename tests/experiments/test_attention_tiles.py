"""Time over the size of the tiles: the bytes beside it are those of the kernel's schedule, and the claim is judged."""

import dataclasses
import pathlib

import pytest

from experiments import attention_tiles
from experiments.attention_cases import Case
from experiments.attention_tiles import judged, queries_of, theory_bytes
from experiments.attention_traffic import Config as TrafficConfig
from experiments.attention_traffic import problem_of
from experiments.claims import Claim
from paged_flash.analysis import flash_traffic
from paged_flash.experiment import Workdir, config

CLAIM = Claim(number="2b", claim="c", source="s", theirs="t")


@pytest.mark.parametrize("wgs, cluster", [(1, 1), (2, 1), (2, 2)])
def test_bytes_are_those_that_the_kernel_s_schedule_asks_for(wgs, cluster):
  case = Case(batch=2, seq_len=2048, num_heads=4, num_kv_heads=4, head_dim=128, is_causal=False)
  tiles = dict(num_wgs=wgs, block_kv=128, stages=2, cluster=cluster)
  asked = flash_traffic(problem_of(case, TrafficConfig()), tiles).l2.total
  assert theory_bytes(case, queries_of(tiles), 2) == pytest.approx(asked, rel=0.01)


def test_every_tile_is_checked_and_timed(tmp_path: pathlib.Path):
  settings = config.load("configs/attention_tiles/h200.py:smoke")
  rows = attention_tiles.run(settings, Workdir.create(tmp_path, settings))
  assert [row["queries"] for row in rows] == [32, 128] and all(row["us"] > 0 for row in rows)
  assert rows[0]["theory_bytes"] > 2.9 * rows[1]["theory_bytes"]  # 8 passes of K and V for 2, Q and O beside them
  masked = dataclasses.replace(settings, problems=(dataclasses.replace(settings.problems[0], is_causal=True),))
  with pytest.raises(ValueError, match="full attention"):
    attention_tiles.run(masked, Workdir.create(tmp_path, masked))


def test_time_must_fall_until_it_no_longer_does():
  def rows(*times, case="c"):
    return [dict(case=case, queries=64 * (i + 1), us=us, tiles={}) for i, us in enumerate(times)]

  assert judged(CLAIM, rows(15.0, 10.0, 11.0))["verdict"] == "reproduced"
  assert judged(CLAIM, rows(10.5, 10.0))["verdict"] == "not reproduced"  # hardly falls
  assert judged(CLAIM, rows(15.0, 16.0, 10.0))["verdict"] == "not reproduced"  # rises on the way
  both = rows(15.0, 10.0) + rows(10.0, 10.0, case="d")
  assert judged(CLAIM, both)["verdict"] == "in part"
  assert judged(CLAIM, both)["ours"] == "c: 1.50 at 64, 1.00 at 128; d: 1.00 at 64, 1.00 at 128"
  fastest = rows(15.0, 10.0) + [dict(case="c", queries=q, us=us, tiles={}) for q, us in ((64, 12.0), (192, None))]
  assert judged(CLAIM, fastest)["ours"] == "c: 1.20 at 64, 1.00 at 128"


def test_bytes_alone_are_told_by_pairs_of_the_smallest_tiles():
  def rows(pair):
    alone = [dict(case="c", queries=64 * n, us=us, theory_bytes=n, tiles={}) for n, us in ((1, 15.0), (2, 10.0))]
    return [*alone, dict(case="c", queries=128, us=pair, theory_bytes=2, tiles=dict(cluster=2))]

  assert judged(CLAIM, rows(12.0))["verdict"] == "reproduced"
  assert judged(CLAIM, rows(15.0))["verdict"] == "in part"  # half the bytes, and no faster
  assert judged(CLAIM, rows(15.0))["ours"].endswith(
    "1.50 at 64, 1.00 at 128 (1.50 in pairs of 64, with half the bytes)"
  )
  ticks = attention_tiles.figure(rows(15.0)).axes[0].get_xticklabels()
  assert [tick.get_text() for tick in ticks] == ["64", "2 x 64", "128"]
