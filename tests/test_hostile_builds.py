# SPDX-License-Identifier: Apache-2.0
"""Whole builds of elements that mean harm: what is large, and file systems that are made up or broken."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from helpers import Run, make_element
from test_failures import errors, fail, hints, nothing_left, output_dir
from test_isolation import SANDBOX
from virt_dib import tools
from virt_dib.unpacking import MOST_MEMBERS

pytestmark = pytest.mark.full

__all__ = ["output_dir"]  # a fixture

GARBAGE = """#!/bin/bash
echo breaking $IMAGE_BLOCK_DEVICE
head -c 4M /dev/urandom >$IMAGE_BLOCK_DEVICE
sync
"""


def test_a_million_files_beside_an_image(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    script = "#!/bin/bash\nmkdir many\ncd many\nseq 1000000 | xargs touch\n"
    make_element(tmp_path / "elements", "many", {"post-root.d/50-many": script})
    paths: list[str | Path] = ["-p", element_dir, "-p", tmp_path / "elements"]
    run = fail([*SANDBOX, *paths, "tiny-os", "many"], output_dir, tmp_path)
    assert run.exit_status == 1
    assert f"the guest left more than {MOST_MEMBERS} files beside the image" in errors(run)[0]
    assert hints(run) == ["virt-dib: hint: an element left it there"]


@pytest.mark.parametrize("file_system", ["ext4", "xfs"])
@pytest.mark.parametrize("formats", ["raw", "qcow2,tar,squashfs"])
def test_a_file_system_that_an_element_has_broken(
    element_dir: Path, output_dir: Path, tmp_path: Path, file_system: str, formats: str
) -> None:
    """What becomes of it is its own affair: the outputs are complete, or there is an error."""
    make_element(tmp_path / "elements", "breaking", {"finalise.d/99-breaking": GARBAGE})
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    arguments = [*SANDBOX, "--fs-type", file_system, "--formats", formats, "--name", "broken", "--size", "1G"]
    paths = ["-p", str(element_dir), "-p", str(tmp_path / "elements")]
    built = output_dir / "built"
    built.mkdir()
    with nothing_left(output_dir, temporary):
        result = tools.run(
            [sys.executable, "-m", "virt_dib", *arguments, *paths, "tiny-os", "breaking"],
            doing="running virt-dib",
            cwd=built,
            environment={**os.environ, "TMPDIR": str(temporary)},
            timeout_s=900,
            check=False,
        )
        outputs = {path.name for path in built.iterdir()} - {"broken.log", "broken.d"}
        for path in built.iterdir():
            if path.is_file():
                path.unlink()
        built.rmdir()
    run = Run(exit_status=result.exit_status, stdout=result.stdout, stderr=result.stderr, output_dir=built)
    assert "breaking /dev/" in run.stdout
    if run.exit_status == 0:
        assert outputs == {f"broken.{name}" for name in formats.split(",")}
    else:
        assert run.exit_status == 1
        assert len(errors(run)) > 0
        assert outputs == set()
