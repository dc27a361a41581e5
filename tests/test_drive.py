# SPDX-License-Identifier: Apache-2.0
"""The helper drive: which ones are taken, what is on it after a build, and that it survives builds that end badly."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

from helpers import ExtFiles, Run, files_in_image, make_element, make_tiny_os, virt_dib
from virt_dib import prerequisites, staging, tools
from virt_dib.appliance import open_appliance
from virt_dib.drive import Drive, held, inspect, note_format
from virt_dib.errors import Interrupted, UsageError
from virt_dib.machine import Disk, Settings
from virt_dib.spec import DEFAULT_MEMORY_MIB
from virt_dib.supermin import cache_dir

DISK_BYTES = 256 << 20
PARTITION_BYTES = 1 << 20
"""Where the first partition begins."""


def ext4_drive(path: Path, *, size_bytes: int = DISK_BYTES, offset_bytes: int = 0, kind: str = "ext4") -> Path:
    """A raw disk with one file system at *offset_bytes*."""
    with path.open("wb") as stream:
        stream.truncate(size_bytes)
    size_kib = (size_bytes - offset_bytes - PARTITION_BYTES) // 1024
    options = ["-q", "-F", "-t", kind, "-E", f"offset={offset_bytes},lazy_itable_init=1"]
    tools.run(["mke2fs", *options, path, f"{size_kib}k"], doing="making a drive")
    return path


def partitioned(path: Path, label: str, *, kind: str = "ext4") -> Path:
    """A raw disk with a partition table and that on its first partition."""
    ext4_drive(path, offset_bytes=PARTITION_BYTES, kind=kind)
    table = f"label: {label}\nstart=2048, size={(DISK_BYTES - 2 * PARTITION_BYTES) // 512}\n"
    tools.run(["sfdisk", "-q", "--no-reread", path], doing="making partitions", stdin=table.encode())
    return path


def to_qcow2(path: Path, *options: str) -> Path:
    image = path.with_suffix(".qcow2")
    tools.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, path, image], doing="converting")
    return image


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refusal(path: Path, wanted: str | None = None) -> str:
    """Why it is not taken; it has not been written to."""
    before = digest(path) if path.is_file() and os.access(path, os.R_OK) else ""
    with pytest.raises(UsageError) as caught:
        inspect(path, wanted)
    problem = caught.value.problems[0]
    assert problem.message.startswith(f"cannot use '{path}' as helper drive: ")
    assert problem.hint
    assert not before or digest(path) == before
    return problem.message.partition(" as helper drive: ")[2]


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


# ---- what the host can tell ----


def test_formats_are_found_out_or_forced(tmp_path: Path) -> None:
    raw = ext4_drive(tmp_path / "drive")
    qcow2 = to_qcow2(raw)
    assert inspect(raw, None) == Drive(raw, "raw")
    assert inspect(qcow2, None) == Drive(qcow2, "qcow2")
    os.truncate(qcow2, DISK_BYTES)
    assert inspect(qcow2, "raw") == Drive(qcow2, "raw")
    assert refusal(raw, "qcow2") == "it is not a qcow2 image"


def test_a_link_to_a_drive(tmp_path: Path) -> None:
    raw = ext4_drive(tmp_path / "drive")
    (tmp_path / "link").symlink_to("drive")
    assert inspect(tmp_path / "link", None) == Drive(raw, "raw")


def test_what_is_no_disk_image(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent") == "it does not exist"
    assert refusal(tmp_path) == "it is a directory"
    os.mkfifo(tmp_path / "fifo")
    assert refusal(tmp_path / "fifo") == "it is neither a file nor a block device"
    assert refusal(Path("/dev/null")) == "it is neither a file nor a block device"


def test_too_small(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(bytes(1 << 20))
    assert refusal(small) == "it is too small: 1 MiB, at least 64 MiB needed"
    tools.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "small.qcow2", "10M"], doing="making a drive")
    assert refusal(tmp_path / "small.qcow2") == "it is too small: 10 MiB, at least 64 MiB needed"


@pytest.mark.parametrize("image_format", ["vmdk", "vdi", "vhdx", "qed", "parallels", "vpc"])
def test_other_formats(tmp_path: Path, image_format: str) -> None:
    path = tmp_path / "drive"
    tools.run(["qemu-img", "create", "-q", "-f", image_format, path, "256M"], doing="making a drive")
    assert refusal(path).startswith("its format is ")


def test_qcow2_images_that_name_other_files(tmp_path: Path) -> None:
    """They would show files of this user's to the elements, and let them write there."""
    (tmp_path / "secret").write_bytes(bytes(DISK_BYTES))
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    backed, divided = tmp_path / "backed", tmp_path / "divided"
    tools.run([*create, "-b", tmp_path / "secret", "-F", "raw", backed], doing="making a drive")
    options = f"data_file={tmp_path}/data,data_file_raw=on"
    tools.run([*create, "-o", options, divided, "256M"], doing="making a drive")
    for path in (backed, divided):
        for wanted in (None, "qcow2"):
            assert refusal(path, wanted) in ("it has a backing file", "it has an external data file")


