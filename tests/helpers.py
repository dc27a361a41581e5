# SPDX-License-Identifier: Apache-2.0
"""What tests share: elements made on the spot, and whole builds by the real command."""

from __future__ import annotations

import contextlib
import os
import pwd
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from virt_dib import sandbox, tools
from virt_dib.spec import Phase

TESTS = Path(__file__).parent
_BUSYBOX = ("/bin/busybox", "/usr/bin/busybox")
BUILD_TIMEOUT_S = 900
HANG_S = 120.0
"""For what takes a moment: so long only what hangs takes, also where the machine is slow."""
MANY_DESCRIPTORS = 1100
ISOLATIONS = ("vm", "sandbox")
ODD_VALUE = os.fsdecode(b" caf\xe9 \xff\xfe\ttab \x01\x1e\x7f ")
"""No UTF-8, and characters that steer."""
ODD_VARIABLES = {
    "PROBE_LINES": "line 1\nline 2\n\nline 4\n",
    "PROBE_SHELL": """$HOME ${PATH} $(id) `id` \\ \\n "double" 'single' ~ * ! # ; & | > < ( ) [ ]""",
    "PROBE_ASCII": "käse 日本 \U0001f4a9",
    "PROBE_BYTES": ODD_VALUE,
    "PROBE_EMPTY": "",
    "PROBE_EQUALS": "=a=b=",
    "PROBE_BLANKS": "  \t two  blanks  ",
    "DIB_PROBE_ODD": "line 1\n\"line\" '2' $HOME `id` \\ käse",
}
"""What ``--envvar`` gives to the scripts of ``probe_build``."""


def make_element(
    parent: Path, name: str, files: Mapping[str, str], *, provides: Sequence[str] = (), depends: Sequence[str] = ()
) -> Path:
    """An element below *parent*: *files* by relative path; those in ``*.d`` are executable scripts."""
    element = parent / name
    element.mkdir(parents=True)
    for relative, text in files.items():
        path = element / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if path.parent.name.endswith(".d"):
            path.chmod(0o755)
    if provides:
        (element / "element-provides").write_text("".join(f"{word}\n" for word in provides))
    if depends:
        (element / "element-deps").write_text("".join(f"{word}\n" for word in depends))
    return element


@contextlib.contextmanager
def many_descriptors() -> Iterator[None]:
    """What is opened in the block has numbers that select(2) does not take, as in a large program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < MANY_DESCRIPTORS * 2:
        pytest.skip("not so many descriptors are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, MANY_DESCRIPTORS * 2), hard))
    opened: list[int] = []
    try:
        while not opened or opened[-1] < MANY_DESCRIPTORS:
            opened.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        yield
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def make_tiny_os(parent: Path) -> Path:
    """The element ``tiny-os`` below *parent*: an operating system that builds in a second."""
    element = parent / "tiny-os"
    shutil.copytree(TESTS / "elements" / "tiny-os", element)
    busybox = next(path for path in _BUSYBOX if Path(path).exists())
    shutil.copyfile(busybox, element / "busybox")
    (element / "busybox").chmod(0o755)
    return element


def make_probe(parent: Path) -> Path:
    """The element ``probe`` below *parent*: in every phase it writes down what it sees."""
    script = (TESTS / "data" / "probe").read_text()
    files = {f"{phase.directory}/50-probe": script for phase in Phase}
    files["environment.d/50-probe"] = "export PROBE_FROM_ENVIRONMENT=yes\n"
    return make_element(parent, "probe", files)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the command ``virt-dib``."""

    exit_status: int
    stdout: str
    stderr: str
    output_dir: Path


def heed_signals() -> None:
    """Have no signals ignored, as nohup and shells do for what runs in the background, and as is inherited."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def virt_dib(
    arguments: Sequence[str | Path],
    *,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = BUILD_TIMEOUT_S,
) -> Run:
    """Run ``virt-dib`` in *cwd* as a user would."""
    result = tools.run(
        [sys.executable, "-m", "virt_dib", *arguments],
        doing="running virt-dib",
        cwd=cwd,
        environment={**os.environ, **(environment or {})},
        timeout_s=timeout_s,
        check=False,
    )
    return Run(exit_status=result.exit_status, stdout=result.stdout, stderr=result.stderr, output_dir=cwd)


def tree_stage_command(
    arguments: Sequence[str | Path], *, look: str, user: pwd.struct_passwd | None = None
) -> list[str | Path]:
    """The command that runs the tree stage of ``virt-dib ARGUMENTS`` in the sandbox, then *look* in its tree.

    *user*: who runs it; who runs the tests unless given.
    """
    become = []
    if user is not None:
        become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups", "--"]
    return [*become, sys.executable, TESTS / "data" / "tree_stage.py", look, *arguments]


def tree_stage(command: Sequence[str | Path], *, cwd: Path, environment: Mapping[str, str]) -> tuple[Run, str]:
    """Run a :func:`tree_stage_command`; give what its look prints."""
    result = tools.run(
        command,
        doing="running the tree stage",
        cwd=cwd,
        environment=environment,
        timeout_s=BUILD_TIMEOUT_S,
        check=False,
    )
    run = Run(exit_status=result.exit_status, stdout=result.stdout, stderr=result.stderr, output_dir=cwd)
    seen = cwd / "look"
    return run, seen.read_text(errors="surrogateescape") if seen.exists() else ""


def skip_without(isolation: str) -> None:
    """Skip the test where that isolation cannot be had."""
    found = sandbox.problems() if isolation == "sandbox" else []
    if found:
        pytest.skip("\n".join(f"{problem.message} ({problem.hint})" for problem in found))


def files_in_image(image: Path, *, offset_bytes: int = 0) -> ExtFiles:
    """Read an ext4 file system at *offset_bytes* of the raw *image*, without mounting it."""
    return ExtFiles(image=image, offset_bytes=offset_bytes)


@dataclass(frozen=True, kw_only=True)
class ExtFiles:
    """An ext4 file system in a file, read by debugfs."""

    image: Path
    offset_bytes: int

    def _debugfs(self, request: str) -> str:
        image = str(self.image) + (f"?offset={self.offset_bytes}" if self.offset_bytes else "")
        debugfs = tools.require("debugfs", purpose="look into images", package="e2fsprogs")
        return tools.run([debugfs, "-R", request, image], doing="reading the image").stdout

    def names(self, directory: str) -> list[str]:
        """The names in *directory*, without ``.`` and ``..``."""
        lines = self._debugfs(f"ls -p {directory}").splitlines()
        names = [line.split("/")[5] for line in lines if line.count("/") > 5]
        return sorted(set(names) - {".", ".."})

    def text(self, path: str) -> str:
        """The content of the file *path*."""
        return self._debugfs(f"cat {path}")

    def label(self) -> str:
        """The file system's label."""
        return next(
            line.split(":", 1)[1].strip()
            for line in self._debugfs("show_super_stats -h").splitlines()
            if line.startswith("Filesystem volume name")
        )


def processes_of(directory: Path) -> list[str]:
    """The processes that name *directory*."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(directory).encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until *condition* holds."""
    until_s = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def mounts_and_loops(*directories: Path) -> set[str]:
    """The mounts that name one of *directories*, and the loop devices with a file there; all others are not ours."""
    found = {f"mount {line}" for line in Path("/proc/self/mounts").read_text().splitlines()}
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found.add(f"loop device {entry.parents[1].name} of {entry.read_text().rstrip()}")
    return {line for line in found if any(str(directory) in line for directory in directories)}
