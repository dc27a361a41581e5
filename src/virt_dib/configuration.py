# SPDX-License-Identifier: Apache-2.0
"""Settings that are not on the command line: ``VIRT_DIB_*`` variables and configuration files.

They are for callers whose command lines cannot be changed, and for what is the same in all builds on a host. Of two
that set the same thing, the first one counts: the command line, a variable, the user's file, the system's files,
the default (docs/configuration.md). :func:`settings` finds them, :func:`apply` fills in what the command line did not
give, and from then on a value is checked as one of the command line is.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from virt_dib import kvm, ownership
from virt_dib.errors import Problem, UsageError
from virt_dib.files import read_any
from virt_dib.options import BY_NAME, GROUPS, OFFERS, PROG, Given, Offer, Takes, closest
from virt_dib.plain_text import printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "VIRT_DIB_"
FILE_VARIABLE = f"{PREFIX}CONFIG"
ENVIRONMENT_VARIABLE = f"{PREFIX}ENVIRONMENT"
_LIBGUESTFS_MEMORY = "LIBGUESTFS_MEMSIZE"
"""For the drop-ins alone (docs/drop-in.md): where there is no environment to pass on, it means nothing."""
_FILE_KEY = "config"
COMMAND_LINE = "command line"
DEFAULT = "default"
_PLACE = Path("virt-dib", "config.toml")
_LONGEST_FILE_BYTES = 1 << 16
_NAME_IT_HINT = "or name it, if it is what you want: --config FILE"
_DESTINATIONS = frozenset({
    "dib_library", "python", "isolation", "extra_data", "memory", "cpus", "network", "host_certificates", "kvm",
    "drive", "drive_format", "image_cache", "compression", "timeout", "script_timeout",
})  # fmt: skip
"""What can be set so: how and with what builds run on a host, not what is built.

The same command line is to make the same image for another user, so names, elements and where they are searched for,
sizes, formats and variables are not among them. Nor is what a command line could not take back, such as ``--quiet``.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """An option that can be set elsewhere, too."""

    dest: str
    key: str
    """In files: the long name of the option, the one that says yes."""

    @property
    def variable(self) -> str:
        """The variable that sets it."""
        return _variable(self.key)

    @property
    def is_path(self) -> bool:
        """Whether it names a file or directory; a Python may also be a name that is searched on the PATH."""
        return OFFERS.get(self.dest) in (Offer.FILE, Offer.DIRECTORY)


def _variable(key: str) -> str:
    return PREFIX + key.upper().replace("-", "_")


def _settings() -> Iterator[Setting]:
    for dest in dict.fromkeys(option.dest for options in GROUPS.values() for option in options):
        if dest in _DESTINATIONS:
            yes = [option for option in BY_NAME.values() if option.dest == dest and option.takes is not Takes.OFF]
            key = next(name[2:] for option in yes for name in option.names if name.startswith("--"))
            yield Setting(dest=dest, key=key)


SETTINGS = tuple(_settings())
_BY_KEY = {setting.key: setting for setting in SETTINGS}
_BY_VARIABLE = {setting.variable: setting for setting in SETTINGS}


@dataclass(frozen=True, slots=True)
class Value:
    """A value as written, and where: the name of a variable, or ``FILE:LINE``."""

    text: str
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What was found for one command."""

    values: Mapping[str, Value] = field(default_factory=dict)
    """By destination."""
    problems: tuple[Problem, ...] = ()
    files: Mapping[str, bool] = field(default_factory=dict)
    """Those that were looked for, in their order, and whether they are there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InForce:
    """A setting as it is when all places have been looked at; no text where it is not set at all."""

    key: str
    text: str | None
    origin: str


def settings(environ: Mapping[str, str], config: str | None = None) -> Settings:
    """What *environ* and the files set; *config* is the value of ``--config``.

    A variable or key that is not known is a problem, not a warning: it may be a slip for ``network`` or
    ``isolation``, and a build with less around it than was asked for is worse than none.
    """
    search = _Search(environ)
    search.look_at_variables()
    search.look_at_files(config)
    search.look_at_libguestfs()
    return Settings(values=search.values, problems=tuple(search.problems), files=search.files)


