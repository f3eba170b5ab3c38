"""Attention kernels against each other: GPU time of a forward pass, and of forward and backward together.

    python -m experiments.attention --config=configs/attention/h200.py

Every implementation is first checked against float32 attention, then timed in turns with the others and with a large
matrix product, the ceiling of that minute. What is missing or fails says so in its row and stops nothing. Results are
written after each case, so a run that is cut off loses only the case it was at.

    --config.cases=d64 --config.cases="'b2 s8192'"   only cases whose name holds one of these
    --config.peers=cudnn --config.peers=fa3          only these peers
"""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from absl import logging

import paged_flash as pf
from experiments.attention_cases import STAGES, Case, Inputs, Reference, make_inputs, references, worst_error
from experiments.claims import Claim
from experiments.comparison import Measured, check_names, compile_all, one_line, sampler, select, time_rows
from experiments.peers.jax_attention import PEERS as JAX_PEERS
from experiments.peers.jax_attention import Peer
from paged_flash.analysis import show_attention_bars, show_attention_sweep
from paged_flash.experiment import Workdir, main, write_result

TORCH_PEERS = {"torch_cudnn": "cuDNN in PyTorch", "torch_fa2": "FlashAttention-2 in PyTorch", "fa4": "FlashAttention-4"}
IMPLIED = "fa4_implied"
FIGURES = {"bars": show_attention_bars, "sweep": show_attention_sweep}
LABELS = (
  {"ours": "ours"}
  | {name: peer.label for name, peer in JAX_PEERS.items()}
  | TORCH_PEERS
  | {IMPLIED: "FA4 (implied from its published ratio to cuDNN)"}
)


@dataclasses.dataclass(kw_only=True)
class Config:
  problems: tuple[Case, ...] = ()
  cases: tuple[str, ...] = ()  # only the problems whose name holds one of these; none: all
  peers: tuple[str, ...] = ("naive", "cudnn", "mgpu", "fa3", "tokamax", "torch_cudnn", "torch_fa2", "fa4")
  stages: tuple[str, ...] = STAGES
  dtype: str = "bfloat16"
  implementation: str = ""  # of ours, by name; "" takes what flash_attention takes
  rounds: int = 3  # turns of each implementation
  repeats: int = 5  # calls in a turn
  matmul_size: int = 8192  # of the square matrix product that is the ceiling
  tile: tuple[int, int] = (128, 128)  # queries and keys of the tiles by which masked cases are judged
  compile_threads: int = 8
  seconds: float = 480.0  # no case is begun later than this
  figure: str = "bars"  # a name of FIGURES
  claim: Claim | None = None  # 6: speed over the length
  result: str = ""  # name under experiments/results/attention/<device>/ to write to; "" writes none


class TorchPeers:
  """The process of the PyTorch peers; see experiments/peers/torch_attention.py for what it answers."""

  def __init__(self, log: pathlib.Path):
    script = pathlib.Path(__file__).with_name("peers") / "torch_attention.py"
    with log.open("w") as errors:
      self._process = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
      )

  def ask(self, what: str, **details: Any) -> dict[str, Any]:
    """The answer; {"error": ...} also where the process has ended."""
    assert self._process.stdin and self._process.stdout
    try:
      self._process.stdin.write(json.dumps({"ask": what} | details) + "\n")
      self._process.stdin.flush()
      for line in self._process.stdout:
        if line.startswith("{"):
          return json.loads(line)
    except BrokenPipeError:
      pass
    return {"error": f"its process ended, exit code {self._process.wait()}"}

  def seconds(self, peer: str, repeats: int) -> list[float]:
    answer = self.ask("time", peer=peer, repeats=repeats)
    if "error" in answer:
      raise RuntimeError(answer["error"])
    return answer["seconds"]

  def close(self) -> None:
    self._process.communicate(timeout=60)


def ours(config: Config) -> Peer:
  """Our op in the form of the peers."""

  def attend(case: Case, query, key, value, segments, lengths):
    return pf.flash_attention(query, key, value, **call_arguments(case, segments, lengths, config.implementation))

  return Peer("ours", attend)


def call_arguments(case: Case, segments: Any, lengths: Any, implementation: str) -> dict[str, Any]:
  """Keyword arguments of `flash_attention` for a case."""
  return dict(
    is_causal=case.is_causal,
    segment_ids=segments,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    local_window_size=(case.window - 1, 0) if case.window else None,
    implementation=implementation or None,
  )


def programs_of(
  peers: dict[str, Peer], case: Case, inputs: Inputs, stages: Sequence[str], threads: int
) -> dict[tuple[str, str], tuple[Callable | None, str]]:
  """Every peer's program of every stage, compiled; where that fails, None and why."""

  def build(name: str, stage: str) -> Callable:
    return jax.jit(peers[name].program(case, stage)).lower(*peers[name].inputs(case, inputs)).compile()

  keys = [(name, stage) for stage in stages for name in peers]
  return compile_all({key: functools.partial(build, *key) for key in keys}, threads)


