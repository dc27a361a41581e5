# SPDX-License-Identifier: Apache-2.0
"""The sandbox: the tree stage at native speed, without root, in namespaces of the host's kernel.

It offers what the appliance offers. Its root is the id 0 of a user namespace over 65536 ids: the user's
subordinate ones or, when root runs virt-dib, a range that nobody has. The user's own id is not among them, so
that even what leaves the file system of the sandbox has no right to anything of the user's. What a build writes
belongs to those ids too; only in such a namespace can it be read, or removed.

``guest/sandbox-init.py`` is the first process inside; docs/isolation.md says what the boundary is.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import pwd
import secrets
import select
import socket
import stat
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from virt_dib import environment as contract
from virt_dib import layout, staging, tools
from virt_dib.errors import ApplianceError, PrerequisiteError, Problem, ToolError
from virt_dib.interrupts import shielded
from virt_dib.jobs import STATUS, Event, JobResult, Splitter, Tail, job_text

IDS = 1 << 16
"""How many user ids, and group ids, a sandbox has."""

_MESSAGE_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 20
_END_TIMEOUT_S = 10.0
_NETWORK_TIMEOUT_S = 20.0
_NETWORK_POLL_S = 0.01
_PRIVATE_FIRST, _PRIVATE_LAST = 0x80000, 0x6FFF0000
"""Where root's private ranges are: those that systemd has set aside for containers."""
_NAMESERVER = "10.0.2.3"
"""slirp4netns's own, which asks those of the host; pasta is told to have one there too."""
_RUNNER = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_PYTHON = Path("/usr/bin/python3")
_USUAL_TREE_BYTES = 4 << 30
_LOCK = "lock"
_WORKSPACES = "virt-dib-*"
_NO_NEW_PRIVILEGES = 39
"""prctl's PR_GET_NO_NEW_PRIVS."""

_Range = tuple[int, int]
"""First id on the host, and how many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What to put into a sandbox."""

    directory: Path
    """The staged content, seen inside as ``/dib``. It is taken over, and gone when the sandbox is."""
    network: bool
    memory_bytes: int | None = None
    """Work on a copy of the directory in so much memory, instead of on the directory (:func:`spare_memory_bytes`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ids:
    """The host's ids that are those from 0 on in the sandbox."""

    uids: tuple[_Range, ...]
    gids: tuple[_Range, ...]

    def map(self, process: int, *, with_own: bool) -> None:
        """Write the maps of a process that has made a user namespace.

        *with_own*: the ids of the user follow, so that files can change hands.

        Raises:
            ToolError: newuidmap refuses it.
        """
        for program, ranges, own in (("newuidmap", self.uids, os.geteuid()), ("newgidmap", self.gids, os.getegid())):
            lines, inside = [], 0
            for first, count in ranges:
                lines.append((inside, first, count))
                inside += count
            if with_own and not any(first <= own < first + count for first, count in ranges):
                lines.append((inside, own, 1))
            if os.geteuid() == 0:
                text = "".join(f"{' '.join(map(str, line))}\n" for line in lines)
                Path(f"/proc/{process}/{program[3:6]}_map").write_text(text)
            else:
                words = [str(number) for line in lines for number in line]
                path = tools.require(program, purpose="use subordinate ids", package="uidmap")
                tools.run([path, str(process), *words], doing="mapping the user's subordinate ids")


# ---- what a host must have ----


def problems(*, network: bool = True) -> list[Problem]:
    """What keeps this user from sandboxes on this host, all of it."""
    found = [*_id_problems(), *_library_problems()]
    if network and _network_tool() is None:
        found.append(
            Problem(
                "neither 'slirp4netns' nor 'pasta' found, one of which the network of a sandbox needs",
                "install one: apt-get install slirp4netns (or passt), or build with --no-network",
            )
        )
    problem = _kernel_problem()
    return [*found, *([problem] if problem else [])]


def _id_problems() -> Iterator[Problem]:
    try:
        _find_ids()
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


def _library_problems() -> Iterator[Problem]:
    if not os.access(_PYTHON, os.X_OK):
        yield Problem(
            f"'{_PYTHON}' not found, which scripts of elements are run by",
            "install it: apt-get install python3",
        )
    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        yield Problem(
            "the library libseccomp.so.2 cannot be loaded, needed to filter system calls in a sandbox",
            "install it: apt-get install libseccomp2 (libseccomp on Fedora)",
        )


