# SPDX-License-Identifier: Apache-2.0
"""The manual: complete, true to the options, readable by man, and installed with the package."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
import tomllib
from docutils import nodes
from docutils.core import publish_doctree
from packaging.requirements import Requirement

from generate import completion, manual, share
from generate.completion import COMMANDS, SHELLS
from virt_dib import boot_cli, dib_command, dib_links, doctor, image_file, image_file_cli, tools
from virt_dib.command_line import parse
from virt_dib.options import GROUPS, Takes
from virt_dib.usage import Parser

PAGES = tuple(path.stem for path in manual.sources())
PAGE_OF = {name: path for path in manual.sources() for name in (path.stem, *manual.other_names(path))}
PAGE = manual.DOCS / "virt-dib.rst"
IMAGES_PAGE = manual.DOCS / "virt-diskimage-builder.rst"
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


@pytest.mark.parametrize("name", COMMANDS)
def test_parser_manual_and_completion_have_the_same_options(name: str) -> None:
    page, command = PAGE_OF[name], COMMANDS[name]
    in_manual = names_in(described(page))
    missing = sorted(set(command.names) - in_manual)
    assert not missing, (
        f"{page.name} does not describe {', '.join(missing)}: add a term for it to the section OPTIONS, as the others "
        "have it (if it waits there in a comment, take it out of the comment), and to the other sections what has "
        "become true; what completion offers as its value goes into OFFERS in src/virt_dib/options.py. "
        f"'make docs' makes build/share/man/man1/{page.stem}.1, to be read with 'man -l'"
    )
    gone = sorted(in_manual - set(command.names))
    assert not gone, f"{page.name} describes {', '.join(gone)}, which {name} does not have"
    for shell in SHELLS:
        lines = completion.script(command, shell).splitlines()
        script = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
        absent = [
            option
            for option in command.names
            if not re.search(rf"(?<![\w-])({option}|-[sl] {option.lstrip('-')})(?![\w-])", script)
        ]
        assert absent == [], f"the completion of {name} for {shell} lacks some"


@pytest.mark.parametrize("name", COMMANDS)
def test_values_have_the_same_names_in_the_manual_and_in_the_help(name: str) -> None:
    page = PAGE_OF[name]
    terms = {re.split(r"[ =[]", term)[0]: term for term in described(page)}
    for option in COMMANDS[name].options:
        for spelling in option.names:
            # One that may stand without its value is written --option[=VALUE].
            expected = {spelling, f"{spelling} {option.metavar}", f"{spelling}[={option.metavar}]"}
            assert terms[spelling] in expected, f"{page.name}: the term of {spelling}"
            assert (terms[spelling] == spelling) == (option.metavar is None), f"{page.name}: the value of {spelling}"


def test_what_can_be_given_again_is_said() -> None:
    for name, command in COMMANDS.items():
        for item in section(PAGE_OF[name], "OPTIONS").findall(nodes.definition_list_item):
            words = names_in(literal.astext() for literal in item.next_node(nodes.term).findall(nodes.literal))
            several = any(words & set(option.names) for option in command.options if option.takes is Takes.VALUES)
            assert several == ("May be given several times" in item.astext()), (name, words)


def test_the_groups_of_options_are_those_of_the_help() -> None:
    titles = [part.next_node(nodes.title).astext().lower() for part in section(PAGE, "OPTIONS").findall(nodes.section)]
    assert titles[1:] == list(GROUPS)


def test_the_sections() -> None:
    tree = publish_doctree(PAGE.read_text(encoding="utf-8"))
    titles = [child.next_node(nodes.title).astext() for child in tree if isinstance(child, nodes.section)]
    assert [title for title in titles if title in SECTIONS] == SECTIONS


@pytest.mark.parametrize(
    ("name", "parser"), [("virt-dib-boot-test", boot_cli.build_parser()), ("virt-dib-doctor", doctor.build_parser())]
)
def test_the_page_of_a_small_command_has_its_options(name: str, parser: Parser) -> None:
    shown = names_in(iter(OPTION.findall(parser.format_help())))
    assert names_in(described(PAGE_OF[name])) == {
        name
        for name in shown
        if name in parser._option_string_actions  # noqa: SLF001 - argparse's one list of names
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


def commands_in(page: Path) -> Iterator[list[str]]:
    """The words of the commands in the examples of *page*, without variables before them."""
    tree = publish_doctree(page.read_text(encoding="utf-8"))
    for block in tree.findall(nodes.literal_block):
        for line in block.astext().replace("\\\n", "").splitlines():
            words = shlex.split(line) if re.match(r"(\w+=\S* )*virt-", line) else []
            while words and re.match(r"\w+=", words[0]):
                del words[0]
            if words:
                yield words


def test_the_commands_in_the_manual_of_the_drop_ins_are_understood() -> None:
    commands = list(commands_in(PAGE_OF["virt-disk-image-create"]))
    assert {words[0] for words in commands} == {"virt-disk-image-create", "virt-ramdisk-image-create"}
    for program, *words in commands:
        command = dib_command.parse(words, {"HOME": "/"}, prog=program, ramdisk=program != dib_command.DISK_PROG)
        assert (command.problems, bool(command.spec.elements)) == ((), True), words


def test_the_examples_of_files_of_images_are_understood(tmp_path: Path) -> None:
    tree = publish_doctree(IMAGES_PAGE.read_text(encoding="utf-8"))
    example = next(block.astext() for block in tree.findall(nodes.literal_block) if "imagename" in block.astext())
    (tmp_path / "images.yaml").write_text(example)
    images = image_file.read([tmp_path / "images.yaml"])
    assert [(request.name, request.ramdisk) for request in images.requests] == [("debian", False), ("deploy", True)]
    commands = list(commands_in(IMAGES_PAGE))
    assert len(commands) == 2
    for _, *words in commands:
        assert image_file_cli.build_parser().parse_intermixed_args(words).files == ["images.yaml"]


def test_the_page_of_the_links_has_their_names() -> None:
    text = section(PAGE_OF["virt-dib-links"], "DESCRIPTION").astext()
    assert [name for name in dib_links.NAMES if f"{name}" not in text or f"virt-{name}(1)" not in text] == []


def test_the_keys_of_files_of_images_and_their_values_are_in_the_manual() -> None:
    keys: dict[str, set[str]] = {}
    for item in section(IMAGES_PAGE, "KEYS").findall(nodes.definition_list_item):
        literals = {literal.astext() for literal in item.next_node(nodes.definition).findall(nodes.literal)}
        keys |= {term.astext(): literals for term in item.next_node(nodes.term).findall(nodes.literal)}
    assert keys.keys() == {key.name for key in image_file.KEYS}
    for key in image_file.KEYS:
        assert set(key.choices) <= keys[key.name], key.name
        if key.option is not None and not key.option.startswith("--") and key.kind is image_file.Kind.FLAG:
            assert key.option in keys[key.name], key.name


@pytest.mark.parametrize("name", PAGES)
def test_man_reads_the_page_without_a_complaint(name: str, tmp_path: Path) -> None:
    if tools.find("man") is None:
        pytest.skip("man is not installed")
    page = tmp_path / f"{name}.1"
    names = [name, *manual.other_names(manual.DOCS / f"{name}.rst")]
    page.write_text(manual.man_page(manual.DOCS / f"{name}.rst"), encoding="utf-8")
    result = tools.run(
        ["man", "--warnings", "-l", page],
        doing="reading the page",
        environment={"PATH": "/usr/bin:/bin", "MANWIDTH": "80", "LC_ALL": "C.UTF-8"},
    )
    assert result.stderr == ""
    assert f" NAME {', '.join(names)} - " in " ".join(result.stdout.split())
    assert "EXIT STATUS" in result.stdout


def test_every_link_in_the_html_leads_somewhere() -> None:
    for name in PAGES:
        text = manual.html_page(manual.DOCS / f"{name}.rst")
        anchors = set(re.findall(r'id="([^"]+)"', text))
        assert set(re.findall(r'href="#([^"]+)"', text)) - anchors == set()
        assert "<h1" in text


def test_a_page_of_two_commands_is_found_by_both_names(tmp_path: Path) -> None:
    files = share.make(tmp_path)
    assert manual.other_names(PAGE_OF["virt-disk-image-create"]) == ["virt-ramdisk-image-create"]
    assert str(tmp_path / "man/man1/virt-ramdisk-image-create.1") in files["share/man/man1"]
    if tools.find("man") is None:
        pytest.skip("man is not installed")
    result = tools.run(
        ["man", "-M", tmp_path / "man", "virt-ramdisk-image-create"],
        doing="reading the page",
        environment={"PATH": "/usr/bin:/bin", "MANWIDTH": "80", "LC_ALL": "C.UTF-8"},
    )
    assert result.stdout.startswith("VIRT-DISK-IMAGE-CREATE(1)")
    assert "EXIT STATUS" in result.stdout


def test_the_pages_that_messages_name_are_installed_with_all_that_they_link_to(tmp_path: Path) -> None:
    files = {Path(path) for paths in share.make(tmp_path).values() for path in paths}
    top = tmp_path / "doc" / "virt-dib"
    code = "".join(path.read_text() for path in (manual.DOCS.parent / "src").rglob("*.py"))
    code += "".join(path.read_text() for path in manual.sources())
    named = set(re.findall(r"\bdocs/[a-z-]+\.(?:md|schema\.json)", code))
    assert {"docs/caches.md", "docs/troubleshooting.md", "docs/machine-readable.schema.json"} <= named
    assert [name for name in sorted(named) if top / name not in files] == []
    for page in [top / "README.md", *(top / "docs").glob("*.md")]:
        links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == [], page.name


def test_a_source_distribution_has_what_all_this_is_made_of(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "demo", "*.egg-info", "__pycache__", "locale")
    shutil.copytree(manual.DOCS.parent, source, ignore=ignored)
    words = ["setup.py", "-q", "sdist", "-d", str(tmp_path / "sdist")]
    tools.run([sys.executable, *words], doing="making a source distribution", cwd=source)
    (archive,) = (tmp_path / "sdist").glob("*.tar.gz")
    tools.run(["tar", "-xzf", archive], doing="unpacking it", cwd=tmp_path)
    (unpacked,) = tmp_path.glob("virt*dib-*/")
    tools.run([sys.executable, "-m", "generate.share", tmp_path / "made"], doing="making the files", cwd=unpacked)
    share.make(tmp_path / "expected")
    made, expected = (
        {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()}
        for top in (tmp_path / "made", tmp_path / "expected")
    )
    assert made == expected


def test_pip_can_make_all_this_with_what_the_project_says_it_is_built_with(tmp_path: Path) -> None:
    # What pip makes a wheel in: nothing but the standard library and the packages that are named.
    named = tomllib.loads((manual.DOCS.parent / "pyproject.toml").read_text())["build-system"]["requires"]
    alone = tmp_path / "alone"
    alone.mkdir()
    for requirement in map(Requirement, named):
        if requirement.marker is None or requirement.marker.evaluate():
            package = distribution(requirement.name)
            for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
                (alone / top).symlink_to(str(package.locate_file(top)))
    tools.run(
        [sys.executable, "-S", "-m", "generate.share", tmp_path / "made"],
        doing="making the files",
        cwd=manual.DOCS.parent,
        environment={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{alone}:{manual.DOCS.parent / 'src'}"},
    )
    assert (tmp_path / "made/man/man1/virt-dib.1").exists()


def test_manual_and_completion_are_installed_with_the_package() -> None:
    share_dir = Path(sysconfig.get_paths()["data"]) / "share"
    if not Path(sys.executable).is_relative_to(share_dir.parent):
        pytest.skip("virt-dib is not installed where this Python is")
    expected = [f"man/man1/{name}.1" for name in PAGE_OF] + [f"doc/virt-dib/{name}.html" for name in PAGES]
    for directory, name in share.COMPLETION_FILES.values():
        expected += [f"{directory}/{name.format(command)}" for command in COMMANDS]
    assert [path for path in expected if not (share_dir / path).is_file()] == []
