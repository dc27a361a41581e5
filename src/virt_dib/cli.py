# SPDX-License-Identifier: Apache-2.0
"""The command ``virt-dib``: options to a BuildSpec, errors to messages, the exit status.

All mistakes of a command line are told together. argparse stops at the first, so it only writes the
help; the words of the command line are read here, by the same table of options.
"""

from __future__ import annotations

import argparse
import difflib
import enum
import functools
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from virt_dib import __version__, formats, kvm
from virt_dib.errors import Interrupted, Problem, UsageError, VirtDibError
from virt_dib.interrupts import interrupts
from virt_dib.monitor import BuildMonitor, coloured, printable, summary, wants_colour, write_out
from virt_dib.report import BuildReport
from virt_dib.spec import DEFAULT_SIZE_BYTES, LABEL_LIMITS, BuildSpec, Isolation, check_label, parse_size

_T = TypeVar("_T")

PROG = "virt-dib"
KVM_VARIABLE = "VIRT_DIB_KVM"
ISOLATION_VARIABLE = "VIRT_DIB_ISOLATION"
_VARIABLES_OF_BASH = frozenset({"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"})
_INSTALL_TYPES = ("source", "package")
_DEFAULT_NAME = "image"
_DEFAULT_FS_TYPE = "ext4"
_MIN_MEMORY_MIB = 256
_MAX_MEMORY_MIB = 1 << 24
_MAX_CPUS = 255
_MAX_DEBUG_LEVEL = 1000
_RED = "31;1"

