# SPDX-License-Identifier: Apache-2.0
"""The build disk's content, whatever the elements and the host hold."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from helpers import TESTS, files_in_image, make_element
from virt_dib import hooks, tools
from virt_dib.elements import Element, discover
from virt_dib.errors import ElementError, ToolError, UsageError
from virt_dib.files import remove_tree
from virt_dib.staging import HostFile, Staging, wanted_host_files

OTHER_USER = 65534


@pytest.fixture
def content(tmp_path: Path) -> Staging:
    return Staging(tmp_path / "staging")


def run_python(code: str, *arguments: str | Path, before: tuple[str, ...] = ()) -> str:
    """What *code* prints, run by the command *before*."""
    return tools.run(
        [*before, sys.executable, "-c", code, *arguments],
        doing="running a test",
        environment={"PYTHONPATH": str(TESTS.parent / "src"), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"},
    ).stdout


def as_ordinary_user() -> tuple[str, ...]:
    if os.geteuid() != 0:
        return ()
    setpriv = tools.require("setpriv", purpose="run the tests", package="util-linux")
    return (str(setpriv), f"--reuid={OTHER_USER}", f"--regid={OTHER_USER}", "--clear-groups")


# ---- elements and modules ----


def test_the_umask_of_the_user_makes_no_difference_to_the_guest(tmp_path: Path) -> None:
    make_element(tmp_path / "elements", "one", {"install.d/50-x": "#!/bin/bash\n", "deep/er/file": "text"})
    elements = list(discover([tmp_path / "elements"]).values())
    (tmp_path / "module.py").write_text("")
    (tmp_path / "host-file").write_text("")
    seen = []
    for umask in (0o022, 0o077, 0o000):
        before = os.umask(umask)
        try:
            made = Staging(tmp_path / f"staging-{umask}")
            made.add_guest_scripts()
            made.add_modules([tmp_path / "module.py"], Path(sys.executable))
            made.add_prefix(tmp_path / "elements", [tmp_path / "module.py"], "/nowhere")
            made.add_elements(elements, [tmp_path / "elements"])
            hooks.compose(elements, made.hooks_dir, excluded_scripts=frozenset())
            made.add_host_file(HostFile(source=tmp_path / "host-file", inside="/a/b/c", wanted_by="a test"))
            made.write("guest/rules.sh", "")
            made.finish()
        finally:
            os.umask(before)
        paths = [made.directory, *made.directory.rglob("*")]
        seen.append({path.relative_to(made.directory): stat.filemode(path.lstat().st_mode) for path in paths})
    assert Path("site/__pycache__") in seen[0]
    assert seen == [seen[0]] * 3


def test_an_element_is_copied_as_it_is(tmp_path: Path, content: Staging) -> None:
    element = make_element(tmp_path / "elements", "one", {"install.d/50-x": "#!/bin/bash\n", "deep/er/file": "text"})
    (element / "link").symlink_to("/nowhere")
    os.mkfifo(element / "fifo")
    os.utime(element / "deep/er/file", (5, 5))
    elements = list(discover([tmp_path / "elements"]).values())
    places = content.add_elements(elements, [tmp_path / "elements"])
    assert places == {"one": "/dib/elements/0/one"}
    copy = content.directory / "elements/0/one"
    assert sorted(path.name for path in copy.iterdir()) == ["deep", "install.d", "link"]
    assert os.readlink(copy / "link") == "/nowhere"
    assert (copy / "deep/er/file").read_text() == "text"
    assert (copy / "deep/er/file").stat().st_mtime == 5
    assert stat.S_IMODE((copy / "install.d/50-x").stat().st_mode) == 0o755


READ_ONLY = """
import sys
from pathlib import Path
from virt_dib.elements import discover
from virt_dib.files import remove_tree
from virt_dib.staging import HostFile, Staging
top = Path(sys.argv[1])
content = Staging(top / "work" / "staging")
elements = list(discover([top / "elements"]).values())
content.add_elements(elements, [top / "elements"])
content.add_modules([top / "module"], Path(sys.executable))
content.add_host_file(HostFile(source=top / "host", inside="/opt/host", wanted_by="variable 'X'"))
if sys.argv[2] == "disk":
    content.make_disk(top / "disk.img")
