# SPDX-License-Identifier: Apache-2.0
"""Shells in a build: what is asked for, the link to the user's terminal, and real builds with somebody at one."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers import make_element, many_descriptors, processes_of, skip_without, virt_dib
from on_terminal import CTRL_C, CTRL_D, CTRL_Z, Person, Program, on_terminal, terminal
from virt_dib import command_line, dib, dib_command, events, layout, shells, tools
from virt_dib.break_points import NO_BREAKS, POINTS, Breaks
from virt_dib.dib_output import DibOutput
from virt_dib.errors import ApplianceError, Interrupted
from virt_dib.interrupts import Cancellation, cancellable
from virt_dib.monitor import BuildMonitor, Display
from virt_dib.spec import Phase, Where
from virt_dib.terminal_link import Terminal, _Escape, relay, terminal_name

# ---- what is asked for ----


def asked(*arguments: str) -> command_line.CommandLine:
    return command_line.parse([*arguments, "element"], {})


def test_there_are_points_before_and_after_each_phase_and_after_an_error() -> None:
    assert len(POINTS) == 2 * len(Phase) + 1
    assert {"before-root", "after-pre-install", "before-block-device", "after-cleanup", "after-error"} <= set(POINTS)


@pytest.mark.parametrize(
    ("arguments", "points"),
    [
        ([], set()),
        (["--break", "before-install"], {"before-install"}),
        (["--break", "before-install, after-root", "--break=,after-root,"], {"before-install", "after-root"}),
        (["--break", "after-error"], {"after-error"}),
        (["--on-error", "shell"], {"after-error"}),
        (["--on-error", "fail"], set()),
        (["--on-error", "shell", "--on-error", "fail"], set()),
        (["--on-error", "shell", "--break", "before-install"], {"before-install", "after-error"}),
    ],
)
def test_options_name_points(arguments: list[str], points: set[str]) -> None:
    command = asked(*arguments)
    assert command.problems == ()
    assert command.options.breaks.points == points


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--break", "before-instal"], "unknown break point 'before-instal' in --break",
         "did you mean 'before-install'?"),
        (["--break", "after-install.d"], "unknown break point 'after-install.d' in --break",
         "did you mean 'after-install'?"),
        (["--break", "xyzzy"], "unknown break point 'xyzzy' in --break", "choose from before-root, after-root, "),
        (["--break", ","], "no break point named in --break", "choose from before-root, "),
        (["--on-error", "shel"], "unknown value of --on-error 'shel'", "did you mean 'shell'? choose from shell, fail"),
    ],
)  # fmt: skip
def test_what_is_no_point_is_one_problem(arguments: list[str], message: str, hint: str) -> None:
    (problem,) = asked(*arguments).problems
    assert problem.message == message
    assert problem.hint is not None
    assert problem.hint.startswith(hint)


def test_all_wrong_points_are_told() -> None:
    command = asked("--break", "a,b", "--break", "before-install,a", "--on-error", "c")
    assert [problem.message for problem in command.problems] == [
        "unknown value of --on-error 'c'",
        *(f"unknown break point '{name}' in --break" for name in "ab"),
    ]
    assert command.options.breaks == NO_BREAKS


def from_environment(environ: Mapping[str, str], *arguments: str) -> dib_command.DibCommand:
    return dib_command.parse([*arguments, "e"], environ, prog="virt-disk-image-create", ramdisk=False)


def test_variables_of_disk_image_create_are_read() -> None:
    environ = {"break": "before-install,after-error", "break_cmd": "sh -l", "break_outside_target": "1"}
    command = from_environment(environ)
    assert command.problems == ()
    assert command.breaks == Breaks(
        points=frozenset({"before-install", "after-error"}),
        command="sh -l",
        outside_after_error=True,
        asked_by="the variable break",
    )
    assert from_environment({"break": "", "break_cmd": ""}).breaks.points == frozenset()
    # As with DIB, nothing of the environment is left then.
    assert from_environment(environ, "-c").breaks.points == frozenset()


def test_a_wrong_point_in_the_variable_is_a_problem() -> None:
    (problem,) = from_environment({"break": "before-instal"}).problems
    assert problem.message == "unknown break point 'before-instal' in the variable break"


def test_without_a_terminal_there_is_a_problem_that_says_so(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with terminal() as (_, follower), open(reader), open(writer, "w"):
        assert Terminal(reader, writer).missing() == "standard input and standard output are none"
        assert Terminal(follower, writer).missing() == "standard output is none"
        assert Terminal(reader, follower).missing() == "standard input is none"
        assert Terminal(follower, follower).missing() is None
    assert shells.problems_of(NO_BREAKS, tmp_path) == []


def test_a_name_too_long_for_a_socket_is_a_problem() -> None:
    breaks = Breaks(points=frozenset({"after-error"}), asked_by="--break")
    found = [problem.message for problem in shells.problems_of(breaks, Path("/" + "x" * 107))]
    assert f"--break wants a socket, and '/{'x' * 107}' is too long for the name of one" in found
    assert not any("socket" in problem.message for problem in shells.problems_of(breaks, Path("/" + "x" * 106)))


@pytest.mark.parametrize(("name", "told"), [("xterm", "xterm"), ("", "dumb"), ("x y", "dumb"), ("../x", "dumb")])
def test_what_the_guest_is_told_of_the_terminal(name: str, told: str) -> None:
    assert terminal_name({"TERM": name}) == told


# ---- as diskimage-builder does it ----


@pytest.fixture(scope="module")
def library() -> Path:
    """DIB's own code."""
    return dib.find_installation(None).library_dir


