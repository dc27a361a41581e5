# SPDX-License-Identifier: Apache-2.0
"""Files that describe images, as diskimage-builder's command of that name reads them: YAML to ImageRequests.

A file is a list of entries. Entries with the same ``imagename``, in all files, are one image; one without continues
the image before it. What is wrong in any of the files is told together, each thing with its file, line and key.
"""

from __future__ import annotations

import collections
import enum
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import yaml

from virt_dib import masking
from virt_dib.errors import Problem, UsageError
from virt_dib.files import read_any
from virt_dib.options import closest

_T = TypeVar("_T")
_P = ParamSpec("_P")

DEFAULT_NAME = "image"
_LONGEST_BYTES = 4 << 20
"""Of a file, and of what it says when its aliases are followed, which could be without end."""
_PAIR_BYTES = 16
"""What a key that is merged counts, whatever its value."""
_LARGEST = 1 << 53
_MOST_PROBLEMS = 100
_SHOWN = 60
_TAG = "tag:yaml.org,2002:"
_BROKEN = (yaml.YAMLError, ValueError, LookupError, ArithmeticError, AttributeError, TypeError)
"""What PyYAML raises for ``!!int x``, ``!!bool x``, ``!!timestamp x`` and their like."""


class Kind(enum.Enum):
    """What a key wants, in words for messages; what becomes of it is in :func:`_words`."""

    TEXT = "a text"
    FLAG = "true or false"
    COUNT = "a whole number"
    WHOLE = "a whole number of 1 or more"
    LIST = "a list of texts"
    ELEMENTS = "a list of names of elements"
    PAIRS = "a map of texts"
    ENVIRONMENT = "a map of variables and their texts"


@dataclass(frozen=True, slots=True)
class Key:
    """One key of an entry."""

    name: str
    kind: Kind
    text: str
    """What it is for, for the help."""
    option: str | None = None
    """The option of disk-image-create that it becomes."""
    choices: tuple[str, ...] = ()


_ARCHES = ("aarch64", "amd64", "arm64", "armhf", "powerpc", "ppc64", "ppc64el", "ppc64le", "s390x", "x86_64")
_TYPES = ("qcow2", "tar", "tgz", "squashfs", "vhd", "docker", "aci", "raw")

KEYS = (
    Key("imagename", Kind.TEXT, "name of the image and its files; the same in two entries: one image", "-o"),
    Key("arch", Kind.TEXT, "architecture of the image", "-a", _ARCHES),
    Key("types", Kind.LIST, "formats to write; there is no aci here", "-t", _TYPES),
    Key("environment", Kind.ENVIRONMENT, "variables for this build"),
    Key("ramdisk", Kind.FLAG, "make a ramdisk and its kernel, no image"),
    Key("debug-trace", Kind.COUNT, "how much scripts trace, 0 nothing", "-x", ("0", "1", "2")),
    Key("uncompressed", Kind.FLAG, "do not compress qcow2 images", "-u"),
    Key("clear", Kind.FLAG, "start from an empty environment", "-c"),
    Key("logfile", Kind.TEXT, "file that gets what the build prints, too", "--logfile"),
    Key("checksum", Kind.FLAG, "write MD5 and SHA256 beside each file", "--checksum"),
    Key("image-size", Kind.WHOLE, "size of the disk in GiB", "--image-size"),
    Key("image-extra-size", Kind.WHOLE, "MiB to add to the size that the tree needs", "--image-extra-size"),
    Key("image-cache", Kind.TEXT, "directory for what elements cache", "--image-cache"),
    Key("max-online-resize", Kind.WHOLE, "blocks that the file system may grow to later", "--max-online-resize"),
    Key("min-tmpfs", Kind.WHOLE, "has no meaning here", "--min-tmpfs"),
    Key("mkfs-journal-size", Kind.WHOLE, "size of the journal in MiB", "--mkfs-journal-size"),
    Key("mkfs-options", Kind.TEXT, "options for mkfs", "--mkfs-options"),
    Key("no-tmpfs", Kind.FLAG, "has no meaning here", "--no-tmpfs"),
    Key("offline", Kind.FLAG, "elements use what they have in their cache", "--offline"),
    Key("qemu-img-options", Kind.PAIRS, "options for qemu-img and their values", "--qemu-img-options"),
    Key("root-label", Kind.TEXT, "label of the root file system", "--root-label"),
    Key("ramdisk-element", Kind.TEXT, "the element that makes the ramdisk", "--ramdisk-element"),
    Key("install-type", Kind.TEXT, "what elements install from", "--install-type", ("source", "package")),
    Key("docker-target", Kind.TEXT, "repository and tag for the format docker", "--docker-target"),
    Key("packages", Kind.LIST, "packages to install besides", "-p"),
    Key("skip-base", Kind.FLAG, "do not add the element 'base'", "-n"),
    Key("elements", Kind.ELEMENTS, "the elements to build of"),
)
"""In the order in which diskimage-builder writes them on the command line."""
_BY_NAME = {key.name: key for key in KEYS}

