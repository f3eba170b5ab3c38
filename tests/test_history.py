"""A recording gives back what was; a fork goes on as it would have; a snapshot survives its process."""

import dataclasses
import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_flash import Engine, Params, history, models, speculation
from paged_flash.cache import kv_pages, page_table
from paged_flash.history import recording as recordings
from paged_flash.models import ModelConfig

TINY = ModelConfig(
  vocab_size=61, embed_dim=24, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8, ffn_dim=40, max_seq_len=128
)
SIZES: dict[str, Any] = dict(num_slots=4, num_pages=14, page_size=4, max_seq_len=40, token_budget=12, queue_size=12)


class Letters:
  """A tokenizer of one letter a token."""

  eos_ids = ()
  prefix_ids = ()

  def decode(self, ids):
    return "".join(chr(65 + i) for i in ids)

  def stream(self):
    return self

  def push(self, id):
    return self.decode([id])

  def flush(self):
    return ""


def make_engine(**changes) -> Engine:
  model = dataclasses.replace(models.load(TINY, seed=3), tokenizer=Letters())
  return Engine(model, **(SIZES | changes))


@pytest.fixture(scope="module")
def engine():
  return make_engine(debug=True)


def prompt_of(n, seed=0):
  return np.random.default_rng([n, seed]).integers(1, TINY.vocab_size, n).tolist()


def copied(state):
  return jax.tree.map(np.array, state)


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert jax.tree.map(lambda x: np.asarray(x).dtype, a) == jax.tree.map(lambda x: np.asarray(x).dtype, b)


def drained(run):
  """The recording at its end, and the tokens of every request from here on."""
  got = {}
  while not run.now.idle:
    run, events = run.step()
    for event in events:
      got.setdefault(event.request, []).append(event.token)
  return run, got


@pytest.fixture(scope="module")
def busy(engine):
  """A run on a starved pool with requests of all kinds, and copies of the states that its steps started from."""
  draw = np.random.default_rng(5)
  run, kept, preempted = history.record(engine), [], 0
  patch = pytest.MonkeyPatch()
  patch.setattr(recordings, "_KEY_EVERY", 7)  # so that a short run has several key frames
  for round in range(9):
    if draw.random() < 0.8 and int(run.now.scheduler.live.sum()) < 9:
      many = [
        (prompt_of(int(draw.integers(1, 20)), round), Params(max_tokens=int(draw.integers(1, 16)), temperature=i % 2))
        for i in range(int(draw.integers(1, 4)))
      ]
      run, _ = run.call("submit_many", many)
    run, _ = run.submit(prompt_of(7, round), max_tokens=14, temperature=0.8, seed=round, stop=("B", "QQ"))
    for _ in range(int(draw.integers(2, 7))):
      kept.append(copied(run.now.scheduler))
      run, events = run.step()
      preempted += len(events.preempted)
    live = np.flatnonzero(run.now.scheduler.live)
    if live.size and draw.random() < 0.5:
      run = run.cancel(int(run.now.scheduler.arrival[draw.choice(live)]))
  patch.undo()
  assert preempted >= 2 and sum(frame.is_key for frame in run.frames) >= 5
  return run, [*kept, copied(run.now.scheduler)]


def test_scenario_21_the_record_gives_back_every_state_bit_for_bit(busy):
  run, kept = busy
  assert run.num_steps == len(kept) - 1 and run.num_bytes < 700 * len(run.frames)
  for step, state in enumerate(kept):
    assert_same(run.rewind(step), state)
  for moment, frame in zip(run.moments(), run.frames, strict=True):
    if frame.verb == "step":
      assert_same(moment.before, kept[moment.step])
  for step in (-1, len(kept)):
    with pytest.raises(ValueError, match=rf"step must be in 0..{len(kept) - 1}, the steps recorded, got {step}"):
      run.rewind(step)


