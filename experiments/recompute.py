"""The backward pass of attention that computes the weights again, against those that read the stored ones.

    python -m experiments.recompute --config=configs/recompute/h100.py

Forward and backward are programs of their own here: what passes between them is what each way keeps, so its bytes are
counted, not guessed. "ours" keeps the log-sum-exp and computes each tile of weights again; "stored" keeps all weights
in the inputs' dtype, the least that a backward pass without recomputation can read; "autodiff" is what XLA makes of
plain attention; "checkpoint" keeps the inputs and computes the whole weight matrix again. All are checked against
float32.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pandas as pd

from experiments.attention import Config as TimingConfig
from experiments.attention import ours
from experiments.attention_cases import Case, make_inputs, references, worst_error
from experiments.claims import Claim
from experiments.comparison import Measured, compile_all, one_line, sampler, time_rows
from experiments.peers.jax_attention import Peer, plain_xla
from paged_flash.analysis import human_bytes, show_groups
from paged_flash.experiment import Workdir, main, write_result

LABELS = dict(
  ours="ours: weights again, tile by tile",
  stored="weights stored",
  autodiff="plain XLA, its own gradient",
  checkpoint="plain XLA, all weights again",
)
PRODUCTS = dict(ours=5, stored=4, autodiff=4, checkpoint=5)  # matrix products of the backward pass


@dataclasses.dataclass(kw_only=True)
class Config:
  case: Case = Case(batch=1, seq_len=0, num_heads=16, num_kv_heads=16, head_dim=64, is_causal=False)  # of any length
  tokens: int = 16384  # as many sequences as that makes
  seq_lens: tuple[int, ...] = (512, 1024, 2048, 4096)
  dtype: str = "bfloat16"
  implementation: str = ""  # of ours, by name
  rounds: int = 3  # turns of each way
  repeats: int = 5  # calls in a turn
  compile_threads: int = 8
  claim: Claim | None = None
  result: str = ""  # name under experiments/results/recompute/<device>/ to write to; "" writes none


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def stored(case: Case, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Attention of [B, T, H, D] arrays that keeps its weights for the backward pass; as many KV heads as heads."""
  return _stored_forward(case, query, key, value)[0]


def _stored_forward(case: Case, query, key, value):
  scores = case.scale * jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)
  if case.is_causal:
    scores = jnp.where(jnp.tri(case.seq_len, dtype=bool), scores, -jnp.inf)
  weights = jax.nn.softmax(scores).astype(query.dtype)  # [B, H, T, S]
  out = jnp.einsum("bhts,bshd->bthd", weights, value)
  return out, (query, key, value, out, weights)


def _stored_backward(case: Case, kept, d_out):
  """Four products: dV = P^T dO, dP = dO V^T, dQ = dS K, dK = dS^T Q with dS = P (dP - rowsum(dO O))."""
  query, key, value, out, weights = kept
  d_value = jnp.einsum("bhts,bthd->bshd", weights, d_out)
  d_weights = jnp.einsum("bthd,bshd->bhts", d_out, value, preferred_element_type=jnp.float32)
  row = jnp.einsum("bthd,bthd->bht", d_out, out, preferred_element_type=jnp.float32)
  d_scores = (case.scale * weights * (d_weights - row[..., None])).astype(query.dtype)
  return jnp.einsum("bhts,bshd->bthd", d_scores, key), jnp.einsum("bhts,bthd->bshd", d_scores, query), d_value


stored.defvjp(_stored_forward, _stored_backward)


def ways(config: Config) -> dict[str, Peer]:
  def checkpointed(case: Case, query, key, value, segments, lengths):
    return jax.checkpoint(functools.partial(plain_xla, case, segments=segments, lengths=lengths))(query, key, value)

  attend = dict(
    ours=ours(TimingConfig(implementation=config.implementation)).attend,
    stored=lambda case, query, key, value, *_: stored(case, query, key, value),
    autodiff=plain_xla,
    checkpoint=checkpointed,
  )
  return {name: Peer(LABELS[name], function) for name, function in attend.items()}


def halves(peer: Peer, case: Case, inputs) -> tuple[Any, Any, Any]:
  """Compiled programs of the forward and of the backward pass, and what the former hands to the latter."""

  def forward(query, key, value):
    return jax.vjp(lambda *operands: peer.attend(case, *operands, None, None), query, key, value)

  first = jax.jit(forward).lower(*inputs[:3]).compile()
  _, kept = jax.eval_shape(forward, *inputs[:3])
  return first, jax.jit(lambda kept, d_out: kept(d_out)).lower(kept, inputs.cotangent).compile(), kept


