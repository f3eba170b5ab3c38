# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Flash attention, step by step
#
# Attention compares every query with every key: N x N scores. Written down as it is defined, it stores them all. This
# notebook builds the algorithm that never does (Dao et al. 2022, Algorithm 1), one idea at a time, in a few lines of
# NumPy each, and ends at `pf.flash_attention`, which is the same algorithm in a kernel.

# %%
import jax
import jax.numpy as jnp
import numpy as np

import paged_flash as pf
from paged_flash.analysis.pictures import Picture

N, D, BLOCK = 256, 32, 32  # keys and queries, head_dim, keys of a tile
rng = np.random.default_rng(0)
query, key, value = rng.standard_normal((3, N, D))
scale = D**-0.5

# %% [markdown]
# ## As it is defined
#
# Scores, softmax over the keys, a weighted sum of the values. `scores` and `weights` are the N x N matrices. Softmax
# subtracts each row's largest score first, so that `exp` cannot overflow; that changes nothing but the range.


# %%
def attention(query, key, value):
  scores = scale * query @ key.T  # [N, N]
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return weights @ value / weights.sum(-1, keepdims=True)


right = attention(query, key, value)
print("output", right.shape, " score matrix", (N, N), f"= {N * N:,} numbers; at N = 4096 it has {4096**2:,}")

# %% [markdown]
# ## One query, keys in tiles: online softmax
#
# Softmax seems to need all scores of a row at once: the largest of them, and the sum. It does not. Keep three things
# for a query, and correct them as tiles of keys come in:
#
# - `top`, the largest score so far,
# - `total`, the sum of `exp(score - top)` so far,
# - `out`, the sum of `exp(score - top) * value` so far.
#
# When a tile brings a larger score, everything summed so far was relative to the old `top`, and one factor,
# `exp(old - new)`, puts it right. At the end `out / total` is exact: no approximation was made on the way.


# %%
def online(query_row, key, value):
  """Yields the output as it stands after each tile, and how the running sums were corrected."""
  top, total, out = -np.inf, 0.0, np.zeros(D)
  for start in range(0, N, BLOCK):
    scores = scale * key[start : start + BLOCK] @ query_row
    new_top = max(top, scores.max())
    correction = np.exp(top - new_top)
    weights = np.exp(scores - new_top)
    total = correction * total + weights.sum()
    out = correction * out + weights @ value[start : start + BLOCK]
    top = new_top
    yield out / total, correction


steps = list(online(query[7], key, value))
print("after all tiles, largest error:", np.abs(steps[-1][0] - right[7]).max())
print("corrections:", [round(float(c), 3) for _, c in steps], " 1: this tile brought no larger score")
np.testing.assert_allclose(steps[-1][0], right[7], atol=1e-12)

# %% [markdown]
# Watch it converge. After each tile the output is *exactly* attention over the keys seen so far; with the last tile it
# is attention.


# %%
def draw_convergence(rows):
  picture = Picture(figsize=(6.4, 3.4), layout="constrained")
  ax = picture.subplots()
  for i in rows:
    errors = [np.abs(out - right[i]).max() for out, _ in online(query[i], key, value)]
    ax.semilogy(range(1, len(errors) + 1), np.maximum(errors, 1e-17), "o-", ms=4, label=f"query {i}")
  ax.set(xlabel="tiles of keys seen", ylabel="largest error of the output")
  ax.grid(lw=0.4)
  ax.legend(frameon=False)
  return picture


draw_convergence((7, 50, 200))

# %% [markdown]
# ## Many queries: tiles of both
#
# On a GPU the slow memory is HBM and the fast one is on the chip. Take a tile of queries, keep its three running
# quantities on the chip, and stream K and V past it once. K and V are read once for every *tile* of queries, not for
# every query: larger tiles, less traffic. Nothing of size N x N exists anywhere.


# %%
def tiled(query, key, value, block_q, is_causal=False):
  """(out, log-sum-exp of each row, numbers read of K and V, tiles computed)."""
  out, lse, read, tiles = np.zeros((N, D)), np.zeros(N), 0, 0
  for first in range(0, N, block_q):
    rows = slice(first, first + block_q)
    top, total, sums = np.full((block_q, 1), -np.inf), np.zeros((block_q, 1)), np.zeros((block_q, D))
    for start in range(0, N, BLOCK):
      if is_causal and start > first + block_q - 1:
        break  # no query of this tile sees these keys
      k, v = key[start : start + BLOCK], value[start : start + BLOCK]
      read, tiles = read + k.size + v.size, tiles + 1
      scores = scale * query[rows] @ k.T
      if is_causal:
        future = np.arange(start, start + BLOCK) > np.arange(first, first + block_q)[:, None]
        scores = np.where(future, -np.inf, scores)
      new_top = np.maximum(top, scores.max(-1, keepdims=True))
      correction, weights = np.exp(top - new_top), np.exp(scores - new_top)
      total = correction * total + weights.sum(-1, keepdims=True)
      sums = correction * sums + weights @ v
      top = new_top
    out[rows], lse[rows] = sums / total, (top + np.log(total))[:, 0]
  return out, lse, read, tiles


