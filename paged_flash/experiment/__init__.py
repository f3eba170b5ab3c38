"""What every experiment needs: configs from Python files, a workdir of records, one way to time, one way to start."""

from paged_flash.experiment.config import choose, load
from paged_flash.experiment.launch import main
from paged_flash.experiment.timing import Timing, call_seconds, compare, kernel_seconds, measure, measure_kernels
from paged_flash.experiment.workdir import Workdir, environment, write_result

__all__ = [
  "Timing",
  "Workdir",
  "call_seconds",
  "choose",
  "compare",
  "environment",
  "kernel_seconds",
  "load",
  "main",
  "measure",
  "measure_kernels",
  "write_result",
]
