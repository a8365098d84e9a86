"""A model's Hugging Face configuration, read without running code of the model folder and without reading weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.checkpoint_format import MANIFEST, is_checkpoint, read_manifest
from trainer.compat import check_names
from trainer.compat.transformers.configuration import build_config
from trainer.compat.transformers.names import CONFIGURATION, TRANSFORMERS
from trainer.config.model_sizes import relation_problems, size_problems
from trainer.config.paths import refuse_special_files
from trainer.config.tasks import DEFAULT_TASK, TASK_FAMILIES
from trainer.errors import CheckpointError, ConfigError, Problem, first_line, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from trainer.config.schema import ModelSection

DANGEROUS_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines", "quantization_config")
"""Keys of a config.json that name code to download and run, or that change what the weights are."""

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of a config.json that mark quantized weights: transformers', an earlier one of compressed-tensors, MLX's."""

DANGEROUS_PREFIXES = ("_attn_implementation", "_experts_implementation", "_name_or_path")

_COMMON_KEYS = frozenset(
    (
        "model_type",
        "architectures",
        "dtype",
        "output_router_logits",
        "rope_theta",
        "rope_scaling",
        "partial_rotary_factor",
        "initializer_range",
    )
)
"""Keys that every family takes, though not every configuration class lists them."""


