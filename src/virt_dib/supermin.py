# SPDX-License-Identifier: Apache-2.0
"""The files of our appliance: what libguestfs's own holds, and more.

supermin builds an appliance from a list of the host's packages. A directory of ours holds links to libguestfs's
lists and one more: the tools that elements run outside the chroot. Making it needs no root. It is named after its
content, so that two versions of virt-dib, or a host whose packages changed, never share an appliance. libguestfs gets
the result as a "fixed appliance": if it ran supermin itself, what a supermin that is killed leaves behind would be
anywhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from virt_dib import ownership, tools
from virt_dib.errors import ApplianceError, PrerequisiteError, ToolError, UsageError
from virt_dib.files import remove_stale

PACKAGES = (
    # what DIB's own programs need
    "python3", "python3-minimal", "bash", "findutils", "gawk", "sed", "grep", "debianutils", "hostname", "procps",
    "login", "passwd", "base-passwd", "util-linux", "util-linux-extra", "mount",
    # bootstrap tools of the Debian family, and of the others where the host has them
    "debootstrap", "mmdebstrap", "apt", "dpkg", "perl", "perl-base", "gpgv", "gnupg", "gpg",
    "debian-archive-keyring", "ubuntu-keyring", "distro-info-data", "arch-test",
    "dnf", "dnf-utils", "dnf-plugins-core", "yum", "yum-utils", "rpm", "rpm2cpio", "zypper", "pacman-package-manager",
    # fetching and unpacking
    "ca-certificates", "curl", "wget", "git", "rsync", "jq", "openssl", "tar", "xz-utils", "zstd", "unzip", "bzip2",
    "qemu-utils", "squashfs-tools", "cpio",
    # block devices and file systems
    "dmsetup", "kpartx", "gdisk", "fdisk", "parted", "dosfstools", "mtools", "e2fsprogs", "xfsprogs", "btrfs-progs",
    "lvm2", "thin-provisioning-tools", "udev",
    # isolinux images, ARM boot images, containers
    "genisoimage", "mkisofs", "xorriso", "isolinux", "syslinux-common", "u-boot-tools", "podman",
)  # fmt: skip
"""Names of packages; supermin passes over those the host does not have."""

HOST_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ca-certificates.conf",
    "/etc/mke2fs.conf",
    "/etc/protocols",
    "/etc/services",
    "/usr/share/keyrings/*.gpg",
)
"""Files that no package's list holds, or that the host's administrator changed. Globs."""

_PARTIAL_PREFIX = ".appliance-"
_BUILT = "built"
_FIXED = "appliance"
_FIXED_FILES = ("kernel", "initrd", "root")


def cache_dir() -> Path:
    """Where virt-dib keeps what it can make again: the appliance, the KVM verdict.

    Raises:
        PrerequisiteError: this user has no home directory, and XDG_CACHE_HOME is not set; or another user could have
            put something there, which would run in every build, or lead it to files of this user.
        UsageError: the path has a colon in it.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The specification has relative ones ignored.
        directory = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "virt-dib"
    except RuntimeError as error:
        raise PrerequisiteError(
            "looking for the cache directory: this user has no home directory, and HOME is not set",
            hint="set XDG_CACHE_HOME to a directory that you can write",
        ) from error
    _check_path(directory)
    # Links on the way may be others', and lead elsewhere later.
    directory = Path(os.path.realpath(directory))
    _check_path(directory)
    with contextlib.suppress(OSError):
        ownership.make_private(directory)
    _require_trust(directory)
    return directory


def _require_trust(directory: Path) -> None:
    found = ownership.danger(directory)
    if found is None:
        return
    hint = "set XDG_CACHE_HOME to a directory that only you can write"
    if found.path == directory:
        name = shlex.quote(str(directory))
        hint = f"remove it, since what is in it may be theirs: rm -r {name}; or {hint}"
        raise PrerequisiteError(f"cannot trust the cache directory '{directory}': {found.reason}", hint=hint)
    raise PrerequisiteError(
        f"cannot trust the cache directory '{directory}', which others can replace: '{found.path}': {found.reason}",
        hint=hint,
    )


def _check_path(directory: Path) -> None:
    """A colon would end the directory in libguestfs's path."""
    if ":" in str(directory.absolute()):
        raise UsageError(
            f"cannot keep the appliance in '{directory}': there is a colon in the path",
            hint="set XDG_CACHE_HOME to a directory without one",
        )


def prepare(cache_dir: Path, library_path: Sequence[str]) -> Path:
    """The directory for :func:`build` to work in, with the lists of packages and files.

    Raises:
        PrerequisiteError: libguestfs has no ``supermin.d``, or the cache cannot be written.
        UsageError: the path of the cache has a colon in it.
    """
    _check_path(cache_dir)
    places = [Path(part, "supermin.d") for part in library_path]
    system = next((place for place in places if os.path.isdir(place)), None)
    if system is None:
        raise PrerequisiteError(
            f"no supermin.d in libguestfs's path '{':'.join(library_path)}'",
            hint="install libguestfs with its appliance: apt-get install libguestfs0 supermin",
        )
    texts = {"zz-virt-dib-packages": "\n".join(PACKAGES) + "\n", "zz-virt-dib-hostfiles": "\n".join(HOST_FILES) + "\n"}
    try:
        name = f"appliance-{_content_id(system, texts)}"
    except OSError as error:
        raise PrerequisiteError(
            f"reading libguestfs's files in '{system}': {error.strerror}: '{error.filename}'",
            hint="make them readable, or install libguestfs again",
        ) from error
    directory = cache_dir / name
    try:
        if (directory / "supermin.d").is_dir():
            _require_trust(directory)
            return directory
        ownership.make_private(cache_dir)
        remove_stale(cache_dir, f"{_PARTIAL_PREFIX}*")
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=_PARTIAL_PREFIX) as made:
            inside = Path(made, "new", "supermin.d")
            ownership.make_private(inside)
            for entry in system.iterdir():
                (inside / entry.name).symlink_to(entry)
            for name, text in texts.items():
                (inside / name).write_text(text)
            _make_fixed(inside.with_name(_FIXED))
            # Another build may have made it meanwhile.
            with contextlib.suppress(OSError):
                os.rename(inside.parent, directory)
        made_it = (directory / "supermin.d").is_dir()
        _require_trust(directory)
    except OSError as error:
        raise PrerequisiteError(
            f"cannot keep the appliance's files in '{cache_dir}': {error.strerror}",
            hint="set XDG_CACHE_HOME to a directory that you can write",
        ) from error
    if not made_it:
        raise PrerequisiteError(
            f"cannot keep the appliance's files in '{directory}': something else is there", hint="remove it"
        )
    return directory


