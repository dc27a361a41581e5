# SPDX-License-Identifier: Apache-2.0
"""The command ``virt-dib-links``: diskimage-builder's own names for the drop-in commands, in a directory."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from virt_dib.cli import report_errors
from virt_dib.errors import Problem, ToolError, UsageError
from virt_dib.plain_text import printable, write_out
from virt_dib.translation import translated
from virt_dib.usage import Parser, named_path

PROG = "virt-dib-links"
_DESCRIPTION = (
    "Put links with the names of diskimage-builder's commands into DIRECTORY, which lead to those of virt-dib. "
    "Programs that have DIRECTORY first on their PATH build with virt-dib from then on."
)
_EPILOG = (
    "Exit status: 0 all links are there, or with --remove none of them, 1 one could not be made or removed, 2 wrong "
    "usage, or one of the names is taken, and no link was made."
)
NAMES = ("disk-image-create", "ramdisk-image-create", "diskimage-builder")
"""diskimage-builder's commands; ours are called the same with ``virt-`` before."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments *argv* (those of the process) and return its exit status."""
    return report_errors(PROG, lambda: _run(argv))


def build_parser() -> Parser:
    """The options, for those who compare them with the manual too."""
    parser = Parser(PROG, _DESCRIPTION, _EPILOG)
    parser.arguments.add_argument(
        "directory", metavar="DIRECTORY", type=named_path, help=translated("made if it is not there")
    )
    parser.options.add_argument("--remove", action="store_true", help=translated("remove the links instead"))
    return parser


def _run(argv: Sequence[str] | None) -> int:
    given = build_parser().parse_args(argv)
    return _remove(given.directory) if given.remove else _make(given.directory)


def _targets() -> dict[str, Path]:
    """diskimage-builder's names, and our commands, which lie beside this one."""
    directory = Path(sys.argv[0]).absolute().parent
    commands = {name: directory / f"virt-{name}" for name in NAMES}
    missing = [str(command) for command in commands.values() if not command.exists()]
    if missing:
        raise ToolError(
            f"looking for virt-dib's commands: there is no {', '.join(missing)}",
            hint=f"run {PROG} as it was installed, by its name on the PATH or by its whole path",
        )
    return commands


def _make(directory: Path) -> int:
    commands = _targets()
    in_the_way = [name for name in NAMES if _is_strange(directory / name, commands[name])]
    if in_the_way:
        raise UsageError.of(
            Problem(
                f"cannot make the link '{directory / name}': there is something else of that name",
                "give another directory, such as one of its own for these links",
            )
            for name in in_the_way
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, command in commands.items():
            if not (directory / name).is_symlink():
                (directory / name).symlink_to(command)
    except OSError as error:
        raise ToolError(
            f"making links in '{directory}': {error.strerror}", hint="give a directory that you can write"
        ) from error
    for name, command in commands.items():
        write_out(sys.stdout, f"{printable(str(directory / name))} -> {printable(str(command))}\n")
    write_out(sys.stdout, f"to use them: export PATH={_quoted(str(directory.absolute()))}:$PATH\n")
    return 0


def _quoted(path: str) -> str:
    """*path* as a word of the shell that means it, whatever it has that cannot be shown."""
    try:
        path.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        shown = ""
    else:
        shown = printable(path)
    if shown == path:
        return shlex.quote(path)
    plain = {*map(chr, range(0x20, 0x7F))} - {"'", "\\"}
    return "$'" + "".join(chr(byte) if chr(byte) in plain else f"\\{byte:03o}" for byte in os.fsencode(path)) + "'"


def _remove(directory: Path) -> int:
    commands = _targets()
    for name, command in commands.items():
        if (directory / name).is_symlink() and not _is_strange(directory / name, command):
            try:
                (directory / name).unlink()
            except OSError as error:
                raise ToolError(
                    f"removing '{directory / name}': {error.strerror}", hint="give a directory that you can write"
                ) from error
    return 0


def _is_strange(link: Path, command: Path) -> bool:
    """Whether there is something at *link* that is no link to *command*."""
    with contextlib.suppress(OSError):
        return os.readlink(link) != str(command)
    return os.path.lexists(link)
