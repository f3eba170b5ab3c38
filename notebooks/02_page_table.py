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
# # A page table is a value
#
# The keys and values of a sequence live in *pages* of a few tokens each, anywhere in a pool. The page table says which
# pages hold which sequence. Here it is an immutable value: every function takes a table and returns another one, and
# the old one stays good. This notebook walks one small table through a grant, a fork, a copy on write, a refusal and
# a release, and then reads attention through it.

# %%
import jax
import jax.numpy as jnp
import numpy as np

import paged_flash as pf

# %% [markdown]
# ## An empty table
#
# Three slots (rows of the running batch), at most six pages for each, ten pages of four tokens in the pool.

# %%
empty = pf.page_table.init(num_slots=3, pages_per_slot=6, num_pages=10, page_size=4)
pf.show(empty)

# %% [markdown]
# ## Grant
#
# `extend` makes room for new tokens: ten in slot 0, three in slot 1. Ten tokens need three pages, and the last of them
# is half full. The answer has three parts: the new table, pages to copy first (none yet), and who was granted.

# %%
granted_table, copies, granted = pf.page_table.extend(empty, jnp.array([10, 3, 0]))
print("granted:", granted.tolist())
pf.show(granted_table)

# %% [markdown]
# One more token in slot 1 fills its page; nothing is granted for it. A fifth token would need a second page: pages
# come on demand, one at a time, so a sequence never holds more than one page that is not full.

# %%
one_more, _, _ = pf.page_table.extend(granted_table, jnp.array([0, 1, 0]))
two_more, _, _ = pf.page_table.extend(one_more, jnp.array([0, 1, 0]))
print("pages of slot 1:", granted_table.held[1], "->", one_more.held[1], "->", two_more.held[1])

# %% [markdown]
# ## Fork
#
# `fork` makes slot 2 hold what slot 0 holds. No page is copied or taken: three pages now have a ref count of 2.

# %%
forked = pf.page_table.fork(granted_table, parent=0, child=2)
pf.show(forked)

# %% [markdown]
# ## Copy on write
#
# Both want to write their next token into page 2, which is half full and shared. A page with a ref count above 1 is
# never written, so each gets a page of its own, and the answer names the copies to make before anything is written.
# The full pages stay shared: they never change.

# %%
written, copies, granted = pf.page_table.extend(forked, jnp.array([1, 0, 1]))
for src, dst in zip(copies.src.tolist(), copies.dst.tolist(), strict=True):
  if src != -1:
    print(f"copy page {src} to page {dst}")
pf.show(written)

# %% [markdown]
# With both writers gone from page 2 nobody holds it: it is free at once, and the pool shows it white.
#
# ## Refusal
#
# Five pages are free. Slot 0 needs one page more, slot 1 five: the pool cannot serve slot 1. That is *answered*,
# not raised, so that this runs inside `jit`, and the refused slot is exactly as it was.

# %%
refused, _, granted = pf.page_table.extend(written, jnp.array([2, 20, 0]))
print("free pages:", int(written.num_free), " granted:", granted.tolist())
print("slot 1 before:", written.pages[1].tolist(), " after:", refused.pages[1].tolist())
pf.show(refused)

# %% [markdown]
# ## Release
#
# Slot 0 is done. What only it held is free at once; what it shared stays with slot 2.

# %%
released = pf.page_table.release(refused, jnp.array([True, False, False]))
pf.show(released)

# %% [markdown]
# ## Time travel
#
# Nothing above changed any table. The one from before the release is as good as ever: compare the two, or go on from
# it another way. `check` recomputes every ref count and raises if one is wrong.

# %%
for name, table in dict(empty=empty, forked=forked, written=written, refused=refused, released=released).items():
  pf.page_table.check(table)
  print(f"{name:<9} ref counts {table.ref_counts.tolist()}")

other_way, _, granted = pf.page_table.extend(refused, jnp.array([0, 0, 5]))
print("another future of the same past:", other_way.seq_lens.tolist(), granted.tolist())

# %% [markdown]
# ## Attention through a table
#
# `paged_attention` takes the pool, the pages of each sequence and its length. Where the pages lie does not matter.
# We put the same keys and values into two pools: in order, and scattered by a random permutation.

# %%
num_heads, num_kv_heads, head_dim = 4, 2, 8
page_size, num_pages = written.page_size, written.num_pages
keys = jax.random.split(jax.random.key(0), 3)
query = jax.random.normal(keys[0], (3, num_heads, head_dim))  # one new token in each slot
k_pages = jax.random.normal(keys[1], (num_pages, page_size, num_kv_heads, head_dim))
v_pages = jax.random.normal(keys[2], (num_pages, page_size, num_kv_heads, head_dim))
out = pf.paged_attention(query, k_pages, v_pages, written.pages, written.seq_lens)

moved_to = jnp.asarray(np.random.default_rng(0).permutation(num_pages), jnp.int32)  # page p moves to moved_to[p]
scattered = jnp.where(written.pages >= 0, moved_to[written.pages], -1)
out_scattered = pf.paged_attention(
  query,
  jnp.zeros_like(k_pages).at[moved_to].set(k_pages),
  jnp.zeros_like(v_pages).at[moved_to].set(v_pages),
  scattered,
  written.seq_lens,
)
print("pages of slot 0:", written.pages[0, :3].tolist(), " scattered:", scattered[0, :3].tolist())
print("the same numbers:", bool(jnp.array_equal(out, out_scattered)))
assert jnp.array_equal(out, out_scattered)

# %% [markdown]
# And it is ordinary attention: gather the pages of slot 0 into one contiguous array, and `flash_attention` agrees.

# %%
length = int(written.seq_lens[0])
k = k_pages[written.pages[0]].reshape(-1, num_kv_heads, head_dim)[None, :length]
v = v_pages[written.pages[0]].reshape(-1, num_kv_heads, head_dim)[None, :length]
contiguous = pf.flash_attention(query[None, :1], k, v)
print("largest difference:", float(jnp.max(jnp.abs(contiguous[0, 0] - out[0]))))
np.testing.assert_allclose(contiguous[0, 0], out[0], rtol=1e-5, atol=1e-6)

# %% [markdown]
# ## In a serving engine
#
# The scheduler does exactly this in every step, inside one compiled program: it extends the slots that run, forks a
# shared prefix into new ones, asks for the copies, and releases what is done. See `docs/life_of_a_request.md`.
