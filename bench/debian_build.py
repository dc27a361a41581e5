# SPDX-License-Identifier: Apache-2.0
"""Time Debian builds: the sandbox against the emulated appliance, and against DIB's own disk-image-create.

    bench/debian_build.py [--compare vm|dib] [--runs N] [--vm-runs N] [--vm-seconds S] [--warm-appliance] [--boot]

Two comparisons, both unless --compare names one:

vm   debian-minimal with a partition table, the tree stage in the sandbox, and all in the appliance. Neither uses
     KVM. The runs are of MBR, GPT and EFI in turn. A build in the appliance takes about half an hour: --vm-runs makes
     fewer of them, --vm-seconds takes a figure measured before instead. With --boot each image is started afterwards,
     which is not in the seconds of its run.
dib  debian-minimal without a partition table, in the sandbox, and with disk-image-create as root, which needs loop
     devices.

The two sides of a comparison build in turn, so that a machine that slows down slows down both, for the release and
from the mirrors that scripts/mirrors prints. All builds are cold: each has a home of its own, so that downloads,
disk-image-create's caches and virt-dib's appliance are made anew. With --warm-appliance virt-dib finds its appliance
made, as every build but the first on a host does.

Prints the seconds of every run, those of processors too, since other programs make the former longer but hardly the
latter; where the time of ours went; sizes; the medians and their ratio. The first run that fails ends it all.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import glob
import os
import resource
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from virt_dib import formats, tools

_PROGRAMS = Path(sys.executable).parent
_MIRRORS = Path(__file__).resolve().parent.parent / "scripts" / "mirrors"
_PATH = f"{_PROGRAMS}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DIB_PROGRAMS = ("sudo", "losetup", "unshare", "qemu-img", "debootstrap", "fstrim")
_FORMATS = "qcow2,raw"
_LAST_LINES = 25

_LOOP_CLR_FD, _LOOP_GET_STATUS64 = 0x4C01, 0x4C05
_LOOP_STATUS_BYTES, _LOOP_FILE_NAME = 232, 56
"""struct loop_info64: its size, and where the name of the file begins, of which the first 63 bytes are kept."""


@dataclass(kw_only=True)
class Side:
    """One side of a comparison, and what its runs have shown."""

    name: str
    command: Sequence[str | Path]
    variables: Mapping[str, str]
    runs: int
    layouts: Sequence[str | None] = (None,)
    """The elements that the runs have beside those of the command, in turn."""
    boot: bool = False
    """Whether what a run has built is started."""
    seconds: list[float] = field(default_factory=list)
    output: str = ""
    sizes: str = ""

    @property
    def median(self) -> float:
        """Of the seconds of all runs."""
        return statistics.median(self.seconds)

    def layout(self, number: int) -> list[str]:
        """The elements that run *number* has beside those of the command; run 0 is the warm-up."""
        element = self.layouts[max(number - 1, 0) % len(self.layouts)]
        return [] if element is None else [element]


# ---- what is compared ----


def mirrors() -> dict[str, str]:
    """The release and the archives, as variables of DIB's."""
    found = tools.run([_MIRRORS], doing="looking for mirrors", environment=os.environ).stdout
    return {name: value for name, _, value in (line.partition("=") for line in found.splitlines()) if name}


def virt_dib(name: str, options: Sequence[str], elements: Sequence[str], runs: int, appliance: Path | None) -> Side:
    """A side that builds with virt-dib, which gets variables for the elements as options."""
    settings = [word for pair in mirrors().items() for word in ("--envvar", "=".join(pair))]
    command: list[str | Path] = [_PROGRAMS / "virt-dib", *options, "--name", "d", "--formats", _FORMATS]
    variables = {} if appliance is None else {"XDG_CACHE_HOME": str(appliance)}
    return Side(name=name, command=[*command, *settings, *elements], variables=variables, runs=runs)