for block_q in (16, 32, 64, 128):
  out, lse, read, tiles = tiled(query, key, value, block_q)
  np.testing.assert_allclose(out, right, atol=1e-12)
  print(f"tiles of {block_q:3d} queries: K and V read {read / (2 * N * D):4.0f} times, {tiles} tiles of scores")

# %% [markdown]
# That is Theorem 2 of the paper: with room for M numbers on the chip a tile has about M / D queries, so K and V are
# read N D / M times, which makes N² D² / M numbers in all. The naive algorithm moves N² numbers several times.
#
# Causal masking skips tiles: of the tiles above the diagonal nothing is computed, nothing is read.

# %%
masked = np.tril(np.ones((N, N), bool))
scores = np.where(masked, scale * query @ key.T, -np.inf)
weights = np.exp(scores - scores.max(-1, keepdims=True))
causal = weights @ value / weights.sum(-1, keepdims=True)
out, lse, read, tiles = tiled(query, key, value, BLOCK, is_causal=True)
np.testing.assert_allclose(out, causal, atol=1e-12)
print(f"causal: {tiles} of {(N // BLOCK) ** 2} tiles")

# %% [markdown]
# ## The backward pass recomputes
#
# The gradients need the weights again. Storing them would bring the N x N matrix back; instead each tile of them is
# recomputed from Q, K and one number per row, the log-sum-exp that the forward pass kept: `P = exp(S - lse)`. With
# `delta`, the sum of `d_out * out` over a row, the gradient of the scores is `P * (dP - delta)`.


# %%
def backward(query, key, value, out, lse, d_out):
  d_query, d_key, d_value = np.zeros((3, N, D))
  delta = (d_out * out).sum(-1, keepdims=True)
  for first in range(0, N, BLOCK):  # a tile of keys
    keys = slice(first, first + BLOCK)
    for start in range(0, N, BLOCK):  # a tile of queries
      rows = slice(start, start + BLOCK)
      weights = np.exp(scale * query[rows] @ key[keys].T - lse[rows, None])  # recomputed, never stored
      d_value[keys] += weights.T @ d_out[rows]
      d_scores = weights * (d_out[rows] @ value[keys].T - delta[rows])
      d_query[rows] += scale * d_scores @ key[keys]
      d_key[keys] += scale * d_scores.T @ query[rows]
  return d_query, d_key, d_value


out, lse, *_ = tiled(query, key, value, BLOCK)
d_out = rng.standard_normal((N, D))
ours = backward(query, key, value, out, lse, d_out)


def plain(query, key, value):
  return jax.nn.softmax(scale * query @ key.T) @ value


_, pullback = jax.vjp(plain, *(jnp.asarray(x, jnp.float32) for x in (query, key, value)))
for name, mine, theirs in zip(("query", "key", "value"), ours, pullback(jnp.asarray(d_out, jnp.float32)), strict=True):
  print(f"gradient of {name:5s}: largest difference from autodiff {np.abs(mine - theirs).max():.1e}")
  np.testing.assert_allclose(mine, theirs, atol=2e-4)

# %% [markdown]
# ## In one call
#
# `pf.flash_attention` is this algorithm as a kernel: arguments as in `jax.nn.dot_product_attention`, [batch, length,
# heads, head_dim] arrays, any mask that the op knows, gradients. `pf.explain` says which kernel a call runs here, and
# why not the others.

# %%
q, k, v = (jnp.asarray(x, jnp.float32)[None, :, None] for x in (query, key, value))
out = pf.flash_attention(q, k, v, is_causal=True)
np.testing.assert_allclose(out[0, :, 0], causal, atol=1e-5)
print(pf.explain(pf.flash_attention, q, k, v, is_causal=True))

# %% [markdown]
# What it is for: the memory that XLA sets aside besides inputs and output, read from the compiled programs. The naive
# program's grows with N², ours with N at most.


# %%
def temporaries(attend, length):
  x = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)
  analysis = jax.jit(attend).lower(x, x, x).compile().memory_analysis()
  assert analysis is not None
  return analysis.temp_size_in_bytes


def draw_temporaries(lengths, **programs):
  picture = Picture(figsize=(6.4, 3.4), layout="constrained")
  ax = picture.subplots()
  for name, attend in programs.items():
    megabytes = [temporaries(attend, n) / 2**20 for n in lengths]
    ax.loglog(lengths, megabytes, "o-", base=2, label=name)
    print(name, [f"{m:.1f} MiB" for m in megabytes])
  ax.set(xlabel="sequence length", ylabel="temporaries, MiB")
  ax.grid(lw=0.4)
  ax.legend(frameon=False)
  return picture


draw_temporaries(
  (256, 512, 1024, 2048, 4096),
  with_scores=lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="xla"),
  flash_attention=lambda q, k, v: pf.flash_attention(q, k, v),
)

# %% [markdown]
# Next: [a page table is a value](02_page_table.ipynb), where K and V no longer lie in one piece.
