# SPDX-License-Identifier: Apache-2.0
"""The variables a script sees: one table, after contract section 1.5."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import yaml

from virt_dib import masking
from virt_dib.elements import Element
from virt_dib.errors import Problem
from virt_dib.releases import NEWEST, DiskMaker, PythonName, Rules
from virt_dib.spec import VARIABLES_OF_BASH, BuildSpec, Phase, Where

GUEST = "/dib"
"""Where the guest sees the build disk."""
BUILD_DIR = f"{GUEST}/build"
TREE = f"{BUILD_DIR}/mnt"
BUILT = f"{BUILD_DIR}/built"
HOOKS = f"{BUILD_DIR}/hooks"
IMAGE_DIR = f"{GUEST}/image"
HOME = f"{GUEST}/home"
CACHE = f"{HOME}/.cache/image-create"
"""Where DIB and some elements have the image cache, whatever they are told."""
SECOND_CACHE = f"{GUEST}/extra-data-cache"
"""That of --image-cache when there is a helper drive too."""
OUT = f"{GUEST}/out"
"""The working directory of scripts outside the chroot."""
NAMED = f"{GUEST}/named"
"""For files named after the image that do not lie below ``OUT``."""
PREFIX = f"{GUEST}/prefix"
"""Library and programs of releases of DIB before 2.0.0."""
PROGRAMS = f"{GUEST}/programs"
"""What scripts written for old releases expect on the PATH."""
RUNNERS_IMAGE = f"{IMAGE_DIR}/image.raw"
"""The raw image where the runner makes it, before DIB 2.0.0."""
SITE = f"{GUEST}/site"
RUNNER_BIN = f"{GUEST}/bin"
"""Where sudo is when extra-data.d runs on the host."""
LIBRARY = f"{SITE}/diskimage_builder/lib"
PARAMS = f"{BUILD_DIR}/block-device/params.yaml"
CERTIFICATES = f"{GUEST}/host-certificates.crt"
"""Those of the host, if the build has any."""
_CERTIFICATES_INSIDE = "/tmp/in_target.d/virt-dib-certificates"  # noqa: S108 - a mount of the runner's in the image
"""Made by ``guest/with-hooks.sh``: they, with the image's own, and settings that name them."""

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PYTHON = "/usr/bin/python3"
CONTAINERFILE = "containerfile"
"""DIB's element that makes the tree of a container's image, with podman; others depend on it."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
LONGEST_BYTES = 128 << 10
"""The longest text that the kernel passes to a program (execve(2))."""
MOST_BYTES = 1920 << 10
"""What it passes together, where the stack is 8 MiB, without room for arguments."""
_OF_THE_DISK = (Phase.BLOCK_DEVICE, Phase.PRE_FINALISE, Phase.FINALISE, Phase.CLEANUP)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockDevices:
    """What dib-block-device says of the configuration (contract section 3.1)."""

    root_label: str
    root_fstype: str
    boot_label: str
    mount_points: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OnHost:
    """What extra-data.d finds elsewhere when it runs on the host; paths are those of the host."""

    library_dir: str
    python: str
    element_dirs: Mapping[str, str]
    elements_path: Sequence[str]
    image_cache: str
    home: str
    working_directory: str
    build_dir: str
    """With the tree and the hooks in it. DIB's element source-repositories wants it to have a dot in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the values are made of. The last ones are known only once the image disk is."""

    rules: Rules = NEWEST
    library: str = LIBRARY
    """DIB's library in the guest."""
    python: str = PYTHON
    """DIB's Python in the guest."""
    root_uuid: str = ""
    """Of the root file system, where the runner makes it."""

    spec: BuildSpec
    elements: Sequence[Element]
    element_dirs: Mapping[str, str]
    """Element name to its directory in the guest."""
    elements_path: Sequence[str]
    """The search path in the guest."""
    block_devices: BlockDevices
    host_environment: Mapping[str, str] = field(default_factory=dict)
    """The environment of virt-dib, for extra-data.d."""
    on_host: OnHost | None = None
    """Where extra-data.d runs on the host."""
    certificates: str | None = None
    """The file of the host whose CA certificates the scripts trust; None: only those of the image."""
    image_size_kib: int | None = None
    image_block_device: str | None = None
    image_whole_device: str | None = None
    image_block_devices: str | None = None


