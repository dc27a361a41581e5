# SPDX-License-Identifier: Apache-2.0
"""docs/troubleshooting.md has the errors and warnings of the code, all of them and no others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from generate import catalogue
from generate.catalogue import Places

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
VALUE = "…"
"""Stands on the page for what is put into a message."""
NEVER = re.compile(r"(?!)")
FIRST = ((0,), ())
FAULTS = Places(
    arguments={
        "Problem": ((0,), ("message",)),
        "SelectionProblem": ((0,), ("message",)),
        "Check": ((), ("detail",)),
        "Verdict": ((), ("reason",)),
        "_Unusable": FIRST,
        "_refusal": ((1,), ()),
        "_damaged": ((1,), ()),
        "_in_use": ((1,), ()),
        "_mistake": ((1,), ()),
        "error": FIRST,
        "warning": FIRST,
        "on_message": FIRST,
        "refused.append": FIRST,
        "warnings.append": FIRST,
        "sys.exit": FIRST,
    },
    of_errors=((0,), ("message",)),
    returning=re.compile(r"_failure|_watch|_judge|_refusal|_unusable|_why_not_python_3|_conclusion"),
    constants=NEVER,
)
"""Where the code says that something is wrong."""
STEPS = Places(
    arguments={
        "check": FIRST,
        "_call": FIRST,
        "_result": ((1,), ()),
        "finish": ((1,), ()),
        "run": ((), ("doing",)),
    },
    of_errors=((), ()),
    returning=NEVER,
    constants=NEVER,
)
"""Where it says what it was doing, which a reason follows when that fails."""
NO_FAULTS = {
    "KVM works",
    "works: builds with --isolation sandbox",
    "importable by …",
    "elements in …",
    "… free in '…'",
    "…/supermin.d",
    "… (there is also …)",
    "…; builds in the appliance take about 15 times as long",
    "dib-run-parts Running …/…",
    "dib-run-parts … completed",
    # Where it is put together of others.
    "sudo: …",
}
"""Said where nothing is wrong, or beside what is."""
UNSEEN = {
    "asking the system's Python",
    "asking vhd-util",
    "asking qemu for its version",
    "asking …",
    "compiling DIB's Python modules",
    "trying bwrap",
}
"""Steps whose failure is not told so."""
SHELL_VALUE = re.compile(r"\$\(\((?:[^()]|\([^()]*\))*\)\)|\$\{[^}]*\}|\$\w+")
SAID_IN_SHELL = re.compile(r'(?:echo|refuse "\$\w+"|usage) "(?P<text>[^"]+)"(?P<to> >&2)?')


# ---- the code ----


def modules() -> list[Path]:
    package = catalogue.PACKAGE_DIR
    return [*sorted(package.glob("*.py")), *sorted((package / "guest").glob("*.py"))]


def plain(template: str) -> str:
    """A message with … for each value, and for values without anything between them."""
    text = re.sub(r"\{\w*\}", VALUE, template.replace("{{", "\0").replace("}}", "\1"))
    return re.sub(f"{VALUE}+", VALUE, text).replace("\0", "{").replace("\1", "}")


def said_in_shell() -> Iterator[tuple[str, str]]:
    for path in sorted((catalogue.PACKAGE_DIR / "guest").glob("*.sh")):
        for found in SAID_IN_SHELL.finditer(path.read_text()):
            word = found[0].split()[0]
            if word != "echo" or found["to"]:
                yield path.name, f"{'sudo: ' if word == 'usage' else ''}{SHELL_VALUE.sub(VALUE, found['text'])}"


@cache
def faults() -> dict[str, str]:
    """The messages, and where each is said."""
    found = {plain(text): "argparse" for text in catalogue.OF_ARGPARSE}
    for path in modules():
        for line, text in catalogue.messages(path, FAULTS):
            found.setdefault(plain(text), f"{path.name}:{line}")
        for line, text in catalogue.messages(path, STEPS) if path.parent == catalogue.PACKAGE_DIR else ():
            found.setdefault(f"{plain(text)}: {VALUE}", f"{path.name}:{line}")
    found.update({text: name for name, text in said_in_shell()})
    for text in NO_FAULTS | {f"{step}: {VALUE}" for step in UNSEEN}:
        # Of what is not said any more, this is the place to be told.
        del found[text]
    return found


@cache
def texts() -> frozenset[str]:
    """All that is written in the code, with … for values: what may be put into a message, besides."""
    found = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values]
                found.add(re.sub(f"{VALUE}+", VALUE, "".join(parts)))
    return frozenset({text.strip("\n") for text in found} | faults().keys() | {VALUE})


# ---- the page ----


def rows() -> list[list[str]]:
    """The cells of its tables that begin with a message."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [line.strip("|").split("|") for line in lines if line.startswith("| `")]


def entries() -> list[str]:
    """The messages on the page: what is in the first column, as code."""
    return [entry for row in rows() for entry in re.findall(r"`([^`]+)`", row[0])]


@cache
def patterns() -> list[tuple[str, re.Pattern[str]]]:
    """Of all that has values put into it; first what leaves least to them."""
    templates = [text for text in texts() if VALUE in text and re.search("[a-z]{2}", text)]
    templates.sort(key=lambda text: -len(text.replace(VALUE, "")))
    return [(text, re.compile("(.*?)".join(map(re.escape, text.split(VALUE))))) for text in templates]


def meant_by(entry: str) -> set[str]:
    """The messages that *entry* is made of, one put into the other; none for what nobody says."""
    message = entry.removeprefix("warning: ")
    if message in texts():
        return {message}
    step, _, reason = message.rpartition(": ")
    if reason == VALUE and step in texts():
        return {message, step}
    for template, pattern in patterns():
        found = pattern.fullmatch(message)
        if found is not None and all(not value or value in texts() for value in found.groups()):
            return {template, *found.groups()}
    return set()


# ---- the tests ----


def test_every_message_of_the_code_is_on_the_page() -> None:
    there = set().union(*map(meant_by, entries()))
    missing = [f"{place}: {text}" for text, place in faults().items() if text not in there]
    assert len(faults()) > 300
    assert missing == [], f"give each a row in {PAGE.relative_to(ROOT)}, with its cause and what to do"


def test_the_page_has_no_message_that_the_code_does_not_have() -> None:
    assert len(entries()) > 300
    assert [entry for entry in entries() if not meant_by(entry)] == []


def test_a_message_that_nobody_says_is_found_out() -> None:
    for entry in ("cannot use '…' as the shoe size", "in …: whatever", "no such message", "element '…' not there"):
        assert meant_by(entry) == set()
    assert "cannot use '…' as the …" in meant_by("cannot use '…' as the number of processors")


def test_every_message_has_a_cause_and_what_to_do() -> None:
    assert [row[0] for row in rows() if len(row) != 3 or not all(cell.strip() for cell in row)] == []


@pytest.mark.parametrize("page", ["docs/index.md", "README.md", "docs/virt-dib.rst"])
def test_the_page_is_linked(page: str) -> None:
    assert "troubleshooting" in (ROOT / page).read_text()


def test_the_links_of_the_page_lead_somewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        linked = PAGE.parent / target if target else PAGE
        headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, f"{target}#{anchor}"
