"""Preemption by swapping to host memory: the tokens are the same, nothing is computed twice, and the events say so."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_flash import Engine, Params, history, models, policies, swapping
from paged_flash.cache import kv_pages
from paged_flash.cache.page_table import NO_PAGE, PageCopies
from paged_flash.state import NOBODY
from tests import test_engine
from tests.test_scheduler import Server, even, prompt_of
from tests.test_window import WindowServer

SMALL: dict[str, Any] = dict(slots=4, pages=8, page_size=4, budget=8, max_seq_len=32, queue=8, host=6)


def totals(server):
  """Over all steps: preemptions, tokens lost, pages copied out and back."""
  names = ("lost", "swapped_out", "swapped_in")
  sums = [sum(int(getattr(events, name).sum()) for _, events in server.log) for name in names]
  return sum(int((events.preempted != NOBODY).sum()) for _, events in server.log), *sums


def test_the_victim_comes_back_from_host_memory_and_computes_nothing_twice():
  server = Server(**SMALL, cache=False)
  prompts = [prompt_of(n, n) for n in (13, 10)]  # four and three pages of eight
  for prompt in prompts:
    server.submit(prompt, max_tokens=14)
  server.finish()
  preempted, lost, out, back = totals(server)
  assert preempted >= 1 and lost == 0 and out == back > 0
  assert sum(int(events.num_scheduled) for _, events in server.log) == 13 + 10 + 2 * 13  # every token once
  (step,) = [i for i, (_, events) in enumerate(server.log) if (events.preempted == 1).any()][:1]
  plan, events = server.log[step]
  slot = events.preempted.tolist().index(1)
  assert int(events.swapped_out[slot]) == int((plan.swap_out.src[slot] >= 0).sum())
  resumed = next(events for _, events in server.log[step + 1 :] if (events.admitted == 1).any())
  slot = resumed.admitted.tolist().index(1)
  assert int(resumed.swapped_in[slot]) == int(events.swapped_out.sum())
  assert int(resumed.cached[slot]) + 1 == 10 + len([1 for _, e in server.log[: step + 1] if (e.ids == 1).any()])


def test_what_the_index_still_finds_is_not_copied_back():
  server = Server(**SMALL)
  for n in (13, 10):
    server.submit(prompt_of(n, n), max_tokens=14)
  server.finish()
  _, lost, out, back = totals(server)
  assert lost == 0 and 0 < back < out


def test_pages_that_others_hold_go_out_too():
  """They are gone when the victim comes back: who held them has ended, and others needed their bytes."""
  server = Server(**SMALL)
  beginning = prompt_of(9)
  server.submit([*beginning, *prompt_of(3, 1)], max_tokens=12)
  for _ in range(2):  # its first two pages can be found
    server.step()
  server.submit([*beginning, *prompt_of(2, 2)], max_tokens=20)
  while not totals(server)[2]:
    server.step()
  plan, events = server.log[-1]
  assert events.preempted.max() == 1 and events.lost.sum() == 0
  held = np.asarray(plan.swap_out.src).max(axis=0)
  assert held[0] == 0 and held[1] == 1 and events.pages_shared == 0, "it shared two pages until now"
  server.submit(prompt_of(22, 3), max_tokens=5)
  server.finish()


def test_without_room_in_host_memory_a_victim_is_recomputed():
  server = Server(**{**SMALL, "host": 1}, cache=False)
  for n in (13, 10):
    server.submit(prompt_of(n, n), max_tokens=14)
  server.finish()
  preempted, lost, out, back = totals(server)
  assert preempted >= 1 and lost > 0 and out == back == 0


def test_the_cheaper_way():
  costs = swapping.Cheaper(page_bytes=1000, bytes_per_s=1e6, copy_s=1e-3, tokens_per_s=1000)  # 4 ms a page, 1 a token
  tokens, pages = jnp.array([5, 4, 0, 16, 17]), jnp.array([1, 1, 0, 4, 4])
  assert costs(tokens, pages).tolist() == [True, False, False, False, True]
  assert swapping.always(tokens, pages).tolist() == [True, True, False, True, True]
  assert not swapping.never(tokens, pages).any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["cache", "no cache", "window"])
def test_starved_pools(kind, seed):
  """Requests that begin alike, samples, cancelled ones; a host pool too small for all; every token as served alone."""
  rng = np.random.default_rng(seed)
  sizes: dict[str, Any] = {**SMALL, "policy": policies.by_priority, "preemption": even, "cache": kind != "no cache"}
  window: dict[str, Any] = {**sizes, "pages": 6, "max_seq_len": 64, "window": 6}
  server = WindowServer(**window) if kind == "window" else Server(**sizes)
  for i in range(4):
    server.submit(prompt_of(2, i), max_tokens=20)
  beginnings = [prompt_of(int(n), i) for i, n in enumerate(rng.integers(1, 16, 3))]
  for i in range(10):
    prompt = [*beginnings[rng.integers(3)][: rng.integers(1, 16)], *prompt_of(int(rng.integers(1, 5)), i)]
    samples = int(rng.choice([1, 1, 2]))
    server.submit_samples(prompt, samples, max_tokens=int(rng.integers(1, 13)), priority=int(rng.integers(0, 3)))
    for _ in range(rng.integers(0, 8)):
      server.step()
    if rng.random() < 0.3:
      server.cancel(int(rng.choice(sorted(server.asked))))
  server.finish()
  preempted, _, out, back = totals(server)
  assert preempted > 0 and out >= back
  if kind == "no cache":
    assert out > 0


def test_pages_go_out_and_come_back():
  kv = kv_pages.init(
    num_layers=2, num_pages=3, page_size=1, num_kv_heads=1, head_dim=1, dtype=jnp.float32, num_host_pages=2
  )
  kv = dataclasses.replace(kv, k=jnp.arange(1.0, 7).reshape(6, 1, 1, 1), v=-jnp.arange(1.0, 7).reshape(6, 1, 1, 1))
  kv = kv_pages.swap(kv, PageCopies(src=jnp.array([[2, NO_PAGE, 0]]), dst=jnp.array([[1, NO_PAGE, 0]])), None)
  assert kv.host is not None
  assert [a.sharding.memory_kind for a in (*kv.host, kv.k)] == ["pinned_host", "pinned_host", "device"]
  assert kv.host[0].ravel().tolist() == [1, 4, 3, 6] and kv.host[1].ravel().tolist() == [-1, -4, -3, -6]
  kv = kv_pages.swap(kv, None, PageCopies(src=jnp.array([1]), dst=jnp.array([1])))
  assert kv.k.ravel().tolist() == [1, 3, 3, 4, 6, 6] and kv.v.ravel().tolist() == [-1, -3, -3, -4, -6, -6]


# The engine.


@pytest.fixture(scope="module")
def tiny():
  return models.load(test_engine.TINY, seed=3)


@pytest.fixture(scope="module")
def asked(tiny):
  alone, draw = test_engine.Alone(tiny), Params(temperature=0.9, seed=7)
  params = [Params(max_tokens=20), dataclasses.replace(draw, max_tokens=25)]
  params += [Params(max_tokens=17), dataclasses.replace(draw, max_tokens=22)]
  prompts = [test_engine.prompt_of(n) for n in (7, 12, 17, 3)]
  return [(prompt, p, *alone.generate(prompt, p)) for prompt, p in zip(prompts, params, strict=True)]


SIZES: dict[str, Any] = dict(num_slots=4, num_pages=12, page_size=4, max_seq_len=48, token_budget=12, debug=True)


@pytest.fixture(scope="module")
def engine(tiny):
  return Engine(tiny, num_host_pages=40, prefix_cache=False, steps_per_dispatch=7, **SIZES)


@pytest.mark.parametrize("driver", ["host", "device"])
def test_tokens_are_those_of_the_model_alone(engine, asked, driver):
  out, back, lost = {}, {}, 0

  def watch(events):
    nonlocal lost
    out.update(events.swapped_out)
    back.update(events.swapped_in)
    lost += sum(events.preempted.values())

  results = engine.complete([(prompt, params) for prompt, params, *_ in asked], driver=driver, on_events=watch)
  test_engine.check_against(asked, results)
  assert out and back.keys() == out.keys() and lost == 0


def test_a_run_with_swaps_is_recorded_explained_and_forked(engine, asked):
  run = history.record(engine)
  for prompt, params, *_ in asked:
    run, _ = run.submit(prompt, max_tokens=params.max_tokens, temperature=params.temperature, seed=params.seed)
  middle = None
  while not run.now.idle:
    run, events = run.step()
    if events.swapped_out:
      middle, (id,) = run.num_steps, [*events.swapped_out][:1]
      cost = events.swapped_out[id]
  assert middle is not None and run.replay() == run.num_steps
  said = run.explain(id)
  assert f"; swapped: {cost} pages copied to host memory" in said
  assert "resumed in slot" in said and f"{cost} pages copied back from host memory" in said
  fork = run.fork_from(middle)  # a victim is in host memory, which is not recorded
  assert int(fork.now.scheduler.host.seq_lens.max()) > 0
  while not fork.now.idle:
    fork, _ = fork.step()
  for id, (_, _, out, _) in enumerate(asked):
    assert engine.output(fork.now, id) == out


@pytest.mark.parametrize("device_copy", [True, False])
def test_a_snapshot_taken_while_requests_are_in_host_memory(tiny, engine, asked, tmp_path, device_copy):
  """What was in host memory when the process died comes back, though the pages have been written over since."""
  state, ids = engine.submit_many(engine.init(), [(prompt, params) for prompt, params, *_ in asked])
  with history.Snapshots(engine, tmp_path, device_copy=device_copy) as snapshots:
    while not (np.asarray(state.scheduler.host.seq_lens) > 0).any():
      state, _ = engine.step(state)
    kept, held = [np.array(a) for a in state.kv.host], int((state.scheduler.host.ref_counts > 0).sum())
    assert held > 1 and snapshots.save(state)
    while not state.idle:
      state, _ = engine.step(state)
  assert any((old != np.array(new)).any() for old, new in zip(kept, state.kv.host, strict=True))
  del state
  other = Engine(tiny, num_host_pages=40, prefix_cache=False, steps_per_dispatch=7, **SIZES)
  state, back = history.resume(other, tmp_path), 0
  for array, wanted in zip(state.kv.host, kept, strict=True):
    assert array.sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(array, wanted)
  while not state.idle:
    state, events = other.step(state)
    back += sum(events.swapped_in.values())
  assert back >= held and [other.output(state, id) for id in ids] == [out for _, _, out, _ in asked]
  with pytest.raises(ValueError, match="num_host_pages must be 40, as in the snapshot, got 39"):
    history.resume(Engine(tiny, num_host_pages=39, prefix_cache=False, **SIZES), tmp_path)


def test_no_pool_sized_copy_or_temporary(tiny):
  """Nor of the pool of a draft."""
  draft: dict[str, Any] = dict(num_proposed=2, proposer=models.first_layers(tiny, 1))
  engine = Engine(tiny, **{**SIZES, **draft, "num_pages": 4099, "num_host_pages": 2053})
  state = engine.init()
  compiled: Any = engine._step.lower(engine.params, state.scheduler, state.kv).compile()
  assert state.kv.host is not None and state.kv.draft is not None and state.kv.draft.host is not None
  for pool in (state.kv.k, state.kv.host[0], state.kv.draft.k, state.kv.draft.host[0]):
    shape = ",".join(map(str, pool.shape))
    made = [line for line in compiled.as_text().splitlines() if f"[{shape}]" in line.split(" = ")[-1].split("(")[0]]
    assert made and not [line for line in made if " copy(" in line or "copy-start(" in line]
  assert compiled.memory_analysis().temp_size_in_bytes < state.kv.draft.host[0].nbytes / 2


def test_impossible_sizes_are_named(tiny):
  with pytest.raises(ValueError, match="num_host_pages must be at least 0, got -1"):
    Engine(tiny, **SIZES, num_host_pages=-1)


@pytest.mark.parametrize("num_host_pages", [1, 3, pytest.param(1, marks=pytest.mark.gpu)])
def test_a_page_leaves_and_comes_back_elsewhere_with_what_it_held(num_host_pages):
  """Where host memory has one page, XLA for GPUs must not be asked to drop its axis of one there."""
  L, N = 4, 3
  sizes = dict(num_layers=L, num_pages=N, page_size=16, num_kv_heads=2, head_dim=64, num_host_pages=num_host_pages)
  kv = kv_pages.init(**sizes, dtype=jnp.bfloat16)
  before = [jax.random.normal(jax.random.key(i), kv.k.shape, kv.k.dtype) for i in range(2)]
  kv = dataclasses.replace(kv, k=jnp.copy(before[0]), v=jnp.copy(before[1]))
  here, there, elsewhere = jnp.array([2]), jnp.array([num_host_pages - 1]), jnp.array([0])
  out, back = PageCopies(src=here, dst=there), PageCopies(src=there, dst=elsewhere)
  kv = jax.jit(kv_pages.swap, donate_argnames="kv")(kv, out, back)
  for old, new in zip(before, (kv.k, kv.v), strict=True):
    old, new = (np.asarray(x, np.float32).reshape(L, N, -1) for x in (old, new))
    np.testing.assert_array_equal(new, old[:, [2, 1, 2]])


@pytest.mark.gpu
@pytest.mark.parametrize("driver", ["host", "device"])
def test_on_a_gpu_host_pages_are_pinned_and_the_tokens_those_of_a_roomy_pool(tiny, asked, driver):
  """Numbers differ by where in a batch they are computed, so products are exact: which token is due must not."""
  requests, out, back = [(prompt, params) for prompt, params, *_ in asked], {}, {}

  def watch(events):
    out.update(events.swapped_out)
    back.update(events.swapped_in)

  with jax.default_matmul_precision("highest"):
    starved = Engine(tiny, num_host_pages=40, prefix_cache=False, steps_per_dispatch=7, **SIZES)
    results = starved.complete(requests, driver=driver, on_events=watch)
    roomy = Engine(tiny, prefix_cache=False, **{**SIZES, "num_pages": 64}).complete(requests)
    state, _ = starved.submit_many(starved.init(), requests)
    compiled: Any = starved._step.lower(tiny.params, state.scheduler, state.kv).compile()
    state, _ = starved.step(state)
  assert out and back.keys() == out.keys() and state.kv.host is not None
  assert [done.output_ids for done in results] == [done.output_ids for done in roomy]
  assert all(array.sharding.memory_kind == "pinned_host" for array in state.kv.host)
  memory = compiled.memory_analysis()
  assert memory.host_temp_size_in_bytes == 0
  assert memory.host_alias_size_in_bytes == memory.host_argument_size_in_bytes == 2 * state.kv.host[0].nbytes
