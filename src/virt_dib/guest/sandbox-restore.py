# SPDX-License-Identifier: Apache-2.0
"""Give the files of a file system that 'mke2fs -d' has made what it leaves out, or what the sandbox could not do.

    sandbox-restore.py DIRECTORY IMAGE[?offset=BYTES]

1. The times, to the nanosecond. mke2fs 1.47.0 copies whole seconds, of which it keeps 32 bits: what is later
   than January 2038 becomes 1902.
2. Device nodes, for which the sandbox has empty files that say so (class Nodes of ``sandbox-init.py``).
3. The owner and the mode of the directory at the top.
4. Names that one symbolic link has. mke2fs keeps the hard links of all else, but makes a link of each name.

A file that is longer than the file system can have one ends it with status 5. mke2fs 1.47.0 takes it, and e2fsck would
make it an empty one.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
import time

READ_WRITE_64_BITS = 0x1 | 0x20000
ROOT_INODE = 2
INODE_BYTES = 256
EXTRA_SIZE, EXTRA_TIMES_END = 0x80, 0x90 - 0x80
# Offsets in struct ext4_inode: seconds, and the field with nanoseconds and two more bits of seconds.
TIMES = {"st_atime_ns": (0x08, 0x8C), "st_ctime_ns": (0x0C, 0x84), "st_mtime_ns": (0x10, 0x88)}
NANOSECONDS = 10**9
NODE_ATTRIBUTE = "user.virt-dib.node"
MODE, DELETED, GROUP, LINKS, SECTORS, FLAGS, BLOCKS = 0x00, 0x14, 0x18, 0x1A, 0x1C, 0x20, 0x28
EXTENTS_FLAG = 0x80000
OLD_DEVICE_LIMIT = 256
# The kinds of nodes: the type in the mode, and the type in a directory entry.
KINDS = {b"c": (stat.S_IFCHR, 3), b"b": (stat.S_IFBLK, 4)}
ENTRY_CHANGED = 1
# The superblock, and in it the binary logarithm of the size of a block in KiB.
SUPERBLOCK, BLOCK_SIZE = 1024, 24
DIRECT_BLOCKS = 12
LONG_FILE_STATUS = 5
# Every ext4 has room for one file of so much.
ORDINARY_BYTES = 1 << 33

Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class FileSystem:
    """An ext4 file system in a file, opened with libext2fs."""

    def __init__(self, image: str) -> None:
        self._library = ctypes.CDLL("libext2fs.so.2")
        path, _, offset = image.partition("?offset=")
        with open(path, "rb") as stream:
            stream.seek(int(offset or 0) + SUPERBLOCK + BLOCK_SIZE)
            self._block_bytes: int = 1024 << struct.unpack("<I", stream.read(4))[0]
        self._handle = ctypes.c_void_p()
        manager = ctypes.c_void_p.in_dll(self._library, "unix_io_manager")
        self._call(
            "ext2fs_open", image.encode(), READ_WRITE_64_BITS, 0, 0, manager, ctypes.byref(self._handle), bare=True
        )

    def close(self) -> None:
        """Write what is still to be written."""
        self._call("ext2fs_close")

    def entries(self, directory: int) -> dict[bytes, int]:
        """The names in the directory with that inode, and their inodes."""
        found: dict[bytes, int] = {}

        def take(entry: int, _offset: int, _size: int, _buffer: int, _data: int) -> int:
            inode, _length, name_length, _kind = struct.unpack("IHBB", ctypes.string_at(entry, 8))
            found[ctypes.string_at(entry + 8, name_length)] = inode
            return 0

        self._call("ext2fs_dir_iterate", ctypes.c_uint32(directory), 0, None, Callback(take), None)
        return found

    def set_kind(self, directory: int, name: bytes, kind: int) -> None:
        """Write the type of a file into its entry in *directory*."""

        def change(entry: int, _offset: int, _size: int, _buffer: int, _data: int) -> int:
            length = ctypes.string_at(entry + 6, 1)[0]
            if ctypes.string_at(entry + 8, length) != name:
                return 0
            ctypes.memset(entry + 7, kind, 1)
            return ENTRY_CHANGED

        self._call("ext2fs_dir_iterate", ctypes.c_uint32(directory), 0, None, Callback(change), None)

    def merge(self, directory: int, name: bytes, inode: int, kept: int) -> None:
        """Let the entry *name* of *directory*, whose file is *inode*, be one more name of *kept*."""

        def change(entry: int, _offset: int, _size: int, _buffer: int, _data: int) -> int:
            length = ctypes.string_at(entry + 6, 1)[0]
            if ctypes.string_at(entry + 8, length) != name:
                return 0
            ctypes.memmove(entry, struct.pack("I", kept), 4)
            return ENTRY_CHANGED

        self._call("ext2fs_read_bitmaps")
        self._call("ext2fs_dir_iterate", ctypes.c_uint32(directory), 0, None, Callback(change), None)
        content = self._read(kept)
        struct.pack_into("<H", content, LINKS, struct.unpack_from("<H", content, LINKS)[0] + 1)
        self._write(kept, content)
        content = self._read(inode)
        if struct.unpack_from("<I", content, SECTORS)[0]:
            last = ctypes.c_uint64(2**64 - 1)
            self._call("ext2fs_punch", ctypes.c_uint32(inode), content, None, ctypes.c_uint64(0), last)
        struct.pack_into("<H", content, LINKS, 0)
        struct.pack_into("<I", content, DELETED, int(time.time()))
        self._write(inode, content)
        self._library["ext2fs_inode_alloc_stats2"](self._handle, ctypes.c_uint32(inode), -1, 0)

    def cannot_hold(self, inode: int, size_bytes: int) -> bool:
        """Whether that file cannot be so long."""
        if size_bytes < ORDINARY_BYTES:
            return False
        extents = bool(struct.unpack_from("<I", self._read(inode), FLAGS)[0] & EXTENTS_FLAG)
        numbers = self._block_bytes // 4
        most_blocks = 2**32 - 1 if extents else DIRECT_BLOCKS + numbers + numbers**2 + numbers**3
        return size_bytes > most_blocks * self._block_bytes

    def remove_attribute(self, inode: int, name: str) -> None:
        """Remove an extended attribute."""
        handle = ctypes.c_void_p()
        self._call("ext2fs_xattrs_open", ctypes.c_uint32(inode), ctypes.byref(handle))
        self._call("ext2fs_xattrs_read", handle, bare=True)
        self._call("ext2fs_xattr_remove", handle, name.encode(), bare=True)
        self._call("ext2fs_xattrs_close", ctypes.byref(handle), bare=True)

    def make_node(self, inode: int, kind: int, major: int, minor: int) -> None:
        """Make a device node of an empty file."""
        content = self._read(inode)
        (mode,) = struct.unpack_from("<H", content, MODE)
        (flags,) = struct.unpack_from("<I", content, FLAGS)
        old = major < OLD_DEVICE_LIMIT and minor < OLD_DEVICE_LIMIT
        new_number = minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
        struct.pack_into("<H", content, MODE, kind | stat.S_IMODE(mode))
        struct.pack_into("<I", content, FLAGS, flags & ~EXTENTS_FLAG)
        struct.pack_into("<2I52x", content, BLOCKS, *((major << 8 | minor, 0) if old else (0, new_number)))
        self._write(inode, content)

    def set_top(self, state: os.stat_result) -> None:
        """Write the owner and the mode of *state* into the root."""
        content = self._read(ROOT_INODE)
        struct.pack_into("<HH", content, MODE, state.st_mode & 0xFFFF, state.st_uid & 0xFFFF)
        struct.pack_into("<H", content, GROUP, state.st_gid & 0xFFFF)
        self._write(ROOT_INODE, content)

    def set_times(self, inode: int, state: os.stat_result) -> None:
        """Write the times of *state*."""
        content = self._read(inode)
        if struct.unpack_from("<H", content, EXTRA_SIZE)[0] < EXTRA_TIMES_END:
            return
        for name, (low, high) in TIMES.items():
            seconds, nanoseconds = divmod(getattr(state, name), NANOSECONDS)
            # The low half counts as signed; what that takes away, the two bits give back.
            signed = (seconds + 2**31) % 2**32 - 2**31
            struct.pack_into("<i", content, low, signed)
            struct.pack_into("<I", content, high, nanoseconds << 2 | (seconds - signed) >> 32 & 3)
        self._write(inode, content)

    def _read(self, inode: int) -> ctypes.Array[ctypes.c_char]:
        content = ctypes.create_string_buffer(INODE_BYTES)
        self._call("ext2fs_read_inode_full", ctypes.c_uint32(inode), content, INODE_BYTES)
        return content

    def _write(self, inode: int, content: ctypes.Array[ctypes.c_char]) -> None:
        self._call("ext2fs_write_inode_full", ctypes.c_uint32(inode), content, INODE_BYTES)

    def _call(self, name: str, *arguments: object, bare: bool = False) -> None:
        function = self._library[name]
        function.restype = ctypes.c_long
        error = function(*arguments) if bare else function(self._handle, *arguments)
        if error:
            sys.exit(f"{name}: error {error}")


def restore(file_system: FileSystem, top: bytes) -> None:
    """Go through everything below *top*, which is the root of *file_system*."""
    waiting = [(top, ROOT_INODE)]
    state = os.stat(top)
    file_system.set_top(state)
    file_system.set_times(ROOT_INODE, state)
    nodes = set()
    links: dict[int, int] = {}
    while waiting:
        path, directory = waiting.pop()
        inodes = file_system.entries(directory)
        with os.scandir(path) as listing:
            for entry in listing:
                inode = inodes.get(entry.name)
                if inode is None:
                    continue
                state = entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((entry.path, inode))
                elif stat.S_ISLNK(state.st_mode) and state.st_nlink > 1:
                    kept = links.setdefault(state.st_ino, inode)
                    if kept != inode:
                        file_system.merge(directory, entry.name, inode, kept)
                        continue
                elif stat.S_ISREG(state.st_mode) and state.st_size == 0 and (node := node_of(entry.path)):
                    kind, major, minor = node
                    file_system.set_kind(directory, entry.name, KINDS[kind][1])
                    if inode not in nodes:
                        file_system.remove_attribute(inode, NODE_ATTRIBUTE)
                        file_system.make_node(inode, KINDS[kind][0], major, minor)
                        nodes.add(inode)
                elif stat.S_ISREG(state.st_mode) and file_system.cannot_hold(inode, state.st_size):
                    sys.stdout.write(f"{os.fsdecode(entry.path[len(top) :])!a} has {state.st_size} bytes\n")
                    sys.exit(LONG_FILE_STATUS)
                file_system.set_times(inode, state)


def node_of(path: bytes) -> tuple[bytes, int, int] | None:
    """The kind and numbers of the device node that an empty file stands for, if it does."""
    try:
        kind, major, minor = os.getxattr(path, NODE_ATTRIBUTE, follow_symlinks=False).split()
        return (kind, int(major) & 0xFFF, int(minor) & 0xFFFFF) if kind in KINDS else None
    except (OSError, ValueError):
        return None


def main() -> None:
    """Do all of a directory."""
    directory, image = sys.argv[1:]
    file_system = FileSystem(image)
    restore(file_system, os.fsencode(directory))
    file_system.close()


main()
