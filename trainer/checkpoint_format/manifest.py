"""The manifest of a checkpoint: contents, serialization, and reading of every format version."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any

import torch
import xxhash

from trainer.errors import CheckpointError, first_line

FORMAT = 2
"""Version that is written. Format 2 replaces the key `wandb_run` of format 1 by `trackers`."""

READABLE_FORMATS = (1, 2)
MANIFEST = "manifest.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by their names in safetensors."""

WEIGHT, BUFFER = "weight", "buffer"
MODEL_ROLES = (WEIGHT, BUFFER)
"""Roles of the model's tensors. The roles of optimizer state are the optimizer's own names, such as `exp_avg`."""

Dims = tuple[int, ...]
"""One number for each dimension of a tensor: a shape, or the offsets or sizes of a chunk."""


@dataclass(frozen=True)
class Chunk:
    """An n-dimensional block of a full tensor, and its position in a file."""

    file: str
    byte_offset: int
    """Byte offset of the first element in the file."""

    offsets: Dims
    """Offsets of the first element in the full tensor."""

    sizes: Dims

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def overlap(self, offsets: Dims, sizes: Dims) -> tuple[Dims, Dims] | None:
        """Return (offsets, sizes) of the intersection with another chunk of the same tensor, or None if it is empty."""
        first = tuple(map(max, self.offsets, offsets))
        end = tuple(min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, offsets, sizes, strict=True))
        shared = tuple(b - a for a, b in zip(first, end, strict=True))
        return None if any(length <= 0 for length in shared) else (first, shared)


