"""Agreement of all ranks on the last step before a stop, without a collective."""

from __future__ import annotations

import contextlib
from datetime import timedelta

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
    """The stop request of all ranks: which step is the last, agreed on through their store.

    Each rank calls `before_step(n)` before it enters step n, and `stops_after(n)` after it. A rank with a stop request
    writes the last step to the store in `before_step`, unless another rank has done so; all ranks read it in
    `stops_after`.

    Why all ranks stop after the same step: no rank completes step n before every rank has entered it, because the
    result of a step depends on the contribution of every rank:

    - data ranks need each other's gradients: an all-reduce or reduce-scatter of them, under ZeRO also an all-gather of
      the updated weights, under ZeRO 3 already in the forward pass. This happens at least once a step, however many
      micro-batches are accumulated;
    - tensor ranks reduce in every layer, and in the gradient norm;
    - the last pipeline stage needs the activations of all earlier stages, the first one the gradients of all later
      stages, the others both; all stages reduce the gradient norm;
    - across axes: a data group completes only when the tensor and pipeline groups of all of its ranks have contributed.

    CPU: `before_step(n)` writes n. A rank that calls `stops_after(n)` has completed step n, so the writer had entered
    it, and had written before: every rank reads n in `stops_after(n)`, and none is past it. Two ranks that write, in
    `before_step(n)` and `before_step(m)`, write the same: if m > n, the second rank would have read n in
    `stops_after(n)`.

    GPU: the host runs ahead of the device. `before_step(n)` writes n + 1, and `stops_after(n)` waits until the device
    has completed step n - 1, while it has step n to work on. A rank that calls `stops_after(n + 1)` has waited for step
    n on its device, so the writer's device had begun step n, its host had entered it, and had written before. Two ranks
    may write different values; the store keeps the first one, and the argument holds for its writer.

    Evaluation, saving and logging between two steps happen after the same steps on all ranks, and only add points at
    which ranks wait for each other. `stops_after(n)` is called before them and returns the same on all ranks, so that
    all skip the evaluation after the last step.
    """

    def __init__(
        self,
        requests: StopRequests,
        world: World,
        directory: RunDirectory,
        *,
        final_step: int,
        lock: RunLock | None = None,
    ) -> None:
        """Agree through the store of `world`.

        Args:
            requests: Stop requests of this rank.
            world: The joined world.
            directory: The run directory, numbered for this attempt.
            final_step: Last step of the run, after which no stop is necessary.
            lock: Lock of the directory, which shows other starts that this run is stopping.
        """
        self._lock = lock or RunLock()
        self._requests, self._store, self._directory = requests, world.store, directory
        self._rank, self._world_size = world.full_topology.rank, world.full_topology.world_size
        self._final_step = final_step
        self._steps_ahead = 1 if world.device.type == "cuda" else 0
        self._events: list[torch.cuda.Event] = []
        self._has_written = False

    def before_step(self, step: int) -> None:
        """Write this step (on a GPU the next one) as the last step, if this rank has a stop request."""
        self._requests.begin_training()
        request = self._requests.request
        if request is not None and not self._has_written:
            rank = f" (rank {self._rank})" if self._world_size > 1 else ""
            self._store.compare_set(_LAST_STEP, "", f"{step + self._steps_ahead} {request.cause}{rank}")
            self._has_written = True

    def stops_after(self, step: int) -> bool:
        """Return True if all ranks stop after this step, which is not the final one.

        Collective: all ranks must call it after every step.
        """
        if self._steps_ahead:
            self._wait_for_previous_step()
        is_last = step < self._final_step and self._store.check([_LAST_STEP]) and self._read_agreement()[0] == step
        if is_last:
            self._lock.mark_stopping()
        return is_last

    def _wait_for_previous_step(self) -> None:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)
        if len(self._events) > self._steps_ahead:
            self._events.pop(0).synchronize()

    def _read_agreement(self) -> tuple[int, str]:
        """Read the last step, and the cause of the stop request."""
        step, _, cause = self._store.get(_LAST_STEP).decode().partition(" ")
        return int(step), cause

    def preemption_error(self, step: int) -> Preempted:
        """Record the stop, and return the error to raise. Collective: all ranks must call it.

        Rank 0 records the event and returns when the other ranks have read it. They wait for the record, because a
        launcher kills rank 0 as soon as one of them exits.
        """
        if self._rank:
            with contextlib.suppress(RuntimeError):  # rank 0, which hosts the store, has exited already
                receive_value(self._store, self._rank, _RECORDED, purpose="record the stop", timeout=_RECORD_TIMEOUT)
            return Preempted(f"stopped after step {step}")
        _, cause = self._read_agreement()
        self._directory.record("preempted", step, cause=cause)
        purpose = "read that the stop is recorded"
        publish_value(self._store, self._world_size, _RECORDED, "", purpose=purpose, timeout=_READ_TIMEOUT)
        return Preempted(f"stopped after step {step}: {cause}. The state is saved: start the same command again")
