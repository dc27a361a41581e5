# SPDX-License-Identifier: Apache-2.0
"""Does an image boot, or a kernel with its initramfs? Start it in qemu, and read its serial console.

The image stays as it is. The guest is not trusted: it has no network and no disk but a snapshot of the image;
what it prints is made harmless and held in bounded memory, however much it is.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
import shutil
import struct
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from virt_dib import kvm, tools
from virt_dib.disk_images import HEAD_BYTES, format_by, qcow2_header
from virt_dib.errors import PrerequisiteError, ToolError, UsageError
from virt_dib.files import temp_dir, temp_dir_variable
from virt_dib.interrupts import shielded
from virt_dib.plain_text import Sanitiser
from virt_dib.workspace import PREFIX, private_directory, remove_leftovers

FORMATS = ("raw", "qcow2")
DEFAULT_EXPECT = r"login:"
DEFAULT_TIMEOUT_S = 900.0
DEFAULT_MEMORY_MIB = 1024
LAST_LINES = 15

_LINE_CHARACTERS = 1024
"""A longer line, or output without any line end, is cut into lines of this length."""
_QEMU = "qemu-system-x86_64"
_MOST_CPUS = 2
_TABLE_BYTES = 64 * 1024
"""Enough of a disk for its partition table: 128 entries end before it, with any sector size."""

_DEAD_LINES = re.compile(
    r"Kernel panic - not syncing"
    r"|^You are in emergency mode"
    r"|^BdsDxe: No bootable option"
)
"""What a guest prints when it will not come up any more."""
_DEAD_PROMPTS = re.compile(r"^(grub rescue>|\(initramfs\)|Shell>)")
"""Where it stops and asks instead. The last is of UEFI with nothing to start."""

_FIRMWARE_FILES = (
    # Debian, Ubuntu
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    # Fedora, CentOS
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    # Arch
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/edk2-ovmf/x64/OVMF_CODE.fd", "/usr/share/edk2-ovmf/x64/OVMF_VARS.fd"),
    # openSUSE
    ("/usr/share/qemu/ovmf-x86_64-4m-code.bin", "/usr/share/qemu/ovmf-x86_64-4m-vars.bin"),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
    # Gentoo
    ("/usr/share/edk2-ovmf/OVMF_CODE.fd", "/usr/share/edk2-ovmf/OVMF_VARS.fd"),
)
"""The code of the firmware, and the empty store of its variables, without Secure Boot."""


class Firmware(enum.Enum):
    """What starts the boot loader."""

    BIOS = "BIOS"
    UEFI = "UEFI"
    NONE = "no boot loader"
    """Qemu itself starts a kernel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BootResult:
    """How a boot went."""

    passed: bool
    firmware: Firmware
    seconds: float
    reason: str
    """The text that was waited for, or one clause about what came instead."""
    last_lines: tuple[str, ...]
    """The end of what the guest printed, without control characters."""


def boot_test(
    image: Path,
    *,
    firmware: Firmware | None = None,
    image_format: str | None = None,
    expect: str = DEFAULT_EXPECT,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    memory_mib: int = DEFAULT_MEMORY_MIB,
    accelerate: bool,
    on_line: Callable[[str], None] | None = None,
) -> BootResult:
    """Start *image*, which stays as it is, and wait for text that *expect* (a regular expression) finds.

    Without *firmware*, an image with an EFI system partition starts by UEFI, any other by BIOS. The test
    also ends when the guest says that it cannot go on, when it resets or powers off, and after *timeout_s*.
    *on_line* gets each line of the console, without control characters.

    Raises:
        UsageError: *expect* is no regular expression, or there is no image, an empty one, or one of another kind than
            raw and qcow2 or that needs other files.
        PrerequisiteError: qemu or the firmware is not installed.
        ToolError: the image cannot be read, or qemu failed.
    """
    console = _Console(compiled(expect), on_line)
    disk_format = probe_format(image, image_format)
    qemu = tools.require(_QEMU, purpose="start the image", package="qemu-system-x86")
    with _private_dir() as directory:
        table = partition_table(image, disk_format, directory)
        if firmware is None:
            firmware = firmware_by(table)
        command = [
            str(qemu),
            *_machine_options(memory_mib, accelerate=accelerate),
            *_firmware_options(firmware, directory),
            *_disk_options(image, disk_format, _sector_bytes(table)),
        ]
        return _started(command, directory, console, timeout_s, firmware)


