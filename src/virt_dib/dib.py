# SPDX-License-Identifier: Apache-2.0
"""The installed diskimage-builder: where it is, and which of its Python modules the guest needs."""

from __future__ import annotations

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

from virt_dib import tools
from virt_dib.errors import PrerequisiteError, ToolError, UsageError

_PACKAGE = "diskimage_builder"
_DISTRIBUTION = "diskimage-builder"
_COMMAND = "disk-image-create"
_INSTALL = "install it: pip install diskimage-builder; or give its library directory with -B"

_NEEDED = (_PACKAGE, "networkx", "stevedore", "yaml")
_WANTED = ("pbr", "six", "decorator", "importlib_metadata", "zipp")
"""Taken along where installed: DIB's version imports pbr, older releases of stevedore and networkx the others."""

# Runs in DIB's interpreter, which may be as old as Python 3.8. Only the package's metadata directory names
# its plugins, and the private attribute is the one way to it that works for .egg-info too.
_QUESTION = """
import importlib.metadata, importlib.util, json, os, sys
site, distribution, *names = sys.argv[1:]
sys.path[:] = ([site] if site else []) + [entry for entry in sys.path if entry]
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
_LONGEST_HEAD = 4096
_LONG_SHEBANG = re.compile(r"""'''exec' "?(?P<python>[^"]+?)"? "\$0" "\$@\"""")
"""Second line of a script of pip's whose interpreter has a blank in its path, or a very long path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DibInstallation:
    """One diskimage-builder on this host."""

    version: str
    """``unknown`` where there is no metadata beside the package, as in a checkout."""
    library_dir: Path
    """Holds ``die`` and ``dib-run-parts``."""
    elements_dir: Path
    python: Path
    """An interpreter that can import the package when the package's parent is on its path."""
    package_dir: Path
    """The Python package ``diskimage_builder``."""


def find_installation(library: Path | None) -> DibInstallation:
    """The diskimage-builder at *library* (``-B``), or else the installed one.

    Installed: in the Python that runs virt-dib, or in the one that ``disk-image-create`` runs with.

    Raises:
        UsageError: *library* is not the library directory of a diskimage-builder.
        PrerequisiteError: none is installed.
    """
    if library is not None:
        return _at_library(Path(os.path.realpath(library)))
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
    answer = _ask(installation.python, installation.package_dir.parent)
    modules: Mapping[str, str] = answer["modules"]
    missing = [f"module {name}" for name in _NEEDED if name not in modules]
    if answer["metadata"] is None:
        missing.append(f"metadata of {_DISTRIBUTION}")
    if missing:
        raise PrerequisiteError(
            f"looking for the Python modules of diskimage-builder with '{installation.python}': "
            f"missing: {', '.join(missing)}",
            hint="install diskimage-builder and what it depends on: pip install diskimage-builder",
        )
    found = [modules[name] for name in (*_NEEDED, *_WANTED) if name in modules]
    return tuple(Path(path) for path in (*found, answer["metadata"]))


def _at_library(library: Path) -> DibInstallation:
    package = library.parent
    lacking = _lacking(library / "die", package / "elements", package / "block_device")
    if lacking is not None:
        raise UsageError(
            f"cannot use '{library}' as diskimage-builder's library: '{lacking}' does not exist or cannot be read",
            hint="give the directory 'lib' inside the Python package diskimage_builder, or leave out -B",
        )
    return _described(package, library, Path(sys.executable))


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
    beside = next(iter(importlib.metadata.distributions(name=_DISTRIBUTION, path=[str(package.parent)])), None)
    return DibInstallation(
        version=beside.version if beside else "unknown",
        library_dir=library,
        elements_dir=package / "elements",
        python=python,
        package_dir=package,
    )


def _ask(python: Path, site: Path | None) -> Mapping[str, Any]:
    try:
        result = tools.run(
            [python, "-c", _QUESTION, site or "", _DISTRIBUTION, *_NEEDED, *_WANTED],
            doing=f"asking '{python}' for the modules of diskimage-builder",
            timeout_s=_QUESTION_TIMEOUT_S,
        )
        answer: Mapping[str, Any] = json.loads(result.stdout)
    except (ToolError, ValueError) as error:
        raise PrerequisiteError(f"looking for diskimage-builder: {error}", hint=_INSTALL) from error
    return answer


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
