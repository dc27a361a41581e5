# SPDX-License-Identifier: Apache-2.0
"""What a killed build has left outside of its directory: removed, or given back, when the next one starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from virt_dib.workspace import note_elsewhere, open_workspace, remove_leftovers


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The directory of a build that was killed."""
    directory = tmp_path / "temporary" / "virt-dib-killed"
    directory.mkdir(parents=True)
    (directory / "lock").touch()
    return directory


@pytest.fixture
def out(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


def test_files_directories_and_links_go_and_others_stay(killed: Path, out: Path) -> None:
    (out / "theirs").mkdir()
    (out / "theirs" / "file").write_text("precious")
    (out / ".d.raw.x.partial").write_text("half")
    (out / ".d.d.x.partial").mkdir()
    (out / ".d.d.x.partial" / "link").symlink_to(out / "theirs")
    (out / ".d.oci.x.partial").symlink_to(out / "theirs")
    for name in (".d.raw.x.partial", ".d.d.x.partial", ".d.oci.x.partial", ".d.tar.x.partial"):
        note_elsewhere(killed, out / name)
    assert remove_leftovers(killed.parent) == [killed]
    assert os.listdir(out) == ["theirs"]
    assert (out / "theirs" / "file").read_text() == "precious"


@pytest.mark.parametrize("replacement", [None, "new"])
def test_what_was_put_aside_is_given_back_unless_there_is_something_new(
    killed: Path, out: Path, replacement: str | None
) -> None:
    (out / "d.d").mkdir()
    (out / "d.d" / "manifest").write_text("old")
    note_elsewhere(killed, out / ".d.d.x.old", name=out / "d.d")
    (out / "d.d").rename(out / ".d.d.x.old")
    if replacement is not None:
        (out / "d.d").mkdir()
        (out / "d.d" / "manifest").write_text(replacement)
    remove_leftovers(killed.parent)
    assert os.listdir(out) == ["d.d"]
    assert (out / "d.d" / "manifest").read_text() == (replacement or "old")


@pytest.mark.parametrize("damage", [b'["/nowhere', b"\xff\n", b"\n", b"[]\n", b"{}\n", b"[1]\n", b'["\\u0000"]\n'])
def test_a_note_that_is_cut_off_or_odd_is_passed_over(killed: Path, out: Path, damage: bytes) -> None:
    (out / ".d.raw.x.partial").touch()
    note_elsewhere(killed, out / ".d.raw.x.partial")
    with (killed / "elsewhere").open("ab") as stream:
        stream.write(damage)
    assert remove_leftovers(killed.parent) == [killed]
    assert os.listdir(out) == []


def test_names_that_are_no_text(killed: Path, out: Path) -> None:
    name = out / os.fsdecode(b".d\xff\n.x.partial")
    name.touch()
    note_elsewhere(killed, name)
    remove_leftovers(killed.parent)
    assert os.listdir(out) == []


def test_a_build_that_ends_on_its_own_tidies_up_itself(tmp_path: Path, out: Path) -> None:
    kept = out / ".d.raw.x.partial"
    with open_workspace(tmp_path) as directory:
        kept.touch()
        note_elsewhere(directory, kept)
    assert not directory.exists()
    assert kept.exists()
