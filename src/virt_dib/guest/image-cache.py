# SPDX-License-Identifier: Apache-2.0
"""What elements have cached: which of it is new since a moment before.

    image-cache.py mark CACHE RECORD            write down what is in the directory CACHE
    image-cache.py gather CACHE RECORD TARGET   make the directory TARGET of what has changed since

What lies directly in CACHE is an entry. TARGET/new has every entry in which anything has changed: directories,
symbolic links, and those files that are new, as hard links. TARGET/unchanged has the paths of the other files of
these entries, each with a NUL after it.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator

Signature = list[int]


def signature(status: os.stat_result) -> Signature:
    """What is different when a file has been written, replaced or renamed."""
    return [status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def walk(cache: str) -> Iterator[tuple[str, os.stat_result]]:
    """All that is in *cache*, directories before what is in them, by relative path; no other file systems."""
    device = os.lstat(cache).st_dev
    directories = [""]
    for directory in directories:
        with os.scandir(os.path.join(cache, directory)) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                status = entry.stat(follow_symlinks=False)
                if status.st_dev != device:
                    continue
                path = os.path.join(directory, entry.name)
                if stat.S_ISDIR(status.st_mode):
                    directories.append(path)
                yield path, status


def mark(cache: str, record: str) -> None:
    """Write down what is there."""
    found = {path: signature(status) for path, status in walk(cache)}
    with open(record, "w", encoding="utf-8", errors="surrogateescape") as stream:
        json.dump(found, stream)


def entry_of(path: str) -> str:
    """The entry that *path* is in."""
    return path.split("/", 1)[0]


def gather(cache: str, record: str, target: str) -> None:
    """Make *target*."""
    with open(record, encoding="utf-8", errors="surrogateescape") as stream:
        before: dict[str, Signature] = json.load(stream)
    now = dict(walk(cache)) if os.path.isdir(cache) and not os.path.islink(cache) else {}
    entries = {entry_of(path) for path, status in now.items() if before.get(path) != signature(status)}
    # What has gone is seen in the time of its directory; but not where that is the cache itself.
    entries &= {entry_of(path) for path in now}
    os.makedirs(f"{target}/new")
    unchanged = []
    for path, status in now.items():
        if entry_of(path) not in entries:
            continue
        copy = f"{target}/new/{path}"
        if stat.S_ISDIR(status.st_mode):
            os.mkdir(copy)
        elif stat.S_ISREG(status.st_mode) and before.get(path) == signature(status):
            unchanged.append(path)
        else:
            os.link(os.path.join(cache, path), copy, follow_symlinks=False)
    with open(f"{target}/unchanged", "wb") as stream:
        stream.write(b"".join(os.fsencode(path) + b"\0" for path in unchanged))


def main() -> None:
    """Do what the first argument says."""
    use, *arguments = sys.argv[1:]
    if use == "mark":
        mark(*arguments)
    else:
        gather(*arguments)


main()
