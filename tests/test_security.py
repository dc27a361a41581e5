# SPDX-License-Identifier: Apache-2.0
"""What crosses from the host to the guest, compared with the lists on docs/security.md."""

from __future__ import annotations

import base64
import fnmatch
import io
import os
import pwd
import re
import tarfile
from pathlib import Path

import pytest

from helpers import ODD_VARIABLES, TESTS, make_element, make_tiny_os, tree_stage, tree_stage_command
from test_contract import OF_BASH, environment
from test_contract import probe_dir as probe_dir  # noqa: PLC0414 - a fixture
from test_hostile_output import FACTS, OUTSIDE, WITH_UMASK, LoudBuild
from test_hostile_output import loud_build as loud_build  # noqa: PLC0414 - a fixture
from virt_dib import environment as contract
from virt_dib import staging
from virt_dib.spec import Phase, Where

PAGE = (TESTS.parent / "docs" / "security.md").read_text()
GIVEN = {*ODD_VARIABLES, "PROBE_VALUE", "DIB_PROBE", "PROBE_CARRIED"}
"""By the user, with ``--envvar``."""
BY_SCRIPTS = {"PROBE_FROM_ENVIRONMENT"}
NOT_ALWAYS_FILES = {
    "/dib/extra-data-cache/*", "/dib/home/*", "/dib/host-files/*", "/dib/image/*", "/dib/named/*", "/dib/out/*",
    "/dib/prefix/*", "/dib/programs/*", "/dib/tmp/*",
}  # fmt: skip
"""Listed, and empty in a build such as the probe's, at the end of root.d."""
NOT_ALWAYS_VARIABLES = {
    "BUILDAH_ISOLATION", "COMPRESS_IMAGE", "DIB_IMAGE_ROOT_FS_UUID", "DIB_ORIGINAL_PATH", "DIB_PYTHON_EXEC_TMP",
    "DOCKER_TARGET", "IMAGE_BLOCK_DEVICE_WITHOUT_PART", "LANG", "RAMDISK_ELEMENT", "SCRIPT_HOME", "TMP_IMAGE_PATH",
    "_BASE_ELEMENT_DIR", "_PREFIX",
}  # fmt: skip
"""Listed, but of other releases, elements, layouts and options than the probe's."""


def section(title: str) -> str:
    """What is below that title, down to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def rows(title: str) -> list[list[str]]:
    """The cells of the table below that title."""
    lines = [line for line in section(title).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def words(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def patterns(isolation: str) -> list[str]:
    """Of the files that are to be seen there."""
    letter = {"vm": "v", "sandbox": "s"}[isolation]
    return [word for paths, where, *_ in rows("Files") if letter in where.split() for word in words(paths)]


def listed_variables() -> dict[str, set[str]]:
    return {where: set(words(which)) for where, which in rows("Variables")}


def files_of_packages() -> set[str]:
    """What the host's packages and libguestfs's own have, by the names that the guest has for it."""
    lists = list(Path("/var/lib/dpkg/info").glob("*.list"))
    if not lists:
        pytest.skip("there is no dpkg on this host, to ask whose a file is")
    known = {line for path in lists for line in path.read_text(errors="replace").splitlines()}
    for base in Path("/usr/lib").glob("*/guestfs/supermin.d/base.tar.gz"):
        with tarfile.open(base) as tar:
            known |= {f"/{name.removeprefix('./')}" for name in tar.getnames()}
    return set(map(merged, known))


def merged(path: str) -> str:
    """The name below /usr of what is there by way of a link."""
    return f"/usr{path}" if path.split("/")[1] in ("bin", "sbin", "lib", "lib32", "lib64", "libx32") else path


@pytest.mark.appliance
def test_the_files_that_an_element_sees(probe_dir: Path, isolation: str) -> None:
    seen = {os.fsdecode(path) for path in (probe_dir / "files").read_bytes().split(b"\0") if path}
    assert {"/dib/guest/run-phase.sh", "/etc/passwd", "/dib/build/block-device/config.yaml"} <= seen
    known = files_of_packages() if isolation == "vm" else set()
    listed = patterns(isolation)
    unlisted = sorted(
        path
        for path in seen
        if merged(path) not in known and not any(fnmatch.fnmatchcase(path, pattern) for pattern in listed)
    )
    assert unlisted == []


@pytest.mark.appliance
def test_the_guest_is_not_named_as_the_host_is(probe_dir: Path) -> None:
    assert (probe_dir / "hostname").read_text() == "virt-dib\n"
    theirs, ours = probe_dir / "machine-id", Path("/etc/machine-id")
    assert not theirs.exists() or not ours.exists() or theirs.read_text() != ours.read_text()


@pytest.mark.appliance
@pytest.mark.parametrize("phase", Phase)
def test_the_variables_that_an_element_sees(probe_dir: Path, phase: Phase) -> None:
    listed = set().union(*(names for where, names in listed_variables().items() if where != "extra-data.d"))
    seen = {name for name in environment(probe_dir, phase) if not name.startswith("BASH_FUNC_")}
    host = set(contract.from_host(os.environ)) | {"HOST_SECRET"} if phase is Phase.EXTRA_DATA else set()
    assert seen - listed - GIVEN - BY_SCRIPTS - OF_BASH - host == set()
    assert {"ARCH", "DIB_ARGS", "TMP_MOUNT_PATH"} <= seen


@pytest.mark.appliance
def test_the_files_that_are_listed_are_seen(probe_dir: Path, isolation: str) -> None:
    """Of those that virt-dib puts there; which of the others there are is this host's affair."""
    seen = {os.fsdecode(path) for path in (probe_dir / "files").read_bytes().split(b"\0") if path}
    ours = {pattern for pattern in patterns(isolation) if pattern.startswith("/dib/")}
    unseen = {pattern for pattern in ours if not any(fnmatch.fnmatchcase(path, pattern) for path in seen)}
    assert unseen - NOT_ALWAYS_FILES == set()
    assert len(ours - unseen) > 5


