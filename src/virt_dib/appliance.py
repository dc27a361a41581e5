# SPDX-License-Identifier: Apache-2.0
"""The appliance: start it, run things in it, take files out, stop it.

All calls of libguestfs are made by one thread of their own, so that a signal reaches the main thread
at once whatever the appliance is doing; ending qemu then makes the pending call fail.

A command runs in the guest as a *job*: a script on the build disk that sets its variables and becomes
the command (``guest/start-job.sh``). The host reads the file of its output as it grows. Records between RS
characters that start with a random token are events: a script has started, the job has ended.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import secrets
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from virt_dib import environment as contract
from virt_dib import supermin
from virt_dib.errors import ApplianceError, PrerequisiteError, no_space_on_host
from virt_dib.files import remove_any
from virt_dib.interrupts import CHECK_INTERVAL_S, check_cancelled, shielded
from virt_dib.jobs import STATUS, Event, JobResult, Splitter, Tail, job_text, shell_ended
from virt_dib.machine import (
    SHELL_PORT,
    Disk,
    Settings,
    binding_problem,
    children,
    new_handle,
    sockets_noted,
)
from virt_dib.terminal_link import LINK, Terminal, relay

_T = TypeVar("_T")

_CHUNK_BYTES = 1 << 20
_POLL_FIRST_S = 0.05
_POLL_LAST_S = 0.5
_ALIVE_CHECK_S = 30.0
_LAST_WORDS_S = 10.0
_START_TIMEOUTS_S = (180.0, 600.0)
"""An emulated machine has been seen to stand still while it starts, once in some hundred times, and a qemu to crash
then, once in some thousand times: it gets two tries."""
_REPLY_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 120.0
_STARTING = "starting the appliance"
BLOCK_DEVICE_DIR = "/run/virt-dib"
"""In the appliance; where DIB's dib-block-device takes commands (``guest/block-device.sh``)."""
_SHELL_CHECK_S = (1.0, 5.0)
"""How often it is looked whether a shell's end of the link lives: at first, and later."""
_DRIVE_SCRIPT = ("/bin/bash", "/sysroot/guest/drive.sh")
_DRIVE_POINT = "/sysroot/drive"
_DRIVE_TIMEOUT_S = 30.0
_NO_FILE_SYSTEM, _DAMAGED, _FULL = 3, 4, 5
_DRIVE_HINTS = {
    _NO_FILE_SYSTEM: "make a file system on it: mkfs.ext4 FILE for a raw image, or see docs/caches.md",
    _DAMAGED: "check it: e2fsck -f FILE or xfs_repair FILE for a raw image without partitions; or make a new drive",
    _FULL: "remove files in it, or make a larger drive; 10G or more are recommended",
}
"""By the statuses of ``guest/drive.sh``."""
_OTHER_DRIVE_HINT = "give another --drive; --verbose -x shows what the appliance says"
_WATCH_HINT = "run it again with --verbose -x to see what it is doing"
_HOST_RESERVE_BYTES = 64 << 20
_KILL_INTERVAL_S = 0.2

_DEAD = (
    "its kernel has crashed, or somebody or a host without memory has killed its qemu; "
    "--verbose shows what it said last"
)


class _NotUpError(ApplianceError):
    """The appliance does not come up; the next one may."""


class _NoAnswerError(_NotUpError):
    """The appliance stands still."""


@dataclass
class _Silence:
    """The time since a job has said something, in which it may have ended without a result."""

    is_alive: Callable[[], bool]
    hint: str
    since_s: float = field(default_factory=time.monotonic)
    pause_s: float = _POLL_FIRST_S
    ended_s: float | None = None

    def check(self) -> None:
        """Look now and then whether the job lives.

        Raises:
            ApplianceError: it does not, and what it has said last must have come by now.
        """
        now_s = time.monotonic()
        if self.ended_s is not None:
            if now_s > self.ended_s + _LAST_WORDS_S:
                raise ApplianceError("running a command in the appliance: it ended without a result", hint=self.hint)
        elif now_s > self.since_s + _ALIVE_CHECK_S:
            self.since_s = now_s
            if not self.is_alive():
                self.ended_s = now_s

    def wait(self) -> None:
        """Wait a little, longer each time."""
        time.sleep(self.pause_s)
        self.pause_s = min(self.pause_s * 1.5, _POLL_LAST_S)


