# SPDX-License-Identifier: Apache-2.0
"""The first process of extra-data.d on the host: it shows the host read-only, then runs jobs.

    host-init.py PLACES       PLACES is JSON, see Places

Standard input is a socket to virt-dib, which says and hears there what sandbox-init.py has in 'serve'. What is
alike is used from that program.

The id 0 of this user namespace is the user, who so may read what the user may; the sandbox's other ids are as in
the sandbox, and its root is OTHER_ROOT here. Scripts write to four places, and nothing of theirs outlives virt-dib.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import socket
import stat
import struct
import sys
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

CAPABILITIES = (0, 1, 2, 3, 4, 5, 6, 7, 18, 31)
"""CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, KILL, SETGID, SETUID, SYS_CHROOT, SETFCAP: rights over the
tree. Without SYS_ADMIN nobody can mount, and so undo what is read-only."""
HIDDEN = ("run", "tmp", "var/tmp")
"""Where the sockets of other programs are, and their files. They are replaced by empty directories."""
OWN = ("dev", "dib", "proc", *HIDDEN)
RUNNING_SOCKETS = "/proc/net/unix"
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_RESTRICT_SELF = 444, 446
LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET = 1
PR_SET_NO_NEW_PRIVS = 38


@dataclass(frozen=True)
class Places:
    """Paths on the host, those that are written to without links on the way."""

    network: bool
    """Whether the scripts have the host's network, or none."""
    runner: str
    """Seen as /dib, read-only; with mount points for the build's directories in it."""
    build: str
    """Where the scripts see the tree and the hooks, as ``mnt`` and ``hooks`` in a directory below /dib."""
    content: str
    """The directory with both, ``mnt`` and ``hooks``, in which scripts of the build may have made links."""
    temporary: str
    """Seen as /tmp and /var/tmp."""
    cache: str
    """The image cache."""
    shown: list[str]
    """What is to be seen of the directories that are hidden."""
    sockets: list[str]
    """The sockets that may be connected to."""
    files: dict[str, str]
    """What is seen instead of files and directories of the host."""


def load_sandbox_init() -> ModuleType:
    """The program beside this one."""
    sys.dont_write_bytecode = True
    loader = SourceFileLoader("sandbox_init", str(Path(__file__).with_name("sandbox-init.py")))
    spec = spec_from_loader("sandbox_init", loader)
    if spec is None:
        raise AssertionError
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


inner = load_sandbox_init()
seccomp = inner.Seccomp()


def opened(path: str) -> int:
    """A descriptor of a file or directory, for a time when something is mounted over it."""
    return os.open(path, os.O_PATH | os.O_CLOEXEC)


def opened_below(path: str, *names: str) -> int:
    """As :func:`opened`, of a directory whose last *names* must not be links."""
    flags = os.O_PATH | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW
    descriptor = opened(path)
    for name in names:
        descriptor = os.open(name, flags, dir_fd=descriptor)
    return descriptor


def bind(source: int, target: str, *, read_only: bool = False) -> None:
    """Show what is open as *source*."""
    inner.mount(f"/proc/self/fd/{source}", target, flags=inner.MS_BIND)
    inner.restrict(
        target,
        inner.MOUNT_ATTR_NOSUID | inner.MOUNT_ATTR_NODEV | (inner.MOUNT_ATTR_RDONLY if read_only else 0),
    )


def is_hidden(path: str) -> bool:
    """Whether *path* is in one of the directories that are replaced."""
    return any(path.startswith(f"/{name}/") for name in HIDDEN)


def make_place(source: int, target: str) -> None:
    """Make something to mount on, where nothing is."""
    if os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if stat.S_ISDIR(os.fstat(source).st_mode):
        os.mkdir(target)
    else:
        os.mknod(target, 0o644 | stat.S_IFREG)


def show_host() -> None:
    """Bind the directories at the host's top in the working directory, but for OWN."""
    for name in os.listdir("/"):
        state = os.lstat(f"/{name}")
        if stat.S_ISLNK(state.st_mode):
            os.symlink(os.readlink(f"/{name}"), name)
        elif stat.S_ISDIR(state.st_mode) and name not in OWN:
            os.mkdir(name)
            inner.bind_read_only(f"/{name}", name)
    for name in OWN:
        os.makedirs(name, exist_ok=True)


def running_sockets() -> list[str]:
    """The files of sockets that programs of the host have."""
    with open(RUNNING_SOCKETS, errors="surrogateescape") as stream:
        paths = {line.rstrip("\n").split(" ", 7)[-1].strip() for line in stream.readlines()[1:]}
    return sorted({os.path.realpath(path) for path in paths if path.startswith("/")})


