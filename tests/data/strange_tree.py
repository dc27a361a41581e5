#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Puts files of every kind into the image's tree, with all that a file system can say about a file.

    strange_tree.py root.d         what is to be done before anything is mounted in the tree
    strange_tree.py post-root.d    the rest, then the times

Without an argument it goes by the name of its directory. It runs outside the chroot, of which the appliance and the
sandbox have the same Python.
"""
# ruff: noqa: S103 - odd modes are what it is for

from __future__ import annotations

import os
import socket
import stat
import struct
import sys
import zlib
from pathlib import Path

SECOND = 10**9
MANY = 3000
TIMES = {
    b"year 1901": -(2**31) * SECOND,
    b"before 1970": -1,
    b"long before 1970": -(10**9) * SECOND + 123456789,
    b"the epoch": 0,
    b"last of 31 bits": (2**31 - 1) * SECOND + 999999999,
    b"after 2038": 2**31 * SECOND + 1,
    b"year 2106": 2**32 * SECOND + 5,
    b"year 2400": 13569465600 * SECOND + 987654321,
}
NAMES = (
    b"latin \xe9", b"new\nline", b" blank ", b"tab\t", b"-dash", b'quote"', b"quote'", b"back\\slash", b"\x01\xff",
    b"dollar$(x)`y`", b"*", b"?[a]", b"...", "snow \N{SNOWMAN}".encode(), b"l" * 255, b"~", b"#", b"<a>&;|",
)  # fmt: skip
IDS = (0, 1, 1000, 60000, 65534, 65535)
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13 | 1 << 10, 0, 0, 0)
ANY = 0xFFFFFFFF


def acl(*entries: tuple[int, int, int]) -> bytes:
    """The attribute for entries of tag, permissions and id (linux/posix_acl_xattr.h)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


ACL = acl((0x01, 6, ANY), (0x02, 7, 1234), (0x02, 0, 65535), (0x04, 4, ANY), (0x08, 4, 60000), (0x10, 7, ANY),
          (0x20, 0, ANY))  # fmt: skip
DEFAULT_ACL = acl((0x01, 7, ANY), (0x02, 5, 77), (0x04, 5, ANY), (0x10, 5, ANY), (0x20, 1, ANY))


def write(name: bytes, content: bytes = b"x\n") -> bytes:
    """A new file; returns its name."""
    with open(name, "xb") as stream:
        stream.write(content)
    return name


def owned_and_moded() -> None:
    """Every pair of owners, and every mode of some use."""
    os.mkdir(b"owners")
    for uid in IDS:
        for gid in IDS:
            name = write(f"owners/{uid}-{gid}".encode())
            os.chown(name, uid, gid)
    os.mkdir(b"modes")
    for mode in (0, 0o1, 0o111, 0o400, 0o644, 0o777, 0o1644, 0o2755, 0o2644, 0o4755, 0o4711, 0o6755, 0o7777):
        os.chmod(write(f"modes/file-{mode:04o}".encode()), mode)
        os.mkdir(f"modes/directory-{mode:04o}")
        os.chmod(f"modes/directory-{mode:04o}", mode)
    os.chown(write(b"modes/setuid"), 65535, 65534)
    os.chmod(b"modes/setuid", 0o6755)
    os.mkdir(b"modes/shared")
    os.chown(b"modes/shared", 1000, 60000)
    os.chmod(b"modes/shared", 0o3770)


def attributed() -> None:
    """Extended attributes in the inode and outside it, capabilities, ACLs."""
    os.mkdir(b"attributes")
    os.setxattr(write(b"attributes/capable"), "security.capability", CAPABILITY)
    os.setxattr(write(b"attributes/short"), "user.name", b"a value")
    os.setxattr(write(b"attributes/binary"), "user.bytes", bytes(range(256)))
    os.setxattr(write(b"attributes/long"), "user.long", b"v" * 3000)
    many = write(b"attributes/many", b"")
    for number in range(20):
        os.setxattr(many, f"user.number-{number}", f"value {number}".encode() * (number + 1))
    for name in (b"attributes/same1", b"attributes/same2"):
        os.setxattr(write(name), "user.same", b"s" * 1000)
    os.mkdir(b"attributes/directory")
    os.setxattr(b"attributes/directory", "user.name", b"of a directory")
    os.setxattr(write(b"attributes/acl"), "system.posix_acl_access", ACL)
    os.mkdir(b"attributes/acl-default")
    os.setxattr(b"attributes/acl-default", "system.posix_acl_access", ACL)
    os.setxattr(b"attributes/acl-default", "system.posix_acl_default", DEFAULT_ACL)
    write(b"attributes/acl-default/inherited")
    os.mkdir(b"attributes/acl-default/inherited-too")
    every = write(b"attributes/all")
    os.chown(every, 65534, 60000)
    os.chmod(every, 0o750)
    os.setxattr(every, "security.capability", CAPABILITY)
    os.setxattr(every, "user.name", b"a value")
    os.setxattr(every, "system.posix_acl_access", ACL)


