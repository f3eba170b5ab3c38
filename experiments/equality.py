"""Paged attention against contiguous: the same numbers, wherever the pages lie, whatever their size and company.

    python -m experiments.equality --config=configs/equality/pages.py

For each page size the same keys and values lie in pages in order and in pages scattered at random over a larger pool;
the outputs are compared bit by bit. Between page sizes, and with `flash_attention` on the contiguous arrays, the sums
are taken in another order: there the largest difference is compared with what rounding the output to its dtype allows.
Last, every sequence attends with the other slots empty, its tokens at another place of the packed ones, bit by bit.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

import paged_flash as pf
from experiments.claims import Claim
from paged_flash.experiment import Workdir, main, write_result


@dataclasses.dataclass(kw_only=True)
class Config:
  kv_lens: tuple[int, ...] = (1, 54, 97, 512, 513, 2048, 4096)
  chunk: int = 16  # query tokens of each sequence, or as many as it holds
  num_heads: int = 8
  num_kv_heads: int = 2
  head_dim: int = 128
  dtype: str = "bfloat16"
  page_sizes: tuple[int, ...] = (1, 5, 8, 16, 32, 64, 128, 256)
  permutations: int = 4
  spare: int = 3  # the pool is this many times as large as needed
  implementation: str = ""  # by name; "" takes what paged_attention takes
  claims: tuple[Claim, ...] = ()  # 12: pages against contiguous; 15c: with others against alone
  result: str = ""  # name under experiments/results/equality/<device>/ to write to; "" writes none


def in_pages(keys: list[np.ndarray], size: int, places: np.ndarray, num_pages: int) -> tuple[np.ndarray, np.ndarray]:
  """(pool, table): each sequence's [n, K, D] in pages at the next of `places`; NaN wherever no token lies."""
  counts = [-(-len(x) // size) for x in keys]
  pool = np.full((num_pages, size, *keys[0].shape[1:]), np.nan, np.float32)
  table = np.full((len(keys), max(counts)), -1, np.int32)
  for b, (x, end) in enumerate(zip(keys, np.cumsum(counts), strict=True)):
    table[b, : counts[b]] = mine = places[end - counts[b] : end]
    pool[mine] = np.pad(x, ((0, counts[b] * size - len(x)), (0, 0), (0, 0)), constant_values=np.nan).reshape(
      counts[b], size, *x.shape[1:]
    )
  return pool, table


def contiguous(config: Config, query: jax.Array, keys: list[np.ndarray], values: list[np.ndarray]) -> jax.Array:
  """`flash_attention` of each sequence by itself."""
  out, first = [], 0
  for k, v in zip(keys, values, strict=True):
    count = min(config.chunk, len(k))
    k, v = (jnp.asarray(x, config.dtype)[None] for x in (k, v))
    out.append(pf.flash_attention(query[None, first : first + count], k, v, is_causal=True)[0])
    first += count
  return jnp.concatenate(out)


def run(config: Config, workdir: Workdir) -> list[dict]:
  rng = np.random.default_rng(0)
  shape = (config.num_kv_heads, config.head_dim)
  keys, values = ([rng.standard_normal((n, *shape), np.float32) for n in config.kv_lens] for _ in range(2))
  query_lens = np.minimum(config.chunk, config.kv_lens)
  starts = jnp.asarray(np.cumsum([0, *query_lens]), jnp.int32)
  tokens = rng.standard_normal((int(query_lens.sum()), config.num_heads, config.head_dim), np.float32)
  query, lens = jnp.asarray(tokens, config.dtype), jnp.asarray(config.kv_lens, jnp.int32)
  right = np.asarray(contiguous(config, query, keys, values), np.float32)
  allowed = float(2 * jnp.finfo(config.dtype).eps * np.abs(right).max())

  @jax.jit
  def attend(k_pages, v_pages, table, query=query, lens=lens, starts=starts):
    return pf.paged_attention(
      query,
      k_pages,
      v_pages,
      table,
      lens,
      query_starts=starts,
      max_query_len=config.chunk,
      implementation=config.implementation or None,
    )

  rows = []
  for size in config.page_sizes:
    needed = sum(-(-n // size) for n in config.kv_lens)
    num_pages = config.spare * needed
    orders = [np.arange(needed)] + [rng.permutation(num_pages) for _ in range(config.permutations)]
    outs = []
    for places in orders:
      (k_pages, table), (v_pages, _) = (in_pages(x, size, places, num_pages) for x in (keys, values))
      last = (jnp.asarray(k_pages, config.dtype), jnp.asarray(v_pages, config.dtype), jnp.asarray(table))
      outs.append(np.asarray(attend(*last), np.float32))
    alone = 0
    for b, count in enumerate(query_lens):  # in the pages of the last order
      mine = slice(int(starts[b]), int(starts[b]) + count)
      at = dict(lens=jnp.zeros_like(lens).at[b].set(lens[b]), starts=jnp.where(jnp.arange(len(starts)) > b, count, 0))
      packed = jnp.zeros_like(query).at[:count].set(query[mine])
      by_itself = attend(*last, query=packed, **at)[:count]
      alone += int((np.asarray(by_itself, np.float32) != outs[-1][mine]).sum())
    difference = float(np.abs(outs[0] - right).max())
    row = dict(page_size=size, pages=needed, pool_pages=num_pages, permutations=config.permutations)
    row |= dict(numbers=outs[0].size, differing=int(sum((out != outs[0]).sum() for out in outs[1:])), alone=alone)
    row |= dict(from_contiguous=difference if np.isfinite(difference) else None, allowed=allowed)
    rows.append(row)
    workdir.log(**row)
  print(pd.DataFrame(rows).to_string(index=False, float_format="{:.2g}".format))
  claims = [judged(claim, rows) for claim in config.claims]
  if config.result:
    recorded = dataclasses.asdict(config)
    print(write_result("equality", rows, name=config.result, claims=claims, config=recorded))
  return rows


def judged(claim: Claim, rows: list[dict]) -> dict:
  numbers = sum(row["numbers"] for row in rows)
  if claim.number == "15c":
    alone = sum(row["alone"] for row in rows)
    ours = f"{alone} of {numbers:,} numbers change when a sequence attends alone, over {len(rows)} page sizes"
    return claim.judged(ours, alone == 0)
  differing, allowed = sum(row["differing"] for row in rows), rows[0]["allowed"]
  worst = max(np.inf if row["from_contiguous"] is None else row["from_contiguous"] for row in rows)
  ours = f"{differing} of {numbers * rows[0]['permutations']:,} numbers change with the order of "
  ours += f"pages; from contiguous at most {worst:.1e}, rounding allows {allowed:.1e}"
  return claim.judged(ours, differing == 0 and worst <= allowed)


if __name__ == "__main__":
  main(run)
