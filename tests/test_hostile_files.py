# SPDX-License-Identifier: Apache-2.0
"""Files that cross from the guest to the host, made to hurt: archives, lists, names, disk images.

What tests/test_staging.py, test_unpacking.py, test_outputs.py, test_image_cache.py, test_drive.py and
test_formats.py have of this is
not here again.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import resource
import runpy
import stat
import sys
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import make_element, make_tiny_os, skip_without, virt_dib
from test_drive import ext4_drive, patch, refusal
from test_formats import DISK_FORMATS, asking, make_squashfs
from test_sandbox import staged
from test_unpacking import archive_of, member
from virt_dib import drive, formats, layout, tools
from virt_dib.boot import boot_test
from virt_dib.disk_images import HEAD_BYTES, format_by
from virt_dib.errors import ApplianceError, ElementError, ToolError, UsageError
from virt_dib.files import remove_tree
from virt_dib.image_cache import ImageCache
from virt_dib.sandbox import Sandbox, Settings, open_sandbox
from virt_dib.staging import Staging
from virt_dib.unpacking import copy_out

MIB = 1 << 20


# ---- archives that make the reader large ----


def header(kind: bytes, size_bytes: int) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size_bytes
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


def record(key: str, value: str) -> bytes:
    """One line of a pax header."""
    rest = f" {key}={value}\n".encode("utf-8", "surrogatepass")
    length = len(rest)
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def long_header(kind: bytes) -> Iterator[bytes | int]:
    yield header(kind, 256 * MIB)
    yield 256 * MIB


def sparse_map() -> Iterator[bytes | int]:
    """What tarfile takes for a list of 10^9 pieces of a file, and reads in blocks."""
    said = record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0")
    yield header(tarfile.XHDTYPE, len(said))
    yield padded(said)
    numbers = b"1000000000\n" + b"0\n" * (MIB)
    yield header(tarfile.REGTYPE, len(numbers))
    yield padded(numbers)


def many_headers() -> Iterator[bytes | int]:
    """As many as tarfile takes before one file."""
    said = b"".join(record(f"k{number}", "v") for number in range(4000))
    for _ in range(20):
        yield header(tarfile.XHDTYPE, len(said))
        yield padded(said)


def header_for_all() -> Iterator[bytes | int]:
    """Each file that follows gets a copy of it."""
    said = b"".join(record(f"k{number}", "v") for number in range(300))
    yield header(tarfile.XGLTYPE, len(said))
    yield padded(said)
    for _ in range(300):
        yield header(tarfile.DIRTYPE, 0)


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param(lambda: long_header(tarfile.XHDTYPE), id="a pax header"),
        pytest.param(lambda: long_header(tarfile.GNUTYPE_LONGNAME), id="a long name"),
        pytest.param(lambda: long_header(tarfile.GNUTYPE_LONGLINK), id="a long link"),
        pytest.param(sparse_map, id="a list of pieces"),
        pytest.param(many_headers, id="many headers"),
        pytest.param(header_for_all, id="a header for all"),
    ],
)
def test_no_header_makes_the_reader_large(tmp_path: Path, pieces: Callable[[], Iterator[bytes | int]]) -> None:
    with (tmp_path / "out.tar").open("wb") as stream:
        for piece in pieces():
            if isinstance(piece, int):
                stream.truncate(stream.tell() + piece)
                stream.seek(0, 2)
            else:
                stream.write(piece)
        stream.write(bytes(2 * tarfile.BLOCKSIZE))
    (tmp_path / "target").mkdir()
    tracemalloc.start()
    try:
        with pytest.raises(ApplianceError, match="the guest left is damaged: a header is"):
            copy_out(tmp_path / "out.tar", tmp_path / "target", limit_bytes=1 << 40)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


def test_members_are_forgotten_when_they_are_written(tmp_path: Path) -> None:
    """Each with as much about it as may be."""
    said = record("comment", "c" * 60_000)
    members = [(member("h", tarfile.XHDTYPE, said), member(f"{number}")) for number in range(400)]
    archive_of(tmp_path / "out.tar", *(one for both in members for one in both))
    (tmp_path / "target").mkdir()
    tracemalloc.start()
    try:
        assert copy_out(tmp_path / "out.tar", tmp_path / "target", limit_bytes=0).files == 400
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.REGTYPE])
def test_long_names_are_not_kept(tmp_path: Path, kind: bytes) -> None:
    """Of any number of files; one may have half as many directories in its name as it has bytes."""
    directory = "d/" * 900
    archive_of(tmp_path / "out.tar", *(member(f"{directory}{number}", kind, link="/") for number in range(1500)))
    (tmp_path / "target").mkdir()
    tracemalloc.start()
    try:
        copied = copy_out(tmp_path / "out.tar", tmp_path / "target", limit_bytes=0)
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()
        remove_tree(tmp_path / "target")
    left_out = 1500 if kind == tarfile.SYMTYPE else 0
    assert len(copied.left_out) + copied.more_left_out == left_out
    assert len(copied.left_out) <= 20


# ---- disks that look like other images ----

DISK_BYTES = 80 * MIB


def qemu_img(*words: str | Path) -> str:
    return tools.run(["qemu-img", *words], doing="running qemu-img").stdout


def vmdk_text(secret: Path, before: str = "# Disk DescriptorFile\n") -> bytes:
    size = secret.stat().st_size // 512
    return (
        f'{before}version=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        f'RW {size} FLAT "{secret}" 0\nddb.adapterType = "ide"\nddb.geometry.cylinders = "1"\n'
        'ddb.geometry.heads = "1"\nddb.geometry.sectors = "1"\n'
    ).encode()


def image_head(tmp_path: Path, image_format: str, *options: str | Path) -> bytes:
    """The beginning of an image that qemu-img makes."""
    path = tmp_path / f"made.{image_format}"
    qemu_img("create", "-q", "-f", image_format, *options, path, *([] if "-b" in options else ["64M"]))
    return path.read_bytes()[: 2 * MIB]


Head = Callable[[Path, Path], bytes]
HEADS: dict[str, Head] = {
    "a qcow2 with a backing file": lambda place, secret: image_head(place, "qcow2", "-b", secret, "-F", "raw"),
    "a qcow2 with a data file": lambda place, _: image_head(place, "qcow2", "-o", f"data_file={place}/data"),
    "a qcow2 that stands alone": lambda place, _: image_head(place, "qcow2"),
    "a vmdk of another file": lambda _, secret: vmdk_text(secret),
    "a vmdk without a comment": lambda _, secret: vmdk_text(secret, ""),
    "a vmdk with another comment": lambda _, secret: vmdk_text(secret, "# x\n  \n#y\n"),
    "a vmdk in binary": lambda place, _: image_head(place, "vmdk"),
    "a qed with a backing file": lambda place, secret: image_head(place, "qed", "-b", secret, "-F", "raw"),
    "a vdi": lambda place, _: image_head(place, "vdi"),
    "a vhdx": lambda place, _: image_head(place, "vhdx"),
    "a vhd": lambda place, _: image_head(place, "vpc"),
    "a parallels": lambda place, _: image_head(place, "parallels"),
}
heads = pytest.mark.parametrize("head", HEADS)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(b"secret!!" * (MIB // 8))
    return path


def disk_with(path: Path, head: bytes, size_bytes: int = DISK_BYTES) -> Path:
    path.write_bytes(head + b"mark" * 1024)
    os.truncate(path, size_bytes)
    return path


def guessed(disk: Path) -> str | None:
    """What qemu-img takes *disk* for, if it is not told; None: it does not take it."""
    result = tools.run(["qemu-img", "info", "--output=json", disk], doing="letting qemu-img guess", check=False)
    return str(json.loads(result.stdout)["format"]) if result.exit_status == 0 else None


@heads
def test_no_disk_is_written_that_a_reader_of_raw_images_would_take_for_another(
    head: str, tmp_path: Path, secret: Path
) -> None:
    disk = disk_with(tmp_path / "disk", HEADS[head](tmp_path, secret))
    # What this is about: who lets qemu-img guess gets something else.
    assert guessed(disk) != "raw"
    for name in DISK_FORMATS:
        (output,) = formats.select([name])
        target = tmp_path / f"x.{name}"
        with pytest.raises(ElementError, match="the elements have made a disk that begins like a "):
            formats.write(asking(), formats.Sources(disk=disk, archive=None), {name: (target, output)}, tmp_path)
        assert not target.exists()


@pytest.mark.parametrize("name", DISK_FORMATS)
def test_a_disk_is_a_disk_whatever_it_begins_like(name: str, tmp_path: Path) -> None:
    """Like LUKS, the one other kind that may be, of which qemu-img would want the key."""
    disk = disk_with(tmp_path / "disk", b"LUKS\xba\xbe\0\1", 4 * MIB)
    assert guessed(disk) != "raw"
    (output,) = formats.select([name])
    assert isinstance(output, formats.DiskFormat)
    target = tmp_path / f"x.{name}"
    formats.write(asking(), formats.Sources(disk=disk, archive=None), {name: (target, output)}, tmp_path)
    assert formats.virtual_size_bytes(target, output) == 4 * MIB
    back = tmp_path / "back"
    qemu_img("convert", "-f", output.qemu_name, "-O", "raw", target, back)
    assert back.read_bytes() == disk.read_bytes()


@heads
def test_a_raw_drive_stays_one_whatever_elements_write_into_it(head: str, tmp_path: Path, secret: Path) -> None:
    path = ext4_drive(tmp_path / "drive")
    try:
        os.setxattr(path, "user.virt-dib", b"")
    except OSError:
        pytest.skip("no attributes of users here")
    drive.note_format(drive.inspect(path, None))
    data = HEADS[head](tmp_path, secret)
    patch(path, 0, data)
    with pytest.raises(UsageError) as caught:
        drive.inspect(path, None)
    (problem,) = caught.value.problems
    assert f"it was raw when a build used it last, and looks like {format_by(data[:HEAD_BYTES])} now" in problem.message
    # To convert it would be to read what it names.
    assert problem.hint
    assert "convert" not in problem.hint
    assert drive.inspect(path, "raw") == drive.Drive(path, "raw")


@heads
def test_a_drive_of_which_nothing_is_known_is_not_to_be_converted_unseen(
    head: str, tmp_path: Path, secret: Path
) -> None:
    path = disk_with(tmp_path / "drive", HEADS[head](tmp_path, secret))
    if head == "a qcow2 that stands alone":
        # There is nothing in it to be afraid of.
        assert drive.inspect(path, None) == drive.Drive(path, "qcow2")
        return
    with pytest.raises(UsageError) as caught:
        drive.inspect(path, None)
    (problem,) = caught.value.problems
    assert problem.hint
    assert "convert" not in problem.hint or "trust" in problem.hint
    assert drive.inspect(path, "raw") == drive.Drive(path, "raw")


@pytest.mark.parametrize(
    "backing",
    [
        "/etc/shadow",
        '{json}:{{"driver":"raw","file":{{"driver":"file","filename":"{secret}"}}}}',
        '{json}:{{"driver":"qcow2","file":{{"driver":"file","filename":"{chain}"}}}}',
        "nbd://localhost:1/x",
        "fat:rw:/etc",
        "{chain}",
        "host_device:/dev/vda",
        "a",
    ],
)
def test_a_drive_may_not_lead_elsewhere_however_that_is_said(backing: str, tmp_path: Path, secret: Path) -> None:
    chain = tmp_path / "chain.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", chain)
    path = tmp_path / "drive"
    name = backing.format(json="json", secret=secret, chain=chain)
    qemu_img(
        "create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "qcow2" if "chain" in backing else "raw", path, "80M"
    )
    for wanted in (None, "qcow2"):
        assert refusal(path, wanted) == "it has a backing file"
        with pytest.raises(UsageError, match="not complete without a backing file"):
            boot_test(path, image_format=wanted, accelerate=False)


# ---- archives of a tree ----


def tree_archive(path: Path, *pieces: bytes | int) -> Path:
    """One with its top directory, and then *pieces*; a number stands for so many NULs, which take no space."""
    top = tarfile.TarInfo("./")
    top.type, top.mode = tarfile.DIRTYPE, 0o755
    with path.open("wb") as stream:
        stream.write(top.tobuf(tarfile.GNU_FORMAT))
        for piece in (*pieces, bytes(2 * tarfile.BLOCKSIZE)):
            if isinstance(piece, int):
                stream.truncate(stream.tell() + piece)
                stream.seek(0, 2)
            else:
                stream.write(piece)
    return path


def with_pax(said: bytes, name: str = "a", kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(f"./{name}")
    info.type, info.linkname = kind, link
    return header(tarfile.XHDTYPE, len(said)) + padded(said) + info.tobuf(tarfile.GNU_FORMAT)


HEADER_BYTES = 2 << 30
LONG_HEADER: list[bytes | int] = [header(tarfile.XHDTYPE, HEADER_BYTES), HEADER_BYTES]
TREES: dict[str, list[bytes | int]] = {
    "a long header": LONG_HEADER,
    "a header for all": [header(tarfile.XGLTYPE, 512), padded(record("a", "b")), header(tarfile.DIRTYPE, 0)],
    "many headers": [header(tarfile.XHDTYPE, 512) + padded(record("a", "b"))] * 3000,
    "no date": [with_pax(record("mtime", "nan"))],
    "a number that is none": [with_pax(record("uid", "x") + record("size", "-5"))],
    "a piece too many": [with_pax(record("GNU.sparse.map", "1,2,3"))],
    "an unknown character set": [with_pax(record("hdrcharset", "BINARY") + record("path", "\ud800"))],
    "a file as a directory": [with_pax(b"", "a"), with_pax(b"", "a/b")],
    "a link to nothing": [with_pax(b"", "a", tarfile.LNKTYPE, "absent")],
    "a link to itself": [with_pax(b"", "a", tarfile.LNKTYPE, "a")],
    "a name with a NUL": [with_pax(record("path", "./a\0b"))],
    "a type of its own": [with_pax(b"", "a", b"?")],
    "a name twice": [with_pax(b"", "a")] * 2,
    "a name twice in other words": [with_pax(b"", "a/b"), with_pax(b"", "/a//b")],
    "a name twice, once from the root": [with_pax(b"", "a"), with_pax(record("path", "/a"))],
    "a name twice, once with a NUL": [with_pax(b"", "a"), with_pax(record("path", "./a\0b"))],
    "a top directory twice": [with_pax(b"", "", tarfile.DIRTYPE)],
}  # fmt: skip
HURTS_NOBODY = {
    "a piece too many",
    "an unknown character set",
    "a name with a NUL",
    "a type of its own",
}
"""Where there is something to be made of it, that may be."""


@pytest.mark.parametrize("kind", TREES)
def test_a_hostile_archive_of_a_tree_is_one_error(kind: str, tmp_path: Path) -> None:
    path = tree_archive(tmp_path / "tar", *TREES[kind])
    if kind in HURTS_NOBODY:
        make_squashfs(path)
    else:
        with pytest.raises(ToolError, match=r"^writing 'x\.squashfs': 'bwrap' failed with exit status 1: ") as caught:
            make_squashfs(path)
        assert not re.search("Traceback|File |Error: ", str(caught.value))
        assert ("a name is there twice: " in str(caught.value)) == ("twice" in kind)


def test_there_are_not_more_names_in_a_tree_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are remembered, for sqfstar hangs when one comes some 12,000 times."""
    program = runpy.run_path(str(layout.guest_script("make-squashfs.py")))
    monkeypatch.setitem(program["main"].__globals__, "MOST_MEMBERS", 2)
    names = program["Names"]()
    names.add("./a")
    names.add("./b")
    with pytest.raises(tarfile.ReadError, match="there are more than 2 files in it"):
        names.add("./c")


