# SPDX-License-Identifier: Apache-2.0
"""A terminal of the guest, and the stream that joins it to the user's.

    shell-link.py STREAM COMMAND...    run COMMAND on a new terminal

STREAM is '-', the socket that is standard input, or the name of a virtio port. Both ways it carries frames: a letter,
the length of what follows in two bytes, and that:

    here from virt-dib   w ROWS COLUMNS, two bytes each; the first frame, and whenever the size changes | d INPUT
    from here to it      d OUTPUT; the first one is empty, and says that the terminal is there | x STATUS, one byte

virt_dib.terminal_link is the other end. The exit status is 0 if COMMAND has been run, whatever its own is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator

HEADER = struct.Struct("!cH")
SIZE = struct.Struct("!HH")
LIMIT_BYTES = 1 << 16
"""As much is held back in either direction."""
CHUNK_BYTES = 1 << 14
MOST_CHUNKS_LEFT = 64
"""What is passed on when the command has ended; a process that it left behind may go on writing."""
CONNECT_TIMEOUT_S = 120.0
POLL_S = 0.05
PORTS = "/sys/class/virtio-ports"


class Ended(Exception):  # noqa: N818 - it may be well
    """The other end has gone."""


class Stream:
    """Frames from and to the other end."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self._received = bytearray()
        self._waiting = bytearray()

    @property
    def is_full(self) -> bool:
        """Whether so much waits to be written that there should not be more."""
        return len(self._waiting) >= LIMIT_BYTES

    @property
    def has_waiting(self) -> bool:
        """Whether something waits to be written."""
        return bool(self._waiting)

    def put(self, kind: bytes, data: bytes) -> None:
        """Have a frame wait to be written."""
        self._waiting += HEADER.pack(kind, len(data)) + data

    def write(self) -> None:
        """Write as much as can be."""
        with contextlib.suppress(BlockingIOError):
            written = os.write(self.descriptor, self._waiting[:CHUNK_BYTES])
            del self._waiting[:written]

    def flush(self) -> None:
        """Write all of it."""
        while self._waiting:
            select.select([], [self.descriptor], [])
            self.write()

    def read(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the frames that are complete with what can be read now."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.descriptor, CHUNK_BYTES)
            if not data:
                raise Ended
            self._received += data
        while len(self._received) >= HEADER.size:
            kind, length = HEADER.unpack_from(self._received)
            end = HEADER.size + length
            if len(self._received) < end:
                return
            data = bytes(self._received[HEADER.size : end])
            del self._received[:end]
            yield kind, data


def opened(name: str) -> int:
    """The stream called *name*."""
    if name == "-":
        return 0
    for port in os.listdir(PORTS):
        with contextlib.suppress(OSError), open(f"{PORTS}/{port}/name") as stream:
            if stream.read().strip() == name:
                return os.open(f"/dev/{port}", os.O_RDWR | os.O_CLOEXEC)
    sys.exit(f"there is no virtio port {name}")


def first_frames(stream: Stream) -> list[tuple[bytes, bytes]]:
    """What comes first, the size of the terminal. A virtio port seems to be at its end until virt-dib is there."""
    until_s = time.monotonic() + CONNECT_TIMEOUT_S
    while time.monotonic() < until_s:
        with contextlib.suppress(Ended):
            frames = list(stream.read())
            if frames:
                return frames
        time.sleep(POLL_S)
    sys.exit("virt-dib is not at the other end")


def started(command: list[str], size: tuple[int, int]) -> tuple[int, int]:
    """Start *command* on a terminal of that size; return its process and the terminal's other side."""
    child, terminal = pty.fork()
    if child == 0:
        try:
            set_size(0, size)
            for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(ignored, signal.SIG_DFL)
            os.execvp(command[0], command)  # noqa: S606 - that is what this program is for
        except OSError as error:
            os.write(2, f"cannot run {command[0]}: {error.strerror}\r\n".encode())
        finally:
            os._exit(127)
    os.set_blocking(terminal, False)
    return child, terminal


def set_size(terminal: int, size: tuple[int, int]) -> None:
    """Tell the terminal its size; the kernel tells the programs on it."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))


def read(terminal: int) -> bytes | None:
    """Some of what was written to the terminal, or None if that has ended."""
    try:
        return os.read(terminal, CHUNK_BYTES) or None
    except BlockingIOError:
        return b""
    except OSError:
        return None  # no process has it open any more


class Relay:
    """Passes on what comes from either side, until the command ends."""

    def __init__(self, stream: Stream, child: int, terminal: int) -> None:
        self._stream = stream
        self._child = child
        self._terminal = terminal
        self._open = True
        self._input = bytearray()

    def run(self) -> int:
        """Return the exit status of the command, as a shell counts it."""
        wake, waker = os.pipe()
        for descriptor in (wake, waker):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        while True:
            ended, status = os.waitpid(self._child, os.WNOHANG)
            if ended:
                self._pass_on_the_rest()
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            self._turn(wake)

    def take(self, kind: bytes, data: bytes) -> None:
        """Take a frame."""
        if kind == b"w":
            set_size(self._terminal, SIZE.unpack(data))
        elif kind == b"d":
            self._input += data

    def _turn(self, wake: int) -> None:
        stream, terminal = self._stream, self._terminal
        readers = [wake]
        readers += [stream.descriptor] if len(self._input) < LIMIT_BYTES else []
        readers += [terminal] if self._open and not stream.is_full else []
        writers = [stream.descriptor] if stream.has_waiting else []
        writers += [terminal] if self._open and self._input else []
        ready, writable, _ = select.select(readers, writers, [])
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, CHUNK_BYTES)
        if stream.descriptor in ready:
            for kind, data in stream.read():
                self.take(kind, data)
        if terminal in ready:
            self._pass_on()
        if terminal in writable:
            self._type()
        if stream.descriptor in writable:
            stream.write()

    def _type(self) -> None:
        try:
            del self._input[: os.write(self._terminal, self._input[:CHUNK_BYTES])]
        except BlockingIOError:
            pass
        except OSError:
            self._input.clear()

    def _pass_on(self) -> bool:
        """Pass on some output; say whether there was any."""
        data = read(self._terminal)
        if data is None:
            self._open = False
        elif data:
            self._stream.put(b"d", data)
        return bool(data)

    def _pass_on_the_rest(self) -> None:
        for _ in range(MOST_CHUNKS_LEFT):
            if not self._pass_on():
                break


def main() -> None:
    """Be the link."""
    stream = Stream(opened(sys.argv[1]))
    frames = first_frames(stream)
    size = next((SIZE.unpack(data) for kind, data in frames if kind == b"w"), (24, 80))
    child, terminal = started(sys.argv[2:], (size[0], size[1]))
    relay = Relay(stream, child, terminal)
    stream.put(b"d", b"")
    for kind, data in frames:
        relay.take(kind, data)
    try:
        status = relay.run()
        stream.put(b"x", bytes([status]))
        stream.flush()
    except (Ended, BrokenPipeError, ConnectionError):
        # Whoever has the terminal gets SIGHUP when this process ends.
        sys.exit("virt-dib has gone")


if __name__ == "__main__":
    main()