def linked() -> None:
    """Hard links, across directories and of all kinds, and symbolic ones."""
    os.makedirs(b"links/below")
    write(b"links/hard1")
    os.link(b"links/hard1", b"links/hard2")
    os.link(b"links/hard1", b"links/below/hard3")
    os.link(write(b"links/empty1", b""), b"links/empty2")
    for length in (1, 59, 60, 61, 200, 1000, 4000):
        os.symlink(b"t" * length, f"links/soft-{length}")
    os.symlink(b"/etc/passwd", b"links/absolute")
    os.symlink(b"new\nline \xe9 \"'", b"links/odd")
    os.chown(b"links/odd", 65535, 1000, follow_symlinks=False)
    os.symlink(b"of-a-link", b"links/link1")
    os.link(b"links/link1", b"links/link2", follow_symlinks=False)
    os.symlink(b"u" * 100, b"links/long1")
    os.link(b"links/long1", b"links/below/long2", follow_symlinks=False)


def special() -> None:
    """FIFOs, sockets and device nodes."""
    os.makedirs(b"special/below")
    os.mkfifo(b"special/fifo", 0o640)
    os.chown(b"special/fifo", 1, 65535)
    os.link(b"special/fifo", b"special/below/fifo2")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(b"special/socket")
    os.chmod(b"special/socket", 0o777)
    for name, kind, major, minor, mode in (
        (b"console", stat.S_IFCHR, 5, 1, 0o600),
        (b"null", stat.S_IFCHR, 1, 3, 0o666),
        (b"tape", stat.S_IFCHR, 254, 256, 0o4640),
        (b"large", stat.S_IFCHR, 4095, 0xFFFFF, 0o000),
        (b"disk", stat.S_IFBLK, 8, 0, 0o660),
        (b"nvme", stat.S_IFBLK, 259, 70000, 0o660),
        (b"whiteout", stat.S_IFCHR, 0, 0, 0o600),
    ):
        os.mknod(b"special/" + name, kind | 0o600, os.makedev(major, minor))
        os.chmod(b"special/" + name, mode)
    os.chown(b"special/nvme", 0, 6)
    os.link(b"special/console", b"special/below/console2")
    os.setxattr(b"special/disk", "system.posix_acl_access", ACL)


def contents() -> None:
    """Empty, large and sparse files, names of any bytes, and a large directory."""
    os.mkdir(b"contents")
    write(b"contents/empty", b"")
    write(b"contents/inline", b"x" * 50)
    write(b"contents/block", bytes(range(256)) * 16)
    write(b"contents/large", b"".join(number.to_bytes(4, "big") for number in range(1 << 20)))
    with open(b"contents/sparse", "xb") as stream:
        stream.seek(10 << 20)
        stream.write(b"middle")
        stream.truncate(64 << 20)
    with open(b"contents/hole", "xb") as stream:
        stream.truncate(256 << 20)
    write(b"contents/zeros", b"\0" * (1 << 20))
    os.mkdir(b"names")
    for number, name in enumerate(NAMES):
        write(b"names/" + name, b"%d\n" % number)
    os.makedirs(b"names/\xff\n/\xfe")
    write(b"names/\xff\n/\xfe/below")
    os.mkdir(b"many")
    for number in range(MANY):
        write(b"many/a name of some length, number %d" % number, b"")
    os.makedirs(b"deep/" + b"/".join(b"%d" % number for number in range(60)))


def date_all(top: bytes) -> None:
    """Give all below *top* a time of its own, which its path decides, and directories theirs after what is in them."""
    for directory, directories, files in os.walk(top, topdown=False):
        for name in sorted(directories + files):
            path = os.path.join(directory, name)
            number = zlib.crc32(path)
            time_ns = number * SECOND + number * 10007 % SECOND
            os.utime(path, ns=(time_ns, time_ns), follow_symlinks=False)


def date(top: bytes) -> None:
    """Times that take more than 31 bits, or are before all others."""
    for name, time_ns in TIMES.items():
        for path in (top + b"/" + name, top + b"/links/" + name):
            os.utime(path, ns=(time_ns, time_ns), follow_symlinks=False)


def main() -> None:
    """Do what the phase is for."""
    phase = sys.argv[1] if len(sys.argv) > 1 else Path(sys.argv[0]).parent.name
    os.umask(0o022)
    os.chdir(os.environ["TARGET_ROOT" if phase == "root.d" else "TMP_MOUNT_PATH"])
    if phase == "root.d":
        # Later these are covered by what is mounted there.
        for name, mode, uid, time_ns in (("proc", 0o555, 0, 1), ("sys", 0o1711, 65535, 2), ("dev", 0o2701, 1000, 3)):
            os.chown(name, uid, uid)
            os.chmod(name, mode)
            os.utime(name, ns=(10**18 + time_ns, 10**18 + time_ns))
        return
    os.mkdir("made")
    os.chdir("made")
    for make in (owned_and_moded, attributed, linked, special, contents):
        make()
    os.makedirs(b"times/links")
    for when in TIMES:
        write(b"times/" + when)
        os.symlink(b"nowhere", b"times/links/" + when)
    os.chdir("..")
    date_all(b"made")
    os.utime(b"made", ns=(SECOND + 1, SECOND + 1))
    date(b"made/times")
    os.chown(".", 1000, 60000)
    os.chmod(".", 0o1751)


if __name__ == "__main__":
    main()
