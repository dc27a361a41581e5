# SPDX-License-Identifier: Apache-2.0
"""The user's terminal, joined to a shell in a guest; ``guest/shell-link.py`` is the other end, and describes frames.

What the shell prints goes to the terminal as it is, or no program that draws on it would work. The frames it comes in
are the guest's too: they are short by their form, and one that should not be ends the link.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import struct
import termios
import threading
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from virt_dib.errors import ApplianceError
from virt_dib.interrupts import check_cancelled, interrupt, ready, shielded, unshielded

LINK = ("/usr/bin/python3", "-I", "-S", "/dib/guest/shell-link.py")
"""The other end: its command, before the name of the stream and the command of the shell."""

_HEADER = struct.Struct("!cH")
_SIZE = struct.Struct("!HH")
_LONGEST = (1 << 16) - 1
_LIMIT_BYTES = 1 << 16
"""As much input is held back while the guest does not read."""
_CHUNK_BYTES = 1 << 14
_USUAL_SIZE = (24, 80)
_LARGEST = 0xFFFF
_CALM = b"\x1b[0m\x1b[?25h\x1b[?1l\x1b>\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?47l"
"""Undoes what programs do to a terminal and a program that is killed leaves: colours, a hidden cursor, keys and a mouse
that send other things, the alternate screen."""
_TERMINAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


class Terminal:
    """The terminal that virt-dib reads from and writes to."""

    def __init__(self, reader: int = 0, writer: int = 1) -> None:
        self.reader = reader
        self._writer = writer
        self._at_line_start = True

    def missing(self) -> str | None:
        """Why there is none, if there is none."""
        names = (("standard input", self.reader), ("standard output", self._writer))
        absent = [name for name, descriptor in names if not os.isatty(descriptor)]
        if not absent:
            return None
        return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} none"

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        try:
            columns, rows = os.get_terminal_size(self._writer)
        except OSError:
            return _USUAL_SIZE
        # One that does not know has 0 of them.
        return min(rows, _LARGEST) or _USUAL_SIZE[0], min(columns, _LARGEST) or _USUAL_SIZE[1]

    def write(self, data: bytes) -> None:
        """Show *data*.

        Raises:
            Interrupted: the terminal has gone.
        """
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._writer, rest) :]
            except BlockingIOError:
                ready((), [self._writer])
            except OSError:
                interrupt()
        if data:
            self._at_line_start = data.endswith(b"\n")

    def read(self) -> bytes:
        """What was typed.

        Raises:
            Interrupted: the terminal has gone.
        """
        try:
            data = os.read(self.reader, _CHUNK_BYTES)
        except BlockingIOError:
            return b""
        except OSError:
            interrupt()
        if not data:
            interrupt()
        return data

    @contextlib.contextmanager
    def raw(self) -> Iterator[int]:
        """Have every key reach the guest, and be as before in the end; gives what is readable when there is a signal.

        Of signals those count that tell of another size, and of going on after a stop.
        """
        descriptors = (self.reader, self._writer)
        with shielded(), contextlib.ExitStack() as stack:
            before = [termios.tcgetattr(descriptor) for descriptor in descriptors]
            stack.callback(self._restore, before)
            self._set_raw()
            wake = stack.enter_context(self._woken())
            # Where a signal ends the build now, all is undone that has been done, and is not disturbed in that.
            with unshielded():
                yield wake

    @contextlib.contextmanager
    def _woken(self) -> Iterator[int]:
        wake, waker = os.pipe()
        for descriptor in (wake, waker):
            os.set_blocking(descriptor, False)

        def tell(number: int, _frame: object) -> None:
            if number == signal.SIGCONT:
                # Whoever had the terminal meanwhile, the user's shell, has set it as it wants.
                self._set_raw()
            with contextlib.suppress(BlockingIOError):
                os.write(waker, b"\0")

        with contextlib.ExitStack() as stack:
            for descriptor in (wake, waker):
                stack.callback(os.close, descriptor)
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGWINCH, signal.SIGCONT):
                    stack.callback(signal.signal, number, signal.signal(number, tell))
            yield wake

    def _set_raw(self) -> None:
        for descriptor in (self.reader, self._writer):
            with contextlib.suppress(termios.error):
                tty.setraw(descriptor, termios.TCSANOW)

    def _restore(self, before: Sequence[list[Any]]) -> None:
        """Never wait for the terminal, which may be gone, or held."""
        if ready((), [self._writer], timeout_s=0)[1]:
            with contextlib.suppress(OSError):
                os.write(self._writer, (_CALM if terminal_name() != "dumb" else b"") + self._line_end())
        for descriptor, attributes in zip((self.reader, self._writer), before, strict=True):
            with contextlib.suppress(termios.error):
                termios.tcsetattr(descriptor, termios.TCSANOW, attributes)

    def _line_end(self) -> bytes:
        return b"" if self._at_line_start else b"\r\n"


def terminal_name(environ: Mapping[str, str] = os.environ) -> str:
    """What kind of terminal the user has, for programs in the guest."""
    name = environ.get("TERM", "")
    return name if _TERMINAL_NAME.fullmatch(name) else "dumb"


def relay(stream: socket.socket, terminal: Terminal, goes_on: Callable[[], bool] = lambda: True) -> int | None:
    """Join *stream* to *terminal* until the shell ends; return its exit status, or None if nothing has come of it.

    *goes_on* is asked again and again whether the other end still lives, where *stream* does not tell. There is no
    limit of time.

    Raises:
        ApplianceError: the guest does not keep to the form.
        Interrupted: the user wants the build to end, or the terminal has gone.
    """
    link = _Link(stream)
    with terminal.raw() as wake:
        size, lives = None, True
        escape = _Escape()
        while True:
            lives = lives and goes_on()
            if size != terminal.size:
                size = terminal.size
                link.put(b"w", _SIZE.pack(*size))
            readers = [stream.fileno(), wake, *([terminal.reader] if link.waiting < _LIMIT_BYTES else [])]
            writers = [stream.fileno()] if link.waiting else []
            readable, writable = ready(readers, writers)
            check_cancelled()
            if wake in readable:
                os.read(wake, _CHUNK_BYTES)
            if terminal.reader in readable:
                link.put(b"d", escape.feed(terminal.read()))
            if writable:
                link.write()
            if stream.fileno() in readable:
                try:
                    status = _show(link, terminal)
                except ConnectionError:
                    return None
                if status is not None:
                    return status
            if not lives and not readable:
                # Nor is anything on its way any more.
                return None


def _show(link: _Link, terminal: Terminal) -> int | None:
    """Take what has come; return the exit status when that is among it."""
    for kind, data in link.read():
        if kind == b"d":
            terminal.write(data)
        elif kind == b"x" and len(data) == 1:
            return data[0]
        else:
            raise ApplianceError(
                f"running a shell: the guest says {kind!r} with {len(data)} bytes, which means nothing",
                hint=f"something else than {LINK[-1]} answers there",
            )
    return None


class _Link:
    """Frames to and from the guest."""

    def __init__(self, stream: socket.socket) -> None:
        stream.setblocking(False)  # noqa: FBT003 - the function takes it so
        self._stream = stream
        self._received = bytearray()
        self._waiting = bytearray()

    @property
    def waiting(self) -> int:
        """How many bytes are to be written."""
        return len(self._waiting)

    def put(self, kind: bytes, data: bytes) -> None:
        """Have frames wait to be written; none for no data."""
        for begin in range(0, len(data), _LONGEST):
            part = data[begin : begin + _LONGEST]
            self._waiting += _HEADER.pack(kind, len(part)) + part

    def write(self) -> None:
        """Write as much as can be."""
        try:
            del self._waiting[: self._stream.send(self._waiting)]
        except BlockingIOError:
            pass
        except ConnectionError:
            # What it has said before is still to be read.
            self._waiting.clear()

    def read(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the frames that are complete with what can be read now.

        Raises:
            ConnectionError: the other end has gone.
        """
        with contextlib.suppress(BlockingIOError):
            data = self._stream.recv(_CHUNK_BYTES)
            if not data:
                raise ConnectionResetError
            self._received += data
        while len(self._received) >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._received)
            end = _HEADER.size + length
            if len(self._received) < end:
                return
            data = bytes(self._received[_HEADER.size : end])
            del self._received[:end]
            yield kind, data


class _Escape:
    """Finds in what is typed that the build is to end: ``~.`` at the beginning of a line, as with ssh.

    ``~~`` there is one tilde.
    """

    def __init__(self) -> None:
        self._at_line_start = True
        self._held = False

    def feed(self, data: bytes) -> bytes:
        """Return what of *data* is for the guest.

        Raises:
            Interrupted: it is to end.
        """
        passed = bytearray()
        for key in data:
            if self._held:
                self._held = False
                if key == ord("."):
                    interrupt()
                passed += b"~" if key != ord("~") else b""
            elif self._at_line_start and key == ord("~"):
                self._held = True
                continue
            passed.append(key)
            self._at_line_start = key in b"\r\n"
        return bytes(passed)
