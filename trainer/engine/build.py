"""Creation of an engine from a model without weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from trainer.compat.deepspeed.flags import set_counted_elsewhere
from trainer.compat.deepspeed.interfaces import Settings
from trainer.compat.deepspeed.layouts.base import undo_initial_step
from trainer.compat.deepspeed.nvme import keep_unaligned_gradients, prepare_nvme
from trainer.compat.deepspeed.pipeline import as_pipeline_engine, pipeline_module
from trainer.compat.deepspeed.zero3 import Partition, partitioner
from trainer.config import LoadedConfig
from trainer.config.deepspeed import (
    custom_schedule,
    deepspeed_clips_gradients,
    engine_settings,
    required_extensions,
    weight_decay,
)
from trainer.distributed import World, agree, load_extension
from trainer.engine.mpu import ModelParallelUnit
from trainer.engine.optimizer_setup import OptimizerSetup
from trainer.engine.parameter_groups import ParameterGroups
from trainer.engine.pipeline import PipelineEngine
from trainer.engine.plain import PlainEngine
from trainer.engine.stage_module import StageModule
from trainer.model import (
    PreTrainedModel,
    ZeroWeights,
    configured_weights,
    materialize,
    returns_head_output,
    weight_options,
)
from trainer.pipeline import (
    Stage,
    StageAssignment,
    attention_to_recompute,
    install_recomputation,
    local_parameters,
    share_parameters,
)
from trainer.sharding import fill_remote_with_zeros
from trainer.tasks import TASKS, TaskModule
from trainer.tasks.cross_entropy import VocabularyCrossEntropy
from trainer.tensor_parallel import Mapper, build_mapper
from trainer.topology import GRADIENT_AXES

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_engine(
    model: PreTrainedModel,
    loaded: LoadedConfig,
    world: World,
    assignment: StageAssignment | None = None,
    *,
    zero_weights: bool = False,
) -> PlainEngine | PipelineEngine:
    """Materialize a model's weights and create the engine that trains it. Collective: all ranks must call it.

    Args:
        model: model from `build_model`, on the meta device.
        loaded: the configuration.
        world: of this rank.
        assignment: of the model's layers to stages, from `assign_stages`; None without a pipeline.
        zero_weights: materialize zeros, for a checkpoint to overwrite.
    """
    settings = engine_settings(loaded.deepspeed_json)
    for extension in required_extensions(settings):
        load_extension(extension)
    prepare_nvme(settings, loaded.config.run.output_dir)
    assert (1 if assignment is None else assignment.ranks) == world.topology.pipeline
    options = weight_options(model, loaded.config.training, decay=weight_decay(settings))
    optimizer_setup = OptimizerSetup(ParameterGroups(options), custom_schedule(loaded.deepspeed_json))
    builder = _EngineBuilder(loaded, world, settings, optimizer_setup, zero_weights)
    return builder.build_plain(model) if assignment is None else builder.build_pipeline(model, assignment)


@dataclass(frozen=True)
class _EngineBuilder:
    """Builds an engine from the parts that `build_engine` prepared."""

    loaded: LoadedConfig
    world: World
    settings: Settings
    optimizer_setup: OptimizerSetup
    zero_weights: bool

    @property
    def dtype(self) -> torch.dtype:
        """Type that the model computes in."""
        return _DTYPES[self.loaded.config.deepspeed.precision]

    @property
    def max_grad_norm(self) -> float | None:
        """See `BaseEngine`."""
        if deepspeed_clips_gradients(self.settings):
            return None
        return float(self.loaded.deepspeed_json["gradient_clipping"])

    def build_plain(self, model: PreTrainedModel) -> PlainEngine:
        """Build the engine without a pipeline. Collective: all ranks must call it."""
        is_zero3 = self.settings["zero_optimization"]["stage"] == 3
        # Under ZeRO 3 a weight is in memory only while its own module runs.
        can_defer_head = not is_zero3 and returns_head_output(model, self.loaded)
        attention = attention_to_recompute(model, self.loaded)
        mapper, mpu = self._mapper(model), ModelParallelUnit(self.world)
        self._materialize(model, mapper, partitioner(self.settings, self.dtype, mpu) if is_zero3 else None)
        mapper.install()
        install_recomputation(model, self.loaded, attention)
        module = self._task_module(model, mapper, can_defer_head=can_defer_head)
        engine = self.optimizer_setup.initialize(module, [model], self.settings, mpu=mpu)
        # Neither applies in a pipeline: the optimizers that take an initial step are those of bf16 at ZeRO 0, where a
        # pipeline has BF16_Optimizer instead; and offload to NVMe requires ZeRO 3.
        undo_initial_step(engine.optimizer)
        keep_unaligned_gradients(engine.optimizer)
        engine.train()
        return PlainEngine(engine, self.world, mapper, task=module.task, max_grad_norm=self.max_grad_norm)

    def build_pipeline(self, model: PreTrainedModel, assignment: StageAssignment) -> PipelineEngine:
        """Build the engine with a pipeline. Collective: all ranks must call it."""
        topology = self.world.topology
        parameter_ranks = assignment.parameter_ranks(model)
        stages = dict(
            zip(
                assignment.stages_of_rank(topology.pipeline_rank),
                self._materialized_stages(model, assignment),
                strict=True,
            )
        )
        models = [stage.model for stage in stages.values()]
        module = pipeline_module(
            stages,
            assignment.num_stages,
            sizes=(topology.pipeline, topology.tensor, topology.size(*GRADIENT_AXES)),
            dynamic_shape=self.loaded.config.data.packing != "concatenate",
        )
        for name, pieces in local_parameters(models).items():
            for parameter, _ in pieces:  # the module has set the flag to False
                set_counted_elsewhere(parameter, topology.pipeline_rank != parameter_ranks[name][0])
        # DeepSpeed can send a part of each activation per tensor rank and gather it, but only for single tensors of one
        # shape. Here each tensor rank sends its own copy, or under sequence parallelism its part of the sequence.
        settings = self.settings | {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False}}
        engine = self.optimizer_setup.initialize(module, models, settings, mpu=None)
        return PipelineEngine(
            as_pipeline_engine(engine),
            self.world,
            list(stages.values()),
            max_grad_norm=self.max_grad_norm,
            parameter_ranks=parameter_ranks,
        )

    def _materialized_stages(self, model: PreTrainedModel, assignment: StageAssignment) -> list[StageModule]:
        """Create this rank's stages, each a copy of the model with the weights of its layers.

        Collective: all ranks must call it. All weights are materialized before any stage is installed, because
        installing changes the modules that hold them.
        """
        can_defer_head, attention = returns_head_output(model, self.loaded), attention_to_recompute(model, self.loaded)
        indices = assignment.stages_of_rank(self.world.topology.pipeline_rank)
        models = [model, *(copy.deepcopy(model) for _ in indices[1:])]
        mappers = [self._mapper(stage_model) for stage_model in models]
        stages = [
            Stage(stage_model, assignment.dataflow, assignment.bounds, index)
            for stage_model, index in zip(models, indices, strict=True)
        ]
        for stage_model, stage, mapper in zip(models, stages, mappers, strict=True):
            stage.drop_remote_parameters()
            self._materialize(stage_model, mapper)
        for other in models[1:]:
            share_parameters(model, other)
        modules = []
        for stage_model, stage, mapper in zip(models, stages, mappers, strict=True):
            mapper.install()
            install_recomputation(stage_model, self.loaded, attention)
            stage.install()  # turns recomputation off in layers of other stages
            fill_remote_with_zeros(stage_model, self.world.device, self.dtype)
            module = self._task_module(stage_model, mapper, can_defer_head=can_defer_head)
            modules.append(StageModule(module, stage, mapper, self.world.device))
        return modules

    def _materialize(self, model: PreTrainedModel, mapper: Mapper, partition: Partition | None = None) -> None:
        """Materialize the weights of a model, of which this rank keeps its shards. Collective: all ranks must call it.

        Args:
            model: on the meta device.
            mapper: of the model.
            partition: replaces parameters by their ZeRO 3 partitions.

        Raises:
            ConfigError: on all ranks, if one of them cannot read its weights.
        """
        source = ZeroWeights() if self.zero_weights else configured_weights(self.loaded)

        def materialize_shards() -> None:
            for parameters in materialize(model, source):
                shards = mapper.shard_parameters(parameters)
                if partition is not None:
                    partition(shards)

        agree(materialize_shards)

    def _mapper(self, model: PreTrainedModel) -> Mapper:
        parallel = self.loaded.config.parallel
        return build_mapper(
            model,
            parallel.tensor_plan,
            self.world,
            sequence_parallel=parallel.sequence_parallel,
            dtype=self.dtype,
        )

    def _task_module(self, model: PreTrainedModel, mapper: Mapper, *, can_defer_head: bool) -> TaskModule:
        options, task = self.loaded.config.training, TASKS[self.loaded.config.model.task]
        shard = mapper.vocabulary_shard()
        cross_entropy = VocabularyCrossEntropy(
            options.label_smoothing, options.z_loss, options.loss_chunk_tokens, shard
        )
        return TaskModule(model.train(), task, cross_entropy, can_defer_head=can_defer_head)
