"""Models that see a sliding window: pages behind it are let go while a request runs, and its tokens stay the same.

The stand-in model writes into each page, beside the token, a hash of all tokens up to it, made from the hash before it,
which it reads through the page table; the next token is a hash of those in the window. So a page let go too early, or
one that holds the same tokens after another beginning, changes what is said.
"""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_flash import history, models, policies
from paged_flash.cache import kv_pages, page_table
from paged_flash.cache.page_table import NO_PAGE
from paged_flash.engine import Engine
from paged_flash.kernels import reference, xla
from paged_flash.kernels.arguments import paged_problem
from paged_flash.requests import Params
from paged_flash.state import LENGTH, LIVE, NOBODY, STOP
from tests import test_engine
from tests.kernels import cases
from tests.test_scheduler import VOCAB, Server, commit, packer, planner, prompt_of


def hashed(*values) -> int:
  return zlib.crc32(np.asarray(values, np.int64).tobytes())


def expected(prompt, params: Params, window) -> tuple[list[int], int]:
  """Output tokens and reason to end of a request served alone, with no pages anywhere."""
  chain, out = [0], []
  for token in prompt:
    chain.append(hashed(chain[-1], token))
  while True:
    out.append(1 + hashed(*chain[1:][-window:]) % (VOCAB - 1))
    chain.append(hashed(chain[-1], out[-1]))
    if out[-1] in params.stop_ids and len(out) >= params.min_tokens:
      return out, STOP
    if len(out) >= params.max_tokens:
      return out, LENGTH


