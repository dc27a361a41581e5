# SPDX-License-Identifier: Apache-2.0
"""How programs of the host are found and started: none of the working directory, and told no more than they need."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from helpers import processes_of
from test_staging import as_ordinary_user, run_python
from virt_dib import batch, boot, dib, kvm, layout, network, staging, tools
from virt_dib.errors import ToolError, VirtDibError

SECRET = "not for programs"
PLACES = {"PATH", "LC_ALL", "HOME", "TMPDIR", "LD_LIBRARY_PATH"}
OF_THE_SHELL = {"PWD", "OLDPWD", "SHLVL", "_"}


def make_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def variables(text: str) -> dict[str, str]:
    """What ``env -0`` has printed, without the shell's own."""
    found = dict(item.split("=", 1) for item in text.split("\0") if item)
    return {name: value for name, value in found.items() if name not in OF_THE_SHELL}


@pytest.fixture
def secretive(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment with a secret, and what would have programs do and say other things."""
    for name, value in {
        "AWS_SECRET_ACCESS_KEY": SECRET, "http_proxy": f"http://user:{SECRET}@192.0.2.1:3128", "GZIP": "-d",
        "LC_ALL": "de_DE.UTF-8", "LANGUAGE": "de", "BASH_ENV": "/nowhere", "QEMU_MODULE_DIR": "/nowhere",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


# ---- finding ----


@pytest.mark.parametrize("path", ["", ".", ".:/usr/bin", ":/usr/bin", "bin:/usr/bin", None])
def test_no_program_is_taken_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    for directory in (tmp_path, tmp_path / "bin"):
        make_program(directory / "env", "echo caught")
    monkeypatch.chdir(tmp_path)
    if path is None:
        monkeypatch.delenv("PATH")
    else:
        monkeypatch.setenv("PATH", path)
    assert tools.find("env") == Path("/usr/bin/env")
    assert "caught" not in tools.run(["env"], doing="running it").stdout
    # Neither by the programs that it starts.
    assert "caught" not in tools.run(["sh", "-c", "env"], doing="running it").stdout


def test_the_users_own_directories_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = make_program(tmp_path / "bin/env", "echo mine")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin")
    assert tools.find("env") == own
    assert tools.run(["env"], doing="running it").stdout == "mine\n"


def test_a_program_that_is_nowhere_is_told(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="cannot start 'no-such-program': No such file or directory"):
        tools.run(["no-such-program"], doing="running it", cwd=tmp_path)


# ---- what they say ----

NOISE_BYTES = 40 << 20
NOISE = f"yes {'x' * 9999} | head -c {NOISE_BYTES}"


@pytest.mark.parametrize("to", ["", ">&2"])
def test_what_has_no_end_is_not_kept(to: str) -> None:
    """Of programs that read what comes from the guest, which may have them say anything; the last of it is told."""
    words = ["sh", "-c", f"{NOISE} {to}; echo {to}; echo last words {to}; exit 3"]
    tracemalloc.start()
    try:
        with pytest.raises(ToolError, match=r"^reading: 'sh' failed with exit status 3: x*.* / last words$") as caught:
            tools.run_together({"reading": tools.Command(words=words)})
        assert len(str(caught.value)) < 3000
        assert tracemalloc.get_traced_memory()[1] < NOISE_BYTES // 2
    finally:
        tracemalloc.stop()


def test_output_that_is_asked_for_is_whole() -> None:
    result = tools.run(["sh", "-c", f"{NOISE}; echo said >&2"], doing="reading")
    assert len(result.stdout) == NOISE_BYTES
    assert result.stderr == "said\n"


def test_a_program_that_closes_its_output_is_waited_for(tmp_path: Path) -> None:
    words: list[str | Path] = ["sh", "-c", 'exec >&- 2>&-; sleep 1; : >"$1"; exit 4', "sh", tmp_path / "done"]
    assert tools.run(words, doing="waiting", check=False).exit_status == 4
    assert (tmp_path / "done").exists()
    with pytest.raises(ToolError, match="waiting: 'sh' did not finish in 0 s"):
        tools.run(["sh", "-c", "exec >&- 2>&-; sleep 1000"], doing="waiting", timeout_s=0.1)


@pytest.fixture
def with_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with modules that leave a trace when they are imported."""
    names = ("json", "csv", "zipfile", "struct", "runpy", "compileall", "argparse", "virt_dib", "yaml", "tempfile")
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'a').write(__name__)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_that_looks_for_dib_imports_nothing_from_the_working_directory(with_modules: Path) -> None:
    assert dib.guest_modules(dib.find_installation(None))
    assert dib.guest_modules(dib.find_installation(None, Path(sys.executable)))
    assert not (with_modules / "trace").exists()


def test_python_that_compiles_imports_nothing_from_the_working_directory(with_modules: Path, tmp_path: Path) -> None:
    staged = staging.Staging(tmp_path / "staging")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/module.py").write_text("")
    staged.add_modules([tmp_path / "elsewhere/module.py"], Path("/usr/bin/python3"))
    staged.finish()
    (compiled,) = (staged.directory / "site/__pycache__").iterdir()
    # It names its source, in the guest.
    assert b"/dib/site/module.py" in compiled.read_bytes()
    assert os.fsencode(tmp_path) not in compiled.read_bytes()
    assert not (with_modules / "trace").exists()


