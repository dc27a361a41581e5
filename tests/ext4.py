# SPDX-License-Identifier: Apache-2.0
"""All that is in an ext2, ext3 or ext4 file system, read from a file with libext2fs, without mounting it."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from virt_dib import tools

READ_ONLY_64_BITS = 0x20000
ROOT_INODE = 2
INODE_BYTES = 256
PIECE_BYTES = 1 << 20
SHORT_LINK_BYTES = 60
NANOSECONDS = 10**9
OLD_DESCRIPTOR_BYTES = 32
"""Of file systems without the feature 64bit, which do not tell."""

DECIDED_BY_MKFS = {
    "Block count", "Block size", "Blocks per group", "Default directory hash", "Default mount options",
    "Desired extra isize", "Errors behavior", "Filesystem OS type", "Filesystem features", "Filesystem flags",
    "Filesystem magic number", "Filesystem revision #", "Filesystem volume name", "First block", "First inode",
    "Flex block group size", "Fragment size", "Fragments per group", "Group descriptor size", "Inode blocks per group",
    "Inode count", "Inode size", "Inodes per group", "Journal backup", "Journal inode",
    "Maximum mount count", "Required extra isize", "Reserved GDT blocks", "Reserved block count",
    "Reserved blocks gid", "Reserved blocks uid", "Total journal size", "Total journal blocks",
    "Max transaction length", "Checksum type", "Check interval", "Filesystem state", "Overhead clusters",
}  # fmt: skip
"""Lines of 'dumpe2fs -h'; the others are times, what is free, ids drawn by lot, what depends on these, and what the
kernel writes into a journal when it uses it."""

TakeEntry = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p
)
# Some versions pass the inode of the value before the last argument, which is not used here.
TakeAttribute = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What one path leads to."""

    inode: int
    mode: int
    """With the type."""
    entry_kind: int
    """The type, as the directory has it."""
    uid: int
    gid: int
    links: int
    size: int
    """Of a directory that says more about who wrote it than about what is in it."""
    mtime_ns: int
    device: tuple[int, int] | None
    target: bytes | None
    attributes: tuple[tuple[str, bytes], ...]
    digest: str | None
    blocks_bytes: int


def told(entry: Entry, *, without: frozenset[str] = frozenset()) -> dict[str, object]:
    """What must be the same, whoever wrote the file system."""
    dropped = {"inode", "blocks_bytes", *without}
    if stat.S_ISDIR(entry.mode):
        dropped.add("size")
    return {name: value for name, value in dataclasses.asdict(entry).items() if name not in dropped}


