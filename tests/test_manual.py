# SPDX-License-Identifier: Apache-2.0
"""The manual: complete, true to the options, readable by man, and installed with the package."""

from __future__ import annotations

import re
import shlex
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from docutils import nodes
from docutils.core import publish_doctree

from generate import completion, manual
from virt_dib import boot_cli, tools
from virt_dib.command_line import parse
from virt_dib.options import BY_NAME, GROUPS

PAGES = ("virt-dib", "virt-dib-boot-test", "virt-dib-doctor")
PAGE = manual.DOCS / "virt-dib.rst"
OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][a-z-]*")
SECTIONS = [
    "SYNOPSIS", "DESCRIPTION", "EXAMPLES", "OPTIONS", "ENVIRONMENT VARIABLES", "CONFIGURATION FILES",
    "TEMPORARY DIRECTORY", "EXTRA DEPENDENCIES", "ISOLATION", "COMPARISON WITH DISKIMAGE-BUILDER",
    "MACHINE READABLE OUTPUT", "COMPATIBILITY", "EXIT STATUS", "DIAGNOSTICS", "FILES", "SEE ALSO",
]  # fmt: skip


def section(page: Path, title: str) -> nodes.section:
    """The section of that title, of the page's own."""
    tree = publish_doctree(page.read_text(encoding="utf-8"), settings_overrides={"halt_level": 2})
    return next(found for found in tree.findall(nodes.section) if found.next_node(nodes.title).astext() == title)


def described(page: Path) -> Iterator[str]:
    """The options with their values, as the terms in the section OPTIONS have them."""
    for item in section(page, "OPTIONS").findall(nodes.definition_list_item):
        term = item.next_node(nodes.term)
        if term.astext().startswith("-"):
            yield from (literal.astext() for literal in term.findall(nodes.literal))


def names_in(words: Iterator[str]) -> set[str]:
    return {match[0] for word in words if (match := OPTION.match(word))}


def test_parser_manual_and_completion_have_the_same_options() -> None:
    in_manual = names_in(described(PAGE))
    missing = sorted(BY_NAME.keys() - in_manual)
    assert not missing, (
        f"docs/virt-dib.rst does not describe {', '.join(missing)}: add a term for it to the section OPTIONS, as the "
        "others have it (if it waits there in a comment, take it out of the comment), and to the other sections what "
        "has become true; what completion offers as its value goes into OFFERS in src/virt_dib/options.py. "
        "'make docs' makes build/share/man/man1/virt-dib.1, to be read with 'man -l'"
    )
    gone = sorted(in_manual - BY_NAME.keys())
    assert not gone, f"docs/virt-dib.rst describes {', '.join(gone)}, which src/virt_dib/options.py does not have"
    for name, script in completion.scripts().items():
        lines = [line for line in script.splitlines() if not line.lstrip().startswith("#")]
        absent = [
            option
            for option in BY_NAME
            if not re.search(rf"(?<![\w-])({option}|-[sl] {option.lstrip('-')})(?![\w-])", "\n".join(lines))
        ]
        assert absent == [], f"{name} is made from src/virt_dib/options.py and lacks some"


def test_values_have_the_same_names_in_the_manual_and_in_the_help() -> None:
    terms = {re.split(r"[ =[]", term)[0]: term for term in described(PAGE)}
    for options in GROUPS.values():
        for option in options:
            for name in option.names:
                # One that may stand without its value is written --option[=VALUE].
                expected = {name, f"{name} {option.metavar}", f"{name}[={option.metavar}]"}
                assert terms[name] in expected, f"docs/virt-dib.rst: the term of {name}"
                assert (terms[name] == name) == (option.metavar is None), f"docs/virt-dib.rst: the value of {name}"


def test_the_groups_of_options_are_those_of_the_help() -> None:
    titles = [part.next_node(nodes.title).astext().lower() for part in section(PAGE, "OPTIONS").findall(nodes.section)]
    assert titles[1:] == list(GROUPS)


def test_the_sections() -> None:
    tree = publish_doctree(PAGE.read_text(encoding="utf-8"))
    titles = [child.next_node(nodes.title).astext() for child in tree if isinstance(child, nodes.section)]
    assert [title for title in titles if title in SECTIONS] == SECTIONS


def test_the_page_of_the_boot_test_has_its_options() -> None:
    shown = names_in(iter(OPTION.findall(boot_cli.build_parser().format_help())))
    assert names_in(described(manual.DOCS / "virt-dib-boot-test.rst")) == {
        name
        for name in shown
        if name in boot_cli.build_parser()._option_string_actions  # noqa: SLF001 - argparse's one list of names
    }


def test_the_commands_in_the_manual_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree = publish_doctree(PAGE.read_text(encoding="utf-8"))
    lines = [
        line for block in tree.findall(nodes.literal_block) for line in block.astext().replace("\\\n", "").splitlines()
    ]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("virt-dib ")]
    assert len(commands) >= 4
    for words in commands:
        given = [word for word in words if word != "..."]
        problems = [problem.message for problem in parse(given, {}).problems]
        assert problems == ([] if len(given) == len(words) else ["no element named"]), words


@pytest.mark.parametrize("name", PAGES)
def test_man_reads_the_page_without_a_complaint(name: str, tmp_path: Path) -> None:
    if tools.find("man") is None:
        pytest.skip("man is not installed")
    page = tmp_path / f"{name}.1"
    page.write_text(manual.man_page(manual.DOCS / f"{name}.rst"), encoding="utf-8")
    result = tools.run(
        ["man", "--warnings", "-l", page],
        doing="reading the page",
        environment={"PATH": "/usr/bin:/bin", "MANWIDTH": "80", "LC_ALL": "C.UTF-8"},
    )
    assert result.stderr == ""
    assert re.search(rf"^ +{name} - ", result.stdout, re.MULTILINE)
    assert "EXIT STATUS" in result.stdout


def test_every_link_in_the_html_leads_somewhere() -> None:
    for name in PAGES:
        text = manual.html_page(manual.DOCS / f"{name}.rst")
        anchors = set(re.findall(r'id="([^"]+)"', text))
        assert set(re.findall(r'href="#([^"]+)"', text)) - anchors == set()
        assert "<h1" in text


def test_manual_and_completion_are_installed_with_the_package() -> None:
    share = Path(sysconfig.get_paths()["data"]) / "share"
    if not Path(sys.executable).is_relative_to(share.parent):
        pytest.skip("virt-dib is not installed where this Python is")
    expected = [f"man/man1/{name}.1" for name in PAGES] + [f"doc/virt-dib/{name}.html" for name in PAGES]
    expected += ["bash-completion/completions/virt-dib", "zsh/site-functions/_virt-dib"]
    expected += ["fish/vendor_completions.d/virt-dib.fish"]
    assert [path for path in expected if not (share / path).is_file()] == []
