# SPDX-License-Identifier: Apache-2.0
"""The image cache of --image-cache: a build works on a copy of it, and what it has cached comes back.

What lies directly in the directory is an *entry*. An entry in which a build has changed anything is replaced as a
whole, by renaming, under a lock. If it is no more as the build got it, another build was faster, and its version
stays: two states of one git repository do not mix. A build only ever sees copies, so it cannot write to the files of
the cache, nor through links in it. docs/caches.md is for users.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, final

from virt_dib import staging, unpacking
from virt_dib.errors import ApplianceError, ToolError, UsageError, reason_of
from virt_dib.files import copy_content, remove_tree, temp_dir_variable
from virt_dib.interrupts import shielded

LIMIT_BYTES = 64 * 1024**3
"""The most that one build may add."""

_OWN = ".virt-dib-"
"""How the names of our own directories in a cache begin."""
_ASIDE = "old"
"""The directory in one of our own with the entries that are being replaced."""
_LONGEST_PATH_BYTES = staging.LONGEST_PATH_BYTES - 100
"""Below a directory on the build disk."""
_FICLONE = 0x40049409
"""linux/fs.h: have one file share the blocks of another."""
_CHANGED = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP, errno.ENOTDIR)
"""What the host says of a file with which others are at work, who do not know of our lock."""

_Signature = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """What ``ImageCache.receive`` did."""

    entries: tuple[str, ...]
    """Those that are new or newer."""
    refused: tuple[str, ...]
    """Those that stay as they were: another build has changed them, or not all of them could be copied."""
    left_out: tuple[str, ...]
    """Names of devices, of links that lead elsewhere and the like, as the guest wrote them."""


class ImageCache:
    """The cache *directory* of the user's, for one build, whose own directory is *workspace*."""

    def __init__(self, directory: Path, workspace: Path) -> None:
        self.directory = directory
        self.archive = workspace / "image-cache.tar"
        """Where what comes back may be gathered."""
        self._before: dict[str, dict[str, _Signature]] = {}
        """What the build got, entry by entry, by relative path."""
        self._partly: set[str] = set()
        """Entries of which not all could be copied."""
        self.size_bytes = 0
        """Of what was copied."""

    def copy_to(self, target: Path) -> None:
        """Copy what is cached into the directory *target*, without what this user may not read.

        Symbolic links that lead elsewhere, and devices and the like, are left out too.

        Raises:
            ToolError: the host refuses, for want of space or rights.
        """
        try:
            self._copy_all(target)
        except OSError as error:
            raise ToolError(
                f"copying the image cache '{self.directory}' for the build: {reason_of(error)}",
                hint=f"make room in the directory of {temp_dir_variable()}, give another --image-cache, "
                "or leave it out",
            ) from error

    def receive(self) -> Received:
        """Take over what ``guest/image-cache.py`` has gathered, from the tar file ``archive``.

        Raises:
            ApplianceError: it is not what was to be gathered.
            OSError: the host refuses to write.
        """
        with _own_directory(self.directory) as directory:
            # Not where what is put aside is, which the next build gives back should this one be killed.
            gathered, aside = directory / "gathered", directory / _ASIDE
            gathered.mkdir()
            aside.mkdir()
            copied = unpacking.copy_out(self.archive, gathered, limit_bytes=LIMIT_BYTES, as_cache=True)
            with contextlib.suppress(OSError):
                self.archive.unlink()
            if sorted(os.listdir(gathered)) != ["new", "unchanged"] or not (gathered / "new").is_dir():
                raise ApplianceError("taking over the image cache: the guest gave something else")
            with _locked(self.directory, fcntl.LOCK_EX):
                refused = self._complete(gathered)
                names = [name for name in _entries(gathered / "new") if name not in refused]
                for name in names:
                    self._replace(name, gathered / "new" / name, aside / name)
        return Received(entries=tuple(names), refused=tuple(sorted(refused)), left_out=copied.left_out)

    # ---- inside ----

    def _copy_all(self, target: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        target.mkdir(exist_ok=True)
        if any(name.startswith(_OWN) for name in os.listdir(self.directory)):
            with _locked(self.directory, fcntl.LOCK_EX):
                _sweep(self.directory)
        with _locked(self.directory, fcntl.LOCK_SH), _Source(self.directory) as source:
            for name in _entries(self.directory):
                self._before[name] = dict(_states(self.directory, name))
                for path, state in self._before[name].items():
                    if not self._copy(source, path, state[0], target):
                        self._partly.add(name)

    def _copy(self, source: _Source, path: str, mode: int, target: Path) -> bool:
        copy = target / path
        try:
            if len(os.fsencode(path)) > _LONGEST_PATH_BYTES:
                return False
            if stat.S_ISDIR(mode):
                os.close(source.open(path, os.O_DIRECTORY))
                copy.mkdir()
            elif stat.S_ISREG(mode):
                # O_NONBLOCK: by now it may be a FIFO.
                with open(source.open(path, os.O_NONBLOCK), "rb") as reader:
                    if not stat.S_ISREG(os.fstat(reader.fileno()).st_mode):
                        return False
                    _clone(reader, copy)
                self.size_bytes += copy.stat().st_size
            elif stat.S_ISLNK(mode) and unpacking.stays_inside(path, link := source.readlink(path)):
                copy.symlink_to(link)
            else:
                return False
        except OSError as error:
            if error.errno not in _CHANGED:
                raise
            return False
        return True

    def _complete(self, gathered: Path) -> set[str]:
        """Put the unchanged files of changed entries beside the new ones; return the entries that stay as they were."""
        new = gathered / "new"
        refused = {name for name in _entries(new) if name in self._partly or self._has_changed(name)}
        places = {"", *(os.path.relpath(place, new) for place, _, _ in os.walk(new))}
        with _Source(self.directory) as source:
            for path in self._unchanged(gathered / "unchanged"):
                name = path.split("/", 1)[0]
                state = self._before.get(name, {}).get(path)
                if name in refused or state is None or not stat.S_ISREG(state[0]):
                    continue
                if os.path.dirname(path) not in places or not _take_along(source, path, state, new / path):
                    refused.add(name)
        return refused

    def _unchanged(self, path: Path) -> list[str]:
        """The words in the guest's list of files that are as it got them."""
        if not path.is_file():
            raise ApplianceError("taking over the image cache: the guest gave no list of files")
        given = [os.fsencode(name) for names in self._before.values() for name in names]
        most_bytes = sum(map(len, given)) + len(given)
        with path.open("rb") as stream:
            data = stream.read(most_bytes + 1)
        if len(data) > most_bytes or data.count(b"\0") > len(given):
            raise ApplianceError("taking over the image cache: the guest's list of files is longer than it can be")
        return [os.fsdecode(word) for word in data.split(b"\0")]

    def _has_changed(self, name: str) -> bool:
        return dict(_states(self.directory, name)) != self._before.get(name, {})

    def _replace(self, name: str, new: Path, aside: Path) -> None:
        entry = self.directory / name
        with shielded():
            if not os.path.lexists(entry) or not (new.is_dir() or stat.S_ISDIR(entry.lstat().st_mode)):
                new.rename(entry)
                return
            entry.rename(aside)
            try:
                new.rename(entry)
            except OSError:
                aside.rename(entry)
                raise


@final
class _Source:
    """The directory of a cache, read without following a link anywhere in it; a context manager.

    Where others can write there, too, a directory may become a link to a place that this user alone may read, after it
    was looked at.
    """

    def __init__(self, directory: Path) -> None:
        self._top = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._parent = ("", os.dup(self._top))
        """The last directory that was asked for. Others come one after the other."""

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._parent[1])
        os.close(self._top)

    def open(self, path: str, flags: int) -> int:
        """Open a file or directory to be read.

        Raises:
            OSError: it cannot be read, or there is a link on the way.
        """
        parent, name = os.path.split(path)
        return os.open(name, flags | os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory(parent))

    def readlink(self, path: str) -> str:
        """Where a symbolic link leads.

        Raises:
            OSError: it is none, or there is another one on the way.
        """
        parent, name = os.path.split(path)
        return os.readlink(name, dir_fd=self._directory(parent))

    def _directory(self, path: str) -> int:
        known, descriptor = self._parent
        if path != known:
            opened = os.dup(self._top)
            for name in filter(None, path.split("/")):
                above = opened
                try:
                    opened = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
                finally:
                    os.close(above)
            os.close(descriptor)
            self._parent = (path, opened)
        return self._parent[1]


