# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from on_terminal import on_terminal
from virt_dib import boot, dib, doctor, formats, kvm, prerequisites, tools
from virt_dib.errors import Problem
from virt_dib.prerequisites import Check, Host
from virt_dib.spec import Kvm
from virt_dib.terminal import columns_of

DEBIAN = 'ID=debian\nVERSION="12 (bookworm)"\n'
UBUNTU = "ID=ubuntu\nID_LIKE=debian\n"
FEDORA = "ID=fedora\n"
ROCKY = 'ID="rocky"\nID_LIKE="rhel centos fedora"\n'
OTHER = "ID=arch\n"
PROGRAMS = ("supermin", "qemu-img", "mke2fs", "python3", "dmsetup", "gawk", f"qemu-system-{platform.machine()}")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    return FakeHost(tmp_path, monkeypatch)


class FakeHost:
    """A complete host in a directory: programs, a kernel, libguestfs's files. Tests take pieces away."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = directory / "root"
        self.cache = directory / "cache"
        self.environ: dict[str, str] = {}
        self.bin_dir = self.root / "usr/bin"
        self.kernel = self.root / "boot/vmlinuz-6.1.0-amd64"
        for path in ("usr/bin", "boot", "etc", "var/tmp", "lib/modules/6.1.0-amd64"):
            (self.root / path).mkdir(parents=True)
        (self.root / "usr/lib/x/guestfs/supermin.d").mkdir(parents=True)
        (self.root / "lib/modules/6.1.0-amd64/modules.dep").touch()
        self.kernel.touch()
        for name in PROGRAMS:
            (self.bin_dir / name).write_text("#!/bin/sh\n")
            (self.bin_dir / name).chmod(0o755)
        self.name("debian")
        monkeypatch.setenv("PATH", str(self.bin_dir))
        monkeypatch.setattr(tools, "_SYSTEM_DIRS", ())
        monkeypatch.setitem(sys.modules, "guestfs", type(sys)("guestfs"))

    def name(self, text: str) -> None:
        (self.root / "etc/os-release").write_text(text if "=" in text else f"ID={text}\n")

    def required(self) -> list[Problem]:
        return prerequisites.require_prerequisites(Host(root=self.root, environ=self.environ))

    def checks(self) -> Mapping[str, Check]:
        results = prerequisites.checks(Host(root=self.root, environ=self.environ), cache=self.cache, wanted=Kvm.OFF)
        return {check.name: check for check in results}


def test_a_complete_host_lacks_nothing(host: FakeHost) -> None:
    assert host.required() == []
    checks = host.checks()
    assert [check.name for check in checks.values() if check.required and not check.ok] == []
    assert checks["qemu-img"].detail == str(host.bin_dir / "qemu-img")
    assert checks["kernel"].detail == str(host.kernel)


def test_the_doctor_and_the_build_say_the_same(host: FakeHost) -> None:
    for name in PROGRAMS:
        (host.bin_dir / name).unlink()
    host.kernel.unlink()
    told = host.required()
    failing = [check for check in host.checks().values() if check.required and not check.ok]
    assert [Problem(check.detail, check.hint) for check in failing] == told
    assert len(told) == len(PROGRAMS) + 1


def test_a_missing_program_in_the_words_of_tools(host: FakeHost) -> None:
    (host.bin_dir / "qemu-img").unlink()
    assert host.required() == [
        Problem("'qemu-img' not found, needed to write the image", "install it: apt-get install qemu-utils")
    ]


@pytest.mark.parametrize(
    ("os_release", "hint"),
    [
        pytest.param(DEBIAN, "install it: apt-get install qemu-utils", id="debian"),
        pytest.param(UBUNTU, "install it: apt-get install qemu-utils", id="ubuntu"),
        pytest.param(FEDORA, "install it: dnf install qemu-img", id="fedora"),
        pytest.param(ROCKY, "install it: dnf install qemu-img", id="like fedora"),
        pytest.param(OTHER, "install the package with it (qemu-utils on Debian, qemu-img on Fedora)", id="other"),
        pytest.param("ID='odd\n", "install the package with it (qemu-utils on Debian, qemu-img on Fedora)", id="bad"),
    ],
)
def test_packages_have_the_names_of_the_distribution(host: FakeHost, os_release: str, hint: str) -> None:
    host.name(os_release)
    (host.bin_dir / "qemu-img").unlink()
    assert [problem.hint for problem in host.required()] == [hint]


def test_a_program_only_some_elements_use_is_no_obstacle(host: FakeHost) -> None:
    checks = host.checks()
    assert not checks["debootstrap"].ok
    assert not checks["debootstrap"].required
    assert checks["debootstrap"].hint == "install it: apt-get install debootstrap"
    assert host.required() == []


def test_what_a_format_needs_is_an_obstacle_to_it_alone(host: FakeHost) -> None:
    needs = {name: prerequisites.format_problems(formats.select([name])) for name in formats.KNOWN}
    sqfstar = Problem("'sqfstar' not found, needed to make a squashfs", "install it: apt-get install squashfs-tools")
    assert sqfstar in needs["squashfs"]
    assert [problem.message.split(",")[0] for problem in needs["docker"]][-1] == "no engine for containers answers"
    assert [name for name, problems in needs.items() if not problems] == ["qcow2", "raw", "vdi", "vhd", "vhdx", "vmdk"]
    together = prerequisites.format_problems(formats.select(["tgz", "oci", "tar"]))
    assert [problem.message.split(" ")[0] for problem in together] == ["'tar'", "'gzip'"]
    assert host.required() == []
    check = host.checks()["sqfstar"]
    assert (check.ok, check.required, check.hint) == (False, False, sqfstar.hint)


# ---- the binding ----


def test_without_the_binding(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "guestfs", None)
    monkeypatch.setattr(prerequisites, "_SYSTEM_PYTHON", host.root / "no/python3")
    (problem,) = host.required()
    assert problem.message.startswith("this Python cannot import the libguestfs binding: ")
    assert problem.hint is not None
    assert problem.hint.startswith("install it: apt-get install python3-guestfs; install virt-dib for that Python: ")


def test_the_systems_python_has_the_binding(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    # A program in its place that succeeds as that Python does when it can import guestfs.
    python = host.bin_dir / "python3"
    python.write_text('#!/bin/sh\ntest "$*" = "-I -c __import__(\'guestfs\')"\n')
    monkeypatch.setitem(sys.modules, "guestfs", None)
    monkeypatch.setattr(prerequisites, "_SYSTEM_PYTHON", python)
    (problem,) = host.required()
    assert problem.hint == (
        f"'{python}' has it; install virt-dib for that Python: {python} -m venv --system-site-packages DIR, "
        "then DIR/bin/pip install virt-dib"
    )


# ---- what the appliance is made of ----


def test_no_kernel(host: FakeHost) -> None:
    host.kernel.unlink()
    (problem,) = host.required()
    assert problem.message.startswith("no kernel with its modules in /boot and /lib/modules, ")
    assert problem.hint is not None
    assert problem.hint.startswith("install it: apt-get install linux-image-cloud-")
    host.name("ubuntu")
    assert host.required()[0].hint == "install it: apt-get install linux-image-virtual"


def test_a_kernel_without_modules(host: FakeHost) -> None:
    (host.root / "lib/modules/6.1.0-amd64/modules.dep").unlink()
    (problem,) = host.required()
    assert f"only {host.kernel} without modules" in problem.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_kernel_that_cannot_be_read(host: FakeHost) -> None:
    host.name("ubuntu")
    host.kernel.chmod(0)
    (problem,) = host.required()
    assert problem.message.startswith(f"the kernel '{host.kernel}' cannot be read by this user")
    assert problem.hint == (
        f"make it readable, as root: dpkg-statoverride --update --add root root 0644 {host.kernel} (or chmod 0644)"
    )


def test_a_kernel_that_cannot_be_read_beside_one_that_can() -> None:
    # Root may read everything, so the files are told of and not made.
    newest = kvm.Kernel(path=Path("/no such/vmlinuz-2"), release="2", has_modules=True)
    older = kvm.Kernel(path=Path("/etc/os-release"), release="1", has_modules=True)
    hint = prerequisites.hint_to_read(newest, [newest, older], prerequisites.Distribution(frozenset({"fedora"})))
    assert hint == (
        "make it readable, as root: chmod 0644 '/no such/vmlinuz-2'; "
        "or use another one: export SUPERMIN_KERNEL=/etc/os-release"
    )


def test_a_kernel_chosen_by_the_user(host: FakeHost, tmp_path: Path) -> None:
    host.kernel.unlink()
    (tmp_path / "vmlinuz-mine").touch()
    host.environ["SUPERMIN_KERNEL"] = str(tmp_path / "vmlinuz-mine")
    assert host.checks()["kernel"].detail == str(tmp_path / "vmlinuz-mine")


def test_a_kernel_chosen_by_the_user_that_is_not_there(host: FakeHost, tmp_path: Path) -> None:
    host.environ["SUPERMIN_KERNEL"] = str(tmp_path / "none")
    assert host.required() == [
        Problem(
            f"no kernel '{tmp_path}/none', which SUPERMIN_KERNEL names, needed to start the appliance",
            "unset SUPERMIN_KERNEL, or set it to a kernel that is there",
        )
    ]


def test_no_appliance_of_libguestfs(host: FakeHost) -> None:
    (host.root / "usr/lib/x/guestfs/supermin.d").rmdir()
    (problem,) = host.required()
    assert problem.hint == "install it: apt-get install libguestfs0"
    host.environ["LIBGUESTFS_PATH"] = str(host.cache)
    (problem,) = host.required()
    assert problem == Problem("no supermin.d in LIBGUESTFS_PATH, needed to make the appliance", "unset LIBGUESTFS_PATH")


# ---- the rest ----


def test_too_little_space(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prerequisites, "BUILD_SPACE_BYTES", 1 << 50)
    check = host.checks()["temporary space"]
    assert (check.ok, check.required, check.word) == (False, True, "low")
    place = re.escape(str(host.root / "var/tmp"))
    assert re.fullmatch(rf"only [0-9.]+ [KMGT]iB free in '{place}', 1\.0 PiB are needed", check.detail)


def test_a_temporary_directory_that_is_none(host: FakeHost, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    host.environ["TMPDIR"] = str(tmp_path / "file")
    check = host.checks()["temporary space"]
    assert (check.ok, check.required) == (False, True)
    assert check.detail == f"cannot write in '{tmp_path / 'file'}': not a directory"


@pytest.mark.parametrize("variable", ["TMPDIR", "LIBGUESTFS_TMPDIR"])
def test_a_temporary_directory_that_is_not_there(host: FakeHost, tmp_path: Path, variable: str) -> None:
    host.environ |= {"TMPDIR": "/tmp", variable: str(tmp_path / "no/temp")}
    check = host.checks()["temporary space"]
    assert check.detail == f"cannot write in '{tmp_path}/no/temp': no such file or directory"
    assert check.hint == f"set {variable} to a directory that you can write"


def test_a_cache_that_cannot_be_is_called_by_its_own_name(host: FakeHost) -> None:
    host.cache = Path("/proc/no/cache")
    assert host.checks()["cache space"].detail.startswith("cannot write in '/proc/no/cache': ")


def test_a_cache_that_is_not_there_yet_is_measured_where_it_will_be(host: FakeHost) -> None:
    assert host.checks()["cache space"].ok
    assert not host.cache.exists()


def test_emulation_is_slow_but_no_obstacle(host: FakeHost) -> None:
    check = host.checks()["KVM"]
    assert (check.ok, check.required, check.word) == (False, False, "slow")
    assert check.detail.endswith("; builds in the appliance take about 15 times as long")


def test_a_sandbox_that_cannot_be_is_no_obstacle(host: FakeHost) -> None:
    check = host.checks()["sandbox"]
    assert (check.ok, check.required, check.word) == (False, False, "missing")
    assert "slirp4netns" in check.detail
    assert check.hint


@pytest.mark.parametrize(
    "line",
    [
        "/dib/build/hooks/root.d/08-bootstrap: line 12: mmdebstrap: command not found",
        "sh: 1: mmdebstrap: not found",
        "env: 'mmdebstrap': No such file or directory",
    ],
)
def test_a_program_that_a_script_does_not_find_in_the_words_of_the_doctor(host: FakeHost, line: str) -> None:
    (problem,) = prerequisites.tools_not_found(["something else", line, "cat: /mmdebstrap: not a directory"])
    assert problem.message == host.checks()["mmdebstrap"].detail
    (host.bin_dir / "mmdebstrap").write_text("#!/bin/sh\n")
    (host.bin_dir / "mmdebstrap").chmod(0o755)
    assert prerequisites.tools_not_found([line]) == []


# ---- the table and the command ----


def test_the_table_is_aligned_and_says_what_to_run() -> None:
    results = [
        Check(name="one", ok=True, detail="/usr/bin/one"),
        Check(name="another", ok=False, detail="'another' not found", hint="install it"),
        Check(name="KVM", ok=False, detail="\x1b[31mno", hint="wait", required=False, failing="slow"),
    ]
    assert doctor.table(results, colour=False) == (
        "ok       one      /usr/bin/one\n"
        "missing  another  'another' not found\n"
        "                  install it\n"
        "slow     KVM      no\n"
        "                  wait\n"
        "\n"
        "a build cannot work here yet, for want of: another\n"
    )


def test_on_a_terminal_the_last_column_is_folded_and_nothing_is_lost() -> None:
    results = [
        Check(name="one", ok=True, detail="/usr/bin/one"),
        Check(name="another", ok=False, detail="'another' not found, needed to do more", hint="install it or run on"),
    ]
    for colour in (False, True):
        text = doctor.table(results, colour=colour, columns=36)
        assert re.sub(r"\x1b\[[0-9;]*m", "", text) == (
            "ok       one      /usr/bin/one\n"
            "missing  another  'another' not\n"
            "                  found, needed to\n"
            "                  do more\n"
            "                  install it or run\n"
            "                  on\n"
            "\n"
            "a build cannot work here yet, for\n"
            "want of: another\n"
        )
    narrow = doctor.table(results, colour=False, columns=10)
    assert narrow.split() == doctor.table(results, colour=False).split()
    assert all(line.strip() for line in narrow.split("\n\n", maxsplit=1)[0].splitlines())


def test_colours_mark_the_words_only() -> None:
    plain = doctor.table([Check(name="one", ok=True, detail="here")], colour=False)
    coloured = doctor.table([Check(name="one", ok=True, detail="here")], colour=True)
    assert coloured.startswith("\x1b[")
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def test_the_conclusion_of_a_host_that_is_only_slow() -> None:
    results = [Check(name="KVM", ok=False, detail="no", required=False, failing="slow")]
    assert doctor.table(results, colour=False).endswith("\na build can work here; worth a look: KVM\n")


PROSE = re.compile(r"\b[a-z]+ [a-z]+ [a-z]+ [a-z]+")
COMMANDS = re.compile(
    r"apt-get install|-m venv --system-site-packages DIR|pip install virt-dib|'[^']*'|import of guestfs halted.*"
)


@pytest.mark.parametrize("state", ["complete", "bare", "locked"])
def test_the_table_is_in_japanese_and_aligned(host: FakeHost, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    monkeypatch.setenv("LANGUAGE", "ja")
    if state == "bare":
        monkeypatch.setenv("PATH", "")
        monkeypatch.setitem(sys.modules, "guestfs", None)
        host.kernel.unlink()
        shutil.rmtree(host.root / "usr/lib")
    elif state == "locked":
        monkeypatch.setattr(kvm.Kernel, "is_readable", False)
        monkeypatch.setattr(prerequisites, "BUILD_SPACE_BYTES", 1 << 60)
    results = list(host.checks().values())
    lines = doctor.table(results, colour=False).splitlines()
    assert [line for line in lines if PROSE.search(COMMANDS.sub("", line))] == []
    names = {"カーネル", "一時領域", "libguestfs アプライアンス"}
    beginnings = {
        columns_of(line[: line.index(name)]) for name in names for line in lines[:-2] if f"  {name}  " in line
    }
    assert len(beginnings) == 1
    assert lines[-1].startswith("ここではまだ" if state != "complete" else "ここで")


def run_doctor(environment: Mapping[str, str], *arguments: str) -> tools.Result:
    program = "import sys; from virt_dib.doctor import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *arguments]
    return tools.run(command, doing="running the doctor", environment={**os.environ, **environment}, check=False)


def test_the_command_on_this_host(tmp_path: Path) -> None:
    result = run_doctor({"VIRT_DIB_KVM": "off", "XDG_CACHE_HOME": str(tmp_path)})
    lacking = [problem.message for problem in prerequisites.require_prerequisites()]
    words = [line.split()[0] for line in result.stdout.splitlines() if line[:1].strip() and not line.startswith("a ")]
    assert set(words) <= {"ok", "missing", "slow", "low"}
    assert "\x1b" not in result.stdout
    assert all(message in result.stdout for message in lacking)
    assert ("a build can work here" in result.stdout) is (result.exit_status == 0)
    if lacking:
        assert result.exit_status == 1


def test_the_command_on_a_narrow_terminal(tmp_path: Path) -> None:
    program = [Path(sys.executable).parent / "virt-dib-doctor"]
    environment = {"VIRT_DIB_KVM": "off", "XDG_CACHE_HOME": str(tmp_path), "TMPDIR": "/no/directory"}
    environment["LIBGUESTFS_TMPDIR"] = ""
    with on_terminal(program, cwd=tmp_path, environment=environment, columns=60) as running:
        assert running.ended() == 1
    lines = re.sub(r"\x1b\[[0-9;]*m", "", running.person.seen).splitlines()
    # A word that is longer stays in one piece.
    assert [line for line in lines if len(line.rpartition(" ")[0].rstrip()) > 60] == []
    assert "set TMPDIR to a directory that you can write" in " ".join(" ".join(lines).split())


def test_the_command_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run_doctor({"VIRT_DIB_KVM": "off", "TMPDIR": str(tmp_path / "file")})
    assert result.exit_status == 1
    assert f"cannot write in '{tmp_path / 'file'}'" in result.stdout
    assert "set TMPDIR to a directory that you can write" in result.stdout
    assert result.stderr == ""


def test_the_command_with_a_bad_setting() -> None:
    result = run_doctor({"VIRT_DIB_KVM": "maybe"})
    assert result.exit_status == 2
    assert "virt-dib-doctor: error: in VIRT_DIB_KVM: unknown value of --kvm 'maybe'\n" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_command_looks_for_diskimage_builder_where_a_build_does(tmp_path: Path) -> None:
    """In a Python that has none, a build works with one that is named elsewhere."""
    bare, full = tmp_path / "bare", tmp_path / "full"
    tools.run([sys.executable, "-m", "venv", "--without-pip", bare], doing="making an environment")
    full.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    full.chmod(0o755)
    source = str(Path(doctor.__file__).parents[1])
    (tmp_path / "yaml").symlink_to(Path(yaml.__file__).parent)
    program = "import sys; from virt_dib.doctor import main; sys.exit(main())"
    surroundings = {
        "PATH": os.defpath, "PYTHONPATH": f"{source}:{tmp_path}", "XDG_CACHE_HOME": str(tmp_path),
        "HOME": str(tmp_path), "VIRT_DIB_KVM": "off",
    }  # fmt: skip

    def line(**settings: str) -> str:
        command: list[str | Path] = [bare / "bin/python", "-c", program]
        environment = {**surroundings, **settings}
        said = tools.run(command, doing="running the doctor", environment=environment, check=False).stdout
        return next(line for line in said.splitlines() if "  diskimage-builder  " in line)

    assert line().startswith("missing ")
    assert line(VIRT_DIB_PYTHON=str(full)).startswith("ok ")
    library = dib.find_installation(None).library_dir
    assert line(VIRT_DIB_PYTHON=str(full), VIRT_DIB_DIB_LIBRARY=str(library)).startswith("ok ")
    (tmp_path / "config.toml").write_text(f"python = '{full}'\n")
    assert line(VIRT_DIB_CONFIG=str(tmp_path / "config.toml")).startswith("ok ")
    assert line(VIRT_DIB_PYTHON=str(full), VIRT_DIB_DIB_LIBRARY="/no/lib").startswith("missing ")


def test_the_command_with_arguments_it_does_not_know() -> None:
    result = run_doctor({}, "--frob")
    assert (result.exit_status, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        "virt-dib-doctor: error: unrecognized arguments: --frob",
        "virt-dib-doctor: hint: 'virt-dib-doctor --help' lists all options",
    ]


@pytest.mark.appliance
def test_the_doctor_makes_a_new_trial(tmp_path: Path) -> None:
    result = run_doctor({"XDG_CACHE_HOME": str(tmp_path), "VIRT_DIB_KVM": "", "LIBGUESTFS_BACKEND_SETTINGS": ""})
    verdict = kvm.choose(kernel=None, cache_dir=tmp_path / "virt-dib")
    assert verdict.reason in result.stdout


def test_the_firmware_is_the_one_the_boot_test_uses() -> None:
    code, store = boot.find_uefi()
    assert code.stat().st_size > store.stat().st_size > 0
