# SPDX-License-Identifier: Apache-2.0
"""Build a tiny image again and again, with faults, and look whether anything is lost or left: ``make soak COUNT=50``.

    tests/soak.py [--count N] [--seed N] [--fault WORDS]...

Each build takes the vm or the sandbox in turn, and a fault that a seeded generator chooses; with 50 builds each fault
comes in both. After each one, the images must be the new ones, or as the last good build has made them, and nothing of
the build may be left. What a killed build leaves must go at the next start, which follows at once.
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
from dataclasses import dataclass, field
from pathlib import Path

from helpers import ISOLATIONS, files_in_image, heed_signals, make_element, make_tiny_os, processes_of
from virt_dib import tools
from virt_dib.spec import TREE_PHASES, Phase

BUILD_TIMEOUT_S = 1800
ROUND = 25
"""So many builds in one isolation meet all faults once; the others of them meet none."""
WAITING = "waiting for the fault"
PAUSE_S = 20
"""So long a build waits for others beside it to be refused."""
CACHED_BYTES = 3_000_000
# Each of them is a script of its own in the element, and does nothing unless the fault is its.
HANGS = f"""#!/bin/bash
[[ $SOAK_FAULT == hang-$(basename "$(dirname "$0")") ]] || exit 0
echo {WAITING}
sleep 3600
"""
OUTSIDE = f"""#!/bin/bash
case $SOAK_FAULT in
    cache*) head -c {CACHED_BYTES} /dev/urandom >"$DIB_IMAGE_CACHE/$SOAK_NAME" && date >>"$DIB_IMAGE_CACHE/both" ;;
    drive) cat /dev/zero >~/big || {{ rm ~/big; exit 1; }} ;;
    memory) tail /dev/zero ;;
esac || exit
# Others begin when this one has what is cached now.
[[ $SOAK_FAULT == *pause ]] || exit 0
echo {WAITING}
sleep {PAUSE_S}
"""
INSIDE = """#!/bin/bash
case $SOAK_FAULT in
    fail) exit 3 ;;
    segfault) kill -SEGV $$ ;;
    noise)
        head -c 50000000 /dev/urandom
        head -c 50000000 /dev/zero | tr '\\0' x
        exec >&- 2>&-
        ;;
    daemon) setsid sleep 3600 & ;;
    tree) head -c 250000000 /dev/zero | tr '\\0' x >/big ;;
esac
"""
FILLS = """#!/bin/bash
[[ $SOAK_FAULT != image ]] || cat /dev/zero >/big
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
    says: str = ""
    """What it is to print."""
    harm: Callable[[tools.Process], None] | None = None
    """What is done to the build while its script waits."""
    beside: tuple[Fault, ...] = ()
    """Builds that are made while its script waits."""
    small: tuple[str, str] | None = None
    """A directory of the place that is a file system of its own, and its size."""
    options: tuple[str, ...] = ()
    elements: tuple[str, ...] = ()
    image: str = "soak"
    """What is given as the name."""


NONE = Fault(name="none")
NOT_STARTED = Fault(name="no interpreters", status=1, says="cannot run: its lines end in CR LF", elements=("crlf",))
CACHE = ("--image-cache", "../cache")
DRIVE = ("--drive", "../drive")


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


