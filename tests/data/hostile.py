# SPDX-License-Identifier: Apache-2.0
"""Tries what extra-data.d must not do on the host, and what it may; leaves a line of each in the tree."""

import contextlib
import ctypes
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

HOME = Path(os.environ["HOME"])
TREE = Path(os.environ["TMP_MOUNT_PATH"])
HOOKS = Path(os.environ["TMP_HOOKS_PATH"])
CACHE = Path(os.environ["DIB_IMAGE_CACHE"])
libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> None:
    if result == -1:
        raise OSError(ctypes.get_errno(), "")


def write(path: str | Path) -> None:
    with open(path, "a") as stream:
        stream.write("hostile\n")


def connect(address: str | bytes) -> None:
    with socket.socket(socket.AF_UNIX) as handle:
        handle.connect(address)


def see_process() -> None:
    marker = os.environ["BAIT_MARKER"].encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        if path.parent.name != str(os.getpid()) and marker in path.read_bytes():
            return
    raise ProcessLookupError


def make_writable(path: Path) -> None:
    # MS_REMOUNT | MS_BIND
    checked(libc.mount(None, os.fsencode(path), None, ctypes.c_ulong(0x20 | 0x1000), None))
    write(path / "hostile")


def make_namespace() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0 if libc.unshare(0x10000000 | 0x20000) == 0 else 1)
    if os.waitpid(child, 0)[1] != 0:
        raise PermissionError


def leave_in_cache() -> None:
    """What a user of the host could become its owner with, and what the owner could not remove."""
    program = CACHE / "program"
    program.write_bytes(b"#!/bin/sh\n")
    program.chmod(0o6755)
    (CACHE / "of-others" / "inner").mkdir(parents=True)
    os.chown(CACHE / "of-others" / "inner", 33, 33)
    os.chown(CACHE / "of-others", 33, 33)
    (CACHE / "of-others").chmod(0o700)


def leave_in_tree() -> None:
    (TREE / "setuid").write_bytes(b"#!/bin/sh\n")
    (TREE / "setuid").chmod(0o4755)
    (TREE / "of-others").write_text("x")
    os.chown(TREE / "of-others", 33, 34)
    os.symlink("/etc/passwd", TREE / "link")
    os.setxattr(TREE / "setuid", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))


ATTEMPTS: dict[str, Callable[[], object]] = {
    "write to the home": lambda: write(HOME / "hostile"),
    "add a key": lambda: write(HOME / ".ssh/authorized_keys"),
    "change a file of the home": lambda: write(HOME / ".netrc"),
    "write beside the cache": lambda: write(CACHE.parent / "hostile"),
    "write to the working directory": lambda: write("hostile"),
    "write to an element": lambda: write(os.environ["ELEMENTS_PATH"].split(":")[0] + "/hostile"),
    "write to /usr": lambda: write("/usr/hostile"),
    "write to /etc": lambda: write("/etc/passwd"),
    "write to /": lambda: write("/hostile"),
    "write to the runner": lambda: write("/dib/guest/run-phase.sh"),
    "write a setting of the kernel": lambda: write("/proc/sys/kernel/core_pattern"),
    "write a file of everybody's": lambda: write(os.environ["BAIT_FILE"]),
    "read a file in /tmp": lambda: Path(os.environ["BAIT_FILE"]).read_bytes(),
    "make a mount writable": lambda: make_writable(HOME),
    "mount": lambda: checked(libc.mount(b"x", b"/tmp", b"tmpfs", 0, None)),
    "make a namespace": make_namespace,
    "make a device": lambda: os.mknod(CACHE / "device", 0o20666, os.makedev(1, 1)),
    "see a process": see_process,
    "signal a process": lambda: os.kill(int(os.environ["BAIT_PROCESS"]), signal.SIGTERM),
    "connect to a socket of the home": lambda: connect(str(HOME / "socket")),
    "connect to a socket without a file": lambda: connect("\0" + os.environ["BAIT_MARKER"]),
    "ask an agent": lambda: connect(os.environ["SSH_AUTH_SOCK"]),
    "read a key": (HOME / ".ssh/id_test").read_text,
    "write to the tree": leave_in_tree,
    "write to the hooks": lambda: write(HOOKS / "hostile"),
    "write to the cache": leave_in_cache,
    "write to /tmp": lambda: write("/tmp/hostile"),
    "write to /var/tmp": lambda: write("/var/tmp/hostile"),
}


with (TREE / "attempts").open("w") as results:
    for name, attempt in ATTEMPTS.items():
        try:
            attempt()
            results.write(f"{name}\tdone\n")
        except BaseException as error:  # noqa: BLE001 - whatever hinders it
            results.write(f"{name}\t{type(error).__name__}\n")
# What is left behind must not outlive the phase.
if os.fork() == 0:
    os.setsid()
    for number in (0, 1, 2):
        with contextlib.suppress(OSError):
            os.close(number)
    while True:
        signal.pause()
