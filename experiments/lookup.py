"""How much of what prompt lookup proposes holds, on outputs that are known: no model is needed.

    python -m experiments.lookup --config=configs/lookup/smollm2.py

Speculation leaves the tokens what they are, so what it proposes and what of it holds at every turn follows from them.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from paged_flash import scheduler, speculation
from paged_flash.experiment import Workdir, main, write_result
from paged_flash.requests import Params, rows

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(kw_only=True)
class Config:
  outputs: str = "tests/data/smollm2_reference.json"  # JSON or JSONL of objects with "prompt_ids" and "output_ids"
  max_prompt_len: int = 600  # longer ones are left out
  num_proposed: tuple[int, ...] = (2, 4, 8)
  matches: tuple[tuple[int, int], ...] = ((3, 1), (3, 2), (3, 3))  # `longest` and `shortest` of `speculation.lookup`
  result: str = ""  # name under experiments/results/lookup/<device>/ to write to; "" writes none


def run(config: Config, workdir: Workdir) -> list[dict]:
  text = (ROOT / config.outputs).read_text(encoding="utf-8")
  known = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
  known = [k for k in known if k["output_ids"] and len(k["prompt_ids"]) <= config.max_prompt_len]
  out = []
  for num_proposed in config.num_proposed:
    for longest, shortest in config.matches:
      proposed, accepted, turns, tokens = replay(known, num_proposed, longest, shortest)
      out.append(
        dict(
          num_proposed=num_proposed,
          longest=longest,
          shortest=shortest,
          requests=len(known),
          proposed=proposed,
          accepted=accepted,
          acceptance=accepted / max(proposed, 1),
          tokens_per_turn=tokens / turns,
          computed_per_token=(turns + proposed) / tokens,
        )
      )
      workdir.log(**out[-1])
  print(pd.DataFrame(out).to_string(index=False, float_format="%.2f"))
  if config.result:
    print(write_result("lookup", out, name=config.result, config=dataclasses.asdict(config)))
  return out


def replay(known: list[dict], num_proposed: int, longest: int, shortest: int) -> tuple[int, int, int, int]:
  """Tokens proposed and accepted, turns and output tokens, first tokens left out: they come with the prompt."""
  R, most = len(known), max(len(k["prompt_ids"]) + len(k["output_ids"]) for k in known)
  state = scheduler.init(num_slots=R, pages_per_slot=1, num_pages=R, page_size=1, num_requests=R, max_seq_len=most)
  whole = [(k["prompt_ids"] + k["output_ids"], Params()) for k in known]
  state = dataclasses.replace(scheduler.submit(state, rows(whole, R, most))[0], running=jnp.arange(R))
  look = jax.jit(functools.partial(speculation.lookup, num_tokens=num_proposed, longest=longest, shortest=shortest))
  have, proposed, accepted, turns = [1] * R, 0, 0, 0
  while any(n < len(k["output_ids"]) for n, k in zip(have, known, strict=True)):
    lens = jnp.array([len(k["prompt_ids"]) + n for n, k in zip(have, known, strict=True)])
    now = dataclasses.replace(state, requests=dataclasses.replace(state.requests, num_tokens=lens))
    proposals = np.asarray(look(now)).tolist()
    for i, k in enumerate(known):
      rest = k["output_ids"][have[i] :]
      if not rest:
        continue
      guesses = [token for token in proposals[i] if token >= 0][: len(rest) - 1]
      right = next((j for j, guess in enumerate(guesses) if guess != rest[j]), len(guesses))
      proposed, accepted, turns, have[i] = proposed + len(guesses), accepted + right, turns + 1, have[i] + right + 1
  return proposed, accepted, turns, sum(have) - R


if __name__ == "__main__":
  main(run)
