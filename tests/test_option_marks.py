# SPDX-License-Identifier: Apache-2.0
"""Each option of virt-dib has a test that sees what it does, and says so with the mark ``option``."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from virt_dib.options import BY_NAME, GROUPS

TESTS = Path(__file__).parent


def marks(directory: Path) -> Iterator[tuple[str, str]]:
    """Each option in a mark, and the test that has it. All tests are read, also those that a run leaves out."""
    for path in sorted(directory.glob("test_*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"), str(path))
        constants = {
            target.id: node.value
            for node in module.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for function in ast.walk(module):
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                for name in _options_of(function, constants):
                    yield name, f"{path.name}::{function.name}"


def _options_of(function: ast.FunctionDef, constants: Mapping[str, ast.expr]) -> Iterator[str]:
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.option":
            for argument in decorator.args:
                if isinstance(argument, ast.Starred):
                    yield from ast.literal_eval(constants[ast.unparse(argument.value)])
                else:
                    yield ast.literal_eval(argument)


def test_each_option_has_a_test_that_sees_what_it_does() -> None:
    seen = {name for name, _ in marks(TESTS)}
    options = [option.names for group in GROUPS.values() for option in group]
    unseen = [names for names in options if not seen & set(names)]
    hint = 'a test that looks into the image, the guest or the output has the mark @pytest.mark.option("--name")'
    assert unseen == [], hint


def test_no_mark_is_of_an_option_that_does_not_exist() -> None:
    assert [(name, test) for name, test in marks(TESTS) if name not in BY_NAME] == []


def test_marks_are_found_however_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "test_planted.py").write_text(
        'TWO = ["--a", "--b"]\n'
        "@pytest.mark.option(*TWO)\n"
        '@pytest.mark.option("-c", "--d")\n'
        "@pytest.mark.appliance\n"
        "def test_marked(): ...\n"
        '@pytest.mark.option("--e")\n'
        "def no_test(): ...\n"
        "def test_without(): ...\n"
    )
    assert sorted(marks(tmp_path)) == [(name, "test_planted.py::test_marked") for name in ("--a", "--b", "--d", "-c")]