def boot_kernel(
    kernel: Path,
    initrd: Path,
    *,
    arguments: str = "",
    expect: str,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    memory_mib: int = DEFAULT_MEMORY_MIB,
    accelerate: bool,
    on_line: Callable[[str], None] | None = None,
) -> BootResult:
    """As :func:`boot_test`, for *kernel* with the initramfs *initrd*, in a machine without a disk.

    *arguments* follow ``console=ttyS0`` on the kernel's command line.

    Raises:
        UsageError: *expect* is no regular expression, or a file is not there.
        PrerequisiteError: qemu is not installed.
        ToolError: a file cannot be read, or qemu failed: *kernel* may be none.
    """
    console = _Console(compiled(expect), on_line)
    qemu = tools.require(_QEMU, purpose="start the kernel", package="qemu-system-x86")
    with _private_dir() as directory:
        for name, path in (("kernel", kernel), ("initrd", initrd)):
            check_file(path, name)
            # Names of ours: what qemu makes of a comma in one depends on the kind of kernel.
            (directory / name).symlink_to(path.absolute())
        command = [
            str(qemu),
            *_machine_options(memory_mib, accelerate=accelerate),
            *_firmware_options(Firmware.NONE, directory),
            *("-kernel", str(directory / "kernel"), "-initrd", str(directory / "initrd")),
            *("-append", f"console=ttyS0 {arguments}".strip()),
        ]
        return _started(command, directory, console, timeout_s, Firmware.NONE)


def compiled(expect: str) -> re.Pattern[str]:
    """The text to wait for.

    Raises:
        UsageError: *expect* is empty, which all output has, or no regular expression.
    """
    if not expect:
        raise UsageError("cannot use an empty text to wait for", hint=f"leave out --expect for '{DEFAULT_EXPECT}'")
    try:
        return re.compile(expect)
    except re.error as error:
        raise UsageError(
            f"cannot use '{expect}' as the text to wait for: {error}", hint="give a Python regular expression"
        ) from error


def probe_format(image: Path, wanted: str | None = None) -> str:
    """*wanted*, or else ``raw`` or ``qcow2``, by the first bytes of *image*.

    Raises:
        UsageError: there is no such file, or it is empty or a disk image of another kind.
        ToolError: it cannot be read.
    """
    head = _head(image, HEAD_BYTES)
    if not head:
        raise UsageError(f"cannot boot '{image}': it is empty", hint="give the image that a build has completed")
    found = wanted or format_by(head)
    if found not in FORMATS:
        raise UsageError(
            f"cannot boot '{image}': it is a {found.upper()} image",
            hint="give the raw or qcow2 image of the same build",
        )
    return found


# ---- the image ----


def check_file(path: Path, what: str) -> None:
    """Refuse what cannot be the kernel or the initrd, *what* says which.

    Raises:
        UsageError: there is no such file.
        ToolError: it cannot be read.
    """
    _head(path, 1, what=what)


def _head(path: Path, size_bytes: int, *, what: str = "image") -> bytes:
    try:
        if not path.is_file():
            why = "it is no regular file" if path.exists() else "no such file"
            kind = "a raw or qcow2 image" if what == "image" else f"the {what}"
            raise UsageError(f"cannot read the {what} '{path}': {why}", hint=f"give the path of {kind}")
        with path.open("rb") as stream:
            return stream.read(size_bytes)
    except OSError as error:
        raise ToolError(
            f"cannot read the {what} '{path}': {(error.strerror or str(error)).lower()}",
            hint="make it readable for this user",
        ) from error


def _check_qcow2(image: Path) -> None:
    """Refuse a qcow2 that leads qemu to other files of the host."""
    header = qcow2_header(_head(image, HEAD_BYTES))
    if header is None:
        raise UsageError(f"cannot boot '{image}': it is no qcow2 image", hint="leave out --format to have it detected")
    if header.has_backing_file or header.has_data_file:
        raise UsageError(
            f"cannot boot '{image}': it is not complete without a data file"
            if header.has_data_file
            else f"cannot boot '{image}': it is not complete without a backing file",
            hint="if you trust it, make one image of it: qemu-img convert -O qcow2 OLD NEW",
        )


