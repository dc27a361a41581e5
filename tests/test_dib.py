# SPDX-License-Identifier: Apache-2.0
"""Finding diskimage-builder, and taking along what of it the guest needs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import virt_dib
from virt_dib import releases, tools
from virt_dib.dib import DibInstallation, find_installation, guest_modules
from virt_dib.errors import PrerequisiteError, UsageError

PLUGINS = "diskimage_builder.block_device.plugin"

# -S: without site-packages, so without the diskimage-builder that the tests run with.
FIND = """
import json, sys
from virt_dib.dib import find_installation
from virt_dib.errors import VirtDibError
try:
    found = find_installation(None)
    print(json.dumps([str(found.package_dir), str(found.python), found.version]))
except VirtDibError as error:
    print(json.dumps([type(error).__name__, str(error), error.problems[0].hint]))
"""


@pytest.fixture(scope="module")
def installation() -> DibInstallation:
    return find_installation(None)


def find_without_own(path: Path) -> list[str]:
    """What virt-dib finds when its own Python has no diskimage-builder, with *path* as PATH."""
    source = Path(virt_dib.__file__).parent.parent
    result = tools.run(
        [sys.executable, "-S", "-c", FIND],
        doing="looking for DIB",
        environment={**os.environ, "PATH": str(path), "PYTHONPATH": str(source)},
    )
    found: list[str] = json.loads(result.stdout)
    return found


def make_command(directory: Path, head: str) -> Path:
    command = directory / "disk-image-create"
    command.write_text(head)
    command.chmod(0o755)
    return directory


def test_the_installed_one(installation: DibInstallation) -> None:
    assert (installation.library_dir / "dib-run-parts").is_file()
    assert (installation.elements_dir / "debian-minimal").is_dir()
    assert (installation.package_dir / "block_device" / "cmd.py").is_file()
    assert installation.version == importlib.metadata.version("diskimage-builder")


def test_it_is_not_imported() -> None:
    code = "import sys\nfrom virt_dib.dib import find_installation\nfind_installation(None)\nprint(*sys.modules)"
    modules = tools.run([sys.executable, "-c", code], doing="finding diskimage-builder").stdout.split()
    assert "virt_dib.dib" in modules
    assert "diskimage_builder" not in modules


def test_the_same_by_its_library(installation: DibInstallation, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_installation(installation.library_dir) == installation
    monkeypatch.chdir(installation.library_dir / "..")
    assert find_installation(Path("lib")) == installation
    monkeypatch.chdir(installation.library_dir)
    assert find_installation(Path()) == installation


def test_a_checkout_has_no_version(installation: DibInstallation, tmp_path: Path) -> None:
    package = tmp_path / "checkout" / "diskimage_builder"
    ignore = shutil.ignore_patterns("__pycache__", "tests")
    shutil.copytree(installation.package_dir, package, ignore=ignore)
    (tmp_path / "link").symlink_to(package / "lib")
    for library in (package / "lib", tmp_path / "link"):
        found = find_installation(library)
        assert found == DibInstallation(
            rules=dataclasses.replace(releases.NEWEST, version="unknown"),
            library_dir=package / "lib",
            elements_dir=package / "elements",
            python=Path(sys.executable),
            package_dir=package,
        )
        assert package in guest_modules(found)


@pytest.mark.parametrize(
    "present", [[], ["die"], ["die", "../elements/"], ["die", "../block_device/"], ["../elements/", "../block_device/"]]
)
def test_a_library_that_is_none(present: list[str], tmp_path: Path) -> None:
    library = tmp_path / "package" / "lib"
    library.mkdir(parents=True)
    for name in present:
        if name.endswith("/"):
            (library / name).mkdir()
        else:
            (library / name).write_text("")
    with pytest.raises(UsageError, match=f"^cannot use '{library}' as diskimage-builder's library") as caught:
        find_installation(library)
    assert caught.value.problems[0].hint


def test_a_library_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        find_installation(tmp_path / "absent")


@pytest.mark.parametrize(
    "head",
    [
        "#!{python}\n",
        "#! {python} -s\n",
        "#!/usr/bin/env {name}\n",
        "#!/usr/bin/env -S {name} -s\n",
        "#!/bin/sh\n'''exec' {python} \"$0\" \"$@\"\n' '''\n",
        "#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n",
    ],
)
def test_the_one_behind_the_command(head: str, installation: DibInstallation, tmp_path: Path) -> None:
    python = Path(sys.executable)
    for name in (python.name, "other"):
        (tmp_path / name).symlink_to(python)
    wrapper = tmp_path / python.name
    wrapper.unlink()
    # Not a link: a virtual environment is found by the place of its Python.
    wrapper.write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    wrapper.chmod(0o755)
    make_command(tmp_path, head.format(python=wrapper, name=wrapper.name))
    assert find_without_own(tmp_path) == [str(installation.package_dir), str(wrapper), installation.version]


@pytest.mark.parametrize("head", ["", "#!/bin/bash\n", "#!\n", "#!/usr/bin/env\n", "#!/no/such/python3\n", "\x7fELF"])
def test_a_command_without_a_python(head: str, tmp_path: Path) -> None:
    kind, message, hint = find_without_own(make_command(tmp_path, head))
    assert kind == "PrerequisiteError"
    assert message.endswith(f"'{tmp_path / 'disk-image-create'}': it does not name the Python it runs with")
    assert "pip install diskimage-builder" in hint


def test_a_command_whose_python_has_no_package(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    kind, message, _hint = find_without_own(make_command(tmp_path, f"#!{python}\n"))
    assert kind == "PrerequisiteError"
    assert message.endswith(f"'{python}' cannot import diskimage_builder")


def test_a_command_whose_python_is_broken(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    python.chmod(0o755)
    kind, message, _hint = find_without_own(make_command(tmp_path, f"#!{python}\n"))
    assert kind == "PrerequisiteError"
    assert message.endswith("failed with exit status 3: broken")


@pytest.mark.skipif(tools.find("disk-image-create") is not None, reason="the command is installed on this host")
def test_none_at_all(tmp_path: Path) -> None:
    kind, message, hint = find_without_own(tmp_path)
    assert kind == "PrerequisiteError"
    assert message == "diskimage-builder not found, needed to build images"
    assert "pip install diskimage-builder" in hint


def test_the_guest_modules_are_enough(installation: DibInstallation, tmp_path: Path) -> None:
    """In an empty directory, for a Python that has nothing else, all of dib-block-device can be loaded."""
    site = tmp_path / "site"
    site.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "tests", "elements", "*.so")
    for path in guest_modules(installation):
        if path.is_dir():
            shutil.copytree(path, site / path.name, ignore=ignore)
        else:
            shutil.copyfile(path, site / path.name)
    program = """
