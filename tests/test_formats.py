# SPDX-License-Identifier: Apache-2.0
"""Every output format, opened by the tools it is for, holds what the image holds."""

from __future__ import annotations

import contextlib
import dataclasses
import filecmp
import hashlib
import io
import json
import os
import re
import signal
import stat
import struct
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import ext4
from helpers import TESTS, make_element, skip_without, virt_dib
from test_failures import hidden
from virt_dib import archives, formats, qcow2, tools
from virt_dib.errors import ToolError, UsageError, VirtDibError
from virt_dib.outputs import open_outputs
from virt_dib.spec import BuildSpec, check_docker_target, host_arch

# ---- disk images ----


def asking(**changes: object) -> BuildSpec:
    return BuildSpec(name="x", output_dir=Path(), elements=("one",), **changes)  # type: ignore[arg-type] # fields by name


def check_options(names: Sequence[str], options: str, scratch: Path, **changes: object) -> None:
    formats.check_options(formats.select(names), asking(qemu_img_options=options, **changes), scratch)


@pytest.mark.parametrize(
    ("names", "options"),
    [
        ("qcow2,raw", ""),
        ("qcow2,raw", "compat=0.10"),
        ("qcow2,raw", "cluster_size=2M,lazy_refcounts=on"),
        ("qcow2,raw", "preallocation=metadata"),
        ("raw,tar", "foo=1"),
        # Each has what it knows; nodepool gives one list for all.
        ("vhd,raw,qcow2,vmdk", "compat=0.10,adapter_type=lsilogic"),
        ("vhd,vhdx", "subformat=dynamic"),
        ("vhd", "subformat=dynamic"),
        ("vdi", "static=on"),
        ("vhdx", "block_size=1M"),
    ],
)
def test_options_that_qemu_img_takes(tmp_path: Path, names: str, options: str) -> None:
    check_options(names.split(","), options, tmp_path / "scratch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "options", "reason"),
    [
        ("raw,qcow2", "foo=1", "for qcow2: there is no option 'foo'"),
        ("vhd,qcow2", "static=on", "for vhd, qcow2: there is no option 'static'"),
        ("raw,qcow2", "cluster_size=3", "for qcow2: Cluster size must be"),
        ("raw,qcow2", "help", "for qcow2: there is no option 'help'"),
        ("vhd,vmdk", "subformat=dynamic", "for vmdk: "),
        ("vmdk", "subformat=twoGbMaxExtentSparse", "for vmdk: it makes more than one file"),
    ],
)
def test_options_that_qemu_img_refuses(tmp_path: Path, names: str, options: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"cannot use '{options}' as --qemu-img-options {reason}") as caught:
        check_options(names.split(","), options, tmp_path / "scratch")
    assert str(tmp_path) not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_where_options_are_listed_is_told_of_each_format(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        check_options(["vhd", "raw", "qcow2"], "foo=1", tmp_path / "scratch")
    commands = "qemu-img create -f vpc -o help; qemu-img create -f qcow2 -o help"
    assert caught.value.problems[0].hint == f"what there is: {commands}"
    for command in commands.split("; "):
        assert "Supported options:" in tools.run([*command.split(), "x"], doing="asking", cwd=tmp_path).stdout


def test_zstd_is_tried_with_the_options(tmp_path: Path) -> None:
    check_options(["qcow2"], "", tmp_path / "scratch", compression="zstd")
    with pytest.raises(UsageError, match=r"cannot use 'compat=0\.10' as --qemu-img-options for qcow2: "):
        check_options(["qcow2"], "compat=0.10", tmp_path / "scratch", compression="zstd")
    check_options(["qcow2"], "compat=0.10", tmp_path / "scratch", compression="zstd", compress=False)


@pytest.mark.parametrize("option", ["data_file=DATA", "backing_file=DATA,backing_fmt=raw", "backing_fmt=raw"])
@pytest.mark.parametrize("output", ["qcow2", "vmdk"])
def test_what_makes_an_image_that_needs_another_file_is_refused(tmp_path: Path, output: str, option: str) -> None:
    (tmp_path / "data").write_text("precious")
    name = option.partition("=")[0]
    with pytest.raises(UsageError, match=f"for {output}: with {name} an image is more than one file"):
        check_options([output], option.replace("DATA", f"{tmp_path}/data"), tmp_path / "scratch")
    assert (tmp_path / "data").read_text() == "precious"


DISK_FORMATS = ("qcow2", "raw", "vdi", "vhd", "vhdx", "vmdk")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk that is not of whole MiB."""
    path = tmp_path_factory.mktemp("disk") / "disk"
    path.write_bytes(b"".join(bytes([number % 251]) * 4096 for number in range(1024)) + os.urandom(65536))
    return path


def write(disk: Path, names: Sequence[str], **changes: object) -> dict[str, Path]:
    """The formats called *names*, beside the disk."""
    scratch = disk.parent / "-".join(["of", *names, *map(str, changes.values())])
    scratch.mkdir()
    targets = {f"x.{output.name}": (scratch / f"x.{output.name}", output) for output in formats.select(names)}
    formats.write(asking(**changes), formats.Sources(disk=disk, archive=None), targets, scratch)
    return {output.name: path for path, output in targets.values()}


@pytest.mark.parametrize("compress", [True, False])
def test_what_is_written_is_what_the_disk_holds(disk: Path, compress: bool) -> None:  # noqa: FBT001 - a parameter
    written = write(disk, DISK_FORMATS, compress=compress, qemu_img_options="compat=1.1")
    for output in formats.select(DISK_FORMATS):
        assert isinstance(output, formats.DiskFormat)
        path = written[output.name]
        size_bytes = formats.virtual_size_bytes(path, output)
        assert size_bytes == (5 << 20 if output.name == "vhd" else disk.stat().st_size)
        # Zeros after the end of the shorter one are no difference.
        command: list[str | Path] = [qemu_img(), "compare", "-f", "raw", "-F", output.qemu_name, disk, path]
        tools.run(command, doing="comparing")
        if output.name not in {"raw", "vhd"}:
            tools.run(
                [qemu_img(), "check", "-f", output.qemu_name, path], doing="checking", check=output.name != "vhdx"
            )
    assert (written["qcow2"].stat().st_size < disk.stat().st_size // 2) == compress


@pytest.mark.parametrize("output", formats.select(DISK_FORMATS), ids=lambda output: output.name)
def test_a_colon_in_a_name_is_no_protocol(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: formats.DiskFormat
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    target = Path(f"debian:13.{output.name}")
    formats.write(asking(), formats.Sources(disk=disk, archive=None), {"x": (target, output)}, tmp_path / "scratch")
    assert formats.virtual_size_bytes(target, output) >= disk.stat().st_size


@pytest.mark.parametrize(
    ("options", "said"),
    [
        # The manual's own example: qemu-img makes no compressed image of it.
        ("cluster_size=512,preallocation=metadata", ["qcow2: not compressed, since"]),
        ("preallocation=full", ["qcow2: not compressed, since"]),
        ("preallocation=off", []),
    ],
)
def test_clusters_that_are_allocated_before_are_not_compressed(
    disk: Path, tmp_path: Path, options: str, said: Sequence[str]
) -> None:
    check_options(["qcow2"], options, tmp_path / "scratch", compression="zstd")
    outputs, spec = formats.select(["qcow2", "raw"]), asking(qemu_img_options=options)
    assert [text[: len("qcow2: not compressed, since")] for text in formats.choices(outputs, spec)] == said
    written = write(disk, ["qcow2"], qemu_img_options=options)["qcow2"]
    tools.run([qemu_img(), "compare", "-f", "raw", "-F", "qcow2", disk, written], doing="comparing")
    compressed = written.stat().st_size < disk.stat().st_size // 2
    assert compressed == (not said)


def test_a_vhd_is_what_azure_takes(disk: Path) -> None:
    (footer_at, path) = (5 << 20, write(disk, ["vhd"])["vhd"])
    data = path.read_bytes()
    assert len(data) == footer_at + 512
    cookie, kind = data[footer_at : footer_at + 8], int.from_bytes(data[footer_at + 60 : footer_at + 64], "big")
    sizes = [int.from_bytes(data[footer_at + at : footer_at + at + 8], "big") for at in (40, 48)]
    assert (cookie, kind, sizes) == (b"conectix", 2, [5 << 20, 5 << 20])
    assert data[: disk.stat().st_size] == disk.read_bytes()


def test_the_users_options_win(disk: Path) -> None:
    assert write(disk, ["vhd"], qemu_img_options="subformat=dynamic")["vhd"].read_bytes()[:8] == b"conectix"


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_the_compression_of_a_qcow2(disk: Path, compression: str) -> None:
    path = write(disk, ["qcow2"], compression=compression)["qcow2"]
    said = tools.run([qemu_img(), "info", "--output=json", path], doing="asking").stdout
    assert json.loads(said)["format-specific"]["data"]["compression-type"] == compression


CLUSTER_BYTES = 65536
MEBIBYTE = os.urandom(1 << 20)


@pytest.mark.parametrize(
    "parts",
    [
        # Where each is on the disk, and what is there; the last one ends the disk.
        [(0, b"x" * 512)],
        [(0, os.urandom(CLUSTER_BYTES))],
        [(0, os.urandom(CLUSTER_BYTES - 512))],
        [(0, bytes(3 * CLUSTER_BYTES)), (3 * CLUSTER_BYTES, b"y" * 1000)],
        # More than one L2 table and, beside each other, what can be compressed and what cannot.
        [((512 << 20) * number, os.urandom(100_000) + b"z" * 200_000) for number in range(5)],
        # Data that begins in the middle of a cluster, after a hole.
        [((1 << 30) + 4096 * 3, b"a" * 4096), ((1 << 40) - 512, b"b" * 512)],
        # More than one block of reference counts.
        pytest.param([((1 << 20) * number, MEBIBYTE) for number in range(2100)], marks=pytest.mark.full),
    ],
    ids=["sector", "cluster", "less", "zeros", "tables", "holes", "references"],
)
def test_a_compressed_qcow2_of_any_disk(tmp_path: Path, parts: Sequence[tuple[int, bytes]]) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as stream:
        for position, data in parts:
            stream.seek(position)
            stream.write(data)
    image = write(disk, ["qcow2"])["qcow2"]
    tools.run([qemu_img(), "check", image], doing="checking")
    tools.run([qemu_img(), "compare", "-f", "raw", "-F", "qcow2", disk, image], doing="comparing")
    size_bytes = formats.virtual_size_bytes(image, formats.select(["qcow2"])[0])  # type: ignore[arg-type] # a disk
    assert size_bytes == -(-disk.stat().st_size // 512) * 512
    stored_bytes = sum(len(data) for _, data in parts)
    assert image.stat().st_size < stored_bytes + 8 * CLUSTER_BYTES + 2 * CLUSTER_BYTES * len(parts)


def test_the_program_that_writes_a_qcow2_ends_with_a_status_and_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, image = tmp_path / "disk", tmp_path / "image"
    disk.write_bytes(b"data")
    os.truncate(disk, 10 << 20)
    assert qcow2.main([str(disk), str(image)]) == 0
    tools.run([qemu_img(), "compare", "-f", "raw", "-F", "qcow2", disk, image], doing="comparing")
    assert qcow2.main([str(tmp_path / "nothing"), str(image)]) == 1
    assert capsys.readouterr().err == "No such file or directory\n"


def test_a_qcow2_where_there_is_no_zlib_ng(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = write(disk, ["qcow2"], arch="amd64")["qcow2"]
    monkeypatch.setattr(sys, "executable", "")
    without = write(disk, ["qcow2"], arch="arm64")["qcow2"]
    tools.run([qemu_img(), "compare", with_it, without], doing="comparing")
    assert abs(with_it.stat().st_size - without.stat().st_size) < without.stat().st_size // 10
    assert with_it.read_bytes() != without.read_bytes()


def test_a_qcow2_that_does_not_fit_is_told(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(os.urandom(4 << 20))
    (tmp_path / "small").mkdir()
    code = (
        "from pathlib import Path\n"
        "from virt_dib import formats\n"
        "from virt_dib.spec import BuildSpec\n"
        f"top = Path({str(tmp_path)!r})\n"
        "targets = {'x.qcow2': (top / 'small/image', formats.select(['qcow2'])[0])}\n"
        "spec = BuildSpec(name='x', output_dir=top, elements=('one',))\n"
        "try:\n"
        "    formats.write(spec, formats.Sources(disk=top / 'disk', archive=None), targets, top)\n"
        "except Exception as error: print(error, error.problems[0].hint)\n"
    )
    run = tools.run(
        [*hidden(f"mount -t tmpfs -o size=1m none {tmp_path}/small"), sys.executable, "-c", code],
        doing="writing",
        environment=dict(os.environ),
    )
    assert "writing 'x.qcow2': 'qcow2.py' failed with exit status 1: No space left on device" in run.stdout
    assert "make room" in run.stdout


def test_messages_have_the_final_name(tmp_path: Path) -> None:
    sources = formats.Sources(disk=tmp_path / "nothing", archive=None)
    targets = {"x.qcow2": (tmp_path / "partial", formats.select(["qcow2"])[0])}
    with pytest.raises(VirtDibError, match=r"writing 'x\.qcow2': 'qcow2\.py' failed"):
        formats.write(asking(), sources, targets, tmp_path)


def qemu_img() -> Path:
    return tools.require("qemu-img", purpose="run the tests", package="qemu-utils")


def test_a_disk_too_large_for_its_format() -> None:
    outputs = formats.select(["qcow2", "vhd", "vhdx"])
    formats.check_spec(outputs, asking(size_bytes=2040 << 30))
    with pytest.raises(UsageError, match="the format vhd holds at most 2040 GiB"):
        formats.check_spec(outputs, asking(size_bytes=(2040 << 30) + 65536))
    with pytest.raises(UsageError, match="the format vhdx holds at most 65536 GiB"):
        formats.check_spec(formats.select(["vhdx"]), asking(size_bytes=65 << 40))


def test_docker_needs_a_target() -> None:
    outputs = formats.select(["docker", "oci"])
    with pytest.raises(UsageError, match="the format docker needs a repository and tag"):
        formats.check_spec(outputs, asking())
    formats.check_spec(outputs, asking(docker_target="a:1"))
    formats.check_spec(formats.select(["oci", "tar", "qcow2"]), asking())


# ---- what comes out of the guest ----


def archive_of(members: Sequence[tuple[str, bytes | None]], path: Path) -> Path:
    """A tar of directories and files; there is no end to what a guest may write."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            member.mode = 0o755
            member.size = len(content or b"")
            archive.addfile(member, io.BytesIO(content or b""))
    return path


def make_squashfs(archive: Path) -> Path:
    target = archive.with_name("x.squashfs")
    sources = formats.Sources(disk=archive, archive=archive)
    chosen = {"x.squashfs": (target, formats.select(["squashfs"])[0])}
    formats.write(asking(), sources, chosen, archive.parent)
    return target


def test_a_plain_archive_as_squashfs(tmp_path: Path) -> None:
    path = archive_of([("./", None), ("./a", None), ("./a/b", b"text")], tmp_path / "tar")
    listed = tools.run(["unsquashfs", "-cat", make_squashfs(path), "a/b"], doing="reading").stdout
    assert listed == "text"


def test_odd_names_of_attributes_in_a_squashfs(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").touch()
    for name in ("user.plain", "user.p%q", "user.p%25q", "user.p%3Dq", "user.a=b"):
        os.setxattr(tmp_path / "tree/file", name, b"value")
    options = ["--format=posix", "--xattrs", "--xattrs-include=*"]
    tools.run(["tar", "-C", tmp_path / "tree", *options, "-cf", tmp_path / "tar", "."], doing="making an archive")
    image = make_squashfs(tmp_path / "tar")
    tools.run(["unsquashfs", "-no-progress", "-d", tmp_path / "out", image], doing="reading")
    kept = {name for name in os.listxattr(tmp_path / "out/file") if name.startswith("user.")}
    assert kept == {"user.plain", "user.p%q", "user.p%25q", "user.p%3Dq"}


@pytest.mark.parametrize(
    ("arch", "said"),
    [("x86_64", "amd64"), ("aarch64", "arm64"), ("mipsel", "mipsle"), ("amd64", "amd64"), ("armhf", "arm")],
)
def test_architectures_in_the_words_of_containers(tmp_path: Path, arch: str, said: str) -> None:
    archive, target = archive_of([("./", None)], tmp_path / "tar"), tmp_path / "oci"
    archives.write_oci(archive, archive, target, name="x:latest", arch=arch, created_by="a test")
    with tarfile.open(target) as made:
        blobs = [made.extractfile(member) for member in made.getmembers() if member.name.startswith("blobs/")]
        configs = [stream.read() for stream in blobs if stream]
    assert [json.loads(text)["architecture"] for text in configs if b"rootfs" in text] == [said]


def hostile(kind: str, path: Path) -> Path:
    """An archive that no tar makes of a tree."""
    if kind == "no top directory":
        return archive_of([("./a", b"")], path)
    if kind == "a name that leads out":
        return archive_of([("./", None), ("./\x1b[31ma/../../../escaped", b"x")], path)
    archive_of([("./", None), ("./a", b"x" * 100_000)], path)
    data = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(data[:50_000])
    elif kind == "a header that is none":
        data[512:612] = b"\xff" * 100
        path.write_bytes(data)
    else:
        path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    "kind", ["no top directory", "a name that leads out", "cut", "a header that is none", "nothing"]
)
def test_a_hostile_archive_is_an_error(tmp_path: Path, kind: str) -> None:
    inner = tmp_path / "inner" / "innermost"
    inner.mkdir(parents=True)
    path = hostile(kind, inner / "tar")
    with pytest.raises(ToolError, match=r"writing 'x\.squashfs': ") as caught:
        make_squashfs(path)
    assert str(caught.value).isprintable()
    assert [found.name for found in tmp_path.rglob("escaped")] == []


def test_what_reads_an_archive_sees_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (command,) = [archives.squashfs(tmp_path / "tar", tmp_path / "target")]
    words = list(command.words)
    inside = words[: words.index("--") + 1]
    listed = tools.run([*inside, "ls", "/", "/etc", "/proc/self/net/dev"], doing="looking", check=False).stdout.split()
    assert {"squashfs", "usr", "make-squashfs.py"} <= set(listed)
    assert not {"home", "root", "var", "passwd", tmp_path.parts[1]} & set(listed)
    seen = tools.run([*inside, "cat", "/proc/net/dev"], doing="looking").stdout
    assert [line.split(":")[0].strip() for line in seen.splitlines() if ":" in line] == ["lo"]
    refused = tools.run([*inside, "touch", "/usr/x"], doing="writing", check=False)
    assert "Read-only file system" in refused.stderr


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    archive = archive_of([("./", None), ("./a", os.urandom(100_000))], tmp_path / "tar")
    targets = {"x.tgz": (Path("/dev/full"), formats.select(["tgz"])[0])}
    with pytest.raises(ToolError, match=r"writing 'x\.tgz': .*No space left") as caught:
        formats.write(asking(), formats.Sources(disk=archive, archive=archive), targets, tmp_path)
    assert "make room" in str(caught.value.problems[0].hint)


@pytest.mark.parametrize("name", ["x", "two words", "back\\slash"])
def test_checksums_of_files_of_any_name(disk: Path, tmp_path: Path, name: str) -> None:
    spec = dataclasses.replace(asking(checksums=("md5", "sha256")), name=name, output_dir=tmp_path)
    workspace = tmp_path / "virt-dib-mark"
    workspace.mkdir()
    with open_outputs(spec, workspace) as outputs:
        outputs.convert(formats.select(["raw"]), formats.Sources(disk=disk, archive=None))
        outputs.sum()
        made = outputs.publish()
    assert [artifact.path.name for artifact in made] == [f"{name}.raw", f"{name}.raw.md5", f"{name}.raw.sha256"]
    for kind in ("md5", "sha256"):
        tools.run([f"{kind}sum", "-c", "--strict", f"{name}.raw.{kind}"], doing="checking", cwd=tmp_path)


@pytest.mark.parametrize("left", [[], ["qcow2", "raw"]], ids=["go", "stay"])
def test_what_a_build_has_written_that_fails(disk: Path, tmp_path: Path, left: list[str]) -> None:
    spec = dataclasses.replace(asking(delete_on_failure=not left), name="x", output_dir=tmp_path)
    workspace = tmp_path / "virt-dib-mark"
    workspace.mkdir()
    before = set(tmp_path.iterdir())
    with contextlib.suppress(ToolError), open_outputs(spec, workspace) as outputs:
        outputs.convert(formats.select(["raw", "qcow2"]), formats.Sources(disk=disk, archive=None))
        raise ToolError("what comes after it failed")
    found = sorted(set(tmp_path.iterdir()) - before)
    assert [path.name.split(".")[1:3] + path.name.split(".")[4:] for path in found] == [
        ["x", kind, "partial"] for kind in left
    ]
    for path, image_format in zip(found, left, strict=True):
        words: list[str | Path] = [qemu_img(), "compare", "-f", "raw", "-F", image_format, disk, path]
        tools.run(words, doing="comparing")


ALL_FILES = ("qcow2", "raw", "vhd", "vhdx", "vmdk", "vdi", "tar", "tgz", "squashfs", "oci")


KILLED = """
import os, signal, sys
from pathlib import Path
from virt_dib import formats
from virt_dib.spec import BuildSpec
archive, target = map(Path, sys.argv[1:])
def kill(event, arguments):
    if event == "os.rename":
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
(output,) = formats.select(["tar"])
spec = BuildSpec(name="x", output_dir=target.parent, elements=("one",))
formats.write(spec, formats.Sources(disk=archive, archive=archive), {"x.tar": (target, output)}, archive.parent)
"""


def test_a_kill_while_the_archive_gets_its_name_leaves_no_other_one_beside_it(tmp_path: Path) -> None:
    archive = archive_of([("./", None)], tmp_path / "archive")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x.tar").touch()
    command: list[str | Path] = [sys.executable, "-c", KILLED, archive, tmp_path / "out/x.tar"]
    result = tools.run(command, doing="writing", environment=os.environ, check=False)
    assert result.exit_status == 128 + signal.SIGKILL
    assert os.listdir(tmp_path / "out") == ["x.tar"]


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
def test_output_files_have_the_users_umask(disk: Path, tmp_path: Path, umask: int) -> None:
    archive = archive_of([("./", None), ("./a", b"text")], tmp_path / "archive")
    # As the one that a build makes.
    archive.chmod(0o666 & ~umask)
    (tmp_path / "workspace").mkdir()
    spec = dataclasses.replace(asking(checksums=("md5",)), name="x", output_dir=tmp_path)
    before = os.umask(umask)
    try:
        with open_outputs(spec, tmp_path / "workspace") as outputs:
            outputs.convert(formats.select(ALL_FILES), formats.Sources(disk=disk, archive=archive))
            outputs.sum()
            made = outputs.publish()
    finally:
        os.umask(before)
    assert len(made) == 2 * len(ALL_FILES)
    modes = {artifact.path.name: stat.S_IMODE(artifact.path.stat().st_mode) for artifact in made}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert (tmp_path / "x.tar").samefile(archive)


@pytest.mark.parametrize("name", ALL_FILES)
def test_no_file_of_another_user_is_written_to(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Who can write to the output directory cannot know the names; and if they could, their links are not followed."""
    (tmp_path / "precious").write_text("mine")
    archive = archive_of([("./", None), ("./a", b"text")], tmp_path / "archive")
    workspace = tmp_path / "virt-dib-mark"
    workspace.mkdir()
    spec = dataclasses.replace(asking(), name="x", output_dir=tmp_path)
    (output,) = formats.select([name])
    final = formats.file_name(spec, output)
    (tmp_path / f".{final}.mark.partial").symlink_to(tmp_path / "precious")
    sources = formats.Sources(disk=disk, archive=archive)
    with open_outputs(spec, workspace) as outputs:
        outputs.convert([output], sources)
        outputs.publish()
    assert (tmp_path / final).stat().st_size > 0
    monkeypatch.setattr("virt_dib.outputs.partial_name", ".{}.mark.partial".format)
    with pytest.raises(FileExistsError), open_outputs(spec, workspace) as outputs:
        outputs.convert([output], sources)
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / f".{final}.mark.partial").is_symlink()


@pytest.mark.parametrize(
    ("name", "target", "called"),
    [("web-1.2", None, "web-1-2:latest"), ("Web Server", None, "web-server:latest"), ("--", None, "image:latest"),
     ("web", "a/b:1", "a/b:1")],
)  # fmt: skip
def test_names_of_images_for_containers(name: str, target: str | None, called: str) -> None:
    assert archives.image_name(name, target) == called
    check_docker_target(called)


@pytest.mark.skipif(tools.find("docker") is None, reason="there is no docker command")
def test_docker_is_asked_first(containers: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an engine of docker's interface: podman's service."""
    for variable, value in containers.items():
        monkeypatch.setenv(variable, value)
    first = archives.find_engine()
    if first is None:
        pytest.skip("podman does not work here")
    assert first.name == "podman"
    podman_path = tools.require("podman", purpose="run the tests", package="podman")
    service: list[str | Path] = [podman_path, "system", "service", "--time", "0", containers["DOCKER_HOST"]]
    # It leaves what it was sent in its temporary directory.
    with tools.started(service, environment={**os.environ, "TMPDIR": str(tmp_path)}):
        socket = Path(containers["DOCKER_HOST"].removeprefix("unix://"))
        until = time.monotonic() + 60
        while not socket.exists() and time.monotonic() < until:
            time.sleep(0.1)
        engine = archives.find_engine()
        assert engine is not None
        assert engine.name == "docker"
        archive = archive_of([("./", None), ("./a", b"text")], tmp_path / "tar")
        imported = engine.load(archive, host_arch())
        imported.tag("by-docker:1")
        assert "by-docker" in podman(containers, "images")
        unnamed = engine.load(archive_of([("./", None), ("./b", b"b")], tmp_path / "tar2"), "arm64")
        said = json.loads(podman(containers, "image", "inspect", unnamed.image_id.removeprefix("sha256:")))
        assert said[0]["Architecture"] == "arm64"
        unnamed.remove()
        assert "<none>" not in podman(containers, "images")


# ---- one build of all formats ----

ALL = ",".join(sorted(formats.KNOWN, reverse=True))
TARGET = "strange:1"
NOT_IN_ARCHIVES = {b"/made/special/socket"}
"""tar has no type for it."""
OF_THE_KERNEL = (b"/proc/", b"/sys/", b"/dev/")
ACLS = ("system.posix_acl_access", "system.posix_acl_default")
ACL_TAGS_WITH_ID = (0x02, 0x08)
PODMAN_STORAGE = '[storage]\ndriver = "vfs"\ngraphroot = "{place}/graph"\nrunroot = "{place}/run"\n'

Told = Mapping[str, object]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may unpack what belongs to anybody")


@dataclass(frozen=True)
class Built:
    directory: Path
    entries: Mapping[bytes, Told]
    """What is in the image, by path."""

    def file(self, suffix: str) -> Path:
        return self.directory / f"x.{suffix}"


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """The environment of a podman with a storage of its own, and of no docker."""
    place = tmp_path_factory.mktemp("containers")
    (place / "storage.conf").write_text(PODMAN_STORAGE.format(place=place))
    variables = {"CONTAINERS_STORAGE_CONF": str(place / "storage.conf"), "DOCKER_HOST": f"unix://{place}/docker.socket"}
    yield variables
    # A reset would take away the networks of this host's own podman.
    podman(variables, "image", "unmount", "--all")
    podman(variables, "rmi", "--all", "--force")


def podman(variables: Mapping[str, str], *words: str | Path) -> str:
    program = tools.require("podman", purpose="run the tests", package="podman")
    return tools.run([program, *words], doing="running podman", environment={**os.environ, **variables}).stdout


@pytest.fixture(scope="module")
def built(element_dir: Path, containers: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Built:
    skip_without("sandbox")
    directory = tmp_path_factory.mktemp("formats")
    script = (TESTS / "data" / "strange_tree.py").read_text()
    files = {"root.d/90-strange-tree": script, "post-root.d/90-strange-tree": script}
    make_element(directory / "elements", "strange-tree", files)
    output_dir = directory / "out"
    (output_dir / "x.d").mkdir(parents=True)
    (output_dir / "x.d" / "manifest").write_text("of an earlier build\n")
    run = virt_dib(
        [
            "--name", "x", "--formats", ALL, "--checksum", "--docker-target", TARGET, "--size", "1G", "--skip-base",
            "--no-network", "--isolation", "sandbox", "--compression", "zstd", "-p", element_dir,
            "-p", directory / "elements", "tiny-os", "strange-tree",
        ],
        cwd=output_dir,
        environment={**containers, "TMPDIR": "/var/tmp"},
    )  # fmt: skip
    assert run.exit_status == 0, run.stdout + run.stderr
    return make_built(output_dir)


def make_built(output_dir: Path) -> Built:
    """What is in the directory of a build."""
    with ext4.opened(output_dir / "x.raw") as file_system:
        entries = file_system.entries()
    names: dict[int, set[bytes]] = {}
    for path, entry in entries.items():
        names.setdefault(entry.inode, set()).add(path)
    told: dict[bytes, Told] = {
        path: {
            "mode": entry.mode, "uid": entry.uid, "gid": entry.gid, "mtime_ns": entry.mtime_ns,
            "device": entry.device, "target": entry.target, "digest": entry.digest, "names": names[entry.inode],
            "attributes": {key: as_attribute(value) if key in ACLS else value for key, value in entry.attributes},
        }
        for path, entry in entries.items()
    }  # fmt: skip
    return Built(output_dir, told)


def as_attribute(acl: bytes) -> bytes:
    """An ACL as the kernel shows it, of one as ext4 has it (fs/ext4/acl.h), which leaves out ids that say nothing."""
    if acl[:4] != struct.pack("<I", 1):
        return acl
    shown, rest = struct.pack("<I", 2), acl[4:]
    while rest:
        has_id = struct.unpack_from("<H", rest)[0] in ACL_TAGS_WITH_ID
        shown += rest[:8] if has_id else rest[:4] + b"\xff" * 4
        rest = rest[8 if has_id else 4 :]
    return shown


def unpacked(top: Path) -> dict[bytes, Told]:
    """The same of a directory."""
    found: dict[bytes, dict[str, object]] = {}
    names: dict[int, set[bytes]] = {}
    root = os.fsencode(top)
    paths = [root]
    for directory, directories, files in os.walk(root):
        paths += [os.path.join(directory, name) for name in directories + files]
    for path in paths:
        state = os.lstat(path)
        is_device = stat.S_ISCHR(state.st_mode) or stat.S_ISBLK(state.st_mode)
        is_file = stat.S_ISREG(state.st_mode)
        name = path[len(root) :] or b"/"
        names.setdefault(state.st_ino, set()).add(name)
        found[name] = {
            "mode": state.st_mode, "uid": state.st_uid, "gid": state.st_gid, "mtime_ns": state.st_mtime_ns,
            "device": (os.major(state.st_rdev), os.minor(state.st_rdev)) if is_device else None,
            "target": os.readlink(path) if stat.S_ISLNK(state.st_mode) else None,
            "digest": hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest() if is_file else None,
            "attributes": {
                key: os.getxattr(path, key, follow_symlinks=False)
                for key in os.listxattr(path, follow_symlinks=False)
            },
            "names": names[state.st_ino],
        }  # fmt: skip
    return dict(found)


def differences(
    built: Built, found: Mapping[bytes, Told], *, but: Mapping[str, Callable[[object], object]] | None = None
) -> list[str]:
    """What is not as in the image, one line each; *but* has what is expected instead of some values."""
    wanted = {
        path: entry
        for path, entry in built.entries.items()
        if path not in NOT_IN_ARCHIVES and not path.startswith(OF_THE_KERNEL)
    }
    lines = [f"{path!r} is missing" for path in wanted.keys() - found.keys()]
    lines += [f"{path!r} is too much" for path in found.keys() - wanted.keys()]
    for path in wanted.keys() & found.keys():
        for key, value in wanted[path].items():
            expected = but[key](value) if but and key in but else value
            if key == "names" and wanted[path]["target"] is None and wanted[path]["digest"] is None:
                continue  # not kept of devices by all tools
            if found[path][key] != expected:
                lines.append(f"{path!r}: {key}: {found[path][key]!r} instead of {expected!r}"[:300])
    return sorted(lines)


@pytest.mark.appliance
def test_all_files_are_there_and_no_others(built: Built) -> None:
    images = [f"x.{name}" for name in formats.KNOWN if name != "docker"]
    sums = [f"{name}.{kind}" for name in images for kind in ("md5", "sha256")]
    assert sorted(path.name for path in built.directory.iterdir()) == sorted([*images, *sums, "x.log", "x.d"])


@pytest.mark.appliance
def test_a_directory_of_an_earlier_build_stays_where_this_one_left_nothing_and_is_told(built: Built) -> None:
    assert [path.name for path in built.file("d").iterdir()] == ["manifest"]
    warning = r"warning: '\S*x\.d' is of an earlier build, for this one left no files\n"
    assert len(re.findall(warning, built.file("log").read_text())) == 1


@pytest.mark.appliance
@pytest.mark.parametrize("output", DISK_FORMATS)
def test_disk_images_hold_the_same(built: Built, output: str) -> None:
    (chosen,) = formats.select([output])
    assert isinstance(chosen, formats.DiskFormat)
    command: list[str | Path] = [
        qemu_img(),
        "compare",
        "-f",
        "raw",
        "-F",
        chosen.qemu_name,
        built.file("raw"),
        built.file(output),
    ]
    tools.run(command, doing="comparing")


@pytest.mark.option("--checksum")
@pytest.mark.appliance
@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_checksums_are_what_their_programs_check(built: Built, kind: str) -> None:
    sums = sorted(path.name for path in built.directory.glob(f"*.{kind}"))
    said = tools.run([f"{kind}sum", "-c", "--strict", *sums], doing="checking", cwd=built.directory).stdout
    assert sorted(said.splitlines()) == sorted(f"{name.removesuffix('.' + kind)}: OK" for name in sums)


@pytest.mark.option("--compression")
@pytest.mark.appliance
def test_the_qcow2_is_compressed_as_asked_for(built: Built) -> None:
    said = tools.run([qemu_img(), "info", "--output=json", built.file("qcow2")], doing="asking").stdout
    assert json.loads(said)["format-specific"]["data"]["compression-type"] == "zstd"
    extents = json.loads(tools.run([qemu_img(), "map", "--output=json", built.file("qcow2")], doing="asking").stdout)
    # Compressed clusters have no place that could be named.
    assert not any("offset" in extent for extent in extents if extent["data"])


@pytest.mark.appliance
def test_names_in_the_tar(built: Built) -> None:
    with tarfile.open(built.file("tar")) as archive:
        names = archive.getnames()
    assert names[0] == "."
    assert names[1:] == sorted(names[1:], key=lambda name: os.fsencode(name).split(b"/"))
    assert all(name.startswith("./") for name in names[1:])
    assert {"./proc", "./sys", "./dev"} <= set(names)
    assert not [name for name in names if os.fsencode(f"{name[1:]}").startswith(OF_THE_KERNEL)]


@pytest.mark.appliance
def test_the_tgz_is_the_tar_compressed(built: Built, tmp_path: Path) -> None:
    tools.run_together({"unpacking": tools.Command(words=["gzip", "-dc", built.file("tgz")], stdout=tmp_path / "tar")})
    assert filecmp.cmp(tmp_path / "tar", built.file("tar"), shallow=False)


@pytest.mark.appliance
@pytest.mark.needs_root
@needs_root
def test_the_tar_holds_the_tree(built: Built, tmp_path: Path) -> None:
    options = ["--numeric-owner", "--same-owner", "--xattrs", "--xattrs-include=*", "--acls", "--warning=no-timestamp"]
    tools.run(["tar", "-xpf", built.file("tar"), "-C", tmp_path, *options], doing="unpacking")
    assert differences(built, unpacked(tmp_path)) == []
    assert (tmp_path / "made/contents/hole").stat().st_blocks == 0


@pytest.mark.appliance
@pytest.mark.needs_root
@needs_root
def test_the_squashfs_holds_the_tree(built: Built, tmp_path: Path) -> None:
    assert "Compression xz" in tools.run(["unsquashfs", "-s", built.file("squashfs")], doing="asking").stdout
    tools.run(["unsquashfs", "-q", "-n", "-d", tmp_path / "u", built.file("squashfs")], doing="unpacking")
    found = unpacked(tmp_path / "u")
    # Of the top directory, squashfs-tools before 4.6 take only the mode; a squashfs has no ACLs and whole seconds.
    found[b"/"] = {**found[b"/"], **{key: built.entries[b"/"][key] for key in ("uid", "gid")}}
    found[b"/"] = {**found[b"/"], "mtime_ns": in_a_squashfs(built.entries[b"/"]["mtime_ns"])}
    assert differences(built, found, but={"mtime_ns": in_a_squashfs, "attributes": without_acls}) == []


def in_a_squashfs(time_ns: object) -> int:
    assert isinstance(time_ns, int)
    return min(max(time_ns // 10**9, 0), 2**32 - 1) * 10**9


def without_acls(attributes: object) -> object:
    assert isinstance(attributes, dict)
    return {name: value for name, value in attributes.items() if name not in ACLS}


@pytest.mark.option("--docker-target")
@pytest.mark.appliance
def test_the_oci_archive_is_one_to_skopeo(built: Built, tmp_path: Path) -> None:
    source = f"oci-archive:{built.file('oci')}"
    said = json.loads(tools.run(["skopeo", "inspect", "--config", source], doing="asking").stdout)
    assert (said["architecture"], said["os"]) == (host_arch(), "linux")
    digest = tools.run(["sha256sum", built.file("tar")], doing="summing").stdout.split()[0]
    assert said["rootfs"]["diff_ids"] == [f"sha256:{digest}"]
    # It checks all digests.
    policy = ["--insecure-policy"]
    tools.run(["skopeo", *policy, "copy", source, f"dir:{tmp_path}"], doing="copying")
    with tarfile.open(built.file("oci")) as archive:
        assert archive.getnames()[:2] == ["oci-layout", "index.json"]
        index = archive.extractfile("index.json")
        assert index is not None
        (manifest,) = json.load(index)["manifests"]
    assert manifest["annotations"]["org.opencontainers.image.ref.name"] == TARGET


@pytest.mark.option("--docker-target", "--formats")
@pytest.mark.appliance
@pytest.mark.needs_root
@needs_root
@pytest.mark.parametrize("output", ["oci", "docker"])
def test_podman_has_the_tree(built: Built, containers: Mapping[str, str], output: str) -> None:
    if output == "oci":
        podman(containers, "untag", f"localhost/{TARGET}")
        assert f"localhost/{TARGET}" in podman(containers, "load", "-i", built.file("oci"))
    top = Path(podman(containers, "image", "mount", f"localhost/{TARGET}").strip())
    found = unpacked(top)
    for path, entry in found.items():
        # The engine has no times before 1970 and after 2262; the top directory has that of its unpacking.
        if path == b"/" or path.startswith(b"/made/times/"):
            found[path] = {**entry, "mtime_ns": built.entries[path]["mtime_ns"]}
    assert differences(built, found) == []
