"""What a run directory's `config.json` holds, whatever has become of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, TypeGuard

from trainer.checkpoint_format import MANIFEST
from trainer.errors import ConfigError, Problem

log = logging.getLogger(__name__)


def is_non_negative_int(value: Any) -> TypeGuard[int]:
    """Whether a value that was read is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_run_config(path: Path) -> dict[str, Any] | None:
    """What `config.json` holds; None where it is absent, or damaged beside checkpoints, which hold it too.

    Raises:
        ConfigError: it is damaged, and there is no checkpoint.
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
        log.warning("%s/config.json is damaged (%s); the run is taken from its checkpoints", path, reason)
        return None
    raise ConfigError(Problem("run.output_dir", f"{path}/config.json cannot be read: {reason}", "Take another folder"))
