# SPDX-License-Identifier: Apache-2.0
"""``--extra-data host`` where the tree is in the appliance: it goes to the host, and what has changed comes back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers import ISOLATIONS, Run, files_in_image, make_element, skip_without, virt_dib
from test_failures import errors, fail, hints, output_dir
from test_isolation import NO_NAMESPACES, in_user_namespace

pytestmark = pytest.mark.appliance

__all__ = ["output_dir"]  # a fixture

BEFORE = """#!/bin/bash
cd "$TARGET_ROOT"
mkdir -p data/directory data/closed
touch data/removed data/directory/inner data/closed/kept $'data/odd\nname *' data/names
ln data/names data/names2
chmod 700 data/closed
chown 1234:1235 data/closed data/closed/kept
mknod data/node c 1 3
"""
CHANGES = """#!/bin/bash
set -eu
cd "$TMP_MOUNT_PATH"
cat ~/secret >data/secret
[[ $(stat -c %u:%g data/closed/kept) == 1234:1235 ]]
echo "$TMP_MOUNT_PATH $PWD" >data/seen
rm data/removed $'data/odd\nname *'
rm -r data/directory
ln -s closed data/directory
sudo chown 5:6 data/names
chmod 4755 data/seen
mkdir -p "$TMP_HOOKS_PATH/install.d"
printf '#!/bin/bash\necho later >/data/later\n' >"$TMP_HOOKS_PATH/install.d/40-later"
chmod 755 "$TMP_HOOKS_PATH/install.d/40-later"
echo cached >"$DIB_IMAGE_CACHE/cached"
"""
LOOK = """#!/bin/bash
cd /data
for name in *; do
    echo "$name $(stat -c '%F %a %u:%g %h' "$name")"
done >/look
"""


@pytest.fixture(scope="module", params=ISOLATIONS)
def build(
    request: pytest.FixtureRequest, element_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Run]:
    isolation = str(request.param)
    skip_without("sandbox")
    top = tmp_path_factory.mktemp("extra-data")
    scripts = {"root.d/60-before": BEFORE, "extra-data.d/50-changes": CHANGES, "install.d/90-look": LOOK}
    make_element(top / "elements", "changes", scripts)
    for name in ("home", "out"):
        (top / name).mkdir()
    (top / "home/secret").write_text("of the user\n")
    run = virt_dib(
        ["--name", "x", "--formats", "raw", "--size", "1G", "--skip-base", "--isolation", isolation,
         "--extra-data", "host", "--image-cache", top / "cache", "-p", element_dir, "-p", top / "elements",
         "tiny-os", "changes"],
        cwd=top / "out",
        environment={"HOME": str(top / "home"), "XDG_CACHE_HOME": cache_home(), "TMPDIR": "/var/tmp"},
    )  # fmt: skip
    assert run.exit_status == 0, run.stdout + run.stderr
    return isolation, top, run


def cache_home() -> str:
    """Where the appliance is cached already."""
    return os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")


def test_the_image_has_what_the_scripts_made_of_the_tree(build: tuple[str, Path, Run]) -> None:
    isolation, _, run = build
    image = files_in_image(run.output_dir / "x.raw")
    assert image.text("/data/secret") == "of the user\n"
    assert image.text("/data/later") == "later\n"
    assert image.text("/data/seen").startswith("/dib/dib_build.")
    lines = dict(line.split(" ", 1) for line in image.text("/look").splitlines())
    node = lines.pop("node")
    assert lines == {
        "closed": "directory 700 1234:1235 2",
        "directory": "symbolic link 777 0:0 1",
        "later": "regular file 644 0:0 1",
        "names": "regular empty file 644 5:6 2",
        "names2": "regular empty file 644 5:6 2",
        "secret": "regular file 644 0:0 1",
        "seen": "regular file 4755 0:0 1",
    }
    if isolation == "vm":
        assert node.startswith("character special file")


@pytest.mark.option("--extra-data", "--image-cache")
def test_the_cache_is_the_hosts(build: tuple[str, Path, Run]) -> None:
    assert (build[1] / "cache/cached").read_text() == "cached\n"


def test_it_is_told_before_the_build_that_the_host_cannot(element_dir: Path, output_dir: Path, tmp_path: Path) -> None:
    arguments: list[str | Path] = ["--extra-data", "host", "--skip-base", "-p", element_dir, "tiny-os"]
    run = fail(arguments, output_dir, tmp_path, run_by=in_user_namespace(NO_NAMESPACES))
    assert run.exit_status == 1
    assert errors(run)[-1].startswith("virt-dib: error: --extra-data host: the kernel refuses what a sandbox needs: ")
    assert "leave out --extra-data host" in hints(run)[-1]
    assert not (output_dir / "disk.log").exists()
