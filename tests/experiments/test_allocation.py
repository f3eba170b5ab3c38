"""One engine, one memory, four ways to hand it out: what runs is what the simulator says, and every token the same."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import allocation
from experiments.claims import Claim
from experiments.generate import load_model
from paged_flash import Engine, Params
from paged_flash.experiment import config
from paged_flash.simulator.contiguous import RESERVE, reserve

CLAIM = Claim(number="9d", claim="it is so", source="a paper", theirs="much")


@pytest.fixture(scope="module")
def engine() -> Engine:
  settings = config.load("configs/allocation/smollm2.py:smoke")
  return Engine(load_model("tiny", "float32"), prefix_cache=False, **dataclasses.asdict(settings.engine))


def test_steps_are_the_simulators_and_tokens_those_of_each_request_alone(engine):
  rng = np.random.default_rng(1)
  prompts, outputs = rng.integers(1, 30, 14), rng.integers(1, 20, 14)
  requests = [
    (rng.integers(0, 256, n).tolist(), Params(max_tokens=int(m))) for n, m in zip(prompts, outputs, strict=True)
  ]
  alone = allocation.serve(engine, requests, [128] * 14)  # in all of the memory
  assert alone.running.max() == 1
  steps = {}
  for how in (*RESERVE, "paged"):
    reserved = None
    if how != "paged":
      reserved = reserve(how, jnp.asarray(prompts), jnp.asarray(outputs), engine.max_seq_len).tolist()
    run = allocation.serve(engine, requests, reserved)
    assert run.outputs == alone.outputs
    said = allocation.simulated(engine, prompts, outputs, how)
    assert said == dict(simulated_steps=run.running.size, simulated_running=pytest.approx(run.running.mean()))
    assert (run.held >= run.used).all() and run.held.max() <= 128 and (run.preemptions > 0) == (how == "paged")
    steps[how] = run.running.size
  assert steps["max"] > steps["oracle"] > steps["paged"]
  assert allocation.serve(engine, requests, [64] * 14).running.max() == 2  # of 128 tokens


def test_a_block_is_free_again_when_its_request_has_ended(engine):
  requests = [([1, 2, 3], Params(max_tokens=n)) for n in (2, 5, 2)]
  run = allocation.serve(engine, requests, [128, 16, 100])  # one after the other, each in all of the memory or in 16
  assert run.running.tolist() == [1] * 9 and run.held.tolist() == [128] * 2 + [16] * 5 + [128] * 2
  with pytest.raises(ValueError, match="a block of 129 tokens, got 128"):
    allocation.serve(engine, requests[:1], [129])


def test_throughput_is_judged_by_the_paper_and_only_with_the_same_outputs():
  def verdict(seconds, steps, same=5):
    names = (*RESERVE, "paged")
    rows = [
      dict(allocator=a, tokens_per_cpu_second=1 / s, tokens_per_second=9, steps=n, same_outputs=same, requests=5)
      | dict(mean_running=2.0)
      for a, s, n in zip(names, seconds, steps, strict=True)
    ]
    return allocation.judged(CLAIM, rows)["verdict"]

  assert verdict((4, 3, 2, 1), (40, 30, 20, 10)) == "reproduced"
  assert verdict((1.8, 1.5, 0.9, 1), (40, 30, 20, 10)) == "in part"
  assert verdict((0.9, 1.5, 1.2, 1), (40, 30, 20, 10)) == "not reproduced"
  assert verdict((4, 3, 2, 1), (40, 30, 20, 10), same=4) == "not reproduced"
