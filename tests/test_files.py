# SPDX-License-Identifier: Apache-2.0
"""Files that may be anything: read without a wait that never ends, removed without harm to others."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
from pathlib import Path

import pytest

from virt_dib import tools
from virt_dib.files import copy_regular, read_any, read_regular, remove_tree


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


# ---- removing ----

EXCHANGE = """
import ctypes, os, sys
RENAME_EXCHANGE, AT_FDCWD = 2, -100
libc = ctypes.CDLL(None)
one, other = (os.fsencode(name) for name in sys.argv[1:])
print("begins", flush=True)
while True:
    libc.renameat2(AT_FDCWD, one, AT_FDCWD, other, RENAME_EXCHANGE)
"""


def test_a_link_that_comes_to_the_place_of_a_directory_is_not_followed(tmp_path: Path) -> None:
    for number in range(40):
        kept, tree = tmp_path / f"kept{number}", tmp_path / f"tree{number}"
        kept.mkdir(mode=0o755)
        (tree / "sub").mkdir(parents=True)
        (tree / "link").symlink_to(kept)
        for place in (kept, tree / "sub"):
            for name in range(20):
                (place / f"file{name}").touch()
        with tools.started([sys.executable, "-c", EXCHANGE, tree / "sub", tree / "link"]) as process:
            assert process.stdout
            process.stdout.readline()
            remove_tree(tree)
        assert len(os.listdir(kept)) == 20
        assert kept.stat().st_mode & 0o777 == 0o755


def test_directories_deeper_than_there_are_descriptors(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    remove_tree(tmp_path / "d")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root needs no rights")
def test_directories_that_their_owner_may_not_even_read(tmp_path: Path) -> None:
    (tmp_path / "tree/sub/below").mkdir(parents=True)
    (tmp_path / "tree/sub").chmod(0)
    (tmp_path / "tree").chmod(0)
    remove_tree(tmp_path / "tree")
    assert os.listdir(tmp_path) == []
