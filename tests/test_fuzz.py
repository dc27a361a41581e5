# SPDX-License-Identifier: Apache-2.0
"""Whatever is asked for, in whatever words and files: an answer or an error of the user's, and no file elsewhere."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from diskimage_builder.block_device import blockdevice, utils
from diskimage_builder.block_device import config as dib_config
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from helpers import make_element, virt_dib
from virt_dib import (
    cli,
    command_line,
    device_config,
    dib_command,
    elements,
    hooks,
    image_file,
    layout,
    options,
    prerequisites,
    staging,
)
from virt_dib.errors import UsageError, VirtDibError
from virt_dib.files import remove_tree
from virt_dib.releases import NEWEST
from virt_dib.scripts import Scripts
from virt_dib.spec import BuildSpec, Phase, parse_duration, parse_size
from virt_dib.supermin import cache_dir

# Of bytes that are no UTF-8, too, as arguments and variables may have them.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.just("\udce9"), max_size=8)
ODD_TEXTS = TEXTS | st.sampled_from(
    ["", " ", "-", "--", "..", "/", "~", "*", "$(id)", "a\nb", "\x1b[2J", "٣", "x" * 300]
)

# ---- command lines ----

VALUES = ODD_TEXTS | st.sampled_from([
    "5G", "auto", "1e400", "qcow2,raw", "docker", "ext4", "xfs", "on", "off", "0", "1", "99999999999999999999", "2h",
    "before-root", "after-error,x", "fd:1", "fd:-1", "stream:stdout", "vm", "sandbox", "a:b", "A=b",
    "DIB_IMAGE_SIZE=x",
    "DIB_BLOCK_DEVICE_CONFIG=- [", "DIB_JOURNAL_SIZE=-1", "/dev/null", "/dev/zero", ".", "nothing/x",
])  # fmt: skip
NOT_TO_WRITE = frozenset({"--machine-readable"})
"""What names a file to be written, which may be anywhere."""


def words_of(names: Sequence[str]) -> st.SearchStrategy[list[str]]:
    """Command lines of options, whole and cut, with values and without, and of anything else."""
    name = st.sampled_from(sorted(set(names) - NOT_TO_WRITE))
    cut = st.tuples(name, st.integers(1, 12)).map(lambda pair: pair[0][: pair[1]])
    option = name | cut | TEXTS.map(lambda text: f"-{text}") | TEXTS.map(lambda text: f"--{text}")
    with_value = st.tuples(option, VALUES).map("=".join)
    words = st.lists(option | with_value | VALUES, max_size=8)
    return words.map(lambda found: [word for word in found if not word.lstrip("-").startswith("mac")])


ENVIRONMENTS = st.dictionaries(
    st.sampled_from([
        "ARCH", "FS_TYPE", "ROOT_LABEL", "IMAGE_NAME", "DIB_DEBUG_TRACE", "SKIP_BASE", "ELEMENTS_PATH",
        "QEMU_IMG_OPTIONS",
        "DIB_IMAGE_CACHE", "DIB_IMAGE_SIZE", "TMP_DIR", "break", "DIB_QUIET", "DIB_NO_TIMESTAMP", "DIB_CHECKSUM",
        "HOME",
        "VIRT_DIB_ENVIRONMENT", "VIRT_DIB_KVM", "VIRT_DIB_TIMEOUT", "VIRT_DIB_NETWORK", "VIRT_DIB_PYTHON",
        "VIRT_DIB_X",
        "LIBGUESTFS_BACKEND_SETTINGS", "XDG_CONFIG_HOME", "XDG_CONFIG_DIRS", "RAMDISK_ELEMENT", "DOCKER_TARGET",
        "http_proxy", "A\n", "BASH_FUNC_x%%",
    ]),
    VALUES,
    max_size=5,
)  # fmt: skip


@given(words_of(list(options.BY_NAME)), ENVIRONMENTS)
@example(["--size"] * 7, {})
@example(["-" + "q" * 100_000], {})
def test_command_lines_are_read_to_their_end(words: list[str], environment: dict[str, str]) -> None:
    command = command_line.parse(words, environment)
    assert command.spec.arguments == tuple(words)
    assert all(problem.message for problem in command.problems)


@given(words_of(["-a", "-o", "-t", "-x", "-u", "-c", "-n", "-p", "--logfile", "--image-size", "--help"]), ENVIRONMENTS)
def test_command_lines_of_the_drop_ins_are_read_to_their_end(words: list[str], environment: dict[str, str]) -> None:
    command = dib_command.parse(words, environment, prog="virt-disk-image-create", ramdisk=False)
    assert all(problem.message for problem in command.problems)


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home, a directory for temporary files and the current one, all empty, on a host that has what builds need."""
    top = tmp_path_factory.mktemp("surroundings")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("home", "temporary", "here"):
            (top / name).mkdir()
        patch.setenv("HOME", str(top / "home"))
        patch.setenv("TMPDIR", str(top / "temporary"))
        patch.delenv("XDG_CACHE_HOME", raising=False)
        patch.chdir(top / "here")
        patch.setattr(prerequisites, "require_prerequisites", list)
        yield top


