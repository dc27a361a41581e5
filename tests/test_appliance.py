# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from conftest import MakeAppliance
from helpers import make_element, processes_of, virt_dib
from virt_dib import appliance as appliance_module
from virt_dib import staging, supermin, tools
from virt_dib.appliance import Appliance, open_appliance
from virt_dib.errors import ApplianceError
from virt_dib.machine import Disk, Settings, has_own_runtime_dir
from virt_dib.spec import DEFAULT_MEMORY_MIB
from virt_dib.supermin import cache_dir
from virt_dib.terminal_link import LINK, Terminal

PATH = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
TOKEN = b"0123456789abcdef"


class Copying:
    """What libguestfs does when it copies a file to the host that has no end, or one of *size_bytes*."""

    def __init__(self, size_bytes: int | None) -> None:
        self._size_bytes = size_bytes
        self.ended = threading.Event()

    def download(self, _inside: str, target: str) -> None:
        os.truncate(os.open(target, os.O_WRONLY | os.O_CREAT), self._size_bytes or 1 << 40)
        if self._size_bytes is None:
            self.ended.wait()

    def tar_out(self, inside: str, target: str) -> None:
        self.download(inside, target)

    def close(self) -> None:
        self.ended.set()


@pytest.mark.parametrize("method", ["download", "archive"])
@pytest.mark.parametrize("size_bytes", [None, 11, 10])
def test_a_copy_is_not_longer_than_it_may_be(
    method: str, size_bytes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it never ends, and where it has ended before anybody looks."""
    copying = Copying(size_bytes)
    monkeypatch.setattr(appliance_module, "new_handle", lambda _: copying)
    monkeypatch.setattr(Appliance, "_start", lambda _: None)
    disk = Disk(path=tmp_path / "disk", label="build")
    disk.path.touch()
    settings = Settings(disks=[disk], cache_dir=tmp_path, memory_mib=1, cpus=1, network=False, accelerate=False)
    appliance = Appliance(settings)
    try:
        copy = getattr(appliance, method)
        if size_bytes == 10:
            copy("/dib/build/x", tmp_path / "copy", limit_bytes=10)
        else:
            with pytest.raises(
                ApplianceError, match=r"^copying '/dib/build/x' out of the appliance: it holds more than 10 bytes$"
            ):
                copy("/dib/build/x", tmp_path / "copy", limit_bytes=10)
    finally:
        copying.close()
        appliance.close()


def bash(appliance: Appliance, text: str) -> tuple[int, str]:
    result = appliance.run(["/bin/bash", "-c", text], PATH, "/dib")
    return result.exit_status, result.tail


@pytest.mark.appliance
def test_output_streams_while_the_command_runs(appliance: Appliance) -> None:
    """The command ends only when the host has seen its first line and says so."""
    received = bytearray()

    def answer(data: bytes) -> None:
        received.extend(data)
        if b"first" in data:
            appliance.write("/dib/tmp/seen", b"")

    command = "echo first; until [[ -e /dib/tmp/seen ]]; do sleep 0.1; done; echo last"
    result = appliance.run(["/bin/bash", "-c", command], PATH, "/", on_output=answer)
    assert (result.exit_status, bytes(received)) == (0, b"first\nlast\n")


@pytest.mark.appliance
def test_a_dead_appliance_is_an_error_not_a_hang(
    make_appliance: MakeAppliance, capfd: pytest.CaptureFixture[str]
) -> None:
    before = our_qemus()
    with make_appliance() as doomed:
        assert our_qemus() - before
        with pytest.raises(ApplianceError):
            doomed.run(["/bin/bash", "-c", "echo c >/proc/sysrq-trigger; sleep 60"], PATH, "/")
    assert our_qemus() == before
    # Only the front end prints errors.
    assert "libguestfs" not in capfd.readouterr().err


@pytest.mark.appliance
def test_what_libguestfs_cannot_remove_at_its_end_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the program that it starts for it is ended together with the others."""
    program = tmp_path / "bin/rm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    disk = Disk(path=tmp_path / "disk", label="build")
    disk.path.write_bytes(bytes(1 << 20))
    noted: list[Path] = []
    settings = Settings(
        disks=[disk], cache_dir=cache_dir(), memory_mib=DEFAULT_MEMORY_MIB, cpus=1, network=False, accelerate=False,
        on_elsewhere=noted.append,
    )  # fmt: skip
    before = set(Path("/tmp").glob("libguestfs*"))
    with open_appliance(settings):
        for _ in range(600):
            if noted or list(tmp_path.glob("libguestfs*/*.sock")):
                break
            time.sleep(0.1)
    assert bool(noted) != has_own_runtime_dir(settings)
    assert set(Path("/tmp").glob("libguestfs*")) == before


@pytest.mark.appliance
def test_disks_that_cannot_be_written_are_not_said_to_be_an_appliance_that_has_ended(
    make_appliance: MakeAppliance,
) -> None:
    with make_appliance() as appliance:
        # Nothing ends what keeps them busy.
        stays = "cd /dib && setsid sleep 3600 </dev/null >/dev/null 2>&1 &"
        status, said = bash(appliance, f"echo : >/sysroot/guest/let-go.sh; {stays}")
        assert status == 0, said
        with pytest.raises(ApplianceError, match=r"^writing the disks: (?!the appliance has ended).*busy"):
            appliance.stop()


@pytest.mark.appliance
def test_processes_that_scripts_leave_do_not_keep_the_disks_from_being_written(make_appliance: MakeAppliance) -> None:
    left = [
        "setsid sleep 3600 &",
        "cd /dib && setsid sleep 3600 </dev/null >/dev/null 2>&1 &",
        "setsid sleep 3600 3</dib/guest/setup.sh </dev/null >/dev/null 2>&1 &",
        "trap '' TERM; setsid bash -c 'while :; do (cd /dib && sleep 0.01); done' </dev/null >/dev/null 2>&1 &",
    ]
    with make_appliance() as stopped:
        for script in left:
            assert bash(stopped, script)[0] == 0
        stopped.stop()


@pytest.mark.appliance
def test_last_words_that_come_late_are_heard(appliance: Appliance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appliance_module, "_ALIVE_CHECK_S", 1.0)
    # What it prints stays in the pipe while the reader is stopped.
    later = "(sleep 5; kill -CONT $reader) >/dev/null 2>&1 &"
    script = f"reader=$(</sysroot/jobs/reader); kill -STOP $reader; {later} echo late; exit 3"
    assert bash(appliance, script) == (3, "late\n")


@pytest.mark.appliance
def test_a_runner_that_is_killed_is_an_error(appliance: Appliance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appliance_module, "_ALIVE_CHECK_S", 1.0)
    monkeypatch.setattr(appliance_module, "_LAST_WORDS_S", 1.0)
    with pytest.raises(ApplianceError, match="ended without a result") as caught:
        appliance.run(["/bin/bash", "-c", "kill -KILL $PPID; sleep 1"], PATH, "/")
    assert "--memsize" in str(caught.value.problems[0].hint)


def our_qemus() -> set[str]:
    return {pid for pid in os.listdir("/proc") if pid.isdigit() and is_our_qemu(pid)}


def is_our_qemu(pid: str) -> bool:
    try:
        name, _, rest = Path("/proc", pid, "stat").read_text().rpartition(")")
    except OSError:
        return False
    return "qemu" in name and int(rest.split()[1]) == os.getpid()


STANDS_STILL = "exec sleep 600"
FAILS_ONCE = """#!/bin/sh
case " $* " in
    *" -kernel "*) [ -e "$0.tried" ] || {{ : >"$0.tried"; {failure}; }} ;;
esac
exec qemu-system-$(uname -m) "$@"
"""


@pytest.mark.appliance
@pytest.mark.parametrize(
    ("failure", "limit_s", "said"),
    [
        pytest.param(STANDS_STILL, 3.0, "no answer in 3 s", id="stands still"),
        pytest.param("kill -SEGV $$", 180.0, "guestfs_launch failed", id="crashes"),
    ],
)
def test_an_appliance_that_does_not_come_up_is_started_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, limit_s: float, said: str
) -> None:
    monkeypatch.setattr(appliance_module, "_START_TIMEOUTS_S", (limit_s, 600.0))
    program = tmp_path / "qemu"
    program.write_text(FAILS_ONCE.format(failure=failure))
    program.chmod(0o755)
    content = staging.Staging(tmp_path / "staging")
    content.add_guest_scripts()
    content.make_disk(tmp_path / "build.img")
    told: list[str] = []
    settings = Settings(
        disks=[Disk(path=tmp_path / "build.img", label="build")],
        program=program,
        cache_dir=cache_dir(),
        memory_mib=DEFAULT_MEMORY_MIB,
        cpus=2,
        network=False,
        accelerate=False,
        on_message=told.append,
    )
    with open_appliance(settings) as appliance:
        if failure != STANDS_STILL:
            # A build looks for it while it waits for something else.
            while not told:
                appliance.check_starting()
                time.sleep(0.1)
        appliance.prepare()
        assert bash(appliance, "echo here") == (0, "here\n")
    assert (tmp_path / "qemu.tried").exists()
    assert told == [f"starting the appliance: {said}; starting it once more"]


