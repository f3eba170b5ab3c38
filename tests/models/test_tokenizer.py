"""The tokenizer against llama.cpp's ids, round trips, streaming, and chat templates."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_flash.models import Tokenizer, find
from paged_flash.models.gguf_file import GGUFFile
from paged_flash.models.tokenizer import from_folder, from_gguf

DATA = Path(__file__).parents[1] / "data"
CASES = json.loads((DATA / "tokenizer_cases.json").read_text())
METADATA = GGUFFile(find("smollm2-135m-instruct")).metadata
LACKING = "\x04\x06\x13\x14\x16\x1d"  # SmolLM2's vocabulary lacks these, and the first bytes of planes 4 to 11
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]


def tokenizer_of(metadata) -> Tokenizer:
  tokenizer = from_gguf(metadata)
  assert tokenizer is not None
  return tokenizer


SMOLLM2 = tokenizer_of(METADATA)


@pytest.fixture(scope="module")
def with_numbers():
  """SmolLM2's metadata with tokens for numbers, as the script that made the cases had them."""
  spec = importlib.util.spec_from_file_location("make_tokenizer_cases", DATA / "make_tokenizer_cases.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.with_numbers(METADATA)


@pytest.mark.parametrize("pre", CASES["ids"])
def test_ids_equal_llama_cpp(pre, with_numbers):
  tokenizer = tokenizer_of(with_numbers | {"tokenizer.ggml.pre": pre})
  pairs = [(text, ids) for text, ids in zip(CASES["texts"], CASES["ids"][pre], strict=True) if ids is not None]
  assert len(pairs) >= 60
  for text, ids in pairs:
    assert tokenizer.encode(text) == ids, text
    if "lacks" not in text:
      assert tokenizer.decode(ids, skip_special=False) == text


def test_every_pre_tokenizer_differs_somewhere():
  ids = CASES["ids"]
  common = [i for i in range(len(CASES["texts"])) if ids["qwen2"][i] is not None]
  assert len({json.dumps([ids[pre][i] for i in common]) for pre in ids}) == len(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters=LACKING)))
def test_round_trip(text):
  assert SMOLLM2.decode(SMOLLM2.encode(text), skip_special=False) == text


def test_special_tokens_and_sizes():
  assert SMOLLM2.vocab_size == 49152 and SMOLLM2.eos_ids == (2,) and SMOLLM2.prefix_ids == ()
  assert SMOLLM2.encode("<|im_start|>a<|im_end|>") == [1, 81, 2]
  assert SMOLLM2.encode("") == [] and SMOLLM2.decode([]) == ""
  assert (
    SMOLLM2.decode([1, 81, 2]) == "a" and SMOLLM2.decode([1, 81, 2], skip_special=False) == "<|im_start|>a<|im_end|>"
  )


def stream(ids):
  streamed = SMOLLM2.stream()
  return [streamed.push(token) for token in ids], streamed.flush()


@pytest.mark.parametrize(
  "text", ["plain words, then 123", "🙂🙃 👩‍💻", "你好，世界 ﷽", " naïve\n\n  café ", "a\ufffdb", "\ufffd"]
)
def test_streaming_shows_whole_characters_only(text):
  ids = SMOLLM2.encode(text)
  pieces, rest = stream(ids)
  assert "".join(pieces) + rest == text
  if "\ufffd" not in text:
    assert rest == "" and all("\ufffd" not in piece for piece in pieces)


def test_streaming_holds_back_an_unfinished_character():
  ids = SMOLLM2.encode("🧿")
  assert len(ids) > 1
  streamed = SMOLLM2.stream()
  assert [streamed.push(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
  assert streamed.push(ids[-1]) == "🧿"
  pieces, rest = stream(ids[:-1])
  assert "".join(pieces) == "" and rest == SMOLLM2.decode(ids[:-1]) != ""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=30))
def test_streaming_any_ids_equals_decoding_them(ids):
  pieces, rest = stream(ids)
  assert "".join(pieces) + rest == SMOLLM2.decode(ids)


@settings(max_examples=100, deadline=None)
@given(
  st.text(
    st.characters(min_codepoint=0x80, max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters="\ufffd")
  )
)
def test_streaming_never_shows_a_broken_character(text):
  pieces, rest = stream(SMOLLM2.encode(text))
  assert all("\ufffd" not in piece for piece in pieces) and rest == ""


def test_streaming_keeps_spaces_that_only_show_in_context():
  """Decoders of the SentencePiece kind drop the space before the first token they are given."""
  core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁one": 0, "▁two": 1, "s": 2}, "s"))
  core.decoder = tokenizers.decoders.Metaspace()
  streamed = Tokenizer(core).stream()
  assert [streamed.push(token) for token in (0, 1, 2, 0)] == ["one", " two", "s", " one"]


def test_qwen2_normalises_unicode():
  tokenizer = tokenizer_of(METADATA | {"tokenizer.ggml.pre": "qwen2"})
  assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9") == SMOLLM2.encode("caf\u00e9")
  assert SMOLLM2.encode("cafe\u0301") != SMOLLM2.encode("caf\u00e9")


