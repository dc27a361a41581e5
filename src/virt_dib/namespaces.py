# SPDX-License-Identifier: Apache-2.0
"""A user's subordinate ids, and processes in user namespaces over them.

What a sandbox writes belongs to those ids; only in such a namespace can it be read, or removed. The programs
there are started by ``guest/sandbox-init.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import pwd
import secrets
import socket
import stat
import struct
import sys
import tempfile
import termios
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from virt_dib import layout, tools
from virt_dib.errors import ApplianceError, PrerequisiteError, Problem
from virt_dib.files import temp_dir_variable
from virt_dib.interrupts import check_cancelled, ready, shielded
from virt_dib.jobs import STATUS, Event, JobResult, Splitter, Tail, job_text, shell_ended
from virt_dib.terminal_link import LINK, Terminal, relay

IDS = 1 << 16
"""How many user ids, and group ids, a sandbox has."""
PROCESS_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
"""What sandbox-init.py and our own programs in a sandbox get."""

NO_MEMORY = "perhaps this host ran out of memory"
_MESSAGE_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 20
_END_TIMEOUT_S = 10.0
_PRIVATE_FIRST, _PRIVATE_LAST = 0x80000, 0x6FFF0000
"""Where root's private ranges are: those that systemd has set aside for containers."""
_NO_NEW_PRIVILEGES = 39
"""prctl's PR_GET_NO_NEW_PRIVS."""

OTHER_ROOT = IDS
"""Where the user is 0, the number of what is 0 in the sandbox."""

_Range = tuple[int, int]
"""First id on the host, and how many."""
_MapLine = tuple[int, int, int]
"""First id inside, first id on the host, and how many (user_namespaces(7))."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ids:
    """The host's ids that are those from 0 on in the sandbox."""

    uids: tuple[_Range, ...]
    gids: tuple[_Range, ...]

    def map(self, process: int, *, with_own: bool) -> None:
        """Write the maps of a process that has made a user namespace.

        *with_own*: the ids of the user follow, so that files can change hands.

        Raises:
            ToolError: newuidmap refuses it.
        """
        lines = {}
        for kind, ranges, own in self._kinds():
            lines[kind] = list(_numbered(ranges, 0))
            if with_own and not _holds(ranges, own):
                lines[kind].append((IDS, own, 1))
        _write_maps(process, lines)

    def map_as_user(self, process: int) -> None:
        """As :meth:`map`, but 0 is the user, and OTHER_ROOT what is 0 in the sandbox.

        Raises:
            ToolError: newuidmap refuses it.
        """
        lines = {}
        for kind, ranges, own in self._kinds():
            (first, count), *others = ranges
            lines[kind] = list(_numbered(ranges, 0))
            # Root of a container with no ids to spare is the sandbox's root already.
            if not _holds(ranges, own):
                rest = [(first + 1, count - 1)] if count > 1 else []
                lines[kind] = [(0, own, 1), *_numbered([*rest, *others], 1), (OTHER_ROOT, first, 1)]
        _write_maps(process, lines)

    def _kinds(self) -> Iterator[tuple[str, tuple[_Range, ...], int]]:
        yield "uid", self.uids, os.geteuid()
        yield "gid", self.gids, os.getegid()


def _holds(ranges: Sequence[_Range], number: int) -> bool:
    return any(first <= number < first + count for first, count in ranges)


def _numbered(ranges: Sequence[_Range], inside: int) -> Iterator[_MapLine]:
    """The lines of a map that gives *ranges* the numbers from *inside* on."""
    for first, count in ranges:
        yield inside, first, count
        inside += count


def _write_maps(process: int, lines: Mapping[str, Sequence[_MapLine]]) -> None:
    for kind, kind_lines in lines.items():
        if os.geteuid() == 0:
            text = "".join(f"{' '.join(map(str, line))}\n" for line in kind_lines)
            Path(f"/proc/{process}/{kind}_map").write_text(text)
        else:
            words = [str(number) for line in kind_lines for number in line]
            path = tools.require(f"new{kind}map", purpose="use subordinate ids", package="uidmap")
            tools.run([path, str(process), *words], doing="mapping the user's subordinate ids")


