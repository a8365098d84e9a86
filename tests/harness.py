"""Runs functions on several real processes, and commands as users type them, a few seconds a time."""

from __future__ import annotations

from tools.ranks import Finished, run_command, run_ranks
from trainer.distributed import free_port

__all__ = ["Finished", "free_port", "run_command", "run_ranks"]
