# SPDX-License-Identifier: Apache-2.0
"""Who but this user could change a file, or what is in a directory.

Root could anyway, and a group that is the user's own is the user. As ssh does with the files it trusts.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

_ACCESS_LIST = "system.posix_acl_access"


@dataclass(frozen=True, slots=True)
class Danger:
    """Why others could change what is in a directory."""

    path: Path
    """The directory, or one of those that it is in."""
    reason: str


def is_foreign(state: os.stat_result) -> bool:
    """Whether it belongs to another user, who could give it any mode."""
    return state.st_uid not in (0, os.geteuid())


def others_can_write(path: Path, state: os.stat_result) -> bool:
    """Whether its mode lets others write."""
    group = state.st_mode & stat.S_IWGRP and not _is_own_group(path, state)
    return bool(state.st_mode & stat.S_IWOTH or group)


def danger(directory: Path, *, shared: bool = False) -> Danger | None:
    """What lets others write in *directory*, or put another directory in its place; symbolic links are followed.

    *shared*: others may write there, if they cannot replace what is not theirs, as in ``/tmp``. Of what does not exist
    yet, the directories above are looked at.
    """
    real = Path(os.path.realpath(directory))
    for place in (*reversed(real.parents), real):
        try:
            state = place.stat()
        except OSError:
            break
        above = shared or place != real
        if is_foreign(state) and not (above and _is_of_the_host(state)):
            return Danger(place, "it belongs to another user")
        kept_apart = state.st_mode & stat.S_ISVTX and above
        if others_can_write(place, state) and not kept_apart:
            return Danger(place, "others can write to it")
    return None


def danger_of_file(file: Path) -> Danger | None:
    """What lets others write to *file*, or put another in its place. Of devices, root has decided that."""
    real = Path(os.path.realpath(file))
    state = real.stat()
    if stat.S_ISREG(state.st_mode):
        if is_foreign(state):
            return Danger(real, "it belongs to another user")
        if others_can_write(real, state):
            return Danger(real, "others can write to it")
    return danger(real.parent, shared=True)


def make_private(directory: Path) -> None:
    """Make *directory* and those it is in, as far as they are missing, for this user alone; whose it is, is not said.

    Raises:
        OSError: it cannot be made.
    """
    missing = [place for place in (directory, *directory.parents) if not os.path.lexists(place)]
    for place in reversed(missing):
        with contextlib.suppress(FileExistsError):
            place.mkdir(mode=0o700)


def _is_own_group(path: Path, state: os.stat_result) -> bool:
    """Whether the group is its owner's own, as many distributions make one, and then files that it may write."""
    try:
        group, user = grp.getgrgid(state.st_gid), pwd.getpwuid(state.st_uid)
    except KeyError:
        return False
    if group.gr_name != user.pw_name or not set(group.gr_mem) <= {user.pw_name}:
        return False
    try:
        # With a list, the mode of the group is what any of those in it may do.
        return _ACCESS_LIST not in os.listxattr(path)
    except OSError:
        return True


def _is_of_the_host(state: os.stat_result) -> bool:
    """In a user namespace without the host's root, what is root's belongs to nobody."""
    try:
        unknown = int(Path("/proc/sys/kernel/overflowuid").read_text())
        ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except (OSError, ValueError):
        return False
    return state.st_uid == unknown and all(int(outside) != 0 for _, outside, _ in ranges)
