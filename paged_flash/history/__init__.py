"""A run as its states: record, replay, rewind, fork, diff, explain; and snapshots to resume from after a crash."""

from paged_flash.history.recording import Recording, rebuild, record
from paged_flash.history.snapshots import Snapshots, resume
from paged_flash.history.words import Diff, Moment, diff

__all__ = ["Diff", "Moment", "Recording", "Snapshots", "diff", "rebuild", "record", "resume"]
