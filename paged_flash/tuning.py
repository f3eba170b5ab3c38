"""Tile sizes: a kernel is told its tiles, it does not choose them.

The tiles of GPU kernels are looked up in `data/tiles/<device>.json`, measured and reviewed; a device without a table,
and a problem that no entry matches, get a heuristic. A table reads

    {"forward": [{"match": {"head_dim": 128, "min_query_len": 4096}, "tiles": {"block_kv": 128, "stages": 2}}, ...],
     "backward": [...]}

where the first entry counts whose `match` holds: equal to the problem's fields, or for `min_FIELD` no more than FIELD.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any, Literal

from paged_flash.kernels import flash_backward_sm90, mosaic, paged_decode_sm90, paged_sm90
from paged_flash.kernels.problem import FlashProblem, PagedProblem, Problem

TABLES = pathlib.Path(__file__).parent / "data" / "tiles"
STAGES = ("forward", "backward")
SHARED_BYTES = 220 * 2**10  # of 227 KiB for a block on an H100 or H200; barriers and small arrays need some


def tiles(problem: Problem, implementation: str, stage: Literal["forward", "backward"] = "forward") -> dict[str, int]:
  """Returns the tile arguments of a kernel.

  Args:
    problem: What the kernel is asked to do.
    implementation: The kernel's name.
    stage: Which of its functions is to run.

  Returns:
    Keyword arguments of that function. xla: `block_q` queries by `block_kv` keys; `lanes` key blocks at a time
    (decode): constants of the problem's kind, so that a sequence's result does not depend on who shares its batch.
    sm90: see `flash_forward_sm90.forward`, `flash_backward_sm90.backward` and `paged_sm90.paged_forward`.
    Empty for the reference, which has no tiles.

  Raises:
    ValueError: The device's table is malformed; the text says where.

  Example:
    `tiles(problem, "xla")` -> `{"block_q": 128, "block_kv": 128}`.
  """
  if implementation == "reference":
    return {}
  if implementation == "xla":
    is_paged = isinstance(problem, PagedProblem)
    return {"block_q": 64, "block_kv": 128, "lanes": 8} if is_paged else {"block_q": 128, "block_kv": 128}
  if isinstance(problem, PagedProblem):
    return _paged_heuristic(problem)
  path = TABLES / f"{problem.device}.json"
  for entry in _table(path).get(stage, []) if path.exists() else []:
    if all(_matches(problem, *wanted) for wanted in entry["match"].items()):
      return dict(entry["tiles"])
  return _heuristic(problem, stage)


def _paged_heuristic(problem: PagedProblem) -> dict[str, int]:
  """As much of K and V in flight as shared memory has room for, in tiles that measured best on an H100.

  A result depends on `block_kv`, so that is chosen by head_dim alone: batches of any size give the same bits. Where
  there is at most one chunk for each multiprocessor, one lane has the memory of two.
  """
  size = problem.head_dim
  block_kv = 64 if size == 256 else 128
  chunks = paged_decode_sm90.make_chunks(problem, block_kv)
  is_few = chunks.max_count * problem.num_kv_heads * problem.batch <= mosaic.num_multiprocessors()
  lanes = 1 if size == 256 or is_few else 2
  columns = paged_decode_sm90.tile_columns(problem, chunks)[-1]
  room = SHARED_BYTES // lanes - 2 * columns * (size + block_kv)  # beside queries and probabilities
  stages = room // (2 * block_kv * size * (1 if problem.has_scales else 2))
  tiles = {"lanes": lanes, "block_kv": block_kv, "stages": stages}
  if problem.max_query_len > paged_decode_sm90.max_tokens(problem):  # measured for head_dim 128 alone
    block_kv, stages = (64, 2) if size == 256 else (128, 3)
    prefill = {"num_wgs": 3 if size == 64 else 2, "block_kv": block_kv, "stages": stages}
    prefill |= {"query_stages": 2} if size == 64 else {}
    tiles |= {paged_sm90.PREFILL + name: value for name, value in prefill.items()}
  return tiles


def _heuristic(problem: FlashProblem, stage: str) -> dict[str, int]:
  """What measured best on an H200, by head_dim."""
  size = max(problem.head_dim, problem.value_dim)
  if stage == "backward":
    if size > 64:
      return {"stages": 2}
    most = max(64, problem.query_len) if problem.window is None else 64  # 128 was not timed with a window
    block_q = max(n for n in flash_backward_sm90.blocks_of_queries(problem) if n <= most)
    return {"block_q": block_q, "stages": 2 if block_q == 128 else 3}
  if size <= 64:
    return {"num_wgs": 3, "block_kv": 128, "stages": 3, "query_stages": 2}
  return {"num_wgs": 2, "block_kv": 128 if size <= 128 else 64, "stages": 2}


def _matches(problem: Problem, name: str, wanted: Any) -> bool:
  if name.startswith("min_"):
    return getattr(problem, name.removeprefix("min_")) >= wanted
  return getattr(problem, name) == wanted


@functools.cache
def _table(path: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  """Reads and checks a device's table."""
  names = {field.name for field in dataclasses.fields(FlashProblem)}
  names |= {f"min_{field.name}" for field in dataclasses.fields(FlashProblem) if field.type is int}
  try:
    table = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{path.name} must be JSON: {error}") from error
  if not isinstance(table, dict) or not table.keys() <= set(STAGES):
    raise ValueError(f"{path.name} must hold one object with keys {' and '.join(STAGES)}, got {table!r:.100}")
  for stage, entries in table.items():
    for index, entry in enumerate(entries):
      where = f"{path.name}, {stage}, entry {index}"
      is_entry = isinstance(entry, dict) and entry.keys() == {"match", "tiles"}
      if not is_entry or not all(isinstance(part, dict) for part in entry.values()):
        raise ValueError(f"{where} must have the objects match and tiles, got {entry!r}")
      if unknown := entry["match"].keys() - names:
        raise ValueError(f"{where}: match must name fields of FlashProblem, got {', '.join(sorted(unknown))}")
      if not all(type(value) is int and value > 0 for value in entry["tiles"].values()):
        raise ValueError(f"{where}: tiles must be positive integers, got {entry['tiles']}")
  return table
