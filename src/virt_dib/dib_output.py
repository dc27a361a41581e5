# SPDX-License-Identifier: Apache-2.0
"""A build shown as diskimage-builder shows it, for programs that read the output of disk-image-create.

The lines are those of DIB 3.43: lib/disk-image-create and what it sources, lib/dib-run-parts, and lib/outfilter.py,
which everything goes through. What differs: our lines never continue one of a script's, what virt-dib itself has to say
is among them, and files of all formats are announced.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import select
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import TextIO, final

from virt_dib import environment as contract
from virt_dib import events, formats
from virt_dib.errors import ToolError
from virt_dib.events import Event
from virt_dib.plain_text import Sanitiser, one_line, printable, write_out
from virt_dib.report import Artifact
from virt_dib.spec import Phase, Where

_DROPPED = re.compile(rb"set \+o|xtrace")
"""In lines about bash's tracing being switched."""
_LONGEST_LINE = 64 * 1024
"""In bytes; a longer line is not held back until it is whole."""
_RUN_PARTS = "dib-run-parts "
_IN_CHROOT = "/tmp/in_target.d"  # noqa: S108 - in the image
_MOST_ROWS = 10_000
"""Scripts in the table of a phase; a guest may forge any number."""
_ONE = re.compile(r"[ \t\n]*\+?(?:0[xX])?0*1[ \t\n]*")
"""What bash takes for the number 1."""


# ---- what the user wants ----


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Where disk-image-create's output goes, and how."""

    timestamps: bool
    """On standard output; the lines of the log always have them."""
    quiet: bool
    """Nothing but the name of the log goes to standard output."""
    log_path: str | None


def from_environment(environ: Mapping[str, str], logfile: str | None) -> Settings:
    """What DIB_NO_TIMESTAMP and DIB_QUIET in *environ* and ``--logfile`` mean together.

    Both are numbers as bash reads them. A log without a word about DIB_QUIET means quiet.
    """
    quiet = environ.get("DIB_QUIET") or ("1" if logfile else "0")
    return Settings(
        timestamps=_ONE.fullmatch(environ.get("DIB_NO_TIMESTAMP", "")) is None,
        quiet=_ONE.fullmatch(quiet) is not None,
        log_path=logfile or None,
    )


# ---- the rules of outfilter.py ----


@dataclass(frozen=True, slots=True)
class _Piece:
    """A line, or part of a long one."""

    time: bytes
    """What the line begins with where it is to have a time; empty for what continues one."""
    text: bytes


class _Filter:
    """Bytes in pieces of any size to lines with times, without those about bash's tracing."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._line = bytearray()
        self._long: bool | None = None
        """Of a line that is too long to be held back: whether it is shown."""

    def feed(self, data: bytes) -> Iterator[_Piece]:
        """Yield what *data* completes."""
        *lines, rest = data.split(b"\n")
        for line in lines:
            yield from self._add(line)
            yield from self._end()
        yield from self._add(rest)

    def end(self) -> Iterator[_Piece]:
        """Yield the rest of a line that has no end, with one: another line is to come."""
        if self._line or self._long is not None:
            yield from self._end()

    def line(self, text: str) -> _Piece:
        """A line that is never left out, whatever is in it."""
        return _Piece(self._time(), text.encode("utf-8", "replace") + b"\n")

    def _add(self, part: bytes) -> Iterator[_Piece]:
        if self._long is None:
            self._line += part
            if len(self._line) <= _LONGEST_LINE:
                return
            # Always decided by as many bytes, however they have come.
            self._long = _DROPPED.search(self._line[:_LONGEST_LINE]) is None
            if self._long:
                yield _Piece(self._time(), bytes(self._line))
            self._line.clear()
        elif self._long and part:
            yield _Piece(b"", part)

    def _end(self) -> Iterator[_Piece]:
        line, long = bytes(self._line), self._long
        self._line.clear()
        self._long = None
        if long:
            yield _Piece(b"", b"\n")
        elif long is None and _DROPPED.search(line) is None:
            yield _Piece(self._time(), line + b"\n")

    def _time(self) -> bytes:
        now = self._clock().astimezone(timezone.utc)
        return f"{now:%Y-%m-%d %H:%M:%S}.{now.microsecond // 1000:03} | ".encode()


# ---- the two places it goes to ----


class _Stream:
    """Standard output: what is printed as it is, but safe text if it is a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._sanitiser = Sanitiser() if stream.isatty() else None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._alive = True

    def write(self, data: bytes) -> None:
        """Write *data* at once, unless nobody reads it any more."""
        if not data or not self._alive:
            return
        if self._sanitiser is not None:
            self._alive = write_out(self._stream, self._sanitiser.feed(data))
            return
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):
            self._alive = write_out(self._stream, self._decoder.decode(data))
            return
        try:
            self._stream.flush()
            _write_all(descriptor, data)
        except (OSError, ValueError):
            self._alive = False


