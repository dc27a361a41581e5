# SPDX-License-Identifier: Apache-2.0
"""Programs on the host: find them, run them, stop them. The only importer of subprocess."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import signal
import socket
import subprocess  # noqa: TID251 - the one importer
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from virt_dib.errors import PrerequisiteError, ToolError, UsageError
from virt_dib.interrupts import CHECK_INTERVAL_S, check_cancelled, ready, shielded

TOGETHER = subprocess.STDOUT
"""For ``started``: standard error goes where standard output goes."""

Process = subprocess.Popen[bytes]

_SYSTEM_DIRS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_PASSED_ON = ("HOME", "LD_LIBRARY_PATH", "TMPDIR")
_GUARD = Path(__file__).with_name("guest") / "host-guard.sh"
_STOP_TIMEOUT_S = 3.0
_ERROR_LINES = 5
_ERROR_CHARACTERS = 2000
_CHUNK_BYTES = 1 << 16
_KEPT_BYTES = 1 << 20
"""Of what a program says: it may be about what comes from the guest, and have no end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a program left behind."""

    exit_status: int
    """As the shell counts it: 128 + N for a program that signal N ended."""
    stdout: str
    stderr: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A program to run, and the files it reads and writes."""

    words: Sequence[str | Path]
    stdin: Path | None = None
    stdout: Path | None = None
    """A file to make; otherwise the output is in the result."""
    called: str = ""
    """What messages call the program; without it, by the name of its file."""


def require_working_directory() -> None:
    """Refuse to work in a directory that was removed: relative paths lead nowhere, and programs complain.

    Raises:
        UsageError: it was.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError(
            f"cannot work in the current directory, which has been removed: {error.strerror}",
            hint="change to a directory that exists, and run it again there",
        ) from error


def find(name: str) -> Path | None:
    """The program *name* on PATH or, for users whose PATH lacks it, in the system's directories."""
    found = shutil.which(name, path=_search_path())
    return Path(found).absolute() if found else None


def _search_path() -> str:
    """Without the relative ones: the working directory may be that of elements, with programs of theirs."""
    own = [directory for directory in os.environ.get("PATH", "").split(os.pathsep) if os.path.isabs(directory)]
    return os.pathsep.join(dict.fromkeys([*own, *_SYSTEM_DIRS]))


