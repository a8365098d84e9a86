"""From step results to rows of metrics. Time and data are counted always, the device is asked only to log."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from trainer.engine import Engine, Evaluation, StepResult
from trainer.model import ModelCost, peak_flops
from trainer.progress import Progress
from trainer.tracking.interface import Row

T = TypeVar("T")


def memory_bytes_max(device: torch.device) -> int:
    """The most memory this rank has held: on a GPU allocated by torch, on a CPU resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Meter:
    """Counts what has passed since the last logged step, and in all."""

    engine: Engine
    device: torch.device
    devices: int
    cost: ModelCost
    length: int
    """Tokens of a sequence; attention's FLOPs depend on it."""

    attempt: int
    progress: Progress = field(default_factory=Progress)
    """Of the run; the training loop advances it."""

    def __post_init__(self) -> None:
        self._peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        self._wait = self._paused = 0.0
        self._steps = self._tokens_since = 0
        self._since = time.perf_counter()

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """`batches`, with the time spent waiting for each counted."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._wait += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, tokens: int) -> None:
        """Count a step on a global batch of this many tokens."""
        self._steps += 1
        self._tokens_since += tokens

    def pause(self, seconds: float) -> None:
        """Time that does not count as training: evaluation, saving."""
        self._paused += seconds

    def train_row(self, step: int, epoch: float, result: StepResult, step_tokens: int) -> Row:
        """The row of a logged step; the only place where the host waits for the device."""
        norm = None if result.grad_norm is None else float(result.grad_norm)
        local_values: list[Tensor | float] = [
            result.loss_sum,
            result.auxiliary_sum,
            float(result.micro_batches),
            float(memory_bytes_max(self.device)),
            self._wait / self._steps,
            0.0 if result.idle_share is None else result.idle_share(),
        ]
        values_by_rank = self.engine.all_gather_scalars(local_values)
        seconds = (time.perf_counter() - self._since - self._paused) / self._steps
        per_second = self._tokens_since / self._steps / seconds
        auxiliary = sum(r[1] for r in values_by_rank) / sum(r[2] for r in values_by_rank)
        row: Row = {
            "step": step,
            "split": "train",
            "attempt": self.attempt,
            "epoch": epoch,
            "tokens": self.progress.tokens,
            "samples": self.progress.samples,
            "loss": sum(r[0] for r in values_by_rank) / step_tokens,
            "grad_norm": norm,
            "learning_rate": result.learning_rate,
            "step_seconds": seconds,
            "tokens_per_second": per_second,
            "tokens_per_second_per_device": per_second / self.devices,
            "mfu": self._mfu(per_second),
            "memory_bytes_max": int(max(r[3] for r in values_by_rank)),
            "data_wait_seconds": max(r[4] for r in values_by_rank),
        }
        if auxiliary:
            row["auxiliary_loss"] = auxiliary
        if result.idle_share is not None:
            row["pipeline_bubble"] = sum(r[5] for r in values_by_rank) / len(values_by_rank)
        self._wait = self._paused = 0.0
        self._steps = self._tokens_since = 0
        self._since = time.perf_counter()
        return row

    def _mfu(self, tokens_per_second: float) -> float | None:
        if self._peak is None:
            return None
        return tokens_per_second * self.cost.flops_per_token(self.length) / (self._peak * self.devices)

    def validation_row(self, step: int, evaluation: Evaluation) -> Row:
        return {
            "step": step,
            "split": "validation",
            "attempt": self.attempt,
            "loss": evaluation.loss,
            **evaluation.metrics,
            "tokens": evaluation.tokens,
        }
