"""A loaded server whose requests share something: what is shared, what that gains, and how it is judged."""

import dataclasses
import pathlib

import numpy as np

from experiments import capacity
from experiments.claims import Claim
from paged_flash.experiment import Workdir, config

CLAIM = Claim(number="11c", claim="it is so", source="a paper", theirs="much")


def test_requests_share_the_full_pages_of_the_prefix_and_nothing_else():
  trace = capacity.requests(capacity.Config(num_requests=5, page_size=16), 40)
  own = trace.prompt_lens - 40
  assert own.min() >= 1 and np.array_equal(own, capacity.requests(capacity.Config(num_requests=5), 0).prompt_lens)
  contents = trace.contents()
  assert (contents[:, :2] == [0, 1]).all()  # 32 of the 40 tokens fill pages
  rest = contents[:, 2:][contents[:, 2:] >= 0]
  assert len(set(rest.tolist())) == rest.size


def test_pages_gain_more_the_more_is_shared(tmp_path: pathlib.Path):
  settings = config.load("configs/capacity/prefix.py:smoke")
  settings = dataclasses.replace(
    settings, num_requests=24, num_slots=16, num_tokens=1024, max_seq_len=1024, prefix_lens=(0, 256)
  )
  rows = capacity.run(settings, Workdir.create(tmp_path, settings))
  none, much = (row["gain"] for row in rows if row["allocator"] == "paged")
  assert much > 2 * none >= 2
  assert all(row["gain"] == 1 for row in rows if row["allocator"] == "oracle")


def test_gains_are_judged_by_the_papers():
  def verdict(*gains):
    paper = (1.5, 3.0)
    rows = [dict(allocator="paged", gain=gain, paper_gain=theirs) for gain, theirs in zip(gains, paper, strict=True)]
    return capacity.judged(CLAIM, [dict(allocator="oracle"), *rows])["verdict"]

  assert [verdict(1.6, 3.2), verdict(2.0, 3.2), verdict(2.0, 1.9)] == ["reproduced", "in part", "not reproduced"]
