# SPDX-License-Identifier: Apache-2.0
"""The output formats: what each is called, and how it is written from the finished image disk."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from virt_dib import tools
from virt_dib.errors import ToolError, UsageError

_MOST_COROUTINES = 16
"""What qemu-img takes for ``-m``."""
_FILE_OF_ITS_OWN = re.compile(r"(?:^|,)data_file=")


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskFormat:
    """A format that qemu-img makes of the raw image disk."""

    name: str
    qemu_name: str
    compresses: bool = False
    takes_options: bool = True

    @property
    def suffix(self) -> str:
        """What follows the image's name and a dot."""
        return self.name


_FORMATS = {
    "qcow2": DiskFormat(name="qcow2", qemu_name="qcow2", compresses=True),
    "raw": DiskFormat(name="raw", qemu_name="raw", takes_options=False),
}

KNOWN: tuple[str, ...] = tuple(sorted(_FORMATS))
"""The names ``--formats`` takes."""


def select(names: Sequence[str]) -> tuple[DiskFormat, ...]:
    """The formats called *names*, each once, in the order given.

    Raises:
        UsageError: an unknown name.
    """
    for name in names:
        if name not in _FORMATS:
            close = difflib.get_close_matches(name, KNOWN, 1)
            raise UsageError(
                f"unknown format '{name}'",
                hint=(f"did you mean '{close[0]}'? " if close else "") + f"choose from {', '.join(KNOWN)}",
            )
    return tuple(_FORMATS[name] for name in dict.fromkeys(names))


def check_options(outputs: Sequence[DiskFormat], options: str, scratch: Path) -> None:
    """Have qemu-img make an empty image with *options* at *scratch*, which must not exist, and remove it.

    Nothing is tried where there is no qemu-img, which a build does not start without, or where the options
    name a data file: the trial would overwrite it.

    Raises:
        UsageError: qemu-img does not take the options for one of *outputs*.
        ToolError: there is no space for the trial.
    """
    qemu_img = tools.find("qemu-img")
    if not options or qemu_img is None or _FILE_OF_ITS_OWN.search(options):
        return
    for output in outputs:
        if not output.takes_options:
            continue
        result = tools.run(
            [qemu_img, "create", "-q", "-f", output.qemu_name, "-o", options, scratch, "1M"],
            doing="trying --qemu-img-options",
            check=False,
        )
        # Asked for help, it succeeds and makes nothing.
        made = scratch.exists()
        scratch.unlink(missing_ok=True)
        if result.exit_status != 0 or not made:
            if _is_full(result.stderr):
                raise ToolError(
                    f"trying --qemu-img-options in '{scratch.parent}': no space left",
                    hint="set TMPDIR to a directory with more room, or make some there",
                )
            said = result.stderr.strip().splitlines() or ["it makes no image with them"]
            reason = said[0].removeprefix("qemu-img: ").removeprefix(f"{scratch}: ")
            raise UsageError(
                f"cannot use '{options}' as --qemu-img-options for {output.name}: {reason}",
                hint=f"what there is: qemu-img create -f {output.qemu_name} -o help",
            )


def write(disk: Path, targets: Mapping[str, tuple[Path, DiskFormat]], *, compress: bool, options: str) -> None:
    """Convert the raw *disk* to all *targets*, which must not exist yet, at the same time.

    The keys of *targets* are what messages call them. *options* is the user's ``--qemu-img-options``; they are for
    formats that have any.

    Raises:
        ToolError: qemu-img failed.
    """
    qemu_img = tools.require("qemu-img", purpose="write images", package="qemu-utils")
    coroutines = min(_MOST_COROUTINES, max(1, 2 * (os.cpu_count() or 1)))
    commands: dict[str, list[str | Path]] = {}
    for name, (target, output) in targets.items():
        command = [str(qemu_img), "convert", "-q", "-m", str(coroutines), "-f", "raw", "-O", output.qemu_name]
        if output.compresses and compress:
            # Compressed clusters in any order: the coroutines do not wait for each other.
            command += ["-c", "-W"]
        if options and output.takes_options:
            command += ["-o", options]
        commands[f"writing '{name}'"] = [*command, disk, target]
    try:
        tools.run_together(commands)
    except ToolError as error:
        hint = "make room in the output directory, or build into another one: --name DIRECTORY/NAME"
        raise ToolError(str(error), hint=hint if _is_full(str(error)) else None) from error


def _is_full(said: str) -> bool:
    return "No space left" in said or "Disk quota exceeded" in said


def virtual_size_bytes(image: Path, output: DiskFormat) -> int:
    """The size of the disk that *image*, just written, holds."""
    qemu_img = tools.require("qemu-img", purpose="measure the image", package="qemu-utils")
    result = tools.run(
        [qemu_img, "info", "--output=json", "-f", output.qemu_name, image], doing=f"measuring '{image.name}'"
    )
    return int(json.loads(result.stdout)["virtual-size"])
