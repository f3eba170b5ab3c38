"""Snapshots of a serving engine, written in the background, and how to go on from one after a crash."""

import concurrent.futures
import dataclasses
import inspect
import json
import os
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding

type Engine = Any  # a `paged_flash.Engine`: a room above this one
type EngineState = Any


class Snapshots:
  """Writes snapshots of an engine's states to a folder, without stopping the engine. The last `keep` stay.

  The next step consumes the pool, so `save` first copies it on the device: a few milliseconds of memory bandwidth, and
  room for a second pool until the copy is on the host. A thread transfers and writes it. With `device_copy=False` there
  is no second pool, and `save` waits until the pool is on the host. Pages of swapped requests are there already: `save`
  copies them there. The scheduler's state needs no copy.

  A snapshot takes its name when it is whole, so that what a crash leaves half written is never taken for one. One
  process writes to a folder at a time.

  Args:
    engine: whose states they are. Its weights are not saved, but a fingerprint of them is.
    directory: made if it is not there. Snapshots that are there count to the `keep` and are kept as long.
    keep: snapshots to keep, the newest ones.
    device_copy: see above.

  Example (three lines around the open loop)::

      with pf.history.Snapshots(engine, "runs/snapshots") as snapshots:
        while not state.idle:
          state, events = engine.step(state)
          snapshots.save(state)  # False, and nothing done, while the last one is still being written

      state = pf.history.resume(engine, "runs/snapshots")  # in a new process
  """

  def __init__(self, engine: Engine, directory: str | os.PathLike, *, keep: int = 2, device_copy: bool = True):
    if keep < 1:
      raise ValueError(f"keep must be at least 1, got {keep}")
    self._manager = _manager(directory, create=True, max_to_keep=keep, cleanup_tmp_directories=True)
    self._about, self._device_copy = _about(engine), device_copy
    self._number = (self._manager.latest_step() or 0) + 1
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._writing: concurrent.futures.Future | None = None

  def save(self, state: EngineState) -> bool:
    """Begins to write a snapshot of `state`, which stays good; False while an earlier one is still being written.

    Raises:
      TypeError: a field of the state is neither made of arrays nor of plain values.
      OSError: the one before could not be written.
    """
    if self._writing is not None and not self._writing.done():
      return False
    self.wait()
    arrays, host = _split(state)
    plain = json.loads(json.dumps({name: _plain(value) for name, value in host.items()}, default=repr))
    if _restored(plain, type(state)) != host:
      raise TypeError(f"state must be of arrays and plain values to be saved, got {host!r:.200}")
    linear = [name for name in arrays if not name.startswith("scheduler")]

    def copy(a):  # never a view of what the next step overwrites
      return jnp.copy(a) if self._device_copy and _memory_kind(a) is None else np.array(a)

    arrays |= {name: copy(arrays[name]) for name in linear}
    about = self._about | dict(arrays={name: [list(a.shape), a.dtype.name] for name, a in arrays.items()})
    self._writing = self._thread.submit(self._write, self._number, arrays, dict(about=about, host=plain))
    self._number += 1
    return True

  def wait(self) -> None:
    """Returns when nothing is being written any more; raises what went wrong."""
    writing, self._writing = self._writing, None
    if writing is not None:
      writing.result()

  def close(self) -> None:
    """Waits, and ends the thread."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      self._manager.close()

  def __enter__(self) -> "Snapshots":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _write(self, number: int, arrays: Mapping[str, Any], rest: Any) -> None:
    from orbax.checkpoint import args

    self._manager.save(number, args=args.Composite(arrays=args.StandardSave(arrays), rest=args.JsonSave(rest)))


def resume(engine: Engine, directory: str | os.PathLike, number: int | None = None) -> EngineState:
  """The state of a snapshot, to go on from; every request ends with the very tokens it would have had.

  Args:
    engine: with the sizes, the model and the weights of the one that was saved.
    directory: as given to `Snapshots`.
    number: of the snapshot; None for the newest that is whole.

  Raises:
    FileNotFoundError: there is no such snapshot.
    ValueError: the engine does not fit it; the text names the arguments.
  """
  from orbax.checkpoint import args

  if not pathlib.Path(directory).is_dir():
    raise FileNotFoundError(f"directory must be a folder of snapshots, got {os.fspath(directory)!r}")
  with _manager(directory, create=False, read_only=True) as manager:
    numbers = sorted(manager.all_steps())
    number = numbers[-1] if number is None and numbers else number
    if number not in numbers:
      wanted = "at least one snapshot" if number is None else f"snapshot {number}"
      raise FileNotFoundError(f"directory must hold {wanted}, got {os.fspath(directory)!r} with {numbers}")
    rest = manager.restore(number, args=args.Composite(rest=args.JsonRestore()))["rest"]
    template = _template(engine)
    wanted, _ = _split(template)
    _check(engine, rest["about"], wanted)
    # Those of host memory as numpy's: orbax 0.12 would put them there, but as arrays whose type says device memory.
    in_host = {name: a.sharding for name, a in wanted.items() if a.sharding.memory_kind == "pinned_host"}
    shapes = {n: np.empty(a.shape, a.dtype) if n in in_host else a for n, a in wanted.items() if a.size}
    arrays = manager.restore(number, args=args.Composite(arrays=args.StandardRestore(shapes)))["arrays"]
  arrays |= {name: jax.device_put(arrays[name], place) for name, place in in_host.items()}
  fields = _restored(rest["host"], type(template))
  for name, value in _pytrees(template).items():
    paths, structure = jax.tree_util.tree_flatten_with_path(value)
    leaves = [arrays[name + jax.tree_util.keystr(path)] for path, _ in paths]
    fields[name] = jax.tree.unflatten(structure, leaves)
  return dataclasses.replace(template, **fields)


def _manager(directory: str | os.PathLike, **options: Any):
  from orbax import checkpoint  # a second of imports, which only those who save or resume pay

  options |= dict(enable_async_checkpointing=False)  # `save` is called in a thread of its own
  path = pathlib.Path(directory).absolute()
  return checkpoint.CheckpointManager(path, options=checkpoint.CheckpointManagerOptions(**options))


def _template(engine: Engine) -> EngineState:
  """An empty state without its arrays: shapes, dtypes and the memory that they belong in."""
  found = []
  jax.eval_shape(lambda: found.append(engine.init()))
  (state,) = found

  def shape(a):
    place = SingleDeviceSharding(jax.devices()[0], memory_kind=_memory_kind(a))
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)

  return dataclasses.replace(state, **jax.tree.map(shape, _pytrees(state)))


def _memory_kind(a: jax.Array) -> str | None:
  """None for the device's own."""
  return "pinned_host" if jax.typeof(a).memory_space == jax.memory.Space.Host else None


