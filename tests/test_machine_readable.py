# SPDX-License-Identifier: Apache-2.0
"""Machine-readable output: the query, the lines of JSON, and where they go."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import Run, virt_dib
from virt_dib import __version__, events, formats, machine_readable, tools
from virt_dib.errors import ToolError, UsageError
from virt_dib.interrupts import shielded
from virt_dib.machine_readable import Target, event_json, open_lines, parse_target
from virt_dib.report import Artifact

DOCS = Path(__file__).parents[1] / "docs"
SCHEMA = json.loads((DOCS / "machine-readable.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
FEATURES = ["virt-dib", *(f"output:{name}" for name in formats.KNOWN)]


def checked(text: str) -> list[dict[str, Any]]:
    """The events of *text*, each a line that is as the schema says, with nothing that it does not know."""
    assert text.endswith("\n")
    found = [json.loads(line) for line in text.splitlines()]
    for event in found:
        VALIDATOR.validate(event)
        known = {*SCHEMA["properties"], *SCHEMA["$defs"][event["event"]]["properties"]}
        assert set(event) == known
        assert datetime.fromisoformat(event["timestamp"]).tzinfo is not None
    return found


# ---- any event ----

WORDS = st.one_of(st.text(), st.binary().map(os.fsdecode), st.text(st.characters(categories=["Cs", "Cc"])))
COUNTS = st.integers(min_value=1, max_value=10**9)
SECONDS = st.floats(min_value=0, max_value=1e12)
ARTIFACTS = st.builds(
    Artifact,
    path=WORDS.map(Path),
    format=WORDS,
    allocated_bytes=COUNTS,
    virtual_bytes=st.none() | COUNTS,
)
PLACE = {"number": COUNTS, "total": COUNTS, "log_line": COUNTS}
SCRIPT = {"phase": WORDS, "name": WORDS, "element": st.none() | WORDS, **PLACE}
LIST = st.lists(WORDS, max_size=3).map(tuple)
EVENTS = st.one_of(
    st.builds(events.BuildStarted, name=WORDS, output_dir=WORDS.map(Path), elements=LIST, formats=LIST),
    st.builds(events.BuildPlanned, elements=LIST, log_path=WORDS.map(Path), total=COUNTS),
    *(st.builds(kind, text=WORDS) for kind in (events.Message, events.Warned, events.Debugged)),
    st.builds(events.PhaseStarted, title=WORDS, step=st.booleans(), scripts=LIST, **PLACE),
    st.builds(events.PhaseFinished, title=WORDS, number=COUNTS, total=COUNTS, seconds=SECONDS),
    st.builds(events.ScriptStarted, **SCRIPT),
    st.builds(events.ScriptFinished, exit_status=st.integers(0, 255), seconds=SECONDS, **SCRIPT),
    st.builds(events.ShellOpened, point=WORDS, phase=WORDS, inside=st.booleans()),
    st.builds(events.ShellClosed, point=WORDS, exit_status=st.none() | st.integers(0, 255), seconds=SECONDS),
    st.builds(events.ArtifactMade, artifact=ARTIFACTS),
    st.builds(events.ErrorFound, text=WORDS, hint=st.none() | WORDS, details=LIST),
    st.builds(events.BuildFinished, name=WORDS, artifacts=st.lists(ARTIFACTS).map(tuple), seconds=SECONDS),
    st.builds(
        events.BuildFailed,
        name=WORDS,
        interrupted=st.booleans(),
        exit_status=st.integers(1, 255),
        phase=st.none() | WORDS,
        script=st.none() | WORDS,
        log_path=st.none() | WORDS.map(Path),
        log_line=st.none() | COUNTS,
        seconds=SECONDS,
    ),
)


@given(EVENTS)
def test_whatever_is_named_how_the_line_is_one_valid_object_of_ascii(event: events.Event) -> None:
    line = event_json(event)
    assert line is not None
    assert line.isascii()
    (found,) = checked(line + "\n")
    json.dumps(found, ensure_ascii=False).encode()  # no half of a surrogate pair, which strict readers refuse
    assert all(character >= " " and not "\x7f" <= character < "\xa0" for character in found["message"])


def test_the_schema_and_these_tests_know_every_event() -> None:
    classes = [kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, events.Event)]
    kinds = set(classes) - {events.Event, events.Output, events.EnvironmentSourced}
    covered = {strategy.wrapped_strategy.target for strategy in EVENTS.original_strategies}  # type: ignore[attr-defined] # hypothesis's own
    assert kinds == covered
    assert len(SCHEMA["oneOf"]) == len(SCHEMA["properties"]["event"]["enum"]) == len(kinds)


def test_output_is_left_to_the_log() -> None:
    assert event_json(events.Output(data=b"\xff")) is None


def test_the_line_of_a_script() -> None:
    event = events.ScriptFinished(
        elapsed_s=5.00049, phase="install.d", name="50-foo", element="foo", number=2, total=3, exit_status=137,
        seconds=1.25, log_line=99,
    )  # fmt: skip
    (found,) = checked(f"{event_json(event)}\n")
    del found["timestamp"]
    assert found == {
        "message": "install.d/50-foo failed with exit status 137 (SIGKILL) after 1.2 s",
        "type": "info", "version": 1, "event": "script-finished", "elapsed_s": 5.0, "phase": "install.d",
        "name": "50-foo", "element": "foo", "number": 2, "total": 3, "exit_status": 137, "signal": "SIGKILL",
        "seconds": 1.25, "log_line": 99,
    }  # fmt: skip


# ---- the query ----


def run_with(arguments: Sequence[str], cwd: Path, redirections: str = "") -> Run:
    """Run virt-dib from a shell that opens descriptors."""
    command = ["/bin/sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-m", "virt_dib", *arguments]
    result = tools.run(command, doing="running virt-dib", cwd=cwd, check=False)
    return Run(exit_status=result.exit_status, stdout=result.stdout, stderr=result.stderr, output_dir=cwd)


@pytest.mark.option("--machine-readable")
@pytest.mark.parametrize(
    ("option", "redirections", "place"),
    [
        ("--machine-readable", "", "stdout"),
        ("--machine-readable=stream:stdout", "", "stdout"),
        ("--machine-readable=stream:stderr", "", "stderr"),
        ("-machine-readable=fd:7", "7>there", "there"),
        ("--machine-readable=fd:1", "", "stdout"),
        ("--machine=file:there", "", "there"),
    ],
)
def test_without_elements_it_tells_what_there_is(option: str, redirections: str, place: str, tmp_path: Path) -> None:
    run = run_with([option, "--name", "x"], tmp_path, redirections)
    said = {"stdout": run.stdout, "stderr": run.stderr}
    said |= {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert run.exit_status == 0
    assert said.pop(place).splitlines() == FEATURES
    assert set(said.values()) <= {""}


def test_the_word_after_it_is_an_element(tmp_path: Path) -> None:
    run = virt_dib(["--machine-readable", "file:no-element"], cwd=tmp_path)
    assert run.exit_status == 2
    assert "element 'file:no-element' not found" in run.stderr


def test_help_and_version_are_for_people(tmp_path: Path) -> None:
    run = virt_dib(["--machine-readable=file:there", "--version"], cwd=tmp_path)
    assert (run.exit_status, run.stdout) == (0, f"virt-dib {__version__}\n")
    assert list(tmp_path.iterdir()) == []


# ---- errors ----

WRONG = ["--size", "5Q", "--wat", "no-such-element"]


def check_errors(text: str) -> None:
    found = checked(text)
    assert [event["event"] for event in found] == ["build-started", *["error"] * (len(found) - 2), "build-failed"]
    messages = [event["message"] for event in found]
    assert "unknown option '--wat'" in messages
    assert "cannot use '5Q' as the size of the image" in messages
    assert "element 'no-such-element' not found" in messages
    assert all(event["type"] == "error" for event in found[1:])
    assert (found[-1]["exit_status"], found[-1]["interrupted"], found[-1]["log_path"]) == (2, False, None)


def test_errors_in_a_file_and_for_people(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("of an earlier build\n" * 1000)
    run = virt_dib(["--machine-readable=file:there", *WRONG], cwd=tmp_path)
    assert (run.exit_status, run.stdout) == (2, "")
    assert "virt-dib: error: unknown option '--wat'\n" in run.stderr
    check_errors((tmp_path / "there").read_text())


def test_standard_output_with_json_has_nothing_else(tmp_path: Path) -> None:
    run = virt_dib(["--machine-readable", *WRONG], cwd=tmp_path)
    assert run.exit_status == 2
    check_errors(run.stdout)
    assert "virt-dib: error: unknown option '--wat'\n" in run.stderr


def test_standard_error_with_json_has_nothing_else(tmp_path: Path) -> None:
    run = virt_dib(["--machine-readable=stream:stderr", *WRONG], cwd=tmp_path)
    assert (run.exit_status, run.stdout) == (2, "")
    check_errors(run.stderr)


def test_an_unknown_option_without_elements_is_an_error_not_an_answer(tmp_path: Path) -> None:
    run = virt_dib(["--machine-readable", "--wat"], cwd=tmp_path)
    assert run.exit_status == 2
    assert [event["event"] for event in checked(run.stdout)] == ["build-started", "error", "build-failed"]


def test_settings_that_are_wrong_are_no_matter_to_the_question(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("memsize = [\n")
    environment = {**os.environ, "VIRT_DIB_CONFIG": str(tmp_path / "config.toml"), "VIRT_DIB_WAT": "1"}
    command = [sys.executable, "-m", "virt_dib", "--machine-readable"]
    asked = tools.run(command, doing="asking", environment=environment, cwd=tmp_path)
    assert asked.stdout.splitlines() == FEATURES
    build = tools.run([*command, "tiny-os"], doing="asking", environment=environment, cwd=tmp_path, check=False)
    assert build.exit_status == 2
    assert all(word in build.stderr for word in ("config.toml", "VIRT_DIB_WAT"))


# ---- where it goes ----


@pytest.mark.parametrize(
    "text", ["", "json", "file", "file:", "file:a\0b", "stream:", "stream:stdin", "fd:", "fd:x", "fd:-1", "fd:²", "x:y"]
)
def test_what_is_no_format(text: str) -> None:
    with pytest.raises(UsageError, match="as the format of --machine-readable") as caught:
        parse_target(text)
    assert "stream:stderr" in (caught.value.problems[0].hint or "")


def test_descriptors_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such descriptor is open"):
        parse_target("fd:987654321")
    (tmp_path / "file").touch()
    with (tmp_path / "file").open() as stream, pytest.raises(UsageError, match="not open for writing"):
        parse_target(f"fd:{stream.fileno()}")


def test_a_bad_format_is_told_with_the_other_mistakes(tmp_path: Path) -> None:
    run = virt_dib(["--machine-readable=xml", *WRONG], cwd=tmp_path)
    assert run.exit_status == 2
    assert all(word in run.stderr for word in ("'xml'", "--wat", "5Q", "no-such-element"))


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    run = virt_dib(["--machine-readable=file:missing/there"], cwd=tmp_path)
    assert (run.exit_status, run.stdout) == (2, "")
    assert "opening 'missing/there' for --machine-readable: No such file or directory" in run.stderr


def test_a_file_that_cannot_be_opened_is_told_with_the_other_mistakes(tmp_path: Path) -> None:
    run = virt_dib(["--machine-readable=file:missing/there", *WRONG], cwd=tmp_path)
    assert (run.exit_status, run.stdout) == (2, "")
    assert all(word in run.stderr for word in ("'missing/there'", "--wat", "5Q", "no-such-element"))


def test_a_full_disk_is_one_error_and_the_end_of_writing() -> None:
    with open_lines(Target(path=Path("/dev/full"))) as lines:
        with pytest.raises(ToolError, match="writing machine-readable output to '/dev/full': No space left"):
            lines(events.Message(text="x"))
        lines(events.Message(text="y"))


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        for descriptor in (reader, writer):
            with contextlib.suppress(OSError):
                os.close(descriptor)


def test_a_reader_that_goes_does_not_end_the_build() -> None:
    with pipe() as (reader, writer), open_lines(Target(descriptor=writer)) as lines:
        os.close(reader)
        lines(events.Message(text="x"))
        lines(events.Message(text="y"))


def test_a_pipe_that_does_not_block_gets_long_lines_whole() -> None:
    with pipe() as (reader, writer), open_lines(Target(descriptor=writer)) as lines:
        os.set_blocking(writer, False)
        lines(events.Message(text="x" * 30_000))
        assert checked(os.read(reader, 1 << 16).decode())[0]["message"] == "x" * 30_000


def test_a_pipe_that_somebody_fills_once_it_was_found_to_have_room_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = b""
    full = b"x" * select.PIPE_BUF

    def read_all() -> None:
        nonlocal read
        while data := os.read(reader, 1 << 16):
            read += data

    other = threading.Thread(target=read_all)
    count = 0

    @contextlib.contextmanager
    def somebody_is_first() -> Iterator[None]:
        nonlocal count
        with shielded():
            with contextlib.suppress(BlockingIOError):
                while not other.ident:
                    count += os.write(writer, full)
            try:
                yield
            finally:
                if not other.ident:
                    other.start()

    monkeypatch.setattr(machine_readable, "shielded", somebody_is_first)
    with pipe() as (reader, writer):
        os.set_blocking(writer, False)
        with open_lines(Target(descriptor=writer)) as lines:
            lines.write("a line\n")
        os.close(writer)
        other.join()
    assert count
    assert read == b"x" * count + b"a line\n"


WRITERS = """
import os
from virt_dib.machine_readable import Target, open_lines

