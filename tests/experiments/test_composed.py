"""Training, recomputation and composition: their arithmetic, what they compare, and how they judge."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from matplotlib.patches import Rectangle

import paged_flash as pf
from experiments import composition, recompute, training
from experiments.attention_cases import Case, make_inputs
from experiments.claims import Claim
from experiments.peers.jax_attention import Peer
from paged_flash.analysis import show_groups
from paged_flash.experiment import Workdir, config
from tests.kernels.mosaic_help import count_kernels, lowered
from tests.tolerances import assert_close

CLAIM = Claim(number="4a", claim="it is so", source="a paper", theirs="much")


@pytest.mark.parametrize("is_causal", [False, True])
def test_stored_weights_give_the_gradient_of_the_definition(is_causal):
  case = Case(batch=2, seq_len=24, num_heads=3, num_kv_heads=3, head_dim=8, is_causal=is_causal)
  query, key, value, d_out, *_ = make_inputs(case, "float32")

  def define(*operands):
    return pf.flash_attention(*operands, is_causal=is_causal, implementation="reference")

  got = jax.vjp(lambda *operands: recompute.stored(case, *operands), query, key, value)
  wanted = jax.vjp(define, query, key, value)
  for x, want in zip((got[0], *got[1](d_out)), (wanted[0], *wanted[1](d_out)), strict=True):
    assert_close(x, want)


def test_each_way_keeps_what_it_says():
  settings = config.load("configs/recompute/h100.py:smoke")
  case = dataclasses.replace(settings.case, seq_len=64, batch=2)
  kept = {row["peer"]: row["kept_bytes"] for row in recompute.run_case(case, settings)}
  array, weights = 4 * 2 * 64 * 2 * 16, 4 * 2 * 2 * 64 * 64
  assert kept["ours"] == 4 * array + 4 * 2 * 2 * 64  # q, k, v, out and the log-sum-exp
  assert kept["stored"] == 4 * array + weights and kept["checkpoint"] == 3 * array
  assert kept["autodiff"] > kept["stored"]


def test_recomputing_is_judged_at_every_length():
  def rows(*gains):
    return [
      dict(peer=peer, seq_len=n, backward_ms=ms, error=0.5, kept_bytes=2**20)
      for n, gain in enumerate(gains)
      for peer, ms in (("ours", 1.0), ("stored", gain))
    ]

  verdicts = [recompute.judged(CLAIM, rows(*gains))["verdict"] for gains in ((2, 3), (0.9, 3), (0.9, 0.8))]
  assert verdicts == ["reproduced", "in part", "not reproduced"]
  wrong = [row | dict(error=2.0) for row in rows(2, 3)]
  assert recompute.judged(CLAIM, wrong)["ours"] == "not measured"


def test_a_training_step_learns_and_every_attention_is_checked(monkeypatch, tmp_path: pathlib.Path):
  wrong = Peer("a wrong one", lambda case, query, key, value, *_: query + key + value)
  monkeypatch.setitem(training.PEERS, "cudnn", wrong)
  settings = dataclasses.replace(config.load("configs/training/gpt2.py:smoke"), seq_lens=(64,), repeats=3)
  settings = dataclasses.replace(settings, peers=("naive", "cudnn"))
  rows = {row["peer"]: row for row in training.run(settings, Workdir.create(tmp_path, settings))}
  assert rows["ours"]["error"] < 0.01 and rows["naive"]["error"] < 0.01 and rows["naive"]["ms"] > 0
  assert rows["cudnn"]["error"] > 1
  trainer = training.Trainer(pf.models.load(settings.model), training.optax.adamw(1e-2), settings)
  case = Case(batch=2, seq_len=64, num_heads=3, num_kv_heads=3, head_dim=64, is_causal=True)
  losses = []
  program, state = trainer.build(case, training.ours(training.TimingConfig())), trainer.init()
  for _ in range(8):
    state, (loss, _) = program(state, trainer.tokens(case))
    losses.append(float(loss))
  assert losses[0] == pytest.approx(np.log(128), rel=0.05) and losses[-1] < 0.7 * losses[0]


def test_a_gain_in_training_is_judged_and_what_does_not_fit_is_said():
  def rows(naive_ms, error=0.5, naive_error=0.5):
    lines = (("ours", 10.0, error), ("naive", naive_ms, naive_error), ("without", 8.0, None))
    return [dict(peer=p, seq_len=1024, ms=ms, by_ours=ms and ms / 10, error=off) for p, ms, off in lines]

  assert [training.judged(CLAIM, rows(ms))["verdict"] for ms in (18.0, 16.0)] == ["reproduced", "not reproduced"]
  assert training.judged(CLAIM, rows(18.0))["ours"] == "1.80 x at 1024; without any attention it would be 2.25 x"
  assert training.judged(CLAIM, rows(None))["ours"] == "only ours fits at 1024"
  for wrong in (rows(18.0, error=1.5), rows(18.0, naive_error=1.5), rows(None, error=1.5)):
    assert training.judged(CLAIM, wrong)["ours"] == "wrong at 1024"


def test_a_prefill_is_judged_by_the_score_matrix_s():
  claim = dataclasses.replace(CLAIM, number="4c")

  def rows(naive_ms):
    ways = {"naive contiguous": naive_ms, "naive paged": 1.0, "flash contiguous": 10.0, "flash paged": 12.0}
    return [dict(way=way, prefill_ms=ms) for way, ms in ways.items()]

  verdicts = [composition.judged(claim, rows(ms))["verdict"] for ms in (24.0, 16.0, 12.0)]
  assert verdicts == ["reproduced", "in part", "not reproduced"]
  assert composition.judged(claim, rows(24.0))["ours"] == "2.40 x (24 to 10 ms), from pages 2.00 x"
  assert composition.judged(claim, rows(None))["ours"] == "not measured"


def test_four_ways_give_the_same_tokens_and_pages_fit_more(tmp_path: pathlib.Path):
  settings = dataclasses.replace(config.load("configs/composition/llama_1b.py:smoke"), memory_bytes=700_000)
  rows = {row["way"]: row for row in composition.run(settings, Workdir.create(tmp_path, settings))}
  assert len(rows) == 4 and all(row["same_tokens"] == 1 and not row["note"] for row in rows.values())
  token = 4 * 2 * 2 * 2 * 8  # bytes: K and V of 2 layers, 2 heads of 8
  for row in rows.values():
    pages = (settings.memory_bytes - row["temporary_bytes"]) // token
    pages //= settings.page_size if row["memory"] == "paged" else settings.run_page_size
    assert row["num_pages"] == pages and row["tokens_per_second"] > 0
  run = settings.max_seq_len // settings.run_page_size
  assert rows["naive contiguous"]["fit"] == rows["naive contiguous"]["num_pages"] // run
  rng = np.random.default_rng(0)
  prompts, outputs = (
    rng.integers(low, high, 64, endpoint=True) for low, high in (settings.prompt_lens, settings.output_lens)
  )
  held = np.cumsum(-(-(prompts + outputs) // settings.page_size))
  for name in ("naive", "flash"):
    paged = rows[f"{name} paged"]
    assert paged["fit"] == (held <= paged["num_pages"]).sum() > rows[f"{name} contiguous"]["fit"]


def test_pages_are_at_random_places_each_once():
  settings = config.load("configs/composition/llama_1b.py:smoke")
  way = composition.Way("flash", "paged", pf.models.load(settings.model), settings)
  pages, count = way.grant(np.array([9, 4, 30, 1000]), 32)
  assert count == 3 and pages.shape == (3, 16)
  held = np.asarray(pages)[np.asarray(pages) >= 0]
  assert len(set(held)) == len(held) == 3 + 1 + 8 and not np.array_equal(held, np.arange(12))


def test_reservations_are_runs_of_pages_in_order_as_long_as_the_longest_request():
  settings = config.load("configs/composition/llama_1b.py:smoke")
  way = composition.Way("flash", "contiguous", pf.models.load(settings.model), settings)
  pages, count = way.grant(np.array([9, 4, 30, 1000]), 15)  # 3 runs of 4 pages of 16 tokens
  assert count == 3 and np.array_equal(pages, np.arange(12).reshape(3, 4))


@pytest.mark.parametrize("memory", ["contiguous", "paged"])
def test_on_a_gpu_both_memories_are_read_by_the_kernel_for_pages(memory):
  full = config.load("configs/composition/llama_1b.py")
  small = dataclasses.replace(full, model=dataclasses.replace(full.model, vocab_size=128, embed_dim=64, num_layers=2))
  model = pf.models.load(dataclasses.replace(small.model, ffn_dim=64), dtype=small.dtype)
  way = composition.Way("flash", memory, model, small)
  kv, ids = jax.eval_shape(lambda: way.pool(4 * way.pages_per_slot)), jax.ShapeDtypeStruct((4,), "int32")
  pages = jax.ShapeDtypeStruct((4, way.pages_per_slot), "int32")
  text = lowered(way.decode, model.params, kv, pages, ids, ids)
  assert count_kernels(text) == 2 * 2  # of each layer one writes K and V, one attends


def test_both_must_beat_either_alone():
  def rows(*both):
    numbers = {"naive contiguous": (10, 100.0), "naive paged": (20, 150.0), "flash contiguous": (30, 400.0)}
    return [
      dict(way=way, fit=fit, tokens_per_second=speed) for way, (fit, speed) in (numbers | {"flash paged": both}).items()
    ]

  good, bad = composition.judged(CLAIM, rows(60, 900.0)), composition.judged(CLAIM, rows(60, 390.0))
  assert (good["verdict"], bad["verdict"]) == ("reproduced", "not reproduced")
  assert "3.0 x and 2.0 x alone, 6.0 x together; tokens per second: 4.0 x and 1.5 x" in good["ours"]
  assert composition.judged(CLAIM, rows(60, 900.0)[1:])["ours"] == "not measured"


def test_bars_stand_in_their_groups():
  rows = [dict(n=n, who=who, kept_bytes=b) for n in (1, 2) for who, b in (("a", 1024 * n), ("b", None if n > 1 else 1))]
  (ax,) = show_groups(rows, groups="n", bars="who", panels={"kept_bytes": "kept"}).axes
  bars = [bar for bar in ax.patches if isinstance(bar, Rectangle)]
  assert [(round(bar.get_x() + bar.get_width() / 2, 2), bar.get_height()) for bar in bars] == [
    (-0.21, 1024),
    (0.79, 2048),
    (0.21, 1),
  ]
  with pytest.raises(ValueError, match="rows must be"):
    show_groups([], groups="n", bars="who", panels={})


@pytest.mark.parametrize("log", [(), ("kept_bytes",)])
@pytest.mark.parametrize("count", [2, 9])
def test_numbers_stand_inside_the_panel_turned_where_bars_are_narrow(count, log):
  rows = [dict(n=n, who=who, kept_bytes=2**30 * (n + 1)) for n in range(3) for who in range(count)]
  figure = show_groups(rows, groups="n", bars="who", panels={"kept_bytes": "kept"}, log=log)
  figure.draw_without_rendering()
  (ax,) = figure.axes
  assert {text.get_rotation() for text in ax.texts} == {90 if count == 9 else 0}
  assert max(text.get_window_extent().y1 for text in ax.texts) < ax.get_window_extent().y1
