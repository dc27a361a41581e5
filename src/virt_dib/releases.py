# SPDX-License-Identifier: Apache-2.0
"""The releases of diskimage-builder: what their runners did differently, from 0.1.43 on.

``Rules`` has each topic as it was first; ``_CHANGES`` has the releases that changed it, ``_VARIABLES`` those that
brought a variable or took it away (contract section 2, and the repository's tags). The rest of the code asks the
rules and never compares versions.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virt_dib.spec import Phase

UNKNOWN = "unknown"
"""The version where there is no metadata, as in a checkout."""

OLDEST = "0.1.43"


class DiskMaker(enum.Enum):
    """Who makes the image disk."""

    SCRIPTS = "block-device.d partitions the runner's loop device, the runner makes and mounts the file system"
    TABLE = "dib-block-device makes the loop device and the partitions, the runner the file system"
    CONFIGURATION = "dib-block-device does everything"


class DefaultBlockDevice(enum.Enum):
    """Which words among the elements asked for bring a block device element along."""

    NONE = "no word"
    SUBSTRING = "any with 'vm' in it"
    WORD = "'vm'"


class PythonName(enum.Enum):
    """Where scripts outside the chroot find ``python``."""

    HOST = "on the PATH of the host"
    FIRST = "in a directory that comes first on the PATH"
    NOWHERE = "they name DIB_PYTHON_EXEC or python3"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What the runner of one release does; the values here are those of the oldest."""

    version: str = OLDEST
    absent: frozenset[str] = frozenset()
    """Variables that other releases set for scripts, and this one does not."""

    # ---- elements ----
    follows_links: bool = False
    """An element is called what its directory is called behind all links; before, as the entry in the path."""
    one_provider: bool = False
    """Two elements that provide the same are an error."""
    default_block_device: DefaultBlockDevice = DefaultBlockDevice.NONE
    efi_on_arm: bool = False
    """The default block device element of arm64 is block-device-efi."""

    # ---- scripts ----
    late_phases: bool = False
    """There are post-root.d and pre-finalise.d."""
    packages_after_install: bool = False
    """The extra packages are installed after install.d; before, they were before it."""
    own_run_parts: bool = False
    """dib-run-parts is in the library; before, scripts expect it on the PATH."""
    python_name: PythonName = PythonName.HOST
    literal_path: bool = False
    """PATH in the chroot begins with the text ``$PATH``; before, with the PATH outside."""
    chroot_unsets: bool = False
    """In the chroot TMPDIR and VIRTUAL_ENV are unset; before, TMPDIR was empty."""

    # ---- the image's tree ----
    sys_is_read_only: bool = False
    new_pts: bool = False
    """The chroot gets a devpts of its own; before, that of the host."""
    keeps_linked_resolver: bool = False
    """resolv.conf stays as it is in the end if it has become a link."""
    cleans_tmp: bool = False
    cleans_logs: bool = False

    # ---- the image disk ----
    cylinders: bool = True
    """Scripts count in cylinders for sfdisk, as it was before util-linux 2.26."""
    disk_maker: DiskMaker = DiskMaker.SCRIPTS
    disk_is_block_device: bool = False
    """IMAGE_BLOCK_DEVICE is the whole disk in finalise.d; before, the root partition."""
    tree_share: float = 600 / 1024
    """Of an automatic size; first it was the tree's in blocks of 600 bytes, taken for KiB."""
    exact_sizes: bool = False
    """A size that is a multiple of 64 KiB stays as it is; before, one more was added to automatic ones."""
    ext4_options_always: bool = False
    """mkfs gets DIB's options for ext4; before, only where the size was automatic."""
    size_in_kib: bool = False
    """DIB_IMAGE_SIZE is set to KiB for the phases of the disk."""

    def has(self, phase: Phase) -> bool:
        """Whether the release runs *phase*."""
        return self.late_phases or phase not in (Phase.POST_ROOT, Phase.PRE_FINALISE)


NEWEST_VERSION = "3.43.0"