import json, sys
sys.path.append(sys.argv[1])
import diskimage_builder.block_device.cmd, networkx, stevedore, yaml
def refuse(manager, entry_point, error):
    raise error
manager = stevedore.ExtensionManager(sys.argv[2], on_load_failure_callback=refuse)
outside = [module.__file__ for module in (diskimage_builder.block_device.cmd, networkx, stevedore, yaml)
           if not module.__file__.startswith(sys.argv[1])]
print(json.dumps([sorted(manager.names()), outside]))
"""
    result = tools.run(
        [sys.executable, "-I", "-S", "-c", program, site, PLUGINS],
        doing="loading the plugins",
        environment={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
    )
    names, outside = json.loads(result.stdout)
    assert outside == []
    assert names == sorted(entry.name for entry in importlib.metadata.entry_points(group=PLUGINS))
    assert {"local_loop", "partitioning", "mkfs", "mount", "fstab", "lvm"} <= set(names)


def test_missing_guest_modules_are_named(installation: DibInstallation, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for path in guest_modules(installation):
        if path.name not in ("networkx", "yaml") and not path.name.endswith("-info"):
            (site / path.name).symlink_to(path)
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    bare = DibInstallation(
        rules=installation.rules,
        library_dir=installation.library_dir,
        elements_dir=installation.elements_dir,
        python=python,
        package_dir=site / "diskimage_builder",
    )
    with pytest.raises(PrerequisiteError, match=r"module networkx, module yaml, metadata of diskimage-builder$"):
        guest_modules(bare)


def test_the_current_directory_is_not_searched(
    installation: DibInstallation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "yaml.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert tmp_path / "yaml.py" not in guest_modules(installation)
