# SPDX-License-Identifier: Apache-2.0
"""Builds that make no image: a ramdisk, and what else elements leave in ``NAME.d``."""

from __future__ import annotations

import gzip
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import Run, make_element, make_tiny_os, skip_without, virt_dib
from virt_dib import boot, boot_cli, kvm, tools
from virt_dib.errors import ToolError
from virt_dib.spec import Phase

pytestmark = pytest.mark.appliance

INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
echo "tiny ramdisk, made with $(/bin/busybox cat /etc/finalised)"
echo "told $(/bin/busybox cat /proc/cmdline)"
exec /bin/busybox sleep 600
"""
INSTALL = f"""#!/bin/bash
set -eu
cat >/init <<'SCRIPT'
{INIT}SCRIPT
chmod 755 /init
"""
FINALISE = """#!/bin/bash
set -eu
grep -q ' / ext4 ' /proc/self/mounts
echo "${RAMDISK_ELEMENT:-none} on $IMAGE_BLOCK_DEVICE" >/etc/finalised
"""
CLEANUP = r"""#!/bin/bash
# As ironic-python-agent-builder does it.
set -eu
[[ -b $IMAGE_BLOCK_DEVICE ]]
out=$(readlink -f "$IMAGE_NAME")
cp "$TMP_HOOKS_PATH/kernel-of-the-host" "$out.kernel"
env -0 >"$out.environment"
(
    cd "$TARGET_ROOT"
    printf '%s\n' init bin bin/busybox etc etc/finalised dev dev/console proc | cpio -o -H newc | gzip >"$out.initramfs"
)
if [[ ${LEAVE_ODD:-} ]]; then
    mkdir -p 'a directory/of two' empty
    echo odd >$'a directory/of two/odd \xe9\n\e[31m name'
    echo dash >-rf
    ln -rs "$IMAGE_NAME.kernel" link
    ln "$IMAGE_NAME.kernel" hard-link
    chmod 6777 hard-link
    mkfifo fifo
fi
"""


@dataclass(frozen=True, kw_only=True)
class Build:
    """One build, and what was in ``r.d`` after it."""

    run: Run
    left: Path


def build(directory: Path, elements: Path, *arguments: str, keep: str) -> Build:
    run = virt_dib(
        ["--name", "r", "--size", "1G", "--skip-base", "--no-network", "-p", elements, *arguments, "tiny-os"],
        cwd=directory,
        environment={"TMPDIR": "/var/tmp"},
    )
    left = directory / keep
    if (directory / "r.d").exists():
        shutil.copytree(directory / "r.d", left)
    return Build(run=run, left=left)


@pytest.fixture(scope="module")
def elements(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ramdisk-elements")
    make_tiny_os(directory)
    scripts = {"install.d/50-init": INSTALL, "finalise.d/50-tiny": FINALISE, "cleanup.d/99-tiny": CLEANUP}
    element = make_element(directory, "tiny-ramdisk", scripts)
    shutil.copyfile(kvm.host_kernels(Path("/"), os.environ)[0].path, element / "kernel-of-the-host")
    return directory


@pytest.fixture(scope="module")
def ramdisk(elements: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The first build: a ramdisk, from the sandbox."""
    skip_without("sandbox")
    directory = tmp_path_factory.mktemp("ramdisk")
    options = ["--isolation", "sandbox", "--ramdisk", "--ramdisk-element", "tiny-ramdisk", "--envvar", "LEAVE_ODD=1"]
    return build(directory, elements, *options, "--formats", "raw,qcow2", "manifests", keep="first")


@pytest.fixture(scope="module")
def no_final_image(ramdisk: Build, elements: Path) -> Build:
    """The second build, in the same place and from the appliance: an element says that there is no image."""
    options = ["--isolation", "vm", "tiny-ramdisk", "no-final-image"]
    return build(ramdisk.run.output_dir, elements, *options, keep="second")


@pytest.fixture(scope="module")
def nothing_made(no_final_image: Build, elements: Path) -> Build:
    """The third build, in the same place again: a ramdisk's element that leaves no ramdisk."""
    options = ["--isolation", "sandbox", "--ramdisk", "--envvar", "RAMDISK_ELEMENT=manifests"]
    return build(no_final_image.run.output_dir, elements, *options, keep="third")


def environment(path: Path) -> dict[str, str]:
    return dict(item.decode().split("=", 1) for item in path.read_bytes().split(b"\0") if item)


