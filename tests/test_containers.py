# SPDX-License-Identifier: Apache-2.0
"""DIB's element containerfile, with podman in the guest; its base is a tree of ours, for there is no registry."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

import pytest

from helpers import ISOLATIONS, files_in_image, make_element, skip_without, virt_dib
from virt_dib import prerequisites
from virt_dib.errors import ElementError
from virt_dib.plan import make_plan
from virt_dib.spec import BuildSpec

_STATIC = (Path("/bin/busybox"), Path("/usr/bin/busybox"))
CONTAINERFILE = """FROM scratch
ADD rootfs.tar /
RUN ["/bin/busybox", "--install", "-s", "/bin"]
RUN echo made by RUN >/etc/made
COPY --chown=12:34 copied /etc/copied
"""


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """A directory for podman build, with ``Containerfile`` in it."""
    directory = tmp_path / "context"
    directory.mkdir()
    busybox = next(path for path in _STATIC if path.exists())
    with tarfile.open(directory / "rootfs.tar", "w") as tar:
        for name in ("bin", "etc", "tmp", "dev", "proc", "sys", "var", "var/log", "root", "run"):
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(member)
        for program in ("busybox", "sh"):
            with busybox.open("rb") as stream:
                member = tar.gettarinfo(arcname=f"bin/{program}", fileobj=stream)
                member.mode, member.uid, member.gid = 0o755, 0, 0
                tar.addfile(member, stream)
    (directory / "copied").write_text("copied\n")
    (directory / "Containerfile").write_text(CONTAINERFILE)
    return directory


@pytest.mark.parametrize(
    "isolation",
    [pytest.param(name, marks=pytest.mark.appliance if name == "sandbox" else pytest.mark.full) for name in ISOLATIONS],
)
def test_podman_makes_the_tree(context: Path, tmp_path: Path, isolation: str) -> None:
    skip_without(isolation)
    arguments: list[str | Path] = [
        "--isolation", isolation, "--no-network", "--skip-base", "--formats", "raw", "--size", "600M", "--name", "c",
        "--envvar", f"DIB_CONTAINERFILE_DOCKERFILE={context}/Containerfile",
        "--envvar", f"DIB_CONTAINER_CONTEXT={context}", "containerfile",
    ]  # fmt: skip
    run = virt_dib(arguments, cwd=tmp_path)
    assert run.exit_status == 0, run.stdout + run.stderr
    files = files_in_image(tmp_path / "c.raw")
    assert files.text("/etc/made") == "made by RUN\n"
    assert files.text("/etc/copied") == "copied\n"
    assert {"busybox", "ls"} <= set(files.names("/bin"))
    assert "LABEL=cloudimg-rootfs" in files.text("/etc/fstab")


def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *elements: str, **variables: str) -> ElementError:
    monkeypatch.setattr(prerequisites, "require_prerequisites", list)
    make_element(tmp_path / "elements", "docker", {"root.d/08-docker": "#!/bin/bash\n"}, provides=["operating-system"])
    (tmp_path / "work").mkdir()
    spec = BuildSpec(
        name="x", output_dir=tmp_path, elements=elements, element_paths=(tmp_path / "elements",), skip_base=True,
        variables=variables,
    )  # fmt: skip
    with pytest.raises(ElementError) as caught:
        make_plan(spec, tmp_path / "work", host_environment={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"})
    return caught.value


def test_the_element_docker_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(tmp_path, monkeypatch, "docker")
    assert str(error).startswith("element 'docker' starts containers with docker, whose daemon")
    assert "'containerfile' with podman" in str(error.problems[0].hint)


def test_docker_for_a_containerfile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(tmp_path, monkeypatch, "containerfile", DIB_CONTAINERFILE_RUNTIME="docker")
    assert str(error).startswith("element 'containerfile' starts containers with docker")
