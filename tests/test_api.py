# SPDX-License-Identifier: Apache-2.0
"""virt-dib as a library: what is public, its events, cancelling, and the examples of its page."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers import make_element, processes_of, skip_without
from virt_dib import api, tools
from virt_dib.events import Teller
from virt_dib.interrupts import (
    Cancellation,
    Limit,
    cancellable,
    check_cancelled,
    interrupts,
    limited,
    shielded,
    too_late,
)
from virt_dib.spec import check_spec

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "python-api.md").read_text()
SECTIONS = dict(section.split("\n", 1) for section in PAGE.split("\n## ")[1:])
EXAMPLES = {
    title: text.partition("```python\n")[2].partition("```")[0]
    for title, text in SECTIONS.items()
    if "```python" in text
}
SANDBOX = api.RunOptions(isolation=api.Isolation.SANDBOX)
WAIT_S = 60.0


def run_example(title: str, cwd: Path) -> str:
    """What the example of a section of the page prints; it must end well and say nothing on standard error."""
    result = tools.run([sys.executable, "-c", EXAMPLES[title]], doing=title, cwd=cwd, check=False)
    assert (result.exit_status, result.stderr) == (0, "")
    return result.stdout


@pytest.fixture
def place(element_dir: Path, tmp_path: Path) -> Path:
    """The directory the examples run in."""
    (tmp_path / "elements").symlink_to(element_dir)
    for name in ("out", "more"):
        (tmp_path / name).mkdir()
    return tmp_path


# ---- what is public ----


def test_the_page_lists_what_is_public_and_nothing_else() -> None:
    rows = [line.split("|")[1] for line in SECTIONS["What is public"].splitlines() if line.startswith("| `")]
    listed = re.findall(r"`(\w+)`", " ".join(rows))
    assert sorted(listed) == sorted(api.__all__)
    assert all(hasattr(api, name) for name in api.__all__)


def test_every_event_is_public() -> None:
    from virt_dib import events  # noqa: PLC0415 - the module itself is not public

    kinds = {name for name, kind in vars(events).items() if isinstance(kind, type) and issubclass(kind, api.Event)}
    assert kinds <= set(api.__all__)


def test_data_cannot_be_changed() -> None:
    classes = [getattr(api, name) for name in api.__all__]
    data = [kind for kind in classes if dataclasses.is_dataclass(kind)]
    assert len(data) > 20
    assert [kind for kind in data if not vars(kind)["__dataclass_params__"].frozen] == []


def test_importing_it_prints_nothing_and_takes_no_signal(tmp_path: Path) -> None:
    program = "import signal; import virt_dib.api; print(signal.getsignal(signal.SIGINT).__name__)"
    result = tools.run([sys.executable, "-c", program], doing="importing", cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("default_int_handler\n", "")


# ---- without a build ----


def test_following_a_build_that_cannot_be(place: Path) -> None:
    said = run_example("Follow a build", place).splitlines()
    assert "wrong: element 'no-such-element' not found" in said
    assert "wrong: cannot use -1 bytes as the size of the image" in said
    assert said[-1] == f"{len(said) - 1} problems"
    assert list((place / "out").iterdir()) == []


def test_planning_tells_what_would_be_built_and_makes_nothing(place: Path) -> None:
    said = run_example("Plan only", place).splitlines()
    assert said[0] == "['tiny-os']"
    assert "root.d 10-tiny-os tiny-os" in said
    assert list((place / "out").iterdir()) == []


def test_checking_the_host_tells_what_is_not_as_it_should_be(tmp_path: Path) -> None:
    said = run_example("Check the host, start an image", tmp_path)
    wanting = [check.name for check in api.check_host() if not check.ok]
    assert [line.partition(": ")[0] for line in said.splitlines()] == wanting


BAD_SPECS: list[tuple[dict[str, object], str]] = [
    ({"name": "../x"}, "cannot use '../x' as the name of the image"),
    ({"name": ""}, "cannot use '' as the name of the image"),
    ({"arch": "a b"}, "cannot use 'a b' as an architecture"),
    ({"variables": {"1A": "x"}}, "cannot use '1A' as the name of a variable"),
    ({"variables": {"UID": "1"}}, "cannot set the variable 'UID' for elements"),
    ({"size_bytes": 0}, "cannot use 0 bytes as the size of the image"),
    ({"memory_mib": 1}, "cannot use '1' as the memory size in MB"),
    ({"cpus": 0}, "cannot use '0' as the number of processors"),
    ({"debug_level": -1}, "cannot use '-1' as the debug level"),
    ({"fs_type": "ntfs"}, "unknown file system 'ntfs'"),
    ({"install_type": "x"}, "unknown install type 'x'"),
    ({"extra_packages": ("",)}, "cannot use an empty name"),
    ({"extra_data": "host"}, "cannot use 'host' as a value of ExtraData"),
]


@pytest.mark.parametrize(("change", "message"), BAD_SPECS, ids=[str(change) for change, _ in BAD_SPECS])
def test_values_that_no_command_line_lets_through(change: dict[str, object], message: str) -> None:
    good = api.BuildSpec(name="x", output_dir=Path(), elements=("tiny-os",))
    check_spec(good)
    with pytest.raises(api.UsageError, match=re.escape(message)):
        check_spec(dataclasses.replace(good, **change))  # type: ignore[arg-type] # fields by name


@pytest.mark.parametrize(
    "change", [{"name": "a\0b"}, {"element_paths": (Path("a\0b"),)}, {"elements": ("a\0",)}, {"output_dir": Path("\0")}]
)
def test_a_nul_anywhere_is_an_error(change: dict[str, object], tmp_path: Path) -> None:
    spec = api.BuildSpec(name="x", output_dir=tmp_path, elements=("tiny-os",))
    with pytest.raises(api.UsageError, match="there is a NUL in it"):
        api.plan_image(dataclasses.replace(spec, **change))  # type: ignore[arg-type] # fields by name


@pytest.mark.parametrize("change", [{"kvm": "yes"}, {"kvm": "off"}, {"kvm": True}, {"isolation": "sandbox"}])
def test_what_is_none_of_the_values_is_refused_and_means_nothing(change: dict[str, object], tmp_path: Path) -> None:
    spec = api.BuildSpec(name="x", output_dir=tmp_path, elements=("tiny-os",))
    options = api.RunOptions(**change)  # type: ignore[arg-type] # fields by name
    (value,) = change.values()
    told: list[api.Event] = []
    with pytest.raises(api.UsageError, match=f"cannot use {value!r} as a value of (Kvm|Isolation)") as planned:
        api.plan_image(spec, options=options)
    assert "Kvm.AUTO, Kvm.ON, Kvm.OFF" in str(planned.value.problems[0].hint) or "isolation" in change
    with pytest.raises(api.UsageError, match=re.escape(str(planned.value))):
        api.build_image(spec, options=options, listener=told.append)
    assert [type(event) for event in told] == [api.BuildStarted, api.ErrorFound, api.BuildFailed]


def test_the_check_of_the_host_refuses_a_text_too() -> None:
    with pytest.raises(api.UsageError, match="cannot use 'off' as a value of Kvm"):
        api.check_host(kvm="off")  # type: ignore[arg-type] # what is refused


def test_no_elements_is_an_error_as_with_the_command(tmp_path: Path) -> None:
    told: list[api.Event] = []
    with pytest.raises(api.UsageError, match="no element named"):
        api.build_image(api.BuildSpec(name="x", output_dir=tmp_path, elements=()), listener=told.append)
    assert [type(event) for event in told] == [api.BuildStarted, api.ErrorFound, api.BuildFailed]


class _OwnError(Exception):
    """What a listener raises."""


def test_what_a_listener_raises_comes_out_of_the_build(tmp_path: Path) -> None:
    told: list[api.Event] = []

    def listen(event: api.Event) -> None:
        told.append(event)
        if isinstance(event, api.ErrorFound):
            raise _OwnError

    with pytest.raises(api.UsageError):  # the reason of the build's end is not hidden by the listener's
        api.build_image(api.BuildSpec(name="x", output_dir=tmp_path, elements=()), listener=listen)
    assert [type(event) for event in told] == [api.BuildStarted, api.ErrorFound]


def test_what_a_listener_raises_in_another_thread_is_raised_in_that_of_the_build() -> None:
    def listen(event: api.Event) -> None:
        if isinstance(event, api.Debugged):
            raise _OwnError

    teller = Teller(listen)
    other = threading.Thread(target=teller.tell, args=[api.Debugged(text="from libguestfs")])
    other.start()
    other.join()
    with pytest.raises(_OwnError):
        teller.tell(api.Message(text="next"))
    teller.tell(api.Message(text="only once"))


# ---- cancelling ----


def test_cancelling_from_another_thread_ends_a_program_that_runs() -> None:
    cancellation = Cancellation()
    timer = threading.Timer(0.2, cancellation.cancel)
    timer.start()
    with pytest.raises(api.Interrupted), cancellable(cancellation):
        tools.run(["sleep", "1000"], doing="sleeping")
    timer.join()


def test_cancelling_waits_for_the_end_of_a_shielded_block_and_comes_once() -> None:
    cancellation = Cancellation()
    seen: list[str] = []

    def work() -> None:
        with cancellable(cancellation):
            try:
                with shielded():
                    cancellation.cancel()
                    check_cancelled()
                    seen.append("shielded")
                check_cancelled()
            finally:
                check_cancelled()
                seen.append("undone")

    with pytest.raises(api.Interrupted):
        work()
    assert seen == ["shielded", "undone"]
    check_cancelled()


def test_nothing_ends_a_build_any_more_that_has_its_files_but_the_next_one() -> None:
    cancellation = Cancellation()
    limit = Limit(0, lambda: api.ToolError("it is over"))
    seen: list[str] = []

    def work() -> None:
        with interrupts():
            with cancellable(cancellation), limited(limit):
                with shielded():
                    os.kill(os.getpid(), signal.SIGTERM)
                    too_late()
                limit.start()
                cancellation.cancel()
                os.kill(os.getpid(), signal.SIGTERM)
                check_cancelled()
                seen.append("the first")
            with cancellable(Cancellation()):
                with shielded():
                    seen.append("the second")
                os.kill(os.getpid(), signal.SIGTERM)
                seen.append("never")

    with pytest.raises(api.Interrupted):
        work()
    assert seen == ["the first", "the second"]


def test_cancelling_one_build_is_nothing_to_another_thread() -> None:
    cancellation = Cancellation()
    cancellation.cancel()
    failed: list[BaseException] = []

    def other() -> None:
        try:
            with cancellable(Cancellation()):
                check_cancelled()
        except BaseException as error:  # noqa: BLE001 - whatever it is
            failed.append(error)

    with pytest.raises(api.Interrupted), cancellable(cancellation):
        raise AssertionError
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert failed == []


def test_programs_that_take_long_to_read_get_all_their_input() -> None:
    data = os.urandom(1 << 20)
    text = "import sys, time; time.sleep(1.2); print(len(sys.stdin.buffer.read()))"
    assert tools.run([sys.executable, "-c", text], doing="reading", stdin=data).stdout == f"{len(data)}\n"


# ---- builds ----


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TMPDIR, which must be empty in the end."""
    skip_without("sandbox")
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    return directory


