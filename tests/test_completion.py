# SPDX-License-Identifier: Apache-2.0
"""Completion, asked for in real shells."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from generate import completion
from generate.completion import COMMANDS, SHELLS
from helpers import TESTS, make_element
from virt_dib import dib_command, tools
from virt_dib.options import LISTS, OFFERS, Offer

_ZSH_LIMIT_S = 120
_LIST = "\x0c"
_ASK_BASH = """\
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
"_${1//-/_}"; printf '%s\\n' "${COMPREPLY[@]}"
"""
_ASK_FISH = "source $argv[1]; complete -C $argv[2]"
_ZSH_SETUP = """\
PS1=; fpath=({directory} $fpath); autoload -Uz compinit; compinit -u -C -d {directory}/zcompdump
LISTMAX=0; setopt no_list_beep
done-line() {{ zle -I; print -r -- "=$BUFFER="; BUFFER= }}; zle -N done-line; bindkey '^Y' done-line
bindkey '^L' list-choices; print re""ady
"""


@pytest.fixture(scope="module", params=SHELLS)
def shell(request: pytest.FixtureRequest) -> str:
    if tools.find(request.param) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{request.param} is not installed")
        pytest.skip(f"{request.param} is not installed")
    return str(request.param)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shells are: with the scripts, elements, and virt-dib on the PATH."""
    here = tmp_path_factory.mktemp("completion")
    for name, command in COMMANDS.items():
        for shell in SHELLS:
            file = f"_{name}" if shell == "zsh" else f"{name}.{shell}"
            (here / file).write_text(completion.script(command, shell))
    make_element(here / "elements", "zebra-os", {"root.d/10-zebra": ""})
    make_element(here / "of-the-path", "yak-os", {"root.d/10-yak": ""})
    (here / "elephant.txt").touch()
    (here / "virt-dib").write_text(f'#!/bin/sh\nexec {sys.executable} -m virt_dib "$@"\n')
    (here / "virt-dib").chmod(0o755)
    return here


def surroundings(directory: Path) -> Mapping[str, str]:
    return {
        "PATH": f"{directory}:{os.environ['PATH']}",
        "HOME": str(directory),
        "TERM": "xterm",
        "FRUIT_OF_THE_DAY": "plum",
        "ELEMENTS_PATH": f"/nothing/here:{directory}/of-the-path",
    }


class Zsh:
    """A zsh on a terminal large enough for all it lists."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def press(self, *lines: str) -> list[str]:
        """What comes back for each of the lines, keys included, typed to a zsh at its prompt."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 500, 200, 0, 0))
        command = ["zsh", "-f", "-i"]
        environment = surroundings(self._directory)
        try:
            with tools.started(
                command, environment=environment, cwd=self._directory, stdin=theirs, stdout=theirs, stderr=theirs
            ):
                os.write(ours, _ZSH_SETUP.format(directory=self._directory).encode())
                _, rest = _read_until(ours, r"ready\r")
                answers = []
                for line in lines:
                    os.write(ours, line.encode())
                    # It shows no list while there are keys to read.
                    shown, rest = _read_until(ours, r"\n.*\S", rest) if line.endswith(_LIST) else ("", rest)
                    os.write(ours, b"\x19")
                    # The list may come once more after that; then it belongs to the next answer, or to none.
                    answer, rest = _read_until(ours, r"=virt-[^=\r\n]*(=[^=\r\n]*)?=\r", rest)
                    answers.append(shown + answer)
                return answers
        finally:
            os.close(ours)
            os.close(theirs)


def _read_until(terminal: int, pattern: str, text: str = "") -> tuple[str, str]:
    """What comes after *text*, to the end of what *pattern* is found in, and what has come after that."""
    until_s = time.monotonic() + _ZSH_LIMIT_S
    while not (found := re.search(pattern, text)):
        if not select.select([terminal], [], [], max(0.0, until_s - time.monotonic()))[0]:
            pytest.fail(f"zsh said only {text!r}")
        text += os.read(terminal, 65536).decode(errors="replace")
    return text[: found.end()], text[found.end() :]


def offered(shell: str, directory: Path, *words: str) -> Sequence[str]:
    """What bash or fish offers for the last of *words*."""
    if shell == "bash":
        split = [part for word in words for part in re.split(r"(=)", word) if part or not word]
        command: list[str | Path] = ["bash", "--norc", "-c", _ASK_BASH, "ask", directory / f"{words[0]}.bash", *split]
    else:
        command = ["fish", "--no-config", "-c", _ASK_FISH, directory / f"{words[0]}.fish", " ".join(words)]
    result = tools.run(command, doing="asking", environment=surroundings(directory), cwd=directory, check=False)
    assert result.stderr == ""
    return [line.split("\t")[0] for line in result.stdout.splitlines()]


