# SPDX-License-Identifier: Apache-2.0
"""Catalogues of messages: ``python -m generate.catalogue`` brings po/ up to date with the sources.

Messages are found where the code says them (errors, hints, options, what a build tells), not by marks. An f-string
becomes an entry with placeholders, as virt_dib.translation expects it.
"""

from __future__ import annotations

import ast
import itertools
import keyword
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

from virt_dib import __version__
from virt_dib.image_file import Kind
from virt_dib.spec import NUMBERS

ROOT = Path(__file__).parents[1]
PO_DIR = ROOT / "po"
PACKAGE_DIR = ROOT / "src" / "virt_dib"
SEVERAL = "; may be given several times"
_EPOCH = datetime(2026, 1, 1, tzinfo=timezone.utc)
_MOST_ALTERNATIVES = 16
_PLACEHOLDER = re.compile(r"\{\w*\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where in the code there are messages of a kind."""

    arguments: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]
    """Of calls, by position and by name; of a method ``it.add``, or of any ``add``."""
    of_errors: tuple[tuple[int, ...], tuple[str, ...]]
    """The same for all classes of errors."""
    returning: re.Pattern[str]
    """Functions that return them."""
    constants: re.Pattern[str]
    """Constants that are or hold them."""
    pieces: frozenset[str] = frozenset()
    """Functions whose variables are pieces of them."""
    parts: re.Pattern[str] = re.compile(r"(?!)")
    """Variables of any function that are."""


TOLD = Places(
    arguments={
        "Problem": ((0, 1), ("message", "hint")),
        "SelectionProblem": ((0, 1), ("message", "hint")),
        "Option": ((4,), ("help",)),
        "flag": ((2,), ()),
        "valued": ((3,), ()),
        "_values": ((3,), ()),
        "_switch": ((2, 3), ()),
        "_choice": ((0,), ()),
        "message": ((0,), ()),
        "warning": ((0,), ()),
        "on_message": ((0,), ()),
        "step": ((0,), ()),
        "phase_started": ((0,), ()),
        "Check": ((), ("name", "detail", "hint")),
        "translated": ((0,), ()),
        "error": ((0,), ()),
        "Verdict": ((), ("reason",)),
        "_Unusable": ((0,), ()),
        "_Tool": ((1,), ()),
        "require": ((), ("purpose",)),
        "_tool": ((), ("user",)),
        "_space": ((0, 3), ()),
        "Danger": ((1,), ()),
        "_mistake": ((1, 2), ()),
        "_refusal": ((3,), ()),
        "_warn": ((0,), ()),
        "_pairs": ((1,), ()),
        "_taken": ((2,), ()),
        "Key": ((2,), ()),
    },
    of_errors=((0,), ("hint",)),
    returning=re.compile(r"_line|.*hint.*|install|_failure|_refusal|_watch|_judge|_told|_unusable|_wanted|_quoted"),
    constants=re.compile(r"_?(USAGE|DESCRIPTION|EPILOG|GROUPS|.*HINT.*|.*STEPS?)|OK|LACKING|SLOW|LOW"),
    pieces=frozenset({"_line"}),
    parts=re.compile(r"where|inner|why|what"),
)
"""All that people read translated."""
_NO_NAMES = frozenset({*keyword.kwlist, "self", "join", "str", "os", "path", "abspath", "Path"})
OF_ARGPARSE = (
    "unrecognized arguments: {arguments}",
    "the following arguments are required: {arguments}",
    "argument {name}: {message}",
    "argument {name}: not allowed with argument {other}",
    "expected one argument",
    "ignored explicit argument {value}",
    "invalid choice: {value} (choose from {choices})",
    "ambiguous option: {option} could match {options}",
)
"""What argparse says of wrong usage."""
_PLACED = ("{file}:{line}: {message}", "{origin}: '{name}': {message}")
"""What is wrong in a file of images, and where."""


