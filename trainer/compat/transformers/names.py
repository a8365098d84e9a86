"""Supported versions of transformers, and the internal names in use."""

from __future__ import annotations

from trainer.compat.guard import Dependency, Names

CONFIGURATION = "configuration"

_CONFIGURATION: Names = {
    "transformers.configuration_utils.PreTrainedConfig": {
        "_decode_special_floats": "reading infinity, which config.json encodes as an object",
    },
}

_MODEL: Names = {
    "transformers.modeling_utils.PreTrainedModel": {
        "_supports_sdpa": "choosing the default attention implementation",
    },
}

REQUIRED: dict[str, Names] = {CONFIGURATION: _CONFIGURATION, "model": _MODEL}

TRANSFORMERS = Dependency("transformers", ">=5.17,<5.24", REQUIRED)
