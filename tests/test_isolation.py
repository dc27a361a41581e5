# SPDX-License-Identifier: Apache-2.0
"""Builds with ``--isolation``: which one is taken, what is told, and what is left when a build in the sandbox ends."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from helpers import HANG_S, ISOLATIONS, make_element, mounts_and_loops, wait_until
from soak import kill_helper
from test_failures import EARLIER, errors, fail, hidden, hints, nothing_left, output_dir, processes, wait_for
from virt_dib import tools, workspace
from virt_dib.spec import TREE_PHASES, Phase

pytestmark = pytest.mark.appliance

SANDBOX = ("--isolation", "sandbox", "--skip-base")
NO_NAMESPACES = "echo 0 >/proc/sys/user/max_user_namespaces"

__all__ = ["output_dir"]  # a fixture


def in_user_namespace(setup: str) -> list[str]:
    """The beginning of a command that runs in a user namespace of one id where *setup* was done."""
    unshare = tools.require("unshare", purpose="run the tests", package="util-linux")
    return [str(unshare), "--user", "--map-root-user", "--mount", "/bin/sh", "-c", f'{setup}; exec "$@"', "sh"]


@pytest.fixture
def failing(tmp_path: Path, element_dir: Path) -> list[str]:
    """Arguments of a build that ends in its first script."""
    make_element(tmp_path / "elements", "bad", {"root.d/05-bad": "#!/bin/bash\nexit 9\n"})
    return ["--skip-base", "-p", str(element_dir), "-p", str(tmp_path / "elements"), "tiny-os", "bad"]


# ---- which one ----


@pytest.mark.option("--isolation", "--kvm")
def test_auto_takes_the_sandbox_where_kvm_does_not_work(failing: list[str], output_dir: Path, tmp_path: Path) -> None:
    run = fail(["--isolation", "auto", "--kvm", "off", *failing], output_dir, tmp_path)
    assert "isolation: sandbox, since KVM does not work here: KVM is forced off by --kvm" in run.stdout
    assert "emulat" not in run.stdout
    assert "root.d/05-bad of element 'bad' failed with exit status 9" in errors(run)[0]


def test_auto_takes_the_vm_where_neither_works(failing: list[str], output_dir: Path, tmp_path: Path) -> None:
    run_by = in_user_namespace(NO_NAMESPACES)
    run = fail(["--isolation", "auto", "--kvm", "off", *failing], output_dir, tmp_path, run_by=run_by)
    (line,) = [line for line in run.stdout.splitlines() if "isolation: " in line]
    assert "isolation: vm, emulated, about 15 times slower: KVM does not work: " in line
    assert "nor does the sandbox: this user namespace has 1 uids, of 65536 needed" in line
    assert "root.d/05-bad" in errors(run)[0]


def test_an_emulated_vm_has_a_hint_to_the_sandbox(failing: list[str], output_dir: Path, tmp_path: Path) -> None:
    run = fail(["--kvm", "off", *failing], output_dir, tmp_path)
    assert "emulating the appliance" in run.stdout
    assert run.stdout.count("--isolation sandbox") == 1


def test_an_unknown_isolation(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    run = fail(["--isolation", "sandbos", "--skip-base", "-p", element_dir, "tiny-os"], output_dir, tmp_path)
    assert run.exit_status == 2
    assert errors(run) == ["virt-dib: error: unknown value of --isolation 'sandbos'"]
    assert hints(run) == ["virt-dib: hint: did you mean 'sandbox'? choose from vm, sandbox, auto"]


# ---- what the host lacks ----


def test_forbidden_namespaces_are_told_before_anything_starts(
    element_dir: Path, output_dir: Path, tmp_path: Path
) -> None:
    run_by = in_user_namespace(NO_NAMESPACES)
    run = fail([*SANDBOX, "-p", element_dir, "tiny-os"], output_dir, tmp_path, run_by=run_by)
    assert run.exit_status == 1
    assert errors(run)[-1] == (
        "virt-dib: error: the kernel refuses what a sandbox needs: making a user namespace: ENOSPC"
    )
    assert hints(run)[-1] == "virt-dib: hint: as root: sysctl user.max_user_namespaces=10000"
    assert not (output_dir / "disk.log").exists()


def test_a_missing_network_tool_is_told_unless_there_is_to_be_no_network(
    failing: list[str], output_dir: Path, tmp_path: Path
) -> None:
    places = [str(found) for name in ("slirp4netns", "pasta") if (found := tools.find(name)) is not None]
    run_by = hidden("touch /run/empty; " + "; ".join(f"mount --bind /run/empty {place}" for place in places))
    run = fail([*SANDBOX, *failing], output_dir, tmp_path, run_by=run_by)
    assert run.exit_status == 1
    assert "neither 'slirp4netns' nor 'pasta' found" in errors(run)[0]
    assert "apt-get install slirp4netns" in hints(run)[0]
    (tmp_path / "temporary").rmdir()
    run = fail([*SANDBOX, "--no-network", *failing], output_dir, tmp_path, run_by=run_by)
    assert "root.d/05-bad" in errors(run)[0]


# ---- failures inside ----


@pytest.mark.parametrize("phase", TREE_PHASES)
def test_a_script_that_fails(element_dir: Path, output_dir: Path, tmp_path: Path, phase: Phase) -> None:
    script = "#!/bin/bash\necho last words\nexit 42\n"
    make_element(tmp_path / "elements", "bad", {f"{phase.directory}/60-bad": script})
    paths: list[str | Path] = ["-p", element_dir, "-p", tmp_path / "elements"]
    run = fail([*SANDBOX, *paths, "tiny-os", "bad"], output_dir, tmp_path)
    assert run.exit_status == 1
    assert f"{phase.directory}/60-bad of element 'bad' failed with exit status 42 after " in errors(run)[0]
    assert "last words" in run.stderr
    assert b"last words" in (output_dir / "disk.log").read_bytes()


def test_a_script_killed_by_a_signal(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    make_element(tmp_path / "elements", "bad", {"root.d/60-bad": "#!/bin/bash\nkill -SEGV $$\n"})
    paths: list[str | Path] = ["-p", element_dir, "-p", tmp_path / "elements"]
    run = fail([*SANDBOX, *paths, "tiny-os", "bad"], output_dir, tmp_path)
    assert run.exit_status == 1
    assert "SIGSEGV" in errors(run)[0]


def test_root_d_without_a_tree(output_dir: Path, tmp_path: Path) -> None:
    make_element(tmp_path / "elements", "empty", {"root.d/10-empty": "#!/bin/bash\n"}, provides=["operating-system"])
    run = fail([*SANDBOX, "-p", tmp_path / "elements", "empty"], output_dir, tmp_path)
    assert run.exit_status == 1
    assert "root.d ended without a root file system in place" in errors(run)[0]


@pytest.mark.parametrize(
    "elements", [[], pytest.param(["block-device-mbr"], marks=pytest.mark.full)], ids=["plain", "mbr"]
)
def test_an_image_too_small_for_the_tree(
    element_dir: Path, output_dir: Path, tmp_path: Path, elements: list[str]
) -> None:
    script = "#!/bin/bash\ndd if=/dev/urandom of=/big bs=1M count=300\n"
    make_element(tmp_path / "elements", "big", {"install.d/50-big": script})
    paths: list[str | Path] = ["-p", element_dir, "-p", tmp_path / "elements"]
    run = fail([*SANDBOX, "--size", "200M", *paths, "tiny-os", "big", *elements], output_dir, tmp_path)
    assert run.exit_status == 1
    assert "no space left in the image" in errors(run)[0]
    assert "--size" in hints(run)[0]


@pytest.mark.parametrize("size", ["100m", "14m"], ids=["for-the-appliance", "for-the-build-disk"])
def test_no_space_on_the_host(element_dir: Path, output_dir: Path, tmp_path: Path, size: str) -> None:
    """The virtual machine would wait for space."""
    run_by = hidden(f"mount -t tmpfs -o size={size} none {tmp_path}/temporary")
    run = fail([*SANDBOX, "-p", element_dir, "tiny-os"], output_dir, tmp_path, run_by=run_by)
    assert run.exit_status == 1
    assert "no space left" in errors(run)[0]
    assert "TMPDIR" in " ".join(hints(run))


def test_a_mount_point_behind_a_link(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    script = "#!/bin/bash\nmkdir -p /elsewhere\nrm -rf /boot\nln -s /elsewhere /boot\n"
    make_element(tmp_path / "elements", "linked", {"install.d/50-linked": script})
    paths: list[str | Path] = ["-p", element_dir, "-p", tmp_path / "elements"]
    run = fail([*SANDBOX, *paths, "tiny-os", "linked", "block-device-efi"], output_dir, tmp_path)
    assert run.exit_status == 1
    assert "the mount point /boot/efi of the image is behind a link in the tree" in errors(run)[0]


# ---- the end ----


def started(element_dir: Path, tmp_path: Path, script: str) -> tuple[list[str], dict[str, str], Path]:
    """Command, environment and temporary directory of a build with *script* in post-root.d."""
    make_element(tmp_path / "elements", "slow", {"post-root.d/60-slow": script})
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    paths = ["-p", str(element_dir), "-p", str(tmp_path / "elements")]
    command = [sys.executable, "-m", "virt_dib", "--name", "disk", *SANDBOX, *paths, "tiny-os", "slow"]
    return command, {**os.environ, "TMPDIR": str(temporary)}, temporary


@pytest.mark.parametrize(
    ("script", "moment"),
    [
        ("#!/bin/bash\necho waiting\n(trap '' TERM HUP INT; sleep 600) &\nsleep 600\n", b"waiting"),
        ("#!/bin/bash\n", b"making the image disk"),
    ],
    ids=["in-a-script", "in-the-disk-stage"],
)
def test_interrupting_ends_everything(
    element_dir: Path, output_dir: Path, tmp_path: Path, script: str, moment: bytes
) -> None:
    command, environment, temporary = started(element_dir, tmp_path, script)
    with (
        nothing_left(output_dir, temporary),
        tools.started(command, environment=environment, cwd=output_dir, stderr=tools.TOGETHER) as process,
    ):
        wait_for(output_dir / "disk.log", moment)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=HANG_S) == 130


def test_what_a_killed_build_leaves_goes_at_the_next_start(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    script = "#!/bin/bash\nmkdir $TMP_MOUNT_PATH/locked\nchmod 0 $TMP_MOUNT_PATH/locked\necho waiting\nsleep 600\n"
    command, environment, temporary = started(element_dir, tmp_path, script)
    before = mounts_and_loops(temporary, output_dir)
    with tools.started(command, environment=environment, cwd=output_dir, stderr=tools.TOGETHER) as process:
        wait_for(output_dir / "disk.log", b"waiting")
        process.kill()
        process.wait()
    wait_until_gone(temporary)
    assert mounts_and_loops(temporary, output_dir) == before
    assert len(list(temporary.iterdir())) == 1
    assert len(workspace.remove_leftovers(temporary)) == 1
    assert list(temporary.iterdir()) == []


def wait_until_gone(temporary: Path) -> None:
    """Wait until the processes of a build have gone after it."""
    wait_until(lambda: not processes(temporary))


def left_elsewhere(temporary: Path) -> list[Path]:
    """What a killed build has made outside of its directory, and that is still there."""
    lines = (line for path in temporary.glob("*/elsewhere") for line in path.read_text().splitlines())
    # What was only to come has no name.
    notes = (note for note in map(json.loads, lines) if isinstance(note, list))
    return [path for note in notes if (path := Path(note[0])).exists()]


def test_the_build_after_one_that_is_killed_while_it_writes(
    element_dir: Path, output_dir: Path, tmp_path: Path
) -> None:
    # So much takes xz its time.
    script = "#!/bin/bash\ndd if=/dev/urandom of=$TMP_MOUNT_PATH/random bs=1M count=60\n"
    command, environment, temporary = started(element_dir, tmp_path, script)
    with tools.started(
        [*command, "--formats", "raw,squashfs"], environment=environment, cwd=output_dir, stderr=tools.TOGETHER
    ) as process:
        wait_for(output_dir / "disk.log", b"writing raw, squashfs")
        wait_for_file(output_dir, ".disk.squashfs.*.partial")
        process.kill()
        process.wait()
    wait_until_gone(temporary)
    left = left_elsewhere(temporary)
    assert output_dir in {path.parent for path in left}
    seen = set()
    command = [sys.executable, "-m", "virt_dib", "--name", "disk", *SANDBOX, "-p", str(element_dir), "tiny-os"]
    with (tmp_path / "shown").open("wb") as shown, tools.started(
        command, environment=environment, cwd=output_dir, stdout=shown.fileno(), stderr=tools.TOGETHER
    ) as process:  # fmt: skip
        while process.poll() is None:
            seen.add((output_dir / "disk.qcow2").read_bytes())
            signal.sigtimedwait([], 0.1)
    assert process.returncode == 0, (tmp_path / "shown").read_text()
    image = (output_dir / "disk.qcow2").read_bytes()
    tools.run(["qemu-img", "check", "-q", output_dir / "disk.qcow2"], doing="checking the image")
    assert EARLIER["disk.qcow2"] in seen
    assert seen <= {EARLIER["disk.qcow2"], image}
    assert [path for path in left if path.exists()] == []
    assert list(temporary.iterdir()) == []
    names = {name.split("/")[0] for name in EARLIER}
    assert {path.name for path in output_dir.iterdir()} == {*names, "disk.log"}
    assert processes(temporary) == set()


@pytest.mark.parametrize("wait_s", [0.0, 1.0], ids=["at-once", "later"])
def test_a_build_that_is_killed_while_its_appliance_starts_leaves_nothing(
    element_dir: Path, output_dir: Path, tmp_path: Path, wait_s: float
) -> None:
    command, environment, temporary = started(element_dir, tmp_path, "#!/bin/bash\nsleep 600\n")

    def sockets() -> set[Path]:
        # For root they are not in the directory of the build.
        return {*Path("/tmp").glob("libguestfs*"), *temporary.glob("*/libguestfs*")}

    before = sockets()
    with tools.started(command, environment=environment, cwd=output_dir, stderr=tools.TOGETHER) as process:
        wait_until(lambda: sockets() - before)
        signal.sigtimedwait([], wait_s)
        process.kill()
        process.wait()
    wait_until_gone(temporary)
    with nothing_left(output_dir, temporary):
        assert len(workspace.remove_leftovers(temporary)) == 1
    assert sockets() == before


KILLED = """
import os, signal, sys
from virt_dib import cli, machine

