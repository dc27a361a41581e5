# SPDX-License-Identifier: Apache-2.0
"""The command virt-diskimage-builder, with a small program for the builds, beside the real diskimage-builder."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import signal
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import TESTS
from virt_dib import __version__, batch, configuration, image_file_cli, tools
from virt_dib.image_file import KEYS

ROOT = TESTS.parent
CHILD = [sys.executable, str(TESTS / "data" / "image_child.py")]
ELEMENTS = {"elements": ["vm"]}
_LIMIT_S = 120
_PROGRAM = """\
import json, sys
from virt_dib import batch, image_file_cli
{}
sys.exit(image_file_cli.main(sys.argv[2:], command=json.loads(sys.argv[1])))
"""
OURS = re.compile(rf"{re.escape(shlex.join(batch.COMMAND))}(?P<ramdisk> {re.escape(batch.AS_RAMDISK)})?")


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path)


class Here:
    """A directory with files of images, where the command runs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.notes = directory / "notes"
        self.setup = ""
        self.notes.mkdir()

    def write(self, name: str, content: str) -> Path:
        path = self.directory / name
        path.write_text(content)
        return path

    def configure(self, content: str) -> None:
        """Write the configuration file of the user."""
        path = self.directory / "config" / "virt-dib" / "config.toml"
        path.parent.mkdir(parents=True)
        path.write_text(content)
        path.chmod(0o600)

    def images(self, **images: Mapping[str, str]) -> str:
        """The name of a file with these images and the variables of their builds."""
        entries = [
            {"imagename": name, "environment": {"CHILD_NAME": name, **environment}, **ELEMENTS}
            for name, environment in images.items()
        ]
        return self.write("images.yaml", json.dumps(entries)).name

    def command(self, arguments: Sequence[str], command: Sequence[str] = CHILD) -> list[str]:
        return [sys.executable, "-c", _PROGRAM.format(self.setup), json.dumps(list(command)), *arguments]

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CHILD_", "VIRT_DIB_"))}
        settings = {"XDG_CONFIG_HOME": str(self.directory / "config"), "XDG_CONFIG_DIRS": str(self.directory / "none")}
        return {**kept, **settings, "CHILD_NOTES": str(self.notes), **variables}

    def run(self, *arguments: str, command: Sequence[str] = CHILD, **variables: str) -> tools.Result:
        result = tools.run(
            self.command(arguments, command),
            doing="running virt-diskimage-builder",
            cwd=self.directory,
            environment=self.environment(**variables),
            timeout_s=_LIMIT_S,
            check=False,
        )
        assert "Traceback" not in result.stderr
        return result

    @contextlib.contextmanager
    def running(self, *arguments: str, **variables: str) -> Iterator[tools.Process]:
        with tools.started(
            self.command(arguments), cwd=self.directory, environment=self.environment(**variables)
        ) as process:
            yield process

    def wait_for(self, name: str) -> None:
        until = time.monotonic() + _LIMIT_S
        while not (self.notes / name).exists():
            assert time.monotonic() < until, f"there is no {name}"
            time.sleep(0.02)

    def note(self, name: str, what: str = "started") -> Any:  # noqa: ANN401 - JSON
        path = self.notes / f"{name}.{what}"
        return json.loads(path.read_text()) if path.exists() else None

    def started(self) -> set[str]:
        return {path.name.removesuffix(".started") for path in self.notes.glob("*.started")}

    def most_at_once(self) -> int:
        return max(len(self.note(name)["running"]) for name in self.started())

    def result(self, name: str = "result.json") -> Any:  # noqa: ANN401 - JSON
        return json.loads((self.directory / name).read_text())

    def statuses(self) -> dict[str, tuple[str, int | None]]:
        return {image["name"]: (image["status"], image["exit_status"]) for image in self.result()["images"]}


# ---- beside the real one ----

Commands = list[tuple[bool, dict[str, str], list[str]]]


def commands_in(text: str, program: re.Pattern[str]) -> Commands:
    """The commands a dry run has printed, as a shell reads them: whether a ramdisk, variables, arguments."""
    found = []
    blocks = list(program.finditer(text))
    starts = [0, *(text.index("\n\n", match.end()) + 2 for match in blocks)]
    for match, start, end in zip(blocks, starts, starts[1:], strict=False):
        variables = dict(word.split("=", 1) for word in shlex.split(text[start : match.start()]))
        found.append((match["ramdisk"] is not None, variables, shlex.split(text[match.end() : end])))
    return found


THEIRS = re.compile(r"bash \S*/(?:disk-image-create|(?P<ramdisk>ramdisk-image-create))(?=[ \n])")


