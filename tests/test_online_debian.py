# SPDX-License-Identifier: Apache-2.0
"""apt, curl, git, pip, wget and Python in a real Debian tree: the host's certificates, DNS and proxies."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest

from helpers import TESTS, Run, files_in_image, make_element, skip_without, virt_dib
from virt_dib import online, tools

pytestmark = pytest.mark.full

PROGRAMS = ("curl", "wget", "pip", "git", "urllib", "apt")
_ROOT = """#!/bin/bash
set -eu
env -u http_proxy -u https_proxy -u HTTP_PROXY mmdebstrap --variant=minbase --include=apt "$CHECK_RELEASE" \
    "$TARGET_ROOT" "$CHECK_ARCHIVE"
"""
_TAKE = '#!/bin/bash\ncp "$TARGET_ROOT/var/lib/online-check" .\n'


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a build in this network has shown."""

    run: Run
    reached: set[str]
    asked: set[str]
    """The hosts that the proxy was asked for."""


class _Proxy(http.server.BaseHTTPRequestHandler):
    """Writes down which host it is asked for, and refuses."""

    asked: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        found = re.match(r"(?:https?://)?([^/:]+)", self.path)
        if found is not None:
            self.asked.add(found[1])
        self.send_error(503)

    do_CONNECT = do_GET  # noqa: N815 - the module wants this name

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def proxy() -> Iterator[str]:
    """The address of a proxy that a build can reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        try:
            route.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this host has no network")
        address = route.getsockname()[0]
    with http.server.ThreadingHTTPServer((address, 0), _Proxy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://{address}:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def package_index() -> str:
    """The one that pip uses on this machine."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    asked = tools.run(command, doing="asking pip", environment=os.environ, check=False)
    if asked.exit_status != 0:
        default = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
        asked = tools.run([sys.executable, "-c", default], doing="asking pip", environment=os.environ)
    return asked.stdout.strip().rstrip("/")


def archive() -> tuple[str, str]:
    """Debian's release and archive of this machine."""
    found = tools.run([TESTS.parent / "scripts/mirrors"], doing="looking for mirrors", environment=os.environ).stdout
    values = dict(line.split("=", 1) for line in found.splitlines())
    if "DIB_DISTRIBUTION_MIRROR" not in values:
        pytest.skip("this machine knows no archive of Debian")
    return values["DIB_RELEASE"], values["DIB_DISTRIBUTION_MIRROR"]


def answers(url: str) -> bool:
    command = ["curl", "--fail", "--silent", "--location", "--output", "/dev/null", "--max-time", "60", url]
    return tools.run(command, doing="trying the network", environment=os.environ, check=False).exit_status == 0


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    skip_without("sandbox")
    directory = tmp_path_factory.mktemp("online")
    index, (release, mirror) = package_index(), archive()
    if not index.startswith("https:") or not answers(f"{index}/six/"):
        pytest.skip("no package index answers by https")
    element = make_element(
        directory / "elements",
        "online-debian",
        {"root.d/10-debian": _ROOT, "install.d/50-check": "", "cleanup.d/50-take": _TAKE},
        provides=["operating-system"],
    )
    shutil.copy(TESTS / "data" / "online-check", element / "install.d" / "50-check")
    with proxy() as address:
        variables = {
            "CHECK_INDEX": index,
            "CHECK_RELEASE": release,
            "CHECK_ARCHIVE": mirror,
            "CHECK_MIRROR": mirror.replace("http:", "https:"),
            "HTTP_PROXY": address,
            "https_proxy": address,
            "no_proxy": "excepted.invalid",
        }
        words = [word for name, value in variables.items() for word in ("--envvar", f"{name}={value}")]
        run = virt_dib(
            [
                "--isolation", "sandbox", "--name", "d", "--formats", "raw", "--skip-base", *words,
                "-p", directory / "elements", "online-debian",
            ],
            cwd=directory,
            environment={"TMPDIR": "/var/tmp"},
            timeout_s=3600,
        )  # fmt: skip
    assert run.exit_status == 0, run.stdout + run.stderr
    reached = set((directory / "d.d" / "online-check").read_text().split())
    return Checked(run=run, reached=reached, asked=set(_Proxy.asked))


def blocks(text: str) -> set[str]:
    """Certificates, each as one word."""
    found = re.findall(r"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", text, re.DOTALL)
    return {"".join(block.split()) for block in found}


@pytest.fixture(scope="module")
def of_the_host_alone(checked: Checked) -> set[str]:
    """Certificates that this host trusts and the image does not."""
    mine = online.host_certificates(os.environ)
    if mine is None:
        return set()
    store = files_in_image(checked.run.output_dir / "d.raw").text("/etc/ssl/certs/ca-certificates.crt")
    assert len(blocks(store)) > 50
    return blocks(mine.text) - blocks(store)


def test_names_are_found_and_certificates_trusted(checked: Checked) -> None:
    wanted = set(PROGRAMS)
    if not answers(archive()[1].replace("http:", "https:") + "/"):
        wanted.remove("apt")
    assert wanted <= checked.reached


def test_without_the_variables_the_image_trusts_its_own_alone(checked: Checked, of_the_host_alone: set[str]) -> None:
    if not of_the_host_alone:
        pytest.skip("this host trusts no more than the image")
    if "bare" in checked.reached:
        pytest.skip("the package index is not behind a CA of this host's own")
    assert {"curl", "pip"} <= checked.reached


def test_the_store_is_renewed_without_them(checked: Checked) -> None:
    assert {"upgrade", "store"} <= checked.reached


def test_none_of_them_is_in_the_image(checked: Checked, of_the_host_alone: set[str]) -> None:
    """Not even in a block that no file has any more."""
    pieces = {certificate[start : start + 64].encode() for certificate in of_the_host_alone for start in (0, 64, 128)}
    with (checked.run.output_dir / "d.raw").open("rb") as image:
        assert not any(line.rstrip(b"\n") in pieces for line in image)


def test_proxies_are_asked_by_all(checked: Checked) -> None:
    names = {f"{program}-{scheme}.invalid" for program in PROGRAMS for scheme in ("http", "https")}
    assert names <= checked.asked
    assert "excepted.invalid" not in checked.asked
