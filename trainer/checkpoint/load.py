"""Reads of a checkpoint what this rank holds, whatever layout wrote it."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.engine import BUFFER, WEIGHT, Numbers, Piece, TrainingState
from trainer.errors import CheckpointError
from trainer.store import Files, Manifest


@torch.no_grad()
def fill(state: TrainingState, manifest: Manifest, folder: Path) -> None:
    """Replaces all tensors of an engine's state; `complete` is then to follow. Host memory beside it: none, files are
    mapped.

    Raises:
        CheckpointError: if the checkpoint lacks something that this rank holds, or has it in another shape.
    """
    state.allocate()
    stepped = {name for name, kind in manifest.tensors if kind not in (WEIGHT, BUFFER)}
    state.forget({name for name, kind in manifest.tensors if kind == WEIGHT} - stepped)
    files = Files(folder)
    for piece in sorted(state.held(), key=lambda piece: (piece.name, piece.kind, piece.start)):
        _fill(piece, manifest, files, folder, has_state=piece.name in stepped)


def numbers_of(manifest: Manifest) -> Numbers:
    """What is no tensor."""
    return Numbers(**manifest.numbers)


def _fill(piece: Piece, manifest: Manifest, files: Files, folder: Path, *, has_state: bool) -> None:
    stored = manifest.tensors.get((piece.name, piece.kind))
    if stored is None:
        if piece.kind not in (WEIGHT, BUFFER) and not has_state:
            piece.view.zero_()  # never stepped
            return
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