def test_replay_proves_the_states_and_finds_a_false_token(busy):
  run, kept = busy
  assert run.replay() == len(kept) - 1
  assert any(event.finish == "stop" for m in run.moments() if m.verb == "step" for event in m.said)
  # A token that was not said, in a frame of its own making.
  i, m = next((i, m) for i, m in enumerate(run.moments()) if m.verb == "step" and m.step > 3 and len(m.said))
  event = m.said.tokens[0]
  other = event._replace(token=event.token % (TINY.vocab_size - 1) + 1)
  packed = recordings.pickle.loads(zlib.decompress(run.frames[i].packed))
  packed = (dataclasses.replace(packed[0], tokens=(other, *m.said.tokens[1:])), *packed[1:])
  false = run.frames[i]._replace(packed=zlib.compress(recordings.pickle.dumps(packed)))
  frames = (*run.frames[:i], false, *run.frames[i + 1 :])
  with pytest.raises(AssertionError, match=rf"step at step {m.step}: state.requests.tokens differs at \["):
    dataclasses.replace(run, frames=frames).replay()


def test_a_recording_is_a_value(busy, engine):
  run, kept = busy
  before = (run.frames, run.num_bytes)
  fork = run.fork_from(6)
  fork, _ = fork.submit(prompt_of(3), max_tokens=2)
  drained(fork)
  assert (run.frames, run.num_bytes) == before
  assert_same(run.rewind(6), kept[6])
  with pytest.raises(ValueError, match="verb must be one that runs no step .* got 'run'"):
    run.call("run")


