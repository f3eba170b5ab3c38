"""Calls of both ops for the kernel tests: numpy arguments by name, drawn from fixed seeds; and a kernel run."""

import functools

import jax
import numpy as np

from paged_flash.kernels import xla

TILES = dict(block_q=16, block_kv=24)  # several blocks each way at test sizes
OPTIMISED = {"xla_backend_optimization_level": 3}  # as users run it: for what holds bit for bit

# name -> (B, T, S, H, K, D or (D, Dv), arguments). A string argument names an array that `flash_call` draws.
FLASH = {
  "full": (2, 37, 37, 2, 2, 8, {}),
  "one": (1, 1, 1, 1, 1, 16, {}),
  "causal_gqa3": (2, 64, 64, 6, 2, 8, dict(is_causal=True)),
  "causal_gqa7_more_keys": (1, 31, 75, 7, 1, 8, dict(is_causal=True)),
  "causal_more_queries": (2, 79, 30, 2, 1, 8, dict(is_causal=True)),
  "one_key": (1, 61, 1, 3, 1, 8, dict(is_causal=True, sinks="sinks")),
  "window_int": (1, 70, 70, 2, 2, 8, dict(local_window_size=5)),
  "window_pair_more_keys": (1, 33, 83, 4, 2, 8, dict(local_window_size=(9, 2))),
  "window_zero_causal": (1, 40, 40, 2, 1, 8, dict(local_window_size=0, is_causal=True)),
  "window_beyond_length": (1, 40, 40, 2, 1, 8, dict(local_window_size=(900, 900))),
  "lengths": (4, 50, 66, 2, 1, 8, dict(query_seq_lengths="query_lens", key_value_seq_lengths="kv_lens")),
  "lengths_causal_window": (
    *(4, 50, 66, 2, 1, 8),
    dict(query_seq_lengths="query_lens", key_value_seq_lengths="kv_lens", is_causal=True, local_window_size=(11, 0)),
  ),
  "kv_lengths_self": (4, 50, 50, 2, 1, 8, dict(key_value_seq_lengths="kv_lens", is_causal=True)),
  "segments": (2, 60, 60, 2, 1, 8, dict(segment_ids="segments", is_causal=True)),
  "segments_pair": (2, 45, 60, 2, 2, 8, dict(segment_ids=("query_segments", "segments"))),
  "bias_head": (2, 40, 55, 4, 2, 8, dict(bias=(1, 4, 40, 55))),
  "bias_row_cap": (2, 40, 55, 4, 2, 8, dict(bias=(2, 1, 1, 55), logits_soft_cap=1.0)),
  "bias_column_mask": (2, 40, 55, 4, 2, 8, dict(bias=(1, 1, 40, 1), mask=(2, 4, 40, 55))),
  "small_values_gqa": (2, 37, 53, 6, 2, (16, 8), dict(is_causal=True)),
  "large_values": (1, 40, 40, 4, 1, (8, 24), dict(key_value_seq_lengths="kv_lens", sinks="sinks")),
  "everything": (
    *(3, 58, 90, 6, 2, (16, 24)),
    dict(
      is_causal=True,
      local_window_size=(40, 3),
      query_seq_lengths="query_lens",
      key_value_seq_lengths="kv_lens",
      segment_ids=("query_segments", "segments"),
      bias=(3, 6, 58, 90),
      mask=(1, 1, 58, 90),
      sinks="sinks",
      logits_soft_cap=5.0,
      scale=0.7,
    ),
  ),
}


def i32(*values):
  return np.array(values, np.int32)


def normal(rng, *shape):
  return rng.standard_normal(shape).astype(np.float32)


