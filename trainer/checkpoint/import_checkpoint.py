"""From other formats to a checkpoint that a run begins with: weights, at step 0, without an optimizer's state."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor, nn

from trainer.checkpoint.retention import CHECKPOINTS, checkpoint_name, update_pointers
from trainer.checkpoint.writer import CheckpointWriter, sort_by_element_size
from trainer.checkpoint_format import BUFFER, WEIGHT, Manifest, WriteItem
from trainer.config import LoadedConfig
from trainer.engine import ScalarState
from trainer.errors import CheckpointError, ConfigError, Problem
from trainer.fault_tolerance.run_lock import RunLock
from trainer.model import build_model, describe_model, read_weights
from trainer.run_directory import run_metadata


def import_checkpoint(source: Path, loaded: LoadedConfig) -> Path:
    """Writes the first checkpoint of the run that `loaded` describes. In a world of one process, with the model in
    memory whole.

    Args:
        source: a Hugging Face folder, or a folder into which DeepSpeed has saved a plain data-parallel run.

    Raises:
        ConfigError: if `source` is neither, or holds other weights than the model's, or the run has checkpoints or is
            being trained.
        CheckpointError: if DeepSpeed's files hold more than tensors and its own settings, or are damaged.
    """
    lock = RunLock.acquire(Path(loaded.config.run.output_dir).expanduser())
    try:
        return _import_checkpoint(source, loaded)
    finally:
        lock.release()


def _import_checkpoint(source: Path, loaded: LoadedConfig) -> Path:
    folder = Path(loaded.config.run.output_dir).expanduser() / CHECKPOINTS
    if folder.is_dir() and any(folder.glob("step-*")):
        raise ConfigError(Problem("run.output_dir", f"{folder} holds checkpoints", "Take another folder"))
    model, allow = build_model(loaded), loaded.config.model.allow_unexpected_keys
    if (source / "config.json").is_file():
        read_weights(model, str(source), allow_unexpected_keys=allow)
    elif any(source.rglob("*_model_states.pt")):
        with tempfile.TemporaryDirectory(dir=source.parent) as plain:
            _convert(source, Path(plain))
            read_weights(model, plain, allow_unexpected_keys=allow)
    else:
        reason = f"{source} is neither a Hugging Face folder (config.json) nor one of DeepSpeed's (*_model_states.pt)"
        raise ConfigError(Problem("import", reason, "Give the folder that holds these files"))
    manifest = Manifest(
        step=0,
        attempt=0,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tokens=0,
        samples=0,
        losses={},
        config=loaded.resolved(),
        about={**run_metadata(loaded), "imported_from": str(source)},
        model=describe_model(model),
        data={},
        wandb_run=None,
        numbers=vars(ScalarState.initial()),
        files=(),
        tensors={},
    )
    CheckpointWriter(folder / checkpoint_name(0), 0).write(sort_by_element_size(_entries(model)), manifest)
    update_pointers(folder)
    return folder / checkpoint_name(0)


def _convert(source: Path, into: Path) -> None:
    """DeepSpeed's pickles become safetensors, in a process of its own that can make nothing but tensors."""
    reader = Path(__file__).with_name("deepspeed_to_safetensors.py")
    ended = subprocess.run(
        [sys.executable, str(reader), str(source), str(into / "model.safetensors")],
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        said = (ended.stderr.strip().splitlines() or ["no word"])[-1]
        raise CheckpointError(f"{source}: {said}")


def _entries(model: nn.Module) -> Iterator[WriteItem]:
    persistent = model.state_dict(keep_vars=True)
    named: list[tuple[str, str, Tensor]] = [(name, WEIGHT, p) for name, p in model.named_parameters()]
    named += [(name, BUFFER, buffer) for name, buffer in model.named_buffers() if name in persistent]
    for name, role, tensor in named:
        yield WriteItem(name, role, tuple(tensor.shape), (0,) * tensor.ndim, tensor.detach())
