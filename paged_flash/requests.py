"""What users ask for and what they get: parameters, events, completions, stop strings."""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged_flash.models import Tokenizer
from paged_flash.sampling import Sampling
from paged_flash.state import FINISH_NAMES, LIVE, NOBODY, NUM_STOP_IDS, STOP, Requests, StepEvents

type Prompt = str | Sequence[int] | Sequence[dict[str, str]]  # text, token ids, or chat messages (role, content)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Params:
  """How one request is to be served."""

  max_tokens: int = 64  # output tokens at most; less where the slot or the pool ends first
  min_tokens: int = 0  # output tokens before anything may stop it
  temperature: float = 0.0  # 0 is greedy
  top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
  top_p: float = 1.0  # then keep the likeliest tokens with this mass
  seed: int = 0  # the same seed gives the same tokens, whoever shares the batch
  stop: Sequence[str] = ()  # strings that end it; its text ends before them
  stop_ids: Sequence[int] = ()  # token ids that end it, beside the model's own
  ignore_eos: bool = False  # the model's own end tokens do not end it
  tenant: int = 0  # whose: pages are shared among requests of one tenant (or adapter) only
  priority: int = 0  # for `policies.by_priority`: the smaller, the sooner

  def check(self) -> None:
    """Raises ValueError for a value out of range."""
    for name, good, wanted in (
      ("max_tokens", self.max_tokens >= 1, "at least 1"),
      ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"in 0..max_tokens={self.max_tokens}"),
      ("temperature", 0 <= self.temperature < math.inf, "finite and at least 0"),
      ("top_k", 0 <= self.top_k < 2**31, "at least 0"),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
      ("seed", 0 <= self.seed < 2**32, "in 0..2**32-1"),
      ("tenant", 0 <= self.tenant < 2**31 - 2, "in 0..2**31-3"),
      ("priority", -(2**31) <= self.priority < 2**31, "in -2**31..2**31-1"),
      (
        "stop",
        not isinstance(self.stop, str) and all(isinstance(s, str) and s for s in self.stop),
        "non-empty strings",
      ),
    ):
      if not good:
        raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """What became of one request."""

  prompt_ids: tuple[int, ...]
  output_ids: tuple[int, ...]
  logprobs: tuple[float, ...]  # natural log, one per output token
  text: str  # the output without its stop; "" for a model without a tokenizer
  finish: str  # "stop", "length", or "error"
  error: str = ""  # what was wrong with the request
  first_token_s: float = math.nan  # seconds from the start of the run to the first token
  end_s: float = math.nan  # seconds from the start of the run to the last


class Event(NamedTuple):
  """One token for one request."""

  request: int
  token: int
  done: bool
  logprob: float
  finish: str  # "", or why it ended with this token: "stop" or "length"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Events:
  """What one step did. Iterates over its `Event`s."""

  tokens: tuple[Event, ...]
  ended: tuple[int, ...]  # requests that ended without a token, because the pool can never hold them
  admitted: Mapping[int, int]  # requests that got a slot, with the tokens that they need not compute
  preempted: Mapping[int, int]  # requests that lost their slot, with the tokens that they must compute again
  swapped_out: Mapping[int, int]  # those of them that went to host memory instead, with the pages copied
  swapped_in: Mapping[int, int]  # admitted requests that came back from there, with the pages copied
  proposed: Mapping[int, int]  # requests for which tokens were proposed (`speculation`), and how many
  accepted: Mapping[int, int]  # how many of these they got: tokens beyond the one that was due
  cut: Mapping[int, tuple[int, ...]]  # tokens computed after a stop string and thrown away
  num_scheduled: int  # tokens computed
  running: tuple[int, ...]  # the request in each slot; -1 for an empty slot
  num_waiting: int
  pages_held: int  # pages with a ref count above 0
  pages_shared: int  # of these, held more than once
  pages_saved: int  # pages that would be held beside them if nothing were shared
  pages_cached: int  # pages that nobody holds, but that can be found again
  tokens_held: int  # tokens of K and V in all slots; a shared one counts for each

  @property
  def num_running(self) -> int:
    """Slots in use."""
    return sum(id >= 0 for id in self.running)

  def renamed(self, names: Mapping[int, int]) -> "Events":
    """The same with other names for the requests; -1 stays."""
    names = {-1: -1, **names}
    return dataclasses.replace(
      self,
      tokens=tuple(event._replace(request=names[event.request]) for event in self.tokens),
      running=tuple(names[id] for id in self.running),
      ended=tuple(names[id] for id in self.ended),
      admitted={names[id]: n for id, n in self.admitted.items()},
      preempted={names[id]: n for id, n in self.preempted.items()},
      proposed={names[id]: n for id, n in self.proposed.items()},
      accepted={names[id]: n for id, n in self.accepted.items()},
      cut={names[id]: ids for id, ids in self.cut.items()},
      swapped_out={names[id]: n for id, n in self.swapped_out.items()},
      swapped_in={names[id]: n for id, n in self.swapped_in.items()},
    )

  def __iter__(self) -> Iterator[Event]:
    return iter(self.tokens)

  def __len__(self) -> int:
    return len(self.tokens)


