# SPDX-License-Identifier: Apache-2.0
"""A build shown as diskimage-builder shows it: beside the real dib-run-parts, outfilter.py and disk-image-create."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import itertools
import os
import re
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virt_dib import elements, events, tools
from virt_dib import environment as contract
from virt_dib.dib import DibInstallation, find_installation
from virt_dib.dib_output import DibOutput, Settings, from_environment
from virt_dib.environment import BlockDevices, Facts
from virt_dib.errors import Interrupted, ScriptError, ToolError
from virt_dib.jobs import Event, JobResult, Splitter
from virt_dib.monitor import BuildMonitor
from virt_dib.phases import Phases
from virt_dib.report import Artifact
from virt_dib.spec import BuildSpec, Phase, Where
from virt_dib.terminal_link import Terminal

RUN_PHASE = Path(__file__).parents[1] / "src" / "virt_dib" / "guest" / "run-phase.sh"
IN_CHROOT = "/tmp/in_target.d"
MIB = 1 << 20
TIME = re.compile(rb"^[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3} \| ", re.MULTILINE)
SECONDS = re.compile(rb"[ 0-9]{6}\.[0-9]{3}$", re.MULTILINE)
NOON = datetime(2026, 3, 22, 12, 0, 0, 67999, tzinfo=timezone.utc)
STAMP = "2026-03-22 12:00:00.067 | "


def normalised(text: bytes) -> list[bytes]:
    return SECONDS.sub(b"SECONDS...", TIME.sub(b"TIME | ", text)).split(b"\n")


def run_shell(text: str, cwd: Path, environment: Mapping[str, str] | None = None) -> tools.Result:
    """Run bash with little in its environment."""
    own = {"PATH": os.environ["PATH"], "HOME": str(cwd), "TMPDIR": str(cwd), "LC_ALL": "C"}
    return tools.run(
        ["bash", "-c", text], doing="running bash", cwd=cwd, environment={**own, **(environment or {})}, check=False
    )


@pytest.fixture(scope="module")
def installed() -> DibInstallation:
    return find_installation(None)


@pytest.fixture(scope="module")
def real_environment(installed: DibInstallation) -> dict[str, str]:
    """What DIB's command sets before it becomes a shell script."""
    return {"_LIB": str(installed.library_dir), "DIB_PYTHON_EXEC": sys.executable}


# ---- what ours says, from real scripts ----


