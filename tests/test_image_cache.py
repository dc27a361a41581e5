# SPDX-License-Identifier: Apache-2.0
"""The image cache: a build gets a copy of it, and what it caches comes back whole, or not at all."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import fcntl
import http.server
import io
import os
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from helpers import ISOLATIONS, TESTS, Run, make_element, make_tiny_os, skip_without, virt_dib
from test_staging import as_ordinary_user, run_python
from virt_dib import environment as contract
from virt_dib import image_cache, layout, tools, unpacking
from virt_dib.errors import ApplianceError, ScriptError, ToolError, UsageError
from virt_dib.image_cache import ImageCache, Received
from virt_dib.monitor import BuildMonitor
from virt_dib.phases import Phases
from virt_dib.plan import make_plan
from virt_dib.sandbox import Settings, open_sandbox
from virt_dib.spec import BuildSpec
from virt_dib.tree_stage import make_tree

DATE_S = 1_500_000_000


class Build:
    """A build's part in it, without the build: its copy, and the guest's script run here."""

    def __init__(self, cache: Path, workspace: Path) -> None:
        self.cache = ImageCache(cache, workspace)
        self.copy = workspace / "guest"
        self._workspace = workspace
        self.copy.mkdir(parents=True)
        self.cache.copy_to(self.copy)
        self._script("mark")

    def _script(self, use: str, *arguments: Path) -> None:
        script = layout.guest_script("image-cache.py")
        command: list[str | Path] = [
            sys.executable,
            "-I",
            "-S",
            script,
            use,
            self.copy,
            self._workspace / "record",
            *arguments,
        ]
        tools.run(command, doing="running the script")

    def end(self) -> Received:
        """What comes back."""
        gathered = self._workspace / "gathered"
        self._script("gather", gathered)
        tools.run(["tar", "-C", gathered, "-cf", self.cache.archive, "."], doing="running tar")
        return self.cache.receive()

    def sent(self) -> set[str]:
        """The files whose content came back."""
        new = self._workspace / "gathered/new"
        return {path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file()}


def swap_in(cache: Path, swap: str) -> None:
    """What another user can do with ``entry/inner/key`` of a cache."""
    inner, key = cache / "entry/inner", cache / "entry/inner/key"
    if swap == "a directory for a link":
        inner.rename(cache.parent / "aside")
        inner.symlink_to(cache.parent / "private")
        return
    key.unlink()
    if swap == "a file for a link":
        key.symlink_to(cache.parent / "private/key")
    elif swap == "a file for a FIFO":
        os.mkfifo(key)
    else:
        key.write_text("other")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A cache that others can write to, beside a directory that they cannot read."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private/key").write_text("secret")
    cache = tmp_path / "cache"
    (cache / "entry/inner").mkdir(parents=True)
    (cache / "entry/inner/key").write_text("harmless")
    (cache / "other").write_text("content")
    return cache


def swap_after_the_look(monkeypatch: pytest.MonkeyPatch, shared: Path, swap: str) -> None:
    look = image_cache._states  # noqa: SLF001 - the moment after it

    def look_and_swap(directory: Path, name: str) -> Iterator[tuple[str, image_cache._Signature]]:
        yield from list(look(directory, name))
        if name == "entry":
            swap_in(shared, swap)

    monkeypatch.setattr(image_cache, "_states", look_and_swap)


@pytest.mark.parametrize("swap", ["a directory for a link", "a file for a link", "a file for a FIFO"])
def test_what_another_user_swaps_while_it_is_copied(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: str
) -> None:
    """Between the look at a file and its copy."""
    swap_after_the_look(monkeypatch, shared, swap)
    copied = ImageCache(shared, tmp_path)
    copied.copy_to(tmp_path / "copy")
    files = {path.name: path.read_text() for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert files == {"other": "content"}


def refuse(*_arguments: object, **_more: object) -> None:
    """Make no hard link, as some file systems."""
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize(
    ("swap", "hard_links"),
    [
        ("a directory for a link", True),
        ("a directory for a link", False),
        ("a file for a link", True),
        ("a file for a FIFO", True),
        ("a file for another", True),
        ("a file for another", False),
    ],
)
def test_what_another_user_swaps_while_the_build_ends(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: str, *, hard_links: bool
) -> None:
    """Between the look whether an entry is as the build got it, and the taking over of its unchanged files."""
    build = Build(shared, tmp_path / "first")
    (build.copy / "entry/new").write_text("new")
    with monkeypatch.context() as changed:
        swap_after_the_look(changed, shared, swap)
        if not hard_links:
            changed.setattr(os, "link", refuse)
        assert build.end() == Received(entries=(), refused=("entry",), left_out=())
    assert not {"secret", "new"} & set(content(Build(shared, tmp_path / "second").copy).values())


def test_unchanged_files_are_copied_where_they_cannot_be_linked(
    cache: Path, start: Callable[[], Build], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = start()
    (build.copy / "git/HEAD").write_text("two")
    monkeypatch.setattr(os, "link", refuse)
    assert build.end().entries == ("git",)
    assert content(cache) == {**BEFORE, "git/HEAD": "two"}
    assert (cache / "git/objects/aa").stat().st_mtime == DATE_S


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with a file, and an entry of several."""
    directory = tmp_path / "cache"
    for name, text in {"image": "one", "git/HEAD": "main", "git/refs/old": "1", "git/objects/aa": "content"}.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        os.utime(path, (DATE_S, DATE_S))
    return directory


