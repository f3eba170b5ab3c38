"""Documents are made from results, and are up to date."""

import json
import pathlib

import pytest

from experiments import report

RESULT = {
  "experiment": "serve",
  "date": "2026-01-02T03:04:05+00:00",
  "commit": "0123456789abcdef",
  "uncommitted_changes": True,
  "versions": {"jax": "0.11.2"},
  "device": {"platform": "cpu", "kind": "cpu", "count": 1},
  "machine": {"cpus": 2, "architecture": "x86_64"},
  "steps": [{"held": 1}, {"held": 3}],
  "num_pages": 4,
  "rows": [
    {"policy": "paged", "tokens_per_second": 118.23, "held_bytes": 3 * 2**20},
    {"policy": "contiguous", "tokens_per_second": 118, "held_bytes": 2**30},
  ],
}


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
  path = tmp_path / "experiments/results/serve/cpu"
  path.mkdir(parents=True)
  (path / "result.json").write_text(json.dumps(RESULT))
  (tmp_path / "docs").mkdir()
  return tmp_path


def test_table_is_written_then_up_to_date(root: pathlib.Path):
  document = root / "README.md"
  marker = "<!-- report:serve/cpu/result policy tokens_per_second=.1f held_bytes=bytes -->"
  document.write_text(f"before\n{marker}\nold\n<!-- /report -->\nafter\n")
  assert report.update(root, check=True) == [document]
  assert "old" in document.read_text()  # check writes nothing
  assert report.update(root) == [document]
  assert document.read_text() == (
    f"before\n{marker}\n"
    "| policy | tokens per second | held bytes |\n"
    "| --- | --- | --- |\n"
    "| paged | 118.2 | 3 MiB |\n"
    "| contiguous | 118.0 | 1 GiB |\n"
    "\n*serve: 2 cores (x86_64), JAX 0.11.2, 012345678+changes, 2026-01-02*\n"
    "<!-- /report -->\nafter\n"
  )
  assert report.update(root, check=True) == []


def test_rows_are_picked_by_a_value_and_nothing_is_a_dash(root: pathlib.Path):
  rows = [*RESULT["rows"], {"policy": "none", "tokens_per_second": None, "held_bytes": None}]
  (root / "experiments/results/serve/cpu/result.json").write_text(json.dumps(RESULT | {"rows": rows}))
  document = root / "README.md"
  document.write_text("<!-- report:serve/cpu/result policy==none tokens_per_second=.1f policy -->\n<!-- /report -->\n")
  report.update(root)
  assert "| tokens per second | policy |\n| --- | --- |\n| \u2013 | none |\n\n*serve" in document.read_text()


ATTENTION = dict(case="b1 s64 h2/2 d64 full", stage="forward", is_causal=False, head_dim=64, seq_len=64)
ATTENTION |= dict(peer="ours", label="ours", us=10.0, tflops=5.0, error=0.1)
MEMORY = dict(seq_len=64, stage="forward", input_bytes=64, ours_temporary_bytes=64, plain_temporary_bytes=4096)


@pytest.mark.parametrize("kind", ["attention_bars", "attention_sweep", "attention_memory"])
def test_figures_of_attention(root: pathlib.Path, kind: str):
  result = RESULT | dict(timings=[ATTENTION], matmul_flops=1e9, rows=[MEMORY])
  (root / "experiments/results/serve/cpu/result.json").write_text(json.dumps(result))
  (root / "docs/page.md").write_text(f"<!-- report:serve/cpu/result figure={kind} -->\n<!-- /report -->\n")
  report.update(root)
  assert (root / f"docs/figures/serve_cpu_result_{kind}.png").exists()


def test_figure_is_drawn_again_only_for_another_result(root: pathlib.Path):
  document, figure = root / "docs/page.md", root / "docs/figures/serve_cpu_result_occupancy.png"
  document.write_text("<!-- report:serve/cpu/result figure=occupancy -->\n<!-- /report -->\n")
  assert report.update(root) == [figure, document]
  assert "](figures/serve_cpu_result_occupancy.png)" in document.read_text()
  assert report.update(root, check=True) == []
  (root / "experiments/results/serve/cpu/result.json").write_text(json.dumps(RESULT | {"num_pages": 5}))
  assert report.update(root, check=True) == [figure]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("<!-- report:serve/gpu/result -->\n<!-- /report -->\n", "README.md: report:serve/gpu/result.*No such file"),
    ("<!-- report:serve/cpu/result speed -->\n<!-- /report -->\n", "README.md: report:serve/cpu/result speed: 'speed'"),
    ("<!-- report:serve/cpu/result -->\nno end\n", "README.md: every .* needs"),
  ],
)
def test_what_does_not_exist_is_named(root: pathlib.Path, text: str, message: str):
  (root / "README.md").write_text(text)
  with pytest.raises(ValueError, match=message):
    report.update(root)


def test_documents_of_this_repository_are_up_to_date():
  assert report.update(report.ROOT, check=True) == []