def _make_fixed(directory: Path) -> None:
    """What guestfs(3) wants of a fixed appliance: three files and a text that nobody reads."""
    directory.mkdir()
    (directory / "README.fixed").write_text("Made by virt-dib.\n")
    for name in _FIXED_FILES:
        (directory / name).symlink_to(f"../{_BUILT}/{name}")


def build(directory: Path, temporary_dir: Path, on_debug: Callable[[str], None] | None = None) -> Path:
    """Have supermin build the appliance of a directory of :func:`prepare`, unless it is newer than what it is made of.

    Returns what to give libguestfs as its path. *temporary_dir* gets what supermin leaves when it is killed;
    *on_debug* gets what it says when it is told to be verbose.

    Raises:
        ApplianceError: supermin is missing or fails.
    """
    doing = "making the appliance"
    lock = directory / "lock"
    kernels, known = _kernels(), directory / "kernels"
    # supermin itself sees when a package changes, but not a kernel without one, nor another choice of the user's.
    keep = ["--if-newer"] if os.access(known, os.R_OK) and known.read_text() == kernels else []
    options = ["--copy-kernel", *(["--verbose"] if on_debug else []), *keep, "--lock", str(lock)]
    try:
        program = tools.require("supermin", purpose="make the appliance", package="supermin")
        _remove_unfinished(directory, lock)
        result = tools.run(
            [program, "--build", *options, "-f", "ext2", directory / "supermin.d", "-o", directory / _BUILT],
            doing=doing,
            environment=tools.host_environment({**_settings(), "TMPDIR": str(temporary_dir)}),
        )
    except (ToolError, PrerequisiteError) as error:
        raise ApplianceError(str(error), hint=error.problems[0].hint or hint_for(str(error))) from error
    if on_debug is not None:
        for line in [*result.stdout.splitlines(), *result.stderr.splitlines()]:
            on_debug(line)
    _date_kernel(directory / _BUILT)
    with contextlib.suppress(OSError):
        known.write_text(kernels)
    return directory / _FIXED


def hint_for(text: str) -> str:
    """What to do about an appliance that cannot be made or does not start, for the reason *text*."""
    if "supermin" in text and "kernel" in text.lower():
        return "make a kernel readable (chmod 0644 /boot/vmlinuz-*), then see virt-dib-doctor"
    return "virt-dib-doctor checks what the appliance needs; --verbose -x shows what it does"


def _settings() -> dict[str, str]:
    """What the user tells supermin itself."""
    return {name: value for name, value in os.environ.items() if name.startswith("SUPERMIN_")}


def _kernels() -> str:
    """All kernels that supermin may choose from, and what the user has chosen, as a text to compare."""
    lines = [f"{name}={os.environ.get(name, '')}" for name in ("SUPERMIN_KERNEL", "SUPERMIN_MODULES")]
    for pattern in ("/lib/modules/*/vmlinuz", "/boot/vmlinu[xz]-*"):
        for path in sorted(glob.glob(pattern)):
            with contextlib.suppress(OSError):
                state = os.stat(path)
                lines.append(f"{path}:{state.st_size}:{state.st_mtime_ns}")
    return "\n".join(lines)


def _date_kernel(built: Path) -> None:
    """Give the copy of the kernel, which has the date of the original, that of the appliance.

    The oldest of the files counts for supermin. It would make the appliance anew each time, as it does when the
    host's packages have changed, since that kernel was made.
    """
    with contextlib.suppress(OSError):
        made_ns = (built / "root").stat().st_mtime_ns
        os.utime(built / "kernel", ns=(made_ns, made_ns))


def _remove_unfinished(directory: Path, lock: Path) -> None:
    """Remove what a killed supermin was building, unless one is at it just now."""
    with contextlib.suppress(OSError), lock.open("w") as held:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in directory.glob(f"{_BUILT}.*"):
            shutil.rmtree(left, ignore_errors=True)


def _content_id(system: Path, texts: dict[str, str]) -> str:
    digest = hashlib.sha256(_FIXED.encode())
    for entry in sorted(system.iterdir()):
        state = entry.stat()
        digest.update(os.fsencode(f"{entry}:{state.st_size}:{state.st_mtime_ns}\n"))
    for name, text in sorted(texts.items()):
        digest.update(f"{name}\n{text}".encode())
    # supermin itself sees when a package changes, but not when one of these files does.
    for pattern in HOST_FILES:
        for name in sorted(glob.glob(pattern)):
            # A link to nothing, or a file removed just now: supermin passes over it too.
            with contextlib.suppress(OSError):
                state = os.stat(name)
                digest.update(os.fsencode(f"{name}:{state.st_size}:{state.st_mtime_ns}\n"))
    return digest.hexdigest()[:16]
