# SPDX-License-Identifier: Apache-2.0
"""The output formats: what each is called, and how it is written from the finished disk or from its tree."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import os
import re
import secrets
import shutil
import site
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from virt_dib import archives, tools
from virt_dib.archives import Imported
from virt_dib.disk_images import HEAD_BYTES, format_by
from virt_dib.errors import ElementError, ToolError, UsageError
from virt_dib.files import temp_dir_variable
from virt_dib.spec import COMPRESSIONS, LARGEST_DISK_BYTES, BuildSpec
from virt_dib.tools import Command

_MOST_COROUTINES = 16
"""What qemu-img takes for ``-m``."""
_OPTION_HELP = re.compile(r"^\s+([a-z0-9_.-]+)=", re.MULTILINE)
_OTHER_FILES = ("data_file", "backing_file", "backing_fmt")
"""Options that make an image which needs another file, on this host."""
_VHD_CHUNK_BYTES = 1 << 20
_NAMES_NO_FILES = ("raw", "luks")
"""What a disk may begin like: these lead nobody to other files."""
_QCOW2_WRITER = Path(__file__).with_name("qcow2.py")
_ROOM_HINT = "make room in the output directory, or build into another one: --name DIRECTORY/NAME"


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A format that ``--formats`` takes."""

    name: str
    is_file: bool = True
    """The output is a file beside the others."""

    @property
    def suffix(self) -> str:
        """What follows the image's name and a dot."""
        return self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskFormat(Format):
    """A format that qemu-img makes of the raw image disk."""

    qemu_name: str
    options: str = ""
    """Those of qemu-img convert -o that it always has; the user's come after them and win."""
    compresses: bool = False
    takes_options: bool = True
    most_bytes: int = LARGEST_DISK_BYTES
    """The largest disk that qemu-img makes of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeFormat(Format):
    """A format made of the archive of all mounted file systems together."""


_VHD = "vhd"
_FORMATS: Mapping[str, Format] = {
    output.name: output
    for output in (
        DiskFormat(name="qcow2", qemu_name="qcow2", compresses=True),
        DiskFormat(name="raw", qemu_name="raw", takes_options=False),
        # Azure takes no other form: fixed, and its size as the footer says it, not as cylinders would. Hyper-V and
        # Xen take it as well.
        DiskFormat(name=_VHD, qemu_name="vpc", options="subformat=fixed,force_size=on", most_bytes=2040 << 30),
        DiskFormat(name="vhdx", qemu_name="vhdx", most_bytes=64 << 40),
        DiskFormat(name="vmdk", qemu_name="vmdk"),
        DiskFormat(name="vdi", qemu_name="vdi"),
        TreeFormat(name="tar"),
        TreeFormat(name="tgz"),
        TreeFormat(name="squashfs"),
        TreeFormat(name="oci"),
        TreeFormat(name="docker", is_file=False),
    )
}

_DIB_SUFFIXES = {"squashfs": "squash"}

KNOWN: tuple[str, ...] = tuple(sorted(_FORMATS))
"""The names ``--formats`` takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """What formats are made of."""

    disk: Path
    archive: Path | None
    """GNU tar's, of the tree, where one was asked for by :func:`wants_archive`."""


def select(names: Sequence[str]) -> tuple[Format, ...]:
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


def file_name(spec: BuildSpec, output: Format) -> str:
    """The name of an output file; disk-image-create calls one otherwise (contract section 1.8)."""
    suffix = output.suffix if spec.drop_in is None else _DIB_SUFFIXES.get(output.name, output.suffix)
    return f"{spec.name}.{suffix}"


def wants_archive(outputs: Sequence[Format]) -> bool:
    """Whether one of *outputs* is made of the tree."""
    return any(isinstance(output, TreeFormat) for output in outputs)


def wants_engine(outputs: Sequence[Format]) -> bool:
    """Whether one of *outputs* goes to an engine for containers."""
    return any(not output.is_file for output in outputs)


def check_spec(outputs: Sequence[Format], spec: BuildSpec) -> None:
    """Refuse an image for an engine that has no name there, and a disk too large for its format.

    Raises:
        UsageError: ``--docker-target`` is missing, or ``--size`` is too large.
    """
    for output in outputs:
        if isinstance(output, DiskFormat) and spec.size_bytes is not None and spec.size_bytes > output.most_bytes:
            raise UsageError(
                f"the format {output.name} holds at most {output.most_bytes >> 30} GiB",
                hint="give a smaller --size, or leave out the format",
            )
    if wants_engine(outputs) and spec.docker_target is None:
        raise UsageError(
            "the format docker needs a repository and tag for the image",
            hint="name them, such as: --docker-target debian:13",
        )