class _LogFile:
    """The file that ``--logfile`` names. What is in it already stays."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._ended = False
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ToolError(
                f"opening the log '{path}': {reason}", hint="name a file that you can write with --logfile"
            ) from error

    def write(self, data: bytes) -> None:
        """Append *data*.

        Raises:
            ToolError: the first time it cannot be written; after that nothing is.
        """
        if self._ended or not data:
            return
        try:
            _write_all(self._descriptor, data)
        except OSError as error:
            self._ended = True
            raise ToolError(
                f"writing the log '{self._path}': {error.strerror}",
                hint="make room there, or name another file with --logfile",
            ) from error

    def close(self) -> None:
        """End the log; what is written later is dropped."""
        self._ended = True
        with contextlib.suppress(OSError):
            os.close(self._descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            # A pipe that another program has set so.
            writable = select.poll()
            writable.register(descriptor, select.POLLOUT)
            writable.poll()


# ---- the lines ----


def _now() -> datetime:
    return datetime.now(timezone.utc)


@final
class DibOutput:
    """Shows a build as disk-image-create does, as a listener to its events; a context manager.

    Where *stream* is a terminal, no escape sequences of scripts get there; elsewhere, and in the log, are the bytes
    that they print. A line is shown when it is whole.

    Args:
        stream: Standard output.
        timestamps: As in :class:`Settings`, like the next two.
        quiet: See there.
        log_path: See there; it is opened at the beginning of the block.
        version: Of diskimage-builder.
        words: Gives what virt-dib says the words of the command that was typed.
        elements: Those asked for, with DIB's defaults, as ``elements.requested`` has them; None: those of the event.
        image_name: What ``-o`` says, which files are called by; None: files are called by their paths.
        clock: What time it is.
    """

    def __init__(
        self,
        *,
        stream: TextIO,
        timestamps: bool,
        quiet: bool,
        log_path: str | Path | None,
        version: str,
        words: Callable[[str], str] = str,
        elements: Sequence[str] | None = None,
        image_name: str | None = None,
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._stream = _Stream(stream)
        self._timestamps = timestamps
        self._quiet = quiet
        self._log_path = log_path
        self._log: _LogFile | None = None
        self._version = version
        self._words = words
        self._elements = elements
        self._image_name = image_name
        self._name = ""
        self._filter = _Filter(clock)
        self._rows: list[tuple[str, float]] = []

    def __enter__(self) -> DibOutput:
        """Tell where the log is, and open it.

        Raises:
            ToolError: it cannot be opened.
        """
        if self._log_path is not None:
            self._stream.write(f"Output logs going to: {one_line(str(self._log_path))}\n".encode())
            self._log = _LogFile(self._log_path)
        return self

    def __exit__(
        self,
        exception_class: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write what is left, and close the log.

        Raises:
            ToolError: it cannot be written. An exception that is on its way goes on.
        """
        try:
            self._write(self._filter.end())
        except ToolError:
            if exception is None:
                raise
        finally:
            if self._log is not None:
                self._log.close()

    def __call__(self, event: Event) -> None:
        """Take *event*.

        Raises:
            ToolError: the first time the log cannot be written.
        """
        if self._quiet and self._log is None:
            return
        if isinstance(event, events.Output):
            self._write(self._filter.feed(event.data))
        else:
            self._write(self._pieces(event))

    def _write(self, pieces: Iterator[_Piece]) -> None:
        made = list(pieces)
        timed = b"".join(piece.time + piece.text for piece in made)
        if not self._quiet:
            self._stream.write(timed if self._timestamps else b"".join(piece.text for piece in made))
        if self._log is not None:
            self._log.write(timed)

    def _pieces(self, event: Event) -> Iterator[_Piece]:
        yield from self._filter.end()
        for line in self._dib_lines(event):
            yield from self._filter.feed(f"{line}\n".encode())
        for line in _own_lines(event, self._words):
            yield self._filter.line(line)

    def _dib_lines(self, event: Event) -> Iterator[str]:
        """What DIB says when *event* happens, a line each."""
        if isinstance(event, events.BuildStarted):
            self._name = event.name
            yield f"diskimage-builder version {one_line(self._version)}"
            if names := event.elements if self._elements is None else self._elements:
                yield f"Building elements: {one_line(' '.join(names))}"
        elif isinstance(event, events.BuildPlanned):
            yield f"Expanded element dependencies to: {one_line(' '.join(event.elements))}"
            yield f"Building in {contract.BUILD_DIR}"
        elif isinstance(event, events.ArtifactMade):
            # Not those that the elements have left, checksums and the like.
            if event.artifact.format in formats.KNOWN:
                yield f"Image file {one_line(self._called(event.artifact))} created..."
        elif isinstance(event, events.BuildFinished):
            yield "Build completed successfully"
        elif isinstance(event, (events.ShellOpened, events.ShellClosed)):
            yield from _break_lines(event)
        else:
            yield from self._phase_lines(event)

    def _phase_lines(self, event: Event) -> Iterator[str]:
        """What run_d and dib-run-parts say."""
        if isinstance(event, events.PhaseStarted):
            self._rows = []
            if not event.step and not _is_in_chroot(event.title):
                yield f"Running hooks from {_directory(event.title)}"
        elif isinstance(event, events.EnvironmentSourced):
            name = f"{_directory(event.phase)}/../environment.d/{one_line(event.name)}"
            yield f"{_RUN_PARTS}Sourcing environment file {name}"
        elif isinstance(event, events.ScriptStarted):
            yield f"{_RUN_PARTS}Running {_directory(event.phase)}/{one_line(event.name)}"
        elif isinstance(event, events.ScriptFinished):
            # Of one that fails, dib-run-parts says nothing, and there is no table.
            if event.exit_status == 0:
                if len(self._rows) < _MOST_ROWS:
                    self._rows.append((event.name, event.seconds))
                yield f"{_RUN_PARTS}{one_line(event.name)} completed"
        elif isinstance(event, events.PhaseFinished) and _is_phase(event.title):
            yield from (f"{_RUN_PARTS}{line}" for line in _profile(event.title, self._rows))

    def _called(self, artifact: Artifact) -> str:
        if self._image_name is None:
            return str(artifact.path)
        return self._image_name + artifact.path.name.removeprefix(self._name)


