# SPDX-License-Identifier: Apache-2.0
"""What is wrong is told before anything is built, all of it in one message."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from helpers import TESTS, make_element
from virt_dib import environment, prerequisites, tools
from virt_dib.errors import Problem, UsageError, VirtDibError
from virt_dib.plan import BuildPlan, make_plan
from virt_dib.spec import DEFAULT_MEMORY_MIB, BuildSpec, DropIn, Phase


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with ``elements``, ``work`` and ``out``, on a host that has what builds need."""
    monkeypatch.setattr(prerequisites, "require_prerequisites", list)
    make_element(tmp_path / "elements", "one", {"install.d/50-x": "#!/bin/bash\n"}, provides=["operating-system"])
    (tmp_path / "work").mkdir()
    (tmp_path / "again").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.fixture
def drive(place: Path) -> Path:
    """An empty one."""
    file = place / "drive.img"
    with file.open("wb") as stream:
        stream.truncate(64 << 20)
    return file


def test_places_of_ones_own_need_no_word(place: Path, drive: Path) -> None:
    assert planned(place, image_cache=place / "cache", drive=drive).warnings == ()


def test_places_that_others_can_write_to_are_told(place: Path, drive: Path) -> None:
    (place / "cache").mkdir()
    (place / "cache").chmod(0o1777)
    drive.chmod(0o666)
    assert planned(place, image_cache=place / "cache", drive=drive).warnings == (
        f"others can change the image cache, which gets into images: '{place}/cache': others can write to it",
        f"others can change the helper drive, which gets into images: '{drive}': others can write to it",
    )


@pytest.mark.parametrize(("mode", "safe"), [(0o777, False), (0o1777, True)])
def test_a_temporary_directory_in_which_others_can_replace_files_is_told(place: Path, mode: int, *, safe: bool) -> None:
    place.chmod(mode)
    told = f"others can replace the files of this build: '{place}': others can write to it"
    assert planned(place).warnings == (() if safe else (told,))


def spec_in(place: Path, **more: object) -> BuildSpec:
    fields: dict[str, object] = {
        "name": "x", "output_dir": place / "out", "elements": ("one",), "element_paths": (place / "elements",),
        "skip_base": True, "formats": ("qcow2", "raw"),
    }  # fmt: skip
    return BuildSpec(**fields | more)  # type: ignore[arg-type] # fields by name


def planned(place: Path, environment: Mapping[str, str] | None = None, **more: object) -> BuildPlan:
    return make_plan(spec_in(place, **more), place / "work", host_environment=environment or {})


@pytest.mark.parametrize(
    ("fields", "variables", "seen"),
    [
        ({}, {}, {"DIB_OFFLINE": "", "DIB_CHECKSUM": "0"}),
        ({}, {"DIB_OFFLINE": "1", "DIB_CHECKSUM": "md5"}, {"DIB_OFFLINE": "1", "DIB_CHECKSUM": "md5"}),
        ({"network": False}, {"DIB_OFFLINE": ""}, {"DIB_OFFLINE": "1"}),
        ({"checksums": ("md5",)}, {"DIB_CHECKSUM": "0"}, {"DIB_CHECKSUM": "1"}),
        ({"checksums": ("md5",)}, {"DIB_CHECKSUM": "md5"}, {"DIB_CHECKSUM": "md5"}),
    ],
)
def test_an_option_counts_where_a_variable_says_otherwise(
    place: Path, fields: Mapping[str, object], variables: Mapping[str, str], seen: Mapping[str, str]
) -> None:
    facts = make_plan(spec_in(place, variables=variables, **fields), place / "work", host_environment={}).facts
    for phase in (Phase.ROOT, Phase.INSTALL, Phase.CLEANUP):
        assert environment.for_phase(facts, phase).items() >= seen.items()


def test_variables_that_scripts_do_not_get_are_told(place: Path) -> None:
    variables = {"ELEMENTS_PATH": "/mine", "LC_ALL": "C", "DIB_RELEASE": "x", "DIB_OFFLINE": "", "HOME": "/me"}
    told = [
        f"--envvar {name} has no effect: virt-dib gives the scripts a value of its own"
        for name in ("ELEMENTS_PATH", "HOME")
    ]
    assert list(planned(place, variables=variables).warnings) == told


