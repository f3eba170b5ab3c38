"""Prompts from a file: bad lines are named, good ones are served."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from experiments import generate
from experiments.generate import Config, EngineConfig
from paged_flash import Params
from paged_flash.experiment import Workdir, load

SIZES = EngineConfig(num_slots=2, num_pages=16, page_size=4, max_seq_len=32, token_budget=8)


@pytest.fixture
def prompts(tmp_path: pathlib.Path) -> Callable[[str | bytes], str]:
  def write(text: str | bytes) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)

  return write


def test_every_field_reaches_the_request(prompts):
  fields: dict[str, Any] = dict(
    min_tokens=2, temperature=1, top_k=5, top_p=0.5, seed=9, stop=["x"], stop_ids=[3], ignore_eos=True, max_tokens=4
  )
  fields |= dict(tenant=3, priority=-1)
  text = json.dumps({"id": "a", "prompt": "Grüße"} | fields) + '\n\n{"id": 7, "prompt_ids": [1, 2]}\n'
  first, second = generate.read_lines(prompts("\ufeff" + text), max_tokens=11)  # with a byte-order mark
  assert (first.id, first.prompt, first.params, first.error) == ("a", "Grüße", Params(**fields), "")
  assert (second.number, second.id, second.prompt, second.params) == (3, 7, [1, 2], Params(max_tokens=11))
  assert set(fields) == set(Params.__dataclass_fields__)  # all of them can be given


@pytest.mark.parametrize(
  ("line", "error"),
  [
    ('{"id": 1, "prompt": "x"', "not JSON: .* at column 24"),
    ("[1]", r"must be a JSON object, got \[1\]"),
    ("[" * 100_000, "nested too deep"),
    (b'{"id": 1, "prompt": "\xff"}', "not UTF-8: invalid start byte at byte 21"),
    ('{"prompt": "x"}', '"id" is missing'),
    ('{"id": null, "prompt": "x"}', "id must be text or an integer, got null"),
    ('{"id": 1}', "wanted one of prompt, prompt_ids, messages, got none"),
    ('{"id": 1, "prompt": "x", "prompt_ids": [1]}', "got prompt and prompt_ids"),
    ('{"id": 1, "prompt": "x", "max_token": 3}', "unknown field 'max_token'; known: id, prompt, .*max_tokens"),
    ('{"id": 1, "prompt": "x", "id": 2}', "'id' is given twice"),
    ('{"id": 1, "prompt": ["x"]}', r'prompt must be text, got \["x"\]'),
    ('{"id": 1, "prompt_ids": "12"}', "prompt_ids must be a list of integers"),
    ('{"id": 1, "prompt_ids": [1, true]}', "prompt_ids must be a list of integers"),
    ('{"id": 1, "messages": [{"role": "user"}]}', "messages must be a list of"),
    ('{"id": 1, "prompt": "x", "max_tokens": "3"}', 'max_tokens must be an integer, got "3"'),
    ('{"id": 1, "prompt": "x", "max_tokens": true}', "max_tokens must be an integer, got true"),
    ('{"id": 1, "prompt": "x", "top_p": "all"}', "top_p must be a number"),
    ('{"id": 1, "prompt": "x", "stop": "end"}', "stop must be a list of texts"),
    ('{"id": 1, "prompt": "x", "ignore_eos": 1}', "ignore_eos must be true or false"),
    ('{"id": "good", "prompt": "x"}', "id 'good' is taken by line 1"),
  ],
)
def test_a_bad_line_is_named_and_the_others_stay(prompts, line: str | bytes, error: str):
  data = line if isinstance(line, bytes) else line.encode()
  good = b'{"id": "good", "prompt": "x"}\n'
  first, bad, last = generate.read_lines(prompts(good + data + b'\n{"id": "last", "prompt": "y"}'), max_tokens=1)
  assert not first.error and not last.error
  with pytest.raises(ValueError, match=f"^line 2: .*{error}"):
    raise ValueError(bad.error)


def test_good_lines_are_served_beside_bad_ones(prompts, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
  lines = [
    '{"id": "a", "prompt_ids": [1, 2, 3]}',
    "nonsense",
    json.dumps(dict(id="long", prompt_ids=[1] * 40)),
    '{"id": "text", "prompt": "needs a tokenizer"}',
    '{"id": "hot", "prompt_ids": [1], "temperature": -1}',
    '{"id": "b", "prompt_ids": [1, 2, 3], "max_tokens": 2}',
  ]
  path = prompts("\n".join(lines))
  config = Config(model="tiny", engine=SIZES, prompts=path, max_tokens=5, logprobs=True)
  workdir = Workdir.create(tmp_path / "out", config)
  generate.run(config, workdir)
  rows = [json.loads(line) for line in (workdir.path / "outputs.jsonl").read_text().splitlines()]
  assert [row["id"] for row in rows] == ["a", None, "long", "text", "hot", "b"]
  assert [row["finish"] for row in rows] == ["length", "error", "error", "error", "error", "length"]
  a, b = rows[0], rows[-1]
  assert set(a) == {"id", "prompt_ids", "output_ids", "text", "finish", "logprobs"}
  assert a["prompt_ids"] == [1, 2, 3] and len(a["output_ids"]) == len(a["logprobs"]) == 5
  assert b["output_ids"] == a["output_ids"][:2] and max(a["logprobs"]) < 0
  errors = [row["error"] for row in rows[1:-1]]
  assert [error.split(":")[0] for error in errors] == ["line 2", "line 3", "line 4", "line 5"]
  assert "at most 31 tokens" in errors[1] and "tokenizer" in errors[2] and "temperature" in errors[3]
  shown = capsys.readouterr()
  assert all(error in shown.err for error in errors)
  assert "KV pool: 16 pages x 4 tokens" in shown.out and "2 of 6 lines served" in shown.out


@pytest.mark.parametrize(
  ("change", "error"),
  [
    (dict(prompts="missing.jsonl"), "missing.jsonl"),
    (dict(model="nonsense"), "nonsense"),
    (dict(engine=EngineConfig(num_slots=4, num_pages=2)), "num_pages must be at least num_slots=4, got 2"),
    (dict(), "no line could be served"),
  ],
)
def test_what_cannot_run_ends_with_one_message(prompts, tmp_path: pathlib.Path, change: dict[str, Any], error: str):
  config = dataclasses.replace(Config(model="tiny", engine=SIZES, prompts=prompts("nonsense\n")), **change)
  with pytest.raises(SystemExit, match=error):
    generate.run(config, Workdir.create(tmp_path / "out", config))


def test_the_example_prompts_are_good():
  for variant in ("full", "smoke"):
    config = load(f"configs/generate/smollm2.py:{variant}")
    lines = generate.read_lines(config.prompts, max_tokens=config.max_tokens)
    assert lines and not [line.error for line in lines if line.error]
