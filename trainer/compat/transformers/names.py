"""Supported versions of transformers, and the internal names in use."""

from __future__ import annotations

from trainer.compat.guard import Dependency, Names

REQUIRED: dict[str, Names] = {}

TRANSFORMERS = Dependency("transformers", ">=5.17,<5.24", REQUIRED)
