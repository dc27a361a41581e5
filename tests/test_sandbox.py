# SPDX-License-Identifier: Apache-2.0
"""The sandbox, besides what any runner promises (test_jobs.py): what it keeps in, and what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from helpers import HANG_S, TESTS, many_descriptors, wait_until
from virt_dib import environment as contract
from virt_dib import namespaces, network, sandbox, staging, tools, unpacking, workspace
from virt_dib.errors import ApplianceError, Interrupted, PrerequisiteError, Problem
from virt_dib.interrupts import Cancellation, cancellable
from virt_dib.layout import guest_script
from virt_dib.sandbox import Sandbox, Settings, open_sandbox

pytestmark = pytest.mark.sandbox

PATH = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
GUEST = "/dib/guest"
DEVICES = {"full", "null", "random", "tty", "urandom", "zero"}


@pytest.fixture(scope="session", autouse=True)
def _sandboxes_work() -> None:
    found = [f"{problem.message} ({problem.hint})" for problem in sandbox.problems()]
    if found and os.environ.get("CI"):
        pytest.fail("\n".join(found))
    elif found:
        pytest.skip("\n".join(found))


def staged(directory: Path) -> Path:
    content = staging.Staging(directory / "staging")
    content.add_guest_scripts()
    return content.finish()


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A sandbox without network that the tests of this module share."""
    with open_sandbox(Settings(directory=staged(tmp_path_factory.mktemp("box")), network=False)) as running:
        yield running


def bash(box: Sandbox, text: str) -> tuple[int, str]:
    result = box.run(["/bin/bash", "-c", text], PATH, "/dib")
    return result.exit_status, result.tail


def test_output_streams_while_the_command_runs(box: Sandbox) -> None:
    # Read in one go at the end, they would be one piece.
    pieces: list[bytes] = []
    box.run(["/bin/bash", "-c", "echo first; sleep 2; echo last"], PATH, "/", on_output=pieces.append)
    assert pieces == [b"first\n", b"last\n"]


def test_a_program_with_many_files_open_has_sandboxes_too(tmp_path: Path) -> None:
    with many_descriptors(), open_sandbox(Settings(directory=staged(tmp_path), network=False)) as box:
        assert bash(box, "echo here; exit 3") == (3, "here\n")


def test_a_process_left_behind_that_still_prints(box: Sandbox) -> None:
    received = bytearray()
    text = "(trap '' PIPE; while :; do echo noise; done) & echo left it"
    assert box.run(["/bin/bash", "-c", text], PATH, "/", on_output=received.extend).exit_status == 0
    assert b"left it\n" in received
    assert bash(box, "kill -KILL -1; echo alone") == (0, "alone\n")


def test_more_files_beside_the_image_than_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "MOST_MEMBERS", 10)
    with open_sandbox(Settings(directory=staged(tmp_path), network=False)) as box:
        assert bash(box, "touch /dib/out/{1..11}") == (0, "")
        with pytest.raises(ApplianceError, match="the guest left more than 10 files beside the image"):
            box.make_build_disk(tmp_path / "build.img")


# ---- cancelling ----


def test_cancelling_ends_a_job_and_leaves_nothing_while_another_thread_goes_on(tmp_path: Path) -> None:
    cancellations = {name: Cancellation() for name in ("one", "two")}
    ready = {name: threading.Event() for name in cancellations}
    ended: dict[str, str] = {}

    def work(name: str) -> None:
        directory = tmp_path / name
        directory.mkdir()
        text = f"echo ready; sleep {1000 if name == 'one' else 3}"
        try:
            with (
                cancellable(cancellations[name]),
                open_sandbox(Settings(directory=staged(directory), network=False)) as box,
            ):
                result = box.run(["/bin/bash", "-c", text], PATH, "/", on_output=lambda _: ready[name].set())
                ended[name] = str(result.exit_status)
        except Interrupted:
            ended[name] = "interrupted"

    threads = {name: threading.Thread(target=work, args=[name]) for name in cancellations}
    for thread in threads.values():
        thread.start()
    assert all(event.wait(HANG_S) for event in ready.values())
    cancellations["one"].cancel()
    threads["one"].join()
    assert list((tmp_path / "one").iterdir()) == []
    threads["two"].join()
    assert ended == {"one": "interrupted", "two": "0"}


# ---- what is different from a build host, and made up for ----


