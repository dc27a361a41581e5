# SPDX-License-Identifier: Apache-2.0
"""The image disk's layout: DIB's block device configuration, and the sizes DIB computes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from virt_dib import device_config, tools
from virt_dib import environment as contract
from virt_dib.dib import DibInstallation
from virt_dib.elements import Element
from virt_dib.errors import Problem, ToolError, UsageError, VirtDibError
from virt_dib.files import temp_dir_variable
from virt_dib.releases import NEWEST, DiskMaker, Rules
from virt_dib.spec import LARGEST_DISK_BYTES, BuildSpec

_KIB_PER_MIB = 1024
_IMAGE_STEP_KIB = 64
_DEFAULT_JOURNAL_MIB = 64
_EFI_EXTRA_KIB = 525 * _KIB_PER_MIB
_SLICE_BYTES = 1 << 41
"""Room on the image disk for an image whose size is not known yet."""

OUTPUT_IMAGE = "image0"
"""The node whose disk becomes the output; DIB has the name hard-wired (contract section 3.1)."""

_PLAIN_OPTIONS = re.compile(r"(?: -[bCgGiIJmNOTE] ?[^ -][^ ]*| -[jq])*")
FILLABLE = ("ext2", "ext3", "ext4")
"""The file systems that mke2fs makes with their content in them."""

_ANSWERS = {
    "root_label": ("getval:root-label", "DIB_ROOT_LABEL"),
    "root_fstype": ("getval:root-fstype", "DIB_ROOT_FSTYPE"),
    "boot_label": ("getval:boot-label", "DIB_BOOT_LABEL"),
    "mount_points": ("getval:mount-points", "DIB_MOUNTPOINTS"),
}
"""What dib-block-device is asked for, and the variable that a release has if it can answer."""
_DEFAULT_LABEL = "cloudimg-rootfs"
_SHORT_LABELS = {"xfs": "img-rootfs", "vfat": "IMG-ROOTFS"}
"""The default where that is too long; of vfat in capitals, which DIB makes of any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """One disk image the configuration makes, a ``local_loop`` node of DIB's."""

    name: str
    directory: str
    """In the guest; dib-block-device opens ``DIRECTORY/NAME.raw`` there."""
    offset_bytes: int
    """On the image disk."""
    size_bytes: int | None
    """None: the size of the build (``--size``, or computed from the tree)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What a tree has for one file system of the image."""

    mount_point: str
    fillable: bool
    """The file system can be made with its content by mke2fs on the host, in its place in the image disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What is decided about the image disk before the appliance starts."""

    config: str
    """DIB's block device configuration, YAML."""
    params: Mapping[str, Any]
    """The parameters of dib-block-device in the guest (contract section 3.2), sizes and mkfs options aside."""
    block_devices: contract.BlockDevices
    images: Sequence[Image]
    """The one that becomes the output first."""
    discarded: tuple[str, ...]
    """Names of the other images: built, as the elements may want it, but thrown away, as DIB does."""
    disk_bytes: int
    """Length of the image disk, nearly all of it a hole."""
    parts: Sequence[Part]
    """In the order of mounting, the root first; none where the root is not fillable."""
    file_systems: tuple[str, ...]
    """The types of those that are made."""


def guest_script(name: str) -> Path:
    """The file *name* of those that come with virt-dib for the guest."""
    return Path(str(resources.files("virt_dib"))) / "guest" / name


