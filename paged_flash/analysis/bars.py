"""Bars of what was measured, grouped: the one form for results that are neither curves nor schedules."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MultipleLocator

from paged_flash.analysis.memory import human_bytes
from paged_flash.analysis.pictures import Picture

_COLOURS = ("#c0392b", "#4878a8", "#f4a259", "#8cb369", "#c78bd1", "#5fc3b5", "#7b8794")


def show_groups(
  rows: Sequence[Mapping[str, Any]],
  *,
  groups: str,
  bars: str,
  panels: Mapping[str, str],
  xlabel: str = "",
  log: Sequence[str] = (),
) -> Picture:
  """Draws one panel for each quantity: a group of bars for each value of `groups`, a bar for each value of `bars`.

  Args:
    rows: one for each group and bar; both in the order of their first appearance. None is no bar.
    groups: the key whose values name the groups.
    bars: the key whose values name the bars.
    panels: the keys of the quantities, and what stands on each axis; those that end in "bytes" are shown as such.
    xlabel: what stands below the groups; "" for their key.
    log: the quantities whose axis is logarithmic.

  Returns:
    A figure that displays in a notebook.

  Raises:
    ValueError: if there are no rows.

  Example:
    >>> rows = [dict(length=64, who=who, ms=ms) for who, ms in (("ours", 1.0), ("theirs", 2.0))]
    >>> figure = show_groups(rows, groups="length", bars="who", panels={"ms": "ms of a step"})
    >>> [float(bar.get_height()) for bar in figure.axes[0].patches]
    [1.0, 2.0]
  """
  if not rows:
    raise ValueError("rows must be at least one record, got none")
  places, names = (list(dict.fromkeys(row[key] for row in rows)) for key in (groups, bars))
  across = max(2.6, 0.9 + 0.34 * len(places) * (len(names) + 1))
  figure = Picture(figsize=(0.6 + across * len(panels), 3.6), layout="constrained")
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  width = 0.84 / len(names)
  points = 72 * 0.8 * across * width / (len(places) + 0.2)  # a bar's width on paper
  for ax, (key, label) in zip(axes, panels.items(), strict=True):
    write = human_bytes if key.endswith("bytes") else _short
    known = [row[key] for row in rows if row.get(key)]
    turned = 4.4 * max((len(write(height)) for height in known), default=0) > points
    room = 0.32 if turned else 0.12  # of the height of the bars, above the tallest, for its number
    for index, name in enumerate(names):
      here = [(places.index(row[groups]), row[key]) for row in rows if row[bars] == name and row.get(key) is not None]
      if here:
        x, heights = np.array(here, float).T
        offset = (index + 0.5) * width - 0.42
        drawn = ax.bar(x + offset, heights, width, color=_COLOURS[index % len(_COLOURS)], label=str(name))
        paper = dict(facecolor="white", edgecolor="none", pad=0.4)  # no line of the grid through a number
        texts = [write(height) for height in heights]
        ax.bar_label(drawn, texts, fontsize=7, rotation=90 * turned, padding=2, bbox=paper)
    low, top = (min(known) / 2, max(known)) if known else (0.5, 1)
    if key in log:
      ax.set_yscale("log", base=2)
      ax.set_ylim(low, top * (top / low) ** room)
    else:
      ax.set_ylim(0, top * (1 + room))
      if write is human_bytes:
        ax.yaxis.set_major_locator(MultipleLocator(2.0 ** np.ceil(np.log2(top / 6))))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _, write=write: write(value)))
    ax.tick_params(labelsize=8)
    ax.set_title(label, loc="left", fontsize=9)
    ax.set_xticks(range(len(places)), [str(place) for place in places], fontsize=8)
    ax.set_xlim(-0.6, len(places) - 0.4)
    ax.set_xlabel(xlabel or groups.replace("_", " "))
    ax.grid(axis="y", lw=0.4)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
  found = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
  figure.legend(
    found.values(),
    found.keys(),
    loc="outside lower center",
    ncols=4,
    frameon=False,
    fontsize=8,
    title=bars.replace("_", " ") if bars != "label" else None,
    title_fontsize=8,
  )
  return figure


def _short(value: float) -> str:
  return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