_CHANGES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("0.1.46", {"cleans_tmp": True}),
    ("1.3.0", {"exact_sizes": True, "ext4_options_always": True}),
    ("1.14.0", {"tree_share": 0.6}),
    ("1.16.0", {"cylinders": False}),
    ("1.18.1", {"chroot_unsets": True, "literal_path": True}),
    ("1.27.0", {"cleans_logs": True}),
    ("2.0.0", {"follows_links": True, "disk_maker": DiskMaker.TABLE, "size_in_kib": True}),
    ("2.3.0", {"packages_after_install": True, "own_run_parts": True}),
    ("2.4.0", {"disk_maker": DiskMaker.CONFIGURATION}),
    ("2.6.0", {"disk_is_block_device": True}),
    ("2.7.0", {"keeps_linked_resolver": True}),
    ("2.10.0", {"new_pts": True}),
    ("2.12.0", {"one_provider": True, "default_block_device": DefaultBlockDevice.SUBSTRING}),
    ("2.18.0", {"late_phases": True}),
    ("2.32.0", {"python_name": PythonName.FIRST}),
    ("2.36.0", {"efi_on_arm": True}),
    ("3.2.0", {"python_name": PythonName.NOWHERE}),
    ("3.13.0", {"sys_is_read_only": True, "default_block_device": DefaultBlockDevice.WORD}),
)
"""Releases in their order, and what each of them changed."""

_VARIABLES: Mapping[str, tuple[str, str]] = {
    "_PREFIX": ("", "2.0.0"),
    "SCRIPT_HOME": ("1.11.0", "2.0.0"),
    "LANG": ("", "2.4.0"),
    "DIB_IMAGE_ROOT_FS_UUID": ("", "2.4.0"),
    "FS_TYPE": ("1.17.0", ""),
    "DIB_CHECKSUM": ("1.21.0", ""),
    "IMAGE_ELEMENT_YAML": ("2.0.0", ""),
    "TMP_IMAGE_DIR": ("2.0.0", ""),
    "IMAGE_BLOCK_DEVICE_WITHOUT_PART": ("2.0.0", "2.6.0"),
    "DIB_PYTHON_EXEC": ("2.1.0", ""),
    "LC_ALL": ("2.4.0", ""),
    "DIB_ROOT_FSTYPE": ("2.4.0", ""),
    "DIB_BLOCK_DEVICE_PARAMS_YAML": ("2.4.0", ""),
    "DIB_MOUNTPOINTS": ("2.4.1", ""),
    "IMAGE_BLOCK_DEVICES": ("2.6.0", ""),
    "DIB_LOCKFILES": ("2.10.0", ""),
    "DIB_ORIGINAL_PATH": ("2.32.0", "3.2.0"),
    "DIB_PYTHON_EXEC_TMP": ("2.32.0", "3.2.0"),
    "DIB_BOOT_LABEL": ("3.28.0", ""),
}
"""Variables and the releases that brought them and took them away; empty: they always, or still, are there."""

_SIGNS = (
    ("lib/dib-block-device.py", NEWEST_VERSION),
    ("block_device/plugin.py", "3.0.0"),
    ("block_device", "2.0.0"),
)
"""Files beside ``elements`` that the releases of a time have, and the last release of that time, about."""
_WITHOUT_SIGNS = "1.28.0"


def rules(version: str) -> Rules:
    """The rules of the release *version*, such as ``2.38.0`` or ``3.43.1.dev2``."""
    number = _number(version)
    found = Rules(version=version, absent=frozenset(name for name in _VARIABLES if not _is_set(name, number)))
    for release, changes in _CHANGES:
        if _number(release) <= number:
            found = dataclasses.replace(found, **changes)
    return found


def guess(directory: Path) -> Rules:
    """The rules for a checkout, which has no metadata, by what is beside its ``elements`` in *directory*."""
    version = next((version for sign, version in _SIGNS if os.path.exists(directory / sign)), _WITHOUT_SIGNS)
    return dataclasses.replace(rules(version), version=UNKNOWN)


def _number(version: str) -> tuple[int, ...]:
    match = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    # 2.32 is 2.32.0.
    return tuple(map(int, re.sub(r"(?:\.0+)+$", "", match[0]).split("."))) if match else ()


def _is_set(name: str, number: tuple[int, ...]) -> bool:
    first, end = _VARIABLES[name]
    return _number(first) <= number and (not end or number < _number(end))


NEWEST = rules(NEWEST_VERSION)
