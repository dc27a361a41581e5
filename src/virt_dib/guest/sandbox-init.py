# SPDX-License-Identifier: Apache-2.0
"""The first process of a sandbox: it makes the namespaces, the root file system and the limits, then runs jobs.

    sandbox-init.py probe             try what a sandbox needs; print the first step that fails, and its errno
    sandbox-init.py own COMMAND...    run COMMAND as root of a new user namespace
    sandbox-init.py guard COMMAND...  run COMMAND until standard input ends
    sandbox-init.py net RESOLVER      hold a network namespace, and a mount namespace in which the file RESOLVER is the
                                      host's resolv.conf
    sandbox-init.py serve NAMESERVER BYTES
                                      be the sandbox; the working directory, or a copy of it in so many bytes of
                                      memory, is to be seen as /dib in it

Standard input of 'own', 'net' and 'serve' is a socket to virt-dib, which writes the maps of ids between 'unshared'
and 'go':

    here to virt-dib   unshared | ready | output + descriptor | exit STATUS | failed REASON
    virt-dib to here   go | job + descriptors of the job's text and of its standard input

Everything ends when virt-dib does: the socket closes, and the kernel kills this process together with its
parent. It must not import anything after it has changed the root, for Python may not be there any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import stat
import struct
import sys
from collections.abc import Iterator, Sequence

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
SYS_MOUNT_SETATTR = 442
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
CAPABILITY_VERSION_3 = 0x20080522
KEYCTL_JOIN_SESSION_KEYRING = 1
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1

NEW_ROOT = "/tmp"  # noqa: S108 - a mount point that every host has; nothing is written to it
HOST_ETC = "run/host-etc"
SYSTEM_DIRS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32", "libo32")
OWN_DIRS = ("dev", "dib", "etc", "home", "media", "mnt", "opt", "proc", "root", "run/lock", "srv", "sys", "tmp",
            "usr", "var/cache", "var/lib", "var/log", "var/tmp", HOST_ETC)  # fmt: skip
DEVICES = ("full", "null", "random", "tty", "urandom", "zero")
DEVICE_LINKS = {
    "core": "/proc/kcore",
    "fd": "/proc/self/fd",
    "ptmx": "pts/ptmx",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}
SETUP = ("/bin/bash", "/dib/guest/sandbox-setup.sh")
SYSTEM_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}

MAKING_USER_NAMESPACE = "making a user namespace"

CAPABILITIES = (
    0,  # CHOWN
    1,  # DAC_OVERRIDE
    2,  # DAC_READ_SEARCH
    3,  # FOWNER
    4,  # FSETID
    5,  # KILL
    6,  # SETGID
    7,  # SETUID
    8,  # SETPCAP
    10,  # NET_BIND_SERVICE
    14,  # IPC_LOCK
    15,  # IPC_OWNER
    18,  # SYS_CHROOT
    19,  # SYS_PTRACE: start-stop-daemon and the like look at /proc/PID/exe of other users' processes
    21,  # SYS_ADMIN: mount
    23,  # SYS_NICE
    27,  # MKNOD: for FIFOs it is not needed, and for devices it does not help
    28,  # LEASE
    29,  # AUDIT_WRITE
    31,  # SETFCAP
)
"""What a build may do in its own namespaces. Not among them: NET_ADMIN and NET_RAW, behind which most of the
kernel's network code lies, and SYS_RESOURCE, with which a build could allow itself user namespaces again."""