def apply(given: Given, found: Settings) -> Mapping[str, str]:
    """Set in *given* what the command line did not; returns where each setting is from, by destination."""
    origins = {}
    for setting in SETTINGS:
        value = found.values.get(setting.dest)
        if getattr(given, setting.dest) is not None:
            origins[setting.dest] = COMMAND_LINE
        elif value is not None:
            setattr(given, setting.dest, value.text)
            origins[setting.dest] = value.origin
        else:
            origins[setting.dest] = DEFAULT
    return origins


def placed(origin: str, problem: Problem) -> Problem:
    """*problem* with the place of the value, unless that is the command line."""
    if origin in (COMMAND_LINE, DEFAULT):
        return problem
    return Problem(f"in {origin}: {problem.message}", problem.hint, problem.details)


def put_in_order(problems: list[Problem], found: Settings) -> None:
    """Have those of the *problems* that are in files come by file and line, in the places that they have together."""
    files = {file: number for number, file in enumerate(found.files)}
    where = re.compile(rf"in ({'|'.join(map(re.escape, files))}):([0-9]+): ")
    placed_at = {
        number: at for number, problem in enumerate(problems) if files and (at := where.match(problem.message))
    }
    by_line = sorted(placed_at, key=lambda number: (files[placed_at[number][1]], int(placed_at[number][2])))
    for place, problem in zip(placed_at, [problems[number] for number in by_line], strict=True):
        problems[place] = problem


def explained(problems: Iterable[Problem], rows: Sequence[InForce]) -> tuple[Problem, ...]:
    """*problems* of a build, each with the places of the settings it speaks of, by an option or a path.

    Who reads them may not have written these, or not now.
    """
    elsewhere = [row for row in rows if row.origin not in (COMMAND_LINE, DEFAULT)]
    found = []
    for problem in problems:
        places = [f"{row.key}: {row.origin}" for row in elsewhere if _speaks_of(problem.message, row)]
        found.append(replace(problem, details=(*problem.details, *places)))
    return tuple(found)


def _speaks_of(message: str, row: InForce) -> bool:
    if message.startswith(f"in {row.origin}: "):
        # It is told already.
        return False
    setting = _BY_KEY[row.key]
    names = [re.escape(name) for name, option in BY_NAME.items() if option.dest == setting.dest]
    pattern = rf"(?<![\w-])({'|'.join(names)})(?![\w-])"
    if setting.is_path and row.text is not None:
        pattern += rf"|'{re.escape(row.text)}['/]"
    return re.search(pattern, message) is not None


def table(rows: Iterable[InForce], found: Settings) -> str:
    """What ``--show-config`` prints: keys, values and origins below each other, then the files."""
    cells = [(row.key, "-" if row.text is None else printable(row.text), row.origin) for row in rows]
    key_width, text_width = (max(len(cell[column]) for cell in cells) for column in (0, 1))
    lines = [f"{key.ljust(key_width)}  {text.ljust(text_width)}  {printable(origin)}" for key, text, origin in cells]
    lines += ["", *(f"{'read' if there else 'not there'}: {printable(file)}" for file, there in found.files.items())]
    return "\n".join(lines).rstrip() + "\n"


