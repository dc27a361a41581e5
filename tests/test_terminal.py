# SPDX-License-Identifier: Apache-2.0
"""Colours and wrapping: where the text goes decides, or an option."""

from __future__ import annotations

import io
import os
import pty
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from on_terminal import on_terminal
from virt_dib import tools
from virt_dib.monitor import BuildMonitor, Display
from virt_dib.options import BY_NAME
from virt_dib.terminal import Style, columns_of, cut, fold, padded

RED = "\x1b[31;1m"
SPELLINGS = ["--color", "--colors", "--colour", "--colours"]
# Two mistakes; the hint of the second is longer than a line.
MISTAKES = ["--wat", "--root-label", "a b", "vm"]


def on_pipes(*arguments: str, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    """What the command writes to standard error when nothing is a terminal."""
    surroundings = {"PATH": os.environ["PATH"], "TERM": "xterm", **(environment or {})}
    command = [sys.executable, "-m", "virt_dib", *arguments]
    return tools.run(command, doing="running", environment=surroundings, cwd=cwd, check=False).stderr


def on_a_terminal(*arguments: str, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    """The same on a terminal, of which nobody has set the size."""
    ours, theirs = pty.openpty()
    try:
        surroundings = {"PATH": os.environ["PATH"], "TERM": "xterm", **(environment or {})}
        command = [sys.executable, "-m", "virt_dib", *arguments]
        with tools.started(command, environment=surroundings, cwd=cwd, stderr=theirs) as process:
            process.wait()
        return os.read(ours, 65536).decode().replace("\r\n", "\n")
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_pipe_gets_neither_colours_nor_wrapped_lines(tmp_path: Path) -> None:
    text = on_pipes(*MISTAKES, cwd=tmp_path)
    assert "\x1b" not in text
    assert all(line.startswith("virt-dib: ") for line in text.splitlines())
    assert max(map(len, text.splitlines())) > 80


@pytest.mark.option(*SPELLINGS)
@pytest.mark.parametrize("option", [*SPELLINGS, "--col"])
def test_color_is_for_pipes_too_and_stronger_than_no_color(option: str, tmp_path: Path) -> None:
    text = on_pipes(option, *MISTAKES, cwd=tmp_path, environment={"NO_COLOR": "1", "TERM": "dumb"})
    assert text.startswith(f"{RED}virt-dib: error: unknown option '--wat'\x1b[0m\nvirt-dib: hint: ")


@pytest.mark.option("--wrap")
@pytest.mark.parametrize("columns", ["", "40", "wide", "100"])
def test_wrap_is_for_pipes_too_and_as_wide_as_columns_says(columns: str, tmp_path: Path) -> None:
    text = on_pipes("--wrap", *MISTAKES, cwd=tmp_path, environment={"COLUMNS": columns})
    longest = max(map(len, text.splitlines()))
    limit = int(columns) if columns.isdecimal() else 80
    assert limit - 20 < longest <= limit
    plain = on_pipes(*MISTAKES, cwd=tmp_path)
    assert text.replace("\n    ", " ") == plain


def test_a_terminal_gets_both_unless_it_or_its_user_cannot_see_colours(tmp_path: Path) -> None:
    text = on_a_terminal(*MISTAKES, cwd=tmp_path)
    assert text.startswith(RED)
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in text.splitlines()) <= 80
    assert "\x1b" not in on_a_terminal(*MISTAKES, cwd=tmp_path, environment={"NO_COLOR": "1"})
    assert "\x1b" not in on_a_terminal(*MISTAKES, cwd=tmp_path, environment={"TERM": "dumb"})


COMMANDS = [
    "virt-dib", "virt-dib-boot-test", "virt-dib-doctor", "virt-dib-links", "virt-disk-image-create",
    "virt-diskimage-builder",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_help_is_as_wide_as_the_terminal_whatever_columns_says(command: str, tmp_path: Path) -> None:
    program: list[str | Path] = [Path(sys.executable).parent / command, "--help"]
    with on_terminal(program, cwd=tmp_path, environment={"COLUMNS": "150"}, columns=50) as running:
        assert running.ended() == 0
    lines = running.person.seen.splitlines()
    # But for options that are longer than that, and example commands.
    assert [line for line in lines if len(line) > 50 and " " in line.strip() and line.lstrip()[0] != "-"] == []
    assert max(map(len, lines)) > 40
    environment = {"PATH": os.environ["PATH"], "COLUMNS": "150"}
    wide = tools.run(program, doing="asking", environment=environment, cwd=tmp_path).stdout
    assert wide.split() == running.person.seen.split()
    assert max(map(len, wide.splitlines())) > 80


def test_the_lines_of_a_build_are_coloured_and_wrapped_and_its_log_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    style = Style(colour=True, wrap=True)
    log = tmp_path / "log"
    with Display(stream, style=style) as display:
        build_monitor = BuildMonitor(display)
        with build_monitor.logging(log):
            build_monitor.message("one two three four five six seven eight")
            build_monitor.warning("look here")
            build_monitor.output(b"what scripts say is left as it is, however long the line may be\n")
    text = re.sub(r"[0-9]\.[0-9]\]", "0.0]", stream.getvalue())
    assert text == (
        "\x1b[32m[   0.0] one two three four five six\n         seven eight\x1b[0m\n"
        "\x1b[33m[   0.0] warning: look here\x1b[0m\n"
        "what scripts say is left as it is, however long the line may be\n"
    )
    assert "\x1b" not in log.read_text()
    assert "one two three four five six seven eight\n" in log.read_text()


# ---- folding ----


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("", ""),
        ("short", "short"),
        ("- long-word-first", "- long-word-first"),
        ("one two three", "one two\n  three"),
        ("one  two three", "one  two\n  three"),
        ("/a/path/that/is/long", "/a/path/that/is/long"),
        ("see /a/path/that/is/long now", "see\n  /a/path/that/is/long\n  now"),
        ("日本語の文章", "日本語の\n  文章"),
        ("日本語文。章", "日本語\n  文。章"),
        ("日本語「文」", "日本語\n  「文」"),
        ("日本 'ab' 語", "日本 'ab'\n  語"),
        ("日本語'ab'語", "日本\n  語'ab'語"),
    ],
)
def test_folding_at_nine_columns(text: str, folded: str) -> None:
    assert fold(text, 9, indent=2) == folded


