"""The peer of experiments.cpu_serving: Hugging Face Transformers, in an environment of its own.

Started with one JSON argument {folder, file, prompts, num_tokens, threads}; answers every line of its standard input,
"versions", "generate" (one padded batch) or "generate_batch" (its paged continuous batching), with one line of JSON.
"""

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])
model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], gguf_file=job["file"], dtype=torch.float32)
model.eval()
prompts, num_tokens = job["prompts"], job["num_tokens"]
ids = torch.tensor(prompts)


def generate():
  with torch.inference_mode():
    out = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=num_tokens,
      min_new_tokens=num_tokens,
      do_sample=False,
      eos_token_id=None,
    )
  assert out.shape[1] == ids.shape[1] + num_tokens


def generate_batch():
  config = transformers.GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
  out = model.generate_batch(prompts, generation_config=config, progress_bar=False)
  assert all(len(result.generated_tokens) == num_tokens for result in out.values()) and len(out) == len(prompts)


for line in sys.stdin:
  what = line.strip()
  if what == "versions":
    answer = dict(torch=torch.__version__, transformers=transformers.__version__)
  else:
    start = time.perf_counter()
    dict(generate=generate, generate_batch=generate_batch)[what]()
    answer = dict(seconds=time.perf_counter() - start)
  print(json.dumps(answer), flush=True)
