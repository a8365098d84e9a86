"""Finds the weights of a run that are asked for by name: its final model, or one of its checkpoints."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from trainer.checkpoint.retention import (
    CHECKPOINTS,
    SavedCheckpoint,
    best_checkpoints,
    checkpoint_name,
    list_checkpoints,
)
from trainer.checkpoint_format import is_checkpoint, run_tokenizer_folder, verify_files
from trainer.config.earlier_versions import stored_run
from trainer.errors import CheckpointError, ConfigError, Problem

log = logging.getLogger(__name__)

FINAL = "final"
_STEP = re.compile(r"step-(\d{1,18})")


def model_folder(run: Path, checkpoint: str | None = None) -> Path:
    """The folder with the weights of a run.

    Args:
        run: its directory. checkpoint: `final`, `latest`, `best` (lowest validation loss) or `step-N`; default: `final`
            if the run has finished, else `latest`. Of `latest`, a damaged one is named and the previous one taken.

    Raises:
        ConfigError: if `run` is no run directory, or `checkpoint` none of these words.
        CheckpointError: if the run has no such checkpoint, or it is damaged.
    """
    _refuse_other_folders(run)
    has_final = (run / FINAL / "config.json").is_file()
    checkpoint = checkpoint or (FINAL if has_final else "latest")
    if checkpoint == FINAL:
        if not has_final:
            raise CheckpointError(f"{run}: there is no final model: the run has not finished. Take --checkpoint latest")
        return run / FINAL
    kept, damaged = list_checkpoints(run / CHECKPOINTS)
    for error in damaged:
        log.warning("%s", error)
    return _named(run, kept, checkpoint)


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of the weights in a folder is: in it, or beside the run's checkpoints."""
    return run_tokenizer_folder(folder) if is_checkpoint(folder) else folder


def refuse_run_directory(path: Path) -> None:
    """Raise ConfigError if `path`, given as a model's folder, is the directory of a run."""
    if not is_checkpoint(path) and stored_run(path) is not None:
        raise ConfigError(Problem("--path", f"'{path}' is the directory of a run", f"Give --run {path}"))


def _refuse_other_folders(run: Path) -> None:
    if is_checkpoint(run):
        remedy = f"Give --run {run.absolute().parent.parent} --checkpoint {run.name}"
        raise ConfigError(Problem("--run", f"'{run}' is a checkpoint, not the directory of a run", remedy))
    if not run.is_dir():
        raise ConfigError(Problem("--run", f"'{run}' is not a folder", "Give the run.output_dir of a run"))
    if not (run / CHECKPOINTS).is_dir() and not (run / FINAL).is_dir():
        has_model = (run / "config.json").is_file()
        remedy = f"Give --path {run}" if has_model else "Give the run.output_dir of a run"
        raise ConfigError(Problem("--run", f"'{run}' has neither a final model nor checkpoints", remedy))


def _named(run: Path, kept: list[SavedCheckpoint], checkpoint: str) -> Path:
    if checkpoint == "latest":
        return _newest_valid(run, kept)
    step = _STEP.fullmatch(checkpoint)
    if checkpoint == "best":
        chosen = best_checkpoints(kept)
    elif step is not None:
        chosen = [one for one in kept if one.folder.name == checkpoint_name(int(step[1]))]
    else:
        raise ConfigError(Problem("--checkpoint", f"expected latest, best, final or step-N, got '{checkpoint}'"))
    if not chosen:
        names = [one.folder.name for one in kept]
        reason = "no checkpoint whose step was evaluated" if checkpoint == "best" else f"no checkpoint {checkpoint}"
        raise CheckpointError(f"{run}: there is {reason}. There are: {', '.join(names) or 'none'}")
    verify_files(chosen[0].folder, chosen[0].manifest)
    return chosen[0].folder


def _newest_valid(run: Path, kept: list[SavedCheckpoint]) -> Path:
    for one in kept:
        try:
            verify_files(one.folder, one.manifest)
        except CheckpointError as error:
            log.warning("%s; taking the previous checkpoint", error)
        else:
            return one.folder
    raise CheckpointError(f"{run}: there is no sound checkpoint")
