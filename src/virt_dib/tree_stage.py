# SPDX-License-Identifier: Apache-2.0
"""The tree stage: from root.d to post-root.d, in the appliance or in the sandbox."""

from __future__ import annotations

import re
from collections.abc import Callable

from virt_dib import environment as contract
from virt_dib import staging
from virt_dib.errors import ApplianceError, ScriptError
from virt_dib.jobs import Place
from virt_dib.phases import LAST_LINES, Phases, guest_script
from virt_dib.plan import BuildPlan
from virt_dib.spec import TREE_PHASES, Phase

_NO_TREE_STATUS = 3


def make_tree(plan: BuildPlan, phases: Phases, place: Place, *, meanwhile: Callable[[], None] = lambda: None) -> int:
    """Run the phases; return the size of the finished tree in KiB, as DIB measures it.

    *meanwhile* is called before each phase; what it raises ends the stage.

    Raises:
        ScriptError: a script failed, or root.d left no tree.
        ApplianceError: the place itself failed.
    """
    for phase in TREE_PHASES:
        meanwhile()
        phases.run(place, phase, plan.facts)
        if phase is Phase.ROOT:
            _after_root(plan, place)
        elif phase is Phase.INSTALL and plan.spec.extra_packages:
            _install_packages(plan, phases, place)
    guest_script(place, "tree.sh", "set_aside", contract.TREE, contract.BUILT).check("setting the tree aside")
    return _size_kib(place.read(f"{contract.BUILD_DIR}/tree-size-kib"), plan.layout.disk_bytes)


def _after_root(plan: BuildPlan, place: Place) -> None:
    result = guest_script(place, "tree.sh", "after_root", contract.TREE, contract.HOOKS, plan.spec.install_type)
    if result.exit_status == _NO_TREE_STATUS:
        raise ScriptError(
            "root.d ended without a root file system in place",
            hint="the operating-system element must fill $TARGET_ROOT in its root.d",
        )
    result.check("preparing the tree after root.d")


def _install_packages(plan: BuildPlan, phases: Phases, place: Place) -> None:
    packages = plan.spec.extra_packages
    with phases.step("extra packages"):
        result = place.run(
            [f"{contract.GUEST}/guest/chroot-command.sh", contract.TREE, "install-packages", *packages],
            contract.for_phase(plan.facts, Phase.INSTALL),
            "/",
            on_output=phases.monitor.output,
        )
        if result.exit_status != 0:
            raise ScriptError(
                f"installing the extra packages {', '.join(packages)}: install-packages failed with exit status "
                f"{result.exit_status}",
                hint=f"an element must provide install-packages, and the packages must exist; {phases.where()}",
                details=phases.monitor.tail(LAST_LINES),
            )


def _size_kib(text: bytes, most_bytes: int) -> int:
    """What the place measured, if it can be."""
    if re.fullmatch(rb"[0-9]{1,12}\n?", text) is None:
        raise ApplianceError("measuring the tree: the guest gave no number")
    size_kib = int(text)
    if not 0 < size_kib * 1024 < max(most_bytes, staging.BUILD_DISK_BYTES):
        raise ApplianceError(f"measuring the tree: {size_kib} KiB cannot be")
    return size_kib
