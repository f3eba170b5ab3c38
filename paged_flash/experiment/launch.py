"""Starts an experiment from the command line: flags, config, workdir."""

import datetime
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from paged_flash.experiment import config as config_lib
from paged_flash.experiment.workdir import Workdir


def main(run: Callable[[Any, Workdir], Any]) -> None:
  """Runs `run(config, workdir)` with the command line's config and workdir, and exits.

  Flags: `--config=FILE.py[:variant]` (required), `--config.FIELD=VALUE` for any field of it, and `--workdir=DIR`
  (default: runs/<experiment>/<date and time>). A wrong flag ends the program with one message that names it.

  Example:
    The end of experiments/generate.py:

        if __name__ == "__main__":
          main(run)
  """

  def start(rest: list[str]) -> None:
    if len(rest) > 1:
      raise app.UsageError(f"unexpected arguments {rest[1:]}: options look like --config.FIELD=VALUE")
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # JAX tells at length which backends are not there
    config, directory = flags.FLAGS.config, flags.FLAGS.workdir
    if directory is None:
      directory = pathlib.Path("runs", pathlib.Path(sys.argv[0]).stem, f"{datetime.datetime.now():%Y%m%d-%H%M%S}")
    workdir = Workdir.create(directory, config)
    run(config, workdir)
    print(f"Records: {workdir.path}")

  def parse_or_exit(argv: list[str]) -> list[str]:
    try:
      return parse(argv, flags.FLAGS)
    except flags.Error as error:
      sys.exit(f"{error}\n--help lists the flags.")

  app.run(start, flags_parser=parse_or_exit)


def parse(argv: list[str], flag_values: flags.FlagValues) -> list[str]:
  """Defines and parses `--config` and `--workdir`.

  Args:
    argv: the command line, program name first.
    flag_values: receives `config` (the dataclass, overrides applied and checked) and `workdir` (str or None).

  Returns:
    The program name and what is no flag.

  Raises:
    flags.Error: in one message, before anything runs, whatever is wrong with a flag, the config file or a field.
  """
  config_flags.DEFINE_config_file("config", None, "FILE.py or FILE.py:variant", flag_values=flag_values, sys_argv=argv)
  flags.DEFINE_string("workdir", None, "where this run's records go", flag_values=flag_values)
  flags.mark_flag_as_required("config", flag_values)
  try:
    if path := re.search(r"^--?config[=\n](.*)$", "\n".join(argv), re.MULTILINE):
      config = config_lib.load(path[1])
      for arg in argv[1:]:
        if field := re.match(r"--?(?:no)?config\.([^=]*)", arg):
          config_lib.check_path(config, field[1])
    rest = flag_values(argv)
    config_lib.check(flag_values["config"].value)
  except (FileNotFoundError, TypeError, ValueError) as error:
    raise flags.Error(str(error)) from error
  return rest