def spec_of(name: str, place: Path, *more: str) -> api.BuildSpec:
    return api.BuildSpec(
        name=name,
        output_dir=place / "out",
        elements=("tiny-os", *more),
        element_paths=(place / "elements", place / "more"),
        skip_base=True,
    )


@pytest.mark.appliance
def test_the_example_builds_an_image(place: Path, temporary: Path) -> None:
    said = run_example("Build an image", place)
    assert said.splitlines() == [f"raw tiny.raw {1 << 30}", "log tiny.log None"]
    assert (place / "out" / "tiny.raw").stat().st_size == 1 << 30
    assert list(temporary.iterdir()) == []


@pytest.mark.appliance
def test_the_example_that_cancels_leaves_nothing(place: Path, temporary: Path) -> None:
    assert run_example("Cancel a build", place) == "cancelled, and nothing is left\n"
    assert [path.name for path in (place / "out").iterdir()] == ["tiny.log"]
    assert (place / "out" / "tiny.log").read_text().splitlines()[-1].endswith("interrupted")
    assert list(temporary.iterdir()) == []


class _Build(threading.Thread):
    """A build in a thread of its own, that keeps its events and how it ended."""

    def __init__(self, spec: api.BuildSpec, cancellation: Cancellation | None = None) -> None:
        super().__init__()
        self._spec = spec
        self._cancellation = cancellation
        self.events: list[api.Event] = []
        self.error: BaseException | None = None
        self.waiting = threading.Event()

    def run(self) -> None:
        try:
            api.build_image(self._spec, options=SANDBOX, listener=self._listen, cancellation=self._cancellation)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def _listen(self, event: api.Event) -> None:
        self.events.append(event)
        if isinstance(event, api.Output) and b"waiting" in event.data:
            self.waiting.set()