@dataclasses.dataclass
class OnHost:
    """Runs phases on the host, by the runner of the guest, and gives on its output in pieces."""

    hooks: Path
    piece_bytes: int = 13

    killed_hint = "give it more memory"
    full_hint = "give it a larger disk"

    def run(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        cwd: str,
        *,
        functions: str = "",
        on_output: Callable[[bytes], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> JobResult:
        del variables, cwd, functions
        assert on_output
        assert on_event
        printed = self.hooks.with_name("printed")
        phase = command[-1].rpartition("/")[2]
        result = run_shell(f"bash {RUN_PHASE} {self.hooks}/{phase} token >{printed} 2>&1", self.hooks.parent)
        data = printed.read_bytes()
        splitter = Splitter(b"token")
        for start in range(0, len(data), self.piece_bytes):
            for item in splitter.feed(data[start : start + self.piece_bytes]):
                if isinstance(item, Event):
                    on_event(item)
                else:
                    on_output(item)
        on_output(splitter.end())
        return JobResult(exit_status=result.exit_status, tail="")

    def shell(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        cwd: str,
        *,
        functions: str = "",
        terminal: Terminal,
    ) -> int:
        del command, variables, cwd, functions, terminal
        raise AssertionError

    def is_directory(self, path: str) -> bool:
        return (self.hooks / path.rpartition("/")[2]).is_dir()


def run_phase(phase: Phase, hooks: Path, listener: events.Listener) -> None:
    nothing = BlockDevices(root_label="", root_fstype="", boot_label="", mount_points="")
    spec = BuildSpec(name="x", output_dir=Path(), elements=())
    facts = Facts(spec=spec, elements=(), element_dirs={}, elements_path=(), block_devices=nothing)
    Phases({}, BuildMonitor(listener)).run(OnHost(hooks), phase, facts)


def make_hooks(directory: Path, phase: Phase, scripts: Mapping[str, str]) -> Path:
    hooks = directory / "hooks"
    (hooks / phase.directory).mkdir(parents=True)
    for name, text in scripts.items():
        path = hooks / phase.directory / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    return hooks


def shown(
    *told: events.Event,
    timestamps: bool = False,
    elements: Sequence[str] | None = None,
    image_name: str | None = None,
    clock: Callable[[], datetime] = lambda: NOON,
) -> str:
    stream = io.StringIO()
    with DibOutput(
        stream=stream,
        timestamps=timestamps,
        quiet=False,
        log_path=None,
        version="3.43.0",
        elements=elements,
        image_name=image_name,
        clock=clock,
    ) as output:
        for event in told:
            output(event)
    return stream.getvalue()


def output_as(settings: Settings, stream: TextIO, version: str = "3.43.0") -> DibOutput:
    return DibOutput(
        stream=stream,
        timestamps=settings.timestamps,
        quiet=settings.quiet,
        log_path=settings.log_path,
        version=version,
    )


def output_to(stream: TextIO, log_path: str | Path | None = None, *, quiet: bool = False) -> DibOutput:
    return DibOutput(
        stream=stream, timestamps=True, quiet=quiet, log_path=log_path, version="3.43.0", clock=lambda: NOON
    )


# ---- phases, beside the real programs ----

SCRIPTS = {
    "10-plain": "echo out; echo err >&2; echo; echo ' blanks  '",
    "9-first-to-run-last-in-the-table": "echo early",
    "a-name-that-is-longer-than-the-column-of-the-table": "true",
    "20-traces": "set -x; echo hi; set +o xtrace; echo 'set +x'; echo 'of xtrace'; set +o | grep xtrace; echo end",
    "30-binary": r"printf '\xff\xfe\0\xe9 caf\xc3\xa9 \x1b[31mred\x1b[0m \x0b\x0c\x1c\xc2\x85\xe2\x80\xa8 x\n'",
    "40-progress": r"printf ' 1%%\r 2%%\r\r\n\r\nend\r\n\n'",
    "50-long": "printf '%70000s\\n' x; printf 'xtrace%70000s\\n' x; echo after",
}
ENVIRONMENT = {"10-first": "export FIRST='a b'", "9-second.bash": "echo from the environment; export B=c"}


def make_everything(directory: Path, phase: Phase) -> Path:
    hooks = make_hooks(directory, phase, SCRIPTS)
    (hooks / phase.directory / "60-not-executable").write_text("")
    (hooks / phase.directory / "bad.name").write_text("")
    (hooks / phase.directory / "bad.name").chmod(0o755)
    (hooks / "environment.d").mkdir()
    for name, text in ENVIRONMENT.items():
        (hooks / "environment.d" / name).write_text(f"{text}\n")
    return hooks


def real_phase(phase: Phase, hooks: Path, library: Path, flags: str) -> tuple[int, bytes]:
    """The status, and what outfilter.py with *flags* writes to its standard output."""
    out = hooks.with_name("theirs")
    if phase.where is Where.OUTSIDE:
        name = phase.directory.removesuffix(".d")
        command = f"set -e; _LIB={library}; source {library}/common-functions; TMP_HOOKS_PATH={hooks}; run_d {name}"
    else:
        command = f"{library}/dib-run-parts {hooks}/{phase.directory}"
    text = f"{{ {command}; }} 2>&1 | {sys.executable} {library}/outfilter.py {flags} >{out}; exit ${{PIPESTATUS[0]}}"
    status = run_shell(text, hooks.parent).exit_status
    return status, out.read_bytes()


@pytest.mark.parametrize("phase", [Phase.ROOT, Phase.INSTALL])
@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ("-v", Settings(timestamps=True, quiet=False, log_path=None)),
        ("-v -b", Settings(timestamps=False, quiet=False, log_path=None)),
        ("", Settings(timestamps=True, quiet=True, log_path=None)),
        ("-o their.log", Settings(timestamps=True, quiet=True, log_path="our.log")),
        ("-v -b -o their.log", Settings(timestamps=False, quiet=False, log_path="our.log")),
    ],
)
def test_a_phase_is_told_as_the_real_programs_tell_it(
    phase: Phase,
    flags: str,
    settings: Settings,
    tmp_path: Path,
    installed: DibInstallation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hooks = make_everything(tmp_path, phase)
    logs = [tmp_path / "our.log", tmp_path / "their.log"]
    for log in logs:
        log.write_bytes(b"of yesterday\n")
    status, theirs = real_phase(phase, hooks, installed.library_dir, flags)
    assert status == 0
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "ours").open("w") as stream, output_as(settings, stream) as output:
        run_phase(phase, hooks, output)
    seen_there = contract.HOOKS if phase.where is Where.OUTSIDE else IN_CHROOT

    def in_guest(text: bytes) -> list[bytes]:
        return normalised(text.replace(str(hooks).encode(), seen_there.encode()))

    announced = b"Output logs going to: our.log\n" if settings.log_path else b""
    assert in_guest((tmp_path / "ours").read_bytes()) == in_guest(announced + theirs)
    assert in_guest(logs[0].read_bytes()) == in_guest(logs[1].read_bytes())
    if not settings.quiet:
        assert theirs.count(b"dib-run-parts Sourcing environment file ") == len(ENVIRONMENT)
        assert theirs.count(b" completed") == len(SCRIPTS)
        assert b"\xff\xfe\0\xe9" in theirs
        assert b"of xtrace" not in theirs


