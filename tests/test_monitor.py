# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import struct
import sys
import termios
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from virt_dib import events, tools
from virt_dib.errors import Interrupted, Problem, ScriptError, ToolError, VirtDibError
from virt_dib.monitor import BuildMonitor, Display, size_text, summary
from virt_dib.report import Artifact, BuildReport, PhaseResult, ScriptResult
from virt_dib.spec import BuildSpec, Phase
from virt_dib.terminal import columns_of

MIB = 1 << 20
COLUMNS = 60
OWN_LINE = re.compile(r"\[ *[0-9]+\.[0-9]\] (.*)")


@contextlib.contextmanager
def monitor(log_path: Path, stream: TextIO, *, quiet: bool = False, verbose: bool = False) -> Iterator[BuildMonitor]:
    """A build as the command shows it."""
    with Display(stream, quiet=quiet, verbose=verbose) as display:
        shown = BuildMonitor(display)
        spec = BuildSpec(name="d", output_dir=log_path.parent, elements=("foo",))
        with shown.following(spec), shown.logging(log_path):
            shown.planned(["foo"], 4)
            yield shown


def script_result(name: str, exit_status: int = 0) -> ScriptResult:
    return ScriptResult(phase=Phase.INSTALL, name=name, element="foo", exit_status=exit_status, seconds=1.25)


def without_times(text: str) -> str:
    return re.sub(r"^\[ *[0-9.]+\]", "[T]", text, flags=re.MULTILINE)


# ---- the log ----


def test_log_has_the_bytes_as_they_came_between_our_lines(tmp_path: Path) -> None:
    junk = bytes(range(256)) + b"\x1b[31m\r50%\r100%"
    log = tmp_path / "d.log"
    with monitor(log, io.StringIO()) as shown:
        shown.message("starting the appliance (emulated)")
        shown.phase_started("install.d", ["50-foo"])
        shown.script_started("50-foo")
        shown.output(junk[:100])
        shown.output(junk[100:])
        shown.script_finished(script_result("50-foo"))
        shown.phase_finished(PhaseResult(title="install.d", seconds=2.0))
    data = re.sub(rb"(?m)^\[ *[0-9.]+\] ", b"[T] ", log.read_bytes())
    assert data == (
        b"[T] starting the appliance (emulated)\n[T] install.d/50-foo\n"
        + junk
        + b"\n[T] install.d/50-foo done after 1.2 s\n[T] install.d done after 2.0 s\n"
    )


def test_each_piece_of_output_is_in_the_file_at_once(tmp_path: Path) -> None:
    log = tmp_path / "d.log"
    with monitor(log, io.StringIO()) as shown:
        shown.phase_started("install.d", ["50-foo"])
        shown.script_started("50-foo")
        assert log.read_text().endswith("] install.d/50-foo\n")
        shown.output(b"half a li")
        assert log.read_text().endswith("half a li")


def test_line_number_is_where_the_output_of_the_script_starts(tmp_path: Path) -> None:
    log = tmp_path / "d.log"
    with monitor(log, io.StringIO()) as shown:
        shown.message("two\nlines")
        shown.phase_started("install.d", ["10-a", "20-b"])
        shown.script_started("10-a")
        shown.output(b"first a\nsecond a, no newline")
        shown.script_finished(script_result("10-a"))
        shown.script_started("20-b")
        shown.output(b"first b\n")
        lines = log.read_bytes().split(b"\n")
        assert lines[shown.line_number - 1] == b"first b"
        shown.phase_started("copying the tree", [])
        shown.output(b"copied\n")
        assert log.read_bytes().split(b"\n")[shown.line_number - 1] == b"copied"


def test_log_replaces_the_earlier_one(tmp_path: Path) -> None:
    log = tmp_path / "d.log"
    log.write_text("of the earlier build\n" * 100)
    with monitor(log, io.StringIO()) as shown:
        shown.message("new")
    assert without_times(log.read_text()) == "[T] new\n"
    assert [path.name for path in tmp_path.iterdir()] == ["d.log"]


