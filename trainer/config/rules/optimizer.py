"""Rules about the optimizer and precision."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.deepspeed import AUTO_BUCKETS, deepspeed_class_problems, optimizer_problems
from trainer.config.rules.registry import Draft, rule
from trainer.errors import Problem


@rule("deepspeed.optimizer", "deepspeed.zero_optimization.stage", "deepspeed.zero_optimization.offload_optimizer")
def optimizer_valid(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    yield from optimizer_problems(draft.deepspeed)


@rule("deepspeed")
def deepspeed_sections_valid(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    yield from deepspeed_class_problems(draft.deepspeed)


@rule("deepspeed.zero_optimization", "model")
def auto_buckets_require_hidden_size(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    for key in AUTO_BUCKETS:
        automatic = getattr(draft.deepspeed.zero_optimization, key, None) == "auto"
        if automatic and draft.facts is not None and draft.facts.hidden_size is None:
            yield Problem(
                f"deepspeed.zero_optimization.{key}",
                f"\"auto\" follows the hidden size, and '{draft.facts.model_type}' has no single one",
                "Give the value",
            )


@rule("deepspeed.zero_optimization", "deepspeed.gradient_clipping")
def clipping_requires_grad_norm(draft: Draft) -> Iterator[Problem]:
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
def muon_supported(draft: Draft) -> Iterator[Problem]:
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
def bf16_excludes_fp16(draft: Draft) -> Iterator[Problem]:
    section = draft.deepspeed
    assert section is not None
    if section.bf16 is not None and section.bf16.enabled and section.fp16 is not None and section.fp16.enabled:
        yield Problem("deepspeed", "bf16.enabled and fp16.enabled are both true", "Turn one of them off")


@rule("deepspeed.bf16", "deepspeed.zero_optimization.stage")
def half_precision_states_require_zero(draft: Draft) -> Iterator[Problem]:
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
def data_types_match_precision(draft: Draft) -> Iterator[Problem]:
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


@rule("deepspeed.optimizer", "deepspeed.zero_optimization.offload_optimizer", "deepspeed.fp16")
def device_supported(draft: Draft) -> Iterator[Problem]:
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


@rule("deepspeed.fp16", "deepspeed.zero_optimization.stage")
def fp16_requires_zero(draft: Draft) -> Iterator[Problem]:
    section = draft.deepspeed
    assert section is not None
    if section.precision == "fp16" and section.zero_stage == 0:
        yield Problem(
            "deepspeed.fp16.enabled",
            "at ZeRO stage 0 DeepSpeed 0.19 divides gradients by a loss scale that it has not multiplied the loss by",
            "Set zero_optimization.stage to 1 or more, or bf16.enabled instead",
        )
