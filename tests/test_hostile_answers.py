# SPDX-License-Identifier: Apache-2.0
"""What virt-dib asks the guest between the phases, and answers made up to hurt: an error, or nothing of it.

The guest here is that of guests.py.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import cast

import pytest

from guests import Guest
from helpers import make_tiny_os
from virt_dib.appliance import Appliance
from virt_dib.disk_stage import DiskStage, Lengths
from virt_dib.errors import ApplianceError
from virt_dib.jobs import JobResult
from virt_dib.machine import Disk
from virt_dib.monitor import BuildMonitor
from virt_dib.old_disk import OldDisk
from virt_dib.phases import Phases
from virt_dib.plan import BuildPlan, make_plan
from virt_dib.releases import DiskMaker
from virt_dib.sandbox import Extent
from virt_dib.spec import BuildSpec
from virt_dib.tree_stage import make_tree

GIB = 1 << 30
TREE_KIB = 1000


@dataclass
class Filler:
    """In the place of a sandbox."""

    made: list[tuple[int, Extent, tuple[str, ...]]] = field(default_factory=list)

    def fill(self, number: int, disk: Path, extent: Extent, options: Sequence[str]) -> JobResult:
        del disk
        self.made.append((number, extent, tuple(options)))
        return JobResult(exit_status=0, tail="")

    def discard(self) -> None:
        pass


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> BuildPlan:
    """Of one file system on the whole disk."""
    directory = tmp_path_factory.mktemp("plan")
    make_tiny_os(directory / "elements")
    spec = BuildSpec(
        name="x", output_dir=directory, elements=("tiny-os",), element_paths=(directory / "elements",), skip_base=True,
        network=False, size_bytes=GIB,
    )  # fmt: skip
    return make_plan(spec, directory)


ROOT = {"mount_point": "/", "device": "/dev/loop0", "fstype": "ext4", "label": "root", "uuid": "1-2", "opts": ["-q"]}


def answers(**changes: object) -> bytes:
    """What dib-block-device says of that disk."""
    good: dict[str, object] = {
        "mounts": json.dumps([ROOT]),
        "getval:image-block-partition": "/dev/loop0",
        "getval:image-block-device": "/dev/loop0",
        "getval:image-block-devices": "[]",
    }
    return json.dumps({**good, **changes}).encode()


def device(value: object) -> bytes:
    return answers(**{f"getval:image-block-{kind}": value for kind in ("partition", "device")})


def guest(plan: BuildPlan, answer: bytes, said: Mapping[str, str] = MappingProxyType({})) -> Guest:
    """One from which *answer* is read, and whose programs print what is *said*."""
    commands = {program: f"printf %s {shlex.quote(text)}" for program, text in said.items()}
    files = dict.fromkeys(("answers.json", "tree-size-kib", "device"), answer)
    return Guest(directory=plan.spec.output_dir, commands=commands, files=files)


def make_image(plan: BuildPlan, place: Guest, filler: Filler | None, archive: Path | None = None) -> Lengths:
    phases = Phases({}, BuildMonitor())
    disk = Disk(path=archive, label="archive") if archive is not None else None
    stage = DiskStage(plan, phases, cast("Appliance", place), Path("/nowhere"), disk)
    return stage.make_image(TREE_KIB, filler)


def filled(plan: BuildPlan, places: str = "0 1048576\n", **changes: object) -> Filler:
    filler = Filler()
    make_image(plan, guest(plan, answers(**changes), {"image-places.sh": places}), filler)
    return filler


def test_good_answers_are_taken(plan: BuildPlan) -> None:
    assert plan.layout.parts
    options = ("-q", "-t", "ext4", "-q", "-L", "root", "-U", "1-2")
    assert filled(plan).made == [(0, Extent(0, 1 << 20), options)]


JSON = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "a number": b"1" * 100_000,
    "deep": b"[" * 500_000,
    "deep maps": b'{"a":' * 100_000,
    "no text": b"\xff\xfe\x00",
    "NaN": b"NaN",
    "nothing in it": b"{}",
    "a number for a device": device(1),
    "a list for a device": device([]),
    "a long device": device("x" * 20_000),
    "two lines": device("a\nb"),
    "an escape": device("\x1b[2J"),
}  # fmt: skip


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
def test_answers_that_are_none(plan: BuildPlan, text: bytes) -> None:
    with pytest.raises(ApplianceError, match="reading the answers of dib-block-device: they are not"):
        make_image(plan, guest(plan, text), None)


MOUNTS: dict[str, object] = {
    "a number": 1,
    "a list of numbers": [1],
    "a map": {"a": 1},
    "names missing": [{"mount_point": "/"}],
    "no options": [{**ROOT, "opts": None}],
    "options that are numbers": [{**ROOT, "opts": [1]}],
    "a number for a label": [{**ROOT, "label": 1}],
    "a text for all": ["x"],
}


@pytest.mark.parametrize("mounts", MOUNTS.values(), ids=MOUNTS)
def test_mounts_that_are_none(plan: BuildPlan, mounts: object) -> None:
    with pytest.raises(ApplianceError, match="reading what dib-block-device has mounted: it makes no sense"):
        filled(plan, mounts=json.dumps(mounts))


@pytest.mark.parametrize("text", ["", "[" * 10_000, "nonsense"])
def test_mounts_that_are_no_json(plan: BuildPlan, text: str) -> None:
    with pytest.raises(ApplianceError, match="it makes no sense"):
        filled(plan, mounts=text)


@pytest.mark.parametrize("points", [[], ["/", "/"], ["/etc"], ["/.."], ["/", "/boot"], ["\x1b]52;c;eA==\x07"], [""]])
def test_other_mounts_than_were_to_be(plan: BuildPlan, points: Sequence[str]) -> None:
    with pytest.raises(ApplianceError, match="which was not to be"):
        filled(plan, mounts=json.dumps([{**ROOT, "mount_point": point} for point in points]))


@pytest.mark.parametrize("option", ["-d", "-F", "/etc/shadow", "--", "-E  -d", "-n", "-q -d /etc", "-S"])
def test_options_of_mke2fs_that_were_not_to_be(plan: BuildPlan, option: str) -> None:
    with pytest.raises(ApplianceError, match="which were not to be"):
        filled(plan, mounts=json.dumps([{**ROOT, "opts": ["-q", option]}]))


@pytest.mark.parametrize(
    "places",
    ["", "x", "0", "0 1\n0 1", "-1 5", "0x0 0x1", "1e1 1", "0 1 2", "0  1", "\u0661 \u0662", f"0 {4 << 40}",
     f"{4 << 40} 1", f"{'9' * 18} {'9' * 18}", f"{'9' * 5000} 1", "0 1\n\n0 1"],
    ids=range(15),
)  # fmt: skip
def test_places_on_the_disk_that_cannot_be(plan: BuildPlan, places: str) -> None:
    with pytest.raises(ApplianceError, match="looking where the file systems lie"):
        filled(plan, places)


@pytest.mark.parametrize(
    "said", ["", "0", "-1", "9" * 18, "9" * 5000, "1e3", "x", "1\nx", "\u0663", f"{2 << 20}"], ids=range(10)
)
def test_lengths_of_an_archive_that_cannot_be(plan: BuildPlan, tmp_path: Path, said: str) -> None:
    archive = tmp_path / "tree.tar"
    archive.write_bytes(bytes(1 << 20))
    with pytest.raises(ApplianceError, match="archiving the tree: the guest does not say how long the archive is"):
        make_image(plan, guest(plan, answers(), {"tree.sh archive": said}), None, archive)
    good = guest(plan, answers(), {"tree.sh archive": f"{said}\n1234\n"})
    assert make_image(plan, good, None, archive).archive_bytes == 1234


@pytest.mark.parametrize(
    "size", [b"", b"x", b"0", b"-1", b"1\n2\n", b"999999999999", b"9" * 5000, b"\xff", b"1e3", "\u0661".encode(), b" 1"]
)
def test_sizes_of_a_tree_that_cannot_be(plan: BuildPlan, size: bytes) -> None:
    with pytest.raises(ApplianceError, match="measuring the tree: "):
        make_tree(plan, Phases({}, BuildMonitor()), cast("Appliance", guest(plan, size)))


def test_a_size_of_a_tree_that_can_be(plan: BuildPlan) -> None:
    assert make_tree(plan, Phases({}, BuildMonitor()), cast("Appliance", guest(plan, b"1000\n"))) == 1000


# ---- where releases of diskimage-builder have no dib-block-device ----

DEVICES = ["", "sda", "/etc/shadow", "/dev/", "/dev/a b", "/dev/$(id)", "/dev/a;b", "/dev/\x1b[2J", "/dev/" + "x" * 300,
           "/dev/a\n/dev/b", "\xff", "-f", "/dev/a\0b"]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES, ids=range(len(DEVICES)))
def test_devices_that_are_none(plan: BuildPlan, device: str) -> None:
    rules = replace(plan.dib.rules, disk_maker=DiskMaker.SCRIPTS)
    old = replace(plan, dib=replace(plan.dib, rules=rules))
    place = cast("Appliance", guest(plan, device.encode("latin-1")))
    with pytest.raises(ApplianceError, match="is not the name of a device") as caught:
        OldDisk(old, Phases({}, BuildMonitor()), place).partition(plan.facts, TREE_KIB)
    assert "\x1b" not in str(caught.value)
