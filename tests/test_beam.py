"""Beams over pages are those of a dense search: every step from full forward passes, all ways compared in a list."""

from typing import Any

import jax
import numpy as np
import pytest

from paged_flash import models
from paged_flash.beam import BeamSearch
from paged_flash.engine import Engine
from tests.test_engine import TINY, Alone, prompt_of


@pytest.fixture(scope="module")
def tiny():
  return models.load(TINY, seed=3)


@pytest.fixture(scope="module")
def alone(tiny):
  return Alone(tiny)


def dense(alone, prompt, *, width, max_tokens, penalty, stop_ids):
  """The same search with lists, no pages, no top-k: [(output, logprob, finish)], best first."""
  beams, results = [((), 0.0)], []

  def worth(result):
    return result[1] / len(result[0]) ** penalty

  for length in range(1, max_tokens + 1):
    ways = []
    for output, score in beams:
      logprobs = np.asarray(jax.nn.log_softmax(alone.logits([*prompt, *output])[0]))
      for token, logprob in enumerate(logprobs.tolist()):
        way = ((*output, token), score + logprob)
        results.append((*way, "stop")) if token in stop_ids else ways.append(way)
    beams = sorted(ways, key=lambda way: -way[1])[:width]
    if length == max_tokens:
      results += [(*beam, "length") for beam in beams]
    results = sorted(results, key=lambda result: -worth(result))[:width]
    if len(results) == width and worth(results[-1]) >= beams[0][1] / max_tokens**penalty:
      break
  return results


SIZES: dict[str, dict[str, Any]] = {
  "roomy": dict(width=3, num_slots=6, num_pages=80, page_size=4, token_budget=16),
  "starved": dict(width=4, num_slots=13, num_pages=22, page_size=4, token_budget=16),
  "starved, page 1": dict(width=2, num_slots=4, num_pages=46, page_size=1, token_budget=9, chunk_size=5),
  "six, page 5": dict(width=6, num_slots=6, num_pages=30, page_size=5, token_budget=13),
}


@pytest.mark.parametrize("name", SIZES)
def test_results_are_those_of_a_dense_search(tiny, alone, name):
  sizes = dict(SIZES[name])
  width = sizes.pop("width")
  search = BeamSearch(Engine(tiny, max_seq_len=48, debug=True, **sizes), width=width)
  prompts, restarts, finishes = [prompt_of(n) for n in (17, 1, 12, 21, 8)], 0, set()
  for penalty, stop_ids, max_tokens in ((1.0, (5, 9, 30), 11), (0.0, (7,), 9)):
    found, state = search(prompts, max_tokens=max_tokens, length_penalty=penalty, stop_ids=stop_ids)
    for prompt, results in zip(prompts, found, strict=True):
      wanted = dense(alone, prompt, width=width, max_tokens=max_tokens, penalty=penalty, stop_ids=stop_ids)
      assert [(r.output_ids, r.finish) for r in results] == [(ids, finish) for ids, _, finish in wanted]
      np.testing.assert_allclose([r.logprob for r in results], [score for _, score, _ in wanted], atol=1e-4)
      finishes |= {r.finish for r in results}
    assert int(state.state.table.num_free) == search.engine.num_pages
    restarts += int(state.restarts)
  assert finishes == {"stop", "length"}
  assert (restarts > 0) == name.startswith("starved")


def test_beams_share_pages_and_copy_only_what_is_shared_and_written(tiny):
  search = BeamSearch(Engine(tiny, num_slots=4, num_pages=64, page_size=4, max_seq_len=64), width=4)
  (results,), state = search([prompt_of(16)], max_tokens=1)
  assert len(results) == 4 and int(state.held) == 4 and int(state.saved) == 0 == int(state.copied)  # one beam so far
  _, state = search([prompt_of(16)], max_tokens=2)  # its full pages, and one more for each of four beams
  assert (int(state.held), int(state.saved), int(state.copied)) == (4 + 8, 3 * 4, 0)
  _, state = search([prompt_of(15)], max_tokens=2)  # the last page has room: each beam that writes to it gets a copy
  assert (int(state.held), int(state.saved), int(state.copied)) == (4 + 3 + 4, 3 * 3, 4)


def test_what_the_pool_can_never_hold_ends_with_what_it_has(tiny, alone):
  search = BeamSearch(Engine(tiny, num_slots=3, num_pages=8, page_size=2, max_seq_len=16, debug=True), width=3)
  (results,), _ = search([prompt_of(7)], max_tokens=9, length_penalty=0.0)
  count = len(results[0].output_ids)
  wanted = dense(alone, prompt_of(7), width=3, max_tokens=count, penalty=0.0, stop_ids=())
  assert 1 < count < 9 and [r.output_ids for r in results] == [ids for ids, _, _ in wanted]


def test_bad_arguments_are_named(tiny):
  engine = Engine(tiny, num_slots=2, num_pages=8, page_size=4)
  with pytest.raises(ValueError, match="width must be in 1..num_slots=2, got 3"):
    BeamSearch(engine, width=3)
  search = BeamSearch(engine, width=2)
  with pytest.raises(ValueError, match=r"prompts\[1\]: token ids must be in 0..60, got \[61\]"):
    search([[1], [61]])
  with pytest.raises(ValueError, match="length_penalty must be finite and at least 0, got -1"):
    search([[1]], length_penalty=-1)
