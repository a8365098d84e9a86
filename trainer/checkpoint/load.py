"""Reads of a checkpoint what this rank holds, whatever layout wrote it."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.engine import ScalarState, TensorChunk, TrainingState
from trainer.errors import CheckpointError
from trainer.store import MODEL_KINDS, WEIGHT, Files, Manifest


@torch.no_grad()
def fill(state: TrainingState, manifest: Manifest, folder: Path) -> None:
    """Replaces all tensors of an engine's state; `complete` is then to follow. Host memory beside it: none, files are
    mapped.

    Raises:
        CheckpointError: if the checkpoint lacks something that this rank holds, or has it in another shape.
    """
    stepped = {name for name, kind in manifest.tensors if kind not in MODEL_KINDS}
    if stepped:
        state.allocate_optimizer_state()
        state.drop_optimizer_state({name for name, kind in manifest.tensors if kind == WEIGHT} - stepped)
    files = Files(folder)
    for piece in sorted(state.local_chunks(), key=lambda piece: (piece.name, piece.kind, piece.start)):
        _fill(piece, manifest, files, folder, has_state=piece.name in stepped)


def numbers_of(manifest: Manifest) -> ScalarState:
    """What is no tensor."""
    return ScalarState(**manifest.numbers)


def _fill(piece: TensorChunk, manifest: Manifest, files: Files, folder: Path, *, has_state: bool) -> None:
    stored = manifest.tensors.get((piece.name, piece.kind))
    if stored is None:
        if piece.kind not in MODEL_KINDS and not has_state:
            return  # never stepped: it stays as the optimizer has made it
        raise CheckpointError(f"{folder}: has no {piece.kind} of {piece.name}")
    if stored.shape != piece.shape:
        raise CheckpointError(
            f"{folder}: {piece.kind} of {piece.name} is {list(stored.shape)}, and the model's is {list(piece.shape)}"
        )
    found = files.read(stored, piece.start, piece.view)
    if found != piece.view.numel():
        raise CheckpointError(
            f"{folder}: {piece.view.numel() - found} elements of {piece.kind} of {piece.name} are missing"
        )
