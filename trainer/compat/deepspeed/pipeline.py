"""DeepSpeed's pipeline engines, with the instructions replaced that do not fit stages of a Hugging Face model.

A stage is the full model whose other layers are stubs. It reads the micro-batches itself, and what crosses a boundary
is a tuple of tensors, some of which a stage may leave unused. One step of 4 micro-batches on 3 stages under 1F1B; F2 is
the forward pass of micro-batch 2, B2 its backward pass, | the end of the schedule:

    stage 0   F0  .   F1  .   F2  B0  F3  B1  .   B2  .   B3 |
    stage 1   .   F0  .   F1  B0  F2  B1  F3  B2  .   B3  .  | ReduceTiedGrads, ReduceGrads, OptimizerStep
    stage 2   .   .   F0  B0  F1  B1  F2  B2  F3  B3  .   .  |

    instruction        DeepSpeed                                here
    LoadMicroBatch     reads from an iterator                   nothing to read; the first stage receives ()
    RecvActivation     receives a tensor or a tuple             -
    ForwardPass        calls the stage                          and counts the time as work
    SendActivation     sends what the stage returns             -
    RecvGrad           receives gradients of what was sent      -
    BackwardPass       one tensor of a tuple after the other    all at once; counts the time as work; checks gradients
    SendGrad           sends gradients of what was received     zeros for what no layer has used
    ReduceTiedGrads    sums gradients of TiedLayerSpec          sums gradients of weights that several stages hold
    ReduceGrads        averages gradients over the data ranks   -
    OptimizerStep      clips and updates                        clips over all stages and verifies replicas around it
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compat.deepspeed.interfaces import DeepSpeedPipelineEngine
from trainer.compat.deepspeed.internals import (
    DualPipeVEngine,
    DualPipeVModule,
    PipelineEngine,
    PipelineModule,
    PipeModelDataParallelTopology,
    schedule,
)

Instruction = Callable[..., None]
"""Called with the engine and the arguments of the instruction, such as `buffer_id` and, under DualPipeV, `phase`."""


@dataclass(frozen=True)
class ScheduleHooks:
    """Callbacks of Tessera's engine at points of a training schedule."""

    around_pass: Callable[[Instruction], Instruction]
    """Wraps the forward and the backward pass of a micro-batch."""

    after_backward: Callable[[int], None]
    """Called with the index of the stage on this rank, 0 but under DualPipeV."""

    reduce_shared_gradients: Callable[[], None]
    before_update: Callable[[], None]
    after_update: Callable[[], None]


def pipeline_module(
    stages: Mapping[int, nn.Module], num_stages: int, *, sizes: tuple[int, int, int], dynamic_shape: bool
) -> nn.Module:
    """Build the module from which `deepspeed.initialize` makes a pipeline engine.

    Args:
        stages: those of this rank by index; two under DualPipeV.
        num_stages: of all ranks.
        sizes: pipeline, tensor and data ranks.
        dynamic_shape: whether shapes differ between micro-batches.
    """
    module_class = PipelineModule if len(stages) == 1 else DualPipeVModule
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its partition
        module: nn.Module = module_class(
            layers=[stages.get(index, _remote_stage) for index in range(num_stages)],
            topology=PipeModelDataParallelTopology(*sizes),
            partition_method="uniform",
            dynamic_shape=dynamic_shape,
        )
    return module


def _remote_stage(received: Any) -> Any:
    raise AssertionError("the stage of another rank was called")


def as_pipeline_engine(engine: object) -> DeepSpeedPipelineEngine:
    """Narrow the type of an engine that `deepspeed.initialize` has made for a pipeline module."""
    assert isinstance(engine, PipelineEngine), type(engine)
    pipeline: DeepSpeedPipelineEngine = engine
    return pipeline


def is_dualpipev(engine: object) -> bool:
    """Return whether each rank has two stages, in a V: rank 0 has the first and the last."""
    return isinstance(engine, DualPipeVEngine)


def instructions_of(engine: Any) -> dict[type, Instruction]:
    """Return what an engine executes, by class of instruction; changes take effect."""
    instructions: dict[type, Instruction] = engine._INSTRUCTION_MAP
    return instructions


