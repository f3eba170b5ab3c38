"""The engine on a GPU with a real model: float32 tokens are the CPU's, bfloat16 follows float32, no pool is copied."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_flash as pf
from paged_flash import models
from paged_flash.cache import kv_pages
from paged_flash.cache.page_table import NO_PAGE
from paged_flash.engine import Engine
from paged_flash.requests import Params

pytestmark = pytest.mark.gpu
REFERENCE = json.loads((Path(__file__).parent / "data" / "smollm2_reference.json").read_text())


def engine_of(model, **changes: Any) -> Engine:
  sizes: dict[str, Any] = dict(num_slots=8, num_pages=400, page_size=16, max_seq_len=2400, token_budget=192)
  return Engine(model, **{**sizes, **changes})


@pytest.fixture(scope="module")
def exact():
  return models.load("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def rounded():
  return models.load("smollm2-135m-instruct", dtype=jnp.bfloat16)


def outputs(engine, rows, driver="host"):
  stops = engine.model.tokenizer.eos_ids
  asked = [(row["prompt_ids"], Params(max_tokens=len(row["output_ids"]), stop_ids=stops)) for row in rows]
  return [list(completion.output_ids) for completion in engine.complete(asked, driver=driver)]


@pytest.mark.parametrize("driver", ["host", "device"])
def test_float32_tokens_are_those_of_transformers(exact, driver):
  wanted = [row["output_ids"] for row in REFERENCE]
  assert outputs(engine_of(exact), REFERENCE, driver) == wanted


def exact_logits(model, rows, longest):
  """f32[longest, V] of each row, prompt and output, by plain causal attention."""

  def plain(q, k, v, kv, layer):
    return pf.flash_attention(q[None], k[None], v[None], is_causal=True, implementation="xla")[0], kv

  @jax.jit
  def run(params, tokens):
    bound = model.bind(params)
    return bound.logits(bound(tokens, jnp.arange(longest), None, plain)[0])

  for row in rows:
    tokens = row["prompt_ids"] + row["output_ids"]
    yield np.asarray(run(model.params, jnp.asarray(tokens + [0] * (longest - len(tokens)))))[: len(tokens)]


def paged_logits(model, rows, longest, chunk, page_size=16):
  """The same by chunks of tokens through pages that lie anywhere."""
  c, num_pages = model.config, -(-longest // page_size)
  pages = jnp.asarray(np.random.default_rng(0).permutation(2 * num_pages)[:num_pages], jnp.int32)

  @functools.partial(jax.jit, donate_argnums=4)
  def run(params, tokens, start, count, kv):
    place = start + jnp.arange(chunk)
    mine = jnp.where(jnp.arange(chunk) < count, pages[jnp.minimum(place // page_size, num_pages - 1)], NO_PAGE)

    def attend(q, k, v, kv, layer):
      kv = kv_pages.write(kv, layer, k, v, mine, place % page_size)
      table = kv_pages.layer_pages(kv, pages, layer)[None]
      starts = None if chunk == 1 else jnp.stack([0, count])
      arguments: dict[str, Any] = dict(query_starts=starts, max_query_len=chunk, implementation="sm90")
      return pf.paged_attention(q, kv.k, kv.v, table, (start + count)[None], **arguments), kv

    bound = model.bind(params)
    hidden, kv = bound(tokens, place, kv, attend)
    return bound.logits(hidden), kv

  kv = kv_pages.init(
    num_layers=c.num_layers,
    num_pages=2 * num_pages,
    page_size=page_size,
    num_kv_heads=c.num_kv_heads,
    head_dim=c.head_dim,
    dtype=jnp.bfloat16,
  )
  for row in rows:
    tokens = row["prompt_ids"] + row["output_ids"]
    parts = []
    for start in range(0, len(tokens), chunk):
      some = tokens[start : start + chunk]
      padded = jnp.asarray(some + [0] * (chunk - len(some)))
      logits, kv = run(model.params, padded, jnp.int32(start), jnp.int32(len(some)), kv)
      parts.append(np.asarray(logits)[: len(some)])
    yield np.concatenate(parts)


@pytest.mark.parametrize("chunk", [1, 128])
def test_bfloat16_from_pages_follows_float32(exact, rounded, chunk):
  """Teacher-forced: wherever float32 prefers a token by 0.3, bfloat16 chooses it; logits differ by 0.2 in the mean."""
  rows = sorted(REFERENCE, key=lambda row: len(row["prompt_ids"]))[: 5 if chunk == 1 else None]
  longest = max(len(row["prompt_ids"] + row["output_ids"]) for row in rows)
  both = zip(exact_logits(exact, rows, longest), paged_logits(rounded, rows, longest, chunk), strict=True)
  differences, alike = [], []
  for row, (want, got) in zip(rows, both, strict=True):
    second, first = np.sort(want, axis=-1)[:, -2:].T
    same = got.argmax(-1) == want.argmax(-1)
    assert same[first - second > 0.3].all(), row["name"]
    largest = np.argsort(want, axis=-1)[:, -5:]
    differences.append(np.abs(np.take_along_axis(got - want, largest, -1)).mean(-1))
    alike.append(same)
  difference, same = np.concatenate(differences), np.concatenate(alike)
  print(f"chunks of {chunk}: the five largest logits differ by {difference.mean():.3f}, {same.mean():.1%} alike")
  assert difference.mean() < 0.2


def test_bfloat16_tokens_do_not_depend_on_where_pages_lie(rounded):
  rows = [row for row in REFERENCE if len(row["prompt_ids"]) <= 200]
  wanted = outputs(engine_of(rounded, prefix_cache=False), rows)
  for page_size in (8, 64):
    engine = engine_of(rounded, prefix_cache=False, page_size=page_size)
    assert outputs(engine, rows) == wanted


@pytest.mark.parametrize("program", ["step", "run"])
def test_a_step_runs_our_kernels_and_copies_no_pool(program):
  sizes: dict[str, Any] = dict(
    vocab_size=512, embed_dim=512, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=64, ffn_dim=512
  )
  model = models.load(models.ModelConfig(**sizes, max_seq_len=4096), dtype=jnp.bfloat16)
  engine = engine_of(model, num_pages=4099)
  state = engine.init()
  args = (np.int32(3),) if program == "run" else ()
  lowered = getattr(engine, f"_{program}").lower(model.params, state.scheduler, state.kv, *args)
  compiled = lowered.compile()
  kernels = re.findall(r"custom_call_target=\"mosaic_gpu\w*\"", compiled.as_text())
  assert len(kernels) >= 3 * model.config.num_layers  # pages written; decode, chunks
  shape = ",".join(map(str, state.kv.k.shape))
  made = [line for line in compiled.as_text().splitlines() if f"[{shape}]" in line.split(" = ")[-1].split("(")[0]]
  assert made and not [line for line in made if " copy(" in line or "copy-start(" in line]
  assert compiled.memory_analysis().temp_size_in_bytes < state.kv.k.nbytes / 2
