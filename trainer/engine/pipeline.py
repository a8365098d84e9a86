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
from collections.abc import Callable, Iterable, Iterator, Mapping
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

from trainer.data.batches import StepBatch
from trainer.distributed import World
from trainer.engine.base import BaseEngine, EvaluationSums
from trainer.engine.interface import Evaluation, StepResult
from trainer.engine.optimizer_setup import OptimizerSetup
from trainer.pipeline import BoundaryTensors, Stage, StageAssignment, local_parameters, shared_parameters
from trainer.sharding import is_owned, local_and_remote_parameters, shard_of
from trainer.tasks import MicroBatch, TaskLoss, TaskModule, pad_to_common_shape
from trainer.tensor_parallel import Mapper

EVALUATION_MICRO_BATCHES_PER_STAGE = 4
"""Micro-batches for each stage that are evaluated in one schedule: enough that the pipeline is mostly full."""


class StageModule(nn.Module):
    """What DeepSpeed sees of a stage: from what is received to what is sent, micro-batch after micro-batch."""

    def __init__(self, module: TaskModule, stage: Stage, mapper: Mapper, device: torch.device) -> None:
        super().__init__()
        self.task_module, self.mapper = module, mapper
        self._stage, self._device = stage, device
        self._micro_batches: deque[MicroBatch] = deque()
        self._loss_weights = (0.0, 0.0)
        self._first_backward_pending = True
        """Until the first backward pass is through."""

        self.sums = EvaluationSums(module.task, device)
        self.auxiliary_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.first_target_losses: Tensor | None = None
        """Of the schedule's first micro-batch, where the loss is computed."""

    @property
    def model(self) -> nn.Module:
        """The Hugging Face model, of which this stage's layers compute."""
        return self.task_module.model

    def load_micro_batches(
        self, micro_batches: Iterable[MicroBatch], weight: float = 0.0, auxiliary_weight: float = 0.0
    ) -> None:
        """Gives the micro-batches of the next schedule, and what their objective and auxiliary loss are weighted by."""
        assert not self._micro_batches, "a schedule has not computed all of its micro-batches"
        self._micro_batches.extend(micro_batches)
        self._loss_weights = weight, auxiliary_weight
        self.sums = EvaluationSums(self.task_module.task, self._device)
        self.auxiliary_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        self.first_target_losses = None

    def forward(self, received: BoundaryTensors | Tensor) -> BoundaryTensors | Tensor:
        micro = self._micro_batches.popleft().to(self._device)

        def compute() -> TaskLoss:
            loss: TaskLoss = self.task_module(micro.labels, **micro.inputs)
            return loss

        result = self._stage.run(compute, received if isinstance(received, tuple) else (received,))
        if not isinstance(result, TaskLoss):
            self.mapper.end_forward(self._device)
            return result[0] if len(result) == 1 else result
        self.sums.add(result.loss_sum.detach(), result.extra)
        self.auxiliary_sum = self.auxiliary_sum + result.auxiliary.detach()
        if self.first_target_losses is None:
            self.first_target_losses = result.target_losses
        weight, auxiliary_weight = self._loss_weights
        return result.objective * weight + result.auxiliary * auxiliary_weight

    def verify_gradients(self) -> None:
        """After the stage's first backward pass; see `Mapper.verify_gradients`."""
        if self._first_backward_pending:
            self.mapper.verify_gradients()
            self._first_backward_pending = False


def _remote_stage(received: Any) -> Any:
    raise AssertionError("a rank was asked to compute another one's stage")


