# SPDX-License-Identifier: Apache-2.0
"""Sizes and options of mkfs are DIB's, by DIB's own lines; configurations that cannot be are refused."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from helpers import make_element
from virt_dib import device_config, layout, tools
from virt_dib.dib import DibInstallation, find_installation
from virt_dib.elements import Element, discover
from virt_dib.errors import ToolError, UsageError
from virt_dib.spec import BuildSpec

RANDOM_CASES = 40
NAMES = ("DIB_IMAGE_SIZE", "DIB_IMAGE_EXTRA_SIZE", "DIB_JOURNAL_SIZE", "MAX_ONLINE_RESIZE", "DIB_RELEASE")
Case = tuple[int, str, str, Mapping[str, str]]
"""Size of the tree in KiB, root file system, the elements as DIB lists them, variables."""


@pytest.fixture(scope="module")
def dib() -> DibInstallation:
    return find_installation(None)


def spec_of(variables: Mapping[str, str], **more: object) -> BuildSpec:
    fields: dict[str, object] = {"name": "x", "output_dir": Path(), "elements": ("one",), "size_bytes": None}
    return BuildSpec(**fields | more, variables=variables)  # type: ignore[arg-type] # fields by name


def element_called(name: str) -> Element:
    return Element(name=name, path=Path("/nowhere"), depends=frozenset(), provides=frozenset())


def answers_of_dib(
    dib: DibInstallation, cases: list[Case], mkfs_options: str, scratch: Path
) -> list[tuple[int, list[str]]]:
    """Image size in KiB and options of mkfs, by the very lines of disk-image-create."""
    text = (dib.library_dir / "disk-image-create").read_text()
    begin, end = "# save xtrace state", "export TMP_IMAGE_DIR"
    assert text.count(begin) == text.count(end) == 1
    rule = text[text.index(begin) : text.index(end)]
    script = f"""
TMP_BUILD_DIR=$1
sudo() {{ printf '%s\\ttotal\\n' "$tree_kib"; }}
while IFS=';' read -r tree_kib DIB_ROOT_FSTYPE IMAGE_ELEMENT {" ".join(NAMES)}; do
    MKFS_OPTS='{mkfs_options}'
    {rule}
    echo "answer;$DIB_IMAGE_SIZE;$MKFS_OPTS"
