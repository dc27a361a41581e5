# SPDX-License-Identifier: Apache-2.0
"""make-squashfs.py FILE: make the tar archive on standard input a squashfs in FILE, compressed with xz.

It runs on the host, confined, since the archive is the guest's and may be anything. sqfstar takes no names that
begin with './' in all places where GNU tar writes them, no times that a squashfs cannot hold, and nothing of the
top directory. So it gets a plainer archive from here, and the top directory's owner, mode and time as options.
What a squashfs cannot hold (ACLs, fractions of seconds) is left out.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tarfile
from typing import Any, BinaryIO

LAST_TIME = 2**32 - 1
ATTRIBUTE = "SCHILY.xattr."
TEXT: Any = {"encoding": "utf-8", "errors": "surrogateescape"}
"""For tarfile: names and attributes are any bytes."""
MOST_MEMORY_BYTES = 1 << 30
"""For this program, which reads a header of any length at once; sqfstar has its own limits."""
PREFIXES = ("user.", "trusted.", "security.")
"""Of the attributes that a squashfs can hold."""
LONGEST_TOLD = 200
MOST_MEMBERS = 4_000_000
"""Of whose names the memory has room for something to know each by."""


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
    # GNU tar writes % and = in names as %25 and %3D. sqfstar takes names as they are, and there can be no = in one.
    new.pax_headers = {
        key.replace("%25", "%"): value
        for key, value in member.pax_headers.items()
        if key.startswith(ATTRIBUTE) and key[len(ATTRIBUTE) :].startswith(PREFIXES) and "%3D" not in key
    }
    return new


def start_sqfstar(top: tarfile.TarInfo, target: str, limits: tuple[int, int]) -> tuple[int, BinaryIO]:
    """Its process, and what it reads; *limits* are those of its memory."""
    command = [
        "sqfstar", "-force", "-comp", "xz", "-no-progress", "-quiet", "-root-mode", f"{top.mode & 0o7777:o}",
        "-root-uid", str(top.uid), "-root-gid", str(top.gid), "-root-time", str(time_of(top)), target,
    ]  # fmt: skip
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(reading, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        os.execvp(command[0], command)  # noqa: S606 - nothing else is to be done with it
    os.close(reading)
    return child, open(writing, "wb")


def forget(archive: Any) -> None:  # noqa: ANN401 - typeshed does not have the list
    """Let go of the members seen so far: a TarFile keeps them all."""
    archive.members.clear()


class Names:
    """The names seen so far, as sqfstar 4.5.1 takes them, which waits for ever when one comes some 12,000 times."""

    def __init__(self) -> None:
        self._seen = {hash("")}

    def add(self, name: str) -> None:
        """Refuse a name that came before: GNU tar writes each file of a tree once.

        Raises:
            tarfile.ReadError: it did, or there are too many.
        """
        words = [word for word in name.partition("\0")[0].split("/") if word not in ("", ".", "..")]
        # Python's own hash, which has a key that nobody knows, is all there is room for.
        known = hash("/".join(words))
        if known in self._seen:
            raise tarfile.ReadError(f"a name is there twice: {name[:LONGEST_TOLD]!r}")
        if len(self._seen) > MOST_MEMBERS:
            raise tarfile.ReadError(f"there are more than {MOST_MEMBERS} files in it")
        self._seen.add(known)


def feed(source: tarfile.TarFile, stream: BinaryIO) -> None:
    """Write all that is left of the archive, in plainer form."""
    names = Names()
    with stream, tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, **TEXT) as made:
        for member in source:
            if source.pax_headers:
                raise tarfile.ReadError("a header is for all files")
            names.add(member.name)
            made.addfile(plain(member), source.extractfile(member) if member.isreg() else None)
            forget(source)
            forget(made)
        # tarfile takes what is no header for the end.
        rest: Any = source.fileobj
        while data := rest.read(1 << 20):
            if data.strip(b"\0"):
                raise tarfile.ReadError("there is something after its end")


def first_member(source: tarfile.TarFile) -> tarfile.TarInfo:
    """The top directory, which comes first."""
    top = source.next()
    if top is None or not top.isdir() or top.name not in {".", "./"}:
        raise tarfile.ReadError("it does not begin with its top directory")
    forget(source)
    return top


def ended(child: int) -> bool:
    """Wait for sqfstar; say whether it is content."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        sys.stderr.write(f"sqfstar was ended by signal {-code}\n")
    return code == 0


def main() -> None:
    """Make the squashfs; the exit status is 0 if it is complete."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if limits[1] == resource.RLIM_INFINITY or limits[1] > MOST_MEMORY_BYTES:
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, limits[1]))
    child, complete = None, True
    try:
        source = tarfile.open(fileobj=sys.stdin.buffer, mode="r|", **TEXT)  # noqa: SIM115 - the process ends with it
        child, stream = start_sqfstar(first_member(source), sys.argv[1], limits)
        feed(source, stream)
    except BrokenPipeError:
        pass  # sqfstar says why
    except Exception as error:  # noqa: BLE001 - headers made up to hurt have tarfile raise anything
        sys.stderr.write(f"reading the archive: {str(error) or type(error).__name__}\n")
        complete = False
    # What it has got is not all there is.
    if child is not None and not complete:
        os.kill(child, signal.SIGKILL)
    elif child is not None:
        complete = ended(child)
    sys.stderr.flush()
    # Without the objects' own tidying, which would complain about the pipe.
    os._exit(not complete)


if __name__ == "__main__":
    main()
