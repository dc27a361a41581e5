# SPDX-License-Identifier: Apache-2.0
"""Text that does no harm on a terminal, made of what scripts, guests and the names of files say; and how it gets out.

What they say is hostile: it may move the cursor, change what was printed, or have the terminal answer.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import re
import select
import sys
from typing import TextIO

from virt_dib.errors import ToolError

_STRING_LIMIT = 1024
_CSI = r"(?:(?<=\x1b)\[|(?<=\x9b))[0-?]{0,64}[ -/]{0,8}"
_STRING = rf"(?:(?<=\x1b)[\]PX^_]|(?<=[\x90\x98\x9d-\x9f]))[^\x07\x0a\x1b\x80-\x9f]{{0,{_STRING_LIMIT}}}"
_ESCAPE = r"(?<=\x1b)[ -/]{0,8}"
_INVISIBLE = r"\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
_CONTROL = rf"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f{_INVISIBLE}]"

_HARMFUL = re.compile(rf"{_CONTROL}(?:{_CSI}[@-~]|{_STRING}(?:\x07|\x1b\\|\x9c)|{_ESCAPE}[0-~])?")
"""Whole escape sequences (ECMA-48, 7-bit and 8-bit), other control characters, and what turns the direction of text
around or cannot be seen, so that a name looks like another. The parts of a sequence have limits, lest one that never
ends hide the rest. It begins with one set of characters, and looks back at what it was, because that makes it fast."""
_OPEN = re.compile(rf"{_CONTROL}(?:{_CSI}|{_STRING}\x1b?|{_ESCAPE})\Z")
"""What may become a whole sequence with more text. Never begins within a whole one."""
_PLAIN = bytes([*b"\t\n\r", *range(0x20, 0x7F)])
"""The bytes of text without anything harmful, or not ASCII, in it."""
_DROPPED = bytes([*range(7), *b"\x08\x0b\x0c", *range(0x0E, 0x18), 0x19, *range(0x1C, 0x20), 0x7F])
"""Control characters that neither begin nor end anything. A terminal drops most of them from a sequence too."""
_LONGEST_OPEN = _STRING_LIMIT + 8


class Sanitiser:
    """Bytes in pieces of any size to text that is safe on a terminal, as it comes.

    Tab and newline are the only control characters in it. A carriage return starts a new line, so
    that each state of a progress bar is a line. The text does not depend on how the bytes were cut,
    and no more than some thousand characters are held back.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._open = ""
        self._return = ""
        self._at_line_start = True

    def feed(self, data: bytes) -> str:
        """Return the text that *data* adds."""
        if not (self._open or self._decoder.getstate()[0] or data.translate(None, _PLAIN)):
            return self._settle(data.decode("ascii"))
        text = self._open + self._decoder.decode(data.translate(None, _DROPPED))
        found = _OPEN.search(text, max(0, len(text) - _LONGEST_OPEN))
        end = found.start() if found else len(text)
        self._open = text[end:]
        return self._settle(_HARMFUL.sub("", text[:end]))

    def _settle(self, text: str) -> str:
        """Break *text* into lines, but for a carriage return at its end that may be half of a line end."""
        text = self._return + text
        kept = text.rstrip("\r")
        self._return = text[len(kept) :][:1]
        return self._break_lines(kept)

    def finish(self) -> str:
        """Return what was held back, and be ready for another stream."""
        text = self._open + self._decoder.decode(b"", final=True)
        text = self._break_lines(self._return + _HARMFUL.sub("", text))
        self._decoder.reset()
        self._open = self._return = ""
        self._at_line_start = True
        return text

    def _break_lines(self, text: str) -> str:
        if "\r" in text:
            text = re.sub(r"\r+\n", "\n", text)
            if self._at_line_start:
                text = text.lstrip("\r")
            text = re.sub(r"\r+", "\n", re.sub(r"\n\r+", "\n", text))
        if text:
            self._at_line_start = text.endswith("\n")
        return text


def printable(text: str) -> str:
    """*text* made safe for a terminal; lines stay lines."""
    sanitiser = Sanitiser()
    return sanitiser.feed(text.encode("utf-8", "replace")) + sanitiser.finish()


def write_out(stream: TextIO, text: str) -> bool:
    """Write *text* to *stream* at once; False when nobody reads it any more.

    Characters that *stream* cannot encode become question marks. After False the stream leads
    nowhere, so that the interpreter's own flush at exit does not fail either.
    """
    return _failure(stream, text) is None


def answer(text: str) -> None:
    """Write *text*, which is all that was asked for, to standard output.

    Raises:
        ToolError: the host refuses it, for want of room perhaps; not where nobody reads it any more.
    """
    error = _failure(sys.stdout, text)
    if isinstance(error, OSError) and error.errno != errno.EPIPE:
        raise ToolError(
            f"writing to standard output: {error.strerror}", hint="make room there, or send it elsewhere"
        ) from error


def fill_streams() -> None:
    """Let standard streams that are closed lead nowhere; else the next file that is opened would be one of them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - until the process ends


def _failure(stream: TextIO, text: str) -> OSError | ValueError | None:
    try:
        _write(stream, text.encode(getattr(stream, "encoding", None) or "utf-8", "replace"))
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, stream.fileno())
            finally:
                os.close(nowhere)
        return error
    return None


def _write(stream: TextIO, data: bytes) -> None:
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        stream.write(data.decode(getattr(stream, "encoding", None) or "utf-8"))
        stream.flush()
        return
    stream.flush()
    # Past the stream, which does not know what to do when there is no room in a pipe that does not block.
    room = select.poll()
    room.register(descriptor, select.POLLOUT)
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            room.poll()


def one_line(text: str) -> str:
    """*text* made safe for a terminal, in one line."""
    return printable(text).replace("\n", " ").replace("\t", " ")