@pytest.mark.parametrize("phase", [Phase.ROOT, Phase.POST_INSTALL])
def test_a_phase_that_fails_ends_as_the_real_one(phase: Phase, tmp_path: Path, installed: DibInstallation) -> None:
    scripts = {"10-good": "echo fine", "20-bad": "echo 'no such thing' >&2; exit 7", "30-never": "echo no"}
    hooks = make_hooks(tmp_path, phase, scripts)
    status, theirs = real_phase(phase, hooks, installed.library_dir, "-v")
    assert status == 7
    with (tmp_path / "ours").open("w") as stream, output_to(stream) as output, pytest.raises(ScriptError):
        run_phase(phase, hooks, output)
    seen_there = contract.HOOKS if phase.where is Where.OUTSIDE else IN_CHROOT
    theirs = theirs.replace(str(hooks).encode(), seen_there.encode())
    assert normalised((tmp_path / "ours").read_bytes()) == normalised(theirs)
    assert b"no such thing" in theirs
    assert b"PROFILING" not in theirs


def test_a_phase_without_scripts_has_an_empty_table_as_the_real_one(tmp_path: Path, installed: DibInstallation) -> None:
    hooks = make_hooks(tmp_path, Phase.CLEANUP, {})
    _, theirs = real_phase(Phase.CLEANUP, hooks, installed.library_dir, "-v")
    with (tmp_path / "ours").open("w") as stream, output_to(stream) as output:
        run_phase(Phase.CLEANUP, hooks, output)
    theirs = theirs.replace(str(hooks).encode(), contract.HOOKS.encode())
    assert normalised((tmp_path / "ours").read_bytes()) == normalised(theirs)
    assert b"END PROFILING" in theirs


def test_a_line_without_end_is_not_continued_by_ours_which_it_is_by_the_real_one(
    tmp_path: Path, installed: DibInstallation
) -> None:
    hooks = make_hooks(tmp_path, Phase.INSTALL, {"10-asks": "printf 'sure? '"})
    _, theirs = real_phase(Phase.INSTALL, hooks, installed.library_dir, "-v")
    with (tmp_path / "ours").open("w") as stream, output_to(stream) as output:
        run_phase(Phase.INSTALL, hooks, output)
    theirs = theirs.replace(str(hooks).encode(), IN_CHROOT.encode())
    assert b"sure? dib-run-parts 10-asks completed\n" in theirs
    theirs = theirs.replace(b"sure? ", b"sure? \n" + STAMP.encode())
    assert normalised((tmp_path / "ours").read_bytes()) == normalised(theirs)


