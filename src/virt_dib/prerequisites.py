# SPDX-License-Identifier: Apache-2.0
"""What a build needs on this host, and how to get what is missing: for the doctor, and for a build that starts."""

from __future__ import annotations

import glob
import os
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from virt_dib import archives, boot, dib, kvm, machine, sandbox, supermin, tools
from virt_dib.errors import Problem, VirtDibError
from virt_dib.files import temp_dir, temp_dir_variable
from virt_dib.formats import Format, wants_engine
from virt_dib.monitor import size_text
from virt_dib.spec import Kvm

_GUESTFS_DIRS = ("usr/lib/*/guestfs", "usr/lib64/guestfs", "usr/lib/guestfs")
_SYSTEM_PYTHON = Path("/usr/bin/python3")
_GIB = 1 << 30
BUILD_SPACE_BYTES = 8 * _GIB
"""What the disks of a build of some gigabytes take, in the temporary directory."""
CACHE_SPACE_BYTES = 1 * _GIB
"""What the appliance takes in the cache (half of it on Debian 12), with room for its successor."""

# The words for the outcome of a check.
OK = "ok"
LACKING = "missing"
SLOW = "slow"
LOW = "low"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    """Where it is, or as the message of an error what is wrong with it."""
    hint: str | None = None
    """What to do when it is not ok."""
    required: bool = True
    """No build can work without it."""
    failing: str = LACKING
    """The word for it when it is not ok."""

    @property
    def word(self) -> str:
        """``ok``, ``missing``, ``slow`` or ``low``."""
        return OK if self.ok else self.failing


@dataclass(frozen=True, slots=True)
class _Tool:
    """A program, what for, and the packages it is in."""

    program: str
    purpose: str
    debian: str
    fedora: str


_REQUIRED_TOOLS = (
    _Tool("supermin", "make the appliance", "supermin", "supermin"),
    _Tool("qemu-img", "write the image", "qemu-utils", "qemu-img"),
    _Tool("mke2fs", "make the build disk", "e2fsprogs", "e2fsprogs"),
    _Tool("python3", "run diskimage-builder in the appliance", "python3", "python3"),
    _Tool("dmsetup", "lay out the image disk", "dmsetup", "device-mapper"),
    _Tool("gawk", "run the scripts of diskimage-builder", "gawk", "gawk"),
)
"""Besides qemu, whose name depends on the processor. The appliance takes the last three from this host."""

_QEMU_PACKAGES = {
    "x86_64": ("qemu-system-x86", "qemu-system-x86-core"),
    "aarch64": ("qemu-system-arm", "qemu-system-aarch64-core"),
}
"""By ``platform.machine()``: Debian's, Fedora's."""

_ELEMENT_TOOLS = (
    _Tool("debootstrap", "make Debian and Ubuntu trees", "debootstrap", "debootstrap"),
    _Tool("mmdebstrap", "make Debian trees (debian-minimal)", "mmdebstrap", "mmdebstrap"),
    _Tool("gpgv", "verify what is downloaded", "gpgv", "gnupg2"),
    _Tool("perl", "run scripts of elements and bootstrap tools", "perl", "perl-interpreter"),
    _Tool("git", "fetch sources (source-repositories)", "git", "git-core"),
    _Tool("curl", "fetch files and images (cache-url)", "curl", "curl"),
    _Tool("sgdisk", "partition with GPT", "gdisk", "gdisk"),
    _Tool("kpartx", "reach partitions", "kpartx", "kpartx"),
    _Tool("mkfs.vfat", "make EFI system partitions", "dosfstools", "dosfstools"),
    _Tool("mkfs.xfs", "make XFS file systems", "xfsprogs", "xfsprogs"),
    _Tool("lvm", "make logical volumes", "lvm2", "lvm2"),
)
"""The appliance takes them from this host; which of them a build uses is up to its elements."""


