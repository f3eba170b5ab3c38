"""Simulations for people: arrays in, checked; what became of the requests out, in seconds."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from paged_flash import scheduler, swapping
from paged_flash.cache import buddy
from paged_flash.cache.page_table import cdiv
from paged_flash.simulator.contiguous import reserve
from paged_flash.simulator.latency import LatencyModel
from paged_flash.simulator.serve import Outcome, Settings, Stats, Workload, serve

_TICKS_PER_S = 100_000  # an i32 counts almost six hours of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paged:
  """A pool of pages, granted on demand."""

  num_pages: int
  page_size: int
  num_host_pages: int = 0  # of host memory, to swap preempted requests to

  @property
  def num_tokens(self) -> int:
    return self.num_pages * self.page_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contiguous:
  """Memory from which each running request reserves one block, by a buddy allocator."""

  num_tokens: int
  reserve: str  # "max", "pow2", "oracle": how much (`simulator.contiguous.reserve`)
  max_seq_len: int  # of the model: what "max" reserves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
  """What became of R requests. Times in seconds from the start (in steps where there was no latency model)."""

  arrival: np.ndarray  # f64[R]
  admitted: np.ndarray  # f64[R]  nan: never
  first_token: np.ndarray  # f64[R]
  end: np.ndarray  # f64[R]
  prompt_lens: np.ndarray  # i64[R]
  num_outputs: np.ndarray  # i64[R]  tokens that it got
  preemptions: np.ndarray  # i64[R]
  cached: np.ndarray  # i64[R]  prompt tokens found in the cache when it was first admitted
  mean: Stats  # over the time of all steps
  mean_queued: Stats  # over the time of the steps in which requests waited: a loaded server; nan if none ever did
  log: Stats  # f64[n] of every `stride`-th step
  log_times: np.ndarray  # f64[n]  when they began
  stride: int
  num_steps: int
  seconds: float  # to the end of the last request
  queued_seconds: float  # of steps in which requests waited

  @property
  def normalised_latency(self) -> float:
    """Mean over the requests of the time from arrival to end per output token (Kwon et al. 2023, section 6.1)."""
    return float(np.mean((self.end - self.arrival) / self.num_outputs))

  @property
  def throughput(self) -> float:
    """Output tokens per second."""
    return float(self.num_outputs.sum() / self.seconds)

  @property
  def saved(self) -> float:
    """Pages saved by sharing, of those that would be held without (Kwon et al. 2023, section 6.3), over all steps."""
    return 1 - float(self.mean.pages / self.mean.mapped)

  @property
  def hit_rate(self) -> float:
    """Share of the prompts' tokens that were found in the cache."""
    return float(self.cached.sum() / self.prompt_lens.sum())

  def split(self, *, queued: bool = True) -> dict[str, float]:
    """Shares of all memory, mean over the steps in which requests waited (else over all): who has it, for what.

    The categories of Kwon et al. 2023, figure 2, with theirs for "external" taken apart: "rounding" is the part of a
    buddy block beyond what the request asked for, "external" what is free in blocks too small.
    """
    stats = self.mean_queued if queued else self.mean
    parts = {name: float(getattr(stats, name)) for name in _PARTS}
    total = sum(parts.values())
    return {name: part / total for name, part in parts.items()}

  @property
  def waste(self) -> float:
    """Share of the held memory, over all steps, that holds no token."""
    held = sum(float(getattr(self.mean, name)) for name in ("used", "reserved", "internal", "rounding"))
    return 1 - float(self.mean.used) / held


_PARTS = ("used", "reserved", "internal", "rounding", "external", "free")


def poisson(rate: float, num_requests: int, *, seed: int = 0) -> np.ndarray:
  """Arrival times f64[R] in seconds of a Poisson process of `rate` requests per second.

  The same seed gives the same times but for their scale, so that rates can be compared.
  """
  return np.cumsum(np.random.default_rng(seed).exponential(size=num_requests)) / rate


