# SPDX-License-Identifier: Apache-2.0
"""Machine-readable output: each event of a build as one line of JSON.

Every line has what guestfs(3) promises under "ADVANCED MACHINE READABLE OUTPUT": ``message``, ``timestamp`` and
``type``; what more it has is in docs/machine-readable.md and docs/machine-readable.schema.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import fcntl
import json
import os
import re
import select
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from virt_dib import events, formats
from virt_dib.errors import ToolError, UsageError
from virt_dib.events import Event
from virt_dib.interrupts import shielded
from virt_dib.plain_text import one_line

VERSION = 1
"""Of the events' form. A new field or event does not change it; readers pass over what they do not know."""
STDOUT, STDERR = 1, 2

_KINDS: dict[type[Event], tuple[str, str]] = {
    events.BuildStarted: ("build-started", "message"),
    events.BuildPlanned: ("build-planned", "message"),
    events.Message: ("message", "message"),
    events.Warned: ("warning", "warning"),
    events.Debugged: ("debug", "info"),
    events.PhaseStarted: ("phase-started", "message"),
    events.PhaseFinished: ("phase-finished", "info"),
    events.ScriptStarted: ("script-started", "message"),
    events.ScriptFinished: ("script-finished", "info"),
    events.ShellOpened: ("shell-opened", "message"),
    events.ShellClosed: ("shell-closed", "info"),
    events.ArtifactMade: ("artifact-made", "info"),
    events.ErrorFound: ("error", "error"),
    events.BuildFinished: ("build-finished", "message"),
    events.BuildFailed: ("build-failed", "error"),
}
"""What each is called, and the type it has for those who know guestfs(3) alone."""
_ELSEWHERE = {"timestamp", "text"}
"""Fields that are in every line already."""


def event_json(event: Event) -> str | None:
    """*event* as a JSON object, in one line of ASCII; None for output, which is in the log."""
    if type(event) not in _KINDS:
        return None
    name, kind = _KINDS[type(event)]
    values = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    if isinstance(event, events.ScriptFinished):
        values["signal"] = event.signal
    line = {
        "message": one_line(getattr(event, "text", None) or event.line or ""),
        "timestamp": event.timestamp.isoformat(),
        "type": kind,
        "version": VERSION,
        "event": name,
        **{key: value for key, value in values.items() if key not in _ELSEWHERE},
    }
    return json.dumps(_plain(line), allow_nan=False)


def _plain(value: object) -> object:
    """*value* as JSON knows it. Text that is not Unicode, as file names may be, gets question marks."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, Path)):
        return str(value).encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return round(value, 3)
    return value.value if isinstance(value, enum.Enum) else value


def features() -> str:
    """What ``--machine-readable`` alone prints: what this virt-dib can do, a feature a line."""
    return "".join(["virt-dib\n", *(f"output:{name}\n" for name in formats.KNOWN)])


# ---- where it goes ----


@dataclass(frozen=True, slots=True)
class Target:
    """Where machine-readable output goes: a file, or else a descriptor that is open."""

    path: Path | None = None
    descriptor: int = STDOUT


def parse_target(text: str) -> Target:
    """The FORMAT of ``--machine-readable=FORMAT``.

    Raises:
        UsageError: it is not one, or names a descriptor that cannot be written to.
    """
    what = f"cannot use '{text}' as the format of --machine-readable"
    kind, _, name = text.partition(":")
    if kind == "file" and name and "\0" not in name:
        return Target(path=Path(name))
    if kind == "stream" and name in ("stdout", "stderr"):
        return Target(descriptor=STDOUT if name == "stdout" else STDERR)
    if kind != "fd" or not re.fullmatch(r"[0-9]{1,9}", name):
        raise UsageError(what, hint="give file:NAME, stream:stdout, stream:stderr, or fd:NUMBER of an open descriptor")
    descriptor = int(name)
    try:
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError as error:
        raise UsageError(f"{what}: no such descriptor is open", hint=f"open it: {name}>FILE") from error
    if access == os.O_RDONLY:
        raise UsageError(f"{what}: it is not open for writing", hint=f"open it: {name}>FILE")
    return Target(descriptor=descriptor)


@contextlib.contextmanager
def open_lines(target: Target) -> Iterator[Lines]:
    """Write to *target*; a file that is there is written anew.

    Raises:
        UsageError: it cannot be opened.
    """
    if target.path is None:
        if target.descriptor not in (STDOUT, STDERR):
            # Readers wait for its end, which programs that virt-dib starts would put off.
            fcntl.fcntl(target.descriptor, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        yield Lines(target.descriptor, f"descriptor {target.descriptor}")
        return
    try:
        descriptor = os.open(target.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UsageError(
            f"opening '{target.path}' for --machine-readable: {error.strerror}", hint="name a file you can write"
        ) from error
    try:
        yield Lines(descriptor, f"'{target.path}'")
    finally:
        os.close(descriptor)


class Lines:
    """Writes events as they come, each whole, even when a signal comes meanwhile."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self._writable = select.poll()
        self._writable.register(descriptor, select.POLLOUT)
        self._rest = b""
        self._ended = False

    def __call__(self, event: Event) -> None:
        """Write *event*, unless it is output.

        Raises:
            ToolError: the first time it cannot be written. Where only nobody reads any more, nothing is.
        """
        line = event_json(event)
        if line is not None:
            self.write(line + "\n")

    def write(self, text: str) -> None:
        """Write *text*, after what an interrupt has kept from being written before.

        Raises:
            ToolError: the host refuses it, for want of room perhaps; not where nobody reads it any more.
        """
        self._rest += text.encode()
        while self._rest and not self._ended:
            try:
                # Here it may wait, and an interrupt is let in.
                self._writable.poll()
                with shielded():
                    written = os.write(self._descriptor, self._rest[: select.PIPE_BUF])
                    self._rest = self._rest[written:]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                self._ended = True
            except OSError as error:
                self._ended = True
                raise ToolError(
                    f"writing machine-readable output to {self._name}: {error.strerror}",
                    hint="make room there, or name another place",
                ) from error
