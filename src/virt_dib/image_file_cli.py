# SPDX-License-Identifier: Apache-2.0
"""The command ``virt-diskimage-builder``, a drop-in for diskimage-builder's: builds the images that files describe."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from virt_dib import batch, dib_words, image_file
from virt_dib.batch import BatchReport, Limits, Status
from virt_dib.cli import report_errors
from virt_dib.errors import Interrupted, Problem, UsageError, VirtDibError
from virt_dib.image_file import KEYS, ImageRequest, Key, Kind
from virt_dib.interrupts import interrupts, shielded
from virt_dib.options import closest
from virt_dib.plain_text import one_line, write_out
from virt_dib.translation import translated
from virt_dib.usage import Parser

PROG = "virt-diskimage-builder"
_MOST_JOBS = 1000
_MOST_CPUS = 1 << 16
_MOST_MEMORY_MIB = 1 << 30
_LEAST_MEMORY_MIB = 256
_DESCRIPTION = (
    "Build the images that YAML files describe, each as virt-disk-image-create or virt-ramdisk-image-create would. A "
    "file is a list of maps, one for each image; maps with the same imagename, in all files, are one image, and one "
    "without goes on with the image before it."
)
_EPILOG = "Exit status: 0 all images are built, 1 a build failed, 2 wrong usage or a wrong file, 130 interrupted."


def main(argv: Sequence[str] | None = None, *, command: Sequence[str] = batch.COMMAND) -> int:
    """Run the command with the arguments *argv* (those of the process); return its exit status.

    *command* is what builds an image.
    """
    arguments = sys.argv[1:] if argv is None else argv
    return report_errors(PROG, lambda: _run(arguments, command), words=dib_words.of_image_files())


def build_parser() -> argparse.ArgumentParser:
    """The options, for those who compare them with the page about them, too."""
    # Without a usage argparse makes one, of which it cuts off what is 'usage: ' in English alone.
    parser = Parser(PROG, _DESCRIPTION, _EPILOG, usage=f"{PROG} {translated('[options] FILE...')}")
    parser.epilog = f"{_keys_text()}\n\n{parser.epilog}"
    parser.arguments.add_argument(
        "files", metavar="FILE", nargs="*", help=translated("files that describe images; at least one")
    )
    add = parser.options.add_argument
    add(
        "--dry-run",
        action="store_true",
        help=translated("print the commands that would build the images, and nothing else"),
    )
    add(
        "--stop-on-failure",
        action="store_true",
        help=translated("start no other build when one has failed (default: go on)"),
    )
    add(
        "--images",
        metavar="NAMES",
        action="append",
        default=[],
        help=translated("build these alone, separated by commas; may be given several times"),
    )
    add("--jobs", metavar="N", default="1", help=translated("build as many at once (default: 1)"))
    add(
        "--cpus",
        metavar="N",
        help=translated("processors for all builds together (default with --jobs: all of this host)"),
    )
    add(
        "--memory",
        metavar="MB",
        help=translated("memory for the machines of all builds together (default with --jobs: what is available)"),
    )
    add("--result", metavar="FILE", help=translated("write what became of each image to FILE, as JSON"))
    return parser


def _keys_text() -> str:
    width = max(len(key.name) for key in KEYS)
    lines = []
    for key in KEYS:
        lines.append(f"  {key.name.ljust(width)}  {translated(key.text)}")
        lines.append(f"  {' ' * width}  ({translated(_wanted(key))})")
    return "\n".join([translated("keys of an image:"), *lines])


def _wanted(key: Key) -> str:
    choices = ", ".join(key.choices)
    if not key.choices:
        return key.kind.value
    return f"a list of {choices}" if key.kind is Kind.LIST else choices


# ---- what is asked for ----


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """A command line and its files, read."""

    requests: tuple[ImageRequest, ...]
    warnings: tuple[str, ...]
    dry_run: bool
    stop_on_failure: bool
    limits: Limits
    result: Path | None


def _read(arguments: Sequence[str]) -> _Asked:
    """All that is wrong with the words, their values and the files is told together.

    Raises:
        UsageError: something is.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    given, unknown = build_parser().parse_known_intermixed_args(arguments[:end])
    names = [*given.files, *arguments[end + 1 :]]
    problems = [_unknown(word) for word in unknown]
    if "" in names:
        problems.append(Problem("cannot use an empty name for FILE", "is a shell variable unset?"))
    limits = Limits(
        jobs=_number("--jobs", given.jobs, 1, _MOST_JOBS, problems) or 1,
        cpus=_number("--cpus", given.cpus, 1, _MOST_CPUS, problems),
        memory_mib=_number("--memory", given.memory, _LEAST_MEMORY_MIB, _MOST_MEMORY_MIB, problems),
    )
    result = None if given.result is None else Path(given.result)
    if result is not None:
        problems += _result_problems(given.result)
    requests: Sequence[ImageRequest] = ()
    if not names:
        problems.append(Problem("no file named", f"name a file that describes images: {PROG} images.yaml"))
    images = image_file.look_through([Path(name) for name in names if name])
    problems += images.problems
    try:
        requests = _chosen(images.requests, given.images)
    except UsageError as error:
        # Where files are wrong, it may be in them all the same.
        problems += error.problems if not images.problems else ()
    problems += batch.problems(requests, limits, complete=not images.problems)
    if problems:
        raise UsageError.of(problems)
    return _Asked(
        requests=tuple(requests),
        warnings=images.warnings,
        dry_run=given.dry_run,
        stop_on_failure=given.stop_on_failure,
        limits=limits,
        result=result,
    )


