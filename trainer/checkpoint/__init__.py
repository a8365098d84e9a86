"""Checkpoints that any layout writes and any layout reads."""

from trainer.checkpoint.find import model_folder, refuse_run_directory, tokenizer_folder
from trainer.checkpoint.look import resumed_checkpoint
from trainer.checkpoint.run import NOTHING_YET, Checkpoints, Progress

__all__ = [
    "NOTHING_YET",
    "Checkpoints",
    "Progress",
    "model_folder",
    "refuse_run_directory",
    "resumed_checkpoint",
    "tokenizer_folder",
]
