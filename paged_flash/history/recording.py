"""Recording a run: every state of the scheduler, rebuilt bit for bit, and what came from outside between the steps.

A scheduler's `State` is small, and two states in a row differ in few elements, so a run can be kept whole. The pool is
not kept: what it must hold follows from the tokens, and `rebuild` computes it again.
"""

import dataclasses
import pickle
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged_flash import scheduler
from paged_flash.cache import kv_pages
from paged_flash.cache.kv_pages import KVPages
from paged_flash.cache.page_table import NO_PAGE, PageCopies, cdiv
from paged_flash.cache.prefix import ABSENT
from paged_flash.history import words
from paged_flash.history.words import Moment
from paged_flash.state import FINISH_NAMES, NOBODY, STOP, State

type Engine = Any  # a `paged_flash.Engine`: a room above this one
type EngineState = Any  # what its verbs take and return
type Delta = list[tuple[int, np.ndarray | None, np.ndarray]]  # leaf, flat places (None for all of it), new values

_KEY_EVERY = 256  # frames; a key frame differs from the first state, the others from the frame before
_commit = jax.jit(scheduler.commit)
_cancel = jax.jit(scheduler.cancel)


class Frame(NamedTuple):
  """What one verb did."""

  verb: str  # "step", or the verb of the engine that was called between two steps
  is_key: bool
  packed: bytes  # what it was given or said, the changes of the state, the other fields of the engine's state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording:
  """A run so far. A value: every verb returns the next recording and leaves this one good, but for `now.kv`.

  A step costs the bytes of the elements that it changed (place and value) and of its events, compressed: about 25 for
  each token that it yields, 6 kB for 256 decoding slots. Every 256 frames it is the difference from the first state
  (45 kB early in such a run). `step` is the engine's host driver; `Engine.run` would keep the states between its steps
  to itself.

  Example:
    >>> import paged_flash as pf
    >>> sizes = dict(vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64)
    >>> model = pf.models.load(pf.models.ModelConfig(**sizes))  # random weights
    >>> engine = pf.Engine(model, num_slots=2, num_pages=32, page_size=4)
    >>> run, request = pf.history.record(engine).submit([1, 2, 3, 4, 5], max_tokens=3)
    >>> while not run.now.idle:
    ...   run, events = run.step()
    >>> run.num_steps, run.rewind(1).table.seq_lens[:2].tolist(), run.replay()
    (3, [5, 0], 3)
    >>> print(run.explain(request))
    request 0: 5 prompt tokens, at most 3 output tokens
    step 0: queued behind nobody
    step 0: admitted into slot 0, 5 tokens to compute
    step 0: prefilled in 1 chunk, first token
    step 2: ended: length, with 3 output tokens; 2 pages let go
    >>> print(pf.history.diff(run.rewind(0), run.rewind(1)))
    pages granted: 0, 1
    request 0: admitted into slot 0; 1 token appended; K and V of 5 tokens computed
    >>> other = run.fork_from(1).cancel(request)  # another future from the same past
    >>> other.now.idle, run.num_steps, other.num_steps
    (True, 3, 1)
  """

  engine: Engine
  now: EngineState  # to go on from; its pool is linear and consumed by the next step
  first: State  # NumPy arrays
  first_host: Mapping[str, Any]
  frames: tuple[Frame, ...] = ()

  @property
  def num_steps(self) -> int:
    return sum(frame.verb == "step" for frame in self.frames)

  @property
  def num_bytes(self) -> int:
    """Bytes of all frames; the first state comes on top."""
    return sum(len(frame.packed) for frame in self.frames)

  # Going on.

  def step(self) -> tuple["Recording", Any]:
    """Runs and records one step; returns its `Events` too. Consumes `now.kv`."""
    state, events = self.engine.step(self.now)
    return self._then("step", events, state), events

  def call(self, verb: str, *args: Any, **kwargs: Any) -> tuple["Recording", Any]:
    """Calls a verb of the engine that takes a state and returns the next one, alone or with an answer.

    Raises:
      ValueError: `verb` runs steps; only `step` records them.
    """
    if verb in ("step", "run"):
      raise ValueError(f"verb must be one that runs no step (Recording.step does), got {verb!r}")
    out = getattr(self.engine, verb)(self.now, *args, **kwargs)
    state, answer = out if isinstance(out, tuple) else (out, None)
    return self._then(verb, (args, kwargs), state), answer

  def submit(self, prompt_ids: Sequence[int], **params: Any) -> tuple["Recording", int]:
    """`Engine.submit`, recorded; returns the request's id too."""
    return self.call("submit", prompt_ids, **params)

  def cancel(self, request: int) -> "Recording":
    """`Engine.cancel`, recorded."""
    return self.call("cancel", request)[0]

  # Looking back.

  def rewind(self, step: int) -> State:
    """The state that step number `step` (from 0) started from, exactly; `num_steps` stands for the state now.

    What came from outside before that step is in it.

    Raises:
      ValueError: there is no such step.
    """
    return jax.tree.map(jnp.asarray, self._at(self._place(step))[0])

  def moments(self) -> Iterator[Moment]:
    """All that happened, in order."""
    state, host, step = self.first, self.first_host, 0
    for frame in self.frames:
      before = state
      said, state, host = self._unpack(frame, before, host, set())
      yield Moment(step, frame.verb, said, before, state, host)
      step += frame.verb == "step"

  def replay(self) -> int:
    """Runs the scheduler again on the recorded tokens and inputs, from the first state; the model is not needed.

    Returns:
      The number of steps.

    Raises:
      AssertionError: a state is not, bit for bit, the recorded one; the text says when and where.
    """
    now: EngineState = self._engine_state(self.first, self.first_host, None)
    steps = 0
    for moment in self.moments():
      if moment.verb == "step":
        now = self._engine_state(self._step_again(now.scheduler, moment.said), moment.host, None)
        steps += 1
      else:
        args, kwargs = moment.said
        out = getattr(self.engine, moment.verb)(now, *args, **kwargs)
        now = out[0] if isinstance(out, tuple) else out
      wanted, _ = jax.tree_util.tree_flatten_with_path(moment.after)
      for (path, a), b in zip(wanted, jax.tree.leaves(now.scheduler), strict=True):
        places = np.flatnonzero(_bits(a) != _bits(b))
        if places.size:
          name = jax.tree_util.keystr(path)
          raise AssertionError(f"{moment.verb} at step {moment.step}: state{name} differs at {places[:5].tolist()}")
    return steps

  def fork_from(self, step: int) -> "Recording":
    """A recording of the first `step` steps that goes on from there, with a pool of its own (see `rebuild`).

    Submit, cancel or step: this recording stays what it is. Left alone, the fork yields the same tokens.

    Raises:
      ValueError: there is no such step.
    """
    place = self._place(step)
    state, host = self._at(place)
    state = jax.tree.map(jnp.asarray, state)
    now = self._engine_state(state, host, rebuild(self.engine, state))
    return dataclasses.replace(self, now=now, frames=self.frames[:place])

  def explain(self, request: int) -> str:
    """The life of a request in words: a line for each thing that happened to it, with the step and the reason.

    Raises:
      KeyError: it was never in this run.
    """
    return words.explain(self.moments(), self.engine.plan, request)

  def records(self) -> list[dict[str, Any]]:
    """One mapping for each step, as the pictures take them: `pf.show(recording)` draws them.

    Returns:
      "held", "shared", "cached": pages in use, those of them held more than once, and those that nobody holds but that
      can be found again; "waiting": requests; "preempted": how many lost their slots; "slots": the request in each
      slot, -1 for none; "did": for each slot what it did, one of "", "prefill", "recompute", "decode", "paused",
      "preempted" (the request in "slots" is then the one that lost it).
    """
    return words.records(self.moments(), self.engine.plan)

  @property
  def num_pages(self) -> int:
    """Pages in the pool."""
    return self.first.table.num_pages

  def _then(self, verb: str, said: Any, state: EngineState) -> "Recording":
    """The recording after one more frame."""
    is_key = len(self.frames) % _KEY_EVERY == _KEY_EVERY - 1
    base = self.first if is_key else self.now.scheduler
    old, new = _host(self.now), _host(state)
    host = new if is_key else {name: value for name, value in new.items() if value != old[name]}
    packed = pickle.dumps((said, _delta(base, state.scheduler), host), protocol=pickle.HIGHEST_PROTOCOL)
    frame = Frame(verb, is_key, zlib.compress(packed, 1))
    return dataclasses.replace(self, now=state, frames=(*self.frames, frame))

  def _unpack(
    self, frame: Frame, state: State, host: Mapping[str, Any], owned: set[int]
  ) -> tuple[Any, State, Mapping[str, Any]]:
    """What the frame was given or said, and the state and other fields after it.

    `owned` are the leaves of `state` that may be overwritten; those of the answer are added.
    """
    said, delta, fields = pickle.loads(zlib.decompress(frame.packed))
    leaves, structure = jax.tree.flatten(self.first if frame.is_key else state)
    for i, places, values in delta:
      if places is None:
        leaves[i] = values
        owned.discard(i)
      else:
        leaves[i] = leaves[i] if i in owned else leaves[i].copy()
        leaves[i].reshape(-1)[places] = values
        owned.add(i)
    return said, jax.tree.unflatten(structure, leaves), {**host, **fields}

  def _place(self, step: int) -> int:
    """Frames before the one of step number `step`."""
    places = [i for i, frame in enumerate(self.frames) if frame.verb == "step"] + [len(self.frames)]
    if not 0 <= step < len(places):
      raise ValueError(f"step must be in 0..{len(places) - 1}, the steps recorded, got {step}")
    return places[step]

  def _at(self, place: int) -> tuple[State, Mapping[str, Any]]:
    """State (NumPy arrays) and other fields after so many frames."""
    start = max((i for i in range(place) if self.frames[i].is_key), default=0)
    state, host, owned = self.first, self.first_host, set()
    for frame in self.frames[start:place]:
      _, state, host = self._unpack(frame, state, host, owned)
    return state, host

  def _engine_state(self, state: State, host: Mapping[str, Any], kv: KVPages | None) -> EngineState:
    state = jax.tree.map(jnp.asarray, state)
    state = state if kv is None else kv_pages.placed(kv, state)
    return dataclasses.replace(self.now, scheduler=state, kv=kv, **host)

  def _step_again(self, state: State, events: Any) -> State:
    """One step of the scheduler, with the model's words taken from the record."""
    said: dict[int, list[tuple[int, float]]] = {}
    for event in events:
      said.setdefault(event.request, []).append((event.token, event.logprob))
    state, plan = self.engine.plan(state)
    tokens = np.zeros((len(events.running), 1 + plan.proposed.shape[1]), np.int32)
    logprobs = np.zeros(tokens.shape, np.float32)
    proposed = np.full(plan.proposed.shape, NOBODY, np.int32)  # what held of it is in the record, whoever proposed
    for slot, id in enumerate(events.running):
      words = [*said.get(id, ()), *((token, 0.0) for token in events.cut.get(id, ()))]
      for k, word in enumerate(words):
        tokens[slot, k], logprobs[slot, k] = word
      right = max(len(words) - 1, 0)
      proposed[slot, :right] = tokens[slot, :right]
    state, made = _commit(state, dataclasses.replace(plan, proposed=proposed), tokens, logprobs)
    for event in events:  # what the host ended, because of a stop string
      finish = FINISH_NAMES[made.finish[events.running.index(event.request)]]
      if event.done and (event.finish != finish or event.request in events.cut):
        (row,) = np.flatnonzero(np.asarray(state.arrival) == event.request)
        keep = state.requests.num_tokens[row] - state.requests.prompt_lens[row] - len(events.cut.get(event.request, ()))
        state = _cancel(state, np.int32(event.request), np.int32(STOP), keep)
    return state


