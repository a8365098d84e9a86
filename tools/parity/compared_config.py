"""The user's configuration, reduced to the compared keys."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tools.parity.gradient_proof import LARGEST, _signature
from tools.parity.shrink import shrunk
from tools.parity.text import shortened
from trainer.config import strict_json
from trainer.config.load import LoadedConfig, check_config
from trainer.config.model_config import model_config, scrub
from trainer.config.read import apply_override, read_config_file
from trainer.errors import ConfigError, Problem, first_line
from trainer.model import build_model, check_model, initialize_weights

STEPS = 3
"""Optimizer steps of a comparison."""

SHRUNK_LENGTH = 32
"""Tokens of a sequence with `--shrink`."""

SHRUNK_SAMPLES = 2
"""Samples of a micro-batch with `--shrink`."""

SHRINK_THRESHOLD = 1_000_000
"""Number of parameters from which a model is shrunk."""

RawConfig = dict[str, Any]


_LAYOUT_KEYS = ("tensor", "pipeline", "pipeline_schedule", "pipeline_layers", "pipeline_weights", "sequence_parallel")
"""Keys of the parallel section that a layout sets."""


@dataclass
class ComparedConfig:
    """The user's configuration as it is compared, and the changes made to it."""

    raw: RawConfig
    samples: int
    """Samples of a micro-batch, unless a layout sets them."""

    notes: list[str] = field(default_factory=list)


def prepare(path: Path, overrides: list[str], *, shrink: bool) -> ComparedConfig:
    """Read the user's file and keep the keys that the comparison needs: model, plan, loss, ZeRO.

    Raises:
        ConfigError: with every mistake in the model and the sections that are used; for a model that cannot be
            shrunk.
    """
    raw = read_config_file(path)
    for assignment in overrides:
        apply_override(raw, assignment)
    if isinstance(raw.get("deepspeed"), str):
        raw["deepspeed"] = strict_json.read(Path(raw["deepspeed"]).expanduser())
    notes = _only_what_is_used(raw)
    value = raw.get("deepspeed")
    section = value if isinstance(value, dict) else {}
    notes += _in_fp32(section)
    micro = section.get("train_micro_batch_size_per_gpu")
    samples = SHRUNK_SAMPLES if shrink else micro if isinstance(micro, int) and micro > 0 else 1
    raw["deepspeed"] = deepspeed_section(_zero(section, notes), 1, 1, samples, (1.0, 1.0))
    loaded = check_config(raw, world_size=1, device="cpu")
    shape = build_model(loaded)
    check_model(shape, loaded)
    if shrink:
        left_out = [key for key in ("learning_rate_scales", "weight_decay_exclude") if raw["training"].pop(key, None)]
        notes += [f"ignored: training.{key}, whose names may not exist in the small model" for key in left_out]
        notes.append(_shrink(raw, loaded, shape))
    return ComparedConfig(raw, samples, notes)


def _only_what_is_used(raw: RawConfig) -> list[str]:
    for name in ("tracking", "evaluation"):
        if isinstance(raw.get(name), dict):
            del raw[name]
    if isinstance(raw.get("data"), dict):  # the files may not exist on this machine
        for key in ("validation", "tokenizer", "cache_dir"):
            raw["data"].pop(key, None)
        raw["data"]["train"] = [{"path": "builtin:python-stdlib"}]
    if isinstance(raw.setdefault("run", {}), dict):
        raw["run"]["output_dir"] = tempfile.gettempdir()
    if isinstance(raw.setdefault("training", {}), dict):
        raw["training"].pop("epochs", None)
        raw["training"]["max_steps"] = STEPS
    if isinstance(raw.setdefault("parallel", {}), dict):
        for key in _LAYOUT_KEYS:
            raw["parallel"].pop(key, None)
    model = raw.get("model")
    attention = model.get("attention") if isinstance(model, dict) else None
    if isinstance(attention, str) and attention.startswith("fl"):  # kernels of GPUs, or slow to compile
        del raw["model"]["attention"]
        return [f"attention: the default of the family instead of {attention}, which is for GPUs"]
    return []


def _in_fp32(section: RawConfig) -> list[str]:
    half = [key for key in ("bf16", "fp16") if isinstance(part := section.get(key), dict) and part.get("enabled")]
    return [f"precision: fp32 instead of {half[0]}, in which rounding would hide differences"] if half else []


