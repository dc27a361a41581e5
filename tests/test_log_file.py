# SPDX-License-Identifier: Apache-2.0
"""The log of a build is of one build at a time."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest

from virt_dib import log_file, tools
from virt_dib.errors import Interrupted, ToolError
from virt_dib.interrupts import interrupts
from virt_dib.log_file import LogFile


def test_a_log_that_is_being_written_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "d.log"
    first = LogFile(path)
    first.write(b"first\n")
    with pytest.raises(ToolError, match=r"d\.log': another build is writing to it") as caught:
        LogFile(path)
    assert "--name" in str(caught.value.problems[0].hint)
    first.write(b"goes on\n")
    assert path.read_text() == "first\ngoes on\n"
    assert os.listdir(tmp_path) == ["d.log"]
    first.close()
    LogFile(path).close()
    assert path.read_text() == ""


def test_a_log_that_was_renamed_while_it_is_written_hinders_nobody(tmp_path: Path) -> None:
    first = LogFile(tmp_path / "d.log")
    (tmp_path / "d.log").rename(tmp_path / "kept.log")
    second = LogFile(tmp_path / "d.log")
    first.write(b"first")
    second.write(b"second")
    assert (tmp_path / "kept.log").read_text() == "first"
    assert (tmp_path / "d.log").read_text() == "second"


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_what_is_no_log_is_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "d.log"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / ("nothing" if kind == "dangling link" else "target"))
        if kind == "link":
            (tmp_path / "target").write_text("precious")
    log = LogFile(path)
    log.write(b"new")
    assert path.is_file()
    assert not path.is_symlink()
    assert path.read_text() == "new"
    if kind == "link":
        assert (tmp_path / "target").read_text() == "precious"


RACE = """
import sys, time
from pathlib import Path
from virt_dib.errors import ToolError
from virt_dib.log_file import LogFile
print("ready", flush=True)
while not Path(sys.argv[2]).exists():
    pass
try:
    log = LogFile(Path(sys.argv[1]))
except ToolError:
    print("refused", flush=True)
else:
    print("has it", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("earlier", [None, "of a build that has ended"])
def test_of_several_builds_that_start_at_once_one_gets_it(tmp_path: Path, earlier: str | None) -> None:
    path, start = tmp_path / "out" / "d.log", tmp_path / "start"
    path.parent.mkdir()
    if earlier is not None:
        path.write_text(earlier)
    command: list[str | Path] = [sys.executable, "-c", RACE, path, start]
    with contextlib.ExitStack() as stack:
        racers = [stack.enter_context(tools.started(command)) for _ in range(6)]
        outputs = [racer.stdout for racer in racers if racer.stdout is not None]
        assert [output.readline() for output in outputs] == [b"ready\n"] * 6
        start.touch()
        answers = [output.readline() for output in outputs]
    assert sorted(answers) == [b"has it\n"] + [b"refused\n"] * 5
    assert os.listdir(path.parent) == ["d.log"]


@pytest.mark.parametrize("at", ["_try_lock", "_give_name"])
def test_a_signal_while_it_is_created_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    path = tmp_path / "d.log"
    path.write_text("earlier")
    descriptors = os.listdir("/proc/self/fd")

    def stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(log_file, at, stop)
    with interrupts(), pytest.raises(Interrupted):
        LogFile(path)
    assert os.listdir(tmp_path) == ["d.log"]
    assert path.read_text() == "earlier"
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
