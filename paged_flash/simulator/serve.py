"""A whole trace in one program: requests arrive, wait, run and end, over pages or over contiguous reservations.

It runs the very `plan` and `commit` that serve, over requests that have lengths but no tokens. What is held at every
step is exact; how long the step takes is a `LatencyModel`'s word. `serve` is pure: jit it, map it over arrival times,
sizes of memory, policies or what is reserved.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from paged_flash import scheduler, swapping
from paged_flash.simulator import contiguous
from paged_flash.simulator.contiguous import ContiguousState
from paged_flash.simulator.latency import LatencyModel
from paged_flash.state import LIVE, NOBODY, State, StepEvents, StepPlan, blank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
  """What is asked for. R sequences, in order of arrival; the samples of one prompt stand together."""

  prompt_lens: jax.Array  # i32[R]
  output_lens: jax.Array  # i32[R]
  arrivals: jax.Array  # i32[R]  ticks
  reserve: jax.Array | None  # i32[R]  tokens that each reserves contiguously; None: pages
  contents: jax.Array | None  # i32[R, P]  what each page holds: equal numbers after equal pages are shared; None: never
  memory: jax.Array  # i32[]  pages of the pool that may be used, or tokens of contiguous memory
  policy: jax.Array  # i32[]  which of `Settings.policies`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What is fixed when a simulation is compiled."""

  num_slots: int
  num_pages: int  # of the pool; the workload may use fewer of them
  page_size: int
  num_host_pages: int
  max_seq_len: int  # tokens of the longest request
  token_budget: int
  chunk_size: int | None
  queue_size: int  # requests, running or waiting, that the policy sees
  samples: int  # of each prompt, where there are pages to share
  policies: tuple[scheduler.Policy, ...]  # those of all runs; pages only
  preemption: swapping.Preemption
  is_static: bool  # a batch begins only when the one before it has ended
  latency: LatencyModel | None  # None: a step takes a tick
  ticks_per_s: int  # of the latency model's seconds
  log_size: int  # steps that the log keeps, even