os.set_blocking(1, False)
with open_lines(Target(descriptor=1)) as lines:
    for _ in range(250):
        lines.write("x" * 4000 + chr(10))
"""


def test_builds_that_write_to_one_pipe_at_the_same_moment_write_whole_lines() -> None:
    four = 'for n in 1 2 3 4; do "$0" -c "$1" & done; wait'
    with tools.started(["/bin/bash", "-c", four, sys.executable, WRITERS]) as process:
        assert process.stdout
        descriptor = process.stdout.fileno()
        written = b""
        while line := os.read(descriptor, 4001):
            written += line
            # Now all wait until there is room for one line; who comes second finds none.
            time.sleep(0.001)
        assert process.wait() == 0
    assert written == (b"x" * 4000 + b"\n") * 1000


def test_a_descriptor_may_have_any_number() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    with pipe() as (reader, writer):
        high = fcntl.fcntl(writer, fcntl.F_DUPFD, 1024)
        try:
            with open_lines(parse_target(f"fd:{high}")) as lines:
                lines(events.Message(text="x"))
        finally:
            os.close(high)
        assert checked(os.read(reader, 1 << 16).decode())[0]["message"] == "x"


SLOW_READER = """
import sys
import time
from virt_dib import cli, events
from virt_dib.interrupts import interrupts
from virt_dib.machine_readable import Target, open_lines

