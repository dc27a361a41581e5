# SPDX-License-Identifier: Apache-2.0
"""Elements: find them on the search path, and add to those asked for what they depend on.

An element is a directory. Its file ``element-deps`` names elements it needs, ``element-provides`` names
it stands in for; some of those, such as ``operating-system``, are no element at all. The rules are those of
diskimage_builder/element_dependencies.py (contract section 1.10), made independent of the order of sets.
"""

from __future__ import annotations

import difflib
import enum
import os
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from virt_dib.errors import ElementError, Problem, UsageError
from virt_dib.files import read_regular
from virt_dib.releases import NEWEST, DefaultBlockDevice, Rules

OPERATING_SYSTEM = "operating-system"
_ARM = ("arm64", "aarch64")
_LARGEST_LIST_BYTES = 16 * 1024**2
_BLANKS = re.compile(r"[ \t\n]+")
_LINE_ENDS = re.compile(r"[\r\n]+")
_MARK = re.compile(
    r"""element-(?:deps|provides)|(?:root|extra-data|(?:pre-|post-)?install|post-root|block-device|(?:pre-)?finalise
    |cleanup|environment|init|binary-deps)\.d|package-installs.*|pkg-map|svc-map|source-repository-.+
    |block-device-.+\.yaml|README\.rst""",
    re.VERBOSE,
)
"""What only elements have in them."""
_MOST_EXAMPLES = 5
_MOST_SUGGESTIONS = 20
"""Names that a close match is looked for; a search costs milliseconds, and a file may hold 100,000 names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Element:
    """One element."""

    name: str
    path: Path
    """Its real path, which ends in the name unless the rules name elements otherwise."""
    provides: frozenset[str]
    depends: frozenset[str]


class Reason(enum.Enum):
    """Why elements cannot be built together; the values are the exceptions of DIB that say the same."""

    MISSING = "MissingElementException"
    ALREADY_PROVIDED = "AlreadyProvidedException"
    NO_OPERATING_SYSTEM = "MissingOSException"


@dataclass(frozen=True, slots=True)
class SelectionProblem(Problem):
    """A problem of ``resolve``."""

    reason: Reason = Reason.MISSING


def discover(search_path: Sequence[Path], rules: Rules = NEWEST) -> Mapping[str, Element]:
    """All elements in the directories of *search_path*, by name; an earlier directory wins.

    Within one directory two entries may have the same real name. Then the one that is no link wins, or
    the first of the links. By the *rules* of old releases an entry's own name is the element's.

    Raises:
        UsageError: some of *search_path* are not directories that can be listed.
        ElementError: lists of some elements cannot be read.
    """
    candidates: dict[str, Path] = {}
    problems: list[Problem] = []
    for directory in search_path:
        try:
            entries = [entry.name for entry in directory.iterdir()]
            # Otherwise names are all that can be seen of what is in it.
            os.stat(f"{directory}/.")
        except OSError as error:
            message = f"looking for elements in '{directory}': {error.strerror}"
            problems.append(Problem(message, "give directories that hold elements with --element-path"))
            continue
        paths = [(entry, Path(os.path.realpath(directory / entry))) for entry in entries]
        for entry, path in sorted(paths, key=lambda pair: (pair[0] != pair[1].name, pair[0])):
            # A link to / has no name.
            if os.path.isdir(path) and path.name:
                candidates.setdefault(path.name if rules.follows_links else entry, path)
    if problems:
        raise UsageError.of(problems)
    found = {name: _load(name, path, problems) for name, path in candidates.items()}
    if problems:
        raise ElementError.of(problems)
    return found


def is_name(name: str) -> bool:
    """Whether an element called *name* can be asked for: a blank in an argument ends a name."""
    return _BLANKS.search(name) is None


def strange(path: Path, search_path: Sequence[Path]) -> bool:
    """Whether the directory *path* is none that can be meant: outside of the *search_path*, and without any mark.

    Links in a search path lead to elements elsewhere, but not all elements come from people who may show a home
    directory, or the keys in it, to their scripts.
    """
    if any(is_below(path, directory) for directory in search_path):
        return False
    try:
        return not any(_MARK.fullmatch(name) for name in os.listdir(path))
    except OSError:
        # It will be told when it is copied.
        return False


def is_below(path: Path, directory: Path) -> bool:
    """Whether the real *path* is in the *directory*, or is it."""
    real = Path(os.path.realpath(directory))
    return path == real or real in path.parents


def requested(
    words: Sequence[str], *, arch: str, skip_base: bool, ramdisk_element: str | None = None, rules: Rules = NEWEST
) -> tuple[str, ...]:
    """The names that *words*, arguments of the command line, ask for, each once.

    An argument may hold several names or none. DIB's defaults are added: for ``vm`` a block device element unless
    there is one, by its *rules*, ``base``, and before it *ramdisk_element* (lib/common-functions, arg_to_elements).

    Raises:
        UsageError: no name at all.
    """
    names = [name for word in words for name in _BLANKS.split(word) if name]
    if not names:
        raise UsageError("no element named", hint="name at least an operating system, such as debian-minimal")
    if _wants_block_device(names, rules.default_block_device):
        names.append("block-device-efi" if rules.efi_on_arm and arch in _ARM else "block-device-mbr")
    if not skip_base:
        names.insert(0, "base")
    if ramdisk_element is not None:
        names[:0] = [name for name in _BLANKS.split(ramdisk_element) if name]
    return tuple(dict.fromkeys(names))


def _wants_block_device(names: Sequence[str], default: DefaultBlockDevice) -> bool:
    if default is DefaultBlockDevice.NONE:
        return False
    if default is DefaultBlockDevice.SUBSTRING:
        # A name with both in it counts as the first.
        machines = ["vm" in name for name in names]
        devices = ["block-device-" in name and "vm" not in name for name in names]
        return any(machines) and not any(devices)
    return "vm" in names and not any(name.startswith("block-device-") for name in names)


def resolve(
    names: Iterable[str],
    available: Mapping[str, Element],
    *,
    excluded: frozenset[str] = frozenset(),
    rules: Rules = NEWEST,
) -> tuple[Element, ...]:
    """The elements *names* and all they depend on, without what others of them provide, by the *rules* of DIB.

    *excluded* names count as neither asked for nor depended on. The order is that of first appearance,
    breadth first. DIB lets the order of a set decide which dependency of an element comes first; here
    those that provide something come first, then the others, then names that are no element, each by name:
    so what is provided is known before it is looked for. A name given twice counts once.

    Raises:
        UsageError: with a ``SelectionProblem`` for each thing wrong; the first is the one DIB stops at.
    """
    wanted = tuple(name for name in dict.fromkeys(names) if name not in excluded)
    expansion = _Expansion(wanted=wanted, available=available, excluded=excluded, one_provider=rules.one_provider)
    expansion.expand()
    expansion.check()
    if expansion.wrong:
        raise UsageError.of(expansion.problems())
    return tuple(available[name] for name in expansion.needed_by if name not in expansion.providers)


@dataclass(kw_only=True, slots=True)
class _Expansion:
    """The state of one ``resolve``."""

    wanted: tuple[str, ...]
    available: Mapping[str, Element]
    excluded: frozenset[str]
    one_provider: bool
    needed_by: dict[str, str | None] = field(default_factory=dict)
    """All names in order of appearance; the element that brought it, None for one asked for."""
    providers: dict[str, list[str]] = field(default_factory=dict)
    wrong: dict[tuple[Reason, str], None] = field(default_factory=dict)
    """Reasons and the names they are about, in the order found."""

    def expand(self) -> None:
        """Follow the dependencies, breadth first."""
        self.needed_by.update(dict.fromkeys(self.wanted))
        queue = deque(self.wanted)
        while queue:
            name = queue.popleft()
            if name in self.providers:
                continue
            element = self.available.get(name)
            if element is None:
                self.wrong[Reason.MISSING, name] = None
                continue
            for provided in sorted(element.provides):
                if self.one_provider and provided in self.providers:
                    self.wrong[Reason.ALREADY_PROVIDED, provided] = None
                self.providers.setdefault(provided, []).append(name)
            new = [other for other in element.depends if other not in self.needed_by and other not in self.excluded]
            new.sort(key=self._rank)
            self.needed_by.update(dict.fromkeys(new, name))
            queue.extend(new)

    def check(self) -> None:
        """Look for what is wrong with the whole."""
        for name in self.wanted:
            if name in self.providers:
                self.wrong[Reason.ALREADY_PROVIDED, name] = None
        if OPERATING_SYSTEM not in self.providers:
            self.wrong[Reason.NO_OPERATING_SYSTEM, OPERATING_SYSTEM] = None

    def problems(self) -> list[Problem]:
        """What is wrong, in words."""
        searched = ", ".join(dict.fromkeys(str(element.path.parent) for element in self.available.values()))
        problems: list[Problem] = []
        close: list[str] = []
        for reason, name in self.wrong:
            if reason is Reason.MISSING:
                suggestions = self._close_to(name) if len(problems) < _MOST_SUGGESTIONS else []
                close += suggestions
                problems.append(self._missing(name, suggestions, searched))
            elif reason is Reason.ALREADY_PROVIDED:
                problems.append(self._already_provided(name))
            elif not any(OPERATING_SYSTEM in self.available[suggestion].provides for suggestion in close):
                # A misspelt operating system is one mistake, not two.
                problems.append(self._no_operating_system())
        return problems

    def _rank(self, name: str) -> tuple[int, str]:
        element = self.available.get(name)
        return (2 if element is None else 0 if element.provides else 1, name)

    def _close_to(self, name: str) -> list[str]:
        return difflib.get_close_matches(name, self.available, n=2)

    def _missing(self, name: str, suggestions: Sequence[str], searched: str) -> Problem:
        needed_by = self.needed_by[name]
        message = f"element '{name}' not found" + (f", needed by '{needed_by}'" if needed_by else "")
        hint = (
            f"searched {searched}"
            if searched
            else "there are no elements where --element-path says; check the directories"
        )
        if suggestions:
            meant = _quoted(suggestions, either=True)
            hint = f"did you mean either {meant}? {hint}" if len(suggestions) > 1 else f"did you mean {meant}? {hint}"
        return SelectionProblem(message, hint, reason=Reason.MISSING)

    def _already_provided(self, name: str) -> Problem:
        providers = self.providers[name]
        if name in self.wanted:
            message = f"element '{name}' is asked for, but provided by {_quoted(providers)} already"
            return SelectionProblem(message, f"leave out '{name}'", reason=Reason.ALREADY_PROVIDED)
        needs = [f"'{provider}' is needed by '{by}'" for provider in providers if (by := self.needed_by[provider])]
        return SelectionProblem(
            f"elements {_quoted(providers)} cannot be built together: each provides '{name}'",
            "; ".join(["leave out all but one of them", *needs]),
            reason=Reason.ALREADY_PROVIDED,
        )

    def _no_operating_system(self) -> Problem:
        examples = sorted(name for name, element in self.available.items() if OPERATING_SYSTEM in element.provides)
        hint = "name directories with --element-path that have an element for one"
        if examples:
            hint = f"add one, such as {_quoted(examples[:_MOST_EXAMPLES], either=True)}"
        return SelectionProblem("none of the elements is an operating system", hint, reason=Reason.NO_OPERATING_SYSTEM)


def _quoted(names: Sequence[str], *, either: bool = False) -> str:
    *firsts, last = names
    if not firsts:
        return f"'{last}'"
    several = "', '".join(firsts)
    return f"'{several}' or '{last}'" if either else f"'{several}' and '{last}'"


def _load(name: str, path: Path, problems: list[Problem]) -> Element:
    return Element(
        name=name,
        path=path,
        provides=_read_names(path / "element-provides", problems),
        depends=_read_names(path / "element-deps", problems),
    )


def _read_names(path: Path, problems: list[Problem]) -> frozenset[str]:
    """The names in *path*, one on a line; none if there is no such file."""
    try:
        text = read_regular(path, _LARGEST_LIST_BYTES).decode()
    except FileNotFoundError:
        return frozenset()
    except UnicodeDecodeError:
        problems.append(Problem(f"reading '{path}': it is not UTF-8", "write one name of an element on each line"))
        return frozenset()
    except OSError as error:
        problems.append(Problem(f"reading '{path}': {error.strerror}", "make it a file that can be read, or remove it"))
        return frozenset()
    return frozenset(name for line in _LINE_ENDS.split(text) if (name := line.strip()))
