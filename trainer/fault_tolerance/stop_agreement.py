"""All ranks stop after the same step, whichever of them is asked to, and without a collective."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any

import torch

from trainer.distributed import World, publish_value, receive_value
from trainer.errors import Preempted
from trainer.fault_tolerance.run_lock import RunLock
from trainer.fault_tolerance.stop_requests import StopRequests
from trainer.run_directory import RunDirectory

_LAST_STEP = "stop/last_step"
_RECORDED = "stop/recorded"
_RECORD_TIMEOUT = timedelta(seconds=10)
_READ_TIMEOUT = timedelta(seconds=5)


class StopAgreement:
    """Which step is the last, as all ranks will find it in their store.

    Each rank calls `announce(n)` before it enters step n, and `is_due(n)` after it. A rank with a stop request writes
    the last step to the store in `announce`, unless another rank has; every rank reads it in `is_due`.

    Why all ranks stop after the same step. No rank completes step n before every rank has entered it, because what a
    rank computes in a step depends on every other rank's part of it:

    - data ranks need each other's gradients: an all-reduce or reduce-scatter of them, under ZeRO also an all-gather of
      the weights that the others update, under ZeRO 3 already in the forward pass. However many micro-batches are
      accumulated, this happens at least once a step;
    - tensor ranks sum in every layer, and in the gradient's norm;
    - the last stage of a pipeline needs the activations of all earlier ones, the first one the gradients of all later
      ones, and those between need both; all are joined in the gradient's norm;
    - across axes: a rank's data group completes only when each member has had its own tensor and pipeline groups' part.

    CPU: `announce(n)` writes n. A rank that calls `is_due(n)` has completed step n, so the writer had entered it, and
    had written before that: every rank finds n in `is_due(n)`, and none is past it. Two ranks that write, in
    `announce(n)` and `announce(m)`, write the same: were m > n, the second would have found n in `is_due(n)`.

    GPU: the host is ahead of the device. `announce(n)` writes n + 1, and `is_due(n)` waits until the device has
    completed step n - 1; it has step n to work on meanwhile. A rank that calls `is_due(n + 1)` has waited for step n on
    its device, so the writer's device had begun step n, its host had entered it, and had written before that. Two ranks
    may write different values; the store keeps the first, and what was said of its writer holds.

    Evaluations, saves and logging between two steps are done by all ranks after the same steps, and only add points
    at which they wait for each other. `is_due(n)` is called before them and gives all ranks the same answer, so that
    all leave out the evaluation after the last step.
    """

    def __init__(
        self, requests: StopRequests, world: World, directory: RunDirectory, final_step: int,
        lock: RunLock | None = None,
    ) -> None:  # fmt: skip
        """Args:
        directory: of this attempt. final_step: after which the run has finished anyway.
        lock: of the directory; it tells other starts that this run is stopping.
        """
        self._lock = lock or RunLock()
        self._requests, self._store, self._directory = requests, world.store, directory
        self._rank, self._ranks = world.full_topology.rank, world.full_topology.world_size
        self._final_step = final_step
        self._steps_ahead = 1 if world.device.type == "cuda" else 0
        self._events: list[Any] = []
        self._is_announced = False

    def announce(self, step: int) -> None:
        """Before a step is entered: make it, or on a GPU the one after it, the last one if this rank is to stop."""
        self._requests.begin_training()
        if self._requests.request is not None and not self._is_announced:
            rank = f" (rank {self._rank})" if self._ranks > 1 else ""
            value = f"{step + self._steps_ahead} {self._requests.request.cause}{rank}"
            self._store.compare_set(_LAST_STEP, "", value)
            self._is_announced = True

    def is_due(self, step: int) -> bool:
        """Whether all ranks stop after this step, which has been entered; not after the final one, which needs no stop.

        The same on all ranks, which all must call it after every step.
        """
        if self._steps_ahead:
            self._wait_for_previous_step()
        is_due = step < self._final_step and self._store.check([_LAST_STEP]) and self._read_agreement()[0] == step
        if is_due:
            self._lock.mark_stopping()
        return is_due

    def _wait_for_previous_step(self) -> None:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)
        if len(self._events) > self._steps_ahead:
            self._events.pop(0).synchronize()

    def _read_agreement(self) -> tuple[int, str]:
        """The last step, and the cause of the request."""
        step, _, cause = self._store.get(_LAST_STEP).decode().partition(" ")
        return int(step), cause

    def preemption_error(self, step: int) -> Preempted:
        """The error to raise once the state of `step` is saved. On all ranks; rank 0 records the event, and the others
        wait for it, because a launcher ends rank 0 as soon as one of them has gone. Rank 0 returns once they know."""
        if self._rank:
            with contextlib.suppress(RuntimeError):  # rank 0, which hosts the store, has gone already
                receive_value(self._store, self._rank, _RECORDED, "record the stop", _RECORD_TIMEOUT)
            return Preempted(f"stopped after step {step}")
        _, cause = self._read_agreement()
        self._directory.record("preempted", step, cause=cause)
        publish_value(self._store, self._ranks, _RECORDED, "", "hear that the stop is recorded", _READ_TIMEOUT)
        return Preempted(f"stopped after step {step}: {cause}. The state is saved: start the same command again")
