# SPDX-License-Identifier: Apache-2.0
"""What was asked for: the phases of a build, its settings, and the values users write."""

from __future__ import annotations

import enum
import functools
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from virt_dib.errors import Problem, UsageError


class Where(enum.Enum):
    """Where the scripts of a phase run."""

    OUTSIDE = "outside"
    """In the appliance, beside the image's tree, with the tools of the appliance."""
    CHROOT = "chroot"
    """In the appliance, inside the image's tree."""


class Isolation(enum.Enum):
    """What keeps the scripts of the tree stage from the host (docs/isolation.md)."""

    VM = "vm"
    """The appliance."""
    SANDBOX = "sandbox"
    """Namespaces of the host's kernel."""
    AUTO = "auto"
    """The appliance where KVM works, otherwise the sandbox where that works."""


class Kvm(enum.Enum):
    """Whether virtual machines use KVM."""

    AUTO = "auto"
    """Where a trial shows that it works."""
    ON = "on"
    """Without a trial."""
    OFF = "off"
    """They are emulated."""


class ExtraData(enum.Enum):
    """Where the scripts of extra-data.d run (docs/extra-data.md)."""

    GUEST = "guest"
    """Where the others of the tree stage do, with copies of the host's files that variables name."""
    HOST = "host"
    """On the host as the user, who can read more there; they can write to the build and the image cache only."""


class Phase(enum.Enum):
    """The hook directories of elements, in the order they run (contract section 1.4)."""

    ROOT = ("root.d", Where.OUTSIDE)
    EXTRA_DATA = ("extra-data.d", Where.OUTSIDE)
    PRE_INSTALL = ("pre-install.d", Where.CHROOT)
    INSTALL = ("install.d", Where.CHROOT)
    POST_INSTALL = ("post-install.d", Where.CHROOT)
    POST_ROOT = ("post-root.d", Where.OUTSIDE)
    BLOCK_DEVICE = ("block-device.d", Where.OUTSIDE)
    PRE_FINALISE = ("pre-finalise.d", Where.OUTSIDE)
    FINALISE = ("finalise.d", Where.CHROOT)
    CLEANUP = ("cleanup.d", Where.OUTSIDE)

    def __init__(self, directory: str, where: Where) -> None:
        self.directory = directory
        self.where = where


TREE_PHASES = (
    Phase.ROOT,
    Phase.EXTRA_DATA,
    Phase.PRE_INSTALL,
    Phase.INSTALL,
    Phase.POST_INSTALL,
    Phase.POST_ROOT,
)
"""The phases that fill the build disk."""

DISK_PHASES = (Phase.BLOCK_DEVICE, Phase.PRE_FINALISE, Phase.FINALISE, Phase.CLEANUP)
"""The phases that make the image disk from it."""

LABEL_LIMITS = {"ext2": 16, "ext3": 16, "ext4": 16, "xfs": 12, "vfat": 11, "btrfs": 255}
"""Longest label in bytes (diskimage_builder/block_device/level2/mkfs.py; btrfs from its manual)."""

COMPRESSIONS = ("zlib", "zstd")
"""Of qcow2: the first is what every qemu reads, the second is faster, for qemu 5.1 and later."""

CHECKSUMS = ("md5", "sha256")
"""Those that ``--checksum`` makes (manual, option --checksum)."""

DEFAULT_SIZE_BYTES = 5 * 1024**3
"""``--size`` when it is not given (manual, option --size)."""

DEFAULT_MEMORY_MIB = 2048
"""``--memsize`` when it is not given."""
MOST_CPUS = 8
"""What a build takes of the host when ``--smp`` is not given."""
INSTALL_TYPES = ("source", "package", "repo")
NUMBERS = {
    "debug_level": ("debug level", 0, 1000),
    "memory_mib": ("memory size in MB", 256, 1 << 24),
    "cpus": ("number of processors", 1, 255),
}
"""Fields of BuildSpec: what they are called, the least and the most they may be."""


def host_arch() -> str:
    """This host's architecture in Debian's words, as DIB derives ARCH (contract section 1.5)."""
    machine = platform.machine()
    if machine.startswith("armv"):
        return "armhf"
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


