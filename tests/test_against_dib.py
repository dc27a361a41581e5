# SPDX-License-Identifier: Apache-2.0
"""Our choice of elements is DIB's: for its own elements, and for made-up ones full of conflicts."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from virt_dib import tools
from virt_dib.dib import DibInstallation, find_installation
from virt_dib.elements import Element, SelectionProblem, discover, resolve
from virt_dib.errors import UsageError

OPERATING_SYSTEM = "debian-minimal"
COMBINATIONS = 400
MADE_UP = 2000
SEEDS = ("0", "1", "2", "3", "4", "5")

# Standard input: the search path and the cases. Standard output: the answer to each case.
ASK_DIB = """
import json, logging, sys
from diskimage_builder import element_dependencies
logging.disable(logging.CRITICAL)
search_path, cases = json.load(sys.stdin)
available = element_dependencies._find_all_elements(search_path)
answers = []
for names in cases:
    try:
        found = element_dependencies._expand_element_dependencies(names, available)
        answers.append(sorted([element.name, element.path] for element in found))
    except Exception as error:
        answers.append(type(error).__name__)
json.dump(answers, sys.stdout)
"""

# As above, but each case brings its own elements, whose dependencies come in the order they are given in.
ASK_DIB_IN_ORDER = """
import json, logging, sys
from diskimage_builder import element_dependencies
logging.disable(logging.CRITICAL)

class Ordered(set):
    def __init__(self, names):
        super().__init__(names)
        self.names = names
    def __sub__(self, other):
        return [name for name in self.names if name not in other]

answers = []
for names, elements in json.load(sys.stdin):
    available = {}
    for name, (depends, provides) in elements.items():
        element = element_dependencies.Element(name, "/nowhere/" + name)
        element.depends, element.provides = Ordered(depends), set(provides)
        available[name] = element
    try:
        found = element_dependencies._expand_element_dependencies(names, available)
        answers.append(sorted([element.name, element.path] for element in found))
    except Exception as error:
        answers.append(type(error).__name__)
json.dump(answers, sys.stdout)
"""

Answer = list[list[str]] | str
"""Pairs of name and path, or the name of DIB's exception."""


@pytest.fixture(scope="module")
def dib() -> DibInstallation:
    return find_installation(None)


@pytest.fixture(scope="module")
def available(dib: DibInstallation) -> Mapping[str, Element]:
    return discover([dib.elements_dir])


def ask(dib: DibInstallation, program: str, question: object, seed: str = "0") -> list[Answer]:
    result = tools.run(
        [dib.python, "-c", program],
        doing="asking DIB",
        stdin=json.dumps(question).encode(),
        environment={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(dib.package_dir.parent)},
    )
    answers: list[Answer] = json.loads(result.stdout)
    return answers


def ours(names: Sequence[str], available: Mapping[str, Element]) -> Answer:
    try:
        found = resolve(names, available)
    except UsageError as error:
        first = error.problems[0]
        assert isinstance(first, SelectionProblem)
        return first.reason.value
    assert len({element.name for element in found}) == len(found)
    return sorted([element.name, str(element.path)] for element in found)


def check(dib: DibInstallation, available: Mapping[str, Element], cases: Sequence[Sequence[str]]) -> list[Answer]:
    """Compare all *cases*; where DIB's answer is a matter of its hash seed, any of them will do."""
    answers = [ours(names, available) for names in cases]
    per_seed = [ask(dib, ASK_DIB, [str(dib.elements_dir), cases], seed) for seed in SEEDS]
    wrong = [
        (names, answer, theirs)
        for names, answer, *theirs in zip(cases, answers, *per_seed, strict=True)
        if answer not in theirs
    ]
    assert wrong == []
    return answers


