# SPDX-License-Identifier: Apache-2.0
"""What a killed build has left outside of its directory: removed, or given back, when the next one starts."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from virt_dib import tools
from virt_dib.errors import ToolError
from virt_dib.files import remove_tree
from virt_dib.workspace import claimed, note_coming, note_elsewhere, open_workspace, remove_leftovers


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The directory of a build that was killed."""
    directory = tmp_path / "temporary" / "virt-dib-killed"
    directory.mkdir(parents=True)
    (directory / "lock").write_text("virt-dib\n")
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


def test_its_name_cannot_be_guessed_and_nobody_else_can_look_into_it(tmp_path: Path) -> None:
    names = set()
    before = os.umask(0)
    try:
        for _ in range(20):
            with open_workspace(tmp_path) as directory:
                assert stat.S_IMODE(directory.stat().st_mode) == 0o700
                names.add(directory.name.removeprefix("virt-dib-"))
    finally:
        os.umask(before)
    # Of a number, a time or a process most characters would be the same.
    assert [place for place in zip(*names, strict=True) if len(set(place)) < 5] == []
    assert min(map(len, names)) >= 8


def guess(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Have the next random names be these, as somebody has guessed who is right; numbers come then."""
    monkeypatch.setattr("tempfile._name_sequence", itertools.chain(names, map(str, itertools.count())))


def test_what_another_has_put_where_it_is_to_be_made_is_not_used(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tmp_path / "parent"
    (parent / ".virt-dib-directory").mkdir(parents=True)
    (parent / ".virt-dib-directory").chmod(0o777)
    (parent / ".virt-dib-link").symlink_to(out)
    (parent / ".virt-dib-dangling").symlink_to(out / "none")
    guess(monkeypatch, "directory", "link", "dangling", "free")
    with open_workspace(parent) as directory:
        assert directory == parent / "virt-dib-free"
        (directory / "file").touch()
        assert os.listdir(parent / ".virt-dib-directory") == []
    assert os.listdir(out) == []
    assert set(os.listdir(parent)) == {".virt-dib-directory", ".virt-dib-link", ".virt-dib-dangling"}


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_what_another_has_put_where_it_gets_its_name_is_not_used(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    if kind == "link":
        (parent / "virt-dib-guessed").symlink_to(out)
    else:
        (parent / "virt-dib-guessed").mkdir()
        (parent / "virt-dib-guessed" / "theirs").touch()
    guess(monkeypatch, "guessed")
    with pytest.raises(ToolError, match="making a directory for the build"), open_workspace(parent):
        pass
    assert os.listdir(parent) == ["virt-dib-guessed"]
    assert os.listdir(out) == []
    assert os.listdir(parent / "virt-dib-guessed") == ([] if kind == "link" else ["theirs"])


def test_an_empty_directory_of_that_name_gives_way_to_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "virt-dib-guessed"
    theirs.mkdir()
    theirs.chmod(0o777)
    guess(monkeypatch, "guessed")
    descriptor = os.open(theirs, os.O_RDONLY)
    try:
        with open_workspace(tmp_path) as directory:
            assert directory == theirs
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
            (directory / "file").touch()
            # Who has it open sees nothing.
            assert os.listdir(descriptor) == []
    finally:
        os.close(descriptor)


SOCKETS = "libguestfs*"


@contextlib.contextmanager
def bound(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as used:
        used.bind(str(path))
        yield


def test_a_directory_that_was_noted_as_coming_goes_and_no_other_that_its_pattern_fits(killed: Path, out: Path) -> None:
    (out / "libguestfs1").mkdir()
    note_coming(killed, out / SOCKETS, out.glob(SOCKETS))
    for name in ("libguestfs2", "libguestfs3", "libguestfs4", "other"):
        (out / name).mkdir()
    (out / "libguestfs2/file").touch()
    os.utime(out / "libguestfs3", (0, 0))
    (out / "libguestfs5").symlink_to("other")
    (out / "libguestfs6").touch()
    with bound(out / "libguestfs4/socket"):
        assert remove_leftovers(killed.parent) == [killed]
    assert set(os.listdir(out)) == {f"libguestfs{number}" for number in (1, 3, 4, 5, 6)} | {"other"}


def test_what_is_noted_by_its_name_is_not_coming_any_more(killed: Path, out: Path) -> None:
    note_coming(killed, out / SOCKETS, [])
    for name in ("libguestfs1", "libguestfs2"):
        (out / name).mkdir()
    note_elsewhere(killed, out / "libguestfs1")
    assert remove_leftovers(killed.parent) == [killed]
    assert os.listdir(out) == ["libguestfs2"]


# ---- a kill at any moment ----

KILLED_AT = """
import os, signal, sys
from pathlib import Path
from virt_dib.workspace import note_elsewhere, open_workspace, remove_leftovers

what, parent, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "open"}


def fill(directory):
    (directory / "a/b").mkdir(parents=True)
    (directory / "a/b/file").touch()
    (directory / "z").touch()
    note_elsewhere(directory, out / "partial")
    (out / "partial").mkdir()
    (out / "partial/file").touch()


