#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""List the failure branches of the code and the tests that reach each: failure_branches.py DIRECTORY.

Each ``except`` clause, and each place where the code says that something is wrong, is a branch. DIRECTORY has what
was measured with coverage.ini while tests ran; see ``make failure-branches``. The exit status is 1 if there is a
branch that no test has reached.

What runs in a guest is not seen.
"""

from __future__ import annotations

import ast
import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coverage import CoverageData
from coverage.exceptions import CoverageException

from generate import catalogue
from test_troubleshooting import FAULTS

_TEST = re.compile(r"(?P<module>test_\w+)(?:\.py::|\.)(?P<name>\w+(?:::\w+)?)")
_MOST_NAMES = 2
UNSEEN = {
    # test_dib.py has them; their Python has no site directory, and so no coverage.
    ("dib.py", "looking for the diskimage-builder behind '{command}': '{python}' cannot import {PACKAGE}"),
    ("dib.py", "looking for the diskimage-builder behind '{command}': it does not name the Python it runs with"),
}
"""Branches that are no fault of the tests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """A place that runs only when something is wrong."""

    line: int
    lines: range
    """Those of its statement, or of the body of its clause."""
    text: str


def branches(path: Path) -> list[Branch]:
    """The branches of a module, in the order of their lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return sorted([*_clauses(tree), *_messages(path, tree)], key=lambda branch: (branch.line, branch.text))


def _clauses(tree: ast.Module) -> Iterator[Branch]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kind = "" if node.type is None else f" {ast.unparse(node.type)}"
            yield Branch(line=node.lineno, lines=_lines(node.body[0], node.body[-1]), text=f"except{kind}")


def _messages(path: Path, tree: ast.Module) -> Iterator[Branch]:
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    for line, text in catalogue.messages(path, FAULTS):
        around = [node for node in statements if line in _lines(node, node)]
        inner = min(around, key=lambda node: len(_lines(node, node)))
        yield Branch(line=line, lines=_lines(inner, inner), text=text)


def _lines(first: ast.stmt, last: ast.stmt) -> range:
    return range(first.lineno, (last.end_lineno or last.lineno) + 1)


def measured(directory: Path) -> CoverageData:
    """All that was measured."""
    data = CoverageData(basename=str(directory / "all"))
    data.erase()
    for path in directory.glob("data.*"):
        part = CoverageData(basename=str(path))
        # That of a process which was killed while it wrote is damaged.
        with contextlib.suppress(CoverageException):
            part.read()
            data.update(part)
    return data


def reaching(data: CoverageData, path: Path, branch: Branch) -> tuple[bool, set[str]]:
    """Whether *branch* was reached, and the tests that have, where that is known."""
    contexts = data.contexts_by_lineno(str(path))
    found = [context for line in branch.lines for context in contexts.get(line, ())]
    tests = {f"{match['module']}::{match['name']}" for text in found for match in _TEST.finditer(text)}
    return bool(found), tests


def _named(tests: set[str]) -> str:
    more = len(tests) - _MOST_NAMES
    return ", ".join(sorted(tests)[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def main() -> int:
    """Print the list, then what no test reaches."""
    data = measured(Path(sys.argv[1]))
    missed = []
    count = 0
    for path in sorted(catalogue.PACKAGE_DIR.glob("*.py")):
        for branch in branches(path):
            reached, tests = reaching(data, path, branch)
            line = f"{path.name}:{branch.line}: {branch.text}"
            print(f"{line}\n    {_named(tests) or ('while modules are loaded' if reached else 'NO TEST')}")
            count += 1
            if not reached and (path.name, branch.text) not in UNSEEN:
                missed.append(line)
    print(f"\n{count} branches, {len(missed)} of them without a test", *missed, sep="\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
