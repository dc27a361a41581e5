# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest

from virt_dib import tools
from virt_dib.errors import UsageError
from virt_dib.spec import LABEL_LIMITS, check_label, check_name, parse_size


@pytest.mark.parametrize("label", ["cloudimg-rootfs", "x", "a.b_c+d:e=f", "1", "~", "x-", "#x"])
def test_labels_that_will_do(label: str) -> None:
    check_label(label, "ext4")


@pytest.mark.parametrize(
    "label",
    [
        "a b",
        "a\tb",
        "a\n",
        "a/b",
        "a'b",
        'a"b',
        "a`b",
        "a\\b",
        "a,b",
        "-x",
        "é",
        "a\x7f",
        "a\0",
        "a\x1b",
        "\udc80",
        "٣",
    ],
)
def test_labels_that_will_not(label: str) -> None:
    with pytest.raises(UsageError, match="as the root label"):
        check_label(label, "")


def test_a_name_that_is_not_utf_8_is_refused_for_that() -> None:
    with pytest.raises(UsageError, match="as the name of the image: it is not UTF-8") as caught:
        check_name(os.fsdecode(b"a\xff"))
    assert "control characters" not in (caught.value.problems[0].hint or "")


@pytest.mark.parametrize(("fs_type", "limit"), LABEL_LIMITS.items())
def test_the_length_of_labels(fs_type: str, limit: int) -> None:
    check_label("x" * limit, fs_type)
    with pytest.raises(UsageError, match=f"too long for {fs_type}: {limit + 1} characters, {limit} at most"):
        check_label("x" * (limit + 1), fs_type)


def test_an_empty_label() -> None:
    with pytest.raises(UsageError, match="empty root label"):
        check_label("", "ext4")


@pytest.mark.parametrize("label", ["a.b_c+d:e=f", "0123456789abcdef", "#x", "$(x)"])
def test_mke2fs_takes_labels_as_they_are(tmp_path: Path, label: str) -> None:
    check_label(label, "ext4")
    disk = tmp_path / "disk"
    with disk.open("wb") as stream:
        stream.truncate(1 << 20)
    mke2fs = tools.require("mke2fs", purpose="run the tests", package="e2fsprogs")
    tools.run([mke2fs, "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-L", label, disk], doing="making ext4")
    e2label = tools.require("e2label", purpose="run the tests", package="e2fsprogs")
    assert tools.run([e2label, disk], doing="reading the label").stdout.strip() == label


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("5G", 5 << 30), ("1b", 65536), ("65537b", 131072), ("1.5T", 3 << 39), ("1024P", 1 << 60), ("auto", None)],
)
def test_sizes(text: str, size_bytes: int | None) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "5", "G", "0G", "1025P", "-5G", "5 G", "1e3G", "infG", "9" * 400 + "G", "٣G"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="as the size of the image"):
        parse_size(text)
