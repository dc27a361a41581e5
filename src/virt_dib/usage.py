# SPDX-License-Identifier: Apache-2.0
"""The help of the commands, by argparse, in the language of who reads it and as wide as its characters are."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from virt_dib import __version__
from virt_dib.errors import UsageError
from virt_dib.plain_text import answer
from virt_dib.terminal import fold, terminal_columns
from virt_dib.translation import translated


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves the width of the terminal and of wide characters, and the words around, to the rest of virt-dib."""

    def __init__(self, prog: str) -> None:
        # argparse would have COLUMNS count on a terminal, too.
        super().__init__(prog, width=terminal_columns(sys.stdout) - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # A text that has lines already, a table, keeps them, and its columns.
        lines = []
        for line in text.split("\n"):
            column = re.match(r" *(?:(?<= )\S+ {2,})?", line)
            lines += fold(line, width - len(indent), indent=column.end() if column else 0).split("\n")
        return "\n".join(indent + line for line in lines)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return fold(text, width).split("\n")

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == "?" and action.option_strings:
            # The next word is not its value.
            return f"{', '.join(action.option_strings)}[={action.metavar}]"
        return super()._format_action_invocation(action)

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[argparse._MutuallyExclusiveGroup],
        prefix: str | None = None,
    ) -> None:
        """Begin the help; *prefix* is the word before the usage, translated unless it is given."""
        super().add_usage(usage, actions, groups, translated("usage: ") if prefix is None else prefix)


class Parser(argparse.ArgumentParser):
    """The parser of a small command: translated, and folded to the width of the terminal, with ``--help``.

    Arguments are added to its groups, since those of argparse have English titles; their help is to be translated.
    *version* is what ``--version`` prints; None: there is no such option, or another one.
    """

    def __init__(
        self, prog: str, description: str, epilog: str, *, usage: str | None = None, version: str | None = __version__
    ) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=translated(description),
            epilog=translated(epilog),
            add_help=False,
            formatter_class=HelpFormatter,
        )
        self.arguments = self.add_argument_group(translated("arguments"))
        self.options = self.add_argument_group(translated("options"))
        self.options.add_argument("-h", "--help", action="help", help=translated("print this"))
        if version is not None:
            text = translated("print the version")
            self.options.add_argument("--version", action="version", version=f"{prog} {version}", help=text)

    def _print_message(self, message: str, file: object = None) -> None:
        # Help and version, which go to standard output; argparse loses what cannot be written there.
        del file
        answer(message)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the command line as any error is.

        Raises:
            UsageError: always.
        """
        raise UsageError(message, hint=f"'{self.prog} --help' lists all options")


def named_path(text: str) -> Path:
    """A file or directory that an argument names. Without a name it would be the current directory.

    Raises:
        ArgumentTypeError: it has none.
    """
    if not text:
        raise argparse.ArgumentTypeError("cannot use an empty name; is a shell variable unset?")
    return Path(text)