@dataclass(frozen=True, slots=True)
class _Variable:
    name: str
    value: Callable[[Facts, Phase], str | None]
    """None: the variable is not set."""
    user_wins: bool = False
    """DIB takes the user's value where there is one."""


def _always(text: str) -> Callable[[Facts, Phase], str]:
    return lambda _facts, _phase: text


def _dib_env(facts: Facts, _phase: Phase) -> str:
    own = {"DIB_ARGS": _dib_args(facts, _phase), "DIB_PYTHON_EXEC": facts.python}
    kept = {name: value for name, value in own.items() if name not in facts.rules.absent}
    # DIB's element 'manifests' writes both into the image.
    return declarations({name: masking.shown(name, value) for name, value in {**facts.spec.variables, **kept}.items()})


def _dib_args(facts: Facts, _phase: Phase) -> str:
    """The command line, without the secrets that disk-image-create gets by its environment and does not have there."""
    words = []
    for word in facts.spec.arguments:
        option = "--envvar=" if word.startswith("--envvar=") else ""
        name, equals, value = word.removeprefix(option).partition("=")
        words.append(f"{option}{name}={masking.shown(name, value)}" if equals else word)
    return " ".join(words)


def _makes_ramdisk(facts: Facts) -> bool:
    """Whether scripts in the chroot read DIB's library, which uses two variables that DIB does not export.

    As those scripts say ``set -u``, DIB's own ramdisk-image-create has failed with an unbound variable since 2.0.
    """
    return any(element.name == "ramdisk-base" for element in facts.elements)


def _base_elements(facts: Facts, _phase: Phase) -> str | None:
    return f"{GUEST}/elements/{len(facts.spec.element_paths)}" if _makes_ramdisk(facts) else None


def _runners_image(facts: Facts, _phase: Phase) -> str:
    return RUNNERS_IMAGE if facts.rules.disk_maker is DiskMaker.SCRIPTS else ""


def _tmp_image(facts: Facts, phase: Phase) -> str | None:
    if phase.where is Where.CHROOT and _makes_ramdisk(facts):
        # Where the ramdisk is written first: in a directory that extra-data.d has made.
        return "/tmp/ramdisk-build/image.raw"  # noqa: S108 - in the image
    return _runners_image(facts, phase) or None


def _buildah_isolation(facts: Facts, phase: Phase) -> str | None:
    wanted = any(element.name == CONTAINERFILE for element in facts.elements)
    return "chroot" if wanted and phase.where is Where.OUTSIDE else None


def _target_root(_facts: Facts, phase: Phase) -> str | None:
    return TREE if phase in (Phase.ROOT, Phase.CLEANUP) else None


def _image_size(facts: Facts, phase: Phase) -> str | None:
    if facts.rules.size_in_kib and phase in _OF_THE_DISK:
        return None if facts.image_size_kib is None else str(facts.image_size_kib)
    if facts.spec.size_bytes is None:
        return facts.spec.variables.get("DIB_IMAGE_SIZE")
    return f"{facts.spec.size_bytes / 1024**3:g}"


def _offline(facts: Facts, _phase: Phase) -> str:
    return facts.spec.variables.get("DIB_OFFLINE", "") if facts.spec.network else "1"


def _checksum(facts: Facts, _phase: Phase) -> str:
    """The user's value, which may name kinds, unless that says there are none and an option that there are."""
    given = facts.spec.variables.get("DIB_CHECKSUM")
    if facts.spec.checksums:
        return given if given not in (None, "", "0") else "1"
    return given if given is not None else "0"


def _once_known(get: Callable[[Facts], str | None]) -> Callable[[Facts, Phase], str | None]:
    return lambda facts, phase: get(facts) if phase in _OF_THE_DISK else None


def cache_of_extra_data(spec: BuildSpec) -> str:
    """Where the scripts of extra-data.d find the image cache (manual, option --image-cache)."""
    return SECOND_CACHE if spec.drive is not None and spec.image_cache is not None else CACHE


def _image_cache(facts: Facts, phase: Phase) -> str:
    return cache_of_extra_data(facts.spec) if phase is Phase.EXTRA_DATA else CACHE


