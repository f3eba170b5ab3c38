"""A million random operations on starved pools: leaks, double frees, and every token read back through the pages.

    python -m experiments.soak --config=configs/soak/starved.py

Many small worlds side by side, each with a scheduler, a pool of token numbers in place of K and V, another in host
memory, and a random stream of operations: submit (one request or several samples), step (plan, swap, copy, write, read,
commit), cancel, keep the state, go back to the one kept. After each one everything is recomputed and compared, inside
the same program.
"""

import dataclasses
import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import lax
from tqdm import tqdm

from paged_flash import policies, scheduler
from paged_flash.cache import page_table, prefix
from paged_flash.cache.page_table import NO_PAGE, cdiv
from paged_flash.experiment import Workdir, main, write_result
from paged_flash.state import LIVE, NOBODY, Requests, State, blank
from paged_flash.step import pack

KINDS = ("submit", "step", "cancel", "keep", "go_back")
FAULTS = (
  "leaks",  # pages with a ref count above their holders
  "double_frees",  # pages with a ref count below
  "broken_rows",  # slots whose pages do not fit their length, or that hold a page twice
  "broken_slots",  # slots that run no live request, or one that runs elsewhere
  "broken_index",  # pages of the index that hang on nothing, appear twice, or would be evicted before their tail
  "shared_writes",  # tokens written into a page with a ref count other than 1
  "foreign_tokens",  # read back through the pages, by slots that compute or by the index, and not what they should be
)
COUNTS = (
  *("submitted", "admitted", "found_tokens", "copies", "preempted", "ended", "evicted"),
  *("pages_swapped_out", "pages_swapped_in"),
)
_WORDS = 3  # that prompts are made of, so that many start alike
_VOCAB = 40


@dataclasses.dataclass(kw_only=True)
class Config:
  num_worlds: int = 256
  num_operations: int = 1_000_000  # of each policy, over all worlds, rounded up
  policies: tuple[str, ...] = ("first_come", "by_priority", "longest_prefix_first")
  num_slots: int = 3
  num_pages: int = 7
  num_host_pages: int = 5
  page_size: int = 3
  max_seq_len: int = 24  # more than the pool holds
  queue_size: int = 6
  token_budget: int = 7
  chunk_size: int = 5
  batch: int = 100  # operations of each world in one dispatch
  seed: int = 0
  result: str = ""  # name under experiments/results/soak/<device>/ to write to; "" writes none


class Pools(NamedTuple):
  """The token in each place of each page."""

  device: jax.Array  # i32[N, page_size]
  host: jax.Array  # i32[num_host_pages, page_size]


class World(NamedTuple):
  state: State
  pool: Pools
  kept: tuple[State, Pools]  # to go back to
  kinds: jax.Array  # i32[K]  operations so far
  faults: jax.Array  # i32[F]
  counts: jax.Array  # i32[C]


