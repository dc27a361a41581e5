# SPDX-License-Identifier: Apache-2.0
"""Where a build may be stopped for a shell: diskimage-builder's break points."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from virt_dib.errors import Problem
from virt_dib.spec import Phase

AFTER_ERROR = "after-error"


def before(phase: Phase) -> str:
    """The point before the scripts of *phase*."""
    return f"before-{_name(phase)}"


def after(phase: Phase) -> str:
    """The point after the scripts of *phase*, when all have ended well."""
    return f"after-{_name(phase)}"


def _name(phase: Phase) -> str:
    return phase.directory.removesuffix(".d")


POINTS: tuple[str, ...] = (*(point(phase) for phase in Phase for point in (before, after)), AFTER_ERROR)


CHOICE_HINT = f"choose from {', '.join(POINTS)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Breaks:
    """Where a build stops for shells, and what they are."""

    points: frozenset[str] = frozenset()
    """Of :data:`POINTS`."""
    command: str | None = None
    """What is run instead of bash, by a shell, where diskimage-builder does so: before a phase outside the chroot,
    and after an error."""
    outside_after_error: bool = False
    """The shell after an error of a script in the chroot is beside the image's tree."""
    asked_by: str = "a break point"
    """How people asked for it, for messages."""


NO_BREAKS = Breaks()


def words_in(texts: Iterable[str]) -> list[str]:
    """The points in lists that commas separate."""
    return [word for word in map(str.strip, ",".join(texts).split(",")) if word]


def problems(points: Iterable[str], asked_by: str) -> list[Problem]:
    """What is wrong with *points*."""
    found = []
    for point in dict.fromkeys(points):
        if point not in POINTS:
            meant = next(iter(difflib.get_close_matches(point, POINTS, 1)), None)
            hint = f"did you mean '{meant}'? {CHOICE_HINT}" if meant else CHOICE_HINT
            found.append(Problem(f"unknown break point '{point}' in {asked_by}", hint))
    return sorted(found, key=lambda problem: problem.message)