@dataclass(frozen=True, kw_only=True, slots=True)
class DropIn:
    """What a build does as disk-image-create does, and not as virt-dib (docs/drop-in.md)."""

    image_name: str
    """IMAGE_NAME as the elements see it: a path, from *working_dir* on."""
    working_dir: Path
    """The caller's. What scripts outside the chroot leave in theirs comes to it; there is no ``NAME.d`` for it."""
    keep_old: bool = True
    """An earlier file of a name gets another name."""

    @property
    def leads_away(self) -> bool:
        """Whether files named after the image do not lie below the working directory of scripts."""
        path = PurePosixPath(self.image_name)
        return path.is_absolute() or ".." in path.parts


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSpec:
    """One image as asked for; the values of a command line have been checked, for others see :func:`check_spec`."""

    name: str
    """The image's name, without directory and suffix."""
    output_dir: Path
    elements: tuple[str, ...]
    """As the user wrote them; ``base`` and defaults are added by ``elements.requested``."""
    element_paths: tuple[Path, ...] = ()
    """``-p`` in the order given; diskimage-builder's own elements come after them."""
    dib_library: Path | None = None
    """``-B``: the directory with ``die`` in it."""
    python: Path | None = None
    """``--python``: the interpreter that has DIB, or runs that of ``-B``, on the host."""
    formats: tuple[str, ...] = ("qcow2",)
    size_bytes: int | None = DEFAULT_SIZE_BYTES
    """Size of the image disk; None is ``--size auto``."""
    arch: str = field(default_factory=host_arch)
    variables: Mapping[str, str] = field(default_factory=dict)
    """``--envvar``, names and values as the elements are to see them."""
    debug_level: int = 0
    memory_mib: int | None = None
    """None: ``DEFAULT_MEMORY_MIB``, enough for package installation."""
    cpus: int | None = None
    """None: the processors of this host, at most ``MOST_CPUS``."""
    network: bool = True
    host_certificates: bool = True
    """Scripts trust the CA certificates of this host, while the build lasts."""
    root_label: str | None = None
    fs_type: str = "ext4"
    mkfs_options: str = ""
    extra_packages: tuple[str, ...] = ()
    skip_base: bool = False
    ramdisk: bool = False
    """Make no image: add ``ramdisk_element``, which builds a kernel and an initramfs (contract section 1.9)."""
    ramdisk_element: str | None = None
    """The element that makes it; None: DIB's default, ``ramdisk``."""
    install_type: str = "source"
    excluded_elements: frozenset[str] = frozenset()
    excluded_scripts: frozenset[str] = frozenset()
    drive: Path | None = None
    """A disk image with the home directory of the elements outside the chroot (manual, section HELPER DRIVE)."""
    drive_format: str | None = None
    """``raw`` or ``qcow2``; None: what it looks like."""
    image_cache: Path | None = None
    """A directory of the host for what the elements cache; None: nothing is kept (docs/caches.md)."""
    extra_data: ExtraData = ExtraData.GUEST
    delete_on_failure: bool = True
    compress: bool = True
    compression: str = COMPRESSIONS[0]
    """How qcow2 images are compressed, if they are."""
    qemu_img_options: str = ""
    docker_target: str | None = None
    """Repository and tag of an image for containers."""
    checksums: tuple[str, ...] = ()
    """Of ``CHECKSUMS``, those wanted for each output file."""
    arguments: tuple[str, ...] = ()
    """The command line as given, for DIB_ARGS."""
    drop_in: DropIn | None = None
    """For callers who think that this is disk-image-create."""

    @property
    def told_name(self) -> str:
        """The name of the image that the elements see, which may be a path."""
        return self.name if self.drop_in is None else self.drop_in.image_name

    @property
    def added_element(self) -> str | None:
        """The element that ramdisk mode adds to those asked for, if this is ramdisk mode."""
        return (self.ramdisk_element or "ramdisk") if self.ramdisk else None