def record(engine: Engine, state: EngineState | None = None) -> Recording:
  """A recording that starts from a state of the engine; None for an empty one. Its first step consumes `state.kv`."""
  now: EngineState = engine.init() if state is None else state
  return Recording(engine=engine, now=now, first=jax.tree.map(np.asarray, now.scheduler), first_host=_host(now))


def rebuild(engine: Engine, state: State) -> KVPages:
  """The pool that a state needs: K and V of what every slot has computed, in the very pages that the table names.

  Each sequence is prefilled from its recorded tokens; pages that it shares with one already done are not computed
  again. So are the chains of pages that nobody holds and that a prefix index can still find. Chunks and batches are not
  those of the first time, so the values agree to rounding; in float32 the tokens that follow are the same. What
  a slot let go behind a window is computed in pages beside the pool, for those that it holds, and so is what requests
  keep in host memory.

  Args:
    engine: whose model computes them.
    state: stays good.

  Returns:
    A new pool; pages that nobody holds or finds are zeros.
  """
  kv, chunk, size = engine.init().kv, engine.settings.chunk_size, state.table.page_size
  _, plan = engine.plan(state)  # gives the shapes
  S, N, P, C = plan.rows.size, state.table.num_pages, state.table.pages_per_slot, state.requests.tokens.shape[1]
  beside = 0 if state.table.window is None and state.host is None else P
  kv = kv_pages.resize(kv, N + beside)

  def fill(kv, held, tokens, first):
    # The sequence sits in slot 0 and row 0 of a state of its own, and a plan computes a chunk of it.
    pages = np.pad(held, (0, P - len(held)), constant_values=NO_PAGE)
    table = dataclasses.replace(state.table, pages=state.table.pages.at[0].set(pages))
    rows = state.requests.tokens.at[0].set(np.pad(tokens, (0, C - len(tokens))))
    alone = dataclasses.replace(state, table=table, requests=dataclasses.replace(state.requests, tokens=rows))
    for start in range(first, len(tokens), chunk):
      count = min(chunk, len(tokens) - start)
      one = {name: np.zeros(S, np.int32) for name in ("rows", "starts", "scheduled", "num_proposed")}
      one["rows"][1:], one["starts"][0], one["scheduled"][0] = NOBODY, start, count
      kv = engine.fill(engine.params, alone, dataclasses.replace(plan, **one), kv=kv)[1]
    return kv

  written = np.zeros(N + beside, np.int32)  # tokens in each page
  for held, tokens in _sequences(state):
    wanted = np.minimum(len(tokens) - np.arange(len(held)) * size, size)
    if not (written[held[held >= 0]] < wanted[held >= 0]).any():
      continue
    held = np.where(held >= 0, held, N + np.arange(len(held)))
    written[N:] = 0
    missing = np.flatnonzero(written[held] < wanted)
    written[held] = np.maximum(written[held], wanted)
    kv = fill(kv, held, tokens, missing[0] * size)
  if (host := state.host) is not None:
    for row in np.flatnonzero(host.seq_lens).tolist():
      tokens = np.asarray(state.requests.tokens[row])[: int(host.seq_lens[row])]
      held = N + np.arange(cdiv(len(tokens), size))
      kv = fill(kv, held, tokens, 0)
      kv = kv_pages.swap(kv, PageCopies(src=jnp.asarray(held), dst=host.pages[row, : len(held)]), None)
  return kv_pages.resize(kv, N)


