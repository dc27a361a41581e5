# SPDX-License-Identifier: Apache-2.0
"""The commands ``virt-disk-image-create`` and ``virt-ramdisk-image-create``, drop-ins for diskimage-builder's."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from virt_dib import api, dib, dib_command
from virt_dib.cli import report_errors
from virt_dib.dib_command import DibCommand
from virt_dib.errors import ScriptError, ToolError, VirtDibError
from virt_dib.interrupts import interrupts
from virt_dib.monitor import Display, write_out

_AS_RAMDISK = "--virt-dib-as=ramdisk-image-create"
"""The first argument of those who start this module as a program, instead of a name."""


def disk_image_create(argv: Sequence[str] | None = None) -> int:
    """Run ``virt-disk-image-create`` with the arguments *argv* (those of the process) and return its exit status."""
    return _main("virt-disk-image-create", sys.argv[1:] if argv is None else argv, ramdisk=False)


def ramdisk_image_create(argv: Sequence[str] | None = None) -> int:
    """As :func:`disk_image_create`, for ``virt-ramdisk-image-create``."""
    return _main("virt-ramdisk-image-create", sys.argv[1:] if argv is None else argv, ramdisk=True)


def _main(prog: str, arguments: Sequence[str], *, ramdisk: bool) -> int:
    command = dib_command.parse(arguments, os.environ, prog=prog, ramdisk=ramdisk)
    return report_errors(prog, lambda: _run(command, prog, ramdisk=ramdisk))


def _run(command: DibCommand, prog: str, *, ramdisk: bool) -> int:
    if command.help:
        write_out(sys.stdout, dib_command.help_text(prog, ramdisk=ramdisk))
        return 0
    try:
        if command.version:
            write_out(sys.stdout, f"{dib.find_installation(None, command.spec.python).version}\n")
            return 0
        with interrupts(), Display(sys.stdout) as listener:
            _make_cache(command)
            api.build_image(
                command.spec,
                problems=command.problems,
                options=api.RunOptions(
                    isolation=command.options.isolation,
                    kvm=command.options.kvm,
                    temporary_dir=command.temporary_dir,
                ),
                listener=listener,
            )
    except VirtDibError as error:
        # diskimage-builder has no other status for what is not a script's.
        error.exit_status = error.script_status if isinstance(error, ScriptError) else 1
        raise
    return 0


def _make_cache(command: DibCommand) -> None:
    """disk-image-create makes the directory of its cache."""
    cache = command.spec.image_cache
    if cache is None or command.problems:
        return
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ToolError(
            f"making the image cache '{cache}': {error.strerror}", hint="give another directory with --image-cache"
        ) from error


if __name__ == "__main__":
    if sys.argv[1:2] == [_AS_RAMDISK]:
        sys.exit(ramdisk_image_create(sys.argv[2:]))
    sys.exit(disk_image_create())
