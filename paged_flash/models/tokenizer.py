"""Text to token ids and back, as the model's own files define it, and chats to text."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from paged_flash.models.config import did_you_mean

_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types
_LLAMA3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
  """A byte-level BPE or any `tokenizers` tokenizer, its end-of-sequence ids and its chat template.

  Args:
    core: from the `tokenizers` package.
    eos_ids: ids that end a generation.
    prefix_ids: ids that the model expects before plain text (a chat template writes its own); often none.
    chat_template: Jinja source, or None.
    special_texts: names that the template may use, such as `bos_token`, and their texts.

  Example:
    >>> from paged_flash.models import load
    >>> tokenizer = load("smollm2-135m-instruct").tokenizer
    >>> tokenizer.encode("Paged attention")
    [64, 2450, 2674]
  """

  def __init__(
    self,
    core: tokenizers.Tokenizer,
    *,
    eos_ids: Iterable[int] = (),
    prefix_ids: Iterable[int] = (),
    chat_template: str | None = None,
    special_texts: Mapping[str, str] | None = None,
  ):
    self._core = core
    self.eos_ids = tuple(eos_ids)
    self.prefix_ids = tuple(prefix_ids)
    self.chat_template = chat_template
    self._special_texts = dict(special_texts or {})

  @property
  def vocab_size(self) -> int:
    """Number of tokens, added ones included; the model's embedding may be larger."""
    return self._core.get_vocab_size(with_added_tokens=True)

  def encode(self, text: str) -> list[int]:
    """Ids of a text. Nothing is added; the text of a special token becomes its id.

    Bytes that the vocabulary lacks are dropped, as llama.cpp and Transformers do; SmolLM2's lacks six control
    characters and the unassigned planes 4 to 11 of Unicode.
    """
    return self._core.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    """Text of ids; invalid UTF-8 becomes U+FFFD. `skip_special=False` gives back what `encode` was given."""
    return self._core.decode(list(ids), skip_special_tokens=skip_special)

  def stream(self) -> "TextStream":
    """A decoder for ids that arrive one by one."""
    return TextStream(self)

  def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
    """The text that the model was trained to see for a chat.

    Args:
      messages: mappings with "role" and "content".
      add_generation_prompt: whether to end with the opening of the assistant's answer.

    Raises:
      ValueError: the model has no template, a message is malformed, or the template refuses the chat.
    """
    if self.chat_template is None:
      raise ValueError("this model has no chat template; give it plain text")
    if not messages:
      raise ValueError("messages must not be empty")
    for i, message in enumerate(messages):
      if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(f"messages[{i}] must be a mapping with 'role' and 'content', got {message!r}")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    try:
      return environment.from_string(self.chat_template).render(
        messages=messages, add_generation_prompt=add_generation_prompt, **self._special_texts
      )
    except (jinja2.TemplateError, TypeError) as error:
      raise ValueError(f"the chat template refuses these messages: {error}") from error