def disk_image_create(runs: int, scratch: Path) -> Side:
    """A side that builds with disk-image-create, which gets them in the environment.

    It runs in namespaces of its own: when it is killed, all that it has started and mounted goes with it. It has
    tmpfs where there is memory for it, and its other defaults.
    """
    shell = '"$@" || { status=$?; sleep 2; exit $status; }'  # else its last words would be killed
    command: list[str | Path] = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += ["sh", "-c", shell, "sh", _PROGRAMS / "disk-image-create", "-t", _FORMATS, "-o", "d", "debian-minimal"]
    # Its caches are in its home.
    variables = {**mirrors(), "TMP_DIR": str(scratch)}
    return Side(name="disk-image-create", command=command, variables=variables, runs=runs)


def obstacle() -> str | None:
    """Why disk-image-create cannot run here, if it cannot."""
    if os.geteuid() != 0:
        return "it needs root"
    missing = [name for name in _DIB_PROGRAMS if tools.find(name) is None]
    if not (_PROGRAMS / "disk-image-create").exists():
        missing.append("disk-image-create")
    if missing:
        return f"not installed: {', '.join(missing)}"
    if tools.run(["losetup", "--find"], doing="looking for a loop device", check=False).exit_status != 0:
        return "no loop device is available"
    return None


# ---- running ----


def run(side: Side, number: int, scratch: Path) -> None:
    """Build once in a directory of its own, which is removed, and print how long that took; run 0 is the warm-up."""
    kind = f"run {number}" if number else "warm-up"
    with tempfile.TemporaryDirectory(prefix="run-", dir=scratch) as name:
        environment = {"HOME": name, "PATH": _PATH, **side.variables}
        # What others have written is not for this run to wait for.
        os.sync()
        busy = os.getloadavg()[0]
        processors, begun = processor_seconds(), time.monotonic()
        command = [*side.command, *side.layout(number)]
        result = tools.run(command, doing="building", environment=environment, cwd=Path(name), check=False)
        took, processors = time.monotonic() - begun, processor_seconds() - processors
        if result.exit_status != 0:
            fail(f"{kind}  {side.name}", result)
        side.sizes = sizes(Path(name))
        side.seconds.append(took)
        side.output = result.stdout
        print(
            f"{kind:7}  {side.name:17} {took:7.1f} s  (processors {processors:.1f} s; load before it {busy:.1f})",
            *side.layout(number),
            flush=True,
        )
        if side.boot and number:
            command = [_PROGRAMS / "virt-dib-boot-test", "d.qcow2"]
            result = tools.run(command, doing="booting", environment=environment, cwd=Path(name), check=False)
            if result.exit_status != 0:
                fail(f"{kind}  {side.name}, its boot test", result)
            print(f"{kind:7}  {result.stdout.splitlines()[-1]}", flush=True)


def fail(what: str, result: tools.Result) -> NoReturn:
    """End the benchmark with the last lines of what has failed."""
    lines = [*result.stdout.splitlines(), *result.stderr.splitlines()][-_LAST_LINES:]
    print("\n".join([f"{what} failed with exit status {result.exit_status}:", *lines]))
    sys.exit(1)