def run_case(
  case: Case,
  inputs: Inputs,
  config: Config,
  peers: dict[str, Peer],
  torch: TorchPeers | None,
  ceiling: Callable[[], list[float]],
) -> list[Measured]:
  """Checks and times all implementations on a case; the peer "matmul" is the ceiling."""
  stages = [stage for stage in STAGES if stage in config.stages]
  programs = programs_of(peers, case, inputs, stages, config.compile_threads)
  expected = references(case, inputs)
  done = []
  for stage in stages:
    rows = {name: Measured(case, stage, name) for name in (*peers, *(torch_names(config) if torch else ()), "matmul")}
    samplers = {"matmul": ceiling}
    for name, peer in peers.items():
      program, rows[name].note = programs[name, stage]
      if program is not None:
        operands = peer.inputs(case, inputs)
        rows[name].error, rows[name].note = check(peer, program, operands, case, expected)
        if rows[name].error is not None:
          samplers[name] = sampler(program, *operands, repeats=config.repeats)
    for name in torch_names(config) if torch else ():
      assert torch is not None
      if case.is_masked:
        rows[name].note = "timed on unmasked cases only"
        continue
      answer = torch.ask("load", case=dataclasses.asdict(case), dtype=config.dtype, stage=stage, peer=name)
      rows[name].error, rows[name].note = answer.get("worst"), answer.get("error", "")
      if "worst" in answer:
        samplers[name] = functools.partial(torch.seconds, name, config.repeats)
    time_rows(rows, samplers, config.rounds)
    if torch:
      torch.ask("clear")
    done += rows.values()
    if case.fa4_of_cudnn and "cudnn" in rows and rows["cudnn"].seconds is not None:
      implied = Measured(case, stage, IMPLIED, rows["cudnn"].seconds * case.fa4_of_cudnn[STAGES.index(stage)])
      done.append(implied)
  return done


def check(
  peer: Peer, program: Callable, operands: Inputs, case: Case, expected: list[Reference]
) -> tuple[float | None, str]:
  """(error by what is allowed, note) of one call; (None, why) if it fails."""
  try:
    error = worst_error(expected, peer.results(case, program(*operands)))
  except Exception as failure:  # as in compile_all
    return None, one_line(failure)
  return error, "" if error <= 1 else f"WRONG: its error is {error:.3g} x what is allowed"


def torch_names(config: Config) -> list[str]:
  return [name for name in config.peers if name in TORCH_PEERS]


def summary(measured: list[Measured], config: Config) -> list[dict[str, Any]]:
  """One row for each case and stage, then the geometric mean of the ratios of each stage."""
  found = {(m.case, m.stage, m.peer): m for m in measured}
  cases = list(dict.fromkeys(m.case for m in measured))
  stages = list(dict.fromkeys(m.stage for m in measured))
  names = [name for name in LABELS if any(m.peer == name for m in measured)]
  rows = []
  for stage in stages:
    ratios = []
    for case in cases:
      here = {name: m for name in names if (m := found.get((case, stage, name)))}
      mine, matmul = here.pop("ours"), found[case, stage, "matmul"]
      others = {name: m.seconds for name, m in here.items() if m.counts and m.seconds is not None}
      best = min(others, key=lambda name: others[name], default=None)
      peak = None if matmul.seconds is None else 2 * config.matmul_size**3 / matmul.seconds / 1e12
      speed = record(mine)["tflops"]
      row = dict(case=case.name, stage=stage, ours_us=None if mine.seconds is None else 1e6 * mine.seconds)
      row |= dict(ours_tflops=speed, ceiling_tflops=peak, of_ceiling=speed / peak if speed and peak else None)
      row |= dict(best_peer=best and LABELS[best], best_peer_us=1e6 * others[best] if best else None)
      row["ratio"] = others[best] / mine.seconds if best and mine.counts and mine.seconds else None
      row["of_ideal"] = of_ideal(mine, found.get((case.unmasked, stage, "ours")), config.tile)
      row |= {f"{name}_us": 1e6 * others[name] if name in others else None for name in names if name != "ours"}
      rows.append(row)
      ratios.append(row["ratio"])
    ratios = [ratio for ratio in ratios if ratio]
    if len(ratios) > 1:
      mean = float(np.exp(np.mean(np.log(ratios))))
      rows.append(dict.fromkeys(rows[-1]) | dict(case="geometric mean", stage=stage, ratio=mean))
  return rows


def judged(claim: Claim, rows: list[dict[str, Any]]) -> dict[str, Any]:
  """The best forward speed by the matrix product's, with the paper's 75 % as the bar, and the best backward's."""
  right = [row for row in rows if row["of_ceiling"] and row["ratio"]]  # ours, where it is right
  best = {stage: max((row for row in right if row["stage"] == stage), key=lambda row: row["of_ceiling"], default=None)
          for stage in STAGES}  # fmt: skip
  parts = [f"{stage} {row['ours_tflops']:.0f} TFLOP/s, {row['of_ceiling']:.0%} of a matrix product ({row['case']})"
           for stage, row in best.items() if row]  # fmt: skip
  forward = best["forward"]
  return claim.judged("; ".join(parts) or "not measured", forward is not None and forward["of_ceiling"] >= 0.75)