@given(st.text(st.sampled_from("ab /'日。「é"), max_size=60), st.integers(1, 30), st.integers(0, 40))
def test_folding_loses_nothing_and_keeps_to_the_width(text: str, columns: int, indent: int) -> None:
    lines = fold(text, columns, indent=indent).split("\n")
    assert "".join("".join(lines).split()) == "".join(text.split())
    for line in lines:
        # Only what cannot be broken, and could not begin further to the left, is longer.
        pieces = fold(line.lstrip(), 1).split("\n")
        assert columns_of(line.rstrip()) <= columns or columns_of("".join(pieces[:-1])) <= min(indent, columns // 2)


@pytest.mark.parametrize(
    ("text", "columns", "shown"),
    [
        ("abcdef", 6, "abcdef"), ("abcdefg", 6, "abc..."), ("日本語", 6, "日本語"), ("日本語の", 6, "日..."),
        ("日本語", 5, "日..."), ("abcdef", 3, "..."), ("abc", 2, ".."), ("abc", 0, ""), ("abc", -1, ""),
    ],
)  # fmt: skip
def test_cutting(text: str, columns: int, shown: str) -> None:
    assert cut(text, columns) == shown


def test_padding_to_columns() -> None:
    assert padded("日本", 6) == "日本  "
    assert padded("abc", 2) == "abc"


def test_columns() -> None:
    assert columns_of("abc") == 3
    assert columns_of("日本") == 4
    assert columns_of("e\u0301") == 1


# ---- what completion asks ----


@pytest.mark.option("--short-options", "--long-options")
def test_the_names_of_options_are_listed_as_the_tools_of_libguestfs_list_them(tmp_path: Path) -> None:
    def listed(option: str) -> list[str]:
        command = [sys.executable, "-m", "virt_dib", option]
        return tools.run(command, doing="asking", cwd=tmp_path).stdout.splitlines()

    short, long = listed("--short-options"), listed("--long-options")
    assert {"-B", "-p", "-m", "-q", "-u", "-V", "-v", "-x"} <= set(short)
    assert {"--color", "--element-path", "--wrap"} <= set(long)
    assert {*short, *long} == BY_NAME.keys() - {"--short-options", "--long-options"}
    assert all(len(name) == len("-x") for name in short)
    assert long == sorted(long)
