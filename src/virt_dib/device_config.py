# SPDX-License-Identifier: Apache-2.0
"""DIB's block device configuration: which one a build has, and what is wrong with it.

DIB judges it (``layout.prepare``). Here is what DIB says without a word about the reason, says only when the tree has
been built, or never ends with.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from virt_dib.elements import Element
from virt_dib.errors import Problem, UsageError
from virt_dib.files import NOT_THERE, read_any, read_regular
from virt_dib.spec import LARGEST_DISK_BYTES, BuildSpec

FALLBACK = """\
- local_loop:
    name: image0
    mkfs:
      name: mkfs_root
      mount:
        mount_point: /
        fstab:
          options: "defaults"
          fsck-passno: 1
"""
"""One file system on the whole disk: what DIB takes when no element brings a configuration."""

ROOT_NODE = "mkfs_root"
"""The file system that DIB gives the root's label, type and options (contract section 3.1)."""
SECTOR_BYTES = 512
_SECTORS_BYTES = ("512", "1024", "2048", "4096")
"""What the kernel has for loop devices."""

_VARIABLE = "DIB_BLOCK_DEVICE_CONFIG"
_SECTOR_VARIABLE = "DIB_BLOCK_SIZE"
_LARGEST_BYTES = 1 << 20
_MOST_NODES = 100_000
"""Values in it when its aliases are followed, which could be without end."""
_TAG = "tag:yaml.org,2002:"
_MAPS = ("local_loop", "partitioning", "lvm", "mkfs", "mount", "fstab")
_TEXTS = {
    "local_loop": ("name", "directory"),
    "mkfs": ("type", "label", "opts", "uuid"),
    "mount": ("mount_point",),
}
"""Keys of which DIB makes names and arguments of programs."""
_GPT_BYTES = 2 << 20
"""What DIB leaves free on a disk with a GPT."""
_EXAMPLE_HINT = "write a list of devices in YAML, such as those of diskimage-builder's block-device elements"
_SHOWN = 60

Nodes = Sequence[Mapping[str, Any]]
"""The configuration as DIB flattens it: one kind of device with its settings in each."""


# ---- the text ----


def choose(spec: BuildSpec, elements: Sequence[Element]) -> str:
    """The configuration in DIB's order: the variable (text, or ``file://``), an element's file, one file system.

    Raises:
        UsageError: it cannot be read, or cannot be one: all that is wrong.
    """
    given = spec.variables.get(_VARIABLE, "")
    if given.startswith("file://"):
        path = Path(given.removeprefix("file://"))
        hint = f"check {_VARIABLE}: file:// and an absolute path to text in UTF-8"
        return _checked(_read(path, named=True, hint=hint), str(path))
    if given:
        try:
            given.encode()
        except UnicodeEncodeError as error:
            # Where the bytes of an argument could not be decoded.
            raise UsageError(
                f"reading the block device configuration '{_VARIABLE}': it is not UTF-8",
                hint="write it in UTF-8, or give file:// and the path of a file that is",
            ) from error
        return _checked(given, _VARIABLE)
    arch = "ppc64el" if spec.arch in ("ppc64le", "ppc64el") else spec.arch
    for element in elements:
        for name in (f"block-device-{arch}.yaml", "block-device-default.yaml"):
            path = element.path / name
            if _is_there(path):
                hint = f"make it readable, and text in UTF-8, or leave out '{element.name}'"
                return _checked(_read(path, named=False, hint=hint), str(path))
    return FALLBACK


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        return error.errno not in NOT_THERE
    return True


def _read(path: Path, *, named: bool, hint: str) -> str:
    try:
        content = read_any(path, _LARGEST_BYTES) if named else read_regular(path, _LARGEST_BYTES)
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            path = Path(f"{str(path)[:_SHOWN]}…")
        raise UsageError(f"reading the block device configuration '{path}': {reason}", hint=hint) from error


class _MistakeError(Exception):
    """Something is wrong in the text, in *line* if it is there alone."""

    def __init__(self, reason: str, *, hint: str, line: int | None = None) -> None:
        super().__init__(reason)
        self._hint = hint
        self._line = line

    def told(self, where: str) -> Problem:
        """It, in the configuration that is *where*."""
        if self._line is None:
            return Problem(f"reading the block device configuration '{where}': {self}", self._hint)
        return Problem(f"reading the block device configuration '{where}', line {self._line}: {self}", self._hint)


