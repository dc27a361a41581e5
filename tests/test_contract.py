# SPDX-License-Identifier: Apache-2.0
"""What scripts see in each phase, against contract sections 1.4 and 1.5.

All of it holds for both isolations. What may differ in the sandbox, docs/isolation.md says.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from helpers import ODD_VALUE, ODD_VARIABLES, Run, files_in_image
from virt_dib import tools
from virt_dib.spec import Phase, Where

pytestmark = pytest.mark.appliance

OUTSIDE = [phase for phase in Phase if phase.where is Where.OUTSIDE]
CHROOT = [phase for phase in Phase if phase.where is Where.CHROOT]
UNTIL_POST_ROOT = {
    Phase.ROOT, Phase.EXTRA_DATA, Phase.PRE_INSTALL, Phase.INSTALL, Phase.POST_INSTALL, Phase.POST_ROOT,
}  # fmt: skip
IN_THE_IMAGE = {Phase.PRE_FINALISE, Phase.FINALISE, Phase.CLEANUP}

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
EVERYWHERE = {
    "_LIB": "/dib/site/diskimage_builder/lib",
    "DIB_PYTHON_EXEC": "/usr/bin/python3",
    "LC_ALL": "C",
    "DIB_DEBUG_TRACE": "0",
    "ARCH": "amd64",
    "IMAGE_NAME": "probe",
    "IMAGE_TYPE": "qcow2",
    "FS_TYPE": "ext4",
    "DIB_OFFLINE": "",
    "DIB_CHECKSUM": "0",
    "DIB_NO_TMPFS": "1",
    "DIB_MIN_TMPFS": "2",
    "DIB_IMAGE_CACHE": "/dib/home/.cache/image-create",
    "DIB_LOCKFILES": "/dib/home/.cache/dib/lockfiles",
    "TMP_BUILD_DIR": "/dib/build",
    "TMP_IMAGE_DIR": "/dib/image",
    "TMP_HOOKS_PATH": "/dib/build/hooks",
    "TMP_MOUNT_PATH": "/dib/build/mnt",
    "OUT_IMAGE_PATH": "",
    "DIB_BLOCK_DEVICE_PARAMS_YAML": "/dib/build/block-device/params.yaml",
    "DIB_ROOT_LABEL": "cloudimg-rootfs",
    "DIB_ROOT_FSTYPE": "ext4",
    "DIB_BOOT_LABEL": "",
    "DIB_MOUNTPOINTS": "/",
    "SKIP_BASE": "1",
    "PROBE_VALUE": "two words, 'quotes', $dollar",
    "DIB_PROBE": "1",
    **ODD_VARIABLES,
    "PROBE_CARRIED": ODD_VALUE,
    "PROBE_FROM_ENVIRONMENT": "yes",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": "/bin/bash",
    "TERM": "dumb",
    "DIB_MANIFEST_SAVE_DIR": "/dib/out",
    "PYTHONUNBUFFERED": "1",
}
CERTIFICATE_VARIABLES = {
    "SSL_CERT_FILE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "PIP_CERT", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS",
    "APT_CONFIG", "SYSTEM_WGETRC",
}  # fmt: skip
COMPARED_OTHERWISE = {
    "ELEMENTS_PATH", "IMAGE_ELEMENT", "IMAGE_ELEMENT_YAML", "DIB_ARGS", "DIB_IMAGE_SIZE", "HOME", "PATH",
    "TARGET_ROOT", "DIB_DEFAULT_INSTALLTYPE", "IMAGE_BLOCK_DEVICE", "IMAGE_BLOCK_DEVICES",
    *CERTIFICATE_VARIABLES,
    "BASH_FUNC_die%%", "BASH_FUNC_get_image_element_array%%", "BASH_FUNC__ps4%%", "PS4", "DIB_ENV",
}  # fmt: skip
OF_BASH = {"PWD", "OLDPWD", "SHLVL", "_"}
SANDBOX_NODES = {f"/dev/{name}" for name in ("full", "null", "random", "tty", "urandom", "zero")}
"""In the sandbox each of them is a mount of its own, also in the tree."""


@pytest.fixture(scope="session")
def probe_dir(probe_build: Run) -> Path:
    return probe_build.output_dir / "probe.d" / "probe"


def environment(probe_dir: Path, phase: Phase) -> dict[str, str]:
    items = (probe_dir / f"{phase.directory}.environment").read_bytes().split(b"\0")
    return dict(os.fsdecode(item).split("=", 1) for item in items if item)


def answer(probe_dir: Path, phase: Phase, what: str) -> str:
    path = probe_dir / f"{phase.directory}.{what}"
    return path.read_text() if path.exists() else ""


def mounts(probe_dir: Path, phase: Phase) -> dict[str, list[str]]:
    lines = answer(probe_dir, phase, "mounts").splitlines()
    return {fields[1]: fields for fields in (line.split() for line in lines)}


def nodes(isolation: str, phase: Phase) -> set[str]:
    """The device nodes that are mounts of their own: in the sandbox, so not in the disk stage."""
    return SANDBOX_NODES if isolation == "sandbox" and phase in UNTIL_POST_ROOT else set()


@pytest.mark.option("--envvar")
@pytest.mark.parametrize("phase", Phase)
def test_variables_that_are_the_same_everywhere(probe_dir: Path, phase: Phase) -> None:
    seen = environment(probe_dir, phase)
    assert {name: seen.get(name) for name in EVERYWHERE} == EVERYWHERE
    assert seen["IMAGE_ELEMENT"].split() == ["tiny-os", "probe"]
    assert yaml.safe_load(seen["IMAGE_ELEMENT_YAML"]) == {
        "tiny-os": "/dib/elements/0/tiny-os",
        "probe": "/dib/elements/0/probe",
    }
    assert seen["ELEMENTS_PATH"] == "/dib/elements/0:/dib/elements/1"
    assert seen["DIB_ARGS"].endswith("tiny-os probe")
    assert 'declare -x DIB_PROBE="1"' in seen["DIB_ENV"].splitlines()
    for name, value in ODD_VARIABLES.items():
        assert f" --envvar {name}={value} " in seen["DIB_ARGS"]


@pytest.mark.parametrize("phase", Phase)
def test_dib_env_sets_the_variables_again(probe_dir: Path, phase: Phase) -> None:
    text = environment(probe_dir, phase)["DIB_ENV"]
    result = tools.run(["/bin/bash", "-c", f'{text}\nprintf "%s|" "$DIB_PROBE_ODD" "$DIB_PROBE"'], doing="running bash")
    assert result.stdout == ODD_VARIABLES["DIB_PROBE_ODD"] + "|1|"


@pytest.mark.parametrize("phase", Phase)
def test_variables_that_depend_on_the_phase(probe_dir: Path, phase: Phase) -> None:
    seen = environment(probe_dir, phase)
    inside = phase.where is Where.CHROOT
    assert seen["HOME"] == ("/root" if inside else "/dib/home")
    assert seen["PATH"] == ("$PATH:" + SYSTEM_PATH if inside else SYSTEM_PATH)
    assert seen.get("TARGET_ROOT") == ("/dib/build/mnt" if phase in (Phase.ROOT, Phase.CLEANUP) else None)
    assert seen.get("DIB_DEFAULT_INSTALLTYPE") == (None if phase is Phase.ROOT else "source")
    assert seen["DIB_IMAGE_SIZE"] == ("1" if phase in UNTIL_POST_ROOT else str(1024 * 1024))
    if phase in IN_THE_IMAGE:
        assert seen["IMAGE_BLOCK_DEVICE"] == "/dev/loop0"
        assert seen["IMAGE_BLOCK_DEVICES"].split() == ["[image0]=/dev/loop0"]
    else:
        assert "IMAGE_BLOCK_DEVICE" not in seen
        assert "IMAGE_BLOCK_DEVICES" not in seen


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.EXTRA_DATA])
def test_nothing_else_is_there(probe_dir: Path, phase: Phase) -> None:
    """Above all nothing of the host's environment, TMPDIR included."""
    assert set(environment(probe_dir, phase)) - set(EVERYWHERE) - COMPARED_OTHERWISE - OF_BASH == set()


