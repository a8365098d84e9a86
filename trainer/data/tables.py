"""Read tables and datasets saved by `datasets`, in a child process with a memory limit (`table_reader.py`)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypedDict

from trainer.data.documents import document_too_large
from trainer.errors import DataError
from trainer.units import format_bytes

TABLES = (".parquet", ".csv", ".arrow")

_MIN_MEMORY_BYTES = 4 << 30
_DOCUMENT_COPIES = 16
"""Copies of the largest allowed document that fit into the memory limit of the reader."""

_THREAD_LIMITS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
"""Environment that keeps libraries from reserving address space for every core: the limit is on address space."""


class _Message(TypedDict, total=False):
    """A line of the reader's output, see `table_reader.py`."""

    file: int
    rows: list[str | None]
    row: int
    type: str
    bytes: int
    fields: list[str]
    memory: str
    error: str
    end: bool


@dataclass(frozen=True)
class TableRow:
    """One row of a table."""

    where: str
    """File and row number, for error messages."""

    text: str | None


@dataclass(frozen=True)
class _Limits:
    field: str
    """Name of the field that holds the text."""

    max_bytes: int
    """Limit on the size of a document."""

    @property
    def memory(self) -> int:
        """Memory limit of the reader process, in bytes."""
        return _MIN_MEMORY_BYTES + _DOCUMENT_COPIES * self.max_bytes


def read_table_rows(files: Sequence[Path], field: str, max_bytes: int) -> Iterator[TableRow]:
    """Yield the rows of the files in order.

    Args:
        files: .parquet, .csv or .arrow files, or directories saved by `datasets`.
        field: name of the field that holds the text.
        max_bytes: limit on the size of a document.

    Raises:
        DataError: a file is damaged, lacks the field, or a row is not text or too large; the message names the row.
    """
    for file in files:
        if file.is_file() and file.stat().st_size == 0:
            raise DataError(f"{file}: the file is empty")
    limits = _Limits(field, max_bytes)
    address_space = limits.memory + sum(map(_mapped_bytes, files))
    script = str(Path(__file__).with_name("table_reader.py"))
    command = [sys.executable, "-P", script, field, str(max_bytes), str(address_space), *map(str, files)]
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", **_THREAD_LIMITS}
    with tempfile.TemporaryFile() as stderr, _start(command, stderr, environment) as reader:
        try:
            yield from _parse_output(reader, stderr, files, limits)
        finally:
            reader.kill()


def _start(command: list[str], stderr: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, env=environment)


def _mapped_bytes(file: Path) -> int:
    """Return the bytes of a file that the reader memory-maps: they take up address space but no memory."""
    if file.is_dir():
        return sum(part.stat().st_size for part in file.rglob("*.arrow"))
    return file.stat().st_size if file.suffix == ".arrow" else 0


def _parse_output(
    reader: subprocess.Popen[bytes], stderr: IO[bytes], files: Sequence[Path], limits: _Limits
) -> Iterator[TableRow]:
    """Yield the rows that the reader writes to stdout."""
    assert reader.stdout is not None
    file, number = files[0], 0
    for raw in reader.stdout:
        line: _Message = json.loads(raw)
        if "file" in line:
            file, number = files[line["file"]], 0
        elif "rows" in line:
            for text in line["rows"]:
                number += 1
                yield TableRow(f"{file}: row {number}", text)
        elif "end" in line:
            return
        else:
            raise _reported_error(line, file, limits)
    raise _crash_error(reader, stderr, f"{file}: cannot be read: the reader process died after row {number}", limits)


def _crash_error(reader: subprocess.Popen[bytes], stderr: IO[bytes], problem: str, limits: _Limits) -> DataError:
    """Describe how the reader ended without reporting an error."""
    status = reader.wait()
    stderr.seek(0)
    last_line = (stderr.read().decode(errors="replace").strip().splitlines() or [""])[-1][:200]
    name = f"status {status}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-status).name
    return DataError(
        f"{problem} ({name}{last_line and ': ' + last_line}). The file is damaged, or needs more than "
        f"{format_bytes(limits.memory)} of memory"
    )


def _reported_error(line: _Message, file: Path, limits: _Limits) -> DataError:
    """Convert an error line of the reader to an exception."""
    if "fields" in line:
        available = ", ".join(f"'{key}'" for key in line["fields"]) or "nothing"
        return DataError(f"{file}: no field '{limits.field}', only {available}. Set data.text_field")
    if "type" in line:
        return DataError(f"{file}: row {line['row']}: field '{limits.field}' holds {line['type']}, not text")
    if "bytes" in line:
        return document_too_large(f"{file}: row {line['row']}", line["bytes"], limits.max_bytes)
    if "memory" in line:
        return DataError(
            f"{file}: cannot be read with {format_bytes(limits.memory)} of memory: {line['memory']}. The file is "
            "damaged, or its row groups are too large: rewrite it with smaller ones, or raise data.max_document_bytes"
        )
    return DataError(f"{file}: cannot be read: {line['error']}")