@pytest.mark.parametrize(
    "contents",
    [
        ["- imagename: a\n  elements: [x, y]\n"],
        ["- elements: [x]\n  ramdisk: true\n  environment: {B: '2 3', A: \"it's\", C: ''}\n  debug-trace: 2\n"],
        [
            "- imagename: a\n  elements: [x]\n",
            "- elements: [y]\n- imagename: b\n  mkfs-options: -i 1 -O 'a b'\n  elements: [z]\n",
        ],
        ["- imagename: a\n- {imagename: b, elements: [x]}\n- {imagename: a, types: [qcow2, raw], elements: [y]}\n"],
        ["- {elements: [x]}\n"],
        ["[]\n"],
    ],
)
def test_a_dry_run_prints_what_that_of_diskimage_builder_does(here: Here, contents: Sequence[str]) -> None:
    names = [here.write(f"{number}.yaml", content).name for number, content in enumerate(contents)]
    real = Path(sys.executable).with_name("diskimage-builder")
    theirs = tools.run([real, "--dry-run", *names], doing="asking diskimage-builder", cwd=here.directory)
    ours = here.run("--dry-run", *names, command=batch.COMMAND)
    assert (ours.exit_status, ours.stdout) == (0, theirs.stdout) == (0, "")
    assert commands_in(ours.stderr, OURS) == commands_in(theirs.stderr, THEIRS)
    # But for the program, to the letter.
    assert OURS.sub(lambda match: "RAMDISK" if match["ramdisk"] else "DISK", ours.stderr) == THEIRS.sub(
        lambda match: "RAMDISK" if match["ramdisk"] else "DISK", theirs.stderr
    )


def test_both_refuse_what_is_wrong(here: Here) -> None:
    real = Path(sys.executable).with_name("diskimage-builder")
    name = here.write("a.yaml", "- image: a\n").name
    for arguments in ([name], ["--dry-run", name], [name, "none.yaml"], [], ["--frob", name]):
        theirs = tools.run([real, *arguments], doing="asking", cwd=here.directory, check=False)
        ours = here.run(*arguments)
        assert theirs.exit_status != 0
        assert ours.exit_status == 2
        assert ours.stderr.startswith("virt-diskimage-builder: error: ")
    assert here.started() == set()


@pytest.mark.parametrize(
    "arguments", [["--dry"], ["--d"], ["--stop", "--dry-run"], ["--s", "--d"], ["--dry-run", "--"]]
)
def test_options_are_shortened_as_with_diskimage_builder(here: Here, arguments: Sequence[str]) -> None:
    name = here.images(a={})
    real = Path(sys.executable).with_name("diskimage-builder")
    tools.run([real, *arguments, name], doing="asking diskimage-builder", cwd=here.directory)
    assert here.run(*arguments, name).exit_status == 0
    assert here.started() == set()


@pytest.mark.parametrize("images", ["", "1", "0 3", "3 0", "0 3 0 4", "3 4 -9"])
@pytest.mark.parametrize("option", [[], ["--stop-on-failure"]])
def test_failures_are_taken_as_by_diskimage_builder(here: Here, images: str, option: Sequence[str]) -> None:
    """The real one with a bash that is our program."""
    environments = {}
    for number, code in enumerate(images.split()):
        environments[f"i{number}"] = {"CHILD_SIGNAL" if code[0] == "-" else "CHILD_EXIT": code.lstrip("-")}
    name = here.images(**environments)
    (here.directory / "bin").mkdir()
    bash = here.directory / "bin" / "bash"
    bash.write_text(f'#!/bin/sh\nexec {shlex.join(CHILD)} "$@"\n')
    bash.chmod(0o755)
    real: list[str | Path] = [Path(sys.executable).with_name("diskimage-builder"), *option, name]
    environment = here.environment(PATH=f"{bash.parent}:{os.environ['PATH']}")
    theirs = tools.run(real, doing="asking", cwd=here.directory, environment=environment, check=False)
    begun = here.started()
    for path in here.notes.glob("*.started"):
        path.unlink()
    ours = here.run(*option, name)
    assert (ours.exit_status, here.started()) == (theirs.exit_status, begun)


# ---- the command of a build ----


def test_the_command_is_that_of_the_drop_ins() -> None:
    assert batch.COMMAND[0] == sys.executable
    assert batch.COMMAND[-2:] == ("-m", "virt_dib.dib_cli")
    result = tools.run([*batch.COMMAND, batch.AS_RAMDISK, "--help"], doing="asking", cwd=ROOT)
    assert "ramdisk" in result.stdout


