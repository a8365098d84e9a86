"""Where numbers go: the run directory, the console, Weights & Biases."""

from trainer.tracking.interface import Row, Tracker, Trackers
from trainer.tracking.meter import Meter
from trainer.tracking.registry import open_trackers

__all__ = ["Meter", "Row", "Tracker", "Trackers", "open_trackers"]
