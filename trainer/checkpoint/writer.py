"""Writes a checkpoint so that it is there whole or not at all, whatever is killed when."""

from __future__ import annotations

import itertools
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint_format import (
    LARGEST_FILE,
    MANIFEST,
    Dims,
    FileIndex,
    FileRecord,
    Manifest,
    StoredTensor,
    Tensors,
    WriteItem,
    split_into_files,
    write_items_file,
)
from trainer.distributed import JOIN_TIMEOUT
from trainer.engine import TensorChunk
from trainer.errors import CheckpointError
from trainer.files import hash_file, replace_folder, replace_text

PARTIAL = ".{}.partial"
"""Name of a folder whose checkpoint is not complete."""

DELETED = ".{}.deleted"


class Staging:
    """Host memory for a copy of the state; it is kept from one save to the next, pinned where there is a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str, Dims], Tensor] = {}

    def copies(self, pieces: Iterable[TensorChunk]) -> Iterator[TensorChunk]:
        """The pieces, with copies in place of views of what is trained."""
        copied = [replace(piece, view=self._copy(piece)) for piece in pieces]
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.synchronize()
        yield from copied

    def _copy(self, piece: TensorChunk) -> Tensor:
        key = piece.name, piece.role, piece.start
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != piece.view.shape or buffer.dtype != piece.view.dtype:
            buffer = torch.empty(piece.view.shape, dtype=piece.view.dtype, pin_memory=piece.view.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(piece.view.detach(), non_blocking=True)


def make_write_items(pieces: Iterable[TensorChunk]) -> list[WriteItem]:
    """The pieces as entries of files."""
    return sort_by_element_size(WriteItem(p.name, p.role, p.shape, p.start, p.view) for p in pieces)


def sort_by_element_size(entries: Iterable[WriteItem]) -> list[WriteItem]:
    """Those of larger elements first, so that all are aligned in their files."""
    return sorted(entries, key=lambda entry: -entry.tensor.element_size())


class CheckpointWriter:
    """The folder of a checkpoint that is being written by all ranks of a group."""

    def __init__(self, path: Path, rank: int, group: Any = None, *, advance: Callable[[], None] = lambda: None) -> None:
        """Args:
        advance: called after each file that this rank has written or verified.
        """
        self._path, self._rank, self._group, self._advance = path, rank, group, advance
        self._partial = path.with_name(PARTIAL.format(path.name))
        self.written: list[FileRecord] = []
        """This rank's files."""

    def write(self, entries: Sequence[WriteItem], manifest: Manifest, largest: int = LARGEST_FILE) -> Manifest:
        """Writes this rank's entries, and on the first rank, once all have, the manifest; then gives the folder its
        name. On all ranks.

        Raises:
            CheckpointError: on all ranks, if one of them could not write, or elements are missing or written twice.
        """
        self._agree(self._begin)
        written: list[tuple[FileRecord, FileIndex]] = []

        def write() -> None:
            for number, together in enumerate(split_into_files(entries, largest)):
                name = (
                    f"rank-{self._rank:05}.safetensors" if not number else f"rank-{self._rank:05}-{number}.safetensors"
                )
                written.append(write_items_file(self._partial / name, together))
                self._advance()

        self._agree(write)
        self.written = [file for file, _ in written]
        self._agree(self._verify)
        gathered: list[Any] = [None] * dist.get_world_size(self._group) if self._rank == 0 else []
        dist.gather_object(written, gathered or None, dst=0, group=self._group)
        complete = manifest

        def commit() -> None:
            nonlocal complete
            files = list(itertools.chain.from_iterable(gathered))
            complete = replace(
                manifest, files=tuple(file for file, _ in files), tensors=_merge_indices(i for _, i in files)
            )
            replace_text(self._partial / MANIFEST, complete.to_json())
            replace_folder(self._partial, self._path)  # from now on there is a checkpoint

        self._agree(commit if self._rank == 0 else None)
        return complete

    def _begin(self) -> None:
        if self._rank == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)

    def _verify(self) -> None:
        """Each rank reads again what it has written, before anything older may go for it."""
        for file in self.written:
            if hash_file(self._partial / file.name) != file.hash:
                raise OSError(f"{file.name} does not hold what was written into it")
            self._advance()

    def _agree(self, work: Callable[[], None] | None) -> None:
        """Does this rank's work; if it fails on any rank, all raise."""
        problem = None
        try:
            if work is not None:
                work()
        except Exception as error:  # whatever it is, the others must not wait for this rank
            problem = str(error) if isinstance(error, OSError | CheckpointError) else repr(error)
        problems: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(problems, problem, group=self._group)
        found = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem]
        if found:
            if self._rank == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise CheckpointError(f"{self._path} was not written: {'; '.join(found)}")


def _merge_indices(indices: Iterable[FileIndex]) -> Tensors:
    """The boxes of all files by tensor.

    Raises:
        CheckpointError: unless they cover each tensor exactly.
    """
    found: dict[tuple[str, str], list[Any]] = defaultdict(list)
    known: dict[tuple[str, str], tuple[Any, ...]] = {}
    for name, role, shape, dtype, chunk in itertools.chain.from_iterable(indices):
        if known.setdefault((name, role), (shape, dtype)) != (shape, dtype):
            raise CheckpointError(f"{role} of {name} has another shape or type on another rank: a bug in Tessera")
        found[name, role].append(chunk)
    tensors = {}
    for key, chunks in found.items():
        shape, dtype = known[key]
        tensors[key] = StoredTensor(shape, dtype, tuple(chunks))
    for (name, role), stored in tensors.items():
        refuse_incomplete_coverage(f"{role} of {name}", stored)
    return tensors


def refuse_incomplete_coverage(what: str, stored: StoredTensor) -> None:
    """Looks whether the boxes cover the tensor, each element once.

    Raises:
        CheckpointError: if they do not.
    """
    covered = sum(chunk.numbers for chunk in stored.chunks)
    if covered != stored.numbers:
        raise CheckpointError(f"{what}: {covered} elements for a tensor of {stored.numbers}")
    inside = all(
        a >= 0 and a + n <= whole
        for b in stored.chunks
        for a, n, whole in zip(b.start, b.size, stored.shape, strict=True)
    )
    if not inside or _has_overlap(stored):
        raise CheckpointError(f"{what}: its parts overlap, or lie outside of it")


def _has_overlap(stored: StoredTensor) -> bool:
    """Whether two boxes share an element; those that lie apart along the first dimension are never compared."""
    chunks = sorted(stored.chunks, key=lambda chunk: chunk.start)
    for place, chunk in enumerate(chunks):
        for other in itertools.islice(chunks, place + 1, None):
            if stored.shape and other.start[0] >= chunk.start[0] + chunk.size[0]:
                break
            if chunk.overlap(other.start, other.size):
                return True
    return False


def checkpoint_group() -> Any:
    """A group of all ranks for host memory, for checkpoints alone: a thread may use it while training goes on.

    Its collectives wait for the slowest rank's files, and for their way to an object store.
    """
    return (
        dist.new_group(backend="gloo", timeout=JOIN_TIMEOUT)
        if dist.get_world_size() > 1 or torch.cuda.is_available()
        else None
    )
