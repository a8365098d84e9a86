"""Reading `config.json` of a run directory, whatever its state."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, TypeGuard

from trainer.checkpoint_format import MANIFEST
from trainer.errors import ConfigError, Problem

log = logging.getLogger(__name__)


def is_non_negative_int(value: object) -> TypeGuard[int]:
    """Return whether a decoded value is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_run_config(path: Path) -> dict[str, Any] | None:
    """Return the content of a run directory's `config.json`.

    Returns:
        None if it is absent, or damaged while the directory has checkpoints, which hold the configuration too.

    Raises:
        ConfigError: It is damaged, and there is no checkpoint.
    """
    reason = "it is not the configuration of a run"
    try:
        stored = json.loads((path / "config.json").read_bytes())
    except FileNotFoundError:
        return None
    except RecursionError:
        reason = "it is nested too deeply"
    except (OSError, ValueError) as error:
        reason = str(error)
    else:
        if isinstance(stored, dict) and all(isinstance(stored.get(name), dict) for name in ("run", "data")):
            return stored
    if any(path.glob(f"checkpoints/step-*/{MANIFEST}")):
        log.warning("%s/config.json is damaged (%s); using the configuration of its checkpoints", path, reason)
        return None
    problem = f"{path}/config.json cannot be read: {reason}"
    raise ConfigError(Problem("run.output_dir", problem, "Choose another folder"))
