"""Importing weights of other formats as the first checkpoint of a run: at step 0, without optimizer state."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor, nn

from trainer.checkpoint.retention import update_pointers
from trainer.checkpoint.saved import checkpoint_name
from trainer.checkpoint.writer import CheckpointWriter, sort_by_element_size
from trainer.checkpoint_format import BUFFER, WEIGHT, Manifest, TensorChunk
from trainer.config import LoadedConfig
from trainer.engine import ScalarState
from trainer.errors import CheckpointError, ConfigError, Problem
from trainer.fault_tolerance.run_lock import RunLock
from trainer.model import build_model, describe_model, read_weights
from trainer.run_layout import CHECKPOINTS
from trainer.run_metadata import run_metadata


def import_checkpoint(source: Path, loaded: LoadedConfig) -> Path:
    """Write the first checkpoint of the run that `loaded` describes.

    Call it in a world of one process; the whole model is in memory.

    Args:
        source: A Hugging Face folder, or a folder into which DeepSpeed has saved a data-parallel run.
        loaded: Configuration of the run.

    Returns:
        The folder of the checkpoint.

    Raises:
        ConfigError: `source` is neither, or holds other weights than the model's; the run has checkpoints, or is being
            trained.
        CheckpointError: DeepSpeed's files are damaged, or contain more than tensors and DeepSpeed's own settings.
    """
    lock = RunLock.acquire(Path(loaded.config.run.output_dir).expanduser())
    try:
        return _import_checkpoint(source, loaded)
    finally:
        lock.release()


def _import_checkpoint(source: Path, loaded: LoadedConfig) -> Path:
    folder = Path(loaded.config.run.output_dir).expanduser() / CHECKPOINTS
    if folder.is_dir() and any(folder.glob("step-*")):
        raise ConfigError(Problem("run.output_dir", f"{folder} holds checkpoints", "Choose another folder"))
    model = build_model(loaded)
    with _hugging_face_folder(source) as weights:
        read_weights(model, str(weights), allow_unexpected_keys=loaded.config.model.allow_unexpected_keys)
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
        trackers={},
        scalar_state=vars(ScalarState.initial()),
        files=(),
        tensors={},
    )
    CheckpointWriter(folder / checkpoint_name(0), 0).write(sort_by_element_size(_model_chunks(model)), manifest)
    update_pointers(folder)
    return folder / checkpoint_name(0)


@contextmanager
def _hugging_face_folder(source: Path) -> Iterator[Path]:
    """Yield a folder with the weights in Hugging Face's format: `source`, or a temporary folder with converted ones."""
    if (source / "config.json").is_file():
        yield source
    elif any(source.rglob("*_model_states.pt")):
        with tempfile.TemporaryDirectory(dir=source.parent) as folder:
            _convert(source, Path(folder))
            yield Path(folder)
    else:
        reason = f"{source} is neither a Hugging Face folder (config.json) nor one of DeepSpeed's (*_model_states.pt)"
        raise ConfigError(Problem("import", reason, "Name the folder that holds these files"))


def _convert(source: Path, target: Path) -> None:
    """Convert DeepSpeed's pickles to safetensors, in a separate process that can create nothing but tensors."""
    script = Path(__file__).with_name("deepspeed_to_safetensors.py")
    result = subprocess.run(
        [sys.executable, str(script), str(source), str(target / "model.safetensors")],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        message = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise CheckpointError(f"{source}: {message}")


def _model_chunks(model: nn.Module) -> Iterator[TensorChunk]:
    persistent = model.state_dict(keep_vars=True)
    tensors: list[tuple[str, str, Tensor]] = [(name, WEIGHT, p) for name, p in model.named_parameters()]
    tensors += [(name, BUFFER, buffer) for name, buffer in model.named_buffers() if name in persistent]
    for name, role, tensor in tensors:
        yield TensorChunk(name, role, tuple(tensor.shape), (0,) * tensor.ndim, tensor.detach())
