"""The soak sees every kind of fault that it counts; that there is none is what its smoke config runs for."""

import dataclasses

import jax
import numpy as np

from experiments import soak


def test_faults_are_counted_by_kind():
  world = soak.first(soak.Config())
  state, look = world.state, jax.jit(soak.inspect)

  def faults(changed, pool=world.pool):
    found = np.asarray(look(changed, pool)).tolist()
    return {name: n for name, n in zip(soak.FAULTS, found, strict=True) if n}

  def table(**changes):
    return dataclasses.replace(state, table=dataclasses.replace(state.table, **changes))

  refs, pages, lens = state.table.ref_counts, state.table.pages, state.table.seq_lens
  assert faults(state) == {}
  assert faults(table(ref_counts=refs.at[3].set(2))) == {"leaks": 2}
  assert faults(table(ref_counts=refs.at[3].set(-1))) == {"double_frees": 1}
  assert faults(table(pages=pages.at[1, 2].set(4))) == {"broken_rows": 1}
  assert faults(dataclasses.replace(state, running=state.running.at[0].set(2))) == {"broken_slots": 1}
  assert state.index is not None  # a page that hangs on one that is not in it, and does not hold what it says
  index = dataclasses.replace(state.index, before=state.index.before.at[2].set(5))
  assert faults(dataclasses.replace(state, index=index)) == {"broken_index": 1, "foreign_tokens": 3}
  assert state.host is not None
  host = dataclasses.replace(state.host, ref_counts=state.host.ref_counts.at[1].set(1))
  assert faults(dataclasses.replace(state, host=host)) == {"leaks": 1}
  host = dataclasses.replace(host, pages=state.host.pages.at[2, 0].set(1), seq_lens=state.host.seq_lens.at[2].set(2))
  assert faults(dataclasses.replace(state, host=host)) == {"foreign_tokens": 2}
  twice = table(pages=pages.at[0, :2].set(6), seq_lens=lens.at[0].set(6), ref_counts=refs.at[6].set(2))
  assert faults(twice).keys() == {"broken_rows", "broken_slots", "foreign_tokens"}
