"""Flash attention and paged memory, each without and with the other: time, and the requests that fit.

    python -m experiments.composition --config=configs/composition/llama_1b.py

Four ways to run one model: attention with the score matrix ("naive") or without ("flash"), and the KV cache in one
reservation for each request ("contiguous") or in pages ("paged"). A reservation is a run of pages, one after the other,
large ones that the kernels take, as long as the longest request: so the same kernels read both, and what differs is who
holds what. Attention with the score matrix reads a run where it lies, and gathers pages. All have the same bytes for
the KV cache and what a prefill needs beside it, which is how the two ideas meet: a score matrix takes the room of
requests. For each way:

- a prefill of some prompts is compiled; its temporaries are read from the compiler, and it is timed;
- in what they leave, the page table grants reservations, or prompts with their outputs, until one is refused;
- a decode step of so many requests, each in the middle of its output, is timed, its pages in random order.

Tokens per second follow from both times and the mean lengths, as if the slots were always full. Before, the same
prompts are continued in all ways: a row says which part of the tokens equals those of naive and contiguous.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

import paged_flash as pf
from experiments.claims import Claim
from experiments.comparison import compile_all, one_line
from paged_flash import models
from paged_flash.analysis import human_bytes, show_groups
from paged_flash.cache import kv_pages, page_table
from paged_flash.cache.kv_pages import KVPages
from paged_flash.experiment import Workdir, compare, main, write_result

WAYS = tuple(itertools.product(("naive", "flash"), ("contiguous", "paged")))


@dataclasses.dataclass(kw_only=True)
class Config:
  model: models.ModelConfig  # of random weights
  dtype: str = "bfloat16"
  memory_bytes: int = 16 * 2**30  # for the KV cache and the temporaries of a prefill
  page_size: int = 16
  run_page_size: int = 256  # of the pages that make up a reservation
  max_seq_len: int = 4096  # what a contiguous request reserves
  prompt_lens: tuple[int, int] = (256, 3072)  # of requests, uniform in between
  output_lens: tuple[int, int] = (1, 1024)
  most_slots: int = 512  # requests that are asked for
  prefill_batch: int = 8  # prompts of a prefill
  prefill_len: int = 2048
  checked: int = 8  # tokens of each prompt that are compared
  rounds: int = 3  # turns of each way
  repeats: int = 5  # calls in a turn
  steps: int = 8  # decode steps of a call
  compile_threads: int = 8
  claim: Claim | None = None
  result: str = ""  # name under experiments/results/composition/<device>/ to write to; "" writes none


@dataclasses.dataclass(frozen=True)
class Way:
  """One of the four ways; programs of it take and return the pool."""

  attention: str
  memory: str
  model: models.Model
  config: Config

  @property
  def page_size(self) -> int:
    return self.config.page_size if self.memory == "paged" else self.config.run_page_size

  @property
  def pages_per_slot(self) -> int:
    return -(-self.config.max_seq_len // self.page_size)

  @property
  def page_bytes(self) -> int:
    return self.page_size * self.model.config.kv_values_per_token * jnp.dtype(self.config.dtype).itemsize

  def pool(self, num_pages: int) -> KVPages:
    c = self.model.config
    sizes = dict(num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim)
    return kv_pages.init(num_pages=num_pages, page_size=self.page_size, dtype=self.config.dtype, **sizes)

  def grant(self, lens: np.ndarray, num_pages: int) -> tuple[jax.Array, int]:
    """(pages i32[B, P], requests B): requests of `lens` tokens in order, until the pool refuses one.

    Paged, the pages lie at random places; else request i has run i.
    """
    is_paged, longest = self.memory == "paged", self.config.max_seq_len
    table = page_table.init(
      num_slots=len(lens), pages_per_slot=self.pages_per_slot, num_pages=num_pages, page_size=self.page_size
    )
    tokens = jnp.asarray(lens, jnp.int32) if is_paged else jnp.full(len(lens), longest)
    table, _, granted = page_table.extend(table, tokens)
    places = jax.random.permutation(jax.random.key(2), num_pages) if is_paged else jnp.arange(num_pages)
    count = int(granted.sum())
    return jnp.where(table.pages < 0, -1, places[table.pages])[:count], count

  def prefill(self, params, kv: KVPages, pages: jax.Array, tokens: jax.Array) -> tuple[KVPages, jax.Array]:
    """Computes whole prompts, tokens i32[B, n]; returns the pool and the next token of each, i32[B]."""
    batch, length = tokens.shape
    position = jnp.broadcast_to(jnp.arange(length), (batch, length))
    page = jnp.take_along_axis(pages, position // self.page_size, axis=1).reshape(-1)
    starts, lens = jnp.arange(batch + 1) * length, jnp.full(batch, length)

    def attend(q, k, v, kv, layer):
      kv = kv_pages.write(kv, layer, k, v, page, position.reshape(-1) % self.page_size)
      rows = [x.reshape(batch, length, *x.shape[1:]) for x in (q, k, v)]
      if self.attention == "naive":
        out = jax.nn.dot_product_attention(*rows, is_causal=True, implementation="xla")
      elif self.memory == "contiguous":
        out = pf.flash_attention(*rows, is_causal=True)
      else:
        where = kv_pages.layer_pages(kv, pages, layer)
        out = pf.paged_attention(
          q, kv.k, kv.v, where, lens, query_starts=starts, max_query_len=length, min_query_len=length
        )
      return out.reshape(q.shape), kv

    decoder = self.model.bind(params)
    hidden, kv = decoder(tokens.reshape(-1), position.reshape(-1), kv, attend)
    return kv, decoder.logits(hidden.reshape(batch, length, -1)[:, -1]).argmax(-1)

  def decode(self, params, kv: KVPages, pages: jax.Array, tokens: jax.Array, lens: jax.Array):
    """One more token of each request, tokens and lens i32[B], its own included; returns as `prefill`."""
    position = lens - 1
    page = jnp.take_along_axis(pages, position[:, None] // self.page_size, axis=1)[:, 0]

    def attend(q, k, v, kv, layer):
      kv = kv_pages.write(kv, layer, k, v, page, position % self.page_size)
      where = kv_pages.layer_pages(kv, pages, layer)
      if self.attention == "flash":
        return pf.paged_attention(q, kv.k, kv.v, where, lens), kv
      if self.memory == "contiguous":  # run i belongs to request i: nothing to gather
        here = slice(layer * kv.num_pages, layer * kv.num_pages + pages.size)
      else:
        here = jnp.maximum(where, 0)
      keys, values = (x[here].reshape(len(q), -1, *x.shape[2:]) for x in (kv.k, kv.v))  # [B, S, K, D]
      mask = (jnp.arange(keys.shape[1]) < lens[:, None])[:, None, None]  # bool[B, 1, 1, S]
      return jax.nn.dot_product_attention(q[:, None], keys, values, mask=mask, implementation="xla")[:, 0], kv

    decoder = self.model.bind(params)
    hidden, kv = decoder(tokens, position, kv, attend)
    return kv, decoder.logits(hidden).argmax(-1)


@dataclasses.dataclass
class Timed:
  """A program with the pool that it consumes and returns, and its other arguments."""

  program: Callable
  kv: KVPages
  params: Any
  arguments: tuple

  def __call__(self, calls: int) -> jax.Array:
    said = None
    for _ in range(calls):
      self.kv, said = self.program(self.params, self.kv, *self.arguments)
    return jax.block_until_ready(said)

  def seconds(self, repeats: int, calls: int) -> list[float]:
    """Of one of so many calls dispatched at once, repeatedly."""
    found = []
    for _ in range(repeats):
      start = time.perf_counter()
      self(calls)
      found.append((time.perf_counter() - start) / calls)
    return found


def compiled(function: Callable, *arguments) -> Callable:
  return jax.jit(function, donate_argnums=1).lower(*arguments).compile()


def time_all(programs: dict[str, Timed], config: Config, calls: int) -> dict[str, float]:
  """Milliseconds of each, in turns."""
  for timed in programs.values():
    timed(1)
  samplers = {n: functools.partial(timed.seconds, config.repeats, calls) for n, timed in programs.items()}
  return {name: 1e3 * timing.median for name, timing in compare(samplers, config.rounds).items()} if programs else {}


def start(way: Way, tokens: jax.Array) -> dict[str, Any]:
  """A way's prefill of some prompts, ready to be timed, and the tokens that follow each, i32[checked, B]."""
  config, params, (batch, length) = way.config, way.model.params, tokens.shape
  kv = way.pool(batch * way.pages_per_slot)
  pages, count = way.grant(np.full(batch, config.max_seq_len), kv.num_pages)
  assert count == batch
  prefill = compiled(way.prefill, params, kv, pages, tokens)
  lens = jnp.full(batch, length + 1)
  decode = compiled(way.decode, params, kv, pages, jnp.zeros(batch, jnp.int32), lens)
  kv, said = prefill(params, kv, pages, tokens)
  following = [said]
  for _ in range(config.checked - 1):
    kv, said = decode(params, kv, pages, said, lens)
    following, lens = [*following, said], lens + 1
  needs = prefill.memory_analysis().temp_size_in_bytes
  return dict(timed=Timed(prefill, kv, params, (pages, tokens)), following=np.stack(following), needs=needs)