def _pytrees(state: EngineState) -> dict[str, Any]:
  """The fields that are made of arrays."""
  fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  kinds = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)

  def of_arrays(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, kinds) for leaf in leaves)

  return {name: value for name, value in fields.items() if of_arrays(value)}


def _split(state: EngineState) -> tuple[dict[str, Any], dict[str, Any]]:
  """The arrays of a state by their paths, and its other fields."""
  trees = _pytrees(state)
  arrays = {
    name + jax.tree_util.keystr(path): leaf
    for name, value in trees.items()
    for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]
  }
  others = [field.name for field in dataclasses.fields(state) if field.name not in trees]
  return arrays, {name: getattr(state, name) for name in others}


# Plain values through JSON and back; the types come from the annotations of the class.


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return [[_plain(k), _plain(v)] for k, v in value.items()]
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  return value


def _restored(plain: Mapping[str, Any], owner: type) -> dict[str, Any]:
  hints = typing.get_type_hints(owner)
  return {name: _typed(value, hints[name]) for name, value in plain.items()}


def _typed(plain: Any, hint: Any) -> Any:
  kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
  if kind in (typing.Union, types.UnionType):
    return None if plain is None else _typed(plain, next(t for t in inner if t is not type(None)))
  if not isinstance(kind, type) or not isinstance(plain, list):
    return plain
  if issubclass(kind, Mapping):
    return {_typed(k, inner[0]): _typed(v, inner[1]) for k, v in plain}
  if hasattr(kind, "_fields"):  # a NamedTuple
    return kind(*map(_typed, plain, typing.get_type_hints(kind).values()))
  if issubclass(kind, Sequence):
    return tuple(_typed(v, inner[0]) for v in plain)
  return plain


# Does the engine fit the snapshot?


def _about(engine: Engine) -> dict[str, Any]:
  """What must be the same: the engine's arguments (as far as it keeps them), the model's config and weights."""
  names = [name for name in inspect.signature(type(engine).__init__).parameters if hasattr(engine, name)]
  config = engine.model.config
  return dict(
    sizes={name: str(getattr(engine, name)) for name in names if name != "model"},
    model={field.name: repr(getattr(config, field.name)) for field in dataclasses.fields(config)},
    weights=[int(n) for n in _fingerprint(engine.model.params)],
  )


def _check(engine: Engine, saved: dict[str, Any], arrays: dict[str, Any]) -> None:
  ours = _about(engine)
  for name, value in ours["model"].items():
    if value != saved["model"].get(name):
      raise ValueError(f"model must have {name}={saved['model'].get(name)}, as in the snapshot, got {value}")
  if ours["weights"] != saved["weights"]:
    raise ValueError("model must have the weights that it had when the snapshot was taken; these are others")
  shapes = {name: [list(a.shape), a.dtype.name] for name, a in arrays.items()}
  different = [name for name in shapes | saved["arrays"] if shapes.get(name) != saved["arrays"].get(name)]
  if different:
    sizes = {n: (v, saved["sizes"].get(n)) for n, v in ours["sizes"].items() if v != saved["sizes"].get(n)}
    sizes = {n: v for n, v in sizes.items() if n not in ("debug", "steps_per_dispatch")}
    wanted = [f"{name} must be {theirs}, as in the snapshot, got {ours}" for name, (ours, theirs) in sizes.items()]
    raise ValueError("; ".join(wanted) or f"engine must have the arrays of the snapshot; different: {different[:5]}")


@jax.jit
def _fingerprint(params: Any) -> list[jax.Array]:
  """u32[] for each leaf: a sum over its bits, each weighted by an odd number of its place."""

  def one(a):
    whole = jnp.issubdtype(a.dtype, jnp.integer) or a.dtype == jnp.bool
    bits = a if whole else lax.bitcast_convert_type(a, jnp.dtype(f"uint{8 * a.dtype.itemsize}"))
    place = lax.iota(jnp.uint32, a.size).reshape(a.shape)
    return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

  return [one(a) for a in jax.tree.leaves(params) if a.size]
