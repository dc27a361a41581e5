# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest

from virt_dib import kvm
from virt_dib.errors import UsageError
from virt_dib.kvm import Acceleration
from virt_dib.spec import Kvm

LIMIT_S = 2.0
SPEAKS = "echo 'SeaBIOS'; echo '[    0.000000] Linux version 6.1.0 (gcc)'; exec sleep 600"
ABORTS = """\
echo "qemu-system-x86_64: warning: host doesn't support requested feature" >&2
echo 'qemu-system-x86_64: error: failed to set MSR 0x10a to 0x69' >&2
echo 'qemu-system-x86_64: kvm.c:3183: kvm_buf_set_msrs: Assertion failed.' >&2
kill -ABRT $$"""


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


class Host:
    """A host of our own making: a device that opens, a kernel that reads, and programs in qemu's place."""

    def __init__(self, directory: Path) -> None:
        self.cache_dir = directory / "cache"
        self.device = directory / "kvm"
        self.device.touch()
        self.kernel = directory / "vmlinuz-1"
        self.kernel.write_bytes(b"kernel")
        self.qemu = directory / "qemu"
        self.starts = directory / "starts"

    def install_qemu(self, trial: str, *, version: str = "7.2.22") -> None:
        self.qemu.write_text(
            "#!/bin/bash\n"
            f"if [ \"$1\" = --version ]; then echo 'QEMU emulator version {version}'; exit 0; fi\n"
            f"echo started >>'{self.starts}'\n{trial}\n"
        )
        self.qemu.chmod(0o755)

    def choose(self, *, wanted: Kvm = Kvm.AUTO, again: bool = False) -> kvm.Verdict:
        return kvm.choose(
            wanted=wanted,
            kernel=self.kernel,
            cache_dir=self.cache_dir,
            qemu=self.qemu,
            device=self.device,
            limit_s=LIMIT_S,
            again=again,
        )

    @property
    def trials(self) -> int:
        return len(self.starts.read_text().splitlines()) if self.starts.exists() else 0


def emulated(reason: str) -> kvm.Verdict:
    return kvm.Verdict(acceleration=Acceleration.EMULATION, reason=reason)


def test_a_kernel_that_speaks_is_proof(host: Host) -> None:
    host.install_qemu(SPEAKS)
    assert host.choose() == kvm.Verdict(acceleration=Acceleration.KVM, reason="KVM works")


def test_the_kernels_words_may_come_in_pieces(host: Host) -> None:
    host.install_qemu("printf 'Linux ver'; sleep 0.2; echo 'sion 6.1'; exec sleep 600")
    assert host.choose().acceleration is Acceleration.KVM


@pytest.mark.parametrize(
    ("trial", "reason"),
    [
        pytest.param(
            ABORTS, "qemu could not start a virtual machine with KVM: failed to set MSR 0x10a to 0x69", id="aborts"
        ),
        pytest.param(
            "kill -KILL $$",
            "qemu could not start a virtual machine with KVM: it ended with signal SIGKILL",
            id="dies without a word",
        ),
        pytest.param(
            "exit 0",
            "qemu could not start a virtual machine with KVM: it ended with exit status 0",
            id="prints nothing and ends",
        ),
        pytest.param(
            "exec sleep 600",
            f"a kernel started with KVM did not come up in {LIMIT_S:.0f} s",
            id="hangs in silence",
        ),
        pytest.param(
            "echo SeaBIOS; echo Booting from ROM..; exec sleep 600",
            f"a kernel started with KVM did not come up in {LIMIT_S:.0f} s",
            id="hangs after the firmware",
        ),
        pytest.param(
            "while :; do echo SeaBIOS; done",
            f"a kernel started with KVM did not come up in {LIMIT_S:.0f} s",
            id="prints for ever",
        ),
        pytest.param(
            "trap '' TERM; while :; do sleep 1; done",
            f"a kernel started with KVM did not come up in {LIMIT_S:.0f} s",
            id="does not want to end",
        ),
        pytest.param(
            "printf 'qemu: error: \\033[31mred\\n' >&2; exit 1",
            "qemu could not start a virtual machine with KVM: red",
            id="control characters",
        ),
    ],
)
def test_anything_else_means_emulation(host: Host, trial: str, reason: str) -> None:
    host.install_qemu(trial)
    assert host.choose() == emulated(reason)


def test_a_hanging_qemu_does_not_outlive_the_trial(host: Host, tmp_path: Path) -> None:
    host.install_qemu(f"echo $$ >'{tmp_path}/pid'; exec sleep 600")
    host.choose()
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_no_device(host: Host) -> None:
    host.install_qemu(SPEAKS)
    host.device.unlink()
    assert host.choose() == emulated(f"{host.device} is absent")


