# SPDX-License-Identifier: Apache-2.0
"""A command line of disk-image-create or ramdisk-image-create, read as virt-dib's own is (docs/drop-in.md)."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from virt_dib import break_points
from virt_dib import environment as contract
from virt_dib.break_points import NO_BREAKS, Breaks
from virt_dib.command_line import Options, read
from virt_dib.configuration import ENVIRONMENT_VARIABLE
from virt_dib.dib_output import Settings, from_environment
from virt_dib.errors import Problem
from virt_dib.options import Given, Option, Takes, flag, sort_into, valued
from virt_dib.spec import VARIABLES_OF_BASH, BuildSpec, DropIn
from virt_dib.translation import translated
from virt_dib.usage import Parser

TRACING = "tracing"
"""The destination of the one option that counts how often it is given."""
_CLEARING, _LOG = "clearing", "log"
TEMP_DIR = "TMP_DIR"
"""disk-image-create's variable for where the disks of a build are."""

DISK_PROG, RAMDISK_PROG = "virt-disk-image-create", "virt-ramdisk-image-create"
_DESCRIPTION = {
    DISK_PROG: "Build disk images from diskimage-builder elements as disk-image-create does, but without root: in a "
    "small virtual machine, or in a sandbox.",
    RAMDISK_PROG: "Build a ramdisk and its kernel from diskimage-builder elements as ramdisk-image-create does, but "
    "without root: in a small virtual machine, or in a sandbox.",
}
_EPILOG = (
    "Options may stand before and after the elements. The environment of this command reaches the elements, and has "
    "the same variables as diskimage-builder's; VIRT_DIB_ISOLATION=sandbox and others say how to build."
)
_DEFAULT_NAME = "image"
_DEFAULT_CACHE = Path(".cache", "image-create")
"""Below the home directory (lib/disk-image-create)."""


OPTIONS = (
    valued("-a", "arch", "ARCH", "architecture that the elements are told, ARCH"),
    valued("-o", "name", "[DIR/]NAME", "name of the image, and of the files made for it (default: image)"),
    valued("-t", "formats", "LIST", "output formats, separated by commas, in any order (default: qcow2)"),
    flag("-x", TRACING, "make scripts trace what they do; twice for more"),
    flag("-u", "uncompressed", "do not compress qcow2 images"),
    flag("-c", _CLEARING, "give the elements nothing of the environment"),
    flag("-n", "skip_base", "do not add the element 'base'"),
    Option(("-p",), "extra_packages", Takes.VALUES, "LIST", "packages to install besides, separated by commas"),
    valued("--logfile", _LOG, "FILE", "append what is printed to FILE, and print it only if DIB_QUIET is 0"),
    flag("--checksum", "checksum", "write NAME.EXT.md5 and NAME.EXT.sha256 for each output file"),
    valued("--image-size", "DIB_IMAGE_SIZE", "GIB", "size of the image, fractions too (default: what the tree needs)"),
    valued("--image-extra-size", "DIB_IMAGE_EXTRA_SIZE", "MIB", "room in the image besides what the tree takes"),
    valued("--image-cache", "image_cache", "DIR", "where the elements cache (default: ~/.cache/image-create)"),
    valued("--max-online-resize", "MAX_ONLINE_RESIZE", "BLOCKS", "most blocks the root file system may grow to"),
    valued("--min-tmpfs", "DIB_MIN_TMPFS", "GIB", "accepted, and told to the elements; builds need no tmpfs"),
    valued("--mkfs-journal-size", "DIB_JOURNAL_SIZE", "MIB", "size of the journal of an ext4 root (default: 64)"),
    valued("--mkfs-options", "mkfs_options", "OPTIONS", "options for mkfs of the root file system, one word"),
    flag("--no-tmpfs", "DIB_NO_TMPFS", "accepted, and told to the elements; builds need no tmpfs"),
    flag("--offline", "DIB_OFFLINE", "elements are not to update what they have cached"),
    valued("--qemu-img-options", "qemu_img_options", "LIST", "options for qemu-img convert -o"),
    valued("--root-label", "root_label", "LABEL", "label of the root file system (default: cloudimg-rootfs)"),
    valued("--ramdisk-element", "ramdisk_element", "ELEMENT", "the element that makes ramdisks (default: ramdisk)"),
    valued("--install-type", "install_type", "TYPE", "install from 'source' (default), 'package' or 'repo'"),
    valued(
        "--docker-target",
        "docker_target",
        "TARGET",
        "repository and tag for the formats docker, which needs it, and oci",
    ),
    valued("--config", "config", "FILE", "take settings of virt-dib from FILE, not from virt-dib/config.toml"),
    flag("-h --help", "help", "print this"),
    flag("--version", "version", "print the version of diskimage-builder"),
)
_BY_NAME: Mapping[str, Option] = {name: option for option in OPTIONS for name in option.names}

