"""Every supported kind of model against Transformers: the same formula weights, written as a sharded folder."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from paged_flash.models import Model, load

DATA = Path(__file__).parents[1] / "data"
REFERENCE = json.loads((DATA / "families_reference.json").read_text())
FAMILIES = {row["name"]: row for row in REFERENCE["families"]}


def formula_weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
  spec = importlib.util.spec_from_file_location("make_families_reference", DATA / "make_families_reference.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return {name: module.weight(name, shape) for name, shape in shapes.items()}


def write_folder(folder: Path, row: dict, num_shards: int = 3) -> Path:
  weights = formula_weights(row["shapes"])
  (folder / "config.json").write_text(json.dumps(row["config"]))
  weight_map = {name: f"model-{i % num_shards}.safetensors" for i, name in enumerate(weights)}
  for shard in set(weight_map.values()):
    save_file({name: weights[name] for name in weights if weight_map[name] == shard}, folder / shard)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  return folder


def logits(model: Model, tokens, positions) -> jax.Array:
  """All logits, with plain attention over the order of the tokens and the config's window."""
  order = jnp.arange(len(tokens))
  visible = order[:, None] >= order
  if model.config.sliding_window is not None:
    visible &= order[:, None] - order < model.config.sliding_window

  def attend(q, k, v, kv, layer):
    k, v = (jnp.repeat(x, q.shape[-2] // x.shape[-2], axis=-2).astype(jnp.float32) for x in (k, v))
    scores = jnp.einsum("thd,shd->hts", q.astype(jnp.float32), k, precision="highest") * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
    return jnp.einsum("hts,shd->thd", weights, v, precision="highest").astype(q.dtype), kv

  @jax.jit
  def run(params):
    bound = model.bind(params)
    hidden, _ = bound(jnp.asarray(tokens), jnp.asarray(positions), None, attend)
    return bound.logits(hidden)

  return run(model.params)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, tmp_path):
  row = FAMILIES[name]
  model = load(write_folder(tmp_path, row))
  got = logits(model, REFERENCE["tokens"], REFERENCE["positions"])
  np.testing.assert_allclose(got, row["logits"], atol=3e-5, rtol=0)


def test_bfloat16_is_near(tmp_path):
  row = FAMILIES["qwen3"]
  model = load(write_folder(tmp_path, row), dtype=jnp.bfloat16)
  assert {array.dtype for array in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
  got = logits(model, REFERENCE["tokens"], REFERENCE["positions"])
  assert got.dtype == jnp.float32
  error = np.abs(np.asarray(got) - row["logits"])
  assert error.max() < 0.3 and 1e-4 < error.mean() < 0.03  # bfloat16 indeed, and not more than that