@pytest.mark.parametrize(("ramdisk", "prog"), [(False, "virt-disk-image-create"), (True, "virt-ramdisk-image-create")])
def test_a_build_that_is_run_here_speaks_of_keys(tmp_path: Path, prog: str, *, ramdisk: bool) -> None:
    words = [batch.OF_FILES, *([batch.AS_RAMDISK] if ramdisk else []), "-o", str(tmp_path / "x"), "-t", ","]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    result = tools.run([*batch.COMMAND, *words], doing="asking", cwd=ROOT, environment=environment, check=False)
    assert f"{prog}: error: no format named in types\n" in result.stderr
    assert f"{prog}: hint: name at least an operating system, such as: elements: [debian" in result.stderr


def test_builds_get_arguments_and_the_environment(here: Here) -> None:
    here.write(
        "a.yaml",
        '- imagename: a b\n  ramdisk: true\n  environment: {CHILD_NAME: a, OWN: "x\\ny", SHARED: image, a-b: c}\n'
        "  elements: ['', e]\n- imagename: b\n  environment: {CHILD_NAME: b}\n  elements: [e]\n",
    )
    result = here.run("a.yaml", SHARED="process", INHERITED="yes")
    assert result.exit_status == 0
    a, b = here.note("a"), here.note("b")
    assert a["arguments"] == [batch.OF_FILES, batch.AS_RAMDISK, "-o", "a b", "", "e"]
    assert b["arguments"] == [batch.OF_FILES, "-o", "b", "e"]
    told = {name: a["environment"].get(name) for name in ("OWN", "SHARED", "INHERITED", "a-b", batch.CPUS_VARIABLE)}
    assert told == {"OWN": "x\ny", "SHARED": "image", "INHERITED": "yes", "a-b": "c", batch.CPUS_VARIABLE: None}
    assert (b["environment"]["SHARED"], "OWN" in b["environment"]) == ("process", False)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20))
def test_what_is_shown_is_what_bash_reads(text: str) -> None:
    word = batch.quoted(text)
    assert all(char.isprintable() or char in "\n\t" for char in word)
    printed = tools.run(["bash", "-c", f"printf %s. {word}"], doing="asking bash").stdout
    assert printed == f"{text}."


def test_a_dry_run_can_be_pasted(here: Here) -> None:
    odd = "\x1b[31m $HOME `id` '\"\\ \u202e \n\tz"
    entries = [
        {
            "imagename": "a",
            "environment": {"CHILD_NAME": "a", "ODD": odd, "a-b": "1"},
            "mkfs-options": "-O 'x y'",
            "ramdisk": True,
            "elements": ["x"],
        },
        {"imagename": "b", "environment": {"CHILD_NAME": "b", "ODD": odd}, "elements": ["x"]},
    ]
    here.write("a.yaml", json.dumps(entries))
    printed = here.run("--dry-run", "a.yaml").stderr
    assert "\x1b" not in printed
    assert here.started() == set()
    tools.run(["bash", "-c", printed], doing="pasting", cwd=here.directory, environment=here.environment())
    pasted = {name: here.note(name) for name in "ab"}
    here.run("a.yaml")
    for name in "ab":
        note = here.note(name)
        assert note["arguments"] == [batch.OF_FILES, *pasted[name]["arguments"]]
        assert note["environment"].get("ODD") == pasted[name]["environment"].get("ODD")
        assert note["environment"].get("a-b") == pasted[name]["environment"].get("a-b")


def test_each_command_is_shown_before_its_build(here: Here) -> None:
    name = here.images(a={"CHILD_ERR": "of a\\n"}, b={"CHILD_ERR": "of b\\n"})
    lines = here.run(name).stderr.splitlines()
    a, b = shlex.join(CHILD) + " -o a vm", shlex.join(CHILD) + " -o b vm"
    assert [line.split("CHILD_ERR='of ")[0].split(" ", 1)[0] for line in lines] == [
        "CHILD_NAME=a", "", "of", "CHILD_NAME=b", "", "of"
    ]  # fmt: skip
    assert (lines[0].endswith(a), lines[3].endswith(b)) == (True, True)


def test_the_log_of_a_build_that_cannot_be_started(here: Here) -> None:
    images = [{"imagename": name, "elements": ["vm"]} for name in ("x" * (1 << 18), "b")]
    here.write("a.yaml", json.dumps(images))
    result = here.run("a.yaml", "--result", "result.json")
    assert result.exit_status == 1
    assert "failed: cannot start '" in result.stderr
    assert "Argument list too long" in result.stderr
    assert [image["exit_status"] for image in here.result()["images"]] == [126, 0]


# ---- one at a time ----


def test_one_at_a_time_has_the_terminal_and_the_streams(here: Here) -> None:
    name = here.images(a={"CHILD_OUT": "\\x1b[31mred\\xff\\rno end", "CHILD_ERR": "err"}, b={"CHILD_OUT": "b"})
    with here.running(name) as process:
        out, err = process.communicate()
        assert here.note("a")["session"] == process.pid
    assert out == b"\x1b[31mred\xff\rno endb"
    assert b"\n\nerr" in err
    assert here.most_at_once() == 1
    assert here.note("a")["input"] == "/dev/null"


