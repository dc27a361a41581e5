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
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from virt_dib import environment as contract
from virt_dib import staging, tools, unpacking
from virt_dib.errors import ApplianceError, PrerequisiteError, Problem, ToolError, no_space_on_host
from virt_dib.files import temp_dir_variable
from virt_dib.interrupts import shielded
from virt_dib.jobs import JobResult, Tail, job_text
from virt_dib.layout import Part
from virt_dib.namespaces import (
    NO_MEMORY,
    PROCESS_ENVIRONMENT,
    Ids,
    disk_full_hint,
    find_ids,
    finish,
    id_problems,
    in_memory,
    init_command,
    inside_namespace,
    owner,
)
from virt_dib.network import NAMESERVER, connected
from virt_dib.network import problem as network_problem
from virt_dib.plain_text import one_line

_PYTHON = Path("/usr/bin/python3")
_USUAL_TREE_BYTES = 4 << 30
_TOO_MANY_STATUS = 4
"""Of guest/sandbox-split.sh."""
_LONG_FILE_STATUS = 5
"""Of guest/sandbox-restore.py."""
_TOO_LONG_STATUS = 128 + signal.SIGXFSZ
"""As bash counts it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What to put into a sandbox."""

    directory: Path
    """The staged content, seen inside as ``/dib``. It is taken over, and gone when the sandbox is."""
    network: bool
    memory_bytes: int | None = None
    """Work on a copy of the directory in so much memory, instead of on the directory (:func:`spare_memory_bytes`)."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a file system lies in a disk image."""

    offset_bytes: int
    size_bytes: int


# ---- what a host must have ----


def problems(*, network: bool = True) -> list[Problem]:
    """What keeps this user from sandboxes on this host, all of it."""
    found = [*id_problems(), *_library_problems()]
    others = (network_problem() if network else None, _kernel_problem())
    return [*found, *(problem for problem in others if problem is not None)]


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
    command = [*init_command(), "probe"]
    result = tools.run(command, doing="trying namespaces", environment=PROCESS_ENVIRONMENT, cwd=Path("/"), check=False)
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


# ---- the sandbox ----