def id_problems() -> Iterator[Problem]:
    """What keeps this user from subordinate ids."""
    try:
        find_ids()
    except PrerequisiteError as error:
        yield from error.problems
    if os.geteuid() == 0:
        return
    for name in ("newuidmap", "newgidmap"):
        path = tools.find(name)
        if path is None:
            yield Problem(f"'{name}' not found, needed to use subordinate ids", "install it: apt-get install uidmap")
        elif not path.stat().st_mode & stat.S_ISUID and not _has_capabilities(path):
            yield Problem(
                f"'{path}' has lost its rights: it is neither setuid root nor has file capabilities",
                "install its package again: apt-get install --reinstall uidmap",
            )
    if ctypes.CDLL(None).prctl(_NO_NEW_PRIVILEGES, 0, 0, 0, 0) == 1:
        yield Problem(
            "this process may not gain rights (no_new_privs), so that newuidmap cannot do its work",
            "start virt-dib without --no-new-privs; in a container, without --security-opt no-new-privileges",
        )


def _has_capabilities(path: Path) -> bool:
    try:
        return "security.capability" in os.listxattr(path)
    except OSError:
        return False


# ---- ids ----


def find_ids() -> Ids:
    """The ids for a sandbox of this user's.

    Raises:
        PrerequisiteError: there are not enough of them; for uids and gids each.
    """
    find = _private_range if os.geteuid() == 0 else _own_ranges
    found: list[tuple[_Range, ...]] = []
    missing: list[Problem] = []
    for kind in ("uid", "gid"):
        answer = find(kind)
        if isinstance(answer, Problem):
            missing.append(answer)
        else:
            found.append(answer)
    if missing:
        raise PrerequisiteError.of(missing)
    return Ids(uids=found[0], gids=found[1])


def _own_ranges(kind: str) -> tuple[_Range, ...] | Problem:
    user = os.geteuid()
    try:
        name = pwd.getpwuid(user).pw_name
    except KeyError:
        name = str(user)
    return subordinate_ranges(kind, Path(f"/etc/sub{kind}"), (name, str(user)))


def subordinate_ranges(kind: str, path: Path, names: Sequence[str]) -> tuple[_Range, ...] | Problem:
    """As much as is needed of a user's entries in the file *path* (subuid(5)); the user has all of *names*."""
    left, ranges = IDS, []
    for owner, first, count in _entries(path):
        if owner in names and left:
            taken = min(count, left)
            ranges.append((first, taken))
            left -= taken
    if left == 0:
        return tuple(ranges)
    return Problem(
        f"user '{names[0]}' has {IDS - left or 'no'} subordinate {kind}s in '{path}', of {IDS} needed",
        f"as root: usermod --add-sub{kind}s FIRST-LAST {names[0]}, with a range of {IDS} that nobody else has there",
    )


def _entries(path: Path) -> Iterator[tuple[str, int, int]]:
    """The lines of a file as subuid(5) describes it: owner, first id, how many."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        owner, *numbers = line.split(":")
        if len(numbers) == 2 and all(number.isdigit() for number in numbers):  # noqa: PLR2004 - subuid(5)
            yield owner, int(numbers[0]), int(numbers[1])


def _private_range(kind: str) -> tuple[_Range, ...] | Problem:
    """For root: a range that no user and no entry of subordinate ids has; or all there is in a container."""
    lines = Path(f"/proc/self/{kind}_map").read_text().splitlines()
    mapped = [(first, count) for first, _outside, count in (map(int, line.split()) for line in lines)]
    taken = [(first, count) for _, first, count in _entries(Path(f"/etc/sub{kind}"))]
    slots = (_PRIVATE_LAST - _PRIVATE_FIRST) // IDS
    begin = secrets.randbelow(slots)
    for number in range(slots):
        first = _PRIVATE_FIRST + (begin + number) % slots * IDS
        if any(start <= first and first + IDS <= start + count for start, count in mapped) and not any(
            start < first + IDS and first < start + count for start, count in taken
        ):
            return ((first, IDS),)
    # Root of a user namespace of the usual size, as containers have it: its ids are already nobody's on the host.
    # The kernel wants each piece of a map within one piece of the map above.
    pieces = tuple((first, min(count, IDS - first)) for first, count in sorted(mapped) if first < IDS)
    available = sum(count for _, count in pieces)
    if available == IDS:
        return pieces
    return Problem(
        f"this user namespace has {available} {kind}s, of {IDS} needed",
        "give the container more subordinate ids, or run virt-dib as an ordinary user outside",
    )


# ---- processes in user namespaces ----


def map_user(process: int) -> None:
    """Give the user namespace of *process* the ids of this one, for root; for others its root alone, who is the user.

    It has to be root: slirp4netns becomes that before it confines itself.
    """
    if os.geteuid() != 0:
        Path(f"/proc/{process}/setgroups").write_text("deny")
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        text = f"0 {own} 1"
        if os.geteuid() == 0:
            ranges = [line.split() for line in Path(f"/proc/self/{kind}_map").read_text().splitlines()]
            text = "\n".join(f"{first} {first} {count}" for first, _, count in ranges)
        Path(f"/proc/{process}/{kind}_map").write_text(text + "\n")


class _Process(Protocol):
    """As much of a process as is used here."""

    pid: int

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, when it has ended."""


