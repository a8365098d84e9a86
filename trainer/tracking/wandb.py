"""Weights & Biases: one run per run directory, in a separate thread, so that it never blocks training."""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.schema import WandbSection
from trainer.errors import first_line
from trainer.files import replace_text
from trainer.tracking.interface import Row, TrackerContext

log = logging.getLogger(__name__)

_INIT_SECONDS = 60.0
_CLOSE_SECONDS = {"online": 60.0, "offline": 15.0}
_FAILED_SECONDS = 5.0
"""Time to close after an error: less than the delay of the other ranks, which wait for rank 0 to report it."""

_RUN_ID_FILE = Path("wandb", "run-id")
"""File in the run directory."""

_RUN_ID_LENGTH = 12


def open_wandb(context: TrackerContext) -> Wandb | None:
    """Start logging to Weights & Biases, unless `tracking.wandb.mode` is `disabled`."""
    section = context.loaded.config.tracking.wandb
    if section.mode == "disabled":
        return None
    return Wandb(
        section,
        name=context.loaded.name,
        folder=context.directory.path,
        config=context.loaded.resolved(),
        run_id=context.state.get("run_id"),
    )


class Wandb:
    """Sends rows to Weights & Biases, or to an offline run in the run directory."""

    def __init__(
        self, section: WandbSection, *, name: str, folder: Path, config: Mapping[str, Any], run_id: str | None = None
    ) -> None:
        """Start the thread.

        Args:
            section: `tracking.wandb` of the configuration.
            name: Of the run.
            folder: The run directory.
            config: Resolved configuration, attached to the run.
            run_id: Of the run to continue, if the run directory has no id.
        """
        self._run_id = run_id
        self._rows: queue.SimpleQueue[tuple[float, Row] | int] = queue.SimpleQueue()
        self._close_seconds = _CLOSE_SECONDS.get(section.mode, 0.0)
        arguments = (section, name, folder, config)
        self._thread = threading.Thread(target=self._run, args=arguments, name="wandb", daemon=True)
        self._thread.start()

    def log(self, row: Row) -> None:
        """Queue one row with the current time.

        W&B keeps a `_timestamp` of the row; without it, a row gets the time at which the thread sends it,
        which during W&B's start is up to a minute later. W&B 0.31 always sets its `_runtime` itself.
        """
        self._rows.put((time.time(), row))

    def state(self) -> Mapping[str, str]:
        """Return the id of the run, once it is known."""
        return {} if self._run_id is None else {"run_id": self._run_id}

    def close(self, exit_status: int) -> None:
        """Wait a limited time until all rows are sent."""
        self._rows.put(exit_status)
        seconds = self._close_seconds if exit_status == 0 else min(self._close_seconds, _FAILED_SECONDS)
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("Weights & Biases did not finish within %d s; metrics.jsonl is complete", seconds)

    def _run(self, section: WandbSection, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            self._run_id = _keep_run_id(folder / _RUN_ID_FILE, self._run_id)
            self._send_rows(section, name, folder, config)
        except Exception as error:
            reason = first_line(error)
            log.warning(
                "Weights & Biases logging disabled after an error: %s. Training continues; metrics.jsonl is complete",
                reason,
            )

    def _send_rows(self, section: WandbSection, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        run = wandb.init(
            mode=section.mode,
            project=section.project,
            entity=section.entity,
            group=section.group,
            tags=section.tags or None,
            name=name,
            id=self._run_id,
            resume="allow",
            dir=str(folder),
            config=dict(config),
            job_type="train",
            settings=wandb.Settings(console="off", init_timeout=_INIT_SECONDS, silent=True),
        )
        run.define_metric("*", step_metric="step")
        while not isinstance(entry := self._rows.get(), int):
            seconds, row = entry
            values = {f"{row['split']}/{k}": v for k, v in row.items() if k not in ("split", "step") and v is not None}
            run.log({"step": row["step"], "_timestamp": seconds, **values})
        run.finish(exit_code=entry)


def _keep_run_id(file: Path, run_id: str | None) -> str:
    """Return the id in a file of the run directory; write `run_id`, or else a new id, if there is none.

    The file makes the same command continue the same W&B run, even before the first checkpoint.
    """
    try:
        kept = file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        kept = ""
    if kept:
        return kept
    chosen = run_id or uuid.uuid4().hex[:_RUN_ID_LENGTH]
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, chosen)
    return chosen
