"""What scheduling costs: `plan` and `commit` alone, every slot decoding.

python -m experiments.scheduler --config=configs/scheduler/cost.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from paged_flash import scheduler
from paged_flash.experiment import Workdir, main, measure, write_result
from paged_flash.requests import Params, rows


@dataclasses.dataclass(kw_only=True)
class Config:
  num_slots: tuple[int, ...] = (8, 64, 256)
  num_pages: int = 16_384
  page_size: int = 16
  prompt_len: int = 400  # tokens of each request when the timing starts
  token_budget: int = 2048
  repeats: int = 300
  result: str = ""  # name under experiments/results/scheduler/<device>/ to write to; "" writes none


def run(config: Config, workdir: Workdir) -> list[dict]:
  out = []
  for num_slots in config.num_slots:
    pages_per_slot = config.num_pages // num_slots
    most = min(1024, pages_per_slot * config.page_size)
    state = scheduler.init(
      num_slots=num_slots,
      pages_per_slot=-(-most // config.page_size),
      num_pages=config.num_pages,
      page_size=config.page_size,
      num_requests=2 * num_slots,
      max_seq_len=most,
    )
    prompt = np.arange(1, config.prompt_len + 1).tolist()
    params = Params(max_tokens=most - config.prompt_len)
    state, _ = jax.jit(scheduler.submit)(state, rows([(prompt, params)] * num_slots, num_slots, most))
    tokens, logprobs = jnp.ones(num_slots, jnp.int32), jnp.zeros(num_slots)

    @jax.jit
    def step(state, tokens=tokens, logprobs=logprobs):
      state, plan = scheduler.plan(state, token_budget=config.token_budget)
      return scheduler.commit(state, plan, tokens, logprobs)

    while True:  # until every slot decodes
      state, events = step(state)
      if int((events.ids >= 0).sum()) == num_slots:
        break
    # Every call takes one step further, as in serving: pages are granted and states dropped on the way.
    holder = [state]

    def advance(holder=holder, step=step):
      holder[0], events = step(holder[0])
      return holder[0], events

    timing = measure(advance, warmup=5, repeats=min(config.repeats, most - config.prompt_len - 10))
    out.append(
      dict(
        num_slots=num_slots,
        num_pages=config.num_pages,
        page_size=config.page_size,
        plan_commit_ms=1e3 * timing.median,
        p10_ms=1e3 * timing.p10,
        p90_ms=1e3 * timing.p90,
        us_per_request=1e6 * timing.median / num_slots,
      )
    )
    workdir.log(**out[-1])
    print(f"{num_slots} slots, {config.num_pages} pages of {config.page_size}: plan + commit {timing}")
  if config.result:
    print(write_result("scheduler", out, name=config.result, config=dataclasses.asdict(config)))
  return out


if __name__ == "__main__":
  main(run)
