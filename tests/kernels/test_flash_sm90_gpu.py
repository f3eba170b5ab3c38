"""The Hopper kernels on a GPU: no further from float32 than plain attention in the same precision."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_flash as pf
from paged_flash.kernels import reference
from paged_flash.kernels.arguments import flash_problem, target
from paged_flash.kernels.problem import is_hopper
from tests.kernels import mosaic_help
from tests.tolerances import assert_close

pytestmark = pytest.mark.gpu

MHA, GQA, MQA = (4, 4), (6, 2), (4, 1)
CAUSAL, WINDOW, BAND = (
  dict(is_causal=True),
  dict(is_causal=True, local_window_size=(100, 0)),
  dict(local_window_size=64),
)


class Case(NamedTuple):
  """Sizes, static arguments and how the arrays are drawn. Heads are (query, KV)."""

  query_len: int
  kv_len: int
  heads: tuple[int, int]
  dims: int | tuple[int, int]
  options: dict[str, Any] = {}
  batch: int = 2
  dtype: str = "bfloat16"
  draw: str = "normal"  # "large": Q x 5, K and V x 3; "positive": uniform in [1, 2]


CASES = {
  "1x1": Case(1, 1, MHA, 64, CAUSAL),
  "239x1": Case(239, 1, GQA, 128, CAUSAL),
  "799x3": Case(799, 3, MQA, 64, CAUSAL),
  "113x203": Case(113, 203, GQA, 96, WINDOW),
  "128x217": Case(128, 217, MHA, 128, CAUSAL),
  "113x211": Case(113, 211, MQA, 256, CAUSAL),
  "108x256": Case(108, 256, MQA, 128, WINDOW),
  "384x256": Case(384, 256, GQA, 64, CAUSAL),
  "640x128": Case(640, 128, MHA, 96, BAND),
  "1023x1024": Case(1023, 1024, GQA, 128, BAND, dtype="float16"),
  "1024x1023": Case(1024, 1023, MHA, 64, WINDOW),
  "4224-causal-64": Case(4224, 4224, GQA, 64, CAUSAL, dtype="float16"),
  "4224-causal-128": Case(4224, 4224, GQA, 128, CAUSAL),
  "4224-causal-256": Case(4224, 4224, MQA, 256, CAUSAL, batch=1),
  "4224-window-128": Case(4224, 4224, GQA, 128, dict(is_causal=True, local_window_size=(1000, 0)), batch=1),
  "4224-segments-64": Case(4224, 4224, GQA, 64, dict(is_causal=True, segment_ids="ids")),
  "4224-lengths-128": Case(4224, 3000, GQA, 128, dict(query_seq_lengths="q_lens", key_value_seq_lengths="kv_lens")),
  "8192-cluster": Case(8192, 8192, (2, 1), 128, batch=1),
  "8x256-positive": Case(8, 256, MHA, 64, draw="positive"),
  "256x8-positive": Case(256, 8, MHA, 128, draw="positive"),
  "7x8-positive": Case(7, 8, MHA, 64, draw="positive"),
  "15x16-positive": Case(15, 16, MHA, 128, draw="positive"),
  "15x15-positive": Case(15, 15, MHA, 64, CAUSAL, draw="positive"),
  "2000x2048-64": Case(2000, 2048, GQA, 64, dict(sinks="sinks")),
  "1500x1300-64": Case(1500, 1300, MHA, 64, BAND, dtype="float16"),
  "large-64": Case(1001, 1001, GQA, 64, CAUSAL, draw="large"),
  "large-128": Case(1001, 1001, GQA, 128, draw="large"),
  "cap1-group7": Case(333, 333, (7, 1), 64, CAUSAL | dict(logits_soft_cap=1.0)),
  "cap30-group20": Case(333, 400, (20, 1), 128, CAUSAL | dict(logits_soft_cap=30.0)),
  "cap50-sinks": Case(400, 400, (14, 2), 64, WINDOW | dict(logits_soft_cap=50.0, sinks="sinks")),
  "192-value-128": Case(700, 900, MHA, (192, 128), CAUSAL),
  "32-value-256": Case(333, 400, GQA, (32, 256), CAUSAL),
  "1001-160": Case(1001, 777, GQA, 160, WINDOW),
  "1023x1024-192": Case(1023, 1024, GQA, 192, BAND, dtype="float16"),
  "2048-256": Case(2048, 2048, MHA, 256),
  "2048-segments-256": Case(2048, 2048, GQA, 256, dict(is_causal=True, segment_ids="ids"), dtype="float16"),
  "4224-lengths-256": Case(4224, 3000, MQA, 256, dict(query_seq_lengths="q_lens", key_value_seq_lengths="kv_lens")),
  "cap30-sinks-192": Case(400, 400, (14, 2), 192, WINDOW | dict(logits_soft_cap=30.0, sinks="sinks")),
  "128-value-64": Case(700, 900, GQA, (128, 64), CAUSAL),
}
DEAD_ROWS = ("239x1", "799x3", "384x256", "640x128", "1024x1023", "1500x1300-64", "1001-160")
DEAD_ROWS += ("4224-lengths-128", "4224-lengths-256")


@pytest.fixture(autouse=True)
def needs_hopper():
  if not is_hopper(target()):
    pytest.skip(f"needs a Hopper GPU, not {target()}")


def drawn(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
  """(arrays, static arguments) of `flash_attention`."""
  query_len, kv_len, (heads, kv_heads), dims, options, batch, dtype, draw = case
  head_dim, value_dim = dims if isinstance(dims, tuple) else (dims, dims)
  rng = np.random.default_rng(query_len + kv_len)
  factors = dict(query=5.0, key=3.0, value=3.0) if draw == "large" else dict(query=1.0, key=1.0, value=1.0)
  shapes = (
    (batch, query_len, heads, head_dim),
    (batch, kv_len, kv_heads, head_dim),
    (batch, kv_len, kv_heads, value_dim),
  )
  pull = rng.random if draw == "positive" else rng.standard_normal
  arrays = {
    name: jnp.asarray(factor * pull(shape, np.float32) + (draw == "positive"), dtype)
    for (name, factor), shape in zip(factors.items(), shapes, strict=True)
  }
  others = dict(
    ids=np.sort(rng.integers(0, 6, (batch, query_len)), 1).astype(np.int32),
    q_lens=np.array([query_len - 300, 0, query_len][:batch], np.int32),
    kv_lens=np.array([kv_len - 77, kv_len, 0][:batch], np.int32),
    sinks=rng.standard_normal(heads).astype(np.float32),
  )
  arrays |= {name: jnp.asarray(others[x]) for name, x in options.items() if isinstance(x, str)}
  return arrays, {name: x for name, x in options.items() if not isinstance(x, str)}


def with_gradients(f, arrays, cotangents):
  """out, lse [B, T, H] and the gradients of the float arrays."""
  floats = {name: x for name, x in arrays.items() if x.dtype != jnp.int32}
  (out, lse), pull = jax.vjp(lambda floats: f(arrays | floats), floats)
  d_out, d_lse = cotangents
  return dict(out=out, lse=lse) | pull((d_out.astype(out.dtype), d_lse))[0]


def kernel(options: tuple, arrays: dict[str, Any]):
  return pf.flash_attention(**arrays, **dict(options), return_residual=True, implementation="sm90")


@functools.partial(jax.jit, static_argnums=0)
def ours(options: tuple, arrays, cotangents):
  return with_gradients(functools.partial(kernel, options), arrays, cotangents)


@functools.partial(jax.jit, static_argnums=0)
def theirs(options: tuple, arrays, cotangents):
  """What the definition gives in float32, and plain attention in the arrays' precision."""

  def run(f, arrays):
    out, lse = f(*flash_problem(**arrays, **dict(options)))
    return out, lse.swapaxes(1, 2)

  wide = {name: x if x.dtype == jnp.int32 else x.astype(jnp.float32) for name, x in arrays.items()}
  want = with_gradients(functools.partial(run, reference.forward), wide, cotangents)
  return want, with_gradients(functools.partial(run, mosaic_help.plain), arrays, cotangents)


