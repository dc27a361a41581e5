# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virt_dib import __version__, boot_cli, cli, command_line, dib_links, doctor, formats, image_file_cli, tools
from virt_dib.errors import Interrupted, PrerequisiteError, Problem, ScriptError, UsageError, VirtDibError
from virt_dib.machine_readable import Target
from virt_dib.options import build_parser
from virt_dib.spec import DEFAULT_SIZE_BYTES, LABEL_LIMITS, BuildSpec, Isolation, Kvm, host_arch

GIB = 1 << 30
MANUAL_OPTIONS = [
    "-B", "-p", "--element-path", "--name", "--formats", "--size", "--envvar", "--arch", "--debug", "-m", "--memsize",
    "--smp", "--network", "--no-network", "--root-label", "--fs-type", "--mkfs-options", "--extra-packages",
    "--skip-base", "--install-type", "--exclude-element", "--exclude-script", "--no-delete-on-failure", "-u",
    "--checksum", "--docker-target",
    "--qemu-img-options", "--ramdisk", "--ramdisk-element", "-q", "--quiet", "-v", "--verbose", "-x", "-V",
    "--version", "--help", "--machine-readable",
]  # fmt: skip


def parsed(*arguments: str, environment: Mapping[str, str] | None = None) -> command_line.CommandLine:
    command = command_line.parse([*arguments, "debian-minimal", "vm"], environment or {})
    assert command.problems == ()
    assert command.spec.elements == ("debian-minimal", "vm")
    return command


def problems_of(*arguments: str, environment: Mapping[str, str] | None = None) -> list[str]:
    """The messages, elements being named."""
    command = command_line.parse([*arguments, "debian-minimal"], environment or {})
    return [problem.message for problem in command.problems]


def joined(value: object) -> str | None:
    """The id of a command line among the parameters."""
    return " ".join(value) if isinstance(value, list) else None


# ---- what each option does ----


def test_defaults() -> None:
    command = parsed()
    assert command.options == command_line.Options()
    assert command.spec == BuildSpec(
        name="image",
        output_dir=Path(),
        elements=("debian-minimal", "vm"),
        arch=host_arch(),
        arguments=("debian-minimal", "vm"),
    )


OPTIONS = [
    (["-B", "lib"], "dib_library", Path("lib")),
    (["-p", "a", "--element-path", "b", "-pc"], "element_paths", (Path("a"), Path("b"), Path("c"))),
    (["--name", "d"], "name", "d"),
    (["--name=d.1 x"], "name", "d.1 x"),
    (["--formats", "raw"], "formats", ("raw",)),
    (["--formats", "raw, qcow2,raw,"], "formats", ("raw", "qcow2")),
    (["--size", "32G"], "size_bytes", 32 * GIB),
    (["--size", "10737418240b"], "size_bytes", 10737418240),
    (["--size=auto"], "size_bytes", None),
    (["--envvar", "A=1", "--envvar", "B=x=y\n$H '\"", "--envvar", "A=2"], "variables", {"A": "2", "B": "x=y\n$H '\""}),
    (["--envvar", "EMPTY=", "--envvar", "HERE", "--envvar", "NOT_HERE"], "variables", {"EMPTY": "", "HERE": "a b"}),
    (["--arch", "arm64"], "arch", "arm64"),
    (["--debug", "2"], "debug_level", 2),
    (["-m", "4096"], "memory_mib", 4096),
    (["-m4096"], "memory_mib", 4096),
    (["--memsize", "512"], "memory_mib", 512),
    (["--smp", "4"], "cpus", 4),
    (["--no-network"], "network", False),
    (["--no-network", "--network"], "network", True),
    (["--no-host-certificates"], "host_certificates", False),
    (["--root-label", "root"], "root_label", "root"),
    (["--root-label", "x" * 12, "--fs-type", "xfs"], "root_label", "x" * 12),
    *((["--fs-type", name], "fs_type", name) for name in ("ext2", "ext3", "ext4", "xfs", "btrfs", "vfat")),
    (["--mkfs-options", "-O someopt -I foo"], "mkfs_options", "-O someopt -I foo"),
    (["--mkfs-options", "-Ofoo"], "mkfs_options", "-Ofoo"),
    (["--mkfs-options", "--"], "mkfs_options", "--"),
    (["--mkfs-options="], "mkfs_options", ""),
    (["--extra-packages", "a,b", "--extra-packages", " c ,,d"], "extra_packages", ("a", "b", "c", "d")),
    (["--skip-base"], "skip_base", True),
    (["--ramdisk"], "ramdisk", True),
    (["--ramdisk-element", "dracut-ramdisk"], "ramdisk_element", "dracut-ramdisk"),
    (["--install-type", "package"], "install_type", "package"),
    (["--exclude-element", "a", "--exclude-element", "b"], "excluded_elements", frozenset({"a", "b"})),
    (["--exclude-script", "50-a", "--exclude-script", "60-b"], "excluded_scripts", frozenset({"50-a", "60-b"})),
    (["--no-delete-on-failure"], "delete_on_failure", False),
    (["-u"], "compress", False),
    (["--qemu-img-options", "cluster_size=512,preallocation=metadata"], "qemu_img_options",
     "cluster_size=512,preallocation=metadata"),
    (["--formats", "docker,vhd,squashfs,tgz,tar"], "formats", ("docker", "vhd", "squashfs", "tgz", "tar")),
    (["--compression", "zstd"], "compression", "zstd"),
    (["--docker-target", "registry.example.org:5000/os/debian__x:13-a"], "docker_target",
     "registry.example.org:5000/os/debian__x:13-a"),
    (["--docker-target=debian"], "docker_target", "debian"),
    (["--checksum"], "checksums", ("md5", "sha256")),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "field", "value"), OPTIONS, ids=[" ".join(case[0]) for case in OPTIONS])
