"""Traces: each format in a few lines, and what prefixes are worth to a cache without bounds."""

import json
import os
import pathlib

import numpy as np
import pytest

from paged_flash.analysis import Trace, read_trace, synthetic

AZURE = (
  "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9305900,396,0"
)
LENGTHS = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n74,918,992,0.08\n290,905,1195,0.3\n"


def mooncake(*rows):
  keys = ("timestamp", "input_length", "output_length", "hash_ids")
  return "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)


def test_azure(tmp_path: pathlib.Path):
  (tmp_path / "a.csv").write_bytes(AZURE.encode())
  trace = read_trace(tmp_path / "a.csv")
  assert (trace.prompt_lens.tolist(), trace.output_lens.tolist()) == ([374, 396], [44, 1])
  assert trace.arrivals is not None and trace.arrivals.tolist() == pytest.approx([0, 4.25])
  assert trace.first(1).arrivals is not None and trace.first(1).prompt_lens.tolist() == [374]
  assert trace.first(0) is trace.first(9) is trace


def test_lists_of_lengths(tmp_path: pathlib.Path):
  (tmp_path / "l.csv").write_text(LENGTHS)
  trace = read_trace(str(tmp_path / "l.csv"))
  assert (trace.prompt_lens.tolist(), trace.output_lens.tolist()) == ([74, 290], [918, 905])
  assert trace.arrivals is None
  with pytest.raises(ValueError, match="l does not"):
    trace.contents()


def test_mooncake_and_its_pages(tmp_path: pathlib.Path):
  rows = [(0, 1100, 100, [0, 1, 2]), (1500, 1300, 1, [0, 1, 3]), (3000, 1024, 600, [0, 1]), (3000, 600, 5, [4, 1])]
  (tmp_path / "m.jsonl").write_text(mooncake(*rows))
  trace = read_trace(tmp_path / "m.jsonl")
  assert trace.arrivals is not None and trace.arrivals.tolist() == [0, 1.5, 3, 3]
  # Full blocks keep their ids; part-full ones and those of the output have ids of their own.
  assert trace.contents().tolist() == [[0, 1, 5, -1], [0, 1, 6, -1], [0, 1, 7, 8], [4, 9, -1, -1]]
  tokens = 1100 + 1300 + 1024 + 600
  assert trace.ideal_hit_rate() == pytest.approx((1024 + 1024) / tokens)
  assert trace.ideal_hit_rate(full_pages=True) == pytest.approx((1024 + 512) / tokens)  # the third computes its last


def test_a_block_after_a_miss_is_no_hit():
  trace = Trace(
    name="t", prompt_lens=np.array([8, 12]), output_lens=np.array([1, 1]), prefixes=((1, 2), (1, 3, 2)), block_size=4
  )
  assert trace.ideal_hit_rate() == pytest.approx(4 / 20)


@pytest.mark.parametrize("name, rate", [("conversation", 0.374), ("synthetic", 0.651)])
def test_ideal_hit_rate_of_the_public_traces(name, rate):
  folder = os.environ.get("PAGED_FLASH_TRACES")
  if not folder:
    pytest.skip("needs PAGED_FLASH_TRACES, the folder of the public traces")
  trace = read_trace(pathlib.Path(folder, f"mooncake_{name}_trace.jsonl"))
  assert trace.ideal_hit_rate() == pytest.approx(rate, abs=6e-4)


@pytest.mark.parametrize("name, prompt, output", [("sharegpt", 161.31, 337.99), ("alpaca", 19.31, 58.45)])
def test_synthetic_lengths_have_the_means_of_the_paper(name, prompt, output):
  trace = synthetic(name, 20_000)
  assert trace.prompt_lens.mean() == pytest.approx(prompt, rel=0.02)
  assert trace.output_lens.mean() == pytest.approx(output, rel=0.02)
  assert (trace.prompt_lens + trace.output_lens).max() <= 2048
  assert min(trace.prompt_lens.min(), trace.output_lens.min()) >= 1
  np.testing.assert_array_equal(synthetic(name, 20_000).output_lens, trace.output_lens)


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("x.csv", "a,b\n1,2\n", "must have the columns .* got \\['a', 'b'\\]"),
    ("x.csv", "", "got \\[\\]"),
    ("x.jsonl", '{"timestamp": 1}\n', "must have the keys"),
    ("x.jsonl", "", "got no line"),
  ],
)
def test_other_files_are_refused(tmp_path: pathlib.Path, name, text, message):
  (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=message):
    read_trace(tmp_path / name)


def test_what_is_not_there_is_named(tmp_path: pathlib.Path):
  with pytest.raises(ValueError, match="must be a file"):
    read_trace(tmp_path / "nothing.csv")
  with pytest.raises(ValueError, match="known for sharegpt, alpaca, got 'wmt'"):
    synthetic("wmt", 3)
