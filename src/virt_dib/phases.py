# SPDX-License-Identifier: Apache-2.0
"""Phases and steps of a build, wherever they run: shown, timed, and turned into results or an error."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from virt_dib import environment as contract
from virt_dib import online, scripts
from virt_dib.break_points import NO_BREAKS, Breaks
from virt_dib.environment import Facts
from virt_dib.errors import ApplianceError, ScriptError
from virt_dib.interrupts import Limit, limited
from virt_dib.jobs import STATUS, Event, JobResult, Place, Runner
from virt_dib.monitor import BuildMonitor
from virt_dib.prerequisites import tools_not_found
from virt_dib.report import PhaseResult, ScriptResult
from virt_dib.shells import Shells
from virt_dib.spec import DISK_PHASES, BuildSpec, Phase, Where

GUEST_SCRIPTS = f"{contract.GUEST}/guest"
LAST_LINES = 10
"""How much of a script's output an error shows."""
_READ_LINES = 40
"""How much is searched for the reason: apt and pip try again, and say more after it."""

_KILLED = re.compile(r"\bKilled\b")
"""What bash says of a program that has got SIGKILL, as the kernel gives it when memory runs out."""
_NO_SPACE = re.compile(r"No space left on device|[Nn]ot enough (?:free )?space|[Dd]isk full")
_IMAGE_FULL_HINT = "the image is full: give it more with --size"
_INODES_HINT = "the image can have no more files: --mkfs-options '-N NUMBER' makes inodes for more"
_DRIVE_FULL_HINT = "the helper drive is full: remove files in it, or give a larger one with --drive"
_RUNNER_PATH = {"PATH": contract.SYSTEM_PATH, "LC_ALL": "C"}
_MOST_RESULTS = 10_000
"""Scripts of a phase in the report; a guest may forge any number."""
_LONGEST_NAME = 255
"""Of a file on any file system."""
_LATEST_S = 1e12


