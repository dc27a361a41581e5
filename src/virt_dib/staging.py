# SPDX-License-Identifier: Apache-2.0
"""The build disk: gathered in a directory on the host, made without a mount."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from virt_dib import layout, tools
from virt_dib.elements import Element, strange
from virt_dib.environment import GUEST
from virt_dib.errors import ElementError, Problem, ToolError, UsageError, VirtDibError, no_space_on_host
from virt_dib.files import HOST_IS_FULL, NOT_THERE, copy_regular, temp_dir_variable
from virt_dib.releases import DiskMaker, PythonName, Rules

BUILD_DISK_BYTES = 128 * 1024**3
"""Length of the build disk; it takes what is written to it."""
_DIRECTORIES = (
    "build/mnt", "build/hooks", "build/block-device", "drive", "elements", "guest", "home/.cache/image-create",
    "home/.cache/dib/lockfiles", "host-files", "image", "jobs", "out", "prefix", "programs", "site", "tmp",
)  # fmt: skip

HOST_FILE_VARIABLES = (
    "ACI_MANIFEST", "DIB_ADD_APT_KEYS", "DIB_APT_CONF", "DIB_APT_KEYRING", "DIB_APT_SOURCES",
    "DIB_CONTAINERFILE_DOCKERFILE", "DIB_CONTAINER_CONTEXT", "DIB_DEBIAN_DEBOOTSTRAP_SCRIPT",
    "DIB_DEBIAN_KEYRING", "DIB_DEB_UPDATES_CONF", "DIB_DEV_USER_AUTHORIZED_KEYS", "DIB_DPKG_MANIFEST",
    "DIB_FAIL2BAN_CONF", "DIB_ILO_FIRMWARE_PATH", "DIB_IPA_CA_FILE", "DIB_IPA_CERT_FILE", "DIB_IPA_KEY_FILE",
    "DIB_LOCAL_IMAGE", "DIB_MANILA_USER_AUTHORIZED_KEYS", "DIB_OS_CI_YUM_REPOS",
    "DIB_PYTHON_LOGGING_CONFIG_FILE", "DIB_STEPS_FILE_PATH", "DIB_YUM_MINIMAL_BOOTSTRAP_REPOS",
    "DIB_YUM_MINIMAL_EXTRA_REPOS", "DIB_YUM_REPO_CONF", "DIB_YUM_UPDATES_CONF", "ZUUL_USER_SSH_PUBLIC_KEY",
)  # fmt: skip
"""Variables whose values name files of the host (contract section 4.5)."""
HOST_FILE_VARIABLE_PREFIXES = ("DIB_REPOLOCATION_",)

ELEMENT_HOME_FILES = {
    "local-config": (".ssh/authorized_keys",),
    "devuser": (".ssh/id_rsa.pub", ".ssh/id_dsa.pub"),
}
"""Files of the user's home that an element is there to copy (contract section 4.2)."""
ELEMENT_HOST_FILES = {"openstack-ci-mirrors": ("/etc/ci/mirror_info.sh",)}

