# SPDX-License-Identifier: Apache-2.0
"""extra-data.d on the host: as the user, who can read what the user can, and write to the build and the image cache.

``guest/host-init.py`` is the first process; docs/extra-data.md says what its scripts see, and when to want it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from virt_dib import environment as contract
from virt_dib import image_cache, layout, sandbox
from virt_dib.appliance import Appliance
from virt_dib.dib import DibInstallation
from virt_dib.elements import Element
from virt_dib.environment import Facts, OnHost
from virt_dib.errors import ApplianceError, Problem, ToolError, UsageError
from virt_dib.interrupts import shielded
from virt_dib.jobs import JobResult, Tail, job_text
from virt_dib.namespaces import PROCESS_ENVIRONMENT, Ids, Inside, find_ids, inside_namespace
from virt_dib.spec import BuildSpec
from virt_dib.staging import BUILD_DISK_BYTES, Staging

_USUAL_CACHE = ".cache/image-create"
_GIT_SOCKETS = (".cache/git/credential/socket", ".git-credential-cache/socket")
_OWNED_SETTINGS = ("/etc/ssh", "/etc/crypto-policies/back-ends")
"""ssh takes no settings of a user it does not know, as the host's root is one here."""
_RESOLVER = "/etc/resolv.conf"
_SUDO = "/usr/bin/sudo"
_SCRIPTS = ("run-phase.sh", "host-owners.py", "host-tree.sh", "host-removed.py", "host-changed.py", "shell-link.py")
_NAMES = ("mnt", "hooks")
"""The tree and the hooks, in the directory of a build."""
_BEFORE = "before"
_ARCHIVE = f"{contract.BUILD_DIR}/host.tar"
_REMOVED = f"{contract.BUILD_DIR}/host.removed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What is prepared to run the phase."""

    directory: Path
    facts: OnHost
    network: bool
    shown: Sequence[str]
    """What is to be seen, also where directories of the host are hidden."""
    sockets: Sequence[str]
    files: Mapping[str, str]

    @property
    def runner(self) -> Path:
        """Seen as ``/dib``."""
        return self.directory / "dib"


def problems() -> list[Problem]:
    """What keeps this user from running the phase on the host, confined."""
    hint = "or leave out --extra-data host: variables can name files for the guest, see docs/extra-data.md"
    return [
        Problem(f"--extra-data host: {problem.message}", f"{problem.hint}; {hint}" if problem.hint else hint)
        for problem in sandbox.problems(network=False)
    ]


# ---- where things are ----


def find_on_host(
    spec: BuildSpec,
    installation: DibInstallation,
    elements: Sequence[Element],
    *,
    search_path: Sequence[Path],
    environ: Mapping[str, str],
    workspace: Path,
) -> OnHost:
    """Where the scripts find things on the host; the image cache is made.

    Raises:
        UsageError: it cannot be one, or cannot be made.
    """
    home = environ.get("HOME") or _user().pw_dir
    cache = spec.image_cache or Path(spec.variables.get("DIB_IMAGE_CACHE") or os.path.join(home, _USUAL_CACHE))
    _make_cache(cache, home)
    return OnHost(
        library_dir=str(installation.library_dir),
        python=str(installation.python),
        element_dirs={element.name: os.path.abspath(element.path) for element in elements},
        elements_path=[os.path.abspath(path) for path in search_path],
        image_cache=os.path.realpath(cache),
        home=home,
        working_directory=os.getcwd(),
        build_dir=f"{contract.GUEST}/dib_build.{workspace.name.rpartition('-')[2]}",
    )


def _make_cache(cache: Path, home: str) -> None:
    image_cache.check(cache, Path(home))
    if Path(os.path.realpath(cache)) in Path(os.path.realpath(home)).parents:
        raise UsageError(
            f"cannot have the image cache in '{cache}': your home is in it, and the scripts can write there",
            hint="give --image-cache a directory that holds nothing else, such as ~/.cache/image-create",
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"making the image cache '{cache}': {error.strerror}", hint="give a directory that you can write"
        ) from error


