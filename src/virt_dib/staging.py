# SPDX-License-Identifier: Apache-2.0
"""The build disk: gathered in a directory on the host, made without a mount; and what comes back from it."""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from virt_dib import layout, tools
from virt_dib.elements import Element
from virt_dib.errors import ApplianceError, ElementError, ToolError

BUILD_DISK_BYTES = 128 * 1024**3
"""Length of the build disk; it takes what is written to it."""
_DIRECTORIES = (
    "build/mnt", "build/hooks", "build/block-device", "elements", "guest", "home/.cache/image-create",
                "home/.cache/dib/lockfiles", "host-files", "image", "jobs", "out", "site", "tmp")  # fmt: skip

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


class Staging:
    """A directory that becomes the build disk. Its layout is that of ``/dib`` in the guest."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in _DIRECTORIES:
            (directory / name).mkdir(parents=True)
        self._host_files: list[str] = []

    @property
    def hooks_dir(self) -> Path:
        """Where the hook tree goes."""
        return self.directory / "build" / "hooks"

    def add_guest_scripts(self) -> None:
        """Put in what virt-dib itself runs in the guest."""
        for source in sorted(layout.guest_script("").iterdir()):
            if source.suffix in (".sh", ".py"):
                target = self.directory / "guest" / source.name
                shutil.copyfile(source, target)
                target.chmod(0o755)

    def add_modules(self, modules: Iterable[Path], compiled_by: Path) -> None:
        """Put in Python modules, and the byte code that *compiled_by*, the guest's Python, makes of them.

        Without byte code the first import of DIB's modules takes many seconds in an emulated guest.
        """
        site = self.directory / "site"
        ignore = shutil.ignore_patterns("__pycache__", "tests", "elements", "*.so")
        for module in modules:
            if module.is_dir():
                shutil.copytree(module, site / module.name, ignore=ignore, symlinks=True)
            else:
                shutil.copyfile(module, site / module.name)
        tools.run(
            [compiled_by, "-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash", site],
            doing="compiling DIB's Python modules",
            check=False,
        )

    def add_elements(self, elements: Sequence[Element], search_path: Sequence[Path]) -> Mapping[str, str]:
        """Put in the chosen elements, search path by search path; return each one's directory in the guest.

        An element that a path before overrides is there too, for DIB's package-installs reads all of them.
        """
        names = {element.name for element in elements}
        chosen = {element.path: element.name for element in elements}
        places: dict[str, str] = {}
        for number, path in enumerate(search_path):
            top = self.directory / "elements" / str(number)
            top.mkdir()
            for entry in sorted(path.iterdir()):
                real = Path(os.path.realpath(entry))
                if not real.is_dir() or (real.name not in names and entry.name not in names):
                    continue
                _copy_tree(real, top / entry.name)
                if chosen.get(real) and entry.name == real.name:
                    places[real.name] = f"/dib/elements/{number}/{entry.name}"
        for element in elements:
            if element.name not in places:
                # Found only through a link of another name.
                extra = self.directory / "elements" / "linked" / element.name
                extra.parent.mkdir(exist_ok=True)
                _copy_tree(element.path, extra)
                places[element.name] = f"/dib/elements/linked/{element.name}"
        return {element.name: places[element.name] for element in elements}

    def add_host_file(self, path: Path, guest_path: str | None = None) -> None:
        """Put in a file or directory of the host, to be seen read-only at the same path."""
        inside = guest_path or str(path)
        if inside in self._host_files:
            return
        target = self.directory / "host-files" / inside.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.is_dir():
                _copy_tree(path, target)
            elif path.is_file():
                shutil.copy2(path, target)
        except OSError as error:
            raise ToolError(
                f"copying '{path}' for the elements: {error.strerror}", hint="make it readable, or unset the variable"
            ) from error
        self._host_files.append(inside)

    def write(self, name: str, text: str) -> None:
        """Write the file *name*, relative to the top."""
        (self.directory / name).write_text(text, encoding="utf-8", errors="surrogateescape")

    def make_disk(self, disk: Path) -> None:
        """Make the build disk of everything put in, and drop the directory.

        Raises:
            ToolError: no space, or no mke2fs.
        """
        (self.directory / "host-files.list").write_bytes(b"".join(os.fsencode(p) + b"\0" for p in self._host_files))
        mke2fs = tools.require("mke2fs", purpose="make the build disk", package="e2fsprogs")
        with disk.open("xb") as stream:
            stream.truncate(BUILD_DISK_BYTES)
        # Scratch: no journal and no checksums to compute in an emulated guest.
        tools.run(
            [mke2fs, "-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal,^metadata_csum,uninit_bg",
             "-E", "lazy_itable_init=1,root_owner=0:0,nodiscard", "-d", self.directory, disk],
            doing="making the build disk",
        )  # fmt: skip
        shutil.rmtree(self.directory)


def wanted_host_files(
    variables: Mapping[str, str], elements: Sequence[Element], home: Path | None
) -> list[tuple[Path, str]]:
    """The host's files that variables and elements name and that exist: path here, path in the guest."""
    wanted: list[tuple[Path, str]] = []
    for name, value in variables.items():
        if name in HOST_FILE_VARIABLES or name.startswith(HOST_FILE_VARIABLE_PREFIXES):
            for word in [value, *value.split()]:
                path = word.removeprefix("file://")
                if os.path.isabs(path) and os.path.normpath(path) == path and os.path.exists(path):
                    wanted.append((Path(path), path))
    for element in elements:
        named = [(Path(file), file) for file in ELEMENT_HOST_FILES.get(element.name, ())]
        if home is not None:
            named += [(home / file, f"/dib/home/{file}") for file in ELEMENT_HOME_FILES.get(element.name, ())]
        wanted += [(path, inside) for path, inside in named if path.is_file()]
    return list(dict.fromkeys(wanted))


def _copy_tree(source: Path, target: Path) -> None:
    try:
        shutil.copytree(source, target, symlinks=True, ignore=_special_files)
    except (OSError, shutil.Error) as error:
        raise ElementError(f"copying '{source}': {error}", hint="make all of it readable") from error


def _special_files(directory: str, names: list[str]) -> list[str]:
    """FIFOs, sockets and devices: opening one could wait for ever."""
    found = []
    for name in names:
        mode = os.lstat(os.path.join(directory, name)).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
            found.append(name)
    return found


def copy_out(archive: Path, target: Path, *, limit_bytes: int) -> int:
    """Unpack what the guest left: directories and plain files, nothing else, nothing outside *target*.

    Returns the number of files. The guest is not trusted: a name that leaves *target* or a link ends
    it, permissions are those of new files of the user, owners are not taken over.

    Raises:
        ApplianceError: the archive holds what does not belong in one, or more than *limit_bytes*.
    """
    files = 0
    left_bytes = limit_bytes
    with tarfile.open(archive, "r:") as tar:
        for member in tar:
            parts = [part for part in PurePosixPath(member.name).parts if part != "."]
            if not parts and member.isdir():
                continue
            if member.name.startswith("/") or ".." in parts or not parts:
                raise ApplianceError(f"the guest left a file with the name {member.name!r}, which is not taken over")
            path = target.joinpath(*parts)
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
            elif member.isreg():
                left_bytes -= member.size
                if left_bytes < 0:
                    raise ApplianceError(
                        f"the guest left more than {limit_bytes} bytes of files in its output directory"
                    )
                path.parent.mkdir(parents=True, exist_ok=True)
                _write_member(tar, member, path)
                files += 1
    return files


def _write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = tar.extractfile(member)
    if source is None:
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with source, os.fdopen(os.open(path, flags, 0o666), "wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