def test_other_formats_of_a_tree_take_any_bytes_as_they_are(tmp_path: Path) -> None:
    path = tree_archive(tmp_path / "tar", *TREES["a link to nothing"], b"\xff" * 100_000)
    names = ("tar", "tgz", "oci")
    targets = {name: (tmp_path / f"x.{name}", formats.select([name])[0]) for name in names}
    formats.write(asking(), formats.Sources(disk=path, archive=path), targets, tmp_path)
    assert (tmp_path / "x.tar").read_bytes() == path.read_bytes()
    assert gzip.decompress((tmp_path / "x.tgz").read_bytes()) == path.read_bytes()
    with tarfile.open(tmp_path / "x.oci") as made:
        assert all(re.fullmatch(r"oci-layout|index\.json|blobs/sha256/[0-9a-f]{64}", name) for name in made.getnames())


def read_by(script: str, archive: Path, *arguments: Path) -> tools.Result:
    """What a program of ours that reads archives says, in the directory of *archive*."""
    text = 'cd "$1" && shift && "$@" || echo "status $?"'
    python: list[str | Path] = [sys.executable, "-I", "-S", layout.guest_script(script)]
    command = ["sh", "-c", text, "sh", archive.parent, *python, *arguments]
    return tools.run_together({"x": tools.Command(words=command, stdin=archive)})["x"]