LONGEST_PATH_BYTES = 1000
"""On a build disk. With some longer ones mke2fs 1.47 -d writes beyond its memory; and elements, and what others have
cached, can have any name."""
NO_SPACE = re.compile("No space left on device|resulted in short write")
"""Said by mke2fs of the file that it writes; of the file system in it, it says other things."""
_NOT_TO_COPY = ("/dev/", "/proc/", "/sys/")
"""Where directories of the host are that no element can have meant: the guest has its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostFile:
    """A file or directory of the host that the elements are to see."""

    source: Path
    inside: str
    """Its path in the guest."""
    wanted_by: str
    """For messages: ``variable 'X'`` or ``element 'x'``."""


def build_disk_options() -> tuple[str, ...]:
    """The options of mke2fs for a build disk: scratch, so no journal and no checksums to compute in the guest."""
    features, extended = "^has_journal,^metadata_csum,uninit_bg", "lazy_itable_init=1,root_owner=0:0,nodiscard"
    return ("-q", "-t", "ext4", "-m", "0", "-O", features, "-E", extended)


def no_room(directory: Path) -> ToolError:
    """The error for a full file system under the files of a build."""
    return ToolError(
        f"gathering the files of the build in '{directory}': no space left",
        hint=f"set {temp_dir_variable()} to a directory with more room, or make some there",
    )


class Staging:
    """A directory that becomes the build disk. Its layout is that of ``/dib`` in the guest.

    What is made here has the same modes whatever the user's umask; what is copied has those of its source.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in _DIRECTORIES:
            _make_directory(directory / name)
        self._compiled_by: Path | None = None
        self._host_files: list[str] = []
        self.host_file_sources: list[Path] = []
        """What :meth:`add_host_file` has put in, on the host."""

    @property
    def hooks_dir(self) -> Path:
        """Where the hook tree goes."""
        return self.directory / "build" / "hooks"

    def inside(self, path: str) -> Path:
        """Where on the host *path* is staged, which is one below ``/dib`` in the guest."""
        return self.directory / PurePosixPath(path).relative_to(GUEST)

    def add_guest_scripts(self) -> None:
        """Put in what virt-dib itself runs in the guest."""
        for source in sorted(layout.guest_script("").iterdir()):
            if source.suffix in (".sh", ".py"):
                target = self.directory / "guest" / source.name
                shutil.copyfile(source, target)
                target.chmod(0o755)

    def add_modules(self, modules: Iterable[Path], compiled_by: Path) -> None:
        """Put in Python modules. :meth:`finish` has *compiled_by*, the guest's Python, make byte code of them.

        Without byte code the first import of DIB's modules takes many seconds in an emulated guest.
        """
        for module in modules:
            with self._copying(module, ToolError, "make it readable, or install diskimage-builder again"):
                target = self.directory / "site" / module.name
                self._copy(module, target, leave_out=("__pycache__", "tests", "elements", "*.so"))
        self._compiled_by = compiled_by

    def add_programs(self, rules: Rules) -> None:
        """Put in what scripts of DIB's release expect on the PATH, by its *rules*."""
        programs = self.directory / "programs"
        if rules.python_name is not PythonName.NOWHERE:
            (programs / "python").symlink_to("/usr/bin/python3")
        if not rules.own_run_parts:
            (programs / "dib-run-parts").symlink_to("/dib/guest/dib-run-parts.sh")
        if rules.disk_maker is DiskMaker.TABLE:
            (programs / "dib-block-device").symlink_to("/dib/guest/dib-block-device.py")
            (programs / "losetup").symlink_to("/dib/guest/losetup.sh")
        if rules.cylinders:
            (programs / "sfdisk").symlink_to("/dib/guest/sfdisk.sh")

    def add_prefix(self, library: Path, programs: Iterable[Path], elements: str) -> None:
        """Put in the library and the programs of a DIB before 2.0.0, beside a link to *elements* in the guest."""
        prefix = self.directory / "prefix"
        (prefix / "elements").symlink_to(elements)
        hint = "make it readable, or unpack diskimage-builder again"
        with self._copying(library, ToolError, hint):
            self._copy(library, prefix / "lib")
        for program in programs:
            with self._copying(program, ToolError, hint):
                _make_directory(prefix / "bin")
                self._copy(program, prefix / "bin" / program.name)

    def add_elements(self, elements: Sequence[Element], search_path: Sequence[Path]) -> Mapping[str, str]:
        """Put in the chosen elements, search path by search path; return each one's directory in the guest.

        An element that a path before overrides is there too, for DIB's package-installs reads all of them.

        Raises:
            ElementError: all of them that cannot be copied.
            ToolError: there is no space.
        """
        problems = [_strange_problem(element) for element in elements if strange(element.path, search_path)]
        names = {element.name for element in elements}
        chosen = {(element.path, element.name) for element in elements}
        places: dict[str, str] = {}
        for number, path in enumerate(search_path):
            top = self.directory / "elements" / str(number)
            _make_directory(top)
            for entry in sorted(path.iterdir()):
                real = Path(os.path.realpath(entry))
                named = real.name in names or entry.name in names
                if not named or not os.path.isdir(real) or strange(real, search_path):
                    continue
                self._copy_element(real, top / entry.name, problems)
                if (real, entry.name) in chosen:
                    places[entry.name] = f"/dib/elements/{number}/{entry.name}"
        for element in elements:
            if element.name not in places and not strange(element.path, search_path):
                # Found only through a link of another name.
                extra = self.directory / "elements" / "linked" / element.name
                _make_directory(extra.parent)
                self._copy_element(element.path, extra, problems)
                places[element.name] = f"/dib/elements/linked/{element.name}"
        if problems:
            raise ElementError.of(problems)
        return {element.name: places[element.name] for element in elements}

    def add_host_file(self, file: HostFile) -> None:
        """Put in a file or directory of the host, to be seen read-only in the guest.

        Raises:
            ToolError: it cannot be read, or there is no space.
        """
        hint = f"make it readable for this user; {file.wanted_by} names it"
        with self._copying(file.source, ToolError, hint):
            target = self.directory / "host-files" / file.inside.lstrip("/")
            _make_directory(target.parent)
            self._copy(file.source, target)
            self._host_files.append(file.inside)
            self.host_file_sources.append(file.source)

    def write(self, name: str, text: str) -> None:
        """Write the file *name*, relative to the top."""
        (self.directory / name).write_text(text, encoding="utf-8", errors="surrogateescape")
        (self.directory / name).chmod(0o644)

    def finish(self) -> Path:
        """Everything has been put in: the directory, complete."""
        self.write("host-files.list", "".join(f"{path}\0" for path in self._host_files))
        if self._compiled_by is not None:
            site = self.directory / "site"
            tools.run(
                [
                    *(self._compiled_by, "-I", "-m", "compileall", "-q", "-j", "0"),
                    *("--invalidation-mode", "unchecked-hash"),
                    # Or the guest would see where it was on the host.
                    *("-s", site, "-p", f"{GUEST}/site", site),
                ],
                doing="compiling DIB's Python modules",
                umask=0o022,
                check=False,
            )
            self._compiled_by = None
        return self.directory

    def make_disk(self, disk: Path) -> None:
        """Make the build disk *disk* of everything put in.

        Raises:
            ToolError: no space, or no mke2fs.
            ElementError: a path is too long for it.
        """
        self.finish()
        self._check_paths()
        mke2fs = tools.require("mke2fs", purpose="make the build disk", package="e2fsprogs")
        with disk.open("xb") as stream:
            stream.truncate(BUILD_DISK_BYTES)
        command: list[str | Path] = [mke2fs, "-F", *build_disk_options(), "-d", self.directory, disk]
        try:
            tools.run(command, doing="making the build disk")
        except ToolError as error:
            if NO_SPACE.search(str(error)):
                raise ToolError.of([no_space_on_host(disk)]) from error
            raise

    def _check_paths(self) -> None:
        directories = [os.fsencode(self.directory)]
        top_bytes = len(directories[0]) + 1
        for directory in directories:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if len(entry.path) - top_bytes > LONGEST_PATH_BYTES:
                        name = os.fsdecode(entry.path[top_bytes:])
                        raise ElementError(
                            f"making the build disk: '{name}' is longer than {LONGEST_PATH_BYTES} bytes",
                            hint="shorten the names in the element, or in the directory that a variable names",
                        )
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.path)

    def _copy_element(self, source: Path, target: Path, problems: list[Problem]) -> None:
        try:
            with self._copying(source, ElementError, "make all of it readable"):
                self._copy(source, target)
        except ElementError as error:
            problems += error.problems

    @contextlib.contextmanager
    def _copying(self, source: Path, kind: type[VirtDibError], hint: str) -> Iterator[None]:
        """Tell what fails as an error of *kind* that names the file."""
        try:
            yield
        except OSError as error:
            if error.errno in HOST_IS_FULL:
                raise no_room(self.directory) from error
            # The files of the copy are ours: what is refused is the source.
            file = error.filename or source
            raise kind(f"copying '{os.fsdecode(file)}': {error.strerror or error}", hint=hint) from error

    def _copy(self, source: Path, target: Path, *, leave_out: Sequence[str] = ()) -> None:
        """Copy a file, or a directory without FIFOs, sockets, devices and names that match *leave_out*.

        Links inside stay links. The owner may read every file and write in every directory of the copy: or
        mke2fs could not read it, and nobody but root remove it.
        """
        if not os.path.isdir(source):
            _copy_file(source, target)
            return
        # A directory of the host may hold this one.
        staging = self.directory.stat()
        directories = [(source, target)]
        for here, there in directories:
            there.mkdir()
            with os.scandir(here) as entries:
                for entry in entries:
                    copy = there / entry.name
                    if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in leave_out):
                        continue
                    if entry.is_symlink():
                        copy.symlink_to(os.readlink(entry.path))
                    elif entry.is_file():
                        _copy_file(Path(entry.path), copy)
                    elif entry.is_dir() and not os.path.samestat(entry.stat(), staging):
                        directories.append((Path(entry.path), copy))
        for here, there in reversed(directories):
            _copy_attributes(here.stat(), there, also=stat.S_IRWXU)


