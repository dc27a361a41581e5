# SPDX-License-Identifier: Apache-2.0
"""What virt-dib says, in the words of its drop-ins.

Wherever a message comes from, it names options of virt-dib, by their long names. Who has typed another command has
other words for most of them: an option of that command, a variable, a key in a file of images. They are put in where
the message is shown, after its translation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from virt_dib.command_line import EXAMPLE
from virt_dib.configuration import FILE_VARIABLE, SETTINGS
from virt_dib.dib_command import OPTIONS, RAMDISK_PROG, TRACING
from virt_dib.image_file import KEYS
from virt_dib.options import BY_NAME, OFFERS, PROG, Offer, Takes

_VARIABLES = {"element_paths": "ELEMENTS_PATH", "fs_type": "FS_TYPE", "breaks": "break"}
"""diskimage-builder's own variables for what is no option of its commands, by destination."""
_OPTIONS_FOR = {"size": "DIB_IMAGE_SIZE", "debug": TRACING}
"""Destinations of diskimage-builder's options that do the same, where they are others than virt-dib's."""
_AUTOMATIC_SIZE = ("--size", "auto", "DIB_IMAGE_EXTRA_SIZE")
"""What there is instead of this value: more room than an automatic size has."""
_ONLY_THERE = {name: option for option in OPTIONS for name in option.names if name not in BY_NAME}
"""diskimage-builder's options that virt-dib has not, which messages of its drop-ins name."""
_SETTINGS = {setting.dest: setting.variable for setting in SETTINGS}
_TEMP_DIRS = ("LIBGUESTFS_TMPDIR", "TMPDIR")
"""The variables for where the disks of a build are."""
_QUOTED = r"(?<![A-Za-z])'[^']*'"
_VARIABLE = r"--envvar (?P<variable>[A-Za-z_]\w*)(?:=(?P<text>\S+?(?=[;,:]?(?:\s|$))))?"
_PLACEHOLDER = r"[A-Z]{2,}(?:/[A-Z]{2,})?"


@dataclass(frozen=True, slots=True)
class _Word:
    """How something is said, and what stands between it and its value."""

    name: str
    joint: str

    def with_value(self, value: str) -> str:
        return f"{self.name}{self.joint}{value}"


class Words:
    """Gives texts the words of one command; quotes stay as they are, for they are what the user has written."""

    def __init__(
        self, said: Mapping[str, _Word], variables: Mapping[str, _Word], example: str, *, temp_dir: str | None = None
    ) -> None:
        self._said = said
        self._variables = variables
        self._example = example
        self._temp_dir = temp_dir
        more = [] if temp_dir is None else [rf"\b(?:{'|'.join(_TEMP_DIRS)})\b"]
        self._pattern = re.compile("|".join([_QUOTED, _VARIABLE, *more, *_patterns(said)]), re.ASCII)

    def with_temp_dir(self, variable: str) -> Words:
        """The same where *variable* says where the disks of a build are, and others do not count."""
        return Words(self._said, self._variables, self._example, temp_dir=variable)

    def __call__(self, text: str) -> str:
        """*text* as the users of the command know it."""
        return self._pattern.sub(self._in_place_of, text.replace(EXAMPLE, self._example))

    def _in_place_of(self, found: re.Match[str]) -> str:
        if found["variable"]:
            name, value = found["variable"], found["text"]
            return name if value is None else self._variables.get(name, _Word(name, "=")).with_value(value)
        if found[0] in _TEMP_DIRS and self._temp_dir is not None:
            return self._temp_dir
        option, _, value = found[0].partition(" ")
        if not option.startswith("--"):
            return found[0]
        if (option, value) == _AUTOMATIC_SIZE[:2]:
            return self._variables[_AUTOMATIC_SIZE[2]].name
        # An option that the command has no word for is one of virt-dib all the same.
        word = self._said.get(option) or _Word(f"{PROG} {option}", " ")
        return word.with_value(value) if value else word.name


def _patterns(said: Mapping[str, _Word]) -> Iterator[str]:
    for name, option in {**_ONLY_THERE, **BY_NAME}.items():
        offer = OFFERS.get(option.dest, ())
        values = [*(() if isinstance(offer, Offer) else offer), _PLACEHOLDER, r"\w+:\w+"]
        value = rf"(?: (?:{'|'.join(values)})(?![\w-]))?" if option.wants_value else ""
        if name.startswith("--"):
            own = "" if name in said else rf"(?<!{PROG} )"
            yield rf"(?<![\w/-]){own}{name}(?![\w-]){value}"


def of_command(prog: str) -> Words:
    """The words of ``virt-disk-image-create`` or ``virt-ramdisk-image-create``."""
    own = {option.dest: _Word(max(option.names, key=len), " ") for option in OPTIONS}
    more = "" if prog == RAMDISK_PROG else " vm"
    return _words(own, ramdisk=RAMDISK_PROG, example=f"{prog} {own['name'].with_value('debian')} debian-minimal{more}")


def of_image_files() -> Words:
    """The words of files of images: their keys."""
    keys = {key.option: key.name for key in KEYS if key.option is not None}
    own = {option.dest: _Word(keys[option.names[0]], ": ") for option in OPTIONS if option.names[0] in keys}
    own["config"] = _Word(FILE_VARIABLE, "=")
    return _words(own, ramdisk="ramdisk", example="elements: [debian-minimal, vm]")


def _words(own: Mapping[str, _Word], *, ramdisk: str, example: str) -> Words:
    """*own* are the words for what an option of diskimage-builder sets, by its destination."""
    said = {name: own[option.dest] for name, option in _ONLY_THERE.items() if option.dest in own}
    for name, option in BY_NAME.items():
        dest = _OPTIONS_FOR.get(option.dest, option.dest)
        if dest in own:
            said[name] = own[dest]
        elif dest in _VARIABLES:
            said[name] = _Word(_VARIABLES[dest], "=")
        elif dest in _SETTINGS:
            value = {Takes.ON: "=on", Takes.OFF: "=off"}.get(option.takes, "")
            said[name] = _Word(_SETTINGS[dest] + value, "=")
    said["--ramdisk"] = _Word(ramdisk, " ")
    return Words(said, {dest: word for dest, word in own.items() if dest.isupper()}, example)