@pytest.mark.parametrize("version", [(3, 10), (3, 11)])
def test_python_that_builds_imports_nothing_from_the_working_directory(
    with_modules: Path, version: tuple[int, ...]
) -> None:
    command = [*batch.start_command(version), batch.AS_RAMDISK, "--help"]
    assert "virt-ramdisk-image-create" in tools.run(command, doing="asking for help").stdout
    assert not (with_modules / "trace").exists()


# ---- what they are given ----


@pytest.mark.usefixtures("secretive")
def test_programs_get_places_and_speak_english() -> None:
    seen = variables(tools.run(["env", "-0"], doing="looking").stdout)
    assert set(seen) <= PLACES
    assert seen["LC_ALL"] == "C"
    said = tools.run(["cat", "/nowhere"], doing="looking", check=False).stderr
    assert "No such file or directory" in said


@pytest.mark.usefixtures("secretive")
def test_gzip_compresses_whatever_the_environment_says(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(b"text")
    command = tools.Command(words=["gzip", "-c"], stdin=tmp_path / "archive", stdout=tmp_path / "made")
    tools.run_together({"compressing": command})
    assert (tmp_path / "made").read_bytes().startswith(b"\x1f\x8b")


@pytest.mark.usefixtures("secretive")
@pytest.mark.parametrize("name", ["qemu", "a b", "$(touch pwned)", "it's;touch pwned", 'a"b`touch pwned`'])
def test_the_qemu_of_the_appliance_gets_places_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    program = make_program(tmp_path / name / "qemu", 'env -0; printf "ARGUMENTS=%s %s" "$1" "$2"')
    (tmp_path / "private").mkdir()
    wrapper = network.bare_program(program, tmp_path / "private")
    seen = variables(tools.run([wrapper, "a b", "$(id)"], doing="running it").stdout)
    assert seen.pop("ARGUMENTS") == "a b $(id)"
    assert set(seen) <= PLACES
    # What qemu does not remove when it is killed goes with the directory.
    assert seen["TMPDIR"] == str(tmp_path / "private")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.usefixtures("secretive")
def test_the_qemus_that_we_start_ourselves_get_places_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Mapping[str, str]] = []
    record = tmp_path / "record"
    fake = make_program(tmp_path / "bin/qemu-system-x86_64", f"env -0 >{record}; exit 1")
    (tmp_path / "kernel").write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    kvm.choose(kernel=tmp_path / "kernel", cache_dir=tmp_path, qemu=fake, device=Path("/dev/null"))
    seen.append(variables(record.read_text()))
    record.unlink()
    with pytest.raises(VirtDibError):
        boot.boot_kernel(tmp_path / "kernel", tmp_path / "kernel", expect="x", accelerate=False)
    seen.append(variables(record.read_text()))
    assert [set(one) <= PLACES for one in seen] == [True, True], seen


# ---- when virt-dib is killed ----

# A program, what it has started, and what tells when both are there.
LIVES = "sleep 600 & echo $$ $! >there.new; mv there.new there; exec sleep 600"
TIDIES = "trap 'rm mess; exit' TERM; touch mess; echo $$ >there.new; mv there.new there; while :; do sleep 0.1; done"
STARTERS = {
    "started": f"with tools.started(['sh', '-c', {LIVES!r}]) as process: process.wait()",
    "run": f"tools.run(['sh', '-c', {LIVES!r}], doing='waiting')",
    "run-together": (
        "tools.run_together({'a': tools.Command(words=['true']),"
        f" 'b': tools.Command(words=['sh', '-c', {LIVES!r}], stdout=Path('out'))}})"
    ),
    "in-a-thread": (
        f"thread = threading.Thread(target=lambda: tools.run(['sh', '-c', {LIVES!r}], doing='waiting')); thread.start()"
    ),
    "tidies-up": f"with tools.started(['sh', '-c', {TIDIES!r}], tidies_up=True) as process: process.wait()",
    "attended": f"with tools.attended(['sh', '-c', {TIDIES!r}], environment=os.environ) as process: process.wait()",
}


def lives(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["KILL", "TERM"])
@pytest.mark.parametrize("how", STARTERS)
def test_programs_end_when_virt_dib_is_killed(tmp_path: Path, how: str, number: signal.Signals) -> None:
    text = f"import os, threading\nfrom pathlib import Path\nfrom virt_dib import tools\n{STARTERS[how]}\n"
    with tools.started([sys.executable, "-c", text], environment=os.environ, cwd=tmp_path) as virt_dib:
        wait_until((tmp_path / "there").exists)
        there = (tmp_path / "there").read_text().split()
        guards = [one for one in children(virt_dib.pid) if one not in there]
        assert all(map(lives, there))
        # Without a handler it cannot tidy up after SIGTERM either.
        virt_dib.send_signal(number)
        virt_dib.wait()
        wait_until(lambda: not any(map(lives, [*there, *guards])))
    assert not (tmp_path / "mess").exists()


