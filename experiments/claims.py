"""Claims of the papers, and what became of them: what experiments write and docs/reproduction.md shows."""

import dataclasses
from typing import Any

VERDICTS = {True: "reproduced", False: "not reproduced", None: "in part"}


@dataclasses.dataclass(kw_only=True)
class Claim:
  """A claim as its source makes it; an experiment's config carries it, the experiment judges it."""

  number: str  # of the row in docs/reproduction.md: "7", or "13a" where a claim has parts
  claim: str
  source: str
  theirs: str  # the number that they give
  figure: str = ""  # of experiments.report's FIGURES, drawn from the same result

  def judged(self, ours: str, holds: bool | None) -> dict[str, Any]:
    """The claim's entry in a result: what we found, and whether it holds; None where only part of it does."""
    return dataclasses.asdict(self) | dict(ours=ours, verdict=VERDICTS[holds])
