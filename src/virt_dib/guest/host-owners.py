# SPDX-License-Identifier: Apache-2.0
"""Gives what extra-data.d left on the host its owners. Runs where the user is 0, when all scripts have ended.

host-owners.py tree DIRECTORY...     what the user owns becomes root's of the build, OTHER_ROOT here
host-owners.py cache DIRECTORY...    all becomes the user's, and no program there gives the user's rights to others
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

OTHER_ROOT = 1 << 16
CAPABILITIES = "security.capability"
REVISION_2, REVISION_3 = 0x02000000, 0x03000000
"""Of struct vfs_ns_cap_data: without and with the root of the user namespace that they hold for."""
SET_ID = stat.S_ISUID | stat.S_ISGID


def entries(top: str) -> Iterator[tuple[str, int | None, os.stat_result]]:
    """*top* and all below it: name, the directory it is in, and state. Links are not followed."""
    yield top, None, os.lstat(top)
    for _, directories, files, directory in os.fwalk(top, follow_symlinks=False):
        for name in [*directories, *files]:
            with contextlib.suppress(FileNotFoundError):
                yield name, directory, os.stat(name, dir_fd=directory, follow_symlinks=False)


def give_to_root(name: str, directory: int | None, state: os.stat_result) -> None:
    """Let root of the build own what the user does; chown would take set-id bits and capabilities away."""
    if 0 not in (state.st_uid, state.st_gid):
        return
    path = name if directory is None else f"/proc/self/fd/{directory}/{name}"
    capabilities = None
    if stat.S_ISREG(state.st_mode):
        with contextlib.suppress(OSError):
            capabilities = os.getxattr(path, CAPABILITIES, follow_symlinks=False)
    uid, gid = state.st_uid or OTHER_ROOT, state.st_gid or OTHER_ROOT
    os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False)
    if state.st_mode & SET_ID and stat.S_ISREG(state.st_mode):
        os.chmod(name, stat.S_IMODE(state.st_mode), dir_fd=directory)
    if capabilities is not None:
        os.setxattr(path, CAPABILITIES, with_root(capabilities, OTHER_ROOT), follow_symlinks=False)


def with_root(capabilities: bytes, root: int) -> bytes:
    """Capabilities of a file as they hold in the namespace of *root*."""
    (magic,) = struct.unpack_from("<I", capabilities)
    return struct.pack("<I", magic & 0xFFFFFF | REVISION_3) + capabilities[4:20] + struct.pack("<I", root)


def give_to_user(name: str, directory: int | None, state: os.stat_result) -> None:
    """Let the user own it, without set-id bits."""
    if (state.st_uid, state.st_gid) != (0, 0):
        os.chown(name, 0, 0, dir_fd=directory, follow_symlinks=False)
    if stat.S_ISREG(state.st_mode) and state.st_mode & SET_ID:
        os.chmod(name, stat.S_IMODE(state.st_mode) & ~SET_ID, dir_fd=directory)


def has_other_root() -> bool:
    """Whether root of the build is another one than the user; in a container without ids to spare it is not."""
    lines = (line.split() for line in Path("/proc/self/uid_map").read_text().splitlines())
    return any(int(first) <= OTHER_ROOT < int(first) + int(count) for first, _, count in lines)


def main() -> None:
    """Go through the directories."""
    use, *directories = sys.argv[1:]
    if use == "tree" and not has_other_root():
        return
    change = give_to_root if use == "tree" else give_to_user
    for top in directories:
        for entry in entries(top):
            change(*entry)


main()