class Phases:
    """Runs the phases and steps of one build, one after the other."""

    def __init__(
        self,
        owners: Mapping[str, str],
        monitor: BuildMonitor,
        breaks: Breaks = NO_BREAKS,
        script_timeout_s: float | None = None,
    ) -> None:
        self._owners = owners
        """Of scripts, ``PHASE/NAME``, the elements they are from."""
        self._script_timeout_s = script_timeout_s
        self.monitor = monitor
        self.shells = Shells(breaks, monitor)
        self.results: list[PhaseResult] = []

    def run(self, place: Runner, phase: Phase, facts: Facts, *, also: Callable[[bytes], None] | None = None) -> None:
        """Run the scripts of *phase*, if it has any. What they print goes to the monitor, and to *also*.

        Outside the chroot there are shells at its break points also if it has none, as with DIB.

        Raises:
            ScriptError: naming the one that failed.
        """
        variables = contract.for_phase(facts, phase)
        hooks = variables["TMP_HOOKS_PATH"]
        has_scripts = place.is_directory(f"{hooks}/{phase.directory}")
        if not has_scripts and phase.where is Where.CHROOT:
            return
        self.shells.before(place, phase, facts)
        if has_scripts:
            try:
                self._run(place, phase, facts, variables, also)
            except ScriptError as error:
                self.shells.after_error(place, phase, facts, error)
                raise
        self.shells.after(place, phase, facts)

    def _run(
        self,
        place: Runner,
        phase: Phase,
        facts: Facts,
        variables: Mapping[str, str],
        also: Callable[[bytes], None] | None,
    ) -> None:
        hooks = variables["TMP_HOOKS_PATH"]
        scripts = _PhaseScripts(phase, facts, self._owners, self.monitor, self._script_timeout_s)
        if phase.where is Where.CHROOT:
            command = [f"{GUEST_SCRIPTS}/in-chroot.sh", contract.TREE, hooks, phase.directory]
            cwd = "/"
        else:
            command = [f"{GUEST_SCRIPTS}/run-phase.sh", f"{hooks}/{phase.directory}"]
            cwd = contract.working_directory(facts, phase)

        def output(data: bytes) -> None:
            self.monitor.output(data)
            if also is not None:
                also(data)

        begun = time.monotonic()
        self.monitor.begin_output()
        with limited(scripts.limit), scripts.naming():
            result = place.run(
                command,
                variables,
                cwd,
                functions=contract.functions(facts, phase),
                on_output=output,
                on_event=scripts.event,
            )
        scripts.end(result.exit_status, place.killed_hint, lambda: _full_hint(place, phase, facts))
        self._finished(phase.directory, begun, scripts.results)

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Something the runner does itself, shown and timed like a phase."""
        self.monitor.phase_started(title, ())
        begun = time.monotonic()
        yield
        self._finished(title, begun, [])

    def where(self) -> str:
        """For hints: where the output of the script or step at work is."""
        return _where(self.monitor)

    def advice(self, facts: Facts, where: Where) -> str:
        """The hint for a script that failed."""
        return _advice(self.monitor, facts, where)

    def _finished(self, title: str, begun: float, scripts: list[ScriptResult]) -> None:
        result = PhaseResult(title=title, seconds=time.monotonic() - begun, scripts=tuple(scripts))
        self.results.append(result)
        self.monitor.phase_finished(result)


def named_files(place: Place, spec: BuildSpec, verb: str) -> None:
    """Before or after the phases in *place*: "make" where files named after the image go, or "take" them from there.

    They are taken where that is not below the working directory (``DropIn.leads_away``).
    """
    if spec.drop_in is not None and (verb == "make" or spec.drop_in.leads_away):
        words = (verb, spec.drop_in.image_name, contract.OUT, contract.NAMED)
        guest_script(place, "named-files.sh", *words).check("looking after files named after the image")


def guest_script(
    place: Runner, script: str, *arguments: str, on_output: Callable[[bytes], None] | None = None
) -> JobResult:
    """Run one of our own guest scripts, outside all phases."""
    return place.run([f"{GUEST_SCRIPTS}/{script}", *arguments], _RUNNER_PATH, contract.GUEST, on_output=on_output)


class _PhaseScripts:
    """Follows the events of one phase, and turns its end into results or an error."""

    def __init__(
        self, phase: Phase, facts: Facts, owners: Mapping[str, str], monitor: BuildMonitor, timeout_s: float | None
    ) -> None:
        self.limit = Limit(timeout_s, lambda: self._too_long(timeout_s))
        """Of the script that runs."""
        self._phase = phase
        self._facts = facts
        self._owners = owners
        self._monitor = monitor
        self._listed = False
        self._running: tuple[str, float] | None = None
        self.results: list[ScriptResult] = []

    def event(self, event: Event) -> None:
        """Take one event of ``guest/run-phase.sh``."""
        words = event.words
        if any(len(word) > _LONGEST_NAME for word in words):
            return  # forged
        if event.name == "list":
            self._listed = True
            self._monitor.phase_started(self._phase.directory, words[:_MOST_RESULTS])
        elif event.name == "source" and len(words) == 1:
            self._monitor.environment_sourced(words[0])
        elif event.name == "start" and len(words) == 2:  # noqa: PLR2004 - NAME SECONDS
            self._running = (words[0], _seconds(words[1]))
            self.limit.start()
            self._monitor.script_started(words[0], self._element(words[0]))
        elif event.name == "end" and len(words) == 3 and self._running:  # noqa: PLR2004 - NAME STATUS SECONDS
            name, begun = self._running
            self._running = None
            self.limit.stop()
            status = int(words[1]) if STATUS.fullmatch(words[1]) else 1
            result = ScriptResult(
                phase=self._phase,
                name=name,
                element=self._element(name),
                exit_status=status,
                seconds=max(0.0, _seconds(words[2]) - begun),
            )
            if len(self.results) < _MOST_RESULTS or status != 0:
                self.results = [*self.results[:_MOST_RESULTS], result]
            self._monitor.script_finished(result)

    def _too_long(self, timeout_s: float | None) -> ScriptError:
        name = self._running[0] if self._running else "a script"
        element = self._element(name)
        return ScriptError(
            f"{self._phase.directory}/{name}{_of(element)} has taken longer than {timeout_s:g} s, and was ended",
            hint=f"give scripts more time with --script-timeout; {_where(self._monitor)}",
            details=self._monitor.tail(LAST_LINES),
        )

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Name the script that was running when what it runs in failed.

        Raises:
            ApplianceError: the one that it failed with, with the name.
        """
        try:
            yield
        except ApplianceError as error:
            if self._running is None:
                raise
            name = self._running[0]
            problem = error.problems[0]
            raise ApplianceError(
                f"{self._phase.directory}/{name}{_of(self._element(name))} has not ended: {problem.message}",
                hint=problem.hint,
                details=problem.details or self._monitor.tail(LAST_LINES),
            ) from error

    def _element(self, script: str) -> str | None:
        return self._owners.get(f"{self._phase.directory}/{script}")

    def end(self, exit_status: int, killed_hint: str, full_hint: Callable[[], str | None]) -> None:
        """Take the status of the whole phase.

        *killed_hint* is what to do about a program that was killed, *full_hint* gives that about one without space.

        Raises:
            ScriptError: naming the script that failed, or environment.d.
        """
        # A phase that is told only now has said already why it could not be run.
        said, where = self._monitor.tail(LAST_LINES), _where(self._monitor)
        if not self._listed:
            self._monitor.phase_started(self._phase.directory, ())
        if exit_status == 0:
            return
        failed = self.results[-1] if self.results and self.results[-1].exit_status != 0 else None
        if failed is None:
            raise ScriptError(
                f"{self._phase.directory}: its scripts could not be run, exit status {exit_status}",
                hint=f"a file in environment.d may be at fault; {where}",
                details=said,
            )
        name = f"{self._phase.directory}/{failed.name}{_of(failed.element)}"
        how = f"exit status {failed.exit_status}"
        if failed.signal_name:
            how += f" ({failed.signal_name})"
        lines = self._monitor.tail(LAST_LINES)
        killed = failed.signal_name == "SIGKILL" or any(_KILLED.search(line) for line in lines)
        known = [killed_hint] if killed else []
        if any(_NO_SPACE.search(line) for line in lines) and (found := full_hint()):
            known.append(found)
        error = ScriptError(
            f"{name} failed with {how} after {failed.seconds:.1f} s",
            hint=_advice(self._monitor, self._facts, self._phase.where, known),
            details=lines,
        )
        error.script_status = failed.exit_status
        raise error


