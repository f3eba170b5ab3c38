"""Writes tokenizer_cases.json: texts and the ids that llama.cpp gives them, an oracle independent of `tokenizers`.

Run in a virtual environment of its own with `xllamacpp` (llama.cpp as a wheel) and `gguf`:

  python tests/data/make_tokenizer_cases.py PATH/SmolLM2-135M-Instruct.Q4_1.gguf

The vocabulary is SmolLM2's, with the numbers of two and three digits added (`with_numbers`), which show how digits are
split; the ways to split text into words that other models use are tried on it too. llama.cpp does not normalise
Unicode, so texts that are not in NFC are left out (as null) for qwen2, which does.
"""

import json
import sys
import tempfile
import unicodedata
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe", "qwen2")
TEXTS = (
  "a",
  " ",
  "\n",
  "Hello",
  " Hello",
  "The page table maps every position to a page.",
  "It's what they'd've wanted; I'm sure we'll see, you're right.",
  "IT'S WHAT THEY'D WANTED, WE'LL SEE",
  "don't  can't   won't",
  "trailing spaces   ",
  "   leading spaces",
  "tabs\tand\t\ttabs\t",
  "two\n\nparagraphs\n\n\nthree",
  "windows\r\nline\r\n\r\nends\r",
  " \n \n\t \n ",
  "mixed \t \n spaces\n\t  end",
  "\u00a0no-break\u00a0\u00a0space\u2003em\u3000wide",
  "0",
  "1234567890",
  "3.14159, 2.71828 and 1e-10",
  "x = 12; y=345 ;z =  6789",
  "    1    22   333  4444",
  "in 2024, on 01/02/2024 at 23:59:59",
  "v1.2.3-rc4+build567",
  "½ plus ¼ is ¾, x² + y³, Ⅷ and ⅷ, ①②③",
  "٠١٢٣٤٥٦٧٨٩ and ०१२३",
  "  ٣ pages",
  "def f(x):\n    return x + 1\n",
  "for i in range(10):\n    if i % 2 == 0:\n        print(i, 2 ** i)\n",
  "class A:\n\tdef b(self):\n\t\treturn [1, 22, 333]\n",
  "    100 GOTO 10\n    110 END",
  "int main(void) { return 0; } // done",
  "SELECT id, COUNT(*) FROM pages WHERE refs > 0 GROUP BY id;",
  '{"page": 17, "refs": [1, 2, 3], "free": false}',
  '<div class="row"><p>1 &lt; 2</p></div>',
  "https://example.org/a/b?c=1&d=%20#frag",
  "user.name+tag@example.org",
  "snake_case camelCase PascalCase SCREAMING_CASE kebab-case",
  "a+b-c*d/e%f^g&h|i~j!k@l#m$n",
  "!!! ??? ... --- ___ *** ///",
  "(([[{{nested}}]]))",
  "“curly” ‘quotes’ – dashes — and … dots",
  "naïve café, Größe, piñata, façade, Łódź, smørbrød",
  "cafe\u0301 decomposed and café composed",
  "Ελληνικά και Ελλάδα",
  "Страница памяти номер 7",
  "שלום עולם",
  "مرحبا بالعالم",
  "नमस्ते दुनिया",
  "สวัสดีชาวโลก",
  "你好，世界。页表有十六页。",
  "こんにちは世界、ページ１２３",
  "페이지 테이블 안녕하세요",
  "🙂",
  "🙂🙃 emoji 👩‍💻 with joiners 👍🏽 and flags 🇩🇰🇯🇵",
  "math: ∀x∈ℝ, ∑ᵢ xᵢ² ≥ 0 ⇒ ‖x‖ ≥ 0",
  "zero\u200bwidth\u200djoin\ufeffmark",
  "a\u0000b\u0001c\u007f",
  "\U00010348\U0001f9ff𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
  "antidisestablishmentarianism pneumonoultramicroscopic",
  "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
  "ABCabc123ABCabc123",
  "1 12 123 1234 12345 123456 1234567",
  "a12b345 -6789 $10,000,000.00 0x1F 007",
  "bytes that the vocabulary lacks: \U00040000 \x04",
  "<|im_start|>user\nHow many pages?<|im_end|>\n<|im_start|>assistant\n",
  "before<|endoftext|>after <|im_end|> spaced",
  "not special: <|im_start> |im_end|> <im_end>",
)


def with_numbers(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """The metadata with tokens for 00 to 999 and the merges that make them."""
  digits = "0123456789"
  pairs = [(a, b) for a in digits for b in digits]
  pairs += [(a + b, c) for a, b in pairs for c in digits]
  tokens = [*metadata["tokenizer.ggml.tokens"], *("".join(pair) for pair in pairs)]
  return {
    **metadata,
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], *(1 for _ in pairs)],
    "tokenizer.ggml.merges": [*metadata["tokenizer.ggml.merges"], *(" ".join(pair) for pair in pairs)],
  }


def write(path: Path, metadata: Mapping[str, Any], pre: str):
  """A GGUF file with that tokenizer and the smallest of models."""
  import gguf
  import numpy as np

  tokens = metadata["tokenizer.ggml.tokens"]
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_context_length(512)
  writer.add_embedding_length(32)
  writer.add_block_count(1)
  writer.add_feed_forward_length(32)
  writer.add_head_count(1)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types(metadata["tokenizer.ggml.token_type"])
  writer.add_token_merges(metadata["tokenizer.ggml.merges"])
  for name in ("bos", "eos"):
    writer.add_uint32(f"tokenizer.ggml.{name}_token_id", metadata[f"tokenizer.ggml.{name}_token_id"])
  shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
  matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
  shapes |= {f"blk.0.{name}": (32, 32) for name in matrices}
  shapes |= {f"blk.0.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
  for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def tokenize(path: Path) -> list[list[int]]:
  """Ids of all texts, by a llama.cpp server on loopback."""
  import xllamacpp

  params = xllamacpp.CommonParams()
  params.model.path = str(path)
  params.n_ctx = 256
  params.warmup = False
  server = xllamacpp.Server(params)
  ids = []
  for text in TEXTS:
    body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
      ids.append(json.load(response)["tokens"])
  return ids


def main(source: str):
  import gguf

  fields = gguf.GGUFReader(source).fields
  metadata = with_numbers({key: field.contents() for key, field in fields.items()})
  cases = {"texts": list(TEXTS), "ids": {}}
  with tempfile.TemporaryDirectory() as folder:
    for pre in PRE_TOKENIZERS:
      write(Path(folder) / "copy.gguf", metadata, pre)
      ids = tokenize(Path(folder) / "copy.gguf")
      if pre == "qwen2":
        pairs = zip(TEXTS, ids, strict=True)
        ids = [row if unicodedata.is_normalized("NFC", text) else None for text, row in pairs]
      cases["ids"][pre] = ids
  path = Path(__file__).with_name("tokenizer_cases.json")
  path.write_text(json.dumps(cases, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
  main(sys.argv[1])
