# SPDX-License-Identifier: Apache-2.0
"""The command ``virt-dib-boot-test``: does this image, or this kernel with its initramfs, come up?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence

from virt_dib import boot, kvm, tools
from virt_dib.boot import BootResult, Firmware
from virt_dib.cli import report_errors
from virt_dib.command_line import wanted_kvm
from virt_dib.errors import Problem, UsageError, VirtDibError
from virt_dib.interrupts import interrupts
from virt_dib.plain_text import printable, write_out
from virt_dib.supermin import cache_dir
from virt_dib.translation import translated
from virt_dib.usage import Parser, named_path

_PROG = "virt-dib-boot-test"
_DESCRIPTION = (
    "Start a disk image in a virtual machine, without changing the image and without a network, and wait for its "
    "login prompt on the serial console. Or start a kernel with its initramfs, and wait for what --expect says."
)
_EPILOG = "Exit status: 0 it came up, 1 it did not, 2 wrong usage, 130 interrupted."
_LONGEST_WAIT_S = 7 * 24 * 3600
_LEAST_MEMORY_MIB = 64
_MOST_MEMORY_MIB = 1 << 24


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return report_errors(_PROG, lambda: _test(argv))


def build_parser() -> Parser:
    """The options, for those who compare them with the manual too."""
    parser = Parser(_PROG, _DESCRIPTION, _EPILOG)
    parser.arguments.add_argument(
        "image", metavar="IMAGE", type=named_path, nargs="?", help=translated("a raw or qcow2 disk image")
    )
    options = parser.options
    options.add_argument(
        "--kernel", metavar="FILE", type=named_path, help=translated("instead of an image, a kernel, with --initrd")
    )
    options.add_argument("--initrd", metavar="FILE", type=named_path, help=translated("the initramfs for --kernel"))
    options.add_argument(
        "--append",
        dest="arguments",
        metavar="TEXT",
        default="",
        help=translated("what the kernel is told besides 'console=ttyS0'"),
    )
    firmware = options.add_mutually_exclusive_group()
    firmware.add_argument(
        "--uefi",
        dest="firmware",
        action="store_const",
        const=Firmware.UEFI,
        help=translated("start it by UEFI (OVMF)"),
    )
    firmware.add_argument(
        "--bios",
        dest="firmware",
        action="store_const",
        const=Firmware.BIOS,
        help=translated("start it by BIOS; without --uefi and --bios the partition table decides"),
    )
    options.add_argument(
        "--format",
        dest="image_format",
        metavar="FORMAT",
        help=translated("format of the image (default: by its content)"),
    )
    _add_waiting(options)
    options.add_argument("-v", "--verbose", action="store_true", help=translated("print the console as it comes"))
    return parser


def _add_waiting(options: argparse._ArgumentGroup) -> None:
    """What is waited for, how long, and in how large a machine."""
    options.add_argument(
        "--timeout",
        dest="timeout_s",
        metavar="SECONDS",
        default=f"{boot.DEFAULT_TIMEOUT_S:g}",
        help=translated(f"how long to wait (default: {boot.DEFAULT_TIMEOUT_S:g})"),
    )
    options.add_argument(
        "--expect",
        metavar="REGEX",
        help=translated(f"what to wait for on the console (default for an image: '{boot.DEFAULT_EXPECT}')"),
    )
    options.add_argument(
        "--memsize",
        dest="memory_mib",
        metavar="MB",
        default=str(boot.DEFAULT_MEMORY_MIB),
        help=translated(f"memory of the virtual machine (default: {boot.DEFAULT_MEMORY_MIB})"),
    )


def _check_what(parser: Parser, options: argparse.Namespace) -> None:
    """Either an image, or a kernel with its initramfs and what to wait for."""
    if options.kernel is None:
        if options.initrd is not None or options.arguments:
            parser.error("--initrd and --append are for --kernel")
        if options.image is None:
            parser.error("give an IMAGE, or --kernel and --initrd")
    elif options.image is not None or options.firmware is not None or options.image_format is not None:
        parser.error("with --kernel there is no IMAGE, and no --uefi, --bios and --format")
    elif options.initrd is None or options.expect is None:
        parser.error("--kernel needs --initrd, and --expect with what the initramfs prints")


def _check_format(text: str | None) -> None:
    if text is not None and text not in boot.FORMATS:
        raise UsageError(f"cannot use '{text}' as the value of --format", hint=f"choose from {', '.join(boot.FORMATS)}")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= _LONGEST_WAIT_S:
        raise UsageError(
            f"cannot use '{text}' as the value of --timeout",
            hint=f"give a number of seconds more than 0 and at most {_LONGEST_WAIT_S}",
        )
    return value


def _mebibytes(text: str) -> int:
    value = int(text) if text.isascii() and text.isdecimal() and len(text) <= len(str(_MOST_MEMORY_MIB)) else 0
    if not _LEAST_MEMORY_MIB <= value <= _MOST_MEMORY_MIB:
        raise UsageError(
            f"cannot use '{text}' as the value of --memsize",
            hint=f"give a whole number of MB from {_LEAST_MEMORY_MIB} to {_MOST_MEMORY_MIB}",
        )
    return value


def _check_files(options: argparse.Namespace) -> None:
    """Both those of a kernel, or the image, if its format is not what is wrong.

    Raises:
        UsageError: they are not there, or cannot be started; all that is wrong with them.
    """
    checks: list[Callable[[], object]] = []
    if options.kernel is not None:
        checks.append(lambda: boot.check_file(options.kernel, "kernel"))
    if options.initrd is not None:
        checks.append(lambda: boot.check_file(options.initrd, "initrd"))
    if options.image is not None and options.image_format in (None, *boot.FORMATS):
        checks.append(lambda: boot.probe_format(options.image, options.image_format))
    _together(checks)


def _together(checks: Iterable[Callable[[], object]]) -> None:
    problems: list[Problem] = []
    for check in checks:
        try:
            check()
        except VirtDibError as error:
            problems += error.problems
    if problems:
        raise UsageError.of(problems)


def _test(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    options = parser.parse_args(argv)
    tools.require_working_directory()
    _together(
        (
            lambda: _check_what(parser, options),
            lambda: _check_format(options.image_format),
            lambda: _seconds(options.timeout_s),
            lambda: _mebibytes(options.memory_mib),
            lambda: None if options.expect is None else boot.compiled(options.expect),
            lambda: _check_files(options),
        )
    )
    options.timeout_s, options.memory_mib = _seconds(options.timeout_s), _mebibytes(options.memory_mib)
    with interrupts():
        return _boot(options)


def _boot(options: argparse.Namespace) -> int:
    verdict = kvm.choose(wanted=wanted_kvm(), kernel=None, cache_dir=cache_dir())
    accelerate = verdict.acceleration is kvm.Acceleration.KVM
    if options.verbose and not accelerate:
        _print_line(translated(f"emulating the machine, about 15 times slower than with KVM: {verdict.reason}"))
    result = _start(options, accelerate=accelerate)
    firmware = translated("no boot loader") if result.firmware is Firmware.NONE else result.firmware.value
    how = f"{firmware}, {'KVM' if accelerate else translated('emulated')}"
    what = options.image or options.kernel
    if result.passed:
        _print_line(translated(f"{what.name}: booted to '{result.reason}' in {result.seconds:.1f} s ({how})"))
        return 0
    if not options.verbose:
        _show_end(result)
    raise VirtDibError(
        f"booting '{what}' ({how}): {result.reason}",
        hint=_hint(result, timed_out=result.seconds >= options.timeout_s),
    )


def _start(options: argparse.Namespace, *, accelerate: bool) -> BootResult:
    on_line = _print_line if options.verbose else None
    if options.kernel is not None:
        return boot.boot_kernel(
            options.kernel,
            options.initrd,
            arguments=options.arguments,
            expect=options.expect,
            timeout_s=options.timeout_s,
            memory_mib=options.memory_mib,
            accelerate=accelerate,
            on_line=on_line,
        )
    return boot.boot_test(
        options.image,
        firmware=options.firmware,
        image_format=options.image_format,
        expect=boot.DEFAULT_EXPECT if options.expect is None else options.expect,
        timeout_s=options.timeout_s,
        memory_mib=options.memory_mib,
        accelerate=accelerate,
        on_line=on_line,
    )


def _hint(result: BootResult, *, timed_out: bool) -> str:
    if not result.last_lines:
        return "nothing came from its serial console: is its kernel told console=ttyS0?"
    if timed_out:
        return "give it longer with --timeout, or look for another text with --expect"
    if result.firmware is Firmware.NONE:
        return "see the last lines of its console above; does it have the memory it needs (--memsize)?"
    other = Firmware.BIOS if result.firmware is Firmware.UEFI else Firmware.UEFI
    advice = f"if it is made for {other.value}, use --{other.name.lower()}"
    return f"see the last lines of its console above; {advice}"


def _show_end(result: BootResult) -> None:
    if result.last_lines:
        lines = [translated("the last lines of its console:"), *(f"  {printable(line)}" for line in result.last_lines)]
        write_out(sys.stderr, "\n".join(lines) + "\n")


def _print_line(line: str) -> None:
    write_out(sys.stdout, printable(line) + "\n")
