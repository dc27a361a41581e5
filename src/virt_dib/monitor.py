# SPDX-License-Identifier: Apache-2.0
"""One build followed: its log, its events, and the lines and the status line that a user sees.

What scripts print is hostile. The log gets it byte for byte; a terminal gets only what
:class:`virt_dib.plain_text.Sanitiser` lets through.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO, final

from virt_dib import events
from virt_dib.errors import Interrupted, VirtDibError
from virt_dib.log_file import LogFile
from virt_dib.masking import Mask
from virt_dib.plain_text import Sanitiser, one_line, printable, write_out
from virt_dib.report import Artifact, BuildReport, PhaseResult, ScriptResult
from virt_dib.spec import BuildSpec, Phase
from virt_dib.terminal import AUTOMATIC, Style, coloured, columns_of, cut, is_terminal, padded, terminal_columns
from virt_dib.translation import translated

_TAIL_BYTES = 64 * 1024
_TAIL_COLUMNS = 500
_STATUS_INTERVAL_S = 0.2
_STOP_TIMEOUT_S = 1.0
_INDENT = len("[   0.0] ")
_PHASES = frozenset(phase.directory for phase in Phase)
_MOST_HELD = 10_000
_GREEN, _YELLOW, _BOLD = "32", "33", "1"


# ---- the terminal ----


class _Screen:
    """Standard output: text, and on a terminal a status line below it while a line is complete."""

    def __init__(self, stream: TextIO, style: Style) -> None:
        self.is_terminal = is_terminal(stream)
        self._stream = stream
        self._style = style
        self._at_line_start = True
        self._alive = True
        self._status = ""

    def write(self, text: str) -> None:
        """Show *text*, which is safe, where the last one ended."""
        if text:
            self._put(self._erasing() + text)
            self._at_line_start = text.endswith("\n")

    def write_line(self, text: str, colour: str) -> None:
        """Show a line of ours, on a line of its own."""
        start = "" if self._at_line_start else "\n"
        self.write(start + self._style.laid_out(text, self._stream, indent=_INDENT, colour=colour) + "\n")

    def show_status(self, left: str, right: str) -> None:
        """Replace the status line; *left* is cut when the terminal is too narrow for both."""
        if not self._at_line_start:
            return
        width = max(1, terminal_columns(self._stream) - 1)
        text = cut(f"{cut(left, width - len(right) - 2)}  {right}", width)
        if text != self._status:
            self._put(self._erasing() + (coloured(text, _BOLD) if self._style.colours(self._stream) else text))
            self._status = text

    def clear_status(self) -> None:
        """Leave the terminal as if there had been no status line."""
        self._put(self._erasing())

    def _erasing(self) -> str:
        erasing = "\r\x1b[K" if self._status else ""
        self._status = ""
        return erasing

    def _put(self, text: str) -> None:
        if self._alive and text:
            self._alive = write_out(self._stream, text)


# ---- the monitor ----


@final
class BuildMonitor:
    """Follows one build: writes its log, remembers where it is, and tells *listener* what happens.

    The log gets everything. Methods may be called from any thread.
    """

    def __init__(self, listener: events.Listener = events.ignore) -> None:
        self._teller = events.Teller(listener)
        self._name = ""
        self._total = 0
        self._log: LogFile | None = None
        self._log_path: Path | None = None
        self._log_lasts = True
        self._tail = b""
        self._line_number = 1
        self._phase, self._phase_number = "", 0
        self._scripts: Sequence[str] = ()
        self._script, self._script_number = "", 0
        self._mask = Mask({})

    @property
    def log_path(self) -> Path | None:
        """The log of this build that people may read later, once there is one."""
        return self._log_path if self._log_lasts else None

    @property
    def line_number(self) -> int:
        """The line of the log where the output of the current script or step starts, from 1."""
        return self._line_number

    @property
    def now(self) -> str:
        """The phase or step at work, and its script."""
        return f"{self._phase}/{self._script}" if self._script else self._phase or "before its first step"

    @property
    def elapsed_s(self) -> float:
        """Since the build began."""
        return self._teller.elapsed_s

    # ---- the build ----

    @contextlib.contextmanager
    def following(self, spec: BuildSpec) -> Iterator[None]:
        """Tell that a build has started, and if the block ends with an exception that it has failed, and why."""
        self._name = spec.name
        # What elements are given, and extra-data.d is.
        self._mask = Mask({**os.environ, **spec.variables})
        self._teller.tell(
            events.BuildStarted(
                name=spec.name, output_dir=spec.output_dir, elements=spec.elements, formats=spec.formats
            )
        )
        try:
            yield
        except BaseException as error:
            if isinstance(error, VirtDibError):
                error.rewrite(self._mask)
            # A listener that raises once more must not hide the reason.
            with contextlib.suppress(Exception):
                self._failed(error)
            raise

    @contextlib.contextmanager
    def logging(
        self, path: Path, *, lasting: bool = True, on_elsewhere: Callable[[Path], None] = lambda _: None
    ) -> Iterator[None]:
        """Open the log *path*; close it with the error that ended the block as its last lines.

        Messages name it only if it is *lasting*. *on_elsewhere* is as of :class:`virt_dib.log_file.LogFile`.

        Raises:
            ToolError: it cannot be created; an earlier one is as it was.
        """
        self._log, self._log_path, self._log_lasts = LogFile(path, on_elsewhere), path, lasting
        last_words: Sequence[str] = ()
        try:
            yield
        except BaseException as error:
            last_words = tuple(_last_words(error))
            raise
        finally:
            with self._teller.lock, contextlib.suppress(VirtDibError):
                for text in last_words:
                    self._write_line(text)
            self._log.close()

    def planned(self, elements: Sequence[str], total: int) -> None:
        """Take what was decided: all *elements*, and how many phases and steps there will be, about."""
        self._total = total
        if self._log_path is None:
            raise AssertionError
        self._teller.tell(events.BuildPlanned(elements=tuple(elements), log_path=self._log_path, total=total))

    def finished(self, report: BuildReport) -> None:
        """Take the end of the build."""
        for artifact in report.artifacts:
            self._teller.tell(events.ArtifactMade(artifact=artifact))
        self._teller.tell(
            events.BuildFinished(name=report.name, artifacts=tuple(report.artifacts), seconds=report.seconds)
        )

    def tail(self, lines: int = 20) -> tuple[str, ...]:
        """The last *lines* the current script or step printed, safe to show, each cut to 500 characters."""
        sanitiser = Sanitiser()
        with self._teller.lock:
            kept = self._tail
        found = (sanitiser.feed(kept) + sanitiser.finish()).split("\n")
        if len(kept) == _TAIL_BYTES and len(found) > 1:
            del found[0]  # its beginning is not there
        if found and not found[-1]:
            del found[-1]
        cut = [line if len(line) <= _TAIL_COLUMNS else line[: _TAIL_COLUMNS - 1] + "…" for line in found]
        return tuple(cut[-lines:]) if lines > 0 else ()

    # ---- what happens in it ----

    def message(self, text: str) -> None:
        """Take something virt-dib itself has to say, once."""
        self._say(events.Message(text=self._mask(text)))

    def warning(self, text: str) -> None:
        """As message, for what the user should look at."""
        self._say(events.Warned(text=self._mask(text)))

    def debug(self, text: str) -> None:
        """Take what libguestfs says when it is asked to."""
        self._say(events.Debugged(text=self._mask(text)))

    def phase_started(self, title: str, scripts: Sequence[str]) -> None:
        """Take the start of a phase or a step; *scripts* are the names known now, more may come."""
        with self._teller.lock:
            self._phase, self._phase_number = title, self._phase_number + 1
            self._total = max(self._total, self._phase_number)
            self._scripts = tuple(scripts)
            self._script, self._script_number = "", 0
            if not scripts:
                self._write_line(title)
            self.begin_output()
            self._teller.tell(
                events.PhaseStarted(
                    title=title,
                    step=title not in _PHASES,
                    number=self._phase_number,
                    total=self._total,
                    scripts=self._scripts,
                    log_line=self._line_number,
                )
            )

    def environment_sourced(self, name: str) -> None:
        """Take that a file of environment.d is read; bash traces it."""
        with self._teller.lock:
            self._teller.tell(events.EnvironmentSourced(phase=self._phase, name=name))

    def script_started(self, name: str, element: str | None = None) -> None:
        """Take the start of a script of the phase."""
        with self._teller.lock:
            self._script, self._script_number = name, self._script_number + 1
            self._write_line(f"{self._phase}/{name}")
            self.begin_output()
            self._teller.tell(
                events.ScriptStarted(
                    phase=self._phase,
                    name=name,
                    element=element,
                    number=self._script_number,
                    total=max(len(self._scripts), self._script_number),
                    log_line=self._line_number,
                )
            )

    def begin_output(self) -> None:
        """Take that what comes from now on is another's."""
        with self._teller.lock:
            self._tail = b""
            self._line_number = (self._log.newlines if self._log is not None else 0) + 1

    def output(self, data: bytes) -> None:
        """Take some of what the script or step prints, cut anywhere; it is logged as it is.

        Raises:
            ToolError: the log cannot be written.
        """
        with self._teller.lock:
            self._tail = (self._tail + data[-_TAIL_BYTES:])[-_TAIL_BYTES:]
            if self._log is not None:
                self._log.write(data)
            self._teller.tell(events.Output(data=data))

    def script_finished(self, result: ScriptResult) -> None:
        """Take the end of the script, however it went; the error of one that failed is not ours to tell."""
        with self._teller.lock:
            if result.exit_status == 0:
                self._script = ""
            self._say(
                events.ScriptFinished(
                    phase=result.phase.directory,
                    name=result.name,
                    element=result.element,
                    number=self._script_number,
                    total=max(len(self._scripts), self._script_number),
                    exit_status=result.exit_status,
                    seconds=result.seconds,
                    log_line=self._line_number,
                )
            )

    def shell_opened(self, point: str, phase: str, *, inside: bool) -> None:
        """Take that the terminal is a shell's now."""
        self._say(events.ShellOpened(point=point, phase=phase, inside=inside))

    def shell_closed(self, point: str, exit_status: int | None, seconds: float) -> None:
        """Take that it is not any more."""
        self._say(events.ShellClosed(point=point, exit_status=exit_status, seconds=seconds))

    def phase_finished(self, result: PhaseResult) -> None:
        """Take the end of the phase or step."""
        with self._teller.lock:
            self._phase = self._script = ""
            self._say(
                events.PhaseFinished(
                    title=result.title, number=self._phase_number, total=self._total, seconds=result.seconds
                )
            )

    # ---- inside ----

    def _say(self, event: events.Event) -> None:
        with self._teller.lock, self._teller.raising_in_its_thread():
            for text in _own_lines(event):
                self._write_line(text)
            self._teller.tell(event)

    def _write_line(self, text: str) -> None:
        if self._log is not None:
            self._log.write_line(_with_time(self.elapsed_s, self._mask(text)))

    def _failed(self, error: BaseException) -> None:
        if isinstance(error, VirtDibError):
            for problem in error.problems:
                self._teller.tell(events.ErrorFound(text=problem.message, hint=problem.hint, details=problem.details))
        interrupted = isinstance(error, (Interrupted, KeyboardInterrupt))
        if not interrupted and not isinstance(error, VirtDibError):
            text = self._mask("; ".join(_last_words(error)))
            self._teller.tell(events.ErrorFound(text=text, hint=None, details=()))
        self._teller.tell(
            events.BuildFailed(
                name=self._name,
                interrupted=interrupted,
                exit_status=Interrupted.exit_status if interrupted else getattr(error, "exit_status", 1),
                phase=self._phase or None,
                script=self._script or None,
                log_path=self.log_path,
                log_line=self._line_number if self.log_path is not None else None,
                seconds=self.elapsed_s,
            )
        )