def test_log_never_writes_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    log = tmp_path / "d.log"
    log.symlink_to(target)
    with monitor(log, io.StringIO()) as shown:
        shown.message("new")
    assert target.read_text() == "precious"
    assert not log.is_symlink()


def test_log_that_cannot_be_created_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "d.log").mkdir()
    with pytest.raises(ToolError, match=r"creating the log '.*d\.log': Is a directory") as caught:
        monitor(tmp_path / "d.log", io.StringIO()).__enter__()
    assert caught.value.problems[0].hint
    assert [path.name for path in tmp_path.iterdir()] == ["d.log"]
    with pytest.raises(ToolError, match="No such file or directory"):
        monitor(tmp_path / "missing" / "d.log", io.StringIO()).__enter__()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ScriptError("install.d/50-foo failed with exit status 3"),
            "error: install.d/50-foo failed with exit status 3",
        ),
        (VirtDibError.of([Problem("one"), Problem("two")]), "error: one\n[T] error: two"),
        (Interrupted(), "interrupted"),
        (ValueError("a bug"), "stopped by ValueError: a bug"),
    ],
    ids=["script", "two problems", "interrupted", "bug"],
)
def test_log_is_kept_on_failure_and_ends_with_the_error(tmp_path: Path, error: BaseException, words: str) -> None:
    stream = io.StringIO()

    def build() -> None:
        with monitor(tmp_path / "d.log", stream) as shown:
            shown.phase_started("install.d", ["50-foo"])
            shown.script_started("50-foo")
            shown.output(b"oops")
            raise error

    with pytest.raises(type(error)):
        build()
    assert without_times((tmp_path / "d.log").read_text()) == f"[T] install.d/50-foo\noops\n[T] {words}\n"
    assert "error" not in stream.getvalue()


def test_full_disk_under_the_log_is_one_error(tmp_path: Path) -> None:
    program = f"""
import resource
from pathlib import Path
from virt_dib.errors import ToolError
from virt_dib.monitor import BuildMonitor
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
monitor = BuildMonitor()
try:
    with monitor.logging(Path({str(tmp_path / "d.log")!r})):
        for _ in range(100):
            monitor.output(b"x" * 99 + b"\\n")
except ToolError as error:
    print(error)
# Or it could not write what coverage measures, either.
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
"""
    result = tools.run([sys.executable, "-c", program], doing="filling the log", environment=os.environ)
    assert result.stdout.startswith("writing the log '")
    assert result.stdout.endswith("': File too large\n")
    assert (tmp_path / "d.log").stat().st_size == 1000


def test_memory_does_not_grow_with_output(tmp_path: Path) -> None:
    chunk = b"\x1b]" + b"x" * (MIB - 2)
    with Path(os.devnull).open("w") as nowhere, monitor(tmp_path / "d.log", nowhere) as shown:
        shown.phase_started("install.d", ["50-foo"])
        shown.script_started("50-foo")
        shown.output(chunk)
        tracemalloc.start()
        try:
            for _ in range(99):
                shown.output(chunk)
            kept, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert kept < MIB
        assert peak < 16 * MIB
        assert len(shown.tail()) == 1
        assert len(shown.tail()[0]) == 500
    assert (tmp_path / "d.log").stat().st_size > 100 * MIB
    (tmp_path / "d.log").unlink()


# ---- the events ----


def told_of(log_path: Path, *, fail: BaseException | None = None) -> list[events.Event]:
    """The events of a build of two phases and a step."""
    told: list[events.Event] = []
    shown = BuildMonitor(told.append)
    spec = BuildSpec(name="d", output_dir=log_path.parent, elements=("foo",))
    with contextlib.suppress(ScriptError), shown.following(spec), shown.logging(log_path):
        shown.planned(["foo", "base"], 2)
        shown.phase_started("root.d", [])
        shown.phase_finished(PhaseResult(title="root.d", seconds=1.0))
        shown.phase_started("copying the tree", [])
        shown.output(b"copied\n")
        shown.phase_finished(PhaseResult(title="copying the tree", seconds=1.0))
        shown.phase_started("install.d", ["50-foo"])
        for name, status in (("50-foo", 0), ("60-added", 3)):
            shown.script_started(name, "foo" if name == "50-foo" else None)
            shown.output(b"hel")
            shown.output(b"lo\n")
            shown.script_finished(script_result(name, status))
        if fail is not None:
            raise fail
    return told


