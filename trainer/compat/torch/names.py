"""Supported versions of torch, and the internal names in use."""

from __future__ import annotations

from trainer.compat.guard import Dependency, Names

REQUIRED: dict[str, Names] = {}

TORCH = Dependency("torch", ">=2.10,<2.14", REQUIRED)
