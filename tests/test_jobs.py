# SPDX-License-Identifier: Apache-2.0
"""Jobs, and the contract of what runs them: the appliance and the sandbox promise the same."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import skip_without
from test_sandbox import staged
from virt_dib.appliance import Appliance
from virt_dib.errors import ApplianceError
from virt_dib.jobs import Event, Splitter
from virt_dib.sandbox import Sandbox, Settings, open_sandbox

PATH = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
TOKEN = b"0123456789abcdef"


# ---- output and events ----


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


# ---- the contract ----


@pytest.fixture(
    scope="module",
    params=[pytest.param("vm", marks=pytest.mark.appliance), pytest.param("sandbox", marks=pytest.mark.sandbox)],
)
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance | Sandbox]:
    """An appliance and a sandbox without network, one after the other."""
    if request.param == "vm":
        yield request.getfixturevalue("appliance")
        return
    skip_without("sandbox")
    with open_sandbox(Settings(directory=staged(tmp_path_factory.mktemp("box")), network=False)) as running:
        yield running


def bash(runner: Appliance | Sandbox, text: str) -> tuple[int, str]:
    result = runner.run(["/bin/bash", "-c", text], PATH, "/dib")
    return result.exit_status, result.tail


def test_a_command_sees_exactly_the_variables_given(runner: Appliance | Sandbox) -> None:
    value = "a b 'c' \"d\" $e `f`\nsecond line \u00e4"
    received = bytearray()
    result = runner.run(["/usr/bin/env", "-0"], PATH | {"ODD": value}, "/dib/out", on_output=received.extend)
    seen = dict(item.split("=", 1) for item in received.decode().split("\0") if item)
    assert result.exit_status == 0
    assert seen.pop("ODD") == value
    assert seen.pop("PWD") == "/dib/out"
    assert set(seen) <= {"PATH", "SHLVL", "OLDPWD", "_"}


def test_variables_may_be_long(runner: Appliance | Sandbox) -> None:
    many = {f"LONG{number}": "x" * 100_000 for number in range(5)}
    result = runner.run(["/bin/bash", "-c", "echo ${#LONG0} ${#LONG4}"], PATH | many, "/")
    assert (result.exit_status, result.tail) == (0, "100000 100000\n")


@pytest.mark.parametrize("status", [0, 1, 3, 127, 255])
def test_exit_status_comes_back(runner: Appliance | Sandbox, status: int) -> None:
    assert bash(runner, f"exit {status}")[0] == status


def test_a_signal_shows_as_the_shell_counts_it(runner: Appliance | Sandbox) -> None:
    assert bash(runner, "kill -KILL $$")[0] == 128 + 9


def test_writing_to_dev_stderr_loses_nothing(runner: Appliance | Sandbox) -> None:
    assert bash(runner, "echo one; echo two >/dev/stderr; echo three")[1] == "one\ntwo\nthree\n"


def test_200_mb_of_binary_output_pass_without_growth(runner: Appliance | Sandbox) -> None:
    received = 0

    def count(data: bytes) -> None:
        nonlocal received
        received += len(data)

    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = runner.run(["/bin/bash", "-c", "head -c 200000000 /dev/urandom"], PATH, "/", on_output=count)
    assert (result.exit_status, received) == (0, 200_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 50 * 1024


def test_a_process_left_behind_does_not_hold_up_the_build(runner: Appliance | Sandbox) -> None:
    status, output = bash(runner, "(trap '' TERM HUP; sleep 300) & echo left it")
    assert (status, output) == (0, "left it\n")


def test_a_job_that_reads_its_own_output(runner: Appliance | Sandbox) -> None:
    status, _ = bash(runner, "cat </proc/self/fd/1 >/dev/null & for i in {1..30000}; do echo $i; done; kill $!")
    assert status == 0


def test_a_job_has_no_descriptors_but_its_own(runner: Appliance | Sandbox) -> None:
    assert bash(runner, "cd /proc/self/fd; echo *; readlink 0")[1] == "0 1 2 3\n/dev/null\n"


def test_a_broken_pipe_ends_a_program(runner: Appliance | Sandbox) -> None:
    assert bash(runner, "set -o pipefail; yes | head -n 1; echo ${PIPESTATUS[0]}")[1] == "y\n141\n"


def test_events_are_told_from_output_and_cannot_be_forged(runner: Appliance | Sandbox) -> None:
    events: list[Event] = []
    output = bytearray()
    text = r'printf "\036%s start one 1.5\036" "$1"; printf "\036%s end one 0 2\036" forged; printf "\036"'
    result = runner.run(["/bin/bash", "-c", text, "bash"], PATH, "/", on_output=output.extend, on_event=events.append)
    assert result.exit_status == 0
    assert events == [Event("start", ("one", "1.5"))]
    assert output == b"\x1eforged end one 0 2\x1e\x1e"


def test_files_are_written_and_read(runner: Appliance | Sandbox) -> None:
    data = bytes(range(256)) * 10_000
    runner.write("/dib/tmp/a file", data)
    assert runner.read("/dib/tmp/a file", limit_bytes=len(data) + 1) == data
    assert runner.read("/dib/tmp/a file", limit_bytes=300) == data[:300]
    assert runner.is_directory("/dib/tmp")
    assert not runner.is_directory("/dib/tmp/a file")
    assert not runner.is_directory("/dib/nowhere")


def test_files_that_cannot_be_read_or_written_are_errors(runner: Appliance | Sandbox) -> None:
    with pytest.raises(ApplianceError, match=r"^reading '/dib/none' in the (appliance|sandbox): .*No such file"):
        runner.read("/dib/none")
    with pytest.raises(ApplianceError, match=r"^writing '/dib/none/x' in the (appliance|sandbox): .*No such file"):
        runner.write("/dib/none/x", b"")
    with pytest.raises(ApplianceError, match=r"^writing '/dib/tmp' in the (appliance|sandbox): .*Is a directory"):
        runner.write("/dib/tmp", b"")
    for use in (runner.read, lambda path: runner.write(path, b"")):
        with pytest.raises(ValueError, match="/etc/passwd"):
            use("/etc/passwd")
    assert bash(runner, "echo it lives") == (0, "it lives\n")


def test_no_network_means_none(runner: Appliance | Sandbox) -> None:
    status, output = bash(runner, "ls /sys/class/net; cat /etc/resolv.conf 2>/dev/null || echo no resolver")
    assert (status, output.split()) == (0, ["lo", "no", "resolver"])


def test_python_finds_dibs_modules(runner: Appliance | Sandbox) -> None:
    runner.write("/dib/site/virt_dib_probe.py", b"print('found')\n")
    assert bash(runner, "/usr/bin/python3 -c 'import virt_dib_probe'") == (0, "found\n")


def test_sudo_follows_its_rules_for_the_environment(runner: Appliance | Sandbox) -> None:
    text = """
        export KEPT=1 PS4=x; f() { :; }; export -f f
        sudo sh -c 'echo plain ${KEPT-gone} $HOME'
        sudo -E sh -c 'echo kept ${KEPT-gone} ${PS4}end'; sudo -E env | grep -c BASH_FUNC
        sudo A=1 sh -c 'echo assigned $A'; sudo -- echo dashes; sudo -n -H -u root id -u
        sudo -Hiu root id -un; sudo -u nobody id -u
        sudo --unknown true; echo $?; sudo false; echo $?
    """
    assert bash(runner, text)[1].splitlines() == [
        "plain gone /root", "kept 1 + end", "0", "assigned 1", "dashes", "0", "root", "65534",
        "sudo: unknown option '--unknown'", "1", "1",
    ]  # fmt: skip


IN_EITHER = (
    "awk bash cat chroot env findmnt flock getent gpgv mount perl python3 sed sha256sum sudo tar truncate umount "
    "which xz"
)
"""Those of the tree stage that the package lists of a build host have at least."""
IN_THE_APPLIANCE = (
    "curl debootstrap dmsetup dosfslabel git jq kpartx losetup lsattr lvcreate mkfs.ext4 mkfs.vfat mkfs.xfs mmdebstrap "
    "numfmt qemu-img rsync sgdisk udevadm unsquashfs wget zstd"
)


def test_tools_that_elements_call_are_there(runner: Appliance | Sandbox) -> None:
    programs = IN_EITHER if isinstance(runner, Sandbox) else f"{IN_EITHER} {IN_THE_APPLIANCE}"
    status, output = bash(runner, f"for p in {programs}; do type -P $p >/dev/null || echo $p; done")
    assert (status, output) == (0, "")
