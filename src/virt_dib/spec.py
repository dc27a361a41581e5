# SPDX-License-Identifier: Apache-2.0
"""What was asked for: the phases of a build, its settings, and the values users write."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from virt_dib.errors import UsageError


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

DEFAULT_SIZE_BYTES = 5 * 1024**3
"""``--size`` when it is not given (manual, option --size)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSpec:
    """One image as asked for on the command line, checked value by value."""

    name: str
    """The image's name, without directory and suffix."""
    output_dir: Path
    elements: tuple[str, ...]
    """As the user wrote them; ``base`` and defaults are added by ``elements.requested``."""
    element_paths: tuple[Path, ...] = ()
    """``-p`` in the order given; diskimage-builder's own elements come after them."""
    dib_library: Path | None = None
    """``-B``: the directory with ``die`` in it."""
    formats: tuple[str, ...] = ("qcow2",)
    size_bytes: int | None = DEFAULT_SIZE_BYTES
    """Size of the image disk; None is ``--size auto``."""
    arch: str = "amd64"
    variables: Mapping[str, str] = field(default_factory=dict)
    """``--envvar``, names and values as the elements are to see them."""
    debug_level: int = 0
    memory_mib: int | None = None
    """None: enough for package installation (see ``appliance``)."""
    cpus: int | None = None
    """None: the processors of this host, at most eight."""
    network: bool = True
    root_label: str | None = None
    fs_type: str = "ext4"
    mkfs_options: str = ""
    extra_packages: tuple[str, ...] = ()
    skip_base: bool = False
    install_type: str = "source"
    excluded_elements: frozenset[str] = frozenset()
    excluded_scripts: frozenset[str] = frozenset()
    image_cache: Path | None = None
    """A directory of the host for what the elements cache; None: nothing is kept (docs/caches.md)."""
    delete_on_failure: bool = True
    compress: bool = True
    qemu_img_options: str = ""
    checksum: bool = False
    arguments: tuple[str, ...] = ()
    """The command line as given, for DIB_ARGS."""


_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>[bkKMGTPE]?)(?:i?B)?")
_UNITS = {"b": 1, "k": 1024, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4, "P": 1024**5, "E": 1024**6}
LARGEST_DISK_BYTES = 2**60
_LABEL = re.compile(r"""[!-~]+""")
_NOT_IN_LABELS = frozenset("/'\"`\\,")
"""They would end or change the label in fstab, in bootloaders' files, in device paths."""


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
