"""Memory held in vain against numbers worked out by hand."""

import pytest

from paged_flash.analysis import compare_held, human_bytes


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
