# SPDX-License-Identifier: Apache-2.0
"""What is made of the archive of a tree: compressed, as squashfs, as an image for containers.

The archive comes out of the guest, and may be anything. Here it is passed on as bytes; the one program of ours
that reads it can reach nothing but the archive and its own output.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from virt_dib import layout, tools
from virt_dib.errors import Problem, ToolError
from virt_dib.tools import Command

_ENGINE_TIMEOUT_S = 60.0
_IMAGE_ID = re.compile(r"(?:sha256:)?[0-9a-f]{64}")
_PLATFORMS = {
    "aarch64": ("arm64", ""), "armel": ("arm", "v5"), "armhf": ("arm", "v7"), "i386": ("386", ""),
    "mips64el": ("mips64le", ""), "mipsel": ("mipsle", ""), "ppc64el": ("ppc64le", ""), "x86_64": ("amd64", ""),
}  # fmt: skip
"""Architecture and variant in the words of containers, where they are not those of Debian or of the kernel."""
_UNCONFINED_DIRS = ("/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")


# ---- files ----


def gzip(archive: Path, target: Path) -> Command:
    """Compress with pigz, which uses all processors, or gzip."""
    program = tools.find("pigz") or tools.require("gzip", purpose="compress archives", package="gzip")
    return Command(words=[program, "-n", "-c"], stdin=archive, stdout=target)


def squashfs(archive: Path, target: Path) -> Command:
    """Make a squashfs, compressed with xz, in a process that sees the system's programs and *target* alone."""
    target.touch()
    script = "/make-squashfs.py"
    words: list[str | Path] = [
        "--ro-bind",
        layout.guest_script("make-squashfs.py"),
        script,
        "--bind",
        target,
        "/squashfs",
    ]
    return Command(words=[*_confined(*words), "/usr/bin/python3", "-I", "-S", script, "/squashfs"], stdin=archive)


def confinement_problem() -> Problem | None:
    """What keeps :func:`squashfs` from working on this host, besides programs that are not installed."""
    if tools.find("bwrap") is None:
        return None
    result = tools.run([*_confined(), "true"], doing="trying bwrap", check=False)
    if result.exit_status == 0:
        return None
    said = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
    return Problem(
        f"bwrap does not work here, needed to keep what makes the squashfs from the host: {said}",
        "allow user namespaces to this user, or leave out the format squashfs",
    )


def _confined(*words: str | Path) -> list[str | Path]:
    bwrap = tools.require("bwrap", purpose="read what comes out of the guest", package="bubblewrap")
    shown = [word for place in _UNCONFINED_DIRS for word in ("--ro-bind-try", place, place)]
    return [
        bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv",
        "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "LC_ALL", "C", "--ro-bind", "/usr", "/usr", *shown,
        "--dev", "/dev", "--proc", "/proc", *words, "--chdir", "/", "--",
    ]  # fmt: skip


# ---- images for containers ----


def image_name(name: str, docker_target: str | None) -> str:
    """What an image for containers is called: as the user says, or as much of *name* as may be."""
    if docker_target is not None:
        return docker_target
    word = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{word or 'image'}:latest"


