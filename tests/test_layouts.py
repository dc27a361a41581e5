# SPDX-License-Identifier: Apache-2.0
"""Images with each of DIB's partition layouts, from either isolation, looked into without mounting them."""

from __future__ import annotations

import functools
import json
import re
import struct
import tarfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ext4
from helpers import ISOLATIONS, files_in_image, make_element, skip_without, virt_dib
from virt_dib import tools

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
SEVERAL = """
- local_loop:
    name: image0
    size: 900MiB
- partitioning:
    base: image0
    label: gpt
    partitions:
      - name: ESP
        type: EF00
        size: 64MiB
        mkfs:
          type: vfat
          mount:
            mount_point: /boot/efi
            fstab:
              options: "defaults"
              fsck-passno: 2
      - name: log
        size: 128MiB
        mkfs:
          type: ext4
          opts: "-m 1 -O ^metadata_csum"
          mount:
            mount_point: /var/log
            fstab:
              options: "nodev,noexec"
              fsck-passno: 2
      - name: root
        size: 400MiB
        type: 8300
        mkfs:
          type: ext4
          mount:
            mount_point: /
            fstab:
              options: "defaults"
              fsck-passno: 1
      - name: var
        size: 200MiB
        mkfs:
          type: ext4
          label: own-label
          mount:
            mount_point: /var
            fstab:
              options: "nodev"
              fsck-passno: 2
"""
SPREAD = """#!/bin/bash
set -e
mkdir -p /etc/spread /var/lib/spread /var/log/spread /boot/efi/EFI/BOOT
echo root >/etc/spread/file
ln /etc/spread/file /etc/spread/hard
ln -s ../../../etc/spread/file /var/lib/spread/soft
chown 65535:60000 /etc/spread/file
chmod 6755 /etc/spread/file
echo var >/var/lib/spread/file
echo boot >/boot/efi/EFI/BOOT/file
head -c 300000 /dev/zero | tr '\\0' x >/boot/efi/EFI/BOOT/large
echo emptied in the end >/var/log/spread/log
chown 12:34 /var
chmod 711 /var
chown 0:4 /var/log /var/log/spread
chmod 2775 /var/log /var/log/spread
"""
"""Something for each of the file systems above, and odd owners and modes of the mount points."""
LARGE_ESP_FILE = b"x" * 300_000
MOST_BLOCKS = 16 << 20
"""For file systems that shall grow to 64 GiB and no more; by itself mke2fs takes a thousand times their size."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What to build."""

    elements: tuple[str, ...] = ()
    size: str = "1G"
    config: str = ""
    options: tuple[str, ...] = ()
    sector_bytes: int = 512


LAYOUTS = {
    "mbr": Layout(elements=("block-device-mbr",)),
    "gpt": Layout(elements=("block-device-gpt",), options=("--envvar", f"MAX_ONLINE_RESIZE={MOST_BLOCKS}")),
    "efi": Layout(elements=("block-device-efi",), size="2G"),
    "efi-4k": Layout(elements=("block-device-efi-4k",), size="2G", sector_bytes=4096),
    "efi-lvm": Layout(elements=("block-device-efi-lvm",), size="42G"),
    "custom": Layout(config=CUSTOM),
    "several": Layout(config=SEVERAL, options=("--formats", "raw,tar")),
    "xfs": Layout(options=("--fs-type", "xfs")),
}
COMPARED = ("mbr", "gpt", "efi", "efi-4k", "custom", "several", "xfs")
"""LVM is left out: the isolations do not differ there in how the image is made."""

