# SPDX-License-Identifier: Apache-2.0
"""The same command line and environment for the real disk-image-create and for ours: what comes of it is the same.

disk-image-create wants root, sudo and loop devices; without a device mapper it cannot partition, so these builds have
no partitions. docs/drop-in.md has what differs on purpose.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import ext4
from comparisons import Comparison, Table
from conftest import MEASURING
from helpers import BUILD_TIMEOUT_S, TESTS, make_element, make_probe, make_tiny_os, skip_without
from test_contract import CERTIFICATE_VARIABLES, OF_BASH
from virt_dib import tools
from virt_dib.spec import Phase

COMMANDS = Path(sys.executable).parent
PATH = f"{COMMANDS}:/usr/sbin:/usr/bin:/sbin:/bin"
SIZE = {"DIB_IMAGE_SIZE": "0.25"}
_IGNORED = "Ignoring non-executable files:"
_DATE = re.compile(r"-\d{4}\.\d\d\.\d\d-\d\d\.\d\d\.\d\d\.")

CONFIG = json.dumps([
    {"local_loop": {"name": "image0", "mkfs": {"name": "root_fs", "label": "from-config", "type": "ext4",
     "mount": {"mount_point": "/", "fstab": {"options": "noatime", "fsck-passno": 1}}}}}])  # fmt: skip
EDPM = """
- imagename: edpm-hardened
  types: [qcow2]
  elements: [tiny-os, edpm-block-device]
  skip-base: true
  min-tmpfs: 7
  checksum: true
  environment:
    DIB_IMAGE_SIZE: '0.3'
    DIB_RELEASE: 9-stream
- imagename: other
  types: [raw]
  elements: [tiny-os]
  skip-base: true
  environment: {DIB_IMAGE_SIZE: '0.25'}
