"""What a checkpoint is on disk: a folder of safetensors files and a manifest, without pickles.

Each entry of a file is a box of a whole tensor that bears its Hugging Face name, so any layout can write a checkpoint
and any other read it. The manifest says where every box lies, gives the hash of each file, and holds everything that
is no tensor. A folder without a manifest that is sound is no checkpoint.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from trainer.errors import CheckpointError, first_line
from trainer.files import hash_file

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
"""Folder in a run directory."""

LARGEST_FILE = 5 * 10**9
"""Bytes of tensors in one file, at most."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""safetensors' words for types."""

_DTYPE_NAMES = {dtype: word for word, dtype in DTYPES.items()}
_ALIGNMENT = 64
_BLOCK_BYTES = 1 << 20

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """Where a part of a whole tensor lies."""

    file: str
    offset: int
    """First byte in the file."""

    start: Dims
    """First element in the whole tensor."""

    size: Dims

    @property
    def numbers(self) -> int:
        return math.prod(self.size)

    def overlap(self, start: Dims, size: Dims) -> tuple[Dims, Dims] | None:
        """(start, size) of what it shares with another box of the same tensor; None if nothing."""
        first = tuple(map(max, self.start, start))
        end = tuple(min(a + b, c + d) for a, b, c, d in zip(self.start, self.size, start, size, strict=True))
        shared = tuple(b - a for a, b in zip(first, end, strict=True))
        return None if any(length <= 0 for length in shared) else (first, shared)


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor in a checkpoint."""

    shape: Dims
    dtype: str
    chunks: tuple[Chunk, ...]

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class FileRecord:
    """A file that is complete."""

    name: str
    bytes: int
    hash: str
    """xxh3-128 of all its bytes."""


WEIGHT, BUFFER = "weight", "buffer"
MODEL_ROLES = (WEIGHT, BUFFER)
"""Kinds of tensors beside the optimizer's state, whose kinds are its own words (`exp_avg`, ...)."""

Tensors = dict[tuple[str, str], StoredTensor]
"""By (name, kind): kind is `weight`, `buffer`, or a word of the optimizer's."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself."""

    step: int
    attempt: int
    created: str
    """UTC, ISO 8601."""

    tokens: int
    samples: int
    """Trained on so far: the cursor into the order of the data."""

    losses: Mapping[str, float | None]
    """Of this step, by split, where they were computed at it."""

    config: Mapping[str, Any]
    """The resolved configuration of the run that wrote it."""

    about: Mapping[str, Any]
    """Versions, git commit, world layout."""

    model: Mapping[str, Any]
    """What makes the model without its weights: `config` and `generation` in Hugging Face's words, and `class`."""

    data: Mapping[str, Any]
    """Fingerprints of the training data, by which another order of samples would be noticed."""

    wandb_run: str | None
    numbers: Mapping[str, Any]
    """The engine's counters, loss scale, and what its optimizer keeps beside tensors."""

    files: tuple[FileRecord, ...]
    tensors: Tensors = field(repr=False)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def to_json(self) -> str:
        """With a checksum over all the rest."""
        plain = {key: value for key, value in vars(self).items() if key not in ("files", "tensors")}
        number = {file.name: place for place, file in enumerate(self.files)}
        tensors: dict[str, dict[str, Any]] = {}
        for (name, role), stored in self.tensors.items():
            chunks = [
                [number[chunk.file], chunk.offset, list(chunk.start), list(chunk.size)] for chunk in stored.chunks
            ]
            entry = {"dtype": stored.dtype, "shape": list(stored.shape), "boxes": chunks}
            tensors.setdefault(name, {})[role] = entry
        body = {"format": FORMAT, **plain, "files": [asdict(file) for file in self.files], "tensors": tensors}
        return json.dumps({"checksum": checksum(body), **body}, indent=None, separators=(",", ":"))


