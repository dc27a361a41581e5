# SPDX-License-Identifier: Apache-2.0
"""What comparisons with diskimage-builder have come to, as a table for people."""

from __future__ import annotations

import difflib
import pprint
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_WIDTH = 150
_MOST_LINES = 60
EQUAL, DOCUMENTED, DIFFERENT = "equal", "differs", "DIFFERS, and no page says so"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that was compared."""

    what: str
    outcome: str
    detail: str
    difference: str | None = None
    """The name of a documented difference."""


@dataclass(kw_only=True)
class Comparison:
    """One case: what was compared in it, and what came of that."""

    name: str
    command: str
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Of what differs and is not documented: how."""

    def same(self, what: str, theirs: object, ours: object, detail: str = "") -> None:
        """Note whether both are equal; if they are not, no page says so."""
        if theirs == ours:
            self.rows.append(Row(what=what, outcome=EQUAL, detail=detail))
            return
        there, here = (pprint.pformat(value, width=120).splitlines() for value in (theirs, ours))
        changed = list(difflib.unified_diff(there, here, "diskimage-builder", "virt-dib", lineterm="", n=1))
        self.rows.append(Row(what=what, outcome=DIFFERENT, detail=detail))
        self.failures.append("\n".join([f"{self.name}: {what}", *changed[:_MOST_LINES]]))

    def differs(self, what: str, difference: str, detail: Iterable[str]) -> None:
        """Note what differs as documented: *detail*, if there is any."""
        text = ", ".join(sorted(set(detail)))
        if text:
            self.rows.append(Row(what=what, outcome=DOCUMENTED, detail=text, difference=difference))


@dataclass(kw_only=True)
class Table:
    """The comparisons of a run. It is written again after each of them, for a run takes hours."""

    path: Path | None
    order: Sequence[str]
    """The names of all cases there are."""
    pages: Mapping[str, str]
    """The documented differences by their names, in the words of the page that has them."""
    done: dict[str, Comparison] = field(default_factory=dict)

    def add(self, comparison: Comparison) -> None:
        self.done[comparison.name] = comparison
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(self.text())

    def text(self) -> str:
        cases = [self.done[name] for name in self.order if name in self.done]
        numbers = self._numbers(cases)
        header = ["case", "compared", "outcome", ""]
        rows = [header, *(cells for case in cases for cells in _cells(case, numbers))]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{len(cases)} of {len(self.order)} cases", "", _line(header, widths)]
        for case in cases:
            lines += ["", *(_line(cells, widths) for cells in _cells(case, numbers))]
            lines += textwrap.wrap(case.command, _WIDTH, initial_indent="    ", subsequent_indent="      ")
        lines += ["", "Differences, as docs/drop-in.md has them:" if numbers else "No differences."]
        for difference, number in numbers.items():
            mark = f"{f'[{number}]':<5}"
            lines += textwrap.wrap(mark + self.pages[difference], _WIDTH, subsequent_indent=" " * len(mark))
        return "\n".join(lines) + "\n"

    def _numbers(self, cases: Iterable[Comparison]) -> Mapping[str, int]:
        found = {row.difference for case in cases for row in case.rows if row.difference is not None}
        return {name: number for number, name in enumerate((name for name in self.pages if name in found), 1)}


def _cells(case: Comparison, numbers: Mapping[str, int]) -> Iterable[Sequence[str]]:
    for position, row in enumerate(case.rows):
        mark = "" if row.difference is None else f" [{numbers[row.difference]}]"
        yield (case.name if position == 0 else "", row.what, row.outcome + mark, row.detail)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    before = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False))
    indent = " " * (len(before) + 2)
    room = max(_WIDTH - len(indent), 40)
    detail = textwrap.wrap(cells[-1], room, break_long_words=False, break_on_hyphens=False) or [""]
    return f"\n{indent}".join([f"{before}  {detail[0]}".rstrip(), *detail[1:]])
