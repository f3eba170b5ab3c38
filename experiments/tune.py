"""Times the tiles of a kernel and writes the best of each problem into `paged_flash/data/tiles/<device>.json`.

    python -m experiments.tune --config=configs/tune/sm90.py

For each problem and stage all candidates are compiled side by side, checked, and timed in turns. What does not fit the
chip's shared memory, or is wrong, is left out and says why. The table is brought up to date after each problem, here
and as tiles.json in the workdir; entries of other problems stay. `--config.cases=d64` picks problems by their name.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.attention import call_arguments
from experiments.attention_cases import Case, Inputs, Reference, make_inputs, references, worst_error
from experiments.comparison import one_line
from paged_flash import tuning
from paged_flash.attention import KERNELS
from paged_flash.experiment import Workdir, call_seconds, compare, kernel_seconds, main
from paged_flash.experiment.workdir import to_json, write_atomic
from paged_flash.kernels.arguments import flash_problem
from paged_flash.kernels.problem import FlashOperands, FlashProblem

Tiles = dict[str, int]
KernelStage = Literal["forward", "backward"]


@dataclasses.dataclass(kw_only=True)
class Grid:
  """Candidates: all combinations of the values of the arguments that the kernel takes; () for those it does not."""

  block_q: tuple[int, ...] = ()
  block_kv: tuple[int, ...] = ()
  stages: tuple[int, ...] = ()
  num_wgs: tuple[int, ...] = ()
  cluster: tuple[int, ...] = ()

  def candidates(self) -> list[Tiles]:
    taken = {name: values for name, values in dataclasses.asdict(self).items() if values}
    return [dict(zip(taken, values, strict=True)) for values in itertools.product(*taken.values())]


@dataclasses.dataclass(kw_only=True)
class Config:
  problems: tuple[Case, ...] = ()
  cases: tuple[str, ...] = ()  # only the problems whose name holds one of these; none: all
  implementation: str = "sm90"
  forward: Grid = dataclasses.field(default_factory=Grid)  # an empty one leaves the stage out
  backward: Grid = dataclasses.field(default_factory=Grid)
  dtype: str = "bfloat16"
  rounds: int = 3
  repeats: int = 3
  compile_threads: int = 8
  seconds: float = 480.0  # no stage of a problem is begun later than this
  write: bool = True  # the table of the device


def programs(problem: FlashProblem, kernel: Any, stage: KernelStage) -> Callable[[Tiles], Callable]:
  """A function of tiles that gives the kernel's stage, as a function of arrays."""

  def forward(tiles: Tiles, operands: FlashOperands):
    return kernel.forward(problem, operands, **tiles)

  def backward(tiles: Tiles, operands: FlashOperands, out, lse, d_out):
    gradients = kernel.backward(problem, operands, out, lse, d_out, jnp.zeros_like(lse), **tiles)
    return gradients.query, gradients.key, gradients.value

  return lambda tiles: functools.partial(forward if stage == "forward" else backward, tiles)


def compile_candidates(
  candidates: list[Tiles], program: Callable[[Tiles], Callable], operands: Sequence[Any], threads: int
) -> list[Any]:
  """The compiled program of each candidate, or the text that says why there is none."""

  def build(tiles: Tiles):
    try:
      return jax.jit(program(tiles)).lower(*operands).compile()
    except Exception as error:  # too much shared memory, or tiles that the kernel or the compiler refuses
      return one_line(error)

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    return list(pool.map(build, candidates))


def time_stage(
  config: Config,
  workdir: Workdir,
  stage: KernelStage,
  problem: FlashProblem,
  operands: Sequence[Any],
  expected: list[Reference],
) -> list[dict[str, Any]]:
  """One row for each candidate, best first: {"tiles", "us", "note"}; "us" is None where it did not run."""
  candidates = getattr(config, stage).candidates()
  program = programs(problem, KERNELS[config.implementation], stage)
  sample = functools.partial(kernel_seconds if jax.default_backend() == "gpu" else call_seconds, repeats=config.repeats)
  rows, samplers = {}, {}
  for tiles, compiled in zip(
    candidates, compile_candidates(candidates, program, operands, config.compile_threads), strict=True
  ):
    name = json.dumps(tiles)
    rows[name] = dict(tiles=tiles, us=None, note=compiled if isinstance(compiled, str) else "")
    if isinstance(compiled, str):
      continue
    workdir.log(begins=tiles, stage=stage)  # the last such line names the one that hangs
    try:
      results = compiled(*operands)
      error = worst_error(expected, results[:1] if stage == "forward" else (operands[1], *results))
      rows[name]["note"] = "" if error <= 1 else f"WRONG: its error is {error:.3g} x what is allowed"
    except jax.errors.JaxRuntimeError as failure:
      rows[name]["note"] = one_line(failure)
    if not rows[name]["note"]:
      samplers[name] = functools.partial(sample, compiled, *operands)
  for name, timing in compare(samplers, config.rounds).items():
    rows[name] |= dict(us=1e6 * timing.median, note=f"{1e6 * timing.p10:.1f} to {1e6 * timing.p90:.1f}")
  return sorted(rows.values(), key=lambda row: float("inf") if row["us"] is None else row["us"])