remove_tree(top / "work")
print(sorted(path.name for path in top.iterdir()))
"""


@pytest.mark.parametrize("what", ["disk", "nothing"])
def test_read_only_directories_by_an_ordinary_user(anyones_dir: Path, what: str) -> None:
    make_element(anyones_dir / "elements", "one", {"static/a/file": "text"})
    for path in ("module/sub", "host/sub"):
        (anyones_dir / path).mkdir(parents=True)
        (anyones_dir / path / "mod.py").write_text("X = 1\n")
    read_only = ["elements/one/static/a", "elements/one/static", "elements/one", "module/sub", "module", "host/sub"]
    for path in (*read_only, "host"):
        (anyones_dir / path).chmod(0o555)
    said = run_python(READ_ONLY, anyones_dir, what, before=as_ordinary_user())
    assert "work" not in said
    if what == "disk":
        image = files_in_image(anyones_dir / "disk.img")
        assert image.text("/elements/0/one/static/a/file") == "text"
        assert image.text("/host-files/opt/host/sub/mod.py") == "X = 1\n"
        assert "mod.py" in image.names("/site/module/sub")
    for path in reversed((*read_only, "host")):
        (anyones_dir / path).chmod(0o755)


def test_modules_come_without_what_the_guest_does_not_need(tmp_path: Path, content: Staging) -> None:
    for path in ("package/tests/test_x.py", "package/fast.so", "package/sub/mod.py", "package/elements/x"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("X = 1\n")
    (tmp_path / "single.py").write_text("Y = 2\n")
    content.add_modules([tmp_path / "package", tmp_path / "single.py"], Path(sys.executable))
    content.finish()
    site = content.directory / "site"
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.suffix != ".pyc" and path.is_file()}
    assert files == {"package/sub/mod.py", "single.py"}
    assert list(site.glob("package/sub/__pycache__/mod.*.pyc"))


def test_a_tree_deeper_than_pythons_stack(tmp_path: Path, content: Staging) -> None:
    element = make_element(tmp_path / "elements", "one", {})
    deep = element
    for _ in range(1500):
        deep /= "d"
        deep.mkdir()
    elements = list(discover([tmp_path / "elements"]).values())
    content.add_elements(elements, [tmp_path / "elements"])
    assert len(str(deep)) < 4096
    remove_tree(content.directory)
    assert not content.directory.exists()
    remove_tree(element)


def test_a_module_that_is_gone(tmp_path: Path, content: Staging) -> None:
    with pytest.raises(ToolError, match=r"copying '.*/nothing': No such file"):
        content.add_modules([tmp_path / "nothing"], Path(sys.executable))


UNREADABLE = """
import sys
from pathlib import Path
from virt_dib.elements import discover
from virt_dib.errors import VirtDibError
from virt_dib.staging import HostFile, Staging, wanted_host_files
top = Path(sys.argv[1])
content = Staging(top / "staging")
def tell(ask):
    try:
        ask()
    except VirtDibError as error:
        print(type(error).__name__, *error.problems)
tell(lambda: content.add_elements(list(discover([top / "elements"]).values()), [top / "elements"]))
tell(lambda: content.add_host_file(HostFile(source=top / "secret", inside="/secret", wanted_by="variable 'X'")))
tell(lambda: wanted_host_files({"DIB_APT_CONF": f"{top}/closed/file"}, [], None))
"""


def test_what_cannot_be_read_is_named(anyones_dir: Path) -> None:
    element = make_element(anyones_dir / "elements", "one", {"static/file": "text"})
    (anyones_dir / "closed").mkdir()
    (anyones_dir / "closed/file").touch()
    (anyones_dir / "secret").touch()
    for path in (element / "static/file", anyones_dir / "secret", anyones_dir / "closed"):
        path.chmod(0)
    first, second, third = run_python(UNREADABLE, anyones_dir, before=as_ordinary_user()).splitlines()
    assert first.startswith("ElementError")
    assert f"copying '{element}/static/file': Permission denied" in first
    assert second.startswith("ToolError")
    assert "/secret': Permission denied" in second
    assert "variable 'X' names it" in second
    assert third.startswith("UsageError")
    assert "/closed/file': Permission denied" in third
    assert "variable 'DIB_APT_CONF' names it" in third


FULL = """
import sys
from pathlib import Path
from virt_dib.elements import discover
from virt_dib.errors import VirtDibError
from virt_dib.staging import HostFile, Staging
top = Path(sys.argv[1])
content = Staging(top / "small" / "staging")
for ask in (
    lambda: content.add_elements(list(discover([top / "elements"]).values()), [top / "elements"]),
    lambda: content.add_modules([top / "elements"], Path(sys.executable)),
    lambda: content.add_host_file(HostFile(source=top / "elements", inside="/x", wanted_by="variable 'X'")),
    lambda: content.make_disk(top / "small" / "disk.img"),
):
    try:
        ask()
    except VirtDibError as error:
        print(type(error).__name__, *error.problems)