_USAGE = "virt-dib [options] ELEMENT..."
_DESCRIPTION = """\
Build disk images from diskimage-builder elements. All that the elements do
happens in a small virtual machine: no root, no loop devices, no traces here."""
_EPILOG = """\
example:
  virt-dib --name debian --envvar DIB_RELEASE=trixie debian-minimal vm
      writes debian.qcow2 and debian.log into the current directory

Options may stand before and after the elements, and be shortened while they
stay unique. 'virt-dib-doctor' tells what is missing on this host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line says about the run rather than the image."""

    quiet: bool = False
    verbose: bool = False
    trace: bool = False
    kvm: str = "auto"
    """``auto``, ``on`` or ``off``."""
    isolation: Isolation = Isolation.VM
    answer: str | None = None
    """Text to print instead of building (--help, --version)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandLine:
    """A command line, read. Where a value was wrong, the default stands in for it and *problems* has why."""

    spec: BuildSpec
    options: Options
    problems: tuple[Problem, ...] = ()


# ---- the options ----


class _Takes(enum.Enum):
    """What follows an option, and what becomes of it."""

    NOTHING = "sets its destination to True"
    REFUSAL = "sets its destination to False"
    VALUE = "the last one counts"
    VALUES = "all are kept"


@dataclass(frozen=True, slots=True)
class _Option:
    names: tuple[str, ...]
    dest: str
    takes: _Takes
    metavar: str | None
    help: str

    @property
    def wants_value(self) -> bool:
        return self.takes in (_Takes.VALUE, _Takes.VALUES)


def _flag(names: str, dest: str, text: str) -> _Option:
    return _Option(tuple(names.split()), dest, _Takes.NOTHING, None, text)


def _value(names: str, dest: str, metavar: str, text: str) -> _Option:
    return _Option(tuple(names.split()), dest, _Takes.VALUE, metavar, text)


def _values(names: str, dest: str, metavar: str, text: str) -> _Option:
    return _Option(tuple(names.split()), dest, _Takes.VALUES, metavar, text + "; may be given several times")


_GROUPS: Mapping[str, Sequence[_Option]] = {
    "what to build": (
        _value(
            "--name", "name", "[DIR/]NAME", "name of the image, and of the files made for it (default: image)"
        ),
        _value(
            "--formats", "formats", "LIST", f"output formats, of: {', '.join(formats.KNOWN)} (default: qcow2)"
        ),
        _value(
            "--arch", "arch", "ARCH", "architecture the elements are told, ARCH (default: that of this host)"
        ),
        _value("--install-type", "install_type", "TYPE", "install from 'source' (default) or from 'package'"),
        _values("--extra-packages", "extra_packages", "LIST", "packages to install besides, separated by commas"),
    ),
    "elements": (
        _value("-B", "dib_library", "DIR", "lib directory of diskimage-builder (default: of the installed one)"),
        _values("-p --element-path", "element_paths", "DIR", "search DIR for elements before diskimage-builder's"),
        _flag("--skip-base", "skip_base", "do not add the element 'base'"),
        _values("--exclude-element", "excluded_elements", "ELEMENT", "leave ELEMENT out"),
        _values("--exclude-script", "excluded_scripts", "SCRIPT", "leave out scripts of this name"),
        _values(
            "--envvar", "envvars", "NAME[=VALUE]",
            "set a variable for the elements; without =VALUE take it from the environment, if it is there",
        ),
        _value("--debug", "debug", "LEVEL", "make scripts trace what they do, DIB_DEBUG_TRACE (default: 0)"),
    ),
    "the disk": (
        _value("--size", "size", "SIZE", "size of the disk: 5G, 512M, 10737418240b, or auto (default: 5G)"),
        _value("--fs-type", "fs_type", "TYPE", f"root file system: {', '.join(LABEL_LIMITS)} (default: ext4)"),
        _value(
            "--root-label", "root_label", "LABEL",
            "label of the root file system (default: cloudimg-rootfs, on xfs img-rootfs)",
        ),
        _value("--mkfs-options", "mkfs_options", "OPTIONS", "options for mkfs of the root file system, one word"),
        _value("--qemu-img-options", "qemu_img_options", "LIST", "options for qemu-img convert -o"),
        _flag("-u", "uncompressed", "do not compress qcow2 images"),
        _flag("--no-delete-on-failure", "keep_on_failure", "keep incomplete output files when the build fails"),
    ),
    "where scripts run": (
        _value(
            "--isolation", "isolation", "WHERE",
            "run the scripts that fill the tree in the virtual machine, 'vm' (default), or faster where there is no "
            "KVM, but on this host's kernel, in a 'sandbox'; 'auto': in the sandbox where KVM does not work; "
            f"{ISOLATION_VARIABLE} sets the default",
        ),
        _value("-m --memsize", "memory", "MB", "the machine's memory (default: enough to install packages)"),
        _value("--smp", "cpus", "N", "the machine's processors (default: those of this host, at most 8)"),
        _flag("--network", "network", "scripts may use the network (default)"),
        _Option(
            ("--no-network",), "network", _Takes.REFUSAL, None, "scripts have no network, and DIB_OFFLINE is 1"
        ),
        _value(
            "--kvm", "kvm", "WHEN",
            f"use KVM: 'auto' when it works (default), 'on', or 'off' to emulate; {KVM_VARIABLE} sets the default",
        ),
    ),
    "messages": (
        _flag("-q --quiet", "quiet", "print only warnings and errors"),
        _flag("-v --verbose", "verbose", "print the time of each script and libguestfs's debugging messages"),
        _flag("-x", "trace", "trace libguestfs calls"),
        _flag("-V --version", "version", "print the version"),
        _flag("-h --help", "help", "print this"),
    ),
}  # fmt: skip
_BY_NAME: Mapping[str, _Option] = {
    name: option for options in _GROUPS.values() for option in options for name in option.names
}


@dataclass(slots=True)
class _Given:
    """The values as written; None and empty lists where an option was not given."""

    elements: list[str] = field(default_factory=list)
    name: str | None = None
    formats: str | None = None
    arch: str | None = None
    install_type: str | None = None
    extra_packages: list[str] = field(default_factory=list)
    dib_library: str | None = None
    element_paths: list[str] = field(default_factory=list)
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
    uncompressed: bool = False
    keep_on_failure: bool = False
    memory: str | None = None
    cpus: str | None = None
    network: bool = True
    kvm: str | None = None
    isolation: str | None = None
    quiet: bool = False
    verbose: bool = False
    trace: bool = False
    version: bool = False
    help: bool = False

    def take(self, option: _Option, value: str) -> None:
        """Keep one option of the command line."""
        if option.takes is _Takes.VALUES:
            getattr(self, option.dest).append(value)
        elif option.takes is _Takes.VALUE:
            setattr(self, option.dest, value)
        else:
            setattr(self, option.dest, option.takes is _Takes.NOTHING)


def build_parser() -> argparse.ArgumentParser:
    """Names, help and groups of the options, for the help and for those who compare it with the manual.

    Command lines are read by :func:`parse`.
    """
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=_USAGE,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, options in _GROUPS.items():
        group = parser.add_argument_group(title)
        if title == "elements":
            group.add_argument("elements", nargs="*", metavar="ELEMENT", help="such as debian-minimal, vm")
        for option in options:
            if option.wants_value:
                group.add_argument(*option.names, dest=option.dest, metavar=option.metavar, help=option.help)
            else:
                group.add_argument(*option.names, dest=option.dest, action="store_true", help=option.help)
    return parser


# ---- the words of the command line ----


class _Words:
    """Sorts the words of a command line into options and elements.

    As getopt_long_only does, which virt-dib has always used: options anywhere before ``--``, long
    ones shortened or with one dash, short ones joined, and the word after an option that wants a
    value is the value, whatever it looks like.
    """

    def __init__(self, arguments: Iterable[str]) -> None:
        self._rest = list(arguments)
        self.given = _Given()
        self.problems: list[Problem] = []

    def sort(self) -> None:
        """Take all words."""
        while self._rest:
            word = self._rest.pop(0)
            if word == "--":
                self.given.elements += self._rest
                self._rest.clear()
            elif word.startswith("--"):
                self._long(word)
            elif _has_one_dash(word):
                self._long("-" + word)
            elif word.startswith("-") and word != "-":
                self._short(word)
            else:
                self.given.elements.append(word)

    def _long(self, word: str) -> None:
        name, equals, value = word.partition("=")
        candidates = _long_names(name)
        if len(candidates) > 1:
            self.problems.append(Problem(f"option '{name}' could be any of {', '.join(candidates)}", "write it out"))
        elif not candidates:
            self._unknown(name, has_value=bool(equals))
        elif _BY_NAME[candidates[0]].wants_value:
            self._with_value(candidates[0], value if equals else None)
        elif equals:
            self.problems.append(Problem(f"option '{candidates[0]}' takes no value, not '{value}'"))
        else:
            self.given.take(_BY_NAME[candidates[0]], "")

    def _short(self, word: str) -> None:
        for position, letter in enumerate(word[1:], 2):
            option = _BY_NAME.get(f"-{letter}")
            if option is None:
                # '-fromats' is a slip for '--formats'; of '-qX' only the X is unknown.
                self._unknown(word if position == 2 else f"-{letter}", has_value=False)  # noqa: PLR2004 - the first
                return
            if option.wants_value:
                self._with_value(f"-{letter}", word[position:] or None)
                return
            self.given.take(option, "")

    def _with_value(self, name: str, value: str | None) -> None:
        if value is not None:
            self.given.take(_BY_NAME[name], value)
        elif self._rest:
            self.given.take(_BY_NAME[name], self._rest.pop(0))
        else:
            self.problems.append(Problem(f"option '{name}' needs a value", f"{name} {_BY_NAME[name].metavar}"))

    def _unknown(self, name: str, *, has_value: bool) -> None:
        word = name if name.startswith("--") else f"-{name}"
        # A single letter is close to anything.
        meant = _closest(word, _BY_NAME) if len(name) > len("-x") else None
        if meant and _BY_NAME[meant].wants_value and not has_value and self._rest:
            # Its value is no element.
            del self._rest[0]
        hint = f"did you mean '{meant}'?" if meant else f"'{PROG} --help' lists all options"
        self.problems.append(Problem(f"unknown option '{name}'", hint))


def _has_one_dash(word: str) -> bool:
    """Whether *word* is a long option, such as ``-formats``, rather than short ones in one."""
    name = word.partition("=")[0]
    return name.startswith("-") and len(name) > len("-x") and bool(_long_names(f"-{name}"))


def _long_names(beginning: str) -> list[str]:
    """The long options meant by *beginning*: the one of that name, or all that begin so."""
    if beginning in _BY_NAME:
        return [beginning]
    return [name for name in _BY_NAME if name.startswith("--") and name.startswith(beginning)]


def _closest(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(known), 1)), None)


# ---- values ----


def parse(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> CommandLine:
    """Read the command line *arguments*; *environment* (the process's own) gives --envvar NAME its values.

    What is wrong is in the result's problems, not raised, so that it can be told together with what
    turns out to be wrong later.
    """
    environ = os.environ if environment is None else environment
    words = _Words(arguments)
    words.sort()
    given = words.given
    values = _Values(words.problems)
    options = Options(
        quiet=given.quiet,
        verbose=given.verbose,
        trace=given.trace,
        kvm=values.take(lambda: _kvm(given.kvm, environ), "auto"),
        isolation=values.take(lambda: _isolation(given.isolation, environ), Isolation.VM),
        answer=_answer(given),
    )
    spec = _spec(given, values, environ, tuple(arguments))
    return CommandLine(spec=spec, options=options, problems=tuple(values.problems))


class _Values:
    """Takes values, and keeps what is wrong with them."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)

    def take(self, read: Callable[[], _T], default: _T) -> _T:
        """What *read* returns, or *default* when the user wrote something else than it wants."""
        try:
            return read()
        except UsageError as error:
            self.problems += error.problems
            return default


def _spec(given: _Given, values: _Values, environ: Mapping[str, str], arguments: tuple[str, ...]) -> BuildSpec:
    output_dir, name = values.take(lambda: _name(given.name), (Path(), _DEFAULT_NAME))
    nothing: dict[str, str] = {}
    default_size: int | None = DEFAULT_SIZE_BYTES
    variables = values.take(lambda: _variables(given.envvars, environ), nothing)

    def asked(option: str | None, variable: str) -> str | None:
        """The option, or where there is none the variable that means the same to diskimage-builder."""
        return option if option is not None else variables.get(variable) or None

    asked_fs_type = asked(given.fs_type, "FS_TYPE")
    fs_type = values.take(lambda: _choice("file system", asked_fs_type, tuple(LABEL_LIMITS), _DEFAULT_FS_TYPE), "")
    root_label = values.take(lambda: _label(asked(given.root_label, "ROOT_LABEL"), fs_type), None)
    debug = asked(given.debug, "DIB_DEBUG_TRACE")
    return BuildSpec(
        name=name,
        output_dir=output_dir,
        elements=values.take(lambda: _elements(given.elements), ()),
        element_paths=values.take(lambda: _paths("--element-path", given.element_paths), ()),
        dib_library=values.take(lambda: _path("-B", given.dib_library), None),
        formats=values.take(lambda: _formats(given.formats), ("qcow2",)),
        size_bytes=values.take(lambda: _size(given.size, variables), default_size),
        arch=values.take(lambda: _arch(asked(given.arch, "ARCH")), host_arch()),
        variables=variables,
        debug_level=values.take(lambda: _number("debug level", debug, 0, _MAX_DEBUG_LEVEL), None) or 0,
        memory_mib=values.take(
            lambda: _number("memory size in MB", given.memory, _MIN_MEMORY_MIB, _MAX_MEMORY_MIB), None
        ),
        cpus=values.take(lambda: _number("number of processors", given.cpus, 1, _MAX_CPUS), None),
        network=given.network,
        root_label=root_label if fs_type else None,
        fs_type=fs_type or _DEFAULT_FS_TYPE,
        mkfs_options=given.mkfs_options or "",
        extra_packages=tuple(_comma_list(",".join(given.extra_packages))),
        skip_base=given.skip_base,
        install_type=values.take(
            lambda: _choice("install type", given.install_type, _INSTALL_TYPES, "source"), "source"
        ),
        excluded_elements=values.take(lambda: _names("--exclude-element", given.excluded_elements), frozenset()),
        excluded_scripts=values.take(lambda: _names("--exclude-script", given.excluded_scripts), frozenset()),
        delete_on_failure=not given.keep_on_failure,
        compress=not given.uncompressed,
        qemu_img_options=given.qemu_img_options or "",
        arguments=arguments,
    )


def host_arch() -> str:
    """This host's architecture in Debian's words, as DIB derives ARCH (contract section 1.5)."""
    machine = platform.machine()
    if machine.startswith("armv"):
        return "armhf"
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def _answer(given: _Given) -> str | None:
    if given.help:
        return build_parser().format_help()
    return f"{PROG} {__version__}\n" if given.version else None


def _elements(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        raise UsageError(
            "no element named",
            hint=f"name at least an operating system, such as: {PROG} --name debian debian-minimal vm",
        )
    if "" in names:
        raise UsageError("cannot use an empty element name", hint="is a shell variable on the command line unset?")
    return tuple(names)


def _name(text: str | None) -> tuple[Path, str]:
    """The directory and the name of ``--name``."""
    if text is None:
        return Path(), _DEFAULT_NAME
    directory, base = os.path.split(text)
    if not base.isprintable() or base in ("", ".", "..") or base.startswith("-"):
        raise UsageError(
            f"cannot use '{text}' as the name of the image",
            hint="give a file name that is not empty, '.' or '..', does not begin with '-' "
            "and has no control characters; a directory may stand before it",
        )
    if "\0" in directory or not Path(directory).is_dir():
        raise UsageError(
            f"cannot write '{text}': '{directory}' is not a directory",
            hint=f"make it first: mkdir -p '{directory}'",
        )
    return Path(directory), base


def _formats(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ("qcow2",)
    names = _comma_list(text)
    if not names:
        raise UsageError("no format named in --formats", hint=f"choose from {', '.join(formats.KNOWN)}")
    return tuple(dict.fromkeys(_each(names, lambda name: formats.select([name])[0].name)))


def _variables(items: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in _each(items, lambda item: _variable(item, environ)) if value is not None}


def _variable(item: str, environ: Mapping[str, str]) -> tuple[str, str | None]:
    name, equals, value = item.partition("=")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise UsageError(
            f"cannot use '{name}' as the name of a variable in --envvar",
            hint="give NAME or NAME=VALUE, the name of letters, digits and underscores, no digit first",
        )
    if name in _VARIABLES_OF_BASH:
        raise UsageError(f"cannot set the variable '{name}' for elements: it is bash's own and read-only")
    if "\0" in value:
        raise UsageError(f"cannot set the variable '{name}' to a value with a NUL in it")
    return name, value if equals else environ.get(name)


def _kvm(text: str | None, environ: Mapping[str, str]) -> str:
    if text is not None:
        return _choice("value of --kvm", text, kvm.SETTINGS, "auto")
    return kvm.wanted_from_environment(environ)


def _isolation(text: str | None, environ: Mapping[str, str]) -> Isolation:
    what = "value of --isolation"
    if text is None and environ.get(ISOLATION_VARIABLE):
        what, text = f"value of the variable {ISOLATION_VARIABLE}", environ[ISOLATION_VARIABLE]
    return Isolation(_choice(what, text, [one.value for one in Isolation], Isolation.VM.value))


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


def _arch(text: str | None) -> str:
    if text is None:
        return host_arch()
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", text):
        raise UsageError(f"cannot use '{text}' as an architecture", hint="give a name such as amd64 or arm64")
    return text


def _path(option: str, text: str | None) -> Path | None:
    if text is not None and (not text or "\0" in text):
        raise UsageError(f"cannot use '{text}' as the directory of {option}", hint="give an existing directory")
    return None if text is None else Path(text)


def _paths(option: str, texts: Sequence[str]) -> tuple[Path, ...]:
    return tuple(_each(texts, lambda text: _path(option, text)))


def _names(option: str, texts: Sequence[str]) -> frozenset[str]:
    if "" in texts:
        raise UsageError(f"cannot use an empty name for {option}", hint="is a shell variable unset?")
    return frozenset(texts)


def _choice(what: str, text: str | None, known: Sequence[str], default: str) -> str:
    if text is None or text in known:
        return default if text is None else text
    meant = _closest(text, known)
    raise UsageError(
        f"unknown {what} '{text}'",
        hint=(f"did you mean '{meant}'? " if meant else "") + f"choose from {', '.join(known)}",
    )


def _number(what: str, text: str | None, least: int, most: int) -> int | None:
    if text is None:
        return None
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


# ---- the program ----


def report_errors(prog: str, body: Callable[[], int]) -> int:
    """Run *body* and return its exit status, or print the error that ended it and return the error's."""
    try:
        return body()
    except VirtDibError as error:
        for problem in error.problems:
            _complain(prog, "error", problem.message, _RED)
            for line in problem.details:
                write_out(sys.stderr, f"    {printable(line)}\n")
            if problem.hint:
                _complain(prog, "hint", problem.hint, None)
        return error.exit_status
    except (Interrupted, KeyboardInterrupt):
        _complain(prog, "interrupted", "", None)
        return Interrupted.exit_status


def _complain(prog: str, kind: str, text: str, colour: str | None) -> None:
    line = f"{prog}: {kind}: {printable(text)}" if text else f"{prog}: {kind}"
    if colour and wants_colour(sys.stderr):
        line = coloured(line, colour)
    write_out(sys.stderr, line + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``virt-dib`` with the arguments *argv* (those of the process) and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    return report_errors(PROG, lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> int:
    command = parse(arguments)
    if command.options.answer is not None:
        write_out(sys.stdout, command.options.answer)
        return 0
    if not command.spec.elements:
        # Nothing to plan with, and the plan would only say so again.
        raise UsageError.of(command.problems)
    with interrupts():
        report = _build(command)
        if not command.options.quiet:
            write_out(sys.stdout, "\n" + summary(report))
    return 0


def _build(command: CommandLine) -> BuildReport:
    from virt_dib import builder  # noqa: PLC0415 - --help and --version need none of it, and it is slow

    options = command.options
    return builder.build_image(
        command.spec,
        problems=command.problems,
        options=builder.RunOptions(
            isolation=options.isolation, kvm=options.kvm, trace=options.trace or options.verbose
        ),
        open_monitor=lambda log_path, total_phases: BuildMonitor(
            log_path=log_path,
            stream=sys.stdout,
            quiet=options.quiet,
            verbose=options.verbose,
            total_phases=total_phases,
        ),
    )