def flash_call(name: str, table: dict = FLASH) -> dict:
  """The arguments of `flash_attention` for one row of FLASH, or of a table like it."""
  rng = np.random.default_rng(len(name))
  batch, rows, columns, heads, kv_heads, dims, arguments = table[name]
  head_dim, value_dim = dims if isinstance(dims, tuple) else (dims, dims)
  random_ids = np.ones((batch, max(rows, columns)), np.int32)
  random_ids[:, 64:128] = np.random.default_rng(2).integers(0, 3, random_ids[:, 64:128].shape)
  drawn = dict(
    query_lens=np.array([rows, 0, rows - 9, 3][:batch], np.int32),
    kv_lens=np.array([columns - 7, 20, 0, columns][:batch], np.int32),
    segments=np.sort(rng.integers(0, 4, (batch, columns)), 1).astype(np.int32),
    query_segments=np.sort(rng.integers(0, 5, (batch, rows)), 1).astype(np.int32),
    sinks=normal(rng, heads),
    long_segments=np.tile(np.searchsorted([10, columns - 14], np.arange(columns), "right"), (batch, 1)),
    random_ids=random_ids[:, :columns],  # of one segment, then of any, then of that one again
    random_query_ids=random_ids[:, :rows],
  )
  call: dict = dict(
    query=normal(rng, batch, rows, heads, head_dim),
    key=normal(rng, batch, columns, kv_heads, head_dim),
    value=normal(rng, batch, columns, kv_heads, value_dim),
  )
  for key, value in arguments.items():
    if key == "bias":
      value = normal(rng, *value)
    elif key == "mask":
      value = rng.random(value) < 0.8
    elif isinstance(value, str):
      value = drawn[value]
    elif key == "segment_ids":
      value = tuple(drawn[x] for x in value)
    call[key] = value
  return call


def cotangents(call: dict) -> tuple[np.ndarray, np.ndarray]:
  """Random cotangents of the output [B, T, H, Dv] and of a kernel's LSE f32[B, H, T]."""
  rng = np.random.default_rng(1)
  batch, rows, heads, _ = call["query"].shape
  d_out = normal(rng, batch, rows, heads, call["value"].shape[-1])
  return d_out.astype(call["query"].dtype), normal(rng, batch, heads, rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(kernel, problem, operands, d_out, d_lse):
  """Forward and backward of one kernel: (out, lse f32[B, H, T], gradients), compiled once for all test modules."""
  tiles = TILES if kernel is xla else {}
  out, lse = kernel.forward(problem, operands, **tiles)
  return out, lse, kernel.backward(problem, operands, out, lse, d_out, d_lse, **tiles)


def temporary_bytes(lowered: jax.stages.Lowered) -> int:
  """What the compiled program allocates besides its arguments and results."""
  analysis = lowered.compile().memory_analysis()
  assert analysis is not None
  return analysis.temp_size_in_bytes


def paged_call(
  *, kv_lens, query_lens=None, num_tokens=None, heads=(6, 2, 8), page_size=4, pages_per_slot=12, seed=0, **arguments
) -> dict:
  """The arguments of `paged_attention`: sequences of the given lengths in randomly placed pages of a half-used pool.

  Everything that no token owns is NaN: pages nobody holds and the rest of each last page. Table entries past a
  sequence's end are NO_PAGE or nonsense.
  """
  rng = np.random.default_rng(seed)
  num_heads, num_kv_heads, head_dim = heads
  batch = len(kv_lens)
  num_pages = 2 * batch * pages_per_slot
  pages = rng.permutation(num_pages)[: batch * pages_per_slot].reshape(batch, pages_per_slot)
  owned = np.zeros((num_pages, page_size), bool)
  for b, kv_len in enumerate(kv_lens):
    for t in range(kv_len):
      owned[pages[b, t // page_size], t % page_size] = True
    pages[b, -(-kv_len // page_size) :] = rng.choice([-1, 2**30, 0])
  pools = (normal(rng, num_pages, page_size, num_kv_heads, head_dim) for _ in range(2))
  k_pages, v_pages = (np.where(owned[..., None, None], pool, np.nan) for pool in pools)
  query_lens = [1] * batch if query_lens is None else query_lens
  if num_tokens is not None:
    arguments["query_starts"] = np.cumsum([0, *query_lens]).astype(np.int32)
  query = normal(rng, num_tokens or batch, num_heads, head_dim)
  lens = np.array(kv_lens, np.int32)
  return dict(query=query, k_pages=k_pages, v_pages=v_pages, pages=pages.astype(np.int32), kv_lens=lens, **arguments)
