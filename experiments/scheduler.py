"""What scheduling costs: `plan` and `commit` alone, every slot decoding.

python -m experiments.scheduler --config=configs/scheduler/cost.py
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paged_flash import scheduler
from paged_flash.experiment import Workdir, main, measure, measure_kernels, write_result
from paged_flash.requests import Params, rows


@dataclasses.dataclass(kw_only=True)
class Config:
  num_slots: tuple[int, ...] = (8, 64, 256)
  prefix_cache: tuple[bool, ...] = (True, False)
  num_pages: int = 65_536
  page_size: int = 16
  prompt_len: int = 400  # tokens of each request when the timing starts, or up to a page more
  max_seq_len: int = 1024
  token_budget: int = 2048
  repeats: int = 300
  loop: int = 100  # steps of one dispatch, as the device driver runs them
  result: str = ""  # name under experiments/results/scheduler/<device>/ to write to; "" writes none


def run(config: Config, workdir: Workdir) -> list[dict]:
  on_gpu = jax.default_backend() == "gpu"
  out = []
  for cache, num_slots in itertools.product(config.prefix_cache, config.num_slots):
    tokens, logprobs = jnp.ones((num_slots, 1), jnp.int32), jnp.zeros((num_slots, 1))

    def once(state, tokens, logprobs):
      state, plan = scheduler.plan(state, token_budget=config.token_budget)
      return scheduler.commit(state, plan, tokens, logprobs)

    step = jax.jit(once)

    def many(state, tokens, logprobs, once=once):
      return lax.fori_loop(0, config.loop, lambda _, state: once(state, tokens, logprobs)[0], state)

    loop = jax.jit(many)
    state = loaded(config, num_slots, cache)
    while True:  # until every slot decodes
      state, events = step(state, tokens, logprobs)
      if int((events.ids >= 0).sum()) == num_slots:
        break
    # Every call takes one step further, as in serving: pages are granted, filled and found, and states dropped.
    holder = [state]

    def advance(holder=holder, step=step, said=(tokens, logprobs)):
      holder[0], events = step(holder[0], *said)
      return holder[0], events

    room = config.max_seq_len - config.prompt_len - 2 * config.page_size
    timing = measure(advance, warmup=5, repeats=min(config.repeats, room))
    looped = measure(loop, state, tokens, logprobs, warmup=1, repeats=5)
    out.append(
      dict(
        num_slots=num_slots,
        num_pages=config.num_pages,
        page_size=config.page_size,
        prefix_cache=cache,
        plan_commit_ms=1e3 * timing.median,
        p10_ms=1e3 * timing.p10,
        p90_ms=1e3 * timing.p90,
        us_per_request=1e6 * timing.median / num_slots,
        in_loop_ms=1e3 * looped.median / config.loop,
        gpu_kernels_us=1e6 * measure_kernels(step, state, tokens, logprobs).median if on_gpu else None,
        gpu_kernels_in_loop_us=(
          1e6 * measure_kernels(loop, state, tokens, logprobs).median / config.loop if on_gpu else None
        ),
      )
    )
    workdir.log(**out[-1])
    found = "with" if cache else "without"
    print(f"{num_slots} slots, {config.num_pages} pages {found} the prefix cache: plan + commit {timing}")
    print(f"  {1e3 * looped.median / config.loop:.3g} ms a step in one loop of {config.loop}", end="")
    if on_gpu:
      print(
        f", kernels {out[-1]['gpu_kernels_in_loop_us']:.3g} us, of one dispatch {out[-1]['gpu_kernels_us']:.3g}", end=""
      )
    print()
  if config.result:
    print(write_result("scheduler", out, name=config.result, config=dataclasses.asdict(config)))
  return out


def loaded(config: Config, num_slots: int, cache: bool) -> scheduler.State:
  """A state with as many requests waiting as there are slots, no two of them alike."""
  most = config.max_seq_len
  state = scheduler.init(
    num_slots=num_slots,
    pages_per_slot=-(-most // config.page_size),
    num_pages=config.num_pages,
    page_size=config.page_size,
    num_requests=2 * num_slots,
    max_seq_len=most,
    prefix_cache=cache,
  )
  rng = np.random.default_rng(0)
  lens = config.prompt_len + rng.integers(0, config.page_size, num_slots)  # so that pages fill in every step
  params = Params(max_tokens=most - config.prompt_len - config.page_size)
  prompts = [(rng.integers(1, 30_000, n).tolist(), params) for n in lens]
  return jax.jit(scheduler.submit)(state, rows(prompts, num_slots, most))[0]


if __name__ == "__main__":
  main(run)
