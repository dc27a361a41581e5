# SPDX-License-Identifier: Apache-2.0
"""The same probe element in the real disk-image-create: what scripts see must be what they see with us.

disk-image-create wants root, sudo and loop devices, and gets a busybox to build with.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from helpers import BUILD_TIMEOUT_S, ODD_VARIABLES, Run
from test_contract import CERTIFICATE_VARIABLES, OF_BASH, environment, mounts, nodes
from virt_dib import tools
from virt_dib.spec import Phase, Where

pytestmark = [pytest.mark.appliance, pytest.mark.needs_root]

NOT_COMPARED = {
    "DIB_ARGS": "the options have other names",
    "DIB_ENV": "shows the above",
    "DIB_MANIFEST_SAVE_DIR": "set by us: the manual wants the manifests in NAME.d",
    "TMP_DIR": "given to DIB only",
    **dict.fromkeys([*ODD_VARIABLES, "PROBE_VALUE", "PROBE_CARRIED"], "given to virt-dib only"),
    "LC_CTYPE": "set by the Python that starts DIB",
    "PS4": "DIB's own is lost on the way to bash in one case and not in the other",
    "TERM": "of the terminal at hand",
    "PYTHONUNBUFFERED": "set by us, so that output of Python scripts is seen at once",
    "SUDO_COMMAND": "of sudo itself",
    "SUDO_GID": "of sudo itself",
    "SUDO_UID": "of sudo itself",
    "SUDO_USER": "of sudo itself",
    "LOGNAME": "set by sudo inside, by us everywhere",
    "SHELL": "set by sudo inside, by us everywhere",
    **dict.fromkeys(CERTIFICATE_VARIABLES, "the host's CA certificates"),
    "PATH": "of the host outside; inside compared with the contract",
    "IMAGE_ELEMENT": "in random order with DIB",
    "HOST_SECRET": "extra-data.d sees the host's environment",
}


@pytest.fixture(scope="session")
def theirs(element_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.geteuid() != 0:
        pytest.skip("disk-image-create needs root")
    directory = tmp_path_factory.mktemp("real-dib")
    tools.run(
        [Path(sys.executable).with_name("disk-image-create"), "-n", "-t", "raw", "-o", "probe", "tiny-os", "probe"],
        doing="running disk-image-create",
        cwd=directory,
        environment={
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(directory / "home"),
            "USER": "root",
            "TMP_DIR": str(directory),
            "ELEMENTS_PATH": str(element_dir),
            "DIB_PROBE": "1",
            "DIB_IMAGE_SIZE": "1",
            "DIB_NO_TMPFS": "1",
        },
        timeout_s=BUILD_TIMEOUT_S,
    )
    return directory / "probe"


def places(probe_dir: Path) -> dict[str, str]:
    """The directories of a build, and words to put in their place."""
    seen = environment(probe_dir, Phase.CLEANUP)
    paths = seen["ELEMENTS_PATH"].split(":")
    return {
        seen["TMP_BUILD_DIR"]: "BUILD",
        seen["TMP_IMAGE_DIR"]: "IMAGE",
        seen["_LIB"]: "LIB",
        seen["DIB_PYTHON_EXEC"]: "PYTHON",
        seen["HOME"]: "HOME",
        **{path: f"ELEMENTS{number}" for number, path in enumerate(paths)},
    }


def normal(probe_dir: Path, phase: Phase) -> dict[str, str]:
    found = {}
    for name, value in environment(probe_dir, phase).items():
        if name in NOT_COMPARED or name in OF_BASH or name.startswith("BASH_FUNC_"):
            continue
        found[name] = value
        for place, word in sorted(places(probe_dir).items(), key=lambda item: -len(item[0])):
            found[name] = found[name].replace(place, word)
    return found


@pytest.mark.parametrize("phase", Phase)
def test_environment_is_that_of_disk_image_create(theirs: Path, probe_build: Run, phase: Phase) -> None:
    ours = normal(probe_build.output_dir / "probe.d" / "probe", phase)
    if phase is Phase.EXTRA_DATA:
        wanted = normal(theirs, phase)
        assert {name: ours.get(name) for name in wanted} == wanted
    else:
        assert ours == normal(theirs, phase)


@pytest.mark.parametrize("phase", Phase)
def test_exported_functions_are_those_of_disk_image_create(theirs: Path, probe_build: Run, phase: Phase) -> None:
    ours = environment(probe_build.output_dir / "probe.d" / "probe", phase)
    names = {name for name in environment(theirs, phase) if name.startswith("BASH_FUNC_")}
    assert {name for name in ours if name.startswith("BASH_FUNC_")} == names


@pytest.mark.parametrize("phase", Phase)
def test_mounts_are_those_of_disk_image_create(theirs: Path, probe_build: Run, isolation: str, phase: Phase) -> None:
    def on_the_tree(probe_dir: Path) -> dict[str, str]:
        root = "" if phase.where is Where.CHROOT else environment(probe_dir, phase)["TMP_MOUNT_PATH"]
        seen = mounts(probe_dir, phase)
        kinds = {"/tmp/in_target.d": "bind", "/": "root"}
        return {
            point.removeprefix(root) or "/": kinds.get(point, fields[2]) + " " + fields[3].split(",")[0]
            for point, fields in seen.items()
            if point == root or point.startswith(root + "/")
        }

    wanted = on_the_tree(theirs)
    own = nodes(isolation, phase)
    ours = on_the_tree(probe_build.output_dir / "probe.d" / "probe")
    if own and "/dev" in wanted:
        assert own <= set(ours)
        ours = {point: kind for point, kind in ours.items() if point not in own}
        wanted["/dev"] = "tmpfs rw"
    assert ours == wanted