def test_a_device_that_does_not_open(host: Host) -> None:
    host.install_qemu(SPEAKS)
    host.device.unlink()
    host.device.mkdir()
    assert host.choose() == emulated(f"{host.device} cannot be opened: is a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_a_device_without_permission(host: Host) -> None:
    host.install_qemu(SPEAKS)
    host.device.chmod(0)
    assert host.choose() == emulated(f"{host.device} cannot be opened: permission denied")


def test_a_kernel_that_the_user_names_is_not_there(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host.install_qemu(SPEAKS)
    monkeypatch.setenv("SUPERMIN_KERNEL", str(tmp_path / "none"))
    verdict = kvm.choose(kernel=None, cache_dir=host.cache_dir, qemu=host.qemu, device=host.device, limit_s=LIMIT_S)
    reason = f"no trial of KVM is possible, no kernel '{tmp_path}/none', which SUPERMIN_KERNEL names"
    assert verdict == emulated(reason)


def test_no_kernel_to_try(host: Host) -> None:
    host.install_qemu(SPEAKS)
    host.kernel.unlink()
    assert host.choose() == emulated(f"no trial of KVM is possible, '{host.kernel}' cannot be read")


def test_a_qemu_that_cannot_be_started(host: Host) -> None:
    verdict = host.choose()
    assert verdict.acceleration is Acceleration.EMULATION
    assert verdict.reason.startswith("qemu does not run: ")


@pytest.mark.parametrize(("wanted", "acceleration"), [(Kvm.ON, Acceleration.KVM), (Kvm.OFF, Acceleration.EMULATION)])
def test_either_way_can_be_forced(host: Host, wanted: Kvm, acceleration: Acceleration) -> None:
    host.install_qemu(ABORTS if wanted is Kvm.ON else SPEAKS)
    verdict = host.choose(wanted=wanted)
    assert verdict.acceleration is acceleration
    assert verdict.reason.startswith(f"KVM is forced {wanted.value} ")
    assert host.trials == 0


@pytest.mark.parametrize("trial", [SPEAKS, ABORTS])
def test_the_verdict_is_remembered(host: Host, trial: str) -> None:
    host.install_qemu(trial)
    assert host.choose() == host.choose()
    assert host.trials == 1


def test_a_new_trial_can_be_asked_for(host: Host) -> None:
    host.install_qemu(ABORTS)
    host.choose()
    host.install_qemu(SPEAKS)
    assert host.choose().acceleration is Acceleration.EMULATION
    assert host.choose(again=True).acceleration is Acceleration.KVM
    assert host.choose().acceleration is Acceleration.KVM


def test_another_qemu_gets_its_own_trial(host: Host) -> None:
    host.install_qemu(ABORTS)
    host.choose()
    host.install_qemu(SPEAKS, version="9.0.0")
    assert host.choose().acceleration is Acceleration.KVM
    host.install_qemu(SPEAKS)
    assert host.choose().acceleration is Acceleration.EMULATION


def test_a_device_that_went_away_counts_more_than_memory(host: Host) -> None:
    host.install_qemu(SPEAKS)
    host.choose()
    host.device.unlink()
    assert host.choose().acceleration is Acceleration.EMULATION


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut off"),
        pytest.param(b"\xff\x00", id="no text"),
        pytest.param(b"[1, 2]", id="a list"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"KEY": {"acceleration": "warp", "reason": "x"}}', id="unknown verdict"),
        pytest.param(b'{"KEY": {"acceleration": "KVM"}}', id="no reason"),
        pytest.param(b'{"KEY": {"acceleration": 1, "reason": []}}', id="wrong types"),
        pytest.param(b'{"KEY": null}', id="null"),
    ],
)
def test_a_corrupt_memory_is_written_anew(host: Host, content: bytes) -> None:
    host.install_qemu(SPEAKS)
    host.choose()
    (memory,) = host.cache_dir.iterdir()
    (key,) = json.loads(memory.read_text())
    memory.write_bytes(content.replace(b"KEY", key.encode()))
    assert host.choose().acceleration is Acceleration.KVM
    assert host.trials == 2
    assert json.loads(memory.read_text())[key] == {"acceleration": "KVM", "reason": "KVM works"}
    assert list(host.cache_dir.iterdir()) == [memory]


def test_what_a_killed_one_has_left_in_the_cache_goes(host: Host) -> None:
    host.install_qemu(SPEAKS)
    host.cache_dir.mkdir(exist_ok=True)
    for name in (".kvm-old", ".kvm-new", "other"):
        (host.cache_dir / name).touch()
    for name in (".kvm-old", "other"):
        os.utime(host.cache_dir / name, (0, 0))
    host.choose()
    assert {path.name for path in host.cache_dir.iterdir()} == {".kvm-new", "other", "kvm.json"}


