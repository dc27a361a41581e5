#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Tries to get at the host from where an element's scripts run, and writes down how each attempt ended.

    escape.py                   as a script of an element; a script in cleanup.d collects what the others wrote
    escape.py FILE ATTEMPT...   make these attempts, with no element around

Where the bait is, variables say. A line of the result is the name of the attempt, a tab, and 'refused: REASON' or
'GOT: WHAT'. In root.d it also puts Python into the tree, so that the phases inside can do the same.
"""

from __future__ import annotations

import ctypes
import glob
import os
import shlex
import shutil
import socket
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path

TIMEOUT_S = 3.0
PTRACE_ATTACH, PTRACE_DETACH = 16, 17
MS_REMOUNT, MS_BIND = 0x20, 0x1000
UUID_PLACE, UUID_BYTES = 0x468, 16
MODULE_CALLS = {"x86_64": (313, 175), "aarch64": (273, 105)}
ROOT_HANDLE = struct.pack("<IiII", 8, 1, 2, 0)
"""struct file_handle of inode 2, the root of ext4 and, with luck, others."""

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> int:
    """What a C function returned, unless it failed."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def bait(name: str) -> str:
    """What the test says about the bait."""
    return os.environ[f"BAIT_{name}"]


def read(*paths: str) -> str:
    """The content of the first of *paths* that can be read."""
    if not paths:
        raise FileNotFoundError(2, "no processes")
    for path in paths[:-1]:
        if os.access(path, os.R_OK):
            return read(path)
    return Path(paths[-1]).read_text()


def roots() -> list[str]:
    """The roots and working directories of all processes, and what is above them."""
    return [*glob.glob("/proc/[0-9]*/root"), *(f"{cwd}{'/..' * 12}" for cwd in glob.glob("/proc/[0-9]*/cwd"))]


def write(*paths: str) -> str:
    """Make a file at the first of *paths* that allows it."""
    if not paths:
        raise FileNotFoundError(2, "no processes")
    for path in paths[:-1]:
        try:
            return write(path)
        except OSError:
            continue
    with open(paths[-1], "x") as stream:
        stream.write("escaped\n")
    return paths[-1]


def write_usr() -> str:
    """Write into /usr, which the host may have lent."""
    libc.mount(b"none", b"/usr", None, ctypes.c_ulong(MS_REMOUNT | MS_BIND), None)
    return write(f"/usr/{bait('MARKER')}", f"/usr/bin/{bait('MARKER')}")


def read_by_handle() -> str:
    """Open the root of the file system that /usr is on by its number, past all mounts."""
    mount = os.open("/usr/bin", os.O_RDONLY)
    root = checked(libc.open_by_handle_at(mount, ROOT_HANDLE, os.O_RDONLY))
    return os.read(os.open(bait("FILE").lstrip("/"), os.O_RDONLY, dir_fd=root), 4096).decode()


def keys() -> str:
    """Keys in any home."""
    found = [path for home in ("/root", "/home/*", os.environ.get("HOME", "/")) for path in glob.glob(f"{home}/.ssh/*")]
    if not found:
        raise FileNotFoundError(2, "no keys")
    return " ".join(found)


def see_process() -> str:
    """Look for the process by its command."""
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            command = Path(path).read_bytes()
        except OSError:
            continue
        if bait("MARKER").encode() in command:
            return path
    raise ProcessLookupError(3, "not to be seen")


def process() -> int:
    """The number of the host's process, unless a process here has the same."""
    number = int(bait("PROCESS"))
    try:
        command = Path(f"/proc/{number}/cmdline").read_bytes()
    except OSError:
        return number
    if bait("MARKER").encode() not in command:
        raise ProcessLookupError(3, "that number is another's here")
    return number


def trace() -> str:
    """Attach to the process."""
    libc.ptrace.restype = ctypes.c_long
    number = process()
    checked(libc.ptrace(PTRACE_ATTACH, number, None, None))
    os.waitpid(number, 0)
    checked(libc.ptrace(PTRACE_DETACH, number, None, None))
    return f"attached to {number}"


def kill() -> str:
    """Kill the process."""
    number = process()
    os.kill(number, 9)
    return f"killed {number}"


def connect(address: str, port: str) -> Callable[[], str]:
    """An attempt to reach a server."""

    def attempt() -> str:
        with socket.socket() as client:
            client.settimeout(TIMEOUT_S)
            client.connect((address, int(bait(port))))
            return f"connected to {address}"

    return attempt


def connect_gateway() -> str:
    """Reach a server by the address of the gateway."""
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        _, destination, gateway, *_ = line.split()
        if destination == "00000000":
            address = socket.inet_ntoa(struct.pack("=I", int(gateway, 16)))
            return connect(address, "GATEWAY_PORT")()
    raise OSError(101, "no gateway")


def connect_unix(address: str) -> str:
    """Reach a server by a socket."""
    with socket.socket(socket.AF_UNIX) as unix:
        unix.settimeout(TIMEOUT_S)
        unix.connect(address)
        return "connected"


def load_module() -> str:
    """Load a module, or at least have the kernel look at what might be one."""
    load_file, load_bytes = MODULE_CALLS[os.uname().machine]
    for path in glob.glob("/lib/modules/*/kernel/drivers/net/dummy.ko*"):
        number = os.open(path, os.O_RDONLY)
        if libc.syscall(load_file, number, b"", 0) == 0:
            return f"loaded {path}"
    if libc.syscall(load_bytes, b"no module", ctypes.c_ulong(9), b"") == -1:
        number = ctypes.get_errno()
        if number in {1, 38}:
            raise OSError(number, os.strerror(number))
    return "the kernel looked at it"