def _unknown(word: str) -> Problem:
    name = word.partition("=")[0]
    options = [option for action in build_parser()._actions for option in action.option_strings]  # noqa: SLF001 - argparse tells them nowhere else
    meant = closest(name, options)
    return Problem(
        f"unknown option '{name}'", f"did you mean '{meant}'?" if meant else f"'{PROG} --help' lists all options"
    )


def _number(option: str, text: str | None, least: int, most: int, problems: list[Problem]) -> int | None:
    if text is None:
        return None
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= len(str(most)) else -1
    if not least <= number <= most:
        problems.append(
            Problem(f"cannot use '{text}' as the value of {option}", f"give a whole number from {least} to {most}")
        )
        return None
    return number


def _chosen(requests: Sequence[ImageRequest], lists: Sequence[str]) -> Sequence[ImageRequest]:
    """Those that ``--images`` names, or all.

    Raises:
        UsageError: a name is not there.
    """
    if not lists:
        return requests
    names = {name for text in lists for name in text.split(",")}
    known = dict.fromkeys(request.name for request in requests)
    problems = []
    for name in sorted(names - known.keys()):
        meant = closest(name, known)
        hint = f"did you mean '{meant}'?" if meant else f"there are: {', '.join(known) or 'none'}"
        problems.append(Problem(f"no image '{name}' in these files, which --images names", hint))
    if problems:
        raise UsageError.of(problems)
    return [request for request in requests if request.name in names]


def _result_problems(text: str) -> list[Problem]:
    """Hours of building are not to end with a result that cannot be written."""
    directory = os.path.dirname(text) or "."
    what = f"cannot write the result to '{text}'"
    if not os.path.basename(text) or "\0" in text or (os.path.exists(text) and not os.path.isfile(text)):
        return [Problem(f"{what}: it is no file", "give --result the name of a file")]
    if not os.path.isdir(directory):
        name = shlex.quote(directory)
        return [Problem(f"{what}: '{directory}' is not a directory", f"make it first: mkdir -p {name}")]
    if not os.access(directory, os.W_OK | os.X_OK):
        return [Problem(f"{what}: you may not write in '{directory}'", "name a file in another directory")]
    return []


# ---- what is done ----


def _run(arguments: Sequence[str], command: Sequence[str]) -> int:
    asked = _read(arguments)
    for text in asked.warnings:
        write_out(sys.stderr, f"{PROG}: {one_line(translated(f'warning: {text}'))}\n")
    if asked.dry_run:
        for request in asked.requests:
            # Where diskimage-builder prints them, too.
            write_out(sys.stderr, f"{batch.shown(request, command)}\n\n")
        return 0
    with interrupts():
        report = batch.run(asked.requests, limits=asked.limits, stop_on_failure=asked.stop_on_failure, command=command)
        with shielded():
            written = 0 if asked.result is None else _write(asked.result, report)
    if report.interrupted:
        raise Interrupted
    failures = [_failure(outcome) for outcome in report.outcomes if outcome.status is Status.FAILED]
    if failures:
        raise VirtDibError.of(failures)
    return written


def _write(path: Path, report: BatchReport) -> int:
    """Write the result; what is wrong with that does not keep the failures from being told."""

    def write() -> int:
        batch.write_result(path, report)
        return 0

    return report_errors(PROG, write)


def _failure(outcome: batch.Outcome) -> Problem:
    request = outcome.request
    hint = f"see its log, '{request.logfile}'" if request.logfile else "see what it printed above"
    return Problem(f"building '{request.name}' failed: {outcome.reason}", hint)


if __name__ == "__main__":
    sys.exit(main())
