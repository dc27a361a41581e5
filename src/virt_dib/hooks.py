# SPDX-License-Identifier: Apache-2.0
"""Hooks: the directories of all chosen elements, merged into one tree, and the scripts of a phase in order.

The rules are those of generate_hooks in DIB's lib/common-functions and of its lib/dib-run-parts
(contract sections 1.2 and 1.3). Where DIB leaves to chance which of two files stays, the later element's does.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from virt_dib.elements import Element, is_below
from virt_dib.errors import ElementError, Problem, ToolError
from virt_dib.files import HOST_IS_FULL, NOT_THERE, copy_regular, temp_dir_variable
from virt_dib.spec import Phase

_SCRIPT_NAME = re.compile(r"[0-9A-Za-z_-]+")
_ENVIRONMENT_NAME = re.compile(r"[0-9A-Za-z_.-]+")
_NUMBER = re.compile(r"-?[0-9]+")
_NOT_HOOKS = ("tests", "__pycache__")
_PHASE_DIRECTORIES = frozenset(phase.directory for phase in Phase)


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """One script of a phase."""

    phase: Phase
    name: str
    element: str | None
    """None for one that no element brought."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HookTree:
    """The merged directories of the chosen elements."""

    directory: Path
    owners: Mapping[str, str]
    """Path in the tree, such as ``install.d/50-foo``, to the name of the element it is from."""
    left_out: frozenset[str] = frozenset()
    """Names of scripts that were to be left out, and are."""

    def scripts(self, phase: Phase) -> tuple[Script, ...]:
        """What runs in *phase*, in order, as far as it is known before the build: scripts may add scripts."""
        directory = self.directory / phase.directory
        names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
        return tuple(
            Script(phase=phase, name=name, element=self.owners.get(f"{phase.directory}/{name}"))
            for name in order(names)
            if is_script_name(name) and _is_executable(directory / name)
        )


def is_script_name(name: str) -> bool:
    """Whether dib-run-parts would run an executable file of this name: no dot, so no ``foo.sh``."""
    return _SCRIPT_NAME.fullmatch(name) is not None


def order(names: Iterable[str]) -> list[str]:
    """*names* as ``LC_ALL=C sort -n`` puts them: by leading number, 0 where there is none, then by bytes."""
    return sorted(names, key=_sort_key)


def order_environment(names: Iterable[str]) -> list[str]:
    """Those of *names* in environment.d that are sourced, in order.

    dib-run-parts sorts their full paths with ``sort -n``: no number leads those, so bytes decide.
    """
    return sorted((name for name in names if _ENVIRONMENT_NAME.fullmatch(name)), key=os.fsencode)


def compose(
    elements: Sequence[Element], into: Path, *, excluded_scripts: frozenset[str], search_path: Sequence[Path] = ()
) -> HookTree:
    """Merge the directories of *elements* into the directory *into*, which is empty or does not exist.

    *excluded_scripts* are left out of the directories of phases, whichever element has them. Links are
    copied as links, and nothing is written through one. A hook directory may be one, to a place beside its element
    or in the *search_path*: elsewhere are files of the host that elements are not to have.

    Raises:
        ElementError: all scripts that two elements have, and all files that cannot be copied; *into* is
            then incomplete.
        ToolError: no space on this host.
    """
    merge = _Merge(into=into, excluded_scripts=excluded_scripts, search_path=search_path)
    try:
        into.mkdir(parents=True, exist_ok=True)
        for element in elements:
            merge.add(element)
        merge.finish()
    except OSError as error:
        raise ToolError(
            f"copying the hooks to '{into}': {error.strerror}",
            hint=f"set {temp_dir_variable()} to a directory with more room, or make some there",
        ) from error
    if merge.problems:
        raise ElementError.of(merge.problems)
    return HookTree(directory=into, owners=merge.owners, left_out=frozenset(merge.left_out))


def _sort_key(name: str) -> tuple[int, bytes]:
    number = _NUMBER.match(name)
    return (int(number[0]) if number else 0, os.fsencode(name))


