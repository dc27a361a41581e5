# SPDX-License-Identifier: Apache-2.0
"""The options of ``virt-dib``: one table, which the help, the completion and the reading of words share.

argparse stops at the first mistake, so it only writes the help; the words of a command line are sorted here.
"""

from __future__ import annotations

import argparse
import difflib
import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from virt_dib import break_points, formats
from virt_dib.drive import FORMATS as DRIVE_FORMATS
from virt_dib.errors import Problem
from virt_dib.spec import COMPRESSIONS, INSTALL_TYPES, LABEL_LIMITS, ExtraData, Isolation, Kvm
from virt_dib.translation import translated
from virt_dib.usage import HelpFormatter

PROG = "virt-dib"
ON_ERROR = ("shell", "fail")
_USAGE = "virt-dib [options] ELEMENT..."
_DESCRIPTION = (
    "Build disk images from diskimage-builder elements. What the elements do happens in a small virtual machine or, if "
    "you say so, in a sandbox: no root, no loop devices, no traces here."
)
_EPILOG = (
    "example:\n"
    "  virt-dib --name debian --envvar DIB_RELEASE=trixie debian-minimal vm\n"
    "      writes debian.qcow2 and debian.log into the current directory\n"
    "\n"
    "Options may stand before and after the elements, and be shortened while they stay unique. 'virt-dib-doctor' tells "
    "what is missing on this host."
)


