"""What no single key can see: rules across sections, in one table. Each has a failing example in the tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.config.deepspeed import (
    AUTO_BUCKETS,
    Batch,
    DeepSpeedSection,
    batch_arithmetic,
    class_problems,
    nvme_can_be_read,
    optimizer_problems,
    scheduler_problems,
    smallest_data_ranks,
)
from trainer.config.deepspeed.section import OptimizerSection
from trainer.config.model_facts import NEVER_CAUSAL, ModelFacts
from trainer.config.paths import has_splits, is_local, matching_files, only_tokens, problems_of_path
from trainer.config.schema import (
    DEFAULT_CACHE,
    CheckpointSection,
    DataSection,
    EvaluationSection,
    ModelSection,
    ParallelSection,
    RunSection,
    TrackingSection,
    TrainingSection,
)
from trainer.errors import Problem

Device = Literal["cpu", "cuda"]


@dataclass
class Draft:
    """A configuration under examination: a section is None where it cannot be built."""

    run: RunSection | None = None
    model: ModelSection | None = None
    data: DataSection | None = None
    training: TrainingSection | None = None
    deepspeed: DeepSpeedSection | None = None
    parallel: ParallelSection | None = None
    evaluation: EvaluationSection | None = None
    checkpoint: CheckpointSection | None = None
    tracking: TrackingSection | None = None
    facts: ModelFacts | None = None
    world: int | None = None
    """Number of processes; None when it is open (a dry run)."""

    device: Device | None = None
    """Where the run will compute; None when that is not known here (a dry run)."""

    @property
    def data_ranks(self) -> int | None:
        """Ranks of the data axis; None when the world cannot be divided that way."""
        assert self.parallel is not None
        assert self.deepspeed is not None
        replica = self.parallel.tensor * self.parallel.pipeline
        if self.world is None:
            return smallest_data_ranks(self.deepspeed)
        return self.world // replica if self.world % replica == 0 else None


@dataclass(frozen=True)
class Rule:
    """One relation between keys that must hold."""

    name: str
    needs: tuple[str, ...]
    """Dotted prefixes of what the rule reads; it is skipped where one of them is wrong in itself."""

    check: Callable[[Draft], Iterator[Problem]]


RULES: list[Rule] = []


def rule(*needs: str) -> Callable[[Callable[[Draft], Iterator[Problem]]], Callable[[Draft], Iterator[Problem]]]:
    """Adds a check to the table, under its function's name."""

    def add(check: Callable[[Draft], Iterator[Problem]]) -> Callable[[Draft], Iterator[Problem]]:
        RULES.append(Rule(check.__name__, needs, check))
        return check

    return add


@rule("model")
def model_is_named_once(draft: Draft) -> Iterator[Problem]:
    assert draft.model is not None
    if (draft.model.path is None) == (draft.model.config is None):
        found = "neither" if draft.model.path is None else "both"
        yield Problem("model", f"either 'path' or 'config' says what the model is; {found} is given")
    if draft.model.path is None and draft.model.initialize == "pretrained":
        yield Problem(
            "model.initialize",
            "'pretrained' needs weights, and an inline 'config' has none",
            "Set model.path, or initialize to 'random'",
        )


@rule("model")
def family_is_causal(draft: Draft) -> Iterator[Problem]:
    assert draft.model is not None
    kind = draft.facts.model_type if draft.facts else None
    if kind in NEVER_CAUSAL:
        where = "model.config.model_type" if draft.model.path is None else "model.path"
        yield Problem(where, f"'{kind}' sees later tokens, so it cannot be trained as a causal language model: it "
                      f"{NEVER_CAUSAL[kind]}", "Take another family")  # fmt: skip


@rule("parallel", "deepspeed.zero_optimization.stage")
def pipeline_keeps_gradients(draft: Draft) -> Iterator[Problem]:
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
def profilers_know_no_stages(draft: Draft) -> Iterator[Problem]:
    assert draft.parallel is not None
    assert draft.deepspeed is not None
    given = draft.deepspeed.model_dump(exclude_unset=True)
    profiler = given.get("flops_profiler")
    for key, on in (
        ("wall_clock_breakdown", given.get("wall_clock_breakdown")),
        ("flops_profiler.enabled", isinstance(profiler, dict) and profiler.get("enabled")),
    ):
        if draft.parallel.pipeline > 1 and on:
            yield Problem(f"deepspeed.{key}", "true, and DeepSpeed's timers fail on the stages of a pipeline",
                          "Set it to false; metrics.jsonl has pipeline_bubble and step_seconds")  # fmt: skip