def _checked(text: str, where: str) -> str:
    """*text*, if it is a list of devices in YAML; *where* it is, for messages."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
        _require_an_end(root)
        mistakes = list(_wrong_nodes(root))
    except yaml.YAMLError as error:
        mistakes = [_syntax(error, text)]
    except RecursionError:
        mistakes = [_MistakeError("it is nested too deeply", hint=_EXAMPLE_HINT)]
    except _MistakeError as mistake:
        mistakes = [mistake]
    if mistakes:
        raise UsageError.of(mistake.told(where) for mistake in mistakes)
    return text


def _syntax(error: yaml.YAMLError, text: str) -> _MistakeError:
    hint = "see the quotes and the indentation there"
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return _MistakeError("not YAML: a character that is not allowed", hint=hint, line=line)
    mark = (error.problem_mark or error.context_mark) if isinstance(error, yaml.MarkedYAMLError) else None
    reason = (error.problem or error.context) if isinstance(error, yaml.MarkedYAMLError) else str(error)
    return _MistakeError(f"not YAML: {reason}", hint=hint, line=mark.line + 1 if mark else None)


def _require_an_end(root: yaml.Node | None) -> None:
    """Refuse aliases that stand for more than anybody means: DIB writes out what they stand for."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        known = sizes.get(id(node), 0)
        if known is None:
            raise _MistakeError("an anchor in it holds itself", hint="write out what the alias stands for")
        if known:
            return known
        sizes[id(node)] = None
        total = 1 + sum(size(child) for child in _children(node))
        sizes[id(node)] = total
        return total

    if root is not None and size(root) > _MOST_NODES:
        raise _MistakeError(
            f"there are more than {_MOST_NODES} values in it, with its aliases followed",
            hint="use fewer aliases of long lists and maps",
        )


def _children(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _wrong_nodes(root: yaml.Node | None) -> Iterator[_MistakeError]:
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        yield _MistakeError("it is not a list of devices", hint=_EXAMPLE_HINT)
        return
    for entry in root.value:
        if not isinstance(entry, yaml.MappingNode):
            yield _MistakeError("this is not a device", hint=_EXAMPLE_HINT, line=_line(entry))
        elif len(entry.value) != 1:
            yield _MistakeError(
                f"a device wants one key, there are {len(entry.value)}",
                hint="begin each device with '- ', and indent its settings more than its kind",
                line=_line(entry),
            )
    seen: set[int] = set()
    pending = list(root.value)
    while pending:
        node = pending.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield from _wrong_values(node)
            pending += _children(node)


def _wrong_values(node: yaml.Node) -> Iterator[_MistakeError]:
    if isinstance(node, yaml.ScalarNode):
        # Neither environments nor the guest's shell can have them.
        if re.search("[\0\ud800-\udfff]", node.value):
            yield _MistakeError("a character that is not allowed", hint="take it out", line=_line(node))
        return
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = key.value if isinstance(key, yaml.ScalarNode) else None
        if name in _MAPS and not isinstance(value, yaml.MappingNode):
            hint = f"write the settings below '{name}', indented"
            yield _MistakeError(f"'{name}' has no settings", hint=hint, line=_line(key))
        if name == "partitions" and not _is_list_of_maps(value):
            hint = "begin each partition with '- name: '"
            yield _MistakeError("'partitions' is not a list of partitions", hint=hint, line=_line(key))


def _is_list_of_maps(node: yaml.Node) -> bool:
    return isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.MappingNode) for item in node.value)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


# ---- what DIB makes of it ----


def problems(nodes: Nodes, spec: BuildSpec) -> Iterator[Problem]:
    """What will not work, whether DIB accepts it or not."""
    yield from _text_problems(nodes)
    yield from _root_problems(nodes)
    file_systems = of_kind(nodes, "mkfs")
    names = [file_system.get("name") for file_system in file_systems]
    for mount in of_kind(nodes, "mount"):
        point, base = mount.get("mount_point"), mount.get("base")
        if base not in names:
            yield Problem(
                f"in the block device configuration: what is mounted at '{point}' is no file system: '{base}'",
                "give the name of an mkfs as the base of the mount",
            )
        if ".." in str(point).split("/"):
            yield Problem(
                f"in the block device configuration: cannot mount at '{point}'", "give a path from / on, without '..'"
            )
    # A variable is wrong for each of them.
    yield from dict.fromkeys(
        problem for loop in of_kind(nodes, "local_loop") for problem in _sector_problems(loop, spec)
    )
    for table in of_kind(nodes, "partitioning"):
        yield from _partition_problems(table, nodes, spec)


def _text_problems(nodes: Nodes) -> Iterator[Problem]:
    for kind, keys in _TEXTS.items():
        for device in of_kind(nodes, kind):
            for key in keys:
                if not isinstance(device.get(key, ""), str | None):
                    yield Problem(
                        f"in the block device configuration: the {key} of the {kind} '{device.get('name')}' is not "
                        f"text: {device[key]}",
                        "put it in quotes",
                    )


def _root_problems(nodes: Nodes) -> Iterator[Problem]:
    root = next((mount for mount in of_kind(nodes, "mount") if mount.get("mount_point") == "/"), None)
    if root is None:
        yield Problem(
            "in the block device configuration: nothing is mounted at '/'",
            "give the root's file system a mount with mount_point: /",
        )
        return
    file_system = next((one for one in of_kind(nodes, "mkfs") if one.get("name") == root.get("base")), None)
    for key in ("type", "label") if file_system is not None else ():
        if file_system is not None and key not in file_system:
            yield Problem(
                f"in the block device configuration: the file system at '/' has no {key}",
                f"give it one, or name it {ROOT_NODE}, for which --fs-type and --root-label say it",
            )