QUESTIONS = [
    ("virt-dib --isol", "--isolation"),
    ("virt-dib --isolation sa", "sandbox"),
    ("virt-dib debian-minimal --fs-type x", "xfs"),
    ("virt-dib --formats qc", "qcow2"),
    ("virt-dib --formats qcow2,ra", "qcow2,raw"),
    ("virt-dib debian-min", "debian-minimal"),
    ("virt-dib -p ele", "elements/"),
    ("virt-dib --name elep", "elephant.txt"),
    ("virt-dib --envvar FRUIT_O", "FRUIT_OF_THE_DAY"),
    ("virt-dib -p elements zeb", "zebra-os"),
    ("virt-dib --element-path elements --exclude-element zeb", "zebra-os"),
    ("virt-disk-image-create --image-e", "--image-extra-size"),
    ("virt-disk-image-create -x -t qcow2,ra", "qcow2,raw"),
    ("virt-disk-image-create debian-min", "debian-minimal"),
    ("virt-disk-image-create -x ya", "yak-os"),
    ("virt-ramdisk-image-create --ramdisk-element dracut-ra", "dracut-ramdisk"),
    ("virt-ramdisk-image-create --logfile elep", "elephant.txt"),
    ("virt-ramdisk-image-create --image-cache ele", "elements/"),
    ("virt-diskimage-builder --stop", "--stop-on-failure"),
    ("virt-diskimage-builder --jobs 2 elep", "elephant.txt"),
    ("virt-diskimage-builder --result elep", "elephant.txt"),
    ("virt-dib-links --rem", "--remove"),
    ("virt-dib-links ele", "elements/"),
]


@pytest.mark.option("--list-elements")
def test_what_is_offered(shell: str, directory: Path) -> None:
    if shell == "zsh":
        texts = Zsh(directory).press(*(f"{line}\t" for line, _ in QUESTIONS))
        # What may come next, a value or another word of a list, has been begun.
        lines = [re.findall(r"=(virt-.*)=\r", text)[-1].rstrip(" =,") for text in texts]
        assert lines == [" ".join([*line.split()[:-1], answer]) for line, answer in QUESTIONS]
        return
    for line, answer in QUESTIONS:
        # bash adds the slash to directories itself.
        assert [word.rstrip("/") for word in offered(shell, directory, *line.split())] == [answer.rstrip("/")], line


def test_values_in_the_same_word(shell: str, directory: Path) -> None:
    if shell == "zsh":
        (text,) = Zsh(directory).press("virt-dib --isolation=sa\t")
        assert "=virt-dib --isolation=sandbox" in text
        return
    (word,) = offered(shell, directory, "virt-dib", "--isolation=sa")
    assert word.removeprefix("--isolation=") == "sandbox"


def test_a_word_of_a_list_is_offered_once(shell: str, directory: Path) -> None:
    if shell == "zsh":
        (text,) = Zsh(directory).press("virt-dib --formats qcow2,\x0c")
        assert not re.search(r"^ *qcow2\b", text, re.MULTILINE)
        return
    words = offered(shell, directory, "virt-dib", "--formats", "qcow2,")
    assert words
    assert all(word.startswith("qcow2,") and word.count("qcow2") == 1 for word in words)


@pytest.mark.parametrize("name", COMMANDS)
def test_all_options_are_offered_and_no_others(shell: str, directory: Path, name: str) -> None:
    if shell == "zsh":
        short, long = (Zsh(directory).press(f"{name} {dashes}{_LIST}")[0] for dashes in ("-", "--"))
        lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", short + long).splitlines()
        listed = {name for line in lines for name in re.findall(r"(?<!\S)--?[A-Za-z][a-z-]*", line.split(" -- ")[0])}
    elif shell == "bash":
        listed = set(offered(shell, directory, name, "-"))
    else:
        listed = {*offered(shell, directory, name, "-"), *offered(shell, directory, name, "--")}
    assert listed == set(COMMANDS[name].names)


def test_an_option_that_counts_is_offered_again(shell: str, directory: Path) -> None:
    if shell == "zsh":
        (text,) = Zsh(directory).press("virt-disk-image-create -x -\x0c")
        assert re.search(r"^-x\b", text, re.MULTILINE)
        return
    assert "-x" in offered(shell, directory, "virt-disk-image-create", "-x", "-")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_offer_is_for_an_option_that_takes_a_value(name: str) -> None:
    command = COMMANDS[name]
    # Drop-ins have the offers of virt-dib for what they share with it.
    offers = command.offers.keys() - (OFFERS.keys() if command.options is dib_command.OPTIONS else ())
    assert offers - {option.dest for option in command.values} == set()
    assert all(not isinstance(OFFERS[dest], Offer) for dest in LISTS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_scripts_pass_shellcheck(directory: Path, name: str) -> None:
    if tools.find("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    assert tools.run(["shellcheck", directory / f"{name}.bash"], doing="checking", check=False).stdout == ""


def test_the_language_of_who_builds_the_package_is_not_in_the_scripts(tmp_path: Path) -> None:
    command: list[str | Path] = [sys.executable, "-m", "generate.share", tmp_path]
    environment = {**os.environ, "LANGUAGE": "ja"}
    tools.run(command, doing="making the scripts", environment=environment, cwd=TESTS.parent)
    scripts = [path for path in tmp_path.rglob("*") if path.is_file() and "doc" not in path.parts]
    assert len(scripts) >= len(COMMANDS) * len(SHELLS)
    assert [path for path in scripts if not path.read_text().isascii() and "man" not in path.parts] == []