def test_dev_can_be_bound_and_unbound(box: Sandbox) -> None:
    for bind in ("mount --bind /dev", "sudo mount -o bind /dev/"):
        text = f"""
            set -e; mkdir -p /dib/tmp/dev; cd /dib/tmp; {bind} dev
            mount -t devpts -o "$(findmnt --first-only /dev/pts --noheadings --output OPTIONS)" devpts dev/pts
            echo x >dev/null; head -c 3 dev/zero | wc -c; test -c dev/pts/ptmx
            grep -c " /dib/tmp/dev" /proc/self/mounts; umount dev/pts; umount -f dev; ls dev
            grep " /dib/tmp/dev" /proc/self/mounts || echo gone
        """
        assert bash(box, text) == (0, f"3\n{len(DEVICES) + 2}\ngone\n")


def test_a_new_tree_has_devices_while_something_runs_in_it(box: Sandbox) -> None:
    box.write("/dib/tmp/busybox", Path("/bin/busybox").read_bytes())
    text = """
        set -e; mkdir -p /dib/tmp/tree/dev; cd /dib/tmp/tree; cp ../busybox .; chmod 755 busybox
        sudo chroot . /busybox sh -c 'echo x >/dev/null; /busybox test -c /dev/urandom'
        chroot --userspec 5:6 . /busybox id -u; chroot . /busybox false || echo status $?
        ls dev; grep " /dib/tmp/tree" /proc/self/mounts || echo gone
    """
    assert bash(box, text) == (0, "5\nstatus 1\ngone\n")


def test_syncing_costs_nothing_and_succeeds(box: Sandbox) -> None:
    assert bash(
        box, "sync && sync --data /dib/guest && dd if=/dev/zero of=/dib/tmp/x count=1 conv=fsync status=none"
    ) == (
        0,
        "",
    )


# ---- the boundary ----

ATTEMPTS = {
    "read the user's home": "cat {secret}",
    "read it by way of another process": "cat /proc/[0-9]*/root{secret}",
    "read it through the old root": "cat /proc/1/cwd/../..{secret} || cat /dib/../..{secret}",
    "list homes": "ls /home/* /root/.[a-z]*",
    "write to /usr": "touch /usr/virt-dib-was-here",
    "write to /usr, mounted anew": "mount -o remount,rw,bind /usr; touch /usr/virt-dib-was-here",
    "see a process": "kill -0 {pid}",
    "look into the first process": "cat /proc/1/environ || ls /proc/1/fd/ || readlink /proc/1/exe",
    "stop the first process": "kill -KILL 1; kill -STOP 1; false",
    "reach the host's loopback": "echo >/dev/tcp/127.0.0.1/{port}",
    "reach a socket without a file": "python3 -c 'import socket as s; s.socket(s.AF_UNIX).connect(\"\\0{abstract}\")'",
    "reach another machine's socket": "python3 -c 'import socket; socket.socket(socket.AF_VSOCK)'",
    "use the kernel's ciphers": "python3 -c 'import socket; socket.socket(socket.AF_ALG)'",
    "listen to the network": "python3 -c 'import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)'",
    "load a module": "modprobe loop || insmod /lib/modules/*/kernel/drivers/block/loop.ko",
    "change the network": "ip link add dummy0 type dummy",
    "make a namespace of users": "unshare --user true",
    "read the kernel's messages": "dmesg",
    "change the kernel's settings": "echo 1 >/proc/sys/kernel/sysrq",
    "have more namespaces": "echo 100 >/proc/sys/user/max_user_namespaces",
    "press a key": "echo h >/proc/sysrq-trigger",
    "change the machine": "f=/sys/kernel/uevent_helper; mount -o remount,rw /sys; echo x >$f",
    "set the clock": "date -s 2001-01-01",
    "read a disk": "mknod /dib/tmp/disk b {disk} && head -c 1 /dib/tmp/disk | grep -q .",
    "mount a disk": "mknod /dib/tmp/disk2 b {disk}; mount /dib/tmp/disk2 /mnt",
    "reboot": "reboot -f",
    "see keys": "keyctl show || python3 -c 'import ctypes; exit(ctypes.CDLL(None).syscall(250, 0, -3, 0) < 0)'",
    "see the user's variables": "env -0 | grep -z VIRT_DIB_SECRET",
    "find the place on the host": "tr '\\0' '\\n' </proc/1/cmdline | grep /",
}  # fmt: skip


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_nothing_gets_out(box: Sandbox, attempt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o644)
    monkeypatch.setenv("VIRT_DIB_SECRET", "secret")
    abstract = f"virt-dib-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"\0{abstract}")
        unix.listen()
        text = ATTEMPTS[attempt].format(
            secret=secret, pid=os.getpid(), port=server.getsockname()[1], abstract=abstract, disk="8 0"
        )
        status, output = bash(box, f"{{ {text}; }} && echo BREACH")
    assert "BREACH" not in output
    assert "secret\n" not in output
    assert status != 0
    # It is still there, and as it was.
    assert bash(box, "echo here") == (0, "here\n")