def _is_executable(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    # Scripts run as root, to whom any of the three bits will do.
    return stat.S_ISREG(mode) and bool(mode & 0o111)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Something in an element, to be put in the tree."""

    source: Path
    relative: str
    """Path in the tree."""
    may_replace: bool
    """Whether the same file of an element before gives way. If not, it is a duplicate."""


@dataclass(kw_only=True, slots=True)
class _Merge:
    """The state of one ``compose``."""

    into: Path
    excluded_scripts: frozenset[str]
    search_path: Sequence[Path]
    owners: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)
    _made: dict[str, str] = field(default_factory=dict)
    """Directories in the tree, and the element that was the first to have each."""
    _copied_dirs: list[tuple[Path, Path]] = field(default_factory=list)

    def add(self, element: Element) -> None:
        """Put in the directories and files at the top of *element*, and all below."""
        for source in self._listed(element.path):
            mode = self._mode(source, follow=True)
            if mode is None:
                continue
            if stat.S_ISDIR(mode):
                if source.name not in _NOT_HOOKS and self._may_show(element, source):
                    self._add_hook_directory(element, source)
            elif stat.S_ISREG(mode):
                if not source.name.endswith(".pyc"):
                    self._add_file(element, _Entry(source, source.name, may_replace=True))
            elif not source.is_symlink():
                self._refuse_special(source)

    def finish(self) -> None:
        """Give directories their modes and times, which copying into them would change."""
        for source, target in self._copied_dirs:
            # Or the user could not remove the copy of a read-only directory.
            _copy_attributes(source.lstat(), target, also=stat.S_IRWXU)

    def _add_hook_directory(self, element: Element, directory: Path) -> None:
        # It is made anew, not copied: so it may be a link in the element.
        if not self._make_directory(element, _Entry(directory, directory.name, may_replace=True)):
            return
        pending = deque(
            _Entry(path, f"{directory.name}/{path.name}", may_replace=False)
            for path in self._listed(directory)
            if not path.name.startswith(".") and not self._is_excluded(directory, path)
        )
        while pending:
            entry = pending.popleft()
            mode = self._mode(entry.source, follow=False)
            if mode is None:
                continue
            if stat.S_ISDIR(mode):
                if self._make_directory(element, entry):
                    self._copied_dirs.append((entry.source, self.into / entry.relative))
                    pending.extend(
                        _Entry(path, f"{entry.relative}/{path.name}", may_replace=True)
                        for path in self._listed(entry.source)
                        # The element install-types links scripts to the phase from directories in it.
                        if not self._is_excluded(directory, path)
                    )
            elif stat.S_ISREG(mode) or stat.S_ISLNK(mode):
                self._add_file(element, entry)
            else:
                self._refuse_special(entry.source)

    def _may_show(self, element: Element, directory: Path) -> bool:
        real = Path(os.path.realpath(directory))
        if any(is_below(real, place) for place in (element.path.parent, *self.search_path)):
            return True
        self.problems.append(
            Problem(
                f"copying '{directory}': it is a link to '{real}', where no elements are",
                "have a copy of that in the element: scripts see nothing else of this host",
            )
        )
        return False

    def _is_excluded(self, directory: Path, path: Path) -> bool:
        """Whether *path*, in or below the hook directory *directory*, is an excluded script."""
        wanted_out = directory.name in _PHASE_DIRECTORIES and path.name in self.excluded_scripts
        if wanted_out and _is_executable(path):
            self.left_out.add(path.name)
            return True
        return False

    def _make_directory(self, element: Element, entry: _Entry) -> bool:
        """Whether the directory is in the tree now."""
        if entry.relative in self.owners:
            self._clash(element, entry.relative, self.owners[entry.relative])
            return False
        if entry.relative not in self._made:
            try:
                (self.into / entry.relative).mkdir()
                # Whatever the user's umask: programs of other users in the guest may have to read there.
                (self.into / entry.relative).chmod(0o755)
            except OSError as error:
                self._cannot_copy(entry.source, error)
                return False
            self._made[entry.relative] = element.name
        return True

    def _add_file(self, element: Element, entry: _Entry) -> None:
        earlier = self._made.get(entry.relative)
        if earlier is None and not entry.may_replace:
            earlier = self.owners.get(entry.relative)
        if earlier is not None:
            self._clash(element, entry.relative, earlier)
            return
        target = self.into / entry.relative
        try:
            # What is there may be a link of another element, to any place.
            target.unlink(missing_ok=True)
            _copy(entry.source, target)
        except OSError as error:
            self._cannot_copy(entry.source, error)
        self.owners[entry.relative] = element.name

    def _listed(self, directory: Path) -> list[Path]:
        try:
            return sorted(directory.iterdir())
        except OSError as error:
            self._cannot_copy(directory, error)
            return []

    def _mode(self, path: Path, *, follow: bool) -> int | None:
        """The file's st_mode, or None for a link to nothing when links are followed."""
        try:
            return path.stat(follow_symlinks=follow).st_mode
        except OSError as error:
            # Not Path.is_symlink, which raises where a path is too long.
            if error.errno not in NOT_THERE or not os.path.islink(path):
                self._cannot_copy(path, error)
            return None

    def _clash(self, element: Element, relative: str, earlier: str) -> None:
        self.problems.append(
            Problem(
                f"merging the hooks of the elements: '{relative}' is in both '{earlier}' and '{element.name}'",
                "rename one of them, or leave out one of the elements",
            )
        )

    def _refuse_special(self, source: Path) -> None:
        message = f"copying '{source}': it is a device, FIFO or socket"
        self.problems.append(Problem(message, "remove it from the element"))

    def _cannot_copy(self, source: Path, error: OSError) -> None:
        if error.errno in HOST_IS_FULL:
            raise error
        reason = error.strerror or str(error)
        denied = error.errno in (errno.EACCES, errno.EPERM)
        hint = "make all of the element readable" if denied else "mend it, or take it out of the element"
        self.problems.append(Problem(f"copying '{source}': {reason}", hint))


def _copy(source: Path, target: Path) -> None:
    """Copy a file or a link, with mode and times, without owner and extended attributes: those are the host's."""
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
    else:
        copy_regular(source, target)
    _copy_attributes(source.lstat(), target)


def _copy_attributes(status: os.stat_result, target: Path, *, also: int = 0) -> None:
    if not stat.S_ISLNK(status.st_mode):
        target.chmod(stat.S_IMODE(status.st_mode) | also)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