def prepare(spec: BuildSpec, elements: Sequence[Element], dib: DibInstallation, scratch: Path) -> Layout:
    """Choose the configuration and have DIB itself check it, on the host, in the directory *scratch*.

    Raises:
        UsageError: the configuration cannot be read, or DIB refuses it.
        ToolError: dib-block-device does not run.
    """
    if dib.rules.disk_maker is not DiskMaker.CONFIGURATION:
        return _runners_layout(spec, dib.rules)
    config = device_config.choose(spec, elements)
    scratch.mkdir()
    (scratch / "config.yaml").write_text(config, encoding="utf-8")
    params = {
        "config": str(scratch / "config.yaml"),
        "image-dir": str(scratch),
        "root-fs-type": spec.fs_type,
        # DIB has none for vfat that is short enough.
        "root-label": spec.root_label or (_SHORT_LABELS["vfat"] if spec.fs_type == "vfat" else None),
        "mount-base": str(scratch / "mnt"),
        "build-dir": str(scratch),
    }
    questions = {name: key for name, (key, variable) in _ANSWERS.items() if variable not in dib.rules.absent}
    answers, nodes = _ask(params, ["init", "check", *questions.values()], spec, dib, scratch)
    none = dict.fromkeys(_ANSWERS, "")
    images, parts = images_and_parts(nodes, spec)
    guest_params = params | {
        "config": f"{contract.BUILD_DIR}/block-device/config.yaml",
        "image-dir": contract.IMAGE_DIR,
        "mount-base": contract.TREE,
        "build-dir": contract.BUILD_DIR,
    }
    return Layout(
        config=config,
        params=guest_params,
        block_devices=contract.BlockDevices(**none | {name: answers[key] for name, key in questions.items()}),
        images=images,
        discarded=tuple(image.name for image in images[1:]),
        disk_bytes=max(image.offset_bytes + (image.size_bytes or _slice_bytes(spec)) for image in images),
        parts=parts,
        file_systems=device_config.file_systems(nodes),
    )


def _runners_layout(spec: BuildSpec, rules: Rules) -> Layout:
    """What is known of the image disk where scripts in the guest decide about its partitions."""
    if spec.variables.get("DIB_BLOCK_DEVICE_CONFIG") and rules.disk_maker is DiskMaker.SCRIPTS:
        raise UsageError(
            f"diskimage-builder {rules.version} has no block device configuration: DIB_BLOCK_DEVICE_CONFIG would do "
            "nothing",
            hint="leave it out, and let an element partition the disk: vm, or partitioning-sfdisk; or use a release "
            "from 2.4.0 on",
        )
    label = _SHORT_LABELS.get(spec.fs_type, _DEFAULT_LABEL)
    image = Path(contract.RUNNERS_IMAGE).stem if rules.disk_maker is DiskMaker.SCRIPTS else OUTPUT_IMAGE
    return Layout(
        config="",
        params={},
        block_devices=contract.BlockDevices(
            root_label=spec.root_label or label, root_fstype=spec.fs_type, boot_label="", mount_points="/"
        ),
        images=[Image(name=image, directory=contract.IMAGE_DIR, offset_bytes=0, size_bytes=None)],
        discarded=(),
        disk_bytes=_slice_bytes(spec),
        parts=(),
        file_systems=(spec.fs_type,),
    )


def check_numbers(spec: BuildSpec, rules: Rules = NEWEST) -> None:
    """Refuse variables that sizes depend on, whatever the elements are.

    Raises:
        UsageError: all that are wrong.
    """
    checks: list[Callable[[], object]] = [lambda: _online_resize(spec, FILLABLE[0])]
    if spec.size_bytes is None:
        checks.append(lambda: _number(spec, "DIB_IMAGE_SIZE"))
        checks.append(lambda: _number(spec, "DIB_IMAGE_EXTRA_SIZE", zero=True))
    if spec.fs_type == "ext4" and (rules.ext4_options_always or spec.size_bytes is None):
        checks.append(lambda: journal_mib(spec))
    problems: list[Problem] = []
    for check in checks:
        try:
            check()
        except UsageError as error:
            problems += error.problems
    if problems:
        raise UsageError.of(problems)


