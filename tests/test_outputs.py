# SPDX-License-Identifier: Apache-2.0
"""What the guest leaves for a drop-in's caller, in real directories; the guest is an archive made for the purpose."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import re
import signal
import tarfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import cast

import pytest

from virt_dib import environment as contract
from virt_dib import formats
from virt_dib import outputs as outputs_module
from virt_dib.appliance import Appliance
from virt_dib.errors import Interrupted, Problem, ToolError
from virt_dib.files import copy_content, remove_tree
from virt_dib.interrupts import interrupts
from virt_dib.outputs import Outputs, _in_the_way, _refusal, longest_name, open_outputs
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
    meanwhile: Callable[[], object] = lambda: None,
) -> tuple[dict[str, str], list[str]]:
    """The files below the working directory afterwards, and what was refused.

    *meanwhile* is what the user does during the build.
    """
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
        outputs.add(cast("Appliance", guest))
        refused = list(outputs.not_taken())
        meanwhile()
        artifacts = outputs.publish()
        refused += outputs.not_taken()
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
    long = "x-".ljust(255, "l")
    for name in ("x-boot.iso", long):
        (place / name).write_text("old")
    files, refused = taken(place, Guest({"x.kernel": "new", "x-boot.iso": "new", long: "new"}))
    assert refused == []
    assert (files["x.kernel"], files["x-boot.iso"], files[long]) == ("new", "new", "new")


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


def test_those_are_counted_that_are_no_files_either(place: Path) -> None:
    files = {f"sub/{number}": "" for number in range(25)}
    _, refused = taken(place, Guest({**files, **{f"x.{number}": LINK for number in range(30)}}))
    assert len(refused) == 21
    assert refused[-1] == "35 more files of the guest are not taken over"


@pytest.mark.parametrize("kind", ["a directory", "files"])
def test_directories_deeper_than_python_goes(place: Path, kind: str) -> None:
    drop_in = DropIn(image_name="x", working_dir=place) if kind == "files" else None
    spec = BuildSpec(name="x", output_dir=place, elements=("e",), drop_in=drop_in)
    name = "x.deep/" + "d/" * 1500 + "x"
    with open_outputs(spec, place.parent / "virt-dib-mark") as outputs:
        outputs.add(cast("Appliance", Guest({name: "deep"})))
        (artifact,) = outputs.publish()
    assert outputs.not_taken() == []
    assert artifact.allocated_bytes == 4096
    path = place / name if kind == "files" else place / "x.d" / name
    assert path.read_text() == "deep"
    # Deeper than pytest's own cleaning goes, too.
    remove_tree(place)


# ---- what the user does meanwhile ----


@pytest.mark.parametrize(
    ("name", "there", "reason"),
    [
        ("other", "other", "there is one already, which is not named after the image"),
        ("a/other", "a/other", "the directory '{place}/a' is there already, and the file is not named after the image"),
        ("a/other", "a", "'{place}/a' is no directory"),
        ("x.o", "x.o/", "a directory is in its place"),
        ("x.d/o", "x.d", "'{place}/x.d' is no directory"),
        ("x.d/o", "x.d@", "'{place}/x.d' is no directory"),
    ],
)
def test_what_has_come_during_the_build_stays(place: Path, name: str, there: str, reason: str) -> None:
    def meanwhile() -> None:
        path = place / there.rstrip("/@")
        path.parent.mkdir(exist_ok=True)
        if there.endswith("/"):
            path.mkdir()
        elif there.endswith("@"):
            path.symlink_to(place / "sub")
        else:
            path.write_text("mine")

    files, refused = taken(place, Guest({name: "theirs", "x.new": "n", "b/1": "1", "b/2": "2"}), meanwhile=meanwhile)
    assert refused == [f"not taken over from the guest: '{place}/{name}': {reason.format(place=place)}"]
    mine = {there: "mine"} if there[-1] not in "/@" else {}
    assert files == {"Makefile": "mine", "x.kernel": "old", "x.new": "n", "b/1": "1", "b/2": "2", **mine}
    assert list((place / "sub").iterdir()) == []
    assert [path for path in place.iterdir() if path.name.startswith(".")] == []


def test_what_is_named_after_the_image_replaces_what_has_come_during_the_build(place: Path) -> None:
    files, refused = taken(place, Guest({"x.o": "new"}), meanwhile=lambda: (place / "x.o").write_text("meanwhile"))
    assert refused == []
    assert files["x.o"] == "new"


BUILT = BuildSpec(name="x", output_dir=Path(), elements=("e",), checksums=("md5",))


def published(
    place: Path,
    meanwhile: Callable[[], object],
    outputs_wanted: Sequence[str] = ("raw",),
    docker_target: str | None = None,
) -> None:
    """A build of a raw image with a checksum and of ``x.d``, over earlier ones."""
    for earlier in ("x.raw", "x.raw.md5", "x.d/file"):
        (place / earlier).parent.mkdir(exist_ok=True)
        (place / earlier).write_text("earlier")
    disk = place.parent / "disk"
    disk.write_bytes(bytes(1 << 20))
    built = dataclasses.replace(BUILT, output_dir=place, docker_target=docker_target)
    with open_outputs(built, place.parent / "virt-dib-mark") as outputs:
        outputs.add(cast("Appliance", Guest({"file": "new"})))
        outputs.convert(formats.select(outputs_wanted), formats.Sources(disk=disk, archive=disk))
        outputs.sum()
        meanwhile()
        outputs.publish()


def replace_by(path: Path, kind: str) -> None:
    remove_tree(path)
    path.unlink(missing_ok=True)
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(path.parent / "sub")
    else:
        path.write_text("mine")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("x.raw", "directory", "cannot write '{place}/x.raw': a directory is in its place"),
        ("x.raw.md5", "directory", "cannot write '{place}/x.raw.md5': a directory is in its place"),
        ("x.d", "file", "cannot write the directory '{place}/x.d': a file or link is in its place"),
        ("x.d", "link", "cannot write the directory '{place}/x.d': a file or link is in its place"),
    ],
)
def test_what_cannot_be_replaced_is_an_error_and_earlier_files_stay(
    place: Path, name: str, kind: str, message: str
) -> None:
    with pytest.raises(ToolError) as caught:
        published(place, lambda: replace_by(place / name, kind))
    assert str(caught.value) == message.format(place=place)
    assert caught.value.problems[0].hint == "move it away, and build again"
    assert {path.name for path in place.iterdir()} == {
        "Makefile",
        "link",
        "sub",
        "x.kernel",
        "x.d",
        "x.raw",
        "x.raw.md5",
    }
    for earlier in ("x.raw", "x.raw.md5", "x.d/file"):
        if not earlier.startswith(name) or (name == "x.raw" and earlier != name):
            assert (place / earlier).read_text() == "earlier"


def test_all_is_replaced_where_nothing_is_in_the_way(place: Path) -> None:
    published(place, lambda: None)
    assert (place / "x.d/file").read_text() == "new"
    assert (place / "x.raw").stat().st_size == 1 << 20
    assert (place / "x.raw.md5").read_text().endswith("  x.raw\n")


def test_what_comes_at_the_last_moment_is_an_error_too(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the engine for containers gives the image its name there, after all places have been looked at."""
    docker = tmp_path / "bin/docker"
    docker.parent.mkdir()
    docker.write_text(
        f"#!/bin/sh\ncase $1 in import) echo {'0' * 64};; tag) rm '{place}/x.raw'; mkdir '{place}/x.raw';; esac\n"
    )
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{docker.parent}:{os.environ['PATH']}")
    with pytest.raises(ToolError, match=rf"^cannot write '{place}/x\.raw': a directory is in its place$") as caught:
        published(place, lambda: None, ["raw", "docker"], docker_target="a:1")
    assert caught.value.problems[0].hint == "move it away, and build again"
    assert (place / "x.d/file").read_text() == "earlier"
    assert [path for path in place.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("command", ["virt-dib", "a drop-in"])
def test_the_longest_name_is_one_that_no_file_needs_a_longer_one_for(place: Path, command: str) -> None:
    drop_in = DropIn(image_name="x", working_dir=place) if command == "a drop-in" else None
    disk = place.parent / "disk"
    disk.write_bytes(bytes(1 << 20))
    images, sums = ["x.raw"], ["x.raw.md5"]
    short = dataclasses.replace(BUILT, output_dir=place, drop_in=drop_in)
    most = 255 - len(longest_name(short, [*images, *sums], images)) + len("x")

    def build(name: str) -> None:
        for ending in ("raw", "raw.md5", "raw.sha256"):
            (place / f"{name}.{ending}").write_text("earlier")
        built = dataclasses.replace(short, name=name)
        with open_outputs(built, place.parent / "virt-dib-mark") as outputs:
            outputs.add(cast("Appliance", Guest({"x" * 255: "new"})))
            outputs.convert(formats.select(["raw"]), formats.Sources(disk=disk, archive=None))
            outputs.sum()
            outputs.publish()

    build("x" * most)
    assert (place / f"{'x' * most}.raw.md5").read_text() != "earlier"
    with pytest.raises(OSError, match="File name too long"):
        build("x" * (most + 1))


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], None]:
    """Has something of a kind come to the place of an output after the last look at it."""

    def come(path: Path, kind: str) -> None:
        def look(output: outputs_module._Pending) -> Problem | None:
            found = _in_the_way(output)
            if output.final == path:
                replace_by(path, kind)
            return found

        monkeypatch.setattr(outputs_module, "_in_the_way", look)

    return come


