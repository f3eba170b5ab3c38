"""The public ops: the numbers of `jax.nn.dot_product_attention`, JAX transformations, choice of kernel, bad input."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_flash.attention import KERNELS, choose, explain, flash_attention, paged_attention
from paged_flash.kernels.arguments import flash_problem
from tests.kernels import cases, oracle
from tests.tolerances import assert_close

jax_nn = functools.partial(jax.nn.dot_product_attention, implementation="xla")


def qkv(seed=0, shape=(2, 20, 4, 8), num_kv_heads=2, kv_len=None):
  rng = np.random.default_rng(seed)
  batch, rows, heads, head_dim = shape
  kv_shape = (batch, kv_len or rows, num_kv_heads, head_dim)
  return cases.normal(rng, *shape), cases.normal(rng, *kv_shape), cases.normal(rng, *kv_shape)


def normal(*shape):
  return cases.normal(np.random.default_rng(9), *shape)


LENS = np.array([20, 13], np.int32)
SWAPS = {
  "plain": {},
  "causal": dict(is_causal=True),
  "scale": dict(scale=0.3),
  "bias": dict(bias=normal(1, 4, 20, 20)),
  "bias_rank_3": dict(bias=normal(4, 20, 20), is_causal=True),
  "mask": dict(mask=np.tri(20, dtype=bool)[None, None] | (normal(2, 1, 20, 20) > 1)),
  "window": dict(local_window_size=3),
  "window_causal": dict(local_window_size=(4, 1), is_causal=True),
  "kv_lengths": dict(key_value_seq_lengths=LENS),
  "kv_lengths_causal": dict(key_value_seq_lengths=LENS, is_causal=True),
  "lengths_causal": dict(query_seq_lengths=LENS, key_value_seq_lengths=LENS, is_causal=True),
}


@pytest.mark.parametrize("name", SWAPS)
def test_same_numbers_as_jax_nn(name):
  @functools.partial(jax.jit, static_argnums=0)
  def run(op, arrays, cotangent):
    out, pull = jax.vjp(lambda q, k, v: op(q, k, v, **SWAPS[name]), *arrays)
    return out, pull(cotangent)

  out, gradients = run(flash_attention, qkv(), normal(2, 20, 4, 8))
  want, wanted = run(jax_nn, qkv(), normal(2, 20, 4, 8))
  assert_close(out, want)
  for got, want in zip(gradients, wanted, strict=True):
    assert_close(got, want, factor=4)


def test_jax_nn_forms():
  q, k, v = qkv()
  bias = normal(4, 20, 20)
  out, lse = flash_attention(q[0], k[0], v[0], bias, None, return_residual=True)  # unbatched, positional
  want, want_lse = jax_nn(q[0], k[0], v[0], bias[None], None, return_residual=True)
  assert_close(out, want)
  assert_close(lse, want_lse)
  assert out.shape == q[0].shape and lse.shape == (20, 4) and lse.dtype == jnp.float32
  cross = qkv(kv_len=33)
  assert_close(flash_attention(*cross), jax_nn(*cross))


def test_values_of_another_width():
  q, k, v = qkv(kv_len=33)
  wide = np.concatenate([v, 2 * v, v[..., :3]], -1)
  want, want_lse = flash_attention(q, k, v, return_residual=True)
  out, lse = flash_attention(q, k, wide, return_residual=True)
  assert_close(out, np.concatenate([want, 2 * want, want[..., :3]], -1))
  assert_close(lse, want_lse)
  assert_close(flash_attention(q[0], k[0], wide[0]), out[0])
  assert flash_attention(q, k[:, :0], wide[:, :0]).shape == out.shape
  assert "head_dim=8 value_dim=19 dtype=float32" in explain(flash_attention, q, k, wide)


def test_bottom_right_causal_when_lengths_differ():
  q, k, v = qkv(shape=(1, 5, 2, 8), num_kv_heads=1, kv_len=9)
  last = flash_attention(q, k, v, is_causal=True)
  for i in range(5):
    alone = flash_attention(q[:, i : i + 1], k[:, : 5 + i], v[:, : 5 + i])
    assert_close(last[:, i : i + 1], alone)


@pytest.mark.parametrize("shape", [(1, 4, 20, 33), (2, 1, 1, 33), (20, 1)], ids=str)
def test_bias_gradient_has_the_shape_of_the_bias(shape):
  arrays = qkv(kv_len=33)
  bias, cotangent = normal(*shape), normal(2, 20, 4, 8)

  def loss(bias, implementation):
    return (flash_attention(*arrays, bias, implementation=implementation) * cotangent).sum()

  got, want = (jax.grad(loss)(bias, name) for name in ("xla", "reference"))
  assert got.shape == shape
  assert_close(got, want, factor=4)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_cotangent_of_the_lse(implementation):
  q, k, v = qkv()
  sinks = normal(4)

  def loss(q, k, v, sinks):
    _, lse = flash_attention(q, k, v, sinks=sinks, is_causal=True, return_residual=True, implementation=implementation)
    return jnp.square(lse).sum()

  def plain(q, k, v, sinks):
    scores = jnp.einsum("bthd,bshd->bths", q, jnp.repeat(k, 2, axis=2)) / np.sqrt(8)
    scores = jnp.where(jnp.tri(20, dtype=bool)[:, None], scores, -jnp.inf)
    sinks = jnp.broadcast_to(sinks[:, None], (2, 20, 4, 1))
    return jnp.square(jax.nn.logsumexp(jnp.concatenate([scores, sinks], -1), axis=-1)).sum() + 0 * v.sum()

  got, want = (jax.grad(f, (0, 1, 2, 3))(q, k, v, sinks) for f in (loss, plain))
  for a, b in zip(got, want, strict=True):
    assert_close(a, b, factor=20)


def test_views_and_broadcasts_equal_copies():
  q, k, v = qkv()
  want = flash_attention(q, k, v)
  assert_close(flash_attention(jnp.asarray(q.swapaxes(1, 2)).swapaxes(1, 2), k[::-1][::-1], v), want)
  one = np.broadcast_to(k[:1, :, :1], k.shape)
  assert_close(flash_attention(q, one, v), flash_attention(q, one.copy(), v))


@pytest.mark.parametrize("sinks", [None, np.array([0, 1, 2, 3], np.float32)], ids=["no_sinks", "sinks"])
def test_empty_axes(sinks):
  q, k, v = qkv()
  out, lse = flash_attention(q, k[:, :0], v[:, :0], sinks=sinks, return_residual=True)
  assert out.shape == q.shape and not out.any()
  assert (lse == (-np.inf if sinks is None else sinks)).all()
  assert flash_attention(q[:, :0], k, v, sinks=sinks).shape == (2, 0, 4, 8)
  assert flash_attention(q[:0], k[:0], v[:0], sinks=sinks).shape == (0, 20, 4, 8)
  gradient = jax.grad(lambda q: flash_attention(q, k[:, :0], v[:, :0], sinks=sinks).sum())(q)
  assert gradient.shape == q.shape and not gradient.any()
  call = cases.paged_call(kv_lens=[3, 4])
  call["query"], call["query_starts"] = call["query"][:0], np.zeros(3, np.int32)
  assert paged_attention(**call).shape == (0, 6, 8)


def test_default_tiles_on_several_blocks():
  q, k, v = qkv(shape=(1, 300, 2, 8), num_kv_heads=1, kv_len=420)
  call: dict[str, Any] = dict(query=q, key=k, value=v, is_causal=True, local_window_size=(200, 0))
  out, lse = flash_attention(**call, return_residual=True)
  want_out, want_lse = oracle.flash(**call)
  assert_close(out, want_out)
  assert_close(lse, want_lse)
  paged = cases.paged_call(kv_lens=[900, 0, 129], page_size=16, pages_per_slot=57, heads=(4, 2, 8))
  out, lse = paged_attention(**paged, return_residual=True)
  want_out, want_lse = oracle.paged(**paged)
  assert_close(out, want_out)
  assert_close(lse, want_lse)


def test_paged_attention_runs_to_its_capacity_and_no_further():
  call = cases.paged_call(kv_lens=[48, 3])  # 12 pages of 4 tokens
  assert np.isfinite(paged_attention(**call)).all()
  call["kv_lens"] = cases.i32(49, 3)
  with pytest.raises(ValueError, match=r"kv_lens must be within 0..48, got \[49, 3\]"):
    paged_attention(**call)


def test_paged_attention_is_traced_once():
  call = cases.paged_call(kv_lens=[5, 3])
  traces = []

  @jax.jit
  def step(call):
    traces.append(1)
    return paged_attention(**call)

  step(call)
  step(dict(call, kv_lens=cases.i32(7, 0), pages=call["pages"][::-1]))
  assert len(traces) == 1


def test_paged_attention_has_no_gradient():
  call = cases.paged_call(kv_lens=[5, 3])
  with pytest.raises(NotImplementedError, match="train with flash_attention"):
    jax.grad(lambda q: paged_attention(**{**call, "query": q}).sum())(call["query"])


class Refusing:
  """A kernel that supports nothing."""

  @staticmethod
  def supports(problem, stage="forward"):
    return f"head_dim must be 128, got {problem.head_dim}"


def test_choice_of_kernel(monkeypatch):
  problem, _ = flash_problem(*qkv())
  assert choose(problem, None) == ("xla", {"sm90": KERNELS["sm90"].supports(problem)})
  assert choose(problem, "reference") == ("reference", {})
  monkeypatch.setattr("paged_flash.attention.KERNELS", {"picky": Refusing, "xla": KERNELS["xla"]})
  assert choose(problem, None) == ("xla", {"picky": "head_dim must be 128, got 8"})
  with pytest.raises(ValueError, match="'picky' does not support this call: head_dim must be 128, got 8"):
    flash_attention(*qkv(), implementation="picky")
  assert "  picky: head_dim must be 128, got 8" in explain(flash_attention, *qkv())
  monkeypatch.setattr("paged_flash.attention.KERNELS", {"picky": Refusing})
  with pytest.raises(ValueError, match="no implementation supports this call: picky: head_dim must be 128"):
    flash_attention(*qkv())


def test_forward_and_backward_have_tiles_of_their_own(monkeypatch):
  stages = []

  def tiles(problem, implementation, stage):
    stages.append(stage)
    return dict(block_q=8, block_kv=16)

  monkeypatch.setattr("paged_flash.tuning.tiles", tiles)
  q, k, v = qkv(shape=(1, 18, 2, 8))
  jax.grad(lambda q: flash_attention(q, k, v, implementation="xla").sum())(q)
  assert set(stages) == {"forward", "backward"}


def test_explain():
  text = explain(flash_attention, *qkv(), is_causal=True, local_window_size=4, return_residual=True)
  assert text.splitlines() == [
    "flash_attention: batch=2 query_len=20 kv_len=20 num_heads=4 num_kv_heads=2 head_dim=8 dtype=float32 is_causal "
    "window=(4,4)",
    "  runs xla, block_q=128 block_kv=128",
    f"  sm90: {KERNELS['sm90'].supports(flash_problem(*qkv())[0])}",
    "  reference: not needed, xla comes first",
  ]
  call = cases.paged_call(kv_lens=[5, 3])
  text = explain(paged_attention, **call, implementation="reference")
  assert "runs reference, no tiles\n  sm90: reference was named\n  xla: reference was named" in text
  with pytest.raises(ValueError, match="op must be flash_attention or paged_attention"):
    explain(jax.nn.dot_product_attention, *qkv())


Q, K, V = qkv()
FLASH_ERRORS = {
  r"query must be \[B, T, H, D\], got shape \(20, 4\)": dict(query=Q[0, :, :, 0]),
  r"key must be \[S, K, D\], got shape \(2, 20, 2, 8\)": dict(query=Q[0]),
  r"query must be float32 or bfloat16 or float16, got int32": dict(query=Q.astype(np.int32)),
  r"key must be float32, got bfloat16": dict(key=jnp.asarray(K, jnp.bfloat16)),
  r"key must have shape \(2, 20, 2, 8\), got \(2, 20, 2, 7\)": dict(key=K[..., :7]),
  r"value must have shape \(2, 20, 2, 8\), got \(2, 19, 2, 8\)": dict(value=V[:, 1:]),
  r"value must have a last dimension of at least 1, got 0": dict(value=V[..., :0]),
  r"query must have a multiple of the 2 key/value heads, got 3 heads": dict(query=Q[:, :, :3]),
  r"bias must broadcast to \[B, H, T, S\] = \(2, 4, 20, 20\), got shape \(3, 4, 20, 20\)": dict(
    bias=normal(3, 4, 20, 20)
  ),
  r"mask must be bool, got float32": dict(mask=normal(20, 20)),
  r"query_seq_lengths must have shape \(2,\), got \(3,\)": dict(query_seq_lengths=cases.i32(1, 2, 3)),
  r"key_value_seq_lengths must be int32, got float32": dict(key_value_seq_lengths=np.array([1, 2], np.float32)),
  r"key_value_seq_lengths must be within 0..20, got \[21, 2\]": dict(key_value_seq_lengths=cases.i32(21, 2)),
  r"local_window_size must be .*, got \(1, 2, 3\)": dict(local_window_size=(1, 2, 3)),
  r"local_window_size must be .*, got -1": dict(local_window_size=-1),
  r"segment_ids of the keys must have shape \(2, 20\), got \(2, 19\)": dict(
    segment_ids=(np.zeros((2, 20), np.int32), np.zeros((2, 19), np.int32))
  ),
  r"logits_soft_cap must be positive, got 0.0": dict(logits_soft_cap=0),
  r"scale must be a finite static number, got nan": dict(scale=float("nan")),
  r"sinks must have shape \(4,\), got \(2,\)": dict(sinks=normal(2)),
  r"implementation must be one of sm90, xla, reference or None, got 'xal'; did you mean 'xla'\?": dict(
    implementation="xal"
  ),
  r"implementation must be one of sm90, xla, reference or None, got 'cudnn'$": dict(implementation="cudnn"),
}


@pytest.mark.parametrize("message", FLASH_ERRORS)
def test_flash_attention_says_what_is_wrong(message):
  with pytest.raises(ValueError, match=message):
    flash_attention(**{"query": Q, "key": K, "value": V, **FLASH_ERRORS[message]})


PAGED = cases.paged_call(kv_lens=[9, 5], query_lens=[3, 1], num_tokens=6, max_query_len=3)
PAGED_ERRORS: dict[str, dict[str, Any]] = {
  r"query must be \[T, H, D\], got shape \(6, 6\)": dict(query=PAGED["query"][..., 0]),
  r"k_pages must be \[N, page_size, K, D\], got shape": dict(k_pages=PAGED["k_pages"][0]),
  r"k_pages must have shape \(48, 4, 2, 8\), got \(48, 4, 2, 7\)": dict(k_pages=PAGED["k_pages"][..., :7]),
  r"k_pages must be float32, got int8": dict(k_pages=np.zeros((48, 4, 2, 8), np.int8)),
  r"v_pages must have shape": dict(v_pages=PAGED["v_pages"][1:]),
  r"pages must be \[B, P\], got shape \(12,\)": dict(pages=PAGED["pages"][0]),
  r"pages must be int32, got float32": dict(pages=PAGED["pages"].astype(np.float32)),
  r"pages must be within 0..47 for the 9 tokens of row 0, got \[ 1 48  2\]": dict(
    pages=np.array([[1, 48, 2] + [-1] * 9, [3, 4] + [-1] * 10], np.int32)
  ),
  r"kv_lens must have shape \(2,\), got \(3,\)": dict(kv_lens=cases.i32(1, 2, 3)),
  r"max_query_len must be a static int of at least 1, got 0": dict(max_query_len=0),
  r"min_query_len must be a static int from 1 to max_query_len = 3, got 4": dict(min_query_len=4),
  r"query_starts must leave each sequence at most max_query_len = 2 tokens": dict(max_query_len=2),
  r"query_starts must rise from 0 to at most T = 6, got \[0, 3, 7\]": dict(query_starts=cases.i32(0, 3, 7)),
  r"query_starts must have shape \(3,\)": dict(query_starts=cases.i32(0, 3)),
  r"kv_lens must count the query tokens, got \[2, 5\] for \[3, 1\]": dict(kv_lens=cases.i32(2, 5)),
  r"without query_starts there must be one query token for each sequence": dict(query_starts=None),
  r"k_scales and v_scales must be given together": dict(k_scales=np.ones((48, 4, 2), np.float32)),
  r"shared_prefixes must be a pair \(leaders, num_pages\), got 3": dict(shared_prefixes=3),
  r"shared_prefixes\[1\] must have shape \(2,\), got \(1,\)": dict(shared_prefixes=(cases.i32(0, 1), cases.i32(0))),
  r"shared_prefixes\[0\] must name sequences 0..1, got 2 for sequence 1": dict(
    shared_prefixes=(cases.i32(0, 2), cases.i32(0, 0))
  ),
  r"shared_prefixes\[1\] must count leading full pages that sequence 1 has in common with its leader 0, got 1": dict(
    shared_prefixes=(cases.i32(0, 0), cases.i32(0, 1))
  ),
  r"shared_prefixes\[1\] must count .* that sequence 1 has in common with its leader 1, got 2": dict(
    shared_prefixes=(cases.i32(0, 1), cases.i32(2, 2))
  ),
}


@pytest.mark.parametrize("message", PAGED_ERRORS)
def test_paged_attention_says_what_is_wrong(message):
  with pytest.raises(ValueError, match=message):
    paged_attention(**{**PAGED, **PAGED_ERRORS[message]})
