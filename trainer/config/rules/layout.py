"""Rules about how ranks, layers and batches are divided."""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainer.config.deepspeed import Batch, batch_arithmetic
from trainer.config.rules.registry import Draft, rule
from trainer.errors import Problem


@rule("parallel", "deepspeed.zero_optimization.stage")
def pipeline_excludes_gradient_partitioning(draft: Draft) -> Iterator[Problem]:
    assert draft.parallel is not None
    assert draft.deepspeed is not None
    stage = draft.deepspeed.zero_stage
    if draft.parallel.pipeline > 1 and stage > 1:
        yield Problem(
            "deepspeed.zero_optimization.stage",
            f"{stage}, and parallel.pipeline is {draft.parallel.pipeline}: a stage adds up the gradients of all its "
            "micro-batches before they are reduced, so they cannot be divided",
            "Set it to 0 or 1, or parallel.pipeline to 1",
        )


@rule("parallel", "deepspeed")
def pipeline_excludes_deepspeed_profilers(draft: Draft) -> Iterator[Problem]:
    assert draft.parallel is not None
    assert draft.deepspeed is not None
    settings = draft.deepspeed.model_dump(exclude_unset=True)
    profiler = settings.get("flops_profiler")
    for key, is_enabled in (
        ("wall_clock_breakdown", settings.get("wall_clock_breakdown")),
        ("flops_profiler.enabled", isinstance(profiler, dict) and profiler.get("enabled")),
    ):
        if draft.parallel.pipeline > 1 and is_enabled:
            yield Problem(f"deepspeed.{key}", "true, and DeepSpeed's timers fail on the stages of a pipeline",
                          "Set it to false; metrics.jsonl has pipeline_bubble and step_seconds")  # fmt: skip


@rule("parallel")
def pipeline_stages_consistent(draft: Draft) -> Iterator[Problem]:
    assert draft.parallel is not None
    parallel = draft.parallel
    layers, weights = parallel.pipeline_layers, parallel.pipeline_weights
    if layers is not None and len(layers) != parallel.stages:
        yield Problem("parallel.pipeline_layers", f"{layers} names {len(layers)} stages, and with parallel.pipeline = "
                      f"{parallel.pipeline} there are {parallel.stages}")  # fmt: skip
    if weights is not None and len(weights) != parallel.pipeline:
        yield Problem("parallel.pipeline_weights", f"{weights} names {len(weights)} ranks, and parallel.pipeline is "
                      f"{parallel.pipeline}")  # fmt: skip
    if layers is not None and weights is not None:
        yield Problem("parallel.pipeline_weights", "pipeline_layers says already how many layers each stage has",
                      "Leave one of the two out")  # fmt: skip


@rule("parallel", "data.packing", "deepspeed.train_batch_size", "deepspeed.train_micro_batch_size_per_gpu",
      "deepspeed.gradient_accumulation_steps")  # fmt: skip
def dualpipev_requirements_met(draft: Draft) -> Iterator[Problem]:
    assert draft.parallel is not None
    assert draft.data is not None
    assert draft.deepspeed is not None
    stages = draft.parallel.pipeline
    if draft.parallel.pipeline_schedule != "dualpipev":
        return
    if stages == 1:
        yield Problem("parallel.pipeline_schedule", "'dualpipev', and parallel.pipeline is 1: nothing is divided",
                      "Set parallel.pipeline")  # fmt: skip
    if draft.data.packing == "none":
        yield Problem("parallel.pipeline_schedule", "'dualpipev' sends micro-batches of one shape, and with "
                      "data.packing 'none' they have many", "Set packing to 'concatenate', or take '1f1b'")  # fmt: skip
    batch = batch_arithmetic(draft.deepspeed, draft.data_ranks) if draft.data_ranks else None
    if isinstance(batch, Batch) and batch.accumulation_steps < 2 * stages:
        reason = f"'dualpipev' on {stages} ranks takes at least {2 * stages} micro-batches"
        reason += f", and there are {batch.accumulation_steps}"
        yield Problem("parallel.pipeline_schedule", reason, "Make them smaller, or take '1f1b'")


def _largest_divisor_below(number: int, bound: int) -> int:
    """The largest divisor of `number` that is less than `bound` (at least 2); a loop over its square root at most."""
    small = [size for size in range(1, min(bound, math.isqrt(number) + 1)) if number % size == 0]
    return max(size for each in small for size in (each, number // each) if size < bound)


@rule("parallel", "model")
def attention_heads_divisible_by_tensor(draft: Draft) -> Iterator[Problem]:
    assert draft.parallel is not None
    heads = draft.facts.attention_heads if draft.facts else None
    ranks = draft.parallel.tensor
    if draft.facts and heads and heads % ranks:
        fits = _largest_divisor_below(heads, ranks)
        yield Problem(
            "parallel.tensor",
            f"{ranks} ranks cannot share the {heads} attention heads of {draft.facts.model_type}",
            f"The largest size below that works is {fits}",
        )


@rule("parallel", "deepspeed.optimizer")
def optimizer_supports_tensor_parallel(draft: Draft) -> Iterator[Problem]:
    assert draft.parallel is not None
    assert draft.deepspeed is not None
    section = draft.deepspeed.optimizer
    if draft.parallel.tensor > 1 and section is not None and section.type.lower() in ("muon", "adafactor"):
        yield Problem(
            "deepspeed.optimizer.type",
            f"{section.type} computes with whole matrices, and under parallel.tensor = {draft.parallel.tensor} a rank "
            "has a part of each: the update would be another one",
            "Take AdamW, or set parallel.tensor to 1",
        )


@rule("deepspeed.optimizer", "parallel.tensor")
def legacy_fusion_excludes_tensor_parallel(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    assert draft.parallel is not None
    optimizer = draft.deepspeed.optimizer
    if optimizer is not None and optimizer.legacy_fusion and draft.parallel.tensor > 1:
        yield Problem(
            "deepspeed.optimizer.legacy_fusion",
            f"true, and parallel.tensor is {draft.parallel.tensor}: its norm misses what other tensor ranks hold",
            "Leave it out",
        )


@rule("parallel", "data.sequence_length")
def sequence_length_divisible_by_tensor(draft: Draft) -> Iterator[Problem]:
    assert draft.parallel is not None
    assert draft.data is not None
    if not draft.parallel.sequence_parallel:
        return
    ranks, length = draft.parallel.tensor, draft.data.sequence_length
    if ranks == 1:
        yield Problem("parallel.sequence_parallel", "true, and parallel.tensor is 1: no ranks share a sequence",
                      "Set parallel.tensor, or sequence_parallel to false")  # fmt: skip
    elif length % ranks:
        yield Problem("data.sequence_length", f"{length} cannot be divided by parallel.tensor = {ranks}, as "
                      "sequence_parallel demands", f"Take {length - length % ranks}")  # fmt: skip


@rule("parallel")
def world_size_divisible_by_model_parallel_size(draft: Draft) -> Iterator[Problem]:
    assert draft.parallel is not None
    replica = draft.parallel.tensor * draft.parallel.pipeline
    if draft.world_size is not None and draft.world_size % replica:
        yield Problem("parallel", f"{draft.world_size} processes cannot be divided by tensor x pipeline = {replica}")


@rule("parallel", "deepspeed.train_batch_size", "deepspeed.train_micro_batch_size_per_gpu",
      "deepspeed.gradient_accumulation_steps")  # fmt: skip
def batch_sizes_consistent(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    if draft.data_ranks is not None:
        batch = batch_arithmetic(draft.deepspeed, draft.data_ranks)
        if isinstance(batch, Problem):
            yield batch