def test_little_of_the_hosts_etc_is_there(box: Sandbox) -> None:
    status, output = bash(
        box, "cd /etc; find . -type f | grep -E 'shadow|ssh|ssl/private|sudoers|key$|auth' || echo none"
    )
    assert (status, output) == (0, "none\n")
    assert "nobody" not in bash(box, "stat -c %U /etc /etc/passwd /dib /dib/guest/sudo.sh /tmp /run")[1]


def test_capabilities_are_few(box: Sandbox) -> None:
    output = bash(box, "grep -E 'Cap(Bnd|Eff|Prm)|Seccomp:' /proc/self/status")[1]
    sets = {int(word, 16) for word in re.findall(r"Cap\w+:\?(\w+)", output)}
    assert len(sets) == 1
    (kept,) = sets
    net_admin, net_raw, sys_module, sys_resource, bpf, chown, sys_admin = 12, 13, 16, 24, 39, 0, 21
    assert not any(kept >> number & 1 for number in (net_admin, net_raw, sys_module, sys_resource, bpf))
    assert kept >> chown & 1
    assert kept >> sys_admin & 1
    assert "Seccomp:?2" in output


SOCKET_OF_32_BITS = """
import ctypes, mmap, struct
low, protection = 0x40, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
place = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | low, protection)
address = ctypes.addressof(ctypes.c_char.from_buffer(place))
# socketcall(SYS_SOCKET, {AF_INET, SOCK_STREAM, 0}) by the call gate of 32-bit programs.
code = struct.pack("<B BI BI BI HBB", 0x53, 0xB8, 102, 0xBB, 1, 0xB9, address + 64, 0x80CD, 0x5B, 0xC3)
place[: len(code)] = code
place[64:76] = struct.pack("<3I", 2, 1, 0)
print("socket" if ctypes.CFUNCTYPE(ctypes.c_int)(address)() >= 0 else "refused")
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only x86 has such programs and such a call")
def test_32_bit_programs_have_sockets(box: Sandbox) -> None:
    """Debian's C library for i386 makes them with a call whose arguments no filter can see."""
    command = ["/usr/bin/python3", "-c", SOCKET_OF_32_BITS]
    if tools.run(command, doing="trying it on the host", check=False).stdout != "socket\n":
        pytest.skip("this kernel runs no 32-bit programs")
    result = box.run(command, PATH, "/")
    assert (result.exit_status, result.tail) == (0, "socket\n")


# ---- the tree stage: what its phases see, tests/test_contract.py has ----


def test_nothing_is_mounted_on_the_finished_tree(box: Sandbox) -> None:
    text = f"""
        set -e; mkdir -p {contract.HOOKS} {contract.TREE}/bin; cd /dib
        {GUEST}/tree.sh after_root {contract.TREE} {contract.HOOKS} source
        ls {contract.TREE}/dev/pts; mount -t tmpfs none {contract.TREE}/bin
        {GUEST}/tree.sh set_aside {contract.TREE} {contract.BUILT}
        grep ' /dib/build/' /proc/self/mounts || echo none; cd {contract.BUILT}; ls -A dev proc sys bin
    """
    assert bash(box, text) == (0, "ptmx\nnone\nbin:\n\ndev:\n\nproc:\n\nsys:\n")


# ---- the build disk ----