def _zero(section: RawConfig, notes: list[str]) -> RawConfig:
    """Return the file's `zero_optimization` without offload, which is about memory."""
    value = section.get("zero_optimization")
    zero = dict(value) if isinstance(value, dict) else {}
    left_out = [key for key in ("offload_optimizer", "offload_param") if zero.pop(key, None)]
    if left_out:
        notes.append(f"ignored: {', '.join(left_out)}")
    return zero


def deepspeed_section(
    zero: RawConfig, micro_batches: int, accumulation: int, samples: int, sgd: tuple[float, float]
) -> RawConfig:
    """Return the `deepspeed` section of a comparison.

    Args:
        zero: Section `zero_optimization`.
        micro_batches: Micro-batches of a global batch, over all data ranks.
        accumulation: Micro-batches of one data rank.
        samples: Samples of a micro-batch.
        sgd: Learning rate, and the norm to clip at.
    """
    rate, clipping = sgd
    return {
        "train_batch_size": micro_batches * samples,
        "train_micro_batch_size_per_gpu": samples,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "SGD", "params": {"lr": rate}},
        "gradient_clipping": clipping,
        "zero_optimization": zero,
    }


def _shrink(raw: RawConfig, loaded: LoadedConfig, shape: PreTrainedModel) -> str:
    """Replace the user's model by a small one. Return a note about it."""
    size, model_type = sum(p.numel() for p in shape.parameters()), shape.config.model_type
    raw["data"]["sequence_length"] = min(SHRUNK_LENGTH, loaded.facts.max_positions or SHRUNK_LENGTH)
    raw["model"]["initialize"] = "random"
    if size <= SHRINK_THRESHOLD:
        return f"shrink: {model_type} with {size:,} parameters is small already"
    config, small = _smallest(model_config(loaded.config.model), shape, loaded)
    raw["model"] = {key: value for key, value in raw["model"].items() if key not in ("path", "config")}
    raw["model"]["config"] = config
    return f"shrink: {model_type} with {small:,} parameters instead of {size:,}, and the same types of layers"


def _fails(model: PreTrainedModel, loaded: LoadedConfig) -> str:
    """Return why the model, which is on the meta device, cannot compute; empty if it can."""
    initialize_weights(model, loaded.config.run.seed)
    try:
        with torch.no_grad():
            model(input_ids=torch.arange(SHRUNK_LENGTH).unsqueeze(0) % loaded.facts.vocabulary_size, use_cache=False)
    except Exception as error:  # inconsistent sizes raise different types in different families
        return f"{type(error).__name__}: {error}"
    return ""


def _smallest(config: Any, shape: PreTrainedModel, loaded: LoadedConfig) -> tuple[RawConfig, int]:
    """Return a small configuration with the same types of modules and parameters, and its size.

    An infinity, which JSON cannot express, is left to the family's default.
    """
    reasons = []
    try:
        for candidate in shrunk(config):
            whole = json.loads(candidate.to_json_string(use_diff=False))
            inline = scrub({key: value for key, value in whole.items() if "__float__" not in json.dumps(value)})
            section = loaded.config.model.model_copy(update={"path": None, "config": inline, "initialize": "random"})
            small_config = loaded.config.model_copy(update={"model": section})
            try:
                small_loaded = LoadedConfig(small_config, loaded.facts, loaded.batch, 1, {})
                small = build_model(small_loaded)
                check_model(small, small_loaded)
            except ConfigError as refusal:
                reasons.append(str(refusal.problems[0]))
                continue
            count = sum(parameter.numel() for parameter in small.parameters())
            if _signature(small) != _signature(shape):
                reasons.append("the small model has other layers")
            elif count > LARGEST:
                reasons.append(f"the small model still has {count:,} parameters")
            elif reason := _fails(small, loaded):
                reasons.append(reason)
            else:
                return inline, count
    except Exception as error:  # the families' constructors raise many types
        reasons.append(first_line(error))
    raise ConfigError(
        Problem(
            "--shrink",
            f"'{shape.config.model_type}' cannot be made small: {shortened(reasons[0], 200)}",
            "Omit --shrink, and set smaller sizes with --set model.config.KEY=N",
        )
    )