def prepare(facts: Facts, staging: Staging, directory: Path) -> Host:
    """Gather in *directory* what the phase needs besides the tree and the hooks; the staged files are there still."""
    on_host = facts.on_host
    if on_host is None:
        raise AssertionError
    host = Host(
        directory=directory,
        facts=on_host,
        network=facts.spec.network,
        shown=_shown(on_host, facts.host_environment, staging.host_file_sources),
        sockets=_sockets(on_host, facts.host_environment),
        files={
            "/etc/passwd": str(directory / "passwd"),
            _SUDO: str(directory / "dib/bin/sudo"),
            **{name: str(directory / name.strip("/")) for name in _OWNED_SETTINGS},
        },
    )
    build = host.runner / Path(on_host.build_dir).name
    for path in (
        build / "mnt",
        build / "hooks",
        host.runner / "bin",
        host.runner / "guest",
        directory / "tmp/lockfiles",
    ):
        path.mkdir(parents=True)
    for name in _SCRIPTS:
        _copy_program(name, host.runner / "guest" / name)
    _copy_program("sudo.sh", host.runner / "bin" / "sudo")
    shutil.copytree(staging.directory / "site", host.runner / "site", symlinks=True)
    (directory / "passwd").write_text(_passwd(on_host.home), encoding="utf-8", errors="surrogateescape")
    for name in _OWNED_SETTINGS:
        _copy_readable(Path(name), directory / name.strip("/"))
    return host


def _user() -> pwd.struct_passwd:
    user = os.geteuid()
    try:
        return pwd.getpwuid(user)
    except KeyError:
        return pwd.struct_passwd(("user", "x", user, os.getegid(), "", "/", "/bin/sh"))


def _passwd(home: str) -> str:
    """The host's, but 0 is the user: ssh takes name and home from here."""
    user = _user()
    lines = [f"{name}:x:0:0::{home}:/bin/bash" for name in dict.fromkeys((user.pw_name, "root"))]
    with contextlib.suppress(OSError):
        others = Path("/etc/passwd").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        lines += [line for line in others if line.split(":")[0] not in (user.pw_name, "root")]
    return "".join(f"{line}\n" for line in lines)


def _shown(on_host: OnHost, environ: Mapping[str, str], files: Sequence[Path]) -> list[str]:
    paths = [
        on_host.home,
        on_host.working_directory,
        on_host.library_dir,
        *on_host.elements_path,
        *on_host.element_dirs.values(),
        sys.prefix,
        os.path.dirname(os.path.dirname(on_host.python)),
        _RESOLVER,
        environ.get("SSH_AUTH_SOCK", ""),
        *map(str, files),
    ]
    absolute = [path for path in paths if os.path.isabs(path)]
    return sorted({*map(os.path.normpath, absolute), *map(os.path.realpath, absolute)})


def _sockets(on_host: OnHost, environ: Mapping[str, str]) -> list[str]:
    """Those of programs that hold keys and passwords, which is what the phase is on the host for."""
    paths = [os.path.join(on_host.home, name) for name in _GIT_SOCKETS]
    if agent := environ.get("SSH_AUTH_SOCK"):
        paths.append(agent)
    return [os.path.realpath(path) for path in paths]


def _copy_program(name: str, target: Path) -> None:
    shutil.copyfile(layout.guest_script(name), target)
    target.chmod(0o755)


def _copy_readable(source: Path, target: Path) -> None:
    """Copy the files that this user may read, and what links lead to."""
    for directory, _, names in os.walk(source):
        place = target / Path(directory).relative_to(source)
        place.mkdir(parents=True, exist_ok=True)
        for name in names:
            with contextlib.suppress(OSError):
                shutil.copy(Path(directory, name), place / name)


# ---- running ----


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """The tree and the hooks."""

    directory: Path
    """With both in ``build``; links that scripts made there are not followed."""
    ids: Ids
    """The sandbox's, whom they belong to; of a copy from the appliance those that are not the user's do."""
    is_copy: bool = False


@contextlib.contextmanager
def open_host(host: Host, content: Content) -> Iterator[Inside]:
    """The host, to run scripts over *content*.

    At the end everything that was started has ended, and all files have the owners they are to have.

    Raises:
        ApplianceError: it does not start.
    """
    try:
        with _first_process(host, content) as inside:
            yield inside
        if not content.is_copy:
            _give_owners(host, content, "tree", [f"{host.facts.build_dir}/{name}" for name in _NAMES])
    except BaseException:
        with shielded(), contextlib.suppress(ApplianceError, ToolError):
            _give_owners(host, content, "cache", [host.facts.image_cache])
        raise
    # The last step: processes of the sandbox are at work in the tree still.
    _give_owners(host, content, "cache", [host.facts.image_cache])


