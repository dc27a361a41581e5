# SPDX-License-Identifier: Apache-2.0
"""The merged hook tree is the one that DIB's own bash makes, and scripts run in the order of ``sort -n``."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import make_element
from virt_dib import tools
from virt_dib.dib import find_installation
from virt_dib.elements import Element, discover, requested, resolve
from virt_dib.errors import ElementError
from virt_dib.hooks import HookTree, Script, compose, is_script_name, order, order_environment
from virt_dib.spec import Phase

BASH = tools.require("bash", purpose="compare with DIB", package="bash")
SORT = tools.require("sort", purpose="compare with DIB", package="coreutils")


def elements(*paths: Path) -> list[Element]:
    return [Element(name=path.name, path=path, provides=frozenset(), depends=frozenset()) for path in paths]


def merged(tmp_path: Path, *paths: Path, excluded: Sequence[str] = ()) -> HookTree:
    return compose(elements(*paths), tmp_path / "hooks", excluded_scripts=frozenset(excluded))


def messages(tmp_path: Path, *paths: Path) -> list[str]:
    with pytest.raises(ElementError) as caught:
        merged(tmp_path, *paths)
    assert all(problem.hint for problem in caught.value.problems)
    return [problem.message for problem in caught.value.problems]


def clash(relative: str, first: str, second: str) -> str:
    return f"merging the hooks of the elements: '{relative}' is in both '{first}' and '{second}'"


def described(top: Path) -> Mapping[str, tuple[object, ...]]:
    """All that matters of each file below *top*, by relative path."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(top.rglob("*")):
        relative = str(path.relative_to(top))
        status = path.lstat()
        kind, mode = stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode)
        if kind == stat.S_IFLNK:
            found[relative] = (kind, status.st_mtime_ns, str(path.readlink()))
        elif kind == stat.S_IFREG:
            found[relative] = (kind, mode, status.st_mtime_ns, path.read_bytes())
        else:
            # DIB makes the directories at the top itself: their time is that of the build.
            found[relative] = (kind, mode, status.st_mtime_ns if "/" in relative else None)
    return found


# --- order


names_of_files = st.text(alphabet="0123456789-_aAzZ", min_size=1, max_size=12)
numbered_names = st.from_regex(r"-{0,2}0{0,3}[0-9]{0,30}[-_0-9A-Za-z]{0,5}", fullmatch=True).filter(bool)


@settings(max_examples=60, deadline=None)
@given(st.lists(names_of_files | numbered_names, max_size=40, unique=True))
@example(["-0", "0", "00", "-", "_", "a", "A", "-1", "--1", "1", "01", "10", "9", "-10", "-9"])
@example([f"{number}-x" for number in (10, 9, 99, 100, 1)])
def test_order_is_that_of_sort(names: list[str]) -> None:
    stdin = "".join(f"{name}\n" for name in names).encode()
    result = tools.run([SORT, "-n"], doing="sorting", stdin=stdin, environment={"LC_ALL": "C"})
    assert order(names) == result.stdout.splitlines()


def test_environment_files_are_in_the_order_of_bytes(tmp_path: Path) -> None:
    names = ["9-a", "10-b", "10-b.bash", "_x", "a.sh", ".hidden", "B", "-1", "two words", "a\n", "caf\u00e9"]
    stdin = "".join(f"{tmp_path}/environment.d/{name}\n" for name in names[:-3]).encode()
    result = tools.run([SORT, "-n"], doing="sorting", stdin=stdin, environment={"LC_ALL": "C"})
    assert order_environment(names) == [Path(line).name for line in result.stdout.splitlines()]


@pytest.mark.parametrize("name", ["50-foo", "_", "-", "A_b-9"])
def test_script_names(name: str) -> None:
    assert is_script_name(name)


@pytest.mark.parametrize("name", ["", "foo.sh", "50 foo", "50-foo\n", "50-foo~", "f\u00f6\u00f6", "\u0663", "a/b"])
def test_no_script_names(name: str) -> None:
    assert not is_script_name(name)


