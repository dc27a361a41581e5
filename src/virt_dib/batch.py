# SPDX-License-Identifier: Apache-2.0
"""The builds of several images: each a process of its own, one after the other or some at once, and their result."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import re
import secrets
import selectors
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TextIO

from virt_dib import configuration, dib_command, masking, tools
from virt_dib.errors import Interrupted, Problem, ToolError
from virt_dib.events import now
from virt_dib.image_file import ImageRequest
from virt_dib.interrupts import shielded
from virt_dib.plain_text import Sanitiser, one_line, write_out
from virt_dib.spec import DEFAULT_MEMORY_MIB, MOST_CPUS

_MODULE = "virt_dib.dib_cli"
_OLD_START = f"import sys; del sys.path[0]; import runpy; runpy.run_module('{_MODULE}', run_name='__main__')"


def start_command(python_version: tuple[int, ...]) -> tuple[str, ...]:
    """What builds one image. A file of the working directory is never taken for a module."""
    return (sys.executable, *(("-P", "-m", _MODULE) if python_version >= (3, 11) else ("-c", _OLD_START)))


COMMAND = start_command(sys.version_info[:2])
AS_RAMDISK = "--virt-dib-as=ramdisk-image-create"
"""The first argument of a ramdisk's build."""
OF_FILES = "--virt-dib-for=diskimage-builder"
"""An argument before all others, of builds that are run here: they speak of keys in files, not of options."""
MEMORY_VARIABLE, CPUS_VARIABLE = "VIRT_DIB_MEMSIZE", "VIRT_DIB_SMP"
_ANY_ELEMENT = "debian-minimal"
VERSION = 1
"""Of the result's form; new fields do not change it."""
_END_TIMEOUT_S = 30.0
"""A build that is told to end has an appliance to stop, and perhaps a drive to leave whole."""
_HEARD_S = 1.0
_POLL_S = 0.1
_CHUNK_BYTES = 1 << 16
_LAST_CHUNKS = 32
_LONGEST_LINE = 1 << 20
_NOT_STARTED = 126
"""The exit status of what cannot be started, as the shell counts."""


class Status(enum.Enum):
    """What became of an image."""

    BUILT = "built"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much may run at once."""

    jobs: int = 1
    cpus: int | None = None
    """Processors for all builds together; None: those of this host."""
    memory_mib: int | None = None
    """Memory for all machines together; None: what this host has available."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one image; without times where its build has not begun."""

    request: ImageRequest
    status: Status = Status.SKIPPED
    exit_status: int | None = None
    """As the shell counts it."""
    reason: str | None = None
    """Why it failed, for people."""
    started: datetime | None = None
    ended: datetime | None = None
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchReport:
    """What became of all images, in the order they were asked for."""

    outcomes: tuple[Outcome, ...]
    started: datetime
    ended: datetime
    seconds: float
    interrupted: bool

    @property
    def exit_status(self) -> int:
        """That of the command: diskimage-builder's is 1, whatever the status of the build that failed."""
        if self.interrupted:
            return Interrupted.exit_status
        return int(any(outcome.status is Status.FAILED for outcome in self.outcomes))


def run(
    requests: Sequence[ImageRequest],
    *,
    limits: Limits = Limits(),
    stop_on_failure: bool = False,
    command: Sequence[str] = COMMAND,
) -> BatchReport:
    """Build all images with *command*, within *limits*, and tell which have failed.

    With one job builds have the terminal and the streams of this process. With more, each line of a build's output
    begins with the image's name. A signal ends all builds; then the report says that it was interrupted.
    """
    return _Batch(requests, limits, stop_on_failure=stop_on_failure, command=command).run()


# ---- one build's command ----


def shown(request: ImageRequest, command: Sequence[str] = COMMAND) -> str:
    """The command of the build with its variables, for a shell, but for secrets."""
    variables = [(name, masking.shown(name, value)) for name, value in request.environment.items()]
    words = [f"{name}={quoted(value)}" for name, value in variables]
    if not all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) for name, _ in variables):
        # A shell would take it for the name of a program.
        words = ["env", "--", *(quoted(f"{name}={value}") for name, value in variables)]
    return " ".join([*words, *map(quoted, [*command, *_arguments(request)])])