def hide_sockets(sockets: list[str], allowed: list[str]) -> None:
    """Cover *sockets* as far as they can be seen: who listens there could do what a script may not."""
    for path in sockets:
        with contextlib.suppress(OSError):
            if path not in allowed and stat.S_ISSOCK(os.lstat(f".{path}").st_mode):
                inner.mount("/dev/null", f".{path}", flags=inner.MS_BIND)


def make_root(places: Places) -> None:
    """Make the root file system and change into it."""
    inner.mount("none", "/", flags=inner.MS_REC | inner.MS_PRIVATE)
    sockets = running_sockets()
    shown = {path: opened(path) for path in places.shown if is_hidden(path) and os.path.exists(path)}
    replaced = {path: opened(source) for path, source in places.files.items() if os.path.exists(path)}
    runner, temporary, cache = opened(places.runner), opened(places.temporary), opened(places.cache)
    content = {name: opened_below(places.content, "build", name) for name in ("mnt", "hooks")}
    inner.mount("host", inner.NEW_ROOT, "tmpfs", inner.MS_NOSUID | inner.MS_NODEV, "mode=755")
    os.chdir(inner.NEW_ROOT)
    show_host()
    bind(temporary, "tmp")
    bind(temporary, "var/tmp")
    for path, source in shown.items():
        make_place(source, f".{path}")
        bind(source, f".{path}", read_only=True)
    for path, source in replaced.items():
        bind(source, f".{os.path.realpath(path)}", read_only=True)
    make_place(cache, f".{places.cache}")
    bind(cache, f".{places.cache}")
    bind(runner, "dib", read_only=True)
    hide_sockets(sockets, places.sockets)
    for name, source in content.items():
        bind(source, f".{places.build}/{name}")
    inner.make_devices()
    inner.mount("proc", "proc", "proc", inner.MS_NOSUID | inner.MS_NODEV | inner.MS_NOEXEC | inner.MS_RDONLY)
    change_root()


def change_root() -> None:
    """Make the working directory the root, and nothing in it writable that is not mounted there."""
    number = seccomp.number("pivot_root")
    inner.checked(inner.libc.syscall(number, b".", b"."), "changing the root")
    inner.checked(inner.libc.umount2(b".", inner.MNT_DETACH), "leaving the old root")
    os.chdir("/")
    attributes = struct.pack("4Q", inner.MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    result = inner.libc.syscall(inner.SYS_MOUNT_SETATTR, inner.AT_FDCWD, b"/", 0, attributes, size)
    inner.checked(result, "making the root read-only")


def confine() -> None:
    """Give up what the scripts do not need."""
    inner.libc.syscall(seccomp.number("keyctl"), inner.KEYCTL_JOIN_SESSION_KEYRING, None)
    inner.checked(inner.libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "giving up new rights")
    forbid_abstract_sockets()
    inner.drop_capabilities(CAPABILITIES)
    seccomp.load_refusals()
    inner.checked(inner.libc.prctl(inner.PR_SET_DUMPABLE, 0, 0, 0, 0), "hiding")
    inner.die_with_parent()


def forbid_abstract_sockets() -> None:
    """Keep the scripts from the sockets without a file that programs of the host have, where Landlock can (Linux 6.12).

    They belong to the network, which is the host's.
    """
    rules = struct.pack("3Q", 0, 0, LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET)
    ruleset = inner.libc.syscall(SYS_LANDLOCK_CREATE_RULESET, rules, ctypes.c_size_t(len(rules)), 0)
    if ruleset >= 0:
        inner.checked(inner.libc.syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0), "keeping to own sockets")
        os.close(ruleset)


def serve(control: socket.socket, places: Places) -> None:
    """Be the place."""
    namespaces = inner.CLONE_NEWNS | inner.CLONE_NEWPID | inner.CLONE_NEWIPC | inner.CLONE_NEWCGROUP
    if not places.network:
        namespaces |= inner.CLONE_NEWNET
    inner.enter_user_namespace(control, namespaces)
    child = os.fork()
    if child != 0:
        control.close()
        inner.die_with_parent()
        os.waitpid(child, 0)
        os._exit(0)
    os.set_inheritable(control.fileno(), False)  # noqa: FBT003 - the function takes it so
    os.umask(0o022)
    inner.become_root()
    inner.forbid_user_namespaces()
    make_root(places)
    confine()
    control.send(b"ready")
    inner.run_jobs(control, None)


def main() -> None:
    """Do it; a failure is told, not raised."""
    control = socket.socket(fileno=0)
    try:
        serve(control, Places(**json.loads(sys.argv[1])))
    except OSError as error:
        doing = error.filename or "starting"
        with contextlib.suppress(OSError):
            control.send(f"failed {doing}: {error.strerror or errno.errorcode.get(error.errno or 0, '?')}".encode())
        os._exit(1)


if __name__ == "__main__":
    main()
