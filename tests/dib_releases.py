# SPDX-License-Identifier: Apache-2.0
"""Releases of diskimage-builder from PyPI, downloaded once and unpacked as pip does it for users."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from virt_dib import tools
from virt_dib.errors import ToolError

RELEASES = ("0.1.43", "1.28.0", "2.0.0", "2.38.0", "3.0.0", "3.20.0", "3.43.0")
_DOWNLOAD_TIMEOUT_S = 300


@dataclass(frozen=True, kw_only=True)
class Release:
    """One release, unpacked."""

    version: str
    site: Path
    """Where its Python package is."""

    @property
    def top(self) -> Path:
        """Where ``lib`` and ``elements`` are."""
        inside = self.site / "diskimage_builder"
        return inside if (inside / "lib").is_dir() else self.site / "share" / "diskimage-builder"

    @property
    def options(self) -> list[str]:
        """What the manual has users give for it."""
        return ["-B", str(self.top / "lib"), "-p", str(self.top / "elements")]


@functools.cache
def release(version: str) -> Release:
    """The release *version*, from the user's cache directory. The test is skipped where PyPI cannot be reached."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "virt-dib-tests"
    site = base / f"diskimage-builder-{version}"
    if not site.exists():
        base.mkdir(parents=True, exist_ok=True)
        partial = base / f".{version}.{os.getpid()}"
        command: list[str | Path] = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        try:
            tools.run(
                [*command, "--target", partial, "--only-binary=:all:", f"diskimage-builder=={version}"],
                doing=f"downloading diskimage-builder {version}",
                environment=os.environ,
                timeout_s=_DOWNLOAD_TIMEOUT_S,
            )
        except ToolError as error:
            pytest.skip(str(error))
        partial.rename(site)
    return Release(version=version, site=site)
