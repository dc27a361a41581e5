# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import os
import re
import struct
import sys
import time
from pathlib import Path

import pytest

from virt_dib import boot, boot_cli, tools
from virt_dib.boot import Firmware
from virt_dib.errors import ToolError, UsageError

LIMIT_S = 60.0
SILENT_LIMIT_S = 4.0

# ---- boot sectors: 16-bit code that prints what follows it on COM1, then stops or goes on for ever ----

_START = bytes.fromhex(
    "fa"  # cli
    "31c0"  # xor ax, ax
    "8ed8"  # mov ds, ax
    "fc"  # cld
)
_PRINT = bytes.fromhex(
    "ac"  # next: lodsb
    "84c0"  # test al, al
    "7411"  # jz end
    "88c3"  # mov bl, al
    "bafd03"  # mov dx, 0x3fd (line status)
    "ec"  # wait: in al, dx
    "a820"  # test al, 0x20 (may take a byte)
    "74fb"  # jz wait
    "88d8"  # mov al, bl
    "b2f8"  # mov dl, 0xf8 (data)
    "ee"  # out dx, al
    "ebea"  # jmp next
)
_HALT = bytes.fromhex("f4ebfd")  # end: hlt; jmp end
_AGAIN = bytes.fromhex("ebe5")  # end: jmp to the mov that loads si
_RESET = bytes.fromhex(
    "b0fe"  # end: mov al, 0xfe
    "e664"  # out 0x64, al (the keyboard controller resets the machine)
    "f4ebfd"  # hlt
)


_OVERWRITE = bytes.fromhex(
    "8ec0"  # mov es, ax
    "bb007c"  # mov bx, 0x7c00 (this sector in memory)
    "b80103"  # mov ax, 0x0301 (write one sector)
    "b90200"  # mov cx, 2 (cylinder 0, sector 2)
    "ba8000"  # mov dx, 0x80 (the first disk, head 0)
    "cd13"  # int 0x13
    "72fe"  # failed: jc failed
)


def boot_sector(text: bytes, end: bytes = _HALT, *, first: bytes = b"") -> bytes:
    """A disk of 1 MiB whose boot sector does *first*, prints *text* and then does *end*."""
    load_address = 0x7C00
    code_bytes = len(_START) + len(first) + 3 + len(_PRINT) + len(end)
    load_text = b"\xbe" + struct.pack("<H", load_address + code_bytes)  # mov si, text
    sector = _START + first + load_text + _PRINT + end + text + b"\0"
    assert len(sector) <= 446
    return (sector.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0")


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "disk, with a comma.img")