class FileSystem:
    """A file system, open for reading; made by :func:`opened`."""

    def __init__(self, image: Path, offset_bytes: int) -> None:
        self._library = ctypes.CDLL("libext2fs.so.2")
        self._handle = ctypes.c_void_p()
        manager = ctypes.c_void_p.in_dll(self._library, "unix_io_manager")
        place = f"{image}?offset={offset_bytes}".encode()
        self._call("ext2fs_open", place, READ_ONLY_64_BITS, 0, 0, manager, ctypes.byref(self._handle), bare=True)

    def close(self) -> None:
        self._call("ext2fs_close")

    def entries(self) -> dict[bytes, Entry]:
        """Everything, by its path; the root's is ``/``."""
        found = {b"/": self._entry(ROOT_INODE, 2)}
        waiting = [(b"/", ROOT_INODE)]
        while waiting:
            path, directory = waiting.pop()
            for name, inode, kind in self._names(directory):
                below = path + name
                assert below not in found
                found[below] = self._entry(inode, kind)
                if stat.S_ISDIR(found[below].mode):
                    waiting.append((below + b"/", inode))
        return found

    def _entry(self, inode: int, kind: int) -> Entry:
        content = ctypes.create_string_buffer(INODE_BYTES)
        self._call("ext2fs_read_inode_full", ctypes.c_uint32(inode), content, INODE_BYTES)
        mode, uid_low, size_low = struct.unpack_from("<HHI", content, 0x00)
        (mtime,) = struct.unpack_from("<i", content, 0x10)
        gid_low, links, sectors = struct.unpack_from("<HHI", content, 0x18)
        uid_high, gid_high = struct.unpack_from("<HH", content, 0x78)
        (extra_mtime,) = struct.unpack_from("<I", content, 0x88)
        size = size_low
        if stat.S_ISREG(mode):
            size += struct.unpack_from("<I", content, 0x6C)[0] << 32
        # The two low bits are more of the seconds.
        seconds, nanoseconds = mtime + ((extra_mtime & 3) << 32), extra_mtime >> 2
        device = None
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            old, new = struct.unpack_from("<2I", content, 0x28)
            device = (old >> 8, old & 0xFF) if old else (new >> 8 & 0xFFF, new & 0xFF | new >> 12 & ~0xFF)
        target = None
        if stat.S_ISLNK(mode):
            target = content.raw[0x28 : 0x28 + size] if size < SHORT_LINK_BYTES else b"".join(self._content(inode))
        digest = None
        if stat.S_ISREG(mode):
            digest = hashlib.sha256(b"").hexdigest()
            if size:
                summed = hashlib.sha256()
                for piece in self._content(inode):
                    summed.update(piece)
                digest = summed.hexdigest()
        return Entry(
            inode=inode,
            mode=mode,
            entry_kind=kind,
            uid=uid_low | uid_high << 16,
            gid=gid_low | gid_high << 16,
            links=links,
            size=size,
            mtime_ns=seconds * NANOSECONDS + nanoseconds,
            device=device,
            target=target,
            attributes=self._attributes(inode),
            digest=digest,
            blocks_bytes=sectors * 512,
        )

    def _names(self, directory: int) -> list[tuple[bytes, int, int]]:
        found: list[tuple[bytes, int, int]] = []

        def take(entry: int, _offset: int, _size: int, _buffer: int, _data: int) -> int:
            inode, _length, name_length, kind = struct.unpack("IHBB", ctypes.string_at(entry, 8))
            name = ctypes.string_at(entry + 8, name_length)
            if name not in {b".", b".."}:
                found.append((name, inode, kind))
            return 0

        self._call("ext2fs_dir_iterate", ctypes.c_uint32(directory), 0, None, TakeEntry(take), None)
        return found

    def _attributes(self, inode: int) -> tuple[tuple[str, bytes], ...]:
        found: list[tuple[str, bytes]] = []

        def take(name: bytes, value: int | None, length: int) -> int:
            found.append((name.decode(), ctypes.string_at(value, length) if value else b""))
            return 0

        handle = ctypes.c_void_p()
        self._call("ext2fs_xattrs_open", ctypes.c_uint32(inode), ctypes.byref(handle))
        self._call("ext2fs_xattrs_read", handle, bare=True)
        self._call("ext2fs_xattrs_iterate", handle, TakeAttribute(take), None, bare=True)
        self._call("ext2fs_xattrs_close", ctypes.byref(handle), bare=True)
        return tuple(sorted(found))

    def _content(self, inode: int) -> Iterator[bytes]:
        file = ctypes.c_void_p()
        self._call("ext2fs_file_open", ctypes.c_uint32(inode), 0, ctypes.byref(file))
        piece, got = ctypes.create_string_buffer(PIECE_BYTES), ctypes.c_uint()
        while True:
            self._call("ext2fs_file_read", file, piece, PIECE_BYTES, ctypes.byref(got), bare=True)
            if got.value == 0:
                break
            yield piece.raw[: got.value]
        self._call("ext2fs_file_close", file, bare=True)

    def _call(self, name: str, *arguments: object, bare: bool = False) -> None:
        function = self._library[name]
        function.restype = ctypes.c_long
        error = function(*arguments) if bare else function(self._handle, *arguments)
        assert error == 0, f"{name}: error {error}"


@contextlib.contextmanager
def opened(image: Path, *, offset_bytes: int = 0) -> Iterator[FileSystem]:
    """The file system at *offset_bytes* of the file *image*."""
    file_system = FileSystem(image, offset_bytes)
    try:
        yield file_system
    finally:
        file_system.close()


def superblock(image: Path, *, offset_bytes: int = 0) -> dict[str, str]:
    """What dumpe2fs tells about the whole file system."""
    dumpe2fs = tools.require("dumpe2fs", purpose="look into images", package="e2fsprogs")
    place = f"{image}?offset={offset_bytes}"
    output = tools.run([dumpe2fs, "-h", place], doing="reading the superblock", environment={"LC_ALL": "C"}).stdout
    pairs = (line.partition(":") for line in output.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def most_blocks(decided: Mapping[str, str]) -> tuple[int, int]:
    """Between which numbers of blocks lies what a file system with that superblock was made to grow to at most.

    Descriptors of groups have a place of their own, with blocks kept free for those that growing adds.
    """
    block_bytes, group_blocks = int(decided["Block size"]), int(decided["Blocks per group"])
    in_a_block = block_bytes // int(decided.get("Group descriptor size", OLD_DESCRIPTOR_BYTES))
    groups = -(-int(decided["Block count"]) // group_blocks)
    descriptor_blocks = -(-groups // in_a_block) + int(decided["Reserved GDT blocks"])
    step = in_a_block * group_blocks
    return (descriptor_blocks - 1) * step, descriptor_blocks * step


def complaints(image: Path, *, offset_bytes: int = 0) -> str:
    """What e2fsck finds wrong, or nothing."""
    e2fsck = tools.require("e2fsck", purpose="look into images", package="e2fsprogs")
    result = tools.run([e2fsck, "-fn", f"{image}?offset={offset_bytes}"], doing="checking", check=False)
    return "" if result.exit_status == 0 else result.stdout + result.stderr