@pytest.mark.appliance
def test_nothing_is_left_of_a_supermin_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary, disks, cache = tmp_path / "temporary", tmp_path / "disks", tmp_path / "cache"
    temporary.mkdir()
    disks.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    disk = disks / "build.raw"
    disk.touch()
    os.truncate(disk, 1 << 20)
    settings = Settings(
        disks=[Disk(path=disk, label="build")],
        cache_dir=cache,
        memory_mib=768,
        cpus=1,
        network=False,
        accelerate=False,
    )
    with open_appliance(settings):
        deadline_s = time.monotonic() + 60
        while not list(cache.glob("appliance-*/built.*")) and time.monotonic() < deadline_s:
            time.sleep(0.05)
    assert processes_of(cache) == []
    assert list(temporary.iterdir()) == []
    # What supermin was building is removed when one builds again.
    (directory,) = cache.glob("appliance-*")
    (unfinished,) = directory.glob("built.*")
    supermin.build(directory, disks)
    assert not unfinished.exists()
    assert {path.name for path in directory.glob("built*")} == {"built"}


# ---- what fails in it ----


@pytest.mark.appliance
def test_an_appliance_without_a_place_for_shells(appliance: Appliance) -> None:
    with pytest.raises(ApplianceError, match=r"^opening a shell in the appliance: No such file or directory$"):
        appliance.shell(["/bin/bash"], PATH, "/", terminal=Terminal())
    result = appliance.run([*LINK, "org.none", "true"], PATH, "/")
    assert (result.exit_status, result.tail) == (1, "there is no virtio port org.none\n")


