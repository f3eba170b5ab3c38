"""The Hopper kernels of paged attention: in the CPU interpreter with its race detector, and lowered for an H200."""

import dataclasses
import functools
import types
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_flash as pf
from paged_flash.kernels import mosaic, paged_decode_sm90, paged_prefill_sm90, paged_sm90
from paged_flash.kernels.arguments import flash_problem, paged_problem
from paged_flash.kernels.problem import PagedOperands
from tests.kernels import cases, mosaic_help, oracle
from tests.kernels.test_arguments import pretend
from tests.tolerances import assert_close

TILES = dict(lanes=2, block_kv=64, stages=2, num_blocks=3)
TILES |= dict(prefill_num_wgs=2, prefill_block_kv=64, prefill_stages=2)
SINKS = np.arange(7, dtype=np.float32) - 3
BOUNDS = ("max_query_len", "min_query_len")
SPECULATIVE: dict[str, Any] = dict(
  kv_lens=[9, 200, 0, 16, 65], query_lens=[4, 1, 0, 2, 3], num_tokens=12, max_query_len=4
)

# name -> (arguments of `cases.paged_call`, tiles). Heads are (H, K, D).
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
  "page16_gqa3": (dict(kv_lens=[1, 0, 48, 280], heads=(6, 2, 64), page_size=16, pages_per_slot=18), {}),
  "page8_gqa7_everything": (
    dict(heads=(7, 1, 64), page_size=8, pages_per_slot=30)
    | SPECULATIVE
    | dict(local_window_size=70, sinks=SINKS, logits_soft_cap=2.0, scale=0.3),
    {},
  ),
  "page64_mha_f16": (
    dict(kv_lens=[64, 130], heads=(2, 2, 128), page_size=64, pages_per_slot=3, sinks=SINKS[2:4]),
    dict(stages=3),
  ),
  "page128_window": (
    dict(kv_lens=[1, 128, 300], heads=(8, 1, 64), page_size=128, pages_per_slot=3, local_window_size=9),
    dict(lanes=1),
  ),
  "page32_block128": (SPECULATIVE | dict(heads=(2, 1, 64), page_size=32, pages_per_slot=8), dict(block_kv=128)),
  "int8_everything": (
    dict(heads=(8, 2, 128), page_size=16, pages_per_slot=20, kv_lens=[9, 300, 0, 16, 65], query_lens=[4, 1, 0, 2, 3])
    | dict(num_tokens=12, max_query_len=4, local_window_size=230, sinks=SINKS[:1].repeat(8), logits_soft_cap=2.0)
    | dict(quantised="int8"),
    {},
  ),
  "fp8_page8": (
    dict(kv_lens=[1, 0, 280], seed=7, heads=(3, 3, 64), page_size=8, pages_per_slot=40, quantised="float8_e4m3fn"),
    {},
  ),
  "fp8_page256": (
    dict(kv_lens=[300], heads=(4, 1, 64), page_size=256, pages_per_slot=2, quantised="float8_e5m2"),
    dict(block_kv=128, lanes=1),
  ),
  "page256_dim256": (dict(kv_lens=[100, 257], heads=(2, 1, 256), page_size=256, pages_per_slot=2), dict(lanes=1)),
}
# With chunks of more query tokens than the decode kernel takes, some as long as their sequence.
CASES |= {
  "chunks_page16": (
    dict(kv_lens=[90, 1, 0, 150, 20], query_lens=[33, 1, 0, 18, 20], num_tokens=75, max_query_len=50)
    | dict(heads=(4, 1, 64), page_size=16, pages_per_slot=10),
    {},
  ),
  "chunks_page8_gqa7_everything": (
    dict(kv_lens=[200, 30, 70], query_lens=[20, 4, 11], num_tokens=35, max_query_len=64)
    | dict(heads=(7, 1, 64), page_size=8, pages_per_slot=30)
    | dict(local_window_size=30, sinks=SINKS, logits_soft_cap=2.0, scale=0.3),
    dict(prefill_num_wgs=1),
  ),
  "chunks_page32_block128_gqa3": (
    dict(kv_lens=[66, 257], query_lens=[66, 22], num_tokens=90, max_query_len=90)
    | dict(heads=(6, 2, 64), page_size=32, pages_per_slot=9, local_window_size=100),
    dict(prefill_num_wgs=3, prefill_block_kv=128, prefill_stages=3, num_blocks=2),
  ),
  "chunks_page256_mha_dim256_f16": (
    dict(kv_lens=[100, 257], query_lens=[66, 65], num_tokens=133, max_query_len=80)
    | dict(heads=(1, 1, 256), page_size=256, pages_per_slot=2),
    dict(lanes=1),
  ),
  "chunks_window_within_the_last_page": (  # which is read in place of the one before, what lies past its end included
    dict(kv_lens=[60], query_lens=[3], num_tokens=3, max_query_len=8, heads=(32, 1, 64), page_size=32)
    | dict(pages_per_slot=2, local_window_size=3),
    {},
  ),
  "chunks_beside_three_tokens_of_a_long_sequence": (  # which the second kernel folds, row after row
    dict(kv_lens=[500, 40, 300], query_lens=[1, 40, 3], num_tokens=50, max_query_len=40)
    | dict(heads=(2, 1, 64), page_size=16, pages_per_slot=32),
    dict(lanes=1),
  ),
  "chunks_alone": (  # all in one kernel: one of no keys, and one of fewer tokens than was said
    dict(kv_lens=[90, 1, 0, 150, 64], query_lens=[33, 1, 0, 38, 20], num_tokens=95, max_query_len=50, min_query_len=20)
    | dict(heads=(4, 1, 64), page_size=16, pages_per_slot=10),
    dict(prefill_query_stages=2, prefill_stages=3),
  ),
  "chunks_page64_mha_dim128": (
    dict(kv_lens=[130, 66], query_lens=[130, 1], num_tokens=131, max_query_len=130)
    | dict(heads=(1, 1, 128), page_size=64, pages_per_slot=3, sinks=SINKS[2:3]),
    {},
  ),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  """Chunks of two tiles, and of more where a sequence would have more than four."""
  monkeypatch.setattr(paged_decode_sm90, "CHUNK", 128)
  monkeypatch.setattr(paged_decode_sm90, "ENOUGH_ITEMS", 4)


def quantise(call: dict[str, Any], dtype: str) -> dict[str, Any]:
  """The call with 8-bit pages: int8, or floats that are NaN where no token lies, and scales that are NaN there."""
  rng = np.random.default_rng(1)
  for field in ("k", "v"):
    pool = call[f"{field}_pages"]
    nobodys = np.isnan(pool[..., 0])
    if dtype == "int8":
      pool = np.round(np.nan_to_num(pool, nan=4) * 30)
    call[f"{field}_pages"] = np.asarray(jnp.asarray(pool, dtype))
    scales = rng.uniform(0.5, 2.0, pool.shape[:3]) / (30 if dtype == "int8" else 1)
    call[f"{field}_scales"] = np.where(nobodys, np.nan, scales).astype(np.float32)
  return call


def drawn(quantised: str | None = None, **arguments: Any) -> dict[str, Any]:
  call = cases.paged_call(**arguments)
  return call if quantised is None else quantise(call, quantised)


def attend(
  call: dict[str, Any], dtype: Any = jnp.bfloat16, pages: Any = None, **tiles: int
) -> tuple[np.ndarray, np.ndarray]:
  """Of the call, with another table, if one is given, than its checks saw."""
  fields = ["query"] if "k_scales" in call else ["query", "k_pages", "v_pages"]
  rounded: dict[str, Any] = {x: np.asarray(jnp.asarray(call[x], dtype)) for x in fields}
  problem, operands = paged_problem(**call | rounded)
  operands = operands if pages is None else operands._replace(pages=jnp.asarray(pages))
  with mosaic_help.interpreter():
    return mosaic_help.interpreted(
      lambda operands, interpret: paged_sm90.paged_forward(problem, operands, interpret=interpret, **TILES | tiles),
      operands,
    )


@pytest.mark.parametrize("name", CASES)
def test_is_the_oracle(name):
  arguments, tiles = CASES[name]
  call = drawn(**arguments)
  dtype = jnp.float16 if name.endswith("f16") else jnp.bfloat16
  out, lse = attend(call, dtype, **tiles)
  for field in ["query"] if "k_scales" in call else ["query", "k_pages", "v_pages"]:
    call[field] = np.asarray(jnp.asarray(call[field], dtype), np.float32)
  want_out, want_lse = oracle.paged(**{k: v for k, v in call.items() if k not in BOUNDS})
  assert_close(out, want_out)
  assert_close(lse, want_lse)
  assert (out[want_lse == -np.inf] == 0).all()


def test_neither_the_batch_nor_where_pages_lie_nor_who_computes_matters():
  """Bit for bit, with all that a call can have; and pages before a window, like all that no token owns, may be NaN.

  A sequence of four chunks is folded by one lane alone, by a lane and the second kernel, and by the second kernel.
  """
  arguments: dict[str, Any] = dict(heads=(4, 1, 64), page_size=16, local_window_size=400, max_query_len=3)
  arguments |= dict(sinks=SINKS[:4], logits_soft_cap=2.0, pages_per_slot=34)
  together = cases.paged_call(kv_lens=[20, 534, 70], query_lens=[1, 3, 2], num_tokens=6, **arguments)
  gone = together["pages"][1, : (534 - 3 - 400) // 16]
  together["k_pages"][gone] = together["v_pages"][gone] = np.nan
  out, lse = attend(together, lanes=1, num_blocks=2)
  alone = dict(together, query=together["query"][1:4], kv_lens=together["kv_lens"][1:2])
  for field in ("k_pages", "v_pages"):
    alone[field] = together[field][np.clip(together["pages"][1], 0, None)]
  alone |= dict(pages=np.arange(34, dtype=np.int32)[None], query_starts=np.array([0, 3], np.int32))
  for num_blocks in (1, 4):
    out_alone, lse_alone = attend(alone, lanes=1, num_blocks=num_blocks)
    assert (out_alone == out[1:4]).all() and (lse_alone == lse[1:4]).all()
  assert np.isfinite(out.astype(np.float32)).all()


# name -> (kv_lens, query_lens, (leader, shared pages of 16) of each, heads, tiles, units: their sequences and chunks)
PREFIXES: dict[str, tuple[list[int], list[int], list[tuple[int, int]], tuple[int, int, int], dict[str, int], dict]] = {
  "three_groups_one_with_nothing_of_its_own_and_others": (
    [300, 20, 290, 600, 0, 310, 590, 256, 256],
    [1] * 9,
    [(0, 18), (1, 0), (0, 18), (3, 24), (4, 0), (0, 17), (3, 24), (7, 16), (7, 16)],
    (4, 1, 64),
    dict(lanes=1),
    {(0, 2, 5): 2, (3, 6): 2, (7, 8): 2},
  ),
  "packed": (
    [300, 310, 290, 305],
    [1, 3, 1, 1],
    [(0, 18)] * 4,
    (4, 1, 64),
    dict(lanes=1, num_blocks=2),
    {(0, 2, 3): 2},
  ),
  "dim256": ([300, 310], [1, 1], [(0, 18)] * 2, (2, 1, 256), dict(lanes=1), {(0, 1): 2}),
}


def families(units: paged_decode_sm90.Units) -> dict[tuple[int, ...], int]:
  """The sequences of each family, and how many chunks they share."""
  order = np.argsort(units.place)
  assert sorted(units.place) == list(range(len(order)))
  found = {}
  for first in np.flatnonzero(units.work):
    place, size = int(units.place[first]), int(units.size[first])
    found[tuple(order[place : place + size].tolist())] = int(units.chunks[first])
  return found


@pytest.mark.parametrize("name", PREFIXES)
def test_what_sequences_share_is_read_once_and_no_bit_changes(name):
  kv_lens, query_lens, prefixes, heads, tiles, wanted = PREFIXES[name]
  packed: dict[str, Any] = dict(query_lens=query_lens, num_tokens=sum(query_lens) + 2, max_query_len=max(query_lens))
  call = cases.paged_call(
    kv_lens=kv_lens, heads=heads, page_size=16, pages_per_slot=40, **packed if name == "packed" else {}
  )
  for b, (leader, count) in enumerate(prefixes):
    call["pages"][b, :count] = call["pages"][leader, :count]
  told: dict[str, Any] = call | dict(shared_prefixes=tuple(np.array(prefixes, np.int32).T))

  problem, operands = paged_problem(**told)
  units = paged_decode_sm90.make_units(problem, paged_decode_sm90.make_chunks(problem, 64), 64, operands)
  assert units is not None
  assert families(units) == wanted

  # Nobody but the first of a family is asked where the chunks lie that it shares.
  pages = call["pages"].copy()
  (nobodys,) = np.isnan(call["k_pages"]).all((1, 2, 3)).nonzero()
  for who, chunks in wanted.items():
    chunk = int(paged_decode_sm90.make_chunks(problem, 64).size(-(-kv_lens[who[0]] // 64))) * 64 // 16
    pages[list(who[1:]), : chunks * chunk] = nobodys[0]
  out, lse = attend(call, **tiles)
  out_told, lse_told = attend(told, pages=pages, **tiles)
  alive = slice(None, sum(query_lens))
  assert (out_told[alive] == out[alive]).all() and (lse_told[alive] == lse[alive]).all()
  for field in ("query", "k_pages", "v_pages"):
    call[field] = np.asarray(jnp.asarray(call[field], jnp.bfloat16), np.float32)
  want_out, want_lse = oracle.paged(**{k: v for k, v in call.items() if k not in BOUNDS})
  assert_close(out_told[alive], want_out[alive])
  assert_close(lse_told[alive], want_lse[alive])


def test_who_shares_as_many_chunks_with_the_same_leader_is_a_family():
  """Against sequences sorted by hand into those that share the same chunks with the same leader, a tile at a time."""
  rng = np.random.default_rng(0)
  for case in range(20):
    batch, group = 13, int(rng.choice([4, 20, 21, 32]))
    lens = rng.choice([0, 100, 600, 2000], batch) + rng.integers(0, 17, batch) * (case % 2)
    leaders = rng.choice([0, 3, 5], batch)
    leaders[leaders] = leaders  # each leader leads itself
    pages = np.minimum(np.minimum(lens, lens[leaders]) // 16, rng.choice([0, 30, 125], batch))
    query_lens = rng.integers(1, 3, batch) if case % 3 == 0 else np.ones(batch, int)
    starts = np.concatenate([[0], np.cumsum(query_lens)])
    problem = problem_of(
      num_heads=group, batch=batch, num_tokens=30, max_query_len=2, pages_per_slot=200, has_prefixes=True
    )
    chunks = paged_decode_sm90.make_chunks(problem, 64)
    arrays = dict(kv_lens=lens, query_starts=starts, leaders=leaders, shared_pages=pages)
    unread = dict.fromkeys(("query", "k_pages", "v_pages", "pages"), jnp.zeros(0))
    operands = PagedOperands(**unread, **{name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()})
    units = paged_decode_sm90.make_units(problem, chunks, 64, operands)
    alike: dict[Any, list[int]] = {}
    for b in range(batch):
      size = int(chunks.size(-(-int(lens[b]) // 64)))
      if query_lens[b] == 1 and (shared := pages[b] * 16 // (size * 64)):
        alike.setdefault((leaders[b], size, shared), []).append(b)
    wanted = {tuple(who): shared for (_, _, shared), who in alike.items() if len(who) > 1}
    assert units is not None
    assert families(units) == wanted
    chunks_of = np.zeros(batch, int)
    for who, shared in wanted.items():
      chunks_of[list(who)] = shared
      assert units.work[who[0]] == shared * -(-len(who) // (64 // group))
      assert (units.tokens[units.place[who[0]] :][: len(who)] == starts[list(who)]).all()
      share = functools.partial(paged_decode_sm90.shared_chunk, problem, chunks, 64, operands.kv_lens, units, who[0])
      places, numbers = [], []
      for n in range(int(units.work[who[0]])):
        unit, number = share(n)
        assert 0 < unit.query_len <= 64 // group and unit.kv_len == shared * unit.chunk * 64 <= lens[who[0]]
        places += [(int(number), int(unit.unit) + i) for i in range(int(unit.query_len))]
        numbers.append(int(number))
      first = int(units.place[who[0]])
      assert sorted(places) == [(n, first + i) for n in range(shared) for i in range(len(who))]
      assert numbers == sorted(numbers)
    assert (units.chunks == chunks_of).all()


def test_lanes_have_equal_work_and_a_batch_of_equal_lengths_is_not_cut():
  rng = np.random.default_rng(0)
  for case in range(200):
    batch, heads, lanes = int(rng.integers(1, 300)), int(rng.integers(1, 17)), 264
    lengths = np.full(batch, rng.integers(1, 400)) if case % 2 else rng.zipf(1.5, batch).clip(0, 2000)
    total, longest = int(lengths.sum()), int(lengths.max())
    enough = int(rng.choice([64, 128, lanes]))
    tiles = jnp.int32(total), jnp.int32(longest)
    size, count, *_ = paged_decode_sm90.Segments.cut(lanes // heads, batch, heads, enough, *tiles)
    assert size * count >= total - paged_decode_sm90.COST  # in which nothing begins
    assert size <= -(-total // count) or size * enough <= 2 * total * heads
    assert size <= -(-total // count) or longest * batch <= 2 * total
    if case % 2 and batch * heads >= enough:
      assert size % longest == 0


def test_lanes_have_equal_work_beside_chunks_that_sequences_share():
  rng = np.random.default_rng(0)
  for _ in range(200):
    count, total, longest, shared = (int(rng.integers(*x)) for x in ((1, 70), (0, 2000), (1, 200), (0, 300)))
    of_one = int(rng.integers(2, 40))
    cut = paged_decode_sm90.Segments.cut(count, 7, 8, 128, jnp.int32(total), jnp.int32(longest))
    segments = cut.beside(jnp.int32(total), jnp.int32(shared), jnp.int32(shared * of_one))
    if shared == 0:
      assert [segments.bounds(n) for n in range(count)] == [cut.bounds(n) for n in range(count)]
      continue
    bounds = np.array([segments.bounds(n) for n in range(count)])
    assert bounds[0, 0] == 0 and (bounds[1:, 0] == bounds[:-1, 1]).all() and bounds[-1, 1] >= total
    assert (bounds[:, 0] <= bounds[:, 1]).all()
    chunks = np.array([len(range(n, shared, count)) for n in range(count)])
    work = np.diff(bounds.clip(max=total))[:, 0] + chunks * of_one
    even = -(-(total + shared * of_one) // count)
    assert work.max() <= max(even + 1, chunks.max() * of_one)


def test_one_sequence_gives_each_lane_a_chunk():
  for chunks, chunk in ((16, 4), (33, 31), (1, 5)):
    line = jnp.int32(chunks * chunk + paged_decode_sm90.COST)
    size, *_ = paged_decode_sm90.Segments.cut(chunks, 1, 8, 128, line, line)
    assert len({n * chunk // int(size) for n in range(chunks)}) == chunks


def pretend_warp(monkeypatch):
  """A warp is `jax.vmap` over its 32 lanes."""

  def over_warp(operation, x):
    if operation == "before":
      return jnp.where(jnp.arange(32) < jax.lax.axis_index("lane"), jax.lax.all_gather(x, "lane"), 0).sum()
    return dict(add=jax.lax.psum, max=jax.lax.pmax)[operation](x, "lane")

  monkeypatch.setattr(mosaic, "thread", lambda: 96 + jax.lax.axis_index("lane"))
  monkeypatch.setattr(mosaic, "over_warp", over_warp)


@pytest.mark.parametrize("is_warp", [False, True])
@pytest.mark.parametrize("batch", [1, 5, 32, 77])
def test_where_sequences_lie_on_the_line(batch, is_warp, monkeypatch):
  """In the interpreter's loop, and in a warp."""
  pretend_warp(monkeypatch)
  rng = np.random.default_rng(batch)
  lengths = rng.zipf(1.5, batch).clip(0, 50).astype(np.int32) * rng.integers(0, 2, batch, np.int32)
  ends = np.cumsum(lengths)
  line = paged_decode_sm90.Line(batch, lambda b: jnp.asarray(lengths)[b], interpret=not is_warp)
  places = rng.integers(0, ends[-1] + 5, 9).astype(np.int32)
  bound = int(rng.integers(1, 50))

  @jax.jit
  @functools.partial(jax.vmap, axis_name="lane", axis_size=32)
  def look():
    return line.measure(), line.find(*places), line.longest_below(bound)

  def wanted(place):
    index = np.searchsorted(ends, place, side="right")
    return index, ends[index - 1] if index else 0

  want = (ends[-1], lengths.max()), [wanted(x) for x in places]
  want += (max([0, *lengths[lengths < bound]]),)
  for got, x in zip(jax.tree.leaves(look()), jax.tree.leaves(want), strict=True):
    assert (got == x).all()


def test_a_chunk_does_not_depend_on_its_batch():
  """Bit for bit, nor on how many rows a tile has; and pages before a window may be NaN."""
  arguments: dict[str, Any] = dict(heads=(4, 1, 64), page_size=16, local_window_size=50, max_query_len=40)
  together = cases.paged_call(
    kv_lens=[70, 20, 150], query_lens=[30, 1, 40], num_tokens=75, pages_per_slot=10, **arguments
  )
  gone = together["pages"][2, : (110 - 50) // 16]
  together["k_pages"][gone] = together["v_pages"][gone] = np.nan
  out, lse = attend(together)
  assert np.isfinite(out.astype(np.float32)).all()
  alone = dict(together, query=together["query"][31:71], kv_lens=together["kv_lens"][2:])
  alone |= dict(pages=together["pages"][2:], query_starts=np.array([0, 40], np.int32))
  for told, tiles in (({}, dict(num_blocks=2)), (dict(min_query_len=40), dict(prefill_num_wgs=1))):
    out_alone, lse_alone = attend(alone | told, **tiles)
    assert (out_alone == out[31:71]).all() and (lse_alone == lse[31:71]).all()


def test_inactive_slots_give_nothing():
  """Whatever tokens they have, and although their table entries are nonsense."""
  lens = [40, 3, 20]
  arguments: dict[str, Any] = dict(heads=(4, 1, 64), page_size=16, pages_per_slot=4, max_query_len=63)
  call = cases.paged_call(kv_lens=lens, query_lens=lens, num_tokens=63, **arguments)
  rounded: dict[str, Any] = {x: np.asarray(jnp.asarray(call[x], jnp.bfloat16)) for x in ("query", "k_pages", "v_pages")}
  problem, operands = paged_problem(**call | rounded)
  inactive = operands._replace(
    kv_lens=operands.kv_lens.at[:2].set(0), pages=operands.pages.at[0].set(2**30).at[1].set(-1)
  )
  run = lambda operands, interpret: paged_sm90.paged_forward(problem, operands, interpret=interpret, **TILES)  # noqa: E731
  with mosaic_help.interpreter():
    out, lse = mosaic_help.interpreted(run, inactive)
  assert (out[:43] == 0).all() and (lse[:43] == -np.inf).all()
  assert np.isfinite(lse[43:]).all() and out[43:].any((1, 2)).all()


@pytest.mark.parametrize("is_warp", [False, True])
def test_sequences_come_about_the_longest_first(is_warp, monkeypatch):
  """Against sorting: those that have more query tokens than the decode kernel takes; and tokens that get nothing."""
  block_q, block_kv, batch, few, tokens = 64, 64, 5, 16, 301
  problem = problem_of(num_heads=4, batch=batch, num_tokens=tokens, max_query_len=100)
  assert paged_decode_sm90.max_tokens(problem) == few
  pretend_warp(monkeypatch)

  @jax.jit
  @functools.partial(jax.vmap, axis_name="lane", axis_size=32, in_axes=None)
  def look(starts, lens):
    order = paged_prefill_sm90.Order(problem, few, block_q, block_kv, starts, lens, interpret=not is_warp)
    one = lambda key, _: (order.next(key)[0], order.next(key))  # noqa: E731
    keys, found = jax.lax.scan(one, jnp.int32(2**31 - 1), length=batch)[1]
    dead = order.dead()
    sizes = [dead.length(b) for b in range(batch + 1)]
    return order.count(), keys, found, order.tiles(found), dead.measure()[0], sizes

  for seed in range(10):
    rng = np.random.default_rng(seed)
    query_lens = rng.choice([0, 1, few, few + 1, 32, 33, 64, 100], batch)
    query_lens = np.where(np.cumsum(query_lens) > tokens, 0, query_lens)
    kv_lens = np.where(rng.random(batch) < 0.2, 0, query_lens + rng.choice([0, 70, 1000], batch))
    starts = np.concatenate([[0], np.cumsum(query_lens)])
    lanes = look(*(jnp.asarray(x, jnp.int32) for x in (starts, kv_lens)))
    assert all((x == x[:1]).all() for x in jax.tree.leaves(lanes))
    (count, num_tiles), keys, found, tiles, dead, of_each = jax.tree.map(lambda x: np.asarray(x)[0], lanes)
    mine = [b for b in range(batch) if query_lens[b] > few and kv_lens[b]]
    mine.sort(key=lambda b: (-(-kv_lens[b] // block_kv), b), reverse=True)  # the most KV tiles first
    assert list(found[:count]) == mine and (keys[:count] > 0).all() and (keys[count:] == 0).all()
    assert list(tiles[:count]) == [-(-query_lens[b] * 4 // block_q) for b in mine] and num_tiles == tiles[:count].sum()
    nothing = [n if n > few and not kv_len else 0 for n, kv_len in zip(query_lens, kv_lens, strict=True)]
    nothing.append(tokens - starts[-1])
    assert list(of_each) == nothing and dead == sum(nothing)


def test_four_lanes_turn_what_they_hold_of_a_row(monkeypatch):
  """So that each has 16 bytes of it; lanes are elements of arrays here."""
  lane = np.arange(4)
  words = [np.array([f"word {i} of lane {j}" for j in lane]) for i in range(4)]
  monkeypatch.setattr(mosaic, "ir", mock.MagicMock())
  arith: dict[str, Any] = dict(remui=np.remainder, andi=np.bitwise_and, cmpi=lambda _, x, y: x != y, select=np.where)
  monkeypatch.setattr(mosaic, "arith", mock.MagicMock(**arith))
  utils: dict[str, Any] = dict(
    thread_idx=lambda: lane + 8, c=lambda x, _: x, shfl_bfly=lambda x, distance: x[lane ^ distance]
  )
  monkeypatch.setattr(mosaic, "mgpu", types.SimpleNamespace(utils=types.SimpleNamespace(**utils)))
  assert [list(x) for x in mosaic._turn_quad(words)] == [[f"word {j} of lane {i}" for j in lane] for i in range(4)]


@pytest.mark.parametrize("tokens", [1, 100, 511, 512, 513, 8192, 40_000, 131_072])
def test_chunks_depend_on_the_length_alone_and_are_few(tokens, monkeypatch):
  monkeypatch.undo()
  short, long = (problem_of(pages_per_slot=pages, num_heads=32, num_kv_heads=8) for pages in (2**13, 2**20))
  tiles = -(-tokens // 64)
  sizes = [int(paged_decode_sm90.make_chunks(problem, 64).size(tiles)) for problem in (short, long)]
  assert sizes[0] == sizes[1] >= 512 // 64
  assert -(-tiles // sizes[0]) <= 32
  assert sizes[0] == 512 // 64 or -(-tiles // (sizes[0] // 2)) > 32


# --- what is supported ------------------------------------------------------------------------------------------------


def problem_of(page_size=16, dim=64, dtype=jnp.bfloat16, kv_dtype=None, device="nvidia_h200", scale=0.1, **changes):
  pages = jnp.zeros((2, page_size, 1, dim), kv_dtype or dtype)
  scales: dict[str, Any] = (
    {} if kv_dtype is None else dict(k_scales=jnp.ones(pages.shape[:3]), v_scales=jnp.ones(pages.shape[:3]))
  )
  table, lens = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
  problem, _ = paged_problem(jnp.zeros((1, 4, dim), dtype), pages, pages, table, lens, scale=scale, **scales)
  return dataclasses.replace(problem, device=device, **changes)


@pytest.mark.parametrize(
  "problem, reason",
  [
    (problem_of(), ""),
    (problem_of(256, 256, jnp.float16, max_query_len=1000), ""),
    (problem_of(8, 128, window=100, soft_cap=3.0, has_sinks=True), ""),
    (problem_of(device="cpu"), "it runs on Hopper GPUs such as the H200, not on cpu"),
    (problem_of(dtype=jnp.float32), "it takes bfloat16 and float16, not float32"),
    (problem_of(kv_dtype=jnp.int8), ""),
    (problem_of(dtype=jnp.float16, kv_dtype=jnp.int8), "it takes 8-bit pages with bfloat16 queries, not with float16"),
    (
      problem_of(kv_dtype=jnp.int8, max_query_len=17),
      "it takes 8-bit pages with max_query_len up to 16 with these heads, not 17",
    ),
    (problem_of(scale=-1.0), "it wants a positive scale, not -1.0"),
    (problem_of(dim=96), "it wants head_dim 64, 128 or 256, not 96"),
    (problem_of(4), "it wants a page_size that is a power of two from 8 to 256, not 4"),
    (problem_of(24), "it wants a page_size that is a power of two from 8 to 256, not 24"),
    (problem_of(num_heads=64), ""),
    (problem_of(num_heads=64, max_query_len=2), ""),
    (problem_of(num_heads=65), "it wants at most 64 query heads for each KV head, not 65"),
  ],
)
def test_supports_says_why_not(problem, reason):
  assert paged_sm90.supports(problem) == reason


def test_flash_attention_is_not_supported():
  x = jnp.zeros((1, 4, 2, 64), jnp.bfloat16)
  assert paged_sm90.supports(flash_problem(x, x, x)[0]) == "it serves paged_attention only"


# --- lowering ---------------------------------------------------------------------------------------------------------

SHARED: dict[str, Any] = dict(is_shared=True)
# name -> (B, P, page_size, H, K, D, query tokens, arguments)
CONFIGURATIONS: dict[str, tuple[Any, ...]] = {
  f"page{page}-{dim}": (64, 4096 // page, page, 32, 8, dim, 1, {})
  for page in (8, 16, 32, 64, 128, 256)
  for dim in (64, 128, 256)
  if dim == 128 or page == 16
}
CONFIGURATIONS |= {
  "short": (64, 16, 16, 32, 8, 128, 1, {}),
  "long": (1, 8192, 16, 32, 8, 128, 1, {}),
  "mha": (64, 256, 16, 32, 32, 128, 1, {}),
  "9-3-64": (256, 64, 16, 9, 3, 64, 1, {}),
  "group7-window": (8, 256, 16, 28, 4, 128, 1, dict(local_window_size=1000)),
  "everything": (
    *(8, 256, 8, 32, 8, 128, 4),
    dict(local_window_size=1000, logits_soft_cap=30.0, sinks=jax.ShapeDtypeStruct((32,), jnp.float32)),
  ),
  **{
    f"{dtype}-{page}-{dim}": (64, 4096 // page, page, 32, 8, dim, 1, dict(kv_dtype=dtype))
    for dtype, page, dim in (*(("int8", 16, 128), ("float8_e4m3fn", 8, 64), ("float8_e5m2", 256, 256)),)
  },
  "int8-everything": (
    *(8, 256, 16, 9, 3, 128, 4),
    dict(local_window_size=1000, logits_soft_cap=30.0, sinks=jax.ShapeDtypeStruct((9,), jnp.float32), kv_dtype="int8"),
  ),
  "everything-256": (8, 64, 64, 4, 4, 256, 16, dict(local_window_size=300, logits_soft_cap=30.0)),
  "shared": (32, 2100, 16, 32, 8, 128, 1, SHARED | dict(sinks=jax.ShapeDtypeStruct((32,), jnp.float32))),
  "shared-int8": (32, 520, 64, 32, 8, 128, 1, SHARED | dict(kv_dtype="int8")),
  "shared-packed": (32, 256, 16, 8, 8, 64, 4, SHARED),
  "shared-dim256": (32, 64, 64, 4, 2, 256, 1, SHARED),
}
# Chunks of more tokens than the decode kernel takes.
CONFIGURATIONS |= {
  f"chunks-page{page}-{dim}": (8, 4096 // page, page, 32, 8, dim, 256, {})
  for page, dim in ((8, 128), (16, 64), (16, 128), (16, 256), (128, 128), (256, 256))
}
CONFIGURATIONS |= {
  "chunks-mha": (8, 256, 16, 32, 32, 128, 100, {}),
  "chunks-alone": (8, 256, 16, 32, 8, 128, 100, dict(min_query_len=17)),
  "chunks-16": (8, 256, 16, 32, 8, 128, 100, dict(min_query_len=16)),
  "chunks-group3-64": (8, 64, 16, 9, 3, 64, 100, {}),
  "chunks-group64": (8, 256, 16, 128, 2, 64, 100, {}),
  "chunks-group7-window": (8, 256, 16, 28, 4, 128, 100, dict(local_window_size=1000)),
  "chunks-everything-256": (
    *(8, 256, 8, 32, 8, 256, 40),
    dict(local_window_size=1000, logits_soft_cap=30.0, sinks=jax.ShapeDtypeStruct((32,), jnp.float32)),
  ),
}


def shapes(batch, pages_per_slot, page_size, heads, kv_heads, dim, tokens, arguments, num_pages=None):
  """The arrays of a call, shapes only, and its other arguments; the pool is three times what is needed."""
  struct = jax.ShapeDtypeStruct
  arguments = dict(arguments)
  kv_dtype, is_shared = arguments.pop("kv_dtype", None), arguments.pop("is_shared", False)
  pool = struct((num_pages or 3 * batch * pages_per_slot, page_size, kv_heads, dim), kv_dtype or jnp.bfloat16)
  arrays: dict[str, Any] = dict(
    query=struct((batch * tokens, heads, dim), jnp.bfloat16),
    k_pages=pool,
    v_pages=pool,
    pages=struct((batch, pages_per_slot), jnp.int32),
    kv_lens=struct((batch,), jnp.int32),
  )
  if kv_dtype:
    arrays |= {name: struct(pool.shape[:3], jnp.float32) for name in ("k_scales", "v_scales")}
  if tokens > 1:
    arrays["query_starts"] = struct((batch + 1,), jnp.int32)
  if is_shared:
    arrays["shared_prefixes"] = (arrays["kv_lens"], arrays["kv_lens"])
  arrays |= {name: x for name, x in arguments.items() if isinstance(x, struct)}
  return arrays, dict(max_query_len=tokens) | {name: x for name, x in arguments.items() if not isinstance(x, struct)}


def lowered(arrays, options) -> str:
  options = options | dict(implementation="sm90")

  def run(arrays):
    assert "\n  runs sm90, lanes=" in pf.explain(pf.paged_attention, **arrays, **options)
    return pf.paged_attention(**arrays, **options, return_residual=True)

  return mosaic_help.lowered(run, arrays)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_lowering(name, monkeypatch):
  monkeypatch.undo()
  arrays, options = shapes(*CONFIGURATIONS[name])
  text = lowered(arrays, options)
  _, pages_per_slot, page_size, *_ = CONFIGURATIONS[name]
  has_one_chunk = pages_per_slot * page_size <= 1024 or name == "everything-256"
  decode = 0 if name == "chunks-alone" else 1 if has_one_chunk else 2
  assert mosaic_help.count_kernels(text) == decode + ("chunks" in name)
  assert mosaic_help.largest_array(text) == arrays["k_pages"].size


def test_a_pool_of_more_than_2_31_elements_lowers(monkeypatch):
  monkeypatch.undo()
  arrays, options = shapes(*CONFIGURATIONS["page16-128"], num_pages=2**20)
  assert arrays["k_pages"].size > 2**31
  assert mosaic_help.count_kernels(lowered(arrays, options)) == 2


def test_a_mapped_axis_lowers(monkeypatch):
  monkeypatch.undo()
  arrays, options = shapes(*CONFIGURATIONS["short"])
  queries = jax.ShapeDtypeStruct((3, *arrays["query"].shape), jnp.bfloat16)

  def run(queries, arrays):
    attend = lambda query: pf.paged_attention(**arrays | {"query": query}, **options, implementation="sm90")  # noqa: E731
    return jax.vmap(attend)(queries)

  assert mosaic_help.count_kernels(mosaic_help.lowered(run, queries, arrays)) == 1


def test_a_call_that_is_not_supported_takes_xla_or_says_why_not(monkeypatch):
  arrays, options = shapes(8, 256, 4, 32, 8, 128, 1, {})
  why = "it wants a page_size that is a power of two from 8 to 256, not 4"
  with pretend("NVIDIA H200"):
    text = []
    jax.eval_shape(lambda arrays: text.append(pf.explain(pf.paged_attention, **arrays, **options)), arrays)
    assert "  runs xla, " in text[0] and f"  sm90: {why}" in text[0]
    with pytest.raises(ValueError, match=f"'sm90' does not support this call: {why}"):
      jax.eval_shape(lambda arrays: pf.paged_attention(**arrays, **options, implementation="sm90"), arrays)
