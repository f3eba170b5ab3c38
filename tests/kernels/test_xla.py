"""The tiled kernel with small tiles (several blocks each way) against the oracle and the definition."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_flash.kernels import reference, xla
from paged_flash.kernels.arguments import flash_problem
from tests.kernels import cases, oracle
from tests.kernels.cases import TILES, cotangents, run
from tests.tolerances import assert_close


@pytest.mark.parametrize("name", cases.FLASH)
def test_forward_is_the_oracle_and_backward_the_definition(name):
  call = cases.flash_call(name)
  problem, operands = flash_problem(**call)
  out, lse, gradients = run(xla, problem, operands, *cotangents(call))
  want_out, want_lse = oracle.flash(**call)
  assert_close(out, want_out)
  assert_close(lse, want_lse.swapaxes(1, 2))
  _, _, wanted = run(reference, problem, operands, *cotangents(call))
  assert jax.tree.structure(gradients) == jax.tree.structure(wanted)
  for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
    assert got.dtype == want.dtype
    assert_close(got, want, factor=4)


@pytest.mark.parametrize("name", cases.FLASH)
def test_only_blocks_with_visible_pairs_are_visited(name):
  problem, operands = flash_problem(**cases.flash_call(name))

  @jax.jit
  def bounds(operands):
    flash = xla._Flash(problem, operands, **TILES)
    visible = reference.visible(problem, operands).any((0, 1))
    return visible, jax.vmap(flash.kv_blocks)(jnp.arange(99)), jax.vmap(flash.query_blocks)(jnp.arange(99))

  visible, kv_bounds, query_bounds = (np.asarray(x) for x in bounds(operands))
  steps = (min(TILES["block_q"], problem.query_len), min(TILES["block_kv"], problem.kv_len))
  counts = [-(-size // step) for size, step in zip(visible.shape, steps, strict=True)]
  needed = np.array(
    [
      [visible[i * steps[0] : (i + 1) * steps[0], j * steps[1] : (j + 1) * steps[1]].any() for j in range(counts[1])]
      for i in range(counts[0])
    ]
  )
  is_exact = problem.is_static
  for all_bounds, table in ((kv_bounds, needed), (query_bounds, needed.T)):
    for index, row in enumerate(table):
      begin, end = all_bounds[:, index]
      visited = np.isin(np.arange(len(row)), np.arange(begin, end))
      assert not (row & ~visited).any()
      if is_exact and index < len(table) - 1:  # the last block starts early, so it may reach a little further
        assert (row == visited).all()


def test_bitwise_repeatable():
  call = cases.flash_call("everything")
  problem, operands = flash_problem(**call)
  first, second = (run(xla, problem, operands, *cotangents(call)) for _ in range(2))
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    assert (np.asarray(a) == np.asarray(b)).all()


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_keys_nobody_sees_hold_anything(garbage):
  call = cases.flash_call("lengths_causal_window")
  problem, operands = flash_problem(**call)
  clean = run(xla, problem, operands, *cotangents(call))
  past_end = np.arange(problem.kv_len) >= call["key_value_seq_lengths"][:, None]
  past_query = np.arange(problem.query_len) >= call["query_seq_lengths"][:, None]
  dirty_call = dict(call)
  for field, past in (("key", past_end), ("value", past_end), ("query", past_query)):
    dirty_call[field] = np.where(past[..., None, None], np.float32(garbage), call[field])
  d_out, d_lse = cotangents(call)
  d_out[past_query] = d_lse.swapaxes(1, 2)[past_query] = garbage
  dirty = run(xla, problem, flash_problem(**dirty_call)[1], d_out, d_lse)
  for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
    assert np.isfinite(b[np.asarray(b) != -np.inf]).all()
    assert (np.asarray(a) == np.asarray(b)).all()


@pytest.mark.parametrize("level", [-1e4, -2.45e5])
def test_far_negative_scores(level):
  # One key stands out, all others share a score far below zero; masked keys would win by far if they were seen.
  call = cases.flash_call("lengths")
  call["query"] = np.ones_like(call["query"])
  call["key"] = np.full_like(call["key"], level / call["query"].shape[-1])
  call["key"][:, 3] += 1.0
  past_end = np.arange(call["key"].shape[1]) >= call["key_value_seq_lengths"][:, None]
  call["key"][past_end] = 1e5
  problem, operands = flash_problem(**call, scale=1.0)
  out, lse, _ = run(xla, problem, operands, *cotangents(call))
  want_out, want_lse = oracle.flash(**call, scale=1.0)
  assert np.abs(want_out).max() > 0.1
  assert_close(out, want_out, factor=1e3)  # a float32 score of 1e5 is good to 1e-2 only
  assert_close(lse, want_lse.swapaxes(1, 2), factor=1e3)


def test_large_values_keep_finite_gradients():
  call = cases.flash_call("causal_gqa3")
  call.update(query=call["query"] * 5, key=call["key"] * 3, value=call["value"] * 3)
  problem, operands = flash_problem(**call)
  gradients, wanted = (run(kernel, problem, operands, *cotangents(call))[2] for kernel in (xla, reference))
  for got, want in zip(gradients[:3], wanted[:3], strict=True):
    assert_close(got, want, factor=50)


def test_values_in_one_to_two_do_not_reveal_padding():
  for rows, columns in ((8, 256), (256, 8), (15, 15)):
    rng = np.random.default_rng(rows)
    q, k, v = (rng.uniform(1, 2, (1, n, 1, 8)).astype(np.float32) for n in (rows, columns, columns))
    problem, operands = flash_problem(q, k, v)
    out, _ = jax.jit(functools.partial(xla.forward, problem, **TILES))(operands)
    assert_close(out, oracle.flash(q, k, v)[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_within_twice_the_plain_error(dtype):
  # FlashAttention's rule: max|out - ref| <= 2 max|plain - ref| + rounding, for the output and each gradient.
  call = cases.flash_call("causal_gqa3")
  call: dict[str, Any] = {k: jnp.asarray(v, dtype) if isinstance(v, np.ndarray) else v for k, v in call.items()}
  d_out, d_lse = cotangents(call)
  wide: dict[str, Any] = {k: v.astype(jnp.float32) if isinstance(v, jax.Array) else v for k, v in call.items()}
  problem, operands = flash_problem(**call)
  out, _, gradients = run(xla, problem, operands, d_out, 0 * d_lse)
  assert out.dtype == dtype and gradients.key.dtype == dtype
  want, _, wanted = run(reference, *flash_problem(**wide), d_out.astype(np.float32), 0 * d_lse)

  def plain(q, k, v):
    k, v = (jnp.repeat(x, 3, axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k * jnp.asarray(problem.scale, dtype))
    scores = jnp.where(jnp.tri(64, dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)

  plain_out, pull = jax.vjp(jax.jit(plain), call["query"], call["key"], call["value"])
  triples = [(out, plain_out, want), *zip(gradients[:3], pull(jnp.asarray(d_out)), wanted[:3], strict=True)]
  for got, low, ref in triples:
    got, low, ref = (np.asarray(x, np.float32) for x in (got, low, ref))
    rounding = np.abs(np.asarray(jnp.asarray(ref, dtype), np.float32) - ref).max()
    assert np.abs(got - ref).max() <= 2 * np.abs(low - ref).max() + 2 * rounding


def temporaries(kernel, tokens: int, *, is_backward: bool) -> int:
  """Bytes of compiled temporaries for causal attention over `tokens` tokens."""
  x = jax.ShapeDtypeStruct((1, tokens, 1, 16), jnp.float32)
  lse = jax.ShapeDtypeStruct((1, 1, tokens), jnp.float32)
  problem, _ = flash_problem(*[jnp.zeros(x.shape)] * 3, is_causal=True)
  tiles = dict(block_q=64, block_kv=64) if kernel is xla else {}

  def call(q, k, v, d_out, d_lse):
    operands = xla.FlashOperands(q, k, v)
    out, lse = kernel.forward(problem, operands, **tiles)
    return kernel.backward(problem, operands, out, lse, d_out, d_lse, **tiles)[:3] if is_backward else (out, lse)

  return cases.temporary_bytes(jax.jit(call).lower(x, x, x, x, lse))


@pytest.mark.parametrize("is_backward", [False, True])
def test_memory_grows_linearly_and_the_definitions_quadratically(is_backward):
  tiled = np.array([temporaries(xla, n, is_backward=is_backward) for n in (2048, 4096, 8192)])
  whole = np.array([temporaries(reference, n, is_backward=is_backward) for n in (1024, 2048)])
  assert (np.diff(np.log2(tiled)) < 1.2).all(), tiled
  assert np.diff(np.log2(whole))[0] > 1.8, whole
  assert tiled[-1] < whole[-1], (tiled, whole)
