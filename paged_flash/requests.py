"""What users ask for and what they get: parameters, events, completions, stop strings."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged_flash.models import Tokenizer
from paged_flash.sampling import Sampling
from paged_flash.state import NOBODY, NUM_STOP_IDS, Requests

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

  def check(self) -> None:
    """Raises ValueError for a value out of range."""
    for name, good, wanted in (
      ("max_tokens", self.max_tokens >= 1, "at least 1"),
      ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"in 0..max_tokens={self.max_tokens}"),
      ("temperature", 0 <= self.temperature < math.inf, "finite and at least 0"),
      ("top_k", 0 <= self.top_k < 2**31, "at least 0"),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
      ("seed", 0 <= self.seed < 2**32, "in 0..2**32-1"),
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
  preempted: tuple[int, ...]  # requests that lost their slot, to be recomputed
  num_scheduled: int  # tokens computed
  num_running: int  # slots in use
  num_waiting: int
  pages_held: int  # pages with a ref count above 0
  pages_shared: int  # of these, held more than once
  tokens_held: int  # tokens of K and V of all holders; a shared one counts for each

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


def rows(batch: Sequence[tuple[Sequence[int], Params]], size: int, max_seq_len: int, *, hold: bool = False) -> Requests:
  """Requests as arrays for `scheduler.submit`.

  Args:
    batch: prompt ids with their parameters.
    size: B, rows to make; those past the batch hold no request.
    max_seq_len: C, tokens kept per request.
    hold: they are prefixes to hold.
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
    hold=column([hold] * len(batch), np.bool, False),
  )
  draw = dict(
    temperature=column([p.temperature for p in params], np.float32, 0),
    top_k=column([p.top_k for p in params], np.int32, 0),
    top_p=column([p.top_p for p in params], np.float32, 1),
    seed=column([p.seed for p in params], np.uint32, 0),
  )
  columns, draw = jax.tree.map(jnp.asarray, (columns, draw))
  return Requests(**columns, sampling=Sampling(**draw))