class StopWatch(NamedTuple):
  """Looks for the stop strings of one request. A value, like all state."""

  strings: tuple[str, ...]
  min_tokens: int
  num_tokens: int = 0  # output tokens so far
  tail: tuple[int, ...] = ()  # the last of them, enough to hold any of the strings

  def push(self, token: int, tokenizer: Tokenizer) -> tuple["StopWatch", bool]:
    """The watch after one more token, and whether a stop string is there."""
    longest = max(len(s.encode()) for s in self.strings)
    tail = (*self.tail, token)[-longest - 4 :]  # a token is at least a byte
    watch = self._replace(num_tokens=self.num_tokens + 1, tail=tail)
    text = tokenizer.decode(tail)
    return watch, watch.num_tokens >= self.min_tokens and any(s in text for s in self.strings)


class Transcript:
  """Gathers the tokens of one request into a `Completion`, and its text as it becomes safe to show."""

  def __init__(self, prompt_ids: Sequence[int], params: Params, tokenizer: Tokenizer | None):
    self._prompt_ids, self._params = tuple(prompt_ids), params
    self._stream = tokenizer.stream() if tokenizer is not None else None
    self._ids: list[int] = []
    self._logprobs: list[float] = []
    self._text = ""
    self._shown = 0  # characters of the text handed out
    self._first = math.nan

  def push(self, event: Event, now: float) -> str:
    """Takes a token; returns the text to show now. What may be the start of a stop string is held back."""
    self._first = now if not self._ids else self._first
    self._ids.append(event.token)
    self._logprobs.append(event.logprob)
    if self._stream is None:
      return ""
    if not (event.finish == "stop" and event.token in self._params.stop_ids):
      self._text += self._stream.push(event.token)
    if event.done:
      self._text += self._stream.flush()
      if event.finish == "stop" and event.token not in self._params.stop_ids:
        cuts = [at for s in self._params.stop if (at := self._text.find(s, self._shown)) >= 0]
        self._text = self._text[: min(cuts, default=len(self._text))]
      end = len(self._text)
    else:
      held = max((len(s) - 1 for s in self._params.stop), default=0)
      end = max(self._shown, len(self._text) - held)
    new, self._shown = self._text[self._shown : end], end
    return new

  def completion(self, finish: str, now: float) -> Completion:
    return Completion(
      prompt_ids=self._prompt_ids,
      output_ids=tuple(self._ids),
      logprobs=tuple(self._logprobs),
      text=self._text,
      finish=finish,
      first_token_s=self._first,
      end_s=now,
    )


class Counter:
  """Where the requests of one closed loop are handed in and their completions handed out."""

  def __init__(self, tokenizer: Tokenizer | None, on_text: Callable[[int, str], None] | None):
    self.live: dict[int, Transcript] = {}  # by id
    self.done: dict[int, Completion] = {}  # by index
    self.names: dict[int, int] = {}  # id to index
    self.num_tokens = 0
    self._tokenizer, self._on_text = tokenizer, on_text

  def refuse(self, index: int, error: str) -> None:
    """Ends a request that was not good."""
    self.done[index] = Completion(prompt_ids=(), output_ids=(), logprobs=(), text="", finish="error", error=error)

  def open(self, id: int, index: int, prompt_ids: Sequence[int], params: Params) -> None:
    """A request is in the engine."""
    self.live[id], self.names[id] = Transcript(prompt_ids, params, self._tokenizer), index

  def take(self, events: Events, clock: float) -> None:
    """Takes in one step, `clock` seconds after the start."""
    for event in events:
      text = self.live[event.request].push(event, clock)
      if text and self._on_text:
        self._on_text(self.names[event.request], text)
    ends = [(event.request, event.finish) for event in events if event.done]
    ends += [(id, "length") for id in events.ended if id in self.live]
    for id, finish in ends:
      self.done[self.names[id]] = self.live.pop(id).completion(finish, clock)
    self.num_tokens += len(events)