class Disk:
    """A disk image that tells when it was written to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = ""

    def write(self, content: bytes) -> None:
        self.path.write_bytes(content)
        self._state = self._now()

    def convert(self, name: str) -> Path:
        """A qcow2 of it under another name."""
        target = self.path.with_name(name)
        qemu_img("convert", "-f", "raw", "-O", "qcow2", self.path, target)
        return target

    def assert_untouched(self) -> None:
        assert self._now() == self._state

    def _now(self) -> str:
        return f"{hashlib.sha256(self.path.read_bytes()).hexdigest()} {self.path.stat().st_mtime_ns}"


def qemu_img(*arguments: str | Path) -> None:
    tools.run(["qemu-img", *arguments], doing="making an image for the test")


def start(path: Path, *, timeout_s: float = LIMIT_S, expect: str = boot.DEFAULT_EXPECT) -> boot.BootResult:
    return boot.boot_test(path, timeout_s=timeout_s, expect=expect, memory_mib=64, accelerate=False)


# ---- real machines ----


@pytest.mark.appliance
def test_a_prompt_without_a_line_end(disk: Disk) -> None:
    disk.write(boot_sector(b"loading\r\n\r\ntiny login: "))
    lines: list[str] = []
    result = boot.boot_test(disk.path, timeout_s=LIMIT_S, memory_mib=64, accelerate=False, on_line=lines.append)
    assert (result.passed, result.firmware, result.reason) == (True, Firmware.BIOS, "tiny login:")
    assert result.last_lines[-2:] == ("loading", "tiny login:")
    assert tuple(lines) == result.last_lines
    disk.assert_untouched()


@pytest.mark.appliance
def test_a_qcow2_and_another_text(disk: Disk) -> None:
    disk.write(boot_sector(b"system ready in 3 s\r\n"))
    result = start(disk.convert("disk.qcow2"), expect=r"ready in \d+ s$")
    assert (result.passed, result.reason) == (True, "system ready in 3 s")


@pytest.mark.appliance
def test_what_the_guest_writes_does_not_reach_the_image(disk: Disk) -> None:
    # It prints only when its disk has taken the sector.
    disk.write(boot_sector(b"written, tiny login: ", first=_OVERWRITE))
    assert start(disk.path).reason == "written, tiny login:"
    disk.assert_untouched()


@pytest.mark.appliance
def test_an_image_that_may_not_be_written(disk: Disk) -> None:
    disk.write(boot_sector(b"tiny login: "))
    disk.path.chmod(0o444)
    assert start(disk.path).passed
    disk.assert_untouched()


@pytest.mark.appliance
def test_a_panic_ends_the_test(disk: Disk) -> None:
    disk.write(boot_sector(b"one\r\n[    1.2] Kernel panic - not syncing: VFS: no root\r\n"))
    result = start(disk.path)
    assert not result.passed
    assert result.reason == "the guest stopped at '[    1.2] Kernel panic - not syncing: VFS: no root'"
    assert result.last_lines[-2] == "one"
    disk.assert_untouched()


@pytest.mark.appliance
def test_silence_ends_with_the_time_limit(disk: Disk) -> None:
    disk.write(boot_sector(b""))
    result = start(disk.path, timeout_s=SILENT_LIMIT_S)
    assert (result.passed, result.reason) == (False, f"did not come up in {SILENT_LIMIT_S:g} s")
    assert not any("login" in line for line in result.last_lines)
    disk.assert_untouched()


@pytest.mark.appliance
def test_a_prompt_of_somebody_else_ends_the_test(disk: Disk) -> None:
    disk.write(boot_sector(b"error: no such partition.\r\ngrub rescue> "))
    result = start(disk.path)
    assert (result.passed, result.reason) == (False, "the guest stopped at 'grub rescue>'")


@pytest.mark.appliance
def test_a_reset_ends_the_test(disk: Disk) -> None:
    disk.write(boot_sector(b"bye\r\n", _RESET))
    result = start(disk.path)
    assert (result.passed, result.reason) == (False, "the guest reset or powered off")
    assert result.last_lines[-1] == "bye"


@pytest.mark.appliance
def test_escape_sequences_stay_inside(disk: Disk) -> None:
    disk.write(boot_sector(b"\x1b]0;title\x07\x1b[2J\x1b[31mred\x1b[0m\x07\x9b1m \xff\r\nlo\x1b[1mgin: "))
    result = start(disk.path)
    assert result.passed
    assert result.reason == "login:"
    assert result.last_lines[-2].startswith("red")
    assert all(line.isprintable() for line in result.last_lines)


@pytest.mark.appliance
def test_output_without_end_is_held_in_bounded_memory(disk: Disk) -> None:
    disk.write(boot_sector(b"x" * 300, _AGAIN))
    result = start(disk.path, timeout_s=SILENT_LIMIT_S)
    assert not result.passed
    assert len(result.last_lines) == boot.LAST_LINES
    assert max(map(len, result.last_lines)) <= 1024


@pytest.mark.appliance
def test_uefi_without_anything_to_start(disk: Disk) -> None:
    disk.write(b"\0" * (64 << 20))
    tools.run(["sgdisk", "-n", "1:2048:+32M", "-t", "1:ef00", disk.path], doing="partitioning")
    result = boot.boot_test(disk.path, timeout_s=LIMIT_S * 2, memory_mib=256, accelerate=False)
    assert result.firmware is Firmware.UEFI
    assert not result.passed
    # The firmware of some distributions has a shell to fall into.
    assert re.fullmatch(r"the guest stopped at '(Shell>|BdsDxe: No bootable option.*)'", result.reason)


@pytest.mark.appliance
def test_an_image_that_qemu_cannot_open(disk: Disk) -> None:
    disk.write(boot_sector(b"tiny login: "))
    image = disk.convert("broken.qcow2")
    with image.open("r+b") as stream:
        stream.seek(40)
        stream.write(struct.pack(">Q", 0x123))  # the offset of the L1 table, which must be aligned
    with pytest.raises(ToolError, match=r"L1|qemu"):
        start(image)


# ---- the firmware by the partition table ----


def partitioned(path: Path, tool: str, *arguments: str, text: str | None = None) -> Path:
    with path.open("wb") as stream:
        stream.truncate(64 << 20)
    stdin = None if text is None else text.encode()
    tools.run([tools.require(tool, purpose="test", package="fdisk gdisk"), *arguments, path], doing="", stdin=stdin)
    return path


def firmware_of(image: Path) -> Firmware:
    """As the boot test finds it."""
    return boot.firmware_by(boot.partition_table(image, boot.probe_format(image), image.parent))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        pytest.param("label: dos\ntype=83\n", Firmware.BIOS, id="mbr"),
        pytest.param("label: dos\ntype=ef, size=8M\ntype=83\n", Firmware.UEFI, id="mbr with ESP"),
        pytest.param("label: gpt\ntype=21686148-6449-6E6F-744E-656564454649\n", Firmware.BIOS, id="gpt"),
        pytest.param("label: gpt\nsize=8M\nsize=8M\ntype=uefi\n", Firmware.UEFI, id="gpt with ESP"),
    ],
)
def test_firmware_by_the_partition_table(tmp_path: Path, table: str, expected: Firmware) -> None:
    raw = partitioned(tmp_path / "disk.img", "sfdisk", "-q", text=table)
    qcow2 = tmp_path / "disk.qcow2"
    qemu_img("convert", "-O", "qcow2", raw, qcow2)
    assert firmware_of(raw) is expected
    assert firmware_of(qcow2) is expected


@pytest.mark.parametrize("count", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("size_bytes", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("first_sector", [0, 2, 2**64 - 1])
def test_a_hostile_gpt_is_just_no_uefi(tmp_path: Path, first_sector: int, count: int, size_bytes: int) -> None:
    header = b"EFI PART".ljust(72, b"\0") + struct.pack("<QIII", first_sector, count, size_bytes, 0)
    image = tmp_path / "disk.img"
    image.write_bytes(b"\0" * 512 + header + b"\0" * 4096)
    assert firmware_of(image) is Firmware.BIOS


def test_a_short_image_is_just_no_uefi(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(b"x")
    assert firmware_of(tmp_path / "disk.img") is Firmware.BIOS


# ---- images that are refused ----


def test_a_qcow2_with_a_backing_file(disk: Disk) -> None:
    disk.write(boot_sector(b""))
    overlay = disk.path.with_name("overlay.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", disk.path, overlay)
    with pytest.raises(UsageError, match="not complete without a backing file"):
        start(overlay)


def test_a_qcow2_with_a_data_file(tmp_path: Path) -> None:
    image = tmp_path / "split.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", image, "1M")
    with pytest.raises(UsageError, match="not complete without a data file"):
        start(image)


def test_a_raw_image_called_qcow2(disk: Disk) -> None:
    disk.write(boot_sector(b""))
    with pytest.raises(UsageError, match="it is no qcow2 image"):
        boot.boot_test(disk.path, image_format="qcow2", accelerate=False)


@pytest.mark.parametrize("kind", ["vmdk", "vpc", "vhdx", "vdi"])
def test_other_kinds_of_images(tmp_path: Path, kind: str) -> None:
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", kind, image, "16M")
    with pytest.raises(UsageError, match=r"it is a V.* image"):
        start(image)


def test_no_image(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        start(tmp_path / "none.qcow2")
    with pytest.raises(UsageError, match="no regular file"):
        start(tmp_path)


@pytest.mark.parametrize("image_format", [None, "raw"])
def test_an_empty_image(tmp_path: Path, image_format: str | None) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(UsageError, match="it is empty"):
        boot.boot_test(tmp_path / "empty", image_format=image_format, timeout_s=1, accelerate=False)


def test_a_text_to_wait_for_that_is_no_regular_expression(disk: Disk) -> None:
    disk.write(boot_sector(b""))
    with pytest.raises(UsageError, match=re.escape("cannot use '(login'")):
        start(disk.path, expect="(login")


# ---- the command ----


@pytest.mark.appliance
def test_the_command_says_that_it_booted(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    disk.write(boot_sector(b"one\r\ntiny login: "))
    assert boot_cli.main(["--memsize", "64", "--timeout", "60", str(disk.path)]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"disk, with a comma\.img: booted to 'tiny login:' in [0-9.]+ s \(BIOS, (KVM|emulated)\)\n", out
    )
    assert err == ""


@pytest.mark.appliance
def test_the_command_shows_where_the_guest_stopped(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    disk.write(boot_sector(b"one\r\nKernel panic - not syncing: \x1b[31mno init\r\n"))
    assert boot_cli.main(["--memsize", "64", str(disk.path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("the last lines of its console:\n")
    assert "\n  one\n  Kernel panic - not syncing: no init\nvirt-dib-boot-test: error: booting " in err
    assert "): the guest stopped at 'Kernel panic - not syncing: no init'\nvirt-dib-boot-test: hint: " in err


@pytest.mark.appliance
def test_the_command_prints_the_console_as_it_comes(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    disk.write(boot_sector(b"one\r\nKernel panic - not syncing: \x1b[31mno init\r\n"))
    assert boot_cli.main(["--memsize", "64", "-v", str(disk.path)]) == 1
    out, err = capsys.readouterr()
    assert out.endswith("one\nKernel panic - not syncing: no init\n")
    assert "the last lines of its console:" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="no image"),
        pytest.param(["--uefi", "--bios", "x"], id="two firmwares"),
        pytest.param(["--kernel", "k", "--initrd", "i"], id="kernel, nothing to wait for"),
        pytest.param(["--kernel", "k", "--expect", "x"], id="kernel alone"),
        pytest.param(["--kernel", "k", "--initrd", "i", "--expect", "x", "image"], id="kernel and image"),
        pytest.param(["--kernel", "k", "--initrd", "i", "--expect", "x", "--uefi"], id="kernel and firmware"),
        pytest.param(["--initrd", "i", "image"], id="initramfs alone"),
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert boot_cli.main(arguments) == 2
    error, hint, *_ = capsys.readouterr().err.splitlines()
    assert error.startswith("virt-dib-boot-test: error: ")
    assert hint == "virt-dib-boot-test: hint: 'virt-dib-boot-test --help' lists all options"


@pytest.mark.parametrize(
    ("option", "text", "hint"),
    [
        ("--timeout", "0", "give a number of seconds more than 0 and at most 604800"),
        ("--timeout", "nan", "give a number of seconds more than 0 and at most 604800"),
        ("--timeout", "9" * 19, "give a number of seconds more than 0 and at most 604800"),
        ("--memsize", "1e9", "give a whole number of MB from 64 to 16777216"),
        ("--memsize", "63", "give a whole number of MB from 64 to 16777216"),
        ("--memsize", "9" * 5000, "give a whole number of MB from 64 to 16777216"),
        ("--format", "vmdk", "choose from raw, qcow2"),
    ],
)
def test_a_value_out_of_its_range(
    option: str, text: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "image").write_text("x")
    assert boot_cli.main([option, text, str(tmp_path / "image")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"virt-dib-boot-test: error: cannot use '{text}' as the value of {option}",
        f"virt-dib-boot-test: hint: {hint}",
    ]


def test_all_mistakes_of_the_command_are_told_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = str(tmp_path / "none")
    wrong = ["--timeout", "x", "--memsize", "y", "--expect", "(", "--initrd", none, none]
    assert boot_cli.main(wrong) == 2
    err = capsys.readouterr().err
    words = ("'x'", "'y'", "'('", "are for --kernel", f"the initrd '{none}'", f"the image '{none}'")
    assert [word for word in words if word not in err] == []
    assert boot_cli.main(["--expect", "", none]) == 2
    assert "error: cannot use an empty text to wait for\n" in capsys.readouterr().err


def test_a_missing_image_is_an_error_with_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert boot_cli.main([str(tmp_path / "none.img")]) == 2
    assert "virt-dib-boot-test: hint: give the path of a raw or qcow2 image\n" in capsys.readouterr().err


def test_a_missing_kernel_is_an_error_with_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "initrd").touch()
    none = str(tmp_path / "none")
    assert boot_cli.main(["--kernel", none, "--initrd", str(tmp_path / "initrd"), "--expect", "x"]) == 2
    err = capsys.readouterr().err
    assert f"error: cannot read the kernel '{none}': no such file\n" in err
    assert "virt-dib-boot-test: hint: give the path of the kernel\n" in err


@pytest.mark.appliance
def test_ctrl_c_ends_the_command_and_the_machine(disk: Disk, tmp_path: Path) -> None:
    disk.write(boot_sector(b"waiting\r\n"))
    command = [sys.executable, "-c", "import sys; from virt_dib.boot_cli import main; sys.exit(main())", "-v"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "VIRT_DIB_KVM": "off"}
    with tools.started([*command, "--memsize", "64", disk.path], environment=environment) as process:
        assert process.stdout is not None
        while b"waiting" not in (line := process.stdout.readline()):
            assert line, "the command ended before the guest printed anything"
        process.send_signal(2)
        assert process.wait(LIMIT_S) == 130
    assert list(tmp_path.glob("virt-dib-boot-*")) == []
    assert not any(str(disk.path).encode() in words for words in command_lines())


WAITS = """
import sys
from pathlib import Path
from virt_dib import boot
path = Path(sys.argv[1])
boot.boot_kernel(path, path, expect="x", accelerate=False)
"""


def test_what_a_killed_test_leaves_goes_at_the_next_start(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.write(boot_sector(b""))
    fake, temporary = tmp_path / "bin/qemu-system-x86_64", tmp_path / "temporary"
    for directory in (fake.parent, temporary):
        directory.mkdir()
    fake.write_text("#!/bin/sh\necho waiting\necho $$ >$TMPDIR/number\nexec sleep 600\n")
    fake.chmod(0o755)
    environment = {**os.environ, "TMPDIR": str(temporary), "PATH": f"{fake.parent}:/usr/bin:/bin"}
    with tools.started([sys.executable, "-c", WAITS, disk.path], environment=environment) as process:
        while not (numbers := [text for path in temporary.glob("*/number") if (text := path.read_text())]):
            assert process.poll() is None
            time.sleep(0.02)
        monkeypatch.setenv("TMPDIR", str(temporary))
        begin_a_boot_test()
        assert list(temporary.glob("virt-dib-boot-*/kernel"))
        process.kill()
        process.wait()
    assert not qemu_is_left(numbers[0].strip())
    begin_a_boot_test()
    assert list(temporary.iterdir()) == []


def begin_a_boot_test() -> None:
    with boot._private_dir():  # noqa: SLF001 - no virtual machine is wanted
        pass


def qemu_is_left(number: str) -> bool:
    until_s = time.monotonic() + LIMIT_S
    while Path(f"/proc/{number}/exe").exists() and time.monotonic() < until_s:
        time.sleep(0.02)
    return Path(f"/proc/{number}/exe").exists()


def command_lines() -> list[bytes]:
    """Those of all processes here, with ``,,`` as the comma it means to qemu."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b",,", b","))
        except OSError:
            continue
    return found
