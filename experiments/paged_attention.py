"""Paged attention against every peer present, on a GPU: decode, chunks of prompts, both together.

    python -m experiments.paged_attention --config=configs/paged_attention/decode.py

Every implementation is first checked against float32 attention, then timed in turns with the others and with the sum of
a large array, the rate at which this GPU reads in that minute. Each case is timed twice: "repeated", on the same arrays
call after call, and, where they would fit into the L2 cache, "rotated": calls that follow one another on sets of pages
which do not, so that all come from memory. What is missing or fails says so in its row and stops nothing. Results are
written after each case, so a run that is cut off loses only the case it was at.

    --config.cases=page64 --config.cases="'b1 ctx8192'"   only cases whose name holds one of these
    --config.peers=cudnn --config.peers=fa3               only these peers
    --config.implementation=xla                           of ours, by name
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pandas as pd
from absl import logging

import paged_flash as pf
from experiments.attention_cases import normal
from experiments.claims import Claim
from experiments.comparison import Measured, check_names, compile_all, one_line, sampler, select, time_rows
from experiments.paged_cases import Case, Expected, Inputs, expect, make_inputs, quantisation_error, worst_error
from experiments.peers.paged_attention import PEERS, Peer, ours, out
from paged_flash.analysis import show_paged_bars, show_paged_sweep
from paged_flash.experiment import Workdir, main, write_result

STAGES = ("repeated", "rotated")
MOST_SETS = 8  # of pages, in "rotated"
LABELS = {name: peer.label for name, peer in (ours("") | PEERS).items()}
FIGURES = {
  "bars": show_paged_bars,
  "sweep": show_paged_sweep,
  "tflops": functools.partial(show_paged_bars, value="tflops"),
}
DETAILS = ("batch", "context", "num_heads", "num_kv_heads", "head_dim", "page_size", "chunk", "prefix", "kv_dtype")


@dataclasses.dataclass(kw_only=True)
class Config:
  problems: tuple[Case, ...] = ()
  cases: tuple[str, ...] = ()  # only the problems whose name holds one of these; none: all
  peers: tuple[str, ...] = tuple(name for name in LABELS if name != "ours")
  dtype: str = "bfloat16"  # of the queries, and of pages that are not quantised
  implementation: str = ""  # of ours, by name; "" takes what paged_attention takes
  rounds: int = 3  # turns of each implementation
  repeats: int = 5  # calls in a turn
  read_bytes: int = 4 * 2**30  # of the array whose sum is the ceiling; halved until it fits
  rotated_bytes: int = 256 * 2**20  # of the keys and values in all sets of "rotated": several times the L2 cache
  compile_threads: int = 8
  seconds: float = 480.0  # no case is begun later than this
  figure: str = "bars"  # a name of FIGURES
  claim: Claim | None = None  # 13a: pages out of order; 13b: over the page size
  result: str = ""  # name under experiments/results/paged_attention/<device>/ to write to; "" writes none


def smoke(full: Config, *problems: Case) -> Config:
  """The config on tiny cases, on a CPU in seconds."""
  return dataclasses.replace(
    full,
    problems=problems,
    peers=("ours_ordered", "gather"),
    dtype="float32",
    rounds=1,
    repeats=1,
    read_bytes=2**20,
    rotated_bytes=2 * problems[0].kv_bytes("float32"),
    compile_threads=2,
    result="",
  )


@dataclasses.dataclass(frozen=True)
class Chosen:
  """A peer's fastest variant that is right, ready to be timed."""

  peer: Peer
  variant: dict[str, Any]
  operands: list[tuple]  # of each set of pages
  program: Callable  # of the first


def run_case(
  case: Case, sets: list[Inputs], config: Config, peers: dict[str, Peer], read: Callable[[], list[float]]
) -> tuple[list[Measured], float | None]:
  """Checks and times all implementations on a case; the peer "read" is the ceiling. Also the error of quantising."""
  expected = {False: [expect(case, inputs) for inputs in sets]}
  if case.kv_dtype:
    expected[True] = [expect(case, inputs.unquantised) for inputs in sets]
  rows = {name: Measured(case, "repeated", name) for name in (*peers, "read")}
  chosen = choose(case, sets, config, peers, expected, rows)
  samplers = {name: sampler(c.program, c.operands[0], repeats=config.repeats) for name, c in chosen.items()}
  time_rows(rows, {"read": read} | samplers, config.rounds)
  done = list(rows.values())
  if len(sets) > 1:
    rotated = {name: Measured(case, "rotated", name) for name in (*chosen, "read")}
    samplers = {"read": read} | rotating(case, config, chosen, expected, rotated)
    time_rows(rotated, samplers, config.rounds)
    done += rotated.values()
  return done, quantisation_error(expected[False][0], expected[True][0]) if case.kv_dtype else None


