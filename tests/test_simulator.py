"""The simulator against arithmetic that can be done by hand, and against the engine's own steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_flash import models, policies, swapping
from paged_flash.analysis import Trace
from paged_flash.engine import Engine
from paged_flash.models import ModelConfig
from paged_flash.simulator import Contiguous, LatencyModel, Paged, poisson, simulate, sweep

CLOCK = LatencyModel(  # one second a step, one more for each token: easy to do by hand
  num_params=0.5, weight_bytes=0, kv_bytes=0, attention_flops=0, flops=1, bandwidth=1, overhead_s=1
)


def test_one_request_by_hand():
  served = simulate([5], [4], memory=Paged(num_pages=4, page_size=4), num_slots=2, token_budget=3)
  # 3 + 2 prompt tokens, the second chunk yields a token, then three more steps of one.
  assert served.log.scheduled.tolist() == [3, 2, 1, 1, 1]
  assert served.log.used.tolist() == [3, 5, 6, 7, 8]
  assert served.log.pages.tolist() == [1, 2, 2, 2, 2]
  assert served.log.internal.tolist() == [1, 3, 2, 1, 0]
  assert served.log.free.tolist() == [12, 8, 8, 8, 8]
  assert served.waste == pytest.approx(1 - 29 / 36)
  assert (served.admitted[0], served.first_token[0], served.end[0]) == (0, 2, 5)
  assert served.num_outputs.tolist() == [4]


def test_every_token_is_computed_and_recomputed_only_after_a_preemption():
  rng = np.random.default_rng(0)
  prompts, outputs = rng.integers(1, 30, 40), rng.integers(1, 20, 40)
  memory = [Paged(num_pages=n, page_size=4) for n in (200, 14)]
  roomy, starved = sweep(prompts, outputs, memory=memory, num_slots=8, token_budget=32)
  assert roomy.stride == starved.stride == 1
  assert roomy.num_outputs.tolist() == starved.num_outputs.tolist() == outputs.tolist()
  assert roomy.preemptions.sum() == 0 and roomy.log.scheduled.sum() == (prompts + outputs - 1).sum()
  assert starved.preemptions.sum() == starved.log.preempted.sum() > 0
  assert starved.log.scheduled.sum() > roomy.log.scheduled.sum()
  assert starved.log.pages.max() <= 14
  assert (roomy.log.internal >= 0).all() and (roomy.log.internal <= 3 * roomy.log.running).all()
  assert roomy.saved == starved.saved == 0
  assert (starved.log.used + starved.log.internal + starved.log.free == 14 * 4).all()


def test_a_static_batch_waits_for_its_longest_request():
  memory = Paged(num_pages=32, page_size=4)
  outputs = [2, 5, 3, 1]
  static, flowing = (
    simulate([1] * 4, outputs, memory=memory, num_slots=2, token_budget=8, is_static=is_static)
    for is_static in (True, False)
  )
  assert static.log.running.tolist() == [2, 2, 1, 1, 1, 2, 1, 1] and static.end.tolist() == [2, 5, 8, 6]
  assert flowing.log.running.tolist() == [2, 2, 2, 2, 2, 1] and flowing.end.tolist() == [2, 5, 5, 6]


def test_victims_swap_or_recompute_by_what_it_costs():
  rng = np.random.default_rng(0)
  prompts, outputs = rng.integers(1, 30, 40), rng.integers(1, 20, 40)
  clock = dataclasses.replace(CLOCK, kv_bytes=1, bandwidth=1e9, host_bandwidth=8, copy_s=0.5)
  run: dict[str, Any] = dict(num_slots=8, token_budget=32, latency=clock)
  memory = Paged(num_pages=14, page_size=4, num_host_pages=200)
  assert clock.cheaper(4)(jnp.array([3, 4, 5]), jnp.array([2, 2, 2])).tolist() == [False, False, True]
  always, never, cheaper = (
    simulate(prompts, outputs, memory=memory, preemption=how, **run)
    for how in (swapping.always, swapping.never, clock.cheaper(4))
  )
  tokens = (prompts + outputs - 1).sum()
  for served in (always, never, cheaper):
    assert served.num_outputs.tolist() == outputs.tolist() and served.preemptions.sum() > 0 and served.stride == 1
    assert served.log.scheduled.sum() == tokens + served.log.lost.sum()
  assert always.log.swapped.sum() > 0 and always.log.scheduled.sum() == tokens
  assert never.log.swapped.sum() == 0 and never.log.lost.sum() > 0
  # By hand: a step is a second, and so is each token; a page copied, one way, is a second.
  for served in (always, never):
    assert served.seconds == served.num_steps + served.log.scheduled.sum() + served.log.swapped.sum()


def test_arrivals_and_the_clock_by_hand():
  served = simulate(
    [2, 3, 1],
    [2, 1, 1],
    memory=Paged(num_pages=8, page_size=2),
    num_slots=2,
    token_budget=8,
    arrivals=[0.5, 2, 20],
    latency=CLOCK,
  )
  # From 0.5 the first prefill takes 1 + 2 s; at 3.5 a decode and the second prompt, 1 + 4 s; then idle until 20.
  assert served.log_times.tolist() == [0.5, 3.5, 20]
  assert served.admitted.tolist() == [0.5, 3.5, 20]
  assert served.first_token.tolist() == [3.5, 8.5, 22]
  assert served.end.tolist() == [8.5, 8.5, 22]
  assert served.normalised_latency == pytest.approx((8 / 2 + 6.5 / 1 + 2 / 1) / 3)
  assert served.seconds == 22 and served.throughput == pytest.approx(4 / 22)
  assert served.mean.running == pytest.approx((1 * 3 + 2 * 5 + 1 * 2) / 10)  # idle time is no step's
  assert served.queued_seconds == 0 and np.isnan(served.mean_queued.running)


@pytest.mark.parametrize(
  "how, blocks, admitted, split",
  [
    # Reserved 10, 12 and 7 of 64 tokens in blocks of 16, 16 and 8: all fit. 15 tokens of prompts in the first step.
    ("oracle", 64, [0, 0, 0], dict(used=15, reserved=14, internal=0, rounding=11, external=0, free=24)),
    # In 32 the third waits for the end of the first, in step 4: 16 + 16 are held, 29 - 7 of them asked for.
    ("oracle", 32, [0, 0, 4], dict(used=11, reserved=11, internal=0, rounding=10, external=0, free=0)),
    # 40 is 32 and 8: the third has its 8.
    ("oracle", 40, [0, 0, 0], dict(used=15, reserved=14, internal=0, rounding=11, external=0, free=0)),
    # Outputs 4, 7 and 3 are taken for 4, 8 and 4: 10, 13, 8.
    ("pow2", 40, [0, 0, 0], dict(used=15, reserved=14, internal=2, rounding=9, external=0, free=0)),
    # 20 each, in blocks of 32: one at a time in 40, whose last 8 nobody waiting can have.
    ("max", 40, [0, 4, 11], dict(used=6, reserved=4, internal=10, rounding=12, external=8, free=0)),
  ],
)
def test_contiguous_reservations_by_hand(how, blocks, admitted, split):
  memory = Contiguous(num_tokens=blocks, reserve=how, max_seq_len=20)
  served = simulate([6, 5, 4], [4, 7, 3], memory=memory, num_slots=4, token_budget=32)
  assert served.admitted.tolist() == admitted
  assert {name: getattr(served.log, name)[0] for name in split} == split
  assert served.num_outputs.tolist() == [4, 7, 3]
  parts = np.sum([getattr(served.log, name) for name in split], axis=0)
  assert (parts == blocks).all()
  assert sum(served.split(queued=False).values()) == pytest.approx(1)


def test_with_memory_for_all_every_allocator_takes_the_same_steps():
  rng = np.random.default_rng(1)
  prompts, outputs = rng.integers(1, 30, 20), rng.integers(1, 20, 20)
  arrivals = poisson(0.5, 20, seed=1)
  memories = [Contiguous(num_tokens=4096, reserve=how, max_seq_len=64) for how in ("max", "pow2", "oracle")]
  runs = [
    simulate(prompts, outputs, memory=m, num_slots=8, token_budget=16, chunk_size=10, arrivals=arrivals, latency=CLOCK)
    for m in (Paged(num_pages=400, page_size=4), *memories)
  ]
  for run in runs[1:]:
    assert run.end.tolist() == runs[0].end.tolist()
    assert run.log.scheduled.tolist() == runs[0].log.scheduled.tolist()


def test_engine_takes_the_very_steps():
  config = ModelConfig(vocab_size=31, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=16)
  sizes: dict[str, Any] = dict(num_slots=3, token_budget=12, chunk_size=7)
  engine = Engine(models.load(config), num_pages=9, page_size=4, max_seq_len=36, **sizes)
  rng = np.random.default_rng(2)
  prompts, outputs = rng.integers(1, 20, 9), rng.integers(1, 12, 9)
  state = engine.init()
  for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
    ids = rng.integers(1, 31, prompt).tolist()  # no two share a page
    state, _ = engine.submit(state, [1 + i, *ids[1:]], max_tokens=int(output), ignore_eos=True)
  steps = []
  while not state.idle:
    state, events = engine.step(state)
    steps.append((events.num_running, events.num_scheduled, events.pages_held, len(events.preempted)))
  served = simulate(prompts, outputs, memory=Paged(num_pages=9, page_size=4), **sizes)
  log = served.log
  assert list(zip(log.running, log.scheduled, log.pages, log.preempted, strict=True)) == steps
  assert served.preemptions.sum() > 0


def test_mapped_runs_are_the_runs():
  rng = np.random.default_rng(3)
  prompts, outputs = rng.integers(1, 20, 24), rng.integers(1, 12, 24)
  arrivals = [poisson(rate, 24) for rate in (0.1, 1)]
  for memory in (
    [Paged(num_pages=n, page_size=4) for n in (9, 30)],
    [Contiguous(num_tokens=n, reserve=how, max_seq_len=40) for n, how in ((100, "max"), (64, "pow2"))],
  ):
    rest: dict[str, Any] = dict(num_slots=4, token_budget=16, latency=CLOCK)
    together = sweep(prompts, outputs, memory=memory, arrivals=arrivals, **rest)
    alone = simulate(prompts, outputs, memory=memory[-1], arrivals=arrivals[-1], **rest)
    jax.tree.map(np.testing.assert_array_equal, vars(together[-1]), vars(alone))
    assert together[0].end.tolist() != alone.end.tolist()


def test_policies_and_pools_of_any_size_are_mapped_into_one_program():
  rng = np.random.default_rng(4)
  prompts, outputs = rng.integers(1, 20, 24), rng.integers(1, 12, 24)
  run: dict[str, Any] = dict(num_slots=3, token_budget=16, queue_size=12)
  orders = [policies.first_come, policies.shortest_first, policies.first_come, policies.shortest_first]
  memory = [Paged(num_pages=n, page_size=4) for n in (9, 9, 30, 30)]
  together = sweep(prompts, outputs, memory=memory, policy=orders, **run)
  for served, pool, policy in zip(together, memory, orders, strict=True):
    alone = simulate(prompts, outputs, memory=pool, policy=policy, **run)
    jax.tree.map(np.testing.assert_array_equal, vars(served), vars(alone))
  assert len({tuple(served.end) for served in together}) == 4
  with pytest.raises(ValueError, match="one for each of 4 memories, got 2"):
    sweep(prompts, outputs, memory=memory, policy=orders[:2], **run)


def test_pages_are_shared_by_what_they_hold():
  prompts, outputs = [9, 9, 12, 5], [3, 3, 2, 2]
  contents = np.array([[1, 2, 10], [1, 2, 11], [1, 3, 12], [4, 13, -1]], np.int32)
  contents = np.pad(contents, ((0, 0), (0, 1)), constant_values=-1)
  memory = Paged(num_pages=16, page_size=4)
  served = simulate(prompts, outputs, memory=memory, num_slots=1, token_budget=16, contents=contents)
  # One after the other: the second finds 8 of its tokens, the third 4, the fourth none, though nobody holds the pages.
  assert served.cached.tolist() == [0, 8, 4, 0]
  assert served.hit_rate == pytest.approx(12 / 35)
  assert served.log.scheduled.sum() == sum(prompts) - 12 + sum(o - 1 for o in outputs)


def test_a_large_cache_finds_what_a_cache_without_bounds_would():
  rng = np.random.default_rng(5)
  documents = [rng.integers(0, 6, rng.integers(1, 5)) for _ in range(30)]  # ids of blocks of 4, drawn from few
  blocks = [[sum(7**i * (int(b) + 1) for i, b in enumerate(d[: k + 1])) for k in range(len(d))] for d in documents]
  trace = Trace(
    name="t",
    prompt_lens=np.array([4 * len(ids) for ids in blocks]),
    output_lens=rng.integers(1, 9, 30),
    prefixes=tuple(map(tuple, blocks)),
    block_size=4,
  )
  run: dict[str, Any] = dict(num_slots=1, token_budget=32, contents=trace.contents())
  memory = [Paged(num_pages=n, page_size=4) for n in (400, 7)]
  large, small = sweep(trace.prompt_lens, trace.output_lens, memory=memory, **run)
  assert large.hit_rate == pytest.approx(trace.ideal_hit_rate(full_pages=True)) and large.hit_rate > 0.2
  assert 0 < small.hit_rate < large.hit_rate  # evicted


def test_a_policy_decides_who_is_next():
  run: dict[str, Any] = dict(memory=Paged(num_pages=8, page_size=4), num_slots=1, token_budget=16)
  first, short = (
    simulate([9, 5, 2], [3, 3, 3], policy=policy, queue_size=3, **run)
    for policy in (policies.first_come, policies.shortest_first)
  )
  assert np.argsort(first.end).tolist() == [0, 1, 2]
  assert np.argsort(short.end).tolist() == [2, 1, 0]


def test_samples_share_their_prompt():
  memory = Paged(num_pages=32, page_size=4)
  served = simulate([8, 6], [5, 5], memory=memory, num_slots=6, token_budget=32, samples=3)
  assert served.num_outputs.tolist() == [5] * 6 and served.prompt_lens.tolist() == [8, 8, 8, 6, 6, 6]
  # The first samples compute their prompts; a step later the others do so for the last token alone.
  assert served.log.scheduled[:2].tolist() == [14, 6]
  # Then the prompt of 8 is two pages for all three, of which the last is copied by who writes into it: two of them.
  assert served.log.mapped[-2] > served.log.pages[-2]
  assert 0 < served.saved < 2 / 3


def test_a_full_log_keeps_every_other_step():
  whole, short = (
    simulate([5] * 6, [9] * 6, memory=Paged(num_pages=8, page_size=4), num_slots=2, token_budget=4, log_size=size)
    for size in (64, 8)
  )
  assert whole.stride == 1 and short.stride == 4 and whole.num_steps > 24
  np.testing.assert_array_equal(short.log.used, whole.log.used[::4])
  np.testing.assert_array_equal(short.log_times, np.arange(0, whole.num_steps, 4))
  assert short.mean == whole.mean
  assert whole.mean.used == pytest.approx(whole.log.used.mean())


def test_step_seconds_are_the_roofline():
  model = LatencyModel(
    num_params=100, weight_bytes=200, kv_bytes=3, attention_flops=5, flops=50, bandwidth=10, overhead_s=2
  )
  assert float(model.step_seconds(*np.array([1, 10, 10], np.float32))) == pytest.approx(2 + (200 + 30) / 10)
  assert float(model.step_seconds(*np.array([8, 10, 36], np.float32))) == pytest.approx(2 + (1600 + 180) / 50)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(prompt_lens=[], output_lens=[]), r"two equal \[R\]"),
    (dict(prompt_lens=[1, 2]), r"two equal \[R\]"),
    (dict(prompt_lens=[0]), "at least 1, got 0"),
    (dict(prompt_lens=[30], output_lens=[9]), "num_pages must be at least 10, .* got 8"),
    (dict(memory=Contiguous(num_tokens=64, reserve="max", max_seq_len=9)), "max_seq_len must be at least 10"),
    (dict(memory=Contiguous(num_tokens=63, reserve="max", max_seq_len=33)), "block of 33, .* of 63 is 32"),
    (dict(memory=Contiguous(num_tokens=63, reserve="min", max_seq_len=33)), "one of max, pow2, oracle, got 'min'"),
    (dict(arrivals=[-1]), "not falling"),
    (dict(arrivals=[1e6], latency=CLOCK), "within 21307 s"),
    (dict(log_size=3), "even"),
    (dict(contents=np.zeros((2, 3))), r"contents must be \[1, P\]"),
    (dict(samples=0), "samples must be at least 1"),
    (dict(queue_size=1), "queue_size must be at least 2"),
  ],
)
def test_impossible_wishes_are_named(change, message):
  wish: dict[str, Any] = dict(
    prompt_lens=[5], output_lens=[5], memory=Paged(num_pages=8, page_size=4), num_slots=2, token_budget=8
  )
  with pytest.raises(ValueError, match=message):
    simulate(**(wish | change))


def test_memories_of_several_kinds_are_refused():
  with pytest.raises(ValueError, match="one kind"):
    memory = [Paged(num_pages=8, page_size=4), Paged(num_pages=8, page_size=2)]
    sweep([5], [5], memory=memory, num_slots=2, token_budget=8)
