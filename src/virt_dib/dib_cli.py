# SPDX-License-Identifier: Apache-2.0
"""The commands ``virt-disk-image-create`` and ``virt-ramdisk-image-create``, drop-ins for diskimage-builder's."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from virt_dib import api, batch, dib, dib_command, dib_words, elements, events, image_cache, tools
from virt_dib.cli import report_errors
from virt_dib.dib import DibInstallation
from virt_dib.dib_command import DISK_PROG, RAMDISK_PROG, TEMP_DIR, DibCommand
from virt_dib.dib_output import DibOutput
from virt_dib.dib_words import Words
from virt_dib.errors import Interrupted, Problem, ScriptError, UsageError, VirtDibError
from virt_dib.interrupts import interrupts
from virt_dib.plain_text import answer
from virt_dib.releases import Rules
from virt_dib.spec import BuildSpec


def disk_image_create(argv: Sequence[str] | None = None) -> int:
    """Run ``virt-disk-image-create`` with the arguments *argv* (those of the process) and return its exit status."""
    return _main(DISK_PROG, sys.argv[1:] if argv is None else argv)


def ramdisk_image_create(argv: Sequence[str] | None = None) -> int:
    """As :func:`disk_image_create`, for ``virt-ramdisk-image-create``."""
    return _main(RAMDISK_PROG, sys.argv[1:] if argv is None else argv)


def _for_batch(arguments: Sequence[str]) -> int:
    """As the functions above, started as a program; the first words of *arguments* are those of ``batch``."""
    of_files = batch.OF_FILES in arguments[:1]
    rest = arguments[of_files:]
    ramdisk = batch.AS_RAMDISK in rest[:1]
    words = dib_words.of_image_files() if of_files else None
    return _main(RAMDISK_PROG if ramdisk else DISK_PROG, rest[ramdisk:], words)


def _main(prog: str, arguments: Sequence[str], words: Words | None = None) -> int:
    words = words or dib_words.of_command(prog)
    if os.environ.get(TEMP_DIR):
        words = words.with_temp_dir(TEMP_DIR)

    def run() -> int:
        command = dib_command.parse(arguments, os.environ, prog=prog, ramdisk=prog == RAMDISK_PROG)
        return _run(command, prog, words)

    return report_errors(prog, run, words=words)


def _run(command: DibCommand, prog: str, words: Words) -> int:
    if command.help:
        answer(dib_command.build_parser(prog).format_help())
        return 0
    try:
        tools.require_working_directory()
        installation = dib.find_installation(command.spec.dib_library, command.spec.python)
        if command.version:
            answer(f"{installation.version}\n")
            return 0
        if command.problems or not command.spec.elements:
            # All that is wrong, without a word of a build that will not be.
            api.plan_image(command.spec, problems=command.problems)
            raise AssertionError
        return _build(command, installation, words)
    except VirtDibError as error:
        # diskimage-builder has no other status for what is not a script's.
        error.exit_status = _status(error)
        raise


def _build(command: DibCommand, installation: DibInstallation, words: Words) -> int:
    output = command.output
    display = DibOutput(
        stream=sys.stdout,
        timestamps=output.timestamps,
        quiet=output.quiet,
        log_path=output.log_path,
        version=installation.version,
        words=words,
        elements=_asked_for(command.spec, installation.rules),
        image_name=command.spec.told_name,
    )
    with interrupts(), display:
        for text in command.messages:
            display(events.Message(text=text))
        try:
            api.build_image(
                command.spec,
                problems=_make_cache(command.spec),
                options=api.RunOptions(
                    isolation=command.options.isolation,
                    kvm=command.options.kvm,
                    temporary_dir=command.temporary_dir,
                    timeout_s=command.options.timeout_s,
                    script_timeout_s=command.options.script_timeout_s,
                    breaks=command.breaks,
                ),
                listener=display,
            )
        except (VirtDibError, Interrupted) as error:
            if output.quiet:
                raise
            # It has been told.
            return _status(error)
    return 0


def _status(error: VirtDibError | Interrupted) -> int:
    if isinstance(error, Interrupted):
        return error.exit_status
    return error.script_status if isinstance(error, ScriptError) else 1


def _asked_for(spec: BuildSpec, rules: Rules) -> tuple[str, ...]:
    return tuple(
        elements.requested(
            spec.elements, arch=spec.arch, skip_base=spec.skip_base, ramdisk_element=spec.added_element, rules=rules
        )
    )


def _make_cache(spec: BuildSpec) -> list[Problem]:
    """Make the directory of the cache, as disk-image-create does; return why it cannot be."""
    cache = spec.image_cache
    if cache is None:
        return []
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        try:
            image_cache.check(cache, home=None)
        except UsageError:
            # The plan of the build tells.
            return []
        return [
            Problem(f"making the image cache '{cache}': {error.strerror}", "give another directory with --image-cache")
        ]
    return []


if __name__ == "__main__":
    sys.exit(_for_batch(sys.argv[1:]))
