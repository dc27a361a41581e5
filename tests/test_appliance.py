# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import resource
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import MakeAppliance
from helpers import make_element, processes_of, virt_dib
from virt_dib import appliance as appliance_module
from virt_dib import staging, supermin, tools
from virt_dib.appliance import Appliance, open_appliance
from virt_dib.errors import ApplianceError
from virt_dib.jobs import Event, Splitter
from virt_dib.machine import Disk, Settings
from virt_dib.spec import DEFAULT_MEMORY_MIB
from virt_dib.supermin import cache_dir
from virt_dib.terminal_link import LINK, Terminal

PATH = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
TOKEN = b"0123456789abcdef"


def split(pieces: list[bytes]) -> tuple[bytes, list[Event]]:
    splitter = Splitter(TOKEN)
    output, events = b"", []
    for piece in pieces:
        for part in splitter.feed(piece):
            if isinstance(part, bytes):
                output += part
            else:
                events.append(part)
    return output, events


@given(st.lists(st.binary(max_size=20)), st.data())
def test_events_and_output_come_apart_whatever_the_chunks(texts: list[bytes], data: st.DataObject) -> None:
    record = b"\x1e" + TOKEN + b" end some-script 3 1.5\x1e"
    stream = record.join(texts) + record + b"rest"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    output, events = split(pieces)
    assert output == b"".join(texts) + b"rest"
    assert events == [Event("end", ("some-script", "3", "1.5"))] * max(1, len(texts))


def test_a_record_with_another_token_is_output() -> None:
    forged = b"\x1e" + b"x" * len(TOKEN) + b" exit 0\x1e"
    assert split([forged, b"."]) == (forged + b".", [])


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
def test_a_command_sees_exactly_the_variables_given(appliance: Appliance) -> None:
    value = "a b 'c' \"d\" $e `f`\nsecond line \u00e4"
    received = bytearray()
    result = appliance.run(["/usr/bin/env", "-0"], PATH | {"ODD": value}, "/dib/out", on_output=received.extend)
    seen = dict(item.split("=", 1) for item in received.decode().split("\0") if item)
    assert result.exit_status == 0
    assert seen.pop("ODD") == value
    assert seen.pop("PWD") == "/dib/out"
    assert set(seen) <= {"PATH", "SHLVL", "OLDPWD", "_"}


@pytest.mark.appliance
@pytest.mark.parametrize("status", [0, 1, 3, 127, 255])
def test_exit_status_comes_back(appliance: Appliance, status: int) -> None:
    assert bash(appliance, f"exit {status}")[0] == status


@pytest.mark.appliance
def test_a_signal_shows_as_the_shell_counts_it(appliance: Appliance) -> None:
    assert bash(appliance, "kill -KILL $$")[0] == 128 + 9


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
def test_writing_to_dev_stderr_loses_nothing(appliance: Appliance) -> None:
    assert bash(appliance, "echo one; echo two >/dev/stderr; echo three")[1] == "one\ntwo\nthree\n"


@pytest.mark.appliance
def test_200_mb_of_binary_output_pass_without_growth(appliance: Appliance) -> None:
    received = 0

    def count(data: bytes) -> None:
        nonlocal received
        received += len(data)

    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = appliance.run(["/bin/bash", "-c", "head -c 200000000 /dev/urandom"], PATH, "/", on_output=count)
    assert (result.exit_status, received) == (0, 200_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 50 * 1024


@pytest.mark.appliance
def test_a_process_left_behind_does_not_hold_up_the_build(appliance: Appliance) -> None:
    status, output = bash(appliance, "(trap '' TERM HUP; sleep 300) & echo left it")
    assert (status, output) == (0, "left it\n")


@pytest.mark.appliance
def test_no_network_means_none(appliance: Appliance) -> None:
    status, output = bash(appliance, "ls /sys/class/net; cat /etc/resolv.conf 2>/dev/null || echo no resolver")
    assert status == 0
    assert output.split() == ["lo", "no", "resolver"]


@pytest.mark.appliance
def test_sudo_follows_its_rules_for_the_environment(appliance: Appliance) -> None:
    text = """
        export KEPT=1 PS4=x; f() { :; }; export -f f
        sudo sh -c 'echo plain ${KEPT-gone} $HOME'
        sudo -E sh -c 'echo kept ${KEPT-gone} ${PS4}end'; sudo -E env | grep -c BASH_FUNC
        sudo A=1 sh -c 'echo assigned $A'; sudo -- echo dashes; sudo -n -H -u root id -u
        sudo -Hiu root id -un; sudo -u nobody id -u
        sudo --unknown true; echo $?; sudo false; echo $?
    """
    assert bash(appliance, text)[1].splitlines() == [
        "plain gone /root", "kept 1 + end", "0", "assigned 1", "dashes", "0", "root", "65534",
        "sudo: unknown option '--unknown'", "1", "1",
    ]  # fmt: skip


@pytest.mark.appliance
def test_tools_that_elements_call_are_there(appliance: Appliance) -> None:
    programs = (
        "awk bash cat chroot curl debootstrap dmsetup dosfslabel env findmnt flock git gpgv jq kpartx losetup lsattr "
        "lvcreate mkfs.ext4 mkfs.vfat mkfs.xfs mmdebstrap mount numfmt perl python3 qemu-img rsync sed sgdisk "
        "sha256sum sudo tar truncate udevadm unsquashfs wget which xz zstd"
    )
    status, output = bash(appliance, f"for p in {programs}; do type -P $p >/dev/null || echo $p; done")
    assert (status, output) == (0, "")


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


STANDS_STILL_ONCE = """#!/bin/sh
case " $* " in
    *" -kernel "*) [ -e "$0.tried" ] || { : >"$0.tried"; exec sleep 600; } ;;
esac
exec qemu-system-$(uname -m) "$@"
"""


@pytest.mark.appliance
def test_an_appliance_that_stands_still_is_started_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appliance_module, "_START_TIMEOUTS_S", (3.0, 600.0))
    program = tmp_path / "qemu"
    program.write_text(STANDS_STILL_ONCE)
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
        appliance.prepare()
        assert bash(appliance, "echo here") == (0, "here\n")
    assert (tmp_path / "qemu.tried").exists()
    assert told == ["starting the appliance: no answer in 3 s; starting it once more"]


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
def test_files_that_cannot_be_read_or_written_are_errors(appliance: Appliance) -> None:
    with pytest.raises(ApplianceError, match=r"^reading '/dib/none' in the appliance: .*No such file") as caught:
        appliance.read("/dib/none")
    assert caught.value.problems[0].hint
    with pytest.raises(ApplianceError, match=r"^writing '/dib/none/x' in the appliance: .*No such file"):
        appliance.write("/dib/none/x", b"")
    assert bash(appliance, "echo it lives") == (0, "it lives\n")


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
