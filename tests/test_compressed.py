"""Compressed text files and .json arrays: their documents, and the errors of damaged files."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from trainer.config.paths import matching_files
from trainer.data import json_array
from trainer.data.sources import Source
from trainer.errors import DataError

pytestmark = pytest.mark.fast

TEXTS = [
    "brew \u00e4 potion",
    'with "quotes", [brackets] {braces} and \\ back\nslashes',
    "",
    "\u6f22\u5b57 \U0001f40d" * 40,
]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: pyarrow.Codec("zstd").compress(raw, asbytes=True),
}


def lines(texts: list[str]) -> bytes:
    """Encode documents as JSON lines."""
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def array(texts: list[str], indent: int | None = 2) -> bytes:
    """Encode documents as a JSON array."""
    return json.dumps([{"text": text, "n": [1, {"a": None}]} for text in texts], indent=indent).encode()


def documents(path: Path | str, text_field: str = "text") -> list[str]:
    """Read the documents of a file."""
    texts, document = [], ""
    for chunk in Source(str(path), "train", text_field).chunks():
        document += chunk.text
        if chunk.is_last:
            texts.append(document)
            document = ""
    return texts


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt"])
def test_compressions_yield_same_documents(suffix: str, compression: str, tmp_path: Path) -> None:
    """Also from several concatenated frames, which `cat` and parallel compressors write."""
    file = tmp_path / f"a{suffix}{compression}"
    frames = {
        ".jsonl": [lines(TEXTS[:2]), lines(TEXTS[2:])],
        ".json": [array(TEXTS)[:50], array(TEXTS)[50:]],
        ".txt": [TEXTS[1].encode(), TEXTS[3].encode()],
    }
    file.write_bytes(b"".join(map(COMPRESS[compression], frames[suffix])))
    assert documents(file) == ([TEXTS[1] + TEXTS[3]] if suffix == ".txt" else TEXTS)
    assert Source(str(file), "train", "text").total_bytes == (None if compression else file.stat().st_size)


def test_content_hash_includes_file_type(tmp_path: Path) -> None:
    """Equal bytes are different documents as .jsonl and as .txt."""
    hashes = set()
    for name in ("a.jsonl.gz", "a.txt.gz", "b.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(lines(TEXTS), mtime=0))
        hashes.add(Source(str(tmp_path / name), "train", "text").content_hash())
    assert len(hashes) == 2


@pytest.mark.parametrize("compression", [c for c in COMPRESS if c])
def test_damaged_file_error_names_line(compression: str, tmp_path: Path) -> None:
    draw = random.Random(1)
    texts = ["".join(draw.choice("abcdefghijklmnop") for _ in range(200)) for _ in range(10_000)]
    compressed = COMPRESS[compression](lines(texts))
    file = tmp_path / f"a.jsonl{compression}"
    file.write_bytes(compressed[: len(compressed) * 3 // 4])
    with pytest.raises(DataError, match=rf"a\.jsonl{compression}: line \d+: cannot be decompressed: ") as refused:
        documents(file)
    line = int(str(refused.value).split(": line ")[1].split(":")[0])
    assert 1_000 < line < 8_000, "the lines before the damage can be read"
    file.write_bytes(lines(texts))
    with pytest.raises(DataError, match=r"line 1: cannot be decompressed: .* not what its name says"):
        documents(file)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
def test_array_reads_with_any_chunk_size(
    chunk: int, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_array, "_CHUNK_BYTES", chunk)
    (tmp_path / "a.json").write_text(json.dumps([{"text": t} for t in TEXTS], ensure_ascii=False, indent=indent))
    assert documents(tmp_path / "a.json") == TEXTS
    (tmp_path / "a.json").write_text(" [ ] \n")
    assert documents(tmp_path / "a.json") == []


def test_large_array_uses_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer holds an element and a chunk, not a whole file without line ends."""
    monkeypatch.setattr(json_array, "_CHUNK_BYTES", 1000)
    (tmp_path / "a.json").write_bytes(array([f"text {n}" for n in range(5000)], indent=None))
    buffer_sizes = []
    with (tmp_path / "a.json").open("rb") as handle:
        scanner = json_array.Scanner(tmp_path / "a.json", handle, 10_000)
        scanner.expect("[")
        for number in range(1, 5001):
            scanner.read_element(number)
            scanner.expect(",]")
            buffer_sizes.append(scanner.buffer_size)
    assert max(buffer_sizes) < 3000


def test_json_file_may_hold_lines(tmp_path: Path) -> None:
    """Many corpora on the hub have JSON lines in .json files."""
    (tmp_path / "a.json").write_bytes(lines(TEXTS))
    assert documents(tmp_path / "a.json") == TEXTS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"text": "a"}\n{"text": "b"}]', "line 2: not a JSON array: expected ',' or ']' (got '{')"),
        (b'[{"text": "a"},\n]', "line 2 (element 2): not JSON: Expecting value"),
        (b'[{"text": "a"}]\n[', "line 2: '[' after the end of the array"),
        (b'[{"text": "a"},\n\n{"text": "b', "line 3 (element 2): not JSON: Unterminated string"),
        (b'[{"text": "a"}', "line 1: not a JSON array: expected ',' or ']' (got the end of the file)"),
        (b'[{"text": "a"},\n3]', "line 2 (element 2): expected a JSON object, got int"),
        (b'[{"text": "a"},\n{"body": "b"}]', "line 2 (element 2): no field 'text', only 'body'"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', "line 2: not UTF-8 (byte 0xff)"),
        (b'[\n{"text": "a\xe2', "line 2: not UTF-8 (byte 0xe2)"),
        (b'"text"', "line 1: expected an array of objects, or one object a line (got '\"')"),
        (b"[" * 200_000, "line 1 (element 1): nested too deep"),
        (b'[{"text": 1' + b"0" * 5000 + b"}]", "line 1 (element 1): not JSON: Exceeds the limit"),
    ],
)
def test_invalid_array_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError) as refused:
        documents(tmp_path / "a.json")
    assert str(refused.value).startswith(f"{tmp_path / 'a.json'}: {words}")


def test_unterminated_element_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"text": "' + "x" * 5_000_000)
    with pytest.raises(DataError, match=r"line 2 \(element 1\): not JSON, or longer than 1\.50 MB"):
        list(json_array.read_elements(tmp_path / "a.json", 1_500_000))


def test_array_parsing_takes_linear_time(tmp_path: Path) -> None:
    """Lines are counted once, not once per element, which took 268 s for 13 MB instead of 0.1 s."""
    rows = [{"text": "x" * 3_000_000}, *({"text": f"word {number}"} for number in range(100_000))]
    (tmp_path / "a.json").write_text("[" + ",\n".join(map(json.dumps, rows)) + "]")
    start = time.process_time()
    last = list(json_array.read_elements(tmp_path / "a.json", 64_000_000))[-1]
    assert time.process_time() - start < 5
    assert last.where == f"{tmp_path / 'a.json'}: line 100001 (element 100001)"
    assert last.value == rows[-1]


def test_folder_expands_to_supported_files(tmp_path: Path) -> None:
    """Other files are ignored, and so is the compressed copy of a file."""
    for name in ("a.jsonl", "a.jsonl.gz", "b.txt.zst", "info.json", "README.md", "c.tar.gz", "d.parquet.gz"):
        (tmp_path / name).write_bytes(b"")
    assert [f.name for f in matching_files(str(tmp_path))] == ["a.jsonl", "b.txt.zst"]
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("a.json", "b.json.gz"):
        (alone / name).write_bytes(b"")
    assert [f.name for f in matching_files(str(alone))] == ["a.json", "b.json.gz"]
