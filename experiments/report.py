"""Writes the tables and figures of README.md and docs/ from the committed results under experiments/results/.

    python -m experiments.report            bring every document up to date
    python -m experiments.report --check    exit 1 and name the documents that are not

A document asks for a table or a figure with a pair of comments; what stands between them is replaced:

    <!-- report:serve/cpu/result policy tokens_per_second=.1f held_bytes=bytes -->
    <!-- /report -->

The first word is the result's path below experiments/results, without ".json". The other words pick columns of its
"rows" (none: all), each with a format of Python's or "bytes" if wanted; `key==value` instead keeps only the rows where
it holds. `figure=occupancy` in their place draws a figure of that name (see `FIGURES`) into docs/figures/.
`report:claims` makes the table of all claims that the results judge (`experiments.claims`). Result files are those of
`paged_flash.experiment.write_result`.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

from absl import app, flags
from PIL import Image

from experiments import allocation, attention_tiles, capacity, composition, recompute, training
from paged_flash.analysis import (
  human_bytes,
  show_attention_bars,
  show_attention_io,
  show_attention_memory,
  show_attention_sweep,
  show_attention_traffic,
  show_batches,
  show_groups,
  show_memory_split,
  show_occupancy,
  show_page_sizes,
  show_paged_bars,
  show_paged_sweep,
  show_preemption,
  show_rates,
  show_stalls,
)
from paged_flash.analysis.pictures import Picture

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIGURES: dict[str, Callable[[dict[str, Any]], Picture]] = {
  # The result's "steps" are the records that show_occupancy describes.
  "occupancy": lambda result: show_occupancy(
    result["steps"], num_pages=result["num_pages"], page_bytes=result.get("page_bytes")
  ),
  # The results of the experiments attention, attention_memory, attention_traffic and attention_io.
  "attention_bars": lambda result: show_attention_bars(result["timings"], matmul_flops=result["matmul_flops"]),
  "attention_sweep": lambda result: show_attention_sweep(result["timings"], matmul_flops=result["matmul_flops"]),
  "attention_memory": lambda result: show_attention_memory(result["rows"]),
  "attention_traffic": lambda result: show_attention_traffic(result["rows"]),
  "attention_io": lambda result: show_attention_io(result["rows"]),
  # The results of experiments.paged_attention.
  "paged_bars": lambda result: show_paged_bars(result["timings"]),
  "paged_sweep": lambda result: show_paged_sweep(result["timings"]),
  "paged_tflops": lambda result: show_paged_bars(result["timings"], value="tflops"),
  # The results of the experiments memory, simulate, batching and sharing.
  "memory_split": lambda result: show_memory_split(result["rows"]),
  "page_sizes": lambda result: show_page_sizes(result["rows"]),
  "rates": lambda result: show_rates(result["rows"]),
  "batches": lambda result: show_batches([row | result["series"][row["way"]] for row in result["rows"]]),
  "stalls": lambda result: show_stalls(result["rows"]),
  "saved": lambda result: show_groups(
    result["rows"],
    groups="trace",
    bars="samples",
    panels=dict(saved="share of pages saved", mean_running="requests in the batch"),
  ),
  "beams": lambda result: show_groups(
    [
      dict(width=row["width"], label=who, saved=row[key])
      for row in result["rows"]
      for who, key in (("ours", "saved"), ("the paper, on Alpaca", "paper_saved"))
    ],
    groups="width",
    bars="label",
    panels=dict(saved="share of pages saved"),
    xlabel="beam width",
  ),
  "orderings": lambda result: show_groups(
    [row | dict(memory=f"{row['num_tokens'] / 2**20:g}M tokens") for row in result["rows"]],
    groups="memory",
    bars="policy",
    panels=dict(hit_rate="share of prompt tokens found"),
  ),
  # The results of the experiments of these names.
  "allocation": lambda result: allocation.figure(result["rows"]),
  "capacity": lambda result: capacity.figure(result["rows"]),
  "training": lambda result: training.figure(result["rows"]),
  "attention_tiles": lambda result: attention_tiles.figure(result["rows"]),
  "recompute": lambda result: recompute.figure(result["rows"]),
  "composition": lambda result: composition.figure(result["rows"]),
  "preemption": lambda result: show_preemption(result["rows"]),
}
_MARKED = re.compile(r"(<!-- report:(\S+)([^\n]*?) -->\n).*?(<!-- /report -->)", re.DOTALL)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  stale = update(ROOT, check=flags.FLAGS.check)
  for path in stale:
    print(f"{path.relative_to(ROOT)}: {'out of date' if flags.FLAGS.check else 'written'}")
  if stale and flags.FLAGS.check:
    raise SystemExit("Run python -m experiments.report and commit what it writes.")


def update(root: pathlib.Path, *, check: bool = False) -> list[pathlib.Path]:
  """Brings README.md and docs/**/*.md below `root` up to date and returns the files that were not.

  Args:
    root: the repository.
    check: write nothing.

  Raises:
    ValueError: naming the document, if it asks for a result, column or figure that does not exist.
  """
  stale = []
  for document in [root / "README.md", *sorted(root.glob("docs/**/*.md"))]:
    if not document.exists():
      continue
    old = document.read_text()
    if old.count("<!-- report:") != len(_MARKED.findall(old)):
      raise ValueError(f"{document.name}: every <!-- report:... --> needs a line of its own and a <!-- /report -->")
    pieces, end = [], 0
    for match in _MARKED.finditer(old):
      try:
        text, figures = _render(root, document, match[2], match[3].split(), check)
      except (KeyError, FileNotFoundError) as error:
        raise ValueError(f"{document.name}: report:{match[2]}{match[3]}: {error}") from error
      stale += figures
      pieces += [old[end : match.start()], match[1], text, match[4]]
      end = match.end()
    new = "".join(pieces) + old[end:]
    if new != old:
      stale.append(document)
      if not check:
        document.write_text(new)
  return stale


def table(result: dict[str, Any], columns: list[str]) -> str:
  """The result's rows as a Markdown table, and under it where and when they were measured.

  Args:
    result: a result file's content.
    columns: "key" or "key=format"; none means all keys of the first row. "key==value" keeps only the rows where
      it holds.
  """
  kept = [column.split("==") for column in columns if "==" in column]
  rows = [row for row in result["rows"] if all(str(row[key]) == value for key, value in kept)]
  columns = [column for column in columns if "==" not in column]
  picked = [column.partition("=")[::2] for column in columns or result["rows"][0]]
  lines = [[key.replace("_", " ") for key, _ in picked], ["---"] * len(picked)]
  lines += [[_cell(row[key], form) for key, form in picked] for row in rows]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{source(result)}\n"


def source(result: dict[str, Any]) -> str:
  """One line: experiment, device, versions, commit and date."""
  device, machine = result["device"], result["machine"]
  name = f"{machine['cpus']} cores ({machine['architecture']})" if device["platform"] == "cpu" else device["kind"]
  commit = (result["commit"] or "no commit")[:9] + ("+changes" if result["uncommitted_changes"] else "")
  return f"*{result['experiment']}: {name}, JAX {result['versions']['jax']}, {commit}, {result['date'][:10]}*"


def _render(
  root: pathlib.Path, document: pathlib.Path, name: str, words: list[str], check: bool
) -> tuple[str, list[pathlib.Path]]:
  """The text between a pair of comments, and the figure files that were not up to date."""
  if name == "claims":
    return _claims(root, document, check)
  data = (root / "experiments" / "results" / f"{name}.json").read_bytes()
  result = json.loads(data)
  if not words or not words[0].startswith("figure="):
    return table(result, words), []
  kind = words[0].removeprefix("figure=")
  link, stale = _figure(root, document, name, data, kind, check)
  return f"![{kind} of {result['experiment']}]({link})\n\n{source(result)}\n", stale


def _claims(root: pathlib.Path, document: pathlib.Path, check: bool) -> tuple[str, list[pathlib.Path]]:
  """The table of the claims of all results, by number, and the figure files that were not up to date."""
  rows, stale = [], []
  results = root / "experiments" / "results"
  for path in sorted(results.glob("**/*.json")):
    data = path.read_bytes()
    result, name = json.loads(data), path.relative_to(results).with_suffix("").as_posix()
    for claim in result.get("claims", []):
      links = [f"[result]({os.path.relpath(path, document.parent)})"]
      if claim["figure"]:
        link, new = _figure(root, document, name, data, claim["figure"], check)
        links, stale = [f"[figure]({link})", *links], stale + new
      number, place = claim["number"], "CPU" if result["device"]["platform"] == "cpu" else result["device"]["kind"]
      cells = [claim[key] for key in ("claim", "source", "theirs", "ours", "verdict")]
      rows.append(((int(re.sub(r"\D", "", number)), number, name), [number, *cells, place, " ".join(links)]))
  head = ["", "claim", "source", "theirs", "ours", "verdict", "on", "see"]
  lines = [head, ["---"] * len(head), *(cells for _, cells in sorted(rows))]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines), stale


def _figure(
  root: pathlib.Path, document: pathlib.Path, name: str, data: bytes, kind: str, check: bool
) -> tuple[str, list[pathlib.Path]]:
  """The link to a result's figure, drawn unless it is there, and its file if it was not up to date."""
  path = root / "docs" / "figures" / f"{name.replace('/', '_')}_{kind}.png"
  link = os.path.relpath(path, document.parent)
  digest = hashlib.sha256(data).hexdigest()  # kept in the picture: it was drawn from this result
  if path.exists():
    with Image.open(path) as image:
      if image.info.get("Source") == digest:
        return link, []
  if not check:
    path.parent.mkdir(parents=True, exist_ok=True)
    FIGURES[kind](json.loads(data)).savefig(path, dpi=144, bbox_inches="tight", metadata={"Source": digest})
  return link, [path]


def _cell(value: Any, form: str) -> str:
  if value is None:
    return "\u2013"
  if form == "bytes":
    return human_bytes(value)
  if form:
    return format(value, form)
  if isinstance(value, float):
    return f"{value:.3g}"
  return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
  flags.DEFINE_bool("check", False, "Change nothing; fail if a document is out of date.")
  app.run(main)