@pytest.mark.appliance
def test_the_variables_that_are_listed_are_seen(probe_dir: Path) -> None:
    seen = {phase: set(environment(probe_dir, phase)) for phase in Phase}
    listed = listed_variables()
    unseen = listed["everywhere, made by virt-dib"] - set().union(*seen.values())
    assert unseen - NOT_ALWAYS_VARIABLES == set()
    certificates = listed["in the image, with the host's certificates"]
    # extra-data.d has what this host has of them.
    for phase in set(Phase) - {Phase.EXTRA_DATA}:
        assert certificates & seen[phase] == (certificates if phase.where is Where.CHROOT else set()), phase


# ---- bytes ----


@pytest.fixture(scope="session")
def facts_dir(request: pytest.FixtureRequest, isolation: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a script has written down, of a build by a user with a umask, a language and a terminal of their own."""
    if isolation == "vm":
        loud: LoudBuild = request.getfixturevalue("loud_build")
        return loud.output_dir / "x.d/facts"
    directory = tmp_path_factory.mktemp("facts")
    make_tiny_os(directory)
    make_element(directory, "facts", {"root.d/20-facts": f"#!/bin/bash\n{FACTS}"})
    words: list[str | Path] = ["--name", "x", "--no-network", "--skip-base", "-p", directory, "tiny-os", "facts"]
    run, seen = tree_stage(
        [*WITH_UMASK, *tree_stage_command(words, look="cd /dib/out/facts; tar -c * | base64")],
        cwd=directory,
        environment={**os.environ, **OUTSIDE, "TMPDIR": str(directory)},
    )
    assert run.exit_status == 0, run.stdout + run.stderr
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(seen))) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            (directory / member.name).write_bytes(content.read())
    return directory


def processors(text: str) -> set[str]:
    return {line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")}


@pytest.mark.appliance
def test_umask_language_terminal_and_users_are_not_the_hosts(facts_dir: Path) -> None:
    assert (facts_dir / "umask").read_text() == "0022\n"
    assert (facts_dir / "user").read_text() == "root\n"
    users = {line.split(":")[0] for line in (facts_dir / "passwd").read_text().splitlines()}
    assert "root" in users
    assert not users & {user.pw_name for user in pwd.getpwall() if 1000 <= user.pw_uid < 60000}
    variables = (facts_dir / "environ").read_text().split("\0")
    assert {"LC_ALL=C", "TERM=dumb"} <= set(variables)
    for value in OUTSIDE.values():
        assert not [variable for variable in variables if value in variable]


@pytest.mark.appliance
def test_kernel_processor_and_places_of_files_are_as_listed(facts_dir: Path, isolation: str) -> None:
    seen = {name: (facts_dir / name).read_text() for name in ("cmdline", "cpuinfo", "mountinfo")}
    command_line, cpu = Path("/proc/cmdline").read_text(), Path("/proc/cpuinfo").read_text()
    if isolation == "sandbox":
        assert seen["cmdline"] == command_line
        assert processors(seen["cpuinfo"]) == processors(cpu)
        assert f"/{facts_dir.name}/" in seen["mountinfo"]
        return
    assert seen["cmdline"] != command_line
    # But for the name of the terminal, which libguestfs has in it.
    assert OUTSIDE["LANG"] not in seen["cmdline"]
    # This build is emulated everywhere.
    assert all("QEMU" in model for model in processors(seen["cpuinfo"]))
    # The directory of its outputs, and of what is temporary.
    assert facts_dir.parents[2].name not in seen["cmdline"] + seen["mountinfo"]


def test_all_variables_that_the_code_has_are_listed_and_no_others() -> None:
    in_code = {variable.name for variable in contract._TABLE}  # noqa: SLF001 - the one table
    table = listed_variables()
    assert table["everywhere, made by virt-dib"] | table["in the image, with the host's certificates"] == in_code


def test_all_variables_that_name_files_are_listed() -> None:
    listed = set(words(section("Files that are named")))
    assert {*staging.HOST_FILE_VARIABLES, *staging.HOST_FILE_VARIABLE_PREFIXES} <= listed
    assert {f"~/{name}" for names in staging.ELEMENT_HOME_FILES.values() for name in names} <= listed
    assert {name for names in staging.ELEMENT_HOST_FILES.values() for name in names} <= listed
    assert {*staging.ELEMENT_HOME_FILES, *staging.ELEMENT_HOST_FILES} <= listed


def test_what_the_sandbox_copies_of_etc_is_listed() -> None:
    script = (TESTS.parent / "src/virt_dib/guest/sandbox-setup.sh").read_text()
    found = re.search(r"^for path in (.*?); do$", script, re.MULTILINE | re.DOTALL)
    assert found
    names = [word for word in found[1].replace("\\\n", " ").split() if not word.startswith('"')]
    assert len(names) > 30
    listed = patterns("sandbox")
    assert [
        name
        for name in names
        if not any(fnmatch.fnmatchcase(f"/etc/{name}{below}", pattern) for pattern in listed for below in ("", "/x"))
    ] == []
