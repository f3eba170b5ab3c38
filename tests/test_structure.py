"""The rules of the house: who may import whom, how long a module may be, what no file may hold."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "paged_flash"

# Every room of the house, and the rooms below it that it may import. A new room gets its line here.
MAY_IMPORT = {
  "kernels": set(),
  "tuning": {"kernels"},  # a problem is the key of a tile table
  "attention": {"kernels", "tuning"},
  "adapters": {"attention"},
  "cache": {"kernels"},
  "models": set(),
  "sampling": set(),
  "state": {"cache", "sampling"},
  "sharing": {"state", "cache"},
  "speculation": {"state", "cache"},
  "swapping": {"state", "cache"},
  "turns": {"sharing", "swapping", "state", "cache"},
  "scheduler": {"turns", "speculation", "sharing", "swapping", "state", "cache", "sampling"},
  "policies": {"scheduler", "sharing", "state"},
  "step": {"state", "scheduler", "speculation", "swapping", "sampling", "models", "attention", "cache"},
  "requests": {"state", "sampling", "models"},
  "history": {"state", "scheduler", "cache"},
  "beam": {"requests", "step", "state", "scheduler", "models", "cache"},
  "simulator": {"state", "scheduler", "swapping", "cache"},
  "engine": {
    "requests",
    "step",
    "state",
    "scheduler",
    "speculation",
    "swapping",
    "history",
    "models",
    "attention",
    "cache",
  },
  "training": {"models", "attention"},
  "analysis": {"cache", "kernels"},
  "experiment": set(),
}
MAY_INSTALL = {  # packages that the rooms which must stay light may import, beside the standard library
  "kernels": {"jax", "jaxlib", "numpy"},
  "experiment": {"jax", "numpy", "ml_collections", "absl"},
}
MAX_LINES = 400  # of a module outside kernels/


def modules(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(folder.rglob("*.py"))


def room(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: pathlib.Path) -> set[str]:
  """Every imported module and name, dotted, wherever in the file the import stands."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: imports are absolute"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def files() -> list[pathlib.Path]:
  """The files of the repository: tracked and new ones, or all but hidden folders where there is no git."""
  git = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
  if git.returncode == 0:
    found = [ROOT / name for name in git.stdout.split("\0")]
  else:
    hidden = re.compile(r"(^|/)(\.venv|\.git|runs|\.\w+_cache|__pycache__)/")
    found = [path for path in ROOT.rglob("*") if not hidden.search(path.relative_to(ROOT).as_posix())]
  return [path for path in found if path.is_file()]


def texts() -> list[tuple[str, str]]:
  """Name and content of every text file."""
  found = []
  for path in files():
    data = path.read_bytes()
    if b"\0" not in data[:8192]:
      found.append((str(path.relative_to(ROOT)), data.decode()))
  return found


@pytest.mark.parametrize("path", modules(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependencies_point_downwards(path: pathlib.Path):
  ours = {name for name in imports(path) if name.split(".")[0] in ("paged_flash", "experiments", "configs", "tests")}
  if path == PACKAGE / "__init__.py":
    assert all(name.startswith("paged_flash.") for name in ours)
    return
  assert room(path) in MAY_IMPORT, f"{room(path)} is a new room: give it a line in MAY_IMPORT and in docs/structure.md"
  allowed = MAY_IMPORT[room(path)] | {room(path)}
  for name in ours:
    parts = [*name.split("."), ""]
    assert parts[0] == "paged_flash" and parts[1] in allowed, (
      f"{path.relative_to(ROOT)} may import {sorted(allowed)}, and imports {name}"
    )


@pytest.mark.parametrize("name", MAY_INSTALL)
def test_light_rooms_stay_light(name: str):
  allowed = {"paged_flash", *MAY_INSTALL[name], *sys.stdlib_module_names}
  for path in modules(PACKAGE / name):
    heavy = {imported.split(".")[0] for imported in imports(path)} - allowed
    assert not heavy, f"{path.relative_to(ROOT)} imports {sorted(heavy)}"


def test_rooms_form_no_circle():
  placed: set[str] = set()
  while len(placed) < len(MAY_IMPORT):
    ready = {name for name, below in MAY_IMPORT.items() if below <= placed} - placed
    assert ready, f"these rooms import each other in a circle: {sorted(set(MAY_IMPORT) - placed)}"
    placed |= ready


def test_modules_stay_short():
  long = {
    str(path.relative_to(ROOT)): count
    for folder in ("paged_flash", "experiments", "configs")
    for path in modules(ROOT / folder)
    if "kernels" not in path.parts and (count := len(path.read_text().splitlines())) > MAX_LINES
  }
  assert not long, f"longer than {MAX_LINES} lines: {long}"


def test_packages_say_what_they_are():
  for path in modules(PACKAGE):
    assert (path.parent / "__init__.py").exists(), f"{path.parent.relative_to(ROOT)} has no __init__.py"
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} has no docstring"


# Patterns are put together here, so that this file does not match them itself.
FORBIDDEN = {
  "a path of somebody's machine": re.compile(
    r"(?<![\w.:/*~-])/(?:" + "|".join(["tmp", "work", "root", "home", "Users"]) + r")/\w"
  ),
  "a package registry's address": re.compile(
    "|".join(["pypi" + r"\.org", "pythonhosted" + r"\.org", "npmjs" + r"\.org"])
  ),
  "a note to finish it later": re.compile(r"\b(?:TO" + "DO|FIX" + r"ME)\b"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str):
  found = [
    f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
    for name, text in texts()
    for match in FORBIDDEN[what].finditer(text)
  ]
  assert not found, f"{what}: {found[:20]}"


@pytest.mark.parametrize("lock", sorted(ROOT.glob("requirements*.lock")), ids=lambda path: path.name)
def test_locks_hold_hashes_and_no_places(lock: pathlib.Path):
  text = lock.read_text()
  pins = re.findall(r"^(\S+==\S+)[^\n]*\\\n    --hash=sha256:", text, re.MULTILINE)
  assert pins and len(pins) == len(re.findall(r"^[^\s#]", text, re.MULTILINE)), "every line pins one version by hash"
  assert "://" not in text and not re.search(r"^\s*--(?!hash)", text, re.MULTILINE)
