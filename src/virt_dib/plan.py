# SPDX-License-Identifier: Apache-2.0
"""Everything that can be decided before the appliance starts, and everything wrong that can be known by then."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from virt_dib import (
    dib,
    drive,
    elements,
    extra_data,
    formats,
    hooks,
    image_cache,
    layout,
    online,
    ownership,
    prerequisites,
    releases,
    sandbox,
    tools,
)
from virt_dib import environment as contract
from virt_dib.dib import DibInstallation
from virt_dib.drive import Drive
from virt_dib.elements import Element
from virt_dib.errors import ElementError, PrerequisiteError, Problem, UsageError, VirtDibError
from virt_dib.files import HOST_IS_FULL
from virt_dib.formats import Format, TreeFormat
from virt_dib.hooks import HookTree
from virt_dib.image_cache import ImageCache
from virt_dib.layout import Layout
from virt_dib.outputs import longest_name
from virt_dib.releases import Rules
from virt_dib.scripts import Scripts
from virt_dib.spec import (
    DEFAULT_MEMORY_MIB,
    MOST_CPUS,
    BuildSpec,
    ExtraData,
    Phase,
    check_label,
    check_spec,
    check_texts,
)
from virt_dib.staging import HostFile, Staging, no_room, wanted_host_files

_T = TypeVar("_T")

_DOCKER_SCRIPT = Path("root.d", "08-docker")
"""Of DIB's element docker."""
_NO_IMAGE_ELEMENTS = ("no-final-image", "ironic-agent")
"""Elements that make something else of the tree: the first by DIB's rule, the second by virt-dib's, which is older."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan:
    """One build, decided."""

    spec: BuildSpec
    dib: DibInstallation
    elements: Sequence[Element]
    hooks: HookTree
    layout: Layout
    formats: Sequence[Format]
    no_image: str | None
    """What says that no image is to be written (contract section 1.8); there are no *formats* then."""
    staging: Staging
    drive: Drive | None
    image_cache: ImageCache | None
    facts: contract.Facts
    memory_mib: int
    cpus: int
    warnings: Sequence[str] = ()


def make_plan(
    spec: BuildSpec,
    workspace: Path,
    problems: Sequence[Problem] = (),
    *,
    in_sandbox: bool = False,
    host_environment: Mapping[str, str] | None = None,
) -> BuildPlan:
    """Decide the build of *spec*; the build disk's content is gathered in *workspace* on the way.

    *in_sandbox*: the host must have what a sandbox needs.

    Raises:
        VirtDibError: all that is wrong, *problems* that were found before first.
    """
    check_texts(spec)
    environ = dict(os.environ if host_environment is None else host_environment)
    found = _Findings(problems)
    if in_sandbox:
        found.add(sandbox.problems(network=spec.network))
        found.tell(lambda: _check_no_drive(spec))
    elif spec.extra_data is ExtraData.HOST:
        found.add(extra_data.problems())
    with _room(workspace):
        return _decide(spec, workspace, found, environ)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Choice:
    """What is to be built, of what is on this host."""

    dib: DibInstallation
    search_path: Sequence[Path]
    elements: Sequence[Element]
    formats: Sequence[Format]
    no_image: str | None
    drive: Drive | None
    host_files: Sequence[HostFile]
    certificates: online.Certificates | None


def _decide(spec: BuildSpec, workspace: Path, found: _Findings, environ: Mapping[str, str]) -> BuildPlan:
    choice = _choice(spec, workspace, found, environ)
    installation, chosen = choice.dib, choice.elements
    staging = Staging(workspace / "staging")
    tree = found.tell(lambda: _compose(spec, choice, staging))
    disk = _layout(spec, choice, workspace, found)
    found.stop()
    if tree is None or disk is None:
        raise AssertionError
    scripts = Scripts(tree, chosen, installation.rules, on_host=spec.extra_data is ExtraData.HOST)
    found.add(scripts.problems(), ElementError)
    _fill(staging, choice, disk)
    certificates = choice.certificates
    if certificates is not None:
        staging.write(os.path.relpath(contract.CERTIFICATES, contract.GUEST), certificates.text)
    on_host = found.tell(lambda: _on_host(spec, choice, environ, workspace))
    places = found.tell(lambda: staging.add_elements(chosen, choice.search_path))
    for file in choice.host_files:
        found.tell(functools.partial(staging.add_host_file, file))
    found.stop()
    if places is None:
        raise AssertionError
    facts = contract.Facts(
        spec=spec,
        elements=chosen,
        element_dirs=places,
        elements_path=_guest_search_path(len(choice.search_path), places),
        block_devices=disk.block_devices,
        host_environment=environ,
        rules=installation.rules,
        library=contract.LIBRARY if installation.in_package else f"{contract.PREFIX}/lib",
        python=_guest_python(installation.python),
        root_uuid=str(uuid.uuid4()),
        on_host=on_host,
        certificates=None if certificates is None else str(certificates.source),
    )
    found.add(contract.length_problems(facts), UsageError)
    found.stop()
    return BuildPlan(
        spec=spec,
        dib=installation,
        elements=chosen,
        hooks=tree,
        layout=disk,
        formats=choice.formats,
        no_image=choice.no_image,
        staging=staging,
        drive=choice.drive,
        image_cache=_image_cache(spec, workspace),
        facts=facts,
        memory_mib=spec.memory_mib or DEFAULT_MEMORY_MIB,
        cpus=spec.cpus or min(MOST_CPUS, os.cpu_count() or 1),
        warnings=(
            *scripts.warnings(),
            *(problem.message for problem in _without_effect(facts, tree)),
            *_warnings(facts, staging, environ),
            *(problem.message for problem in _shared_places(spec, workspace)),
        ),
    )


def _choice(spec: BuildSpec, workspace: Path, found: _Findings, environ: Mapping[str, str]) -> _Choice:
    """Look at everything that does not need the others to be right."""
    found.tell(lambda: check_spec(spec))
    found.tell(lambda: check_label(spec.root_label, spec.fs_type) if spec.root_label is not None else None)
    found.tell(lambda: _check_proxies(spec))
    found.add(prerequisites.require_prerequisites())
    outputs = found.tell(lambda: formats.select(spec.formats))
    directory = found.tell(lambda: _writable(spec.output_dir))
    helper = found.tell(lambda: drive.inspect(spec.drive, spec.drive_format) if spec.drive is not None else None)
    found.tell(lambda: _check_cache(spec, environ))
    installation = found.tell(lambda: dib.find_installation(spec.dib_library, spec.python))
    search_path = [*spec.element_paths, *([installation.elements_dir] if installation else [])]
    rules = installation.rules if installation else releases.NEWEST
    chosen = found.tell(lambda: _choose(spec, search_path, rules)) if installation else None
    if installation is None:
        found.tell(lambda: elements.discover(search_path))
    found.tell(lambda: _check_containers(spec, chosen or ()))
    no_image = _no_image(spec, chosen or ())
    if outputs is not None and no_image is not None:
        # DIB writes archives of the tree all the same.
        outputs = () if spec.drop_in is None else tuple(one for one in outputs if isinstance(one, TreeFormat))
    if directory is not None:
        found.tell(lambda: _check_places(spec, outputs or ()))
    found.add(prerequisites.format_problems(outputs or ()))
    found.tell(lambda: formats.check_spec(outputs or (), spec))
    found.tell(lambda: formats.check_options(outputs or (), spec, workspace / "options"))
    found.tell(lambda: layout.check_numbers(spec, rules))
    host_files = found.tell(lambda: wanted_host_files({**environ, **spec.variables}, chosen or (), _home(environ)))
    certificates = found.tell(lambda: online.host_certificates(environ)) if _trusts_host(spec) else None
    found.stop()
    if chosen is None or installation is None or outputs is None or host_files is None:
        raise AssertionError
    return _Choice(
        dib=installation,
        search_path=search_path,
        elements=chosen,
        formats=outputs,
        no_image=no_image,
        drive=helper,
        host_files=host_files,
        certificates=certificates,
    )


def _compose(spec: BuildSpec, choice: _Choice, staging: Staging) -> HookTree:
    return hooks.compose(
        choice.elements,
        staging.hooks_dir,
        excluded_scripts=spec.excluded_scripts,
        search_path=choice.search_path,
    )


def _layout(spec: BuildSpec, choice: _Choice, workspace: Path, found: _Findings) -> Layout | None:
    rules = choice.dib.rules
    disk = found.tell(lambda: layout.prepare(spec, choice.elements, choice.dib, workspace / "block-device"))
    if disk is not None:
        # With the file system that the elements have chosen, now, not after an hour.
        found.tell(lambda: layout.image_size_kib(spec, choice.elements, disk.block_devices.root_fstype, 0, rules))
        found.tell(lambda: layout.mkfs_options(spec, disk.block_devices.root_fstype, rules))
        found.add(prerequisites.file_system_problems(disk.file_systems))
    return disk


def _on_host(spec: BuildSpec, choice: _Choice, environ: Mapping[str, str], workspace: Path) -> contract.OnHost | None:
    if spec.extra_data is not ExtraData.HOST:
        return None
    return extra_data.find_on_host(
        spec,
        choice.dib,
        choice.elements,
        search_path=choice.search_path,
        environ=environ,
        workspace=workspace,
    )


def find_elements(spec: BuildSpec) -> Mapping[str, Element]:
    """All elements that *spec* could name, on its search path.

    Raises:
        VirtDibError: there is no diskimage-builder, or a directory of the search path cannot be read.
    """
    installation = dib.find_installation(spec.dib_library, spec.python)
    found = elements.discover([*spec.element_paths, installation.elements_dir], installation.rules)
    return {name: element for name, element in found.items() if elements.is_name(name)}


@contextlib.contextmanager
def _room(workspace: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in HOST_IS_FULL:
            raise
        raise no_room(workspace) from error


def _writable(directory: Path) -> Path:
    if not os.access(directory, os.W_OK | os.X_OK):
        reason = "no right to write in it" if os.path.exists(directory) else "it does not exist"
        raise UsageError(
            f"cannot write the image in '{os.path.abspath(directory)}': {reason}",
            hint="build in a directory you can write, or name another with --name DIRECTORY/NAME",
        )
    return directory


def _check_places(spec: BuildSpec, outputs: Sequence[Format]) -> None:
    """Refuse now what would keep the finished files from their names.

    Raises:
        UsageError: all that stands in their way.
    """
    directory = spec.output_dir
    hint = "move it away, or give another --name"
    images = [formats.file_name(spec, output) for output in outputs if output.is_file]
    sums = [f"{name}.{kind}" for name in images for kind in spec.checksums]
    names = [*([f"{spec.name}.log"] if spec.drop_in is None else []), *images, *sums]
    _type(directory / longest_name(spec, names, images))
    problems = [
        Problem(f"cannot write '{directory / name}': a directory is in its place", hint)
        for name in names
        if _type(directory / name) == stat.S_IFDIR
    ]
    files = directory / f"{spec.name}.d"
    if _type(files) not in (None, stat.S_IFDIR):
        problems.append(Problem(f"cannot write the directory '{files}': a file or link is in its place", hint))
    if problems:
        raise UsageError.of(problems)


def _check_no_drive(spec: BuildSpec) -> None:
    if spec.drive is not None:
        raise UsageError(
            "cannot use --drive with --isolation sandbox: only the appliance can mount it",
            hint="build with --isolation vm; or have the cache in a directory of the host: --image-cache DIR",
        )


def _image_cache(spec: BuildSpec, workspace: Path) -> ImageCache | None:
    """What the scripts in the guest are to get a copy of."""
    if spec.image_cache is None or (spec.drive is not None and spec.extra_data is ExtraData.HOST):
        return None
    return ImageCache(spec.image_cache, workspace)


def _home(environ: Mapping[str, str]) -> Path | None:
    return Path(environ["HOME"]) if environ.get("HOME") else None


def _check_cache(spec: BuildSpec, environ: Mapping[str, str]) -> None:
    if spec.image_cache is None:
        return
    if "DIB_IMAGE_CACHE" in spec.variables:
        raise UsageError(
            "cannot use both --image-cache and the variable DIB_IMAGE_CACHE",
            hint="leave out --envvar DIB_IMAGE_CACHE: with --image-cache the elements find the cache anyway",
        )
    image_cache.check(spec.image_cache, _home(environ))


def _check_proxies(spec: BuildSpec) -> None:
    """Refuse proxies that would keep every script from the network.

    Raises:
        UsageError: all of them.
    """
    problems = list(online.proxy_problems(spec.variables)) if spec.network else []
    if problems:
        raise UsageError.of(problems)


def _trusts_host(spec: BuildSpec) -> bool:
    return spec.network and spec.host_certificates


def _warnings(facts: contract.Facts, staging: Staging, environ: Mapping[str, str]) -> Iterator[str]:
    """Of the host's own proxies: in the guest, extra-data.d alone sees them, unless the elements are given others."""
    spec = facts.spec
    has_extra_data = (staging.hooks_dir / Phase.EXTRA_DATA.directory).is_dir()
    if spec.network and spec.extra_data is not ExtraData.HOST and has_extra_data:
        seen = {name: value for name, value in environ.items() if name not in spec.variables}
        yield from (f"extra-data.d: {problem.message}" for problem in online.proxy_problems(seen))