@pytest.mark.parametrize("seconds", [0.0, 0.0004, 1.23456, 61.5, 999.9996, 1234.5678, 123456.78, 1234567.8])
def test_seconds_are_those_of_the_real_table(seconds: float, tmp_path: Path, installed: DibInstallation) -> None:
    program = (installed.library_dir / "dib-run-parts").read_text()
    functions = re.search(r"^function output_prefix.*?^(?=function cleanup)", program, re.MULTILINE | re.DOTALL)
    row = next(line for line in program.splitlines() if "%10.3f" in line)
    duration = next(line for line in program.splitlines() if "duration=" in line)
    assert functions
    text = f"name=dib-run-parts; {functions[0]}\nstart_seconds=0; stop_seconds={seconds}; target=start_10-x\n"
    theirs = run_shell(f"{text}{duration}\n{row}", tmp_path).stderr
    finished = events.PhaseFinished(title="root.d", number=1, total=1, seconds=1)
    assert theirs in shown(script_finished("10-x", seconds), finished)


def script_finished(name: str, seconds: float = 1.0, exit_status: int = 0) -> events.ScriptFinished:
    return events.ScriptFinished(
        phase="root.d", name=name, element=None, number=1, total=1, exit_status=exit_status, seconds=seconds, log_line=1
    )


# ---- the frame, beside disk-image-create ----

STARTED = events.BuildStarted(name="foo", output_dir=Path(), elements=(), formats=("qcow2",))
NO_ELEMENTS = "At least one distribution root element must be specified"


