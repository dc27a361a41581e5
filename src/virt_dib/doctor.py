# SPDX-License-Identifier: Apache-2.0
"""The command ``virt-dib-doctor``: what a build needs on this host, and how to get what is missing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from virt_dib import cli, command_line, prerequisites
from virt_dib.interrupts import interrupts
from virt_dib.monitor import printable, write_out
from virt_dib.prerequisites import Check
from virt_dib.terminal import AUTOMATIC, coloured

_PROG = "virt-dib-doctor"
_COLOURS = {
    prerequisites.OK: "32",
    prerequisites.MISSING: "31;1",
    prerequisites.SLOW: "33",
    prerequisites.LOW: "33",
}
_OPTIONAL_COLOUR = "33"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 when a build can work here."""
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description="Check what virt-dib needs on this host, and say how to get what is missing.",
        epilog="Exit status: 0 when a build can work here, 1 when not, 2 wrong usage, 130 interrupted.",
    )
    parser.parse_args(argv)

    def examine() -> int:
        with interrupts():
            results = prerequisites.check_host(kvm=command_line.wanted_kvm())
        write_out(sys.stdout, table(results, colour=AUTOMATIC.colours(sys.stdout)))
        return 1 if any(check.required and not check.ok for check in results) else 0

    return cli.report_errors(_PROG, examine)


def table(results: Sequence[Check], *, colour: bool) -> str:
    """One line for each check, below those that are not ok what to do, and the conclusion."""
    words_width = max(len(check.word) for check in results)
    names_width = max(len(check.name) for check in results)
    lines = []
    for check in results:
        word = check.word.ljust(words_width)
        if colour:
            word = coloured(word, _COLOURS[check.word] if check.required or check.ok else _OPTIONAL_COLOUR)
        lines.append(f"{word}  {check.name.ljust(names_width)}  {printable(check.detail)}")
        if check.hint and not check.ok:
            lines.append(" " * (words_width + names_width + 4) + printable(check.hint))
    return "\n".join([*lines, "", _conclusion(results)]) + "\n"


def _conclusion(results: Sequence[Check]) -> str:
    failed = [check.name for check in results if check.required and not check.ok]
    if failed:
        return f"a build cannot work here yet, for want of: {', '.join(failed)}"
    wanting = dict.fromkeys(check.name for check in results if not check.ok)
    return "a build can work here" + (f"; worth a look: {', '.join(wanting)}" if wanting else "")
