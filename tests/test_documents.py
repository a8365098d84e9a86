"""Reading documents: in chunks, within memory limits, and from files that crash their reader."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.data import tables
from trainer.data.documents import TextChunk, read_text_file, split_document
from trainer.data.sources import Source
from trainer.errors import DataError

pytestmark = pytest.mark.fast

LETTERS = "ab \u00e9\u4e2d\U0001f600\n"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.documents._CHUNK_SIZE", 100)
    monkeypatch.setattr("trainer.data.documents._BOUNDARY_WINDOW", 20)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("seed", range(20))
def test_chunks_join_to_document(seed: int, tmp_path: Path) -> None:
    """For any character at the end of a chunk, also within lines that are longer than a chunk."""
    draw = random.Random(seed)
    text = "".join(draw.choices(LETTERS, weights=[9, 9, draw.choice([0, 2]), 3, 3, 3, draw.choice([0, 0.05])], k=3000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    for chunks in (list(read_text_file(tmp_path / "a.txt")), list(split_document(text, len(text)))):
        assert "".join(chunk.text for chunk in chunks) == text
        assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert max(len(chunk.text) for chunk in chunks) <= 320
        assert len(chunks) > 5


@pytest.mark.usefixtures("small_chunks")
def test_chunks_split_before_single_spaces() -> None:
    text = "word " * 200
    texts = [chunk.text for chunk in split_document(text, len(text))]
    assert len(texts) > 5
    assert all(later.startswith(" w") for later in texts[1:])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("length", [100, 101, 199, 200, 201, 300])
def test_file_without_line_end_is_one_document(length: int, tmp_path: Path) -> None:
    """Also if its length is a multiple of the chunk size, so that the last read ends within a line."""
    text = ("word " * 60)[:length]
    (tmp_path / "a.txt").write_text(text)
    chunks = list(read_text_file(tmp_path / "a.txt"))
    assert "".join(chunk.text for chunk in chunks) == text
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert sum(chunk.size for chunk in chunks) == length


@pytest.mark.parametrize(("distance", "is_found"), [(60_000, True), (70_000, False)])
def test_chunks_split_at_spaces_within_64_kib(distance: int, is_found: bool) -> None:
    """Where documents are split determines the ids of token files, which must not change between versions."""
    mebibyte = 1 << 20
    text = "x" * (mebibyte - distance) + " " + "x" * 2 * mebibyte
    first = next(split_document(text, len(text)))
    assert len(first.text) == (mebibyte - distance if is_found else mebibyte)


def test_two_mebibyte_document_is_one_chunk() -> None:
    """Earlier versions tokenized such documents in one call, and their token files must stay valid."""
    text = "word " * ((2 << 20) // 5)
    assert list(split_document(text, 7)) == [TextChunk(text, True, 7)]


def test_long_line_uses_bounded_memory(tmp_path: Path) -> None:
    """Tokenizing a line of 8 MB takes 0.4 GB; in one call of the tokenizer it took 1.3 GB."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "seven wizards brew potions " * 300_000}) + "\n")
    script = f"""
import resource
from pathlib import Path
import numpy
from trainer.data.special_tokens import DocumentFrame
from trainer.data.tokenization import DocumentEncoder, tokenize_source
from trainer.data.sources import Source
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
out = Path({str(tmp_path)!r})
train_tokenizer(iter(["seven wizards brew potions"]), 300, out)
tokenizer = load_tokenizer(str(out), "x")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokenize_source(Source(str(out / "a.jsonl"), "train", "text"), DocumentEncoder(tokenizer, DocumentFrame(), 300), out)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split()[-1]) < 700_000, "KiB"


def rows(path: Path) -> list[str]:
    """Read the texts of a table."""
    return [chunk.text for chunk in Source(str(path), "train", "text").chunks()]


def message_of(path: Path) -> str:
    """Return the error message of a file; empty if it can be read."""
    try:
        rows(path)
    except DataError as error:
        return str(error)
    return ""


def test_parquet_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 20 kB that expands to 250 MB exceeds the memory limit of its reader, not that of the trainer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(tables, "_MIN_MEMORY_BYTES", 1 << 29)
    monkeypatch.setattr(tables, "_DOCUMENT_COPIES", 0)
    pq.write_table(pa.table({"text": ["x" * 250_000_000]}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read with 0\.54 GB of memory"):
        rows(tmp_path / "a.parquet")


def test_reader_crash_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ libraries abort on some damaged files."""
    (tmp_path / "table_reader.py").write_text(
        'import os, sys\nprint(\'{"file": 0}\\n{"rows": ["one"]}\', flush=True)\nprint("bad alloc", file=sys.stderr)\n'
        "sys.stderr.flush()\nos.abort()\n"
    )
    (tmp_path / "a.parquet").write_bytes(b"x")
    monkeypatch.setattr(tables, "__file__", str(tmp_path / "tables.py"))
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read: .* died after row 1 \(SIGABRT: bad alloc\)"):
        rows(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_damaged_tables_are_data_errors(suffix: str, tmp_path: Path) -> None:
    """Overwrite random bytes: either the rows are read, or the error names the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, path = pa.table({"text": [f"hello {n}" for n in range(300)]}), tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    undamaged, draw, num_failed = path.read_bytes(), random.Random(5), 0
    for _ in range(12):
        raw = bytearray(undamaged)
        for _ in range(10):
            raw[draw.randrange(len(raw))] = draw.choice([0, 0x7F, 0x80, 0xFF])
        path.write_bytes(raw)
        message = message_of(path)
        assert not message or str(path) in message
        num_failed += bool(message)
    assert num_failed > 0


def test_closing_iterator_ends_reader_process(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "word\n" * 300_000)
    chunks = Source(str(tmp_path / "a.csv"), "train", "text").chunks()
    assert next(chunks).text == "word"
    chunks.close()  # type: ignore[attr-defined]
    children = Path("/proc/self/task").glob("*/children")
    pids = " ".join(path.read_text() for path in children).split()
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not any(b"table_reader" in command for command in commands)


def test_csv_numbers_keep_their_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,text\n1,007\n2,\n3,1.50\n")
    assert rows(tmp_path / "a.csv") == ["007", "", "1.50"]


@pytest.mark.parametrize("is_saved", [False, True])
def test_memory_mapped_table_may_exceed_limit(is_saved: bool, tmp_path: Path) -> None:
    """Mapping a file takes up address space but no memory."""
    import datasets
    import pyarrow as pa

    table = pa.table({"text": ["one", "two"]})
    if is_saved:
        datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
        path = tmp_path / "saved"
        file = next(path.glob("*.arrow"))
    else:
        path = file = tmp_path / "a.arrow"
        with pa.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table)
    os.truncate(file, 8 << 30)  # a hole after the end of the stream
    assert [chunk.text for chunk in Source(str(path), "train", "text").chunks()] == ["one", "two"]


def test_parquet_field_name_may_contain_dot(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": ["no"], "a.b": ["yes"]}), tmp_path / "a.parquet")
    assert [chunk.text for chunk in Source(str(tmp_path / "a.parquet"), "train", "a.b").chunks()] == ["yes"]