def _without_effect(facts: contract.Facts, tree: HookTree) -> Iterator[Problem]:
    """What was asked for and changes nothing: most of it a slip, or a word that is missing elsewhere."""
    spec = facts.spec
    if spec.ramdisk_element is not None and not spec.ramdisk:
        yield Problem(f"without --ramdisk, the ramdisk element '{spec.ramdisk_element}' is not added")
    if spec.drop_in is not None:
        # Its callers may give it what is for other images.
        return
    for name in contract.without_effect(facts):
        yield Problem(f"--envvar {name} has no effect: virt-dib gives the scripts a value of its own")
    met = {*_requested(spec, facts.rules), *(name for element in facts.elements for name in element.depends)}
    for name in sorted(spec.excluded_elements - met):
        yield Problem(f"--exclude-element has no effect: nothing asks for an element '{name}'")
    for name in sorted(spec.excluded_scripts - tree.left_out):
        yield Problem(f"--exclude-script has no effect: no element has a script '{name}'")
    if spec.drive_format is not None and spec.drive is None:
        yield Problem("without --drive, --drive-format has no effect")
    if spec.docker_target is not None and {"docker", "oci"}.isdisjoint(spec.formats):
        yield Problem("without the format docker or oci, --docker-target names no image")


def _shared_places(spec: BuildSpec, workspace: Path) -> Iterator[Problem]:
    """What other users could do to the build, where the user has chosen a place that they can write to."""
    found = ownership.danger(workspace.parent, shared=True)
    if found is not None:
        yield Problem(f"others can replace the files of this build: '{found.path}': {found.reason}")
    found = None if spec.image_cache is None else ownership.danger(spec.image_cache)
    if found is not None:
        yield Problem(f"others can change the image cache, which gets into images: '{found.path}': {found.reason}")
    found = None if spec.drive is None else ownership.danger_of_file(spec.drive)
    if found is not None:
        yield Problem(f"others can change the helper drive, which gets into images: '{found.path}': {found.reason}")


