"""What every experiment needs: configs from Python files, a workdir of records, one way to time, one way to start."""

from paged_flash.experiment.config import choose, load
from paged_flash.experiment.launch import main
from paged_flash.experiment.timing import Timing, measure
from paged_flash.experiment.workdir import Workdir, environment, write_result

__all__ = ["Timing", "Workdir", "choose", "environment", "load", "main", "measure", "write_result"]
