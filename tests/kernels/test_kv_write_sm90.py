"""Writing to pages and copying them on Hopper GPUs: in the CPU interpreter with races detected, lowered, on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_flash.cache import kv_pages
from paged_flash.cache.page_table import NO_PAGE, PageCopies
from paged_flash.kernels import kv_write_sm90, mosaic
from tests.kernels import mosaic_help
from tests.kernels.test_arguments import pretend

SHAPES = [  # T, K, D, page_size, N, dtype
  (5, 2, 64, 16, 4, "bfloat16"),
  (19, 3, 64, 8, 6, "float16"),
  (17, 1, 32, 8, 6, "float32"),
  (3, 1, 128, 256, 2, "int8"),
]


def normal(rng, *shape, dtype):
  return np.asarray(jnp.asarray(30 * rng.normal(size=shape), dtype))


def tokens(T, K, D, page_size, N, dtype, seed=0):
  """A pool, tokens, and where they belong, all different; some belong nowhere."""
  rng = np.random.default_rng(seed)
  k_pages, v_pages = (normal(rng, N, page_size, K, D, dtype=dtype) for _ in range(2))
  k, v = (normal(rng, T, K, D, dtype=dtype) for _ in range(2))
  rows, offsets = np.divmod(rng.permutation(N * page_size)[:T].astype(np.int32), page_size)
  return k_pages, v_pages, k, v, np.where(rng.random(T) < 0.3, NO_PAGE, rows).astype(np.int32), offsets


def written(k_pages, v_pages, k, v, rows, offsets):
  k_pages, v_pages = k_pages.copy(), v_pages.copy()
  for t in np.flatnonzero(rows != NO_PAGE):
    k_pages[rows[t], offsets[t]], v_pages[rows[t], offsets[t]] = k[t], v[t]
  return k_pages, v_pages


def assert_equal(got, want):
  for x, y in zip(got, want, strict=True):
    np.testing.assert_array_equal(np.asarray(x), y)


@pytest.mark.parametrize("multiprocessors", [1, 132])  # a block takes several tokens, or one
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_token_is_in_its_place_and_nothing_else_changed(shape, multiprocessors, monkeypatch):
  monkeypatch.setattr(mosaic, "num_multiprocessors", lambda: multiprocessors)
  call = tokens(*shape)
  assert (call[4] == NO_PAGE).any() or shape[0] < 4
  with mosaic_help.interpreter():
    got = mosaic_help.interpreted(lambda call, interpret: kv_write_sm90.write(*call, interpret=interpret), call)
  assert_equal(got, written(*call))


def copies_of(pool, num_layers, src, dst):
  layers = pool.reshape(num_layers, -1, *pool.shape[1:]).copy()
  for a, b in zip(src, dst, strict=True):
    if b != NO_PAGE:
      layers[:, b] = layers[:, a]
  return layers.reshape(pool.shape)


@pytest.mark.parametrize("buffer", [64 * 1024, 3 * 2 * 64 * 2])  # bytes: a whole page at a time, or two tokens
def test_pages_are_copied_in_every_layer_and_no_others(buffer, monkeypatch):
  monkeypatch.setattr(kv_write_sm90, "BUFFER", buffer)
  rng = np.random.default_rng(0)
  pools = [normal(rng, 3 * 6, 8, 2, 64, dtype="bfloat16") for _ in range(2)]
  src, dst = np.array([1, 0, 1, 4, 5], np.int32), np.array([2, NO_PAGE, 0, 3, NO_PAGE], np.int32)
  with mosaic_help.interpreter():
    got = mosaic_help.interpreted(
      lambda call, interpret: kv_write_sm90.copy(*call, num_layers=3, interpret=interpret), (*pools, src, dst)
    )
  assert_equal(got, [copies_of(pool, 3, src, dst) for pool in pools])


def test_the_cache_writes_and_copies_by_one_kernel_each_on_a_hopper_gpu():
  sizes = dict(num_layers=2, num_pages=3, page_size=4, num_kv_heads=1, head_dim=64)
  kv = kv_pages.init(**sizes, dtype=jnp.bfloat16)
  new = jnp.zeros((5, 1, 64), jnp.float32)
  places = jnp.zeros(5, jnp.int32)
  copies = PageCopies(src=jnp.zeros((2, 2), jnp.int32), dst=jnp.full((2, 2), NO_PAGE))
  for step in (lambda kv: kv_pages.write(kv, 1, new, new, places, places), lambda kv: kv_pages.copy(kv, copies)):
    text = mosaic_help.lowered(step, kv)
    assert mosaic_help.count_kernels(text) == 1 and "scatter" not in text and "while" not in text
    assert "mosaic_gpu" not in jax.jit(step).lower(kv).as_text()


@pytest.mark.parametrize(
  "kind, pool, reason",
  [
    ("NVIDIA H200", (2, 16, 8, 128), ""),
    ("NVIDIA H200", (2, 16, 8, 12), "whole 16 bytes"),
    ("NVIDIA H200", (2, 16, 8, 512), "head_dim and heads up to 256"),
    ("NVIDIA H200", (2, 16, 256, 256), "at most 65536 bytes of a token"),
    ("NVIDIA B200", (2, 16, 8, 128), "not on nvidia_b200"),
  ],
)
def test_what_is_supported(kind, pool, reason):
  with pretend(kind):
    found = kv_write_sm90.supports(jax.ShapeDtypeStruct(pool, jnp.bfloat16))
  assert reason in found and bool(reason) == bool(found)


@pytest.mark.gpu
@pytest.mark.parametrize(
  "shape", [*SHAPES, (8192, 8, 128, 16, 4096, "bfloat16"), (256, 3, 64, 16, 512, "bfloat16")], ids=str
)
def test_on_a_gpu_every_token_is_in_its_place(shape):
  call = tokens(*shape)
  write = jax.jit(kv_write_sm90.write, donate_argnums=(0, 1))
  assert_equal(write(*map(jnp.asarray, call)), written(*call))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size, heads", [(16, 8), (256, 8), (1, 3)])
def test_on_a_gpu_pages_are_copied(page_size, heads):
  rng = np.random.default_rng(0)
  pools = [normal(rng, 30 * 40, page_size, heads, 64, dtype="bfloat16") for _ in range(2)]
  src, dst = np.split(rng.permutation(40).astype(np.int32), 2)
  dst[::3] = NO_PAGE
  copy = jax.jit(functools.partial(kv_write_sm90.copy, num_layers=30), donate_argnums=(0, 1))
  assert_equal(copy(*map(jnp.asarray, (*pools, src, dst))), [copies_of(pool, 30, src, dst) for pool in pools])