def rows(
  batch: Sequence[tuple[Sequence[int], Params]], size: int, max_seq_len: int, *, samples: bool = False
) -> Requests:
  """Requests as arrays for `scheduler.submit`.

  Args:
    batch: prompt ids with their parameters.
    size: B, rows to make; those past the batch hold no request.
    max_seq_len: C, tokens kept per request.
    samples: they are samples of one prompt, which the first computes for all.
  """

  def column(values, dtype, rest):
    return np.array([*values, *[rest] * (size - len(batch))], dtype)

  tokens = np.zeros((size, max_seq_len), np.int32)
  stop_ids = np.full((size, NUM_STOP_IDS), NOBODY, np.int32)
  for i, (ids, params) in enumerate(batch):
    tokens[i, : len(ids)] = ids
    stop_ids[i, : len(params.stop_ids)] = params.stop_ids
  params = [params for _, params in batch]
  lens = column([len(ids) for ids, _ in batch], np.int32, 0)
  columns = dict(
    tokens=tokens,
    prompt_lens=lens,
    num_tokens=lens,
    min_tokens=column([p.min_tokens for p in params], np.int32, 0),
    max_tokens=column([p.max_tokens for p in params], np.int32, 1),
    stop_ids=stop_ids,
    tenant=column([p.tenant for p in params], np.int32, 0),
    priority=column([p.priority for p in params], np.int32, 0),
    group=column([0 if samples else NOBODY] * len(batch), np.int32, NOBODY),
  )
  draw = dict(
    temperature=column([p.temperature for p in params], np.float32, 0),
    top_k=column([p.top_k for p in params], np.int32, 0),
    top_p=column([p.top_p for p in params], np.float32, 1),
    seed=column([p.seed for p in params], np.uint32, 0),
  )
  columns, draw = jax.tree.map(jnp.asarray, (columns, draw))
  return Requests(**columns, sampling=Sampling(**draw))


def encode(prompt: Any, tokenizer: Tokenizer | None) -> list[int]:
  """Token ids of a `Prompt`: text, token ids, or chat messages (through the chat template).

  Raises:
    ValueError: it is none of these, or the model has no tokenizer or template for it.
  """
  parts = [prompt] if isinstance(prompt, str | Mapping) else prompt
  try:
    words = [part for part in parts if isinstance(part, str | Mapping)]
    ids = [operator.index(part) for part in parts if not isinstance(part, str | Mapping)]
  except TypeError:
    raise ValueError(f"a prompt must be text, token ids or chat messages, got {prompt!r:.80}") from None
  if not words:
    return ids
  if tokenizer is None:
    raise ValueError(f"a prompt of text needs a tokenizer, and this model has none; got {prompt!r:.80}")
  if isinstance(prompt, str):
    return [*tokenizer.prefix_ids, *tokenizer.encode(prompt)]
  messages = [word for word in words if isinstance(word, Mapping)]
  if ids or len(messages) < len(words):
    raise ValueError(f"a prompt must be text, token ids or chat messages, not a mixture, got {prompt!r:.80}")
  return tokenizer.encode(tokenizer.apply_chat_template(messages))


