"""Charts hold the measured points, in the unit of their axis, and leave out what is wrong."""

import numpy as np
import pytest

from paged_flash.analysis import (
  show_attention_bars,
  show_attention_memory,
  show_attention_sweep,
  show_paged_bars,
  show_paged_sweep,
)

MATMUL_FLOPS = 1e12


def record(peer: str, seq_len: int, tflops: float | None, *, error: float | None = 0.1, **fields):
  us = None if tflops is None else 1e6 / tflops
  kind = dict(case=f"b1 s{seq_len} h2/2 d64 full", stage="forward", is_causal=False, head_dim=64, seq_len=seq_len)
  return kind | dict(peer=peer, label=peer.upper(), us=us, tflops=tflops, error=error) | fields


TIMINGS = [
  record("ours", 2048, 500.0),
  record("ours", 1024, 400.0),
  record("cudnn", 1024, 300.0),
  record("cudnn", 2048, None),
  record("fa3", 1024, 999.0, error=1.5),
  record("matmul", 1024, 1000.0, error=None, us=1e6 / 800),
  record("matmul", 2048, 1000.0, error=None, us=1e6 / 700),
]


def test_sweep_has_a_panel_for_each_kind_and_the_ceiling():
  figure = show_attention_sweep([*TIMINGS, record("ours", 1024, 100.0, head_dim=128)], matmul_flops=1e12)
  assert [ax.get_title(loc="left") for ax in figure.axes] == [
    "forward, full, head_dim 64",
    "forward, full, head_dim 128",
  ]
  lines = {str(line.get_label()): line.get_xydata() for line in figure.axes[0].lines}
  assert lines.keys() == {"ours", "CUDNN", "matrix product, the ceiling"}
  assert np.asarray(lines["ours"]).tolist() == [[1024, 400], [2048, 500]]
  assert np.asarray(lines["CUDNN"]).tolist() == [[1024, 300]]
  assert np.asarray(lines["matrix product, the ceiling"])[0, 1] == pytest.approx(750)
  assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_panel_without_a_time_says_so():
  figure = show_attention_sweep([*TIMINGS, record("ours", 1024, 9.0, head_dim=128, is_causal=True)], matmul_flops=1e12)
  assert [[text.get_text() for text in ax.texts] for ax in figure.axes] == [[], ["not timed"], ["not timed"], []]


def test_bars_stand_by_their_case():
  figure = show_attention_bars(TIMINGS, matmul_flops=MATMUL_FLOPS)
  bars = {str(group.get_label()): group for group in figure.axes[0].containers}
  assert bars.keys() == {"ours", "CUDNN"}
  heights = {round(bar.get_x() + bar.get_width()): bar.get_height() for bar in bars["ours"]}
  assert heights == {0: 500, 1: 400}  # cases in the order of the records
  assert figure._repr_png_().startswith(b"\x89PNG")


def test_memory_leaves_out_what_did_not_compile():
  rows = [
    dict(seq_len=n, stage=s, input_bytes=n, ours_temporary_bytes=n, plain_temporary_bytes=n * n if n < 4096 else None)
    for n in (1024, 2048, 4096)
    for s in ("forward", "forward+backward")
  ]
  figure = show_attention_memory(rows)
  lines = {str(line.get_label()): np.asarray(line.get_xdata()).tolist() for line in figure.axes[0].lines}
  assert lines == {
    "plain XLA, forward": [1024, 2048],
    "plain XLA, forward+backward": [1024, 2048],
    "ours, forward": [1024, 2048, 4096],
    "ours, forward+backward": [1024, 2048, 4096],
    "the inputs themselves": [1024, 2048, 4096],
  }
  assert figure._repr_png_().startswith(b"\x89PNG")


def test_nothing_to_draw_is_refused():
  with pytest.raises(ValueError, match="at least one measured time"):
    show_attention_bars([record("ours", 1024, None)], matmul_flops=MATMUL_FLOPS)
  with pytest.raises(ValueError, match="at least one record"):
    show_attention_memory([])


def paged(peer: str, tbs: float | None, context: int = 1024, stage: str = "repeated", **fields):
  kind = dict(case=f"ctx{context}", stage=stage, context=context, batch=2, page_size=16, error=None)
  kind |= dict(peer=peer, label=peer.upper(), us=None if tbs is None else 1 / tbs, tbs=tbs, tflops=10.0)
  return kind | fields


PAGED = [
  paged("ours", 9.0),
  paged("ours", 4.0, stage="rotated"),
  paged("ours", 5.0, 2048),
  paged("fa3", 3.0),
  paged("fa3", 8.0, 2048, error=1.5),
  paged("read", 4.5),
  paged("read", 4.7, 2048),
]


def test_paged_bars_show_what_comes_from_memory_and_leave_out_what_is_wrong():
  (ax,) = show_paged_bars(PAGED).axes
  bars = {str(bars.get_label()): [bar.get_height() for bar in bars] for bars in ax.containers}
  assert bars == {"ours": [4, 5], "FA3": [3]}
  assert len(ax.collections) == 2  # a ceiling for each case
  (ax,) = show_paged_bars(PAGED[:1], value="tflops").axes
  assert [[bar.get_height() for bar in bars] for bars in ax.containers] == [[10]] and not ax.collections


def test_paged_sweep_has_a_panel_for_each_quantity_that_varies():
  figure = show_paged_sweep([*PAGED, paged("ours", 6.0, case="page8", page_size=8)])
  assert [ax.get_xlabel() for ax in figure.axes] == ["context, tokens", "page size, tokens"]
  lines = [{str(line.get_label()): line.get_xydata() for line in ax.lines} for ax in figure.axes]
  assert np.asarray(lines[0]["ours"]).tolist() == [[1024, 4], [2048, 5]]
  assert np.asarray(lines[1]["ours"]).tolist() == [[8, 6], [16, 4]]
  assert np.asarray(lines[0]["sum of a large array, the ceiling"])[0, 1] == pytest.approx(4.6)
