# SPDX-License-Identifier: Apache-2.0
"""Programs on a terminal, and a person there who reads and types."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from virt_dib import tools

WAIT_S = 900.0
ROWS, COLUMNS = 24, 80
CTRL_C, CTRL_D, CTRL_Z = "\x03", "\x04", "\x1a"
_TAKE = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Person:
    """Sits at a terminal."""

    def __init__(self, leader: int, follower: int) -> None:
        os.set_blocking(leader, False)
        self._leader = leader
        self._follower = follower
        self._read = 0
        self.seen = ""
        """All that has ever been on the terminal."""

    def type(self, text: str) -> None:
        """Type *text*, and read meanwhile what comes."""
        rest = text.encode()
        while rest:
            ready, writable, _ = select.select([self._leader], [self._leader], [], WAIT_S)
            assert ready or writable, "the terminal takes nothing any more"
            if ready:
                self._take()
            if writable:
                with contextlib.suppress(BlockingIOError):
                    rest = rest[os.write(self._leader, rest[:1024]) :]

    def read_until(self, pattern: str, wait_s: float = WAIT_S) -> str:
        """What has come since the last time, up to *pattern*; fails where that does not come."""
        until_s = time.monotonic() + wait_s
        while True:
            found = re.search(pattern, self.seen[self._read :])
            if found:
                text = self.seen[self._read : self._read + found.end()]
                self._read += found.end()
                return text
            left_s = until_s - time.monotonic()
            if left_s <= 0 or not select.select([self._leader], [], [], left_s)[0]:
                pytest.fail(f"{pattern!r} not on the terminal after {self.seen[self._read :]!r}")
            self._take()

    def keep_reading(self) -> None:
        """Take what is there, for a later look."""
        while select.select([self._leader], [], [], 0)[0]:
            self._take()

    def read_all(self) -> str:
        """What is there now besides."""
        self.keep_reading()
        text, self._read = self.seen[self._read :], len(self.seen)
        return text

    def ask(self, command: str, prompt: str) -> str:
        """What a shell prints for *command*, up to its next *prompt*."""
        self.type(command + "\r")
        self.read_until("\n")
        text = self.read_until(prompt)
        # Without what readline says about pasting.
        text = re.sub(r"\x1b\[\?2004[hl]\r?", "", text)
        return re.sub(f"(?:{prompt})$", "", text).replace("\r\n", "\n")

    def resize(self, rows: int, columns: int) -> None:
        """Make the terminal larger or smaller."""
        fcntl.ioctl(self._leader, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def cook(self) -> None:
        """Set the terminal as the shell of a user does that comes to the foreground."""
        attributes = termios.tcgetattr(self._follower)
        attributes[3] |= termios.ICANON | termios.ISIG | termios.ECHO
        termios.tcsetattr(self._follower, termios.TCSANOW, attributes)

    @property
    def attributes(self) -> list[object]:
        """How the terminal is set."""
        return termios.tcgetattr(self._follower)

    @property
    def is_raw(self) -> bool:
        """Whether every key reaches the program."""
        flags = termios.tcgetattr(self._follower)[3]
        return not flags & (termios.ICANON | termios.ISIG | termios.ECHO)

    def _take(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.seen += os.read(self._leader, 65536).decode(errors="replace")


@contextlib.contextmanager
def terminal(rows: int = ROWS, columns: int = COLUMNS) -> Iterator[tuple[Person, int]]:
    """A terminal with somebody there, and the side of it that is a program's."""
    leader, follower = pty.openpty()
    person = Person(leader, follower)
    person.resize(rows, columns)
    try:
        yield person, follower
    finally:
        os.close(leader)
        os.close(follower)


class Program:
    """A program that runs on a terminal."""

    def __init__(self, pid: int, person: Person) -> None:
        self.pid = pid
        self.person = person

    def ended(self) -> int:
        """Its exit status when it has ended, as a shell counts it; the person goes on reading."""
        until_s = time.monotonic() + WAIT_S
        while time.monotonic() < until_s:
            self.person.keep_reading()
            result = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if result is not None:
                self.person.keep_reading()
                return result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status
            time.sleep(0.02)
        pytest.fail(f"it still runs, after {self.person.seen[-2000:]!r}")


@contextlib.contextmanager
def on_terminal(
    command: Sequence[str | Path],
    *,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    columns: int = COLUMNS,
) -> Iterator[Program]:
    """Start *command* with a controlling terminal of its own."""
    with (
        terminal(columns=columns) as (person, follower),
        tools.started(
            [sys.executable, "-c", _TAKE, *command],
            cwd=cwd,
            environment={**os.environ, "TERM": "xterm-256color", **(environment or {})},
            stdin=follower,
            stdout=follower,
            stderr=follower,
        ) as process,
    ):
        yield Program(process.pid, person)
