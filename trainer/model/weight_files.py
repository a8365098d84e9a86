"""Tensors in weight files, by name. Files are memory-mapped: only requested bytes are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from trainer.checkpoint_format import (
    DTYPES,
    MODEL_ROLES,
    ChunkReader,
    StoredTensor,
    is_checkpoint,
    read_manifest,
    verify_sizes,
)
from trainer.compat.transformers.conversion import dot_natural_key


@dataclass(frozen=True)
class TensorHeader:
    """Header of a tensor in a file."""

    dtype: str
    """Name of the dtype in safetensors."""

    shape: tuple[int, ...]


class TensorView(Protocol):
    """A stored tensor, of which any block can be read."""

    def get_shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""

    def __getitem__(self, block: tuple[slice, ...]) -> Tensor:
        """Read a block, given by one slice for each dimension."""


class WeightFiles(Protocol):
    """The tensors of a model folder, a hub repository or a checkpoint."""

    has_published_names: bool
    """Whether names and shapes may be those that the family publishes, and not the model's own."""

    def names(self) -> list[str]:
        """Return the names of all tensors."""

    def view(self, name: str) -> TensorView:
        """Return a tensor without reading it."""

    def header(self, name: str) -> TensorHeader:
        """Return dtype and shape of a tensor."""

    def file_of(self, name: str) -> str:
        """Return the names of the files that hold a tensor, for messages."""

    def read(self, name: str) -> Tensor:
        """Read a full tensor, in the shape of its header."""


class _CheckpointView:
    def __init__(self, chunks: ChunkReader, stored: StoredTensor) -> None:
        self._chunks, self._stored = chunks, stored

    def get_shape(self) -> tuple[int, ...]:
        return self._stored.shape

    def __getitem__(self, block: tuple[slice, ...]) -> Tensor:
        ranges = [range(*part.indices(length)) for part, length in zip(block, self._stored.shape, strict=True)]
        result = torch.empty([len(part) for part in ranges], dtype=DTYPES[self._stored.dtype])
        self._chunks.read(self._stored, tuple(part.start for part in ranges), result)
        return result


class CheckpointFiles:
    """Implements `WeightFiles` for the weights and buffers of a checkpoint."""

    has_published_names = False

    def __init__(self, folder: Path) -> None:
        manifest, self._chunks = read_manifest(folder), ChunkReader(folder)
        verify_sizes(folder, manifest)
        self._stored = {name: stored for (name, role), stored in manifest.tensors.items() if role in MODEL_ROLES}

    def names(self) -> list[str]:
        """See `WeightFiles.names`."""
        return list(self._stored)

    def view(self, name: str) -> TensorView:
        """See `WeightFiles.view`."""
        return _CheckpointView(self._chunks, self._stored[name])

    def header(self, name: str) -> TensorHeader:
        """See `WeightFiles.header`."""
        return TensorHeader(self._stored[name].dtype, self._stored[name].shape)

    def file_of(self, name: str) -> str:
        """See `WeightFiles.file_of`."""
        return ", ".join(dict.fromkeys(chunk.file for chunk in self._stored[name].chunks))

    def read(self, name: str) -> Tensor:
        """See `WeightFiles.read`."""
        view = self.view(name)
        return view[tuple(slice(None) for _ in view.get_shape())]


class SafetensorsFiles:
    """Implements `WeightFiles` for a local folder or a repository on the hub."""

    has_published_names = True

    def __init__(self, path: str) -> None:
        self._handles: dict[str, Any] = {}
        self._file_names: dict[str, str] = {}
        for file in _find_safetensors(path):
            handle = safe_open(file, framework="pt")
            names: list[str] = handle.keys()  # type: ignore[no-untyped-call]
            self._handles.update(dict.fromkeys(names, handle))
            self._file_names.update(dict.fromkeys(names, Path(file).name))

    def names(self) -> list[str]:
        """See `WeightFiles.names`."""
        return sorted(self._handles, key=dot_natural_key)

    def view(self, name: str) -> TensorView:
        """See `WeightFiles.view`."""
        view: TensorView = self._handles[name].get_slice(name)
        return view

    def header(self, name: str) -> TensorHeader:
        """See `WeightFiles.header`."""
        view = self._handles[name].get_slice(name)
        return TensorHeader(view.get_dtype(), tuple(view.get_shape()))

    def file_of(self, name: str) -> str:
        """See `WeightFiles.file_of`."""
        return self._file_names[name]

    def read(self, name: str) -> Tensor:
        """See `WeightFiles.read`."""
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor


def _find_safetensors(path: str) -> list[str]:
    """Return the paths of the weight files of a folder, or of a repository, which are downloaded if necessary."""
    folder = Path(path).expanduser()
    source = str(folder) if folder.is_dir() else path
    none_if_missing = {"_raise_exceptions_for_missing_entries": False}
    if (single := cached_file(source, SAFE_WEIGHTS_NAME, **none_if_missing)) is not None:
        return [single]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **none_if_missing)
    if index is None:
        raise FileNotFoundError(f"it holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
    if folder.is_dir():
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        return [str(folder / name) for name in names]
    files: list[str] = get_checkpoint_shard_files(source, index)[0]
    return files


def open_weight_files(path: str) -> WeightFiles:
    """Open the tensors of a folder, a checkpoint, or a repository on the hub."""
    folder = Path(path).expanduser()
    return CheckpointFiles(folder) if is_checkpoint(folder) else SafetensorsFiles(path)