def test_rebuild_computes_what_the_pool_held(engine):
  run, _ = history.record(engine).submit(prompt_of(9, 1), max_tokens=4)
  run, _ = drained(run)  # its pages are held by nobody, and can be found again
  for n in (1, 2):
    run, _ = run.submit([*prompt_of(10), *prompt_of(n)], max_tokens=9)
  run, _ = run.call("submit_samples", prompt_of(6), 2, max_tokens=9, temperature=1.0)
  seen, found = set(), set()
  for _ in range(8):
    run, events = run.step()
    seen.add(events.pages_shared)
    found.add(events.pages_cached)
    state, kv = run.now.scheduler, jax.tree.map(np.array, run.now.kv)
    again = history.rebuild(engine, state)
    size, table = engine.page_size, state.table
    holds = np.zeros((engine.num_pages, size), bool)
    holds[np.asarray(state.index.cached)] = True
    for slot, length in enumerate(table.seq_lens.tolist()):
      for position in range(length):
        holds[int(table.pages[slot, position // size]), position % size] = True
    for layer in range(TINY.num_layers):
      rows = np.asarray(kv_pages.layer_pages(again, jnp.arange(engine.num_pages), layer))
      for a, b in ((kv.k, again.k), (kv.v, again.v)):
        np.testing.assert_allclose(np.asarray(b)[rows][holds], a[rows][holds], atol=1e-5)
        assert not np.asarray(b)[rows][~holds].any()
  assert max(seen) >= 2 and max(found) >= 2
  # Two sequences share a part-full page, and the one that comes first holds less of it.
  lens = np.asarray(table.seq_lens)
  slot = next(slot for slot in (1, 2, 3) if (lens[slot] - 1) % size)
  shorter = page_table.fork(table, parent=slot, child=0, num_tokens=lens[slot] - 1)
  running = state.running.at[0].set(state.running[slot])
  again = history.rebuild(engine, dataclasses.replace(state, table=shorter, running=running, index=None))
  page, place = int(table.pages[slot, (lens[slot] - 1) // size]), (lens[slot] - 1) % size
  np.testing.assert_allclose(np.asarray(again.k)[page, place], kv.k[page, place], atol=1e-5)


@pytest.mark.parametrize("step", [0, 3, 11, 19])
def test_a_fork_left_alone_says_the_same(busy, engine, step):
  run, _ = busy
  fork = run.fork_from(step)
  wanted: dict[int, list[int]] = {}
  for m in run.moments():  # until somebody calls from outside again
    if m.verb != "step" and m.step > step:
      break
    if m.verb == "step" and m.step >= step:
      fork, events = fork.step()
      assert dataclasses.replace(events, tokens=()) == dataclasses.replace(m.said, tokens=())
      assert [e[:3] + e[4:] for e in events] == [e[:3] + e[4:] for e in m.said]
      np.testing.assert_allclose([e.logprob for e in events], [e.logprob for e in m.said], atol=1e-4)
      wanted[m.step] = [e.token for e in events]
      assert_same(fork.now.scheduler, jax.tree.map(jnp.asarray, m.after))
  assert wanted


def test_a_fork_in_another_direction(engine):
  asked = [(prompt_of(n), Params(max_tokens=12)) for n in (9, 14, 6)]
  alone = [list(done.output_ids) for done in engine.complete(asked)]
  run, ids = history.record(engine).call("submit_many", asked)
  for _ in range(6):
    run, _ = run.step()
  fork = run.fork_from(4).cancel(ids[0])
  fork, new = fork.submit(prompt_of(11), max_tokens=5)
  fork, _ = drained(fork)
  run, _ = drained(run)
  for id, tokens in zip(ids, alone, strict=True):
    assert engine.output(run.now, id) == tokens
  assert [engine.output(fork.now, id) for id in ids[1:]] == alone[1:]
  (fresh,) = engine.complete([(prompt_of(11), Params(max_tokens=5))])
  assert engine.output(fork.now, new) == list(fresh.output_ids)
  assert len(engine.output(fork.now, ids[0])) < 12 and fork.replay() == fork.num_steps


def test_a_recording_with_speculation_replays_and_a_stop_string_cuts_accepted_tokens():
  engine = make_engine(num_proposed=3, proposer=functools.partial(speculation.lookup, shortest=1), debug=True)
  prompt, other, stop, texts = prompt_of(5) * 3, prompt_of(9), "", []
  for _ in range(2):
    run, id = history.record(engine).submit(prompt, max_tokens=20, stop=(stop,) if stop else ())
    run, _ = run.submit(other, max_tokens=12)
    tokens, cut = [], ()
    while not run.now.idle:
      run, events = run.step()
      tokens += [event.token for event in events if event.request == id]
      cut += events.cut.get(id, ())
      if not stop and events.accepted.get(id, 0) > 1:
        stop = Letters().decode(tokens[:-2])  # found in this step, two tokens before its end
    texts.append(tokens)
    assert run.replay() == run.num_steps
  assert len(stop) > 2 and texts[1] == texts[0][: len(stop)] == engine.output(run.now, id)
  assert list(cut[:2]) == texts[0][len(stop) :][:2]


def test_explain_tells_a_life(engine):
  run = history.record(engine)
  run, first = run.submit(prompt_of(15), max_tokens=20)
  run, second = run.submit(prompt_of(14), max_tokens=20)
  run, third = run.submit(prompt_of(3), max_tokens=40)
  for _ in range(4):
    run, _ = run.step()
  run, last = run.submit(prompt_of(2), max_tokens=2)
  run = run.cancel(third)
  run, _ = drained(run)
  story = run.explain(second).splitlines()
  lost = [m for m in run.moments() if m.verb == "step" and second in m.said.preempted]
  (m,) = lost
  running = int((m.before.running >= 0).sum())
  slot = m.before.running.tolist().index(1)
  tokens = int(m.before.table.seq_lens[slot])
  assert story[:2] == [
    f"request {second}: 14 prompt tokens, at most 20 output tokens",
    "step 0: queued behind 1 waiting",
  ]
  assert (
    story[2] == "step 1: admitted into slot 1, 14 tokens to compute, after 1 step without the pages or the token budget"
  )
  assert story[3] == "step 2: prefilled in 2 chunks (9 + 5 tokens), first token"
  free = int((m.before.table.ref_counts == 0).sum())
  assert story[4] == (
    f"step {m.step}: preempted, because {free} pages were free and the {running} running requests needed "
    f"{free + 1}; {tokens} computed tokens lost"
  )
  found = 4 * int(re.findall(r"with (\d+) shared page", story[5])[0]) if "shared" in story[5] else 0
  found += 4 * int(re.findall(r"(\d+) cached page", story[5])[0]) if "cached" in story[5] else 0
  assert f"{tokens + 1 - found} tokens to compute again, after" in story[5]
  assert "resumed in slot" in story[5] and "recomputed in" in story[6] and story[-1].endswith(" let go")
  assert f": ended: length, with 20 output tokens; {-(-33 // 4)} pages let go" in story[-1]
  assert run.explain(third).splitlines()[-1].startswith("step 4: ended: cancelled, with")
  assert f"request {last}: 2 prompt tokens, at most 2 output tokens" in run.explain(last)
  assert run.explain(first).count("\n") == 4 and "preempted" not in run.explain(first)
  with pytest.raises(KeyError, match="request 77 was never in this run"):
    run.explain(77)


def test_explain_names_what_was_found(engine):
  run, _ = history.record(engine).submit(prompt_of(10), max_tokens=9)
  run, _ = run.step()
  run, second = run.submit([*prompt_of(10), 5, 6], max_tokens=3)
  run, _ = drained(run)
  run, third = run.submit([*prompt_of(10), 7], max_tokens=1)
  run, _ = run.step()
  lines = [run.explain(id).splitlines()[2] for id in (second, third)]
  assert lines[0] == "step 1: admitted into slot 1 with 2 shared pages (8 tokens not computed), 4 tokens to compute"
  assert lines[1] == "step 9: admitted into slot 0 with 2 cached pages (8 tokens not computed), 3 tokens to compute"


def test_explain_and_diff_name_copies(engine):
  run, ids = history.record(engine).call("submit_samples", prompt_of(6), 2, max_tokens=5, temperature=1.0)
  run, _ = drained(run)
  told = [line for id in ids for line in run.explain(id).splitlines() if "because it is shared" in line]
  assert len(told) == len(ids) == 2  # two that write at once both get a page of their own
  for slot, line in enumerate(told):
    step, src, dst = map(int, re.findall(r"\d+", line))
    assert int(run.rewind(step + 1).table.pages[slot, 1]) == dst != src


def test_diff_against_the_events(busy, engine):
  run, _ = busy
  said = set()
  for m in run.moments():
    change = history.diff(m.before, m.after)
    assert str(change)
    refs = [np.asarray(state.table.ref_counts) for state in (m.before, m.after)]
    assert len(change.granted) - len(change.released) == (refs[1] > 0).sum() - (refs[0] > 0).sum()
    if m.verb == "step":
      assert dict(change.appended) == {e.request: (e.token,) for e in m.said}
      assert {id: why for id, why in change.ended.items()} == (
        {e.request: e.finish for e in m.said if e.done} | dict.fromkeys(m.said.ended, "length")
      )
      assert set(change.preempted) == set(m.said.preempted)
      assert set(change.admitted) <= set(m.said.running)
    else:
      assert not change.appended and not change.granted
      if m.verb.startswith("submit"):
        assert len(change.queued) >= 1 and not change.released
    said |= {word for word in ("granted", "released", "preempted", "cancelled", "queued") if word in str(change)}
  assert said == {"granted", "released", "preempted", "cancelled", "queued"}
  assert str(history.diff(run.rewind(3), run.rewind(3))) == "nothing changed"
  whole, back = history.diff(run.rewind(0), run.rewind(9)), history.diff(run.rewind(9), run.rewind(0))
  assert whole.granted == back.released and whole.released == back.granted
  with pytest.raises(ValueError, match="a and b must be states of one engine"):
    history.diff(run.rewind(0), jax.tree.map(lambda a: a[:1] if a.ndim else a, run.rewind(0)))


def test_records_say_who_did_what(busy):
  run, kept = busy
  records = run.records()
  assert len(records) == run.num_steps
  steps = [m for m in run.moments() if m.verb == "step"]
  seen = set()
  for record, m in zip(records, steps, strict=True):
    assert (record["held"], record["shared"], record["waiting"]) == (
      m.said.pages_held,
      m.said.pages_shared,
      m.said.num_waiting,
    )
    for slot, (did, id) in enumerate(zip(record["did"], record["slots"], strict=True)):
      seen.add(did)
      assert (did == "preempted") == (id in m.said.preempted) and (did == "") == (id == -1)
      if did not in ("preempted", ""):
        assert m.said.running[slot] == id
      if did in ("decode", "paused"):
        assert int(m.before.running[slot]) >= 0
    # every token that was computed was computed by somebody who did something
    assert (m.said.num_scheduled > 0) == any(did in ("prefill", "recompute", "decode") for did in record["did"])
    assert {e.request for e in m.said} <= {
      id for did, id in zip(record["did"], record["slots"], strict=True) if did in ("prefill", "recompute", "decode")
    }
  assert {"prefill", "recompute", "decode", "preempted", ""} <= seen


# Snapshots.

ASKED: list[tuple[int, dict[str, Any]]] = [
  (n, dict(max_tokens=20, temperature=t, seed=n)) for n, t in ((9, 1.0), (14, 0.9), (6, 0.0), (11, 1.1), (3, 0.7))
]


def asked(stop=()):
  """Requests that starve the pool; the first has a stop string."""
  return [(prompt_of(n), Params(stop=stop if i == 0 else (), **params)) for i, (n, params) in enumerate(ASKED)]


def serve_until_killed(directory: str, stop: str) -> None:
  """What the process that dies does: says when it is in the middle of writing its third snapshot, and waits."""
  engine = make_engine()
  state, _ = engine.submit_many(engine.init(), asked((stop,)))
  with history.Snapshots(engine, directory) as snapshots:
    for step in range(12):
      state, _ = engine.step(state)
      if step in (7, 9):
        snapshots.save(state)
        snapshots.wait()
    rename = os.rename

    def hang(source, target, **kwargs):
      if "3" in pathlib.Path(target).name:
        print("writing", flush=True)
        time.sleep(600)
      return rename(source, target, **kwargs)

    os.rename = hang
    snapshots.save(state)
    print("serving", flush=True)
    while not state.idle:
      state, _ = engine.step(state)
    time.sleep(600)


@pytest.mark.slow
def test_after_a_kill_every_request_ends_as_it_would_have(engine, tmp_path):
  free = engine.complete(asked())
  text = Letters().decode(free[0].output_ids)
  stop = text[6:12]  # begins before the snapshot that is found, and ends after it
  whole = engine.complete(asked((stop,)))
  assert text.index(stop) == 6 and whole[0].finish == "stop" and len(whole[0].output_ids) == 12
  with subprocess.Popen(
    [sys.executable, __file__, str(tmp_path / "snapshots"), stop],
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | dict(PYTHONPATH=str(pathlib.Path(__file__).resolve().parents[1]), JAX_PLATFORMS="cpu"),
  ) as child:
    try:
      assert child.stdout is not None
      assert {child.stdout.readline().strip() for _ in range(2)} == {"writing", "serving"}
    finally:
      child.send_signal(signal.SIGKILL)
  names = sorted(path.name for path in (tmp_path / "snapshots").iterdir())
  assert names[:2] == ["1", "2"] and len(names) == 3 and names[2].startswith("3.")  # the last is half written
  state = history.resume(engine, tmp_path / "snapshots")
  watch = state.stops[0]
  assert watch.strings == (stop,) and Letters().decode(watch.tail).endswith(stop[:4])
  preempted = 0
  while not state.idle:
    state, events = engine.step(state)
    preempted += len(events.preempted)
  assert [engine.output(state, i) for i in range(len(ASKED))] == [list(done.output_ids) for done in whole]
  assert int(state.scheduler.table.num_free) == engine.num_pages
  # A new writer sweeps out what was left, counts on, and keeps the last two.
  with history.Snapshots(engine, tmp_path / "snapshots") as snapshots:
    snapshots.save(state)
  assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == ["2", "3"]


@pytest.fixture(scope="module")
def saved(engine, tmp_path_factory):
  """A folder with a snapshot, and a copy of what was saved."""
  folder = tmp_path_factory.mktemp("saved")
  state, _ = engine.submit_many(engine.init(), asked(("xyz",)))
  for _ in range(5):
    state, _ = engine.step(state)
  with history.Snapshots(engine, folder) as snapshots:
    assert snapshots.save(state)
    kept = copied((state.scheduler, state.kv))
    state, _ = engine.step(state)  # consumes the pool while it is being written
  return folder, kept, state


@pytest.mark.parametrize("device_copy", [True, False])
def test_a_snapshot_is_the_state_when_it_was_saved(engine, tmp_path, device_copy):
  state, _ = engine.submit_many(engine.init(), asked())
  with history.Snapshots(engine, tmp_path, keep=3, device_copy=device_copy) as snapshots:
    kept = {}
    for _ in range(8):
      state, _ = engine.step(state)
      now = copied((state.scheduler, state.kv))
      if snapshots.save(state):
        kept[len(kept) + 1] = now
  assert len(kept) >= 1
  for number in list(kept)[-3:]:
    found = history.resume(engine, tmp_path, number)
    assert_same((found.scheduler, found.kv), kept[number])
    assert found.scheduler.table.page_size == engine.page_size and not found.idle
  assert len(list(tmp_path.iterdir())) == min(3, len(kept))


def test_engines_that_do_not_fit_are_told_why(engine, saved):
  folder, (scheduler, kv), _ = saved
  found = history.resume(engine, folder)
  assert_same((found.scheduler, found.kv), (scheduler, kv))
  for changes, message in (
    (dict(num_pages=15), "num_pages must be 14, as in the snapshot, got 15"),
    (
      dict(num_slots=3, queue_size=11),
      "num_slots must be 4.* got 3; queue_size must be 12, as in the snapshot, got 11",
    ),
    (dict(page_size=5), "page_size must be 4"),
    (dict(kv_dtype=jnp.bfloat16), "kv_dtype must be float32, as in the snapshot, got bfloat16"),
  ):
    with pytest.raises(ValueError, match=message):
      history.resume(make_engine(**changes), folder)
  for model, message in (
    (models.load(TINY, seed=4), "model must have the weights that it had"),
    (models.load(dataclasses.replace(TINY, num_layers=1)), "model must have num_layers=2, as in the snapshot, got 1"),
  ):
    with pytest.raises(ValueError, match=message):
      history.resume(Engine(model, **SIZES), folder)


def test_what_is_not_whole_is_not_loaded(engine, saved, tmp_path):
  folder, (scheduler, _), _ = saved
  with pytest.raises(FileNotFoundError, match="directory must be a folder of snapshots"):
    history.resume(engine, tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match=r"at least one snapshot, got .* with \[\]"):
    history.resume(engine, tmp_path)
  shutil.copytree(folder, tmp_path / "more")
  shutil.copytree(folder / "1", tmp_path / "more" / "2.orbax-checkpoint-tmp")
  assert_same(history.resume(engine, tmp_path / "more").scheduler, scheduler)
  with pytest.raises(FileNotFoundError, match=r"directory must hold snapshot 2, got .* with \[1\]"):
    history.resume(engine, tmp_path / "more", 2)
  with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
    history.Snapshots(engine, tmp_path / "more", keep=0)


def test_a_state_that_cannot_be_saved_is_refused(engine, tmp_path):
  state = dataclasses.replace(engine.init(), stops={1: object()})
  with history.Snapshots(engine, tmp_path) as snapshots, pytest.raises(TypeError, match="arrays and plain values"):
    snapshots.save(state)


if __name__ == "__main__":
  serve_until_killed(*sys.argv[1:])
