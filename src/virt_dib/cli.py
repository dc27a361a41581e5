# SPDX-License-Identifier: Apache-2.0
"""The command ``virt-dib``: a command line to a build, errors to messages, the exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from virt_dib.command_line import CommandLine, parse
from virt_dib.errors import Interrupted, UsageError, VirtDibError
from virt_dib.interrupts import interrupts
from virt_dib.monitor import BuildMonitor, printable, summary, write_out
from virt_dib.options import PROG
from virt_dib.report import BuildReport
from virt_dib.spec import BuildSpec
from virt_dib.terminal import AUTOMATIC, Style

_RED = "31;1"
_INDENT = 4


def report_errors(prog: str, body: Callable[[], int], style: Style = AUTOMATIC) -> int:
    """Run *body* and return its exit status, or print the error that ended it and return the error's."""
    try:
        return body()
    except VirtDibError as error:
        for problem in error.problems:
            _complain(style, f"{prog}: error: {problem.message}", _RED)
            for line in problem.details:
                write_out(sys.stderr, f"    {printable(line)}\n")
            if problem.hint:
                _complain(style, f"{prog}: hint: {problem.hint}", None)
        return error.exit_status
    except (Interrupted, KeyboardInterrupt):
        _complain(style, f"{prog}: interrupted", None)
        return Interrupted.exit_status


def _complain(style: Style, text: str, colour: str | None) -> None:
    write_out(sys.stderr, style.laid_out(printable(text), sys.stderr, indent=_INDENT, colour=colour) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``virt-dib`` with the arguments *argv* (those of the process) and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    command = parse(arguments)
    return report_errors(PROG, lambda: _run(command), command.options.style)


def _run(command: CommandLine) -> int:
    if command.options.answer is not None:
        write_out(sys.stdout, command.options.answer)
        return 0
    if command.options.list_elements:
        return _list_elements(command.spec)
    if not command.spec.elements:
        # Nothing to plan with, and the plan would only say so again.
        raise UsageError.of(command.problems)
    with interrupts():
        report = _build(command)
        if not command.options.quiet:
            write_out(sys.stdout, "\n" + summary(report))
    return 0


def _list_elements(spec: BuildSpec) -> int:
    from virt_dib import plan  # noqa: PLC0415 - as in _build

    # DIB takes any directory for an element; these are nobody's choice.
    names = [name for name in sorted(plan.find_elements(spec)) if not name.startswith(("_", "."))]
    write_out(sys.stdout, "".join(f"{printable(name)}\n" for name in names))
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
            style=options.style,
        ),
    )
