# SPDX-License-Identifier: Apache-2.0
"""What comes back from the guest, which is not trusted: an archive, unpacked on the host."""

from __future__ import annotations

import errno
import io
import os
import stat
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from virt_dib.errors import ApplianceError
from virt_dib.files import HOST_IS_FULL
from virt_dib.interrupts import check_cancelled

_HOST_ERRORS = (*HOST_IS_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)
"""What a file system of the host refuses, whatever the archive holds."""
MOST_MEMBERS = 100_000
"""Files, directories and links that are taken over from the guest."""
MOST_CACHED = 1_000_000
"""As MOST_MEMBERS, of what elements cache: git repositories, packages."""
_MOST_HEADER_BYTES = 64 << 10
"""What an archive may say about one of them: several times the longest path, twice."""
_LONGEST_NAME_BYTES = 4096
"""PATH_MAX: of what the host could not even be asked for."""
_MOST_NAMES = 20
_TOLD_CHARACTERS = 200
_LAST_DATE_S = 1 << 33
_COPIED_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class CopiedOut:
    """What ``copy_out`` did."""

    files: int
    left_out: tuple[str, ...]
    """Names of links, devices and the like, as the guest wrote them: the first ones, as many as anybody reads."""
    more_left_out: int = 0
    """How many there were besides."""


def copy_out(archive: Path, target: Path, *, limit_bytes: int, as_cache: bool = False) -> CopiedOut:
    """Unpack what the guest left in the directory *target*: directories and plain files, never outside it.

    The guest is not trusted. A name that leads out of *target* ends it, and so does a second file of the same
    name; symbolic links, devices and FIFOs are left out; a hard link becomes a copy. Permissions are those of
    new files of the user, owners are not taken over.

    *as_cache*: times and the right to execute are kept, and so are symbolic links that cannot lead out of the
    directory directly in *target* that they are in.

    Raises:
        ApplianceError: the archive holds what does not belong in one, is damaged, or holds more than
            *limit_bytes* or ``MOST_MEMBERS``.
        OSError: the host refuses to write, for want of space or rights.
    """
    unpacking = _Unpacking(target, limit_bytes, as_cache=as_cache)
    try:
        with (
            _Headers(archive) as headers,
            tarfile.open(fileobj=headers, mode="r:") as tar,
            archive.open("rb") as stream,
        ):
            while (member := tar.next()) is not None:
                headers.check(tar)
                check_cancelled()
                unpacking.add(member, stream)
            _check_end(stream, tar.offset)
    except OSError as error:
        if error.errno in _HOST_ERRORS:
            raise
        raise ApplianceError(
            f"taking over what the guest left: {error.strerror or error}: {unpacking.name[:_TOLD_CHARACTERS]!r}",
            hint="two files may have one name, or a file the name of a directory",
        ) from error
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError, RecursionError, MemoryError) as error:
        # All of what tarfile is known to raise for headers made up to hurt.
        raise ApplianceError(
            f"the archive that the guest left is damaged: {str(error) or type(error).__name__}"
        ) from error
    left_out = tuple(unpacking.left_out)
    return CopiedOut(files=unpacking.files, left_out=left_out, more_left_out=unpacking.more_left_out)