def _type(path: Path) -> int | None:
    """The file type of st_mode, of a link itself, or None for nothing."""
    try:
        return stat.S_IFMT(path.lstat().st_mode)
    except FileNotFoundError:
        return None
    except OSError as error:
        hint = "give a shorter --name" if error.errno == errno.ENAMETOOLONG else "give another --name"
        raise UsageError(f"cannot write '{path}': {error.strerror}", hint=hint) from error


def _choose(spec: BuildSpec, search_path: Sequence[Path], rules: Rules) -> tuple[Element, ...]:
    available = elements.discover(search_path, rules)
    return elements.resolve(_requested(spec, rules), available, excluded=spec.excluded_elements, rules=rules)


def _requested(spec: BuildSpec, rules: Rules) -> Sequence[str]:
    return elements.requested(
        spec.elements, arch=spec.arch, skip_base=spec.skip_base, ramdisk_element=spec.added_element, rules=rules
    )


def _check_containers(spec: BuildSpec, chosen: Sequence[Element]) -> None:
    """Refuse elements that want a docker of this host, or a podman that is not there.

    Raises:
        ElementError, PrerequisiteError: it is so.
    """
    names = {element.name for element in chosen}
    runtime = spec.variables.get("DIB_CONTAINERFILE_RUNTIME") or "podman"
    # Others may have an element of that name for something else.
    with_docker = [element.name for element in chosen if os.path.exists(element.path / _DOCKER_SCRIPT)]
    if contract.CONTAINERFILE in names and runtime == "docker":
        with_docker.append(contract.CONTAINERFILE)
    if with_docker:
        raise ElementError(
            f"element '{with_docker[0]}' starts containers with docker, whose daemon on this host no build can reach",
            hint=f"use the element '{contract.CONTAINERFILE}' with podman, which runs in the build itself",
        )
    if contract.CONTAINERFILE in names:
        tools.require(runtime, purpose=f"build what element '{contract.CONTAINERFILE}' asks for", package=runtime)


