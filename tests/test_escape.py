# SPDX-License-Identifier: Apache-2.0
"""An element that tries to get at the host, from every phase of the tree stage, gets nowhere."""

from __future__ import annotations

import contextlib
import mmap
import os
import pwd
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import BUILD_TIMEOUT_S, TESTS, make_element, make_tiny_os, skip_without
from test_sandbox import ordinary_user
from virt_dib import supermin, tools
from virt_dib.spec import TREE_PHASES, Phase, Where

pytestmark = pytest.mark.appliance

SCRIPT = TESTS / "data" / "escape.py"
OUTSIDE = [phase for phase in TREE_PHASES if phase.where is Where.OUTSIDE]
CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")

ANYWHERE = {
    "read a key", "read a file", "read a key by way of processes", "read a file by way of processes",
    "read a file by its number", "find keys", "write a file", "write a file by way of processes", "see a process",
    "look into a process", "trace a process", "kill a process", "connect to 127.0.0.1", "connect to 10.0.2.2",
    "connect to 169.254.2.2", "connect to the gateway", "connect to a socket without a file",
    "connect to a socket with a file",
}  # fmt: skip
"""What must fail wherever a script runs."""
AGAINST_THE_KERNEL = {"load a module", "find a disk", "read a disk", "mount a disk", "change the kernel"}
"""What the appliance allows: the kernel and the disks are its own."""
AGAINST_USR = {"write to /usr"}
"""What is allowed in the chroot too: there it is the tree's."""


@dataclass(frozen=True, kw_only=True)
class Bait:
    """What there is on the host to get at."""

    secret: str
    directory: Path
    marker: str
    loopback: socket.socket
    gateway: socket.socket
    sockets: tuple[socket.socket, ...]
    process: int

    @property
    def writable(self) -> Path:
        """A directory that everybody may write."""
        return self.directory / "writable"

    def variables(self) -> dict[str, str]:
        """How the script finds it."""
        return {
            "BAIT_KEY": f"{self.directory}/home/.ssh/id_rsa",
            "BAIT_FILE": f"{self.directory}/readable",
            "BAIT_DIRECTORY": f"{self.writable}",
            "BAIT_SOCKET": f"{self.directory}/socket",
            "BAIT_MARKER": self.marker,
            "BAIT_PORT": str(self.loopback.getsockname()[1]),
            "BAIT_GATEWAY_PORT": str(self.gateway.getsockname()[1]),
            "BAIT_PROCESS": str(self.process),
            "BAIT_DISK": disk_numbers(),
        }


