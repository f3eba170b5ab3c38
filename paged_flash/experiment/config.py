"""Configs are dataclasses built by `get_config(variant)` in a Python file.

A config file holds one function; its module docstring is the claim, the command and the expected result:

    from experiments.generate import Config
    from paged_flash.experiment import choose

    def get_config(variant: str = "full") -> Config:
      full = Config(model="smollm2-135m-instruct", max_tokens=64)
      return choose(variant, full=full, smoke=replace(full, max_tokens=4))

On the command line `--config=FILE.py:smoke --config.max_tokens=8` picks a variant and overrides fields (ml_collections'
`config_flags`; see `launch.main`). Config dataclasses are not frozen, because overrides are set on the instance. Their
fields are bool, int, float, str, tuples of these, `X | None`, or dataclasses of such fields; annotations are real types
(no `from __future__ import annotations`).
"""

import dataclasses
import difflib
import pathlib
import runpy
import types
import typing
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns " Did you mean 'x'?" for the nearest known name, else a list of the known names."""
  known = list(known)
  near = difflib.get_close_matches(name, known, n=1)
  return f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known) or 'none'}."


def choose[T](variant: str, **variants: T) -> T:
  """Picks a config by its variant's name.

  Raises:
    ValueError: if there is no variant of that name.

  Example:
    >>> choose("smoke", full=64, smoke=4)
    4
  """
  if variant not in variants:
    raise ValueError(f"unknown config variant {variant!r}.{did_you_mean(variant, variants)}")
  return variants[variant]


def load(path: str) -> Any:
  """Builds and checks the config of `FILE.py` or `FILE.py:variant`, as `--config` does; for tests and notebooks.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file has no `get_config` or no such variant.
    TypeError: if the result is not a dataclass or a field holds a value of another type than declared.
  """
  file, _, variant = path.partition(":")
  if not pathlib.Path(file).is_file():
    raise FileNotFoundError(f"config must be FILE.py or FILE.py:variant of an existing file, got {path!r}")
  get_config = runpy.run_path(file).get("get_config")
  if get_config is None:
    raise ValueError(f"config file {file!r} must define get_config(variant), and does not")
  config = get_config(*([variant] if variant else []))
  check(config)
  return config


def check(config: Any, name: str = "config") -> None:
  """Checks every field's value against its declared type, dataclasses inside dataclasses included.

  Raises:
    TypeError: naming the field, the wanted type and the value that came.
  """
  if not dataclasses.is_dataclass(config) or isinstance(config, type):
    raise TypeError(f"{name} must be an instance of a dataclass, got {config!r} ({type(config).__name__})")
  hints = typing.get_type_hints(type(config))
  for field in dataclasses.fields(config):
    path, value = f"{name}.{field.name}", getattr(config, field.name)
    if not _has_type(value, hints[field.name]):
      wanted = field.type.__name__ if isinstance(field.type, type) else field.type
      raise TypeError(f"{path} must be {wanted}, got {value!r} ({type(value).__name__})")
    if dataclasses.is_dataclass(value):
      check(value, path)


def check_path(config: Any, path: str) -> None:
  """Checks that `path`, such as "engine.num_slots", names a field of the config.

  Raises:
    ValueError: naming the first unknown part, with the nearest known field.
  """
  name = "config"
  for part in path.split("."):
    known = [field.name for field in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    if part not in known:
      raise ValueError(f"{name} has no field {part!r} (in --config.{path}).{did_you_mean(part, known)}")
    name, config = f"{name}.{part}", getattr(config, part)


def _has_type(value: Any, wanted: Any) -> bool:
  origin, args = typing.get_origin(wanted), typing.get_args(wanted)
  if wanted is Any:
    return True
  if origin in (typing.Union, types.UnionType):
    return any(_has_type(value, arg) for arg in args)
  if origin is tuple:
    items = args[:1] * len(value) if isinstance(value, tuple) and args[-1:] == (Ellipsis,) else args
    return isinstance(value, tuple) and len(value) == len(items) and all(map(_has_type, value, items))
  if origin is not None:
    return isinstance(value, origin)
  if wanted in (int, float) and isinstance(value, bool):
    return False
  return isinstance(value, (int, float) if wanted is float else wanted)
