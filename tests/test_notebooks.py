"""Notebooks are pairs of a script and a notebook with its outputs: the script runs, the two agree."""

import os
import pathlib
import subprocess
import sys

import jupytext
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_runs(script: pathlib.Path):
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, script.name], cwd=script.parent, env=environment, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_notebook_is_the_script_with_outputs(script: pathlib.Path):
  notebook = jupytext.read(script.with_suffix(".ipynb"))
  cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
  assert cells == [(cell.cell_type, cell.source) for cell in jupytext.read(script).cells], (
    f"run: jupytext --sync {script.name}, then execute the notebook"
  )
  outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
  assert outputs and not [output for output in outputs if output.output_type == "error"]
