# SPDX-License-Identifier: Apache-2.0
"""Reading files that may be anything: no wait that never ends, no more than was asked for, no descriptor left."""

from __future__ import annotations

import errno
import os
import socket
import threading
from pathlib import Path

import pytest

from virt_dib.files import copy_regular, read_any, read_regular


def test_a_fifo_that_nobody_writes_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="nobody writes to"):
        read_any(tmp_path / "fifo", 10)


def test_a_fifo_whose_writer_takes_its_time(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    # Open for both, so that it need not wait for the reader.
    writer = os.open(tmp_path / "fifo", os.O_RDWR)

    def write() -> None:
        os.write(writer, b"text")
        os.close(writer)

    thread = threading.Timer(0.2, write)
    thread.start()
    assert read_any(tmp_path / "fifo", 10) == b"text"
    thread.join()


def test_what_a_shell_gives_for_a_command() -> None:
    """``<(command)`` is a pipe below /dev/fd."""
    reader, writer = os.pipe()
    os.write(writer, b"smp = 2")
    os.close(writer)
    assert read_any(Path(f"/dev/fd/{reader}"), 10) == b"smp = 2"
    os.close(reader)


def test_what_never_ends_and_what_is_no_file(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(1 << 43)
    (tmp_path / "circle").symlink_to("circle")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    before = sorted(os.listdir("/proc/self/fd"))
    for name, number in {
        "huge": errno.EFBIG, "/dev/zero": errno.EFBIG, "circle": errno.ELOOP, "socket": errno.ENXIO,
        "nothing": errno.ENOENT, ".": errno.EISDIR, "x" * 300: errno.ENAMETOOLONG,
    }.items():  # fmt: skip
        with pytest.raises(OSError) as caught:  # noqa: PT011 - its number is looked at
            read_any(tmp_path / name, 1 << 16)
        assert caught.value.errno == number
        assert caught.value.strerror
        with pytest.raises(OSError):  # noqa: PT011 - any
            read_regular(tmp_path / name, 1 << 16)
    with pytest.raises(OSError, match="not a regular file"):
        read_regular(Path("/dev/null"), 1)
    assert sorted(os.listdir("/proc/self/fd")) == before
    listener.close()


def test_as_much_as_the_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 0 KiB"):
        read_regular(tmp_path / "file", 4)
    assert read_any(Path("/dev/null"), 0) == b""


def test_a_copy_has_the_same_content_and_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as stream:
        stream.write(b"begin")
        stream.seek(1 << 39)
        stream.write(b"middle")
        stream.truncate(1 << 40)
    copy_regular(source, target)
    assert target.stat().st_size == 1 << 40
    assert target.stat().st_blocks <= source.stat().st_blocks + 16
    with target.open("rb") as stream:
        assert stream.read(7) == b"begin\0\0"
        stream.seek((1 << 39) - 1)
        assert stream.read(8) == b"\0middle\0"


@pytest.mark.parametrize("content", [b"", b"x", os.urandom(3 << 20)], ids=["empty", "short", "long"])
def test_a_copy_without_holes(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(content)
    copy_regular(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == content


def test_files_of_the_kernel_are_longer_or_shorter_than_they_say(tmp_path: Path) -> None:
    for number, name in enumerate(("/proc/version", "/sys/kernel/mm/transparent_hugepage/enabled")):
        copy_regular(Path(name), tmp_path / str(number))
        assert (tmp_path / str(number)).read_bytes() == Path(name).read_bytes()


def test_what_cannot_be_copied(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "there").write_text("as it was")
    for name in ("fifo", ".", "/dev/zero", "nothing"):
        with pytest.raises(OSError):  # noqa: PT011 - any
            copy_regular(tmp_path / name, tmp_path / "target")
    with pytest.raises(FileExistsError):
        copy_regular(tmp_path / "there", tmp_path / "there")
    assert (tmp_path / "there").read_text() == "as it was"