def quoted(text: str) -> str:
    """*text* as a word for a shell; what a terminal would not just show becomes an escape of bash."""
    if all(char.isprintable() or char in "\n\t" for char in text):
        return shlex.quote(text)
    return "$'" + "".join(map(_escaped, text)) + "'"


def _escaped(char: str) -> str:
    if char in "\\'":
        return f"\\{char}"
    return char if char.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(char))


def _arguments(request: ImageRequest) -> list[str]:
    return [*([AS_RAMDISK] if request.ramdisk else []), *request.arguments]


# ---- what fits ----


@dataclass(frozen=True, slots=True)
class _Needs:
    """What a build takes of the host while it runs."""

    cpus: int | None
    """None: what it is told."""
    memory_mib: int

    @classmethod
    def of(cls, values: Mapping[str, configuration.Value]) -> _Needs:
        """As the settings of a build have it. One that is wrong it refuses itself."""
        cpus, memory = (_number(values[dest].text) if dest in values else 0 for dest in ("cpus", "memory"))
        return cls(cpus=cpus or None, memory_mib=memory or DEFAULT_MEMORY_MIB)


def _settings(request: ImageRequest) -> configuration.Settings:
    return configuration.settings({**os.environ, **request.environment})


def problems(requests: Iterable[ImageRequest], limits: Limits, *, complete: bool = True) -> list[Problem]:
    """What builds would refuse as it is written, and images that do not fit into limits that were given, even alone.

    Unless they are *complete*, requests may lack their elements.
    """
    common = _refused((_ANY_ELEMENT,), {}, ramdisk=False)
    found = list(common)
    for request in requests:
        arguments = request.arguments if complete else (*request.arguments, _ANY_ELEMENT)
        found += [
            Problem(f"{request.origin}: '{request.name}': {problem.message}", problem.hint)
            for problem in _refused(arguments, request.environment, ramdisk=request.ramdisk)
            if problem not in common
        ]
        needs = _Needs.of(_settings(request).values)
        for option, variable, most, wanted in (
            ("--cpus", CPUS_VARIABLE, limits.cpus, needs.cpus or 1),
            ("--memory", MEMORY_VARIABLE, limits.memory_mib, needs.memory_mib),
        ):
            if most is not None and wanted > most:
                message = f"{request.origin}: building '{request.name}' takes {wanted}, and {option} is {most}"
                found.append(Problem(message, f"raise {option}, or set {variable} for this image"))
    return found


def _refused(arguments: Sequence[str], environment: Mapping[str, str], *, ramdisk: bool) -> Sequence[Problem]:
    """What is wrong with the command of a build, and with its variables."""
    prog = dib_command.RAMDISK_PROG if ramdisk else dib_command.DISK_PROG
    return dib_command.parse(arguments, {**os.environ, **environment}, prog=prog, ramdisk=ramdisk).problems


