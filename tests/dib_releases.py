# SPDX-License-Identifier: Apache-2.0
"""Releases of diskimage-builder from PyPI, downloaded once and unpacked as pip does it for users."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from virt_dib import tools
from virt_dib.errors import ToolError

_HASHES = {
    "0.1.43": "d86b8b29ff3edf66df21b61703a7ced4c01d095ca84bf0d92575002598a9fd56",
    "1.28.0": "44bc617cb2c05aae4eebca276aa179c0f239854cfeed6b74493e4cecf4368a55",
    "2.0.0": "81fc90fff8966e0f5ac2e9d9fd2a7f1cf53e31dd547b2a30dacca52f94512f01",
    "2.38.0": "75a679640d20c16652af396f7abbc8228b6f3f4de1c049d4d7fe0001c64f1646",
    "3.0.0": "c8db0f8273da10970c2bb4827c755af9c4995e3bfb73a5ab1a8c5e8f24cc9ef0",
    "3.20.0": "2a64ccb06eeb3b635853ba9e17196ad32714c8a48b9f1d91978eefdafa9173d7",
    "3.43.0": "ece951ea63ea0ea55ecb4c4a75d6d453dc5e77c5558aace3dee883fa0e2dd039",
}
"""SHA-256 of their wheels."""
RELEASES = tuple(_HASHES)
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
        try:
            pip(
                ["install", "--no-compile", "--target", partial, "--only-binary=:all:"],
                {f"diskimage-builder=={version}": _HASHES[version]},
            )
        except ToolError as error:
            if "DO NOT MATCH THE HASHES" in str(error):
                raise
            pytest.skip(str(error))
        partial.rename(site)
    return Release(version=version, site=site)


def pip(words: Sequence[str | Path], packages: Mapping[str, str]) -> None:
    """Run pip for *packages*, pinned, without what they need. The values are the SHA-256 of the only file to take."""
    command: list[str | Path] = [sys.executable, "-m", "pip", *words, "--quiet", "--no-deps", "--require-hashes"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.writelines(f"{package} --hash=sha256:{digest}\n" for package, digest in packages.items())
        wanted.flush()
        tools.run(
            [*command, "--requirement", wanted.name],
            doing=f"downloading {', '.join(packages)}",
            environment=os.environ,
            timeout_s=_DOWNLOAD_TIMEOUT_S,
        )