def test_what_is_gone_from_a_tree_is_found(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    path = tree_archive(tmp_path / "tar", with_pax(b"", "gone"), with_pax(b"", "there"), with_pax(b"", "x\n"))
    assert read_by("host-removed.py", path).stdout == "./gone\0./x\n\0"


@pytest.mark.parametrize("script", ["host-removed.py", "make-squashfs.py"])
def test_no_header_in_a_tree_takes_the_memory_of_the_host(script: str, tmp_path: Path) -> None:
    path = tree_archive(tmp_path / "tar", *LONG_HEADER)
    before_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert read_by(script, path, tmp_path / "out").stdout == "status 1\n"
    after_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert after_kib < max(before_kib + 1, HEADER_BYTES >> 10)


# ---- names that mke2fs cannot take ----


def nested(top: Path, length: int) -> str:
    """Directories in *top*, the innermost with a path of that many bytes from there on."""
    top.mkdir(parents=True, exist_ok=True)
    path = "/".join(["d" * 99] * (length // 100))
    rest = length - len(path) - 1
    path = f"{path}/{'d' * rest}" if rest > 0 else path[:length]
    here = os.open(top, os.O_RDONLY)
    for name in path.split("/"):
        os.mkdir(name, dir_fd=here)
        here, before = os.open(name, os.O_RDONLY, dir_fd=here), here
        os.close(before)
    os.close(here)
    return path


@pytest.mark.parametrize("length", [999, 1001, 1019, 2039, 2499])
def test_names_that_make_mke2fs_write_beyond_its_memory(length: int, tmp_path: Path) -> None:
    """Of 1.47.0 these are 255 bytes, 510 and so on with the '/' before them; at 2040 the C library notices."""
    content = Staging(tmp_path / "s")
    path = nested(content.directory, length)
    assert len(path) == length
    if length > 1000:
        with pytest.raises(ElementError, match=r"making the build disk: 'd+/.*' is longer than 1000 bytes"):
            content.make_disk(tmp_path / "disk")
    else:
        content.make_disk(tmp_path / "disk")
    assert (tmp_path / "disk").exists() == (length <= 1000)


def test_names_in_the_image_cache_that_no_build_can_take(tmp_path: Path) -> None:
    """What a hostile build has left there does not keep the next one from being built."""
    nested(tmp_path / "cache/hostile", 2006)
    (tmp_path / "cache/good").write_text("good")
    content = Staging(tmp_path / "s")
    ImageCache(tmp_path / "cache", tmp_path).copy_to(content.directory / "home/.cache/image-create")
    content.make_disk(tmp_path / "disk")
    assert (content.directory / "home/.cache/image-create/good").read_text() == "good"
    remove_tree(tmp_path / "cache")


# ---- what a guest leaves, from a sandbox to the user's directory ----


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    skip_without("sandbox")
    directory = staged(tmp_path_factory.mktemp("box"))
    with open_sandbox(Settings(directory=directory, network=False)) as running:
        yield running


def leave(box: Sandbox, text: str) -> None:
    """Have an element run *text* in its working directory, which was empty."""
    script = f"rm -rf /dib/out && mkdir /dib/out && cd /dib/out || exit\n{text}"
    result = box.run(["/bin/bash", "-c", script], {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, "/")
    assert result.exit_status == 0, result.tail


ODD_NAMES = [
    b"latin-\xe9", "utf-8-\u65e5\u672c".encode(), "\U0001f4a9".encode(), b"\xff\xfe", b"two\nlines",
    b"\x1b]52;c;eA==\x07", b"-rf", b"--", b"$(touch x)", b"`id`", b"a'b\"c", b"*", b"%s%n", b"blank ", b" blank",
    b"\t", b"...", b".hidden", b"x" * 255, "\u202egpj.exe".encode(), b"~", b"a\\b", b"\x7f", b"CON", b"a:b", b"NAME.d",
]  # fmt: skip


@pytest.mark.sandbox
def test_files_of_any_name_and_kind_become_plain_files_of_the_users(box: Sandbox, tmp_path: Path) -> None:
    octal = ["".join(f"\\{byte:03o}" for byte in name) for name in ODD_NAMES]
    leave(
        box,
        f"""
        for name in {" ".join(f"$'{name}'" for name in octal)}; do echo text >"./$name"; done
        ln -s /etc/passwd link-to-file; ln -s / link-to-all; ln -s ../../.. link-up; ln -s loop loop; ln -s '' n || :
        echo linked >original; ln original another; ln -s original soft; ln soft soft-another
        mkfifo fifo; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("socket")'
        mknod device c 1 3; mknod disk b 8 0
        echo setuid >setuid; chmod 6755 setuid; mkdir -m 7777 sticky; echo x >sticky/x
        echo closed >closed; chmod 0 closed; mkdir dark; echo dark >dark/x; chmod 0 dark
        setfattr -n user.x -v y closed 2>/dev/null; setcap cap_sys_admin+ep setuid 2>/dev/null
        d=deep; for n in $(seq 100); do d=$d/d; done; mkdir -p $d; echo deep >$d/x
        touch -d 1901-01-01 original; truncate -s 10M holes
        """,
    )
    box.archive("/dib/out", tmp_path / "out.tar", limit_bytes=1 << 30)
    target = tmp_path / "target"
    target.mkdir()
    copied = copy_out(tmp_path / "out.tar", target, limit_bytes=1 << 30)
    links = {"link-to-file", "link-to-all", "link-up", "loop", "soft", "soft-another", "fifo"}
    assert {name.removeprefix("./") for name in copied.left_out} == links
    made = {os.fsencode(path.relative_to(target)): path for path in target.rglob("*")}
    assert set(ODD_NAMES) <= set(made)
    assert b"deep" + b"/d" * 100 + b"/x" in made
    assert made[b"another"].read_text() == "linked\n"
    # The nodes are none in the sandbox either, and a socket is nothing to tar.
    assert (made[b"device"].read_bytes(), made[b"disk"].read_bytes(), b"socket" in made) == (b"", b"", False)
    for path in made.values():
        state = path.lstat()
        assert stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode)
        assert state.st_uid == os.geteuid()
        assert state.st_mode & 0o7000 == 0
        assert state.st_mode & (0o700 if stat.S_ISDIR(state.st_mode) else 0o600) >= 0o600
        assert state.st_nlink == 1 or stat.S_ISDIR(state.st_mode)
        assert os.listxattr(path) == []


@pytest.mark.sandbox
@pytest.mark.parametrize(
    "text",
    ["truncate -s 15T huge", "truncate -s 600K 1; truncate -s 600K 2", "head -c 2M /dev/urandom >a; ln a b"],
)
def test_what_is_larger_than_it_may_be_is_not_copied(box: Sandbox, tmp_path: Path, text: str) -> None:
    """A file of terabytes takes no space in the guest."""
    leave(box, text)
    with pytest.raises(ApplianceError, match=f"copying '/dib/out' out of the sandbox: it holds more than {MIB} bytes"):
        box.archive("/dib/out", tmp_path / "out.tar", limit_bytes=MIB)
    assert (tmp_path / "out.tar").stat().st_size <= MIB


@pytest.mark.sandbox
def test_a_sandbox_whose_programs_are_the_guests_gives_what_is_an_error(box: Sandbox, tmp_path: Path) -> None:
    """Root in it can put another program in the place of tar, which then has the file on the host."""
    evil = r"""#!/bin/bash
        printf 'not an archive' >/proc/self/fd/0; truncate -s 1T /proc/self/fd/0; exit 0"""
    leave(box, f"cat >/run/tar <<'END'\n{evil}\nEND\nchmod 755 /run/tar; mount --bind /run/tar /usr/bin/tar")
    target = tmp_path / "target"
    target.mkdir()

    def copy() -> None:
        box.archive("/dib/out", tmp_path / "out.tar", limit_bytes=MIB)
        copy_out(tmp_path / "out.tar", target, limit_bytes=MIB)

    try:
        with pytest.raises(ApplianceError, match=r"it holds more than|the archive that the guest left is damaged"):
            copy()
        assert (tmp_path / "out.tar").stat().st_size <= MIB
    finally:
        leave(box, "umount /usr/bin/tar")


@contextlib.contextmanager
def replaced(box: Sandbox, program: str, text: str) -> Iterator[None]:
    """Have *text* run in the place of *program*, whoever calls that."""
    leave(box, f"cat >/run/evil <<'END'\n{text}\nEND\nchmod 755 /run/evil; mount --bind /run/evil {program}")
    try:
        yield
    finally:
        leave(box, f"umount {program}")


@pytest.mark.sandbox
@pytest.mark.parametrize("status", [0, 1])
def test_a_sandbox_whose_head_is_the_guests_gives_no_more_than_was_asked_for(box: Sandbox, status: int) -> None:
    """More than would fit into what a pipe holds, and then an end, or this test would have none without the limit."""
    noise = f"#!/bin/bash\ntr '\\0' x </dev/zero | dd bs=1M count=64 iflag=fullblock status=none; exit {status}"
    with replaced(box, "/usr/bin/head", noise):
        with pytest.raises(
            ApplianceError, match=r"^reading '/dib/out/x' in the sandbox: more comes than the 1048576 b"
        ):
            box.read("/dib/out/x")
        with pytest.raises(ApplianceError, match=r": more comes than the 10 bytes that were asked for$") as caught:
            box.read("/dib/out/x", limit_bytes=10)
    assert "'head'" in (caught.value.problems[0].hint or "")
    leave(box, "echo good >x")
    assert box.read("/dib/out/x") == b"good\n"


@pytest.mark.sandbox
def test_what_a_head_of_the_guests_complains_of_is_short_and_harmless(box: Sandbox) -> None:
    long = "#!/bin/bash\nprintf '\\e]0;x\\a%090000d' 1; exit 1"
    said = pytest.raises(ApplianceError, match=r"^reading '/dib/out/x' in the sandbox: 0+1$")
    with replaced(box, "/usr/bin/head", long), said as caught:
        box.read("/dib/out/x")
    assert len(str(caught.value)) < 10_000


@pytest.mark.sandbox
def test_other_programs_that_are_the_guests_say_nothing_that_is_kept(box: Sandbox) -> None:
    noise = "#!/bin/bash\ntr '\\0' x </dev/zero | dd bs=1M count=64 iflag=fullblock status=none; exit 1"
    for program in ("/usr/bin/test", "/usr/bin/cat"):
        # What writes this program is cat.
        with replaced(box, program, noise):
            tracemalloc.start()
            try:
                if program == "/usr/bin/test":
                    assert not box.is_directory("/dib/out")
                else:
                    with pytest.raises(ApplianceError, match="writing '/dib/out/x' in the sandbox: failed with"):
                        box.write("/dib/out/x", b"x")
                assert tracemalloc.get_traced_memory()[1] < 16 * MIB
            finally:
                tracemalloc.stop()


@pytest.mark.sandbox
def test_an_archive_of_a_bash_of_the_guests_is_not_longer_than_it_may_be(box: Sandbox, tmp_path: Path) -> None:
    """It is bash that keeps to the limit."""
    evil = r"""#!/run/real
        case $(tr '\0' ' ' <"$1") in *ulimit*) truncate -s 1T /proc/self/fd/0;; *) exec /run/real "$@";; esac"""
    leave(box, "cp /bin/bash /run/real")
    with replaced(box, "/bin/bash", evil), pytest.raises(ApplianceError, match="it holds more than"):
        box.archive("/dib/out", tmp_path / "out.tar", limit_bytes=MIB)


@pytest.mark.appliance
def test_a_file_of_an_exabyte_in_the_directory_of_a_whole_build(tmp_path: Path) -> None:
    """Where the tree of the sandbox is in memory, it can be made; elsewhere few file systems take it."""
    skip_without("sandbox")
    make_tiny_os(tmp_path / "elements")
    huge = "#!/bin/bash\nset -eu\ntruncate -s 1E huge\nstat -c 'made: %s' huge\n"
    make_element(tmp_path / "elements", "huge", {"root.d/50-huge": huge})
    out = tmp_path / "out"
    (out / "x.d").mkdir(parents=True)
    (out / "x.d/earlier").touch()
    words: list[str | Path] = [
        "--name", "x", "--formats", "raw", "--size", "1G", "--no-network", "--skip-base", "--isolation", "sandbox",
        "-p", tmp_path / "elements", "tiny-os", "huge",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        run = virt_dib(words, cwd=out, environment={"TMPDIR": memory})
        left = os.listdir(memory)
    assert f"made: {1 << 60}\n" in run.stdout
    assert run.exit_status == 1
    (error,) = [line for line in run.stderr.splitlines() if line.startswith("virt-dib: error: ")]
    said = f"a file that is too long for its file system: '/out/huge' has {1 << 60} bytes"
    assert error == f"virt-dib: error: the guest left {said}"
    assert left == []
    assert sorted(os.listdir(out)) == ["x.d", "x.log"]
    assert os.listdir(out / "x.d") == ["earlier"]