def cotangents_of(case: Case) -> tuple[Any, Any]:
  """Of out, and of lse [B, T, H]."""
  value_dim = case.dims[1] if isinstance(case.dims, tuple) else case.dims
  rng = np.random.default_rng(1)
  shape = case.batch, case.query_len, case.heads[0]
  d_out = jnp.asarray(rng.standard_normal((*shape, value_dim), np.float32), case.dtype)
  return d_out, jnp.asarray(rng.standard_normal(shape, np.float32))


@pytest.mark.parametrize("name", CASES)
def test_errors_are_those_of_rounding(name):
  case = CASES[name]
  arrays, options = drawn(case)
  options, cotangents = tuple(options.items()), cotangents_of(case)
  got, again = (ours(options, arrays, cotangents) for _ in range(2))
  want, low = theirs(options, arrays, cotangents)
  assert got.keys() == want.keys()
  has_cap = "logits_soft_cap" in case.options
  for field, x in got.items():
    assert (x == again[field]).all(), f"{field} differs from run to run"
    if field == "lse":
      assert_close(x, want[field], factor=4 if case.draw == "normal" else 20)
      continue
    is_gradient = field != "out"
    factor, extra = (3, 3e-4 * is_gradient + 1e-5) if has_cap else (2, 1e-5)
    if case.draw != "normal" and is_gradient:
      factor, extra = 5, 1e-3
    mosaic_help.assert_rounding(field, x, want[field], low[field], factor=factor, extra=extra)
  dead = want["lse"] == -jnp.inf
  assert dead.any() == (name in DEAD_ROWS)
  assert (got["out"][dead] == 0).all() and (got["query"][dead] == 0).all()


