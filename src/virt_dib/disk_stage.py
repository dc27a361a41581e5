# SPDX-License-Identifier: Apache-2.0
"""The disk stage: from the finished tree to an image disk, in the appliance, with DIB's own dib-block-device.

Releases of DIB before 2.4.0 have none, or half of one: ``old_disk`` does then what their runner did.
"""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from virt_dib import environment as contract
from virt_dib import layout
from virt_dib.appliance import BLOCK_DEVICE_DIR, Appliance
from virt_dib.errors import ApplianceError
from virt_dib.jobs import JobResult
from virt_dib.machine import Disk
from virt_dib.old_disk import PARTITION, OldDisk
from virt_dib.phases import GUEST_SCRIPTS, Phases, guest_script, named_files
from virt_dib.plan import BuildPlan
from virt_dib.releases import DiskMaker
from virt_dib.sandbox import Extent
from virt_dib.spec import DISK_PHASES, Phase

STEPS = ("making the image disk", "copying the tree", "cleaning up")
"""What the report shows besides the phases."""
ARCHIVING = "archiving the tree"
"""What it shows if there is a disk for an archive."""

_ANSWER_LIMIT = 16384
_KILLED = 128 + signal.SIGKILL
_NOT_FILLED_HINT = "build with --isolation vm, which copies the tree whatever the layout is"
_NO_ROOM = re.compile(r"No space left on device|Could not allocate (?:block|inode)|No free space in the directory")
"""What cp and mke2fs say when a tree is too large."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """How much of the disks is used, from their beginnings."""

    image_bytes: int
    archive_bytes: int | None
    """None without an archive."""


class Filler(Protocol):
    """Makes file systems of parts of the tree, while the appliance lets go of them: the sandbox."""

    def fill(self, number: int, disk: Path, extent: Extent, options: Sequence[str]) -> JobResult:
        """Make that of part *number* at *extent* of the file *disk*, with *options* of mke2fs."""

    def discard(self) -> None:
        """All are made; the tree is not needed any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _FileSystem:
    """A file system that dib-block-device has made and mounted."""

    mount_point: str
    device: str
    fstype: str
    label: str
    uuid: str
    opts: tuple[str, ...]

    @property
    def mke2fs_options(self) -> list[str]:
        """Those that DIB gave to mkfs (diskimage_builder/block_device/level2/mkfs.py)."""
        return ["-q", "-t", self.fstype, *(word for word in self.opts if word), "-L", self.label, "-U", self.uuid]


