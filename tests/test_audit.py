# SPDX-License-Identifier: Apache-2.0
"""``make audit``, with a small environment of its own, and a service that answers as the real one is documented to."""

from __future__ import annotations

import base64
import hashlib
import http.server
import importlib.metadata
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import TESTS
from virt_dib import tools
from virt_dib.tools import Result

SCRIPT = TESTS.parent / "scripts" / "audit.py"
HASH = f"--hash=sha256:{'0' * 64}"
PACKAGING = importlib.metadata.version("packaging")


class Environment:
    """A virtual environment with ``packaging``, which the script needs, and ``thing`` 1.0."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.requirements = directory / "requirements.txt"
        self.service = "http://127.0.0.1:9/"
        tools.run([sys.executable, "-m", "venv", "--without-pip", directory / "venv"], doing="making an environment")
        self.site = next((directory / "venv/lib").glob("python*")) / "site-packages"
        own = importlib.metadata.distribution("packaging")
        for name in ("packaging", f"packaging-{PACKAGING}.dist-info"):
            shutil.copytree(str(own.locate_file(name)), self.site / name, ignore=shutil.ignore_patterns("__pycache__"))
        self.add("thing", "1.0", requires=["packaging>=20"])
        self.require(f"packaging=={PACKAGING} {HASH}", f"thing==1.0 \\\n    {HASH} \\\n    {HASH}  # twice")

    def require(self, *lines: str) -> None:
        self.requirements.write_text("# a comment\n" + "".join(f"{line}\n" for line in lines))

    def add(self, name: str, version: str, *, requires: list[str]) -> None:
        """Install a package of one file."""
        module, metadata = self.site / f"{name}.py", self.site / f"{name}-{version}.dist-info"
        metadata.mkdir()
        module.write_text("mine = True\n")
        digest = base64.urlsafe_b64encode(hashlib.sha256(module.read_bytes()).digest()).rstrip(b"=").decode()
        (metadata / "RECORD").write_text(f"{name}.py,sha256={digest},12\n{name}-{version}.dist-info/RECORD,,\n")
        wanted = "".join(f"Requires-Dist: {text}\n" for text in requires)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{wanted}")

    def audit(self) -> Result:
        return tools.run(
            [self._directory / "venv/bin/python", "-B", SCRIPT, self.requirements],
            doing="auditing",
            environment={"AUDIT_SERVICE": self.service, "PATH": os.environ["PATH"], "no_proxy": "127.0.0.1"},
            check=False,
        )


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def test_all_is_well_and_the_service_cannot_be_reached(environment: Environment) -> None:
    result = environment.audit()
    assert (result.exit_status, result.stderr) == (0, "")
    assert "2 packages pinned with hashes" in result.stdout
    assert (
        "0 problems; known vulnerabilities were NOT looked up: http://127.0.0.1:9/ cannot be reached" in result.stdout
    )


def test_a_file_that_was_changed(environment: Environment) -> None:
    (environment.site / "thing.py").write_text("mine = False\n")
    result = environment.audit()
    assert result.exit_status == 1
    assert result.stderr == "audit: error: 'thing' has been changed: 'thing.py' is not as it was installed\n"


def test_a_file_that_is_gone(environment: Environment) -> None:
    (environment.site / "thing.py").unlink()
    assert "'thing' is incomplete: 'thing.py': No such file" in environment.audit().stderr


def test_a_package_that_nobody_asked_for(environment: Environment) -> None:
    environment.add("stowaway", "6.6.6", requires=[])
    assert "'stowaway' 6.6.6 is installed, but not among the requirements" in environment.audit().stderr


def test_a_dependency_that_is_not_there(environment: Environment) -> None:
    environment.add("needy", "1", requires=["thing>=2", "nowhere", "other; python_version < '3'"])
    environment.require(f"packaging=={PACKAGING} {HASH}", f"thing==1.0 {HASH}", f"needy==1 {HASH}")
    assert environment.audit().stderr.splitlines() == [
        "audit: error: 'needy' wants thing>=2, and there is 1.0",
        "audit: error: 'needy' wants nowhere, and there is none",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("thing==1.0", "'thing' has no hash of SHA-256"),
        ("thing==1.0 --hash=md5:0123", "'thing' has no hash of SHA-256"),
        (f"thing==1.0 {HASH} --hash=sha512:0", "'thing' has no hash of SHA-256"),
        (f"thing>=1.0 {HASH}", "'thing>=1.0"),
        ("thing", "'thing' is not pinned"),
        ("--index-url http://example.com", "is not pinned"),
        ("thing @ http://example.com/thing.whl", "is not pinned"),
        (f"thing==1.1 {HASH}", "'thing' is to be 1.1, and is 1.0"),
    ],
)
def test_requirements(environment: Environment, line: str, problem: str) -> None:
    environment.require(f"packaging=={PACKAGING} {HASH}", line)
    result = environment.audit()
    assert result.exit_status == 1
    assert problem in result.stderr


class Service(http.server.ThreadingHTTPServer):
    """Answers the same each time, and keeps the question."""

    def __init__(self, answer: bytes, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.status = answer, status
        self.question: Any = None


class Handler(http.server.BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        self.server.question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Say nothing."""


@pytest.fixture
def served(environment: Environment, request: pytest.FixtureRequest) -> Iterator[tuple[Environment, Service]]:
    with Service(*request.param) as service:
        thread = threading.Thread(target=service.serve_forever)
        thread.start()
        environment.service = f"http://127.0.0.1:{service.server_port}/v1/querybatch"
        yield environment, service
        service.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "served", [(b'{"results": [{}, {"vulns": [{"id": "PYSEC-1", "modified": "x"}]}]}',)], indirect=True
)
def test_a_known_vulnerability(served: tuple[Environment, Service]) -> None:
    environment, service = served
    result = environment.audit()
    assert result.exit_status == 1
    assert "'thing' 1.0 has the vulnerability PYSEC-1; see https://osv.dev/PYSEC-1" in result.stderr
    assert service.question["queries"] == [
        {"package": {"name": "packaging", "ecosystem": "PyPI"}, "version": PACKAGING},
        {"package": {"name": "thing", "ecosystem": "PyPI"}, "version": "1.0"},
    ]


@pytest.mark.parametrize("served", [(b'{"results": [{}, {}]}',)], indirect=True)
def test_no_known_vulnerability(served: tuple[Environment, Service]) -> None:
    result = served[0].audit()
    assert (result.exit_status, result.stderr) == (0, "")
    assert result.stdout.endswith("0 problems; 0 known vulnerabilities\n")


@pytest.mark.parametrize(
    "served",
    [
        (b"", 503), (b"not JSON",), (b'{"results": [{}]}',), (b"[]",), (b'{"results": [1, 2]}',),
        (b'{"results": [{}, {"vulns": [{}]}]}',),
    ],
    indirect=True,
)  # fmt: skip
def test_a_service_that_does_not_answer_as_it_should(served: tuple[Environment, Service]) -> None:
    result = served[0].audit()
    assert (result.exit_status, result.stderr) == (0, "")
    assert "known vulnerabilities were NOT looked up" in result.stdout


def test_the_requirements_of_this_project() -> None:
    """Without a question to anybody."""
    command: list[str | Path] = [sys.executable, SCRIPT]
    result = tools.run(command, doing="auditing", environment={"AUDIT_SERVICE": "http://127.0.0.1:9/"}, check=False)
    assert (result.exit_status, result.stderr) == (0, "")
