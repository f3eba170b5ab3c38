"""Memory of attention over the sequence length, with and without the score matrix.

    python -m experiments.attention_memory --config=configs/attention_memory/h200.py

Two measurements. The temporaries of the compiled programs, read from the compiler: what a call needs beside its inputs
and outputs. And the longest sequence that trains, forward and backward, on this device: lengths grow by powers of two
until a program no longer compiles or runs in the device's memory, then the last step is halved a few times.

Let JAX take most of the GPU, XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, and do not let XLA try matrix products whose results
do not fit, XLA_FLAGS=--xla_gpu_autotune_level=0.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.attention import Config as TimingConfig
from experiments.attention import ours
from experiments.attention_cases import STAGES, Case, make_inputs
from experiments.claims import Claim
from experiments.comparison import one_line
from experiments.peers.jax_attention import Peer, plain_xla
from paged_flash.analysis import human_bytes
from paged_flash.experiment import Workdir, main, write_result


@dataclasses.dataclass(kw_only=True)
class Config:
  case: Case = Case(batch=1, seq_len=0, num_heads=16, num_kv_heads=16, head_dim=128, is_causal=True)  # of any length
  seq_lens: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)  # whose temporaries are read
  start: int = 8192  # length at which the search for the longest begins
  longest: int = 524_288  # length at which it ends; 0 does not search
  halvings: int = 2  # of the last step of the search
  dtype: str = "bfloat16"
  implementation: str = ""  # of ours, by name
  claim: Claim | None = None
  result: str = ""  # name under experiments/results/attention_memory/<device>/ to write to; "" writes none


def compiled(peer: Peer, case: Case, stage: str, dtype: str) -> Any:
  """The program of a case, from shapes alone: its inputs need not fit."""
  shapes = jax.eval_shape(functools.partial(make_inputs, case, dtype))
  return jax.jit(peer.program(case, stage)).lower(*shapes).compile()


def refused(error: Exception) -> bool:
  """Whether the device's memory was too small."""
  return any(text in str(error) for text in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory"))


def temporaries(peer: Peer, case: Case, stage: str, dtype: str) -> int | None:
  """Bytes of the temporaries of a case; None, and why is printed, where it cannot be compiled on this device."""
  try:
    return compiled(peer, case, stage, dtype).memory_analysis().temp_size_in_bytes
  except jax.errors.JaxRuntimeError as error:
    print(f"{peer.label}: {one_line(error)}")
    return None


def trains(peer: Peer, case: Case, dtype: str) -> float | None:
  """Seconds of one forward and backward pass, run; None where the memory does not suffice."""
  try:
    program = compiled(peer, case, "forward+backward", dtype)
    needs = program.memory_analysis()
    stats = jax.devices()[0].memory_stats() or {}
    total = needs.temp_size_in_bytes + needs.argument_size_in_bytes + needs.output_size_in_bytes
    if total > stats.get("bytes_limit", float("inf")):
      return None
    inputs = jax.block_until_ready(make_inputs(case, dtype))
    start = time.perf_counter()
    jax.block_until_ready(program(*inputs))
    return time.perf_counter() - start
  except jax.errors.JaxRuntimeError as error:
    if not refused(error):
      raise
    return None


def search(fits: Callable[[int], bool], start: int, longest: int, halvings: int) -> tuple[int, bool]:
  """The largest length that fits: powers of two from `start`, then `halvings` of the last step.

  Returns:
    (length, whether a longer one was seen not to fit); (0, True) if not even `start` fits.

  Example:
    >>> search(lambda n: n <= 27_000, 8192, 65_536, 2)
    (24576, True)
    >>> search(lambda n: True, 8192, 65_536, 2)
    (65536, False)
  """
  good, bad = 0, 0
  length = start
  while length <= longest and not bad:
    good, bad = (length, 0) if fits(length) else (good, length)
    length *= 2
  for _ in range(halvings if good and bad else 0):
    middle = (good + bad) // 2
    good, bad = (middle, bad) if fits(middle) else (good, middle)
  return good, bool(bad)


def run(config: Config, workdir: Workdir) -> list[dict]:
  peers = {"ours": ours(TimingConfig(implementation=config.implementation)), "plain XLA": Peer("plain XLA", plain_xla)}
  rows = []
  for length in config.seq_lens:
    case = dataclasses.replace(config.case, seq_len=length)
    for stage in STAGES:
      row: dict[str, Any] = dict(seq_len=length, stage=stage)
      inputs = (2 * case.num_heads + 2 * case.num_kv_heads) * case.batch * length * case.head_dim
      row["input_bytes"] = inputs * jax.numpy.dtype(config.dtype).itemsize
      for name, peer in peers.items():
        row[f"{name.split()[0]}_temporary_bytes"] = temporaries(peer, case, stage, config.dtype)
      rows.append(row)
      workdir.log(**row)
      text = {key: "does not compile" if b is None else human_bytes(b) for key, b in row.items() if "temporary" in key}
      print(f"{case.name}, {stage}: {text}", flush=True)
  if config.result:
    claims = [judged(config.claim, rows)] if config.claim else []
    print(write_result("attention_memory", rows, name=config.result, claims=claims, config=dataclasses.asdict(config)))
  longest = []
  if config.longest:
    for name, peer in peers.items():
      seconds: dict[int, float | None] = {}

      def fits(length: int, peer=peer, name=name, seconds=seconds) -> bool:
        seconds[length] = trains(peer, dataclasses.replace(config.case, seq_len=length), config.dtype)
        took = seconds[length]
        print(f"{name}: {length} tokens {'do not fit' if took is None else f'train, {took:.2f} s'}", flush=True)
        return took is not None

      length, is_limit = search(fits, config.start, config.longest, config.halvings)
      longest.append(dict(implementation=name, longest_seq_len=length, is_limit=is_limit, seconds=seconds.get(length)))
      workdir.log(**longest[-1])
    mine, plain = (row["longest_seq_len"] for row in longest)
    if plain:
      print(f"ours trains {'at least ' * (not longest[0]['is_limit'])}{mine / plain:.1f} x as long a sequence")
      for row in longest:
        row["times_plain"] = row["longest_seq_len"] / plain
  if config.result and longest:
    print(write_result("attention_memory", longest, name=f"{config.result}_longest"))
  return rows


def judged(claim: Claim, rows: list[dict]) -> dict:
  """Memory of forward and backward, inputs and outputs included: linear with ours, and how much less it is."""
  rows = [row for row in rows if row["stage"] == STAGES[-1]]
  total, grows = {}, {}
  for who in ("ours", "plain"):
    bytes_of = {row["seq_len"]: row[f"{who}_temporary_bytes"] for row in rows}
    total[who] = {row["seq_len"]: 2 * row["input_bytes"] + size for row in rows
                  if (size := bytes_of[row["seq_len"]]) is not None}  # fmt: skip
    if len(total[who]) > 1:
      grows[who] = float(np.polyfit(np.log([*total[who]]), np.log([*total[who].values()]), 1)[0])
  gains = {n: size / total["ours"][n] for n, size in total["plain"].items() if n in total["ours"]}
  ours = [f"{gain:.0f} x less at {n}" for n, gain in gains.items() if n in (2048, 4096)]
  ours += [f"grows as N^{power:.2f} ({who})" for who, power in grows.items()]
  linear = grows.get("ours", 2) < 1.1
  holds = True if linear and gains.get(4096, 0) >= 20 else None if linear else False
  return claim.judged(", ".join(ours) or "not measured", holds)


if __name__ == "__main__":
  main(run)