def test_the_scripts_of_a_phase_are_those_of_dib_run_parts(tmp_path: Path) -> None:
    names = ["9-nine", "10-ten", "-1", "010-octal", "10-Ten", "foo.sh", "two words", ".hidden", "plain", "_u"]
    element = make_element(tmp_path, "one", {f"install.d/{name}": "#!/bin/sh\n" for name in names})
    hooks = element / "install.d"
    (hooks / "plain").chmod(0o644)
    (hooks / "group").write_text("")
    (hooks / "group").chmod(0o610)
    (hooks / "50-link").symlink_to("10-ten")
    (hooks / "51-dangling").symlink_to("nothing")
    (hooks / "52-directory").mkdir()
    (hooks / "53-to-directory").symlink_to("52-directory")
    tree = merged(tmp_path, element)
    (tree.directory / "install.d" / "60-added").write_text("")
    (tree.directory / "install.d" / "60-added").chmod(0o755)

    scripts = tree.scripts(Phase.INSTALL)
    run_parts = find_installation(None).library_dir / "dib-run-parts"
    result = tools.run([BASH, run_parts, "--list", tree.directory / "install.d"], doing="listing with DIB")
    theirs = [Path(line).name for line in result.stdout.splitlines()]
    if os.geteuid() != 0:
        theirs = order([*theirs, "group"])
    assert [script.name for script in scripts] == theirs
    assert len(scripts) == 9
    assert scripts[-1] == Script(phase=Phase.INSTALL, name="60-added", element=None)
    assert {script.element for script in scripts[:-1]} == {"one"}
    assert tree.scripts(Phase.CLEANUP) == ()


# --- compose, beside DIB

GENERATE_HOOKS = """
set -e
source "$_LIB/common-functions"
get_image_element_array() { printf '%s' "$ELEMENT_ARRAY"; }
generate_hooks
"""


def dib_hooks(chosen: Sequence[Element], into: Path) -> tools.Result:
    """What DIB's generate_hooks makes of *chosen*; its output names the elements in its order."""
    variables = {
        "_LIB": str(find_installation(None).library_dir),
        "ELEMENT_ARRAY": "".join(f"[{element.name}]={element.path} " for element in chosen),
        "TMP_HOOKS_PATH": str(into),
        "PATH": os.environ["PATH"],
        "LC_ALL": "C",
    }
    return tools.run([BASH, "-c", GENERATE_HOOKS], doing="running DIB", environment=variables, check=False)


def assert_same_as_dib(chosen: Sequence[Element], tmp_path: Path) -> HookTree:
    result = dib_hooks(chosen, tmp_path / "theirs")
    assert result.exit_status == 0, result.stdout + result.stderr
    # Of files that may replace each other the last stays, in DIB's order, which is that of a bash hash.
    said = "Copying hooks for "
    names = [line.removeprefix(said) for line in result.stdout.splitlines() if line.startswith(said)]
    by_name = {element.name: element for element in chosen}
    assert sorted(names) == sorted(by_name)
    tree = compose([by_name[name] for name in names], tmp_path / "ours", excluded_scripts=frozenset())
    assert described(tree.directory) == described(tmp_path / "theirs")
    return tree


@pytest.mark.parametrize(
    "words",
    [
        "debian-minimal vm",
        "debian vm cloud-init-nocloud devuser",
        "ubuntu vm dhcp-all-interfaces block-device-efi",
        "ubuntu-minimal vm simple-init growroot openssh-server block-device-gpt",
        "centos vm epel selinux-permissive",
        "fedora vm block-device-efi-lvm enable-serial-console",
        "opensuse vm",
        "gentoo vm",
        "rocky-container dynamic-login iscsi-boot hwburnin baremetal",
        "debian-minimal ramdisk-base dracut-ramdisk ilo proliant-tools local-config",
    ],
)
def test_hook_trees_are_those_of_dib(words: str, tmp_path: Path) -> None:
    available = discover([find_installation(None).elements_dir])
    chosen = resolve(requested([words], arch="amd64", skip_base=False), available)
    tree = assert_same_as_dib(chosen, tmp_path)
    files = {name for name, (kind, *_) in described(tree.directory).items() if kind != stat.S_IFDIR}
    assert set(tree.owners) == files
    assert len(files) > 50
    by_name = {element.name: element for element in chosen}
    for relative, owner in tree.owners.items():
        assert (by_name[owner].path / relative).exists()


