# SPDX-License-Identifier: Apache-2.0
"""virt_dib.unpacking: archives that a guest leaves, all of them hostile."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from test_staging import run_python
from virt_dib import tools, unpacking
from virt_dib.errors import ApplianceError
from virt_dib.files import remove_tree
from virt_dib.unpacking import copy_out

LIMIT_BYTES = 1 << 20


def member(
    name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data), link
    return info, data


def archive_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def unpack(tmp_path: Path) -> Iterator[Callable[..., unpacking.CopiedOut]]:
    """Copies an archive of *members* into ``target``."""
    target = tmp_path / "target"

    def copy(*members: tuple[tarfile.TarInfo, bytes]) -> unpacking.CopiedOut:
        target.mkdir()
        return copy_out(archive_of(tmp_path / "out.tar", *members), target, limit_bytes=LIMIT_BYTES)

    yield copy
    # Some are deeper than the stack of pytest's own cleaning.
    remove_tree(target)


Unpack = Callable[..., unpacking.CopiedOut]


def test_the_archive_of_a_directory_by_tar(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    target.mkdir()
    (source / "sub/file").write_text("text")
    (source / "setuid").write_text("x")
    (source / "setuid").chmod(0o4755)
    os.link(source / "sub/file", source / "zz-hard")
    (source / "soft").symlink_to("/etc/passwd")
    os.mkfifo(source / "fifo")
    (source / "closed").mkdir(mode=0o500)
    tar = tools.require("tar", purpose="run the tests", package="tar")
    # In this order, for a hard link comes after what it is a link to.
    names = ["./sub", "./zz-hard", "./setuid", "./soft", "./fifo", "./closed"]
    tools.run([tar, "-C", source, "-cf", tmp_path / "out.tar", *names], doing="running tar")
    result = copy_out(tmp_path / "out.tar", target, limit_bytes=9)
    assert (result.files, set(result.left_out)) == (3, {"./soft", "./fifo"})
    files = {path.relative_to(target).as_posix() for path in target.rglob("*")}
    assert files == {"sub", "sub/file", "zz-hard", "setuid", "closed"}
    assert (target / "zz-hard").read_text() == "text"
    assert (target / "zz-hard").stat().st_nlink == 1
    assert (target / "setuid").stat().st_mode & 0o7111 == 0


def test_times_in_a_cache_are_those_of_its_files(tmp_path: Path) -> None:
    first, second = member("d/a", data=b"x"), member("d/b", tarfile.LNKTYPE, link="d/a")
    for info, _ in (first, second):
        info.mtime = 1_000_000_000
    copy_out(archive_of(tmp_path / "out.tar", first, second), tmp_path, limit_bytes=9, as_cache=True)
    assert [(tmp_path / "d" / name).stat().st_mtime for name in ("a", "b")] == [1_000_000_000] * 2


def test_an_empty_directory(unpack: Unpack) -> None:
    assert unpack(member("./", tarfile.DIRTYPE)) == unpacking.CopiedOut(files=0, left_out=())


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "a/..", "//x"])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE])
def test_names_that_lead_out(unpack: Unpack, name: str, kind: bytes) -> None:
    with pytest.raises(ApplianceError, match="which is not taken over"):
        unpack(member(name, kind))


@pytest.mark.parametrize(
    "members",
    [
        pytest.param([member("a"), member("a")], id="twice"),
        pytest.param([member("a"), member("./a")], id="twice in other words"),
        pytest.param([member("a"), member("a/b")], id="a file as a directory"),
        pytest.param([member("a"), member("a", tarfile.DIRTYPE)], id="a file and a directory"),
        pytest.param([member("a/b"), member("a")], id="a directory and a file"),
        pytest.param([member("a"), member("a", tarfile.LNKTYPE, link="a")], id="a link to itself"),
        pytest.param([member("x" * 300)], id="a name too long"),
        pytest.param([member("d/" * 2500 + "x")], id="a path too long"),
        pytest.param([member("d/" * 2500 + "x", tarfile.SYMTYPE)], id="the path of a link too long"),
        pytest.param([member("x", tarfile.LNKTYPE, link="d/" * 2500)], id="a path too long to link to"),
    ],
)
def test_members_that_cannot_be(unpack: Unpack, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with pytest.raises(ApplianceError, match="taking over what the guest left"):
        unpack(*members)


def test_links_and_devices_are_left_out(unpack: Unpack, tmp_path: Path) -> None:
    kinds = [tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.LNKTYPE, b"V"]
    members = [member(f"{number}\x1b", kind, link="absent") for number, kind in enumerate(kinds)]
    result = unpack(member("soft", tarfile.SYMTYPE, link="/etc"), *members, member("soft-2/file", data=b"x"))
    assert result == unpacking.CopiedOut(files=1, left_out=("soft", *(f"{number}\x1b" for number in range(6))))
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["soft-2"]


def test_more_of_them_than_anybody_reads_are_counted(unpack: Unpack) -> None:
    result = unpack(*(member(f"{number}", tarfile.SYMTYPE, link="/etc") for number in range(50)))
    assert result == unpacking.CopiedOut(files=0, left_out=tuple(map(str, range(20))), more_left_out=30)


def test_a_file_below_a_link_is_a_file_below_a_directory(unpack: Unpack, tmp_path: Path) -> None:
    result = unpack(member("soft", tarfile.SYMTYPE, link=str(tmp_path)), member("soft/file", data=b"x"))
    assert result.files == 1
    assert (tmp_path / "target/soft/file").read_bytes() == b"x"
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("times", [1, 2])
def test_more_bytes_than_the_limit(unpack: Unpack, times: int) -> None:
    data = bytes(LIMIT_BYTES // times + 1)
    with pytest.raises(ApplianceError, match=f"more than {LIMIT_BYTES} bytes"):
        unpack(*(member(str(number), data=data) for number in range(times)))


def test_hard_links_count(unpack: Unpack) -> None:
    data = bytes(LIMIT_BYTES // 2 + 1)
    with pytest.raises(ApplianceError, match=f"more than {LIMIT_BYTES} bytes"):
        unpack(member("a", data=data), member("b", tarfile.LNKTYPE, link="./a"))


@pytest.mark.parametrize(
    ("count", "name", "kind"),
    [
        pytest.param(101, "./", tarfile.DIRTYPE, id="one directory"),
        pytest.param(101, "{}", tarfile.DIRTYPE, id="directories"),
        pytest.param(101, "{}", tarfile.SYMTYPE, id="links"),
        pytest.param(51, "{0}/{0}", tarfile.REGTYPE, id="directories not named"),
        pytest.param(1, "d/" * 100, tarfile.DIRTYPE, id="deep"),
    ],
)
def test_more_members_than_the_limit(
    unpack: Unpack, monkeypatch: pytest.MonkeyPatch, count: int, name: str, kind: bytes
) -> None:
    monkeypatch.setattr(unpacking, "MOST_MEMBERS", 100 if count > 1 else 99)
    with pytest.raises(ApplianceError, match="files in its output directory"):
        unpack(*(member(name.format(number), kind) for number in range(count)))


def test_as_many_members_as_the_limit(unpack: Unpack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "MOST_MEMBERS", 100)
    assert unpack(*(member(f"{number}/file") for number in range(50))).files == 50


def test_archives_that_are_damaged(tmp_path: Path) -> None:
    good = archive_of(tmp_path / "good.tar", member("a", data=bytes(1000)), member("b", data=b"x")).read_bytes()
    negative = bytearray(good)
    negative[124:136] = b"\xff" * 12
    unsummed = bytes(negative[:148]) + b" " * 8 + bytes(negative[156:512])
    negative[148:156] = b"%06o\0 " % sum(unsummed)
    pax = archive_of(tmp_path / "pax.tar", member("h", tarfile.XHDTYPE, b"19 size=-1000000000\n"), member("a"))
    damaged = {
        "nothing": b"",
        "junk": os.urandom(2048),
        "zeros, cut": bytes(100),
        "a negative size": bytes(negative),
        "a negative size of pax": pax.read_bytes(),
        "cut in a file": good[:700],
        "cut in a header": good[: 512 + 1024 + 100],
        "cut after a file": good[: 512 + 1024],
        "a second header of junk": good[: 512 + 1024] + b"\xff" * 512 + good[512 + 1024 + 512 :],
        "headers without end": archive_of(
            tmp_path / "x.tar", *(member("h", tarfile.XHDTYPE, b"9 a=b\n") for _ in range(3000))
        ).read_bytes(),
    }
    for what, data in damaged.items():
        (tmp_path / "out.tar").write_bytes(data)
        target = tmp_path / what
        target.mkdir()
        with pytest.raises(ApplianceError, match="the guest left"):
            copy_out(tmp_path / "out.tar", target, limit_bytes=LIMIT_BYTES)


def test_every_byte_of_a_header_changed(tmp_path: Path) -> None:
    """Whatever a header holds: files in the target, or our error."""
    good = archive_of(tmp_path / "x.tar", member("a/b", data=b"text"), member("c", tarfile.LNKTYPE, link="a/b"))
    data = good.read_bytes()
    outcomes = set()
    for position in range(512):
        changed = bytearray(data)
        changed[position] = changed[position] ^ 0xFF
        header = bytes(changed[:148]) + b" " * 8 + bytes(changed[156:512])
        changed[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "out.tar").write_bytes(changed)
        (tmp_path / "target").mkdir()
        try:
            copy_out(tmp_path / "out.tar", tmp_path / "target", limit_bytes=LIMIT_BYTES)
            outcomes.add("copied")
        except ApplianceError:
            outcomes.add("refused")
        shutil.rmtree(tmp_path / "target")
    assert outcomes == {"copied", "refused"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.tar", "x.tar"]


EXABYTE = 1 << 60
SPARSE = """
mount -t tmpfs none "$1" && cd "$1" && : >big && truncate -s 1E big || exit
shift
exec "$@"
"""


@pytest.mark.parametrize(
    "options",
    [["--format=gnu"], *(["--format=posix", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0"))],
    ids=" ".join,
)
@pytest.mark.parametrize("limit_bytes", [LIMIT_BYTES, 2 * EXABYTE])
def test_a_file_of_an_exabyte_that_is_one_hole(tmp_path: Path, options: list[str], limit_bytes: int) -> None:
    """As tar writes it, in a few kilobytes; it comes out of memory, since few file systems of hosts take such a one."""
    target, memory, archive = tmp_path / "target", tmp_path / "memory", tmp_path / "out.tar"
    target.mkdir()
    memory.mkdir()
    unshare = tools.require("unshare", purpose="run the tests", package="util-linux")
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    inside: list[str | Path] = [unshare, *as_root, "--mount", "/bin/sh", "-c", SPARSE, "sh", memory]
    tools.run([*inside, "tar", "--sparse", *options, "-cf", archive, "big"], doing="running tar")
    assert archive.stat().st_size < LIMIT_BYTES
    with pytest.raises(ApplianceError, match=r"the archive that the guest left is damaged at '.*big'"):
        copy_out(archive, target, limit_bytes=limit_bytes)
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("as_cache", [False, True])
@pytest.mark.parametrize("said_by", ["the header", "pax"])
def test_a_header_that_says_an_exabyte(tmp_path: Path, said_by: str, *, as_cache: bool) -> None:
    info, _ = member("big")
    said = f"{len(f'00 size={EXABYTE}') + 1} size={EXABYTE}\n".encode()
    before = archive_of(tmp_path / "x.tar", member("h", tarfile.XHDTYPE, said)).read_bytes()[: 2 * tarfile.BLOCKSIZE]
    info.size = EXABYTE if said_by == "the header" else 0
    data = (b"" if said_by == "the header" else before) + info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "out.tar").write_bytes(data + bytes(10_000))
    (tmp_path / "target").mkdir()
    with pytest.raises(ApplianceError, match=f"the guest left more than {LIMIT_BYTES} bytes of files in "):
        copy_out(tmp_path / "out.tar", tmp_path / "target", limit_bytes=LIMIT_BYTES, as_cache=as_cache)
    assert list((tmp_path / "target").iterdir()) == []


NO_ROOM = """
import errno, sys
from pathlib import Path
from virt_dib.unpacking import copy_out
try:
    copy_out(Path(sys.argv[1]), Path(sys.argv[2]), limit_bytes=1 << 30)
except OSError as error:
    print(errno.errorcode[error.errno])
"""


def test_no_space_on_the_host_is_an_os_error(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "out.tar", member("big", data=bytes(2 << 20)))
    (tmp_path / "small").mkdir()
    unshare = str(tools.require("unshare", purpose="run the tests", package="util-linux"))
    as_root = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    mount = f'mount -t tmpfs -o size=1m none "{tmp_path}/small"; exec "$@"'
    before = (unshare, *as_root, "--mount", "/bin/sh", "-c", mount, "sh")
    assert run_python(NO_ROOM, archive, tmp_path / "small", before=before).strip() == "ENOSPC"
