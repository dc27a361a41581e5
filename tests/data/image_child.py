# SPDX-License-Identifier: Apache-2.0
"""Stands for a build: notes how it was started and who ran at the same time, and does what CHILD_* variables say."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

NOTES = Path(os.environ["CHILD_NOTES"])
NAME = os.environ.get("CHILD_NAME", "image")
RUNNING = NOTES / "running"
LIMIT_S = 120


def note(what: str, value: object) -> None:
    partial = NOTES / f".{NAME}.{what}"
    partial.write_text(json.dumps(value))
    partial.rename(NOTES / f"{NAME}.{what}")


def wait_for(condition: str, *, count: int = 1) -> None:
    """Until that many files match; the limit only ends a test that has failed."""
    until = time.monotonic() + LIMIT_S
    while len(list(NOTES.glob(condition))) < count:
        if time.monotonic() > until:
            sys.exit(99)
        time.sleep(0.02)


def ended(number: int, _frame: FrameType | None) -> None:
    note("told", signal.Signals(number).name)
    # Nobody may be there to read it.
    with contextlib.suppress(BrokenPipeError):
        print("told to end", flush=True)  # noqa: T201 - what it prints is the point
    sys.exit(130)


def main() -> int:
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.SIG_IGN if "CHILD_DEAF" in os.environ else ended)
    RUNNING.mkdir(exist_ok=True)
    (RUNNING / NAME).touch()
    note(
        "started",
        {
            "arguments": sys.argv[1:],
            "environment": dict(os.environ),
            "pid": os.getpid(),
            "session": os.getsid(0),
            "running": sorted(os.listdir(RUNNING)),
            "input": os.readlink("/proc/self/fd/0"),
        },
    )
    for text, stream in ((os.environ.get("CHILD_OUT", ""), sys.stdout), (os.environ.get("CHILD_ERR", ""), sys.stderr)):
        stream.buffer.write(text.encode("latin-1").decode("unicode_escape").encode("latin-1"))
        stream.buffer.flush()
    if "CHILD_LINES" in os.environ:
        for number in range(int(os.environ["CHILD_LINES"])):
            # Half lines, for others to come between.
            for piece in (f"line {number} ", f"of {NAME}", "\n"):
                sys.stdout.write(piece)
                sys.stdout.flush()
    if "CHILD_MEET" in os.environ:
        wait_for("*.started", count=int(os.environ["CHILD_MEET"]))
    if "CHILD_WAIT" in os.environ:
        wait_for(os.environ["CHILD_WAIT"])
    if "CHILD_LINGER" in os.environ:
        time.sleep(float(os.environ["CHILD_LINGER"]))
    (RUNNING / NAME).unlink()
    if "CHILD_SIGNAL" in os.environ:
        os.kill(os.getpid(), int(os.environ["CHILD_SIGNAL"]))
    return int(os.environ.get("CHILD_EXIT", "0"))


if __name__ == "__main__":
    sys.exit(main())