def test_encrypted_and_damaged_qcow2_images(tmp_path: Path) -> None:
    good = to_qcow2(ext4_drive(tmp_path / "drive"))
    for name, offset, data, reason in (
        ("encrypted", 32, struct.pack(">I", 2), "it is encrypted"),
        ("version", 4, struct.pack(">I", 9), "its qcow2 version is 9, which does not exist"),
        ("marked", 72, struct.pack(">Q", 2), "it is marked as corrupt"),
        ("table", 40, struct.pack(">Q", 1 << 40), "corrupt"),
        ("references", 48, struct.pack(">Q", 512), ""),
    ):
        path = tmp_path / name
        path.write_bytes(good.read_bytes())
        patch(path, offset, data)
        assert reason in refusal(path)
        assert str(path) not in refusal(path)
    short = tmp_path / "short"
    short.write_bytes(good.read_bytes()[:50])
    assert refusal(short) == "it is not a qcow2 image"


def test_a_raw_drive_does_not_become_another_format_by_what_is_written_into_it(tmp_path: Path) -> None:
    path = ext4_drive(tmp_path / "drive")
    try:
        os.setxattr(path, "user.virt-dib", b"")
    except OSError:
        pytest.skip("no attributes of users here")
    drive = inspect(path, None)
    with held(drive):
        # Not before it has turned out to be good.
        assert os.listxattr(path) == ["user.virt-dib"]
        note_format(drive)
    patch(path, 0, to_qcow2(ext4_drive(tmp_path / "other")).read_bytes()[:512])
    assert refusal(path) == "it was raw when a build used it last, and looks like qcow2 now"
    assert inspect(path, "raw") == Drive(path, "raw")


def test_in_use_by_another_build(tmp_path: Path) -> None:
    path = ext4_drive(tmp_path / "drive")
    found = inspect(path, None)
    os.link(path, tmp_path / "same")
    with (
        held(found),
        pytest.raises(UsageError, match="another build uses it"),
        held(inspect(tmp_path / "same", None)),
    ):
        pass
    with held(found):
        pass


HOLDS = """
import sys
from pathlib import Path
from virt_dib.drive import held, inspect
with held(inspect(Path(sys.argv[1]), None)):
    print("has it", flush=True)
    sys.stdin.read()
"""


def test_a_build_is_refused_whose_drive_another_process_has(element_dir: Path, tmp_path: Path) -> None:
    """Before its appliance starts, of which nothing could come: the qemu here does not run."""
    if prerequisites.require_prerequisites():
        pytest.skip("this host has no appliance")
    path = ext4_drive(tmp_path / "drive")
    before = digest(path)
    environment = {"LIBGUESTFS_HV": "/bin/false", "VIRT_DIB_KVM": "off", "TMPDIR": str(tmp_path)}
    out = tmp_path / "out"
    out.mkdir()
    words: list[str | Path] = ["--name", "x", "--skip-base", "-p", element_dir, "--drive", path, "tiny-os"]
    reader, writer = os.pipe()
    with tools.started([sys.executable, "-c", HOLDS, path], stdin=reader, environment=os.environ) as other:
        os.close(reader)
        assert other.stdout is not None
        assert other.stdout.readline() == b"has it\n"
        run = virt_dib(words, cwd=out, environment=environment)
        os.close(writer)
        assert other.wait() == 0
    assert run.stderr.splitlines() == [
        f"virt-dib: error: cannot use '{path}' as helper drive: another build uses it",
        "virt-dib: hint: wait until that has ended, or give another --drive",
    ]
    assert run.exit_status == 2
    assert os.listdir(out) == []
    assert sorted(os.listdir(tmp_path)) == ["drive", "out"]
    assert digest(path) == before
    # That was all: now it comes to the appliance.
    run = virt_dib(words, cwd=out, environment=environment)
    assert "helper drive" not in run.stderr
    assert "starting the appliance" in run.stderr