def _sequences(state: State) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Pages (i32[p]) and tokens (i32[n]) of all that is computed: in the slots, and where only an index finds it."""
  table, tokens = jax.tree.map(np.asarray, (state.table, state.requests.tokens))
  rows = np.asarray(state.running)
  for slot in np.flatnonzero(table.seq_lens):
    length = table.seq_lens[slot]
    yield table.pages[slot, : cdiv(length, table.page_size)], tokens[rows[slot], :length]
  if state.index is not None:
    before, contents = np.asarray(state.index.before), np.asarray(state.index.contents)
    cached = np.flatnonzero(before != ABSENT)
    for page in np.setdiff1d(cached, before[cached]).tolist():  # the tails of the chains
      chain = [page]
      while before[chain[0]] >= 0:
        chain.insert(0, int(before[chain[0]]))
      yield np.array(chain), contents[chain].reshape(-1)


def _host(state: EngineState) -> dict[str, Any]:
  """The fields of an engine's state beside the scheduler's state and the pool."""
  names = [field.name for field in dataclasses.fields(state) if field.name not in ("scheduler", "kv")]
  return {name: getattr(state, name) for name in names}


def _delta(old: State, new: State) -> Delta:
  """What it takes to make `new` of `old`."""
  delta: Delta = []
  if jax.tree.structure(old) != jax.tree.structure(new):
    raise ValueError("state is of another structure than the recording's: was it made by another engine?")
  for i, (a, b) in enumerate(zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)):
    if a is b:
      continue
    places, values = np.flatnonzero(_bits(a) != _bits(b)), np.asarray(b)
    if places.size * 2 > values.size:  # most of it: the places would cost more than the values
      delta.append((i, None, values))
    elif places.size:
      delta.append((i, places.astype(np.int32), values.reshape(-1)[places]))
  return delta


def _bits(array: Any) -> np.ndarray:
  """The array's elements, flat, as unsigned integers: equal when the bits are."""
  array = np.ascontiguousarray(array).reshape(-1)
  return array.view(f"u{array.dtype.itemsize}")