def replace_instructions(engine: Any, hooks: ScheduleHooks) -> None:
    """Replace the instructions that the table above names."""
    originals = type(engine)._INSTRUCTION_MAP
    backward = _backward_dualpipev if is_dualpipev(engine) else _backward

    def backward_pass(engine: Any, buffer_id: int, **phase: int) -> None:
        backward(engine, buffer_id, **phase)
        hooks.after_backward(phase.get("phase", 0))

    def send_gradients(engine: Any, buffer_id: int, **phase: int) -> None:
        _zero_missing_gradients(engine.pipe_buffers["inputs"][buffer_id])
        originals[schedule.SendGrad](engine, buffer_id, **phase)

    def optimizer_step(engine: Any, lr_kwargs: Any = None) -> None:
        hooks.before_update()
        PipelineEngine._exec_optimizer_step(engine, lr_kwargs)
        hooks.after_update()

    engine._INSTRUCTION_MAP = originals | {
        schedule.LoadMicroBatch: _load_micro_batch,
        schedule.ForwardPass: hooks.around_pass(originals[schedule.ForwardPass]),
        schedule.BackwardPass: hooks.around_pass(backward_pass),
        schedule.SendGrad: send_gradients,
        schedule.ReduceTiedGrads: lambda engine: hooks.reduce_shared_gradients(),
        schedule.OptimizerStep: optimizer_step,
    }


def _load_micro_batch(engine: Any, buffer_id: int) -> None:
    if engine.stage_id == 0:
        engine.pipe_buffers["inputs"][buffer_id] = ()


def _backward(engine: Any, buffer_id: int) -> None:
    """Compute the gradients of all tensors that were sent in one backward pass.

    DeepSpeed goes backward from one tensor after the other. That needs the graph several times, and each pass would
    run recomputed layers again.
    """
    outputs = engine.pipe_buffers["outputs"][buffer_id]
    if engine.is_last_stage() or isinstance(outputs, Tensor):
        PipelineEngine._exec_backward_pass(engine, buffer_id)
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


def _backward_dualpipev(engine: Any, buffer_id: int, phase: int) -> None:
    """As `_backward`, under DualPipeV.

    On the last rank the outputs of its first stage (phase 0) are the inputs of its second: their gradients are not
    received but are those of the second stage's inputs.
    """
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


def _zero_missing_gradients(received: Tensor | tuple[Tensor, ...]) -> None:
    """Give unused received activations a zero gradient, because the previous stage blocks on receiving one."""
    for tensor in received if isinstance(received, tuple) else (received,):
        if tensor.is_floating_point() and tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)


def gradient_to_reduce(engine: Any, weight: nn.Parameter) -> Tensor:
    """Find the accumulated gradient of a weight that several stages hold, in the weight's shape or flat.

    DeepSpeed's own reduction of tied weights supports only gradients that are accumulated in the type of the weights.
    """
    if engine.using_bf16_optimizer:
        gradient = weight._hp_grad  # type: ignore[attr-defined]
    elif hasattr(engine.optimizer, "get_gradient_for_reduction"):
        gradient = engine.optimizer.get_gradient_for_reduction(weight)
    else:
        gradient = weight.grad
    assert isinstance(gradient, Tensor), "a weight that several stages hold has no gradient"
    return gradient


def run_training_schedule(engine: DeepSpeedPipelineEngine) -> None:
    """Run one optimizer step. Collective: all ranks must call it."""
    engine.train_batch(iter(()))
    engine.timers("train_batch").reset()  # it would keep two events per step


def run_evaluation_schedule(engine: DeepSpeedPipelineEngine, micro_batches: int) -> None:
    """Run forward passes without DeepSpeed's loss computation. Collective: all ranks must call it."""
    engine.reset_activation_shape()
    engine.micro_batches = micro_batches  # DualPipeV counts its buffers by this, also in evaluation
    engine.eval_batch(
        iter(()), compute_loss=False, reduce_output=None, bcast_loss=False, num_micro_batches=micro_batches
    )


@contextlib.contextmanager
def evaluating(engine: DeepSpeedPipelineEngine) -> Iterator[None]:
    """Allow micro-batches of other shapes and another number than in training; switch back to training after."""
    previous = engine.dynamic_shape, engine.micro_batches
    engine.dynamic_shape = True
    yield
    engine.dynamic_shape, engine.micro_batches = previous
    engine.reset_activation_shape()
    engine.train()