def _give_owners(host: Host, content: Content, kind: str, directories: Sequence[str]) -> None:
    command = ["/usr/bin/python3", "-I", "-S", f"{contract.GUEST}/guest/host-owners.py", kind, *directories]
    with _first_process(host, content) as inside:
        inside.run(command, PROCESS_ENVIRONMENT, "/").check("giving the files of extra-data.d their owners")


@contextlib.contextmanager
def _first_process(host: Host, content: Content) -> Iterator[Inside]:
    places = {
        "network": host.network,
        "runner": str(host.runner),
        "build": host.facts.build_dir,
        "content": str(content.directory),
        "temporary": str(host.directory / "tmp"),
        "cache": host.facts.image_cache,
        "shown": list(host.shown),
        "sockets": list(host.sockets),
        "files": dict(host.files),
    }
    with inside_namespace([json.dumps(places)], host.directory, "host-init.py") as inside:
        content.ids.map_as_user(inside.process.pid)
        inside.send(b"go")
        inside.expect("ready")
        yield inside


# ---- a tree in the appliance ----


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """The tree of an appliance, and when it was copied here."""

    content: Content
    archive: Path
    begun: str


def copy_from(host: Host, appliance: Appliance) -> Copy:
    """Copy the tree and the hooks to the host.

    Raises:
        ApplianceError: they cannot be packed, or there is no space.
    """
    _in_appliance(appliance, "pack", _ARCHIVE, contract.BUILD_DIR, *_NAMES).check("packing the tree")
    archive = host.directory / "tree.tar"
    # Scripts of the tree can still be at work, and what they write to has any length, out of holes.
    appliance.download(_ARCHIVE, archive, limit_bytes=BUILD_DISK_BYTES)
    content = Content(directory=host.directory / "content", ids=find_ids(), is_copy=True)
    for name in _NAMES:
        (content.directory / "build" / name).mkdir(parents=True)
    before = f"/tmp/{_BEFORE}"  # noqa: S108 - the phase's own
    unpacked = _on_archive(host, content, archive, "unpack", host.facts.build_dir, before)
    unpacked.check("unpacking the tree on the host")
    # Where no script can write.
    (host.directory / "tmp" / _BEFORE).rename(host.runner / _BEFORE)
    return Copy(content=content, archive=archive, begun=unpacked.tail.splitlines()[-1])


def copy_back(host: Host, copy: Copy, appliance: Appliance) -> None:
    """Change the tree and the hooks in the appliance as their copy was changed.

    Raises:
        ApplianceError: it cannot be done.
    """
    # A name that no script knows, which could have left something there.
    out = Path("/tmp", secrets.token_hex(12))  # noqa: S108 - the phase's own
    words = ("changes", host.facts.build_dir, f"{contract.GUEST}/{_BEFORE}", copy.begun, str(out))
    _on_archive(host, copy.content, copy.archive, *words).check("packing what has changed on the host")
    for name, target in (("changes.tar", _ARCHIVE), ("removed", _REMOVED)):
        appliance.upload(host.directory / "tmp" / out.name / name, target)
    applied = _in_appliance(appliance, "apply", _ARCHIVE, _REMOVED, contract.BUILD_DIR, *_NAMES)
    applied.check("taking over what has changed on the host")


def _in_appliance(appliance: Appliance, *words: str) -> JobResult:
    environment = {"PATH": contract.SYSTEM_PATH, "LC_ALL": "C"}
    return appliance.run([f"{contract.GUEST}/guest/host-tree.sh", *words], environment, "/")


def _on_archive(host: Host, content: Content, archive: Path, *words: str) -> JobResult:
    """Run host-tree.sh with *archive* on its standard input."""
    text = job_text([f"{contract.GUEST}/guest/host-tree.sh", *words], PROCESS_ENVIRONMENT, "/")
    tail = Tail()
    with _first_process(host, content) as inside, archive.open("rb") as stream:
        return JobResult(exit_status=inside.run_text(text, stream.fileno(), tail.add), tail=tail.text())
