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