def _strange_problem(element: Element) -> Problem:
    return Problem(
        f"the element '{element.name}' is a link to '{element.path}', which has nothing of an element in it",
        "have a copy of that in a directory of --element-path, or name the directory that it is in with it",
    )


def wanted_host_files(
    variables: Mapping[str, str], elements: Sequence[Element], home: Path | None
) -> tuple[HostFile, ...]:
    """The host's files and directories that variables and elements name and that exist, none of them in another.

    Raises:
        UsageError: all that name the whole host or a directory of the kernel's, or what cannot be looked at.
    """
    problems: list[Problem] = []
    kinds = {file: _kind(file, problems) for file in dict.fromkeys(_named(variables, elements, home))}
    if problems:
        raise UsageError.of(problems)
    directories = {file.inside: file for file, kind in kinds.items() if kind == stat.S_IFDIR}
    wanted: dict[str, HostFile] = {}
    for file, kind in kinds.items():
        if kind is not None:
            for needed in _not_in_another(file, directories):
                wanted.setdefault(needed.inside, needed)
    return tuple(wanted.values())


def _named(variables: Mapping[str, str], elements: Sequence[Element], home: Path | None) -> Iterator[HostFile]:
    for name, value in variables.items():
        if name in HOST_FILE_VARIABLES or name.startswith(HOST_FILE_VARIABLE_PREFIXES):
            for word in dict.fromkeys([value, *value.split()]):
                path = word.removeprefix("file://")
                if os.path.isabs(path) and ".." not in path.split("/"):
                    path = "/" + os.path.normpath(path).lstrip("/")
                    yield HostFile(source=Path(path), inside=path, wanted_by=f"variable '{name}'")
    for element in elements:
        places = [(Path(file), file) for file in ELEMENT_HOST_FILES.get(element.name, ())]
        if home is not None:
            places += [(home / file, f"/dib/home/{file}") for file in ELEMENT_HOME_FILES.get(element.name, ())]
        for source, inside in places:
            yield HostFile(source=source, inside=inside, wanted_by=f"element '{element.name}'")


