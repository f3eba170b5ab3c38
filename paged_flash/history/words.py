"""What happened, in words and as plain data: the difference of two states, the life of a request, a line per step."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged_flash.cache.page_table import PageTable, cdiv
from paged_flash.state import FINISH_NAMES, LIVE, NOBODY, State, StepPlan

type Planner = Callable[[State], tuple[State, StepPlan]]


class Moment(NamedTuple):
  """One verb with the states around it, whose leaves are NumPy arrays."""

  step: int  # number of the step, from 0; for a verb between two steps, of the later one
  verb: str  # "step", or the engine's verb that was called between two steps
  said: Any  # `Events` of a step; positional and keyword arguments of any other verb
  before: State
  after: State
  host: Mapping[str, Any]  # the other fields of the engine's state, after it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff:
  """What changed between two states. `str` says it in words, `pf.show` draws it."""

  before: PageTable
  after: PageTable
  granted: tuple[int, ...]  # pages that were free and are held
  released: tuple[int, ...]  # pages that were held and are free
  passed: tuple[int, ...]  # pages held by nobody who held them before: let go and granted again, or handed over
  shared: tuple[int, ...]  # pages held more than once, by more than before
  unshared: tuple[int, ...]  # pages held by fewer than before, and still held
  copied: tuple[tuple[int, int], ...]  # (page, its copy): a running sequence got its own, to write to
  merged: tuple[tuple[int, int], ...]  # (page, an equal one): a running sequence gave its own up for one that was there
  queued: tuple[int, ...]  # new requests; some of them may be running already, or ended
  admitted: Mapping[int, int]  # requests that got a slot: id to slot
  preempted: Mapping[int, int]  # requests that lost their slot and wait: id to slot
  ended: Mapping[int, str]  # requests that are over: id to reason; "" when its row serves another by now
  appended: Mapping[int, tuple[int, ...]]  # output tokens that requests got
  computed: Mapping[int, int]  # tokens whose K and V a request got computed or found; fewer than 0: lost

  def __str__(self) -> str:
    lines = []
    for name in ("granted", "released", "passed", "shared", "unshared"):
      if pages := getattr(self, name):
        lines.append(f"pages {name}{' on' if name == 'passed' else ''}: {_ranges(pages)}")
    if self.copied:
      lines.append("pages copied before a write: " + ", ".join(f"{a} to {b}" for a, b in self.copied))
    if self.merged:
      lines.append("pages given up for equal ones: " + ", ".join(f"{a} for {b}" for a, b in self.merged))
    parts = (self.queued, self.admitted, self.preempted, self.ended, self.appended, self.computed)
    for id in sorted({id for part in parts for id in part}):
      said = ["queued"] if id in self.queued else []
      if id in self.admitted:
        said.append(f"admitted into slot {self.admitted[id]}")
      if id in self.preempted:
        said.append(f"preempted, slot {self.preempted[id]} taken away")
      if id in self.appended:
        said.append(f"{_count(len(self.appended[id]), 'token')} appended")
      if self.computed.get(id, 0) > 0:
        said.append(f"K and V of {_count(self.computed[id], 'token')} computed")
      if id in self.ended:
        said.append(f"ended: {self.ended[id]}" if self.ended[id] else "ended and forgotten")
      lines.append(f"request {id}: " + "; ".join(said or [f"K and V of {-self.computed[id]} tokens let go"]))
    return "\n".join(lines) or "nothing changed"


def diff(a: State, b: State) -> Diff:
  """What changed from state `a` to state `b` of the same engine.

  Raises:
    ValueError: the two are not of the same sizes.
  """
  shapes_a, shapes_b = (jax.tree.map(jnp.shape, state) for state in (a, b))
  if shapes_a != shapes_b:
    raise ValueError("a and b must be states of one engine; their arrays have different shapes")
  a, b = jax.tree.map(np.asarray, (a, b))
  old, new = (_Requests(state) for state in (a, b))
  before, after = a.table.ref_counts, b.table.ref_counts
  stays = np.zeros(before.size, bool)  # in a slot that held it before
  for row_a, row_b in zip(a.table.pages, b.table.pages, strict=True):
    stays[np.intersect1d(row_a[row_a >= 0], row_b)] = True
  copied, merged = [], []
  for id in old.slots.keys() & new.slots.keys():
    if old.slots[id] == new.slots[id]:
      rows = (state.table.pages[old.slots[id]].tolist() for state in (a, b))
      for p, q in zip(*rows, strict=True):
        if p != q and min(p, q) >= 0:
          (copied if after[p] and not before[q] else merged).append((p, q))
  ended = {id: FINISH_NAMES[new.finish[id]] for id in new.finish if new.finish[id] and not old.finish.get(id)}
  ended |= {id: "" for id in old.finish if id not in new.finish and not old.finish[id]}
  appended = {id: new.outputs[id][len(old.outputs.get(id, ())) :] for id in new.outputs}
  computed = {id: new.computed.get(id, 0) - old.computed.get(id, 0) for id in old.computed | new.computed}
  return Diff(
    before=a.table,
    after=b.table,
    granted=_where((before == 0) & (after > 0)),
    released=_where((before > 0) & (after == 0)),
    passed=_where((before > 0) & (after > 0) & ~stays),
    shared=_where((after > 1) & (after > before)),
    unshared=_where((after > 0) & (after < before)),
    copied=tuple(sorted(copied)),
    merged=tuple(sorted(merged)),
    queued=tuple(sorted(new.finish.keys() - old.finish.keys())),
    admitted={id: slot for id, slot in sorted(new.slots.items()) if id not in old.slots},
    preempted={
      id: slot for id, slot in sorted(old.slots.items()) if id not in new.slots and new.finish.get(id) == LIVE
    },
    ended=dict(sorted(ended.items())),
    appended={id: tokens for id, tokens in sorted(appended.items()) if tokens},
    computed={id: count for id, count in sorted(computed.items()) if count},
  )


class _Requests:
  """The requests of a state by id."""

  def __init__(self, state: State):
    rows = np.flatnonzero(state.arrival >= 0)
    ids, r = state.arrival, state.requests
    self.finish = {int(ids[row]): int(state.finish[row]) for row in rows}
    lens = zip(rows, r.prompt_lens[rows], r.num_tokens[rows], strict=True)
    self.outputs = {int(ids[row]): tuple(r.tokens[row, start:end].tolist()) for row, start, end in lens}
    self.slots = {int(ids[row]): slot for slot, row in enumerate(state.running.tolist()) if row >= 0}
    self.computed = {id: int(state.table.seq_lens[slot]) for id, slot in self.slots.items()}


def explain(moments: Iterable[Moment], plan: Planner, request: int) -> str:
  """See `Recording.explain`."""
  lines: list[str] = []
  row, life, ended = NOBODY, _Life(), False
  for m in moments:
    if row == NOBODY:
      found = np.flatnonzero(m.after.arrival == request)
      if request < 0 or not found.size:
        continue
      row = int(found[0])
      r = m.after.requests
      lines.append(
        f"request {request}: {_count(r.prompt_lens[row], 'prompt token')}, at most "
        f"{_count(r.max_tokens[row], 'output token')}"
      )
      running = int((m.before.running >= 0).sum())
      ahead = int(m.before.live.sum()) - running, running
      said = [f"{n} {name}" for n, name in zip(ahead, ("waiting", "running"), strict=True) if n]
      lines.append(f"step {m.step}: queued behind {' and '.join(said) or 'nobody'}")
    if m.after.arrival[row] != request:
      break
    if m.verb == "step":
      lines += life.step(m, plan, request, row)
    if m.after.finish[row] != LIVE and not ended:
      ended = True
      out = m.after.requests.num_tokens[row] - m.after.requests.prompt_lens[row]
      pages = life.pages if m.verb == "step" else _held(m.before, row)
      lines.append(
        f"step {m.step}: ended: {FINISH_NAMES[m.after.finish[row]]}, with {_count(out, 'output token')}; "
        f"{_count(pages, 'page')} let go"
      )
  if row == NOBODY:
    raise KeyError(f"request {request} was never in this run")
  return "\n".join(lines)


def _held(state: State, row: int) -> int:
  """Pages of the request in a row; 0 if it waits."""
  return int((state.table.pages[: state.running.size][state.running == row] >= 0).sum())


class _Life:
  """What `explain` remembers of a request between its steps."""

  def __init__(self):
    self.pages = 0  # held in the step
    self._chunks: list[int] = []  # tokens, of the prefill that is going on
    self._waited = [0, 0]  # steps: no free slot; a free slot
    self._preempted = self._paused = 0

  def step(self, m: Moment, plan: Planner, id: int, row: int) -> list[str]:
    """Lines for one step."""
    size, at, lines = m.before.table.page_size, f"step {m.step}: ", []
    before = np.flatnonzero(m.before.running == row)
    if not before.size and id not in m.said.running:  # waiting
      self._waited[0 if NOBODY not in m.said.running else 1] += 1
      self.pages = 0
      return lines
    table, p = jax.tree.map(np.asarray, (plan(m.before)[0].table, plan(m.before)[1]))
    if id in m.said.preempted:
      self._preempted, self._paused, self._chunks, self.pages = self._preempted + 1, 0, [], 0
      cost = f"{_count(m.said.preempted[id], 'computed token')} lost"
      if id in m.said.swapped_out:
        cost = f"swapped: {_count(m.said.swapped_out[id], 'page')} copied to host memory"
      lines.append(f"{at}preempted, because {_need(m.before)}; {cost}")
      return lines
    slot = int(np.flatnonzero(p.rows == row)[0])
    start, count, total = int(p.starts[slot]), int(p.scheduled[slot]), int(m.before.requests.num_tokens[row])
    self.pages = int((table.pages[slot] >= 0).sum())
    if not before.size:
      verb = "resumed in" if self._preempted else "admitted into"
      pages = table.pages[slot, : cdiv(start, size)]
      back = m.said.swapped_in.get(id, 0)
      refs = table.ref_counts[pages[pages >= 0][: (pages >= 0).sum() - back]]
      found = [_count((refs > 1).sum(), "shared page")] if (refs > 1).any() else []
      found += [_count((refs == 1).sum(), "cached page")] if (refs == 1).any() else []
      found += [f"{_count(back, 'page')} copied back from host memory"] if back else []
      shares = f" with {' and '.join(found)} ({_count(start, 'token')} not computed)" if start else ""
      again = " again" if self._preempted else ""
      lines.append(f"{at}{verb} slot {slot}{shares}, {_count(total - start, 'token')} to compute{again}{self._wait()}")
    if p.copies.dst[slot] >= 0:
      lines.append(
        f"{at}page {p.copies.src[slot]} copied to {p.copies.dst[slot]}, because it is shared and written next"
      )
    if count == 0:
      if not self._paused:
        lines.append(f"{at}paused, because {_need(m.before)}")
      self._paused += 1
      return lines
    if self._paused:
      lines.append(f"{at}goes on after {_count(self._paused, 'paused step')}")
      self._paused = 0
    if start + count < total or not before.size or self._chunks:
      self._chunks.append(count)
      if start + count == total:
        shown = " + ".join(map(str, self._chunks[:8])) + (" + ..." if len(self._chunks) > 8 else "")
        sizes = f" ({shown} tokens)" if len(self._chunks) > 1 else ""
        first = "first token" if total == m.before.requests.prompt_lens[row] else "next token"
        what = "prefilled" if first == "first token" else "recomputed"
        lines.append(f"{at}{what} in {_count(len(self._chunks), 'chunk')}{sizes}, {first}")
        self._chunks = []
    return lines

  def _wait(self) -> str:
    full, short = self._waited
    self._waited = [0, 0]
    why = [f"{_count(full, 'step')} without a free slot"] if full else []
    why += [f"{_count(short, 'step')} without the pages or the token budget"] if short else []
    return f", after {' and '.join(why)}" if why else ""


def _need(state: State) -> str:
  """Why a pool was too small, in a state as a step found it."""
  table, rows = state.table, state.running
  slots = np.flatnonzero(rows >= 0)
  lens, total = table.seq_lens[slots], state.requests.num_tokens[rows[slots]]
  last = table.pages[slots, np.maximum(cdiv(lens, table.page_size) - 1, 0)]
  copies = (lens % table.page_size > 0) & (table.ref_counts[last] > 1) & (total > lens)
  need = int((cdiv(total, table.page_size) - cdiv(lens, table.page_size) + copies).sum())
  free = int((table.ref_counts == 0).sum())
  return f"{_count(free, 'page')} {_are(free)} free and the {slots.size} running requests needed {need}"


def records(moments: Iterable[Moment], plan: Planner) -> list[dict[str, Any]]:
  """See `Recording.records`."""
  out = []
  for m in moments:
    if m.verb != "step":
      continue
    p = jax.tree.map(np.asarray, plan(m.before)[1])
    total = m.before.requests.num_tokens[p.rows]
    again = total > m.before.requests.prompt_lens[p.rows]  # its prompt had been computed before
    decodes = (p.starts + 1 == total) & (p.rows == m.before.running)
    did = np.where(decodes, "decode", np.where(again, "recompute", "prefill"))
    did = np.where(p.scheduled > 0, did, np.where(p.rows >= 0, "paused", ""))
    did = np.where(p.preempted >= 0, "preempted", did)
    out.append(
      dict(
        held=m.said.pages_held,
        shared=m.said.pages_shared,
        cached=m.said.pages_cached,
        waiting=m.said.num_waiting,
        preempted=len(m.said.preempted),
        slots=np.where(p.preempted >= 0, p.preempted, np.array(m.said.running)).tolist(),
        did=did.tolist(),
      )
    )
  return out


def _where(mask: Any) -> tuple[int, ...]:
  return tuple(np.flatnonzero(mask).tolist())


def _count(number: Any, what: str) -> str:
  return f"{number} {what}{'' if number == 1 else 's'}"


def _are(number: int) -> str:
  return "was" if number == 1 else "were"


def _ranges(numbers: Iterable[int]) -> str:
  """Sorted numbers in short: 0 to 3, 7."""
  runs: list[list[int]] = []
  for n in numbers:
    if runs and n == runs[-1][1] + 1:
      runs[-1][1] = n
    else:
      runs.append([n, n])
  return ", ".join(str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a} to {b}" for a, b in runs)
