# SPDX-License-Identifier: Apache-2.0
"""Networks of namespaces: they lead where the user's own programs get, but not to services on the host's loopback."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from virt_dib import tools
from virt_dib.errors import ApplianceError, PrerequisiteError, Problem, ToolError
from virt_dib.interrupts import check_cancelled
from virt_dib.namespaces import PROCESS_ENVIRONMENT, init_command, inside_namespace, map_user

NAMESERVER = "10.0.2.3"
"""slirp4netns's own, which asks those of the host; pasta is told to have one there too."""

_READY = "1"
"""The line that slirp4netns prints then."""
_TIMEOUT_S = 60.0
_POLL_S = 0.01


@contextlib.contextmanager
def detached_program(program: Path, directory: Path) -> Iterator[Path]:
    """A program that is *program* in a network of its own, for as long as the block takes; its file is in *directory*.

    For qemu, whose own user network leads the guest to services on the host's loopback.

    Raises:
        PrerequisiteError: this host lacks what it takes.
        ToolError: the kernel refuses it, or *directory* does not allow programs.
        ApplianceError: as ToolError.
    """
    nsenter = tools.require("nsenter", purpose="have a network of its own", package="util-linux")
    _require_exec(directory)
    resolver = directory / "resolv.conf"
    resolver.write_text(f"nameserver {NAMESERVER}\n")
    with inside_namespace(["net", str(resolver)], directory) as inside:
        map_user(inside.process.pid)
        inside.send(b"go")
        inside.expect("ready")
        with connected(inside.process.pid):
            # The same length each time: libguestfs knows programs by it.
            target = f"--target={inside.process.pid:010}"
            enter = (nsenter, "--preserve-credentials", "--user", "--mount", "--net", target)
            yield _wrapped(program, directory, *enter, *_without_rights())


def _without_rights() -> list[str | Path]:
    """The beginning of a command that has no rights over the namespace where its user is root."""
    if os.geteuid() == 0:
        return []
    setpriv = tools.require("setpriv", purpose="give up rights over a network", package="util-linux")
    return [setpriv, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]


def bare_program(program: Path, directory: Path) -> Path:
    """As :func:`detached_program`, but in the network of this process.

    Raises:
        ToolError: *directory* does not allow programs.
    """
    _require_exec(directory)
    return _wrapped(program, directory)


def _require_exec(directory: Path) -> None:
    if os.statvfs(directory).f_flag & os.ST_NOEXEC:
        raise ToolError(f"no program can be started in '{directory}', which is mounted with noexec")


def _wrapped(program: Path, directory: Path, *before: str | Path) -> Path:
    """A file in *directory* that is *program* behind the words *before*, in an environment without secrets."""
    wrapper = directory / program.name
    tools.bare_program(wrapper, program, *before)
    # libguestfs takes it for another program when its date is another one.
    date_ns = program.stat().st_mtime_ns
    os.utime(wrapper, ns=(date_ns, date_ns))
    return wrapper


def _program() -> Path | None:
    return tools.find("slirp4netns") or tools.find("pasta")


_NO_PROGRAM = Problem(
    "neither 'slirp4netns' nor 'pasta' found, needed for a network apart from this host's",
    "install one: apt-get install slirp4netns (or passt), or build with --no-network",
)


def problem() -> Problem | None:
    """What keeps namespaces on this host from a network, or None."""
    return _NO_PROGRAM if _program() is None else None


@contextlib.contextmanager
def connected(process: int) -> Iterator[None]:
    """Connect the network namespace of *process* to the world, but not to services on the host's loopback.

    Raises:
        PrerequisiteError: there is no program that does it.
        ApplianceError: it fails.
    """
    program = _program()
    if program is None:
        raise PrerequisiteError.of([_NO_PROGRAM])
    if program.name == "pasta":
        none = [word for option in ("-t", "-u", "-T", "-U") for word in (option, "none")]
        command = [
            *init_command(),
            "guard",
            str(program),
            "--runas",
            str(os.geteuid()),
            "--foreground",
            "--config-net",
            "--no-map-gw",
            *none,
        ]
        command += ["--dns-forward", NAMESERVER, str(process)]
    else:
        command = [str(program), "--configure", "--mtu=65520", "--disable-host-loopback", "--enable-sandbox"]
        command += ["--enable-seccomp", "--exit-fd=0", "--ready-fd=1", str(process), "tap0"]
    reader, writer = os.pipe()
    with contextlib.ExitStack() as stack, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        # Its other end closes with this process, however that ends, and ends the program.
        stack.callback(os.close, writer)
        try:
            running = stack.enter_context(
                tools.started(
                    command,
                    environment=PROCESS_ENVIRONMENT,
                    stdin=reader,
                    stdout=output.fileno(),
                    stderr=errors.fileno(),
                )
            )
        finally:
            os.close(reader)
        deadline = time.monotonic() + _TIMEOUT_S
        # slirp4netns can still fail when it has made the route; it says when it is ready.
        is_slirp = program.name == "slirp4netns"
        while not (_READY in _lines(output) if is_slirp else _has_route(process)):
            if running.poll() is not None or time.monotonic() > deadline:
                said = _lines(errors) or _lines(output) or ["it does not say why"]
                raise ApplianceError(
                    f"making a network with '{program}': {' / '.join(said[-2:])}",
                    hint="build with --no-network, if it needs none",
                )
            check_cancelled()
            time.sleep(_POLL_S)
        yield


def _lines(output: IO[bytes]) -> list[str]:
    output.seek(0)
    return output.read().decode(errors="replace").strip().splitlines()


def _has_route(process: int) -> bool:
    """Whether the network namespace of *process* has a default route (proc(5), net/route)."""
    try:
        routes = Path(f"/proc/{process}/net/route").read_text().splitlines()[1:]
    except OSError:
        return False
    return any(fields[1] == "00000000" for fields in (line.split() for line in routes))
