"""Pictures say what the table says. How they look is for eyes."""

import jax.numpy as jnp
import pytest
from matplotlib.patches import Rectangle

from paged_flash.analysis import show, show_occupancy
from paged_flash.cache import page_table


def texts(figure) -> list[str]:
  return [text.get_text() for text in figure.axes[0].texts]


def test_table_with_shared_and_part_full_pages():
  table = page_table.init(num_slots=3, pages_per_slot=4, num_pages=12, page_size=4)
  table, _, _ = page_table.extend(table, jnp.array([9, 2, 0]))
  table = page_table.fork(table, parent=0, child=2)
  figure = show(table)
  seen = texts(figure)
  shared = int((table.ref_counts == 2).sum())
  assert seen[0] == f"4 of 12 pages in use, {shared} shared; 20 tokens in pages of 4"
  assert seen.count("9 tokens") == 2 and seen.count("2 tokens") == 1
  assert seen.count("\u00d72") == 3 * shared  # in both slots and in the pool
  for page in range(12):  # in the pool, and once for each holder
    assert seen.count(str(page)) == 1 + int(table.ref_counts[page])
  boxes = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
  whole = max(box.get_width() for box in boxes)
  parts = sorted({round(box.get_width() / whole, 2) for box in boxes if box.get_height() == whole})
  assert parts == [0.25, 0.5, 1.0]  # 9 = 4 + 4 + 1 tokens and 2 tokens, in pages of 4
  assert figure._repr_png_().startswith(b"\x89PNG")


def test_large_tables_are_drawn_as_images():
  table = page_table.init(num_slots=256, pages_per_slot=64, num_pages=16384, page_size=16)
  table, _, _ = page_table.extend(table, jnp.full(256, 100))
  figure = show(table, title="large")
  assert texts(figure)[0] == "large" and len(figure.axes[0].images) == 2
  assert len(figure.axes[0].patches) < 10


def test_occupancy_panels():
  records = [
    {"held": 3, "shared": 1, "reserved": 8, "slots": [0, -1]},
    {"held": 5, "shared": 2, "reserved": 16, "slots": [0, 1], "preempted": 1},
    {"held": 2, "shared": 0, "reserved": 8, "slots": [-1, 1]},
  ]
  figure = show_occupancy(records, num_pages=6, page_bytes=2**20)
  pages, slots = figure.axes
  assert pages.get_title(loc="left") == "3 steps: at most 5 pages in use, a contiguous reservation 16"
  legend = pages.get_legend()
  assert legend is not None and "preemption" in [text.get_text() for text in legend.get_texts()]
  assert pages.get_ylim()[1] > 16
  bars = [(patch.get_x(), patch.get_width()) for patch in slots.patches if isinstance(patch, Rectangle)]
  assert bars == [(0, 2), (1, 2)]
  assert len(show_occupancy([{"held": 1}], num_pages=2).axes) == 1


@pytest.mark.parametrize("records", [[], [{"used": 1}]])
def test_records_without_pages_are_refused(records):
  with pytest.raises(ValueError, match='"held" each'):
    show_occupancy(records, num_pages=4)
