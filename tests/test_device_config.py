# SPDX-License-Identifier: Apache-2.0
"""A block device configuration that will not work is refused before anything is built, with its line and the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers import make_element
from virt_dib import device_config, layout, prerequisites
from virt_dib.dib import DibInstallation, find_installation
from virt_dib.elements import Element, discover
from virt_dib.errors import UsageError
from virt_dib.spec import BuildSpec

ROOT = """\
- local_loop:
    name: image0
    mkfs:
      name: mkfs_root
      mount:
        mount_point: /
"""


@pytest.fixture(scope="module")
def dib() -> DibInstallation:
    return find_installation(None)


def spec_with(config: str, **variables: str) -> BuildSpec:
    return BuildSpec(
        name="x",
        output_dir=Path(),
        elements=("one",),
        size_bytes=1 << 30,
        variables={"DIB_BLOCK_DEVICE_CONFIG": config, **variables},
    )


def partitioned(*sizes: str, label: str = "gpt", more: str = "") -> str:
    """The last of the partitions has the root."""
    lines = [f"      - {{name: p{number}, size: {size}}}\n" for number, size in enumerate(sizes)]
    lines[-1] = lines[-1].replace("}", ", mkfs: {name: mkfs_root, mount: {mount_point: /}}}")
    table = f"- partitioning:\n    base: image0\n    label: {label}\n    partitions:\n"
    return f"- local_loop: {{name: image0{more}}}\n{table}{''.join(lines)}"


# ---- the text ----

IN_LINE = "reading the block device configuration 'DIB_BLOCK_DEVICE_CONFIG', line "
IN_TEXT = "reading the block device configuration 'DIB_BLOCK_DEVICE_CONFIG': "


@pytest.mark.parametrize(
    ("config", "messages"),
    [
        ("- local_loop: [", [IN_LINE + "1: not YAML: expected the node content, but found '<stream end>'"]),
        (ROOT + "x: y", [IN_LINE + "7: not YAML: expected <block end>, but found '?'"]),
        ("- \x07", [IN_LINE + "1: not YAML: a character that is not allowed"]),
        (ROOT + "---\n" + ROOT, [IN_LINE + "7: not YAML: but found another document"]),
        (ROOT.replace("image0", "*x"), [IN_LINE + "2: not YAML: found undefined alias 'x'"]),
        ("- " * 5000 + "x", [IN_TEXT + "it is nested too deeply"]),
        ("~", [IN_TEXT + "it is not a list of devices"]),
        ("[]", [IN_TEXT + "it is not a list of devices"]),
        ("local_loop: {name: image0}", [IN_TEXT + "it is not a list of devices"]),
        (
            "- text\n- local_loop:\n  name: image0\n- {}\n",
            [
                IN_LINE + "1: this is not a device",
                IN_LINE + "2: a device wants one key, there are 2",
                IN_LINE + "4: a device wants one key, there are 0",
                IN_LINE + "2: 'local_loop' has no settings",
            ],
        ),
        (ROOT.replace("mkfs:", "mkfs: ext4\n    x:"), [IN_LINE + "3: 'mkfs' has no settings"]),
        ("- partitioning: {partitions: [1]}", [IN_LINE + "1: 'partitions' is not a list of partitions"]),
        ("- partitioning: {partitions: ~}", [IN_LINE + "1: 'partitions' is not a list of partitions"]),
        ('- local_loop: {name: "a\\0"}', [IN_LINE + "1: a character that is not allowed"]),
        ('- local_loop: {name: "\\ud800"}', [IN_LINE + "1: a character that is not allowed"]),
        ("&a [*a]", [IN_TEXT + "an anchor in it holds itself"]),
        ("- &a {mkfs: {mkfs: *a}}", [IN_TEXT + "an anchor in it holds itself"]),
    ],
)
def test_a_text_that_is_no_configuration(config: str, messages: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        device_config.choose(spec_with(config), [])
    assert sorted(problem.message for problem in caught.value.problems) == sorted(messages)
    assert all(problem.hint for problem in caught.value.problems)


@pytest.mark.parametrize("merged", [False, True])
def test_aliases_without_end(merged: bool) -> None:  # noqa: FBT001 - a table's column
    lines = ["    a0: &a0 {x: y}\n"]
    for number in range(1, 12):
        before = ", ".join([f"*a{number - 1}"] * 10)
        lines.append(
            f"    a{number}: &a{number} {{<<: [{before}]}}\n" if merged else f"    a{number}: &a{number} [{before}]\n"
        )
    with pytest.raises(UsageError, match="more than 100000 values in it, with its aliases followed"):
        device_config.choose(spec_with(ROOT.replace("    mkfs:", "".join(lines) + "    mkfs:")), [])


def test_files_that_never_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(1 << 42)
    for path, reason in {
        tmp_path / "fifo": "it is a FIFO that nobody writes to",
        tmp_path / "huge": "larger than 1 MiB",
        Path("/dev/zero"): "larger than 1 MiB",
        tmp_path: "Is a directory",
    }.items():
        with pytest.raises(UsageError) as caught:
            device_config.choose(spec_with(f"file://{path}"), [])
        assert str(caught.value) == f"reading the block device configuration '{path}': {reason}"
    with pytest.raises(UsageError, match=r"'/x{59}…': File name too long"):
        device_config.choose(spec_with(f"file:///{'x' * 5000}"), [])


def test_what_is_no_file_in_an_element_is_not_passed_over(tmp_path: Path) -> None:
    """DIB takes what exists; a link to nothing does not."""
    one = make_element(tmp_path, "one", {})
    config = one / "block-device-default.yaml"
    config.symlink_to("nothing")
    elements = list(discover([tmp_path]).values())
    spec = spec_with("")
    assert device_config.choose(spec, elements) == device_config.FALLBACK
    config.unlink()
    config.mkdir()
    with pytest.raises(UsageError, match="Is a directory"):
        device_config.choose(spec, elements)
    config.rmdir()
    os.mkfifo(config)
    with pytest.raises(UsageError, match="not a regular file"):
        device_config.choose(spec, elements)


# ---- what DIB makes of it ----

IN = "in the block device configuration: "


def refused(config: str, dib: DibInstallation, tmp_path: Path, **variables: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        layout.prepare(spec_with(config, **variables), [], dib, tmp_path / "scratch")
    assert all(problem.hint for problem in caught.value.problems)
    return [problem.message for problem in caught.value.problems]


SECOND = ROOT + "- local_loop: {name: second}\n"


@pytest.mark.parametrize(
    ("config", "messages"),
    [
        ("- local_loop: {name: image0}", [IN + "nothing is mounted at '/'"]),
        (
            ROOT.replace("name: mkfs_root", "name: other\n      type: ext4"),
            [IN + "the file system at '/' has no label"],
        ),
        (
            SECOND + "- mount: {name: m, base: second, mount_point: /x}",
            [IN + "what is mounted at '/x' is no file system: 'second'"],
        ),
        (
            ROOT + "- mount: {name: m, base: mount_mkfs_root, mount_point: /x}",
            [IN + "what is mounted at '/x' is no file system: 'mount_mkfs_root'"],
        ),
        (
            SECOND + "- mkfs: {name: f, base: second, type: ext4, mount: {mount_point: /x/../../../etc}}",
            [IN + "cannot mount at '/x/../../../etc'"],
        ),
        (
            SECOND + "- mkfs: {name: f, base: second, type: [ext4], label: 5}",
            [
                IN + "the type of the mkfs 'f' is not text: ['ext4']",
                IN + "the label of the mkfs 'f' is not text: 5",
            ],
        ),
        (ROOT.replace("image0", "5"), [IN + "the name of the local_loop '5' is not text: 5"]),
        (ROOT.replace("image0", "image0\n    block_size: 8192"), [IN + "cannot use '8192' as a block_size"]),
        (partitioned("100MiB", "95G"), [IN + "partition 'p1' of 95G does not fit: 922 MiB are left on the disk"]),
        (partitioned("100%", "1M"), [IN + "partition 'p1' of 1M does not fit: 0 MiB are left on the disk"]),
        (
            partitioned("1M", "1G", more=", size: 1G", label="mbr"),
            [IN + "partition 'p1' of 1G does not fit: 952 MiB are left on the disk"],
        ),
        (
            partitioned("101%", "abc", "0", "5"),
            [
                IN + f"cannot use '{size}' as the size of partition 'p{number}'"
                for number, size in enumerate(("101%", "abc", "0", "5"))
            ],
        ),
        (partitioned("~"), [IN + "partition 'p0' has no size"]),
        (
            SECOND + "- mkfs: {base: nowhere, type: ext4}\n- mount: {name: m, base: second, mount_point: /x}",
            [
                IN + "what is mounted at '/x' is no file system: 'second'",
                (
                    "diskimage-builder refuses the block device configuration: dib-block-device check: "
                    "BlockDeviceSetupException: Edge not defined: nowhere->mkfs_nowhere"
                ),
            ],
        ),
        (
            "- local_loop: {}",
            ["diskimage-builder refuses the block device configuration: a device in it has no 'base'"],
        ),
        (
            # Its words are in what DIB says, but it is no error of the host's.
            '- "No space left: ModuleNotFoundError": {}',
            [
                (
                    "diskimage-builder refuses the block device configuration: dib-block-device init: "
                    "BlockDeviceSetupException: Config entry is not a plugin value: "
                    "{'No space left: ModuleNotFoundError': {}}"
                )
            ],
        ),
    ],
)
def test_a_configuration_that_will_not_work(
    config: str, messages: list[str], dib: DibInstallation, tmp_path: Path
) -> None:
    assert refused(config, dib, tmp_path) == messages


@pytest.mark.parametrize("value", ["abc", "", "8192", "512.5"])
def test_sectors_that_no_device_has(value: str, dib: DibInstallation, tmp_path: Path) -> None:
    # Told once, however many images there are.
    assert refused(SECOND, dib, tmp_path, DIB_BLOCK_SIZE=value) == [f"cannot use '{value}' as DIB_BLOCK_SIZE"]


def test_partitions_that_fit_to_the_last_byte(dib: DibInstallation, tmp_path: Path) -> None:
    spec = spec_with(partitioned("500MiB", "50%", "260MiB", "100%"))
    assert len(layout.prepare(spec, [], dib, tmp_path / "scratch").parts) == 1


def test_sizes_of_elements_of_dib_are_known_to_be_too_small(dib: DibInstallation, tmp_path: Path) -> None:
    chosen: list[Element] = [discover([dib.elements_dir])["block-device-efi-lvm"]]
    with pytest.raises(UsageError, match=r"partition 'root' of 40G does not fit: 464 MiB are left"):
        layout.prepare(spec_with(""), chosen, dib, tmp_path / "scratch")


# ---- the programs for it ----


def test_file_systems_that_cannot_be_made_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert prerequisites.file_system_problems(["ext4", "swap", "ext4"]) == []
    first, second = prerequisites.file_system_problems(["nosuchfs", "../../bin/true"])
    assert first.message == "'mkfs.nosuchfs' not found, needed to make the file system 'nosuchfs'"
    assert first.hint == "is it a file system at all? such as ext4, xfs, vfat"
    assert "../../bin/true" in second.message
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("virt_dib.tools._SYSTEM_DIRS", ())
    (missing,) = prerequisites.file_system_problems(["xfs"])
    assert missing.hint
    assert "xfsprogs" in missing.hint


def test_the_types_of_all_that_is_made(dib: DibInstallation, tmp_path: Path) -> None:
    config = SECOND + "- mkfs: {name: f, base: second, type: swap}\n"
    assert layout.prepare(spec_with(config), [], dib, tmp_path / "scratch").file_systems == ("ext4", "swap")