def simulate(
  prompt_lens: Sequence[int] | np.ndarray,
  output_lens: Sequence[int] | np.ndarray,
  *,
  memory: Paged | Contiguous,
  num_slots: int,
  token_budget: int,
  chunk_size: int | None = None,
  arrivals: Sequence[float] | np.ndarray | None = None,
  latency: LatencyModel | None = None,
  contents: np.ndarray | None = None,
  samples: int = 1,
  policy: scheduler.Policy = scheduler.first_come,
  preemption: swapping.Preemption = swapping.always,
  is_static: bool = False,
  queue_size: int | None = None,
  log_size: int = 1024,
) -> Served:
  """Serves requests of these lengths, first come first served, in one jitted program.

  Args:
    prompt_lens, output_lens: [R] tokens of each request, at least 1, in order of arrival.
    memory: pages, or contiguous reservations.
    num_slots: requests that run together at most.
    token_budget: tokens that one step computes at most.
    chunk_size: prompt tokens of one request in one step at most; None for the budget.
    arrivals: [R] seconds (steps, without a latency model), not falling; None for all at 0.
    latency: seconds of a step; None: time is counted in steps.
    contents: i32[R, P], a number for what each page of a request will hold; requests share the pages of their common
      prefixes, held or not (`analysis.Trace.contents`). None: nothing is shared.
    samples: of each request, sharing its prompt's pages; contiguous memory shares nothing. R is then so many times
      as large in what is returned.
    policy: who comes first, of pages; `paged_flash.policies` has some.
    preemption: which victims to swap, as far as there are host pages; `LatencyModel.cheaper` knows.
    is_static: batches of as many requests as there are slots, each begun when the one before has ended, as servers did
      before continuous batching (Yu et al. 2022).
    queue_size: requests that the policy sees, running and waiting; None for twice the slots, which is as good as all
      of them for first come, first served.
    log_size: steps that the log keeps at most, spread evenly over the run.

  Raises:
    ValueError: a length below 1, a request that the memory cannot hold, times that fall, or a run of more than about
      six hours of simulated time.

  Example:
    >>> served = simulate([5, 9], [3, 2], memory=Paged(num_pages=8, page_size=4), num_slots=2, token_budget=16)
    >>> served.log.pages.tolist(), served.log.used.tolist(), served.end.tolist()
    ([5.0, 5.0, 2.0], [14.0, 16.0, 7.0], [3.0, 2.0])
  """
  workloads, settings = _prepare(
    prompt_lens, output_lens, [memory], None if arrivals is None else [arrivals], num_slots=num_slots,
    token_budget=token_budget, chunk_size=chunk_size, latency=latency, log_size=log_size,
    contents=contents, samples=samples, policies=[policy], preemption=preemption, is_static=is_static,
    queue_size=queue_size,
  )  # fmt: skip
  return _served(workloads[0], _jitted(workloads[0], settings), settings.ticks_per_s)