def everything(top: Path) -> Iterator[Path]:
    """All there is below *top*; Path.rglob stumbles over links."""
    for directory, names, files in os.walk(top):
        yield from (Path(directory, name) for name in (*names, *files))


def below(top: Path) -> dict[Path, tuple[int, float | None]]:
    """All there is, and when files were written."""
    states = {path: path.lstat() for path in everything(top)}
    return {
        path: (state.st_mode, None if stat.S_ISDIR(state.st_mode) else state.st_mtime) for path, state in states.items()
    }


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=words_of(list(options.BY_NAME)))
@example(words=["--image-cache", "x" * 300])
@example(words=["--drive", ".", "--python", "/dev/null", "-B", "/", "-p", "/proc/self"])
def test_commands_that_cannot_be_done_leave_nothing(
    words: list[str], surroundings: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = below(surroundings)
    with contextlib.suppress(SystemExit):
        # The last word is no element: nothing is built, whatever the others say.
        assert cli.main([*words, "no\n-such-element"]) in (0, 1, 2)
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    # Colours are asked for; nothing else steers a terminal.
    assert "\x1b" not in re.sub(r"\x1b\[[0-9;]*m", "", out + err)
    assert below(surroundings) == before


ASKED = st.lists(
    st.sampled_from([
        ["--formats", "raw,qcow2,tar"], ["--formats", "squashfs,vhd"], ["--formats", "oci", "--docker-target", "a:b"],
        ["--checksum"], ["--size", "1G"], ["--size", "auto"], ["--fs-type", "xfs"], ["--root-label", "$(id)"],
        ["--qemu-img-options", "compat=1.1"], ["--mkfs-options", "-m 1"], ["-u"], ["--compression", "zstd"],
        ["--no-delete-on-failure"], ["--extra-packages", "../x,--y"], ["--install-type", "package"],
        ["--exclude-script", "../50-x"], ["--exclude-element", ".."], ["--no-network"], ["--smp", "1"],
        ["--no-host-certificates"], ["--image-cache", "cache"], ["--machine-readable=file:events"], ["-x"], ["-v"],
        ["--machine-readable"], ["--wrap", "--color"], ["--envvar", "TMPDIR=/nothing"], ["--envvar", "HOME=.."],
        ["--envvar", "DIB_IMAGE_CACHE=../x"], ["--envvar", "TMP_HOOKS_PATH=/tmp/x"], ["--envvar", "DIB_LOCKFILES=x"],
        ["--debug", "1"], ["--ramdisk-element", "../x"],
    ]),
    max_size=6,
)  # fmt: skip
IMAGE_NAMES = st.sampled_from(["x", " ", "~", "$(id)", "*", "\u65e5", "a'b", 'a"b', "..x", "x" * 200, "%s", "a\\b"])


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=ASKED, name=IMAGE_NAMES)
@example(asked=[["--no-delete-on-failure", "--checksum"], ["--image-cache", "cache"]], name="$(id)")
@example(asked=[["--machine-readable=file:events"], ["--formats", "raw,tar"]], name="a\\b")
def test_builds_that_come_as_far_as_the_appliance_leave_their_logs_alone(
    asked: list[list[str]], name: str, tmp_path_factory: pytest.TempPathFactory, element_dir: Path
) -> None:
    """Which does not start, for qemu is a program that fails at once. Not in this process, which it would fill."""
    if prerequisites.require_prerequisites():
        pytest.skip("this host has no appliance")
    top = tmp_path_factory.mktemp("as-far")
    for directory in ("out", "home", "temporary"):
        (top / directory).mkdir()
    environment = {
        "LIBGUESTFS_HV": "/bin/false", "VIRT_DIB_KVM": "off", "TMPDIR": str(top / "temporary"),
        "HOME": str(top / "home"), "XDG_CACHE_HOME": str(cache_dir().parent),
    }  # fmt: skip
    words = [word for words in asked for word in words]
    command: list[str | Path] = [*words, f"--name={name}", "--skip-base", "-p", element_dir, "tiny-os"]
    run = virt_dib(command, cwd=top / "out", environment=environment)
    assert run.exit_status == 1, run.stdout + run.stderr
    assert "starting the appliance: /bin/false" in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    assert sorted(path.name for path in top.iterdir()) == ["home", "out", "temporary"]
    left = {path.name for path in everything(top / "out")} - {f"{name}.log", "cache", "events"}
    if "--no-delete-on-failure" in words:
        left = {kept for kept in left if not (kept.startswith(f".{name}.") and kept.endswith(".partial"))}
    assert left == set()
    assert not list(everything(top / "temporary"))
    assert not list(everything(top / "home"))