LENGTHS = Case(500, 700, GQA, 128, CAUSAL | dict(query_seq_lengths="q_lens", key_value_seq_lengths="kv_lens"), batch=3)


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_padding_may_hold_anything(garbage, head_dim):
  """Sequences of no queries, and of no keys, among them."""
  case = LENGTHS._replace(dims=head_dim)
  arrays, options = drawn(case)
  options, (d_out, d_lse) = tuple(options.items()), cotangents_of(case)
  past_query = jnp.arange(500) >= arrays["query_seq_lengths"][:, None]
  past_key = jnp.arange(700) >= arrays["key_value_seq_lengths"][:, None]

  def planted(x, past):
    return jnp.where(past.reshape(*past.shape, *[1] * (x.ndim - 2)), garbage, x).astype(x.dtype)

  dirty = {name: planted(arrays[name], past_key) for name in ("key", "value")}
  dirty = arrays | dirty | {"query": planted(arrays["query"], past_query)}
  got = ours(options, dirty, (planted(d_out, past_query), planted(d_lse, past_query)))
  want = ours(options, arrays, (d_out, d_lse))
  for field, x in want.items():
    assert (x == got[field]).all(), field
    assert field == "lse" or jnp.isfinite(x).all(), field
  for sequence in (1, 2):
    assert all((want[field][sequence] == 0).all() for field in ("out", "query", "key", "value"))
    assert (want["lse"][sequence] == -jnp.inf).all()


@pytest.mark.parametrize("query_len, kv_len", [(0, 8), (8, 0)])
def test_nothing_to_attend(query_len, kv_len):
  arrays, _ = drawn(Case(query_len, kv_len, MHA, 64))
  got = ours((), arrays, cotangents_of(Case(query_len, kv_len, MHA, 64)))
  assert all((x == 0).all() for name, x in got.items() if name != "lse")
  assert (got["lse"] == -jnp.inf).all()