def _kernel_problem() -> Problem | None:
    """Try the steps that kernels and containers are known to forbid."""
    result = tools.run([*_init(), "probe"], doing="trying namespaces", environment=_RUNNER, cwd=Path("/"), check=False)
    if result.exit_status == 0:
        return None
    last = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
    step, _, reason = last.rpartition(": ")
    return Problem(f"the kernel refuses what a sandbox needs: {step or 'trying it'}: {reason}", _hint(step, reason))


def _hint(step: str, reason: str) -> str:
    """What to do when the *step* of sandbox-init.py fails with the errno *reason*."""
    proc = Path("/proc/sys")
    no_more = _setting(proc / "user/max_user_namespaces") == "0" or reason == "ENOSPC"
    app_armor = _setting(proc / "kernel/apparmor_restrict_unprivileged_userns") == "1"
    causes = (
        (
            _setting(proc / "kernel/unprivileged_userns_clone") == "0",
            "as root: sysctl kernel.unprivileged_userns_clone=1",
        ),
        (no_more, "as root: sysctl user.max_user_namespaces=10000"),
        (
            app_armor and step != "making a user namespace",
            "AppArmor forbids it; as root: sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        (reason == "ENOSYS", "use a kernel of version 5.12 or newer"),
        (
            step in {"mounting '/proc'", "mounting '/sys'"},
            "start the container with --security-opt unmask=ALL (podman) or systempaths=unconfined (docker)",
        ),
        (
            _process_status("Seccomp") == "2",
            "a filter of system calls forbids it; start the container with --security-opt seccomp=unconfined",
        ),
    )
    return next((hint for applies, hint in causes if applies), "use --isolation vm")


def _setting(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _process_status(name: str) -> str | None:
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key == name), None)


# ---- ids ----


def _find_ids() -> _Ids:
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
    return _Ids(uids=found[0], gids=found[1])


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


class _Process(Protocol):
    """As much of a process as is used here."""

    pid: int

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, when it has ended."""


@dataclass(frozen=True, slots=True)
class _Inside:
    """A process of ``sandbox-init.py`` and the socket to it."""

    process: _Process
    socket: socket.socket
    output: IO[bytes]

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
            hint=None if message else "perhaps this host ran out of memory",
        )

    def said(self) -> str:
        """What it has printed."""
        self.output.seek(0)
        return self.output.read().decode(errors="replace")

    def expect(self, wanted: str) -> None:
        """Wait for the message *wanted*."""
        message, _ = self.receive()
        if message != wanted:
            raise ApplianceError(f"running the sandbox: it says '{message[:80]}' instead of '{wanted}'")

    def send(self, message: bytes, *descriptors: int) -> None:
        """Tell it something."""
        try:
            socket.send_fds(self.socket, [message], descriptors)
        except OSError:
            self.receive()
            raise


@contextlib.contextmanager
def _inside(arguments: Sequence[str], directory: Path) -> Iterator[_Inside]:
    """Start ``sandbox-init.py`` in *directory*; when the block ends it is gone, and with it all it has started."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with (
        ours,
        theirs,
        tempfile.TemporaryFile() as output,
        tools.started(
            [*_init(), *arguments],
            environment=_RUNNER,
            stdin=theirs.fileno(),
            stdout=output.fileno(),
            stderr=output.fileno(),
            cwd=directory,
        ) as process,
    ):
        theirs.close()
        try:
            inside = _Inside(process, ours, output)
            inside.expect("unshared")
            yield inside
        finally:
            with shielded():
                # It ends by itself, and only when everything in its namespaces has ended.
                ours.close()
                with contextlib.suppress(Exception):
                    process.wait(_END_TIMEOUT_S)


def _init() -> list[str]:
    """The command that starts sandbox-init.py."""
    return [sys.executable, "-I", "-S", str(layout.guest_script("sandbox-init.py"))]


@contextlib.contextmanager
def _owner(ids: _Ids, command: Sequence[str], directory: Path) -> Iterator[_Inside]:
    """Start *command* in *directory* with all rights over the user's own files and those of the sandbox."""
    with _inside(["own", *command], directory) as inside:
        ids.map(inside.process.pid, with_own=True)
        inside.send(b"go")
        yield inside


