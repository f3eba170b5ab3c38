"""Attention by others, in JAX: one small function each, all of the same form.

`PEERS[name].attend(case, query, key, value, segments, lengths)` takes [B, T, H, D] and [B, T, K, D] arrays and returns
[B, T, H, D]. It raises, saying why, where the package is missing or cannot do the case.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.attention_cases import Case, Inputs

MOST_SCORES = 10 * 2**30  # bytes of one float32 score matrix beyond which plain attention is not tried


@dataclasses.dataclass(frozen=True)
class Peer:
  label: str
  attend: Callable[..., jax.Array]
  is_half_scaled: bool = False  # takes float16 and queries already multiplied by the scale

  def inputs(self, case: Case, inputs: Inputs) -> Inputs:
    """The inputs in the form that the peer takes; not part of what is timed."""
    if not self.is_half_scaled:
      return inputs
    query, key, value, cotangent = (x.astype(jnp.float16) for x in inputs[:4])
    return Inputs((inputs.query * case.scale).astype(jnp.float16), key, value, cotangent, *inputs[4:])

  def program(self, case: Case, stage: str) -> Callable[..., tuple[jax.Array, ...]]:
    """A function of the inputs that returns (out,) or (out, d_query, d_key, d_value)."""

    def run(query, key, value, cotangent, segments, lengths):
      def attend(query, key, value):
        return self.attend(case, query, key, value, segments, lengths)

      if stage == "forward":
        return (attend(query, key, value),)
      out, pullback = jax.vjp(attend, query, key, value)
      return (out, *pullback(cotangent))

    return run

  def results(self, case: Case, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """What the program returned, as a function of queries that are not scaled."""
    if not self.is_half_scaled or len(results) == 1:
      return results
    out, d_query, *rest = results
    return (out, d_query.astype(jnp.float32) * case.scale, *rest)


def plain_xla(case: Case, query, key, value, segments, lengths):
  """With the whole score matrix, whatever its size."""
  if case.is_masked:
    raise NotImplementedError("timed without packed segments, windows and lengths only")
  return jax.nn.dot_product_attention(query, key, value, is_causal=case.is_causal, implementation="xla")


def naive(case: Case, query, key, value, segments, lengths):
  if (size := 4 * case.batch * case.num_heads * case.seq_len**2) > MOST_SCORES:
    raise NotImplementedError(f"its score matrix takes {size / 2**30:.0f} GiB")
  return plain_xla(case, query, key, value, segments, lengths)


def cudnn(case: Case, query, key, value, segments, lengths):
  return jax.nn.dot_product_attention(
    query, key, value, is_causal=case.is_causal, implementation="cudnn", **_masks(case, segments, lengths)
  )


def tokamax(case: Case, query, key, value, segments, lengths):
  import tokamax

  masks = _masks(case, segments, lengths)
  return tokamax.dot_product_attention(
    query, key, value, is_causal=case.is_causal, implementation="mosaic", **masks
  )  # fmt: skip


def _masks(case: Case, segments, lengths) -> dict[str, Any]:
  """Keyword arguments of `jax.nn.dot_product_attention`, which tokamax shares."""
  if case.segments:
    raise NotImplementedError("it takes no segment ids")
  masks: dict[str, Any] = dict(local_window_size=(case.window - 1, 0)) if case.window else {}
  return masks | (dict(query_seq_lengths=lengths, key_value_seq_lengths=lengths) if case.lengths else {})


def fa3(case: Case, query, key, value, segments, lengths):
  import flash_attn3_jax

  if case.segments or case.lengths:
    raise NotImplementedError("it takes no segment ids and no lengths")
  if case.head_dim != 128:
    raise NotImplementedError("it is built for head_dim 128 only")
  window = (case.window - 1, 0) if case.window else (-1, -1)
  return flash_attn3_jax.flash_mha(query, key, value, is_causal=case.is_causal, window_size=window)


def mgpu(case: Case, query, key, value, segments, lengths):
  from jax.experimental.pallas.ops.gpu import attention_mgpu

  if case.is_masked:
    raise NotImplementedError("it takes no segment ids, no window and no lengths")
  config = attention_mgpu.TuningConfig(
    block_q=64,
    block_kv={64: 256, 128: 128}.get(case.head_dim, 64),
    max_concurrent_steps=2,
    causal=case.is_causal,
    block_q_dkv=64,
    block_kv_dkv=64,
    block_q_dq=64,
    block_kv_dq=64,
  )
  return attention_mgpu.attention(query, key, value, config)


PEERS = {
  "naive": Peer("plain XLA", naive),
  "cudnn": Peer("cuDNN", cudnn),
  "mgpu": Peer("JAX's Mosaic kernel (fp16)", mgpu, is_half_scaled=True),
  "fa3": Peer("FlashAttention-3", fa3),
  "tokamax": Peer("tokamax", tokamax),
}
