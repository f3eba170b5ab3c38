"""Bytes that a forward pass of attention moves: counted from the kernel's schedule, and read from hardware counters.

    python -m experiments.attention_traffic --config=configs/attention_traffic/h200.py

Counting needs no GPU. Measuring needs a Hopper GPU that nobody else uses, and Nsight Compute: `ncu` on the PATH and the
permission to read counters; without them the rows say "not measured". Every call is profiled once, all its kernels, on
caches that ncu empties before each kernel and each of its passes: cold, as in the count. A counter stops with its
kernel, so that up to `still_in_l2` of the bytes written may be missing from what is measured.

Plain XLA, whose count is the least that its three passes over the scores can move, stands beside ours where its scores
fit the device.
"""

import csv
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pandas as pd

from experiments.attention_cases import Case, make_inputs
from experiments.claims import Claim
from paged_flash import tuning
from paged_flash.analysis import flash_traffic, human_bytes, naive_traffic, show_attention_traffic
from paged_flash.analysis.traffic import L2_BYTES
from paged_flash.experiment import Workdir, main, write_result
from paged_flash.kernels.arguments import flash_problem
from paged_flash.kernels.problem import FlashProblem, is_hopper

ROOT = pathlib.Path(__file__).resolve().parents[1]
LABELS = {"ours": "ours", "naive": "plain XLA"}
METRICS = {
  "hbm_read": "dram__bytes_read.sum",
  "hbm_write": "dram__bytes_write.sum",
  "l2_read": "lts__t_sectors_srcunit_tex_op_read.sum",  # of the multiprocessors, one for all blocks of a cluster
  "l2_write": "lts__t_sectors_srcunit_tex_op_write.sum",
  "l2_read_all": "lts__t_sectors_op_read.sum",  # and of the other half of the L2 cache
  "l2_write_all": "lts__t_sectors_op_write.sum",
  "sm_read": "l1tex__m_xbar2l1tex_read_bytes.sum",  # arriving at multiprocessors, once for each block of a cluster
}
SECTOR = 32  # bytes
CLOSE = 0.1  # relative difference of measured from counted bytes that counts as agreement
FAR = 4  # times as many bytes: what plain attention moves must be more than that


@dataclasses.dataclass(kw_only=True)
class Config:
  problems: tuple[Case, ...] = ()
  peers: tuple[str, ...] = ("ours", "naive")
  dtype: str = "bfloat16"
  implementation: str = ""  # of ours, by name, where it is measured; what is counted is "sm90"
  device: str = "nvidia_h200"  # whose tiles are counted where there is no Hopper GPU
  l2_bytes: int = L2_BYTES  # of the L2 cache, in the count
  compile_threads: int = 8
  seconds: float = 240.0  # for all of the measurement; what takes longer is not measured
  claim: Claim | None = None
  result: str = ""  # name under experiments/results/attention_traffic/<device>/ to write to; "" writes none


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One profiled kernel: what tells it from others, and the bytes of each of METRICS that was read."""

  identity: tuple[str, str, str]  # name, grid, block
  moved: dict[str, float]


def problem_of(case: Case, config: Config) -> FlashProblem:
  """The problem of a case.

  Raises:
    ValueError: if the case's mask is known only when it runs.
  """
  if case.segments or case.lengths:
    raise ValueError(f"problems must have no segments and no lengths, got {case.name}")
  found: list[FlashProblem] = []

  def trace(query, key, value, *_):
    window = (case.window - 1, 0) if case.window else None
    found.append(flash_problem(query, key, value, is_causal=case.is_causal, local_window_size=window)[0])

  jax.eval_shape(trace, *jax.eval_shape(lambda: make_inputs(case, config.dtype)))
  problem = found[0]
  return problem if is_hopper(problem.device) else dataclasses.replace(problem, device=config.device)


def count(case: Case, peer: str, config: Config) -> dict[str, Any]:
  """The row of a case and peer, without what is measured."""
  problem = problem_of(case, config)
  tiles = tuning.tiles(problem, "sm90")
  traffic = flash_traffic(problem, tiles, l2_bytes=config.l2_bytes)
  row: dict[str, Any] = dict(case=case.name, peer=peer, label=LABELS[peer], compulsory_bytes=traffic.compulsory.total)
  hbm = traffic.hbm if peer == "ours" else naive_traffic(problem)
  row |= dict(counted_hbm_bytes=hbm.total, counted_hbm_read_bytes=hbm.read, counted_hbm_write_bytes=hbm.written)
  mine = traffic if peer == "ours" else None
  row["still_in_l2_bytes"] = mine and mine.still_in_l2
  row["counted_l2_bytes"] = mine and mine.l2.total
  row["counted_l2_read_bytes"] = mine and mine.l2.read
  row["counted_smem_bytes"] = mine and mine.smem
  return row | dict(tiles=tiles if mine else None)


def with_measured(row: dict[str, Any], kernels: list[Kernel] | None, note: str) -> dict[str, Any]:
  """The row with the sums over a call's kernels, and how they compare to what was counted; None where not measured."""
  sums: dict[str, float | None] = dict.fromkeys(METRICS)
  for key in METRICS:
    if kernels and all(key in kernel.moved for kernel in kernels):
      sums[key] = sum(kernel.moved[key] for kernel in kernels)
  read, write = sums["hbm_read"], sums["hbm_write"]
  hbm = None if read is None or write is None else read + write
  row = row | dict(measured_hbm_bytes=hbm) | {f"measured_{key}_bytes": value for key, value in sums.items()}
  row["hbm_ratio"] = hbm and hbm / row["counted_hbm_bytes"]
  row["hbm_read_ratio"] = read and read / row["counted_hbm_read_bytes"]
  asked = sums["l2_read"]
  row["l2_read_ratio"] = asked / row["counted_l2_read_bytes"] if asked and row["counted_l2_read_bytes"] else None
  names = [kernel.identity[0] for kernel in kernels or ()]
  return row | dict(kernels=names, note=note if hbm is None else "")


