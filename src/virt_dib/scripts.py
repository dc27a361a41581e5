# SPDX-License-Identifier: Apache-2.0
"""Scripts that cannot run, or will not: what can be seen of it before the build, and what their output tells."""

from __future__ import annotations

import os
import re
import shlex
import warnings as python_warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from virt_dib.elements import Element
from virt_dib.environment import GUEST
from virt_dib.errors import Problem
from virt_dib.hooks import HookTree, Script, is_script_name, order, order_environment
from virt_dib.releases import Rules
from virt_dib.spec import Phase, Where

_PYTHON_2 = "/usr/bin/python2"
"""Where the guest would have it."""
_LARGEST_SCRIPT_BYTES = 1 << 20
_LONGEST_LINE_BYTES = 4096
_PYTHON_SCRIPT = re.compile(rb"#![ \t]*/[^\n]*\bpython(?P<two>2[0-9.]*)?(?:[ \t\n]|3)")
_FIRST_LINE = re.compile(rb"#![ \t]*(?P<program>[^ \t\n\0]+)(?P<rest>[^\n]*)")
_MARK = b"\xef\xbb\xbf"
"""What some editors begin UTF-8 with."""
_OF_PACKAGES = re.compile(r"/(?:usr/(?!local/)|bin/|sbin/|lib|etc/alternatives/)")
"""Where programs of the host's packages are, which the guest has too."""
_OF_GUEST = (f"{GUEST}/", "/tmp/", "/var/tmp/")  # noqa: S108 - the guest's
"""Where scripts may have put some."""
_MOST_WARNINGS = 20