def checked(
  prompt_ids: Sequence[int], params: Params, *, vocab_size: int, tokenizer: Tokenizer | None, limit: int, why: str
) -> tuple[list[int], Params]:
  """The prompt as a list, and the parameters with the model's end tokens in and `max_tokens` cut to the room.

  Args:
    prompt_ids: token ids.
    params: as the user gave them.
    vocab_size: ids run below it.
    tokenizer: of the model.
    limit: tokens that a request may have, prompt and output.
    why: where the limit comes from, for the error.

  Raises:
    ValueError: the prompt is empty, too long, or holds an id outside the vocabulary; a parameter is out of range.
  """
  params.check()
  try:
    ids = [operator.index(i) for i in prompt_ids]
  except TypeError:
    raise ValueError(f"prompt_ids must be token ids (integers), got {prompt_ids!r:.80}") from None
  if not ids:
    raise ValueError("prompt_ids must hold at least one token, got none")
  bad = [i for i in (*ids, *params.stop_ids) if not 0 <= i < vocab_size]
  if bad:
    raise ValueError(f"token ids must be in 0..{vocab_size - 1}, got {bad[:5]}")
  if len(ids) >= limit:
    raise ValueError(f"prompt_ids must leave room for a token: at most {limit - 1} tokens ({why}), got {len(ids)}")
  if params.stop and tokenizer is None:
    raise ValueError(f"stop strings need a tokenizer, and this model has none; got stop={params.stop!r}")
  eos_ids = () if params.ignore_eos or tokenizer is None else tokenizer.eos_ids
  stop_ids = tuple(dict.fromkeys((*params.stop_ids, *eos_ids)))
  if len(stop_ids) > NUM_STOP_IDS:
    raise ValueError(f"stop_ids must be at most {NUM_STOP_IDS}, the model's end tokens included, got {stop_ids}")
  return ids, dataclasses.replace(params, stop_ids=stop_ids, max_tokens=min(params.max_tokens, limit - len(ids)))


def for_host(
  steps: Sequence[StepEvents], stops: Mapping[int, StopWatch], tokenizer: Tokenizer | None
) -> tuple[list[Events], dict[int, StopWatch], dict[int, int]]:
  """Events of several steps, cut where a stop string appears.

  Args:
    steps: numpy arrays, one `StepEvents` a step.
    stops: watches of the requests that have stop strings.
    tokenizer: reads them.

  Returns:
    events: one `Events` a step.
    stops: the watches after it, of the requests still live.
    cuts: requests that a stop string ended, and the output tokens that they keep.
  """
  stops, cuts, out = dict(stops), {}, []
  for step in steps:
    tokens = []
    cut: dict[int, tuple[int, ...]] = {}
    for slot in np.flatnonzero(step.ids >= 0):
      id, count = int(step.ids[slot]), int(step.counts[slot])
      for k in range(count):
        token, finish = int(step.tokens[slot, k]), int(step.finish[slot]) if k + 1 == count else LIVE
        if id in cuts:
          cut[id] = (*cut.get(id, ()), token)
          continue
        if id in stops and tokenizer is not None:
          stops[id], found = stops[id].push(token, tokenizer)
          if found and finish != STOP:
            finish, cuts[id] = STOP, stops[id].num_tokens
        if finish != LIVE:
          stops.pop(id, None)
        tokens.append(Event(id, token, finish != LIVE, float(step.logprobs[slot, k]), FINISH_NAMES[finish]))
    ended = () if step.ended < 0 else (int(step.ended),)
    for id in ended:
      stops.pop(id, None)
    guessed = np.where(step.proposed > 0, step.ids, NOBODY)
    counts = ("num_scheduled", "num_waiting", "tokens_held")
    counts += ("pages_held", "pages_shared", "pages_saved", "pages_cached")
    out.append(
      Events(
        tokens=tuple(tokens),
        ended=ended,
        admitted=_numbered(step.admitted, step.cached),
        preempted=_numbered(step.preempted, step.lost),
        proposed=_numbered(guessed, step.proposed),
        accepted=_numbered(guessed, step.counts - 1),
        cut=cut,
        swapped_out=_numbered(np.where(step.swapped_out > 0, step.preempted, NOBODY), step.swapped_out),
        swapped_in=_numbered(np.where(step.swapped_in > 0, step.admitted, NOBODY), step.swapped_in),
        running=tuple(step.running.tolist()),
        **{name: int(getattr(step, name)) for name in counts},
      )
    )
  return out, stops, cuts


def _numbered(ids: Any, numbers: Any) -> dict[int, int]:
  """The number of each id that is somebody."""
  return {id: n for id, n in zip(ids.tolist(), numbers.tolist(), strict=True) if id >= 0}
