"""The trackers by name. To add a tracker, write a factory and add it here."""

from __future__ import annotations

import logging

from trainer.config import LoadedConfig
from trainer.errors import ConfigError, first_line
from trainer.run_directory import RunDirectory
from trainer.tracking.console import open_console
from trainer.tracking.interface import States, Tracker, TrackerContext, TrackerFactory, Trackers
from trainer.tracking.jsonl import open_json_lines
from trainer.tracking.wandb import open_wandb

log = logging.getLogger(__name__)

TRACKERS: dict[str, TrackerFactory] = {"jsonl": open_json_lines, "console": open_console, "wandb": open_wandb}
"""Factories, in the order in which trackers receive a row. The names are keys of `Manifest.trackers`."""


def open_trackers(
    loaded: LoadedConfig, directory: RunDirectory, states: States | None = None, *, is_rank_zero: bool
) -> Trackers:
    """Open the trackers that the configuration enables, on rank 0; other ranks get none.

    Args:
        loaded: Configuration of this attempt.
        directory: The run directory, which exists.
        states: State of each tracker at the checkpoint that the run resumes from.
        is_rank_zero: True on rank 0.

    Raises:
        ConfigError: `metrics.jsonl` cannot be opened. Any other error disables its tracker.
    """
    trackers: dict[str, Tracker] = {}
    for name, factory in TRACKERS.items() if is_rank_zero else ():
        try:
            tracker = factory(TrackerContext(loaded, directory, (states or {}).get(name, {})))
        except ConfigError:
            raise
        except Exception as error:
            log.warning("tracker '%s' disabled after an error: %s. Training continues", name, first_line(error))
            continue
        if tracker is not None:
            trackers[name] = tracker
    return Trackers(trackers, states)
