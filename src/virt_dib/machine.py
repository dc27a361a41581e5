# SPDX-License-Identifier: Apache-2.0
"""The virtual machine of the appliance: its disks and devices, and libguestfs's handle of it.

The only importer of guestfs.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from virt_dib import supermin
from virt_dib.errors import Problem
from virt_dib.files import sockets

if TYPE_CHECKING:
    import guestfs  # noqa: TID251 - the one importer

LONGEST_SOCKET_PATH_BYTES = 107
"""unix(7)."""
SHELL_PORT = "org.virt-dib.shell"
_SOCKET_DIRECTORIES = Path("/tmp/libguestfs*")  # noqa: S108 - where libguestfs has them for root
_JOB_WRITTEN = re.compile(r"""((?:internal_)?write "/jobs/[0-9]+\.sh") .*""", re.DOTALL)

_KERNEL_OPTIONS = "mitigations=off norandmaps init_on_alloc=0"
"""The appliance runs nothing but one build, so it needs no walls against itself. Emulated, ``norandmaps`` makes
starting a process three to four times cheaper: qemu keeps translated code by address, and with random
addresses it translates the same libraries again for every process."""
_EMULATED_PROCESSOR = "max,la57=off,erms=off"
"""As libguestfs has it, but without the feature that makes kernel and C library copy memory with 'rep movsb',
which is fast in a processor and goes byte by byte in an emulated one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """A disk image on the host and the name the guest finds it by, ``/dev/disk/guestfs/LABEL``."""

    path: Path
    label: str
    format: str = "raw"

    @property
    def device(self) -> str:
        """Its name in the guest."""
        return f"/dev/disk/guestfs/{self.label}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to start the appliance."""

    disks: Sequence[Disk]
    """The first one is the build disk, mounted at ``/sysroot``."""
    program: Path | None = None
    """The qemu to start, instead of the one that libguestfs takes."""
    early_disk: Disk | None = None
    """What is staged for a build, when the build disk is made only while the appliance starts."""
    drive: Disk | None = None
    """The helper drive; what the guest says is written to it is there."""
    cache_dir: Path
    memory_mib: int
    cpus: int
    network: bool
    accelerate: bool
    """Use KVM; otherwise every instruction is emulated."""
    insist: bool = False
    """With ``accelerate``: fail where KVM does not work, instead of emulating."""
    trace: bool = False
    """Have libguestfs tell its calls."""
    verbose: bool = False
    """Have libguestfs tell what it does, and the appliance what it says on its console."""
    shell_socket: Path | None = None
    """Where shells can be opened: the socket to make for them."""
    on_elsewhere: Callable[[Path], None] | None = None
    """Gets what libguestfs has made that is not beside the disks, and that stays if this process is killed."""
    on_coming: Callable[[Path, Iterable[Path]], None] | None = None
    """Gets a pattern, and all that fits it, before libguestfs makes what ``on_elsewhere`` gets when it has a name."""
    on_message: Callable[[str], None] | None = None
    """Gets what there is to tell."""
    on_debug: Callable[[str], None] | None = None
    """Gets what libguestfs says with ``trace`` and ``verbose``; in a thread of its own."""


def binding_problem() -> Problem | None:
    """What keeps this Python from using libguestfs, or None."""
    try:
        import guestfs  # noqa: F401, PLC0415, TID251 - a system package, absent from most virtual environments
    except ImportError as error:
        return Problem(
            f"this Python cannot import the libguestfs binding: {error}",
            "install it (apt-get install python3-guestfs) and run virt-dib with the system's Python "
            "or in a virtual environment made by '/usr/bin/python3 -m venv --system-site-packages'",
        )
    return None


def new_handle(settings: Settings) -> guestfs.GuestFS:
    """Describe the virtual machine to libguestfs; it is not started.

    Errors are silenced in the thread that calls this alone, so the handle is for that thread.
    """
    import guestfs  # noqa: PLC0415, TID251 - see binding_problem

    handle = guestfs.GuestFS(python_return_dict=True, close_on_exit=False)
    handle.set_cachedir(str(supermin.prepare(settings.cache_dir, handle.get_path().split(":"))))
    # What it leaves when this process is killed goes with the disks.
    if has_own_runtime_dir(settings):
        handle.parse_environment_list([f"XDG_RUNTIME_DIR={settings.disks[0].path.parent}"])
    handle.set_tmpdir(str(settings.disks[0].path.parent))
    # A process group of its own: Ctrl-C on the terminal is for virt-dib to deal with.
    handle.set_pgroup(True)
    if "LIBGUESTFS_BACKEND" not in os.environ:
        handle.set_backend("direct")
    if settings.accelerate and settings.insist:
        handle.set_backend_settings([*handle.get_backend_settings(), "force_kvm"])
    if not settings.accelerate:
        # Settings of the user's stay; one that forces KVM has made the caller ask for it.
        own = [setting for setting in handle.get_backend_settings() if not setting.startswith("force_")]
        handle.set_backend_settings([*own, "force_tcg"])
        if handle.get_backend() == "direct" and platform.machine() == "x86_64":
            handle.config("-cpu", _EMULATED_PROCESSOR)
    if settings.program is not None:
        handle.set_hv(str(settings.program))
    handle.set_memsize(settings.memory_mib)
    handle.set_smp(settings.cpus)
    handle.set_network(settings.network)
    handle.set_append(" ".join(filter(None, [_KERNEL_OPTIONS, handle.get_append()])))
    if settings.shell_socket is not None:
        path = str(settings.shell_socket).replace(",", ",,")
        handle.config("-chardev", f"socket,id=shell,path={path},server=on,wait=off")
        handle.config("-device", f"virtserialport,chardev=shell,name={SHELL_PORT}")
    _report(handle, settings)
    for disk in [*settings.disks, *([settings.early_disk] if settings.early_disk else [])]:
        handle.add_drive_opts(str(disk.path), format="raw", label=disk.label, cachemode="unsafe", discard="besteffort")
    if settings.drive is not None:
        drive = settings.drive
        # It outlives the build: what the guest has been told is on the disk must be there.
        handle.add_drive_opts(str(drive.path), format=drive.format, label=drive.label, cachemode="writeback")
    return handle