MAKE_TREE = r"""
set -e; umask 022; mkdir -p /dib/build/built; cd /dib/build/built
echo x >last; chown 65535:65535 last; echo x >middle; chown 1:60000 middle
echo x >setuid; chown 5:6 setuid; chmod 6755 setuid; mkdir sticky shared; chmod 1777 sticky; chmod 2750 shared
cp /bin/true capable; setcap cap_net_raw+ep capable
echo x >attribute; setfattr -n user.name -v "a value" attribute
echo x >acl; setfacl -m u:1234:rwx,g:60000:r acl; setfacl -d -m u:77:rx sticky
echo x >hard1; ln hard1 hard2; ln hard1 sticky/hard3; ln -s hard1 soft; ln -s "$(printf 'y%.0s' {1..200})" long
mkfifo fifo; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("socket")'
truncate -s 1G sparse; echo end >>sparse
touch -- "$(printf 'latin \351')" "$(printf 'new\nline')" ' blank' -dash 'quote"' 'back\slash' "$(printf '\001\377')"
touch -d '2001-02-03 04:05:06.123456789Z' old; touch -h -d '2001-02-03 04:05:06.5Z' soft
touch -d '2039-02-03 04:05:06.987654321Z' future; touch -d '1950-01-01 00:00:00.25Z' past
touch -d '2001-02-03 04:05:06.75Z' shared
(umask 077; mknod console c 5 1); mknod -m 660 disk b 259 70000; chown 0:6 disk; ln console sticky/console2
touch -d '2001-02-03 04:05:06.5Z' disk; cp -a disk copied; mknod hidden c 0 0
setpriv --reuid=1000 --clear-groups mknod refused c 1 3 2>/dev/null || echo refused
mknod disk c 1 3 2>&1 | grep -o 'File exists'
"""