def test_other_machines_keep_their_entries_but_not_for_ever(host: Host) -> None:
    host.install_qemu(SPEAKS)
    host.cache_dir.mkdir()
    others = {f"machine {number}": {"acceleration": "KVM", "reason": "KVM works"} for number in range(50)}
    (host.cache_dir / "kvm.json").write_text(json.dumps(others))
    host.choose()
    kept = json.loads((host.cache_dir / "kvm.json").read_text())
    assert len(kept) == 20
    assert "machine 49" in kept


def test_a_cache_that_cannot_be_written_is_no_obstacle(host: Host) -> None:
    host.install_qemu(SPEAKS)
    host.cache_dir.write_text("a file in its place")
    assert host.choose().acceleration is Acceleration.KVM


# ---- what is asked for ----


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, None),
        ({"LIBGUESTFS_BACKEND_SETTINGS": ""}, None),
        ({"LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}, "off"),
        ({"LIBGUESTFS_BACKEND_SETTINGS": "force_kvm"}, "on"),
        ({"LIBGUESTFS_BACKEND_SETTINGS": "gdb:force_tcg=1"}, "off"),
        ({"LIBGUESTFS_BACKEND_SETTINGS": "network_bridge=virbr0"}, None),
    ],
)
def test_what_the_settings_of_libguestfs_force(environ: dict[str, str], wanted: str | None) -> None:
    assert kvm.forced_by_libguestfs(environ) == wanted


def test_libguestfs_settings_that_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="force_kvm and force_tcg"):
        kvm.forced_by_libguestfs({"LIBGUESTFS_BACKEND_SETTINGS": "force_kvm:force_tcg"})


# ---- the host's kernels ----


def make_kernels(root: Path, *paths: str) -> None:
    for name in paths:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_kernels_in_supermins_order(tmp_path: Path) -> None:
    make_kernels(
        tmp_path,
        "boot/vmlinuz-6.9.0-amd64",
        "boot/vmlinuz-6.10.0-amd64",
        "boot/vmlinuz-6.11.0-xen-amd64",
        "boot/initrd.img-6.10.0-amd64",
        "lib/modules/5.14.0-1.el9.x86_64/vmlinuz",
        "lib/modules/5.14.0-1.el9.x86_64/modules.dep",
        "lib/modules/6.9.0-amd64/modules.dep",
    )
    found = kvm.host_kernels(tmp_path, {})
    assert [(kernel.release, kernel.has_modules) for kernel in found] == [
        ("5.14.0-1.el9.x86_64", True),
        ("6.10.0-amd64", False),
        ("6.9.0-amd64", True),
    ]


def test_a_kernel_chosen_for_supermin_is_the_only_one(tmp_path: Path) -> None:
    make_kernels(tmp_path, "boot/vmlinuz-1", "mine/vmlinuz-2")
    found = kvm.host_kernels(tmp_path, {"SUPERMIN_KERNEL": str(tmp_path / "mine/vmlinuz-2")})
    assert [kernel.path for kernel in found] == [tmp_path / "mine/vmlinuz-2"]
    assert kvm.host_kernels(tmp_path, {"SUPERMIN_KERNEL": str(tmp_path / "none")}) == []


# ---- the real thing ----


@pytest.mark.appliance
def test_a_trial_on_this_machine(tmp_path: Path) -> None:
    verdict = kvm.choose(kernel=None, cache_dir=tmp_path / "cache")
    # A reason that tells of the trial, or of the device, and not of a host that could not make one.
    assert verdict.reason.startswith(
        (
            "KVM works",
            "/dev/kvm ",
            "qemu could not start a virtual machine with KVM: ",
            "a kernel started with KVM did not come up",
        )
    )
    assert kvm.choose(kernel=None, cache_dir=tmp_path / "cache") == verdict


@pytest.mark.appliance
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names qemu's program for x86_64")
def test_the_trial_finds_a_kernel_that_comes_up(host: Host) -> None:
    # The same command with emulation in KVM's place: what is left of the trial does start a kernel.
    kernel = next(kernel.path for kernel in kvm.host_kernels() if kernel.is_readable)
    host.qemu.write_text('#!/bin/bash\nexec qemu-system-x86_64 "${@/#kvm/tcg}"\n')
    host.qemu.chmod(0o755)
    verdict = kvm.choose(kernel=kernel, cache_dir=host.cache_dir, qemu=host.qemu, device=host.device, limit_s=60)
    assert verdict.acceleration is Acceleration.KVM