done
"""
    lines = [
        ";".join([str(tree_kib), fstype, elements, *(variables.get(name, "") for name in NAMES)])
        for tree_kib, fstype, elements, variables in cases
    ]
    bash = tools.require("bash", purpose="run the tests", package="bash")
    result = tools.run(
        [bash, "-c", script, "bash", scratch], doing="asking DIB", stdin="".join(f"{line}\n" for line in lines).encode()
    )
    answers = re.findall(r"^answer;(\d+);(.*)$", result.stdout, re.MULTILINE)
    return [(int(size), options.split()) for size, options in answers]


def made_up_cases() -> list[Case]:
    chosen = random.Random(7)  # noqa: S311 - the same cases every time
    cases: list[Case] = [
        (1000, fstype, elements, {"DIB_IMAGE_EXTRA_SIZE": extra, "DIB_RELEASE": release})
        for fstype, elements, extra, release in itertools.product(
            ("ext4", "xfs"), ("base vm", "base block-device-efi vm", "my-block-device-efi-lvm"), ("", "0", "0.7"),
            ("", "trusty"),
        )
    ]  # fmt: skip
    for _ in range(RANDOM_CASES):
        values = {
            "DIB_IMAGE_SIZE": chosen.choice(["", "", "5", "2.5", ".75", "1e1", "0.00001"]),
            "DIB_IMAGE_EXTRA_SIZE": chosen.choice(["", "0", "100", "33.3", f"{chosen.random() * 500:.5f}"]),
            "DIB_JOURNAL_SIZE": chosen.choice(["", "8", "128", str(chosen.randrange(1, 1024))]),
        }
        fstype = chosen.choice(["ext4", "xfs", "btrfs"])
        values["MAX_ONLINE_RESIZE"] = chosen.choice(["", "1099511627776"]) if fstype == "ext4" else ""
        cases.append((chosen.randrange(1, 1 << 28), fstype, "vm", values))
    return cases


def test_sizes_and_options_are_those_of_dib(dib: DibInstallation, tmp_path: Path) -> None:
    cases = made_up_cases()
    expected = answers_of_dib(dib, cases, "-m 1", tmp_path)
    assert len(expected) == len(cases)
    for (tree_kib, fstype, elements, variables), (size_kib, options) in zip(cases, expected, strict=True):
        spec = spec_of(variables, mkfs_options="-m 1")
        chosen = [element_called(name) for name in elements.split()]
        assert layout.image_size_kib(spec, chosen, fstype, tree_kib) == size_kib, (tree_kib, fstype, variables)
        assert layout.mkfs_options(spec, fstype).split() == options, (fstype, variables)


def test_a_size_that_is_given_is_the_size() -> None:
    spec = spec_of({"DIB_IMAGE_SIZE": "5"}, size_bytes=1 << 30)
    assert layout.image_size_kib(spec, [], "ext4", 1 << 30) == 1 << 20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(["DIB_IMAGE_SIZE"], ["0", "-1", "5G", "nan", "inf", "1_0", "0x10", "1e400", "٣"]),
        *itertools.product(["DIB_IMAGE_EXTRA_SIZE"], ["-1", "x", "1e99", "NaN"]),
        *itertools.product(["DIB_JOURNAL_SIZE"], ["0", "010", "64.5", "-3", "1" * 5000]),
    ],
)
def test_a_number_that_is_none(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"cannot use .* as {name}"):
        layout.image_size_kib(spec_of({name: value}), [], "ext4", 1000)


SIZES = [
    "10GiB", "10 GiB", "1.5G", "512MiB", "7", "100B", "2T", "2TB", "GiB", "1.KB", ".5MiB", "infGiB", "1e3G", "1.2.3G",
    "-1G", "5X", "5 G ", "G5", "1_0G", "nan",
]  # fmt: skip

ASK_DIB = """
import json, sys
from diskimage_builder.block_device.utils import parse_abs_size_spec
answers = []
for text in sys.argv[1:]:
    try:
        answers.append(parse_abs_size_spec(text))
    except (RuntimeError, ValueError):
        answers.append(None)
json.dump(answers, sys.stdout)
"""


def test_sizes_in_the_configuration_are_those_of_dib(dib: DibInstallation) -> None:
    environment = {"PYTHONPATH": str(dib.package_dir.parent)}
    answers = tools.run([dib.python, "-c", ASK_DIB, *SIZES], doing="asking DIB", environment=environment).stdout
    ours = {text: device_config.size_bytes(text) for text in SIZES}
    assert ours == dict(zip(SIZES, json.loads(answers), strict=True))


@pytest.mark.parametrize("value", ["0", "0G", "9" * 400, "9" * 400 + "TiB", "99999999TiB", None, ["1G"]])
def test_sizes_in_the_configuration_that_no_disk_has(value: object) -> None:
    assert device_config.size_bytes(value) is None


@pytest.mark.parametrize("variables", [{"DIB_IMAGE_SIZE": "2049"}, {"DIB_IMAGE_EXTRA_SIZE": "3000000"}])
def test_an_image_larger_than_its_disk(variables: Mapping[str, str]) -> None:
    with pytest.raises(UsageError, match=r"an image of [23] TiB is too large: at most 2 TiB"):
        layout.image_size_kib(spec_of(variables), [], "xfs", 1000)
    assert layout.image_size_kib(spec_of({"DIB_IMAGE_SIZE": "2048"}), [], "xfs", 1000) == 2 << 30


@pytest.mark.parametrize("value", ["0", "-1", "x", "1e5", "1 -d /etc", "1" * 30])
def test_a_number_of_blocks_that_is_none(value: str) -> None:
    with pytest.raises(UsageError, match=f"cannot use '{value}' as MAX_ONLINE_RESIZE"):
        layout.mkfs_options(spec_of({"MAX_ONLINE_RESIZE": value}), "ext4")


def test_blocks_that_a_file_system_has_no_use_for() -> None:
    spec = spec_of({"MAX_ONLINE_RESIZE": "10T"})
    assert layout.mkfs_options(spec, "ext3") == "-E resize=10T"
    with pytest.raises(UsageError, match="the root file system is 'xfs'"):
        layout.mkfs_options(spec, "xfs")


# ---- the configuration ----

TWO_IMAGES = """\
- local_loop:
    name: other
    size: 1000000000B