def _own_lines(event: Event, words: Callable[[str], str]) -> Iterator[str]:
    """What virt-dib has to say that DIB has not. The last output of what failed is above already."""
    if isinstance(event, (events.Message, events.Debugged)):
        text = words(event.text) if isinstance(event, events.Message) else event.text
        yield from (line for line in printable(text).split("\n") if line.strip())
    elif isinstance(event, events.Warned):
        yield f"WARNING: {one_line(words(event.text))}"
    elif isinstance(event, events.ErrorFound):
        yield f"ERROR: {one_line(words(event.text))}"
        if event.hint:
            yield f"hint: {one_line(words(event.hint))}"
    elif isinstance(event, events.PhaseStarted) and event.step:
        yield one_line(event.title)
    elif isinstance(event, events.BuildFailed) and event.interrupted:
        yield "interrupted"


def _break_lines(event: events.ShellOpened | events.ShellClosed) -> Iterator[str]:
    """What check_break says."""
    if isinstance(event, events.ShellOpened):
        yield "Starting debug shell. Exit to resume building."
        yield f"At stage {event.point}"
    elif event.exit_status is not None:  # the build does not end with it
        yield "Resuming"


_PHASES = {phase.directory: phase for phase in Phase}


def _is_phase(title: str) -> bool:
    return title in _PHASES


def _is_in_chroot(title: str) -> bool:
    return _is_phase(title) and _PHASES[title].where is Where.CHROOT


def _directory(phase: str) -> str:
    """Where the scripts of *phase* see themselves."""
    return f"{_IN_CHROOT if _is_in_chroot(phase) else contract.HOOKS}/{one_line(phase)}"


def _profile(phase: str, rows: Sequence[tuple[str, float]]) -> Iterator[str]:
    """The table at the end of a phase. Its order is that of bytes, that of the scripts is one of numbers."""
    yield "----------------------- PROFILING -----------------------"
    yield ""
    yield f"Target: {phase}"
    yield ""
    yield f"{'Script':<40} {'Seconds':>9}"
    yield f"{'-' * 39:<40} {'-' * 10}"
    yield ""
    for name, seconds in sorted(rows, key=lambda row: row[0].encode("utf-8", "replace")):
        # awk, which subtracts the times, gives six digits.
        yield f"{one_line(name):<40} {float(f'{seconds:.6g}'):10.3f}"
    yield ""
    yield "--------------------- END PROFILING ---------------------"