look, times = machine._possible_socket_directories, []

def looks():
    times.append(None)
    if len(times) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return look()

machine._possible_socket_directories = looks
sys.exit(cli.main())
"""


@pytest.mark.needs_root
def test_a_build_that_is_killed_when_its_sockets_are_made_and_not_yet_noted_leaves_nothing(
    element_dir: Path, output_dir: Path, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root's are not in the directory of the build")
    command, environment, temporary = started(element_dir, tmp_path, "#!/bin/bash\nsleep 600\n")
    before = set(Path("/tmp").glob("libguestfs*"))
    words = [sys.executable, "-c", KILLED, *command[3:]]
    with tools.started(words, environment=environment, cwd=output_dir, stderr=tools.TOGETHER) as process:
        process.wait()
    wait_until_gone(temporary)
    (left,) = set(Path("/tmp").glob("libguestfs*")) - before
    with nothing_left(output_dir, temporary):
        assert len(workspace.remove_leftovers(temporary)) == 1
    assert not left.exists()


def wait_for_file(directory: Path, pattern: str) -> None:
    """Wait until there is a file whose name fits *pattern*."""
    wait_until(lambda: list(directory.glob(pattern)))


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_interrupting_ends_what_writes_the_files(
    element_dir: Path, output_dir: Path, tmp_path: Path, number: signal.Signals
) -> None:
    script = "#!/bin/bash\ndd if=/dev/urandom of=$TMP_MOUNT_PATH/random bs=1M count=60\n"
    command, environment, temporary = started(element_dir, tmp_path, script)
    with (
        nothing_left(output_dir, temporary),
        tools.started(
            [*command, "--formats", "raw,squashfs"], environment=environment, cwd=output_dir, stderr=tools.TOGETHER
        ) as process,
    ):
        wait_for(output_dir / "disk.log", b"writing raw, squashfs")
        wait_for_file(output_dir, ".disk.squashfs.*.partial")
        process.send_signal(number)
        assert process.wait(timeout=HANG_S) == 130


def waiting(tmp_path: Path) -> str:
    """A script that waits, and leaves a process that does not heed signals, and that *processes* finds on the host."""
    left = f"(trap '' TERM HUP INT; bash -c 'sleep 600; :' {tmp_path}/temporary)"
    return f"#!/bin/bash\n{left} &\necho waiting\nsleep 600\n"


def test_a_sandbox_that_is_killed_while_a_script_runs(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    command, environment, temporary = started(element_dir, tmp_path, waiting(tmp_path))
    with (
        nothing_left(output_dir, temporary),
        tools.started(command, environment=environment, cwd=output_dir) as process,
    ):
        wait_for(output_dir / "disk.log", b"waiting")
        kill_helper("sandbox-init.py")(process)
        _, error = process.communicate(timeout=HANG_S)
        assert process.returncode == 1
    said = "post-root.d/60-slow of element 'slow' has not ended: running the sandbox: it died"
    assert (
        f"virt-dib: error: {said}\n    waiting\nvirt-dib: hint: perhaps this host ran out of memory" in error.decode()
    )


@pytest.mark.full
@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name
)
@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_build_that_is_ended_in_any_phase_leaves_nothing(
    element_dir: Path, output_dir: Path, tmp_path: Path, isolation: str, phase: Phase, number: signal.Signals
) -> None:
    files = {f"{phase.directory}/70-slower": waiting(tmp_path)}
    command, environment, temporary = started(element_dir, tmp_path, "#!/bin/bash\n")
    make_element(tmp_path / "elements", "slower", files)
    left = []
    with (
        nothing_left(output_dir, temporary),
        tools.started(
            [*command, "slower", "--isolation", isolation],
            environment=environment,
            cwd=output_dir,
            stderr=tools.TOGETHER,
        ) as process,
    ):
        wait_for(output_dir / "disk.log", b"waiting")
        process.send_signal(number)
        if number is signal.SIGKILL:
            process.wait()
            wait_until_gone(temporary)
            left = left_elsewhere(temporary)
            assert len(workspace.remove_leftovers(temporary)) == 1
        else:
            assert process.wait(timeout=HANG_S) == 130
    assert [path for path in left if path.exists()] == []


@pytest.mark.parametrize(
    ("script", "hint"),
    [
        ("dd if=/dev/zero of=/big bs=1M", "the image is full: give it more with --size; "),
        pytest.param(
            "mkdir /many; cd /many; i=0; while : >$i; do i=$((i + 1)); done; exit 1",
            "the image can have no more files: --mkfs-options '-N NUMBER' makes inodes for more; ",
            marks=pytest.mark.full,
        ),
    ],
    ids=["blocks", "inodes"],
)
def test_a_script_that_finds_no_space_in_the_image(
    element_dir: Path, output_dir: Path, tmp_path: Path, script: str, hint: str
) -> None:
    make_element(tmp_path / "elements", "greedy", {"finalise.d/50-greedy": f"#!/bin/bash\n{script}\n"})
    paths = ["-p", str(element_dir), "-p", str(tmp_path / "elements")]
    options = [*SANDBOX, "--size", "200M", "--mkfs-options", "-N 2000", *paths]
    run = fail([*options, "tiny-os", "greedy"], output_dir, tmp_path)
    assert "finalise.d/50-greedy of element 'greedy' failed with exit status 1" in errors(run)[0]
    assert f"virt-dib: hint: {hint}" in hints(run)[0]


@pytest.mark.full
@pytest.mark.parametrize("phase", [Phase.INSTALL, Phase.FINALISE])
@pytest.mark.parametrize(
    ("number", "options", "said"),
    [
        (signal.SIGKILL, [], "the appliance has ended"),
        (signal.SIGSTOP, ["--script-timeout", "20s"], "70-waits of element 'waits' has taken longer than 20 s"),
        (signal.SIGSTOP, ["--timeout", "200s"], "building the image: it has taken longer than 200 s"),
    ],
    ids=["killed", "stopped-in-a-script", "stopped-in-a-build"],
)
def test_a_machine_that_is_killed_or_stands_still_while_a_script_runs(
    element_dir: Path, output_dir: Path, tmp_path: Path, phase: Phase, number: signal.Signals, options: list[str],
    said: str,
) -> None:  # fmt: skip
    make_element(
        tmp_path / "elements", "waits", {f"{phase.directory}/70-waits": "#!/bin/bash\necho waiting\nsleep 600\n"}
    )
    command, environment, temporary = started(element_dir, tmp_path, "#!/bin/bash\n")
    with (
        nothing_left(output_dir, temporary),
        tools.started(
            [*command, "waits", "--isolation", "vm", *options], environment=environment, cwd=output_dir
        ) as process,
    ):
        wait_for(output_dir / "disk.log", b"waiting")
        (machine,) = {pid for pid in processes(temporary) if Path(f"/proc/{pid}/comm").read_text().startswith("qemu")}
        os.kill(int(machine), number)
        assert process.stderr
        error = process.stderr.read().decode()
        assert process.wait() == 1
    assert said in error
    assert "virt-dib: hint: " in error


@pytest.mark.full
def test_the_second_of_two_builds_of_one_name_is_refused(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    command, environment, temporary = started(element_dir, tmp_path, "#!/bin/bash\necho waiting\nread </dev/zero\n")
    with tools.started(command, environment=environment, cwd=output_dir, stderr=tools.TOGETHER) as process:
        wait_for(output_dir / "disk.log", b"waiting")
        log = (output_dir / "disk.log").read_bytes()
        second = tools.run(command, doing="building", environment=environment, cwd=output_dir, check=False)
        assert second.exit_status == 1
        assert "disk.log': another build is writing to it" in second.stderr
        assert "another --name" in second.stderr
        assert (output_dir / "disk.log").read_bytes() == log
        process.terminate()
        assert process.wait() == 130
    assert list(temporary.iterdir()) == []
