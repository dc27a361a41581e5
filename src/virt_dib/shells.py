# SPDX-License-Identifier: Apache-2.0
"""Shells at the break points of a build, where diskimage-builder opens them: docs/breaking-in.md."""

from __future__ import annotations

import os
import time
from pathlib import Path

from virt_dib import environment as contract
from virt_dib.break_points import AFTER_ERROR, Breaks, after, before, problems
from virt_dib.environment import Facts
from virt_dib.errors import ApplianceError, Problem, ScriptError
from virt_dib.files import temp_dir_variable
from virt_dib.interrupts import unlimited
from virt_dib.jobs import Runner
from virt_dib.machine import LONGEST_SOCKET_PATH_BYTES
from virt_dib.monitor import BuildMonitor
from virt_dib.spec import Phase, Where
from virt_dib.terminal_link import Terminal, terminal_name

_CHROOT_SHELL = f"{contract.GUEST}/guest/chroot-shell.sh"
_BESIDE = {Phase.FINALISE: Phase.PRE_FINALISE}
"""The phase whose variables a shell beside the tree has, when a script of a phase inside fails; else POST_ROOT."""


def problems_of(breaks: Breaks, socket: Path) -> list[Problem]:
    """What keeps *breaks* from being shells, with the appliance's *socket* for them."""
    if not breaks.points:
        return []
    found = problems(breaks.points, breaks.asked_by)
    missing = Terminal().missing()
    if missing is not None:
        found.append(
            Problem(
                f"{breaks.asked_by} wants a terminal, and {missing}",
                "run the command on a terminal, without a pipe or a file before or behind it",
            )
        )
    if len(os.fsencode(socket)) > LONGEST_SOCKET_PATH_BYTES:
        found.append(
            Problem(
                f"{breaks.asked_by} wants a socket, and '{socket}' is too long for the name of one",
                f"set {temp_dir_variable()} to a directory with a shorter name",
            )
        )
    return found


class Shells:
    """Opens the shells of one build."""

    def __init__(self, breaks: Breaks, monitor: BuildMonitor) -> None:
        self._breaks = breaks
        self._monitor = monitor

    def wanted_for(self, phase: Phase) -> bool:
        """Whether there is something to do for *phase* even if it has no scripts, as outside the chroot."""
        return phase.where is Where.OUTSIDE and not self._breaks.points.isdisjoint({before(phase), after(phase)})

    def before(self, place: Runner, phase: Phase, facts: Facts) -> None:
        """Open one before the scripts of *phase*, if that is wanted."""
        inside = phase.where is Where.CHROOT
        if before(phase) in self._breaks.points:
            self._open(before(phase), place, phase, facts, command=None if inside else self._breaks.command)

    def after(self, place: Runner, phase: Phase, facts: Facts) -> None:
        """Open one after the scripts of *phase*, if that is wanted."""
        if after(phase) in self._breaks.points:
            self._open(after(phase), place, phase, facts, command=None)

    def after_error(self, place: Runner, phase: Phase, facts: Facts, error: ScriptError) -> None:
        """Open one if that is wanted; *error* goes on whatever becomes of it."""
        if AFTER_ERROR not in self._breaks.points:
            return
        self._monitor.warning(error.problems[0].message)
        try:
            self._open(AFTER_ERROR, place, phase, facts, command=self._breaks.command)
        except ApplianceError as failure:
            self._monitor.warning(str(failure))

    def _open(self, point: str, place: Runner, phase: Phase, facts: Facts, *, command: str | None) -> None:
        inside = phase.where is Where.CHROOT
        if inside and point == AFTER_ERROR and self._breaks.outside_after_error:
            inside, phase = False, _BESIDE.get(phase, Phase.POST_ROOT)
        variables = contract.for_phase(facts, phase)
        cwd = contract.working_directory(facts, phase)
        words = ["/bin/bash", *(["-c", command] if command is not None else [])]
        if inside:
            cwd = "/"
            words = [_CHROOT_SHELL, contract.TREE, variables["TMP_HOOKS_PATH"], command or "exec bash"]
        self._monitor.shell_opened(point, phase.directory, inside=inside)
        begun, status = time.monotonic(), None
        try:
            with unlimited():
                status = place.shell(
                    words,
                    variables | _for_people(phase),
                    cwd,
                    functions=contract.functions(facts, phase),
                    terminal=Terminal(),
                )
        finally:
            self._monitor.shell_closed(point, status, time.monotonic() - begun)


def _for_people(phase: Phase) -> dict[str, str]:
    """Variables that make a shell one for people."""
    prompt = rf"virt-dib {phase.directory}:\W\$ "
    return {
        "TERM": terminal_name(),
        "PS1": prompt,
        # After the files that bash reads when it starts, which set a prompt of their own; and only once.
        "PROMPT_COMMAND": f"PS1='{prompt}'; unset PROMPT_COMMAND",
        # Nothing of it is to stay in the image.
        "HISTFILE": "",
    }