def test_option_sets_the_spec(arguments: list[str], field: str, value: object) -> None:
    changed = parsed(*arguments, environment={"HERE": "a b", "OTHER": "x"}).spec
    assert getattr(changed, field) == value
    if field not in ("root_label", "network") and value != getattr(parsed().spec, field):
        unchanged = {name for name in BuildSpec.__slots__ if getattr(changed, name) == getattr(parsed().spec, name)}
        assert set(BuildSpec.__slots__) - unchanged == {field, "arguments"}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["-q"], command_line.Options(quiet=True)),
        (["--quiet"], command_line.Options(quiet=True)),
        (["-v"], command_line.Options(verbose=True)),
        (["--verbose"], command_line.Options(verbose=True)),
        (["-x"], command_line.Options(trace=True)),
        (["-qvx"], command_line.Options(quiet=True, verbose=True, trace=True)),
        (["--machine-readable"], command_line.Options(machine_readable=Target(descriptor=1))),
        (["--machine-readable=file:a:b"], command_line.Options(machine_readable=Target(path=Path("a:b")))),
        (["--kvm", "on"], command_line.Options(kvm=Kvm.ON)),
        (["--kvm=off"], command_line.Options(kvm=Kvm.OFF)),
    ],
    ids=joined,
)
def test_option_sets_the_options(arguments: list[str], options: command_line.Options) -> None:
    assert parsed(*arguments).options == options


@pytest.mark.parametrize(
    ("text", "checksums"),
    [("1", ("md5", "sha256")), ("0", ()), ("", ()), ("sha256", ("sha256",)), ("sha256,md5", ("md5", "sha256"))],
)
def test_the_variable_for_checksums(text: str, checksums: tuple[str, ...]) -> None:
    assert parsed("--envvar", f"DIB_CHECKSUM={text}").spec.checksums == checksums
    assert parsed("--envvar", f"DIB_CHECKSUM={text}", "--checksum").spec.checksums == ("md5", "sha256")


def test_the_variable_for_the_docker_target() -> None:
    assert parsed("--envvar", "DOCKER_TARGET=a:1").spec.docker_target == "a:1"
    assert parsed("--envvar", "DOCKER_TARGET=a:1", "--docker-target", "b").spec.docker_target == "b"


def test_the_variable_for_kvm_is_the_default_of_the_option() -> None:
    assert parsed(environment={"VIRT_DIB_KVM": "off"}).options.kvm is Kvm.OFF
    assert parsed(environment={"VIRT_DIB_KVM": ""}).options.kvm is Kvm.AUTO
    assert parsed("--kvm", "on", environment={"VIRT_DIB_KVM": "off"}).options.kvm is Kvm.ON