class TextStream:
  """Decodes ids as they come; the pieces joined are the text of all ids together.

  Text is held back while it ends in an incomplete character. Only the ids since the last safe place are decoded again.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._ids: list[int] = []  # context ids whose text was shown, then ids whose text is pending
    self._shown = 0  # how many of them are context

  def push(self, token: int) -> str:
    """The new text that became safe to show with this id; often empty."""
    self._ids.append(int(token))
    text = self._pending()
    if not text or text.endswith("\ufffd"):
      return ""
    self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
    return text

  def flush(self) -> str:
    """The text still held back, with U+FFFD for an incomplete character."""
    text = self._pending()
    self._ids, self._shown = [], 0
    return text

  def _pending(self) -> str:
    return self._tokenizer.decode(self._ids)[len(self._tokenizer.decode(self._ids[: self._shown])) :]


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer | None:
  """The tokenizer that a GGUF file describes; None when it has none.

  Supported are byte-level BPEs whose splitting into words is known exactly.

  Args:
    metadata: the file's key-value pairs.

  Raises:
    ValueError: a kind of tokenizer that is not supported; the text lists those that are.
  """
  kind = metadata.get("tokenizer.ggml.model")
  if kind is None or kind == "no_vocab":
    return None
  splitters = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    # Digits before words: a numeral stands alone, and a run of spaces before it stays one run.
    "smollm": pre_tokenizers.Sequence(
      [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": _words(_LLAMA3_WORDS % "{1,3}"),
    "qwen2": _words(_LLAMA3_WORDS % ""),
  }
  if kind != "gpt2":
    raise ValueError(f"tokenizer.ggml.model must be 'gpt2' (byte-level BPE), got {kind!r}")
  pre = metadata.get("tokenizer.ggml.pre")
  if pre not in splitters:
    raise ValueError(
      f"tokenizer.ggml.pre must be one of {', '.join(splitters)}, got {pre!r}{did_you_mean(pre, splitters)}"
    )
  tokens, merges, types = (_gguf_list(metadata, name) for name in ("tokens", "merges", "token_type"))
  if len(types) != len(tokens):
    raise ValueError(f"tokenizer.ggml.token_type must have {len(tokens)} entries like tokens, got {len(types)}")
  try:
    # A merge is two tokens with a space between; byte-level BPE writes a space inside a token as another letter.
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    core = tokenizers.Tokenizer(models.BPE(vocab, pairs, fuse_unk=False, ignore_merges=pre == "llama-bpe"))
  except Exception as error:  # the package raises plain Exception
    raise ValueError(f"tokenizer.ggml.tokens and tokenizer.ggml.merges make no BPE: {error}") from error
  core.pre_tokenizer = splitters[pre]
  core.decoder = decoders.ByteLevel()
  if pre == "qwen2":
    core.normalizer = normalizers.NFC()
  core.add_tokens(
    [
      tokenizers.AddedToken(token, special=token_type == _CONTROL, normalized=False)
      for token, token_type in zip(tokens, types, strict=True)
      if token_type in (_CONTROL, _USER_DEFINED)
    ]
  )
  ids: dict[str, int] = {}
  for name in ("bos", "eos", "eot", "eom"):
    token = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token is not None:
      if not 0 <= token < len(tokens):
        raise ValueError(f"tokenizer.ggml.{name}_token_id must be below {len(tokens)}, got {token}")
      ids[name] = token
  return Tokenizer(
    core,
    eos_ids=dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids),
    prefix_ids=(ids["bos"],) if metadata.get("tokenizer.ggml.add_bos_token") and "bos" in ids else (),
    chat_template=metadata.get("tokenizer.chat_template"),
    special_texts={f"{name}_token": tokens[ids[name]] for name in ("bos", "eos") if name in ids},
  )


def from_folder(folder: Path, model_config: Mapping[str, Any]) -> Tokenizer | None:
  """The tokenizer of a Hugging Face folder (`tokenizer.json`); None when it has none.

  Args:
    folder: may also hold `tokenizer_config.json`, `chat_template.jinja` and `generation_config.json`.
    model_config: the parsed `config.json`, for end-of-sequence ids that `generation_config.json` does not give.

  Raises:
    ValueError: a file is not what its name says.
  """
  if not (folder / "tokenizer.json").exists():
    return None
  try:
    core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  except Exception as error:  # the package raises plain Exception
    raise ValueError(f"{folder / 'tokenizer.json'}: not a tokenizer: {error}") from error
  settings, generation = _read_json(folder / "tokenizer_config.json"), _read_json(folder / "generation_config.json")
  special_texts = {}
  for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
    token = settings.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None:
      special_texts[name] = text
  eos_ids = generation.get("eos_token_id", model_config.get("eos_token_id"))
  if eos_ids is None:
    eos_ids = core.token_to_id(special_texts.get("eos_token", ""))
  template = settings.get("chat_template")
  if isinstance(template, list):  # several by name
    template = {entry["name"]: entry["template"] for entry in template}.get("default")
  if (folder / "chat_template.jinja").exists():
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
  return Tokenizer(
    core,
    eos_ids=eos_ids if isinstance(eos_ids, list) else () if eos_ids is None else (eos_ids,),
    prefix_ids=core.encode("", add_special_tokens=True).ids,
    chat_template=template,
    special_texts=special_texts,
  )


def _gguf_list(metadata: Mapping[str, Any], name: str) -> list[Any]:
  value = metadata.get(f"tokenizer.ggml.{name}")
  if not isinstance(value, list):
    raise ValueError(f"tokenizer.ggml.{name} must be a list, got {value!r}")
  return value


def _words(pattern: str) -> pre_tokenizers.PreTokenizer:
  split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
  return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _refuse(message: str):
  raise jinja2.TemplateError(message)


def _read_json(path: Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: not valid JSON: {error}") from error
