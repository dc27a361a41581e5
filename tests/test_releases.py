# SPDX-License-Identifier: Apache-2.0
"""The rules of DIB's releases, held against the releases themselves, all that takes no virtual machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from dib_releases import RELEASES, Release, release
from helpers import make_element, make_tiny_os
from virt_dib import elements, hooks, layout, tools
from virt_dib.command_line import parse
from virt_dib.dib import find_installation, guest_modules
from virt_dib.errors import ElementError, UsageError, VirtDibError
from virt_dib.plan import BuildPlan, make_plan
from virt_dib.releases import DiskMaker, PythonName, rules
from virt_dib.spec import BuildSpec, Phase

BEFORE_2 = ("0.1.43", "1.28.0")

# Runs in a Python that has the release on its path. The first ones answered in words alone, and ended the process.
ASK_OLD = """
import json, sys
from diskimage_builder.element_dependencies import expand_dependencies
path, cases = json.load(sys.stdin)
answers = []
for names in cases:
    try:
        answers.append(sorted(filter(None, expand_dependencies(names, path))))
    except SystemExit:
        answers.append(None)
json.dump(answers, sys.stdout)
"""
ASK_NEW = """
import json, sys
from diskimage_builder import element_dependencies
path, cases = json.load(sys.stdin)
available = element_dependencies._find_all_elements(path)
answers = []
for names in cases:
    try:
        found = element_dependencies._expand_element_dependencies(names, available)
        answers.append(sorted(element.name for element in found))
    except Exception:
        answers.append(None)