class Sandbox:
    """A running sandbox. Made by :func:`open_sandbox`."""

    def __init__(self, settings: Settings, ids: Ids) -> None:
        self._settings = settings
        self._ids = ids
        self._running = contextlib.ExitStack()
        self._removing: contextlib.ExitStack | None = None

    @property
    def killed_hint(self) -> str:
        """See :class:`virt_dib.jobs.Runner`."""
        return NO_MEMORY

    @property
    def full_hint(self) -> str:
        """See :class:`virt_dib.jobs.Runner`."""
        if self._settings.memory_bytes is None:
            return disk_full_hint()
        return (
            f"the {self._settings.memory_bytes / 1024**3:.1f} GiB of memory that the tree is made in are full: "
            f"with a larger --size it is made on disk, in the directory of {temp_dir_variable()}"
        )

    # ---- life ----

    def start(self) -> None:
        """Hand the files over, make the namespaces, and prepare what is in them.

        Raises:
            ApplianceError: it does not start.
        """
        directory, network = self._settings.directory, self._settings.network
        with owner(self._ids, ["sh", "-c", "chmod 755 . && chown -R -h 0:0 ."], directory) as command:
            finish(command, "handing the build's files to the sandbox")
        memory = self._settings.memory_bytes
        arguments = ["serve", NAMESERVER if network else "", str(memory) if memory is not None else ""]
        inside = self._running.enter_context(inside_namespace(arguments, directory))
        self._ids.map(inside.process.pid, with_own=False)
        if network:
            self._running.enter_context(connected(inside.process.pid))
        inside.send(b"go")
        inside.expect("ready")
        self._inside = inside
        # As jobs.Place has them.
        self.run, self.shell = inside.run, inside.shell

    def discard(self) -> None:
        """End everything inside and begin to remove its files, for which :meth:`close` waits.

        Removing a tree of a gigabyte takes the disk some seconds, in which the disk stage may go on.
        """
        directory = self._settings.directory
        with shielded(), contextlib.ExitStack() as stack:
            self._running.close()
            command = ["rm", "-rf", "--one-file-system", "--", directory.name]
            inside = stack.enter_context(owner(self._ids, command, directory.parent))
            stack.callback(finish, inside, f"removing '{directory}'")
            self._removing = stack.pop_all()

    def close(self) -> None:
        """End everything inside and remove its files; a failure of that must not hide what went before."""
        with shielded(), contextlib.suppress(ApplianceError, ToolError):
            if self._removing is None:
                self.discard()
            if self._removing is not None:
                self._removing.close()

    @property
    def directory(self) -> Path:
        """The content of ``/dib``, unless that is in memory. Only root of the sandbox may look into all of it."""
        return self._settings.directory

    @property
    def ids(self) -> Ids:
        """Whom that belongs to."""
        return self._ids

    # ---- work ----

    def is_directory(self, path: str) -> bool:
        """Whether *path*, below ``/dib``, is a directory."""
        return self._inside.is_directory(_in_build(path))

    def read(self, path: str, *, limit_bytes: int = 1 << 20) -> bytes:
        """The beginning of the file *path*, below ``/dib``.

        Raises:
            ApplianceError: it cannot be read, or more comes than was asked for.
        """
        data = bytearray()

        def take(piece: bytes) -> None:
            # Elements can put another program in the place of this one.
            if len(data) + len(piece) > limit_bytes:
                raise ApplianceError(
                    f"reading '{path}' in the sandbox: more comes than the {limit_bytes} bytes that were asked for",
                    hint="an element has put a program of its own in the place of 'head'",
                )
            data.extend(piece)

        command = ["head", f"--bytes={limit_bytes}", "--", _in_build(path)]
        result = self.run(command, PROCESS_ENVIRONMENT, "/", on_output=take)
        if result.exit_status != 0:
            said = Tail()
            said.add(bytes(data))
            raise ApplianceError(f"reading '{path}' in the sandbox: {said.text().strip()}")
        return bytes(data)

    def write(self, path: str, data: bytes) -> None:
        """Write the file *path*, below ``/dib``.

        Raises:
            ApplianceError: it cannot be written.
        """
        text = job_text(["/bin/bash", "-c", 'exec cat >"$1"', "bash", _in_build(path)], PROCESS_ENVIRONMENT, "/")
        with in_memory(data) as stream:
            self._kept(text, stream.fileno()).check(f"writing '{path}' in the sandbox")

    def archive(self, directory: str, target: Path, *, limit_bytes: int) -> None:
        """Write a tar file of *directory*, below ``/dib``, to *target* on the host.

        Raises:
            ApplianceError: it is longer than *limit_bytes*, or there is no space for it.
        """
        target.touch()
        command = 'ulimit -f "$2"; exec tar -C "$1" -cf - . >/proc/self/fd/0'
        words = ["/bin/bash", "-c", command, "bash", _in_build(directory), str(limit_bytes // 1024)]
        with _for_sandbox(target) as stream:
            result = self._kept(job_text(words, PROCESS_ENVIRONMENT, "/"), stream.fileno())
        doing = f"copying '{directory}' out of the sandbox"
        # bash, which is to keep to the limit, can be another program, too.
        if result.exit_status == _TOO_LONG_STATUS or target.stat().st_size > limit_bytes:
            raise ApplianceError(f"{doing}: it holds more than {limit_bytes} bytes", hint="an element left it there")
        result.check(doing)

    def make_build_disk(self, disk: Path, parts: Sequence[Part] = ()) -> None:
        """Make the build disk, in the file *disk*, of all that is in ``/dib`` now; no job can run after it.

        What the finished tree has for fillable *parts* of the image is left out, and waits for :meth:`fill`. What
        it has for the others is in ``/dib/build/parts``, by their numbers.

        Raises:
            ApplianceError: mke2fs fails, a mount point is behind a link in the tree, or there are too many files in
                what is to be taken over.
        """
        words = [f"{'fill' if part.fillable else 'copy'}:{part.mount_point}" for part in parts]
        arguments = [contract.BUILT, str(unpacking.MOST_MEMBERS), *words]
        result = self._script("sandbox-split.sh", arguments)
        if result.exit_status == _TOO_MANY_STATUS:
            raise ApplianceError(
                f"the guest left more than {unpacking.MOST_MEMBERS} files beside the image",
                hint="an element left it there",
            )
        result.check("making the build disk")
        size_kib = staging.BUILD_DISK_BYTES // 1024
        options = staging.build_disk_options()
        self._on_disk(disk, [contract.GUEST, "0", str(size_kib), *options]).check("making the build disk")

    def fill(self, number: int, disk: Path, extent: Extent, options: Sequence[str]) -> JobResult:
        """Make the file system of part *number* of the tree, at *extent* of the file *disk*, with mke2fs's *options*.

        The result has the last of what mke2fs said.

        Raises:
            ApplianceError: the sandbox died.
        """
        words = [f"/run/parts/{number}", str(extent.offset_bytes), str(extent.size_bytes // 1024)]
        return self._on_disk(disk, [*words, *_with_offset(options, extent.offset_bytes)])

    # ---- inside ----

    def _on_disk(self, disk: Path, arguments: Sequence[str]) -> JobResult:
        """Run sandbox-disk.sh on the file *disk*."""
        with _for_sandbox(disk) as stream:
            result = self._script("sandbox-disk.sh", arguments, stream.fileno())
        if result.exit_status != 0 and staging.NO_SPACE.search(result.tail):
            raise ApplianceError.of([no_space_on_host(disk)])
        if result.exit_status == _LONG_FILE_STATUS:
            said = one_line((result.tail.strip().splitlines() or ["no file"])[-1])
            raise ApplianceError(
                f"the guest left a file that is too long for its file system: {said}",
                hint="find the element that makes it, and have it make a shorter one",
            )
        return result

    def _script(self, name: str, arguments: Sequence[str], standard_input: int | None = None) -> JobResult:
        """Run one of our own scripts that no job of an element may see."""
        text = job_text(["/bin/bash", f"{contract.GUEST}/guest/{name}", *arguments], PROCESS_ENVIRONMENT, "/")
        if standard_input is not None:
            return self._kept(text, standard_input)
        with open("/dev/null", "rb") as nothing:
            return self._kept(text, nothing.fileno())

    def _kept(self, text: bytes, standard_input: int) -> JobResult:
        tail = Tail()
        return JobResult(exit_status=self._inside.run_text(text, standard_input, tail.add), tail=tail.text())


def _with_offset(options: Sequence[str], offset_bytes: int) -> list[str]:
    """*options* of mke2fs with an offset among the extended ones, of which it takes the last alone."""
    kept: list[str] = []
    # As in the appliance, where the kernel finishes the inode tables.
    extended = "lazy_itable_init=1"
    words = iter(options)
    for word in words:
        if word.startswith("-E"):
            extended = f"lazy_itable_init=1,{word[2:] or next(words, '')}"
        else:
            kept.append(word)
    return [*kept, "-E", f"{extended},nodiscard,offset={offset_bytes}"]


def _in_build(path: str) -> str:
    if not path.startswith(contract.GUEST + "/"):
        raise ValueError(path)
    return path


@contextlib.contextmanager
def _for_sandbox(path: Path) -> Iterator[IO[bytes]]:
    """A file that the sandbox's root, who is nobody here, can open again. The directory is private."""
    with path.open("rb+") as stream:
        os.fchmod(stream.fileno(), 0o666)
        try:
            yield stream
        finally:
            os.fchmod(stream.fileno(), 0o600)


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
    sandbox = Sandbox(settings, find_ids())
    try:
        sandbox.start()
        yield sandbox
    finally:
        sandbox.close()


def _directory_problems(directory: Path) -> Iterator[Problem]:
    if os.statvfs(directory).f_flag & os.ST_NOEXEC:
        yield Problem(
            f"no program can be started in '{directory.parent}', which is mounted with noexec",
            f"set {temp_dir_variable()} to a directory on another file system",
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