def _home(_facts: Facts, phase: Phase) -> str:
    return "/root" if phase.where is Where.CHROOT else HOME


def _path(facts: Facts, phase: Phase) -> str:
    # DIB quotes the dollar, so that its shell does not put the host's PATH there (contract section 1.4).
    outside = f"{PROGRAMS}:{SYSTEM_PATH}" if facts.rules.python_name is PythonName.FIRST else SYSTEM_PATH
    if phase.where is Where.OUTSIDE:
        return outside
    return f"{'$PATH' if facts.rules.literal_path else outside}:{SYSTEM_PATH}"


def _certificates(name: str) -> _Variable:
    """A variable that names a file of certificates. extra-data.d has it where the host has."""

    def value(facts: Facts, phase: Phase) -> str | None:
        if facts.certificates is None:
            return None
        if phase.where is Where.CHROOT:
            return f"{_CERTIFICATES_INSIDE}/ca-bundle.crt"
        return CERTIFICATES if phase is Phase.EXTRA_DATA and name in facts.host_environment else None

    return _Variable(name, value, user_wins=True)


def _certificates_setting(name: str, file: str) -> _Variable:
    """A variable that names a file of settings, for a program that takes certificates only so."""

    def value(facts: Facts, phase: Phase) -> str | None:
        inside = facts.certificates is not None and phase.where is Where.CHROOT
        return f"{_CERTIFICATES_INSIDE}/{file}" if inside else None

    return _Variable(name, value, user_wins=True)


_CERTIFICATE_VARIABLES = (
    _certificates("SSL_CERT_FILE"),
    _certificates("CURL_CA_BUNDLE"),
    _certificates("GIT_SSL_CAINFO"),
    _certificates("PIP_CERT"),
    _certificates("REQUESTS_CA_BUNDLE"),
    _certificates("NODE_EXTRA_CA_CERTS"),
    _certificates_setting("APT_CONFIG", "apt.conf"),
    _certificates_setting("SYSTEM_WGETRC", "wgetrc"),
)
"""Not in the contract: docs/network.md."""
_CERTIFICATE_NAMES = frozenset(variable.name for variable in _CERTIFICATE_VARIABLES)

