"""The engine end to end: the tokens of a model served from pages are the tokens of the model alone."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_flash import best_of, models
from paged_flash.engine import Engine
from paged_flash.models import ModelConfig
from paged_flash.requests import Params
from paged_flash.sampling import Sampling, sample

REFERENCE = json.loads((Path(__file__).parent / "data" / "smollm2_reference.json").read_text())
TINY = ModelConfig(
  vocab_size=61, embed_dim=24, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8, ffn_dim=40, max_seq_len=128
)


@pytest.fixture(scope="module")
def smollm2():
  return models.load("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def tiny():
  return models.load(TINY, seed=3)


def prompt_of(n, seed=0):
  return np.random.default_rng([n, seed]).integers(1, TINY.vocab_size, n).tolist()


class Alone:
  """The model by itself, one sequence, no pages: every token from a full forward pass over the padded sequence."""

  def __init__(self, model, max_seq_len=128):
    self.model, self.size = model, max_seq_len
    self.forward = jax.jit(self._forward)

  def _forward(self, params, tokens, n):
    window = self.model.config.sliding_window or self.size

    def attend(q, k, v, kv, layer):
      T, H, D = q.shape
      k, v = (jnp.repeat(x, H // x.shape[1], axis=1) for x in (k, v))
      scores = jnp.einsum("thd,shd->hts", q, k, precision="highest") / D**0.5
      distance = jnp.arange(T)[:, None] - jnp.arange(T)
      scores = jnp.where((distance >= 0) & (distance < window), scores, -jnp.inf)
      return jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), v, precision="highest"), kv

    decoder = self.model.bind(params)
    hidden, _ = decoder(tokens, jnp.arange(self.size), None, attend)
    return decoder.logits(hidden[n - 1][None])

  def logits(self, ids):
    tokens = np.zeros(self.size, np.int32)
    tokens[: len(ids)] = ids
    return self.forward(self.model.params, tokens, len(ids))

  def generate(self, ids, params: Params):
    out, logprobs = [], []
    sampling = Sampling(
      temperature=jnp.array([params.temperature]),
      top_k=jnp.array([params.top_k]),
      top_p=jnp.array([params.top_p]),
      seed=jnp.array([params.seed], jnp.uint32),
    )
    draw = jax.jit(sample)
    while len(out) < params.max_tokens:
      token, logprob = draw(self.logits([*ids, *out]), sampling, jnp.array([len(out)]))
      out.append(int(token[0]))
      logprobs.append(float(logprob[0]))
      if out[-1] in params.stop_ids and len(out) >= params.min_tokens:
        break
    return out, logprobs


@pytest.fixture(scope="module")
def alone(tiny):
  return Alone(tiny)


@pytest.fixture(scope="module")
def asked(alone):
  """Requests of odd sizes, and what the model alone says to them."""
  params = [
    Params(max_tokens=20),
    Params(max_tokens=1),
    Params(max_tokens=15, temperature=0.9, seed=7),
    Params(max_tokens=12, temperature=1.3, top_k=5, seed=1),
    Params(max_tokens=17, temperature=1.0, top_p=0.6, seed=2**32 - 1),
    Params(max_tokens=9, temperature=0.7, top_k=9, top_p=0.8),
    Params(max_tokens=25, stop_ids=(5, 9, 30)),
  ]
  lens = [1, 33, 17, 2, 48, 16, 7]
  return [(prompt_of(n), p, *alone.generate(prompt_of(n), p)) for n, p in zip(lens, params, strict=True)]


def check_against(asked, results):
  for (prompt, _, out, logprobs), result in zip(asked, results, strict=True):
    assert result.prompt_ids == tuple(prompt)
    assert list(result.output_ids) == out
    np.testing.assert_allclose(result.logprobs, logprobs, atol=1e-4)


SIZES: dict[str, dict[str, Any]] = {
  "page 1": dict(num_slots=3, num_pages=200, page_size=1, token_budget=8),
  "page 5, odd chunks": dict(num_slots=3, num_pages=60, page_size=5, token_budget=13, chunk_size=7),
  "one slot": dict(num_slots=1, num_pages=12, page_size=16, token_budget=64),
  "all at once": dict(num_slots=8, num_pages=64, page_size=16, token_budget=256),
  "starved": dict(num_slots=6, num_pages=18, page_size=4, token_budget=16),
  "starved, page 1": dict(num_slots=4, num_pages=66, page_size=1, token_budget=9),
}


@pytest.mark.parametrize(
  "name, driver", [*((name, "host") for name in SIZES), ("page 5, odd chunks", "device"), ("starved", "device")]
)
def test_tokens_are_those_of_the_model_alone(tiny, asked, name, driver):
  engine = Engine(tiny, max_seq_len=72, steps_per_dispatch=7, debug=True, **SIZES[name])
  preempted = []
  results = engine.complete(
    [(prompt, params) for prompt, params, *_ in asked],
    driver=driver,
    on_events=lambda events: preempted.extend(events.preempted),
  )
  check_against(asked, results)
  assert bool(preempted) == name.startswith("starved")


def test_tokens_with_a_sliding_window():
  config = dataclasses.replace(TINY, sliding_window=5)
  model = models.load(config, seed=4)
  oracle, asked = Alone(model), []
  for n in (3, 21, 9):
    params = Params(max_tokens=12)
    asked.append((prompt_of(n), params, *oracle.generate(prompt_of(n), params)))
  engine = Engine(model, num_slots=2, num_pages=30, page_size=4, max_seq_len=64, token_budget=10)
  check_against(asked, engine.complete([(prompt, params) for prompt, params, *_ in asked]))


@pytest.fixture(scope="module")
def engine(tiny):
  return Engine(tiny, num_slots=3, num_pages=40, page_size=4, max_seq_len=72, token_budget=12, queue_size=6, debug=True)


def test_a_common_prefix_is_shared(engine, alone):
  prefix = prompt_of(13)
  requests = [([*prefix, *prompt_of(4, i)], Params(max_tokens=6)) for i in range(5)]
  shared, computed = [], []

  def watch(events):
    shared.append(events.pages_shared)
    computed.append(events.num_scheduled)

  results = engine.complete(requests, on_events=watch)
  check_against([(prompt, params, *alone.generate(prompt, params)) for prompt, params in requests], results)
  # Three full pages are computed once; what is left of the prefix, and all else, by each.
  assert max(shared) == 3 and sum(computed) == 12 + 5 * (1 + 4 + 5)


def test_the_open_loop_cancel_and_old_states(engine, alone):
  state = engine.init()
  assert state.idle
  state, a = engine.submit(state, prompt_of(9), max_tokens=8)
  state, b = engine.submit(state, prompt_of(5), max_tokens=30)
  tokens, kept = {a: [], b: []}, None
  for i in range(4):
    state, events = engine.step(state)
    for event in events:
      tokens[event.request].append(event.token)
    if i == 2:
      kept, seen = state.scheduler, jax.tree.map(np.array, state.scheduler)
  state = engine.cancel(state, b)
  while not state.idle:
    state, events = engine.step(state)
    tokens[a] += [event.token for event in events]
  assert tokens[a] == alone.generate(prompt_of(9), Params(max_tokens=8))[0] == engine.output(state, a)
  assert int(state.scheduler.table.num_free) == engine.num_pages
  jax.tree.map(np.testing.assert_array_equal, kept, seen)  # a state kept is a state unchanged
  with pytest.raises(KeyError, match="request 99 is not kept"):
    engine.output(state, 99)


@pytest.mark.parametrize("pieces", [(1,), (2, 5, 1), (7,)], ids=str)
def test_scenario_32_steps_sent_together_say_what_steps_sent_alone_say(engine, pieces):
  """Here a step is planned on the device, from the state after the one before: no page is reused while one is read."""
  asked = [(prompt_of(n, 4), Params(max_tokens=m)) for n, m in ((17, 9), (3, 20), (30, 2), (1, 7), (9, 12))]

  def said(run):
    state, out = engine.submit_many(engine.init(), asked)[0], []
    while not state.idle:
      state, steps = run(state, len(out))
      out += [[event[:3] for event in events] for events in steps]
    return out

  def alone(state, _):
    state, events = engine.step(state)
    return state, [events]

  together = said(lambda state, done: engine.run(state, pieces[done % len(pieces)]))
  assert together == said(alone)


@pytest.mark.parametrize("num_pages", [40, 9], ids=["roomy", "starved"])
@pytest.mark.parametrize("driver", ["host", "device"])
def test_tokens_are_the_same_with_the_prefix_cache_off_on_and_warm(tiny, alone, num_pages, driver):
  """Prompts that share a page, two pages, or all; greedy and sampled; cold, under eviction, and found again."""
  sizes: dict[str, Any] = dict(num_slots=3, num_pages=num_pages, page_size=4, max_seq_len=32, token_budget=12)
  head = prompt_of(12)
  draw: dict[str, Any] = dict(temperature=0.8, seed=5)
  requests = [
    (head, Params(max_tokens=6)),
    ([*head[:9], 7, 7], Params(max_tokens=9, **draw)),
    (head, Params(max_tokens=6)),
    ([*head, 3], Params(max_tokens=5, tenant=1)),
    (prompt_of(17), Params(max_tokens=10)),
    ([*head, 3], Params(max_tokens=5)),
  ] * 2
  outs = [alone.generate(*request) for request in requests]
  for cache in (False, True):
    engine, found = Engine(tiny, prefix_cache=cache, debug=True, **sizes), {}
    results = engine.complete(requests, driver=driver, on_events=lambda events, f=found: f.update(events.admitted))
    for result, (out, logprobs) in zip(results, outs, strict=True):
      assert list(result.output_ids) == out
      np.testing.assert_allclose(result.logprobs, logprobs, atol=1e-4)
    assert (sum(found.values()) > 0) == cache


def test_samples_of_one_prompt_share_its_pages(engine, alone):
  state, ids = engine.submit_samples(engine.init(), prompt_of(10), 3, max_tokens=8, temperature=1.0, seed=4)
  computed, saved = 0, 0
  while not state.idle:
    state, events = engine.step(state)
    computed, saved = computed + events.num_scheduled, max(saved, events.pages_saved)
  for i, id in enumerate(ids):
    assert (
      engine.output(state, id) == alone.generate(prompt_of(10), Params(max_tokens=8, temperature=1.0, seed=4 + i))[0]
    )
  assert computed == 10 + 2 + 3 * 7  # the prompt once, its last token for each other sample, and the outputs
  assert saved == 2 * 2  # two full pages, held by two more
  done = best_of(engine, prompt_of(10), 3, max_tokens=8, temperature=1.0, seed=4)
  assert {sample.output_ids for sample in done} == {tuple(engine.output(state, id)) for id in ids}
  assert sorted(done, key=lambda sample: -np.mean(sample.logprobs)) == done
  with pytest.raises(ValueError, match="num_samples must be in 1..32, got 0"):
    engine.submit_samples(state, [1], 0)


def test_a_consumed_pool_is_named(engine):
  state, _ = engine.submit(engine.init(), [1], max_tokens=2)
  engine.step(state)
  with pytest.raises(RuntimeError, match="state.kv was consumed"):
    engine.step(state)


@pytest.mark.parametrize(
  "prompt, params, message",
  [
    ([], {}, "prompt_ids must hold at least one token"),
    ([1, 61], {}, r"token ids must be in 0..60, got \[61\]"),
    ([-1], {}, r"token ids must be in 0..60, got \[-1\]"),
    ([1.5], {}, "text, token ids or chat messages"),
    (None, {}, "text, token ids or chat messages, got None"),
    ("text", {}, "needs a tokenizer"),
    ([{"role": "user", "content": "hi"}], {}, "needs a tokenizer"),
    ([1, "x"], {}, "needs a tokenizer"),
    ([1] * 72, {}, "at most 71 tokens .max_seq_len=72., got 72"),
    ([1], dict(max_tokens=0), "max_tokens must be at least 1, got 0"),
    ([1], dict(min_tokens=9, max_tokens=3), "min_tokens must be in 0..max_tokens=3, got 9"),
    ([1], dict(temperature=-1.0), "temperature must be finite and at least 0"),
    ([1], dict(temperature=float("nan")), "temperature must be finite and at least 0"),
    ([1], dict(top_k=-1), "top_k must be at least 0"),
    ([1], dict(top_p=0.0), "top_p must be above 0 and at most 1"),
    ([1], dict(seed=-1), "seed must be in 0"),
    ([1], dict(stop="x"), "stop must be non-empty strings"),
    ([1], dict(stop=["x"]), "stop strings need a tokenizer"),
    ([1], dict(stop_ids=[99]), "token ids must be in"),
    ([1], dict(stop_ids=range(9)), "stop_ids must be at most 8"),
  ],
)
def test_a_bad_request_is_named_and_disturbs_no_other(engine, alone, prompt, params, message):
  good = (prompt_of(6), Params(max_tokens=4))
  results = engine.complete([good, (prompt, Params(**params)), good])
  assert results[1].finish == "error"
  assert re.search(message, results[1].error)
  assert list(results[0].output_ids) == list(results[2].output_ids) == alone.generate(*good)[0]
  with pytest.raises(ValueError, match=r"prompts\[[01]\]: "):
    engine.generate([good[0], prompt], **params)


def test_a_full_queue_refuses_and_changes_nothing(engine):
  state, ids = engine.submit_many(engine.init(), [([1], Params(max_tokens=2))] * 6)
  with pytest.raises(RuntimeError, match="queue_size=6"):
    engine.submit(state, [1])
  while not state.idle:
    state, _ = engine.step(state)
  assert [len(engine.output(state, id)) for id in ids] == [2] * 6


def test_more_requests_than_the_queue_holds(engine, alone):
  requests = [(prompt_of(3, i), Params(max_tokens=3)) for i in range(15)]
  for driver in ("host", "device"):
    results = engine.complete(requests, driver=driver)
    assert [list(r.output_ids) for r in results] == [alone.generate(*request)[0] for request in requests]


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(page_size=0), "page_size must be at least 1, got 0"),
    (dict(num_slots=0), "num_slots must be at least 1, got 0"),
    (dict(num_slots=41), "num_pages must be at least num_slots=41, got 40"),
    (dict(num_pages=None), "either num_pages or memory_bytes"),
    (dict(memory_bytes=10), "either num_pages or memory_bytes"),
    (dict(num_pages=None, memory_bytes=3000), "at least num_slots=4, got 2 .memory_bytes=3000 at 1024 bytes a page"),
    (dict(token_budget=3), "token_budget must be at least num_slots=4, got 3"),
    (dict(max_seq_len=129), "max_seq_len must be at most the model's 128, got 129"),
    (dict(chunk_size=0), "chunk_size must be at least 1"),
    (dict(queue_size=0), "queue_size must be at least 1"),
  ],
)
def test_impossible_sizes_are_named(tiny, change, message):
  sizes = {**dict(num_slots=4, num_pages=40, page_size=4), **change}
  with pytest.raises(ValueError, match=message):
    Engine(tiny, **sizes)


def test_memory_budget_in_bytes(tiny):
  engine = Engine(tiny, num_slots=4, memory_bytes=100_000, page_size=4)
  assert engine.num_pages == 97  # of 2 (K, V) x 2 layers x 4 tokens x 2 heads x 8 x 4 B = 1024 B
  kv = engine.init().kv
  assert kv.k.nbytes + kv.v.nbytes == 97 * 1024 <= 100_000
  assert "97 pages x 4 tokens x 2 layers x 2 (K, V) x 2 heads x 8 x 4 B (float32) = 99,328 B" in engine.memory


def test_min_tokens_keeps_stop_ids_out(tiny, alone):
  prompt = prompt_of(8)
  free, _ = alone.generate(prompt, Params(max_tokens=10))
  engine = Engine(tiny, num_slots=2, num_pages=20, page_size=4, max_seq_len=40, token_budget=8)
  (result,) = engine.complete([(prompt, Params(max_tokens=10, min_tokens=6, stop_ids=free[:2]))])
  assert len(result.output_ids) >= 6 and not set(result.output_ids[:5]) & set(free[:2])


@pytest.fixture
def compiled():
  """Names of the events of XLA compilations, as they happen."""
  seen = []

  def listen(event, *_, **__):
    if event.endswith("backend_compile_duration"):
      seen.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield seen
  jax.monitoring.unregister_event_duration_listener(listen)


def test_steady_state_neither_compiles_nor_transfers(tiny, compiled):
  engine = Engine(tiny, num_slots=3, num_pages=24, page_size=4, max_seq_len=72, token_budget=12)
  state, _ = engine.submit_many(engine.init(), [(prompt_of(9, i), Params(max_tokens=12)) for i in range(5)])
  state, _ = engine.step(state)  # warm-up
  assert compiled
  compiled.clear()
  params, sched, kv, live, steps = tiny.params, state.scheduler, state.kv, True, 0
  while live:  # prefill, decoding, admission and release all happen in here
    with jax.transfer_guard("disallow"):
      sched, kv, _, live = engine._step(params, sched, kv)
    live, steps = bool(live), steps + 1
  assert steps > 20 and not compiled


@pytest.mark.parametrize("driver", ["host", "device"])
def test_one_program_serves_every_request(tiny, compiled, driver):
  """Lengths and sampling of requests are data: nothing but the engine's own sizes is compiled in."""
  engine = Engine(tiny, num_slots=3, num_pages=24, page_size=4, max_seq_len=72, token_budget=12)
  engine.complete([(prompt_of(20), Params(max_tokens=2))] * 2, driver=driver)
  assert compiled
  compiled.clear()
  for n, params in ((3, Params(max_tokens=9)), (40, Params(max_tokens=5, temperature=1.0, top_k=3, stop_ids=(4,)))):
    engine.complete([(prompt_of(n), params)] * 7, driver=driver)
  assert not compiled