json.dump(answers, sys.stdout)
"""
SEEDS = ("0", "1")


@pytest.fixture(scope="module", params=RELEASES)
def dib(request: pytest.FixtureRequest) -> Release:
    return release(request.param)


@pytest.fixture(scope="module")
def element_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("elements")
    make_tiny_os(directory)
    return directory


def plan_for(arguments: Sequence[str | Path], directory: Path) -> BuildPlan:
    name = ["--name", directory / "image", "--skip-base", "--no-network"]
    command = parse([str(word) for word in [*name, *arguments]])
    (directory / "work").mkdir()
    return make_plan(command.spec, directory / "work", command.problems)


# ---- the table ----


def test_rules_hold_from_the_release_that_brought_them() -> None:
    assert rules("2.3.3").disk_maker is DiskMaker.TABLE
    assert rules("2.4.0").disk_maker is DiskMaker.CONFIGURATION
    assert rules("2.4.0.dev7").disk_maker is DiskMaker.CONFIGURATION
    assert [rules(version).python_name for version in ("2.31.0", "2.32", "3.1.1", "3.2.0", "4")] == [
        PythonName.HOST, PythonName.FIRST, PythonName.FIRST, PythonName.NOWHERE, PythonName.NOWHERE,
    ]  # fmt: skip


def test_variables_come_and_go() -> None:
    oldest, middle, newest = (rules(version).absent for version in ("0.1.43", "2.5.0", "3.43.0"))
    assert {"IMAGE_ELEMENT_YAML", "DIB_PYTHON_EXEC", "FS_TYPE", "SCRIPT_HOME"} <= oldest
    assert not {"_PREFIX", "DIB_IMAGE_ROOT_FS_UUID"} & oldest
    assert {"_PREFIX", "IMAGE_BLOCK_DEVICES", "LANG"} <= middle
    assert "IMAGE_BLOCK_DEVICE_WITHOUT_PART" not in middle
    assert newest == {
        "_PREFIX", "SCRIPT_HOME", "LANG", "DIB_IMAGE_ROOT_FS_UUID", "DIB_ORIGINAL_PATH",
        "IMAGE_BLOCK_DEVICE_WITHOUT_PART", "DIB_PYTHON_EXEC_TMP",
    }  # fmt: skip


# ---- where a release is found ----


def test_each_is_found_by_its_library(dib: Release) -> None:
    found = find_installation(dib.top / "lib")
    assert found.version == dib.version
    assert found.elements_dir == dib.top / "elements"
    assert found.in_package == (dib.version not in BEFORE_2)
    assert found.package_dir == dib.site / "diskimage_builder"
    assert found.package_dir in guest_modules(found)
    assert ("element-info" in [program.name for program in found.programs]) == (dib.version in BEFORE_2)


@pytest.mark.parametrize("version", RELEASES)
def test_a_checkout_goes_by_its_files(version: str, tmp_path: Path) -> None:
    dib = release(version)
    shutil.copytree(dib.top, tmp_path / "dib", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    found = find_installation(tmp_path / "dib" / "lib")
    assert found.version == "unknown"
    assert found.rules.disk_maker is rules(version).disk_maker
    assert found.rules.own_run_parts == rules(version).own_run_parts


def test_unpacked_source_is_found_too(tmp_path: Path) -> None:
    """As of a source archive: metadata, package, bin, lib and elements side by side."""
    dib = release("1.28.0")
    for name in ("lib", "elements"):
        (tmp_path / name).symlink_to(dib.top / name)
    shutil.copytree(dib.top / "lib", tmp_path / "dib" / "lib")
    shutil.copytree(dib.site / "bin", tmp_path / "dib" / "bin")
    (tmp_path / "dib" / "elements").symlink_to(dib.top / "elements")
    (tmp_path / "dib" / "diskimage_builder").symlink_to(dib.site / "diskimage_builder")
    metadata = tmp_path / "dib" / "diskimage_builder.egg-info"
    metadata.mkdir()
    (metadata / "PKG-INFO").write_text("Metadata-Version: 1.1\nName: diskimage-builder\nVersion: 1.28.0\n")
    found = find_installation(tmp_path / "dib" / "lib")
    assert (found.version, found.in_package) == ("1.28.0", False)
    assert found.programs[0] == tmp_path / "dib" / "bin" / "disk-image-create"


# ---- elements ----


def cases(available: Sequence[str]) -> list[list[str]]:
    """Each element with each of some operating systems, and without; and pairs of operating systems."""
    systems = [name for name in ("debian", "fedora", "debian-minimal") if name in available]
    singles = [[name] for name in available]
    pairs = [[system, name] for system in systems for name in available if name != system]
    return [*singles, *pairs, ["debian", "vm", "absent"]]


def test_each_element_brings_what_that_release_says(dib: Release) -> None:
    own = rules(dib.version)
    available = elements.discover([dib.top / "elements"], own)
    questions = cases(sorted(available))
    theirs = []
    for seed in SEEDS:
        result = tools.run(
            [sys.executable, "-c", ASK_OLD if dib.version in BEFORE_2 else ASK_NEW],
            doing="asking DIB",
            stdin=json.dumps([str(dib.top / "elements"), questions]).encode(),
            environment={**os.environ, "PYTHONPATH": str(dib.site), "PYTHONHASHSEED": seed},
        )
        theirs.append(json.loads(result.stdout))
    wrong = []
    for names, *answers in zip(questions, *theirs, strict=True):
        try:
            mine = sorted(element.name for element in elements.resolve(names, available, rules=own))
        except UsageError:
            mine = None
        # Where the order of a set decides in DIB, any of its answers will do.
        if mine not in answers:
            wrong.append((names, mine, answers[0]))
    assert len(questions) > 150
    assert wrong == []


@pytest.mark.parametrize(
    ("version", "words", "arch", "added"),
    [
        ("1.28.0", "vm", "amd64", []),
        ("2.11.0", "vm", "amd64", []),
        ("2.12.0", "vm", "amd64", ["block-device-mbr"]),
        ("2.38.0", "lvm", "amd64", ["block-device-mbr"]),
        ("2.38.0", "vm my-block-device-x", "amd64", []),
        ("2.35.0", "vm", "arm64", ["block-device-mbr"]),
        ("2.36.0", "vm", "arm64", ["block-device-efi"]),
        ("3.13.0", "lvm", "amd64", []),
        ("3.13.0", "vm my-block-device-x", "amd64", ["block-device-mbr"]),
    ],
)
def test_the_default_block_device_element(version: str, words: str, arch: str, added: list[str]) -> None:
    names = elements.requested(words.split(), arch=arch, skip_base=True, rules=rules(version))
    assert list(names) == [*words.split(), *added]


# ---- scripts ----


@pytest.mark.parametrize("version", [version for version in RELEASES if version not in BEFORE_2])
def test_scripts_come_in_the_order_of_that_release(version: str, tmp_path: Path) -> None:
    names = ["9-a", "09-b", "10-c", "a", "Z", "1_x", "not.this", "100-d", "-5-e"]
    for name in names:
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    command: list[str | Path] = ["bash", release(version).top / "lib" / "dib-run-parts", "--list", tmp_path]
    theirs = tools.run(command, doing="asking dib-run-parts", environment={**os.environ, "LC_ALL": "C"}).stdout
    ours = [name for name in hooks.order(names) if hooks.is_script_name(name)]
    assert [Path(line).name for line in theirs.split()] == ours


def test_our_dib_run_parts_is_that_of_the_release_that_had_it_in_the_library(tmp_path: Path) -> None:
    (tmp_path / "environment.d").mkdir()
    (tmp_path / "environment.d" / "10-x").write_text("export WORD=from-environment\n")
    element = make_element(
        tmp_path,
        "x.d",
        {
            "20-second": "#!/bin/bash\necho second $WORD\n",
            "3-first": "#!/bin/bash\necho first\n",
            "30-fails": "#!/bin/bash\nexit 7\n",
            "40-never": "#!/bin/bash\necho never\n",
            "ignored.sh": "#!/bin/bash\necho never\n",
        },
    )
    for path in element.iterdir():
        path.chmod(0o755)
    answers = []
    for script in (layout.guest_script("dib-run-parts.sh"), release("2.38.0").top / "lib" / "dib-run-parts"):
        result = tools.run(["bash", script, element], doing="running scripts", check=False)
        answers.append((result.exit_status, result.stdout))
    assert answers[0] == answers[1] == (7, "first\nsecond from-environment\n")


def test_python_scripts_of_each_release_run_in_python_3(dib: Release) -> None:
    """So that 'python' in the guest may be a Python 3."""
    found = [
        path
        for path in (dib.top / "elements").rglob("*")
        if path.is_file() and re.match(rb"#!.*python", path.read_bytes())
    ]
    assert len(found) > 5
    for path in found:
        compile(path.read_bytes(), str(path), "exec", dont_inherit=True)


# ---- what is planned ----


@pytest.mark.option("-B", "-p")
def test_each_release_is_planned(dib: Release, element_dir: Path, tmp_path: Path) -> None:
    plan = plan_for([*dib.options, "-p", element_dir, "--exclude-element", "bootloader", "tiny-os", "vm"], tmp_path)
    names = [element.name for element in plan.elements]
    assert names == ["tiny-os", "vm", *(["block-device-mbr"] if plan.dib.rules.one_provider else [])]
    assert bool(plan.layout.parts) == (plan.dib.rules.disk_maker is DiskMaker.CONFIGURATION)
    assert plan.layout.block_devices.root_label == "cloudimg-rootfs"
    staged = plan.staging.directory
    assert (staged / "programs" / "python").is_symlink() == (dib.version not in ("3.20.0", "3.43.0"))
    assert (staged / "programs" / "dib-run-parts").is_symlink() == (dib.version in ("0.1.43", "1.28.0", "2.0.0"))
    assert (staged / "prefix" / "lib" / "die").exists() == (dib.version in BEFORE_2)
    assert (staged / "site" / "diskimage_builder").is_dir()


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("#!/usr/bin/env python\nprint 'two'\n", "it is not Python 3, line 2: Missing parentheses"),
        ("#!/usr/bin/python2\nprint(2)\n", "it wants Python 2"),
    ],
)
def test_scripts_in_python_2(script: str, complaint: str, element_dir: Path, tmp_path: Path) -> None:
    make_element(tmp_path / "own", "two", {"root.d/50-two": script, "install.d/50-two": script})
    paths: list[str | Path] = ["-p", element_dir, "-p", tmp_path / "own"]
    with pytest.raises(ElementError) as caught:
        plan_for([*release("1.28.0").options, *paths, "tiny-os", "two"], tmp_path)
    # Not install.d: there the image's own Python runs it.
    (problem,) = caught.value.problems
    assert problem.message.startswith(f"script 'root.d/50-two' of element 'two' cannot run: {complaint}")


def test_a_block_device_configuration_before_there_were_any(element_dir: Path, tmp_path: Path) -> None:
    arguments: list[str | Path] = [
        *release("1.28.0").options,
        "-p",
        element_dir,
        "--envvar",
        "DIB_BLOCK_DEVICE_CONFIG=- local_loop: {}",
    ]
    with pytest.raises(UsageError, match=r"^diskimage-builder 1\.28\.0 has no block device configuration"):
        plan_for([*arguments, "tiny-os"], tmp_path)


@pytest.mark.parametrize(
    ("version", "tree_kib", "size_kib"),
    [
        ("0.1.43", 600, 65536 + 1024 + 64),
        ("1.3.0", 600, 65536 + 1024),
        ("1.28.0", 600, 65536 + 1024),
        ("3.43.0", 600, 65536 + 1024),
        ("1.28.0", 60, 65536 + 128),
    ],
)
def test_automatic_sizes(version: str, tree_kib: int, size_kib: int, tmp_path: Path) -> None:
    spec = BuildSpec(name="x", output_dir=tmp_path, elements=("x",), size_bytes=None)
    assert layout.image_size_kib(spec, [], "ext4", tree_kib, rules(version)) == size_kib


def test_options_of_mkfs(tmp_path: Path) -> None:
    sized = BuildSpec(name="x", output_dir=tmp_path, elements=("x",), mkfs_options="-m 1")
    unsized = BuildSpec(name="x", output_dir=tmp_path, elements=("x",), size_bytes=None)
    assert layout.mkfs_options(sized, "ext4", rules("0.1.43")) == "-m 1"
    assert layout.mkfs_options(unsized, "ext4", rules("0.1.43")) == "-i 4096 -J size=64"
    assert layout.mkfs_options(sized, "ext4", rules("1.28.0")) == "-i 4096 -J size=64 -m 1"


# ---- --python ----


def make_python(directory: Path, site: Path) -> Path:
    """An interpreter that has *site* on its path, as that of a virtual environment."""
    directory.mkdir(exist_ok=True)
    python = directory / "python-of-its-own"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


@pytest.mark.option("--python")
def test_the_diskimage_builder_of_a_python_is_used(
    element_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = make_python(tmp_path / "bin", release("3.20.0").site)
    monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")
    for number, given in enumerate((str(python), python.name)):
        (tmp_path / str(number)).mkdir()
        plan = plan_for(["-p", element_dir, "--python", given, "tiny-os"], tmp_path / str(number))
        assert (plan.dib.version, plan.dib.python) == ("3.20.0", python)
        assert plan.dib.library_dir == release("3.20.0").top / "lib"


def test_libraries_come_from_the_python_that_is_given(tmp_path: Path) -> None:
    """So old ones can be kept for an old release."""
    site = tmp_path / "site"
    (site / "networkx").mkdir(parents=True)
    (site / "networkx" / "__init__.py").write_text("")
    found = find_installation(release("2.38.0").top / "lib", make_python(tmp_path / "bin", site))
    assert site / "networkx" in guest_modules(found)


@pytest.mark.option("--python")
def test_the_guest_calls_the_systems_python_as_given(element_dir: Path, tmp_path: Path) -> None:
    real = Path("/usr/bin/python3").resolve()
    arguments: list[str | Path] = [*release("1.28.0").options, "-p", element_dir, "tiny-os"]
    plan = plan_for([*arguments, "--python", real], tmp_path)
    assert (plan.dib.python, plan.facts.python) == (real, str(real))
    (tmp_path / "other").mkdir()
    other = make_python(tmp_path / "bin", tmp_path)
    assert plan_for([*arguments, "--python", other], tmp_path / "other").facts.python == "/usr/bin/python3"


@pytest.mark.parametrize("given", ["", "/absent/python3", "no-such-python"])
def test_a_python_that_is_not_there(given: str) -> None:
    problems = parse(["--python", given, "x"]).problems
    assert [problem.message for problem in problems] == [f"cannot use '{given}' as --python: there is no such program"]


def test_a_python_without_diskimage_builder(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    with pytest.raises(UsageError, match="cannot import diskimage_builder"):
        find_installation(None, python)
    python.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(VirtDibError, match="looking for diskimage-builder"):
        find_installation(None, python)


def test_phases_of_a_release() -> None:
    late = [phase for phase in Phase if not rules("2.17.0").has(phase)]
    assert late == [Phase.POST_ROOT, Phase.PRE_FINALISE]
    assert all(rules("2.18.0").has(phase) for phase in Phase)


@pytest.mark.parametrize("said", ["{}", "[1, 2]", '{"modules": []}', "nonsense"])
def test_a_program_that_is_no_python(said: str, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    with pytest.raises(UsageError, match="does not answer as a Python does, which --python names") as caught:
        find_installation(None, program)
    assert "3.8 or newer" in str(caught.value.problems[0].hint)


def test_an_old_library_with_little_above_it() -> None:
    """As in a checkout directly below /tmp or /opt."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        for part in ("lib", "elements"):
            shutil.copytree(release("1.28.0").top / part, Path(name, part), symlinks=True)
        assert find_installation(Path(name, "lib")).rules.disk_maker is rules("1.28.0").disk_maker