@pytest.fixture(scope="module", params=["on disk", "in memory"])
def build_disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Asks debugfs of a build disk made of MAKE_TREE, in which a process still writes and something is mounted."""
    directory = tmp_path_factory.mktemp("disk")
    disk = directory / "build.img"
    memory = sandbox.spare_memory_bytes() if request.param == "in memory" else None
    if request.param == "in memory" and memory is None:
        pytest.skip("not enough memory, or a kernel whose tmpfs has no attributes of users")
    with open_sandbox(Settings(directory=staged(directory), network=False, memory_bytes=memory)) as running:
        assert f"build {contract.GUEST} tmpfs" in bash(running, "cat /proc/self/mounts")[1] or memory is None
        assert bash(running, MAKE_TREE) == (0, "refused\nFile exists\n")
        left_behind = "setsid bash -c 'while :; do echo x >>/dib/tmp/more; done' & mount -t tmpfs none /dib/build/mnt"
        assert bash(running, f"{left_behind}; : >/dib/build/mnt/covering")[0] == 0
        with disk.open("xb") as stream:
            stream.truncate(staging.BUILD_DISK_BYTES)
        running.make_build_disk(disk)
    assert disk.stat().st_mode & 0o777 == 0o600
    assert disk.stat().st_size == staging.BUILD_DISK_BYTES
    assert disk.stat().st_blocks * 512 < 100 * 1024**2
    checked = tools.run([program("e2fsck"), "-fn", disk], doing="checking", check=False)
    assert checked.exit_status == 0, checked.stdout

    def debugfs(request: str) -> str:
        return tools.run([program("debugfs"), "-R", request, disk], doing="reading").stdout

    return debugfs


@pytest.mark.parametrize(
    ("options", "largest_bytes"),
    [
        (["-t", "ext4", "-b", "4096"], (1 << 44) - 4096),
        (["-t", "ext4", "-b", "1024"], (1 << 42) - 1024),
        (["-t", "ext3", "-b", "4096"], (12 + (1 << 10) + (1 << 20) + (1 << 30)) * 4096),
        (["-t", "ext2", "-b", "1024"], (12 + (1 << 8) + (1 << 16) + (1 << 24)) * 1024),
    ],
    ids=["ext4", "ext4-small-blocks", "ext3", "ext2-small-blocks"],
)
def test_a_file_that_is_too_long_for_a_file_system_is_not_made_empty(
    tmp_path: Path, options: list[str], largest_bytes: int
) -> None:
    """In memory, where a file can be so long."""
    disk, script = tmp_path / "disk", guest_script("sandbox-restore.py")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        tree = Path(memory) / "tree"
        (tree / "a").mkdir(parents=True)
        for size_bytes, status in [(largest_bytes, 0), (largest_bytes + 1, 5), (1 << 60, 5)]:
            (tree / "a/long\n").touch()
            os.truncate(tree / "a/long\n", size_bytes)
            command: list[str | Path] = [program("mke2fs"), "-q", "-F", *options, "-d", tree, disk, "64M"]
            tools.run(command, doing="making a file system")
            run = tools.run([sys.executable, "-I", "-S", script, tree, disk], doing="restoring", check=False)
            assert (run.exit_status, run.stdout) == (status, f"'/a/long\\n' has {size_bytes} bytes\n" if status else "")
            if status == 0:
                checked = tools.run([program("e2fsck"), "-fn", disk], doing="checking", check=False)
                assert checked.exit_status == 0, checked.stdout


def program(name: str) -> Path:
    return tools.require(name, purpose="look into images", package="e2fsprogs")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("last", [r"User: 65535 +Group: 65535", r"Mode: +0644"]),
        ("middle", [r"User: +1 +Group: 60000"]),
        ("setuid", [r"User: +5 +Group: +6 ", r"Mode: +06755"]),
        ("sticky", [r"Mode: +01777", r"Type: directory", r"posix_acl_default \(\d+\) = .*02 00 05 00 4d 00"]),
        ("shared", [r"Mode: +02750", r"mtime: 0x3a7b8372:b2d05e00"]),
        ("capable", [r"security\.capability \(20\) = 01 00 00 02 00 20 00 00"]),
        ("attribute", [r'user\.name \(7\) = "a value"']),
        ("acl", [r"posix_acl_access \(\d+\) = .*02 00 07 00 d2 04 .*08 00 04 00 60 ea"]),
        ("hard1", [r"Links: 3"]),
        ("soft", [r"Type: symlink", r'"hard1"', r"mtime: 0x3a7b8372:77359400"]),
        ("long", [r"Type: symlink", r"Size: 200"]),
        ("fifo", [r"Type: FIFO"]),
        ("socket", [r"Type: socket"]),
        ("sparse", [r"Size: 1073741828", r"Blockcount: 8$"]),
        ("old", [r"mtime: 0x3a7b8372:1d6f3454", r"atime: 0x3a7b8372:1d6f3454"]),
        ("future", [r"mtime: 0x81f505f2:eb79a2c5"]),
        ("past", [r"mtime: 0xda616280:3b9aca00"]),
        ("console", [r"Type: character special", r"Mode: +0600", r"number: 05:01", r"Links: 2"]),
        ("sticky/console2", [r"Type: character special", r"number: 05:01"]),
        ("disk", [r"Type: block special", r"Mode: +0660", r"Group: +6 ", r"259:70000", r"mtime: 0x3a7b8372:77359400"]),
        ("copied", [r"Type: block special", r"259:70000"]),
        ("hidden", [r"Type: character special", r"number: 00:00"]),
    ],
)
def test_metadata_survive(build_disk: Callable[[str], str], name: str, expected: list[str]) -> None:
    told = build_disk(f"stat /build/built/{name}")
    assert [pattern for pattern in expected if not re.search(pattern, told, re.MULTILINE)] == [], told
    assert "virt-dib" not in told


def test_names_survive(build_disk: Callable[[str], str]) -> None:
    listing = build_disk("ls -p /build/built")
    for name in ("latin \N{REPLACEMENT CHARACTER}", "new\nline", " blank", "-dash", 'quote"', "back\\slash"):
        assert f"/0/0/{name}/" in listing
    # The type in the directory is that of the node.
    assert re.search(r" 20600 \(3\) .* console$", build_disk("ls -l /build/built"), re.MULTILINE)


def test_what_was_mounted_is_not_on_the_disk(build_disk: Callable[[str], str]) -> None:
    assert "covering" not in build_disk("ls -p /build/mnt")
    assert "guest" in build_disk("ls -p /")


# ---- the network ----


@pytest.mark.parametrize("name", ["slirp4netns", "pasta"])
def test_the_network_leads_out_but_not_to_the_hosts_loopback(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tools.find
    if real(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setattr(
        tools, "find", lambda asked: None if asked in {"slirp4netns", "pasta"} - {name} else real(asked)
    )
    before = set(children_of(os.getpid()))
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        open_sandbox(Settings(directory=staged(tmp_path), network=True)) as box,
    ):
        server.settimeout(0.1)
        text = f"""
            cat /etc/resolv.conf; gateway=$(ip route show default | awk '{{ print $3; exit }}')
            for address in 127.0.0.1 10.0.2.2 "$gateway"; do
                timeout 2 bash -c "echo >/dev/tcp/$address/{server.getsockname()[1]}" 2>/dev/null
            done; [[ -n $gateway ]]
        """
        assert bash(box, text) == (0, "nameserver 10.0.2.3\n")
        with pytest.raises(TimeoutError):
            server.accept()
        # The one that made the namespaces, and the network's.
        started = set(children_of(os.getpid())) - before
        assert len(without_guards(started)) == 2
    assert [child for child in started if is_running(child)] == []


def test_a_program_in_a_network_of_its_own(tmp_path: Path) -> None:
    """As qemu is, in the network of which the guest's leads out."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        network.detached_program(Path("/bin/bash"), tmp_path) as program,
    ):
        server.settimeout(0.1)
        text = f"""
            for address in 127.0.0.1 10.0.2.2; do
                timeout 2 bash -c "echo >/dev/tcp/$address/{server.getsockname()[1]}" 2>/dev/null
            done
            # If slirp4netns has ended meanwhile, its interface has gone.
            sleep 1
            cat /proc/net/route /etc/resolv.conf /proc/self/status
        """
        said = tools.run([program, "-c", text], doing="running a program").stdout
        with pytest.raises(TimeoutError):
            server.accept()
    assert re.search(r"^\S+\t00000000\t", said, re.MULTILINE)
    assert "nameserver 10.0.2.3\n" in said
    if os.geteuid() != 0:
        assert re.search(r"^CapEff:\t0+$", said, re.MULTILINE)
        assert re.search(r"^CapBnd:\t0+$", said, re.MULTILINE)
        assert "NoNewPrivs:\t1\n" in said