def test_ctrl_c_on_a_terminal_ends_the_build_and_the_rest(here: Here) -> None:
    here.setup = "batch._HEARD_S = 120"
    name = here.images(a={"CHILD_WAIT": "never"}, b={})
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            os.chdir(here.directory)
            command = here.command([name, "--result", "result.json"])
            os.execve(command[0], command, here.environment())  # noqa: S606 - in a child with a terminal of its own
        finally:
            os._exit(127)
    try:
        here.wait_for("a.started")
        os.write(terminal, b"\x03")
        output = b""
        with contextlib.suppress(OSError):
            while piece := os.read(terminal, 4096):
                output += piece
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    finally:
        os.close(terminal)
    assert b"virt-diskimage-builder: interrupted" in output
    assert here.note("a", "told") == "SIGINT"
    assert here.statuses() == {"a": ("failed", 130), "b": ("skipped", None)}


# ---- several at once ----


def test_several_run_at_once_and_no_more_than_asked_for(here: Here) -> None:
    name = here.images(**{f"i{n}": {"CHILD_MEET": "3", "CHILD_LINGER": "0.1"} for n in range(7)})
    assert here.run(name, "--jobs", "3", "--cpus", "3", "--memory", "99999").exit_status == 0
    assert len(here.started()) == 7
    assert here.most_at_once() == 3


@pytest.mark.parametrize(
    ("limits", "environment"),
    [
        (["--memory", "4096"], {}),
        (["--memory", "6143", "--cpus", "9"], {}),
        (["--memory", "8192"], {"VIRT_DIB_MEMSIZE": "4096"}),
        (["--memory", "99999", "--cpus", "7"], {"VIRT_DIB_SMP": "3"}),
    ],
)
def test_as_many_run_at_once_as_fit(here: Here, limits: Sequence[str], environment: Mapping[str, str]) -> None:
    name = here.images(**{f"i{n}": {"CHILD_MEET": "2", "CHILD_LINGER": "0.1", **environment} for n in range(5)})
    arguments = [name, "--jobs", "5", *limits]
    assert here.run(*arguments if "--cpus" in limits else [*arguments, "--cpus", "64"]).exit_status == 0
    assert len(here.started()) == 5
    assert here.most_at_once() == 2


def test_none_overtakes_one_that_waits_for_room(here: Here) -> None:
    name = here.images(
        small={"CHILD_LINGER": "0.3", "VIRT_DIB_MEMSIZE": "512"},
        large={"VIRT_DIB_MEMSIZE": "1024"},
        tiny={"VIRT_DIB_MEMSIZE": "256"},
    )
    assert here.run(name, "--jobs", "3", "--memory", "1024", "--cpus", "3").exit_status == 0
    assert here.most_at_once() == 1


@pytest.mark.parametrize(
    ("arguments", "shares"),
    [
        (["--jobs", "2", "--cpus", "6"], ["3", "1", "3"]),
        (["--jobs", "9", "--cpus", "7"], ["2", "1", "2"]),
        (["--jobs", "3", "--cpus", "1"], ["1", "1", "1"]),
        (["--cpus", "4"], ["4", "1", "4"]),
        (["--cpus", "64"], ["8", "1", "8"]),
        ([], [None, "1", None]),
    ],
)
def test_processors_are_shared_out(here: Here, arguments: Sequence[str], shares: Sequence[str | None]) -> None:
    name = here.images(a={}, b={"VIRT_DIB_SMP": "1"}, c={})
    assert here.run(name, *arguments).exit_status == 0
    assert [here.note(image)["environment"].get(batch.CPUS_VARIABLE) for image in "abc"] == shares


def test_a_build_that_nothing_is_said_for_takes_what_virt_dib_takes() -> None:
    variables = {setting.dest: setting.variable for setting in configuration.SETTINGS}
    assert (variables["cpus"], variables["memory"]) == (batch.CPUS_VARIABLE, batch.MEMORY_VARIABLE)


def test_what_a_configuration_file_says_counts(here: Here) -> None:
    here.configure("memsize = 4096\nsmp = 3\n")
    images = {f"i{n}": {"CHILD_MEET": "2", "CHILD_LINGER": "0.1"} for n in range(4)}
    name = here.images(**images, small={"VIRT_DIB_MEMSIZE": "512", "VIRT_DIB_SMP": "1"})
    assert here.run(name, "--jobs", "5", "--memory", "8192", "--cpus", "64").exit_status == 0
    assert len(here.started()) == 5
    assert here.most_at_once() in (2, 3)
    assert here.note("i0")["environment"].get(batch.CPUS_VARIABLE) is None
    result = here.run(name, "--cpus", "2")
    assert result.exit_status == 2
    assert result.stderr.count("takes 3, and --cpus is 2") == 4


