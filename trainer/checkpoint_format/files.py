"""Writing safetensors files tensor by tensor, synced and hashed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from trainer.checkpoint_format.manifest import DTYPES, Chunk, Dims, FileRecord

MAX_FILE_BYTES = 5 * 10**9
"""Maximum bytes of tensors in one file of a checkpoint; a larger tensor gets its own file."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 64
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class TensorChunk:
    """An n-dimensional block of a full tensor, in the memory of this rank."""

    name: str
    """Hugging Face name of the weight or buffer that it belongs to."""

    role: str
    """`weight`, `buffer`, or the optimizer's name of its state, such as `exp_avg`."""

    shape: Dims
    """Shape of the full tensor."""

    offsets: Dims
    """Offsets of the chunk in the full tensor."""

    tensor: Tensor
    """The chunk's elements, in the shape of the chunk, on any device. In the state of an engine a live view: training
    reads and writes these elements."""

    @property
    def key(self) -> str:
        """Name in the file: role, name and chunk."""
        slices = ",".join(f"{a}:{a + n}" for a, n in zip(self.offsets, self.tensor.shape, strict=True))
        return f"{self.role}/{self.name}[{slices}]"

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


@dataclass(frozen=True)
class TensorIndex:
    """One chunk in a written file, with the tensor that it belongs to."""

    name: str
    role: str
    shape: Dims
    """Shape of the full tensor."""

    dtype: str
    chunk: Chunk


def split_into_files(chunks: Iterable[TensorChunk], max_bytes: int = MAX_FILE_BYTES) -> Iterator[list[TensorChunk]]:
    """Group chunks, in order, into files of at most `max_bytes`; a larger chunk gets its own file."""
    file_chunks: list[TensorChunk] = []
    size = 0
    for chunk in chunks:
        if file_chunks and size + chunk.bytes > max_bytes:
            yield file_chunks
            file_chunks, size = [], 0
        file_chunks.append(chunk)
        size += chunk.bytes
    if file_chunks:
        yield file_chunks


def write_chunks(path: Path, chunks: Sequence[TensorChunk]) -> tuple[FileRecord, list[TensorIndex]]:
    """Write a safetensors file tensor by tensor, and sync it; host memory is that of one tensor.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    record, byte_offsets = write_safetensors(path, [(chunk.key, chunk.tensor) for chunk in chunks])
    index = []
    for chunk, byte_offset in zip(chunks, byte_offsets, strict=True):
        stored = Chunk(path.name, byte_offset, chunk.offsets, tuple(chunk.tensor.shape))
        index.append(TensorIndex(chunk.name, chunk.role, chunk.shape, _DTYPE_NAMES[chunk.tensor.dtype], stored))
    return record, index


def write_safetensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> tuple[FileRecord, list[int]]:
    """Write named tensors of any shape, in the given order, into one safetensors file, and sync it.

    `safetensors.torch.save_file` needs all tensors in host memory at once; this writer needs one at a time, and hashes
    what it writes. The file's mode follows the umask.

    Returns:
        The file's record, and the byte offset of each tensor's first element in the file.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    starts, end = [], 0
    for name, tensor in tensors:
        starts.append(end)
        end += tensor.numel() * tensor.element_size()
        dtype = _DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [starts[-1], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    data_start = 8 + len(text)
    hasher = xxhash.xxh3_128()
    with path.open("wb", buffering=0) as file:
        _write(file, len(text).to_bytes(8, "little") + text, hasher)
        for _, tensor in tensors:
            host = tensor.detach().to("cpu").contiguous()
            _write(file, memoryview(host.view(-1).view(torch.uint8).numpy().data) if host.numel() else b"", hasher)
        os.fsync(file.fileno())
        # Verification must read the disk, not the page cache.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return FileRecord(path.name, data_start + end, hasher.hexdigest()), [data_start + start for start in starts]


def _write(file: FileIO, data: bytes | memoryview, hasher: xxhash.xxh3_128) -> None:
    """Write all of `data`; a single system call may write only part of it."""
    hasher.update(data)
    view = memoryview(data)
    while view:
        view = view[file.write(view[:_BLOCK_BYTES]) :]