BuildDisk = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def disk(element_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildDisk:
    """Gives the disk of a layout and an isolation, built once."""
    elements = tmp_path_factory.mktemp("elements")
    make_element(elements, "spread", {"install.d/50-spread": SPREAD})

    @functools.cache
    def built(name: str, isolation: str) -> Path:
        layout = LAYOUTS[name]
        output_dir = tmp_path_factory.mktemp(f"{name}-{isolation}")
        options = list(layout.options)
        if layout.config:
            # Each way to give it is taken by one isolation; what comes of both is compared.
            (output_dir / "config.yaml").write_text(layout.config)
            value = f"file://{output_dir}/config.yaml" if isolation == "sandbox" else layout.config
            options += ["--envvar", f"DIB_BLOCK_DEVICE_CONFIG={value}"]
        names = ("spread", *layout.elements)
        return build(
            [element_dir, elements], output_dir, *names, isolation=isolation, options=options, size=layout.size
        )

    return built


def build(
    search_path: list[Path],
    output_dir: Path,
    *elements: str,
    isolation: str,
    size: str,
    options: list[str] | None = None,
) -> Path:
    skip_without(isolation)
    command: list[str | Path] = ["--name", "disk", "--formats", "raw", "--size", size, "--skip-base"]
    command += ["--isolation", isolation, *(options or [])]
    for path in search_path:
        command += ["-p", path]
    run = virt_dib([*command, "tiny-os", *elements], cwd=output_dir)
    assert run.exit_status == 0, run.stdout + run.stderr
    return output_dir / "disk.raw"


def table(image: Path, sector_bytes: int = 512) -> dict[str, Any]:
    if sector_bytes != 512:
        return gpt(image, sector_bytes)
    sfdisk = tools.require("sfdisk", purpose="read partition tables", package="fdisk")
    found: dict[str, Any] = json.loads(tools.run([sfdisk, "-J", image], doing="reading the table").stdout)
    return dict(found["partitiontable"])


def gpt(image: Path, sector_bytes: int) -> dict[str, Any]:
    """What sfdisk would tell, if it could be told how long the sectors are."""
    with image.open("rb") as stream:
        stream.seek(sector_bytes)
        header = stream.read(92)
        assert header.startswith(b"EFI PART")
        first, count, length = struct.unpack_from("<QII", header, 72)
        stream.seek(first * sector_bytes)
        entries = [stream.read(length) for _ in range(count)]
    partitions = []
    for entry in entries:
        if any(entry[:16]):
            start, end, attributes = struct.unpack_from("<QQQ", entry, 32)
            partitions.append(
                {
                    "start": start,
                    "size": end - start + 1,
                    "type": str(uuid.UUID(bytes_le=entry[:16])).upper(),
                    "name": entry[56:].decode("utf-16-le").rstrip("\0"),
                    "attrs": attributes,
                }
            )
    return {"label": "gpt", "partitions": partitions}


def kind(image: Path, offset_bytes: int) -> dict[str, str]:
    blkid = tools.require("blkid", purpose="read labels", package="util-linux")
    # Not every partition holds something that blkid knows.
    command: list[str | Path] = [blkid, "-p", "-O", str(offset_bytes), "-o", "export", image]
    output = tools.run(command, doing="reading labels", check=False).stdout
    return dict(line.split("=", 1) for line in output.splitlines() if "=" in line)


def esp_file(image: Path, offset_bytes: int, path: str) -> bytes:
    mcopy = tools.require("mcopy", purpose="look into images", package="mtools")
    target = image.with_name("from-the-esp")
    tools.run([mcopy, "-n", "-i", f"{image}@@{offset_bytes}", f"::{path}", target], doing="reading the image")
    content = target.read_bytes()
    target.unlink()
    return content


def esp_names(image: Path, offset_bytes: int) -> list[str]:
    mdir = tools.require("mdir", purpose="look into images", package="mtools")
    output = tools.run([mdir, "-/", "-b", "-i", f"{image}@@{offset_bytes}", "::"], doing="reading the image").stdout
    return sorted(output.splitlines())


def xfs(image: Path, *commands: str) -> str:
    xfs_db = tools.require("xfs_db", purpose="look into images", package="xfsprogs")
    words = [word for command in commands for word in ("-c", command)]
    return tools.run([xfs_db, "-r", *words, image], doing="reading the image").stdout


def xfs_entries(image: Path) -> dict[str, str]:
    """What the inode of each path says about it, times aside, in an XFS file system that takes the whole image."""
    found = {}
    waiting = [("/", "directory")]
    fields = [f"print core.{name}" for name in ("mode", "nlinkv2", "uid", "gid", "size")]
    while waiting:
        path, kind = waiting.pop()
        words = fields if kind != "directory" else fields[:-1]
        found[path] = xfs(image, f"path {path}", *words)
        if kind == "directory":
            for line in xfs(image, f"path {path}", "ls").splitlines():
                _, _, below, _, _, name, *_ = line.split()
                if name not in {".", ".."}:
                    waiting.append((f"{path.rstrip('/')}/{name}", below))
    return found


def xfs_text(image: Path, path: str) -> str:
    """The content of a file that fits into one block."""
    size = re.search(r"core\.size = (\d+)", xfs(image, f"path {path}", "print core.size"))
    place = re.search(r"current daddr is (\d+)", xfs(image, f"path {path}", "dblock 0", "daddr"))
    assert size
    assert place
    with image.open("rb") as stream:
        stream.seek(int(place[1]) * 512)
        return stream.read(int(size[1])).decode()


def described(image: Path, sector_bytes: int) -> list[tuple[str, object]]:
    """All about a disk but what is drawn by lot: ids and times. The most telling comes first."""
    found: list[tuple[str, object]] = [("size", image.stat().st_size)]
    offsets = [0]
    if "PTTYPE" in kind(image, 0):
        partitions = table(image, sector_bytes)
        lot = {"id", "uuid", "device", "node"}
        found.append(("table", {name: partitions[name] for name in partitions if name not in lot | {"partitions"}}))
        found += [
            ("partition", {name: entry[name] for name in entry if name not in lot})
            for entry in partitions["partitions"]
        ]
        offsets = [entry["start"] * sector_bytes for entry in partitions["partitions"]]
    for offset in offsets:
        known = kind(image, offset)
        found.append(
            (
                f"kind at {offset}",
                {name: known[name] for name in known if name != "DEVNAME" and not name.endswith("UUID")},
            )
        )
        if known.get("TYPE") == "ext4":
            assert ext4.complaints(image, offset_bytes=offset) == ""
            decided = ext4.superblock(image, offset_bytes=offset)
            found.append((f"superblock at {offset}", {name: decided.get(name) for name in ext4.DECIDED_BY_MKFS}))
            with ext4.opened(image, offset_bytes=offset) as file_system:
                entries = file_system.entries()
            without = frozenset({"mtime_ns"})
            found.append((f"names at {offset}", sorted(entries)))
            found += [(f"{path!r} at {offset}", ext4.told(entries[path], without=without)) for path in sorted(entries)]
        elif known.get("TYPE") == "vfat":
            found.append((f"names at {offset}", esp_names(image, offset)))
            found.append((f"file at {offset}", esp_file(image, offset, "/EFI/BOOT/file")))
            found.append((f"large file at {offset}", esp_file(image, offset, "/EFI/BOOT/large") == LARGE_ESP_FILE))
        elif known.get("TYPE") == "xfs":
            repair = tools.require("xfs_repair", purpose="look into images", package="xfsprogs")
            tools.run([repair, "-n", "-f", image], doing="checking")
            found += sorted(xfs_entries(image).items())
            found.append(("fstab", xfs_text(image, "/etc/fstab")))
    return found


QUICK_LAYOUTS = ("mbr", "several")
"""Those that each run of the tests builds in both isolations; the others have their turn in 'make test-full'."""


def isolations(*quick: str) -> pytest.MarkDecorator:
    """Both; those of *quick* in each run of the tests."""
    marks = {name: pytest.mark.appliance if name in quick else pytest.mark.full for name in ISOLATIONS}
    return pytest.mark.parametrize("isolation", [pytest.param(name, marks=mark) for name, mark in marks.items()])


@isolations(*ISOLATIONS)
def test_mbr(disk: BuildDisk, isolation: str) -> None:
    image = disk("mbr", isolation)
    partitions = table(image)["partitions"]
    assert table(image)["label"] == "dos"
    assert [(p["start"], p["type"], p.get("bootable")) for p in partitions] == [(2048, "83", True)]
    root = files_in_image(image, offset_bytes=2048 * 512)
    assert root.label() == "cloudimg-rootfs"
    assert root.text("/etc/fstab") == "LABEL=cloudimg-rootfs / ext4 defaults 0 1\n"
    assert image.stat().st_size == 1024 * MIB


@isolations()
def test_gpt(disk: BuildDisk, isolation: str) -> None:
    image = disk("gpt", isolation)
    assert table(image)["label"] == "gpt"
    names = [partition["name"] for partition in table(image)["partitions"]]
    assert names == ["BSP", "root"]
    root = files_in_image(image, offset_bytes=table(image)["partitions"][1]["start"] * 512)
    assert root.text("/.top-level-dot-file") == "dot file\n"


@isolations()
def test_how_far_the_root_can_grow(disk: BuildDisk, isolation: str) -> None:
    """As --max-online-resize of disk-image-create has it, which is a variable here."""
    image = disk("gpt", isolation)
    offset_bytes = table(image)["partitions"][1]["start"] * 512
    less, most = ext4.most_blocks(ext4.superblock(image, offset_bytes=offset_bytes))
    assert less < MOST_BLOCKS <= most


@isolations()
def test_efi(disk: BuildDisk, isolation: str) -> None:
    image = disk("efi", isolation)
    partitions = table(image)["partitions"]
    assert [partition["name"] for partition in partitions] == ["ESP", "BSP", "root"]
    assert partitions[0]["type"] == ESP
    esp = kind(image, partitions[0]["start"] * 512)
    assert (esp["TYPE"], esp["LABEL"]) == ("vfat", "MKFS_ESP")
    assert esp_file(image, partitions[0]["start"] * 512, "/EFI/BOOT/file") == b"boot\n"
    root = files_in_image(image, offset_bytes=partitions[2]["start"] * 512)
    assert [line.split()[:3] for line in root.text("/etc/fstab").splitlines()] == [
        ["LABEL=cloudimg-rootfs", "/", "ext4"],
        ["LABEL=MKFS_ESP", "/boot/efi", "vfat"],
    ]
    assert root.names("/boot/efi") == []


@isolations()
def test_efi_with_4096_byte_sectors(disk: BuildDisk, isolation: str) -> None:
    image = disk("efi-4k", isolation)
    partitions = table(image, 4096)["partitions"]
    assert [partition["name"] for partition in partitions] == ["ESP", "BSP", "root"]
    root = files_in_image(image, offset_bytes=partitions[2]["start"] * 4096)
    assert root.text("/etc/spread/file") == "root\n"


@pytest.mark.full
@pytest.mark.parametrize("isolation", ["sandbox"])
def test_efi_lvm(disk: BuildDisk, isolation: str) -> None:
    image = disk("efi-lvm", isolation)
    partitions = table(image)["partitions"]
    assert "LVM2_member" in [kind(image, partition["start"] * 512).get("TYPE") for partition in partitions]
    # DIB gives it 40 GB, nearly all of them empty; so must the file be.
    assert image.stat().st_blocks * 512 < 200 * MIB
    assert esp_file(image, partitions[0]["start"] * 512, "/EFI/BOOT/file") == b"boot\n"


@isolations()
def test_custom_configuration(disk: BuildDisk, isolation: str) -> None:
    image = disk("custom", isolation)
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


@isolations("sandbox")
def test_a_tar_has_all_file_systems(disk: BuildDisk, isolation: str) -> None:
    with tarfile.open(disk("several", isolation).with_suffix(".tar")) as archive:
        members = {member.name: member for member in archive}
        texts = {
            name: stream.read()
            for name in ("etc/spread/file", "var/lib/spread/file", "var/log/spread/log", "boot/efi/EFI/BOOT/large")
            if (stream := archive.extractfile(f"./{name}")) is not None
        }
    assert list(texts.values()) == [b"root\n", b"var\n", b"", LARGE_ESP_FILE]
    assert members["./etc/spread/hard"].islnk()
    assert members["./var/lib/spread/soft"].linkname == "../../../etc/spread/file"
    owners = [(members[f"./{name}"].mode, members[f"./{name}"].uid, members[f"./{name}"].gid)
              for name in ("etc/spread/file", "var", "var/log")]  # fmt: skip
    assert owners == [(0o6755, 65535, 60000), (0o711, 12, 34), (0o2775, 0, 4)]
    assert not [name for name in members if name.startswith(("./proc/", "./sys/", "./dev/"))]
    assert "./etc/fstab" in members


@isolations(*ISOLATIONS)
def test_each_file_system_has_its_part_of_the_tree(disk: BuildDisk, isolation: str) -> None:
    image = disk("several", isolation)
    offsets = {partition["name"]: partition["start"] * 512 for partition in table(image)["partitions"]}
    root, var, log = (files_in_image(image, offset_bytes=offsets[name]) for name in ("root", "var", "log"))
    assert [root.label(), var.label(), log.label()] == ["cloudimg-rootfs", "own-label", "mkfs_log"]
    assert [line.split()[1:4] for line in root.text("/etc/fstab").splitlines()] == [
        ["/", "ext4", "defaults"],
        ["/boot/efi", "vfat", "defaults"],
        ["/var", "ext4", "nodev"],
        ["/var/log", "ext4", "nodev,noexec"],
    ]
    assert root.names("/var") == root.names("/boot/efi") == []
    assert root.text("/etc/spread/hard") == "root\n"
    assert var.names("/lib/spread") == ["file", "soft"]
    assert var.text("/lib/spread/file") == "var\n"
    assert var.names("/log") == []
    assert log.names("/spread") == ["log"]
    assert log.text("/spread/log") == ""
    assert esp_file(image, offsets["ESP"], "/EFI/BOOT/file") == b"boot\n"
    assert esp_file(image, offsets["ESP"], "/EFI/BOOT/large") == LARGE_ESP_FILE
    modes = {}
    for name in ("root", "var", "log"):
        with ext4.opened(image, offset_bytes=offsets[name]) as file_system:
            entries = file_system.entries()
        modes[name] = entries[b"/"].mode, entries[b"/"].uid, entries[b"/"].gid
        if name == "root":
            assert (entries[b"/etc/spread/file"].mode, entries[b"/etc/spread/file"].links) == (0o106755, 2)
    assert modes == {"root": (0o40755, 0, 0), "var": (0o40711, 12, 34), "log": (0o42775, 0, 4)}


@isolations("sandbox")
def test_xfs(disk: BuildDisk, isolation: str) -> None:
    image = disk("xfs", isolation)
    assert (kind(image, 0)["TYPE"], kind(image, 0)["LABEL"]) == ("xfs", "img-rootfs")
    assert xfs_text(image, "/etc/fstab") == "LABEL=img-rootfs / xfs defaults 0 1\n"
    assert xfs_text(image, "/etc/spread/file") == "root\n"
    entries = xfs_entries(image)
    assert "core.mode = 0106755" in entries["/etc/spread/file"]
    assert "core.uid = 65535" in entries["/etc/spread/hard"]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=pytest.mark.appliance if name in QUICK_LAYOUTS else pytest.mark.full)
        for name in COMPARED
    ],
)
def test_both_isolations_make_the_same_disk(disk: BuildDisk, layout: str) -> None:
    vm, sandbox = (described(disk(layout, isolation), LAYOUTS[layout].sector_bytes) for isolation in ISOLATIONS)
    # Of each there are hundreds, above all the files.
    assert len(vm) > 200
    differences = [f"vm {mine}, sandbox {other}" for mine, other in zip(vm, sandbox, strict=False) if mine != other]
    assert differences == []
    assert len(vm) == len(sandbox)