def test_the_variable_for_isolation_is_the_default_of_the_option() -> None:
    assert parsed().options.isolation is Isolation.VM
    assert parsed(environment={"VIRT_DIB_ISOLATION": "sandbox"}).options.isolation is Isolation.SANDBOX
    assert parsed("--isolation", "auto", environment={"VIRT_DIB_ISOLATION": "vm"}).options.isolation is Isolation.AUTO


def test_name_may_have_a_directory_that_exists(tmp_path: Path) -> None:
    spec = parsed("--name", f"{tmp_path}/d").spec
    assert (spec.output_dir, spec.name) == (tmp_path, "d")


def test_no_variable_of_the_host_is_taken_unasked() -> None:
    assert parsed("--envvar", "A", environment={"A": "1", "B": "2", "DIB_RELEASE": "x"}).spec.variables == {"A": "1"}


@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
    | st.binary(max_size=30).map(lambda value: os.fsdecode(value.replace(b"\0", b"")))
)
def test_any_value_of_a_variable_arrives_as_it_is(value: str) -> None:
    assert parsed("--envvar", f"A={value}").spec.variables == {"A": value}
    assert parsed("--envvar", "A", environment={"A": value}).spec.variables == {"A": value}


def test_dib_args_are_the_arguments_as_given() -> None:
    arguments = ["vm", "--name=d", "-u", "--", "debian-minimal"]
    command = command_line.parse(arguments, {})
    assert command.spec.arguments == tuple(arguments)
    assert command.spec.elements == ("vm", "debian-minimal")


@pytest.mark.parametrize(
    "arguments",
    [
        ["-u", "--name", "d", "vm", "debian-minimal"],
        ["vm", "-u", "debian-minimal", "--name", "d"],
        ["vm", "debian-minimal", "--name=d", "-u"],
        ["-u", "--name=d", "--", "vm", "debian-minimal"],
        ["--na", "d", "vm", "-u", "debian-minimal"],
        ["-name", "d", "vm", "-u", "debian-minimal"],
        ["-name=d", "vm", "debian-minimal", "-u"],
    ],
    ids=joined,
)
def test_options_may_stand_anywhere_shortened_or_with_one_dash(arguments: list[str]) -> None:
    command = command_line.parse(arguments, {})
    assert command.problems == ()
    assert command.spec.elements == ("vm", "debian-minimal")
    assert (command.spec.name, command.spec.compress) == ("d", False)


def test_after_two_dashes_everything_is_an_element() -> None:
    assert command_line.parse(["--", "--name", "--", "-u"], {}).spec.elements == ("--name", "--", "-u")