def of_ideal(masked: Measured, unmasked: Measured | None, tile: tuple[int, int]) -> float | None:
  """Time of a masked case by what its visible tiles would take at the unmasked case's time for each tile."""
  if not masked.case.is_masked or masked.seconds is None or unmasked is None or unmasked.seconds is None:
    return None
  each = unmasked.seconds / unmasked.case.tiles(*tile)
  return masked.seconds / (each * masked.case.tiles(*tile))


def matmul(size: int, repeats: int) -> Callable[[], list[float]]:
  """A sampler of a square bf16 matrix product of random numbers."""
  a, b = jax.random.normal(jax.random.key(1), (2, size, size), jnp.bfloat16)
  product = jax.jit(jnp.matmul).lower(a, b).compile()
  return sampler(product, a, b, repeats=repeats)


def cases_of(config: Config) -> list[Case]:
  """The cases to run.

  Raises:
    ValueError: an unknown peer, stage or figure, or no case of that name.
  """
  for kind, asked, known in (
    ("peer", config.peers, LABELS),
    ("stage", config.stages, STAGES),
    ("figure", (config.figure,), FIGURES),
  ):
    check_names(kind, asked, known)
  return select(config.problems, config.cases)


def record(measured: Measured) -> dict[str, Any]:
  """What metrics.jsonl and the result say of a measurement."""
  case, seconds = measured.case, measured.seconds
  details = ("batch", "seq_len", "num_heads", "num_kv_heads", "head_dim", "is_causal")
  flops = 0.0 if measured.peer == "matmul" else case.flops(measured.stage)  # the ceiling's are not the case's
  tflops = flops / seconds / 1e12 if seconds and flops else None
  return measured.record(LABELS, **{name: getattr(case, name) for name in details}, tflops=tflops)


def run(config: Config, workdir: Workdir) -> list[dict]:
  start, cases = time.monotonic(), cases_of(config)
  logging.set_verbosity(logging.ERROR)  # tokamax warns of every shape that it was not tuned for
  peers = {"ours": ours(config)} | {name: JAX_PEERS[name] for name in config.peers if name in JAX_PEERS}
  torch = TorchPeers(workdir.path / "torch.log") if torch_names(config) else None
  versions = torch.ask("versions") if torch else {}
  ceiling = matmul(config.matmul_size, config.repeats)
  measured, rows, explained, left, path = [], [], {}, [], None
  for case in cases:
    if time.monotonic() - start > config.seconds:
      left.append(case.name)
      continue
    inputs = make_inputs(case, config.dtype)
    explained[case.name] = explain(case, inputs, config)
    print(f"\n{case.name} ({time.monotonic() - start:.0f} s): ours {explained[case.name][0]}", flush=True)
    measured += (new := run_case(case, inputs, config, peers, torch, ceiling))
    rows = summary(measured, config)
    for each in new:
      workdir.log(**record(each))
      print(f"  {each.stage:17s} {LABELS.get(each.peer, each.peer):48s} {each}", flush=True)
    if config.result:
      path = write_result(
        "attention",
        rows,
        name=config.result,
        timings=[record(each) for each in measured],
        matmul_flops=2 * config.matmul_size**3,
        explained=explained,
        peer_versions=versions,
        claims=[judged(config.claim, rows)] if config.claim else [],
        config=dataclasses.asdict(config),
      )
  print_summary(rows)
  records = [record(each) for each in measured]
  if any(each["us"] is not None for each in records):
    picture = FIGURES[config.figure](records, matmul_flops=2 * config.matmul_size**3)
    workdir.save_figure(f"{config.figure}.png", picture)
  if left:
    print(f"\nNot run within {config.seconds:.0f} s: {'; '.join(left)}")
  if path:
    print(path)
  if torch:
    torch.close()
  return rows


def explain(case: Case, inputs: Inputs, config: Config) -> list[str]:
  """Which of our kernels serves a case, and why not the others."""
  arguments = call_arguments(case, inputs.segments, inputs.lengths, config.implementation)
  try:
    lines = pf.explain(pf.flash_attention, *inputs[:3], **arguments).splitlines()[1:]
  except ValueError as error:  # a named implementation does not support the case
    lines = [str(error)]
  return [line.strip() for line in lines]


def print_summary(rows: list[dict[str, Any]]) -> None:
  """One table for each stage, microseconds of every implementation."""
  for stage in dict.fromkeys(row["stage"] for row in rows):
    part = pd.DataFrame([row for row in rows if row["stage"] == stage])
    part = part.drop(columns=["stage", "best_peer_us", "ceiling_tflops"]).dropna(axis=1, how="all")
    print(f"\n{stage}, us (ratio: best peer's time by ours)\n")
    print(part.to_string(index=False, na_rep="-", float_format=lambda x: f"{x:.3g}" if x < 10 else f"{x:.1f}"))


if __name__ == "__main__":
  main(run)