def test_the_points_are_those_of_the_installed_dib_and_its_shells_are_where_ours_are(library: Path) -> None:
    files = ("disk-image-create", "common-functions", "img-functions")
    text = "\n".join((library / name).read_text() for name in files)
    calls = re.findall(r"^\s*(?:\w+=\S+ )?(run_d|run_d_in_target|eval_run_d) ([a-z-]+)(?= |$)", text, re.MULTILINE)
    inside = {name for function, name in calls if function == "run_d_in_target"}
    outside = {name for function, name in calls if function != "run_d_in_target"}
    assert inside == {phase.directory.removesuffix(".d") for phase in Phase if phase.where is Where.CHROOT}
    assert outside == {phase.directory.removesuffix(".d") for phase in Phase if phase.where is Where.OUTSIDE}


def test_the_lines_of_the_drop_in_are_those_of_check_break(library: Path) -> None:
    text = f"source {library}/common-functions; break=x,before-root check_break before-root true"
    environment = {**os.environ, "_LIB": str(library)}
    real = tools.run(["bash", "-c", text], doing="asking DIB", environment=environment).stderr
    stream = io.StringIO()
    output = DibOutput(stream=stream, timestamps=False, quiet=False, log_path=None, version="3")
    with output:
        output(events.ShellOpened(point="before-root", phase="root.d", inside=False))
        output(events.ShellClosed(point="before-root", exit_status=0, seconds=1))
    assert stream.getvalue() == real


# ---- what is shown beside a shell ----


def test_while_a_shell_is_open_nothing_else_gets_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with terminal() as (person, follower), open(os.dup(follower), "w") as stream, Display(stream) as display:
        shown = BuildMonitor(display)
        shown.phase_started("root.d", ["10-a"])
        shown.script_started("10-a")
        person.read_until("0:0[0-9]")
        shown.shell_opened("after-root", "root.d", inside=False)
        person.read_until(r"to end the build.*\n")
        shown.message("said meanwhile")
        # Long enough for the status line to be drawn, were it going to be.
        time.sleep(0.5)
        assert re.sub(r"\x1b\[[0-9;]*[mK]|\r", "", person.read_all()) == ""
        shown.shell_closed("after-root", 0, 0.5)
        person.read_until("said meanwhile")
        person.read_until("the shell has ended after 0.5 s")
        person.read_until("0:0[0-9]")


# ---- what ends a build from within ----


@pytest.mark.parametrize(
    ("typed", "passed"),
    [
        (["ls ~\r", "x~.\r"], "ls ~\rx~.\r"),
        (["~~.\r"], "~.\r"),
        (["~", "x\r~\r"], "~x\r~\r"),
        (["\x1b[A", "~/bin\r"], "\x1b[A~/bin\r"),
        (["a\r~", "~", "b"], "a\r~b"),
    ],
)
def test_a_tilde_is_mostly_a_tilde(typed: list[str], passed: str) -> None:
    escape = _Escape()
    assert b"".join(escape.feed(text.encode()) for text in typed).decode() == passed


