# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import os
import sys
import threading
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virt_dib.errors import ToolError
from virt_dib.plain_text import Sanitiser, answer, printable, write_out


def sanitised(*pieces: bytes) -> str:
    sanitiser = Sanitiser()
    return "".join([*map(sanitiser.feed, pieces), sanitiser.finish()])


PIECES = st.sampled_from(
    [
        b"\x1b",
        b"[",
        b"]",
        b"P",
        b"\\",
        b"\x07",
        b"\r",
        b"\n",
        b"\t",
        b"0;31",
        b"m",
        b"(",
        b"B",
        b" ",
        b"a",
        b"\x00",
    ]
    + [c.encode() for c in "\x9b\x9d\x9c\x85\u202e\u2066\u200b\u2028\ufeff\U000e0041é€😀"]
    + [b"\xe2\x82", b"\xff", b"\xc2", b"x" * 1020, b"\x1b]" + b"y" * 1025]
)
TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
MARKS = "\u200e\u200f\u061c"
STREAMS = st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=40).map(b"".join))


@given(STREAMS)
def test_no_control_character_but_newline_and_tab_comes_through(data: bytes) -> None:
    bad = [c for c in sanitised(data) if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Zl", "Zp")]
    assert bad == []


@given(STREAMS)
def test_nothing_comes_through_that_cannot_be_seen_or_turns_text_around(data: bytes) -> None:
    assert [c for c in sanitised(data) if unicodedata.bidirectional(c) in ("BN", *TURNING) or c in MARKS] == []


@given(STREAMS, st.lists(st.integers(min_value=0, max_value=2200), max_size=12))
def test_text_does_not_depend_on_how_the_bytes_were_cut(data: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut <= len(data)), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    assert sanitised(*pieces) == sanitised(data)
    assert sanitised(*(data[i : i + 1] for i in range(len(data)))) == sanitised(data)


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Cf", "Zl", "Zp"])))
def test_harmless_text_comes_through_as_it_is(text: str) -> None:
    assert sanitised(text.encode()) == text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        pytest.param(b"\x1b[1;31mred\x1b[0m\n", "red\n", id="colour"),
        pytest.param(b"\x1b]0;title\x07text", "text", id="title"),
        pytest.param(b"\x1b]8;;http://a\x1b\\link\x1b]8;;\x1b\\", "link", id="hyperlink"),
        pytest.param(b"\x1bP+q544e\x1b\\x", "x", id="device control string"),
        pytest.param(b"\x1bcgone\x1b(Bplain\x1b7", "goneplain", id="reset and character set"),
        pytest.param("\x9b2Jclear\x9d0;t\x9cx".encode(), "clearx", id="8-bit controls"),
        pytest.param(b"a\x08b\x00c\x7fd\x0ce", "abcde", id="other controls"),
        pytest.param(b"\r 1%\r 2%\r100%\r\ndone\r\n", " 1%\n 2%\n100%\ndone\n", id="progress bar"),
        pytest.param(b"one\r\r\n\r\ntwo", "one\n\ntwo", id="line ends"),
        pytest.param("a\u202eb".encode(), "ab", id="right-to-left override"),
        pytest.param(
            "Make\u200bfile \u2066a\u2069 \ufeffb \u200fc\xad\U000e0041".encode(), "Makefile a b c", id="unseen"
        ),
        pytest.param("a\u2028b\u2029c".encode(), "abc", id="other line ends"),
        pytest.param(b"\x1b]52;c;cm0gLXJmIC8=\x07x\x1b]52;c;!\x1b\\y", "xy", id="clipboard"),
        pytest.param(b"\x1b[6n\x1b[c\x1bZ\x05x", "x", id="what a terminal answers"),
        pytest.param(b"a\x1b[1;1H\x1b[2J\x1bM\x1b[?1049hb", "ab", id="cursor"),
        pytest.param(b"\x00\x1b\x00[\x0031m\xe2\x00\x80\xaee", "e", id="NULs within"),
        pytest.param(b"\xff\xfe caf\xc3\xa9", "\ufffd\ufffd café", id="not UTF-8"),
        pytest.param(b"\x1b[12", "12", id="sequence that never ends"),
        pytest.param(b"end\x1b", "end", id="escape at the end"),
        pytest.param(b"\x1b]" + b"y" * 1024 + b"\x07z", "z", id="longest string sequence"),
        pytest.param(b"\x1b]" + b"y" * 1025 + b"\x07z", "y" * 1025 + "z", id="too long for a string sequence"),
    ],
)
def test_what_becomes_of(data: bytes, text: str) -> None:
    assert sanitised(data) == text
    assert sanitised(*(data[i : i + 1] for i in range(len(data)))) == text


def test_a_string_sequence_without_end_does_not_hide_what_follows() -> None:
    sanitiser = Sanitiser()
    assert sanitiser.feed(b"\x1b]" + b"x" * 2000) == "x" * 2000
    assert sanitiser.feed(b"\nseen\n") == "\nseen\n"


def test_text_is_given_on_at_once_not_at_the_end_of_the_line() -> None:
    sanitiser = Sanitiser()
    assert sanitiser.feed(b"Password: ") == "Password: "


def test_printable_also_takes_file_names_that_are_not_utf_8() -> None:
    assert printable(os.fsdecode(b"a\xffb\x1b[1m")) == "a?b"


def test_write_out_tells_that_nobody_reads() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        assert not write_out(stream, "x")
        assert write_out(stream, "into nowhere now")


def test_an_answer_that_nobody_reads_is_no_error_and_one_without_room_is(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        answer("x")
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(ToolError, match="writing to standard output: No space left on device"):
            answer("x")


def test_a_pipe_that_does_not_block_gets_all_in_the_end() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    received = bytearray()

    def read() -> None:
        while data := os.read(reader, 4096):
            received.extend(data)
            time.sleep(0.0005)

    thread = threading.Thread(target=read)
    thread.start()
    with open(writer, "w", encoding="utf-8") as stream:
        for _ in range(50):
            assert write_out(stream, "ä" * 4000)
    thread.join()
    os.close(reader)
    assert received.decode() == "ä" * 200_000
