"""The engine over DeepSpeed's pipeline engine: stages, with data and tensor parallelism and ZeRO 0 or 1.

DeepSpeed runs the schedule (1F1B), sends and receives, reduces and steps. Every stage reads the micro-batches itself,
since they are a function of the step: so only activations cross a boundary, and a label can meet no other
micro-batch's activations. What DeepSpeed's instructions would get wrong for such stages is replaced below.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.dualpipev import DualPipeVEngine, DualPipeVModule
from deepspeed.runtime.pipe.engine import PipelineEngine as DeepSpeedPipeline
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.data.batches import IGNORED, MicroBatch, StepBatch
from trainer.distributed import World
from trainer.engine.base import BaseEngine
from trainer.engine.interface import Evaluation, StepResult
from trainer.engine.optimization import Optimization
from trainer.model import TaskLoss
from trainer.pipeline import BoundaryTensors, Stage, StageAssignment, local_parameters, shared_parameters
from trainer.sharding import all_parameters, counts, shard_of
from trainer.tensor_parallel import Mapper

EVALUATED_TOGETHER = 4
"""Micro-batches for each stage that are evaluated in one schedule: enough that the pipeline is mostly full."""


class StageModule(nn.Module):
    """What DeepSpeed sees of a stage: from what is received to what is sent, micro-batch after micro-batch."""

    def __init__(self, task: nn.Module, stage: Stage, mapper: Mapper, device: torch.device) -> None:
        super().__init__()
        self.task, self.mapper = task, mapper
        self._stage, self._device = stage, device
        self._waiting: deque[MicroBatch] = deque()
        self._weights = (0.0, 0.0)
        self._verifies = True
        """Until the first backward pass is through."""

        self.loss_sum = self.auxiliary_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.first_token_losses: Tensor | None = None
        """Of the schedule's first micro-batch, where the loss is computed."""

    @property
    def model(self) -> nn.Module:
        """The Hugging Face model, of which this stage's layers compute."""
        model: nn.Module = self.task.model  # type: ignore[assignment]
        return model

    def feed(self, micro_batches: Iterable[MicroBatch], weight: float = 0.0, auxiliary_weight: float = 0.0) -> None:
        """Gives the micro-batches of the next schedule, and what their objective and auxiliary loss are weighted by."""
        assert not self._waiting, "a schedule has not computed all of its micro-batches"
        self._waiting.extend(micro_batches)
        self._weights = weight, auxiliary_weight
        self.loss_sum = self.auxiliary_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        self.first_token_losses = None

    def forward(self, received: BoundaryTensors | Tensor) -> BoundaryTensors | Tensor:
        micro = self._waiting.popleft().to(self._device)

        def compute() -> TaskLoss:
            loss: TaskLoss = self.task(micro.input_ids_BT, micro.labels_BT, attention_mask_BT=micro.attention_mask_BT)
            return loss

        result = self._stage.run(compute, received if isinstance(received, tuple) else (received,))
        if not isinstance(result, TaskLoss):
            self.mapper.leave(self._device)
            return result[0] if len(result) == 1 else result
        self.loss_sum = self.loss_sum + result.loss_sum.detach()
        self.auxiliary_sum = self.auxiliary_sum + result.auxiliary.detach()
        if self.first_token_losses is None:
            self.first_token_losses = result.token_losses_BT
        weight, auxiliary_weight = self._weights
        return result.objective * weight + result.auxiliary * auxiliary_weight

    def verify_gradients(self) -> None:
        """After the stage's first backward pass; see `Mapper.verify_gradients`."""
        if self._verifies:
            self.mapper.verify_gradients()
            self._verifies = False


def _on_another_rank(received: Any) -> Any:
    raise AssertionError("a rank was asked to compute another one's stage")


