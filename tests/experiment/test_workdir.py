"""Records: whole files, one line per metric, stamped results."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from paged_flash.experiment import Workdir, environment, write_result


@dataclasses.dataclass
class Config:
  sizes: tuple[int, ...] = (1, 2)


def test_create_log_and_run_again(tmp_path: pathlib.Path):
  workdir = Workdir.create(tmp_path / "a/b", Config())
  assert json.loads((workdir.path / "config.json").read_text()) == {"sizes": [1, 2]}
  assert json.loads((workdir.path / "environment.json").read_text())["versions"]["jax"]
  workdir.log(step=1, loss=np.float32(0.5), pages=jnp.arange(2))
  workdir.log(step=2, text="é")
  lines = (workdir.path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5, "pages": [0, 1]}, {"step": 2, "text": "é"}]
  Workdir.create(workdir.path, Config())
  assert (workdir.path / "metrics.jsonl").read_text() == ""


def test_a_failed_write_leaves_the_old_file(tmp_path: pathlib.Path):
  workdir = Workdir.create(tmp_path, Config())
  workdir.write_json("out.json", {"good": 1})
  with pytest.raises(TypeError, match="records hold numbers, text, lists and dicts, got <object"):
    workdir.write_json("out.json", {"bad": object()})
  with pytest.raises(ValueError):
    workdir.log(loss=float("nan"))
  assert json.loads((tmp_path / "out.json").read_text()) == {"good": 1}
  assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_killed_write_leaves_the_old_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
  workdir = Workdir.create(tmp_path, Config())
  workdir.write_json("out.json", {"good": 1})

  def killed(*_):
    raise OSError("killed")

  monkeypatch.setattr(pathlib.Path, "replace", killed)
  for write in (lambda: workdir.write_json("out.json", {"new": 2}), lambda: workdir.save_figure("a.png", Figure())):
    with pytest.raises(OSError, match="killed"):
      write()
  assert json.loads((tmp_path / "out.json").read_text()) == {"good": 1}
  assert not (tmp_path / "a.png").exists()


def test_figures_and_jsonl(tmp_path: pathlib.Path):
  workdir = Workdir.create(tmp_path, Config())
  path = workdir.save_figure("pages.png", Figure(figsize=(1, 1)))
  assert path.read_bytes().startswith(b"\x89PNG")
  assert workdir.write_jsonl("out.jsonl", [{"id": 1}, {"id": "ü"}]).read_text() == '{"id": 1}\n{"id": "ü"}\n'
  assert not list(tmp_path.glob("*.part"))


def test_environment_tells_no_machine_paths():
  assert str(pathlib.Path.home()) not in json.dumps(environment())


def test_result_is_stamped(tmp_path: pathlib.Path):
  path = write_result("serve", [{"tokens": 3}], root=str(tmp_path), num_pages=4)
  assert path == tmp_path / "serve/cpu/result.json"
  result = json.loads(path.read_text())
  assert result["rows"] == [{"tokens": 3}] and result["num_pages"] == 4 and result["experiment"] == "serve"
  assert {"commit", "date", "device", "machine", "versions"} <= result.keys()
  with pytest.raises(ValueError, match="stamped names, got .'commit'."):
    write_result("serve", [], root=str(tmp_path), commit="x")
