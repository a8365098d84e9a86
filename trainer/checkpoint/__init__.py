"""Checkpoints that any layout writes and any layout reads."""

from trainer.checkpoint.run import NOTHING_YET, Checkpoints, Progress

__all__ = ["NOTHING_YET", "Checkpoints", "Progress"]
