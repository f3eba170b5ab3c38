"""The best ways to continue a prompt: beams and samples that share every page up to where they part."""

from paged_flash.beam.beams import BeamState
from paged_flash.beam.search import BeamSearch, Result, best_of

__all__ = ["BeamSearch", "BeamState", "Result", "best_of"]