def checksum(body: Mapping[str, Any]) -> str:
    """Of all of a manifest but the checksum itself."""
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder says that it is one."""
    return (folder / MANIFEST).is_file()


def run_tokenizer_folder(folder: Path) -> Path:
    """Where the run that wrote a checkpoint keeps its tokenizer."""
    checkpoints = folder.absolute().parent
    if checkpoints.name.startswith("attempt-"):  # left aside by a later attempt
        checkpoints = checkpoints.parent
    return checkpoints.parent / TOKENIZER


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`.

    Raises:
        CheckpointError: if there is none, or it is damaged, or of a format that this version does not know.
    """
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        given = body.pop("checksum")
        if body["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {body['format']}, and this version of Tessera reads {FORMAT}")
        if given != checksum(body):
            raise CheckpointError(f"{path}: damaged: its contents do not have the checksum that it gives")
        return _parse(body)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no checkpoint: it has no {MANIFEST}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"{path}: damaged: no manifest of a checkpoint ({type(error).__name__}: {reason})"
        ) from None


def _parse(body: dict[str, Any]) -> Manifest:
    del body["format"]
    files = tuple(FileRecord(**entry) for entry in body.pop("files"))
    for file in files:
        if PurePath(file.name).name != file.name or file.name in ("", ".", ".."):
            raise ValueError(f"{file.name!r} is not the name of a file in the folder")
    for key in ("step", "attempt", "tokens", "samples"):
        _require_counts(body[key])
    for key in ("losses", "config", "about", "model", "data", "numbers"):
        if not isinstance(body[key], dict):
            raise ValueError(f"{key} is not an object")
    tensors: Tensors = {}
    for name, kinds in body.pop("tensors").items():
        for role, entry in kinds.items():
            shape, dtype = tuple(entry["shape"]), entry["dtype"]
            chunks = tuple(Chunk(files[n].name, at, tuple(start), tuple(size)) for n, at, start, size in entry["boxes"])
            _require_counts(*shape, *(n for chunk in chunks for n in (chunk.offset, *chunk.start, *chunk.size)))
            if dtype not in DTYPES or any(
                len(part) != len(shape) for chunk in chunks for part in (chunk.start, chunk.size)
            ):
                raise ValueError(f"{role} of {name} is no tensor")
            tensors[name, role] = StoredTensor(shape, dtype, chunks)
    return Manifest(**body, files=files, tensors=tensors)


def _require_counts(*numbers: Any) -> None:
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ValueError(f"{number!r} is no count")


# Files ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WriteItem:
    """A tensor that is to be written, or has been."""

    name: str
    role: str
    shape: Dims
    """Of the whole tensor."""

    start: Dims
    tensor: Tensor
    """The box's elements, on any device."""

    @property
    def key(self) -> str:
        """Its name in the file: what it is, and which box of it."""
        chunk = ",".join(f"{a}:{a + b}" for a, b in zip(self.start, self.tensor.shape, strict=True))
        return f"{self.role}/{self.name}[{chunk}]"

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


FileIndex = list[tuple[str, str, Dims, str, Chunk]]
"""(name, kind, whole shape, type, box) of what a file holds."""


def split_into_files(entries: Iterable[WriteItem], largest: int = LARGEST_FILE) -> Iterator[list[WriteItem]]:
    """The entries, for files of at most so many bytes; one that is larger gets a file of its own."""
    together: list[WriteItem] = []
    size = 0
    for entry in entries:
        if together and size + entry.bytes > largest:
            yield together
            together, size = [], 0
        together.append(entry)
        size += entry.bytes
    if together:
        yield together


def write_items_file(path: Path, entries: list[WriteItem]) -> tuple[FileRecord, FileIndex]:
    """Writes a safetensors file, tensor by tensor: host memory is one tensor's. It is on the disk when this returns.

    Raises:
        OSError: if the disk is full, or the folder cannot be written.
    """
    written, offsets = write_safetensors(path, [(entry.key, entry.tensor) for entry in entries])
    index: FileIndex = []
    for entry, at in zip(entries, offsets, strict=True):
        chunk = Chunk(path.name, at, entry.start, tuple(entry.tensor.shape))
        index.append((entry.name, entry.role, entry.shape, _DTYPE_NAMES[entry.tensor.dtype], chunk))
    return written, index


