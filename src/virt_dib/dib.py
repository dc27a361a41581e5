# SPDX-License-Identifier: Apache-2.0
"""The installed diskimage-builder: where it is, and which of its Python modules the guest needs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virt_dib import releases, tools
from virt_dib.errors import PrerequisiteError, ToolError, UsageError
from virt_dib.releases import DiskMaker, Rules

_PACKAGE = "diskimage_builder"
_DISTRIBUTION = "diskimage-builder"
_COMMAND = "disk-image-create"
_INSTALL = "install it: pip install diskimage-builder; or give its library directory with --dib-library"
_PROGRAMS = ("disk-image-create", "disk-image-get-kernel", "element-info", "ramdisk-image-create")
"""Of releases before 2.0.0, which elements may call."""

_NEEDED: tuple[str, ...] = (_PACKAGE, "networkx", "stevedore", "yaml")
_WANTED = ("pbr", "six", "decorator", "importlib_metadata", "zipp")
"""Taken along where installed: DIB's version imports pbr, older releases of DIB, stevedore and networkx the others."""

# Runs in DIB's interpreter, which may be as old as Python 3.8. Only the package's metadata directory names
# its plugins, and the private attribute is the one way to it that works for .egg-info too. Nothing is imported
# while the working directory is searched: a json.py may lie there.
_QUESTION = """
import sys
site, distribution, *names = sys.argv[1:]
sys.path[:] = ([site] if site else []) + [entry for entry in sys.path if entry]
import importlib.metadata, importlib.util, json, os
answer = {"modules": {}, "metadata": None}
for name in names:
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None and os.path.exists(spec.origin):
        package = spec.submodule_search_locations is not None
        answer["modules"][name] = os.path.dirname(spec.origin) if package else spec.origin
try:
    answer["metadata"] = str(importlib.metadata.distribution(distribution)._path)
except importlib.metadata.PackageNotFoundError:
    pass
print(json.dumps(answer))
"""
_QUESTION_TIMEOUT_S = 60.0
_PYTHON_HINT = (
    "give a Python of 3.8 or newer that has diskimage-builder, such as that of a virtual environment: DIR/bin/python"
)
_LONGEST_HEAD = 4096
_LONG_SHEBANG = re.compile(r"""'''exec' "?(?P<python>[^"]+?)"? "\$0" "\$@\"""")
"""Second line of a script of pip's whose interpreter has a blank in its path, or a very long path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DibInstallation:
    """One diskimage-builder on this host."""

    rules: Rules
    """What its runner does."""
    library_dir: Path
    """Holds ``die``."""
    elements_dir: Path
    python: Path
    """An interpreter that can import the package when the package's parent is on its path."""
    package_dir: Path
    """The Python package ``diskimage_builder``. A release before 2.0.0 may be without."""
    programs: tuple[Path, ...] = ()
    """Programs that elements may expect in ``bin`` beside the library: those of a release before 2.0.0."""

    @property
    def version(self) -> str:
        """``unknown`` where there is no metadata, as in a checkout."""
        return self.rules.version

    @property
    def in_package(self) -> bool:
        """Whether library and elements are inside the Python package, as since 2.0.0."""
        return self.library_dir.parent == self.package_dir


def find_installation(library: Path | None, python: Path | None = None) -> DibInstallation:
    """The diskimage-builder at *library* (``-B``), or else the installed one.

    Installed: for *python* (``--python``), or without it in the Python that runs virt-dib, or in the one that
    ``disk-image-create`` runs with.

    Raises:
        UsageError: *library* is not the library directory of a diskimage-builder, or *python* has none.
        PrerequisiteError: none is installed.
    """
    if library is not None:
        return _at_library(Path(os.path.realpath(library)), python or Path(sys.executable))
    if python is not None:
        try:
            found = _ask(python, None)["modules"].get(_PACKAGE)
        except PrerequisiteError as error:
            raise UsageError(f"{error}, which --python names", hint=_PYTHON_HINT) from error
        if found is None:
            raise UsageError(
                f"looking for diskimage-builder with --python: '{python}' cannot import {_PACKAGE}",
                hint=f"install it there: {python} -m pip install diskimage-builder; or name its library with "
                "--dib-library",
            )
        return _at_package(Path(found), python)
    own = importlib.util.find_spec(_PACKAGE)
    if own is not None and own.origin is not None:
        return _at_package(Path(own.origin).parent, Path(sys.executable))
    command = tools.find(_COMMAND)
    if command is None:
        raise PrerequisiteError("diskimage-builder not found, needed to build images", hint=_INSTALL)
    python = _interpreter_of(command)
    package = _ask(python, None)["modules"].get(_PACKAGE) if python else None
    if python is None or package is None:
        raise PrerequisiteError(
            f"looking for the diskimage-builder behind '{command}': "
            + (f"'{python}' cannot import {_PACKAGE}" if python else "it does not name the Python it runs with"),
            hint=_INSTALL,
        )
    return _at_package(Path(package), python)


