"""`paged_forward` of every kernel against the float64 oracle, on pools where all that nobody owns is NaN."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_flash.kernels import reference, xla
from paged_flash.kernels.arguments import paged_problem
from tests.kernels import cases, oracle
from tests.tolerances import assert_close

KERNELS = {"xla": xla, "reference": reference}
TILES = dict(block_q=4, block_kv=16, lanes=3)


def _run(kernel, problem, operands):
  return kernel.paged_forward(problem, operands, **(TILES if kernel is xla else {}))


run = jax.jit(_run, static_argnums=(0, 1))
run_optimised = jax.jit(_run, static_argnums=(0, 1), compiler_options=cases.OPTIMISED)


def attend(kernel, call):
  return run_optimised(kernel, *paged_problem(**call))


def assert_is_oracle(kernel, call, factor=1.0):
  out, lse = run(kernel, *paged_problem(**call))
  want_out, want_lse = oracle.paged(**{k: v for k, v in call.items() if k != "max_query_len"})
  assert_close(out, want_out, factor=factor)
  assert_close(lse, want_lse, factor=factor)
  return np.asarray(out), np.asarray(lse)


def bitwise(a, b):
  return all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(a, b, strict=True))


DECODE: dict[str, Any] = dict(kv_lens=[1, 0, 48, 17, 33])
MIXED: dict[str, Any] = dict(kv_lens=[9, 30, 0, 16, 48], query_lens=[9, 1, 0, 1, 11], num_tokens=25, max_query_len=11)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize(
  "arguments",
  [{}, dict(local_window_size=7, logits_soft_cap=2.0, sinks=np.arange(6, dtype=np.float32) - 3, scale=0.5)],
  ids=["plain", "window_cap_sinks"],
)
def test_is_the_oracle(name, shape, arguments):
  call = cases.paged_call(**shape, **arguments)
  out, lse = assert_is_oracle(KERNELS[name], call)
  if shape is MIXED:
    assert (out[22:] == 0).all() and (lse[22:] == -np.inf).all()  # padding tokens
  else:
    assert (out[1] == 0).all() and (lse[1] == -np.inf).all()  # the inactive slot


@pytest.mark.parametrize("page_size, pages_per_slot", [(1, 33), (5, 7), (16, 3), (40, 1)])
def test_page_sizes(page_size, pages_per_slot):
  kv_lens = [33, 5, 1, page_size * pages_per_slot if page_size > 1 else 7]  # a last page of every fill, a full slot
  pool: dict[str, Any] = dict(page_size=page_size, pages_per_slot=pages_per_slot)
  call = cases.paged_call(kv_lens=kv_lens, query_lens=[7, 5, 1, 1], num_tokens=14, max_query_len=7, **pool)
  assert_is_oracle(xla, call)


@pytest.mark.parametrize("heads", [(7, 1, 8), (4, 4, 16), (20, 1, 8)], ids=str)
def test_head_groups(heads):
  assert_is_oracle(xla, cases.paged_call(**MIXED, heads=heads))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_eight_bit_pools(name, dtype):
  call = cases.paged_call(**MIXED)
  rng = np.random.default_rng(3)
  for field in ("k", "v"):
    pool = np.nan_to_num(call[f"{field}_pages"])
    call[f"{field}_pages"] = np.asarray(jnp.asarray(np.round(pool * 20) if dtype == "int8" else pool, dtype))
    scales = rng.uniform(0.02, 0.08, pool.shape[:3]).astype(np.float32)
    call[f"{field}_scales"] = scales if dtype == "int8" else scales * 20
  assert_is_oracle(KERNELS[name], call)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(dtype):
  call = cases.paged_call(**MIXED)
  for field in ("query", "k_pages", "v_pages"):
    call[field] = np.asarray(jnp.asarray(call[field], dtype))
  out, lse = run(xla, *paged_problem(**call))
  want_out, want_lse = oracle.paged(**{k: v for k, v in call.items() if k != "max_query_len"})
  assert out.dtype == dtype and lse.dtype == jnp.float32
  assert_close(out, want_out)
  assert_close(lse, want_lse, dtype=dtype)


@pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])
def test_where_pages_lie_makes_no_difference(shape):
  scattered = cases.paged_call(**shape)
  batch, pages_per_slot = scattered["pages"].shape
  in_order: dict[str, Any] = dict(
    scattered, pages=np.arange(batch * pages_per_slot, dtype=np.int32).reshape(batch, pages_per_slot)
  )
  for field in ("k_pages", "v_pages"):  # a pool just large enough instead of one twice the size
    pool = np.full((batch * pages_per_slot, *scattered[field].shape[1:]), np.nan, np.float32)
    for b, kv_len in enumerate(scattered["kv_lens"]):
      used = -(-kv_len // pool.shape[1])
      pool[in_order["pages"][b, :used]] = scattered[field][scattered["pages"][b, :used]]
    in_order[field] = pool
  assert bitwise(attend(xla, scattered), attend(xla, in_order))


def test_page_size_makes_no_difference():
  # With blocks of a fixed number of tokens, even the rounding is that of the tokens, not of the pages.
  small = cases.paged_call(**MIXED, page_size=4, pages_per_slot=12)
  large: dict[str, Any] = dict(small, pages=np.arange(5 * 3, dtype=np.int32).reshape(5, 3))
  for field in ("k_pages", "v_pages"):
    rows = small[field][np.clip(small["pages"], 0, len(small[field]) - 1)]
    large[field] = rows.reshape(15, 16, *rows.shape[3:])
  assert bitwise(attend(xla, small), attend(xla, large))


def test_a_request_does_not_depend_on_its_batch():
  together = cases.paged_call(**MIXED)
  out, lse = attend(xla, together)
  starts = together["query_starts"]
  for b in (1, 4):
    tokens = slice(starts[b], starts[b + 1])
    alone = dict(together, query=together["query"][tokens], query_starts=cases.i32(0, starts[b + 1] - starts[b]))
    alone.update(pages=together["pages"][b : b + 1], kv_lens=together["kv_lens"][b : b + 1])
    assert bitwise(attend(xla, alone), (out[tokens], lse[tokens]))
  # In a step of decode tokens only, and in a larger one.
  for batch in (5, 12):
    call = cases.paged_call(kv_lens=([30, 0, 47, 3, 12] * 3)[:batch], pages_per_slot=12, seed=batch)
    call.update(k_pages=np.concatenate([call["k_pages"], together["k_pages"]]))
    call.update(v_pages=np.concatenate([call["v_pages"], together["v_pages"]]))
    call["pages"][0] = together["pages"][1] + len(call["k_pages"]) - len(together["k_pages"])
    call["query"][0] = together["query"][starts[1]]
    out_batch, lse_batch = attend(xla, call)
    assert bitwise((out_batch[0], lse_batch[0]), (out[starts[1]], lse[starts[1]]))


def test_decode_continues_prefill():
  # One prefill of 40 tokens equals the same tokens in chunks of 1 to 11, across page boundaries.
  whole = cases.paged_call(kv_lens=[40], query_lens=[40], num_tokens=40, max_query_len=40)
  out, lse = assert_is_oracle(xla, whole)
  done = 0
  for chunk in (2, 3, 11, 8, 1, 10, 5):
    tokens = slice(done, done + chunk)
    query = np.zeros((11, *whole["query"].shape[1:]), np.float32)
    query[:chunk] = whole["query"][tokens]
    done += chunk
    call = dict(whole, query=query, kv_lens=cases.i32(done), query_starts=cases.i32(0, chunk), max_query_len=11)
    got_out, got_lse = attend(xla, call)
    assert_close(got_out[:chunk], out[tokens])
    assert_close(got_lse[:chunk], lse[tokens])
  assert done == 40


def test_lse_merges_a_shared_prefix_with_the_rest():
  call = cases.paged_call(kv_lens=[48, 43, 37])
  prefix = dict(call, kv_lens=cases.i32(32, 32, 0))  # the third shares nothing: merging with -inf changes nothing
  pages = np.concatenate([call["pages"][:, 8:], np.full((3, 8), -1, np.int32)], axis=1)
  pages[2] = call["pages"][2]
  rest = dict(call, pages=pages, kv_lens=cases.i32(16, 11, 37))
  (out_a, lse_a), (out_b, lse_b) = attend(xla, prefix), attend(xla, rest)
  lse = np.logaddexp(lse_a, lse_b)
  out = out_a * np.exp(lse_a - lse)[..., None] + out_b * np.exp(lse_b - lse)[..., None]
  want_out, want_lse = attend(xla, call)
  assert_close(np.float32(out), want_out)
  assert_close(np.float32(lse), want_lse)
  assert bitwise((out_b[2], lse_b[2]), (want_out[2], want_lse[2]))


@pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])
def test_pages_before_the_window_may_be_gone(shape):
  call = cases.paged_call(**shape, local_window_size=7)
  clean = attend(xla, call)
  first_query = call["kv_lens"] - np.diff(call.get("query_starts", np.arange(len(call["kv_lens"]) + 1)))
  for b, page in enumerate(np.maximum(first_query - 7, 0) // call["k_pages"].shape[1]):
    gone = call["pages"][b, :page]
    call["k_pages"][gone] = call["v_pages"][gone] = np.nan
  assert bitwise(attend(xla, call), clean)


def test_padded_query_tokens_may_be_nan():
  call = cases.paged_call(**MIXED)
  clean = attend(xla, call)
  call["query"][22:] = np.nan
  assert bitwise(attend(xla, call), clean)


@pytest.mark.parametrize("shape", [dict(DECODE), dict(MIXED)], ids=["decode", "mixed"])
def test_no_temporary_as_large_as_the_pool(shape):
  call = cases.paged_call(**shape)
  for field in ("k_pages", "v_pages"):
    call[field] = jnp.zeros((5000, *call[field].shape[1:]))
  problem, operands = paged_problem(**call)
  assert cases.temporary_bytes(run.lower(xla, problem, operands)) < operands.k_pages.nbytes / 10


@st.composite
def batches(draw):
  """Lengths of five sequences in a step of at most 24 tokens."""
  query_lens = []
  for _ in range(5):
    query_lens.append(draw(st.integers(0, min(12, 24 - sum(query_lens)))))
  kv_lens = [draw(st.integers(n, 48)) for n in query_lens]
  return query_lens, kv_lens, draw(st.integers(0, 2**16))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(batches())
def test_any_mixed_batch(batch):
  query_lens, kv_lens, seed = batch
  call = cases.paged_call(kv_lens=kv_lens, query_lens=query_lens, num_tokens=24, max_query_len=12, seed=seed)
  assert_is_oracle(xla, call, factor=2)