@pytest.mark.appliance
def test_builds_in_threads_one_cancelled_and_one_that_fails(
    place: Path, temporary: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_element(place / "more", "waits", {"install.d/50-waits": "#!/bin/bash\necho waiting\nsleep 1000\n"})
    junk = r"printf '\377\033]0;t\007\0last words\n'"
    make_element(place / "more", "fails", {"install.d/50-fails": f"#!/bin/bash\n{junk}\nexit 3\n"})
    cancellation = Cancellation()
    waits, fails = _Build(spec_of("waits", place, "waits"), cancellation), _Build(spec_of("fails", place, "fails"))
    waits.start()
    fails.start()
    assert waits.waiting.wait(WAIT_S)
    fails.join()
    assert waits.is_alive()
    cancellation.cancel()
    waits.join()

    assert isinstance(waits.error, api.Interrupted)
    cancelled = waits.events[-1]
    assert isinstance(cancelled, api.BuildFailed)
    assert (cancelled.interrupted, cancelled.phase, cancelled.script) == (True, "install.d", "50-waits")

    assert isinstance(fails.error, api.ScriptError)
    check_failure(fails.events)
    assert processes_of(temporary) == []
    assert list(temporary.iterdir()) == []
    assert sorted(path.name for path in (place / "out").iterdir()) == ["fails.log", "waits.log"]
    assert capfd.readouterr() == ("", "")


def check_failure(told: Sequence[api.Event]) -> None:
    ended = next(event for event in told if isinstance(event, api.ScriptFinished) and event.name == "50-fails")
    error, last = told[-2:]
    assert isinstance(error, api.ErrorFound)
    assert isinstance(last, api.BuildFailed)
    assert (ended.phase, ended.element, ended.exit_status) == ("install.d", "fails", 3)
    assert "install.d/50-fails of element 'fails' failed with exit status 3" in error.text
    assert error.details == ("\ufffdlast words",)
    assert (last.phase, last.script, last.exit_status, last.log_line) == ("install.d", "50-fails", 1, ended.log_line)
    assert last.log_path is not None
    log = last.log_path.read_bytes().split(b"\n")
    assert log[ended.log_line - 1] == b"\xff\x1b]0;t\x07\0last words"
    for event in told:
        assert isinstance(event, (api.Output, api.EnvironmentSourced)) or api.event_json(event)


# Every third one fails. The first three may load what stays loaded.
MANY = """
import gc, os, sys, threading
from pathlib import Path
from virt_dib import api

def state():
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir(os.environ["TMPDIR"])), resident

isolations = [api.Isolation.SANDBOX, api.Isolation.VM]
for number in range(10):
    size = 1 << 20 if number % 3 == 2 else 200 << 20
    spec = api.BuildSpec(
        name="many", elements=("tiny-os",), element_paths=(Path("elements"),), output_dir=Path("out"), skip_base=True,
        formats=("raw",), size_bytes=size,
    )
    try:
        api.build_image(spec, options=api.RunOptions(isolation=isolations[number % 2]))
        outcome = "built"
    except api.VirtDibError:
        outcome = "failed"
    print(outcome, *state(), flush=True)
"""


@pytest.mark.full
def test_ten_builds_in_one_process_leave_nothing_in_it(place: Path, temporary: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(temporary)}
    result = tools.run([sys.executable, "-c", MANY], doing="building", cwd=place, environment=environment)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == (["built", "built", "failed"] * 4)[:10]
    states = [[int(word) for word in line[1:]] for line in lines]
    assert {tuple(state[:3]) for state in states[2:]} == {tuple(states[2][:3])}
    assert states[2][2] == 0
    assert states[-1][3] - states[2][3] < 10 << 20
    assert processes_of(temporary) == []


@pytest.mark.appliance
def test_what_a_listener_raises_ends_a_build_that_runs(place: Path, temporary: Path) -> None:
    def listen(event: api.Event) -> None:
        if isinstance(event, api.ScriptStarted):
            raise _OwnError

    with pytest.raises(_OwnError):
        api.build_image(spec_of("x", place), options=SANDBOX, listener=listen)
    assert processes_of(temporary) == []
    assert list(temporary.iterdir()) == []
    assert [path.name for path in (place / "out").iterdir()] == ["x.log"]