def processor_seconds() -> float:
    """Of all processes that have been started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def sizes(directory: Path) -> str:
    """What the images in *directory* take, how large the disk is that they hold, and how much is installed there."""
    found = []
    outputs = formats.select(_FORMATS.split(","))
    for output in (output for output in outputs if isinstance(output, formats.DiskFormat)):
        image = directory / f"d.{output.suffix}"
        allocated, virtual = image.stat().st_blocks * 512, formats.virtual_size_bytes(image, output)
        found.append(f"{output.name} {allocated / 1024**2:.0f} MiB of {virtual / 1024**2:.0f} MiB")
    packages = sum(path.read_text().count('"package":') for path in directory.glob("d.d/**/dib-manifest-dpkg-*"))
    return ", ".join([*found, f"{packages} packages"])


@contextlib.contextmanager
def no_loops_left(directory: Path) -> Iterator[None]:
    """Detach loop devices of files below *directory*, which killed builds leave, when the block ends."""
    try:
        yield
    finally:
        for device in glob.glob("/dev/loop[0-9]*"):
            with contextlib.suppress(OSError), open(device, "rb") as stream:
                status = fcntl.ioctl(stream, _LOOP_GET_STATUS64, bytes(_LOOP_STATUS_BYTES))
                (file_name,) = struct.unpack_from("64s", status, _LOOP_FILE_NAME)
                if file_name.startswith(os.fsencode(f"{directory}/")):
                    fcntl.ioctl(stream, _LOOP_CLR_FD)


# ---- the comparisons ----


def compare(title: str, sides: Sequence[Side], scratch: Path, *, warm_up: bool) -> None:
    """Run the *sides*, the sandbox first, in turn, and print all but the ratio."""
    print(f"\n{title}", flush=True)
    if warm_up:
        run(sides[0], 0, scratch)
        sides[0].seconds.clear()
    for number in range(max(side.runs for side in sides)):
        for side in sides:
            if number < side.runs:
                run(side, number + 1, scratch)
    output = sides[0].output
    print("\nwhere the time of the sandbox goes (last run):\n" + output[output.rfind("phase and script") :])
    for side in sides:
        if side.sizes:
            print(f"{side.name:17} images  {side.sizes}")
    for side in sides:
        print(f"{side.name:17} median {side.median:7.1f} s")


def compare_vm(given: argparse.Namespace, scratch: Path, appliance: Path | None) -> None:
    """Sandbox and appliance, with a partition table."""
    elements = ["debian-minimal", "vm"]
    options = ["--kvm", "off", "--isolation"]
    layouts = (None, "block-device-gpt", "block-device-efi")
    sandbox = virt_dib("sandbox", [*options, "sandbox"], elements, given.runs, appliance)
    vm = virt_dib("vm", [*options, "vm"], elements, given.vm_runs or given.runs, appliance)
    for side in (sandbox, vm):
        side.layouts, side.boot = layouts, given.boot
    if given.vm_seconds is not None:
        vm.runs, vm.seconds = 0, [given.vm_seconds]
    compare(
        "sandbox and appliance, both without KVM: debian-minimal vm",
        [sandbox, vm],
        scratch,
        warm_up=given.warm_appliance,
    )
    print(f"ratio of the medians, vm / sandbox: {vm.median / sandbox.median:.2f}")


def compare_dib(given: argparse.Namespace, scratch: Path, appliance: Path | None) -> None:
    """Sandbox and disk-image-create, without a partition table."""
    title = "sandbox and disk-image-create: debian-minimal"
    if reason := obstacle():
        print(f"\n{title}: skipped, disk-image-create cannot run here: {reason}")
        return
    sandbox = virt_dib("sandbox", ["--isolation", "sandbox"], ["debian-minimal"], given.runs, appliance)
    dib = disk_image_create(given.runs, scratch)
    with no_loops_left(scratch):
        compare(title, [sandbox, dib], scratch, warm_up=given.warm_appliance)
    print(f"ratio of the medians, sandbox / disk-image-create: {sandbox.median / dib.median:.2f}")


def positive(text: str) -> int:
    """A number of runs."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of runs")
    return int(text)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="time Debian builds: sandbox, emulated appliance, disk-image-create")
    parser.add_argument("--compare", choices=["vm", "dib"], help="make only this comparison")
    parser.add_argument("--runs", type=positive, default=3, help="how often each side builds (default: 3)")
    parser.add_argument("--vm-runs", type=positive, help="how often the appliance does (default: that of --runs)")
    parser.add_argument("--vm-seconds", type=float, help="do not build in the appliance, which has taken so long")
    parser.add_argument("--boot", action="store_true", help="start each image of the comparison with the appliance")
    parser.add_argument("--warm-appliance", action="store_true", help="have virt-dib's appliance made before, untimed")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    given = arguments()
    with tempfile.TemporaryDirectory(prefix="virt-dib-bench-", dir="/var/tmp") as name:
        scratch = Path(name)
        appliance = scratch / "appliance" if given.warm_appliance else None
        if given.compare in {None, "vm"}:
            compare_vm(given, scratch, appliance)
        if given.compare in {None, "dib"}:
            compare_dib(given, scratch, appliance)


if __name__ == "__main__":
    main()
