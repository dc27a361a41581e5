# SPDX-License-Identifier: Apache-2.0
"""How lines look where people read them: colours, wrapping, and the columns that characters take."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

_DEFAULT_COLUMNS = 80
_ELLIPSIS = "..."
# As Japanese is set (JIS X 4051).
_NEVER_FIRST = frozenset("、。，．・：；？！）」』】〉》ー々…％ァィゥェォッャュョヮぁぃぅぇぉっゃゅょゎ")  # noqa: RUF001 - Japanese
_NEVER_LAST = frozenset("（「『【〈《")  # noqa: RUF001 - Japanese


@dataclass(frozen=True, slots=True)
class Style:
    """What was asked for in spite of where the text goes; by default only a terminal gets either."""

    colour: bool = False
    wrap: bool = False

    def colours(self, stream: TextIO) -> bool:
        """Whether lines on *stream* are coloured. NO_COLOR (no-color.org) does not stand against an option."""
        return self.colour or (is_terminal(stream) and not os.environ.get("NO_COLOR"))

    def laid_out(self, text: str, stream: TextIO, *, indent: int = 0, colour: str | None = None) -> str:
        """*text* as *stream* is to have it, coloured with the SGR code *colour*, without a newline at its end.

        Where lines are wrapped, all but the first begin with *indent* blanks.
        """
        if self.wrap or is_terminal(stream):
            columns = terminal_columns(stream)
            text = "\n".join(fold(line, columns, indent=indent) for line in text.split("\n"))
        return coloured(text, colour) if colour and self.colours(stream) else text


AUTOMATIC = Style()


def is_terminal(stream: TextIO) -> bool:
    """Whether *stream* is a terminal that knows escape sequences."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def coloured(text: str, code: str) -> str:
    """*text* between the escape sequences of the SGR *code*."""
    return f"\x1b[{code}m{text}\x1b[0m"


def terminal_columns(stream: TextIO | None) -> int:
    """The width of the terminal that *stream* is, else that in the variable COLUMNS, else 80. None: it is closed."""
    try:
        columns = 0 if stream is None else os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    wanted = os.environ.get("COLUMNS", "")
    return columns or (int(wanted[:6]) if wanted.isascii() and wanted.isdecimal() else 0) or _DEFAULT_COLUMNS


def columns_of(text: str) -> int:
    """How many columns of a terminal *text* takes: two for a wide character, none for one that combines."""
    return sum(2 if _is_wide(char) else not unicodedata.combining(char) for char in text)


def padded(text: str, columns: int) -> str:
    """*text* with blanks after it, so that it takes *columns*."""
    return text + " " * (columns - columns_of(text))


def cut(text: str, columns: int) -> str:
    """*text*, with an ellipsis in place of its end where it takes more than *columns*."""
    if columns_of(text) <= columns:
        return text
    while text and columns_of(text) + len(_ELLIPSIS) > columns:
        text = text[:-1]
    return (text + _ELLIPSIS)[: max(0, columns)]


def fold(text: str, columns: int, *, indent: int = 0) -> str:
    """One line as several of at most *columns*; a word that is longer, a path perhaps, stays in one piece."""
    indent = min(indent, columns // 2)
    lines, line = [], ""
    for piece in _pieces(text):
        # Nothing is won by a line that begins where this one has come to.
        if columns_of(line) > indent and columns_of(line) + columns_of(piece.rstrip()) > columns:
            lines.append(line.rstrip())
            line = " " * indent
        line += piece
    return "\n".join([*lines, line])


def _pieces(text: str) -> Iterator[str]:
    """*text*, cut where a line may end: after blanks, and beside wide characters as Japanese is set."""
    start = 0
    for position in range(1, len(text)):
        if _may_break(text[position - 1], text[position]):
            yield text[start:position]
            start = position
    yield text[start:]


def _may_break(before: str, after: str) -> bool:
    if after == " " or before in _NEVER_LAST or after in _NEVER_FIRST:
        return False
    if before == " ":
        return True
    if _is_katakana(before) and _is_katakana(after):
        return False
    # Not between a word in quotes and its quotes.
    words = all(_is_wide(char) or char.isalnum() for char in (before, after))
    return words and (_is_wide(before) or _is_wide(after))


def _is_katakana(char: str) -> bool:
    return "\u30a0" <= char <= "\u30ff"


def _is_wide(char: str) -> bool:
    return unicodedata.east_asian_width(char) in "WF"