class Takes(enum.Enum):
    """What follows an option, and what becomes of it."""

    NOTHING = "sets its destination to True"
    ON = "sets its destination to 'on', which may be written for it in a configuration file, too"
    OFF = "as ON, to 'off'"
    VALUE = "the last one counts"
    VALUE_OR_NOTHING = "as VALUE, but it is written with '=' or not at all"
    VALUES = "all are kept"


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its spellings, where its value goes, and what the help says."""

    names: tuple[str, ...]
    dest: str
    takes: Takes
    metavar: str | None
    help: str
    implied: str = ""
    """The value of one that may be written without."""

    @property
    def wants_value(self) -> bool:
        """Whether a word after it is its value."""
        return self.takes in (Takes.VALUE, Takes.VALUES)


def flag(names: str, dest: str, text: str) -> Option:
    """An option without a value; its *names* are separated by blanks."""
    return Option(tuple(names.split()), dest, Takes.NOTHING, None, text)


def valued(names: str, dest: str, metavar: str, text: str) -> Option:
    """As :func:`flag`, with a value."""
    return Option(tuple(names.split()), dest, Takes.VALUE, metavar, text)


def _values(names: str, dest: str, metavar: str, text: str) -> Option:
    return Option(tuple(names.split()), dest, Takes.VALUES, metavar, text + "; may be given several times")


def _switch(name: str, dest: str, on: str, off: str) -> Sequence[Option]:
    return (
        Option((f"--{name}",), dest, Takes.ON, None, on),
        Option((f"--no-{name}",), dest, Takes.OFF, None, off),
    )


GROUPS: Mapping[str, Sequence[Option]] = {
    "what to build": (
        valued(
            "--name", "name", "[DIR/]NAME", "name of the image, and of the files made for it (default: image)"
        ),
        valued(
            "--formats", "formats", "LIST", f"output formats, of: {', '.join(formats.KNOWN)} (default: qcow2)"
        ),
        flag("--ramdisk", "ramdisk", "make a ramdisk and its kernel, in NAME.d, and no image"),
        valued(
            "--ramdisk-element", "ramdisk_element", "ELEMENT",
            "the element that --ramdisk adds, such as dracut-ramdisk (default: ramdisk)",
        ),
        valued(
            "--arch", "arch", "ARCH", "architecture the elements are told, ARCH (default: that of this host)"
        ),
        flag("--checksum", "checksum", "write NAME.EXT.md5 and NAME.EXT.sha256 for each output file"),
        valued(
            "--docker-target", "docker_target", "TARGET",
            "repository and tag for the formats docker, which needs it, and oci",
        ),
        valued("--install-type", "install_type", "TYPE", "install from 'source' (default), 'package' or 'repo'"),
        _values("--extra-packages", "extra_packages", "LIST", "packages to install besides, separated by commas"),
    ),
    "elements": (
        valued(
            "-B --dib-library", "dib_library", "DIR",
            "lib directory of diskimage-builder (default: of the installed one)",
        ),
        _values("-p --element-path", "element_paths", "DIR", "search DIR for elements before diskimage-builder's"),
        valued(
            "--python", "python", "PYTHON",
            "Python that runs diskimage-builder's own modules, a name on the PATH or a path, such as that of a virtual "
            "environment (default: the one that virt-dib runs with)",
        ),
        flag("--skip-base", "skip_base", "do not add the element 'base'"),
        _values("--exclude-element", "excluded_elements", "ELEMENT", "leave ELEMENT out"),
        _values("--exclude-script", "excluded_scripts", "SCRIPT", "leave out scripts of this name"),
        _values(
            "--envvar", "envvars", "NAME[=VALUE]",
            "set a variable for the elements; without =VALUE take it from the environment, if it is there",
        ),
        valued("--debug", "debug", "LEVEL", "make scripts trace what they do, DIB_DEBUG_TRACE (default: 0)"),
    ),
    "the disk": (
        valued("--size", "size", "SIZE", "size of the disk: 5G, 512M, 10737418240b, or auto (default: 5G)"),
        valued("--fs-type", "fs_type", "TYPE", f"root file system: {', '.join(LABEL_LIMITS)} (default: ext4)"),
        valued(
            "--root-label", "root_label", "LABEL",
            "label of the root file system (default: cloudimg-rootfs, on xfs and vfat img-rootfs)",
        ),
        valued("--mkfs-options", "mkfs_options", "OPTIONS", "options for mkfs of the root file system, one word"),
        valued(
            "--qemu-img-options", "qemu_img_options", "LIST",
            "options for qemu-img convert -o; each goes to the formats that have it",
        ),
        flag("-u", "uncompressed", "do not compress qcow2 images"),
        valued(
            "--compression", "compression", "METHOD",
            f"compress qcow2 images with {' or '.join(COMPRESSIONS)}, which is faster and needs qemu 5.1 to be read "
            f"(default: {COMPRESSIONS[0]})",
        ),
        flag("--no-delete-on-failure", "keep_on_failure", "keep incomplete output files when the build fails"),
    ),
    "where scripts run": (
        valued(
            "--isolation", "isolation", "WHERE",
            "run the scripts that fill the tree in the virtual machine, 'vm' (default), or faster where there is no "
            "KVM, but on this host's kernel, in a 'sandbox'; 'auto': in the sandbox where KVM does not work",
        ),
        valued(
            "--extra-data", "extra_data", "WHERE",
            "run the scripts of extra-data.d with the others, in the 'guest' (default), or on this 'host', where "
            "they can read what you can: keys, credentials, local repositories",
        ),
        valued("-m --memsize", "memory", "MB", "the machine's memory (default: enough to install packages)"),
        valued("--smp", "cpus", "N", "the machine's processors (default: those of this host, at most 8)"),
        valued(
            "--timeout", "timeout", "TIME", "end the build when it takes longer than 90s, 30m, 2h (default: never)"
        ),
        valued(
            "--script-timeout", "script_timeout", "TIME", "end it when one script takes longer (default: never)"
        ),
        *_switch(
            "network", "network",
            "scripts may use the network (default)", "scripts have no network, and DIB_OFFLINE is 1",
        ),
        *_switch(
            "host-certificates", "host_certificates",
            "scripts in the image trust the CA certificates of this host, too (default)",
            "scripts in the image trust only its own CA certificates, not those of this host besides",
        ),
        valued("--kvm", "kvm", "WHEN", "use KVM: 'auto' when it works (default), 'on', or 'off' to emulate"),
    ),
    "shells in a build": (
        _values(
            "--break", "breaks", "POINT[,POINT...]",
            "open a shell at these points: before-PHASE and after-PHASE, where PHASE is install and the like, and "
            "after-error; leave it to go on",
        ),
        valued(
            "--on-error", "on_error", "WHAT",
            "when a script fails, open a 'shell' where it ran, or just 'fail' (default)",
        ),
    ),
    "caches": (
        valued(
            "--drive", "drive", "DISK",
            "have the home of the elements, where they cache, on this disk image; needs --isolation vm",
        ),
        valued(
            "--drive-format", "drive_format", "FORMAT",
            f"format of the drive: {', '.join(DRIVE_FORMATS)} (default: what it looks like)",
        ),
        valued(
            "--image-cache", "image_cache", "DIR",
            "give the elements a copy of the cache in DIR, and keep there what they cache (default: nothing is kept)",
        ),
    ),
    "configuration": (
        valued(
            "--config", "config", "FILE",
            "take settings from FILE, not from virt-dib/config.toml in ~/.config and /etc/xdg",
        ),
    ),
    "messages": (
        Option(
            ("--machine-readable",), "machine_readable", Takes.VALUE_OR_NOTHING, "FORMAT",
            "tell what happens as lines of JSON, on standard output or where =FORMAT says: file:NAME, "
            "stream:stdout, stream:stderr, fd:NUMBER; without elements, print what this virt-dib can do",
            implied="stream:stdout",
        ),
        flag("-q --quiet", "quiet", "print only warnings and errors"),
        flag("-v --verbose", "verbose", "print the time of each script and libguestfs's debugging messages"),
        flag("-x", "trace", "trace libguestfs calls"),
        flag(
            "--color --colors --colour --colours", "colour", "colour messages, also where the output is no terminal"
        ),
        flag("--wrap", "wrap", "wrap messages, also where the output is no terminal"),
    ),
    "instead of a build": (
        flag("-V --version", "version", "print the version"),
        flag("-h --help", "help", "print this"),
        flag("--list-elements", "list_elements", "print the names of all elements that are found, with -p and -B"),
        flag(
            "--show-config", "show_config",
            "print what configuration files and VIRT_DIB_* variables can set, its value, and where that is from",
        ),
        flag("--short-options", "short_options", "print the names of all short options, for completion"),
        flag("--long-options", "long_options", "print the names of all long options, for completion"),
    ),
}  # fmt: skip
BY_NAME: Mapping[str, Option] = {
    name: option for options in GROUPS.values() for option in options for name in option.names
}


class Offer(enum.Enum):
    """What completion offers as the value of an option where it is not one of a few words."""

    FILE = "files"
    DIRECTORY = "directories"
    ELEMENT = "the names of elements, as --list-elements prints them"
    VARIABLE = "the names of the shell's variables"


OFFERS: Mapping[str, Offer | Sequence[str]] = {
    "name": Offer.FILE,
    "formats": tuple(formats.KNOWN),
    "arch": ("amd64", "arm64", "armhf", "i386", "ppc64el", "s390x"),
    "install_type": INSTALL_TYPES,
    "dib_library": Offer.DIRECTORY,
    "element_paths": Offer.DIRECTORY,
    "python": Offer.FILE,
    "excluded_elements": Offer.ELEMENT,
    "ramdisk_element": Offer.ELEMENT,
    "envvars": Offer.VARIABLE,
    "image_cache": Offer.DIRECTORY,
    "debug": ("0", "1", "2"),
    "size": ("auto", "5G", "10G"),
    "fs_type": tuple(LABEL_LIMITS),
    "compression": COMPRESSIONS,
    "drive": Offer.FILE,
    "drive_format": DRIVE_FORMATS,
    "isolation": tuple(one.value for one in Isolation),
    "extra_data": tuple(one.value for one in ExtraData),
    "kvm": tuple(one.value for one in Kvm),
    "config": Offer.FILE,
    "breaks": break_points.POINTS,
    "on_error": ON_ERROR,
}
"""What completion offers as values, by destination; nothing for one that is not here."""
LISTS = frozenset({"formats", "breaks"})
"""Destinations whose value is several of the words, separated by commas."""


@dataclass(slots=True)
class Given:
    """The values as written; None and empty lists where an option was not given."""

    elements: list[str] = field(default_factory=list)
    name: str | None = None
    formats: str | None = None
    ramdisk: bool = False
    ramdisk_element: str | None = None
    arch: str | None = None
    install_type: str | None = None
    extra_packages: list[str] = field(default_factory=list)
    dib_library: str | None = None
    element_paths: list[str] = field(default_factory=list)
    python: str | None = None
    skip_base: bool = False
    excluded_elements: list[str] = field(default_factory=list)
    excluded_scripts: list[str] = field(default_factory=list)
    envvars: list[str] = field(default_factory=list)
    debug: str | None = None
    size: str | None = None
    fs_type: str | None = None
    root_label: str | None = None
    mkfs_options: str | None = None
    qemu_img_options: str | None = None
    docker_target: str | None = None
    checksum: bool = False
    compression: str | None = None
    uncompressed: bool = False
    keep_on_failure: bool = False
    memory: str | None = None
    cpus: str | None = None
    timeout: str | None = None
    script_timeout: str | None = None
    network: str | None = None
    host_certificates: str | None = None
    drive: str | None = None
    drive_format: str | None = None
    image_cache: str | None = None
    kvm: str | None = None
    isolation: str | None = None
    machine_readable: str | None = None
    extra_data: str | None = None
    config: str | None = None
    breaks: list[str] = field(default_factory=list)
    on_error: str | None = None
    quiet: bool = False
    verbose: bool = False
    trace: bool = False
    colour: bool = False
    wrap: bool = False
    version: bool = False
    help: bool = False
    list_elements: bool = False
    show_config: bool = False
    short_options: bool = False
    long_options: bool = False

    def take(self, option: Option, value: str) -> None:
        """Keep one option of the command line."""
        if option.takes is Takes.VALUES:
            getattr(self, option.dest).append(value)
        elif option.takes in (Takes.VALUE, Takes.VALUE_OR_NOTHING):
            setattr(self, option.dest, value)
        elif option.takes in (Takes.ON, Takes.OFF):
            setattr(self, option.dest, "on" if option.takes is Takes.ON else "off")
        else:
            setattr(self, option.dest, True)


def build_parser() -> argparse.ArgumentParser:
    """Names, help and groups of the options, for the help and for those who compare it with the manual.

    Command lines are read by :func:`parse`.
    """
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=translated(_USAGE),
        description=translated(_DESCRIPTION),
        epilog=translated(_EPILOG),
        add_help=False,
        formatter_class=HelpFormatter,
    )
    for title, options in GROUPS.items():
        group = parser.add_argument_group(translated(title))
        if title == "elements":
            group.add_argument("elements", nargs="*", metavar="ELEMENT", help=translated("such as debian-minimal, vm"))
        for option in options:
            if option.metavar is not None:
                nargs = "?" if option.takes is Takes.VALUE_OR_NOTHING else None
                group.add_argument(*option.names, nargs=nargs, metavar=option.metavar, help=translated(option.help))
            else:
                group.add_argument(*option.names, action="store_true", help=translated(option.help))
    return parser


def listed_names(*, short: bool, long: bool) -> list[str]:
    """The names that ``--short-options`` and ``--long-options`` print: all but these two, as libguestfs's tools do."""
    names = BY_NAME.keys() - {"--short-options", "--long-options"}
    wanted = (name for name in names if (long if name.startswith("--") else short))
    return sorted(wanted, key=lambda name: (name.lower(), name))


