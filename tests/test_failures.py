# SPDX-License-Identifier: Apache-2.0
"""Builds that fail: what the user is told, and that nothing is left behind or lost."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from helpers import HANG_S, Run, files_in_image, make_element, mounts_and_loops, skip_without, virt_dib
from virt_dib import api, events, tools
from virt_dib.errors import ToolError
from virt_dib.files import remove_tree
from virt_dib.spec import Phase

EARLIER = {
    "disk.qcow2": b"an image of an earlier build",
    "disk.d/manifest": b"its manifest",
    "disk-2.qcow2": b"an image of another name\n\0",
    # That of the same name is replaced when a build starts.
    "disk-2.log": b"its log\r\n\xff\0",
}
"""What is in the output directory."""
ORDINARY_PHASES = (Phase.ROOT, Phase.INSTALL, Phase.FINALISE)


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    """A directory with the outputs of an earlier build in it, and of another one whose name begins alike."""
    directory = tmp_path / "out"
    (directory / "disk.d").mkdir(parents=True)
    for name, content in EARLIER.items():
        (directory / name).write_bytes(content)
    return directory


@contextlib.contextmanager
def nothing_left(output_dir: Path, temporary: Path) -> Iterator[None]:
    """Check that the block leaves no process, mount, loop device, temporary file or partial output, and what was there.

    *output_dir* is that of the fixture.
    """
    before = mounts_and_loops(temporary, output_dir)
    yield
    assert processes(temporary) == set()
    assert mounts_and_loops(temporary, output_dir) == before
    assert list(temporary.iterdir()) == []
    assert {path.name for path in output_dir.iterdir()} - {"disk.log"} == {name.split("/")[0] for name in EARLIER}
    assert {name: (output_dir / name).read_bytes() for name in EARLIER} == EARLIER


def processes(temporary: Path) -> set[str]:
    """The processes that name *temporary*: virtual machines with their disks there, and their helpers."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and str(temporary).encode() in (entry / "cmdline").read_bytes():
                found.add(entry.name)
    return found - {str(os.getpid())}


