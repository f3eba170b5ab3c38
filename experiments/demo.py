"""Serves chat requests and shows their answers as they come: `make demo`.

    python -m experiments.demo [--config=configs/demo/smollm2.py] [--workdir=runs/demo]

The run is that of `experiments.serve`. In a terminal the running requests have a line each, in which their text grows;
finished answers are printed above. Elsewhere only finished answers are printed.
"""

import shutil
import sys
import textwrap

from tqdm import tqdm

from experiments.serve import Config, Request, View, serve
from paged_flash.experiment import Workdir, main

_FLAGS = ("--config=configs/demo/smollm2.py", "--workdir=runs/demo")


class Answers(View):
  """Prints answers as they come.

  Args:
    requests: what is served.
    lines: live lines below the finished answers, one per slot; 0 where there is no terminal.
  """

  def __init__(self, requests: list[Request], lines: int):
    self._requests, self._left = requests, len(requests)
    self._width = min(shutil.get_terminal_size((100, 24)).columns, 120) - 1
    self._texts: dict[int, str] = {}
    self._free = [tqdm(bar_format="{desc}", position=i + 1, leave=False) for i in range(lines)]
    self._lines: dict[int, tqdm] = {}

  def text(self, index: int, piece: str) -> None:
    self._texts[index] = self._texts.get(index, "") + piece
    if index not in self._lines and self._free:
      self._lines[index] = self._free.pop(0)
    if index in self._lines:
      name = f"[{index}] "
      tail = " ".join(self._texts[index].split())[-(self._width - len(name)) :]
      self._lines[index].set_description_str(name + tail)

  def end(self, index: int) -> None:
    if index in self._lines:
      line = self._lines.pop(index)
      line.set_description_str("")
      self._free.append(line)
    self._left -= 1
    if not self._left:
      for line in self._free:
        line.close()
    request = self._requests[index]
    question = textwrap.shorten(f"[{index}] {request.label}: {request.text}", self._width, placeholder=" ...")
    answer = " ".join(self._texts.get(index, "").split())
    tqdm.write("\n".join([question, *textwrap.wrap(answer, self._width, initial_indent="  ", subsequent_indent="  ")]))


def run(config: Config, workdir: Workdir) -> None:
  lines = config.engine.num_slots if sys.stdout.isatty() and sys.stderr.isatty() else 0
  serve(config, workdir, lambda requests: Answers(requests, lines))


if __name__ == "__main__":
  sys.argv[1:1] = [flag for flag in _FLAGS if not any(arg.startswith(flag.partition("=")[0] + "=") for arg in sys.argv)]
  main(run)
