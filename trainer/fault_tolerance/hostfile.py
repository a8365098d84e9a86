"""Refusal of a missing hostfile, with which DeepSpeed trains on one host after a warning."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import ConfigError, Problem
from trainer.fault_tolerance.ancestors import find_ancestors

_OPTIONS = ("--hostfile", "-H")


def refuse_missing_hostfile(script: str) -> None:
    """Check the hostfile of the `deepspeed` command that started this rank.

    Args:
        script: Path of the training script as on this rank's command line; the arguments after it are not DeepSpeed's.

    Raises:
        ConfigError: the hostfile does not exist, and DeepSpeed has started ranks on this host only.
    """
    ancestors = find_ancestors()
    runner, launcher = ancestors.runner, ancestors.launcher
    if runner is None or launcher is None:
        return
    hostfile = _find_hostfile_option(runner.command, script)
    if hostfile is None or _decode_hosts(launcher.command) != ["localhost"]:
        return
    if not os.path.isfile(Path(f"/proc/{runner.pid}/cwd") / hostfile):
        reason = f"{hostfile} is not a file, and DeepSpeed would train on this host only"
        raise ConfigError(Problem("--hostfile", reason, "Give the path of a hostfile, or omit --hostfile"))


def _find_hostfile_option(command: Sequence[str], script: str) -> str | None:
    """Find the last hostfile named before the script."""
    words = list(command[: command.index(script)] if script in command else command)
    hostfile = None
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word in _OPTIONS:
            hostfile = value
        for option in ("--hostfile=", "-H"):
            if word.startswith(option) and word not in _OPTIONS:
                hostfile = word.removeprefix(option)
    return hostfile


def _decode_hosts(command: Sequence[str]) -> list[str]:
    """Decode the hosts from the command line of launch.py."""
    for word in command:
        if word.startswith("--world_info="):
            try:
                return list(json.loads(base64.urlsafe_b64decode(word.partition("=")[2])))
            except ValueError:
                return []
    return []