def test_the_same_elements_are_found(dib: DibInstallation, available: Mapping[str, Element]) -> None:
    program = """
import json, sys
from diskimage_builder import element_dependencies
found = element_dependencies._find_all_elements(json.load(sys.stdin))
json.dump([[e.name, e.path, sorted(e.depends), sorted(e.provides)] for e in found.values()], sys.stdout)
"""
    theirs = ask(dib, program, str(dib.elements_dir))
    mine = [[e.name, str(e.path), sorted(e.depends), sorted(e.provides)] for e in available.values()]
    assert len(mine) > 100
    assert sorted(mine) == sorted(theirs)


def test_each_element_without_an_operating_system(dib: DibInstallation, available: Mapping[str, Element]) -> None:
    answers = check(dib, available, [list(dict.fromkeys(["base", name])) for name in available])
    assert "MissingOSException" in answers


def test_each_element_with_an_operating_system(dib: DibInstallation, available: Mapping[str, Element]) -> None:
    cases = [list(dict.fromkeys(["base", name, OPERATING_SYSTEM])) for name in available]
    answers = check(dib, available, cases)
    assert "AlreadyProvidedException" in answers
    assert sum(not isinstance(answer, str) for answer in answers) > 50


def test_combinations_of_elements(dib: DibInstallation, available: Mapping[str, Element]) -> None:
    chance = random.Random(20)  # noqa: S311 - repeatable on purpose
    systems = sorted(name for name, element in available.items() if "operating-system" in element.provides)
    others = sorted(set(available) - set(systems))
    cases = []
    for number in range(COMBINATIONS):
        names = chance.sample(others, chance.randint(1, 6))
        if number % 4:
            names.append(chance.choice(systems))
        if number % 10 == 0:
            names.append("no-such-element")
        if "vm" not in names and number % 3 == 0:
            names += ["vm", chance.choice(["block-device-mbr", "block-device-gpt", "block-device-efi"])]
        chance.shuffle(names)
        cases.append(list(dict.fromkeys(names)))
    answers = check(dib, available, cases)
    assert sum(not isinstance(answer, str) for answer in answers) > COMBINATIONS // 10
    for name in ("MissingElementException", "AlreadyProvidedException", "MissingOSException"):
        assert answers.count(name) > COMBINATIONS // 40


def made_up(chance: random.Random) -> tuple[list[str], dict[str, Element]]:
    """A few elements that depend on, and stand in for, each other and names that are no element."""
    real = [f"e{number}" for number in range(chance.randint(2, 7))]
    names = [*real, "v0", "v1"]
    elements = {
        name: Element(
            name=name,
            path=Path("/nowhere") / name,
            depends=frozenset(chance.sample(names, chance.choice((0, 1, 1, 2, 3)))),
            provides=frozenset(chance.sample([*names, "v2", "v3"], chance.choice((0, 0, 0, 1, 2)))),
        )
        for name in real
    }
    system = chance.choice(real)
    elements[system] = Element(
        name=system,
        path=elements[system].path,
        depends=elements[system].depends,
        provides=elements[system].provides | {"operating-system"},
    )
    return chance.sample(real, chance.randint(1, min(3, len(real)))), elements


def test_made_up_elements(dib: DibInstallation) -> None:
    """Given the order of dependencies that we choose, DIB's answer is certain, and ours."""
    chance = random.Random(3)  # noqa: S311 - repeatable on purpose
    cases = [made_up(chance) for _ in range(MADE_UP)]

    def in_order(element: Element, elements: Mapping[str, Element]) -> list[str]:
        providers = [name for name in element.depends if name in elements and elements[name].provides]
        plain = [name for name in element.depends if name in elements and not elements[name].provides]
        return [*sorted(providers), *sorted(plain), *sorted(element.depends - set(elements))]

    question = [
        (
            names,
            {name: (in_order(element, elements), sorted(element.provides)) for name, element in elements.items()},
        )
        for names, elements in cases
    ]
    theirs = ask(dib, ASK_DIB_IN_ORDER, question)
    answers = [ours(names, elements) for names, elements in cases]
    assert answers == theirs
    assert sum(not isinstance(answer, str) for answer in answers) > MADE_UP // 10
    for name in ("MissingElementException", "AlreadyProvidedException", "MissingOSException"):
        assert answers.count(name) > MADE_UP // 20