def _finish(inside: _Inside, doing: str) -> None:
    """Wait for a command that :func:`_owner` has started.

    Raises:
        ApplianceError: it has failed.
    """
    # The socket closes with the command.
    failure = inside.socket.recv(_MESSAGE_BYTES).decode(errors="replace").removeprefix("failed ")
    if inside.process.wait() != 0 or failure:
        said = [line for line in [failure, *inside.said().splitlines()] if line.strip()]
        raise ApplianceError(f"{doing}: {said[-1] if said else 'it failed'}")


# ---- the network ----


def _network_tool() -> Path | None:
    return tools.find("slirp4netns") or tools.find("pasta")


@contextlib.contextmanager
def _network(process: int) -> Iterator[None]:
    """Connect the network namespace of *process* to the world, but not to services on the host's loopback.

    Raises:
        ApplianceError: the program that does it fails.
    """
    program = _network_tool()
    if program is None:
        raise PrerequisiteError.of(problems())
    if program.name == "pasta":
        none = [word for option in ("-t", "-u", "-T", "-U") for word in (option, "none")]
        command = [
            *_init(),
            "guard",
            str(program),
            "--runas",
            str(os.geteuid()),
            "--foreground",
            "--config-net",
            "--no-map-gw",
            *none,
        ]
        command += ["--dns-forward", _NAMESERVER, str(process)]
    else:
        command = [str(program), "--configure", "--mtu=65520", "--disable-host-loopback", "--enable-sandbox"]
        command += ["--enable-seccomp", "--exit-fd=0", str(process), "tap0"]
    reader, writer = os.pipe()
    with contextlib.ExitStack() as stack, tempfile.TemporaryFile() as output:
        # Its other end closes with this process, however that ends, and ends the program.
        stack.callback(os.close, writer)
        try:
            running = stack.enter_context(
                tools.started(
                    command, environment=_RUNNER, stdin=reader, stdout=output.fileno(), stderr=output.fileno()
                )
            )
        finally:
            os.close(reader)
        deadline = time.monotonic() + _NETWORK_TIMEOUT_S
        while not _has_route(process):
            if running.poll() is not None or time.monotonic() > deadline:
                output.seek(0)
                said = output.read().decode(errors="replace").strip().splitlines() or ["it does not say why"]
                raise ApplianceError(
                    f"making the sandbox's network with '{program}': {said[-1]}", hint="or build with --no-network"
                )
            time.sleep(_NETWORK_POLL_S)
        yield


def _has_route(process: int) -> bool:
    """Whether the network namespace of *process* has a default route (proc(5), net/route)."""
    try:
        routes = Path(f"/proc/{process}/net/route").read_text().splitlines()[1:]
    except OSError:
        return False
    return any(fields[1] == "00000000" for fields in (line.split() for line in routes))


# ---- the sandbox ----