def write_safetensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> tuple[FileRecord, list[int]]:
    """Write named tensors in the given order into one safetensors file, and sync it.

    Host memory is one tensor's; the file's mode follows the umask.

    Returns:
        The file's name, size and hash, and the offset of each tensor's first byte in the file.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    begin = 8 + len(text)
    hasher = xxhash.xxh3_128()
    with path.open("wb", buffering=0) as file:
        _write(file, len(text).to_bytes(8, "little") + text, hasher)
        for _, tensor in tensors:
            host = tensor.detach().to("cpu").contiguous()
            _write(file, memoryview(host.view(-1).view(torch.uint8).numpy().data) if host.numel() else b"", hasher)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # whoever verifies it reads the disk
    offsets = [begin + header[name]["data_offsets"][0] for name, _ in tensors]
    return FileRecord(path.name, begin + at, hasher.hexdigest()), offsets


def _write(file: Any, data: bytes | memoryview, hasher: Any) -> None:
    hasher.update(data)
    view = memoryview(data)
    while view:
        view = view[file.write(view[:_BLOCK_BYTES]) :]


def verify_sizes(folder: Path, manifest: Manifest) -> None:
    """Looks whether all files of a checkpoint are there and as long as its manifest says, without reading them.

    Raises:
        CheckpointError: naming the first that is not.
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
            raise CheckpointError(f"{path}: damaged: {size} bytes, and {file.bytes} were written")


def verify_files(folder: Path, manifest: Manifest, files: Iterable[FileRecord] | None = None) -> None:
    """Reads files of a checkpoint, all by default, and compares them with what its manifest says.

    Raises:
        CheckpointError: naming the first that is missing, too short or long, or of another hash.
    """
    verify_sizes(folder, manifest)
    for file in manifest.files if files is None else files:
        path = folder / file.name
        try:
            found = hash_file(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        if found != file.hash:
            raise CheckpointError(f"{path}: damaged: not the bytes that were written (its hash differs)")


class ChunkReader:
    """The boxes of a checkpoint, in files that are mapped into memory: what is not asked for is not read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[str, mmap.mmap] = {}

    def chunk(self, chunk: Chunk, dtype: str) -> Tensor:
        """A box's elements. Not to be written to."""
        role = DTYPES[dtype]
        if not chunk.numbers:
            return torch.empty(chunk.size, dtype=role)
        data = self._mapped(chunk.file)
        if chunk.offset < 0 or chunk.numbers < 0 or chunk.offset + chunk.numbers * role.itemsize > len(data):
            raise CheckpointError(f"{self._folder / chunk.file}: damaged: the manifest points behind its end")
        return torch.frombuffer(data, dtype=role, count=chunk.numbers, offset=chunk.offset).view(chunk.size)

    def _mapped(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            with (self._folder / name).open("rb") as file:
                self._maps[name] = _map(file)
        return self._maps[name]

    def read(self, stored: StoredTensor, start: Dims, into: Tensor) -> int:
        """Fills `into` with the box of a whole tensor that begins at `start`. Returns how many elements were found."""
        found = 0
        size = tuple(into.shape)
        for chunk in stored.chunks:
            shared = chunk.overlap(start, size)
            if shared is None:
                continue
            first, length = shared
            here = tuple(slice(a - b, a - b + n) for a, b, n in zip(first, start, length, strict=True))
            there = tuple(slice(a - b, a - b + n) for a, b, n in zip(first, chunk.start, length, strict=True))
            into[here].copy_(self.chunk(chunk, stored.dtype)[there])
            found += math.prod(length)
        return found


def _map(file: BinaryIO) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
