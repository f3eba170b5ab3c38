"""The Azure traces of 2023 on one H200 with a model of 8B: what the memory is worth to a modern server.

    python -m experiments.simulate --config=configs/simulate/azure_h200.py --config.trace=FILE.csv

FILE.csv is AzureLLMInferenceTrace_conv.csv or _code.csv of Azure/AzurePublicDataset (Patel et al. 2024; CC-BY-4.0), the
first 1500 requests, with the trace's own arrivals scaled to each rate. 524,288 tokens of memory, 64 GiB. Expected:
pages sustain several times the rate of reservations of 16,384 tokens. `:smoke` draws lengths.

Found (conversations): with max 10 requests/s are sustained, at 20 the median waits 13.5 s for its first token; with
pages 20 are, in 0.07 s, and so they are with pow2 and oracle, for there the memory is no longer the limit. At 40 all
queue, pages least: 216 running, 206 with oracle, 31 with max.
"""

import dataclasses

from experiments.simulate import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    num_requests=1500,
    rates=(5.0, 10.0, 20.0, 40.0),
    latency="llama_8b_h200",
    max_seq_len=16_384,
    num_slots=256,
    num_tokens=524_288,
    token_budget=4096,
  )
  smoke = dataclasses.replace(full, num_requests=6, rates=(2.0,), num_slots=4, num_tokens=32_768, token_budget=256)
  return choose(variant, full=full, smoke=smoke)