def _of(element: str | None) -> str:
    return f" of element '{element}'" if element else ""


def _seconds(text: str) -> float:
    """The seconds that a guest tells, which may say 'nan', or what no difference can be taken of."""
    try:
        seconds = float(text)
    except ValueError:
        return 0.0
    return seconds if 0.0 <= seconds <= _LATEST_S else 0.0


def _full_hint(place: Runner, phase: Phase, facts: Facts) -> str | None:
    """What to do about a script that found no space: the file system that has none now is asked for."""
    in_image = phase in DISK_PHASES
    hints = {
        f"blocks {contract.TREE}": _IMAGE_FULL_HINT if in_image else place.full_hint,
        f"inodes {contract.TREE}": _INODES_HINT if in_image else None,
    }
    if facts.spec.drive is not None:
        hints |= {f"{kind} {contract.HOME}": _DRIVE_FULL_HINT for kind in ("blocks", "inodes")}
    # The build has an error already, and a guest that says nothing more is no other one.
    with contextlib.suppress(ApplianceError):
        said = guest_script(place, "tree.sh", "full", contract.TREE, contract.HOME).tail.splitlines()
        return next((hint for line in said if (hint := hints.get(line)) is not None), None)
    return None


def _advice(monitor: BuildMonitor, facts: Facts, where: Where, known: Sequence[str] = ()) -> str:
    """What to do about the script that failed, as far as its last output tells; and where all of that is.

    *known* is what was found out otherwise.
    """
    lines = monitor.tail(_READ_LINES)
    missing = tools_not_found(lines[-LAST_LINES:]) if where is Where.OUTSIDE else []
    found = [f"{problem.message}; {problem.hint}" for problem in missing]
    hints = (scripts.advice(lines[-LAST_LINES:]), *known, online.advice(lines, facts))
    return "; ".join([*found, *(hint for hint in hints if hint), _where(monitor)])


def _where(monitor: BuildMonitor) -> str:
    if monitor.log_path is None:
        return "all of its output is above"
    return f"all of its output is in '{monitor.log_path}' from line {monitor.line_number}"