def _own_lines(event: events.Event) -> list[str]:
    """The lines of ours that tell about *event*; a name never makes two of one."""
    text = event.line or ""
    several = isinstance(event, (events.Message, events.Debugged))
    return [line for line in printable(text).split("\n") if line.strip()] if several else [text]


def _with_time(elapsed_s: float, text: str) -> str:
    """As the virt tools begin their lines."""
    return f"[{elapsed_s:6.1f}] {one_line(text)}"


def _last_words(exception: BaseException) -> Iterator[str]:
    if isinstance(exception, VirtDibError):
        for problem in exception.problems:
            yield f"error: {problem.message}"
    elif isinstance(exception, (Interrupted, KeyboardInterrupt)):
        yield "interrupted"
    else:
        yield f"stopped by {type(exception).__name__}: {exception}"


# ---- the display ----

_BORDERS = (
    events.PhaseStarted,
    events.ScriptStarted,
    events.ScriptFinished,
    events.PhaseFinished,
    events.ShellOpened,
    events.ShellClosed,
)
"""What comes between the outputs of two scripts."""


@final
class Display:
    """Shows a build to people on *stream*, as a listener to its events; a context manager.

    Our lines and the scripts' output as it comes; with *verbose* the time of each script too, with *quiet* only
    warnings, and what libguestfs was asked to tell. On a terminal there is a status line below.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False, verbose: bool = False, style: Style = AUTOMATIC) -> None:
        self._screen = _Screen(stream, style)
        self._quiet = quiet
        self._verbose = verbose and not quiet
        self._begun = time.monotonic()
        self._lock = threading.RLock()
        self._sanitiser = Sanitiser()
        self._phase: events.PhaseStarted | None = None
        self._script: events.ScriptStarted | None = None
        self._held: deque[events.Event] | None = None
        """What is to be shown when the shell ends that has the terminal."""
        self._stopping = threading.Event()
        self._redrawing: threading.Thread | None = None

    def __enter__(self) -> Display:
        """Begin to draw the status line."""
        if self._screen.is_terminal and not self._quiet:
            self._redrawing = threading.Thread(target=self._redraw, name="status line", daemon=True)
            self._redrawing.start()
        return self

    def __exit__(
        self,
        exception_class: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the terminal as if there had been no status line."""
        self._stopping.set()
        if self._redrawing is not None:
            # A terminal that is held (Ctrl-S) may keep it; it is not worth waiting for.
            self._redrawing.join(_STOP_TIMEOUT_S)
        with self._lock:
            self._end_output()
            self._screen.clear_status()

    def __call__(self, event: events.Event) -> None:
        """Take *event*. The error of a build that fails is not for here."""
        with self._lock:
            if isinstance(event, events.ShellClosed):
                self._release()
            if self._held is not None:
                self._held.append(event)
            else:
                self._show(event)
            if isinstance(event, events.ShellOpened):
                self._screen.clear_status()
                self._held = deque(maxlen=_MOST_HELD)

    def _release(self) -> None:
        held, self._held = self._held or (), None
        for event in held:
            self._show(event)

    def _show(self, event: events.Event) -> None:
        if isinstance(event, events.Output):
            if not self._quiet:
                self._screen.write(self._sanitiser.feed(event.data))
            return
        if isinstance(event, _BORDERS):
            self._end_output()
        if isinstance(event, events.PhaseStarted):
            self._phase, self._script = event, None
        elif isinstance(event, events.ScriptStarted):
            self._script = event
        elif isinstance(event, events.PhaseFinished):
            self._script = None
        if self._wants(event):
            colour = _YELLOW if isinstance(event, events.Warned) else _GREEN
            for text in _own_lines(event):
                self._screen.write_line(_with_time(event.elapsed_s, translated(text)), colour)

    def _wants(self, event: events.Event) -> bool:
        """Whether *event* is shown as a line of ours."""
        if isinstance(event, (events.Warned, events.Debugged)):
            return True
        if isinstance(event, (events.ScriptFinished, events.PhaseFinished)):
            return self._verbose
        if isinstance(event, events.PhaseStarted):
            # The lines of its scripts follow at once.
            return not self._quiet and not event.scripts
        return not self._quiet and isinstance(
            event, (events.Message, events.ScriptStarted, events.ShellOpened, events.ShellClosed)
        )

    def _end_output(self) -> None:
        rest = self._sanitiser.finish()
        if not self._quiet:
            self._screen.write(rest)

    def _redraw(self) -> None:
        """Keep the status line alive; drawn from here alone, so never more often than this loop turns."""
        while not self._stopping.wait(_STATUS_INTERVAL_S):
            with self._lock:
                if self._phase is not None and self._held is None and not self._stopping.is_set():
                    self._screen.show_status(*self._status(self._phase))

    def _status(self, phase: events.PhaseStarted) -> tuple[str, str]:
        position = f"[{phase.number}/{phase.total}] {one_line(translated(phase.title))}"
        if self._script is not None:
            # One column per character of a name that is not ours, whatever the terminal's idea of wide ones.
            name = one_line(self._script.name).encode("ascii", "replace").decode()
            position += f"  {self._script.number}/{self._script.total} {name}"
        return position, _clock(time.monotonic() - self._begun)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# ---- after the build ----