def fail(arguments: Sequence[str | Path], output_dir: Path, tmp_path: Path, *, run_by: Sequence[str] = ()) -> Run:
    """Run a build that is to fail."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with nothing_left(output_dir, temporary):
        command = [*run_by, sys.executable, "-m", "virt_dib", "--name", "disk", *map(str, arguments)]
        result = tools.run(
            command,
            doing="running virt-dib",
            cwd=output_dir,
            environment={**os.environ, "TMPDIR": str(temporary)},
            timeout_s=600,
            check=False,
        )
    return Run(exit_status=result.exit_status, stdout=result.stdout, stderr=result.stderr, output_dir=output_dir)


def errors(run: Run) -> list[str]:
    assert "Traceback" not in run.stderr
    return [line for line in run.stderr.splitlines() if line.startswith("virt-dib: error: ")]


def hints(run: Run) -> list[str]:
    return [line for line in run.stderr.splitlines() if line.startswith("virt-dib: hint: ")]


@pytest.mark.parametrize(
    ("arguments", "said", "advised"),
    [
        (["tiny-oss"], "'tiny-oss'", "did you mean 'tiny-os'"),
        (["probe"], "operating", "debian-minimal"),
        (["tiny-os", "block-device-mbr", "block-device-gpt"], "block-device", "one of"),
        (["-p", "/nowhere", "tiny-os"], "/nowhere", "-p"),
        (["--size", "5Q", "tiny-os"], "5Q", "5G"),
        (["--size", "-1", "tiny-os"], "-1", "5G"),
        (["--size", "0", "tiny-os"], "'0'", "5G"),
        (["--root-label", "x" * 17, "tiny-os"], "too long", "--root-label"),
        (["--fs-type", "xfs", "--root-label", "x" * 13, "tiny-os"], "too long", "--root-label"),
        (["--formats", "qcow", "tiny-os"], "'qcow'", "qcow2"),
        (["--fs-type", "ntfs", "tiny-os"], "ntfs", "ext4"),
        (["--envvar", "DIB_BLOCK_DEVICE_CONFIG=- nonsense: {}", "tiny-os"], "block device", "DIB_BLOCK_DEVICE_CONFIG"),
        (["--envvar", "DIB_BLOCK_DEVICE_CONFIG=file:///nowhere", "tiny-os"], "/nowhere", "DIB_BLOCK_DEVICE_CONFIG"),
        (["--envvar", "DIB_JOURNAL_SIZE=much", "tiny-os"], "DIB_JOURNAL_SIZE", "number"),
    ],
)
def test_wrong_command_lines(
    element_dir: Path, output_dir: Path, tmp_path: Path, arguments: list[str], said: str, advised: str
) -> None:
    run = fail(["--skip-base", "-p", element_dir, *arguments], output_dir, tmp_path)
    assert run.exit_status == 2
    assert len(errors(run)) == 1
    assert said in errors(run)[0]
    assert advised in " ".join(hints(run))


def test_all_mistakes_come_in_one_message(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    arguments = ["--size", "5Q", "--formats", "qcow", "-p", "/nowhere", "--fs-type", "ntfs", "tiny-oss"]
    run = fail(["-p", element_dir, *arguments], output_dir, tmp_path)
    assert run.exit_status == 2
    text = "\n".join(errors(run))
    for word in ("5Q", "'qcow'", "/nowhere", "ntfs"):
        assert word in text


def test_a_hook_that_two_elements_have(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_element(tmp_path / "elements", name, {"install.d/50-same": "#!/bin/bash\n"})
    run = fail(
        ["--skip-base", "-p", element_dir, "-p", tmp_path / "elements", "tiny-os", "one", "two"], output_dir, tmp_path
    )
    assert run.exit_status == 1
    assert all(word in errors(run)[0] for word in ("install.d/50-same", "'one'", "'two'"))


def hidden(setup: str) -> list[str]:
    """The beginning of a command that runs in a mount namespace where *setup* was done."""
    unshare = tools.require("unshare", purpose="run the tests", package="util-linux")
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return [str(unshare), *as_root, "--mount", "/bin/sh", "-c", f'{setup}; exec "$@"', "sh"]


@pytest.mark.appliance
def test_a_missing_host_tool(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    run_by = hidden("touch /run/empty; mount --bind /run/empty $(readlink -f /usr/bin/qemu-img)")
    run = fail(["--skip-base", "-p", element_dir, "tiny-os"], output_dir, tmp_path, run_by=run_by)
    assert run.exit_status == 1
    assert "qemu-img" in errors(run)[0]
    assert "apt-get install qemu-utils" in " ".join(hints(run))


@pytest.mark.appliance
def test_an_unreadable_kernel(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    run_by = hidden("mount -t tmpfs none /boot; mount -t tmpfs none /lib/modules")
    run = fail(["--skip-base", "-p", element_dir, "tiny-os"], output_dir, tmp_path, run_by=run_by)
    assert run.exit_status == 1
    assert "kernel" in " ".join([*errors(run), *hints(run)])


@pytest.mark.appliance
@pytest.mark.parametrize("size", ["1m", "3m", "12m", "300m"])
def test_no_space_on_the_host(element_dir: Path, output_dir: Path, tmp_path: Path, size: str) -> None:
    script = "#!/bin/bash\ndd if=/dev/zero of=/big bs=1M count=2000\nsync\n"
    make_element(tmp_path / "elements", "big", {"install.d/50-big": script})
    run_by = hidden(f"mount -t tmpfs -o size={size} none {tmp_path}/temporary")
    run = fail(
        ["--skip-base", "-p", element_dir, "-p", tmp_path / "elements", "tiny-os", "big"],
        output_dir,
        tmp_path,
        run_by=run_by,
    )
    assert run.exit_status == 1
    assert "space" in errors(run)[0]
    assert "TMPDIR" in " ".join(hints(run))


@pytest.mark.appliance
def test_a_drive_without_a_file_system(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    """And without programs in TMPDIR, where the one is that has qemu in a network of its own."""
    (tmp_path / "drive").touch()
    os.truncate(tmp_path / "drive", 1 << 30)
    run_by = hidden(f"mount -t tmpfs -o noexec,size=1g none {tmp_path}/temporary")
    arguments: list[str | Path] = [
        "--drive",
        tmp_path / "drive",
        "--isolation",
        "vm",
        "--skip-base",
        "-p",
        element_dir,
        "tiny-os",
    ]
    run = fail(arguments, output_dir, tmp_path, run_by=run_by)
    assert run.exit_status == 1
    assert errors(run)[0].endswith(f"cannot use '{tmp_path}/drive' as helper drive: it has no file system")
    assert "mkfs.ext4" in hints(run)[0]
    assert "which is mounted with noexec" in run.stdout + run.stderr


@pytest.mark.full
@pytest.mark.appliance
def test_an_image_too_small_for_the_tree(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    script = "#!/bin/bash\ndd if=/dev/zero of=/big bs=1M count=220\n"
    make_element(tmp_path / "elements", "big", {"install.d/50-big": script})
    run = fail(
        ["--size", "200M", "--skip-base", "-p", element_dir, "-p", tmp_path / "elements", "tiny-os", "big"],
        output_dir,
        tmp_path,
    )
    assert run.exit_status == 1
    assert "no space left in the image" in errors(run)[0]
    assert "--size" in " ".join(hints(run))


@pytest.mark.option("--no-delete-on-failure")
@pytest.mark.parametrize(
    ("options", "left"),
    [
        pytest.param(["--no-delete-on-failure"], [".disk.raw.*.partial", "disk.log"], marks=pytest.mark.appliance),
        pytest.param([], ["disk.log"], marks=pytest.mark.full),
    ],
    ids=["kept", "deleted"],
)
def test_outputs_that_are_not_complete(
    element_dir: Path, output_dir: Path, tmp_path: Path, options: list[str], left: list[str]
) -> None:
    small, listing = tmp_path / "small", tmp_path / "listing"
    small.mkdir()
    # The file system goes with the mount namespace, so it is looked into there. The image does not fit into it.
    look = f'mount -t tmpfs -o size=1m none {small}; "$@"; status=$?; ls -A {small} >{listing}; exit $status'
    arguments: list[str | Path] = [*options, "--name", small / "disk", "--formats", "raw", "--size", "200M"]
    arguments += ["--isolation", "auto", "--skip-base", "-p", element_dir, "tiny-os"]
    run = fail(arguments, output_dir, tmp_path, run_by=hidden(look))
    assert run.exit_status == 1
    assert errors(run)[0].startswith("virt-dib: error: writing 'disk.raw'")
    assert "No space left on device" in errors(run)[0]
    found = listing.read_text().split()
    assert [re.sub(r"(?<=raw\.)\w+", "*", name) for name in sorted(found)] == left


@pytest.mark.appliance
@pytest.mark.option("--no-delete-on-failure")
@pytest.mark.parametrize(
    ("phase", "isolation", "kept"),
    [
        (Phase.INSTALL, "sandbox", ["build"]),
        pytest.param(Phase.INSTALL, "vm", ["build"], marks=pytest.mark.full),
        (Phase.FINALISE, "sandbox", ["build", "raw"]),
        pytest.param(Phase.FINALISE, "vm", ["build", "raw"], marks=pytest.mark.full),
    ],
)
def test_the_disks_of_a_build_whose_script_fails_can_be_kept(
    element_dir: Path, output_dir: Path, tmp_path: Path, phase: Phase, isolation: str, kept: Sequence[str]
) -> None:
    skip_without(isolation)
    script = "#!/bin/bash\necho so far >/made\nsync /made\nexit 9\n"
    make_element(tmp_path / "elements", "bad", {f"{phase.directory}/50-bad": script})
    directory = tmp_path / "kept"
    directory.mkdir()
    options: list[str | Path] = ["--isolation", isolation, "--no-delete-on-failure", "--name", directory / "disk"]
    options += ["--skip-base", "--size", "200M", "-p", element_dir, "-p", tmp_path / "elements"]
    run = fail([*options, "tiny-os", "bad"], output_dir, tmp_path)
    found = {path.name.split(".")[-3]: path for path in directory.glob(".disk.*.partial")}
    assert sorted(found) == kept
    assert run.stdout.count("kept: ") == len(kept)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in found.values())
    # Of 128 GiB: the kernel is not to fill it with empty inodes.
    assert found["build"].stat().st_blocks * 512 < 500 << 20
    if "raw" in found:
        tools.run(["e2fsck", "-p", found["raw"]], doing="replaying the journal", check=False)
        assert files_in_image(found["raw"]).text("/made") == "so far\n"
    else:
        assert files_in_image(found["build"]).text("/build/mnt/made") == "so far\n"


@pytest.mark.appliance
def test_disks_that_there_is_no_room_to_keep(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    skip_without("sandbox")
    make_element(tmp_path / "elements", "bad", {"root.d/50-bad": "#!/bin/bash\nexit 9\n"})
    small, listing = tmp_path / "small", tmp_path / "listing"
    small.mkdir()
    # As above.
    look = f'mount -t tmpfs -o size=1m none {small}; "$@"; status=$?; ls -A {small} >{listing}; exit $status'
    arguments: list[str | Path] = ["--isolation", "sandbox", "--no-delete-on-failure", "--name", small / "disk"]
    arguments += ["--skip-base", "-p", element_dir, "-p", tmp_path / "elements", "tiny-os", "bad"]
    run = fail(arguments, output_dir, tmp_path, run_by=hidden(look))
    assert run.exit_status == 1
    assert "the disk 'build' of the build cannot be kept: No space left on device" in run.stdout
    assert errors(run)[0].startswith("virt-dib: error: root.d/50-bad of element 'bad' failed with exit status 9")
    assert listing.read_text().split() == ["disk.log"]


@pytest.mark.parametrize(
    "phase",
    [
        # One of each kind: before there is a tree, in it, and in the image. test_isolation.py has the tree stage's.
        pytest.param(phase, marks=pytest.mark.appliance if phase in ORDINARY_PHASES else pytest.mark.full)
        for phase in Phase
    ],
)
def test_a_script_that_fails(element_dir: Path, output_dir: Path, tmp_path: Path, phase: Phase) -> None:
    script = "#!/bin/bash\necho last words\nexit 42\n"
    make_element(tmp_path / "elements", "bad", {f"{phase.directory}/60-bad": script})
    run = fail(
        ["--size", "200M", "--skip-base", "-p", element_dir, "-p", tmp_path / "elements", "tiny-os", "bad"],
        output_dir,
        tmp_path,
    )
    assert run.exit_status == 1
    assert f"{phase.directory}/60-bad of element 'bad' failed with exit status 42 after " in errors(run)[0]
    assert "last words" in run.stderr
    assert "disk.log" in run.stderr
    assert b"last words" in (output_dir / "disk.log").read_bytes()


@pytest.mark.appliance
def test_a_script_killed_by_a_signal(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    make_element(tmp_path / "elements", "bad", {"root.d/60-bad": "#!/bin/bash\nkill -SEGV $$\n"})
    run = fail(["--skip-base", "-p", element_dir, "-p", tmp_path / "elements", "tiny-os", "bad"], output_dir, tmp_path)
    assert run.exit_status == 1
    assert "SIGSEGV" in errors(run)[0]


@pytest.mark.parametrize(
    ("script", "said", "advised"),
    [
        pytest.param(
            # What it has said goes with the appliance, unless that has been read.
            "sleep 5; echo c >/proc/sysrq-trigger; sleep 600",
            "has not ended: .*: the appliance has ended",
            "kernel has crashed",
            marks=pytest.mark.appliance,
        ),
        pytest.param("tail /dev/zero", r"failed with exit status 137 \(SIGKILL\)", "--memsize", marks=pytest.mark.full),
    ],
    ids=["panic", "no-memory"],
)
def test_a_script_that_breaks_the_appliance(
    element_dir: Path, output_dir: Path, tmp_path: Path, script: str, said: str, advised: str
) -> None:
    make_element(tmp_path / "elements", "bad", {"root.d/60-bad": f"#!/bin/bash\necho last words\n{script}\n"})
    arguments: list[str | Path] = ["--memsize", "700"]
    arguments += ["--skip-base", "-p", element_dir, "-p", tmp_path / "elements", "tiny-os", "bad"]
    run = fail(arguments, output_dir, tmp_path)
    assert run.exit_status == 1
    assert re.search(f"root.d/60-bad of element 'bad' {said}", errors(run)[0])
    assert "    last words\n" in run.stderr
    assert advised in hints(run)[-1]


@pytest.mark.appliance
@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, b"waiting"), (signal.SIGTERM, b"waiting"), (signal.SIGINT, b"starting the appliance")],
    ids=["INT", "TERM", "INT-at-the-start"],
)
def test_interrupting_ends_everything(
    element_dir: Path, output_dir: Path, tmp_path: Path, number: signal.Signals, moment: bytes
) -> None:
    make_element(tmp_path / "elements", "slow", {"root.d/60-slow": "#!/bin/bash\necho waiting\nsleep 600\n"})
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    paths = ["-p", str(element_dir), "-p", str(tmp_path / "elements")]
    arguments = ["--name", "disk", "--skip-base", *paths, "tiny-os", "slow"]
    with (
        nothing_left(output_dir, temporary),
        tools.started(
            [sys.executable, "-m", "virt_dib", *arguments],
            environment={**os.environ, "TMPDIR": str(temporary)},
            cwd=output_dir,
            stderr=tools.TOGETHER,
        ) as process,
    ):
        wait_for(output_dir / "disk.log", moment)
        process.send_signal(number)
        assert process.wait(timeout=HANG_S) == 130
        assert process.stdout is not None
        assert b"interrupted" in process.stdout.read()


def wait_for(path: Path, text: bytes) -> None:
    """Wait until the file *path* holds *text*."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if path.exists() and text in path.read_bytes():
            return
        time.sleep(0.2)
    pytest.fail(f"{text!r} did not appear in {path}")


