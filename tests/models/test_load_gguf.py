"""Tiny GGUF files written with the `gguf` package, against a forward pass in numpy float64; and broken ones."""

from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from paged_flash.models import Model, load
from paged_flash.models.gguf_file import GGUFFile

E, F, L, H, K, D, V = 64, 96, 2, 4, 2, 16, 32
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
SHAPES = {
  "attn_norm.weight": (E,),
  "attn_q.weight": (H * D, E),
  "attn_k.weight": (K * D, E),
  "attn_v.weight": (K * D, E),
  "attn_output.weight": (E, H * D),
  "ffn_norm.weight": (E,),
  "ffn_gate.weight": (F, E),
  "ffn_up.weight": (F, E),
  "ffn_down.weight": (E, F),
}
BIASES = {"attn_q.bias": (H * D,), "attn_k.bias": (K * D,), "attn_v.bias": (K * D,)}


def make_tensors(seed: int, *, biases: bool = False, tied: bool = False) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  layer = SHAPES | (BIASES if biases else {})
  shapes = {f"blk.{i}.{name}": shape for i in range(L) for name, shape in layer.items()}
  shapes |= {"token_embd.weight": (V, E), "output_norm.weight": (E,)} | ({} if tied else {"output.weight": (V, E)})
  return {
    name: (("norm" in name) + rng.standard_normal(shape) * (0.2 if len(shape) > 1 else 0.5)).astype(np.float32)
    for name, shape in shapes.items()
  }


def write(path, tensors, *, arch="llama", dtypes=lambda name: Type.F32, **keys):
  """Writes a file and returns the tensors as they can be read back, after quantisation."""
  writer = gguf.GGUFWriter(path, arch)
  sizes = {
    "context_length": 128,
    "embedding_length": E,
    "block_count": L,
    "feed_forward_length": F,
    "attention.head_count": H,
    "attention.head_count_kv": K,
    "vocab_size": V,
  }
  for key, value in (sizes | keys).items():
    match value:
      case None:
        pass
      case int():
        writer.add_uint32(f"{arch}.{key}", value)
      case float():
        writer.add_float32(f"{arch}.{key}", value)
      case str():
        writer.add_string(f"{arch}.{key}", value)
  if "attention.layer_norm_rms_epsilon" not in keys:
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
  stored = {}
  for name, array in tensors.items():
    dtype = dtypes(name)
    data = array.astype(np.int8) if dtype == Type.I8 else gguf.quantize(array, dtype)
    writer.add_tensor(name, data, raw_dtype=dtype)
    stored[name] = array if dtype == Type.I8 else gguf.dequantize(data, dtype).reshape(array.shape)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return stored


def forward(w, *, neighbours: bool, base: float = 10_000.0, divisors: Any = 1.0) -> np.ndarray:
  """Logits [T, V] in float64, straight from the file's tensors: rotates neighbours where the file wants that."""
  w = {name: array.astype(np.float64) for name, array in w.items()}
  angles = np.arange(len(TOKENS))[:, None] / base ** (2 * np.arange(D // 2) / D) / divisors  # [T, D / 2]
  turn = np.exp(1j * angles)[:, None]

  def norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5)) * weight

  def rotate(x):  # [T, heads, D]
    pairs = (x[..., 0::2], x[..., 1::2]) if neighbours else (x[..., : D // 2], x[..., D // 2 :])
    z = (pairs[0] + 1j * pairs[1]) * turn
    return np.stack([z.real, z.imag], -1).reshape(x.shape) if neighbours else np.concatenate([z.real, z.imag], -1)

  x = w["token_embd.weight"][TOKENS]
  for i in range(L):
    p = f"blk.{i}."
    y = norm(x, w[p + "attn_norm.weight"])
    q, k, v = (y @ w[f"{p}attn_{n}.weight"].T + w.get(f"{p}attn_{n}.bias", 0.0) for n in "qkv")
    q, k, v = (a.reshape(len(TOKENS), -1, D) for a in (q, k, v))
    q, k = rotate(q), rotate(k)
    heads = []
    for h in range(H):
      scores = q[:, h] @ k[:, h // (H // K)].T / np.sqrt(D)
      scores = np.exp(np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf))
      heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, h // (H // K)])
    x = x + np.concatenate(heads, -1) @ w[p + "attn_output.weight"].T
    y = norm(x, w[p + "ffn_norm.weight"])
    gate, up = y @ w[p + "ffn_gate.weight"].T, y @ w[p + "ffn_up.weight"].T
    x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "ffn_down.weight"].T
  return norm(x, w["output_norm.weight"]) @ w.get("output.weight", w["token_embd.weight"]).T


def logits(model: Model) -> np.ndarray:
  def attend(q, k, v, kv, layer):
    k, v = (jnp.repeat(x, H // K, axis=-2) for x in (k, v))
    scores = jnp.einsum("thd,shd->hts", q, k, precision="highest") / D**0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[1:], bool)), scores, -jnp.inf)
    scores = jnp.exp(scores - scores.max(-1, keepdims=True))
    return jnp.einsum("hts,shd->thd", scores / scores.sum(-1, keepdims=True), v, precision="highest"), kv

  bound = model.bind(model.params)
  hidden, _ = bound(jnp.array(TOKENS), jnp.arange(len(TOKENS)), None, attend)
  return np.asarray(bound.logits(hidden))


