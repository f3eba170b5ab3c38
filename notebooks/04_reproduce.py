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
# # What the papers claim, and what became of it
#
# Every number in the documents comes from a committed result under `experiments/results/`, made by a config. This
# notebook loads them, shows who measured what and where, and draws the figures again. Nothing is run: to run a claim
# anew, take the command in its config's docstring (`python -m experiments.list`).

# %%
import json
import pathlib
import sys

import pandas as pd

ROOT = pathlib.Path.cwd().parent
sys.path.append(str(ROOT))  # where experiments/ is
from experiments.report import FIGURES, source  # noqa: E402

results = {}
for path in sorted((ROOT / "experiments" / "results").glob("**/*.json")):
  name = path.relative_to(ROOT / "experiments" / "results").with_suffix("").as_posix()
  results[name] = json.loads(path.read_text())
for name, result in results.items():
  print(f"{name:32s} {len(result['rows']):3d} rows   {source(result).strip('*')}")

# %% [markdown]
# ## The claims
#
# "In part" and "not reproduced" are results too; each row says what was found.

# %%
claims = [claim for result in results.values() for claim in result.get("claims", [])]
for claim in sorted(claims, key=lambda claim: (int("".join(filter(str.isdigit, claim["number"]))), claim["number"])):
  print(f"{claim['number']:>3s} {claim['verdict']}: {claim['claim']} ({claim['source']})\n      {claim['ours']}")

# %% [markdown]
# ## The figures
#
# Each result knows the figure that shows it.


# %%
def figure_of(name):
  """The figure of a result's first claim."""
  return FIGURES[results[name]["claims"][0]["figure"]](results[name])


drawable = [name for name, result in results.items() if result.get("claims") and result["claims"][0]["figure"]]
print(drawable)

# %% [markdown]
# Bytes that attention moves: inversely to the size of its tiles, as Theorem 2 of the FlashAttention paper says, and
# little more than every operand once where an L2 cache stands behind.

# %%
figure_of("attention_io/cpu/tiles")

# %% [markdown]
# Requests in the batch over time: a static batch waits for its longest request, continuous batching does not.

# %%
figure_of("batching/cpu/continuous")

# %% [markdown]
# Prompts in chunks: the smaller the step, the shorter the waits between tokens, and the later the first one.

# %%
figure_of("batching/cpu/chunks")

# %% [markdown]
# ## The rows themselves
#
# Any result is a table. This one has the size of the KV cache by model, for 100 users of 4096 tokens.

# %%
rows = [row for row in results["kv_sizes/cpu/models"]["rows"] if row["dtype"] == "bfloat16"]
rows = [row | dict(GiB=row["users_bytes"] / 2**30) for row in rows]
print(pd.DataFrame(rows, columns=["model", "attention", "token_bytes", "GiB", "table_share"]).to_string(index=False))
