# SPDX-License-Identifier: Apache-2.0
"""What a guest answers is looked at before it is used, and what fails there is told with the last words of it.

The guest here is that of guests.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from guests import Guest
from helpers import make_element, skip_without
from virt_dib import events, namespaces, prerequisites, tools
from virt_dib.appliance import Appliance
from virt_dib.break_points import AFTER_ERROR, NO_BREAKS, Breaks
from virt_dib.disk_stage import DiskStage, Lengths
from virt_dib.errors import ApplianceError, ScriptError
from virt_dib.image_cache import ImageCache
from virt_dib.machine import Disk
from virt_dib.monitor import BuildMonitor
from virt_dib.namespaces import Inside
from virt_dib.old_disk import OldDisk
from virt_dib.phases import Phases
from virt_dib.plan import BuildPlan, make_plan
from virt_dib.releases import DiskMaker
from virt_dib.spec import BuildSpec, DropIn, Phase
from virt_dib.tree_stage import make_tree

TREE_KIB = 1000
MOUNTED = {"mount_point": "/", "device": "/dev/loop0", "fstype": "ext4", "label": "root", "uuid": "1-2", "opts": []}
ANSWERS = {
    "mounts": json.dumps([MOUNTED]),
    "getval:image-block-partition": "/dev/loop0",
    "getval:image-block-device": "/dev/loop0",
    "getval:image-block-devices": "/dev/loop0",
}


@dataclass(frozen=True)
class Stages:
    """A build that has been planned."""

    plan: BuildPlan
    directory: Path
    told: list[events.Event]
    phases: Phases

    def tree(self, **guest: object) -> int:
        place = Guest(directory=self.directory, **guest)  # type: ignore[arg-type] # fields by name
        return make_tree(self.plan, self.phases, place)

    def disk(self, *, archive: Disk | None = None, fill: bool = False, **guest: object) -> Lengths:
        place = Guest(directory=self.directory, **guest)  # type: ignore[arg-type] # fields by name
        stage = DiskStage(self.plan, self.phases, cast(Appliance, place), self.directory / "image", archive)
        return stage.make_image(TREE_KIB, place if fill else None)

    def warnings(self) -> list[str]:
        return [event.text for event in self.told if isinstance(event, events.Warned)]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> BuildPlan:
    directory = tmp_path_factory.mktemp("plan")
    make_element(directory / "elements", "one", {"install.d/50-x": "#!/bin/bash\n"}, provides=["operating-system"])
    (directory / "work").mkdir()
    spec = BuildSpec(
        name="x",
        output_dir=directory,
        elements=("one",),
        element_paths=(directory / "elements",),
        skip_base=True,
        formats=("raw",),
        size_bytes=1 << 30,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prerequisites, "require_prerequisites", list)
        return make_plan(spec, directory / "work", host_environment={})


@pytest.fixture
def planned(plan: BuildPlan, tmp_path: Path) -> Callable[..., Stages]:
    """The plan, for an image cache or with other fields of the spec; and a guest with nothing in it."""

    def changed(image_cache: Path | None = None, breaks: Breaks = NO_BREAKS, **fields: object) -> Stages:
        (tmp_path / "guest").mkdir()
        cache = None if image_cache is None else ImageCache(image_cache, tmp_path)
        if cache is not None:
            cache.copy_to(tmp_path / "copy")
        spec = dataclasses.replace(plan.spec, **fields)  # type: ignore[arg-type] # fields by name
        told: list[events.Event] = []
        phases = Phases({}, BuildMonitor(told.append), breaks)
        return Stages(dataclasses.replace(plan, spec=spec, image_cache=cache), tmp_path / "guest", told, phases)

    return changed


def answered(**changes: object) -> dict[str, bytes]:
    """What a guest says it has mounted, with *changes*."""
    return {"answers.json": json.dumps(ANSWERS | changes).encode()}


# ---- the tree ----


@pytest.mark.parametrize("said", [b"", b"much\n", b"-1\n", b"1e3\n", b"9" * 13, b"12\n34\n"])
def test_a_size_that_is_no_number(planned: Callable[..., Stages], said: bytes) -> None:
    with pytest.raises(ApplianceError, match=r"^measuring the tree: the guest gave no number$"):
        planned().tree(files={"tree-size-kib": said})


@pytest.mark.parametrize("said", [b"0\n", b"999999999999"])
def test_a_size_that_cannot_be(planned: Callable[..., Stages], said: bytes) -> None:
    with pytest.raises(ApplianceError, match=f"^measuring the tree: {int(said)} KiB cannot be$"):
        planned().tree(files={"tree-size-kib": said})


def test_a_size_that_can_be(planned: Callable[..., Stages]) -> None:
    assert planned().tree(files={"tree-size-kib": b"1234\n"}) == 1234


@pytest.mark.parametrize(
    ("program", "doing"),
    [
        ("tree.sh after_root", "preparing the tree after root.d"),
        ("tree.sh set_aside", "setting the tree aside"),
        ("named-files.sh make", "looking after files named after the image"),
    ],
)
@pytest.mark.parametrize(("said", "told"), [("echo one; echo two", "one / two"), (":", None)])
def test_a_step_on_the_tree_that_fails(
    planned: Callable[..., Stages], tmp_path: Path, program: str, doing: str, said: str, told: str | None
) -> None:
    drop_in = DropIn(image_name="x", working_dir=tmp_path) if program.startswith("named-files") else None
    with pytest.raises(ApplianceError) as caught:
        planned(drop_in=drop_in).tree(commands={program: f"{said}; exit 7"}, files={"tree-size-kib": b"1"})
    assert str(caught.value) == f"{doing}: failed with exit status 7" + (f": {told}" if told else "")


def test_a_root_d_that_leaves_no_tree(planned: Callable[..., Stages]) -> None:
    with pytest.raises(ScriptError, match=r"root\.d ended without a root file system in place") as caught:
        planned().tree(commands={"tree.sh after_root": "exit 3"})
    assert "$TARGET_ROOT" in (caught.value.problems[0].hint or "")


def test_extra_packages_that_cannot_be_installed(planned: Callable[..., Stages]) -> None:
    with pytest.raises(ScriptError) as caught:
        planned(extra_packages=("cowsay", "sl")).tree(
            commands={"chroot-command.sh": "echo E: no package cowsay; exit 100"}
        )
    (problem,) = caught.value.problems
    assert problem.message == ("installing the extra packages cowsay, sl: install-packages failed with exit status 100")
    assert "must provide install-packages" in (problem.hint or "")
    assert problem.details == ("E: no package cowsay",)


def test_a_phase_that_ends_before_its_first_script(planned: Callable[..., Stages]) -> None:
    with pytest.raises(ScriptError, match=r"^root\.d: its scripts could not be run, exit status 1$") as caught:
        planned().tree(commands={"run-phase.sh": "echo 10-bad: unbound variable; exit 1"}, phases=frozenset({"root.d"}))
    assert "environment.d" in (caught.value.problems[0].hint or "")
    assert caught.value.problems[0].details == ("10-bad: unbound variable",)


@pytest.mark.parametrize("seconds", ["soon", "nan", "1e999", ""])
def test_a_script_of_which_the_guest_tells_no_time(planned: Callable[..., Stages], seconds: str) -> None:
    told = " ".join(f"\\036T {words}\\036" for words in (f"start 50-x {seconds}", f"end 50-x 3 {seconds}"))
    commands = {"run-phase.sh": f"printf '\\036T list 50-x\\036 {told}'; exit 3"}
    with pytest.raises(ScriptError, match=r"^root\.d/50-x failed with exit status 3 after 0\.0 s$"):
        planned().tree(commands=commands, phases=frozenset({"root.d"}))


def test_a_shell_that_does_not_open_after_an_error_hides_nothing(planned: Callable[..., Stages]) -> None:
    stages = planned(breaks=Breaks(points=frozenset({AFTER_ERROR})))
    message = "root.d: its scripts could not be run, exit status 1"
    with pytest.raises(ScriptError, match=f"^{re.escape(message)}$"):
        stages.tree(commands={"run-phase.sh": "exit 1"}, phases=frozenset({"root.d"}))
    assert stages.warnings() == [message, "running a shell: it ended without a word"]


# ---- what is cached ----


def test_a_cache_that_cannot_be_gathered_is_no_reason_to_end(planned: Callable[..., Stages], tmp_path: Path) -> None:
    stages = planned(image_cache=tmp_path / "cache")
    stages.tree(commands={"image-cache.py gather": "echo it is full; exit 1"}, files={"tree-size-kib": b"1"})
    assert stages.warnings() == [
        "what the elements cached is not kept: looking at what is cached: failed with exit status 1: it is full"
    ]


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ("mkdir -p image-cache/new image-cache/odd", "the guest gave something else"),
        ("mkdir -p image-cache/new/a image-cache/unchanged", "the guest gave no list of files"),
        ("mkdir image-cache; ln -s /etc image-cache/new; touch image-cache/unchanged", "the guest gave something else"),
    ],
)
def test_what_is_no_cache_is_not_taken_over(
    planned: Callable[..., Stages], tmp_path: Path, made: str, why: str
) -> None:
    stages = planned(image_cache=tmp_path / "cache")
    stages.tree(commands={"image-cache.py gather": made}, files={"tree-size-kib": b"1"})
    assert stages.warnings() == [f"what the elements cached is not kept: taking over the image cache: {why}"]
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_cached_before_a_script_fails_is_kept(planned: Callable[..., Stages], tmp_path: Path) -> None:
    gather = "mkdir -p image-cache/new/downloaded; touch image-cache/unchanged"
    with pytest.raises(ScriptError):
        planned(image_cache=tmp_path / "cache").tree(
            commands={"image-cache.py gather": gather, "run-phase.sh": "exit 1"},
            files={"tree-size-kib": b"1"},
            phases=frozenset({"root.d"}),
        )
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["downloaded"]


def test_what_is_new_and_unchanged_at_the_same_time_is_not_taken_over(
    planned: Callable[..., Stages], tmp_path: Path
) -> None:
    (tmp_path / "cache/entry").mkdir(parents=True)
    (tmp_path / "cache/entry/file").write_text("as it was")
    stages = planned(image_cache=tmp_path / "cache")
    gather = "mkdir -p image-cache/new/entry; touch image-cache/new/entry/file; "
    gather += "printf 'entry/file\\0' >image-cache/unchanged"
    stages.tree(commands={"image-cache.py gather": gather}, files={"tree-size-kib": b"1"})
    assert stages.warnings() == ["not cached, since it has changed in the image cache meanwhile: entry"]
    assert (tmp_path / "cache/entry/file").read_text() == "as it was"


def test_what_a_cache_cannot_hold_is_told(planned: Callable[..., Stages], tmp_path: Path) -> None:
    stages = planned(image_cache=tmp_path / "cache")
    gather = "mkdir -p image-cache/new/entry; touch image-cache/unchanged; "
    gather += "mkfifo image-cache/new/entry/fifo; ln -s /etc image-cache/new/link"
    stages.tree(commands={"image-cache.py gather": gather}, files={"tree-size-kib": b"1"})
    why = "not cached, since it is no file, no directory and no link inside the cache: "
    assert sorted(stages.warnings()) == [f"{why}entry/fifo", f"{why}link"]


def test_a_cache_that_goes_in_the_middle_of_a_build(planned: Callable[..., Stages], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    stages = planned(image_cache=cache)
    gather = f"mkdir -p image-cache/new; touch image-cache/unchanged; rmdir {cache}; touch {cache}"
    stages.tree(commands={"image-cache.py gather": gather}, files={"tree-size-kib": b"1"})
    assert stages.warnings() == [f"what the elements cached is not kept in '{cache}': File exists: '{cache}'"]


# ---- the disk ----


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        (b"{", "reading the answers of dib-block-device: they are not JSON"),
        (b"[" * 100_000, "reading the answers of dib-block-device: they are not JSON"),
        (b"[]", "reading the answers of dib-block-device: they are not what was asked for"),
        (b"{}", "reading the answers of dib-block-device: they are not what was asked for"),
        *(
            (
                answered(**change)["answers.json"],
                "reading the answers of dib-block-device: they are not what was asked for",
            )
            for change in (
                {"mounts": None},
                {"mounts": "x" * 20_000},
                {"getval:image-block-devices": "/dev/loop0\x1b]0;"},
                {"getval:image-block-device": 5},
            )
        ),
        *(
            (answered(mounts=mounts)["answers.json"], "reading what dib-block-device has mounted: it makes no sense")
            for mounts in ("no list", "5", "[5]", "[{}]", json.dumps([MOUNTED | {"opts": [5]}]), "[" * 10_000)
        ),
    ],
)
def test_answers_of_dib_block_device_that_are_none(planned: Callable[..., Stages], answers: bytes, why: str) -> None:
    with pytest.raises(ApplianceError, match=f"^{re.escape(why)}$"):
        planned().disk(files={"answers.json": answers})


@pytest.mark.parametrize(
    ("mounts", "why"),
    [
        ([], "filling the image: dib-block-device has mounted [], which was not to be"),
        (
            [MOUNTED, MOUNTED | {"mount_point": "/etc"}],
            "filling the image: dib-block-device has mounted ['/', '/etc'], which was not to be",
        ),
        (
            [MOUNTED | {"opts": ["-d", "/root"]}],
            "filling the image: dib-block-device has used options which were not to be",
        ),
    ],
)
def test_file_systems_that_were_not_planned_are_not_filled(
    planned: Callable[..., Stages], mounts: list[object], why: str
) -> None:
    with pytest.raises(ApplianceError) as caught:
        planned().disk(fill=True, files=answered(mounts=json.dumps(mounts)))
    assert str(caught.value) == why
    assert "--isolation vm" in (caught.value.problems[0].hint or "")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("a b", "looking where the file systems lie: the guest gave no numbers"),
        ("-1 5", "looking where the file systems lie: the guest gave no numbers"),
        (f"0 {1 << 40}", "looking where the file systems lie: outside of the image"),
        (f"{1 << 50} 512", "looking where the file systems lie: outside of the image"),
    ],
)
def test_places_where_no_file_system_can_lie(planned: Callable[..., Stages], said: str, why: str) -> None:
    with pytest.raises(ApplianceError, match=f"^{why}$"):
        planned().disk(fill=True, files=answered(), commands={"image-places.sh": f"echo {said}"})


@pytest.mark.parametrize("fill", [True, False], ids=["filled", "copied"])
@pytest.mark.parametrize(
    ("said", "why"),
    [
        (
            "mke2fs: Could not allocate block in ext2 filesystem while populating",
            "copying the tree of 0 MiB into the image: no space left in the image of 1024 MiB",
        ),
        (
            "mke2fs: Input/output error",
            "copying the tree into the image: failed with exit status 1: mke2fs: Input/output error",
        ),
    ],
)
def test_a_tree_that_does_not_get_into_the_image(
    planned: Callable[..., Stages], said: str, why: str, *, fill: bool
) -> None:
    failing = f"echo {said}; exit 1"
    with pytest.raises(ApplianceError, match=f"^{re.escape(why)}$"):
        planned().disk(
            fill=fill,
            files=answered(),
            commands={"image-places.sh": "echo 1048576 1048576", "mke2fs 0": failing, "tree.sh copy_tree": failing},
        )


@pytest.mark.parametrize("said", ["echo", "echo much", "echo 0", f"echo {1 << 50}", "echo 5 6"])
def test_an_archive_of_no_length(planned: Callable[..., Stages], tmp_path: Path, said: str) -> None:
    archive = Disk(path=tmp_path / "archive", label="archive")
    archive.path.write_bytes(bytes(1000))
    with pytest.raises(ApplianceError, match=r"^archiving the tree: the guest does not say how long the archive is$"):
        planned().disk(archive=archive, files=answered(), commands={"tree.sh archive": said})


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("image-disk.sh", "laying out the image disk: failed with exit status 1: no"),
        ("image-places.sh", "looking where the file systems lie: failed with exit status 1: no"),
        ("tree.sh make_way", "unmounting the image: failed with exit status 1: no"),
        ("tree.sh take_over", "copying the tree into the image: failed with exit status 1: no"),
        ("tree.sh clean", "cleaning the image: failed with exit status 1: no"),
        ("tree.sh archive", "archiving the tree: failed with exit status 1: no"),
        ("block-device.sh", "making the image disk: no"),
    ],
)
def test_a_step_on_the_disk_that_fails(planned: Callable[..., Stages], tmp_path: Path, program: str, why: str) -> None:
    archive = Disk(path=tmp_path / "archive", label="archive")
    archive.path.touch()
    commands = {"image-places.sh": "echo 1048576 1048576", program: "echo no; exit 1"}
    with pytest.raises(ApplianceError, match=f"^{re.escape(why)}$") as caught:
        planned().disk(archive=archive, fill=True, files=answered(), commands=commands)
    if program == "block-device.sh":
        assert (caught.value.problems[0].hint or "").startswith("is --size large enough for all partitions? ")


def test_a_dib_block_device_that_is_killed_may_have_lacked_memory(planned: Callable[..., Stages]) -> None:
    killed = {"block-device.sh": "echo killed; exit 137"}
    with pytest.raises(ApplianceError, match=r"^making the image disk: killed$") as caught:
        planned().disk(files=answered(), commands=killed)
    assert (caught.value.problems[0].hint or "").startswith("have a look at the memory; ")


# ---- disks of old releases ----


def by_scripts(stages: Stages) -> BuildPlan:
    """As planned for a release whose scripts partition the disk."""
    rules = dataclasses.replace(stages.plan.dib.rules, disk_maker=DiskMaker.SCRIPTS)
    return dataclasses.replace(stages.plan, dib=dataclasses.replace(stages.plan.dib, rules=rules))


@pytest.mark.parametrize("name", ["", "loop0", "/etc/shadow", "/dev/../etc/shadow x", "/dev/" + "x" * 300])
def test_a_device_with_the_name_of_none(planned: Callable[..., Stages], name: str) -> None:
    stages = planned()
    guest = Guest(directory=stages.directory, files={"device": name.encode()})
    disk = OldDisk(by_scripts(stages), stages.phases, cast(Appliance, guest))
    with pytest.raises(ApplianceError, match=r"^partitioning the image disk: '.*' is not the name of a device$"):
        disk.partition(stages.plan.facts, 1 << 20)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("old-disk.sh attach", "attaching the image disk: failed with exit status 1: no"),
        ("old-disk.sh make", "making the root file system: failed with exit status 1: no"),
        ("old-disk.sh detach", "unmounting the image: failed with exit status 1: no"),
    ],
)
def test_a_step_on_an_old_disk_that_fails(planned: Callable[..., Stages], program: str, why: str) -> None:
    stages = planned()
    guest = Guest(directory=stages.directory, files={"device": b"/dev/loop0\n"}, commands={program: "echo no; exit 1"})
    disk = OldDisk(by_scripts(stages), stages.phases, cast(Appliance, guest))
    with pytest.raises(ApplianceError, match=f"^{re.escape(why)}$"):  # noqa: PT012 - whichever fails
        disk.partition(stages.plan.facts, 1 << 20)
        disk.make("/dev/loop0", "")
        disk.detach()


def test_scripts_that_name_no_device_themselves(planned: Callable[..., Stages]) -> None:
    stages = planned()
    phase = Phase.BLOCK_DEVICE.directory
    guest = Guest(
        directory=stages.directory,
        files={"device": b"/dev/loop0"},
        phases=frozenset({phase}),
        commands={"run-phase.sh": "echo IMAGE_BLOCK_DEVICE=/etc/shadow"},
    )
    disk = OldDisk(by_scripts(stages), stages.phases, cast(Appliance, guest))
    with pytest.raises(ApplianceError, match="'/etc/shadow' is not the name of a device") as caught:
        disk.partition(stages.plan.facts, 1 << 20)
    assert "IMAGE_BLOCK_DEVICE=" in (caught.value.problems[0].hint or "")


# ---- the first process of a sandbox ----


@dataclass
class FirstProcess:
    """A program that has the other end of the socket, which the test has, too."""

    inside: Inside
    other_end: socket.socket


@pytest.fixture
def first_process() -> Iterator[FirstProcess]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with (
        ours,
        theirs,
        tempfile.TemporaryFile() as output,
        tools.started(["sh", "-c", "echo last words; exit 3"], stdout=output.fileno()) as process,
    ):
        process.wait()
        yield FirstProcess(Inside(process, ours, output), theirs)


def test_a_first_process_that_says_something_else(first_process: FirstProcess) -> None:
    first_process.other_end.send(b"unshared, and more" * 20)
    with pytest.raises(ApplianceError, match=r"^running the sandbox: it says '.{80}' instead of 'ready'$"):
        first_process.inside.expect("ready")


def test_a_first_process_that_starts_nothing(first_process: FirstProcess) -> None:
    first_process.other_end.send(b"ready")
    with pytest.raises(ApplianceError, match=r"^running the sandbox: it does not start the job$"):
        first_process.inside.run(["true"], {}, "/")


@pytest.mark.parametrize("said", ["exit", "exit soon", "exit -1", "exit 0 0", "ended 0"])
def test_a_first_process_that_does_not_say_how_a_job_ended(first_process: FirstProcess, said: str) -> None:
    reader, writer = os.pipe()
    socket.send_fds(first_process.other_end, [b"output"], [reader])
    os.close(reader)
    first_process.other_end.send(said.encode())
    with pytest.raises(ApplianceError, match=r"^running the sandbox: it does not say how the job ended$"):
        first_process.inside.run(["true"], {}, "/")
    os.close(writer)


DIED = "running the sandbox: it died / last words"


def test_a_first_process_that_dies_before_it_is_told_something(first_process: FirstProcess) -> None:
    first_process.other_end.send(b"unshared")
    first_process.other_end.close()
    with pytest.raises(ApplianceError) as caught:
        first_process.inside.send(b"go")
    assert str(caught.value) == DIED
    assert "memory" in (caught.value.problems[0].hint or "")


def test_a_first_process_that_dies_before_it_has_heard_everything(first_process: FirstProcess) -> None:
    first_process.inside.send(b"go")
    first_process.other_end.close()
    with pytest.raises(ApplianceError, match=f"^{DIED}$"):
        first_process.inside.receive()


def test_a_first_process_that_says_why_it_failed(first_process: FirstProcess) -> None:
    first_process.other_end.send(b"failed mounting '/proc': Operation not permitted")
    with pytest.raises(ApplianceError) as caught:
        first_process.inside.receive()
    assert str(caught.value) == "running the sandbox: mounting '/proc': Operation not permitted / last words"
    assert caught.value.problems[0].hint is None


@pytest.mark.parametrize(("said", "why"), [(b"failed starting: no", "last words"), (b"", "last words")])
def test_a_command_with_all_rights_that_fails(first_process: FirstProcess, said: bytes, why: str) -> None:
    if said:
        first_process.other_end.send(said)
    first_process.other_end.close()
    with pytest.raises(ApplianceError, match=f"^handing over: {why}$"):
        namespaces.finish(first_process.inside, "handing over")


@pytest.mark.sandbox
def test_a_place_on_the_host_that_is_not_there(tmp_path: Path) -> None:
    skip_without("sandbox")
    for name in ("runner", "tmp"):
        (tmp_path / name).mkdir()
    places = {
        "network": False, "runner": str(tmp_path / "runner"), "build": "/dib/x", "content": str(tmp_path),
        "temporary": str(tmp_path / "tmp"), "cache": str(tmp_path / "none"), "shown": [], "sockets": [], "files": {},
    }  # fmt: skip
    with namespaces.inside_namespace([json.dumps(places)], tmp_path, "host-init.py") as inside:
        namespaces.find_ids().map_as_user(inside.process.pid)
        inside.send(b"go")
        with pytest.raises(ApplianceError, match=r"^running the sandbox: .*/none: No such file or directory$"):
            inside.expect("ready")
