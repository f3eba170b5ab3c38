"""Configs and the command line: right values arrive, wrong ones are named."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import textwrap
from typing import Any

import pytest
from absl import flags

from paged_flash.experiment import choose, load
from paged_flash.experiment.launch import parse

FILE = """
  import dataclasses
  from paged_flash.experiment import choose

  @dataclasses.dataclass
  class Engine:
    num_slots: int = 8

  @dataclasses.dataclass
  class Config:
    prompts: str | None = None
    rate: float = 1.0
    stream: bool = True
    sizes: tuple[int, ...] = (1, 2)
    engine: Engine = dataclasses.field(default_factory=Engine)

  def get_config(variant="full"):
    return choose(variant, full=Config(), smoke=Config(rate=2), wrong=Config(rate="fast"))
"""


@pytest.fixture
def file(tmp_path: pathlib.Path) -> str:
  path = tmp_path / "config.py"
  path.write_text(textwrap.dedent(FILE))
  return str(path)


def parsed(*args: str) -> flags.FlagValues:
  values = flags.FlagValues()
  parse(["experiment", *args], values)
  return values


def config(values: flags.FlagValues) -> Any:
  return values["config"].value


def test_variant_and_overrides(file: str):
  values = parsed(
    f"--config={file}:smoke",
    "--config.prompts=a=b.jsonl",
    "--noconfig.stream",
    "--config.engine.num_slots=3",
    "--config.sizes=(4, 5, 6)",
    "--workdir=somewhere",
  )
  assert dataclasses.asdict(config(values)) == {
    "prompts": "a=b.jsonl",
    "rate": 2,
    "stream": False,
    "sizes": (4, 5, 6),
    "engine": {"num_slots": 3},
  }
  assert values["workdir"].value == "somewhere"


def test_load_is_the_command_lines_config(file: str):
  assert dataclasses.asdict(load(file)) == dataclasses.asdict(config(parsed(f"--config={file}")))


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--config={}", "--config.prompt=x"], r"config has no field 'prompt' .*Did you mean 'prompts'\?"),
    (["--config={}", "--config.engine.slots=1"], r"config.engine has no field 'slots' .*engine.slots.*'num_slots'"),
    (["--config={}", "--config.rate.x=1"], r"config.rate has no field 'x'"),
    (["--config={}", "--config.engine.num_slots=many"], "config.engine.num_slots=many"),
    (["--config={}", "--config.rate=fast"], "config.rate=fast"),
    (["--config={}", "--config.sizes=('a',)"], r"config.sizes must be tuple\[int, ...\], got \('a',\)"),
    (["--config={}:wrong"], r"config.rate must be float, got 'fast' \(str\)"),
    (["--config", "{}:smoek"], r"unknown config variant 'smoek'. Did you mean 'smoke'\?"),
    (["--config=absent.py:smoke"], "of an existing file, got 'absent.py:smoke'"),
    (["--confg={}"], "Unknown command line flag 'confg'"),
    ([], "--config must have a value"),
  ],
)
def test_wrong_flags_are_named(file: str, args: list[str], message: str):
  with pytest.raises(flags.Error, match=message):
    parsed(*(arg.format(file) for arg in args))


def test_choose_lists_the_variants_when_none_is_near():
  with pytest.raises(ValueError, match="unknown config variant 'xyz'. Known: full, smoke."):
    choose("xyz", full=1, smoke=2)


def test_a_program_runs_and_records(file: str, tmp_path: pathlib.Path):
  program = tmp_path / "experiment.py"
  program.write_text(
    "from paged_flash.experiment import main\n"
    "def run(config, workdir):\n  workdir.log(step=0, rate=config.rate)\n"
    "if __name__ == '__main__':\n  main(run)\n"
  )

  def call(*args: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    return subprocess.run([sys.executable, str(program), *args], capture_output=True, text=True, env=environment)

  done = call(f"--config={file}:smoke", "--config.rate=3", f"--workdir={tmp_path / 'run'}")
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "run/metrics.jsonl").read_text() == '{"step": 0, "rate": 3.0}\n'
  assert '"rate": 3.0' in (tmp_path / "run/config.json").read_text()
  refused = call(f"--config={file}", "--config.rat=3")
  assert refused.returncode == 1
  assert "Did you mean 'rate'?" in refused.stderr and "Traceback" not in refused.stderr