@pytest.mark.parametrize("level", [-1e4, -2.45e5])
def test_far_negative_scores(level):
  """One key stands out, all others share a score far below zero; keys past the length would win if they were seen."""
  arrays, _ = drawn(LENGTHS)
  key = jnp.full_like(arrays["key"], level / 128).at[:, 3].add(64)
  past = jnp.arange(700) >= arrays["key_value_seq_lengths"][:, None]
  arrays |= dict(query=jnp.ones_like(arrays["query"]), key=jnp.where(past[..., None, None], 1e5, key).astype(key.dtype))
  options, cotangents = (("scale", 1.0),), cotangents_of(LENGTHS)
  got, (want, low) = ours(options, arrays, cotangents), theirs(options, arrays, cotangents)
  assert jnp.abs(want["out"]).max() > 0.1
  mosaic_help.assert_rounding("out", got["out"], want["out"], low["out"])
  assert_close(got["lse"], want["lse"], factor=20)
  assert all(jnp.isfinite(got[field]).all() for field in ("query", "key", "value"))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_ten_thousand_repeats(head_dim):
  case = Case(600, 600, GQA, head_dim, CAUSAL)
  arrays, options = drawn(case)
  options, cotangents = tuple(options.items()), cotangents_of(case)
  first = ours(options, arrays, cotangents)

  @jax.jit
  def count(differences, arrays, first):
    again = ours(options, arrays, cotangents)
    return differences + sum((x != first[field]).sum() for field, x in again.items())

  differences = jnp.int32(0)
  for _ in range(10_000):
    differences = count(differences, arrays, first)
  assert differences == 0


def test_any_layout_and_dirty_memory():
  """Arrays transposed inside the program, broadcast, mapped; results in memory that held NaN."""
  case = Case(300, 300, GQA, 64, CAUSAL)
  arrays, options = drawn(case)
  options = tuple(options.items())
  arrays["value"] = jnp.broadcast_to(arrays["value"][:, :, :1], arrays["value"].shape)
  cotangents = cotangents_of(case)
  want = ours(options, arrays, cotangents)
  turned = {name: x.transpose(3, 2, 1, 0) for name, x in arrays.items()}
  back = jax.jit(
    lambda turned: ours(options, {name: x.transpose(3, 2, 1, 0) for name, x in turned.items()}, cotangents)
  )
  mapped = jax.jit(jax.vmap(lambda query: ours(options, arrays | {"query": query}, cotangents)))
  for x in [jnp.full(2**26, jnp.nan) for _ in range(16)]:
    x.block_until_ready().delete()
  got, batched = back(turned), jax.tree.map(lambda x: x[1], mapped(jnp.stack([arrays["query"] * 2, arrays["query"]])))
  _, low = theirs(options, arrays, cotangents)
  for field, x in want.items():
    assert (x == got[field]).all(), field
    if field in ("out", "lse"):
      assert (x == batched[field]).all(), field
    else:  # the order of additions follows the heads of the whole batch, which a mapped axis is part of
      mosaic_help.assert_rounding(field, batched[field], x.astype(jnp.float32), low[field], factor=1)


def test_gradients_without_the_lse():
  case = Case(300, 300, GQA, 128, CAUSAL)
  arrays, options = drawn(case)
  options, (d_out, d_lse) = tuple(options.items()), cotangents_of(case)

  @jax.jit
  def plain_call(arrays):
    run = lambda arrays: pf.flash_attention(**arrays, **dict(options), implementation="sm90")  # noqa: E731
    return jax.vjp(run, arrays)[1](d_out)[0]

  got, want = plain_call(arrays), ours(options, arrays, (d_out, jnp.zeros_like(d_lse)))
  for field, x in got.items():
    assert (x == want[field]).all(), field