def run_case(case: Case, config: Config) -> list[dict]:
  """One row for each way: seconds of the two passes, bytes of what is kept and of the backward pass's temporaries."""
  inputs, peers = make_inputs(case, config.dtype), ways(config)
  builders = {name: functools.partial(halves, peer, case, inputs) for name, peer in peers.items()}
  compiled = compile_all(builders, config.compile_threads)
  expected = references(case, inputs)
  measured = {stage: {name: Measured(case, stage, name) for name in peers} for stage in ("forward", "backward")}
  samplers: dict[str, dict[str, Any]] = {stage: {} for stage in measured}
  details: dict[str, dict[str, Any]] = {name: {} for name in peers}
  for name, (built, note) in compiled.items():
    row = measured["backward"][name]
    row.note = note
    if built is None:
      continue
    forward, backward, kept = built
    details[name]["kept_bytes"] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
    details[name]["temporary_bytes"] = backward.memory_analysis().temp_size_in_bytes
    try:
      out, pullback = forward(*inputs[:3])
      row.error = worst_error(expected, (out, *backward(pullback, inputs.cotangent)))
    except jax.errors.JaxRuntimeError as error:  # no room
      row.note = one_line(error)
      continue
    samplers["forward"][name] = sampler(forward, *inputs[:3], repeats=config.repeats)
    samplers["backward"][name] = sampler(backward, pullback, inputs.cotangent, repeats=config.repeats)
  for stage, rows in measured.items():
    time_rows(rows, samplers[stage], config.rounds)
  found = []
  for name in peers:
    back, front = measured["backward"][name], measured["forward"][name]
    details[name] |= dict(batch=case.batch, seq_len=case.seq_len, products=PRODUCTS[name])
    details[name] |= dict(forward_ms=front.seconds and 1e3 * front.seconds)
    details[name] |= dict(backward_ms=back.seconds and 1e3 * back.seconds)
    found.append(back.record(LABELS, **dict(kept_bytes=None, temporary_bytes=None) | details[name]))
  return found


def run(config: Config, workdir: Workdir) -> list[dict]:
  rows = []
  for length in config.seq_lens:
    case = dataclasses.replace(config.case, seq_len=length, batch=max(1, config.tokens // length))
    rows += (new := run_case(case, config))
    for row in new:
      workdir.log(**row)
  names = ("seq_len", "batch", "label", "products", "forward_ms", "backward_ms", "kept_bytes", "temporary_bytes")
  shown = pd.DataFrame(rows, columns=[*names, "error", "note"])
  for key in ("kept_bytes", "temporary_bytes"):
    shown[key] = [None if pd.isna(b) else human_bytes(int(b)) for b in shown[key]]
  print(shown.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
  workdir.save_figure("recompute.png", figure(rows))
  claims = [judged(config.claim, rows)] if config.claim else []
  if config.result:
    recorded = dataclasses.asdict(config)
    print(write_result("recompute", rows, name=config.result, claims=claims, config=recorded))
  return rows


def figure(rows: list[dict]):
  panels = {"backward_ms": "ms of the backward pass", "kept_bytes": "kept from forward to backward"}
  log = ("backward_ms", "kept_bytes")
  return show_groups(rows, groups="seq_len", bars="label", panels=panels, xlabel="tokens of a sequence", log=log)


def judged(claim: Claim, rows: list[dict]) -> dict:
  """Backward passes that read weights by ours, at every length: a ratio above 1 is time won by recomputing."""
  of = {(row["peer"], row["seq_len"]): row for row in rows if row["backward_ms"] and (row["error"] or 0) <= 1}
  lengths = [length for name, length in of if name == "ours" and ("stored", length) in of]
  if not lengths:
    return claim.judged("not measured", False)
  gains = [of["stored", n]["backward_ms"] / of["ours", n]["backward_ms"] for n in lengths]
  last, kept = lengths[-1], [of[name, lengths[-1]]["kept_bytes"] for name in ("ours", "stored")]
  ours = f"5 products for 4, yet {', '.join(f'{g:.1f} x at {n}' for g, n in zip(gains, lengths, strict=True))}; "
  ours += f"{human_bytes(kept[0])} kept against {human_bytes(kept[1])} at {last}"
  return claim.judged(ours, True if min(gains) > 1 else None if max(gains) > 1 else False)


if __name__ == "__main__":
  main(run)
