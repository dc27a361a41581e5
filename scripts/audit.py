#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Look over the Python packages that virt-dib is developed with: audit.py [REQUIREMENTS].

What can be found out here always is: each package is pinned and has hashes; what is installed in this environment is
just that, complete, and as it was when it was installed. Then the OSV database is asked for known vulnerabilities.
Where it cannot be reached, that is said, and is no failure. Run it with the Python of .venv.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import importlib.metadata
import json
import os
import re
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SERVICE = "https://api.osv.dev/v1/querybatch"
"""Takes many questions at once (https://google.github.io/osv.dev/post-v1-querybatch/)."""
SERVICE_VARIABLE = "AUDIT_SERVICE"
"""Names another one that answers the same way."""
ACCEPTED: Mapping[str, str] = {}
"""Vulnerabilities that do no harm here, by their ids, and why."""
UNPINNED = frozenset({"pip", "virt-dib"})
"""What else an environment may have: what installs the others, and what is developed."""

_TIMEOUT_S = 20.0
_MOST_BYTES = 8 << 20
_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.!+_-]+)(?P<options>(?:\s+--hash=\S+)*)\s*"
)
_HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


class UnreachableError(Exception):
    """The service gives no answer."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """One package of the requirements."""

    name: str
    version: str


def main(arguments: Sequence[str]) -> int:
    """Tell what is wrong; return the exit status."""
    path = Path(arguments[0]) if arguments else Path(__file__).parents[1] / "requirements-dev.txt"
    pinned, problems = read(path.read_text(encoding="utf-8"))
    problems += [*wrong_installations(pinned), *wrong_files(), *missing_dependencies()]
    try:
        found = list(vulnerabilities(pinned, os.environ.get(SERVICE_VARIABLE) or SERVICE))
    except UnreachableError as error:
        said = f"known vulnerabilities were NOT looked up: {error}"
    else:
        problems += found
        said = f"{len(found)} known vulnerabilities"
    for problem in problems:
        print(f"audit: error: {problem}", file=sys.stderr)
    print(f"audit: {len(pinned)} packages pinned with hashes and looked over, {len(problems)} problems; {said}")
    return 1 if problems else 0


# ---- what can be found out here ----


def read(text: str) -> tuple[list[Pinned], list[str]]:
    """The packages of a file of requirements, and what is wrong with it."""
    pinned, problems = [], []
    lines = re.sub(r"\\\n", " ", text).splitlines()
    for line in filter(None, (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)):
        found = _REQUIREMENT.fullmatch(line)
        if found is None:
            problems.append(f"'{line[:60]}' is not pinned: it has to be NAME==VERSION with hashes")
            continue
        hashes = found["options"].split()
        if not hashes or not all(map(_HASH.fullmatch, hashes)):
            problems.append(f"'{found['name']}' has no hash of SHA-256, or another one")
        pinned.append(Pinned(canonicalize_name(found["name"]), found["version"]))
    return pinned, problems


def installed() -> dict[str, importlib.metadata.Distribution]:
    """What is in this environment itself, and not in the system's, by canonical name."""
    places = [place for place in sys.path if place.startswith(f"{sys.prefix}{os.sep}")]
    found = importlib.metadata.distributions(path=places)
    return {canonicalize_name(one.metadata["Name"]): one for one in found}


def wrong_installations(pinned: Sequence[Pinned]) -> Iterator[str]:
    """Packages that are not those of the requirements."""
    have = {name: one.version for name, one in installed().items()}
    wanted = {one.name: one.version for one in pinned}
    for name, version in wanted.items():
        if have.get(name) != version:
            yield f"'{name}' is to be {version}, and is {have.get(name, 'not installed')}"
    for name in sorted(have.keys() - wanted.keys() - UNPINNED):
        yield f"'{name}' {have[name]} is installed, but not among the requirements"


def wrong_files() -> Iterator[str]:
    """Files that are not as they were when their package was installed."""
    for name, one in installed().items():
        for file in one.files or ():
            if file.hash is None or file.hash.mode != "sha256":
                continue
            try:
                digest = hashlib.sha256(Path(str(file.locate())).read_bytes()).digest()
            except OSError as error:
                yield f"'{name}' is incomplete: '{file}': {error.strerror}"
                continue
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
                yield f"'{name}' has been changed: '{file}' is not as it was installed"


def missing_dependencies() -> Iterator[str]:
    """What the packages want, and cannot have."""
    have: dict[str, importlib.metadata.Distribution] = {}
    have.update((canonicalize_name(one.metadata["Name"]), one) for one in importlib.metadata.distributions())
    own = installed()
    have.update(own)
    for name, one in own.items():
        for text in one.requires or ():
            wanted = Requirement(text)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            other = have.get(canonicalize_name(wanted.name))
            if other is None or not wanted.specifier.contains(other.version, prereleases=True):
                yield f"'{name}' wants {wanted}, and there is {other.version if other else 'none'}"


# ---- what others know ----


def vulnerabilities(pinned: Sequence[Pinned], service: str) -> Iterator[str]:
    """What the service knows of them.

    Raises:
        UnreachableError: it does not answer, or not as it should.
    """
    packages = [{"package": {"name": one.name, "ecosystem": "PyPI"}, "version": one.version} for one in pinned]
    for one, answer in zip(pinned, _ask(service, {"queries": packages}), strict=True):
        for found in answer.get("vulns", ()):
            if found["id"] not in ACCEPTED:
                yield f"'{one.name}' {one.version} has the vulnerability {found['id']}; see https://osv.dev/{found['id']}"


def _ask(service: str, question: object) -> list[Mapping[str, list[Mapping[str, str]]]]:
    data = json.dumps(question).encode()
    request = urllib.request.Request(service, data, {"Content-Type": "application/json"})  # noqa: S310 - written here, or the user's choice
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - as above
            results: list[Mapping[str, list[Mapping[str, str]]]] = json.loads(answer.read(_MOST_BYTES))["results"]
        if len(results) != len(json.loads(data)["queries"]):
            raise UnreachableError(f"{service} has not answered all questions")
        # What is there has to have a name.
        _ = [found["id"] for result in results for found in result.get("vulns", ())]
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(f"{service} cannot be reached: {getattr(error, 'reason', None) or error}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UnreachableError(f"{service} does not answer as it should") from error
    return results


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
