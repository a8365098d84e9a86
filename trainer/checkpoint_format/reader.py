"""Verifying the files of a checkpoint, and reading chunks from them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint_format.manifest import DTYPES, Chunk, Dims, FileRecord, Manifest, StoredTensor
from trainer.errors import CheckpointError
from trainer.files import hash_file


def verify_sizes(folder: Path, manifest: Manifest) -> None:
    """Check that every file of a checkpoint exists and has its recorded size, without reading it.

    Raises:
        CheckpointError: names the first file that does not.
    """
    for file in manifest.files:
        path = folder / file.name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        if size != file.bytes:
            raise CheckpointError(f"{path}: damaged: expected {file.bytes} bytes, got {size}")


def verify_files(folder: Path, manifest: Manifest, files: Iterable[FileRecord] | None = None) -> None:
    """Check the size of all files of a checkpoint, and the hash of `files` (default: all of them).

    Raises:
        CheckpointError: names the first file that is missing, or whose size or hash differs from the manifest.
    """
    verify_sizes(folder, manifest)
    for file in manifest.files if files is None else files:
        path = folder / file.name
        try:
            digest = hash_file(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        if digest != file.hash:
            raise CheckpointError(f"{path}: damaged: its hash differs from the manifest's")


class ChunkReader:
    """Reads chunks of a checkpoint from memory-mapped files: only requested bytes are read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[str, mmap.mmap] = {}

    def view(self, chunk: Chunk, dtype: str) -> Tensor:
        """Return a chunk as a tensor of shape `chunk.sizes` that shares the file's memory; do not write to it.

        Raises:
            CheckpointError: the chunk does not lie within its file.
        """
        element = DTYPES[dtype]
        if not chunk.numel:
            return torch.empty(chunk.sizes, dtype=element)
        data = self._mapped(chunk.file)
        end = chunk.byte_offset + chunk.numel * element.itemsize
        if chunk.byte_offset < 0 or chunk.numel < 0 or end > len(data):
            raise CheckpointError(f"{self._folder / chunk.file}: damaged: a chunk extends past the end of the file")
        return torch.frombuffer(data, dtype=element, count=chunk.numel, offset=chunk.byte_offset).view(chunk.sizes)

    def read(self, stored: StoredTensor, offsets: Dims, into: Tensor) -> int:
        """Fill `into`, of any shape, with the block of the full tensor that begins at `offsets`.

        Returns:
            The number of elements that the checkpoint has of this block.
        """
        count = 0
        for chunk in stored.chunks:
            overlap = chunk.overlap(offsets, tuple(into.shape))
            if overlap is None:
                continue
            first, sizes = overlap
            target = tuple(slice(a - b, a - b + n) for a, b, n in zip(first, offsets, sizes, strict=True))
            source = tuple(slice(a - b, a - b + n) for a, b, n in zip(first, chunk.offsets, sizes, strict=True))
            into[target].copy_(self.view(chunk, stored.dtype)[source])
            count += math.prod(sizes)
        return count

    def _mapped(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            with (self._folder / name).open("rb") as file:
                # torch.frombuffer wants writable memory; copy-on-write pages keep the file unchanged.
                self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[name]