def test_an_unusual_tree_is_that_of_dib(tmp_path: Path) -> None:
    one = make_element(
        tmp_path,
        "one",
        {
            "install.d/.hidden": "not copied",
            "install.d/sub/.hidden": "copied",
            "install.d/sub/tests/file": "copied",
            "install.d/sub/shared": "of one",
            "install.d/pkg/one/__pycache__/x.pyc": "copied",
            "install.d/50-mode": "",
            "tests/file": "not copied",
            "__pycache__/x": "not copied",
            ".hidden-directory/file": "copied",
            ".hidden-file": "copied",
            "module.pyc": "not copied",
            "data.pycc": "copied",
            "shared-top": "of one",
        },
    )
    two = make_element(tmp_path, "two", {"install.d/sub/shared": "of two", "install.d/sub/two": "", "shared-top": "2"})
    three = make_element(tmp_path, "three", {"real/50-three": "", "top-target": "text"})
    (one / "install.d" / "50-mode").chmod(0o4751)
    (one / "install.d" / "sub").chmod(0o750)
    (two / "install.d" / "sub").chmod(0o711)
    (one / "install.d" / "to-file").symlink_to("50-mode")
    (one / "install.d" / "dangling").symlink_to("/no/such/file")
    (one / "install.d" / "to-device").symlink_to("/dev/null")
    (one / "install.d" / "to-directory").symlink_to("sub")
    (one / "dangling").symlink_to("nothing")
    (one / "to-device").symlink_to("/dev/null")
    (three / "pre-install.d").symlink_to("real")
    (three / "top-link").symlink_to("top-target")
    for number, path in enumerate([*one.rglob("*"), *two.rglob("*"), *three.rglob("*")]):
        os.utime(path, ns=(0, 10**18 + number * 1_000_000_007), follow_symlinks=False)
    tree = assert_same_as_dib(elements(one, two, three), tmp_path)
    assert (tree.directory / "pre-install.d" / "50-three").is_file()
    assert not (tree.directory / "install.d" / ".hidden").exists()


@pytest.mark.parametrize(
    ("first", "second", "relative"),
    [
        ("install.d/50-same", "install.d/50-same", "install.d/50-same"),
        ("bin/same", "bin/same", "bin/same"),
        ("install.d/50-same", "install.d/50-same/below", "install.d/50-same"),
        ("install.d/50-same/below", "install.d/50-same", "install.d/50-same"),
        ("install.d/sub/x", "install.d/sub/x/below", "install.d/sub/x"),
        ("install.d/sub/x/below", "install.d/sub/x", "install.d/sub/x"),
        ("install.d", "install.d/50-x", "install.d"),
        ("install.d/50-x", "install.d", "install.d"),
    ],
)
def test_what_dib_refuses_is_refused(first: str, second: str, relative: str, tmp_path: Path) -> None:
    one = make_element(tmp_path, "one", {first: ""})
    two = make_element(tmp_path, "two", {second: ""})
    assert dib_hooks(elements(one, two), tmp_path / "theirs").exit_status != 0
    assert messages(tmp_path, one, two) == [clash(relative, "one", "two")]


# --- compose, beyond DIB


def test_all_duplicates_are_told_together(tmp_path: Path) -> None:
    paths = [
        make_element(tmp_path, name, {"install.d/50-x": "", f"install.d/50-{name}": "", "root.d/10-y": ""})
        for name in ("one", "two", "three")
    ]
    assert messages(tmp_path, *paths) == [
        clash("install.d/50-x", "one", "two"),
        clash("root.d/10-y", "one", "two"),
        clash("install.d/50-x", "one", "three"),
        clash("root.d/10-y", "one", "three"),
    ]


def test_a_later_element_replaces_files_at_the_top(tmp_path: Path) -> None:
    one = make_element(tmp_path, "one", {"README": "one", "install.d/sub/data": "one"})
    two = make_element(tmp_path, "two", {"README": "two", "install.d/sub/data": "two"})
    tree = merged(tmp_path, one, two)
    assert (tree.directory / "README").read_text() == "two"
    assert (tree.directory / "install.d/sub/data").read_text() == "two"
    assert tree.owners == {"README": "two", "install.d/sub/data": "two"}


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("mine")
    one = make_element(tmp_path, "one", {"install.d/sub/x": ""})
    (one / "README").symlink_to(victim / "file")
    (one / "install.d" / "sub" / "file").symlink_to(victim / "file")
    two = make_element(tmp_path, "two", {"README": "two", "install.d/sub/file": "two"})
    tree = merged(tmp_path, one, two)
    assert (victim / "file").read_text() == "mine"
    assert (tree.directory / "README").read_text() == "two"
    assert not (tree.directory / "install.d/sub/file").is_symlink()