@pytest.mark.parametrize("typed", [["~."], ["~", "."], ["ls\r~."], ["ls\r", "~", "."]])
def test_a_tilde_and_a_dot_at_the_beginning_of_a_line_end_the_build(typed: list[str]) -> None:
    escape = _Escape()
    *before, last = typed
    for text in before:
        escape.feed(text.encode())
    with pytest.raises(Interrupted):
        escape.feed(last.encode())


# ---- the link: what a hostile guest says ----


def frame(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack("!cH", kind, len(data)) + data


def relayed(said: bytes) -> tuple[int | None, str]:
    """What becomes of what a guest says before it goes, and what is on the terminal then."""
    ours, theirs = socket.socketpair()
    with ours, terminal() as (person, follower):
        before = person.attributes
        with theirs:
            theirs.sendall(said)
        try:
            return relay(ours, Terminal(follower, follower)), person.read_all()
        finally:
            assert person.attributes == before


@pytest.fixture
def named_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one without a name nobody knows what it understands."""
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.usefixtures("named_terminal")
def test_what_the_shell_prints_comes_as_it_is() -> None:
    status, seen = relayed(frame(b"d", b"\x1b[31mred\xff\r\n") + frame(b"d") + frame(b"x", b"\x07"))
    assert status == 7
    assert seen.startswith("\x1b[31mred\N{REPLACEMENT CHARACTER}\r\n")
    assert seen.removeprefix("\x1b[31mred\N{REPLACEMENT CHARACTER}\r\n").startswith("\x1b[0m\x1b[?25h")


@pytest.mark.parametrize("said", [frame(b"e", b"x"), frame(b"w", b"1234"), frame(b"x"), frame(b"x", b"12"), b"\0" * 9])
def test_what_is_no_frame_ends_the_link(said: bytes) -> None:
    with pytest.raises(ApplianceError, match="which means nothing"):
        relayed(frame(b"d", b"x") + said)


def test_a_guest_that_goes_without_a_word_is_no_exit_status() -> None:
    assert relayed(b"")[0] is None
    assert relayed(frame(b"d", b"half")[:-1])[0] is None


@given(
    st.lists(
        st.one_of(st.binary(max_size=50), st.builds(frame, st.sampled_from([b"d", b"x"]), st.binary())), max_size=9
    )
)
@example([frame(b"d", b"x" * 65535), frame(b"x", b"\x00")])
def test_whatever_a_guest_says_the_link_ends_with_it(pieces: list[bytes]) -> None:
    with contextlib.suppress(ApplianceError):
        relayed(b"".join(pieces)[:60000])


def test_a_build_that_is_cancelled_ends_while_a_shell_waits() -> None:
    ours, theirs = socket.socketpair()
    cancellation = Cancellation()

    def cancel() -> bool:
        cancellation.cancel()
        return True

    with ours, theirs, terminal() as (person, follower):
        before = person.attributes
        with cancellable(cancellation), pytest.raises(Interrupted):
            relay(ours, Terminal(follower, follower), cancel)
        assert person.attributes == before


def test_it_is_asked_whether_the_other_end_lives() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, terminal() as (_, follower):
        assert relay(ours, Terminal(follower, follower), iter([True, True, False]).__next__) is None
        # What it has said before it died counts.
        theirs.sendall(frame(b"x", b"\x05"))
        assert relay(ours, Terminal(follower, follower), lambda: False) == 5


@pytest.mark.usefixtures("named_terminal")
def test_a_program_with_many_files_open_has_shells_too() -> None:
    with terminal() as (person, follower), many_descriptors(), contextlib.closing(Duplicate(follower)) as own:
        before = person.attributes
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(frame(b"d", b"printed") + frame(b"x", b"\x07"))
            assert relay(ours, Terminal(own.number, own.number)) == 7
        assert person.read_all().startswith("printed\x1b[0m")
        assert person.attributes == before


class Duplicate:
    """Another number for a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.number = os.dup(descriptor)

    def close(self) -> None:
        os.close(self.number)


def test_what_is_shown_waits_for_a_terminal_that_is_slow() -> None:
    data = os.urandom(1 << 20)
    received = bytearray()

    def show(writer: int) -> None:
        with contextlib.closing(os.fdopen(writer, "wb")):
            Terminal(0, writer).write(data)

    with many_descriptors():
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        showing = threading.Thread(target=show, args=[writer])
        showing.start()
        with open(reader, "rb", buffering=0) as stream:
            while piece := stream.read(1 << 16):
                received += piece
        showing.join()
    assert received == data


# ---- the link: with a real shell ----

LINKED = """
import os, socket, sys
from virt_dib import tools
from virt_dib.dib_output import DibOutput
from virt_dib.errors import ApplianceError, Interrupted
from virt_dib.interrupts import interrupts
from virt_dib.terminal_link import Terminal, relay
ours, theirs = socket.socketpair()
status = 0
try:
    with interrupts(), tools.started(
        [sys.executable, "-I", "-S", sys.argv[1], "-", *sys.argv[2:]],
        environment=os.environ, stdin=theirs.fileno(), stderr=2,
    ) as process:
        theirs.close()
        print("link", process.pid, flush=True)
        status = relay(ours, Terminal())
        print("status", status, flush=True)
except Interrupted as error:
    print("interrupted", flush=True)
    status = error.exit_status
sys.exit(status)
"""
PROMPT = r"virt-dib install\.d:\S*[#$] "


@contextlib.contextmanager
def linked(tmp_path: Path, *command: str) -> Iterator[Program]:
    """A shell behind a link, as in a guest but without one."""
    words: Sequence[str] = command or ("bash",)
    (tmp_path / ".bashrc").write_text("PS1='theirs> '\n")
    environment = shells._for_people(Phase.INSTALL) | {"TERM": "xterm", "HOME": str(tmp_path)}  # noqa: SLF001 - guest's
    program: list[str | Path] = [sys.executable, "-c", LINKED, layout.guest_script("shell-link.py"), *words]
    with on_terminal(program, cwd=tmp_path, environment=environment) as running:
        before = running.person.attributes
        yield running
        assert running.person.attributes == before


def wait_until(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def link_of(shell: Program) -> int:
    """The process at the other end."""
    return int(shell.person.read_until(r"link [0-9]+\s").split()[-1])


def test_a_shell_has_a_terminal_of_the_same_size_also_when_that_changes(tmp_path: Path) -> None:
    with linked(tmp_path) as shell:
        person = shell.person
        person.read_until(PROMPT)
        assert person.is_raw
        assert person.ask("tty >/dev/null && stty size", PROMPT) == "24 80\n"
        person.type('until [[ $(stty size) == "40 100" ]]; do sleep 0.1; done; sleep 0; echo si""ze $LINES $COLUMNS\r')
        person.resize(40, 100)
        person.read_until("size 40 100\r?\n")
        person.type("exit 7\r")
        person.read_until("status 7")
        assert shell.ended() == 7


def test_ctrl_c_is_for_the_job_of_the_shell(tmp_path: Path) -> None:
    with linked(tmp_path) as shell:
        person = shell.person
        person.read_until(PROMPT)
        person.type("bash -c 'echo run\"\"ning; exec sleep 1000'\r")
        person.read_until("running")
        person.type(CTRL_C)
        person.read_until(PROMPT)
        assert person.ask("echo $?", PROMPT) == "130\n"
        person.type(CTRL_D)
        assert shell.ended() == 0


def test_jobs_stop_and_go_on(tmp_path: Path) -> None:
    with linked(tmp_path) as shell:
        person = shell.person
        person.read_until(PROMPT)
        person.type("bash -c 'echo run\"\"ning; read line; echo got $line'\r")
        person.read_until("running")
        person.type(CTRL_Z)
        person.read_until(r"Stopped")
        person.read_until(PROMPT)
        person.type("fg\r")
        person.read_until("read line.*\n")
        person.type("this\r")
        person.read_until("got this")
        person.read_until(PROMPT)
        person.type("exit\r")
        assert shell.ended() == 0


def test_programs_that_draw_get_every_key_and_all_they_print_arrives(tmp_path: Path) -> None:
    with linked(tmp_path) as shell:
        person = shell.person
        person.read_until(PROMPT)
        keys = "abc\x1b[A\x03\x1a\x04\x13\x11\x7f\n\t"
        person.type(f"stty raw -echo; echo rea''dy; head -c {len(keys)} | od -An -tx1; stty sane\r")
        person.read_until("ready")
        person.type(keys)
        assert person.read_until(PROMPT).split()[: len(keys)] == [f"{ord(key):02x}" for key in keys]
        person.type("head -c 3000000 /dev/zero | tr '\\0' x; echo; echo do''ne\r")
        assert person.read_until("done").count("x") >= 3000000
        person.read_until(PROMPT)
        assert person.ask(r"printf '\033[31mred\033[0m\n'", PROMPT) == "\x1b[31mred\x1b[0m\n"
        person.type("stty raw -echo; echo rea''dy; head -c 300000 | wc -c; stty sane\r")
        person.read_until("ready")
        person.type("y" * 300000)
        person.read_until("300000")
        person.read_until(PROMPT)
        person.type("exit\r")
        assert shell.ended() == 0


def test_what_a_shell_leaves_behind_does_not_hold_up_the_build(tmp_path: Path) -> None:
    with linked(tmp_path) as shell:
        person = shell.person
        person.read_until(PROMPT)
        person.ask("(trap '' HUP; exec sleep 1000) & echo $! >left", PROMPT)
        person.type("exit\r")
        person.read_until("status 0")
        assert shell.ended() == 0
    os.kill(int((tmp_path / "left").read_text()), signal.SIGKILL)


def test_no_history_is_written_and_the_prompt_is_ours_until_another_is_wanted(tmp_path: Path) -> None:
    with linked(tmp_path) as shell:
        shell.person.read_until(PROMPT)
        assert shell.person.ask("echo x", PROMPT) == "x\n"
        shell.person.type("PS1='mine> '\r")
        shell.person.read_until(r"(?:\n|2004h)mine> ")
        shell.person.type("exit\r")
        assert shell.ended() == 0
    assert "theirs" not in shell.person.seen
    assert [path.name for path in tmp_path.iterdir()] == [".bashrc"]


def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    with linked(tmp_path, "/nowhere/bash") as shell:
        shell.person.read_until("cannot run /nowhere/bash: No such file or directory")
        assert shell.ended() == 127


def test_the_end_of_a_shell_by_a_signal_shows_as_bash_counts_it(tmp_path: Path) -> None:
    with linked(tmp_path, "bash", "-c", "kill -KILL $$") as shell:
        assert shell.ended() == 137


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_from_outside_ends_the_build_and_the_terminal_is_as_before(
    number: signal.Signals, tmp_path: Path
) -> None:
    with linked(tmp_path) as shell:
        link = link_of(shell)
        shell.person.read_until(PROMPT)
        os.kill(shell.pid, number)
        shell.person.read_until("interrupted")
        assert shell.ended() == 130
        wait_until(lambda: not Path(f"/proc/{link}").exists())


def test_enter_tilde_dot_ends_the_build(tmp_path: Path) -> None:
    with linked(tmp_path, "bash", "-c", "trap '' INT; stty raw; echo stu''ck; sleep 1000") as shell:
        shell.person.read_until("stuck")
        shell.person.type(f"{CTRL_C}\r~.")
        shell.person.read_until("interrupted")
        assert shell.ended() == 130


def test_the_death_of_the_other_end_is_noticed(tmp_path: Path) -> None:
    with linked(tmp_path) as shell:
        link = link_of(shell)
        shell.person.read_until(PROMPT)
        os.kill(link, signal.SIGKILL)
        shell.person.read_until("status None")
        shell.ended()


def test_a_build_that_was_stopped_has_its_terminal_again(tmp_path: Path) -> None:
    with linked(tmp_path) as shell:
        person = shell.person
        person.read_until(PROMPT)
        os.kill(shell.pid, signal.SIGSTOP)
        wait_until(lambda: "T (stopped)" in Path(f"/proc/{shell.pid}/status").read_text())
        person.cook()
        assert not person.is_raw
        os.kill(shell.pid, signal.SIGCONT)
        wait_until(lambda: person.is_raw)
        assert person.ask("echo here", PROMPT) == "here\n"
        person.type("exit\r")
        shell.ended()


# ---- real builds ----

BUSY = "#!/bin/bash\necho last words of $0\nexit 42\n"


def prompt_of(phase: str) -> str:
    return rf"virt-dib {phase}:\S*[#$] "


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """Where the disks of a build are."""
    directory = tmp_path / "t"
    directory.mkdir()
    return directory


@contextlib.contextmanager
def build(
    tmp_path: Path, temporary: Path, *arguments: str | Path, command: str = "virt_dib", **environ: str
) -> Iterator[Program]:
    """A build with somebody at its terminal, which in the end is as it was; nor is anything else left."""
    out = tmp_path / "out"
    out.mkdir()
    program: list[str | Path] = [sys.executable, "-m", command, *arguments]
    with on_terminal(program, cwd=out, environment={"TMPDIR": str(temporary), **environ}) as running:
        before = running.person.attributes
        yield running
        assert running.person.attributes == before
        assert "Traceback" not in running.person.seen
    assert processes_of(temporary) == []
    assert list(temporary.iterdir()) == []


@pytest.fixture
def elements(tmp_path: Path, element_dir: Path) -> list[str]:
    """Where elements are: those of all tests, and ``bad``."""
    scripts = {
        "install.d/50-note": "#!/bin/bash\ncp /etc/by-hand /etc/noted\n",
        "finalise.d/60-bad": BUSY,
    }
    make_element(tmp_path / "elements", "bad", scripts)
    return [
        "-p",
        str(element_dir),
        "-p",
        str(tmp_path / "elements"),
        "--skip-base",
        "--size",
        "400M",
        "--formats",
        "raw",
    ]


def look_beside_the_new_tree(person: Person) -> None:
    person.read_until("after-root: a shell beside the image's tree")
    prompt = prompt_of("root.d")
    person.read_until(prompt)
    assert person.is_raw
    assert person.ask("pwd; cat $TMP_MOUNT_PATH/.top-level-dot-file; echo $PROBE $TARGET_ROOT $TERM", prompt) == (
        "/dib/out\ndot file\na b /dib/build/mnt xterm-256color\n"
    )
    assert person.ask("ls -d /tmp/in_target.d $TMP_MOUNT_PATH/tmp/in_target.d 2>/dev/null | wc -l", prompt) == "0\n"
    person.type('until [[ $(stty size) == "50 132" ]]; do sleep 0.1; done; echo la""rger\r')
    person.resize(50, 132)
    person.read_until("larger")
    person.read_until(prompt)
    person.type('bash -c \'trap "echo goes" CONT; echo run""ning; while sleep 0.2; do :; done\'\r')
    person.read_until("running")
    person.type(CTRL_Z)
    person.read_until("Stopped")
    person.read_until(prompt)
    person.type("fg\r")
    # It has the terminal again only then.
    person.read_until("\ngoes")
    person.type(CTRL_C)
    person.read_until(prompt)
    person.type("exit\r")


def change_the_tree(person: Person) -> None:
    person.read_until("before-install: a shell in the image's tree")
    prompt = prompt_of("install.d")
    person.read_until(prompt)
    assert person.ask("pwd; cat /.top-level-dot-file; ls /tmp/in_target.d/install.d; echo $PROBE $HOME", prompt) == (
        "/\ndot file\n50-note\na b /root\n"
    )
    assert "Read-only" in person.ask("touch /tmp/in_target.d/x", prompt)
    assert person.ask("ls /tmp/in_target.d/dib-run-parts", prompt) == "/tmp/in_target.d/dib-run-parts\n"
    person.ask("echo made by hand >/etc/by-hand", prompt)
    # Whatever its status is, the build goes on.
    person.type("exit 3\r")


def look_beside_the_image(person: Person) -> None:
    person.read_until("before-pre-finalise: a shell beside the image's tree")
    prompt = prompt_of("pre-finalise.d")
    person.read_until(prompt)
    assert person.ask("cat $TMP_MOUNT_PATH/etc/noted; test -b $IMAGE_BLOCK_DEVICE && stty size", prompt) == (
        "made by hand\n50 132\n"
    )
    # Nothing is left of the shell in the tree.
    assert person.ask("ls -A $TMP_MOUNT_PATH/tmp $TMP_MOUNT_PATH/root | grep .", prompt).split() == [
        "/dib/build/mnt/root:", "/dib/build/mnt/tmp:",
    ]  # fmt: skip
    person.type("exit\r")


def look_why_it_failed(person: Person) -> None:
    script = "/tmp/in_target.d/finalise.d/60-bad"
    person.read_until(f"last words of {script}")
    person.read_until("warning: finalise.d/60-bad of element 'bad' failed with exit status 42")
    person.read_until("after-error: a shell in the image's tree")
    prompt = prompt_of("finalise.d")
    person.read_until(prompt)
    assert person.ask(f"{script}; echo $?", prompt) == f"last words of {script}\n42\n"
    person.type(CTRL_D)
    person.read_until("virt-dib: error: finalise.d/60-bad of element 'bad' failed with exit status 42")


@pytest.mark.option("--break", "--on-error")
@pytest.mark.parametrize(
    "isolation",
    [pytest.param("vm", marks=pytest.mark.appliance), pytest.param("sandbox", marks=pytest.mark.full)],
)
def test_a_build_stops_where_it_was_asked_to_and_goes_on(
    isolation: str, tmp_path: Path, temporary: Path, elements: Sequence[str]
) -> None:
    skip_without(isolation)
    points = ["--break", "after-root,before-install", "--break", "before-pre-finalise", "--on-error", "shell"]
    arguments = [*elements, "--isolation", isolation, "--envvar", "PROBE=a b", *points, "tiny-os", "bad"]
    with build(tmp_path, temporary, *arguments) as running:
        look_beside_the_new_tree(running.person)
        change_the_tree(running.person)
        look_beside_the_image(running.person)
        look_why_it_failed(running.person)
        assert running.ended() == 1
    log = (tmp_path / "out" / "image.log").read_text()
    assert log.count("the shell has ended after") == 4
    assert "virt-dib install.d" not in log


@pytest.mark.full
def test_a_shell_on_the_host_and_one_after_its_script_has_failed(
    tmp_path: Path, temporary: Path, elements: Sequence[str]
) -> None:
    skip_without("sandbox")
    make_element(tmp_path / "elements", "worse", {"extra-data.d/60-worse": BUSY})
    options = ["--isolation", "sandbox", "--extra-data", "host", "--break", "before-extra-data,after-error"]
    with build(tmp_path, temporary, *elements, *options, "tiny-os", "worse") as running:
        person, prompt = running.person, prompt_of("extra-data.d")
        person.read_until(prompt)
        assert person.ask("pwd; touch /usr/x; cat $TMP_MOUNT_PATH/.top-level-dot-file", prompt) == (
            f"{tmp_path}/out\ntouch: cannot touch '/usr/x': Read-only file system\ndot file\n"
        )
        person.type("exit\r")
        person.read_until("after-error: a shell beside the image's tree")
        person.read_until(prompt)
        person.type("exit\r")
        assert running.ended() == 1


@pytest.mark.full
def test_extra_packages_that_cannot_be_installed_are_an_error_too(
    tmp_path: Path, temporary: Path, elements: Sequence[str]
) -> None:
    skip_without("sandbox")
    script = "#!/bin/bash\necho exit 9 >$TARGET_ROOT/usr/local/bin/install-packages\n"
    make_element(tmp_path / "elements", "none", {"root.d/90-none": script})
    options = ["--isolation", "sandbox", "--extra-packages", "one", "--on-error", "shell"]
    with build(tmp_path, temporary, *elements, *options, "tiny-os", "none") as running:
        prompt = prompt_of("install.d")
        running.person.read_until(prompt)
        assert running.person.ask("install-packages; echo $?", prompt) == "9\n"
        running.person.type("exit\r")
        running.person.read_until("error: installing the extra packages one")
        assert running.ended() == 1


@pytest.mark.appliance
def test_variables_of_the_drop_in_do_what_they_do_with_dib(tmp_path: Path, temporary: Path, element_dir: Path) -> None:
    skip_without("sandbox")
    make_element(tmp_path / "elements", "worse", {"install.d/60-worse": BUSY})
    variables = {
        "break": "before-root,before-extra-data,before-install,after-error",
        "break_cmd": "echo the command in $PWD; false",
        "break_outside_target": "yes",
        "ELEMENTS_PATH": f"{element_dir}:{tmp_path}/elements",
        "VIRT_DIB_ISOLATION": "sandbox",
        "DIB_NO_TIMESTAMP": "1",
    }
    arguments = ["-n", "-t", "raw", "--no-tmpfs", "tiny-os", "worse"]
    with build(tmp_path, temporary, *arguments, command="virt_dib.dib_cli", **variables) as running:
        person = running.person
        for point in ("before-root", "before-extra-data"):
            person.read_until(rf"Starting debug shell\. Exit to resume building\.\s+At stage {point}\s")
            person.read_until(r"the command in /dib/out\s[^\0]*Resuming\s")
        # In the tree it is bash.
        person.read_until("At stage before-install")
        person.read_until(prompt_of("install.d"))
        person.type("exit\r")
        person.read_until("Resuming")
        person.read_until("last words")
        person.read_until("At stage after-error")
        person.read_until("the command in /dib/out")
        assert running.ended() == 42


@pytest.mark.full
def test_ctrl_c_in_a_command_that_is_no_shell_ends_that_alone(
    tmp_path: Path, temporary: Path, element_dir: Path
) -> None:
    skip_without("sandbox")
    make_element(tmp_path / "elements", "worse", {"pre-install.d/60-worse": BUSY})
    variables = {
        "break": "after-error",
        "break_cmd": "echo run''ning; exec sleep 100000",
        "ELEMENTS_PATH": f"{element_dir}:{tmp_path}/elements",
        "VIRT_DIB_ISOLATION": "sandbox",
    }
    with build(tmp_path, temporary, "-n", "tiny-os", "worse", command="virt_dib.dib_cli", **variables) as running:
        running.person.read_until("running")
        running.person.type(CTRL_C)
        running.person.read_until("Resuming")
        assert running.ended() == 42


@pytest.mark.parametrize(
    ("isolation", "number"),
    [
        pytest.param("sandbox", signal.SIGINT, marks=pytest.mark.appliance),
        pytest.param("sandbox", signal.SIGTERM, marks=pytest.mark.full),
        pytest.param("sandbox", signal.SIGHUP, marks=pytest.mark.full),
        pytest.param("vm", signal.SIGTERM, marks=pytest.mark.full),
    ],
)
def test_a_signal_ends_a_build_whose_shell_is_open(
    isolation: str, number: signal.Signals, tmp_path: Path, temporary: Path, elements: Sequence[str]
) -> None:
    skip_without(isolation)
    options = ["--isolation", isolation, "--break", "before-root"]
    with build(tmp_path, temporary, *elements, *options, "tiny-os") as running:
        running.person.read_until(prompt_of("root.d"))
        os.kill(running.pid, number)
        running.person.read_until("virt-dib: interrupted")
        assert running.ended() == 130


@pytest.mark.appliance
def test_the_death_of_the_machine_is_an_error(tmp_path: Path, temporary: Path, elements: Sequence[str]) -> None:
    with build(tmp_path, temporary, *elements, "--isolation", "vm", "--break", "before-root", "tiny-os") as running:
        person, prompt = running.person, prompt_of("root.d")
        person.read_until(prompt)
        for pid in processes_of(temporary):
            if "qemu" in Path(f"/proc/{pid}/comm").read_text():
                os.kill(int(pid), signal.SIGKILL)
        person.read_until("virt-dib: error: ")
        assert running.ended() == 1


@pytest.mark.full
def test_a_machine_that_stops_is_an_error(tmp_path: Path, temporary: Path, elements: Sequence[str]) -> None:
    with build(tmp_path, temporary, *elements, "--isolation", "vm", "--break", "before-root", "tiny-os") as running:
        person, prompt = running.person, prompt_of("root.d")
        person.read_until(prompt)
        person.type("echo o >/proc/sysrq-trigger\r")
        person.read_until("virt-dib: error: ")
        assert running.ended() == 1


@pytest.mark.parametrize("options", [["--break", "before-install"], ["--on-error", "shell"]])
def test_without_a_terminal_there_is_no_build(options: list[str], elements: Sequence[str], tmp_path: Path) -> None:
    run = virt_dib([*elements, *options, "tiny-os"], cwd=tmp_path)
    assert run.exit_status == 2
    assert (
        f"error: {' '.join(options[:1] if options[0] == '--break' else options)} wants a terminal, and " in run.stderr
    )
    assert "virt-dib: hint: run the command on a terminal" in run.stderr
    assert not (tmp_path / "image.log").exists()


def test_the_drop_in_wants_a_terminal_too(tmp_path: Path, element_dir: Path) -> None:
    command = [sys.executable, "-m", "virt_dib.dib_cli", "-n", "tiny-os"]
    environment = {**os.environ, "break": "after-error", "ELEMENTS_PATH": str(element_dir)}
    result = tools.run(command, doing="building", cwd=tmp_path, environment=environment, check=False)
    assert result.exit_status == 1
    assert "the variable break wants a terminal, and " in result.stdout + result.stderr
