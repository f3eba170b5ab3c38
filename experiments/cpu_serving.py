"""Serving speed on a CPU against Hugging Face Transformers, timed in turns in one run.

    python -m experiments.cpu_serving --config=configs/cpu_serving/smollm2.py --config.peer_python=VENV/bin/python

The peer runs in a process of its own, with a Python of its own that has torch and transformers: it loads the same GGUF
file, waits while we run, and runs while we wait. Without `peer_python` only our side is timed.
"""

import dataclasses
import json
import pathlib
import subprocess
import time
from collections.abc import Callable

import numpy as np

from paged_flash import Engine, Params, models
from paged_flash.experiment import Workdir, main, write_result

_PEER = pathlib.Path(__file__).with_name("peers") / "transformers_generate.py"


@dataclasses.dataclass(kw_only=True)
class Config:
  model: str = "smollm2-135m-instruct"  # a GGUF file or the name of one; "tiny" for random weights (no peer)
  num_requests: int = 8
  prompt_len: int = 34  # tokens, drawn at random
  num_tokens: int = 64  # new tokens of each request
  page_size: int = 16
  token_budget: int = 144
  repeats: int = 3
  peer_python: str = ""  # interpreter with torch and transformers
  threads: int = 2  # of the peer
  result: str = ""  # name under experiments/results/cpu_serving/<device>/ to write to; "" writes none


class Peer:
  """A process that answers each line ("generate" or "generate_batch") with the seconds that it took."""

  def __init__(self, config: Config, gguf: pathlib.Path, prompts: list[list[int]]):
    job = dict(
      folder=str(gguf.parent), file=gguf.name, prompts=prompts, num_tokens=config.num_tokens, threads=config.threads
    )
    self._process = subprocess.Popen(
      [config.peer_python, str(_PEER), json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    self.versions = self._ask("versions")

  def _ask(self, what: str) -> dict:
    assert self._process.stdin and self._process.stdout
    self._process.stdin.write(what + "\n")
    self._process.stdin.flush()
    for line in self._process.stdout:
      if line.startswith("{"):
        return json.loads(line)
    raise RuntimeError(
      f"the peer ended (exit code {self._process.wait()}) when asked for {what!r}; see its output above"
    )

  def seconds(self, what: str) -> float:
    return self._ask(what)["seconds"]

  def close(self) -> None:
    self._process.communicate(timeout=60)


def run(config: Config, workdir: Workdir) -> list[dict]:
  if config.model == "tiny":
    model = models.load(
      models.ModelConfig(vocab_size=512, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=128)
    )
  else:
    model = models.load(config.model)
  rng = np.random.default_rng(0)
  prompts = rng.integers(3, model.config.vocab_size, (config.num_requests, config.prompt_len)).tolist()
  most = config.prompt_len + config.num_tokens
  engine = Engine(
    model,
    num_slots=config.num_requests,
    num_pages=config.num_requests * -(-most // config.page_size),
    page_size=config.page_size,
    max_seq_len=most,
    token_budget=config.token_budget,
  )
  print(engine.memory)
  requests = [(prompt, Params(max_tokens=config.num_tokens, ignore_eos=True)) for prompt in prompts]

  def ours(driver: str) -> Callable[[], float]:
    def once() -> float:
      start = time.perf_counter()
      results = engine.complete(requests, driver=driver)
      assert all(len(r.output_ids) == config.num_tokens for r in results)
      return time.perf_counter() - start

    return once

  sides = {"paged_flash, host driver": ours("host"), "paged_flash, device driver": ours("device")}
  peer = None
  if config.peer_python:
    peer = Peer(config, models.find(config.model), prompts)
    sides["transformers generate"] = lambda: peer.seconds("generate")
    sides["transformers generate_batch (paged)"] = lambda: peer.seconds("generate_batch")
  seconds = {name: [] for name in sides}
  for turn in range(config.repeats + 1):  # the first turn warms up and is not counted
    for name, once in sides.items():
      took = once()
      if turn:
        seconds[name].append(took)
      print(f"{'warm-up' if not turn else f'turn {turn}'}: {name}: {took:.2f} s")
  total = config.num_requests * config.num_tokens
  base = {name: float(np.median(times)) for name, times in seconds.items()}
  ours_best = min(base[name] for name in base if name.startswith("paged_flash"))
  rows = [
    dict(
      engine=name,
      seconds=base[name],
      tokens_per_second=total / base[name],
      min_seconds=min(seconds[name]),
      max_seconds=max(seconds[name]),
      speed_of_ours=base[name] / ours_best,
    )
    for name in sides
  ]
  for row in rows:
    workdir.log(**row)
    print(
      f"{row['engine']:40s} {row['tokens_per_second']:7.1f} tokens/s   ours is {row['speed_of_ours']:.2f} x as fast"
    )
  if peer:
    peer.close()
  if config.result:
    settings = dataclasses.asdict(config) | dict(peer_python="")
    print(write_result("cpu_serving", rows, name=config.result, config=settings, peer=peer.versions if peer else None))
  return rows


if __name__ == "__main__":
  main(run)