"""
LEAVES = """#!/bin/bash
set -eu
echo kernel >"$IMAGE_NAME.kernel"
echo initramfs >"$IMAGE_NAME.initramfs"
(cd "$(dirname "$IMAGE_NAME")" && sha256sum "$(basename "$IMAGE_NAME").kernel" >"$(basename "$IMAGE_NAME").sha256")
echo iso >"$IMAGE_NAME-boot.iso"
mkdir -p "$IMAGE_NAME.d/dib-manifests" own/directory
echo manifest >"$IMAGE_NAME.d/dib-manifests/one"
echo mine >own/directory/file
echo odd >'an odd name'
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One command line with what is around it."""

    arguments: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    ramdisk: bool = False
    described: bool = False
    """The arguments are files for diskimage-builder."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Those of an earlier build, in the working directory."""
    directories: Sequence[str] = ()
    twice: bool = False
    stdout_only: bool = False
    """What is printed is compared too."""

    @property
    def program(self) -> str:
        if self.described:
            return "diskimage-builder"
        return "ramdisk-image-create" if self.ramdisk else "disk-image-create"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one of them made of a case."""

    exit_status: int
    directory: Path
    printed: str


def raw(*more: str, **fields: object) -> Case:
    """A build of the smallest kind, with *more* on its command line."""
    known: dict[str, object] = {"arguments": ["-n", "-t", "raw", *more, "tiny-os"], "variables": SIZE}
    return Case(**known | fields)  # type: ignore[arg-type] # fields by name


QUICK: Mapping[str, Case] = {
    "probe": Case(arguments=["-n", "-t", "raw", "-o", "out/probe", "tiny-os probe", ""], variables=SIZE | {
        "DIB_PROBE": "a b\nc", "PROBE_OTHER": "käse $HOME", "http_proxy": "http://192.0.2.9:9",
    }, directories=["out"]),
    "failing-script": raw("fails-install"),
}  # fmt: skip

FULL: Mapping[str, Case] = {
    "many-formats": Case(
        arguments=["tiny-os", "leaves", "-n", "-t", "qcow2,raw,tgz", "--checksum", "--image-size", "0.25", "-xo",
                   "sub/made"], directories=["sub"], files={"sub/made.qcow2": "old", "sub/made.qcow2.md5": "old sum"},
    ),
    "ramdisk": Case(arguments=["-n", "-o", "r", "tiny-os", "leaves"], ramdisk=True,
                    variables=SIZE | {"RAMDISK_ELEMENT": "leaves"}),
    "absolute-name": Case(arguments=["-n", "-t", "raw", "-o", "@HERE@/sub/made", "tiny-os", "leaves"],
                          variables=SIZE, directories=["sub"]),
    "default-name": Case(arguments=["-n", "tiny-os"], variables=SIZE),
    "name-in-variable": Case(arguments=["-n", "-t", "raw", "tiny-os"], variables=SIZE | {"IMAGE_NAME": "named"}),
    "suffix-of-only-type": raw("-o", "x.raw"),
    "suffix-of-another-type": raw("-o", "x.qcow2"),
    "suffix-with-two-types": Case(arguments=["-n", "-t", "raw,qcow2", "-o", "x.raw", "tiny-os"], variables=SIZE),
    "old-image-renamed": raw("-o", "x", files={"x.raw": "old", "x.raw.sha256": "old sum", "x.other": "stays"}),
    "old-image-overwritten": raw("-o", "x", files={"x.raw": "old"}, variables=SIZE | {"OVERWRITE_OLD_IMAGE": "1"}),
    "twice": raw("-o", "x", twice=True),
    "checksum-md5-alone": raw("-o", "x", variables=SIZE | {"DIB_CHECKSUM": "md5"}),
    "checksum-list": raw("-o", "x", variables=SIZE | {"DIB_CHECKSUM": "md5,sha256"}),
    "checksum-off": raw("-o", "x", variables=SIZE | {"DIB_CHECKSUM": "0"}),
    "checksum-in-directory": raw("-o", "sub/x", "--checksum", directories=["sub"]),
    "tar": Case(arguments=["-n", "-t", "tar", "tiny-os"], variables=SIZE),
    "tgz-alone": Case(arguments=["-n", "-t", "tgz", "tiny-os"], variables=SIZE),
    "vmdk": Case(arguments=["-n", "-t", "vmdk", "tiny-os"], variables=SIZE),
    "vdi": Case(arguments=["-n", "-t", "vdi", "tiny-os"], variables=SIZE),
    "vhdx": Case(arguments=["-n", "-t", "vhdx", "tiny-os"], variables=SIZE),
    "uncompressed": Case(arguments=["-n", "-u", "tiny-os"], variables=SIZE),
    "qemu-img-options": Case(arguments=["-n", "--qemu-img-options", "compat=0.10", "tiny-os"], variables=SIZE),
    "qemu-img-options-in-variable": Case(
        arguments=["-n", "tiny-os"], variables=SIZE | {"QEMU_IMG_OPTIONS": "cluster_size=2M"}
    ),
    "root-label": raw("--root-label", "own"),
    "root-label-in-variable": raw(variables=SIZE | {"ROOT_LABEL": "other"}),
    "mkfs-options": raw("--mkfs-options", "-O ^dir_index -m 1"),
    "max-online-resize": raw("--max-online-resize", "4000000"),
    "journal-size": raw(variables={"DIB_JOURNAL_SIZE": "16"}),
    "extra-size": raw(variables={"DIB_IMAGE_EXTRA_SIZE": "100", "DIB_JOURNAL_SIZE": "8"}),
    "image-size-option": raw("--image-size", "0.3", variables={}),
    "image-size-wins-over-extra": raw(variables={"DIB_IMAGE_SIZE": "0.3", "DIB_IMAGE_EXTRA_SIZE": "100"}),
    "automatic-size": raw("bulk", variables={}),
    "xfs": raw(variables={"FS_TYPE": "xfs", "DIB_IMAGE_SIZE": "0.5"}),
    "ext3": raw(variables=SIZE | {"FS_TYPE": "ext3"}),
    "arch": raw("-a", "arm64", "probe"),
    "arch-in-variable": raw("probe", variables=SIZE | {"ARCH": "armhf"}),
    "offline": raw("--offline", "probe"),
    "tmpfs-options": raw("--no-tmpfs", "--min-tmpfs", "7", "probe"),
    "install-type": raw("--install-type", "package", "probe"),
    "install-type-in-variable": raw("probe", variables=SIZE | {"DIB_DEFAULT_INSTALLTYPE": "package"}),
    "tracing": raw("-x", "-x", "probe"),
    "tracing-in-variable": raw("probe", variables=SIZE | {"DIB_DEBUG_TRACE": "1"}),
    "extra-packages": raw("-p", "one,two", "-p", "three"),
    "several-elements-in-one-argument": Case(
        arguments=["", "-n", "tiny-os leaves", "-t", "raw", ""], variables=SIZE
    ),
    "cluster-of-short-options": Case(arguments=["-nuxtraw", "tiny-os"], variables=SIZE),
    "abbreviated-long-option": raw("--root-l=own"),
    "options-after-elements": Case(arguments=["tiny-os", "-n", "-t", "raw", "-o", "late"], variables=SIZE),
    "double-dash": Case(arguments=["-n", "-t", "raw", "--", "tiny-os"], variables=SIZE),
    "skip-base-in-variable": Case(arguments=["-t", "raw", "tiny-os"], variables=SIZE | {"SKIP_BASE": "1"}),
    "no-final-image": Case(arguments=["-n", "-t", "qcow2,tar", "-o", "x", "tiny-os", "leaves", "no-final-image"],
                           variables=SIZE),
    "ramdisk-with-option": Case(arguments=["-n", "-o", "r", "--ramdisk-element", "leaves", "tiny-os"], ramdisk=True,
                                variables=SIZE),
    "block-device-config": raw(variables=SIZE | {"DIB_BLOCK_DEVICE_CONFIG": CONFIG}),
    **{f"failing-{phase.directory}": raw(f"fails-{phase.directory.removesuffix('.d')}") for phase in Phase},
    "killed-script": raw("killed"),
    "nothing-in-root": Case(arguments=["-n", "-t", "raw", "empty-os"], variables=SIZE),
    # as bifrost calls it, without -c, which ends with an error there
    "bifrost": Case(arguments=[
        "-x", "-u", "-n", "-a", "amd64", "-o", "out/deployment_image.qcow2", "-t", "qcow2", "--no-tmpfs", "--offline",
        "--image-size", "0.3", "--image-cache", "@HERE@/cache", "--max-online-resize", "4000000", "--min-tmpfs", "1",
        "--qemu-img-options", "compat=1.1", "--root-label", "img-root", "--ramdisk-element", "leaves", "tiny-os",
        "leaves", "probe",
    ], variables={"DIB_BLOCK_DEVICE_CONFIG": CONFIG, "VIRTUAL_ENV": "/nowhere", "no_proxy": "localhost"},
       directories=["out", "cache"]),
    # as edpm-image-builder does: two files, one image in both
    "edpm": Case(arguments=["images.yaml", "more.yaml"], described=True, files={
        "images.yaml": EDPM, "more.yaml": "- imagename: edpm-hardened\n  elements: [leaves]\n  debug-trace: 1\n",
    }),
    # what is refused before anything is built
    "no-elements": Case(arguments=["-n"]),
    "empty-elements": Case(arguments=["-n", "", ""]),
    "unknown-element": Case(arguments=["-n", "tiny-os", "nothing-like-it"]),
    "no-operating-system": Case(arguments=["-n", "leaves"]),
    "two-operating-systems": Case(arguments=["-n", "tiny-os", "empty-os"]),
    "unknown-option": Case(arguments=["--nothing", "tiny-os"]),
    "ambiguous-option": Case(arguments=["--image", "5", "tiny-os"]),
    "missing-value": Case(arguments=["tiny-os", "-o"]),
    "docker-without-target": Case(arguments=["-n", "-t", "docker", "tiny-os"]),
    "search-path-that-is-not-there": Case(arguments=["-n", "tiny-os"], variables={"ELEMENTS_PATH": "/nothing/here"}),
    "duplicate-hook": Case(arguments=["-n", "tiny-os", "leaves", "leaves-too"]),
    "bad-block-device-config": Case(arguments=["-n", "tiny-os"], variables={"DIB_BLOCK_DEVICE_CONFIG": "[{x: y}]"}),
    "version": Case(arguments=["--version"], stdout_only=True),
}  # fmt: skip

STATUS_DIFFERS = {"failing-block-device.d": "status of block-device.d", "empty-elements": "status without elements"}

VARIABLES_THAT_DIFFER: Mapping[str, Sequence[str]] = {
    "variables of the host": (
        "DIB_IMAGE_CACHE", "DIB_LOCKFILES", "HOME", "PATH", "TMP_DIR", "VIRTUAL_ENV", "XDG_CACHE_HOME",
        "VIRT_DIB_ISOLATION",
    ),
    "variables of sudo": (
        "LOGNAME", "SHELL", "SUDO_COMMAND", "SUDO_GID", "SUDO_UID", "SUDO_USER", "TERM", "USER",
    ),
    "variables of the programs between": (
        "LANG", "LC_CTYPE", "PS4", "PYTHONUNBUFFERED", *sorted(OF_BASH),
    ),
    "order of elements": ("IMAGE_ELEMENT", "IMAGE_ELEMENT_YAML", "DIB_ENV"),
    "certificates": sorted(CERTIFICATE_VARIABLES),
}  # fmt: skip
"""What is not compared, by the differences below."""
DIFFERENCES = {
    "status of block-device.d": "a script of block-device.d that fails ends it with status 1",
    "status without elements": "without any element, but an empty argument, it ends with status 2",
    "dot files": "files whose names begin with a dot, at the top of the tree, are lost on the way into the image",
    "tar of mounts": "tar and tgz have what is in /dev, /proc and /sys of the tree while it is mounted",
    "ignored files": "it says which files it ignores in the directories of hooks",
    "paths": "paths in variables are the host's",
    "variables of the host": "variables that name places of the host",
    "variables of sudo": "variables that sudo sets",
    "variables of the programs between": "variables that a program between the command and the script sets",
    "order of elements": "the order of elements in variables is by chance",
    "certificates": "no variables name the CA certificates of the host",
}
"""What differs on purpose or by nature, in the words of docs/drop-in.md."""
PAGE = TESTS.parent / "docs" / "drop-in.md"


@pytest.fixture(scope="session")
def elements(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("drop-in") / "elements"
    parent.mkdir()
    make_tiny_os(parent)
    make_probe(parent)
    make_element(parent, "leaves", {"cleanup.d/60-leaves": LEAVES})
    make_element(parent, "leaves-too", {"cleanup.d/60-leaves": LEAVES})
    make_element(parent, "empty-os", {"root.d/10-nothing": "#!/bin/bash\n"}, provides=["operating-system"])
    bulk = '#!/bin/bash\nhead -c 90000000 < <(yes bulk) >"$TARGET_ROOT/bulk"\n'
    make_element(parent, "bulk", {"root.d/50-bulk": bulk})
    # A file, as its other suffix says, is also YAML.
    make_element(parent, "edpm-block-device", {"block-device-default.yaml": CONFIG})
    make_element(parent, "killed", {"install.d/50-killed": "#!/bin/bash\nkill -KILL $$\n"})
    for phase in Phase:
        name = phase.directory.removesuffix(".d")
        script = "#!/bin/bash\necho last words\nexit 42\n"
        make_element(parent, f"fails-{name}", {f"{phase.directory}/50-fails": script})
    return parent


def run(case: Case, program: str, directory: Path, elements: Path) -> Outcome:
    """Run *case* in a new *directory*."""
    work = directory / "work"
    work.mkdir(parents=True)
    for name in case.directories:
        (work / name).mkdir()
    for name, text in case.files.items():
        (work / name).write_text(text)
    environment = {
        "PATH": PATH, "HOME": str(directory / "home"), "USER": "root", "TMP_DIR": str(directory),
        "ELEMENTS_PATH": str(elements), "DIB_NO_TMPFS": "1", "DIB_NO_TIMESTAMP": "1",
        "VIRT_DIB_ISOLATION": "sandbox", "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or f"{Path.home()}/.cache",
        **case.variables,
    }  # fmt: skip
    arguments = [argument.replace("@HERE@", str(work)) for argument in case.arguments]

    def once() -> Outcome:
        command: list[str | Path] = [COMMANDS / program, *arguments]
        result = tools.run(
            command, doing="building", cwd=work, environment=environment, timeout_s=BUILD_TIMEOUT_S, check=False
        )
        return Outcome(exit_status=result.exit_status, directory=work, printed=result.stdout + result.stderr)

    if case.twice:
        assert once().exit_status == 0
    return once()


def names(outcome: Outcome) -> list[str]:
    """All files, dates in names as one word."""
    found = [path.relative_to(outcome.directory) for path in outcome.directory.rglob("*") if not path.is_dir()]
    return sorted(_DATE.sub("-DATE.", str(name)) for name in found if name.parts[0] != "probe")


def texts(outcome: Outcome) -> dict[str, str]:
    """What is in the small files that are no images and not the probe's."""
    found = {}
    for path in outcome.directory.rglob("*"):
        name = _DATE.sub("-DATE.", str(path.relative_to(outcome.directory)))
        if path.is_file() and "probe" not in path.parts and path.stat().st_size < 10_000:
            text = path.read_text(errors="replace").replace(str(outcome.directory), "@HERE@")
            # The sums themselves depend on the UUID of the file system.
            found[name] = re.sub(r"\b(?:[0-9a-f]{32}|[0-9a-f]{64})\b", "SUM", text)
    return found


