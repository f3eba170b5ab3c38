"""Pictures: a page table, the difference of two, a run (`show`); pages and slots over steps. No pyplot, no globals."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba_array
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
_KEPT, _GRANTED, _PASSED, _GONE, _COPIED = "#dfe6ee", "#8cb369", "#5fc3b5", "#f3c1b8", "#c78bd1"
_DID = {  # what a slot did in a step
  "prefill": "#5b8fc7",
  "recompute": "#f4a259",
  "decode": "#b9d7a8",
  "paused": "#c3cad2",
  "preempted": _RESERVED,
}


@runtime_checkable
class Change(Protocol):
  """What changed between two page tables, as `paged_flash.history.diff` says it."""

  @property
  def before(self) -> PageTable: ...
  @property
  def after(self) -> PageTable: ...
  @property
  def granted(self) -> Sequence[int]: ...
  @property
  def released(self) -> Sequence[int]: ...
  @property
  def passed(self) -> Sequence[int]: ...
  @property
  def shared(self) -> Sequence[int]: ...
  @property
  def copied(self) -> Sequence[tuple[int, int]]: ...


@runtime_checkable
class Run(Protocol):
  """A run over its steps, as `paged_flash.history.Recording` is one."""

  @property
  def num_pages(self) -> int: ...
  def records(self) -> Sequence[Mapping[str, Any]]: ...


class Picture(Figure):
  """A matplotlib figure that a notebook shows as it is, with no backend set up."""

  def _repr_png_(self) -> bytes:
    buffer = io.BytesIO()
    self.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def show(subject: PageTable | Change | Run, *, title: str | None = None) -> Picture:
  """Draws a page table, what changed between two states, or a recorded run.

  - A page table: the pages of each slot in order, and below them the whole pool. A page held by one slot is blue; a
    shared page has a colour of its own wherever it appears and says how many hold it. The last page of a sequence is
    filled as far as it is written. Free pages are white.
  - A difference (`history.diff`): the same, with colours for what was granted, shared, copied and let go.
  - A run (`history.Recording`): pages in use over the steps, and what each slot did for which request.

  Args:
    subject: read on the host; not consumed.
    title: in place of the summary.

  Returns:
    A figure that displays in a notebook; `.savefig("table.png")` saves it.

  Raises:
    TypeError: it is none of these.

  Example:
    >>> from paged_flash.cache import page_table
    >>> figure = show(page_table.init(num_slots=4, pages_per_slot=8, num_pages=32, page_size=16))
  """
  if isinstance(subject, PageTable):
    return _show_table(subject, title)
  if isinstance(subject, Change):
    return _show_change(subject, title)
  if isinstance(subject, Run):
    return show_occupancy(subject.records(), num_pages=subject.num_pages, title=title)
  raise TypeError(f"subject must be a page table, a difference or a recording, got {type(subject).__name__}")


def _show_table(table: PageTable, title: str | None) -> Picture:
  pages, lens, refs = np.asarray(table.pages), np.asarray(table.seq_lens), np.asarray(table.ref_counts)
  held = -(-lens // table.page_size)  # i32[S]
  shared = {int(page): _SHARED[i % len(_SHARED)] for i, page in enumerate(np.flatnonzero(refs > 1))}
  fills = np.array([shared.get(page, _PRIVATE if count else "white") for page, count in enumerate(refs.tolist())])
  ids = np.where(np.arange(pages.shape[1]) < held[:, None], pages, -1)
  handles = [
    Patch(fc=_PRIVATE, ec=_INK, lw=0.5, label="held by one slot"),
    Patch(fc=_UNWRITTEN, ec=_INK, lw=0.5, label="not yet written"),
    Patch(fc="white", ec=_FAINT, label="free"),
  ]
  if shared:
    handles.insert(1, Patch(fc=_SHARED[0], ec=_INK, lw=0.5, label="shared (\u00d7 holders)"))
  notes = ["empty" if length == 0 else _tokens(length) for length in lens.tolist()]
  summary = f"{int((refs > 0).sum())} of {refs.size} pages in use, {len(shared)} shared; {int(lens.sum())} tokens in "
  title = title or f"{summary}pages of {table.page_size}"
  return _draw_table(table, title, ids, fills[ids], fills, notes, handles, full=int(held.max(initial=0)))


def _show_change(change: Change, title: str | None) -> Picture:
  a, b = ({n: np.asarray(getattr(t, n)) for n in ("pages", "seq_lens")} for t in (change.before, change.after))
  gone = (b["pages"] < 0) & (a["pages"] >= 0)  # places that a slot gave up
  ids = np.where(gone, a["pages"], b["pages"])
  fills = np.where(np.asarray(change.after.ref_counts) > 0, _KEPT, "white")
  copies = [copy for _, copy in change.copied]
  parts = (
    (change.shared, _SHARED[0], "shared by more (\u00d7 holders)"),
    (change.granted, _GRANTED, "granted"),
    (change.passed, _PASSED, "passed on to another"),
    (copies, _COPIED, "copy made to write to"),
    (change.released, _GONE, "let go"),
  )
  for numbers, colour, _ in parts:
    fills[list(numbers)] = colour
  handles = [Patch(fc=colour, ec=_INK, lw=0.5, label=label) for numbers, colour, label in parts if len(numbers)]
  if gone.any() and not change.released:
    handles.append(Patch(fc=_GONE, ec=_INK, lw=0.5, label="let go"))
  handles += [Patch(fc=_KEPT, ec=_INK, lw=0.5, label="as before"), Patch(fc="white", ec=_FAINT, label="free")]
  notes = []
  for old, new in zip(a["seq_lens"].tolist(), b["seq_lens"].tolist(), strict=True):
    notes.append(f"{old} \u2192 {_tokens(new)}" if old != new else _tokens(new) if new else "empty")
  counts = ((change.granted, "granted"), (change.passed, "passed on"), (change.released, "let go"))
  counts += ((change.shared, "shared by more"), (copies, "copied"))
  said = ", ".join(f"{len(numbers)} {what}" for numbers, what in counts if len(numbers))
  title = title or (f"pages: {said}" if said else "no page changed hands")
  full = int((ids >= 0).sum(axis=1).max(initial=0))
  return _draw_table(
    change.after, title, ids, np.where(gone, _GONE, fills[ids]), fills, notes, handles, full=full, gone=gone
  )


def _draw_table(
  table: PageTable,
  title: str,
  ids: np.ndarray,
  slot_fills: np.ndarray,
  pool_fills: np.ndarray,
  notes: Sequence[str],
  handles: Sequence[Patch],
  *,
  full: int,
  gone: np.ndarray | None = None,
) -> Picture:
  """Slots on top, the pool below, the legend last, in one drawing area measured in inches.

  Args:
    table: gives lengths, ref counts and sizes.
    title: in bold.
    ids: i32[S, P], the page to draw at each place; -1 for none.
    slot_fills: colours [S, P]; pool_fills: colours [N].
    notes: what to say beside each slot.
    handles: of the legend.
    full: places that the fullest slot uses.
    gone: bool[S, P], places that are not the slot's any more.
  """
  lens, refs, size = np.asarray(table.seq_lens), np.asarray(table.ref_counts), table.page_size
  num_pages, most = len(refs), ids.shape[1]
  columns = most if most <= 16 else max(int(full), 1)
  cell = min(0.5, 7.5 / columns, 8 / len(lens))
  across = min(num_pages, 16 if num_pages <= 64 else 32 if num_pages <= 512 else 64 if num_pages <= 2048 else 128)
  pool_rows = -(-num_pages // across)
  pool_cell = min(0.36, 7.5 / across, 5 / pool_rows)
  left, right, width = 0.75, 0.3, max(columns * cell + 0.9, across * pool_cell, 5.4)
  legend = 0.22 * (len(handles) // 5)  # a second row
  pool_top = 0.5 + legend + pool_rows * pool_cell
  slots_bottom = pool_top + 0.55
  height = slots_bottom + len(lens) * cell + 0.75
  figure = Picture(figsize=(left + width + right, height))
  ax = figure.add_axes((0, 0, 1, 1))
  ax.set_axis_off()

  ax.text(0, height - 0.25, title, fontsize=11, weight="bold", color=_INK, va="center")
  subtitle = f"page table: the pages of each slot, in order, at most {most}"
  ax.text(0, height - 0.55, subtitle, fontsize=8.5, color=_GREY, va="center")
  if cell >= _LABELLED:
    for slot, note in enumerate(notes):
      y = slots_bottom + (len(lens) - slot - 0.5) * cell
      ax.text(-0.12, y, f"slot {slot}", ha="right", va="center", fontsize=min(9, 30 * cell), color=_INK)
      ax.text(columns * cell + 0.12, y, note, va="center", fontsize=min(8, 28 * cell), color=_GREY)
  written = np.clip(lens[:, None] / size - np.arange(most), 0, 1)
  if gone is not None:
    written = np.where(gone, 1, written)
  top = slots_bottom + len(lens) * cell
  _draw_pages(ax, top, cell, ids[:, :columns], written[:, :columns], refs, slot_fills[:, :columns])

  ax.text(0, pool_top + 0.17, "pool: every page, by id", fontsize=8.5, color=_GREY, va="center")
  every = np.pad(np.arange(num_pages), (0, pool_rows * across - num_pages), constant_values=-1).reshape(-1, across)
  _draw_pages(ax, pool_top, pool_cell, every, np.ones_like(every), refs, np.append(pool_fills, "white")[every])
  ax.set(xlim=(-left, width + right), ylim=(0, height))
  at = (left / (left + width + right), 0)
  ax.legend(handles=handles, loc="lower left", bbox_to_anchor=at, ncols=4, **_LEGEND)
  return figure


def show_occupancy(
  records: Sequence[Mapping[str, Any]], *, num_pages: int, page_bytes: int | None = None, title: str | None = None
) -> Picture:
  """Draws the pages of a run over its steps and, where the records say so, which request sat in which slot.

  Args:
    records: one mapping per step, in order:
      "held": pages in use (i32).
      "shared": those of them that more than one slot holds; default 0.
      "cached": pages that no slot holds but that can be found again; default 0.
      "reserved": pages that reserving the longest possible sequence for each running request would hold; optional.
      "preempted": requests preempted in this step; default 0.
      "slots": the request id in each slot, -1 for an empty one; optional, draws the second panel.
      "did": what each slot did, one of "", "prefill", "recompute", "decode", "paused", "preempted"; optional.
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
  keys = ("held", "shared", "cached", "preempted")
  held, shared, cached, preempted = (np.array([record.get(key, 0) for record in records]) for key in keys)
  reserved = np.array([r["reserved"] for r in records]) if "reserved" in records[0] else None
  with_slots = "slots" in records[0]

  slots = len(records[0]["slots"]) if with_slots else 0
  below = min(max(1.6, 0.3 * slots), 5) + 0.6 if with_slots else 0
  figure = Picture(figsize=(9, 3.2 + below), layout="constrained")
  axes = figure.subplots(
    2 if with_slots else 1, 1, sharex=True, squeeze=False, height_ratios=[3, below][: 1 + with_slots]
  )
  axes = axes[:, 0]
  ax: Axes = axes[0]
  ax.stairs(held, steps, fill=True, color=_PRIVATE, label="held by one slot")
  ax.stairs(shared, steps, fill=True, color=_SHARED[0], label="shared")
  if cached.any():
    ax.stairs(held + cached, steps, baseline=held, fill=True, color=_KEPT, label="held by none, can be found again")
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
    did = np.array([r["did"] for r in records]) if "did" in records[0] else None
    _draw_slots(axes[1], np.array([r["slots"] for r in records]), did)
  axes[-1].set_xlabel("step")
  for each in axes:
    each.spines[["top", "right"]].set_visible(False)
  return figure


