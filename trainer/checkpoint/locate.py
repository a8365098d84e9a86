"""The weights of a run by name: its final model, or one of its checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from trainer.checkpoint.retention import best_checkpoints
from trainer.checkpoint.saved import SavedCheckpoint, checkpoint_name, list_checkpoints, newest_valid, parse_step
from trainer.checkpoint_format import is_checkpoint, verify_files
from trainer.config.earlier_versions import stored_run
from trainer.errors import CheckpointError, ConfigError, Problem
from trainer.run_layout import CHECKPOINTS, FINAL, run_tokenizer_folder

log = logging.getLogger(__name__)


def model_folder(run: Path, checkpoint: str | None = None) -> Path:
    """Return the folder with the weights of a run.

    Args:
        run: The run directory.
        checkpoint: `final`, `latest`, `best` (lowest validation loss) or `step-N`; default: `final` if the run has
            finished, else `latest`. If the latest is damaged, a warning names it and the previous one is used.

    Raises:
        ConfigError: `run` is not a run directory, or `checkpoint` is none of these words.
        CheckpointError: the run has no such checkpoint, or it is damaged.
    """
    _refuse_other_folders(run)
    has_final = (run / FINAL / "config.json").is_file()
    checkpoint = checkpoint or (FINAL if has_final else "latest")
    if checkpoint == FINAL:
        if not has_final:
            raise CheckpointError(f"{run}: no final model: the run has not finished. Use --checkpoint latest")
        return run / FINAL
    checkpoints, errors = list_checkpoints(run / CHECKPOINTS)
    for error in errors:
        log.warning("%s", error)
    return _named(run, checkpoints, checkpoint)


def tokenizer_folder(folder: Path) -> Path:
    """Return the folder of the tokenizer for the weights in `folder`: itself, or the run's if it is a checkpoint."""
    return run_tokenizer_folder(folder) if is_checkpoint(folder) else folder


def refuse_run_directory(path: Path) -> None:
    """Raise ConfigError if `path`, given as a model's folder, is a run directory."""
    if not is_checkpoint(path) and stored_run(path) is not None:
        raise ConfigError(Problem("--path", f"'{path}' is the directory of a run", f"Use --run {path}"))


def _refuse_other_folders(run: Path) -> None:
    if is_checkpoint(run):
        remedy = f"Use --run {run.absolute().parent.parent} --checkpoint {run.name}"
        raise ConfigError(Problem("--run", f"'{run}' is a checkpoint, not the directory of a run", remedy))
    if not run.is_dir():
        raise ConfigError(Problem("--run", f"'{run}' is not a folder", "Use the run.output_dir of a run"))
    if not (run / CHECKPOINTS).is_dir() and not (run / FINAL).is_dir():
        has_model = (run / "config.json").is_file()
        remedy = f"Use --path {run}" if has_model else "Use the run.output_dir of a run"
        raise ConfigError(Problem("--run", f"'{run}' has neither a final model nor checkpoints", remedy))


def _named(run: Path, checkpoints: Sequence[SavedCheckpoint], name: str) -> Path:
    if name == "latest":
        newest = newest_valid(checkpoints, _verified_folder)
        if newest is None:
            raise CheckpointError(f"{run}: no valid checkpoint")
        return newest
    step = parse_step(name)
    if name == "best":
        matching = best_checkpoints(checkpoints)
    elif step is not None:
        matching = [c for c in checkpoints if c.folder.name == checkpoint_name(step)]
    else:
        raise ConfigError(Problem("--checkpoint", f"expected latest, best, final or step-N, got '{name}'"))
    if not matching:
        existing = ", ".join(checkpoint.folder.name for checkpoint in checkpoints) or "none"
        reason = "no checkpoint with a validation loss" if name == "best" else f"no checkpoint {name}"
        raise CheckpointError(f"{run}: {reason} (existing: {existing})")
    return _verified_folder(matching[0])


def _verified_folder(checkpoint: SavedCheckpoint) -> Path:
    verify_files(checkpoint.folder, checkpoint.manifest)
    return checkpoint.folder
