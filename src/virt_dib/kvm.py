# SPDX-License-Identifier: Apache-2.0
"""Does KVM work here? Found out by starting a kernel, and remembered.

``/dev/kvm`` that can be opened is no proof. In nested virtual machines qemu has been seen to abort when it
makes the virtual CPU, and the guest to stand still for ever right after the firmware. So the trial starts
a kernel of this host, without disks, and waits for the kernel's own first line on the serial console.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import json
import os
import platform
import re
import select
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from virt_dib import tools
from virt_dib.errors import ToolError, UsageError
from virt_dib.files import remove_stale
from virt_dib.interrupts import CHECK_INTERVAL_S, check_cancelled
from virt_dib.plain_text import printable
from virt_dib.spec import Kvm, check_member

DEVICE = Path("/dev/kvm")
TRIAL_LIMIT_S = 10.0
LIBGUESTFS_VARIABLE = "LIBGUESTFS_BACKEND_SETTINGS"

_MEMORY_NAME = "kvm.json"
_MEMORY_ENTRIES = 20
_PARTIAL_PREFIX = ".kvm-"
_KERNEL_SPOKE = b"Linux version"
_TRIAL_MEMORY_MIB = 256
_EXIT_WAIT_S = 2.0
_PIPE_BYTES = 1 << 16
_COMPLAINT_CHARACTERS = 200


class Acceleration(enum.Enum):
    """Who executes the instructions of a virtual machine."""

    KVM = "KVM"
    EMULATION = "emulation"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How to start virtual machines on this host, and why so."""

    acceleration: Acceleration
    reason: str
    """One clause, such as ``/dev/kvm is absent``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """A kernel of this host that the appliance could be made of."""

    path: Path
    release: str
    has_modules: bool
    """``modules.dep`` is there; supermin passes over kernels in ``/boot`` without it."""

    @property
    def is_readable(self) -> bool:
        """This user may read it; Ubuntu gives its kernels mode 0600."""
        return os.access(self.path, os.R_OK)


@dataclass(frozen=True, slots=True)
class _Machine:
    """What qemu needs to be told to start the trial kernel."""

    program: str
    options: tuple[str, ...]
    console: str


_MACHINES = {
    # "max" is the processor that libguestfs asks for; another model can fail where this one works.
    "x86_64": _Machine("qemu-system-x86_64", ("-cpu", "max"), "ttyS0"),
    "aarch64": _Machine("qemu-system-aarch64", ("-machine", "virt,gic-version=host", "-cpu", "host"), "ttyAMA0"),
}
"""By ``platform.machine()``."""


def forced_by_libguestfs(environ: Mapping[str, str]) -> str | None:
    """``on`` or ``off`` where libguestfs's own ``LIBGUESTFS_BACKEND_SETTINGS`` says so.

    Raises:
        UsageError: it says both.
    """
    settings = environ.get(LIBGUESTFS_VARIABLE, "").split(":")
    # libguestfs takes "name" and "name=1" for the same thing.
    forced = {word for word in ("force_tcg", "force_kvm") if word in settings or f"{word}=1" in settings}
    if len(forced) > 1:
        raise UsageError(
            "LIBGUESTFS_BACKEND_SETTINGS asks for force_kvm and force_tcg at the same time",
            hint="leave one of them out",
        )
    if not forced:
        return None
    return "on" if "force_kvm" in forced else "off"


def choose(
    *,
    wanted: Kvm = Kvm.AUTO,
    kernel: Path | None,
    cache_dir: Path,
    qemu: Path | None = None,
    device: Path = DEVICE,
    limit_s: float = TRIAL_LIMIT_S,
    again: bool = False,
) -> Verdict:
    """Say whether virtual machines are to use KVM.

    Without *kernel* and *qemu* those of this host are taken. The outcome of a trial is kept in *cache_dir* until this
    machine boots again, runs another kernel or another qemu; *again* makes a new trial whatever is kept.

    Raises:
        UsageError: *wanted* is something else, such as a text.
    """
    check_member(wanted, Kvm)
    if wanted is not Kvm.AUTO:
        using = wanted is Kvm.ON
        return Verdict(
            acceleration=Acceleration.KVM if using else Acceleration.EMULATION,
            reason=f"KVM is forced {wanted.value} by --kvm or a setting ('virt-dib --show-config' tells which)",
        )
    try:
        _open_device(device)
        program, machine = _qemu(qemu)
        memory = _Memory(cache_dir, _key(_version(program)))
        known = None if again else memory.recall()
        if known is None:
            known = _trial(program, machine, kernel or _kernel_for_trial(), limit_s)
            memory.keep(known)
    except _Unusable as error:
        return Verdict(acceleration=Acceleration.EMULATION, reason=str(error))
    return known


def host_kernels(root: Path = Path("/"), environ: Mapping[str, str] | None = None) -> list[Kernel]:
    """The kernels below *root*, the one supermin takes first.

    supermin looks at SUPERMIN_KERNEL, then at ``/lib/modules/*/vmlinuz``, then at ``/boot``, and in each
    place takes the newest, readable or not (supermin, src/format_ext2_kernel.ml).
    """
    forced = (os.environ if environ is None else environ).get("SUPERMIN_KERNEL")
    if forced:
        path = Path(forced)
        return [Kernel(path=path, release=_release(path), has_modules=True)] if os.path.exists(path) else []
    modules_dir = root / "lib/modules"
    with_modules = [(path, path.parent.name) for path in modules_dir.glob("*/vmlinuz")]
    in_boot = [(path, _release(path)) for path in (root / "boot").glob("vmlinu[xz]-*") if "xen" not in path.name]
    return [
        Kernel(path=path, release=release, has_modules=(modules_dir / release / "modules.dep").is_file())
        for place in (with_modules, in_boot)
        for path, release in sorted(place, key=lambda entry: _version_key(entry[1]), reverse=True)
    ]