def run_parts(outcome: Outcome) -> list[str]:
    """What dib-run-parts says, without paths and seconds. The elements of DIB itself come first in nobody's order."""
    lines = [line for line in outcome.printed.splitlines() if line.startswith("dib-run-parts ")]
    shown = [re.sub(r"\S*/(?:hooks|in_target\.d)/", "", re.sub(r" +\d+\.\d{3}$", " SECONDS", line)) for line in lines]
    return [line for line in shown if _IGNORED not in line]


def ignored(outcome: Outcome) -> set[str]:
    """The files that dib-run-parts says to ignore."""
    return {
        name
        for line in outcome.printed.splitlines()
        if line.startswith("dib-run-parts ") and _IGNORED in line
        for name in line.partition(_IGNORED)[2].split()
    }


def tree(image: Path) -> dict[str, object]:
    """What is in a file system, but for the probe's notes."""
    without = frozenset({"mtime_ns", "size", "links"})
    with ext4.opened(image) as file_system:
        entries = file_system.entries()
    return {
        os.fsdecode(path): ext4.told(entries[path], without=without if path in (b"/", b"") else frozenset({"mtime_ns"}))
        for path in sorted(entries)
        if not path.startswith(b"/var/lib/probe/")
    }


def facts(image: Path) -> dict[str, object]:
    """What a disk image says of itself."""
    qemu_img = tools.require("qemu-img", purpose="look at images", package="qemu-utils")
    told = json.loads(tools.run([qemu_img, "info", "--output=json", image], doing="looking at an image").stdout)
    kept = {"format": told["format"], "virtual-size": told["virtual-size"]}
    return kept | {name: told[name] for name in ("cluster-size",) if name in told}


