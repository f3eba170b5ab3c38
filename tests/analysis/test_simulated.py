"""Charts of simulated serving draw what the rows say."""

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from paged_flash.analysis import (
  show_batches,
  show_memory_split,
  show_page_sizes,
  show_preemption,
  show_rates,
  show_stalls,
)
from paged_flash.analysis.simulated import PARTS


def test_memory_split_is_bars_end_to_end():
  rows = [
    dict(allocator="max", **dict(zip(PARTS, (0.2, 0.1, 0.5, 0, 0.2, 0), strict=True))),
    dict(allocator="paged 16", **dict(zip(PARTS, (0.9, 0, 0.04, 0, 0, 0.06), strict=True))),
  ]
  (ax,) = show_memory_split(rows).axes
  ends = {}
  for i, bar in enumerate(ax.patches):  # part by part, an allocator each
    assert isinstance(bar, Rectangle)
    assert bar.get_x() == pytest.approx(ends.get(i % 2, 0))
    ends[i % 2] = bar.get_x() + bar.get_width()
  assert ends == {0: pytest.approx(1), 1: pytest.approx(1)}
  assert [text.get_text() for text in ax.texts] == ["20%", "90%", "10%", "50%", "20%", "6%"]


def test_rates_are_a_line_for_each_allocator():
  rows = [
    dict(allocator=name, rate=rate, normalised_latency=rate * k, mean_running=10 * rate)
    for k, name in enumerate(("max", "paged"), start=1)
    for rate in (2.0, 1.0)
  ]
  latency, batch = show_rates(rows).axes
  assert {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in latency.lines} == {
    "max": [1, 2],
    "paged": [2, 4],
  }
  assert np.asarray(batch.lines[0].get_ydata()).tolist() == [10, 20]


def test_published_numbers_are_marked():
  split = dict(zip(PARTS, (0.2, 0.1, 0.5, 0, 0.2, 0), strict=True))
  figure = show_memory_split([dict(allocator="max", paper_used=0.25, **split), dict(allocator="paged", **split)])
  (line,) = figure.axes[0].lines
  assert np.asarray(line.get_xydata()).tolist() == [[0.25, 0]]
  assert figure.legends[0].get_texts()[-1].get_text() == "holds tokens, in the paper"
  rows = [
    dict(allocator="max", rate=2.0, normalised_latency=9.0, mean_running=7.0, paper_batch=None),
    dict(allocator="paged", rate=2.0, normalised_latency=0.1, mean_running=30.0, paper_batch=30.42),
  ]
  latency, batch = show_rates(rows).axes
  stars = [line for line in batch.lines if line.get_marker() == "*" and len(np.asarray(line.get_xdata()))]
  assert [np.asarray(line.get_xydata()).tolist() for line in stars] == [[[2.0, 30.42]]]
  assert [text.get_text() for text in latency.texts] == ["max: above"]


def test_page_sizes_leave_contiguous_rows_out():
  rows = [dict(trace="t", page_size=size, waste=size / 100, loaded_running=40 - size) for size in (0, 16, 1)]
  waste, batch = show_page_sizes(rows).axes
  assert np.asarray(waste.lines[0].get_ydata()).tolist() == [0.01, 0.16]
  assert np.asarray(batch.lines[0].get_ydata()).tolist() == pytest.approx([1, 24 / 39])


@pytest.mark.parametrize("draw", [show_memory_split, show_rates, show_page_sizes])
def test_nothing_to_draw_is_refused(draw):
  with pytest.raises(ValueError, match="got none"):
    draw([])


def test_batches_are_drawn_to_the_end_of_each_run():
  row = dict(num_slots=4, utilisation=0.5, times=[0.0, 1.0, 2.5], running=[4, 3, 1])
  axes = show_batches([row | dict(way="static", seconds=8.0), row | dict(way="continuous", seconds=3.0)]).axes
  assert [ax.get_title(loc="left") for ax in axes] == [
    "static: 8 s, 50% of the slots in use",
    "continuous: 3 s, 50% of the slots in use",
  ]
  assert axes[0].get_xlim() == (0, 8)


def test_stalls_are_lines_over_the_tokens_of_a_step():
  names = ("token_p50_s", "token_p99_s", "token_max_s", "first_token_p50_s", "first_token_p99_s")
  rows = [dict(token_budget=n, **{name: n * k for k, name in enumerate(names, start=1)}) for n in (512, 64)]
  between, first = show_stalls(rows).axes
  assert [np.asarray(line.get_ydata()).tolist() for line in between.lines] == [[64, 512], [128, 1024], [192, 1536]]
  assert [np.asarray(line.get_ydata()).tolist() for line in first.lines] == [[256, 2048], [320, 2560]]


@pytest.mark.parametrize("draw", [show_batches, show_preemption, show_stalls])
def test_no_rows_are_refused(draw):
  with pytest.raises(ValueError, match="at least one record"):
    draw([])