_TABLE: tuple[_Variable, ...] = (
    _Variable("HOME", _home),
    _Variable("PATH", _path),
    _Variable("USER", _always("root")),
    _Variable("LOGNAME", _always("root")),
    _Variable("SHELL", _always("/bin/bash")),
    _Variable("LC_ALL", _always("C")),
    _Variable("LANG", _always("C")),
    _Variable("TERM", _always("dumb")),
    # Not in the contract: what DIB's Python scripts print would come only when they end.
    _Variable("PYTHONUNBUFFERED", _always("1"), user_wins=True),
    # bash takes no other value over from the environment when it runs as root; sudo drops it on the way in.
    _Variable("PS4", lambda _, phase: "+ " if phase.where is Where.OUTSIDE else None),
    _Variable("_LIB", lambda facts, _: facts.library),
    _Variable("_PREFIX", _always(PREFIX)),
    _Variable("SCRIPT_HOME", _always(f"{PREFIX}/bin")),
    _Variable("DIB_PYTHON_EXEC", lambda facts, _: facts.python),
    _Variable("DIB_PYTHON_EXEC_TMP", _always(PROGRAMS)),
    _Variable("DIB_ORIGINAL_PATH", _always(SYSTEM_PATH)),
    _Variable("DIB_ARGS", _dib_args),
    _Variable("DIB_ENV", _dib_env),
    _Variable("DIB_DEBUG_TRACE", lambda facts, _: str(facts.spec.debug_level)),
    _Variable("ARCH", lambda facts, _: facts.spec.arch),
    _Variable("IMAGE_NAME", lambda facts, _: facts.spec.told_name),
    _Variable("IMAGE_TYPE", _always("qcow2")),
    _Variable("FS_TYPE", lambda facts, _: facts.spec.fs_type),
    _Variable("ELEMENTS_PATH", lambda facts, _: ":".join(facts.elements_path)),
    _Variable("_BASE_ELEMENT_DIR", _base_elements),
    _Variable("IMAGE_ELEMENT", lambda facts, _: " ".join(element.name for element in facts.elements)),
    _Variable("IMAGE_ELEMENT_YAML", lambda facts, _: yaml.safe_dump(dict(facts.element_dirs))),
    _Variable("DIB_IMAGE_CACHE", _image_cache, user_wins=True),
    _Variable("DIB_LOCKFILES", _always(f"{HOME}/.cache/dib/lockfiles"), user_wins=True),
    _Variable("DIB_OFFLINE", _offline),
    _Variable("DIB_CHECKSUM", _checksum),
    # There is no tmpfs to build in; the ramdisk elements would mount one in the chroot.
    _Variable("DIB_NO_TMPFS", _always("1"), user_wins=True),
    _Variable("DIB_MIN_TMPFS", _always("2"), user_wins=True),
    _Variable("TMP_BUILD_DIR", _always(BUILD_DIR)),
    _Variable("TMP_IMAGE_DIR", _always(IMAGE_DIR)),
    _Variable("TMP_HOOKS_PATH", _always(HOOKS)),
    _Variable("TMP_MOUNT_PATH", _always(TREE)),
    _Variable("TARGET_ROOT", _target_root),
    _Variable("TMP_IMAGE_PATH", _tmp_image),
    _Variable("OUT_IMAGE_PATH", _runners_image),
    _Variable("DIB_BLOCK_DEVICE_PARAMS_YAML", _always(PARAMS)),
    _Variable("DIB_ROOT_LABEL", lambda facts, _: facts.block_devices.root_label),
    _Variable("DIB_ROOT_FSTYPE", lambda facts, _: facts.block_devices.root_fstype),
    _Variable("DIB_BOOT_LABEL", lambda facts, _: facts.block_devices.boot_label),
    _Variable("DIB_MOUNTPOINTS", lambda facts, _: facts.block_devices.mount_points),
    _Variable("DIB_IMAGE_SIZE", _image_size),
    _Variable("DIB_IMAGE_ROOT_FS_UUID", lambda facts, _: facts.root_uuid),
    _Variable("IMAGE_BLOCK_DEVICE", _once_known(lambda facts: facts.image_block_device)),
    _Variable("IMAGE_BLOCK_DEVICE_WITHOUT_PART", _once_known(lambda facts: facts.image_whole_device)),
    _Variable("IMAGE_BLOCK_DEVICES", _once_known(lambda facts: facts.image_block_devices)),
    # The manual wants dib-manifests in NAME.d, which is the working directory of the phases outside.
    _Variable("DIB_MANIFEST_SAVE_DIR", lambda facts, _: OUT if facts.spec.drop_in is None else None, user_wins=True),
    # Not in the contract: podman is to build with chroot(2) alone, since it is in a guest already.
    _Variable("BUILDAH_ISOLATION", _buildah_isolation, user_wins=True),
    _Variable("RAMDISK_ELEMENT", lambda facts, _: facts.spec.added_element),
    _Variable("SKIP_BASE", lambda facts, _: "1" if facts.spec.skip_base else None),
    _Variable("DOCKER_TARGET", lambda facts, _: facts.spec.docker_target),
    _Variable("COMPRESS_IMAGE", lambda facts, _: None if facts.spec.compress else ""),
    *_CERTIFICATE_VARIABLES,
)

_DIE = 'die() { local exitcode=$?; set +o xtrace; echo "$@"; exit $exitcode; }\n'

_OF_THE_HOST_ONLY = re.compile(
    r"""PATH|HOME|PWD|OLDPWD|SHLVL|_|TMP|TEMP|TMPDIR|SHELL|USER|LOGNAME|MAIL|HOSTNAME|TERM.*|DISPLAY|BASH.*|ENV|IFS
    |CDPATH|PS[0-9]|LANG|LANGUAGE|LC_.*|LD_.*|PYTHON.*|VIRTUAL_ENV.*|CONDA.*|PYENV.*|XDG_.*|DBUS_.*|SSH_.*|GPG_.*
    |XAUTHORITY|WAYLAND.*|SUDO_.*|SYSTEMD_.*|INVOCATION_ID|JOURNAL_STREAM|NOTIFY_SOCKET|LIBGUESTFS_.*|SUPERMIN.*
    |VIRT_DIB_.*|MAKE.*|MFLAGS|SSL_CERT_DIR|GIT_SSL_CAPATH""",
    re.VERBOSE,
)
"""Variables that mean something only on the host: places, sockets, sessions, loaders."""

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY", "NO_PROXY")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_USERS_OWN = frozenset({"HOME", "PATH", "USER", "LOGNAME", "SHELL", "TERM"}) | _CERTIFICATE_NAMES
"""What extra-data.d has from the host when it runs there."""


