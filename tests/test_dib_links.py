# SPDX-License-Identifier: Apache-2.0
"""Links with diskimage-builder's names, made by the installed command."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from virt_dib import tools
from virt_dib.dib_links import NAMES, main

COMMANDS = Path(sys.executable).parent


def links(*arguments: str | Path) -> tools.Result:
    return tools.run([COMMANDS / "virt-dib-links", *arguments], doing="making links", check=False)


def test_the_links_lead_to_our_commands(tmp_path: Path) -> None:
    directory = tmp_path / "a b/links"
    for _ in range(2):
        made = links(directory)
        assert (made.exit_status, made.stderr) == (0, "")
        assert f"export PATH='{directory}':$PATH" in made.stdout
    assert sorted(os.listdir(directory)) == sorted(NAMES)
    for name in NAMES:
        assert os.readlink(directory / name) == str(COMMANDS / f"virt-{name}")


@pytest.mark.parametrize("name", NAMES)
def test_by_its_link_a_command_is_what_it_is(tmp_path: Path, name: str) -> None:
    links(tmp_path)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    said = tools.run([tmp_path / name, "--help"], doing="asking for help", environment=environment)
    assert f"virt-{name} [" in said.stdout
    assert said.stderr == ""


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / NAMES[0]).write_text("mine")
    (tmp_path / NAMES[1]).symlink_to("/nowhere")
    refused = links(tmp_path)
    assert refused.exit_status == 2
    assert refused.stderr.count("error: cannot make the link") == 2
    assert sorted(os.listdir(tmp_path)) == sorted(NAMES[:2])
    assert links("--remove", tmp_path).exit_status == 0
    assert ((tmp_path / NAMES[0]).read_text(), os.readlink(tmp_path / NAMES[1])) == ("mine", "/nowhere")


def test_links_are_removed(tmp_path: Path) -> None:
    links(tmp_path)
    (tmp_path / "other").touch()
    assert links("--remove", tmp_path).exit_status == 0
    assert os.listdir(tmp_path) == ["other"]


@pytest.mark.parametrize("name", [b"\xff1", b"it's\\ \x1b[31m\xff$x\xff", "日本 $x".encode(), b"two\nlines"])
def test_what_is_said_of_the_path_is_what_a_shell_needs(tmp_path: Path, name: bytes) -> None:
    directory = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
    said = links(directory).stdout.partition("to use them: ")[2]
    script = f"{said}\nprintf '%s' \"${{PATH%%:*}}\" | od -An -v -tx1"
    shown = tools.run(["bash", "-c", script], doing="asking the shell").stdout
    assert bytes.fromhex("".join(shown.split())) == os.fsencode(directory)
    assert "\x1b" not in said


def test_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = links(tmp_path / "file")
    assert refused.exit_status == 1
    assert f"error: making links in '{tmp_path}/file'" in refused.stderr


def test_no_directory_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "virt-dib-links: error: the following arguments are required: DIRECTORY",
        "virt-dib-links: hint: 'virt-dib-links --help' lists all options",
    ]