def sweep(
  prompt_lens: Sequence[int] | np.ndarray,
  output_lens: Sequence[int] | np.ndarray,
  *,
  memory: Sequence[Paged] | Sequence[Contiguous],
  num_slots: int,
  token_budget: int,
  chunk_size: int | None = None,
  arrivals: Sequence[np.ndarray] | None = None,
  latency: LatencyModel | None = None,
  contents: np.ndarray | None = None,
  samples: int = 1,
  policy: scheduler.Policy | Sequence[scheduler.Policy] = scheduler.first_come,
  preemption: swapping.Preemption = swapping.always,
  is_static: bool = False,
  queue_size: int | None = None,
  log_size: int = 1024,
) -> list[Served]:
  """Several runs of `simulate` over the same requests, mapped into one program.

  Args:
    memory: of each run; all paged with one page size and host memory, or all contiguous for one longest sequence.
    arrivals: of each run; None for all at 0.
    policy: of all runs, or one for each.
    The others: as in `simulate`.

  Raises:
    ValueError: as in `simulate`, memories that differ in kind, or not as many policies as memories.

  Example:
    >>> from paged_flash import policies
    >>> runs = dict(memory=[Paged(num_pages=8, page_size=4)] * 2, policy=[policies.first_come, policies.shortest_first])
    >>> [served.end.tolist() for served in sweep([9, 5], [3, 2], num_slots=1, token_budget=16, **runs)]
    [[3.0, 5.0], [5.0, 2.0]]
  """
  policies = [policy] * len(memory) if callable(policy) else list(policy)
  if len(policies) != len(memory):
    raise ValueError(f"policy must be one, or one for each of {len(memory)} memories, got {len(policies)}")
  workloads, settings = _prepare(
    prompt_lens, output_lens, memory, arrivals, num_slots=num_slots,
    token_budget=token_budget, chunk_size=chunk_size, latency=latency, log_size=log_size,
    contents=contents, samples=samples, policies=policies, preemption=preemption, is_static=is_static,
    queue_size=queue_size,
  )  # fmt: skip
  outcomes = _mapped(jax.tree.map(lambda *runs: jnp.stack(runs), *workloads), settings)
  outcomes = jax.tree.map(np.asarray, outcomes)
  return [
    _served(workload, jax.tree.map(lambda a, i=i: a[i], outcomes), settings.ticks_per_s)
    for i, workload in enumerate(workloads)
  ]


_jitted = functools.partial(jax.jit, static_argnames="settings")(serve)
_mapped = functools.partial(jax.jit, static_argnames="settings")(
  lambda workloads, settings: jax.vmap(lambda workload: serve(workload, settings))(workloads)
)