def scrub(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return `raw` without the keys, at any depth, that make transformers run code (CVE-2026-4372)."""
    return {
        key: scrub(value) if isinstance(value, Mapping) else value
        for key, value in raw.items()
        if key not in DANGEROUS_KEYS and not key.startswith(DANGEROUS_PREFIXES)
    }


def model_classes(task: str) -> Mapping[type[PreTrainedConfig], Any]:
    """Return the task's model class by configuration class. A lookup imports the code of that family only."""
    from transformers.models.auto import modeling_auto

    classes: Mapping[type[PreTrainedConfig], Any] = getattr(modeling_auto, TASK_FAMILIES[task].mapping)
    return classes


def _config_class(raw: Mapping[str, Any], source: str, task: str) -> type[PreTrainedConfig]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    check_names(TRANSFORMERS, CONFIGURATION)
    key, name = f"{source}.model_type", raw.get("model_type")
    if not isinstance(name, str):
        raise ConfigError(Problem(key, f"expected a model type, got {name!r}", 'For example "llama"'))
    if name not in CONFIG_MAPPING:
        suggestion = suggest(name, CONFIG_MAPPING.keys())
        remedy = "If a package of yours registers it, name the package in run.plugins (its code runs)"
        reason = f"transformers has no model type '{name}'{suggestion}"
        raise ConfigError(Problem(key, reason, "" if suggestion else remedy))
    config_class: type[PreTrainedConfig] = CONFIG_MAPPING[name]
    if config_class not in model_classes(task):
        families = TASK_FAMILIES[task]
        raise ConfigError(Problem(key, f"'{name}' has no {families.noun} in transformers", families.remedy))
    return config_class


def _unknown_keys(raw: Mapping[str, Any], config_class: type[PreTrainedConfig], source: str) -> Iterator[Problem]:
    fields = dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ()
    known = {field.name for field in fields} | set(config_class().to_dict()) | set(config_class.attribute_map)
    known |= _COMMON_KEYS
    for key in raw:
        if key not in known:
            reason = f"unknown key for model type '{config_class.model_type}'{suggest(key, known)}"
            yield Problem(f"{source}.{key}", reason)


def _inline_config(raw: Mapping[str, Any], task: str) -> PreTrainedConfig:
    source = "model.config"
    if dangerous := sorted(set(raw) - set(scrub(raw))):
        reason = "not accepted, because it can make transformers run code"
        raise ConfigError(Problem(f"{source}.{key}", reason, "Remove it") for key in dangerous)
    config_class = _config_class(raw, source, task)
    try:
        problems = list(_unknown_keys(raw, config_class, source))
    except Exception:  # a class without defaults cannot be built empty; its constructor reports what is missing
        problems = []
    if problems:
        raise ConfigError(problems)
    return _checked_config(config_class, raw, source)


def _checked_config(config_class: type[PreTrainedConfig], raw: Mapping[str, Any], source: str) -> PreTrainedConfig:
    if problems := list(size_problems(raw, source)):
        raise ConfigError(problems)
    config = _build(config_class, raw, source)
    if problems := list(relation_problems(config, raw, source)):
        raise ConfigError(problems)
    return config


def _build(config_class: type[PreTrainedConfig], raw: Mapping[str, Any], source: str) -> PreTrainedConfig:
    try:
        return build_config(config_class, raw)
    except Exception as error:  # each family's validators raise their own exceptions
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        field = next((line.split("'")[1] for line in lines if line.startswith("Validation error for field")), "")
        reason = lines[-1] if lines else type(error).__name__
        raise ConfigError(Problem(f"{source}.{field}" if field else source, reason)) from None


def _checkpointed_config(folder: Path) -> Mapping[str, Any]:
    try:
        raw: Mapping[str, Any] = read_manifest(folder).model["config"]
    except CheckpointError as error:
        raise ConfigError(Problem("model.path", str(error), "Choose another checkpoint")) from None
    return raw


def load_model_config(path: str, task: str = DEFAULT_TASK, *, weights_are_read: bool = False) -> PreTrainedConfig:
    """Load the configuration of a model folder, a checkpoint, or a repository on the hub.

    Args:
        path: Folder, or name on the hub.
        task: `model.task`, for which the family must have a model.
        weights_are_read: Refuse a configuration that marks its weights as quantized. With random weights they do not
            matter.

    Raises:
        ConfigError: There is no configuration, or transformers does not accept it.
    """
    folder = Path(path).expanduser()
    is_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if is_local and not folder.is_dir():
        raise ConfigError(Problem("model.path", f"'{path}' does not exist", "Set it to a folder or a name on the hub"))
    refuse_special_files(folder, "model.path")
    if is_checkpoint(folder):
        return parse_model_config(_checkpointed_config(folder), f"{path}/{MANIFEST}", task)
    raw = _read_config_json(path, folder)
    if weights_are_read and (quantization := _quantization_method(raw)) is not None:
        key, method = quantization
        raise ConfigError(
            Problem(
                "model.path",
                f"the weights in '{path}' are quantized, and only unquantized weights can be trained "
                f"({path}/config.json: {key} has {method})",
                "Dequantize the model and save it with `save_pretrained`, or use the unquantized repository; with "
                "model.initialize 'random' only the sizes are used",
            )
        )
    return parse_model_config(raw, f"{path}/config.json", task)


def _read_config_json(path: str, folder: Path) -> Mapping[str, Any]:
    from transformers import PreTrainedConfig

    if folder.is_dir() and not (folder / "config.json").is_file():
        remedy = "Set it to a Hugging Face model folder or a checkpoint"
        raise ConfigError(Problem("model.path", f"'{path}' holds no config.json", remedy))
    try:
        raw, _ = PreTrainedConfig.get_config_dict(str(folder) if folder.is_dir() else path)
    except Exception as error:  # errors of the network, the hub and JSON
        detail = "" if folder.is_dir() else f"is not a folder in {Path.cwd()}, and as a name on the hub it "
        reason = f"'{path}' {detail}cannot be read: {first_line(error).rstrip('.')}"
        raise ConfigError(Problem("model.path", reason, "Check the name, the network, or the folder")) from None
    return raw


def _quantization_method(raw: Mapping[str, Any], above: str = "") -> tuple[str, str] | None:
    """Return the key and the method that mark quantized weights, at any depth; None if there are none."""
    for name, value in raw.items():
        key = f"{above}.{name}" if above else name
        if name in QUANTIZATION_KEYS and value:
            method = value.get("quant_method", value.get("quant_algo")) if isinstance(value, Mapping) else value
            return key, f"quant_method {method!r}" if method else "no quant_method"
        if isinstance(value, Mapping) and (nested := _quantization_method(value, key)) is not None:
            return nested
    return None


def parse_model_config(raw: Mapping[str, Any], source: str, task: str = DEFAULT_TASK) -> PreTrainedConfig:
    """Build the configuration of a stored model, without keys that could run code.

    Args:
        raw: Content of its config.json.
        source: File or key that `raw` comes from, for messages.
        task: `model.task`, for which the family must have a model.

    Raises:
        ConfigError: The type is unknown, or does not accept a value.
    """
    clean = scrub(raw)
    return _checked_config(_config_class(clean, source, task), clean, source)


def model_config(section: ModelSection) -> PreTrainedConfig:
    """Return the Hugging Face configuration of the model, without keys that could run code.

    Raises:
        ConfigError: The folder has no config.json, or its type is unknown, or does not accept a key or value.
    """
    if section.path is None:
        config = _inline_config(section.config or {}, section.task)
    else:
        config = load_model_config(section.path, section.task, weights_are_read=section.initialize != "random")
    config.use_cache = False
    return config
