"""Lists every config: the experiment that reads it, and what it claims.

python -m experiments.list
"""

import ast
import pathlib
import re
import textwrap

from absl import app

ROOT = pathlib.Path(__file__).resolve().parents[1]


def configs(root: pathlib.Path = ROOT) -> list[tuple[str, str]]:
  """(path below `root`, claim) of every config: its docstring's "Claim: ..." paragraph, else its first one."""
  found = []
  for path in sorted((root / "configs").glob("*/*.py")):
    paragraphs = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")
    claims = [text for text in paragraphs if text.startswith("Claim")]
    claim = re.sub(r"^Claim[^:]*: ", "", " ".join((claims or paragraphs)[0].split()))
    found.append((path.relative_to(root).as_posix(), claim[:1].upper() + claim[1:]))
  return found


def main(argv: list[str]) -> None:
  del argv
  for path, claim in configs():
    experiment = pathlib.PurePath(path).parent.name
    print(f"python -m experiments.{experiment} --config={path}\n{textwrap.indent(textwrap.fill(claim, 116), '    ')}\n")


if __name__ == "__main__":
  app.run(main)
