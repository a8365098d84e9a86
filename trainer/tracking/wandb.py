"""Weights & Biases, one run per job, in a thread of its own: training never waits for it and never fails by it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import Any

from trainer.config.schema import WandbSection
from trainer.errors import first_line
from trainer.run_directory import RunDirectory
from trainer.tracking.interface import Row

log = logging.getLogger(__name__)

_INIT_SECONDS = 60.0
_CLOSE_SECONDS = {"online": 60.0, "offline": 15.0}
_FAILED_SECONDS = 5.0
"""After an error: less than the other ranks wait for this one to say what was wrong."""


class Wandb:
    """Sends rows to Weights & Biases, or to an offline run below the run directory."""

    def __init__(self, section: WandbSection, name: str, directory: RunDirectory, config: dict[str, Any]) -> None:
        self._rows: queue.SimpleQueue[tuple[float, Row] | int] = queue.SimpleQueue()
        self._patience = _CLOSE_SECONDS.get(section.mode, 0.0)
        self._thread = threading.Thread(
            target=self._work, args=(section, name, directory, config), name="wandb", daemon=True
        )
        self._thread.start()

    def _work(self, section: WandbSection, name: str, directory: RunDirectory, config: dict[str, Any]) -> None:
        try:
            import wandb

            run = wandb.init(
                mode=section.mode,
                project=section.project,
                entity=section.entity,
                group=section.group,
                tags=section.tags or None,
                name=name,
                id=directory.keep_wandb_run(),
                resume="allow",
                dir=str(directory.path),
                config=config,
                job_type="train",
                settings=wandb.Settings(console="off", init_timeout=_INIT_SECONDS, silent=True),
            )
            run.define_metric("*", step_metric="step")
            while not isinstance(logged := self._rows.get(), int):
                seconds, row = logged
                prefix = row["split"]
                values = {f"{prefix}/{k}": v for k, v in row.items() if k not in ("split", "step") and v is not None}
                run.log({"step": row["step"], "_timestamp": seconds, **values})
            run.finish(exit_code=logged)
        except Exception as error:  # whatever it is, training goes on
            first = first_line(error)
            log.warning("Weights & Biases is out: %s. Training goes on; metrics.jsonl is complete", first)

    def log(self, row: Row) -> None:
        # wandb keeps a given `_timestamp`; without one a row has the time at which this thread hands it over, which is
        # up to a minute later at the start. Its `_runtime` wandb 0.31 always sets by itself.
        self._rows.put((time.time(), row))

    def close(self, exit_status: int) -> None:
        self._rows.put(exit_status)
        patience = self._patience if exit_status == 0 else min(self._patience, _FAILED_SECONDS)
        self._thread.join(patience)
        if self._thread.is_alive():
            log.warning("Weights & Biases did not finish within %d s; metrics.jsonl is complete", patience)