class WindowServer(Server):
  """`Server`, with the stand-in model described above."""

  def __init__(self, *, window, **sizes):
    super().__init__(**sizes)
    self.window = window
    self.state = dataclasses.replace(self.state, table=dataclasses.replace(self.state.table, window=window))
    if (host := self.state.host) is not None:
      self.state = dataclasses.replace(self.state, host=dataclasses.replace(host, window=window))
    self.chains = np.zeros(self.contents.shape, np.int64)
    self.host_chains = np.zeros(self.host_contents.shape, np.int64)
    self.most_held = self.forgotten = 0

  def stores(self):
    return [*super().stores(), (self.chains, self.host_chains)]

  def step(self):
    before = self.state
    state, plan = planner(self.budget, self.chunk, self.policy, self.preemption)(before)
    self.swap(plan)
    page_table.check(state.table)
    if state.index is not None:
      assert before.index is not None
      gone = before.index.cached & ~state.index.cached & (state.table.ref_counts > 0)
      self.forgotten += int(gone.sum())
    scheduled, size = np.asarray(plan.scheduled), state.table.page_size
    packed = packer(None if bool(plan.decode_only) else self.budget)(state, plan)
    for src, dst in zip(np.asarray(plan.copies.src), np.asarray(plan.copies.dst), strict=True):
      if dst != NO_PAGE:
        self.contents[dst], self.chains[dst] = self.contents[src], self.chains[src]
    refs, pages = np.asarray(state.table.ref_counts), np.asarray(state.table.pages)
    slots = np.arange(self.slots) if bool(plan.decode_only) else np.repeat(np.arange(self.slots), scheduled)
    for i, slot in enumerate(slots):
      page, offset, position = int(packed.pages[i]), int(packed.offsets[i]), int(packed.positions[i])
      if page == NO_PAGE:
        continue
      assert refs[page] == 1, "a shared page is written"
      last = 0
      if position:
        assert (held := pages[slot, (position - 1) // size]) != NO_PAGE
        last = self.chains[held, (position - 1) % size]
      self.contents[page, offset] = packed.tokens[i]
      self.chains[page, offset] = hashed(last, int(packed.tokens[i]))
    tokens = np.zeros(self.slots, np.int32)
    for slot in np.flatnonzero(scheduled):
      seen = np.arange(int(packed.kv_lens[slot]))[-self.window :]
      assert (pages[slot, seen // size] != NO_PAGE).all(), "a page in the window is gone"
      tokens[slot] = 1 + hashed(*self.chains[pages[slot, seen // size], seen % size]) % (VOCAB - 1)
    self.state, events = commit(state, plan, jnp.asarray(tokens)[:, None], jnp.zeros((self.slots, 1)))
    self.check()
    pages = np.asarray(self.state.table.pages)
    self.most_held = max(self.most_held, int((pages >= 0).sum(axis=1).max()))
    first = np.maximum(np.asarray(self.state.table.seq_lens) - max(self.window, size + 1) + 1, 0) // size
    assert (pages[np.arange(pages.shape[1]) < first[:, None]] == NO_PAGE).all(), "a page behind the window is held"
    for slot in np.flatnonzero(np.asarray(events.ids) != NOBODY):
      id = int(events.ids[slot])
      self.got[id].append(int(events.tokens[slot, 0]))
      if events.finish[slot] != LIVE:
        self.ended[id] = int(events.finish[slot])
    if int(events.ended) != NOBODY:
      self.ended[int(events.ended)] = LENGTH
    self.log.append((plan, events))
    return plan, events

  def finish(self):
    self.drain()
    for id, (prompt, params) in self.asked.items():
      if id in self.ended:
        assert (self.got[id], self.ended[id]) == expected(prompt, params, self.window), f"request {id}"
    assert int(self.state.table.num_free) == self.state.table.num_pages


# The table.


def test_trim_lets_go_of_what_no_later_token_sees():
  table = page_table.init(num_slots=3, pages_per_slot=8, num_pages=16, page_size=4, window=6)
  table, _, _ = page_table.extend(table, jnp.array([15, 5, 0]))
  table = page_table.fork(table, parent=0, child=2)
  trimmed = page_table.trim(table)
  # Token 15 sees tokens 10 to 15, token 5 tokens 0 to 5.
  assert trimmed.pages[:, :4].tolist() == [[-1, -1, 2, 3], [4, 5, -1, -1], [-1, -1, 2, 3]]
  assert trimmed.ref_counts[:6].tolist() == [0, 0, 2, 2, 1, 1] and trimmed.seq_lens.tolist() == [15, 5, 15]
  for t in (table, trimmed, page_table.release(trimmed, jnp.array([True, False, True]))):
    page_table.check(t)
  grown, _, granted = page_table.extend(trimmed, jnp.array([9, 0, 0]))
  assert granted.all() and int((grown.pages[0] >= 0).sum()) == 2 + 2


@pytest.mark.parametrize("window, wanted", [(1, [-1, 1]), (2, [-1, 1]), (5, [-1, 1]), (6, [0, 1])])
def test_the_page_before_the_next_is_kept_for_what_hangs_on_it(window, wanted):
  table = page_table.init(num_slots=1, pages_per_slot=8, num_pages=16, page_size=4, window=window)
  table, _, _ = page_table.extend(table, jnp.array([8]))
  assert page_table.trim(table).pages[0, :2].tolist() == wanted


def test_check_catches_a_hole_in_the_window():
  table = page_table.init(num_slots=1, pages_per_slot=8, num_pages=16, page_size=4, window=6)
  table, _, _ = page_table.extend(table, jnp.array([15]))
  for places in ([2], [0, 1, 2], [1]):  # seen; seen; behind the window, but after one that is there
    broken = dataclasses.replace(
      table,
      pages=table.pages.at[0, jnp.array(places)].set(NO_PAGE),
      ref_counts=table.ref_counts.at[jnp.array(places)].set(0),
    )
    with pytest.raises(AssertionError, match="pages do not match seq_lens"):
      page_table.check(broken)


# The kernels.


@pytest.mark.parametrize("kernel", [xla, reference], ids=["xla", "reference"])
@pytest.mark.parametrize("query_lens", [None, [9, 1, 0, 1, 11]], ids=["decode", "mixed"])
def test_attention_never_reads_a_page_that_was_let_go(kernel, query_lens):
  lens: dict[str, Any] = dict(kv_lens=[9, 30, 0, 16, 48], local_window_size=5)
  if query_lens is not None:
    lens |= dict(query_lens=query_lens, num_tokens=25, max_query_len=11)
  call = cases.paged_call(**lens)
  size = call["k_pages"].shape[1]
  tiles = dict(block_q=4, block_kv=2 * size, lanes=3) if kernel is xla else {}
  run = jax.jit(lambda operands, problem: kernel.paged_forward(problem, operands, **tiles), static_argnums=1)
  whole = run(*reversed(paged_problem(**call)))
  for b, kv_len in enumerate(lens["kv_lens"]):
    first = max(kv_len - (1 if query_lens is None else query_lens[b]) - 5, 0) // size
    gone = call["pages"][b, :first].copy()
    call["pages"][b, :first] = NO_PAGE
    for name in ("k_pages", "v_pages"):
      call[name][gone] = np.nan
  for name in ("k_pages", "v_pages"):  # what NO_PAGE may be mistaken for
    if 0 not in call["pages"]:
      call[name][0] = np.nan
  assert (call["pages"][4, :2] == NO_PAGE).all()
  for a, b in zip(whole, run(*reversed(paged_problem(**call))), strict=True):
    np.testing.assert_array_equal(a, b)


# The scheduler.


SMALL: dict[str, Any] = dict(window=6, slots=3, pages=9, page_size=4, budget=8, max_seq_len=64)  # 4 pages at once


def test_scenario_16_pages_behind_the_window_are_let_go_while_the_request_runs():
  server = WindowServer(**SMALL)
  common = prompt_of(21, 9)
  server.submit([*common, *prompt_of(3, 1)], max_tokens=30)
  server.submit([*common, *prompt_of(9, 2)], max_tokens=20)
  server.submit(prompt_of(40, 3), max_tokens=20)  # longer than the pool
  server.finish()
  assert server.most_held <= page_table.window_pages(6, 8, 4) == 4 < 60 // 4
  assert len(server.ended) == 3


def test_scenario_16_a_hit_holds_only_the_pages_of_the_last_window():
  server = WindowServer(**SMALL)
  prompt = prompt_of(26)
  server.submit(prompt, max_tokens=3)
  server.finish()
  server.submit([*prompt[:25], 1, 2], max_tokens=3)
  plan, events = server.step()
  assert int(plan.cached[0]) == 24 and int(plan.scheduled[0]) == 3
  assert int(events.pages_held) == 3 < 7  # tokens 19 to 26
  # What was found and is not held got in line behind all let go before, and in itself the tail before the head.
  index, page, chain = server.state.index, int(server.state.table.pages[0, 5]), []
  while (page := int(index.before[page])) >= 0:
    chain.append(int(index.freed[page]))
  assert len(chain) == 5 and chain[0] == int(index.freed.max()) and chain[1:] == sorted(chain[1:])
  server.finish()


def test_a_page_is_not_found_without_the_pages_before_it():
  """The same window after another beginning must not be taken for it: what hangs on an evicted page is forgotten."""
  server = WindowServer(**SMALL)
  tail = prompt_of(8, 5)
  a, b, c = ([*prompt_of(12, seed), *tail, 7] for seed in (1, 2, 3))
  for prompt in (a, b, a, c, b, a):  # five pages each to be found, and nine in all
    server.submit(prompt, max_tokens=20)
    server.finish()
  assert server.forgotten > 0


def test_samples_share_only_what_both_see():
  server = WindowServer(**SMALL)
  server.submit_samples(prompt_of(22), 5, max_tokens=12)  # the last come when the window of the first has moved on
  server.finish()
  assert len({tuple(got) for got in server.got.values()}) == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
  "sizes",
  [
    SMALL | dict(slots=4, pages=6, queue=6),
    dict(window=2, slots=4, pages=5, page_size=3, budget=7, chunk=4, max_seq_len=48),
  ],
  ids=["window 6", "window 2, odd"],
)
def test_starved_pools_and_odd_sizes(seed, sizes):
  """Prompts that begin alike, cancelled or not, on pools that cannot satisfy everyone."""
  rng = np.random.default_rng(seed)
  server = WindowServer(policy=policies.by_priority, **sizes)
  for i in range(4):  # all fit, and then grow
    server.submit(prompt_of(2, i), max_tokens=20)
  beginnings = [prompt_of(int(n), i) for i, n in enumerate(rng.integers(1, 26, 3))]
  for i in range(10):
    prompt = [*beginnings[rng.integers(3)][: rng.integers(1, 26)], *prompt_of(int(rng.integers(1, 8)), i)]
    samples = int(rng.choice([1, 1, 2]))
    server.submit_samples(prompt, samples, max_tokens=int(rng.integers(1, 13)), priority=int(rng.integers(0, 3)))
    for _ in range(rng.integers(0, 8)):
      server.step()
    if rng.random() < 0.2:
      server.cancel(int(rng.choice(sorted(server.asked))))
  server.finish()
  assert sum(int((events.preempted != NOBODY).sum()) for _, events in server.log) > 0


# The engine.


@pytest.fixture(scope="module")
def windowed():
  model = models.load(dataclasses.replace(test_engine.TINY, sliding_window=7), seed=4)
  alone, asked = test_engine.Alone(model), []
  draw: dict[str, Any] = dict(temperature=0.9, seed=7)
  head = test_engine.prompt_of(30)
  for prompt, params in (
    (test_engine.prompt_of(2), Params(max_tokens=20)),
    (test_engine.prompt_of(3), Params(max_tokens=25, **draw)),
    (test_engine.prompt_of(4), Params(max_tokens=20)),
    (head, Params(max_tokens=40)),
    ([*head, 5, 6], Params(max_tokens=30, **draw)),
    (test_engine.prompt_of(58), Params(max_tokens=25)),
    (head[:26], Params(max_tokens=20)),
  ):
    asked.append((prompt, params, *alone.generate(prompt, params)))
  return model, asked


@pytest.mark.parametrize("driver, cache, num_proposed", [("host", False, 0), ("device", True, 0), ("host", True, 3)])
def test_tokens_with_a_sliding_window_on_a_starved_pool(windowed, driver, cache, num_proposed):
  model, asked = windowed
  sizes: dict[str, Any] = dict(num_slots=4, num_pages=6, page_size=4, token_budget=8, steps_per_dispatch=7)
  engine = Engine(model, prefix_cache=cache, num_proposed=num_proposed, debug=True, **sizes)
  assert engine.max_seq_len == 128 > 6 * 4  # what the model allows, not the pool
  preempted = []
  requests = [(prompt, params) for prompt, params, *_ in asked]
  results = engine.complete(requests, driver=driver, on_events=lambda events: preempted.extend(events.preempted))
  test_engine.check_against(asked, results)
  assert preempted


def test_a_pool_that_cannot_hold_a_window_bounds_the_request(windowed):
  engine = Engine(windowed[0], num_slots=2, num_pages=4, page_size=2, token_budget=8)
  assert engine.max_seq_len == 8


def test_a_fork_computes_again_what_the_window_needs(windowed):
  model, asked = windowed
  engine = Engine(model, num_slots=3, num_pages=12, page_size=4, token_budget=8, debug=True)
  run = history.record(engine)
  for prompt, params, *_ in asked[2:5]:
    run, _ = run.submit(prompt, max_tokens=params.max_tokens, temperature=params.temperature, seed=params.seed)
  for _ in range(25):
    run, _ = run.step()
  assert (np.asarray(run.now.scheduler.table.pages)[:, 0] == NO_PAGE).any()
  fork, got = run.fork_from(20), {}
  while not fork.now.idle:
    fork, _ = fork.step()
  for id, (_, _, out, _) in enumerate(asked[2:5]):
    got[id] = engine.output(fork.now, id)
    assert got[id] == out
  assert "ended: length" in fork.explain(0)


def test_a_resized_pool_keeps_its_pages():
  kv = kv_pages.init(num_layers=2, num_pages=3, page_size=1, num_kv_heads=1, head_dim=1, dtype=jnp.float32)
  kv = dataclasses.replace(kv, k=jnp.arange(6.0).reshape(6, 1, 1, 1))
  wide = kv_pages.resize(kv, 5)
  assert wide.k.ravel().tolist() == [0, 1, 2, 0, 0, 3, 4, 5, 0, 0] and wide.num_pages == 5
  np.testing.assert_array_equal(kv_pages.resize(wide, 3).k, kv.k)
