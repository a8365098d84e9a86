"""Rows of metrics from step results. Time and data are measured at every step, the device is read only to log."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import TypeVar

import torch
from torch import Tensor

from trainer.engine import Engine, Evaluation, StepResult
from trainer.model import ModelCost, peak_flops
from trainer.progress import Progress
from trainer.tracking.interface import Row

T = TypeVar("T")


@dataclass
class Meter:
    """Measures time, tokens and memory since the last logged step."""

    engine: Engine
    progress: Progress
    """Progress of the run; the training loop advances it."""

    _: KW_ONLY
    device: torch.device
    devices: int
    """Of all ranks."""

    cost: ModelCost
    sequence_length: int
    """Tokens of a sequence; the FLOPs of attention depend on it."""

    attempt: int

    def __post_init__(self) -> None:
        self._peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        self._reset()

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield `batches`, and measure the time spent waiting for each."""
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
        self._tokens += tokens

    def pause(self, seconds: float) -> None:
        """Exclude time that is not training, such as evaluation and saving."""
        self._paused += seconds

    def train_row(self, step: int, epoch: float, result: StepResult, step_tokens: int) -> Row:
        """Return the row of a logged step. Collective: all ranks must call it.

        This is the only place where the host waits for the device.

        Args:
            step: Number of the step.
            epoch: Epochs after the step.
            result: Result of the step.
            step_tokens: Tokens of the step's global batch.
        """
        norm = None if result.grad_norm is None else float(result.grad_norm)
        local_values: list[Tensor | float] = [
            result.loss_sum,
            result.auxiliary_sum,
            float(result.micro_batches),
            float(memory_bytes_max(self.device)),
            self._wait / self._steps,
            0.0 if result.idle_share is None else result.idle_share(),
        ]
        ranks = self.engine.all_gather_scalars(local_values)
        losses, auxiliaries, micro_batches, memory, waits, idle = zip(*ranks, strict=True)
        seconds = (time.perf_counter() - self._start - self._paused) / self._steps
        per_second = self._tokens / self._steps / seconds
        row: Row = {
            "step": step,
            "split": "train",
            "attempt": self.attempt,
            "epoch": epoch,
            "tokens": self.progress.tokens,
            "samples": self.progress.samples,
            "loss": sum(losses) / step_tokens,
            "grad_norm": norm,
            "learning_rate": result.learning_rate,
            "step_seconds": seconds,
            "tokens_per_second": per_second,
            "tokens_per_second_per_device": per_second / self.devices,
            "mfu": self._mfu(per_second),
            "memory_bytes_max": int(max(memory)),
            "data_wait_seconds": max(waits),
        }
        if auxiliary := sum(auxiliaries) / sum(micro_batches):
            row["auxiliary_loss"] = auxiliary
        if result.idle_share is not None:
            row["pipeline_bubble"] = sum(idle) / len(idle)
        self._reset()
        return row

    def validation_row(self, step: int, evaluation: Evaluation) -> Row:
        """Return the row of an evaluation after `step`."""
        return {
            "step": step,
            "split": "validation",
            "attempt": self.attempt,
            "loss": evaluation.loss,
            **evaluation.metrics,
            "tokens": evaluation.tokens,
        }

    def _reset(self) -> None:
        self._wait = self._paused = 0.0
        self._steps = self._tokens = 0
        self._start = time.perf_counter()

    def _mfu(self, tokens_per_second: float) -> float | None:
        """Return the model FLOPs utilization; None on a device of unknown peak."""
        if self._peak is None:
            return None
        return tokens_per_second * self.cost.flops_per_token(self.sequence_length) / (self._peak * self.devices)


def memory_bytes_max(device: torch.device) -> int:
    """Return the peak memory of this rank in bytes: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