def sector_bytes(loop: Mapping[str, Any], spec: BuildSpec) -> str:
    """The size of the sectors of an image, as DIB finds it."""
    return str(spec.variables.get(_SECTOR_VARIABLE, loop.get("block_size", SECTOR_BYTES)))


def _sector_problems(loop: Mapping[str, Any], spec: BuildSpec) -> Iterator[Problem]:
    found = sector_bytes(loop, spec)
    if found in _SECTORS_BYTES:
        return
    hint = f"choose from {', '.join(_SECTORS_BYTES)}"
    if _SECTOR_VARIABLE in spec.variables:
        yield Problem(f"cannot use '{found}' as {_SECTOR_VARIABLE}", hint)
    else:
        yield Problem(f"in the block device configuration: cannot use '{found}' as a block_size", hint)


def _partition_problems(table: Mapping[str, Any], nodes: Nodes, spec: BuildSpec) -> Iterator[Problem]:
    """Sizes that DIB first looks at when the tree is there."""
    free_bytes = _disk_bytes(table.get("base"), nodes, spec)
    if free_bytes is not None and table.get("label") == "gpt":
        free_bytes -= _GPT_BYTES
    for partition in table.get("partitions", ()):
        name, size = partition.get("name"), partition.get("size")
        if size is None:
            yield Problem(
                f"in the block device configuration: partition '{name}' has no size",
                "give it one, such as 550MiB, or 100% for all that is left",
            )
            continue
        wanted_bytes = _partition_bytes(size, LARGEST_DISK_BYTES if free_bytes is None else free_bytes)
        if wanted_bytes is None:
            yield Problem(
                f"in the block device configuration: cannot use '{size}' as the size of partition '{name}'",
                "give a number and a unit, such as 550MiB, or 100% for all that is left",
            )
        elif free_bytes is not None:
            if not 0 < wanted_bytes <= free_bytes:
                yield Problem(
                    f"in the block device configuration: partition '{name}' of {size} does not fit: "
                    f"{max(free_bytes, 0) >> 20} MiB are left on the disk",
                    "give a larger --size, or a smaller partition",
                )
                return
            free_bytes -= wanted_bytes


def _disk_bytes(name: object, nodes: Nodes, spec: BuildSpec) -> int | None:
    """The length of the image called *name*, if it is one and that is known already."""
    loop = next((loop for loop in of_kind(nodes, "local_loop") if loop.get("name") == name), None)
    if loop is None:
        return None
    return size_bytes(loop["size"]) if "size" in loop else spec.size_bytes


def file_systems(nodes: Nodes) -> tuple[str, ...]:
    """The types of the file systems in it, each once."""
    return tuple(dict.fromkeys(str(one["type"]) for one in of_kind(nodes, "mkfs") if "type" in one))


def of_kind(nodes: Nodes, kind: str) -> list[Mapping[str, Any]]:
    """The settings of all devices of a *kind*."""
    return [node[kind] for node in nodes if kind in node]


# ---- sizes ----

_SIZE = re.compile(r"(?P<number>[0-9.]*) ?(?P<unit>[a-zA-Z]*)")
_UNITS = {
    "TiB": 1024**4, "GiB": 1024**3, "MiB": 1024**2, "KiB": 1024,
    "TB": 1000**4, "GB": 1000**3, "MB": 1000**2, "KB": 1000,
    "T": 1000**4, "G": 1000**3, "M": 1000**2, "K": 1000, "B": 1, "": 1,
}  # fmt: skip
"""DIB's own units (diskimage_builder/block_device/utils.py): G is decimal there."""


def size_bytes(value: object) -> int | None:
    """Bytes for a size as DIB reads it: ``10GiB``, ``5 G``, and ``GiB`` for one of them; None for what is none."""
    match = _SIZE.fullmatch(str(value))
    if match is None or match["unit"] not in _UNITS:
        return None
    try:
        found = int(_UNITS[match["unit"]] * float(match["number"] or "1"))
    except (ValueError, OverflowError):
        return None
    return found if 0 < found <= LARGEST_DISK_BYTES else None


def _partition_bytes(size: object, free_bytes: int) -> int | None:
    """As :func:`size_bytes`, for a partition: also a share of what is free. DIB wants text."""
    if not isinstance(size, str) or not size.endswith("%"):
        return size_bytes(size) if isinstance(size, str) else None
    share = re.fullmatch(r" *(?P<number>[0-9]{1,3}(?:\.[0-9]*)?|\.[0-9]+) *%", size)
    if share is None or not 0 < float(share["number"]) <= 100:  # noqa: PLR2004 - percent
        return None
    return int(free_bytes * float(share["number"]) / 100)
