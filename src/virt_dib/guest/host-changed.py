# SPDX-License-Identifier: Apache-2.0
"""Names what has changed in a tree, in the order of NOW. Each name ends with a NUL.

host-changed.py BEFORE NOW      files of 'INODE NAME', each with a NUL; in NOW after '+' where it was changed, else '-'

What lies in a directory does not change when the directory gets another name, but it is no longer what was there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

CHUNK_BYTES = 1 << 20


def entries(path: str) -> Iterator[bytes]:
    """What the file has, without the NULs."""
    with open(path, "rb") as stream:
        rest = b""
        while chunk := stream.read(CHUNK_BYTES):
            *whole, rest = (rest + chunk).split(b"\0")
            yield from whole


def changed(before: str, now: str) -> Iterator[bytes]:
    """The names. A file with several of them has changed under all or none, for they are to stay one file."""
    there = set(entries(before))
    inodes = {
        entry[1:].partition(b" ")[0] for entry in entries(now) if entry.startswith(b"+") or entry[1:] not in there
    }
    # To unpack a file gives its directory another time.
    directories = {name.rpartition(b"/")[0] for inode, name in named(now) if inode in inodes}
    for inode, name in named(now):
        if inode in inodes or name in directories:
            yield name


def named(now: str) -> Iterator[tuple[bytes, bytes]]:
    """Inodes and names."""
    for entry in entries(now):
        inode, _, name = entry[1:].partition(b" ")
        yield inode, name


_, before_path, now_path = sys.argv
sys.stdout.buffer.writelines(name + b"\0" for name in changed(before_path, now_path))
