# SPDX-License-Identifier: Apache-2.0
"""Gives what extra-data.d left on the host its owners. Runs where the user is 0, when all scripts have ended.

host-owners.py tree DIRECTORY...     what the user owns becomes root's of the build, OTHER_ROOT here
host-owners.py cache DIRECTORY...    all becomes the user's, and no program there gives the user's rights to others

What belongs to neither the user nor the build was there before, and stays as it is.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

OTHER_ROOT = 1 << 16
CAPABILITIES = "security.capability"
REVISION_2, REVISION_3 = 0x02000000, 0x03000000
"""Of struct vfs_ns_cap_data: without and with the root of the user namespace that they hold for."""
SET_ID = stat.S_ISUID | stat.S_ISGID
OVERFLOW = 65534
"""What the kernel shows for ids that are not this namespace's. It is one of the namespace's too."""
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
MOST_WALKS = 5
MOST_PATH, MOST_FAILURES = 200, 4
"""How much of a failure is told, and of how many."""


@dataclass
class Level:
    """A directory on the way."""

    name: str
    identity: tuple[int, int]
    names: list[str]
    """What is in it and was not looked at yet."""


class Walk:
    """Changes a directory and all below it, each by a descriptor (O_PATH). Links are not followed.

    Processes of the sandbox may be at work in the tree, and other users in the cache: what they put in the place of a
    file that is open is another one. So nothing is changed by name. One directory is open at a time: there may be more
    in each other than descriptors.
    """

    def __init__(self, top: str, change: Callable[[int], None]) -> None:
        self._top = top
        self._change = change
        self._way: list[Level] = []
        self._here: int | None = None
        """The innermost directory of the way."""
        self.failures: list[str] = []

    def go(self) -> None:
        """Do it; what fails is noted, and the rest done."""
        for _ in range(MOST_WALKS):
            if self._go_through():
                return
        self.failures.append(f"{self._top}: directories in it do not stay where they are")

    def _go_through(self) -> bool:
        """Do it, unless somebody puts elsewhere the directory that this is in."""
        self._way.clear()
        self._move_to(None)
        self.failures.clear()
        self._enter(self._top)
        while self._way:
            if self._way[-1].names:
                self._enter(self._way[-1].names.pop())
            elif not self._leave():
                return False
        return True

    def _enter(self, name: str) -> None:
        with self._noting(name):
            place = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._here)
            try:
                with self._noting(name):
                    self._change(place)
                if stat.S_ISDIR(os.fstat(place).st_mode) and (directory := opened(place)) is not None:
                    self._way.append(Level(name, identity(directory), os.listdir(directory)))
                    self._move_to(directory)
            finally:
                os.close(place)

    def _leave(self) -> bool:
        self._way.pop()
        try:
            self._move_to(os.open("..", DIRECTORY_FLAGS, dir_fd=self._here) if self._way else None)
        except OSError:
            return False
        return self._here is None or identity(self._here) == self._way[-1].identity

    def _move_to(self, directory: int | None) -> None:
        if self._here is not None:
            os.close(self._here)
        self._here = directory

    @contextlib.contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            pass
        except OSError as error:
            path = "/".join([*(level.name for level in self._way), name])
            self.failures.append(f"{path[-MOST_PATH:]}: {error.strerror}")


def identity(directory: int) -> tuple[int, int]:
    """What a directory is known by, whatever its name."""
    state = os.fstat(directory)
    return state.st_dev, state.st_ino


def opened(place: int) -> int | None:
    """The directory, to be read; None for somebody else's that is closed to the user, and so was to scripts."""
    try:
        return os.open(".", DIRECTORY_FLAGS, dir_fd=place)
    except PermissionError:
        # Over a directory with a group of others the user has no rights but the owner's, which its mode may deny.
        state = os.fstat(place)
        try:
            os.chmod(path_of(place), stat.S_IMODE(state.st_mode) | stat.S_IRWXU)
        except PermissionError:
            if state.st_uid == OVERFLOW:
                return None
            raise
        return os.open(".", DIRECTORY_FLAGS, dir_fd=place)


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
    if state.st_uid != 0:
        try:
            take(path, state.st_uid)
        except PermissionError:
            if state.st_uid == OVERFLOW:
                return
            raise
    gid = os.fstat(descriptor).st_gid
    if gid != 0 and not (gid == OVERFLOW and is_foreign_group(path)):
        os.chown(path, -1, 0)
    if stat.S_ISREG(state.st_mode) and state.st_mode & SET_ID:
        os.chmod(path, stat.S_IMODE(state.st_mode) & ~SET_ID)


def take(path: str, uid: int) -> None:
    """Let the user own what is *uid*'s.

    Root of a namespace has rights over a file where both its ids are the namespace's; a group of others comes from the
    directory. Its owner can give it another one.
    """
    try:
        os.chown(path, 0, -1)
    except PermissionError:
        os.seteuid(uid)
        try:
            os.chown(path, -1, 0)
        finally:
            os.seteuid(0)
        os.chown(path, 0, -1)


def is_foreign_group(path: str) -> bool:
    """Whether the group of a file of the user's, OVERFLOW as it seems, is not the namespace's.

    The user may give the file a group that it has, but not one that it has not and the user is not in.
    """
    try:
        os.chown(path, -1, OVERFLOW)
    except PermissionError:
        return True
    return False


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
    failures = []
    for top in directories:
        walk = Walk(top, change)
        walk.go()
        failures += walk.failures
    if failures:
        more = [f"and {len(failures) - MOST_FAILURES} more"] if len(failures) > MOST_FAILURES else []
        sys.exit("\n".join([*failures[:MOST_FAILURES], *more]))


main()
