# SPDX-License-Identifier: Apache-2.0
"""What guests say, made to hurt: events, statuses, times and output. Much of that is in test_plain_text.py,
test_monitor.py, test_dib_output.py, test_sandbox.py and test_appliance.py, and not here again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import io
import json
import math
import os
import pty
import re
import resource
import socket
import sys
import tempfile
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import make_element, make_tiny_os, skip_without
from test_dib_output import make_hooks, run_phase
from test_monitor import monitor, terminal
from test_sandbox import staged
from virt_dib import appliance as appliance_module
from virt_dib import environment as contract
from virt_dib import events, tools
from virt_dib.appliance import open_appliance
from virt_dib.errors import ApplianceError, ScriptError, ToolError
from virt_dib.interrupts import Limit, limited
from virt_dib.jobs import Event, Splitter
from virt_dib.machine import Disk, Settings
from virt_dib.machine_readable import event_json
from virt_dib.monitor import BuildMonitor, Display, summary
from virt_dib.namespaces import Inside
from virt_dib.phases import Phases
from virt_dib.report import BuildReport, ScriptResult
from virt_dib.sandbox import Sandbox, open_sandbox
from virt_dib.sandbox import Settings as SandboxSettings
from virt_dib.spec import BuildSpec, Phase

MIB = 1 << 20
TOKEN = b"0" * 24


# ---- forged events: the token is in the arguments of the runner, where every script can read it ----


def forged(phase_scripts: str, tmp_path: Path) -> list[events.Event]:
    """What a build tells whose only script prints this."""
    told: list[events.Event] = []
    run_phase(Phase.ROOT, make_hooks(tmp_path, Phase.ROOT, {"10-forger": phase_scripts}), told.append)
    return told


def say(*words: str) -> str:
    return rf"printf '\036token {' '.join(words)}\036'"


TIMES = [
    ("-1e308", "1e308"), ("nan", "nan"), ("inf", "-inf"), ("1e400", "1"), ("0", "1e308"), ("1", "0"), ("x", ""),
    ("9" * 200, "1_0"), ("-0.0", "-1"), ("\u0661", "\u0662"),
]  # fmt: skip


@pytest.mark.parametrize(("begun", "ended"), TIMES, ids=range(len(TIMES)))
def test_times_are_numbers_whatever_is_said(begun: str, ended: str, tmp_path: Path) -> None:
    told = forged(f"{say('start', 'a', begun)}\n{say('end', 'a', '0', ended)}", tmp_path)
    results = [event for event in told if isinstance(event, events.ScriptFinished)]
    assert [result.name for result in results][:1] == ["a"]
    assert all(math.isfinite(result.seconds) and result.seconds >= 0 for result in results)
    for event in told:
        line = event_json(event)
        assert line is None or json.loads(line)


@pytest.mark.parametrize("status", ["256", "512", "768", "999", "-1", "1e2", "0x1", "", "\u0661", "9" * 3000])
def test_a_script_that_fails_has_a_status_that_a_program_can_end_with(status: str, tmp_path: Path) -> None:
    """256 would be 0 to the caller of the drop-in."""
    with pytest.raises(ScriptError) as failure:
        forged(f"{say('start', 'a', '1')}\n{say('end', 'a', status, '2')}\nkill -9 $PPID", tmp_path)
    assert failure.value.script_status in range(1, 256)


def test_names_longer_than_a_file_can_have_are_no_names(tmp_path: Path) -> None:
    long = "x" * 256
    told = forged(
        "\n".join([say("list", long), say("start", long, "1"), say("end", long, "0", "2"), say("source", long)]),
        tmp_path,
    )
    names = [event.name for event in told if isinstance(event, (events.ScriptStarted, events.EnvironmentSourced))]
    assert names == ["10-forger"]
    lists = [event.scripts for event in told if isinstance(event, events.PhaseStarted)]
    assert lists == [("10-forger",)]


@pytest.mark.parametrize(
    "words",
    [["list"], ["start"], ["end"], ["end", "a", "0", "1"], ["start", "a"], ["exit", "0"], [""], ["source"], ["\\n"]],
)
def test_events_that_are_incomplete_or_come_when_nobody_waits(words: list[str], tmp_path: Path) -> None:
    told = forged(f"{say(*words)}\necho seen", tmp_path)
    assert b"seen\n" in b"".join(event.data for event in told if isinstance(event, events.Output))
    assert isinstance(told[-1], events.PhaseFinished)


def test_many_events_at_once_are_read_once() -> None:
    """With each of them moving what follows, this would take hours."""
    splitter = Splitter(TOKEN)
    record = b"\x1e" + TOKEN + b" a\x1e"
    assert sum(isinstance(piece, Event) for piece in splitter.feed(record * (16 * MIB // len(record)))) > 500_000
    assert splitter.end() == b""


def test_the_names_of_5000_scripts_are_one_event() -> None:
    names = [f"{number:04}-{'x' * 250}" for number in range(5000)]
    splitter = Splitter(TOKEN)
    data = b"\x1e" + TOKEN + f" list {' '.join(names)}\x1e".encode()
    found = [piece for start in range(0, len(data), 65536) for piece in splitter.feed(data[start : start + 65536])]
    assert found == [Event("list", tuple(names))]


def test_an_event_without_an_end_becomes_output() -> None:
    splitter = Splitter(TOKEN)
    data = b"\x1e" + TOKEN + b" list " + b"x" * (8 * MIB)
    output = bytearray()
    for start in range(0, len(data), MIB):
        for piece in splitter.feed(data[start : start + MIB]):
            assert isinstance(piece, bytes)
            output += piece
    assert bytes(output) + splitter.end() == data


# ---- the job of a sandbox, without one ----


class FirstProcess:
    """Stands for the first process of a sandbox: answers one job with a stream that the test has made."""

    pid = os.getpid()

    def __init__(self, stream: int, messages: Sequence[bytes]) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stream = stream
        self._messages = messages

    def wait(self, timeout: float | None = None) -> int:
        del timeout
        return 0

    def start(self) -> None:
        _, descriptors, _, _ = socket.recv_fds(self.theirs, 64, 2)
        for descriptor in descriptors:
            os.close(descriptor)
        socket.send_fds(self.theirs, [b"output"], [self._stream])
        for message in self._messages:
            self.say(message)

    def say(self, message: bytes) -> None:
        self.theirs.send(message)


@contextlib.contextmanager
def job(stream: int, *messages: bytes) -> Iterator[tuple[FirstProcess, Inside]]:
    """Then come the *messages*."""
    first = FirstProcess(stream, messages)
    with (
        first.ours,
        first.theirs,
        tempfile.TemporaryFile() as output,
        concurrent.futures.ThreadPoolExecutor(1) as other,
    ):
        started = other.submit(first.start)
        yield first, Inside(first, first.ours, output)
        started.result()


def test_what_is_there_is_taken_without_waiting_for_more() -> None:
    """A process of the job may have taken it meanwhile, and to wait for more would be to wait for ever, deaf to limits.

    A terminal that shall give 255 bytes or nothing is such a stream: there seems to be something to read.
    """
    leader, follower = pty.openpty()
    tty.setraw(follower)
    attributes = termios.tcgetattr(follower)
    attributes[6][termios.VMIN], attributes[6][termios.VTIME] = 255, 255
    termios.tcsetattr(follower, termios.TCSANOW, attributes)
    received, seen = bytearray(), threading.Event()

    def take(data: bytes) -> None:
        received.extend(data)
        seen.set()

    with job(follower) as (first, inside), concurrent.futures.ThreadPoolExecutor(1) as other:

        def end() -> bool:
            os.write(leader, b"x")
            came = seen.wait(15)
            first.say(b"exit 0")
            return came

        came = other.submit(end)
        assert inside.run_text(b"", 0, take) == 0
        assert came.result()
    assert received == b"x"
    os.close(leader)
    os.close(follower)


@pytest.mark.parametrize(
    "message",
    [b"exit 256", b"exit -1", b"exit", b"exit 0 0", b"exit 1e1", b"output", b"\xff" * 1000, b"failed \x1b[2J"],
)
def test_an_end_that_makes_no_sense_is_an_error(message: bytes) -> None:
    reader, writer = os.pipe()
    with job(reader, message) as (_, inside), pytest.raises(ApplianceError, match="running the sandbox"):
        inside.run_text(b"", 0, lambda _: None)
    os.close(reader)
    os.close(writer)


# ---- an appliance whose agent is the guest's ----


class HostileAgent:
    """In place of libguestfs: what it gives when the agent in the appliance, which scripts can replace, says anything.

    The token is in what is written to start a job, as it is in the guest.
    """

    def __init__(self) -> None:
        self.script = b""
        self.output: Callable[[int], bytes] = lambda _: b""
        self.archive_bytes = 0

    def get_cachedir(self) -> str:
        raise RuntimeError("does not start")

    def write(self, _path: str, data: bytes) -> None:
        self.script = data

    def debug(self, _command: str, _arguments: list[str]) -> str:
        return "1\x1b[2J; rm -rf /\n"

    def pread(self, _path: str, count: int, _offset: int) -> bytes:
        return self.output(count)

    def tar_out(self, _directory: str, target: str) -> None:
        with open(target, "wb") as stream:
            for _ in range(self.archive_bytes // MIB):
                stream.write(bytes(MIB))
                stream.flush()
                time.sleep(0.02)

    def close(self) -> None:
        pass


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> HostileAgent:
    hostile = HostileAgent()
    monkeypatch.setattr(appliance_module, "new_handle", lambda _settings: hostile)
    return hostile


def settings(tmp_path: Path) -> Settings:
    disk = tmp_path / "build.img"
    disk.touch()
    disks = [Disk(path=disk, label="build")]
    return Settings(disks=disks, cache_dir=tmp_path, memory_mib=512, cpus=1, network=False, accelerate=False)


def test_output_without_end_does_not_keep_a_limit_from_ending_it(agent: HostileAgent, tmp_path: Path) -> None:
    """As of 'yes': there is always as much as is asked for."""
    agent.output = bytes
    received = 0

    def take(data: bytes) -> None:
        nonlocal received
        received += len(data)
        assert received < 100_000 * MIB, "no end"

    limit = Limit(0.5, lambda: ToolError("too long"))
    limit.start()
    with open_appliance(settings(tmp_path)) as running, limited(limit), pytest.raises(ToolError, match="too long"):
        running.run(["yes"], {}, "/", on_output=take)


def test_an_archive_ends_at_its_limit(agent: HostileAgent, tmp_path: Path) -> None:
    agent.archive_bytes = 100 * MIB
    with open_appliance(settings(tmp_path)) as running, pytest.raises(ApplianceError, match=f"more than {MIB} bytes"):
        running.archive("/dib/out", tmp_path / "out.tar", limit_bytes=MIB)


# ---- output of scripts, in the sandbox ----


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    skip_without("sandbox")
    directory = staged(tmp_path_factory.mktemp("box"))
    with open_sandbox(SandboxSettings(directory=directory, network=False)) as running:
        yield running


def run_scripts(
    box: Sandbox, monitor_: BuildMonitor, scripts: dict[str, str], script_timeout_s: float | None = None
) -> list[ScriptResult]:
    """Run them as those of root.d; give their results."""
    place = f"{contract.HOOKS}/root.d"
    box.run(["/bin/bash", "-c", f"kill -KILL -1; rm -rf {place}; mkdir -p {place}"], {"PATH": "/usr/bin:/bin"}, "/")
    for name, text in scripts.items():
        box.write(f"{place}/{name}", f"#!/bin/bash\n{text}\n".encode())
    box.run(["/bin/bash", "-c", f"chmod 755 {place}/*"], {"PATH": "/usr/bin:/bin"}, "/")
    nothing = contract.BlockDevices(root_label="", root_fstype="", boot_label="", mount_points="")
    spec = BuildSpec(name="x", output_dir=Path(), elements=())
    facts = contract.Facts(spec=spec, elements=(), element_dirs={}, elements_path=(), block_devices=nothing)
    phases = Phases({}, monitor_, script_timeout_s=script_timeout_s)
    phases.run(box, Phase.ROOT, facts)
    return [result for phase in phases.results for result in phase.scripts]


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("text", "size_bytes", "newlines"),
    [
        pytest.param("head -c 1000000000 /dev/zero", 1_000_000_000, 0, id="a gigabyte of NULs"),
        pytest.param("head -c 100000000 /dev/zero | tr '\\0' x", 100_000_000, 0, id="a line of 100 MB"),
        pytest.param("yes | head -c 50000000", 50_000_000, 25_000_000, id="short lines"),
        pytest.param("head -c 10000000 /dev/zero | tr '\\0' '\\033'", 10_000_000, 0, id="escapes"),
    ],
)
def test_much_output_is_logged_as_it_is_and_takes_no_memory(
    box: Sandbox, tmp_path: Path, text: str, size_bytes: int, newlines: int
) -> None:
    log = tmp_path / "x.log"
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(os.devnull, "w") as nowhere, monitor(log, nowhere) as shown:
        results = run_scripts(box, shown, {"10-much": text, "20-after": "echo after"})
        assert shown.tail() == ("after",)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 100 * 1024
    assert [(result.name, result.exit_status) for result in results] == [("10-much", 0), ("20-after", 0)]
    written = log.stat().st_size
    assert size_bytes < written < size_bytes + 10_000
    with log.open("rb") as stream:
        assert newlines < sum(data.count(b"\n") for data in iter(lambda: stream.read(MIB), b"")) < newlines + 100
    log.unlink()


@pytest.mark.sandbox
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("exec >&- 2>&-; : >/dib/tmp/closed", id="closes its output"),
        pytest.param("exec 0<&- 1>&- 2>&-; exec sleep 0.1", id="closes everything"),
        pytest.param("sleep 1000 & disown; echo text", id="leaves a process with its output"),
        pytest.param("(trap '' TERM HUP INT; setsid sleep 1000 </dev/null &) ; echo text", id="leaves a daemon"),
        pytest.param("(while :; do echo noise; sleep 0.01; done) & echo text", id="leaves a process that prints"),
        pytest.param("setsid bash -c 'exec >/dev/null 2>&1; sleep 1000' & echo text", id="leaves one without output"),
        pytest.param(r"printf 'no newline'", id="has no newline"),
        pytest.param(r"printf 'half of a sequence \033]52;c;'", id="leaves a sequence open"),
        pytest.param(r"printf 'half of a character \342\202'", id="leaves a character open"),
        pytest.param("echo text >/dev/stderr; echo text >/dev/stdout", id="opens it again"),
        pytest.param("(sleep 0.3; kill -CONT $$) & kill -STOP $$; wait; echo text", id="is stopped for a while"),
    ],
)
def test_a_script_ends_when_it_ends_and_the_next_one_is_heard(box: Sandbox, tmp_path: Path, text: str) -> None:
    log, stream = tmp_path / "x.log", io.StringIO()
    with monitor(log, stream) as shown:
        results = run_scripts(box, shown, {"10-odd": text, "20-after": "echo after"})
    assert [(result.name, result.exit_status) for result in results] == [("10-odd", 0), ("20-after", 0)]
    lines = stream.getvalue().split("\n")
    assert "after" in lines
    assert any(line.endswith("] root.d/20-after") for line in lines)
    assert b"\nafter\n" in log.read_bytes()


@pytest.mark.sandbox
def test_a_script_that_prints_without_end_is_ended(box: Sandbox, tmp_path: Path) -> None:
    """And the sandbox may be used after it, as by --on-error shell."""
    with open(os.devnull, "w") as nowhere, monitor(tmp_path / "x.log", nowhere) as shown:
        with pytest.raises(ScriptError, match=r"root\.d/10-endless has taken longer than 2 s, and was ended"):
            run_scripts(box, shown, {"10-endless": "yes"}, script_timeout_s=2)
        # The script ends of itself now, for nobody reads what it prints.
        time.sleep(1)
        assert box.run(["/bin/bash", "-c", "echo here"], {}, "/").tail == "here\n"
        (tmp_path / "x.log").unlink()


STEERING = {
    "a title": r"\033]0;owned\007",
    "the clipboard": r"\033]52;c;cm0gLXJmIC8K\007",
    "the clipboard, by 8-bit controls": r"\302\23552;c;cm0gLXJmIC8K\302\234",
    "questions": r"\033[6n\033[c\033[>c\033Z\005\033[21t",
    "another screen": r"\033[?1049h\033[2J\033[1;1H",
    "keys": r"\033[?1000h\033[?2004h\033[=5u",
    "a line of ours": r"\r\033[2K[   0.0] finished",
    "text turned around": r"\342\200\256lru\342\200\254",
    "text that is not seen": r"a\342\200\213b\357\273\277c\363\240\201\201",
    "a device control string": r"\033P+q544e\033\\",
    "backspaces": r"virus\b\b\b\b\bfine",
    "invalid characters": r"\377\376\300\257\355\240\200",
    "NULs": r"a\0b",
    "a hyperlink": r"\033]8;;file:///etc/passwd\033\\click\033]8;;\033\\",
}


@pytest.mark.sandbox
def test_a_terminal_gets_nothing_that_steers_it_and_the_log_gets_all(box: Sandbox, tmp_path: Path) -> None:
    scripts = {f"{10 + number}-steer": f"printf '{text}\\n'" for number, text in enumerate(STEERING.values())}
    log = tmp_path / "x.log"
    with terminal() as (stream, screen):
        with monitor(log, stream) as shown:
            run_scripts(box, shown, {**scripts, "99-end": "echo the end"})
        screen.read_until("the end")
        screen.read_all()
        # It knows the sequences of the status line alone, and fails on all others.
        lines = screen.lines()
    assert "the end" in lines
    assert not [char for line in lines for char in line if not char.isprintable()]
    raw = log.read_bytes()
    for text in STEERING.values():
        assert text.encode().decode("unicode_escape").encode("latin-1") in raw


@pytest.mark.sandbox
def test_forged_names_and_times_are_shown_and_told(box: Sandbox, tmp_path: Path) -> None:
    """By a script that has read the token, whatever that is."""
    forge = r"""
        token=$(tr '\0' '\n' </proc/$PPID/cmdline | tail -n 1)
        printf "\036$token start \033]52;c;eA==\007\nname -1e308\036\036$token end x 0 1e308\036\036$token list a b\036"
        printf "\036$token exit 0\036"; echo still here
    """
    stream, told = io.StringIO(), []

    def listen(event: events.Event) -> None:
        told.append(event_json(event))
        display(event)

    with Display(stream, verbose=True) as display:
        shown = BuildMonitor(listen)
        with shown.logging(tmp_path / "x.log"):
            results = run_scripts(box, shown, {"10-forge": forge, "20-after": "echo after"})
    assert "still here\n" in stream.getvalue()
    assert "after\n" in stream.getvalue()
    assert not [char for char in stream.getvalue() if not char.isprintable() and char != "\n"]
    assert results[-1].name == "20-after"
    assert all(line is None or json.loads(line) for line in told)
    assert "\x1b" not in summary(BuildReport(name="x", phases=[], artifacts=[], seconds=1.0))


# ---- in a whole build, in the appliance ----

LINE_BYTES = 100_000_000
FACTS = """
mkdir facts
cd facts
umask >umask
cp /proc/self/environ environ
for name in cmdline cpuinfo self/mountinfo; do cat "/proc/$name" >"$(basename "$name")"; done
cp /etc/passwd passwd
id -un >user
"""
"""Has a script write down, in NAME.d, what of the list of bytes on docs/security.md it can see."""
OUTSIDE = {"TERM": "xterm-256color", "LANG": "xx_XX.UTF-8"}
"""Of the host, and not for the guest."""
WITH_UMASK = ("/bin/sh", "-c", 'umask 077; exec "$@"', "sh")


@dataclass(frozen=True, kw_only=True)
class LoudBuild:
    """A build whose scripts say and close what they can, on a terminal."""

    exit_status: int
    screen: bytes
    output_dir: Path


@functools.cache
def build_loud(directory: Path) -> LoudBuild:
    """Once for the modules that look at it."""
    directory.mkdir()
    make_tiny_os(directory)
    texts = {
        "20-facts": FACTS,
        "21-closes": "exec 0<&- 1>&- 2>&-; : >closed",
        "22-line": f"head -c {LINE_BYTES} /dev/zero | tr '\\0' x",
        **{f"{30 + number}-steer": f"printf '{text}\\n'" for number, text in enumerate(STEERING.values())},
        "90-leaves": "(trap '' TERM HUP INT; setsid sleep 1000 &); echo left one with its output",
        "91-end": "echo the end",
    }
    make_element(directory, "loud", {f"root.d/{name}": f"#!/bin/bash\n{text}\n" for name, text in texts.items()})
    (directory / "out").mkdir()
    (directory / "temporary").mkdir()
    command: list[str | Path] = [
        *WITH_UMASK, sys.executable, "-m", "virt_dib", "--name", "x", "--formats", "tar", "--skip-base", "--no-network",
        "--kvm", "off", "-p", directory, "tiny-os", "loud",
    ]  # fmt: skip
    environment = {**os.environ, **OUTSIDE, "TMPDIR": str(directory / "temporary")}
    leader, follower = pty.openpty()
    screen = bytearray()
    with tools.started(
        command, cwd=directory / "out", environment=environment, stdin=follower, stdout=follower, stderr=follower
    ) as build:
        os.close(follower)
        # An error is Linux's way to say that nobody has the other side open any more.
        with contextlib.suppress(OSError):
            while data := os.read(leader, 1 << 16):
                screen += data
        exit_status = build.wait()
    os.close(leader)
    return LoudBuild(exit_status=exit_status, screen=bytes(screen), output_dir=directory / "out")


@pytest.fixture(scope="session")
def loud_build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoudBuild]:
    built = build_loud(tmp_path_factory.getbasetemp() / "loud-build")
    yield built
    # It is long, and pytest keeps the files of several runs.
    (built.output_dir / "x.log").unlink(missing_ok=True)


@pytest.mark.appliance
def test_a_whole_build_of_scripts_that_print_anything_and_close_their_output(loud_build: LoudBuild) -> None:
    assert loud_build.exit_status == 0, loud_build.screen[-5000:]
    assert (loud_build.output_dir / "x.d/closed").exists()
    raw = (loud_build.output_dir / "x.log").read_bytes()
    assert b"x" * LINE_BYTES in raw
    assert len(raw) < LINE_BYTES + 100_000
    for text in STEERING.values():
        assert text.encode().decode("unicode_escape").encode("latin-1") in raw
    # Each has begun after the one before had ended, whatever that had closed, or left behind.
    assert b"\nleft one with its output\n" in raw
    assert b"\nthe end\n" in raw


@pytest.mark.appliance
def test_the_terminal_of_a_whole_build_gets_nothing_that_steers_it(loud_build: LoudBuild) -> None:
    """But colours, and what takes the status line away."""
    shown = re.sub(r"\x1b\[[0-9;]*m|\x1b\[K|[\r\n]", "", loud_build.screen.decode())
    assert shown.count("x") >= LINE_BYTES
    assert "the end" in shown
    assert shown.isprintable(), {char for char in shown if not char.isprintable()}