class PipelineEngine(BaseEngine):
    """Every rank holds one stage or two, or its tensor rank's part of them."""

    def __init__(
        self, engine: DeepSpeedPipeline, world: World, max_grad_norm: float | None, stages: list[StageModule],
        parameter_ranks: dict[str, tuple[int, ...]],
    ) -> None:  # fmt: skip
        is_dualpipev = isinstance(engine, DualPipeVEngine)
        loss_stage = 0 if is_dualpipev else world.topology.pipeline - 1
        task = stages[0].task_module.task
        super().__init__(engine, world, stages[0].mapper, max_grad_norm, task=task, loss_stage=loss_stage)
        self._stages, self._parameter_ranks = stages, parameter_ranks
        self._norm_parameters = [
            p for p in self._parameters if is_owned(p) and not getattr(p, "ds_pipe_replicated", False)
        ]
        self._grad_norm: Tensor | None = None
        self._verify_step: int | None = None
        self._clock = _ScheduleClock(world.device, world.phases.advance)
        self._min_micro_batches = 2 * world.topology.pipeline if is_dualpipev else 1
        """Micro-batches that a schedule takes at least."""

        instructions = type(engine)._INSTRUCTION_MAP
        backward = _backward_dualpipev if is_dualpipev else _backward
        engine._INSTRUCTION_MAP = instructions | {
            schedule.LoadMicroBatch: _load_micro_batch,
            schedule.ForwardPass: self._clock.timed(instructions[schedule.ForwardPass]),
            schedule.BackwardPass: self._clock.timed(self._verifying(backward)),
            schedule.SendGrad: _with_missing_gradients_zeroed(instructions[schedule.SendGrad]),
            schedule.ReduceTiedGrads: self._reduce_shared_gradients,
            schedule.OptimizerStep: self._optimizer_step,
        }

    @property
    def models(self) -> list[nn.Module]:
        """The Hugging Face model of each of this rank's stages."""
        return [stage.model for stage in self._stages]

    @property
    def stages_of_shared_weights(self) -> Mapping[str, tuple[int, ...]]:
        """See `BaseEngine.stages_of_shared_weights`."""
        return self._parameter_ranks

    def _verifying(self, backward: Callable[..., None]) -> Callable[..., None]:
        def executes(engine: Any, buffer_id: int, phase: int = 0) -> None:
            backward(engine, buffer_id, **({"phase": phase} if len(self._stages) > 1 else {}))
            self._stages[phase].verify_gradients()

        return executes

    def _reduce_shared_gradients(self, engine: Any) -> None:
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

    def _optimizer_step(self, engine: Any, lr_kwargs: Any = None) -> None:
        if self._max_grad_norm is not None:
            self._grad_norm = self._clip_gradients(self._max_grad_norm)
        if self._verify_step is not None:
            self._replica_verifier.verify_before_update(self._verify_step)
        DeepSpeedPipeline._exec_optimizer_step(engine, lr_kwargs)
        if self._verify_step is not None:
            self._replica_verifier.verify(self._verify_step)

    def train_step(self, batch: StepBatch, *, verify_step: int | None = None) -> StepResult:
        """See `Engine.train_step`."""
        learning_rate = self._learning_rate()
        if self._first_backward_pending:
            self._check_same_samples(batch.micro_batches[0])
            self._first_backward_pending = False
        count = len(batch.micro_batches)
        for stage in self._stages:
            # DeepSpeed divides what the last stage returns by the number of micro-batches.
            stage.load_micro_batches(batch.micro_batches, count * self._world.topology.data / batch.tokens, 1.0)
        self._verify_step = verify_step
        self._clock.begin()
        self._engine.train_batch(iter(()))
        self._engine.timers("train_batch").reset()  # else it keeps two events a step for ever
        sums = self._stages[-1].sums.loss, self._stages[-1].auxiliary_sum
        return self._step_result(sums, self._grad_norm, learning_rate, count, self._clock.idle_share)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> Evaluation:
        """See `Engine.evaluate`."""
        sums = EvaluationSums(self._task, self._world.device)
        remaining, count = iter(batches), EVALUATION_MICRO_BATCHES_PER_STAGE * self._world.topology.pipeline
        with self._dynamic_shapes():
            while micro_batches := tuple(islice(remaining, count)):
                sums.targets += sum(micro.num_targets for micro in micro_batches)
                self._run_forward(micro_batches)
                sums.add(self._stages[-1].sums.loss, self._stages[-1].sums.extra)
        return self._reduce_evaluation(sums)

    @torch.no_grad()
    def target_losses(self, micro_batch: MicroBatch) -> Tensor | None:
        """See `Engine.target_losses`."""
        with self._dynamic_shapes():
            self._run_forward((micro_batch,))
        return self._stages[-1].first_target_losses

    @contextlib.contextmanager
    def _dynamic_shapes(self) -> Iterator[None]:
        """Evaluation: micro-batches may have other shapes than in training, and a schedule another number of them."""
        engine = self._engine
        previous, engine.dynamic_shape = (engine.dynamic_shape, engine.micro_batches), True
        yield
        engine.dynamic_shape, engine.micro_batches = previous
        engine.reset_activation_shape()
        engine.train()

    def _run_forward(self, micro_batches: tuple[MicroBatch, ...]) -> None:
        """Computes the losses of micro-batches in one schedule without a backward pass; the stages keep them."""
        engine = self._engine
        engine.reset_activation_shape()
        if self._min_micro_batches > 1:
            micro_batches = pad_to_common_shape(micro_batches, self._min_micro_batches)
        for stage in self._stages:
            stage.load_micro_batches(micro_batches)
        engine.micro_batches = len(micro_batches)  # DualPipeV's buffers are counted by it, also in evaluation
        engine.eval_batch(
            iter(()), compute_loss=False, reduce_output=None, bcast_loss=False, num_micro_batches=len(micro_batches)
        )

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.full_weights`. Of several ranks of the pipeline that hold a weight the first gives it."""
        topology = self._world.topology
        ranks, group = topology.group("pipeline"), self._world.groups["pipeline"]
        pieces = local_parameters(self.models)
        dtype = next(iter(self._engine.module.parameters())).dtype
        for name, shape in self._full_shapes():
            source = self._parameter_ranks[name][0]
            if topology.stage == source:
                shards = [w for part, shard in pieces[name] for _, w in self._joiner.add(name, part.detach(), shard)]
                total = shards[-1].contiguous()
            else:
                total = torch.empty(shape, dtype=dtype, device=self._world.device)
            dist.broadcast(total, ranks[source], group=group)
            yield name, total
        yield from self._persistent_buffers()

    def _full_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every parameter's first name and whole shape, in the same order on all ranks."""
        seen = set()
        for name, parameter in local_and_remote_parameters(self.models[0]):
            shard = shard_of(parameter)
            first = name if shard is None else shard.name
            if first in self._parameter_ranks and first not in seen:
                seen.add(first)
                yield first, tuple(parameter.shape) if shard is None else shard.full_shape


class _ScheduleClock:
    """How long a rank computes of the time that a step's schedule takes."""

    def __init__(self, device: torch.device, advance: Callable[[], None]) -> None:
        """Args:
        advance: called before each pass of a micro-batch.
        """
        self._on_gpu, self._advance = device.type == "cuda", advance
        self._marks: list[Any] = []
        self._bounds: list[Any] = []

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
            start = self._now()
            execute(engine, **kwargs)
            if len(self._bounds) == 1:  # in training
                self._marks.append((start, self._now()))

        return executes

    def begin(self) -> None:
        self._marks, self._bounds = [], [self._now()]

    def end(self) -> None:
        self._bounds.append(self._now())

    def idle_share(self) -> float:
        """Share of the last schedule's time, up to the reduction of gradients, in which this rank did not compute. On a
        GPU it waits for the step's end."""
        if self._on_gpu:
            torch.cuda.synchronize()
        total = self._between(*self._bounds)
        return 1 - sum(self._between(start, end) for start, end in self._marks) / total

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) if self._on_gpu else float(end - start)


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
        floating = tuple(tensor for tensor in outputs if tensor.is_floating_point())
        torch.autograd.backward(floating, tuple(engine.grad_layer))
    finally:
        engine._running_engine_backward = False
    if engine.using_bf16_optimizer and not engine._config.bfloat16_config.immediate_grad_update:
        engine.optimizer.update_hp_grads(clear_lp_grads=False)
    engine.pipe_buffers["output_tensors"][buffer_id] = None
    engine.pipe_buffers["outputs"][buffer_id] = None


def _zero_missing_gradients(received: Any) -> None:
    """Gives what was received, and nothing has used, a gradient of zero: its sender waits for one."""
    for tensor in received if isinstance(received, tuple) else (received,):
        if tensor.is_floating_point() and tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)


def _with_missing_gradients_zeroed(send: Callable[..., None]) -> Callable[..., None]:
    def executes(engine: Any, buffer_id: int, **kwargs: Any) -> None:
        _zero_missing_gradients(engine.pipe_buffers["inputs"][buffer_id])
        send(engine, buffer_id, **kwargs)

    return executes


def _backward_dualpipev(engine: Any, buffer_id: int, phase: int) -> None:
    """The same for DualPipeV; on the last rank the way out receives its gradients from the way back."""
    buffers, is_turn = engine.pipe_buffers, engine._is_last_rank() and phase == 0
    if is_turn:
        _zero_missing_gradients(buffers["inputs"][engine._phase1_buffer(buffer_id)])
    if engine._is_loss_stage(phase) or isinstance(buffers["outputs"][buffer_id], Tensor):
        DualPipeVEngine._exec_backward_pass(engine, buffer_id, phase)
        return
    key, slot = ("inputs", engine._phase1_buffer(buffer_id)) if is_turn else ("grads", buffer_id)
    received, buffers[key][slot] = buffers[key][slot], None
    engine.grad_layer = [t.grad for t in received if t.is_floating_point()] if is_turn else received
    with engine._phase(phase):
        _backward(engine, buffer_id)
    if engine.stage_id == 0 and phase == 0:
        buffers["inputs"][buffer_id] = None


def start_pipeline(
    stages: list[StageModule],
    assignment: StageAssignment,
    parameter_ranks: dict[str, tuple[int, ...]],
    settings: dict[str, Any],
    optimizer_setup: OptimizerSetup,
    world: World,
    max_grad_norm: float | None,
    *,
    fixed_shape: bool,
) -> PipelineEngine:
    """Hands complete stages to DeepSpeed.

    Args:
        stages: of this rank. parameter_ranks: ranks of the pipeline that hold each weight.
        even: whether all micro-batches have the same shape.
    """
    topology = world.topology
    own = dict(zip(assignment.stages_of_rank(topology.stage), stages, strict=True))
    models = [stage.model for stage in stages]
    with contextlib.redirect_stdout(io.StringIO()):
        module = (PipelineModule if len(own) == 1 else DualPipeVModule)(
            layers=[own.get(stage, _remote_stage) for stage in range(assignment.stages)],
            topology=PipeModelDataParallelTopology(topology.pipeline, topology.tensor, topology.data),
            partition_method="uniform",
            dynamic_shape=not fixed_shape,
        )
    module.shared = list(shared_parameters(models, parameter_ranks, world))
    for name, pieces in local_parameters(models).items():
        for parameter, _ in pieces:  # DeepSpeed's flag for "another rank counts it in the norm"
            parameter.ds_pipe_replicated = topology.stage != parameter_ranks[name][0]  # type: ignore[attr-defined]
    # Each tensor rank sends its own copy, or under sequence parallelism its stretch: DeepSpeed's way of sending a part
    # and gathering it knows only records of one tensor, all of the same shape.
    pipeline_settings = {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False}}
    engine = optimizer_setup.initialize(module, models, settings | pipeline_settings)
    return PipelineEngine(engine, world, max_grad_norm, stages, parameter_ranks)
