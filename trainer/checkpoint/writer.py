"""Atomic checkpoint writing: after a crash at any point the checkpoint is complete or absent."""

from __future__ import annotations

import itertools
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint.saved import PARTIAL
from trainer.checkpoint_format import (
    MANIFEST,
    MAX_FILE_BYTES,
    Chunk,
    FileRecord,
    Manifest,
    StoredTensor,
    TensorChunk,
    TensorIndex,
    split_into_files,
    write_chunks,
)
from trainer.checkpoint_format.manifest import Dims, Tensors
from trainer.distributed import agree
from trainer.errors import CheckpointError
from trainer.files import hash_file, replace_folder, replace_text


class StagingBuffers:
    """Host memory for a copy of the state, reused from save to save; pinned where the state is on a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str, Dims], Tensor] = {}

    def copy(self, chunks: Iterable[TensorChunk]) -> Iterator[TensorChunk]:
        """Yield the chunks with copies in place of the views that training writes to."""
        copies = [replace(chunk, tensor=self._copy(chunk)) for chunk in chunks]
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.synchronize()
        yield from copies

    def _copy(self, chunk: TensorChunk) -> Tensor:
        key = chunk.name, chunk.role, chunk.offsets
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != chunk.tensor.shape or buffer.dtype != chunk.tensor.dtype:
            buffer = torch.empty(chunk.tensor.shape, dtype=chunk.tensor.dtype, pin_memory=chunk.tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(chunk.tensor.detach(), non_blocking=True)


def sort_by_element_size(chunks: Iterable[TensorChunk]) -> list[TensorChunk]:
    """Sort chunks by descending element size, so that every tensor is aligned to its elements in the file."""
    return sorted(chunks, key=lambda chunk: -chunk.tensor.element_size())


class CheckpointWriter:
    """Writes one checkpoint together with all ranks of a group."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        group: dist.ProcessGroup | None = None,
        *,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare to write; nothing is written yet.

        Args:
            folder: Folder of the checkpoint, which may exist.
            rank: Rank of this process.
            group: The ranks that write; None stands for all ranks.
            advance: Called after each file that this rank has written or verified.
        """
        self._folder, self._rank, self._group, self._advance = folder, rank, group, advance
        self._partial = folder.with_name(PARTIAL.format(folder.name))
        self.written: list[FileRecord] = []
        """Files of this rank."""

    def write(self, chunks: Sequence[TensorChunk], manifest: Manifest, max_bytes: int = MAX_FILE_BYTES) -> Manifest:
        """Write this rank's chunks and, on rank 0 once all ranks have written, the manifest.

        Collective: all ranks of the group must call it.

        Args:
            chunks: Those that this rank owns; over all ranks they cover every tensor once.
            manifest: Manifest without files and tensors.
            max_bytes: Maximum size of one file.

        Returns:
            On rank 0 the complete manifest.

        Raises:
            CheckpointError: on all ranks: a rank could not write, or elements are missing or written twice.
        """
        try:
            return self._write(chunks, manifest, max_bytes)
        except CheckpointError:
            if self._rank == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise

    def _write(self, chunks: Sequence[TensorChunk], manifest: Manifest, max_bytes: int) -> Manifest:
        """See `write`. Collective: all ranks of the group must call it. An error leaves the partial folder."""
        agree_in_group = partial(agree, group=self._group, translate=self._translate)
        agree_in_group(self._create_folder)
        index: list[TensorIndex] = []
        agree_in_group(partial(self._write_files, chunks, max_bytes, index))
        agree_in_group(self._verify)
        gathered: list[tuple[list[FileRecord], list[TensorIndex]]] | None = None
        if self._rank == 0:
            gathered = [([], [])] * dist.get_world_size(self._group)
        dist.gather_object((self.written, index), gathered, dst=0, group=self._group)
        return agree_in_group(partial(self._commit, manifest, gathered))

    def _create_folder(self) -> None:
        if self._rank == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)

    def _write_files(self, chunks: Sequence[TensorChunk], max_bytes: int, index: list[TensorIndex]) -> None:
        for i, file_chunks in enumerate(split_into_files(chunks, max_bytes)):
            suffix = f"-{i}" if i else ""
            path = self._partial / f"rank-{self._rank:05}{suffix}.safetensors"
            record, file_index = write_chunks(path, file_chunks)
            self.written.append(record)
            index += file_index
            self._advance()

    def _verify(self) -> None:
        """Read back what this rank has written, before older checkpoints are deleted for it."""
        for file in self.written:
            if hash_file(self._partial / file.name) != file.hash:
                raise OSError(f"{file.name} differs from what was written when read back")
            self._advance()

    def _commit(
        self, manifest: Manifest, gathered: Iterable[tuple[list[FileRecord], list[TensorIndex]]] | None
    ) -> Manifest:
        """Write the manifest and rename the folder: from the rename on, the checkpoint exists.

        Args:
            manifest: Manifest without files and tensors.
            gathered: Files and tensors of all ranks; None on the ranks that do not write the manifest.

        Returns:
            The complete manifest, or the given one where `gathered` is None.
        """
        if gathered is None:
            return manifest
        records, indices = zip(*gathered, strict=True)
        files = tuple(itertools.chain.from_iterable(records))
        complete = replace(manifest, files=files, tensors=_merge(itertools.chain.from_iterable(indices)))
        replace_text(self._partial / MANIFEST, complete.to_json())
        replace_folder(self._partial, self._folder)
        return complete

    def _translate(self, error: Exception) -> Exception:
        """Return the error of the whole write, whatever this rank's error: other ranks must not wait for this one."""
        reason = str(error) if isinstance(error, OSError | CheckpointError) else repr(error)
        return CheckpointError(f"{self._folder} was not written: rank {self._rank}: {reason}")


