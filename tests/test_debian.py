# SPDX-License-Identifier: Apache-2.0
"""Debian from DIB's own elements, unmodified, built as an ordinary user and booted: ``make test-debian``."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import TESTS
from test_sandbox import ordinary_user
from virt_dib import kvm, tools
from virt_dib.boot import Firmware, boot_test

pytestmark = pytest.mark.debian

_BUILD_TIMEOUT_S = 5400
_NOBODY = "65534"


def as_ordinary_user(directory: Path, isolation: str) -> list[str]:
    """The beginning of a command that gives up root's rights, which the product does not want.

    Where nobody has the subordinate ids that a sandbox needs, it runs as root, which needs none.
    """
    if os.geteuid() != 0:
        return []
    setpriv = tools.require("setpriv", purpose="run the build as an ordinary user", package="util-linux")
    if isolation == "vm":
        os.chown(directory, int(_NOBODY), int(_NOBODY))
        return [str(setpriv), f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", "--no-new-privs"]
    user = ordinary_user()
    if user is None:
        return []
    os.chown(directory, user.pw_uid, user.pw_gid)
    return [str(setpriv), f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups"]


def mirrors() -> list[str]:
    """``--envvar`` options for the machine's own mirrors."""
    found = tools.run([TESTS.parent / "scripts/mirrors"], doing="looking for mirrors", environment=os.environ).stdout
    return [word for line in found.splitlines() if line for word in ("--envvar", line)]


LAYOUTS = {
    "mbr": ([], Firmware.BIOS),
    "gpt": (["block-device-gpt"], Firmware.BIOS),
    "efi": (["block-device-efi"], Firmware.UEFI),
}


@pytest.mark.parametrize(
    ("isolation", "layout"),
    [
        # The one of these that continuous integration has the time for.
        pytest.param("sandbox", "mbr", marks=pytest.mark.appliance),
        *(pair for pair in itertools.product(("sandbox", "vm"), LAYOUTS) if pair != ("sandbox", "mbr")),
    ],
)
def test_debian_builds_and_boots(isolation: str, layout: str) -> None:
    with build_dir() as directory:
        build_and_boot(directory, as_ordinary_user(directory, isolation), isolation, layout)


@pytest.mark.needs_root
@pytest.mark.skipif(os.geteuid() != 0, reason="wants root")
def test_root_may_build_it_in_a_sandbox_too() -> None:
    with build_dir() as directory:
        build_and_boot(directory, [], "sandbox", "mbr")


@contextlib.contextmanager
def build_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="virt-dib-test-", dir="/var/tmp") as name:
        yield Path(name)


def build_and_boot(directory: Path, wrapper: list[str], isolation: str, layout: str) -> None:
    elements, firmware = LAYOUTS[layout]
    tools.run(
        [
            *wrapper, sys.executable, "-m", "virt_dib", "--isolation", isolation,
            "--name", "d", "--formats", "qcow2,raw", *mirrors(), "debian-minimal", "vm", *elements,
        ],
        doing="building Debian",
        cwd=directory,
        environment={"HOME": str(directory), "PATH": "/usr/bin:/bin", "TMPDIR": str(directory)},
        timeout_s=_BUILD_TIMEOUT_S,
    )  # fmt: skip
    qemu_img = tools.require("qemu-img", purpose="compare images", package="qemu-utils")
    tools.run([qemu_img, "compare", directory / "d.qcow2", directory / "d.raw"], doing="comparing the images")
    for image in (directory / "d.qcow2", directory / "d.raw"):
        assert image.stat().st_blocks * 512 < 1500 * 1024**2
    verdict = kvm.choose(kernel=None, cache_dir=directory)
    accelerate = verdict.acceleration is kvm.Acceleration.KVM
    result = boot_test(directory / "d.qcow2", firmware=firmware, accelerate=accelerate)
    assert result.passed, "\n".join([result.reason, *result.last_lines])
