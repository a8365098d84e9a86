"""The console: a progress bar on a terminal, plain lines otherwise; both show the time left."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from trainer.tracking.interface import Row, TrackerContext
from trainer.units import format_duration

log = logging.getLogger(__name__)

_VALIDATION_KEYS = ("step", "split", "attempt", "loss", "tokens")
"""Keys of every validation row; the others are the metrics of the task."""


def open_console(context: TrackerContext) -> Console:
    """Start logging to the console; it is always enabled."""
    return Console(context.loaded.steps)


class _Elapsed(ProgressColumn):
    """Time since the start; rich's own column switches to days after one day."""

    def render(self, task: Task) -> Text:
        return Text(format_duration(task.elapsed or 0), style="progress.elapsed")


class Console:
    """Shows every logged row."""

    def __init__(self, steps: int) -> None:
        """Start the progress bar on a terminal.

        Args:
            steps: Steps of the whole run.
        """
        self._steps = steps
        self._progress: Progress | None = None
        if sys.stdout.isatty():
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                _Elapsed(),
                TextColumn("left {task.fields[left]}", style="progress.remaining"),
            )
            self._progress = Progress(*columns, console=RichConsole(file=sys.stdout))
            self._task = self._progress.add_task("training", total=steps, left="-:--:--")
            self._progress.start()

    def log(self, row: Row) -> None:
        """Log one line, and advance the bar."""
        line = describe(row, self._steps)
        if row["split"] == "train":
            # From the time of a step: the bar's own speed counts only the steps since this attempt resumed.
            left = format_duration(row["step_seconds"] * (self._steps - row["step"]))
            if self._progress is not None:
                self._progress.update(self._task, completed=row["step"], left=left)
            else:
                line += f"  left {left}"
        log.info(line)

    def state(self) -> Mapping[str, str]:
        """Return no state."""
        return {}

    def close(self, exit_status: int) -> None:
        """Stop the progress bar."""
        if self._progress is not None:
            self._progress.stop()


def describe(row: Row, steps: int) -> str:
    """Return one line for a row of metrics."""
    if row["split"] == "validation":
        metrics = [f"{name} {value:,.2f}" for name, value in row.items() if name not in _VALIDATION_KEYS]
        return "  ".join([f"step {row['step']}/{steps}", f"validation loss {row['loss']:.4f}", *metrics])
    norm = "-" if row["grad_norm"] is None else f"{row['grad_norm']:.3f}"
    data_wait = 100 * row["data_wait_seconds"] / max(row["step_seconds"], 1e-9)
    parts = [
        f"step {row['step']}/{steps}",
        f"loss {row['loss']:.4f}",
        f"grad norm {norm}",
        f"lr {row['learning_rate']:.2e}",
        f"{_format_rate(row['tokens_per_second'])} tokens/s",
        *([f"MFU {100 * row['mfu']:.1f} %"] if row["mfu"] is not None else []),
        f"memory {row['memory_bytes_max'] / 1e9:.2f} GB",
        f"data wait {data_wait:.1f} %",
    ]
    if "auxiliary_loss" in row:
        parts.insert(2, f"auxiliary {row['auxiliary_loss']:.4f}")
    return "  ".join(parts)


def _format_rate(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"
