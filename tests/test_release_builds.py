# SPDX-License-Identifier: Apache-2.0
"""A partitioned image from each release of DIB, looked into without mounting it, and what its scripts saw.

Contract sections 1.5 and 2. One release in the sandbox is built by ``make test``, the others, in both
isolations, by ``make test-full``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import ext4
from dib_releases import RELEASES, release
from helpers import ISOLATIONS, files_in_image, make_element, skip_without, virt_dib
from test_contract import answer, environment, mounts
from test_layouts import kind, table
from virt_dib.spec import Phase

ORDINARY = [("1.28.0", "sandbox")]
BY_PYTHON = "2.38.0"
"""This one is found by --python, the others by -B and -p."""
MARKED = [
    pytest.param(version, isolation, marks=pytest.mark.appliance if pair in ORDINARY else pytest.mark.full)
    for version in RELEASES
    for isolation in ISOLATIONS
    for pair in [(version, isolation)]
]
pytestmark = pytest.mark.parametrize(("version", "isolation"), MARKED)

BEFORE_2 = ("0.1.43", "1.28.0")
BEFORE_2_4 = (*BEFORE_2, "2.0.0")
WITH_SHIM = ("2.38.0", "3.0.0")
START = {"0.1.43": 16065}
"""First sector of the partition: one cylinder, where scripts still counted in those."""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

OLD_PYTHON = """#!/usr/bin/env python
import os, sys, subprocess
assert sys.version_info >= (3,)
with open(os.path.join(os.environ["TARGET_ROOT"], "written-by-python"), "w") as stream:
    stream.write(subprocess.check_output(["sudo", "-E", "python", "-c", "import yaml; print(yaml.__name__)"]).decode())
