# SPDX-License-Identifier: Apache-2.0
"""Limits of time: for what virt-dib waits for, for the build, and for one script."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from helpers import make_element, processes_of, skip_without, virt_dib
from virt_dib import tools
from virt_dib.errors import ToolError, UsageError
from virt_dib.interrupts import Limit, check_cancelled, limited, shielded, unlimited
from virt_dib.spec import parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("1d", 86400), ("0.5", 0.5), ("365d", 31536000)],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text, "a time") == seconds


@pytest.mark.parametrize("text", ["", "0", "0h", "-1", "h", "1 h", "1w", "1e3", "366d", "nan", "\u0661"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="as a time"):
        parse_duration(text, "a time")


def over() -> ToolError:
    return ToolError("it is over")


def test_a_program_that_takes_too_long_is_ended() -> None:
    program = [sys.executable, "-c", "import time\nprint('here', flush=True)\ntime.sleep(1000)"]
    limit = Limit(0.1, over)
    limit.start()
    with pytest.raises(ToolError, match="it is over"), limited(limit):
        tools.run(program, doing="sleeping")
    assert processes_of(Path("time.sleep(1000)")) == []


def test_a_limit_is_told_once_and_not_in_what_is_undone() -> None:
    limit = Limit(1e-9, over)
    limit.start()
    with limited(limit):
        with shielded():
            check_cancelled()
        with pytest.raises(ToolError):
            check_cancelled()
        check_cancelled()


def test_the_clock_stops_while_somebody_is_at_the_terminal() -> None:
    limit = Limit(0.2, over)
    limit.start()
    with limited(limit):
        with unlimited():
            time.sleep(0.3)
            check_cancelled()
        check_cancelled()
        time.sleep(0.3)
        with pytest.raises(ToolError):
            check_cancelled()


def test_what_has_ended_in_time_or_has_no_limit_is_not_ended() -> None:
    stopped, none = Limit(1e-9, over), Limit(None, over)
    for limit in (stopped, none):
        limit.start()
    stopped.stop()
    with limited(stopped), limited(none):
        check_cancelled()
    started = Limit(1e-9, over)
    with limited(started):
        started.start()
    check_cancelled()


@pytest.fixture
def elements(element_dir: Path, tmp_path: Path) -> list[str | Path]:
    script = "#!/bin/bash\necho last words\nsleep 1000\n"
    make_element(tmp_path / "more", "sleeps", {"pre-install.d/50-sleeps": script})
    return ["-p", element_dir, "-p", tmp_path / "more", "--skip-base", "--isolation", "sandbox"]


@pytest.mark.appliance
@pytest.mark.option("--script-timeout", "--timeout")
@pytest.mark.parametrize(
    ("option", "seconds", "message"),
    [
        (
            "--script-timeout", "4s",
            "pre-install.d/50-sleeps of element 'sleeps' has taken longer than 4 s, and was ended",
        ),
        # The script begins after some three seconds.
        ("--timeout", "25s", "building the image: it has taken longer than 25 s, and is not at its end: "),
    ],
)  # fmt: skip
def test_a_script_that_never_ends(
    elements: list[str | Path], tmp_path: Path, option: str, seconds: str, message: str
) -> None:
    skip_without("sandbox")
    temporary, out = tmp_path / "temporary", tmp_path / "out"
    temporary.mkdir()
    out.mkdir()
    (out / "image.qcow2").write_text("earlier")
    run = virt_dib([*elements, option, seconds, "tiny-os", "sleeps"], cwd=out, environment={"TMPDIR": str(temporary)})
    assert run.exit_status == 1
    assert f"virt-dib: error: {message}" in run.stderr
    assert "    last words\n" in run.stderr
    assert f"virt-dib: hint: give {'scripts' if option != '--timeout' else 'it'} more time with {option}" in run.stderr
    assert sorted(os.listdir(out)) == ["image.log", "image.qcow2"]
    assert (out / "image.qcow2").read_text() == "earlier"
    assert os.listdir(temporary) == []
    assert processes_of(temporary) == []
