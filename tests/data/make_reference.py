"""Writes smollm2_reference.json: what Hugging Face Transformers generates with SmolLM2-135M-Instruct in float32.

Two steps, because the token ids come from our tokenizer (the one that Transformers makes from this GGUF file splits
digits wrongly) and Transformers is no dependency of ours:

  PYTHONPATH=. python tests/data/make_reference.py encode                 # in the project's environment
  python tests/data/make_reference.py generate FOLDER_WITH_THE_GGUF       # where torch and transformers are installed

Per prompt: its ids; up to 48 greedy output ids, the last one <|im_end|> if the model stopped; the smallest difference
between the two largest logits on the way; and the five largest logits at the first, middle and last step. Prompts
with a margin below 2e-3 are refused: there another correct float32 implementation may choose the other token.
"""

import json
import sys
from pathlib import Path

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_TOKENS, MIN_MARGIN, TOP = 48, 2e-3, 5
TARGET = Path(__file__).with_name("smollm2_reference.json")


def story(num_entries: int) -> str:
  """The diary of an invented lighthouse: numbered, varied, and the same on every call."""
  keepers = ("Ada", "Bruno", "Chidi", "Dagny", "Emeka", "Freya", "Goro")
  weather = ("thick fog", "a hard frost", "warm rain", "clear skies", "wind from the north-east", "a sudden squall")
  chores = (
    "polished the great lens",
    "counted {n} barrels of oil",
    "repaired {n} steps of the stair",
    "wrote {n} letters to the mainland",
    "taught the parrot to say {n}",
    "painted the railing green again",
    "set the clock back by {n} minutes",
    "mended the red flag",
  )
  visits = (
    "A schooner passed at dusk and dipped its flag.",
    "No ship was seen.",
    "Two fishermen asked for bread and left us a basket of crabs.",
    "The supply boat brought flour, ink and a broken violin.",
    "A whale surfaced so close that we heard it breathe.",
    "The inspector came, measured everything, and said nothing.",
    "Somebody had left a bottle on the beach; the paper in it was blank.",
  )
  lines = ["Diary of the lighthouse at Skarvholm", ""]
  state = 17
  for entry in range(1, num_entries + 1):
    state = (state * 1103515245 + 12345) % 2**31
    pick = state >> 8
    chore = chores[pick % len(chores)].format(n=3 + pick // 7 % 95)
    lines.append(
      f"Entry {entry}. {weather[pick // 11 % len(weather)].capitalize()} all day. {keepers[pick // 13 % len(keepers)]} "
      f"{chore}. {visits[pick // 17 % len(visits)]}"
    )
  return "\n".join(lines)


CODE = """def histogram(values):
    counts = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts

TABLE = [
    1, 1, 2, 3, 5,
    8, 13, 21, 34, 55,
    89, 144, 233, 377, 610,
]

def largest(table):
    best = 0
    for i in range(0, 15):
        if table[i] > best:
"""

# Name: text, or messages for the chat template.
PROMPTS: dict[str, str | list[dict[str, str]]] = {
  "one token": "The",
  "short": "Paged attention keeps the keys and values of a language model in",
  "question": "Question: Which planet is closest to the sun?\nAnswer:",
  "chat": [{"role": "user", "content": "Name three things that a lighthouse keeper does every day."}],
  "chat with system": [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "What is the capital of Norway?"},
    {"role": "assistant", "content": "The capital of Norway is Oslo."},
    {"role": "user", "content": "And of Denmark?"},
  ],
  "code": CODE,
  "json": '{"pages": [\n  {"id": 1, "refs": 2, "tokens": 16},\n  {"id": 2, "refs": 1, "tokens": 16},\n  {"id": 3,',
  "emoji": "Weather codes: sun ☀️, rain 🌧️, snow ❄️, storm ⛈️. Today 🌧️ and tomorrow",
  "cjk": "你好 means hello, 谢谢 means thank you, ありがとう means",
  "accents": "Le café près de la gare était fermé, alors nous avons marché jusqu'à",
  "whitespace": "name     \t  count\n\n\n   apples \t     12\n   pears  \t      7\n\n   plums",
  "numbers": "7 x 8 = 56\n7 x 9 = 63\n7 x 10 = 70\n7 x 11 =",
  "hundreds": story(21),
  "thousands": story(64) + "\nEntry 65.",
  "long chat": [{"role": "user", "content": story(40) + "\n\nWho kept this diary, and where?"}],
}


def encode():
  """Writes the prompts' ids."""
  from paged_flash.models import load

  tokenizer = load("smollm2-135m-instruct").tokenizer
  assert tokenizer is not None
  rows = []
  for name, prompt in PROMPTS.items():
    text = prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt)
    rows.append({"name": name, "prompt_ids": tokenizer.encode(text)})
    print(name, len(rows[-1]["prompt_ids"]))
  _write(rows)


def generate(folder: str):
  """Adds what Transformers makes of them."""
  import torch
  from transformers import AutoModelForCausalLM

  model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=GGUF_NAME, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  rows = json.loads(TARGET.read_text())
  for row in rows:
    prompt, output, cache, fed = row["prompt_ids"], [], None, row["prompt_ids"]
    with torch.inference_mode():
      while len(output) < MAX_TOKENS and output[-1:] != [2]:  # 2: <|im_end|>
        step = model(torch.tensor([fed]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = step.past_key_values
        fed = [int(step.logits[0, -1].argmax())]
        output += fed
      logits = model(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :]  # at once, without a cache
    if logits.argmax(-1).tolist() != output:
      raise SystemExit(f"prompt {row['name']!r}: with and without cache, Transformers disagrees with itself")
    best = logits.topk(2).values
    margin = float((best[:, 0] - best[:, 1]).min())
    print(f"{row['name']}: {len(prompt)} + {len(output)} tokens, margin {margin:.4f}", flush=True)
    if margin < MIN_MARGIN:
      raise SystemExit(f"prompt {row['name']!r}: margin {margin} is below {MIN_MARGIN}; choose another prompt")
    row["output_ids"], row["min_margin"], row["top"] = output, round(margin, 5), []
    for step in sorted({0, len(output) // 2, len(output) - 1}):
      values, ids = logits[step].topk(TOP)
      row["top"].append({"step": step, "ids": ids.tolist(), "logits": [round(value, 5) for value in values.tolist()]})
  _write(rows)


def _write(rows: list[dict]):
  TARGET.write_text("[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]\n")


if __name__ == "__main__":
  {"encode": encode, "generate": generate}[sys.argv[1]](*sys.argv[2:])