def image_size_kib(
    spec: BuildSpec, elements: Sequence[Element], root_fstype: str, tree_kib: int, rules: Rules = NEWEST
) -> int:
    """The size of the image: ``--size``, or what DIB computes from the tree by its *rules* (contract section 1.7).

    Raises:
        UsageError: a variable that sizes depend on is not a number, or the image is too large.
    """
    if spec.size_bytes is not None:
        return spec.size_bytes // 1024
    wanted = _number(spec, "DIB_IMAGE_SIZE")
    extra = _number(spec, "DIB_IMAGE_EXTRA_SIZE", zero=True)
    if wanted is not None:
        size_kib = int(wanted * _KIB_PER_MIB * _KIB_PER_MIB)
    elif extra is not None:
        size_kib = tree_kib + int(extra * _KIB_PER_MIB)
    else:
        size_kib = int(tree_kib / rules.tree_share)
    if wanted is None and root_fstype == "ext4":
        size_kib += journal_mib(spec) * _KIB_PER_MIB
    if any("block-device-efi" in element.name for element in elements):
        size_kib += _EFI_EXTRA_KIB
    if wanted is None and not rules.exact_sizes:
        size_kib = (size_kib // _IMAGE_STEP_KIB + 1) * _IMAGE_STEP_KIB
    else:
        size_kib = -(-size_kib // _IMAGE_STEP_KIB) * _IMAGE_STEP_KIB
    if size_kib * 1024 > _SLICE_BYTES:
        raise UsageError(
            f"an image of {size_kib >> 30} TiB is too large: at most {_SLICE_BYTES >> 40} TiB, if --size does not say "
            "its size",
            hint="give it a --size, or less as DIB_IMAGE_SIZE or DIB_IMAGE_EXTRA_SIZE",
        )
    return size_kib


def mkfs_options(spec: BuildSpec, root_fstype: str, rules: Rules = NEWEST) -> str:
    """The options of mkfs for the root file system, as one string, by DIB's *rules* (contract section 1.7)."""
    options = spec.mkfs_options
    automatic = spec.size_bytes is None and not spec.variables.get("DIB_IMAGE_SIZE")
    if root_fstype == "ext4" and (rules.ext4_options_always or automatic):
        options = f"-i 4096 -J size={journal_mib(spec)} {options}"
        if spec.variables.get("DIB_RELEASE") == "trusty":
            # Its fsck does not know the checksums and takes them for damage.
            options = f"-O ^metadata_csum {options}"
    resize = _online_resize(spec, root_fstype)
    return f"-E resize={resize} {options}".strip() if resize else options.strip()


def _online_resize(spec: BuildSpec, root_fstype: str) -> str:
    text = spec.variables.get("MAX_ONLINE_RESIZE", "")
    if not text:
        return ""
    if root_fstype not in FILLABLE:
        raise UsageError(
            f"cannot use MAX_ONLINE_RESIZE: only {', '.join(FILLABLE)} know it, and the root file system is "
            f"'{root_fstype}'",
            hint="leave it out, or choose another --fs-type",
        )
    if not _BLOCKS.fullmatch(text):
        raise UsageError(
            f"cannot use '{text}' as MAX_ONLINE_RESIZE",
            hint="--envvar MAX_ONLINE_RESIZE=N wants a whole number of blocks greater than 0",
        )
    return text


def journal_mib(spec: BuildSpec) -> int:
    """Size of the journal of an ext4 root, ``DIB_JOURNAL_SIZE`` or DIB's default.

    Raises:
        UsageError: the variable is no such size.
    """
    text = spec.variables.get("DIB_JOURNAL_SIZE", "")
    if not text:
        return _DEFAULT_JOURNAL_MIB
    # To bash and mke2fs, which get it from DIB, a leading 0 means octal; a fraction they refuse.
    if not _WHOLE_NUMBER.fullmatch(text):
        raise UsageError(
            f"cannot use '{text}' as DIB_JOURNAL_SIZE",
            hint="--envvar DIB_JOURNAL_SIZE=N wants a whole number of MiB greater than 0",
        )
    return int(text)


def params_text(layout: Layout, *, size_kib: int | None = None, options: str = "") -> str:
    """The parameter file of dib-block-device in the guest."""
    params = dict(layout.params)
    if size_kib is not None:
        params["image-size"] = f"{size_kib}KiB"
    if options:
        params["root-fs-opts"] = options
    return str(yaml.safe_dump(params))


def _ask(
    params: Mapping[str, Any], commands: Sequence[str], spec: BuildSpec, dib: DibInstallation, scratch: Path
) -> tuple[Mapping[str, str], device_config.Nodes]:
    """What DIB answers, and what it makes of the configuration."""
    params_path, answers_path = scratch / "params.yaml", scratch / "answers.json"
    params_path.write_text(yaml.safe_dump(dict(params)), encoding="utf-8")
    variables = {"DIB_BLOCK_DEVICE_PARAMS_YAML": str(params_path), "PATH": "/usr/bin:/bin"}
    variables["PYTHONPATH"] = str(dib.package_dir.parent)
    if "DIB_BLOCK_SIZE" in spec.variables:
        variables["DIB_BLOCK_SIZE"] = spec.variables["DIB_BLOCK_SIZE"]
    result = tools.run(
        [dib.python, guest_script("block-device.py"), answers_path, *commands],
        doing="checking the block device configuration",
        environment=variables,
        check=False,
    )
    try:
        nodes = json.loads((scratch / "states" / "block-device" / "config.json").read_text())
        wrong = list(device_config.problems(nodes, spec))
    except (OSError, ValueError):
        # DIB has not come so far, and says why.
        nodes, wrong = [], []
    refusal = _refusal(result.stderr, scratch) if result.exit_status != 0 else None
    if wrong and refusal is not None and "BlockDeviceSetupException" in str(refusal):
        # DIB has found something, too. Its other errors are not about what it has found, but follow from it.
        wrong += refusal.problems
    if wrong:
        raise UsageError.of(wrong)
    if refusal is not None:
        raise refusal
    answers: Mapping[str, str] = json.loads(answers_path.read_text())
    return answers, nodes


def _refusal(said: str, scratch: Path) -> VirtDibError:
    """The error for what dib-block-device says last."""
    last = (said.strip().splitlines() or ["no reason given"])[-1]
    # Of what follows the name of the error, the configuration may be the author.
    reason = re.sub(r"^dib-block-device \S+: ", "", last)
    if reason.startswith("ModuleNotFoundError"):
        return ToolError(f"running dib-block-device: {last}", hint="install diskimage-builder with pip")
    if re.match(r"OSError: \[Errno (?:28|122)\]", reason):
        return ToolError(
            f"checking the block device configuration in '{scratch}': no space left",
            hint=f"set {temp_dir_variable()} to a directory with more room, or make some there",
        )
    key = re.fullmatch(r"KeyError: '(?P<key>\w+)'", reason)
    if key is not None:
        last = f"a device in it has no '{key['key']}'"
    return UsageError(
        f"diskimage-builder refuses the block device configuration: {last}",
        hint="check DIB_BLOCK_DEVICE_CONFIG, the block-device element, --root-label and --fs-type",
    )


def images_and_parts(nodes: device_config.Nodes, spec: BuildSpec) -> tuple[Sequence[Image], Sequence[Part]]:
    """The images of a configuration in which DIB and ``device_config.problems`` find nothing wrong, and their parts.

    Raises:
        UsageError: none of the images can become the output, or the size of one is none.
    """
    return _images(nodes, spec), _parts(nodes, spec)


def _images(nodes: Sequence[Mapping[str, Any]], spec: BuildSpec) -> tuple[Image, ...]:
    """The configuration's images side by side on the image disk; the one that becomes the output comes first."""
    images: list[Image] = []
    offset_bytes = 0
    loops = [node["local_loop"] for node in nodes if "local_loop" in node]
    for loop in sorted(loops, key=lambda loop: loop["name"] != OUTPUT_IMAGE):
        size_bytes = _config_size_bytes(loop["size"]) if "size" in loop else None
        images.append(
            Image(
                name=loop["name"],
                directory=loop.get("directory", contract.IMAGE_DIR),
                offset_bytes=offset_bytes,
                size_bytes=size_bytes,
            )
        )
        offset_bytes += size_bytes or _slice_bytes(spec)
    if not images or images[0].name != OUTPUT_IMAGE:
        raise UsageError(
            f"the block device configuration has no local_loop named '{OUTPUT_IMAGE}'",
            hint=f"name the local_loop of the image's disk {OUTPUT_IMAGE}, as diskimage-builder wants it",
        )
    return tuple(images)


def _config_size_bytes(value: object) -> int:
    found = device_config.size_bytes(value)
    if found is None:
        raise UsageError(
            f"cannot use '{value}' as the size of a local_loop in the block device configuration",
            hint="give a number greater than 0 and a unit, such as 10GiB",
        )
    return found


def _parts(nodes: Sequence[Mapping[str, Any]], spec: BuildSpec) -> tuple[Part, ...]:
    """Which file systems lie in one piece on the output image and are of mke2fs's kinds."""
    plain = [
        loop["name"]
        for loop in device_config.of_kind(nodes, "local_loop")
        if loop["name"] == OUTPUT_IMAGE and device_config.sector_bytes(loop, spec) == str(device_config.SECTOR_BYTES)
    ]
    for table in device_config.of_kind(nodes, "partitioning"):
        if table.get("base") in plain:
            plain += [partition.get("name") for partition in table["partitions"]]
    file_systems = {node["name"]: node for node in device_config.of_kind(nodes, "mkfs")}
    parts = []
    for mount in sorted(device_config.of_kind(nodes, "mount"), key=lambda mount: str(mount["mount_point"])):
        file_system = file_systems[mount["base"]]
        kind, options = file_system.get("type"), str(file_system.get("opts") or "")
        if file_system["name"] == device_config.ROOT_NODE:
            resize = spec.variables.get("MAX_ONLINE_RESIZE")
            kind = kind or spec.fs_type
            options = f"{options} {spec.mkfs_options} {f'-E resize={resize}' if resize else ''}"
        if kind != "swap":
            fillable = file_system["base"] in plain and kind in FILLABLE and are_plain_options(options.split())
            parts.append(Part(mount_point=mount["mount_point"], fillable=fillable))
    return tuple(parts) if parts and parts[0].mount_point == "/" and parts[0].fillable else ()


def are_plain_options(words: Sequence[str]) -> bool:
    """Whether options of mke2fs describe the file system, and not where it is or what is in it."""
    return _PLAIN_OPTIONS.fullmatch("".join(f" {word}" for word in words if word)) is not None


def _slice_bytes(spec: BuildSpec) -> int:
    return spec.size_bytes if spec.size_bytes is not None else _SLICE_BYTES


_NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
"""What awk, which DIB reckons sizes with, takes for a number as a whole."""
_BLOCKS = re.compile(r"[1-9][0-9]{0,17}[kKmMgGtT]?")
"""What mke2fs takes for a number of blocks."""
_WHOLE_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


def _number(spec: BuildSpec, name: str, *, zero: bool = False) -> float | None:
    """The variable *name*, None where it is unset or empty; *zero* says whether it may be 0."""
    text = spec.variables.get(name, "").strip(" \t")
    if not text:
        return None
    number = float(text) if _NUMBER.fullmatch(text) else -1.0
    if not 0 <= number <= LARGEST_DISK_BYTES or (number == 0 and not zero):
        raise UsageError(
            f"cannot use '{text}' as {name}",
            hint=f"--envvar {name}=N wants a number {'of at least' if zero else 'greater than'} 0",
        )
    return number