# ---- qemu and its console ----


class HasStatus(Protocol):
    """The part of a started program that tells how it ended."""

    def poll(self) -> int | None:
        """The return code, or None while it runs."""


def read_console(stream: IO[bytes] | None, *, until_s: float) -> Iterator[bytes]:
    """What comes out of *stream*, in pieces, until its end or until ``time.monotonic()`` is *until_s*."""
    if stream is None:
        return
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    while (left_s := until_s - time.monotonic()) > 0:
        check_cancelled()
        if not poll.poll(min(left_s, CHECK_INTERVAL_S) * 1000):
            continue
        data = os.read(stream.fileno(), _PIPE_BYTES)
        if not data:
            return
        yield data


def complaint(stream: IO[bytes] | None) -> str:
    """What qemu says in *stream* is wrong, in one printable line; empty when it says nothing.

    Nobody need read the stream before: qemu says little there, and a guest that finds a way to make it
    say more than a pipe holds brings only itself to a halt.
    """
    said = b"".join(read_console(stream, until_s=time.monotonic() + 0.2)).decode(errors="replace")
    lines = [
        re.sub(r"^\S*qemu\S*: (-\S+( \S+)?: )?(error: )?", "", line).strip() for line in printable(said).splitlines()
    ]
    telling = [line for line in lines if line and not line.startswith("warning:")] or [line for line in lines if line]
    return telling[0].replace("\t", " ")[:_COMPLAINT_CHARACTERS] if telling else ""


def exit_code(process: HasStatus) -> int | None:
    """The return code of a program whose output has ended, or None if it goes on all the same."""
    until_s = time.monotonic() + _EXIT_WAIT_S
    while (code := process.poll()) is None and time.monotonic() < until_s:
        time.sleep(0.01)
    return code


# ---- the trial ----


class _Unusable(Exception):  # noqa: N818 - a verdict on its way to its only handler, never seen as an error
    """KVM cannot be used, and a later look may find otherwise."""


def _open_device(device: Path) -> None:
    if not device.exists():
        raise _Unusable(f"{device} is absent")
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise _Unusable(f"{device} cannot be opened: {(error.strerror or str(error)).lower()}") from error


def _qemu(given: Path | None) -> tuple[Path, _Machine]:
    processor = platform.machine()
    machine = _MACHINES.get(processor)
    if machine is None:
        raise _Unusable(f"no trial of KVM is known for {processor}")
    program = given or tools.find(machine.program)
    if program is None:
        raise _Unusable(f"'{machine.program}' is not installed")
    return program, machine


def _version(program: Path) -> str:
    try:
        result = tools.run([program, "--version"], doing="asking qemu for its version", timeout_s=TRIAL_LIMIT_S)
    except ToolError as error:
        raise _Unusable(f"qemu does not run: {error}") from error
    return result.stdout.partition("\n")[0]


