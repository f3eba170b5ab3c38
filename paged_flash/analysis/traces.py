"""Requests of real serving workloads: when they came, how long they were, which prefixes they shared.

Reads the public traces as they are (the files are nowhere in this repository); `synthetic` draws lengths instead.
"""

import csv
import dataclasses
import itertools
import json
import os
import pathlib

import numpy as np
import pandas as pd

_SYNTHETIC = {"sharegpt": (161.31, 337.99), "alpaca": (19.31, 58.45)}  # mean prompt and output
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_LENGTHS = ("num_prefill_tokens", "num_decode_tokens")
_MOONCAKE = 512  # tokens in a block of the Mooncake traces


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
  """R requests in order of arrival."""

  name: str
  prompt_lens: np.ndarray  # i64[R]  at least 1
  output_lens: np.ndarray  # i64[R]  at least 1
  arrivals: np.ndarray | None = None  # f64[R]  seconds from the first; None where the trace does not say
  prefixes: tuple[tuple[int, ...], ...] | None = None  # [R] ids of each prompt's blocks of `block_size` tokens
  block_size: int = 0  # equal ids, equal tokens up to the end of the block; the last block may be part full

  def first(self, count: int) -> "Trace":
    """The first `count` requests; all for 0."""
    if not 0 < count < self.prompt_lens.size:
      return self
    return dataclasses.replace(
      self,
      prompt_lens=self.prompt_lens[:count],
      output_lens=self.output_lens[:count],
      arrivals=None if self.arrivals is None else self.arrivals[:count],
      prefixes=None if self.prefixes is None else self.prefixes[:count],
    )

  def contents(self) -> np.ndarray:
    """What the pages of each request would hold, i32[R, P] with page size `block_size`: -1 past its last page.

    A full page of the prompt has its block's id, so that equal prefixes are equal rows; every other page an id that
    nothing else has.

    Raises:
      ValueError: the trace does not know prefixes.

    Example:
      >>> trace = Trace(name="", prompt_lens=np.array([5, 9]), output_lens=np.array([2, 1]),
      ...   prefixes=((7, 8), (7, 9, 5)), block_size=4)
      >>> trace.contents().tolist()
      [[7, 10, -1], [7, 9, 11]]
    """
    prefixes = self._known()
    full, pages = self.prompt_lens // self.block_size, -(-(self.prompt_lens + self.output_lens) // self.block_size)
    new = itertools.count(1 + max(itertools.chain.from_iterable(prefixes)))
    out = np.full((len(prefixes), int(pages.max())), -1, np.int32)
    for row, ids, known, count in zip(out, prefixes, full, pages, strict=True):
      row[:known] = ids[:known]
      row[known:count] = [next(new) for _ in range(count - known)]
    return out

  def ideal_hit_rate(self, *, full_pages: bool = False) -> float:
    """Share of the prompts' tokens that a cache without bounds would have found, had each request ended at once.

    Args:
      full_pages: count full blocks alone, and compute at least the prompt's last token, as a paged cache does; else
        a part-full block that came before counts too.

    Raises:
      ValueError: the trace does not know prefixes.
    """
    seen, found = set(), 0
    for ids, length in zip(self._known(), self.prompt_lens.tolist(), strict=True):
      if full_pages:
        ids = ids[: length // self.block_size]
      hits = next((i for i, block in enumerate(ids) if block not in seen), len(ids))
      usable = (length - 1) // self.block_size * self.block_size if full_pages else length
      found += min(hits * self.block_size, usable)
      seen.update(ids)
    return found / int(self.prompt_lens.sum())

  def _known(self) -> tuple[tuple[int, ...], ...]:
    if self.prefixes is None:
      raise ValueError(f"this needs a trace that knows its requests' prefixes, and {self.name} does not")
    return self.prefixes


def read_trace(path: str | os.PathLike[str]) -> Trace:
  """Reads a trace, told by its columns. An output of 0 tokens is taken for 1.

  Known are the Azure LLM inference traces of 2023 (Patel et al. 2024), the Mooncake traces (Qin et al. 2025), and the
  length lists of Sarathi-Serve (Agrawal et al. 2024) and Vidur (Agrawal et al. 2024).

  Raises:
    ValueError: there is no such file, or it is none of these.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"trace must be a file, got {str(path)!r}")
  if path.suffix == ".jsonl":
    return _mooncake(path)
  with path.open(newline="") as file:
    header = next(csv.reader(file), [])
  if set(_AZURE) <= set(header):
    rows = pd.read_csv(path, usecols=list(_AZURE), parse_dates=["TIMESTAMP"])
    times = (rows["TIMESTAMP"] - rows["TIMESTAMP"].iloc[0]).dt.total_seconds().to_numpy(float)
    prompts, outputs = (rows[name].to_numpy(np.int64) for name in _AZURE[1:])
  elif set(_LENGTHS) <= set(header):
    rows, times = pd.read_csv(path, usecols=list(_LENGTHS)), None
    prompts, outputs = (rows[name].to_numpy(np.int64) for name in _LENGTHS)
  else:
    raise ValueError(f"trace must have the columns {', '.join(_AZURE)} or {', '.join(_LENGTHS)}, got {header[:8]}")
  return Trace(name=path.stem, prompt_lens=np.maximum(prompts, 1), output_lens=np.maximum(outputs, 1), arrivals=times)


def synthetic(name: str, num_requests: int, *, max_seq_len: int = 2048, seed: int = 0) -> Trace:
  """Lengths drawn with the mean lengths of a data set; not the data set.

  "sharegpt" and "alpaca" have the means that Kwon et al. 2023 report for OPT's tokenizer (section 6.1 and figure 11);
  prompt and output are independent and geometric, which assumes nothing but the means, cut to `max_seq_len` together.

  Raises:
    ValueError: another name.
  """
  if name not in _SYNTHETIC:
    raise ValueError(f"synthetic lengths are known for {', '.join(_SYNTHETIC)}, got {name!r}")
  rng = np.random.default_rng(seed)
  prompts, outputs = (rng.geometric(1 / mean, num_requests) for mean in _SYNTHETIC[name])
  prompts = np.minimum(prompts, max_seq_len // 2)
  outputs = np.minimum(outputs, max_seq_len - prompts)
  return Trace(name=f"synthetic {name}", prompt_lens=prompts, output_lens=outputs)


def _mooncake(path: pathlib.Path) -> Trace:
  wanted = ("timestamp", "input_length", "output_length", "hash_ids")
  with path.open() as file:
    rows = [json.loads(line) for line in file if line.strip()]
  if not rows or not set(wanted) <= set(rows[0]):
    raise ValueError(f"trace must have the keys {', '.join(wanted)}, got {sorted(rows[0]) if rows else 'no line'}")
  times, prompts, outputs = (np.array([row[name] for row in rows]) for name in wanted[:3])
  return Trace(
    name=path.stem,
    prompt_lens=np.maximum(prompts, 1),
    output_lens=np.maximum(outputs, 1),
    arrivals=(times - times[0]) / 1e3,
    prefixes=tuple(tuple(row["hash_ids"]) for row in rows),
    block_size=_MOONCAKE,
  )
