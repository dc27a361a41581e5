# SPDX-License-Identifier: Apache-2.0
"""What happened: the results of scripts and phases, and the files a build made."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from virt_dib.spec import Phase

_SIGNAL_BASE = 128


def signal_name(exit_status: int) -> str | None:
    """``SIGKILL`` and the like when *exit_status*, as bash counts it, is that of a signal."""
    try:
        return signal.Signals(exit_status - _SIGNAL_BASE).name
    except ValueError:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScriptResult:
    """One script that ran."""

    phase: Phase
    name: str
    element: str | None
    """The element that gave it; None for one that another script added during the build."""
    exit_status: int
    """As bash counts it: 128 + N when signal N ended the script."""
    seconds: float

    @property
    def signal_name(self) -> str | None:
        """``SIGKILL`` and the like when the status is that of a signal."""
        return signal_name(self.exit_status)


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseResult:
    """One phase, or one step of the runner between phases, that ran."""

    title: str
    """``install.d``, or the words for a step: ``copying the tree``."""
    seconds: float
    scripts: Sequence[ScriptResult] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """One file or directory a build left for the user."""

    path: Path
    format: str
    """An output format, or ``log``, ``directory`` or ``checksum``."""
    allocated_bytes: int
    """What it takes on the host's disk."""
    virtual_bytes: int | None = None
    """The size of the disk it holds, for disk images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildReport:
    """A finished build."""

    name: str
    phases: Sequence[PhaseResult]
    artifacts: Sequence[Artifact]
    seconds: float
