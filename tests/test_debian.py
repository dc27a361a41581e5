# SPDX-License-Identifier: Apache-2.0
"""Debian from DIB's own elements, unmodified, built as an ordinary user and booted: ``make test-debian``."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from helpers import TESTS
from virt_dib import kvm, tools
from virt_dib.boot import Firmware, boot_test

pytestmark = pytest.mark.debian

_BUILD_TIMEOUT_S = 5400
_NOBODY = "65534"


def as_ordinary_user(directory: Path) -> list[str]:
    """The beginning of a command that gives up root's rights, which the product does not want."""
    if os.geteuid() != 0:
        return []
    os.chown(directory, int(_NOBODY), int(_NOBODY))
    setpriv = tools.require("setpriv", purpose="run the build as an ordinary user", package="util-linux")
    return [str(setpriv), f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", "--no-new-privs"]


def mirrors() -> list[str]:
    """``--envvar`` options for the machine's own mirrors."""
    found = tools.run([TESTS.parent / "scripts" / "mirrors"], doing="looking for mirrors").stdout
    return [word for line in found.splitlines() if line for word in ("--envvar", line)]


@pytest.mark.parametrize(
    ("layout", "firmware"),
    [
        ([], Firmware.BIOS),
        (["block-device-gpt"], Firmware.BIOS),
        (["block-device-efi"], Firmware.UEFI),
    ],
    ids=["mbr", "gpt", "efi"],
)
def test_debian_builds_and_boots(layout: list[str], firmware: Firmware) -> None:
    with tempfile.TemporaryDirectory(prefix="virt-dib-test-", dir="/var/tmp") as name:
        build_and_boot(Path(name), layout, firmware)


def build_and_boot(directory: Path, layout: list[str], firmware: Firmware) -> None:
    tools.run(
        [
            *as_ordinary_user(directory), sys.executable, "-m", "virt_dib", "--name", "d", "--formats", "qcow2,raw",
            *mirrors(), "debian-minimal", "vm", *layout,
        ],
        doing="building Debian",
        cwd=directory,
        environment={"HOME": str(directory), "PATH": "/usr/bin:/bin", "TMPDIR": str(directory)},
        timeout_s=_BUILD_TIMEOUT_S,
    )  # fmt: skip
    verdict = kvm.choose(kernel=None, cache_dir=directory)
    for image in (directory / "d.qcow2", directory / "d.raw"):
        result = boot_test(image, firmware=firmware, accelerate=verdict.acceleration is kvm.Acceleration.KVM)
        assert result.passed, "\n".join([result.reason, *result.last_lines])
        assert image.stat().st_blocks * 512 < 1500 * 1024**2