Value = str | bool | int | float | Sequence[str] | Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRequest:
    """One image of the files, merged: how disk-image-create or ramdisk-image-create is to be called for it."""

    name: str
    ramdisk: bool
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    """What is added to the environment, not all of it."""
    logfile: str | None
    origin: str
    """``FILE:LINE`` where it begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """What files describe."""

    requests: tuple[ImageRequest, ...]
    """In the order of their first entries."""
    warnings: tuple[str, ...] = ()
    """Where diskimage-builder would have made something else of them."""
    problems: tuple[Problem, ...] = ()
    """All that is wrong; then the requests lack what it is about."""


def read(paths: Sequence[Path]) -> Images:
    """The images that the files *paths* describe together.

    Raises:
        UsageError: all that is wrong in all of them.
    """
    images = look_through(paths)
    if images.problems:
        raise UsageError.of(images.problems)
    return images


def look_through(paths: Sequence[Path]) -> Images:
    """As :func:`read`, with all that is wrong in the result, and what can be read in spite of it."""
    problems: list[Problem] = []
    entries: list[_Entry] = []
    for path in paths:
        try:
            file = _File(path, _text(path))
            entries += file.entries()
            problems += file.problems()
        except UsageError as error:
            problems += error.problems
    rest = len(problems) - _MOST_PROBLEMS
    more = [Problem(f"{rest} more mistakes in these files", "mend the first ones first")] if rest > 0 else []
    merged = _Merged(entries)
    return Images(
        requests=tuple(merged.requests()),
        warnings=tuple(merged.warnings),
        problems=(*problems[:_MOST_PROBLEMS], *more),
    )


# ---- from entries to images ----


@dataclass(frozen=True, slots=True)
class _Entry:
    origin: str
    values: Mapping[str, Value]


class _Merged:
    """Entries by image: lists grow, maps get what is new or changed, all else is replaced.

    What an image has is its own. For diskimage-builder a list that several entries have by an alias is one list, and
    what one of them adds, the others get; where that may be, there is a warning.
    """

    def __init__(self, entries: Sequence[_Entry]) -> None:
        self.warnings: list[str] = []
        # An alias of a value is the same object.
        self._uses = collections.Counter(id(value) for entry in entries for value in entry.values.values())
        self._shared: set[tuple[str, str]] = set()
        self._origins: dict[str, str] = {}
        self._images: dict[str, dict[str, Value]] = {}
        name = DEFAULT_NAME
        for entry in entries:
            name = str(entry.values.get("imagename", name))
            self._origins.setdefault(name, entry.origin)
            image = self._images.setdefault(name, {})
            for key, value in entry.values.items():
                self._add(name, image, key, value, entry.origin)

    def _add(self, name: str, image: dict[str, Value], key: str, value: Value, origin: str) -> None:
        before = image.get(key)
        if isinstance(value, str) or not isinstance(value, (Mapping, Sequence)):
            image[key] = value
        elif before is None:
            image[key] = dict(value) if isinstance(value, Mapping) else list(value)
            if self._uses[id(value)] > 1:
                self._shared.add((name, key))
        else:
            if isinstance(before, dict) and isinstance(value, Mapping):
                before.update(value)
            elif isinstance(before, list):
                before.extend(value)
            if (name, key) in self._shared:
                self._shared.remove((name, key))
                self._warn(
                    f"{origin}: adding to '{key}' of '{name or DEFAULT_NAME}' alone; diskimage-builder would add to "
                    "all that have the same list or map by an alias"
                )

    def _warn(self, text: str) -> None:
        self.warnings.append(text)

    def requests(self) -> Iterator[ImageRequest]:
        """The images."""
        for name, values in self._images.items():
            environment = values.get("environment", {})
            words = (word for key in KEYS if key.name in values for word in _words(key, values[key.name]))
            yield ImageRequest(
                # One of no name gets no -o, and so disk-image-create's default.
                name=name or DEFAULT_NAME,
                ramdisk=bool(values.get("ramdisk")),
                arguments=tuple(words),
                environment=dict(environment) if isinstance(environment, Mapping) else {},
                logfile=str(values.get("logfile", "")) or None,
                origin=self._origins[name],
            )


def _words(key: Key, value: Value) -> list[str]:
    """What *key* is on the command line; nothing for an empty text, list or map, as with diskimage-builder."""
    if key.kind is Kind.ELEMENTS and isinstance(value, Sequence):
        return list(value)
    if key.option is None:
        return []
    if key.kind is Kind.FLAG:
        return [key.option] if value else []
    if key.kind is Kind.COUNT and isinstance(value, (int, float)):
        return [key.option] * int(value)
    if isinstance(value, Mapping):
        text = ",".join(f"{name}={word}" for name, word in value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        text = ",".join(value)
    else:
        text = str(value)
    return [key.option, text] if text else []


# ---- from a file to entries ----


def _text(path: Path) -> str:
    try:
        data = read_any(path, _LONGEST_BYTES)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "there cannot be such a file"
        raise UsageError(f"reading '{path}': {why}", hint="name a file of images that you can read") from error
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8", hint="write it in UTF-8; YAML is text") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


@dataclass(frozen=True, slots=True)
class _Pair:
    key: yaml.Node
    value: yaml.Node


class _MistakeError(Exception):
    """Something in the file is wrong, but what stands beside it can be read."""

    def __init__(self, line: int, problem: Problem) -> None:
        super().__init__(problem.message)
        self.line = line
        self.problem = problem


class _TooMuchError(Exception):
    """Aliases stand for more than anybody means."""


class _File:
    """The entries of one file, checked node by node: nodes know their lines, values do not.

    A node is checked once, however many aliases stand for it, so that a file takes no more time than its length.
    """

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._content = text
        self._mistakes: list[_MistakeError] = []
        self._left = _LONGEST_BYTES
        self._maps: dict[yaml.Node, dict[str, _Pair]] = {}
        self._entries: dict[yaml.Node, tuple[_Entry | None, int]] = {}
        self._lists: dict[tuple[yaml.Node, Key], Sequence[str]] = {}
        self._texts: dict[tuple[yaml.Node, Key], Mapping[str, str]] = {}

    def entries(self) -> list[_Entry]:
        """All of them, without what is wrong in them.

        Raises:
            UsageError: it is not a list of entries at all.
        """
        root = self._root()
        if root is None or root.tag == _TAG + "null":
            raise UsageError(f"reading '{self._path}': it is empty", hint="write a list of images: - imagename: NAME")
        if not _is(root, yaml.SequenceNode, "seq"):
            raise UsageError(
                f"{self._at(root)}: {_told(root)} where a list of images belongs", hint="begin each image with '- '"
            )
        try:
            return [entry for node in root.value for entry in self._entry(node)]
        except RecursionError as error:
            raise self._too_deep() from error
        except _TooMuchError as error:
            raise UsageError(
                f"reading '{self._path}': with its aliases followed it is longer than {_LONGEST_BYTES >> 20} MiB",
                hint="use fewer aliases of long lists and maps",
            ) from error

    def problems(self) -> Sequence[Problem]:
        """What is wrong in the entries, by line."""
        return [mistake.problem for mistake in sorted(self._mistakes, key=lambda one: one.line)]

    def _root(self) -> yaml.Node | None:
        try:
            loader = yaml.SafeLoader(self._content)
            try:
                return loader.get_single_node()
            finally:
                loader.dispose()
        except yaml.MarkedYAMLError as error:
            raise UsageError.of([self._syntax_problem(error)]) from error
        except yaml.reader.ReaderError as error:
            line = self._content.count("\n", 0, error.position) + 1
            raise UsageError(
                f"{self._path}:{line}: not YAML: a character that is not allowed",
                hint='write it as an escape, in double quotes, such as "\\x07"',
            ) from error
        except RecursionError as error:
            raise self._too_deep() from error
        except (ValueError, ArithmeticError) as error:
            # Of an escape, or of the directive %YAML.
            raise UsageError(
                f"reading '{self._path}': not YAML: there is too large a number in it",
                hint='see the escapes; the last character is "\\U0010FFFF"',
            ) from error

    def _syntax_problem(self, error: yaml.MarkedYAMLError) -> Problem:
        hint = "see the quotes and the indentation there"
        mark = error.problem_mark or error.context_mark
        at = f"{self._path}:{mark.line + 1}" if mark else f"{self._path}"
        if error.problem == "but found another document":
            return Problem(f"{at}: a second document begins here", "write all images into one list, or several files")
        if error.problem and "'\\t'" in error.problem:
            hint = "indent with blanks, not with tabs"
        return Problem(f"{at}: not YAML: {error.problem or error.context}", hint)

    def _entry(self, node: yaml.Node) -> Iterator[_Entry]:
        if node not in self._entries:
            entry = self._taken(self._new_entry, node)
            self._entries[node] = entry, sum(map(_size, entry.values.values())) if entry else 0
        entry, size = self._entries[node]
        self._charge(size)
        if entry is not None:
            yield entry

    def _new_entry(self, node: yaml.Node) -> _Entry:
        values: dict[str, Value] = {}
        for name, pair in self._pairs(node, "the map of an image").items():
            value = self._taken(self._value, name, pair)
            if value is not None:
                values[name] = value
        return _Entry(self._at(node), values)

    # ---- maps ----

    def _pairs(self, node: yaml.Node, wanted: str) -> Mapping[str, _Pair]:
        """The keys of a map, those that it merges by ``<<`` first; *wanted* is what it is to be."""
        if not isinstance(node, yaml.MappingNode) or not _is(node, yaml.MappingNode, "map"):
            raise self._mistake(node, f"{_told(node)} where {wanted} belongs", "write NAME: VALUE, one on each line")
        if node in self._maps:
            return self._maps[node]
        # For one that merges itself.
        self._maps[node] = {}
        merged: dict[str, _Pair] = {}
        own: dict[str, _Pair] = {}
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                for source in self._sources(value):
                    found = self._taken(self._pairs, source, "a map to merge") or {}
                    self._charge(_PAIR_BYTES * len(found))
                    merged.update(found)
            elif (name := self._taken(self._new_name, key, own)) is not None:
                own[name] = _Pair(key, value)
        self._charge(_PAIR_BYTES * (len(merged) + len(own)))
        self._maps[node] = {**merged, **own}
        return self._maps[node]

    def _sources(self, node: yaml.Node) -> Iterator[yaml.Node]:
        """What ``<<`` merges, that which counts most last."""
        nodes = node.value if _is(node, yaml.SequenceNode, "seq") else [node]
        # Once is enough for each, and a list may have one very often.
        return reversed(dict.fromkeys(nodes))

    def _new_name(self, node: yaml.Node, before: Mapping[str, _Pair]) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag not in (_TAG + "str", _TAG + "value"):
            hint = f'put it in quotes: "{_cut(node.value)}"' if isinstance(node, yaml.ScalarNode) else "give it a name"
            raise self._mistake(node, f"{_told(node)} where the name of a key belongs", hint)
        name = str(node.value)
        if name in before:
            line = before[name].key.start_mark.line + 1
            raise self._mistake(
                node, f"key '{_cut(name)}' is there twice, first in line {line}", "take one of them out"
            )
        return name

    # ---- values ----

    def _value(self, name: str, pair: _Pair) -> Value:
        key = _BY_NAME.get(name)
        if key is None:
            meant = closest(name, _BY_NAME)
            hint = f"did you mean '{meant}'?" if meant else f"the keys are: {', '.join(_BY_NAME)}"
            raise self._mistake(pair.key, f"unknown key '{_cut(name)}'", hint)
        node = pair.value
        where = f"key '{name}'"
        if key.kind in (Kind.LIST, Kind.ELEMENTS):
            return self._list(key, where, node)
        if key.kind in (Kind.PAIRS, Kind.ENVIRONMENT):
            return self._map(key, where, node)
        if key.kind is Kind.TEXT:
            return self._one_text(node, where, key.choices)
        if key.kind is Kind.FLAG:
            return self._flag(key, where, node)
        return self._number(key, where, node)

    def _flag(self, key: Key, where: str, node: yaml.Node) -> bool:
        value = _constructed(node)
        if not isinstance(value, bool):
            raise self._refusal(node, where, key.kind, f"write {key.name}: true, or leave it out")
        return value

    def _number(self, key: Key, where: str, node: yaml.Node) -> float:
        value = _constructed(node)
        least = 1 if key.kind is Kind.WHOLE else 0
        # 10.0 is whole: for JSON, and so for diskimage-builder's schema, both are one number.
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not least <= value <= _LARGEST
            or value != int(value)
        ):
            quoted = isinstance(node, yaml.ScalarNode) and isinstance(value, str) and value.isdecimal()
            hint = "write it without quotes" if quoted else f"write it in digits, as in {key.name}: 2"
            raise self._refusal(node, where, key.kind, hint)
        if key.choices and str(int(value)) not in key.choices:
            raise self._mistake(node, f"{where} wants one of {', '.join(key.choices)}, not {value}", "take one of them")
        return value

    def _list(self, key: Key, where: str, node: yaml.Node) -> Sequence[str]:
        if not _is(node, yaml.SequenceNode, "seq"):
            hint = f"write it as a list: [{_cut(node.value)}]" if isinstance(node, yaml.ScalarNode) else None
            raise self._refusal(node, where, key.kind, hint or "begin each of them with '- '")
        if (node, key) not in self._lists:
            texts = []
            for number, item in enumerate(node.value, 1):
                inner = f"{where}, number {number}"
                texts.append(self._taken(self._one_text, item, inner, key.choices))
            self._lists[node, key] = [text for text in texts if text is not None]
        return self._lists[node, key]

    def _map(self, key: Key, where: str, node: yaml.Node) -> Mapping[str, str]:
        if not _is(node, yaml.MappingNode, "map"):
            raise self._refusal(node, where, key.kind, "write NAME: VALUE, one on each line")
        if (node, key) not in self._texts:
            texts = {}
            for name, pair in self._pairs(node, key.kind.value).items():
                inner = f"{where}, name '{_cut(name)}'"
                texts[name] = self._taken(self._named_text, key, name, pair, inner)
            self._texts[node, key] = {name: text for name, text in texts.items() if text is not None}
        return self._texts[node, key]

    def _named_text(self, key: Key, name: str, pair: _Pair, where: str) -> str:
        why = _unusable(name)
        if key.kind is Kind.ENVIRONMENT and (not name or "=" in name):
            why = "it is empty" if not name else "there is a '=' in it"
        if why:
            raise self._mistake(pair.key, f"{where}: cannot use this name: {why}", "take letters, digits and '_'")
        try:
            return self._one_text(pair.value, where, ())
        except _MistakeError as mistake:
            written = str(pair.value.value)
            if not masking.is_secret(name, written):
                raise
            problem = mistake.problem
            for text in (written, _cut(written)):
                hint = None if problem.hint is None else problem.hint.replace(text, masking.MASK)
                problem = Problem(problem.message.replace(text, masking.MASK), hint)
            raise _MistakeError(mistake.line, problem) from mistake

    def _one_text(self, node: yaml.Node, where: str, choices: Sequence[str]) -> str:
        value = _constructed(node)
        if not isinstance(value, str):
            hint = "give one text"
            if isinstance(node, yaml.ScalarNode):
                hint = f'put it in quotes: "{_cut(node.value)}"' if node.value else 'leave it out, or write ""'
            raise self._refusal(node, where, Kind.TEXT, hint)
        why = _unusable(value)
        if why:
            raise self._mistake(node, f"{where}: cannot use '{_cut(value)}': {why}", "take it out")
        if choices and value not in choices:
            meant = closest(value, choices)
            hint = f"did you mean '{meant}'?" if meant else "take one of them"
            raise self._mistake(node, f"{where}: '{_cut(value)}' is not one of {', '.join(choices)}", hint)
        return value

    # ---- what is wrong ----

    def _taken(self, read: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        """What *read* returns, or None when something is wrong, which is kept."""
        try:
            return read(*args, **kwargs)
        except _MistakeError as mistake:
            self._mistakes.append(mistake)
            return None

    def _too_deep(self) -> UsageError:
        return UsageError(
            f"reading '{self._path}': lists and maps are nested too deeply", hint="is this a file of images?"
        )

    def _at(self, node: yaml.Node) -> str:
        return f"{self._path}:{node.start_mark.line + 1}"

    def _mistake(self, node: yaml.Node, message: str, hint: str) -> _MistakeError:
        return _MistakeError(node.start_mark.line, Problem(f"{self._at(node)}: {message}", hint))

    def _refusal(self, node: yaml.Node, where: str, kind: Kind, hint: str) -> _MistakeError:
        return self._mistake(node, f"{where} wants {kind.value}, not {_told(node)}", hint)

    def _charge(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise _TooMuchError


def _is(node: yaml.Node, kind: type[yaml.Node], tag: str) -> bool:
    """Whether *node* is what it looks like; ``!!set`` and the like are maps, too."""
    return isinstance(node, kind) and node.tag == _TAG + tag


def _constructed(node: yaml.Node) -> object:
    """The value of a scalar; what is none, or cannot be made, is an object without meaning."""
    if isinstance(node, yaml.ScalarNode):
        try:
            return yaml.constructor.SafeConstructor().construct_object(node)
        except _BROKEN:
            pass
    return object()


def _told(node: yaml.Node) -> str:
    """What *node* is, for messages."""
    if isinstance(node, yaml.MappingNode):
        return "a map"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    value, text = _constructed(node), _cut(str(node.value))
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return text if text in ("true", "false") else f"{text}, which is {str(value).lower()}"
    if isinstance(value, str):
        return f"the text '{text}'"
    return f"the number {text}" if isinstance(value, (int, float)) else f"'{text}', which YAML takes for something else"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _unusable(text: str) -> str | None:
    """Why no program can be given *text*."""
    if "\0" in text:
        return "there is a NUL in it"
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return "there is half of a surrogate pair in it"
    return None


def _size(value: Value) -> int:
    """The length of *value* in characters, each piece one more."""
    if isinstance(value, str):
        return len(value) + 1
    if isinstance(value, Mapping):
        return sum(len(name) + len(text) + 2 for name, text in value.items())
    return sum(map(len, value)) + len(value) + 1 if isinstance(value, Sequence) else 1
