"""Charts of measured attention: speed over lengths and of several cases, memory, bytes moved, pages read.

They take the records that the experiments attention, attention_memory, attention_traffic and paged_attention write. No
pyplot, no global state.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from paged_flash.analysis.memory import human_bytes
from paged_flash.analysis.pictures import Picture

_OURS, _CEILING = "#c0392b", "#1f2933"
_COLOURS = ("#4878a8", "#f4a259", "#8cb369", "#c78bd1", "#5fc3b5", "#d9c04c", "#a98467", "#7b8794", "#e6739f")
_CEILING_LABEL = "matrix product, the ceiling"
_READ_LABEL = "sum of a large array, the ceiling"
_SWEPT = {"context": "context", "batch": "sequences", "page_size": "page size"}
Record = Mapping[str, Any]


def show_attention_sweep(timings: Sequence[Record], *, matmul_flops: float) -> Picture:
  """Draws TFLOP/s over the sequence length: a panel for each stage, mask and head_dim, the ceiling dashed.

  Args:
    timings: one record of each case, stage and peer: "stage", "is_causal", "head_dim", "seq_len", "peer", "label",
      "us", "tflops", "error". The peer "ours" is ours, "matmul" the ceiling; what has no time or is wrong is left out.
    matmul_flops: floating-point operations of the ceiling's matrix product.

  Returns:
    A figure that displays in a notebook.

  Raises:
    ValueError: if no record has a time.
  """
  timings = _right(timings)
  stages = _distinct(timings, "stage")
  rows = [(stage, causal) for stage in stages for causal in sorted(_distinct(timings, "is_causal"))]
  head_dims = sorted(_distinct(timings, "head_dim"))
  colours = _colours(timings)
  figure = Picture(figsize=(1.2 + 3.1 * len(head_dims), 0.9 + 2.5 * len(rows)), layout="constrained")
  axes = figure.subplots(len(rows), len(head_dims), sharex=True, sharey=True, squeeze=False)
  for (stage, causal), line in zip(rows, axes, strict=True):
    for head_dim, ax in zip(head_dims, line, strict=True):
      here = [t for t in timings if (t["stage"], t["is_causal"], t["head_dim"]) == (stage, causal, head_dim)]
      for peer, (label, colour) in colours.items():
        points = sorted((t["seq_len"], t["tflops"]) for t in here if t["peer"] == peer)
        if points:
          ours = peer == "ours"
          ax.plot(*zip(*points, strict=True), "o-", color=colour, lw=2.2 if ours else 1.4, ms=4, label=label)
      if not here:
        ax.text(0.5, 0.5, "not timed", transform=ax.transAxes, ha="center", color=_CEILING, fontsize=9)
      ceiling = [matmul_flops / t["us"] / 1e6 for t in here if t["peer"] == "matmul"]
      if ceiling:
        ax.axhline(float(np.median(ceiling)), color=_CEILING, lw=1, ls="--", label=_CEILING_LABEL)
      ax.set_xscale("log", base=2)
      _lengths_axis(ax, [t["seq_len"] for t in timings])
      ax.set_ylim(bottom=0)
      ax.set_title(f"{stage}, {'causal' if causal else 'full'}, head_dim {head_dim}", loc="left", fontsize=9)
      ax.grid(axis="y", lw=0.4)
      ax.spines[["top", "right"]].set_visible(False)
  for ax in axes[:, 0]:
    ax.set_ylabel("TFLOP/s")
  for ax in axes[-1]:
    ax.set_xlabel("sequence length, tokens")
  _legend(figure, axes)
  return figure


def show_attention_bars(timings: Sequence[Record], *, matmul_flops: float) -> Picture:
  """Draws TFLOP/s of every implementation as bars, grouped by case: a panel for each stage, the ceiling as a line.

  Args and errors as in `show_attention_sweep`; "case" is the name of each group.
  """
  timings = _right(timings)
  cases, stages, colours = _distinct(timings, "case"), _distinct(timings, "stage"), _colours(timings)
  figure = Picture(figsize=(1.5 + 1.25 * max(len(cases), 4), 0.9 + 3.1 * len(stages)), layout="constrained")
  axes = figure.subplots(len(stages), 1, sharex=True, squeeze=False)
  width = 0.84 / len(colours)
  for stage, ax in zip(stages, axes[:, 0], strict=True):
    here = {(t["case"], t["peer"]): t for t in timings if t["stage"] == stage}
    for index, (peer, (label, colour)) in enumerate(colours.items()):
      found = [(place, here[case, peer]["tflops"]) for place, case in enumerate(cases) if (case, peer) in here]
      if found:
        places, speeds = np.array(found).T
        ax.bar(places - 0.42 + (index + 0.5) * width, speeds, width, color=colour, label=label)
    for place, case in enumerate(cases):
      if (case, "matmul") in here:
        peak = matmul_flops / here[case, "matmul"]["us"] / 1e6
        label = _CEILING_LABEL if place == 0 else None
        ax.hlines(peak, place - 0.45, place + 0.45, color=_CEILING, lw=1, ls="--", label=label)
    ax.set_ylabel("TFLOP/s")
    ax.set_title(stage, loc="left", fontsize=10)
    ax.set_xticks(range(len(cases)), [case.replace(" h", "\nh").replace(" d", "\nd") for case in cases], fontsize=7.5)
    ax.grid(axis="y", lw=0.4)
    ax.set_axisbelow(True)
    ax.set_xlim(-0.6, len(cases) - 0.4)
    ax.spines[["top", "right"]].set_visible(False)
  _legend(figure, axes)
  return figure


def show_attention_memory(rows: Sequence[Record]) -> Picture:
  """Draws the temporaries of attention over the sequence length, both axes logarithmic.

  Args:
    rows: "seq_len", "stage", "input_bytes" (drawn grey, for scale), "ours_temporary_bytes", "plain_temporary_bytes";
      None where a program did not compile, 0 is left out.

  Raises:
    ValueError: if there are no rows.
  """
  if not rows:
    raise ValueError("rows must be at least one record, got none")
  figure = Picture(figsize=(6.4, 4.2), layout="constrained")
  ax = figure.subplots()
  lines = (
    ("plain_temporary_bytes", "plain XLA", _COLOURS[0]),
    ("ours_temporary_bytes", "ours", _OURS),
    ("input_bytes", "", "#d5dbe1"),
  )
  for stage, style in zip(_distinct(rows, "stage"), ("o-", "s--", "^:"), strict=False):
    for key, label, colour in lines:
      points = [(row["seq_len"], row[key]) for row in rows if row["stage"] == stage and row[key]]
      if points and (label or style == "o-"):
        text = f"{label}, {stage}" if label else "the inputs themselves"
        ax.plot(*zip(*points, strict=True), style if label else "-", color=colour, ms=4, label=text, lw=1.8)
  ax.set_xscale("log", base=2)
  ax.set_yscale("log", base=2)
  _lengths_axis(ax, [row["seq_len"] for row in rows])
  ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
  ax.set(xlabel="sequence length, tokens", ylabel="temporary memory")
  ax.grid(lw=0.4)
  ax.spines[["top", "right"]].set_visible(False)
  ax.legend(frameon=False, fontsize=8.5)
  return figure


def show_attention_traffic(rows: Sequence[Record]) -> Picture:
  """Draws the bytes of device memory that a forward pass moves, counted and measured, a group of bars for each case.

  The axis is logarithmic; a line at each group is every operand once.

  Args:
    rows: one for each case and peer: "case", "peer", "label", "compulsory_bytes", "counted_hbm_bytes",
      "measured_hbm_bytes" (None where not measured: no bar).

  Raises:
    ValueError: if there are no rows.
  """
  if not rows:
    raise ValueError("rows must be at least one record, got none")
  cases, colours = _distinct(rows, "case"), _colours(rows)
  figure = Picture(figsize=(1.5 + 1.25 * max(len(cases), 4), 4.0), layout="constrained")
  ax = figure.subplots()
  width = 0.84 / (2 * len(colours))
  for index, (peer, (label, colour)) in enumerate(colours.items()):
    for kind, alpha in (("counted", 0.45), ("measured", 1.0)):
      key, offset = f"{kind}_hbm_bytes", (2 * index + (kind == "measured") + 0.5) * width - 0.42
      found = [(cases.index(r["case"]) + offset, r[key]) for r in rows if r["peer"] == peer and r[key]]
      if found:
        places, moved = np.array(found).T
        ax.bar(places, moved, width, color=colour, alpha=alpha, label=f"{label}, {kind}")
  least = {row["case"]: row["compulsory_bytes"] for row in rows}
  places = np.arange(len(cases))
  ax.hlines([least[case] for case in cases], places - 0.45, places + 0.45, color=_CEILING, lw=1, label="operands once")
  ax.set_yscale("log", base=2)
  ax.set_ylim(bottom=min(least.values()) / 8)
  ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
  ax.set_ylabel("device memory read and written")
  ax.set_xticks(places, [case.replace(" h", "\nh").replace(" d", "\nd") for case in cases], fontsize=7.5)
  ax.set_xlim(-0.6, len(cases) - 0.4)
  ax.grid(axis="y", lw=0.4)
  ax.set_axisbelow(True)
  ax.spines[["top", "right"]].set_visible(False)
  _legend(figure, np.array([ax]))
  return figure


def show_attention_io(rows: Sequence[Record]) -> Picture:
  """Draws the bytes that attention moves: over the rows of queries of a tile, and over the sequence length.

  Args:
    rows: one for each length and tile: "seq_len", "rows", "flash_bytes" (between fast and slow memory),
      "theory_bytes", "flash_hbm_bytes" (behind an L2 cache), "naive_bytes", "compulsory_bytes" (every operand once).

  Raises:
    ValueError: if there are no rows.
  """
  if not rows:
    raise ValueError("rows must be at least one record, got none")
  longest, largest = (max(row[key] for row in rows) for key in ("seq_len", "rows"))
  lines = (
    ("naive_bytes", "with the score matrix", "o-", _COLOURS[0]),
    ("flash_bytes", "tiled, between fast and slow memory", "o-", _OURS),
    ("theory_bytes", "by Theorem 2", "--", _CEILING),
    ("flash_hbm_bytes", "tiled, behind an L2 cache", "o-", _COLOURS[2]),
    ("compulsory_bytes", "every operand once", ":", _CEILING),
  )
  figure = Picture(figsize=(9.2, 4.2), layout="constrained")
  axes = figure.subplots(1, 2, sharey=True, squeeze=False)
  panels = (("rows", "seq_len", longest, "queries of a tile"), ("seq_len", "rows", largest, "sequence length, tokens"))
  for ax, (key, other, fixed, label) in zip(axes[0], panels, strict=True):
    here = sorted((row for row in rows if row[other] == fixed), key=lambda row: row[key])
    for name, text, style, colour in lines:
      ax.plot([row[key] for row in here], [row[name] for row in here], style, color=colour, lw=1.8, ms=4, label=text)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    _lengths_axis(ax, [row[key] for row in here])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    ax.set_xlabel(label)
    title = f"sequence of {fixed} tokens" if other == "seq_len" else f"tiles of {fixed} queries"
    ax.set_title(title, loc="left", fontsize=9)
    ax.grid(lw=0.4)
    ax.spines[["top", "right"]].set_visible(False)
  axes[0, 0].set_ylabel("bytes moved, one head")
  _legend(figure, axes)
  return figure


def show_paged_bars(timings: Sequence[Record], *, value: str = "tbs") -> Picture:
  """Draws the speed of every implementation of paged attention as bars, grouped by case.

  Where a case was timed on pages that are not in the L2 cache ("rotated"), that counts.

  Args:
    timings: the records of experiments.paged_attention: "case", "stage", "peer", "label", "us", "tbs", "tflops",
      "error". The peer "ours" is ours, "read" the ceiling; what has no time or is wrong is left out.
    value: "tbs", TB/s of keys and values, with the read rate of each case's minute as a line, or "tflops".

  Raises:
    ValueError: if no record has a time.
  """
  timings = _from_memory(_right(timings))
  cases = _distinct(timings, "case")
  colours = _colours([t for t in timings if t["peer"] != "read"])
  figure = Picture(figsize=(1.5 + 1.3 * max(len(cases), 4), 4.2), layout="constrained")
  ax = figure.subplots()
  found = {(t["case"], t["peer"]): t[value] for t in timings}
  width = 0.84 / len(colours)
  for index, (peer, (label, colour)) in enumerate(colours.items()):
    bars = [(place, found[case, peer]) for place, case in enumerate(cases) if (case, peer) in found]
    if bars:
      places, speeds = np.array(bars).T
      ax.bar(places - 0.42 + (index + 0.5) * width, speeds, width, color=colour, label=label)
  for place, case in enumerate(cases):
    if value == "tbs" and (case, "read") in found:
      label = _READ_LABEL if place == 0 else ""
      ax.hlines(found[case, "read"], place - 0.45, place + 0.45, color=_CEILING, lw=1, ls="--", label=label)
  ax.set_ylabel("TFLOP/s" if value == "tflops" else "TB/s of keys and values")
  names = [case.replace(" h", "\nh").replace(" page", "\npage").replace(", ", "\n") for case in cases]
  ax.set_xticks(range(len(cases)), names, fontsize=7.5)
  ax.set_xlabel("b: sequences, ctx: tokens of each, h: heads of queries / of K and V, d: head_dim", fontsize=8.5)
  ax.set_xlim(-0.6, len(cases) - 0.4)
  ax.grid(axis="y", lw=0.4)
  ax.set_axisbelow(True)
  ax.spines[["top", "right"]].set_visible(False)
  _legend(figure, np.array([ax]))
  return figure


def show_paged_sweep(timings: Sequence[Record]) -> Picture:
  """Draws TB/s of keys and values over the context, the batch and the page size, a panel for each that varies.

  A panel shows the cases that differ from the most frequent one in nothing but its own quantity; the read rate is
  dashed. Args and errors as in `show_paged_bars`; the records also have "context", "batch" and "page_size".
  """
  timings = _from_memory(_right(timings))
  axes_of = {key: label for key, label in _SWEPT.items() if len(_distinct(timings, key)) > 1} or {"context": "context"}
  usual = {key: collections.Counter(t[key] for t in timings).most_common(1)[0][0] for key in _SWEPT}
  colours = _colours([t for t in timings if t["peer"] != "read"])
  figure = Picture(figsize=(1.2 + 3.4 * len(axes_of), 3.9), layout="constrained")
  axes = figure.subplots(1, len(axes_of), sharey=True, squeeze=False)
  for (key, label), ax in zip(axes_of.items(), axes[0], strict=True):
    here = [t for t in timings if all(t[other] == usual[other] for other in _SWEPT if other != key)]
    for peer, (name, colour) in colours.items():
      points = sorted((t[key], t["tbs"]) for t in here if t["peer"] == peer)
      if points:
        ax.plot(*zip(*points, strict=True), "o-", color=colour, lw=2.2 if peer == "ours" else 1.4, ms=4, label=name)
    reads = [t["tbs"] for t in here if t["peer"] == "read"]
    if reads:
      ax.axhline(float(np.median(reads)), color=_CEILING, lw=1, ls="--", label=_READ_LABEL)
    ax.set_xscale("log", base=2)
    _lengths_axis(ax, [t[key] for t in here])
    ax.set_ylim(bottom=0)
    ax.set_xlabel(label if key == "batch" else f"{label}, tokens")
    ax.set_title(", ".join(f"{_SWEPT[k]} {usual[k]}" for k in _SWEPT if k != key), loc="left", fontsize=9)
    ax.grid(axis="y", lw=0.4)
    ax.spines[["top", "right"]].set_visible(False)
  axes[0, 0].set_ylabel("TB/s of keys and values")
  _legend(figure, axes)
  return figure


def _from_memory(timings: Sequence[Record]) -> list[Record]:
  """Of each case and peer the record of "rotated", where there is one."""
  rotated = {(t["case"], t["peer"]) for t in timings if t["stage"] == "rotated"}
  return [t for t in timings if t["stage"] == "rotated" or (t["case"], t["peer"]) not in rotated]


def _right(timings: Sequence[Record]) -> list[Record]:
  right = [t for t in timings if t["us"] is not None and not (t["error"] or 0) > 1]
  if not right:
    raise ValueError(f"timings must hold at least one measured time, got {list(timings)[:1]}")
  return right


def _distinct(records: Sequence[Record], key: str) -> list[Any]:
  return list(dict.fromkeys(record[key] for record in records))


def _colours(timings: Sequence[Record]) -> dict[str, tuple[str, str]]:
  """Label and colour of each peer, ours first; the ceiling is none of them."""
  labels = {t["peer"]: t["label"] for t in timings if t["peer"] not in ("ours", "matmul")}
  peers = {peer: (label, _COLOURS[i % len(_COLOURS)]) for i, (peer, label) in enumerate(labels.items())}
  return {"ours": ("ours", _OURS)} | peers


def _lengths_axis(ax: Axes, lengths: Sequence[int]) -> None:
  ax.xaxis.set_major_locator(FixedLocator(sorted(set(lengths))))
  ax.xaxis.set_minor_locator(NullLocator())
  ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}"))
  ax.tick_params(labelsize=8)


def _legend(figure: Picture, axes: np.ndarray) -> None:
  """One legend for all panels, below them."""
  found = {}
  for ax in axes.flat:
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
      found.setdefault(label, handle)
  columns = 3 if len(found) in (5, 6) else min(4, len(found))
  figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)