class Sandbox:
    """A running sandbox. Made by :func:`open_sandbox`."""

    def __init__(self, settings: Settings, ids: _Ids) -> None:
        self._settings = settings
        self._ids = ids
        self._running = contextlib.ExitStack()
        self._removing: contextlib.ExitStack | None = None

    # ---- life ----

    def start(self) -> None:
        """Hand the files over, make the namespaces, and prepare what is in them.

        Raises:
            ApplianceError: it does not start.
        """
        directory, network = self._settings.directory, self._settings.network
        with _owner(self._ids, ["sh", "-c", "chmod 755 . && chown -R -h 0:0 ."], directory) as command:
            _finish(command, "handing the build's files to the sandbox")
        memory = self._settings.memory_bytes
        arguments = ["serve", _NAMESERVER if network else "", str(memory) if memory is not None else ""]
        inside = self._running.enter_context(_inside(arguments, directory))
        self._ids.map(inside.process.pid, with_own=False)
        if network:
            self._running.enter_context(_network(inside.process.pid))
        inside.send(b"go")
        inside.expect("ready")
        self._inside = inside

    def discard(self) -> None:
        """End everything inside and begin to remove its files, for which :meth:`close` waits.

        Removing a tree of a gigabyte takes the disk some seconds, in which the disk stage may go on.
        """
        directory = self._settings.directory
        with shielded(), contextlib.ExitStack() as stack:
            self._running.close()
            command = ["rm", "-rf", "--one-file-system", "--", directory.name]
            inside = stack.enter_context(_owner(self._ids, command, directory.parent))
            stack.callback(_finish, inside, f"removing '{directory}'")
            self._removing = stack.pop_all()

    def close(self) -> None:
        """End everything inside and remove its files; a failure of that must not hide what went before."""
        with shielded(), contextlib.suppress(ApplianceError, ToolError):
            if self._removing is None:
                self.discard()
            if self._removing is not None:
                self._removing.close()

    # ---- work ----

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
        """Run *command* in the sandbox with exactly *variables*, to its end.

        *functions* is bash text read before it. Output goes to *on_output* as it comes, standard
        output and standard error in one; without *on_output* the last of it is kept in the result.
        With *on_event* the command gets one argument more, the token that makes a record an event.

        Raises:
            ApplianceError: the sandbox died.
        """
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
            status = self._run(text, nothing.fileno(), sort)
        if rest := splitter.end():
            output(rest)
        return JobResult(exit_status=status, tail=tail.text())

    def is_directory(self, path: str) -> bool:
        """Whether *path*, below ``/dib``, is a directory."""
        return self.run(["test", "-d", _in_build(path)], _RUNNER, "/").exit_status == 0

    def read(self, path: str, *, limit_bytes: int = 1 << 20) -> bytes:
        """The beginning of the file *path*, below ``/dib``.

        Raises:
            ApplianceError: it cannot be read.
        """
        data = bytearray()
        command = ["head", f"--bytes={limit_bytes}", "--", _in_build(path)]
        result = self.run(command, _RUNNER, "/", on_output=data.extend)
        if result.exit_status != 0:
            raise ApplianceError(f"reading '{path}' in the sandbox: {bytes(data).decode(errors='replace').strip()}")
        return bytes(data)

    def write(self, path: str, data: bytes) -> None:
        """Write the file *path*, below ``/dib``.

        Raises:
            ApplianceError: it cannot be written.
        """
        text = job_text(["/bin/bash", "-c", 'exec cat >"$1"', "bash", _in_build(path)], _RUNNER, "/")
        with _in_memory(data) as stream:
            self._checked(text, stream.fileno(), f"writing '{path}' in the sandbox")

    def make_build_disk(self, disk: Path, *, size_bytes: int = staging.BUILD_DISK_BYTES) -> None:
        """Make the build disk of all that is in ``/dib`` now; nothing can run in the sandbox after it.

        Raises:
            ApplianceError: mke2fs fails.
        """
        # Scratch, as the one that staging makes: no journal and no checksums to compute in an emulated guest.
        options = ["-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal,^metadata_csum,uninit_bg"]
        options += ["-E", "lazy_itable_init=1,root_owner=0:0,nodiscard"]
        text = job_text(["/bin/bash", f"{contract.GUEST}/guest/sandbox-disk.sh", *options], _RUNNER, "/")
        with disk.open("xb+") as stream:
            stream.truncate(size_bytes)
            # It is opened again by the sandbox's root, who is nobody here. The directory is private.
            os.fchmod(stream.fileno(), 0o666)
            self._checked(text, stream.fileno(), "making the build disk")
            os.fchmod(stream.fileno(), 0o600)

    # ---- inside ----

    def _checked(self, text: bytes, standard_input: int, doing: str) -> None:
        tail = Tail()
        JobResult(exit_status=self._run(text, standard_input, tail.add), tail=tail.text()).check(doing)

    def _run(self, text: bytes, standard_input: int, on_output: Callable[[bytes], None]) -> int:
        # The text itself comes as descriptor 3, which is none of the job's business.
        with _in_memory(b"exec 3<&-\n" + text) as job:
            self._inside.send(b"job", job.fileno(), standard_input)
        message, descriptors = self._inside.receive()
        if message != "output" or len(descriptors) != 1:
            raise ApplianceError("running the sandbox: it does not start the job")
        with open(descriptors[0], "rb", buffering=0) as pipe:
            with contextlib.suppress(OSError):
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _CHUNK_BYTES)
            return self._follow(pipe, on_output)

    def _follow(self, pipe: IO[bytes], on_output: Callable[[bytes], None]) -> int:
        """Pass on what the job prints until it ends; return its status."""
        sources: list[IO[bytes] | socket.socket] = [self._inside.socket, pipe]
        while True:
            ready = select.select(sources, [], [])[0]
            if pipe in ready:
                data = pipe.read(_CHUNK_BYTES)
                if data:
                    on_output(data)
                else:
                    sources.remove(pipe)
            if self._inside.socket in ready:
                word, _, status = self._inside.receive()[0].partition(" ")
                if word != "exit" or not STATUS.fullmatch(status):
                    raise ApplianceError("running the sandbox: it does not say how the job ended")
                # All that the job wrote is in the pipe now. A process it left behind may go on writing there.
                left = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))[0]
                while left:
                    data = pipe.read(left)
                    left -= len(data)
                    on_output(data)
                return int(status)


