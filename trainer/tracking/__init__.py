"""Where numbers go: the run directory, the console, Weights & Biases."""

from trainer.tracking.interface import Row, Tracker, Trackers
from trainer.tracking.meter import Meter
from trainer.tracking.open import open_trackers
from trainer.tracking.run_directory import RunDirectory

__all__ = ["Meter", "Row", "RunDirectory", "Tracker", "Trackers", "open_trackers"]