@rule("parallel")
def stages_are_described_once(draft: Draft) -> Iterator[Problem]:
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


@rule("data.packing", "data.drop_last")
def last_sample_can_be_dropped(draft: Draft) -> Iterator[Problem]:
    assert draft.data is not None
    if draft.data.drop_last and draft.data.packing == "none":
        yield Problem("data.drop_last", "true, and under data.packing 'none' no sample is cut off a source",
                      "Set it to false, or packing to 'concatenate'")  # fmt: skip


@rule("parallel", "data.packing", "deepspeed.train_batch_size", "deepspeed.train_micro_batch_size_per_gpu",
      "deepspeed.gradient_accumulation_steps")  # fmt: skip
def two_ways_need_micro_batches(draft: Draft) -> Iterator[Problem]:
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
    if isinstance(batch, Batch) and batch.accumulation < 2 * stages:
        reason = f"'dualpipev' on {stages} ranks takes at least {2 * stages} micro-batches"
        reason += f", and there are {batch.accumulation}"
        yield Problem("parallel.pipeline_schedule", reason, "Make them smaller, or take '1f1b'")


@rule("parallel", "model")
def heads_divide(draft: Draft) -> Iterator[Problem]:
    assert draft.parallel is not None
    heads = draft.facts.heads if draft.facts else None
    ranks = draft.parallel.tensor
    if draft.facts and heads and heads % ranks:
        fits = max(size for size in range(1, ranks) if heads % size == 0)
        yield Problem(
            "parallel.tensor",
            f"{ranks} ranks cannot share the {heads} attention heads of {draft.facts.model_type}",
            f"The largest size below that works is {fits}",
        )


@rule("parallel", "deepspeed.optimizer")
def optimizer_sees_parts(draft: Draft) -> Iterator[Problem]:
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


@rule("parallel", "data.sequence_length")
def sequence_divides(draft: Draft) -> Iterator[Problem]:
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
def world_divides(draft: Draft) -> Iterator[Problem]:
    assert draft.parallel is not None
    replica = draft.parallel.tensor * draft.parallel.pipeline
    if draft.world is not None and draft.world % replica:
        yield Problem("parallel", f"{draft.world} processes cannot be divided by tensor x pipeline = {replica}")


@rule("parallel", "deepspeed.train_batch_size", "deepspeed.train_micro_batch_size_per_gpu",
      "deepspeed.gradient_accumulation_steps")  # fmt: skip