def _no_image(spec: BuildSpec, chosen: Sequence[Element]) -> str | None:
    """What asks for a build without an image, if anything does."""
    if spec.ramdisk:
        return "--ramdisk"
    names = [element.name for element in chosen]
    if spec.drop_in is not None:
        # DIB's rule: anywhere in a name.
        return next((f"element '{name}'" for name in names if _NO_IMAGE_ELEMENTS[0] in name), None)
    return next((f"element '{name}'" for name in _NO_IMAGE_ELEMENTS if name in names), None)


def _fill(staging: Staging, choice: _Choice, disk: Layout) -> None:
    """Gather what the guest needs whatever the elements are."""
    installation = choice.dib
    staging.add_guest_scripts()
    system_python = Path("/usr/bin/python3")
    python = tools.require("python3", purpose="run diskimage-builder in the appliance", package="python3")
    staging.add_modules(dib.guest_modules(installation), system_python if system_python.exists() else python)
    staging.write("build/block-device/config.yaml", disk.config)
    staging.write("build/block-device/params.yaml", layout.params_text(disk))
    staging.write("guest/rules.sh", guest_rules(installation.rules))
    staging.add_programs(installation.rules)
    if not installation.in_package:
        own_elements = f"{contract.GUEST}/elements/{len(choice.search_path) - 1}"
        staging.add_prefix(installation.library_dir, installation.programs, own_elements)