class _CannotRunError(Exception):
    """Why a script cannot run."""

    def __init__(self, reason: str, *, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


class Scripts:
    """The scripts of a hook tree, as those who have written the *elements* know them."""

    def __init__(self, tree: HookTree, elements: Sequence[Element], rules: Rules, *, on_host: bool) -> None:
        """*on_host*: extra-data.d runs on this host."""
        self._tree = tree
        self._on_host = (Phase.EXTRA_DATA,) if on_host else ()
        self._paths: Mapping[str, Path] = {element.name: element.path for element in elements}
        self._phases = [phase for phase in Phase if rules.has(phase)]

    def problems(self) -> list[Problem]:
        """Of each script that cannot run, whatever the build does before."""
        found = []
        for script in (script for phase in self._phases for script in self._tree.scripts(phase)):
            try:
                self._check(script)
            except _CannotRunError as error:
                message = f"script '{script.phase.directory}/{script.name}'{_of(script)} cannot run: {error}"
                found.append(Problem(message, error.hint))
        return found

    def warnings(self) -> list[str]:
        """Of what will not be run as its author means."""
        found = [problem.message for phase in self._phases for problem in self._not_run(phase)]
        found += [problem.message for problem in self._odd_environment()]
        rest = len(found) - _MOST_WARNINGS
        return [*found[:_MOST_WARNINGS], *([Problem(f"{rest} more of these").message] if rest > 0 else [])]

    # ---- what cannot run ----

    def _check(self, script: Script) -> None:
        path = self._tree.directory / script.phase.directory / script.name
        first = _FIRST_LINE.match(_beginning(path, _LONGEST_LINE_BYTES))
        if first is not None:
            self._check_line_end(script, first)
            if script.phase.where is Where.OUTSIDE and b"python" in first[0]:
                _check_python(script.name, _beginning(path, _LARGEST_SCRIPT_BYTES))
            self._check_program(script, os.fsdecode(first["program"]))

    def _check_line_end(self, script: Script, first: re.Match[bytes]) -> None:
        # perl takes it for a blank after its options.
        if not first[0].endswith(b"\r") or (first["rest"] and b"perl" in first["program"]):
            return
        file = self._file(script.element, script.phase.directory, script.name)
        raise _CannotRunError(
            "its lines end in CR LF, so there is no program of the name in the first one",
            hint=f"have them end in LF: sed -i 's/\\r$//' {shlex.quote(str(file))}",
        )

    def _check_program(self, script: Script, program: str) -> None:
        if not program.startswith("/"):
            raise _CannotRunError(
                f"its first line names '{program}', which is no absolute path",
                hint=f"have it begin with #!/usr/bin/env {program}",
            )
        in_guest = script.phase not in self._on_host
        if script.phase.where is not Where.OUTSIDE or (in_guest and program.startswith(_OF_GUEST)):
            return
        if not os.path.isfile(program) or not os.access(program, os.X_OK):
            raise _CannotRunError(
                f"its first line names '{program}', and there is no such program",
                hint="correct its first line, or install that program on this host",
            )
        if in_guest and not _OF_PACKAGES.match(program):
            raise _CannotRunError(
                f"its first line names '{program}', and of this host the guest has the programs of packages alone",
                hint="have it name a program below /usr/bin",
            )

    # ---- what will not run, or otherwise ----

    def _not_run(self, phase: Phase) -> Iterator[Problem]:
        directory = self._tree.directory / phase.directory
        runs = {script.name for script in self._tree.scripts(phase)}
        for name in order(os.listdir(directory)) if os.path.isdir(directory) else ():
            path, place = directory / name, f"{phase.directory}/{name}"
            if not is_script_name(name):
                continue
            element = self._tree.owners.get(place)
            of_element = f" of element '{element}'" if element else ""
            if path.is_symlink() and self._leads_nowhere(path, phase):
                target = os.readlink(path)
                yield Problem(f"'{place}'{of_element} will not run: it is a link to '{target}', which is not there")
            elif name not in runs and os.path.isfile(path) and _beginning(path, 2) == b"#!":
                file = shlex.quote(str(self._file(element, phase.directory, name)))
                yield Problem(f"'{place}'{of_element} will not run: it is not executable; chmod +x {file}")
            elif name in runs and _beginning(path, len(_MARK)) == _MARK:
                yield Problem(
                    f"'{place}'{of_element} begins with a byte order mark: whatever its first line says, bash runs it"
                )

    def _leads_nowhere(self, path: Path, phase: Phase) -> bool:
        """Whether there will be nothing at the end of a link, where it is known what will be there."""
        target = os.readlink(path)
        if os.path.isabs(target):
            # Inside the chroot nobody knows, nor what scripts will put there.
            known = phase.where is Where.OUTSIDE and phase not in self._on_host and not target.startswith(_OF_GUEST)
            return known and not (_OF_PACKAGES.match(target) and os.path.exists(path))
        inside = os.path.normpath(path.parent / target)
        return not inside.startswith(f"{self._tree.directory}/") or not os.path.lexists(inside)

    def _odd_environment(self) -> Iterator[Problem]:
        directory = self._tree.directory / "environment.d"
        for name in order_environment(os.listdir(directory)) if os.path.isdir(directory) else ():
            path = directory / name
            if os.path.isfile(path) and b"\r\n" in _beginning(path, _LARGEST_SCRIPT_BYTES):
                element = self._tree.owners.get(f"environment.d/{name}")
                file = shlex.quote(str(self._file(element, "environment.d", name)))
                yield Problem(
                    f"lines of 'environment.d/{name}' end in CR LF: so will the values of variables that it sets; "
                    f"sed -i 's/\\r$//' {file}"
                )

    def _file(self, element: str | None, directory: str, name: str) -> Path:
        """The file of the element's author."""
        return self._paths.get(element or "", self._tree.directory) / directory / name


def _of(script: Script) -> str:
    return f" of element '{script.element}'" if script.element else ""


def _beginning(path: Path, most_bytes: int) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(most_bytes)
    except OSError:
        # A link may lead to what this user may not read.
        return b""


def _check_python(name: str, text: bytes) -> None:
    """Refuse Python that the guest's Python cannot run."""
    python = _PYTHON_SCRIPT.match(text)
    if python is None or len(text) == _LARGEST_SCRIPT_BYTES:
        return
    hint = "port it to Python 3, or leave it out with --exclude-script"
    if python["two"] and not os.path.exists(_PYTHON_2):
        raise _CannotRunError("it wants Python 2, which is not installed", hint=hint)
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            compile(text, name, "exec", dont_inherit=True)
    except SyntaxError as error:
        raise _CannotRunError(f"it is not Python 3, line {error.lineno}: {error.msg}", hint=hint) from error
    except (ValueError, RecursionError, MemoryError):
        return


# ---- after one has failed ----

_NO_PROGRAM = re.compile(r"(?P<script>/[^:]+): (?:cannot execute: required file not found|.+: bad interpreter: .+)$")
"""How bash says that there is no such program as the first line of a script names."""
_NO_FORMAT = re.compile(r"(?P<script>/[^:]+): cannot execute binary file: Exec format error$")
_CARRIAGE_RETURN = re.compile(
    r"""['\u2018](?:[^'\u2019\\]|\\.)*\\r['\u2019]|\^M: bad\ interpreter
    |^'?:\ (?:invalid\ option|command\ not\ found|numeric\ argument\ required|integer\ expression\ expected
    |No\ such\ file\ or\ directory|not\ a\ valid\ identifier)""",
    re.VERBOSE,
)
"""How it comes out that there are carriage returns in a script: the name before the colon ends with one."""


def advice(lines: Sequence[str]) -> str | None:
    """What to do about a script that failed, if the last *lines* of its output say that it could not be run."""
    hint = None
    for line in lines:
        if _CARRIAGE_RETURN.search(line):
            hint = "lines of the script, or of one that it calls, end in CR LF: have them end in LF (sed -i 's/\\r$//')"
        elif (found := _NO_PROGRAM.search(line)) is not None:
            hint = (
                f"the program that the first line of '{found['script']}' names is not there, or cannot be run; or that "
                "line ends in CR LF"
            )
        elif (found := _NO_FORMAT.search(line)) is not None:
            hint = f"'{found['script']}' is no script, and no program for this processor"
    return hint
