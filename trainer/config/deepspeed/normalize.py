"""Normalization of DeepSpeed sections from files of other trainers.

Three rewrites that do not change what is computed: aliases of DeepSpeed's keys, unsupported keys with a value that
disables them, and `"enabled": "auto"` of a precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from trainer.config.deepspeed.unsupported import UNSUPPORTED
from trainer.errors import Problem

Raw = dict[str, Any]

ZERO_ALIASES: Mapping[str, str] = {
    name: field.alias for name, field in DeepSpeedZeroConfig.model_fields.items() if field.alias and field.alias != name
}
"""Key by alias. DeepSpeed accepts both, such as `prefetch_bucket_size` for `stage3_prefetch_bucket_size`."""


def _is_off(value: object) -> bool:
    return value is False or value is None


def _is_disabled(value: object) -> bool:
    """Return whether a value is false, null, or an object with `"enabled": false` or `"auto"`."""
    return _is_off(value) or (isinstance(value, Mapping) and value.get("enabled", True) in (False, "auto"))


def _enables_nothing(value: object) -> bool:
    """Return whether a value is off, or a non-empty object of which every value is off."""
    return _is_off(value) or (isinstance(value, Mapping) and bool(value) and all(map(_is_off, value.values())))


def _enables_no_monitor(value: object) -> bool:
    """Return whether no tracker is enabled in `monitor_config`, which LLaMA-Factory writes and DeepSpeed ignores."""
    parts = [part for part in value.values() if isinstance(part, Mapping)] if isinstance(value, Mapping) else []
    return _is_off(value) or (bool(parts) and all(map(_is_disabled, parts)))


_NEUTRAL: Mapping[str, Callable[[Any], bool]] = {
    "activation_checkpointing": _enables_nothing,
    "comms_config": _enables_nothing,
    "monitor_config": _enables_no_monitor,
    "sequence_parallel_size": lambda value: _is_off(value) or (value == 1 and value is not True),
    "tensor_parallel": lambda value: _is_disabled(value) or value in ({"autotp_size": 0}, {"autotp_size": 1}),
}
"""Whether a value has no effect, by unknown or unsupported key. For other unsupported keys: `_is_disabled`."""


def normalize_section(section: Mapping[str, Any], device: str | None) -> Raw:
    """Return the section with equivalent keys and values of the schema.

    Args:
        section: The section as read from files; it need not be valid.
        device: Device that the run computes on; None if it is unknown.
    """
    result = {key: value for key, value in section.items() if not _is_neutral(key, value)}
    zero = result.get("zero_optimization")
    if isinstance(zero, Mapping):
        result["zero_optimization"] = {
            key if (name := ZERO_ALIASES.get(key, key)) in zero else name: value
            for key, value in zero.items()
            if not _is_neutral(f"zero_optimization.{key}", value)
        }
    _resolve_precision(result, device)
    return result


def _is_neutral(key: str, value: object) -> bool:
    if key in _NEUTRAL:
        return _NEUTRAL[key](value)
    return key in UNSUPPORTED and _is_disabled(value)


def _resolve_precision(section: Raw, device: str | None) -> None:
    """Resolve `"auto"`: fp16 is off; bf16 is on if the device supports it and fp16 is not enabled."""
    fp16 = section.get("fp16")
    wants_fp16 = isinstance(fp16, Mapping) and fp16.get("enabled") is True
    for name, value in (("fp16", False), ("bf16", not wants_fp16 and has_bf16(device))):
        part = section.get(name)
        if isinstance(part, Mapping) and part.get("enabled") == "auto":
            section[name] = {**part, "enabled": value}


def fp32_fallback_warnings(section: Mapping[str, Any], normal: Mapping[str, Any]) -> list[Problem]:
    """Warn where `"auto"` became false because the device lacks bf16; `normal` is `normalize_section(section)`."""

    def enabled(part: object) -> object:
        return part.get("enabled") if isinstance(part, Mapping) else None

    if enabled(section.get("bf16")) != "auto" or enabled(normal.get("bf16")) or enabled(normal.get("fp16")):
        return []
    reason = '"auto" is false, because this device does not support bf16: the run computes in fp32'
    return [Problem("deepspeed.bf16.enabled", reason, "Set fp16.enabled to true for half precision")]


def has_bf16(device: str | None) -> bool:
    """Return whether the device supports bf16; an unknown one is assumed to."""
    return device is None or bool(get_accelerator().is_bf16_supported())