def planned_again(place: Path, **more: object) -> BuildPlan:
    return make_plan(spec_in(place, **more), place / "again", host_environment={})


def refused(place: Path, environment: Mapping[str, str] | None = None, **more: object) -> VirtDibError:
    with pytest.raises(VirtDibError) as caught:
        planned(place, environment, **more)
    assert all(problem.hint for problem in caught.value.problems)
    return caught.value


def test_a_plan(place: Path) -> None:
    (place / "conf").write_text("from the host\n")
    made = planned(place, {"DIB_APT_CONF": f"{place}/conf"}, qemu_img_options="compat=1.1")
    assert [element.name for element in made.elements] == ["one"]
    assert [output.name for output in made.formats] == ["qcow2", "raw"]
    assert made.layout.discarded == ()
    staged = made.staging.directory
    assert (staged / f"host-files{place}/conf").read_text() == "from the host\n"
    assert (staged / "elements/0/one/install.d/50-x").is_file()
    assert (staged / "build/hooks/install.d/50-x").is_file()
    assert list((place / "out").iterdir()) == []


def test_files_of_an_earlier_build_are_in_nobodys_way(place: Path) -> None:
    (place / "out/x.qcow2").touch()
    (place / "out/x.raw").symlink_to("/nowhere")
    (place / "out/x.log").symlink_to(place)
    (place / "out/x.d").mkdir()
    planned(place)


@pytest.mark.parametrize("name", ["x.qcow2", "x.raw", "x.log"])
def test_a_directory_in_the_place_of_a_file(place: Path, name: str) -> None:
    (place / "out" / name).mkdir()
    error = refused(place)
    assert isinstance(error, UsageError)
    assert str(error) == f"cannot write '{place}/out/{name}': a directory is in its place"


def test_a_directory_in_the_place_of_another_format(place: Path) -> None:
    (place / "out/x.raw").mkdir()
    planned(place, formats=("qcow2",))


@pytest.mark.parametrize("kind", ["file", "link", "link to nothing"])
def test_something_in_the_place_of_the_directory(place: Path, kind: str) -> None:
    path = place / "out/x.d"
    if kind == "file":
        path.touch()
    else:
        path.symlink_to(place if kind == "link" else "nothing")
    assert f"cannot write the directory '{path}'" in str(refused(place))


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({"formats": ("qcow2",)}, 231),
        ({"formats": ("qcow2",), "checksums": ("md5", "sha256")}, 224),
        ({"formats": ("raw",), "drop_in": DropIn(image_name="x", working_dir=Path())}, 224),
        ({"formats": ("raw",), "drop_in": DropIn(image_name="x", working_dir=Path(), keep_old=False)}, 233),
        ({"formats": ()}, 233),
    ],
)
def test_a_name_too_long_for_what_files_are_called_meanwhile(
    place: Path, fields: Mapping[str, object], longest: int
) -> None:
    planned(place, None, name="x" * longest, **fields)
    error = refused(place, None, name="x" * (longest + 1), **fields)
    assert isinstance(error, UsageError)
    *_, problem = error.problems
    assert problem.message.startswith(f"cannot write '{place}/out/")
    assert problem.message.endswith("': File name too long")
    assert problem.hint == "give a shorter --name"


def test_ramdisk_mode_has_no_formats_and_one_element_more(place: Path) -> None:
    make_element(place / "elements", "ramdisk", {"cleanup.d/50-r": "#!/bin/bash\n"})
    # No image, so nothing in its way, and no options for its format.
    (place / "out/x.qcow2").mkdir()
    made = planned(place, ramdisk=True, qemu_img_options="nonsense=1")
    assert [element.name for element in made.elements] == ["ramdisk", "one"]
    assert (made.formats, made.no_image) == ((), "--ramdisk")


