# SPDX-License-Identifier: Apache-2.0
"""Files that users name and elements bring, read with care: nothing that never ends, and not more than is sensible."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""What the system says of a path, or of the target of a link, where no file can be."""
HOST_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
_CHUNK_BYTES = 1 << 26
_UNIX_WORDS = 8
"""Of a line of ``/proc/net/unix`` with a path in it: the last but one is the inode."""
_STALE_S = 3600.0
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def temp_dir(environ: Mapping[str, str] = os.environ, *, root: Path = Path("/")) -> Path:
    """Where the disks of builds are: in the directory that libguestfs takes by guestfs(3), or in ``/var/tmp``."""
    return Path(environ.get(temp_dir_variable(environ)) or root / "var/tmp")


def temp_dir_variable(environ: Mapping[str, str] = os.environ) -> str:
    """The variable that says where that is, or would if it was set."""
    return "LIBGUESTFS_TMPDIR" if environ.get("LIBGUESTFS_TMPDIR") else "TMPDIR"


def partial_name(name: str) -> str:
    """What a file is called that is to get *name*, until it is complete. Nobody can know it before."""
    return f".{name}.{secrets.token_hex(4)}.partial"


def remove_stale(directory: Path, pattern: str) -> None:
    """Remove files and directories in *directory* with names that fit *pattern* and that are older than an hour.

    They are what a killed process leaves that needs them for a moment. What cannot be removed stays.
    """
    for path in directory.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > _STALE_S:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def sockets() -> Iterator[tuple[str, Path]]:
    """The number and the path of each Unix socket that a process has open in this network namespace."""
    text = Path("/proc/self/net/unix").read_text(errors="surrogateescape")
    lines = (line.split(maxsplit=_UNIX_WORDS - 1) for line in text.splitlines())
    yield from ((words[6], Path(words[7])) for words in lines if len(words) == _UNIX_WORDS)


def remove_any(path: Path) -> None:
    """Remove the file, link or directory *path*, or what can be removed of it; there may be nothing at all."""
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def remove_tree(path: Path) -> None:
    """Remove the directory *path* as far as possible, directories that may not be written too.

    Links are removed, not followed, also those that come to the place of a directory meanwhile; what cannot be removed
    stays, and there may be nothing at all.
    """
    with contextlib.suppress(OSError):
        top = _open_directory(os.fspath(path), None)
        try:
            _empty(top)
        finally:
            os.close(top)
        path.rmdir()


def _open_directory(name: str, parent: int | None) -> int:
    """A descriptor of the directory *name* in *parent*, in which the owner may write from now on."""
    place = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        with contextlib.suppress(OSError):
            os.chmod(f"/proc/self/fd/{place}", stat.S_IRWXU)
        return os.open(".", _DIRECTORY_FLAGS, dir_fd=place)
    finally:
        os.close(place)


def _empty(top: int) -> None:
    """Remove what is in a directory. One at a time is open: there may be more in each other than descriptors."""
    here = os.dup(top)
    way: list[tuple[str, list[str], tuple[int, int]]] = []
    names = _remove_files(here)
    try:
        while names or way:
            if names:
                with contextlib.suppress(OSError):
                    inner = _open_directory(name := names.pop(), here)
                    way.append((name, names, _identity(here)))
                    os.close(here)
                    here, names = inner, _remove_files(inner)
                continue
            name, names, identity = way.pop()
            outer = os.open("..", _DIRECTORY_FLAGS, dir_fd=here)
            os.close(here)
            here = outer
            if _identity(here) != identity:
                # Somebody has put what was being removed elsewhere.
                return
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=here)
    finally:
        os.close(here)


def _remove_files(directory: int) -> list[str]:
    """Remove what is in a directory but other directories, and return their names."""
    names = []
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                names.append(entry.name)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.name, dir_fd=directory)
    return names


def _identity(directory: int) -> tuple[int, int]:
    state = os.fstat(directory)
    return state.st_dev, state.st_ino


def read_regular(path: Path, most_bytes: int) -> bytes:
    """The content of the plain file *path*.

    Raises:
        OSError: it cannot be read, is something else, or has more than *most_bytes*.
    """

    def require_plain(state: os.stat_result) -> None:
        if not stat.S_ISREG(state.st_mode):
            raise OSError(0, "not a regular file")

    return read_any(path, most_bytes, accept=require_plain)


def read_any(path: Path, most_bytes: int, *, accept: Callable[[os.stat_result], None] = lambda _: None) -> bytes:
    """The content of the file *path*. It may be a pipe, as of ``<(command)``, if somebody writes to it.

    *accept* is given what was opened, and may raise.

    Raises:
        OSError: it cannot be read, nobody writes to it, or it has more than *most_bytes*.
        ValueError: there cannot be such a file.
    """
    # A FIFO without a writer would hold the open for ever; a terminal is not to become ours.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        state = os.fstat(descriptor)
        if stat.S_ISDIR(state.st_mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        accept(state)
        content = _first_byte(descriptor) if stat.S_ISFIFO(state.st_mode) else b""
        os.set_blocking(descriptor, True)
        with open(descriptor, "rb", closefd=False) as stream:
            content += stream.read(most_bytes + 1)
    finally:
        os.close(descriptor)
    if len(content) > most_bytes:
        size = f"{most_bytes >> 20} MiB" if most_bytes >> 20 else f"{most_bytes >> 10} KiB"
        raise OSError(errno.EFBIG, f"larger than {size}")
    return content


def _first_byte(descriptor: int) -> bytes:
    """Of a FIFO that was opened without waiting; empty where there is a writer who has not said anything yet."""
    try:
        content = os.read(descriptor, 1)
    except BlockingIOError:
        return b""
    if not content:
        raise OSError(0, "it is a FIFO that nobody writes to")
    return content


def copy_regular(source: Path, target: Path) -> None:
    """Copy the content of the plain file *source* to the new file *target*. Its holes stay holes.

    Raises:
        OSError: it is no plain file, or one of them refuses.
    """
    reader = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(reader).st_mode):
            raise OSError(0, "not a regular file", os.fspath(source))
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            copy_content(reader, writer)
        except OSError as error:
            # What was asked for by number has no name.
            raise OSError(error.errno, error.strerror, os.fspath(source)) from error
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def copy_content(reader: int, writer: int) -> None:
    """Copy all of one plain file to another that is empty, by their descriptors, with its holes."""
    size = os.fstat(reader).st_size
    if size == 0:
        # The kernel's own files do not know their length.
        while content := os.read(reader, 1 << 20):
            os.write(writer, content)
        return
    end = 0
    while end < size:
        start, end = _next_data(reader, end, size)
        os.lseek(writer, start, os.SEEK_SET)
        while start < end:
            sent = os.sendfile(writer, reader, start, min(end - start, _CHUNK_BYTES))
            if sent == 0:
                # It has become shorter meanwhile.
                size = end = start
            start += sent
    os.ftruncate(writer, size)


def _next_data(reader: int, position: int, size: int) -> tuple[int, int]:
    """Where the next piece that is not a hole begins, and where it ends."""
    try:
        start = os.lseek(reader, position, os.SEEK_DATA)
        return start, min(size, os.lseek(reader, start, os.SEEK_HOLE))
    except OSError as error:
        # There is nothing but a hole until the end; or the file system knows no holes.
        return (size, size) if error.errno == errno.ENXIO else (position, size)
