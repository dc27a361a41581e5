# SPDX-License-Identifier: Apache-2.0
"""What this host lacks or refuses, and how that is told.

It is made so for real: in a mount namespace where a file is hidden, with a limit, as another user, by a program that
fails.
"""

from __future__ import annotations

import dataclasses
import os
import pty
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import make_element
from test_staging import as_ordinary_user, run_python
from virt_dib import (
    appliance,
    archives,
    boot,
    boot_cli,
    builder,
    configuration,
    dib,
    dib_cli,
    dib_links,
    drive,
    extra_data,
    formats,
    jobs,
    kvm,
    layout,
    machine,
    network,
    prerequisites,
    sandbox,
    supermin,
    terminal_link,
    tools,
)
from virt_dib.appliance import open_appliance
from virt_dib.errors import (
    ApplianceError,
    Interrupted,
    PrerequisiteError,
    ToolError,
    UsageError,
    VirtDibError,
)
from virt_dib.interrupts import Cancellation, cancellable
from virt_dib.jobs import JobResult
from virt_dib.machine import Disk, Settings
from virt_dib.spec import BuildSpec
from virt_dib.workspace import open_workspace

QEMU = f"qemu-system-{os.uname().machine}"
TELL = """
import os, sys
from pathlib import Path
from virt_dib.errors import VirtDibError
def tell(ask):
    try:
        print(ask())
    except VirtDibError as error:
        for problem in error.problems:
            print(type(error).__name__, problem.message, "|", problem.hint)
"""


def in_namespace(setup: str, code: str, *arguments: str | Path) -> str:
    """What *code* prints in a mount namespace where the shell text *setup* was done."""
    unshare = str(tools.require("unshare", purpose="run the tests", package="util-linux"))
    as_root = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    before = (unshare, *as_root, "--mount", "/bin/sh", "-ec", f'{setup}; exec "$@"', "sh")
    return run_python(TELL + code, *arguments, before=before)


def hide(*paths: str | Path) -> str:
    """Shell text after which there is a file there that nobody can run or read as a program or library."""
    covered = "; ".join(f'mount --bind /dev/null "$(readlink -f {path})"' for path in paths if os.path.exists(path))
    return covered or ":"


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def first_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Makes a program that comes before the system's."""

    def make(name: str, text: str) -> Path:
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        return program(tmp_path / "bin" / name, text)

    return make


def told(error: pytest.ExceptionInfo[VirtDibError]) -> tuple[str, str]:
    (problem,) = error.value.problems
    return problem.message, problem.hint or ""


# ---- programs ----


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(PrerequisiteError) as caught:
        tools.require("no-such-program", purpose="do what it does", package="none")
    assert told(caught) == (
        "'no-such-program' not found, needed to do what it does",
        "install it: apt-get install none",
    )


def test_a_program_that_takes_too_long() -> None:
    with pytest.raises(ToolError, match=r"^waiting: 'sleep' did not finish in 0 s$"):
        tools.run(["sleep", "600"], doing="waiting", timeout_s=0.1)


def test_a_signal_without_a_name() -> None:
    number = signal.SIGRTMIN + 5
    with pytest.raises(ToolError, match=f"^dying: 'sh' failed with signal {number}$"):
        tools.run(["sh", "-c", f"kill -{number} $$"], doing="dying")


# ---- KVM ----

CHOOSE = """
from virt_dib import kvm
device = Path(sys.argv[1])
print(kvm.choose(kernel=None, cache_dir=device.parent / "cache", device=device).reason)
"""


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        (hide(f"/usr/bin/{QEMU}"), f"'{QEMU}' is not installed"),
        (
            "mount -t tmpfs none /boot; mount -t tmpfs none /lib/modules",
            "no trial of KVM is possible, no kernel was found in /boot or /lib/modules",
        ),
        (
            "mount -t tmpfs none /boot; mount -t tmpfs none /lib/modules; ln -s /nowhere /boot/vmlinuz-1",
            "no trial of KVM is possible, '/boot/vmlinuz-1' cannot be read",
        ),
    ],
    ids=["no qemu", "no kernel", "a kernel that cannot be read"],
)
def test_kvm_cannot_be_tried(tmp_path: Path, setup: str, reason: str) -> None:
    (tmp_path / "kvm").touch()
    assert in_namespace(setup, CHOOSE, tmp_path / "kvm").strip() == reason


