"""The traffic experiment: what ncu prints is read right, kernels go to their calls, and it works without a GPU."""

import contextlib
import dataclasses
import json
import pathlib
import stat
import sys
from typing import Any

import pytest

from experiments import attention_traffic
from experiments.attention_cases import Case
from experiments.attention_traffic import Config, by_call, parse, unit_bytes, with_measured
from experiments.claims import Claim
from experiments.peers import attention_once
from paged_flash.analysis import show_attention_traffic
from paged_flash.experiment import Workdir

CASE = Case(batch=1, seq_len=512, num_heads=2, num_kv_heads=1, head_dim=64, is_causal=True)
COUNTERS = '"dram__bytes_read.sum","dram__bytes_write.sum","lts__t_sectors_srcunit_tex_op_read.sum"'
MARKER = '"{}","7","wrapped_negate","(977, 1, 1)","(1, 1, 1)","4,096","0","8"'
TABLE = "\n".join(
  [
    "==PROF== Connected to process 7",
    '==PROF== Profiling "wrapped_negate" - 0: 0%....100% - 3 passes',
    f'"ID","Process ID","Kernel Name","Block Size","Grid Size",{COUNTERS}',
    '"","","","block","block","byte","Kbyte","sector"',
    MARKER.format(0),
    '"1","7","mosaic_gpu_kernel, with a comma","(384, 1, 1)","(132, 1, 1)","1,000,000","500.5","3,000"',
    MARKER.format(2),
    '"3","7","gemm_one","(128, 1, 1)","(64, 1, 1)","2000000","1000","n/a"',
    '"4","7","softmax","(977, 1, 1)","(64, 1, 1)","3000000","2000","50"',
    "==PROF== Disconnected from process 7",
  ]
)


def test_the_table_of_ncu_becomes_bytes_of_each_kernel():
  kernels = parse(TABLE)
  assert [kernel.identity[0] for kernel in kernels] == [
    "wrapped_negate",
    "mosaic_gpu_kernel, with a comma",
    "wrapped_negate",
    "gemm_one",
    "softmax",
  ]
  assert kernels[1].moved == dict(hbm_read=1e6, hbm_write=500.5e3, l2_read=96e3)
  assert "l2_read" not in kernels[3].moved
  with pytest.raises(ValueError, match="no table"):
    parse("==ERROR== ERR_NVGPUCTRPERM - no permission")


def test_units():
  found = [unit_bytes(unit) for unit in ("byte", "Kbyte", "Gbyte", "sector", "Msector", "sectors", "bytes")]
  assert found == [1, 1e3, 1e9, 32, 32e6, 32, 1]
  with pytest.raises(ValueError, match="byte/second"):
    unit_bytes("byte/second")


def test_kernels_go_to_the_call_before_them():
  first, second = by_call(parse(TABLE), 2)
  assert [kernel.identity[0] for kernel in second] == ["gemm_one", "softmax"]
  row = dict(counted_hbm_bytes=1_000_000, counted_hbm_read_bytes=500_000, counted_l2_read_bytes=48_000)
  mine = with_measured(row, first, "")
  assert (mine["measured_hbm_bytes"], mine["hbm_ratio"], mine["hbm_read_ratio"]) == (1_500_500, 1.5005, 2)
  assert mine["l2_read_ratio"] == 2 and mine["note"] == ""
  naive = with_measured(row | dict(counted_l2_read_bytes=None), second, "")
  assert naive["measured_hbm_bytes"] == 8e6  # 2 + 3 read, 1 + 2 written, in millions
  assert naive["measured_l2_read_bytes"] is None and naive["l2_read_ratio"] is None
  for wrong in (1, 3):
    with pytest.raises(ValueError, match=f"of {wrong} calls"):
      by_call(parse(TABLE), wrong)
  with pytest.raises(ValueError, match=r"\[0, 2\]"):
    by_call([parse(TABLE)[0], *parse(TABLE)[2:]], 2)


def test_each_program_runs_once_in_the_profiled_range(monkeypatch):
  ranges = []

  @contextlib.contextmanager
  def profiled():
    before = len(calls)
    yield
    ranges.append(calls[before:])

  calls: list[str] = []
  long = dataclasses.replace(CASE, batch=100_000)  # its scores are too large for plain XLA
  job = dict(cases=[dataclasses.asdict(CASE), dataclasses.asdict(long)], peers=["naive"], dtype="bfloat16")
  real = attention_once.jax.block_until_ready
  monkeypatch.setattr(attention_once.jax, "block_until_ready", lambda x: calls.append("call") or real(x))
  answers = attention_once.run(job | dict(implementation="", threads=1), profiled)
  assert [answer["case"] for answer in answers] == [CASE.name, long.name]
  assert answers[0]["error"] == "" and answers[1]["error"].startswith("its score matrix takes")
  assert ranges == [["call", "call"]]  # the marker and the program
  assert len(calls) == 5  # before: the marker once, the inputs, the program's warm-up


def config(**fields) -> Config:
  return dataclasses.replace(Config(problems=(CASE,), seconds=60.0), **fields)