class DiskStage:
    """The disk stage of one build in a running appliance."""

    def __init__(
        self, plan: BuildPlan, phases: Phases, appliance: Appliance, image_disk: Path, archive_disk: Disk | None
    ) -> None:
        self._plan = plan
        self._phases = phases
        self._appliance = appliance
        self._image_disk = image_disk
        self._archive_disk = archive_disk
        self._facts = plan.facts
        configured = plan.dib.rules.disk_maker is DiskMaker.CONFIGURATION
        self._old_disk = None if configured else OldDisk(plan, phases, appliance)

    def make_image(self, tree_kib: int, filler: Filler | None) -> Lengths:
        """Make the image of a tree of that size, and the archive if there is a disk for one.

        Without *filler* the tree is on the build disk, and is copied. With one, all but the parts that it fills is
        on the build disk in ``parts``.

        Raises:
            ScriptError: a script failed.
            ApplianceError: dib-block-device failed, or the tree does not fit.
        """
        plan = self._plan
        size_kib = layout.image_size_kib(
            plan.spec, plan.elements, plan.layout.block_devices.root_fstype, tree_kib, plan.dib.rules
        )
        self._facts = dataclasses.replace(self._facts, image_size_kib=size_kib)
        named_files(self._appliance, plan.spec, "make")
        file_systems = self._make_disk(size_kib)
        with self._phases.step(STEPS[1]):
            result = self._copy() if filler is None else self._fill(file_systems, filler)
            if result.exit_status != 0 and _NO_ROOM.search(result.tail):
                raise ApplianceError(
                    f"copying the tree of {tree_kib // 1024} MiB into the image: no space left in the image of "
                    f"{size_kib // 1024} MiB",
                    hint="give a larger --size, or --size auto",
                )
            result.check("copying the tree into the image")
        for phase in filter(plan.dib.rules.has, DISK_PHASES[1:]):
            self._phases.run(self._appliance, phase, self._facts)
        named_files(self._appliance, plan.spec, "take")
        if plan.no_image is not None and self._archive_disk is None:
            # Nobody will look into it any more.
            guest_script(self._appliance, "tree.sh", "let_go", contract.TREE).check("letting go of the image")
            return Lengths(image_bytes=size_kib * 1024, archive_bytes=None)
        with self._phases.step(STEPS[2]):
            points = plan.layout.block_devices.mount_points.split("|")
            guest_script(self._appliance, "tree.sh", "clean", contract.TREE, *points).check("cleaning the image")
        archive_bytes = self._archive(self._archive_disk) if self._archive_disk is not None else None
        if self._old_disk is not None:
            self._old_disk.detach()
        else:
            self._block_device("unmounting the image", "umount", "cleanup")
        return Lengths(
            image_bytes=plan.layout.images[0].size_bytes or size_kib * 1024,
            archive_bytes=archive_bytes,
        )

    # ---- inside ----

    def _make_disk(self, size_kib: int) -> list[_FileSystem]:
        """block-device.d, partitions, file systems, mounts."""
        plan = self._plan
        if self._old_disk is None:
            self._phases.run(self._appliance, Phase.BLOCK_DEVICE, self._facts)
            with self._phases.step(STEPS[0]):
                self._lay_out(size_kib)
                return self._create(size_kib)
        self._lay_out(size_kib)
        root, disk = self._old_disk.partition(self._facts, size_kib)
        self._facts = contract.with_devices(self._facts, root=root, disk=disk)
        with self._phases.step(STEPS[0]):
            options = layout.mkfs_options(plan.spec, plan.spec.fs_type, plan.dib.rules)
            self._old_disk.make(root, options)
        return []

    def _lay_out(self, size_kib: int) -> None:
        """The raw images that dib-block-device or scripts write to."""
        for image in self._plan.layout.images:
            arguments = [f"{image.directory}/{image.name}.raw", str(image.offset_bytes)]
            size_bytes = image.size_bytes or size_kib * 1024
            result = guest_script(self._appliance, "image-disk.sh", *arguments, str(size_bytes))
            result.check("laying out the image disk")

    def _create(self, size_kib: int) -> list[_FileSystem]:
        """Partitions, file systems, mounts, fstab, by dib-block-device."""
        plan = self._plan
        rules = plan.dib.rules
        options = layout.mkfs_options(plan.spec, plan.layout.block_devices.root_fstype, rules)
        params = layout.params_text(plan.layout, size_kib=size_kib, options=options)
        self._appliance.write(contract.PARAMS, params.encode())
        wanted = ["mounts", f"getval:image-block-{'device' if rules.disk_is_block_device else 'partition'}"]
        wanted += ["getval:image-block-devices"] if "IMAGE_BLOCK_DEVICES" not in rules.absent else []
        mounts, device, *devices = self._block_device(STEPS[0], "init", "create", *wanted, "writefstab")
        disk = PARTITION.sub(r"\1\2", device)
        self._facts = contract.with_devices(
            self._facts, root=device, disk=disk, devices=devices[0] if devices else None
        )
        return _file_systems(mounts)

    def _copy(self) -> JobResult:
        return guest_script(self._appliance, "tree.sh", "copy_tree", contract.BUILT, contract.TREE)

    def _fill(self, file_systems: Sequence[_FileSystem], filler: Filler) -> JobResult:
        """Exchange the empty file systems for filled ones, made natively with the same options."""
        parts = self._plan.layout.parts
        points = [file_system.mount_point for file_system in file_systems]
        if points != [part.mount_point for part in parts]:
            raise ApplianceError(
                f"filling the image: dib-block-device has mounted {points}, which was not to be", hint=_NOT_FILLED_HINT
            )
        chosen = [number for number, part in enumerate(parts) if part.fillable]
        if not all(layout.are_plain_options(file_systems[number].opts) for number in chosen):
            raise ApplianceError(
                "filling the image: dib-block-device has used options which were not to be", hint=_NOT_FILLED_HINT
            )
        extents = self._extents([file_systems[number] for number in chosen])
        guest_script(self._appliance, "tree.sh", "make_way", contract.TREE, *points).check("unmounting the image")
        for number, extent in zip(chosen, extents, strict=True):
            result = filler.fill(number, self._image_disk, extent, file_systems[number].mke2fs_options)
            if result.exit_status != 0:
                return result
        filler.discard()
        words = [
            word
            for part, file_system in zip(parts, file_systems, strict=True)
            for word in ("fill" if part.fillable else "copy", file_system.device, part.mount_point)
        ]
        return guest_script(self._appliance, "tree.sh", "take_over", contract.BUILT, contract.TREE, *words)

    def _extents(self, file_systems: Sequence[_FileSystem]) -> list[Extent]:
        """Where they lie on the image disk."""
        image = self._plan.layout.images[0]
        devices = [file_system.device for file_system in file_systems]
        result = guest_script(self._appliance, "image-places.sh", f"{image.directory}/{image.name}.raw", *devices)
        result.check("looking where the file systems lie")
        most_bytes = self._plan.layout.disk_bytes - image.offset_bytes
        extents = []
        for line in result.tail.splitlines():
            if not re.fullmatch(r"[0-9]{1,18} [0-9]{1,18}", line):
                raise ApplianceError("looking where the file systems lie: the guest gave no numbers")
            offset_bytes, size_bytes = map(int, line.split())
            if offset_bytes + size_bytes > most_bytes:
                raise ApplianceError("looking where the file systems lie: outside of the image")
            extents.append(Extent(offset_bytes + image.offset_bytes, size_bytes))
        if len(extents) != len(file_systems):
            raise ApplianceError("looking where the file systems lie: the guest does not tell it of each")
        return extents

    def _archive(self, disk: Disk) -> int:
        """Write the tree onto *disk*, which has no file system, as one tar archive; return its length in bytes."""
        with self._phases.step(ARCHIVING):
            most_bytes = disk.path.stat().st_size
            result = guest_script(self._appliance, "tree.sh", "archive", contract.TREE, disk.device)
            result.check(ARCHIVING)
            *_, last = result.tail.splitlines() or [""]
            if not re.fullmatch(r"[0-9]{1,18}", last) or not 0 < int(last) <= most_bytes:
                raise ApplianceError(f"{ARCHIVING}: the guest does not say how long the archive is")
            return int(last)

    def _block_device(self, doing: str, *commands: str) -> list[str]:
        """Run commands of dib-block-device in the appliance; return what each that answers printed."""
        answers = f"{contract.BUILD_DIR}/answers.json"
        output = _Lines(self._phases.monitor.output)
        result = self._appliance.run(
            [f"{GUEST_SCRIPTS}/block-device.sh", BLOCK_DEVICE_DIR, answers, *commands],
            contract.for_phase(self._facts, Phase.BLOCK_DEVICE) | {"PYTHONPATH": contract.SITE},
            contract.OUT,
            on_output=output.feed,
        )
        if result.exit_status != 0:
            advice = "is --size large enough for all partitions? " if "create" in commands else ""
            if result.exit_status == _KILLED:
                advice = f"{self._appliance.killed_hint}; "
            raise ApplianceError(f"{doing}: {output.last}", hint=advice + self._phases.where())
        wanted = [command for command in commands if command.startswith("getval:") or command == "mounts"]
        return _answers(self._appliance.read(answers), wanted)