# ---- options of qemu-img ----


def check_options(outputs: Sequence[Format], spec: BuildSpec, scratch: Path) -> None:
    """Have qemu-img make an empty image with the options in the directory *scratch*, which must not exist yet.

    Nothing is tried where there is no qemu-img, which a build does not start without.

    Raises:
        UsageError: qemu-img does not take the options for one of *outputs*, none of those has one of them, or an
            image would be more than one file.
        ToolError: there is no space for the trial.
    """
    options = spec.qemu_img_options
    taking = [output for output in outputs if isinstance(output, DiskFormat) and output.takes_options]
    if tools.find("qemu-img") is None or not taking:
        return
    known = {name for output in taking for name in _known_options(output)}
    names = ", ".join(output.name for output in taking)
    for option in _split(options):
        if _option_name(option) in _OTHER_FILES:
            # Not tried: a data file would be overwritten.
            raise UsageError(
                f"cannot use '{options}' as --qemu-img-options for {names}: with {_option_name(option)} an image is "
                "more than one file",
                hint=f"leave out {_option_name(option)}, or make such an image of a finished one with qemu-img convert",
            )
        if _option_name(option) not in known:
            raise UsageError(
                f"cannot use '{options}' as --qemu-img-options for {names}: there is no option "
                f"'{_option_name(option)}'",
                hint=f"what there is: {'; '.join(_help_command(output) for output in taking)}",
            )
    for output in taking:
        # What is ours alone is known to work.
        if options or (spec.compression != COMPRESSIONS[0] and output.compresses):
            _try_options(output, spec, scratch)


def _try_options(output: DiskFormat, spec: BuildSpec, scratch: Path) -> None:
    no_room = f"set {temp_dir_variable()} to a directory with more room, or make some there"
    try:
        scratch.mkdir()
    except OSError as error:
        raise ToolError(f"trying --qemu-img-options in '{scratch.parent}': {error.strerror}", hint=no_room) from error
    image = scratch / "image"
    command: list[str | Path] = [
        _qemu_img(),
        "create",
        "-q",
        "-f",
        output.qemu_name,
        *_options_for(output, spec),
        image,
        "1M",
    ]
    result = tools.run(command, doing="trying --qemu-img-options", check=False)
    made = len(list(scratch.iterdir()))
    shutil.rmtree(scratch)
    if result.exit_status == 0 and made == 1:
        return
    if _is_full(result.stderr):
        raise ToolError(f"trying --qemu-img-options in '{scratch.parent}': no space left", hint=no_room)
    said = result.stderr.strip().splitlines() or ["it makes more than one file with them"]
    reason = said[0].removeprefix("qemu-img: ").removeprefix(f"{image}: ")
    options = spec.qemu_img_options
    what = f"'{options}' as --qemu-img-options" if options else f"{spec.compression} compression"
    help_hint = f"what there is: {_help_command(output)}"
    raise UsageError(
        f"cannot use {what} for {output.name}: {reason}",
        hint=help_hint if options else "leave out --compression, or install a qemu of 5.1 or newer with zstd",
    )


def _options_for(output: DiskFormat, spec: BuildSpec) -> list[str]:
    """The format's own and those of the user's that it has, in the form of qemu-img."""
    options = [output.options] if output.options else []
    if _compresses(output, spec) and spec.compression != COMPRESSIONS[0]:
        options.append(f"compression_type={spec.compression}")
    if spec.qemu_img_options and output.takes_options:
        known = _known_options(output)
        options += [option for option in _split(spec.qemu_img_options) if _option_name(option) in known]
    return ["-o", ",".join(options)] if options else []


def _compresses(output: DiskFormat, spec: BuildSpec) -> bool:
    """Whether the image is compressed. qemu-img does not do so with clusters that are allocated before."""
    return output.compresses and spec.compress and not _is_preallocated(spec)


def _is_preallocated(spec: BuildSpec) -> bool:
    values = dict(option.partition("=")[::2] for option in _split(spec.qemu_img_options))
    return values.get("preallocation", "off") != "off"


