"""Where the time of a Hopper kernel goes, seen from inside: spans of its warpgroups, on a GPU.

    python -m tests.kernels.trace prefix-b32 grad-segments --space=400 --out=FOLDER

In a kernel, `jax.named_scope` names what a warpgroup does. With room in shared memory to write it down (--space),
Mosaic records when the first thread of each warpgroup, or of each warp (--warps), enters and leaves what is named.
Printed are, for each of a block's warpgroups and each name, how often and how many cycles (about 1.7 are a nanosecond),
then the first spans of one block. FOLDER gets the trace itself, for https://ui.perfetto.dev.

It is of a call after others: in the first, the code itself comes from memory. Where a kernel leaves no room, take fewer
tiles, as --set=prefill_stages=2. Spans that find no room are dropped, so choose --space as large as fits. Recording
costs about 30 cycles a span.
"""

import argparse
import collections
import functools
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.experimental.mosaic.gpu import profiler
from jax.experimental.pallas import mosaic_gpu as plgpu

import paged_flash as pf
from configs.attention import h200, masks
from configs.paged_attention import decode, lengths, prefill, prefix, quantised
from experiments import attention_cases, paged_cases
from experiments.attention import call_arguments
from experiments.peers.paged_attention import ours
from paged_flash import tuning
from tests.kernels.machine_code import select


class Span(NamedTuple):
  name: str
  begin: float  # cycles since its warpgroup began
  cycles: float


def all_cases() -> dict[str, Callable[[], tuple[Callable, tuple]]]:
  """name -> a function that gives (function, its arguments), for the problems of the experiments."""
  cases = {}
  for config in (h200, masks):
    for case in config.get_config().problems:
      for stage in ("fwd", "grad"):
        cases[f"{stage}-{_hyphened(case.name)}"] = functools.partial(_attention, case, stage)
  for config in (decode, lengths, prefix, prefill, quantised):
    for case in config.get_config().problems:
      cases[f"paged-{_hyphened(case.name)}"] = functools.partial(_paged, case)
  return cases


def _hyphened(name: str) -> str:
  return name.replace(",", "").replace(" ", "-")


def _attention(case: attention_cases.Case, stage: str) -> tuple[Callable, tuple]:
  inputs = attention_cases.make_inputs(case, "bfloat16")
  arguments = call_arguments(case, inputs.segments, inputs.lengths, "sm90")
  attend = functools.partial(pf.flash_attention, **arguments)
  if stage == "fwd":
    return attend, inputs[:3]
  return lambda *x: jax.vjp(attend, *x[:3])[1](x[3]), inputs[:4]


def _paged(case: paged_cases.Case) -> tuple[Callable, tuple]:
  peer = ours("sm90")["ours_shared" if case.prefix else "ours"]
  (inputs,) = paged_cases.make_inputs(case, "bfloat16")
  return functools.partial(peer.attend, case), peer.operands(case, inputs)


def spans(events: Iterable[dict[str, Any]]) -> dict[int, list[Span]]:
  """thread -> its spans in order of their begin, of Chrome's trace events."""
  found, opened, first = collections.defaultdict(list), collections.defaultdict(list), {}
  for event in events:
    thread, time = event["tid"], 1000 * event["ts"]
    begun = first.setdefault(thread, time)
    if event["ph"] == "B":
      opened[thread].append(time)
    else:
      begin = opened[thread].pop()
      found[thread].append(Span(event["name"], begin - begun, time - begin))
  return {thread: sorted(of_thread, key=lambda span: span.begin) for thread, of_thread in found.items()}


def summary(found: dict[int, list[Span]], per_block: int) -> list[str]:
  """A line for each name in each of the `per_block` threads of a block: times, and percentiles of their cycles."""
  cycles = collections.defaultdict(list)
  for thread, of_thread in found.items():
    for span in of_thread:
      cycles[(thread - 1) % per_block, span.name].append(span.cycles)
  lines = [f"{'':3}{'name':14}{'times':>8}{'mean':>9}" + "".join(f"{f'p{q}':>9}" for q in (10, 50, 90, 100))]
  for (thread, name), x in sorted(cycles.items()):
    quantiles = "".join(f"{value:9.0f}" for value in np.percentile(x, (10, 50, 90, 100)))
    lines.append(f"{thread:2} {name:14}{len(x):8}{np.mean(x):9.0f}{quantiles}")
  return lines


def trace(function: Callable, arguments: tuple, folder: pathlib.Path, args: argparse.Namespace) -> None:
  """Runs and prints the last of a few calls; one file for each kernel."""
  per_block: dict[str, int] = {}
  dump, tiles = profiler.ProfilerSpec.dump, tuning.tiles

  def remembered(spec, buffer, file, grid, block):
    per_block[file.name] = spec._num_traces((), block)
    return dump(spec, buffer, file, grid, block)

  scope = plgpu.TraceScope.WARP if args.warps else plgpu.TraceScope.WARPGROUP
  options = dict(
    profile_space=args.space, profile_dir=str(folder), profile_bounds_check=True, profile_trace_scope=scope
  )
  chosen = {name: int(value) for name, value in (x.split("=") for x in args.set)}
  with (
    mock.patch.object(plgpu, "CompilerParams", functools.partial(plgpu.CompilerParams, **options)),
    mock.patch.object(tuning, "tiles", lambda *x: tiles(*x) | chosen),
    mock.patch.object(profiler.ProfilerSpec, "dump", remembered),
  ):
    run = jax.jit(function)
    for _ in range(3):
      for file in folder.glob("*.json"):
        file.unlink()
      jax.block_until_ready(run(*arguments))
      jax.effects_barrier()
  for file in sorted(folder.glob("*.json")):
    found = spans(json.loads(file.read_text())["traceEvents"])
    print(f"\n{file.name}\n" + "\n".join(summary(found, per_block[str(file)])))
    for thread in range(1, per_block[str(file)] + 1):
      some = (f"{span.begin:.0f} {span.name} {span.cycles:.0f}" for span in found.get(thread, [])[: args.show])
      print(f"{thread - 1:2} " + ", ".join(some), flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("cases", nargs="*", help="words of a case's name, joined by -; none: lists the names")
  parser.add_argument("--space", type=int, default=200, help="spans that each warpgroup can record, about")
  parser.add_argument("--warps", action="store_true", help="of each warp, not of each warpgroup")
  parser.add_argument("--set", action="append", default=[], help="NAME=NUMBER of the kernel's tiles")
  parser.add_argument("--show", type=int, default=60, help="spans of the first block to print")
  parser.add_argument("--out", type=pathlib.Path, help="where the traces are kept")
  args = parser.parse_args()
  cases = all_cases()
  if not args.cases:
    print("\n".join(cases))
    return
  for wanted in args.cases:
    for name in select(wanted, list(cases)) or parser.error(f"no case has {wanted}"):
      print(f"\n{name}")
      with tempfile.TemporaryDirectory() as temporary:
        folder = args.out / name if args.out else pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        trace(*cases[name](), folder, args)


if __name__ == "__main__":
  main()
