# SPDX-License-Identifier: Apache-2.0
"""The output formats: what each is called, and how it is written from the finished image disk."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from virt_dib import tools
from virt_dib.errors import UsageError

_MOST_COROUTINES = 16
"""What qemu-img takes for ``-m``."""


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


def write(output: DiskFormat, disk: Path, target: Path, *, compress: bool, options: str) -> None:
    """Convert the raw *disk* to *target*, which must not exist yet.

    *options* is the user's ``--qemu-img-options``; they are for formats that have any.

    Raises:
        ToolError: qemu-img failed.
    """
    qemu_img = tools.require("qemu-img", purpose=f"write {output.name}", package="qemu-utils")
    coroutines = min(_MOST_COROUTINES, max(1, 2 * (os.cpu_count() or 1)))
    command = [str(qemu_img), "convert", "-q", "-m", str(coroutines), "-f", "raw", "-O", output.qemu_name]
    if output.compresses and compress:
        command += ["-c"]
    if options and output.takes_options:
        command += ["-o", options]
    tools.run([*command, disk, target], doing=f"writing '{target.name}'")


def virtual_size_bytes(image: Path, output: DiskFormat) -> int:
    """The size of the disk that *image*, just written, holds."""
    qemu_img = tools.require("qemu-img", purpose="measure the image", package="qemu-utils")
    result = tools.run(
        [qemu_img, "info", "--output=json", "-f", output.qemu_name, image], doing=f"measuring '{image.name}'"
    )
    return int(json.loads(result.stdout)["virtual-size"])
