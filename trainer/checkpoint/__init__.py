"""Checkpoints that any layout writes and any layout reads."""

from trainer.checkpoint.locate import model_folder, refuse_run_directory, tokenizer_folder
from trainer.checkpoint.preview import preview_resume
from trainer.checkpoint.saver import Checkpoints

__all__ = [
    "Checkpoints",
    "model_folder",
    "preview_resume",
    "refuse_run_directory",
    "tokenizer_folder",
]