@pytest.mark.parametrize("program", ["step", "run"])
def test_no_pool_sized_copy_or_temporary(tiny, program):
  engine = Engine(tiny, num_slots=3, num_pages=4099, page_size=4, max_seq_len=72, token_budget=12)
  state = engine.init()
  args = (np.int32(3),) if program == "run" else ()
  compiled = getattr(engine, f"_{program}").lower(tiny.params, state.scheduler, state.kv, *args).compile()
  shape = ",".join(map(str, state.kv.k.shape))
  made = [line for line in compiled.as_text().splitlines() if f"[{shape}]" in line.split(" = ")[-1].split("(")[0]]
  assert made and not [line for line in made if " copy(" in line or "copy-start(" in line]
  assert compiled.memory_analysis().temp_size_in_bytes < state.kv.k.nbytes / 2


# The real model.


def complete_reference(engine, rows, driver, **kwargs):
  tokenizer = engine.model.tokenizer
  params = [Params(max_tokens=max(len(row["output_ids"]), 1), stop_ids=tokenizer.eos_ids) for row in rows]
  results = engine.complete(
    [(row["prompt_ids"], p) for row, p in zip(rows, params, strict=True)], driver=driver, **kwargs
  )
  for row, result in zip(rows, results, strict=True):
    assert list(result.output_ids) == row["output_ids"], row["name"]


