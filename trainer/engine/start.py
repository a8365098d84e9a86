"""From a model without weights to an engine that trains it."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import nn

from trainer.compat.deepspeed.nvme import keep_unaligned_gradients, prepare_nvme
from trainer.config import LoadedConfig
from trainer.config.deepspeed import (
    custom_schedule,
    deepspeed_clips_gradients,
    engine_settings,
    required_extensions,
    weight_decay,
)
from trainer.distributed import World, load_extension
from trainer.engine.grid import Grid
from trainer.engine.optimizer_setup import OptimizerSetup
from trainer.engine.parameter_groups import ParameterGroups
from trainer.engine.pipeline import PipelineEngine, StageModule, start_pipeline
from trainer.engine.plain import PlainEngine
from trainer.model import give_weights, returns_head_output, weight_options
from trainer.pipeline import ONE_STAGE, Stage, StageAssignment, recompute, share_parameters
from trainer.sharding import fill_remote_with_zeros
from trainer.tasks import TASKS, TaskModule
from trainer.tensor_parallel import Mapper, build_mapper

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _zero3_partitioner(settings: dict[str, Any], dtype: torch.dtype, grid: Grid) -> Any:
    """A function that takes whole parameters away to where ZeRO-3 keeps their parts, as soon as they are made."""
    context: Any = None

    def partition(parameters: list[nn.Parameter]) -> None:
        nonlocal context
        if context is None:
            context = deepspeed.zero.Init(
                config_dict_or_path=settings,
                dtype=dtype,
                mpu=grid,
                data_parallel_group=grid.get_data_parallel_group(),
            )
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)
        context._convert_to_zero_parameters(parameters)

    return partition


def start_engine(
    model: Any, loaded: LoadedConfig, world: World, assignment: StageAssignment = ONE_STAGE, *, blank: bool = False
) -> PlainEngine | PipelineEngine:
    """Gives the model its weights and hands it to DeepSpeed.

    Args:
        model: from `build_model`, on the meta device. division: its layers over the stages, from `assign_stages`.
        blank: the weights are zeros, for a checkpoint to replace.
    """
    settings = engine_settings(loaded.deepspeed_json)
    for extension in required_extensions(settings):
        load_extension(extension)
    prepare_nvme(settings, loaded.config.run.output_dir)
    assert assignment.ranks == world.topology.pipeline
    options = weight_options(model, loaded.config.training, decay=weight_decay(settings))
    optimizer_setup = OptimizerSetup(ParameterGroups(options), custom_schedule(loaded.deepspeed_json))
    start = _start_plain if assignment.ranks == 1 else _start_pipeline
    return start(model, assignment, loaded, world, settings, optimizer_setup, blank)


def _mapper(model: Any, loaded: LoadedConfig, world: World) -> Mapper:
    parallel, dtype = loaded.config.parallel, _DTYPES[loaded.config.deepspeed.precision]
    return build_mapper(model, parallel.tensor_plan, world, sequence_parallel=parallel.sequence_parallel, dtype=dtype)


def _task_module(model: Any, loaded: LoadedConfig, mapper: Mapper, *, can_defer_head: bool) -> TaskModule:
    options, task = loaded.config.training, TASKS[loaded.config.model.task]
    cross_entropy = mapper.cross_entropy(options.label_smoothing, options.z_loss, options.loss_chunk_tokens)
    return TaskModule(model.train(), task, cross_entropy, can_defer_head=can_defer_head)


def _max_grad_norm(loaded: LoadedConfig, settings: dict[str, Any]) -> float | None:
    return None if deepspeed_clips_gradients(settings) else float(loaded.deepspeed_json["gradient_clipping"])


def _start_plain(
    model: Any, assignment: StageAssignment, loaded: LoadedConfig, world: World, settings: dict[str, Any],
    optimizer_setup: OptimizerSetup, blank: bool,
) -> PlainEngine:  # fmt: skip
    # Under ZeRO-3 a weight is there only while its own module runs.
    can_defer_head = settings["zero_optimization"]["stage"] < 3 and returns_head_output(model, loaded)
    mapper, grid = _mapper(model, loaded, world), Grid(world)
    dtype = _DTYPES[loaded.config.deepspeed.precision]
    partition = _zero3_partitioner(settings, dtype, grid) if settings["zero_optimization"]["stage"] == 3 else None

    def shard_and_partition(parameters: list[nn.Parameter]) -> None:
        cut = mapper.shard_parameters(parameters)
        if partition is not None:
            partition(cut)

    give_weights(model, loaded, shard_and_partition, blank=blank)
    mapper.install()
    recompute(model, assignment.recomputed)
    module = _task_module(model, loaded, mapper, can_defer_head=can_defer_head)
    engine = optimizer_setup.initialize(module, [model], settings, mpu=grid)
    _undo_first_step(engine.optimizer)
    keep_unaligned_gradients(engine.optimizer)
    engine.train()
    return PlainEngine(engine, world, mapper, _max_grad_norm(loaded, settings), task=module.task)


def _undo_first_step(optimizer: Any) -> None:
    """Forgets the step without gradients with which DeepSpeed 0.19's optimizer of ZeRO 0 in half precision begins.

    It counts in Adam's bias correction, so that the first real update would be a quarter too small, and it decays the
    weights once too often.
    """
    if isinstance(optimizer, FP16_Optimizer):
        pairs = zip(optimizer.fp32_groups_flat, optimizer.fp16_groups_flat, strict=True)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        pairs = zip(chain(*optimizer.fp32_groups), chain(*optimizer.fp16_groups), strict=True)
    else:
        return
    optimizer.optimizer.state.clear()
    with torch.no_grad():
        for master, weights in pairs:
            master.copy_(weights)


def _start_pipeline(
    model: Any, assignment: StageAssignment, loaded: LoadedConfig, world: World, settings: dict[str, Any],
    optimizer_setup: OptimizerSetup, blank: bool,
) -> PipelineEngine:  # fmt: skip
    assert assignment.dataflow is not None
    can_defer_head = returns_head_output(model, loaded)
    parameter_ranks = assignment.parameter_ranks(model)
    stage_indices = assignment.stages_of_rank(world.topology.stage)
    models = [model, *(copy.deepcopy(model) for _ in stage_indices[1:])]
    mappers = [_mapper(stage_model, loaded, world) for stage_model in models]
    stages = [
        Stage(stage_model, assignment.dataflow, assignment.bounds, n)
        for stage_model, n in zip(models, stage_indices, strict=True)
    ]
    for stage_model, stage, mapper in zip(models, stages, mappers, strict=True):
        stage.drop_remote_parameters()
        give_weights(stage_model, loaded, mapper.shard_parameters, blank=blank)
    for other in models[1:]:
        share_parameters(model, other)
    modules = []
    for stage_model, stage, mapper in zip(models, stages, mappers, strict=True):
        mapper.install()
        stage.install()
        recompute(stage_model, assignment.recomputed)
        fill_remote_with_zeros(stage_model, world.device, _DTYPES[loaded.config.deepspeed.precision])
        module = _task_module(stage_model, loaded, mapper, can_defer_head=can_defer_head)
        modules.append(StageModule(module, stage, mapper, world.device))
    fixed_shape = loaded.config.data.packing == "concatenate"
    max_grad_norm = _max_grad_norm(loaded, settings)
    return start_pipeline(
        modules, assignment, parameter_ranks, settings, optimizer_setup, world, max_grad_norm, fixed_shape=fixed_shape
    )