def disk_full_hint() -> str:
    """What to do when what is in the directory for temporary files has no room for more of the tree."""
    return f"the disk that the tree is made on is full: set {temp_dir_variable()} to a directory with more room"


@dataclass(frozen=True, slots=True)
class Inside:
    """A process of ``sandbox-init.py`` and the socket to it."""

    process: _Process
    socket: socket.socket
    output: IO[bytes]

    @property
    def killed_hint(self) -> str:
        """See :class:`virt_dib.jobs.Runner`."""
        return NO_MEMORY

    @property
    def full_hint(self) -> str:
        """See :class:`virt_dib.jobs.Runner`."""
        return disk_full_hint()

    def receive(self) -> tuple[str, list[int]]:
        """What it says: a message, and descriptors that came with it.

        Raises:
            ApplianceError: it has failed, or is dead.
        """
        try:
            data, descriptors, _flags, _address = socket.recv_fds(self.socket, _MESSAGE_BYTES, 1)
        except ConnectionError:
            data, descriptors = b"", []
        message = data.decode(errors="replace")
        if message and not message.startswith("failed "):
            return message, descriptors
        reason = message.removeprefix("failed ") or "it died"
        said = [line.strip() for line in self.said().splitlines() if line.strip()]
        raise ApplianceError(
            " / ".join([f"running the sandbox: {reason}", *said[-5:]]),
            hint=None if message else NO_MEMORY,
        )

    def said(self) -> str:
        """What it has printed."""
        self.output.seek(0)
        return self.output.read().decode(errors="replace")

    def expect(self, wanted: str) -> None:
        """Wait for the message *wanted*.

        Raises:
            ApplianceError: another one comes, or none.
        """
        message, _ = self.receive()
        if message != wanted:
            raise ApplianceError(f"running the sandbox: it says '{message[:80]}' instead of '{wanted}'")

    def send(self, message: bytes, *descriptors: int) -> None:
        """Tell it something."""
        try:
            socket.send_fds(self.socket, [message], descriptors)
        except ConnectionError:
            # What it has said before it went ends with why.
            while True:
                self.receive()

    # ---- jobs ----

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
        """Run *command* as :meth:`virt_dib.jobs.Place.run` has it."""
        token = secrets.token_hex(12) if on_event is not None else None
        text = job_text(command, variables, cwd, functions=functions, token=token)
        tail = Tail()
        output = on_output or tail.add
        splitter = Splitter((token or secrets.token_hex(12)).encode())

        def sort(data: bytes) -> None:
            for piece in splitter.feed(data):
                if isinstance(piece, bytes):
                    output(piece)
                elif on_event is not None:
                    on_event(piece)

        with open("/dev/null", "rb") as nothing:
            status = self.run_text(text, nothing.fileno(), sort)
        if rest := splitter.end():
            output(rest)
        return JobResult(exit_status=status, tail=tail.text())

    def shell(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        cwd: str,
        *,
        functions: str = "",
        terminal: Terminal,
    ) -> int:
        """Run *command* as :meth:`virt_dib.jobs.Runner.shell` has it."""
        tail = Tail()
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                pipe = self._start(
                    job_text([*LINK, "-", *command], variables, cwd, functions=functions), theirs.fileno()
                )
            with pipe:
                status = relay(ours, terminal)
                ended = self._follow(pipe, tail.add)
        return shell_ended(status, JobResult(exit_status=ended, tail=tail.text()))

    def is_directory(self, path: str) -> bool:
        """Whether *path* is a directory."""
        return self.run(["test", "-d", path], PROCESS_ENVIRONMENT, "/").exit_status == 0

    def run_text(self, text: bytes, standard_input: int, on_output: Callable[[bytes], None]) -> int:
        """Run the bash *text* of a job; return its exit status.

        Raises:
            ApplianceError: the first process is dead, or does not do it.
        """
        with self._start(text, standard_input) as pipe:
            return self._follow(pipe, on_output)

    def _start(self, text: bytes, standard_input: int) -> IO[bytes]:
        """Start the job; return what to read its output from."""
        # The text itself comes as descriptor 3, which is none of the job's business.
        with in_memory(b"exec 3<&-\n" + text) as job:
            self.send(b"job", job.fileno(), standard_input)
        message, descriptors = self.receive()
        while message.startswith("exit "):
            # Of an earlier job, for which a limit of time has kept us from waiting.
            message, descriptors = self.receive()
        if message != "output" or len(descriptors) != 1:
            raise ApplianceError("running the sandbox: it does not start the job")
        # A process of the job may read from it too, and so take what is there from under our eyes.
        os.set_blocking(descriptors[0], False)
        pipe = open(descriptors[0], "rb", buffering=0)  # noqa: SIM115 - the caller closes it
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _CHUNK_BYTES)
        return pipe

    def _follow(self, pipe: IO[bytes], on_output: Callable[[bytes], None]) -> int:
        """Pass on what the job prints until it ends; return its status."""
        sources = {self.socket.fileno(), pipe.fileno()}
        while True:
            readable, _ = ready(sources)
            check_cancelled()
            if pipe.fileno() in readable:
                data = _read(pipe, _CHUNK_BYTES)
                if data:
                    on_output(data)
                elif data is not None:
                    sources.remove(pipe.fileno())
            if self.socket.fileno() in readable:
                word, _, status = self.receive()[0].partition(" ")
                if word != "exit" or not STATUS.fullmatch(status):
                    raise ApplianceError("running the sandbox: it does not say how the job ended")
                # All that the job wrote is in the pipe now. A process it left behind may go on writing there.
                left = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))[0]
                while left and (data := _read(pipe, left)):
                    left -= len(data)
                    on_output(data)
                return int(status)