def partition_table(image: Path, disk_format: str, directory: Path) -> bytes:
    """The beginning of the disk in *image*, as the guest will see it; *directory* is for what is read of it.

    Raises:
        VirtDibError: as of :func:`boot_test`.
    """
    if disk_format == "raw":
        return _head(image, _TABLE_BYTES)
    _check_qcow2(image)
    qemu_img = tools.require("qemu-img", purpose="look into the image", package="qemu-utils")
    target = directory / "table"
    source = f"if={image.absolute()}"
    tools.run(
        [qemu_img, "dd", "-f", "qcow2", "-O", "raw", f"bs={_TABLE_BYTES}", "count=1", source, f"of={target}"],
        doing=f"reading the partition table of '{image}'",
    )
    return target.read_bytes()


def _sector_bytes(table: bytes) -> int:
    """4096 where the GPT says so by its place, the second sector; else 512."""
    return 4096 if table[4096:4104] == b"EFI PART" and table[512:520] != b"EFI PART" else 512


def firmware_by(table: bytes) -> Firmware:
    """UEFI where there is an EFI system partition."""
    return Firmware.UEFI if _has_system_partition(table) else Firmware.BIOS


def _has_system_partition(table: bytes) -> bool:
    sector_bytes = _sector_bytes(table)
    header = table[sector_bytes : sector_bytes + 92]
    if header.startswith(b"EFI PART") and len(header) == 92:  # noqa: PLR2004 - its length in the UEFI specification
        first_sector, count, size_bytes = struct.unpack_from("<QII", header, 72)
        begin = first_sector * sector_bytes
        ends = range(begin, min(begin + count * size_bytes, len(table)), max(size_bytes, 128))
        system = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b").bytes_le
        return any(table[at : at + 16] == system for at in ends)
    if table[510:512] != b"\x55\xaa":
        return False
    efi_type = 0xEF
    return any(table[446 + 16 * number + 4] == efi_type for number in range(4))


# ---- the virtual machine ----


def _machine_options(memory_mib: int, *, accelerate: bool) -> list[str]:
    # Of all that "max" emulates, five-level page tables are what kernels have been seen to stumble over.
    cpu = ["-accel", "kvm", "-cpu", "max"] if accelerate else ["-accel", "tcg", "-cpu", "max,la57=off"]
    return [
        *cpu,
        *("-m", str(memory_mib), "-smp", str(min(_MOST_CPUS, os.cpu_count() or 1))),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-vga", "std"),
        *("-device", "virtio-rng-pci", "-monitor", "none", "-serial", "stdio"),
    ]


def _firmware_options(firmware: Firmware, directory: Path) -> list[str]:
    if firmware is not Firmware.UEFI:
        return ["-machine", "pc"]
    code, empty_store = find_uefi()
    store = directory / "variables"
    shutil.copyfile(empty_store, store)
    return [
        *("-machine", "q35"),
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={_quoted(code)}"),
        *("-drive", f"if=pflash,unit=1,format=raw,file={_quoted(store)}"),
    ]


def _disk_options(image: Path, disk_format: str, sector_bytes: int) -> list[str]:
    # "snapshot" opens the image read-only and writes to an unlinked file in TMPDIR; "file.driver"
    # keeps a name like "nbd:host" from being anything but a name.
    drive = f"file.driver=file,file.filename={_quoted(image.absolute())},format={disk_format}"
    device = f"virtio-blk-pci,drive=image,bootindex=0,logical_block_size={sector_bytes}"
    return [
        *("-drive", f"{drive},if=none,id=image,snapshot=on"),
        *("-device", f"{device},physical_block_size={sector_bytes}"),
    ]


def find_uefi() -> tuple[Path, Path]:
    """The files of the UEFI firmware on this host: its code, and an empty store of variables.

    Raises:
        PrerequisiteError: there are none.
    """
    for code, store in _FIRMWARE_FILES:
        if os.access(code, os.R_OK) and os.access(store, os.R_OK):
            return Path(code), Path(store)
    raise PrerequisiteError(
        "the UEFI firmware OVMF not found, needed to boot an image by UEFI",
        hint="install it: apt-get install ovmf",
    )


