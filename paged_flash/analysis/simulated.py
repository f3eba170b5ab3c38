"""Charts of simulated serving: who has the memory, latency over the request rate, what the page size costs.

They take the rows that the experiments memory, simulate and batching write. No pyplot, no global state.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter

from paged_flash.analysis.pictures import Picture

PARTS = {  # of the memory, and their colours
  "used": ("holds tokens", "#4878a8"),
  "reserved": ("reserved, used later", "#8fb8de"),
  "internal": ("reserved, never used", "#f4a259"),
  "rounding": ("rest of buddy blocks", "#c0392b"),
  "external": ("free, but too small a block", "#e6a39b"),
  "free": ("free", "#eceff3"),
}
_COLOURS = ("#c0392b", "#4878a8", "#f4a259", "#8cb369", "#c78bd1", "#5fc3b5")
_OURS = "paged"
Row = Mapping[str, Any]


def show_memory_split(rows: Sequence[Row]) -> Picture:
  """Draws how the memory of a loaded server is divided: a bar for each allocator.

  Args:
    rows: "allocator", a share for each of `PARTS`, and if there is one "paper_used", a published share that holds
      tokens, which is marked.

  Raises:
    ValueError: if there are no rows.
  """
  if not rows:
    raise ValueError("rows must be at least one record, got none")
  figure = Picture(figsize=(7.4, 1.2 + 0.42 * len(rows)), layout="constrained")
  ax = figure.subplots()
  places, left = np.arange(len(rows)), np.zeros(len(rows))
  for part, (label, colour) in PARTS.items():
    shares = np.array([row[part] for row in rows])
    if shares.max() > 5e-4:
      ax.barh(places, shares, left=left, color=colour, label=label, height=0.68, edgecolor="white", lw=0.6)
      for place, share, start in zip(places.tolist(), shares.tolist(), left.tolist(), strict=True):
        if share > 0.05:
          ink = "white" if part in ("used", "rounding") else "#1f2933"
          ax.text(start + share / 2, place, f"{share:.0%}", ha="center", va="center", fontsize=8, color=ink)
    left += shares
  theirs = [(row["paper_used"], place) for row, place in zip(rows, places, strict=True) if row.get("paper_used")]
  if theirs:
    ax.plot(*zip(*theirs, strict=True), "|", color="#1f2933", ms=22, mew=2, label="holds tokens, in the paper")
  ax.set_yticks(places, [row["allocator"] for row in rows])
  ax.invert_yaxis()
  ax.set(xlim=(0, 1), xlabel="share of the KV memory, while requests wait")
  ax.xaxis.set_major_formatter(PercentFormatter(1))
  ax.spines[["top", "right", "left"]].set_visible(False)
  handles, labels = ax.get_legend_handles_labels()
  last = len(theirs) > 0  # lines come first among the handles
  handles, labels = handles[last:] + handles[:last], labels[last:] + labels[:last]
  figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5, markerscale=0.5)
  return figure


def show_rates(rows: Sequence[Row]) -> Picture:
  """Draws normalised latency and mean batch over the request rate, a line for each allocator.

  Args:
    rows: "allocator", "rate" in requests/s, "normalised_latency" in s/token, "mean_running", and if there is one
      "paper_batch", a published mean batch, which is marked.

  Raises:
    ValueError: if there are no rows.
  """
  if not rows:
    raise ValueError("rows must be at least one record, got none")
  figure = Picture(figsize=(8.6, 3.5), layout="constrained")
  latency, batch = figure.subplots(1, 2)
  for name, colour in _colours(rows).items():
    here = sorted((r["rate"], r["normalised_latency"], r["mean_running"]) for r in rows if r["allocator"] == name)
    rate, seconds, running = zip(*here, strict=True)
    wide = 2.2 if name.startswith(_OURS) else 1.5
    latency.plot(rate, seconds, "o-", ms=3.5, color=colour, label=name, lw=wide)
    batch.plot(rate, running, "o-", ms=3.5, color=colour, lw=wide)
    theirs = [(r["rate"], r["paper_batch"]) for r in rows if r["allocator"] == name and r.get("paper_batch")]
    if theirs:
      batch.plot(*np.transpose(theirs), "*", ms=11, color=colour, mec="#1f2933", mew=0.8)
  if any(row.get("paper_batch") for row in rows):
    batch.plot([], [], "*", ms=11, color="white", mec="#1f2933", label="in the paper")
  top = max(1.0, 3 * min(row["normalised_latency"] for row in rows))
  latency.set(ylim=(0, top), ylabel="normalised latency, s per output token")
  unseen = [n for n in _colours(rows) if all(r["normalised_latency"] > top for r in rows if r["allocator"] == n)]
  if unseen:
    latency.text(0.02, 0.96, f"{', '.join(unseen)}: above", transform=latency.transAxes, va="top", fontsize=8.5)
  batch.set(ylabel="requests in the batch, mean")
  batch.set_ylim(bottom=0)
  rates = {row["rate"] for row in rows}
  for ax in (latency, batch):
    ax.set_xlim(0, max(rates) * (1.05 if len(rates) > 1 else 2))
    ax.set_xlabel("requests per second")
    ax.grid(lw=0.4)
    ax.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
  return figure


def show_page_sizes(rows: Sequence[Row]) -> Picture:
  """Draws the share of held memory that is wasted, and the mean batch, over the page size, a line for each trace.

  Args:
    rows: "trace", "page_size", "waste", "loaded_running" (while requests waited); rows of page_size 0 are left out.

  Raises:
    ValueError: if there are no rows with pages.
  """
  rows = [row for row in rows if row["page_size"]]
  if not rows:
    raise ValueError("rows must be at least one record with pages, got none")
  figure = Picture(figsize=(8.6, 3.3), layout="constrained")
  waste, batch = figure.subplots(1, 2)
  for name, colour in zip(dict.fromkeys(row["trace"] for row in rows), _COLOURS, strict=False):
    here = sorted((r["page_size"], r["waste"], r["loaded_running"]) for r in rows if r["trace"] == name)
    sizes, wasted, running = (np.array(column) for column in zip(*here, strict=True))
    waste.plot(sizes, wasted, "o-", ms=3.5, color=colour, label=name)
    batch.plot(sizes, running / running.max(), "o-", ms=3.5, color=colour)
  waste.set_ylabel("held memory without tokens")
  batch.set_ylabel("mean batch, of the best")
  for ax in (waste, batch):
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(sorted({row["page_size"] for row in rows})))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set_ylim(bottom=0)
    ax.set_xlabel("tokens per page")
    ax.grid(lw=0.4)
    ax.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
  return figure


def show_batches(rows: Sequence[Row]) -> Picture:
  """Draws the requests in the batch over time, a panel for each way of batching.

  Args:
    rows: "way", "seconds" to the end of the last request, "num_slots", "utilisation" (mean running by slots) and
      "times", "running": two lists, when steps began and the requests in them.

  Raises:
    ValueError: if there are no rows.
  """
  if not rows:
    raise ValueError("rows must be at least one record, got none")
  figure = Picture(figsize=(7.4, 0.9 + 1.5 * len(rows)), layout="constrained")
  axes = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
  for row, ax, colour in zip(rows, axes, _COLOURS, strict=False):
    ax.stairs(row["running"], [*row["times"], row["seconds"]], fill=True, color=colour, alpha=0.8)
    ax.axhline(row["num_slots"], color="#1f2933", lw=0.8, ls="--")
    text = f"{row['way']}: {row['seconds']:.0f} s, {row['utilisation']:.0%} of the slots in use"
    ax.set_title(text, loc="left", fontsize=9)
    ax.set_ylabel("requests")
    ax.spines[["top", "right"]].set_visible(False)
  axes[-1].set_xlabel("seconds")
  axes[-1].set_xlim(0, max(row["seconds"] for row in rows))
  return figure


def show_stalls(rows: Sequence[Row]) -> Picture:
  """Draws, over the tokens of a step, the time between tokens and the time to the first one.

  Args:
    rows: "token_budget", "token_p50_s", "token_p99_s", "token_max_s", "first_token_p50_s", "first_token_p99_s".

  Raises:
    ValueError: if there are no rows.
  """
  if not rows:
    raise ValueError("rows must be at least one record, got none")
  rows = sorted(rows, key=lambda row: row["token_budget"])
  figure = Picture(figsize=(8.6, 3.5), layout="constrained")
  between, first = figure.subplots(1, 2)
  budgets = [row["token_budget"] for row in rows]
  for ax, name, parts in ((between, "token", ("p50", "p99", "max")), (first, "first_token", ("p50", "p99"))):
    for part, colour in zip(parts, ("#4878a8", "#c0392b", "#7b8794"), strict=False):
      label = {"p50": "median", "p99": "99th percentile", "max": "longest"}[part]
      ax.plot(budgets, [row[f"{name}_{part}_s"] for row in rows], "o-", ms=3.5, color=colour, label=label)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(FixedLocator(budgets))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    ax.margins(x=0.08)
    ax.tick_params(axis="x", labelsize=8)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda s, _: f"{1e3 * s:g} ms" if s < 1 else f"{s:g} s"))
    ax.set_xlabel("tokens of a step at most")
    ax.grid(lw=0.4)
    ax.spines[["top", "right"]].set_visible(False)
  between.set_title("between the tokens of a running request", loc="left", fontsize=9)
  first.set_title("from arrival to the first token", loc="left", fontsize=9)
  handles, labels = between.get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
  return figure


def show_preemption(rows: Sequence[Row]) -> Picture:
  """Draws what recomputing and swapping take, over the page size: by themselves, and as serving feels it.

  Args:
    rows: "page_size", "recompute_ms", "out_ms", "back_ms", "swap_ms", and "recompute_latency", "swap_latency",
      "cheaper_latency" in s/token; without these, what they take by themselves alone.

  Raises:
    ValueError: if there are no rows.
  """
  if not rows:
    raise ValueError("rows must be at least one record, got none")
  rows = sorted(rows, key=lambda row: row["page_size"])
  sizes = [row["page_size"] for row in rows]
  titles = dict(ms="one sequence by itself, ms", latency="normalised latency, s/token (simulated)")
  units = [unit for unit in titles if f"swap_{unit}" in rows[0]]
  figure = Picture(figsize=(4.3 * len(units), 3.5), layout="constrained")
  axes = dict(zip(units, figure.subplots(1, len(units), squeeze=False)[0], strict=True))
  lines = (
    ("recompute", "#c0392b", "recompute"),
    ("swap", "#4878a8", "swap, out and back"),
    ("out", "#8fb8de", "out"),
    ("back", "#f4a259", "back"),
    ("cheaper", "#8cb369", "the cheaper of the two"),
  )
  handles = {}
  for unit, ax in axes.items():
    ax.set_title(titles[unit], loc="left", fontsize=9)
    for name, colour, label in lines:
      if f"{name}_{unit}" in rows[0]:
        ys = [row[f"{name}_{unit}"] for row in rows]
        handles[label] = ax.plot(sizes, ys, "o-", ms=3.5, color=colour, label=label)[0]
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(sizes))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    ax.set_xlabel("tokens per page")
    ax.grid(lw=0.4)
    ax.spines[["top", "right"]].set_visible(False)
  if "ms" in axes:
    axes["ms"].set_yscale("log")
    axes["ms"].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes["ms"].yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes["ms"].yaxis.set_minor_locator(NullLocator())
  if "latency" in axes:
    axes["latency"].set_ylim(bottom=0)
  ncols = 5 if len(units) > 1 else 2
  figure.legend(handles=[*handles.values()], loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)
  return figure


def _colours(rows: Sequence[Row]) -> dict[str, str]:
  """A colour for each allocator, ours first."""
  names = sorted(dict.fromkeys(row["allocator"] for row in rows), key=lambda name: not name.startswith(_OURS))
  return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
