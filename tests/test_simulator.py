"""The simulator against arithmetic that can be done by hand, and against the engine's own steps."""

import numpy as np
import pytest

from paged_flash.simulator import simulate


def test_one_request_by_hand():
  timeline = simulate([5], [4], num_slots=2, num_pages=4, page_size=4, token_budget=3)
  # 3 + 2 prompt tokens, the second chunk yields a token, then three more steps of one.
  assert timeline.scheduled.tolist() == [3, 2, 1, 1, 1]
  assert timeline.tokens.tolist() == [3, 5, 6, 7, 8]
  assert timeline.pages.tolist() == [1, 2, 2, 2, 2]
  assert timeline.waste(4) == pytest.approx(1 - 29 / 36)
  assert timeline.final.tolist() == [9]


def test_every_token_is_computed_and_recomputed_only_after_a_preemption():
  rng = np.random.default_rng(0)
  prompts, outputs = rng.integers(1, 30, 40), rng.integers(1, 20, 40)
  roomy = simulate(prompts, outputs, num_slots=8, num_pages=200, page_size=4, token_budget=32)
  assert roomy.final.tolist() == (prompts + outputs).tolist()
  assert roomy.preempted.sum() == 0 and roomy.scheduled.sum() == (prompts + outputs - 1).sum()
  starved = simulate(prompts, outputs, num_slots=8, num_pages=14, page_size=4, token_budget=32)
  assert starved.final.tolist() == roomy.final.tolist()
  assert starved.preempted.sum() > 0 and starved.scheduled.sum() > roomy.scheduled.sum()
  assert starved.pages.max() <= 14
  wasted = roomy.pages * 4 - roomy.tokens
  assert (wasted >= 0).all() and (wasted <= 3 * roomy.running).all()  # at most one part-full page each


@pytest.mark.parametrize(
  "prompts, outputs, message",
  [
    ([], [], r"two equal \[R\]"),
    ([1, 2], [1], r"two equal \[R\]"),
    ([0], [1], "at least 1, got 0"),
    ([30], [9], "got 8"),
  ],
)
def test_impossible_lengths_are_named(prompts, outputs, message):
  with pytest.raises(ValueError, match=message):
    simulate(prompts, outputs, num_slots=2, num_pages=8, page_size=4, token_budget=8)