def test_another_ramdisk_element(place: Path) -> None:
    make_element(place / "elements", "mine", {"cleanup.d/50-r": "#!/bin/bash\n"})
    made = planned(place, ramdisk=True, ramdisk_element="mine")
    assert [element.name for element in made.elements] == ["mine", "one"]
    assert "'noone'" in str(refused(place, ramdisk=True, ramdisk_element="noone"))
    assert [element.name for element in planned_again(place, ramdisk_element="mine").elements] == ["one"]


@pytest.mark.parametrize("name", ["no-final-image", "ironic-agent"])
def test_elements_that_want_no_image(place: Path, name: str) -> None:
    make_element(place / "elements", name, {"install.d/51-x": "#!/bin/bash\n"})
    make_element(place / "elements", "wants-it", {"install.d/52-x": "#!/bin/bash\n"}, depends=[name])
    made = planned(place, elements=("one", "wants-it"))
    assert (made.formats, made.no_image) == ((), f"element '{name}'")


def test_a_name_too_long(place: Path) -> None:
    assert "File name too long" in str(refused(place, name="x" * 300))


def test_a_directory_that_is_not_there(place: Path) -> None:
    assert "it does not exist" in str(refused(place, output_dir=place / "nothing"))


def test_all_that_is_wrong_in_one_message(place: Path) -> None:
    for name in ("x.qcow2", "x.log"):
        (place / "out" / name).mkdir()
    (place / "out/x.d").touch()
    earlier = Problem("found before", "mend it")
    with pytest.raises(UsageError) as caught:
        make_plan(
            spec_in(place, root_label="a b", qemu_img_options="foo=1", elements=("onne",)), place / "work", [earlier]
        )
    messages = [problem.message for problem in caught.value.problems]
    assert messages[0] == "found before"
    for word in ("x.qcow2", "x.log", "x.d", "'a b'", "foo", "onne"):
        assert [message for message in messages if word in message], word
    assert len(messages) == 7


def test_numbers_and_files_of_the_host_in_one_message(place: Path) -> None:
    variables = {"DIB_IMAGE_EXTRA_SIZE": "lots", "DIB_JOURNAL_SIZE": "some"}
    error = refused(place, {"DIB_CONTAINER_CONTEXT": "/"}, size_bytes=None, variables=variables)
    text = str(error)
    assert all(word in text for word in ("'lots'", "'some'", "cannot show '/'"))


def test_what_needs_no_elements_is_told_with_one_that_is_not_there(place: Path) -> None:
    variables = {
        "DIB_IMAGE_SIZE": "big", "DIB_IMAGE_EXTRA_SIZE": "-", "DIB_JOURNAL_SIZE": "u", "MAX_ONLINE_RESIZE": "far",
        "DIB_CONTAINER_CONTEXT": "/",
    }  # fmt: skip
    host = {"SSL_CERT_FILE": str(place / "nothing")}
    text = str(refused(place, host, size_bytes=None, variables=variables, elements=("nonel",)))
    words = ("'big'", "'-'", "'u'", "'far'", "cannot show '/'", f"'{place}/nothing'", "'nonel'")
    assert [word for word in words if word not in text] == []


def test_a_search_path_is_looked_at_without_diskimage_builder(place: Path) -> None:
    error = refused(place, element_paths=(place / "nothing",), dib_library=place / "nowhere")
    assert [word for word in ("/nothing'", "/nowhere'") if word not in str(error)] == []


@pytest.mark.parametrize(
    ("fs_type", "label"), [("ext4", "cloudimg-rootfs"), ("xfs", "img-rootfs"), ("vfat", "IMG-ROOTFS")]
)
def test_each_file_system_has_a_default_label_that_it_can_hold(place: Path, fs_type: str, label: str) -> None:
    devices = planned(place, fs_type=fs_type, elements=("one",)).layout.block_devices
    assert (devices.root_label, devices.root_fstype) == (label, fs_type)