REFUSED_CALLS = (
    "acct", "add_key", "adjtimex", "bpf", "clock_adjtime", "clock_adjtime64", "clock_settime", "clock_settime64",
    "delete_module", "finit_module", "init_module", "io_uring_enter", "io_uring_register", "io_uring_setup", "ioperm",
    "iopl", "kexec_file_load", "kexec_load", "keyctl", "lookup_dcookie", "nfsservctl", "open_by_handle_at",
    "perf_event_open", "pidfd_getfd", "quotactl", "quotactl_fd", "reboot", "request_key", "settimeofday", "stime",
    "swapoff", "swapon", "syslog", "userfaultfd", "vm86", "vm86old",
)  # fmt: skip
"""Answered with EPERM. None is needed to install packages; many were the way into the kernel."""
NODE_CALLS = {"mknod": 1, "mknodat": 2}
"""The calls that make device nodes, and where their mode stands among the arguments. See :class:`Nodes`."""
REFUSED_FAMILIES = (38, 40)
"""Sockets that network namespaces do not keep apart: AF_ALG, the kernel's ciphers; AF_VSOCK, other machines."""
SKIPPED_CALLS = ("fdatasync", "fsync", "msync", "sync", "sync_file_range", "syncfs")
"""Answered with success: a build that the power leaves is lost anyway, and dpkg syncs every file."""
NOTIFICATION = struct.Struct("QII iIQ6Q")
"""struct seccomp_notif: id, process, flags; number, architecture and place of the call; its arguments."""
RESPONSE = struct.Struct("QqiI")
"""struct seccomp_notif_resp: id, value, error, flags."""
SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND = 0xC0502100, 0xC0182101
SECCOMP_USER_NOTIF_FLAG_CONTINUE = 1
NODE_ATTRIBUTE = "user.virt-dib.node"
"""Says that an empty file stands for a device node: 'c' or 'b', major and minor number."""
PATH_BYTES = 4096

FOREIGN_ARCHITECTURES = {"x86_64": (b"x86", b"x32"), "aarch64": (b"arm",)}
"""Whose programs the processor runs besides its own, by the machine's name."""
MULTIPLEXED = b"x86"
"""Where C libraries make sockets with 'socketcall', whose arguments no filter can see. libseccomp makes of a rule for
one family that there are no sockets at all, and so no network for the 32-bit programs of a tree."""

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, doing: str) -> int:
    """What a C function returned, unless it failed."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), doing)
    return result


def unshare(flags: int, doing: str) -> None:
    """Leave some of the namespaces for new ones."""
    checked(libc.unshare(flags), doing)


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, options: str = "") -> None:
    """Mount, with the arguments of the system call."""
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind)]
    checked(libc.mount(*words, ctypes.c_ulong(flags), os.fsencode(options)), f"mounting '/{target.lstrip('/')}'")


def bind_read_only(source: str, target: str) -> None:
    """Show a file or directory of the host with all that is mounted in it, to be read only."""
    mount(source, target, flags=MS_BIND | MS_REC)
    restrict(target, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)


def restrict(target: str, attributes: int) -> None:
    """Give a mount, and those in it, more MOUNT_ATTR."""
    change = struct.pack("4Q", attributes, 0, 0, 0)
    result = libc.syscall(
        SYS_MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), AT_RECURSIVE, change, ctypes.c_size_t(len(change))
    )
    checked(result, f"restricting the mount '{target}'")


def die_with_parent() -> None:
    """Be killed when the parent is. A change of ids undoes it, so it comes after the last one."""
    checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "asking for a signal")


@contextlib.contextmanager
def exec_or_exit() -> Iterator[None]:
    """For a child that is to become another program, and must never run on as a copy of this one."""
    try:
        yield
    finally:
        os._exit(127)


def execute(command: list[str], environment: dict[str, str] = SYSTEM_ENVIRONMENT) -> None:
    """Become another program, without the signals that Python ignores."""
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD):
        signal.signal(ignored, signal.SIG_DFL)
    os.execvpe(command[0], command, environment)  # noqa: S606 - that is what this program is for


def become_root() -> None:
    """Take the ids 0 of the user namespace."""
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


# ---- the limits ----


class Comparison(ctypes.Structure):
    """libseccomp's struct scmp_arg_cmp."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("value", ctypes.c_uint64),
        ("second_value", ctypes.c_uint64),
    )