def test_events_tell_how_far_a_build_is(tmp_path: Path) -> None:
    told = told_of(tmp_path / "d.log")
    phases = [event for event in told if isinstance(event, events.PhaseStarted)]
    assert [(event.title, event.step, event.number, event.total) for event in phases] == [
        ("root.d", False, 1, 2),
        ("copying the tree", True, 2, 2),
        ("install.d", False, 3, 3),
    ]
    scripts = [event for event in told if isinstance(event, events.ScriptStarted)]
    assert [(event.name, event.element, event.number, event.total) for event in scripts] == [
        ("50-foo", "foo", 1, 1),
        ("60-added", None, 2, 2),
    ]
    ended = [event for event in told if isinstance(event, events.ScriptFinished)]
    assert [event.exit_status for event in ended] == [0, 3]
    assert b"".join(event.data for event in told if isinstance(event, events.Output)) == b"copied\nhello\nhello\n"
    assert [event.elapsed_s for event in told] == sorted(event.elapsed_s for event in told)


def test_events_know_where_output_is_in_the_log(tmp_path: Path) -> None:
    told = told_of(tmp_path / "d.log")
    lines = (tmp_path / "d.log").read_text().split("\n")
    for event in told:
        if isinstance(event, (events.ScriptStarted, events.ScriptFinished)):
            assert lines[event.log_line - 1] == "hello"


@pytest.mark.parametrize("problems", [1, 2])
def test_events_tell_each_reason_of_a_failure_and_where_it_was(tmp_path: Path, problems: int) -> None:
    reasons = [Problem(f"reason {number}", "a hint", ("last line",)) for number in range(problems)]
    told = told_of(tmp_path / "d.log", fail=ScriptError.of(reasons))
    last = told[-1]
    assert isinstance(last, events.BuildFailed)
    assert (last.phase, last.script, last.log_path, last.exit_status, last.interrupted) == (
        "install.d", "60-added", tmp_path / "d.log", 1, False,
    )  # fmt: skip
    found = [event for event in told if isinstance(event, events.ErrorFound)]
    assert [(event.text, event.hint, event.details) for event in found] == [
        (reason.message, "a hint", ("last line",)) for reason in reasons
    ]


def test_a_log_that_is_full_ends_the_build_whatever_thread_writes_there(tmp_path: Path) -> None:
    program = f"""
import resource, threading
from pathlib import Path
from virt_dib.errors import ToolError
from virt_dib.monitor import BuildMonitor
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
monitor = BuildMonitor()
try:
    with monitor.logging(Path({str(tmp_path / "d.log")!r})):
        thread = threading.Thread(target=monitor.debug, args=["x" * 2000])
        thread.start()
        thread.join()
        monitor.message("next")
except ToolError as error:
    print(error)
"""
    # It could not write what coverage measures, either.
    environment = {**os.environ, "COVERAGE_PROCESS_START": ""}
    result = tools.run([sys.executable, "-c", program], doing="filling the log", environment=environment)
    assert result.stdout.endswith("': File too large\n")
    assert result.stderr == ""


# ---- the tail ----


def test_tail_is_the_end_of_the_current_script_alone(tmp_path: Path) -> None:
    with monitor(tmp_path / "d.log", io.StringIO()) as shown:
        shown.phase_started("install.d", ["10-a", "20-b"])
        shown.script_started("10-a")
        shown.output(b"of a\n")
        shown.script_finished(script_result("10-a"))
        assert shown.tail() == ("of a",)
        shown.script_started("20-b")
        assert shown.tail() == ()
        shown.output("".join(f"line {number}\n" for number in range(100)).encode() + b"\x1b[31mno newline")
        shown.script_finished(script_result("20-b", 3))
    assert shown.tail(3) == ("line 98", "line 99", "no newline")
    assert len(shown.tail()) == 20
    assert shown.tail(0) == ()


