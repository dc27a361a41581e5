# SPDX-License-Identifier: Apache-2.0
"""Finding elements, reading their lists, and what is said when a choice of them cannot be built."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers import make_element
from virt_dib.elements import Element, Reason, SelectionProblem, discover, requested, resolve
from virt_dib.errors import ElementError, UsageError


def element(name: str, *, depends: Sequence[str] = (), provides: Sequence[str] = ()) -> Element:
    return Element(name=name, path=Path("/elements") / name, depends=frozenset(depends), provides=frozenset(provides))


def catalogue(*elements: Element) -> dict[str, Element]:
    system = element("tiny-os", provides=["operating-system"])
    return {element.name: element for element in (system, *elements)}


def names(elements: Sequence[Element]) -> list[str]:
    return [element.name for element in elements]


def reasons(error: UsageError) -> list[Reason]:
    return [problem.reason for problem in error.problems if isinstance(problem, SelectionProblem)]


# --- discover


def test_an_element_is_a_directory_with_two_lists(tmp_path: Path) -> None:
    make_element(tmp_path, "one", {}, depends=["two", "three"], provides=["thing"])
    (tmp_path / "README").write_text("no element")
    assert discover([tmp_path]) == {
        "one": Element(
            name="one",
            path=tmp_path / "one",
            depends=frozenset({"two", "three"}),
            provides=frozenset({"thing"}),
        )
    }


def test_lines_are_stripped_and_empty_ones_ignored(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "element-deps").write_bytes(b"  a \r\n\r\n\tb\n\n# c\rd\x0be")
    assert discover([tmp_path])["one"].depends == {"a", "b", "# c", "d\x0be"}


def test_an_earlier_directory_wins(tmp_path: Path) -> None:
    for directory in ("first", "second"):
        make_element(tmp_path / directory, "one", {})
    make_element(tmp_path / "second", "two", {})
    found = discover([tmp_path / "first", tmp_path / "second"])
    assert {name: element.path for name, element in found.items()} == {
        "one": tmp_path / "first" / "one",
        "two": tmp_path / "second" / "two",
    }


def test_a_link_has_the_name_of_what_it_points_to(tmp_path: Path) -> None:
    target = make_element(tmp_path / "elsewhere", "real", {})
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "alias").symlink_to(target)
    (tmp_path / "path" / "dangling").symlink_to("nothing")
    (tmp_path / "path" / "circle").symlink_to("circle")
    assert {name: element.path for name, element in discover([tmp_path / "path"]).items()} == {"real": target}


def test_of_two_with_one_real_name_the_directory_wins_over_the_link(tmp_path: Path) -> None:
    other = make_element(tmp_path / "elsewhere", "one", {})
    own = make_element(tmp_path / "path", "one", {})
    (tmp_path / "path" / "a-link").symlink_to(other)
    (tmp_path / "path" / "z-link").symlink_to(other)
    assert discover([tmp_path / "path"])["one"].path == own


def test_a_relative_search_path_gives_absolute_elements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_element(tmp_path / "here", "one", {})
    monkeypatch.chdir(tmp_path)
    assert discover([Path("here")])["one"].path == tmp_path / "here" / "one"


def test_all_bad_directories_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "good").mkdir()
    with pytest.raises(UsageError) as caught:
        discover([tmp_path / "absent", tmp_path / "good", tmp_path / "file"])
    assert [problem.message for problem in caught.value.problems] == [
        f"looking for elements in '{tmp_path / 'absent'}': No such file or directory",
        f"looking for elements in '{tmp_path / 'file'}': Not a directory",
    ]


def test_all_unreadable_lists_are_told_together(tmp_path: Path) -> None:
    directories = {name: make_element(tmp_path, name, {}) for name in ("a", "b", "c", "d", "e", "f")}
    (directories["a"] / "element-deps").mkdir()
    os.mkfifo(directories["b"] / "element-provides")
    (directories["c"] / "element-deps").write_bytes(b"caf\xe9\n")
    (directories["d"] / "element-deps").symlink_to("/dev/zero")
    (directories["e"] / "element-deps").symlink_to("element-deps")
    with (directories["f"] / "element-deps").open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(ElementError) as caught:
        discover([tmp_path])
    expected = {
        ("a/element-deps", "Is a directory"),
        ("b/element-provides", "not a regular file"),
        ("c/element-deps", "it is not UTF-8"),
        ("d/element-deps", "not a regular file"),
        ("e/element-deps", "Too many levels of symbolic links"),
        ("f/element-deps", "larger than 16 MiB"),
    }
    assert {problem.message for problem in caught.value.problems} == {
        f"reading '{tmp_path / path}': {reason}" for path, reason in expected
    }
    assert all(problem.hint for problem in caught.value.problems)


def test_a_socket_as_a_list_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_element(tmp_path, "one", {})
    monkeypatch.chdir(directory)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("element-deps")
        with pytest.raises(ElementError, match="one/element-deps'"):
            discover([tmp_path])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_list_without_read_permission(tmp_path: Path) -> None:
    directory = make_element(tmp_path, "one", {}, depends=["two"])
    (directory / "element-deps").chmod(0)
    with pytest.raises(ElementError, match="one/element-deps': Permission denied"):
        discover([tmp_path])


def test_odd_names(tmp_path: Path) -> None:
    odd = ["two words", "line\nend", "-x", "$(id)", "caf\udce9", "é"]
    for name in odd:
        make_element(tmp_path, name, {}, provides=["operating-system"])
    found = discover([tmp_path])
    assert set(found) == set(odd)
    assert [names(resolve([name], found)) for name in odd] == [[name] for name in odd]


# --- requested


@pytest.mark.parametrize(
    ("words", "arch", "skip_base", "expected"),
    [
        (["debian"], "amd64", False, "base debian"),
        (["debian"], "amd64", True, "debian"),
        ([" debian \n vm\t", "", "  "], "amd64", True, "debian vm block-device-mbr"),
        (["vm debian"], "arm64", True, "vm debian block-device-efi"),
        (["vm debian"], "aarch64", True, "vm debian block-device-efi"),
        (["vm debian"], "armhf", True, "vm debian block-device-mbr"),
        (["vm", "block-device-gpt"], "arm64", True, "vm block-device-gpt"),
        (["vm", "block-device-"], "amd64", True, "vm block-device-"),
        (["vm", "my-block-device-x"], "amd64", True, "vm my-block-device-x block-device-mbr"),
        (["vmware"], "amd64", True, "vmware"),
        (["debian", "base", "debian"], "amd64", False, "base debian"),
    ],
)
def test_requested(words: list[str], arch: str, skip_base: bool, expected: str) -> None:  # noqa: FBT001 - a table's column
    assert " ".join(requested(words, arch=arch, skip_base=skip_base)) == expected


@pytest.mark.parametrize(("skip_base", "expected"), [(True, "ramdisk debian"), (False, "ramdisk base debian")])
def test_the_ramdisk_element_comes_first(skip_base: bool, expected: str) -> None:  # noqa: FBT001 - a table's column
    # contract section 1.1: base is put in front, then this.
    names = requested(["debian"], arch="amd64", skip_base=skip_base, ramdisk_element="ramdisk")
    assert " ".join(names) == expected


def test_a_blank_of_another_kind_does_not_separate() -> None:
    assert requested(["a\u00a0b\x0bc"], arch="amd64", skip_base=True) == ("a\u00a0b\x0bc",)


@pytest.mark.parametrize("words", [[], [""], [" ", "\n\t"]])
@pytest.mark.parametrize("skip_base", [True, False])
def test_no_elements_at_all(words: list[str], skip_base: bool) -> None:  # noqa: FBT001 - a table's column
    with pytest.raises(UsageError, match="no element named"):
        requested(words, arch="amd64", skip_base=skip_base)


# --- resolve


def test_the_order_is_breadth_first() -> None:
    available = catalogue(
        element("top", depends=["c", "b"]),
        element("b", depends=["d"]),
        element("c", depends=["a"]),
        element("a"),
        element("d", depends=["top"]),
    )
    assert names(resolve(["top", "tiny-os"], available)) == ["top", "tiny-os", "b", "c", "d", "a"]


def test_a_provided_name_is_not_built() -> None:
    available = catalogue(
        element("vm", depends=["block-device", "bootloader"]),
        element("block-device-gpt", provides=["block-device"]),
        element("bootloader"),
        element("zipl", provides=["bootloader"]),
    )
    assert names(resolve(["vm", "zipl", "block-device-gpt", "tiny-os"], available)) == [
        "vm",
        "zipl",
        "block-device-gpt",
        "tiny-os",
    ]


def test_a_provider_comes_before_the_name_it_provides() -> None:
    """Where DIB looks at such names in the order of a set, and now and then does not find one."""
    available = catalogue(
        element("top", depends=["a-virtual", "z-provider", "m-replaced"]),
        element("z-provider", provides=["a-virtual", "m-replaced"]),
        element("m-replaced", depends=["not-there"]),
    )
    assert names(resolve(["tiny-os", "top"], available)) == ["tiny-os", "top", "z-provider"]


def test_a_name_twice_counts_once() -> None:
    assert names(resolve(["tiny-os", "tiny-os"], catalogue())) == ["tiny-os"]


def test_excluded_elements_are_ignored_wherever_they_appear() -> None:
    available = catalogue(
        element("top", depends=["unwanted", "gone", "kept"]),
        element("kept"),
        element("unwanted", depends=["worse"], provides=["operating-system"]),
    )
    wanted = ["unwanted", "top", "tiny-os"]
    assert names(resolve(wanted, available, excluded=frozenset({"unwanted", "gone"}))) == ["top", "tiny-os", "kept"]


def test_an_excluded_operating_system_is_missed() -> None:
    with pytest.raises(UsageError) as caught:
        resolve(["tiny-os"], catalogue(), excluded=frozenset({"tiny-os"}))
    assert reasons(caught.value) == [Reason.NO_OPERATING_SYSTEM]


def test_dependency_circles_and_long_chains() -> None:
    count = 20_000
    chain = [element(f"e{number}", depends=[f"e{(number + 1) % count}"]) for number in range(count)]
    found = resolve(["e0", "tiny-os"], catalogue(*chain))
    assert len(found) == count + 1
    assert names(resolve(["self", "tiny-os"], catalogue(element("self", depends=["self"])))) == ["self", "tiny-os"]


def test_a_list_of_a_megabyte(tmp_path: Path) -> None:
    lines = [f"missing-element-{number}" for number in range(50_000)]
    make_element(tmp_path, "greedy", {}, depends=lines, provides=["operating-system"])
    for number in range(150):
        make_element(tmp_path, f"other-{number}", {})
    with pytest.raises(UsageError) as caught:
        resolve(["greedy"], discover([tmp_path]))
    assert len(caught.value.problems) == 50_000


def test_a_missing_element_with_its_likely_name() -> None:
    available = catalogue(element("ubuntu", provides=["operating-system"]))
    with pytest.raises(UsageError) as caught:
        resolve(["ubunut"], available)
    (problem,) = caught.value.problems
    assert problem.message == "element 'ubunut' not found"
    assert problem.hint == "did you mean 'ubuntu'? searched /elements"


def test_a_missing_dependency_names_who_needs_it() -> None:
    with pytest.raises(UsageError, match=r"^element 'xyzzy' not found, needed by 'one'$"):
        resolve(["one", "tiny-os"], catalogue(element("one", depends=["xyzzy"])))


def test_no_elements_on_the_search_path() -> None:
    with pytest.raises(UsageError) as caught:
        resolve(["one"], {})
    assert reasons(caught.value) == [Reason.MISSING, Reason.NO_OPERATING_SYSTEM]
    assert all(problem.hint and "-p" in problem.hint for problem in caught.value.problems)


def test_two_providers_name_both_and_who_needs_them() -> None:
    available = catalogue(element("other", depends=["other-os"]), element("other-os", provides=["operating-system"]))
    with pytest.raises(UsageError) as caught:
        resolve(["tiny-os", "other"], available)
    (problem,) = caught.value.problems
    assert problem.message == (
        "elements 'tiny-os' and 'other-os' cannot be built together: each provides 'operating-system'"
    )
    assert problem.hint == "leave out all but one of them; 'other-os' is needed by 'other'"


def test_asking_for_what_another_provides() -> None:
    available = catalogue(element("grub2"), element("zipl", provides=["grub2"]))
    with pytest.raises(UsageError) as caught:
        resolve(["grub2", "zipl", "tiny-os"], available)
    (problem,) = caught.value.problems
    assert problem.message == "element 'grub2' is asked for, but provided by 'zipl' already"
    assert problem.hint == "leave out 'grub2'"


def test_without_an_operating_system_some_are_named() -> None:
    systems = [element(f"os-{number}", provides=["operating-system"]) for number in range(9)]
    with pytest.raises(UsageError) as caught:
        resolve(["plain"], catalogue(element("plain"), *systems))
    (problem,) = caught.value.problems
    assert problem.message == "none of the elements is an operating system"
    assert problem.hint == "add one, such as 'os-0', 'os-1', 'os-2', 'os-3' or 'os-4'"


def test_all_that_is_wrong_is_told_at_once() -> None:
    available = catalogue(
        element("a", provides=["x"], depends=["qwertyuiop"]),
        element("b", provides=["x"]),
        element("c", provides=["x"]),
        element("d"),
        element("e", provides=["d"]),
    )
    with pytest.raises(UsageError) as caught:
        resolve(["zzzzzzz", "a", "b", "c", "d", "e"], available)
    assert [problem.message for problem in caught.value.problems] == [
        "element 'zzzzzzz' not found",
        "elements 'a', 'b' and 'c' cannot be built together: each provides 'x'",
        "element 'qwertyuiop' not found, needed by 'a'",
        "element 'd' is asked for, but provided by 'e' already",
        "none of the elements is an operating system",
    ]
    assert reasons(caught.value) == [
        Reason.MISSING,
        Reason.ALREADY_PROVIDED,
        Reason.MISSING,
        Reason.ALREADY_PROVIDED,
        Reason.NO_OPERATING_SYSTEM,
    ]
    assert caught.value.exit_status == 2