def run(config: Config, workdir: Workdir) -> list[dict]:
  model = models.load(config.model, dtype=config.dtype)
  rng = np.random.default_rng(0)
  prompts, outputs = (
    rng.integers(*bounds, config.most_slots, endpoint=True) for bounds in (config.prompt_lens, config.output_lens)
  )
  tokens = jnp.asarray(rng.integers(0, config.model.vocab_size, (config.prefill_batch, config.prefill_len)), jnp.int32)
  ways = {f"{a} {m}": Way(a, m, model, config) for a, m in WAYS}
  rows: dict[str, dict[str, Any]] = {
    name: dict(way=name, attention=way.attention, memory=way.memory, note="") for name, way in ways.items()
  }

  def take(builders: dict[str, Callable]) -> dict[str, Any]:
    """What the builders return; a row gets the reason where one fails."""
    found = compile_all(builders, config.compile_threads)
    for name, (_, note) in found.items():
      rows[name]["note"] = rows[name]["note"] or note
    return {name: built for name, (built, _) in found.items() if built is not None}

  started = take({name: functools.partial(start, way, tokens) for name, way in ways.items()})
  right = next(iter(started.values()))["following"]
  times = time_all({name: each["timed"] for name, each in started.items()}, config, 1)
  decoding = {}
  for name, each in started.items():
    way, row = ways[name], rows[name]
    room = max(0, config.memory_bytes - each["needs"])
    num_pages = max(1, room // way.page_bytes)
    pages, count = way.grant(prompts + outputs, num_pages)
    row |= dict(prefill_ms=times[name], temporary_bytes=each["needs"], num_pages=num_pages, fit=count)
    row |= dict(same_tokens=float((each["following"] == right).mean()))
    if count:
      decoding[name] = (pages, count)
  del started  # and the pools in it

  def build(name: str) -> Callable:
    way, (pages, count) = ways[name], decoding[name]
    kv = jax.eval_shape(lambda: way.pool(rows[name]["num_pages"]))
    lens = jnp.asarray((prompts + (outputs + 1) // 2)[:count], jnp.int32)
    program = compiled(way.decode, model.params, kv, pages, jnp.zeros_like(lens), lens)
    return functools.partial(Timed, program, params=model.params, arguments=(pages, jnp.zeros_like(lens), lens))

  for name, make in take({name: functools.partial(build, name) for name in decoding}).items():
    row = rows[name]
    try:  # one pool at a time: each is as large as the memory allows
      row["decode_ms"] = time_all({name: make(kv=ways[name].pool(row["num_pages"]))}, config, config.steps)[name]
    except jax.errors.JaxRuntimeError as error:
      row["note"] = one_line(error)
      continue
    tokens_each, seconds = float(outputs[: row["fit"]].mean()), 1e-3 * row["prefill_ms"] / tokens.size
    seconds = seconds * float(prompts[: row["fit"]].mean()) + tokens_each * 1e-3 * row["decode_ms"] / row["fit"]
    row["tokens_per_second"] = tokens_each / seconds
  found = list(rows.values())
  for row in found:
    workdir.log(**row)
  shown = pd.DataFrame(found).drop(columns=["way"])
  shown["temporary_bytes"] = [None if pd.isna(b) else human_bytes(int(b)) for b in shown["temporary_bytes"]]
  print(shown.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
  workdir.save_figure("composition.png", figure(found))
  claims = [judged(config.claim, found)] if config.claim else []
  if config.result:
    recorded = dataclasses.asdict(config)
    print(write_result("composition", found, name=config.result, claims=claims, config=recorded))
  return found


def figure(rows: list[dict]):
  panels = dict(
    fit="requests that fit", prefill_ms="ms of a prefill", decode_ms="ms of a decode step of all that fit",
    tokens_per_second="output tokens per second",
  )  # fmt: skip
  ours_first = sorted(rows, key=lambda row: row["attention"] == "naive")
  return show_groups(ours_first, groups="memory", bars="attention", panels=panels)


def judged(claim: Claim, rows: list[dict]) -> dict:
  """Claim 4c: the prefill at least twice as fast without the score matrix, 1.5 times for a part of the claim.

  Claim 14: both ideas together against either alone: more requests fit, and more tokens come a second.
  """
  if claim.number == "4c":
    ms = {row["way"]: row["prefill_ms"] for row in rows if row.get("prefill_ms")}
    base, flash, paged = (ms.get(way) for way in ("naive contiguous", "flash contiguous", "flash paged"))
    if base is None or flash is None or paged is None:
      return claim.judged("not measured", False)
    ours = f"{base / flash:.2f} x ({base:.0f} to {flash:.0f} ms), from pages {base / paged:.2f} x"
    return claim.judged(ours, True if base >= 2 * flash else None if base >= 1.5 * flash else False)
  of = {row["way"]: row for row in rows if row.get("tokens_per_second")}
  both, base = of.get("flash paged"), of.get("naive contiguous")
  if both is None or base is None:
    return claim.judged("not measured", False)
  parts = {}
  for key in ("fit", "tokens_per_second"):
    parts[key] = [row[key] / base[key] for name in ("flash contiguous", "naive paged") if (row := of.get(name))]
    parts[key].append(both[key] / base[key])
  said = {key: " and ".join(f"{x:.1f} x" for x in gains[:-1]) + f" alone, {gains[-1]:.1f} x together"
          for key, gains in parts.items()}  # fmt: skip
  ours = f"requests that fit: {said['fit']}; tokens per second: {said['tokens_per_second']}"
  return claim.judged(f"{ours} (flash attention, pages)", all(gains[-1] > max(gains[:-1]) for gains in parts.values()))


if __name__ == "__main__":
  main(run)
