"""Every config runs at smoke size: configs/NAME/*.py is for `python -m experiments.NAME`."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = [path.relative_to(ROOT) for path in sorted((ROOT / "configs").glob("*/*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_smoke(path: pathlib.Path, tmp_path: pathlib.Path):
  done = subprocess.run(
    [sys.executable, "-m", f"experiments.{path.parent.name}", f"--config={path}:smoke", f"--workdir={tmp_path}"],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  assert {"config.json", "environment.json", "metrics.jsonl"} <= {file.name for file in tmp_path.iterdir()}