_INHERIT, _STRICT = _WAYS = "inherit", "strict"
_READ_BY_DIB = frozenset({
    "ARCH", "FS_TYPE", "ROOT_LABEL", "MAX_ONLINE_RESIZE", "IMAGE_TYPE", "QEMU_IMG_OPTIONS", "RAMDISK_ELEMENT",
    "SKIP_BASE", "break", "break_cmd", "break_outside_target",
})  # fmt: skip
"""What disk-image-create itself reads, besides ``DIB_*``."""

_WITHOUT_MEANING = {"DIB_MIN_TMPFS": "--min-tmpfs", "DIB_NO_TMPFS": "--no-tmpfs"}

_NOT_FOR_ELEMENTS = frozenset({
    # virt-dib's own: places on this host, and what disk-image-create sets itself whatever it finds
    "DIB_IMAGE_CACHE", "DIB_LOCKFILES", "DIB_PYTHON_EXEC", "TMP_DIR", "IMAGE_NAME", "DOCKER_TARGET", "INSTALL_PACKAGES",
    "MKFS_OPTS", "COMPRESS_IMAGE", "IMAGE_TYPES", "LOGFILE", "ELEMENTS_PATH", "CLEAR_ENV", "OVERWRITE_OLD_IMAGE",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class DibCommand:
    """A command line, read."""

    spec: BuildSpec
    options: Options
    problems: Sequence[Problem]
    messages: Sequence[str]
    """What there is to say of options that mean nothing here."""
    output: Settings
    breaks: Breaks
    temporary_dir: Path | None
    help: bool
    version: bool


@dataclass(slots=True)
class _DibGiven(Given):
    """As Given, and what only disk-image-create has."""

    tracing: int = 0
    clearing: bool = False
    log: str | None = None
    variables: dict[str, str] = field(default_factory=dict)
    """Of options that are but other words for variables."""

    def take(self, option: Option, value: str) -> None:
        if option.dest == TRACING:
            self.tracing += 1
        elif option.dest.isupper():
            self.variables[option.dest] = value if option.wants_value else "1"
        else:
            Given.take(self, option, value)


def parse(arguments: Sequence[str], environ: Mapping[str, str], *, prog: str, ramdisk: bool) -> DibCommand:
    """Read *arguments* and what disk-image-create reads from its environment, *environ*.

    What is wrong is in the result's problems, as with :func:`virt_dib.command_line.parse`.
    """
    given = _DibGiven()
    mistakes = sort_into(given, arguments, _BY_NAME, prog=prog)
    inherited = {} if given.clearing or environ.get("CLEAR_ENV") == "1" else environ
    strict, wrong = _is_strict(environ)
    mistakes = [*mistakes, *wrong]
    log, tracing, variables = given.log, given.tracing, _variables(inherited, strict=strict) | given.variables
    image_name = _complete(given, inherited, tracing, ramdisk=ramdisk)
    given.envvars = [f"{name}={value}" for name, value in variables.items()]
    breaks, wrong = _breaks(inherited)
    command = read(given, [*mistakes, *wrong], arguments, environ)
    overwrite = environ.get("OVERWRITE_OLD_IMAGE", "0")
    drop_in = DropIn(image_name=image_name, working_dir=_working_dir(), keep_old=not _is_set(overwrite))
    return DibCommand(
        spec=dataclasses.replace(
            command.spec, drop_in=drop_in, image_cache=command.spec.image_cache or _default_cache(inherited)
        ),
        options=command.options,
        problems=command.problems,
        messages=[
            f"{option} has no meaning here: builds take no memory for temporary files that is not there"
            for name, option in _WITHOUT_MEANING.items()
            if name in given.variables
        ],
        output=from_environment(environ, log),
        breaks=breaks,
        temporary_dir=Path(environ[TEMP_DIR]) if environ.get(TEMP_DIR) else None,
        help=given.help,
        version=given.version,
    )


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The help of *prog*, and for those who compare it with the manual. Command lines are read by :func:`parse`."""
    parser = Parser(
        prog, _DESCRIPTION[prog], _EPILOG, usage=f"{prog} {translated('[options] ELEMENT...')}", version=None
    )
    parser.arguments.add_argument(
        "elements", nargs="*", metavar="ELEMENT", help=translated("such as debian-minimal, vm")
    )
    for option in OPTIONS:
        if option.metavar is not None:
            parser.options.add_argument(*option.names, metavar=option.metavar, help=translated(option.help))
        elif "--help" not in option.names:
            parser.options.add_argument(*option.names, action="store_true", help=translated(option.help))
    return parser


def _variables(environ: Mapping[str, str], *, strict: bool) -> dict[str, str]:
    """What of the caller's environment the elements are to see."""
    return {
        name: value
        for name, value in contract.from_host(environ).items()
        if name not in _NOT_FOR_ELEMENTS
        and name not in VARIABLES_OF_BASH
        and (not strict or name.startswith("DIB_") or name in _READ_BY_DIB)
    }


def _is_strict(environ: Mapping[str, str]) -> tuple[bool, Sequence[Problem]]:
    """Whether elements see only what diskimage-builder itself reads, and what is wrong with the word for it."""
    word = environ.get(ENVIRONMENT_VARIABLE) or _INHERIT
    if word in _WAYS:
        return word == _STRICT, ()
    problem = Problem(
        f"unknown value '{word}' of the variable {ENVIRONMENT_VARIABLE}", f"choose from {', '.join(_WAYS)}"
    )
    return True, (problem,)


def _breaks(environ: Mapping[str, str]) -> tuple[Breaks, Sequence[Problem]]:
    """Where disk-image-create would open a shell (lib/common-functions, check_break), and what is wrong with that."""
    asked_by = "the variable break"
    points = break_points.words_in([environ.get("break", "")])
    breaks = Breaks(
        points=frozenset(points),
        command=environ.get("break_cmd") or None,
        outside_after_error=bool(environ.get("break_outside_target")),
        asked_by=asked_by,
    )
    wrong = break_points.problems(points, asked_by)
    return (NO_BREAKS if wrong else breaks), wrong


def _complete(given: Given, environ: Mapping[str, str], tracing: int, *, ramdisk: bool) -> str:
    """Give *given* what disk-image-create takes from its environment, and return its IMAGE_NAME."""
    # One argument may hold several elements, and empty ones vanish.
    given.elements = " ".join(given.elements).split()
    given.element_paths = [part for part in environ.get("ELEMENTS_PATH", "").split(":") if part]
    given.ramdisk = ramdisk
    given.size = "auto"
    given.skip_base = given.skip_base or environ.get("SKIP_BASE") == "1"
    given.extra_packages = [",".join(text.split()) for text in given.extra_packages]
    given.install_type = given.install_type or environ.get("DIB_DEFAULT_INSTALLTYPE") or None
    given.qemu_img_options = given.qemu_img_options or environ.get("QEMU_IMG_OPTIONS")
    given.fs_type = environ.get("FS_TYPE") or None
    given.image_cache = given.image_cache or environ.get("DIB_IMAGE_CACHE") or None
    traced = environ.get("DIB_DEBUG_TRACE") or "0"
    given.debug = str(int(traced) + tracing) if re.fullmatch("[0-9]{1,6}", traced) else traced
    name = given.name or environ.get("IMAGE_NAME") or _DEFAULT_NAME
    formats = [word.strip() for word in (given.formats or "").split(",") if word.strip()]
    if len(formats) == 1 or given.formats is None:
        name = name.removesuffix(f".{formats[0] if formats else 'qcow2'}")
    given.name = name
    return name


def _default_cache(environ: Mapping[str, str]) -> Path | None:
    home = environ.get("HOME")
    return Path(home) / _DEFAULT_CACHE if home else None


def _working_dir() -> Path:
    """Where there is none any more, there can be no build, but help."""
    try:
        return Path.cwd()
    except OSError:
        return Path()


def _is_set(text: str) -> bool:
    """What bash's ``-eq 0`` makes of it."""
    return re.fullmatch(r"0*", text.strip()) is None
