"""Prompts computed in chunks beside decoding requests: nobody waits for the whole of a long prompt.

Claim (Agrawal et al. 2024, "Sarathi-Serve", abstract): chunked prefills bound the time between tokens ("stall-free"),
which lets a server carry 2.6 times the load (Mistral-7B) to 5.6 times (Falcon-180B, pipelined) under the same bounds on
its tail latency.

    python -m experiments.batching --config=configs/batching/chunks.py --config.trace=FILE.csv

FILE.csv is AzureLLMInferenceTrace_conv.csv of Azure/AzurePublicDataset (Patel et al. 2024; CC-BY-4.0), its first 400
requests at 20 a second, Llama-3-8B on one H200 by a roofline. Expected: the longest waits fall with the tokens of a
step, and the time to the first token rises where the steps become too small to keep the device busy. Found: both;
steps of 512 tokens cut the 99th percentile from 122 to 15 ms and cost 13 ms in the median to the first token. The load
within a bound was not searched.
"""

import dataclasses

from experiments.batching import Config, Way
from experiments.claims import Claim
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    ways=tuple(Way(name=f"{budget} tokens", token_budget=budget) for budget in (16384, 4096, 2048, 1024, 512, 256)),
    num_requests=400,
    rate=20.0,
    num_slots=128,
    num_tokens=524_288,
    figure="stalls",
    claim=Claim(
      number="15a",
      claim="Chunked prefill: no stalls between the tokens of running requests",
      source="Agrawal et al. 2024, abstract",
      theirs="2.6 x (Mistral-7B) to 5.6 x (Falcon-180B, pipelined) the load under the same bounds on tail latency",
      figure="stalls",
    ),
    result="chunks",
  )
  smoke = dataclasses.replace(
    full, ways=full.ways[-2:], num_requests=6, num_slots=256, num_tokens=16_384, log_size=8192, result=""
  )
  return choose(variant, full=full, smoke=smoke)
