"""Reads of a checkpoint what this rank holds, whatever layout wrote it."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.checkpoint_format import MODEL_ROLES, WEIGHT, ChunkReader, Manifest
from trainer.engine import ScalarState, TensorChunk, TrainingState
from trainer.errors import CheckpointError


@torch.no_grad()
def load_state(state: TrainingState, manifest: Manifest, folder: Path) -> None:
    """Replaces all tensors of an engine's state; `complete` is then to follow. Host memory beside it: none, files are
    mapped.

    Raises:
        CheckpointError: if the checkpoint lacks something that this rank holds, or has it in another shape.
    """
    stepped = {name for name, role in manifest.tensors if role not in MODEL_ROLES}
    if stepped:
        state.allocate_optimizer_state()
        state.drop_optimizer_state({name for name, role in manifest.tensors if role == WEIGHT} - stepped)
    files = ChunkReader(folder)
    for piece in sorted(state.local_chunks(), key=lambda piece: (piece.name, piece.role, piece.start)):
        _load_tensor(piece, manifest, files, folder, has_state=piece.name in stepped)


def scalar_state_of(manifest: Manifest) -> ScalarState:
    """What is no tensor."""
    return ScalarState(**manifest.numbers)


def _load_tensor(piece: TensorChunk, manifest: Manifest, files: ChunkReader, folder: Path, *, has_state: bool) -> None:
    stored = manifest.tensors.get((piece.name, piece.role))
    if stored is None:
        if piece.role not in MODEL_ROLES and not has_state:
            return  # never stepped: it stays as the optimizer has made it
        raise CheckpointError(f"{folder}: has no {piece.role} of {piece.name}")
    if stored.shape != piece.shape:
        raise CheckpointError(
            f"{folder}: {piece.role} of {piece.name} is {list(stored.shape)}, and the model's is {list(piece.shape)}"
        )
    found = files.read(stored, piece.start, piece.view)
    if found != piece.view.numel():
        raise CheckpointError(
            f"{folder}: {piece.view.numel() - found} elements of {piece.role} of {piece.name} are missing"
        )
