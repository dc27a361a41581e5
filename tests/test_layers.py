# SPDX-License-Identifier: Apache-2.0
"""The code keeps to the levels that docs/architecture.md shows, and the page knows every module."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE_DIR = ROOT / "src" / "virt_dib"
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = "virt_dib"

# Importable from one module only, so that its rules (threads, signals, process groups) are kept in one place.
ONLY_IMPORTERS = {"guestfs": "machine", "subprocess": "tools"}

# A module's line, counted from the top, and its place on the line.
Place = tuple[int, int]


def places(page: str) -> dict[str, Place]:
    """The modules in the block under 'Modules': one level a line, its title before them or blank."""
    block = re.search(r"^## Modules\n+```\n(?P<lines>.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block, "docs/architecture.md has no block of modules"
    return {
        module: (level, column)
        for level, line in enumerate(block["lines"].splitlines())
        for column, module in enumerate(re.sub(r"^(\S+ )*\S+  |^ +", "", line).split())
    }


def imports(path: Path) -> Sequence[str]:
    """Dotted names of what a file imports, wherever in it: modules, and names in them."""
    return _imports(path.read_text(encoding="utf-8"))


@functools.cache
def _imports(text: str) -> Sequence[str]:
    return tuple(_each_import(ast.parse(text)))


def _each_import(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # The package has no packages in it: a leading dot means virt_dib.
            base = ".".join(filter(None, [PACKAGE if node.level else "", node.module]))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_modules(path: Path, modules: Mapping[str, Place]) -> set[str]:
    """Those of *modules* that a file imports, whole or in part."""
    names = (name.split(".") for name in imports(path))
    return {name[1] for name in names if name[0] == PACKAGE and len(name) > 1 and name[1] in modules}


def violations(package_dir: Path, page: str) -> set[str]:
    """What is not as the page says, one sentence each."""
    known = places(page)
    files = {path.stem: path for path in package_dir.glob("*.py")}
    inner = files.keys() - {"__init__", "__main__"}
    found = {f"{module} is not on the page" for module in inner - known.keys()}
    found |= {f"the page has {module}, which does not exist" for module in known.keys() - inner}
    for module in inner & known.keys():
        level, column = known[module]
        for other in imported_modules(files[module], known):
            other_level, other_column = known[other]
            if not (other_level > level or (other_level == level and other_column > column)):
                found.add(f"{module} imports {other}, which is not below it or to its right")
    if extra := imported_modules(files["__main__"], known) - {"cli"}:
        found.add(f"__main__ imports {', '.join(sorted(extra))}")
    if any(name.split(".")[0] == PACKAGE for name in imports(files["__init__"])):
        found.add("__init__ imports from its own package")
    for path in package_dir.rglob("*.py"):
        place = path.relative_to(package_dir).with_suffix("").as_posix()
        roots = {name.split(".")[0] for name in imports(path)}
        found |= {f"{place} imports {name}" for name, only in ONLY_IMPORTERS.items() if name in roots and place != only}
        # The guest has these programs, but not the package.
        if place.startswith("guest/") and PACKAGE in roots:
            found.add(f"{place} imports {PACKAGE}")
    return found


def test_the_code_is_as_the_architecture_page_says() -> None:
    assert sorted(violations(PACKAGE_DIR, PAGE.read_text())) == []


def test_each_restricted_module_has_its_one_importer() -> None:
    importers = {
        name: sorted(
            path.relative_to(ROOT).as_posix()
            for part in ("src", "tests", "bench")
            for path in (ROOT / part).rglob("*.py")
            if name in {imported.split(".")[0] for imported in imports(path)}
        )
        for name in ONLY_IMPORTERS
    }
    assert importers == {name: [f"src/virt_dib/{only}.py"] for name, only in ONLY_IMPORTERS.items()}


@pytest.mark.parametrize(
    ("file", "line", "sentence"),
    [
        ("errors.py", "from virt_dib.spec import Phase", "errors imports spec, which is not below it or to its right"),
        ("spec.py", "import virt_dib.plan", "spec imports plan, which is not below it or to its right"),
        ("spec.py", "from virt_dib import errors, kvm as k", "spec imports kvm, which is not below it or to its right"),
        ("tools.py", "from . import appliance", "tools imports appliance, which is not below it or to its right"),
        ("plan.py", "from .builder import build", "plan imports builder, which is not below it or to its right"),
        ("report.py", "def late():\n    import guestfs", "report imports guestfs"),
        ("plan.py", "from subprocess import run", "plan imports subprocess"),
        ("guest/block-device.py", "import subprocess", "guest/block-device imports subprocess"),
        ("guest/block-device.py", "import virt_dib", "guest/block-device imports virt_dib"),
        ("stray.py", "", "stray is not on the page"),
        ("__main__.py", "from virt_dib import plan", "__main__ imports plan"),
        ("__init__.py", "from virt_dib.errors import VirtDibError", "__init__ imports from its own package"),
    ],
)  # fmt: skip
def test_a_planted_violation_is_found(tmp_path: Path, file: str, line: str, sentence: str) -> None:
    page = PAGE.read_text()
    copy = tmp_path / PACKAGE
    shutil.copytree(PACKAGE_DIR, copy)
    before = violations(copy, page)
    with (copy / file).open("a", encoding="utf-8") as module:
        module.write(f"\n{line}\n")
    assert violations(copy, page) - before == {sentence}


def test_a_page_that_drifts_is_found() -> None:
    page = PAGE.read_text()
    before = violations(PACKAGE_DIR, page)
    drifted = re.sub(r"(?m)^( +)errors\b", r"\1mistakes", page)
    assert {"errors is not on the page", "the page has mistakes, which does not exist"} <= (
        violations(PACKAGE_DIR, drifted) - before
    )


def test_what_the_page_names_exists() -> None:
    named = re.findall(r"`([a-z]+)\.([A-Za-z_]+)(?:\.([a-z_]+))?[^`]*`", PAGE.read_text(encoding="utf-8"))
    inner = [names for names in named if names[1] != "py" and (PACKAGE_DIR / f"{names[0]}.py").exists()]
    missing = []
    for module, name, attribute in inner:
        found = getattr(importlib.import_module(f"{PACKAGE}.{module}"), name, None)
        if found is None or (attribute and not hasattr(found, attribute)):
            missing.append(f"{module}.{name}")
    assert len(inner) > 20
    assert missing == []
