"""Rules about the optimizer and the precision."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.deepspeed import AUTO_BUCKETS, DeepSpeedSection, deepspeed_class_problems, optimizer_problems
from trainer.config.model_facts import ModelFacts
from trainer.config.rules.registry import Processes, rule, rule_reading
from trainer.config.schema import ParallelSection
from trainer.errors import Problem

_ZERO = "deepspeed.zero_optimization"


@rule_reading("deepspeed.optimizer", f"{_ZERO}.stage", f"{_ZERO}.offload_optimizer")
def optimizer_valid(deepspeed: DeepSpeedSection) -> Iterator[Problem]:
    yield from optimizer_problems(deepspeed)


@rule
def deepspeed_sections_valid(deepspeed: DeepSpeedSection) -> Iterator[Problem]:
    yield from deepspeed_class_problems(deepspeed)


@rule_reading(_ZERO)
def auto_buckets_require_hidden_size(deepspeed: DeepSpeedSection, facts: ModelFacts) -> Iterator[Problem]:
    for key in AUTO_BUCKETS:
        is_auto = getattr(deepspeed.zero_optimization, key, None) == "auto"
        if is_auto and facts.hidden_size is None:
            reason = f"\"auto\" is derived from the hidden size, and '{facts.model_type}' has several"
            yield Problem(f"{_ZERO}.{key}", reason, "Set the value")


@rule_reading(_ZERO, "deepspeed.gradient_clipping")
def clipping_requires_grad_norm(deepspeed: DeepSpeedSection) -> Iterator[Problem]:
    key = f"{_ZERO}.compute_grad_norm"
    if getattr(deepspeed.zero_optimization, "compute_grad_norm", None) is not False:
        return
    if deepspeed.clipping > 0:
        reason = f"must be true, because gradients are clipped at a norm of {deepspeed.clipping} (got false)"
        yield Problem(key, reason, "Set gradient_clipping to 0, or remove this key")
    if deepspeed.offload_device != "none":
        yield Problem(key, "must be true with offload_optimizer (got false)", "Remove one of them")


@rule
def muon_supported(deepspeed: DeepSpeedSection, parallel: ParallelSection) -> Iterator[Problem]:
    if deepspeed.optimizer is None or deepspeed.optimizer.type.lower() != "muon":
        return
    if getattr(deepspeed.zero_optimization, "compute_grad_norm", None) is False:
        reason = "must be true, because Muon's update uses the norm (got false)"
        yield Problem(f"{_ZERO}.compute_grad_norm", reason, "Remove it")
    if deepspeed.precision != "bf16" or deepspeed.offload_device != "none":
        return
    key, reason = "deepspeed.optimizer.type", "DeepSpeed 0.19 does not support Muon in bf16 at this ZeRO stage"
    if parallel.pipeline > 1 and deepspeed.zero_stage == 0:
        yield Problem(key, f"{reason} in a pipeline", "Set zero_optimization.stage to 1")
    if deepspeed.zero_stage == 1 and getattr(deepspeed.data_types, "grad_accum_dtype", None) == "fp32":
        remedy = "Remove data_types.grad_accum_dtype, or set zero_optimization.stage to 2"
        yield Problem(key, f"{reason} with gradients accumulated in fp32", remedy)


@rule_reading("deepspeed.bf16", "deepspeed.fp16")
def bf16_excludes_fp16(deepspeed: DeepSpeedSection) -> Iterator[Problem]:
    bf16, fp16 = deepspeed.bf16, deepspeed.fp16
    if bf16 is not None and bf16.enabled and fp16 is not None and fp16.enabled:
        yield Problem("deepspeed", "bf16.enabled and fp16.enabled are both true", "Set one of them to false")


@rule_reading("deepspeed.bf16", f"{_ZERO}.stage")
def half_precision_states_require_zero(deepspeed: DeepSpeedSection) -> Iterator[Problem]:
    for name, section in (("bf16", deepspeed.bf16), ("fp16", deepspeed.fp16)):
        key = f"{name}_master_weights_and_grads"
        if section is not None and getattr(section, key) and deepspeed.zero_stage == 0:
            yield Problem(f"deepspeed.{name}.{key}", "requires zero_optimization.stage 1, 2 or 3 (got 0)")
    bf16 = deepspeed.bf16
    if bf16 is not None and bf16.bf16_optimizer_states and not bf16.bf16_master_weights_and_grads:
        yield Problem("deepspeed.bf16.bf16_optimizer_states", "requires bf16_master_weights_and_grads")


@rule_reading("deepspeed.data_types", "deepspeed.bf16", "deepspeed.fp16", f"{_ZERO}.stage")
def data_types_match_precision(deepspeed: DeepSpeedSection) -> Iterator[Problem]:
    types, precision = deepspeed.data_types, deepspeed.precision
    if types is None:
        return
    if types.param_dtype not in (None, precision):
        reason = f"must be the precision of the run, '{precision}' (got '{types.param_dtype}')"
        yield Problem("deepspeed.data_types.param_dtype", reason, "Remove it")
    if types.grad_accum_dtype not in (None, precision) and deepspeed.zero_stage == 0:
        yield Problem(
            "deepspeed.data_types.grad_accum_dtype",
            f"'{types.grad_accum_dtype}' with precision '{precision}' requires zero_optimization.stage 1 or higher",
        )


@rule_reading("deepspeed.optimizer", f"{_ZERO}.offload_optimizer", "deepspeed.fp16")
def device_supported(deepspeed: DeepSpeedSection, processes: Processes) -> Iterator[Problem]:
    if processes.device != "cpu":
        return
    if deepspeed.precision == "fp16":
        yield Problem("deepspeed.fp16.enabled", "DeepSpeed does not support fp16 on CPUs", "Set bf16.enabled instead")
    optimizer = deepspeed.optimizer
    if optimizer is not None and optimizer.type.lower() == "lion" and deepspeed.offload_device == "none":
        yield Problem(
            "deepspeed.optimizer.type",
            "on CPUs DeepSpeed supports Lion with offload only",
            'Set zero_optimization {"stage": 1, "offload_optimizer": {"device": "cpu"}}',
        )


@rule_reading("deepspeed.fp16", f"{_ZERO}.stage")
def fp16_requires_zero(deepspeed: DeepSpeedSection) -> Iterator[Problem]:
    if deepspeed.precision == "fp16" and deepspeed.zero_stage == 0:
        yield Problem(
            "deepspeed.fp16.enabled",
            "at ZeRO stage 0 DeepSpeed 0.19 divides the gradients by a loss scale that the loss was not multiplied by",
            "Set zero_optimization.stage to 1 or higher, or bf16.enabled instead",
        )
