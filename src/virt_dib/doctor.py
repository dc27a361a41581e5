# SPDX-License-Identifier: Apache-2.0
"""The command ``virt-dib-doctor``: what a build needs on this host, and how to get what is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from virt_dib import cli, command_line, prerequisites, tools
from virt_dib.interrupts import interrupts
from virt_dib.plain_text import answer, one_line
from virt_dib.prerequisites import Check
from virt_dib.terminal import AUTOMATIC, coloured, columns_of, fold, is_terminal, padded, terminal_columns
from virt_dib.translation import translated
from virt_dib.usage import Parser

_PROG = "virt-dib-doctor"
_DESCRIPTION = "Check what virt-dib needs on this host, and say how to get what is missing."
_EPILOG = "Exit status: 0 when a build can work here, 1 when not, 2 wrong usage, 130 interrupted."
_COLOURS = {
    prerequisites.OK: "32",
    prerequisites.LACKING: "31;1",
    prerequisites.SLOW: "33",
    prerequisites.LOW: "33",
}
_OPTIONAL_COLOUR = "33"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 when a build can work here."""

    def examine() -> int:
        build_parser().parse_args(argv)
        tools.require_working_directory()
        with interrupts():
            library, python = command_line.wanted_dib()
            results = prerequisites.check_host(kvm=command_line.wanted_kvm(), dib_library=library, python=python)
        columns = terminal_columns(sys.stdout) if is_terminal(sys.stdout) else None
        answer(table(results, colour=AUTOMATIC.colours(sys.stdout), columns=columns))
        return 1 if any(check.required and not check.ok for check in results) else 0

    return cli.report_errors(_PROG, examine)


def build_parser() -> Parser:
    """For those who compare it with the manual too."""
    return Parser(_PROG, _DESCRIPTION, _EPILOG)


def table(results: Sequence[Check], *, colour: bool, columns: int | None = None) -> str:
    """One line for each check, below those that are not ok what to do, and the conclusion.

    *columns*: how wide lines may be, of which the last column may take several.
    """
    rows = [(translated(check.word), translated(check.name)) for check in results]
    words_width, names_width = (max(map(columns_of, column)) for column in zip(*rows, strict=True))
    indent = words_width + names_width + 4
    if columns is not None:
        indent = min(indent, columns // 2)
    lines = []
    for check, (word, name) in zip(results, rows, strict=True):
        begin = padded(word, words_width)
        text = _folded(f"{begin}  {padded(name, names_width)}  {one_line(translated(check.detail))}", columns, indent)
        if colour:
            code = _COLOURS[check.word] if check.required or check.ok else _OPTIONAL_COLOUR
            text = coloured(begin, code) + text.removeprefix(begin)
        lines.append(text)
        if check.hint and not check.ok:
            hint = _folded(one_line(translated(check.hint)), columns and columns - indent)
            lines += [" " * indent + line for line in hint.split("\n")]
    return "\n".join([*lines, "", _folded(_conclusion(results), columns)]) + "\n"


def _folded(text: str, columns: int | None, indent: int = 0) -> str:
    return text if columns is None else fold(text, columns, indent=indent)


def _conclusion(results: Sequence[Check]) -> str:
    failed = _names(check for check in results if check.required and not check.ok)
    if failed:
        return translated(f"a build cannot work here yet, for want of: {failed}")
    wanting = _names(check for check in results if not check.ok)
    return translated(f"a build can work here; worth a look: {wanting}" if wanting else "a build can work here")


def _names(checks: Iterable[Check]) -> str:
    return ", ".join(dict.fromkeys(translated(check.name) for check in checks))