def choose(
  case: Case,
  sets: list[Inputs],
  config: Config,
  peers: dict[str, Peer],
  expected: dict[bool, list[Expected]],
  rows: dict[str, Measured],
) -> dict[str, Chosen]:
  """The variant of each peer that is to be timed; the rows get the errors, and why one cannot run."""
  operands: dict[str, list[tuple]] = {}
  for name, peer in peers.items():
    try:
      operands[name] = jax.block_until_ready([peer.operands(case, inputs) for inputs in sets])
    except Exception as error:  # as in compile_all
      rows[name].note = one_line(error)
  builders = {
    (name, index): functools.partial(compiled, case, peers[name], variant, mine[:1])
    for name, mine in operands.items()
    for index, variant in enumerate(peers[name].variants)
  }
  chosen, ranks = {}, {}
  for (name, index), (program, note) in compile_all(builders, config.compile_threads).items():
    row, peer, error, seconds = rows[name], peers[name], None, 0.0
    if program is not None:
      error, note = check(program, operands[name][:1], expected[peer.is_unquantised][:1])
    if program is not None and error is not None and len(peer.variants) > 1:
      seconds, failure = quick(program, operands[name][0])
      error, note = (None, failure) if failure else (error, note)
    if program is None or error is None:
      row.note = row.note or note
      continue
    rank = (error > 1, seconds)
    if name not in chosen or rank < ranks[name]:
      chosen[name], ranks[name] = Chosen(peer, peer.variants[index], operands[name], program), rank
      which = ", ".join(f"{key} {value}" for key, value in peer.variants[index].items())
      row.error, row.note = error, "; ".join(filter(None, (which, note)))
  return chosen


def rotating(
  case: Case,
  config: Config,
  chosen: dict[str, Chosen],
  expected: dict[bool, list[Expected]],
  rows: dict[str, Measured],
) -> dict[str, Callable[[], list[float]]]:
  """Samplers of one call in a program of several, each on its own set of pages; the rows get the errors."""
  builders = {name: functools.partial(compiled, case, c.peer, c.variant, c.operands) for name, c in chosen.items()}
  samplers = {}
  for name, (program, note) in compile_all(builders, config.compile_threads).items():
    row, operands = rows[name], chosen[name].operands
    row.note = note
    if program is None:
      continue
    row.error, row.note = check(program, operands, expected[chosen[name].peer.is_unquantised])
    if row.error is not None:
      samplers[name] = functools.partial(each_of, len(operands), sampler(program, *operands, repeats=config.repeats))
  return samplers


def each_of(calls: int, sample: Callable[[], list[float]]) -> list[float]:
  """Seconds of one of the calls that a program makes."""
  return [seconds / calls for seconds in sample()]


def quick(program: Callable, operands: tuple) -> tuple[float, str]:
  """(seconds of the faster of two calls, why there are none)."""
  try:
    return min(sampler(program, operands, repeats=2)()), ""
  except Exception as failure:  # as in compile_all
    return 0.0, one_line(failure)


def compiled(case: Case, peer: Peer, variant: dict[str, Any], operands: list[tuple]) -> Callable:
  """A program that attends on each of several sets of operands, one after the other."""

  def run(*operands):
    return [peer.attend(case, *each, **variant) for each in operands]

  return jax.jit(run).lower(*operands).compile()


def check(program: Callable, operands: list[tuple], expected: list[Expected]) -> tuple[float | None, str]:
  """(error by what is allowed, note) of one call; (None, why) if it fails."""
  try:
    results = program(*operands)
    error = max(float(worst_error(right, out(each))) for right, each in zip(expected, results, strict=True))
  except Exception as failure:  # as in compile_all
    return None, one_line(failure)
  return error, "" if error <= 1 else f"WRONG: its error is {error:.3g} x what is allowed"