@pytest.fixture
def start(cache: Path, tmp_path: Path) -> Callable[[], Build]:
    numbers = iter(range(100))
    return lambda: Build(cache, tmp_path / f"build-{next(numbers)}")


def content(directory: Path) -> dict[str, str]:
    """Files with their texts, links with their targets."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or path.is_file():
            found[path.relative_to(directory).as_posix()] = (
                f"-> {path.readlink()}" if path.is_symlink() else path.read_text()
            )
    return found


BEFORE = {"git/HEAD": "main", "git/objects/aa": "content", "git/refs/old": "1", "image": "one"}


def test_a_build_that_only_reads_gives_nothing_back(cache: Path, start: Callable[[], Build]) -> None:
    build = start()
    assert content(build.copy) == BEFORE
    assert (build.copy / "image").stat().st_mtime == DATE_S
    assert build.end() == Received(entries=(), refused=(), left_out=())
    assert content(cache) == BEFORE


def test_a_directory_that_is_not_there_is_made(tmp_path: Path) -> None:
    build = Build(tmp_path / "new/cache", tmp_path / "build")
    (build.copy / "image").write_text("one")
    assert build.end().entries == ("image",)
    assert content(tmp_path / "new/cache") == {"image": "one"}


def test_changed_entries_are_as_the_build_left_them(cache: Path, start: Callable[[], Build]) -> None:
    build = start()
    unchanged = (cache / "git/objects/aa").stat()
    (build.copy / "git/refs/old").unlink()
    (build.copy / "git/packed-refs").write_text("old 1")
    (build.copy / "git/link").symlink_to("refs/../HEAD")
    (build.copy / "git/link").unlink()
    (build.copy / "git/objects/link").symlink_to("../HEAD")
    script = build.copy / "git/hook"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o6755)
    os.utime(script, (DATE_S, DATE_S))
    assert build.end() == Received(entries=("git",), refused=(), left_out=())
    assert content(cache) == {
        "git/HEAD": "main", "git/hook": "#!/bin/sh\n", "git/objects/aa": "content", "git/objects/link": "-> ../HEAD",
        "git/packed-refs": "old 1", "image": "one",
    }  # fmt: skip
    state = (cache / "git/hook").stat()
    assert (state.st_mode & 0o7700, state.st_mtime) == (0o700, DATE_S)
    # Only what is new has been carried about.
    assert build.sent() == {"git/hook", "git/packed-refs"}
    assert (cache / "git/objects/aa").stat().st_ino == unchanged.st_ino
    assert {path.name for path in cache.iterdir()} == {"git", "image"}


def test_a_file_may_become_a_directory_and_the_other_way_round(cache: Path, start: Callable[[], Build]) -> None:
    build = start()
    (build.copy / "image").unlink()
    (build.copy / "image").mkdir()
    (build.copy / "image/part").write_text("two")
    tools.run(["rm", "-r", build.copy / "git"], doing="removing")
    (build.copy / "git").write_text("three")
    assert build.end().entries == ("git", "image")
    assert content(cache) == {"git": "three", "image/part": "two"}


def test_an_entry_that_the_build_has_removed_stays(cache: Path, start: Callable[[], Build]) -> None:
    build = start()
    (build.copy / "image").unlink()
    assert build.end().entries == ()
    assert content(cache) == BEFORE


@pytest.mark.parametrize("full", ["the copy", "the cache"])
def test_a_host_that_refuses_to_write_is_told_whatever_it_says(cache: Path, tmp_path: Path, full: str) -> None:
    (cache / "large").write_bytes(bytes(64 << 10))
    if full == "the cache":
        shutil.rmtree(cache)
        cache.symlink_to("/proc/sys/none")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, limits[1]))
    try:
        with pytest.raises(ToolError) as caught:
            ImageCache(cache, tmp_path).copy_to(tmp_path / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # Of a file that is open already the host does not say which it is.
    reason = "File too large" if full == "the copy" else f"File exists: '{cache}'"
    assert str(caught.value) == f"copying the image cache '{cache}' for the build: {reason}"
    assert "--image-cache" in str(caught.value.problems[0].hint)


def test_the_next_build_gets_what_the_last_one_cached(start: Callable[[], Build]) -> None:
    build = start()
    (build.copy / "image").write_text("two")
    build.end()
    assert content(start().copy) == {**BEFORE, "image": "two"}


# ---- others at work ----


def test_two_builds_at_a_time_keep_what_both_have_cached(cache: Path, start: Callable[[], Build]) -> None:
    first, second = start(), start()
    (first.copy / "first").write_text("1")
    (second.copy / "second").write_text("2")
    assert (first.end().entries, second.end().entries) == (("first",), ("second",))
    assert content(cache) == {**BEFORE, "first": "1", "second": "2"}


def test_of_two_builds_that_change_an_entry_the_first_one_wins(cache: Path, start: Callable[[], Build]) -> None:
    first, second = start(), start()
    (first.copy / "git/HEAD").write_text("first")
    (second.copy / "git/objects/bb").write_text("of the second")
    (second.copy / "image").write_text("of the second")
    assert first.end().entries == ("git",)
    assert second.end() == Received(entries=("image",), refused=("git",), left_out=())
    assert content(cache) == {**BEFORE, "git/HEAD": "first", "image": "of the second"}


def is_waited_for(directory: Path) -> bool:
    """Whether somebody waits for the lock of *directory*, by proc_locks(5)."""
    number = f":{directory.stat().st_ino} "
    return any(" -> " in line and number in line for line in Path("/proc/locks").read_text().splitlines())


@pytest.mark.parametrize("since", ["before", "it has unpacked"])
def test_it_waits_for_another_build_that_is_writing(
    cache: Path, start: Callable[[], Build], monkeypatch: pytest.MonkeyPatch, since: str
) -> None:
    """Which has the lock since then."""
    build = start()
    (build.copy / "image").write_text("two")
    descriptor = os.open(cache, os.O_RDONLY)
    unpack = unpacking.copy_out

    def unpack_and_lock(*arguments: Any, **more: Any) -> unpacking.CopiedOut:  # noqa: ANN401 - the function's own
        copied = unpack(*arguments, **more)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return copied

    if since == "before":
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    else:
        monkeypatch.setattr(unpacking, "copy_out", unpack_and_lock)
    thread = threading.Thread(target=build.end)
    thread.start()
    while thread.is_alive() and not is_waited_for(cache):
        thread.join(0.01)
    assert thread.is_alive(), "it has not waited"
    assert content(cache)["image"] == "one"
    os.close(descriptor)
    thread.join()
    assert content(cache)["image"] == "two"


def test_what_a_killed_build_left_is_removed_and_never_handed_out(cache: Path, start: Callable[[], Build]) -> None:
    (cache / ".virt-dib-killed/new").mkdir(parents=True)
    (cache / ".virt-dib-killed/file").touch()
    (cache / ".virt-dib-alive").mkdir()
    with contextlib.ExitStack() as stack:
        descriptor = os.open(cache / ".virt-dib-alive", os.O_RDONLY)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        build = start()
        assert {path.name for path in build.copy.iterdir()} == {"git", "image"}
        build.end()
    assert {path.name for path in cache.iterdir()} == {".virt-dib-alive", "git", "image"}


def test_what_others_can_change_meanwhile_is_not_removed(cache: Path, start: Callable[[], Build]) -> None:
    left = cache / ".virt-dib-planted"
    (left / "new").mkdir(parents=True)
    left.chmod(0o777)
    build = start()
    build.end()
    assert (left / "new").is_dir()


@pytest.mark.parametrize("link", [".virt-dib-killed", ".virt-dib-killed/old"])
def test_what_a_killed_build_is_said_to_have_left_is_not_taken_from_elsewhere(
    cache: Path, start: Callable[[], Build], tmp_path: Path, link: str
) -> None:
    (tmp_path / "private/old").mkdir(parents=True)
    for path in (tmp_path / "private/key", tmp_path / "private/old/key"):
        path.write_text("secret")
    (cache / link).parent.mkdir(exist_ok=True)
    (cache / link).symlink_to(tmp_path / "private")
    build = start()
    assert content(build.copy) == BEFORE
    build.end()
    assert content(tmp_path / "private") == {"key": "secret", "old/key": "secret"}


def test_a_directory_of_a_build_that_has_only_just_made_it_is_not_swept(
    cache: Path, start: Callable[[], Build], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = start(), start()
    (first.copy / "first").write_text("1")
    (second.copy / "second").write_text("2")
    make = tempfile.mkdtemp
    ended: list[Received] = []
    other = threading.Thread(target=lambda: ended.append(second.end()))

    def make_and_wait(prefix: str, dir: Path) -> str:  # noqa: A002 - the function's own name
        made = make(prefix=prefix, dir=dir)
        if other.ident is None:
            other.start()
            while other.is_alive() and not is_waited_for(cache):
                other.join(0.01)
        return made

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_wait)
    assert first.end().entries == ("first",)
    other.join()
    assert [received.entries for received in ended] == [("second",)]
    assert content(cache) == {**BEFORE, "first": "1", "second": "2"}


KILLED = """
import os, signal, sys
from pathlib import Path
from test_image_cache import Build
top, event, left = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
build = Build(top / "cache", top / "killed")
(build.copy / "git/HEAD").write_text("two")
def kill(name, arguments):
    global left
    if name == event and ("/git" in str(arguments[0]) or arguments[0] == "HEAD"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
build.end()
"""


@pytest.mark.parametrize(("event", "number"), [("os.rename", 1), ("os.rename", 2), ("os.remove", 1)])
def test_a_build_that_is_killed_while_it_replaces_an_entry_leaves_one_of_the_two(
    cache: Path, start: Callable[[], Build], tmp_path: Path, event: str, number: int
) -> None:
    """It is killed before that call."""
    path = os.pathsep.join(str(directory) for directory in (TESTS.parent / "src", TESTS, TESTS.parent))
    result = tools.run(
        [sys.executable, "-c", KILLED, tmp_path, event, str(number)],
        doing="running a build",
        environment={"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.environ["PATH"]},
        check=False,
    )
    assert (result.exit_status, result.stderr) == (128 + signal.SIGKILL, "")
    after = {**BEFORE, "git/HEAD": "two"}
    assert content(start().copy) == (after if event == "os.remove" else BEFORE)
    assert {path.name for path in cache.iterdir()} == {"git", "image"}


def test_an_entry_stays_where_another_cannot_replace_it(
    cache: Path, start: Callable[[], Build], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = start()
    (build.copy / "git/HEAD").write_text("two")
    rename = Path.rename

    def lose_and_rename(path: Path, target: Path) -> Path:
        if path.match("new/git"):
            shutil.rmtree(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", lose_and_rename)
    with pytest.raises(FileNotFoundError):
        build.end()
    assert content(cache) == BEFORE


# ---- links, and what may not be read ----


def test_links_that_lead_elsewhere_are_not_followed_and_not_replaced(
    cache: Path, start: Callable[[], Build], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/secret").write_text("secret")
    (cache / "apt").symlink_to(tmp_path / "elsewhere")
    (cache / "inside").symlink_to("git/HEAD")
    build = start()
    assert content(build.copy) == {**BEFORE, "inside": "-> git/HEAD"}
    (build.copy / "apt").mkdir()
    (build.copy / "apt/secret").write_text("overwritten")
    assert build.end() == Received(entries=(), refused=("apt",), left_out=())
    assert (cache / "apt").readlink() == tmp_path / "elsewhere"
    assert content(tmp_path / "elsewhere") == {"secret": "secret"}


def test_files_that_this_user_may_not_read_are_left_out(anyones_dir: Path) -> None:
    text = run_python(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from virt_dib.image_cache import ImageCache\n"
        "top = Path(sys.argv[1])\n"
        "(top / 'cache/closed').mkdir(parents=True)\n"
        "(top / 'cache/file').write_text('text')\n"
        "(top / 'cache/closed').chmod(0)\n"
        "(top / 'copy').mkdir()\n"
        "ImageCache(top / 'cache', top).copy_to(top / 'copy')\n"
        "print(sorted(os.listdir(top / 'copy')))\n",
        anyones_dir,
        before=as_ordinary_user(),
    )
    assert text == "['file']\n"


# ---- what a hostile guest gives back ----


def send(build: Build, *members: tuple[str, bytes, str], unchanged: bytes = b"") -> Received:
    """Have the guest send this: names, types and contents or targets of links."""
    with tarfile.open(build.cache.archive, "w") as archive:
        for name, kind, text in (*members, ("unchanged", tarfile.REGTYPE, unchanged.decode())):
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = text
                archive.addfile(info)
            else:
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text.encode()))
    return build.cache.receive()


NEW = ("new", tarfile.DIRTYPE, "")


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../..", "../git/../..", "a/../../..", "sub/../../../x", "../../old", ""]
)
def test_links_out_of_the_cache_are_left_out(cache: Path, start: Callable[[], Build], target: str) -> None:
    received = send(start(), NEW, ("new/x/file", tarfile.REGTYPE, "1"), ("new/x/link", tarfile.SYMTYPE, target))
    assert received == Received(entries=("x",), refused=(), left_out=("new/x/link",))
    assert content(cache) == {**BEFORE, "x/file": "1"}


@pytest.mark.parametrize(
    "unchanged", [b"../secret", b"/etc/passwd", b"git/../../secret", b"x/absent", b"git", b"", b"\xff", b"image/x"]
)
def test_files_it_did_not_get_are_not_linked(
    cache: Path, start: Callable[[], Build], tmp_path: Path, unchanged: bytes
) -> None:
    (tmp_path / "secret").write_text("secret")
    build = start()
    build.cache.archive.parent.mkdir(exist_ok=True)
    with tarfile.open(build.cache.archive, "w") as archive:
        for name, kind, data in (
            ("new", tarfile.DIRTYPE, b""),
            ("new/x", tarfile.REGTYPE, b"1"),
            ("unchanged", tarfile.REGTYPE, unchanged + b"\0"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data)
            archive.addfile(info, io.BytesIO(data))
    assert build.cache.receive().entries == ("x",)
    assert content(cache) == {**BEFORE, "x": "1"}


def test_unchanged_files_do_not_go_through_links(cache: Path, start: Callable[[], Build]) -> None:
    members = [NEW, ("new/git/refs", tarfile.SYMTYPE, "objects"), ("new/git/objects/bb", tarfile.REGTYPE, "2")]
    assert send(start(), *members, unchanged=b"git/refs/old\0").refused == ("git",)
    assert content(cache) == BEFORE


def test_a_file_that_is_said_to_be_new_and_unchanged(cache: Path, start: Callable[[], Build]) -> None:
    assert send(start(), NEW, ("new/git/HEAD", tarfile.REGTYPE, "2"), unchanged=b"git/HEAD\0").refused == ("git",)
    assert content(cache) == BEFORE


@pytest.mark.parametrize(
    "members",
    [
        pytest.param([("new/../../x", tarfile.REGTYPE, "1")], id="a name that leads out"),
        pytest.param([NEW, ("new/a", tarfile.SYMTYPE, "b"), ("new/a/c", tarfile.REGTYPE, "1")], id="through a link"),
        pytest.param([], id="nothing"),
        pytest.param([("new", tarfile.REGTYPE, "")], id="a file instead of the directory"),
        pytest.param([NEW, ("old", tarfile.DIRTYPE, "")], id="a directory of ours"),
        pytest.param([("new", tarfile.SYMTYPE, "unchanged")], id="a link instead of the directory"),
    ],
)
def test_what_makes_no_sense_is_refused_as_a_whole(
    cache: Path, start: Callable[[], Build], members: list[tuple[str, bytes, str]]
) -> None:
    with pytest.raises(ApplianceError):
        send(start(), *members)
    assert content(cache) == BEFORE
    assert {path.name for path in cache.iterdir()} == {"git", "image"}


@pytest.mark.parametrize(
    "unchanged", [b"x" * (32 << 20), bytes(16 << 20), b"image\0" * 8], ids=["long", "NULs", "twice"]
)
def test_a_list_longer_than_it_can_be_is_not_read(cache: Path, start: Callable[[], Build], unchanged: bytes) -> None:
    with pytest.raises(ApplianceError, match="longer than it can be"):
        send(start(), NEW, ("new/x", tarfile.REGTYPE, "1"), unchanged=unchanged)
    assert content(cache) == BEFORE


def test_its_own_names_are_not_taken(cache: Path, start: Callable[[], Build]) -> None:
    assert send(start(), NEW, ("new/.virt-dib-x", tarfile.REGTYPE, "1")).entries == ()
    assert content(cache) == BEFORE


# ---- which directories ----


@pytest.mark.parametrize("name", ["", "home", "home/../home", "file", "file/below"])
def test_directories_that_cannot_be_meant(tmp_path: Path, name: str) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "file").touch()
    directory = Path(f"{tmp_path}/{name}") if name else Path("/")
    with pytest.raises(UsageError, match="cannot keep the image cache in") as caught:
        image_cache.check(directory, tmp_path / "home")
    assert caught.value.problems[0].hint


def test_directories_that_can(tmp_path: Path) -> None:
    (tmp_path / "home/.cache").mkdir(parents=True)
    image_cache.check(tmp_path / "home/.cache/image-create", tmp_path / "home")
    image_cache.check(tmp_path / "home/.cache", None)


# ---- in a build ----


CACHER = """#!/bin/bash
set -eu
echo "cached: $(cat "$DIB_IMAGE_CACHE/entry/file" 2>/dev/null | tr '\\n' ' ')"
mkdir -p "$DIB_IMAGE_CACHE/entry"
echo line >>"$DIB_IMAGE_CACHE/entry/file"
ln -s /etc/passwd "$DIB_IMAGE_CACHE/entry/odd" 2>/dev/null || true
exit "${CACHER_STATUS:-0}"
"""


def tree_stage(tmp_path: Path, cache: Path | None, variables: Mapping[str, str]) -> str:
    """What the tree stage shows, run in a sandbox without the rest of a build."""
    directory = Path(tempfile.mkdtemp(dir=tmp_path))
    make_tiny_os(directory / "elements")
    make_element(directory / "elements", "cacher", {"extra-data.d/50-cacher": CACHER})
    spec = BuildSpec(
        name="x", output_dir=directory, elements=("tiny-os", "cacher"), element_paths=(directory / "elements",),
        skip_base=True, network=False, image_cache=cache, variables=variables,
    )  # fmt: skip
    monitor = BuildMonitor()
    with monitor.logging(directory / "x.log"), contextlib.suppress(ScriptError):
        plan = make_plan(spec, directory)
        if plan.image_cache is not None:
            plan.image_cache.copy_to(plan.staging.inside(contract.CACHE))
        with open_sandbox(Settings(directory=plan.staging.finish(), network=False)) as box:
            make_tree(plan, Phases(plan.hooks.owners, monitor), box)
    return (directory / "x.log").read_text()


@pytest.mark.sandbox
def test_the_next_build_finds_what_elements_have_cached(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = tree_stage(tmp_path, cache, {})
    assert "cached: \n" in first
    assert "no link inside the cache: entry/odd" in first
    assert content(cache) == {"entry/file": "line\n"}
    # What a build has cached that failed later is kept too.
    assert "cached: line \n" in tree_stage(tmp_path, cache, {"CACHER_STATUS": "1"})
    assert "cached: line line \n" in tree_stage(tmp_path, cache, {})
    assert (cache / "entry/file").stat().st_uid == os.geteuid()
    # And nothing of it is there for who does not ask for it.
    assert "cached: \n" in tree_stage(tmp_path, None, {})


TOGETHER = """#!/bin/bash
set -eu
# Answered when both builds have asked: each has got its copy of the cache by then, and neither has given one back.
curl --fail --silent --show-error --max-time 800 "$SERVER/$IMAGE_NAME"
mkdir -p "$DIB_IMAGE_CACHE/$IMAGE_NAME"
echo "of $IMAGE_NAME" | tee "$DIB_IMAGE_CACHE/$IMAGE_NAME/file" >"$DIB_IMAGE_CACHE/shared"
"""


class Meeting(http.server.BaseHTTPRequestHandler):
    """Nobody gets an answer before both have asked."""

    both: ClassVar[threading.Barrier]

    def do_GET(self) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            self.both.wait()
            self.send_response(204)
            self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server names it
        pass


@pytest.fixture
def meeting() -> Iterator[str]:
    """The address of a server where two builds meet: one of this host's that they get to, no loopback's."""
    addresses = tools.run(["hostname", "-I"], doing="looking for an address").stdout.split()
    if not addresses:
        pytest.skip("this host has no address but its loopback's")
    Meeting.both = threading.Barrier(2)
    with http.server.ThreadingHTTPServer((addresses[0], 0), Meeting) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://{addresses[0]}:{running.server_address[1]}"
        Meeting.both.abort()
        running.shutdown()


@pytest.mark.full
@pytest.mark.appliance
@pytest.mark.sandbox
def test_two_whole_builds_at_once_keep_what_both_have_cached(cache: Path, tmp_path: Path, meeting: str) -> None:
    """One in each isolation, as processes of their own."""
    skip_without("sandbox")
    make_tiny_os(tmp_path / "elements")
    make_element(tmp_path / "elements", "together", {"extra-data.d/50-together": TOGETHER})
    arguments: list[str | Path] = [
        "--formats", "tar", "--skip-base", "-p", tmp_path / "elements", "--image-cache", cache, "--envvar",
        f"SERVER={meeting}", "tiny-os", "together",
    ]  # fmt: skip

    def build(isolation: str) -> Run:
        (tmp_path / isolation).mkdir()
        words = ["--name", isolation, "--isolation", isolation, *arguments]
        run = virt_dib(words, cwd=tmp_path / isolation, environment={"TMPDIR": "/var/tmp"})
        if run.exit_status != 0:
            # The other one need not wait for it.
            Meeting.both.abort()
        return run

    with concurrent.futures.ThreadPoolExecutor(len(ISOLATIONS)) as both:
        runs = dict(zip(ISOLATIONS, both.map(build, ISOLATIONS), strict=True))
    for isolation, run in runs.items():
        assert run.exit_status == 0, run.stdout + run.stderr
        assert (tmp_path / isolation / f"{isolation}.tar").stat().st_size > 0
    found = content(cache)
    # Of an entry that both have made, the first one's stays, and the other build is told so.
    first = found.pop("shared").removeprefix("of ").strip()
    told = "not cached, since it has changed in the image cache meanwhile: shared"
    assert [isolation for isolation, run in runs.items() if told in run.stdout] == [
        isolation for isolation in ISOLATIONS if isolation != first
    ]
    assert found == {**BEFORE, **{f"{isolation}/file": f"of {isolation}\n" for isolation in ISOLATIONS}}
    assert {path.name for path in cache.iterdir()} == {"git", "image", "shared", *ISOLATIONS}