class PipelineEngine(BaseEngine):
    """Every rank holds one stage or two, or its tensor rank's part of them."""

    def __init__(
        self, engine: DeepSpeedPipeline, world: World, clipping: float | None, stages: list[StageModule],
        parameter_ranks: dict[str, tuple[int, ...]],
    ) -> None:  # fmt: skip
        two_ways = isinstance(engine, DualPipeVEngine)
        loss_stage = 0 if two_ways else world.topology.pipeline - 1
        super().__init__(engine, world, stages[0].mapper, clipping, loss_stage=loss_stage)
        self._stages, self._parameter_ranks = stages, parameter_ranks
        self._counted = [p for p in self._parameters if counts(p) and not getattr(p, "ds_pipe_replicated", False)]
        self._own_norm: Tensor | None = None
        self._verify_as: int | None = None
        self._clock = _Clock(world.device, world.phases.advance)
        self._least = 2 * world.topology.pipeline if two_ways else 1
        """Micro-batches that a schedule takes at least."""

        theirs = type(engine)._INSTRUCTION_MAP
        backward = _backward_two_ways if two_ways else _backward
        engine._INSTRUCTION_MAP = theirs | {
            schedule.LoadMicroBatch: _load_micro_batch,
            schedule.ForwardPass: self._clock.timed(theirs[schedule.ForwardPass]),
            schedule.BackwardPass: self._clock.timed(self._verifying(backward)),
            schedule.SendGrad: _completing(theirs[schedule.SendGrad]),
            schedule.ReduceTiedGrads: self._reduce_shared,
            schedule.OptimizerStep: self._step,
        }

    @property
    def models(self) -> list[nn.Module]:
        """The Hugging Face model of each of this rank's stages."""
        return [stage.model for stage in self._stages]

    @property
    def shared_by_stages(self) -> Mapping[str, tuple[int, ...]]:
        """See `BaseEngine.shared_by_stages`."""
        return self._parameter_ranks

    def _verifying(self, backward: Callable[..., None]) -> Callable[..., None]:
        def executes(engine: Any, buffer_id: int, phase: int = 0) -> None:
            backward(engine, buffer_id, **({"phase": phase} if len(self._stages) > 1 else {}))
            self._stages[phase].verify_gradients()

        return executes

    def _reduce_shared(self, engine: Any) -> None:
        """The schedule is through. Sums the gradients of weights that several ranks hold, wherever DeepSpeed keeps
        them: its own way knows only those that are accumulated in the weights' type."""
        self._clock.end()
        for weight, group in engine.module.shared:
            if engine.using_bf16_optimizer:
                gradient = weight._hp_grad
            elif hasattr(engine.optimizer, "get_gradient_for_reduction"):
                gradient = engine.optimizer.get_gradient_for_reduction(weight)
            else:
                gradient = weight.grad
            assert gradient is not None, "a weight that several stages hold has no gradient"
            dist.all_reduce(gradient, group=group)

    def _step(self, engine: Any, lr_kwargs: Any = None) -> None:
        if self._clipping is not None:
            self._own_norm = self._clip(self._clipping)
        if self._verify_as is not None:
            self._replicas.verify_before_update(self._verify_as)
        DeepSpeedPipeline._exec_optimizer_step(engine, lr_kwargs)
        if self._verify_as is not None:
            self._replicas.verify(self._verify_as)

    def train_step(self, batch: StepBatch, *, verify_as: int | None = None) -> StepResult:
        """See `Engine.train_step`."""
        rate = self._rate()
        if self._verifies:
            self._refuse_different_samples(batch.micro_batches[0])
            self._verifies = False
        count = len(batch.micro_batches)
        for stage in self._stages:
            # DeepSpeed divides what the last stage returns by the number of micro-batches.
            stage.feed(batch.micro_batches, count * self._world.topology.data / batch.tokens, 1.0)
        self._verify_as = verify_as
        self._clock.begin()
        self._engine.train_batch(iter(()))
        self._engine.timers("train_batch").reset()  # else it keeps two events a step for ever
        sums = self._stages[-1].loss_sum, self._stages[-1].auxiliary_sum
        return self._result(sums, self._own_norm, rate, count, self._clock.idle_share)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> Evaluation:
        """See `Engine.evaluate`."""
        loss_sum, tokens = torch.zeros((), dtype=torch.float64, device=self._world.device), 0
        waiting, count = iter(batches), EVALUATED_TOGETHER * self._world.topology.pipeline
        with self._any_shape():
            while together := tuple(islice(waiting, count)):
                tokens += sum(int((micro.labels_BT != IGNORED).sum()) for micro in together)
                self._run_forward(together)
                loss_sum = loss_sum + self._stages[-1].loss_sum
        return self._evaluation(loss_sum, tokens)

    @torch.no_grad()
    def token_losses(self, micro_batch: MicroBatch) -> Tensor | None:
        """See `Engine.token_losses`."""
        with self._any_shape():
            self._run_forward((micro_batch,))
        return self._stages[-1].first_token_losses

    @contextlib.contextmanager
    def _any_shape(self) -> Iterator[None]:
        """Evaluation: micro-batches may have other shapes than in training, and a schedule another number of them."""
        engine = self._engine
        before, engine.dynamic_shape = (engine.dynamic_shape, engine.micro_batches), True
        yield
        engine.dynamic_shape, engine.micro_batches = before
        engine.reset_activation_shape()
        engine.train()

    def _run_forward(self, together: tuple[MicroBatch, ...]) -> None:
        """Computes the losses of micro-batches in one schedule without a backward pass; the stages keep them."""
        engine = self._engine
        engine.reset_activation_shape()
        if self._least > 1:
            together = _alike(together, self._least)
        for stage in self._stages:
            stage.feed(together)
        engine.micro_batches = len(together)  # DualPipeV's buffers are counted by it, also in evaluation
        engine.eval_batch(
            iter(()), compute_loss=False, reduce_output=None, bcast_loss=False, num_micro_batches=len(together)
        )

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.whole_weights`. Of several ranks of the pipeline that hold a weight the first gives it."""
        place = self._world.topology
        ranks, group = place.group("pipeline"), self._world.groups["pipeline"]
        pieces = local_parameters(self.models)
        dtype = next(iter(self._engine.module.parameters())).dtype
        for name, shape in self._names():
            giver = self._parameter_ranks[name][0]
            if place.stage == giver:
                given = [w for part, shard in pieces[name] for _, w in self._joiner.add(name, part.detach(), shard)]
                whole = given[-1].contiguous()
            else:
                whole = torch.empty(shape, dtype=dtype, device=self._world.device)
            dist.broadcast(whole, ranks[giver], group=group)
            yield name, whole
        yield from self._persistent_buffers()

    def _names(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every parameter's first name and whole shape, in the same order on all ranks."""
        seen = set()
        for name, parameter in all_parameters(self.models[0]):
            shard = shard_of(parameter)
            first = name if shard is None else shard.name
            if first in self._parameter_ranks and first not in seen:
                seen.add(first)
                yield first, tuple(parameter.shape) if shard is None else shard.whole_shape


class _Clock:
    """How long a rank computes of the time that a step's schedule takes."""

    def __init__(self, device: torch.device, advance: Callable[[], None]) -> None:
        """Args:
        advance: called before each pass of a micro-batch.
        """
        self._on_gpu, self._advance = device.type == "cuda", advance
        self._marks: list[Any] = []
        self._whole: list[Any] = []

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def timed(self, execute: Callable[..., None]) -> Callable[..., None]:
        """The instruction, with its time counted as work."""

        def executes(engine: Any, **kwargs: Any) -> None:
            self._advance()
            began = self._now()
            execute(engine, **kwargs)
            if len(self._whole) == 1:  # in training
                self._marks.append((began, self._now()))

        return executes

    def begin(self) -> None:
        self._marks, self._whole = [], [self._now()]

    def end(self) -> None:
        self._whole.append(self._now())

    def idle_share(self) -> float:
        """Share of the last schedule's time, up to the reduction of gradients, in which this rank did not compute. On a
        GPU it waits for the step's end."""
        if self._on_gpu:
            torch.cuda.synchronize()
        whole = self._between(*self._whole)
        return 1 - sum(self._between(began, ended) for began, ended in self._marks) / whole

    def _between(self, began: Any, ended: Any) -> float:
        return float(began.elapsed_time(ended)) if self._on_gpu else float(ended - began)


def _load_micro_batch(engine: Any, buffer_id: int) -> None:
    """The stages have their micro-batches; the first one receives nothing."""
    if engine.stage_id == 0:
        engine.pipe_buffers["inputs"][buffer_id] = ()


def _backward(engine: Any, buffer_id: int) -> None:
    """As DeepSpeed's, but all that was sent goes backward at once."""
    outputs = engine.pipe_buffers["outputs"][buffer_id]
    if engine.is_last_stage() or isinstance(outputs, Tensor):
        DeepSpeedPipeline._exec_backward_pass(engine, buffer_id)
        return
    if engine.using_bf16_optimizer:
        engine.optimizer.clear_lp_grads()
    engine._running_engine_backward = True
    try:
        real = tuple(tensor for tensor in outputs if tensor.is_floating_point())
        torch.autograd.backward(real, tuple(engine.grad_layer))
    finally:
        engine._running_engine_backward = False
    if engine.using_bf16_optimizer and not engine._config.bfloat16_config.immediate_grad_update:
        engine.optimizer.update_hp_grads(clear_lp_grads=False)
    engine.pipe_buffers["output_tensors"][buffer_id] = None
    engine.pipe_buffers["outputs"][buffer_id] = None


def _complete(received: Any) -> None:
    """Gives what was received, and nothing has used, a gradient of zero: its sender waits for one."""
    for tensor in received if isinstance(received, tuple) else (received,):
        if tensor.is_floating_point() and tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)


def _completing(send: Callable[..., None]) -> Callable[..., None]:
    def executes(engine: Any, buffer_id: int, **kwargs: Any) -> None:
        _complete(engine.pipe_buffers["inputs"][buffer_id])
        send(engine, buffer_id, **kwargs)

    return executes


def _backward_two_ways(engine: Any, buffer_id: int, phase: int) -> None:
    """The same for DualPipeV; on the last rank the way out receives its gradients from the way back."""
    buffers, turned = engine.pipe_buffers, engine._is_last_rank() and phase == 0
    if turned:
        _complete(buffers["inputs"][engine._phase1_buffer(buffer_id)])
    if engine._is_loss_stage(phase) or isinstance(buffers["outputs"][buffer_id], Tensor):
        DualPipeVEngine._exec_backward_pass(engine, buffer_id, phase)
        return
    key, slot = ("inputs", engine._phase1_buffer(buffer_id)) if turned else ("grads", buffer_id)
    received, buffers[key][slot] = buffers[key][slot], None
    engine.grad_layer = [t.grad for t in received if t.is_floating_point()] if turned else received
    with engine._phase(phase):
        _backward(engine, buffer_id)
    if engine.stage_id == 0 and phase == 0:
        buffers["inputs"][buffer_id] = None


def _alike(micro_batches: Sequence[MicroBatch], least: int) -> tuple[MicroBatch, ...]:
    """The same micro-batches in one shape, with others that predict nothing until there are `least`."""
    rows = max(micro.input_ids_BT.shape[0] for micro in micro_batches)
    width = max(micro.input_ids_BT.shape[1] for micro in micro_batches)

    def filled(tensor: Tensor, value: int) -> Tensor:
        return F.pad(tensor, (0, width - tensor.shape[1], 0, rows - tensor.shape[0]), value=value)

    alike = [
        MicroBatch(
            filled(micro.input_ids_BT, 0),
            filled(micro.labels_BT, IGNORED),
            None if micro.attention_mask_BT is None else filled(micro.attention_mask_BT, 1),
        )
        for micro in micro_batches
    ]
    empty = replace(alike[0], labels_BT=torch.full_like(alike[0].labels_BT, IGNORED))
    return (*alike, *[empty] * (least - len(alike)))


def start_pipeline(
    stages: list[StageModule],
    assignment: StageAssignment,
    parameter_ranks: dict[str, tuple[int, ...]],
    settings: dict[str, Any],
    optimization: Optimization,
    world: World,
    clipping: float | None,
    *,
    even: bool,
) -> PipelineEngine:
    """Hands complete stages to DeepSpeed.

    Args:
        stages: of this rank. parameter_ranks: ranks of the pipeline that hold each weight.
        even: whether all micro-batches have the same shape.
    """
    place = world.topology
    own = dict(zip(assignment.stages_of_rank(place.stage), stages, strict=True))
    models = [stage.model for stage in stages]
    with contextlib.redirect_stdout(io.StringIO()):
        module = (PipelineModule if len(own) == 1 else DualPipeVModule)(
            layers=[own.get(stage, _on_another_rank) for stage in range(assignment.stages)],
            topology=PipeModelDataParallelTopology(place.pipeline, place.tensor, place.data),
            partition_method="uniform",
            dynamic_shape=not even,
        )
    module.shared = list(shared_parameters(models, parameter_ranks, world))
    for name, pieces in local_parameters(models).items():
        for parameter, _ in pieces:  # DeepSpeed's flag for "another rank counts it in the norm"
            parameter.ds_pipe_replicated = place.stage != parameter_ranks[name][0]  # type: ignore[attr-defined]
    # Each tensor rank sends its own copy, or under sequence parallelism its stretch: DeepSpeed's way of sending a part
    # and gathering it knows only records of one tensor, all of the same shape.
    parts = {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False}}
    engine = optimization.initialize(module, models, settings | parts)
    return PipelineEngine(engine, world, clipping, stages, parameter_ranks)