def test_kvm_is_not_tried_on_other_processors(tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    # i386 is what a kernel of 64 bits says to programs that ask so.
    said = run_python(TELL + CHOOSE, tmp_path / "kvm", before=("setarch", "i386"))
    assert said.strip() in ("no trial of KVM is known for i686", "no trial of KVM is known for i386")


def test_a_qemu_that_goes_while_it_is_tried(tmp_path: Path) -> None:
    for name in ("kvm", "kernel"):
        (tmp_path / name).touch()
    qemu = program(tmp_path / "qemu", 'rm -- "$0"; echo QEMU emulator version 9')
    verdict = kvm.choose(kernel=tmp_path / "kernel", cache_dir=tmp_path, qemu=qemu, device=tmp_path / "kvm")
    assert verdict.reason == f"qemu does not run: cannot start '{qemu}': No such file or directory"


def test_a_machine_without_an_id(tmp_path: Path) -> None:
    if not os.path.exists("/etc/machine-id"):
        pytest.skip("this machine has none")
    (tmp_path / "kvm").touch()
    (tmp_path / "id").write_bytes(b"\xff")
    setup = f"mount --bind {tmp_path / 'id'} /etc/machine-id; {hide(f'/usr/bin/{QEMU}')}"
    code = 'from virt_dib import kvm\nprint(len(kvm._key("QEMU")))\n' + CHOOSE
    assert in_namespace(setup, code, tmp_path / "kvm").split("\n")[0] == "32"


# ---- the appliance ----


def starting(tmp_path: Path, qemu: str) -> Settings:
    """An appliance whose qemu is the shell text *qemu*."""
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, 1 << 20)
    return Settings(
        disks=[Disk(path=disk, label="build")],
        program=program(tmp_path / "qemu", f'case " $* " in *" -kernel "*) {qemu} ;; esac\nexec {QEMU} "$@"'),
        cache_dir=supermin.cache_dir(),
        memory_mib=512,
        cpus=1,
        network=False,
        accelerate=False,
    )


def need_libguestfs() -> None:
    problem = machine.binding_problem()
    if problem is not None or prerequisites.require_prerequisites():
        pytest.skip("this host has no appliance")


def test_a_qemu_that_fails_at_once(tmp_path: Path) -> None:
    need_libguestfs()
    with (
        pytest.raises(ApplianceError, match=r"^starting the appliance: .") as caught,
        open_appliance(starting(tmp_path, "echo cannot set up guest memory >&2; exit 1")) as started,
    ):
        started.prepare()
    assert "virt-dib-doctor" in told(caught)[1]


def test_an_appliance_that_stands_still_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_libguestfs()
    monkeypatch.setattr(appliance, "_START_TIMEOUTS_S", (1.0, 1.0))
    with (
        pytest.raises(ApplianceError, match=r"^starting the appliance: no answer in 1 s$") as caught,
        open_appliance(starting(tmp_path, f"echo >>{tmp_path}/tries; exec sleep 600")) as started,
    ):
        started.prepare()
    assert "--verbose -x" in told(caught)[1]


def test_no_binding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "guestfs", None)
    with (
        pytest.raises(PrerequisiteError, match=r"^this Python cannot import the libguestfs binding: ") as caught,
        open_appliance(starting(tmp_path, ":")),
    ):
        pass
    assert "python3-guestfs" in told(caught)[1]


def test_a_thread_that_has_ended_has_no_children() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert thread.native_id is not None
    while Path(f"/proc/self/task/{thread.native_id}").exists():
        time.sleep(0.01)
    assert machine.children(thread.native_id) == set()


# ---- what the appliance is made of ----


def test_a_list_of_libguestfs_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "supermin.d").mkdir()
    (tmp_path / "supermin.d" / "packages").symlink_to("/nowhere")
    with pytest.raises(PrerequisiteError) as caught:
        supermin.prepare(tmp_path / "cache", [str(tmp_path)])
    message = f"reading libguestfs's files in '{tmp_path}/supermin.d': No such file or directory: "
    assert told(caught)[0] == f"{message}'{tmp_path}/supermin.d/packages'"


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("supermin: error: no kernels were found", "make a kernel readable"),
        ("E: dpkg database is locked", "virt-dib-doctor checks"),
    ],
)
def test_a_supermin_that_fails(tmp_path: Path, first_on_path: Callable[[str, str], Path], said: str, hint: str) -> None:
    first_on_path("supermin", f"echo {said} >&2; exit 1")
    with pytest.raises(ApplianceError) as caught:
        supermin.build(tmp_path, tmp_path)
    assert told(caught)[0] == f"making the appliance: 'supermin' failed with exit status 1: {said}"
    assert told(caught)[1].startswith(hint)


def test_no_supermin(tmp_path: Path) -> None:
    code = "from virt_dib import supermin\ntell(lambda: supermin.build(Path(sys.argv[1]), Path(sys.argv[1])))"
    said = in_namespace(hide("/usr/bin/supermin"), code, tmp_path)
    assert (
        said
        == "ApplianceError 'supermin' not found, needed to make the appliance | install it: apt-get install supermin\n"
    )


# ---- the sandbox ----


@pytest.mark.parametrize(
    ("covered", "message"),
    [
        ("libseccomp", "the library libseccomp.so.2 cannot be loaded, needed to filter system calls in a sandbox"),
        ("python", "'/usr/bin/python3' not found, which scripts of elements are run by"),
    ],
)
def test_a_part_of_the_sandbox_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, covered: str, message: str
) -> None:
    if covered == "libseccomp":
        (library,) = list(Path("/usr/lib").glob("*/libseccomp.so.2"))[:1] or [Path("/nowhere")]
        code = "from virt_dib import sandbox\nfor problem in sandbox._library_problems():\n    print(problem.message)"
        assert in_namespace(hide(library), code).splitlines() == [message]
        return
    monkeypatch.setattr(sandbox, "_PYTHON", tmp_path / "python3")
    (problem,) = sandbox._library_problems()
    assert problem.message == message.replace("/usr/bin", str(tmp_path))


