# SPDX-License-Identifier: Apache-2.0
"""Files that cross from the guest to the host, made to hurt: archives, lists, names, disk images.

What tests/test_staging.py, test_outputs.py, test_image_cache.py, test_drive.py and test_formats.py have of this is
not here again.
"""

from __future__ import annotations

import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from test_staging import archive_of, member
from virt_dib.errors import ApplianceError
from virt_dib.staging import copy_out

MIB = 1 << 20


# ---- archives that make the reader large ----


def header(kind: bytes, size_bytes: int) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size_bytes
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


def record(key: str, value: str) -> bytes:
    """One line of a pax header."""
    rest = f" {key}={value}\n".encode()
    length = len(rest)
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def long_header(kind: bytes) -> Iterator[bytes | int]:
    yield header(kind, 256 * MIB)
    yield 256 * MIB


def sparse_map() -> Iterator[bytes | int]:
    """What tarfile takes for a list of 10^9 pieces of a file, and reads in blocks."""
    said = record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0")
    yield header(tarfile.XHDTYPE, len(said))
    yield padded(said)
    numbers = b"1000000000\n" + b"0\n" * (MIB)
    yield header(tarfile.REGTYPE, len(numbers))
    yield padded(numbers)


def many_headers() -> Iterator[bytes | int]:
    """As many as tarfile takes before one file."""
    said = b"".join(record(f"k{number}", "v") for number in range(4000))
    for _ in range(20):
        yield header(tarfile.XHDTYPE, len(said))
        yield padded(said)


def header_for_all() -> Iterator[bytes | int]:
    """Each file that follows gets a copy of it."""
    said = b"".join(record(f"k{number}", "v") for number in range(300))
    yield header(tarfile.XGLTYPE, len(said))
    yield padded(said)
    for _ in range(300):
        yield header(tarfile.DIRTYPE, 0)


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param(lambda: long_header(tarfile.XHDTYPE), id="a pax header"),
        pytest.param(lambda: long_header(tarfile.GNUTYPE_LONGNAME), id="a long name"),
        pytest.param(lambda: long_header(tarfile.GNUTYPE_LONGLINK), id="a long link"),
        pytest.param(sparse_map, id="a list of pieces"),
        pytest.param(many_headers, id="many headers"),
        pytest.param(header_for_all, id="a header for all"),
    ],
)
def test_no_header_makes_the_reader_large(tmp_path: Path, pieces: object) -> None:
    assert callable(pieces)
    with (tmp_path / "out.tar").open("wb") as stream:
        for piece in pieces():
            if isinstance(piece, int):
                stream.truncate(stream.tell() + piece)
                stream.seek(0, 2)
            else:
                stream.write(piece)
        stream.write(bytes(2 * tarfile.BLOCKSIZE))
    (tmp_path / "target").mkdir()
    tracemalloc.start()
    try:
        with pytest.raises(ApplianceError, match="the guest left is damaged: a header is"):
            copy_out(tmp_path / "out.tar", tmp_path / "target", limit_bytes=1 << 40)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


def test_members_are_forgotten_when_they_are_written(tmp_path: Path) -> None:
    """Each with as much about it as may be."""
    said = record("comment", "c" * 60_000)
    members = [(member("h", tarfile.XHDTYPE, said), member(f"{number}")) for number in range(400)]
    archive_of(tmp_path / "out.tar", *(one for both in members for one in both))
    (tmp_path / "target").mkdir()
    tracemalloc.start()
    try:
        assert copy_out(tmp_path / "out.tar", tmp_path / "target", limit_bytes=0).files == 400
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()
