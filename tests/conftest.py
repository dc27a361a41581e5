# SPDX-License-Identifier: Apache-2.0
"""Fixtures, and the rule that no appliance test may be skipped in CI."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_origin

import pytest
from hypothesis import settings

from helpers import (
    ISOLATIONS,
    ODD_VALUE,
    ODD_VARIABLES,
    Run,
    heed_signals,
    make_probe,
    make_tiny_os,
    skip_without,
    virt_dib,
)
from virt_dib import staging, tools
from virt_dib.appliance import Appliance, open_appliance
from virt_dib.files import remove_tree
from virt_dib.machine import Disk, Settings
from virt_dib.spec import DEFAULT_MEMORY_MIB
from virt_dib.supermin import cache_dir

MEASURING = ("COVERAGE_PROCESS_START", "COVERAGE_DIR", "PYTEST_CURRENT_TEST")
"""The variables that coverage.ini needs."""

DIBS = ("disk-image-create", "ramdisk-image-create", "diskimage-builder")

# How long an example takes says something about the machine's other work, not about the code.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the outcome of comparisons with diskimage-builder goes."""
    parser.addoption("--comparisons", metavar="FILE", help="write what test_drop_in.py compared to FILE, as a table")


def pytest_configure() -> None:
    """Take back what is this machine's: a language, settings, and ignored signals, as of nohup, which are inherited."""
    for name in ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        os.environ.pop(name, None)
    os.environ["LC_ALL"] = "C.UTF-8"
    os.environ["VIRT_DIB_CONFIG"] = os.devnull
    heed_signals()
    if MEASURING[0] in os.environ:
        measure_programs()


def measure_programs() -> None:
    """Have those programs of ours measured, too, whose environment a test makes up; see failure_branches.py."""
    popen: Any = get_origin(tools.Process)
    real = popen.__init__

    def begin(self: tools.Process, args: Sequence[str | Path], **options: Any) -> None:  # noqa: ANN401 - Popen's
        environment = options.get("env")
        # Not those of diskimage-builder, whose scripts would see the variables.
        ours = any(os.fspath(word).startswith(sys.prefix) and Path(word).name not in DIBS for word in args)
        if environment is not None and ours and "-I" not in args:
            options["env"] = {name: os.environ[name] for name in MEASURING if name in os.environ} | environment
        real(self, args, **options)

    popen.__init__ = begin


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Turn a skipped appliance test into a failed one where CI is set."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined] # pluggy tells no type
    marked = item.get_closest_marker("appliance") and not item.get_closest_marker("needs_root")
    if report.skipped and os.environ.get("CI") and marked:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"


@pytest.fixture(scope="session")
def element_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search path with ``tiny-os`` and ``probe``."""
    directory = tmp_path_factory.mktemp("elements")
    make_tiny_os(directory)
    make_probe(directory)
    return directory


MakeAppliance = Callable[[], contextlib.AbstractContextManager[Appliance]]


@pytest.fixture(scope="module")
def make_appliance(tmp_path_factory: pytest.TempPathFactory) -> MakeAppliance:
    """Starts an appliance with an empty build disk and no network."""

    @contextlib.contextmanager
    def make() -> Iterator[Appliance]:
        directory = tmp_path_factory.mktemp("appliance")
        content = staging.Staging(directory / "staging")
        content.add_guest_scripts()
        content.make_disk(directory / "build.img")
        settings = Settings(
            disks=[Disk(path=directory / "build.img", label="build")],
            cache_dir=cache_dir(),
            memory_mib=DEFAULT_MEMORY_MIB,
            cpus=2,
            network=False,
            accelerate=False,
        )
        with open_appliance(settings) as appliance:
            appliance.prepare()
            yield appliance

    return make


@pytest.fixture(scope="module")
def appliance(make_appliance: MakeAppliance) -> Iterator[Appliance]:
    """A running appliance that the tests of a module share."""
    with make_appliance() as running:
        yield running


@pytest.fixture(scope="session", params=ISOLATIONS)
def isolation(request: pytest.FixtureRequest) -> str:
    """Where the tree stage of ``probe_build`` runs; what asks for either runs once for each."""
    skip_without(request.param)
    return str(request.param)


@pytest.fixture(scope="session")
def probe_build(isolation: str, element_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One whole build of ``tiny-os`` and ``probe``, raw and qcow2, without partitions."""
    run = virt_dib(
        [
            "--name", "probe", "--formats", "raw,qcow2", "--size", "1G", "--skip-base", "-p", element_dir,
            "--isolation", isolation, "--envvar", "PROBE_VALUE=two words, 'quotes', $dollar", "--envvar", "DIB_PROBE=1",
            *(word for name, value in ODD_VARIABLES.items() for word in ("--envvar", f"{name}={value}")),
            "--envvar", "PROBE_CARRIED", "--envvar", "PROBE_UNSET",
            "--extra-packages", "first,second", "--machine-readable=file:probe.events", "--host-certificates",
            "tiny-os", "probe",
        ],
        cwd=tmp_path_factory.mktemp("probe-build"),
        environment={
            "HOST_SECRET": "from the host", "TMPDIR": "/var/tmp", "PROBE_CARRIED": ODD_VALUE,
            # The option above says otherwise.
            "VIRT_DIB_HOST_CERTIFICATES": "off",
        },
    )  # fmt: skip
    assert run.exit_status == 0, run.stdout + run.stderr
    return run


@pytest.fixture
def anyones_dir() -> Iterator[Path]:
    """A directory that every user can write in; those of pytest are for one."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o777)
    yield directory
    remove_tree(directory)