# ---- the end ----


def running_with(text: str) -> set[int]:
    """The processes with *text* on their command line."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and text.encode() in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
    return found - {os.getpid()}


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in {"X", "Z"}
    except OSError:
        return False


def test_nothing_is_left_when_the_block_ends(tmp_path: Path) -> None:
    marker = f"{time.monotonic_ns()}"
    before = Path("/proc/self/mounts").read_text()
    with open_sandbox(Settings(directory=staged(tmp_path), network=True)) as box:
        text = f"cd /dib/build; mkdir built; chown 1234:5678 built; chmod 0 built; sleep {marker} &"
        assert bash(box, text)[0] == 0
        assert running_with(marker)
    assert running_with(marker) == set()
    assert list(tmp_path.iterdir()) == []
    assert Path("/proc/self/mounts").read_text() == before


def test_what_fails_inside_the_block_stays_what_it_was(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_sandbox(Settings(directory=staged(tmp_path), network=False)):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_files_can_be_removed_while_the_build_goes_on(tmp_path: Path) -> None:
    with open_sandbox(Settings(directory=staged(tmp_path), network=False)) as box:
        box.discard()
        wait_until(lambda: not (tmp_path / "staging").exists())


def test_a_sandbox_that_cannot_be_prepared_is_an_error_with_the_reason(tmp_path: Path) -> None:
    directory = staged(tmp_path)
    (directory / "guest" / "sandbox-setup.sh").write_text("echo the reason >&2; exit 3\n")
    with (
        pytest.raises(ApplianceError, match="preparing the sandbox: the script failed / the reason"),
        open_sandbox(Settings(directory=directory, network=False)),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_dead_sandbox_is_an_error_not_a_hang(tmp_path: Path) -> None:
    with open_sandbox(Settings(directory=staged(tmp_path), network=False)) as box:
        victim = box._inside.process.pid  # noqa: SLF001 - whom else to kill
        killer = threading.Timer(0.5, os.kill, (victim, signal.SIGKILL))
        killer.start()
        with pytest.raises(ApplianceError, match="it died"):
            bash(box, "sleep 300")
        killer.join()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys, time
from pathlib import Path
from virt_dib import sandbox, staging
from virt_dib.workspace import claimed
workspace = Path(sys.argv[1])
content = staging.Staging(workspace / "staging")
content.add_guest_scripts()
with claimed(workspace), sandbox.open_sandbox(
    sandbox.Settings(directory=content.directory, network=True)
) as box:
    box.run(
        ["/bin/bash", "-c", "mkdir /dib/build/built; chown 9:9 /dib/build/built; chmod 0 /dib/build/built; "
         f"(trap '' HUP TERM; setsid sleep {sys.argv[2]}) & echo ready; sleep {sys.argv[2]}"],
        {"PATH": "/usr/bin"}, "/", on_output=lambda data: os.write(1, data),
    )
"""


