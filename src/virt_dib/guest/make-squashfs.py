# SPDX-License-Identifier: Apache-2.0
"""make-squashfs.py FILE: make the tar archive on standard input a squashfs in FILE, compressed with xz.

It runs on the host, confined, since the archive is the guest's and may be anything. sqfstar takes no names that
begin with './' in all places where GNU tar writes them, no times that a squashfs cannot hold, and nothing of the
top directory. So it gets a plainer archive from here, and the top directory's owner, mode and time as options.
What a squashfs cannot hold (ACLs, fractions of seconds) is left out.
"""

from __future__ import annotations

import os
import signal
import sys
import tarfile
from typing import Any, BinaryIO

LAST_TIME = 2**32 - 1
ATTRIBUTE = "SCHILY.xattr."
TEXT: Any = {"encoding": "utf-8", "errors": "surrogateescape"}
"""For tarfile: names and attributes are any bytes."""
PREFIXES = ("user.", "trusted.", "security.")
"""Of the attributes that a squashfs can hold."""


def time_of(member: tarfile.TarInfo) -> int:
    """Whole seconds, within what a squashfs can hold. As a number, tarfile has them rounded."""
    seconds, _, _ = member.pax_headers.get("mtime", f"{member.mtime:.0f}").partition(".")
    return min(max(int(seconds), 0), LAST_TIME)


def without_dot(name: str) -> str:
    """A name in the archive, from the top directory on."""
    return name.removeprefix("./")


def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same file for sqfstar. Files with holes come with their zeros, and get their holes back."""
    new = tarfile.TarInfo(without_dot(member.name))
    new.type = tarfile.REGTYPE if member.isreg() else member.type
    new.mode, new.uid, new.gid, new.mtime = member.mode, member.uid, member.gid, time_of(member)
    new.size = member.size if member.isreg() else 0
    new.devmajor, new.devminor = member.devmajor, member.devminor
    new.linkname = without_dot(member.linkname) if member.islnk() else member.linkname
    new.pax_headers = {
        key: value
        for key, value in member.pax_headers.items()
        if key.startswith(ATTRIBUTE) and key[len(ATTRIBUTE) :].startswith(PREFIXES)
    }
    return new


def start_sqfstar(top: tarfile.TarInfo, target: str) -> tuple[int, BinaryIO]:
    """Its process, and what it reads."""
    command = [
        "sqfstar", "-force", "-comp", "xz", "-no-progress", "-quiet", "-root-mode", f"{top.mode & 0o7777:o}",
        "-root-uid", str(top.uid), "-root-gid", str(top.gid), "-root-time", str(time_of(top)), target,
    ]  # fmt: skip
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(reading, 0)
        os.execvp(command[0], command)  # noqa: S606 - nothing else is to be done with it
    os.close(reading)
    return child, open(writing, "wb")


def forget(archive: Any) -> None:  # noqa: ANN401 - typeshed does not have the list
    """Let go of the members seen so far: a TarFile keeps them all."""
    archive.members.clear()


def feed(source: tarfile.TarFile, stream: BinaryIO) -> None:
    """Write all that is left of the archive, in plainer form."""
    with stream, tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, **TEXT) as made:
        for member in source:
            made.addfile(plain(member), source.extractfile(member) if member.isreg() else None)
            forget(source)
            forget(made)
        # tarfile takes what is no header for the end.
        rest: Any = source.fileobj
        while data := rest.read(1 << 20):
            if data.strip(b"\0"):
                raise tarfile.ReadError("there is something after its end")


def main() -> None:
    """Make the squashfs; the exit status is 0 if it is complete."""
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|", **TEXT) as source:
        top = source.next()
        if top is None or not top.isdir() or top.name not in {".", "./"}:
            sys.exit("the archive does not begin with its top directory")
        forget(source)
        child, stream = start_sqfstar(top, sys.argv[1])
        try:
            feed(source, stream)
        except BrokenPipeError:
            pass  # sqfstar says why
        except (OSError, tarfile.TarError, ValueError) as error:
            sys.stderr.write(f"reading the archive: {error}\n")
            os.kill(child, signal.SIGKILL)
        sys.stderr.flush()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # Without the objects' own tidying, which would complain about the pipe.
    os._exit(status != 0)


if __name__ == "__main__":
    main()
