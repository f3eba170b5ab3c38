"""Writes families_reference.json: logits of Transformers for a tiny model of every supported kind.

Run where torch and transformers are installed:  python tests/data/make_families_reference.py

The weights come from a formula (`weight`), so that the test can make the same ones: only configs, names, shapes and
logits are stored. Long positions show rope scaling; the tokens are fewer than the positions reach.
"""

import json
import zlib
from pathlib import Path

import numpy as np

BASE = {
  "vocab_size": 48,
  "hidden_size": 32,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 256,
  "rms_norm_eps": 1e-5,
  "hidden_act": "silu",
  "tie_word_embeddings": False,
}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
  "llama": {"model_type": "llama", "rope_theta": 500.0},
  "llama, biases, tied": {
    "model_type": "llama",
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "num_key_value_heads": 1,
  },
  "llama, llama3": {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": LLAMA3},
  "llama, linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
  "qwen2, yarn": {"model_type": "qwen2", "rope_theta": 500.0, "rope_scaling": YARN},
  "qwen2, yarn, given": {
    "model_type": "qwen2",
    "rope_scaling": {**YARN, "attention_factor": 0.8, "beta_fast": 16.0, "beta_slow": 2.0},
  },
  "qwen2, window": {
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 3,
    "max_window_layers": 0,
  },
  "mistral, window": {"model_type": "mistral", "sliding_window": 4, "head_dim": 12},
  "qwen3": {"model_type": "qwen3", "head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 3},
  "qwen3, bias": {
    "model_type": "qwen3",
    "head_dim": 8,
    "attention_bias": True,
    "rope_parameters": LLAMA3 | {"rope_theta": 900.0},
  },
}
TOKENS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7]
POSITIONS = [0, 1, 2, 3, 50, 51, 100, 150, 200, 255]


def weight(name: str, shape: list[int]) -> np.ndarray:
  """A repeatable weight for a name: sines of large steps, around 1 for norms."""
  steps = np.arange(np.prod(shape)) * 2.399963229728653 + zlib.crc32(name.encode()) % 1000
  return ((1.0 if "norm" in name else 0.0) + 0.25 * np.sin(steps * (1 + steps % 7))).reshape(shape).astype(np.float32)


def main():
  import torch
  from transformers import AutoConfig, AutoModelForCausalLM

  rows = []
  for name, changes in FAMILIES.items():
    raw = BASE | changes
    config = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().to(torch.float32)
    state = {key: value for key, value in model.state_dict().items() if "inv_freq" not in key}
    if raw["tie_word_embeddings"]:
      del state["lm_head.weight"]
    model.load_state_dict({key: torch.tensor(weight(key, list(value.shape))) for key, value in state.items()}, False)
    model.tie_weights()
    with torch.inference_mode():
      inputs = {"input_ids": torch.tensor([TOKENS]), "position_ids": torch.tensor([POSITIONS])}
      # Without a mask, Transformers takes a jump in the positions for the beginning of another sequence.
      logits = model(**inputs, attention_mask=torch.ones(1, len(TOKENS))).logits[0]
    shapes = {key: list(value.shape) for key, value in state.items()}
    rounded = [[round(value, 5) for value in row] for row in logits.tolist()]
    rows.append({"name": name, "config": raw, "shapes": shapes, "logits": rounded})
    print(name, float(logits.std()))
  path = Path(__file__).with_name("families_reference.json")
  everything = {"tokens": TOKENS, "positions": POSITIONS, "families": rows}
  path.write_text(json.dumps(everything, separators=(",", ":")) + "\n")


if __name__ == "__main__":
  main()
