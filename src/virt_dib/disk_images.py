# SPDX-License-Identifier: Apache-2.0
"""What the first bytes of a disk image say about it, read here and not by a program that opens what they name."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

_QCOW2 = b"QFI\xfb"
_OTHERS = {
    b"KDMV": "vmdk", b"COWD": "vmdk", b"# Disk DescriptorFile": "vmdk", b"vhdxfile": "vhdx", b"conectix": "vhd",
    b"QED\0": "qed", b"<<< ": "vdi", b"LUKS\xba\xbe": "luks", b"WithoutFreeSpace": "parallels",
    b"WithouFreSpacExt": "parallels", b"Bochs Virtual HD Image": "bochs",
    b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop": "cloop",
}  # fmt: skip
"""How files of formats begin that are neither raw nor qcow2."""
_VMDK_TEXT = re.compile(rb"(?:#[^\n]*\n| +\r?\n)*version=[123]\r?\n")
"""As QEMU knows it (block/vmdk.c)."""
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQ")
"""docs/interop/qcow2.txt of QEMU, the first 80 bytes."""
HEAD_BYTES = 512
"""So many of the first bytes are enough for this module, and for QEMU to tell formats by."""
_VERSION_WITH_FEATURES = 3
_CORRUPT, _DATA_FILE = 2, 4
"""Among the incompatible features, the last of these."""


def format_by(head: bytes) -> str:
    """The format of an image that begins with *head*; ``raw`` is also what is not known."""
    if head.startswith(_QCOW2):
        return "qcow2"
    if _VMDK_TEXT.match(head[:HEAD_BYTES]):
        return "vmdk"
    return next((name for begin, name in _OTHERS.items() if head.startswith(begin)), "raw")


@dataclass(frozen=True, slots=True)
class Qcow2:
    """The header of a qcow2 image."""

    version: int
    size_bytes: int
    """Of the disk in it."""
    has_backing_file: bool
    has_data_file: bool
    is_encrypted: bool
    is_corrupt: bool
    """It says so itself."""


def qcow2_header(head: bytes) -> Qcow2 | None:
    """The header in *head*, the first bytes of an image; None for one that is no qcow2 image."""
    if len(head) < _HEADER.size or not head.startswith(_QCOW2):
        return None
    words = _HEADER.unpack_from(head)
    version, backing_offset, size_bytes, cipher, features = words[1], words[2], words[5], words[6], words[13]
    if version < _VERSION_WITH_FEATURES:
        features = 0
    return Qcow2(
        version=version,
        size_bytes=size_bytes,
        has_backing_file=backing_offset != 0,
        has_data_file=features & _DATA_FILE != 0,
        is_encrypted=cipher != 0,
        is_corrupt=features & _CORRUPT != 0,
    )