def test_memory_without_attributes_is_not_taken() -> None:
    code = "from virt_dib import sandbox\nprint(sandbox.spare_memory_bytes())"
    assert in_namespace("mount -t ramfs none /dev/shm", code) == "None\n"


def test_a_setting_that_the_kernel_does_not_have(tmp_path: Path) -> None:
    assert sandbox._setting(tmp_path / "none") is None


# ---- networks ----


def test_a_directory_that_allows_no_programs(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    code = """
from virt_dib import network, sandbox
def start():
    with network.detached_program(Path("/bin/true"), Path(sys.argv[1])):
        pass
tell(start)
print([problem.message for problem in sandbox._directory_problems(Path(sys.argv[1]) / ".")])
"""
    said = in_namespace(f"mount -t tmpfs -o noexec none {tmp_path}/there", code, tmp_path / "there").splitlines()
    assert said == [
        f"ToolError no program can be started in '{tmp_path}/there', which is mounted with noexec | None",
        f"[\"no program can be started in '{tmp_path}', which is mounted with noexec\"]",
    ]


def test_neither_of_the_programs_for_networks() -> None:
    code = """
from virt_dib import network
def connect():
    with network.connected(os.getpid()):
        pass
tell(connect)
"""
    said = in_namespace(hide("/usr/bin/slirp4netns", "/usr/bin/pasta", "/usr/bin/passt"), code)
    assert said.startswith("PrerequisiteError neither 'slirp4netns' nor 'pasta' found, needed for a network apart from")
    assert "--no-network" in said


@pytest.mark.parametrize("said", ["open(/dev/net/tun): No such file or directory", ""])
@pytest.mark.parametrize("name", ["slirp4netns", "pasta"])
def test_a_program_for_networks_that_fails(
    first_on_path: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    failing = first_on_path(name, f"echo '{said}'; exit 1")
    real = tools.find
    others = {"slirp4netns", "pasta"} - {name}
    monkeypatch.setattr(tools, "find", lambda asked: None if asked in others else real(asked))
    with tools.started(["true"]) as process:
        # The network of one that has ended has no route.
        process.wait()
    with pytest.raises(ApplianceError) as caught, network.connected(process.pid):
        pass
    assert told(caught) == (
        f"making a network with '{failing}': {said or 'it does not say why'}",
        "build with --no-network, if it needs none",
    )


def test_waiting_for_a_network_can_be_cancelled(first_on_path: Callable[[str, str], Path]) -> None:
    """Of a program that never says that it is ready."""
    first_on_path("slirp4netns", "exec sleep 20")
    cancellation = Cancellation()
    timer = threading.Timer(0.2, cancellation.cancel)
    timer.start()
    try:
        with pytest.raises(Interrupted), cancellable(cancellation), network.connected(os.getpid()):
            pass
    finally:
        timer.cancel()


# ---- files that the host refuses, wherever in a build that is ----


def test_an_output_directory_that_goes_in_the_middle_of_a_build(tmp_path: Path) -> None:
    with (
        pytest.raises(ToolError) as caught,
        builder._host_errors(tmp_path / "work", tmp_path / "out"),
    ):
        (tmp_path / "out/file").touch()
    assert told(caught) == (
        f"writing the files of the build in '{tmp_path}/out': the directory has been removed meanwhile",
        "build again, and leave it where it is",
    )


def test_the_directory_for_the_disks_goes_in_the_middle_of_a_build(tmp_path: Path) -> None:
    with pytest.raises(ToolError) as caught, builder._host_errors(tmp_path / "work", tmp_path):
        (tmp_path / "work/file").touch()
    assert told(caught)[0] == (
        f"writing the files of the build in '{tmp_path}/work': the directory has been removed meanwhile"
    )


def test_a_disk_of_the_host_that_is_full_in_the_middle_of_a_build(tmp_path: Path) -> None:
    with (
        pytest.raises(ToolError) as caught,
        builder._host_errors(tmp_path / "work", tmp_path),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")
    message, hint = told(caught)
    assert message == f"writing the files of the build in '{tmp_path}': No space left on device"
    assert "TMPDIR" in hint


def test_what_else_goes_wrong_is_no_matter_of_the_host(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), builder._host_errors(tmp_path, tmp_path):
        (tmp_path / "nothing/there").touch()


@pytest.mark.parametrize(
    ("mount", "wanted"),
    [
        ("-o size=64k", "ToolError trying --qemu-img-options in '{}': no space left | set TMPDIR to a directory"),
        ("-o ro", "ToolError trying --qemu-img-options in '{}': Read-only file system | set TMPDIR to a directory"),
    ],
    ids=["full", "read-only"],
)
def test_no_place_to_try_options_of_qemu_img(tmp_path: Path, mount: str, wanted: str) -> None:
    code = """
from virt_dib import formats
from virt_dib.spec import BuildSpec
top = Path(sys.argv[1])
spec = BuildSpec(name="x", output_dir=top, elements=(), qemu_img_options="cluster_size=2M,preallocation=full")
tell(lambda: formats.check_options(formats.select(["qcow2"]), spec, top / "trial"))
"""
    (tmp_path / "there").mkdir()
    said = in_namespace(f"mount -t tmpfs {mount} none {tmp_path}/there", code, tmp_path / "there")
    assert said.startswith(wanted.format(tmp_path / "there"))


# ---- diskimage-builder ----


def test_none_for_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diskimage_builder", None)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    if tools.find("disk-image-create") is not None:
        pytest.skip("the command is installed on this host")
    check = prerequisites._dib(None, None)
    assert (check.ok, check.required) == (False, True)
    assert check.detail == "diskimage-builder not found, needed to build images"
    assert "pip install diskimage-builder" in (check.hint or "")


def test_a_python_of_the_system_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python3").touch(mode=0o644)
    monkeypatch.setattr(prerequisites, "_SYSTEM_PYTHON", tmp_path / "python3")
    monkeypatch.setitem(sys.modules, "guestfs", None)
    hint = prerequisites._binding(prerequisites.Host.here().distribution).hint or ""
    assert f"'{tmp_path}/python3' has it" not in hint
    assert "install" in hint


def test_a_broken_package(tmp_path: Path, first_on_path: Callable[[str, str], Path]) -> None:
    answer = f'{{"modules": {{"diskimage_builder": "{tmp_path}"}}, "metadata": null}}'
    python = first_on_path("python3", f"echo '{answer}'")
    with pytest.raises(PrerequisiteError) as caught:
        dib.find_installation(None, python)
    assert told(caught)[0] == (
        f"diskimage-builder in '{tmp_path}' is incomplete: '{tmp_path}/lib/die' does not exist or cannot be read"
    )
    assert "--force-reinstall" in told(caught)[1]


def test_a_command_that_may_be_run_and_not_read(tmp_path: Path) -> None:
    assert dib._interpreter_of(tmp_path) is None


def test_a_python_without_what_dib_block_device_needs(tmp_path: Path) -> None:
    installation = dib.find_installation(None)
    python = program(tmp_path / "python", f'exec {sys.executable} -S "$@"')
    site = tmp_path / "site"
    site.mkdir()
    (site / "diskimage_builder").symlink_to(installation.package_dir)
    bare = dataclasses.replace(installation, python=python, package_dir=site / "diskimage_builder")
    with pytest.raises(ToolError, match=r"^running dib-block-device: ModuleNotFoundError: No module named ") as caught:
        layout.prepare(BuildSpec(name="x", output_dir=tmp_path, elements=()), (), bare, tmp_path / "scratch")
    assert "pip" in told(caught)[1]


def test_no_room_to_check_the_layout(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    code = """
from virt_dib import dib, layout
from virt_dib.spec import BuildSpec
top = Path(sys.argv[1])
spec = BuildSpec(name="x", output_dir=top, elements=())
tell(lambda: layout.prepare(spec, (), dib.find_installation(None), top / "small/scratch"))
"""
    # Room for the directory, the configuration and the parameters, and none for what diskimage-builder makes of them.
    setup = f"mount -t tmpfs -o size=8k none {tmp_path}/small"
    said = in_namespace(setup, code, tmp_path)
    assert said.startswith("ToolError checking the block device configuration in ")
    assert ": no space left | set TMPDIR" in said


# ---- temporary directories ----


def test_a_temporary_directory_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ToolError) as caught, open_workspace(tmp_path / "none"):
        pass
    assert told(caught)[0] == f"making a directory for the build in '{tmp_path}/none': No such file or directory"
    assert "TMPDIR" in told(caught)[1]
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    with pytest.raises(ToolError) as caught:
        boot.boot_test(tmp_path / "image", image_format="raw", accelerate=False)
    assert told(caught)[0] == f"making a directory for the boot test in '{tmp_path}/none': No such file or directory"
    assert "TMPDIR" in told(caught)[1]


PLAN = """
import resource
from virt_dib import api, prerequisites
top = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
prerequisites.require_prerequisites = list
spec = api.BuildSpec(name="x", output_dir=top, elements=("one",), element_paths=(top / "elements",), skip_base=True)
tell(lambda: api.plan_image(spec, options=api.RunOptions(temporary_dir=top)))
"""


def test_a_host_that_allows_no_large_files(tmp_path: Path) -> None:
    make_element(tmp_path / "elements", "one", {"install.d/50-x": "#!/bin/bash\n"}, provides=["operating-system"])
    said = run_python(TELL + PLAN, tmp_path)
    assert said.startswith(f"ToolError writing the files of the build in '{tmp_path}': File too large")
    assert "TMPDIR" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elements"]


# ---- booting an image ----


def test_an_image_with_too_long_a_name() -> None:
    with pytest.raises(ToolError, match=r"^cannot read the image '/x+': file name too long$") as caught:
        boot.probe_format(Path("/" + "x" * 300))
    assert told(caught)[1] == "make it readable for this user"


FIRMWARE = """
from virt_dib import boot, prerequisites
tell(boot.find_uefi)
check = prerequisites._uefi(prerequisites.Host.here().distribution)
print(check.ok, check.required, check.detail, check.hint)
"""


def test_no_firmware() -> None:
    places = {str(Path(name).parent) for pair in boot._FIRMWARE_FILES for name in pair}
    setup = "; ".join(f"mount -t tmpfs none {place}" for place in sorted(places) if os.path.isdir(place)) or ":"
    first, second = in_namespace(setup, FIRMWARE).splitlines()
    message = "the UEFI firmware OVMF not found, needed to boot an image by UEFI"
    assert first == f"PrerequisiteError {message} | install it: apt-get install ovmf"
    assert second.startswith(f"False False {message} install")


SPEAKS = {
    "panic": "printf 'one\\nKernel panic - not syncing: no init\\n'; exec sleep 600",
    "reset": "echo bye; exit 0",
    "silence": "exec sleep 600",
    "login": "printf 'tiny login: '; exec sleep 600",
}


@pytest.mark.parametrize(
    ("qemu", "status", "said", "hint"),
    [
        ("panic", 1, "the guest stopped at 'Kernel panic - not syncing: no init'", "use --uefi"),
        ("reset", 1, "the guest reset or powered off", "use --uefi"),
        ("silence", 1, "did not come up in 2 s", "is its kernel told console=ttyS0?"),
        ("login", 0, "", ""),
    ],
)
def test_what_a_machine_says(
    tmp_path: Path,
    first_on_path: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    qemu: str,
    status: int,
    said: str,
    hint: str,
) -> None:
    monkeypatch.setenv("VIRT_DIB_KVM", "off")
    first_on_path("qemu-system-x86_64", SPEAKS[qemu])
    (tmp_path / "image").write_bytes(bytes(4096))
    assert boot_cli.main(["--timeout", "2", str(tmp_path / "image")]) == status
    err = capsys.readouterr().err
    assert said in err
    assert hint in err


@pytest.mark.parametrize(
    ("kernel", "what", "hint"),
    [
        (False, "image", "does 'qemu-img check' like the image"),
        (True, "kernel", "is it a kernel for this architecture?"),
    ],
)
def test_a_machine_that_does_not_start(
    tmp_path: Path,
    first_on_path: Callable[[str, str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    hint: str,
    *,
    kernel: bool,
) -> None:
    monkeypatch.setenv("VIRT_DIB_KVM", "off")
    first_on_path("qemu-system-x86_64", "echo 'qemu-system-x86_64: Could not open it' >&2; exit 1")
    (tmp_path / "file").write_bytes(bytes(4096))
    file = str(tmp_path / "file")
    assert boot_cli.main(["--kernel", file, "--initrd", file, "--expect", "x"] if kernel else [file]) == 1
    err = capsys.readouterr().err
    assert f"error: starting the {what}: qemu ended with exit status 1: Could not open it\n" in err
    assert f"hint: {hint}" in err
    assert "VIRT_DIB_KVM=off rules out KVM" in err


# ---- formats ----


def test_a_bwrap_that_may_make_no_namespaces(first_on_path: Callable[[str, str], Path]) -> None:
    first_on_path("bwrap", "echo 'bwrap: No permissions to create new namespace' >&2; exit 1")
    problem = archives.confinement_problem()
    assert problem is not None
    assert problem.message == (
        "bwrap does not work here, needed to keep what makes the squashfs from the host: "
        "bwrap: No permissions to create new namespace"
    )
    assert problem.hint
    assert problem in prerequisites.format_problems(formats.select(["squashfs"]))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("echo Storing signatures", "it gives no image, but says 'Storing signatures'"),
        ("exit 0", "it gives no image, but says ''"),
        ("echo no space left >&2; exit 125", "'podman' failed with exit status 125: no space left"),
    ],
)
def test_an_engine_that_imports_nothing(tmp_path: Path, said: str, why: str) -> None:
    podman = program(tmp_path / "podman", said)
    engine = archives.Engine(name="podman", command=(str(podman),))
    with pytest.raises(ToolError) as caught:
        engine.load(tmp_path / "tar", "amd64")
    assert told(caught)[0] == f"importing the image to podman: {why}"


def test_an_engine_that_has_gone_meanwhile(tmp_path: Path, first_on_path: Callable[[str, str], Path]) -> None:
    for name in ("docker", "podman", "sudo"):
        first_on_path(name, "echo is the daemon running? >&2; exit 1")
    (tmp_path / "tar").touch()
    spec = BuildSpec(name="x", output_dir=tmp_path, elements=(), docker_target="x:1")
    with pytest.raises(ToolError) as caught:
        formats.load(spec, formats.Sources(disk=tmp_path / "tar", archive=tmp_path / "tar"))
    assert told(caught)[0] == "importing the image: no engine for containers answers any more"
    assert "start docker or podman again" in told(caught)[1]


def test_an_archive_goes_to_another_file_system(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(b"archive")
    code = """
from virt_dib import formats
from virt_dib.spec import BuildSpec
top = Path(sys.argv[1])
targets = {"x.tar": (top / "other/x.tar", formats.select(["tar"])[0])}
spec = BuildSpec(name="x", output_dir=top, elements=())
formats.write(spec, formats.Sources(disk=top / "tar", archive=top / "tar"), targets, top)
print((top / "other/x.tar").read_text())
"""
    (tmp_path / "other").mkdir()
    assert in_namespace(f"mount -t tmpfs none {tmp_path}/other", code, tmp_path) == "archive\n"


# ---- drives and caches ----


def test_a_drive_that_goes_before_it_is_held(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught, drive.held(drive.Drive(tmp_path / "none", "raw")):
        pass
    assert told(caught) == (
        f"cannot use '{tmp_path}/none' as helper drive: No such file or directory",
        "is it mounted, or in use?",
    )


def test_a_drive_behind_links_that_lead_to_each_other(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(UsageError, match="Too many levels of symbolic links") as caught:
        drive.inspect(tmp_path / "one", None)
    assert told(caught)[1] == "give another --drive"


CACHE = """
from virt_dib import drive, image_cache
top = Path(sys.argv[1])
tell(lambda: image_cache.check(top / "closed", None))
tell(lambda: drive.inspect(top / "locked", None))
"""


def test_what_another_user_may_not_use(anyones_dir: Path) -> None:
    (anyones_dir / "closed").mkdir(mode=0o700 if os.geteuid() == 0 else 0)
    (anyones_dir / "locked").write_bytes(bytes(4096))
    (anyones_dir / "locked").chmod(0o600 if os.geteuid() == 0 else 0)
    first, second = run_python(TELL + CACHE, anyones_dir, before=as_ordinary_user()).splitlines()
    place = f"{anyones_dir}/closed"
    assert first.startswith(
        f"UsageError cannot keep the image cache in '{place}': no right to read and write '{place}'"
    )
    assert second.startswith(
        f"UsageError cannot use '{anyones_dir}/locked' as helper drive: Permission denied | it must be"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has files of another user")
def test_files_of_another_user_in_the_cache_are_copied(anyones_dir: Path) -> None:
    # The kernel lets nobody make links to files of others that he may not write (protected_hardlinks).
    code = """
from virt_dib.image_cache import ImageCache
import tarfile, io
top = Path(sys.argv[1])
cache = ImageCache(top / "cache", top)
cache.copy_to(top / "copy")
with tarfile.open(cache.archive, "w") as archive:
    for name in (".", "./new", "./new/entry"):
        member = tarfile.TarInfo(name)
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
    for name, data in (("./unchanged", b"entry/theirs\\0"), ("./new/entry/new", b"new")):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
print(cache.receive())
"""
    entry = anyones_dir / "cache/entry"
    entry.mkdir(parents=True)
    for directory in (anyones_dir / "cache", entry):
        directory.chmod(0o777)
    (entry / "theirs").write_text("root's")
    (entry / "theirs").chmod(0o644)
    said = run_python(TELL + code.replace("\\\\0", "\\0"), anyones_dir, before=as_ordinary_user())
    assert said == "Received(entries=('entry',), refused=(), left_out=())\n"
    assert {path.name: path.read_text() for path in entry.iterdir()} == {"theirs": "root's", "new": "new"}
    assert (entry / "theirs").stat().st_uid == 65534


@pytest.mark.parametrize("option", ["--image-cache"])
def test_a_cache_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    monkeypatch.setenv("DIB_QUIET", "1")
    (tmp_path / "file").touch()
    assert dib_cli.disk_image_create(["-n", option, str(tmp_path / "file/cache"), "debian-minimal"]) == 1
    err = capsys.readouterr().err
    assert f"cannot keep the image cache in '{tmp_path}/file/cache': '{tmp_path}/file' is not a directory\n" in err
    assert "name a directory that you can write with --image-cache" in err


@pytest.mark.parametrize(
    ("cache", "why"),
    [
        (".", "your home is in it, and the scripts can write there"),
        ("home", "the elements get a copy of all that is in it"),
    ],
)
def test_a_cache_around_the_home(tmp_path: Path, cache: str, why: str) -> None:
    (tmp_path / "home").mkdir()
    with pytest.raises(UsageError) as caught:
        extra_data._make_cache(tmp_path / cache, str(tmp_path / "home"))
    assert told(caught)[0].endswith(f": {why}")


def test_a_cache_of_extra_data_that_cannot_be_made(tmp_path: Path) -> None:
    cache = tmp_path / ("x" * 300)
    with pytest.raises(UsageError) as caught:
        extra_data._make_cache(cache, str(tmp_path / "home"))
    assert told(caught) == (
        f"making the image cache '{cache}': File name too long",
        "give a directory that you can write",
    )


# ---- users ----

NAMELESS = """
from virt_dib import configuration, extra_data, namespaces
print(extra_data._user())
try:
    namespaces.find_ids()
except VirtDibError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_user_without_a_name() -> None:
    first, second = run_python(
        TELL + NAMELESS, before=("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups")
    ).splitlines()
    assert "pw_name='user'" in first
    assert "pw_uid=54321" in first
    assert "user '54321' has no subordinate uids in '/etc/subuid', of 65536 needed" in second


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to a group of that number")
def test_a_configuration_of_a_group_without_a_name(tmp_path: Path) -> None:
    file = tmp_path / "virt-dib" / "config.toml"
    file.parent.mkdir()
    file.touch()
    os.chown(file, -1, 54321)
    file.chmod(0o664)
    (problem,) = configuration.settings({"XDG_CONFIG_HOME": str(tmp_path), "XDG_CONFIG_DIRS": "/nowhere"}).problems
    assert problem.message == f"cannot trust the configuration file '{file}': others can write to it"


NEWUIDMAP = """
from virt_dib import namespaces
for problem in namespaces.id_problems():
    print(problem.message, "|", problem.hint)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (hide("/usr/bin/newuidmap"), "'newuidmap' not found, needed to use subordinate ids | install it: "),
        (
            "cp /usr/bin/newuidmap /run/copy; chmod 755 /run/copy; mount --bind /run/copy /usr/bin/newuidmap",
            "'/usr/bin/newuidmap' has lost its rights: it is neither setuid root nor has file capabilities | install",
        ),
    ],
    ids=["absent", "without rights"],
)
def test_programs_for_subordinate_ids(setup: str, message: str) -> None:
    if not os.path.exists("/usr/bin/newuidmap"):
        pytest.skip("uidmap is not installed")
    become = 'set -- setpriv --reuid=65534 --regid=65534 --clear-groups "$@"'
    # In a directory of this namespace alone.
    said = in_namespace(f"mount -t ramfs none /run; {setup}; {become}", NEWUIDMAP)
    assert message in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_rights_that_cannot_be_gained() -> None:
    before = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs")
    assert "this process may not gain rights (no_new_privs)" in run_python(TELL + NEWUIDMAP, before=before)


# ---- the end of a shell, and terminals ----


def test_a_shell_that_ends_without_a_word() -> None:
    with pytest.raises(ApplianceError, match=r"^running a shell: it ended without a word$"):
        jobs.shell_ended(None, JobResult(exit_status=0, tail=""))
    with pytest.raises(
        ApplianceError, match=r"^running a shell: failed with exit status 1: there is no virtio port x$"
    ):
        jobs.shell_ended(None, JobResult(exit_status=1, tail="there is no virtio port x\n"))


@pytest.fixture
def terminal_pair() -> Iterator[tuple[int, int]]:
    leader, follower = pty.openpty()
    yield leader, follower
    for descriptor in (leader, follower):
        try:
            os.close(descriptor)
        except OSError:
            continue


def test_a_terminal_that_has_gone(terminal_pair: tuple[int, int]) -> None:
    leader, follower = terminal_pair
    os.close(leader)
    terminal = terminal_link.Terminal(follower, follower)
    for use in (terminal.read, lambda: terminal.write(b"x")):
        with pytest.raises(Interrupted):
            use()


def test_a_terminal_with_nothing_typed_or_no_room(terminal_pair: tuple[int, int]) -> None:
    leader, follower = terminal_pair
    os.set_blocking(follower, False)
    terminal = terminal_link.Terminal(follower, follower)
    assert terminal.read() == b""
    data = b"x" * (1 << 20)
    received = bytearray()

    def receive() -> None:
        while len(received) < len(data):
            received.extend(os.read(leader, 1 << 16))

    reader = threading.Thread(target=receive)
    reader.start()
    terminal.write(data)
    reader.join()
    assert bytes(received) == data


def test_what_is_no_terminal_has_the_usual_size() -> None:
    reader, writer = os.pipe()
    terminal = terminal_link.Terminal(reader, writer)
    assert terminal.size == (24, 80)
    assert terminal.missing() == "standard input and standard output are none"
    os.close(reader)
    os.close(writer)
    assert terminal.missing() == "standard input and standard output are none"


# ---- results and links that cannot be written ----

WRITE = """
from virt_dib import image_file_cli
sys.exit(image_file_cli.main(["--result", f"{sys.argv[1]}/closed/result.json", f"{sys.argv[1]}/none.yaml"]) - 2)
"""


def test_a_result_in_a_directory_of_another_user(anyones_dir: Path) -> None:
    (anyones_dir / "closed").mkdir(mode=0o555)
    result = tools.run(
        [*as_ordinary_user(), sys.executable, "-c", TELL + WRITE, anyones_dir],
        doing="running",
        environment={"PYTHONPATH": str(Path(tools.__file__).parents[1]), "PATH": "/usr/bin:/bin"},
    )
    place = f"{anyones_dir}/closed"
    assert f"cannot write the result to '{place}/result.json': you may not write in '{place}'\n" in result.stderr
    assert "name a file in another directory" in result.stderr


def test_links_that_cannot_be_removed(tmp_path: Path) -> None:
    commands = Path(sys.executable).parent
    tools.run([commands / "virt-dib-links", tmp_path], doing="making links")
    code = """
import runpy
sys.argv = [os.environ["COMMAND"], "--remove", sys.argv[1]]
from virt_dib import dib_links
sys.exit(dib_links.main() - 1)
"""
    read_only = f"mount --bind {tmp_path} {tmp_path}; mount -o remount,ro,bind {tmp_path}"
    said = in_namespace(f"export COMMAND={commands}/virt-dib-links; {read_only}; exec 2>&1", code, tmp_path)
    assert f"error: removing '{tmp_path}/disk-image-create': Read-only file system\n" in said
    assert "hint: give a directory that you can write\n" in said


def test_links_of_a_command_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "elsewhere"), str(tmp_path / "links")])
    assert dib_links.main([str(tmp_path / "links")]) == 1
    err = capsys.readouterr().err
    assert f"looking for virt-dib's commands: there is no {tmp_path}/virt-disk-image-create, " in err
    assert "run virt-dib-links as it was installed" in err


def test_a_link_that_nobody_reads_holds_what_is_to_be_written() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = terminal_link._Link(ours)
        link.put(b"d", b"x" * 4_000_000)
        whole = link.waiting
        for _ in range(1000):
            link.write()
        assert 0 < link.waiting < whole
        received = 0
        while received < whole:
            received += len(theirs.recv(1 << 20))
            link.write()
        assert (received, link.waiting) == (whole, 0)
        theirs.close()
        link.put(b"d", b"more")
        link.write()
        assert link.waiting == 0


SQUASHFS = """
from virt_dib import archives, formats, tools
from virt_dib.spec import BuildSpec
top = Path(sys.argv[1])
targets = {"x.squashfs": (top / "small/x.squashfs", formats.select(["squashfs"])[0])}
spec = BuildSpec(name="x", output_dir=top, elements=())
tell(lambda: formats.write(spec, formats.Sources(disk=top / "tar", archive=top / "tar"), targets, top))
command = archives.squashfs(top / "tar", top / "small/y")
os.system(f"mount -o remount,bind,ro {top}/small")
tell(lambda: tools.run_together({"writing y": command}))
"""


def test_a_squashfs_that_cannot_be_written(tmp_path: Path) -> None:
    if tools.find("sqfstar") is None:
        pytest.skip("squashfs-tools is not installed")
    for name in ("tree", "small"):
        (tmp_path / name).mkdir()
    (tmp_path / "tree/file").write_bytes(os.urandom(6 << 20))
    tools.run(["tar", "-C", tmp_path / "tree", "-cf", tmp_path / "tar", "."], doing="packing")
    full, read_only = in_namespace(f"mount -t tmpfs -o size=1m none {tmp_path}/small", SQUASHFS, tmp_path).splitlines()
    assert full.startswith("ToolError writing 'x.squashfs': 'bwrap' failed with exit status 1: ")
    assert "No space left" in full
    assert "make room" in full
    assert "Read-only file system" in read_only
    # sqfstar says why it does not read on.
    assert "pipe" not in read_only.lower()


# ---- our programs for the guest ----


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (
            ["in-chroot.sh", "{top}/root", "{top}/hooks", "install.d", "T"],
            127,
            "no bash in the image: install.d cannot run",
        ),
        (["dib-run-parts.sh", "{top}/none"], 1, "dib-run-parts: no directory: {top}/none"),
        (["sudo.sh", "--user"], 1, "sudo: option '--user' needs a value"),
        (["sudo.sh", "-Hu"], 1, "sudo: option '-u' needs a value"),
        (["sudo.sh", "--login-class=x", "true"], 1, "sudo: unknown option '--login-class=x'"),
        (["sudo.sh", "-nX", "true"], 1, "sudo: unknown option '-X'"),
        (["sudo.sh", "-u", "nobody-at-all", "true"], 1, "sudo: unknown user: nobody-at-all"),
    ],
)
def test_what_our_programs_refuse(tmp_path: Path, words: list[str], status: int, said: str) -> None:
    for name in ("root", "hooks/install.d"):
        (tmp_path / name).mkdir(parents=True)
    script, *arguments = (word.format(top=tmp_path) for word in words)
    result = tools.run(["/bin/bash", layout.guest_script(script), *arguments], doing="trying", check=False)
    assert (result.exit_status, result.stderr) == (status, said.format(top=tmp_path) + "\n")


def test_an_appliance_that_was_made_while_packages_were_installed() -> None:
    result = tools.run(
        ["/bin/bash", layout.guest_script("setup.sh")], doing="trying", environment={"PATH": "/nowhere"}, check=False
    )
    assert result.exit_status == 1
    assert result.stderr.startswith("the appliance lacks bash cat chroot dmsetup ")
    assert "were packages being installed on the host" in result.stderr