def test_what_has_no_effect_is_told(place: Path) -> None:
    make_element(place / "elements", "two", {}, depends=["three", "four"])
    make_element(place / "elements", "three", {"install.d/60-y": "#!/bin/bash\n"})
    without_effect = planned(
        place,
        elements=("one", "two"),
        excluded_elements=frozenset({"four", "tpyo"}),
        excluded_scripts=frozenset({"50-x", "50-tpyo"}),
        drive_format="raw",
        docker_target="a:b",
        ramdisk_element="dracut-ramdisk",
    )
    assert without_effect.warnings == (
        "without --ramdisk, the ramdisk element 'dracut-ramdisk' is not added",
        "--exclude-element has no effect: nothing asks for an element 'tpyo'",
        "--exclude-script has no effect: no element has a script '50-tpyo'",
        "without --drive, --drive-format has no effect",
        "without the format docker or oci, --docker-target names no image",
    )


def test_the_name_of_an_image_for_containers_has_an_effect(place: Path) -> None:
    assert planned(place, formats=("oci",), docker_target="a:b").warnings == ()


# ---- on hosts that refuse ----

MAKE_PLAN = """
import sys
from pathlib import Path
from virt_dib import plan, prerequisites
from virt_dib.errors import VirtDibError
from virt_dib.spec import BuildSpec, Phase
place = Path(sys.argv[1])
prerequisites.require_prerequisites = list
spec = BuildSpec(name="x", output_dir=Path(sys.argv[3]), elements=("one",), element_paths=(place / "elements",),
                 skip_base=True, qemu_img_options="compat=1.1")
try:
    plan.make_plan(spec, Path(sys.argv[2]), host_environment={})
except VirtDibError as error:
    for problem in error.problems:
        print(type(error).__name__, problem)
"""


def plan_by(before: list[str], *arguments: str | Path) -> list[str]:
    """One line for each thing that is wrong, in another process."""
    return tools.run(
        [*before, sys.executable, "-c", MAKE_PLAN, *arguments],
        doing="planning",
        environment={"PYTHONPATH": str(TESTS.parent / "src"), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"},
    ).stdout.splitlines()


@pytest.mark.parametrize("size", ["8k", "64k", "512k", "1m", "3m"])
def test_no_space_while_planning(place: Path, size: str) -> None:
    (place / "elements/one/big").write_bytes(bytes(4 << 20))
    unshare = str(tools.require("unshare", purpose="run the tests", package="util-linux"))
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    mount = f'mount -t tmpfs -o size={size} none "{place}/work"; exec "$@"'
    said = plan_by([unshare, *as_root, "--mount", "/bin/sh", "-c", mount, "sh"], place, place / "work", place / "out")
    assert said
    assert all("no space left" in line.lower() for line in said), said
    assert said[0].startswith("ToolError")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_directory_that_may_not_be_written(place: Path) -> None:
    setpriv = str(tools.require("setpriv", purpose="run the tests", package="util-linux"))
    before = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups"]
    (first, *_) = plan_by(before, place, "/", "/")
    assert first.startswith("UsageError")
    assert "cannot write the image in '/': no right to write in it" in first


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_directory_that_may_not_be_entered_is_told_once(place: Path) -> None:
    (place / "out").chmod(0o700)
    setpriv = str(tools.require("setpriv", purpose="run the tests", package="util-linux"))
    before = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups"]
    said = plan_by(before, place, "/", place / "out")
    assert len([line for line in said if f"'{place}/out" in line]) == 1


def test_the_build_takes_no_more_processors_than_eight(place: Path) -> None:
    made = planned(place)
    assert 1 <= made.cpus <= 8
    assert made.memory_mib == DEFAULT_MEMORY_MIB


def test_two_places_for_one_cache(place: Path) -> None:
    (problem,) = refused(place, image_cache=place / "cache", variables={"DIB_IMAGE_CACHE": "/x"}).problems
    assert problem.message == "cannot use both --image-cache and the variable DIB_IMAGE_CACHE"


def test_a_python_script_that_nothing_can_be_said_about_is_left_to_the_guest(place: Path) -> None:
    deep = "#!/usr/bin/env python3\n" + "-" * 200_000 + "1\n"
    make_element(place / "elements", "deep", {"root.d/50-deep": deep})
    assert planned(place, elements=("one", "deep")).hooks.owners["root.d/50-deep"] == "deep"
