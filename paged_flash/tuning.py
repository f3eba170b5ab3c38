"""Tile sizes: a kernel is told its tiles, it does not choose them."""

from paged_flash.kernels.problem import PagedProblem, Problem


def tiles(problem: Problem, implementation: str) -> dict[str, int]:
  """Returns the tile arguments of a kernel.

  Args:
    problem: What the kernel is asked to do.
    implementation: The kernel's name.

  Returns:
    Keyword arguments of its functions: `block_q` queries by `block_kv` keys; `lanes` key blocks at a time (decode).
    Empty for the reference, which has no tiles. Constants of the problem's kind, so that a sequence's result does not
    depend on who shares its batch.
  """
  if implementation == "reference":
    return {}
  if isinstance(problem, PagedProblem):
    return {"block_q": 64, "block_kv": 128, "lanes": 8}
  return {"block_q": 128, "block_kv": 128}
