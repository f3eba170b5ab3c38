"""The Hopper kernels of paged attention on a GPU: what the definition gives in float32, and the same every time."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_flash as pf
from paged_flash import tuning
from paged_flash.cache import prefix
from paged_flash.kernels import paged_decode_sm90, paged_sm90, reference
from paged_flash.kernels.arguments import paged_problem, target
from paged_flash.kernels.problem import is_hopper
from tests.tolerances import assert_close

pytestmark = pytest.mark.gpu


class Case(NamedTuple):
  """Lengths, (H, K, D), page size, static arguments; query tokens of each sequence if not one."""

  kv_lens: list[int]
  heads: tuple[int, int, int]
  page_size: int = 16
  options: dict[str, Any] = {}
  query_lens: list[int] | None = None
  dtype: str = "bfloat16"
  quantised: str | None = None


LENS = [1, 54, 97, 512, 513, 2048, 0, 5000, 16384]
EVERYTHING = dict(local_window_size=1000, logits_soft_cap=30.0, sinks="sinks")
CASES = {f"page{page}": Case(LENS, (8, 2, 128), page) for page in (8, 16, 32, 64, 128, 256)}
CASES |= {f"page{page}-{dim}": Case(LENS, (8, 2, dim), page) for dim in (64, 256) for page in (8, 64, 256)}
CASES |= {f"group{group}": Case(LENS, (2 * group, 2, 64), dtype="float16") for group in (1, 3, 7, 8, 20, 64)}
CASES |= {f"window-{dim}": Case(LENS, (8, 2, dim), options=dict(local_window_size=300)) for dim in (64, 128, 256)}
CASES |= {
  "everything": Case(LENS, (8, 2, 128), 8, EVERYTHING, [1, 4, 2, 8, 0, 3, 0, 16, 1]),
  "speculative-256": Case(LENS, (4, 4, 256), 32, {}, [1, 54, 64, 8, 0, 3, 0, 16, 1]),
  "cap1": Case(LENS, (8, 2, 64), options=dict(logits_soft_cap=1.0)),
  "many": Case(LENS * 30, (9, 3, 64)),
  **{
    f"{quantised}-{page}-{dim}": Case(LENS, (8, 2, dim), page, quantised=quantised)
    for quantised in ("int8", "float8_e4m3fn", "float8_e5m2")
    for page, dim in ((8, 64), (16, 128), (256, 128), (64, 256))
  },
  "int8-everything": Case(LENS, (9, 3, 128), 8, EVERYTHING, [1, 4, 2, 8, 0, 3, 0, 16, 1], quantised="int8"),
  "int8-long": Case([100_000] + [100] * 30, (8, 2, 128), quantised="int8"),
  "long": Case([100_000] + [100] * 30, (8, 2, 128)),
}

# Chunks of a prompt, whole prompts, and decode tokens between them.
CHUNKS: dict[str, Any] = dict(kv_lens=[3000, 1, 700, 0, 2048, 300, 129], query_lens=[1500, 1, 700, 0, 70, 100, 129])
CASES |= {
  f"chunks-page{page}-{dim}": Case(**CHUNKS, heads=(8, 2, dim), page_size=page)
  for page, dim in ((8, 128), (16, 128), (128, 128), (256, 128), (8, 64), (64, 64), (8, 256), (64, 256))
}
CASES |= {
  f"chunks-group{group}": Case(**CHUNKS, heads=(2 * group, 2, 64), dtype="float16") for group in (1, 3, 7, 20, 32)
}
# Few of them: the definition's scores grow with heads and squared lengths.
CASES |= {"chunks-group64": Case([400, 129], (128, 2, 64), query_lens=[150, 129], dtype="float16")}
CASES |= {
  f"chunks-window-{dim}": Case(**CHUNKS, heads=(8, 2, dim), options=dict(local_window_size=200))
  for dim in (64, 128, 256)
}
CASES |= {
  "chunks-everything": Case(**CHUNKS, heads=(9, 3, 128), page_size=8, options=EVERYTHING),
  "chunks-everything-256": Case(**CHUNKS, heads=(4, 4, 256), page_size=32, options=EVERYTHING),
  "chunks-mixed": Case([4000] * 40 + [900, 50, 1500], (9, 3, 64), query_lens=[1, 2] * 20 + [512, 33, 44]),
  "chunks-alone": Case(**CHUNKS, heads=(8, 2, 128), options=dict(min_query_len=70)),  # for one has a single token
  "chunks-of-decode": Case([100, 200, 300], (8, 2, 128), options=dict(max_query_len=100), query_lens=[1, 1, 1]),
}


@pytest.fixture(autouse=True)
def needs_hopper():
  if not is_hopper(target()):
    pytest.skip(f"needs a Hopper GPU, not {target()}")


def drawn(case: Case, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
  """(arrays, static arguments) of a call: scattered pages of a pool twice as large, NaN wherever no token lies."""
  rng = np.random.default_rng(seed)
  num_heads, num_kv_heads, head_dim = case.heads
  batch, size = len(case.kv_lens), case.page_size
  pages_per_slot = -(-max(case.kv_lens) // size)
  counts = [-(-n // size) for n in case.kv_lens]
  num_pages = 2 * sum(counts)
  free = rng.permutation(num_pages)
  pages = rng.choice([-1, 2**30], (batch, pages_per_slot)).astype(np.int32)
  owned = np.zeros((num_pages, size), bool)
  for b, (kv_len, count) in enumerate(zip(case.kv_lens, counts, strict=True)):
    pages[b, :count], free = free[:count], free[count:]
    for page, left in zip(pages[b, :count], range(kv_len, 0, -size), strict=True):
      owned[page, :left] = True
  key = jax.random.key(seed)
  pools = (jax.random.normal(k, (num_pages, size, num_kv_heads, head_dim), case.dtype) for k in jax.random.split(key))
  scales = {}
  if case.quantised:  # NaN, too, wherever no token lies, but for int8, which has none
    k_pages, v_pages, *both = quantise(case.quantised, jnp.asarray(owned), *pools)
    scales = dict(zip(("k_scales", "v_scales"), both, strict=True))
  else:
    k_pages, v_pages = (jnp.where(owned[..., None, None], pool, jnp.nan).astype(case.dtype) for pool in pools)
  query_lens = case.query_lens or [1] * batch
  tokens = sum(query_lens) + (3 if case.query_lens else 0)
  query = jnp.asarray(rng.standard_normal((tokens, num_heads, head_dim), np.float32), case.dtype)
  lens = jnp.asarray(case.kv_lens, jnp.int32)
  arrays = dict(query=query, k_pages=k_pages, v_pages=v_pages, pages=jnp.asarray(pages), kv_lens=lens) | scales
  options = dict(max_query_len=max(query_lens)) | case.options
  if case.query_lens:
    arrays["query_starts"] = jnp.asarray(np.cumsum([0, *query_lens]), jnp.int32)
  if options.pop("sinks", None):
    arrays["sinks"] = jnp.asarray(rng.standard_normal(num_heads), jnp.float32)
  return arrays, options


@functools.partial(jax.jit, static_argnums=0)
def quantise(dtype: str, owned: jax.Array, *pools: jax.Array) -> list[jax.Array]:
  """8-bit pools, and their scales for each token and head."""
  most = {"int8": 127, "float8_e4m3fn": 448, "float8_e5m2": 57344}[dtype]
  scales = [jnp.abs(pool.astype(jnp.float32)).max(-1) / most for pool in pools]
  wide = [pool.astype(jnp.float32) / scale[..., None] for pool, scale in zip(pools, scales, strict=True)]
  if dtype == "int8":
    wide = [jnp.round(x) for x in wide]
  else:
    wide = [jnp.where(owned[..., None, None], x, jnp.nan) for x in wide]
  return [x.astype(dtype) for x in wide] + [jnp.where(owned[..., None], x, jnp.nan) for x in scales]


@functools.partial(jax.jit, static_argnums=0)
def ours(options: tuple, arrays: dict[str, Any]):
  return pf.paged_attention(**arrays, **dict(options), return_residual=True, implementation="sm90")


@functools.partial(jax.jit, static_argnums=0)
def wanted(options: tuple, arrays: dict[str, Any]):
  """The definition in float32."""
  is_kept = lambda name, x: x.dtype == jnp.int32 or ("pages" in name and "k_scales" in arrays)  # noqa: E731
  wide = {name: x if is_kept(name, x) else x.astype(jnp.float32) for name, x in arrays.items()}
  with jax.default_matmul_precision("highest"):
    return reference.paged_forward(*paged_problem(**wide, **dict(options)))


@pytest.mark.parametrize("name", CASES)
def test_is_the_definition(name):
  arrays, options = drawn(CASES[name])
  options = tuple(options.items())
  (out, lse), again = ours(options, arrays), ours(options, arrays)
  assert (out == again[0]).all() and (lse == again[1]).all()
  limit = 200_000 // max(CASES[name].kv_lens)  # the definition gathers every page
  if "query_starts" in arrays:
    want_out, want_lse = wanted(options, arrays)
  else:
    some = arrays | {field: arrays[field][:limit] for field in ("query", "pages", "kv_lens")}
    want_out, want_lse = wanted(options, some)
    out, lse = out[:limit], lse[:limit]
  assert_close(out, want_out.astype(out.dtype))
  assert_close(lse, want_lse, factor=4)
  assert (np.asarray(out)[np.asarray(want_lse) == -np.inf] == 0).all()


@pytest.mark.parametrize("name", ["page16", "page8-64", "page64-256", "everything"])
def test_a_sequence_does_not_depend_on_its_batch(name):
  arrays, options = drawn(CASES[name])
  options = tuple(options.items())
  out, lse = ours(options, arrays)
  for b in (3, 7, 8):
    alone = arrays | {field: arrays[field][b : b + 1] for field in ("pages", "kv_lens")}
    tokens = slice(b, b + 1)
    if "query_starts" in arrays:
      tokens = slice(*arrays["query_starts"][b : b + 2].tolist())
      alone["query_starts"] = jnp.array([0, tokens.stop - tokens.start])
    out_alone, lse_alone = ours(options, alone | {"query": arrays["query"][tokens]})
    assert (out_alone == out[tokens]).all() and (lse_alone == lse[tokens]).all()


@pytest.mark.parametrize("name", ["page16", "page8-64", "window-128", "everything", "long"])
def test_who_computes_makes_no_difference(name):
  """One lane folds every chunk of a head in registers; or lanes that are many, whose parts the second kernel folds."""
  arrays, options = drawn(CASES[name])
  problem, operands = paged_problem(**arrays, **options)
  tiles = tuning.tiles(problem, "sm90")

  @functools.partial(jax.jit, static_argnums=0)
  def run(num_blocks, operands):
    return paged_sm90.paged_forward(problem, operands, **tiles, num_blocks=num_blocks)

  want = run(132, operands)
  for num_blocks in (1, 7, 40):
    for x, y in zip(run(num_blocks, operands), want, strict=True):
      assert (x == y).all()


SHARED: dict[str, Case] = {
  "decode": Case([9000 + 37 * b for b in range(40)], (32, 8, 128)),
  "sinks": Case([3000 + 13 * b for b in range(20)], (9, 3, 64), options=dict(sinks="sinks")),
  "dim256": Case([3000 + 13 * b for b in range(9)], (8, 2, 256), 64),
  "speculative": Case([5000] * 12, (8, 2, 128), query_lens=[1, 3] * 6),
  "int8": Case([9000 + 37 * b for b in range(9)], (8, 2, 128), quantised="int8"),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_sequences_share_is_read_once_and_no_bit_changes(name):
  """A prefix of all, and a longer one of every third."""
  case = SHARED[name]
  arrays, options = drawn(case)
  pages, lens = np.array(arrays["pages"]), np.asarray(case.kv_lens)
  pages[:, : 2048 // case.page_size] = pages[0, : 2048 // case.page_size]
  pages[::3, : 2900 // case.page_size] = pages[0, : 2900 // case.page_size]
  arrays["pages"] = jnp.asarray(pages)
  leaders, counts = prefix.shared_prefixes(arrays["pages"], jnp.asarray(lens), case.page_size)
  assert (np.asarray(counts) >= 2048 // case.page_size).all()
  problem, operands = paged_problem(**arrays, **options, shared_prefixes=(leaders, counts))
  tiles = tuning.tiles(problem, "sm90")
  run = jax.jit(lambda operands: paged_sm90.paged_forward(problem, operands, **tiles))
  units = paged_decode_sm90.make_units(
    problem, paged_decode_sm90.make_chunks(problem, tiles["block_kv"]), tiles["block_kv"], operands
  )
  assert units is not None and (units.size > 1).any()
  for x, y in zip(run(operands), ours(tuple(options.items()), arrays), strict=True):
    assert (x == y).all()


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_chunk_does_not_depend_on_its_batch(dim):
  arrays, options = drawn(Case(**CHUNKS, heads=(8, 2, dim)))
  options = tuple(options.items())
  out, lse = ours(options, arrays)
  starts = np.asarray(arrays["query_starts"])
  for b in (0, 2, 4, 6):
    tokens = slice(starts[b], starts[b + 1])
    alone = arrays | {field: arrays[field][b : b + 1] for field in ("pages", "kv_lens")}
    alone |= dict(query=arrays["query"][tokens], query_starts=jnp.asarray([0, starts[b + 1] - starts[b]], jnp.int32))
    out_alone, lse_alone = ours(options, alone)
    assert (out_alone == out[tokens]).all() and (lse_alone == lse[tokens]).all()


@pytest.mark.parametrize("query_lens", [None, [400, 1, 100]])
@pytest.mark.parametrize("page_size", [8, 16, 64])
def test_where_pages_lie_makes_no_difference(page_size, query_lens):
  arrays, options = drawn(Case([3000, 100, 700], (8, 2, 128), page_size, query_lens=query_lens))
  options = tuple(options.items())
  ids = arrays["pages"].clip(0, arrays["k_pages"].shape[0] - 1)
  in_order = arrays | {field: arrays[field][ids.ravel()] for field in ("k_pages", "v_pages")}
  in_order["pages"] = jnp.arange(ids.size, dtype=jnp.int32).reshape(ids.shape)
  for x, y in zip(ours(options, arrays), ours(options, in_order), strict=True):
    assert (x == y).all()


@pytest.mark.parametrize("query_lens", [None, [400, 1, 100]])
def test_a_pool_of_more_than_2_31_elements(query_lens):
  """The pages in use are the last ones."""
  small, options = drawn(Case([3000, 100, 700], (8, 8, 128), query_lens=query_lens))
  options = tuple(options.items())
  pad = 2**31 // small["k_pages"][0].size
  big = {field: jnp.pad(small[field], ((pad, 0), (0, 0), (0, 0), (0, 0))) for field in ("k_pages", "v_pages")}
  for x, y in zip(ours(options, small), ours(options, small | big | {"pages": small["pages"] + pad}), strict=True):
    assert (x == y).all()


@pytest.mark.parametrize("case", [Case(LENS[:6], (8, 2, 128)), CASES["chunks-page16-128"]], ids=["decode", "chunks"])
def test_ten_thousand_repeats(case):
  arrays, options = drawn(case)
  options = tuple(options.items())
  first = ours(options, arrays)

  @jax.jit
  def count(differences, arrays, first):
    return differences + sum((x != y).sum() for x, y in zip(ours(options, arrays), first, strict=True))

  differences = jnp.int32(0)
  for _ in range(10_000):
    differences = count(differences, arrays, first)
  assert differences == 0