def guest_rules(rules: Rules) -> str:
    """Bash text that tells the guest scripts what depends on DIB's release."""
    answers = {
        "sys_mode": "ro" if rules.sys_is_read_only else "rw",
        "new_pts": "1" if rules.new_pts else "",
        "keep_linked_resolver": "1" if rules.keeps_linked_resolver else "",
        "clean_tmp": "1" if rules.cleans_tmp else "",
        "clean_logs": "1" if rules.cleans_logs else "",
    }
    return "".join(f"{name}={value}\n" for name, value in answers.items())


def _guest_python(python: Path) -> str:
    """The guest's name for *python*: it has the host's /usr/bin/python3, by all its names there, and no other."""
    same = python.parent == Path("/usr/bin") and os.path.realpath(python) == os.path.realpath(contract.PYTHON)
    return str(python) if same else contract.PYTHON


def _guest_search_path(count: int, places: Mapping[str, str]) -> tuple[str, ...]:
    paths = [f"{contract.GUEST}/elements/{number}" for number in range(count)]
    linked = f"{contract.GUEST}/elements/linked"
    return (*paths, *([linked] if any(place.startswith(linked) for place in places.values()) else []))


class _Findings:
    """Collects what is wrong, so that it is told in one message."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = list(problems)
        self._class: type[VirtDibError] | None = UsageError if problems else None

    def add(self, problems: Sequence[Problem], kind: type[VirtDibError] = PrerequisiteError) -> None:
        """Take over what is missing on the host, or wrong of another *kind*."""
        self._problems += problems
        if problems and self._class is None:
            self._class = kind

    def tell(self, ask: Callable[[], _T]) -> _T | None:
        """The answer, or None when it is an error, which is kept."""
        try:
            return ask()
        except VirtDibError as error:
            self._problems += [problem for problem in error.problems if problem not in self._problems]
            if self._class is None or isinstance(error, UsageError):
                self._class = UsageError if isinstance(error, UsageError) else type(error)
            return None

    def stop(self) -> None:
        """Raise what was found, if anything: a usage error if there is one among it."""
        if self._class is not None:
            raise self._class.of(self._problems)
