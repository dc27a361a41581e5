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


def entries(top: str) -> Iterator[int]:
    """*top* and all below it, each open (O_PATH) until the next one is asked for. Links are not followed.

    Processes of the sandbox may be at work in the tree, and other users in the cache: what they put in the place of a
    file that is open is another one. So nothing here is done by name.
    """
    for name, directory in names(top):
        try:
            descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            continue
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def names(top: str) -> Iterator[tuple[str, int | None]]:
    """*top* and all below it, by name and the directory it is in."""
    yield top, None
    for _, directories, files, directory in os.fwalk(top, follow_symlinks=False):
        for name in [*directories, *files]:
            yield name, directory


def path_of(descriptor: int) -> str:
    """A path of what is open, for calls that refuse such a descriptor. It ends there, also at a symbolic link."""
    return f"/proc/self/fd/{descriptor}"


def give_to_root(descriptor: int) -> None:
    """Let root of the build own what the user does; chown would take set-id bits and capabilities away."""
    state, path = os.fstat(descriptor), path_of(descriptor)
    if 0 not in (state.st_uid, state.st_gid):
        return
    capabilities = None
    if stat.S_ISREG(state.st_mode):
        with contextlib.suppress(OSError):
            capabilities = os.getxattr(path, CAPABILITIES)
    os.chown(path, state.st_uid or OTHER_ROOT, state.st_gid or OTHER_ROOT)
    if state.st_mode & SET_ID and stat.S_ISREG(state.st_mode):
        os.chmod(path, stat.S_IMODE(state.st_mode))
    if capabilities is not None:
        os.setxattr(path, CAPABILITIES, with_root(capabilities, OTHER_ROOT))


def with_root(capabilities: bytes, root: int) -> bytes:
    """Capabilities of a file as they hold in the namespace of *root*."""
    (magic,) = struct.unpack_from("<I", capabilities)
    return struct.pack("<I", magic & 0xFFFFFF | REVISION_3) + capabilities[4:20] + struct.pack("<I", root)


def give_to_user(descriptor: int) -> None:
    """Let the user own it, without set-id bits."""
    state, path = os.fstat(descriptor), path_of(descriptor)
    if (state.st_uid, state.st_gid) != (0, 0):
        os.chown(path, 0, 0)
    if stat.S_ISREG(state.st_mode) and state.st_mode & SET_ID:
        os.chmod(path, stat.S_IMODE(state.st_mode) & ~SET_ID)


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
            change(entry)


main()