- local_loop:
    name: image0
    mkfs:
      name: mkfs_root
      mount:
        mount_point: /
        fstab: {options: defaults}
"""


def test_of_several_images_one_is_kept(tmp_path: Path, dib: DibInstallation) -> None:
    spec = spec_of({"DIB_BLOCK_DEVICE_CONFIG": TWO_IMAGES}, size_bytes=1 << 30)
    prepared = layout.prepare(spec, [], dib, tmp_path / "scratch")
    assert [(image.name, image.offset_bytes, image.size_bytes) for image in prepared.images] == [
        ("image0", 0, None),
        ("other", 1 << 30, 1000000000),
    ]
    assert prepared.discarded == ("other",)
    assert prepared.disk_bytes == (1 << 30) + 1000000000


def test_the_size_of_an_image_that_is_none(tmp_path: Path, dib: DibInstallation) -> None:
    for value in ("0B", "99999999TiB"):
        text = TWO_IMAGES.replace("1000000000B", value)
        with pytest.raises(UsageError, match=f"cannot use '{value}' as the size of"):
            layout.prepare(spec_of({"DIB_BLOCK_DEVICE_CONFIG": text}), [], dib, tmp_path / value)


def test_one_image_leaves_nothing_to_discard(tmp_path: Path, dib: DibInstallation) -> None:
    assert layout.prepare(spec_of({}), [], dib, tmp_path / "scratch").discarded == ()


def test_the_configuration_of_an_element(tmp_path: Path, dib: DibInstallation) -> None:
    text = TWO_IMAGES.replace("other", "späße")
    make_element(tmp_path / "elements", "one", {"block-device-default.yaml": "", "block-device-amd64.yaml": text})
    elements = list(discover([tmp_path / "elements"]).values())
    prepared = layout.prepare(spec_of({}), elements, dib, tmp_path / "scratch")
    assert prepared.config == text
    assert prepared.discarded == ("späße",)
    params = yaml.safe_load(layout.params_text(prepared, size_kib=64, options="-m 1"))
    assert (params["image-size"], params["root-fs-opts"]) == ("64KiB", "-m 1")


def test_a_variable_that_is_not_utf_8(tmp_path: Path, dib: DibInstallation) -> None:
    spec = spec_of({"DIB_BLOCK_DEVICE_CONFIG": b"# \xff\n".decode(errors="surrogateescape") + TWO_IMAGES})
    with pytest.raises(UsageError, match="DIB_BLOCK_DEVICE_CONFIG': it is not UTF-8"):
        layout.prepare(spec, [], dib, tmp_path / "scratch")


def test_files_that_are_not_utf_8(tmp_path: Path, dib: DibInstallation) -> None:
    element = make_element(tmp_path / "elements", "one", {})
    file = element / "block-device-default.yaml"
    file.write_bytes(b"# \xff\n")
    elements = list(discover([tmp_path / "elements"]).values())
    for spec in (spec_of({}), spec_of({"DIB_BLOCK_DEVICE_CONFIG": f"file://{file}"})):
        with pytest.raises(UsageError, match=r"block-device-default\.yaml': it is not UTF-8"):
            layout.prepare(spec, elements, dib, tmp_path / "scratch")


@pytest.mark.parametrize("name", ["nothing", "", "/etc"])
def test_a_file_that_cannot_be_read(tmp_path: Path, dib: DibInstallation, name: str) -> None:
    path = str(tmp_path / name) if name != "" else ""
    with pytest.raises(UsageError, match="reading the block device configuration"):
        layout.prepare(spec_of({"DIB_BLOCK_DEVICE_CONFIG": f"file://{path}"}), [], dib, tmp_path / "scratch")


@pytest.mark.parametrize(
    ("config", "error"), [("- nonsense", UsageError), (TWO_IMAGES.replace("image0", "disk"), UsageError)]
)
def test_what_dib_refuses(
    tmp_path: Path, dib: DibInstallation, config: str, error: type[ToolError | UsageError]
) -> None:
    with pytest.raises(error, match="block device configuration"):
        layout.prepare(spec_of({"DIB_BLOCK_DEVICE_CONFIG": config}), [], dib, tmp_path / "scratch")
