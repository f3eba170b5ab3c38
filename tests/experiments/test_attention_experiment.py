"""The attention experiments: what a mask lets see, who counts as right, how failures and ratios are reported."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_flash as pf
from experiments import attention, attention_memory
from experiments.attention_cases import STAGES, Case, make_inputs, references, worst_error
from experiments.peers.jax_attention import Peer, naive
from paged_flash.experiment import Workdir

SMALL = Case(batch=3, seq_len=40, num_heads=4, num_kv_heads=2, head_dim=8, is_causal=True)
MASKS = (
  {},
  dict(is_causal=False),
  dict(segments=3),
  dict(segments=3, is_causal=False),
  dict(window=7),
  dict(lengths="zipf"),
  dict(lengths="uniform", window=5),
)


def mask(case: Case) -> np.ndarray:
  """bool[B, T, T], pair by pair."""
  ids, seen = case.segment_ids(), np.zeros((case.batch, case.seq_len, case.seq_len), bool)
  for b, length in enumerate(case.row_lengths()):
    for i in range(length):
      for j in range(length):
        near = not case.window or i - j < case.window
        seen[b, i, j] = ids[i] == ids[j] and near and (j <= i or not case.is_causal)
  return seen


@pytest.mark.parametrize("fields", MASKS, ids=str)
def test_intervals_tiles_and_flops_count_the_visible_pairs(fields):
  case = dataclasses.replace(SMALL, **fields)
  seen = mask(case)
  low, high = (x[..., None] for x in case.intervals())
  j = np.arange(case.seq_len)
  assert (((low <= j) & (j < high)) == seen).all()
  padded = np.pad(seen, ((0, 0), (0, 8), (0, 8))).reshape(3, 3, 16, 6, 8)  # 16 queries by 8 keys
  assert case.tiles(16, 8) == padded.any((2, 4)).sum()
  if case.is_masked:
    assert case.flops("forward") == 4 * 4 * 8 * seen.sum()
  else:
    assert case.flops("forward+backward") == 3.5 * 4 * 3 * 4 * 8 * 40 * 40 / (2 if case.is_causal else 1)


@pytest.mark.parametrize("fields", [MASKS[0], MASKS[3], MASKS[6]], ids=str)
def test_right_results_pass_and_wrong_ones_do_not(fields):
  case = dataclasses.replace(SMALL, **fields)
  inputs = make_inputs(case, "float32")
  expected = references(case, inputs)
  assert [(r.row, r.kv_head) for r in expected] == [(0, 0), (2, 1)]
  arguments = attention.call_arguments(case, inputs.segments, inputs.lengths, "reference")
  peer = Peer("reference", lambda case, q, k, v, *_: pf.flash_attention(q, k, v, **arguments))
  results = jax.jit(peer.program(case, "forward+backward"))(*inputs)
  assert worst_error(expected, results) < 1
  for index in range(4):

    def error(changed, index=index):
      return worst_error(expected, (*results[:index], changed, *results[index + 1 :]))

    assert error(1.01 * results[index]) > 1
    assert error(results[index][:, :, ::-1]) > 1  # the heads mixed up
    broken = np.array(results[index])
    broken[0, 0, 0, 0] = np.nan
    assert error(jnp.asarray(broken)) == float("inf")


def test_bf16_may_err_as_plain_bf16_attention_does():
  inputs = make_inputs(SMALL, "bfloat16")
  expected = references(SMALL, inputs)
  out = jax.jit(lambda *x: pf.flash_attention(*x, is_causal=True, implementation="reference"))(*inputs[:3])
  assert out.dtype == jnp.bfloat16 and 0.01 < worst_error(expected, (out,)) < 1 < worst_error(expected, (out + 0.1,))


def test_a_peer_that_wants_scaled_float16_queries_gets_them_and_its_gradient_is_scaled_back():
  def unscaled(case, query, key, value, segments, lengths):
    return pf.flash_attention(query, key, value, scale=1.0, is_causal=True, implementation="reference")

  peer, inputs = Peer("half", unscaled, is_half_scaled=True), make_inputs(SMALL, "bfloat16")
  operands = peer.inputs(SMALL, inputs)
  assert operands.query.dtype == jnp.float16
  results = jax.jit(peer.program(SMALL, "forward+backward"))(*operands)
  expected = references(SMALL, inputs)
  assert worst_error(expected, peer.results(SMALL, results)) < 1 < worst_error(expected, results)


def test_one_run_reports_the_missing_the_wrong_and_the_implied(monkeypatch, tmp_path: pathlib.Path):
  def missing(*args):
    raise NotImplementedError("it cannot do this\nsecond line")

  def wrong(*args):
    return 1.5 * naive(*args)

  peers = dict(naive=Peer("plain XLA", naive), cudnn=Peer("cuDNN", naive), fa3=Peer("FA3", missing))
  monkeypatch.setattr(attention, "JAX_PEERS", peers | dict(tokamax=Peer("tokamax", wrong)))
  monkeypatch.chdir(tmp_path)
  config = attention.Config(
    problems=(dataclasses.replace(SMALL, fa4_of_cudnn=(0.5, 2.0)),),
    peers=(*peers, "tokamax", "fa4"),
    dtype="float32",
    rounds=2,
    repeats=1,
    matmul_size=32,
    compile_threads=2,
    result="test",
  )
  rows = attention.run(config, Workdir.create(tmp_path, config))
  result = json.loads((tmp_path / "experiments/results/attention/cpu/test.json").read_text())
  assert result["rows"] == rows and [row["stage"] for row in rows] == list(STAGES)
  records = {(r["stage"], r["peer"]): r for r in result["timings"]}
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(records) == 2 * 8
  for stage, row, ratio in zip(STAGES, rows, (0.5, 2.0), strict=True):
    assert records[stage, "fa3"]["us"] is None and records[stage, "fa3"]["note"] == "it cannot do this"
    assert records[stage, "tokamax"]["note"].startswith("WRONG: its error is") and records[stage, "tokamax"]["us"] > 0
    assert "PyTorch is not installed" in records[stage, "fa4"]["note"]  # nor is it where the tests run on CPU
    assert records[stage, "ours"]["error"] < 1 and records[stage, "ours"]["calls"] == 2
    assert row["tokamax_us"] is row["fa3_us"] is row["fa4_us"] is row["of_ideal"] is None
    assert row["fa4_implied_us"] == pytest.approx(ratio * row["cudnn_us"])
    best = min(row["naive_us"], row["cudnn_us"], row["fa4_implied_us"])
    assert row["best_peer_us"] == best and row["ratio"] == pytest.approx(best / row["ours_us"])
  assert "implied" in rows[0]["best_peer"]
  assert result["explained"][SMALL.name][0].startswith("runs ")
  assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_fails_while_it_is_timed_costs_only_itself():
  calls = []

  def fails():
    calls.append(1)
    if len(calls) == 2:
      raise RuntimeError("gone\nand more")
    return [9.0]

  rows = {name: attention.Measured(SMALL, "forward", name) for name in ("a", "b")}
  attention.time_rows(rows, {"a": lambda: [1.0, 3.0], "b": fails}, rounds=3)
  assert (rows["a"].seconds, rows["a"].calls) == (2.0, 6)
  assert rows["b"].seconds is None and rows["b"].note == "RuntimeError: gone"


def measured(case: Case, peer: str, seconds: float, error: float | None = 0.5) -> attention.Measured:
  return attention.Measured(case, "forward", peer, seconds, error=error)


def test_ratios_their_mean_and_the_ideal_of_a_masked_case():
  base = dataclasses.replace(SMALL, batch=1, seq_len=256)
  masked = dataclasses.replace(base, segments=2)
  done = [
    *(measured(base, peer, seconds) for peer, seconds in (("ours", 1e-3), ("cudnn", 4e-3), ("matmul", 1e-6))),
    *(measured(masked, peer, seconds) for peer, seconds in (("ours", 8e-4), ("cudnn", 8e-4), ("matmul", 1e-6))),
    measured(masked, "fa3", 1e-4, error=1.1),
  ]
  rows = attention.summary(done, attention.Config(matmul_size=100))
  assert [row["ratio"] for row in rows] == pytest.approx([4.0, 1.0, 2.0]) and rows[2]["case"] == "geometric mean"
  assert rows[0]["ceiling_tflops"] == pytest.approx(2.0) and rows[0]["of_ideal"] is None
  assert rows[0]["of_ceiling"] == pytest.approx(base.flops("forward") / 1e-3 / 2e12)
  assert rows[1]["of_ideal"] == pytest.approx(0.8 * 3 / 2)  # 2 of the 3 tiles of 128 by 128
  assert rows[1]["fa3_us"] is None  # it was wrong
  done[3].error = 2.0
  assert attention.summary(done, attention.Config())[1]["ratio"] is None  # and so were we


def test_a_torch_process_that_ended_is_an_error_and_no_crash(tmp_path: pathlib.Path):
  torch = attention.TorchPeers(tmp_path / "torch.log")
  assert "error" not in torch.ask("versions")
  assert "unknown" in torch.ask("load", unknown=1)["error"] or "PyTorch" in torch.ask("load", unknown=1)["error"]
  torch._process.kill()
  torch._process.wait()
  assert "ended" in torch.ask("versions")["error"]
  with pytest.raises(RuntimeError, match="ended"):
    torch.seconds("fa4", 1)
  torch.close()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(peers=("cudn",)), "unknown peer 'cudn'. Did you mean 'cudnn'"),
    (dict(stages=("backward",)), "unknown stage 'backward'"),
    (dict(cases=("d512",)), "config.cases must name one of the problems"),
  ],
)
def test_wrong_names_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    attention.cases_of(attention.Config(problems=(SMALL,), **fields))


def test_search_for_the_longest_sequence():
  def seen(limit):
    asked = []
    found = attention_memory.search(lambda n: asked.append(n) or n <= limit, 8192, 65_536, 2)
    return found, asked

  assert seen(27_000) == ((24_576, True), [8192, 16_384, 32_768, 24_576, 28_672])
  assert seen(10**9) == ((65_536, False), [8192, 16_384, 32_768, 65_536])
  assert seen(100) == ((0, True), [8192])


def test_temporaries_grow_with_the_square_in_plain_attention_and_not_in_ours():
  def grows(peer):
    cases = [dataclasses.replace(SMALL, batch=1, seq_len=n) for n in (512, 1024)]
    small, large = (attention_memory.temporaries(peer, case, "forward", "float32") for case in cases)
    assert small and large
    return large / small

  assert grows(Peer("plain XLA", naive)) > 3.5
  assert grows(attention.ours(attention.Config(implementation="xla"))) < 2.1


def test_only_a_lack_of_memory_counts_as_too_long(monkeypatch):
  def fail(text):
    def compiled(*args):
      raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(attention_memory, "compiled", compiled)
    return attention_memory.trains(Peer("plain XLA", naive), SMALL, "float32")

  assert fail("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte") is None
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    fail("INTERNAL: wrong")