def _number(text: str) -> int:
    """0 for what is none."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0


def _available_mib() -> int:
    with contextlib.suppress(OSError, ValueError):
        found = re.search(r"^MemAvailable: *([0-9]+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) >> 10
    return sys.maxsize


# ---- running them ----


class _Lines:
    """A stream of a build, written line by line behind the name of its image, without what harms a terminal."""

    def __init__(self, label: str, stream: TextIO) -> None:
        self._label = label
        self._stream = stream
        self._sanitiser = Sanitiser()
        self._rest = ""

    def feed(self, data: bytes) -> None:
        self._write(self._sanitiser.feed(data))

    def finish(self) -> None:
        self._write(self._sanitiser.finish())
        if self._rest:
            self._write("\n")

    def _write(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        if len(self._rest) > _LONGEST_LINE:
            lines.append(self._rest)
            self._rest = ""
        if lines:
            write_out(self._stream, "".join(f"{self._label} | {line}\n" for line in lines))


@dataclass(eq=False, kw_only=True, slots=True)
class _Build:
    """One that runs; leaving *stack* ends it."""

    number: int
    cpus: int
    memory_mib: int
    started: datetime
    begun: float
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    process: tools.Process
    streams: dict[int, _Lines] = field(default_factory=dict)


class _Batch:
    def __init__(
        self, requests: Sequence[ImageRequest], limits: Limits, *, stop_on_failure: bool, command: Sequence[str]
    ) -> None:
        self._requests = tuple(requests)
        self._jobs = limits.jobs
        self._stop_on_failure = stop_on_failure
        self._command = command
        self._shares = limits.jobs > 1 or limits.cpus is not None
        self._cpus = limits.cpus or len(os.sched_getaffinity(0))
        self._memory_mib = limits.memory_mib or (_available_mib() if limits.jobs > 1 else sys.maxsize)
        at_once = max(1, min(limits.jobs, len(self._requests)))
        self._share = max(1, min(MOST_CPUS, self._cpus // at_once))
        self._needs = [_Needs.of(_settings(request).values) for request in self._requests]
        self._next = 0
        self._stopped = False
        self._running: list[_Build] = []
        self._outcomes = {number: Outcome(request=request) for number, request in enumerate(self._requests)}
        self._selector = selectors.DefaultSelector()

    def run(self) -> BatchReport:
        started, begun = now(), time.monotonic()
        interrupted = False
        with self._selector:
            try:
                while self._running or self._may_start():
                    while self._may_start() and self._fits():
                        self._start()
                    self._read(_POLL_S)
                    self._collect()
            except Interrupted:
                interrupted = True
            finally:
                with shielded():
                    self._end_all()
        return BatchReport(
            outcomes=tuple(self._outcomes.values()),
            started=started,
            ended=now(),
            seconds=time.monotonic() - begun,
            interrupted=interrupted,
        )

    def _may_start(self) -> bool:
        return self._next < len(self._requests) and not self._stopped

    def _fits(self) -> bool:
        """Whether the next one does, beside those that run. None overtakes it; alone, it always does."""
        if not self._running:
            return True
        needs = self._needs[self._next]
        cpus = sum(build.cpus for build in self._running) + (needs.cpus or self._share)
        memory_mib = sum(build.memory_mib for build in self._running) + needs.memory_mib
        return len(self._running) < self._jobs and cpus <= self._cpus and memory_mib <= self._memory_mib

    def _start(self) -> None:
        number, request = self._next, self._requests[self._next]
        text = shown(request, self._command)
        if self._jobs == 1:
            write_out(sys.stderr, f"{text}\n\n")
        else:
            label = one_line(request.name)
            write_out(sys.stderr, "".join(f"{label} | {line}\n" for line in text.split("\n")))
        # A signal must not come between the start and the note of it.
        with shielded():
            self._next += 1
            self._start_quietly(number, request)

    def _start_quietly(self, number: int, request: ImageRequest) -> None:
        environment = {**os.environ, **request.environment}
        needs = self._needs[number]
        if self._shares and needs.cpus is None:
            environment[CPUS_VARIABLE] = str(self._share)
        command = [*self._command, OF_FILES, *_arguments(request)]
        started, stack = now(), contextlib.ExitStack()
        try:
            if self._jobs == 1:
                process = stack.enter_context(tools.attended(command, environment=environment))
            else:
                process = stack.enter_context(tools.started(command, environment=environment, tidies_up=True))
        except ToolError as error:
            self._ended(number, _NOT_STARTED, started=started, seconds=0.0, reason=str(error))
            return
        build = _Build(
            number=number,
            cpus=needs.cpus or self._share,
            memory_mib=needs.memory_mib,
            started=started,
            begun=time.monotonic(),
            stack=stack,
            process=process,
        )
        self._running.append(build)
        for pipe, stream in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                build.streams[pipe.fileno()] = _Lines(one_line(request.name), stream)
                self._selector.register(pipe, selectors.EVENT_READ, build)

    # ---- what they print ----

    def _read(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            self._read_some(key.data, key.fd)

    def _read_some(self, build: _Build, descriptor: int) -> bool:
        """Take a piece of what is there; whether more may come."""
        try:
            data = os.read(descriptor, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        if data:
            build.streams[descriptor].feed(data)
        else:
            self._close(build, descriptor)
        return bool(data)

    def _close(self, build: _Build, descriptor: int) -> None:
        self._selector.unregister(descriptor)
        build.streams.pop(descriptor).finish()

    # ---- how they end ----

    def _collect(self) -> None:
        for build in tuple(self._running):
            # Python would lose the status if a signal came while it is read.
            with shielded():
                code = build.process.poll()
            if code is not None:
                self._finish(build)

    def _finish(self, build: _Build) -> None:
        """Take what a build has left in its pipes, and its end; others may have these pipes still."""
        for descriptor in tuple(build.streams):
            for _ in range(_LAST_CHUNKS):
                if not self._read_some(build, descriptor):
                    break
            if descriptor in build.streams:
                self._close(build, descriptor)
        with shielded():
            self._running.remove(build)
            build.stack.close()
            self._ended(
                build.number,
                build.process.returncode,
                started=build.started,
                seconds=time.monotonic() - build.begun,
            )

    def _ended(self, number: int, code: int, *, started: datetime, seconds: float, reason: str | None = None) -> None:
        failed = code != 0
        self._outcomes[number] = Outcome(
            request=self._requests[number],
            status=Status.FAILED if failed else Status.BUILT,
            exit_status=code if code >= 0 else 128 - code,
            reason=(reason or tools.describe_status(code)) if failed else None,
            started=started,
            ended=now(),
            seconds=seconds,
        )
        self._stopped = self._stopped or (failed and self._stop_on_failure)

    def _end_all(self) -> None:
        """Tell all builds to end, let them say so, and after a time end them the hard way."""
        if self._jobs == 1 and _has_terminal():
            # Ctrl-C has reached it, too. A second signal could end it while it says so.
            self._wait(_HEARD_S)
        for build in self._running:
            build.process.terminate()
        self._wait(_END_TIMEOUT_S)
        for build in tuple(self._running):
            build.process.kill()
            build.process.wait()
            self._finish(build)

    def _wait(self, limit_s: float) -> None:
        until = time.monotonic() + limit_s
        while self._running and time.monotonic() < until:
            self._read(_POLL_S)
            self._collect()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


# ---- the result ----


def result_text(report: BatchReport) -> str:
    """The result of the whole run as one JSON document (docs/image-files.md)."""
    document = {
        "version": VERSION,
        "exit_status": report.exit_status,
        "interrupted": report.interrupted,
        "started": report.started.isoformat(),
        "ended": report.ended.isoformat(),
        "seconds": round(report.seconds, 3),
        "images": [_plain(outcome) for outcome in report.outcomes],
    }
    return json.dumps(document, indent=2) + "\n"


def _plain(outcome: Outcome) -> Mapping[str, object]:
    request = outcome.request
    return {
        # Names of files need not be Unicode.
        "name": _unicode(request.name),
        "ramdisk": request.ramdisk,
        "status": outcome.status.value,
        "exit_status": outcome.exit_status,
        "reason": outcome.reason,
        "started": outcome.started.isoformat() if outcome.started else None,
        "ended": outcome.ended.isoformat() if outcome.ended else None,
        "seconds": round(outcome.seconds, 3),
        "log_file": _unicode(os.path.abspath(request.logfile)) if request.logfile else None,
        "origin": _unicode(request.origin),
    }


def _unicode(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def write_result(path: Path, report: BatchReport) -> None:
    """Write the result to *path*, which has it whole or, when this fails, what it had before.

    Raises:
        ToolError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        try:
            with partial.open("x", encoding="ascii") as stream:
                stream.write(result_text(report))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ToolError(
            f"writing the result to '{path}': {error.strerror}",
            hint="make room there, or name another file with --result",
        ) from error
