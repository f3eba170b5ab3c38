"""Passes over the rows that are there, on Hopper GPUs: in the CPU interpreter with its race detector, lowered, run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_flash.kernels import live_rows_sm90
from tests.kernels import mosaic_help

LENS = np.array([0, 1, 63, 64, 65, 133], np.int32)
SHAPES = [  # T, H, D, columns of what was added up, dtype
  (133, 3, 96, 128, "bfloat16"),
  (136, 8, 32, 256, "float16"),
  (150, 2, 256, 256, "bfloat16"),
  (192, 5, 64, 64, "bfloat16"),
]


def rows_of(T, H, D, dtype, lens):
  """Two arrays [B, T, H, D], NaN in every other row past the end, and the sums of their products."""
  rng = np.random.default_rng(0)
  past = (np.arange(T) >= lens[:, None]) & (np.arange(T) % 2 == 1)
  x, y = (np.asarray(jnp.asarray(rng.standard_normal((len(lens), T, H, D)), dtype)) for _ in range(2))
  sums = (x.astype(np.float64) * y.astype(np.float64)).sum(-1).swapaxes(1, 2)
  return *(np.where(past[..., None, None], x.dtype.type(np.nan), x) for x in (x, y)), sums


def assert_sums(got, sums, lens):
  T = sums.shape[2]
  assert got.dtype == np.float32 and got.shape == (*sums.shape[:2], -(-T // 64) * 64)
  alive = np.broadcast_to((np.arange(T) < lens[:, None])[:, None], sums.shape)
  np.testing.assert_allclose(got[..., :T][alive], sums[alive], atol=1e-4)


def added_up(T, H, D, columns, batch):
  """What was added up, NaN where nothing was; which tiles were visited; what is to be returned, in float32."""
  rng = np.random.default_rng(0)
  tiles = -(-T // 64)
  visited = rng.random((batch, tiles)) < 0.5
  visited[0], visited[1] = False, True
  dq = rng.standard_normal((batch, H, tiles * 64, columns)).astype(np.float32)
  alive = np.repeat(visited, 64, 1)[:, None, :, None]
  wanted = np.where(alive, dq * np.float32(0.3), 0)[:, :, :T, :D].swapaxes(1, 2)
  return np.where(alive, dq, np.float32(np.nan)), visited, wanted


@pytest.mark.parametrize("T, H, D, columns, dtype", SHAPES)
def test_sums_of_rows_that_are_there(T, H, D, columns, dtype):
  x, y, sums = rows_of(T, H, D, dtype, LENS)
  with mosaic_help.interpreter():
    got = mosaic_help.interpreted(live_rows_sm90.row_dots, x, y, LENS)
  assert_sums(got, sums, LENS)


@pytest.mark.parametrize("T, H, D, columns, dtype", SHAPES)
def test_queries_that_nobody_visited_get_zeros_and_the_others_what_was_added_up(T, H, D, columns, dtype):
  dq, visited, wanted = added_up(T, H, D, columns, 3)

  def run(dq, visited, interpret):
    return live_rows_sm90.finished(dq, visited, 0.3, wanted.shape, dtype, interpret=interpret)

  with mosaic_help.interpreter():
    got = mosaic_help.interpreted(run, dq, visited)
  np.testing.assert_array_equal(got, wanted.astype(jnp.dtype(dtype)))


@pytest.mark.parametrize(
  "T, H, D, columns, dtype", [*SHAPES, (4096, 16, 128, 128, "bfloat16"), (3001, 7, 192, 192, "float16")]
)
def test_lowering(T, H, D, columns, dtype):
  x = jax.ShapeDtypeStruct((2, T, H, D), dtype)
  dq = jax.ShapeDtypeStruct((2, H, -(-T // 64) * 64, columns), jnp.float32)
  visited = jax.ShapeDtypeStruct((2, -(-T // 64)), bool)

  def both(x, lens, dq, visited):
    return live_rows_sm90.row_dots(x, x, lens), live_rows_sm90.finished(dq, visited, 0.3, x.shape, x.dtype)

  text = mosaic_help.lowered(both, x, jax.ShapeDtypeStruct((2,), jnp.int32), dq, visited)
  assert mosaic_help.count_kernels(text) == 2


@pytest.mark.gpu
@pytest.mark.parametrize(
  "T, H, D, columns, dtype", [*SHAPES, (4096, 16, 128, 128, "bfloat16"), (3001, 7, 192, 192, "float16")]
)
def test_on_a_gpu(T, H, D, columns, dtype):
  lens = np.minimum(np.append(LENS, [2000, T]), T).astype(np.int32)
  x, y, sums = rows_of(T, H, D, dtype, lens)
  assert_sums(np.asarray(jax.jit(live_rows_sm90.row_dots)(x, y, lens)), sums, lens)
  dq, visited, wanted = added_up(T, H, D, columns, len(lens))

  def run(dq, visited):
    return live_rows_sm90.finished(dq, visited, 0.3, wanted.shape, dtype)

  got = jax.jit(run)(dq, visited)
  np.testing.assert_array_equal(np.asarray(got), wanted.astype(jnp.dtype(dtype)))