def messages(path: Path, places: Places = TOLD) -> Iterator[tuple[int, str]]:
    """The messages in a module, with their lines."""
    module = _Module(ast.parse(path.read_text(encoding="utf-8")), places)
    seen = set()
    for node, text in module.messages():
        if text not in seen and re.search(r"[A-Za-z]{2}", _PLACEHOLDER.sub("", text)):
            seen.add(text)
            yield node.lineno, text


class _Module:
    def __init__(self, tree: ast.Module, places: Places) -> None:
        self._tree = tree
        self._places = places
        self._functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]

    def messages(self) -> Iterator[tuple[ast.expr, str]]:
        yield from self._in(self._tree, self._tree)
        for function in self._functions:
            yield from self._in(function, function)

    def _in(self, scope: ast.Module | ast.FunctionDef, top: ast.AST) -> Iterator[tuple[ast.expr, str]]:
        """The messages below *top* that are in *scope* itself."""
        for node in ast.iter_child_nodes(top):
            if isinstance(node, ast.FunctionDef):
                continue
            if isinstance(node, ast.Call):
                yield from self._of_call(scope, node)
            elif isinstance(node, ast.Return) and node.value and isinstance(scope, ast.FunctionDef):
                if self._places.returning.fullmatch(scope.name):
                    for value in node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]:
                        yield from self._told(scope, value)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                part = isinstance(scope, ast.FunctionDef) and (
                    scope.name in self._places.pieces or self._places.parts.fullmatch(_id(target))
                )
                if isinstance(target, ast.Name) and (part or self._places.constants.fullmatch(target.id)):
                    for value in _held(node.value):
                        yield from self._told(scope, value)
            yield from self._in(scope, node)

    def _of_call(self, scope: ast.Module | ast.FunctionDef, call: ast.Call) -> Iterator[tuple[ast.expr, str]]:
        name = str(getattr(call.func, "id", getattr(call.func, "attr", "")))
        owner = getattr(call.func, "value", None)
        whole = f"{getattr(owner, 'id', getattr(owner, 'attr', ''))}.{name}"
        arguments, otherwise = self._places.arguments, self._places.of_errors if name.endswith("Error") else ((), ())
        positions, keywords = arguments.get(whole) or arguments.get(name, otherwise)
        chosen = [call.args[position] for position in positions if position < len(call.args)]
        chosen += [keyword.value for keyword in call.keywords if keyword.arg in keywords]
        for value in chosen:
            for node, text in self._told(scope, value):
                yield node, text + (SEVERAL if name == "_values" else "")

    def _told(self, scope: ast.Module | ast.FunctionDef, value: ast.expr) -> Iterator[tuple[ast.expr, str]]:
        for text in itertools.islice(self._texts(scope, value, 0), _MOST_ALTERNATIVES):
            yield value, text

    def _texts(self, scope: ast.AST, value: ast.expr, depth: int) -> Iterator[str]:
        """All that an expression may be, as far as it is written here."""
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.value.replace("{", "{{").replace("}", "}}")
        elif isinstance(value, ast.JoinedStr):
            yield _template(value)
        elif isinstance(value, (ast.IfExp, ast.BoolOp)):
            for one in [value.body, value.orelse] if isinstance(value, ast.IfExp) else value.values:
                yield from self._texts(scope, one, depth)
        elif isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
            right = list(self._texts(scope, value.right, depth))
            yield from (a + b for a in self._texts(scope, value.left, depth) for b in right)
        elif isinstance(value, ast.Name) and depth == 0:
            for assigned in self._assigned(scope, value.id):
                yield from self._texts(scope, assigned, depth + 1)

    def _assigned(self, scope: ast.AST, name: str) -> Iterator[ast.expr]:
        for node in itertools.chain(ast.walk(scope), self._tree.body if scope is not self._tree else ()):
            if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
                yield node.value


def _id(target: ast.expr) -> str:
    return target.id if isinstance(target, ast.Name) else ""