@pytest.mark.appliance
def test_the_exit_status_of_a_good_build_and_its_outputs(probe_build: Run) -> None:
    names = {path.name for path in probe_build.output_dir.iterdir()}
    assert names == {"probe.raw", "probe.qcow2", "probe.d", "probe.log", "probe.events"}
    assert "install.d" in probe_build.stdout
    assert "virtual size 1.0 GiB" in probe_build.stdout


def test_nothing_is_built_without_elements(tmp_path: Path) -> None:
    run = virt_dib([], cwd=tmp_path)
    assert run.exit_status == 2
    assert "debian-minimal" in " ".join(hints(run))


@pytest.mark.full
def test_an_output_directory_that_is_removed_in_the_middle(element_dir: Path, tmp_path: Path) -> None:
    skip_without("sandbox")
    output_dir = tmp_path / "out"
    output_dir.mkdir()

    def remove(event: events.Event) -> None:
        if isinstance(event, events.PhaseStarted) and output_dir.exists():
            remove_tree(output_dir)

    spec = api.BuildSpec(
        name="x", output_dir=output_dir, elements=("tiny-os",), element_paths=(element_dir,), skip_base=True
    )
    with pytest.raises(ToolError, match="the directory has been removed meanwhile") as caught:
        api.build_image(spec, options=api.RunOptions(isolation=api.Isolation.SANDBOX), listener=remove)
    assert caught.value.problems[0].hint