def summary(report: BuildReport) -> str:
    """The table of phases and scripts with their seconds, then a line for each artifact; ends with a newline."""
    rows: list[tuple[str, str]] = []
    for phase in report.phases:
        rows.append((translated(one_line(phase.title)), f"{phase.seconds:.1f}"))
        rows += [(f"  {one_line(script.name)}", f"{script.seconds:.1f}") for script in phase.scripts]
    rows.append((translated("total"), f"{report.seconds:.1f}"))
    table = _aligned([(translated("phase and script"), translated("seconds")), *rows], right=1)
    files = _aligned([_artifact_row(artifact) for artifact in report.artifacts], right=None)
    return "\n".join([*table, "", *files]) + "\n"


def size_text(size_bytes: int) -> str:
    """*size_bytes* for people: ``412 MiB``, ``5.0 GiB``."""
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:  # noqa: PLR2004 - the step between these units
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}" if value < 10 and unit != "B" else f"{value:.0f} {unit}"  # noqa: PLR2004 - two digits


def _artifact_row(artifact: Artifact) -> tuple[str, str, str]:
    path = artifact.path
    with contextlib.suppress(ValueError, OSError):
        path = path.relative_to(Path.cwd())
    name = f"{path}/" if artifact.format == "directory" else str(path)
    virtual = artifact.virtual_bytes
    note = "" if virtual is None else translated(f"(virtual size {size_text(virtual)})")
    return one_line(name), size_text(artifact.allocated_bytes), note


def _aligned(rows: Sequence[tuple[str, ...]], *, right: int | None) -> list[str]:
    """The rows as lines, two blanks between columns; column *right* is aligned at its end."""
    widths = [max(map(columns_of, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            " " * (width - columns_of(cell)) + cell if index == right else padded(cell, width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
