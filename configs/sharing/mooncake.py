"""What the prefix cache finds in the Mooncake traces, beside a cache without bounds.

Claim: with a large pool the hit rate is within two points of the ideal, 37.4 % of the conversation trace's prompt
tokens and 65.1 % of the synthetic one's.

    python -m experiments.sharing --config=configs/sharing/mooncake.py --config.trace=FILE.jsonl

FILE.jsonl is conversation_trace.jsonl or synthetic_trace.jsonl of kvcache-ai/Mooncake (Qin et al. 2025; Apache-2.0).
Pages have the trace's 512 tokens; all requests are there from the start and run in order. Expected:
the hit rate rises with the memory, to the ideal but for prefixes computed side by side. `:smoke` draws lengths.

Found: 37.3 and 65.0 % with 134M tokens of memory, 34.3 and 64.4 % with 17M.
"""

import dataclasses

from experiments.sharing import Config
from paged_flash.experiment import choose


def get_config(variant: str = "full") -> Config:
  full = Config(
    page_size=512, num_tokens=(2**20, 2**22, 2**24, 2**27), num_slots=32, token_budget=16_384, max_seq_len=200_000
  )
  smoke = dataclasses.replace(full, num_requests=4, num_slots=4, num_tokens=(4096,), token_budget=512, max_seq_len=2048)
  return choose(variant, full=full, smoke=smoke)
