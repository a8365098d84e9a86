"""Checkpoints that any layout writes and any layout reads."""

from trainer.checkpoint.context import CheckpointContext, RunRecord, checkpoint_group
from trainer.checkpoint.locate import model_folder, refuse_run_directory, tokenizer_folder
from trainer.checkpoint.preview import preview_resume
from trainer.checkpoint.resume import Resumption, find_checkpoint, restore
from trainer.checkpoint.saver import CheckpointSaver

__all__ = [
    "CheckpointContext",
    "CheckpointSaver",
    "Resumption",
    "RunRecord",
    "checkpoint_group",
    "find_checkpoint",
    "model_folder",
    "preview_resume",
    "refuse_run_directory",
    "restore",
    "tokenizer_folder",
]
