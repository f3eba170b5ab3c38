"""The experiment of paged attention: its cases, its oracle and its peers, and how failures are reported."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from experiments import paged_attention
from experiments.claims import Claim
from experiments.comparison import Measured
from experiments.paged_cases import Case, expect, make_inputs, quantisation_error, worst_error
from experiments.peers.paged_attention import PEERS, Peer, gather, ours, out, own_pool, paged
from paged_flash.experiment import Workdir
from paged_flash.kernels import reference
from paged_flash.kernels.arguments import paged_problem

SMALL = Case(batch=3, context=21, num_heads=4, num_kv_heads=2, head_dim=8, page_size=8)
ZIPF, LONG, MIXED, SHARED = CASES = (
  dataclasses.replace(SMALL, lengths="Zipf", kv_dtype="int8"),
  dataclasses.replace(SMALL, lengths="one long", context=40, kv_dtype="float8_e4m3fn"),
  dataclasses.replace(SMALL, chunk=5, decoding=2),
  dataclasses.replace(SMALL, prefix=16),
)


@functools.partial(jax.jit, static_argnums=0)
def definition(case: Case, inputs) -> jax.Array:
  query, k_pages, v_pages, pages, lens, starts, k_scales, v_scales = inputs[:8]
  more: dict[str, Any] = dict(query_starts=starts, max_query_len=case.chunk, k_scales=k_scales, v_scales=v_scales)
  return reference.paged_forward(*paged_problem(query, k_pages, v_pages, pages, lens, **more))[0]


def test_names_lengths_bytes_and_flops():
  zipf = Case(batch=128, context=1024, num_heads=32, num_kv_heads=8, head_dim=128, lengths="Zipf")
  assert zipf.name == "b128 ctx1024 h32/8 d128 page16, Zipf"
  assert abs(zipf.kv_lens().mean() - 1024) < 1 and zipf.kv_lens().max() == pytest.approx(24_127, abs=2)
  assert zipf.kv_bytes("bfloat16") == zipf.kv_lens().sum() * 2 * 8 * 128 * 2
  long = dataclasses.replace(zipf, batch=5, context=100_000, lengths="one long")
  assert long.kv_lens().tolist() == [100, 100, 100_000, 100, 100]
  shared = dataclasses.replace(zipf, batch=3, context=40, lengths="", prefix=32, kv_dtype="int8")
  assert shared.kv_bytes("bfloat16") == (32 + 3 * 8) * 2 * 8 * (128 + 4) and shared.pages_needed == 2 + 3
  mixed = dataclasses.replace(SMALL, chunk=5, decoding=2)
  assert mixed.query_lens().tolist() == [1, 1, 5, 5, 5]
  assert mixed.flops() == 4 * 4 * 8 * (2 * 21 + 3 * (17 + 18 + 19 + 20 + 21))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sets_lie_on_different_scattered_pages_and_the_oracle_is_the_definition(case):
  sets = make_inputs(case, "float32", sets=2)
  owned = [
    {page for row, n in zip(np.asarray(x.pages), case.page_counts(), strict=True) for page in row[:n]} for x in sets
  ]
  assert len(owned[0]) == len(owned[1]) == case.pages_needed and not owned[0] & owned[1]
  assert len(sets[0].k_pages) == 3 * case.pages_needed
  assert (np.diff(np.asarray(sets[0].pages)) != 1).any()
  for inputs in sets:
    right = np.asarray(definition(case, inputs))
    expected = expect(case, inputs)

    def error(place, factor, expected=expected, right=right):
      changed = right.copy()
      changed[place] *= factor
      return worst_error(expected, changed)

    assert error((), 1) < 0.5
    assert error((0, 0), 1.001) > 1 and error((-1, -1), 1.001) > 1 and error((1, 1, 1), np.nan) == np.inf
    assert worst_error(expected, right[:, ::-1].copy()) > 1


def test_bf16_may_err_as_plain_bf16_attention_does_each_sequence_by_itself():
  case = dataclasses.replace(SMALL, lengths="one long", context=4000)
  (inputs,) = make_inputs(case, "bfloat16")
  right, expected = definition(case, inputs), expect(case, inputs)
  assert 0.001 < worst_error(expected, right) < 1
  wide, sequence = np.asarray(right, np.float32), np.arange(3)[:, None, None]
  assert (
    worst_error(expected, wide + 0.01 * (sequence == 1)) > 1
  )  # what 4000 tokens give is much smaller than 4 tokens'
  assert worst_error(expected, wide + 0.001 * (sequence == 0)) < 1


FORMS = {
  "ours_ordered": (ZIPF, MIXED),
  "ours_unquantised": (ZIPF,),
  "ours_apart": (MIXED,),
  "ours_flash": (dataclasses.replace(SMALL, chunk=5),),
  "ours_shared": (SHARED,),
}


@pytest.mark.parametrize("name", FORMS)
def test_ours_in_other_forms_gives_the_same_or_says_why_not(name):
  peer = ours("xla")[name]
  for case in FORMS[name]:
    (inputs,) = make_inputs(case, "float32")
    expected = expect(case, inputs.unquantised if peer.is_unquantised else inputs)
    assert worst_error(expected, out(peer.attend(case, *peer.operands(case, inputs)))) < 1
  (inputs,) = make_inputs(case := SHARED if name == "ours_ordered" else SMALL, "float32")
  with pytest.raises(NotImplementedError):
    peer.operands(case, inputs)


def test_what_peers_are_given():
  """Gathered pages, a pool of their own, heads first: each attends to the same keys and values."""
  for case in (dataclasses.replace(SMALL, chunk=5), dataclasses.replace(SMALL, lengths="one long")):
    (inputs,) = make_inputs(case, "float32")
    assert worst_error(expect(case, inputs), gather(case, *paged(case, inputs))) < 1
  whole = dataclasses.replace(SMALL, context=24)
  (inputs,) = make_inputs(whole, "float32")
  query, k_pages, v_pages, table, lens = own_pool(whole, inputs)
  assert len(k_pages) == whole.pages_needed and sorted(np.ravel(table)) == list(range(9))
  own = inputs._replace(k_pages=k_pages, v_pages=v_pages, pages=table)
  assert (definition(whole, own) == definition(whole, inputs)).all()
  query, k_heads, *_ = PEERS["triton"].operands(whole, inputs)
  assert (k_heads[1, 5, 3] == inputs.k_pages[5, 3, 1]).all()
  np.testing.assert_allclose(query, inputs.query * 8**-0.5, rtol=1e-6)
  with pytest.raises(NotImplementedError, match="take .* GiB"):
    long = Case(batch=101, context=100_000, num_heads=32, num_kv_heads=8, head_dim=128, lengths="one long")
    shapes = jax.eval_shape(lambda: make_inputs(dataclasses.replace(long, batch=1), "bfloat16"))
    PEERS["cudnn"].operands(long, shapes[0])


def test_quantisation_error_is_of_the_size_of_the_steps():
  for dtype, low, high in (("int8", 1e-4, 0.02), ("float8_e4m3fn", 0.01, 0.1)):
    case = dataclasses.replace(SMALL, kv_dtype=dtype, batch=1)
    (inputs,) = make_inputs(case, "float32")
    assert low < quantisation_error(expect(case, inputs), expect(case, inputs.unquantised)) < high


def test_one_run_reports_the_missing_the_wrong_the_fastest_and_the_rotated(monkeypatch, tmp_path: pathlib.Path):
  def missing(*args):
    raise NotImplementedError("it cannot do this\nsecond line")

  def wrong(*args):
    return 1.5 * gather(*args)

  def some_wrong(*args, n):
    return gather(*args) if n % 2 == 0 else 1.5 * gather(*args)

  def sampler(program, *operands, repeats):
    trials.append(repeats)
    seconds = 1e-3 * (len(trials) if repeats == 2 else 1)  # of variants, the first is the fastest
    return lambda: [seconds]

  trials = []
  peers = dict(
    gather=Peer("gather", paged, gather),
    fa3=Peer("FA3", missing, gather),
    cudnn=Peer("cuDNN", paged, wrong),
    triton=Peer("Triton", paged, some_wrong, tuple(dict(n=n) for n in range(1, 5))),
  )
  monkeypatch.setattr(paged_attention, "PEERS", peers)
  monkeypatch.setattr(paged_attention, "sampler", sampler)
  monkeypatch.chdir(tmp_path)
  config = paged_attention.smoke(paged_attention.Config(), SMALL)
  config = dataclasses.replace(config, peers=(*peers, "ours_ordered"), implementation="xla", result="test")
  rows = paged_attention.run(config, Workdir.create(tmp_path, config))
  result = json.loads((tmp_path / "experiments/results/paged_attention/cpu/test.json").read_text())
  assert result["rows"] == rows and [row["stage"] for row in rows] == ["repeated", "rotated"]
  found = {(r["stage"], r["peer"]): r for r in result["timings"]}
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(found) == 7 + 6
  assert found["repeated", "fa3"]["us"] is None and found["repeated", "fa3"]["note"] == "it cannot do this"
  assert found["repeated", "cudnn"]["note"].startswith("WRONG: its error is")
  assert found["repeated", "triton"]["note"] == "n 2" and found["rotated", "triton"]["error"] < 1
  for row, sets in zip(rows, (1, 2), strict=True):
    at = row["stage"]
    assert row["ours_us"] == row["triton_us"] == pytest.approx(1000 / sets)
    assert found[at, "ours"]["error"] < 1 and found[at, "ours"]["tbs"] == pytest.approx(
      SMALL.kv_bytes("float32") / row["ours_us"] / 1e6
    )
    assert row["cudnn_us"] is row["quantisation_error"] is None  # one was wrong
    assert row["best_peer_us"] == min(row["gather_us"], row["triton_us"])
    assert row["ratio"] == pytest.approx(row["best_peer_us"] / row["ours_us"])
    assert row["overhead"] == pytest.approx(row["ours_us"] / row["ours_ordered_us"] - 1)
    assert row["ceiling_tbs"] == pytest.approx(2**20 / found[at, "read"]["us"] / 1e6)
  assert result["explained"][SMALL.name][0].startswith("runs xla")
  assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_peer_is_right_and_not_one_of_ours():
  times = dict(ours=(4e-3, 0.1), ours_ordered=(2e-3, 0.1), cudnn=(3e-3, 0.5), fa3=(1e-3, 1.5), read=(5e-3, None))
  done = [Measured(SMALL, "repeated", peer, seconds, error=error) for peer, (seconds, error) in times.items()]
  (row,) = paged_attention.summary(done, {SMALL.name: None}, paged_attention.Config(dtype="float32"), 10**9)
  assert (row["best_peer"], row["ratio"], row["overhead"]) == ("cuDNN, contiguous", 0.75, 1.0)
  assert row["ordered_by_ours"] == 0.5 and row["fa3_us"] is None and row["ceiling_tbs"] == pytest.approx(0.2)
  assert row["of_ceiling"] == pytest.approx(SMALL.kv_bytes("float32") / 4e-3 / 0.2e12)


def test_the_price_of_pages_and_of_their_size():
  page32, longer = (dataclasses.replace(SMALL, **f) for f in (dict(page_size=32), dict(context=40, page_size=16)))
  done = [
    Measured(case, stage, peer, seconds)
    for case, stage, ours, ordered in (
      (SMALL, "repeated", 9e-3, 1e-3),
      (SMALL, "rotated", 4e-3, 3.2e-3),
      (page32, "repeated", 2e-3, 2e-3),
      (longer, "repeated", 1e-3, 1e-3),
    )
    for peer, seconds in (("ours", ours), ("ours_ordered", ordered))
  ]
  price = Claim(number="13a", claim="", source="", theirs="")
  assert paged_attention.judged(price, done)["ours"].startswith("+0.0% to +25.0% over 3 cases")
  assert paged_attention.judged(price, done)["verdict"] == "reproduced"
  assert paged_attention.judged(price, done[:2])["verdict"] == "not reproduced"  # 9 against 1
  size = dataclasses.replace(price, number="13b")
  assert paged_attention.judged(size, done)["ours"] == "time by the fastest: 2.00 at 8, 1.00 at 32"
  assert paged_attention.judged(size, done[4:6])["verdict"] == "not reproduced"


def test_a_case_without_room_says_so_and_the_next_one_runs(monkeypatch, tmp_path: pathlib.Path):
  def too_large(case, dtype, sets):
    if case.context == 21:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    return make_inputs(case, dtype, sets)

  monkeypatch.setattr(paged_attention, "make_inputs", too_large)
  config = paged_attention.smoke(paged_attention.Config(), SMALL, dataclasses.replace(SMALL, context=8))
  config = dataclasses.replace(config, peers=(), rotated_bytes=1, implementation="xla")
  first, second = paged_attention.run(config, Workdir.create(tmp_path, config))
  assert first["ours_us"] is None and second["ours_us"] > 0
  notes = [json.loads(line)["note"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert "RESOURCE_EXHAUSTED" in notes[0] and not notes[2]


def test_sets_that_rotate_are_as_many_as_the_cache_asks_for():
  config = paged_attention.Config()
  case = Case(batch=1, context=8192, num_heads=32, num_kv_heads=8, head_dim=128)
  counts = {n: paged_attention.num_sets(dataclasses.replace(case, context=n), config) for n in (1024, 8192, 65536)}
  assert counts == {1024: 1, 8192: 8, 65536: 1}  # too many, some, not needed


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(peers=("cudn",)), "unknown peer 'cudn'. Did you mean 'cudnn'"),
    (dict(figure="bar"), "unknown figure 'bar'"),
    (dict(cases=("d512",)), "config.cases must name one of the problems"),
  ],
)
def test_wrong_names_are_refused(fields, message, tmp_path):
  config = paged_attention.Config(problems=(SMALL,), **fields)
  with pytest.raises(ValueError, match=message):
    paged_attention.run(config, Workdir.create(tmp_path, config))


@pytest.mark.parametrize("fields", [dict(chunk=22), dict(prefix=12), dict(prefix=24)], ids=str)
def test_cases_that_do_not_hold_together_are_refused(fields):
  with pytest.raises(ValueError, match=f"{next(iter(fields))} must be"):
    make_inputs(dataclasses.replace(SMALL, **fields), "float32")