# ---- sizes, numbers, and other values ----

SIZES = st.from_regex(r"[0-9.]{0,8} ?[a-zA-Z]{0,3}%?", fullmatch=True) | ODD_TEXTS


@given(SIZES)
def test_sizes_of_images(text: str) -> None:
    with contextlib.suppress(UsageError):
        size_bytes = parse_size(text)
        assert size_bytes is None or 0 < size_bytes <= 1 << 60
    with contextlib.suppress(UsageError):
        assert 0 < parse_duration(text, "the time") <= 366 * 86400


@given(SIZES)
@example("9" * 400 + "TiB")
def test_sizes_in_configurations_are_those_of_dib(text: str) -> None:
    ours = device_config.size_bytes(text)
    try:
        theirs = utils.parse_abs_size_spec(text)
    except (RuntimeError, ValueError, OverflowError):
        theirs = None
    # DIB also takes what no disk can be.
    assert ours == (theirs if theirs and 0 < theirs <= 1 << 60 and text.isascii() and text[-1:] != "\n" else None)


NUMBERS = ("DIB_IMAGE_SIZE", "DIB_IMAGE_EXTRA_SIZE", "DIB_JOURNAL_SIZE", "MAX_ONLINE_RESIZE", "DIB_BLOCK_SIZE")


@given(st.dictionaries(st.sampled_from(NUMBERS), SIZES), st.sampled_from(["ext4", "xfs", "vfat"]))
def test_numbers_in_variables(variables: dict[str, str], fs_type: str) -> None:
    spec = BuildSpec(name="x", output_dir=Path(), elements=("one",), size_bytes=None, variables=variables)
    with contextlib.suppress(UsageError):
        assert 0 < layout.image_size_kib(spec, [], fs_type, 1000) <= 2 << 30
    with contextlib.suppress(UsageError):
        assert "\n" not in layout.mkfs_options(spec, fs_type)


# ---- block device configurations ----

WORDS = [
    "- ", "local_loop", "mkfs", "mount", ": ", "{", "}", "[", "]", ",", "\n", "  ", "name", "image0", "&a ", "*a",
    "<<", "|",
    ">", "'", '"', "!!int ", "!!python/name:os.system ", "---", "#", "%", "@", "`", "\t", "~", "1e400", "\x07", "é",
    "?",
]  # fmt: skip
TREE = [
    {"local_loop": {"name": "image0", "size": "5G"}},
    {"local_loop": {"name": "second", "directory": "/x", "block_size": 4096}},
    {
        "partitioning": {
            "base": "image0",
            "label": "gpt",
            "partitions": [
                {"name": "esp", "type": "EF00", "size": "8M", "mkfs": {"type": "vfat", "mount": {"mount_point": "/e"}}},
                {"name": "root", "flags": ["boot"], "size": "100%", "mkfs": {"name": "mkfs_root", "opts": "-m 1"}},
            ],
        }
    },
    {"mount": {"name": "m", "base": "mkfs_root", "mount_point": "/", "fstab": {"options": "defaults"}}},
    {"lvm": {"name": "lvm", "pvs": [{"name": "pv", "base": "second"}], "vgs": [{"name": "vg", "base": ["pv"]}],
             "lvs": [{"name": "lv", "base": "vg", "size": "1G"}], "base": ["second"]}},
    {"mkfs": {"name": "f", "base": "lv", "type": "xfs", "label": "f"}},
]  # fmt: skip
LEAVES: st.SearchStrategy[object] = st.sampled_from([
    "image0", "root", "mkfs_root", "m", "/", "/a/../b", "relative", "ext4", "swap", "gpt", "1GiB", "99TiB", "101%",
    "", "é",
    "\0", "\ud800", "a\nb", None, True, 5, -1, 1.5, float("nan"), 10**30, [], ["x"], {}, {"a": 1}, [[]],
])  # fmt: skip