class Appliance:
    """A running appliance. Made by :func:`open_appliance`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._caller = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="libguestfs")
        self._thread = self._caller.submit(threading.get_native_id).result()
        # In the thread that will use it: libguestfs keeps a handler of errors for each thread, the
        # binding silences that of the creating one, and any other would print to standard error.
        self._handle = self._caller.submit(new_handle, settings).result()
        self._starting = self._caller.submit(self._start)
        self._tries = 1
        self._jobs = 0
        self._pid: int | None = None
        self._running = True
        self._ending = False
        self._sockets: set[Path] = set()
        self._drive_is_open = False

    # ---- life ----

    def prepare(self) -> None:
        """Wait until the virtual machine has started, mount the build disk, and prepare what is on it.

        The disk may have been made meanwhile.

        Raises:
            ApplianceError: it does not come up.
        """
        try:
            self._prepare(_START_TIMEOUTS_S[self._tries - 1])
        except _NotUpError as error:
            self._start_again(error)
            self.prepare()

    def _prepare(self, timeout_s: float) -> None:
        self._result(self._starting, _STARTING, timeout_s, None)
        with contextlib.suppress(ApplianceError):  # libvirt's machines are not our processes
            self._pid = self._call("asking for the appliance's process", self._handle.get_pid)
        if self._settings.early_disk is not None:
            self._call("unmounting what was staged", self._leave_early_disk)
            self._call("mounting the build disk in the appliance", self._mount, self._settings.disks[0])
        if self._settings.drive is not None:
            self._open_drive(self._settings.drive, timeout_s)
        command = ["/bin/bash", "/sysroot/guest/setup.sh"]
        self.run(command, {"PATH": contract.SYSTEM_PATH}, "/", limit_s=timeout_s).check("preparing the appliance")

    def _open_drive(self, drive: Disk, timeout_s: float) -> None:
        command = [*_DRIVE_SCRIPT, "open", f"/dev/disk/guestfs/{drive.label}", _DRIVE_POINT]
        self._drive_is_open = True
        result = self.run(command, {"PATH": contract.SYSTEM_PATH, "LC_ALL": "C"}, "/", limit_s=timeout_s)
        if result.exit_status != 0:
            self._drive_is_open = False
            reason = ([line for line in result.tail.splitlines() if line.strip()] or ["no reason given"])[-1]
            raise ApplianceError(
                f"cannot use '{drive.path}' as helper drive: {reason}",
                hint=_DRIVE_HINTS.get(result.exit_status, _OTHER_DRIVE_HINT),
            )

    def _start_again(self, error: _NotUpError) -> None:
        """Have a new virtual machine in place of one that did not come up.

        Raises:
            ApplianceError: *error*, when there have been enough.
        """
        if self._tries == len(_START_TIMEOUTS_S):
            raise error
        self._tries += 1
        if self._settings.on_message is not None:
            self._settings.on_message(f"{error}; starting it once more")
        with shielded():
            self._close_handle()
            self._pid, self._drive_is_open = None, False
            self._handle = self._caller.submit(new_handle, self._settings).result()
            self._starting = self._caller.submit(self._start)

    def _start(self) -> None:
        """In the thread of libguestfs: start the virtual machine, and have it import DIB in the background."""
        settings = self._settings
        directory = Path(self._handle.get_cachedir())
        on_debug = settings.on_debug if settings.verbose else None
        # It is the first to be killed, and what it leaves then goes with the disks.
        self._handle.set_path(str(supermin.build(directory, settings.disks[0].path.parent, on_debug)))
        with sockets_noted(self._handle, settings, self._sockets):
            self._handle.launch()
        self._mount(self._settings.early_disk or self._settings.disks[0])
        serve = f"/sysroot/guest/block-device.py --serve {BLOCK_DEVICE_DIR} /sysroot/site"
        self._handle.debug("sh", [f"cd / && exec /usr/bin/python3 -S {serve} </dev/null"])

    def _leave_early_disk(self) -> None:
        # DIB may still be being imported from there; what it wants later it finds on the build disk.
        self._handle.umount("/", lazyunmount=True)

    def _mount(self, disk: Disk) -> None:
        # It may have been made since the kernel looked for partitions there.
        self._handle.blockdev_flushbufs(disk.device)
        # It is thrown away: the kernel is not to spend time and the host's disk on 2 GiB of empty inodes.
        self._handle.mount_options("noinit_itable", disk.device, "/")

    def check_starting(self) -> None:
        """Look whether the virtual machine still may come up, without waiting.

        Raises:
            ApplianceError: it has failed to start.
        """
        if self._starting.done():
            try:
                self._result(self._starting, _STARTING, 0, None)
            except _NotUpError as error:
                self._start_again(error)

    def stop(self) -> None:
        """Write everything to the disks and end the virtual machine.

        Raises:
            ApplianceError: the disks could not be written.
        """
        try:
            self._call("unmounting the helper drive", self._close_drive)
        except ApplianceError as error:
            # The image is good all the same.
            if self._settings.on_message is not None:
                self._settings.on_message(f"{error}; check it before it is used again")
        doing = "writing the disks"
        # What scripts have left running would keep them busy.
        self._call(doing, self._handle.debug, "sh", ["/bin/bash /sysroot/guest/let-go.sh"])
        self._ending = True
        self._call(doing, self._handle.shutdown, timeout_s=_STOP_TIMEOUT_S)
        self._running = False

    def close(self) -> None:
        """End the virtual machine if it still runs, without a word to it, and free everything."""
        with shielded():
            if self._drive_is_open and self._running:
                concurrent.futures.wait([self._caller.submit(self._close_drive)], _DRIVE_TIMEOUT_S)
            self._drive_is_open = False
            self._close_handle()
            self._running = False
            self._caller.shutdown()

    def _close_drive(self) -> None:
        """In the thread of libguestfs."""
        if self._drive_is_open:
            self._handle.debug("sh", [" ".join([*_DRIVE_SCRIPT, "close", _DRIVE_POINT])])
            self._drive_is_open = False

    def keep_log(self, log: Path) -> None:
        """Copy the log of a build to the helper drive, if there is one (manual, section HELPER DRIVE).

        Raises:
            ApplianceError: there is no space on it, or it is read-only since something is wrong with it.
        """
        if self._drive_is_open:
            doing = "writing the log to the helper drive"
            space = self._call(doing, self._handle.statvfs, "/drive")
            if space["bavail"] * space["frsize"] < log.stat().st_size:
                # What libguestfs says of it when it tries is "write error".
                raise ApplianceError(f"{doing}: no space left on it", hint=_DRIVE_HINTS[_FULL])
            self._call(doing, self._handle.upload, str(log), time.strftime("/drive/virt-dib-%Y%m%d-%H%M%S.log"))

    # ---- work ----

    @property
    def killed_hint(self) -> str:
        """See :class:`virt_dib.jobs.Runner`."""
        return f"perhaps the appliance ran out of its {self._settings.memory_mib} MiB: give it more with --memsize"

    @property
    def full_hint(self) -> str:
        """See :class:`virt_dib.jobs.Runner`. The host's own file system is looked at all the time."""
        return "the build disk has no room for more: have the elements write less"

    def run(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        cwd: str,
        *,
        functions: str = "",
        on_output: Callable[[bytes], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
        limit_s: float | None = None,
    ) -> JobResult:
        """Run *command* as :meth:`virt_dib.jobs.Place.run` has it; the appliance is killed if it takes *limit_s*."""
        token = secrets.token_hex(12)
        text = job_text(command, variables, cwd, functions=functions, token=token if on_event is not None else None)
        job, pid = self._start_job(text, token)
        tail = Tail()
        deadline = None if limit_s is None else time.monotonic() + limit_s
        status = self._follow(job, pid, token, on_output or tail.add, on_event, deadline=deadline)
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
        """Run *command* as :meth:`virt_dib.jobs.Runner.shell` has it; ``Settings.shell_socket`` is where.

        Raises:
            ApplianceError: the appliance cannot open one, or ends.
        """
        token, tail = secrets.token_hex(12), Tail()
        with socket.socket(socket.AF_UNIX) as stream:
            try:
                stream.connect(str(self._settings.shell_socket))
            except OSError as error:
                raise ApplianceError(f"opening a shell in the appliance: {error.strerror}", hint=_WATCH_HINT) from error
            text = job_text([*LINK, SHELL_PORT, *command], variables, cwd, functions=functions)
            job, pid = self._start_job(text, token)
            status = relay(stream, terminal, self._watch(pid))
        ended = self._follow(job, pid, token, tail.add, None, deadline=None)
        return shell_ended(status, JobResult(exit_status=ended, tail=tail.text()))

    def is_directory(self, path: str) -> bool:
        """Whether *path* on the build disk is a directory."""
        return bool(self._call(f"looking at '{path}'", self._handle.is_dir, self._on_build_disk(path)))

    def read(self, path: str, *, limit_bytes: int = 1 << 20) -> bytes:
        """The beginning of the file *path* on the build disk (a path in the guest, below ``/dib``)."""
        inside = self._on_build_disk(path)
        return bytes(self._call(f"reading '{path}' in the appliance", self._handle.pread, inside, limit_bytes, 0))

    def write(self, path: str, data: bytes) -> None:
        """Write the file *path* on the build disk."""
        inside = self._on_build_disk(path)
        self._call(f"writing '{path}' in the appliance", self._handle.write, inside, data)

    def archive(self, directory: str, target: Path, *, limit_bytes: int) -> None:
        """Write a tar file of *directory* of the build disk to *target* on the host.

        Raises:
            ApplianceError: it is longer than *limit_bytes*, or there is no space for it.
        """
        self._copy_out(self._handle.tar_out, directory, target, limit_bytes)

    def download(self, path: str, target: Path, *, limit_bytes: int) -> None:
        """Copy the file *path* of the build disk to the host.

        Raises:
            ApplianceError: it is longer than *limit_bytes*, or there is no space for it.
        """
        self._copy_out(self._handle.download, path, target, limit_bytes)

    def _copy_out(self, function: Callable[[str, str], None], path: str, target: Path, limit_bytes: int) -> None:
        doing = f"copying '{path}' out of the appliance"

        def check() -> None:
            if target.exists() and target.stat().st_size > limit_bytes:
                raise ApplianceError(
                    f"{doing}: it holds more than {limit_bytes} bytes", hint="have the elements leave less there"
                )

        self._call(doing, function, self._on_build_disk(path), str(target), timeout_s=None, meanwhile=check)
        # It may have been quick.
        check()

    def upload(self, source: Path, path: str) -> None:
        """Copy a file of the host to *path* on the build disk.

        Raises:
            ApplianceError: there is no space for it.
        """
        inside = self._on_build_disk(path)
        doing = f"copying '{path}' into the appliance"
        self._call(doing, self._handle.upload, str(source), inside, timeout_s=None)

    # ---- inside ----

    def _start_job(self, text: bytes, token: str) -> tuple[str, str]:
        """Start a job; return its name and its process."""
        job = f"/jobs/{self._jobs}"
        self._jobs += 1
        doing = "starting a command in the appliance"
        self._call(doing, self._handle.write, f"{job}.sh", text)
        pid = self._call(doing, self._handle.debug, "sh", [f"/bin/bash /sysroot/guest/start-job.sh {job} {token}"])
        return job, pid.strip()

    def _watch(self, pid: str) -> Callable[[], bool]:
        """A function that says whether a job still runs, as far as is known, and never waits to find out."""
        first_s, later_s = _SHELL_CHECK_S
        next_s = time.monotonic() + first_s
        asked: concurrent.futures.Future[str] | None = None

        def goes_on() -> bool:
            nonlocal asked, next_s
            self._check_host_space()
            if asked is None and time.monotonic() > next_s:
                asked = self._caller.submit(self._handle.debug, "sh", [_alive_command(pid)])
            elif asked is not None and asked.done():
                next_s = time.monotonic() + later_s
                lives = self._result(asked, "asking the appliance whether it lives", 0, None).strip() == "alive"
                asked = None
                return lives
            return True

        return goes_on

    def _on_build_disk(self, path: str) -> str:
        prefix = contract.GUEST + "/"
        if not path.startswith(prefix):
            raise ValueError(path)
        return path[len(contract.GUEST) :]

    def _follow(
        self,
        job: str,
        pid: str,
        token: str,
        on_output: Callable[[bytes], None],
        on_event: Callable[[Event], None] | None,
        *,
        deadline: float | None,
    ) -> int:
        """Pass on what the job prints until it says that it has ended; return its status."""
        splitter = Splitter(token.encode())
        offset = 0
        silence = _Silence(lambda: self._is_alive(pid), self.killed_hint)
        while True:
            data = self._call(
                "reading the output of a script", self._handle.pread, f"{job}.output", _CHUNK_BYTES, offset
            )
            offset += len(data)
            for piece in splitter.feed(data):
                if isinstance(piece, bytes):
                    on_output(piece)
                elif piece.name == "exit" and len(piece.words) == 1 and STATUS.fullmatch(piece.words[0]):
                    return int(piece.words[0])
                elif on_event is not None:
                    on_event(piece)
            if data:
                silence = _Silence(silence.is_alive, silence.hint)
            else:
                silence.check()
            if deadline is not None and time.monotonic() > deadline:
                self._kill()
                raise _NoAnswerError("preparing the appliance: it stood still", hint=_WATCH_HINT)
            self._check_host_space()
            check_cancelled()
            if len(data) < _CHUNK_BYTES:
                silence.wait()

    def _is_alive(self, pid: str) -> bool:
        doing = "asking the appliance whether it lives"
        return bool(self._call(doing, self._handle.debug, "sh", [_alive_command(pid)]).strip() == "alive")

    def _check_host_space(self) -> None:
        """Stop before qemu does: it waits for space for ever, and the build would just stand still."""
        drive = self._settings.drive
        for disk in self._settings.disks:
            if _little_space(disk.path):
                raise ApplianceError.of([no_space_on_host(disk.path)])
        # What the file system of a device's node has free is no matter of the device.
        if drive is not None and not drive.path.is_block_device() and _little_space(drive.path):
            raise ApplianceError(
                f"writing the helper drive '{drive.path}': no space left on the host",
                hint=f"free some space in '{drive.path.parent}', or give a --drive that is elsewhere",
            )

    def _call(
        self,
        doing: str,
        function: Callable[..., _T],
        *arguments: object,
        timeout_s: float | None = _REPLY_TIMEOUT_S,
        meanwhile: Callable[[], None] | None = None,
    ) -> _T:
        """Call libguestfs; *meanwhile* is called again and again."""
        return self._result(self._caller.submit(function, *arguments), doing, timeout_s, meanwhile)

    def _close_handle(self) -> None:
        closed = self._caller.submit(self._handle.close)
        self._kill()
        while not concurrent.futures.wait([closed], _KILL_INTERVAL_S).done:
            # libguestfs was starting more processes when the first ones were killed.
            self._kill()
        for directory in self._sockets:
            # One of them may have been about to remove it.
            remove_any(directory)
        self._sockets.clear()

    def _result(
        self,
        future: concurrent.futures.Future[_T],
        doing: str,
        timeout_s: float | None,
        meanwhile: Callable[[], None] | None,
    ) -> _T:
        def check() -> None:
            self._check_host_space()
            if meanwhile is not None:
                meanwhile()

        try:
            _wait(future, doing, timeout_s, check)
            return future.result()
        except RuntimeError as error:
            if self._is_dead():
                raise ApplianceError(f"{doing}: the appliance has ended: {_first_line(error)}", hint=_DEAD) from error
            kind = _NotUpError if future is self._starting else ApplianceError
            raise kind(f"{doing}: {_first_line(error)}", hint=supermin.hint_for(str(error))) from error
        except BaseException as error:
            # With a drive close() does it, once nothing is left to be written there; if the machine still answers.
            if isinstance(error, _NoAnswerError) or not self._drive_is_open:
                self._kill()
            raise

    def _is_dead(self) -> bool:
        """Whether the virtual machine has ended on its own, after it had started."""
        expected = not self._running or self._ending
        return not expected and self._pid is not None and not Path(f"/proc/{self._pid}").exists()

    def _kill(self) -> None:
        """End the virtual machine now. Before its id is known, everything libguestfs has started."""
        if not self._running:
            return
        pids = {self._pid} if self._pid is not None else children(self._thread)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _little_space(path: Path) -> bool:
    """Whether qemu may soon find no space for the file *path*."""
    state = os.statvfs(path)
    return state.f_bavail * state.f_frsize < _HOST_RESERVE_BYTES


@contextlib.contextmanager
def open_appliance(settings: Settings) -> Iterator[Appliance]:
    """An appliance that starts; it is gone when the block ends, however that happens.

    :meth:`Appliance.prepare` waits until it has started. Leaving the block normally does not write the disks: call
    :meth:`Appliance.stop` for that.

    Raises:
        PrerequisiteError: libguestfs cannot be used here.
    """
    problem = binding_problem()
    if problem is not None:
        raise PrerequisiteError(problem.message, hint=problem.hint)
    with contextlib.ExitStack() as stack:
        with shielded():
            appliance = Appliance(settings)
            stack.callback(appliance.close)
        yield appliance


def _alive_command(pid: str) -> str:
    return f"if kill -0 {shlex.quote(pid)} 2>/dev/null; then echo alive; fi"


def _wait(
    future: concurrent.futures.Future[_T], doing: str, timeout_s: float | None, meanwhile: Callable[[], None]
) -> None:
    """Wait in slices: a signal that comes just before a thread begins to wait does not wake it."""
    begun_s = time.monotonic()
    while not concurrent.futures.wait([future], CHECK_INTERVAL_S).done:
        check_cancelled()
        meanwhile()
        if timeout_s is not None and time.monotonic() > begun_s + timeout_s:
            raise _NoAnswerError(f"{doing}: no answer in {timeout_s:.0f} s", hint=_WATCH_HINT)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].removesuffix(".") if lines else type(error).__name__
