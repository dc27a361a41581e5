# SPDX-License-Identifier: Apache-2.0
"""The command ``virt-dib``: a command line to a build, errors to messages, the exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from virt_dib.command_line import CommandLine, parse
from virt_dib.errors import Interrupted, UsageError, VirtDibError
from virt_dib.interrupts import interrupts
from virt_dib.monitor import BuildMonitor, coloured, printable, summary, wants_colour, write_out
from virt_dib.options import PROG
from virt_dib.report import BuildReport

_RED = "31;1"


def report_errors(prog: str, body: Callable[[], int]) -> int:
    """Run *body* and return its exit status, or print the error that ended it and return the error's."""
    try:
        return body()
    except VirtDibError as error:
        for problem in error.problems:
            _complain(prog, "error", problem.message, _RED)
            for line in problem.details:
                write_out(sys.stderr, f"    {printable(line)}\n")
            if problem.hint:
                _complain(prog, "hint", problem.hint, None)
        return error.exit_status
    except (Interrupted, KeyboardInterrupt):
        _complain(prog, "interrupted", "", None)
        return Interrupted.exit_status


def _complain(prog: str, kind: str, text: str, colour: str | None) -> None:
    line = f"{prog}: {kind}: {printable(text)}" if text else f"{prog}: {kind}"
    if colour and wants_colour(sys.stderr):
        line = coloured(line, colour)
    write_out(sys.stderr, line + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``virt-dib`` with the arguments *argv* (those of the process) and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    return report_errors(PROG, lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> int:
    command = parse(arguments)
    if command.options.answer is not None:
        write_out(sys.stdout, command.options.answer)
        return 0
    if not command.spec.elements:
        # Nothing to plan with, and the plan would only say so again.
        raise UsageError.of(command.problems)
    with interrupts():
        report = _build(command)
        if not command.options.quiet:
            write_out(sys.stdout, "\n" + summary(report))
    return 0


def _build(command: CommandLine) -> BuildReport:
    from virt_dib import builder  # noqa: PLC0415 - --help and --version need none of it, and it is slow

    options = command.options
    return builder.build_image(
        command.spec,
        problems=command.problems,
        options=builder.RunOptions(
            isolation=options.isolation, kvm=options.kvm, trace=options.trace or options.verbose
        ),
        open_monitor=lambda log_path, total_phases: BuildMonitor(
            log_path=log_path,
            stream=sys.stdout,
            quiet=options.quiet,
            verbose=options.verbose,
            total_phases=total_phases,
        ),
    )