def _report(handle: guestfs.GuestFS, settings: Settings) -> None:
    """Have libguestfs tell what it does, where somebody wants to know."""
    import guestfs  # noqa: PLC0415, TID251 - see binding_problem

    report = settings.on_debug
    # LIBGUESTFS_TRACE and LIBGUESTFS_DEBUG ask for them, too; what comes then is not to go past those who look at it.
    trace, verbose = settings.trace or handle.get_trace(), settings.verbose or handle.get_verbose()
    if report is None or not (trace or verbose):
        return
    # As libguestfs begins its lines on standard error.
    prefixes = {guestfs.EVENT_TRACE: "libguestfs: trace: ", guestfs.EVENT_LIBRARY: "libguestfs: "}
    handle.set_trace(trace)
    handle.set_verbose(verbose)
    handle.set_event_callback(
        lambda event, _handle, text, _array: report(prefixes.get(event, "") + _without_job(text.rstrip("\n"))),
        (guestfs.EVENT_TRACE if trace else 0) | guestfs.EVENT_LIBRARY | guestfs.EVENT_APPLIANCE | guestfs.EVENT_WARNING,
    )


def has_own_runtime_dir(settings: Settings) -> bool:
    """Whether libguestfs can have its sockets beside the disks: for root they are in ``/tmp``, whatever it is told."""
    longest = settings.disks[0].path.parent / "libguestfsXXXXXX" / "guestfsd.sock"
    return os.geteuid() != 0 and len(os.fsencode(longest)) <= LONGEST_SOCKET_PATH_BYTES


@contextlib.contextmanager
def sockets_noted(handle: guestfs.GuestFS, settings: Settings, noted: set[Path]) -> Iterator[None]:
    """Have ``Settings.on_elsewhere`` told where the sockets are, while the block launches the virtual machine.

    *noted* gets it, too; ``Settings.on_coming`` is told that it comes, for if this process is killed in between.

    libguestfs does not tell. Its calls show when it makes the directory: what is new at the next one is that, unless
    another program has made one in that tenth of a millisecond, too. Then it is found by its sockets, after the launch.
    """
    import guestfs  # noqa: PLC0415, TID251 - see binding_problem

    note = settings.on_elsewhere
    if note is None or has_own_runtime_dir(settings):
        yield
        return
    before: set[Path] | None = None

    def look(text: str) -> None:
        nonlocal before
        if text.startswith("get_sockdir ="):
            before = _possible_socket_directories()
            if settings.on_coming is not None:
                with contextlib.suppress(OSError):  # a full disk will be told by others
                    settings.on_coming(_SOCKET_DIRECTORIES, before)
        elif before is not None:
            new, before = _possible_socket_directories() - before, None
            if len(new) == 1:
                noted.update(new)
                with contextlib.suppress(OSError):  # as above
                    note(*new)

    traced = handle.get_trace()
    handle.set_trace(True)
    callback = handle.set_event_callback(lambda _event, _handle, text, _array: look(text), guestfs.EVENT_TRACE)
    try:
        yield
    finally:
        handle.set_trace(traced)
        handle.delete_event_callback(callback)
    for directory in _socket_directories() - noted:
        noted.add(directory)
        note(directory)


def _possible_socket_directories() -> set[Path]:
    return set(_SOCKET_DIRECTORIES.parent.glob(_SOCKET_DIRECTORIES.name))


def _socket_directories() -> set[Path]:
    """Where libguestfs has the sockets that this process has open."""
    ours = set()
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            ours.add(os.readlink(entry.path).removeprefix("socket:[").removesuffix("]"))
    return {path.parent for number, path in sockets() if number in ours and path.parent.name.startswith("libguestfs")}


def _without_job(text: str) -> str:
    """A call as libguestfs tells it, without what is in the file of a job: all variables of the scripts."""
    return _JOB_WRITTEN.sub(r'\1 "..."', text)


def children(thread: int) -> set[int]:
    """The processes that *thread* of this process has started and not yet waited for."""
    try:
        return {int(word) for word in Path(f"/proc/self/task/{thread}/children").read_text().split()}
    except OSError:
        return set()