def places(tree: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """The way to each value."""
    inside = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inside:
        yield (*path, key)
        yield from places(value, (*path, key))


PLACES = list(places(TREE))


@st.composite
def configurations(draw: st.DrawFn) -> object:
    """A good configuration with some values replaced, removed, or moved."""
    tree: Any = copy.deepcopy(TREE)
    for path in draw(st.lists(st.sampled_from(PLACES), max_size=3)):
        *way, last = path
        with contextlib.suppress(LookupError, TypeError):
            holder = tree
            for key in way:
                holder = holder[key]
            if draw(st.booleans()):
                del holder[last]
            else:
                holder[last] = draw(LEAVES)
    return tree


def checked_by_dib(text: str, directory: str) -> device_config.Nodes | None:
    """What DIB makes of a configuration, or None if it refuses; in this process, as guest/block-device.py does it."""
    params = {"image-dir": "/i", "root-fs-type": "ext4", "root-label": None, "mount-base": "/m", "build-dir": directory}
    device = blockdevice.BlockDevice({**params, "image-size": "1TiB"})
    try:
        device.config = dib_config.config_tree_to_graph(yaml.safe_load(text))
        device._merge_rootfs_params()  # noqa: SLF001 - cmd_init calls it, too, and writes files
        nodes: device_config.Nodes = json.loads(json.dumps(device.config))
        dib_config.create_graph(nodes, device.params, blockdevice.BlockDeviceState())
    except Exception:  # noqa: BLE001 - DIB raises anything
        return None
    return nodes


@settings(max_examples=250)
@given(configurations())
@example(
    [
        *TREE[:1],
        *TREE[3:4],
        {"mkfs": {"name": "mkfs_root", "base": "image0"}},
        {"partitioning": {"base": ["image0"], "label": "gpt", "partitions": []}},
    ]
)
def test_what_dib_makes_of_configurations_is_understood(tree: object) -> None:
    text = yaml.safe_dump(tree)
    spec = BuildSpec(
        name="x", output_dir=Path(), elements=("one",), variables={"DIB_BLOCK_DEVICE_CONFIG": text}, size_bytes=1 << 33
    )
    try:
        assert device_config.choose(spec, []) == text
    except UsageError:
        return
    with tempfile.TemporaryDirectory() as directory:
        nodes = checked_by_dib(text, directory)
    if nodes is None:
        return
    if list(device_config.problems(nodes, spec)):
        return
    # As layout.prepare does it when DIB has no objections.
    with contextlib.suppress(UsageError):
        images, parts = layout.images_and_parts(nodes, spec)
        assert images[0].name == layout.OUTPUT_IMAGE
        assert all(part.mount_point.startswith("/") for part in parts if part.fillable)
    assert all(isinstance(name, str) for name in device_config.file_systems(nodes))


@given(st.lists(st.sampled_from(WORDS) | TEXTS, max_size=25).map("".join))
@example("- &a [*a]")
@example("[" * 10_000)
@example("? " * 3000)
def test_texts_that_are_hardly_configurations(text: str) -> None:
    spec = BuildSpec(name="x", output_dir=Path(), elements=("one",), variables={"DIB_BLOCK_DEVICE_CONFIG": text})
    with contextlib.suppress(UsageError):
        device_config.choose(spec, [])


# ---- files of settings and of images ----

LINES = [
    'isolation = "sandbox"', "kvm = on", "smp = 2", "smp = 9999999999999999999999", "timeout = 1979-05-27", "[x]",
    "[[", "a.b = 1",
    "'''", '"""', "network = [true,", "= 1", 'drive = "\\u0000"', "python = '~/x'", "smp = 0x_1", "\x00", "# é",
    "memsize = nan",
]  # fmt: skip


@given(
    st.lists(st.sampled_from(LINES) | TEXTS, max_size=6).map("\n".join), st.lists(st.sampled_from(WORDS), max_size=25)
)
def test_files_of_settings_and_of_images(settings_text: str, image_words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.toml").write_bytes(os.fsencode(settings_text))
        (Path(directory) / "images.yaml").write_bytes("".join(image_words).encode())
        command = command_line.parse(["--config", f"{directory}/config.toml", "x"], {"HOME": directory})
        assert all(problem.message for problem in command.problems)
        with contextlib.suppress(VirtDibError):
            image_file.read([Path(directory) / "images.yaml"])


# ---- elements ----

SECRET = "a key of the user's"
FILES = st.sampled_from([
    "", "#!/bin/bash\n", "#!/bin/bash\r\n", "#!bash", "#!", "#!/no/such\n", "\ufeff#!/bin/sh",
    "#!/usr/bin/python3\n((", "a\0b",
    "one\n", "two\r\n\r\n", "operating-system", "- [", "x" * 5000,
])  # fmt: skip
TARGETS = st.sampled_from([
    "..", ".", "/", "nothing", "x" * 300, "x/" * 2000, "/dev/zero", "/proc/self", "50-x", "../two", "../../secret",
    "../../../secret", "../../secret/key", "/usr/bin/env", "install.d", "self",
])  # fmt: skip
NAMES = st.sampled_from([
    "root.d", "install.d", "environment.d", "static", "tests", "__pycache__", "element-deps", "element-provides",
    "50-x", "60-y",
    "x.sh", ".hidden", "block-device-default.yaml", "two words", "line\nend", "-rf", "$(id)", "'", "caf\udce9",
    "a.pyc", "self",
])  # fmt: skip
ENTRIES = st.recursive(
    st.tuples(st.just("file"), FILES, st.sampled_from([0o644, 0o755, 0o4711, 0o000, 0o610]))
    | st.tuples(st.just("link"), TARGETS)
    | st.just(("fifo",))
    | st.just(("hole",)),
    lambda inside: st.dictionaries(NAMES, inside, max_size=5),
    max_leaves=12,
)
TREES = st.dictionaries(NAMES, ENTRIES, max_size=6)


def make(path: Path, entry: Any) -> None:  # noqa: ANN401 - what the strategy above gives
    if isinstance(entry, dict):
        path.mkdir()
        for name, inside in entry.items():
            make(path / name, inside)
    elif entry[0] == "file":
        path.write_bytes(entry[1].encode())
        path.chmod(entry[2])
    elif entry[0] == "link":
        path.symlink_to(entry[1])
    elif entry[0] == "fifo":
        os.mkfifo(path)
    else:
        with path.open("wb") as stream:
            stream.truncate(1 << 40)


def gathered(place: Path) -> staging.Staging:
    """All that plan.make_plan does with elements, but for DIB's answers."""
    search_path = [place / "elements"]
    available = elements.discover(search_path)
    chosen = elements.resolve(["base-os", "one", "two"], available)
    content = staging.Staging(place / "staging")
    tree = hooks.compose(chosen, content.hooks_dir, excluded_scripts=frozenset(["60-y"]), search_path=search_path)
    scripts = Scripts(tree, chosen, NEWEST, on_host=False)
    assert all(problem.hint for problem in scripts.problems())
    assert all(scripts.warnings())
    content.add_elements(chosen, search_path)
    device_config.choose(BuildSpec(name="x", output_dir=place, elements=("one",)), chosen)
    names = {script.name for phase in Phase for script in tree.scripts(phase)}
    assert all(hooks.is_script_name(name) for name in names)
    return content


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(TREES, TREES)
@example({"install.d": ("link", "../../secret")}, {})
@example({}, {"element-deps": ("file", "secret\n", 0o644)})
@example({"50-x": ("hole",), "tests": {"x": ("hole",)}}, {"install.d": {"50-x": ("link", "x/" * 2000)}})
def test_trees_of_elements(one: dict[str, Any], two: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "secret").mkdir()
        (place / "secret" / "key").write_text(SECRET)
        make_element(place / "elements", "base-os", {}, provides=["operating-system"])
        # Links out of an element lead here; links of the search path itself do, too.
        (place / "elements" / "secret").symlink_to(place / "secret")
        make(place / "elements" / "one", one)
        make(place / "elements" / "two", two)
        try:
            content = gathered(place)
        except VirtDibError as error:
            found = error.problems
        else:
            found = ()
            for path in everything(content.directory):
                mode = path.lstat().st_mode
                assert stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
                assert path.name != "key"
        assert all(problem.message and problem.hint for problem in found)
        remove_tree(place / "staging")
        assert sorted(path.name for path in place.iterdir()) == ["elements", "secret"]
