"""Metrics of a run, and where they go: the run directory, the console, Weights & Biases."""

from trainer.tracking.interface import Row, Tracker, TrackerContext, Trackers
from trainer.tracking.meter import Meter
from trainer.tracking.registry import TRACKERS, open_trackers

__all__ = ["TRACKERS", "Meter", "Row", "Tracker", "TrackerContext", "Trackers", "open_trackers"]