@pytest.mark.slow
def test_smollm2_greedy_tokens_are_those_of_transformers(smollm2):
  assert len(REFERENCE) >= 10 and max(len(row["prompt_ids"]) for row in REFERENCE) > 2000
  engine = Engine(smollm2, num_slots=8, num_pages=400, page_size=16, max_seq_len=2400, token_budget=192)
  complete_reference(engine, REFERENCE, "host")


@pytest.mark.slow
def test_smollm2_with_pages_of_one_token(smollm2):
  rows = [row for row in REFERENCE if len(row["prompt_ids"]) < 100]
  engine = Engine(smollm2, num_slots=3, num_pages=460, page_size=1, max_seq_len=150, token_budget=33)
  complete_reference(engine, rows, "host")


@pytest.mark.slow
def test_smollm2_on_the_device_with_odd_sizes_and_preemptions(smollm2):
  rows = [row for row in REFERENCE if len(row["prompt_ids"]) < 200]
  longest = max(len(row["prompt_ids"]) + len(row["output_ids"]) for row in rows)
  pages = -(-longest // 7) + 4
  engine = Engine(
    smollm2, num_slots=5, num_pages=pages, page_size=7, max_seq_len=longest + 1, token_budget=64, chunk_size=50
  )
  preempted = []
  complete_reference(engine, rows, "device", on_events=lambda events: preempted.extend(events.preempted))
  assert preempted


@pytest.mark.slow
def test_stop_strings_cut_the_text_in_both_drivers(smollm2):
  engine = Engine(smollm2, num_slots=4, num_pages=64, page_size=16, max_seq_len=256, token_budget=64)
  chat = [{"role": "user", "content": "Count from one to ten in words."}]
  (whole,) = engine.complete([(chat, Params(max_tokens=40))])
  stop = whole.text[20:31]  # from the middle of a word over several tokens
  streamed = []
  for driver in ("host", "device"):
    pieces = []
    (cut, other) = engine.complete(
      [(chat, Params(max_tokens=40, stop=[stop, "never said"])), (chat, Params(max_tokens=40))],
      driver=driver,
      on_text=lambda i, text, pieces=pieces: pieces.append(text) if i == 0 else None,
    )
    assert cut.finish == "stop" and cut.text == whole.text[: whole.text.index(stop)] == "".join(pieces)
    assert cut.output_ids == whole.output_ids[: len(cut.output_ids)] and len(cut.output_ids) < len(whole.output_ids)
    assert other.text == whole.text
    streamed.append(cut)
  assert streamed[0].output_ids == streamed[1].output_ids
  (late,) = engine.complete([(chat, Params(max_tokens=40, min_tokens=38, stop=[stop]))])
  assert len(late.output_ids) >= 38