@pytest.mark.parametrize("name", ["drive", "drive.qcow2"])
def test_in_use_by_a_virtual_machine(tmp_path: Path, name: str) -> None:
    to_qcow2(ext4_drive(tmp_path / "drive"))
    path = tmp_path / name
    image_format = inspect(path, None).format
    qemu_io = tools.require("qemu-io", purpose="run the tests", package="qemu-utils")
    reader, writer = os.pipe()
    with tools.started([qemu_io, "-f", image_format, path], stdin=reader) as process:
        os.write(writer, b"read 0 512\n")
        assert process.stdout is not None
        process.stdout.readline()
        assert refusal(path) == "another program uses it"
    os.close(reader)
    os.close(writer)
    assert inspect(path, None).path == path


@pytest.mark.needs_root
def test_in_use_as_a_loop_device(tmp_path: Path) -> None:
    path = ext4_drive(tmp_path / "drive")
    attached = tools.run(["losetup", "-f", "--show", path], doing="making a loop device", check=False)
    if attached.exit_status != 0:
        pytest.skip(f"no loop devices here: {attached.stderr}")
    device = attached.stdout.strip()
    try:
        assert refusal(path) == f"the loop device {device} uses it"
    finally:
        tools.run(["losetup", "-d", device], doing="removing the loop device")


def test_no_drive_is_held_as_well() -> None:
    with held(None):
        pass


# ---- what the appliance can tell ----


def no_file_system(path: Path) -> None:
    ext4_drive(path)
    patch(path, 0, bytes(1 << 20))


def vfat(path: Path) -> None:
    path.write_bytes(bytes(DISK_BYTES))
    tools.run(["mkfs.vfat", path], doing="making a drive")


