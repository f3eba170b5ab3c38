"""Pictures: a page table (`show`) and the pages of a whole run (`show_occupancy`). No pyplot, no global state."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from paged_flash.analysis.memory import human_bytes
from paged_flash.cache.page_table import PageTable

_INK, _GREY, _FAINT = "#1f2933", "#7b8794", "#d5dbe1"
_PRIVATE, _UNWRITTEN, _RESERVED = "#8fb8de", "#eaf1f8", "#c0392b"
_LEGEND = dict(frameon=False, fontsize=8.5, handlelength=1.2, columnspacing=1.6, borderpad=0.3, borderaxespad=0)
_LABELLED = 0.14  # inches: smaller pages are drawn without outlines and labels
_SHARED = ("#f4a259", "#8cb369", "#c78bd1", "#e6739f", "#5fc3b5", "#d9c04c", "#a98467", "#e76f51")


class Picture(Figure):
  """A matplotlib figure that a notebook shows as it is, with no backend set up."""

  def _repr_png_(self) -> bytes:
    buffer = io.BytesIO()
    self.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def show(table: PageTable, *, title: str | None = None) -> Picture:
  """Draws a page table: the pages of each slot in order, and below them the whole pool.

  A page held by one slot is blue; a shared page has a colour of its own wherever it appears and says how many hold it.
  The last page of a sequence is filled as far as it is written. Free pages are white.

  Args:
    table: read on the host; not consumed.
    title: in place of the summary of pages and tokens.

  Returns:
    A figure that displays in a notebook; `.savefig("table.png")` saves it.

  Example:
    >>> from paged_flash.cache import page_table
    >>> figure = show(page_table.init(num_slots=4, pages_per_slot=8, num_pages=32, page_size=16))
  """
  pages, lens, refs = np.asarray(table.pages), np.asarray(table.seq_lens), np.asarray(table.ref_counts)
  size, num_pages = table.page_size, len(refs)
  held = -(-lens // size)  # i32[S]
  shared = {int(page): _SHARED[i % len(_SHARED)] for i, page in enumerate(np.flatnonzero(refs > 1))}

  # One drawing area measured in inches: slots on top, the pool below, the legend last.
  columns = pages.shape[1] if pages.shape[1] <= 16 else max(int(held.max(initial=0)), 1)
  cell = min(0.5, 7.5 / columns, 8 / len(lens))
  across = min(num_pages, 16 if num_pages <= 64 else 32 if num_pages <= 512 else 64 if num_pages <= 2048 else 128)
  pool_rows = -(-num_pages // across)
  pool_cell = min(0.36, 7.5 / across, 5 / pool_rows)
  left, right, width = 0.75, 0.3, max(columns * cell + 0.9, across * pool_cell, 5.4)
  pool_top = 0.5 + pool_rows * pool_cell
  slots_bottom = pool_top + 0.55
  height = slots_bottom + len(lens) * cell + 0.75
  figure = Picture(figsize=(left + width + right, height))
  ax = figure.add_axes((0, 0, 1, 1))
  ax.set_axis_off()

  used, tokens = int((refs > 0).sum()), int(lens.sum())
  summary = f"{used} of {num_pages} pages in use, {len(shared)} shared; {tokens} tokens in pages of {size}"
  ax.text(0, height - 0.25, title or summary, fontsize=11, weight="bold", color=_INK, va="center")
  subtitle = f"page table: the pages of each slot, in order, at most {pages.shape[1]}"
  ax.text(0, height - 0.55, subtitle, fontsize=8.5, color=_GREY, va="center")
  if cell >= _LABELLED:
    for slot, length in enumerate(lens):
      y = slots_bottom + (len(lens) - slot - 0.5) * cell
      ax.text(-0.12, y, f"slot {slot}", ha="right", va="center", fontsize=min(9, 30 * cell), color=_INK)
      note = "empty" if length == 0 else "1 token" if length == 1 else f"{length} tokens"
      ax.text(columns * cell + 0.12, y, note, va="center", fontsize=min(8, 28 * cell), color=_GREY)
  index = np.arange(columns)
  ids = np.where(index < held[:, None], pages[:, :columns], -1)
  written = np.clip(lens[:, None] / size - index, 0, 1)
  _draw_pages(ax, slots_bottom + len(lens) * cell, cell, ids, written, refs, shared)

  ax.text(0, pool_top + 0.17, "pool: every page, by id", fontsize=8.5, color=_GREY, va="center")
  every = np.pad(np.arange(num_pages), (0, pool_rows * across - num_pages), constant_values=-1).reshape(-1, across)
  _draw_pages(ax, pool_top, pool_cell, every, np.ones_like(every), refs, shared)
  handles = [
    Patch(fc=_PRIVATE, ec=_INK, lw=0.5, label="held by one slot"),
    Patch(fc=_UNWRITTEN, ec=_INK, lw=0.5, label="not yet written"),
    Patch(fc="white", ec=_FAINT, label="free"),
  ]
  if shared:
    handles.insert(1, Patch(fc=_SHARED[0], ec=_INK, lw=0.5, label="shared (\u00d7 holders)"))
  ax.set(xlim=(-left, width + right), ylim=(0, height))
  ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(left / (left + width + right), 0), ncols=4, **_LEGEND)
  return figure


def show_occupancy(
  records: Sequence[Mapping[str, Any]], *, num_pages: int, page_bytes: int | None = None, title: str | None = None
) -> Picture:
  """Draws the pages of a run over its steps and, where the records say so, which request sat in which slot.

  Args:
    records: one mapping per step, in order:
      "held": pages in use (i32).
      "shared": those of them that more than one slot holds; default 0.
      "reserved": pages that reserving the longest possible sequence for each running request would hold; optional.
      "preempted": requests preempted in this step; default 0.
      "slots": the request id in each slot, -1 for an empty one; optional, draws the second panel.
    num_pages: pages in the pool.
    page_bytes: bytes of one page of all layers; adds an axis in bytes.
    title: in place of the summary.

  Returns:
    A figure that displays in a notebook.

  Raises:
    ValueError: if there are no records, or one lacks "held".

  Example:
    >>> figure = show_occupancy([{"held": 3, "shared": 1}, {"held": 5, "shared": 2}], num_pages=8)
  """
  if not records or any("held" not in record for record in records):
    raise ValueError(f'records must be at least one mapping with "held" each, got {list(records)[:1]}')
  steps = np.arange(len(records) + 1)
  held, shared, preempted = (np.array([r.get(key, 0) for r in records]) for key in ("held", "shared", "preempted"))
  reserved = np.array([r["reserved"] for r in records]) if "reserved" in records[0] else None
  with_slots = "slots" in records[0]

  figure = Picture(figsize=(9, 5.2 if with_slots else 3.4), layout="constrained")
  axes = figure.subplots(2 if with_slots else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + with_slots])[
    :, 0
  ]
  ax: Axes = axes[0]
  ax.stairs(held, steps, fill=True, color=_PRIVATE, label="held by one slot")
  ax.stairs(shared, steps, fill=True, color=_SHARED[0], label="shared")
  ax.stairs(held, steps, color=_INK, lw=1.2, baseline=None)
  if reserved is not None:
    ax.stairs(
      reserved, steps, color=_RESERVED, lw=1.6, ls="--", baseline=None, label="contiguous reservation would hold"
    )
  ax.axhline(num_pages, color=_INK, lw=1, ls=":", label=f"the pool: {num_pages} pages")
  hit = np.flatnonzero(preempted)
  if hit.size:
    ax.plot(hit + 0.5, held[hit], "v", ms=7, mfc="white", mec=_RESERVED, mew=1.5, label="preemption", clip_on=False)
  top = max(num_pages, held.max(), 0 if reserved is None else reserved.max())
  ax.set(ylabel="pages", ylim=(0, 1.08 * top), xlim=(0, len(records)))
  ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
  if page_bytes:
    unit = human_bytes(top * page_bytes).split()[1]
    scale = page_bytes / {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    ax.secondary_yaxis(
      "right", functions=(lambda p: np.asarray(p) * scale, lambda b: np.asarray(b) / scale)
    ).set_ylabel(unit)
  peak = int(held.max())
  saved = "" if reserved is None else f", a contiguous reservation {int(reserved.max())}"
  ax.set_title(
    title or f"{len(records)} steps: at most {peak} pages in use{saved}", loc="left", fontsize=11, weight="bold"
  )
  ax.legend(
    loc="upper center", bbox_to_anchor=(0.5, -0.08 if with_slots else -0.2), ncols=3, frameon=False, fontsize=8.5
  )
  if with_slots:
    _draw_slots(axes[1], np.array([r["slots"] for r in records]))
  axes[-1].set_xlabel("step")
  for each in axes:
    each.spines[["top", "right"]].set_visible(False)
  return figure


def _draw_pages(
  ax: Axes, top: float, cell: float, ids: np.ndarray, written: np.ndarray, refs: np.ndarray, shared: Mapping[int, str]
) -> None:
  """Rows of pages, the first row's upper edge at `top`, in squares of `cell` inches.

  Args:
    ids: i32[R, C], page ids, -1 for none. written: f[R, C], the part of each page that holds tokens, 0 to 1.
    refs: i32[N], ref counts. shared: the colour of each shared page.
  """

  def colour(page: int) -> str:
    return "white" if page < 0 or not refs[page] else shared.get(page, _PRIVATE)

  rows, columns = ids.shape
  if cell < _LABELLED:  # too small for outlines and numbers: one image
    image = np.array([[to_rgb(colour(page)) for page in row] for row in ids.tolist()])
    ax.imshow(image, extent=(0, columns * cell, top - rows * cell, top), aspect="auto", interpolation="nearest")
    ax.add_patch(Rectangle((0, top - rows * cell), columns * cell, rows * cell, fill=False, ec=_FAINT, lw=0.8))
    return
  gap = 0.02
  side = cell - 2 * gap
  for (row, column), page in np.ndenumerate(ids):
    x, y, full = column * cell + gap, top - (row + 1) * cell + gap, float(written[row, column])
    if page < 0:
      ax.add_patch(Rectangle((x, y), side, side, fill=False, ec=_FAINT, lw=0.5, ls=":"))
      continue
    count, fill = int(refs[page]), colour(int(page))
    ax.add_patch(Rectangle((x, y), side, side, fc=_UNWRITTEN if full < 1 else fill, lw=0))
    ax.add_patch(Rectangle((x, y), side * full, side, fc=fill, lw=0))
    ax.add_patch(Rectangle((x, y), side, side, fill=False, ec=_INK if count else _FAINT, lw=0.6))
    if cell < 0.2:
      continue
    ink = _INK if count else _GREY
    middle = y + side * (0.6 if count > 1 else 0.5)
    ax.text(x + side / 2, middle, str(page), ha="center", va="center", fontsize=19 * cell + 1.5, color=ink)
    if count > 1:
      small = max(4.5, 13 * cell)
      ax.text(x + side - 0.02, y + 0.01, f"\u00d7{count}", ha="right", va="bottom", fontsize=small, color=ink)


def _draw_slots(ax: Axes, slots: np.ndarray) -> None:
  """Bars of the requests that sat in each slot, i32[steps, S]."""
  for slot in range(slots.shape[1]):
    column = slots[:, slot]
    edges = [0, *(np.flatnonzero(np.diff(column)) + 1).tolist(), len(column)]
    for start, end in zip(edges[:-1], edges[1:], strict=True):
      request = int(column[start])
      if request < 0:
        continue
      colour = _SHARED[request % len(_SHARED)]
      ax.add_patch(Rectangle((start, slot - 0.42), end - start, 0.84, fc=colour, ec="white", lw=1))
      if end - start >= 0.025 * len(column):
        ax.text((start + end) / 2, slot, str(request), ha="center", va="center", fontsize=8, color=_INK)
  ax.set(ylim=(slots.shape[1] - 0.5, -0.5), ylabel="slot", yticks=range(slots.shape[1]))
  ax.set_title("the request in each slot", loc="left", fontsize=8.5, color=_GREY)