def test_kill_leaves_no_process_and_its_files_go_at_the_next_start(tmp_path: Path) -> None:
    directory = tmp_path / "virt-dib-killed"
    directory.mkdir(mode=0o700)
    marker = f"{time.monotonic_ns()}"
    before = Path("/proc/self/mounts").read_text()
    command = [sys.executable, "-c", KILLED, str(directory), marker]
    with tools.started(command, environment={"PATH": "/usr/bin:/bin"}) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        children = children_of(process.pid)
        # The one that made the namespaces, and the network's.
        assert len(without_guards(children)) == 2
        # It prints before it starts the last of them.
        wait_until(lambda: len(running_with(marker)) >= 3)
        assert workspace.remove_leftovers(tmp_path) == []
        assert directory.exists()
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: running_with(marker) == set())
        wait_until(lambda: not any(is_running(child) for child in children))
    assert Path("/proc/self/mounts").read_text() == before
    assert (directory / "staging").exists()
    assert workspace.remove_leftovers(tmp_path) == [directory]
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_is_killed_before_it_has_begun_is_an_error(tmp_path: Path) -> None:
    ids = namespaces.find_ids()
    with namespaces.inside_namespace(["own", "true"], tmp_path) as inside:
        ids.map(inside.process.pid, with_own=True)
        os.kill(inside.process.pid, signal.SIGSTOP)
        inside.send(b"go")
        os.kill(inside.process.pid, signal.SIGKILL)
        with pytest.raises(ApplianceError, match=r"^removing it: it failed$"):
            namespaces.finish(inside, "removing it")


def children_of(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def without_guards(processes: Iterable[int]) -> list[int]:
    """Those that are not there to end another one."""
    return [one for one in processes if b"/host-guard.sh\0" not in Path(f"/proc/{one}/cmdline").read_bytes()]


def test_only_what_is_ours_and_abandoned_counts_as_a_leftover(tmp_path: Path) -> None:
    (tmp_path / "virt-dib-new").mkdir()  # not claimed yet
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lock").touch()
    (tmp_path / "virt-dib-link").symlink_to(tmp_path / "other")
    (tmp_path / "virt-dib-file").touch()
    (tmp_path / "virt-dib-abandoned").mkdir()
    (tmp_path / "virt-dib-abandoned" / "lock").write_text("virt-dib\n")
    held = tmp_path / "virt-dib-held"
    held.mkdir()
    with workspace.claimed(held):
        assert workspace.remove_leftovers(tmp_path) == [tmp_path / "virt-dib-abandoned"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "virt-dib-new", "other", "virt-dib-link", "virt-dib-file", "virt-dib-held"
    }  # fmt: skip


# ---- what is missing ----

TELL = """
from virt_dib import sandbox
for problem in sandbox.problems():
    print(f"{problem.message}|{problem.hint}")
"""


def told(*run_by: str) -> list[str]:
    """The problems of a process that *run_by* starts."""
    command = [*run_by, sys.executable, "-c", TELL]
    return tools.run(command, doing="asking", environment={"PATH": "/usr/sbin:/usr/bin"}).stdout.splitlines()


def in_namespace(preparation: str) -> list[str]:
    """The problems of a process in a user namespace of one id, after some shell commands as its root."""
    return told("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{preparation}; exec "$@"', "sh")


def test_forbidden_namespaces_and_too_few_ids_are_told_together() -> None:
    *ids, kernel = in_namespace("echo 0 >/proc/sys/user/max_user_namespaces")
    assert [problem.split("|")[0] for problem in ids] == [
        f"this user namespace has 1 {kind}s, of 65536 needed" for kind in ("uid", "gid")
    ]
    assert kernel.split("|") == [
        "the kernel refuses what a sandbox needs: making a user namespace: ENOSPC",
        "as root: sysctl user.max_user_namespaces=10000",
    ]


def test_a_container_that_hides_parts_of_proc_is_told() -> None:
    problem = in_namespace("mount --bind /dev/null /proc/version")[-1]
    assert problem.startswith("the kernel refuses what a sandbox needs: mounting '/proc': EPERM|start the container")


def test_a_user_without_subordinate_ids_is_told() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become such a user")
    problems = told("setpriv", "--reuid=64999", "--regid=64999", "--clear-groups")
    assert [problem.split("|")[0] for problem in problems] == [
        f"user '64999' has no subordinate {kind}s in '/etc/sub{kind}', of 65536 needed" for kind in ("uid", "gid")
    ]
    assert all("usermod --add-sub" in problem for problem in problems)


def test_root_of_a_container_has_what_it_needs() -> None:
    if os.geteuid() == 0:
        pytest.skip("root has no subordinate ids to make a container with")
    mapped = ["unshare", "--user", "--map-auto", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc"]
    assert told(*mapped) == []


def test_a_build_that_does_not_fit_into_memory_says_so(tmp_path: Path) -> None:
    directory = staged(tmp_path)
    (directory / "large").write_bytes(b"x" * (8 << 20))
    with (
        pytest.raises(ApplianceError, match="copying the build's files into memory: no space"),
        open_sandbox(Settings(directory=directory, network=False, memory_bytes=4 << 20)),
    ):
        pass


def test_a_user_who_may_not_gain_rights_is_told() -> None:
    if os.geteuid() == 0:
        pytest.skip("root needs no newuidmap")
    assert [problem.split("|")[0] for problem in told("setpriv", "--no-new-privs")] == [
        "this process may not gain rights (no_new_privs), so that newuidmap cannot do its work"
    ]


def test_missing_programs_are_told_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "find", lambda _name: None)
    found = sandbox.problems()
    assert all(problem.hint for problem in found)
    expected = ["neither 'slirp4netns' nor 'pasta' found, needed for a network apart from this host's"]
    if os.geteuid() != 0:
        expected = [
            f"'{name}' not found, needed to use subordinate ids" for name in ("newuidmap", "newgidmap")
        ] + expected
    assert [problem.message for problem in found] == expected
    directory = staged(tmp_path)
    with pytest.raises(PrerequisiteError), open_sandbox(Settings(directory=directory, network=True)):
        pass
    # It was not taken over.
    assert directory.exists()


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("me:100000:65536\n", ((100000, 65536),)),
        ("you:1:65536\n1234:100000:70000\n", ((100000, 65536),)),
        ("# me:1:65536\nme:x:1\nme:10:36\nme:100000:65500\nme:900000:65536", ((10, 36), (100000, 65500))),
        ("me:1:100\nme:200:100", "user 'me' has 200 subordinate uids in '{path}', of 65536 needed"),
        ("", "user 'me' has no subordinate uids in '{path}', of 65536 needed"),
    ],
)
def test_subordinate_ids_are_read_as_subuid_describes_them(
    tmp_path: Path, text: str, ranges: tuple[tuple[int, int], ...] | str
) -> None:
    path = tmp_path / "subuid"
    path.write_text(text)
    answer = namespaces.subordinate_ranges("uid", path, ("me", "1234"))
    if isinstance(ranges, str):
        assert isinstance(answer, Problem)
        assert answer.message == ranges.format(path=path)
    else:
        assert answer == ranges