def test_extra_data_sees_the_hosts_environment_without_its_places(probe_dir: Path) -> None:
    seen = environment(probe_dir, Phase.EXTRA_DATA)
    assert seen["HOST_SECRET"] == "from the host"
    assert not {"TMPDIR", "VIRTUAL_ENV", "XDG_RUNTIME_DIR", "SSH_AUTH_SOCK", "OLDPWD"} & (set(seen) - OF_BASH)


@pytest.mark.parametrize("phase", Phase)
def test_functions_of_dib_exist_outside_only(probe_dir: Path, phase: Phase) -> None:
    functions = answer(probe_dir, phase, "functions").split()
    if phase.where is Where.OUTSIDE:
        assert functions == ["die", "get_image_element_array"]
        array = answer(probe_dir, phase, "array").split()
        assert array == ["[tiny-os]=/dib/elements/0/tiny-os", "[probe]=/dib/elements/0/probe"]
    else:
        assert functions == []


@pytest.mark.parametrize("phase", Phase)
def test_user_and_working_directory(probe_dir: Path, phase: Phase) -> None:
    assert answer(probe_dir, phase, "user").strip() == "0"
    assert answer(probe_dir, phase, "cwd").strip() == ("/" if phase.where is Where.CHROOT else "/dib/out")


@pytest.mark.parametrize("phase", CHROOT)
def test_hooks_are_read_only_inside(probe_dir: Path, phase: Phase) -> None:
    directory = f"/tmp/in_target.d/{phase.directory}"
    assert answer(probe_dir, phase, "name").strip() == f"{directory}/50-probe"
    assert answer(probe_dir, phase, "read-only").strip() == directory
    assert "ro" in mounts(probe_dir, phase)["/tmp/in_target.d"][3].split(",")


