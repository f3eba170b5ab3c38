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
# # Serving, and going back in time
#
# An engine serves many requests at once from a small pool of pages. Its state is a value: this notebook runs a
# schedule, looks at the pages while it runs, asks what happened to a request, goes back to an earlier step, and takes
# another way from there. A tiny model with random weights stands in for a real one, so it runs anywhere in seconds.

# %%
import numpy as np

import paged_flash as pf
from paged_flash.analysis import show_occupancy

sizes = pf.models.ModelConfig(vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64)
model = pf.models.load(sizes)  # or "smollm2-135m-instruct", a GGUF file, a folder
engine = pf.Engine(model, num_slots=4, num_pages=16, page_size=4, token_budget=16)
print(engine.memory)

# %% [markdown]
# ## A live schedule
#
# Seven requests for four slots, and a pool that is too small for all that they will need. Three of them begin with the
# same eight tokens, like a system prompt; the first of these comes two steps before the others, so its pages are there
# to be found. `pf.history.record` keeps every state on the way.

# %%
rng = np.random.default_rng(0)
system = rng.integers(1, 64, 8).tolist()
prompts = [system + rng.integers(1, 64, n).tolist() for n in (3, 5, 2)]
prompts += [rng.integers(1, 64, n).tolist() for n in (9, 14, 4, 7)]

run, first = pf.history.record(engine).submit(prompts[0], max_tokens=14, ignore_eos=True)
requests = [first]
for _ in range(2):
  run, events = run.step()
for prompt in prompts[1:]:
  run, request = run.submit(prompt, max_tokens=14, ignore_eos=True)
  requests.append(request)
while not run.now.idle:
  run, events = run.step()
  done = [event.request for event in events if event.done]
  if done:
    print(f"step {run.num_steps}: ended", done)

# %% [markdown]
# The whole run: pages in use, who sat in which slot, who was preempted.

# %%
show_occupancy(run.records(), num_pages=run.num_pages)

# %% [markdown]
# ## The page table in the middle of it
#
# Any earlier state is there. This is the table after ten steps: shared pages hold the common prefix.

# %%
middle = run.rewind(10)
pf.show(middle.table)

# %% [markdown]
# What one step changed, as a picture and in words.

# %%
change = pf.history.diff(run.rewind(9), run.rewind(10))
print(change)
pf.show(change)

# %% [markdown]
# ## What happened to my request?
#
# `explain` tells the life of one request: how long it waited and for what, which pages it found, whether it was
# preempted and computed again.

# %%
for request in (requests[1], requests[3]):
  print(run.explain(request), "\n")

# %% [markdown]
# ## Another future
#
# The past is a value, so it can be gone on from twice. From step 10 we take the other way: the first request that is
# still there is cancelled. Tokens do not depend on who shares the batch, so all the others get exactly what they got.

# %%
there = [request for request in requests if request in np.asarray(middle.arrival)]
other = run.fork_from(10).cancel(there[0])
while not other.now.idle:
  other, events = other.step()
print(f"cancelled request {there[0]}: {run.num_steps} steps became {other.num_steps}")

# %% [markdown]
# ## Was it really so?
#
# `replay` runs the schedule again from the first state and compares every state, bit for bit.

# %%
print("steps that came out the same:", run.replay())
print(f"the whole recording takes {run.num_bytes:,} bytes for {run.num_steps} steps")