"""
RUN_PARTS = """#!/bin/bash
set -e
program=$(type -P dib-run-parts) || exit 0
install -D "$program" "$TARGET_ROOT/usr/local/bin/dib-run-parts"
"""
ORDER = """#!/bin/bash
[[ ! -e /var/tmp/installed-packages ]] || touch /packages-came-first
"""


@dataclass(frozen=True, kw_only=True)
class Build:
    """One build that is done."""

    version: str
    image: Path
    probe_dir: Path

    @property
    def offset_bytes(self) -> int:
        """Where the partition begins."""
        return START.get(self.version, 2048) * 512


Builds = Callable[[str, str], Build]


@pytest.fixture(scope="module")
def builds(element_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """Gives the build of a release and an isolation, done once."""
    own = tmp_path_factory.mktemp("elements")
    today = {"root.d/61-run-parts": RUN_PARTS, "install.d/60-order": ORDER}
    today["environment.d/10-distro"] = "export DISTRO_NAME=tiny\n"
    make_element(own, "of-its-time", {"root.d/60-old-python": OLD_PYTHON, **today})
    make_element(own, "of-today", today)

    @functools.cache
    def build(version: str, isolation: str) -> Build:
        skip_without(isolation)
        dib = release(version)
        directory = tmp_path_factory.mktemp(f"{version}-{isolation}")
        options: list[str | Path] = [*dib.options]
        if version == BY_PYTHON:
            python = directory / "python-of-its-own"
            python.write_text(f'#!/bin/sh\nPYTHONPATH={dib.site} exec {sys.executable} "$@"\n')
            python.chmod(0o755)
            options = ["--python", python]
        # It would install packages.
        elements = ["--exclude-element", "bootloader", "--exclude-script", "51-bootloader"]
        elements += ["tiny-os", "probe", "vm", "of-its-time" if version in (*BEFORE_2_4, *WITH_SHIM) else "of-today"]
        run = virt_dib(
            [
                *options, "-p", element_dir, "-p", own, "--name", "old", "--formats", "raw", "--size", "1G",
                "--no-network", "--skip-base", "--isolation", isolation, "--extra-packages", "first,second", *elements,
            ],
            cwd=directory,
            environment={"TMPDIR": "/var/tmp"},
        )  # fmt: skip
        assert run.exit_status == 0, run.stdout + run.stderr
        return Build(version=version, image=directory / "old.raw", probe_dir=directory / "old.d" / "probe")

    return build


def test_partition_table(builds: Builds, version: str, isolation: str) -> None:
    image = builds(version, isolation).image
    assert image.stat().st_size == 1 << 30
    found = table(image)
    assert found["label"] == "dos"
    (partition,) = found["partitions"]
    assert (partition["start"], partition["type"], partition.get("bootable")) == (START.get(version, 2048), "83", True)
    # All the rest of the disk, to a cylinder or so.
    assert partition["start"] + partition["size"] > (1 << 30) // 512 - 4096


def test_file_system(builds: Builds, version: str, isolation: str) -> None:
    build = builds(version, isolation)
    found = kind(build.image, build.offset_bytes)
    assert (found["TYPE"], found["LABEL"]) == ("ext4", "cloudimg-rootfs")
    told = environment(build.probe_dir, Phase.INSTALL).get("DIB_IMAGE_ROOT_FS_UUID")
    assert (told == found["UUID"]) == (version in BEFORE_2_4)
    assert (told is None) == (version not in BEFORE_2_4)
    assert ext4.complaints(build.image, offset_bytes=build.offset_bytes) == ""


def test_files(builds: Builds, version: str, isolation: str) -> None:
    build = builds(version, isolation)
    image = files_in_image(build.image, offset_bytes=build.offset_bytes)
    assert image.text("/.top-level-dot-file") == "dot file\n"
    assert image.text("/etc/resolv.conf") == "nameserver 192.0.2.1\n"
    assert image.text("/var/tmp/installed-packages") == "first\nsecond\n"
    # Elements wrote it before dib-block-device did; the tiny operating system does not.
    wanted = [] if version in BEFORE_2_4 else ["LABEL=cloudimg-rootfs / ext4 defaults 0 1\n"]
    assert ([image.text("/etc/fstab")] if "fstab" in image.names("/etc") else []) == wanted
    assert ("dib-run-parts" in image.names("/usr/local/bin")) == (version in BEFORE_2_4)
    if version in (*BEFORE_2_4, *WITH_SHIM):
        assert image.text("/written-by-python") == "yaml\n"


def test_variables(builds: Builds, version: str, isolation: str) -> None:
    build = builds(version, isolation)
    seen = environment(build.probe_dir, Phase.ROOT)
    library = "/dib/prefix/lib" if version in BEFORE_2 else "/dib/site/diskimage_builder/lib"
    assert seen["_LIB"] == library
    assert seen.get("_PREFIX") == ("/dib/prefix" if version in BEFORE_2 else None)
    assert seen.get("SCRIPT_HOME") == ("/dib/prefix/bin" if version == "1.28.0" else None)
    assert seen.get("TMP_IMAGE_PATH") == ("/dib/image/image.raw" if version in BEFORE_2 else None)
    assert ("IMAGE_ELEMENT_YAML" in seen) == (version not in BEFORE_2)
    assert (seen.get("LANG"), seen.get("LC_ALL")) == (("C", None) if version in BEFORE_2_4 else (None, "C"))
    assert ("DIB_LOCKFILES" in seen) == (version not in BEFORE_2_4)
    assert ("DIB_BOOT_LABEL" in seen) == (version == "3.43.0")
    assert seen.get("DIB_PYTHON_EXEC") == (None if version in BEFORE_2_4 else "/usr/bin/python3")
    assert seen["PATH"] == ("/dib/programs:" if version in WITH_SHIM else "") + SYSTEM_PATH
    assert seen.get("DIB_PYTHON_EXEC_TMP") == ("/dib/programs" if version in WITH_SHIM else None)
    functions = ["die"] if version in BEFORE_2 else ["die", "get_image_element_array"]
    assert answer(build.probe_dir, Phase.ROOT, "functions").split() == functions
    inside = environment(build.probe_dir, Phase.INSTALL)
    assert inside["PATH"] == f"{SYSTEM_PATH if version == '0.1.43' else '$PATH'}:{SYSTEM_PATH}"
    assert inside.get("TMPDIR") == ("" if version == "0.1.43" else None)


def test_block_devices(builds: Builds, version: str, isolation: str) -> None:
    probe_dir = builds(version, isolation).probe_dir
    before = environment(probe_dir, Phase.BLOCK_DEVICE)
    assert before.get("IMAGE_BLOCK_DEVICE") == ("/dev/loop0" if version in BEFORE_2 else None)
    for phase in (Phase.FINALISE, Phase.CLEANUP):
        seen = environment(probe_dir, phase)
        assert seen["IMAGE_BLOCK_DEVICE"] == ("/dev/loop0p1" if version in BEFORE_2_4 else "/dev/loop0")
        assert seen.get("IMAGE_BLOCK_DEVICE_WITHOUT_PART") == ("/dev/loop0" if version == "2.0.0" else None)
        assert ("IMAGE_BLOCK_DEVICES" in seen) == (version not in BEFORE_2_4)
        assert seen["DIB_IMAGE_SIZE"] == ("1" if version in BEFORE_2 else "1048576")


def test_phases_and_mounts(builds: Builds, version: str, isolation: str) -> None:
    probe_dir = builds(version, isolation).probe_dir
    for phase in (Phase.POST_ROOT, Phase.PRE_FINALISE):
        assert (probe_dir / f"{phase.directory}.user").exists() == (version not in BEFORE_2_4)
    options = mounts(probe_dir, Phase.FINALISE)["/sys"][3].split(",")
    assert options[0] == ("ro" if version in ("3.20.0", "3.43.0") else "rw")


def test_extra_packages_come_where_that_release_had_them(builds: Builds, version: str, isolation: str) -> None:
    build = builds(version, isolation)
    names = files_in_image(build.image, offset_bytes=build.offset_bytes).names("/")
    assert ("packages-came-first" in names) == (version in BEFORE_2_4)
