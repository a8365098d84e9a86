"""Assignment of a model's layers to pipeline stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from trainer.errors import PlanError, Problem
from trainer.pipeline.balance import stage_bounds
from trainer.pipeline.dataflow import Dataflow
from trainer.pipeline.stage import boundary_numel, parameter_stages
from trainer.pipeline.trace import trace_training_and_evaluation

if TYPE_CHECKING:
    from trainer.config import LoadedConfig


@dataclass(frozen=True)
class StageRow:
    """One stage, for display."""

    stage: int
    first_layer: int
    end_layer: int
    cost_share: float
    """Share of the FLOPs of all layers."""

    boundary_bytes: dict[str, int]
    """Bytes that a rank sends to the next stage for each micro-batch, by the module whose output is sent."""


@dataclass(frozen=True)
class StageAssignment:
    """The layers of a model assigned to the stages of a pipeline."""

    dataflow: Dataflow
    """Dataflow of a forward pass in training."""

    bounds: tuple[int, ...]
    """Stage s has the layers from bounds[s] up to bounds[s + 1]."""

    costs: tuple[float, ...]
    """FLOPs of each layer's forward pass for one sequence, including the modules outside layers that run with it."""

    ranks: int
    """Pipeline ranks: as many as stages, or half as many where each rank holds two (DualPipeV)."""

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.bounds) - 1

    def stages_of_rank(self, rank: int) -> tuple[int, ...]:
        """Return the stages of a pipeline rank. Under DualPipeV the second half of the stages runs back."""
        return (rank,) if self.num_stages == self.ranks else (rank, self.num_stages - 1 - rank)

    def rank_of_stage(self, stage: int) -> int:
        """Return the pipeline rank that holds a stage."""
        return min(stage, self.num_stages - 1 - stage) if self.num_stages > self.ranks else stage

    def parameter_ranks(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Return the pipeline ranks that hold each parameter, by its first name, in ascending order."""
        return {
            name: tuple(sorted({self.rank_of_stage(stage) for stage in stages}))
            for name, stages in self.parameter_stages(model).items()
        }

    def parameter_stages(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Return the stages that hold each parameter, by its first name."""
        return parameter_stages(model, self.dataflow, self.bounds)

    def rows(self, *, micro_batch: int, length: int, element_bytes: int, sequence_ranks: int) -> Iterator[StageRow]:
        """Describe each stage.

        Args:
            micro_batch: samples of a micro-batch.
            length: tokens of a sample.
            element_bytes: bytes of an activation's element.
            sequence_ranks: ranks that share the activations between layers (sequence parallelism).
        """
        for stage, (first, end) in enumerate(pairwise(self.bounds)):
            numel: dict[str, int] = {}
            if stage < self.num_stages - 1:
                numel = boundary_numel(self.dataflow, end, micro_batch, length, sequence_ranks=sequence_ranks)
            share = sum(self.costs[first:end]) / sum(self.costs)
            yield StageRow(stage, first, end, share, {name: count * element_bytes for name, count in numel.items()})


def assign_stages(model: PreTrainedModel, loaded: LoadedConfig) -> StageAssignment | None:
    """Assign the layers of a model on the meta device to the stages of the pipeline; None without a pipeline.

    Raises:
        PlanError: if the model has no sequence of layers, or if a value would have to cross a stage boundary that no
            module returns.
        ConfigError: for more stages than layers, or `parallel.pipeline_layers` that do not add up.
    """
    parallel, length = loaded.config.parallel, loaded.config.data.sequence_length
    if parallel.pipeline == 1:
        return None
    _refuse_layer_drop(model)
    training, evaluation = trace_training_and_evaluation(model, loaded.config.model.task)
    refuse_uses_on_other_stages(model, training, evaluation)
    costs, speeds = training.costs(length, evaluation), parallel.pipeline_weights
    if parallel.pipeline_schedule == "dualpipev" and speeds is not None:
        speeds = [*speeds, *reversed(speeds)]
    bounds = stage_bounds(costs, parallel.stages, parallel.pipeline_layers, speeds)
    for boundary in bounds[1:-1]:
        training.boundary_values(boundary)  # raises if a value cannot be sent
    assignment = StageAssignment(training, tuple(bounds), tuple(costs), parallel.pipeline)
    _refuse_layers_used_twice(model, assignment)
    return assignment


def _refuse_layers_used_twice(model: PreTrainedModel, assignment: StageAssignment) -> None:
    """Refuse layer weights in both stages of a rank, which shares such weights: only those outside layers may be."""
    layers = tuple(f"{name}." for unit in assignment.dataflow.units for name in unit)
    for name, stages in assignment.parameter_stages(model).items():
        if name.startswith(layers) and len({assignment.rank_of_stage(stage) for stage in stages}) < len(stages):
            raise PlanError(
                Problem("parallel.pipeline_schedule", f"both stages of a rank use {name}", "Set it to '1f1b'")
            )


def _refuse_layer_drop(model: PreTrainedModel) -> None:
    """Refuse LayerDrop, which skips layers at random: every rank must run its stage in every forward pass."""
    for config in (model.config, model.config.get_text_config()):
        for key, value in vars(config).items():
            if key.endswith("layerdrop") and value:
                reason = f"{config.model_type} skips layers at random ({key} {value}), and stages must run all layers"
                raise PlanError(Problem("model", reason, f"Set {key} to 0, or parallel.pipeline to 1"))


def refuse_uses_on_other_stages(model: PreTrainedModel, training: Dataflow, evaluation: Dataflow) -> None:
    """Check that evaluation uses each weight in the layers in which training uses it.

    Raises:
        PlanError: with a weight that it uses in another layer, whose stage would lack it.
    """
    for name, _ in model.named_parameters():
        layers = training.units_using(name)
        if layers and not evaluation.units_using(name) <= layers:
            reason = f"{model.config.model_type} uses {name} in different layers in evaluation and in training"
            raise PlanError(Problem("parallel.pipeline", reason, "Set parallel.pipeline to 1"))