def _kernel_for_trial() -> Path:
    kernels = host_kernels()
    for kernel in kernels:
        if kernel.is_readable:
            return kernel.path
    if kernels:
        raise _Unusable(f"no trial of KVM is possible, '{kernels[0].path}' cannot be read")
    forced = os.environ.get("SUPERMIN_KERNEL")
    if forced:
        raise _Unusable(f"no trial of KVM is possible, no kernel '{forced}', which SUPERMIN_KERNEL names")
    raise _Unusable("no trial of KVM is possible, no kernel was found in /boot or /lib/modules")


def _trial(program: Path, machine: _Machine, kernel: Path, limit_s: float) -> Verdict:
    if not os.access(kernel, os.R_OK):
        raise _Unusable(f"no trial of KVM is possible, '{kernel}' cannot be read")
    command: list[str | Path] = [
        program, "-accel", "kvm", *machine.options, "-m", str(_TRIAL_MEMORY_MIB), "-smp", "1",
        "-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-no-reboot",
        "-serial", "stdio", "-kernel", kernel, "-append", f"console={machine.console} panic=-1",
    ]  # fmt: skip
    seen = b""
    until_s = time.monotonic() + limit_s
    try:
        with tools.started(command) as process:
            for data in read_console(process.stdout, until_s=until_s):
                seen = seen[-len(_KERNEL_SPOKE) :] + data
                if _KERNEL_SPOKE in seen:
                    return Verdict(acceleration=Acceleration.KVM, reason="KVM works")
            code = exit_code(process) if time.monotonic() < until_s else process.poll()
            reason = _failure(code, complaint(process.stderr), limit_s)
    except ToolError as error:
        raise _Unusable(f"qemu does not run: {error}") from error
    return Verdict(acceleration=Acceleration.EMULATION, reason=reason)


def _failure(code: int | None, said: str, limit_s: float) -> str:
    if code is None:
        return f"a kernel started with KVM did not come up in {limit_s:.0f} s"
    said = said or f"it ended with {tools.describe_status(code)}"
    return f"qemu could not start a virtual machine with KVM: {said}"


def _release(path: Path) -> str:
    return path.name.partition("-")[2]


def _version_key(release: str) -> list[tuple[int, int, str]]:
    """Sorts 6.10 after 6.9, and a release candidate by its number."""
    parts = re.findall(r"[0-9]+|[A-Za-z]+", release)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


# ---- what is remembered ----


class _Memory:
    """The verdict on one machine, in a file that may hold those on others.

    A home directory is often shared by several machines. Whatever is wrong with the file, it is
    no more than a trial that must be made again.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self._path = directory / _MEMORY_NAME
        self._key = key

    def recall(self) -> Verdict | None:
        entry = self._entries().get(self._key)
        try:
            return Verdict(acceleration=Acceleration(entry["acceleration"]), reason=entry["reason"]) if entry else None
        except (KeyError, ValueError):
            return None

    def keep(self, verdict: Verdict) -> None:
        others = [(key, entry) for key, entry in self._entries().items() if key != self._key]
        entries = dict(others[-(_MEMORY_ENTRIES - 1) :])
        entries[self._key] = {"acceleration": verdict.acceleration.value, "reason": verdict.reason}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            remove_stale(self._path.parent, f"{_PARTIAL_PREFIX}*")
            with tempfile.NamedTemporaryFile(
                "w", dir=self._path.parent, prefix=_PARTIAL_PREFIX, delete=False
            ) as stream:
                partial = Path(stream.name)
                with contextlib.ExitStack() as undo:
                    undo.callback(partial.unlink, missing_ok=True)
                    stream.write(json.dumps(entries, indent=1))
                    stream.close()
                    partial.replace(self._path)

    def _entries(self) -> dict[str, dict[str, str]]:
        try:
            stored = json.loads(self._path.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(stored, dict):
            return {}
        return {
            key: entry
            for key, entry in stored.items()
            if isinstance(entry, dict) and all(isinstance(value, str) for value in entry.values())
        }


def _key(qemu_version: str) -> str:
    """Names this machine, since its last boot, with this kernel and qemu.

    The boot is part of it: a machine id is copied with the image of a virtual machine, and what the host
    above allows changes with a restart.
    """
    machine = [_read("/proc/sys/kernel/random/boot_id"), _read("/etc/machine-id"), platform.node()]
    told = json.dumps([*machine, platform.release(), qemu_version])
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, ValueError):
        return ""