def run(config: Config, workdir: Workdir) -> list[dict]:
  rows = []
  for name in config.policies:
    one = functools.partial(operate, config, getattr(policies, name))
    worlds = jax.vmap(lambda _: first(config))(jnp.arange(config.num_worlds))

    @jax.jit
    def several(worlds, key, one=one):
      def body(worlds, key):
        return jax.vmap(one)(worlds, jax.random.split(key, config.num_worlds)), None

      return lax.scan(body, worlds, jax.random.split(key, config.batch))[0]

    start, key = time.perf_counter(), jax.random.key(config.seed)
    batches = -(-config.num_operations // (config.num_worlds * config.batch))
    for i in tqdm(range(batches), desc=name, unit="batch"):
      worlds = several(worlds, jax.random.fold_in(key, i))
      state = jax.tree.map(lambda leaf, i=i: leaf[i % config.num_worlds], worlds.state)
      page_table.check(state.table)  # what tests call, on one of them
      page_table.check(state.host)
      prefix.check(state.index, state.table)
    seconds = time.perf_counter() - start
    worlds, left = drained(config, getattr(policies, name), worlds)
    row = dict(policy=name, worlds=config.num_worlds, operations=int(worlds.kinds.sum()), seconds=seconds)
    for names, values in ((KINDS, worlds.kinds), (COUNTS, worlds.counts), (FAULTS, worlds.faults)):
      row |= dict(zip(names, np.asarray(values).sum(axis=0).tolist(), strict=True))
    row |= dict(live_at_end=int(worlds.state.live.sum()), held_at_end=left)
    rows.append(row)
    workdir.log(**row)
  print(pd.DataFrame(rows).set_index("policy").T.to_string(float_format=lambda x: f"{x:.1f}"))
  if config.result:
    print(write_result("soak", rows, name=config.result, config=dataclasses.asdict(config)))
  if bad := sum(row[name] for row in rows for name in (*FAULTS, "live_at_end", "held_at_end")):
    raise SystemExit(f"{bad} faults")
  return rows


def first(config: Config) -> World:
  """A world in which nothing has happened."""
  state = scheduler.init(
    num_slots=config.num_slots,
    pages_per_slot=cdiv(config.max_seq_len, config.page_size),
    num_pages=config.num_pages,
    page_size=config.page_size,
    num_requests=config.queue_size,
    max_seq_len=config.max_seq_len,
    num_stop_ids=1,
    num_host_pages=config.num_host_pages,
  )
  pool = Pools(*[jnp.full((n, config.page_size), -1) for n in (config.num_pages, config.num_host_pages)])
  kinds, faults, counts = (jnp.zeros(len(names), jnp.int32) for names in (KINDS, FAULTS, COUNTS))
  return World(state, pool, (state, pool), kinds, faults, counts)


def operate(config: Config, policy: scheduler.Policy, world: World, key: jax.Array) -> World:
  """One operation, of a kind drawn at random, and all checks."""
  which, key = jax.random.split(key)
  kind = jnp.searchsorted(jnp.array([0.25, 0.9, 0.94, 0.98]), jax.random.uniform(which), side="right")
  world = world._replace(kinds=world.kinds.at[kind].add(1))
  same = functools.partial(jnp.zeros, dtype=jnp.int32)

  def submit(world):
    state, ids = scheduler.submit(world.state, drawn(config, key))
    counts = world.counts.at[COUNTS.index("submitted")].add(jnp.sum(ids != NOBODY))
    return world._replace(state=state, counts=counts), same(2)

  def cancel(world):
    row = jax.random.randint(key, (), 0, config.queue_size)
    return world._replace(state=scheduler.cancel(world.state, world.state.arrival[row])), same(2)

  def keep(world):
    return world._replace(kept=(world.state, world.pool)), same(2)

  def go_back(world):
    state, pool = world.kept
    return world._replace(state=state, pool=pool), same(2)

  step_ = functools.partial(step, config, policy)
  world, found = lax.switch(kind, [submit, step_, cancel, keep, go_back], world)
  faults = inspect(world.state, world.pool).at[-2:].add(found)
  return world._replace(faults=world.faults + faults)


def drawn(config: Config, key: jax.Array) -> Requests:
  """One to three samples of a prompt that starts like many others."""
  keys = jax.random.split(key, 7)
  C, n = config.max_seq_len, 3
  book = jax.random.randint(jax.random.key(1), (_WORDS, C), 1, _VOCAB)
  length = jax.random.randint(keys[0], (), 1, C - 1)
  tokens = book[jax.random.randint(keys[1], (), 0, _WORDS)]
  tokens = jnp.where(jnp.arange(C) < length, tokens, 0)
  tokens = tokens.at[jax.random.randint(keys[2], (), 0, length)].set(jax.random.randint(keys[3], (), 1, _VOCAB))
  many = jnp.maximum(jax.random.randint(keys[4], (), -1, n + 1), 1)
  most = jax.random.randint(keys[5], (), 1, C - length + 1)
  more = jax.random.randint(keys[6], (3,), 0, jnp.array([2, 3, _VOCAB]))  # tenant, priority, stop id
  real = jnp.arange(n) < many
  return dataclasses.replace(
    blank(n, C, 1),
    tokens=jnp.broadcast_to(tokens, (n, C)),
    prompt_lens=jnp.where(real, length, 0),
    num_tokens=jnp.where(real, length, 0),
    max_tokens=jnp.broadcast_to(most, n),
    tenant=jnp.broadcast_to(more[0], n),
    priority=jnp.broadcast_to(more[1], n),
    group=jnp.where(real & (many > 1), 0, NOBODY),
    stop_ids=jnp.broadcast_to(more[2], (n, 1)),
  )


def step(config: Config, policy: scheduler.Policy, world: World) -> tuple[World, jax.Array]:
  """A step with a stand-in for the model; and how many tokens it wrote into shared pages and read wrongly, i32[2]."""
  before = world.state
  state, plan = scheduler.plan(before, token_budget=config.token_budget, chunk_size=config.chunk_size, policy=policy)
  N, S = config.num_pages, config.num_slots
  assert plan.swap_out is not None and plan.swap_in is not None
  host = copied(world.pool.host, plan.swap_out, world.pool.device)
  pool = copied(world.pool.device, plan.swap_in, host)
  pool = copied(pool, plan.copies, pool)
  packed = pack(state, plan, config.token_budget)
  page = jnp.where(packed.pages == NO_PAGE, N, packed.pages)
  pool = pool.at[page, packed.offsets].set(packed.tokens, mode="drop")
  shared = jnp.sum((packed.pages != NO_PAGE) & (state.table.ref_counts[packed.pages] != 1))

  read = pool[state.table.pages].reshape(S, -1)  # what each slot finds behind its pages
  seen = jnp.arange(read.shape[1]) < packed.kv_lens[:, None]
  wanted = jnp.pad(state.requests.tokens[plan.rows], ((0, 0), (0, read.shape[1] - config.max_seq_len)))
  foreign = jnp.sum(seen & (read != wanted))
  place = jnp.arange(1, read.shape[1] + 1, dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
  said = jnp.sum(jnp.where(seen, read.astype(jnp.uint32) * place, 0), axis=1, dtype=jnp.uint32)
  said = 1 + ((said ^ (said >> 15)) % (_VOCAB - 1)).astype(jnp.int32)

  state, events = scheduler.commit(state, plan, said[:, None], jnp.zeros((S, 1)))
  assert before.index is not None and state.index is not None
  new: dict[str, jax.Array] = dict(
    admitted=jnp.sum(events.admitted != NOBODY),
    found_tokens=jnp.sum(events.cached),
    copies=jnp.sum(plan.copies.dst != NO_PAGE),
    preempted=jnp.sum(events.preempted != NOBODY),
    ended=jnp.sum(events.finish != LIVE) + (events.ended != NOBODY),
    evicted=jnp.sum(before.index.cached & ~state.index.cached),
    pages_swapped_out=jnp.sum(events.swapped_out),
    pages_swapped_in=jnp.sum(events.swapped_in),
  )
  counts = world.counts + jnp.stack([new[name] if name in new else jnp.int32(0) for name in COUNTS])
  return world._replace(state=state, pool=Pools(pool, host), counts=counts), jnp.stack([shared, foreign])


def copied(to: jax.Array, copies: page_table.PageCopies, source: jax.Array) -> jax.Array:
  return to.at[jnp.where(copies.dst == NO_PAGE, len(to), copies.dst)].set(source[copies.src], mode="drop")


def inspect(state: State, pool: Pools) -> jax.Array:
  """How much of each kind of fault is in a state, i32[F], recomputed from nothing but who holds what."""
  table, host, index = state.table, state.host, state.index
  assert index is not None and host is not None
  over, bad_rows = zip(*map(in_table, (table, host)), strict=True)
  over = jnp.concatenate(over)

  running = state.running
  bad_slots = (running != NOBODY) & ~state.live[running]
  bad_slots |= (running == NOBODY) & (table.seq_lens > 0)
  bad_slots |= (jnp.sum(running[:, None] == running, axis=1) > 1) & (running != NOBODY)

  cached, parent = index.cached, index.before
  inner = cached & (parent >= 0)
  above = jnp.maximum(parent, 0)
  same = (parent[:, None] == parent) & jnp.all(index.contents[:, None] == index.contents, axis=-1)
  bad_index = cached & (jnp.sum(same & cached & cached[:, None], axis=1) != 1)
  bad_index |= inner & (~cached[above] | (table.ref_counts > table.ref_counts[above]))
  bad_index |= inner & (table.ref_counts[above] == 0) & (index.freed >= index.freed[above])

  most = table.pages_per_slot * table.page_size
  tokens = jnp.pad(state.requests.tokens, ((0, 0), (0, most - state.requests.tokens.shape[1])))
  foreign = jnp.sum(cached[:, None] & (index.contents != pool.device))
  for held, contents, wanted in ((table, pool.device, tokens[running]), (host, pool.host, tokens)):
    computed = jnp.arange(most) < held.seq_lens[:, None]
    foreign += jnp.sum(computed & (contents[held.pages].reshape(-1, most) != wanted))
  return jnp.stack(
    [
      jnp.sum(jnp.maximum(over, 0)),
      jnp.sum(jnp.maximum(-over, 0)),
      sum(jnp.sum(bad) for bad in bad_rows),
      jnp.sum(bad_slots),
      jnp.sum(bad_index),
      jnp.int32(0),
      foreign,
    ]
  ).astype(jnp.int32)


def in_table(table: page_table.PageTable) -> tuple[jax.Array, jax.Array]:
  """By how much each ref count is above its holders (i32[N]), and rows that are not as their lengths say (bool[S])."""
  N, P, size = table.num_pages, table.pages_per_slot, table.page_size
  held = jnp.arange(P) < cdiv(table.seq_lens, size)[:, None]
  holders = jnp.zeros(N, jnp.int32).at[jnp.where(held, table.pages, N)].add(1, mode="drop")
  twice = (table.pages[:, :, None] == table.pages[:, None]) & held[:, :, None] & held[:, None]
  wrong = jnp.where(held, (table.pages < 0) | (table.pages >= N), table.pages != NO_PAGE)
  bad_rows = jnp.any(wrong, axis=1) | (jnp.sum(twice, axis=(1, 2)) != jnp.sum(held, axis=1))
  return table.ref_counts - holders, bad_rows | (table.seq_lens < 0) | (table.seq_lens > P * size)


def drained(config: Config, policy: scheduler.Policy, worlds: World) -> tuple[World, int]:
  """The worlds after all their requests have ended, and how many pages are held then."""

  @jax.jit
  def to_the_end(worlds):
    def body(carry):
      i, worlds = carry
      worlds, found = jax.vmap(functools.partial(step, config, policy))(worlds)
      faults = jax.vmap(inspect)(worlds.state, worlds.pool).at[:, -2:].add(found)
      return i + 1, worlds._replace(faults=worlds.faults + faults)

    def more(carry):
      return jnp.any(carry[1].state.live) & (carry[0] < 100 * config.queue_size * config.max_seq_len)

    return lax.while_loop(more, body, (jnp.int32(0), worlds))[1]

  worlds = to_the_end(worlds)
  held = [jnp.sum(table.ref_counts != 0) for table in (worlds.state.table, worlds.state.host) if table is not None]
  return worlds, int(sum(held))


if __name__ == "__main__":
  main(run)