def host_environment(more: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """What programs of the host are given: places, English words, and *more*.

    No more than they need: some read what comes out of the guest, and the user's environment may have passwords in it.
    """
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {"PATH": _search_path(), "LC_ALL": "C", **kept, **more}


def require(name: str, *, purpose: str, package: str) -> Path:
    """The program *name*, or an error that says what it is needed for.

    Raises:
        PrerequisiteError: it is not installed.
    """
    found = find(name)
    if found is None:
        raise PrerequisiteError(
            f"'{name}' not found, needed to {purpose}", hint=f"install it: apt-get install {package}"
        )
    return found


@contextlib.contextmanager
def started(
    command: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
    cwd: Path | None = None,
    umask: int = -1,
    tidies_up: bool = False,
) -> Iterator[Process]:
    """Start *command* in a process group of its own; nothing of that group outlives the block, nor virt-dib.

    That is, of what is for this user to end: sudo is not. The group is for Ctrl-C on the terminal to reach virt-dib
    alone, which then stops it.
    A program without a path is found by :func:`find`. *environment* is all that it gets; not given, that is
    :func:`host_environment`. *umask* is the user's unless given. What *tidies_up* gets SIGTERM when virt-dib is killed,
    and what it has started is its own to stop then; others get SIGKILL.

    Raises:
        ToolError: the program cannot be started.
    """
    arguments = [os.fspath(part) for part in command]

    def start(path: str, entrust: Callable[[], None]) -> Process:
        return subprocess.Popen(  # noqa: S603 - without a shell, and by an absolute path
            arguments,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            executable=path,
            env=host_environment() if environment is None else dict(environment),
            cwd=cwd,
            umask=umask,
            start_new_session=True,
            preexec_fn=entrust,  # noqa: PLW1509 - see _guard
        )

    with _running(arguments[0], start, _signal_group, tidies_up=tidies_up) as process:
        yield process


@contextlib.contextmanager
def attended(command: Sequence[str | Path], *, environment: Mapping[str, str]) -> Iterator[Process]:
    """Start *command* with the terminal and the streams of virt-dib, for programs that users may talk to.

    Ctrl-C on the terminal reaches it, too. It does not outlive the block, and when virt-dib is killed it gets SIGTERM;
    what it starts itself is its own to stop.

    Raises:
        ToolError: the program cannot be started.
    """
    arguments = [os.fspath(part) for part in command]

    def start(path: str, entrust: Callable[[], None]) -> Process:
        return subprocess.Popen(  # noqa: S603 - as in started
            arguments,
            executable=path,
            env=dict(environment),
            preexec_fn=entrust,  # noqa: PLW1509 - see _guard
        )

    with _running(arguments[0], start, subprocess.Popen.send_signal, tidies_up=True) as process:
        yield process


@contextlib.contextmanager
def _running(
    program: str,
    start: Callable[[str, Callable[[], None]], Process],
    send: Callable[[Process, int], None],
    *,
    tidies_up: bool,
) -> Iterator[Process]:
    """What *start* makes of the path of *program*; whichever way the block is left, it ends.

    Its second argument is for the new process to call before it becomes the program.
    """
    with contextlib.ExitStack() as stack:
        with shielded():
            try:
                entrust = stack.enter_context(_guard(tidies_up=tidies_up))
                process = start(_executable(program), entrust)
            except OSError as error:
                raise ToolError(f"cannot start '{program}': {error.strerror}") from error
            stack.callback(_stop, process, send)
        yield process


@contextlib.contextmanager
def _guard(*, tidies_up: bool) -> Iterator[Callable[[], None]]:
    """Somebody who ends a process if virt-dib is killed in the block: the one that calls what this yields.

    That is the new process, while it is still a copy of this one. If this one told of it, there would be a moment in
    which the program runs and nobody knows of it. All that it does is to send its number: locks that other threads hold
    stay locked in the copy.

    The kernel would end it too, by a parent-death signal, but when the thread ends that has started the process, not
    for setuid programs, and only if the program asks for it.
    """
    words = ("TERM", "") if tidies_up else ("KILL", "-")
    guard = None
    # A pipe that nobody reads would kill the new process.
    ours, his = socket.socketpair()
    with ours:
        # Where there is no room for one more process, the program itself goes without a guard, or tells of it.
        with his, contextlib.suppress(OSError):
            guard = subprocess.Popen(  # noqa: S603 - as in started
                ["/bin/sh", _GUARD, *words],
                stdin=his.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                start_new_session=True,
            )

        def entrust() -> None:
            with contextlib.suppress(OSError):
                ours.send(b"%d\n" % os.getpid(), socket.MSG_NOSIGNAL)

        try:
            yield entrust
        finally:
            if guard is not None:
                with shielded():
                    _kill(guard)


def run(
    command: Sequence[str | Path],
    *,
    doing: str,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    umask: int = -1,
    stdin: bytes | None = None,
    timeout_s: float | None = None,
    check: bool = True,
) -> Result:
    """Run *command* to its end and return its output, and the last MiB of its errors, decoded with replacement.

    *doing* names the work in errors ("converting the image to qcow2").

    Raises:
        ToolError: it cannot be started, takes longer than *timeout_s*, or (unless *check* is
            False) ends with another status than 0.
    """
    program = Path(os.fspath(command[0])).name
    with (
        _input(stdin) as source,
        started(command, environment=environment, cwd=cwd, umask=umask, stdin=source) as process,
    ):
        try:
            out, err = _communicate(process, timeout_s)
        except subprocess.TimeoutExpired as error:
            raise ToolError(f"{doing}: '{program}' did not finish in {timeout_s:.0f} s") from error
    result = _result(process.returncode, out, err)
    if check:
        _check(result, process.returncode, f"{doing}: '{program}'")
    return result


def run_together(commands: Mapping[str, Command]) -> dict[str, Result]:
    """Run all *commands* at the same time, to their ends. Their keys name the work in errors and results.

    Of output that goes to no file the last MiB is kept.

    Raises:
        ToolError: one cannot be started or fails; the others are stopped.
    """
    results = {}
    with contextlib.ExitStack() as stack:
        running = {doing: stack.enter_context(_with_files(command)) for doing, command in commands.items()}
        for doing, process in running.items():
            out, err = _communicate(process, most_output_bytes=_KEPT_BYTES)
            program = commands[doing].called or Path(commands[doing].words[0]).name
            results[doing] = _result(process.returncode, out, err)
            _check(results[doing], process.returncode, f"{doing}: '{program}'")
    return results


def bare_program(wrapper: Path, program: Path, *before: str | Path) -> None:
    """Make *wrapper*, a program that is *program* with the environment of :func:`host_environment` alone.

    For those who start it without asking how; its temporary files are beside *wrapper*. *before* are words of a command
    that becomes it.
    """
    # What qemu makes there, and does not remove when it is killed, goes with the directory.
    environment = host_environment({"TMPDIR": str(wrapper.parent)})
    variables = [f"{name}={value}" for name, value in environment.items()]
    words = [require("env", purpose="start programs", package="coreutils"), "-i", *variables, *before, program]
    wrapper.write_bytes(os.fsencode(f'#!/bin/sh\nexec {shlex.join(str(word) for word in words)} "$@"\n'))
    wrapper.chmod(0o700)


def _executable(program: str) -> str:
    """The path of *program*.

    Raises:
        FileNotFoundError: there is none.
    """
    found = program if os.path.isabs(program) else find(program)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), program)
    return os.fspath(found)


