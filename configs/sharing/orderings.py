"""The order in which requests are admitted decides what a prefix cache of limited size finds.

Claim (Zheng et al. 2024, "SGLang", sections 3 and 6.2): running the request with the longest cached prefix first keeps
what the cache holds in use before it is evicted; their cache-aware order reaches 96 % of the optimal hit rate on
average.

    python -m experiments.sharing --config=configs/sharing/orderings.py --config.trace=FILE.jsonl

FILE.jsonl is conversation_trace.jsonl or synthetic_trace.jsonl of kvcache-ai/Mooncake (Qin et al. 2025; Apache-2.0),
the first 2000 requests, all there from the start; the policy sees 256 of them at a time. Shortest first looks at
lengths alone. Expected: longest prefix first finds more than first come, first served where the memory is small, most
of all on the synthetic trace, whose requests share most. Found: it does, and shortest first finds more still.
`:smoke` draws lengths.
"""

import dataclasses

from experiments.claims import Claim
from experiments.sharing import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    num_requests=2000,
    page_size=512,
    num_tokens=(2**20, 2**21, 2**22),
    policies=("first_come", "shortest_first", "longest_prefix_first"),
    queue_size=256,
    num_slots=32,
    token_budget=16_384,
    max_seq_len=200_000,
    claim=Claim(
      number="15b",
      claim="Longest shared prefix first, for first come, first served: prefixes found in a small cache",
      source="Zheng et al. 2024, sections 3 and 6.2",
      theirs="96 % of the optimal hit rate on average, with their cache-aware order",
      figure="orderings",
    ),
  )
  smoke = dataclasses.replace(
    full,
    num_requests=4,
    queue_size=8,
    num_slots=4,
    num_tokens=(4096,),
    token_budget=512,
    max_seq_len=2048,
    policies=full.policies[::2],
  )
  return choose(variant, full=full, smoke=smoke)
