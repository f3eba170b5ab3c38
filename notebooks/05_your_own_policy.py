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
# # Your own policy
#
# Who is served first when not everybody can be? A *policy* is a function from the scheduler's state to one number for
# each request; the smaller, the sooner it is admitted and the later it is preempted. This notebook writes one in a few
# lines, simulates it on a day of requests, and then serves with the very same function.

# %%
import jax.numpy as jnp
import numpy as np
import pandas as pd

import paged_flash as pf
from paged_flash import policies
from paged_flash.analysis import synthetic
from paged_flash.simulator import Paged, llama_8b_h200, poisson, simulate

# %% [markdown]
# ## Ten lines
#
# The shortest job first makes the average wait short, but a long request may wait for ever while short ones keep
# coming. Ours lets everybody age: a request's number is what it still has to compute, less what it has waited. `state`
# holds arrays with a row for each request (`state.requests`, `state.arrival`) and the page table; `jnp` operations on
# them are all there is, because the policy runs inside the jitted step.


# %%
def aging(state):
  """Shortest first, but those who came `PATIENCE` requests ago count as if they had a token less to compute."""
  waited = jnp.max(state.arrival) - state.arrival  # requests that came after this one
  return policies.shortest_first(state) - PATIENCE * waited


PATIENCE = 8  # tokens for each request that came later

# %% [markdown]
# ## Simulate it
#
# The simulator is the real scheduler, with a latency model of an 8B model on an H200 in place of the model. Requests
# arrive faster than 16 slots can serve them.

# %%
NUM_REQUESTS = 120
trace = synthetic("sharegpt", NUM_REQUESTS)
arrivals = poisson(20.0, NUM_REQUESTS)
rows = []
for policy in (policies.first_come, policies.shortest_first, aging):
  served = simulate(
    trace.prompt_lens,
    trace.output_lens,
    memory=Paged(num_pages=1024, page_size=16),
    num_slots=16,
    token_budget=512,
    arrivals=arrivals,
    latency=llama_8b_h200(),
    policy=policy,
    queue_size=NUM_REQUESTS,
  )
  wait = served.admitted - served.arrival
  rows.append(
    dict(
      policy=policy.__name__,
      mean_wait_s=wait.mean(),
      longest_wait_s=wait.max(),
      latency_per_token_ms=1e3 * served.normalised_latency,
      seconds=served.seconds,
    )
  )
print(pd.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format))

# %% [markdown]
# Shortest first cuts the mean wait, and pays for it with the longest one; aging gives some of the one back for some of
# the other. `PATIENCE` is the knob, and it is yours.
#
# ## Serve with it
#
# The engine takes the same function. A tiny model with random weights stands in for a real one: three slots, nine
# requests of several lengths. The order in which they end is the policy's doing.

# %%
sizes = pf.models.ModelConfig(vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64)
model = pf.models.load(sizes)  # random weights
rng = np.random.default_rng(0)
requests = [(rng.integers(1, 64, 6).tolist(), int(n)) for n in rng.permutation([4, 6, 8, 10, 20, 30, 40, 50, 60])]


def order(policy):
  """The requests' lengths, in the order in which they ended."""
  engine = pf.Engine(model, num_slots=3, num_pages=64, page_size=4, policy=policy)
  state, lengths, ended = engine.init(), {}, []
  for prompt, max_tokens in requests:
    state, request = engine.submit(state, prompt, max_tokens=max_tokens, ignore_eos=True)
    lengths[request] = max_tokens
  while not state.idle:
    state, events = engine.step(state)
    ended += [lengths[event.request] for event in events if event.done]
  return ended


for policy in (policies.first_come, policies.shortest_first, aging):
  print(f"{policy.__name__:15s}", order(policy))
assert sorted(order(aging)) == sorted(n for _, n in requests)

# %% [markdown]
# Policies cannot break anything: they order requests, and the scheduler grants, shares and preempts as always; a
# request's tokens do not depend on them. `paged_flash/policies.py` has more: fair shares among tenants, priorities, the
# longest cached prefix first.