@pytest.mark.parametrize("phase", OUTSIDE)
def test_hooks_are_writable_outside(probe_dir: Path, phase: Phase) -> None:
    assert answer(probe_dir, phase, "name").strip() == f"/dib/build/hooks/{phase.directory}/50-probe"
    assert answer(probe_dir, phase, "read-only") == ""


@pytest.mark.parametrize("phase", CHROOT)
def test_mounts_inside(probe_dir: Path, isolation: str, phase: Phase) -> None:
    seen = mounts(probe_dir, phase)
    own = nodes(isolation, phase)
    assert seen["/proc"][2] == "proc"
    assert seen["/dev"][2] == ("tmpfs" if own else "devtmpfs")
    assert seen["/dev/pts"][2] == "devpts"
    assert seen["/sys"][2] == "sysfs"
    assert "ro" in seen["/sys"][3].split(",")
    assert "/dev/shm" not in seen
    top = {"/"} if phase is Phase.FINALISE else set()
    assert set(seen) == {"/proc", "/dev", "/dev/pts", "/sys", "/tmp/in_target.d"} | own | top


@pytest.mark.parametrize("phase", OUTSIDE)
def test_mounts_on_the_tree_outside(probe_dir: Path, isolation: str, phase: Phase) -> None:
    below = {point for point in mounts(probe_dir, phase) if point.startswith("/dib/build/mnt")}
    kernel = {f"/dib/build/mnt/{name}" for name in ("proc", "dev", "dev/pts", "sys")}
    kernel |= {f"/dib/build/mnt{node}" for node in nodes(isolation, phase)}
    if phase is Phase.ROOT or phase is Phase.BLOCK_DEVICE:
        assert below == set()
    elif phase in IN_THE_IMAGE:
        assert below == kernel | {"/dib/build/mnt"}
    else:
        assert below == kernel


@pytest.mark.option("--extra-packages")
def test_the_image_is_as_the_elements_left_it_and_clean(probe_build: Run) -> None:
    image = files_in_image(probe_build.output_dir / "probe.raw")
    assert image.label() == "cloudimg-rootfs"
    assert image.text("/.top-level-dot-file") == "dot file\n"
    assert image.text("/etc/fstab") == "LABEL=cloudimg-rootfs / ext4 defaults 0 1\n"
    assert image.text("/etc/resolv.conf") == "nameserver 192.0.2.1\n"
    assert "resolv.conf.ORIG" not in image.names("/etc")
    assert image.text("/var/tmp/installed-packages") == "first\nsecond\n"
    for empty in ("/dev", "/proc", "/sys", "/tmp"):
        assert image.names(empty) == []


def test_the_elements_could_read_the_saved_resolv_conf(probe_dir: Path) -> None:
    assert (probe_dir / "resolv.conf.ORIG").read_text() == "nameserver 192.0.2.1\n"