def batch_comes_out(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    if draft.data_ranks is not None:
        batch = batch_arithmetic(draft.deepspeed, draft.data_ranks)
        if not isinstance(batch, Batch):
            yield batch


@rule("deepspeed.optimizer", "deepspeed.zero_optimization.stage", "deepspeed.zero_optimization.offload_optimizer")
def optimizer_exists(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    yield from optimizer_problems(draft.deepspeed)


@rule("deepspeed.scheduler")
def scheduler_exists(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    yield from scheduler_problems(draft.deepspeed)


@rule("deepspeed.scheduler", "deepspeed.optimizer")
def automatic_peak_has_a_rate(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    if draft.deepspeed.scheduler is None or draft.deepspeed.optimizer is None:
        return
    wanted = draft.deepspeed.scheduler.params.get("warmup_max_lr") == "auto"
    if wanted and "lr" not in draft.deepspeed.optimizer.params:
        yield Problem(
            "deepspeed.scheduler.params.warmup_max_lr",
            '"auto" takes optimizer.params.lr, which is missing',
            "Give one of the two",
        )


@rule("deepspeed.zero_optimization", "model")
def automatic_buckets_have_a_size(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    for key in AUTO_BUCKETS:
        automatic = getattr(draft.deepspeed.zero_optimization, key, None) == "auto"
        if automatic and draft.facts is not None and draft.facts.hidden_size is None:
            yield Problem(
                f"deepspeed.zero_optimization.{key}",
                f"\"auto\" follows the hidden size, and '{draft.facts.model_type}' has no single one",
                "Give the value",
            )


@rule("deepspeed")
def deepspeed_classes_agree(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    yield from class_problems(draft.deepspeed)


@rule("deepspeed.zero_optimization", "deepspeed.gradient_clipping")
def clipping_needs_the_norm(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    computed = getattr(draft.deepspeed.zero_optimization, "compute_grad_norm", None)
    if computed is False and draft.deepspeed.clipping > 0:
        yield Problem(
            "deepspeed.zero_optimization.compute_grad_norm",
            f"false, and gradients are to be clipped at a norm of {draft.deepspeed.clipping}",
            "Set gradient_clipping to 0, or leave this out",
        )
    if computed is False and draft.deepspeed.offload_device != "none":
        path = "deepspeed.zero_optimization.compute_grad_norm"
        yield Problem(path, "false, which DeepSpeed refuses beside offload_optimizer", "Leave one of them out")


@rule("deepspeed", "parallel")
def muon_has_its_gradients(draft: Draft) -> Iterator[Problem]:
    section, parallel = draft.deepspeed, draft.parallel
    assert section is not None
    assert parallel is not None
    if section.optimizer is None or section.optimizer.type.lower() != "muon":
        return
    if getattr(section.zero_optimization, "compute_grad_norm", None) is False:
        path = "deepspeed.zero_optimization.compute_grad_norm"
        yield Problem(path, "false, and Muon's update is computed with the norm", "Leave it out")
    if section.precision != "bf16" or section.offload_device != "none":
        return
    reason = "with this precision and ZeRO stage DeepSpeed 0.19 has no Muon"
    if parallel.pipeline > 1 and section.zero_stage == 0:
        yield Problem("deepspeed.optimizer.type", f"{reason} in a pipeline", "Set zero_optimization.stage to 1")
    if section.zero_stage == 1 and getattr(section.data_types, "grad_accum_dtype", None) == "fp32":
        remedy = "Leave data_types.grad_accum_dtype out, or set zero_optimization.stage to 2"
        yield Problem("deepspeed.optimizer.type", f"{reason} that accumulates gradients in fp32", remedy)


@rule("deepspeed.bf16", "deepspeed.fp16")
def one_precision(draft: Draft) -> Iterator[Problem]:
    section = draft.deepspeed
    assert section is not None
    if section.bf16 is not None and section.bf16.enabled and section.fp16 is not None and section.fp16.enabled:
        yield Problem("deepspeed", "bf16.enabled and fp16.enabled are both true", "Turn one of them off")


@rule("deepspeed.bf16", "deepspeed.zero_optimization.stage")
def half_precision_states_need_zero(draft: Draft) -> Iterator[Problem]:
    section = draft.deepspeed
    assert section is not None
    for name in ("bf16", "fp16"):
        part = getattr(section, name)
        key = f"{name}_master_weights_and_grads"
        if part is not None and getattr(part, key) and section.zero_stage == 0:
            yield Problem(f"deepspeed.{name}.{key}", "needs zero_optimization.stage 1, 2 or 3, and the stage is 0")
    bf16 = section.bf16
    if bf16 is not None and bf16.bf16_optimizer_states and not bf16.bf16_master_weights_and_grads:
        yield Problem("deepspeed.bf16.bf16_optimizer_states", "needs bf16_master_weights_and_grads")


@rule("deepspeed.data_types", "deepspeed.bf16", "deepspeed.fp16", "deepspeed.zero_optimization.stage")
def data_types_agree(draft: Draft) -> Iterator[Problem]:
    section = draft.deepspeed
    assert section is not None
    types = section.data_types
    if types is None:
        return
    if types.param_dtype not in (None, section.precision):
        yield Problem(
            "deepspeed.data_types.param_dtype",
            f"'{types.param_dtype}' is not the precision of the run, '{section.precision}'",
            "Leave it out",
        )
    if types.grad_accum_dtype not in (None, section.precision) and section.zero_stage == 0:
        yield Problem(
            "deepspeed.data_types.grad_accum_dtype",
            f"'{types.grad_accum_dtype}' beside precision "
            f"'{section.precision}' needs zero_optimization.stage 1 or more",
        )


@rule("deepspeed.zero_optimization")
def offload_fits_the_stage(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    zero = draft.deepspeed.zero_optimization
    stage = draft.deepspeed.zero_stage
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        part = getattr(zero, key, None)
        device = getattr(part, "device", None) or "none"
        path = f"deepspeed.zero_optimization.{key}"
        if device != "none" and stage < least:
            yield Problem(path, f"needs stage {least} or more, and the stage is {stage}")
        elif device == "nvme" and key == "offload_param":
            reason = "'nvme': DeepSpeed 0.19 reads a parameter from there again that it already has, and ends"
            yield Problem(f"{path}.device", reason, "Take 'cpu' here, and 'nvme' for offload_optimizer")


@rule("deepspeed.zero_optimization")
def state_can_be_saved(draft: Draft) -> Iterator[Problem]:
    """What no checkpoint could hold is told now, not at the first one."""
    assert draft.deepspeed is not None
    zero = draft.deepspeed.zero_optimization
    path = "deepspeed.zero_optimization"
    ratio = getattr(getattr(zero, "offload_optimizer", None), "ratio", None)
    if ratio is not None and ratio < 1:
        reason = f"{ratio}: the part of the state that stays on the device cannot be put into checkpoints"
        yield Problem(f"{path}.offload_optimizer.ratio", reason, "Leave it out")
    if getattr(getattr(zero, "offload_optimizer", None), "super_offload", None):
        reason = "true: its state is in another process and cannot be put into checkpoints"
        yield Problem(f"{path}.offload_optimizer.super_offload", reason, "Leave it out")
    if getattr(zero, "zenflow", None) is not None:
        yield Problem(f"{path}.zenflow", "its state cannot be put into checkpoints", "Leave it out")


_NVME_BUFFERS = 4
"""DeepSpeed's default."""


@rule("deepspeed.zero_optimization", "deepspeed.optimizer")
def nvme_is_there(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    part = getattr(draft.deepspeed.zero_optimization, "offload_optimizer", None)
    path = "deepspeed.zero_optimization.offload_optimizer"
    if part is None or part.device != "nvme":
        return
    folder, here = part.nvme_path, draft.device is not None
    if draft.deepspeed.zero_stage != 3:
        yield Problem(f"{path}.device", "'nvme' needs stage 3", "Take 'cpu', or stage 3")
    elif folder is None:
        yield Problem(f"{path}.nvme_path", "missing", "Name a folder on the NVMe disk")
    elif here and not (Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        yield Problem(f"{path}.nvme_path", f"{folder} is no folder that can be written to", "Make it, or name another")
    elif here and not nvme_can_be_read():
        yield Problem(
            f"{path}.device", "'nvme': DeepSpeed's async_io cannot be compiled here, for want of libaio's headers",
            "Install libaio-dev (on Red Hat libaio-devel), or take 'cpu'",
        )  # fmt: skip
    ways, buffers = 1 + bool(part.pipeline_read) + bool(part.pipeline_write), part.buffer_count or _NVME_BUFFERS
    states = 1 if draft.deepspeed.optimizer and draft.deepspeed.optimizer.type.lower() in ("adagrad", "lion") else 2
    if buffers < (least := (states + 2) * ways):
        yield Problem(
            f"{path}.buffer_count",
            f"{buffers}: weights, gradients and {states} moments of {ways} sub-groups are in memory at a time",
            f"Take at least {least}",
        )


@rule("deepspeed.optimizer", "deepspeed.zero_optimization.offload_optimizer", "deepspeed.fp16")
def device_can(draft: Draft) -> Iterator[Problem]:
    section = draft.deepspeed
    assert section is not None
    if draft.device != "cpu":
        return
    if section.precision == "fp16":
        yield Problem("deepspeed.fp16.enabled", "DeepSpeed has no fp16 on CPUs", "Set bf16.enabled instead")
    name = section.optimizer.type.lower() if section.optimizer else ""
    if name == "lion" and section.offload_device == "none":
        yield Problem(
            "deepspeed.optimizer.type",
            "on CPUs DeepSpeed has Lion only with offload",
            'Set zero_optimization {"stage": 1, "offload_optimizer": {"device": "cpu"}}',
        )


@rule("deepspeed.optimizer", "parallel.tensor")
def legacy_fusion_sees_all_ranks(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    assert draft.parallel is not None
    optimizer = draft.deepspeed.optimizer
    if optimizer is not None and optimizer.legacy_fusion and draft.parallel.tensor > 1:
        yield Problem(
            "deepspeed.optimizer.legacy_fusion",
            f"true, and parallel.tensor is {draft.parallel.tensor}: its norm misses what other tensor ranks hold",
            "Leave it out",
        )


@rule("deepspeed.fp16", "deepspeed.zero_optimization.stage")
def fp16_needs_zero(draft: Draft) -> Iterator[Problem]:
    section = draft.deepspeed
    assert section is not None
    if section.precision == "fp16" and section.zero_stage == 0:
        yield Problem(
            "deepspeed.fp16.enabled",
            "at ZeRO stage 0 DeepSpeed 0.19 divides gradients by a loss scale that it has not multiplied the loss by",
            "Set zero_optimization.stage to 1 or more, or bf16.enabled instead",
        )


@rule("model", "data.sequence_length")
def sequence_fits_the_model(draft: Draft) -> Iterator[Problem]:
    assert draft.data is not None
    if draft.facts and draft.facts.positions and draft.data.sequence_length > draft.facts.positions:
        yield Problem(
            "data.sequence_length",
            f"{draft.data.sequence_length} is longer than the {draft.facts.positions} positions of the model",
            "Shorten it, or raise max_position_embeddings in model.config",
        )
    only = draft.facts.only_length if draft.facts else None
    if draft.facts and only and draft.data.sequence_length != only:
        yield Problem(
            "data.sequence_length",
            f"must be {only}, the product of axial_pos_shape, which {draft.facts.model_type} is trained on "
            f"(got {draft.data.sequence_length})",
            "Change one of them, or set axial_pos_embds in model.config to false",
        )


@rule("data")
def data_exists(draft: Draft) -> Iterator[Problem]:
    assert draft.data is not None
    for split in ("train", "validation"):
        for place, source in enumerate(getattr(draft.data, split)):
            yield from problems_of_path(f"data.{split}.{place}.path", source.path)


@rule("data")
def validation_is_held_out(draft: Draft) -> Iterator[Problem]:
    assert draft.data is not None
    trained: set[Path] = set()
    for source in draft.data.train:
        if is_local(source.path):
            trained.update(f.resolve() for f in matching_files(source.path))
    for place, source in enumerate(draft.data.validation):
        held_out = matching_files(source.path) if is_local(source.path) else []
        both = [f for f in held_out if f.resolve() in trained and not has_splits(f)]
        if both:
            yield Problem(
                f"data.validation.{place}.path",
                f"'{both[0]}' is also trained on",
                "Validate on files that data.train does not match",
            )


@rule("data.validation")
def validation_has_no_weights(draft: Draft) -> Iterator[Problem]:
    assert draft.data is not None
    for place, source in enumerate(draft.data.validation):
        if source.weight != 1.0:
            yield Problem(
                f"data.validation.{place}.weight", f"{source.weight}: an evaluation reads everything once", "Remove it"
            )


@rule("model")
def weights_cannot_run_code(draft: Draft) -> Iterator[Problem]:
    assert draft.model is not None
    folder = Path(draft.model.path or "").expanduser()
    if draft.model.path is None or draft.model.initialize == "random" or not (folder / "config.json").is_file():
        return
    if not list(folder.glob("*.safetensors")):
        others = sorted(f.name for kind in ("*.bin", "*.pt", "*.pth") for f in folder.glob(kind))
        found = f"only {', '.join(others)}, which can run code when read" if others else "no weights"
        yield Problem(
            "model.path",
            f"'{draft.model.path}' holds no *.safetensors, {found}",
            "Convert the weights with `save_pretrained`, or set model.initialize to 'random'",
        )


@rule("data", "model")
def tokenizer_is_there(draft: Draft) -> Iterator[Problem]:
    assert draft.data is not None
    assert draft.model is not None
    name = draft.data.tokenizer
    texts = [s.path for s in (*draft.data.train, *draft.data.validation) if not only_tokens(s.path)]
    if not name and draft.model.path is None and texts and all(only_tokens(s.path) for s in draft.data.train):
        yield Problem(
            "data.tokenizer",
            f"required to read '{texts[0]}': data.train holds tokens only, on which no tokenizer can be trained",
            "Give the folder of the tokenizer that made them",
        )
    if name and name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        yield Problem("data.tokenizer", f"'{name}' is not a folder", "Give a folder with a tokenizer, or a hub name")


@rule("evaluation", "data.validation")
def evaluation_has_data(draft: Draft) -> Iterator[Problem]:
    assert draft.evaluation is not None
    assert draft.data is not None
    if draft.evaluation.every_steps and not draft.data.validation:
        yield Problem("evaluation.every_steps", "there is nothing to evaluate on", "Give data.validation")


@rule("run.output_dir", "data.cache_dir")
def output_can_be_written(draft: Draft) -> Iterator[Problem]:
    for key, folder in (
        ("run.output_dir", draft.run.output_dir if draft.run else None),
        ("data.cache_dir", (draft.data.cache_dir or DEFAULT_CACHE) if draft.data else None),
    ):
        if folder is None:
            continue
        path = Path(os.path.abspath(os.path.expanduser(folder)))
        there = next(p for p in (path, *path.parents) if p.exists())
        if not there.is_dir():
            yield Problem(key, f"'{there}' is a file", "Give a folder")
            continue
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            yield Problem(key, f"'{there}' cannot be written to: {error.strerror}", "Give another folder")


@rule("deepspeed.scheduler", "training.max_steps")
def schedule_is_long_enough(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    assert draft.training is not None
    section = draft.deepspeed.scheduler
    steps = section.params.get("total_steps") if section and section.type == "OneCycleLR" else None
    if isinstance(steps, int) and steps < draft.training.max_steps:
        yield Problem(
            "deepspeed.scheduler.params.total_steps",
            f"{steps} is less than training.max_steps ({draft.training.max_steps}); OneCycleLR takes no step beyond it",
            "Raise it",
        )


@rule("deepspeed.scheduler", "deepspeed.optimizer", "training.max_steps")
def wsd_has_its_phases(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    assert draft.training is not None
    section, optimizer = draft.deepspeed.scheduler, draft.deepspeed.optimizer
    if section is None or section.type != "WSD" or optimizer is None:
        return
    path, params = "deepspeed.scheduler.params", section.params
    total = params.get("total_num_steps")
    total = draft.training.max_steps if total == "auto" else total
    warmup, decay = params.get("warmup_num_steps", 0), params.get("decay_num_steps")
    if all(isinstance(value, int) for value in (total, warmup, decay)) and warmup + decay > total:
        yield Problem(
            f"{path}.decay_num_steps",
            f"{decay} and warmup_num_steps = {warmup} are more than total_num_steps = {total}",
            "Shorten one of them",
        )
    peaks = _peaks(params, optimizer)
    if not peaks:
        return
    source = min(peaks, key=peaks.__getitem__)
    for key in ("warmup_min_lr", "decay_min_lr"):
        least = params.get(key)
        if isinstance(least, int | float) and least > peaks[source]:
            problem = f"{least} is higher than the highest rate, {peaks[source]} ({source})"
            yield Problem(f"{path}.{key}", problem, "Lower it")


def _peaks(params: Mapping[str, Any], optimizer: OptimizerSection) -> dict[str, float]:
    """The highest rates of a `WSD`, by the key that sets them: one of all groups, or without it each group's own."""
    peak = params.get("warmup_max_lr")
    if peak is not None and peak != "auto":
        found = {"warmup_max_lr": peak}
    else:
        keys = ("muon_lr", "adam_lr") if optimizer.type.lower() == "muon" and peak is None else ("lr",)
        sources = [key if key in optimizer.params else "lr" for key in keys]
        found = {f"optimizer.params.{key}": optimizer.params.get(key) for key in sources}
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


def warnings_of(draft: Draft) -> Iterator[Problem]:
    """What is allowed and probably not meant."""
    section, training = draft.deepspeed, draft.training
    if section is not None and training is not None and section.scheduler is not None:
        total = section.scheduler.params.get("total_num_steps")
        if isinstance(total, int) and total < training.max_steps:
            yield Problem(
                "deepspeed.scheduler.params.total_num_steps",
                f"{total} is less than training.max_steps ({training.max_steps}): the last steps have the lowest rate",
                'Write "auto"',
            )
    yield from _pipeline_waits(draft)
    if section is not None and section.offload_device == "nvme" and draft.checkpoint and draft.checkpoint.asynchronous:
        yield Problem(
            "checkpoint.asynchronous", "true: it copies to host memory what offload_optimizer keeps on NVMe",
            "Leave it out where host memory has no room for the optimizer's state",
        )  # fmt: skip


def _pipeline_waits(draft: Draft) -> Iterator[Problem]:
    if draft.parallel is None or draft.deepspeed is None or draft.data_ranks is None:
        return
    batch, stages = batch_arithmetic(draft.deepspeed, draft.data_ranks), draft.parallel.pipeline
    if isinstance(batch, Batch) and batch.accumulation < stages:
        share = draft.parallel.bubble(batch.accumulation)
        yield Problem(
            "deepspeed.gradient_accumulation_steps",
            f"{batch.accumulation} micro-batches on {stages} stages: each stage waits for {share:.0%} of the time",
            "Make micro-batches smaller, so that there are at least 4 for each stage",
        )