def mixed(name: str) -> Type:
  """One file with several quantisations, norms and biases in float32 as usual."""
  if "norm" in name or "bias" in name:
    return Type.F32
  return {"attn_q": Type.Q8_0, "attn_k": Type.F16, "attn_v": Type.BF16, "ffn_up": Type.Q4_1, "ffn_gate": Type.Q5_0}.get(
    name.split(".")[-2], Type.Q8_0
  )


@pytest.mark.parametrize(
  "case",
  [
    dict(arch="llama"),
    dict(arch="llama", dtypes=mixed, tied=True),
    dict(arch="llama", dtypes=mixed, biases=True, **{"rope.freq_base": 300.0}),
    dict(arch="qwen2", dtypes=mixed, biases=True),
    dict(arch="qwen2", biases=True, tied=True, **{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    dict(arch="llama", **{"rope.scale_linear": 2.0}),
  ],
  ids=["llama", "llama mixed tied", "llama biases base", "qwen2 mixed", "qwen2 linear tied", "llama old linear"],
)
def test_logits_equal_numpy(case, tmp_path):
  case = dict(case)
  tensors = make_tensors(7, biases=case.pop("biases", False), tied=case.pop("tied", False))
  stored = write(tmp_path / "m.gguf", tensors, **case)
  model = load(tmp_path / "m.gguf")
  divisors = case.get("rope.scaling.factor", case.get("rope.scale_linear", 1.0))
  base = case.get("rope.freq_base", 10_000.0)
  want = forward(stored, neighbours=case["arch"] == "llama", base=base, divisors=divisors)
  np.testing.assert_allclose(logits(model), want, atol=1e-4, rtol=1e-4)
  assert model.tokenizer is None


def test_rope_frequency_factors_are_honoured(tmp_path):
  divisors = np.linspace(1, 8, D // 2).astype(np.float32)
  stored = write(tmp_path / "m.gguf", make_tensors(3) | {"rope_freqs.weight": divisors})
  model = load(tmp_path / "m.gguf")
  assert model.config.rope_scaling.kind == "factors"
  want = forward(stored, neighbours=True, divisors=divisors)
  np.testing.assert_allclose(logits(model), want, atol=1e-4, rtol=1e-4)
  assert np.abs(want - forward(stored, neighbours=True)).max() > 1e-2


def test_params_are_the_files_values_fused(tmp_path):
  stored = write(tmp_path / "m.gguf", make_tensors(5, biases=True), arch="qwen2", dtypes=mixed)
  layer = load(tmp_path / "m.gguf").params["layers"][1]
  wanted = np.concatenate([stored[f"blk.1.attn_{name}.weight"] for name in "qkv"])
  np.testing.assert_array_equal(layer["qkv"]["weight"], wanted)
  wanted = np.concatenate([stored["blk.1.ffn_gate.weight"], stored["blk.1.ffn_up.weight"]])
  np.testing.assert_array_equal(layer["gate_up"]["weight"], wanted)
  half = load(tmp_path / "m.gguf", dtype=jnp.bfloat16).params["layers"][1]["down"]["weight"]
  np.testing.assert_array_equal(half, jnp.asarray(stored["blk.1.ffn_down.weight"]).astype(jnp.bfloat16))


def test_reader_equals_the_gguf_package(tmp_path):
  write(tmp_path / "m.gguf", make_tensors(5), dtypes=mixed)
  ours, theirs = GGUFFile(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
  for key, value in ours.metadata.items():
    assert theirs.fields[key].contents() == value, key
  for tensor in theirs.tensors:
    np.testing.assert_array_equal(ours.read(tensor.name), gguf.dequantize(tensor.data, tensor.tensor_type))


# Every broken file, and what the error must say.


def test_not_gguf_and_empty(tmp_path):
  for content in (b"", b"GG", b"PK\x03\x04 and more of this", b"GGUF\x01\x00\x00\x00" + bytes(16), b"GGUF\x03"):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="m.gguf: truncated or corrupt GGUF file, at the header"):
      load(tmp_path / "m.gguf")


def test_every_truncation_is_refused(tmp_path):
  write(tmp_path / "m.gguf", make_tensors(1))
  content = (tmp_path / "m.gguf").read_bytes()
  end = max(t.start + t.num_bytes for t in GGUFFile(tmp_path / "m.gguf").tensors.values())
  for length in [*range(0, 1200, 37), *range(1200, end, 9973), end - 1]:
    (tmp_path / "cut.gguf").write_bytes(content[:length])
    with pytest.raises(ValueError, match="cut.gguf: truncated or corrupt GGUF file, at "):
      load(tmp_path / "cut.gguf")


def test_flipped_bytes_in_the_head_never_raise_anything_else(tmp_path):
  write(tmp_path / "m.gguf", make_tensors(1))
  content = bytearray((tmp_path / "m.gguf").read_bytes())
  head = min(t.start for t in GGUFFile(tmp_path / "m.gguf").tensors.values())
  rng = np.random.default_rng(0)
  refused = 0
  for at in rng.choice(head, 150, replace=False):
    broken = bytearray(content)
    broken[at] ^= 1 << int(rng.integers(8))
    (tmp_path / "flip.gguf").write_bytes(broken)
    try:
      load(tmp_path / "flip.gguf")
    except ValueError as error:
      refused += 1
      assert "flip.gguf" in str(error)
  assert refused > 60  # most of the head matters; padding and the values of some keys do not


def without(name):
  return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
  "change, keys, message",
  [
    (without("blk.1.ffn_up.weight"), {}, r"1 tensors are missing: blk\.1\.ffn_up\.weight"),
    (
      lambda t: t | {"blk.0.attn_k.weight": t["blk.0.attn_q.weight"]},
      {},
      r"blk\.0\.attn_k\.weight must have shape \(32, 64\), got \(64, 64\)",
    ),
    (
      lambda t: t | {"blk.0.ffn_gate_inp.weight": np.zeros((4, E), np.float32)},
      {},
      r"1 tensors belong to no part of the model: blk\.0\.ffn_gate_inp\.weight",
    ),
    (dict, {"arch": "lama"}, r"general.architecture .*llama, mistral, qwen2, qwen3.*got 'lama'; did you mean 'llama'"),
    (dict, {"arch": "mamba"}, r"general.architecture must be a supported architecture .* got 'mamba'"),
    (dict, {"block_count": None}, r"lacks 'llama.block_count'"),
    (dict, {"attention.head_count_kv": 3}, r"num_heads must be a multiple of num_kv_heads, got num_heads=4"),
    (dict, {"rope.dimension_count": 8}, r"llama.rope.dimension_count must be 16 .* got 8"),
    (dict, {"block_count": 2**31}, r"2147483648 layers cannot come from 21 tensors"),
    (dict, {"expert_count": 8}, r"llama.expert_count must be 0"),
    (dict, {"rope.scaling.type": "longrope"}, r"rope scaling must be one of .* got 'longrope'"),
    (dict, {"dtypes": lambda n: Type.I8 if n == "blk.0.ffn_up.weight" else Type.F32}, r"ffn_up.weight.* dtype I8"),
  ],
)
def test_wrong_contents_are_named(change, keys, message, tmp_path):
  write(tmp_path / "m.gguf", change(make_tensors(1)), **keys)
  with pytest.raises(ValueError, match=message) as caught:
    load(tmp_path / "m.gguf")
  assert str(tmp_path / "m.gguf") in str(caught.value)


def test_undequantisable_type_is_named(tmp_path):
  write(tmp_path / "m.gguf", make_tensors(1))
  content = (tmp_path / "m.gguf").read_bytes()
  name = b"blk.0.ffn_up.weight"
  at = content.index(name) + len(name) + 4 + 16  # behind the number of dimensions and two of them
  assert content[at : at + 4] == bytes(4)  # F32
  (tmp_path / "m.gguf").write_bytes(content[:at] + int(Type.F64).to_bytes(4, "little") + content[at + 4 :])
  with pytest.raises(ValueError, match=r"gguf cannot dequantise tensor 'blk.0.ffn_up.weight', dtype F64"):
    load(tmp_path / "m.gguf")
