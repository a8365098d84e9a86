"""Warnings: configurations that are valid and probably not intended."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.deepspeed import Batch, DeepSpeedSection, batch_arithmetic
from trainer.config.rules.registry import Processes, TrainingLength, warning
from trainer.config.schema import CheckpointSection, ParallelSection, TrainingSection
from trainer.errors import Problem


@warning
def schedule_shorter_than_training(deepspeed: DeepSpeedSection, length: TrainingLength) -> Iterator[Problem]:
    total = deepspeed.scheduler.params.get("total_num_steps") if deepspeed.scheduler is not None else None
    if isinstance(total, int) and length.steps is not None and total < length.steps:
        reason = f"{total} is less than {length.description}: later steps have the lowest rate"
        yield Problem("deepspeed.scheduler.params.total_num_steps", reason, 'Set it to "auto"')


@warning
def pipeline_has_few_micro_batches(
    parallel: ParallelSection, deepspeed: DeepSpeedSection, processes: Processes
) -> Iterator[Problem]:
    data_ranks = processes.data_ranks(parallel, deepspeed)
    batch = None if data_ranks is None else batch_arithmetic(deepspeed, data_ranks)
    if isinstance(batch, Batch) and batch.accumulation_steps < parallel.pipeline:
        bubble = parallel.bubble(batch.accumulation_steps)
        yield Problem(
            "deepspeed.gradient_accumulation_steps",
            f"{batch.accumulation_steps} micro-batches on {parallel.pipeline} pipeline ranks: a bubble of {bubble:.0%}",
            "Lower train_micro_batch_size_per_gpu, for at least 4 micro-batches a rank",
        )


@warning
def verification_compares_little(
    training: TrainingSection, parallel: ParallelSection, deepspeed: DeepSpeedSection, processes: Processes
) -> Iterator[Problem]:
    if not training.verify_every_steps:
        return
    key, is_partitioned = "training.verify_every_steps", deepspeed.zero_stage == 3
    if is_partitioned and parallel.tensor > 1:
        reason = "compares only weights replicated over tensor ranks, because ZeRO 3 partitions them over data ranks"
        yield Problem(key, reason)
    elif parallel.model_parallel_size == 1 and (is_partitioned or processes.data_ranks(parallel, deepspeed) == 1):
        cause = "ZeRO 3 keeps one copy of each weight" if is_partitioned else "there is one rank"
        yield Problem(key, f"has nothing to compare: {cause}", "Remove it")


@warning
def asynchronous_checkpoint_copies_nvme_state(
    deepspeed: DeepSpeedSection, checkpoint: CheckpointSection
) -> Iterator[Problem]:
    if deepspeed.offload_device == "nvme" and checkpoint.asynchronous:
        yield Problem(
            "checkpoint.asynchronous",
            "copies to host memory what offload_optimizer keeps on NVMe",
            "Set it to false if host memory cannot hold the optimizer state",
        )
