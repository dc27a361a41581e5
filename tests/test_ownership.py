# SPDX-License-Identifier: Apache-2.0
"""What other users can do to what virt-dib keeps, tried as one of them; and what makes no difference."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

import pytest

from helpers import TESTS
from test_supermin import as_user
from virt_dib import kvm, ownership, supermin, tools
from virt_dib.errors import PrerequisiteError, ToolError

OTHER_USER = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")


# ---- which directories are in danger ----


@pytest.mark.parametrize(
    ("mode", "shared", "reason"),
    [
        (0o700, False, None),
        (0o755, False, None),
        (0o777, False, "others can write to it"),
        (0o1777, False, "others can write to it"),
        (0o1777, True, None),
        (0o777, True, "others can write to it"),
        (0o702, False, "others can write to it"),
    ],
)
def test_the_mode_of_a_directory(tmp_path: Path, mode: int, *, shared: bool, reason: str | None) -> None:
    directory = tmp_path / "cache"
    directory.mkdir()
    directory.chmod(mode)
    found = ownership.danger(directory, shared=shared)
    assert (None if found is None else (found.path, found.reason)) == (None if reason is None else (directory, reason))


@pytest.mark.parametrize(("mode", "safe"), [(0o755, True), (0o1777, True), (0o777, False)])
def test_the_mode_of_a_directory_above(tmp_path: Path, mode: int, *, safe: bool) -> None:
    directory = tmp_path / "above" / "between" / "cache"
    directory.mkdir(parents=True)
    (tmp_path / "above").chmod(mode)
    found = ownership.danger(directory)
    assert (found is None) == safe
    assert found is None or found.path == tmp_path / "above"


def test_a_link_is_as_safe_as_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    found = ownership.danger(tmp_path / "link" / "cache")
    assert found is not None
    assert found.path == tmp_path / "open"


def test_a_group_that_is_the_users_own_is_the_user(tmp_path: Path) -> None:
    state = tmp_path.stat()
    if not ownership._is_own_group(tmp_path, state):  # noqa: SLF001 - whether this user has one
        pytest.skip("this user has no group of the same name")
    tmp_path.chmod(0o770)
    assert ownership.danger(tmp_path) is None
    # A list of who may, with an entry for another user (posix_acl_xattr.h).
    entries = [(1, 7, -1), (2, 7, OTHER_USER), (4, 0, -1), (16, 7, -1), (32, 0, -1)]
    text = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(tmp_path, "system.posix_acl_access", text)
    except OSError:
        pytest.skip("no access lists on this file system")
    found = ownership.danger(tmp_path)
    assert found is not None
    assert found.reason == "others can write to it"


@needs_root
def test_in_a_user_namespace_what_is_roots_belongs_to_nobody(anyones_dir: Path) -> None:
    code = """
import sys
from pathlib import Path
from virt_dib import ownership
print(ownership.danger(Path(sys.argv[1]), shared=True), ownership.danger(Path(sys.argv[1]), shared=False))
"""
    anyones_dir.chmod(0o1777)
    unshare = ("unshare", "--user", "--map-current-user")
    try:
        # Not the number that stands for nobody.
        said = as_user(54321, code, str(anyones_dir), before=unshare)
    except ToolError as error:
        pytest.skip(f"no user namespaces: {error}")
    assert said.startswith("None Danger(")


def test_what_is_made_is_for_this_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        ownership.make_private(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b")] == [0o700, 0o700]


# ---- the cache of the appliance, in a directory that all may write ----


@pytest.fixture
def shared(anyones_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As ``/tmp`` is; XDG_CACHE_HOME names it."""
    anyones_dir.chmod(0o1777)
    (anyones_dir / "guestfs/supermin.d").mkdir(parents=True)
    (anyones_dir / "guestfs/supermin.d/packages").write_text("bash\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(anyones_dir))
    return anyones_dir


def attack(code: str, *arguments: str | Path) -> str:
    return as_user(OTHER_USER, f"import os, sys\nfrom pathlib import Path\n{code}", *map(str, arguments))


PREPARE_FIRST = """
from virt_dib import supermin
cache = Path(sys.argv[1], "virt-dib")
directory = supermin.prepare(cache, [sys.argv[2]])
(directory / "supermin.d/more").write_text(sys.argv[3] + "\\n")
(directory / "lock").symlink_to(sys.argv[3])
(directory / "kernels").symlink_to(sys.argv[3])
os.mkfifo(cache / "kvm.json")
for path in (cache, directory):
    path.chmod(0o777)
"""


@needs_root
def test_an_appliance_that_another_user_has_prepared_is_refused(shared: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    attack(PREPARE_FIRST, shared, shared / "guestfs", precious)
    with pytest.raises(
        PrerequisiteError, match=r"cannot trust the cache directory.*it belongs to another user"
    ) as error:
        kvm.choose(kernel=None, cache_dir=supermin.cache_dir())
    assert "rm -r" in (error.value.problems[0].hint or "")
    assert precious.read_text() == "mine"


@needs_root
def test_an_appliance_that_another_user_puts_into_ours_is_refused(shared: Path, tmp_path: Path) -> None:
    """The directory is ours by now, but was open once."""
    attack(PREPARE_FIRST, shared, shared / "guestfs", tmp_path / "precious")
    os.chown(shared / "virt-dib", 0, 0)
    (shared / "virt-dib").chmod(0o700)
    with pytest.raises(PrerequisiteError, match="it belongs to another user"):
        supermin.prepare(supermin.cache_dir(), [str(shared / "guestfs")])


@needs_root
def test_a_cache_that_others_can_replace_is_refused(shared: Path) -> None:
    shared.chmod(0o777)
    with pytest.raises(PrerequisiteError, match=r"which others can replace: .*others can write to it"):
        supermin.cache_dir()
    # They can, indeed.
    attack('Path(sys.argv[1]).rename(sys.argv[1] + ".old"); Path(sys.argv[1]).mkdir()', shared / "virt-dib")
    assert (shared / "virt-dib").stat().st_uid == OTHER_USER


@needs_root
def test_a_link_of_another_user_is_not_followed_twice(shared: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("mine").mkdir()
    attack("Path(sys.argv[1]).symlink_to(sys.argv[2])", shared / "virt-dib", tmp_path / "mine")
    assert supermin.cache_dir() == tmp_path / "mine"


@needs_root
@pytest.mark.parametrize(
    "code",
    [
        'Path(sys.argv[1], "kvm.json").write_text("x")',
        'Path(sys.argv[1]).rename(sys.argv[1] + ".old")',
        "print(os.listdir(sys.argv[1]))",
    ],
)
def test_a_cache_that_we_have_made_there_is_ours(shared: Path, code: str) -> None:
    cache = supermin.cache_dir()
    made = supermin.prepare(cache, [str(shared / "guestfs")])
    with pytest.raises(ToolError, match="PermissionError"):
        attack(code, cache)
    assert supermin.prepare(supermin.cache_dir(), [str(shared / "guestfs")]) == made


def test_a_relative_cache_is_not_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert supermin.cache_dir() == tmp_path / "home/.cache/virt-dib"


@needs_root
def test_the_doctor_tells_it(shared: Path) -> None:
    attack("Path(sys.argv[1]).mkdir()", shared / "virt-dib")
    command = [TESTS.parent / ".venv/bin/virt-dib-doctor"]
    result = tools.run(command, doing="asking", environment={**os.environ}, check=False)
    assert result.exit_status == 1
    assert "it belongs to another user" in result.stderr
    assert "Traceback" not in result.stderr