class _Search:
    """Looks at one place after the other; what an earlier one has set stays."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.values: dict[str, Value] = {}
        self.problems: list[Problem] = []
        self.files: dict[str, bool] = {}

    def look_at_variables(self) -> None:
        """Take all that are set and not empty."""
        try:
            forced = kvm.forced_by_libguestfs(self._environ)
        except UsageError as error:
            self.problems += error.problems
        else:
            if forced is not None:
                self.values["kvm"] = Value(forced, kvm.LIBGUESTFS_VARIABLE)
        for name, text in self._environ.items():
            if not name.startswith(PREFIX) or not text or name in (FILE_VARIABLE, ENVIRONMENT_VARIABLE):
                continue
            if name in _BY_VARIABLE:
                self.values.setdefault(_BY_VARIABLE[name].dest, Value(text, name))
            else:
                self.problems.append(_unknown_variable(name))

    def look_at_files(self, config: str | None) -> None:
        """Take the one that the user names, or else those in the places for them."""
        if config == "":
            self.problems.append(Problem("cannot use an empty name for --config", "is a shell variable unset?"))
            return
        named = config if config is not None else self._environ.get(FILE_VARIABLE) or None
        named_by = None if named is None else "--config" if config is not None else FILE_VARIABLE
        files = _places(self._environ) if named is None else [Path(named)]
        for file in files:
            try:
                text = _read(file, named_by=named_by)
                self.files[str(file)] = text is not None
                if text is not None:
                    self._take(file, text)
            except UsageError as error:
                self.problems += error.problems

    def look_at_libguestfs(self) -> None:
        """Take what its own variable says; --kvm has one, too, which is looked at first."""
        memory = self._environ.get(_LIBGUESTFS_MEMORY)
        if memory:
            self.values.setdefault("memory", Value(memory, _LIBGUESTFS_MEMORY))

    def _take(self, file: Path, text: str) -> None:
        content = _parse(file, text)
        lines = _lines(text) if content else {}
        for key, value in content.items():
            origin = f"{file}:{lines.get(key, 1)}"
            if key not in _BY_KEY:
                self.problems.append(placed(origin, _unknown_key(key)))
                continue
            try:
                written = self._written(file, _BY_KEY[key], value)
            except UsageError as error:
                self.problems += [placed(origin, problem) for problem in error.problems]
            else:
                self.values.setdefault(_BY_KEY[key].dest, Value(written, origin))

    def _written(self, file: Path, setting: Setting, value: object) -> str:
        """The value of a key as it would be on the command line."""
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int):
            return str(value)
        if not isinstance(value, str):
            raise UsageError(
                f"cannot use this as '{setting.key}': it is neither text nor a whole number, true or false",
                hint="put it in quotes, if it is text",
            )
        if not value or not setting.is_path or (setting.dest == "python" and "/" not in value):
            return value
        if value == "~" or value.startswith("~/"):
            home = self._environ.get("HOME")
            if not home:
                raise UsageError(
                    f"cannot use '{value}' as '{setting.key}': HOME is not set", hint="set HOME, or write the path out"
                )
            return home + value[1:]
        return os.path.join(os.path.dirname(os.path.abspath(file)), value)


# ---- files ----


def _places(environ: Mapping[str, str]) -> list[Path]:
    """Where files are looked for (XDG base directory specification): the user's, then the system's."""
    home = environ.get("HOME") or ""
    user = environ.get("XDG_CONFIG_HOME") or ""
    if not os.path.isabs(user):
        user = os.path.join(home, ".config")
    system = environ.get("XDG_CONFIG_DIRS") or "/etc/xdg"
    # The specification has relative ones ignored.
    directories = [directory for directory in (user, *system.split(":")) if os.path.isabs(directory)]
    return [directory / _PLACE for directory in dict.fromkeys(map(Path, directories))]


def _read(file: Path, *, named_by: str | None) -> str | None:
    """The text of a file, or None where there is none and nobody named it, by an option or a variable.

    Raises:
        UsageError: it cannot be read, or somebody else may have written what was found there.
    """
    try:
        content = read_any(
            file, _LONGEST_FILE_BYTES, accept=lambda state: _require_trust(file, state) if named_by is None else None
        )
    except (OSError, ValueError) as error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)) and named_by is None:
            return None
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        reason = reason[:1].lower() + reason[1:]
        raise UsageError(
            f"cannot read the configuration file '{file}': {reason}",
            hint=f"{named_by} names it; name one that can be read"
            if named_by
            else "make it readable, or name another one: --config FILE",
        ) from error
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"in {file}:{line}: this is not UTF-8", hint="save the file as UTF-8") from error


def _require_trust(file: Path, state: os.stat_result) -> None:
    """As ssh does with its own: who can write there decides which programs run, and in what isolation.

    What the user names is the user's choice.
    """
    if ownership.is_foreign(state):
        raise UsageError(
            f"cannot trust the configuration file '{file}': it belongs to another user",
            hint=f"take it over (chown), {_NAME_IT_HINT}",
        )
    if ownership.others_can_write(file, state):
        raise UsageError(
            f"cannot trust the configuration file '{file}': others can write to it",
            hint=f"chmod go-w {shlex.quote(str(file))}; {_NAME_IT_HINT}",
        )


def _parse(file: Path, text: str) -> Mapping[str, object]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        twice = _is_there_twice(text, error)
        if twice is not None:
            key, line = twice
            raise UsageError(f"in {file}:{line}: '{key}' is set twice", hint="take one of them out") from error
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        at = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", reason)
        place = f"{file}:{at[1] or text.count(chr(10)) + 1}" if at else str(file)
        reason = reason[: at.start()] if at else reason
        raise UsageError(
            f"in {place}: this is not TOML: {reason}",
            hint='a setting is a line such as isolation = "sandbox"',
        ) from error


def _is_there_twice(text: str, error: Exception) -> tuple[str, int] | None:
    """The key and the line where the parser has met a key again, if that is its *error*."""
    at = re.fullmatch(r"Cannot overwrite a value \(at (?:line (\d+), column \d+|end of document)\)", str(error))
    if at is None:
        return None
    lines = text.split("\n")[: int(at[1]) if at[1] else None]
    # It has read the value, which may have several lines, or be the last thing in the file.
    keys = ((re.match(r"\s*[\"']?([\w-]+)[\"']?\s*=", line), number) for number, line in enumerate(lines, 1))
    return next(((key[1], number) for key, number in reversed(list(keys)) if key is not None), None)


def _lines(text: str) -> Mapping[str, int]:
    """The line that each key of the file begins on, which the parser does not tell; *text* is good TOML.

    A statement ends with the first line that completes it, and each is one to the parser when it stands alone.
    """
    found: dict[str, int] = {}
    statement, start, in_table = "", 1, False
    for number, line in enumerate(text.split("\n"), 1):
        if not statement:
            start = number
        elif not any(end in line for end in ("]", "}", '"""', "'''")):
            # Still in a list or text: to try each of its lines would take the square of their time.
            statement += f"{line}\n"
            continue
        statement += f"{line}\n"
        try:
            keys = tomllib.loads(statement)
        except ValueError:
            continue
        is_header = statement.lstrip().startswith("[")
        if is_header or not in_table:
            found = dict.fromkeys(keys, start) | found
        in_table = in_table or is_header
        statement = ""
    return found


# ---- names that are not known ----


def _unknown_variable(name: str) -> Problem:
    key = name.removeprefix(PREFIX).lower().replace("_", "-")
    meant = _meant(key) or closest(key, [_FILE_KEY])
    return Problem(f"unknown variable {name}", _hint(key, meant and _variable(meant)))


def _unknown_key(key: str) -> Problem:
    return Problem(f"unknown setting '{key}'", _hint(key.replace("_", "-"), _meant(key)))


def _hint(key: str, meant: str | None) -> str:
    option = BY_NAME.get(f"--{key}")
    if option is not None and option.dest not in _DESTINATIONS:
        return f"give it with each build: {option.names[-1]}"
    return f"did you mean '{meant}'?" if meant else f"'{PROG} --show-config' lists what can be set"


def _meant(word: str) -> str | None:
    """The key that was probably meant, whatever its option is called in the code and in the API."""
    keys = {setting.dest: setting.key for setting in SETTINGS} | {key: key for key in _BY_KEY}
    found = closest(word, keys)
    return None if found is None else keys[found]
