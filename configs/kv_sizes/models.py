"""The KV cache of a model of 70B with 100 users of 4k tokens each: 1000 GiB with a KV head for each head, 125 with GQA.

Claim (Kwon et al. 2023, section 3): one token of OPT-13B takes 2 x 5120 x 40 x 2 bytes = 800 KiB, a request of 2048
tokens 1.6 GB. The same formula, L layers x K KV heads x D x 2 x bytes, for the models that people serve.

    python -m experiments.kv_sizes --config=configs/kv_sizes/models.py

Shapes are those of each model's published config.json or paper. Expected: 16-bit sizes of a token from 8 KiB (MQA) to
2.5 MiB (MHA of 64 heads); a page table is a millionth of what it maps. Found: so, and up to 6e-5 where a token takes
8 KiB.
"""

import dataclasses

from experiments.claims import Claim
from experiments.kv_sizes import Architecture, Config
from paged_flash.experiment import choose

MODELS = (
  Architecture(name="OPT-13B", num_layers=40, num_heads=40, num_kv_heads=40, head_dim=128, source="Zhang et al. 2022"),
  Architecture(
    name="GPT-3 175B", num_layers=96, num_heads=96, num_kv_heads=96, head_dim=128, source="Brown et al. 2020"
  ),
  Architecture(
    name="Llama-2-70B, were it MHA", num_layers=80, num_heads=64, num_kv_heads=64, head_dim=128, source="for comparison"
  ),
  Architecture(
    name="Llama-2-70B", num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128, source="Touvron et al. 2023"
  ),
  Architecture(
    name="Llama-3-8B", num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, source="Dubey et al. 2024"
  ),
  Architecture(
    name="Llama-3.1-405B", num_layers=126, num_heads=128, num_kv_heads=8, head_dim=128, source="Dubey et al. 2024"
  ),
  Architecture(name="Mistral-7B", num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, source="config.json"),
  Architecture(name="Qwen3-8B", num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128, source="config.json"),
  Architecture(name="Qwen3-235B-A22B", num_layers=94, num_heads=64, num_kv_heads=4, head_dim=128, source="config.json"),
  Architecture(name="Falcon-7B", num_layers=32, num_heads=71, num_kv_heads=1, head_dim=64, source="config.json"),
  Architecture(name="DeepSeek-V3", num_layers=61, num_heads=128, latent_dim=512 + 64, source="DeepSeek-AI 2024"),
  Architecture(name="SmolLM2-135M", num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, source="config.json"),
)


def get_config(variant: str = "full") -> Config:
  full = Config(
    models=MODELS,
    known={"OPT-13B": 819_200},
    claim=Claim(
      number="7",
      claim="Size of the KV cache: 2 L K D bytes a token",
      source="Kwon et al. 2023, section 3",
      theirs="OPT-13B: 800 KiB a token, 1.6 GB a request",
    ),
    result="models",
  )
  return choose(variant, full=full, smoke=dataclasses.replace(full, result=""))