def state(directory: Path) -> dict[str, tuple[int, str | None]]:
    """All that is below, and which files those are."""
    return {
        str(path.relative_to(directory)): (
            path.lstat().st_ino,
            path.read_text() if path.is_file() and not path.is_symlink() else None,
        )
        for path in directory.rglob("*")
    }


@pytest.mark.parametrize("file_system", ["with links", "without links"])
@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("x.raw.md5", "directory", "Is a directory"),
        ("x.raw", "directory", "Is a directory"),
        ("x.d", "file", "Not a directory"),
        ("x.d", "link", "Not a directory"),
    ],
)
def test_what_comes_after_the_last_look_is_an_error_and_earlier_files_come_back(
    place: Path,
    late: Callable[[Path, str], None],
    monkeypatch: pytest.MonkeyPatch,
    file_system: str,
    name: str,
    kind: str,
    reason: str,
) -> None:
    def link(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    if file_system == "without links":
        monkeypatch.setattr(os, "link", link)
    late(place / name, kind)
    before: dict[str, tuple[int, str | None]] = {}
    with pytest.raises(ToolError, match=rf"^cannot write '{place}/{name}': {reason}$") as caught:
        published(place, lambda: before.update(state(place)))
    assert caught.value.problems[0].hint == "move it away, and build again"
    after = state(place)
    others = {path for path in before if Path(path).parts[0] != name and not path.startswith(".")}
    assert {path: after[path] for path in others} == {path: before[path] for path in others}
    assert after.keys() - others == {name}
    there = place / name
    assert (there.is_symlink(), there.is_file()) == (kind == "link", kind == "file")


def test_files_that_the_guest_and_drop_ins_have_named_come_back_too(
    place: Path, late: Callable[[Path, str], None]
) -> None:
    for earlier in ("x.raw", "x.raw.md5"):
        (place / earlier).write_text("earlier")
    before = state(place)
    disk = place.parent / "disk"
    disk.write_bytes(bytes(1 << 20))
    built = dataclasses.replace(BUILT, output_dir=place, drop_in=DropIn(image_name="x", working_dir=place))
    late(place / "x.tgz", "directory")
    outputs = Outputs(built, place.parent / "virt-dib-mark")
    outputs.add(cast("Appliance", Guest({"x.kernel": "new", "a/b/other": "o", "other": "o"})))
    outputs.convert(formats.select(["raw", "tgz"]), formats.Sources(disk=disk, archive=disk))
    outputs.sum()
    with pytest.raises(ToolError, match=rf"^cannot write '{place}/x\.tgz': Is a directory$"):
        outputs.publish()
    outputs.discard()
    assert outputs.renamed == []
    (place / "x.tgz").rmdir()
    assert state(place) == before


def test_what_comes_after_the_last_look_is_not_replaced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = place / "other"
    looked: list[str] = []
    before = sorted(os.listdir(place))

    def look(output: outputs_module._Chosen, made: Collection[Path]) -> str | None:
        reason = look_really(output, made)
        looked.append(output.name)
        if len(looked) > 1:
            other.write_text("mine")
        return reason

    look_really = _refusal
    monkeypatch.setattr(outputs_module, "_refusal", look)
    with pytest.raises(ToolError, match=rf"^cannot write '{other}': File exists$"):
        taken(place, Guest({"other": "theirs"}))
    assert other.read_text() == "mine"
    assert sorted(os.listdir(place)) == sorted([*before, "other"])


# ---- builds that fail ----


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


def signal_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have a signal come while a function of the module works."""
    really = getattr(outputs_module, name)

    def work(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return really(*arguments)

    monkeypatch.setattr(outputs_module, name, work)


@pytest.mark.parametrize("at", ["_link_or_rename", "remove_any", "remove_tree"])
def test_a_signal_is_too_late_while_files_get_their_names(
    place: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    signal_at(monkeypatch, at)
    with interrupts():
        published(place, lambda: None)
    assert (place / "x.d/file").read_text() == "new"
    assert (place / "x.raw").stat().st_size == 1 << 20
    assert [path for path in place.iterdir() if path.name.startswith(".")] == []


def engine(place: Path, monkeypatch: pytest.MonkeyPatch, removing: str) -> None:
    """A docker that does *removing* before it removes an image."""
    docker = place.parent / "bin/docker"
    docker.parent.mkdir()
    docker.write_text(f"#!/bin/sh\ncase $1 in import) echo {'0' * 64};; rmi) {removing};; esac\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{docker.parent}:{os.environ['PATH']}")


@pytest.mark.parametrize("error", [KeyError, Interrupted])
def test_nothing_is_left_where_the_engine_has_gone(
    place: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    engine(place, monkeypatch, "")

    def fail() -> None:
        (place.parent / "bin/docker").unlink()
        raise error

    with pytest.raises(error):
        published(place, fail, ["raw", "docker"], docker_target="a:1")
    assert [path for path in place.iterdir() if path.name.startswith(".")] == []


def test_nothing_is_left_where_a_signal_comes_while_the_engine_removes_the_image(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine(place, monkeypatch, f"kill -TERM {os.getpid()}; sleep 60")

    def fail() -> None:
        raise KeyError

    with interrupts(), pytest.raises(Interrupted):
        published(place, fail, ["raw", "docker"], docker_target="a:1")
    assert [path for path in place.iterdir() if path.name.startswith(".")] == []


def test_a_signal_while_a_disk_is_kept_leaves_no_half(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = place.parent / "disk"
    disk.write_bytes(b"disk" * 1024)
    before = sorted(os.listdir(place))

    def rename(_path: Path, _target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def copy(reader: int, writer: int) -> None:
        copy_content(reader, writer)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(outputs_module, "copy_content", copy)
    spec = dataclasses.replace(BUILT, output_dir=place, delete_on_failure=False)
    with (
        interrupts(),
        pytest.raises(Interrupted),
        open_outputs(spec, place.parent / "virt-dib-mark") as outputs,
    ):
        outputs.keep(disk, "raw")
    assert sorted(os.listdir(place)) == before
    assert disk.stat().st_size == 4096


def test_a_disk_that_is_kept_replaces_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(_path: Path, _target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(outputs_module, "partial_name", ".{}.mark.partial".format)
    (tmp_path / "disk").touch()
    (place / ".x.raw.mark.partial").write_text("mine")
    outputs = Outputs(dataclasses.replace(BUILT, output_dir=place), tmp_path / "virt-dib-mark")
    with pytest.raises(FileExistsError):
        outputs.keep(tmp_path / "disk", "raw")
    assert (place / ".x.raw.mark.partial").read_text() == "mine"