# ---- the words of the command line ----


_OF_DISK_IMAGE_CREATE = {
    "-o": "--name",
    "-t": "--formats",
    "-a": "--arch",
    "-n": "--skip-base",
    "--image-size": "--size",
}
"""Its options that have other names here, where those of these names are none."""


class Taker(Protocol):
    """Keeps what was written."""

    elements: list[str]

    def take(self, option: Option, value: str) -> None:
        """Keep one option of the command line."""


def sort_words(arguments: Iterable[str]) -> tuple[Given, Sequence[Problem]]:
    """The values as written, and what is wrong with the words themselves."""
    given = Given()
    return given, sort_into(given, arguments, BY_NAME, one_dash=True)


def sort_into(
    taker: Taker, arguments: Iterable[str], by_name: Mapping[str, Option], *, prog: str = PROG, one_dash: bool = False
) -> Sequence[Problem]:
    """Give *taker* what the words say, and return what is wrong with the words themselves.

    *one_dash*: a long option may be written with one.
    """
    words = _Words(taker, arguments, by_name, prog=prog, one_dash=one_dash)
    words.sort()
    return words.problems


class _Words:
    """Sorts the words of a command line into options and elements.

    As getopt_long_only does, which virt-dib has always used, or getopt_long: options anywhere before ``--``, long
    ones shortened, short ones joined, and the word after an option that wants a value is the value, whatever it
    looks like.
    """

    def __init__(
        self, taker: Taker, arguments: Iterable[str], by_name: Mapping[str, Option], *, prog: str, one_dash: bool
    ) -> None:
        self._rest = list(arguments)
        self._taker = taker
        self._by_name = by_name
        self._prog = prog
        self._one_dash = one_dash
        self.problems: list[Problem] = []

    def sort(self) -> None:
        """Take all words."""
        while self._rest:
            word = self._rest.pop(0)
            if word == "--":
                self._taker.elements += self._rest
                self._rest.clear()
            elif word.startswith("--"):
                self._long(word)
            elif self._one_dash and self._has_one_dash(word):
                self._long("-" + word)
            elif word.startswith("-") and word != "-":
                self._short(word)
            else:
                self._taker.elements.append(word)

    def _long(self, word: str) -> None:
        name, equals, value = word.partition("=")
        candidates = self._long_names(name)
        if len(candidates) > 1:
            self.problems.append(Problem(f"option '{name}' could be any of {', '.join(candidates)}", "write it out"))
        elif not candidates:
            self._unknown(name, has_value=bool(equals))
        elif self._by_name[candidates[0]].wants_value:
            self._with_value(candidates[0], value if equals else None)
        elif self._by_name[candidates[0]].takes is Takes.VALUE_OR_NOTHING:
            option = self._by_name[candidates[0]]
            self._taker.take(option, value if equals else option.implied)
        elif equals:
            self.problems.append(
                Problem(f"option '{candidates[0]}' takes no value, not '{value}'", "write the option alone")
            )
        else:
            self._taker.take(self._by_name[candidates[0]], "")

    def _short(self, word: str) -> None:
        for position, letter in enumerate(word[1:], 2):
            option = self._by_name.get(f"-{letter}")
            if option is None:
                # '-fromats' is a slip for '--formats'; of '-qX' only the X is unknown.
                self._unknown(word if position == 2 else f"-{letter}", has_value=False)  # noqa: PLR2004 - the first
                return
            if option.wants_value:
                self._with_value(f"-{letter}", word[position:] or None)
                return
            self._taker.take(option, "")

    def _with_value(self, name: str, value: str | None) -> None:
        if value is not None:
            self._taker.take(self._by_name[name], value)
        elif self._rest:
            self._taker.take(self._by_name[name], self._rest.pop(0))
        else:
            self.problems.append(Problem(f"option '{name}' needs a value", f"{name} {self._by_name[name].metavar}"))

    def _unknown(self, name: str, *, has_value: bool) -> None:
        word = name if name.startswith("--") else f"-{name}"
        there = _OF_DISK_IMAGE_CREATE.get(name) or _OF_DISK_IMAGE_CREATE.get(word)
        hint = f"'{self._prog} --help' lists all options"
        if there in self._by_name:
            meant = there
            hint = f"that of disk-image-create is called '{meant}' here"
        else:
            # A single letter is close to anything.
            meant = closest(word, self._by_name) if len(name) > len("-x") else None
            if meant:
                hint = f"did you mean '{meant}'?"
        if meant and self._by_name[meant].wants_value and not has_value and self._has_more(word):
            # Its value is no element.
            del self._rest[0]
        self.problems.append(Problem(f"unknown option '{name}'", hint))

    def _has_more(self, word: str) -> bool:
        """Whether what follows the unknown option *word* may be its value: not what would be the only element."""
        return bool(self._rest) and not word.startswith("--no-") and bool(self._rest[1:] or self._taker.elements)

    def _has_one_dash(self, word: str) -> bool:
        """Whether *word* is a long option, such as ``-formats``, rather than short ones in one."""
        name = word.partition("=")[0]
        return name.startswith("-") and len(name) > len("-x") and bool(self._long_names(f"-{name}"))

    def _long_names(self, beginning: str) -> list[str]:
        """The long options meant by *beginning*: the one of that name, or all that begin so."""
        if beginning in self._by_name:
            return [beginning]
        names = [name for name in self._by_name if name.startswith("--") and name.startswith(beginning)]
        # '--col' is not ambiguous: all that begin so are one option.
        return names[:1] if len({id(self._by_name[name]) for name in names}) == 1 else names


def closest(word: str, known: Iterable[str]) -> str | None:
    """Which of *known* was probably meant by *word*, if any."""
    return next(iter(difflib.get_close_matches(word, list(known), 1)), None)
