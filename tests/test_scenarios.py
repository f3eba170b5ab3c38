"""Acceptance scenarios of a paged KV manager and a continuous-batching scheduler, told without a model.

Each test is named after its scenario: 1 to 21 are about pages, 22 to 33 about the schedule. Those about the prefix
index alone stand in `tests/cache/test_prefix.py`. Sources: the test suites of vLLM, SGLang and Levanter, in our words.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_flash import models, policies, scheduler
from paged_flash.cache import kv_pages, page_table, prefix
from paged_flash.cache.page_table import NO_PAGE
from paged_flash.engine import Engine
from paged_flash.models import ModelConfig
from paged_flash.requests import Params
from paged_flash.state import CANCELLED, LENGTH, LIVE, NOBODY, STOP
from tests.test_scheduler import VOCAB, Server, expected, planner, prompt_of

extend = jax.jit(page_table.extend)
fork = jax.jit(page_table.fork)
release = jax.jit(page_table.release)
write = jax.jit(kv_pages.write, static_argnums=1)
copy = jax.jit(kv_pages.copy)


def admissions(server):
  """The requests that got a slot, in order, with the tokens that they need not compute."""
  return [
    (int(id), int(cached))
    for _, events in server.log
    for id, cached in zip(events.admitted.tolist(), events.cached.tolist(), strict=True)
    if id != NOBODY
  ]


def preempted(server):
  return [int(id) for _, events in server.log for id in events.preempted if id != NOBODY]


# Allocator and page table.


def test_scenario_08_a_prompt_found_whole_computes_its_last_page():
  server = Server()
  for n in (16, 16, 17):  # of pages of 4
    server.submit(prompt_of(17)[:n], max_tokens=2)
    server.finish()
  # Of 16 tokens three pages are taken over: the last token's logits are needed, and it stands in the fourth.
  assert admissions(server) == [(0, 0), (1, 12), (2, 16)]
  assert server.got[0] == server.got[1]


def test_scenario_09_growth_in_decode_fills_pages_that_others_find():
  server = Server()
  first = server.submit(prompt_of(6), max_tokens=12)
  free, cached = [], []
  for _ in range(7):
    server.step()
    free.append(int(server.state.table.num_free))
    cached.append(len(server.cached(server.state)))
  # 6 tokens, then one a step. A page is granted for the 9th token and found once it is full.
  assert free == [14, 14, 14, 13, 13, 13, 13]
  assert cached == [1, 1, 2, 2, 2, 2, 3]
  tokens = [*prompt_of(6), *server.got[first]]
  server.submit([*tokens[:12], 1], max_tokens=1)
  server.step()
  assert admissions(server)[-1] == (1, 12)
  server.finish()


def test_scenario_10_without_the_prefix_cache_nothing_is_found():
  server = Server(cache=False)
  for _ in range(4):
    server.submit(prompt_of(12), max_tokens=6)
    server.finish()
  assert server.state.index is None
  assert [cached for _, cached in admissions(server)] == [0] * 4
  assert all(int(events.pages_cached) == 0 for _, events in server.log)


def test_scenario_13_a_reset_is_another_value():
  """What must be refused elsewhere while pages are held is harmless here: the new state knows nothing of the old."""
  server = Server()
  for i in range(4):
    server.submit(prompt_of(5, i % 2), max_tokens=6)
  for _ in range(3):
    server.step()
  assert server.cached(server.state)
  empty = prefix.init(num_pages=16, width=4)
  server.state = dataclasses.replace(server.state, index=empty)  # forget what can be found, while pages are held
  server.oracle.library.clear()
  server.check()
  server.step()
  table = page_table.init(num_slots=4, pages_per_slot=8, num_pages=16, page_size=4)
  server.state = dataclasses.replace(server.state, index=empty, table=table, running=jnp.full(4, NOBODY))
  server.oracle.library.clear()
  server.check()
  assert int(server.state.waiting.sum()) == int(server.state.live.sum()) == 4
  mark = len(admissions(server))
  server.finish()
  assert [id for id, _ in admissions(server)[mark:]] == [0, 1, 2, 3]
  assert admissions(server)[mark] == (0, 0)


def test_scenario_14_release_is_careful():
  table = page_table.init(num_slots=4, pages_per_slot=4, num_pages=8, page_size=4)
  table, _, _ = extend(table, jnp.array([10, 0, 0, 3]))
  for child in (1, 2):
    table = fork(table, 0, child)
  assert table.ref_counts.tolist() == [3, 3, 3, 1, 0, 0, 0, 0]
  for done, refs in (
    ([0, 1, 1, 0], [1, 1, 1, 1]),  # two holders at once count as two
    ([0, 1, 1, 0], [1, 1, 1, 1]),  # and only once
    ([1, 1, 0, 0], [0, 0, 0, 1]),
    ([1, 1, 1, 1], [0, 0, 0, 0]),
  ):
    table = release(table, jnp.array(done, bool))
    page_table.check(table)
    assert table.ref_counts.tolist() == [*refs, 0, 0, 0, 0]
    assert int(table.num_free) == 8 - sum(map(bool, refs))


@pytest.mark.parametrize("most, got", [(5, 5), (6, 5)])
def test_scenario_15_a_pool_of_n_pages_serves_n(most, got):
  server = Server(slots=1, pages=4, page_size=4, budget=16)
  id = server.submit(prompt_of(12), max_tokens=most)
  other = server.submit(prompt_of(3, 1), max_tokens=3)
  server.drain()
  held = max(int(events.pages_held) for _, events in server.log)
  assert held == 4 and len(server.got[id]) == got and server.ended == {id: LENGTH, other: LENGTH}
  assert len(server.got[other]) == 3


def test_scenario_15_what_needs_more_than_the_pool_is_refused_at_the_door():
  config = ModelConfig(vocab_size=61, embed_dim=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, ffn_dim=8)
  engine = Engine(models.load(config), num_slots=2, num_pages=4, page_size=4, max_seq_len=64)
  ids, params = engine.check([1] * 15, Params(max_tokens=40))
  assert len(ids) == 15 and params.max_tokens == 1
  with pytest.raises(ValueError, match="at most 15 tokens .*, got 16"):
    engine.check([1] * 16, Params())


def test_scenario_17_the_pages_that_all_running_requests_share_are_known():
  server = Server()
  common = prompt_of(10)
  server.submit([*common, 1], max_tokens=9)
  server.step()
  server.step()
  for i in (2, 3):
    server.submit([*common, i, i], max_tokens=9)
  for _ in range(3):
    server.step()
  state = server.state
  running = np.asarray(state.running) != NOBODY
  assert running.sum() == 3 and (np.asarray(state.table.seq_lens)[running] > 8).all()
  pages = np.asarray(state.table.pages)[running]
  same = (pages == pages[0]).all(axis=0) & (pages[0] != NO_PAGE)
  assert int(np.cumprod(same).sum()) == 2  # the full pages of ten tokens
  assert np.asarray(state.table.ref_counts)[pages[0, :2]].tolist() == [3, 3]
  server.finish()


@pytest.mark.parametrize("length", [8, 10])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_scenario_18_a_fork_reads_the_same_and_writes_its_own(length, order):
  table = page_table.init(num_slots=3, pages_per_slot=4, num_pages=8, page_size=4)
  table, _, _ = extend(table, jnp.array([length, 0, 0]))
  kv = kv_pages.init(num_layers=1, num_pages=8, page_size=4, num_kv_heads=1, head_dim=1, dtype=jnp.float32)

  def put(kv, slot, position, value):
    page, offset = table.pages[slot, position // 4], position % 4
    value = jnp.full((1, 1, 1), value, jnp.float32)
    return write(kv, 0, value, value, page[None], jnp.array([offset]))

  def read(slot):
    held = np.asarray(table.pages[slot])[: -(-int(table.seq_lens[slot]) // 4)]
    return np.asarray(kv.k)[held].reshape(-1)[: int(table.seq_lens[slot])].tolist()

  for i in range(length):
    kv = put(kv, 0, i, i + 1)
  table = fork(table, jnp.array([0, 0]), jnp.array([1, 2]))
  assert int(table.num_free) == 8 - -(-length // 4)  # nothing is copied yet
  wanted = list(range(1, length + 1))
  assert read(0) == read(1) == read(2) == wanted
  table, copies, granted = extend(table, jnp.array([0, 1, 1]))
  assert granted.all() and (np.asarray(copies.dst) != NO_PAGE).sum() == (2 if length % 4 else 0)
  kv = copy(kv, copies)
  for slot in (1, 2):
    kv = put(kv, slot, length, 100 + slot)
  assert read(0) == wanted and read(1) == [*wanted, 101] and read(2) == [*wanted, 102]
  for slot in order:
    table = release(table, jnp.arange(3) == slot)
    page_table.check(table)
  assert int(table.num_free) == 8


def test_scenario_20_slots_are_granted_in_order_and_given_back_once():
  server = Server(slots=2, pages=8)
  ids = server.submit_samples(prompt_of(6), 4, max_tokens=3, temperature=1.0)
  server.step()
  server.step()
  assert server.state.arrival[server.state.running].tolist() == ids[:2]  # the others wait, and nobody is half in
  server.drain()
  assert [id for id, _ in admissions(server)] == ids
  empty = page_table.init(num_slots=3, pages_per_slot=4, num_pages=8, page_size=4)
  table, _, _ = extend(empty, jnp.array([5, 9, 1]))
  table = release(table, jnp.array([True, False, True]))
  again = release(table, jnp.array([True, False, True]))  # nothing is there to be released
  jax.tree.map(np.testing.assert_array_equal, table, again)
  table = release(table, jnp.array([False, True, False]))
  jax.tree.map(np.testing.assert_array_equal, table, empty)  # inverse


# Scheduler.


def test_scenario_22_ten_short_prompts_all_start_in_the_first_step():
  server = Server(slots=10, pages=40, budget=64, cache=False)
  for i in range(10):
    server.submit(prompt_of(3, i), max_tokens=4)
  plan, events = server.step()
  assert plan.scheduled.tolist() == [3] * 10 and int(events.num_waiting) == 0
  assert events.running.tolist() == list(range(10))
  server.finish()


def test_scenario_23_the_token_budget_is_shared_in_order_of_arrival():
  server = Server(slots=4, pages=256, page_size=16, budget=1024, chunk=400, max_seq_len=1024, cache=False)
  for i in range(3):
    server.submit(prompt_of(800, i), max_tokens=2)
  assert [server.step()[0].scheduled.tolist() for _ in range(3)] == [
    [400, 400, 224, 0],
    [400, 400, 224, 0],
    [1, 1, 352, 0],
  ]
  server.finish()


def test_scenario_24_a_long_request_is_chunked_and_not_overtaken():
  server = Server(slots=2, pages=8)
  first = server.submit(prompt_of(20), max_tokens=4)
  long = server.submit(prompt_of(24, 1), max_tokens=4)  # six pages, and only three are not spoken for
  short = server.submit(prompt_of(2, 2), max_tokens=2)
  server.finish()
  order = [int(id) for _, events in server.log for id in events.ids if id != NOBODY]
  assert order.index(first) < order.index(long) < order.index(short)
  assert [plan.scheduled.tolist() for plan, _ in server.log[:4]] == [[8, 0], [8, 0], [4, 0], [1, 0]]


def test_scenario_25_a_request_is_in_one_slot_and_a_step_is_planned_once():
  server = Server(slots=2, pages=8)
  for i in range(5):
    server.submit(prompt_of(7, i), max_tokens=8)
  for _ in range(20):
    plans = [planner(8, None, scheduler.first_come)(server.state) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *plans)  # planning is no deed: the same state has the same plan
    taken = [row for row in plans[0][1].rows.tolist() if row != NOBODY]
    assert len(set(taken)) == len(taken)
    server.step()
  server.finish()


def test_scenario_26_growth_preempts_the_last_to_arrive():
  server = Server(slots=2, pages=10, page_size=16, budget=160, max_seq_len=160, cache=False)
  first, second = (server.submit(prompt_of(79, i), max_tokens=20) for i in range(2))
  for _ in range(2):
    server.step()
  assert int(server.state.table.num_free) == 0 and server.state.table.seq_lens.tolist() == [80, 80]
  plan, events = server.step()  # both need a sixth page: the first gets one of the second's five
  assert events.preempted.tolist() == [NOBODY, second] and plan.lost.tolist() == [0, 80]
  assert int(server.state.table.num_free) == 4
  assert len(server.got[second]) == 2  # what it had said stays said
  server.finish()
  assert preempted(server) == [second] and [id for id, _ in admissions(server)] == [first, second, second]
  resumed = next(plan for plan, events in server.log[3:] if second in events.admitted.tolist())
  assert int(resumed.scheduled.sum()) == 81  # prompt and outputs


def test_scenario_26_a_request_whose_first_token_would_not_fit_waits():
  server = Server(slots=2, pages=10, page_size=16, budget=160, max_seq_len=160, cache=False)
  for i in range(2):
    server.submit(prompt_of(80, i), max_tokens=20)
  server.step()
  assert server.state.table.seq_lens.tolist() == [80, 0]  # five pages are free, and the second needs six
  server.finish()
  assert preempted(server) == []


@pytest.mark.parametrize(
  "priorities, victims", [((1, 0, 1, 0), [2, 0]), ((0, 0, 0, 0), [3, 2]), ((2, 1, 0, 3), [3, 0])]
)
def test_scenario_27_victims_are_the_last_in_priority_then_in_arrival(priorities, victims):
  server = Server(budget=64, policy=policies.by_priority)
  for i, priority in enumerate(priorities):
    server.submit(prompt_of(15, i), max_tokens=14, priority=priority)  # four pages each, and there are 16
  while len(preempted(server)) < 2:
    server.step()
  assert preempted(server) == victims
  server.finish()
  assert [id for id, _ in admissions(server)[4:6]] == victims[::-1]  # the better of the two comes back first


def test_scenario_27_nobody_is_preempted_while_there_is_room():
  server = Server()
  for i in range(4):
    server.submit(prompt_of(5, i), max_tokens=11)
  server.finish()
  assert not preempted(server)


def test_scenario_28_a_request_stops_at_the_right_token_and_its_pages_are_free_in_that_step():
  prompt = prompt_of(5)
  out, _ = expected(prompt, Params(max_tokens=12))
  stop = next(i for i in range(3, 12) if out.index(out[i]) == i)  # a token that comes first at place i
  for least, most, length, why in (
    (0, 12, stop + 1, STOP),
    (stop + 1, 12, stop + 1, STOP),
    (0, stop + 1, stop + 1, STOP),  # stop and length at once
    (0, stop, stop, LENGTH),
    (0, 1, 1, LENGTH),
  ):
    server = Server()
    server.submit(prompt, min_tokens=least, max_tokens=most, stop_ids=[VOCAB + 7, out[stop]])
    while not server.ended:
      server.step()
    assert server.got[0] == out[:length] and server.ended == {0: why}
    assert int(server.state.table.num_free) == 16 and server.state.running.tolist() == [NOBODY] * 4
  server = Server()
  server.submit(prompt, min_tokens=stop + 2, max_tokens=12, stop_ids=[out[stop]])
  server.finish()
  assert len(server.got[0]) > stop + 1


def test_scenario_29_cancel_waiting_and_running():
  server = Server(slots=2, pages=8)
  running, waiting, last = (server.submit(prompt_of(8, i), max_tokens=9) for i in range(3))
  server.step()
  held = int(server.state.table.num_free)
  server.cancel(running)
  assert int(server.state.table.num_free) == 8 > held
  server.cancel(waiting)
  server.cancel(99)
  server.cancel(NOBODY)
  assert server.state.finish[:3].tolist() == [CANCELLED, CANCELLED, LIVE]
  assert int(server.state.live.sum()) == 1
  server.finish()
  assert server.ended == {last: LENGTH}


def test_scenario_30_what_was_found_is_told_once_at_admission():
  server = Server(slots=2, pages=8)
  common = prompt_of(8)
  first = server.submit([*common, *prompt_of(12, 1)], max_tokens=8)
  server.step()
  second = server.submit([*common, *prompt_of(13, 2)], max_tokens=4)  # lacks a page for a while, and is tried again
  for _ in range(5):
    server.step()
  assert admissions(server) == [(first, 0)] and int(server.log[-1][1].num_waiting) == 1
  server.finish()
  assert admissions(server) == [(first, 0), (second, 8)]


def test_scenario_30_an_admission_after_a_preemption_is_told_apart():
  server = Server(slots=2, pages=8)
  for i in range(2):
    server.submit(prompt_of(15, i), max_tokens=14)
  server.finish()
  again = [id for id, _ in admissions(server)[2:]]
  assert again and again == preempted(server)
  assert server.state.preemptions[:2].tolist() == [0, len(again)]


# Both.


@pytest.mark.parametrize(
  "shape", [(1, 24, 1, 3, None), (3, 9, 3, 4, 2), (6, 24, 4, 30, None)], ids=lambda shape: "-".join(map(str, shape))
)
def test_scenario_33_tokens_do_not_depend_on_pages_slots_or_chunks(shape):
  slots, pages, page_size, budget, chunk = shape
  server = Server(slots=slots, pages=pages, page_size=page_size, budget=budget, chunk=chunk, max_seq_len=24)
  lens, most = [1, 15, 5, 9, 14, 2], [9, 8, 8, 1, 7, 9]
  for i, (n, m) in enumerate(zip(lens, most, strict=True)):
    server.submit(prompt_of(n, i), max_tokens=m)
  server.finish()
  assert len(server.ended) == len(lens)