def test_chat_template():
  system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
  user = "<|im_start|>user\nHello<|im_end|>\n"
  assert SMOLLM2.apply_chat_template(HELLO) == system + user + "<|im_start|>assistant\n"
  assert SMOLLM2.apply_chat_template(HELLO, add_generation_prompt=False) == system + user
  own = [{"role": "system", "content": "Be brief."}, *HELLO, {"role": "assistant", "content": "Hi"}]
  text = SMOLLM2.apply_chat_template(own, add_generation_prompt=False)
  assert text == f"<|im_start|>system\nBe brief.<|im_end|>\n{user}<|im_start|>assistant\nHi<|im_end|>\n"


@pytest.mark.parametrize(
  "messages, message",
  [
    ([], "messages must not be empty"),
    (["Hello"], r"messages\[0\] must be a mapping with 'role' and 'content', got 'Hello'"),
    ([*HELLO, {"role": "user"}], r"messages\[1\] must be a mapping"),
    ([{"role": "user", "content": None}], "the chat template refuses these messages"),
  ],
)
def test_malformed_messages_are_named(messages, message):
  with pytest.raises(ValueError, match=message):
    SMOLLM2.apply_chat_template(messages)


def with_template(template):
  return Tokenizer(
    tokenizers.Tokenizer(tokenizers.models.BPE()), chat_template=template, special_texts={"bos_token": "<s>"}
  )


def test_templates_are_sandboxed_and_may_refuse():
  with pytest.raises(ValueError, match="this model has no chat template"):
    with_template(None).apply_chat_template(HELLO)
  with pytest.raises(ValueError, match="refuses these messages: roles must alternate"):
    with_template("{{ raise_exception('roles must alternate') }}").apply_chat_template(HELLO)
  for attack in (
    "{{ messages.append(1) }}",
    "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1] }}",
    "{{ 1 +",
    "{{ x.y }}",
  ):
    with pytest.raises(ValueError, match="the chat template refuses"):
      with_template(attack).apply_chat_template(HELLO)


def test_templates_get_what_transformers_gives_them():
  template = """{{ bos_token }}
{% for message in messages %}
  {% if message.role == 'skip' %}
    {% continue %}
  {% endif %}
{{ message | tojson }}
{% endfor %}"""
  messages = [{"role": "skip", "content": ""}, {"role": "user", "content": "é <b>"}]
  assert with_template(template).apply_chat_template(messages) == '<s>\n{"role": "user", "content": "é <b>"}\n'


@pytest.mark.parametrize(
  "change, message",
  [
    ({"model": "llama"}, "tokenizer.ggml.model must be 'gpt2' .* got 'llama'"),
    (
      {"pre": "smolm"},
      "tokenizer.ggml.pre must be one of gpt-2, smollm, llama-bpe, qwen2, got 'smolm'; did you mean 'smollm'",
    ),
    ({"pre": None}, "tokenizer.ggml.pre must be one of .* got None"),
    ({"merges": None}, "tokenizer.ggml.merges must be a list, got None"),
    ({"merges": ["x"]}, "make no BPE"),
    ({"merges": ["a nowhere-to-be-found"]}, "make no BPE"),
    ({"token_type": [1, 2]}, "token_type must have 49152 entries like tokens, got 2"),
    ({"eos_token_id": 49152}, "eos_token_id must be below 49152, got 49152"),
  ],
)
def test_unusable_metadata_is_named(change, message):
  with pytest.raises(ValueError, match=message):
    from_gguf(METADATA | {f"tokenizer.ggml.{key}": value for key, value in change.items()})


def test_metadata_variants():
  assert from_gguf({}) is None
  tokenizer = tokenizer_of(METADATA | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.eot_token_id": 0})
  assert tokenizer.prefix_ids == (1,) and tokenizer.eos_ids == (2, 0)
  types = list(METADATA["tokenizer.ggml.token_type"])
  types[0] = 4  # defined by a user: found in text, but part of what is shown
  tokenizer = tokenizer_of(METADATA | {"tokenizer.ggml.token_type": types})
  assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"


@pytest.fixture
def folder(tmp_path):
  """A tokenizer.json of words, which puts <s> first when asked to add special tokens."""
  core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "hello": 2, "world": 3}, "</s>"))
  core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  core.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
  core.add_special_tokens(["<s>", "</s>"])
  core.save(str(tmp_path / "tokenizer.json"))
  return tmp_path


def test_folder(folder):
  tokenizer = from_folder(folder, {"eos_token_id": 1})
  assert tokenizer is not None and tokenizer.encode("hello world") == [2, 3]
  assert tokenizer.prefix_ids == (0,) and tokenizer.eos_ids == (1,) and tokenizer.chat_template is None
  assert tokenizer.vocab_size == 4
  (folder / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
  templates = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ bos_token }} in config"}]
  settings = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "chat_template": templates}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  tokenizer = from_folder(folder, {"eos_token_id": 1})
  assert tokenizer is not None and tokenizer.eos_ids == (1, 3)
  assert tokenizer.apply_chat_template(HELLO) == "<s> in config"
  (folder / "chat_template.jinja").write_text("in a file{{ eos_token }}")
  (folder / "generation_config.json").unlink()
  tokenizer = from_folder(folder, {})
  assert tokenizer is not None and tokenizer.eos_ids == (1,)
  assert tokenizer.apply_chat_template(HELLO) == "in a file</s>"


def test_folder_errors(folder):
  (folder / "tokenizer_config.json").write_text("{")
  with pytest.raises(ValueError, match="tokenizer_config.json: not valid JSON"):
    from_folder(folder, {})
  (folder / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
    from_folder(folder, {})
  (folder / "tokenizer.json").unlink()
  assert from_folder(folder, {}) is None