def test_wrong_settings_are_told_before_anything_is_built(here: Here) -> None:
    here.configure("memsise = 4096\n")
    name = here.images(a={"VIRT_DIB_NETWROK": "off"}, b={})
    result = here.run(name, VIRT_DIB_ISOLATON="vm")
    assert result.exit_status == 2
    messages = [line for line in result.stderr.splitlines() if ": error: " in line]
    assert messages == [
        "virt-diskimage-builder: error: unknown variable VIRT_DIB_ISOLATON",
        f"virt-diskimage-builder: error: in {here.directory}/config/virt-dib/config.toml:1: unknown setting 'memsise'",
        "virt-diskimage-builder: error: images.yaml:1: 'a': unknown variable VIRT_DIB_NETWROK",
    ]
    assert here.started() == set()


def test_lines_of_several_stay_whole_and_say_whose_they_are(here: Here) -> None:
    name = here.images(**{f"i{n}": {"CHILD_MEET": "3", "CHILD_LINES": "300"} for n in range(3)})
    lines = here.run(name, "--jobs", "3", "--cpus", "3", "--memory", "99999").stdout.splitlines()
    assert len(lines) == 900
    for number in range(3):
        own = [line for line in lines if line.startswith(f"i{number} | ")]
        assert own == [f"i{number} | line {line} of i{number}" for line in range(300)]


def test_what_builds_print_is_harmless_and_each_stream_stays_what_it_is(here: Here) -> None:
    name = here.images(
        a={"CHILD_OUT": "\\x1b[31mred\\xff\\r50 %\\r100 %\\n\\nno end", "CHILD_ERR": "bad\\n"},
        b={"CHILD_ERR": "\\x1b]0;title\\x07x"},
    )
    result = here.run(name, "--jobs", "2", "--cpus", "2", "--memory", "99999")
    assert result.stdout.splitlines() == ["a | red\ufffd", "a | 50 %", "a | 100 %", "a | ", "a | no end"]
    assert [line for line in result.stderr.splitlines() if "CHILD_" not in line] in (
        ["a | bad", "b | x"],
        ["b | x", "a | bad"],
    )


def test_a_line_without_end_is_cut(here: Here) -> None:
    here.write("long", "x" * 3_000_000)
    name = here.images(a={})
    result = here.run(name, "--jobs", "2", command=["/bin/sh", "-c", "cat long; echo; echo end"])
    lines = result.stdout.splitlines()
    assert {line[:4] for line in lines} == {"a | "}
    assert "".join(line[4:] for line in lines) == "x" * 3_000_000 + "end"


def test_an_image_with_an_odd_name_is_refused_in_one_line(here: Here) -> None:
    here.write("a.yaml", '- imagename: "a\\n\\e[31mb"\n  environment: {CHILD_OUT: "hello"}\n  elements: [vm]\n')
    result = here.run("a.yaml", "--jobs", "2")
    assert (result.exit_status, here.started()) == (2, set())
    assert len([line for line in result.stderr.splitlines() if "cannot use 'a b' as the name" in line]) == 1
    assert "\x1b" not in result.stderr


def test_a_program_that_a_build_leaves_behind_keeps_nobody_waiting(here: Here) -> None:
    name = here.images(a={})
    script = (
        'setsid sh -c "echo left > notes/left; exec sleep 600" & until [ -e notes/left ]; do sleep 0.1; done; echo $!'
    )
    result = here.run(name, "--jobs", "2", command=["/bin/sh", "-c", script])
    assert result.exit_status == 0
    left = int(result.stdout.split("|")[1])
    with contextlib.suppress(ProcessLookupError):
        os.kill(left, signal.SIGKILL)


