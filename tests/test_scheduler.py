"""The scheduler without a model: a stand-in that writes tokens into pages and reads them back through the table.

The next token of a sequence is a hash of all tokens read from the pages its table names, so a page granted twice,
shared wrongly, written while shared, or lost in a preemption changes the tokens of some request. What every step
decides is compared with `plan_oracle`.
"""

import copy
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from paged_flash import policies, scheduler, step, swapping
from paged_flash.cache import page_table, prefix
from paged_flash.cache.page_table import NO_PAGE
from paged_flash.requests import Params, rows
from paged_flash.state import LENGTH, LIVE, NOBODY, STOP
from tests.plan_oracle import Oracle

VOCAB = 50
submit = jax.jit(scheduler.submit)
cancel = jax.jit(scheduler.cancel)
commit = jax.jit(scheduler.commit)


@functools.cache
def planner(token_budget, chunk_size, policy, preemption=swapping.always):
  sizes = dict(token_budget=token_budget, chunk_size=chunk_size, policy=policy, preemption=preemption)
  return jax.jit(functools.partial(scheduler.plan, **sizes))


@functools.cache
def packer(num_tokens):
  return jax.jit(functools.partial(step.pack, num_tokens=num_tokens))


def even(tokens, pages):
  """A choice of victims to swap: some one way, some the other."""
  return (tokens > 0) & (tokens % 2 == 0)


def next_token(tokens) -> int:
  """What the stand-in model says after these tokens: 1..VOCAB-1."""
  return 1 + zlib.crc32(np.asarray(tokens, np.int32).tobytes()) % (VOCAB - 1)


def expected(prompt, params: Params) -> tuple[list[int], int]:
  """Output tokens and reason to end of a request served alone, with no pages anywhere."""
  out = []
  while True:
    out.append(next_token([*prompt, *out]))
    if out[-1] in params.stop_ids and len(out) >= params.min_tokens:
      return out, STOP
    if len(out) >= params.max_tokens:
      return out, LENGTH


