"""What a step must decide, by lists and dictionaries: who runs, what is found, granted, evicted, preempted, swapped.

Slow and plain, as `scheduler.plan`, `prefix`, `swapping` and `speculation` are told in words. It reads the state that a
step starts from, and remembers by itself which page holds which prefix and in which order pages were given back.
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
  def __init__(self, page_size: int, token_budget: int, chunk_size: int | None, policy, cache: bool, preemption):
    self.size, self.budget, self.policy, self.cache = page_size, token_budget, jitted(policy), cache
    self.preemption = preemption
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
    names = ("num_tokens", "prompt_lens", "tenant", "group", "min_tokens", "max_tokens", "stop_ids")
    self.num_tokens, self.prompts, self.tenant, self.group, self.least, self.most, self.stops = (
      np.asarray(getattr(requests, n)).tolist() for n in names
    )
    host = state.host
    self.stored = [0] * len(self.num_tokens) if host is None else np.asarray(host.seq_lens).tolist()  # of each request
    self.host_pages = [] if host is None else [[p for p in row if p >= 0] for row in np.asarray(host.pages).tolist()]
    self.host_free = 0 if host is None else int((np.asarray(host.ref_counts) == 0).sum())
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
    """Pages of the pool that hold what a waiting request starts with, and how many of its tokens."""
    pages = []
    while (len(pages) + 1) * self.size < self.num_tokens[row]:  # the last token is computed in any case
      page = self.library.get(self.key(row, (len(pages) + 1) * self.size))
      if page is None:
        break
      pages.append(page)
    there, wanted = len(pages) * self.size, self.prompts[row] - 1
    most = max(there, self.stored[row])
    for slot, other in enumerate(self.running):  # another sample has computed the prompt
      if other != NOBODY and self.fellow(other) == self.fellow(row) != NOBODY and self.lens[slot] > wanted > most:
        return self.pages[slot][: up(wanted, self.size)], wanted
    return pages, there

  def plan(self, state, proposals: list[list[int]]) -> dict:
    """What the next step of a state must be: lists over the slots; `proposals` are what may follow in each."""
    self.read(state)
    S, size, refs = len(self.running), self.size, self.refs
    free = refs.count(0)

    def order(row):
      return self.rank[row], self.arrival[row]

    def held_until(row):  # its first fellow is about to compute the prompt for it
      first = self.fellow(row)
      return first not in (NOBODY, row) and self.live[first] and self.num_tokens[first] == self.prompts[first]

    rows, take, copies = [NOBODY] * S, [0] * S, [False] * S
    there, computed = [0] * S, [0] * S  # tokens in pages of the pool, and those in host memory too
    pages: list[list[int]] = [[] for _ in range(S)]
    queue = [r for r, live in enumerate(self.live) if live and r not in self.running and not held_until(r)]
    queue.sort(key=order)
    runs = sorted((s for s in range(S) if self.running[s] != NOBODY), key=lambda s: order(self.running[s]))
    waits = []
    for slot in range(S):
      if self.running[slot] != NOBODY:
        rows[slot], pages[slot], there[slot] = self.running[slot], self.pages[slot], self.lens[slot]
        computed[slot] = there[slot]
      elif queue:
        waits.append(slot)
        rows[slot] = queue.pop(0)
        pages[slot], there[slot] = self.found(rows[slot])
        computed[slot] = max(there[slot], self.stored[rows[slot]])

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
      return up(computed[slot] + tokens, size) - up(there[slot], size) + extra

    for slot in runs + waits:
      part_full = there[slot] % size > 0
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

    # Victims go to host memory, those in the first rows first, until one does not fit.
    out: dict[int, list[int]] = {}
    room = self.host_free
    for slot in sorted(victims, key=lambda s: rows[s]):
      if self.host_pages and self.preemption(np.array([computed[slot]]), np.array([len(pages[slot])]))[0]:
        room -= len(pages[slot])
        if room >= 0:
          out[slot] = pages[slot]
    back = {
      s: self.host_pages[rows[s]][up(there[s], size) : up(computed[s], size)] for s in admitted if self.host_pages
    }
    stored = [0 if r in [rows[s] for s in admitted] else n for r, n in enumerate(self.stored)]
    for slot in out:
      stored[rows[slot]] = computed[slot]

    # Pages: those of victims come back, the found are taken, the longest free of the library go if it must be.
    refs = list(refs)
    for slot in victims:
      for p in pages[slot]:
        refs[p] -= 1
    self.give_back([pages[slot] for slot in victims], refs)
    for slot in admitted:
      for p in pages[slot]:
        refs[p] += 1
    copies = [there[s] % size > 0 and refs[pages[s][-1]] > 1 for s in range(S)]
    stay = set(runs[:kept]) | set(admitted)
    spare = refs.count(0) - sum(grown(slot, take[slot]) for slot in stay)
    guessed = [0] * S
    if max(take) <= 1 and not any(back.values()):
      left = self.budget - sum(take)
      for slot in sorted(runs[:served]):
        if rest[slot] == 1:
          guessed[slot], left, spare = self.guessed(slot, proposals[slot], left, spare)
    take = [a + b for a, b in zip(take, guessed, strict=True)]
    need = sum(grown(slot, take[slot]) for slot in stay)
    known = set(self.library.values())
    short = need - sum(count == 0 and p not in known for p, count in enumerate(refs))
    gone = set([p for p in self.freed if p in known and refs[p] == 0][: max(short, 0)])
    self.library = {key: p for key, p in self.library.items() if p not in gone}

    return dict(
      rows=[rows[s] if s in stay else NOBODY for s in range(S)],
      starts=[computed[s] if s in stay else 0 for s in range(S)],
      scheduled=take,
      num_proposed=guessed,
      cached=[computed[s] if s in admitted else 0 for s in range(S)],
      admitted=[s in admitted for s in range(S)],
      preempted=[self.arrival[rows[s]] if s in victims else NOBODY for s in range(S)],
      lost=[computed[s] if s in victims and s not in out else 0 for s in range(S)],
      doomed=doomed,
      library=set(self.library.values()),
      swap_out=[out.get(s, []) for s in range(S)],  # pages of the pool
      swap_in=[back.get(s, []) for s in range(S)],  # host pages
      stored=stored,
    )

  def guessed(self, slot: int, proposal: list[int], left: int, spare: int) -> tuple[int, int, int]:
    """How many proposed tokens a decoding slot gets, and what it leaves of the budget and of the free pages."""
    row, size = self.running[slot], self.size
    count = (proposal + [NOBODY]).index(NOBODY)
    count = min(count, self.prompts[row] + self.most[row] - self.num_tokens[row] - 1, left)
    left -= count
    inside = -(self.lens[slot] + 1) % size
    spare -= up(max(count - inside, 0), size)
    return (count if spare >= 0 else min(count, inside)), left, spare

  def commit(self, planned, plan, tokens: list[list[int]], after) -> list[int]:
    """Takes in what a step filled and gave back: from the state that `plan` returned to the one after the commit.

    Returns:
      How many of its `tokens` each slot gets.
    """
    self.read(planned)
    counts = [0] * len(self.running)
    for slot, row in enumerate(np.asarray(plan.rows).tolist()):
      start, scheduled, guessed = (int(a[slot]) for a in (plan.starts, plan.scheduled, plan.num_proposed))
      if row != NOBODY and scheduled and start + scheduled - guessed == self.num_tokens[row]:
        counts[slot] = self.accepted(row, np.asarray(plan.proposed)[slot, :guessed].tolist(), tokens[slot])
        self.tokens[row][self.num_tokens[row] : self.num_tokens[row] + counts[slot]] = tokens[slot][: counts[slot]]
      end = start + scheduled - (guessed + 1 - counts[slot] if guessed else 0)
      for place in range(start // self.size, end // self.size):
        key, pages = self.key(row, (place + 1) * self.size), self.pages[slot]
        if self.cache and (place == 0 or self.library.get(key[: -self.size]) == pages[place - 1]):
          pages[place] = self.library.setdefault(key, pages[place])
    ended = np.asarray(after.running) == NOBODY
    self.give_back([self.pages[slot] for slot in np.flatnonzero(ended)], np.asarray(after.table.ref_counts).tolist())
    return counts

  def accepted(self, row: int, proposed: list[int], tokens: list[int]) -> int:
    """How many of the tokens drawn are a request's: the one due, those after right guesses, none after its end."""
    for k, token in enumerate(tokens):
      number = self.num_tokens[row] - self.prompts[row] + k + 1
      ends = number >= self.most[row] or (token in self.stops[row] and number >= self.least[row])
      if ends or k == len(proposed) or proposed[k] != token:
        return k + 1
    raise AssertionError("no token is drawn after the last guess")

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
