# SPDX-License-Identifier: Apache-2.0
"""Build a tiny image again and again, with faults, and look whether anything is lost or left: ``make soak COUNT=50``.

    tests/soak.py [--count N] [--seed N]

Each build takes the vm or the sandbox in turn, and a fault that a seeded generator chooses. After each one, the image
must be the new one, or as the last good build has made it, and nothing of the build may be left. A build that was
killed may leave files, until the next one starts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from helpers import ISOLATIONS, files_in_image, heed_signals, make_element, make_tiny_os, processes_of
from virt_dib import tools
from virt_dib.spec import Phase

BUILD_TIMEOUT_S = 1800
WAITING = "waiting for the fault"
# Each of them is a script of its own in the element, and does nothing unless the fault is its.
HANGS = f"""#!/bin/bash
[[ $SOAK_FAULT == hang-$(basename "$(dirname "$0")") ]] || exit 0
echo {WAITING}
sleep 3600
"""
FAILS = """#!/bin/bash
case $SOAK_FAULT in
    fail) exit 3 ;;
    segfault) kill -SEGV $$ ;;
    noise) head -c 50000000 /dev/urandom ;;
    line) head -c 50000000 /dev/zero | tr '\\0' x ;;
    daemon) setsid sleep 3600 & ;;
    closed) exec >&- 2>&- ;;
esac
"""
MARK = """#!/bin/bash
echo "$SOAK_BUILD" >/soak
"""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong in a build."""

    name: str
    script: str = ""
    """What the element is told to do."""
    status: int | None = 0
    """How virt-dib is to end; None: by the signal that kills it."""
    harm: Callable[[tools.Process], None] | None = None
    """What is done to the build while its script waits."""
    memory: str | None = None
    """The size of the file system that its temporary files are in."""


def send(number: signal.Signals) -> Callable[[tools.Process], None]:
    """Something that sends a signal to virt-dib."""
    return lambda process: process.send_signal(number)


def kill_helper(word: str) -> Callable[[tools.Process], None]:
    """Something that kills a process virt-dib has started, whose command has *word* in it."""

    def kill(process: tools.Process) -> None:
        children = Path(f"/proc/{process.pid}/task").glob("*/children")
        for pid in " ".join(path.read_text() for path in children).split():
            if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)

    return kill