def endings(isolation: str, draw: random.Random) -> list[Fault]:
    """Scripts that fail or hang, and what ends builds from outside."""
    found = [
        Fault(name="a script fails", script="fail", status=1, says="failed with exit status 3"),
        Fault(name="a script crashes", script="segfault", status=1, says="SIGSEGV"),
        Fault(name="100 MB of noise", script="noise"),
        Fault(name="a daemon stays", script="daemon"),
    ]
    *phases, killed, late = draw.sample([phase.directory for phase in Phase], 6)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
    for number, phase in zip(numbers, phases, strict=True):
        status = None if number == signal.SIGKILL else 130
        found.append(Fault(name=f"{number.name} in {phase}", script=f"hang-{phase}", status=status, harm=send(number)))
    if isolation == "vm":
        name, word = f"no qemu in {killed}", "qemu-system"
    else:
        # It has ended when the others begin.
        killed = draw.choice(TREE_PHASES).directory
        name, word = f"no sandbox in {killed}", "sandbox-init.py"
    found.append(Fault(name=name, script=f"hang-{killed}", status=1, harm=kill_helper(word)))
    says, options = "has taken longer than 15 s", ("--script-timeout", "15s")
    found.append(Fault(name=f"timeout in {late}", script=f"hang-{late}", status=1, says=says, options=options))
    return found


def shortages(isolation: str, draw: random.Random) -> list[Fault]:
    """Whatever can be full."""
    found = [
        Fault(
            name="TMPDIR is full", status=1, says="space", small=("temporary", draw.choice(["1m", "12m", "60m"]))
        ),
        Fault(
            name="the output directory is full", status=1, says="No space left on device", small=("out/full", "1m"),
            image="full/soak",
        ),
        Fault(
            name="the cache is full", script="cache", says="what the elements cached is not kept",
            small=("cache", "1m"), options=CACHE,
        ),
        Fault(name="the tree is too large", script="tree", status=1, says="no space left in the image"),
        Fault(name="the image is full", script="image", status=1, says="the image is full"),
    ]  # fmt: skip
    if isolation == "vm":
        found += [
            Fault(name="the drive is full", script="drive", status=1, says="No space left on device", options=DRIVE),
            Fault(name="no memory", script="memory", status=1, says="SIGKILL", options=("--memsize", "700")),
        ]
    return found


def neighbours(isolation: str) -> list[Fault]:
    """Builds at the same time."""
    name = Fault(name="a name in use", status=1, says="another build is writing to it")
    drive = Fault(name="a drive in use", status=2, says=" uses it", options=DRIVE, image="other")
    cacher = Fault(name="another cacher", script="cache", says="cached: ", options=CACHE, image="other")
    if isolation == "vm":
        refused = Fault(name="others are refused", script="pause", beside=(name, drive), options=DRIVE)
    else:
        refused = Fault(name="another is refused", script="pause", beside=(name,))
    return [
        refused,
        Fault(name="two builds, one cache", script="cache-pause", says="cached: ", beside=(cacher,), options=CACHE),
    ]


def faults(isolation: str, draw: random.Random) -> list[Fault]:
    """Those that a build may meet."""
    return [
        *endings(isolation, draw),
        *shortages(isolation, draw),
        *neighbours(isolation),
        NOT_STARTED,
        Fault(name="an element with a FIFO", status=1, says="it is a device, FIFO or socket", elements=("fifo",)),
        Fault(name="odd elements", says="it is not executable", elements=("odd",)),
    ]


def make_odd_elements(parent: Path) -> None:
    """Those that are refused, and one that is not, whatever there is in it."""
    make_element(parent, "crlf", {"root.d/10-missing": "#!/no/such\n", "install.d/10-crlf": "#!/bin/bash\r\n"})
    os.mkfifo(make_element(parent, "fifo", {}) / "fifo")
    circle = "$(exit 9)'["
    files = {"install.d/10-plain": "#!/bin/bash\nexit 9\n", "line\nend/\x1b[2J": "", "tests/-rf": ""}
    odd = make_element(parent, "odd", files, depends=[circle])
    (odd / "install.d/10-plain").chmod(0o644)
    os.mkfifo(odd / "tests/fifo")
    for name, target in (("loop", "loop"), ("dangling", "nothing"), ("install.d/60-dangling", "nothing")):
        (odd / name).symlink_to(target)
    make_element(parent, circle, {f"install.d/{circle}": "#!/bin/bash\nexit 9\n"}, depends=["odd"])


