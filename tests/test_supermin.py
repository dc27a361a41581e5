# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers import TESTS
from virt_dib import kvm, supermin, tools
from virt_dib.errors import PrerequisiteError, UsageError

OTHER_USER = 65534


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A directory of libguestfs's."""
    (tmp_path / "guestfs/supermin.d").mkdir(parents=True)
    (tmp_path / "guestfs/supermin.d/packages").write_text("bash\n")
    return tmp_path / "guestfs"


def test_the_directory_holds_the_systems_lists_and_ours(tmp_path: Path, library: Path) -> None:
    made = supermin.prepare(tmp_path / "cache", ["/nowhere", str(library)])
    names = sorted(path.name for path in (made / "supermin.d").iterdir())
    assert names == ["packages", "zz-virt-dib-hostfiles", "zz-virt-dib-packages"]
    assert (made / "supermin.d/packages").read_text() == "bash\n"
    assert "dmsetup\n" in (made / "supermin.d/zz-virt-dib-packages").read_text()
    assert supermin.prepare(tmp_path / "cache", [str(library)]) == made
    assert list((tmp_path / "cache").iterdir()) == [made]


def test_what_a_killed_one_has_left_goes(tmp_path: Path, library: Path) -> None:
    for name in (".appliance-old", ".appliance-new", "other"):
        (tmp_path / "cache" / name / "new").mkdir(parents=True)
    for name in (".appliance-old", "other"):
        os.utime(tmp_path / "cache" / name, (0, 0))
    made = supermin.prepare(tmp_path / "cache", [str(library)])
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {".appliance-new", "other", made.name}


def test_other_lists_make_another_directory(tmp_path: Path, library: Path) -> None:
    made = supermin.prepare(tmp_path / "cache", [str(library)])
    (library / "supermin.d/more").write_text("tar\n")
    assert supermin.prepare(tmp_path / "cache", [str(library)]) != made


def test_keyrings_count_and_links_to_nothing_do_not(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supermin, "HOST_FILES", (str(tmp_path / "*.gpg"),))
    made = supermin.prepare(tmp_path / "cache", [str(library)])
    (tmp_path / "gone.gpg").symlink_to(tmp_path / "nothing")
    assert supermin.prepare(tmp_path / "cache", [str(library)]) == made
    (tmp_path / "new.gpg").touch()
    assert supermin.prepare(tmp_path / "cache", [str(library)]) != made


def test_no_libguestfs(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match=r"no supermin\.d"):
        supermin.prepare(tmp_path / "cache", [str(tmp_path)])


def test_the_cache_is_no_directory(tmp_path: Path, library: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(PrerequisiteError, match="cannot keep the appliance's files") as caught:
        supermin.prepare(tmp_path / "cache", [str(library)])
    assert "XDG_CACHE_HOME" in str(caught.value.problems[0].hint)


def test_something_in_the_place_of_the_directory(tmp_path: Path, library: Path) -> None:
    made = supermin.prepare(tmp_path / "cache", [str(library)])
    made.rename(tmp_path / "aside")
    made.touch()
    with pytest.raises(PrerequisiteError, match="cannot keep"):
        supermin.prepare(tmp_path / "cache", [str(library)])


def test_a_colon_in_the_path(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a:b"))
    with pytest.raises(UsageError, match="a colon"):
        supermin.cache_dir()
    with pytest.raises(UsageError, match="a colon"):
        supermin.prepare(tmp_path / "a:b", [str(library)])


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert supermin.cache_dir() == tmp_path / ".cache/virt-dib"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert supermin.cache_dir() == tmp_path / "xdg/virt-dib"


def as_user(user_id: int, code: str, *arguments: str, before: Sequence[str] = ()) -> str:
    """What *code* prints when that user, without HOME, runs it, by the command *before*."""
    setpriv = tools.require("setpriv", purpose="run the tests", package="util-linux")
    become = [str(setpriv), f"--reuid={user_id}", f"--regid={user_id}", "--clear-groups"]
    return tools.run(
        [*become, *before, sys.executable, "-c", code, *arguments],
        doing="running as another user",
        environment={"PYTHONPATH": str(TESTS.parent / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
    ).stdout


PRINT_ERROR = """
import sys
from pathlib import Path
from virt_dib import supermin
from virt_dib.errors import PrerequisiteError
try:
    {ask}
except PrerequisiteError as error:
    print(*error.problems)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_user_without_a_home() -> None:
    # A number that /etc/passwd does not have.
    said = as_user(54321, PRINT_ERROR.format(ask="supermin.cache_dir()"))
    assert "no home directory" in said
    assert "set XDG_CACHE_HOME" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_the_cache_of_another_user(library: Path, tmp_path: Path) -> None:
    ask = "supermin.prepare(Path(sys.argv[1]), [sys.argv[2]])"
    (tmp_path / "cache").mkdir(mode=0o700)
    # The directories of pytest are for this user only, so libguestfs's must be elsewhere.
    assert "no supermin.d" in as_user(OTHER_USER, PRINT_ERROR.format(ask=ask), str(tmp_path / "cache"), str(library))
    with tempfile.TemporaryDirectory() as readable:
        Path(readable).chmod(0o755)
        shutil.copytree(library, Path(readable, "guestfs"))
        said = as_user(OTHER_USER, PRINT_ERROR.format(ask=ask), str(tmp_path / "cache"), f"{readable}/guestfs")
    assert "cannot keep the appliance's files" in said
    assert "Permission denied" in said
    assert "set XDG_CACHE_HOME" in said


@pytest.mark.appliance
def test_the_appliance_is_made_once_for_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [str(path) for pattern in ("lib*/guestfs", "lib*/*/guestfs") for path in Path("/usr").glob(pattern)]
    directory = supermin.prepare(tmp_path / "cache", places)

    def made() -> dict[str, int]:
        fixed = supermin.build(directory, tmp_path)
        return {name: (fixed / name).stat().st_ino for name in ("kernel", "initrd", "root")}

    first = made()
    assert made() == first
    kernel = kvm.host_kernels()[0]
    shutil.copy(kernel.path, tmp_path / "vmlinuz-of-mine")
    monkeypatch.setenv("SUPERMIN_KERNEL", str(tmp_path / "vmlinuz-of-mine"))
    monkeypatch.setenv("SUPERMIN_MODULES", f"/lib/modules/{kernel.release}")
    second = made()
    assert second["kernel"] != first["kernel"]
    assert made() == second
