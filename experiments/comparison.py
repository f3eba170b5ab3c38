"""Implementations against each other: compiled side by side, timed in turns, and what fails says so in its row."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax

from paged_flash.experiment import call_seconds, compare, kernel_seconds
from paged_flash.experiment.config import did_you_mean


class Named(Protocol):
  """A case of an experiment."""

  @property
  def name(self) -> str: ...


@dataclasses.dataclass
class Measured:
  """What one implementation did on one case and stage."""

  case: Any  # of the experiment's own kind, Named
  stage: str
  peer: str
  seconds: float | None = None  # median; None where it did not run
  p10: float | None = None
  p90: float | None = None
  calls: int = 0
  error: float | None = None  # by what is allowed; above 1 is wrong
  note: str = ""

  @property
  def counts(self) -> bool:
    return self.seconds is not None and (self.error is None or self.error <= 1)

  def record(self, labels: Mapping[str, str], **details: Any) -> dict[str, Any]:
    """One line of metrics.jsonl and of a result's "timings"; `details` are what the experiment knows of the case."""
    label = labels.get(self.peer, self.peer)
    times = (("us", self.seconds), ("p10", self.p10), ("p90", self.p90))
    return (
      dict(case=self.case.name, stage=self.stage, peer=self.peer, label=label)
      | details
      | {key: None if s is None else 1e6 * s for key, s in times}
      | dict(calls=self.calls, error=None if self.error is None else min(self.error, 1e9), note=self.note)
    )

  def __str__(self) -> str:
    if self.seconds is None:
      return self.note
    text = f"{1e6 * self.seconds:10.1f} us"
    if self.p10 is not None and self.p90 is not None:
      text += f" ({1e6 * self.p10:.1f} to {1e6 * self.p90:.1f})"
    text += "" if self.error is None else f", error {self.error:.2f} of the allowed"
    return f"{text} {self.note}".rstrip()


def one_line(error: Exception) -> str:
  """What a row says of a failure."""
  text = (str(error).strip() or "no text").splitlines()[0][:200]
  return text if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {text}"


def compile_all[Key, Built](
  builders: Mapping[Key, Callable[[], Built]], threads: int
) -> dict[Key, tuple[Built | None, str]]:
  """Calls every builder of compiled programs, side by side; where that fails, None and why."""

  def build(builder: Callable[[], Built]):
    try:
      return builder(), ""
    except Exception as error:  # a peer may fail in any way: its row says how
      return None, one_line(error)

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    return dict(zip(builders, pool.map(build, builders.values()), strict=True))


def sampler(program: Callable, *operands: Any, repeats: int) -> Callable[[], list[float]]:
  """A function that returns the seconds of some calls: of their kernels on a GPU, of the calls elsewhere."""
  sample = kernel_seconds if jax.default_backend() == "gpu" else call_seconds
  return functools.partial(sample, program, *operands, repeats=repeats)


def time_rows(rows: Mapping[str, Measured], samplers: dict[str, Callable[[], list[float]]], rounds: int) -> None:
  """Fills in the times of the rows that have a sampler; one that fails gets a note, and the others start again."""
  turn = ""

  def guarded(name: str) -> list[float]:
    nonlocal turn
    turn = name
    return samplers[name]()

  while samplers:
    try:
      timings = compare({name: functools.partial(guarded, name) for name in samplers}, rounds)
    except Exception as error:  # as in compile_all
      rows[turn].note = one_line(error)
      samplers = {name: sampler for name, sampler in samplers.items() if name != turn}
      continue
    for name, timing in timings.items():
      row = rows[name]
      row.seconds, row.p10, row.p90, row.calls = timing.median, timing.p10, timing.p90, timing.repeats
    return


def select[Case: Named](problems: Sequence[Case], parts: Sequence[str]) -> list[Case]:
  """The problems whose name holds one of the parts; all of them where there are no parts.

  Raises:
    ValueError: if there are none.
  """
  cases = [case for case in problems if not parts or any(part in case.name for part in parts)]
  if not cases:
    raise ValueError(f"config.cases must name one of the problems, got {parts}")
  return cases


def check_names(kind: str, asked: Iterable[str], known: Iterable[str]) -> None:
  """Raises ValueError, with the nearest known name, if one is unknown."""
  for name in asked:
    if name not in (known := list(known)):
      raise ValueError(f"unknown {kind} {name!r}.{did_you_mean(name, known)}")