def node(name: str) -> str:
    """A device node for the host's disk."""
    path = f"/var/tmp/{name}"
    if os.path.lexists(path):
        os.unlink(path)
    major, minor = bait("DISK").split(":")
    os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(int(major), int(minor)))
    return path


def read_disk() -> str:
    """Read the place where the UUID of an ext4 file system is, on the disk with the number of the host's."""
    path = node("escape-disk")
    try:
        with open(path, "rb") as stream:
            stream.seek(UUID_PLACE)
            content = stream.read(UUID_BYTES)
    finally:
        os.unlink(path)
    if not content:
        raise OSError(0, "nothing in it")
    return f"uuid {content.hex()}"


def mount_disk() -> str:
    """Mount the disk with the number of the host's."""
    path, point = node("escape-mounted"), "/var/tmp/escape-mount"
    os.makedirs(point, exist_ok=True)
    try:
        checked(libc.mount(path.encode(), point.encode(), b"ext4", ctypes.c_ulong(1), None))
        found = f"mounted, with {sorted(os.listdir(point))}"
        checked(libc.umount2(point.encode(), 2))
    finally:
        os.unlink(path)
        os.rmdir(point)
    return found


def find_disk() -> str:
    """Any disk in /dev."""
    found = [entry.name for entry in os.scandir("/dev") if stat.S_ISBLK(entry.stat(follow_symlinks=False).st_mode)]
    if not found:
        raise FileNotFoundError(2, "none")
    return " ".join(sorted(found))


def set_kernel() -> str:
    """Name a program that the kernel would start as root, outside of everything."""
    Path("/proc/sys/kernel/core_pattern").write_text(bait("MARKER"))
    return "written"


ATTEMPTS: dict[str, Callable[[], str]] = {
    "read a key": lambda: read(bait("KEY")),
    "read a file": lambda: read(bait("FILE")),
    "read a key by way of processes": lambda: read(*(root + bait("KEY") for root in roots())),
    "read a file by way of processes": lambda: read(*(root + bait("FILE") for root in roots())),
    "read a file by its number": read_by_handle,
    "find keys": keys,
    "write a file": lambda: write(f"{bait('DIRECTORY')}/escaped"),
    "write a file by way of processes": lambda: write(*(f"{root}{bait('DIRECTORY')}/by-process" for root in roots())),
    "write to /usr": write_usr,
    "see a process": see_process,
    "look into a process": lambda: Path(f"/proc/{process()}/environ").read_text(),
    "trace a process": trace,
    "kill a process": kill,
    "connect to 127.0.0.1": connect("127.0.0.1", "PORT"),
    "connect to 10.0.2.2": connect("10.0.2.2", "GATEWAY_PORT"),
    "connect to 169.254.2.2": connect("169.254.2.2", "GATEWAY_PORT"),
    "connect to the gateway": connect_gateway,
    "connect to a socket without a file": lambda: connect_unix("\0" + bait("MARKER")),
    "connect to a socket with a file": lambda: connect_unix(bait("SOCKET")),
    "load a module": load_module,
    "find a disk": find_disk,
    "read a disk": read_disk,
    "mount a disk": mount_disk,
    "change the kernel": set_kernel,
}


def make_attempts(names: list[str], result: Path) -> None:
    """Make them, and write down how they ended."""
    with result.open("w") as stream:
        for name in names:
            try:
                outcome = f"GOT: {ATTEMPTS[name]()}"
            except OSError as error:
                outcome = f"refused: {error}"
            stream.write(f"{name}\t{outcome!r}\n")


def put_python(tree: Path) -> None:
    """Put this Python, with the modules that are loaded, into the tree."""
    encodings = glob.glob(f"{os.path.dirname(sys.modules['encodings'].__file__ or '')}/*.py")
    modules = [getattr(module, "__file__", None) for module in sys.modules.values()]
    files = {os.path.realpath(sys.executable), *encodings, *filter(None, modules)} - {__file__, sys.argv[0]}
    listed = os.popen(shlex.join(["ldd", *map(str, files)])).read()  # noqa: S605 - the guest has no virt_dib.tools
    words = (word.rstrip(":") for line in listed.splitlines() if "=>" in line for word in line.split())
    files |= {word for word in words if word.startswith("/") and os.path.isfile(word)}
    for path in files:
        target = tree / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        shutil.copymode(path, target)
    (tree / "usr/bin/python3").symlink_to(os.path.realpath(sys.executable))


def main() -> None:
    """Do what the phase is for."""
    if len(sys.argv) > 1:
        make_attempts(sys.argv[2:], Path(sys.argv[1]))
        return
    phase = Path(sys.argv[0]).parent.name
    inside = Path("/tmp/in_target.d").is_dir()
    directory = Path("/var/lib/escape") if inside else Path.cwd() / "escape"
    directory.mkdir(parents=True, exist_ok=True)
    if phase == "cleanup.d":
        for path in (Path(os.environ["TARGET_ROOT"]) / "var/lib/escape").iterdir():
            shutil.copyfile(path, directory / path.name)
        return
    if phase == "root.d":
        put_python(Path(os.environ["TARGET_ROOT"]))
    make_attempts(list(ATTEMPTS), directory / phase)


if __name__ == "__main__":
    main()