"""


def test_a_full_disk(tmp_path: Path) -> None:
    element = make_element(tmp_path / "elements", "one", {})
    (element / "big").write_bytes(bytes(2 << 20))
    (tmp_path / "small").mkdir()
    unshare = str(tools.require("unshare", purpose="run the tests", package="util-linux"))
    as_root = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    mount = f'mount -t tmpfs -o size=1m none "{tmp_path}/small"; exec "$@"'
    said = run_python(FULL, tmp_path, before=(unshare, *as_root, "--mount", "/bin/sh", "-c", mount, "sh")).splitlines()
    assert len(said) == 4
    assert all(line.startswith("ToolError") and "TMPDIR" in line for line in said), said
    assert all("no space left" in line.lower() for line in said)


SHORT = """
import os, sys
from pathlib import Path
from virt_dib.elements import discover
from virt_dib.errors import ToolError
from virt_dib.staging import Staging
top = Path(sys.argv[1])
content = Staging(top / "staging")
content.add_elements(list(discover([top / "elements"]).values()), [top / "elements"])
disk, filler = top / "small" / "disk.img", top / "small" / "filler"
for left_kib in range(1000, 20000, 100):
    filler.unlink(missing_ok=True)
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, 20 * 1024**2 - left_kib * 1024)
    try:
        content.make_disk(disk)
    except ToolError as error:
        assert "no space left" in str(error), (error, error.__cause__)
        print("short" if "short write" in str(error.__cause__) else "none")
    else:
        break
    disk.unlink()