@dataclass(frozen=True)
class StoredTensor:
    """A full tensor in a checkpoint."""

    shape: Dims
    dtype: str
    """A key of `DTYPES`."""

    chunks: tuple[Chunk, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class FileRecord:
    """Name, size and hash of a complete file."""

    name: str
    bytes: int
    hash: str
    """xxh3-128 of all bytes."""


Tensors = dict[tuple[str, str], StoredTensor]
"""By (name, role)."""

TrackerStates = Mapping[str, Mapping[str, str]]
"""State of each experiment tracker by its name; see `trainer.tracking`."""


@dataclass(frozen=True)
class Manifest:
    """Everything that a checkpoint records in addition to the elements of its tensors."""

    step: int
    attempt: int
    created: str
    """UTC, ISO 8601."""

    tokens: int
    samples: int
    """Samples consumed by training so far: the position in the order of the data."""

    losses: Mapping[str, float | None]
    """Losses by split that were computed at this step."""

    config: Mapping[str, Any]
    """Resolved configuration of the run that wrote the checkpoint."""

    about: Mapping[str, Any]
    """Versions, git commit, world layout."""

    model: Mapping[str, Any]
    """Description that rebuilds the model without its weights: `config`, `generation` and `class`, as named by
    Hugging Face."""

    data: Mapping[str, Any]
    """Fingerprints of the training data, which reveal a different order of samples."""

    trackers: TrackerStates
    scalar_state: Mapping[str, Any]
    """Counters, loss scale and per-parameter scalars of the engine; see `trainer.engine.ScalarState`."""

    files: tuple[FileRecord, ...]
    tensors: Tensors = field(repr=False)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def to_json(self) -> str:
        """Serialize in format `FORMAT`, with a checksum over all other keys."""
        body = {
            "format": FORMAT,
            "step": self.step,
            "attempt": self.attempt,
            "created": self.created,
            "tokens": self.tokens,
            "samples": self.samples,
            "losses": self.losses,
            "config": self.config,
            "about": self.about,
            "model": self.model,
            "data": self.data,
            "trackers": self.trackers,
            "numbers": self.scalar_state,
            "files": [asdict(file) for file in self.files],
            "tensors": self._tensors_as_json(),
        }
        return json.dumps({"checksum": checksum(body), **body}, indent=None, separators=(",", ":"))

    def _tensors_as_json(self) -> dict[str, dict[str, Any]]:
        file_index = {file.name: i for i, file in enumerate(self.files)}
        tensors: dict[str, dict[str, Any]] = {}
        for (name, role), stored in self.tensors.items():
            boxes = [[file_index[c.file], c.byte_offset, list(c.offsets), list(c.sizes)] for c in stored.chunks]
            entry = {"dtype": stored.dtype, "shape": list(stored.shape), "boxes": boxes}
            tensors.setdefault(name, {})[role] = entry
        return tensors


def checksum(body: Mapping[str, Any]) -> str:
    """Hash all keys of a manifest other than the checksum itself."""
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def is_checkpoint(folder: Path) -> bool:
    """Return True if a folder has a manifest, valid or not."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the checkpoint in `folder`, of any format up to `FORMAT`.

    Raises:
        CheckpointError: the manifest is missing, damaged, or of a format that this version does not support.
    """
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        recorded = body.pop("checksum")
        if body["format"] not in READABLE_FORMATS:
            supported = " and ".join(map(str, READABLE_FORMATS))
            raise CheckpointError(f"{path}: unsupported format (got {body['format']}, supported: {supported})")
        if recorded != checksum(body):
            raise CheckpointError(f"{path}: damaged: its checksum does not match its contents")
        return _parse(body)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: not a checkpoint: it has no {MANIFEST}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{path}: damaged: invalid manifest ({type(error).__name__}: {reason})") from None


def _parse(body: dict[str, Any]) -> Manifest:
    """Build a manifest from untrusted JSON whose checksum matches; anybody can compute a checksum.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, IndexError: the JSON is not a manifest.
    """
    if body.pop("format") == 1:
        run = body.pop("wandb_run")
        body["trackers"] = {} if run is None else {"wandb": {"run_id": run}}
    for key in ("step", "attempt", "tokens", "samples"):
        _require_counts(body[key])
    for key in ("losses", "config", "about", "model", "data", "trackers", "numbers"):
        if not isinstance(body[key], dict):
            raise ValueError(f"{key} is not an object")
    for name, state in body["trackers"].items():
        if not isinstance(state, dict) or not all(isinstance(value, str) for value in state.values()):
            raise ValueError(f"the state of tracker {name} is not an object of strings")
    files = _parse_files(body.pop("files"))
    tensors = _parse_tensors(body.pop("tensors"), files)
    scalar_state = body.pop("numbers")
    return Manifest(**body, scalar_state=scalar_state, files=files, tensors=tensors)


def _parse_files(entries: Iterable[dict[str, Any]]) -> tuple[FileRecord, ...]:
    files = tuple(FileRecord(**entry) for entry in entries)
    for file in files:
        # A path that leaves the folder would make a loader read, and retention delete, files of other owners.
        if PurePath(file.name).name != file.name or file.name in ("", ".", ".."):
            raise ValueError(f"{file.name!r} is not a file name")
    return files


def _parse_tensors(entries: Mapping[str, Mapping[str, Any]], files: tuple[FileRecord, ...]) -> Tensors:
    tensors: Tensors = {}
    for name, by_role in entries.items():
        for role, entry in by_role.items():
            shape, dtype = tuple(entry["shape"]), entry["dtype"]
            chunks = tuple(
                Chunk(files[i].name, byte_offset, tuple(offsets), tuple(sizes))
                for i, byte_offset, offsets, sizes in entry["boxes"]
            )
            _require_counts(*shape, *(n for c in chunks for n in (c.byte_offset, *c.offsets, *c.sizes)))
            has_other_rank = any(len(dims) != len(shape) for c in chunks for dims in (c.offsets, c.sizes))
            if dtype not in DTYPES or has_other_rank:
                raise ValueError(f"invalid entry for {role} of {name}")
            tensors[name, role] = StoredTensor(shape, dtype, chunks)
    return tensors


def _require_counts(*values: object) -> None:
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"expected a non-negative integer, got {value!r}")