@isolations()
def test_size_auto_follows_dibs_rule(element_dir: Path, tmp_path: Path, isolation: str) -> None:
    files_mib = 150
    script = f"#!/bin/bash\nset -e\ndd if=/dev/urandom bs=1M count={files_mib} of=/big\n"
    make_element(tmp_path / "elements", "big", {"install.d/50-big": script})
    image = build([element_dir, tmp_path / "elements"], tmp_path, "big", isolation=isolation, size="auto")
    size_kib = image.stat().st_size // 1024
    assert size_kib % 64 == 0
    # The tree, with a few MiB of an operating system in it, divided by 0.6, and the journal.
    assert files_mib / 0.6 + 64 < size_kib / 1024 < (files_mib + 15) / 0.6 + 64
    assert ext4.complaints(image) == ""


@isolations()
def test_a_gigabyte_of_files_in_a_large_disk_stays_small(element_dir: Path, tmp_path: Path, isolation: str) -> None:
    write = "dd if=/dev/urandom bs=1M count=1024"
    script = f"#!/bin/bash\nset -e\n{write} of=/big\n{write} of=/gone\nrm /gone\n"
    make_element(tmp_path / "elements", "big", {"install.d/50-big": script})
    elements = [element_dir, tmp_path / "elements"]
    image = build(elements, tmp_path, "big", "block-device-gpt", isolation=isolation, size="5G")
    assert image.stat().st_size == 5 * 1024 * MIB
    assert 1000 * MIB < image.stat().st_blocks * 512 < 1200 * MIB
    offset_bytes = table(image)["partitions"][1]["start"] * 512
    assert ext4.complaints(image, offset_bytes=offset_bytes) == ""
