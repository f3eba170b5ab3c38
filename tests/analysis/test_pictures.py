"""Pictures say what the table says. How they look is for eyes."""

import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
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


def change(before, after, **parts) -> Any:
  names = ("granted", "released", "passed", "shared", "copied")
  return types.SimpleNamespace(before=before, after=after, **(dict.fromkeys(names, ()) | parts))


def test_a_difference_colours_what_changed():
  a = page_table.init(num_slots=3, pages_per_slot=4, num_pages=12, page_size=4)
  a, _, _ = page_table.extend(a, jnp.array([9, 6, 0]))  # pages 0 1 2 and 3 4
  b = page_table.release(page_table.fork(a, parent=0, child=2), jnp.array([False, True, False]))
  b, copies, _ = page_table.extend(b, jnp.array([0, 0, 1]))
  ((src, dst),) = [pair for pair in zip(copies.src.tolist(), copies.dst.tolist(), strict=True) if pair[0] >= 0]
  figure = show(change(a, b, released=(4,), shared=(0, 1), copied=((src, dst),)))
  seen = texts(figure)
  assert seen[0] == "pages: 1 let go, 2 shared by more, 1 copied"
  assert "6 \u2192 0 tokens" in seen and "0 \u2192 10 tokens" in seen and "9 tokens" in seen
  legend = figure.axes[0].get_legend()
  assert legend is not None
  colours = {
    text.get_text(): handle.get_facecolor()
    for text, handle in zip(legend.get_texts(), legend.get_patches(), strict=True)
  }
  assert list(colours) == ["shared by more (\u00d7 holders)", "copy made to write to", "let go", "as before", "free"]
  drawn = [
    to_hex(box.get_facecolor()) for box in figure.axes[0].patches if isinstance(box, Rectangle) and box.get_fill()
  ]
  counts = {name: drawn.count(to_hex(colour)) for name, colour in colours.items()}
  # Each page is two rectangles, the written part over the whole, or one where it is part full; in slots and pool.
  assert counts["let go"] == 2 * (2 + 1)  # both pages of slot 1, one of which somebody got at once; page 4 in the pool
  assert counts["shared by more (\u00d7 holders)"] == 2 * (2 * 2 + 2)
  assert texts(show(change(a, a)))[0] == "no page changed hands"


def run(records, num_pages=6) -> Any:
  return types.SimpleNamespace(records=lambda: records, num_pages=num_pages)


def test_a_run_shows_who_did_what():
  records = [
    {"held": 3, "shared": 1, "slots": [7, 8], "did": ["prefill", "decode"]},
    {"held": 5, "shared": 2, "slots": [7, 8], "did": ["decode", "preempted"], "preempted": 1},
    {"held": 2, "shared": 0, "slots": [-1, 8], "did": ["", "recompute"]},
  ]
  pages, slots = show(run(records)).axes
  assert pages.get_title(loc="left") == "3 steps: at most 5 pages in use"
  bars = [(patch.get_x(), patch.get_width()) for patch in slots.patches if isinstance(patch, Rectangle)]
  assert bars == [(0, 2), (0, 3)] and [text.get_text() for text in slots.texts] == ["7", "8"]
  legend = slots.get_legend()
  assert legend is not None
  (image,) = slots.images
  colours = np.asarray(image.get_array())
  said = zip(legend.get_texts(), legend.get_patches(), strict=True)
  for name, colour in {text.get_text(): patch.get_facecolor() for text, patch in said}.items():
    where = np.array([[did == name for did in record["did"]] for record in records]).T
    assert (
      where.any() and (colours[where] == to_rgb(colour)).all() and not (colours[~where] == to_rgb(colour)).all(1).any()
    )
  assert (colours[0, 2] == 1).all()
  many = show(run([{"held": 1, "slots": list(range(256)), "did": ["decode"] * 256}] * 300)).axes[1]
  assert len(many.patches) == 0 and len(many.yaxis.get_ticklocs()) == 16


def test_what_cannot_be_drawn_is_named():
  with pytest.raises(TypeError, match="a page table, a difference or a recording, got list"):
    unknown: Any = [1]
    show(unknown)


@pytest.mark.parametrize("records", [[], [{"used": 1}]])
def test_records_without_pages_are_refused(records):
  with pytest.raises(ValueError, match='"held" each'):
    show_occupancy(records, num_pages=4)
