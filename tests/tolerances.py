"""The one tolerance table: how far a result of each dtype may be from a float64 oracle fed with the same inputs."""

import numpy as np

# dtype -> (rtol, atol), for values of order one; roundings of the output and of one low-precision product.
TOLERANCES = {
  "float64": (1e-9, 1e-9),
  "float32": (2e-5, 4e-6),
  "float16": (2e-3, 2e-3),
  "bfloat16": (1.6e-2, 1.6e-2),
}


def assert_close(got, want, *, dtype: str | None = None, factor: float = 1.0) -> None:
  """Asserts that `got` matches `want`, infinities included and NaN never.

  Args:
    got: An array.
    want: The oracle's, same shape.
    dtype: Row of the table; the dtype of `got` by default.
    factor: Multiple of the tolerance, for gradients (2) and longer sums.
  """
  rtol, atol = TOLERANCES[dtype or str(got.dtype)]
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, f"shape {got.shape}, wanted {want.shape}"
  assert not np.isnan(want).any(), "the oracle gave NaN"
  np.testing.assert_allclose(got, want, rtol=factor * rtol, atol=factor * atol, equal_nan=False)