def faults(isolation: str, draw: random.Random) -> list[Fault]:
    """Those that a build may meet; half of the builds meet none."""
    hang = f"hang-{draw.choice([phase.directory for phase in Phase])}"
    first = Phase.ROOT.directory
    found = [
        Fault(name="a script fails", script="fail", status=1),
        Fault(name="a script crashes", script="segfault", status=1),
        Fault(name="50 MB of noise", script="noise"),
        Fault(name="a line of 50 MB", script="line"),
        Fault(name="a daemon stays", script="daemon"),
        Fault(name="closed output", script="closed"),
        Fault(name=f"SIGTERM in {hang[5:]}", script=hang, status=130, harm=send(signal.SIGTERM)),
        Fault(name=f"SIGINT in {hang[5:]}", script=hang, status=130, harm=send(signal.SIGINT)),
        Fault(name=f"SIGHUP in {hang[5:]}", script=hang, status=130, harm=send(signal.SIGHUP)),
        Fault(name=f"SIGKILL in {hang[5:]}", script=hang, status=None, harm=send(signal.SIGKILL)),
        Fault(name="no space", status=1, memory=draw.choice(["1m", "12m", "60m"])),
    ]
    if isolation == "vm":
        found.append(Fault(name="qemu is killed", script=hang, status=1, harm=kill_helper("qemu-system")))
    else:
        harm = kill_helper("sandbox-init.py")
        found.append(Fault(name="the sandbox is killed", script=f"hang-{first}", status=1, harm=harm))
    return [Fault(name="none")] * len(found) + found


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the builds happen."""

    elements: Path
    temporary: Path
    out: Path

    @classmethod
    def make(cls, directory: Path) -> Place:
        """In the empty *directory*."""
        place = cls(elements=directory / "elements", temporary=directory / "temporary", out=directory / "out")
        for path in (place.elements, place.temporary, place.out):
            path.mkdir()
        make_tiny_os(place.elements)
        files = {f"{phase.directory}/70-hang": HANGS for phase in Phase}
        make_element(place.elements, "soak", {**files, "install.d/50-fault": FAILS, "post-install.d/50-mark": MARK})
        return place

    def command(self, number: int, isolation: str, fault: Fault) -> list[str]:
        """The build *number*."""
        command = [
            sys.executable, "-m", "virt_dib", "--name", "soak", "--formats", "raw,qcow2", "--size", "200M",
            "--isolation", isolation, "--skip-base", "-p", str(self.elements), "--envvar", f"SOAK_FAULT={fault.script}",
            "--envvar", f"SOAK_BUILD={number}", "tiny-os", "soak",
        ]  # fmt: skip
        if fault.memory is None:
            return command
        mount = f'mount -t tmpfs -o size={fault.memory} none {self.temporary}; exec "$@"'
        as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        return ["unshare", *as_root, "--mount", "sh", "-c", mount, "sh", *command]


def build(place: Place, number: int, isolation: str, fault: Fault) -> tuple[int, bytes]:
    """Run one build; return how it ended, and what it printed."""
    environment = {**os.environ, "TMPDIR": str(place.temporary), "LC_ALL": "C.UTF-8"}
    shown = place.out.parent / "shown"
    with shown.open("wb") as stream, tools.started(
        place.command(number, isolation, fault),
        environment=environment, cwd=place.out, stdout=stream.fileno(), stderr=tools.TOGETHER,
    ) as process:  # fmt: skip
        if fault.harm is not None:
            until_s = time.monotonic() + BUILD_TIMEOUT_S
            while process.poll() is None and time.monotonic() < until_s:
                if WAITING.encode() in shown.read_bytes():
                    fault.harm(process)
                    break
                time.sleep(0.2)
        status = process.wait(timeout=BUILD_TIMEOUT_S)
    return status, shown.read_bytes()


def wrongs(place: Place, status: int, shown: bytes, fault: Fault, image_of: int | None) -> list[str]:
    """What is not as it should be after a build."""
    found = []
    wanted = -signal.SIGKILL if fault.status is None else fault.status
    if status != wanted:
        found.append(f"ended with {status} instead of {wanted}")
    if b"Traceback" in shown:
        found.append("a traceback")
    left = processes_of(place.temporary)
    for _ in range(100):
        if left:
            time.sleep(0.1)
            left = processes_of(place.temporary)
    found += [f"process {pid} is left" for pid in left if pid != str(os.getpid())]
    if fault.status is not None:
        found += [f"'{path.name}' is left in TMPDIR" for path in place.temporary.iterdir()]
        found += [f"'{path.name}' is left" for path in place.out.iterdir() if path.name.startswith(".")]
    if image_of is not None:
        text = files_in_image(place.out / "soak.raw").text("/soak").strip()
        if text != str(image_of):
            found.append(f"the image is that of build {text or 'nobody'} instead of {image_of}")
        with contextlib.suppress(FileNotFoundError):
            tools.run(["qemu-img", "compare", "-q", "soak.raw", "soak.qcow2"], doing="comparing", cwd=place.out)
    return found


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    heed_signals()
    draw = random.Random(arguments.seed)  # noqa: S311 - to be the same again
    image_of: int | None = None
    coming: dict[str, list[Fault]] = {isolation: [] for isolation in ISOLATIONS}
    outcomes: Counter[tuple[str, bool]] = Counter()
    with tempfile.TemporaryDirectory(prefix="virt-dib-soak-", dir="/var/tmp") as directory:
        place = Place.make(Path(directory))
        for number in range(1, arguments.count + 1):
            isolation = ISOLATIONS[number % 2]
            if not coming[isolation]:
                # Each of them comes before one comes again.
                coming[isolation] = faults(isolation, draw)
                draw.shuffle(coming[isolation])
            fault = coming[isolation].pop()
            begun_s = time.monotonic()
            status, shown = build(place, number, isolation, fault)
            seconds = time.monotonic() - begun_s
            image_of = number if status == 0 else image_of
            wrong = wrongs(place, status, shown, fault, image_of)
            outcomes[fault.name.partition(" in ")[0], not wrong] += 1
            print(f"{number:4}  {isolation:8} {fault.name:26} {seconds:7.1f} s  {'; '.join(wrong) or 'ok'}", flush=True)
            if wrong:
                print(shown[-2000:].decode(errors="replace"))
    failed = sum(count for (_, good), count in outcomes.items() if not good)
    for name, good in sorted(outcomes):
        print(f"{name:26} {outcomes[name, good]:4} {'ok' if good else 'NOT ok'}")
    print(f"{arguments.count} builds, {failed} of them not as they should be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