@contextlib.contextmanager
def bait(user: pwd.struct_passwd | None) -> Iterator[Bait]:
    """Lay it out, as the property of *user* or of who runs the tests."""
    word = secrets.token_hex(12)
    # Where the user gets to, which pytest's directories are not.
    directory = Path("/var/tmp") / f"virt-dib-test-{os.getpid()}-{time.monotonic_ns()}"
    directory.mkdir()
    directory.chmod(0o755)
    for name, mode in (("home", 0o755), ("home/.ssh", 0o700), ("out", 0o755), ("writable", 0o1777)):
        (directory / name).mkdir()
        (directory / name).chmod(mode)
    secret = f"secret-{secrets.token_hex(16)}"
    for name, mode in (("home/.ssh/id_rsa", 0o600), ("readable", 0o644)):
        (directory / name).write_text(f"{secret}\n")
        (directory / name).chmod(mode)
    become = []
    if user is not None:
        become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups"]
        for path in directory.rglob("*"):
            os.chown(path, user.pw_uid, user.pw_gid)
    marker = f"virt-dib-bait-{word}"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        loopback, gateway = (stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
        sockets = []
        for address in (f"\0{marker}", f"{directory}/socket"):
            sockets.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
            sockets[-1].bind(address)
            sockets[-1].listen()
        (directory / "socket").chmod(0o777)
        command = [*become, "bash", "-c", "while :; do read -r -t 60; done", marker]
        reader, writer = os.pipe()
        stack.callback(os.close, writer)
        stack.callback(os.close, reader)
        process = stack.enter_context(tools.started(command, stdin=reader, environment={"BAIT": secret}))
        yield Bait(
            secret=secret,
            directory=directory,
            marker=marker,
            loopback=loopback,
            gateway=gateway,
            sockets=tuple(sockets),
            process=process.pid,
        )


def disk_numbers() -> str:
    """Those of the host's first disk, or of any."""
    for line in Path("/proc/partitions").read_text().splitlines()[2:]:
        major, minor, _, name = line.split()
        if not name.startswith(("loop", "ram", "zram")):
            return f"{major}:{minor}"
    return "8:0"


def disk_uuid() -> str | None:
    """What the script looks for on that disk, if it can be told from nothing."""
    major, minor = (int(word) for word in disk_numbers().split(":"))
    try:
        number = os.open(f"/dev/{Path(f'/sys/dev/block/{major}:{minor}').resolve().name}", os.O_RDONLY)
    except OSError:
        return None
    try:
        content = os.pread(number, 16, 0x468)
    finally:
        os.close(number)
    return content.hex() if any(content) else None


def connections(server: socket.socket) -> int:
    """How many have come."""
    server.settimeout(0.1)
    count = 0
    with contextlib.suppress(TimeoutError):
        while True:
            server.accept()[0].close()
            count += 1
    return count


def outcomes(text: str) -> dict[str, str]:
    """How the attempts ended, by their names."""
    return dict(line.split("\t", 1) for line in text.splitlines())


def holds(path: Path, word: str) -> bool:
    """Whether *word* is anywhere in a file."""
    with path.open("rb") as stream:
        if os.fstat(stream.fileno()).st_size == 0:
            return False
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(word.encode()) >= 0


@dataclass(frozen=True, kw_only=True)
class Escape:
    """A build of the element, and what the host noticed."""

    isolation: str
    results: Mapping[Phase, Mapping[str, str]]
    with_the_secret: list[str]
    files: list[str]
    host_differences: list[str]
    connections: Mapping[str, int]


def host_state(bait: Bait) -> dict[str, object]:
    """What an escape would change, and what must be there for it."""
    status = Path(f"/proc/{bait.process}/status").read_text()
    return {
        "process": re.findall(r"^(?:State:\s+[TtXZ]|TracerPid:.*[1-9])", status, re.MULTILINE),
        "written": sorted(path.name for path in bait.writable.iterdir()),
        "in /usr": [str(path) for path in Path("/usr").glob(f"{bait.marker}*")]
        + [str(path) for path in Path("/usr/bin").glob(f"{bait.marker}*")],
        "module": Path("/sys/module/dummy").exists(),
        "core_pattern": CORE_PATTERN.read_text(),
    }


@pytest.fixture(
    scope="module", params=["vm", "sandbox", pytest.param("sandbox of a user", marks=pytest.mark.needs_root)]
)
def escape(request: pytest.FixtureRequest) -> Iterator[Escape]:
    isolation, _, other = request.param.partition(" ")
    skip_without(isolation)
    user = ordinary_user() if other else None
    if other and (os.geteuid() != 0 or user is None):
        pytest.skip("it takes root, and an ordinary user who has subordinate ids")
    script = SCRIPT.read_text()
    with bait(user) as laid:
        make_tiny_os(laid.directory / "elements")
        phases = (*TREE_PHASES, Phase.CLEANUP)
        make_element(
            laid.directory / "elements", "escape", {f"{phase.directory}/50-escape": script for phase in phases}
        )
        cache = supermin.cache_dir().parent
        become: list[str] = []
        if user is not None:
            become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups"]
            cache = Path(user.pw_dir) / ".cache"
            if not (cache / "virt-dib").exists():
                cache = laid.directory / "home" / ".cache"
        before = host_state(laid)
        result = tools.run(
            [
                *become, sys.executable, "-m", "virt_dib", "--name", "escape", "--formats", "raw", "--size", "1G",
                "--skip-base", "--network", "--isolation", isolation, "-p", laid.directory / "elements",
                *(f"--envvar={name}={value}" for name, value in laid.variables().items()), "tiny-os", "escape",
            ],
            doing="running virt-dib",
            cwd=laid.directory / "out",
            environment={
                **os.environ,
                "HOME": f"{laid.directory}/home",
                "XDG_CACHE_HOME": str(cache),
                "SSH_AUTH_SOCK": f"{laid.directory}/socket",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            timeout_s=BUILD_TIMEOUT_S,
            check=False,
        )  # fmt: skip
        assert result.exit_status == 0, result.stdout + result.stderr
        assert "warning: the appliance can reach services" not in result.stdout + result.stderr
        after = host_state(laid)
        written = [path for path in (laid.directory / "out").rglob("*") if path.is_file()]
        yield Escape(
            isolation=isolation,
            results={
                phase: outcomes((laid.directory / "out/escape.d/escape" / phase.directory).read_text())
                for phase in TREE_PHASES
            },
            files=[str(path.relative_to(laid.directory / "out")) for path in written],
            with_the_secret=[str(path) for path in written if holds(path, laid.secret)]
            + [name for name in ("stdout", "stderr") if laid.secret in getattr(result, name)],
            host_differences=[
                f"{name}: before {before[name]}, after {after[name]}" for name in before if before[name] != after[name]
            ],
            connections={
                "loopback": connections(laid.loopback),
                "gateway": connections(laid.gateway),
                "unix": sum(connections(server) for server in laid.sockets),
            },
        )


def successes(results: Mapping[str, str], names: set[str]) -> dict[str, str]:
    """Those of the attempts *names* that were not refused."""
    return {name: results[name] for name in sorted(names) if not results[name].lstrip("'\"").startswith("refused: ")}


@pytest.mark.parametrize("phase", TREE_PHASES)
def test_no_attempt_succeeds(escape: Escape, phase: Phase) -> None:
    results = escape.results[phase]
    assert set(results) == ANYWHERE | AGAINST_THE_KERNEL | AGAINST_USR
    assert successes(results, ANYWHERE) == {}


@pytest.mark.parametrize("phase", TREE_PHASES)
def test_the_kernel_of_the_host_allows_nothing(escape: Escape, phase: Phase) -> None:
    results = escape.results[phase]
    if escape.isolation == "sandbox":
        assert successes(results, AGAINST_THE_KERNEL) == {}
        assert successes(results, AGAINST_USR if phase in OUTSIDE else set()) == {}
    else:
        # A disk of that number may be there, but it is not the host's.
        uuid = disk_uuid()
        assert uuid is None or uuid not in results["read a disk"]


def test_the_secret_is_in_nothing_that_the_build_has_written(escape: Escape) -> None:
    assert {"escape.raw", "escape.log", "escape.d/escape/root.d", "escape.d/escape/install.d"} <= set(escape.files)
    assert escape.with_the_secret == []


def test_the_host_is_as_it_was(escape: Escape) -> None:
    assert escape.host_differences == []
    assert escape.connections == {"loopback": 0, "gateway": 0, "unix": 0}


def test_the_attempts_succeed_where_nothing_hinders_them(tmp_path: Path) -> None:
    """Or else that they fail would mean nothing."""
    harmless = [
        "read a key", "read a file", "read a file by way of processes", "write a file",
        "write a file by way of processes", "see a process", "look into a process",
        "connect to 127.0.0.1", "connect to a socket without a file", "connect to a socket with a file",
    ]  # fmt: skip
    if os.geteuid() == 0:
        # Others may be forbidden to trace what is not below them (Yama).
        harmless.append("trace a process")
    harmless.append("kill a process")
    with bait(None) as laid:
        tools.run(
            [sys.executable, SCRIPT, tmp_path / "result", *harmless],
            doing="making attempts",
            environment={"PATH": "/usr/bin:/bin", **laid.variables()},
        )
        results = outcomes((tmp_path / "result").read_text())
        assert holds(tmp_path / "result", laid.secret)
        assert set(successes(results, set(harmless))) == set(harmless), results
        assert all(laid.secret in results[name] for name in harmless[:3])
        assert connections(laid.loopback) == 1
        assert [connections(server) for server in laid.sockets] == [1, 1]
        state = host_state(laid)
        assert (state["process"], state["written"]) == (["State:\tZ"], ["by-process", "escaped"])