@pytest.mark.option("--ramdisk", "--ramdisk-element")
def test_a_ramdisk_and_no_image(ramdisk: Build) -> None:
    assert ramdisk.run.exit_status == 0, ramdisk.run.stdout + ramdisk.run.stderr
    assert {path.name for path in ramdisk.run.output_dir.glob("r.*")} == {"r.d", "r.log"}
    assert "no image is written, whatever --formats says, because of --ramdisk" in ramdisk.run.stdout
    seen = environment(ramdisk.left / "r.environment")
    assert seen["RAMDISK_ELEMENT"] == "tiny-ramdisk"
    assert seen["IMAGE_ELEMENT"].split() == ["tiny-ramdisk", "manifests", "tiny-os"]
    assert (seen["IMAGE_TYPE"], seen["IMAGE_NAME"], seen["DIB_NO_TMPFS"]) == ("qcow2", "r", "1")


def test_its_phases_have_run_in_the_file_systems_of_an_image(ramdisk: Build) -> None:
    initramfs = gzip.decompress((ramdisk.left / "r.initramfs").read_bytes())
    assert re.search(rb"tiny-ramdisk on /dev/\S+\n", initramfs)
    assert f"{Phase.FINALISE.directory}/50-tiny" in ramdisk.run.stdout


@pytest.mark.parametrize("name", ["dib_arguments", "dib_environment"])
def test_manifests_of_dibs_own_element_are_in_name_d(ramdisk: Build, name: str) -> None:
    text = (ramdisk.left / "dib-manifests" / name).read_text()
    assert "--ramdisk-element tiny-ramdisk" in text


def test_whatever_elements_leave_is_in_name_d(ramdisk: Build) -> None:
    left = os.fsencode(ramdisk.left)
    names = {os.path.relpath(os.path.join(top, name), left) for top, _, files in os.walk(left) for name in files}
    odd = b"a directory/of two/odd \xe9\n\x1b[31m name"
    assert {odd, b"-rf", b"hard-link", b"r.kernel", b"r.initramfs"} <= names
    assert not {b"link", b"fifo"} & names
    assert (ramdisk.left / "empty").is_dir()
    assert (ramdisk.left / "hard-link").read_bytes() == (ramdisk.left / "r.kernel").read_bytes()
    assert (ramdisk.left / "hard-link").stat().st_mode & 0o7111 == 0
    for name in ("link", "fifo"):
        assert re.search(
            rf"warning: neither file nor directory, not taken over from the guest: \S*{name}\n", log(ramdisk)
        )
    assert "\x1b[31m name" not in ramdisk.run.stdout + ramdisk.run.stderr


def log(made: Build) -> str:
    return (made.run.output_dir / "r.log").read_text() + made.run.stdout


def test_kernel_and_initramfs_start(ramdisk: Build, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    # qemu would take the comma for the end of a name.
    kernel, initrd = tmp_path / "kernel, of ours", tmp_path / "initrd, of ours"
    shutil.copyfile(ramdisk.left / "r.kernel", kernel)
    shutil.copyfile(ramdisk.left / "r.initramfs", initrd)
    arguments = ["--kernel", str(kernel), "--initrd", str(initrd), "--append", "panic=1 word"]
    assert boot_cli.main([*arguments, "--expect", "^told .*panic=1 word$", "-v"]) == 0
    out = capsys.readouterr().out
    assert "tiny ramdisk, made with tiny-ramdisk on /dev/" in out
    assert re.search(r"^kernel, of ours: booted to 'told .*' in [0-9.]+ s \(no boot loader, ", out, re.MULTILINE)


def test_what_is_no_kernel_does_not_start(ramdisk: Build) -> None:
    with pytest.raises(ToolError, match="starting the kernel: qemu ended"):
        boot.boot_kernel(ramdisk.left / "r.environment", ramdisk.left / "r.initramfs", expect="x", accelerate=False)


def test_a_second_build_replaces_name_d_as_a_whole(no_final_image: Build) -> None:
    assert no_final_image.run.exit_status == 0, no_final_image.run.stdout + no_final_image.run.stderr
    assert {path.name for path in no_final_image.left.iterdir()} == {"r.kernel", "r.initramfs", "r.environment"}
    assert list(no_final_image.run.output_dir.glob(".r*")) == []


def test_the_element_no_final_image(no_final_image: Build) -> None:
    assert list(no_final_image.run.output_dir.glob("r.qcow2")) == []
    assert (
        "no image is written, whatever --formats says, because of element 'no-final-image'" in no_final_image.run.stdout
    )
    assert "RAMDISK_ELEMENT" not in environment(no_final_image.left / "r.environment")


def test_a_ramdisk_that_nothing_made_is_an_error_and_leaves_the_earlier_one(
    nothing_made: Build, no_final_image: Build
) -> None:
    assert nothing_made.run.exit_status == 1
    assert "the elements left no other files" in nothing_made.run.stderr
    assert "is 'manifests' the element that makes the ramdisk?" in nothing_made.run.stderr
    tools.run(["diff", "-r", no_final_image.left, nothing_made.left], doing="comparing what is there")
