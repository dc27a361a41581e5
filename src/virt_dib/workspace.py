# SPDX-License-Identifier: Apache-2.0
"""The private directory of a build, and what killed builds have left of theirs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from virt_dib import namespaces, tools
from virt_dib.errors import ApplianceError, PrerequisiteError, ToolError
from virt_dib.files import remove_any, sockets, temp_dir, temp_dir_variable
from virt_dib.interrupts import shielded

_LOCK = "lock"
_MARK = b"virt-dib\n"
"""In the lock: a directory of somebody's that only has such names is not ours."""
_ELSEWHERE = "elsewhere"
PREFIX = "virt-dib-"
"""How the names of directories begin that are claimed."""
_BARE_PREFIX = f".{PREFIX}"
"""How they begin before they have their locks, and when they are about to lose them: there is nothing else in them."""
_BARE_S = 600.0
"""So long nobody takes to give a directory its lock."""
_COMING_S = 10.0
"""So long nobody takes to make a directory, and the sockets in it, once he has noted that it comes."""


@contextlib.contextmanager
def open_workspace(parent: Path | None = None) -> Iterator[Path]:
    """A directory for the disks of one build; those of killed builds beside it are removed.

    It is in *parent* or else in :func:`virt_dib.files.temp_dir`.

    Raises:
        ToolError: it cannot be made.
    """
    # Programs that start elsewhere get paths in it.
    parent = (parent or temp_dir()).absolute()
    remove_leftovers(parent)
    with contextlib.ExitStack() as stack:
        with shielded():
            try:
                directory = stack.enter_context(private_directory(parent))
            except OSError as error:
                raise ToolError(
                    f"making a directory for the build in '{parent}': {error.strerror}",
                    hint=f"set {temp_dir_variable()} to a directory that you can write and that has space",
                ) from error
        yield directory


