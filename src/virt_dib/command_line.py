# SPDX-License-Identifier: Apache-2.0
"""A command line of ``virt-dib``, read: options to a BuildSpec, mistakes to problems that are told together."""

from __future__ import annotations

import enum
import functools
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from virt_dib import __version__, break_points, configuration, drive, formats, tools
from virt_dib.break_points import NO_BREAKS, Breaks
from virt_dib.configuration import InForce, Settings
from virt_dib.errors import Problem, UsageError
from virt_dib.machine_readable import Target, parse_target
from virt_dib.options import ON_ERROR, PROG, Given, build_parser, closest, listed_names, sort_words
from virt_dib.spec import (
    CHECKSUMS,
    COMPRESSIONS,
    DEFAULT_SIZE_BYTES,
    INSTALL_TYPES,
    LABEL_LIMITS,
    NUMBERS,
    BuildSpec,
    ExtraData,
    Isolation,
    Kvm,
    check_arch,
    check_docker_target,
    check_label,
    check_name,
    check_variable,
    host_arch,
    parse_duration,
    parse_size,
)
from virt_dib.terminal import AUTOMATIC, Style

_T = TypeVar("_T")

_IN_UNITS = {"memory": "memory_mib", "timeout": "timeout_s", "script_timeout": "script_timeout_s"}
"""Destinations of options, and the fields they become."""