class _Headers(io.FileIO):
    """An archive as tarfile reads it, which believes any length that a header gives, and keeps all it has read.

    The contents of files are not for it: between two members it skips them.
    """

    def __init__(self, archive: Path) -> None:
        super().__init__(archive)
        self._left_bytes = _MOST_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as any file, but not more than a member may need in all."""
        if size is None or not 0 <= size <= self._left_bytes:
            raise tarfile.ReadError("a header is too long")
        self._left_bytes -= size
        return super().read(size) or b""

    def check(self, tar: tarfile.TarFile) -> None:
        """Forget a member of *tar*, and allow another one."""
        if tar.pax_headers:
            # They would hold for all that follow, which each gets a copy.
            raise tarfile.ReadError("a header is for all files")
        members: Any = tar
        members.members.clear()
        self._left_bytes = _MOST_HEADER_BYTES


def _check_end(stream: IO[bytes], offset: int) -> None:
    """Refuse an archive that ends without an end mark: the module takes a damaged header for one."""
    stream.seek(offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ApplianceError(f"the archive that the guest left is damaged: no header at byte {offset}")


def stays_inside(name: str, target: str) -> bool:
    """Whether a symbolic link *name* with *target* leads to a place inside, whatever links lie on the way.

    Going up comes first, where the directories are those that the link lies in; and further down there are only
    links as harmless as this.
    """
    words = [word for word in target.split("/") if word not in ("", ".")]
    ups = next((number for number, word in enumerate(words) if word != ".."), len(words))
    inside = len(PurePosixPath(name).parts) - 1
    return bool(target) and "\0" not in target and target[0] != "/" and ".." not in words[ups:] and ups <= inside


def _known_by(path: Path) -> int:
    """What is remembered of a path, which may be long and one of many. One that is taken for another fails later."""
    return hash(str(path))


class _Unpacking:
    """The state of one ``copy_out``."""

    def __init__(self, target: Path, limit_bytes: int, *, as_cache: bool) -> None:
        self._target = target
        self._as_cache = as_cache
        self._most_members = MOST_CACHED if as_cache else MOST_MEMBERS
        self._limit_bytes = limit_bytes
        self._left_bytes = limit_bytes
        self._members = 0
        self._made = {_known_by(target)}
        self._sizes_bytes: dict[int, int] = {}
        """The files written."""
        self.name = ""
        """Of the member at work."""
        self.left_out: list[str] = []
        self.more_left_out = 0

    @property
    def _what(self) -> str:
        return "the image cache" if self._as_cache else "its output directory"

    @property
    def files(self) -> int:
        return len(self._sizes_bytes)

    def add(self, member: tarfile.TarInfo, archive: IO[bytes]) -> None:
        """Take over one member of *archive*."""
        self.name = member.name
        if member.size < 0 or member.offset_data < 0 or member.issparse():
            raise ApplianceError(f"the archive that the guest left is damaged at {member.name[:_TOLD_CHARACTERS]!r}")
        self._count()
        path = self._path(member.name)
        if member.isdir():
            if _known_by(path) not in self._made:
                self._make_parents(path)
                self._make_directory(path)
        elif member.isreg() and path != self._target:
            archive.seek(member.offset_data)
            executable = bool(self._as_cache and member.mode & stat.S_IXUSR)
            self._write(path, archive, member.size, executable=executable)
            if self._as_cache:
                date_s = min(max(member.mtime, 0), _LAST_DATE_S)
                os.utime(path, (date_s, date_s), follow_symlinks=False)
        elif member.islnk() and _known_by(original := self._path(member.linkname)) in self._sizes_bytes:
            with original.open("rb") as earlier:
                state = original.stat()
                executable = bool(state.st_mode & stat.S_IXUSR)
                self._write(path, earlier, self._sizes_bytes[_known_by(original)], executable=executable)
                if self._as_cache:
                    os.utime(path, ns=(state.st_mtime_ns, state.st_mtime_ns), follow_symlinks=False)
        elif self._as_cache and member.issym() and self._stays_inside(path, member.linkname):
            self._make_parents(path)
            path.symlink_to(member.linkname)
        elif len(self.left_out) < _MOST_NAMES:
            self.left_out.append(member.name)
        else:
            self.more_left_out += 1

    def _stays_inside(self, path: Path, target: str) -> bool:
        below = PurePosixPath(path.relative_to(self._target))
        return len(below.parts) > 1 and stays_inside("/".join(below.parts[1:]), target)

    def _path(self, name: str) -> Path:
        if len(os.fsencode(name)) > _LONGEST_NAME_BYTES:
            raise ApplianceError(
                f"taking over what the guest left: {os.strerror(errno.ENAMETOOLONG)}: {name[:_TOLD_CHARACTERS]!r}",
                hint="an element left it there",
            )
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts:
            raise ApplianceError(f"the guest left a file with the name {name!r}, which is not taken over")
        return self._target.joinpath(*parts)

    def _count(self) -> None:
        self._members += 1
        if self._members > self._most_members:
            raise ApplianceError(
                f"the guest left more than {self._most_members} files in {self._what}", hint="an element left it there"
            )

    def _make_parents(self, path: Path) -> None:
        missing = []
        while _known_by(path := path.parent) not in self._made:
            missing.append(path)
        for directory in reversed(missing):
            self._count()
            self._make_directory(directory)

    def _make_directory(self, path: Path) -> None:
        path.mkdir()
        self._made.add(_known_by(path))

    def _write(self, path: Path, source: IO[bytes], size_bytes: int, *, executable: bool) -> None:
        self._left_bytes -= size_bytes
        if self._left_bytes < 0:
            raise ApplianceError(f"the guest left more than {self._limit_bytes} bytes of files in {self._what}")
        self._make_parents(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o777 if executable else 0o666), "wb") as sink:
            left_bytes = size_bytes
            while left_bytes:
                data = source.read(min(left_bytes, _COPIED_BYTES))
                if not data:
                    raise tarfile.ReadError(f"the end is in {self.name!r}")
                left_bytes -= sink.write(data)
                check_cancelled()
        self._sizes_bytes[_known_by(path)] = size_bytes
