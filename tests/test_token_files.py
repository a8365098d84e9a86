"""Token files in the format of Megatron."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from tests.data_helpers import Change, damage, write_tokens
from trainer.data.indexed import IndexedTokens, IndexedWriter
from trainer.errors import DataError

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_token_files_round_trip(dtype: type[np.uint16] | type[np.int32], tmp_path: Path) -> None:
    documents = [[1, 2, 3], [4], [], [5, 6]]
    tokens = write_tokens(tmp_path / "t", documents, dtype)
    assert [tokens.document(i).tolist() for i in range(4)] == documents
    assert tokens.stream(2, 3).tolist() == [3, 4, 5]
    assert tokens.tokens == 6
    assert tokens.is_contiguous
    assert tokens.document(0, limit=2).tolist() == [1, 2]


def test_index_matches_megatron_layout(tmp_path: Path) -> None:
    """Compared with bytes packed by hand from the documentation of Megatron-LM."""
    write_tokens(tmp_path / "t", [[7, 8], [9]])
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3)
    expected += struct.pack("<2i", 2, 1) + struct.pack("<2q", 0, 4) + struct.pack("<3q", 0, 1, 2)
    assert (tmp_path / "t.idx").read_bytes() == expected
    assert (tmp_path / "t.bin").read_bytes() == struct.pack("<3H", 7, 8, 9)


@pytest.mark.parametrize("cut", range(0, 80, 5))
def test_truncated_token_files_raise(cut: int, tmp_path: Path) -> None:
    write_tokens(tmp_path / "t", [[7, 8], [9]])
    for name in ("t.idx", "t.bin"):
        content = (tmp_path / name).read_bytes()
        if cut < len(content):
            (tmp_path / name).write_bytes(content[:cut])
            with pytest.raises(DataError, match="t\\."):
                IndexedTokens(tmp_path / "t")
            (tmp_path / name).write_bytes(content)


def token_pair(folder: Path) -> Path:
    """Write two documents, and return the path without suffix."""
    write_tokens(folder / "t", [[7, 8], [9]])
    return folder / "t"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw[:-8] + (3).to_bytes(8, "little"), "boundaries do not ascend from 0 to 2"),
        (lambda raw: raw[:-24] + (1).to_bytes(8, "little") + raw[-16:], "boundaries do not ascend from 0 to 2"),
        (lambda raw: raw[:-16] + (5).to_bytes(8, "little") + raw[-8:], "boundaries do not ascend from 0 to 2"),
        (lambda raw: raw[:-32] + (2**63 - 2).to_bytes(8, "little") + raw[-24:], "points to byte"),
        (lambda raw: raw[:-32] + (3).to_bytes(8, "little") + raw[-24:], "offsets between two ids"),
    ],
)
def test_invalid_index_is_refused(change: Change, words: str, tmp_path: Path) -> None:
    """Token files given by a user have no hashes, so the index itself is checked."""
    prefix = token_pair(tmp_path)
    damage(prefix.with_suffix(".idx"), change)
    with pytest.raises(DataError, match=words):
        IndexedTokens(prefix)


def test_oversized_bin_file_is_refused(tmp_path: Path) -> None:
    prefix = token_pair(tmp_path)
    damage(prefix.with_suffix(".bin"), lambda raw: raw + b"\0\0")
    with pytest.raises(DataError, match=r"8 bytes, of which t\.idx describes only 6"):
        IndexedTokens(prefix)


def test_missing_index_is_refused(tmp_path: Path) -> None:
    prefix = token_pair(tmp_path)
    prefix.with_suffix(".idx").unlink()
    with pytest.raises(DataError, match=r"t\.idx: cannot be read: No such file"):
        IndexedTokens(prefix)


def test_overlong_document_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.indexed._MAX_DOCUMENT_TOKENS", 5)
    with IndexedWriter(tmp_path / "t", np.uint16) as writer:
        writer.extend([1, 2, 3])
        with pytest.raises(DataError, match="more than 5 tokens in one document"):
            writer.extend([4, 5, 6])
