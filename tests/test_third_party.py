# SPDX-License-Identifier: Apache-2.0
"""Elements that others publish on PyPI, and ramdisks of Debian: ``make test-full``. Needs the network."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from dib_releases import pip
from test_debian import as_ordinary_user, mirrors
from virt_dib import dib, elements, environment, hooks, kvm, tools
from virt_dib.boot import boot_kernel
from virt_dib.plan import make_plan
from virt_dib.spec import BuildSpec

pytestmark = pytest.mark.full

_BUILD_TIMEOUT_S = 5400
REPOSITORIES = {
    "ironic-python-agent-builder": "share/ironic-python-agent-builder/dib",
    "sahara-image-elements": "share/sahara-elements/elements",
    "tripleo-image-elements": "share/tripleo-image-elements",
}
"""Where ``pip install`` puts the elements (docs/ramdisks.md)."""
PACKAGES = {
    "ironic-python-agent-builder==7.4.0": "2d4139d307f378af705861b04c94522ff272e0a5711780c608251274c8225f4c",
    "sahara-image-elements==19.0.0": "4ada3cbbad5cf1b8978a4e06026e9558012023b75534c1448048a4e1611da853",
    "tripleo-image-elements==15.0.0": "227790563b959c58926eac72a0d1a74784fe52b0c14dbc9005c45456426a024b",
}
"""As ``dib_releases.pip`` wants them."""
SAMPLES = {
    "ironic-python-agent-builder": ("ironic-python-agent-ramdisk", "extra-hardware", "ironic-python-agent-tls"),
    "sahara-image-elements": ("hadoop-cloudera", "spark", "s3_hadoop", "openjdk"),
    "tripleo-image-elements": ("os-collect-config", "openvswitch", "overcloud-secure", "interface-names"),
}


@pytest.fixture(scope="module", params=REPOSITORIES)
def repository(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a package, and the directory of its elements."""
    return request.param, installed(request.param, tmp_path_factory.mktemp("repository"))


def installed(package: str, prefix: Path) -> Path:
    pinned = {wanted: digest for wanted, digest in PACKAGES.items() if wanted.startswith(f"{package}==")}
    pip(["install", "--prefix", prefix], pinned)
    return prefix / REPOSITORIES[package]


def test_every_element_is_found_and_goes_with_an_operating_system(repository: tuple[str, Path], tmp_path: Path) -> None:
    available = elements.discover([repository[1], dib.find_installation(None).elements_dir])
    own = sorted(name for name, element in available.items() if element.path.parent == repository[1])
    assert len(own) > 7
    for name in own:
        chosen = elements.resolve(["base", "debian-minimal", name], available)
        tree = hooks.compose(chosen, tmp_path / name, excluded_scripts=frozenset())
        assert name in {element.name for element in chosen}
        assert tree.owners


def test_a_sample_of_elements_is_planned(repository: tuple[str, Path], tmp_path: Path) -> None:
    package, directory = repository
    spec = BuildSpec(
        name="x",
        output_dir=tmp_path,
        elements=("debian-minimal", "vm", "block-device-efi", *SAMPLES[package]),
        element_paths=(directory,),
    )
    (tmp_path / "work").mkdir()
    plan = make_plan(spec, tmp_path / "work", host_environment={})
    assert {element.name for element in plan.elements} >= set(SAMPLES[package])
    assert (plan.no_image is not None) == (package == "ironic-python-agent-builder")


# ---- real builds ----


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="virt-dib-test-", dir="/var/tmp") as name:
        yield Path(name)


def build(directory: Path, *arguments: str | Path) -> None:
    tools.run(
        [
            *as_ordinary_user(directory, "sandbox"), sys.executable, "-m", "virt_dib", "--isolation", "sandbox",
            "--name", "r", *mirrors(), *arguments, "debian-minimal",
        ],
        doing="building a ramdisk of Debian",
        cwd=directory,
        environment={"HOME": str(directory), "PATH": "/usr/bin:/bin", "TMPDIR": str(directory)},
        timeout_s=_BUILD_TIMEOUT_S,
    )  # fmt: skip
    assert {path.name for path in directory.glob("r.*")} == {"r.d", "r.log"}


def boots(directory: Path, expect: str) -> None:
    verdict = kvm.choose(kernel=None, cache_dir=directory)
    result = boot_kernel(
        directory / "r.d/r.kernel",
        directory / "r.d/r.initramfs",
        expect=expect,
        memory_mib=3072,
        timeout_s=1800,
        accelerate=verdict.acceleration is kvm.Acceleration.KVM,
    )
    assert result.passed, "\n".join([result.reason, *result.last_lines])


RAMDISKS: Mapping[str, tuple[list[str], str]] = {
    # The init script of DIB's 'ramdisk-base' says so, then each part of it what it does.
    "ramdisk": ([], r"^load modules$"),
    "dracut-ramdisk": (
        [
            # It wants a package that Debian has under another name, and Python 2.
            *("--exclude-element", "deploy-targetcli", "deploy-tgtadm"),
            *("--extra-packages", "net-tools,iputils-ping,procps"),
        ],
        r"network ready",
    ),
}


@pytest.mark.parametrize("element", RAMDISKS)
def test_a_ramdisk_of_debian_reaches_its_init(element: str, directory: Path) -> None:
    more, expect = RAMDISKS[element]
    # Its source is for Ubuntu; on Debian it is only fetched.
    (directory / "dracut.tar.xz").touch()
    source = f"DIB_REPOLOCATION_dracut=file://{directory}/dracut.tar.xz"
    build(directory, "--ramdisk", "--ramdisk-element", element, "--envvar", source, *more)
    boots(directory, expect)