def attached() -> frozenset[str]:
    """What is mounted, and the files of loop devices."""
    found = set(Path("/proc/self/mounts").read_text().splitlines())
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found.add(path.read_text().strip())
    return frozenset(found)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the builds happen."""

    directory: Path
    elements: Path
    temporary: Path
    out: Path
    cache: Path
    before: frozenset[str]
    """What was attached at the beginning."""
    images: dict[str, int] = field(default_factory=dict)
    """The builds by which the images are."""

    @classmethod
    def make(cls, directory: Path) -> Place:
        """In the empty *directory*."""
        elements, temporary, out, cache = (directory / name for name in ("elements", "temporary", "out", "cache"))
        for path in (elements, temporary, out, cache, out / "full"):
            path.mkdir()
        make_tiny_os(elements)
        files = {f"{phase.directory}/70-hang": HANGS for phase in Phase}
        files |= {"extra-data.d/50-fault": OUTSIDE, "install.d/50-fault": INSIDE, "finalise.d/50-fault": FILLS}
        make_element(elements, "soak", {**files, "post-install.d/50-mark": MARK})
        make_odd_elements(elements)
        tools.run(["mke2fs", "-q", "-t", "ext4", directory / "drive", "120M"], doing="making a drive")
        return cls(directory=directory, elements=elements, temporary=temporary, out=out, cache=cache, before=attached())

    def command(self, number: int, isolation: str, fault: Fault) -> list[str]:
        """The build *number*."""
        variables = {"SOAK_FAULT": fault.script, "SOAK_BUILD": str(number), "SOAK_NAME": fault.image}
        command = [
            sys.executable, "-m", "virt_dib", "--name", fault.image, "--formats", "raw,qcow2", "--size", "200M",
            "--isolation", isolation, "--skip-base", "-p", str(self.elements), *fault.options,
            *(word for name, value in variables.items() for word in ("--envvar", f"{name}={value}")),
            "tiny-os", "soak", *fault.elements,
        ]  # fmt: skip
        if fault.small is None:
            return command
        where, size = fault.small
        mount = f'mount -t tmpfs -o size={size} none {self.directory / where}; exec "$@"'
        # With all the ids that the sandbox is to have.
        as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user", "--map-auto"]
        return ["unshare", *as_root, "--mount", "sh", "-c", mount, "sh", *command]


def waits(process: tools.Process, shown: Path) -> bool:
    """Wait for the script of a build to wait, or for the end of the build."""
    until_s = time.monotonic() + BUILD_TIMEOUT_S
    while process.poll() is None and time.monotonic() < until_s:
        if WAITING.encode() in shown.read_bytes():
            return True
        time.sleep(0.2)
    return False


def build(place: Place, number: int, isolation: str, fault: Fault) -> list[str]:
    """Run one build; return what is not as it should be in how it ended and what it printed."""
    found = []
    environment = {**os.environ, "TMPDIR": str(place.temporary), "LC_ALL": "C.UTF-8"}
    shown = place.directory / f"{fault.name}.shown"
    with shown.open("wb") as stream, tools.started(
        place.command(number, isolation, fault),
        environment=environment, cwd=place.out, stdout=stream.fileno(), stderr=tools.TOGETHER,
    ) as process:  # fmt: skip
        if fault.harm is not None or fault.beside:
            if not waits(process, shown):
                found.append("its script has not waited")
            elif fault.harm is not None:
                fault.harm(process)
            for other in fault.beside:
                found += [f"{other.name}: {what}" for what in build(place, number, isolation, other)]
        status = process.wait(timeout=BUILD_TIMEOUT_S)
    if status == 0:
        place.images[fault.image] = number
    wanted = -signal.SIGKILL if fault.status is None else fault.status
    if status != wanted:
        found.append(f"ended with {status} instead of {wanted}")
    text = shown.read_bytes()
    if fault.says.encode() not in text:
        found.append(f"has not said '{fault.says}'")
    if b"Traceback" in text:
        found.append("a traceback")
    return found


def wait_for_processes(place: Place) -> list[str]:
    """The processes that do not end after a build."""
    left: list[str] = []
    for _ in range(100):
        left = [pid for pid in processes_of(place.temporary) if pid != str(os.getpid())]
        if not left:
            break
        time.sleep(0.1)
    return left


def leftovers(place: Place) -> list[str]:
    """What is left of a build, and what of earlier ones is not as it was."""
    found = [f"process {pid} is left" for pid in wait_for_processes(place)]
    found += [f"'{line}' is left" for line in sorted(attached() - place.before)]
    found += [f"'{path.name}' is left in TMPDIR" for path in place.temporary.iterdir()]
    hidden = [path for directory in (place.out, place.cache) for path in directory.glob(".*")]
    found += [f"'{path}' is left" for path in hidden]
    found += [
        f"'{path.name}' in the cache has {path.stat().st_size} bytes"
        for path in place.cache.iterdir()
        if path.name != "both" and path.stat().st_size != CACHED_BYTES
    ]
    for name, number in place.images.items():
        text = files_in_image(place.out / f"{name}.raw").text("/soak").strip()
        if text != str(number):
            found.append(f"the image '{name}' is that of build {text or 'nobody'} instead of {number}")
        same = ["qemu-img", "compare", "-q", f"{name}.raw", f"{name}.qcow2"]
        if tools.run(same, doing="comparing", cwd=place.out, check=False).exit_status != 0:
            found.append(f"the two files of '{name}' differ")
    if (
        tools.run(
            ["e2fsck", "-f", "-n", place.directory / "drive"], doing="checking the drive", check=False
        ).exit_status
        != 0
    ):
        found.append("the drive is damaged")
    return found


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fault", action="append", metavar="WORDS", help="only faults with these in their names")
    return parser.parse_args()


def drawn(isolation: str, draw: random.Random, words: list[str] | None) -> list[Fault]:
    """The faults of the builds to come: each of them comes before one comes again."""
    found = faults(isolation, draw)
    if words:
        found = [fault for fault in found if any(word in fault.name for word in words)] or [NONE]
    else:
        found += [NONE] * (ROUND - len(found))
    draw.shuffle(found)
    return found


def main() -> int:
    """Run as a program."""
    arguments = parsed()
    heed_signals()
    draw = random.Random(arguments.seed)  # noqa: S311 - to be the same again
    coming: dict[str, list[Fault]] = {isolation: [] for isolation in ISOLATIONS}
    outcomes: Counter[tuple[str, bool]] = Counter()
    with tempfile.TemporaryDirectory(prefix="virt-dib-soak-", dir="/var/tmp") as directory:
        place = Place.make(Path(directory))
        for number in range(1, arguments.count + 1):
            isolation = ISOLATIONS[number % 2]
            coming[isolation] = coming[isolation] or drawn(isolation, draw, arguments.fault)
            fault = coming[isolation].pop()
            begun_s = time.monotonic()
            wrong = build(place, number, isolation, fault)
            if fault.status is None:
                wait_for_processes(place)
                wrong += build(place, number, isolation, NOT_STARTED)
            seconds = time.monotonic() - begun_s
            wrong += leftovers(place)
            outcomes[fault.name.partition(" in ")[0], not wrong] += 1
            print(f"{number:4}  {isolation:8} {fault.name:28} {seconds:7.1f} s  {'; '.join(wrong) or 'ok'}", flush=True)
            for path in place.directory.glob("*.shown"):
                if wrong:
                    print(path.stem, path.read_bytes()[-2000:].decode(errors="replace"), sep="\n")
                path.unlink()
    failed = sum(count for (_, good), count in outcomes.items() if not good)
    for name, good in sorted(outcomes):
        print(f"{name:28} {outcomes[name, good]:4} {'ok' if good else 'NOT ok'}")
    print(f"{arguments.count} builds, {failed} of them not as they should be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
