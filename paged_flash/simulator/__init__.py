"""The scheduler without a model: memory and time of serving requests of given lengths, in pages or contiguously."""

from paged_flash.simulator.latency import LatencyModel, llama_8b_h200, opt_13b_a100
from paged_flash.simulator.report import Contiguous, Paged, Served, poisson, simulate, sweep
from paged_flash.simulator.serve import Outcome, Settings, Stats, Workload, serve

__all__ = [
  "Contiguous",
  "LatencyModel",
  "Outcome",
  "Paged",
  "Served",
  "Settings",
  "Stats",
  "Workload",
  "llama_8b_h200",
  "opt_13b_a100",
  "poisson",
  "serve",
  "simulate",
  "sweep",
]
