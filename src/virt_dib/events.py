# SPDX-License-Identifier: Apache-2.0
"""What happens in a build, as it happens: told to a listener, and as a line for people.

Names and texts in events may hold whatever the guest said; who shows them makes them harmless first.
docs/machine-readable.md has them as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from virt_dib.report import Artifact, signal_name


def now() -> datetime:
    """With the zone of this host."""
    return datetime.now(timezone.utc).astimezone()


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """What all events have."""

    timestamp: datetime = field(default_factory=now)
    elapsed_s: float = 0.0
    """Since the build began."""

    @property
    def line(self) -> str | None:
        """What there is to say about it, for people; None for output, which speaks for itself."""
        return self._line()

    def _line(self) -> str | None:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildStarted(Event):
    """A build has been asked for; always the first event."""

    name: str
    output_dir: Path
    elements: tuple[str, ...]
    """As asked for, without those they depend on."""
    formats: tuple[str, ...]

    def _line(self) -> str:
        return f"building {self.name}: {', '.join(self.elements)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlanned(Event):
    """Everything is decided, and nothing wrong has been found."""

    elements: tuple[str, ...]
    """All of them."""
    log_path: Path
    total: int
    """How many phases and steps there will be, about."""

    def _line(self) -> str:
        return f"{len(self.elements)} elements, about {self.total} phases and steps"


@dataclass(frozen=True, kw_only=True, slots=True)
class Message(Event):
    """Something virt-dib has to say."""

    text: str

    def _line(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True, slots=True)
class Warned(Event):
    """As a message, for what the user should look at."""

    text: str

    def _line(self) -> str:
        return f"warning: {self.text}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Debugged(Event):
    """What libguestfs says when it is asked to trace its calls or to be verbose."""

    text: str

    def _line(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseStarted(Event):
    """A phase, or a step of the runner between phases, has started."""

    title: str
    """``install.d``, or the words for a step: ``copying the tree``."""
    step: bool
    number: int
    """Of phases and steps together, from 1."""
    total: int
    """As far as known; never less than *number*."""
    scripts: tuple[str, ...]
    """Those known now; more may come. A step has none."""
    log_line: int
    """Where its output begins in the log, from 1."""

    def _line(self) -> str:
        return self.title


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvironmentSourced(Event):
    """A file of environment.d is read for the scripts of the phase. Not among the machine-readable events."""

    phase: str
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ScriptStarted(Event):
    """A script of the phase has started."""

    phase: str
    name: str
    element: str | None
    """The element that gave it; None for one that another script added during the build."""
    number: int
    """Within the phase, from 1."""
    total: int
    log_line: int

    def _line(self) -> str:
        return f"{self.phase}/{self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Output(Event):
    """Some of what the script or step prints, cut anywhere. Not among the machine-readable events: the log has it."""

    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ScriptFinished(Event):
    """The script has ended, however that went."""

    phase: str
    name: str
    element: str | None
    number: int
    total: int
    exit_status: int
    """As bash counts it: 128 + N when signal N ended the script."""
    seconds: float
    log_line: int
    """Where its output begins in the log."""

    @property
    def signal(self) -> str | None:
        """``SIGKILL`` and the like when the status is that of a signal."""
        return signal_name(self.exit_status)

    def _line(self) -> str:
        how = "done" if self.exit_status == 0 else f"failed with exit status {self.exit_status}"
        if self.signal:
            how = f"{how} ({self.signal})"
        return f"{self.phase}/{self.name} {how} after {self.seconds:.1f} s"


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseFinished(Event):
    """The phase or step has ended well. One that fails ends with the build."""

    title: str
    number: int
    total: int
    seconds: float

    def _line(self) -> str:
        return f"{self.title} done after {self.seconds:.1f} s"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShellOpened(Event):
    """The build waits at a break point, and the terminal is a shell's until :class:`ShellClosed`."""

    point: str
    """``before-install``, ``after-error`` and the like."""
    phase: str
    """Whose surroundings it has."""
    inside: bool
    """In the image's tree, or else beside it."""

    def _line(self) -> str:
        where = "in the image's tree" if self.inside else "beside the image's tree"
        return f"{self.point}: a shell {where}; leave it to go on, type Enter ~ . to end the build"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShellClosed(Event):
    """The build goes on, or ends."""

    point: str
    exit_status: int | None
    """None when the build ends with the shell."""
    seconds: float

    def _line(self) -> str:
        return f"{self.point}: the shell has ended after {self.seconds:.1f} s"


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactMade(Event):
    """A file or directory for the user is complete and has its name."""

    artifact: Artifact

    def _line(self) -> str:
        return f"made {self.artifact.path}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorFound(Event):
    """One thing that is wrong; the build ends with it, and with others perhaps."""

    text: str
    hint: str | None
    details: tuple[str, ...]
    """The last output of what failed, made harmless."""

    def _line(self) -> str:
        return f"error: {self.text}"


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildFinished(Event):
    """The build has done what was asked; the last event."""

    name: str
    artifacts: tuple[Artifact, ...]
    seconds: float

    def _line(self) -> str:
        return f"built {self.name} in {self.seconds:.1f} s"


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildFailed(Event):
    """The build has ended without its files; the last event, after an :class:`ErrorFound` for each reason."""

    name: str
    interrupted: bool
    """By a signal, or because its caller cancelled it; then there is no error."""
    exit_status: int
    """What the command ends with."""
    phase: str | None
    """The phase or step at work."""
    script: str | None
    """The script at work, or the one that failed."""
    log_path: Path | None
    """None where there was no log yet."""
    log_line: int | None
    """Where the output of that script or step begins in the log."""
    seconds: float

    def _line(self) -> str:
        return "interrupted" if self.interrupted else f"building {self.name} failed after {self.seconds:.1f} s"


Listener = Callable[[Event], None]
"""Gets each event. Never called twice at once, but not always from the same thread.

What it raises ends the build.
"""


def ignore(event: Event) -> None:
    """Listen to nothing."""


def to_all(listeners: Sequence[Listener]) -> Listener:
    """A listener that tells each of *listeners*, in their order."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell


class Teller:
    """Tells the events of one build to its listener, one after the other, from any thread.

    What is raised meanwhile is raised in the thread that made the teller, now or when it has something to tell next: a
    thread of libguestfs would not pass it on.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._begun = time.monotonic()
        self._thread = threading.get_ident()
        self._raised: BaseException | None = None
        self.lock = threading.RLock()

    @property
    def elapsed_s(self) -> float:
        """Since the build began."""
        return time.monotonic() - self._begun

    def tell(self, event: Event) -> None:
        """Tell *event*, with the time."""
        with self.lock, self.raising_in_its_thread():
            if self._raised is None:
                self._listener(dataclasses.replace(event, elapsed_s=self.elapsed_s))

    @contextlib.contextmanager
    def raising_in_its_thread(self) -> Iterator[None]:
        """Keep what the block raises in another thread; raise what was kept before, in the one of the build."""
        here = threading.get_ident() == self._thread
        if here and self._raised is not None:
            raised, self._raised = self._raised, None
            raise raised
        try:
            yield
        except BaseException as error:
            if here:
                raise
            self._raised = error
