"""Records of a run: a workdir with config.json, environment.json, metrics.jsonl and figures; committed result files.

Whole files are written beside their place and renamed into it, and a metrics line is one write: a reader, or a run that
was killed, never sees half a file.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
from typing import Any, Protocol

import jax
import numpy as np

_PACKAGES = ("paged-flash", "jax", "jaxlib", "flax", "numpy")


class Figure(Protocol):
  """Anything that saves itself as a picture, such as a `matplotlib.figure.Figure`."""

  def savefig(self, fname: Any, /, *, format: str, dpi: float, bbox_inches: str) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Workdir:
  """A run's directory. `create` it; `log`, `write_*` and `save_figure` add to it."""

  path: pathlib.Path

  @classmethod
  def create(cls, path: str | os.PathLike[str], config: Any) -> "Workdir":
    """Makes the directory and writes config.json, environment.json and an empty metrics.jsonl into it.

    A run into the directory of an earlier run replaces these three.

    Args:
      path: the directory; parents are made.
      config: a dataclass instance.

    Example:
      workdir = Workdir.create("runs/generate/first", config)
      workdir.log(step=1, tokens_per_second=118.2)
    """
    workdir = cls(pathlib.Path(path))
    workdir.path.mkdir(parents=True, exist_ok=True)
    workdir.write_json("config.json", dataclasses.asdict(config))
    workdir.write_json("environment.json", environment())
    workdir.write_text("metrics.jsonl", "")
    return workdir

  def log(self, **metrics: Any) -> None:
    """Appends one JSON object to metrics.jsonl; arrays and numpy scalars become plain numbers."""
    line = json.dumps(metrics, default=_plain, allow_nan=False) + "\n"
    with open(self.path / "metrics.jsonl", "ab", buffering=0) as file:
      file.write(line.encode())

  def write_text(self, name: str, text: str) -> pathlib.Path:
    """Writes a whole text file and returns its path."""
    path = self.path / name
    write_atomic(path, text.encode())
    return path

  def write_json(self, name: str, value: Any) -> pathlib.Path:
    """Writes `value` as an indented JSON file and returns its path."""
    return self.write_text(name, to_json(value))

  def write_jsonl(self, name: str, rows: list[dict[str, Any]]) -> pathlib.Path:
    """Writes one JSON object per line and returns the file's path."""
    return self.write_text(
      name, "".join(json.dumps(row, default=_plain, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
    )

  def save_figure(self, name: str, figure: Figure, dpi: float = 144) -> pathlib.Path:
    """Saves a figure, in the format of its name's ending (.png, .svg, .pdf), and returns its path."""
    path = self.path / name
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format=path.suffix.removeprefix("."), dpi=dpi, bbox_inches="tight")
    part.replace(path)
    return path


def environment() -> dict[str, Any]:
  """Returns what a number depends on: versions, device, commit and machine size; no names or paths of the machine."""
  device = jax.devices()[0]
  commit, dirty = _commit()
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": commit,  # None outside git
    "uncommitted_changes": dirty,
    "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
    "machine": {"system": platform.system(), "architecture": platform.machine(), "cpus": len(_cpus())},
  }


def write_result(
  experiment: str, rows: list[dict[str, Any]], *, name: str = "result", root: str = "experiments/results", **extra: Any
) -> pathlib.Path:
  """Writes a result to be committed: `<root>/<experiment>/<device>/<name>.json`, stamped with its environment.

  `experiments.report` makes the tables and figures of the documents from these files.

  Args:
    experiment: the experiment's name, such as "serve".
    rows: the measurements, one dict each, with units in the keys ("tokens_per_second", "held_bytes").
    name: the file's name, for experiments with several results.
    root: the directory of all results.
    **extra: further entries of the file, such as the config or a time series.

  Returns:
    The file's path.

  Raises:
    ValueError: if an extra entry has the name of a stamped one.
  """
  stamp = environment()
  taken = {"experiment", "rows", *stamp} & set(extra)
  if taken:
    raise ValueError(f"extra must not use the stamped names, got {sorted(taken)}")
  device = re.sub(r"[^a-z0-9]+", "_", stamp["device"]["kind"].lower()).strip("_")
  path = pathlib.Path(root, experiment, device, f"{name}.json")
  path.parent.mkdir(parents=True, exist_ok=True)
  write_atomic(path, to_json({"experiment": experiment, **stamp, **extra, "rows": rows}).encode())
  return path


def write_atomic(path: pathlib.Path, data: bytes) -> None:
  """Writes a file beside its place and renames it, so that it is there whole or not at all."""
  part = path.with_name(path.name + ".part")
  part.write_bytes(data)
  part.replace(path)


def to_json(value: Any) -> str:
  """Returns indented JSON; arrays become lists, and NaN and infinities are refused."""
  return json.dumps(value, indent=2, default=_plain, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
  if isinstance(value, (np.ndarray, np.generic, jax.Array)):
    return np.asarray(value).tolist()
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  raise TypeError(f"records hold numbers, text, lists and dicts, got {value!r} ({type(value).__name__})")


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _cpus() -> set[int]:
  """The cores this process may use (all of the machine's where the system does not say)."""
  return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _commit() -> tuple[str | None, bool | None]:
  """This source tree's commit and whether tracked files but results differ from it; (None, None) outside git."""

  def git(*args: str) -> str:
    root = pathlib.Path(__file__).resolve().parents[2]
    return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True, timeout=10).stdout

  try:
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!experiments/results")
    return git("rev-parse", "HEAD").strip(), bool(changes.strip())
  except (OSError, subprocess.SubprocessError):
    return None, None
