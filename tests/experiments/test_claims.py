"""Claims of the papers: listed, judged from what was found, and shown in the documents."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import paged_flash as pf
from experiments import (
  attention,
  attention_io,
  attention_memory,
  batching,
  beam,
  equality,
  kv_sizes,
  memory,
  paging,
  report,
  sharing,
)
from experiments import list as listing
from experiments import simulate as simulation
from experiments.claims import Claim
from paged_flash.cache import page_table
from paged_flash.experiment import Workdir, config
from paged_flash.simulator import LatencyModel, Paged, simulate

CLAIM = Claim(number="7", claim="it is so", source="a paper", theirs="much")


def test_every_config_is_listed_with_what_it_claims(capsys):
  found = dict(listing.configs())
  assert found.keys() == {str(path.relative_to(listing.ROOT)) for path in listing.ROOT.glob("configs/*/*.py")}
  assert all(len(claim) > 20 and "\n" not in claim and not claim.startswith("Claim") for claim in found.values())
  assert found["configs/kv_sizes/models.py"].startswith("One token of OPT-13B takes")
  assert found["configs/scheduler/cost.py"].startswith("Scheduling on the CPU takes under")  # it has no "Claim"
  listing.main([])
  assert "python -m experiments.kv_sizes --config=configs/kv_sizes/models.py\n    One token" in capsys.readouterr().out


def test_bytes_of_tokens_by_hand_and_of_a_page_table(tmp_path: pathlib.Path):
  full = config.load("configs/kv_sizes/models.py")
  of = {model.name: model for model in full.models}
  assert of["Llama-3-8B"].token_bytes("bfloat16") == 128 * 1024 and of["Llama-3-8B"].attention == "GQA"
  assert of["DeepSeek-V3"].token_bytes("bfloat16") == 61 * 576 * 2 and of["DeepSeek-V3"].attention == "MLA"
  assert of["Falcon-7B"].token_bytes("float8_e4m3fn") == 4096 and of["Falcon-7B"].attention == "MQA"
  assert of["OPT-13B"].attention == "MHA"
  small = dataclasses.replace(full, users=3, context=20, result="")
  # pages i32[3, 2], lengths i32[3], ref counts i32[6]
  table = page_table.init(num_slots=3, pages_per_slot=2, num_pages=6, page_size=16)
  assert kv_sizes.table_bytes(small) == table.pages.nbytes + table.seq_lens.nbytes + table.ref_counts.nbytes == 60
  rows = kv_sizes.run(small, Workdir.create(tmp_path, small))
  assert rows[0]["users_bytes"] == 60 * 819_200 and rows[0]["table_share"] == pytest.approx(60 / (60 * 819_200))


@pytest.mark.parametrize(("known", "verdict"), [(819_200, "reproduced"), (819_201, "not reproduced")])
def test_a_stated_size_is_compared_to_the_byte(known, verdict, monkeypatch, tmp_path: pathlib.Path):
  monkeypatch.chdir(tmp_path)
  full = config.load(str(listing.ROOT / "configs/kv_sizes/models.py"))
  small = dataclasses.replace(full, models=full.models[:1], users=1, known={"OPT-13B": known}, result="test")
  kv_sizes.run(small, Workdir.create(tmp_path, small))
  (claim,) = json.loads((tmp_path / "experiments/results/kv_sizes/cpu/test.json").read_text())["claims"]
  assert claim["verdict"] == verdict and claim["number"] == "7"


@pytest.mark.parametrize("broken", ["", "order", "values", "batch"])
def test_equality_sees_what_depends_on_the_order_and_what_is_wrong(broken, monkeypatch, tmp_path: pathlib.Path):
  monkeypatch.chdir(tmp_path)
  attend = pf.paged_attention

  def changed(query, k_pages, v_pages, pages, lens, **more):
    out = attend(query, k_pages, v_pages, pages, lens, **more)
    tiny = {"order": 1e-6 * pages[0, 0], "values": 0.1, "batch": 1e-6 * ((lens > 0).sum() == 1), "": 0}[broken]
    return out + jnp.asarray(tiny, out.dtype)

  monkeypatch.setattr(pf, "paged_attention", changed)
  smoke = config.load(str(listing.ROOT / "configs/equality/pages.py:smoke"))
  smoke = dataclasses.replace(smoke, dtype="float32", page_sizes=(5,), implementation="xla", result="test")
  (row,) = equality.run(smoke, Workdir.create(tmp_path, smoke))
  found = json.loads((tmp_path / "experiments/results/equality/cpu/test.json").read_text())["claims"]
  wanted = {"12": "reproduced", "15c": "reproduced"}
  if broken:
    wanted["15c" if broken == "batch" else "12"] = "not reproduced"
  assert {claim["number"]: claim["verdict"] for claim in found} == wanted and (row["alone"] > 0) == (broken == "batch")
  assert (row["differing"] > 0) == (broken == "order") and (row["from_contiguous"] > row["allowed"]) == (
    broken == "values"
  )


def test_pages_hold_the_tokens_and_nothing_else():
  x = [np.arange(5.0).reshape(5, 1, 1), np.arange(10.0, 12).reshape(2, 1, 1)]
  pool, table = equality.in_pages(x, 2, np.array([6, 1, 3, 0]), 8)
  assert table.tolist() == [[6, 1, 3], [0, -1, -1]]
  assert pool[[6, 1, 0]].ravel().tolist() == [0, 1, 2, 3, 10, 11] and pool[3, 0] == 4
  assert np.isnan(pool).sum() == pool.size - 7


def test_io_is_judged_by_the_theory():
  full = config.load("configs/attention_io/tiles.py")
  rows = [attention_io.row(dataclasses.replace(full.case, seq_len=4096), tile, full) for tile in ((1, 1), (2, 2))]
  one, four = rows
  once = 4096 * (2 * 128 * 2 + 4)  # Q and O in two bytes, the LSE in four
  assert one["flash_bytes"] - once == 4 * (four["flash_bytes"] - once) == 2 * 4096**2 * 2 * 128 / 64
  assert one["naive_bytes"] > 40 * one["flash_hbm_bytes"] and one["scores"] == 2**24
  rows += [row | dict(seq_len=2 * row["seq_len"]) for row in rows]
  buffers = [dict(seq_len=4096, naive_temporary_bytes=2**26, flash_temporary_bytes=2**20)]
  assert [claim["verdict"] for claim in attention_io.judged(full, rows, buffers)] == ["reproduced", "reproduced"]
  rows[0]["flash_bytes"] *= 1.1
  assert [claim["verdict"] for claim in attention_io.judged(full, rows, buffers)] == ["reproduced", "not reproduced"]


def test_claims_of_all_results_are_one_table_by_number(tmp_path: pathlib.Path):
  stamp = dict(commit="0" * 40, uncommitted_changes=False, date="2026-01-02", versions={"jax": "0.11.2"})
  stamp |= dict(device=dict(platform="cpu", kind="cpu"), machine=dict(cpus=2, architecture="x86_64"), rows=[])
  for name, number, holds in (("b", "12", None), ("a", "7", True)):
    path = tmp_path / f"experiments/results/{name}/cpu/result.json"
    path.parent.mkdir(parents=True)
    claim = dataclasses.replace(CLAIM, number=number).judged("little", holds)
    path.write_text(json.dumps(stamp | dict(experiment=name, claims=[claim])))
  (tmp_path / "docs").mkdir()
  document = tmp_path / "docs/reproduction.md"
  document.write_text("<!-- report:claims -->\n<!-- /report -->\n")
  assert report.update(tmp_path) == [document] and report.update(tmp_path, check=True) == []
  assert document.read_text().splitlines()[1:5] == [
    "|  | claim | source | theirs | ours | verdict | on | see |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
    "| 7 | it is so | a paper | much | little | reproduced | CPU "
    "| [result](../experiments/results/a/cpu/result.json) |",
    "| 12 | it is so | a paper | much | little | in part | CPU | [result](../experiments/results/b/cpu/result.json) |",
  ]


def test_steps_end_before_idle_time_and_waits_are_those_of_running_requests():
  clock = LatencyModel(
    num_params=0.5, weight_bytes=0, kv_bytes=0, attention_flops=0, flops=1, bandwidth=1, overhead_s=1
  )
  served = simulate(
    [2, 3, 1],
    [2, 1, 1],
    memory=Paged(num_pages=8, page_size=2),
    num_slots=2,
    token_budget=8,
    arrivals=[0.5, 2, 20],
    latency=clock,
  )
  # From 0.5 the first prefill takes 1 + 2 s; at 3.5 a decode and the second prompt, 1 + 4 s; idle from 8.5 until 20.
  assert batching.step_seconds(served).tolist() == [3, 5, 2]
  row = batching.row(batching.Way(name="x"), served, batching.Config(num_slots=2))
  assert (row["token_p50_s"], row["token_p99_s"], row["token_max_s"]) == (3, 5, 5)  # waits of 2, 3, 5 and 5 s
  with pytest.raises(ValueError, match="config.log_size must be at least the 3 steps"):
    batching.step_seconds(dataclasses.replace(served, stride=2))


def test_ways_are_judged_by_throughput_or_by_waits():
  rows = [dict(tokens_per_second=10, utilisation=0.3, token_p99_s=0.5, token_budget=64, first_token_p50_s=1.0)]
  rows += [dict(tokens_per_second=30, utilisation=0.9, token_p99_s=0.4, token_budget=16, first_token_p50_s=2.0)]
  found = [batching.judged(dataclasses.replace(CLAIM, number=number), rows) for number in ("10", "15a")]
  assert [claim["verdict"] for claim in found] == ["in part", "not reproduced"]
  assert found[0]["ours"].startswith("3.0 x the throughput") and "500 ms" in found[1]["ours"]


def verdict(module, rows, *more, number="1"):
  return module.judged(dataclasses.replace(CLAIM, number=number), rows, *more)["verdict"]


def test_memory_is_judged_by_the_paper_or_by_waste():
  rows = [
    dict(trace="t", allocator=name, used=used, waste=waste)
    for name, used, waste in (("max", 0.2, 0.7), ("paged 16", 0.9, 0.03))
  ]
  assert verdict(memory, rows) == "reproduced"
  assert verdict(memory, [rows[0], rows[1] | dict(waste=0.05)]) == "not reproduced"
  for theirs, holds in ((0.92, "reproduced"), (0.94, "not reproduced")):
    pairs = zip(rows, (0.21, theirs), strict=True)
    assert verdict(memory, [row | dict(paper_used=paper) for row, paper in pairs]) == holds


def test_a_rate_is_sustained_until_latency_reaches_the_bound():
  rows = [
    dict(allocator="a", rate=rate, normalised_latency=seconds) for rate, seconds in ((1, 0.02), (2, 0.1), (4, 0.4))
  ]
  assert simulation.sustained(rows, "a", 0.2) == (pytest.approx(3.0), True)  # halfway between 0.1 and 0.4
  assert simulation.sustained(rows, "a", 0.5) == (4, False)
  assert simulation.sustained(rows, "a", 0.01) == (0, True)
  assert simulation.sustained(rows[:1], "a", 0.01) == (0, True)


def test_a_chat_keeps_the_last_tokens_of_its_prompts(monkeypatch, tmp_path: pathlib.Path):
  class Seen(Exception):
    pass

  def look(prompt_lens, output_lens, **more):
    assert prompt_lens.max() == 50 and output_lens.max() > 50
    raise Seen

  monkeypatch.setattr(simulation, "simulate", look)
  settings = dataclasses.replace(
    config.load(str(listing.ROOT / "configs/simulate/opt13b_chat.py:smoke")), last_tokens=50
  )
  with pytest.raises(Seen):
    simulation.run(settings, Workdir.create(tmp_path, settings))


def test_rates_and_batches_are_judged_by_the_papers_ranges():
  settings = simulation.Config(paper_rate=2.0)

  def rows(**sustained):
    return [
      dict(allocator=name, rate=r, normalised_latency=0.2 * np.exp(r - rate))
      for name, rate in sustained.items()
      for r in (0.1, 9)
    ]

  good = rows(max=0.5, pow2=0.8, oracle=1.0, paged=2.0)
  assert verdict(simulation, good, settings, number="9a") == "reproduced"
  assert verdict(simulation, rows(max=0.5, pow2=0.8, oracle=1.5, paged=2.0), settings, number="9a") == "not reproduced"
  for rate, holds in ((1.0, "reproduced"), (1.4, "in part"), (2.1, "not reproduced")):
    assert verdict(simulation, rows(max=0.95, pow2=1.0, oracle=rate, paged=2.0), settings, number="11e") == holds
  for found, holds in (((7, 13, 30), "reproduced"), ((7, 13, 20), "in part"), ((9, 13, 30), "not reproduced")):
    batches = [dict(rate=2.0, mean_running=m, paper_batch=p) for m, p in zip(found, (7, 13, 30), strict=True)]
    assert verdict(simulation, [*batches, dict(rate=1.0)], settings, number="9b") == holds


def test_sharing_is_judged_by_pages_saved_or_by_the_order_of_admission(tmp_path: pathlib.Path):
  for saved, holds in ((0.18, "reproduced"), (0.25, "in part"), (0.3, "not reproduced")):
    assert verdict(sharing, [dict(trace="t", saved=saved, paper_saved=0.16)], number="11a") == holds
  for last, holds in ((0.98, "reproduced"), (0.9, "in part"), (0.7, "not reproduced")):
    rows = [
      dict(trace="t", policy=p, num_tokens=2**20, hit_rate=rate / 2, ideal_hit_rate=0.5)
      for p, rate in (("a", 0.8), ("b", last))
    ]
    assert verdict(sharing, rows, number="15b") == holds
  unknown = sharing.Config(policies=("shortest",))
  with pytest.raises(ValueError, match="Did you mean 'shortest_first'"):
    sharing.run(unknown, Workdir.create(tmp_path, unknown))


def test_the_order_of_admission_changes_what_is_found(tmp_path: pathlib.Path):
  trace = tmp_path / "small_trace.jsonl"  # two conversations in turns, in a cache that holds one of them
  lines = [
    dict(timestamp=i, input_length=2048, output_length=1, hash_ids=[10 * (i % 2) + j for j in range(4)])
    for i in range(8)
  ]
  trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
  policies = ("first_come", "longest_prefix_first")
  settings = sharing.Config(
    trace=str(trace), page_size=512, num_tokens=(3072,), policies=policies, queue_size=8, num_slots=1, token_budget=4096
  )
  first, last = (row["hit_rate"] for row in sharing.run(settings, Workdir.create(tmp_path / "run", settings)))
  assert last > first


def test_beams_are_judged_by_the_paper_and_by_their_width():
  def rows(*saved):
    return [dict(width=w, saved=s, paper_saved=p) for w, s, p in zip((2, 4), saved, (0.4, None), strict=True)]

  assert [verdict(beam, rows(*saved)) for saved in ((0.45, 0.5), (0.45, 0.4), (0.6, 0.5))] == [
    "reproduced",
    "in part",
    "not reproduced",
  ]


def test_speed_of_attention_is_judged_by_the_matrix_product():
  def rows(of_ceiling, ratio: float | None = 1.0):
    return [dict(case="c", stage="forward", ours_tflops=500.0, of_ceiling=of_ceiling, ratio=ratio)]

  assert [verdict(attention, rows(*x)) for x in ((0.8,), (0.7,), (0.8, None))] == [
    "reproduced",
    "not reproduced",
    "not reproduced",
  ]


def test_memory_of_attention_is_judged_by_its_growth():
  def rows(ours, plain):
    return [
      dict(seq_len=n, stage=stage, input_bytes=n, ours_temporary_bytes=ours(n), plain_temporary_bytes=plain(n))
      for n in (1024, 2048, 4096)
      for stage in ("forward", "forward+backward")
    ]

  assert verdict(attention_memory, rows(lambda n: n, lambda n: n * n)) == "reproduced"
  assert verdict(attention_memory, rows(lambda n: n, lambda n: 2 * n)) == "in part"
  assert verdict(attention_memory, rows(lambda n: n * n, lambda n: 99 * n * n)) == "not reproduced"
  assert verdict(attention_memory, rows(lambda n: n, lambda n: None)) == "in part"


def test_costs_of_paging_are_the_worst_found(tmp_path: pathlib.Path):
  settings = config.load("configs/paging/costs.py:smoke")
  rows = paging.run(settings, Workdir.create(tmp_path, settings))
  found = paging.judged(CLAIM, rows)
  assert found["verdict"] == "reproduced" and len({row["cost"] for row in rows}) == 3
  assert verdict(paging, [*rows, dict(cost="kernel", share=0.3, ms=None)]) == "not reproduced"
  assert paging.overheads([dict(case="a", overhead=1), dict(case="a", overhead=2), dict(case="b", overhead=None)]) == {
    "a": 2
  }
