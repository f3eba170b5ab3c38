"""SmolLM2-135M-Instruct against Transformers in float32: logits and greedy tokens, teacher-forced."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_flash.models import load

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "smollm2_reference.json").read_text())
TOLERANCE = 2e-4  # of float32 logits, whose standard deviation is about 6
GROUPS = {
  "short prompts": [row for row in REFERENCE if len(row["prompt_ids"]) <= 192],
  "hundreds": [row for row in REFERENCE if 192 < len(row["prompt_ids"]) <= 1000],
  "over a thousand": [row for row in REFERENCE if 1000 < len(row["prompt_ids"]) <= 2000],
  "over two thousand": [row for row in REFERENCE if 2000 < len(row["prompt_ids"])],
}
SLOW = ("over a thousand", "over two thousand")


@pytest.fixture(scope="module")
def model():
  return load("smollm2-135m-instruct")


def attend(q, k, v, kv, layer):
  """Plain causal attention over [B, T] tokens, 256 queries at a time over the keys up to theirs."""
  batch, length, heads, width = q.shape
  q = q.reshape(batch, length, k.shape[-2], -1, width)
  outs = []
  for start in range(0, length, 256):
    end = min(start + 256, length)
    scores = jnp.einsum("btkgd,bskd->bkgts", q[:, start:end], k[:, :end], precision="highest") / width**0.5
    scores = jnp.where(jnp.arange(start, end)[:, None] >= jnp.arange(end), scores, -jnp.inf)
    outs.append(jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores), v[:, :end], precision="highest"))
  return jnp.concatenate(outs, axis=1).reshape(batch, length, heads, width), kv


def test_reference_covers_what_it_should():
  lengths = [len(row["prompt_ids"]) for row in REFERENCE]
  assert len(REFERENCE) >= 12 and min(lengths) == 1 and max(lengths) > 2000
  assert sum(map(len, GROUPS.values())) == len(REFERENCE) and all(GROUPS.values())
  assert min(row["min_margin"] for row in REFERENCE) >= 2e-3
  assert any(row["output_ids"][-1] == 2 for row in REFERENCE)  # some stop


@pytest.mark.parametrize("group", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in GROUPS])
def test_teacher_forced_outputs_equal_transformers(model, group):
  rows = GROUPS[group]
  longest = max(len(row["prompt_ids"]) + len(row["output_ids"]) for row in rows)
  tokens, at = np.zeros((len(rows), longest), np.int32), np.zeros((len(rows), 48), np.int32)
  for i, row in enumerate(rows):
    ids = row["prompt_ids"] + row["output_ids"]
    tokens[i, : len(ids)] = ids
    at[i, : len(row["output_ids"])] = len(row["prompt_ids"]) - 1 + np.arange(len(row["output_ids"]))

  @jax.jit
  def run(params, tokens, at):
    bound = model.bind(params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = bound(tokens, positions, None, attend)  # [B, T, E]
    return bound.logits(jnp.take_along_axis(hidden, at[..., None], axis=1))  # f32[B, 48, V]

  logits = np.asarray(run(model.params, tokens, at))
  for row, mine in zip(rows, logits, strict=True):
    output = row["output_ids"]
    assert mine[: len(output)].argmax(-1).tolist() == output, row["name"]
    for top in row["top"]:
      error = np.abs(mine[top["step"], top["ids"]] - top["logits"]).max()
      assert error <= TOLERANCE, f"{row['name']}, step {top['step']}: logits differ by {error}"


def test_config_is_what_the_file_says(model):
  config = model.config
  assert (config.num_layers, config.embed_dim, config.ffn_dim) == (30, 576, 1536)
  assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
  assert (config.vocab_size, config.max_seq_len, config.rope_base) == (49152, 8192, 100_000)
  assert config.tie_embeddings and not config.qkv_bias and config.norm_eps == np.float32(1e-5)
  assert config.kv_values_per_token == 11520
  assert sum(array.size for array in jax.tree.leaves(model.params)) == 134_515_008
