# SPDX-License-Identifier: Apache-2.0
"""What the guest leaves for a drop-in's caller, in real directories; the guest is an archive made for the purpose."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest

from virt_dib import environment as contract
from virt_dib.appliance import Appliance
from virt_dib.outputs import open_outputs
from virt_dib.spec import BuildSpec, DropIn

LINK, DEVICE = tarfile.SYMTYPE, tarfile.CHRTYPE


class Guest:
    """Hands out archives as an appliance does, of files made up here."""

    def __init__(self, files: Mapping[str, str | bytes], named: Mapping[str, str | bytes] | None = None) -> None:
        self._content = {contract.OUT: files, contract.NAMED: named or {}}

    def archive(self, directory: str, target: Path, *, limit_bytes: int) -> None:
        assert limit_bytes > 0
        with tarfile.open(target, "w") as tar:
            for name, content in self._content[directory].items():
                member = tarfile.TarInfo(f"./{name}")
                if isinstance(content, bytes):
                    member.type, member.linkname = content, "/etc/passwd"
                    tar.addfile(member)
                else:
                    data = content.encode()
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working directory with files of the user's, and ``workspace`` beside it."""
    work = tmp_path / "work"
    (work / "sub").mkdir(parents=True)
    (tmp_path / "virt-dib-mark").mkdir()
    (work / "Makefile").write_text("mine")
    (work / "x.kernel").write_text("old")
    (work / "link").symlink_to("/etc")
    return work


def taken(
    place: Path,
    guest: Guest,
    image_name: str = "x",
    output_dir: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> tuple[dict[str, str], list[str]]:
    """The files below the working directory afterwards, and what was refused."""
    drop_in = DropIn(image_name=image_name, working_dir=place)
    directory = place if output_dir is None else output_dir
    spec = BuildSpec(
        name=Path(image_name).name,
        output_dir=directory,
        elements=("e",),
        drop_in=drop_in,
        variables=variables or {},
    )
    with open_outputs(spec, place.parent / "virt-dib-mark") as outputs:
        refused = list(outputs.add(cast("Appliance", guest)))
        artifacts = outputs.publish()
    assert all(artifact.path.is_file() for artifact in artifacts)
    files = {
        str(path.relative_to(place)): path.read_text()
        for path in sorted(place.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }
    return files, refused


def test_files_come_to_the_working_directory(place: Path) -> None:
    files, refused = taken(place, Guest({"x.initramfs": "i", "x.d/dib-manifests/m": "m", "a/b/c": "c", "an odd": "o"}))
    assert refused == []
    assert files == {
        "Makefile": "mine", "x.kernel": "old", "x.initramfs": "i", "x.d/dib-manifests/m": "m", "a/b/c": "c",
        "an odd": "o",
    }  # fmt: skip


def test_what_is_named_after_the_image_replaces(place: Path) -> None:
    (place / "x-boot.iso").write_text("old")
    files, refused = taken(place, Guest({"x.kernel": "new", "x-boot.iso": "new"}))
    assert refused == []
    assert (files["x.kernel"], files["x-boot.iso"]) == ("new", "new")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Makefile", "there is one already, which is not named after the image"),
        (".bashrc", "its name begins with a dot"),
        (".git/hooks/pre-commit", "a name on its path begins with a dot"),
        ("new/.git/config", "a name on its path begins with a dot"),
        ("sub/cron", "the directory '{place}/sub' is there already, and the file is not named after the image"),
        ("sub/new/x.kernel", "the directory '{place}/sub' is there already, and the file is not named after the image"),
        ("link/passwd", "'{place}/link' is no directory"),
        ("Makefile/inside", "'{place}/Makefile' is no directory"),
        ("sub", "a directory is in its place"),
    ],
)
def test_other_files_of_the_user_stay(place: Path, name: str, reason: str) -> None:
    before = sorted(os.listdir(place))
    files, refused = taken(place, Guest({name: "theirs", "x.new": "n"}))
    assert refused == [f"not taken over from the guest: '{place}/{name}': {reason.format(place=place)}"]
    assert files == {"Makefile": "mine", "x.kernel": "old", "x.new": "n"}
    assert sorted(os.listdir(place)) == sorted([*before, "x.new"])