_DOCKER_DOMAIN = r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]+)?"
_DOCKER_COMPONENT = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_DOCKER_TARGET = re.compile(
    rf"(?:{_DOCKER_DOMAIN}/)?{_DOCKER_COMPONENT}(?:/{_DOCKER_COMPONENT})*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?"
)
"""A reference without digest (github.com/distribution/reference)."""
_LONGEST_DOCKER_TARGET = 255
_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>[bkKMGTPE]?)(?:i?B)?")
_DURATION = re.compile(r"(?P<number>[0-9]{1,9}(?:\.[0-9]{1,9})?)(?P<unit>[smhd]?)")
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST_S = 365 * 86400.0
_UNITS = {"b": 1, "k": 1024, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4, "P": 1024**5, "E": 1024**6}
LARGEST_DISK_BYTES = 2**60
_LABEL = re.compile(r"""[!-~]+""")
_NOT_IN_LABELS = frozenset("/'\"`\\,")
"""They would end or change the label in fstab, in bootloaders' files, in device paths."""
_HALF = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""What stands for no byte, so that no program can be given it."""
_NOT_UTF_8 = re.compile("[\ud800-\udfff]")
VARIABLES_OF_BASH = frozenset({"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"})
"""Bash's own, which nobody can set."""


def check_texts(spec: BuildSpec) -> None:
    """Refuse a NUL wherever one may be written, which the system's calls would not take.

    Raises:
        UsageError: there is one.
    """
    for field_name in spec.__slots__:
        value = getattr(spec, field_name)
        texts = value if isinstance(value, (tuple, frozenset)) else (value,)
        if any("\0" in str(text) for text in texts):
            raise UsageError(f"cannot use the value of '{field_name}': there is a NUL in it")


def check_spec(spec: BuildSpec) -> None:
    """Refuse values that no command line lets through, which callers of the library may give.

    Raises:
        UsageError: all that are wrong; none of them has to do with other values or with this host.
    """
    problems = list(_problems(spec))
    if problems:
        raise UsageError.of(problems)


def _problems(spec: BuildSpec) -> Iterator[Problem]:
    checks = [functools.partial(check_name, spec.name), functools.partial(check_arch, spec.arch)]
    checks.append(functools.partial(check_member, spec.extra_data, ExtraData))
    checks += [functools.partial(check_variable, *variable) for variable in spec.variables.items()]
    checks += [functools.partial(check_docker_target, spec.docker_target)] if spec.docker_target is not None else []
    for check in checks:
        try:
            check()
        except UsageError as error:
            yield from error.problems
    for field_name, (what, least, most) in NUMBERS.items():
        number = getattr(spec, field_name)
        if number is not None and not least <= number <= most:
            yield Problem(f"cannot use '{number}' as the {what}", f"give a whole number from {least} to {most}")
    if spec.size_bytes is not None and not 0 < spec.size_bytes <= LARGEST_DISK_BYTES:
        yield Problem(
            f"cannot use {spec.size_bytes} bytes as the size of the image", "give more than 0 and at most 1 EiB"
        )
    for what, value, known in (
        ("file system", spec.fs_type, tuple(LABEL_LIMITS)),
        ("install type", spec.install_type, INSTALL_TYPES),
        ("compression", spec.compression, COMPRESSIONS),
        *(("checksum", checksum, CHECKSUMS) for checksum in spec.checksums),
    ):
        if value not in known:
            yield Problem(f"unknown {what} '{value}'", f"choose from {', '.join(known)}")
    if "" in (*spec.elements, *spec.extra_packages, *spec.excluded_elements, *spec.excluded_scripts):
        yield Problem("cannot use an empty name of an element, package or script")


def check_member(value: object, kind: type[enum.Enum]) -> None:
    """Refuse what type checkers would: a text such as "sandbox", which would mean nothing and do something else.

    Raises:
        UsageError: *value* is no member of *kind*.
    """
    if not isinstance(value, kind):
        known, kind_name = ", ".join(str(member) for member in kind), kind.__name__
        raise UsageError(f"cannot use {value!r} as a value of {kind_name}", hint=f"choose from {known}")


def check_name(name: str, written: str | None = None) -> None:
    """Refuse a name of the image that is no file name, or not a handy one; *written* is what messages show.

    Raises:
        UsageError: it is such a one.
    """
    if _NOT_UTF_8.search(name):
        raise UsageError(
            f"cannot use '{name if written is None else written}' as the name of the image: it is not UTF-8",
            hint="give a name in UTF-8, such as one of ASCII letters and digits",
        )
    if not name.isprintable() or name in ("", ".", "..") or name.startswith("-") or "/" in name:
        raise UsageError(
            f"cannot use '{name if written is None else written}' as the name of the image",
            hint="give a file name that is not empty, '.' or '..', does not begin with '-' "
            "and has no control characters; a directory may stand before it",
        )