def build():
    with open_workspace(parent) as directory:
        fill(directory)
        (out / "partial/file").unlink()
        (out / "partial").rmdir()


def killed():
    with open_workspace(parent) as directory:
        fill(directory)
        os.kill(os.getpid(), signal.SIGKILL)


def start(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_at(moment, work):
    left = moment

    def count(event, arguments):
        nonlocal left
        if event in EVENTS and str(arguments[0]).startswith((str(parent), str(out))):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    work()


moment, status = 0, None
while status != 0:
    if what == "tidy":
        start(killed)
    status = start(lambda: killed_at(moment, build if what == "build" else lambda: remove_leftovers(parent)))
    # Those that are not claimed have to wait.
    for bare in parent.glob(".virt-dib-*"):
        assert set(os.listdir(bare)) <= {"lock"} or not (bare / "lock").exists(), os.listdir(bare)
        os.utime(bare, (0, 0))
    remove_leftovers(parent)
    print(moment, sorted([*os.listdir(parent), *os.listdir(out)]))
    for path in (*parent.iterdir(), *out.iterdir()):
        path.rename(Path(sys.argv[4], f"{moment}-{path.name}"))
    moment += 1
"""


@pytest.mark.parametrize("what", ["build", "tidy"])
def test_the_next_start_finds_what_is_left_whenever_the_kill_comes(tmp_path: Path, out: Path, what: str) -> None:
    (tmp_path / "parent").mkdir()
    (tmp_path / "kept").mkdir()
    command: list[str | Path] = [sys.executable, "-c", KILLED_AT, what, tmp_path / "parent", out, tmp_path / "kept"]
    lines = tools.run(command, doing="killing", environment=os.environ).stdout.splitlines()
    assert len(lines) > 10
    assert [line for line in lines if not line.endswith(" []")] == []


def aged(directory: Path) -> Path:
    os.utime(directory, (0, 0))
    return directory


def test_a_directory_without_its_lock_goes_when_nobody_can_be_about_to_claim_it(tmp_path: Path) -> None:
    directories = {name: tmp_path / f".virt-dib-{name}" for name in ("new", "old", "begun", "foreign", "free", "held")}
    for directory in directories.values():
        directory.mkdir()
    (directories["begun"] / "lock2x4").touch()
    (directories["foreign"] / "file").touch()
    (directories["free"] / "lock").write_text("virt-dib\n")
    (tmp_path / ".virt-dib-link").symlink_to(directories["foreign"])
    (tmp_path / "virt-dib-empty").mkdir()
    with claimed(directories["held"]):
        for name in ("old", "begun", "foreign", "held"):
            aged(directories[name])
        aged(tmp_path / "virt-dib-empty")
        assert set(remove_leftovers(tmp_path)) == {directories["begun"], directories["free"], directories["old"]}
    assert set(os.listdir(tmp_path)) == {
        ".virt-dib-new", ".virt-dib-foreign", ".virt-dib-held", ".virt-dib-link", "virt-dib-empty"
    }  # fmt: skip
    assert os.listdir(directories["foreign"]) == ["file"]


def test_a_directory_of_the_users_that_only_has_such_names_stays(tmp_path: Path) -> None:
    for name in ("virt-dib-notes", ".virt-dib-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        (tmp_path / name / "precious").touch()
    assert remove_leftovers(tmp_path) == []
    assert len(list(tmp_path.glob("*/precious"))) == 2


def test_paths_in_it_are_for_programs_that_start_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", ".")
    monkeypatch.delenv("LIBGUESTFS_TMPDIR", raising=False)
    with open_workspace() as directory:
        assert directory.parent == tmp_path


def test_nobody_else_removes_a_directory_while_its_own_build_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def look(path: Path) -> None:
        found.append(remove_leftovers(tmp_path))
        remove_tree(path)

    monkeypatch.setattr("virt_dib.files.remove_tree", look)
    with open_workspace(tmp_path) as directory:
        (directory / "tree").mkdir()
    assert found == [[]]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("variables", "meant"),
    [
        ({"TMPDIR": "@"}, "TMPDIR"),
        ({"LIBGUESTFS_TMPDIR": "@", "TMPDIR": "/tmp"}, "LIBGUESTFS_TMPDIR"),
        ({"LIBGUESTFS_TMPDIR": "", "TMPDIR": "@"}, "TMPDIR"),
    ],
)
def test_the_hint_names_the_variable_that_counts(
    variables: dict[str, str], meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("@", str(tmp_path / "none")))
    with pytest.raises(ToolError) as caught, open_workspace():
        pass
    (problem,) = caught.value.problems
    assert problem.hint == f"set {meant} to a directory that you can write and that has space"


def test_without_a_place_for_a_directory_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ToolError, match="making a directory for the build"), open_workspace(tmp_path / "file"):
        pass
    assert os.listdir(tmp_path) == ["file"]