@contextlib.contextmanager
def _with_files(command: Command) -> Iterator[Process]:
    with contextlib.ExitStack() as stack:
        stdin, stdout = subprocess.DEVNULL, subprocess.PIPE
        if command.stdin is not None:
            stdin = stack.enter_context(command.stdin.open("rb")).fileno()
        if command.stdout is not None:
            stdout = stack.enter_context(command.stdout.open("wb")).fileno()
        yield stack.enter_context(started(command.words, stdin=stdin, stdout=stdout))


@contextlib.contextmanager
def _input(data: bytes | None) -> Iterator[int]:
    """A descriptor to read *data* from. No pipe: Popen forgets about one when it has to wait twice."""
    if data is None:
        yield subprocess.DEVNULL
        return
    with tempfile.TemporaryFile() as stream:
        stream.write(data)
        stream.seek(0)
        yield stream.fileno()


def _communicate(
    process: Process, timeout_s: float | None = None, *, most_output_bytes: int | None = None
) -> tuple[bytes, bytes]:
    """What it prints until its end. As Popen.communicate, but with a look now and then whether the build is cancelled.

    Only the last of its errors is kept and, with *most_output_bytes*, of its output.
    """
    until_s = None if timeout_s is None else time.monotonic() + timeout_s
    streams = [(process.stdout, most_output_bytes), (process.stderr, _KEPT_BYTES)]
    limits = {stream.fileno(): limit for stream, limit in streams if stream is not None}
    kept = {descriptor: bytearray() for descriptor in limits}
    going_on = set(limits)
    while going_on or process.poll() is None:
        left_s = CHECK_INTERVAL_S if until_s is None else until_s - time.monotonic()
        if left_s <= 0:
            raise subprocess.TimeoutExpired(process.args, timeout_s or 0)
        slice_s = min(left_s, CHECK_INTERVAL_S)
        if not going_on:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(slice_s)
        for descriptor in ready(going_on, timeout_s=slice_s)[0] if going_on else ():
            data = os.read(descriptor, _CHUNK_BYTES)
            kept[descriptor] += data
            if (limit := limits[descriptor]) is not None:
                del kept[descriptor][:-limit]
            if not data:
                going_on.remove(descriptor)
        check_cancelled()
    out, err = (b"" if stream is None else bytes(kept[stream.fileno()]) for stream, _ in streams)
    return out, err


def _result(code: int, out: bytes, err: bytes) -> Result:
    return Result(
        exit_status=code if code >= 0 else 128 - code,
        stdout=out.decode(errors="replace"),
        stderr=err.decode(errors="replace"),
    )


def _check(result: Result, code: int, what: str) -> None:
    if result.exit_status != 0:
        raise ToolError(f"{what} failed with {describe_status(code)}{_last_words(result)}")


def describe_status(code: int) -> str:
    """``exit status 3`` or ``signal SIGKILL`` for a return code as subprocess gives it."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _last_words(result: Result) -> str:
    lines = [line.strip() for line in (result.stderr or result.stdout).splitlines() if line.strip()]
    said = " / ".join(lines[-_ERROR_LINES:])[-_ERROR_CHARACTERS:]
    # It may have been reading what comes from the guest.
    return ": " + "".join(c if c.isprintable() else "?" for c in said) if said else ""


def _signal_group(process: Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _stop(process: Process, send: Callable[[Process, int], None]) -> None:
    with shielded():
        if process.poll() is None:
            send(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_TIMEOUT_S)
        _kill(process, send)


def _kill(process: Process, send: Callable[[Process, int], None] = subprocess.Popen.send_signal) -> None:
    send(process, signal.SIGKILL)
    # A program that is root, such as sudo, is not ours to end.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