@pytest.mark.parametrize(
    ("variables", "logfile"),
    [
        ({}, None),
        ({"DIB_NO_TIMESTAMP": "1"}, None),
        ({"DIB_NO_TIMESTAMP": "yes", "DIB_QUIET": "0"}, None),
        ({"DIB_QUIET": "1"}, None),
        ({}, "./some.log"),
        ({"DIB_QUIET": "", "DIB_NO_TIMESTAMP": "1"}, "some.log"),
        ({"DIB_QUIET": "0", "DIB_NO_TIMESTAMP": "1"}, "some.log"),
        ({"DIB_QUIET": "yes"}, "some.log"),
        ({"DIB_QUIET": "1"}, "some.log"),
    ],
)
def test_without_elements_the_output_is_that_of_disk_image_create(
    variables: dict[str, str],
    logfile: str | None,
    tmp_path: Path,
    installed: DibInstallation,
    real_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    options = "" if logfile is None else f"--logfile {logfile}"
    program = installed.library_dir / "disk-image-create"
    result = run_shell(f"{program} {options}", tmp_path / "theirs", {**real_environment, **variables})
    assert result.exit_status == 1
    monkeypatch.chdir(tmp_path / "ours")
    settings = from_environment(variables, logfile)
    stream = io.StringIO()
    with output_as(settings, stream, str(installed.version)) as output:
        output(STARTED)
        output(events.ErrorFound(text=NO_ELEMENTS, hint=None, details=()))
    assert normalised(stream.getvalue().encode()) == normalised(result.stdout.encode())
    logs = [directory / logfile for directory in (tmp_path / "ours", tmp_path / "theirs")] if logfile else []
    assert len({tuple(normalised(log.read_bytes())) for log in logs}) == bool(logs)


def test_what_is_the_number_1_is_what_bash_takes_for_it(tmp_path: Path) -> None:
    values = ["", "0", "1", "01", "0x1", "0X01", " 1 ", "+1", "-1", "2", "10", "yes", "true", "1.0", "1,", "0x", "x1"]
    quoted = " ".join(f"'{value}'" for value in values)
    text = f'for value in {quoted}; do [[ "${{value:-0}}" -eq 1 ]] && echo yes || echo no; done'
    theirs = run_shell(text, tmp_path).stdout.split()
    ours = [from_environment({"DIB_NO_TIMESTAMP": value, "DIB_QUIET": value}, None) for value in values]
    assert ["no" if settings.timestamps else "yes" for settings in ours] == theirs
    assert ["yes" if settings.quiet else "no" for settings in ours] == theirs


def test_an_empty_name_of_a_log_is_none() -> None:
    assert from_environment({}, "") == Settings(timestamps=True, quiet=False, log_path=None)


@pytest.mark.parametrize("words", [["vm", "debian-minimal"], ["ubuntu-minimal block-device-gpt", "vm"]])
def test_the_elements_are_named_as_arg_to_elements_names_them(
    words: list[str], tmp_path: Path, installed: DibInstallation, real_environment: dict[str, str]
) -> None:
    named = " ".join(f"'{word}'" for word in words)
    text = f"source $_LIB/common-functions; ARCH=amd64; arg_to_elements {named}"
    search = {"ELEMENTS_PATH": str(installed.elements_dir)}
    theirs = run_shell(text, tmp_path, {**real_environment, **search}).stdout.splitlines()
    wanted = elements.requested(words, arch="amd64", skip_base=False)
    chosen = elements.resolve(wanted, elements.discover([installed.elements_dir]))
    planned = events.BuildPlanned(elements=tuple(item.name for item in chosen), log_path=Path("foo.log"), total=9)
    version, asked, expanded, building = shown(STARTED, planned, elements=wanted).splitlines()
    assert version == "diskimage-builder version 3.43.0"
    assert asked == theirs[0]
    # There, the order of a set decides.
    assert sorted(expanded.split()) == sorted(theirs[1].split())
    assert building == f"Building in {contract.BUILD_DIR}"


def test_an_image_is_announced_as_finish_image_announces_it(tmp_path: Path, real_environment: dict[str, str]) -> None:
    text = "source $_LIB/common-functions; mkdir some; touch new; OUT_IMAGE_PATH=new; finish_image some/foo.qcow2"
    theirs = run_shell(text, tmp_path, real_environment).stdout
    kinds = {"foo.qcow2": "qcow2", "foo.d": "directory", "foo.qcow2.md5": "checksum", "foo.log": "log"}
    made = [
        events.ArtifactMade(artifact=Artifact(path=tmp_path / "some" / name, format=kind, allocated_bytes=1))
        for name, kind in kinds.items()
    ]
    assert shown(STARTED, *made, image_name="some/foo").splitlines()[1:] == theirs.splitlines()
    assert shown(made[0]) == f"Image file {tmp_path}/some/foo.qcow2 created...\n"


# ---- all of a build ----


def step(title: str) -> events.PhaseStarted:
    return events.PhaseStarted(title=title, step=True, number=1, total=1, scripts=(), log_line=1)


def test_what_virt_dib_has_to_say_is_among_the_lines() -> None:
    told = [
        events.Message(text="emulated\n\nof xtrace"),
        events.Warned(text="no\nspace"),
        step("copying the tree"),
        events.Output(data=b"without end"),
        events.Debugged(text="libguestfs: trace"),
        events.Output(data=b"of xtrace"),
        events.PhaseFinished(title="copying the tree", number=1, total=1, seconds=1),
        events.BuildFinished(name="foo", artifacts=(), seconds=1),
    ]
    assert shown(*told, timestamps=True).splitlines() == [
        f"{STAMP}{line}"
        for line in (
            "emulated",
            "of xtrace",
            "WARNING: no space",
            "copying the tree",
            "without end",
            "libguestfs: trace",
            "Build completed successfully",
        )
    ]


def failed(*, interrupted: bool) -> events.BuildFailed:
    return events.BuildFailed(
        name="foo",
        interrupted=interrupted,
        exit_status=1,
        phase=None,
        script=None,
        log_path=None,
        log_line=None,
        seconds=1,
    )


def test_a_build_that_fails_ends_with_its_errors() -> None:
    told = [
        events.Output(data=b"the last wo"),
        events.Output(data=b"rds"),
        script_finished("10-x", exit_status=1),
        events.ErrorFound(text="root.d/10-x failed", hint="see xtrace", details=("the last words",)),
        events.ErrorFound(text="and more", hint=None, details=()),
        failed(interrupted=False),
    ]
    lines = ["the last words", "ERROR: root.d/10-x failed", "hint: see xtrace", "ERROR: and more"]
    assert shown(*told).splitlines() == lines


def test_an_interrupted_build_says_so() -> None:
    assert shown(failed(interrupted=True)) == "interrupted\n"


def test_a_forged_name_is_one_harmless_line() -> None:
    name = "10-x\ndib-run-parts y completed\x1b[31m"
    sourced = events.EnvironmentSourced(phase="root.d", name=name)
    finished = events.PhaseFinished(title="root.d", number=1, total=1, seconds=1)
    lines = shown(sourced, script_finished(name), finished).splitlines()
    assert all(line.startswith("dib-run-parts") for line in lines)
    assert [line for line in lines if line.startswith("dib-run-parts y")] == []
    assert "\x1b" not in "".join(lines)


def test_times_are_in_utc_wherever_the_user_is() -> None:
    there = NOON.astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert shown(events.Message(text="x"), timestamps=True, clock=lambda: there) == f"{STAMP}x\n"


# ---- any bytes ----

PIECES = st.one_of(
    st.sampled_from([b"\n", b"\r", b"\r\n", b"a", b" ", b"set +", b"o", b"x", b"trace", b"set +o xtrace\n"]),
    st.sampled_from([b"\x00", b"\x1b[31m", b"\xff", b"\xe2\x82", b"\x0b", b"\x0c", b"\x1c", b"\x85", b"\xe2\x80\xa8"]),
)
LONG_PIECES = st.sampled_from([b"x" * 65535, b"x" * 65536, b"x" * 65537, b"x" * 65530, b"\n", b"\r", b"xtrace", b"a"])
STREAMS = st.one_of(st.binary(max_size=100), st.lists(PIECES, max_size=30).map(b"".join))
LONG_STREAMS = st.lists(LONG_PIECES, max_size=6).map(b"".join)


@pytest.fixture(scope="module")
def outfilter(installed: DibInstallation) -> ModuleType:
    spec = importlib.util.spec_from_file_location("outfilter", installed.library_dir / "outfilter.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Pipe(io.TextIOWrapper):
    """A text stream over bytes in memory, as Python opens its own in the C locale."""

    def __init__(self, data: bytes = b"") -> None:
        self.below = io.BytesIO(data)
        super().__init__(self.below, encoding="utf-8", errors="surrogateescape", newline="\n")


def log_of(pieces: Sequence[bytes], log: Path) -> bytes:
    """What the log has, by a clock that goes on a millisecond a line."""
    log.unlink(missing_ok=True)
    ticks: Iterator[datetime] = (NOON + timedelta(milliseconds=count) for count in itertools.count())
    with DibOutput(
        stream=io.StringIO(), timestamps=True, quiet=True, log_path=log, version="3.43.0", clock=lambda: next(ticks)
    ) as output:
        for piece in pieces:
            output(events.Output(data=piece))
    return log.read_bytes()


@given(data=STREAMS)
def test_any_bytes_are_logged_as_outfilter_logs_them(
    data: bytes, outfilter: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", Pipe(data))
        patch.setattr(sys, "stdout", there := Pipe())
        patch.setattr(sys, "argv", ["outfilter.py", "-v"])
        outfilter.main()
    logged = there.below.getvalue()
    if logged and not logged.endswith(b"\n"):
        logged += b"\n"
    log = tmp_path_factory.getbasetemp() / "any.log"
    assert TIME.sub(b"", log_of([data], log)) == TIME.sub(b"", logged)


@given(data=st.one_of(STREAMS, LONG_STREAMS), cuts=st.lists(st.integers(0, 70_000), max_size=8))
def test_lines_do_not_depend_on_how_the_bytes_were_cut(
    data: bytes, cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = tmp_path_factory.getbasetemp() / "cut.log"
    edges = [0, *sorted(cut for cut in cuts if cut <= len(data)), len(data)]
    whole = log_of([data], log)
    assert log_of([data[a:b] for a, b in itertools.pairwise(edges)], log) == whole
    if len(data) < 200:
        assert log_of([data[i : i + 1] for i in range(len(data))], log) == whole


def test_a_line_that_never_ends_is_not_held_back(tmp_path: Path) -> None:
    chunk = events.Output(data=b"x" * MIB)
    with (tmp_path / "out").open("w") as stream, output_to(stream) as output:
        tracemalloc.start()
        try:
            for _ in range(16):
                output(chunk)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 8 * MIB
    assert (tmp_path / "out").read_text() == f"{STAMP}{'x' * 16 * MIB}\n"


# ---- where it goes ----


def test_no_escape_sequence_gets_to_a_terminal_but_to_the_log_it_does(tmp_path: Path) -> None:
    log = tmp_path / "log"
    master, slave = os.openpty()
    try:
        with open(slave, "w", encoding="utf-8") as stream, output_to(stream, log) as output:
            output(events.Output(data=b"\x1b[31mred\x1b]0;title"))
            output(events.Output(data=b"\x07\x1b[0m caf\xc3\xa9\n\xff\n"))
            stream.flush()
            data = b""
            while data.count(b"\n") < 3:
                data += os.read(master, 4096)
        seen = data.decode().replace("\r\n", "\n")
    finally:
        os.close(master)
    assert seen == f"Output logs going to: {log}\n{STAMP}red café\n{STAMP}\ufffd\n"
    stamp = STAMP.encode()
    assert log.read_bytes() == stamp + b"\x1b[31mred\x1b]0;title\x07\x1b[0m caf\xc3\xa9\n" + stamp + b"\xff\n"


@pytest.mark.parametrize(
    ("name", "reason"), [("no/such/log", "No such file or directory"), (".", "Is a directory"), ("a\0b", "embedded")]
)
def test_a_log_that_cannot_be_opened_is_an_error_with_a_hint(name: str, reason: str) -> None:
    stream = io.StringIO()
    with pytest.raises(ToolError, match=reason) as caught, output_to(stream, name):
        pass
    assert "--logfile" in str(caught.value.problems[0].hint)
    assert stream.getvalue().startswith("Output logs going to: ")


def test_a_full_disk_is_told_once_and_the_rest_is_still_shown() -> None:
    stream = io.StringIO()
    with output_to(stream, "/dev/full") as output:
        with pytest.raises(ToolError, match="writing the log '/dev/full': No space left on device") as caught:
            output(events.Message(text="one"))
        output(events.Message(text="two"))
        output(events.Output(data=b"three"))
    assert caught.value.problems[0].hint
    assert stream.getvalue() == f"Output logs going to: /dev/full\n{STAMP}one\n{STAMP}two\n{STAMP}three\n"


def test_a_full_disk_at_the_end_is_an_error_unless_there_is_one_already() -> None:
    with pytest.raises(ToolError, match="No space left"), output_to(io.StringIO(), "/dev/full") as output:
        output(events.Output(data=b"rest"))

    def interrupted() -> None:
        with output_to(io.StringIO(), "/dev/full") as output:
            output(events.Output(data=b"rest"))
            raise Interrupted

    with pytest.raises(Interrupted):
        interrupted()


def test_when_nobody_reads_the_output_the_log_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as stream, output_to(stream, log) as output:
        output(events.Message(text="one"))
        output(events.Message(text="two"))
    assert log.read_text() == f"{STAMP}one\n{STAMP}two\n"


def test_a_pipe_that_does_not_block_gets_everything() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    got: list[bytes] = []

    def read() -> None:
        with open(reading, "rb") as stream:
            got.append(stream.read())

    # By then there is no room in it any more.
    reader = threading.Timer(0.3, read)
    with open(writing, "w", encoding="utf-8") as stream, output_to(stream) as output:
        reader.start()
        output(events.Output(data=b"x" * MIB + b"\n"))
    reader.join()
    assert got == [STAMP.encode() + b"x" * MIB + b"\n"]


def test_quiet_without_a_log_prints_nothing() -> None:
    stream = io.StringIO()
    with output_to(stream, quiet=True) as output:
        output(events.Message(text="one"))
        output(events.Output(data=b"two\n"))
    assert stream.getvalue() == ""
