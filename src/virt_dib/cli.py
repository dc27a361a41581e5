# SPDX-License-Identifier: Apache-2.0
"""The command ``virt-dib``: a command line to a build, errors to messages, the exit status."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from virt_dib import configuration, tools
from virt_dib.command_line import CommandLine, parse
from virt_dib.errors import Interrupted, Problem, UsageError, VirtDibError
from virt_dib.events import Listener, to_all
from virt_dib.interrupts import interrupts
from virt_dib.machine_readable import STDERR, STDOUT, Lines, Target, features, open_lines
from virt_dib.masking import Mask
from virt_dib.monitor import Display, summary
from virt_dib.options import PROG
from virt_dib.plain_text import answer, fill_streams, one_line, printable, write_out
from virt_dib.report import BuildReport
from virt_dib.terminal import AUTOMATIC, Style
from virt_dib.translation import translated

_RED = "31;1"
_INDENT = 4
_MASK = Mask({})
"""For errors from before a build; what a build has raised, it has looked through itself."""
_MOST_PROBLEMS = 100
"""More scroll the first ones away, and a list of dependencies may hold any number."""


def report_errors(
    prog: str, body: Callable[[], int], style: Style = AUTOMATIC, *, words: Callable[[str], str] = str
) -> int:
    """Run *body* and return its exit status, or print the error that ended it and return the error's.

    *words* gives messages the words of a command whose options are not virt-dib's.
    """
    fill_streams()
    try:
        return body()
    except VirtDibError as error:
        rest = len(error.problems) - _MOST_PROBLEMS
        more = [Problem(f"{rest} more mistakes", "mend the first ones first")] if rest > 0 else []
        for problem in (*error.problems[:_MOST_PROBLEMS], *more):
            _complain(style, f"{prog}: {translated('error')}: {one_line(words(translated(problem.message)))}", _RED)
            for line in problem.details:
                write_out(sys.stderr, f"    {printable(_MASK(line))}\n")
            if problem.hint:
                _complain(style, f"{prog}: {translated('hint')}: {one_line(words(translated(problem.hint)))}", None)
        return error.exit_status
    except (Interrupted, KeyboardInterrupt):
        _complain(style, f"{prog}: {translated('interrupted')}", None)
        return Interrupted.exit_status


def _complain(style: Style, text: str, colour: str | None) -> None:
    write_out(sys.stderr, style.laid_out(printable(_MASK(text)), sys.stderr, indent=_INDENT, colour=colour) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``virt-dib`` with the arguments *argv* (those of the process) and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    command = parse(arguments)
    return report_errors(PROG, lambda: _run(command), command.options.style)


def _run(command: CommandLine) -> int:
    if command.options.answer is not None:
        answer(command.options.answer)
        return 0
    if command.options.list_elements:
        return _list_elements(command)
    if command.options.show_config:
        return _show_config(command)
    options, target = command.options, command.options.machine_readable
    # A stream with lines of JSON has nothing else.
    people = sys.stderr if target == Target(descriptor=STDOUT) else sys.stdout
    with interrupts(), contextlib.ExitStack() as stack:
        display = Display(people, quiet=options.quiet, verbose=options.verbose, style=options.style)
        listeners: list[Listener] = [stack.enter_context(display)]
        if target is not None:
            command, lines = _opened(command, target, stack)
            if lines is not None and _asks_for_features(command):
                lines.write(features())
                return 0
            listeners += [] if lines is None else [lines]
        try:
            report = _build(command, to_all(listeners))
        except (VirtDibError, Interrupted) as error:
            if target == Target(descriptor=STDERR):
                return error.exit_status
            raise
    if not options.quiet:
        write_out(people, "\n" + summary(report))
    return 0


def _opened(command: CommandLine, target: Target, stack: contextlib.ExitStack) -> tuple[CommandLine, Lines | None]:
    """Where lines of JSON go, for as long as *stack* lasts; or *command* with one problem more."""
    try:
        return command, stack.enter_context(open_lines(target))
    except UsageError as error:
        return replace(command, problems=(*command.problems, *error.problems)), None


def _asks_for_features(command: CommandLine) -> bool:
    """Whether there are no elements. What is wrong with settings from elsewhere is no matter then."""
    if command.spec.elements:
        return False
    return not command.problems or not parse(command.spec.arguments, {"VIRT_DIB_CONFIG": os.devnull}).problems


def _list_elements(command: CommandLine) -> int:
    if command.problems:
        raise UsageError.of(command.problems)
    from virt_dib import plan  # noqa: PLC0415 - as in _build

    tools.require_working_directory()
    # DIB takes any directory for an element; these are nobody's choice.
    names = [name for name in sorted(plan.find_elements(command.spec)) if not name.startswith(("_", "."))]
    answer("".join(f"{one_line(name)}\n" for name in names))
    return 0


def _show_config(command: CommandLine) -> int:
    if command.problems:
        raise UsageError.of(command.problems)
    answer(configuration.table(command.in_force, command.settings))
    return 0


def _build(command: CommandLine, listener: Listener) -> BuildReport:
    from virt_dib import api  # noqa: PLC0415 - --help and --version need none of it, and it is slow

    options = command.options
    try:
        return api.build_image(
            command.spec,
            problems=command.problems,
            options=api.RunOptions(
                isolation=options.isolation,
                kvm=options.kvm,
                trace=options.trace,
                verbose=options.verbose,
                timeout_s=options.timeout_s,
                script_timeout_s=options.script_timeout_s,
                breaks=options.breaks,
            ),
            listener=listener,
        )
    except VirtDibError as error:
        error.problems = configuration.explained(error.problems, command.in_force)
        raise