class Server:
  """Drives the scheduler with the stand-in model, and checks every step.

  Its proposer knows what comes, and errs as a seeded coin falls: it proposes `fewest` to `guesses` tokens.
  """

  def __init__(
    self,
    *,
    slots=4,
    pages=16,
    page_size=4,
    budget=8,
    chunk=None,
    queue=16,
    max_seq_len=32,
    cache=True,
    policy=scheduler.first_come,
    host=0,
    preemption=swapping.always,
    guesses=0,
    fewest=0,
    errs=0.0,
    seed=0,
  ):
    self.state = scheduler.init(
      num_slots=slots,
      pages_per_slot=-(-max_seq_len // page_size),
      num_pages=pages,
      page_size=page_size,
      num_requests=queue,
      max_seq_len=max_seq_len,
      prefix_cache=cache,
      num_host_pages=host,
    )
    self.preemption, self.guesses, self.fewest, self.errs = preemption, guesses, fewest, errs
    self.random = np.random.default_rng(seed)
    self.budget, self.chunk, self.max_seq_len, self.slots, self.policy = budget, chunk, max_seq_len, slots, policy
    self.contents = np.full((pages, page_size), -1)
    self.host_contents = np.full((host, page_size), -1)
    self.asked, self.got, self.ended, self.log = {}, {}, {}, []
    self.oracle = Oracle(page_size, budget, chunk, policy, cache, preemption)

  def submit(self, prompt, **params):
    return self.submit_samples(prompt, 1, **params)[0]

  def submit_samples(self, prompt, n, **params):
    params = Params(**params)
    batch = rows([(prompt, params)] * n, max(n, 3), self.max_seq_len, samples=n > 1)  # of one size, to compile once
    self.state, ids = submit(self.state, batch)
    ids = ids.tolist()[:n]
    for id in ids:
      if id != NOBODY:
        self.asked[id], self.got[id] = (list(prompt), params), []
    return ids

  def cancel(self, id):
    before = self.state
    self.state = cancel(before, jnp.int32(id))
    self.oracle.cancel(before, self.state)
    self.check()
    self.asked.pop(id, None)

  def cached(self, state):
    return set() if state.index is None else set(np.flatnonzero(state.index.cached).tolist())

  def kept(self):
    """All there is, to go on from later or to go back to: the state is a value, the rest is copied."""
    rest = self.contents, self.host_contents, self.asked, self.got, self.ended, self.oracle
    return self.state, copy.deepcopy(rest)

  def go_back(self, kept):
    self.state, rest = kept
    self.contents, self.host_contents, self.asked, self.got, self.ended, self.oracle = copy.deepcopy(rest)

  def stores(self):
    """What pages hold, and host pages."""
    return [(self.contents, self.host_contents)]

  def swap(self, plan):
    """Makes the copies between the pool and host memory."""
    for pages, host in self.stores():
      for (a, b), copies in (((pages, host), plan.swap_out), ((host, pages), plan.swap_in)):
        if copies is None:
          continue
        there = np.asarray(copies.dst) >= 0
        assert (np.asarray(copies.src)[there] >= 0).all()
        b[np.asarray(copies.dst)[there]] = a[np.asarray(copies.src)[there]]

  def check(self):
    page_table.check(self.state.table)
    if self.state.host is not None:
      page_table.check(self.state.host)
      assert not np.asarray(self.state.host.seq_lens)[~np.asarray(self.state.waiting)].any()
    if (index := self.state.index) is not None:
      prefix.check(index, self.state.table)
      cached = np.asarray(index.cached)  # what the index says of a page is what the page holds
      np.testing.assert_array_equal(np.asarray(index.contents)[cached], self.contents[cached])

  def proposals(self):
    """What may follow each slot's tokens: i32[S, K]."""
    out = np.full((self.slots, self.guesses), NOBODY, np.int32)
    tokens, num_tokens = np.asarray(self.state.requests.tokens), np.asarray(self.state.requests.num_tokens)
    for slot, row in enumerate(np.asarray(self.state.running)):
      count = int(self.random.integers(self.fewest, self.guesses + 1))
      if row >= 0 and count:
        told = tokens[row, : num_tokens[row]].tolist()
        for _ in range(count):
          told.append(next_token(told) if self.random.random() >= self.errs else 0)  # nobody says 0
        out[slot, :count] = told[-count:]
    return out

  def step(self):
    before = self.state
    frozen = jax.tree.map(np.array, before)
    proposals = self.proposals()
    wanted = self.oracle.plan(before, proposals.tolist())
    run = planner(self.budget, self.chunk, self.policy, self.preemption)
    state, plan = run(before, proposals=proposals if self.guesses else None)
    self.swap(plan)
    page_table.check(state.table)
    if state.index is not None:
      prefix.check(state.index, state.table)
    got = self.decided(state, plan)
    assert got == wanted, {name: (got[name], wanted[name]) for name in wanted if got[name] != wanted[name]}
    scheduled, proposed = np.asarray(plan.scheduled), np.asarray(plan.num_proposed)
    assert scheduled.sum() <= self.budget and (scheduled - proposed <= (self.chunk or self.budget)).all()
    packed = packer(None if bool(plan.decode_only) else self.budget)(state, plan)
    for src, dst in zip(np.asarray(plan.copies.src), np.asarray(plan.copies.dst), strict=True):
      if dst != NO_PAGE:
        self.contents[dst] = self.contents[src]
    refs, pages = np.asarray(state.table.ref_counts), np.asarray(state.table.pages)
    written = np.asarray(packed.pages)
    for token, page, offset in zip(*map(np.asarray, (packed.tokens, packed.pages, packed.offsets)), strict=True):
      if page != NO_PAGE:
        assert refs[page] == 1, "a shared page is written"
        self.contents[page, offset] = token
    assert (written != NO_PAGE).sum() == scheduled.sum()
    tokens = np.zeros((self.slots, 1 + plan.proposed.shape[1]), np.int32)
    for slot in np.flatnonzero(scheduled):
      read = self.contents[pages[slot]].reshape(-1)
      for k in range(proposed[slot] + 1):
        tokens[slot, k] = next_token(read[: int(packed.kv_lens[slot]) - proposed[slot] + k])
    self.state, events = commit(state, plan, tokens, np.zeros(tokens.shape, np.float32))
    counts = self.oracle.commit(state, plan, tokens.tolist(), self.state)
    assert events.counts.tolist() == counts
    assert self.cached(self.state) == set(self.oracle.library.values())
    assert swapping.stored(self.state).tolist() == np.where(self.state.live, wanted["stored"], 0).tolist()
    self.check()
    jax.tree.map(np.testing.assert_array_equal, before, frozen)  # the old state is still what it was
    ids, finish = np.asarray(events.ids), np.asarray(events.finish)
    for slot in np.flatnonzero(ids != NOBODY):
      id = int(ids[slot])
      assert id in self.asked and id not in self.ended, "a token for a request that is not live"
      self.got[id] += tokens[slot, : counts[slot]].tolist()
      if finish[slot] != LIVE:
        self.ended[id] = int(finish[slot])
    if int(events.ended) != NOBODY:
      self.ended[int(events.ended)] = LENGTH
    self.log.append((plan, events))
    return plan, events

  def decided(self, state, plan):
    """A plan, and the state that comes with it, in the words of the oracle."""
    swaps = {name: [[]] * self.slots for name in ("swap_out", "swap_in")}
    for name, to in (("swap_out", state.host), ("swap_in", state.table)) if state.host is not None else ():
      copies, refs = getattr(plan, name), to.ref_counts
      src, dst = np.asarray(copies.src), np.asarray(copies.dst)
      swaps[name] = [row[row >= 0].tolist() for row in src]
      assert ((src >= 0) == (dst >= 0)).all()
      assert (np.asarray(refs)[dst[dst >= 0]] == 1).all(), "a shared page is written"
    names = ("rows", "starts", "scheduled", "num_proposed", "cached", "admitted", "preempted", "lost", "doomed")
    stored = swapping.stored(state).tolist()
    return dict({n: getattr(plan, n).tolist() for n in names}, library=self.cached(state), stored=stored, **swaps)

  def drain(self, most=2000):
    for _ in range(most):
      if not bool(self.state.live.any()):
        return
      self.step()
    raise AssertionError(f"requests still live after {most} steps")

  def finish(self):
    """Runs all to their ends and compares every request with itself served alone."""
    self.drain()
    for id, (prompt, params) in self.asked.items():
      if id in self.ended:
        assert (self.got[id], self.ended[id]) == expected(prompt, params), f"request {id}"
    assert int(self.state.table.num_free) == self.state.table.num_pages
    assert self.state.host is None or int(self.state.host.num_free) == self.state.host.num_pages


def prompt_of(n, seed=0):
  return np.random.default_rng(seed).integers(1, VOCAB, n).tolist()


def test_cancel_can_cut_an_output_that_has_ended():
  server = Server()
  id = server.submit(prompt_of(6), max_tokens=9)
  server.drain()
  state = cancel(server.state, jnp.int32(id), jnp.int32(STOP), jnp.int32(4))
  assert int(state.finish[0]) == STOP and int(state.requests.num_tokens[0]) == 10


def test_queue_refuses_when_full_and_reuses_the_oldest_ended_row():
  server = Server(slots=1, queue=2)
  assert [server.submit(prompt_of(2, i), max_tokens=2) for i in range(3)] == [0, 1, NOBODY]
  server.drain()
  assert server.submit(prompt_of(3, 3), max_tokens=2) == 2
  assert server.state.arrival.tolist() == [2, 1]
  server.finish()


def test_a_batch_is_queued_in_order_and_may_hold_gaps():
  server = Server(queue=4)
  batch = rows([(prompt_of(2, i), Params(max_tokens=2)) for i in range(5)], 8, 32)
  server.state, ids = submit(server.state, batch)
  assert ids.tolist() == [0, 1, 2, 3, NOBODY, NOBODY, NOBODY, NOBODY]


def test_what_the_pool_can_never_hold_is_ended_and_blocks_nobody():
  server = Server(slots=2, pages=4, page_size=4, budget=8, max_seq_len=32)  # a slot may hold more than the pool
  too_long = server.submit(prompt_of(17), max_tokens=4)
  outgrows = server.submit(prompt_of(10, 1), max_tokens=20)
  good = server.submit(prompt_of(5, 2), max_tokens=4)
  server.drain()
  assert server.ended == {too_long: LENGTH, outgrows: LENGTH, good: LENGTH}
  assert server.got[too_long] == []
  alone = expected(*server.asked[outgrows])[0]
  assert server.got[outgrows] == alone[: len(server.got[outgrows])] and len(server.got[outgrows]) == 7
  assert server.got[good] == expected(*server.asked[good])[0]


CHAT: dict[str, Any] = dict(slots=3, pages=6, page_size=4, budget=8)
GUESSES: dict[str, Any] = dict(guesses=3, errs=0.3)
WORLDS: dict[str, dict[str, Any]] = {
  "recomputed": CHAT | dict(policy=policies.longest_prefix_first),
  "swapped": CHAT | dict(cache=False, host=5) | GUESSES,
  "single": dict(slots=4, pages=14, page_size=1, budget=7, host=20) | GUESSES,
  "either": dict(slots=4, pages=8, page_size=3, budget=9, chunk=4, host=7, preemption=even) | GUESSES,
}
WORLDS["either"] |= dict(policy=policies.by_priority)


class SchedulerMachine(RuleBasedStateMachine):
  """Submit, sample, cancel, step, keep and go back in any order, on a pool that cannot satisfy everyone.

  Every step is compared with what lists and dictionaries say it must be, every token with what is read through pages.
  """

  world: dict[str, Any]

  @initialize()
  def start(self):
    self.room = self.world["pages"] * self.world["page_size"]
    self.server = Server(queue=6, max_seq_len=self.room, **self.world)
    self.prompts = [[]]
    self.kept = self.server.kept()

  @rule(n=strategies.integers(1, 4), seed=strategies.integers(0, 2**16))
  def submit(self, n, seed):
    random = np.random.default_rng(seed)
    for _ in range(n):  # each begins as some other did, or not
      prefix = self.prompts[random.integers(len(self.prompts))][: random.integers(0, self.room // 2)]
      more = random.integers(not prefix, max(2, self.room // 3 - len(prefix)))
      prompt = [*prefix, *random.integers(1, VOCAB, more).tolist()]
      self.server.submit_samples(
        prompt,
        int(random.choice([1, 1, 2, 3])),
        max_tokens=int(min(random.integers(1, self.room), self.room - len(prompt))),
        stop_ids=random.integers(1, VOCAB, random.integers(0, 3)).tolist(),
        tenant=int(random.integers(0, 2)),
        priority=int(random.integers(0, 3)),
      )
      self.prompts.append(prompt)
      for _ in range(random.integers(0, 6)):
        self.server.step()

  @precondition(lambda self: self.server.asked)
  @rule(data=strategies.data())
  def cancel(self, data):
    live = [id for id in self.server.asked if id not in self.server.ended]
    self.server.cancel(data.draw(strategies.sampled_from(live or sorted(self.server.asked))))

  @rule(n=strategies.integers(1, 12))
  def steps(self, n):
    for _ in range(n):
      self.server.step()

  @rule()
  def keep(self):
    self.kept = self.server.kept()

  @rule()
  def go_back(self):
    self.server.go_back(self.kept)

  def teardown(self):
    if hasattr(self, "server"):
      self.server.finish()


@pytest.mark.parametrize("world", WORLDS)
def test_scheduler_machine(world):
  machine = type("Machine", (SchedulerMachine,), dict(world=WORLDS[world]))
  run_state_machine_as_test(machine, settings=settings(max_examples=15, stateful_step_count=20, deadline=None))