def _draw_pages(
  ax: Axes, top: float, cell: float, ids: np.ndarray, written: np.ndarray, refs: np.ndarray, fills: np.ndarray
) -> None:
  """Rows of pages, the first row's upper edge at `top`, in squares of `cell` inches.

  Args:
    ids: i32[R, C], page ids, -1 for none. written: f[R, C], the part of each page that holds tokens, 0 to 1.
    refs: i32[N], ref counts. fills: colours [R, C].
  """
  rows, columns = ids.shape
  if cell < _LABELLED:  # too small for outlines and numbers: one image
    image = np.where((ids < 0)[..., None], 1.0, to_rgba_array(fills.reshape(-1)).reshape(rows, columns, 4)[..., :3])
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
    count, fill = int(refs[page]), str(fills[row, column])
    ax.add_patch(Rectangle((x, y), side, side, fc=_UNWRITTEN if full < 1 else fill, lw=0))
    ax.add_patch(Rectangle((x, y), side * full, side, fc=fill, lw=0))
    ax.add_patch(Rectangle((x, y), side, side, fill=False, ec=_INK if fill != "white" else _FAINT, lw=0.6))
    if cell < 0.2:
      continue
    ink = _INK if fill != "white" else _GREY
    middle = y + side * (0.6 if count > 1 else 0.5)
    ax.text(x + side / 2, middle, str(page), ha="center", va="center", fontsize=19 * cell + 1.5, color=ink)
    if count > 1:
      small = max(4.5, 13 * cell)
      ax.text(x + side - 0.02, y + 0.01, f"\u00d7{count}", ha="right", va="bottom", fontsize=small, color=ink)