def check_arch(arch: str) -> None:
    """Refuse what cannot be an architecture.

    Raises:
        UsageError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", arch):
        raise UsageError(f"cannot use '{arch}' as an architecture", hint="give a name such as amd64 or arm64")


def check_variable(name: str, value: str) -> None:
    """Refuse a variable for elements that bash could not have.

    Raises:
        UsageError: it is such a one.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise UsageError(
            f"cannot use '{name}' as the name of a variable in --envvar",
            hint="give NAME or NAME=VALUE, the name of letters, digits and underscores, no digit first",
        )
    if name in VARIABLES_OF_BASH:
        raise UsageError(
            f"cannot set the variable '{name}' for elements: it is bash's own and read-only",
            hint=f"leave out --envvar {name}",
        )
    if "\0" in value:
        raise UsageError(f"cannot set the variable '{name}' to a value with a NUL in it")
    if _HALF.search(value):
        raise UsageError(f"cannot set the variable '{name}' to a value with half of a surrogate pair in it")


def parse_size(text: str) -> int | None:
    """Bytes for a ``--size``, or None for ``auto``.

    ``5G``, ``512M``, ``1.5T`` are binary units; ``10737418240b`` is bytes (manual, option --size).
    The result is rounded up to whole 64 KiB, as DIB rounds its own (contract section 1.7).

    Raises:
        UsageError: not a size, zero, or larger than 1 EiB.
    """
    if text == "auto":
        return None
    match = _SIZE.fullmatch(text)
    if match is None or not match["unit"]:
        raise UsageError(
            f"cannot use '{text}' as the size of the image",
            hint="give a number and a unit, such as 5G, 512M or 10737418240b, or 'auto'",
        )
    size_bytes = int(min(float(match["number"]), LARGEST_DISK_BYTES + 1) * _UNITS[match["unit"]])
    if not 0 < size_bytes <= LARGEST_DISK_BYTES:
        raise UsageError(
            f"cannot use '{text}' as the size of the image: it must be more than 0 and at most 1024P",
            hint="give a size such as 5G",
        )
    chunk = 64 * 1024
    return -(-size_bytes // chunk) * chunk


def parse_duration(text: str, what: str) -> float:
    """Seconds for a duration: ``90``, ``90s``, ``30m``, ``1.5h``. *what* is called so in the error.

    Raises:
        UsageError: not a duration, zero, or longer than a year.
    """
    match = _DURATION.fullmatch(text)
    seconds = float(match["number"]) * _SECONDS[match["unit"]] if match else 0.0
    if not 0 < seconds <= _LONGEST_S:
        raise UsageError(
            f"cannot use '{text}' as {what}", hint="give a number and a unit, such as 90s, 30m or 2h; at most a year"
        )
    return seconds


def check_label(label: str, fs_type: str) -> None:
    """Refuse a root label that *fs_type* cannot hold, or that fstab and bootloaders would not take as it is.

    Raises:
        UsageError: the label is empty, too long, or has characters that do not belong in one.
    """
    limit = LABEL_LIMITS.get(fs_type)
    if not label:
        raise UsageError("cannot use an empty root label", hint="leave out --root-label for the default one")
    if label.startswith("-") or not _LABEL.fullmatch(label) or not _NOT_IN_LABELS.isdisjoint(label):
        raise UsageError(
            f"cannot use '{label}' as the root label",
            hint="give a --root-label of printable ASCII characters without blanks, quotes, '/', '\\' and ',', "
            "that does not begin with '-'",
        )
    # Only ASCII is left: a character is a byte.
    if limit is not None and len(label) > limit:
        raise UsageError(
            f"root label '{label}' is too long for {fs_type}: {len(label)} characters, {limit} at most",
            hint="give a shorter --root-label",
        )


def check_docker_target(target: str) -> None:
    """Refuse what cannot be the name of an image for containers.

    Raises:
        UsageError: it is not ``[HOST/]NAME[:TAG]``.
    """
    if len(target) > _LONGEST_DOCKER_TARGET or not _DOCKER_TARGET.fullmatch(target):
        raise UsageError(
            f"cannot use '{target}' as the docker target",
            hint="give a repository in lower case and a tag, such as debian:13 or registry.example.org/os/debian:13",
        )
