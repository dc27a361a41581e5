# SPDX-License-Identifier: Apache-2.0
"""The image disk as the runner of DIB made it itself before 2.4.0: scripts partition it, the runner does the rest."""

from __future__ import annotations

import re
import shlex

from virt_dib import environment as contract
from virt_dib.appliance import Appliance
from virt_dib.environment import Facts
from virt_dib.errors import ApplianceError
from virt_dib.jobs import JobResult
from virt_dib.phases import GUEST_SCRIPTS, Phases, guest_script
from virt_dib.plan import BuildPlan
from virt_dib.releases import DiskMaker
from virt_dib.spec import Phase

_DEVICE = re.compile(r"/dev/[A-Za-z0-9/_.-]{1,200}")
_ANNOUNCED = re.compile(rb"^(?:export )?IMAGE_BLOCK_DEVICE=(\S{0,200})[ \t]*$", re.MULTILINE)
PARTITION = re.compile(r"(/dev/)(?:mapper/)?(loop[0-9]+)p[0-9]+")
"""The name of a partition; its groups make up that of the disk."""
_MOST_OUTPUT_BYTES = 1 << 20


class OldDisk:
    """The image disk of one build, in the order of the methods."""

    def __init__(self, plan: BuildPlan, phases: Phases, appliance: Appliance) -> None:
        self._plan = plan
        self._phases = phases
        self._appliance = appliance
        self._loop: str | None = None
        """The loop device of the whole disk."""
        self._by_scripts = plan.dib.rules.disk_maker is DiskMaker.SCRIPTS

    def partition(self, facts: Facts, size_kib: int) -> tuple[str, str]:
        """Run block-device.d; return the device of the root file system, and that of the disk.

        The phase is told the loop device of the disk, if it is the one to partition it, and prints the device that
        is to become the root.

        Raises:
            ScriptError: a script failed.
            ApplianceError: there is no device in the end.
        """
        if self._by_scripts:
            self._script("attach", contract.RUNNERS_IMAGE).check("attaching the image disk")
            self._loop = self._answer()
            facts = contract.with_devices(facts, root=self._loop, disk=None)
        said = bytearray()
        self._phases.run(self._appliance, Phase.BLOCK_DEVICE, facts, also=lambda data: _keep(said, data))
        announced = _ANNOUNCED.findall(bytes(said))
        if announced:
            root = _device(announced[-1].decode(errors="replace").strip("\"'"))
        elif self._loop is not None:
            root = self._loop
        else:
            root = self._table(facts, size_kib)
        whole = PARTITION.sub(r"\1\2", root)
        self._loop = self._loop or whole
        return root, whole

    def make(self, root: str, options: str) -> None:
        """Make the root file system on the device *root*, and mount it.

        Raises:
            ApplianceError: mkfs or mount failed.
        """
        spec, label = self._plan.spec, self._plan.layout.block_devices.root_label
        words = [root, contract.TREE, spec.fs_type, label, self._plan.facts.root_uuid, *shlex.split(options)]
        self._script("make", *words).check("making the root file system")

    def detach(self) -> None:
        """Unmount the root file system and let go of all devices.

        Raises:
            ApplianceError: something still uses them.
        """
        kind = "scripts" if self._by_scripts else "table"
        self._script("detach", contract.TREE, kind, self._loop or "").check("unmounting the image")

    # ---- inside ----

    def _script(self, step: str, *arguments: str) -> JobResult:
        return guest_script(self._appliance, "old-disk.sh", step, *arguments)

    def _table(self, facts: Facts, size_kib: int) -> str:
        result = self._appliance.run(
            [f"{GUEST_SCRIPTS}/old-disk.sh", "table", str(size_kib)],
            contract.for_phase(facts, Phase.BLOCK_DEVICE),
            contract.OUT,
        )
        result.check("partitioning the image disk with dib-block-device")
        return self._answer()

    def _answer(self) -> str:
        text = self._appliance.read(f"{contract.BUILD_DIR}/block-device/device", limit_bytes=4096)
        return _device(text.decode(errors="replace").strip())


def _keep(said: bytearray, data: bytes) -> None:
    said.extend(data)
    del said[:-_MOST_OUTPUT_BYTES]


def _device(name: str) -> str:
    if _DEVICE.fullmatch(name) is None:
        raise ApplianceError(
            f"partitioning the image disk: {name!r} is not the name of a device",
            hint="a script in block-device.d must print IMAGE_BLOCK_DEVICE= and the device of the root file system",
        )
    return name
