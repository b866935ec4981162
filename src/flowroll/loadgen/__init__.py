"""A load generator for any server with flowroll's API: the requests of a run, the run itself, and its report."""

from flowroll.loadgen.plan import Load, Mix
from flowroll.loadgen.report import OK, LoadReport, Outcome, summarize
from flowroll.loadgen.run import run_load

__all__ = ["OK", "Load", "LoadReport", "Mix", "Outcome", "run_load", "summarize"]