@pytest.mark.appliance
def test_a_tree_that_did_not_get_into_the_image(appliance: Appliance) -> None:
    status, said = bash(appliance, "mkdir /tmp/empty; /dib/guest/tree.sh take_over /dib/none /tmp/empty")
    assert (status, said) == (1, "the root file system is empty\n")


@pytest.mark.appliance
def test_a_drive_that_is_full_or_not_let_go_of(tmp_path: Path) -> None:
    content = staging.Staging(tmp_path / "staging")
    content.add_guest_scripts()
    content.make_disk(tmp_path / "build.img")
    drive, log = tmp_path / "drive.img", tmp_path / "log"
    for path, size_bytes in ((drive, 100 << 20), (log, 200 << 20)):
        path.touch()
        os.truncate(path, size_bytes)
    tools.run(["mkfs.ext4", "-q", drive], doing="making a drive")
    told: list[str] = []
    settings = Settings(
        disks=[Disk(path=tmp_path / "build.img", label="build")],
        drive=Disk(path=drive, label="drive"),
        cache_dir=cache_dir(),
        memory_mib=DEFAULT_MEMORY_MIB,
        cpus=2,
        network=False,
        accelerate=False,
        on_message=told.append,
    )
    with open_appliance(settings) as appliance:
        appliance.prepare()
        with pytest.raises(ApplianceError, match=r"^writing the log to the helper drive: no space left on it$"):
            appliance.keep_log(log)
        # A program that keeps it busy, and nothing to freeze it with.
        bash(appliance, "mount --bind /bin/false $(type -P fsfreeze); cd /dib/home; sleep 600 >/dev/null 2>&1 &")
        bash(appliance, "truncate -s 1G /dib/out/large")
        with pytest.raises(ApplianceError, match=r"^copying '/dib/out' out of the appliance: it holds more than 5 b"):
            appliance.archive("/dib/out", tmp_path / "out.tar", limit_bytes=5)
        appliance.stop()
    (message,) = told
    assert message.startswith("unmounting the helper drive: ")
    assert message.endswith("; check it before it is used again")


@pytest.mark.appliance
def test_an_appliance_that_stands_still_while_it_is_prepared_is_killed(make_appliance: MakeAppliance) -> None:
    with make_appliance() as doomed:
        with pytest.raises(ApplianceError, match=r"^preparing the appliance: it stood still$") as caught:
            doomed.run(["/bin/sleep", "600"], PATH, "/", limit_s=1)
        with pytest.raises(ApplianceError):
            doomed.read("/dib/build/x")
    assert "--verbose -x" in (caught.value.problems[0].hint or "")


@pytest.mark.appliance
def test_a_log_that_does_not_fit_on_the_drive_is_told_and_the_error_is_the_scripts(
    element_dir: Path, tmp_path: Path
) -> None:
    drive = tmp_path / "drive.img"
    drive.touch()
    os.truncate(drive, 80 << 20)
    tools.run(["mkfs.ext4", "-q", "-m", "0", drive], doing="making a drive")
    make_element(tmp_path / "elements", "talks", {"root.d/60-talks": "#!/bin/bash\nyes | head -c 90000000\nexit 7\n"})
    paths: list[str | Path] = ["-p", element_dir, "-p", tmp_path / "elements"]
    arguments = ["--isolation", "vm", "--name", "x", "--drive", drive, "--quiet", "--skip-base", *paths]
    run = virt_dib([*arguments, "tiny-os", "talks"], cwd=tmp_path)
    assert run.exit_status == 1
    assert "warning: writing the log to the helper drive: no space left on it\n" in run.stdout
    assert "virt-dib: error: root.d/60-talks of element 'talks' failed with exit status 7 after " in run.stderr
