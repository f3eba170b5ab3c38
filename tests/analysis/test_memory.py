"""KV-cache arithmetic against numbers worked out by hand."""

import pytest

from paged_flash.analysis import KVShape, compare_held, human_bytes

SMOLLM2 = KVShape(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")


def test_bytes_per_token_and_pages():
  assert SMOLLM2.bytes_per_token == 23_040
  assert SMOLLM2.page_bytes(16) == 360 * 1024
  assert SMOLLM2.num_pages(360 * 1024 * 7 + 1, page_size=16) == 7
  with pytest.raises(ValueError, match="at least one page of 368640 bytes, got 1000 bytes"):
    SMOLLM2.num_pages(1000, page_size=16)


def test_explain_prints_the_arithmetic():
  assert SMOLLM2.explain(2**30, page_size=16) == (
    "one token: 2 (K and V) x 30 layers x 3 KV heads x 64 head_dim x 2 bytes = 23,040 bytes\n"
    "1 GiB / (16 tokens x 23,040 bytes) = 2,912 pages = 46,592 tokens"
  )


def test_held_and_wasted():
  contiguous, paged = compare_held([1, 16, 17, 0], max_length=64, page_size=16, bytes_per_token=10)
  assert contiguous == {
    "policy": "contiguous",
    "held_bytes": 2560,
    "used_bytes": 340,
    "wasted_bytes": 2220,
    "waste": 2220 / 2560,
  }
  assert paged == {"policy": "paged", "held_bytes": 640, "used_bytes": 340, "wasted_bytes": 300, "waste": 300 / 640}
  assert [row["waste"] for row in compare_held([], max_length=64, page_size=16)] == [0, 0]


@pytest.mark.parametrize(
  ("lengths", "page_size", "message"),
  [([65], 16, r"lengths must lie in 0..64 .*got 65..65"), ([-1], 16, "got -1..-1"), ([1], 0, "page_size must be")],
)
def test_wrong_sizes_are_refused(lengths, page_size, message):
  with pytest.raises(ValueError, match=message):
    compare_held(lengths, max_length=64, page_size=page_size)


def test_human_bytes():
  assert [human_bytes(x) for x in (0, 1023, 1024, 5 * 2**40)] == ["0 bytes", "1023 bytes", "1 KiB", "5 TiB"]
