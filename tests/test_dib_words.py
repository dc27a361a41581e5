# SPDX-License-Identifier: Apache-2.0
"""Messages in the words of the drop-ins: none of them names an option that the command that was typed has not."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from generate import catalogue
from virt_dib import dib_cli, dib_words, events
from virt_dib.dib_command import DISK_PROG, OPTIONS, RAMDISK_PROG
from virt_dib.dib_output import DibOutput
from virt_dib.options import BY_NAME

DISK = dib_words.of_command(DISK_PROG)
RAMDISK = dib_words.of_command(RAMDISK_PROG)
FILES = dib_words.of_image_files()
OPTION = re.compile(r"(?:virt-dib |(?<![\w/-]))--?[A-Za-z][a-z-]*", re.ASCII)
OF_OTHER_COMMANDS = frozenset(
    {"boot", "boot_cli", "doctor", "dib_links", "options", "image_file_cli", "batch", "dib_command"}
)
"""Modules of commands with options of their own, and those that describe options."""
FOREIGN = {
    "--system-site-packages", "--force-reinstall", "--reinstall", "--security-opt", "--no-new-privs", "--add-subkinds",
    "--update", "--add", "-m", "-f", "-O", "-v", "-o", "-s", "-i", "-r", "-N",
}  # fmt: skip
"""Options of programs whose command lines are in hints."""


def messages() -> Iterator[str]:
    """All that virt-dib says of a build, values as words."""
    for path in sorted(catalogue.PACKAGE_DIR.glob("*.py")):
        if path.stem not in OF_OTHER_COMMANDS:
            for _, text in catalogue.messages(path):
                yield re.sub(r"\{(\w*)\}", r"\1", text).replace("{{", "{").replace("}}", "}")


@pytest.mark.parametrize(
    ("text", "disk", "files"),
    [
        ("give it more time with --timeout, or none", "with VIRT_DIB_TIMEOUT,", "with VIRT_DIB_TIMEOUT,"),
        ("more time with --script-timeout; see", "with VIRT_DIB_SCRIPT_TIMEOUT;", "with VIRT_DIB_SCRIPT_TIMEOUT;"),
        ("--envvar DIB_JOURNAL_SIZE=N wants", "--mkfs-journal-size N wants", "mkfs-journal-size: N wants"),
        ("--envvar DIB_IMAGE_SIZE=N wants", "--image-size N wants", "image-size: N wants"),
        ("give it: --envvar http_proxy=...", "give it: http_proxy=...", "give it: http_proxy=..."),
        ("leave out --envvar X: with", "leave out X: with", "leave out X: with"),
        (
            "such as: virt-dib --name debian debian-minimal vm",
            "such as: virt-disk-image-create -o debian debian-minimal vm",
            "such as: elements: [debian-minimal, vm]",
        ),
        ("build with --isolation vm, which", "with VIRT_DIB_ISOLATION=vm, which", "with VIRT_DIB_ISOLATION=vm, which"),
        ("build with --no-network", "build with VIRT_DIB_NETWORK=off", "build with VIRT_DIB_NETWORK=off"),
        ("another one: --name DIRECTORY/NAME", "one: -o DIRECTORY/NAME", "one: imagename: DIRECTORY/NAME"),
        ("hold elements with --element-path", "with ELEMENTS_PATH", "with ELEMENTS_PATH"),
        ("such as: --docker-target debian:13", "--docker-target debian:13", "as: docker-target: debian:13"),
        ("a larger --size, or --size auto", "--image-size, or --image-extra-size", "image-size, or image-extra-size"),
        ("--config names it", "--config names it", "VIRT_DIB_CONFIG names it"),
        ("without --ramdisk, the", "without virt-ramdisk-image-create, the", "without ramdisk, the"),
        ("no format named in --formats", "named in -t", "named in types"),
        ("see 'virt-dib --show-config'", "see 'virt-dib --show-config'", "see 'virt-dib --show-config'"),
        ("with --verbose -x to", "with virt-dib --verbose -x to", "with virt-dib --verbose -x to"),
        ("if raw: --drive-format raw", "raw: VIRT_DIB_DRIVE_FORMAT=raw", "raw: VIRT_DIB_DRIVE_FORMAT=raw"),
        ("別の --drive を指定", "別の VIRT_DIB_DRIVE を指定", "別の VIRT_DIB_DRIVE を指定"),
        ("another file with --logfile", "file with --logfile", "file with logfile"),
        ("--min-tmpfs has no meaning", "--min-tmpfs has no", "min-tmpfs has no"),
        ("did you mean '--formats'?", "did you mean '--formats'?", "did you mean '--formats'?"),
        ("cannot use '--name x --name' as it is", "cannot use '--name x --name' as it is", "'--name x --name'"),
        ("--timeouts and pre--timeout", "--timeouts and pre--timeout", "--timeouts and pre--timeout"),
    ],
)
def test_a_message_has_the_words_of_the_command(text: str, disk: str, files: str) -> None:
    assert disk in DISK(text)
    assert files in FILES(text)


def test_of_two_commands_each_names_itself() -> None:
    text = "such as: virt-dib --name debian debian-minimal vm"
    assert RAMDISK(text) == "such as: virt-ramdisk-image-create -o debian debian-minimal"


def test_no_message_names_an_option_that_is_not_there() -> None:
    own = {name for option in OPTIONS for name in option.names}
    found = list(messages())
    assert len([text for text in found if OPTION.search(text)]) > 60
    for words, there in ((DISK, own), (RAMDISK, own), (FILES, set())):
        for text in found:
            named = {name for name in OPTION.findall(words(text)) if not name.startswith("virt-dib ")}
            assert named - there - FOREIGN - {"-p", "-x", "--help", "--show-config"} == set(), text


def test_messages_name_options_of_virt_dib_by_their_long_names() -> None:
    short = {name for name in BY_NAME if not name.startswith("--")} - FOREIGN
    for text in messages():
        named = set(OPTION.findall(text.replace("mkdir -p", "").replace("--verbose -x", ""))) - {"-x"}
        assert named & short == set(), text


def test_mistakes_are_told_in_the_words_of_the_command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ELEMENTS_PATH", "/nothing/here")
    monkeypatch.setenv("VIRT_DIB_PYTHON", "/no/python")
    assert dib_cli.ramdisk_image_create(["-t", ","]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert "virt-ramdisk-image-create: error: no format named in -t" in lines
    hint = "name at least an operating system, such as: virt-ramdisk-image-create -o debian debian-minimal"
    assert f"virt-ramdisk-image-create: hint: {hint}" in lines
    said = "error: in VIRT_DIB_PYTHON: cannot use '/no/python' as VIRT_DIB_PYTHON: there is no such program"
    assert f"virt-ramdisk-image-create: {said}" in lines
    monkeypatch.delenv("VIRT_DIB_PYTHON")
    monkeypatch.setenv("DIB_NO_TIMESTAMP", "1")
    assert dib_cli.ramdisk_image_create(["some-element"]) == 1
    assert "hint: give directories that hold elements with ELEMENTS_PATH" in capfd.readouterr().out.splitlines()


def test_a_size_is_told_by_the_option_for_it(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, element_dir: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ELEMENTS_PATH", str(element_dir))
    monkeypatch.setenv("DIB_QUIET", "1")
    assert dib_cli.disk_image_create(["-n", "--image-size", "abc", "tiny-os"]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "virt-disk-image-create: error: cannot use 'abc' as DIB_IMAGE_SIZE",
        "virt-disk-image-create: hint: --image-size N wants a number greater than 0",
    ]


def test_what_a_build_says_is_in_the_words_of_the_command() -> None:
    stream = io.StringIO()
    with DibOutput(stream=stream, timestamps=False, quiet=False, log_path=None, version="3", words=DISK) as output:
        output(events.Message(text="--isolation sandbox is faster\nwith --image-cache"))
        output(events.Warned(text="without --ramdisk"))
        output(events.ErrorFound(text="in --timeout", hint="see --script-timeout", details=()))
        output(events.Output(data=b"--timeout is a script's own\n"))
        output(events.Debugged(text="--timeout is somebody's own"))
    assert stream.getvalue().splitlines() == [
        "VIRT_DIB_ISOLATION=sandbox is faster",
        "with --image-cache",
        "WARNING: without virt-ramdisk-image-create",
        "ERROR: in VIRT_DIB_TIMEOUT",
        "hint: see VIRT_DIB_SCRIPT_TIMEOUT",
        "--timeout is a script's own",
        "--timeout is somebody's own",
    ]
