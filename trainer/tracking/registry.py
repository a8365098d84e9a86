"""The trackers that a configuration asks for."""

from __future__ import annotations

from trainer.config import LoadedConfig
from trainer.run_directory import RunDirectory
from trainer.tracking.console import Console
from trainer.tracking.interface import Tracker, Trackers
from trainer.tracking.jsonl import JsonLines
from trainer.tracking.wandb import Wandb


def open_trackers(loaded: LoadedConfig, directory: RunDirectory, *, tracks: bool) -> Trackers:
    """Opens them on the rank that tracks; the others get an empty one."""
    if not tracks:
        return Trackers([])
    trackers: list[Tracker] = [JsonLines(directory.metrics), Console(loaded.steps)]
    section = loaded.config.tracking.wandb
    if section.mode != "disabled":
        trackers.append(Wandb(section, loaded.name, directory, loaded.resolved()))
    return Trackers(trackers)