def test_after_a_failure_those_that_run_go_on_and_no_other_starts(here: Here) -> None:
    name = here.images(a={"CHILD_MEET": "2", "CHILD_EXIT": "7"}, b={"CHILD_MEET": "2", "CHILD_LINGER": "0.5"}, c={})
    limits = ["--jobs", "2", "--cpus", "2", "--memory", "99999"]
    result = here.run(name, *limits, "--stop-on-failure", "--result", "result.json")
    assert result.exit_status == 1
    assert here.statuses() == {"a": ("failed", 7), "b": ("built", 0), "c": ("skipped", None)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_signal_ends_all_builds(here: Here, number: signal.Signals, jobs: str) -> None:
    name = here.images(a={"CHILD_WAIT": "never"}, b={"CHILD_WAIT": "never"}, c={})
    arguments = [name, "--jobs", jobs, "--cpus", "2", "--memory", "99999", "--result", "result.json"]
    with here.running(*arguments) as process:
        here.wait_for("a.started")
        if jobs == "2":
            here.wait_for("b.started")
        process.send_signal(number)
        out, err = process.communicate(timeout=_LIMIT_S)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "virt-diskimage-builder: interrupted"
    assert here.note("a", "told") == "SIGTERM"
    for image in here.started():
        assert not Path(f"/proc/{here.note(image)['pid']}").exists()
    second = ("failed", 130) if jobs == "2" else ("skipped", None)
    assert here.statuses() == {"a": ("failed", 130), "b": second, "c": ("skipped", None)}
    assert (here.result()["exit_status"], here.result()["interrupted"]) == (130, True)
    # Their last words are heard.
    assert (b"a | told to end\n" if jobs == "2" else b"told to end\n") in out


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_kill_tells_all_builds_to_end(here: Here, jobs: str) -> None:
    name = here.images(a={"CHILD_WAIT": "never"}, b={"CHILD_WAIT": "never"})
    with here.running(name, "--jobs", jobs, "--cpus", "2", "--memory", "99999") as process:
        for image in ("a", "b")[: int(jobs)]:
            here.wait_for(f"{image}.started")
        process.kill()
        process.wait()
        for image in here.started():
            here.wait_for(f"{image}.told")
            assert here.note(image, "told") == "SIGTERM"


def test_a_build_that_does_not_listen_is_killed(here: Here) -> None:
    here.setup = "batch._END_TIMEOUT_S = 0.2"
    name = here.images(a={"CHILD_WAIT": "never", "CHILD_DEAF": "1"})
    for jobs in ("1", "2"):
        with here.running(name, "--jobs", jobs, "--result", "result.json") as process:
            here.wait_for("a.started")
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=_LIMIT_S)
        assert process.returncode == 130
        assert here.statuses() == {"a": ("failed", 137)}
        (here.notes / "a.started").unlink()


# ---- failures and the result ----


def test_all_failures_are_told_at_the_end(here: Here) -> None:
    here.write(
        "a.yaml",
        json.dumps([
            {"imagename": "a", "environment": {"CHILD_NAME": "a", "CHILD_EXIT": "3"}, "logfile": "a.log", **ELEMENTS},
            {"imagename": "b", "environment": {"CHILD_NAME": "b", "CHILD_SIGNAL": "9"}, **ELEMENTS},
            {"imagename": "c", "environment": {"CHILD_NAME": "c"}, **ELEMENTS},
        ]),
    )  # fmt: skip
    result = here.run("a.yaml")
    assert result.exit_status == 1
    assert result.stderr.splitlines()[-4:] == [
        "virt-diskimage-builder: error: building 'a' failed: exit status 3",
        "virt-diskimage-builder: hint: see its log, 'a.log'",
        "virt-diskimage-builder: error: building 'b' failed: signal SIGKILL",
        "virt-diskimage-builder: hint: see what it printed above",
    ]
    assert here.started() == {"a", "b", "c"}


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_the_result(here: Here, jobs: str) -> None:
    here.write(
        "a.yaml",
        json.dumps([
            {"imagename": "a", "environment": {"CHILD_NAME": "a"}, "logfile": "logs/a.log", **ELEMENTS},
            {"imagename": "b", "environment": {"CHILD_NAME": "b", "CHILD_EXIT": "4"}, "ramdisk": True, **ELEMENTS},
            {"imagename": "\u65e5", **ELEMENTS},
        ]),
    )  # fmt: skip
    assert here.run("a.yaml", "--result", "result.json", "--jobs", jobs).exit_status == 1
    text = (here.directory / "result.json").read_text()
    assert text.isascii()
    result = json.loads(text)
    images = result["images"]
    for timed in (result, *images):
        begun, ended = (datetime.fromisoformat(timed.pop(name)) for name in ("started", "ended"))
        assert begun.tzinfo is not None
        assert begun <= ended
        assert timed.pop("seconds") >= 0
    image = {"ramdisk": False, "status": "built", "exit_status": 0, "reason": None, "log_file": None}
    assert result == {
        "version": 1,
        "exit_status": 1,
        "interrupted": False,
        "images": [
            {**image, "name": "a", "log_file": str(here.directory / "logs/a.log"), "origin": "a.yaml:1"},
            {
                **image, "name": "b", "ramdisk": True, "status": "failed", "exit_status": 4,
                "reason": "exit status 4", "origin": "a.yaml:1",
            },
            {**image, "name": "\u65e5", "origin": "a.yaml:1"},
        ],
    }  # fmt: skip


def test_a_skipped_image_has_no_times(here: Here) -> None:
    name = here.images(a={"CHILD_EXIT": "1"}, b={})
    here.run(name, "--stop-on-failure", "--result", "result.json")
    skipped = here.result()["images"][1]
    assert skipped == {
        "name": "b", "ramdisk": False, "status": "skipped", "exit_status": None, "reason": None, "started": None,
        "ended": None, "seconds": 0.0, "log_file": None, "origin": "images.yaml:1",
    }  # fmt: skip