def _read(pipe: IO[bytes], most_bytes: int) -> bytes | None:
    """What can be read now; None for nothing."""
    try:
        return os.read(pipe.fileno(), most_bytes)
    except BlockingIOError:
        return None


@contextlib.contextmanager
def in_memory(data: bytes) -> Iterator[IO[bytes]]:
    """A file of *data* that has no name."""
    with open(os.memfd_create("virt-dib"), "wb+") as stream:
        stream.write(data)
        stream.flush()
        stream.seek(0)
        yield stream


@contextlib.contextmanager
def inside_namespace(arguments: Sequence[str], directory: Path, program: str = "sandbox-init.py") -> Iterator[Inside]:
    """Start *program* in *directory*; when the block ends it is gone, and with it all it has started."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with (
        ours,
        theirs,
        tempfile.TemporaryFile() as output,
        tools.started(
            [*init_command(program), *arguments],
            environment=PROCESS_ENVIRONMENT,
            stdin=theirs.fileno(),
            stdout=output.fileno(),
            stderr=output.fileno(),
            cwd=directory,
        ) as process,
    ):
        theirs.close()
        try:
            inside = Inside(process, ours, output)
            inside.expect("unshared")
            yield inside
        finally:
            with shielded():
                # It ends by itself, and only when everything in its namespaces has ended.
                ours.close()
                with contextlib.suppress(Exception):
                    process.wait(_END_TIMEOUT_S)


def init_command(program: str = "sandbox-init.py") -> list[str]:
    """The command that starts a first process."""
    return [sys.executable, "-I", "-S", str(layout.guest_script(program))]


@contextlib.contextmanager
def owner(ids: Ids, command: Sequence[str], directory: Path) -> Iterator[Inside]:
    """Start *command* in *directory* with all rights over the user's own files and those of the sandbox."""
    with inside_namespace(["own", *command], directory) as inside:
        ids.map(inside.process.pid, with_own=True)
        inside.send(b"go")
        yield inside


def finish(inside: Inside, doing: str) -> None:
    """Wait for a command that :func:`owner` has started.

    Raises:
        ApplianceError: it has failed.
    """
    failure = ""
    # The socket closes with the command, which somebody may have killed before it has read what it is to do.
    with contextlib.suppress(ConnectionError):
        failure = inside.socket.recv(_MESSAGE_BYTES).decode(errors="replace").removeprefix("failed ")
    if inside.process.wait() != 0 or failure:
        said = [line for line in [failure, *inside.said().splitlines()] if line.strip()]
        raise ApplianceError(f"{doing}: {said[-1] if said else 'it failed'}")