def xfs(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(320 << 20)
    tools.run(["mkfs.xfs", "-q", path], doing="making a drive")


def empty_partition(path: Path) -> None:
    partitioned(path, "gpt")
    patch(path, PARTITION_BYTES, bytes(1 << 20))


def with_errors(path: Path) -> None:
    ext4_drive(path)
    tools.run(["debugfs", "-w", "-R", "set_super_value state 2", path], doing="making a drive")


def cut_off(path: Path) -> None:
    ext4_drive(path, size_bytes=1 << 30)
    os.truncate(path, DISK_BYTES)


def full(path: Path) -> None:
    ext4_drive(path, size_bytes=80 << 20)


def odd_home(path: Path) -> None:
    ext4_drive(path)
    tools.run(["debugfs", "-w", "-R", "symlink home /etc", path], doing="making a drive")


@dataclass(frozen=True)
class Case:
    """A drive and what ``guest/drive.sh`` says of it; nothing when it is taken."""

    label: str
    make: Callable[[Path], object]
    status: int = 0
    says: str = ""


CASES = (
    Case("none", no_file_system, 3, "it has no file system"),
    Case("vfat", vfat, 3, "it holds vfat, not ext2, ext3, ext4 or xfs"),
    Case("part", empty_partition, 3, "its first partition has no file system"),
    Case("errors", with_errors, 4, "its file system has errors"),
    Case("cut", cut_off, 4, "its file system cannot be mounted: "),
    Case("full", full, 5, "it is too small: "),
    Case("home", odd_home, 3, "'home' on it is not a directory"),
    Case("mbr", lambda path: partitioned(path, "dos")),
    Case("gpt", lambda path: partitioned(path, "gpt", kind="ext3")),
    Case("ext", lambda path: ext4_drive(path, kind="ext2")),
    Case("xfs", xfs),
)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What became of all of them, in one appliance; and of a drive of its own that was interrupted."""

    results: dict[str, tuple[int, str]]
    unchanged: dict[str, bool]
    own: ExtFiles


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    directory = tmp_path_factory.mktemp("drives")
    content = staging.Staging(directory / "staging")
    content.add_guest_scripts()
    content.make_disk(directory / "build.img")
    for case in CASES:
        case.make(directory / case.label)
    before = {case.label: digest(directory / case.label) for case in CASES}
    own = ext4_drive(directory / "own")
    (directory / "log").write_text("all of it\n")
    settings = Settings(
        disks=[
            Disk(path=directory / "build.img", label="build"),
            *(Disk(path=directory / case.label, label=case.label) for case in CASES),
        ],
        drive=Disk(path=own, label="drive"),
        cache_dir=cache_dir(),
        memory_mib=DEFAULT_MEMORY_MIB,
        cpus=2,
        network=False,
        accelerate=False,
    )
    results = {}
    variables = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    with contextlib.suppress(Interrupted), open_appliance(settings) as appliance:
        appliance.prepare()
        for case in CASES:
            text = (
                'mkdir -p "/$1" && /dib/guest/drive.sh open "/dev/disk/guestfs/$1" "/$1" || exit\n'
                'touch "/$1/home/.cache/written" && umount "/$1"'
            )
            result = appliance.run(["/bin/bash", "-c", text, "bash", case.label], variables, "/")
            results[case.label] = (result.exit_status, result.tail)
        text = "echo kept >/dib/home/file; cd /dib/home; (while :; do date >>busy; done) >/dev/null 2>&1 &"
        appliance.run(["/bin/bash", "-c", text], variables, "/")
        appliance.keep_log(directory / "log")
        interrupt()
    unchanged = {case.label: digest(directory / case.label) == before[case.label] for case in CASES}
    return Answers(results=results, unchanged=unchanged, own=files_in_image(own))


def interrupt() -> NoReturn:
    raise Interrupted


@pytest.mark.appliance
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_file_systems(answers: Answers, case: Case) -> None:
    status, said = answers.results[case.label]
    assert status == case.status, said
    last = (said.splitlines() or [""])[-1]
    assert last.startswith(case.says)
    assert len(last) < 300
    # What is refused is not written to.
    assert answers.unchanged[case.label] == (case.status != 0)


@pytest.mark.appliance
def test_a_drive_in_use_when_the_build_is_interrupted_is_whole(answers: Answers) -> None:
    checked = tools.run(["e2fsck", "-f", "-n", answers.own.image], doing="checking the drive", check=False)
    assert checked.exit_status == 0, checked.stdout
    assert answers.own.text("/home/file") == "kept\n"
    logs = [name for name in answers.own.names("/") if name.startswith("virt-dib-")]
    assert answers.own.text(f"/{logs[0]}") == "all of it\n"


# ---- builds ----


@dataclass
class Server:
    """Counts what is downloaded from it."""

    url: str
    downloads: list[str] = field(default_factory=list)


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server on an address of this host's that the appliance gets to, which the loopback is not."""
    addresses = tools.run(["hostname", "-I"], doing="looking for an address").stdout.split()
    if not addresses:
        pytest.skip("this host has no address but its loopback's")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("If-Modified-Since"):
                self.send_response(304)
                self.end_headers()
                return
            server.downloads.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "8")
            self.end_headers()
            self.wfile.write(b"content\n")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server names it
            pass

    with http.server.ThreadingHTTPServer((addresses[0], 0), Handler) as running:
        server = Server(f"http://{addresses[0]}:{running.server_address[1]}")
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield server
        running.shutdown()


FETCH = """#!/bin/bash
set -eu
"$TMP_HOOKS_PATH/bin/cache-url" "$SERVER/{0}" "$DIB_IMAGE_CACHE/{0}"
cat "$DIB_IMAGE_CACHE/{0}"
echo "home: $HOME, cache: $DIB_IMAGE_CACHE: $(ls "$DIB_IMAGE_CACHE" | tr '\\n' ' ')"
"""


@dataclass(frozen=True, kw_only=True)
class Builds:
    """Two with the same drive and the same image cache; the second one fails in the end."""

    first: Run
    second: Run
    downloads: Sequence[str]
    drive: Path
    cache: Path


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    directory = tmp_path_factory.mktemp("builds")
    make_tiny_os(directory / "elements")
    scripts = {"root.d/50-fetch": FETCH.format("image"), "extra-data.d/50-fetch": FETCH.format("data")}
    scripts["post-install.d/50-end"] = '#!/bin/bash\nexit "${END:-0}"\n'
    make_element(directory / "elements", "fetch", scripts, depends=["cache-url"])
    image = to_qcow2(partitioned(directory / "drive", "gpt"))
    arguments: list[str | Path] = [
        "--name", "x", "--formats", "raw", "--size", "1G", "--skip-base", "-p", directory / "elements", "--drive",
        image, "--image-cache", directory / "cache", "--exclude-element", "install-bin", "--exclude-element",
        "package-installs", "--no-network", "--network", "tiny-os", "fetch",
    ]  # fmt: skip
    runs = []
    with serving() as server:
        for name, more in (("first", []), ("second", ["--envvar", "END=7"])):
            (directory / name).mkdir()
            words = ["--envvar", f"SERVER={server.url}", *more, *arguments]
            runs.append(virt_dib(words, cwd=directory / name, environment={"TMPDIR": "/var/tmp"}))
    return Builds(first=runs[0], second=runs[1], downloads=server.downloads, drive=image, cache=directory / "cache")


