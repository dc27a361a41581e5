# SPDX-License-Identifier: Apache-2.0
"""Images with each of DIB's partition layouts, looked into without mounting them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import files_in_image, make_element, virt_dib
from virt_dib import tools

pytestmark = pytest.mark.appliance

MIB = 1024**2
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
CUSTOM = """
- local_loop:
    name: image0
    size: 700MiB
- partitioning:
    base: image0
    label: gpt
    partitions:
      - name: root
        size: 60%
        type: 8300
        mkfs:
          label: custom-root
          type: ext4
          mount:
            mount_point: /
            fstab:
              options: "noatime"
              fsck-passno: 1
      - name: var
        size: 20%
        mkfs:
          type: ext4
          mount:
            mount_point: /var
            fstab:
              options: "nodev"
"""


def build(
    search_path: Path | list[Path], output_dir: Path, *elements: str, variables: tuple[str, ...] = (), size: str = "2G"
) -> None:
    options: list[str | Path] = ["--name", "disk", "--formats", "raw", "--size", size, "--skip-base"]
    for path in search_path if isinstance(search_path, list) else [search_path]:
        options += ["-p", path]
    for variable in variables:
        options += ["--envvar", variable]
    run = virt_dib([*options, "tiny-os", *elements], cwd=output_dir)
    assert run.exit_status == 0, run.stdout + run.stderr


def table(image: Path) -> dict[str, Any]:
    sfdisk = tools.require("sfdisk", purpose="read partition tables", package="fdisk")
    found: dict[str, Any] = json.loads(tools.run([sfdisk, "-J", image], doing="reading the table").stdout)
    return dict(found["partitiontable"])


def kind(image: Path, offset_bytes: int) -> dict[str, str]:
    blkid = tools.require("blkid", purpose="read labels", package="util-linux")
    # Not every partition holds something that blkid knows.
    command: list[str | Path] = [blkid, "-p", "-O", str(offset_bytes), "-o", "export", image]
    output = tools.run(command, doing="reading labels", check=False).stdout
    return dict(line.split("=", 1) for line in output.splitlines() if "=" in line)


def test_mbr(element_dir: Path, tmp_path: Path) -> None:
    build(element_dir, tmp_path, "block-device-mbr", size="1G")
    image = tmp_path / "disk.raw"
    partitions = table(image)["partitions"]
    assert table(image)["label"] == "dos"
    assert [(p["start"], p["type"], p.get("bootable")) for p in partitions] == [(2048, "83", True)]
    root = files_in_image(image, offset_bytes=2048 * 512)
    assert root.label() == "cloudimg-rootfs"
    assert root.text("/etc/fstab") == "LABEL=cloudimg-rootfs / ext4 defaults 0 1\n"
    assert image.stat().st_size == 1024 * MIB


def test_gpt(element_dir: Path, tmp_path: Path) -> None:
    build(element_dir, tmp_path, "block-device-gpt", size="1G")
    image = tmp_path / "disk.raw"
    assert table(image)["label"] == "gpt"
    names = [partition["name"] for partition in table(image)["partitions"]]
    assert names == ["BSP", "root"]
    root = files_in_image(image, offset_bytes=table(image)["partitions"][1]["start"] * 512)
    assert root.text("/.top-level-dot-file") == "dot file\n"


def test_efi(element_dir: Path, tmp_path: Path) -> None:
    build(element_dir, tmp_path, "block-device-efi")
    image = tmp_path / "disk.raw"
    partitions = table(image)["partitions"]
    assert [partition["name"] for partition in partitions] == ["ESP", "BSP", "root"]
    assert partitions[0]["type"] == ESP
    esp = kind(image, partitions[0]["start"] * 512)
    assert (esp["TYPE"], esp["LABEL"]) == ("vfat", "MKFS_ESP")
    fstab = files_in_image(image, offset_bytes=partitions[2]["start"] * 512).text("/etc/fstab")
    assert [line.split()[:3] for line in fstab.splitlines()] == [
        ["LABEL=cloudimg-rootfs", "/", "ext4"],
        ["LABEL=MKFS_ESP", "/boot/efi", "vfat"],
    ]


def test_efi_with_4096_byte_sectors(element_dir: Path, tmp_path: Path) -> None:
    build(element_dir, tmp_path, "block-device-efi-4k")
    with (tmp_path / "disk.raw").open("rb") as stream:
        stream.seek(4096)
        assert stream.read(8) == b"EFI PART"


def test_efi_lvm(element_dir: Path, tmp_path: Path) -> None:
    build(element_dir, tmp_path, "block-device-efi-lvm", size="42G")
    image = tmp_path / "disk.raw"
    partitions = table(image)["partitions"]
    assert "LVM2_member" in [kind(image, partition["start"] * 512).get("TYPE") for partition in partitions]
    # DIB gives it 40 GB, nearly all of them empty; so must the file be.
    assert image.stat().st_blocks * 512 < 200 * MIB


@pytest.mark.parametrize("as_file", [False, True], ids=["text", "file"])
def test_custom_configuration(element_dir: Path, tmp_path: Path, *, as_file: bool) -> None:
    if as_file:
        (tmp_path / "config.yaml").write_text(CUSTOM)
    value = f"file://{tmp_path}/config.yaml" if as_file else CUSTOM
    build(element_dir, tmp_path, variables=(f"DIB_BLOCK_DEVICE_CONFIG={value}",))
    image = tmp_path / "disk.raw"
    partitions = table(image)["partitions"]
    assert image.stat().st_size == 700 * MIB
    root = files_in_image(image, offset_bytes=partitions[0]["start"] * 512)
    assert root.label() == "custom-root"
    assert [line.split()[1:4] for line in root.text("/etc/fstab").splitlines()] == [
        ["/", "ext4", "noatime"],
        ["/var", "ext4", "nodev"],
    ]
    var = files_in_image(image, offset_bytes=partitions[1]["start"] * 512)
    assert "log" in var.names("/")
    assert root.names("/var") == []


def test_size_auto_follows_dibs_rule(element_dir: Path, tmp_path: Path) -> None:
    files_mib = 150
    script = f"#!/bin/bash\nset -e\ndd if=/dev/urandom bs=1M count={files_mib} of=/big\n"
    make_element(tmp_path / "elements", "big", {"install.d/50-big": script})
    build([element_dir, tmp_path / "elements"], tmp_path, "big", size="auto")
    size_kib = (tmp_path / "disk.raw").stat().st_size // 1024
    assert size_kib % 64 == 0
    # The tree, with a few MiB of an operating system in it, divided by 0.6, and the journal.
    assert files_mib / 0.6 + 64 < size_kib / 1024 < (files_mib + 15) / 0.6 + 64


def test_a_gigabyte_of_files_in_a_large_disk_stays_small(element_dir: Path, tmp_path: Path) -> None:
    write = "dd if=/dev/urandom bs=1M count=1024"
    script = f"#!/bin/bash\nset -e\n{write} of=/big\n{write} of=/gone\nrm /gone\n"
    make_element(tmp_path / "elements", "big", {"install.d/50-big": script})
    build([element_dir, tmp_path / "elements"], tmp_path, "big", "block-device-gpt", size="5G")
    image = tmp_path / "disk.raw"
    assert image.stat().st_size == 5 * 1024 * MIB
    assert 1000 * MIB < image.stat().st_blocks * 512 < 1200 * MIB
