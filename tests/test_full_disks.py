# SPDX-License-Identifier: Apache-2.0
"""Builds that find a file system full: which one it is, and what the user is told to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from helpers import Run, make_element, make_tiny_os
from test_failures import errors, fail, hidden, hints, output_dir
from virt_dib import tools
from virt_dib.errors import ScriptError
from virt_dib.monitor import BuildMonitor
from virt_dib.phases import Phases
from virt_dib.plan import make_plan
from virt_dib.sandbox import Settings, open_sandbox
from virt_dib.spec import BuildSpec
from virt_dib.tree_stage import make_tree

pytestmark = pytest.mark.appliance

SANDBOX = ("--isolation", "sandbox", "--skip-base")
VM = ("--isolation", "vm", "--skip-base")
__all__ = ["output_dir"]  # a fixture


def element(tmp_path: Path, element_dir: Path, script: str, *, name: str = "install.d/50-greedy") -> list[str]:
    """The arguments for the tiny system with an element whose only script is *script*."""
    make_element(tmp_path / "elements", "greedy", {name: f"#!/bin/bash\nset -e\n{script}\n"})
    return ["-p", str(element_dir), "-p", str(tmp_path / "elements"), "tiny-os", "greedy"]


def drive(tmp_path: Path, where: str, size_bytes: int) -> str:
    """A helper drive in the new directory *where*."""
    path = tmp_path / where / "drive.img"
    path.parent.mkdir()
    path.touch()
    os.truncate(path, size_bytes)
    tools.run(["mkfs.ext4", "-q", path], doing="making a drive")
    return str(path)


def test_a_script_fills_the_disk_that_the_tree_is_made_on(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    words = element(tmp_path, element_dir, "dd if=/dev/zero of=/big bs=1M")
    # No host has the memory for so much.
    options = [*SANDBOX, "--size", "10T"]
    run_by = hidden(f"mount -t tmpfs -o size=200m none {tmp_path}/temporary")
    run = fail([*options, *words], output_dir, tmp_path, run_by=run_by)
    assert run.exit_status == 1
    assert "install.d/50-greedy of element 'greedy' failed with exit status 1" in errors(run)[0]
    said = "the disk that the tree is made on is full: set TMPDIR to a directory with more room; "
    assert hints(run)[0].startswith(f"virt-dib: hint: {said}")


def test_a_script_fills_the_memory_that_the_tree_is_made_in(tmp_path: Path) -> None:
    make_tiny_os(tmp_path / "elements")
    element(tmp_path, tmp_path, "dd if=/dev/zero of=/big bs=1M")
    spec = BuildSpec(
        name="x", output_dir=tmp_path, elements=("tiny-os", "greedy"), element_paths=(tmp_path / "elements",),
        skip_base=True, network=False,
    )  # fmt: skip
    monitor = BuildMonitor()
    with monitor.logging(tmp_path / "x.log"):
        plan = make_plan(spec, tmp_path)
        settings = Settings(directory=plan.staging.finish(), network=False, memory_bytes=300 << 20)
        with open_sandbox(settings) as box, pytest.raises(ScriptError) as caught:
            make_tree(plan, Phases(plan.hooks.owners, monitor), box)
    assert "install.d/50-greedy of element 'greedy' failed with exit status 1" in str(caught.value)
    said = "the 0.3 GiB of memory that the tree is made in are full: with a larger --size it is made on disk, "
    assert (caught.value.problems[0].hint or "").startswith(f"{said}in the directory of TMPDIR; ")


def test_a_script_fills_the_helper_drive(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    words = element(tmp_path, element_dir, "dd if=/dev/zero of=$HOME/big bs=1M", name="root.d/05-greedy")
    run = fail([*VM, "--drive", drive(tmp_path, "drive", 120 << 20), *words], output_dir, tmp_path)
    assert run.exit_status == 1
    assert "root.d/05-greedy of element 'greedy' failed with exit status 1" in errors(run)[0]
    said = "the helper drive is full: remove files in it, or give a larger one with --drive; "
    assert hints(run)[0].startswith(f"virt-dib: hint: {said}")


def test_the_host_has_no_space_for_the_helper_drive(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    script = "dd if=/dev/zero of=$HOME/big bs=1M count=100\nsync\nsleep 600"
    words = element(tmp_path, element_dir, script, name="root.d/05-greedy")
    path = drive(tmp_path, "drive", 1 << 30)
    mount = f"mount -t tmpfs -o size=110m none {tmp_path}/drive"
    run_by = hidden(f"cp --sparse=always {path} {tmp_path}/copy; {mount}; cp --sparse=always {tmp_path}/copy {path}")
    run = fail([*VM, "--drive", path, *words], output_dir, tmp_path, run_by=run_by)
    assert run.exit_status == 1
    assert errors(run)[0].endswith(f"writing the helper drive '{path}': no space left on the host")
    assert hints(run)[0].startswith(f"virt-dib: hint: free some space in '{tmp_path}/drive', or give a --drive that")


def run_with_full(directory: Path, size: str, look: str, command: list[str], cwd: Path) -> Run:
    """Run *command* where *directory* is a file system of that size, and then *look*."""
    setup = f"mount -t tmpfs -o size={size} none {directory}; cd {cwd}; trap '{look}' EXIT"
    # As hidden() has it, but with a shell that stays.
    words = [*hidden(setup)[:-2], f'{setup}; "$@"', "sh", *command]
    result = tools.run(words, doing="running", environment=dict(os.environ), check=False)
    return Run(exit_status=result.exit_status, stdout=result.stdout, stderr=result.stderr, output_dir=cwd)


def test_an_image_cache_that_is_full_stays_as_it_was(element_dir: Path, tmp_path: Path) -> None:
    script = "head -c 5000000 /dev/zero >$DIB_IMAGE_CACHE/new; exit 3"
    words = element(tmp_path, element_dir, script, name="extra-data.d/05-greedy")
    cache, log = tmp_path / "cache", tmp_path / "disk.log"
    cache.mkdir()
    command = [sys.executable, "-m", "virt_dib", "--name", "disk", *SANDBOX, "--image-cache", str(cache), *words]
    run = run_with_full(
        cache, "1m", f"ls -A {cache}", ["sh", "-c", f'echo >{cache}/old; "$@"', "sh", *command], tmp_path
    )
    assert "extra-data.d/05-greedy of element 'greedy' failed with exit status 3" in errors(run)[0]
    warning = f"what the elements cached is not kept in '{cache}': No space left on device; make room there, or give"
    assert warning in log.read_text()
    assert run.stdout.endswith("\nold\n")


def test_a_log_whose_file_system_is_full(element_dir: Path, tmp_path: Path) -> None:
    words = element(tmp_path, element_dir, "head -c 2000000 /dev/zero | tr '\\0' x")
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "virt_dib", "--name", "disk", *SANDBOX, *words]
    run = run_with_full(out, "1m", f"ls -A {out}", command, out)
    assert run.exit_status == 1
    assert errors(run) == ["virt-dib: error: writing the log 'disk.log': No space left on device"]
    assert hints(run) == ["virt-dib: hint: make space in that directory"]
    assert run.stdout.endswith("xdisk.log\n")


WRITE = """
import sys
from pathlib import Path
from virt_dib import builder
from virt_dib.errors import ToolError
workspace, output_dir, full = map(Path, sys.argv[1:])
try:
    with builder._host_errors(workspace, output_dir):
        (full / "file").write_bytes(bytes(2 << 20))
except ToolError as error:
    print(error)
"""


@pytest.mark.parametrize("full", ["out", "temporary"])
def test_the_file_system_that_is_full_is_told_and_not_the_other_one(tmp_path: Path, full: str) -> None:
    for name in ("out", "temporary"):
        (tmp_path / name).mkdir()
    directories = [str(tmp_path / name) for name in ("temporary/build", "out", full)]
    run = run_with_full(tmp_path / full, "1m", ":", [sys.executable, "-c", WRITE, *directories], tmp_path)
    assert run.stdout == f"writing the files of the build in '{tmp_path / full}': No space left on device\n"