# ---- for another user too ----


def test_all_of_this_as_an_ordinary_user(tmp_path: Path) -> None:
    """The tests of this file and the contract once more, by the first ordinary user who has subordinate ids."""
    if os.geteuid() != 0:
        pytest.skip("they run as an ordinary user already")
    user = ordinary_user()
    if user is None:
        pytest.skip("no ordinary user has subordinate ids here")
    home = Path("/var/tmp") / f"virt-dib-test-{os.getpid()}-{time.monotonic_ns()}"
    home.mkdir(mode=0o700)
    os.chown(home, user.pw_uid, user.pw_gid)
    become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups"]
    try:
        result = tools.run(
            [*become, sys.executable, "-m", "pytest", "-q", "-m", "sandbox", "-p", "no:cacheprovider",
             f"--basetemp={home}/tests", f"{TESTS}/test_sandbox.py", f"{TESTS}/test_jobs.py"],
            doing="testing",
            cwd=TESTS.parent,
            environment={"HOME": str(home), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
            check=False,
        )  # fmt: skip
    finally:
        shutil.rmtree(home, ignore_errors=True)
    (tmp_path / "said").write_text(result.stdout)
    assert result.exit_status == 0, result.stdout + result.stderr


def ordinary_user() -> pwd.struct_passwd | None:
    """The first one who has subordinate ids, if virt-dib is where that user can run it."""
    with contextlib.suppress(OSError):
        for line in Path("/etc/subuid").read_text().splitlines():
            name, _, count = line.split(":")
            with contextlib.suppress(KeyError, ValueError):
                user = pwd.getpwnam(name)
                if int(count) >= namespaces.IDS and user.pw_uid != 0 and may_run(user):
                    return user
    return None


def may_run(user: pwd.struct_passwd) -> bool:
    command = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups", sys.executable]
    return tools.run([*command, "-m", "virt_dib", "--version"], doing="trying", check=False).exit_status == 0