_TAR = _Tool("tar", "archive the tree in the appliance", "tar", "tar")
_GZIP = _Tool("gzip", "compress archives", "gzip", "gzip")
_FORMAT_TOOLS = {
    "tar": (_TAR,),
    "tgz": (_TAR, _GZIP),
    "oci": (_TAR, _GZIP),
    "docker": (_TAR,),
    "squashfs": (
        _TAR,
        _Tool("sqfstar", "make a squashfs", "squashfs-tools", "squashfs-tools"),
        _Tool("bwrap", "keep what makes the squashfs from the host", "bubblewrap", "bubblewrap"),
    ),
}
"""What formats need besides, by their names. The appliance takes tar from this host."""


_FILE_SYSTEM_PACKAGES = {
    "ext2": ("e2fsprogs", "e2fsprogs"),
    "ext3": ("e2fsprogs", "e2fsprogs"),
    "ext4": ("e2fsprogs", "e2fsprogs"),
    "xfs": ("xfsprogs", "xfsprogs"),
    "vfat": ("dosfstools", "dosfstools"),
    "fat": ("dosfstools", "dosfstools"),
    "btrfs": ("btrfs-progs", "btrfs-progs"),
}
"""Debian's, Fedora's."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """How packages are installed on a family of distributions."""

    ids: frozenset[str]

    @classmethod
    def of_host(cls, os_release: Path) -> Distribution:
        """By ID and ID_LIKE (os-release(5))."""
        values = {}
        try:
            for line in os_release.read_text(errors="replace").splitlines():
                name, equals, value = line.partition("=")
                if equals and name in ("ID", "ID_LIKE"):
                    values[name] = " ".join(shlex.split(value))
        except (OSError, ValueError):
            return cls(frozenset())
        return cls(frozenset(" ".join(values.values()).split()))

    def install(self, debian: str, fedora: str) -> str:
        """The command that installs a package, or its names where the command is not known."""
        if self.ids & {"debian", "ubuntu"}:
            return f"install it: apt-get install {debian}"
        if self.ids & {"fedora", "rhel", "centos"}:
            return f"install it: dnf install {fedora}"
        if debian == fedora:
            return f"install the package with it ({debian})"
        return f"install the package with it ({debian} on Debian, {fedora} on Fedora)"

    @property
    def kernel_package(self) -> str:
        """The command that installs a kernel made for virtual machines."""
        arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        return self.install(
            "linux-image-virtual" if "ubuntu" in self.ids else f"linux-image-cloud-{arch}", "kernel-core"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """Where to look. Tests look elsewhere than at ``/``."""

    root: Path = Path("/")
    environ: Mapping[str, str]

    @classmethod
    def here(cls) -> Host:
        """This host and the environment of this process."""
        return cls(environ=os.environ)

    @property
    def distribution(self) -> Distribution:
        """The family this host belongs to."""
        return Distribution.of_host(self.root / "etc/os-release")

    @property
    def temp_dir(self) -> Path:
        """Where the disks of a build are."""
        return temp_dir(self.environ, root=self.root)


def check_host(*, kvm: Kvm = Kvm.AUTO, dib_library: Path | None = None, python: Path | None = None) -> list[Check]:
    """All checks, on this host and for this user, for builds with these settings.

    Raises:
        UsageError: *kvm* is something else, such as a text.
        VirtDibError: there is no place for what virt-dib keeps.
    """
    return checks(Host.here(), cache=supermin.cache_dir(), wanted=kvm, dib_library=dib_library, python=python)


def checks(
    host: Host, *, cache: Path, wanted: Kvm, dib_library: Path | None = None, python: Path | None = None
) -> list[Check]:
    """Look at all that builds need or may need, with a new trial of KVM if that is *wanted*, which takes seconds."""
    return [
        *_required(host),
        _dib(dib_library, python),
        _space(
            "temporary space",
            host.temp_dir,
            BUILD_SPACE_BYTES,
            f"set {temp_dir_variable(host.environ)} to a directory",
        ),
        _space("cache space", cache, CACHE_SPACE_BYTES, "set XDG_CACHE_HOME to a directory", is_made=True),
        _kvm(wanted, cache),
        *_sandbox(),
        *(_tool(tool, host.distribution, required=False) for tool in _ELEMENT_TOOLS),
        *(_tool(tool, host.distribution, required=False, user="formats") for tool in _format_tools(_FORMAT_TOOLS)),
        _uefi(host.distribution),
    ]


def require_prerequisites(host: Host | None = None) -> list[Problem]:
    """What is missing on this host for any build at all, in the words of the doctor; takes a moment only."""
    return [Problem(check.detail, check.hint) for check in _required(host or Host.here()) if not check.ok]


def format_problems(outputs: Sequence[Format]) -> list[Problem]:
    """What is missing on this host for *outputs*, besides what any build needs."""
    distribution = Host.here().distribution
    wanted = _format_tools(output.name for output in outputs)
    checks = [_tool(tool, distribution, required=True) for tool in wanted]
    found = [Problem(check.detail, check.hint) for check in checks if not check.ok]
    confinement = archives.confinement_problem() if any(output.name == "squashfs" for output in outputs) else None
    found += [confinement] if confinement is not None else []
    if wants_engine(outputs) and archives.find_engine() is None:
        found.append(
            Problem(
                "no engine for containers answers, neither docker nor podman, needed for the format docker",
                "start docker and allow it to this user, or " + distribution.install("podman", "podman"),
            )
        )
    return found


def file_system_problems(types: Sequence[str]) -> list[Problem]:
    """What is missing on this host, from which the appliance takes it, to make file systems of these *types*."""
    distribution = Host.here().distribution
    found = []
    for name in dict.fromkeys(types):
        program = f"mkfs.{name}"
        # mkswap comes with mount, and the appliance cannot do without that.
        if name == "swap" or tools.find(program) is not None:
            continue
        packages = _FILE_SYSTEM_PACKAGES.get(name)
        hint = distribution.install(*packages) if packages else "is it a file system at all? such as ext4, xfs, vfat"
        found.append(Problem(f"'{program}' not found, needed to make the file system '{name}'", hint))
    return found


_NOT_FOUND = re.compile(
    r"(?:^|: |')(?P<program>[a-zA-Z0-9._-]+)'?: (?:command not found|not found|No such file or directory)$"
)
"""How shells, sudo and env tell that there is no such program."""


def tools_not_found(lines: Sequence[str]) -> list[Problem]:
    """The programs that the output of a script outside the chroot says are missing, in the words of the doctor."""
    found = dict.fromkeys(match["program"] for match in map(_NOT_FOUND.search, lines) if match)
    distribution = Host.here().distribution
    checks = [_tool(tool, distribution, required=False) for tool in _ELEMENT_TOOLS if tool.program in found]
    return [Problem(check.detail, check.hint) for check in checks if not check.ok]


# ---- the checks ----


def _required(host: Host) -> Iterator[Check]:
    distribution = host.distribution
    yield _binding(distribution)
    yield _supermin_dir(host)
    yield _kernel(host)
    processor = platform.machine()
    debian, fedora = _QEMU_PACKAGES.get(processor, ("qemu-system", "qemu-system"))
    qemu = _Tool(f"qemu-system-{processor}", "run the appliance", debian, fedora)
    yield _tool(qemu, distribution, required=True)
    for tool in _REQUIRED_TOOLS:
        yield _tool(tool, distribution, required=True)


def _format_tools(names: Iterable[str]) -> list[_Tool]:
    """Each of them once."""
    return list(dict.fromkeys(tool for name in names for tool in _FORMAT_TOOLS.get(name, ())))


def _tool(tool: _Tool, distribution: Distribution, *, required: bool, user: str = "elements") -> Check:
    found = tools.find(tool.program)
    if found is not None:
        return Check(name=tool.program, ok=True, detail=str(found), required=required)
    detail = f"'{tool.program}' not found, needed to {tool.purpose}"
    if not required:
        detail = f"'{tool.program}' not found, which some {user} use to {tool.purpose}"
    return Check(
        name=tool.program,
        ok=False,
        detail=detail,
        hint=distribution.install(tool.debian, tool.fedora),
        required=required,
    )


def _binding(distribution: Distribution) -> Check:
    name = "libguestfs binding"
    problem = machine.binding_problem()
    if problem is None:
        return Check(name=name, ok=True, detail=f"importable by {sys.executable}")
    hint = distribution.install("python3-guestfs", "python3-libguestfs")
    if _system_python_has_binding():
        hint = f"'{_SYSTEM_PYTHON}' has it"
    if Path(sys.executable).resolve() != _SYSTEM_PYTHON.resolve() or sys.prefix != sys.base_prefix:
        hint = (
            f"{hint}; install virt-dib for that Python: {_SYSTEM_PYTHON} -m venv --system-site-packages DIR, "
            "then DIR/bin/pip install virt-dib"
        )
    return Check(name=name, ok=False, detail=problem.message, hint=hint)


def _system_python_has_binding() -> bool:
    if not _SYSTEM_PYTHON.exists():
        return False
    # Isolated: what this process has in PYTHONPATH says nothing about that Python.
    command = [str(_SYSTEM_PYTHON), "-I", "-c", "__import__('guestfs')"]
    try:
        return tools.run(command, doing="asking the system's Python", timeout_s=30, check=False).exit_status == 0
    except VirtDibError:
        return False


def _supermin_dir(host: Host) -> Check:
    name = "libguestfs appliance"
    path = host.environ.get("LIBGUESTFS_PATH")
    patterns = [str(host.root / place) for place in _GUESTFS_DIRS]
    places = path.split(":") if path else [place for pattern in patterns for place in sorted(glob.glob(pattern))]
    for place in places:
        if Path(place, "supermin.d").is_dir():
            return Check(name=name, ok=True, detail=f"{place}/supermin.d")
    return Check(
        name=name,
        ok=False,
        detail="no supermin.d in LIBGUESTFS_PATH, needed to make the appliance"
        if path
        else "no supermin.d in the directories of libguestfs, needed to make the appliance",
        hint="unset LIBGUESTFS_PATH" if path else host.distribution.install("libguestfs0", "libguestfs-appliance"),
    )


def _kernel(host: Host) -> Check:
    """What supermin will take, which does not look for another one when that cannot be read."""
    name = "kernel"
    kernels = kvm.host_kernels(host.root, host.environ)
    usable = [kernel for kernel in kernels if kernel.has_modules]
    forced = host.environ.get("SUPERMIN_KERNEL")
    if not usable and forced:
        return Check(
            name=name,
            ok=False,
            detail=f"no kernel '{forced}', which SUPERMIN_KERNEL names, needed to start the appliance",
            hint="unset SUPERMIN_KERNEL, or set it to a kernel that is there",
        )
    if not usable:
        detail = "no kernel with its modules in /boot and /lib/modules, needed to start the appliance"
        if kernels:
            found = ", ".join(str(kernel.path) for kernel in kernels)
            detail = (
                f"no kernel with its modules in /boot and /lib/modules, only {found} without modules, "
                "needed to start the appliance"
            )
        return Check(
            name=name,
            ok=False,
            detail=detail,
            hint=host.distribution.kernel_package,
        )
    chosen = usable[0]
    others = ", ".join(str(kernel.path) for kernel in usable[1:])
    if chosen.is_readable:
        return Check(
            name=name, ok=True, detail=f"{chosen.path} (there is also {others})" if others else str(chosen.path)
        )
    detail = f"the kernel '{chosen.path}' cannot be read by this user, needed to start the appliance"
    if others:
        detail = f"{detail}; there is also {others}"
    return Check(
        name=name,
        ok=False,
        detail=detail,
        hint=hint_to_read(chosen, usable, host.distribution),
    )


def hint_to_read(chosen: kvm.Kernel, usable: Sequence[kvm.Kernel], distribution: Distribution) -> str:
    """How to get at the kernel *chosen* by supermin, or past it to another of the *usable* ones."""
    path = shlex.quote(str(chosen.path))
    hint = f"make it readable, as root: chmod 0644 {path}"
    if distribution.ids & {"debian", "ubuntu"}:
        # An update of the package puts the mode back, unless dpkg knows better.
        hint = f"make it readable, as root: dpkg-statoverride --update --add root root 0644 {path} (or chmod 0644)"
    other = next((kernel for kernel in usable if kernel.is_readable), None)
    if other is not None:
        hint = f"{hint}; or use another one: export SUPERMIN_KERNEL={shlex.quote(str(other.path))}"
    return hint


def _dib(library: Path | None, python: Path | None) -> Check:
    name = "diskimage-builder"
    try:
        installation = dib.find_installation(library, python)
        # What is asked for in the guest, no build works without.
        dib.guest_modules(installation)
    except VirtDibError as error:
        (problem, *_) = error.problems
        return Check(name=name, ok=False, detail=problem.message, hint=problem.hint)
    return Check(name=name, ok=True, detail=f"elements in {installation.elements_dir}")


def _space(name: str, directory: Path, needed_bytes: int, advice: str, *, is_made: bool = False) -> Check:
    """*is_made*: the directory need not be there yet."""
    place = directory
    while is_made and not os.path.exists(place) and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            state = os.statvfs(place)
    except OSError as error:
        return Check(
            name=name,
            ok=False,
            detail=f"cannot write in '{directory}': {(error.strerror or str(error)).lower()}",
            hint=f"{advice} that you can write",
        )
    free_bytes = state.f_bavail * state.f_frsize
    free = f"{size_text(free_bytes)} free in '{directory}'"
    if free_bytes >= needed_bytes:
        return Check(name=name, ok=True, detail=free)
    return Check(
        name=name,
        ok=False,
        detail=f"only {free}, {size_text(needed_bytes)} are needed",
        hint=f"free some space there, or {advice} with more",
        failing=LOW,
    )


def _kvm(wanted: Kvm, cache: Path) -> Check:
    verdict = kvm.choose(wanted=wanted, kernel=None, cache_dir=cache, again=True)
    fast = verdict.acceleration is kvm.Acceleration.KVM
    return Check(
        name="KVM",
        ok=fast,
        detail=verdict.reason if fast else f"{verdict.reason}; builds in the appliance take about 15 times as long",
        hint=None if fast else _kvm_hint(wanted),
        required=False,
        failing=SLOW,
    )


def _sandbox() -> Iterator[Check]:
    """What ``--isolation sandbox`` needs; builds in the appliance do not."""
    name = "sandbox"
    problems = sandbox.problems()
    for problem in problems:
        yield Check(name=name, ok=False, detail=problem.message, hint=problem.hint, required=False)
    if not problems:
        yield Check(name=name, ok=True, detail="works: builds with --isolation sandbox", required=False)


def _kvm_hint(wanted: Kvm) -> str:
    if wanted is Kvm.OFF:
        return "unset what forces it off to have it tried"
    if kvm.DEVICE.exists() and not os.access(kvm.DEVICE, os.R_OK | os.W_OK):
        return "let this user open it: add the user to the group 'kvm' and log in again"
    return (
        "build with --isolation sandbox, or use a machine with KVM; "
        "in a virtual machine, allow nested virtualization on the host above"
    )


def _uefi(distribution: Distribution) -> Check:
    name = "UEFI firmware"
    try:
        code, _store = boot.find_uefi()
    except VirtDibError as error:
        hint = distribution.install("ovmf", "edk2-ovmf")
        return Check(name=name, ok=False, detail=str(error), hint=hint, required=False)
    return Check(name=name, ok=True, detail=str(code), required=False)