def test_tail_cuts_long_lines(tmp_path: Path) -> None:
    with monitor(tmp_path / "d.log", io.StringIO()) as shown:
        shown.output(b"x" * 300_000 + b"\n" + b"y" * 500 + b"\n" + b"z" * 501)
    lines = shown.tail()
    assert lines[-2:] == ("y" * 500, "z" * 499 + "…")
    assert all(len(line) <= 500 for line in lines)


# ---- standard output that is no terminal ----


def run_one_script(shown: BuildMonitor) -> None:
    shown.message("starting the appliance (emulated)")
    shown.phase_started("copying the tree", [])
    shown.phase_started("install.d", ["50-\x1b[31mfoo\n"])
    shown.script_started("50-\x1b[31mfoo\n")
    shown.output(b"\x1b[1mhel")
    shown.output(b"lo\x1b[0m\x07\nno newline")
    shown.warning("look here")
    shown.script_finished(script_result("50-foo", 137))
    shown.phase_finished(PhaseResult(title="install.d", seconds=2.0))


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    with monitor(tmp_path / "d.log", stream) as shown:
        run_one_script(shown)
    assert without_times(stream.getvalue()) == (
        "[T] starting the appliance (emulated)\n"
        "[T] copying the tree\n"
        "[T] install.d/50-foo \n"
        "hello\n"
        "no newline\n"
        "[T] warning: look here\n"
    )


def test_own_lines_begin_with_the_seconds_as_those_of_virt_tools_do(tmp_path: Path) -> None:
    stream = io.StringIO()
    with monitor(tmp_path / "d.log", stream) as shown:
        shown.message("x")
    assert re.fullmatch(r"\[ {3}\d\.\d\] x\n", stream.getvalue())


def test_verbose_adds_how_scripts_and_phases_ended(tmp_path: Path) -> None:
    stream = io.StringIO()
    with monitor(tmp_path / "d.log", stream, verbose=True) as shown:
        run_one_script(shown)
    assert without_times(stream.getvalue()).endswith(
        "[T] install.d/50-foo failed with exit status 137 (SIGKILL) after 1.2 s\n[T] install.d done after 2.0 s\n"
    )


def test_quiet_prints_warnings_alone_and_logs_everything(tmp_path: Path) -> None:
    stream = io.StringIO()
    with monitor(tmp_path / "loud.log", io.StringIO()) as shown:
        run_one_script(shown)
    with monitor(tmp_path / "quiet.log", stream, quiet=True, verbose=True) as shown:
        run_one_script(shown)
        assert shown.tail() == ("hello", "no newline")
    assert without_times(stream.getvalue()) == "[T] warning: look here\n"
    loud, quiet = ((tmp_path / f"{name}.log").read_text() for name in ("loud", "quiet"))
    assert without_times(quiet) == without_times(loud)


def test_an_unfinished_sequence_of_one_script_does_not_eat_the_next_ones_output(tmp_path: Path) -> None:
    stream = io.StringIO()
    with monitor(tmp_path / "d.log", stream) as shown:
        shown.phase_started("install.d", ["10-a", "20-b"])
        shown.script_started("10-a")
        shown.output(b"a\x1b]0;")
        shown.script_finished(script_result("10-a"))
        shown.script_started("20-b")
        shown.output(b"b\n")
    assert without_times(stream.getvalue()) == "[T] install.d/10-a\na0;\n[T] install.d/20-b\nb\n"


def test_characters_the_stream_cannot_encode_become_question_marks(tmp_path: Path) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with monitor(tmp_path / "d.log", stream) as shown:
        shown.output("café\n".encode())
    assert raw.getvalue() == b"caf?\n"


