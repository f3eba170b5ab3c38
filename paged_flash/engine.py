"""The engine: requests in, tokens out. The host shell around one pure step.

A step is plan, model, sampling and commit in one compiled program. Two drivers run it: `step` (one step a dispatch,
tokens stream out at once) and `run` (many steps in one `lax.while_loop`, with grants, releases, stops and admissions
inside). Only the KV pool is donated; the scheduler's state is a small value that you can keep, compare and fork.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from paged_flash import scheduler, speculation, swapping
from paged_flash import step as pure
from paged_flash.cache import kv_pages, page_table, prefix
from paged_flash.cache.kv_pages import KVPages
from paged_flash.cache.page_table import cdiv
from paged_flash.models import Model
from paged_flash.requests import Completion, Counter, Events, Params, Prompt, StopWatch, checked, encode, for_host, rows
from paged_flash.state import NOBODY, STOP, State

_SUBMIT_BATCH = 32  # requests queued per dispatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineState:
  """All that an engine knows between two steps."""

  scheduler: State  # a value: keep it as long as you like
  kv: KVPages  # linear: consumed by the step that is handed it
  idle: bool  # no request is live
  stops: Mapping[int, StopWatch]  # live requests with stop strings


class Engine:
  """Serves a model by continuous batching over a paged KV cache.

  Args:
    model: from `paged_flash.models.load`.
    num_slots: requests that run together, S.
    num_pages: pages in the pool. Give this or `memory_bytes`.
    memory_bytes: bytes that the pool may take; `memory` shows the arithmetic.
    page_size: tokens per page.
    max_seq_len: tokens of a request, prompt and output; None for the least that model and pool allow.
    token_budget: tokens that one step computes at most; prompts share what decoding leaves of it.
    chunk_size: prompt tokens that one request computes in a step at most; None for the budget.
    queue_size: requests kept, waiting, running or ended.
    prefix_cache: requests that start alike share the pages of it, those of requests that ended included.
    policy: who comes first; one of `paged_flash.policies`, or a function of your own.
    num_proposed: tokens proposed for each slot in a step (`paged_flash.speculation`); those that come are the same.
    proposer: what proposes them: a function of the state (by default: what followed the last tokens where they stood
      before), or a smaller model of the same vocabulary, a draft, whose K and V lie in the same pages.
    num_host_pages: pages of host memory, to which preempted requests are swapped.
    preemption: which of them are, as far as there is room; from `paged_flash.swapping`, or a function of your own.
    steps_per_dispatch: steps that `run` makes in one program at most.
    kv_dtype: of the pool; None for the model's.
    implementation: of `paged_attention`; None for the first that supports it.
    debug: check every page table after every step.

  Raises:
    ValueError: sizes that cannot work together.

  Example:
    >>> import paged_flash as pf
    >>> sizes = dict(vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64)
    >>> model = pf.models.load(pf.models.ModelConfig(**sizes))  # random weights
    >>> engine = Engine(model, num_slots=2, num_pages=32, page_size=4)
    >>> state, request = engine.submit(engine.init(), [1, 2, 3], max_tokens=5)
    >>> tokens = []
    >>> while not state.idle:
    ...   state, events = engine.step(state)
    ...   tokens += [event.token for event in events if event.request == request]
    >>> len(tokens)
    5
  """

  def __init__(
    self,
    model: Model,
    *,
    num_slots: int = 8,
    num_pages: int | None = None,
    memory_bytes: int | None = None,
    page_size: int = 16,
    max_seq_len: int | None = None,
    token_budget: int = 256,
    chunk_size: int | None = None,
    queue_size: int = 256,
    prefix_cache: bool = True,
    policy: scheduler.Policy = scheduler.first_come,
    num_proposed: int = 0,
    proposer: speculation.Proposer | Model = speculation.lookup,
    num_host_pages: int = 0,
    preemption: swapping.Preemption = swapping.always,
    steps_per_dispatch: int = 32,
    kv_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
    debug: bool = False,
  ):
    c = model.config
    dtype = jnp.dtype(kv_dtype or jax.tree.leaves(model.params)[0].dtype)
    sizes = dict(num_slots=num_slots, num_pages=num_pages, page_size=page_size, max_seq_len=max_seq_len)
    sizes |= dict(token_budget=token_budget, chunk_size=chunk_size, queue_size=queue_size)
    for name, size in (sizes | dict(steps_per_dispatch=steps_per_dispatch)).items():
      if size is not None and size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    for name, size in dict(num_proposed=num_proposed, num_host_pages=num_host_pages).items():
      if size < 0:
        raise ValueError(f"{name} must be at least 0, got {size}")
    settings = pure.Settings(
      token_budget=token_budget,
      chunk_size=min(chunk_size or token_budget, token_budget),
      implementation=implementation,
      policy=policy,
      num_proposed=num_proposed,
      proposer=proposer,
      preemption=preemption,
    )
    draft, configs = settings.draft, pure.configs(model, settings)
    page_bytes = page_size * sum(each.kv_values_per_token for each in configs) * dtype.itemsize
    if (num_pages is None) == (memory_bytes is None):
      raise ValueError(f"give either num_pages or memory_bytes, got {num_pages=} and {memory_bytes=}")
    if num_pages is None:
      assert memory_bytes is not None
      num_pages = memory_bytes // page_bytes
    if num_pages < num_slots:
      given = "" if memory_bytes is None else f" (memory_bytes={memory_bytes} at {page_bytes} bytes a page)"
      raise ValueError(f"num_pages must be at least num_slots={num_slots}, got {num_pages}{given}")
    if token_budget < num_slots:
      raise ValueError(f"token_budget must be at least num_slots={num_slots}, got {token_budget}")
    if max_seq_len is not None and max_seq_len > c.max_seq_len:
      raise ValueError(f"max_seq_len must be at most the model's {c.max_seq_len}, got {max_seq_len}")
    self.model, self.num_slots, self.num_pages, self.page_size = model, num_slots, num_pages, page_size
    self.max_seq_len = max_seq_len or c.max_seq_len
    window, chunk_size = c.sliding_window, settings.chunk_size
    if window is None or page_table.window_pages(window, chunk_size, page_size) > num_pages:
      self.max_seq_len = min(self.max_seq_len, num_pages * page_size)
    self.queue_size, self.prefix_cache, self.kv_dtype, self.debug = queue_size, prefix_cache, dtype, debug
    self.steps_per_dispatch, self.num_host_pages, self.page_bytes = steps_per_dispatch, num_host_pages, page_bytes
    token = [f"{m.num_layers} layers x 2 (K, V) x {m.num_kv_heads} heads x {m.head_dim}" for m in configs]
    self.memory = (
      f"KV pool: {num_pages:,} pages x {page_size} tokens x {' and '.join(token)} x {dtype.itemsize} B ({dtype.name}) "
      f"= {num_pages * page_bytes:,} B ({num_pages * page_bytes / 2**20:,.1f} MiB, {num_pages * page_size:,} tokens)"
    )
    self._submit = jax.jit(scheduler.submit)
    self._cancel = jax.jit(scheduler.cancel)
    self._step = jax.jit(functools.partial(pure.step, model, settings), donate_argnames="kv")
    run = functools.partial(pure.run, model, settings, most=steps_per_dispatch)
    self._run = jax.jit(run, donate_argnames="kv")
    # For `history`: what a step would do, and the K and V of what a plan says to compute.
    self.settings, self.params = settings, model.params if draft is None else (model.params, draft.params)
    self.plan = jax.jit(functools.partial(pure.plan, settings))
    fill = functools.partial(pure.fill, model, settings, num_tokens=token_budget)
    self.fill = jax.jit(fill, donate_argnames="kv")

  def init(self) -> EngineState:
    """An empty state with a pool of its own."""
    c = self.model.config
    state = scheduler.init(
      num_slots=self.num_slots,
      pages_per_slot=cdiv(self.max_seq_len, self.page_size),
      num_pages=self.num_pages,
      page_size=self.page_size,
      num_requests=self.queue_size,
      max_seq_len=self.max_seq_len,
      prefix_cache=self.prefix_cache,
      window=c.sliding_window,
      num_host_pages=self.num_host_pages,
    )
    sizes = dict(num_pages=self.num_pages, page_size=self.page_size, num_host_pages=self.num_host_pages)
    kv = pure.pool(self.model, self.settings, dtype=self.kv_dtype, **sizes)
    state, kv = kv_pages.placed(kv, (state, kv))
    return EngineState(scheduler=state, kv=kv, idle=True, stops={})

  def submit(self, state: EngineState, prompt_ids: Sequence[int], **params: Any) -> tuple[EngineState, int]:
    """Queues one request.

    Args:
      state: stays good but for its pool, which the answer shares.
      prompt_ids: token ids of the prompt.
      **params: fields of `Params`.

    Returns:
      The state with the request waiting, and the request's id.

    Raises:
      ValueError: the prompt is empty, too long, or holds an id outside the vocabulary; a parameter is out of range.
      RuntimeError: `queue_size` requests are live already.
    """
    state, ids = self.submit_many(state, [(prompt_ids, Params(**params))])
    return state, ids[0]

  def submit_many(
    self, state: EngineState, requests: Sequence[tuple[Sequence[int], Params]]
  ) -> tuple[EngineState, list[int]]:
    """Queues several requests, in order: all of them, or none when one is not good."""
    return self._queue(state, [self.check(prompt, params) for prompt, params in requests])

  def submit_samples(
    self, state: EngineState, prompt_ids: Sequence[int], num_samples: int, **params: Any
  ) -> tuple[EngineState, list[int]]:
    """Queues several samples of one prompt, with seeds `seed`, `seed + 1` and so on.

    The prompt is computed once. The samples share all its pages; the part-full last one is copied when a sample first
    writes to it.

    Args:
      state, prompt_ids, **params: as for `submit`.
      num_samples: at least 1, and no more than fit one batch of submissions, 32.

    Returns:
      The state with the samples waiting, and their ids.
    """
    if not 1 <= num_samples <= _SUBMIT_BATCH:
      raise ValueError(f"num_samples must be in 1..{_SUBMIT_BATCH}, got {num_samples}")
    ids, first = self.check(prompt_ids, Params(**params))
    seeds = [(first.seed + i) % 2**32 for i in range(num_samples)]
    samples = [(ids, dataclasses.replace(first, seed=seed)) for seed in seeds]
    return self._queue(state, samples, samples=True)

  def _queue(
    self, state: EngineState, good: Sequence[tuple[list[int], Params]], *, samples: bool = False
  ) -> tuple[EngineState, list[int]]:
    sched, stops, ids = state.scheduler, dict(state.stops), []
    for i in range(0, len(good), _SUBMIT_BATCH):
      batch = good[i : i + _SUBMIT_BATCH]
      size = 1 if len(batch) == 1 else _SUBMIT_BATCH
      sched, new = self._submit(sched, rows(batch, size, self.max_seq_len, samples=samples))
      ids += np.asarray(new)[: len(batch)].tolist()
    if NOBODY in ids:
      raise RuntimeError(f"the queue is full: queue_size={self.queue_size} requests are live; step the engine first")
    for id, (_, params) in zip(ids, good, strict=True):
      if params.stop:
        stops[id] = StopWatch(tuple(params.stop), params.min_tokens)
    return dataclasses.replace(state, scheduler=sched, stops=stops, idle=state.idle and not ids), ids

  def check(self, prompt_ids: Sequence[int], params: Params) -> tuple[list[int], Params]:
    """The prompt as a list and the parameters with what is left open filled in; raises ValueError (see `submit`)."""
    return checked(
      prompt_ids,
      params,
      vocab_size=self.model.config.vocab_size,
      tokenizer=self.model.tokenizer,
      limit=self.max_seq_len,
      why=f"max_seq_len={self.max_seq_len}",
    )

  def step(self, state: EngineState) -> tuple[EngineState, Events]:
    """Runs one step: the streaming driver. Consumes `state.kv`; `state.scheduler` stays good.

    Raises:
      RuntimeError: `state.kv` was consumed by an earlier step.
    """
    sched, kv, events, live = self._dispatch(self._step, state)
    state, (events,) = self._after(state, sched, kv, [events], live)
    return state, events

  def run(self, state: EngineState, num_steps: int | None = None) -> tuple[EngineState, list[Events]]:
    """Runs up to `num_steps` steps in one program: the device driver. Consumes `state.kv`.

    It returns early when no request is live. Stop strings are looked for when it returns; what was computed after
    one is cut, so that the tokens are those of `step`.

    Args:
      state: as for `step`.
      num_steps: at most `steps_per_dispatch`, which None stands for.
    """
    num_steps = self.steps_per_dispatch if num_steps is None else num_steps
    if not 1 <= num_steps <= self.steps_per_dispatch:
      raise ValueError(f"num_steps must be in 1..steps_per_dispatch={self.steps_per_dispatch}, got {num_steps}")
    sched, kv, (events, done), live = self._dispatch(self._run, state, np.int32(num_steps))
    steps = [jax.tree.map(lambda a, i=i: a[i], events) for i in range(int(done))]
    return self._after(state, sched, kv, steps, live)

  def cancel(self, state: EngineState, request: int) -> EngineState:
    """Ends a request, waiting or running; its pages are free at once. An unknown or ended one changes nothing."""
    sched = self._cancel(state.scheduler, np.int32(request))
    stops = {id: stop for id, stop in state.stops.items() if id != request}
    return dataclasses.replace(state, scheduler=sched, stops=stops, idle=not np.asarray(sched.live).any())

  def output(self, state: EngineState, request: int) -> list[int]:
    """Output tokens of a request so far; readable after its end until its row is used again.

    Raises:
      KeyError: the request is not (or no longer) kept.
    """
    sched = state.scheduler
    (row,) = np.nonzero(np.asarray(sched.arrival) == request)
    if request < 0 or not row.size:
      raise KeyError(f"request {request} is not kept (queue_size={self.queue_size})")
    r = int(row[0])
    start, end = int(sched.requests.prompt_lens[r]), int(sched.requests.num_tokens[r])
    return np.asarray(sched.requests.tokens[r, start:end]).tolist()

  # The closed loop.

  def generate(self, prompts: Sequence[Prompt], **params: Any) -> list[str]:
    """The text that follows each prompt (text, token ids or chat messages); `params` are fields of `Params`.

    Raises:
      ValueError: a prompt or parameter is not good; the text names the prompt. Nothing is run.
    """
    results = self.complete([(prompt, Params(**params)) for prompt in prompts])
    for i, result in enumerate(results):
      if result.error:
        raise ValueError(f"prompts[{i}]: {result.error}")
    return [result.text for result in results]

  def complete(
    self,
    requests: Sequence[tuple[Prompt, Params]],
    *,
    driver: str = "host",
    progress: bool = False,
    on_text: Callable[[int, str], None] | None = None,
    on_events: Callable[[Events], None] | None = None,
  ) -> list[Completion]:
    """Serves requests to their ends, in a state of its own. A request that is not good disturbs no other.

    Args:
      requests: prompts with their parameters; all arrive at once, in this order.
      driver: "host" for one step a dispatch, "device" for many. The tokens are the same.
      progress: show a progress bar.
      on_text: called with a request's index and its next piece of text, whole characters, stop strings left out.
      on_events: called with the `Events` of every step, in which a request is named by its index in `requests`.

    Returns:
      A completion for each request; `finish` is "error" for those that could not be served.

    Raises:
      ValueError: an unknown driver.
    """
    if driver not in ("host", "device"):
      raise ValueError(f"driver must be 'host' or 'device', got {driver!r}")
    state, start = self.init(), time.perf_counter()
    counter = Counter(self.model.tokenizer, on_text)
    good: dict[int, tuple[list[int], Params]] = {}
    for i, (prompt, params) in enumerate(requests):
      try:
        good[i] = self.check(self.encode(prompt), params)
      except ValueError as error:
        counter.refuse(i, str(error))

    queue = list(good)  # not yet submitted
    with tqdm(total=len(requests), initial=len(counter.done), unit="request", disable=not progress) as bar:
      while queue or counter.live:
        room = self.queue_size - len(counter.live)
        now, queue = queue[:room], queue[room:]
        state, ids = self.submit_many(state, [good[i] for i in now])
        for id, i in zip(ids, now, strict=True):
          counter.open(id, i, *good[i])
        state, steps = self.run(state) if driver == "device" else self._one(state)
        clock = time.perf_counter() - start
        for events in steps:
          counter.take(events, clock)
          if on_events:
            on_events(events.renamed(counter.names))
        rate, held = counter.num_tokens / clock, steps[-1].pages_held if steps else 0
        bar.set_postfix_str(f"{rate:.0f} tok/s, {held}/{self.num_pages} pages", refresh=False)
        bar.update(len(counter.done) - bar.n)
    return [counter.done[i] for i in range(len(requests))]

  def encode(self, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: text, token ids or chat messages (through the chat template)."""
    return encode(prompt, self.model.tokenizer)

  def _one(self, state: EngineState) -> tuple[EngineState, list[Events]]:
    state, events = self.step(state)
    return state, [events]

  def _dispatch(self, program: Callable, state: EngineState, *args):
    if state.kv.k.is_deleted():
      raise RuntimeError("state.kv was consumed by an earlier step: the pool is linear; go on from that step's state")
    sched, kv, events, live = program(self.params, state.scheduler, state.kv, *args)
    events, live = jax.device_get((events, live))
    return sched, kv, events, bool(live)

  def _after(self, state: EngineState, sched, kv, steps, live: bool) -> tuple[EngineState, list[Events]]:
    """Events of each step for the host, cut where a stop string appears."""
    out, stops, cuts = for_host(steps, state.stops, self.model.tokenizer)
    for id, num_tokens in cuts.items():
      sched = self._cancel(sched, np.int32(id), np.int32(STOP), np.int32(num_tokens))
    if cuts:
      live = bool(np.asarray(sched.live).any())
    if self.debug:
      for table in filter(None, (sched.table, sched.host)):
        page_table.check(table)
      if sched.index is not None:
        prefix.check(sched.index, sched.table)
    return EngineState(scheduler=sched, kv=kv, idle=not live, stops=stops), out
