"""Rows of tables and folders saved by `datasets`, read by a process with a limit on its memory (`table_reader.py`)."""

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
from typing import IO, Any

from trainer.data.documents import document_too_large
from trainer.errors import DataError
from trainer.units import format_bytes

TABLES = (".parquet", ".csv", ".arrow")

_MIN_MEMORY_BYTES = 4 << 30
_DOCUMENT_COPIES = 16
"""Copies of the largest document that a reader may hold."""

_THREAD_LIMITS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
"""The limit is on address space, of which libraries reserve much for each core."""


@dataclass(frozen=True)
class TableRow:
    """One row of a table."""

    where: str
    """File and number, for messages."""

    text: str | None


def read_table_rows(files: Sequence[Path], field: str, max_bytes: int) -> Iterator[TableRow]:
    """The rows of the files, one after the other.

    Args:
        field: of the text. largest: bytes of a document at most.

    Raises:
        DataError: naming file and row, for what is damaged, has no such field, holds no text or too much of it.
    """
    for file in files:
        if file.is_file() and file.stat().st_size == 0:
            raise DataError(f"{file}: the file is empty")
    memory = _MIN_MEMORY_BYTES + _DOCUMENT_COPIES * max_bytes
    addresses = memory + sum(map(_mapped_bytes, files))
    script = str(Path(__file__).with_name("table_reader.py"))
    command = [sys.executable, "-P", script, field, str(max_bytes), str(addresses), *map(str, files)]
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", **_THREAD_LIMITS}
    with tempfile.TemporaryFile() as stderr_file, subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr_file, env=environment
    ) as reader:  # fmt: skip
        assert reader.stdout is not None
        try:
            yield from _parse_output(reader, stderr_file, files, field, max_bytes, memory)
        finally:
            reader.kill()


def _mapped_bytes(file: Path) -> int:
    """Bytes of a file that its reader maps, which take addresses and no memory."""
    if file.is_dir():
        return sum(part.stat().st_size for part in file.rglob("*.arrow"))
    return file.stat().st_size if file.suffix == ".arrow" else 0


def _parse_output(
    reader: subprocess.Popen[bytes],
    stderr_file: IO[bytes],
    files: Sequence[Path],
    field: str,
    max_bytes: int,
    memory: int,
) -> Iterator[TableRow]:
    assert reader.stdout is not None
    file, number = files[0], 0
    for raw in reader.stdout:
        line: dict[str, Any] = json.loads(raw)
        if "file" in line:
            file, number = files[line["file"]], 0
        elif "rows" in line:
            for text in line["rows"]:
                number += 1
                yield TableRow(f"{file}: row {number}", text)
        elif "end" in line:
            return
        else:
            raise _reader_error(line, file, field, max_bytes, memory)
    status = reader.wait()
    stderr_file.seek(0)
    last_line = (stderr_file.read().decode(errors="replace").strip().splitlines() or [""])[-1][:200]
    name = f"status {status}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-status).name
    raise DataError(
        f"{file}: cannot be read: it ended the process that read it, after row {number} ({name}"
        f"{last_line and ': ' + last_line}). The file is damaged, or takes more than {format_bytes(memory)} of memory"
    )


def _reader_error(line: dict[str, Any], file: Path, field: str, max_bytes: int, memory: int) -> DataError:
    if "fields" in line:
        available = ", ".join(f"'{key}'" for key in line["fields"]) or "nothing"
        return DataError(f"{file}: no field '{field}', only {available}. Set data.text_field")
    if "type" in line:
        return DataError(f"{file}: row {line['row']}: field '{field}' holds {line['type']}, not text")
    if "bytes" in line:
        return document_too_large(f"{file}: row {line['row']}", line["bytes"], max_bytes)
    if "memory" in line:
        return DataError(
            f"{file}: cannot be read with {format_bytes(memory)} of memory: {line['memory']}. The file is damaged, or "
            "its row groups are too large: write it again with smaller ones, or raise data.max_document_bytes"
        )
    return DataError(f"{file}: cannot be read: {line['error']}")