def _help_command(output: DiskFormat) -> str:
    """What shows the user the options of the format."""
    return f"qemu-img create -f {output.qemu_name} -o help"


def _known_options(output: DiskFormat) -> set[str]:
    """What qemu-img says it has for the format, and for files."""
    command = [_qemu_img(), "create", "-f", output.qemu_name, "-o", "help", "x"]
    return set(_OPTION_HELP.findall(tools.run(command, doing="asking qemu-img for options").stdout))


def _split(options: str) -> list[str]:
    """Options one by one; a doubled comma stands for a comma in a value."""
    words = options.replace(",,", "\0").split(",")
    return [word.replace("\0", ",,") for word in words if word]


def _option_name(option: str) -> str:
    return option.partition("=")[0].strip()


# ---- writing ----


def choices(outputs: Sequence[Format], spec: BuildSpec) -> Iterator[str]:
    """What the user may want to know about how *outputs* are made on this host."""
    for output in outputs:
        if isinstance(output, DiskFormat) and output.compresses and spec.compress and _is_preallocated(spec):
            yield f"{output.name}: not compressed, since --qemu-img-options asks for preallocation"
        if output.name == _VHD and _find_vhd_util() is not None:
            yield "vhd: written by vhd-util, as a dynamic disk"
        elif output.name == _VHD:
            yield "vhd: written by qemu-img, as a fixed disk of whole MiB, since there is no vhd-util with 'convert'"


def write(spec: BuildSpec, sources: Sources, targets: Mapping[str, tuple[Path, Format]], scratch: Path) -> None:
    """Write all *targets* that are files, which must not exist yet, at the same time.

    The keys of *targets* are what messages call them. *scratch* is an existing directory for files in between.

    Raises:
        ElementError: the disk is made to hurt who opens a raw image of it.
        ToolError: a program failed.
    """
    if any(isinstance(output, DiskFormat) for _, output in targets.values()):
        _check_beginning(sources.disk)
    early: dict[str, Command] = {}
    commands: dict[str, Command] = {}
    layer = scratch / "layer.tar.gz"
    for name, (target, output) in targets.items():
        doing = f"writing '{name}'"
        if isinstance(output, DiskFormat) and output.name == _VHD:
            early[doing], commands[doing] = _vhd(output, spec, sources.disk, target, scratch)
        elif isinstance(output, DiskFormat):
            commands[doing] = _convert(output, spec, sources.disk, target)
        elif output.name == "tgz" and sources.archive is not None:
            layer = target
            commands[doing] = archives.gzip(sources.archive, target)
        elif output.name == "squashfs" and sources.archive is not None:
            commands[doing] = archives.squashfs(sources.archive, target)
    by_name = {output.name: (name, target) for name, (target, output) in targets.items()}
    if "oci" in by_name and "tgz" not in by_name and sources.archive is not None:
        commands[f"writing '{by_name['oci'][0]}'"] = archives.gzip(sources.archive, layer)
    with _room_wanted():
        tools.run_together(early)
        tools.run_together(commands)
        if "oci" in by_name and sources.archive is not None:
            created_by = f"virt-dib {' '.join(spec.elements)}"
            name = archives.image_name(spec.name, spec.docker_target)
            archives.write_oci(
                sources.archive, layer, by_name["oci"][1], name=name, arch=spec.arch, created_by=created_by
            )
    if "tar" in by_name and sources.archive is not None:
        _take(sources.archive, by_name["tar"][1])


def _check_beginning(disk: Path) -> None:
    """Refuse a *disk* of which a raw image, opened without being told its format, would be another kind of image.

    Such a one may name files of the host where it is opened, which are in the disk then.
    """
    head = b""
    with contextlib.suppress(OSError), disk.open("rb") as stream:  # of which qemu-img tells
        head = stream.read(HEAD_BYTES)
    found = format_by(head)
    if found not in _NAMES_NO_FILES:
        raise ElementError(
            f"the elements have made a disk that begins like a {found} image: programs that read a raw image would "
            "take it for one, and open the files that it names",
            hint="no file system and no boot loader begins like that: find the element that writes it",
        )