def for_phase(facts: Facts, phase: Phase) -> dict[str, str]:
    """The environment of the scripts of *phase*.

    What the user set is there in every phase. extra-data.d sees the host's environment besides
    (manual, section ENVIRONMENT VARIABLES), without the variables that mean something only there.
    """
    on_host = facts.on_host if phase is Phase.EXTRA_DATA else None
    variables: dict[str, str] = {}
    if on_host is not None:
        variables.update(_whole(facts.host_environment))
    elif phase is Phase.EXTRA_DATA:
        variables.update(from_host(facts.host_environment))
    variables.update(facts.spec.variables)
    variables = _lower_case_proxies(variables) | variables
    theirs = _USERS_OWN if on_host is not None else frozenset()
    for variable in _TABLE:
        if variable.name in theirs or variable.name in facts.rules.absent:
            continue
        if variable.user_wins and variable.name in facts.spec.variables:
            continue
        value = variable.value(facts, phase)
        if value is not None:
            variables[variable.name] = value
        elif variable.name not in facts.spec.variables:
            variables.pop(variable.name, None)
    if on_host is not None:
        places = _of_host(facts, on_host)
        variables.update({name: value for name, value in places.items() if name not in facts.rules.absent})
    if phase.where is Where.CHROOT:
        # They name places outside (DIB's run_in_target).
        unset = ("TMPDIR", "VIRTUAL_ENV") if facts.rules.chroot_unsets else ()
        variables = {name: value for name, value in variables.items() if name not in unset}
        variables |= {} if facts.rules.chroot_unsets else {"TMPDIR": ""}
    return variables


def _of_host(facts: Facts, on_host: OnHost) -> dict[str, str]:
    """What differs in extra-data.d on the host, where the user's own environment is below everything."""
    path = facts.host_environment.get("PATH") or SYSTEM_PATH
    python_path = facts.host_environment.get("PYTHONPATH")
    return {
        "HOME": facts.spec.variables.get("HOME") or on_host.home,
        # Our sudo first; DIB's modules after those of the user, for each python3 there is.
        "PATH": f"{RUNNER_BIN}:{facts.spec.variables.get('PATH') or path}",
        "PYTHONPATH": f"{python_path}:{SITE}" if python_path else SITE,
        "TMPDIR": "/tmp",  # noqa: S108 - the phase's own
        "_LIB": on_host.library_dir,
        "_PREFIX": on_host.library_dir.rpartition("/")[0],
        "DIB_PYTHON_EXEC": on_host.python,
        "ELEMENTS_PATH": ":".join(on_host.elements_path),
        "IMAGE_ELEMENT_YAML": yaml.safe_dump(dict(on_host.element_dirs)),
        "DIB_IMAGE_CACHE": on_host.image_cache,
        "DIB_LOCKFILES": "/tmp/lockfiles",  # noqa: S108 - the phase's own
        "TMP_BUILD_DIR": on_host.build_dir,
        "TMP_HOOKS_PATH": f"{on_host.build_dir}/hooks",
        "TMP_MOUNT_PATH": f"{on_host.build_dir}/mnt",
    }


def working_directory(facts: Facts, phase: Phase) -> str:
    """Where the scripts of a *phase* outside the chroot start."""
    return facts.on_host.working_directory if phase is Phase.EXTRA_DATA and facts.on_host is not None else OUT


def with_devices(facts: Facts, *, root: str | None, disk: str | None, devices: str | None = None) -> Facts:
    """*facts* once the image disk is there, or part of it."""
    return dataclasses.replace(facts, image_block_device=root, image_whole_device=disk, image_block_devices=devices)