def test_a_link_to_a_directory_is_not_followed_into(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    one = make_element(tmp_path, "one", {"install.d/x": ""})
    (one / "install.d" / "sub").symlink_to(victim)
    two = make_element(tmp_path, "two", {"install.d/sub/evil": ""})
    assert messages(tmp_path, one, two) == [clash("install.d/sub", "one", "two")]
    assert list(victim.iterdir()) == []


@pytest.mark.parametrize("place", ["install.d", "install.d/sub", "."])
def test_special_files_are_refused_and_not_opened(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_element(tmp_path, "one", {"install.d/sub/x": ""})
    os.mkfifo(one / place / "fifo")
    monkeypatch.chdir(one / place)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        assert messages(tmp_path, one) == [
            f"copying '{one / place / name}': it is a device, FIFO or socket" for name in ("fifo", "socket")
        ]


def test_names_that_a_shell_would_split(tmp_path: Path) -> None:
    names = ["two words", "line\nend", "-rf", "*", "$(id)", "'", "caf\udce9"]
    files = {f"install.d/{name}": name.encode(errors="surrogateescape").hex() for name in names}
    one = make_element(tmp_path / "odd parent", "one", {**files, "with blank/50-x": "x", "read me": "y"})
    tree = merged(tmp_path, one)
    copied = {path.name: path.read_text() for path in (tree.directory / "install.d").iterdir()}
    assert copied == {name: files[f"install.d/{name}"] for name in names}
    assert (tree.directory / "with blank" / "50-x").read_text() == "x"
    assert (tree.directory / "read me").read_text() == "y"
    assert tree.scripts(Phase.INSTALL) == (Script(phase=Phase.INSTALL, name="-rf", element="one"),)


def test_excluded_scripts_are_left_out_whichever_element_has_them(tmp_path: Path) -> None:
    one = make_element(
        tmp_path,
        "one",
        {"install.d/50-out": "", "root.d/50-out": "", "install.d/50-in": "", "environment.d/50-out": "",
         "install.d/one-source-install/50-out": "", "install.d/one-source-install/60-in": "", "lib/sub/50-out": ""},
    )  # fmt: skip
    two = make_element(tmp_path, "two", {"install.d/50-out": "", "bin/50-out": "", "cleanup.d/50-out": "data"})
    (two / "cleanup.d" / "50-out").chmod(0o644)
    (one / "install.d" / "one-source-install" / "50-out").chmod(0o755)
    tree = merged(tmp_path, one, two, excluded=["50-out"])
    assert set(tree.owners) == {
        "install.d/50-in", "environment.d/50-out", "bin/50-out", "cleanup.d/50-out",
        # The element install-types links what is in it to install.d.
        "install.d/one-source-install/60-in", "lib/sub/50-out",
    }  # fmt: skip


def test_a_read_only_directory_can_be_merged_and_removed(tmp_path: Path) -> None:
    one = make_element(tmp_path, "one", {"install.d/sub/one": ""})
    two = make_element(tmp_path, "two", {"install.d/sub/two": ""})
    for element in (one, two):
        (element / "install.d" / "sub").chmod(0o555)
    tree = merged(tmp_path, one, two)
    copy = tree.directory / "install.d" / "sub"
    assert sorted(path.name for path in copy.iterdir()) == ["one", "two"]
    assert stat.S_IMODE(copy.stat().st_mode) == 0o755
    shutil.rmtree(tree.directory)
    for element in (one, two):
        (element / "install.d" / "sub").chmod(0o755)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_told_together(tmp_path: Path) -> None:
    one = make_element(tmp_path, "one", {"install.d/50-x": "", "root.d/sub/y": ""})
    (one / "install.d" / "50-x").chmod(0)
    (one / "root.d" / "sub").chmod(0)
    found = messages(tmp_path, one)
    (one / "root.d" / "sub").chmod(0o755)
    assert found == [
        f"copying '{one / 'install.d/50-x'}': Permission denied",
        f"copying '{one / 'root.d/sub'}': Permission denied",
    ]


def test_an_element_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert messages(tmp_path, gone) == [f"copying '{gone}': No such file or directory"]


@pytest.mark.parametrize("into", ["h", "h" * 100], ids=["source", "target"])
def test_a_tree_too_deep_for_the_system(into: str, tmp_path: Path) -> None:
    """Whichever path is too long first, that of the element's file or that of its copy."""
    one = make_element(tmp_path, "one", {"install.d/50-x": ""})
    top = os.open(one / "install.d", os.O_RDONLY)
    try:
        for _ in range(90):
            os.mkdir("d" * 50, dir_fd=top)
            below = os.open("d" * 50, os.O_RDONLY, dir_fd=top)
            os.close(top)
            top = below
    finally:
        os.close(top)
    with pytest.raises(ElementError, match="File name too long") as caught:
        compose(elements(one), tmp_path / into, excluded_scripts=frozenset())
    assert len(caught.value.problems) == 1


def test_a_link_to_its_own_element_does_no_harm(tmp_path: Path) -> None:
    one = make_element(tmp_path, "one", {"install.d/50-x": ""})
    (one / "circle").symlink_to(".")
    (one / "install.d" / "up").symlink_to("..")
    tree = merged(tmp_path, one)
    assert (tree.directory / "circle" / "circle").is_symlink()
    assert (tree.directory / "install.d" / "up").readlink() == Path("..")