def test_lines_from_two_threads_stay_whole(tmp_path: Path) -> None:
    stream = io.StringIO()

    def talk(word: str) -> None:
        for _ in range(300):
            shown.message(word * 50)

    with monitor(tmp_path / "d.log", stream) as shown:
        threads = [threading.Thread(target=talk, args=[word]) for word in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = {"[T] " + "a" * 50: 300, "[T] " + "b" * 50: 300}
    for text in (stream.getvalue(), (tmp_path / "d.log").read_text()):
        lines = without_times(text).splitlines()
        assert {line: lines.count(line) for line in lines} == expected


def test_nobody_reading_does_not_end_the_build(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from virt_dib.monitor import BuildMonitor, Display
from virt_dib.plain_text import write_out
monitor = BuildMonitor(Display(sys.stdout))
with monitor.logging(Path({str(tmp_path / "d.log")!r})):
    monitor.message("first")
    sys.stdin.readline()
    for number in range(1000):
        monitor.output(b"%d\\n" % number)
    monitor.message("last")
write_out(sys.stdout, "summary")
"""
    with tools.started([sys.executable, "-c", program], stdin=-1) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline().endswith(b"first\n")
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
    assert (tmp_path / "d.log").read_text().splitlines()[-2] == "999"


# ---- a terminal ----


class Screen:
    """The other end of a pseudo-terminal: enough of a terminal to tell what stands on it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.seen = ""

    def read_until(self, pattern: str, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, self.seen):
            assert time.monotonic() < deadline, f"{pattern!r} not on the terminal: {self.seen!r}"
            self._read(0.1)

    def read_all(self) -> None:
        while self._read(0.0):
            pass

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self._descriptor], [], [], timeout_s)[0]:
            return False
        self.seen += os.read(self._descriptor, 65536).decode()
        return True

    def lines(self) -> list[str]:
        """What stands on the terminal; fails on any control it does not know and on a status line too long."""
        lines, column = [""], 0
        for part in re.findall(r"\x1b\[[0-9;]*m|\x1b\[K|[\r\n]|[^\r\n\x1b]+|.", self.seen, re.DOTALL):
            if part == "\r":
                column = 0
            elif part == "\n":
                lines.append("")
                column = 0
            elif part == "\x1b[K":
                lines[-1] = lines[-1][:column]
            elif not part.startswith("\x1b["):
                assert part.isprintable(), repr(part)
                lines[-1] = lines[-1][:column] + part + lines[-1][column + len(part) :]
                column += len(part)
                assert column < COLUMNS or "/4]" not in part
        return lines


@contextlib.contextmanager
def terminal() -> Iterator[tuple[TextIO, Screen]]:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    try:
        with os.fdopen(follower, "w") as stream:
            yield stream, Screen(leader)
    finally:
        os.close(leader)


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_status_line_shows_the_position_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with terminal() as (stream, screen):
        with monitor(tmp_path / "d.log", stream) as shown:
            shown.phase_started("root.d", ["10-a"])
            shown.phase_started("install.d", ["50-foo", "60-bar"])
            shown.script_started("50-foo")
            screen.read_until(r"\[2/4\] install\.d  1/2 50-foo  0:\d\d")
            for number in range(200):
                shown.output(f"line {number}\n".encode())
            shown.script_finished(script_result("50-foo"))
            shown.script_started("60-" + "long" * 40)
            screen.read_until(r"2/2 60-long\w*\.\.\.  0:\d\d")
            shown.output(b"half")
            shown.output(b" a line")
            shown.message("a message")
            screen.read_until("a message")
        screen.read_all()
    name = "long" * 40
    shown_lines = [OWN_LINE.sub(r"[T] \1", line) for line in screen.lines() if name not in line]
    assert shown_lines == [
        "[T] install.d/50-foo",
        *(f"line {number}" for number in range(200)),
        "half a line",
        "[T] a message",
        "",
    ]