def check(directory: Path, home: Path | None) -> None:
    """Refuse a directory that cannot be, or was not meant to be, an image cache.

    Raises:
        UsageError: saying why.
    """
    doing = f"cannot keep the image cache in '{directory}'"
    hint = "name a directory that you can write with --image-cache, or one to be made"
    real = Path(os.path.realpath(directory))
    if real in (Path("/"), None if home is None else Path(os.path.realpath(home))):
        raise UsageError(
            f"{doing}: the elements get a copy of all that is in it",
            hint="give --image-cache a directory that holds nothing else, such as ~/.cache/image-create",
        )
    there = next(place for place in (real, *real.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UsageError(f"{doing}: '{there}' is not a directory", hint=hint)
    if not os.access(there, os.R_OK | os.W_OK | os.X_OK):
        raise UsageError(f"{doing}: no right to read and write '{there}'", hint=hint)


def _take_along(source: _Source, path: str, state: _Signature, copy: Path) -> bool:
    """Have the file *path* of a cache at *copy*, too, unless it is not the one with *state* any more."""
    try:
        descriptor = source.open(path, os.O_PATH)
    except OSError as error:
        if error.errno not in _CHANGED:
            raise
        return False
    try:
        if _signature(os.fstat(descriptor)) != state:
            return False
        # By name it could be another one by now.
        opened = f"/proc/self/fd/{descriptor}"
        try:
            # An absolute path needs no directory to start from; but without one, Python does not follow the link.
            os.link(opened, copy, src_dir_fd=descriptor, follow_symlinks=True)
        except FileExistsError:
            return False
        except OSError:
            # There are file systems without hard links; and with other users' files the kernel forbids them.
            with open(opened, "rb") as reader:
                _clone(reader, copy)
    finally:
        os.close(descriptor)
    return True


def _clone(reader: BinaryIO, copy: Path) -> None:
    """Copy a file to the new file *copy*, with mode and times; they share blocks where that is possible."""
    with copy.open("xb") as writer:
        state = os.fstat(reader.fileno())
        try:
            fcntl.ioctl(writer, _FICLONE, reader.fileno())
        except OSError:
            copy_content(reader.fileno(), writer.fileno())
        os.fchmod(writer.fileno(), stat.S_IMODE(state.st_mode) & 0o777 | stat.S_IRUSR)
    os.utime(copy, ns=(state.st_atime_ns, state.st_mtime_ns))


def _entries(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if not name.startswith(_OWN))


def _states(directory: Path, name: str) -> Iterator[tuple[str, _Signature]]:
    """The files of an entry, if there is one, by relative path, a directory before what is in it."""
    paths = [name]
    for path in paths:
        try:
            state = (directory / path).lstat()
        except OSError:
            continue
        yield path, _signature(state)
        if stat.S_ISDIR(state.st_mode):
            with contextlib.suppress(OSError):
                paths += [f"{path}/{inside}" for inside in sorted(os.listdir(directory / path))]


def _signature(state: os.stat_result) -> _Signature:
    if stat.S_ISDIR(state.st_mode):
        # It has another date and size when it is used, and that is no other content.
        return (state.st_mode, 0, 0, 0)
    return (state.st_mode, state.st_size, state.st_mtime_ns, state.st_ino)


@contextlib.contextmanager
def _locked(directory: Path, how: int, *, flags: int = 0) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | flags)
    try:
        fcntl.flock(descriptor, how)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _own_directory(cache: Path) -> Iterator[Path]:
    """A directory in *cache*, so that renaming is possible; those of killed builds are removed."""
    cache.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        # Between its making and its lock, another build would take it for a killed one's.
        with _locked(cache, fcntl.LOCK_EX):
            _sweep(cache)
            with shielded():
                directory = Path(tempfile.mkdtemp(prefix=_OWN, dir=cache))
                stack.enter_context(_locked(directory, fcntl.LOCK_EX))
                # It keeps its lock until it is gone.
                stack.callback(remove_tree, directory)
        yield directory


def _sweep(cache: Path) -> None:
    """Remove what killed builds have left; *cache* is locked.

    Entries that they had put aside, and not replaced yet, come back.
    """
    for name in os.listdir(cache):
        if name.startswith(_OWN):
            left, how = cache / name, fcntl.LOCK_EX | fcntl.LOCK_NB
            with contextlib.suppress(OSError), _locked(left, how, flags=os.O_NOFOLLOW) as descriptor:
                if not _is_private(os.fstat(descriptor)):
                    continue
                _give_back(cache, name)
                # By the descriptor: in a cache that others can write to, the name may be something else's by now.
                for inside in os.listdir(descriptor):
                    remove_tree(Path(f"/proc/self/fd/{descriptor}/{inside}"))
                    with contextlib.suppress(OSError):  # it has been a directory
                        os.unlink(inside, dir_fd=descriptor)
                left.rmdir()


def _is_private(state: os.stat_result) -> bool:
    """Whether nobody else can put anything into a directory, such as a link in the place of what is to be removed."""
    return state.st_uid == os.geteuid() and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _give_back(cache: Path, own: str) -> None:
    """Put entries that are aside in the directory *own* where they were, if nothing is there.

    Raises:
        OSError: there may be some in it still.
    """
    with _Source(cache) as source:
        try:
            aside = source.open(f"{own}/{_ASIDE}", os.O_DIRECTORY)
        except FileNotFoundError:
            return
    try:
        for name in os.listdir(aside):
            if not os.path.lexists(cache / name):
                os.rename(name, cache / name, src_dir_fd=aside)
    finally:
        os.close(aside)
