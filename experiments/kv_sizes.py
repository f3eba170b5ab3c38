"""How many bytes the KV cache takes, by model: per token, for many users, and what its page table adds.

    python -m experiments.kv_sizes --config=configs/kv_sizes/models.py

Arithmetic, but for the page table, which is made for so many users and weighed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pandas as pd

from experiments.claims import Claim
from paged_flash.analysis import human_bytes
from paged_flash.cache import page_table
from paged_flash.experiment import Workdir, main, write_result


@dataclasses.dataclass(kw_only=True)
class Architecture:
  """What decides the size of a model's KV cache: K and V of `num_kv_heads` heads, or one latent of all heads (MLA)."""

  name: str
  num_layers: int
  num_heads: int
  num_kv_heads: int = 0  # 0: a latent
  head_dim: int = 0
  latent_dim: int = 0  # compressed K and V and the rotary key
  source: str

  @property
  def attention(self) -> str:
    if self.latent_dim:
      return "MLA"
    return {1: "MQA", self.num_heads: "MHA"}.get(self.num_kv_heads, "GQA")

  def token_bytes(self, dtype: str) -> int:
    """Bytes of one token in all layers: 2 L K D, or L times the latent, times the size of a number."""
    values = self.latent_dim or 2 * self.num_kv_heads * self.head_dim
    return self.num_layers * values * jnp.dtype(dtype).itemsize


@dataclasses.dataclass(kw_only=True)
class Config:
  models: tuple[Architecture, ...] = ()
  dtypes: tuple[str, ...] = ("bfloat16", "float8_e4m3fn")  # without the scales that 8-bit pages have beside them
  users: int = 100
  context: int = 4096  # tokens of each
  page_size: int = 16
  known: dict[str, int] = dataclasses.field(default_factory=dict)  # bytes of a token in 16 bits that papers state
  claim: Claim | None = None
  result: str = ""  # name under experiments/results/kv_sizes/<device>/ to write to; "" writes none


def table_bytes(config: Config) -> int:
  """Bytes of the page table of all users, with a pool of as many pages as they need."""
  each = -(-config.context // config.page_size)
  make = page_table.init(
    num_slots=config.users, pages_per_slot=each, num_pages=config.users * each, page_size=config.page_size
  )
  return sum(leaf.nbytes for leaf in jax.tree.leaves(make))


def run(config: Config, workdir: Workdir) -> list[dict]:
  table, rows = table_bytes(config), []
  for model in config.models:
    for dtype in config.dtypes:
      token = model.token_bytes(dtype)
      held = token * config.users * config.context
      row = dict(model=model.name, attention=model.attention, dtype=dtype, token_bytes=token, users_bytes=held)
      row |= dict(page_bytes=token * config.page_size, table_share=table / held, source=model.source)
      rows.append(row)
      workdir.log(**row)
  wrong = [
    f"{name}: {model.token_bytes('bfloat16')} and not {config.known[name]}"
    for model in config.models
    if (name := model.name) in config.known and model.token_bytes("bfloat16") != config.known[name]
  ]
  shown = pd.DataFrame(rows).drop(columns="source")
  for key in ("token_bytes", "users_bytes", "page_bytes"):
    shown[key] = shown[key].map(human_bytes)
  print(f"{config.users} users of {config.context} tokens; their page table takes {human_bytes(table)}\n")
  print(shown.to_string(index=False, float_format="{:.1e}".format))
  claims = []
  if config.claim:
    largest = max(rows, key=lambda row: row["users_bytes"])
    ours = f"{len(config.known) - len(wrong)} of {len(config.known)} stated sizes to the byte; {largest['model']}: "
    ours += f"{human_bytes(largest['users_bytes'])}, its page table {largest['table_share']:.0e} of that"
    claims = [config.claim.judged("; ".join([ours, *wrong]), not wrong)]
  if config.result:
    print(
      write_result(
        "kv_sizes", rows, name=config.result, table_bytes=table, claims=claims, config=dataclasses.asdict(config)
      )
    )
  return rows


if __name__ == "__main__":
  main(run)