def test_the_result_replaces_what_was_there_and_follows_no_link(here: Here) -> None:
    other = here.write("other", "mine")
    (here.directory / "result.json").symlink_to("other")
    os.umask(os.umask(0o022))
    assert here.run(here.images(a={}), "--result", "result.json").exit_status == 0
    assert other.read_text() == "mine"
    assert here.result()["exit_status"] == 0
    assert stat.S_IMODE((here.directory / "result.json").lstat().st_mode) & 0o600 == 0o600
    assert [path.name for path in here.directory.glob(".*")] == []


def test_a_result_that_cannot_be_written_in_the_end(here: Here) -> None:
    (here.directory / "there").mkdir()
    script = "rmdir there; exit 5"
    result = here.run(here.images(a={}), "--result", "there/result.json", command=["/bin/sh", "-c", script])
    assert result.exit_status == 1
    assert "error: writing the result to 'there/result.json': No such file or directory" in result.stderr
    assert "error: building 'a' failed: exit status 5" in result.stderr
    (here.directory / "there").mkdir()
    result = here.run(here.images(a={}), "--result", "there/r", command=["/bin/sh", "-c", "rmdir there"])
    assert result.exit_status == 1


def test_a_dry_run_writes_no_result(here: Here) -> None:
    assert here.run(here.images(a={}), "--dry-run", "--result", "result.json").exit_status == 0
    assert not (here.directory / "result.json").exists()


# ---- the command line ----


def test_images_chooses_in_the_order_of_the_files(here: Here) -> None:
    name = here.images(a={}, b={}, c={}, d={})
    assert here.run(name, "--images", "d,b", "--images", "a", "--result", "result.json").exit_status == 0
    assert list(here.statuses()) == ["a", "b", "d"]
    assert here.started() == {"a", "b", "d"}


def test_all_mistakes_are_told_together(here: Here) -> None:
    here.write("bad.yaml", "- image: a\n")
    name = here.images(a={})
    (here.directory / "dir").mkdir()
    result = here.run(
        "--dryrun", "--jobs", "0", "--cpus=many", "--memory", "-5", "--result", "dir", "-z", name, "bad.yaml", "no.yaml"
    )
    assert result.exit_status == 2
    assert result.stderr.splitlines() == [
        "virt-diskimage-builder: error: unknown option '--dryrun'",
        "virt-diskimage-builder: hint: did you mean '--dry-run'?",
        "virt-diskimage-builder: error: unknown option '-z'",
        "virt-diskimage-builder: hint: 'virt-diskimage-builder --help' lists all options",
        "virt-diskimage-builder: error: cannot use '0' as the value of --jobs",
        "virt-diskimage-builder: hint: give a whole number from 1 to 1000",
        "virt-diskimage-builder: error: cannot use 'many' as the value of --cpus",
        "virt-diskimage-builder: hint: give a whole number from 1 to 65536",
        "virt-diskimage-builder: error: cannot use '-5' as the value of --memory",
        "virt-diskimage-builder: hint: give a whole number from 256 to 1073741824",
        "virt-diskimage-builder: error: cannot write the result to 'dir': it is no file",
        "virt-diskimage-builder: hint: give --result the name of a file",
        "virt-diskimage-builder: error: bad.yaml:1: unknown key 'image'",
        "virt-diskimage-builder: hint: did you mean 'imagename'?",
        "virt-diskimage-builder: error: reading 'no.yaml': No such file or directory",
        "virt-diskimage-builder: hint: name a file of images that you can read",
    ]
    assert here.started() == set()