print("made")
"""


def test_a_disk_that_becomes_full_while_more_than_a_block_is_written(tmp_path: Path) -> None:
    """Of that mke2fs says something else, with whatever little is left."""
    (make_element(tmp_path / "elements", "one", {}) / "big").write_bytes(bytes(range(256)) * 2000)
    (tmp_path / "small").mkdir()
    unshare = str(tools.require("unshare", purpose="run the tests", package="util-linux"))
    as_root = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    mount = f'mount -t tmpfs -o size=20m none "{tmp_path}/small"; exec "$@"'
    said = run_python(SHORT, tmp_path, before=(unshare, *as_root, "--mount", "/bin/sh", "-c", mount, "sh")).splitlines()
    assert {*said} == {"none", "short", "made"}


# ---- files of the host ----


def wanted(variables: Mapping[str, str], elements: list[Element] | None = None, home: Path | None = None) -> list[str]:
    return [file.inside for file in wanted_host_files(variables, elements or [], home)]


def test_files_that_variables_name(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    (tmp_path / "c d").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    variables = {
        "DIB_APT_SOURCES": f"{tmp_path}/a",
        "DIB_APT_CONF": f"file://{tmp_path}/b {tmp_path}/a relative",
        "DIB_REPOLOCATION_x": f"{tmp_path}/c d",
        "DIB_APT_KEYRING": f"{tmp_path}/gone",
        "DIB_LOCAL_IMAGE": f"{tmp_path}/nothing",
        "DIB_STEPS_FILE_PATH": f"{tmp_path}/a/below-a-file",
        "DIB_YUM_REPO_CONF": f"{tmp_path}/{'x' * 300}",
        "DIB_IPA_CA_FILE": "/dev/null",
        "DIB_IPA_KEY_FILE": f"{tmp_path}/../{tmp_path.name}/a",
        "UNKNOWN": f"{tmp_path}/c d",
    }
    assert wanted(variables) == [f"{tmp_path}/a", f"{tmp_path}/b", f"{tmp_path}/c d"]
    (file,) = wanted_host_files({"DIB_APT_CONF": f"{tmp_path}/b"}, [], None)
    assert file == HostFile(source=tmp_path / "b", inside=f"{tmp_path}/b", wanted_by="variable 'DIB_APT_CONF'")


def test_files_that_elements_are_there_to_copy(tmp_path: Path) -> None:
    make_element(tmp_path / "elements", "local-config", {})
    elements = list(discover([tmp_path / "elements"]).values())
    assert wanted({}, elements, tmp_path) == []
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/authorized_keys").touch()
    (file,) = wanted_host_files({}, elements, tmp_path)
    assert file.inside == "/dib/home/.ssh/authorized_keys"
    assert file.wanted_by == "element 'local-config'"


@pytest.mark.parametrize("path", ["/", "//", "///", "/.", "/proc", "/proc/self", "/sys/", "/dev"])
def test_the_whole_host_is_not_copied(path: str) -> None:
    with pytest.raises(UsageError, match="cannot show '/") as caught:
        wanted({"DIB_CONTAINER_CONTEXT": path, "DIB_APT_CONF": path})
    assert "variable 'DIB_CONTAINER_CONTEXT'" in str(caught.value.problems[0].hint)
    assert "variable 'DIB_APT_CONF'" in str(caught.value.problems[1].hint)


def test_a_link_to_the_whole_host(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/")
    with pytest.raises(UsageError, match="cannot show"):
        wanted({"DIB_CONTAINER_CONTEXT": str(tmp_path / "link")})


def test_what_is_in_a_directory_that_is_wanted_comes_with_it(tmp_path: Path, content: Staging) -> None:
    (tmp_path / "context/sub").mkdir(parents=True)
    (tmp_path / "context/sub/file").write_text("text")
    (tmp_path / "context/inner").symlink_to("sub")
    (tmp_path / "context-2").touch()
    variables = {
        "DIB_CONTAINERFILE_DOCKERFILE": f"{tmp_path}/context/sub/file",
        "DIB_APT_CONF": f"{tmp_path}/context/sub",
        "DIB_APT_SOURCES": f"{tmp_path}/context/inner/file",
        "DIB_CONTAINER_CONTEXT": f"{tmp_path}/context/",
        "DIB_APT_KEYRING": f"{tmp_path}/context-2",
    }
    files = wanted_host_files(variables, [], None)
    assert sorted(file.inside for file in files) == [f"{tmp_path}/context", f"{tmp_path}/context-2"]
    for file in files:
        content.add_host_file(file)
    copy = content.directory / f"host-files{tmp_path}/context"
    assert (copy / "sub/file").read_text() == "text"
    assert os.readlink(copy / "inner") == "sub"


def test_a_link_in_a_wanted_directory_brings_what_it_leads_to(tmp_path: Path, content: Staging) -> None:
    (tmp_path / "context").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/file").write_text("text")
    (tmp_path / "context/out").symlink_to(tmp_path / "elsewhere")
    variables = {"DIB_CONTAINER_CONTEXT": f"{tmp_path}/context", "DIB_APT_CONF": f"{tmp_path}/context/out/file"}
    files = wanted_host_files(variables, [], None)
    assert [file.inside for file in files] == [f"{tmp_path}/context", f"{tmp_path}/elsewhere/file"]
    for file in files:
        content.add_host_file(file)
    copies = content.directory / f"host-files{tmp_path}"
    assert os.readlink(copies / "context/out") == f"{tmp_path}/elsewhere"
    assert (copies / "elsewhere/file").read_text() == "text"


def test_a_directory_that_holds_the_staging_one(tmp_path: Path, content: Staging) -> None:
    (tmp_path / "file").touch()
    content.add_host_file(HostFile(source=tmp_path, inside="/around", wanted_by="variable 'X'"))
    copy = content.directory / "host-files/around"
    assert [path.name for path in copy.iterdir()] == ["file"]


# ---- removing ----


def test_removing_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/sub/link").symlink_to(tmp_path / "kept")
    (tmp_path / "tree/sub").chmod(0o500)
    remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "nothing")
    remove_tree(tmp_path / "kept/file")
    assert (tmp_path / "kept/file").exists()


def test_elements_that_cannot_be_copied_are_elements_at_fault(tmp_path: Path, content: Staging) -> None:
    element = make_element(tmp_path / "elements", "one", {})
    deep = tmp_path / "elements" / "one"
    while len(str(deep)) < 3900:
        deep /= "d" * 100
        deep.mkdir()
    elements = list(discover([tmp_path / "elements"]).values())
    content.directory.rename(tmp_path / ("s" * 200))
    longer = Staging(tmp_path / ("s" * 200) / "more")
    with pytest.raises(ElementError, match="File name too long"):
        longer.add_elements(elements, [tmp_path / "elements"])
    remove_tree(element)
