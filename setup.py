# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml cannot say: files made of other sources, which are installed beside the package."""

import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# Neither is there when a front end such as pip builds the package in an environment of its own.
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from generate import share  # noqa: E402 - found only with the path above

setup(data_files=[(directory, files) for directory, files in share.make(Path("build/share")).items()])
