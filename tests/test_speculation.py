"""Speculation changes how many steps it takes, and nothing else: scheduler with a stand-in model, then the engine."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_flash import scheduler, speculation
from paged_flash.engine import Engine
from paged_flash.requests import Params, rows
from paged_flash.state import LENGTH, NOBODY, STOP
from tests.test_engine import TINY, Alone, check_against, models
from tests.test_scheduler import VOCAB, Server, expected, prompt_of


def looked_up(tokens, num_tokens, longest, shortest):
  """`speculation.lookup` for one list of tokens, place by place."""
  best, at = 0, None
  for i in range(len(tokens) - 1):
    length = 0
    while length < longest and length <= i and tokens[i - length] == tokens[len(tokens) - 1 - length]:
      length += 1
    if length >= max(shortest, best):
      best, at = length, i
  if at is None:
    return [NOBODY] * num_tokens
  tokens = list(tokens)
  for k in range(num_tokens):
    tokens.append(tokens[at + 1 + k])
  return tokens[-num_tokens:]


@pytest.mark.parametrize("longest, shortest", [(1, 1), (3, 1), (3, 2), (4, 4)])
def test_lookup_finds_the_longest_and_latest_match(longest, shortest):
  random = np.random.default_rng(longest)
  lens = [1, 2, 3, 9, 20, 30, 31, 32]
  histories = [random.integers(0, 2, n).tolist() for n in lens]
  state = scheduler.init(num_slots=9, pages_per_slot=8, num_pages=9, page_size=4, num_requests=8, max_seq_len=32)
  state, _ = scheduler.submit(state, rows([(ids, Params()) for ids in histories], 8, 32))
  order = random.permutation([*range(8), NOBODY])
  state = dataclasses.replace(state, running=jnp.asarray(order))
  got = jax.jit(functools.partial(speculation.lookup, num_tokens=5, longest=longest, shortest=shortest))(state)
  found = [looked_up(histories[r], 5, longest, shortest) if r >= 0 else [NOBODY] * 5 for r in order]
  assert got.tolist() == found
  assert sum(proposal[0] >= 0 for proposal in found) >= 3


def totals(server):
  """Tokens proposed over all steps, and of these accepted."""
  proposed = sum(int(events.proposed.sum()) for _, events in server.log)
  return proposed, sum(int(jnp.where(events.proposed > 0, events.counts - 1, 0).sum()) for _, events in server.log)


SHAPES: dict[str, dict[str, Any]] = {
  "cache": dict(slots=4, pages=12, page_size=4, budget=12, chunk=5, max_seq_len=48, host=30),
  "no cache": dict(slots=5, pages=9, page_size=3, budget=7, max_seq_len=27, cache=False, host=12),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_those_without_speculation(shape):
  """On starved pools with swapping; `test_scheduler_machine` walks where this does not lead."""
  preempted = swapped = 0
  for seed, errs in enumerate((0.0, 0.4)):
    random = np.random.default_rng(seed)
    server = Server(seed=seed, guesses=4, errs=errs, **SHAPES[shape])
    room = min(server.max_seq_len, server.state.table.num_pages * server.state.table.page_size)
    prompts = [prompt_of(int(random.integers(1, room // 2)), int(random.integers(0, 3))) for _ in range(7)]
    for prompt in prompts:
      stop = random.integers(1, VOCAB, 2).tolist()
      most = int(random.integers(1, room - len(prompt)))
      server.submit_samples(prompt, int(random.integers(1, 3)), max_tokens=most, stop_ids=stop)
      for _ in range(random.integers(0, 5)):
        server.step()
    server.finish()
    proposed, accepted = totals(server)
    assert proposed > accepted > 8  # a stop cuts right ones too
    preempted += sum(int((events.preempted >= 0).sum()) for _, events in server.log)
    swapped += sum(int(events.swapped_in.sum()) for _, events in server.log)
  assert preempted > 0 and swapped > 0


def test_a_right_guess_saves_steps_and_a_wrong_one_costs_no_page():
  prompt, most = prompt_of(9), 17
  sizes: dict[str, Any] = dict(guesses=4, fewest=4, slots=1, pages=16, budget=16, max_seq_len=32)
  for errs, steps in ((0.0, 1 + 4), (1.0, most)):
    server = Server(errs=errs, **sizes)
    server.submit(prompt, max_tokens=most)
    server.drain()
    assert len(server.log) == steps
    assert server.got[0] == expected(prompt, Params(max_tokens=most))[0]
  server = Server(errs=1.0, **sizes)
  server.submit(prompt_of(8), max_tokens=most)
  server.step()
  _, events = server.step()  # the token due, and four guesses in the same page and the next
  assert int(events.num_scheduled) == 5 and int(events.pages_held) == 4
  assert server.state.table.seq_lens.tolist() == [9] and int(server.state.table.num_free) == 16 - 3


def test_scenario_31_a_stop_inside_accepted_tokens_cuts_the_rest():
  prompt = prompt_of(7, 2)
  free = expected(prompt, Params(max_tokens=20))[0]
  at = next(i for i in range(2, 20) if free[i] not in free[:i])  # its first place
  for params, keep, finish in (
    (Params(max_tokens=20, stop_ids=[free[at]]), at + 1, STOP),
    (Params(max_tokens=at + 2), at + 2, LENGTH),
    (Params(max_tokens=20, min_tokens=at + 2, stop_ids=[free[at], free[at + 3]]), None, STOP),
  ):
    server = Server(guesses=8, fewest=8, slots=1, pages=16, budget=16, max_seq_len=32)
    server.submit(prompt, max_tokens=params.max_tokens, min_tokens=params.min_tokens, stop_ids=params.stop_ids)
    server.finish()
    assert server.ended == {0: finish} and (keep is None or server.got[0] == free[:keep])
    row = server.state.requests
    assert int(row.num_tokens[0] - row.prompt_lens[0]) == len(server.got[0])


# The engine.

EAGER = functools.partial(speculation.lookup, shortest=1)  # more guesses, and more of them wrong


@pytest.fixture(scope="module")
def tiny():
  return models.load(TINY, seed=3)


def loops(n, seed=0):
  """A prompt that repeats itself."""
  part = np.random.default_rng([n, seed]).integers(1, TINY.vocab_size, 5).tolist()
  return (part * n)[:n]


@pytest.fixture(scope="module")
def asked(tiny):
  alone = Alone(tiny)
  params = [
    Params(max_tokens=30),
    Params(max_tokens=1),
    Params(max_tokens=25, temperature=0.3, seed=7),
    Params(max_tokens=22, temperature=0.8, top_k=2, seed=1),
    Params(max_tokens=27, stop_ids=(5, 9, 30)),
    Params(max_tokens=30, temperature=0.5, top_p=0.6, seed=3),
    Params(max_tokens=18),
  ]
  prompts = [loops(n, i) for i, n in enumerate([12, 33, 17, 2, 28, 16])] + [loops(12, 0)]
  return [(prompt, p, *alone.generate(prompt, p)) for prompt, p in zip(prompts, params, strict=True)]


@pytest.mark.parametrize(
  "sizes, driver",
  [
    (dict(num_slots=3, num_pages=60, page_size=5, token_budget=13, chunk_size=7, num_proposed=3), "device"),
    (dict(num_slots=6, num_pages=18, page_size=4, token_budget=16, num_proposed=5), "host"),
    (dict(num_slots=6, num_pages=18, page_size=4, token_budget=16, num_proposed=5, num_host_pages=60), "device"),
  ],
  ids=["odd chunks", "starved", "swapped"],
)
def test_the_engine_says_the_same_tokens_with_speculation(tiny, asked, sizes, driver):
  engine = Engine(tiny, max_seq_len=72, steps_per_dispatch=7, debug=True, proposer=EAGER, **sizes)
  seen = []
  results = engine.complete([(p, params) for p, params, *_ in asked], driver=driver, on_events=seen.append)
  check_against(asked, results)
  proposed, accepted = (sum(sum(getattr(e, name).values()) for e in seen) for name in ("proposed", "accepted"))
  assert proposed > accepted > 20  # right and wrong guesses
  assert any(e.preempted for e in seen) == (engine.num_pages == 18)
  assert any(e.swapped_in for e in seen) == (engine.num_host_pages > 0)


def test_a_proposer_of_ones_own(tiny, asked):
  prompt, params, out, _ = asked[0]

  def oracle(state, num_tokens):
    told = jnp.asarray([*out, *[0] * num_tokens])
    done = (state.requests.num_tokens - state.requests.prompt_lens)[state.running]
    return told[done[:, None] + jnp.arange(num_tokens)]

  engine = Engine(tiny, num_slots=1, num_pages=20, token_budget=16, num_proposed=4, proposer=oracle, prefix_cache=False)
  steps = []
  (result,) = engine.complete([(prompt, params)], on_events=steps.append)
  assert list(result.output_ids) == out and len(steps) == 1 + -(-(len(out) - 1) // 5)
  with pytest.raises(ValueError, match="num_proposed must be at least 0, got -1"):
    Engine(tiny, num_pages=20, num_proposed=-1)
