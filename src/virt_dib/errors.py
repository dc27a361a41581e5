# SPDX-License-Identifier: Apache-2.0
"""The errors users see. Any other exception is a bug in virt-dib and keeps its traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from virt_dib.files import temp_dir_variable


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and what to do about it."""

    message: str
    """Lower-case clause without a full stop: what was being done, to what, why it failed."""
    hint: str | None = None
    """What to do next, in the same form."""
    details: tuple[str, ...] = ()
    """Lines shown between the two: the last output of what failed, made harmless."""


def no_space_on_host(disk: Path) -> Problem:
    """For what grows as it is written, the file *disk* of a build."""
    return Problem(
        f"writing the disks of the build in '{disk.parent}': no space left on the host",
        f"free some space there, or set {temp_dir_variable()} to a directory with more",
    )


class VirtDibError(Exception):
    """Something the user can act on.

    Carries one problem or, where several were found in one input, all of them. The front end
    prints each with its hint and exits with ``exit_status``.
    """

    exit_status = 1

    def __init__(self, message: str, *, hint: str | None = None, details: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems: tuple[Problem, ...] = (Problem(message, hint, details),)

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> VirtDibError:
        """One error of this class that carries all *problems* (at least one)."""
        found = tuple(problems)
        error = cls("; ".join(problem.message for problem in found))
        error.problems = found
        return error

    def rewrite(self, change: Callable[[str], str]) -> None:
        """Put what *change* makes of them in place of all texts."""
        self.problems = tuple(
            replace(
                problem,
                message=change(problem.message),
                hint=None if problem.hint is None else change(problem.hint),
                details=tuple(map(change, problem.details)),
            )
            for problem in self.problems
        )
        self.args = ("; ".join(problem.message for problem in self.problems),)


class UsageError(VirtDibError):
    """What was asked for cannot be: an option, a value, an element name, a combination."""

    exit_status = 2


class ElementError(VirtDibError):
    """The elements themselves are at fault: unreadable, or two with the same hook."""


class PrerequisiteError(VirtDibError):
    """Something a build needs is missing on this host."""


class ToolError(VirtDibError):
    """A program on the host failed."""


class ApplianceError(VirtDibError):
    """The appliance did not start, died, or refused a request."""


class ScriptError(VirtDibError):
    """A script of an element failed."""

    script_status = 1
    """Its exit status as bash counts it, where it is known."""


class Interrupted(BaseException):
    """The build was asked to stop by SIGINT, SIGTERM or SIGHUP.

    Not an ``Exception``, so that no handler of errors takes it for one.
    """

    exit_status = 130


def reason_of(error: OSError) -> str:
    """What the host says, with the file if it says which."""
    reason = error.strerror or str(error)
    return reason if error.filename is None else f"{reason}: '{error.filename}'"
