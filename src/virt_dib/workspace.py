# SPDX-License-Identifier: Apache-2.0
"""The private directory of a build, and what killed builds have left of theirs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from virt_dib import namespaces, staging, tools
from virt_dib.errors import ApplianceError, PrerequisiteError, ToolError
from virt_dib.files import temp_dir
from virt_dib.interrupts import shielded

_LOCK = "lock"
_ELSEWHERE = "elsewhere"
_PREFIX = "virt-dib-"


@contextlib.contextmanager
def open_workspace(parent: Path | None = None) -> Iterator[Path]:
    """A directory for the disks of one build; those of killed builds beside it are removed.

    It is in *parent* or else in :func:`virt_dib.files.temp_dir`.

    Raises:
        ToolError: it cannot be made.
    """
    if parent is None:
        parent = temp_dir()
    remove_leftovers(parent)
    with contextlib.ExitStack() as stack, shielded():
        try:
            directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        except OSError as error:
            raise ToolError(
                f"making a directory for the build in '{parent}': {error.strerror}",
                hint="set TMPDIR to a directory that you can write and that has space",
            ) from error
        stack.callback(_remove, directory)
        stack.enter_context(claimed(directory))
        kept = stack.pop_all()
    with kept:
        yield directory


@contextlib.contextmanager
def claimed(workspace: Path) -> Iterator[None]:
    """Hold the directory of a build, so that no other virt-dib takes it for the leftover of a killed one."""
    descriptor, name = tempfile.mkstemp(prefix=_LOCK, dir=workspace)
    try:
        # Locked before it has the name that the others look for.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.rename(name, workspace / _LOCK)
        yield
    finally:
        os.close(descriptor)


def note_elsewhere(workspace: Path, path: Path, *, name: Path | None = None) -> None:
    """Remember that the build with that directory makes *path* outside of it, for if the build is killed.

    It is removed then, when the directory is; what is put aside for something new of the same *name*, only if that has
    got its name. A build that is not killed tidies up on its own.
    """
    note = [str(path.absolute()), *([str(name.absolute())] if name is not None else [])]
    with (workspace / _ELSEWHERE).open("a") as stream:
        stream.write(json.dumps(note) + "\n")


def remove_leftovers(parent: Path) -> list[Path]:
    """Remove what killed builds of this user have left in *parent*; return what is gone."""
    gone = []
    try:
        names = sorted(os.listdir(parent))
    except OSError:
        return []
    for workspace in (parent / name for name in names if name.startswith(_PREFIX)):
        with contextlib.suppress(OSError), _abandoned(workspace) as abandoned:
            if abandoned:
                _remove_elsewhere(workspace)
                _remove(workspace)
                gone += [] if os.path.exists(workspace) else [workspace]
    return gone


def _remove_elsewhere(workspace: Path) -> None:
    """Remove what a killed build has left outside of its directory, and give back what it had only put aside."""
    try:
        notes = (workspace / _ELSEWHERE).read_bytes().splitlines()
    except FileNotFoundError:
        return
    for note in notes:
        # The last one may be cut off.
        with contextlib.suppress(OSError, TypeError, ValueError):
            path, *names = map(Path, json.loads(note))
            if path.lstat().st_uid != os.geteuid():
                continue
            if names and not os.path.lexists(names[0]):
                path.rename(names[0])
            elif path.is_dir() and not path.is_symlink():
                staging.remove_tree(path)
            else:
                path.unlink()


def _remove(directory: Path) -> None:
    """Remove a directory, quietly. There may be files of a sandbox in it."""
    with shielded():
        staging.remove_tree(directory)
    if not os.path.exists(directory):
        return
    command = ["rm", "-rf", "--one-file-system", "--", directory.name]
    with contextlib.suppress(ApplianceError, PrerequisiteError, ToolError), shielded():
        if os.geteuid() == 0:
            # Whose files they are is not known: each sandbox of root's has ids of its own.
            tools.run(command, doing=f"removing '{directory}'", cwd=directory.parent)
        else:
            with namespaces.owner(namespaces.find_ids(), command, directory.parent) as inside:
                namespaces.finish(inside, f"removing '{directory}'")


@contextlib.contextmanager
def _abandoned(workspace: Path) -> Iterator[bool]:
    """Whether *workspace* is one of this user's that nobody holds; nobody else can take it meanwhile."""
    state = workspace.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid():
        yield False
        return
    descriptor = os.open(workspace / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    finally:
        os.close(descriptor)