def _quoted(path: Path) -> str:
    return str(path).replace(",", ",,")


@contextlib.contextmanager
def _private_dir() -> Iterator[Path]:
    parent = temp_dir().absolute()
    remove_leftovers(parent)
    with contextlib.ExitStack() as stack:
        with shielded():
            try:
                directory = stack.enter_context(private_directory(parent, f"{PREFIX}boot-"))
            except OSError as error:
                raise ToolError(
                    f"making a directory for the boot test in '{parent}': {error.strerror}",
                    hint=f"set {temp_dir_variable()} to a directory that you can write",
                ) from error
        yield directory


def _started(
    command: list[str], directory: Path, console: _Console, timeout_s: float, firmware: Firmware
) -> BootResult:
    begun = time.monotonic()
    passed, reason = _watch(command, directory, console, timeout_s, firmware)
    return BootResult(
        passed=passed,
        firmware=firmware,
        seconds=time.monotonic() - begun,
        reason=reason,
        last_lines=tuple(console.last_lines),
    )


def _watch(
    command: list[str], directory: Path, console: _Console, timeout_s: float, firmware: Firmware
) -> tuple[bool, str]:
    """Start the virtual machine and follow its console; return whether it came up, and the reason."""
    until_s = time.monotonic() + timeout_s
    with tools.started(command, environment=tools.host_environment({"TMPDIR": str(directory)})) as process:
        for data in kvm.read_console(process.stdout, until_s=until_s):
            console.feed(data)
            if console.outcome is not None:
                return console.outcome
        ended = time.monotonic() < until_s
        console.finish()
        if console.outcome is not None:
            return console.outcome
        if not ended:
            return False, f"did not come up in {timeout_s:g} s"
        code, said = kvm.exit_code(process), kvm.complaint(process.stderr)
    if code == 0:
        return False, "the guest reset or powered off"
    how = "closed its console" if code is None else f"ended with {tools.describe_status(code)}"
    what, hint = "image", "does 'qemu-img check' like the image, and is no other program using it?"
    if firmware is Firmware.NONE:
        what, hint = "kernel", "is it a kernel for this architecture?"
    raise ToolError(
        f"starting the {what}: qemu {how}{': ' + said if said else ''}", hint=f"{hint} VIRT_DIB_KVM=off rules out KVM"
    )


# ---- the console ----


class _Console:
    """Cuts what the guest prints into harmless lines, and looks for the one that decides."""

    def __init__(self, wanted: re.Pattern[str], on_line: Callable[[str], None] | None) -> None:
        self._wanted = wanted
        self._on_line = on_line
        self._sanitiser = Sanitiser()
        self._rest = ""
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self.outcome: tuple[bool, str] | None = None

    def feed(self, data: bytes) -> None:
        """Take a piece of output; once there is an outcome, the rest is of no interest."""
        text, begin = self._rest + self._sanitiser.feed(data), 0
        while self.outcome is None:
            end = text.find("\n", begin, begin + _LINE_CHARACTERS + 1)
            if end >= 0:
                line, begin = text[begin:end], end + 1
            elif len(text) - begin > _LINE_CHARACTERS:
                line, begin = text[begin : begin + _LINE_CHARACTERS], begin + _LINE_CHARACTERS
            else:
                break
            self._take(line)
        self._rest = text[begin:]
        # A prompt has no line end; of anything else, what is here may be the first half.
        if self.outcome is None and (self._wanted.search(self._rest) or _DEAD_PROMPTS.search(self._rest)):
            self.finish()

    def finish(self) -> None:
        """Take what is left as a line."""
        rest, self._rest = self._rest + self._sanitiser.finish(), ""
        self._take(rest[:_LINE_CHARACTERS])

    def _take(self, line: str) -> None:
        text = line.replace("\t", " ").rstrip()
        if not text:
            return
        self.last_lines.append(text)
        if self._on_line is not None:
            self._on_line(text)
        self.outcome = self._judge(text)

    def _judge(self, text: str) -> tuple[bool, str] | None:
        if self._wanted.search(text):
            return True, text.strip()
        if _DEAD_LINES.search(text) or _DEAD_PROMPTS.search(text):
            return False, f"the guest stopped at '{text.strip()}'"
        return None