def match(case: Case, problems: Sequence[Case]) -> dict[str, Any]:
  """What a problem must be like for the tiles of this case: of its kind, and no shorter unless this is the shortest."""
  kind = dict(head_dim=case.head_dim, value_dim=case.head_dim, is_causal=case.is_causal)
  alike = [c.seq_len for c in problems if (c.head_dim, c.is_causal) == (case.head_dim, case.is_causal)]
  return kind | (dict(min_query_len=case.seq_len) if case.seq_len > min(alike) else {})


def updated(table: dict[str, list[dict]], stage: str, wanted: dict[str, Any], tiles: Tiles) -> dict[str, list[dict]]:
  """The table with one entry put in or replaced. The first match counts: more fields, then longer ones, come first."""
  others = [entry for entry in table.get(stage, []) if entry["match"] != wanted]
  entries = [dict(match=wanted, tiles=tiles), *others]
  entries.sort(key=lambda entry: (-len(entry["match"]), -entry["match"].get("min_query_len", 0), str(entry["match"])))
  return table | {stage: entries}


def operands_of(
  config: Config, case: Case, problem: FlashProblem, operands: FlashOperands, inputs: Inputs, best: Tiles | None
) -> tuple[Any, ...]:
  """The arrays of the backward stage; its forward pass runs with the best tiles just found, else those looked up."""
  tiles = best or tuning.tiles(problem, config.implementation)
  kernel = KERNELS[config.implementation]
  out, lse = jax.jit(lambda operands: kernel.forward(problem, operands, **tiles))(operands)
  return operands, out, lse, inputs.cotangent


def run(config: Config, workdir: Workdir) -> dict[str, list[dict]]:
  start = time.monotonic()
  cases = [case for case in config.problems if not config.cases or any(part in case.name for part in config.cases)]
  if config.implementation not in KERNELS:
    raise ValueError(f"config.implementation must be one of {', '.join(KERNELS)}, got {config.implementation!r}")
  path, table = pathlib.Path(), {}
  for case in cases:
    inputs = make_inputs(case, config.dtype)
    problem, operands = flash_problem(*inputs[:3], **_only_masks(case, inputs))
    path = tuning.TABLES / f"{problem.device}.json"
    table = table or (json.loads(path.read_text()) if path.exists() else {})
    if reason := KERNELS[config.implementation].supports(problem):
      print(f"\n{case.name}: {config.implementation} does not support it: {reason}")
      continue
    expected, best = references(case, inputs), None
    for stage in ("forward", "backward"):
      if time.monotonic() - start > config.seconds:
        print(f"\n{case.name}, {stage}: not begun within {config.seconds:.0f} s")
        continue
      if not getattr(config, stage).candidates() or getattr(config, stage) == Grid():
        continue
      arrays = (operands,) if stage == "forward" else operands_of(config, case, problem, operands, inputs, best)
      rows = time_stage(config, workdir, stage, problem, arrays, expected)
      print(f"\n{case.name}, {stage} ({time.monotonic() - start:.0f} s)")
      for row in rows:
        workdir.log(case=case.name, stage=stage, **row)
        words = " ".join(f"{name}={value}" for name, value in row["tiles"].items())
        print(
          f"  {words:45s} {'-' if row['us'] is None else format(row['us'], '.1f'):>10s} us  {row['note']}", flush=True
        )
      if rows[0]["us"] is None:
        continue
      best = rows[0]["tiles"] if stage == "forward" else best
      table = updated(table, stage, match(case, config.problems), rows[0]["tiles"])
      workdir.write_json("tiles.json", table)
      if config.write:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, to_json(table).encode())
  if config.write and table:
    print(path.relative_to(pathlib.Path.cwd()) if path.is_relative_to(pathlib.Path.cwd()) else path)
  return table


def _only_masks(case: Case, inputs: Inputs) -> dict[str, Any]:
  arguments = call_arguments(case, inputs.segments, inputs.lengths, "")
  del arguments["implementation"]
  return arguments


if __name__ == "__main__":
  main(run)