@contextlib.contextmanager
def private_directory(parent: Path, prefix: str = PREFIX) -> Iterator[Path]:
    """A directory in *parent* that goes with the block or, if virt-dib is killed, by :func:`remove_leftovers`.

    *prefix* is :data:`PREFIX`, and perhaps more.

    Raises:
        OSError: it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        with shielded():
            bare = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
            stack.callback(_remove, bare)
            stack.enter_context(claimed(bare))
            directory = bare.with_name(bare.name.removeprefix("."))
            bare.rename(directory)
            # While it is locked: nobody else begins to remove it, too.
            stack.callback(_remove, directory)
        yield directory


@contextlib.contextmanager
def claimed(workspace: Path) -> Iterator[None]:
    """Hold the directory of a build, so that no other virt-dib takes it for the leftover of a killed one."""
    descriptor, name = tempfile.mkstemp(prefix=_LOCK, dir=workspace)
    try:
        # Locked before it has the name that the others look for.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, _MARK)
        os.rename(name, workspace / _LOCK)
        yield
    finally:
        os.close(descriptor)


def note_elsewhere(workspace: Path, path: Path, *, name: Path | None = None) -> None:
    """Remember that the build with that directory makes *path* outside of it, for if the build is killed.

    It is removed then, when the directory is; what is put aside for something new of the same *name*, only if that has
    got its name. A build that is not killed tidies up on its own.
    """
    _note(workspace, [str(path.absolute()), *([str(name.absolute())] if name is not None else [])])


def note_coming(workspace: Path, pattern: Path, there: Iterable[Path]) -> None:
    """Remember that a directory is about to be made whose name shows only then: it fits *pattern* and is not *there*.

    The next note, which can tell its name, takes the place of this one.
    """
    _note(workspace, {"pattern": str(pattern), "there": [str(path) for path in there]})


def _note(workspace: Path, note: object) -> None:
    with (workspace / _ELSEWHERE).open("a") as stream:
        stream.write(json.dumps(note) + "\n")


def remove_leftovers(parent: Path) -> list[Path]:
    """Remove what killed builds of this user have left in *parent*; return what is gone."""
    gone = []
    try:
        names = sorted(os.listdir(parent))
    except OSError:
        return []
    for workspace in (parent / name for name in names if name.startswith((PREFIX, _BARE_PREFIX))):
        with contextlib.suppress(OSError), _abandoned(workspace) as abandoned:
            if abandoned:
                _remove_elsewhere(workspace)
                _remove(workspace)
                gone += [] if os.path.exists(workspace) else [workspace]
    return gone


def _remove_elsewhere(workspace: Path) -> None:
    """Remove what a killed build has left outside of its directory, and give back what it had only put aside."""
    file = workspace / _ELSEWHERE
    try:
        lines, noted_s = file.read_bytes().splitlines(), file.stat().st_mtime
    except FileNotFoundError:
        return
    last: object = None
    for line in lines:
        # The last one may be cut off.
        with contextlib.suppress(OSError, TypeError, ValueError):
            last = json.loads(line)
            if isinstance(last, list):
                _remove_noted(*map(Path, last))
    if isinstance(last, dict):
        with contextlib.suppress(OSError, TypeError, ValueError, KeyError):
            _remove_coming(Path(last["pattern"]), set(map(Path, last["there"])), noted_s)


def _remove_noted(path: Path, name: Path | None = None) -> None:
    if path.lstat().st_uid != os.geteuid():
        return
    if name is not None and not os.path.lexists(name):
        path.rename(name)
    else:
        remove_any(path)


def _remove_coming(pattern: Path, there: set[Path], noted_s: float) -> None:
    """Remove what a build was about to make at that time and had not noted yet.

    Another program's could be there since that moment, too; it has sockets that are open.
    """
    used = {path.parent for _number, path in sockets()}
    for path in set(pattern.parent.glob(pattern.name)) - there - used:
        state = path.lstat()
        own = stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid()
        if own and abs(state.st_mtime - noted_s) < _COMING_S:
            remove_any(path)


def _remove(directory: Path) -> None:
    """Remove a directory, quietly; its lock goes last, by which the next one finds what is left if this one is killed.

    There may be files of a sandbox in it.
    """
    with shielded(), contextlib.suppress(OSError):
        directory.chmod(stat.S_IRWXU)
        for name in _content(directory):
            remove_any(directory / name)
        if left := _content(directory):
            _remove_others(directory, left)
        if not _content(directory):
            _remove_bare(directory)


def _content(directory: Path) -> list[str]:
    """What is in a directory beside its lock; the notes of what is elsewhere come last."""
    return sorted(set(os.listdir(directory)) - {_LOCK}, key=lambda name: (name == _ELSEWHERE, name))


def _remove_others(directory: Path, names: Sequence[str]) -> None:
    """Remove what is not only this user's."""
    command = ["rm", "-rf", "--one-file-system", "--", *names]
    doing = f"removing '{directory}'"
    with contextlib.suppress(ApplianceError, PrerequisiteError, ToolError):
        if os.geteuid() == 0:
            # Whose files they are is not known: each sandbox of root's has ids of its own.
            tools.run(command, doing=doing, cwd=directory)
        else:
            with namespaces.owner(namespaces.find_ids(), command, directory) as inside:
                namespaces.finish(inside, doing)


def _remove_bare(directory: Path) -> None:
    """Remove a directory with nothing but its lock in it."""
    bare = directory
    if not directory.name.startswith(_BARE_PREFIX):
        # By that name it is found without a lock, too.
        bare = directory.rename(directory.with_name(f".{directory.name}"))
    remove_any(bare / _LOCK)
    bare.rmdir()


@contextlib.contextmanager
def _abandoned(workspace: Path) -> Iterator[bool]:
    """Whether *workspace* is one of this user's that nobody holds; nobody else can take it meanwhile."""
    state = workspace.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid():
        yield False
        return
    try:
        descriptor = os.open(workspace / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        # A lock has another name as long as it is not locked.
        bare = workspace.name.startswith(_BARE_PREFIX) and all(name.startswith(_LOCK) for name in os.listdir(workspace))
        yield bare and time.time() - state.st_mtime > _BARE_S
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield os.read(descriptor, len(_MARK) + 1) == _MARK
    finally:
        os.close(descriptor)