@pytest.mark.parametrize(
    ("machine", "arch"),
    [("x86_64", "amd64"), ("aarch64", "arm64"), ("armv7l", "armhf"), ("armv6l", "armhf"), ("ppc64le", "ppc64le")],
)
def test_architecture_is_named_as_debian_does(machine: str, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert host_arch() == arch


def test_help_has_every_option_of_the_manual_and_only_what_is_read() -> None:
    text = build_parser().format_help()
    words = set(re.split(r"[\s,\[]+", text))
    assert [option for option in [*MANUAL_OPTIONS, "--kvm"] if option not in words] == []
    assert all(name in text for name in [*formats.KNOWN, *LABEL_LIMITS])


# ---- what is wrong ----


BAD_VALUES = [
    (["--size", "5Q"], "cannot use '5Q' as the size of the image"),
    (["--size", "-1"], "cannot use '-1' as the size of the image"),
    (["--size", "0"], "cannot use '0' as the size of the image"),
    (["--size", "0G"], "cannot use '0G' as the size of the image: it must be more than 0 and at most 1024P"),
    (["--size", ""], "cannot use '' as the size of the image"),
    (["--root-label", "x" * 17], f"root label '{'x' * 17}' is too long for ext4: 17 characters, 16 at most"),
    (["--root-label=123456789abcd", "--fs-type=xfs"],
     "root label '123456789abcd' is too long for xfs: 13 characters, 12 at most"),
    (["--root-label", ""], "cannot use an empty root label"),
    (["--formats", "qcow"], "unknown format 'qcow'"),
    (["--formats", ","], "no format named in --formats"),
    (["--compression", "xz"], "unknown compression 'xz'"),
    *((["--docker-target", text], f"cannot use '{text}' as the docker target")
      for text in ("", "Debian", "-a", "a:", "a:b:c", "a b", "a/", "a@sha256:0", "a" * 256, "a:" + "b" * 129)),
    (["--fs-type", "ext5"], "unknown file system 'ext5'"),
    (["--fs-type", ""], "unknown file system ''"),
    (["--install-type", "sources"], "unknown install type 'sources'"),
    (["--envvar", "1A=x"], "cannot use '1A' as the name of a variable in --envvar"),
    (["--envvar", "A B=x"], "cannot use 'A B' as the name of a variable in --envvar"),
    (["--envvar", "=x"], "cannot use '' as the name of a variable in --envvar"),
    (["--envvar", "A\n=x"], "cannot use 'A\n' as the name of a variable in --envvar"),
    (["--envvar", "A=\0"], "cannot set the variable 'A' to a value with a NUL in it"),
    (["--debug", "-1"], "cannot use '-1' as the debug level"),
    (["--debug", "1_0"], "cannot use '1_0' as the debug level"),
    (["-m", "2G"], "cannot use '2G' as the memory size in MB"),
    (["-m", "64"], "cannot use '64' as the memory size in MB"),
    (["-m", "9" * 5000], f"cannot use '{'9' * 5000}' as the memory size in MB"),
    (["--smp", "0"], "cannot use '0' as the number of processors"),
    (["--smp", "256"], "cannot use '256' as the number of processors"),
    (["--smp", "²"], "cannot use '²' as the number of processors"),
    (["--kvm", "yes"], "unknown value of --kvm 'yes'"),
    (["--arch", "a/b"], "cannot use 'a/b' as an architecture"),
    (["-p", ""], "cannot use '' as the directory of --element-path"),
    (["-B", ""], "cannot use '' as the directory of --dib-library"),
    (["--exclude-element", ""], "cannot use an empty name for --exclude-element"),
    (["--ramdisk-element", " "], "cannot use an empty name for --ramdisk-element"),
    (["--size", "--"], "cannot use '--' as the size of the image"),
    *((["--name", name], f"cannot use '{name}' as the name of the image")
      for name in ("", ".", "..", "-d", "--", "a/", "a\0b", "a\nb", "./..", "/")),
    (["--mkfs-options", "-L 'x"], "cannot use '-L 'x' as --mkfs-options: a quote or backslash in it has no end"),
    (["--name", "missing/d"], "cannot write 'missing/d': 'missing' is not a directory, or you may not enter it"),
    (["--name", "a\0/d"], "cannot write 'a\0/d': 'a\0' is not a directory, or you may not enter it"),
    (["-u", "--quiet=yes"], "option '--quiet' takes no value, not 'yes'"),
    (["--no-"], "option '--no-' could be any of --no-delete-on-failure, --no-network, --no-host-certificates"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_VALUES, ids=[ascii(case[0])[:60] for case in BAD_VALUES])
def test_bad_value_is_one_problem(arguments: list[str], message: str) -> None:
    assert problems_of(*arguments) == [message]


def test_bad_value_leaves_the_default_so_that_the_rest_can_be_checked() -> None:
    bad = ["--name=", "--size=5Q", "--fs-type=x", "--formats=qcow", "-m0", "--smp=0", "--debug=x", "--arch=", "--kvm=x"]
    command = command_line.parse([*bad, "--root-label", "x" * 17, "vm"], {})
    assert len(command.problems) == len(bad)
    assert command.options.kvm is Kvm.AUTO
    assert command.spec == BuildSpec(
        name="image",
        output_dir=Path(),
        elements=("vm",),
        arch=host_arch(),
        arguments=(*bad, "--root-label", "x" * 17, "vm"),
    )


def test_bad_variable_for_isolation_is_a_problem_that_names_it() -> None:
    assert problems_of(environment={"VIRT_DIB_ISOLATION": "chroot"}) == [
        "in VIRT_DIB_ISOLATION: unknown value of --isolation 'chroot'"
    ]


def test_bad_variable_for_kvm_is_a_problem_that_names_it() -> None:
    assert problems_of(environment={"VIRT_DIB_KVM": "yes"}) == ["in VIRT_DIB_KVM: unknown value of --kvm 'yes'"]


@pytest.mark.parametrize(
    ("word", "unknown", "meant"),
    [
        ("--fromats", "--fromats", "--formats"),
        ("--format-s=raw", "--format-s", "--formats"),
        ("-fromats", "-fromats", "--formats"),
        ("--skipbase", "--skipbase", "--skip-base"),
        ("--no-delete-on-fail", None, None),
        ("--zzzz", "--zzzz", None),
        ("-z", "-z", None),
        ("-qz", "-z", None),
    ],
)
def test_unknown_option(word: str, unknown: str | None, meant: str | None) -> None:
    command = command_line.parse(["debian-minimal", word], {})
    assert [problem.message for problem in command.problems] == ([f"unknown option '{unknown}'"] if unknown else [])
    if unknown:
        hint = f"did you mean '{meant}'?" if meant else "'virt-dib --help' lists all options"
        assert command.problems[0].hint == hint


def test_value_of_a_misspelt_option_is_not_taken_for_an_element() -> None:
    assert command_line.parse(["--fromats", "raw", "vm"], {}).spec.elements == ("vm",)
    assert command_line.parse(["--fromats=raw", "vm"], {}).spec.elements == ("vm",)
    assert command_line.parse(["--skipbase", "vm"], {}).spec.elements == ("vm",)
    assert command_line.parse(["vm", "--fromats", "raw"], {}).spec.elements == ("vm",)


@pytest.mark.parametrize("words", [["--no-drive", "vm"], ["--no-drive", "vm", "base"], ["--fromats", "vm"]])
def test_an_element_is_not_taken_for_the_value_of_a_misspelt_option(words: list[str]) -> None:
    command = command_line.parse(words, {})
    assert command.spec.elements == tuple(words[1:])
    assert [problem.message for problem in command.problems] == [f"unknown option '{words[0]}'"]


@pytest.mark.parametrize(
    ("words", "name", "ours"),
    [
        (["--image-size", "5"], "--image-size", "--size"),
        (["--image-size=5"], "--image-size", "--size"),
        (["-o", "x"], "-o", "--name"),
        (["-t", "raw"], "-t", "--formats"),
        (["-a", "arm64"], "-a", "--arch"),
        (["-n"], "-n", "--skip-base"),
    ],
)
def test_an_option_of_disk_image_create_is_told_with_our_name_for_it(words: list[str], name: str, ours: str) -> None:
    command = command_line.parse([*words, "debian-minimal", "vm"], {})
    hint = f"that of disk-image-create is called '{ours}' here"
    assert command.problems == (Problem(f"unknown option '{name}'", hint),)
    assert command.spec.elements == ("debian-minimal", "vm")


def test_variables_that_are_right_are_read_though_others_are_not() -> None:
    variables = ("A-B", "FS_TYPE=q", "ARCH=x y")
    assert problems_of(*(word for one in variables for word in ("--envvar", one))) == [
        "cannot use 'A-B' as the name of a variable in --envvar",
        "unknown file system 'q'",
        "cannot use 'x y' as an architecture",
    ]


def test_option_without_its_value() -> None:
    assert command_line.parse(["vm", "--name"], {}).problems == (
        Problem("option '--name' needs a value", "--name [DIR/]NAME"),
    )


@pytest.mark.parametrize("arguments", [[], ["--name", "d"], ["--"]], ids=joined)
def test_no_element_is_a_problem(arguments: list[str]) -> None:
    assert [problem.message for problem in command_line.parse(arguments, {}).problems] == ["no element named"]


def test_all_mistakes_are_found() -> None:
    arguments = [
        "--size",
        "5Q",
        "--formats",
        "qcow,vhdy,raw",
        "--wat",
        "-p",
        "",
        "--envvar",
        "1",
        "--envvar",
        "2",
        "--smp",
    ]
    assert [problem.message for problem in command_line.parse(arguments, {}).problems] == [
        "unknown option '--wat'",
        "option '--smp' needs a value",
        "cannot use '1' as the name of a variable in --envvar",
        "cannot use '2' as the name of a variable in --envvar",
        "no element named",
        "cannot use '' as the directory of --element-path",
        "unknown format 'qcow'",
        "unknown format 'vhdy'",
        "cannot use '5Q' as the size of the image",
    ]


WORDS = st.one_of(
    st.sampled_from([*MANUAL_OPTIONS, "--", "-", "", "=", "--=", "-=", "--kvm", "--no", "-qx", "vm", "--name=", "5G"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6).map(lambda text: f"-{text}"),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)


@given(st.lists(WORDS, max_size=8))
def test_no_command_line_ends_in_anything_but_problems(words: Sequence[str]) -> None:
    command = command_line.parse(words, {})
    assert command.spec.arguments == tuple(words)
    assert all(problem.message for problem in command.problems)


# ---- errors and the exit status ----


@pytest.mark.parametrize(
    ("error", "exit_status", "text"),
    [
        (ScriptError("install.d/50-foo failed"), 1, "p: error: install.d/50-foo failed\n"),
        (PrerequisiteError("no kernel", hint="get one"), 1, "p: error: no kernel\np: hint: get one\n"),
        (
            UsageError.of([Problem("one", "do this"), Problem("two")]),
            2,
            "p: error: one\np: hint: do this\np: error: two\n",
        ),
        (VirtDibError("\x1b[2Jnasty\r\x07", hint="a\nb"), 1, "p: error: nasty \np: hint: a b\n"),
        (Interrupted(), 130, "p: interrupted\n"),
        (KeyboardInterrupt(), 130, "p: interrupted\n"),
    ],
    ids=["one", "hint", "several", "hostile", "signal", "ctrl-c"],
)
def test_report_errors_prints_each_problem_and_returns_the_status(
    error: BaseException, exit_status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> int:
        raise error

    assert cli.report_errors("p", body) == exit_status
    assert capsys.readouterr() == ("", text)


def test_report_errors_passes_on_the_status_and_the_bugs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.report_errors("p", lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        cli.report_errors("p", lambda: 1 // 0)
    assert capsys.readouterr() == ("", "")


@pytest.mark.option("--version", "-V")
@pytest.mark.parametrize("option", ["-V", "--version", "-qV", "--vers"])
def test_version(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([option]) == 0
    assert capsys.readouterr() == (f"virt-dib {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--size", "5Q", "--help", "--wat"]], ids=joined)
def test_help_wins_over_mistakes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    assert capsys.readouterr() == (build_parser().format_help(), "")


def test_elements_that_cannot_be_asked_for_are_not_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b c", "d\ne", "f\tg"):
        (tmp_path / "els" / name).mkdir(parents=True)
    assert cli.main(["--list-elements", "-p", str(tmp_path / "els")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "a" in lines
    assert [line for line in lines if " " in line or line in ("e", "d")] == []


def test_mistakes_beside_list_elements_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list-elements", "--size", "x", "--wat"]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert [line for line in errors.splitlines() if ": error: " in line] == [
        "virt-dib: error: unknown option '--wat'",
        "virt-dib: error: cannot use 'x' as the size of the image",
    ]


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("cli", ["--name", "{place}/d", "debian-minimal", "vm"]),
        ("cli", ["--list-elements"]),
        ("doctor", []),
        ("boot_cli", ["{place}/image"]),
        ("dib_cli", ["-o", "{place}/d", "debian-minimal", "vm"]),
    ],
)
def test_a_current_directory_that_was_removed(tmp_path: Path, program: str, arguments: list[str]) -> None:
    drop_in = program == "dib_cli"
    code = (
        "import os, sys\n"
        f"from virt_dib.{program} import {'disk_image_create as main' if drop_in else 'main'}\n"
        "os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = [word.format(place=tmp_path) for word in arguments]
    # Also a relative place of the caches is looked for there.
    environment = {**os.environ, "XDG_CACHE_HOME": "relative"}
    command = [sys.executable, "-c", code, *words]
    run = tools.run(command, doing="running it", cwd=tmp_path, environment=environment, check=False)
    assert run.exit_status == (1 if drop_in else 2)
    assert "error: cannot work in the current directory, which has been removed: " in run.stderr
    assert "hint: change to a directory that exists" in run.stderr
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_docker_target_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = str(tmp_path / "d")
    assert cli.main(["--formats", "docker", "--docker-target", "a:", "--name", name, "no-such-element"]) == 2
    assert capsys.readouterr().err.count("docker target") == 1
    assert "needs a repository" not in capsys.readouterr().err


def test_two_mistakes_and_an_unknown_element_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert cli.main(["--size", "5Q", "--fromats", "raw", "debain-minimal"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert all(line.startswith(("virt-dib: error: ", "virt-dib: hint: ")) for line in lines)
    for message in ("unknown option '--fromats'", "cannot use '5Q' as the size", "element 'debain-minimal' not found"):
        assert len([line for line in lines if line.startswith(f"virt-dib: error: {message}")]) == 1
    assert "virt-dib: hint: did you mean '--formats'?" in lines
    assert list(tmp_path.iterdir()) == []
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


@pytest.mark.parametrize(
    ("arguments", "exit_status", "out", "err"),
    [
        (["--version"], 0, f"virt-dib {__version__}\n", ""),
        ([], 2, "", "virt-dib: error: no element named\n"),
        (["-p", "missing", "--size=0", "debian-minimal"], 2, "", "virt-dib: error: cannot use '0' as the size"),
    ],
    ids=["version", "nothing", "bad -p and size"],
)
def test_the_command(arguments: list[str], exit_status: int, out: str, err: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "virt_dib", *arguments]
    result = tools.run(command, doing="running virt-dib", cwd=tmp_path, check=False)
    assert (result.exit_status, result.stdout) == (exit_status, out)
    assert result.stderr.startswith(err)
    assert "Traceback" not in result.stderr
    assert ("'missing'" in result.stderr) == ("missing" in arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("main", [boot_cli.main, dib_links.main, doctor.main, image_file_cli.main])
def test_each_command_has_a_version(main: Callable[[Sequence[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(rf"virt-[a-z-]+ {re.escape(__version__)}\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("main", "arguments", "name"),
    [
        (dib_links.main, [""], "argument DIRECTORY: cannot use an empty name; is a shell variable unset?"),
        (dib_links.main, ["--remove", ""], "argument DIRECTORY: cannot use an empty name; is a shell variable unset?"),
        (boot_cli.main, [""], "argument IMAGE: cannot use an empty name; is a shell variable unset?"),
        (image_file_cli.main, [""], "cannot use an empty name for FILE"),
        (image_file_cli.main, ["--", ""], "cannot use an empty name for FILE"),
        (cli.main, ["--config", "", "vm"], "cannot use an empty name for --config"),
        (cli.main, ["--config=", "--show-config"], "cannot use an empty name for --config"),
    ],
)
def test_an_empty_path_is_not_the_current_directory(
    main: Callable[[Sequence[str]], int],
    arguments: list[str],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[0].partition(" error: ")[2] == name
    assert os.listdir(tmp_path) == []


COMMANDS_DIR = Path(sys.executable).parent
ANSWERS = [
    ["virt-dib", "--help"],
    ["virt-dib", "--version"],
    ["virt-dib", "--list-elements"],
    ["virt-dib", "--show-config"],
    ["virt-dib", "--machine-readable"],
    ["virt-dib-doctor", "--help"],
    ["virt-dib-boot-test", "--help"],
    ["virt-dib-links", "--help"],
    ["virt-diskimage-builder", "--version"],
    ["virt-disk-image-create", "--help"],
    ["virt-ramdisk-image-create", "--version"],
]


def in_shell(redirection: str, command: Sequence[str], cwd: Path) -> tools.Result:
    """What becomes of *command* with standard streams as the shell makes them."""
    words: list[str | Path] = ["bash", "-c", f'"$@" {redirection}', "bash", COMMANDS_DIR / command[0], *command[1:]]
    environment = {**os.environ, "HOME": str(cwd)}
    return tools.run(words, doing="running it", cwd=cwd, environment=environment, check=False)


@pytest.mark.parametrize("command", ANSWERS, ids=" ".join)
def test_what_cannot_be_written_is_told(command: list[str], tmp_path: Path) -> None:
    run = in_shell(">/dev/full", command, tmp_path)
    assert run.exit_status == 1
    error, hint = run.stderr.splitlines()
    assert re.fullmatch(f"{command[0]}: error: writing .*: No space left on device", error)
    assert hint.startswith(f"{command[0]}: hint: make room there, or ")


@pytest.mark.parametrize("command", ANSWERS, ids=" ".join)
def test_streams_that_are_closed(command: list[str], tmp_path: Path) -> None:
    run = in_shell(">&-", command, tmp_path)
    assert (run.exit_status, run.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "exit_status"),
    [
        (["virt-dib", "no-such-element"], 2),
        (["virt-dib-doctor", "--frob"], 2),
        (["virt-dib-boot-test"], 2),
        (["virt-dib-links", "links"], 0),
        (["virt-dib-links"], 2),
        (["virt-diskimage-builder"], 2),
        (["virt-disk-image-create", "no-such-element"], 1),
    ],
)
def test_the_status_when_all_streams_are_closed(command: list[str], exit_status: int, tmp_path: Path) -> None:
    assert in_shell("<&- >&- 2>&-", command, tmp_path).exit_status == exit_status


def test_no_file_gets_the_number_of_a_stream_that_is_closed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from virt_dib import cli; sys.exit(cli.report_errors('p', lambda: os.open('/', os.O_RDONLY)))"
    )
    assert in_shell("<&- >&- 2>&-", ["python", "-c", code], tmp_path).exit_status > 2


# ---- signals ----

WAITING = """
import select
import sys
from virt_dib.interrupts import interrupts
from virt_dib import cli

def body():
    with interrupts():
        try:
            print("ready", flush=True)
            # In slices: a signal that comes just before a read begins does not wake it.
            while not select.select([sys.stdin], [], [], 0.1)[0]:
                pass
            sys.stdin.readline()
        finally:
            print("undoing", flush=True)
            sys.stdin.readline()
            print("undone", flush=True)
    return 0

sys.exit(cli.report_errors("virt-dib", body))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_body_and_later_ones_do_not_stop_the_undoing(number: signal.Signals) -> None:
    with tools.started([sys.executable, "-c", WAITING], stdin=-1) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == b"undoing\n"
        for again in (number, signal.SIGINT, signal.SIGTERM):
            process.send_signal(again)
        process.stdin.close()
        assert process.stdout.read() == b"undone\n"
        assert process.stderr.read() == b"virt-dib: interrupted\n"
        assert process.wait() == 130


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    with tools.started(["nohup", sys.executable, "-c", WAITING], stdin=-1) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGHUP)
        process.stdin.close()
        assert process.stdout.read() == b"undoing\nundone\n"
        assert process.wait() == 0


def test_default_size_is_the_one_in_the_help() -> None:
    assert parsed("--size", "5G").spec.size_bytes == DEFAULT_SIZE_BYTES


@pytest.mark.parametrize(
    ("variable", "option", "field", "from_variable", "from_option"),
    [
        ("FS_TYPE=xfs", ["--fs-type", "ext3"], "fs_type", "xfs", "ext3"),
        ("ARCH=arm64", ["--arch", "armhf"], "arch", "arm64", "armhf"),
        ("ROOT_LABEL=one", ["--root-label", "two"], "root_label", "one", "two"),
        ("RAMDISK_ELEMENT=one", ["--ramdisk-element", "two"], "ramdisk_element", "one", "two"),
        ("DIB_DEBUG_TRACE=2", ["--debug", "1"], "debug_level", 2, 1),
        ("DIB_IMAGE_SIZE=7", ["--size", "1G"], "size_bytes", None, 1024**3),
    ],
)
def test_variables_that_mean_what_an_option_means(
    variable: str, option: list[str], field: str, from_variable: object, from_option: object
) -> None:
    assert getattr(command_line.parse(["--envvar", variable, "debian"], {}).spec, field) == from_variable
    assert getattr(command_line.parse(["--envvar", variable, *option, "debian"], {}).spec, field) == from_option


def test_variables_of_bash_cannot_be_set() -> None:
    (problem,) = command_line.parse(["--envvar", "UID=7", "debian"], {}).problems
    assert "UID" in problem.message