EXAMPLE = f"{PROG} --name debian debian-minimal vm"
_DEFAULT_NAME = "image"
_STAND_IN_TARGET: str | None = "image:latest"
"""For a wrong one, so that it is not told as missing, too."""
_DEFAULT_FS_TYPE = "ext4"
_SWITCHES = {"on": True, "off": False, "true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line says about the run rather than the image."""

    quiet: bool = False
    verbose: bool = False
    trace: bool = False
    kvm: Kvm = Kvm.AUTO
    isolation: Isolation = Isolation.VM
    timeout_s: float | None = None
    script_timeout_s: float | None = None
    style: Style = AUTOMATIC
    list_elements: bool = False
    show_config: bool = False
    breaks: Breaks = NO_BREAKS
    machine_readable: Target | None = None
    """Where events go as JSON."""
    answer: str | None = None
    """Text to print instead of building (--help, --version and the like)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandLine:
    """A command line, read. Where a value was wrong, the default stands in for it and *problems* has why."""

    spec: BuildSpec
    options: Options
    problems: tuple[Problem, ...] = ()
    in_force: tuple[InForce, ...] = ()
    """The settings that need not be on the command line, and where they are from."""
    settings: Settings = field(default_factory=Settings)
    """Those that are not from the command line, as they were found."""


def parse(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> CommandLine:
    """Read the command line *arguments*, and in files and *environment* what can be set there, too.

    *environment* is the process's own unless given; it gives --envvar NAME its values, as well. What is wrong
    is in the result's problems, not raised, so that it can be told together with what turns out to be wrong later.
    """
    given, mistakes = sort_words(arguments)
    return read(given, mistakes, arguments, os.environ if environment is None else environment)


def read(
    given: Given, mistakes: Iterable[Problem], arguments: Sequence[str], environ: Mapping[str, str]
) -> CommandLine:
    """As :func:`parse`, where the words are sorted already: *given* is completed, *mistakes* are told with the rest."""
    settings = configuration.settings(environ, given.config)
    origins = configuration.apply(given, settings)
    values = _Values([*mistakes, *settings.problems], origins)
    on_error = values.take(lambda: _choice("value of --on-error", given.on_error, ON_ERROR, "fail"), "fail")
    options = Options(
        quiet=given.quiet,
        verbose=given.verbose,
        trace=given.trace,
        kvm=values.take(lambda: _kvm(given.kvm), Kvm.AUTO, "kvm"),
        isolation=values.take(lambda: _isolation(given.isolation), Isolation.VM, "isolation"),
        timeout_s=values.take(lambda: _duration(given.timeout, "--timeout"), None, "timeout"),
        script_timeout_s=values.take(
            lambda: _duration(given.script_timeout, "--script-timeout"), None, "script_timeout"
        ),
        style=Style(colour=given.colour, wrap=given.wrap),
        list_elements=given.list_elements,
        show_config=given.show_config,
        breaks=values.take(lambda: _breaks(given.breaks, on_error), NO_BREAKS),
        machine_readable=values.take(lambda: _target(given.machine_readable), None),
        answer=_answer(given),
    )
    spec = _spec(given, values, environ, tuple(arguments))
    configuration.put_in_order(values.problems, settings)
    return CommandLine(
        spec=spec,
        options=options,
        problems=tuple(values.problems),
        in_force=_in_force(spec, options, origins),
        settings=settings,
    )


def wanted_kvm(environment: Mapping[str, str] | None = None) -> Kvm:
    """What ``virt-dib`` without ``--kvm`` would do about KVM, for other commands that start machines.

    Raises:
        UsageError: that is not to be found out, since a setting, not this one perhaps, is wrong.
    """
    return _set_elsewhere(lambda given, values: values.take(lambda: _kvm(given.kvm), Kvm.AUTO, "kvm"), environment)


def wanted_dib(environment: Mapping[str, str] | None = None) -> tuple[Path | None, Path | None]:
    """The library and the Python of diskimage-builder that ``virt-dib`` would take without options for them.

    Raises:
        UsageError: as :func:`wanted_kvm`.
    """

    def read_both(given: Given, values: _Values) -> tuple[Path | None, Path | None]:
        library = values.take(lambda: _path("--dib-library", given.dib_library), None, "dib_library")
        return library, values.take(lambda: _python(given.python), None, "python")

    return _set_elsewhere(read_both, environment)


def _set_elsewhere(read: Callable[[Given, _Values], _T], environment: Mapping[str, str] | None) -> _T:
    """What *read* makes of the settings that are not on a command line."""
    given = Given()
    settings = configuration.settings(os.environ if environment is None else environment)
    values = _Values(settings.problems, configuration.apply(given, settings))
    result = read(given, values)
    if values.problems:
        raise UsageError.of(values.problems)
    return result


def _in_force(spec: BuildSpec, options: Options, origins: Mapping[str, str]) -> tuple[InForce, ...]:
    rows = []
    for setting in configuration.SETTINGS:
        name = _IN_UNITS.get(setting.dest, setting.dest)
        value = getattr(options if name in Options.__slots__ else spec, name)
        if isinstance(value, enum.Enum):
            value = value.value
        elif isinstance(value, bool):
            value = "on" if value else "off"
        elif isinstance(value, float):
            value = f"{value:g}s"
        text = None if value is None else str(value)
        rows.append(InForce(key=setting.key, text=text, origin=origins[setting.dest]))
    return tuple(rows)


class _Values:
    """Takes values, and keeps what is wrong with them; *origins* are those of the values, by destination."""

    def __init__(self, problems: Iterable[Problem], origins: Mapping[str, str] = MappingProxyType({})) -> None:
        self.problems = list(problems)
        self._origins = origins

    def take(self, read: Callable[[], _T], default: _T, dest: str | None = None) -> _T:
        """What *read* returns, or *default* when the user wrote something else than it wants, at *dest*."""
        try:
            return read()
        except UsageError as error:
            origin = self._origins.get(dest or "", configuration.COMMAND_LINE)
            self.problems += [configuration.placed(origin, problem) for problem in error.problems]
            return default


def _spec(given: Given, values: _Values, environ: Mapping[str, str], arguments: tuple[str, ...]) -> BuildSpec:
    output_dir, name = values.take(lambda: _name(given.name), (Path(), _DEFAULT_NAME))
    default_size: int | None = DEFAULT_SIZE_BYTES
    variables = _variables(given.envvars, environ, values)

    def asked(option: str | None, variable: str) -> str | None:
        """The option, or where there is none the variable that means the same to diskimage-builder."""
        return option if option is not None else variables.get(variable) or None

    asked_fs_type = asked(given.fs_type, "FS_TYPE")
    fs_type = values.take(lambda: _choice("file system", asked_fs_type, tuple(LABEL_LIMITS), _DEFAULT_FS_TYPE), "")
    root_label = values.take(lambda: _label(asked(given.root_label, "ROOT_LABEL"), fs_type), None)
    debug = asked(given.debug, "DIB_DEBUG_TRACE")
    needed = given.machine_readable is None and not given.list_elements and not given.show_config
    return BuildSpec(
        name=name,
        output_dir=output_dir,
        elements=values.take(lambda: _elements(given.elements, needed=needed), ()),
        element_paths=values.take(lambda: _paths("--element-path", given.element_paths), ()),
        dib_library=values.take(lambda: _path("--dib-library", given.dib_library), None, "dib_library"),
        python=values.take(lambda: _python(given.python), None, "python"),
        formats=values.take(lambda: _formats(given.formats), ("qcow2",)),
        size_bytes=values.take(lambda: _size(given.size, variables), default_size),
        arch=values.take(lambda: _arch(asked(given.arch, "ARCH")), host_arch()),
        variables=variables,
        debug_level=values.take(lambda: _number("debug_level", debug), None) or 0,
        memory_mib=values.take(lambda: _number("memory_mib", given.memory), None, "memory"),
        cpus=values.take(lambda: _number("cpus", given.cpus), None, "cpus"),
        network=values.take(lambda: _switch(given.network), True, "network"),  # noqa: FBT003 - the default
        host_certificates=values.take(lambda: _switch(given.host_certificates), True, "host_certificates"),  # noqa: FBT003 - default
        root_label=root_label if fs_type else None,
        fs_type=fs_type or _DEFAULT_FS_TYPE,
        mkfs_options=values.take(lambda: _mkfs_options(given.mkfs_options), ""),
        extra_packages=tuple(_comma_list(",".join(given.extra_packages))),
        skip_base=given.skip_base,
        ramdisk=given.ramdisk,
        ramdisk_element=values.take(lambda: _ramdisk_element(asked(given.ramdisk_element, "RAMDISK_ELEMENT")), None),
        install_type=values.take(
            lambda: _choice("install type", given.install_type, INSTALL_TYPES, "source"), "source"
        ),
        excluded_elements=values.take(lambda: _names("--exclude-element", given.excluded_elements), frozenset()),
        excluded_scripts=values.take(lambda: _names("--exclude-script", given.excluded_scripts), frozenset()),
        drive=values.take(lambda: _path("--drive", given.drive), None, "drive"),
        drive_format=values.take(lambda: _drive_format(given.drive_format), None, "drive_format"),
        image_cache=values.take(lambda: _path("--image-cache", given.image_cache), None, "image_cache"),
        extra_data=values.take(lambda: _extra_data(given.extra_data), ExtraData.GUEST, "extra_data"),
        delete_on_failure=not given.keep_on_failure,
        compress=not given.uncompressed,
        compression=values.take(lambda: _compression(given.compression), COMPRESSIONS[0], "compression"),
        qemu_img_options=given.qemu_img_options or "",
        docker_target=values.take(
            lambda: _docker_target(asked(given.docker_target, "DOCKER_TARGET")), _STAND_IN_TARGET
        ),
        checksums=CHECKSUMS if given.checksum else _checksums(variables.get("DIB_CHECKSUM", "")),
        arguments=arguments,
    )


def _answer(given: Given) -> str | None:
    if given.help:
        return build_parser().format_help()
    if given.short_options or given.long_options:
        names = listed_names(short=given.short_options, long=given.long_options)
        return "".join(f"{name}\n" for name in names)
    return f"{PROG} {__version__}\n" if given.version else None


def _breaks(texts: Sequence[str], on_error: str) -> Breaks:
    points = break_points.words_in(texts)
    if texts and not points:
        raise UsageError("no break point named in --break", hint=break_points.CHOICE_HINT)
    asked_by = "--break" if points else "--on-error shell"
    if wrong := break_points.problems(points, asked_by):
        raise UsageError.of(wrong)
    if on_error == "shell":
        points.append(break_points.AFTER_ERROR)
    return Breaks(points=frozenset(points), asked_by=asked_by) if points else NO_BREAKS


def _target(text: str | None) -> Target | None:
    return None if text is None else parse_target(text)


def _elements(names: Sequence[str], *, needed: bool) -> tuple[str, ...]:
    if not names and needed:
        raise UsageError(
            "no element named",
            hint=f"name at least an operating system, such as: {EXAMPLE}",
        )
    if "" in names:
        raise UsageError("cannot use an empty element name", hint="is a shell variable on the command line unset?")
    return tuple(names)


def _name(text: str | None) -> tuple[Path, str]:
    """The directory and the name of ``--name``."""
    if text is None:
        return Path(), _DEFAULT_NAME
    directory, base = os.path.split(text)
    check_name(base, text)
    if directory and ("\0" in directory or not os.path.isdir(directory)):
        name = shlex.quote(directory)
        raise UsageError(
            f"cannot write '{text}': '{directory}' is not a directory, or you may not enter it",
            hint=f"make it first: mkdir -p {name}",
        )
    return Path(directory), base


def _mkfs_options(text: str | None) -> str:
    try:
        shlex.split(text or "")
    except ValueError as error:
        raise UsageError(
            f"cannot use '{text}' as --mkfs-options: a quote or backslash in it has no end",
            hint="close the quote, or leave it out",
        ) from error
    return text or ""


def _formats(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ("qcow2",)
    names = _comma_list(text)
    if not names:
        raise UsageError("no format named in --formats", hint=f"choose from {', '.join(formats.KNOWN)}")
    return tuple(dict.fromkeys(_each(names, lambda name: formats.select([name])[0].name)))


def _variables(items: Sequence[str], environ: Mapping[str, str], values: _Values) -> dict[str, str]:
    """Those that are right, for their values may be wrong as well; *values* keeps what is wrong with the others."""
    read = [values.take(functools.partial(_variable, item, environ), None) for item in items]
    return {variable[0]: variable[1] for variable in read if variable is not None and variable[1] is not None}


def _variable(item: str, environ: Mapping[str, str]) -> tuple[str, str | None] | None:
    name, equals, value = item.partition("=")
    check_variable(name, value)
    return name, value if equals else environ.get(name)


def _kvm(text: str | None) -> Kvm:
    known = [one.value for one in Kvm]
    return Kvm(_choice("value of --kvm", text, known, Kvm.AUTO.value))


def _isolation(text: str | None) -> Isolation:
    known = [one.value for one in Isolation]
    return Isolation(_choice("value of --isolation", text, known, Isolation.VM.value))


def _switch(text: str | None) -> bool:
    """On unless it is switched off."""
    if text is not None and text not in _SWITCHES:
        raise UsageError(f"cannot use '{text}' as on or off", hint=f"choose from {', '.join(_SWITCHES)}")
    return text is None or _SWITCHES[text]


def _duration(text: str | None, option: str) -> float | None:
    return None if text is None else parse_duration(text, f"the time of {option}")


def _extra_data(text: str | None) -> ExtraData:
    known = [one.value for one in ExtraData]
    return ExtraData(_choice("value of --extra-data", text, known, ExtraData.GUEST.value))


def _compression(text: str | None) -> str:
    return _choice("compression", text, COMPRESSIONS, COMPRESSIONS[0])


def _size(text: str | None, variables: Mapping[str, str]) -> int | None:
    if text is not None:
        return parse_size(text)
    # DIB has a rule of its own for a size in DIB_IMAGE_SIZE: that of an automatic one.
    return None if variables.get("DIB_IMAGE_SIZE") else DEFAULT_SIZE_BYTES


def _label(text: str | None, fs_type: str) -> str | None:
    """The root label; *fs_type* is empty when it is not known."""
    if text is not None:
        check_label(text, fs_type)
    return text


def _docker_target(text: str | None) -> str | None:
    if text is not None:
        check_docker_target(text)
    return text


def _checksums(text: str) -> tuple[str, ...]:
    """Those that DIB_CHECKSUM asks for, as diskimage-builder reads it (lib/common-functions, finish_image)."""
    return CHECKSUMS if text == "1" else tuple(name for name in CHECKSUMS if name in text)


def _arch(text: str | None) -> str:
    if text is None:
        return host_arch()
    check_arch(text)
    return text


def _path(option: str, text: str | None) -> Path | None:
    what = "disk image" if option == "--drive" else "directory"
    if text is not None and (not text or "\0" in text):
        raise UsageError(f"cannot use '{text}' as the {what} of {option}", hint=f"give an existing {what}")
    return None if text is None else Path(text)


def _drive_format(text: str | None) -> str | None:
    return None if text is None else _choice("format of the drive", text, drive.FORMATS, "raw")


def _python(text: str | None) -> Path | None:
    """The interpreter of --python: a path, or a name that is searched for on the PATH."""
    if text is None:
        return None
    found = tools.find(text) if text and "\0" not in text else None
    if found is None:
        raise UsageError(
            f"cannot use '{text}' as --python: there is no such program",
            hint="give the name of an interpreter on the PATH, such as python3, or a path, such as /usr/bin/python3",
        )
    return found.absolute()


def _paths(option: str, texts: Sequence[str]) -> tuple[Path, ...]:
    return tuple(_each(texts, lambda text: _path(option, text)))


def _names(option: str, texts: Sequence[str]) -> frozenset[str]:
    if "" in texts:
        raise UsageError(f"cannot use an empty name for {option}", hint="is a shell variable unset?")
    return frozenset(texts)


def _ramdisk_element(text: str | None) -> str | None:
    if text is not None and not text.strip():
        raise UsageError("cannot use an empty name for --ramdisk-element", hint="is a shell variable unset?")
    return text


def _choice(what: str, text: str | None, known: Sequence[str], default: str) -> str:
    if text is None or text in known:
        return default if text is None else text
    meant = closest(text, known)
    raise UsageError(
        f"unknown {what} '{text}'",
        hint=(f"did you mean '{meant}'? " if meant else "") + f"choose from {', '.join(known)}",
    )


def _number(field: str, text: str | None) -> int | None:
    if text is None:
        return None
    what, least, most = NUMBERS[field]
    # ASCII digits alone, few enough for int(): it would take '1_000' and other scripts' digits too.
    number = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else -1
    if not least <= number <= most:
        raise UsageError(f"cannot use '{text}' as the {what}", hint=f"give a whole number from {least} to {most}")
    return number


def _comma_list(text: str) -> list[str]:
    return [word for word in map(str.strip, text.split(",")) if word]


def _each(items: Iterable[str], read: Callable[[str], _T | None]) -> list[_T]:
    """What *read* makes of each of the items, without None.

    Raises:
        UsageError: all that is wrong with any of them.
    """
    values = _Values(())
    results = [values.take(functools.partial(read, item), None) for item in items]
    if values.problems:
        raise UsageError.of(values.problems)
    return [result for result in results if result is not None]
