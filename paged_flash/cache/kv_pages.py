"""The pool: the arrays of K and V that page ids index.

The pool is the one big thing: gigabytes, *linear* and always donated. Whoever is handed one consumes it and returns
the next; the arrays it was made of must not be used again. It is flattened over layers, page `p` of layer `l` being
row `l * N + p`, so that XLA updates it in place and never slices a layer out of it. Beside it there may be pages in
host memory, to which those of preempted requests are copied (`swap`). Where a second model drafts what the first may
say, a page holds its K and V too, in a pool of its own shapes: what is done to pages is done in both.

Source: Kwon et al. 2023, sections 4.1 and 4.5.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding

from paged_flash.cache.page_table import NO_PAGE, PageCopies
from paged_flash.kernels import kv_write_sm90


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVPages:
  """K and V of all layers. Consumed by every function that takes it."""

  k: jax.Array  # dtype[L*N, page_size, K, D]
  v: jax.Array  # dtype[L*N, page_size, K, D]
  host: tuple[jax.Array, jax.Array] | None  # K and V of H pages in host memory, dtype[H, L, page_size, K, D] each
  draft: "KVPages | None" = None  # K and V of the draft model, in the same pages
  num_layers: int = dataclasses.field(metadata=dict(static=True))

  @property
  def num_pages(self) -> int:
    """Pages of each layer, N."""
    return self.k.shape[0] // self.num_layers

  @property
  def page_size(self) -> int:
    return self.k.shape[1]


def init(
  *,
  num_layers: int,
  num_pages: int,
  page_size: int,
  num_kv_heads: int,
  head_dim: int,
  dtype: jax.typing.DTypeLike,
  num_host_pages: int = 0,
) -> KVPages:
  """A pool of zeros (never garbage: a NaN in a page that nobody owns must not exist)."""

  def zeros(*shape):
    return jnp.zeros((*shape, page_size, num_kv_heads, head_dim), dtype)

  def host_zeros():  # straight into host memory, which may be larger than the device's
    pages = np.zeros((num_host_pages, num_layers, page_size, num_kv_heads, head_dim), dtype)
    return jax.device_put(pages, SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))

  k, v = zeros(num_layers * num_pages), zeros(num_layers * num_pages)
  host = (host_zeros(), host_zeros()) if num_host_pages else None
  return KVPages(k=k, v=v, host=host, num_layers=num_layers)


def placed[T](kv: KVPages, arrays: T) -> T:
  """`arrays` (any pytree), committed to the device if `kv` has host pages, which are committed to theirs.

  What a program returns beside a committed array is committed, and one that is then handed it compiles again.
  """

  def place(a):
    return a if jax.typeof(a).memory_space == jax.memory.Space.Host else jax.device_put(a, jax.devices()[0])

  return arrays if kv.host is None else jax.tree.map(place, arrays)


def resize(kv: KVPages, num_pages: int) -> KVPages:
  """The pool with `num_pages` pages, those that are new being zeros. Consumes `kv`; copies it."""

  def put(pool):
    layers = pool.reshape(kv.num_layers, kv.num_pages, *pool.shape[1:])[:, :num_pages]
    layers = jnp.pad(layers, [(0, 0), (0, num_pages - layers.shape[1])] + [(0, 0)] * (pool.ndim - 1))
    return layers.reshape(-1, *pool.shape[1:])

  draft = None if kv.draft is None else resize(kv.draft, num_pages)
  return dataclasses.replace(kv, k=put(kv.k), v=put(kv.v), draft=draft)


def layer_pages(kv: KVPages, pages: jax.Array, layer: int) -> jax.Array:
  """Rows of the pool that hold `pages` (page ids of any shape) in `layer`; NO_PAGE stays NO_PAGE."""
  return jnp.where(pages == NO_PAGE, NO_PAGE, pages + layer * kv.num_pages)


def write(kv: KVPages, layer: int, k: jax.Array, v: jax.Array, pages: jax.Array, offsets: jax.Array) -> KVPages:
  """Writes one layer's new K and V into their pages, by one kernel on a Hopper GPU. Consumes `kv`.

  Args:
    kv: the pool; consumed.
    layer: which layer the tokens are of.
    k, v: [T, K, D] of the packed tokens.
    pages: i32[T] page id for each token, NO_PAGE for padding, which is not written.
    offsets: i32[T] place inside the page, in tokens.

  Returns:
    The next pool.
  """
  k, v = k.astype(kv.k.dtype), v.astype(kv.v.dtype)
  rows = layer_pages(kv, pages, layer)
  if not kv_write_sm90.supports(kv.k):
    k, v = kv_write_sm90.write(kv.k, kv.v, k, v, rows, offsets)
    return dataclasses.replace(kv, k=k, v=v)
  rows = jnp.where(rows == NO_PAGE, kv.k.shape[0], rows)
  k, v = (pool.at[rows, offsets].set(new, mode="drop", unique_indices=True) for pool, new in ((kv.k, k), (kv.v, v)))
  return dataclasses.replace(kv, k=k, v=v)


def copy(kv: KVPages, copies: PageCopies) -> KVPages:
  """Copies whole pages in all layers, as a plan asks before its step writes. Consumes `kv`.

  One kernel on a Hopper GPU; elsewhere a loop that runs once per copy, and not at all when there is none, as in nearly
  every step.
  """
  if kv.draft is not None:
    kv = dataclasses.replace(kv, draft=copy(kv.draft, copies))
  if not kv_write_sm90.supports(kv.k):
    src, dst = copies.src.reshape(-1), copies.dst.reshape(-1)
    k, v = kv_write_sm90.copy(kv.k, kv.v, src, dst, kv.num_layers)
    return dataclasses.replace(kv, k=k, v=v)
  todo = jnp.flatnonzero(copies.dst != NO_PAGE, size=copies.dst.size, fill_value=0)
  layers = jnp.arange(kv.num_layers) * kv.num_pages  # i32[L]

  def body(i, pools):
    src, dst = layers + copies.src[todo[i]], layers + copies.dst[todo[i]]
    return tuple(pool.at[dst].set(pool[src], unique_indices=True) for pool in pools)

  k, v = lax.fori_loop(0, jnp.sum(copies.dst != NO_PAGE), body, (kv.k, kv.v))
  return dataclasses.replace(kv, k=k, v=v)


def swap(kv: KVPages, out: PageCopies | None, back: PageCopies | None) -> KVPages:
  """Copies pages of all layers into host memory, then others from there into the pool. Consumes `kv`.

  The loops run once per page. The layers of a page lie apart in the pool and together in host memory, so that a page
  crosses in one piece; host memory is only ever sliced and updated, which XLA does in place. It cannot reshape there.

  Args:
    kv: the pool; consumed.
    out: `src` pages of the pool, `dst` host pages, of any one shape; None for none.
    back: `src` host pages, `dst` pages of the pool; None for none.
  """
  if kv.draft is not None:
    kv = dataclasses.replace(kv, draft=swap(kv.draft, out, back))
  if kv.host is None:
    return kv
  layers = jnp.arange(kv.num_layers) * kv.num_pages  # i32[L]

  def leave(src, dst, pools, hosts):
    pages = [jax.device_put(pool[layers + src][None], jax.memory.Space.Host) for pool in pools]
    updated = [lax.dynamic_update_slice_in_dim(h, page, dst, 0) for h, page in zip(hosts, pages, strict=True)]
    return pools, tuple(updated)

  def enter(src, dst, pools, hosts):
    pages = [jax.device_put(lax.dynamic_slice_in_dim(h, src, 1), jax.memory.Space.Device) for h in hosts]
    updated = [pool.at[layers + dst].set(p[0], unique_indices=True) for pool, p in zip(pools, pages, strict=True)]
    return tuple(updated), hosts

  moved = (kv.k, kv.v), kv.host
  for copies, move in ((out, leave), (back, enter)):
    if copies is not None:
      src, dst = copies.src.reshape(-1), copies.dst.reshape(-1)
      todo = jnp.flatnonzero(dst != NO_PAGE, size=dst.size, fill_value=0)

      def body(i, moved, src=src, dst=dst, todo=todo, move=move):
        return move(src[todo[i]], dst[todo[i]], *moved)

      moved = lax.fori_loop(0, jnp.sum(dst != NO_PAGE), body, moved)
  (k, v), host = moved
  return dataclasses.replace(kv, k=k, v=v, host=host)
