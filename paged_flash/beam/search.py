"""The host's side: prompts in, the best ways to continue them out, by beams or among samples."""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from paged_flash.beam import beams
from paged_flash.beam.beams import BeamState
from paged_flash.cache import page_table
from paged_flash.requests import Completion, Params, Prompt, Transcript, rows
from paged_flash.state import FINISH_NAMES

type Engine = Any  # a `paged_flash.Engine`: a room above this one


class Result(NamedTuple):
  """One way in which a prompt goes on."""

  output_ids: tuple[int, ...]
  logprob: float  # natural, of all of it
  text: str  # "" for a model without a tokenizer
  finish: str  # "stop", or "length" at `max_tokens` or where the pool ended


class BeamSearch:
  """Searches with the model, the pool and the sizes of an engine, in a program and a pool of its own.

  Args:
    engine: a `paged_flash.Engine`; num_slots // width of the prompts are searched together.
    width: beams of a prompt, and results.

  Raises:
    ValueError: the width is below 1, or above the engine's slots.

  Example:
    >>> import paged_flash as pf
    >>> sizes = dict(vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64)
    >>> model = pf.models.load(pf.models.ModelConfig(**sizes))  # random weights
    >>> search = BeamSearch(pf.Engine(model, num_slots=4, num_pages=32, page_size=4), width=2)
    >>> (results,), state = search([[1, 2, 3]], max_tokens=5)
    >>> [len(result.output_ids) for result in results], results[0].logprob > results[1].logprob
    ([5, 5], True)
  """

  def __init__(self, engine: Engine, *, width: int):
    if not 1 <= width <= engine.num_slots:
      raise ValueError(f"width must be in 1..num_slots={engine.num_slots}, got {width}")
    self.engine, self.width = engine, width
    self._submit = jax.jit(beams.submit)
    self._run = jax.jit(functools.partial(beams.run, engine.model, engine.settings), donate_argnames="kv")

  def __call__(
    self,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 64,
    length_penalty: float = 1.0,
    stop_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    progress: bool = False,
  ) -> tuple[list[list[Result]], BeamState]:
    """The best ways to continue each prompt.

    Args:
      prompts: text, token ids or chat messages.
      max_tokens: output tokens at most.
      length_penalty: a result is worth its log-probability / tokens ** length_penalty; 0 prefers short ones.
      stop_ids: token ids that end a result, beside the model's own.
      ignore_eos: the model's own end tokens do not end it.
      progress: show a progress bar.

    Returns:
      For each prompt its results, the one of most worth first; and the last state, for what it says of the pages.

    Raises:
      ValueError: a prompt or parameter is not good; the text names the prompt. Nothing is run.
    """
    engine, W = self.engine, self.width
    if not 0 <= length_penalty < float("inf"):
      raise ValueError(f"length_penalty must be finite and at least 0, got {length_penalty}")
    params = Params(max_tokens=max_tokens, stop_ids=tuple(stop_ids), ignore_eos=ignore_eos)
    good = []
    for i, prompt in enumerate(prompts):
      try:
        good.append(engine.check(engine.encode(prompt), params))
      except ValueError as error:
        raise ValueError(f"prompts[{i}]: {error}") from None
    longest, room = max((len(ids) for ids, _ in good), default=0), engine.num_pages * engine.page_size
    if longest >= room:
      raise ValueError(f"prompts must leave room for a token in the pool's {room}, got one of {longest} tokens")
    if good and len(good[0][1].stop_ids) + W > engine.model.config.vocab_size:
      raise ValueError(
        f"width must leave room for stop_ids in a vocabulary of {engine.model.config.vocab_size}, got {W}"
      )

    first, G = engine.init(), engine.num_slots // W
    table, kv = first.scheduler.table, first.kv
    now = beams.init(
      num_prompts=G,
      width=W,
      pages_per_slot=table.pages_per_slot,
      num_pages=table.num_pages,
      page_size=table.page_size,
      max_seq_len=engine.max_seq_len,
      penalty=length_penalty,
    )
    results: dict[int, list[Result]] = {}
    with tqdm(total=len(good), unit="prompt", disable=not progress) as bar:
      while len(results) < len(good):
        active = np.asarray(now.active)
        for _ in range(min(int((~active).sum()), len(good) - int(now.state.num_arrived))):
          batch = [good[int(now.state.num_arrived)]]
          now = self._submit(now, rows(batch, 1, engine.max_seq_len))
        running = np.asarray(now.active)
        now, kv = self._run(engine.model.params, now, kv)
        for place in np.flatnonzero(running & ~np.asarray(now.active)):
          results[int(now.state.arrival[place * W])] = self._results(now, int(place))
        if engine.debug:
          page_table.check(now.state.table)
        bar.update(len(results) - bar.n)
    return [results[i] for i in range(len(good))], now

  def _results(self, now: BeamState, place: int) -> list[Result]:
    """Of a prompt that is finished."""
    requests, tokenizer, S = now.state.requests, self.engine.model.tokenizer, now.state.running.size
    out = []
    for row in range(S + place * self.width, S + (place + 1) * self.width):
      if now.scores[row] == -np.inf:
        continue
      ids = np.asarray(requests.tokens[row, requests.prompt_lens[row] : requests.num_tokens[row]]).tolist()
      finish = FINISH_NAMES[int(now.state.finish[row])]
      text = "" if tokenizer is None else tokenizer.decode(ids[:-1] if finish == "stop" else ids)
      out.append(Result(tuple(ids), float(now.scores[row]), text, finish))
    return out


def best_of(engine: Engine, prompt: Prompt, num_samples: int, **params: Any) -> list[Completion]:
  """Samples of one prompt, on shared pages (`Engine.submit_samples`), those with the likeliest tokens first.

  Args:
    engine: a `paged_flash.Engine`.
    prompt: text, token ids or chat messages.
    num_samples: at least 1.
    **params: fields of `Params`; `temperature` should be above 0.

  Returns:
    All of them, by their mean log-probability per token.
  """
  prompt_ids, good = engine.check(engine.encode(prompt), Params(**params))
  state, ids = engine.submit_samples(engine.init(), prompt_ids, num_samples, **params)
  start, done = time.perf_counter(), []
  live = {id: Transcript(prompt_ids, good, engine.model.tokenizer) for id in ids}
  while not state.idle:
    state, events = engine.step(state)
    now = time.perf_counter() - start
    for event in events:
      live[event.request].push(event, now)
      if event.done:
        done.append(live[event.request].completion(event.finish, now))
    done += [live[id].completion("length", now) for id in events.ended]
  return sorted(done, key=lambda sample: -float(np.mean(sample.logprobs or [-np.inf])))