def test_without_ncu_it_still_counts(monkeypatch, tmp_path: pathlib.Path, capsys):
  monkeypatch.setenv("PATH", str(tmp_path))
  rows = attention_traffic.run(config(), Workdir.create(tmp_path, config()))
  assert [row["peer"] for row in rows] == ["ours", "naive"]
  ours, naive = rows
  assert ours["note"] == "not measured: ncu is not on the PATH" and ours["measured_hbm_bytes"] is None
  assert ours["counted_hbm_bytes"] == ours["compulsory_bytes"] == 512 * (6 * 128 + 2 * 4)
  assert ours["tiles"]["num_wgs"] == 3 and ours["counted_l2_read_bytes"] > ours["counted_hbm_read_bytes"]
  assert naive["counted_hbm_bytes"] == 512 * 6 * 128 + 2 * 512 * 512 * 12
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2 and (tmp_path / "traffic.png").exists()
  assert "not measured: ncu" in capsys.readouterr().out


def fake_ncu(monkeypatch, folder: pathlib.Path, text: str) -> None:
  """An ncu that knows three counters, writes `text` as its log and answers for two calls."""
  listing = "\n".join(f"{name}  Counter  byte  what it is" for name in ("dram__bytes_read", "dram__bytes_write"))
  (folder / "ncu").write_text(f"""#!{sys.executable} -S
import json, pathlib, sys
text = {text!r}
if "--query-metrics" in sys.argv:
  print({listing!r})
else:
  job = json.loads(sys.argv[-1])
  pathlib.Path(sys.argv[sys.argv.index("--log-file") + 1]).write_text(text)
  assert sys.argv[sys.argv.index("--metrics") + 1] == "dram__bytes_read.sum,dram__bytes_write.sum", sys.argv
  if "==ERROR==" not in text:
    cases = [dict(case={CASE.name!r}, peer=peer, error="") for peer in job["peers"]]
    pathlib.Path(job["answer"]).write_text(json.dumps(cases))
""")
  (folder / "ncu").chmod(stat.S_IRWXU)
  monkeypatch.setenv("PATH", str(folder), prepend=":")
  monkeypatch.setattr(attention_traffic.jax, "default_backend", lambda: "gpu")


def test_what_ncu_measures_stands_beside_what_is_counted(monkeypatch, tmp_path: pathlib.Path, capsys):
  fake_ncu(monkeypatch, tmp_path, TABLE)
  ours, naive = attention_traffic.run(config(), Workdir.create(tmp_path / "run", config()))
  assert ours["measured_hbm_bytes"] == 1_500_500 and naive["measured_hbm_bytes"] == 8e6
  assert ours["hbm_ratio"] == 1_500_500 / ours["counted_hbm_bytes"]
  assert naive["kernels"] == ["gemm_one", "softmax"] and ours["note"] == naive["note"] == ""
  assert "1.431 MiB" in capsys.readouterr().out
  lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  assert [line["measured_hbm_bytes"] for line in lines] == [1_500_500, 8e6]


@pytest.mark.parametrize(
  "ratios, plain, verdict",
  [((0.95, 1.09), 20.0, "reproduced"), ((0.95, 1.2), 20.0, "in part"), ((1.0, 1.0), 2.0, "not reproduced")],
)
def test_a_claim_is_judged_by_what_was_measured(ratios, plain, verdict):
  rows: list[dict[str, Any]] = [
    dict(case=str(i), peer="ours", hbm_ratio=ratio, measured_hbm_bytes=100 * ratio) for i, ratio in enumerate(ratios)
  ]
  rows += [dict(case="0", peer="naive", hbm_ratio=1.0, measured_hbm_bytes=100 * ratios[0] * plain)]
  rows += [dict(case="1", peer="naive", hbm_ratio=None, measured_hbm_bytes=None)]  # its scores did not fit
  claim = Claim(number="1b", claim="", source="", theirs="")
  found = attention_traffic.judged(claim, rows)
  assert found["verdict"] == verdict
  assert (
    f"within 10% of the counted HBM bytes in {sum(x < 1.1 for x in ratios)} of 2 cases ({ratios[0]:.2f} to"
    in found["ours"]
  )
  assert f"moves {plain:.0f} to {plain:.0f} times as much" in found["ours"]
  assert attention_traffic.judged(claim, [])["verdict"] == "in part"


def test_what_ncu_refuses_is_said(monkeypatch, tmp_path: pathlib.Path):
  fake_ncu(monkeypatch, tmp_path, "==ERROR== ERR_NVGPUCTRPERM - no permission\n")
  rows = attention_traffic.run(config(), Workdir.create(tmp_path / "run", config()))
  assert all(row["note"] == "not measured: ==ERROR== ERR_NVGPUCTRPERM - no permission" for row in rows)
  assert all(row["counted_hbm_bytes"] > 0 for row in rows)


def test_masks_known_only_when_running_are_refused(tmp_path: pathlib.Path):
  asked = config(problems=(dataclasses.replace(CASE, lengths="zipf"),))
  with pytest.raises(ValueError, match="zipf lengths"):
    attention_traffic.run(asked, Workdir.create(tmp_path, asked))


def test_bars_are_the_rows():
  row = dict(case="b1 s512 h2/1 d64 causal", compulsory_bytes=1000)
  rows = [
    row | dict(peer="ours", label="ours", counted_hbm_bytes=1100, measured_hbm_bytes=1200),
    row | dict(peer="naive", label="plain XLA", counted_hbm_bytes=9000, measured_hbm_bytes=None),
  ]
  (ax,) = show_attention_traffic(rows).axes[:1]
  bars = {str(bars.get_label()): [bar.get_height() for bar in bars] for bars in ax.containers}
  assert bars == {"ours, counted": [1100], "ours, measured": [1200], "plain XLA, counted": [9000]}
  with pytest.raises(ValueError, match="at least one"):
    show_attention_traffic([])