def _held(value: ast.expr) -> list[ast.expr]:
    """What a constant is or holds."""
    if isinstance(value, ast.Dict):
        return [part for part in (*value.keys, *value.values) if part is not None]
    return value.elts if isinstance(value, ast.Tuple) else [value]


def _named(value: ast.expr) -> str:
    """A name for the value of an expression, for translators to see what it is."""
    source = re.sub(r"'[^']*'|\"[^\"]*\"", "", ast.unparse(value))
    words = [word for word in re.findall(r"[A-Za-z]\w*", source) if word not in _NO_NAMES]
    if not words:
        return "value"
    return str(words[-1] if isinstance(value, ast.Attribute) else words[0])


def _template(value: ast.JoinedStr) -> str:
    """An f-string with a name for each of its values."""
    parts: list[str] = []
    names: set[str] = set()
    for part in value.values:
        if isinstance(part, ast.Constant):
            parts.append(str(part.value).replace("{", "{{").replace("}", "}}"))
        elif isinstance(part, ast.FormattedValue):
            name = base = _named(part.value)
            for number in itertools.count(2):
                if name not in names:
                    break
                name = f"{base}{number}"
            names.add(name)
            parts.append(f"{{{name}}}")
    return "".join(parts)


def template() -> Catalog:
    """All messages of the package."""
    catalogue = Catalog(
        header_comment="# SPDX-License-Identifier: Apache-2.0",
        project="virt-dib",
        version=__version__,
        msgid_bugs_address="none",
        # So that the same messages make the same file.
        creation_date=_EPOCH,
        fuzzy=False,
    )
    for what, _, _ in NUMBERS.values():
        catalogue.add(what, locations=[("src/virt_dib/spec.py", 1)])
    for kind in Kind:
        catalogue.add(kind.value, locations=[("src/virt_dib/image_file.py", 1)])
    for text in _PLACED:
        catalogue.add(text, locations=[("src/virt_dib/image_file.py", 1)], flags=["python-brace-format"])
    for text in OF_ARGPARSE:
        flags = ["python-brace-format"] if _PLACEHOLDER.search(text) else []
        catalogue.add(text, locations=[("src/virt_dib/usage.py", 1)], flags=flags)
    for path in sorted(PACKAGE_DIR.glob("*.py")):
        for line, text in messages(path):
            flags = ["python-brace-format"] if _PLACEHOLDER.search(text) else []
            catalogue.add(text, locations=[(path.relative_to(ROOT).as_posix(), line)], flags=flags)
    return catalogue


def read(path: Path) -> Catalog:
    """A catalogue in po/."""
    with path.open("rb") as stream:
        return read_po(stream, abort_invalid=True)


def update() -> Iterable[Path]:
    """Write po/virt_dib.pot, and bring the translations to its messages; new ones have none."""
    fresh = template()
    _write(PO_DIR / "virt_dib.pot", fresh)
    for path in sorted(PO_DIR.glob("*.po")):
        catalogue = read(path)
        catalogue.update(fresh, no_fuzzy_matching=True)
        catalogue.obsolete.clear()
        _write(path, catalogue)
        yield path


def _write(path: Path, catalogue: Catalog) -> None:
    with path.open("wb") as stream:
        write_po(stream, catalogue, width=110, omit_header=False, include_lineno=False, sort_by_file=True)


def compile_all(locale_dir: Path) -> None:
    """Make what gettext reads of each po/*.po."""
    for path in sorted(PO_DIR.glob("*.po")):
        target = locale_dir / path.stem / "LC_MESSAGES" / "virt_dib.mo"
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as stream:
            write_mo(stream, read(path))


if __name__ == "__main__":
    for changed in update():
        untranslated = [message.id for message in read(changed) if message.id and not message.string]
        print(f"{changed.name}: {len(untranslated)} messages without a translation")  # noqa: T201 - a script that prints
    compile_all(PACKAGE_DIR / "locale")
