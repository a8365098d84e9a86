"""Child process that writes the rows of tables and of datasets saved by `datasets` to stdout as JSON lines.

Some damaged files crash the C++ libraries that read them, and small files can expand to gigabytes. Here they crash a
child process with a memory limit, and `tables.py` reports the file. The script imports nothing from the trainer, so
that it starts fast.

    python table_reader.py FIELD LARGEST MEMORY FILE...

Lines: `{"file": n}` at the start of a file; `{"rows": [text or null, ...]}`; `{"row": n, "type": name}`,
`{"row": n, "bytes": size}`, `{"fields": [...]}` or `{"error": text}` for an error; `{"end": true}`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow import Array

_BATCH_BYTES = 1 << 20
_MAX_BATCH_ROWS = 250


class _FieldMissingError(Exception):
    def __init__(self, fields: list[str]) -> None:
        self.fields = fields


def _column_index(names: list[str], field: str) -> int:
    if field not in names:
        raise _FieldMissingError(list(names))
    return names.index(field)


def _parquet(path: str, field: str) -> Iterator[Array]:
    """Yield small batches, because dictionary encoding expands a small file to many large texts."""
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    _column_index(schema.names, field)
    with pq.ParquetFile(path, buffer_size=_BATCH_BYTES) as file:
        paths = [f"{file.metadata.schema.column(n).path}." for n in range(file.metadata.num_columns)]
        leaf = next(number for number, path in enumerate(paths) if path.startswith(f"{field}."))
        for group in range(file.metadata.num_row_groups):
            chunk = file.metadata.row_group(group).column(leaf)
            rows = max(1, file.metadata.row_group(group).num_rows)
            size = max(1, chunk.total_uncompressed_size // rows)
            rows_per_batch = min(_MAX_BATCH_ROWS, max(1, _BATCH_BYTES // size))
            for batch in file.iter_batches(rows_per_batch, [group], columns=[field]):
                yield batch.column(0)


def _arrow(path: str, field: str) -> Iterator[Array]:
    import pyarrow as pa

    with pa.memory_map(path) as file:
        try:
            reader = pa.ipc.open_stream(file)
            column = _column_index(reader.schema.names, field)
            for batch in reader:
                batch.validate(full=True)
                yield batch.column(column)
        except pa.ArrowInvalid:
            file.seek(0)
            if file.read(6) != b"ARROW1":
                raise
            file.seek(0)
            file_reader = pa.ipc.open_file(file)
            column = _column_index(file_reader.schema.names, field)
            for number in range(file_reader.num_record_batches):
                batch = file_reader.get_batch(number)
                batch.validate(full=True)
                yield batch.column(column)


def _csv(path: str, field: str) -> Iterator[Array]:
    import pandas as pd  # type: ignore[import-untyped]
    import pyarrow as pa

    for frame in pd.read_csv(path, chunksize=_MAX_BATCH_ROWS, dtype={field: str}):
        column = _column_index([str(name) for name in frame.columns], field)
        yield pa.Array.from_pandas(frame.iloc[:, column])


def _saved_dataset(path: str, field: str) -> Iterator[Array]:
    import datasets

    dataset = datasets.load_from_disk(path)
    _column_index(dataset.column_names, field)
    for table in dataset.select_columns([field]).with_format("arrow").iter(_MAX_BATCH_ROWS):
        table.validate(full=True)
        yield table.column(0)


_READERS = {".parquet": _parquet, ".arrow": _arrow, ".csv": _csv, "": _saved_dataset}


def _write_line(**line: object) -> None:
    sys.stdout.write(json.dumps(line) + "\n")


def _read_file(path: str, field: str, max_bytes: int) -> bool:
    """Write the rows of a file, or the error; return False after an error."""
    number, batch, size = 0, list[str | None](), 0
    suffix = "" if os.path.isdir(path) else os.path.splitext(path)[1]
    for column in _READERS[suffix](path, field):
        for cell in column:
            number += 1
            value = cell.as_py()
            if value is not None and not isinstance(value, str):
                _write_line(rows=batch)
                _write_line(row=number, type=type(value).__name__)
                return False
            if value is not None and len(value) * 4 > max_bytes:
                length = len(value.encode("utf-8", "surrogatepass"))
                if length > max_bytes:
                    _write_line(rows=batch)
                    _write_line(row=number, bytes=length)
                    return False
            batch.append(value)
            size += len(value or "")
            if size >= _BATCH_BYTES or len(batch) >= _MAX_BATCH_ROWS:
                _write_line(rows=batch)
                batch, size = [], 0
    _write_line(rows=batch)
    return True


def main() -> None:
    """Read the files named on the command line."""
    field, max_bytes, memory, *files = sys.argv[1:]
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(stop, signal.SIG_IGN)  # the parent stops the reader; if it dies, the pipe breaks
    resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, path in enumerate(files):
        _write_line(file=number)
        try:
            if not _read_file(path, field, int(max_bytes)):
                break
        except _FieldMissingError as error:
            _write_line(fields=error.fields)
            break
        except MemoryError as error:
            _write_line(memory=str(error))
            break
        except Exception as error:  # pyarrow and pandas raise many types on damaged files
            _write_line(error=(str(error).strip().splitlines() or [type(error).__name__])[0])
            break
    else:
        _write_line(end=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