def guest_modules(installation: DibInstallation) -> tuple[Path, ...]:
    """Modules, packages and metadata that dib-block-device and package-installs need in the guest.

    Copied side by side into one directory on ``sys.path``, they are complete. The metadata directory is
    among them, for it names the plugins of dib-block-device (contract section 3.4).

    Raises:
        PrerequisiteError: some are missing.
    """
    configures = installation.rules.disk_maker is DiskMaker.CONFIGURATION
    needed = _NEEDED if configures else ("yaml",)
    if not configures and installation.package_dir.exists():
        needed = (_PACKAGE, "yaml")
    answer = _ask(installation.python, installation.package_dir.parent)
    modules: Mapping[str, str] = answer["modules"]
    missing = [f"module {name}" for name in needed if name not in modules]
    if configures and answer["metadata"] is None:
        missing.append(f"metadata of {_DISTRIBUTION}")
    if missing:
        raise PrerequisiteError(
            f"looking for the Python modules of diskimage-builder with '{installation.python}': "
            f"missing: {', '.join(missing)}",
            hint="install diskimage-builder and what it depends on: pip install diskimage-builder",
        )
    found = [modules[name] for name in (*needed, *_WANTED) if name in modules]
    return tuple(Path(path) for path in (*found, *([answer["metadata"]] if configures else [])))


def _at_library(library: Path, python: Path) -> DibInstallation:
    top = library.parent
    in_package = os.path.exists(top / "__init__.py") or not os.path.exists(library / "common-functions")
    lacking = _lacking(library / "die", top / "elements", *([top / "block_device"] if in_package else []))
    if lacking is not None:
        raise UsageError(
            f"cannot use '{library}' as diskimage-builder's library: '{lacking}' does not exist or cannot be read",
            hint="give the directory 'lib' inside the Python package diskimage_builder, or for a release before 2.0.0 "
            "the 'lib' beside its 'elements'; or leave out --dib-library",
        )
    return _described(top, library, python) if in_package else _described_share(top, library, python)


def _described_share(top: Path, library: Path, python: Path) -> DibInstallation:
    """A release before 2.0.0: unpacked source, ``share`` of an installation, or the data of an unpacked wheel."""
    # It may lie anywhere, directly below / too.
    prefix, above = top.parent.parent, top.parent.parent.parent
    sites = [top, *top.parents[:4], *sorted(prefix.glob("lib/python*/*-packages"))]
    site = next((site for site in sites if os.path.exists(site / _PACKAGE / "__init__.py")), None)
    beside = _metadata(site) if site is not None else None
    directories = [top / "bin", prefix / "bin", above / "scripts"]
    programs = next((found for directory in directories if (found := _programs(directory))), ())
    return DibInstallation(
        rules=releases.rules(beside.version) if beside else releases.guess(top),
        library_dir=library,
        elements_dir=top / "elements",
        python=python,
        package_dir=(site or top) / _PACKAGE,
        programs=programs,
    )


def _programs(directory: Path) -> tuple[Path, ...]:
    return tuple(path for name in _PROGRAMS if os.path.isfile(path := directory / name))


def _at_package(package: Path, python: Path) -> DibInstallation:
    library = package / "lib"
    lacking = _lacking(library / "die", package / "elements")
    if lacking is not None:
        raise PrerequisiteError(
            f"diskimage-builder in '{package}' is incomplete: '{lacking}' does not exist or cannot be read",
            hint="install it again: pip install --force-reinstall diskimage-builder",
        )
    return _described(package, library, python)


def _lacking(*paths: Path) -> Path | None:
    return next((path for path in paths if not os.access(path, os.R_OK)), None)


def _described(package: Path, library: Path, python: Path) -> DibInstallation:
    beside = _metadata(package.parent)
    return DibInstallation(
        rules=releases.rules(beside.version) if beside else releases.guess(package),
        library_dir=library,
        elements_dir=package / "elements",
        python=python,
        package_dir=package,
    )


def _metadata(site: Path) -> importlib.metadata.Distribution | None:
    return next(iter(importlib.metadata.distributions(name=_DISTRIBUTION, path=[str(site)])), None)


def _ask(python: Path, site: Path | None) -> Mapping[str, Any]:
    try:
        result = tools.run(
            [python, "-c", _QUESTION, site or "", _DISTRIBUTION, *_NEEDED, *_WANTED],
            doing=f"asking '{python}' for the modules of diskimage-builder",
            # The user's own Python, which the user's variables lead to its modules.
            environment=os.environ,
            timeout_s=_QUESTION_TIMEOUT_S,
        )
    except ToolError as error:
        raise PrerequisiteError(f"looking for diskimage-builder: {error}", hint=_INSTALL) from error
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(result.stdout)
        if isinstance(answer, dict) and isinstance(answer.get("modules"), dict) and "metadata" in answer:
            return answer
    raise PrerequisiteError(
        f"looking for diskimage-builder: '{python}' does not answer as a Python does", hint=_INSTALL
    )


def _interpreter_of(script: Path) -> Path | None:
    """The Python that the first lines of *script* name."""
    try:
        with script.open("rb") as stream:
            first, *rest = stream.read(_LONGEST_HEAD).decode(errors="replace").split("\n")
    except OSError:
        return None
    long = _LONG_SHEBANG.match(rest[0]) if rest else None
    words = [long["python"]] if long else first.removeprefix("#!").split() if first.startswith("#!") else []
    if words and Path(words[0]).name == "env":
        words = [word for word in words[1:] if not word.startswith("-")]
    if not words or not Path(words[0]).name.startswith(("python", "pypy")):
        return None
    return tools.find(words[0])