class Stats(NamedTuple):
  """One step, or the mean of several. Memory in tokens; used + reserved + ... + free is all of it."""

  running: Any  # slots in use
  waiting: Any  # requests that have arrived and hold no slot
  scheduled: Any  # tokens computed
  used: Any  # memory that holds K and V
  reserved: Any  # held, and will be used before the request ends
  internal: Any  # held, and will not: beyond the request's end, or the rest of a last page
  rounding: Any  # of a buddy block beyond what the request reserved
  external: Any  # free, but in no block that the first waiting request could have
  free: Any
  pages: Any  # with a ref count above 0
  shared: Any  # pages held more than once
  mapped: Any  # entries of the page table: pages that would be held if none were shared
  preempted: Any  # requests that lost their slot
  lost: Any  # tokens that these must compute again
  swapped: Any  # pages copied to host memory, or back from there


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What became of a workload. Times in ticks, -1 for never."""

  admitted: jax.Array  # i32[R]
  first_token: jax.Array  # i32[R]
  end: jax.Array  # i32[R]
  num_outputs: jax.Array  # i32[R]
  preemptions: jax.Array  # i32[R]
  cached: jax.Array  # i32[R]  prompt tokens that were there when the request was first admitted
  sums: jax.Array  # f32[2, F]  time integral of `Stats`: over all steps, and over those in which somebody waited
  rest: jax.Array  # f32[2, F]  what rounding took from the sums (Kahan)
  ticks: jax.Array  # i32[2]  time of these steps
  log: Stats  # [log_size] every `stride`-th step
  log_ticks: jax.Array  # i32[log_size]  when they began
  stride: jax.Array  # i32[]
  steps: jax.Array  # i32[]
  clock: jax.Array  # i32[]


class _Carry(NamedTuple):
  state: State | ContiguousState
  cursor: jax.Array  # i32[]  requests submitted
  out: Outcome


def serve(workload: Workload, settings: Settings) -> Outcome:
  """Serves a workload to its end, or to the end of the clock.

  Args:
    workload: arrays; the requests must fit the memory, else this never ends.
    settings: static.
  """
  R = workload.prompt_lens.size
  never = jnp.full(R, -1, jnp.int32)
  zeros = Stats(*[jnp.zeros(settings.log_size)] * len(Stats._fields))
  sums = jnp.zeros((2, len(Stats._fields)))
  out = Outcome(
    **dict.fromkeys(("admitted", "first_token", "end"), never),
    **dict.fromkeys(("num_outputs", "preemptions", "cached"), jnp.zeros(R, jnp.int32)),
    sums=sums,
    rest=sums,
    ticks=jnp.zeros(2, jnp.int32),
    log=zeros,
    log_ticks=jnp.zeros(settings.log_size, jnp.int32),
    stride=jnp.int32(1),
    steps=jnp.int32(0),
    clock=jnp.int32(0),
  )
  last = jnp.iinfo(jnp.int32).max - 2**24

  def more(carry: _Carry):
    return ((carry.cursor < R) | jnp.any(_inner(carry.state).live)) & (carry.out.clock < last)

  first = _Carry(state=_init(workload, settings), cursor=jnp.int32(0), out=out)
  return lax.while_loop(more, lambda carry: _step(workload, settings, carry), first).out


def _init(workload: Workload, settings: Settings) -> State | ContiguousState:
  if workload.reserve is not None:
    return contiguous.init(num_slots=settings.num_slots, num_tokens=workload.memory, max_seq_len=settings.max_seq_len)
  state = scheduler.init(
    num_slots=settings.num_slots,
    pages_per_slot=-(-settings.max_seq_len // settings.page_size),
    num_pages=settings.num_pages,
    page_size=settings.page_size,
    num_requests=settings.queue_size,
    max_seq_len=0 if workload.contents is None else workload.contents.shape[1],
    tokens_per_content=settings.page_size,
    num_host_pages=settings.num_host_pages,
  )
  # Pages past the memory in use count as held, by nobody: so one program serves pools of several sizes.
  unused = (jnp.arange(settings.num_pages) >= workload.memory).astype(jnp.int32)
  return dataclasses.replace(state, table=dataclasses.replace(state.table, ref_counts=unused))


def _step(workload: Workload, settings: Settings, carry: _Carry) -> _Carry:
  out, R = carry.out, workload.prompt_lens.size
  next_arrival = workload.arrivals[jnp.minimum(carry.cursor, R - 1)]
  idle = ~jnp.any(_inner(carry.state).live)
  clock = jnp.where(idle, jnp.maximum(out.clock, next_arrival), out.clock)
  state, cursor, refused = _submit(workload, settings, clock, carry.state, carry.cursor)

  arrived = jnp.searchsorted(workload.arrivals, clock, side="right")
  nothing = jnp.zeros((settings.num_slots, 1))
  budget, chunk, said = settings.token_budget, settings.chunk_size, (nothing.astype(jnp.int32), nothing)
  if isinstance(state, ContiguousState):
    state, plan = contiguous.plan(state, token_budget=budget, chunk_size=chunk)
    stats = _stats(workload, state, plan, refused)
    state, events = contiguous.commit(state, plan, *said)
  else:
    policy = settings.policies[0]
    if len(settings.policies) > 1:
      policy = functools.partial(lax.switch, workload.policy, settings.policies)
    state, plan = scheduler.plan(
      state, token_budget=budget, chunk_size=chunk, policy=policy, preemption=settings.preemption
    )
    stats = _stats(workload, state, plan, refused)
    state, events = scheduler.commit(state, plan, *said)
  stats = stats._replace(waiting=(arrived - jnp.sum(out.end >= 0) - jnp.sum(events.running >= 0)).astype(jnp.float32))

  ticks = jnp.int32(1)
  if settings.latency is not None:
    new, kv_lens = plan.scheduled.astype(jnp.float32), jnp.where(plan.scheduled > 0, plan.starts + plan.scheduled, 0)
    pairs = jnp.sum(new * (plan.starts + (new + 1) / 2))
    seconds = settings.latency.step_seconds(jnp.sum(new), jnp.sum(kv_lens.astype(jnp.float32)), pairs)
    seconds += settings.latency.swap_seconds(stats.swapped, settings.page_size)
    ticks = jnp.maximum(jnp.round(seconds * settings.ticks_per_s).astype(jnp.int32), 1)
  out = _follow(out, plan, events, clock, clock + ticks)
  out = _log(_add(out, stats, ticks), stats, clock)
  out = dataclasses.replace(out, steps=out.steps + 1, clock=clock + ticks)
  return _Carry(state=state, cursor=cursor, out=out)


def _submit(workload: Workload, settings: Settings, clock, state, cursor):
  """Hands in the requests that have arrived, one by one, until there is no row for them or no memory.

  Memory is reserved no sooner than the step that can begin to compute the request.

  Returns:
    The state, requests submitted so far, and bool[], whether the first of the others was refused its memory.
  """
  R, n = workload.prompt_lens.size, 1 if workload.reserve is not None else settings.samples
  is_open = ~jnp.any(_inner(state).live) if settings.is_static else jnp.bool(True)
  width = 0 if workload.contents is None else workload.contents.shape[1]

  def waits(state, cursor):
    inner = _inner(state)
    room = is_open & (jnp.sum(inner.live) + n <= (settings.num_slots if settings.is_static else inner.arrival.size))
    if workload.reserve is not None:
      running = jnp.where(inner.running >= 0, inner.running, inner.arrival.size)
      tokens = inner.requests.num_tokens.at[running].add(-inner.table.seq_lens, mode="drop")
      tokens = jnp.minimum(tokens, settings.chunk_size or settings.token_budget)
      room &= jnp.sum(jnp.where(inner.live, tokens, 0)) < settings.token_budget
    return (cursor < R) & (workload.arrivals[jnp.minimum(cursor, R - 1)] <= clock) & room

  def body(carry):
    state, cursor, _ = carry
    at = cursor + jnp.arange(n)
    prompt, output = workload.prompt_lens[at], workload.output_lens[at]
    new = dataclasses.replace(blank(n, width), prompt_lens=prompt, num_tokens=prompt, max_tokens=output)
    if n > 1:
      new = dataclasses.replace(new, group=jnp.zeros(n, jnp.int32))
    if workload.contents is not None:
      new = dataclasses.replace(new, tokens=workload.contents[at])
    if isinstance(state, ContiguousState):
      assert workload.reserve is not None
      state, ids = contiguous.submit(state, new, workload.reserve[cursor])
    else:
      state, ids = scheduler.submit(state, new)
    return state, cursor + n * (ids[0] != NOBODY), ids[0] == NOBODY

  return lax.while_loop(lambda c: waits(c[0], c[1]) & ~c[2], body, (state, cursor, jnp.bool(False)))


def _inner(state: State | ContiguousState) -> State:
  return state.state if isinstance(state, ContiguousState) else state


def _stats(workload: Workload, state: State | ContiguousState, plan: StepPlan, refused: jax.Array) -> Stats:
  """The memory during a step, of which everything but `waiting` is known."""
  inner = _inner(state)
  S = plan.rows.size
  active, lens = plan.rows >= 0, inner.table.seq_lens[:S]
  none = jnp.float32(0)
  copies = swapping.moved(plan.swap_out, plan.rows) + swapping.moved(plan.swap_in, plan.rows)
  counts = dict(running=jnp.sum(active), scheduled=jnp.sum(plan.scheduled), preempted=jnp.sum(plan.preempted >= 0))
  counts |= dict(lost=jnp.sum(plan.lost), swapped=jnp.sum(copies))
  if isinstance(state, ContiguousState):
    final = inner.requests.prompt_lens + inner.requests.max_tokens  # i32[R]
    held, blocks = jnp.sum(state.reserved), jnp.sum(state.blocks.sizes)
    used, ends = jnp.sum(lens), jnp.sum(jnp.where(inner.live, final, 0))
    split = dict(
      used=used,
      reserved=ends - used,
      internal=held - ends,
      rounding=blocks - held,
      external=jnp.where(refused, state.blocks.num_free, 0),
      free=jnp.where(refused, 0, state.blocks.num_free),
      pages=none,
      shared=none,
      mapped=none,
    )
  else:
    table = inner.table
    held = jnp.arange(table.num_pages) < workload.memory
    pages, size = jnp.sum(held & (table.ref_counts > 0)), table.page_size
    last = table.pages[jnp.arange(S), jnp.maximum(-(-lens // size) - 1, 0)]
    rest = jnp.where(active, -lens % size, 0) / jnp.maximum(table.ref_counts[last], 1)  # of one holder's share
    slack = jnp.sum(rest)
    split = dict(
      used=pages * size - slack,
      reserved=none,
      internal=slack,
      rounding=none,
      external=none,
      free=(workload.memory - pages) * size,
      pages=pages,
      shared=jnp.sum(held & (table.ref_counts > 1)),
      mapped=jnp.sum(-(-lens // size)),
    )
  return Stats(waiting=none, **{k: jnp.asarray(v, jnp.float32) for k, v in (counts | split).items()})


def _follow(out: Outcome, plan: StepPlan, events: StepEvents, begin: jax.Array, end: jax.Array) -> Outcome:
  """Notes what the step did to each request."""
  R = out.end.size

  def at(ids: jax.Array, when: jax.Array | bool = True) -> jax.Array:
    return jnp.where((ids >= 0) & when, ids, R)

  fresh = at(events.running, out.admitted[events.running] < 0)
  got, done = at(events.ids), at(events.ids, events.finish != LIVE)
  first = at(events.ids, out.first_token[events.ids] < 0)
  ended = at(events.ended)
  return dataclasses.replace(
    out,
    admitted=out.admitted.at[fresh].set(begin, mode="drop"),
    cached=out.cached.at[fresh].set(plan.starts, mode="drop"),
    first_token=out.first_token.at[first].set(end, mode="drop"),
    end=out.end.at[done].set(end, mode="drop").at[ended].set(end, mode="drop"),
    num_outputs=out.num_outputs.at[got].add(1, mode="drop"),
    preemptions=out.preemptions.at[at(events.preempted)].add(1, mode="drop"),
  )


def _add(out: Outcome, stats: Stats, ticks: jax.Array) -> Outcome:
  """Adds a step to the integrals; compensated, so that a million steps lose nothing."""
  weights = ticks * jnp.stack([jnp.bool(True), stats.waiting > 0])  # i32[2]
  value = weights[:, None] * jnp.stack(stats) - out.rest
  sums = out.sums + value
  return dataclasses.replace(out, sums=sums, rest=(sums - out.sums) - value, ticks=out.ticks + weights)


def _log(out: Outcome, stats: Stats, clock: jax.Array) -> Outcome:
  """Keeps every `stride`-th step; when the log is full, every other entry goes and the stride doubles."""
  size = out.log_ticks.size
  log, stride = (out.log, out.log_ticks), out.stride

  def halve(log):
    return jax.tree.map(lambda a: jnp.concatenate([a[::2], jnp.zeros_like(a[::2])]), log)

  full = out.steps // stride >= size
  log, stride = lax.cond(full, halve, lambda log: log, log), jnp.where(full, 2 * stride, stride)
  at = jnp.where(out.steps % stride == 0, out.steps // stride, size)
  log, times = jax.tree.map(lambda a, v: a.at[at].set(v, mode="drop"), log, (stats, clock))
  return dataclasses.replace(out, log=log, log_ticks=times, stride=stride)