class Seccomp:
    """libseccomp, which knows the numbers of system calls on every processor."""

    ALLOW = 0x7FFF0000
    NOTIFY = 0x7FC00000
    EQUAL, MASKED_EQUAL = 4, 7
    NO_NEW_PRIVILEGES = 3

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
        self._library.seccomp_init.restype = ctypes.c_void_p

    @staticmethod
    def error(number: int) -> int:
        """The action that makes a call fail with an errno; with 0 it does nothing and succeeds."""
        return 0x00050000 | number

    def number(self, name: str) -> int:
        """A system call's number."""
        found: int = self._library.seccomp_syscall_resolve_name(name.encode())
        return found

    def is_call(self, name: str, number: int, architecture: int) -> bool:
        """Whether that number is the call *name* on that architecture."""
        found: int = self._library.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(architecture), name.encode())
        return found == number

    def load(self) -> int:
        """Put the filter on this process and all that come from it; return what tells of calls for nodes."""
        context = self._refusals()
        # setuid programs of the tree are to work. This leaves them to it, and takes CAP_SYS_ADMIN instead.
        self._library.seccomp_attr_set(context, self.NO_NEW_PRIVILEGES, ctypes.c_uint32(0))
        for name in SKIPPED_CALLS:
            self._add(context, self.error(0), name)
        for name, place in NODE_CALLS.items():
            for kind in (stat.S_IFCHR, stat.S_IFBLK):
                comparison = Comparison(place, self.MASKED_EQUAL, stat.S_IFMT(0xFFFF), kind)
                self._add(context, self.NOTIFY, name, comparison)
        self._load(context)
        listener: int = self._library.seccomp_notify_fd(context)
        return listener

    def load_refusals(self) -> None:
        """Put only what refuses calls on this process and all that come from it; they cannot gain rights any more."""
        self._load(self._refusals())

    def _refusals(self) -> ctypes.c_void_p:
        library = self._library
        context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(self.ALLOW)))
        foreign = FOREIGN_ARCHITECTURES.get(os.uname().machine, ())
        # A rule is for the architectures that are there when it is added.
        self._add_architectures(context, [name for name in foreign if name != MULTIPLEXED])
        if library.seccomp_arch_native() != library.seccomp_arch_resolve_name(MULTIPLEXED):
            for family in REFUSED_FAMILIES:
                self._add(context, self.error(errno.EAFNOSUPPORT), "socket", Comparison(0, self.EQUAL, family, 0))
        self._add_architectures(context, [name for name in foreign if name == MULTIPLEXED])
        for name in REFUSED_CALLS:
            self._add(context, self.error(errno.EPERM), name)
        return context

    def _add_architectures(self, context: ctypes.c_void_p, names: Sequence[bytes]) -> None:
        for name in names:
            self._library.seccomp_arch_add(context, ctypes.c_uint32(self._library.seccomp_arch_resolve_name(name)))

    def _load(self, context: ctypes.c_void_p) -> None:
        result = self._library.seccomp_load(context)
        if result < 0:
            raise OSError(-result, os.strerror(-result), "loading the filter of system calls")

    def _add(self, context: ctypes.c_void_p, action_number: int, name: str, *comparisons: Comparison) -> None:
        call = self.number(name)
        if call == -1:
            return  # newer than this libseccomp
        action = ctypes.c_uint32(action_number)
        array = (Comparison * len(comparisons))(*comparisons)
        result = self._library.seccomp_rule_add_array(context, action, call, len(comparisons), array)
        if result not in (0, -errno.EDOM):
            raise OSError(-result, os.strerror(-result), f"filtering the system call '{name}'")


def drop_capabilities(capabilities: Sequence[int] = CAPABILITIES) -> None:
    """Keep *capabilities*, for this process and all that come from it."""
    with open("/proc/sys/kernel/cap_last_cap") as stream:
        last = int(stream.read())
    for capability in range(last + 1):
        if capability not in capabilities:
            checked(libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0), "dropping a capability")
    kept = sum(1 << capability for capability in capabilities)
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    checked(libc.capset(header, struct.pack("6I", low, low, 0, high, high, 0)), "dropping capabilities")


def forbid_user_namespaces() -> None:
    """No namespaces in the namespace: a new one would come with all capabilities."""
    with contextlib.suppress(FileNotFoundError), open("/proc/sys/user/max_user_namespaces", "w") as stream:
        stream.write("0")


def forget_arguments() -> None:
    """Take the places on the host out of what others see as this process's command."""
    with open("/proc/self/stat") as stream:
        # Counted from the third field, after a name that may hold anything (proc(5): arg_start, arg_end).
        fields = stream.read().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])
    ctypes.memset(begin, 0, end - begin)
    ctypes.memmove(begin, b"init", 4)


def confine(seccomp: Seccomp) -> int:
    """Give up what a build does not need; return what tells of calls for device nodes."""
    forget_arguments()
    libc.syscall(seccomp.number("keyctl"), KEYCTL_JOIN_SESSION_KEYRING, None)
    forbid_user_namespaces()
    drop_capabilities()
    listener = seccomp.load()
    # Nothing in the sandbox may look into this process, which holds the socket.
    checked(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "hiding")
    die_with_parent()
    return listener


