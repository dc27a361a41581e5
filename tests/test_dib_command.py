# SPDX-License-Identifier: Apache-2.0
"""Command lines and variables of disk-image-create, and what becomes of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from virt_dib import dib_cli, dib_command
from virt_dib.dib_command import DibCommand
from virt_dib.spec import BuildSpec, Isolation, host_arch

HOME = {"HOME": "/home/u"}


def parsed(arguments: Sequence[str], environ: Mapping[str, str] = HOME, *, ramdisk: bool = False) -> DibCommand:
    return dib_command.parse(arguments, environ, prog="virt-disk-image-create", ramdisk=ramdisk)


def right(arguments: Sequence[str], environ: Mapping[str, str] = HOME, *, ramdisk: bool = False) -> BuildSpec:
    command = parsed(arguments, environ, ramdisk=ramdisk)
    assert command.problems == ()
    return command.spec


def told(spec: BuildSpec) -> str:
    assert spec.drop_in is not None
    return spec.drop_in.image_name


def test_defaults() -> None:
    spec = right(["debian-minimal"])
    assert (spec.name, told(spec), spec.formats, spec.size_bytes) == ("image", "image", ("qcow2",), None)
    assert (spec.elements, spec.element_paths, spec.arch, spec.fs_type) == (
        ("debian-minimal",),
        (),
        host_arch(),
        "ext4",
    )
    assert (spec.checksums, spec.compress, spec.network, spec.ramdisk, spec.skip_base) == ((), True, True, False, False)
    assert spec.image_cache == Path("/home/u/.cache/image-create")
    assert spec.drop_in is not None
    assert (spec.drop_in.working_dir, spec.drop_in.keep_old) == (Path.cwd(), True)
    assert dict(spec.variables) == {}


@pytest.mark.parametrize(
    ("arguments", "elements"),
    [
        (["a", "b"], ("a", "b")),
        (["a b", "", " c  d "], ("a", "b", "c", "d")),
        (["a", "-x", "b", "-o", "n", "c"], ("a", "b", "c")),
        (["-x", "--", "a", "-b"], ("a", "-b")),
    ],
)
def test_elements_in_any_form(arguments: Sequence[str], elements: tuple[str, ...]) -> None:
    assert right(arguments).elements == elements


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["-a", "arm64", "e"], "arch", "arm64"),
        (["-aarm64", "e"], "arch", "arm64"),
        (["-t", "raw,qcow2", "e"], "formats", ("raw", "qcow2")),
        (["-t", "tar, raw,,tar", "e"], "formats", ("tar", "raw")),
        (["-x", "e"], "debug_level", 1),
        (["-x", "e", "-x"], "debug_level", 2),
        (["-xun", "e"], "debug_level", 1),
        (["-xun", "e"], "compress", False),
        (["-xun", "e"], "skip_base", True),
        (["-p", "a,b", "-pc d", "e"], "extra_packages", ("a", "b", "c", "d")),
        (["--checksum", "e"], "checksums", ("md5", "sha256")),
        (["--check", "e"], "checksums", ("md5", "sha256")),
        (["--root-label=x", "e"], "root_label", "x"),
        (["--mkfs-options", "-O ^dir_index", "e"], "mkfs_options", "-O ^dir_index"),
        (["--qemu-img-options", "compat=0.10", "e"], "qemu_img_options", "compat=0.10"),
        (["--ramdisk-element", "dracut-ramdisk", "e"], "ramdisk_element", "dracut-ramdisk"),
        (["--install-type", "package", "e"], "install_type", "package"),
        (["--docker-target", "a:b", "e"], "docker_target", "a:b"),
        (["--image-cache", "/c", "e"], "image_cache", Path("/c")),
    ],
)
def test_options(arguments: Sequence[str], field: str, value: object) -> None:
    assert getattr(right(arguments), field) == value


@pytest.mark.parametrize(
    ("arguments", "variable", "value"),
    [
        (["--image-size", "1.5", "e"], "DIB_IMAGE_SIZE", "1.5"),
        (["--image-extra-size", "10", "e"], "DIB_IMAGE_EXTRA_SIZE", "10"),
        (["--max-online-resize", "1000", "e"], "MAX_ONLINE_RESIZE", "1000"),
        (["--mkfs-journal-size", "32", "e"], "DIB_JOURNAL_SIZE", "32"),
        (["--min-tmpfs", "5", "e"], "DIB_MIN_TMPFS", "5"),
        (["--no-tmpfs", "e"], "DIB_NO_TMPFS", "1"),
        (["--offline", "e"], "DIB_OFFLINE", "1"),
    ],
)
def test_options_that_are_variables(arguments: Sequence[str], variable: str, value: str) -> None:
    assert right(arguments, HOME | {variable: "other"}).variables[variable] == value


def test_offline_is_no_word_on_the_network() -> None:
    assert right(["--offline", "e"]).network


def test_what_means_nothing_is_said_once() -> None:
    assert len(parsed(["--no-tmpfs", "--min-tmpfs", "1", "--no-tmpfs", "e"]).messages) == 2
    assert parsed(["e"], HOME | {"DIB_NO_TMPFS": "1"}).messages == []


@pytest.mark.parametrize(
    ("variable", "value", "field", "expected"),
    [
        ("ARCH", "armhf", "arch", "armhf"),
        ("FS_TYPE", "xfs", "fs_type", "xfs"),
        ("ROOT_LABEL", "r", "root_label", "r"),
        ("QEMU_IMG_OPTIONS", "cluster_size=2M", "qemu_img_options", "cluster_size=2M"),
        ("DIB_DEFAULT_INSTALLTYPE", "package", "install_type", "package"),
        ("DIB_DEBUG_TRACE", "2", "debug_level", 2),
        ("SKIP_BASE", "1", "skip_base", True),
        ("SKIP_BASE", "0", "skip_base", False),
        ("DIB_CHECKSUM", "1", "checksums", ("md5", "sha256")),
        ("DIB_CHECKSUM", "sha256", "checksums", ("sha256",)),
        ("DIB_CHECKSUM", "0", "checksums", ()),
        ("RAMDISK_ELEMENT", "x", "ramdisk_element", "x"),
        ("DIB_IMAGE_CACHE", "/c", "image_cache", Path("/c")),
        ("IMAGE_NAME", "n", "name", "n"),
        ("COMPRESS_IMAGE", "", "compress", True),
        ("DOCKER_TARGET", "a:b", "docker_target", None),
        ("DIB_OFFLINE", "1", "network", True),
    ],
)
def test_variables(variable: str, value: str, field: str, expected: object) -> None:
    assert getattr(right(["e"], HOME | {variable: value}), field) == expected


def test_settings_of_virt_dib(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('isolation = "sandbox"\nmemsize = 3000\nimage-cache = "cache"\n')
    command = parsed(["--config", f"{tmp_path}/c.toml", "e"], HOME | {"VIRT_DIB_MEMSIZE": "4000"})
    assert command.problems == ()
    assert command.options.isolation is Isolation.SANDBOX
    assert (command.spec.memory_mib, command.spec.image_cache) == (4000, tmp_path / "cache")
    (problem,) = parsed(["e"], HOME | {"VIRT_DIB_MEMSISE": "4000"}).problems
    assert "VIRT_DIB_MEMSIZE" in (problem.hint or "")


def test_options_win_over_variables() -> None:
    environ = HOME | {"ARCH": "armhf", "IMAGE_NAME": "n", "ROOT_LABEL": "r", "DIB_IMAGE_CACHE": "/c"}
    spec = right(["-a", "arm64", "-o", "m", "--root-label", "s", "--image-cache", "/d", "e"], environ)
    assert (spec.arch, spec.name, spec.root_label, spec.image_cache) == ("arm64", "m", "s", Path("/d"))


def test_tracing_adds_up() -> None:
    assert right(["-x", "e"], HOME | {"DIB_DEBUG_TRACE": "1"}).debug_level == 2


def test_the_search_path() -> None:
    assert right(["e"], HOME | {"ELEMENTS_PATH": "/a::/b"}).element_paths == (Path("/a"), Path("/b"))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["-o", "x.qcow2", "e"], "x"),
        (["-o", "x.qcow2", "-t", "qcow2", "e"], "x"),
        (["-o", "x.qcow2", "-t", "raw", "e"], "x.qcow2"),
        (["-o", "x.raw", "-t", "raw", "e"], "x"),
        (["-o", "x.qcow2", "-t", "qcow2,raw", "e"], "x.qcow2"),
    ],
)
def test_the_suffix_of_the_only_type_is_no_part_of_the_name(arguments: Sequence[str], name: str) -> None:
    spec = right(arguments)
    assert (spec.name, told(spec)) == (name, name)


def test_names_with_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    below = right(["-o", "sub/x", "e"])
    assert (below.output_dir, below.name, told(below)) == (Path("sub"), "x", "sub/x")
    assert below.drop_in is not None
    assert not below.drop_in.leads_away
    for name in (f"{tmp_path}/sub/x", "../" + tmp_path.name + "/x"):
        away = right(["-o", name, "e"])
        assert told(away) == name
        assert away.drop_in is not None
        assert away.drop_in.leads_away


def test_the_environment_reaches_the_elements() -> None:
    environ = HOME | {
        "DIB_RELEASE": "trixie", "ANYTHING": "a b", "http_proxy": "http://p", "PATH": "/p", "TMP_DIR": "/t",
        "SSH_AUTH_SOCK": "/s", "DIB_LOCKFILES": "/l", "VIRTUAL_ENV": "/v", "UID": "5", "not-a-name": "x",
        "BASH_FUNC_x%%": "() { :; }", "VIRT_DIB_ISOLATION": "vm", "ELEMENTS_PATH": "/e", "DIB_IMAGE_CACHE": "/c",
    }  # fmt: skip
    assert dict(right(["e"], environ).variables) == {
        "DIB_RELEASE": "trixie", "ANYTHING": "a b", "http_proxy": "http://p",
    }  # fmt: skip


def test_a_strict_environment() -> None:
    environ = HOME | {"DIB_RELEASE": "trixie", "ANYTHING": "a b", "http_proxy": "http://p", "FS_TYPE": "xfs"}
    strict = right(["e"], environ | {"VIRT_DIB_ENVIRONMENT": "strict"})
    assert dict(strict.variables) == {"DIB_RELEASE": "trixie", "FS_TYPE": "xfs"}
    assert right(["e"], environ | {"VIRT_DIB_ENVIRONMENT": "inherit"}) == right(["e"], environ)
    (problem,) = parsed(["e"], environ | {"VIRT_DIB_ENVIRONMENT": "Strict"}).problems
    assert problem.hint == "choose from inherit, strict"


@pytest.mark.parametrize(("arguments", "environ"), [(["-c"], {}), ([], {"CLEAR_ENV": "1"})])
def test_a_clear_environment(arguments: Sequence[str], environ: Mapping[str, str]) -> None:
    environ = {**HOME, "DIB_RELEASE": "trixie", "ARCH": "armhf", "ELEMENTS_PATH": "/a", **environ}
    spec = right([*arguments, "--offline", "-a", "arm64", "e"], environ)
    assert dict(spec.variables) == {"DIB_OFFLINE": "1"}
    assert (spec.arch, spec.element_paths) == ("arm64", ())


@pytest.mark.parametrize(("value", "kept"), [("0", True), ("", True), ("1", False), ("2", False)])
def test_old_images(value: str, *, kept: bool) -> None:
    spec = right(["e"], HOME | {"OVERWRITE_OLD_IMAGE": value})
    assert spec.drop_in is not None
    assert spec.drop_in.keep_old is kept


def test_ramdisks() -> None:
    spec = right(["e"], ramdisk=True)
    assert (spec.ramdisk, spec.added_element) == (True, "ramdisk")
    assert right(["e", "--ramdisk-element", "x"], ramdisk=True).added_element == "x"


def test_places_of_this_run() -> None:
    command = parsed(["--logfile", "l", "e"], HOME | {"TMP_DIR": "/t"})
    assert (command.output.log_path, command.temporary_dir) == ("l", Path("/t"))
    assert (parsed(["e"]).output.log_path, parsed(["e"]).temporary_dir) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ([], "no element named", ""),
        (["", " "], "no element named", ""),
        (["--image-sise", "5", "e"], "unknown option '--image-sise'", "did you mean '--image-size'?"),
        (["--image", "5", "e"], "option '--image' could be any of", "write it out"),
        (["-t"], "option '-t' needs a value", "-t LIST"),
        (["-t", "", "e"], "no format named", "choose from"),
        (["-t", "qcow", "e"], "unknown format 'qcow'", "did you mean 'qcow2'?"),
        (["--offline=1", "e"], "option '--offline' takes no value", "write the option alone"),
        (["-o", "no/such/place", "e"], "'no/such' is not a directory", "mkdir -p"),
        (["-z", "e"], "unknown option '-z'", "'virt-disk-image-create --help' lists all options"),
    ],
)
def test_mistakes(arguments: Sequence[str], message: str, hint: str) -> None:
    problems = parsed(arguments).problems
    assert [problem for problem in problems if message in problem.message and hint in (problem.hint or "")], problems


def test_all_mistakes_at_once_with_the_status_of_disk_image_create(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dib_cli.disk_image_create(["-t", "qcow", "--nothing", "-o", "no/where", "no-such-element"]) == 1
    lines = capfd.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("virt-disk-image-create: error: ")]
    for text in ("'qcow'", "'--nothing'", "'no/where'", "'no-such-element'"):
        assert len([line for line in errors if text in line]) == 1, (text, errors)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        # Of the two ways to find out, one tells: for an ordinary user the second.
        (
            "/proc/no/cache",
            "making the image cache '/proc/no/cache': No such file or directory"
            if os.geteuid() == 0
            else "cannot keep the image cache in '/proc/no/cache': no right to read and write '/proc'",
        ),
        ("/dev/null", "cannot keep the image cache in '/dev/null': '/dev/null' is not a directory"),
    ],
)
def test_a_cache_that_cannot_be_made_is_told_with_other_mistakes(
    cache: str, message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert dib_cli.disk_image_create(["--image-cache", cache, "no-such-element", "debian-minimal"]) == 1
    errors = [line.split(" | ERROR: ")[1] for line in capfd.readouterr().out.splitlines() if " | ERROR: " in line]
    assert errors == [message, "element 'no-such-element' not found"]


def test_the_hint_names_the_variable_for_temporary_files_that_counts(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIBGUESTFS_TMPDIR", "/tmp")
    monkeypatch.setenv("TMP_DIR", str(tmp_path / "TMPDIR"))
    assert dib_cli.disk_image_create(["--image-cache", str(tmp_path / "cache"), "no-such-element"]) == 1
    shown = capfd.readouterr().out
    assert f"making a directory for the build in '{tmp_path}/TMPDIR': No such file or directory" in shown
    assert "hint: set TMP_DIR to a directory that you can write and that has space" in shown


def test_there_is_help_where_the_current_directory_was_removed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert dib_cli.disk_image_create(["--help"]) == 0
    assert capfd.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("command", [dib_cli.disk_image_create, dib_cli.ramdisk_image_create])
def test_help_names_every_option_of_diskimage_builder(command: object, capfd: pytest.CaptureFixture[str]) -> None:
    assert callable(command)
    assert command(["--help"]) == 0
    words = set(capfd.readouterr().out.replace(",", " ").split())
    # Of DIB 3.43.0's own --help.
    assert words >= {
        "-a", "-o", "-t", "-x", "-u", "-c", "-n", "-p", "-h", "--logfile", "--checksum", "--image-size",
        "--image-extra-size", "--image-cache", "--max-online-resize", "--min-tmpfs", "--mkfs-journal-size",
        "--mkfs-options", "--no-tmpfs", "--offline", "--qemu-img-options", "--root-label", "--ramdisk-element",
        "--install-type", "--docker-target", "--help", "--version",
    }  # fmt: skip


def test_version_is_that_of_diskimage_builder(capfd: pytest.CaptureFixture[str]) -> None:
    assert dib_cli.disk_image_create(["--version"]) == 0
    assert capfd.readouterr().out == "3.43.0\n"