def test_the_directory_that_the_user_has_given_for_manifests(place: Path) -> None:
    (place / "sub/old").write_text("old")
    guest = Guest({"sub/old": "new", "sub/dib-manifests/m": "m", "subway": "s"})
    files, refused = taken(place, guest, variables={"DIB_MANIFEST_SAVE_DIR": "./sub/"})
    assert refused == []
    assert (files["sub/old"], files["sub/dib-manifests/m"], files["subway"]) == ("new", "m", "s")


@pytest.mark.parametrize("value", ["", ".", "./", "..", "../work", "/", "sub/..", "sub/../../work"])
def test_a_directory_that_would_be_everything(place: Path, value: str) -> None:
    guest = Guest({"Makefile": "new", "sub/cron": "m", ".bashrc": "b"})
    files, refused = taken(place, guest, variables={"DIB_MANIFEST_SAVE_DIR": value})
    assert len(refused) == 3
    assert files == {"Makefile": "mine", "x.kernel": "old"}


def test_a_name_of_the_users_that_begins_with_a_dot(place: Path) -> None:
    files, refused = taken(place, Guest({".x.kernel": "k", ".x.d/.m": "m", ".y": "y"}), ".x")
    assert len(refused) == 1
    assert (files[".x.kernel"], files[".x.d/.m"]) == ("k", "m")


def test_there_are_not_more_warnings_than_people_read(place: Path) -> None:
    files, refused = taken(place, Guest({**{f"sub/{number}": "" for number in range(60)}, "x.link": LINK, "x.o": "o"}))
    assert len(refused) == 21
    assert refused[-1] == "41 more files of the guest are not taken over"
    assert set(files) == {"Makefile", "x.kernel", "x.o"}


def test_links_and_devices_are_left_out(place: Path) -> None:
    files, refused = taken(place, Guest({"x.link": LINK, "x.device": DEVICE, "x.file": "f"}))
    assert [re.sub(r".*/", "", name) for name in refused] == ["x.link", "x.device"]
    assert set(files) == {"Makefile", "x.kernel", "x.file"}


def test_a_name_with_a_directory(place: Path) -> None:
    (place / "sub/x.kernel").write_text("old")
    files, refused = taken(place, Guest({"sub/x.kernel": "new", "x.kernel": "no"}), "sub/x", place / "sub")
    assert files["sub/x.kernel"] == "new"
    assert files["x.kernel"] == "old"
    assert len(refused) == 1


def test_a_name_that_leads_away(place: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.kernel").write_text("old")
    guest = Guest({"x.kernel": "no", "other": "o"}, named={"x.kernel": "new", "x.d": "d"})
    files, refused = taken(place, guest, f"{elsewhere}/x", elsewhere)
    assert (elsewhere / "x.kernel").read_text() == "new"
    assert (elsewhere / "x.d").read_text() == "d"
    assert sorted(os.listdir(elsewhere)) == ["x.d", "x.kernel"]
    assert (files["x.kernel"], files["other"]) == ("old", "o")
    assert len(refused) == 1


def test_nothing_is_left_of_a_build_that_fails(place: Path) -> None:
    before = sorted(os.listdir(place))
    spec = BuildSpec(name="x", output_dir=place, elements=("e",), drop_in=DropIn(image_name="x", working_dir=place))

    def fail() -> None:
        with open_outputs(spec, place.parent / "virt-dib-mark") as outputs:
            outputs.add(cast("Appliance", Guest({"x.kernel": "new", "other": "o"})))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert sorted(os.listdir(place)) == before
    assert (place / "x.kernel").read_text() == "old"