# ---- device nodes ----


class Nodes:
    """Stand-ins for the device nodes that packages make, which a user namespace does not allow.

    The call succeeds and leaves an empty file with an extended attribute that says what it stands for. It becomes
    the node when the build disk is made, by ``sandbox-restore.py``.
    """

    def __init__(self, seccomp: Seccomp, listener: int) -> None:
        self._seccomp = seccomp
        self.listener = listener

    def answer(self) -> None:
        """Answer one call."""
        request = bytearray(NOTIFICATION.size)
        try:
            fcntl.ioctl(self.listener, SECCOMP_IOCTL_NOTIF_RECV, request)
        except OSError:
            return  # the caller has been killed meanwhile
        number, process, _, call, architecture, _, *arguments = NOTIFICATION.unpack(request)
        if self._seccomp.is_call("mknodat", call, architecture):
            directory, path, mode, device = arguments[:4]
        else:
            directory, (path, mode, device) = AT_FDCWD, arguments[:3]
        device &= 0xFFFFFFFF
        if stat.S_ISCHR(mode) and device == 0:
            # What overlayfs takes for a removed file is no device, and allowed.
            response = (number, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE)
        else:
            directory = ctypes.c_int(directory & 0xFFFFFFFF).value
            response = (number, 0, -self._make(process, directory, path, mode & 0xFFFF, device), 0)
        with contextlib.suppress(OSError):
            fcntl.ioctl(self.listener, SECCOMP_IOCTL_NOTIF_SEND, RESPONSE.pack(*response))

    def _make(self, process: int, directory: int, path: int, mode: int, device: int) -> int:
        """Make the file that *process* would have made; return an errno."""
        child = os.fork()
        if child == 0:
            try:
                stand_in(process, directory, path, mode, device)
            except OSError as error:
                os._exit(error.errno or errno.EPERM)
            except BaseException:  # noqa: BLE001 - this copy of the process must end here
                os._exit(errno.EPERM)
            os._exit(0)
        return shell_status(os.waitpid(child, 0)[1])


def stand_in(process: int, directory: int, path: int, mode: int, device: int) -> None:
    """Make a file for a device node, seeing the files as *process* does."""
    with open(f"/proc/{process}/status") as stream:
        status = dict(line.split(":", 1) for line in stream)
    if status["Uid"].split()[-1] != "0":
        raise PermissionError(errno.EPERM, "not root")
    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
        name = os.pread(memory.fileno(), PATH_BYTES, path).partition(b"\0")[0]
    root = os.open(f"/proc/{process}/root", os.O_PATH)
    place = "cwd" if directory == AT_FDCWD else f"fd/{directory}"
    base = os.open(f"/proc/{process}/{place}", os.O_PATH)
    os.fchdir(root)
    os.chroot(".")
    os.fchdir(base)
    os.umask(int(status["Umask"], 8))
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW
    file = os.open(name, flags, stat.S_IMODE(mode))
    kind = "b" if stat.S_ISBLK(mode) else "c"
    os.setxattr(file, NODE_ATTRIBUTE, f"{kind} {os.major(device)} {os.minor(device)}".encode())


# ---- the root file system ----


def make_devices() -> None:
    """/dev of some nodes of the host's, since a user namespace may not make any."""
    mount("dev", "dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755")
    for name in DEVICES:
        if os.path.exists(f"/dev/{name}"):
            with open(f"dev/{name}", "x"):
                pass
            mount(f"/dev/{name}", f"dev/{name}", flags=MS_BIND)
    for name, target in DEVICE_LINKS.items():
        os.symlink(target, f"dev/{name}")
    for name in ("pts", "shm"):
        os.mkdir(f"dev/{name}")
    # Without gid=5: the kernel shows that option with the number it has on the host, and tools pass it on to mount.
    mount("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,mode=620,ptmxmode=666")
    mount("shm", "dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")