def _merge(index: Iterable[TensorIndex]) -> Tensors:
    """Return the tensors whose chunks all ranks have written.

    Raises:
        CheckpointError: the chunks do not cover each tensor exactly once.
    """
    chunks: dict[tuple[str, str], list[Chunk]] = defaultdict(list)
    headers: dict[tuple[str, str], tuple[Dims, str]] = {}
    for entry in index:
        key = entry.name, entry.role
        if headers.setdefault(key, (entry.shape, entry.dtype)) != (entry.shape, entry.dtype):
            raise CheckpointError(f"{entry.role} of {entry.name}: shape or dtype differs between ranks (a bug)")
        chunks[key].append(entry.chunk)
    tensors = {key: StoredTensor(*headers[key], tuple(chunks[key])) for key in chunks}
    for (name, role), stored in tensors.items():
        refuse_incomplete_coverage(f"{role} of {name}", stored)
    return tensors


def refuse_incomplete_coverage(label: str, stored: StoredTensor) -> None:
    """Check that the chunks cover a tensor, each element once.

    Raises:
        CheckpointError: they do not; the message begins with `label`.
    """
    covered = sum(chunk.numel for chunk in stored.chunks)
    if covered != stored.numel:
        raise CheckpointError(f"{label}: chunks have {covered} elements, the tensor has {stored.numel}")
    is_inside = all(
        offset >= 0 and offset + size <= length
        for chunk in stored.chunks
        for offset, size, length in zip(chunk.offsets, chunk.sizes, stored.shape, strict=True)
    )
    if not is_inside or _has_overlap(stored):
        raise CheckpointError(f"{label}: chunks overlap, or extend past the tensor")


def _has_overlap(stored: StoredTensor) -> bool:
    """Return True if two chunks share an element."""
    chunks = sorted(stored.chunks, key=lambda chunk: chunk.offsets)
    for i, chunk in enumerate(chunks):
        for other in itertools.islice(chunks, i + 1, None):
            # Sorted by the first dimension: no later chunk can overlap either.
            if stored.shape and other.offsets[0] >= chunk.offsets[0] + chunk.sizes[0]:
                break
            if chunk.overlap(other.offsets, other.sizes):
                return True
    return False