def load(spec: BuildSpec, sources: Sources) -> Imported:
    """Import the tree to an engine for containers, as an image without a name yet.

    Raises:
        ToolError: there is none, or it refuses.
    """
    engine = archives.find_engine()
    if engine is None or sources.archive is None:
        raise ToolError(
            "importing the image: no engine for containers answers any more",
            hint="start docker or podman again, or leave out the format docker",
        )
    return engine.load(sources.archive, spec.arch)


# qemu-img takes what stands before a colon for a protocol, but in absolute paths.


def _convert(output: DiskFormat, spec: BuildSpec, disk: Path, target: Path) -> Command:
    command, options = [*_qemu_img_convert(), "-O", output.qemu_name], _options_for(output, spec)
    if _compresses(output, spec) and not options and _has_zlib_ng():
        words: list[str | Path] = [sys.executable, "-I", _QCOW2_WRITER, disk.absolute(), target.absolute()]
        return Command(words=words, called=_QCOW2_WRITER.name)
    if _compresses(output, spec):
        # Compressed clusters in any order: the coroutines do not wait for each other.
        command += ["-c", "-W"]
    return Command(words=[*command, *options, disk.absolute(), target.absolute()])


def _has_zlib_ng() -> bool:
    """Whether :mod:`virt_dib.qcow2` can be used, which sees nothing of the user's own site directory."""
    found = importlib.util.find_spec("zlib_ng")
    user_site = site.getusersitepackages()
    return bool(sys.executable) and found is not None and not (found.origin or "").startswith(f"{user_site}/")


def _vhd(output: DiskFormat, spec: BuildSpec, disk: Path, target: Path, scratch: Path) -> tuple[Command, Command]:
    """A short step, and the one that writes the image after it."""
    disk, target = disk.absolute(), target.absolute()
    vhd_util = _find_vhd_util()
    if vhd_util is not None:
        fixed = scratch / "fixed.vhd"
        return (
            Command(words=[vhd_util, "convert", "-s", "0", "-t", "1", "-i", disk, "-o", fixed]),
            Command(words=[vhd_util, "convert", "-s", "1", "-t", "2", "-i", fixed, "-o", target]),
        )
    # Of whole MiB, which Azure wants too: longer than the disk, so it is made first.
    size_bytes = -(-disk.stat().st_size // _VHD_CHUNK_BYTES) * _VHD_CHUNK_BYTES
    options = _options_for(output, spec)
    convert = [*_qemu_img_convert(), "-n", "--target-is-zero", "-O", output.qemu_name, disk, target]
    return (
        Command(words=[_qemu_img(), "create", "-q", "-f", output.qemu_name, *options, target, str(size_bytes)]),
        Command(words=convert),
    )


def _find_vhd_util() -> Path | None:
    """vhd-util, if it has the subcommand that only patched ones have."""
    found = tools.find("vhd-util")
    if found is None:
        return None
    said = tools.run([found, "help"], doing="asking vhd-util", check=False)
    return found if "convert" in said.stdout + said.stderr else None


def _qemu_img() -> str:
    return str(tools.require("qemu-img", purpose="write images", package="qemu-utils"))


def _qemu_img_convert() -> list[str | Path]:
    coroutines = min(_MOST_COROUTINES, max(1, 2 * (os.cpu_count() or 1)))
    return [_qemu_img(), "convert", "-q", "-m", str(coroutines), "-f", "raw"]


def _take(archive: Path, target: Path) -> None:
    """Give the archive a second name in place of *target*, or copy it where that cannot be."""
    # In the build's own directory, which the next build removes if this one is killed.
    beside = archive.with_name(secrets.token_hex(8))
    try:
        os.link(archive, beside)
        beside.replace(target)
    except OSError:
        beside.unlink(missing_ok=True)
        shutil.copyfile(archive, target)


@contextlib.contextmanager
def _room_wanted() -> Iterator[None]:
    try:
        yield
    except ToolError as error:
        raise ToolError(str(error), hint=_ROOM_HINT if _is_full(str(error)) else None) from error


def _is_full(said: str) -> bool:
    return "No space left" in said or "Disk quota exceeded" in said


def virtual_size_bytes(image: Path, output: DiskFormat) -> int:
    """The size of the disk that *image*, just written, holds."""
    command: list[str | Path] = [_qemu_img(), "info", "--output=json", "-f", output.qemu_name, image.absolute()]
    return int(json.loads(tools.run(command, doing=f"measuring '{image.name}'").stdout)["virtual-size"])
