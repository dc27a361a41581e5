# SPDX-License-Identifier: Apache-2.0
"""What the repository as a whole promises: its licence lines, its commands, its scripts, its pages."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tomllib

from virt_dib import tools

ROOT = Path(__file__).parents[1]
LICENCE_LINE = "SPDX-License-Identifier: Apache-2.0"
OPTION = re.compile(r"(?<!\S)--?[A-Za-z][a-z-]*")
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/index.md", "docs/security.md")

# Written in parts, so that this file passes its own test.
REGISTRY_HOSTS = tuple(
    ".".join(parts)
    for parts in (
        ("deb", "debian", "org"),
        ("security", "debian", "org"),
        ("archive", "ubuntu", "com"),
        ("security", "ubuntu", "com"),
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("registry", "npmjs"),
    )
)
HOME = r"(?<![\w.~-])/(?:home/(?!(?:me|u)/)[a-z][a-z0-9_-]*|root)/\w"
"""Files below somebody's home, but for those of examples."""


def project_files() -> list[Path]:
    """The files git has, and those it would take; the clone may be another user's."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = tools.run(command, doing="listing the project's files", cwd=ROOT).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def is_program(path: Path) -> bool:
    """Code in a language where ``#`` starts a comment."""
    named = path.suffix in {".py", ".pyi", ".sh"} or path.name == "Makefile"
    return path.stat().st_size > 0 and (named or path.read_bytes().startswith(b"#!"))