def why_not(config: Config) -> str:
  """ "" or why nothing can be measured here."""
  if shutil.which("ncu") is None:
    return "not measured: ncu is not on the PATH"
  if jax.default_backend() != "gpu":
    return "not measured: there is no GPU"
  return "" if config.seconds > 0 else "not measured: config.seconds is 0"


def measure(config: Config, workdir: Workdir) -> tuple[dict[tuple[str, str], list[Kernel]], dict[tuple[str, str], str]]:
  """The kernels of each (case, peer) that ran under ncu, and why the others did not."""
  wanted = [(case.name, peer) for case in config.problems for peer in config.peers]
  answer, table = workdir.path / "calls.json", workdir.path / "ncu.csv"
  job = dict(cases=[dataclasses.asdict(case) for case in config.problems], peers=config.peers, dtype=config.dtype)
  job |= dict(implementation=config.implementation, threads=config.compile_threads, answer=str(answer.resolve()))
  # Kernels one by one, not as a graph; and none is tried out beside others, which under ncu takes minutes.
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0"
  environment = os.environ | dict(XLA_PYTHON_CLIENT_PREALLOCATE="false", XLA_FLAGS=flags.strip())
  for old in (answer, table):
    old.unlink(missing_ok=True)
  command = ["timeout", "--kill-after=5", str(config.seconds)]  # ends ncu and what ncu started
  command += ["ncu", "--clock-control", "none", "--cache-control", "all", "--profile-from-start", "off"]
  command += ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(table.resolve())]
  try:
    command += ["--metrics", ",".join(METRICS[key] for key in known_metrics())]
    command += [sys.executable, "-m", "experiments.peers.attention_once", json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace")
    workdir.write_text("ncu.log", done.stdout + done.stderr)
    if done.returncode == 124:
      raise ValueError(f"it took longer than {config.seconds:.0f} s")
    if not answer.exists():
      said = (done.stdout + done.stderr).strip().splitlines()
      raise ValueError(said[-1] if said else f"ncu ended with exit code {done.returncode}")
    calls = json.loads(answer.read_text())
    groups = by_call(parse(table.read_text()), sum(not call["error"] for call in calls))
  except (OSError, ValueError, subprocess.TimeoutExpired) as error:
    lines = table.read_text().splitlines() if table.exists() else []
    reason = next((line for line in lines if "==ERROR==" in line), str(error)[:200])
    return {}, dict.fromkeys(wanted, f"not measured: {reason}")
  found, notes = {}, {}
  for call in calls:
    key = call["case"], call["peer"]
    if call["error"]:
      notes[key] = f"not measured: {call['error']}"
    else:
      found[key] = groups.pop(0)
  return found, notes


def known_metrics() -> list[str]:
  """Those of METRICS that this ncu and GPU have; the first two always."""
  listed = subprocess.run(["ncu", "--query-metrics"], capture_output=True, text=True, timeout=60).stdout
  names = {line.split()[0] for line in listed.splitlines() if line.strip()}
  return [key for key, metric in METRICS.items() if key.startswith("hbm") or metric.rpartition(".")[0] in names]


def parse(text: str) -> list[Kernel]:
  """The kernels of what `ncu --csv --page raw` printed, in their order.

  Raises:
    ValueError: if there is no table, or it has a unit that is not known.
  """
  lines = text.splitlines()
  header = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
  if header is None:
    raise ValueError("ncu printed no table")
  rows = list(csv.DictReader(line for line in lines[header:] if line.startswith('"')))
  units = rows.pop(0) if rows and not rows[0]["ID"] else {}
  kernels = []
  for row in rows:
    moved = {}
    for key, metric in METRICS.items():
      number = (row.get(metric) or "").replace(",", "")
      if number and number[0].isdigit():  # else "n/a", "nan"
        moved[key] = float(number) * unit_bytes(units.get(metric) or ("sector" if "sectors" in metric else "byte"))
    kernels.append(Kernel((row["Kernel Name"], row.get("Grid Size", ""), row.get("Block Size", "")), moved))
  return kernels


def unit_bytes(unit: str) -> float:
  """Bytes of a unit of ncu's, whose prefixes are powers of ten.

  Raises:
    ValueError: if it is none of bytes or sectors.

  Example:
    >>> unit_bytes("Mbyte"), unit_bytes("sector")
    (1000000.0, 32.0)
  """
  for name, size in (("byte", 1.0), ("sector", float(SECTOR))):
    prefix = unit.removesuffix("s").removesuffix(name)
    if prefix in (powers := {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}):
      return powers[prefix] * size
  raise ValueError(f"unit must be bytes or sectors, got {unit!r}")


def by_call(kernels: list[Kernel], calls: int) -> list[list[Kernel]]:
  """The kernels of each call: every call comes after one marker, the first kernel of all being one.

  Raises:
    ValueError: if there are not as many markers as calls, or a call without a kernel.
  """
  groups: list[list[Kernel]] = []
  for kernel in kernels:
    if kernel.identity == kernels[0].identity:
      groups.append([])
    else:
      groups[-1].append(kernel)
  if len(groups) != calls or not all(groups):
    raise ValueError(f"ncu's kernels must be those of {calls} calls, got {[len(group) for group in groups]}")
  return groups


def run(config: Config, workdir: Workdir) -> list[dict]:
  for peer in config.peers:
    if peer not in LABELS:
      raise ValueError(f"config.peers must be of {', '.join(LABELS)}, got {peer!r}")
  rows = [count(case, peer, config) for case in config.problems for peer in config.peers]
  note = why_not(config)
  found, notes = ({}, {}) if note else measure(config, workdir)
  rows = [with_measured(row, found.get(key := (row["case"], row["peer"])), notes.get(key, note)) for row in rows]
  for row in rows:
    workdir.log(**row)
  print_table(rows)
  workdir.save_figure("traffic.png", show_attention_traffic(rows))
  if config.result:
    claims = [judged(config.claim, rows)] if config.claim else []
    print(write_result("attention_traffic", rows, name=config.result, claims=claims, config=dataclasses.asdict(config)))
  return rows


def judged(claim: Claim, rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Counters against counted bytes of ours, in how many cases they agree; and how much more plain attention moves."""
  measured = {(row["case"], row["peer"]): row for row in rows if row["measured_hbm_bytes"]}
  ours = {case: row for (case, peer), row in measured.items() if peer == "ours"}
  plain = {case: row for (case, peer), row in measured.items() if peer == "naive" and case in ours}
  if not ours:
    return claim.judged("not measured", None)
  ratios = sorted(row["hbm_ratio"] for row in ours.values())
  close = sum(abs(ratio - 1) <= CLOSE for ratio in ratios)
  text = f"counters within {CLOSE:.0%} of the counted HBM bytes in {close} of {len(ratios)} cases"
  text += f" ({ratios[0]:.2f} to {ratios[-1]:.2f})"
  more = sorted(row["measured_hbm_bytes"] / ours[case]["measured_hbm_bytes"] for case, row in plain.items())
  if more:
    text += f"; plain attention moves {more[0]:.0f} to {more[-1]:.0f} times as much"
  if not more or more[0] <= FAR:
    return claim.judged(text, False)
  return claim.judged(text, True if close == len(ratios) else None)


def print_table(rows: list[dict[str, Any]]) -> None:
  columns = ("compulsory_bytes", "counted_hbm_bytes", "measured_hbm_bytes", "hbm_ratio", "hbm_read_ratio")
  columns += ("counted_l2_read_bytes", "measured_l2_read_bytes", "l2_read_ratio", "note")
  table = pd.DataFrame([{key: row[key] for key in ("case", "label", *columns)} for row in rows])
  for name in table:
    if str(name).endswith("_bytes"):
      table[name] = ["-" if value is None or np.isnan(value) else human_bytes(value) for value in table[name]]
  table = table.rename(columns=lambda name: name.removesuffix("_bytes")).dropna(axis=1, how="all")
  print("\n" + table.to_string(index=False, na_rep="-", float_format="{:.3f}".format))


if __name__ == "__main__":
  main(run)