def _answers(text: bytes, wanted: Sequence[str]) -> list[str]:
    """The guest's answers to *wanted*, if they are what answers look like."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApplianceError("reading the answers of dib-block-device: they are not JSON") from error
    values = [found.get(key) for key in wanted] if isinstance(found, dict) else [None]
    if not all(isinstance(value, str) and len(value) < _ANSWER_LIMIT and value.isprintable() for value in values):
        raise ApplianceError("reading the answers of dib-block-device: they are not what was asked for")
    return [str(value) for value in values]


def _file_systems(text: str) -> list[_FileSystem]:
    """What the guest says it has mounted, if it can be."""
    try:
        return [_file_system(entry) for entry in json.loads(text)]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ApplianceError("reading what dib-block-device has mounted: it makes no sense") from error


def _file_system(entry: Mapping[str, Any]) -> _FileSystem:
    words = {name: entry[name] for name in ("mount_point", "device", "fstype", "label", "uuid")}
    options = tuple(entry["opts"])
    if not all(isinstance(word, str) for word in (*words.values(), *options)):
        raise TypeError
    return _FileSystem(**words, opts=options)


class _Lines:
    """Passes output on and remembers its last line that says something."""

    def __init__(self, sink: Callable[[bytes], None]) -> None:
        self._sink = sink
        self._end = b""

    def feed(self, data: bytes) -> None:
        self._sink(data)
        self._end = (self._end + data)[-4096:]

    @property
    def last(self) -> str:
        lines = [line.strip() for line in self._end.decode(errors="replace").splitlines() if line.strip()]
        return "".join(c if c.isprintable() else "?" for c in lines[-1]) if lines else "no reason given"