def copy_into_memory(target: str, size_bytes: str) -> None:
    """Mount a file system in memory on *target*, with all that is in the working directory."""
    mount("build", target, "tmpfs", 0, f"mode=755,size={size_bytes}")
    child = os.fork()
    if child == 0:
        with exec_or_exit():
            execute(["cp", "-a", ".", target])
    if os.waitpid(child, 0)[1] != 0:
        raise OSError(errno.ENOSPC, "no space", "copying the build's files into memory")
    os.chdir(target)


def make_root(seccomp: Seccomp, memory_bytes: str) -> None:
    """Make the root file system and change into it."""
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    # From here on the working directory has no path: it may lie below this, and above it this user has no rights.
    mount("sandbox", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    for name in OWN_DIRS:
        os.makedirs(f"{NEW_ROOT}/{name}")
    if memory_bytes:
        copy_into_memory(f"{NEW_ROOT}/dib", memory_bytes)
    else:
        mount(".", f"{NEW_ROOT}/dib", flags=MS_BIND)
    for name in ("tmp", "var/tmp"):
        mount("tmp", f"{NEW_ROOT}/{name}", flags=MS_BIND)
    os.chdir(NEW_ROOT)
    bind_read_only("/usr", "usr")
    if os.path.isdir("usr/local"):
        mount("local", "usr/local", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    for name in SYSTEM_DIRS:
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), name)
        elif os.path.isdir(f"/{name}"):
            os.mkdir(name)
            bind_read_only(f"/{name}", name)
    bind_read_only("/etc", HOST_ETC)
    make_devices()
    mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("sysfs", "sys", "sysfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    checked(libc.syscall(seccomp.number("pivot_root"), b".", b"."), "changing the root")
    # The old root lies on top of the new one now.
    checked(libc.umount2(b".", MNT_DETACH), "leaving the old root")
    os.chdir("/dib")


def set_up(nameserver: str) -> None:
    """Name the machine, start its loopback network, and let the script do what a script can."""
    socket.sethostname("virt-dib")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        request = struct.pack("16sh22x", b"lo", 0)
        flags = struct.unpack_from("16sh", fcntl.ioctl(handle, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(handle, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | IFF_UP))
    child = os.fork()
    if child == 0:
        with exec_or_exit():
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            os.dup2(2, 1)
            execute([*SETUP, nameserver])
    status = os.waitpid(child, 0)[1]
    if status != 0:
        raise OSError(errno.ECANCELED, "the script failed", "preparing the sandbox")
    checked(libc.umount2(f"/{HOST_ETC}".encode(), MNT_DETACH), "leaving the host's /etc")
    os.rmdir(f"/{HOST_ETC}")


# ---- jobs ----


def start_job(text: int, standard_input: int, output: int) -> int:
    """Start a bash that reads *text*, with an empty environment; return its process."""
    child = os.fork()
    if child != 0:
        return child
    with exec_or_exit():
        os.setsid()
        # First out of the way of the numbers they are to get.
        targets = {standard_input: (0,), output: (1, 2), text: (3,)}
        moved = {fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, 10): numbers for source, numbers in targets.items()}
        for source, numbers in moved.items():
            for number in numbers:
                os.dup2(source, number)
        execute(["/bin/bash", "/proc/self/fd/3"], {})
    raise AssertionError


def ended() -> list[tuple[int, int]]:
    """The processes that have ended, orphans among them, and their statuses."""
    found = []
    with contextlib.suppress(ChildProcessError):
        while (pair := os.waitpid(-1, os.WNOHANG))[0] != 0:
            found.append(pair)
    return found


def shell_status(status: int) -> int:
    """A status as the shell counts it."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def take_job(control: socket.socket) -> int:
    """Start the job that virt-dib sends; return its process."""
    message, descriptors, _flags, _address = socket.recv_fds(control, 64, 2)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - the function takes it so
    if message != b"job" or len(descriptors) != 2:  # noqa: PLR2004 - text and standard input
        os._exit(0)  # virt-dib has gone, and the kernel ends everything here with this process
    # The pipe is made here, for scripts open it again as /dev/stderr, which its owner may.
    reader, writer = os.pipe()
    child = start_job(descriptors[0], descriptors[1], writer)
    socket.send_fds(control, [b"output"], [reader])
    for descriptor in (*descriptors, reader, writer):
        os.close(descriptor)
    return child


def run_jobs(control: socket.socket, nodes: Nodes | None) -> None:
    """Run one job after the other, and bury all that end."""
    listener = [nodes.listener] if nodes is not None else []
    wake_reader, wake_writer = os.pipe()
    for descriptor in (wake_reader, wake_writer):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    job = None
    while True:
        ready = select.select([control.fileno(), wake_reader, *listener], [], [])[0]
        if nodes is not None and nodes.listener in ready:
            nodes.answer()
        if wake_reader in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake_reader, 4096)
        for child, status in ended():
            if child == job:
                job = None
                control.send(f"exit {shell_status(status)}".encode())
        if control.fileno() in ready:
            job = take_job(control)


# ---- the uses ----


def enter_user_namespace(control: socket.socket, namespaces: int) -> None:
    """Make the namespaces, and wait until their ids are mapped and their network is there."""
    die_with_parent()
    unshare(CLONE_NEWUSER, MAKING_USER_NAMESPACE)
    if namespaces:
        unshare(namespaces, "making namespaces")
    control.send(b"unshared")
    if control.recv(16) != b"go":
        os._exit(1)


def own(control: socket.socket, command: list[str]) -> None:
    """Become *command*, as root over the ids of the sandbox and over the user's own."""
    enter_user_namespace(control, 0)
    become_root()
    die_with_parent()
    execute(command)


def net(control: socket.socket, resolver: str) -> None:
    """Hold a network namespace until virt-dib closes the socket."""
    enter_user_namespace(control, CLONE_NEWNET | CLONE_NEWNS)
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    if os.path.exists("/etc/resolv.conf"):
        mount(resolver, os.path.realpath("/etc/resolv.conf"), flags=MS_BIND)
    control.send(b"ready")
    control.recv(1)


def serve(control: socket.socket, nameserver: str, memory_bytes: str) -> None:
    """Be the sandbox."""
    seccomp = Seccomp()
    enter_user_namespace(control, NAMESPACES)
    child = os.fork()
    if child != 0:
        control.close()
        die_with_parent()
        os.waitpid(child, 0)
        os._exit(0)
    os.set_inheritable(control.fileno(), False)  # noqa: FBT003 - the function takes it so
    os.umask(0o022)
    become_root()
    make_root(seccomp, memory_bytes)
    set_up(nameserver)
    nodes = Nodes(seccomp, confine(seccomp))
    control.send(b"ready")
    run_jobs(control, nodes)


def guard(command: list[str]) -> None:
    """Run *command* for as long as the writer of standard input lives."""
    child = os.fork()
    if child == 0:
        with exec_or_exit():
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            execute(command)
    watched = os.pidfd_open(child)
    # With as many descriptors open as whoever has started this.
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(watched, select.POLLIN)
    poll.poll()
    os.kill(child, signal.SIGKILL)
    sys.exit(shell_status(os.waitpid(child, 0)[1]))


def probe() -> None:
    """Try each step that hosts are known to forbid, with one id only, for which no help is needed."""
    user, group = os.getuid(), os.getgid()
    unshare(CLONE_NEWUSER, MAKING_USER_NAMESPACE)
    unshare(NAMESPACES, "making namespaces")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as stream:
            stream.write(text)
    child = os.fork()
    if child != 0:
        sys.exit(shell_status(os.waitpid(child, 0)[1]))
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    mount("sandbox", NEW_ROOT, "tmpfs")
    os.chdir(NEW_ROOT)
    for name in ("usr", "proc", "sys"):
        os.mkdir(name)
    bind_read_only("/usr", "usr")
    mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("sysfs", "sys", "sysfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)


def main() -> None:
    """Do what the first argument says; a failure is told, not raised."""
    use, *arguments = sys.argv[1:]
    control = socket.socket(fileno=0) if use in ("net", "own", "serve") else None
    try:
        if use == "guard":
            guard(arguments)
        elif control is None:
            probe()
        elif use == "own":
            own(control, arguments)
        elif use == "net":
            net(control, *arguments)
        else:
            serve(control, *arguments)
    except OSError as error:
        doing = error.filename or "starting the sandbox"
        if control is None:
            sys.exit(f"{doing}: {errno.errorcode.get(error.errno or 0, '?')}")
        with contextlib.suppress(OSError):
            control.send(f"failed {doing}: {error.strerror}".encode())
        os._exit(1)


if __name__ == "__main__":
    main()