def body():
    with open_lines(Target(descriptor=1)) as lines:
        try:
            with interrupts():
                while True:
                    lines(events.Message(text="x" * 50_000))
                    print("wrote", file=sys.stderr, flush=True)
        finally:
            lines(events.Message(text="last"))

sys.exit(cli.report_errors("virt-dib", body))
"""


def test_a_signal_in_the_middle_of_a_line_does_not_cut_it() -> None:
    with tools.started([sys.executable, "-c", SLOW_READER]) as process:
        assert process.stdout
        assert process.stderr
        # The pipe holds one line and a part of the next, which it waits to write.
        assert process.stderr.readline() == b"wrote\n"
        while len(process.stdout.peek()) < 1000:  # type: ignore[attr-defined] # a buffered reader
            pass
        process.send_signal(signal.SIGTERM)
        found = checked(process.stdout.read().decode())
        assert process.wait() == 130
    assert found[-1]["message"] == "last"
    assert {event["message"] for event in found[:-1]} == {"x" * 50_000}


# ---- a whole build ----


def by_kind(found: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [event for event in found if event["event"] == kind]


@pytest.mark.option("--machine-readable")
@pytest.mark.appliance
def test_the_events_of_a_build(probe_build: Run) -> None:
    directory = probe_build.output_dir
    found = checked((directory / "probe.events").read_text())
    assert [event["event"] for event in found[:2]] == ["build-started", "build-planned"]
    assert found[-1]["event"] == "build-finished"
    assert [event["elapsed_s"] for event in found] == sorted(event["elapsed_s"] for event in found)
    assert found[1]["elements"] == ["probe", "tiny-os"] or set(found[1]["elements"]) == {"probe", "tiny-os"}

    phases, ends = by_kind(found, "phase-started"), by_kind(found, "phase-finished")
    assert [event["title"] for event in phases] == [event["title"] for event in ends]
    assert [event["number"] for event in phases] == list(range(1, len(phases) + 1))
    assert [event["title"] for event in phases if event["step"]] == [
        event["title"] for event in phases if not event["title"].endswith(".d")
    ]

    scripts, ends = by_kind(found, "script-started"), by_kind(found, "script-finished")
    assert [(event["phase"], event["name"]) for event in scripts] == [(end["phase"], end["name"]) for end in ends]
    assert {(event["phase"], event["element"]) for event in scripts} >= {
        ("root.d", "tiny-os"),
        ("install.d", "probe"),
        ("cleanup.d", "probe"),
    }
    assert {end["exit_status"] for end in ends} == {0}

    made = {Path(event["artifact"]["path"]).name: event["artifact"] for event in by_kind(found, "artifact-made")}
    assert set(made) == {"probe.raw", "probe.qcow2", "probe.d", "probe.log"}
    assert made["probe.raw"]["virtual_bytes"] == (directory / "probe.raw").stat().st_size
    assert {artifact["path"] for artifact in found[-1]["artifacts"]} == {item["path"] for item in made.values()}


@pytest.mark.appliance
def test_line_numbers_lead_to_the_output_in_the_log(probe_build: Run) -> None:
    found = checked((probe_build.output_dir / "probe.events").read_text())
    log = (probe_build.output_dir / "probe.log").read_bytes().split(b"\n")
    for event in by_kind(found, "script-started"):
        assert log[event["log_line"] - 2].endswith(f"] {event['phase']}/{event['name']}".encode())


# ---- the example of the page ----


def example() -> str:
    return (DOCS / "machine-readable.md").read_text().partition("```python\n")[2].partition("```")[0]


def test_the_example_shows_errors_and_ends_as_the_build(tmp_path: Path) -> None:
    told = virt_dib(["--machine-readable", *WRONG], cwd=tmp_path).stdout
    command = [sys.executable, "-c", example()]
    result = tools.run(command, doing="the example", stdin=told.encode(), check=False)
    assert (result.exit_status, result.stderr) == (2, "")
    assert "error: unknown option '--wat'" in result.stdout.splitlines()


@pytest.mark.appliance
def test_the_example_shows_the_progress_of_a_build(probe_build: Run) -> None:
    told = (probe_build.output_dir / "probe.events").read_bytes()
    said = tools.run([sys.executable, "-c", example()], doing="the example", stdin=told).stdout.splitlines()
    assert re.fullmatch(r"\[1/[0-9]+\] starting the (appliance|sandbox)", said[0])
    assert any(line.startswith("probe.raw: ") for line in said)
