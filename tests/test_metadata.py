# SPDX-License-Identifier: Apache-2.0
"""A tree of files of every kind comes out of the sandbox exactly as it comes out of the appliance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import ext4
from ext4 import Entry
from helpers import ISOLATIONS, TESTS, make_element, skip_without, virt_dib

pytestmark = pytest.mark.appliance

SECOND = 10**9
MADE_ENTRIES = 3224
"""What tests/data/strange_tree.py makes, its top included."""
COVERED = {b"/proc", b"/sys", b"/dev"}
"""Directories of odd modes on which something is mounted while the elements run."""
OF_THE_BUILD = {b"/lost+found"}
LINKED_LINKS = {
    frozenset({b"/made/links/link1", b"/made/links/link2"}),
    frozenset({b"/made/links/long1", b"/made/links/below/long2"}),
}
"""Names of symbolic links that are hard links."""


@dataclass(frozen=True)
class Built:
    image: Path
    entries: Mapping[bytes, Entry]

    @property
    def made(self) -> dict[bytes, Entry]:
        """What the script made."""
        return {path: entry for path, entry in self.entries.items() if path == b"/made" or path[:6] == b"/made/"}


@pytest.fixture(scope="module")
def built(element_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """The image of one element, built in either isolation."""
    directory = tmp_path_factory.mktemp("metadata")
    script = (TESTS / "data" / "strange_tree.py").read_text()
    files = {"root.d/90-strange-tree": script, "post-root.d/90-strange-tree": script}
    make_element(directory / "elements", "strange-tree", files)
    found = {}
    for isolation in ISOLATIONS:
        skip_without(isolation)
        output_dir = directory / isolation
        output_dir.mkdir()
        run = virt_dib(
            [
                "--name", "disk", "--formats", "raw", "--size", "1G", "--skip-base", "--no-network",
                "--isolation", isolation, "-p", element_dir, "-p", directory / "elements", "tiny-os", "strange-tree",
            ],
            cwd=output_dir,
        )  # fmt: skip
        assert run.exit_status == 0, run.stdout + run.stderr
        with ext4.opened(output_dir / "disk.raw") as file_system:
            found[isolation] = Built(output_dir / "disk.raw", file_system.entries())
    return found


def differences(built: Mapping[str, Built], paths: set[bytes], *, without: frozenset[str] = frozenset()) -> list[str]:
    """What is not the same of *paths*, one line for each."""
    found = []
    for path in sorted(paths):
        vm, sandbox = (ext4.told(built[isolation].entries[path], without=without) for isolation in ISOLATIONS)
        found += [f"{path!r}: {name}: vm {vm[name]!r}, sandbox {sandbox[name]!r}" for name in vm
                  if vm[name] != sandbox[name]]  # fmt: skip
    return found


def test_both_have_everything_that_was_made(built: dict[str, Built]) -> None:
    assert [len(built[isolation].made) for isolation in ISOLATIONS] == [MADE_ENTRIES, MADE_ENTRIES]
    assert [len(built[isolation].entries) > MADE_ENTRIES + 200 for isolation in ISOLATIONS] == [True, True]
    assert set(built["vm"].entries) == set(built["sandbox"].entries)


def test_what_was_made_is_the_same_in_all_respects(built: dict[str, Built]) -> None:
    assert differences(built, set(built["vm"].made) | COVERED) == []


def test_the_rest_of_the_tree_is_the_same_but_for_the_times(built: dict[str, Built]) -> None:
    rest = set(built["vm"].entries) - set(built["vm"].made) - OF_THE_BUILD
    assert {b"/", b"/etc/fstab", b"/bin/busybox"} <= rest
    assert differences(built, rest, without=frozenset({"mtime_ns"})) == []


def hard_links(built: Built) -> set[frozenset[bytes]]:
    """Names of one file each."""
    names: dict[int, set[bytes]] = {}
    for path, entry in built.entries.items():
        names.setdefault(entry.inode, set()).add(path)
    return {frozenset(paths) for paths in names.values() if len(paths) > 1}


def test_hard_links_join_the_same_names(built: dict[str, Built]) -> None:
    assert hard_links(built["vm"]) == hard_links(built["sandbox"])
    assert {
        frozenset({b"/made/links/hard1", b"/made/links/hard2", b"/made/links/below/hard3"}),
        frozenset({b"/made/links/empty1", b"/made/links/empty2"}),
        frozenset({b"/made/special/fifo", b"/made/special/below/fifo2"}),
        frozenset({b"/made/special/console", b"/made/special/below/console2"}),
    } <= hard_links(built["vm"])


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_symbolic_links_may_have_several_names(built: dict[str, Built], isolation: str) -> None:
    assert hard_links(built[isolation]) >= LINKED_LINKS


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_holes_take_no_space_and_content_does(built: dict[str, Built], isolation: str) -> None:
    made = built[isolation].made
    taken = {name: made[f"/made/contents/{name}".encode()].blocks_bytes for name in ("sparse", "hole", "large")}
    assert taken["sparse"] < 1 << 20
    assert taken["hole"] < 1 << 20
    assert taken["large"] >= 4 << 20
    assert made[b"/made/contents/sparse"].size == 64 << 20
    assert made[b"/made/contents/hole"].size == 256 << 20


# Written down once more, so that what both builds lose is missed too.
EXPECTED: Mapping[bytes, Mapping[str, object]] = {
    b"/": {"mode": 0o41751, "uid": 1000, "gid": 60000},
    b"/proc": {"mode": 0o40555, "uid": 0, "gid": 0, "mtime_ns": 10**18 + 1},
    b"/sys": {"mode": 0o41711, "uid": 65535, "gid": 65535, "mtime_ns": 10**18 + 2},
    b"/dev": {"mode": 0o42701, "uid": 1000, "gid": 1000, "mtime_ns": 10**18 + 3},
    b"/made/owners/65535-0": {"uid": 65535, "gid": 0, "mode": 0o100644},
    b"/made/owners/60000-65534": {"uid": 60000, "gid": 65534},
    b"/made/modes/file-0000": {"mode": 0o100000},
    b"/made/modes/file-7777": {"mode": 0o107777},
    b"/made/modes/directory-0000": {"mode": 0o40000},
    b"/made/modes/setuid": {"mode": 0o106755, "uid": 65535, "gid": 65534},
    b"/made/modes/shared": {"mode": 0o43770, "uid": 1000, "gid": 60000},
    b"/made/attributes/capable": {
        "attributes": (("security.capability", bytes.fromhex("0100000200240000000000000000000000000000")),)
    },
    b"/made/attributes/short": {"attributes": (("user.name", b"a value"),)},
    b"/made/attributes/binary": {"attributes": (("user.bytes", bytes(range(256))),)},
    b"/made/attributes/long": {"attributes": (("user.long", b"v" * 3000),)},
    b"/made/links/soft-4000": {"target": b"t" * 4000, "size": 4000},
    b"/made/links/odd": {"target": b"new\nline \xe9 \"'", "uid": 65535, "gid": 1000, "mode": 0o120777},
    b"/made/special/fifo": {"mode": 0o10640, "entry_kind": 5, "uid": 1, "gid": 65535, "links": 2},
    b"/made/special/socket": {"mode": 0o140777, "entry_kind": 6},
    b"/made/special/console": {"mode": 0o20600, "entry_kind": 3, "device": (5, 1), "links": 2},
    b"/made/special/below/console2": {"mode": 0o20600, "entry_kind": 3, "device": (5, 1)},
    b"/made/special/tape": {"mode": 0o24640, "device": (254, 256)},
    b"/made/special/large": {"mode": 0o20000, "device": (4095, 0xFFFFF)},
    b"/made/special/disk": {"mode": 0o60670, "entry_kind": 4, "device": (8, 0)},
    b"/made/special/nvme": {"mode": 0o60660, "entry_kind": 4, "device": (259, 70000), "gid": 6},
    b"/made/special/whiteout": {"mode": 0o20600, "device": (0, 0)},
    b"/made/contents/empty": {"size": 0, "mode": 0o100644},
    b"/made/names/new\nline": {"size": 2},
    b"/made/names/\xff\n/\xfe/below": {"size": 2},
    b"/made/names/" + b"l" * 255: {"size": 3},
    b"/made/times/year 1901": {"mtime_ns": -(2**31) * SECOND},
    b"/made/times/before 1970": {"mtime_ns": -1},
    b"/made/times/the epoch": {"mtime_ns": 0},
    b"/made/times/after 2038": {"mtime_ns": 2**31 * SECOND + 1},
    b"/made/times/links/year 2400": {"mtime_ns": 13569465600 * SECOND + 987654321},
}


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("path", EXPECTED, ids=repr)
def test_it_is_what_the_element_made(built: dict[str, Built], path: bytes, isolation: str) -> None:
    entry = dataclasses.asdict(built[isolation].entries[path])
    assert {name: entry[name] for name in EXPECTED[path]} == EXPECTED[path]


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_acls_are_kept(built: dict[str, Built], isolation: str) -> None:
    made = built[isolation].made
    for name, kinds in {
        b"acl": {"access"},
        b"acl-default": {"access", "default"},
        b"acl-default/inherited": {"access"},
        b"acl-default/inherited-too": {"access", "default"},
    }.items():
        found = dict(made[b"/made/attributes/" + name].attributes)
        assert set(found) == {f"system.posix_acl_{kind}" for kind in kinds}
    assert len(made[b"/made/attributes/many"].attributes) == 20
    assert [name for name, _ in made[b"/made/attributes/all"].attributes] == [
        "security.capability", "system.posix_acl_access", "user.name"
    ]  # fmt: skip


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_the_check_finds_nothing_wrong(built: dict[str, Built], isolation: str) -> None:
    assert ext4.complaints(built[isolation].image) == ""


def test_superblocks_agree_in_what_mkfs_decides(built: dict[str, Built]) -> None:
    vm, sandbox = (ext4.superblock(built[isolation].image) for isolation in ISOLATIONS)
    assert len(ext4.DECIDED_BY_MKFS & set(vm)) > 30
    assert {name: sandbox.get(name) for name in ext4.DECIDED_BY_MKFS} == {
        name: vm.get(name) for name in ext4.DECIDED_BY_MKFS
    }
    assert vm["Filesystem volume name"] == "cloudimg-rootfs"
    assert vm["Total journal size"] == "64M"