def _prepare(
  prompt_lens, output_lens, memories, arrivals, *,
  num_slots, token_budget, chunk_size, latency, contents, samples, policies, preemption, is_static, queue_size,
  log_size,
) -> tuple[list[Workload], Settings]:  # fmt: skip
  """Checked workloads, one for each memory, and the settings they share."""
  prompts, outputs = np.asarray(prompt_lens, np.int32), np.asarray(output_lens, np.int32)
  if prompts.shape != outputs.shape or prompts.ndim != 1 or not prompts.size:
    raise ValueError(f"prompt_lens and output_lens must be two equal [R], got {prompts.shape} and {outputs.shape}")
  if min(prompts.min(), outputs.min()) < 1:
    raise ValueError(f"lengths must be at least 1, got {min(prompts.min(), outputs.min())}")
  if samples < 1:
    raise ValueError(f"samples must be at least 1, got {samples}")
  queue_size = 2 * max(num_slots, samples) if queue_size is None else queue_size
  if queue_size < max(num_slots, samples):
    raise ValueError(f"queue_size must be at least {max(num_slots, samples)}, the slots or samples, got {queue_size}")
  if log_size < 2 or log_size % 2:
    raise ValueError(f"log_size must be even and at least 2, got {log_size}")
  if contents is not None and (np.ndim(contents) != 2 or len(contents) != prompts.size):
    raise ValueError(f"contents must be [{prompts.size}, P], got {np.shape(contents)}")
  prompts, outputs = np.repeat(prompts, samples), np.repeat(outputs, samples)
  longest, first = int((prompts + outputs).max()), memories[0]
  per_s = 1 if latency is None else _TICKS_PER_S
  workloads, distinct = [], list(dict.fromkeys(policies))
  for i, memory in enumerate(memories):
    if isinstance(memory, Paged):
      kind, pages = (Paged, memory.page_size, memory.num_host_pages), cdiv(longest, memory.page_size)
      if pages > memory.num_pages:
        raise ValueError(f"num_pages must be at least {pages}, for the longest request, got {memory.num_pages}")
      blocks, size = None, memory.num_pages
    else:
      kind, size = (Contiguous, memory.max_seq_len), memory.num_tokens
      if longest > memory.max_seq_len:
        raise ValueError(f"max_seq_len must be at least {longest}, for the longest request, got {memory.max_seq_len}")
      blocks = reserve(memory.reserve, jnp.asarray(prompts), jnp.asarray(outputs), memory.max_seq_len)
      if int(blocks.max()) > buddy.largest(size):
        raise ValueError(
          f"num_tokens must have a block of {int(blocks.max())}, for the longest reservation, and the largest of "
          f"{size} is {buddy.largest(size)}"
        )
    if i == 0:
      wanted = kind
    elif kind != wanted:
      raise ValueError(f"memories must be of one kind and size of page or sequence, got {first} and {memory}")
    times = np.zeros(prompts.size)
    if arrivals is not None:
      times = np.repeat(np.asarray(arrivals[i], np.float64), samples)
    if times.shape != prompts.shape or (np.diff(times) < 0).any() or times[0] < 0:
      raise ValueError(f"arrivals must be {prompts.shape}, from 0 on and not falling, got {times.shape}")
    if times[-1] * per_s >= 2**31 - 2**24:
      raise ValueError(f"arrivals must lie within {(2**31 - 2**24) // per_s} s, got {times[-1]}")
    workloads.append(
      Workload(
        prompt_lens=jnp.asarray(prompts),
        output_lens=jnp.asarray(outputs),
        arrivals=jnp.asarray(np.ceil(times * per_s - 1e-6), jnp.int32),
        reserve=blocks,
        contents=None if contents is None or blocks is not None else jnp.asarray(np.repeat(contents, samples, axis=0)),
        memory=jnp.int32(size),
        policy=jnp.int32(distinct.index(policies[i])),
      )
    )
  settings = Settings(
    num_slots=num_slots,
    num_pages=max(m.num_pages for m in memories) if isinstance(first, Paged) else num_slots,
    page_size=first.page_size if isinstance(first, Paged) else 1,
    num_host_pages=first.num_host_pages if isinstance(first, Paged) else 0,
    max_seq_len=longest if isinstance(first, Paged) else first.max_seq_len,
    token_budget=token_budget,
    chunk_size=chunk_size,
    queue_size=queue_size,
    samples=samples,
    policies=tuple(distinct),
    preemption=preemption,
    is_static=is_static,
    latency=latency,
    ticks_per_s=per_s,
    log_size=log_size,
  )
  return workloads, settings


def _served(workload: Workload, outcome: Outcome, per_s: int) -> Served:
  out, asked = jax.tree.map(np.asarray, outcome), jax.tree.map(np.asarray, workload)
  if (out.end < 0).any():
    raise ValueError(
      f"{(out.end < 0).sum()} of {out.end.size} requests had not ended after {out.clock / per_s:.0f} s, the longest "
      "time that can be simulated: the arrivals are too many"
    )

  def seconds(ticks):
    return np.where(ticks < 0, np.nan, ticks / per_s)

  kept = -(-int(out.steps) // int(out.stride))
  with np.errstate(invalid="ignore"):
    mean, queued = out.sums.astype(np.float64) / out.ticks[:, None]
  return Served(
    arrival=seconds(asked.arrivals),
    admitted=seconds(out.admitted),
    first_token=seconds(out.first_token),
    end=seconds(out.end),
    prompt_lens=asked.prompt_lens.astype(np.int64),
    num_outputs=out.num_outputs.astype(np.int64),
    preemptions=out.preemptions.astype(np.int64),
    cached=out.cached.astype(np.int64),
    mean=Stats(*mean),
    mean_queued=Stats(*queued),
    log=Stats(*(a[:kept].astype(np.float64) for a in out.log)),
    log_times=seconds(out.log_ticks[:kept]),
    stride=int(out.stride),
    num_steps=int(out.steps),
    seconds=float(out.clock / per_s),
    queued_seconds=float(out.ticks[1] / per_s),
  )
