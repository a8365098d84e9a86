"""Which layers of the user's model each stage gets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from trainer.errors import PlanError, Problem
from trainer.pipeline.balance import stage_bounds
from trainer.pipeline.dataflow import BATCH, LENGTH, Dataflow
from trainer.pipeline.stage import boundary_numel, parameter_stages
from trainer.pipeline.trace import trace_dataflow
from trainer.tasks import TASKS

if TYPE_CHECKING:
    from trainer.config import LoadedConfig


@dataclass(frozen=True)
class StageAssignment:
    """The layers of a model over the stages of a pipeline."""

    dataflow: Dataflow | None = None
    """None for one stage, whose model nobody has to follow."""

    bounds: tuple[int, ...] = (0, 0)
    """Stage s has the layers from bounds[s] up to bounds[s + 1]."""

    costs: tuple[float, ...] = ()
    """FLOPs of each layer's forward pass for one sequence, with what belongs to it beside the layers."""

    ranks: int = 1
    """Ranks of the pipeline: as many as stages, or half as many, which each hold two (DualPipeV)."""

    recomputed: tuple[str, ...] = ()
    """Modules that are computed again in the backward pass: attention, where that is asked for."""

    @property
    def stages(self) -> int:
        return len(self.bounds) - 1

    def stages_of_rank(self, rank: int) -> tuple[int, ...]:
        """Stages of a rank of the pipeline: under DualPipeV the way back passes the ranks in reverse."""
        return (rank,) if self.stages == self.ranks else (rank, self.stages - 1 - rank)

    def rank_of_stage(self, stage: int) -> int:
        """The rank of the pipeline that has a stage."""
        return min(stage, self.stages - 1 - stage) if self.stages > self.ranks else stage

    def parameter_ranks(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Ranks of the pipeline that hold each parameter, by its first name, in ascending order."""
        return {
            name: tuple(sorted({self.rank_of_stage(stage) for stage in stages}))
            for name, stages in self.parameter_stages(model).items()
        }

    def parameter_stages(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Stages that hold each parameter, by its first name."""
        if self.dataflow is None:
            return {name: (0,) for name, _ in model.named_parameters()}
        return parameter_stages(model, self.dataflow, self.bounds)

    def table(
        self, micro_batch: int, length: int, size: int, sequence_ranks: int
    ) -> Iterator[tuple[int, int, int, float, dict[str, int]]]:
        """(stage, first layer, end, share of the cost, bytes that a rank sends of each micro-batch by what is sent).

        Args:
            size: bytes of a number. sequence_ranks: ranks that share what lies between layers.
        """
        assert self.dataflow is not None
        for stage, (first, end) in enumerate(pairwise(self.bounds)):
            share = sum(self.costs[first:end]) / sum(self.costs)
            last = stage == self.stages - 1
            sent = {} if last else boundary_numel(self.dataflow, end, micro_batch, length, sequence_ranks)
            yield stage, first, end, share, {name: numbers * size for name, numbers in sent.items()}


ONE_STAGE = StageAssignment()
"""Where there is no pipeline."""


def assign_stages(model: PreTrainedModel, loaded: LoadedConfig) -> StageAssignment:
    """Divides the layers of a model on the meta device over `parallel.pipeline` stages, and finds its attention where
    that is to be recomputed.

    Raises:
        PlanError: if the model has no layers that can be divided, or something that no module returns would have to
            cross a boundary; if there is no attention to recompute.
        ConfigError: for more stages than layers, or `parallel.pipeline_layers` that do not add up.
    """
    parallel, length = loaded.config.parallel, loaded.config.data.sequence_length
    selective = loaded.config.model.activation_checkpointing == "selective"
    if parallel.pipeline == 1 and not selective:
        return ONE_STAGE
    if parallel.pipeline > 1:
        _refuse_layers_left_out(model)
    task = TASKS[loaded.config.model.task]
    dataflow = trace_dataflow(model, task.example_inputs(model, BATCH, LENGTH))
    evaluated = trace_dataflow(model, task.example_inputs(model, BATCH, 2 * LENGTH), training=False)
    recomputed = tuple(_attention(model, dataflow, evaluated)) if selective else ()
    if parallel.pipeline == 1:
        return StageAssignment(recomputed=recomputed)
    refuse_uses_on_other_stages(model, dataflow, evaluated)
    costs, speeds = dataflow.costs(length, evaluated), parallel.pipeline_weights
    if parallel.pipeline_schedule == "dualpipev" and speeds is not None:
        speeds = [*speeds, *reversed(speeds)]
    bounds = stage_bounds(costs, parallel.stages, parallel.pipeline_layers, speeds)
    for cut in bounds[1:-1]:
        dataflow.boundary_values(cut)  # refuses what cannot be sent
    assignment = StageAssignment(dataflow, tuple(bounds), tuple(costs), parallel.pipeline, recomputed)
    _refuse_layers_used_twice(model, assignment)
    return assignment


def _refuse_layers_used_twice(model: PreTrainedModel, assignment: StageAssignment) -> None:
    """A weight of two stages on one rank is one weight there, and only those outside the layers may be."""
    assert assignment.dataflow is not None
    layers = tuple(f"{name}." for unit in assignment.dataflow.units for name in unit)
    for name, stages in assignment.parameter_stages(model).items():
        if name.startswith(layers) and len({assignment.rank_of_stage(stage) for stage in stages}) < len(stages):
            raise PlanError(
                Problem("parallel.pipeline_schedule", f"both stages of a rank would use {name}", "Set it to '1f1b'")
            )


def _attention(model: PreTrainedModel, dataflow: Dataflow, longer: Dataflow) -> list[str]:
    found = dataflow.attention_modules(longer)
    if not found:
        reason = (
            f"'selective' computes attention again, and {model.config.model_type} has no modules of it in its layers"
        )
        raise PlanError(Problem("model.activation_checkpointing", reason, "Set it to 'full' or 'none'"))
    return found


def _refuse_layers_left_out(model: PreTrainedModel) -> None:
    for config in (model.config, model.config.get_text_config()):
        for key, value in vars(config).items():
            if key.endswith("layerdrop") and value:
                raise PlanError(
                    Problem("model", f"{config.model_type} leaves out layers at random ({key} {value}), and stages "
                            "must run them all", f"Set {key} to 0, or parallel.pipeline to 1")
                )  # fmt: skip


def refuse_uses_on_other_stages(model: PreTrainedModel, trained: Dataflow, evaluated: Dataflow) -> None:
    """Looks whether evaluation uses each weight where training does.

    Raises:
        PlanError: naming a weight that it uses elsewhere: its stage would not have it.
    """
    for name, _ in model.named_parameters():
        if trained.units_using(name) and not evaluated.units_using(name) <= trained.units_using(name):
            reason = f"{model.config.model_type} uses {name} elsewhere when it is evaluated than when it is trained"
            raise PlanError(Problem("parallel.pipeline", reason, "Set parallel.pipeline to 1"))
