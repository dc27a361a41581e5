# SPDX-License-Identifier: Apache-2.0
"""What a build says before its virtual machine starts. Here qemu always fails, so that is all there is of it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from dib_releases import release
from helpers import Run, make_element, virt_dib, wait_until
from on_terminal import on_terminal
from test_failures import errors, fail, hidden, hints, nothing_left, output_dir, processes
from virt_dib import prerequisites, tools
from virt_dib.workspace import remove_leftovers

__all__ = ["output_dir"]  # a fixture

FAILS = "#!/bin/sh\necho cannot set up guest memory >&2\nexit 1\n"
TWO_IMAGES = """
- local_loop: {name: image0, mkfs: {name: mkfs_root, mount: {mount_point: /}}}
- local_loop: {name: data, size: 100M}
"""


@pytest.fixture(autouse=True)
def _libguestfs() -> None:
    if prerequisites.require_prerequisites():
        pytest.skip("this host has no appliance")


@pytest.fixture
def qemu(tmp_path: Path) -> Path:
    path = tmp_path / "qemu"
    path.write_text(FAILS)
    path.chmod(0o755)
    return path


def build(arguments: Sequence[str | Path], qemu: Path, element_dir: Path, output_dir: Path) -> Run:
    options: list[str | Path] = ["--name", "x", "--skip-base", "-p", element_dir]
    environment = {"LIBGUESTFS_HV": str(qemu), "VIRT_DIB_KVM": "off", "TMPDIR": str(qemu.parent)}
    run = virt_dib([*options, *arguments], cwd=output_dir, environment=environment)
    assert run.exit_status == 1
    assert "virt-dib: error: starting the appliance: " in run.stderr
    return run


def warnings(run: Run) -> list[str]:
    return [line.split("warning: ", 1)[1] for line in run.stdout.splitlines() if "warning: " in line]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_images_that_are_thrown_away(qemu: Path, element_dir: Path, out: Path) -> None:
    run = build(["--envvar", f"DIB_BLOCK_DEVICE_CONFIG={TWO_IMAGES}", "tiny-os"], qemu, element_dir, out)
    assert warnings(run) == ["only image0 becomes an output; built and thrown away: data"]


def test_a_ramdisk_element_without_a_ramdisk(qemu: Path, element_dir: Path, out: Path) -> None:
    run = build(["--ramdisk-element", "dracut-ramdisk", "tiny-os"], qemu, element_dir, out)
    assert warnings(run) == ["without --ramdisk, the ramdisk element 'dracut-ramdisk' is not added"]


def test_scripts_of_a_phase_that_a_release_does_not_have(
    qemu: Path, element_dir: Path, out: Path, tmp_path: Path
) -> None:
    files = {f"{phase}.d/50-x": "#!/bin/bash\n" for phase in ("post-root", "pre-finalise")}
    make_element(tmp_path / "elements", "late", files)
    arguments: list[str | Path] = [*release("0.1.43").options, "-p", tmp_path / "elements", "tiny-os", "late"]
    assert warnings(build(arguments, qemu, element_dir, out)) == [
        "not run, since diskimage-builder 0.1.43 has no such phase: post-root.d, pre-finalise.d"
    ]


def test_a_shell_in_a_phase_that_a_release_does_not_have(
    qemu: Path, element_dir: Path, out: Path, tmp_path: Path
) -> None:
    program: list[str | Path] = [sys.executable, "-m", "virt_dib", "--skip-base", *release("0.1.43").options]
    arguments = [*program, "-p", element_dir, "--break", "after-post-root,before-root", "tiny-os"]
    environment = {"LIBGUESTFS_HV": str(qemu), "VIRT_DIB_KVM": "off", "TMPDIR": str(tmp_path), "COLUMNS": "200"}
    with on_terminal(arguments, cwd=out, environment=environment) as running:
        running.person.read_until(r"(?s)no.{1,20}shell,.*0\.1\.43.*no.{1,20}such.{1,20}phase:.{1,20}after-post-root")
        assert running.ended() == 1


KILLED = """
import os, signal, sys
from virt_dib.cli import main
event = sys.argv.pop(1)
def kill(what, arguments):
    if what == event and str(arguments[0]).endswith(".partial"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
sys.exit(main())
"""


@pytest.mark.parametrize(("event", "left"), [("os.link", []), ("os.remove", ["x.log"])])
def test_a_kill_while_the_log_gets_its_name_leaves_no_other_one(
    qemu: Path, element_dir: Path, out: Path, tmp_path: Path, event: str, left: list[str]
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "LIBGUESTFS_HV": str(qemu), "VIRT_DIB_KVM": "off", "TMPDIR": str(temporary)}
    words: list[str | Path] = ["--name", "x", "--skip-base", "-p", element_dir, "tiny-os"]
    command = [sys.executable, "-c", KILLED, event, *words]
    result = tools.run(command, doing="building", cwd=out, environment=environment, check=False)
    assert result.exit_status == 128 + signal.SIGKILL
    assert [name for name in os.listdir(out) if name.endswith(".partial")] != []
    assert len(remove_leftovers(temporary)) == 1
    assert os.listdir(out) == left


def test_the_next_build_removes_what_a_killed_one_has_left(
    qemu: Path, element_dir: Path, output_dir: Path, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "LIBGUESTFS_HV": str(qemu), "VIRT_DIB_KVM": "off", "TMPDIR": str(temporary)}
    words: list[str | Path] = ["--name", "disk", "--isolation", "vm", "--skip-base", "-p", element_dir, "tiny-os"]
    command = [sys.executable, "-m", "virt_dib", *words]
    # The shell's words are those of qemu, among them its files in TMPDIR.
    qemu.write_text("#!/bin/sh\nwhile :; do sleep 1; done\n")
    with nothing_left(output_dir, temporary):
        with tools.started(command, environment=environment, cwd=output_dir, stderr=tools.TOGETHER) as process:
            wait_until(lambda: processes(qemu))
            process.kill()
        wait_until(lambda: not processes(qemu))
        assert os.listdir(temporary) != []
        qemu.write_text(FAILS)
        result = tools.run(command, doing="building", environment=environment, cwd=output_dir, check=False)
        assert result.exit_status == 1
        assert "virt-dib: error: starting the appliance: " in result.stderr


def test_a_host_that_allows_no_disks_of_that_length(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    run_by = ["/bin/bash", "-c", 'ulimit -f 1000000; exec "$@"', "bash"]
    run = fail(["--skip-base", "-p", element_dir, "tiny-os"], output_dir, tmp_path, run_by=run_by)
    assert run.exit_status == 1
    assert "making a disk of 5120 MiB in " in errors(run)[0]
    assert "File too large" in errors(run)[0]
    assert "sparse files of that length" in hints(run)[0]


def test_no_program_for_a_network_of_its_own(qemu: Path, element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    covered = [f"/usr/bin/{name}" for name in ("slirp4netns", "pasta", "passt") if os.path.exists(f"/usr/bin/{name}")]
    setup = "; ".join(f"mount --bind /dev/null {path}" for path in covered) or ":"
    real = f"/usr/bin/qemu-system-{os.uname().machine}"
    setup = f"{setup}; mount --bind {qemu} $(readlink -f {real}); export VIRT_DIB_KVM=off"
    run = fail(["--skip-base", "-p", element_dir, "tiny-os"], output_dir, tmp_path, run_by=hidden(setup))
    assert run.exit_status == 1
    reaching = "the appliance can reach services on this host's loopback, at 169.254.2.2"
    lacking = "neither 'slirp4netns' nor 'pasta' found, needed for a network apart from this host's"
    assert warnings(run) == [f"{reaching}: {lacking}"]
