"""Warnings: configurations that are allowed and probably not intended."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.deepspeed import Batch, batch_arithmetic
from trainer.config.rules.registry import Draft
from trainer.errors import Problem


def configuration_warnings(draft: Draft) -> Iterator[Problem]:
    """What is allowed and probably not meant."""
    section, training = draft.deepspeed, draft.training
    if section is not None and training is not None and section.scheduler is not None:
        total = section.scheduler.params.get("total_num_steps")
        if isinstance(total, int) and draft.steps is not None and total < draft.steps:
            yield Problem(
                "deepspeed.scheduler.params.total_num_steps",
                f"{total} is less than {draft.steps_in_words}: the last steps have the lowest rate",
                'Write "auto"',
            )
    yield from _pipeline_bubble_warning(draft)
    yield from _verification_warning(draft)
    if section is not None and section.offload_device == "nvme" and draft.checkpoint and draft.checkpoint.asynchronous:
        yield Problem(
            "checkpoint.asynchronous", "true: it copies to host memory what offload_optimizer keeps on NVMe",
            "Leave it out where host memory has no room for the optimizer's state",
        )  # fmt: skip


def _pipeline_bubble_warning(draft: Draft) -> Iterator[Problem]:
    if draft.parallel is None or draft.deepspeed is None or draft.data_ranks is None:
        return
    batch, stages = batch_arithmetic(draft.deepspeed, draft.data_ranks), draft.parallel.pipeline
    if isinstance(batch, Batch) and batch.accumulation_steps < stages:
        share = draft.parallel.bubble(batch.accumulation_steps)
        yield Problem(
            "deepspeed.gradient_accumulation_steps",
            f"{batch.accumulation_steps} micro-batches on {stages} stages: each stage waits for {share:.0%} "
            "of the time",
            "Make micro-batches smaller, so that there are at least 4 for each stage",
        )


def _verification_warning(draft: Draft) -> Iterator[Problem]:
    training, parallel, section = draft.training, draft.parallel, draft.deepspeed
    if training is None or parallel is None or section is None or not training.verify_every_steps:
        return
    is_partitioned, tensor = section.zero_stage == 3, parallel.tensor
    if is_partitioned and tensor > 1:
        yield Problem(
            "training.verify_every_steps",
            "ZeRO 3 keeps one copy of each weight on the data ranks: only weights that tensor ranks share are compared",
        )
    elif tensor == parallel.pipeline == 1 and (is_partitioned or draft.data_ranks == 1):
        reason = "ZeRO 3 keeps one copy of each weight" if is_partitioned else "there is one rank"
        yield Problem("training.verify_every_steps", f"{reason}: there is nothing to compare", "Leave it out")
