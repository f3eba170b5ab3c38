"""A training step of a GPT-2 shaped model, with flash attention and with the score matrix: wall-clock time and memory.

    python -m experiments.training --config=configs/training/gpt2.py

A step is forward, backward and AdamW: weights and moments in float32, products in bf16. Each implementation takes its
first step from the same state, where its loss and gradient norm are compared with those of a step all in float32, with
tiled XLA attention; then they are timed in turns. "without" has no attention at all, query + key + value in its place:
no attention, however fast, makes a step shorter than that, and nothing checks it.
What does not fit into memory says so in its row and stops nothing.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from experiments.attention import Config as TimingConfig
from experiments.attention import ours
from experiments.attention_cases import Case
from experiments.claims import Claim
from experiments.comparison import Measured, check_names, compile_all, one_line, time_rows
from experiments.peers.jax_attention import PEERS, Peer
from paged_flash import models
from paged_flash.analysis import human_bytes, show_groups
from paged_flash.experiment import Workdir, main, write_result

ALLOWED = 0.02  # relative difference of loss and gradient norm from those in float32
WITHOUT = Peer("no attention at all", lambda case, query, key, value, *_: query + key + value)
LABELS = {"ours": "ours"} | {name: peer.label for name, peer in PEERS.items()} | {"without": WITHOUT.label}


@dataclasses.dataclass(kw_only=True)
class Config:
  model: models.ModelConfig
  tokens: int = 8192  # of a step: as many sequences as that makes
  seq_lens: tuple[int, ...] = (1024, 2048, 4096)
  peers: tuple[str, ...] = ("naive", "without")
  dtype: str = "bfloat16"  # of the products
  implementation: str = ""  # of ours, by name
  rounds: int = 3  # turns of each implementation
  repeats: int = 5  # steps in a turn
  compile_threads: int = 8
  claim: Claim | None = None
  result: str = ""  # name under experiments/results/training/<device>/ to write to; "" writes none


def train_step(
  model: models.Model, optimiser: optax.GradientTransformation, peer: Peer, case: Case, dtype: str, state, tokens
) -> tuple[Any, tuple[jax.Array, jax.Array]]:
  """One step on tokens i32[B, T + 1]: ((params, opt_state), (mean loss, gradient norm)). `state` is donated."""
  params, opt_state = state
  positions = jnp.broadcast_to(jnp.arange(case.seq_len), (case.batch, case.seq_len))

  def attend(q, k, v, kv, layer):
    return peer.attend(case, q, k, v, None, None), kv

  def loss(params):
    decoder = model.bind(jax.tree.map(lambda x: x.astype(dtype), params))
    hidden, _ = decoder(tokens[:, :-1], positions, None, attend)
    return optax.softmax_cross_entropy_with_integer_labels(decoder.logits(hidden), tokens[:, 1:]).mean()

  value, gradients = jax.value_and_grad(loss)(params)
  updates, opt_state = optimiser.update(gradients, opt_state, params)
  return (optax.apply_updates(params, updates), opt_state), (value, optax.tree.norm(gradients))


@dataclasses.dataclass(frozen=True)
class Trainer:
  """What all programs share."""

  model: models.Model
  optimiser: optax.GradientTransformation
  config: Config

  def init(self) -> Any:
    params = jax.tree.map(jnp.copy, self.model.params)
    return params, self.optimiser.init(params)

  def tokens(self, case: Case) -> jax.Array:
    shape = (case.batch, case.seq_len + 1)
    return jax.random.randint(jax.random.key(1), shape, 0, self.model.config.vocab_size)

  def build(self, case: Case, peer: Peer, dtype: str = "") -> Callable:
    step = functools.partial(train_step, self.model, self.optimiser, peer, case, dtype or self.config.dtype)
    return jax.jit(step, donate_argnums=0).lower(jax.eval_shape(self.init), self.tokens(case)).compile()

  def first(self, case: Case, program: Callable) -> list[float]:
    """Loss and gradient norm of the first step."""
    return [float(x) for x in program(self.init(), self.tokens(case))[1]]

  def seconds(self, programs: dict[str, Callable], case: Case) -> dict[str, Callable[[], list[float]]]:
    """A sampler of each program; they go on training one state, in turns."""
    state, tokens = self.init(), self.tokens(case)

    def sample(program: Callable) -> list[float]:
      nonlocal state
      seconds = []
      for _ in range(self.config.repeats):
        start = time.perf_counter()
        state, said = program(state, tokens)
        jax.block_until_ready(said)
        seconds.append(time.perf_counter() - start)
      return seconds

    return {name: functools.partial(sample, program) for name, program in programs.items()}


def run_case(
  case: Case, trainer: Trainer, right: list[float], compiled: dict[str, tuple[Callable | None, str]]
) -> list[dict[str, Any]]:
  """Checks and times all implementations on sequences of one length; `right` is what the first step should say."""
  rows = {name: Measured(case, "step", name, note=note) for name, (_, note) in compiled.items()}
  programs, buffers = {}, {}
  for name, (program, _) in compiled.items():
    if program is None:
      continue
    buffers[name] = program.memory_analysis().temp_size_in_bytes
    try:
      first = trainer.first(case, program)
      programs[name] = program
    except jax.errors.JaxRuntimeError as error:  # no room
      rows[name].note = one_line(error)
      continue
    if name != "without":
      off = np.max(np.abs(np.divide(first, right) - 1)) / ALLOWED
      rows[name].error = float(np.nan_to_num(off, nan=np.inf))
  time_rows(rows, trainer.seconds(programs, case), trainer.config.rounds)
  return [record(each, buffers) for each in rows.values()]


def record(measured: Measured, buffers: dict[str, int]) -> dict[str, Any]:
  case, seconds = measured.case, measured.seconds
  details = dict(batch=case.batch, seq_len=case.seq_len, temporary_bytes=buffers.get(measured.peer))
  details["ms"] = 1e3 * seconds if seconds else None
  details["tokens_per_second"] = case.batch * case.seq_len / seconds if seconds else None
  return measured.record(LABELS, **details)


def run(config: Config, workdir: Workdir) -> list[dict]:
  check_names("peer", config.peers, LABELS)
  c = config.model
  trainer = Trainer(models.load(c, dtype="float32"), optax.adamw(1e-4), config)
  every = {"ours": ours(TimingConfig(implementation=config.implementation)), "without": WITHOUT} | PEERS
  peers = {name: every[name] for name in ("ours", *config.peers)}
  size = sum(x.size for x in jax.tree.leaves(trainer.model.params))
  print(f"{size / 1e6:.0f}M parameters, {config.tokens} tokens a step")
  heads: dict[str, Any] = dict(num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim)
  cases = [Case(batch=config.tokens // n, seq_len=n, is_causal=True, **heads) for n in config.seq_lens]
  oracle = ours(TimingConfig(implementation="xla"))
  builders = {(n, name): functools.partial(trainer.build, n, peer) for n in cases for name, peer in peers.items()}
  builders |= {(n, "oracle"): functools.partial(trainer.build, n, oracle, "float32") for n in cases}
  compiled = compile_all(builders, config.compile_threads)
  rows = []
  for case in cases:
    program, note = compiled.pop((case, "oracle"))
    if program is None:
      raise RuntimeError(f"nothing to compare with at {case.seq_len} tokens: {note}")
    right = trainer.first(case, program)
    new = run_case(case, trainer, right, {name: compiled.pop((case, name)) for name in peers})
    base = next(row["ms"] for row in new if row["peer"] == "ours")
    for row in new:
      row["by_ours"] = row["ms"] / base if row["ms"] and base else None
      workdir.log(**row)
    rows += new
  names = ["seq_len", "batch", "label", "ms", "by_ours", "error", "temporary_bytes", "note"]
  shown = pd.DataFrame(rows, columns=names)
  shown["temporary_bytes"] = [None if pd.isna(b) else human_bytes(int(b)) for b in shown["temporary_bytes"]]
  print(shown.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
  workdir.save_figure("training.png", figure(rows))
  claims = [judged(config.claim, rows)] if config.claim else []
  if config.result:
    recorded = dataclasses.asdict(config)
    print(write_result("training", rows, name=config.result, claims=claims, config=recorded))
  return rows


def figure(rows: list[dict]):
  panels = {"ms": "ms of a training step", "temporary_bytes": "temporary memory of the step"}
  return show_groups(rows, groups="seq_len", bars="label", panels=panels, xlabel="tokens of a sequence")


def judged(claim: Claim, rows: list[dict]) -> dict:
  """Steps with the score matrix by steps with ours; 1.7 x is the paper's smallest gain, over Megatron-LM at 1k."""
  of = {(row["peer"], row["seq_len"]): row for row in rows}
  gains, bounds, parts = [], [], []
  for length in dict.fromkeys(row["seq_len"] for row in rows):
    ours, naive, without = (of.get((name, length), {}) for name in ("ours", "naive", "without"))
    right = all(row["error"] <= 1 for row in (ours, naive) if row.get("ms"))
    if ours.get("ms") and naive.get("ms") and right:
      gains.append(naive["by_ours"])
      parts.append(f"{gains[-1]:.2f} x at {length}")
      bounds += [f"{naive['ms'] / without['ms']:.2f} x"] if without.get("ms") else []
    elif ours.get("ms"):
      parts.append(f"only ours fits at {length}" if right else f"wrong at {length}")
  text = ", ".join(parts) + (f"; without any attention it would be {', '.join(bounds)}" if bounds else "")
  if not gains:
    return claim.judged(text or "not measured", False)
  return claim.judged(text, True if min(gains) >= 1.7 else None if max(gains) >= 1.7 else False)


if __name__ == "__main__":
  main(run)