def _kind(file: HostFile, problems: list[Problem]) -> int | None:
    """S_IFREG or S_IFDIR, or None for what is not to be copied: nothing there, a device, a dangling link."""
    try:
        kind = stat.S_IFMT(file.source.stat().st_mode)
    except OSError as error:
        if error.errno not in NOT_THERE:
            hint = f"make it readable for this user; {file.wanted_by} names it"
            problems.append(Problem(f"looking at '{file.source}': {error.strerror}", hint))
        return None
    real = os.path.realpath(file.source)
    if kind == stat.S_IFDIR and (real == "/" or f"{real}/".startswith(_NOT_TO_COPY)):
        hint = f"name the directory that is needed in {file.wanted_by}, or unset it"
        problems.append(Problem(f"cannot show '{file.source}' of this host to the elements", hint))
        return None
    return kind if kind in (stat.S_IFREG, stat.S_IFDIR) else None


def _not_in_another(file: HostFile, directories: Mapping[str, HostFile]) -> list[HostFile]:
    """*file* itself or, when it is in one of *directories*, what it lacks there: the target of a link on the way."""
    outer = next((str(parent) for parent in PurePosixPath(file.inside).parents if str(parent) in directories), None)
    if outer is None:
        return [file]
    real = os.path.realpath(file.source)
    if real == os.path.join(os.path.realpath(directories[outer].source), os.path.relpath(file.inside, outer)):
        return []
    target = HostFile(source=Path(real), inside=real, wanted_by=file.wanted_by)
    # The link's copy leads to the same path in the guest, so that must be there too.
    return [] if real == file.inside else _not_in_another(target, directories)


def _make_directory(path: Path) -> None:
    """Make a directory, and those it is in, as far as they are missing, for all to read."""
    for place in reversed([place for place in (path, *path.parents) if not place.exists()]):
        place.mkdir()
        place.chmod(0o755)


def _copy_file(source: Path, target: Path) -> None:
    """Copy a file, with mode and times, without owner and extended attributes: those are the host's."""
    copy_regular(source, target)
    _copy_attributes(source.stat(), target, also=stat.S_IRUSR)


def _copy_attributes(status: os.stat_result, target: Path, *, also: int) -> None:
    target.chmod(stat.S_IMODE(status.st_mode) | also)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
