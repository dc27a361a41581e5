# SPDX-License-Identifier: Apache-2.0
"""Jobs: commands that run beside the tree, in the appliance or in the sandbox, and how their output is read.

A job is a bash text that sets its variables and becomes the command. In what it prints, records between RS
characters that start with a random token are events: a script has started, a script has ended.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from virt_dib import environment as contract
from virt_dib.errors import ApplianceError
from virt_dib.terminal_link import Terminal

STATUS = re.compile(r"25[0-5]|2[0-4][0-9]|1?[0-9]{1,2}")
"""An exit status in what a guest says, which it may have forged: of 256, a program that ends with it would make 0."""

_EVENT_LIMIT_BYTES = 1 << 22
"""Enough for the names of 10,000 scripts."""
_RS = b"\x1e"


@dataclass(frozen=True, slots=True)
class Event:
    """Something the guest's runner tells: its name, and words after it."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobResult:
    """How a job ended."""

    exit_status: int
    tail: str
    """The last of its output, unless that went elsewhere."""

    def check(self, doing: str) -> None:
        """Raise if it failed.

        Raises:
            ApplianceError: naming *doing* and the last lines of output.
        """
        if self.exit_status != 0:
            said = " / ".join(line for line in self.tail.splitlines()[-5:] if line.strip())
            raise ApplianceError(
                f"{doing}: failed with exit status {self.exit_status}: {said}"
                if said
                else f"{doing}: failed with exit status {self.exit_status}"
            )


class Runner(Protocol):
    """Where scripts can be run, one job at a time. Paths are those below ``/dib``."""

    @property
    def killed_hint(self) -> str:
        """What a program there may have lacked that was killed, nobody knows by whom; a hint."""

    @property
    def full_hint(self) -> str:
        """What to do when there is no room for more of the tree."""

    def run(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        cwd: str,
        *,
        functions: str = "",
        on_output: Callable[[bytes], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> JobResult:
        """Run *command* with exactly *variables*, to its end.

        *functions* is bash text read before it. Output goes to *on_output* as it comes, standard
        output and standard error in one; without *on_output* the last of it is kept in the result.
        With *on_event* the command gets one argument more, the token that makes a record an event.

        Raises:
            ApplianceError: the place itself failed.
        """

    def shell(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        cwd: str,
        *,
        functions: str = "",
        terminal: Terminal,
    ) -> int:
        """Run *command* as :meth:`run` does, but on *terminal*, for as long as people like; return its exit status.

        Raises:
            ApplianceError: it cannot be run, or the place itself failed.
            Interrupted: the user wants the build to end.
        """

    def is_directory(self, path: str) -> bool:
        """Whether *path* is a directory."""


class Place(Runner, Protocol):
    """Where the phases run: the appliance, or the sandbox."""

    def read(self, path: str, *, limit_bytes: int = 1 << 20) -> bytes:
        """The beginning of the file *path*.

        Raises:
            ApplianceError: it cannot be read.
        """

    def archive(self, directory: str, target: Path, *, limit_bytes: int) -> None:
        """Write a tar file of *directory* to *target* on the host.

        Raises:
            ApplianceError: it is longer than *limit_bytes*, or there is no space for it.
        """


def job_text(
    command: Sequence[str], variables: Mapping[str, str], cwd: str, *, functions: str = "", token: str | None = None
) -> bytes:
    """The bash text of a job: exactly *variables*, then *functions*, then *command*, with *token* as its last word."""
    words = shlex.join([*command, *([token] if token is not None else [])])
    text = f"{contract.exports(variables)}{functions}cd {shlex.quote(cwd)}\nexec {words}\n"
    return text.encode("utf-8", "surrogateescape")


def shell_ended(status: int | None, job: JobResult) -> int:
    """The exit status of a shell, from what its end of the link said, and how the job that is this end went.

    Raises:
        ApplianceError: there has been none.
    """
    job.check("running a shell")
    if status is None:
        raise ApplianceError("running a shell: it ended without a word")
    return status


@dataclass
class Splitter:
    """Tells events from output in a stream that comes in pieces of any size."""

    token: bytes
    _rest: bytes = field(default=b"")

    def feed(self, data: bytes) -> Iterator[bytes | Event]:
        """Yield output and events in their order, in time linear in *data* and in what is open, which may be forged."""
        mark = _RS + self.token + b" "
        data, position, self._rest = self._rest + data, 0, b""
        while position < len(data):
            start = data.find(mark, position)
            if start < 0:
                start = len(data) - self._overlap(data[position:], mark)
                self._rest = data[start:]
                if start > position:
                    yield data[position:start]
                return
            if start > position:
                yield data[position:start]
            end = data.find(_RS, start + len(mark))
            if end >= 0:
                name, *words = data[start + len(mark) : end].decode(errors="replace").split(" ")
                position = end + 1
                yield Event(name, tuple(words))
            elif len(data) - start > _EVENT_LIMIT_BYTES:
                position = start + 1
                yield data[start:position]
            else:
                self._rest = data[start:]
                return

    def end(self) -> bytes:
        """What is left when the stream has ended: the beginning of a record that never came whole."""
        rest, self._rest = self._rest, b""
        return rest

    @staticmethod
    def _overlap(data: bytes, mark: bytes) -> int:
        """How many bytes at the end of *data* may be the beginning of a mark."""
        start = data.rfind(_RS, -len(mark))
        return len(data) - start if start >= 0 and mark.startswith(data[start:]) else 0


class Tail:
    """Keeps the last few KiB of a stream."""

    _LIMIT_BYTES = 8192

    def __init__(self) -> None:
        self._data = b""

    def add(self, data: bytes) -> None:
        """Take the next piece."""
        self._data = (self._data + data)[-self._LIMIT_BYTES :]

    def text(self) -> str:
        """What is kept, made harmless for a terminal."""
        return re.sub(r"[^\n\x20-\x7e]", "?", self._data.decode(errors="replace"))