def members(archive: Path) -> dict[str, object]:
    """What is in an archive."""
    with tarfile.open(archive) as tar:
        return {
            member.name.removeprefix("."): (
                member.type, member.mode, member.uid, member.gid, member.linkname,
                hashlib.sha256(tar.extractfile(member).read()).hexdigest() if member.isreg() else "",  # type: ignore[union-attr] # a file
            )
            for member in tar
        }  # fmt: skip


def environments(outcome: Outcome) -> dict[str, dict[str, str]]:
    """What the probe saw in each phase, the working directory as a word, without what is there for the measurement."""
    found = {}
    for phase in Phase:
        path = outcome.directory / "probe" / f"{phase.directory}.environment"
        text = os.fsdecode(path.read_bytes()).replace(str(outcome.directory), "@HERE@")
        items = [item.split("=", 1) for item in text.split("\0") if item]
        found[phase.directory] = {name: value for name, value in items if name not in MEASURING}
    return found


def with_places(seen: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """The same, places of this build as words."""
    last = seen["cleanup.d"]
    places = {last[name]: name for name in ("TMP_BUILD_DIR", "TMP_IMAGE_DIR", "_LIB", "DIB_PYTHON_EXEC")}
    places |= {part: f"PATH{n}" for n, part in enumerate(last["ELEMENTS_PATH"].split(":"))}
    pattern = re.compile("|".join(re.escape(place) for place in sorted(places, key=len, reverse=True)))
    return {
        phase: {name: pattern.sub(lambda match: places[match[0]], value) for name, value in variables.items()}
        for phase, variables in seen.items()
    }


def compare_environments(made: Comparison, theirs: Outcome, ours: Outcome) -> None:
    there, here = environments(theirs), environments(ours)
    placed_there, placed_here = with_places(there), with_places(here)
    explained = {name: difference for difference, names in VARIABLES_THAT_DIFFER.items() for name in names}
    differing: dict[str, set[str]] = {}
    count = 0
    for phase in there:
        names = sorted(name for name in there[phase].keys() | here[phase].keys() if "BASH_FUNC" not in name)
        for name in names:
            if name in explained:
                if there[phase].get(name) != here[phase].get(name):
                    differing.setdefault(explained[name], set()).add(name)
            elif there[phase].get(name) != here[phase].get(name):
                differing.setdefault("paths", set()).add(name)
        wanted, seen = (
            {name: placed[phase].get(name) for name in names if name not in explained}
            for placed in (placed_there, placed_here)
        )
        count = max(count, len(seen))
        if wanted != seen:
            made.same(f"variables in {phase}", wanted, seen)
    made.same("phases with a probe", list(there), list(here), f"{len(there)}, {count} variables compared in each")
    for difference, names_found in differing.items():
        made.differs("variables", difference, names_found)


def compare_images(made: Comparison, theirs: Outcome, ours: Outcome) -> None:
    for path in sorted(theirs.directory.rglob("*")):
        name = path.relative_to(theirs.directory)
        other = ours.directory / name
        if path.suffix in (".raw", ".qcow2", ".vmdk", ".vdi", ".vhdx") and other.exists() and path.stat().st_size > 9:
            there, here = facts(path), facts(other)
            made.same(f"{name}: format and size", there, here, ", ".join(f"{key} {here[key]}" for key in here))
            if path.suffix == ".raw" and path.read_bytes()[1080:1082] == b"\x53\xef":
                made.same(f"{name}: complaints of e2fsck", "", ext4.complaints(other))
                compare_trees(made, f"{name}: tree", tree(path), tree(other))
                wanted, found = ext4.superblock(path), ext4.superblock(other)
                chosen = sorted(ext4.DECIDED_BY_MKFS)
                made.same(
                    f"{name}: superblock",
                    {field: wanted.get(field) for field in chosen},
                    {field: found.get(field) for field in chosen},
                    f"{len(chosen)} fields",
                )
        elif path.suffix in (".tar", ".tgz"):
            compare_trees(made, f"{name}: members", members(path), members(other))


def compare_trees(made: Comparison, what: str, theirs: Mapping[str, object], ours: Mapping[str, object]) -> None:
    """Compare what is in two trees, but for what diskimage-builder loses, or takes from mounts."""

    def kept(path: str) -> bool:
        return not path.startswith("/.") and re.match(r"/(dev/|proc(/|$)|sys(/|$))", path) is None

    there, here = ({path: tree[path] for path in tree if kept(path)} for tree in (theirs, ours))
    made.same(what, there, here, f"{len(there)} files and directories")
    others = {path for path in theirs.keys() | ours.keys() if not kept(path) and theirs.get(path) != ours.get(path)}
    made.differs(what, "dot files", (path for path in others if path.startswith("/.")))
    mounts = {path.split("/")[1] for path in others if not path.startswith("/.")}
    made.differs(what, "tar of mounts", (f"/{name}" for name in mounts))


def check(name: str, case: Case, elements: Path, directory: Path, table: Table) -> None:
    theirs = run(case, case.program, directory / "theirs", elements)
    ours = run(case, f"virt-{case.program}", directory / "ours", elements)
    variables = " ".join(f"{key}={shlex.quote(value)}" for key, value in case.variables.items())
    made = Comparison(name=name, command=f"{variables} {case.program} {shlex.join(case.arguments)}".strip())
    if name in STATUS_DIFFERS and theirs.exit_status != ours.exit_status:
        made.same("success", theirs.exit_status == 0, ours.exit_status == 0)
        statuses = f"{theirs.exit_status} there, {ours.exit_status} here"
        made.differs("exit status", STATUS_DIFFERS[name], [statuses])
    else:
        made.same("exit status", theirs.exit_status, ours.exit_status, str(ours.exit_status))
    lines = run_parts(ours)
    made.same("lines of dib-run-parts", run_parts(theirs), lines, str(len(lines)))
    made.differs("lines of dib-run-parts", "ignored files", ignored(theirs) ^ ignored(ours))
    made.same("names of files", names(theirs), names(ours), ", ".join(names(ours)) or "none")
    small = texts(ours)
    made.same("what is in small files", texts(theirs), small, f"{len(small)} files")
    if case.stdout_only:
        made.same("all that is printed", theirs.printed, ours.printed)
    compare_images(made, theirs, ours)
    if (theirs.directory / "probe").exists():
        compare_environments(made, theirs, ours)
    table.add(made)
    assert made.failures == [], "\n\n".join([*made.failures, ours.printed[-3000:]])
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Table:
    path = request.config.getoption("--comparisons")
    return Table(path=None if path is None else Path(path), order=[*QUICK, *FULL], pages=DIFFERENCES)


@pytest.mark.appliance
@pytest.mark.drop_in
@pytest.mark.needs_root
@pytest.mark.parametrize("name", QUICK)
def test_the_same_as_disk_image_create(name: str, elements: Path, tmp_path: Path, table: Table) -> None:
    skip_without("sandbox")
    check(name, QUICK[name], elements, tmp_path, table)


@pytest.mark.drop_in
@pytest.mark.needs_root
@pytest.mark.parametrize("name", FULL)
def test_all_else_is_the_same_as_disk_image_create(name: str, elements: Path, tmp_path: Path, table: Table) -> None:
    skip_without("sandbox")
    check(name, FULL[name], elements, tmp_path, table)


def test_each_difference_is_on_the_page() -> None:
    page = re.sub(r"\s+", " ", PAGE.read_text(encoding="utf-8").replace("`", ""))
    assert [text for text in DIFFERENCES.values() if text not in page] == []
    assert {*STATUS_DIFFERS.values(), *VARIABLES_THAT_DIFFER} <= DIFFERENCES.keys()


@pytest.mark.parametrize("difference", VARIABLES_THAT_DIFFER)
def test_each_variable_that_differs_is_on_the_page(difference: str) -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if DIFFERENCES[difference] in line]
    named = set(re.findall(r"`(\w+)`", " ".join(rows)))
    assert set(VARIABLES_THAT_DIFFER[difference]) <= named