@pytest.mark.parametrize(
    ("columns", "status"), [(60, r"\[1/4\] アプライアンスの起動  \d+:\d\d"), (20, r"\[1/4\] アプ\.\.\.  \d+:\d\d")]
)
def test_the_status_line_is_in_japanese_and_no_wider_than_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int, status: str
) -> None:
    monkeypatch.setenv("LANGUAGE", "ja")
    with terminal() as (stream, screen):
        fcntl.ioctl(stream, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        with monitor(tmp_path / "d.log", stream) as shown:
            shown.phase_started("starting the appliance", [])
            screen.read_until(status)
        screen.read_all()
    shown_statuses = re.findall(r"\[1/4\][^\x1b]*", screen.seen)
    assert max(map(columns_of, shown_statuses)) < columns


def test_no_status_line_breaks_into_an_unfinished_line(tmp_path: Path) -> None:
    with terminal() as (stream, screen):
        with monitor(tmp_path / "d.log", stream) as shown:
            shown.phase_started("install.d", ["50-foo"])
            shown.script_started("50-foo")
            screen.read_until(r"\[1/4\]")
            shown.output(b"working...")
            # Long enough for the status line to be drawn, were it going to be.
            time.sleep(0.5)
            shown.output(b" done\n")
        screen.read_all()
    assert screen.lines()[-2:] == ["working... done", ""]
    assert "working... done" in screen.seen


def test_colours_only_where_they_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def colours_of(stream: TextIO, screen: Screen) -> list[str]:
        with monitor(tmp_path / "d.log", stream) as shown:
            shown.message("x")
            shown.warning("y")
        screen.read_all()
        return re.findall(r"\x1b\[[0-9;]*m", screen.seen)

    with terminal() as (stream, screen):
        assert len(colours_of(stream, screen)) == 4
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal() as (stream, screen):
        assert colours_of(stream, screen) == []
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    with terminal() as (stream, screen):
        assert colours_of(stream, screen) == []


def test_quiet_draws_no_status_line(tmp_path: Path) -> None:
    with terminal() as (stream, screen):
        with monitor(tmp_path / "d.log", stream, quiet=True) as shown:
            run_one_script(shown)
            time.sleep(0.5)
        screen.read_all()
    assert [OWN_LINE.sub(r"[T] \1", line) for line in screen.lines()] == ["[T] warning: look here", ""]


# ---- the summary ----


def test_summary_is_a_table_and_a_line_for_each_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = BuildReport(
        name="d",
        phases=(
            PhaseResult(title="starting the appliance", seconds=9.04),
            PhaseResult(
                title="install.d",
                seconds=1234.5,
                scripts=(script_result("01-a"), script_result("50-long-name\x1b[31m-of-a-script")),
            ),
        ),
        artifacts=(
            Artifact(path=tmp_path / "d.qcow2", format="qcow2", allocated_bytes=412 * MIB, virtual_bytes=5 << 30),
            Artifact(path=Path("/srv/d.raw"), format="raw", allocated_bytes=1200 * MIB, virtual_bytes=5 << 30),
            Artifact(path=Path("d.d"), format="directory", allocated_bytes=700),
        ),
        seconds=1250.0,
    )
    assert summary(report) == (
        "phase and script            seconds\n"
        "starting the appliance          9.0\n"
        "install.d                    1234.5\n"
        "  01-a                          1.2\n"
        "  50-long-name-of-a-script      1.2\n"
        "total                        1250.0\n"
        "\n"
        "d.qcow2     412 MiB  (virtual size 5.0 GiB)\n"
        "/srv/d.raw  1.2 GiB  (virtual size 5.0 GiB)\n"
        "d.d/        700 B\n"
    )


def test_summary_of_a_build_without_phases_or_artifacts() -> None:
    assert (
        summary(BuildReport(name="d", phases=(), artifacts=(), seconds=0.0)).splitlines()[-2]
        == "total                 0.0"
    )


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (9, "9 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 30, "5.0 GiB"), (412 * MIB, "412 MiB")],
)
def test_size_text(size_bytes: int, text: str) -> None:
    assert size_text(size_bytes) == text