# ---- what is shown ----


@pytest.mark.full
def test_a_build_that_leaves_nothing_for_the_user_has_a_warning(element_dir: Path, tmp_path: Path) -> None:
    skip_without("sandbox")
    arguments: list[str | Path] = ["--isolation", "sandbox", "--skip-base", "-p", element_dir, "--name", "x"]
    run = virt_dib([*arguments, "tiny-os", "no-final-image"], cwd=tmp_path)
    assert run.exit_status == 0, run.stdout + run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.log"]
    because = "because of element 'no-final-image' there is no image, and the elements left no other files: "
    assert f"warning: {because}files for the user are those in the working directory" in run.stdout


OWN_LINE = re.compile(r"\[ *[0-9]+\.[0-9]\] (.*)")


def shown(option: str, element_dir: Path, output_dir: Path, tmp_path: Path) -> tuple[str, list[str]]:
    """Standard output of a build that fails while the appliance starts; and of it the lines of ours."""
    skip_without("sandbox")
    make_element(tmp_path / "elements", "bad", {"root.d/60-bad": "#!/bin/bash\nsleep 5; echo last words\nexit 42\n"})
    arguments: list[str | Path] = ["--isolation", "sandbox", "--skip-base", "-p", element_dir]
    run = fail([option, *arguments, "-p", tmp_path / "elements", "tiny-os", "bad"], output_dir, tmp_path)
    assert (run.exit_status, len(errors(run))) == (1, 1)
    return run.stdout, [match[1] for match in map(OWN_LINE.fullmatch, run.stdout.splitlines()) if match]