def _in_build(path: str) -> str:
    if not path.startswith(contract.GUEST + "/"):
        raise ValueError(path)
    return path


@contextlib.contextmanager
def _in_memory(data: bytes) -> Iterator[IO[bytes]]:
    """A file of *data* that has no name."""
    with open(os.memfd_create("virt-dib"), "wb+") as stream:
        stream.write(data)
        stream.flush()
        stream.seek(0)
        yield stream


@contextlib.contextmanager
def open_sandbox(settings: Settings) -> Iterator[Sandbox]:
    """A running sandbox; when the block ends it is gone, and so is its directory.

    Raises:
        PrerequisiteError: this host or this user cannot have one.
        ApplianceError: it does not start.
    """
    found = [*problems(network=settings.network), *_directory_problems(settings.directory)]
    if found:
        raise PrerequisiteError.of(found)
    sandbox = Sandbox(settings, _find_ids())
    try:
        sandbox.start()
        yield sandbox
    finally:
        sandbox.close()


def _directory_problems(directory: Path) -> Iterator[Problem]:
    if os.statvfs(directory).f_flag & os.ST_NOEXEC:
        yield Problem(
            f"no program can be started in '{directory.parent}', which is mounted with noexec",
            "set TMPDIR to a directory on another file system",
        )


def spare_memory_bytes() -> int | None:
    """How much memory a build may take for its files: half of what is available, if that holds a usual tree.

    Nothing there waits for a disk, and nothing has to be removed. None where it would not do: with little memory,
    or on kernels before 6.6, whose tmpfs has no attributes of users.
    """
    try:
        with tempfile.TemporaryFile(dir="/dev/shm") as stream:
            os.setxattr(stream.fileno(), "user.virt-dib", b"")
    except OSError:
        return None
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    available = next((int(fields[1]) * 1024 for fields in lines if fields[0] == "MemAvailable:"), 0)
    limit = _setting(Path("/sys/fs/cgroup/memory.max"))
    if limit is not None and limit.isdigit():
        available = min(available, int(limit))
    return available // 2 if available // 2 >= _USUAL_TREE_BYTES else None


# ---- leftovers ----


@contextlib.contextmanager
def claimed(workspace: Path) -> Iterator[None]:
    """Hold the directory of a build, so that no other virt-dib takes it for the leftover of a killed one."""
    descriptor, name = tempfile.mkstemp(prefix=_LOCK, dir=workspace)
    try:
        # Locked before it has the name that the others look for.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.rename(name, workspace / _LOCK)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(parent: Path) -> list[Path]:
    """Remove what killed builds of this user have left in *parent*; return what is gone."""
    gone = []
    for workspace in sorted(parent.glob(_WORKSPACES)):
        with contextlib.suppress(OSError), _abandoned(workspace) as abandoned:
            if abandoned:
                _remove(workspace)
                gone += [] if workspace.exists() else [workspace]
    return gone


def _remove(directory: Path) -> None:
    """Remove a directory with files of a sandbox in it, quietly."""
    command = ["rm", "-rf", "--one-file-system", "--", directory.name]
    with contextlib.suppress(ApplianceError, PrerequisiteError, ToolError), shielded():
        if os.geteuid() == 0:
            # Whose files they are is not known: each sandbox of root's has ids of its own.
            tools.run(command, doing=f"removing '{directory}'", cwd=directory.parent)
        else:
            with _owner(_find_ids(), command, directory.parent) as inside:
                _finish(inside, f"removing '{directory}'")


@contextlib.contextmanager
def _abandoned(workspace: Path) -> Iterator[bool]:
    """Whether *workspace* is one of this user's that nobody holds; nobody else can take it meanwhile."""
    state = workspace.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid():
        yield False
        return
    descriptor = os.open(workspace / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    finally:
        os.close(descriptor)