@pytest.mark.parametrize("how", ["started", "run", "tidies-up"])
def test_a_program_ends_though_virt_dib_is_killed_in_the_moment_of_its_start(tmp_path: Path, how: str) -> None:
    # Nothing more is done after the program has begun.
    killed = """
class Killed(tools.subprocess.Popen):
    def __init__(self, words, **options):
        super().__init__(words, **options)
        if words[0] == 'sh':
            while not Path('there').exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
tools.subprocess.Popen = Killed
"""
    text = f"import os, signal, time\nfrom pathlib import Path\nfrom virt_dib import tools\n{killed}\n{STARTERS[how]}\n"
    with tools.started([sys.executable, "-c", text], environment=os.environ, cwd=tmp_path) as virt_dib:
        assert virt_dib.wait(60) == -signal.SIGKILL
    there = (tmp_path / "there").read_text().split()
    wait_until(lambda: not any(map(lives, there)))
    assert not (tmp_path / "mess").exists()


def children(process: int) -> list[str]:
    return [word for path in Path(f"/proc/{process}/task").glob("*/children") for word in path.read_text().split()]


def test_a_guard_goes_with_what_it_guards(tmp_path: Path) -> None:
    before = set(children(os.getpid()))
    with tools.started(["sleep", "600"]) as process:
        assert len(set(children(os.getpid())) - before) == 2
    assert set(children(os.getpid())) == before
    with pytest.raises(ToolError, match="cannot start"):
        tools.run([tmp_path / "nothing"], doing="running it")
    assert set(children(os.getpid())) == before
    assert not lives(str(process.pid))


GUARD = Path(tools.__file__).with_name("guest") / "host-guard.sh"


def test_the_tree_of_processes_that_gets_a_signal_before_it_is_killed_keeps_its_guards() -> None:
    with tools.started(["sleep", "600"]) as victim, guard() as (process, writer):
        os.write(writer, b"%d\n" % victim.pid)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            process.send_signal(number)
        os.close(writer)
        assert victim.wait(60) == -signal.SIGKILL


@contextlib.contextmanager
def guard() -> Iterator[tuple[tools.Process, int]]:
    """One that has begun, and the pipe to it."""
    reader, writer = os.pipe()
    with tools.started(["/bin/sh", GUARD, "KILL", "-"], stdin=reader) as process:
        os.close(reader)
        # It ignores signals when it waits for the first line.
        wait_until(lambda: ignored(process.pid) >= {signal.SIGHUP, signal.SIGINT, signal.SIGTERM})
        yield process, writer


def ignored(process: int) -> set[int]:
    status = Path(f"/proc/{process}/status").read_text()
    mask = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn:"))
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def test_a_guard_that_is_told_of_nothing_ends_nothing() -> None:
    with guard() as (process, writer):
        os.close(writer)
        assert process.wait(60) == 0


WAITING = """
import sys
from virt_dib import tools
from virt_dib.errors import ToolError

tools._STOP_TIMEOUT_S = 0.2
try:
    tools.run([sys.argv[1], "--reuid=0", "sleep", sys.argv[2]], doing="waiting", timeout_s=0.2)
except ToolError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="wants root")
def test_a_time_limit_holds_for_a_program_that_cannot_be_ended(anyones_dir: Path) -> None:
    becomes_root = anyones_dir / "becomes-root"
    shutil.copy(tools.require("setpriv", purpose="run the tests", package="util-linux"), becomes_root)
    becomes_root.chmod(0o4755)
    time_s = f"30.{os.getpid()}"
    said = run_python(WAITING, becomes_root, time_s, before=as_ordinary_user())
    # Not the end of the program, then: it still runs.
    still = [pid for pid in processes_of(Path(time_s)) if Path(f"/proc/{pid}/comm").read_text() == "sleep\n"]
    for pid in still:
        os.kill(int(pid), signal.SIGKILL)
    assert said == "waiting: 'becomes-root' did not finish in 0 s\n"
    assert len(still) == 1


DIES = """
import os, sys
directory = sys.argv[2]
for number in range(2):
    with open(f"{directory}/request") as stream:
        stream.read()
    with open(f"{directory}/reply", "w") as reply:
        if number == 1:
            os.kill(os.getpid(), 9)
        with open(f"{directory}/status", "w") as stream:
            stream.write("0")
"""


def test_a_dib_block_device_that_is_killed_has_not_succeeded(tmp_path: Path) -> None:
    for name in ("request", "reply"):
        os.mkfifo(tmp_path / name)
    ask: list[str | Path] = ["/bin/bash", layout.guest_script("block-device.sh"), tmp_path, "answers", "umount"]
    # As it finds the one that serves it.
    command: list[str | Path] = [sys.executable, "-c", DIES + "# block-device.py", "--serve", tmp_path]
    with tools.started(command) as server:
        first, second = (tools.run(ask, doing="asking", check=False) for _ in range(2))
        server.wait()
    assert first.exit_status == 0, first.stderr
    assert second.exit_status == 137
    assert second.stderr == "the process behind dib-block-device was killed, perhaps for want of memory\n"