def test_elements_of_ironic_python_agent_builder_make_a_ramdisk(directory: Path) -> None:
    path = installed("ironic-python-agent-builder", directory / "python")
    # Compressed in the appliance, which may be emulated.
    quick = ["--envvar", "DIB_IPA_COMPRESS_CMD=gzip -1"]
    build(directory, "-p", path, "--envvar", "DIB_CHECKSUM=sha256", *quick, "ironic-ramdisk-base")
    names = {name.split("  ")[1] for name in (directory / "r.d/r.sha256").read_text().splitlines()}
    assert names == {"r.kernel", "r.initramfs"}
    tools.run(["sha256sum", "--check", "r.sha256"], doing="checking the sums", cwd=directory / "r.d")
    assert 'DIB_CHECKSUM="sha256"' in (directory / "r.d/dib-manifests/dib_environment").read_text()
    boots(directory, r"login:")


# ---- ironic-python-agent-builder itself ----

AGENT_BUILDER = "ironic-python-agent-builder==7.4.0"
SOURCES = {"ironic_python_agent": "ironic-python-agent", "glean": "glean"}
"""What its elements clone, by their names for it, and the packages on PyPI that have the same."""
SOURCE_PACKAGES = {
    "glean==1.25.1": "7f383c2de83ecb4a460f2f74fd12c678e2d780a2f978a4e223117e6360680e10",
    "ironic-python-agent==13.0.0": "378a6c3a210698a3114245d41bea759b83297827174638b4dffc4685d18a59d1",
}
"""Their source distributions."""
STARTED = r"Started .*(?:ironic-python-agent|Ironic Python Agent)"


@dataclass(frozen=True, kw_only=True)
class Caller:
    """An ordinary user who builds ramdisks with it, in a directory of their own."""

    directory: Path
    become: Sequence[str]

    @classmethod
    def at(cls, directory: Path) -> Caller:
        return cls(directory=directory, become=as_ordinary_user(directory, "sandbox"))

    @property
    def environment(self) -> dict[str, str]:
        """Where our commands come first."""
        places = [self.directory / "links", self.directory / "venv/bin", "/usr/bin", "/bin"]
        return {
            "HOME": str(self.directory),
            "PATH": ":".join(map(str, places)),
            "TMPDIR": str(self.directory),
            "VIRT_DIB_ISOLATION": "sandbox",
        }

    def run(self, *command: str | Path, variables: Mapping[str, str] | None = None, timeout_s: float = 1800) -> str:
        result = tools.run(
            [*self.become, *command],
            doing=f"running {Path(command[0]).name}",
            cwd=self.directory,
            environment={**self.environment, **(variables or {})},
            timeout_s=timeout_s,
        )
        return result.stdout

    def prepare(self) -> dict[str, str]:
        """Install it as its documentation says, link our commands, make repositories; give variables that name them."""
        # How this host reaches packages is no business of the build.
        variables = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        self.run(sys.executable, "-m", "venv", "venv")
        self.run("venv/bin/pip", "install", "--quiet", AGENT_BUILDER, variables=variables)
        self.run(Path(sys.executable).parent / "virt-dib-links", "links")
        pip(["download", "--no-binary=:all:", "-d", self.directory / "sdists"], SOURCE_PACKAGES)
        repositories = {name: self._repository(package) for name, package in SOURCES.items()}
        repositories["requirements"] = self._repository("requirements")
        named = {f"DIB_REPOLOCATION_{name}": str(path) for name, path in repositories.items()}
        return named | {f"DIB_REPOREF_{name}": "master" for name in repositories}

    def _repository(self, package: str) -> Path:
        """A git repository with what is in the source distribution of *package*, or with constraints alone."""
        path = self.directory / "repositories" / package
        self.run("mkdir", "-p", path)
        found = sorted((self.directory / "sdists").glob(f"{package.replace('-', '?')}-*.tar.gz"))
        if found:
            self.run("tar", "-xzf", found[0], "-C", path, "--strip-components=1")
        else:
            self.run("sh", "-c", 'echo "# nothing is constrained" >"$0/upper-constraints.txt"', path)
        git: list[str | Path] = ["git", "-C", path, "-c", "user.name=n", "-c", "user.email=n@example.org"]
        self.run("git", "init", "--quiet", "--initial-branch=master", path)
        self.run(*git, "add", "--all", "--force")
        self.run(*git, "commit", "--quiet", "--message=all")
        return path


def test_ironic_python_agent_builder_makes_a_ramdisk_in_which_the_agent_starts(directory: Path) -> None:
    caller = Caller.at(directory)
    variables = caller.prepare() | dict(word.split("=", 1) for word in mirrors()[1::2])
    printed = caller.run(
        "venv/bin/ironic-python-agent-builder",
        "-o",
        "ipa",
        "debian-minimal",
        variables=variables,
        timeout_s=_BUILD_TIMEOUT_S,
    )
    # Ours, since diskimage-builder's own builds elsewhere, and as root.
    assert f"Building in {environment.BUILD_DIR}\n" in printed
    assert {"ipa.kernel", "ipa.initramfs", "ipa.sha256"} <= set(os.listdir(directory))
    caller.run("sha256sum", "--check", "ipa.sha256")
    verdict = kvm.choose(kernel=None, cache_dir=directory)
    result = boot_kernel(
        directory / "ipa.kernel",
        directory / "ipa.initramfs",
        expect=STARTED,
        memory_mib=4096,
        timeout_s=3600,
        accelerate=verdict.acceleration is kvm.Acceleration.KVM,
    )
    assert result.passed, "\n".join([result.reason, *result.last_lines])