def reading(size: int, repeats: int) -> tuple[int, Callable[[], list[float]]]:
  """(bytes, sampler) of the sum of an array of at most so many bytes, as much of it as there is memory for."""
  while True:
    try:
      numbers = jax.block_until_ready(normal(jax.random.key(1), shape=(size // 4,), dtype="float32"))
      return numbers.nbytes, sampler(jax.jit(jnp.sum).lower(numbers).compile(), numbers, repeats=repeats)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error) or size < 2**20:
        raise
      size //= 2


def record(measured: Measured, config: Config, read_bytes: int) -> dict[str, Any]:
  """What metrics.jsonl and the result say of a measurement: with the bytes of K and V that must be read, and TB/s."""
  case, seconds, is_read = measured.case, measured.seconds, measured.peer == "read"
  kv_bytes = read_bytes if is_read else case.kv_bytes(config.dtype)
  details = {name: getattr(case, name) for name in DETAILS} | dict(kv_bytes=kv_bytes)
  details["tbs"] = kv_bytes / seconds / 1e12 if seconds else None
  details["tflops"] = case.flops() / seconds / 1e12 if seconds and not is_read else None
  return measured.record(LABELS, **details)


def summary(measured: list[Measured], errors: dict[str, float | None], config: Config, read_bytes: int) -> list[dict]:
  """One row for each case and stage: ours, the ceiling, the best peer, and every time."""
  rows = []
  names = [name for name in LABELS if any(m.peer == name for m in measured)]
  for case, stage in dict.fromkeys((m.case, m.stage) for m in measured):
    here = {m.peer: m for m in measured if (m.case, m.stage) == (case, stage)}
    mine, best_read = here["ours"] if "ours" in here else Measured(case, stage, "ours"), here["read"].seconds
    times = {name: m.seconds for name in names if (m := here.get(name)) and m.counts and m.seconds}
    others = {name: t for name, t in times.items() if name in PEERS}
    best = min(others, key=lambda name: others[name], default=None)
    of_mine = record(mine, config, read_bytes)
    ceiling = read_bytes / best_read / 1e12 if best_read else None
    row = dict(case=case.name, stage=stage, ours_us=of_mine["us"], tbs=of_mine["tbs"], ceiling_tbs=ceiling)
    row |= dict(of_ceiling=of_mine["tbs"] / ceiling if of_mine["tbs"] and ceiling else None, tflops=of_mine["tflops"])
    row |= dict(best_peer=best and LABELS[best], best_peer_us=1e6 * others[best] if best else None)
    own = times.get("ours")
    row["ratio"] = others[best] / own if best and own else None
    row["overhead"] = own / times["ours_ordered"] - 1 if own and "ours_ordered" in times else None
    row["quantisation_error"] = errors[case.name]
    row |= {f"{name}_us": 1e6 * times[name] if name in times else None for name in names if name != "ours"}
    row |= {
      f"{name.removeprefix('ours_')}_by_ours": times[name] / own if own and name in times else None
      for name in names
      if name.startswith("ours_")
    }
    rows.append(row)
  return rows


def run(config: Config, workdir: Workdir) -> list[dict]:
  start = time.monotonic()
  check_names("peer", config.peers, LABELS)
  check_names("figure", [config.figure], FIGURES)
  cases = select(config.problems, config.cases)
  logging.set_verbosity(logging.ERROR)
  every = ours(config.implementation) | PEERS
  peers = {name: peer for name, peer in every.items() if name == "ours" or name in config.peers}
  read_bytes, read = reading(config.read_bytes, config.repeats)
  measured, rows, explained, errors, left, path = [], [], {}, {}, [], None
  for case in cases:
    if time.monotonic() - start > config.seconds:
      left.append(case.name)
      continue
    print(f"\n{case.name} ({time.monotonic() - start:.0f} s)", flush=True)
    try:
      sets = make_inputs(case, config.dtype, num_sets(case, config))
      explained[case.name] = explain(case, sets[0], config)
      print(f"  ours {explained[case.name][0]}", flush=True)
      new, errors[case.name] = run_case(case, sets, config, peers, read)
    except jax.errors.JaxRuntimeError as error:  # no room for the pool, or for what is right
      new, errors[case.name] = (
        [Measured(case, "repeated", name, note=one_line(error)) for name in (*peers, "read")],
        None,
      )
    sets = None  # room for the next ones
    measured += new
    rows = summary(measured, errors, config, read_bytes)
    for each in new:
      workdir.log(**record(each, config, read_bytes))
      print(f"  {each.stage:9s} {LABELS.get(each.peer, each.peer):54s} {each}", flush=True)
    if config.result:
      path = write_result(
        "paged_attention",
        rows,
        name=config.result,
        timings=[record(each, config, read_bytes) for each in measured],
        explained=explained,
        claims=[judged(config.claim, measured)] if config.claim else [],
        config=dataclasses.asdict(config),
      )
  print_summary(rows)
  records = [record(each, config, read_bytes) for each in measured]
  if any(each["us"] is not None for each in records if each["peer"] != "read"):
    workdir.save_figure(f"{config.figure}.png", FIGURES[config.figure](records))
  if left:
    print(f"\nNot run within {config.seconds:.0f} s: {'; '.join(left)}")
  if path:
    print(path)
  return rows


def judged(claim: Claim, measured: list[Measured]) -> dict[str, Any]:
  """What the times say of a claim, each case from memory ("rotated") where it was timed so."""
  seconds = {(m.case, m.peer): m.seconds for m in measured if m.counts and m.seconds}  # "rotated" comes last
  if claim.number == "13b":
    cases = [case for case, peer in seconds if peer == "ours"]
    usual = max(cases, key=lambda case: sum(dataclasses.replace(case, page_size=c.page_size) == c for c in cases))
    alike = {c.page_size: seconds[c, "ours"] for c in cases if dataclasses.replace(usual, page_size=c.page_size) == c}
    fastest = min(alike.values())
    ours = "time by the fastest: " + ", ".join(f"{alike[size] / fastest:.2f} at {size}" for size in sorted(alike))
    return claim.judged(ours, max(alike.values()) > 1.05 * fastest)
  overheads = [t / seconds[case, "ours_ordered"] - 1 for (case, peer), t in seconds.items()
               if peer == "ours" and (case, "ours_ordered") in seconds]  # fmt: skip
  if not overheads:
    return claim.judged("not measured", False)
  ours = f"{min(overheads):+.1%} to {max(overheads):+.1%} over {len(overheads)} cases, against the same pages in order"
  return claim.judged(ours, max(overheads) <= 0.26)


def num_sets(case: Case, config: Config) -> int:
  """Sets of pages that together do not fit into the L2 cache; one, if it alone does not, or too many would have to."""
  count = -(-config.rotated_bytes // case.kv_bytes(config.dtype))
  return count if count <= MOST_SETS else 1


def explain(case: Case, inputs: Inputs, config: Config) -> list[str]:
  """Which of our kernels serves a case, and why not the others."""
  query, k_pages, v_pages, pages, lens, starts, k_scales, v_scales = inputs[:8]
  more: dict[str, Any] = dict(query_starts=starts, max_query_len=case.chunk, k_scales=k_scales, v_scales=v_scales)
  more["min_query_len"] = 1 if case.decoding else case.chunk
  more["implementation"] = config.implementation or None
  try:
    lines = pf.explain(pf.paged_attention, query, k_pages, v_pages, pages, lens, **more).splitlines()[1:]
  except ValueError as error:  # a named implementation does not support the case
    lines = [str(error)]
  return [line.strip() for line in lines]


def print_summary(rows: list[dict[str, Any]]) -> None:
  """One table for each stage, microseconds of every implementation."""
  for stage in dict.fromkeys(row["stage"] for row in rows):
    part = pd.DataFrame([row for row in rows if row["stage"] == stage])
    part = part.drop(columns=["stage", "best_peer_us"]).dropna(axis=1, how="all")
    print(f"\n{stage}, us (ratio: best peer's time by ours; overhead: of pages out of order)\n")
    print(part.to_string(index=False, na_rep="-", float_format=lambda x: f"{x:.3g}" if x < 10 else f"{x:.1f}"))


if __name__ == "__main__":
  main(run)
