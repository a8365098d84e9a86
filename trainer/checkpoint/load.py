"""Loading this rank's state from a checkpoint that any layout has written."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.checkpoint_format import MODEL_ROLES, WEIGHT, ChunkReader, Manifest, TensorChunk
from trainer.engine import ScalarState, TrainingState
from trainer.errors import CheckpointError


@torch.no_grad()
def load_state(state: TrainingState, manifest: Manifest, folder: Path) -> None:
    """Replace all tensors of an engine's state; `load_scalar_state` must follow.

    Files are mapped, so no host memory is needed in addition to the state.

    Raises:
        CheckpointError: the checkpoint lacks a tensor of this rank, or has it in another shape.
    """
    with_state = {name for name, role in manifest.tensors if role not in MODEL_ROLES}
    if with_state:
        state.allocate_optimizer_state()
        state.drop_optimizer_state({name for name, role in manifest.tensors if role == WEIGHT} - with_state)
    reader = ChunkReader(folder)
    for chunk in sorted(state.local_chunks(), key=lambda chunk: (chunk.name, chunk.role, chunk.offsets)):
        # A weight that no step has updated has no optimizer state, and keeps the initial one.
        if chunk.role in MODEL_ROLES or chunk.name in with_state or (chunk.name, chunk.role) in manifest.tensors:
            _load_chunk(chunk, manifest, reader, folder)


def scalar_state_of(manifest: Manifest) -> ScalarState:
    """Return the engine's non-tensor state."""
    return ScalarState(**manifest.scalar_state)


def _load_chunk(chunk: TensorChunk, manifest: Manifest, reader: ChunkReader, folder: Path) -> None:
    label = f"{chunk.role} of {chunk.name}"
    stored = manifest.tensors.get((chunk.name, chunk.role))
    if stored is None:
        raise CheckpointError(f"{folder}: missing {label}")
    if stored.shape != chunk.shape:
        raise CheckpointError(f"{folder}: {label}: expected shape {list(chunk.shape)}, got {list(stored.shape)}")
    missing = chunk.tensor.numel() - reader.read(stored, chunk.offsets, chunk.tensor)
    if missing:
        raise CheckpointError(f"{folder}: {missing} elements of {label} are missing")