def _draw_slots(ax: Axes, slots: np.ndarray, did: np.ndarray | None) -> None:
  """Bars of the requests that sat in each slot, i32[steps, S], in colours of what was done ([steps, S]) if known."""
  steps, num_slots = slots.shape
  size = float(np.clip(90 / num_slots, 5, 8))  # of the letters, in points
  if did is not None:
    image = np.ones((num_slots, steps, 3))
    for what, colour in _DID.items():
      image[(did == what).T] = to_rgb(colour)
    ax.imshow(image, extent=(0, steps, num_slots - 0.5, -0.5), aspect="auto", interpolation="nearest")
  for slot in range(num_slots if did is None or num_slots <= 40 else 0):  # smaller ones are read by colour alone
    column = slots[:, slot]
    edges = [0, *(np.flatnonzero(np.diff(column)) + 1).tolist(), steps]
    for start, end in zip(edges[:-1], edges[1:], strict=True):
      request = int(column[start])
      if request < 0:
        continue
      style: dict[str, Any] = dict(fc=_SHARED[request % len(_SHARED)], ec="white", lw=1)
      half = 0.42
      if did is not None:
        style, half = dict(fc="none", ec=_INK, lw=0.7), 0.5
      ax.add_patch(Rectangle((start, slot - half), end - start, 2 * half, **style))
      if (end - start) * 9 * 72 / steps >= 0.75 * size * len(str(request)):  # a panel is about nine inches wide
        ax.text((start + end) / 2, slot, str(request), ha="center", va="center", fontsize=size, color=_INK)
  labels = range(0, num_slots, -(-num_slots // 16))
  ax.set(ylim=(num_slots - 0.5, -0.5), ylabel="slot", yticks=labels)
  what = "the request in each slot"
  if did is not None:
    handles = [Patch(fc=colour, label=name) for name, colour in _DID.items() if (did == name).any()]
    ax.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=5, **_LEGEND)
    what += ", and what it did"
  ax.set_title(what, loc="left", fontsize=8.5, color=_GREY)


def _tokens(count: int) -> str:
  return "1 token" if count == 1 else f"{count} tokens"
