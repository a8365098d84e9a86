"""Rules about how ranks, layers and batches are divided."""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainer.config.deepspeed import BATCH_KEYS, Batch, DeepSpeedSection, batch_arithmetic
from trainer.config.model_facts import ModelFacts
from trainer.config.rules.registry import Processes, rule, rule_reading
from trainer.config.schema import DataSection, ParallelSection
from trainer.errors import Problem

_BATCH_KEYS = tuple(f"deepspeed.{key}" for key in BATCH_KEYS)


@rule_reading("deepspeed.zero_optimization.stage")
def pipeline_excludes_gradient_partitioning(
    parallel: ParallelSection, deepspeed: DeepSpeedSection
) -> Iterator[Problem]:
    if parallel.pipeline > 1 and deepspeed.zero_stage > 1:
        yield Problem(
            "deepspeed.zero_optimization.stage",
            f"must be 0 or 1 with parallel.pipeline = {parallel.pipeline}, because a pipeline stage accumulates the "
            f"full gradients of all micro-batches before the reduction (got {deepspeed.zero_stage})",
            "Set it to 0 or 1, or parallel.pipeline to 1",
        )


@rule
def pipeline_excludes_deepspeed_profilers(parallel: ParallelSection, deepspeed: DeepSpeedSection) -> Iterator[Problem]:
    settings = deepspeed.model_dump(exclude_unset=True)
    profiler = settings.get("flops_profiler")
    for key, is_enabled in (
        ("wall_clock_breakdown", settings.get("wall_clock_breakdown")),
        ("flops_profiler.enabled", isinstance(profiler, dict) and profiler.get("enabled")),
    ):
        if parallel.pipeline > 1 and is_enabled:
            yield Problem(
                f"deepspeed.{key}",
                "must be false in a pipeline, where DeepSpeed's timers fail (got true)",
                "Set it to false; metrics.jsonl has pipeline_bubble and step_seconds",
            )


@rule
def pipeline_stages_consistent(parallel: ParallelSection) -> Iterator[Problem]:
    layers, weights = parallel.pipeline_layers, parallel.pipeline_weights
    if layers is not None and len(layers) != parallel.stages:
        yield Problem(
            "parallel.pipeline_layers",
            f"must have {parallel.stages} numbers, one for each stage, with parallel.pipeline = {parallel.pipeline} "
            f"(got {layers})",
        )
    if weights is not None and len(weights) != parallel.pipeline:
        yield Problem(
            "parallel.pipeline_weights",
            f"must have {parallel.pipeline} numbers, one for each pipeline rank (got {weights})",
        )
    if layers is not None and weights is not None:
        reason = "has no effect, because pipeline_layers sets the layers of each stage"
        yield Problem("parallel.pipeline_weights", reason, "Remove one of them")


@rule_reading("data.packing", *_BATCH_KEYS)
def dualpipev_requirements_met(
    parallel: ParallelSection, data: DataSection, deepspeed: DeepSpeedSection, processes: Processes
) -> Iterator[Problem]:
    key, ranks = "parallel.pipeline_schedule", parallel.pipeline
    if parallel.pipeline_schedule != "dualpipev":
        return
    if ranks == 1:
        yield Problem(key, "'dualpipev' requires a pipeline, and parallel.pipeline is 1", "Set parallel.pipeline")
    if data.packing == "none":
        yield Problem(
            key,
            "'dualpipev' requires micro-batches of one shape, and with data.packing 'none' their lengths differ",
            "Set packing to 'concatenate', or use '1f1b'",
        )
    data_ranks = processes.data_ranks(parallel, deepspeed)
    batch = batch_arithmetic(deepspeed, data_ranks) if data_ranks else None
    if isinstance(batch, Batch) and batch.accumulation_steps < 2 * ranks:
        yield Problem(
            key,
            f"'dualpipev' on {ranks} ranks requires at least {2 * ranks} micro-batches a step "
            f"(got {batch.accumulation_steps})",
            "Lower train_micro_batch_size_per_gpu, or use '1f1b'",
        )


def _largest_divisor_below(number: int, bound: int) -> int:
    """Return the largest divisor of `number` that is less than `bound` (at least 2), in O(sqrt(number))."""
    small = [size for size in range(1, min(bound, math.isqrt(number) + 1)) if number % size == 0]
    return max(size for divisor in small for size in (divisor, number // divisor) if size < bound)


@rule
def attention_heads_divisible_by_tensor(parallel: ParallelSection, facts: ModelFacts) -> Iterator[Problem]:
    heads, ranks = facts.attention_heads, parallel.tensor
    if heads and heads % ranks:
        yield Problem(
            "parallel.tensor",
            f"must divide the {heads} attention heads of {facts.model_type} (got {ranks})",
            f"The largest smaller size that does is {_largest_divisor_below(heads, ranks)}",
        )


@rule_reading("deepspeed.optimizer")
def optimizer_supports_tensor_parallel(parallel: ParallelSection, deepspeed: DeepSpeedSection) -> Iterator[Problem]:
    optimizer = deepspeed.optimizer
    if parallel.tensor > 1 and optimizer is not None and optimizer.type.lower() in ("muon", "adafactor"):
        yield Problem(
            "deepspeed.optimizer.type",
            f"{optimizer.type} computes its update from full matrices, and parallel.tensor = {parallel.tensor} shards "
            "them, which would change the update rule",
            "Use AdamW, or set parallel.tensor to 1",
        )


@rule_reading("deepspeed.optimizer", "parallel.tensor")
def legacy_fusion_excludes_tensor_parallel(deepspeed: DeepSpeedSection, parallel: ParallelSection) -> Iterator[Problem]:
    if deepspeed.optimizer is not None and deepspeed.optimizer.legacy_fusion and parallel.tensor > 1:
        yield Problem(
            "deepspeed.optimizer.legacy_fusion",
            f"must be false with parallel.tensor = {parallel.tensor}, because its gradient norm leaves out the shards "
            "of other tensor ranks (got true)",
            "Remove it",
        )


@rule_reading("data.sequence_length")
def sequence_length_divisible_by_tensor(parallel: ParallelSection, data: DataSection) -> Iterator[Problem]:
    if not parallel.sequence_parallel:
        return
    ranks, length = parallel.tensor, data.sequence_length
    if ranks == 1:
        yield Problem(
            "parallel.sequence_parallel",
            "requires tensor parallelism, and parallel.tensor is 1",
            "Set parallel.tensor, or sequence_parallel to false",
        )
    elif length % ranks:
        yield Problem(
            "data.sequence_length",
            f"must be a multiple of parallel.tensor = {ranks} with sequence_parallel (got {length})",
            f"Set it to {length - length % ranks}",
        )


@rule
def world_size_divisible_by_model_parallel_size(parallel: ParallelSection, processes: Processes) -> Iterator[Problem]:
    size, world_size = parallel.model_parallel_size, processes.world_size
    if world_size is not None and world_size % size:
        reason = f"tensor x pipeline must divide the number of processes, {world_size} (got {size})"
        yield Problem("parallel", reason, "Change one of them, or the number of processes")


@rule_reading(*_BATCH_KEYS)
def batch_sizes_consistent(
    parallel: ParallelSection, deepspeed: DeepSpeedSection, processes: Processes
) -> Iterator[Problem]:
    data_ranks = processes.data_ranks(parallel, deepspeed)
    batch = None if data_ranks is None else batch_arithmetic(deepspeed, data_ranks)
    if isinstance(batch, Problem):
        yield batch