@pytest.mark.option("--quiet")
@pytest.mark.appliance
def test_quiet_shows_errors_alone(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    out, _ = shown("--quiet", element_dir, output_dir, tmp_path)
    assert out == ""
    assert b"last words" in (output_dir / "disk.log").read_bytes()


@pytest.mark.option("-x")
@pytest.mark.appliance
def test_x_traces_the_calls_of_libguestfs_alone(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    out, own = shown("-x", element_dir, output_dir, tmp_path)
    said = [line for line in own if line.startswith("libguestfs: ")]
    assert any(line.startswith("libguestfs: trace: add_drive ") for line in said)
    assert any(line.startswith("libguestfs: trace: launch") for line in said)
    assert [line for line in said if not line.startswith("libguestfs: trace: ")] == []
    assert "last words" in out
    assert not any("root.d/60-bad failed" in line for line in own)


@pytest.mark.option("-v")
@pytest.mark.appliance
def test_verbose_shows_times_and_what_libguestfs_does(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    _, own = shown("-v", element_dir, output_dir, tmp_path)
    assert any(line.startswith("libguestfs: launch: ") for line in own)
    assert not any(line.startswith("libguestfs: trace: ") for line in own)
    assert any(line.startswith("root.d/60-bad failed with exit status 42 after ") for line in own)
