"""Recomputing against swapping, over the page size: what each takes by itself, and what serving feels of it.

    python -m experiments.preemption --config=configs/preemption/figure19.py

By itself: a sequence's pages are copied to host memory and back by the very function that a step uses, and its K and V
are computed again through the page table. End to end: the real scheduler on a starved pool, where a roofline model's
word is how long a step and a copy take.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from experiments.claims import Claim
from experiments.simulate import LATENCY
from paged_flash import Engine, models, swapping
from paged_flash.analysis import show_preemption, synthetic
from paged_flash.cache import kv_pages
from paged_flash.cache.page_table import PageCopies, cdiv
from paged_flash.experiment import Workdir, call_seconds, compare, main, write_result
from paged_flash.simulator import Paged, poisson, simulate


@dataclasses.dataclass(kw_only=True)
class Config:
  model: models.ModelConfig  # random weights: only the sizes matter
  dtype: str = "float32"  # of weights, K and V
  page_sizes: tuple[int, ...] = (1, 4, 16, 64, 256)
  seq_len: int = 256  # tokens of the sequence that is swapped or recomputed by itself
  rounds: int = 3  # of each in turns, of `repeats` calls
  repeats: int = 5
  synthetic: str = "sharegpt"  # lengths to draw for serving (`analysis.synthetic`)
  num_requests: int = 300  # to serve; 0 for what each takes by itself alone
  rate: float = 3.0  # requests per second, Poisson: more than the memory serves without preempting
  latency: str = "opt_13b_a100"  # of experiments.simulate's LATENCY
  num_tokens: int = 15_872  # of device memory: a multiple of all page sizes
  num_host_tokens: int = 65_536
  max_seq_len: int = 2048
  num_slots: int = 96
  token_budget: int = 2048
  claims: tuple[Claim, ...] = ()  # 16a: by itself, 16b: end to end
  result: str = ""  # name under experiments/results/preemption/<device>/ to write to; "" writes none


def by_itself(config: Config, model: models.Model, page_size: int) -> dict:
  """Milliseconds to recompute one sequence, and to copy its pages out and back."""
  num_pages = cdiv(config.seq_len, page_size)
  engine = Engine(
    model,
    num_slots=1,
    num_pages=num_pages + 1,
    page_size=page_size,
    token_budget=config.seq_len,
    num_host_pages=num_pages,
    prefix_cache=False,
  )
  prompt = np.random.default_rng(0).integers(1, model.config.vocab_size, config.seq_len).tolist()
  state, _ = engine.submit(engine.init(), prompt, max_tokens=1)
  planned, plan = engine.plan(state.scheduler)
  assert int(plan.scheduled.sum()) == config.seq_len
  pages, host = planned.table.pages[0, :num_pages], jax.random.permutation(jax.random.key(0), num_pages)
  out, back = PageCopies(src=pages, dst=host), PageCopies(src=host, dst=pages)
  move = jax.jit(kv_pages.swap, donate_argnames="kv")
  pool = [state.kv]  # linear: each call consumes the last one's

  def recompute():
    said, pool[0] = engine.fill(model.params, planned, plan, kv=pool[0])
    return said, pool[0]

  def swap(out: PageCopies | None, back: PageCopies | None):
    pool[0] = move(pool[0], out, back)
    return pool[0]

  ways = dict(recompute=recompute, out=lambda: swap(out, None), back=lambda: swap(None, back))
  samplers = {name: functools.partial(call_seconds, call, repeats=config.repeats) for name, call in ways.items()}
  ms = {name: 1e3 * timing.median for name, timing in compare(samplers, config.rounds).items()}
  return dict(
    recompute_ms=ms["recompute"],
    out_ms=ms["out"],
    back_ms=ms["back"],
    swap_ms=ms["out"] + ms["back"],
    page_bytes=engine.page_bytes,
  )


def end_to_end(config: Config, page_size: int) -> dict:
  """Normalised latency (s/token) and preemptions of each way to preempt."""
  trace = synthetic(config.synthetic, config.num_requests, max_seq_len=config.max_seq_len)
  latency = LATENCY[config.latency]()
  out = {}
  ways = dict(recompute=swapping.never, swap=swapping.always, cheaper=latency.cheaper(page_size))
  for way, preemption in ways.items():
    served = simulate(
      trace.prompt_lens,
      trace.output_lens,
      memory=Paged(
        num_pages=config.num_tokens // page_size,
        page_size=page_size,
        num_host_pages=config.num_host_tokens // page_size,
      ),
      num_slots=config.num_slots,
      token_budget=config.token_budget,
      arrivals=poisson(config.rate, config.num_requests),
      latency=latency,
      preemption=preemption,
    )
    out |= {f"{way}_latency": served.normalised_latency, f"{way}_preemptions": int(served.preemptions.sum())}
  return out


def run(config: Config, workdir: Workdir) -> list[dict]:
  if config.latency not in LATENCY:
    raise ValueError(f"config.latency must be one of {', '.join(LATENCY)}, got {config.latency!r}")
  model = models.load(config.model, dtype=jnp.dtype(config.dtype))
  rows = []
  for page_size in config.page_sizes:
    row = dict(page_size=page_size) | by_itself(config, model, page_size)
    rows.append(row | (end_to_end(config, page_size) if config.num_requests else {}))
    workdir.log(**rows[-1])
  print(pd.DataFrame(rows).to_string(index=False, float_format=lambda x: f"{x:.3g}"))
  workdir.save_figure("preemption.png", show_preemption(rows))
  claims = [judged(claim, rows) for claim in config.claims]
  if config.result:
    print(write_result("preemption", rows, name=config.result, claims=claims, config=dataclasses.asdict(config)))
  return rows


def judged(claim: Claim, rows: list[dict]) -> dict:
  """Claim 16a: swapping is slow with small pages, recomputing as fast with all, and at most 1.2 times as slow as
  swapping. Claim 16b: end to end the two are within a tenth of each other at pages of 16 to 64 tokens, and swapping is
  worse at the smallest. What is simulated holds in part at best.
  """
  first, last = rows[0], rows[-1]
  if claim.number == "16a":
    ms, ratios = [row["recompute_ms"] for row in rows], [row["recompute_ms"] / row["swap_ms"] for row in rows]
    ours = f"swapping {first['swap_ms']:.3g} ms at pages of {first['page_size']}, {last['swap_ms']:.3g} at "
    ours += f"{last['page_size']}; recomputing {min(ms):.3g} to {max(ms):.3g} ms, {min(ratios):.2g} to "
    ours += f"{max(ratios):.2g} times as long as swapping"
    falls, constant = first["swap_ms"] > 2 * last["swap_ms"], max(ms) < 1.2 * min(ms)
    return claim.judged(ours, (True if max(ratios) <= 1.2 else None) if falls and constant else False)
  ratios = {row["page_size"]: row["swap_latency"] / row["recompute_latency"] for row in rows}
  middle = [ratio for size, ratio in ratios.items() if 16 <= size <= 64]
  ours = f"normalised latency with swapping {ratios[first['page_size']]:.2f} times that with recomputing at pages of "
  ours += f"{first['page_size']}, {min(middle):.2f} to {max(middle):.2f} times at 16 to 64, "
  ours += f"{ratios[last['page_size']]:.2f} at {last['page_size']} (simulated)"
  alike = all(abs(ratio - 1) < 0.1 for ratio in middle)
  return claim.judged(ours, None if alike and ratios[first["page_size"]] > 1 else False)


if __name__ == "__main__":
  main(run)