def write_oci(archive: Path, layer: Path, target: Path, *, name: str, arch: str, created_by: str) -> None:
    """An OCI archive of one layer: *layer* is the *archive*, compressed by gzip (OCI image specification 1.0).

    Raises:
        ToolError: a digest cannot be computed.
    """
    digests = sha256_of({"the layer": layer, "the archive": archive})
    architecture, variant = _platform(arch)
    created = datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
    config = _json({
        "created": created,
        "architecture": architecture,
        **({"variant": variant} if variant else {}),
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digests['the archive']}"]},
        "history": [{"created": created, "created_by": created_by}],
    })  # fmt: skip
    manifest = _json({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _descriptor("application/vnd.oci.image.config.v1+json", config),
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": f"sha256:{digests['the layer']}",
            "size": layer.stat().st_size,
        }],
    })  # fmt: skip
    index = _descriptor("application/vnd.oci.image.manifest.v1+json", manifest)
    index["annotations"] = {"org.opencontainers.image.ref.name": name}
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as made:
        _add(made, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        _add(made, "index.json", _json({"schemaVersion": 2, "manifests": [index]}))
        for blob in (manifest, config):
            _add(made, f"blobs/sha256/{_sha256(blob)}", blob)
        with layer.open("rb") as stream:
            made.addfile(_member(f"blobs/sha256/{digests['the layer']}", layer.stat().st_size), stream)


def sha256_of(files: Mapping[str, Path]) -> dict[str, str]:
    """The digests of several files, computed at the same time. Their keys name them in errors.

    Raises:
        ToolError: one cannot be read.
    """
    return {name: sums["sha256"] for name, sums in sums_of(files, ("sha256",)).items()}


def sums_of(files: Mapping[str, Path], kinds: Sequence[str]) -> dict[str, dict[str, str]]:
    """The checksums of several files, by name and kind (``md5``, ``sha256``), computed at the same time.

    Raises:
        ToolError: one cannot be read.
    """
    wanted = {(name, kind): f"computing the {kind} of {name}" for name in files for kind in kinds}
    programs = {kind: tools.require(f"{kind}sum", purpose="compute checksums", package="coreutils") for kind in kinds}
    commands = {doing: Command(words=[programs[kind]], stdin=files[name]) for (name, kind), doing in wanted.items()}
    results = tools.run_together(commands)
    return {name: {kind: results[wanted[name, kind]].stdout.split()[0] for kind in kinds} for name in files}


def _platform(arch: str) -> tuple[str, str]:
    return _PLATFORMS.get(arch, (arch, ""))


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _descriptor(media_type: str, blob: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": f"sha256:{_sha256(blob)}", "size": len(blob)}


def _member(name: str, size_bytes: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size_bytes
    member.mode = 0o644
    return member


def _add(made: tarfile.TarFile, name: str, data: bytes) -> None:
    made.addfile(_member(name, len(data)), io.BytesIO(data))


# ---- engines for containers ----


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """docker or podman, and how to call it."""

    name: str
    command: tuple[str, ...]

    def load(self, archive: Path, arch: str) -> Imported:
        """Import the archive of a tree as an image that has no name yet.

        Raises:
            ToolError: the engine refuses it.
        """
        architecture, variant = _platform(arch)
        if self.name == "docker":
            platform = ["--platform", "/".join(["linux", architecture, *([variant] if variant else [])])]
        else:
            platform = ["--quiet", "--os", "linux", "--arch", architecture]
            platform += ["--variant", variant] if variant else []
        doing = f"importing the image to {self.name}"
        said = self._run("import", *platform, archive, doing=doing).split()
        if not said or not _IMAGE_ID.fullmatch(said[-1]):
            raise ToolError(
                f"{doing}: it gives no image, but says {' '.join(said)[-200:]!r}",
                hint=f"see whether {' '.join(self.command)} import works by itself",
            )
        return Imported(engine=self, image_id=said[-1])

    def tag(self, image_id: str, target: str) -> None:
        """Give an image a name.

        Raises:
            ToolError: the engine refuses it.
        """
        self._run("tag", image_id, target, doing=f"naming the image '{target}'")

    def remove(self, image_id: str) -> None:
        """Forget an image."""
        self._run("rmi", image_id, doing="removing the imported image", check=False)

    def _run(self, *words: str | Path, doing: str, check: bool = True) -> str:
        # As the user calls it: variables say where it is.
        return tools.run([*self.command, *words], doing=doing, environment=os.environ, check=check).stdout


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """An image that an engine has, without a name."""

    engine: Engine
    image_id: str

    def tag(self, target: str) -> None:
        """Give it its name.

        Raises:
            ToolError: the engine refuses it.
        """
        self.engine.tag(self.image_id, target)

    def remove(self) -> None:
        """Have the engine forget it."""
        self.engine.remove(self.image_id)


def find_engine() -> Engine | None:
    """The engine to use: docker if it answers, to sudo if not to this user, otherwise podman if it works."""
    docker, sudo, podman = map(tools.find, ("docker", "sudo", "podman"))
    candidates: list[tuple[str, list[str], list[str]]] = []
    if docker is not None:
        server = ["version", "--format", "{{.Server.Version}}"]
        candidates.append(("docker", [str(docker)], server))
        # Not where it would ask for a password.
        candidates += [("docker", [str(sudo), "-n", str(docker)], server)] if sudo is not None else []
    if podman is not None:
        candidates.append(("podman", [str(podman)], ["info"]))
    for name, command, question in candidates:
        with contextlib.suppress(ToolError):  # it hangs
            asked = tools.run(
                [*command, *question],
                doing=f"asking {name}",
                environment=os.environ,
                timeout_s=_ENGINE_TIMEOUT_S,
                check=False,
            )
            if asked.exit_status == 0:
                return Engine(name=name, command=tuple(command))
    return None