def functions(facts: Facts, phase: Phase) -> str:
    """Bash text that defines and exports DIB's functions for the phases outside the chroot.

    Inside there are none: sudo drops exported functions on the way (contract section 1.4).
    """
    if phase.where is Where.CHROOT:
        return ""
    if "IMAGE_ELEMENT_YAML" in facts.rules.absent:
        return f"{_DIE}export -f die\n"
    on_host = facts.on_host if phase is Phase.EXTRA_DATA else None
    dirs = on_host.element_dirs if on_host is not None else facts.element_dirs
    array = "".join(f"[{name}]={path} " for name, path in dirs.items())
    return (
        f"{_DIE}get_image_element_array() {{ echo {shlex.quote(array)}; }}\n"
        '_ps4() { printf "%-80s " "${BASH_SOURCE[1]-}:${BASH_LINENO[0]}:${FUNCNAME[1]-}"; }\n'
        "export -f die get_image_element_array _ps4\n"
    )


def without_effect(facts: Facts) -> list[str]:
    """The variables of the user that scripts of no phase see as they were given, for virt-dib has its own."""
    seen = [for_phase(facts, phase) for phase in filter(facts.rules.has, Phase)]
    given = facts.spec.variables.items()
    return [name for name, value in given if all(variables.get(name) != value for variables in seen)]


def length_problems(facts: Facts) -> list[Problem]:
    """The variables that are longer than the kernel takes: no script would start."""
    sizes_bytes: dict[str, int] = {}
    most_bytes = 0
    for phase in filter(facts.rules.has, Phase):
        texts = for_phase(facts, phase) | {"get_image_element_array": functions(facts, phase)}
        lengths = {name: len(os.fsencode(f"{name}={text}")) + 1 for name, text in texts.items()}
        sizes_bytes |= {name: length for name, length in lengths.items() if length > LONGEST_BYTES}
        most_bytes = max(most_bytes, sum(lengths.values()))
    hint = "give fewer elements, shorter values, or files instead: DIB_BLOCK_DEVICE_CONFIG=file:///PATH"
    found = [
        Problem(f"the variable '{name}' has {length >> 10} KiB, more than programs can have in one", hint)
        for name, length in sizes_bytes.items()
    ]
    if not found and most_bytes > MOST_BYTES:
        found = [Problem(f"the variables have {most_bytes >> 10} KiB together, more than programs can have", hint)]
    return found


def _lower_case_proxies(variables: Mapping[str, str]) -> dict[str, str]:
    """Of the proxies in upper case: apt, wget and, of http_proxy, curl and git know the lower case only."""
    return {name.lower(): variables[name] for name in _PROXIES if name in variables}


def exports(variables: Mapping[str, str]) -> str:
    """Bash text that sets and exports *variables*."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(variables.items()))


def declarations(variables: Mapping[str, str]) -> str:
    """The DIB_* of *variables* as bash's ``declare -p`` prints them (DIB_ENV since DIB 3.20.0)."""
    chosen = sorted((name, value) for name, value in variables.items() if name.startswith("DIB_"))
    return "\n".join(f"declare -x {name}={_declared(value)}" for name, value in chosen)


def _declared(value: str) -> str:
    if _CONTROL.search(value):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        escaped = escaped.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
        return "$'" + _CONTROL.sub(lambda match: f"\\{ord(match[0]):03o}", escaped) + "'"
    return '"' + re.sub(r'([\\"$`])', r"\\\1", value) + '"'


def _whole(environment: Mapping[str, str]) -> dict[str, str]:
    """The host's environment, as far as bash can have it, without its places for temporary files and our settings."""
    left_out = VARIABLES_OF_BASH | {"TMP", "TEMP", "TMP_DIR", "_"}
    return {
        name: value
        for name, value in environment.items()
        if _NAME.fullmatch(name) and name not in left_out and not name.startswith("VIRT_DIB_")
    }


def from_host(environment: Mapping[str, str]) -> dict[str, str]:
    """What of the host's environment extra-data.d may see."""
    return {
        name: value
        for name, value in environment.items()
        if _NAME.fullmatch(name) and not _OF_THE_HOST_ONLY.fullmatch(name)
    }
