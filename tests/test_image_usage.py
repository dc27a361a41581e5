# SPDX-License-Identifier: Apache-2.0
"""DIB_SHOW_IMAGE_USAGE: what takes how much room in the image."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers import make_element, skip_without, tree_stage, tree_stage_command
from virt_dib import dib, tools
from virt_dib.layout import guest_script

MIB = 1 << 20
_THEIRS = r"""
sudo() { "$@"; }
xtrace=: du_output=$TMP_BUILD_DIR/du
eval "$(sed -n '/DIB_SHOW_IMAGE_USAGE:-0/,/^fi/p' "$1")"
"""


@pytest.mark.parametrize("everything", ["", "1"])
def test_the_report_is_that_of_disk_image_create(tmp_path: Path, everything: str) -> None:
    for name, size in {
        "large": 12 * MIB,
        "a/ten": 10 * MIB,
        "b/almost": 9 * MIB,
        "c/small file": 5000,
    }.items():
        path = tmp_path / "built" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))
    environment = {
        "PATH": "/usr/bin:/bin", "LC_ALL": "C", "TMP_BUILD_DIR": str(tmp_path), "DIB_SHOW_IMAGE_USAGE": "1",
        "DIB_SHOW_IMAGE_USAGE_FULL": everything or "0",
    }  # fmt: skip
    script = dib.find_installation(None).library_dir / "disk-image-create"
    theirs = tools.run(["bash", "-c", _THEIRS, "-", script], doing="asking", environment=environment).stdout
    ours = tools.run(
        ["bash", guest_script("tree.sh"), "show_usage", tmp_path / "built", everything],
        doing="asking",
        environment=environment,
    ).stdout
    assert ours == theirs
    assert ("small file" in ours, "almost" in ours, "large" in ours) == (bool(everything), bool(everything), True)


@pytest.mark.sandbox
@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_a_build_shows_it(tmp_path: Path, element_dir: Path, value: str, *, shown: bool) -> None:
    skip_without("sandbox")
    own = tmp_path / "elements"
    make_element(own, "large", {"install.d/50-large": "#!/bin/sh\nhead -c 12000000 /dev/zero | tr '\\0' x >/large\n"})
    command = tree_stage_command(
        ["-p", element_dir, "-p", own, "--skip-base", "--envvar", f"DIB_SHOW_IMAGE_USAGE={value}", "tiny-os", "large"],
        look="true",
    )
    run, _ = tree_stage(command, cwd=tmp_path, environment={**os.environ, "HOME": str(tmp_path)})
    assert run.exit_status == 0, run.stdout + run.stderr
    assert ("12MiB /dib/build/built/large\n" in run.stdout) == shown
    assert ("Image size report" in run.stdout) == shown
