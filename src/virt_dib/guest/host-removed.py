# SPDX-License-Identifier: Apache-2.0
"""Names what an archive on standard input has and the working directory does not have, or not as the same type.

Each name ends with a NUL, and begins with './'.
"""

from __future__ import annotations

import os
import resource
import stat
import sys
import tarfile
from collections.abc import Iterator
from typing import Any

MOST_MEMORY_BYTES = 1 << 30
KINDS = {tarfile.DIRTYPE: stat.S_IFDIR, tarfile.SYMTYPE: stat.S_IFLNK, tarfile.FIFOTYPE: stat.S_IFIFO}


def is_there(member: tarfile.TarInfo) -> bool:
    """Whether it still is there; a further name of a file may be any type."""
    try:
        state = os.lstat(member.name)
    except OSError:
        return False
    return member.islnk() or stat.S_IFMT(state.st_mode) == KINDS.get(member.type, stat.S_IFREG)


def members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members, which a TarFile would keep."""
    kept: Any = archive
    for member in archive:
        yield member
        kept.members.clear()


# The archive is the appliance's, and a header in it may have any length.
_, most = resource.getrlimit(resource.RLIMIT_AS)
if most == resource.RLIM_INFINITY or most > MOST_MEMORY_BYTES:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, most))
with tarfile.open(fileobj=sys.stdin.buffer, mode="r|", errors="surrogateescape") as opened:
    removed = [member.name for member in members(opened) if not is_there(member)]
sys.stdout.buffer.write(b"".join(os.fsencode(f"./{os.path.normpath(name)}") + b"\0" for name in sorted(removed)))
