# SPDX-License-Identifier: Apache-2.0
"""What options do, seen in one build that has all of them: those that no other test looks at."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import ext4
from helpers import Run, files_in_image, make_element, make_tiny_os, skip_without, virt_dib
from virt_dib import dib, tools

pytestmark = pytest.mark.appliance

_NOTES = """\
#!/bin/bash
set -eu
[[ $DIB_DEBUG_TRACE == 0 ]] || set -x
mkdir -p /var/lib/notes
echo "$ARCH:$DIB_DEBUG_TRACE:$DIB_DEFAULT_INSTALLTYPE:$IMAGE_ELEMENT" >/var/lib/notes/variables
echo "${SSL_CERT_FILE-unset} ${CURL_CA_BUNDLE-unset} ${APT_CONFIG-unset}" >/var/lib/notes/certificates
"""
_MACHINE = "#!/bin/bash\nset -eu\nnproc >processors\ngrep -o '[0-9]*' <(head -1 /proc/meminfo) >memory\n"
MOST_BLOCKS = 16 << 20
_FAILS = "#!/bin/bash\nexit 1\n"
SECRET = "s3cr3t" * 10
"""Longer than a line of the terminal, and than libguestfs shows of a text."""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Run:
    skip_without("sandbox")
    elements = tmp_path_factory.mktemp("elements")
    make_tiny_os(elements)
    make_element(elements, "unwanted", {"install.d/50-unwanted": _FAILS})
    files = {"install.d/50-notes": _NOTES, "install.d/60-fails": _FAILS, "cleanup.d/50-machine": _MACHINE}
    make_element(elements, "notes", files, depends=["unwanted"])
    run = virt_dib(
        [
            "-B", dib.find_installation(None).library_dir, "--element-path", elements, "--skip-base",
            "--isolation", "sandbox", "--kvm", "off", "--formats", "raw,qcow2", "--name", "effects",
            "--arch", "arm64", "--debug", "2", "--install-type", "package",
            "--exclude-script", "60-fails", "--exclude-element", "unwanted",
            "--size", "640M", "--fs-type", "ext3", "--root-label", "the-root",
            "--mkfs-options", f"-I 512 -E resize={MOST_BLOCKS}",
            "--memsize", "1500", "--smp", "3", "-u", "--qemu-img-options", "cluster_size=32768",
            "--no-host-certificates", "--envvar", f"API_KEY={SECRET}", "-x", "--color", "--wrap", "tiny-os", "notes",
        ],
        cwd=tmp_path_factory.mktemp("effects"),
        environment={"COLUMNS": "40"},
    )  # fmt: skip
    assert run.exit_status == 0, run.stdout + run.stderr
    return run


@pytest.mark.option("--arch", "--debug", "--install-type", "--exclude-element", "--exclude-script")
@pytest.mark.option("-B", "--element-path", "--skip-base")
def test_what_scripts_are_told_and_which_run(build: Run) -> None:
    files = files_in_image(build.output_dir / "effects.raw")
    arch, debug, install_type, elements = files.text("/var/lib/notes/variables").strip().split(":")
    assert (arch, debug, install_type) == ("arm64", "2", "package")
    assert sorted(elements.split()) == ["notes", "tiny-os"]
    log = (build.output_dir / "effects.log").read_text()
    assert "+ mkdir -p /var/lib/notes" in log
    assert "60-fails" not in log


@pytest.mark.option("--no-host-certificates")
def test_no_variable_names_certificates_of_the_host(build: Run) -> None:
    files = files_in_image(build.output_dir / "effects.raw")
    # With them it does in any build: test_online.py.
    assert files.text("/var/lib/notes/certificates") == "unset unset unset\n"


@pytest.mark.option("--size", "--fs-type", "--root-label", "--mkfs-options")
def test_the_disk_and_its_file_system(build: Run) -> None:
    image = build.output_dir / "effects.raw"
    assert image.stat().st_size == 640 * 1024**2
    found = ext4.superblock(image)
    assert (found["Inode size"], found["Filesystem volume name"]) == ("512", "the-root")
    features = found["Filesystem features"].split()
    assert "has_journal" in features
    assert "extent" not in features
    # This is how the manual says --max-online-resize of disk-image-create is had.
    less, most = ext4.most_blocks(found)
    assert less < MOST_BLOCKS <= most


@pytest.mark.option("--memsize", "--smp")
def test_the_appliance_is_as_large_as_asked_for(build: Run) -> None:
    files = build.output_dir / "effects.d"
    assert (files / "processors").read_text() == "3\n"
    assert 1300 < int((files / "memory").read_text().split()[0]) / 1024 <= 1500


@pytest.mark.option("-u", "--qemu-img-options", "--formats", "--name")
def test_the_qcow2_image_is_not_compressed_and_has_the_options(build: Run) -> None:
    image = build.output_dir / "effects.qcow2"
    qemu_img = tools.require("qemu-img", purpose="look into images", package="qemu-utils")
    information = json.loads(tools.run([qemu_img, "info", "--output=json", image], doing="asking").stdout)
    assert information["cluster-size"] == 32768
    extents = json.loads(tools.run([qemu_img, "map", "--output=json", image], doing="asking").stdout)
    data = [extent for extent in extents if extent["data"]]
    # Compressed clusters have no place that could be named.
    assert data
    assert all("offset" in extent for extent in data)


@pytest.mark.option("-x", "--color", "--wrap")
def test_messages_are_coloured_wrapped_and_tell_the_calls_of_libguestfs(build: Run) -> None:
    assert "trace: launch" in build.stdout.replace("\n         ", " ")
    own = re.findall(r"\x1b\[3[0-9]m(\[ *[0-9.]+\] [^\x1b]*)\x1b\[0m", build.stdout)
    assert any("the appliance" in text.replace("\n         ", " ") for text in own)
    for text in own:
        for line in text.splitlines():
            assert len(line) <= 40 or " " not in line[9:].strip(), line
    assert "\x1b" not in (build.output_dir / "effects.log").read_text()


def test_no_secret_is_told_but_by_scripts(build: Run) -> None:
    """Neither in what libguestfs traces: not even its beginning, where a text is cut."""
    assert "trace: write" in (build.output_dir / "effects.log").read_text()
    for text in (build.stdout, build.stderr, (build.output_dir / "effects.log").read_text()):
        assert SECRET[:12] not in text


def test_nothing_is_left_beside_the_outputs(build: Run) -> None:
    assert {path.name for path in Path(build.output_dir).iterdir()} == {
        "effects.raw", "effects.qcow2", "effects.log", "effects.d",
    }  # fmt: skip