def commands(page: str) -> list[str]:
    """The commands in a page's fenced blocks, each on one line."""
    blocks = re.findall(r"^```(?:sh|console|bash)?\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_each_program_has_its_licence_line() -> None:
    programs = [path for path in project_files() if is_program(path)]
    without = [path for path in programs if LICENCE_LINE not in "\n".join(path.read_text().splitlines()[:3])]
    assert ROOT / "Makefile" in programs
    assert without == []


@pytest.mark.parametrize("parts", [("home", "alice", "src"), ("root", "project")])
def test_a_home_is_known_by_its_form(parts: Sequence[str]) -> None:
    path = "".join(f"/{part}" for part in parts)
    assert re.search(HOME, f"see '{path}'")
    assert not re.search(HOME, f"tree{path}")


def test_no_file_names_a_registry_or_a_place_on_one_machine() -> None:
    patterns = [re.escape(host) for host in REGISTRY_HOSTS]
    pattern = re.compile("|".join([*patterns, HOME]))
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in project_files()
        for number, line in enumerate(path.read_bytes().decode(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_each_console_script_has_its_function() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {"virt-dib", "virt-dib-doctor", "virt-dib-boot-test"} <= set(scripts)
    assert all(name == "virt-dib" or name.startswith("virt-") for name in scripts)
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function)), target


def test_shell_scripts_pass_shellcheck() -> None:
    shellcheck = tools.find("shellcheck")
    if shellcheck is None:
        if os.environ.get("CI"):
            pytest.fail("shellcheck is not installed")
        pytest.skip("shellcheck is not installed; make lint runs it too")
    scripts = [path for path in project_files() if is_program(path) and path.read_bytes().startswith(b"#!/bin/bash")]
    assert ROOT / "src/virt_dib/guest/run-phase.sh" in scripts
    result = tools.run([shellcheck, *scripts], doing="checking shell scripts", check=False)
    assert result.stdout == ""


def test_scripts_can_be_started() -> None:
    scripts = [*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"]
    assert [path.name for path in scripts if not os.access(path, os.X_OK)] == []


@pytest.mark.parametrize("name", PAGES)
def test_the_make_targets_a_page_names_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / name).read_text(), re.MULTILINE))
    assert {"demo", "test", "lint", "bench", "test-debian"} <= targets
    assert named - targets == set()
    assert named or name != "README.md"


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_a_page_links_to_exist(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("program", ["virt-dib", "virt-dib-boot-test", "virt-dib-doctor"])
def test_the_readme_uses_options_that_exist(program: str) -> None:
    lines = [line for line in commands((ROOT / "README.md").read_text()) if line.split()[0] == program]
    assert lines, f"the README shows no use of {program}"
    used = {word for line in lines for word in OPTION.findall(line)}
    shown = tools.run([Path(sys.executable).with_name(program), "--help"], doing="asking for help").stdout
    assert used - set(OPTION.findall(shown)) == set()


def test_the_readme_and_the_setup_script_name_the_same_packages() -> None:
    setup = (ROOT / "scripts" / "setup").read_text()
    array = re.search(r"^packages=\((.*?)^\)", setup, re.MULTILINE | re.DOTALL)
    assert array
    installed = set(re.sub(r"#.*", "", array[1]).split())
    install = next(line for line in commands((ROOT / "README.md").read_text()) if "apt-get install" in line)
    named = {word for word in shlex.split(install.split("install", 1)[1]) if not word.startswith("-")}
    # The last group of the script's is for developing, but for what boot tests need.
    for_development = {
        "busybox-static",
        "sudo",
        "make",
        "mtools",
        "shellcheck",
        "zsh",
        "fish",
        "podman",
        "skopeo",
    }
    assert named - {"linux-image-cloud-$(dpkg --print-architecture)"} == installed - for_development


class Apt:
    """An apt that reads its configuration from a directory, with the lists it is said to have fetched."""

    def __init__(self, directory: Path) -> None:
        self._sources = directory / "sources.list.d"
        self._lists = directory / "lists"
        self._config = directory / "apt.conf"
        self._sources.mkdir()
        (self._lists / "partial").mkdir(parents=True)
        self._config.write_text(
            f'Dir::Etc::sourcelist "/dev/null";\nDir::Etc::sourceparts "{self._sources}";\n'
            f'Dir::State::lists "{self._lists}";\nAPT::Architecture "amd64";\nAPT::Architectures "amd64";\n'
        )

    def add_source(self, name: str, text: str) -> None:
        (self._sources / name).write_text(text)

    def add_list(self, address: str, suite: str, *, origin: str, alias: str = "stable") -> None:
        """As 'apt-get update' leaves it for the component main of *suite*."""
        stem = f"{address.split('//')[1].replace('/', '_')}_dists_{suite}"
        packages = "main/binary-amd64/Packages"
        release = f"Origin: {origin}\nSuite: {alias}\nCodename: {suite}\nArchitectures: amd64\nComponents: main\n"
        (self._lists / f"{stem}_Release").write_text(f"{release}SHA256:\n {'0' * 64} 1 {packages}\n")
        (self._lists / f"{stem}_{packages.replace('/', '_')}").write_text("Package: none\nVersion: 1\n")

    def mirrors(self, **variables: str) -> list[str]:
        """What scripts/mirrors prints."""
        environment = {"PATH": os.environ["PATH"], "APT_CONFIG": str(self._config), **variables}
        return tools.run([ROOT / "scripts" / "mirrors"], doing="asking", environment=environment).stdout.splitlines()


@pytest.fixture
def apt(tmp_path: Path) -> Apt:
    if tools.find("apt-get") is None:
        pytest.skip("scripts/mirrors reads the configuration of apt, which is not here")
    return Apt(tmp_path)


ONE_LINE = """\
# deb http://old.example/debian jessie main
deb cdrom:[Debian GNU/Linux 12]/ bookworm main
deb-src http://mirror.example/debian trixie main
deb [arch=amd64] http://mirror.example/debian bookworm main contrib # the main one
deb http://mirror.example/debian bookworm-updates main
deb http://mirror.example/debian-security bookworm-security main
"""

DEB822 = """\
Types: deb
URIs: http://off.example/debian
Suites: jessie jessie-updates
Components: main
Enabled: no

Types: deb deb-src
# a comment between the fields
URIs: http://mirror.example/debian/
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: http://mirror.example/debian-security/
Suites: bookworm-security
Components: main
"""

EXPECTED = [
    "DIB_RELEASE=bookworm",
    "DIB_DISTRIBUTION_MIRROR=http://mirror.example/debian",
    "DIB_DEBIAN_SECURITY_MIRROR=http://mirror.example/debian-security",
]


@pytest.mark.parametrize(("name", "text"), [("debian.list", ONE_LINE), ("debian.sources", DEB822)])
@pytest.mark.parametrize("fetched", [False, True])
def test_mirrors_are_those_of_apt(apt: Apt, name: str, text: str, *, fetched: bool) -> None:
    apt.add_source(name, text)
    # Others use Debian's names too, and may come first.
    apt.add_source("aaa.list", "deb http://vendor.example/apt bookworm main\ndeb http://other.example/ any main\n")
    if fetched:
        apt.add_list("http://vendor.example/apt", "bookworm", origin="Vendor")
        apt.add_list("http://mirror.example/debian", "bookworm", origin="Debian")
        apt.add_list("http://mirror.example/debian", "bookworm-updates", origin="Debian")
        apt.add_list("http://mirror.example/debian-security", "bookworm-security", origin="Debian")
    assert apt.mirrors() == EXPECTED


def test_a_third_party_in_a_directory_named_debian_is_known_by_its_origin(apt: Apt) -> None:
    apt.add_source("aaa.list", "deb http://vendor.example/debian bookworm main\n")
    apt.add_source("debian.list", ONE_LINE)
    apt.add_list("http://vendor.example/debian", "bookworm", origin="Vendor")
    apt.add_list("http://mirror.example/debian", "bookworm", origin="Debian")
    apt.add_list("http://mirror.example/debian-security", "bookworm-security", origin="Debian")
    assert apt.mirrors() == EXPECTED


@pytest.mark.parametrize("fetched", [False, True])
def test_a_machine_without_a_security_archive_does_not_make_dib_ask_the_public_one(apt: Apt, *, fetched: bool) -> None:
    apt.add_source("a.list", "".join(f"deb http://m.example/debian bookworm{part} main\n" for part in ("", "-updates")))
    if fetched:
        apt.add_list("http://m.example/debian", "bookworm", origin="Debian")
    assert apt.mirrors() == [
        "DIB_RELEASE=bookworm",
        "DIB_DISTRIBUTION_MIRROR=http://m.example/debian",
        "DIB_APT_SOURCES_CONF=default:deb http://m.example/debian bookworm main",
    ]


def test_testing_is_named_so_and_needs_no_security_archive(apt: Apt) -> None:
    apt.add_source("a.list", "deb http://m.example/debian forky main\n")
    apt.add_list("http://m.example/debian", "forky", origin="Debian", alias="testing")
    assert apt.mirrors() == ["DIB_RELEASE=testing", "DIB_DISTRIBUTION_MIRROR=http://m.example/debian"]


def test_a_list_of_mirrors_in_a_file_is_looked_into(apt: Apt, tmp_path: Path) -> None:
    text = DEB822
    for name in ("debian", "debian-security"):
        addresses = tmp_path / f"{name}.list"
        addresses.write_text(f"# in turn\nhttp://mirror.example/{name}/\tpriority:1\nhttp://second.example/{name}\n")
        text = text.replace(f"http://mirror.example/{name}/", f"mirror+file:{addresses}")
    apt.add_source("a.sources", text)
    assert apt.mirrors() == EXPECTED


def test_variables_of_the_user_come_first(apt: Apt) -> None:
    apt.add_source("debian.list", ONE_LINE)
    assert apt.mirrors(DIB_RELEASE="sid", DIB_DISTRIBUTION_MIRROR="http://mine.example/debian") == [
        "DIB_RELEASE=sid",
        "DIB_DISTRIBUTION_MIRROR=http://mine.example/debian",
        EXPECTED[2],
    ]


def test_a_machine_of_another_distribution_leaves_dib_its_defaults(apt: Apt) -> None:
    text = "".join(f"deb http://m.example/ubuntu noble{part} main\n" for part in ("", "-updates", "-security"))
    apt.add_source("a.list", text + "deb http://vendor.example/debian stable main\n")
    assert apt.mirrors() == []
