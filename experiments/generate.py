"""Completes the prompts of a JSONL file.

    python -m experiments.generate --config=configs/generate/smollm2.py --config.prompts=FILE.jsonl [--workdir=DIR]

Each line of the file is an object: "id", one of "prompt" (text), "prompt_ids" (token ids) and "messages" (a chat), and
as it pleases "max_tokens" and the other fields of `paged_flash.Params`. outputs.jsonl in the workdir gets one line for
each, in order: "id", "prompt_ids", "output_ids", "text", "finish" ("stop", "length" or "error"), with "error" saying
what was wrong with a line that could not be served. Such a line disturbs no other; the program fails only when no line
at all could be served.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from paged_flash import Completion, Engine, Params, models
from paged_flash.experiment import Workdir, main
from paged_flash.requests import Prompt

TINY = models.ModelConfig(vocab_size=256, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64)

_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
  "text": ("text", lambda v: isinstance(v, str)),
  "id": ("text or an integer", lambda v: isinstance(v, str) or _is_int(v)),
  "int": ("an integer", lambda v: _is_int(v)),
  "number": ("a number", lambda v: _is_int(v) or isinstance(v, float)),
  "bool": ("true or false", lambda v: isinstance(v, bool)),
  "texts": ("a list of texts", lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v)),
  "ints": ("a list of integers", lambda v: isinstance(v, list) and all(map(_is_int, v))),
  "chat": (
    'a list of {"role", "content"} objects of texts',
    lambda v: isinstance(v, list) and all(isinstance(m, dict) and _is_message(m) for m in v),
  ),
}
_PROMPTS = {"prompt": "text", "prompt_ids": "ints", "messages": "chat"}
_PARAMS = {
  "max_tokens": "int",
  "min_tokens": "int",
  "temperature": "number",
  "top_k": "int",
  "top_p": "number",
  "seed": "int",
  "tenant": "int",
  "priority": "int",
  "stop": "texts",
  "stop_ids": "ints",
  "ignore_eos": "bool",
}
_FIELDS = {"id": "id"} | _PROMPTS | _PARAMS


@dataclasses.dataclass(kw_only=True)
class EngineConfig:
  """Sizes of the engine, as `paged_flash.Engine` takes them."""

  num_slots: int = 8
  num_pages: int | None = None  # give this or memory_bytes
  memory_bytes: int | None = None
  page_size: int = 16
  max_seq_len: int | None = None
  token_budget: int = 64
  chunk_size: int | None = None
  num_proposed: int = 0  # tokens proposed for each slot in a step: speculative decoding
  kv_dtype: str | None = None
  implementation: str | None = None


@dataclasses.dataclass(kw_only=True)
class Config:
  model: str  # a path, a known name, or "tiny": a small one with random weights and no tokenizer
  dtype: str = "float32"
  engine: EngineConfig
  prompts: str  # a JSONL file
  max_tokens: int = 64  # for lines that do not say
  logprobs: bool = False  # write the natural log-probability of every output token
  driver: str = "host"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
  """One line of a prompts file: a request, or what is wrong with it."""

  number: int
  id: str | int | None = None
  prompt: Prompt = ()
  params: Params = Params()
  error: str = ""


def run(config: Config, workdir: Workdir) -> None:
  try:
    lines = read_lines(config.prompts, max_tokens=config.max_tokens)
    engine = Engine(load_model(config.model, config.dtype), **dataclasses.asdict(config.engine))
  except (OSError, ValueError) as error:
    sys.exit(str(error))
  print(f"{engine.memory}\nThe first step compiles.")
  served = engine.complete(
    [(line.prompt, line.params) for line in lines if not line.error], driver=config.driver, progress=True
  )
  completions = iter(served)
  rows = [_row(line, None if line.error else next(completions), config.logprobs) for line in lines]
  path = workdir.write_jsonl("outputs.jsonl", rows)
  errors = [row["error"] for row in rows if row["finish"] == "error"]
  num_tokens = sum(len(row["output_ids"]) for row in rows)
  workdir.log(served=len(rows) - len(errors), errors=len(errors), output_tokens=num_tokens)
  for error in errors:
    print(f"{config.prompts}: {error}", file=sys.stderr)
  print(f"{len(rows) - len(errors)} of {len(rows)} lines served, {num_tokens} tokens: {path}")
  if len(errors) == len(rows):
    sys.exit(f"{config.prompts}: no line could be served")


def load_model(name: str, dtype: str) -> models.Model:
  """A model by path or known name, or the "tiny" one."""
  return models.load(TINY if name == "tiny" else name, dtype=dtype)


def read_lines(path: str, *, max_tokens: int) -> list[Line]:
  """The requests of a prompts file; blank lines do not count.

  Args:
    path: the file.
    max_tokens: for lines that do not say.

  Returns:
    A `Line` for each that is not blank, in order; those that are no request say why in `error`.
  """
  lines: list[Line] = []
  first: dict[str | int, int] = {}  # id to line number
  for number, data in enumerate(pathlib.Path(path).read_bytes().splitlines(), 1):
    if not data.strip():
      continue
    id = None
    try:
      fields = _parse(data)
      id = fields.get("id")
      _check(fields)
      if id in first:
        raise ValueError(f"id {id!r} is taken by line {first[id]}")
      first[fields["id"]] = number
      (prompt,) = (fields[name] for name in _PROMPTS if name in fields)
      given = {name: fields[name] for name in _PARAMS if name in fields}
      params = dataclasses.replace(Params(max_tokens=max_tokens), **given)
      lines.append(Line(number=number, id=id, prompt=prompt, params=params))
    except ValueError as error:
      known = id if _KINDS["id"][1](id) else None
      lines.append(Line(number=number, id=known, error=f"line {number}: {error}"))
  return lines


def _parse(data: bytes) -> dict[str, Any]:
  def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
      names = [name for name, _ in pairs]
      raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return fields

  try:
    fields = json.loads(data.decode("utf-8-sig"), object_pairs_hook=once)
  except UnicodeDecodeError as error:
    raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
  except json.JSONDecodeError as error:
    raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
  except RecursionError:
    raise ValueError("not JSON that can be read: nested too deep") from None
  if not isinstance(fields, dict):
    raise ValueError(f"must be a JSON object, got {json.dumps(fields):.80}")
  return fields


def _check(fields: dict[str, Any]) -> None:
  unknown = sorted(set(fields) - set(_FIELDS))
  if unknown:
    raise ValueError(f"unknown field {unknown[0]!r}; known: {', '.join(_FIELDS)}")
  for name, value in fields.items():
    wanted, good = _KINDS[_FIELDS[name]]
    if not good(value):
      raise ValueError(f"{name} must be {wanted}, got {json.dumps(value):.80}")
  if "id" not in fields:
    raise ValueError('"id" is missing')
  prompts = [name for name in _PROMPTS if name in fields]
  if len(prompts) != 1:
    raise ValueError(f"wanted one of {', '.join(_PROMPTS)}, got {' and '.join(prompts) or 'none'}")


def _row(line: Line, done: Completion | None, logprobs: bool) -> dict[str, Any]:
  if done is None:
    row = dict(id=line.id, prompt_ids=[], output_ids=[], text="", finish="error", error=line.error)
    return row | (dict(logprobs=[]) if logprobs else {})
  row = dict(id=line.id, prompt_ids=done.prompt_ids, output_ids=done.output_ids, text=done.text, finish=done.finish)
  row |= dict(logprobs=done.logprobs) if logprobs else {}
  return row | (dict(error=f"line {line.number}: {done.error}") if done.error else {})


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_message(value: dict[str, Any]) -> bool:
  return set(value) == {"role", "content"} and all(isinstance(text, str) for text in value.values())


if __name__ == "__main__":
  main(run)
