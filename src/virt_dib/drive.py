# SPDX-License-Identifier: Apache-2.0
"""The helper drive of --drive, a disk image of the user's: looked at before anything starts, held by one build.

Elements write to it, so what is in it is not trusted. Its header is read by virt-dib, and not by qemu-img, which
opens whatever files a header names. What was found out about the format is never asked again: the appliance gets it
told, and it is noted beside the file, lest elements write into a raw drive what looks like another format to the next
build.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from virt_dib import tools
from virt_dib.disk_images import HEAD_BYTES, format_by, qcow2_header
from virt_dib.errors import UsageError

FORMATS = ("raw", "qcow2")
LEAST_BYTES = 64 << 20
"""What must be free on it; ``guest/drive.sh`` has the same number."""

_FLOCK = struct.Struct("hhqqi4x")
"""struct flock of fcntl(2)."""
_NOTE = "user.virt-dib.drive-format"
_CORRUPTIONS_STATUS, _LEAKS_STATUS = 2, 3
"""Of qemu-img check."""


@dataclass(frozen=True, slots=True)
class Drive:
    """A drive that can be used, as far as the host can tell."""

    path: Path
    format: str


def inspect(path: Path, wanted: str | None) -> Drive:
    """Look at the drive *path*, whose format is *wanted* or to be found out. Nothing is written.

    Raises:
        UsageError: it cannot be used, or another program uses it.
    """
    real = Path(os.path.realpath(path))
    size_bytes, header = _read(path)
    image_format = wanted or _detect(path, header)
    if image_format == "qcow2":
        size_bytes = _check_header(path, header)
    if size_bytes < LEAST_BYTES:
        raise _refusal(
            path,
            f"it is too small: {size_bytes >> 20} MiB, at least {LEAST_BYTES >> 20} MiB needed",
            "make a larger one, of 10G or more: truncate -s 10G NEW && mkfs.ext4 NEW",
        )
    _check_use(path, real)
    if image_format == "qcow2":
        _check_tables(path, real)
    return Drive(real, image_format)


@contextlib.contextmanager
def held(drive: Drive | None) -> Iterator[None]:
    """Keep other builds from *drive*, if there is one.

    Raises:
        UsageError: another build has it.
    """
    if drive is None:
        yield
        return
    try:
        # Of a block device that is mounted, this fails; and it cannot be mounted meanwhile.
        exclusive = os.O_EXCL if stat.S_ISBLK(drive.path.stat().st_mode) else 0
        descriptor = os.open(drive.path, os.O_RDWR | os.O_CLOEXEC | exclusive)
    except OSError as error:
        raise _refusal(drive.path, error.strerror or "", "is it mounted, or in use?") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(drive.path, "another build") from error
        yield
    finally:
        os.close(descriptor)


def note_format(drive: Drive) -> None:
    """Note the format of *drive* beside it, before elements can write anything into it."""
    with contextlib.suppress(OSError):
        os.setxattr(drive.path, _NOTE, drive.format.encode())


# ---- what is there ----


def _read(path: Path) -> tuple[int, bytes]:
    """Its length, and how it begins."""
    try:
        state = path.stat()
        if stat.S_ISDIR(state.st_mode):
            raise _refusal(path, "it is a directory", "give the file of a disk image; for a directory: --image-cache")
        if not stat.S_ISREG(state.st_mode) and not stat.S_ISBLK(state.st_mode):
            raise _refusal(path, "it is neither a file nor a block device", "give the file of a disk image")
        with path.open("r+b", buffering=0) as stream:
            return stream.seek(0, os.SEEK_END), os.pread(stream.fileno(), HEAD_BYTES, 0)
    except OSError as error:
        if error.errno == errno.ENOENT:
            reason, hint = "it does not exist", _make_hint(shlex.quote(str(path)))
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason, hint = error.strerror or "", "it must be readable and writable for this user"
        else:
            reason, hint = error.strerror or "", "give another --drive"
        raise _refusal(path, reason, hint) from error


def _make_hint(name: str) -> str:
    return f"make one: truncate -s 10G {name} && mkfs.ext4 {name}"


def _detect(path: Path, header: bytes) -> str:
    """The format by the header, unless elements may have written that into the drive."""
    found, noted = format_by(header), _noted(path)
    if noted not in (None, found):
        other = f"--drive-format {found}" if found in FORMATS else f"make a qcow2 image of it, if you trust its {found}"
        raise _refusal(
            path,
            f"it was {noted} when a build used it last, and looks like {found} now",
            f"elements may have written that into it. If it is still {noted}: --drive-format {noted}; "
            f"if you have put another image there: {other}",
        )
    if found not in FORMATS:
        # To convert what elements have written would show them the files that they name in it.
        hint = (
            "if it is raw, elements may have written that into it: --drive-format raw; if it is an image that you "
            f"trust, qemu-img convert -O qcow2 {shlex.quote(str(path))} NEW makes a drive of it"
        )
        raise _refusal(path, f"its format is {found}, not raw or qcow2", hint)
    return found


def _noted(path: Path) -> str | None:
    """The format that the last build used, if that is known."""
    try:
        return os.getxattr(path, _NOTE).decode(errors="replace")
    except OSError:
        return None


def _check_header(path: Path, header: bytes) -> int:
    """The size of the disk in a qcow2 image that is all there is to it."""
    found = qcow2_header(header)
    if found is None:
        raise _refusal(path, "it is not a qcow2 image", "leave out --drive-format, or give the right one")
    if found.version not in (2, 3):
        raise _refusal(path, f"its qcow2 version is {found.version}, which does not exist", "make a new drive")
    flat = f"qemu-img convert -O qcow2 '{path}' NEW makes a drive that stands alone, if you trust this one"
    for applies, what in (
        (found.has_backing_file, "has a backing file"),
        (found.has_data_file, "has an external data file"),
        (found.is_encrypted, "is encrypted"),
    ):
        if applies:
            raise _refusal(path, f"it {what}", flat)
    if found.is_corrupt:
        raise _damaged(path, "it is marked as corrupt")
    return found.size_bytes


def _check_use(path: Path, real: Path) -> None:
    """Refuse an image that a virtual machine uses, or that is a loop device of this host, as when it is mounted."""
    with path.open("r+b") as stream:
        # QEMU has locks on some of these bytes of all images it uses (RAW_LOCK_PERM_BASE in its file-posix.c).
        lock = fcntl.fcntl(stream, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 100, 200, 0))
        if _FLOCK.unpack(lock)[0] != fcntl.F_UNLCK:
            raise _in_use(path, "another program")
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if backing.read_text().rstrip("\n") == str(real):
                raise _in_use(path, f"the loop device /dev/{backing.parents[1].name}")


def _check_tables(path: Path, real: Path) -> None:
    """Have QEMU look at a qcow2 image that is known to name no other files."""
    program = tools.require("qemu-img", purpose="look at the drive", package="qemu-utils")
    command: list[str | Path] = [program, "check", "-f", "qcow2", "--output=json", real]
    result = tools.run(command, doing="looking at the drive", check=False)
    if result.exit_status == _CORRUPTIONS_STATUS:
        raise _damaged(path, "the image is corrupt")
    if result.exit_status not in (0, _LEAKS_STATUS):
        said = result.stderr.strip().splitlines() or ["no reason given"]
        # The path is in our own words already.
        raise _damaged(path, said[0].removeprefix("qemu-img: ").removeprefix(f"Could not open '{real}': "))


def _refusal(path: Path, reason: str, hint: str) -> UsageError:
    return UsageError(f"cannot use '{path}' as helper drive: {reason}", hint=hint)


def _damaged(path: Path, reason: str) -> UsageError:
    return _refusal(
        path, reason, f"try qemu-img check -r all '{path}', or make a new drive: nothing but caches is lost"
    )


def _in_use(path: Path, user: str) -> UsageError:
    return _refusal(path, f"{user} uses it", "wait until that has ended, or give another --drive")
