"""A draft model proposes: the tokens are those without it, and where the draft is the model itself, no guess is wrong.

A wrong K or V of the draft changes no token, only what is guessed: so a model that drafts for itself says whether its
pages hold what they should, wherever they were shared, copied, swapped or computed again.
"""

import dataclasses
from typing import Any

import jax
import pytest

from paged_flash import Engine, Params, history, models
from paged_flash.models import first_layers
from tests.test_engine import TINY, Alone, check_against, prompt_of

ONE = dataclasses.replace(TINY, num_layers=1)
SIZES: dict[str, Any] = dict(num_slots=5, page_size=4, max_seq_len=48, token_budget=24, num_proposed=3, debug=True)


@pytest.fixture(scope="module")
def tiny():
  """Its q, k and v are large, so that what it says depends on all that it sees."""
  model = models.load(ONE, seed=3)
  layer = model.params["layers"][0]
  layers = {0: {**layer, "qkv": jax.tree.map(lambda a: 12 * a, layer["qkv"])}}
  return dataclasses.replace(model, params={**model.params, "layers": layers})


@pytest.fixture(scope="module")
def engine(tiny):
  """The model drafts for itself, on a starved pool with host memory for some of the victims."""
  return Engine(tiny, proposer=tiny, num_pages=15, num_host_pages=6, **SIZES)


PROMPTS = [prompt_of(9), [*prompt_of(9), *prompt_of(4)], prompt_of(18), prompt_of(12)]  # two begin alike
SAMPLES = 3  # of the last
WANTED = [
  Params(max_tokens=24),
  Params(max_tokens=20, temperature=0.9, seed=7),
  Params(max_tokens=17, temperature=0.6, top_p=0.8, seed=1),
  *[Params(max_tokens=15, temperature=1.2, seed=5 + i) for i in range(SAMPLES)],
]


@pytest.fixture(scope="module")
def asked(tiny):
  alone, prompts = Alone(tiny), PROMPTS + PROMPTS[-1:] * (SAMPLES - 1)
  return [(prompt, p, *alone.generate(prompt, p)) for prompt, p in zip(prompts, WANTED, strict=True)]


def submitted(run):
  """A recording to which all requests were handed."""
  run, ids = run.call("submit_many", list(zip(PROMPTS[:-1], WANTED, strict=False)))
  run, samples = run.call("submit_samples", PROMPTS[-1], SAMPLES, **dataclasses.asdict(WANTED[len(ids)]))
  return run, ids + samples


def test_a_model_that_drafts_for_itself_is_always_right(engine, asked):
  run, ids = submitted(history.record(engine))
  seen = []
  while not run.now.idle:
    run, events = run.step()
    seen.append(events)
  assert [engine.output(run.now, id) for id in ids] == [out for _, _, out, _ in asked]
  proposed, accepted = (sum(sum(getattr(e, name).values()) for e in seen) for name in ("proposed", "accepted"))
  assert proposed == accepted > 40
  out, back, lost = (sum(sum(getattr(e, n).values()) for e in seen) for n in ("swapped_out", "swapped_in", "preempted"))
  assert out > 0 and back > 0 and lost > 0 and max(e.pages_shared for e in seen) > 1
  assert max(n for e in seen for n in e.admitted.values()) > 0  # of a prefix that was found
  assert run.replay() == run.num_steps  # without the draft: what held is in the record

  middle = next(i for i, e in enumerate(seen) if e.swapped_out) + 1
  fork, right = run.fork_from(middle), 0  # computes K and V of both models again, also in host memory
  while not fork.now.idle:
    fork, events = fork.step()
    assert events.proposed == events.accepted
    right += sum(events.accepted.values())
  assert engine._step._cache_size() == 1  # nothing is compiled twice
  assert right > 10 and [engine.output(fork.now, id) for id in ids] == [out for _, _, out, _ in asked]


def test_a_smaller_draft_errs_and_the_tokens_are_the_same(tiny, asked):
  config = dataclasses.replace(ONE, num_heads=2, num_kv_heads=1, head_dim=4, sliding_window=5)
  engine = Engine(tiny, proposer=models.load(config, seed=9), num_pages=60, steps_per_dispatch=7, **SIZES)
  assert "1 layers x 2 (K, V) x 2 heads x 8 and 1 layers x 2 (K, V) x 1 heads x 4 x 4 B" in engine.memory
  assert engine.page_bytes == 4 * 4 * (2 * 2 * 8 + 2 * 1 * 4)
  seen = []
  results = engine.complete([(p, params) for p, params, *_ in asked], driver="device", on_events=seen.append)
  check_against(asked, results)
  proposed, accepted = (sum(sum(getattr(e, name).values()) for e in seen) for name in ("proposed", "accepted"))
  assert proposed > accepted > 5


def test_the_first_layers_are_those_of_the_model():
  model = models.load(TINY)
  draft = first_layers(model, 1)
  assert draft.config == ONE and draft.params["layers"].keys() == {0}
  assert draft.params["layers"][0]["qkv"]["weight"] is model.params["layers"][0]["qkv"]["weight"]
  with pytest.raises(ValueError, match=r"num_layers must be in 1\.\.2, got 3"):
    first_layers(model, 3)


def test_a_draft_that_cannot_serve_is_named(tiny):
  def draft(**changes):
    return models.load(dataclasses.replace(ONE, **changes))

  with pytest.raises(ValueError, match="a draft must have the model's vocab_size=61, got 60"):
    Engine(tiny, num_pages=20, num_proposed=2, proposer=draft(vocab_size=60))
  window = models.load(dataclasses.replace(ONE, sliding_window=5))
  for other in (None, 6):
    with pytest.raises(ValueError, match=f"a draft must see the model's window of 5 at most, got {other}"):
      Engine(window, num_pages=20, num_proposed=2, proposer=draft(sliding_window=other))