def test_what_a_build_would_refuse_is_told_with_what_is_wrong_in_the_files(here: Here) -> None:
    wrong = {
        "a": "  image: x\n  environment: {VIRT_DIB_FOO: '1', VIRT_DIB_SMP: x, VIRT_DIB_ISOLATION: foo}\n",
        "b": "  root-label: a b\n  mkfs-options: -O 'x\n  types: [aci]\n  elements: [vm]\n",
    }
    here.write("a.yaml", "".join(f"- imagename: {name}\n{keys}" for name, keys in wrong.items()))
    here.write("b.yaml", "- imagename: c\n")
    result = here.run("--dry-run", "a.yaml")
    assert result.exit_status == 2
    assert [line.partition(" error: ")[2] for line in result.stderr.splitlines() if " error: " in line] == [
        "a.yaml:2: unknown key 'image'",
        "a.yaml:1: 'a': unknown variable VIRT_DIB_FOO",
        "a.yaml:1: 'a': in VIRT_DIB_ISOLATION: unknown value of VIRT_DIB_ISOLATION 'foo'",
        "a.yaml:1: 'a': in VIRT_DIB_SMP: cannot use 'x' as the number of processors",
        "a.yaml:4: 'b': cannot use 'a b' as the root label",
        "a.yaml:4: 'b': unknown format 'aci'",
        "a.yaml:4: 'b': cannot use '-O 'x' as mkfs-options: a quote or backslash in it has no end",
    ]
    assert "b.yaml:1: 'c': no element named\n" in here.run("--dry-run", "b.yaml").stderr


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ([], "no file named", "name a file that describes images: virt-diskimage-builder images.yaml"),
        (["images.yaml", "--jobs"], "argument --jobs: expected one argument", None),
        (["images.yaml", "--images", "debain"], "no image 'debain' in these files, which --images names",
         "did you mean 'debian'?"),
        (["images.yaml", "--images", ""], "no image '' in these files, which --images names", "there are: debian"),
        (["images.yaml", "--result", "no/r.json"], "cannot write the result to 'no/r.json': 'no' is not a directory",
         "make it first: mkdir -p no"),
        (["images.yaml", "--result", ""], "cannot write the result to '': it is no file", None),
        (["images.yaml", "--result", "/dev/null"], "cannot write the result to '/dev/null': it is no file", None),
        (["images.yaml", "--jobs", "9" * 5000], f"cannot use '{'9' * 5000}' as the value of --jobs", None),
        (["images.yaml", "--memory", "2047"], "images.yaml:1: building 'debian' takes 2048, and --memory is 2047",
         "raise --memory, or set VIRT_DIB_MEMSIZE for this image"),
    ],
)  # fmt: skip
def test_a_mistake_in_words(here: Here, arguments: Sequence[str], message: str, hint: str | None) -> None:
    here.images(debian={})
    result = here.run(*arguments)
    assert result.exit_status == 2
    lines = result.stderr.splitlines()
    assert lines[0] == f"virt-diskimage-builder: error: {message}"
    assert len(lines) == 2
    assert hint is None or lines[1] == f"virt-diskimage-builder: hint: {hint}"
    assert here.started() == set()


def test_a_file_may_have_any_name(here: Here) -> None:
    here.images(a={})
    (here.directory / "images.yaml").rename(here.directory / "-x.yaml")
    assert here.run("--dry-run", "--", "-x.yaml").exit_status == 0


def test_options_may_stand_after_and_between_files(here: Here) -> None:
    first = here.images(a={})
    here.write("b.yaml", "- imagename: b\n  environment: {CHILD_NAME: b}\n  elements: [vm]\n")
    assert here.run(first, "--stop-on-failure", "b.yaml", "--jobs=1").exit_status == 0
    assert here.started() == {"a", "b"}


def test_a_warning_is_told_and_the_images_are_built(here: Here) -> None:
    here.write(
        "a.yaml", "- &a {imagename: a, elements: [x]}\n- {<<: *a, imagename: b}\n- {imagename: b, elements: [y]}\n"
    )
    result = here.run("a.yaml")
    assert result.exit_status == 0
    assert result.stderr.startswith("virt-diskimage-builder: warning: a.yaml:3: adding to 'elements' of 'b' alone; ")


def test_help_and_version(here: Here) -> None:
    text = here.run("--help").stdout
    assert all(re.search(rf"^  {re.escape(key.name)} ", text, re.MULTILINE) for key in KEYS)
    assert here.run("--version").stdout == f"virt-diskimage-builder {__version__}\n"


def test_nobody_reads_what_is_printed(here: Here) -> None:
    name = here.images(a={"CHILD_LINES": "100"}, b={})
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with tools.started(
            here.command([name, "--jobs", "2"]), cwd=here.directory, environment=here.environment(), stdout=writer
        ) as process:
            _, err = process.communicate(timeout=_LIMIT_S)
    finally:
        os.close(writer)
    assert (process.returncode, b"Traceback" in err) == (0, False)
    assert here.started() == {"a", "b"}


# ---- its page ----

PAGE = ROOT / "docs" / "image-files.md"


def test_the_page_has_all_keys_and_options() -> None:
    page = PAGE.read_text()
    assert [key.name for key in KEYS if f"| `{key.name}` |" not in page] == []
    options = set(re.findall(r"--[a-z-]+", image_file_cli.build_parser().format_help())) - {"--help"}
    assert [option for option in sorted(options) if f"`{option}" not in page] == []


def test_the_example_of_the_page_is_one(here: Here) -> None:
    block = re.search(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert block
    here.write("images.yaml", block[1])
    result = here.run("--dry-run", "images.yaml", command=batch.COMMAND)
    assert result.exit_status == 0
    assert len(commands_in(result.stderr, OURS)) == 2