@pytest.fixture(scope="module")
def on_drive(builds: Builds) -> ExtFiles:
    raw = builds.drive.with_suffix(".raw")
    tools.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", builds.drive, raw], doing="converting")
    return files_in_image(raw, offset_bytes=PARTITION_BYTES)


@pytest.mark.option("--drive", "--network")
@pytest.mark.appliance
def test_a_second_build_downloads_nothing(builds: Builds) -> None:
    assert builds.first.exit_status == 0, builds.first.stdout + builds.first.stderr
    assert builds.second.exit_status == 1
    assert "post-install.d/50-end" in builds.second.stderr
    assert list(builds.downloads) == ["/image", "/data"]
    log = (builds.second.output_dir / "x.log").read_text()
    assert log.count("Server copy has not changed") == 2


@pytest.mark.appliance
def test_the_home_directory_is_on_the_drive(builds: Builds, on_drive: ExtFiles) -> None:
    assert "home: /dib/home, cache: /dib/home/.cache/image-create: image \n" in builds.first.stdout
    assert on_drive.text("/home/.cache/image-create/image") == "content\n"
    assert on_drive.names("/home/.cache/image-create") == ["image"]


@pytest.mark.option("--image-cache")
@pytest.mark.appliance
def test_extra_data_caches_in_the_directory_on_the_host(builds: Builds) -> None:
    assert "home: /dib/home, cache: /dib/extra-data-cache: data \n" in builds.first.stdout
    assert [(path.name, path.read_text()) for path in builds.cache.iterdir()] == [("data", "content\n")]


@pytest.mark.appliance
def test_each_build_leaves_its_log_on_the_drive(builds: Builds, on_drive: ExtFiles) -> None:
    logs = sorted(name for name in on_drive.names("/") if name.startswith("virt-dib-") and name.endswith(".log"))
    texts = [on_drive.text(f"/{name}") for name in logs]
    for text, run in zip(texts, (builds.first, builds.second), strict=True):
        assert "home: /dib/home" in text
        # As bytes: what curl prints has carriage returns in it.
        assert (run.output_dir / "x.log").read_bytes().startswith(text.encode())


@pytest.mark.appliance
def test_the_drive_is_whole_after_a_build_that_failed(on_drive: ExtFiles) -> None:
    place = f"{on_drive.image}?offset={on_drive.offset_bytes}"
    checked = tools.run(["e2fsck", "-f", "-n", place], doing="checking the drive", check=False)
    assert checked.exit_status == 0, checked.stdout


# ---- in a plan ----


@pytest.mark.option("--drive-format")
def test_a_format_that_is_named_is_not_found_out(tmp_path: Path) -> None:
    """Told with the other mistakes, so that nothing is built."""
    path = ext4_drive(tmp_path / "drive")
    patch(path, 0, to_qcow2(ext4_drive(tmp_path / "other", kind="ext3")).read_bytes()[:104])
    before = digest(path)

    def refused(*options: str) -> str:
        run = virt_dib(["--drive", path, *options, "no-such-element"], cwd=tmp_path)
        assert run.exit_status == 2
        assert "element 'no-such-element' not found" in run.stderr
        return run.stderr

    assert "as helper drive: " in refused()
    assert "as helper drive: " in refused("--drive-format", "qcow2")
    assert "as helper drive: " not in refused("--drive-format", "raw")
    assert digest(path) == before


def test_without_the_appliance_there_is_no_drive(tmp_path: Path) -> None:
    path = ext4_drive(tmp_path / "drive")
    before = digest(path)
    run = virt_dib(["--isolation", "sandbox", "--drive", path, "--drive-format", "qcow", "tiny-os"], cwd=tmp_path)
    assert run.exit_status == 2
    assert "cannot use --drive with --isolation sandbox: only the appliance can mount it" in run.stderr
    assert "--image-cache DIR" in run.stderr
    assert "unknown format of the drive 'qcow'" in run.stderr
    assert digest(path) == before
