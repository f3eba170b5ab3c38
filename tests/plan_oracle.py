"""What a step must decide, by lists and dictionaries: who runs, what is found, granted, evicted and preempted.

Slow and plain, as `scheduler.plan` and `prefix` are told in words. It reads the state that a step starts from, and
remembers by itself which page holds which prefix and in which order pages were given back.
"""

import copy
import functools

import jax
import numpy as np

from paged_flash.state import LIVE, NOBODY

jitted = functools.cache(jax.jit)


def up(a: int, b: int) -> int:
  return -(-a // b)


class Oracle:
  def __init__(self, page_size: int, token_budget: int, chunk_size: int | None, policy, cache: bool):
    self.size, self.budget, self.policy, self.cache = page_size, token_budget, jitted(policy), cache
    self.chunk = min(chunk_size or token_budget, token_budget)
    self.library: dict[tuple, int] = {}  # (tenant, *tokens up to a page's end) -> the page
    self.freed: list[int] = []  # pages given back, the first to be evicted first

  def copy(self) -> "Oracle":
    new = copy.copy(self)
    new.library, new.freed = dict(self.library), list(self.freed)
    return new

  def read(self, state):
    """The state as Python values."""
    table, requests = state.table, state.requests
    self.pages = [[p for p in row if p >= 0] for row in np.asarray(table.pages).tolist()]  # of each slot
    self.lens, self.refs = np.asarray(table.seq_lens).tolist(), np.asarray(table.ref_counts).tolist()
    self.running = np.asarray(state.running).tolist()
    self.tokens = np.asarray(requests.tokens).tolist()
    names = ("num_tokens", "prompt_lens", "tenant", "group")
    self.num_tokens, self.prompts, self.tenant, self.group = (np.asarray(getattr(requests, n)).tolist() for n in names)
    self.arrival = np.asarray(state.arrival).tolist()
    self.live = [
      a != NOBODY and f == LIVE for a, f in zip(self.arrival, np.asarray(state.finish).tolist(), strict=True)
    ]
    self.rank = np.asarray(self.policy(state)).tolist()

  def key(self, row: int, end: int) -> tuple:
    return (self.tenant[row], *self.tokens[row][:end])

  def fellow(self, row: int) -> int:
    """Row of the first sample of the request's prompt, or nobody."""
    first = self.group[row]
    return first if first >= 0 and self.arrival[first] <= self.arrival[row] else NOBODY

  def found(self, row: int) -> tuple[list[int], int]:
    """Pages that hold what a waiting request starts with, and how many of its tokens."""
    pages = []
    while (len(pages) + 1) * self.size < self.num_tokens[row]:  # the last token is computed in any case
      page = self.library.get(self.key(row, (len(pages) + 1) * self.size))
      if page is None:
        break
      pages.append(page)
    there, wanted = len(pages) * self.size, self.prompts[row] - 1
    for slot, other in enumerate(self.running):  # another sample has computed the prompt
      if other != NOBODY and self.fellow(other) == self.fellow(row) != NOBODY and self.lens[slot] > wanted > there:
        return self.pages[slot][: up(wanted, self.size)], wanted
    return pages, there

  def plan(self, state) -> dict:
    """What the next step of a state must be: lists over the slots."""
    self.read(state)
    S, size, refs = len(self.running), self.size, self.refs
    free = refs.count(0)

    def order(row):
      return self.rank[row], self.arrival[row]

    def held_until(row):  # its first fellow is about to compute the prompt for it
      first = self.fellow(row)
      return first not in (NOBODY, row) and self.live[first] and self.num_tokens[first] == self.prompts[first]

    rows, computed, take, copies = [NOBODY] * S, [0] * S, [0] * S, [False] * S
    pages: list[list[int]] = [[] for _ in range(S)]
    queue = [r for r, live in enumerate(self.live) if live and r not in self.running and not held_until(r)]
    queue.sort(key=order)
    runs = sorted((s for s in range(S) if self.running[s] != NOBODY), key=lambda s: order(self.running[s]))
    waits = []
    for slot in range(S):
      if self.running[slot] != NOBODY:
        rows[slot], pages[slot], computed[slot] = self.running[slot], self.pages[slot], self.lens[slot]
      elif queue:
        waits.append(slot)
        rows[slot] = queue.pop(0)
        pages[slot], computed[slot] = self.found(rows[slot])

    # Tokens: one for each that decodes, then prompts in order.
    left = self.budget
    rest = [self.num_tokens[row] - n if row != NOBODY else 0 for row, n in zip(rows, computed, strict=True)]
    for slot in runs:
      if rest[slot] == 1:
        take[slot], left = 1, left - 1
    for slot in runs + waits:
      if not take[slot]:
        take[slot] = min(rest[slot], self.chunk, left)
        left -= take[slot]

    def grown(slot, tokens):
      extra = copies[slot] and tokens > 0
      return up(computed[slot] + tokens, size) - up(computed[slot], size) + extra

    for slot in runs + waits:
      part_full = computed[slot] % size > 0
      copies[slot] = part_full and (slot in waits or refs[pages[slot][-1]] > 1)

    # Admission: in order, while everything that is known to be needed fits.
    starved = sum(grown(slot, take[slot]) for slot in runs) > free
    spoken = sum(grown(slot, rest[slot]) for slot in runs)
    admitted = []
    for slot in waits if not starved else []:
      spoken += grown(slot, rest[slot] + 1) + sum(refs[p] == 0 for p in pages[slot])
      spoken += copies[slot] and refs[pages[slot][-1]] == 1  # its only holder so far will have to copy it too
      if take[slot] == 0 or spoken > free:
        break
      admitted.append(slot)

    # Preemption: the most of the first that can be served with what is free and what only later ones hold.
    def only(slots):
      names = [p for s in slots for p in pages[s]]
      return sum(names.count(p) == refs[p] for p in set(names))

    served, kept = len(runs), len(runs)
    if starved:
      spent = [sum(grown(s, take[s]) for s in runs[:m]) for m in range(len(runs) + 1)]
      served = max(m for m in range(len(runs) + 1) if spent[m] <= free + only(runs[m:]))
      kept = served + (served < len(runs) and spent[served] <= free + only(runs[served + 1 :]))
    doomed = NOBODY
    if runs and not served:
      doomed = rows[runs[0]]
    if (
      not runs
      and waits
      and not admitted
      and grown(waits[0], rest[waits[0]] + 1) > free - sum(refs[p] == 0 for p in pages[waits[0]])
    ):
      doomed = rows[waits[0]]
    victims = runs[kept:]
    for slot in range(S):
      if slot not in runs[:served] and slot not in admitted:
        take[slot] = 0

    # Pages: those of victims come back, the found are taken, the longest free of the library go if it must be.
    refs = list(refs)
    for slot in victims:
      for p in pages[slot]:
        refs[p] -= 1
    self.give_back([pages[slot] for slot in victims], refs)
    for slot in admitted:
      for p in pages[slot]:
        refs[p] += 1
    copies = [computed[s] % size > 0 and refs[pages[s][-1]] > 1 for s in range(S)]
    need = sum(grown(slot, take[slot]) for slot in range(S))
    known = set(self.library.values())
    short = need - sum(count == 0 and p not in known for p, count in enumerate(refs))
    gone = set([p for p in self.freed if p in known and refs[p] == 0][: max(short, 0)])
    self.library = {key: p for key, p in self.library.items() if p not in gone}

    stay = set(runs[:kept]) | set(admitted)
    return dict(
      rows=[rows[s] if s in stay else NOBODY for s in range(S)],
      starts=[computed[s] if s in stay else 0 for s in range(S)],
      scheduled=take,
      cached=[computed[s] if s in admitted else 0 for s in range(S)],
      admitted=[s in admitted for s in range(S)],
      preempted=[self.arrival[rows[s]] if s in victims else NOBODY for s in range(S)],
      lost=[computed[s] if s in victims else 0 for s in range(S)],
      doomed=doomed,
      library=set(self.library.values()),
    )

  def commit(self, planned, plan, after) -> None:
    """Takes in what a step filled and gave back: from the state that `plan` returned to the one after the commit."""
    self.read(planned)
    for slot, row in enumerate(np.asarray(plan.rows).tolist()):
      start, count = int(plan.starts[slot]), int(plan.scheduled[slot])
      for place in range(start // self.size, (start + count) // self.size):
        key = self.key(row, (place + 1) * self.size)
        if self.cache and (place == 0 or key[: -self.size] in self.library):
          self.pages[slot][place] = self.library.setdefault(key, self.pages[slot][place])
    ended = np.asarray(after.running) == NOBODY
    self.give_back([self.pages[slot] for slot in np.flatnonzero(ended)], np.asarray(after.table.ref_counts).tolist())

  def cancel(self, before, after) -> None:
    self.read(before)
    self.give_back(self.pages, np.asarray(after.table.ref_counts).tolist())

  def give_back(self, rows: list[list[int]], refs: list[int]) -> None:
    """Queues the pages of sequences that nobody holds any more, tails first."""
    for place in range(max(map(len, rows), default=0) - 1, -1, -1):
      for pages in rows:
        if place < len(pages) and refs[pages[place]] == 0:
          if pages[place] in self.freed:
            self.freed.remove(pages[place])
          self.freed.append(pages[place])
